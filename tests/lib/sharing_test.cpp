// Arrays that appear filled or together, waiting for them, and their identity.
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <filesystem>
#include <functional>
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
  EXPECT_THROW(made.add("a/b", {3}, f8), ArgumentError);
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
