// What the kernel and the memory take by themselves: the floor under each row of the benchmark; and
// what the library takes on top, without Python.
//
//   floor ROW FILE
//
// For each number on stdin does the row's work that many times, and prints the seconds each took.
// FILE: on the file system that is measured.
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <iostream>
#include <map>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "sharr/store.hpp"

namespace {

constexpr std::size_t gib = std::size_t{1} << 30;
constexpr std::size_t page = 4096;
constexpr std::size_t small = page + 1024;  // the file of an array of 1 KiB

template <class T>
T check(T result, const char* what) {
  if (result != static_cast<T>(-1)) return result;
  std::perror(what);
  std::exit(1);
}

char* map(int fd, std::size_t size, int flags = MAP_SHARED) {
  void* const base = mmap(nullptr, size, PROT_READ | PROT_WRITE, flags, fd, 0);
  if (base == MAP_FAILED) check(-1, "mmap");
  return static_cast<char*>(base);
}

char* populated_memory() {
  char* const base = map(-1, gib, MAP_PRIVATE | MAP_ANONYMOUS);
  madvise(base, gib, MADV_HUGEPAGE);
  std::memset(base, 1, gib);
  return base;
}

// first: what this process has not read before.
void attach(const std::string& path, bool first) {
  struct statx st;
  char head[page];
  const int fd = check(open(path.c_str(), O_RDWR | O_CLOEXEC), "open");
  check(statx(fd, "", AT_EMPTY_PATH, STATX_ALL, &st), "statx");
  if (first) check(pread(fd, head, sizeof(head), 0), "pread");
  char* const base = map(fd, small);
  close(fd);
  munmap(base, small);
}

// Seconds each, of files that are opened for the first time by a process that has just begun.
double attach_first(const std::string& path) {
  constexpr int many = 300;
  std::vector<std::string> paths;
  for (int i = 0; i < many; ++i) {
    const std::vector<char> content(small);
    paths.push_back(path + std::to_string(i));
    const int fd = check(open(paths.back().c_str(), O_CREAT | O_RDWR | O_CLOEXEC, 0666), "open");
    check(pwrite(fd, content.data(), small, 0), "pwrite");
    close(fd);
  }
  int ends[2];
  check(pipe(ends), "pipe");
  const pid_t child = check(fork(), "fork");
  if (child == 0) {
    const auto start = std::chrono::steady_clock::now();
    for (const std::string& file : paths) attach(file, true);
    const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - start;
    const double each = taken.count() / many;
    check(write(ends[1], &each, sizeof(each)), "write");
    _exit(0);
  }
  double each = 0;
  close(ends[1]);
  if (read(ends[0], &each, sizeof(each)) != sizeof(each)) std::exit(1);
  close(ends[0]);
  waitpid(child, nullptr, 0);
  return each;
}

// held: while it is removed, so that nobody has to read what it is.
void create_and_delete(const std::string& path, bool held) {
  const std::string directory = path.substr(0, path.rfind('/') + 1);
  struct statx st;
  char file[small] = {};
  const int fd = check(open(directory.c_str(), O_TMPFILE | O_RDWR | O_CLOEXEC, 0666), "O_TMPFILE");
  check(pwrite(fd, file, sizeof(file), 0), "pwrite");
  check(statx(fd, "", AT_EMPTY_PATH, STATX_ALL, &st), "statx");  // which knows the time of birth
  char* const base = map(fd, small);
  if (linkat(fd, "", AT_FDCWD, path.c_str(), AT_EMPTY_PATH) != 0) {
    const std::string self = "/proc/self/fd/" + std::to_string(fd);
    check(linkat(AT_FDCWD, self.c_str(), AT_FDCWD, path.c_str(), AT_SYMLINK_FOLLOW), "linkat");
  }
  close(fd);
  if (held) {
    check(statx(AT_FDCWD, path.c_str(), AT_SYMLINK_NOFOLLOW, STATX_ALL, &st), "statx");
    check(unlink(path.c_str()), "unlink");
    munmap(base, small);
    return;
  }
  munmap(base, small);
  const int again = check(open(path.c_str(), O_RDONLY | O_CLOEXEC), "open");
  check(statx(again, "", AT_EMPTY_PATH, STATX_ALL, &st), "statx");
  check(pread(again, file, page, 0), "pread");
  close(again);
  check(unlink(path.c_str()), "unlink");
}

void library_attach(const std::string& path) { sharr::attach(path); }

void library_create_and_delete(const std::string& path) {
  const sharr::Array array = sharr::create(path, {128}, sharr::Dtype::of<double>());
  sharr::remove(path);
}

void look(const std::string& path) {
  struct stat st;
  check(stat(path.c_str(), &st), "stat");
}

// 4 KiB at random places of a file of 256 MiB.
void read_pages(const std::string& path) {
  static const int fd = check(open(path.c_str(), O_RDONLY | O_CLOEXEC), "open");
  static std::minstd_rand random(1);
  char buffer[page];
  const auto at = static_cast<off_t>(random() % (gib / 4 / page) * page);
  check(pread(fd, buffer, sizeof(buffer), at), "pread");
}

void touch(const std::string& path) {
  const int fd = check(open(path.c_str(), O_RDWR | O_CLOEXEC), "open");
  char* const base = map(fd, page + gib);
  close(fd);
  for (std::size_t at = page; at < page + gib; at += page) base[at] = 1;
  munmap(base, page + gib);
}

unsigned processors() { return std::max(1U, std::thread::hardware_concurrency()); }

// work(from, size) of equal parts of 1 GiB.
template <class F>
void in_parts(unsigned threads, F work) {
  std::vector<std::jthread> others;
  const std::size_t each = gib / threads;
  for (unsigned i = 1; i < threads; ++i) others.emplace_back([=] { work(each * i, each); });
  work(0, each);
}

void copy(char* to, const char* from, unsigned threads) {
  in_parts(threads,
           [=](std::size_t at, std::size_t size) { std::memcpy(to + at, from + at, size); });
}

std::function<void()> give_back = [] {};  // what the last row has left, which is no part of it

// The memory of a new file, with nothing in it: huge pages through a mapping, small ones without,
// as each is had quickest.
void take(const std::string& path, bool huge) {
  const std::string directory = path.substr(0, path.rfind('/') + 1);
  const int fd = check(open(directory.c_str(), O_TMPFILE | O_RDWR | O_CLOEXEC, 0666), "O_TMPFILE");
  give_back = [=] { close(fd); };
  if (!huge) {
    check(fallocate(fd, 0, 0, gib), "fallocate");
    return;
  }
  check(ftruncate(fd, gib), "ftruncate");
  char* const base = map(fd, gib);
  check(madvise(base, gib, MADV_HUGEPAGE), "MADV_HUGEPAGE");
  in_parts(processors(), [=](std::size_t at, std::size_t size) {
    check(madvise(base + at, size, MADV_POPULATE_WRITE), "MADV_POPULATE_WRITE");
  });
  give_back = [=] {
    munmap(base, gib);
    close(fd);
  };
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  const std::string path = argv[2];
  char* from = nullptr;
  char* to = nullptr;
  const std::map<std::string, std::function<void()>> rows = {
      {"attach", [&] { attach(path, false); }},
      {"create", [&] { create_and_delete(path, true); }},
      {"create-let-go", [&] { create_and_delete(path, false); }},
      {"library-attach", [&] { library_attach(path); }},
      {"library-create", [&] { library_create_and_delete("shm://library"); }},
      {"stat", [&] { look(path); }},
      {"read-4k", [&] { read_pages(path); }},
      {"touch", [&] { touch(path); }},
      {"memcpy", [&] { copy(to, from, 1); }},
      {"memcpy-threads", [&] { copy(to, from, processors()); }},
      {"take-huge", [&] { take(path, true); }},
      {"take-small", [&] { take(path, false); }},
  };
  if (std::string(argv[1]) == "attach-first") {
    for (int count; std::cin >> count;) {
      std::printf("%.9f\n", attach_first(path));
      std::fflush(stdout);
    }
    return 0;
  }
  const auto& work = rows.at(argv[1]);
  if (std::string(argv[1]) == "library-attach") {
    sharr::create(path, {128}, sharr::Dtype::of<double>(), {.exist_ok = true});
  }
  if (std::string(argv[1]).starts_with("memcpy"))
    from = populated_memory(), to = populated_memory();
  for (int count; std::cin >> count;) {
    const auto start = std::chrono::steady_clock::now();
    for (int i = 0; i < count; ++i) work();
    const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - start;
    give_back();
    give_back = [] {};
    std::printf("%.9f\n", taken.count() / count);
    std::fflush(stdout);
  }
}
