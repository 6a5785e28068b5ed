// Arrays that appear filled or together, waiting for them, and their identity.
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <filesystem>
#include <fstream>
#include <functional>
#include <optional>
#include <sharr/object.hpp>
#include <sharr/store.hpp>
#include <thread>
#include <vector>

#include "support.hpp"

namespace sharr {
namespace {

using std::chrono::milliseconds;

const Dtype f8("f8");

class Sharing : public testing::Test {
 protected:
  test::Namespace space_;
};

int errnum_of(const std::function<void()>& call) {
  try {
    call();
  } catch (const Error& error) {
    return error.errnum();
  }
  return 0;
}

TEST_F(Sharing, ANewArrayAppearsWhenItIsPublished) {
  Array array = [&] {
    NewArray made(space_.uri("a"), {3}, f8);
    Array taken = made.take();
    EXPECT_THROW(made.take(), Error);
    taken.as<double>()[1] = 7;
    EXPECT_EQ(errnum_of([&] { attach(space_.uri("a")); }), ENOENT);
    made.publish();
    return taken;
  }();
  EXPECT_EQ(attach(space_.uri("a")).as<double>()[1], 7);
  EXPECT_EQ(attach(space_.uri("a")).identity(), array.identity());
  EXPECT_EQ(errnum_of([&] { NewArray(space_.uri("a"), {3}, f8); }), EEXIST);
  { NewArray unpublished(space_.uri("b"), {3}, f8); }
  EXPECT_EQ(errnum_of([&] { attach(space_.uri("b")); }), ENOENT);
}

TEST_F(Sharing, IdentitySurvivesMovesAndTellsObjectsApart) {
  Array first = create(space_.uri("a"), {3}, f8);
  const Identity identity = first.identity();
  EXPECT_NE(identity.inode, 0u);
  Array moved = std::move(first);
  EXPECT_EQ(moved.identity(), identity);
  Array second = create(space_.uri("a"), {3}, f8, {.replace = true});
  EXPECT_NE(second.identity(), identity);
  second = std::move(moved);
  EXPECT_EQ(second.identity(), identity);
}

TEST_F(Sharing, ReplacingKeepsPermissionsAndOldAttachments) {
  const Array old = create(space_.uri("a"), {3}, f8);
  old.as<double>()[0] = 1;
  ASSERT_EQ(chmod(space_.path("a").c_str(), 0640), 0);
  create(space_.uri("a"), {5}, f8, {.replace = true});
  EXPECT_EQ(info(space_.uri("a")).shape, Shape{5});
  EXPECT_EQ(old.as<double>()[0], 1);
  struct stat st;
  ASSERT_EQ(stat(space_.path("a").c_str(), &st), 0);
  EXPECT_EQ(st.st_mode & 0777, 0640u);
  test::write_file(space_.path("text"), "text");
  EXPECT_THROW(create(space_.uri("text"), {5}, f8, {.replace = true}), FormatError);
  EXPECT_THROW(rename(space_.uri("a"), space_.uri("text"), true), FormatError);
}

TEST_F(Sharing, Rename) {
  const Identity identity = create(space_.uri("a"), {3}, f8).identity();
  create(space_.uri("b"), {4}, f8);
  EXPECT_EQ(errnum_of([&] { rename(space_.uri("a"), space_.uri("b")); }), EEXIST);
  rename(space_.uri("a"), space_.uri("c"));
  rename(space_.uri("c"), space_.uri("b"), true);
  EXPECT_EQ(attach(space_.uri("b")).identity(), identity);
  EXPECT_EQ(errnum_of([&] { rename(space_.uri("a"), space_.uri("b")); }), ENOENT);
}

TEST_F(Sharing, ANamespaceAppearsWithAllItsArrays) {
  const Name where = Name::directory(space_.uri("run/"));
  NewNamespace made(where);
  made.add("x", {3}, f8).as<double>()[0] = 1;
  made.add("y", {4}, f8, {.order = Order::fortran});
  EXPECT_EQ(errnum_of([&] { made.add("x", {3}, f8); }), EEXIST);
  EXPECT_THROW(made.add("a//b", {3}, f8), ArgumentError);
  EXPECT_EQ(errnum_of([&] { attach_all(where); }), ENOENT);
  made.publish();
  const std::vector<Array> found = attach_all(where);
  ASSERT_EQ(found.size(), 2u);
  EXPECT_EQ(found[0].as<double>()[0], 1);
  EXPECT_EQ(found[1].info().name, space_.uri("run/y"));
  EXPECT_EQ(errnum_of([&] { NewNamespace again(where); }), EEXIST);
  test::write_file(space_.path("run/text"), "text");
  EXPECT_EQ(errnum_of([&] { remove_all(where); }), ENOTEMPTY);
  EXPECT_EQ(attach_all(where).size(), 2u);
  ASSERT_EQ(unlink(space_.path("run/text").c_str()), 0);
  remove_all(where);
  EXPECT_EQ(errnum_of([&] { remove_all(where); }), ENOENT);
  EXPECT_EQ(found[0].as<double>()[0], 1);
}

TEST_F(Sharing, TwoNamespacesOfOneName) {
  const Name where = Name::directory(space_.uri("run"));
  NewNamespace first(where), second(where);
  first.add("x", {3}, f8);
  second.add("y", {3}, f8);
  first.publish();
  EXPECT_EQ(errnum_of([&] { second.publish(); }), EEXIST);
  EXPECT_EQ(attach_all(where).size(), 1u);
  EXPECT_EQ(std::distance(std::filesystem::directory_iterator(space_.path("")), {}), 1);
}

TEST_F(Sharing, ArraysOfOneObjectShareAMapping) {
  const Name name = space_.uri("a");
  std::optional<Array> made = create(name, {3}, f8);
  Array again = attach(name);
  EXPECT_EQ(again.data(), made->data());
  const Array reader = attach(name, Mode::read);
  EXPECT_NE(reader.data(), made->data());
  EXPECT_EQ(attach(name, Mode::read).data(), reader.data());
  Array alone = attach(name, Mode::copy_on_write);
  EXPECT_NE(alone.data(), attach(name, Mode::copy_on_write).data());
  made.reset();
  again.as<double>()[1] = 5;
  EXPECT_EQ(reader.as<double>()[1], 5);

  remove(name);
  const Array other = create(name, {3}, f8);
  EXPECT_NE(attach(name).data(), again.data());
  EXPECT_EQ(attach(name).data(), other.data());
  EXPECT_EQ(other.as<double>()[1], 0);
}

TEST_F(Sharing, WhatIsAttachedAgainIsLookedUpAgain) {
  const test::Flat flat;
  const test::Flat other;
  const Name name = flat.uri();
  const auto hold = [&](const Name& held, Mode mode = Mode::read_write) {
    std::this_thread::sleep_for(milliseconds(50));  // what has changed just now is read each time
    std::optional<Array> array;
    for (int i = 0; i < 4; ++i) array = attach(held, mode);
    EXPECT_EQ(array->info().name, held.uri());
    return *std::move(array);
  };
  create(name, {3}, f8);
  const Array held = hold(name);
  EXPECT_EQ(attach(name).data(), held.data());
  EXPECT_NE(attach(name, Mode::read).data(), held.data());

  // Another array, a link, nothing.
  put(other.uri(), {3}, f8, held.data());
  rename(other.uri(), name, true);
  EXPECT_NE(attach(name).data(), held.data());
  {
    const Array second = hold(name);
    EXPECT_NE(second.data(), held.data());
    rename(name, other.uri());
    EXPECT_EQ(errnum_of([&] { attach(name); }), ENOENT);
    EXPECT_EQ(hold(other.uri()).data(), second.data());
    create(name, {3}, f8);
    const Array of_the_name = hold(name);
    remove(name);
    std::filesystem::create_symlink(other.path(), flat.path());
    EXPECT_EQ(errnum_of([&] { attach(name); }), ELOOP);
    std::filesystem::remove(flat.path());
    EXPECT_EQ(attach(other.uri()).data(), second.data());
  }
  rename(other.uri(), name);

  // The rights of the file, and who asks.
  if (getuid() != 0) return;  // whom they do not stop, and who can be another
  const Array third = hold(name);
  const auto as_nobody = [&](Mode mode) {
    EXPECT_EQ(seteuid(65534), 0);
    const int errnum = errnum_of([&] { attach(name, mode); });
    EXPECT_EQ(seteuid(0), 0);
    return errnum;
  };
  EXPECT_EQ(chmod(flat.path().c_str(), 0644), 0);
  EXPECT_EQ(hold(name).data(), third.data());
  EXPECT_EQ(as_nobody(Mode::read_write), EACCES);
  EXPECT_EQ(chmod(flat.path().c_str(), 0666), 0);
  EXPECT_EQ(seteuid(65534), 0);
  EXPECT_EQ(hold(name).data(), third.data());
  EXPECT_EQ(seteuid(0), 0);
  EXPECT_EQ(chmod(flat.path().c_str(), 0644), 0);
  EXPECT_EQ(seteuid(65534), 0);
  const Array to_read = hold(name, Mode::read);
  EXPECT_EQ(errnum_of([&] { attach(name); }), EACCES);
  EXPECT_EQ(seteuid(0), 0);
  EXPECT_EQ(chmod(flat.path().c_str(), 0600), 0);
  hold(name);  // so that it is known again what the file is, but not that nobody may read it
  EXPECT_EQ(as_nobody(Mode::read_write), EACCES);
  EXPECT_EQ(as_nobody(Mode::read), EACCES);

  // Two names of one array.
  std::filesystem::create_hard_link(flat.path(), other.path());
  for (int i = 0; i < 3; ++i) {
    EXPECT_EQ(hold(name).data(), third.data());
    EXPECT_EQ(hold(other.uri()).data(), third.data());
  }
  remove(other.uri());
  EXPECT_EQ(errnum_of([&] { attach(other.uri()); }), ENOENT);
  EXPECT_EQ(hold(name).data(), third.data());

  // The group.
  EXPECT_EQ(chown(flat.path().c_str(), 0, 65534), 0);
  EXPECT_EQ(chmod(flat.path().c_str(), 0660), 0);
  const auto as_group = [&](gid_t group) {
    EXPECT_EQ(setegid(group), 0);
    EXPECT_EQ(seteuid(65534), 0);
    const int errnum = errnum_of([&] { hold(name); });
    EXPECT_EQ(seteuid(0), 0);
    EXPECT_EQ(setegid(0), 0);
    return errnum;
  };
  EXPECT_EQ(as_group(65534), 0);
  EXPECT_EQ(as_group(0), EACCES);
}

TEST_F(Sharing, WhatIsNoArrayAnyMoreIsRemovedByWhoHasItMapped) {
  for (const Mode mode : {Mode::read, Mode::read_write}) {
    create(space_.uri("a"), {3}, f8);
    std::optional<Array> array = attach(space_.uri("a"), mode);
    std::ofstream(space_.path("a"), std::ios::in | std::ios::binary) << "no array";
    EXPECT_EQ(errnum_of([&] { attach(space_.uri("a")); }), EINVAL);
    std::filesystem::rename(space_.path("a"), space_.path("b"));
    create(space_.uri("a"), {3}, f8);
    remove(space_.uri("b"));
    EXPECT_EQ(errnum_of([&] { remove(space_.uri("b")); }), ENOENT);
    remove(space_.uri("a"));
  }
  const Array other = create(space_.uri("other"), {3}, f8);
  std::ofstream(space_.path("a")) << "no array";
  EXPECT_EQ(errnum_of([&] { remove(space_.uri("a")); }), EINVAL);
}

TEST_F(Sharing, WhatIsRememberedIsUsedForWhatTheFileIsNow) {
  const test::Flat flat;  // of which more is remembered
  const Name name = flat.uri();
  const auto overwrite = [&](const Shape& shape, const char* dtype) {
    const std::string header =
        format_header({.name = {}, .dtype = Dtype(dtype), .shape = shape, .format = {}});
    std::fstream(flat.path(), std::ios::in | std::ios::out | std::ios::binary)
        .write(header.data(), static_cast<std::streamsize>(header.size()));
  };
  for (const bool held : {true, false}) {
    std::optional<Array> made = create(name, {4, 2}, f8);
    const void* const data = made->data();
    if (!held) made.reset();
    // Soon after each other, within a tick of the clock that files have.
    for (int i = 1; i < 200; ++i) {
      overwrite({i % 8 + 1}, "<f8");
      const Array array = attach(name);
      EXPECT_EQ(array.info().shape, Shape{i % 8 + 1});
      if (held) {
        EXPECT_EQ(array.data(), data);
      }
    }
    std::this_thread::sleep_for(milliseconds(50));
    for (int i = 0; i < 2; ++i) EXPECT_EQ(attach(name).info().shape, Shape{8});
    overwrite({16}, "<f4");
    EXPECT_EQ(attach(name).info().shape, Shape{16});
    std::filesystem::resize_file(flat.path(), 4096 + 128);
    overwrite({128}, "|u1");
    Array larger = attach(name);
    larger.as<unsigned char>()[127] = 1;
    std::filesystem::resize_file(flat.path(), 4096);
    EXPECT_EQ(errnum_of([&] { attach(name); }), EINVAL);
    std::filesystem::remove(flat.path());
  }
}

TEST_F(Sharing, MoreFilesThanAreRemembered) {
  constexpr int number = 1100;
  const auto name = [&](int i) { return space_.uri(std::to_string(i)); };
  for (int i = 0; i < number; ++i) create(name(i), {i}, f8);
  std::this_thread::sleep_for(milliseconds(50));
  for (int round = 0; round < 2; ++round) {
    for (int i = 0; i < number; ++i) ASSERT_EQ(attach(name(i)).info().shape, Shape{i});
  }
}

TEST_F(Sharing, ThreadsAttachAndLetGo) {
  const test::Flat flat;
  const Name name = flat.uri();
  const Array held = create(name, {1}, Dtype("i8"));
  std::this_thread::sleep_for(milliseconds(50));
  const auto work = [&] {
    for (int i = 0; i < 2000; ++i) {
      const Array array = attach(name, i % 3 == 0 ? Mode::read : Mode::read_write);
      EXPECT_EQ(array.as<std::int64_t>()[0], 0);
    }
  };
  std::vector<std::jthread> threads;
  for (int i = 0; i < 4; ++i) threads.emplace_back(work);
}

TEST_F(Sharing, AForkedChildAttachesWhateverOtherThreadsDo) {
  const test::Flat flat;
  const Name name = flat.uri();
  const Array held = create(name, {1}, Dtype("i8"));
  std::this_thread::sleep_for(milliseconds(50));
  std::atomic<bool> stop = false;
  std::jthread other([&] {
    while (!stop) attach(name);
  });
  for (int i = 0; i < 100; ++i) {
    const pid_t child = fork();
    ASSERT_GE(child, 0);
    if (child == 0) {
      alarm(60);  // a deadlock, not slowness, makes it fail
      attach(name);
      _exit(0);
    }
    int status = -1;
    ASSERT_EQ(waitpid(child, &status, 0), child);
    EXPECT_EQ(status, 0);
  }
  stop = true;
}

TEST_F(Sharing, Wait) {
  EXPECT_EQ(errnum_of([&] { wait(space_.uri("a"), Mode::read, milliseconds(1)); }), ETIMEDOUT);
  create(space_.uri("a"), {3}, f8);
  EXPECT_EQ(wait(space_.uri("a")).info().shape, Shape{3});
  std::thread maker([&] {
    for (int i = 0; i < 50; ++i) create(space_.uri("b" + std::to_string(i)), {i}, f8);
    NewNamespace made(Name::directory(space_.uri("run")));
    made.add("x", {3}, f8);
    made.publish();
  });
  for (int i = 0; i < 50; ++i) {
    EXPECT_EQ(wait(space_.uri("b" + std::to_string(i))).info().shape, Shape{i});
  }
  EXPECT_EQ(wait(space_.uri("run/x")).info().shape, Shape{3});
  maker.join();
}

}  // namespace
}  // namespace sharr
