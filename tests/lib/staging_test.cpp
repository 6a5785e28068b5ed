// The way to a name where the file system is unkind: no O_TMPFILE, no renameat2, no fallocate, or
// signals in the middle. The system calls are stood in for, because no such file system is at hand.
#include "staging.hpp"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <csignal>
#include <cstdarg>
#include <functional>
#include <numeric>
#include <optional>
#include <stdexcept>
#include <utility>
#include <vector>

#include "support.hpp"

namespace {

// What the stand-ins do. Unset, they are the system calls.
struct {
  bool no_tmpfile = false;
  int renameat2_errno = 0;
  // Called with offset and length; the errno to fail with, or 0.
  std::function<int(off_t, off_t)> on_fallocate;
  // Called when pages are to be made in a mapping; as above.
  std::function<int()> on_populate;
  int processors = 0;  // as many as there are
  // Called once, when a directory has been made, and before a file is linked.
  std::function<void()> after_mkdirat, before_linkat;
  // The most that pwritev(2) writes at once; less than nothing: the errno to fail with.
  std::optional<std::int64_t> pwritev_most;
  // Called by whatever thread writes to a file, before it does.
  std::function<void()> before_pwrite;
  int pwrite_errno = 0;
  // Of the next flock.
  int flock_errno = 0;
} fake;

}  // namespace

extern "C" {

int openat(int dirfd, const char* path, int flags, ...) {
  va_list args;
  va_start(args, flags);
  const unsigned mode = va_arg(args, unsigned);
  va_end(args);
  if (fake.no_tmpfile && (flags & O_TMPFILE) == O_TMPFILE) {
    errno = EOPNOTSUPP;
    return -1;
  }
  return static_cast<int>(syscall(SYS_openat, dirfd, path, flags, mode));
}

int mkdirat(int dirfd, const char* path, mode_t mode) noexcept {
  const auto result = static_cast<int>(syscall(SYS_mkdirat, dirfd, path, mode));
  if (result == 0 && fake.after_mkdirat) std::exchange(fake.after_mkdirat, nullptr)();
  return result;
}

int linkat(int olddir, const char* old, int newdir, const char* name, int flags) noexcept {
  if (fake.before_linkat) std::exchange(fake.before_linkat, nullptr)();
  return static_cast<int>(syscall(SYS_linkat, olddir, old, newdir, name, flags));
}

int flock(int fd, int operation) noexcept {
  errno = std::exchange(fake.flock_errno, 0);
  return errno != 0 ? -1 : static_cast<int>(syscall(SYS_flock, fd, operation));
}

int fallocate(int fd, int mode, off_t offset, off_t length) {
  const int error = fake.on_fallocate ? fake.on_fallocate(offset, length) : 0;
  if (error != 0) {
    errno = error;
    return -1;
  }
  return static_cast<int>(syscall(SYS_fallocate, fd, mode, offset, length));
}

ssize_t pwrite(int fd, const void* data, size_t size, off_t offset) {
  if (fake.before_pwrite) fake.before_pwrite();
  if (fake.pwrite_errno != 0) {
    errno = fake.pwrite_errno;
    return -1;
  }
  return syscall(SYS_pwrite64, fd, data, size, offset);
}

ssize_t pwritev(int fd, const iovec* parts, int count, off_t offset) {
  if (!fake.pwritev_most) return syscall(SYS_pwritev, fd, parts, count, offset, 0L);
  ssize_t done = 0;
  for (std::int64_t left = *fake.pwritev_most; left > 0 && count > 0; ++parts, --count) {
    const auto length = std::min(parts->iov_len, static_cast<std::size_t>(left));
    if (syscall(SYS_pwrite64, fd, parts->iov_base, length, offset + done) < 0) return -1;
    done += static_cast<ssize_t>(length);
    left -= static_cast<std::int64_t>(length);
  }
  errno = static_cast<int>(-std::min<std::int64_t>(*fake.pwritev_most, 0));
  return errno != 0 ? -1 : done;
}

int madvise(void* base, size_t length, int advice) noexcept {
  const int error = advice == MADV_POPULATE_WRITE && fake.on_populate ? fake.on_populate() : 0;
  if (error != 0) {
    errno = error;
    return -1;
  }
  return static_cast<int>(syscall(SYS_madvise, base, length, advice));
}

int sched_getaffinity(pid_t pid, size_t size, cpu_set_t* set) noexcept {
  if (fake.processors == 0) {
    return syscall(SYS_sched_getaffinity, pid, size, set) < 0 ? -1 : 0;
  }
  CPU_ZERO(set);
  for (int i = 0; i < fake.processors; ++i) CPU_SET(static_cast<unsigned>(i), set);
  return 0;
}

int renameat2(int olddir, const char* old, int newdir, const char* name, unsigned flags) noexcept {
  if (fake.renameat2_errno != 0) {
    errno = fake.renameat2_errno;
    return -1;
  }
  return static_cast<int>(syscall(SYS_renameat2, olddir, old, newdir, name, flags));
}

}  // extern "C"

namespace sharr {
namespace {

using test::caught;

// So many f8 that their memory is reserved; an array of fewer is written at once.
constexpr std::int64_t many = 10'000;

class Staging : public testing::Test {
 protected:
  Staging() {
    fake.no_tmpfile = true;
    fake.processors = 1;  // the memory is taken by fallocate
  }
  ~Staging() override { fake = {}; }

  // The temporary files that lie about.
  std::vector<std::string> temporaries() const {
    std::vector<std::string> names = space_.files();
    std::erase_if(names, [](const std::string& name) { return !reserved(name); });
    return names;
  }
  // A container may have little of it.
  static bool fits(std::uint64_t size) {
    struct statvfs fs;
    return statvfs("/dev/shm", &fs) == 0 && fs.f_bavail * fs.f_frsize > 2 * size;
  }
  // Gives up at last.
  static void wait_until(const std::function<bool()>& condition) {
    for (int tries = 0; tries < 30'000 && !condition(); ++tries) usleep(1000);
  }
  Array make(const std::string& leaf, std::int64_t count = 10, const CreateOptions& options = {}) {
    return create(space_.uri(leaf), {count}, Dtype("f8"), options);
  }

  test::Namespace space_;
};

TEST_F(Staging, WithoutTmpfileMakesTheSameArray) {
  {
    const Array a = make("a");
    a.as<double>()[9] = 7;
  }
  EXPECT_EQ(space_.files(), std::vector<std::string>{"a"});
  const Array a = attach(space_.uri("a"));
  EXPECT_EQ(a.as<double>()[9], 7);
  EXPECT_EQ(a.as<double>()[0], 0);
  EXPECT_EQ(std::filesystem::file_size(space_.path("a")), 4096u + 80);
}

TEST_F(Staging, WithoutFallocateADraftKeepsWhatIsWritten) {
  const FileDescriptor directory = open_directory(space_.directory());
  Draft made(directory.get(), space_.uri("a"), 0644);
  std::string text =
      test::npy_header(1, "{'descr': '|u1', 'fortran_order': False, 'shape': (3145728,), }\n");
  const std::size_t header = text.size();
  text.resize(header + 3145728);
  for (const std::size_t at : {header, text.size() - 1}) text[at] = 'x';
  ASSERT_EQ(pwrite(made.fd(), text.data(), header + 1, 0), static_cast<ssize_t>(header + 1));
  ASSERT_EQ(pwrite(made.fd(), "x", 1, static_cast<off_t>(text.size() - 1)), 1);
  fake.on_fallocate = [](off_t, off_t) { return EOPNOTSUPP; };
  made.reserve(made.check(false));
  made.publish(directory.get(), "a", false);
  EXPECT_EQ(test::read_file(space_.path("a")), text);
  struct stat st;
  ASSERT_EQ(stat(space_.path("a").c_str(), &st), 0);
  EXPECT_GE(st.st_blocks * 512, static_cast<blkcnt_t>(text.size()));
}

TEST_F(Staging, WithoutTmpfileTheModeFollowsTheUmask) {
  const mode_t before = umask(027);
  make("a");
  umask(before);
  struct stat st;
  ASSERT_EQ(stat(space_.path("a").c_str(), &st), 0);
  EXPECT_EQ(st.st_mode, static_cast<mode_t>(S_IFREG | 0640));
}

TEST_F(Staging, WithoutTmpfileAForkedChildLeavesWhatItsParentMakes) {
  std::optional<NewArray> made;
  made.emplace(Name(space_.uri("a")), Shape{3}, Dtype("f8"));
  const pid_t child = fork();
  if (child == 0) {
    made.reset();
    _exit(0);
  }
  ASSERT_EQ(waitpid(child, nullptr, 0), child);
  EXPECT_EQ(temporaries().size(), 1u);
  made->publish();
  EXPECT_EQ(space_.files(), std::vector<std::string>{"a"});
}

TEST_F(Staging, WithoutTmpfileFlatNamesAndPathsWorkToo) {
  const test::Flat flat;
  create(flat.uri(), {3}, Dtype("f8"));
  EXPECT_EQ(info(flat.uri()).shape, Shape{3});
  create("file://" + space_.path("p"), {4}, Dtype("f8"));
  EXPECT_EQ(info(space_.path("p")).shape, Shape{4});
  EXPECT_TRUE(temporaries().empty());
}

TEST_F(Staging, WithoutTmpfileMissingNamespacesAreMade) {
  create(space_.uri("x/y/a"), {3}, Dtype("f8"));
  EXPECT_EQ(info(space_.uri("x/y/a")).shape, Shape{3});
  for (const auto& entry : std::filesystem::directory_iterator("/dev/shm")) {
    EXPECT_FALSE(reserved(entry.path().filename().string()));
  }
}

TEST_F(Staging, ANamespaceThatIsReplacedByALinkIsNotFollowed) {
  const test::Namespace elsewhere;
  fake.after_mkdirat = [&] {
    std::filesystem::remove(space_.path("new"));
    std::filesystem::create_directory_symlink(elsewhere.path(), space_.path("new"));
  };
  EXPECT_EQ(caught([&] { create(space_.uri("new/deep/a"), {3}, Dtype("f8")); }).errnum, ENOTDIR);
  EXPECT_TRUE(elsewhere.files().empty());
}

TEST_F(Staging, WithoutRenameat2ALinkDoes) {
  for (const int error : {EINVAL, ENOSYS}) {
    fake.renameat2_errno = error;
    const std::string leaf = "a" + std::to_string(error);
    make(leaf);
    EXPECT_EQ(info(space_.uri(leaf)).shape, Shape{10});
    EXPECT_EQ(caught([&] { make(leaf); }).errnum, EEXIST);
    EXPECT_TRUE(temporaries().empty());
  }
}

TEST_F(Staging, ATakenNameLeavesNothing) {
  make("a", 1);
  EXPECT_EQ(caught([&] { make("a", 2); }).errnum, EEXIST);
  EXPECT_EQ(space_.files(), std::vector<std::string>{"a"});
  EXPECT_EQ(info(space_.uri("a")).shape, Shape{1});
}

TEST_F(Staging, WhatTakesThePlaceOfAPrivateArrayIsPrivateBefore) {
  make("a");
  ASSERT_EQ(chmod(space_.path("a").c_str(), 0600), 0);
  NewArray replacement(space_.uri("a"), {10}, Dtype("f8"), {.replace = true});
  NewArray fresh(space_.uri("b"), {10}, Dtype("f8"), {.replace = true});
  std::vector<mode_t> modes;
  struct stat st;
  for (const std::string& name : temporaries()) {
    ASSERT_EQ(stat(space_.path(name).c_str(), &st), 0);
    modes.push_back(st.st_mode & 0777);
  }
  std::ranges::sort(modes);
  const mode_t mask = umask(0);
  umask(mask);
  EXPECT_EQ(modes, (std::vector<mode_t>{0600, 0666 & ~mask}));
  replacement.publish();
  fresh.publish();
  ASSERT_EQ(stat(space_.path("a").c_str(), &st), 0);
  EXPECT_EQ(st.st_mode & 0777, 0600u);
  ASSERT_EQ(stat(space_.path("b").c_str(), &st), 0);
  EXPECT_EQ(st.st_mode & 0777, 0666 & ~mask);
}

TEST_F(Staging, WhatComesJustBeforeItIsReplacedAsIfItHadBeenThere) {
  fake.no_tmpfile = false;
  fake.before_linkat = [&] { test::write_file(space_.path("a"), "junk"); };
  EXPECT_EQ(caught([&] { make("a", 10, {.replace = true}); }).errnum, EINVAL);
  EXPECT_EQ(test::read_file(space_.path("a")), "junk");
  fake.before_linkat = [&] {
    make("b", 3);
    ASSERT_EQ(chmod(space_.path("b").c_str(), 0600), 0);
  };
  make("b", 10, {.replace = true});
  EXPECT_EQ(info(space_.uri("b")).shape, Shape{10});
  struct stat st;
  ASSERT_EQ(stat(space_.path("b").c_str(), &st), 0);
  EXPECT_EQ(st.st_mode & 0777, 0600u);
}

TEST_F(Staging, ALinkToNothingIsNoReasonToTakeMemory) {
  std::filesystem::create_symlink("nowhere", space_.path("link"));
  fake.on_fallocate = [](off_t, off_t) {
    ADD_FAILURE() << "was tried";
    return ENOSPC;
  };
  EXPECT_EQ(
      caught([&] { create(space_.path("link"), {many}, Dtype("f8"), {.exist_ok = true}); }).errnum,
      EEXIST);
}

TEST_F(Staging, ClearingUpFollowsNoLink) {
  fake.no_tmpfile = false;
  std::filesystem::create_directory(space_.path("victim"));
  std::filesystem::create_directory(space_.path("all"));
  test::write_file(space_.path("victim/y"), "somebody's");
  NewNamespace all(Name::directory(space_.uri("all")));
  all.add("a/y", {3}, Dtype("f8"));
  all.add("z", {3}, Dtype("f8"));
  // While the second is given its name, whoever may write in the directory that is replaced.
  fake.before_linkat = [&] {
    fake.before_linkat = [&] {
      const std::string made = space_.path(temporaries().at(0));
      std::filesystem::rename(made + "/a", made + "/b");
      std::filesystem::create_directory_symlink(space_.path("victim"), made + "/a");
      test::write_file(space_.path("all/block"), "");
    };
  };
  EXPECT_EQ(caught([&] { all.publish(); }).errnum, EEXIST);
  EXPECT_EQ(test::read_file(space_.path("victim/y")), "somebody's");
  EXPECT_EQ(caught([&] { all.publish(); }).errnum, EINVAL);
}

TEST_F(Staging, WhatAnotherSweepsAndMayNotRemoveIsRemoved) {
  fake.flock_errno = EWOULDBLOCK;
  make("a");
  NewNamespace all(Name::directory(space_.uri("all")));
  all.add("x", {3}, Dtype("f8"));
  fake.flock_errno = EWOULDBLOCK;
  all.publish();
  EXPECT_TRUE(temporaries().empty());
  EXPECT_EQ(list(space_.directory()).size(), 2u);
}

TEST_F(Staging, AFailedPublicationLeavesNothing) {
  fake.renameat2_errno = EACCES;
  EXPECT_EQ(caught([&] { make("a"); }).errnum, EACCES);
  EXPECT_TRUE(space_.files().empty());
}

TEST_F(Staging, NoSpaceLeavesNothingAndSaysWhatWasNeeded) {
  for (const bool no_tmpfile : {true, false}) {
    fake.no_tmpfile = no_tmpfile;
    for (const int error : {ENOSPC, EDQUOT}) {
      fake.on_fallocate = [error](off_t, off_t) { return error; };
      const auto found = caught([&] { make("a", 128 * 1024); });
      EXPECT_EQ(found.errnum, error);
      EXPECT_EQ(found.name, space_.uri("a"));
      EXPECT_NE(found.message.find("1.0 MiB needed"), std::string::npos) << found.message;
      EXPECT_NE(found.message.find("free in /dev/shm"), std::string::npos) << found.message;
      EXPECT_NE(found.message.find("mount -o remount,size="), std::string::npos) << found.message;
      EXPECT_TRUE(space_.files().empty());
    }
  }
}

TEST_F(Staging, MoreThanTheMachineHasIsRefusedBeforeItIsTaken) {
  fake.on_fallocate = [](off_t, off_t) {
    ADD_FAILURE() << "was tried";
    return ENOSPC;
  };
  EXPECT_EQ(caught([&] { make("a", std::int64_t{1} << 50); }).errnum, ENOSPC);
  EXPECT_TRUE(space_.files().empty());
}

TEST_F(Staging, ALargeArraySaysAtOnceThatItsNameIsTaken) {
  make("a", 1);
  fake.on_fallocate = [](off_t, off_t) {
    ADD_FAILURE() << "was tried";
    return ENOSPC;
  };
  EXPECT_EQ(caught([&] { make("a", 8 << 20); }).errnum, EEXIST);
}

TEST_F(Staging, WithoutFallocateTheSpaceIsWritten) {
  for (const int error : {EOPNOTSUPP, ENOSYS}) {
    fake.on_fallocate = [error](off_t, off_t) { return error; };
    const std::string leaf = "a" + std::to_string(error);
    make(leaf, 400'000);  // 3.05 MiB, no multiple of what is written at a time
    struct stat st;
    ASSERT_EQ(stat(space_.path(leaf).c_str(), &st), 0);
    EXPECT_EQ(st.st_size, 4096 + 3'200'000);
    EXPECT_GE(st.st_blocks * 512, st.st_size);
    const Array a = attach(space_.uri(leaf));
    EXPECT_TRUE(std::ranges::all_of(a.as<double>(), [](double x) { return x == 0; }));
  }
}

TEST_F(Staging, WhatIsWrittenInPartsIsWhole) {
  fake.no_tmpfile = false;
  std::vector<double> elements(1000);
  std::iota(elements.begin(), elements.end(), 1);
  for (const std::int64_t most : {-EINTR, -EAGAIN, 0, 1, 4095, 4096, 4097, 12'095, 12'096}) {
    fake.pwritev_most = most;
    const Array zeros = make("zeros", 1000);
    const Array given = put(space_.uri("given"), {1000}, Dtype("f8"), elements.data());
    for (const Array* array : {&zeros, &given}) {
      EXPECT_EQ(info(array->info().name).nbytes, 8000u) << most;
      struct stat st;
      ASSERT_EQ(stat(space_.path(array == &zeros ? "zeros" : "given").c_str(), &st), 0);
      EXPECT_EQ(st.st_size, 4096 + 8000) << most;
      EXPECT_EQ(st.st_blocks * 512, 4096 + 8192) << most;
    }
    EXPECT_TRUE(std::ranges::all_of(zeros.as<double>(), [](double x) { return x == 0; })) << most;
    EXPECT_TRUE(std::ranges::equal(given.as<double>(), elements)) << most;
    remove(space_.uri("zeros"));
    remove(space_.uri("given"));
  }
}

TEST_F(Staging, WhatCannotBeWrittenWholeLeavesNothing) {
  const std::vector<double> elements(1000, 1);
  for (const int error : {ENOSPC, EDQUOT, EIO}) {
    fake.pwrite_errno = error;
    for (const std::int64_t most : {-error, 100, 4096, 5000}) {
      fake.pwritev_most = most;
      const auto zeros = caught([&] { make("a", 1000); });
      const auto given =
          caught([&] { put(space_.uri("a"), {1000}, Dtype("f8"), elements.data()); });
      for (const auto& found : {zeros, given}) {
        EXPECT_EQ(found.errnum, error) << most;
        EXPECT_EQ(found.name, space_.uri("a")) << most;
        const bool space = found.message.find("11.8 KiB needed") != std::string::npos;
        EXPECT_EQ(space, error != EIO) << found.message;
      }
      EXPECT_TRUE(space_.files().empty()) << error << " " << most;
    }
  }
}

TEST_F(Staging, OtherErrorsComeThrough) {
  fake.on_fallocate = [](off_t, off_t) { return EIO; };
  EXPECT_EQ(caught([&] { make("a", many); }).errnum, EIO);
  EXPECT_TRUE(space_.files().empty());
}

TEST_F(Staging, ASignalIsReportedAndTheReservationGoesOnInSmallerPieces) {
  int calls = 0, signals = 0;
  off_t smallest = 1 << 30, next = 0;
  fake.on_fallocate = [&](off_t offset, off_t length) {
    EXPECT_EQ(offset, next);
    smallest = std::min(smallest, length);
    if (++calls <= 3) return EINTR;
    next = offset + length;
    return 0;
  };
  CreateOptions options;
  options.on_signal = [&] { ++signals; };
  make("a", 4 << 20, options);  // 32 MiB
  EXPECT_GE(signals, 3);
  EXPECT_LT(smallest, 32 << 20);
  EXPECT_EQ(next, 4096 + (32 << 20));
  EXPECT_EQ(info(space_.uri("a")).nbytes, 32u << 20);
}

TEST_F(Staging, EndlessSignalsEndInPiecesThatFitBetweenThem) {
  // As a tmpfs that takes a millisecond for 128 KiB, with a signal in every one.
  int calls = 0;
  fake.on_fallocate = [&](off_t, off_t length) {
    if (++calls > 1000) throw std::runtime_error("goes on for ever");
    return length > (128 << 10) ? EINTR : 0;
  };
  make("a", 1 << 20);
  EXPECT_EQ(info(space_.uri("a")).nbytes, 8u << 20);
}

TEST_F(Staging, ALargeReservationListensForSignalsItself) {
  if (!fits(128 << 20)) GTEST_SKIP() << "/dev/shm is too small";
  // Newer kernels do not interrupt it: whoever presses Ctrl-C must not wait for all of it.
  fake.no_tmpfile = false;
  off_t taken = 0;
  fake.on_fallocate = [&](off_t, off_t length) {
    taken += length;
    return 0;
  };
  CreateOptions options;
  options.on_signal = [] { throw std::runtime_error("enough"); };
  EXPECT_THROW(make("a", 16 << 20, options), std::runtime_error);  // 128 MiB
  EXPECT_LE(taken, 64 << 20);
  EXPECT_TRUE(space_.files().empty());
}

TEST_F(Staging, SeveralThreadsCopyWhatIsPut) {
  fake.processors = 2;
  if (available_processors() < 2) GTEST_SKIP() << "limited to one processor";
  if (!fits(64 << 20)) GTEST_SKIP() << "/dev/shm is too small";
  constexpr std::int64_t count = (33 << 17) + 5;  // no multiple of what is taken at a time
  std::vector<double> elements(count);
  std::iota(elements.begin(), elements.end(), 0.0);
  // The second: a kernel that does not know how.
  for (const int error : {0, EINVAL}) {
    std::atomic<int> populated = 0;
    fake.on_populate = [&] {
      ++populated;
      return error;
    };
    // The file is written by one of them; to wait for the other is to be sure that it runs.
    fake.before_pwrite = [&] { wait_until([&] { return populated > 0; }); };
    const Array a = put(space_.uri("a"), {count}, Dtype("f8"), elements.data());
    EXPECT_GT(populated, 0);
    EXPECT_TRUE(std::ranges::equal(a.as<double>(), elements));
    struct stat st;
    ASSERT_EQ(stat(space_.path("a").c_str(), &st), 0);
    EXPECT_EQ(st.st_size, 4096 + 8 * count);
    EXPECT_EQ(st.st_blocks * 512, (st.st_size + 4095) / 4096 * 4096);
    remove(space_.uri("a"));
  }
}

TEST_F(Staging, MemoryThatEndsWhileItIsTakenIsNoSpace) {
  fake.processors = 2;
  if (available_processors() < 2) GTEST_SKIP() << "limited to one processor";
  if (!fits(64 << 20)) GTEST_SKIP() << "/dev/shm is too small";
  const std::vector<double> elements(4 << 20);
  for (const bool no_tmpfile : {true, false}) {
    fake.no_tmpfile = no_tmpfile;
    std::atomic<int> left = 1;
    fake.on_populate = [&] { return --left < 0 ? EFAULT : 0; };
    fake.before_pwrite = [&] { wait_until([&] { return left < 0; }); };
    EXPECT_EQ(caught([&] { put(space_.uri("a"), {4 << 20}, Dtype("f8"), elements.data()); }).errnum,
              ENOSPC);
    EXPECT_TRUE(space_.files().empty());
  }
}

TEST_F(Staging, ASignalHandlerThatThrowsLeavesNothing) {
  for (const bool no_tmpfile : {true, false}) {
    fake.no_tmpfile = no_tmpfile;
    fake.on_fallocate = [](off_t, off_t) { return EINTR; };
    CreateOptions options;
    options.on_signal = [] { throw std::runtime_error("enough"); };
    EXPECT_THROW(make("a", many, options), std::runtime_error);
    EXPECT_THROW(create(space_.uri("new/namespace/a"), {many}, Dtype("f8"), options),
                 std::runtime_error);
    EXPECT_TRUE(space_.files().empty());
  }
}

std::atomic<int> signals = 0;

// A signal every millisecond for as long as it lives, to a handler without SA_RESTART.
class Timer {
 public:
  Timer() {
    struct sigaction action = {};
    action.sa_handler = [](int) { ++signals; };
    sigaction(SIGALRM, &action, &before_);
    const itimerval every = {{0, 1000}, {0, 1000}};
    setitimer(ITIMER_REAL, &every, nullptr);
  }
  Timer(const Timer&) = delete;
  Timer& operator=(const Timer&) = delete;
  ~Timer() {
    const itimerval never = {};
    setitimer(ITIMER_REAL, &never, nullptr);
    sigaction(SIGALRM, &before_, nullptr);
  }

 private:
  struct sigaction before_ = {};
};

TEST_F(Staging, SucceedsUnderARainOfSignals) {
  constexpr std::int64_t size = 256 << 20;
  if (!fits(size)) GTEST_SKIP() << "/dev/shm is too small";
  fake.no_tmpfile = false;
  CreateOptions options;
  options.on_signal = [] {};
  const std::vector<std::byte> elements(size);
  for (const bool given : {false, true}) {
    fake.processors = given ? 2 : 1;
    {
      const Timer timer;
      if (given) {
        put(space_.uri("a"), {size}, Dtype("u1"), elements.data(), options);
      } else {
        make("a", size / 8, options);
      }
      EXPECT_GT(signals.exchange(0), 0);
    }
    struct stat st;
    ASSERT_EQ(stat(space_.path("a").c_str(), &st), 0);
    EXPECT_EQ(st.st_size, 4096 + size);
    EXPECT_EQ(st.st_blocks * 512, 4096 + size);
    remove(space_.uri("a"));
  }
}

// A process that is in the middle of a create: its temporary file is there, its array is not.
class Maker {
 public:
  explicit Maker(const std::string& uri) {
    if (pipe(ready_) != 0 || pipe(go_) != 0) throw std::runtime_error("pipe");
    pid_ = fork();
    if (pid_ == 0) {
      close(go_[1]);
      fake.on_fallocate = [this](off_t, off_t) {
        char c = 'x';
        if (write(ready_[1], &c, 1) != 1 || read(go_[0], &c, 1) < 0) _exit(2);
        return 0;
      };
      _exit(caught([&] { create(uri, {many}, Dtype("f8")); }).errnum);
    }
    close(ready_[1]);
    close(go_[0]);
    char c;
    if (read(ready_[0], &c, 1) != 1) throw std::runtime_error("the maker has failed");
  }
  Maker(const Maker&) = delete;
  Maker& operator=(const Maker&) = delete;
  ~Maker() {
    if (pid_ > 0) kill_it();
    close(ready_[0]);
    if (go_[1] >= 0) close(go_[1]);
  }
  void kill_it() {
    kill(pid_, SIGKILL);
    waitpid(std::exchange(pid_, 0), nullptr, 0);
  }
  // Its exit status: the errno of its create.
  int finish() {
    close(std::exchange(go_[1], -1));
    int status = -1;
    waitpid(std::exchange(pid_, 0), &status, 0);
    return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
  }

 private:
  int ready_[2], go_[2];
  pid_t pid_ = 0;
};

TEST_F(Staging, ALivingMakersTemporaryIsLeftAlone) {
  Maker maker(space_.uri("theirs"));
  ASSERT_EQ(temporaries().size(), 1u);
  make("ours");
  EXPECT_EQ(temporaries().size(), 1u);
  EXPECT_EQ(maker.finish(), 0);
  EXPECT_TRUE(temporaries().empty());
  EXPECT_EQ(info(space_.uri("theirs")).shape, Shape{many});
}

TEST_F(Staging, ADeadMakersTemporaryIsSweptByTheNextCreate) {
  Maker maker(space_.uri("theirs"));
  maker.kill_it();
  ASSERT_EQ(temporaries().size(), 1u);
  make("ours");
  EXPECT_EQ(space_.files(), std::vector<std::string>{"ours"});
}

TEST_F(Staging, TheSweepTakesNothingElse) {
  test::write_file(space_.path("sharr-tmp-0"), "a file");
  test::write_file(space_.path(".sharr-tmp"), "a file");
  test::write_file(space_.path("target"), "a file");
  std::filesystem::create_symlink("target", space_.path(".sharr-tmp-link"));
  ASSERT_EQ(mkfifo(space_.path(".sharr-tmp-fifo").c_str(), 0600), 0);
  make("a");
  for (const char* leaf : {"sharr-tmp-0", ".sharr-tmp", "target", ".sharr-tmp-fifo", "a"}) {
    EXPECT_TRUE(std::filesystem::exists(space_.path(leaf))) << leaf;
  }
}

TEST_F(Staging, TemporariesAreNoArrays) {
  Maker maker(space_.uri("theirs"));
  const auto names = temporaries();
  ASSERT_EQ(names.size(), 1u);
  // Even one that is complete.
  create(space_.uri("a"), {3}, Dtype("f8"));
  std::filesystem::copy_file(space_.path("a"), space_.path(".sharr-tmp-copy"));
  const auto found = list(space_.directory());
  ASSERT_EQ(found.size(), 1u);
  EXPECT_EQ(found[0].name, space_.uri("a"));
  EXPECT_THROW(attach(space_.uri(".sharr-tmp-copy")), ArgumentError);
  EXPECT_THROW(remove(space_.path(".sharr-tmp-copy")), ArgumentError);
}

TEST_F(Staging, RacingMakersSweepNoLivingOne) {
  std::vector<pid_t> pids;
  constexpr int rounds = 200;
  for (int process = 0; process < 4; ++process) {
    const pid_t pid = fork();
    if (pid == 0) {
      const auto found = caught([&] {
        for (int i = 0; i < rounds; ++i) make(std::to_string(process) + "-" + std::to_string(i));
      });
      _exit(found.errnum);
    }
    pids.push_back(pid);
  }
  for (const pid_t pid : pids) {
    int status = -1;
    waitpid(pid, &status, 0);
    EXPECT_EQ(status, 0);
  }
  EXPECT_EQ(list(space_.directory()).size(), 4u * rounds);
  EXPECT_TRUE(temporaries().empty());
}

}  // namespace
}  // namespace sharr
