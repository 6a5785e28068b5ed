#include "system.hpp"

#include <linux/limits.h>
#include <linux/openat2.h>
#include <pthread.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <fstream>

#include "format.hpp"

namespace sharr {
namespace {

// glibc has no wrapper.
int openat2(int dirfd, const char* path, int flags, unsigned mode, std::uint64_t resolve) noexcept {
  open_how how{};
  how.flags = static_cast<std::uint64_t>(flags);
  how.mode = mode;
  how.resolve = resolve;
  return static_cast<int>(syscall(SYS_openat2, dirfd, path, &how, sizeof(how)));
}

constexpr int object_flags = O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK | O_NOCTTY;

// Where a name under shm:// has directories: NO_SYMLINKS holds for each of them.
bool nested(const Name& name) { return name.path().rfind('/') > detail::shm_directory.size(); }

}  // namespace

FileDescriptor::~FileDescriptor() {
  if (fd_ >= 0) ::close(fd_);
}

FileDescriptor open_beneath(int dirfd, const std::string& path, int flags) {
  // What is moved away just then is EXDEV like what is mounted there, but not for long.
  const auto open = [](int at, const char* below, int how) {
    constexpr std::uint64_t resolve = RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS | RESOLVE_NO_XDEV;
    constexpr int most_tries = 20;
    for (int tries = 1;; ++tries) {
      FileDescriptor fd(openat2(at, below, how, 0, resolve));
      if (fd || errno != EXDEV || tries == most_tries) return fd;
    }
  };
  // A tree may be deeper than one path can say.
  FileDescriptor at;
  std::size_t from = 0;
  while (path.size() - from >= PATH_MAX) {
    const std::size_t slash = path.rfind('/', from + PATH_MAX - 2);
    if (slash == std::string::npos || slash <= from) {
      errno = ENAMETOOLONG;
      return {};
    }
    at = open(at ? at.get() : dirfd, path.substr(from, slash - from).c_str(),
              O_PATH | O_DIRECTORY | O_CLOEXEC);
    if (!at) return {};
    from = slash + 1;
  }
  // openat2 refuses flags that O_PATH gives no meaning.
  const int more = (flags & O_PATH) != 0 ? O_CLOEXEC | O_NOFOLLOW : object_flags;
  return open(at ? at.get() : dirfd, path.c_str() + from, flags | more);
}

namespace detail {

void throw_errno(const Name& name) { throw Error(errno, name.given()); }

namespace {

[[noreturn]] void throw_open_error(const Name& name) {
  if (errno == ELOOP && name.shm()) {
    throw Error(ELOOP, name.given(), "a symbolic link, which is not followed under shm://");
  }
  if (errno == ENXIO) throw FormatError(name.given(), "not an array: not a regular file");
  throw_errno(name);
}

}  // namespace

FileDescriptor open_file(const Name& name, int flags) {
  FileDescriptor fd;
  if (!name.shm()) {
    // A path is the caller's own business: it is resolved as for any other program.
    fd = FileDescriptor(::open(name.path().c_str(), flags | (object_flags & ~O_NOFOLLOW)));
  } else if (nested(name)) {
    fd = FileDescriptor(
        openat2(AT_FDCWD, name.path().c_str(), flags | object_flags, 0, RESOLVE_NO_SYMLINKS));
  } else {
    fd = FileDescriptor(::open(name.path().c_str(), flags | object_flags));
  }
  if (!fd) throw_open_error(name);
  return fd;
}

Stat stat_at(int dirfd, const std::string& path, int flags, std::string_view name) {
  struct statx stx;
  if (statx(dirfd, path.c_str(), flags, STATX_BASIC_STATS | STATX_BTIME, &stx) != 0) {
    throw Error(errno, name);
  }
  Stat result{};
  result.st.st_dev = makedev(stx.stx_dev_major, stx.stx_dev_minor);
  result.st.st_ino = stx.stx_ino;
  result.st.st_mode = stx.stx_mode;
  result.st.st_size = static_cast<off_t>(stx.stx_size);
  result.st.st_blocks = static_cast<blkcnt_t>(stx.stx_blocks);
  result.st.st_blksize = static_cast<blksize_t>(stx.stx_blksize);
  result.st.st_ctim = {.tv_sec = stx.stx_ctime.tv_sec, .tv_nsec = stx.stx_ctime.tv_nsec};
  result.identity = {.device = result.st.st_dev, .inode = stx.stx_ino, .birth = 0};
  if ((stx.stx_mask & STATX_BTIME) != 0) {
    result.identity.birth = stx.stx_btime.tv_sec * 1'000'000'000 + stx.stx_btime.tv_nsec;
  }
  return result;
}

Stat stat_file(int fd, std::string_view name, int flags) {
  const Stat result = stat_at(fd, "", flags | AT_EMPTY_PATH, name);
  if (S_ISDIR(result.st.st_mode)) throw Error(EISDIR, name);
  if (!S_ISREG(result.st.st_mode)) throw FormatError(name, "not an array: not a regular file");
  return result;
}

FileDescriptor make_directories(FileDescriptor directory, const std::string& path,
                                std::vector<Place::Made>& made) {
  for (std::size_t from = 0; directory && from < path.size();) {
    const std::size_t end = std::min(path.find('/', from), path.size());
    const std::string component = path.substr(from, end - from);
    // Another process may make the same namespace, or put something else there: opening tells.
    const bool mine = mkdirat(directory.get(), component.c_str(), 0777) == 0;
    FileDescriptor below;
    if (mine || errno == EEXIST) {
      below = FileDescriptor(openat(directory.get(), component.c_str(),
                                    O_PATH | O_DIRECTORY | O_CLOEXEC | O_NOFOLLOW));
    }
    const int errnum = errno;
    if (mine) made.push_back({.parent = std::move(directory), .name = component});
    directory = std::move(below);
    errno = errnum;
    from = end + 1;
  }
  return directory;
}

Place place_in_shm() {
  return {.opened = {}, .directory = std::string(shm_directory), .file = {}, .made = {}};
}

Place place_of(const Name& name, bool make_namespace) {
  const std::string& path = name.path();
  const std::size_t slash = path.rfind('/');
  const std::string_view leaf = std::string_view(path).substr(slash + 1);
  if (leaf.empty() || leaf == "." || leaf == "..") throw Error(EISDIR, name.given());
  if (!name.shm() || !nested(name)) {
    if (slash == std::string::npos) {
      return {.opened = {}, .directory = ".", .file = path, .made = {}};
    }
    return {.opened = {}, .directory = path.substr(0, slash + 1), .file = path, .made = {}};
  }

  // RESOLVE_NO_SYMLINKS says ELOOP of a link that comes last, where O_NOFOLLOW says ENOTDIR.
  constexpr int flags = O_PATH | O_DIRECTORY | O_CLOEXEC;
  FileDescriptor directory(
      openat2(AT_FDCWD, path.substr(0, slash).c_str(), flags, 0, RESOLVE_NO_SYMLINKS));
  std::vector<Place::Made> made;
  if (!directory && errno == ENOENT && make_namespace) {
    const std::size_t from = shm_directory.size() + 1;
    directory = make_directories(
        FileDescriptor(::open(shm_directory.data(), O_PATH | O_DIRECTORY | O_CLOEXEC)),
        path.substr(from, slash - from), made);
    if (!directory) {
      const int errnum = errno;
      unmake(made);
      throw Error(errnum, name.given());
    }
  }
  if (!directory) throw_open_error(name);
  return {.opened = std::move(directory),
          .directory = ".",
          .file = std::string(leaf),
          .made = std::move(made)};
}

void unmake(std::vector<Place::Made>& made) noexcept {
  for (; !made.empty(); made.pop_back()) {
    unlinkat(made.back().parent.get(), made.back().name.c_str(), AT_REMOVEDIR);
  }
}

std::string mount_of(dev_t device) {
  const std::string wanted = formatted(" {}:{} ", major(device), minor(device));
  std::ifstream mounts("/proc/self/mountinfo");
  if (!mounts && exhausted(errno)) throw Error(errno, "/proc/self/mountinfo");
  for (std::string line; std::getline(mounts, line);) {
    const std::size_t type = line.find(" - ");
    if (type != std::string::npos && line.find(wanted) < type) return line.substr(type + 3);
  }
  return {};
}

std::mutex& memory_mutex() {
  static std::mutex& mutex = *[] {
    auto* const made = new std::mutex;  // outlives whatever arrays are left when the process ends
    pthread_atfork([] { memory_mutex().lock(); }, [] { memory_mutex().unlock(); },
                   [] { memory_mutex().unlock(); });
    return made;
  }();
  return mutex;
}

namespace {
[[maybe_unused]] const std::mutex& first = memory_mutex();
}  // namespace

bool settled(const timespec& changed, const timespec& now) noexcept {
  const std::int64_t age =
      (now.tv_sec - changed.tv_sec) * 1'000'000'000 + (now.tv_nsec - changed.tv_nsec);
  return age >= (changed.tv_nsec == 0 ? 3'000'000'000 : 20'000'000);
}

bool exhausted(int errnum) noexcept {
  return errnum == EMFILE || errnum == ENFILE || errnum == ENOMEM;
}

std::string human_size(std::uint64_t bytes) {
  static constexpr std::array units = {"KiB", "MiB", "GiB", "TiB", "PiB", "EiB"};
  if (bytes < 1024) return formatted("{} bytes", bytes);
  double value = static_cast<double>(bytes) / 1024;
  std::size_t unit = 0;
  while (value >= 1024 && unit + 1 < units.size()) value /= 1024, ++unit;
  return formatted("{:.1f} {}", value, units[unit]);
}

}  // namespace detail

FileDescriptor open_directory(const Name& name) {
  const bool root = name.path() == detail::shm_directory;
  FileDescriptor fd(openat2(AT_FDCWD, name.path().c_str(), O_PATH | O_DIRECTORY | O_CLOEXEC, 0,
                            name.shm() && !root ? RESOLVE_NO_SYMLINKS : 0));
  if (!fd) detail::throw_open_error(name);
  return fd;
}

}  // namespace sharr
