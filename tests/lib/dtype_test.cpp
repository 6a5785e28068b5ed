#include "sharr/dtype.hpp"

#include <gtest/gtest.h>

#include <cerrno>
#include <complex>
#include <ostream>

#include "support.hpp"

namespace sharr {
namespace {

// What NumPy makes of given: dtype.descr as the header has it, str(dtype), itemsize.
struct Case {
  std::string given, descr, str;
  std::size_t itemsize;

  friend std::ostream& operator<<(std::ostream& out, const Case& c) { return out << c.given; }
};

class Known : public testing::TestWithParam<Case> {};

TEST_P(Known, IsWhatNumpyMakesOfIt) {
  const Dtype dtype(GetParam().given);
  EXPECT_EQ(dtype.descr(), GetParam().descr);
  EXPECT_EQ(dtype.str(), GetParam().str);
  EXPECT_EQ(dtype.itemsize(), GetParam().itemsize);
  EXPECT_EQ(dtype.structured(), GetParam().descr.starts_with('['));
  EXPECT_EQ(dtype.literal(), dtype.structured() ? GetParam().descr : "'" + GetParam().descr + "'");
  EXPECT_EQ(Dtype(dtype.descr()), dtype);
}

INSTANTIATE_TEST_SUITE_P(
    Typestrings, Known,
    testing::Values(
        Case{"|b1", "|b1", "bool", 1}, Case{"<b1", "|b1", "bool", 1}, Case{"|i1", "|i1", "int8", 1},
        Case{"|u1", "|u1", "uint8", 1}, Case{"<i2", "<i2", "int16", 2},
        Case{">i2", ">i2", ">i2", 2}, Case{"=i2", "<i2", "int16", 2}, Case{"i2", "<i2", "int16", 2},
        Case{"|i2", "<i2", "int16", 2}, Case{"<u4", "<u4", "uint32", 4},
        Case{">u8", ">u8", ">u8", 8}, Case{"<i8", "<i8", "int64", 8},
        Case{"<f2", "<f2", "float16", 2}, Case{"<f4", "<f4", "float32", 4},
        Case{"<f8", "<f8", "float64", 8}, Case{">f8", ">f8", ">f8", 8},
        Case{"<f16", "<f16", "float128", 16}, Case{">f16", ">f16", ">f16", 16},
        Case{"<c8", "<c8", "complex64", 8}, Case{"<c16", "<c16", "complex128", 16},
        Case{"<c32", "<c32", "complex256", 32}, Case{">c8", ">c8", ">c8", 8},
        Case{"|S3", "|S3", "|S3", 3}, Case{">S3", "|S3", "|S3", 3}, Case{"S", "|S0", "|S0", 0},
        Case{"a5", "|S5", "|S5", 5}, Case{"<U3", "<U3", "<U3", 12}, Case{">U3", ">U3", ">U3", 12},
        Case{"U0", "<U0", "<U0", 0}, Case{"V5", "|V5", "|V5", 5}, Case{"|V0", "|V0", "|V0", 0}));

INSTANTIATE_TEST_SUITE_P(Datetimes, Known,
                         testing::Values(Case{"<M8[ns]", "<M8[ns]", "datetime64[ns]", 8},
                                         Case{">M8[ns]", ">M8[ns]", ">M8[ns]", 8},
                                         Case{"<m8[25s]", "<m8[25s]", "timedelta64[25s]", 8},
                                         Case{"<M8[1D]", "<M8[D]", "datetime64[D]", 8},
                                         Case{"<M8", "<M8", "datetime64", 8},
                                         Case{"<m8[generic]", "<m8", "timedelta64", 8},
                                         Case{"M8[Y]", "<M8[Y]", "datetime64[Y]", 8},
                                         Case{"m8[as]", "<m8[as]", "timedelta64[as]", 8}));

INSTANTIATE_TEST_SUITE_P(
    Aliases, Known,
    testing::Values(
        Case{"?", "|b1", "bool", 1}, Case{"b", "|i1", "int8", 1}, Case{"B", "|u1", "uint8", 1},
        Case{"h", "<i2", "int16", 2}, Case{"H", "<u2", "uint16", 2}, Case{"i", "<i4", "int32", 4},
        Case{"I", "<u4", "uint32", 4}, Case{"l", "<i8", "int64", 8}, Case{"L", "<u8", "uint64", 8},
        Case{"q", "<i8", "int64", 8}, Case{"Q", "<u8", "uint64", 8}, Case{"e", "<f2", "float16", 2},
        Case{"f", "<f4", "float32", 4}, Case{"d", "<f8", "float64", 8},
        Case{"g", "<f16", "float128", 16}, Case{"F", "<c8", "complex64", 8},
        Case{"D", "<c16", "complex128", 16}, Case{"G", "<c32", "complex256", 32},
        Case{">d", ">f8", ">f8", 8}, Case{"bool", "|b1", "bool", 1}, Case{"int", "<i8", "int64", 8},
        Case{"uint", "<u8", "uint64", 8}, Case{"float", "<f8", "float64", 8},
        Case{"complex", "<c16", "complex128", 16}, Case{"uint8", "|u1", "uint8", 1},
        Case{"int64", "<i8", "int64", 8}, Case{"float16", "<f2", "float16", 2},
        Case{"complex64", "<c8", "complex64", 8}));

INSTANTIATE_TEST_SUITE_P(
    Structured, Known,
    testing::Values(
        Case{"[]", "[]", "[]", 0},
        Case{"[('x', '<f4'), ('y', '>i2')]", "[('x', '<f4'), ('y', '>i2')]",
             "[('x', '<f4'), ('y', '>i2')]", 6},
        Case{"[(\"x\",'f4',),]", "[('x', '<f4')]", "[('x', '<f4')]", 4},
        Case{"[('a', '?'), ('b', 'i1'), ('c', 'S3')]", "[('a', '|b1'), ('b', '|i1'), ('c', '|S3')]",
             "[('a', '?'), ('b', 'i1'), ('c', 'S3')]", 5},
        Case{"[('a', '|S0'), ('b', '<U0'), ('c', '|V0')]",
             "[('a', '|S0'), ('b', '<U0'), ('c', '|V0')]", "[('a', 'S'), ('b', '<U'), ('c', 'V')]",
             0},
        // Padding: between, at the end, alone.
        Case{"[('a', '|i1'), ('', '|V7'), ('b', '<f8'), ('c', '<i2'), ('', '|V6')]",
             "[('a', '|i1'), ('', '|V7'), ('b', '<f8'), ('c', '<i2'), ('', '|V6')]",
             "{'names': ['a', 'b', 'c'], 'formats': ['i1', '<f8', '<i2'], 'offsets': [0, 8, 16], "
             "'itemsize': 24}",
             24},
        Case{"[('', '|V8')]", "[('', '|V8')]",
             "{'names': [], 'formats': [], 'offsets': [], 'itemsize': 8}", 8},
        // NumPy's reader takes an unnamed sub-array for padding too, but not an unnamed number.
        Case{"[('', '<f4', (2,)), ('a', '<i4')]", "[('', '<f4', (2,)), ('a', '<i4')]",
             "{'names': ['a'], 'formats': ['<i4'], 'offsets': [8], 'itemsize': 12}", 12},
        Case{"[('', '<f4')]", "[('', '<f4')]", "[('', '<f4')]", 4},
        // Titles.
        Case{"[(('t', 'a'), '<f4'), ('b', '<i4')]", "[(('t', 'a'), '<f4'), ('b', '<i4')]",
             "[(('t', 'a'), '<f4'), ('b', '<i4')]", 8},
        Case{"[(('t', 'a'), '|i1'), ('', '|V3'), ('b', '<i4')]",
             "[(('t', 'a'), '|i1'), ('', '|V3'), ('b', '<i4')]",
             "{'names': ['a', 'b'], 'formats': ['i1', '<i4'], 'offsets': [0, 4], 'titles': ['t', "
             "None], 'itemsize': 8}",
             8},
        Case{"[(('t', ''), '|V3'), ('b', '<i4')]", "[(('t', ''), '|V3'), ('b', '<i4')]",
             "[(('t', ''), 'V3'), ('b', '<i4')]", 7},
        // Sub-arrays.
        Case{"[('a', '<f4', (2, 3)), ('b', '<U2', (1,))]",
             "[('a', '<f4', (2, 3)), ('b', '<U2', (1,))]",
             "[('a', '<f4', (2, 3)), ('b', '<U2', (1,))]", 32},
        Case{"[('a', '<f4', 3)]", "[('a', '<f4', (3,))]", "[('a', '<f4', (3,))]", 12},
        Case{"[('a', '<f4', (2, 0))]", "[('a', '<f4', (2, 0))]", "[('a', '<f4', (2, 0))]", 0},
        Case{"[('a', '<f4', ())]", "[('a', '<f4')]", "[('a', '<f4')]", 4},
        Case{"[('a', (('<f4', (3,)), (2,)))]", "[('a', ('<f4', (3,)), (2,))]",
             "[('a', ('<f4', (3,)), (2,))]", 24},
        Case{"[('a', '|i1'), ('', '|V1'), ('b', ('<f4', (3,)), (2,))]",
             "[('a', '|i1'), ('', '|V1'), ('b', ('<f4', (3,)), (2,))]",
             "{'names': ['a', 'b'], 'formats': ['i1', (('<f4', (3,)), (2,))], 'offsets': [0, 2], "
             "'itemsize': 26}",
             26},
        // Nesting.
        Case{"[('p', [('x', '<f4'), ('y', '<f4')], (2,)), ('q', [('z', '|b1')])]",
             "[('p', [('x', '<f4'), ('y', '<f4')], (2,)), ('q', [('z', '|b1')])]",
             "[('p', [('x', '<f4'), ('y', '<f4')], (2,)), ('q', [('z', '?')])]", 17},
        Case{
            "[('p', [('x', '|i1'), ('', '|V3'), ('y', '<f4', (2,))], (2,)), ('', '|V1')]",
            "[('p', [('x', '|i1'), ('', '|V3'), ('y', '<f4', (2,))], (2,)), ('', '|V1')]",
            "{'names': ['p'], 'formats': [({'names': ['x', 'y'], 'formats': ['i1', ('<f4', (2,))], "
            "'offsets': [0, 4], 'itemsize': 12}, (2,))], 'offsets': [0], 'itemsize': 25}",
            25},
        // Names as repr() writes them.
        Case{R"([("it's", '<i4'), ('"', '<i4'), ('\'"', '<i4'), ('b\\s', '<i4'), ('n\nl', '<i4')])",
             R"([("it's", '<i4'), ('"', '<i4'), ('\'"', '<i4'), ('b\\s', '<i4'), ('n\nl', '<i4')])",
             R"([("it's", '<i4'), ('"', '<i4'), ('\'"', '<i4'), ('b\\s', '<i4'), ('n\nl', '<i4')])",
             20},
        Case{"[('größe', '<i4'), ('名前', '<i4'), ('\\xad', '<i4')]",
             "[('größe', '<i4'), ('名前', '<i4'), ('\\xad', '<i4')]",
             "[('größe', '<i4'), ('名前', '<i4'), ('\\xad', '<i4')]", 12}));

class Refused : public testing::TestWithParam<std::string> {};

TEST_P(Refused, IsAnArgumentError) {
  EXPECT_THROW(Dtype{GetParam()}, ArgumentError);
  EXPECT_EQ(test::caught([] { Dtype{GetParam()}; }).errnum, EINVAL);
}

INSTANTIATE_TEST_SUITE_P(
    Dtypes, Refused,
    testing::Values("[('x', '|V0', (2,))]", "[('x', '|S0', ())]", "[('x', [], (100000, 100000))]",
                    "", "<", " ", "x", "<x4", "f3", "<f1", "i16", "i0", "b2", "c4", "<f8 ", " <f8",
                    "<<f8", "f-8", "f+8", "<f8\n", "S-1", "S99999999999999999999", "S2147483648",
                    "U536870912", "c99", "M4", "M8[", "M8[]", "M8[x]", "M8[0s]", "M8[-1s]",
                    "M8[2147483648s]", "M8[ns", "int7", "int24", "float80", "float8", "complex32",
                    "uint256", "'<f8'", "('<f8', (2,))", "{'x': 1}", "\xFF", "[('\xFF', '<f4')]"));

INSTANTIATE_TEST_SUITE_P(
    Structured, Refused,
    testing::Values("[", "[(", "[('a', '<f4')", "[('a', '<f4')] ]", "[('a', '<f4')] x",
                    "[('a', '<f4'), ('a', '<i4')]", "[(('a', 'a'), '<f4')]",
                    "[(('b', 'a'), '<f4'), ('b', '<i4')]", "[('a', '<f4', (-1,))]",
                    "[('a', '<f4', (2147483648, 0))]", "[('a', '<f4', (2147483647,))]",
                    "[('a', '|V2000000000'), ('b', '|V2000000000')]", "[('a', '<f4', 1)]",
                    "[('a', '<f4', (1))]", "[('a', 'O')]", "[('a', [('b', '|O')], (2,))]",
                    "[('a', '<f4', (2,), 3)]", std::string("[('a\0', '<f4')]", 15)));

TEST(Dtype, ObjectsAreRefusedWithAReason) {
  for (const char* name : {"O", "|O", "O8", "object", "[('a', 'O')]"}) {
    EXPECT_NE(test::caught([&] { Dtype{name}; }).message.find("object"), std::string::npos) << name;
  }
}

TEST(Dtype, OfACppType) {
  EXPECT_EQ(Dtype::of<bool>().descr(), "|b1");
  EXPECT_EQ(Dtype::of<std::int8_t>().descr(), "|i1");
  EXPECT_EQ(Dtype::of<std::uint8_t>().descr(), "|u1");
  EXPECT_EQ(Dtype::of<int>(), Dtype("i4"));
  EXPECT_EQ(Dtype::of<std::uint64_t>(), Dtype("u8"));
  EXPECT_EQ(Dtype::of<float>(), Dtype("f4"));
  EXPECT_EQ(Dtype::of<double>(), Dtype("f8"));
  EXPECT_EQ(Dtype::of<long double>(), Dtype("g"));
  EXPECT_EQ(Dtype::of<std::complex<float>>(), Dtype("c8"));
  EXPECT_EQ(Dtype::of<std::complex<double>>(), Dtype("c16"));
  EXPECT_EQ(Dtype::of<double>().itemsize(), 8u);
}

TEST(Dtype, EqualMeansTheSameElements) {
  EXPECT_EQ(Dtype("f8"), Dtype("float64"));
  EXPECT_NE(Dtype("<f8"), Dtype(">f8"));
  EXPECT_NE(Dtype("<M8[s]"), Dtype("<M8[ns]"));
  EXPECT_NE(Dtype("[('a', '<f4')]"), Dtype("[('b', '<f4')]"));
  EXPECT_EQ(Dtype("[ ( 'a' ,'f4'),]"), Dtype("[('a', '<f4')]"));
}

TEST(Dtype, PrintingANestedOneTakesNoMoreThanItsLength) {
  std::string descr = "'<f4'";
  for (int i = 0; i < 31; ++i) descr = "[('a', " + descr + ")]";
  // Twice the work a level would be two thousand million fields.
  EXPECT_EQ(Dtype(descr).str(), descr);
}

}  // namespace
}  // namespace sharr
