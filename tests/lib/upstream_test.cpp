// Objects of the SharedArray package, made by hand: data, then a packed trailer of
//   magic[16], u64 size, i32 typenum, [i32 itemsize], i32 ndims, i64 dims[16, 32 or 64].
#include "upstream.hpp"

#include <gtest/gtest.h>
#include <sys/mman.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <optional>
#include <ostream>

#include "literal.hpp"
#include "support.hpp"

namespace sharr {
namespace {

using detail::parse_trailer;
using detail::ParseError;
using test::caught;

struct Trailer {
  std::string magic = std::string("[SharedArray]\0\0\0", 16);
  std::uint64_t size = 48;
  std::int32_t typenum = 12;                  // float64
  std::optional<std::int32_t> itemsize = {};  // since 3.1
  std::int32_t ndims = 2;
  std::vector<std::int64_t> dims = {2, 3};
  std::size_t room = 32;

  template <class T>
  static void append(std::string& out, T value) {
    char bytes[sizeof(T)];
    std::memcpy(bytes, &value, sizeof(T));
    out.append(bytes, sizeof(T));
  }
  std::string bytes() const {
    std::string out = magic;
    append(out, size);
    append(out, typenum);
    if (itemsize) append(out, *itemsize);
    append(out, ndims);
    for (std::size_t i = 0; i < room; ++i) append(out, i < dims.size() ? dims[i] : std::int64_t{0});
    return out;
  }
  // A whole object of data_size bytes of data; its last max_trailer bytes are read.
  std::optional<Info> parse(std::uint64_t data_size) const {
    const std::string file = std::string(data_size, '\0') + bytes();
    const std::size_t tail = std::min(file.size(), detail::max_trailer);
    return parse_trailer(std::string_view(file).substr(file.size() - tail), file.size());
  }
};

struct Release {
  const char* name;
  std::size_t room;
  bool itemsize;
  std::size_t size;

  friend std::ostream& operator<<(std::ostream& out, const Release& r) { return out << r.name; }
};

class Releases : public testing::TestWithParam<Release> {
 protected:
  Trailer trailer() const {
    Trailer t;
    t.room = GetParam().room;
    if (GetParam().itemsize) t.itemsize = 8;
    return t;
  }

  test::Flat flat_;
};

INSTANTIATE_TEST_SUITE_P(Upstream, Releases,
                         testing::Values(Release{"v1", 16, false, 160},
                                         Release{"v2", 32, false, 288},
                                         Release{"v31", 32, true, 292},
                                         Release{"v32Numpy2", 64, true, 548}),
                         [](const auto& info) { return info.param.name; });

TEST_P(Releases, AreRead) {
  ASSERT_EQ(trailer().bytes().size(), GetParam().size);
  const auto info = trailer().parse(48);
  ASSERT_TRUE(info);
  EXPECT_EQ(info->dtype.descr(), "<f8");
  EXPECT_EQ(info->shape, (Shape{2, 3}));
  EXPECT_EQ(info->order, Order::c);
  EXPECT_EQ(info->offset, 0u);
  EXPECT_EQ(info->nbytes, 48u);
  EXPECT_EQ(info->format, "SharedArray");
}

TEST_P(Releases, HaveEveryNumberOfDimensionsThatFits) {
  for (std::size_t n = 0; n <= GetParam().room; ++n) {
    Trailer t = trailer();
    t.size = 8;
    t.ndims = static_cast<std::int32_t>(n);
    t.dims.assign(n, 1);
    const auto info = t.parse(8);
    ASSERT_TRUE(info) << n;
    EXPECT_EQ(info->shape, Shape(n, 1));
  }
  for (const std::int32_t n :
       {static_cast<std::int32_t>(GetParam().room) + 1, -1, INT32_MAX, INT32_MIN}) {
    Trailer t = trailer();
    t.size = 8;
    t.ndims = n;
    t.dims.assign(GetParam().room, 1);
    EXPECT_FALSE(t.parse(8)) << n;
  }
}

TEST_P(Releases, AreRefusedWhenAFieldIsWrong) {
  const auto refused = [&](auto&& damage, std::uint64_t data = 48) {
    Trailer t = trailer();
    damage(t);
    try {
      return !t.parse(data);
    } catch (const ParseError&) {
      return true;
    }
  };
  EXPECT_FALSE(refused([](Trailer&) {}));
  for (std::size_t i = 0; i < 16; ++i) {
    EXPECT_TRUE(refused([&](Trailer& t) { ++t.magic[i]; })) << i;
  }
  for (const std::uint64_t size : {0ull, 47ull, 49ull, 1ull << 63, ~0ull}) {
    EXPECT_TRUE(refused([&](Trailer& t) { t.size = size; })) << size;
  }
  EXPECT_TRUE(refused([](Trailer&) {}, 47));
  EXPECT_TRUE(refused([](Trailer&) {}, 49));
  EXPECT_TRUE(refused([](Trailer&) {}, 4096));
  for (const std::int32_t number : {-1, 24, 17, 11, 256, INT32_MAX, INT32_MIN}) {
    EXPECT_TRUE(refused([&](Trailer& t) { t.typenum = number; })) << number;
  }
  if (GetParam().itemsize) {
    for (const std::int32_t size : {0, 4, 9, -8, INT32_MAX}) {
      EXPECT_TRUE(refused([&](Trailer& t) { t.itemsize = size; })) << size;
    }
  }
  EXPECT_TRUE(refused([](Trailer& t) { t.ndims = 1; }));
  for (const Shape& dims : {Shape{2, 4}, Shape{-2, -3}, Shape{0, 3}, Shape{INT64_MAX, INT64_MAX},
                            Shape{std::int64_t{1} << 62, 12}}) {
    EXPECT_TRUE(refused([&](Trailer& t) { t.dims = dims; })) << shape_text(dims);
  }
}

TEST_P(Releases, HoldEveryNumericType) {
  struct Type {
    std::int32_t number;
    const char* descr;
  };
  for (const auto& [number, descr] :
       {Type{0, "|b1"},   Type{1, "|i1"},   Type{2, "|u1"},  Type{3, "<i2"},   Type{4, "<u2"},
        Type{5, "<i4"},   Type{6, "<u4"},   Type{7, "<i8"},  Type{8, "<u8"},   Type{9, "<i8"},
        Type{10, "<u8"},  Type{11, "<f4"},  Type{12, "<f8"}, Type{13, "<f16"}, Type{14, "<c8"},
        Type{15, "<c16"}, Type{16, "<c32"}, Type{21, "<M8"}, Type{22, "<m8"},  Type{23, "<f2"}}) {
    const Dtype dtype(descr);
    Trailer t = trailer();
    t.typenum = number;
    t.size = 6 * dtype.itemsize();
    if (t.itemsize) t.itemsize = static_cast<std::int32_t>(dtype.itemsize());
    const auto info = t.parse(t.size);
    ASSERT_TRUE(info) << number;
    EXPECT_EQ(info->dtype, dtype);
    EXPECT_EQ(info->nbytes, t.size);
  }
}

TEST_P(Releases, HoldStringsAndVoids) {
  struct Type {
    std::int32_t number;
    const char* descr;
  };
  for (const auto& [number, descr] : {Type{18, "|S5"}, Type{19, "<U5"}, Type{20, "|V5"}}) {
    const Dtype dtype(descr);
    Trailer t = trailer();
    t.typenum = number;
    t.size = 6 * dtype.itemsize();
    if (t.itemsize) t.itemsize = static_cast<std::int32_t>(dtype.itemsize());
    const auto info = t.parse(t.size);
    ASSERT_TRUE(info) << number;
    EXPECT_EQ(info->dtype, dtype);
    // Before 3.1 the itemsize follows from the size, which must divide.
    t.size += 1;
    EXPECT_FALSE(t.parse(t.size)) << number;
  }
  Trailer t = trailer();
  t.typenum = 17;
  EXPECT_THROW(t.parse(48), ParseError);  // object
}

TEST_P(Releases, HoldArraysWithoutElements) {
  Trailer t = trailer();
  t.size = 0;
  t.dims = {0, 3};
  const auto info = t.parse(0);
  ASSERT_TRUE(info);
  EXPECT_EQ(info->shape, (Shape{0, 3}));
  EXPECT_EQ(info->nbytes, 0u);
}

TEST_P(Releases, CutShortAreNone) {
  const std::string file = std::string(48, 'x') + trailer().bytes();
  for (std::size_t n = 0; n < file.size(); ++n) {
    // Without the last dimensions it is an older release's, and whole.
    if (n == 48 + (GetParam().itemsize ? 292 : 160)) continue;
    const std::string part = file.substr(0, n);
    test::write_file(flat_.path(), part);
    EXPECT_THROW(info(flat_.uri()), FormatError) << n;
  }
}

TEST_P(Releases, AreAttachedListedAndRemoved) {
  const test::Namespace space;
  std::string data;
  for (int i = 0; i < 6; ++i) Trailer::append(data, i + 0.5);
  test::write_file(space.path("a"), data + trailer().bytes());

  const auto found = list(space.directory());
  ASSERT_EQ(found.size(), 1u);
  EXPECT_EQ(found[0].name, space.uri("a"));
  EXPECT_EQ(found[0].format, "SharedArray");
  {
    const Array a = attach(space.uri("a"));
    EXPECT_EQ(a.as<double>()[0], 0.5);
    EXPECT_EQ(a.as<double>()[5], 5.5);
    a.as<double>()[5] = -1;
    EXPECT_EQ(attach(space.uri("a"), Mode::read).as<double>()[5], -1);
  }
  remove(space.uri("a"));
  EXPECT_TRUE(space.files().empty());
}

TEST(Upstream, AnEmptyObjectIsATrailerAlone) {
  const test::Flat flat;
  Trailer t;
  t.size = 0;
  t.dims = {0, 3};
  test::write_file(flat.path(), t.bytes());
  const Array a = attach(flat.uri());
  EXPECT_NE(a.data(), nullptr);
  EXPECT_TRUE(a.as<double>().empty());
  EXPECT_NO_THROW(a.msync(MS_SYNC));
}

TEST(Upstream, DataThatLooksLikeAnOlderTrailerChangesNothing) {
  // The data of this object ends in a whole trailer of 1.x that does not agree with the file.
  Trailer inner;
  inner.room = 16;
  Trailer outer;
  outer.typenum = 2;
  outer.itemsize = 1;
  outer.ndims = 1;
  outer.size = 160;
  outer.dims = {160};
  const std::string file = inner.bytes() + outer.bytes();
  const auto info = parse_trailer(file, file.size());
  ASSERT_TRUE(info);
  EXPECT_EQ(info->shape, Shape{160});
}

}  // namespace
}  // namespace sharr
