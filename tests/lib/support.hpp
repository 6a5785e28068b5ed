// What the tests of lib share: names that no other run uses, and their removal.
#pragma once

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>
#include <string_view>
#include <vector>

#include "sharr/store.hpp"

namespace sharr::test {

inline std::string unique() {
  static std::atomic<int> count = 0;
  return "sharr-lib-test-" + std::to_string(getpid()) + "-" + std::to_string(count++);
}

// A name directly in /dev/shm, whatever is under it removed at the end.
class Flat {
 public:
  Flat() = default;
  Flat(const Flat&) = delete;
  Flat& operator=(const Flat&) = delete;
  ~Flat() {
    std::error_code ignored;
    std::filesystem::remove_all(path(), ignored);
  }
  std::string uri() const { return "shm://" + leaf_; }
  std::string path() const { return "/dev/shm/" + leaf_; }

 private:
  std::string leaf_ = unique();
};

// A namespace of /dev/shm that exists, removed with all it holds at the end.
class Namespace {
 public:
  Namespace() { std::filesystem::create_directory(path()); }
  Namespace(const Namespace&) = delete;
  Namespace& operator=(const Namespace&) = delete;
  ~Namespace() {
    std::error_code ignored;
    std::filesystem::remove_all(path(), ignored);
  }
  std::string uri(std::string_view leaf) const {
    return "shm://" + leaf_ + "/" + std::string(leaf);
  }
  std::string path(std::string_view leaf = "") const {
    return "/dev/shm/" + leaf_ + (leaf.empty() ? "" : "/") + std::string(leaf);
  }
  Name directory() const { return Name::directory("shm://" + leaf_); }
  // The names directly in it.
  std::vector<std::string> files() const {
    std::vector<std::string> names;
    for (const auto& entry : std::filesystem::directory_iterator(path())) {
      names.push_back(entry.path().filename());
    }
    return names;
  }

 private:
  std::string leaf_ = unique();
};

inline void write_file(const std::string& path, std::string_view bytes) {
  std::ofstream(path, std::ios::binary)
      .write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
}

inline std::string read_file(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), {}};
}

// The bytes of an NPY file's header, unpadded, with the length that text has.
inline std::string npy_header(int major, std::string_view text) {
  std::string head = "\x93NUMPY";
  head += static_cast<char>(major);
  head += '\0';
  for (int i = 0; i < (major == 1 ? 2 : 4); ++i) {
    head += static_cast<char>((text.size() >> (8 * i)) & 0xFF);
  }
  return head.append(text);
}

// What an Error carries, for one comparison.
struct Caught {
  int errnum = 0;
  std::string name;
  std::string message;
};

// Runs call; the Error that it throws, errnum 0 when it throws none.
template <class Call>
Caught caught(Call&& call) {
  try {
    call();
  } catch (const Error& error) {
    return {error.errnum(), error.name(), error.message()};
  }
  return {};
}

}  // namespace sharr::test
