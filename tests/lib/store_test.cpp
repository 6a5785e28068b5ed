#include "sharr/store.hpp"

#include <gtest/gtest.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <barrier>
#include <cerrno>
#include <cinttypes>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <numeric>
#include <optional>
#include <thread>
#include <utility>

#include "sharr/object.hpp"
#include "support.hpp"

namespace sharr {
namespace {

using test::caught;
using test::Flat;
using test::Namespace;

const Dtype f8("f8");

// "rw-s" of the mapping that holds an address.
std::string permissions(const void* address) {
  std::ifstream maps("/proc/self/maps");
  for (std::string line; std::getline(maps, line);) {
    std::uintptr_t from = 0, to = 0;
    char text[5] = "";
    const auto at = reinterpret_cast<std::uintptr_t>(address);
    if (std::sscanf(line.c_str(), "%" SCNxPTR "-%" SCNxPTR " %4s", &from, &to, text) == 3 &&
        from <= at && at < to) {
      return text;
    }
  }
  return "";
}

// Whoever runs the tests may be root, whom no permission stops.
class Unprivileged {
 public:
  Unprivileged() : effective_(seteuid(root() ? 65534 : geteuid()) == 0) {}
  Unprivileged(const Unprivileged&) = delete;
  Unprivileged& operator=(const Unprivileged&) = delete;
  ~Unprivileged() {
    if (seteuid(getuid()) != 0) std::abort();
  }
  bool effective() const { return effective_; }

 private:
  static bool root() { return getuid() == 0; }
  bool effective_;
};

TEST(Create, MakesAZeroedPageAlignedNpyFile) {
  const Flat flat;
  const Array a = create(flat.uri(), {3, 4}, f8);
  EXPECT_EQ(a.info().name, flat.uri());
  EXPECT_EQ(a.info().shape, (Shape{3, 4}));
  EXPECT_EQ(a.info().dtype, f8);
  EXPECT_EQ(a.info().order, Order::c);
  EXPECT_EQ(a.info().nbytes, 96u);
  EXPECT_EQ(a.info().size(), 12u);
  EXPECT_EQ(a.info().offset, 4096u);
  EXPECT_EQ(a.info().format, "NPY 1.0");
  EXPECT_EQ(a.mode(), Mode::read_write);
  EXPECT_EQ(reinterpret_cast<std::uintptr_t>(a.data()) % 4096, 0u);
  EXPECT_TRUE(std::ranges::all_of(a.as<double>(), [](double x) { return x == 0; }));

  std::ranges::fill(a.as<double>(), 1.5);
  const std::string file = test::read_file(flat.path());
  ASSERT_EQ(file.size(), 4096u + 96);
  EXPECT_TRUE(file.starts_with(std::string_view("\x93NUMPY\x01\0\xF6\x0F", 10)));
  double last = 0;
  std::memcpy(&last, file.data() + 4096 + 88, 8);
  EXPECT_EQ(last, 1.5);
}

TEST(Create, FollowsTheUmask) {
  const Namespace space;
  for (const auto& [mask, mode] : {std::pair<mode_t, mode_t>{022, 0644}, {077, 0600}, {0, 0666}}) {
    const mode_t before = umask(mask);
    const std::string leaf = std::to_string(mask);
    create(space.uri(leaf), {1}, f8);
    umask(before);
    struct stat st;
    ASSERT_EQ(stat(space.path(leaf).c_str(), &st), 0);
    EXPECT_EQ(st.st_mode & 07777, mode);
  }
}

TEST(Create, ATakenNameIsEexistAndLeftAlone) {
  const Flat flat;
  create(flat.uri(), {3}, f8).as<double>()[0] = 5;
  const auto found = caught([&] { create(flat.uri(), {100}, Dtype("i2")); });
  EXPECT_EQ(found.errnum, EEXIST);
  EXPECT_EQ(found.name, flat.uri());
  EXPECT_EQ(attach(flat.uri()).as<double>()[0], 5);
}

TEST(Create, WhateverTakesTheNameIsEexist) {
  const Namespace space;
  test::write_file(space.path("file"), "no array");
  std::filesystem::create_directory(space.path("directory"));
  std::filesystem::create_symlink("nowhere", space.path("link"));
  ASSERT_EQ(mkfifo(space.path("fifo").c_str(), 0600), 0);
  for (const char* leaf : {"file", "directory", "link", "fifo"}) {
    for (const std::int64_t size : {1, 16 << 20}) {  // the large one is told before its memory
      EXPECT_EQ(caught([&] { create(space.uri(leaf), {size}, f8); }).errnum, EEXIST) << leaf;
      EXPECT_EQ(caught([&] { create(space.path(leaf), {size}, f8); }).errnum, EEXIST) << leaf;
    }
  }
  EXPECT_EQ(space.files().size(), 4u);
  EXPECT_EQ(test::read_file(space.path("file")), "no array");
}

TEST(Create, ExistOkReturnsTheSameArray) {
  const Flat flat;
  CreateOptions ok;
  ok.exist_ok = true;
  const Array a = create(flat.uri(), {3, 4}, f8, ok);
  a.as<double>()[0] = 5;
  const Array b = create(flat.uri(), {3, 4}, f8, ok);
  EXPECT_EQ(b.as<double>()[0], 5);
  b.as<double>()[1] = 6;
  EXPECT_EQ(a.as<double>()[1], 6);

  ok.order = Order::fortran;
  const auto found = caught([&] { create(flat.uri(), {3, 4}, f8, ok); });
  EXPECT_EQ(found.errnum, EEXIST);
  EXPECT_EQ(found.message, "exists with shape (3, 4), dtype float64, order C");
  ok.order = Order::c;
  EXPECT_EQ(caught([&] { create(flat.uri(), {4, 3}, f8, ok); }).errnum, EEXIST);
  EXPECT_EQ(caught([&] { create(flat.uri(), {12}, f8, ok); }).errnum, EEXIST);
  EXPECT_EQ(caught([&] { create(flat.uri(), {3, 4}, Dtype(">f8"), ok); }).errnum, EEXIST);
  EXPECT_EQ(caught([&] { create(flat.uri(), {3, 4}, Dtype("i8"), ok); }).errnum, EEXIST);
}

TEST(Create, ExistOkKnowsArraysThatAreInBothOrders) {
  for (const Shape& shape : {Shape{}, Shape{5}, Shape{1, 5, 1}, Shape{0, 3, 4}}) {
    const Flat flat;
    CreateOptions ok{.order = Order::fortran, .exist_ok = true};
    create(flat.uri(), shape, f8, ok);
    ok.order = Order::c;
    EXPECT_NO_THROW(create(flat.uri(), shape, f8, ok)) << shape_text(shape);
  }
}

TEST(Create, ExistOkDoesNotTakeWhatIsNoArray) {
  const Namespace space;
  const CreateOptions ok{.exist_ok = true};
  test::write_file(space.path("file"), "no array");
  EXPECT_EQ(caught([&] { create(space.uri("file"), {1}, f8, ok); }).errnum, EINVAL);
  // To attach() a path, this is not there; to create() it is.
  std::filesystem::create_symlink("nowhere", space.path("link"));
  EXPECT_EQ(caught([&] { create(space.path("link"), {1}, f8, ok); }).errnum, EEXIST);
  EXPECT_EQ(caught([&] { create(space.uri("link"), {1}, f8, ok); }).errnum, ELOOP);
}

TEST(Create, TakesTheMemoryUnlessToldNotTo) {
  const Namespace space;
  struct stat st;
  create(space.uri("reserved"), {1 << 18}, f8);
  ASSERT_EQ(stat(space.path("reserved").c_str(), &st), 0);
  EXPECT_EQ(st.st_blocks * 512, 4096 + (2 << 20));
  create(space.uri("sparse"), {1 << 18}, f8, {.reserve = false});
  ASSERT_EQ(stat(space.path("sparse").c_str(), &st), 0);
  EXPECT_EQ(st.st_size, 4096 + (2 << 20));
  EXPECT_LE(st.st_blocks * 512, 4096);
  const Array a = attach(space.uri("sparse"));
  a.as<double>()[(1 << 18) - 1] = 3;
  EXPECT_EQ(attach(space.uri("sparse")).as<double>()[(1 << 18) - 1], 3);
}

TEST(Create, RefusesShapesThatCannotBe) {
  const Flat flat;
  for (const Shape& shape : {Shape{-1}, Shape{2, -3}, Shape{0, -1}, Shape{INT64_MAX},
                             Shape{std::int64_t{1} << 32, std::int64_t{1} << 32}, Shape(65, 1)}) {
    for (const bool reserve : {true, false}) {
      const auto found = caught([&] { create(flat.uri(), shape, f8, {.reserve = reserve}); });
      EXPECT_EQ(found.errnum, EINVAL) << shape_text(shape);
      EXPECT_EQ(found.name, flat.uri());
      EXPECT_FALSE(std::filesystem::exists(flat.path()));
    }
  }
  // These the address space or the file system refuses.
  for (const std::int64_t extent : {std::int64_t{1} << 59, std::int64_t{1} << 50}) {
    EXPECT_EQ(caught([&] { create(flat.uri(), {extent}, f8); }).errnum, ENOSPC) << extent;
    EXPECT_NE(caught([&] { create(flat.uri(), {extent}, f8, {.reserve = false}); }).errnum, 0);
    EXPECT_FALSE(std::filesystem::exists(flat.path()));
  }
}

TEST(Create, HasArraysWithoutBytes) {
  for (const Shape& shape : {Shape{0}, Shape{3, 0, 2}}) {
    for (const char* dtype : {"f8", "S3", "[('a', '<f4')]"}) {
      const Flat flat;
      const Array a = create(flat.uri(), shape, Dtype(dtype));
      EXPECT_EQ(a.info().nbytes, 0u);
      EXPECT_EQ(a.info().size(), 0u);
      EXPECT_NE(a.data(), nullptr);
      const Array b = attach(flat.uri());
      EXPECT_EQ(b.info().shape, shape);
      EXPECT_NO_THROW(b.msync(MS_SYNC));
      EXPECT_EQ(std::filesystem::file_size(flat.path()), 4096u);
    }
  }
  const Flat flat;
  create(flat.uri(), {4}, Dtype("S0"));
  EXPECT_EQ(attach(flat.uri()).info().size(), 4u);
  EXPECT_EQ(attach(flat.uri()).info().nbytes, 0u);
}

TEST(Create, HasScalarsAndSixtyFourDimensions) {
  const Namespace space;
  create(space.uri("scalar"), {}, f8).as<double>()[0] = 4;
  EXPECT_EQ(attach(space.uri("scalar")).as<double>().size(), 1u);
  EXPECT_EQ(attach(space.uri("scalar")).as<double>()[0], 4);
  create(space.uri("deep"), Shape(64, 1), f8);
  EXPECT_EQ(info(space.uri("deep")).shape, Shape(64, 1));
}

TEST(Create, KeepsOrderAndDtype) {
  const Namespace space;
  create(space.uri("f"), {2, 3}, f8, {.order = Order::fortran});
  EXPECT_EQ(info(space.uri("f")).order, Order::fortran);
  const char* const descr = "[(('t', 'größe'), '>f4', (2,)), ('', '|V3'), ('名前', '<M8[25s]')]";
  create(space.uri("d"), {2}, Dtype(descr));
  EXPECT_EQ(info(space.uri("d")).dtype.descr(), descr);
  EXPECT_EQ(info(space.uri("d")).format, "NPY 3.0");
}

TEST(Create, MakesMissingNamespacesUnderShmOnly) {
  const Namespace space;
  const mode_t before = umask(027);
  create(space.uri("x/y/z/a"), {3}, f8);
  umask(before);
  EXPECT_EQ(attach(space.uri("x/y/z/a")).info().name, space.uri("x/y/z/a"));
  struct stat st;
  ASSERT_EQ(stat(space.path("x/y").c_str(), &st), 0);
  EXPECT_EQ(st.st_mode & 07777, 0750u);
  create(space.uri("x/y/b"), {3}, f8);

  EXPECT_EQ(caught([&] { create(space.path("new/a"), {3}, f8); }).errnum, ENOENT);
  EXPECT_FALSE(std::filesystem::exists(space.path("new")));
}

TEST(Create, ANamespaceIsNeverALinkOrAFile) {
  const Namespace space;
  const Namespace elsewhere;
  std::filesystem::create_directory_symlink(elsewhere.path(), space.path("link"));
  test::write_file(space.path("file"), "");
  for (const char* leaf : {"link/a", "link/b/a"}) {
    EXPECT_EQ(caught([&] { create(space.uri(leaf), {3}, f8); }).errnum, ELOOP) << leaf;
  }
  for (const char* leaf : {"file/a", "file/b/a"}) {
    EXPECT_EQ(caught([&] { create(space.uri(leaf), {3}, f8); }).errnum, ENOTDIR) << leaf;
  }
  EXPECT_TRUE(elsewhere.files().empty());
  // A path is the caller's own affair.
  EXPECT_NO_THROW(create(space.path("link/a"), {3}, f8));
  EXPECT_EQ(elsewhere.files().size(), 1u);
  EXPECT_EQ(caught([&] { attach(space.uri("link/a")); }).errnum, ELOOP);
  EXPECT_EQ(caught([&] { remove(space.uri("link/a")); }).errnum, ELOOP);
  EXPECT_EQ(caught([&] { list(space.uri("link")); }).errnum, ELOOP);
}

TEST(Create, WithoutThePermissionIsEaccesAndLeavesNothing) {
  const Namespace space;
  std::filesystem::permissions(space.path(), std::filesystem::perms{0555});
  const Unprivileged user;
  if (!user.effective()) GTEST_SKIP() << "cannot become another user";
  EXPECT_EQ(caught([&] { create(space.uri("a"), {3}, f8); }).errnum, EACCES);
  EXPECT_EQ(caught([&] { create(space.uri("new/a"), {3}, f8); }).errnum, EACCES);
  EXPECT_TRUE(space.files().empty());
}

TEST(Create, WorksWithoutCapabilities) {
  const Namespace space;
  std::filesystem::permissions(space.path(), std::filesystem::perms{0777});
  const Unprivileged user;
  if (!user.effective()) GTEST_SKIP() << "cannot become another user";
  create(space.uri("a"), {3}, f8).as<double>()[0] = 1;
  EXPECT_EQ(attach(space.uri("a")).as<double>()[0], 1);
  remove(space.uri("a"));
}

TEST(Attach, SharesTheMemory) {
  const Flat flat;
  const Array a = create(flat.uri(), {3}, f8);
  const Array b = attach(flat.uri());
  a.as<double>()[1] = 2.5;
  EXPECT_EQ(b.as<double>()[1], 2.5);
  EXPECT_EQ(permissions(b.data()), "rw-s");
  EXPECT_EQ(b.mode(), Mode::read_write);
}

TEST(Attach, ToReadMapsNothingWritable) {
  const Flat flat;
  const Array a = create(flat.uri(), {3}, f8);
  const Array b = attach(flat.uri(), Mode::read);
  EXPECT_EQ(permissions(b.data()), "r--s");
  EXPECT_EQ(b.mode(), Mode::read);
  a.as<double>()[0] = 7;
  EXPECT_EQ(b.as<double>()[0], 7);
}

TEST(Attach, CopyOnWriteKeepsWritesToItself) {
  const Flat flat;
  const Array a = create(flat.uri(), {3}, f8);
  a.as<double>()[0] = 1;
  const Array b = attach(flat.uri(), Mode::copy_on_write);
  EXPECT_EQ(permissions(b.data()), "rw-p");
  EXPECT_EQ(b.as<double>()[0], 1);
  b.as<double>()[0] = 2;
  EXPECT_EQ(a.as<double>()[0], 1);
  EXPECT_EQ(attach(flat.uri()).as<double>()[0], 1);
}

TEST(Attach, AsksForNoMorePermissionThanItsMode) {
  const Flat flat;
  create(flat.uri(), {3}, f8);
  std::filesystem::permissions(flat.path(), std::filesystem::perms{0444});
  const Unprivileged user;
  if (!user.effective()) GTEST_SKIP() << "cannot become another user";
  EXPECT_EQ(caught([&] { attach(flat.uri()); }).errnum, EACCES);
  EXPECT_NO_THROW(attach(flat.uri(), Mode::read));
  EXPECT_NO_THROW(attach(flat.uri(), Mode::copy_on_write).as<double>()[0] = 1);
  EXPECT_NO_THROW(info(flat.uri()));
}

TEST(Attach, OutlivesTheName) {
  const Flat flat;
  const Array a = create(flat.uri(), {3}, f8);
  const Array b = attach(flat.uri());
  remove(flat.uri());
  EXPECT_EQ(caught([&] { attach(flat.uri()); }).errnum, ENOENT);
  a.as<double>()[0] = 4;
  EXPECT_EQ(b.as<double>()[0], 4);
  const Array c = create(flat.uri(), {3}, f8);  // another object
  EXPECT_EQ(c.as<double>()[0], 0);
}

TEST(Attach, WhatIsNotThereIsEnoent) {
  const Flat flat;
  for (const std::string& name : {flat.uri(), flat.uri() + "/a/b", flat.path()}) {
    EXPECT_EQ(caught([&] { attach(name); }).errnum, ENOENT);
    EXPECT_EQ(caught([&] { info(name); }).errnum, ENOENT);
    EXPECT_EQ(caught([&] { remove(name); }).errnum, ENOENT);
    EXPECT_EQ(caught([&] { remove(name); }).name, name);
  }
}

TEST(Attach, WhatIsNoRegularFileIsRefusedAtOnce) {
  const Namespace space;
  create(space.uri("array"), {1}, f8);
  std::filesystem::create_symlink("array", space.path("link"));
  std::filesystem::create_directory(space.path("directory"));
  ASSERT_EQ(mkfifo(space.path("fifo").c_str(), 0600), 0);
  const int socket = ::socket(AF_UNIX, SOCK_STREAM, 0);
  sockaddr_un address = {};
  address.sun_family = AF_UNIX;
  ASSERT_LT(space.path("socket").size(), sizeof(address.sun_path));
  space.path("socket").copy(address.sun_path, sizeof(address.sun_path) - 1);
  ASSERT_EQ(bind(socket, reinterpret_cast<sockaddr*>(&address), sizeof(address)), 0);

  alarm(10);  // a FIFO would block
  for (const auto& expected :
       {std::pair{"link", ELOOP}, {"directory", EISDIR}, {"fifo", EINVAL}, {"socket", EINVAL}}) {
    const char* const leaf = expected.first;  // clang 14 captures no structured binding
    const int error = expected.second;
    for (const Mode mode : {Mode::read, Mode::read_write, Mode::copy_on_write}) {
      EXPECT_EQ(caught([&] { attach(space.uri(leaf), mode); }).errnum, error) << leaf;
    }
    EXPECT_EQ(caught([&] { info(space.uri(leaf)); }).errnum, error) << leaf;
    const auto found = caught([&] { remove(space.uri(leaf)); });
    EXPECT_EQ(found.errnum, error) << leaf;
    EXPECT_EQ(found.name, space.uri(leaf));
    struct stat st;
    EXPECT_EQ(lstat(space.path(leaf).c_str(), &st), 0) << leaf;
  }
  EXPECT_EQ(list(space.directory()).size(), 1u);
  alarm(0);
  close(socket);
  EXPECT_NO_THROW(attach(space.path("link")));  // by its path a link is followed
}

// A name without a namespace, and a path, are opened by other system calls.
TEST(Attach, FlatNamesAndPathsAreOpenedAsCarefully) {
  const Flat array, link, fifo;
  create(array.uri(), {1}, f8);
  std::filesystem::create_symlink(array.path(), link.path());
  ASSERT_EQ(mkfifo(fifo.path().c_str(), 0600), 0);
  alarm(10);
  for (const Mode mode : {Mode::read, Mode::read_write, Mode::copy_on_write}) {
    EXPECT_EQ(caught([&] { attach(link.uri(), mode); }).errnum, ELOOP);
    EXPECT_EQ(caught([&] { attach(fifo.uri(), mode); }).errnum, EINVAL);
    EXPECT_EQ(caught([&] { attach(fifo.path(), mode); }).errnum, EINVAL);
  }
  EXPECT_EQ(caught([&] { remove(link.uri()); }).errnum, ELOOP);
  EXPECT_EQ(caught([&] { remove(fifo.uri()); }).errnum, EINVAL);
  alarm(0);
}

TEST(Attach, AForeignFileIsEinvalAndIsNotRemoved) {
  const Namespace space;
  for (const std::string& bytes :
       {std::string(), std::string("x"), std::string("some text"), std::string(100'000, 'x'),
        std::string("\x93NUMPY", 6), std::string("\x93NUMPY\x01\0", 8),
        std::string("\x93NUMPY\x09\0\x10\0", 10) + std::string(100, ' '),
        test::npy_header(1, "{'descr': 'O', 'fortran_order': False, 'shape': (1,)}") +
            std::string(8, '\0')}) {
    test::write_file(space.path("a"), bytes);
    EXPECT_THROW(attach(space.uri("a")), FormatError);
    EXPECT_THROW(info(space.uri("a")), FormatError);
    EXPECT_THROW(remove(space.uri("a")), FormatError);
    EXPECT_EQ(caught([&] { attach(space.uri("a")); }).errnum, EINVAL);
    EXPECT_EQ(caught([&] { attach(space.uri("a")); }).name, space.uri("a"));
    EXPECT_TRUE(list(space.directory()).empty());
    EXPECT_EQ(test::read_file(space.path("a")), bytes);
  }
}

TEST(Attach, ATruncatedArrayIsRefusedWithBothSizes) {
  const Flat flat;
  create(flat.uri(), {100}, f8);
  ASSERT_EQ(truncate(flat.path().c_str(), 4895), 0);
  const auto found = caught([&] { attach(flat.uri()); });
  EXPECT_EQ(found.errnum, EINVAL);
  EXPECT_NE(found.message.find("4896"), std::string::npos) << found.message;
  EXPECT_NE(found.message.find("4895"), std::string::npos) << found.message;
  ASSERT_EQ(truncate(flat.path().c_str(), 4000), 0);  // in the header
  const auto header = caught([&] { attach(flat.uri()); });
  EXPECT_NE(header.message.find("4096"), std::string::npos) << header.message;
  EXPECT_NE(header.message.find("4000"), std::string::npos) << header.message;
  ASSERT_EQ(truncate(flat.path().c_str(), 4896), 0);
  EXPECT_THROW(attach(flat.uri()), FormatError);  // the header's end is spaces no more
}

TEST(Attach, BytesAfterTheDataAreAccepted) {
  const Flat flat;
  create(flat.uri(), {3}, f8).as<double>()[2] = 9;
  ASSERT_EQ(truncate(flat.path().c_str(), 1 << 20), 0);
  EXPECT_EQ(attach(flat.uri()).as<double>()[2], 9);
  EXPECT_EQ(attach(flat.uri()).info().nbytes, 24u);
}

TEST(Attach, TakesAnyOffsetOfTheData) {
  const Flat flat;
  std::string file =
      test::npy_header(1, "{'descr': '|u1', 'fortran_order': True, 'shape': (3, 2), }\n");
  const std::size_t offset = file.size();
  test::write_file(flat.path(), file + "abcdef");
  const Array a = attach(flat.uri());
  EXPECT_EQ(a.info().offset, offset);
  EXPECT_EQ(a.info().order, Order::fortran);
  EXPECT_EQ(a.as<char>()[5], 'f');
}

TEST(Attach, TakesAHeaderOfManyPages) {
  const Namespace space;
  std::string descr = "[";
  for (int i = 0; i < 5000; ++i) descr += "('field" + std::to_string(i) + "', '<i4'), ";
  const Dtype dtype(descr + "]");
  const Array a = create(space.uri("a"), {2}, dtype);
  EXPECT_GT(a.info().offset, 65536u);
  EXPECT_EQ(a.info().format, "NPY 2.0");
  const Array b = attach(space.uri("a"));
  EXPECT_EQ(b.info().dtype, dtype);
  EXPECT_EQ(b.info().offset, a.info().offset);
}

TEST(Array, ChecksTheSizeOfItsElements) {
  const Flat flat;
  const Array a = create(flat.uri(), {3}, f8);
  EXPECT_EQ(a.as<double>().size(), 3u);
  EXPECT_EQ(a.as<std::int64_t>().size(), 3u);
  EXPECT_EQ(caught([&] { a.as<float>(); }).errnum, EINVAL);
  EXPECT_EQ(caught([&] { a.as<float>(); }).name, flat.uri());
}

TEST(Array, MovesItsMapping) {
  const Namespace space;
  Array a = create(space.uri("a"), {1}, f8);
  Array b = create(space.uri("b"), {2}, f8);
  a.as<double>()[0] = 1;
  void* const data = a.data();
  Array c = std::move(a);
  EXPECT_EQ(c.data(), data);
  b = std::move(c);
  EXPECT_EQ(b.data(), data);
  EXPECT_EQ(b.info().name, space.uri("a"));
  EXPECT_EQ(b.as<double>()[0], 1);
}

TEST(Array, UnmapsAtItsEnd) {
  const Flat flat;
  std::optional<Array> a = create(flat.uri(), {1 << 20}, f8, {.reserve = false});
  const void* const data = a->data();
  EXPECT_EQ(permissions(data), "rw-s");
  a.reset();
  std::ifstream maps("/proc/self/maps");
  for (std::string line; std::getline(maps, line);) {
    EXPECT_EQ(line.find(flat.path()), std::string::npos) << line;
  }
}

TEST(Array, SyncsAndLocks) {
  const Flat flat;
  const Array a = create(flat.uri(), {3}, f8);
  for (const int flags : {MS_ASYNC, MS_SYNC, MS_SYNC | MS_INVALIDATE}) {
    EXPECT_NO_THROW(a.msync(flags));
  }
  const auto found = caught([&] { a.msync(MS_ASYNC | MS_SYNC); });
  EXPECT_EQ(found.errnum, EINVAL);
  EXPECT_EQ(found.name, flat.uri());
  const auto locked = [] {
    return test::read_file("/proc/self/status").find("VmLck:\t       0 kB") == std::string::npos;
  };
  EXPECT_NO_THROW(a.mlock());
#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)  // their mlock does nothing
  EXPECT_TRUE(locked());
#endif
  EXPECT_NO_THROW(a.munlock());
  EXPECT_FALSE(locked());
}

TEST(Remove, TakesTheNameOnly) {
  const Namespace space;
  create(space.uri("a"), {3}, f8);
  create(space.uri("b"), {3}, f8);
  remove(space.uri("a"));
  EXPECT_EQ(space.files(), std::vector<std::string>{"b"});
  remove(space.path("b"));
  EXPECT_TRUE(space.files().empty());
}

TEST(List, IsSortedAndKnowsNamespaces) {
  const Namespace space;
  for (const char* leaf : {"b", "a", "jobs/2/x", "jobs/1", "c"}) create(space.uri(leaf), {3}, f8);
  std::filesystem::create_directory(space.path("empty"));
  std::vector<std::string> names;
  for (const Info& info : list(space.directory())) names.push_back(info.name);
  EXPECT_EQ(names, (std::vector{space.uri("a"), space.uri("b"), space.uri("c"), space.uri("jobs/1"),
                                space.uri("jobs/2/x")}));
  EXPECT_EQ(list(Name::directory(space.uri("jobs"))).size(), 2u);
  EXPECT_EQ(list(Name::directory(space.uri("jobs/"))).size(), 2u);
  EXPECT_EQ(list(Name::directory(space.uri("empty"))).size(), 0u);

  const auto by_path = list(Name::directory("file://" + space.path()));
  ASSERT_EQ(by_path.size(), 5u);
  EXPECT_EQ(by_path[0].name, "file://" + space.path("a"));
  EXPECT_EQ(info(by_path[4].name).shape, Shape{3});
  // In the whole of /dev/shm there may be others.
  EXPECT_TRUE(std::ranges::any_of(
      list(), [&](const Info& info) { return info.name == space.uri("jobs/2/x"); }));
}

TEST(List, TellsWhatInfoTells) {
  const Flat flat;
  create(flat.uri(), {2, 5}, Dtype(">M8[ms]"), {.order = Order::fortran});
  for (const Info& found : list()) {
    if (found.name != flat.uri()) continue;
    const Info expected = info(flat.uri());
    EXPECT_EQ(found.dtype, expected.dtype);
    EXPECT_EQ(found.shape, expected.shape);
    EXPECT_EQ(found.order, Order::fortran);
    EXPECT_EQ(found.offset, expected.offset);
    EXPECT_EQ(found.nbytes, 80u);
    EXPECT_EQ(found.format, "NPY 1.0");
    return;
  }
  ADD_FAILURE() << "not listed";
}

TEST(List, SkipsWhatIsForeignOrUnreadable) {
  const Namespace space;
  create(space.uri("array"), {3}, f8);
  create(space.uri("closed"), {3}, f8);
  create(space.uri("truncated"), {3000}, f8);
  create(space.uri("locked/array"), {3}, f8);
  ASSERT_EQ(truncate(space.path("truncated").c_str(), 5000), 0);
  std::filesystem::permissions(space.path("closed"), std::filesystem::perms{0});
  std::filesystem::permissions(space.path("locked"), std::filesystem::perms{0});
  test::write_file(space.path("text"), "text");
  test::write_file(space.path("empty"), "");
  std::filesystem::create_symlink("array", space.path("link"));
  std::filesystem::create_directory_symlink(".", space.path("loop"));
  const Unprivileged user;
  if (!user.effective()) GTEST_SKIP() << "cannot become another user";
  const auto found = list(space.directory());
  ASSERT_EQ(found.size(), 1u);
  EXPECT_EQ(found[0].name, space.uri("array"));
  EXPECT_EQ(caught([&] { list(Name::directory(space.uri("locked"))); }).errnum, EACCES);
  EXPECT_EQ(caught([&] { attach(space.uri("closed")); }).errnum, EACCES);
}

TEST(List, OfWhatIsNoDirectory) {
  const Namespace space;
  create(space.uri("array"), {3}, f8);
  for (const char* leaf : {"nowhere", "array"}) {
    const int error = std::string_view(leaf) == "array" ? ENOTDIR : ENOENT;
    EXPECT_EQ(caught([&] { list(space.uri(leaf)); }).errnum, error);
    EXPECT_EQ(caught([&] { list(space.path(leaf)); }).errnum, error);
    EXPECT_EQ(caught([&] { list(space.uri(leaf)); }).name, space.uri(leaf));
  }
}

TEST(Scan, TellsDirectoriesFromArrays) {
  const Namespace space;
  create(space.uri("a"), {3}, f8);
  create(space.uri("jobs/b"), {3}, f8);
  test::write_file(space.path("text"), "text");
  const FileDescriptor fd = open_directory(space.directory());
  const auto entries = scan(fd.get(), space.uri(""));
  ASSERT_EQ(entries.size(), 2u);
  EXPECT_EQ(entries[0].info->name, space.uri("a"));
  EXPECT_EQ(entries[1].name, "jobs");
  EXPECT_FALSE(entries[1].info);
  EXPECT_TRUE(S_ISDIR(entries[1].st.st_mode));

  EXPECT_TRUE(inspect(fd.get(), "a", "").value().info);
  EXPECT_FALSE(inspect(fd.get(), "jobs", "").value().info);
  EXPECT_FALSE(inspect(fd.get(), "text", ""));
  EXPECT_FALSE(inspect(fd.get(), "nowhere", ""));
  EXPECT_FALSE(inspect(fd.get(), "..", ""));
}

TEST(Threads, OneOfManyCreatorsWins) {
  const Namespace space;
  constexpr int threads = 2, rounds = 500;
  std::atomic<int> won = 0, other = 0;
  std::barrier start(threads);
  std::vector<std::thread> workers;
  for (int t = 0; t < threads; ++t) {
    workers.emplace_back([&, t] {
      for (int i = 0; i < rounds; ++i) {
        start.arrive_and_wait();
        try {
          create(space.uri(std::to_string(i)), {t + 1}, f8);
          ++won;
        } catch (const Error& error) {
          if (error.errnum() != EEXIST) ++other;
        }
      }
    });
  }
  for (std::thread& worker : workers) worker.join();
  EXPECT_EQ(won, rounds);
  EXPECT_EQ(other, 0);
  EXPECT_EQ(list(space.directory()).size(), static_cast<std::size_t>(rounds));
}

TEST(Threads, AllOfManyCreatorsGetTheOneArrayWithExistOk) {
  const Namespace space;
  constexpr int threads = 4, rounds = 200;
  std::barrier start(threads);
  std::atomic<int> failed = 0;
  std::vector<std::thread> workers;
  for (int t = 0; t < threads; ++t) {
    workers.emplace_back([&, t] {
      for (int i = 0; i < rounds; ++i) {
        start.arrive_and_wait();
        try {
          create(space.uri("n" + std::to_string(i) + "/a"), {threads}, Dtype::of<std::int64_t>(),
                 {.exist_ok = true})
              .as<std::int64_t>()[static_cast<std::size_t>(t)] = t + 1;
        } catch (const Error&) {
          ++failed;
        }
      }
    });
  }
  for (std::thread& worker : workers) worker.join();
  EXPECT_EQ(failed, 0);
  for (int i = 0; i < rounds; ++i) {
    const Array a = attach(space.uri("n" + std::to_string(i) + "/a"));
    const auto elements = a.as<std::int64_t>();
    EXPECT_EQ(std::accumulate(elements.begin(), elements.end(), std::int64_t{0}), 10) << i;
  }
}

TEST(Threads, NobodySeesAnArrayThatIsHalfThere) {
  const Flat flat;
  std::atomic<bool> done = false;
  std::atomic<int> seen = 0, wrong = 0;
  std::thread reader([&] {
    while (!done) {
      try {
        if (attach(flat.uri()).info().shape != Shape{100'000}) ++wrong;
        ++seen;
      } catch (const Error& error) {
        if (error.errnum() != ENOENT) ++wrong;
      }
    }
  });
  for (int i = 0; i < 300 || (seen == 0 && i < 30'000); ++i) {
    create(flat.uri(), {100'000}, f8);
    remove(flat.uri());
  }
  done = true;
  reader.join();
  EXPECT_EQ(wrong, 0);
  EXPECT_GT(seen, 0);
}

}  // namespace
}  // namespace sharr
