#include "npy.hpp"

#include <gtest/gtest.h>

#include "literal.hpp"
#include "support.hpp"

namespace sharr {
namespace {

using detail::ParseError;
using test::npy_header;

Info parse(std::string_view text, int major = 1) {
  const std::string head = npy_header(major, text);
  EXPECT_EQ(detail::header_size(head), head.size());
  return detail::parse_header(head);
}

// A header around a descr or a shape.
std::string with_descr(std::string_view descr) {
  return "{'descr': " + std::string(descr) + ", 'fortran_order': False, 'shape': (3,), }\n";
}
std::string with_shape(std::string_view shape) {
  return "{'descr': '<f8', 'fortran_order': False, 'shape': " + std::string(shape) + ", }\n";
}

TEST(NpyReader, ReadsWhatNumpyWrites) {
  const Info info = parse("{'descr': '<f8', 'fortran_order': False, 'shape': (3, 4), }\n");
  EXPECT_EQ(info.dtype.descr(), "<f8");
  EXPECT_EQ(info.shape, (Shape{3, 4}));
  EXPECT_EQ(info.order, Order::c);
  EXPECT_EQ(info.nbytes, 96u);
  EXPECT_EQ(info.offset, 10 + 60u);
  EXPECT_EQ(info.format, "NPY 1.0");
  EXPECT_EQ(info.name, "");
}

TEST(NpyReader, VersionsDifferInLengthAndEncoding) {
  const std::string plain = with_shape("(2,)");
  EXPECT_EQ(parse(plain, 1).offset, 10 + plain.size());
  EXPECT_EQ(parse(plain, 2).offset, 12 + plain.size());
  EXPECT_EQ(parse(plain, 3).offset, 12 + plain.size());
  EXPECT_EQ(parse(plain, 2).format, "NPY 2.0");
  EXPECT_EQ(parse(plain, 3).format, "NPY 3.0");

  EXPECT_EQ(parse(with_descr("[('gr\xF6\xDF', '<f4')]"), 1).dtype.descr(), "[('größ', '<f4')]");
  EXPECT_EQ(parse(with_descr("[('gr\xF6\xDF', '<f4')]"), 2).dtype.descr(), "[('größ', '<f4')]");
  EXPECT_EQ(parse(with_descr("[('名前', '<f4')]"), 3).dtype.descr(), "[('名前', '<f4')]");
  EXPECT_EQ(parse(with_descr("[('é', '<f4')]"), 1).dtype.descr(), "[('Ã©', '<f4')]");
}

TEST(NpyReader, RefusesWhatIsNotUtf8InVersion3) {
  for (const char* name : {"\xFF", "\xC0\x80", "\xE2\x82", "\xED\xA0\x80", "\xF5\x80\x80\x80",
                           "\x80", "\xF4\x90\x80\x80", "\xE0\x80\x80"}) {
    EXPECT_THROW(parse(with_descr("[('" + std::string(name) + "', '<f4')]"), 3), ParseError);
  }
}

TEST(NpyReader, KnowsWhatIsNoNpyFile) {
  EXPECT_EQ(detail::header_size(""), 0u);
  EXPECT_EQ(detail::header_size("\x93NUMPX\x01\0\x10\0\0\0"), 0u);
  EXPECT_EQ(detail::header_size("hello, this is some text"), 0u);
  const std::string good = npy_header(1, with_shape("(1,)"));
  for (std::size_t n = 0; n < 10; ++n) EXPECT_EQ(detail::header_size(good.substr(0, n)), 0u) << n;
  EXPECT_EQ(detail::header_size(good.substr(0, 10)), good.size());
}

TEST(NpyReader, RefusesUnknownVersions) {
  for (const char major : {'\0', '\4', '\x80', '\xFF'}) {
    std::string head = npy_header(1, with_shape("(1,)"));
    head[6] = major;
    EXPECT_THROW(detail::header_size(head), ParseError) << int{major};
  }
  std::string head = npy_header(1, with_shape("(1,)"));
  head[7] = 1;
  EXPECT_THROW(detail::header_size(head), ParseError);
}

TEST(NpyReader, BoundsTheHeader) {
  using namespace std::string_literals;
  EXPECT_THROW(detail::header_size("\x93NUMPY\x02\0\xFF\xFF\xFF\xFF"s), ParseError);
  EXPECT_THROW(detail::header_size("\x93NUMPY\x03\0\0\0\0\x01"s), ParseError);
  EXPECT_EQ(detail::header_size("\x93NUMPY\x02\0\0\0\1\0"s), 65536u + 12);
  EXPECT_THROW(detail::header_size("\x93NUMPY\x02\0\0\0"s), ParseError);  // 11 bytes
}

TEST(NpyReader, TakesEveryShapeNumpyHas) {
  EXPECT_EQ(parse(with_shape("()")).shape, Shape{});
  EXPECT_EQ(parse(with_shape("()")).nbytes, 8u);
  EXPECT_EQ(parse(with_shape("(5,)")).shape, Shape{5});
  EXPECT_EQ(parse(with_shape("(0,)")).nbytes, 0u);
  EXPECT_EQ(parse(with_shape("(3, 0, 2)")).shape, (Shape{3, 0, 2}));
  EXPECT_EQ(parse(with_shape("(3, 0, 2)")).nbytes, 0u);
  EXPECT_EQ(parse(with_shape("(3, 2,)")).shape, (Shape{3, 2}));
  EXPECT_EQ(parse(with_shape("(3L, 2L)")).shape, (Shape{3, 2}));  // Python 2
  std::string ones = "(";
  for (int i = 0; i < 64; ++i) ones += "1, ";
  EXPECT_EQ(parse(with_shape(ones + ")")).shape.size(), 64u);
  EXPECT_THROW(parse(with_shape(ones + "1)")), ParseError);
}

TEST(NpyReader, TakesKeysInAnyOrderAndAnyWhiteSpace) {
  for (const char* text :
       {"{'shape': (2, 3), 'fortran_order': True, 'descr': '<i2'}",
        "{'fortran_order':True,'descr':'<i2','shape':(2,3)}",
        " \t\n{ 'descr' : '<i2' ,\n 'shape' : ( 2 , 3 , ) , 'fortran_order' : True , } \n\r\f  ",
        "{\"descr\": \"<i2\", \"fortran_order\": True, \"shape\": (2, 3)}",
        "{u'descr': u'<i2', 'fortran_order': True, 'shape': (2, 3), }\n"}) {
    const Info info = parse(text);
    EXPECT_EQ(info.dtype.descr(), "<i2") << text;
    EXPECT_EQ(info.shape, (Shape{2, 3})) << text;
    EXPECT_EQ(info.order, Order::fortran) << text;
  }
}

class Malformed : public testing::TestWithParam<std::string> {};

TEST_P(Malformed, IsRefused) {
  for (const int major : {1, 2, 3})
    EXPECT_THROW(parse(GetParam(), major), ParseError) << GetParam();
}

INSTANTIATE_TEST_SUITE_P(
    Header, Malformed,
    testing::Values("", " ", "{}", "{", "[]", "'descr'", "{'descr': '<f8'}",
                    "{'descr': '<f8', 'fortran_order': False}", "{'descr': '<f8', 'shape': (1,)}",
                    "{'fortran_order': False, 'shape': (1,)}",
                    "{'descr': '<f8', 'fortran_order': False, 'shape': (1,), 'more': 1}",
                    "{'descr': '<f8', 'descr': '<f8', 'fortran_order': False, 'shape': (1,)}",
                    "{'descr': '<f8', 'fortran_order': False, 'shape': (1,), 'shape': (1,)}",
                    "{'descr': '<f8' 'fortran_order': False, 'shape': (1,)}",
                    "{'descr': '<f8', 'fortran_order': False, 'shape': (1,)} x",
                    "{'descr': '<f8', 'fortran_order': False, 'shape': (1,)}}",
                    "{'descr': '<f8', 'fortran_order': False, 'shape': (1,)",
                    "{'descr': '<f8', 'fortran_order': 0, 'shape': (1,)}",
                    "{'descr': '<f8', 'fortran_order': false, 'shape': (1,)}",
                    "{'descr': '<f8', 'fortran_order': 'False', 'shape': (1,)}",
                    "{'descr': <f8, 'fortran_order': False, 'shape': (1,)}",
                    "{'descr': None, 'fortran_order': False, 'shape': (1,)}",
                    "{'descr': '<f8, 'fortran_order': False, 'shape': (1,)}",
                    "{'descr': '<f8\n', 'fortran_order': False, 'shape': (1,)}",
                    "{'descr: '<f8', 'fortran_order': False, 'shape': (1,)}",
                    "{'de\\q': '<f8', 'fortran_order': False, 'shape': (1,)}",
                    "{,'descr': '<f8', 'fortran_order': False, 'shape': (1,)}",
                    "{'descr': '<f8',, 'fortran_order': False, 'shape': (1,)}"));

INSTANTIATE_TEST_SUITE_P(
    HeaderShape, Malformed,
    testing::Values(with_shape("(1)"), with_shape("1"), with_shape("[1]"), with_shape("(1 2)"),
                    with_shape("(,)"), with_shape("(1,,2)"), with_shape("(-1,)"),
                    with_shape("(2, -3)"), with_shape("(0, -3)"), with_shape("(1.5,)"),
                    with_shape("(1e3,)"), with_shape("(True,)"), with_shape("('1',)"),
                    with_shape("(0x10,)"), with_shape("(--1,)"), with_shape("(-,)"),
                    with_shape("((1,),)"), with_shape("(1,"), with_shape("(9223372036854775808,)"),
                    // Each fits, their product does not.
                    with_shape("(9223372036854775807,)"), with_shape("(4294967296, 4294967296)"),
                    with_shape("(3037000500, 3037000500, 2)"), with_shape("(1152921504606846976,)"),
                    // NumPy multiplies the others although one is 0.
                    with_shape("(0, 4294967296, 4294967296)")));

INSTANTIATE_TEST_SUITE_P(
    HeaderDescr, Malformed,
    testing::Values(with_descr("'O'"), with_descr("'|O'"), with_descr("'|O8'"), with_descr("'<f3'"),
                    with_descr("'<f'8"), with_descr("''"), with_descr("'<'"), with_descr("'<q99'"),
                    with_descr("[('a', 'O')]"), with_descr("[('a',)]"), with_descr("[('a', '<f8'"),
                    with_descr("[('a', '<f8']"), with_descr("[('a' '<f8')]"),
                    with_descr("[('a', '<f8') ('b', '<f8')]"),
                    with_descr("[('a', '<f8'), ('a', '<f8')]"), with_descr("{'names': ['a']}"),
                    with_descr("[(1, '<f8')]"), with_descr("[('a', 8)]"),
                    with_descr("[('a', '<f8', -1)]"), with_descr("[('a', '<f8', (-1,))]"),
                    with_descr("[('a', '<f8', (65536, 65536))]"), with_descr("('<f8', (2,))"),
                    with_descr("[(('t', 'a', 'b'), '<f8')]"), with_descr("[('a\\x0', '<f8')]"),
                    with_descr("[('a\\U00110000', '<f8')]")));

TEST(NpyReader, RefusesNulBytesAndBareLineEndsInStrings) {
  using namespace std::string_literals;
  for (const int major : {1, 2, 3}) {
    EXPECT_THROW(parse(with_descr("[('a\0', '<f8')]"s), major), ParseError);
    EXPECT_THROW(parse(with_descr("[('a\n', '<f8')]"), major), ParseError);
    EXPECT_THROW(parse(with_descr("[('a\r', '<f8')]"), major), ParseError);
    EXPECT_THROW(parse(with_shape("(1,)") + "\0"s, major), ParseError);
  }
}

TEST(NpyReader, RefusesDepthThatWouldCostTheStack) {
  const auto nested = [](int depth, const char* open, const char* close) {
    std::string text;
    for (int i = 0; i < depth; ++i) text += open;
    text += "'<f4'";
    for (int i = 0; i < depth; ++i) text += close;
    return with_descr(text);
  };
  EXPECT_EQ(parse(nested(30, "[('a', ", ")]")).dtype.itemsize(), 4u);
  EXPECT_THROW(parse(nested(100, "[('a', ", ")]")), ParseError);
  EXPECT_THROW(parse(nested(1'000'000, "[('a', ", ")]"), 2), ParseError);
  EXPECT_THROW(parse(nested(1'000'000, "(", ", (1,))"), 2), ParseError);
  EXPECT_THROW(parse("{'shape': " + std::string(1'000'000, '(') + "}", 2), ParseError);
  EXPECT_THROW(parse(std::string(1'000'000, '{'), 2), ParseError);
}

TEST(NpyReader, NeverReadsBeyondATruncatedText) {
  const std::string text =
      "{'descr': [(('t', 'a'), '<f8', (2,)), ('b', [('c', '|S3')])], 'fortran_order': True, "
      "'shape': (1, 2L)}";
  ASSERT_EQ(parse(text).dtype.itemsize(), 19u);
  for (std::size_t n = 0; n < text.size(); ++n) {
    // On the heap and of that size, so that a sanitizer sees every byte too many.
    const std::vector<char> head = [&] {
      const std::string bytes = npy_header(1, text.substr(0, n));
      return std::vector<char>(bytes.begin(), bytes.end());
    }();
    EXPECT_THROW(detail::parse_header({head.data(), head.size()}), ParseError) << n;
  }
}

TEST(NpyReader, SubArraysMayHaveNoMoreDimensionsThanArrays) {
  std::string ones;
  for (int i = 0; i < 64; ++i) ones += "1, ";
  EXPECT_NO_THROW(parse(with_descr("[('a', '<f4', (" + ones + "))]")));
  EXPECT_THROW(parse(with_descr("[('a', '<f4', (" + ones + "1))]")), ParseError);
}

// As numpy.lib.format writes it, up to the padding.
void expect_written(const Dtype& dtype, const Shape& shape, Order order, std::string_view text,
                    int major = 1) {
  const std::string header = *detail::format_header(dtype, shape, order);
  const std::size_t prefix = major == 1 ? 10 : 12;
  ASSERT_EQ(header.size(), 4096u);
  EXPECT_EQ(header.substr(0, 6), "\x93NUMPY");
  EXPECT_EQ(header[6], major);
  EXPECT_EQ(header[7], 0);
  EXPECT_EQ(header.substr(8, prefix - 8),
            npy_header(major, std::string(4096 - prefix, ' ')).substr(8, prefix - 8));
  EXPECT_EQ(header.substr(prefix, text.size()), text);
  EXPECT_EQ(header.substr(prefix + text.size()),
            std::string(4096 - prefix - text.size() - 1, ' ') + '\n');
}

TEST(NpyWriter, WritesTheBytesOfNumpy) {
  expect_written(Dtype("<f8"), {3, 4}, Order::c,
                 "{'descr': '<f8', 'fortran_order': False, 'shape': (3, 4), }");
  expect_written(Dtype(">i2"), {7}, Order::fortran,
                 "{'descr': '>i2', 'fortran_order': True, 'shape': (7,), }");
  expect_written(Dtype("?"), {}, Order::c,
                 "{'descr': '|b1', 'fortran_order': False, 'shape': (), }");
  expect_written(Dtype("[('x', '<f4'), ('y', 'i1', 3)]"), {0, 2}, Order::c,
                 "{'descr': [('x', '<f4'), ('y', '|i1', (3,))], 'fortran_order': False, "
                 "'shape': (0, 2), }");
  expect_written(Dtype("[('größe', '<f4')]"), {1}, Order::c,
                 "{'descr': [('gr\xF6\xDF"
                 "e', '<f4')], 'fortran_order': False, 'shape': (1,), }");
  expect_written(Dtype("[('名前', '<f4')]"), {1}, Order::c,
                 "{'descr': [('名前', '<f4')], 'fortran_order': False, 'shape': (1,), }", 3);
}

std::string many_fields(int count, std::string_view stem = "field") {
  std::string descr = "[";
  for (int i = 0; i < count; ++i) {
    descr += (i > 0 ? ", ('" : "('") + std::string(stem) + std::to_string(i) + "', '<f4')";
  }
  return descr + "]";
}

TEST(NpyWriter, TakesTheVersionThatTheHeaderNeeds) {
  struct Case {
    int fields;
    const char* stem;
    int version;
    std::size_t size;
  };
  // 69,632 bytes are more than 16 bits can tell.
  for (const auto& [fields, stem, version, size] :
       {Case{100, "field", 1, 4096}, Case{300, "field", 1, 8192}, Case{2900, "field", 1, 65536},
        Case{3100, "field", 2, 69632}, Case{10, "名", 3, 4096}, Case{300, "名", 3, 8192}}) {
    const Dtype dtype(many_fields(fields, stem));
    const std::string header = *detail::format_header(dtype, {2}, Order::c);
    EXPECT_EQ(header.size(), size) << fields << stem;
    EXPECT_EQ(header[6], version) << fields << stem;
    const Info info = detail::parse_header(header);
    EXPECT_EQ(info.dtype, dtype);
    EXPECT_EQ(info.offset, header.size());
  }
}

TEST(NpyWriter, EveryLengthAroundAPageLeavesRoomForTheLineEnd) {
  for (const std::size_t around : {std::size_t{4096}, std::size_t{65536}}) {
    for (std::size_t n = around - 100; n < around + 20; ++n) {
      const Dtype dtype("[('" + std::string(n, 'a') + "', '<f4')]");
      const std::string header = *detail::format_header(dtype, {1}, Order::c);
      ASSERT_EQ(header.size() % 4096, 0u) << n;
      ASSERT_EQ(header.back(), '\n') << n;
      ASSERT_EQ(detail::header_size(header), header.size()) << n;
      ASSERT_EQ(detail::parse_header(header).dtype, dtype) << n;
    }
  }
}

TEST(NpyWriter, RefusesHeadersThatNobodyWouldRead) {
  const Dtype dtype("[('" + std::string(detail::max_header, 'a') + "', '<f4')]");
  EXPECT_THROW(detail::format_header(dtype, {1}, Order::c), ParseError);
}

TEST(DataSize, MultipliesWithEveryOverflowSeen) {
  EXPECT_EQ(detail::data_size({}, 8), 8u);
  EXPECT_EQ(detail::data_size({2, 3}, 8), 48u);
  EXPECT_EQ(detail::data_size({2, 0, 3}, 8), 0u);
  EXPECT_EQ(detail::data_size({1000}, 0), 0u);
  EXPECT_EQ(detail::data_size({int64_t{1} << 40}, 8), uint64_t{8} << 40);
  EXPECT_THROW(detail::data_size({-1}, 8), ParseError);
  EXPECT_THROW(detail::data_size({0, -1}, 8), ParseError);
  EXPECT_THROW(detail::data_size({INT64_MAX}, 1), ParseError);
  EXPECT_THROW(detail::data_size({INT64_MAX}, 2), ParseError);
  EXPECT_THROW(detail::data_size({int64_t{1} << 32, int64_t{1} << 32}, 0), ParseError);
  EXPECT_THROW(detail::data_size({0, int64_t{1} << 32, int64_t{1} << 32}, 1), ParseError);
  EXPECT_THROW(detail::data_size(Shape(65, 1), 1), ParseError);
  EXPECT_EQ(detail::data_size(Shape(64, 1), 1), 1u);
}

TEST(ShapeText, IsPythons) {
  EXPECT_EQ(shape_text({}), "()");
  EXPECT_EQ(shape_text({3}), "(3,)");
  EXPECT_EQ(shape_text({3, 4}), "(3, 4)");
}

}  // namespace
}  // namespace sharr
