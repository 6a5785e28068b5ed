// Arrays by file descriptor: drafts on their way to a name, what is in a directory, deep paths.
#include "sharr/object.hpp"

#include <gtest/gtest.h>
#include <linux/capability.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <sys/xattr.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <thread>
#include <vector>

#include "support.hpp"

namespace sharr {
namespace {

using test::caught;

std::string npy(int count) {
  std::string text =
      "{'descr': '|u1', 'fortran_order': False, 'shape': (" + std::to_string(count) + ",), }";
  text.resize(117, ' ');
  return test::npy_header(1, text + "\n") + std::string(static_cast<std::size_t>(count), 'x');
}

class Drafts : public testing::Test {
 protected:
  Draft draft(std::string_view content) {
    Draft made(directory_.get(), space_.uri("a"), 0644);
    EXPECT_EQ(pwrite(made.fd(), content.data(), content.size(), 0),
              static_cast<ssize_t>(content.size()));
    return made;
  }

  test::Namespace space_;
  FileDescriptor directory_ = open_directory(space_.directory());
};

TEST_F(Drafts, AppearWhenTheyArePublished) {
  Draft made = draft(npy(5));
  EXPECT_TRUE(space_.files().empty());
  const Info info = made.check(false);
  EXPECT_EQ(info.shape, Shape{5});
  made.reserve(info);
  made.publish(directory_.get(), "a", false);
  EXPECT_EQ(test::read_file(space_.path("a")), npy(5));
  EXPECT_EQ(space_.files(), std::vector<std::string>{"a"});
}

TEST_F(Drafts, LeaveNothing) {
  { draft(npy(5)); }
  EXPECT_TRUE(space_.files().empty());
}

TEST_F(Drafts, AreOneWholeArrayAndNothingElse) {
  const std::string whole = npy(5);
  for (std::size_t size = 0; size < whole.size(); ++size) {
    EXPECT_EQ(caught([&] { draft(whole.substr(0, size)).check(false); }).errnum, EINVAL) << size;
  }
  const auto longer = caught([&] { draft(whole + "y").check(false); });
  EXPECT_EQ(longer.errnum, EINVAL);
  EXPECT_EQ(longer.message, "too long: (5,) of |u1 need 133 bytes, the file has 134");
  EXPECT_EQ(longer.name, space_.uri("a"));
}

TEST_F(Drafts, AHeaderAloneIsAnArrayOfZerosIfDeclared) {
  const std::string header = npy(5000).substr(0, 128);
  EXPECT_EQ(caught([&] { draft(header).check(false); }).errnum, EINVAL);
  Draft made = draft(header);
  made.reserve(made.check(true));
  made.publish(directory_.get(), "a", false);
  EXPECT_EQ(test::read_file(space_.path("a")), header + std::string(5000, '\0'));
  struct stat st;
  ASSERT_EQ(stat(space_.path("a").c_str(), &st), 0);
  EXPECT_GE(st.st_blocks * 512, 5128);
}

TEST_F(Drafts, MoreThanThereIsIsNoSpace) {
  std::string header = npy(7).substr(0, 128);
  header.replace(header.find("(7,), }             "), 20, "(4611686018427387,)}");
  Draft made = draft(header);
  const Info info = made.check(true);
  EXPECT_EQ(caught([&] { made.reserve(info); }).errnum, ENOSPC);
}

TEST_F(Drafts, ReplaceInOneStepOrNotAtAll) {
  create(space_.uri("a"), {3}, Dtype("f8"));
  const Array old = attach(space_.uri("a"));
  Draft made = draft(npy(5));
  EXPECT_EQ(caught([&] { made.publish(directory_.get(), "a", false); }).errnum, EEXIST);
  made.publish(directory_.get(), "a", true);
  EXPECT_EQ(attach(space_.uri("a")).info().shape, Shape{5});
  EXPECT_EQ(old.info().shape, Shape{3});
  EXPECT_EQ(space_.files(), std::vector<std::string>{"a"});
  // The lock that kept it from being swept is gone.
  const FileDescriptor fd(open(space_.path("a").c_str(), O_RDWR));
  EXPECT_EQ(flock(fd.get(), LOCK_EX | LOCK_NB), 0);
}

TEST_F(Drafts, InADirectoryThatIsGoneAreNotPublished) {
  std::filesystem::create_directory(space_.path("d"));
  const FileDescriptor directory(open(space_.path("d").c_str(), O_PATH | O_DIRECTORY));
  Draft made(directory.get(), space_.uri("d/a"), 0644);
  std::filesystem::remove(space_.path("d"));
  for (const bool replace : {false, true}) {
    EXPECT_EQ(caught([&] { made.publish(directory.get(), "a", replace); }).errnum, ENOENT);
  }
}

TEST_F(Drafts, WhatADeadMakerLeftGoesWhenSomebodyLooks) {
  create(space_.uri("a"), {3}, Dtype("f8"));
  test::write_file(space_.path(".sharr-tmp-dead"), npy(5));
  test::write_file(space_.path(".sharr-tmp-alive"), npy(5));
  const FileDescriptor alive(open(space_.path(".sharr-tmp-alive").c_str(), O_RDWR));
  ASSERT_EQ(flock(alive.get(), LOCK_SH), 0);
  EXPECT_EQ(list(space_.directory()).size(), 1u);
  std::vector<std::string> left = space_.files();
  std::ranges::sort(left);
  EXPECT_EQ(left, (std::vector<std::string>{".sharr-tmp-alive", "a"}));
}

TEST_F(Drafts, WhatIsMovedAwayMeanwhileIsThereOrNot) {
  ASSERT_EQ(mkdirat(directory_.get(), "one", 0700), 0);
  ASSERT_EQ(mkdirat(directory_.get(), "other", 0700), 0);
  ASSERT_EQ(mkdirat(directory_.get(), "one/x", 0700), 0);
  const FileDescriptor one = open_beneath(directory_.get(), "one", O_PATH | O_DIRECTORY);
  const std::jthread mover([this](const std::stop_token& stop) {
    while (!stop.stop_requested()) {
      renameat(directory_.get(), "one/x", directory_.get(), "other/x");
      renameat(directory_.get(), "other/x", directory_.get(), "one/x");
    }
  });
  for (int i = 0; i < 50'000; ++i) {
    if (!open_beneath(one.get(), "x", O_PATH)) ASSERT_EQ(errno, ENOENT);
  }
}

TEST_F(Drafts, PathsMayBeLongerThanOneCallTakes) {
  const std::string name(200, 'd');
  std::string path;
  FileDescriptor at = open_beneath(directory_.get(), ".", O_PATH | O_DIRECTORY);
  for (int depth = 0; depth < 50; ++depth) {
    ASSERT_EQ(mkdirat(at.get(), name.c_str(), 0755), 0);
    at = open_beneath(at.get(), name, O_PATH | O_DIRECTORY);
    path += (depth > 0 ? "/" : "") + name;
  }
  struct stat deepest;
  struct stat found;
  ASSERT_EQ(fstat(at.get(), &deepest), 0);
  const FileDescriptor opened = open_beneath(directory_.get(), path, O_PATH | O_DIRECTORY);
  ASSERT_TRUE(opened);
  ASSERT_EQ(fstat(opened.get(), &found), 0);
  EXPECT_EQ(found.st_ino, deepest.st_ino);
  EXPECT_FALSE(open_beneath(directory_.get(), std::string(5000, 'x'), O_RDONLY));
  EXPECT_EQ(errno, ENAMETOOLONG);
}

// What list() says of a directory's arrays, as text.
std::string listed(const test::Namespace& space) {
  std::string text;
  for (const Info& info : list(space.directory())) {
    text += info.name.substr(info.name.rfind('/') + 1) + info.dtype.descr() +
            shape_text(info.shape) + " ";
  }
  return text;
}

class Listings : public testing::Test {
 protected:
  // Until a change is told by the time of the file.
  static void settle() { std::this_thread::sleep_for(std::chrono::milliseconds(50)); }
  void overwrite(std::string_view leaf, const Shape& shape, const char* dtype) {
    const std::string header =
        format_header({.name = {}, .dtype = Dtype(dtype), .shape = shape, .format = {}});
    std::fstream(space_.path(leaf), std::ios::in | std::ios::out | std::ios::binary)
        .write(header.data(), static_cast<std::streamsize>(header.size()));
  }

  test::Namespace space_;
};

TEST_F(Listings, SeeWhatHasChangedSinceTheLast) {
  create(space_.uri("a"), {3}, Dtype("f8"));
  create(space_.uri("b"), {4}, Dtype("f4"));
  settle();
  for (int i = 0; i < 2; ++i) EXPECT_EQ(listed(space_), "a<f8(3,) b<f4(4,) ");
  overwrite("a", {6}, "<f4");
  EXPECT_EQ(listed(space_), "a<f4(6,) b<f4(4,) ");
  remove(space_.uri("a"));
  create(space_.uri("a"), {1}, Dtype("i2"));
  EXPECT_EQ(listed(space_), "a<i2(1,) b<f4(4,) ");
  settle();
  EXPECT_EQ(listed(space_), "a<i2(1,) b<f4(4,) ");
  rename(space_.uri("a"), space_.uri("c"));
  EXPECT_EQ(listed(space_), "b<f4(4,) c<i2(1,) ");
  std::filesystem::resize_file(space_.path("b"), 4097);
  EXPECT_EQ(listed(space_), "c<i2(1,) ");
  std::filesystem::resize_file(space_.path("b"), 4096 + 16);
  EXPECT_EQ(listed(space_), "b<f4(4,) c<i2(1,) ");
  test::write_file(space_.path("b"), "text");
  test::write_file(space_.path("d"), npy(2));
  EXPECT_EQ(listed(space_), "c<i2(1,) d|u1(2,) ");
}

TEST_F(Listings, SeeWhatAMappingMakesAnArray) {
  const std::string array = npy(2);
  create(space_.uri("a"), {3}, Dtype("f8"));
  test::write_file(space_.path("b"), std::string(array.size(), '-'));
  const FileDescriptor fd(open(space_.path("b").c_str(), O_RDWR | O_CLOEXEC));
  void* const memory = mmap(nullptr, array.size(), PROT_WRITE, MAP_SHARED, fd.get(), 0);
  ASSERT_NE(memory, MAP_FAILED);
  std::memset(memory, '-', array.size());  // the next store changes no times
  settle();
  for (int i = 0; i < 3; ++i) EXPECT_EQ(listed(space_), "a<f8(3,) ");
  std::memcpy(memory, array.data(), array.size());
  EXPECT_EQ(listed(space_), "a<f8(3,) b|u1(2,) ");
  munmap(memory, array.size());
}

TEST_F(Listings, SweepWhatWasLeftSinceTheLast) {
  const std::string leaf = std::string(temporary_prefix) + "0123";
  test::write_file(space_.path(leaf), "");
  FileDescriptor maker(open(space_.path(leaf).c_str(), O_RDONLY | O_CLOEXEC));
  ASSERT_EQ(flock(maker.get(), LOCK_EX), 0);
  create(space_.uri("a"), {3}, Dtype("f8"));
  settle();
  EXPECT_EQ(listed(space_), "a<f8(3,) ");
  EXPECT_TRUE(std::filesystem::exists(space_.path(leaf)));
  maker = FileDescriptor();
  EXPECT_EQ(listed(space_), "a<f8(3,) ");
  EXPECT_FALSE(std::filesystem::exists(space_.path(leaf)));
}

TEST_F(Listings, AreNamedByWhereTheyAre) {
  create(space_.uri("a"), {3}, Dtype("f8"));
  create(space_.uri("d/b"), {3}, Dtype("f8"));
  settle();
  for (int i = 0; i < 2; ++i) {
    EXPECT_EQ(list(space_.directory())[0].name, space_.uri("a"));
    EXPECT_EQ(list(Name::directory(space_.path()))[0].name, "file://" + space_.path("a"));
    std::filesystem::rename(space_.path("d"), space_.path("e"));
    EXPECT_EQ(list(space_.directory())[1].name, space_.uri("e/b"));
    std::filesystem::rename(space_.path("e"), space_.path("d"));
    settle();
  }
}

TEST_F(Listings, AreRightWhenOneChangeFollowsAnother) {
  create(space_.uri("a"), {100}, Dtype("u1"));
  for (int i = 1; i < 100; ++i) {
    overwrite("a", {i}, "|u1");
    ASSERT_EQ(listed(space_), "a|u1" + shape_text({i}) + " ");
  }
}

TEST_F(Listings, OfManyReadByThreads) {
  constexpr int count = 3000;
  for (int i = 0; i < count; ++i) create(space_.uri(std::to_string(i)), {i}, Dtype("u1"));
  for (int round = 0; round < 3; ++round) {
    const std::vector<Info> found = list(space_.directory());
    ASSERT_EQ(found.size(), static_cast<std::size_t>(count));
    EXPECT_TRUE(std::ranges::is_sorted(found, {}, &Info::name));
    for (const Info& info : found) {
      EXPECT_EQ(info.name.substr(info.name.rfind('/') + 1), std::to_string(info.nbytes));
    }
    settle();
  }
  // What has not changed is not read again.
  const auto before = list_shared(space_.directory());
  create(space_.uri("x"), {1}, Dtype("u1"));
  auto after = list_shared(space_.directory());
  ASSERT_EQ(after.size(), static_cast<std::size_t>(count) + 1);
  after.pop_back();
  EXPECT_EQ(after, before);
  std::vector<std::jthread> threads;
  for (int i = 0; i < 3; ++i) {
    threads.emplace_back([&] { EXPECT_EQ(list(space_.directory()).size(), count + 1); });
  }
}

TEST_F(Listings, OfManyAreWholeOrFail) {
#ifdef __SANITIZE_ADDRESS__
  GTEST_SKIP() << "its companion for undefined behaviour takes descriptors itself";
#endif
  constexpr std::size_t count = 400;
  for (std::size_t i = 0; i < count; ++i) create(space_.uri(std::to_string(i)), {1}, Dtype("u1"));
  rlimit before;
  ASSERT_EQ(getrlimit(RLIMIT_NOFILE, &before), 0);
  const FileDescriptor next(dup(0));
  bool whole = false;
  for (int left = 0; !whole; ++left) {
    ASSERT_LT(left, 40);
    const rlimit limit{.rlim_cur = static_cast<rlim_t>(next.get() + 1 + left),
                       .rlim_max = before.rlim_max};
    ASSERT_EQ(setrlimit(RLIMIT_NOFILE, &limit), 0);
    try {
      EXPECT_EQ(list(space_.directory()).size(), count);
      whole = true;
    } catch (const Error& error) {
      EXPECT_EQ(error.errnum(), EMFILE);
    }
  }
  ASSERT_EQ(setrlimit(RLIMIT_NOFILE, &before), 0);
}

TEST_F(Listings, DoNotTellOneUserWhatAnotherMayRead) {
  if (geteuid() != 0) GTEST_SKIP() << "needs to be root";
  create(space_.uri("a"), {3}, Dtype("f8"));
  std::filesystem::permissions(space_.path("a"), std::filesystem::perms::owner_read);
  settle();
  for (int i = 0; i < 2; ++i) EXPECT_EQ(listed(space_), "a<f8(3,) ");
  ASSERT_EQ(seteuid(65534), 0);
  const std::string theirs = listed(space_);
  ASSERT_EQ(seteuid(0), 0);
  EXPECT_EQ(theirs, "");
}

TEST_F(Listings, EndWithTheRightToRead) {
  if (geteuid() != 0) GTEST_SKIP() << "needs to be root";
  create(space_.uri("a"), {3}, Dtype("f8"));
  ASSERT_EQ(chown(space_.path("a").c_str(), 65534, 65534), 0);
  std::filesystem::permissions(space_.path("a"), std::filesystem::perms::owner_read);
  settle();
  for (int i = 0; i < 2; ++i) EXPECT_EQ(listed(space_), "a<f8(3,) ");
  const pid_t child = fork();
  if (child == 0) {
    __user_cap_header_struct header{.version = _LINUX_CAPABILITY_VERSION_3, .pid = 0};
    const __user_cap_data_struct none[2] = {};
    const bool dropped = syscall(SYS_capset, &header, none) == 0;
    _exit(dropped && listed(space_).empty() ? 0 : 1);
  }
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_EQ(status, 0);
}

TEST(Files, AreReadWithoutAMapping) {
  const test::Namespace space;
  test::write_file(space.path("a"), npy(5));
  const OpenArray opened = open_array(space.uri("a"));
  EXPECT_EQ(opened.info.name, space.uri("a"));
  EXPECT_EQ(opened.info.shape, Shape{5});
  std::string data(6, '-');
  EXPECT_EQ(pread(opened.fd.get(), data.data(), 6, static_cast<off_t>(opened.info.offset)), 5);
  EXPECT_EQ(data, "xxxxx-");
  EXPECT_EQ(caught([&] { open_array(space.uri("b")); }).errnum, ENOENT);
  test::write_file(space.path("c"), npy(5).substr(0, 130));
  EXPECT_EQ(caught([&] { open_array(space.uri("c")); }).errnum, EINVAL);
}

TEST(Rights, OfTwoWithTheSameAclItStays) {
  const test::Namespace space;
  // owner, a user, the group, mask, others: linux/posix_acl_xattr.h
  const auto acl_of = [](std::uint16_t user) {
    std::string acl("\2\0\0\0", 4);
    const auto add = [&](std::uint16_t tag, std::uint16_t permissions, std::uint32_t id) {
      acl.append(reinterpret_cast<const char*>(&tag), sizeof(tag));
      acl.append(reinterpret_cast<const char*>(&permissions), sizeof(permissions));
      acl.append(reinterpret_cast<const char*>(&id), sizeof(id));
    };
    constexpr std::uint32_t none = 0xFFFFFFFF;
    add(1, 6, none), add(2, user, 1234), add(4, 4, none), add(16, 6, none), add(32, 4, none);
    return acl;
  };
  constexpr const char* key = "system.posix_acl_access";
  std::vector<FileDescriptor> files;
  for (const char* name : {"a", "b"}) {
    const FileDescriptor& file =
        files.emplace_back(::open(space.path(name).c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0644));
    const std::string acl = acl_of(6);
    if (fsetxattr(file.get(), key, acl.data(), acl.size(), 0) != 0) GTEST_SKIP() << "no ACLs here";
  }
  grant_no_more(rights_of(files[0].get(), "a"), files[1].get(), "b");
  EXPECT_EQ(rights_of(files[1].get(), "b"), rights_of(files[0].get(), "a"));
  // Of two that differ both are bounds, which a mode alone can say.
  const std::string acl = acl_of(0);
  ASSERT_EQ(fsetxattr(files[0].get(), key, acl.data(), acl.size(), 0), 0);
  grant_no_more(rights_of(files[0].get(), "a"), files[1].get(), "b");
  const Rights rights = rights_of(files[1].get(), "b");
  EXPECT_TRUE(rights.acl.empty());
  EXPECT_EQ(rights.mode, 0600u);
}

TEST(Headers, ComeAndGoWithoutAFile) {
  const test::Namespace space;
  const Info info = create(space.uri("a"), {2, 3}, Dtype("<f4"), {.order = Order::fortran}).info();
  const std::string made = format_header(info);
  EXPECT_EQ(made.size() % 4096, 0);
  EXPECT_EQ(header_size(made.substr(0, 12), "-"), made.size());
  const Info parsed = parse_header(made, "-");
  EXPECT_EQ(parsed.name, "-");
  EXPECT_EQ(parsed.dtype, info.dtype);
  EXPECT_EQ(parsed.shape, info.shape);
  EXPECT_EQ(parsed.order, Order::fortran);
  EXPECT_EQ(parsed.offset, made.size());

  for (const std::string& head :
       {std::string(), made.substr(0, 9), std::string("\x93NUMPY\1\0\0\0", 10),
        std::string(12, 'x'), std::string("\x93NUMPY\2\0\xff\xff\xff\xff", 12)}) {
    const auto error = caught([&] { header_size(head, "-"); });
    EXPECT_EQ(error.errnum, EINVAL) << head;
    EXPECT_EQ(error.name, "-");
  }
  for (const std::string& head :
       {made.substr(0, made.size() - 1), made + "x", made.substr(0, 9), std::string()}) {
    EXPECT_EQ(caught([&] { parse_header(head, "-"); }).errnum, EINVAL) << head.size();
  }
}

}  // namespace
}  // namespace sharr
