#include <gtest/gtest.h>

#include <cerrno>

#include "sharr/store.hpp"
#include "support.hpp"

namespace sharr {
namespace {

using test::caught;

struct Case {
  std::string given, path, uri;
  bool shm;
};

TEST(Name, IsAPathAndAUri) {
  for (const auto& [given, path, uri, shm] :
       {Case{"shm://a", "/dev/shm/a", "shm://a", true},
        Case{"shm:///a", "/dev/shm/a", "shm://a", true}, Case{"a", "/dev/shm/a", "shm://a", true},
        Case{"shm://jobs/7/a", "/dev/shm/jobs/7/a", "shm://jobs/7/a", true},
        Case{"jobs/7/a", "/dev/shm/jobs/7/a", "shm://jobs/7/a", true},
        Case{"shm://...", "/dev/shm/...", "shm://...", true},
        Case{"shm://.hidden", "/dev/shm/.hidden", "shm://.hidden", true},
        Case{"shm://a b\n\xFF", "/dev/shm/a b\n\xFF", "shm://a b\n\xFF", true},
        Case{"shm", "/dev/shm/shm", "shm://shm", true},
        Case{"a:b", "/dev/shm/a:b", "shm://a:b", true},
        Case{"file:///data/a.npy", "/data/a.npy", "file:///data/a.npy", false},
        Case{"file://rel/a.npy", "rel/a.npy", "file://rel/a.npy", false},
        Case{"file://../a", "../a", "file://../a", false},
        Case{"/data/a.npy", "/data/a.npy", "file:///data/a.npy", false},
        Case{"/dev/shm/a", "/dev/shm/a", "file:///dev/shm/a", false}}) {
    const Name name(given);
    EXPECT_EQ(name.given(), given);
    EXPECT_EQ(name.path(), path) << given;
    EXPECT_EQ(name.uri(), uri) << given;
    EXPECT_EQ(name.shm(), shm) << given;
    EXPECT_EQ(Name(name.uri()).path(), path) << given;
  }
}

TEST(Name, RefusesWhatIsNone) {
  using namespace std::string_literals;
  for (const std::string& given :
       {""s,           "shm://"s,     "shm:///"s,     "shm:////a"s, "shm://a/"s,
        "shm://a//b"s, "a/"s,         "a//b"s,        "shm://."s,   "shm://.."s,
        "shm://a/.."s, "shm://../a"s, "shm://a/./b"s, "."s,         ".."s,
        "../a"s,       "a\0b"s,       "shm://a\0"s,   "/a\0b"s,     "file://a\0b"s,
        "http://a"s,   "SHM://a"s,    "shmem://a"s,   "://a"s,      "shm:/a"s,
        "file:/a"s}) {
    try {
      const Name name(given);
      ADD_FAILURE() << given << " is " << name.path();
    } catch (const ArgumentError& error) {
      EXPECT_EQ(error.errnum(), EINVAL) << given;
      EXPECT_EQ(error.name(), given);
      EXPECT_FALSE(error.message().empty());
    }
  }
}

TEST(Name, ReservesThoseOfTemporaryFiles) {
  for (const char* given : {"shm://.sharr-tmp-1", ".sharr-tmp-", "shm://jobs/.sharr-tmp-1",
                            "shm://.sharr-tmp-1/a", "/data/.sharr-tmp-1", "file://.sharr-tmp-1"}) {
    EXPECT_THROW(Name{given}, ArgumentError) << given;
  }
  EXPECT_THROW(Name::from_path(".sharr-tmp-1"), ArgumentError);
  EXPECT_NO_THROW(Name("shm://.sharr-tmp"));
  EXPECT_NO_THROW(Name("shm://a.sharr-tmp-1"));
}

TEST(Name, PathsAreTakenAsTheyAre) {
  for (const char* path : {"a", "shm://a", "file://a", "/data/a", "./a", "http://a"}) {
    EXPECT_EQ(Name::from_path(path).path(), path);
    EXPECT_FALSE(Name::from_path(path).shm());
  }
  EXPECT_EQ(caught([] { Name::from_path(""); }).errnum, ENOENT);
  EXPECT_THROW(Name::from_path(std::string_view("a\0b", 3)), ArgumentError);
}

TEST(Name, OfADirectoryMayEndInASlashAndBeTheRoot) {
  for (const char* given : {"shm://", "shm:///"}) {
    EXPECT_EQ(Name::directory(given).path(), "/dev/shm") << given;
    EXPECT_EQ(Name::directory(given).uri(), "shm://") << given;
  }
  for (const char* given : {"shm://jobs", "shm://jobs/", "jobs", "jobs/", "shm:///jobs/"}) {
    EXPECT_EQ(Name::directory(given).path(), "/dev/shm/jobs") << given;
    EXPECT_EQ(Name::directory(given).uri(), "shm://jobs") << given;
  }
  EXPECT_EQ(Name::directory("file:///data/").path(), "/data");
  EXPECT_EQ(Name::directory("file:///").path(), "/");
  for (const char* given :
       {"", "shm://jobs//", "shm://..", "jobs/../..", "http://", "shm://a//b"}) {
    EXPECT_THROW(Name::directory(given), ArgumentError) << given;
  }
}

TEST(Name, TooLongIsTheFileSystemsToSay) {
  const std::string component(256, 'a');
  std::string path;
  for (int i = 0; i < 20; ++i) path += std::string(250, 'a') + "/";
  for (const std::string& name :
       {"shm://" + component, "shm://" + path + "a", "/tmp/" + component}) {
    EXPECT_EQ(caught([&] { attach(name); }).errnum, ENAMETOOLONG);
    EXPECT_EQ(caught([&] { create(name, {1}, Dtype("f8")); }).errnum, ENAMETOOLONG);
    EXPECT_EQ(caught([&] { remove(name); }).errnum, ENAMETOOLONG);
    EXPECT_EQ(caught([&] { info(name); }).name, name);
  }
}

}  // namespace
}  // namespace sharr
