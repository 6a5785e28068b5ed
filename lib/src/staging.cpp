#include "staging.hpp"

#include <dirent.h>
#include <linux/magic.h>
#include <sys/file.h>
#include <sys/random.h>
#include <sys/statfs.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <exception>
#include <fstream>
#include <memory>
#include <vector>

#include "format.hpp"
#include "memory.hpp"

namespace sharr::detail {
namespace {

constexpr std::uint64_t large = std::uint64_t{64} << 20;

// What the machine could give to a tmpfs without killing a process for it.
std::uint64_t available_memory() {
  std::uint64_t kib = 0;
  std::ifstream meminfo("/proc/meminfo");
  std::string key;
  std::uint64_t value = 0;
  std::string unit;
  bool known = false;
  while (meminfo >> key >> value) {
    std::getline(meminfo, unit);
    if (key == "MemAvailable:") known = true;
    if (key == "MemAvailable:" || key == "SwapFree:") kib += value;
  }
  return known ? kib * 1024 : UINT64_MAX;
}

// What this user can take of a file system. UINT64_MAX where nobody can tell.
std::uint64_t free_bytes(const struct statfs& fs) {
  std::uint64_t bytes = UINT64_MAX;
  if (fs.f_blocks > 0) {  // a tmpfs may have no limit
    bytes = static_cast<std::uint64_t>(geteuid() == 0 ? fs.f_bfree : fs.f_bavail) *
            static_cast<std::uint64_t>(fs.f_bsize);
  }
  // It may promise more than the machine has; taking that would end in the kernel killing somebody.
  return fs.f_type == TMPFS_MAGIC ? std::min(bytes, available_memory()) : bytes;
}

// Sweeps a whole directory.
void sweep_all(int at, const std::string& directory) {
  FileDescriptor fd(openat(at, directory.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (!fd) return;  // a directory that may be written but not read
  const std::unique_ptr<DIR, int (*)(DIR*)> stream(fdopendir(fd.get()), closedir);
  if (!stream) return;
  fd.release();
  while (const dirent* item = readdir(stream.get())) {
    if (reserved(item->d_name)) sweep(dirfd(stream.get()), item->d_name);
  }
}

}  // namespace

std::string temporary_name() {
  std::uint64_t random = 0;
  if (getrandom(&random, sizeof(random), 0) != sizeof(random)) {
    throw Error(errno, "getrandom");
  }
  return formatted("{}{:016x}", temporary_prefix, random);
}

void sweep(int dirfd, const char* name) noexcept {
  const FileDescriptor file(
      openat(dirfd, name, O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK | O_NOCTTY));
  struct stat st;
  if (!file || fstat(file.get(), &st) != 0) return;
  if (!S_ISREG(st.st_mode) && !S_ISDIR(st.st_mode)) return;
  if (S_ISDIR(st.st_mode)) {
    // Who may give it that name could have others remove what he may not.
    struct stat parent;
    if (fstat(dirfd, &parent) != 0) return;
    const bool own = parent.st_uid == st.st_uid || parent.st_uid == 0;
    const bool kept =
        (parent.st_mode & S_ISVTX) != 0 || (parent.st_mode & (S_IWGRP | S_IWOTH)) == 0;
    if (!own || !kept) return;
  }
  if (flock(file.get(), LOCK_EX | LOCK_NB) != 0) return;
  if (S_ISREG(st.st_mode)) {
    unlinkat(dirfd, name, 0);
    return;
  }
  try {
    remove_arrays(dirfd, name);
  } catch (const std::exception&) {  // it may be somebody else's
    return;
  }
}

Staging::Staging(const Name& name, Place place, mode_t mode, std::uint64_t size)
    : name_(name), size_(size), place_(std::move(place)) {
  open(mode, mode);
  if (!file_) throw_failed(errno);
}

void Staging::open(mode_t mode, mode_t temporary_mode) {
  file_ = FileDescriptor(
      openat(place_.at(), place_.directory.c_str(), O_TMPFILE | O_RDWR | O_CLOEXEC, mode));
  // EISDIR: a kernel or file system that does not know the flag sees a directory to be written.
  if (!file_ && (errno == EOPNOTSUPP || errno == EISDIR || errno == ENOSYS || errno == EINVAL)) {
    open_temporary(temporary_mode);
  }
}

Staging::Staging(const Name& name, std::uint64_t size, bool replace, mode_t temporary_mode)
    : name_(name), size_(size) {
  try {
    place_ = place_of(name);
  } catch (const Error& error) {
    if (error.errnum() != ENOENT || !name.shm()) throw;
    namespace_missing_ = true;
    place_ = place_in_shm();
  }
  if (size >= large && !replace && !namespace_missing_ &&
      faccessat(place_.at(), place_.file.c_str(), F_OK, AT_SYMLINK_NOFOLLOW) == 0) {
    throw Error(EEXIST, name.given());
  }
  open(creation_mode, temporary_mode);
  if (!file_ && errno == ENOENT && name.shm() && !namespace_missing_) {
    // Somebody has removed the empty namespace since.
    namespace_missing_ = true;
    place_ = place_in_shm();
    open(creation_mode, temporary_mode);
  }
  if (!file_) throw_failed(errno);
}

Staging::~Staging() {
  if (!temporary_.empty() && maker_ == getpid()) unlinkat(place_.at(), temporary_.c_str(), 0);
}

void Staging::open_temporary(mode_t mode) {
  sweep_all(place_.at(), place_.directory);
  while (true) {
    std::string path = place_.directory + "/" + temporary_name();
    FileDescriptor fd(openat(place_.at(), path.c_str(),
                             O_RDWR | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, mode));
    if (!fd) {
      if (errno == EEXIST) continue;
      return;
    }
    // The lock says that the maker lives. Another maker's sweep may come before it: then the file
    // is gone or about to go.
    const bool swept = flock(fd.get(), LOCK_EX | LOCK_NB) != 0 && errno == EWOULDBLOCK;
    struct stat st;
    if (fstat(fd.get(), &st) != 0) throw_errno(name_);
    if (swept || st.st_nlink == 0) {
      unlinkat(place_.at(), path.c_str(), 0);  // who sweeps may not be allowed to
      continue;
    }
    file_ = std::move(fd);
    temporary_ = std::move(path);
    maker_ = getpid();
    return;
  }
}

void Staging::throw_no_inode() const {
  throw Error(ENOSPC, name_.given(),
              formatted("no inode left for one more file in {}; delete some{}",
                        name_.shm() ? shm_directory : place_.directory,
                        name_.shm() ? ", or as root allow more: mount -o "
                                      "remount,nr_inodes=NUMBER /dev/shm"
                                    : ""));
}

void Staging::throw_failed(int errnum) const {
  struct statfs fs {};
  const int failed =
      place_.opened ? fstatfs(place_.opened.get(), &fs) : statfs(place_.directory.c_str(), &fs);
  if (errnum == ENOSPC && failed == 0 && fs.f_files > 0 && fs.f_ffree == 0) throw_no_inode();
  throw Error(errnum, name_.given());
}

void Staging::throw_no_space(int errnum) const {
  // What was taken so far is free again.
  [[maybe_unused]] const int given_back = ftruncate(file_.get(), static_cast<off_t>(kept_));
  struct statfs fs {};
  std::string free = "less is";
  if (fstatfs(file_.get(), &fs) == 0) free = human_size(free_bytes(fs));
  throw Error(errnum, name_.given(),
              formatted("no space left: {} needed, {} free in {}; {}", human_size(size_), free,
                        name_.shm() ? shm_directory : place_.directory,
                        name_.shm() ? "delete arrays, or as root enlarge it: mount -o "
                                      "remount,size=SIZE /dev/shm"
                                    : "free some there"));
}

void Staging::check_space(std::uint64_t size) {
  struct stat st;
  struct statfs fs {};
  if (fstat(file_.get(), &st) != 0 || fstatfs(file_.get(), &fs) != 0) throw_errno(name_);
  kept_ = static_cast<std::uint64_t>(st.st_size);
  const std::uint64_t taken = static_cast<std::uint64_t>(st.st_blocks) * 512;
  if (size - std::min(size, taken) <= free_bytes(fs)) return;
  size_ = std::max(size_, size);
  throw_no_space(ENOSPC);
}

void Staging::allocate(std::uint64_t reserved, const std::function<void()>& on_signal,
                       std::uint64_t from) {
  size_ = std::max(size_, reserved);
  if (reserved >= large) check_space(reserved);
  // In pieces: an older tmpfs undoes a piece that a signal interrupts, so that a program with a
  // timer would never get a large one, and a newer one hears no signal before a piece is done.
  // Interrupted pieces shrink until they fit between two signals.
  std::uint64_t piece = large;
  for (std::uint64_t done = from; done < reserved;) {
    const std::uint64_t length = std::min(piece, reserved - done);
    bool signalled = false;
    if (fallocate(file_.get(), 0, static_cast<off_t>(done), static_cast<off_t>(length)) == 0) {
      done += length;
    } else if (errno == EINTR) {
      signalled = true;
      piece = std::max(length / 4, std::uint64_t{64} << 10);
    } else if (errno == EOPNOTSUPP || errno == ENOSYS) {
      write_holes(done, done + length);
      done += length;
    } else if (errno == ENOSPC || errno == EDQUOT) {
      throw_no_space(errno);
    } else {
      throw_errno(name_);
    }
    if (on_signal && (signalled || reserved >= large)) on_signal();
  }
  if (reserved < size_ && ftruncate(file_.get(), static_cast<off_t>(size_)) != 0) {
    throw_errno(name_);
  }
}

void Staging::resize(std::uint64_t size, bool holes) {
  struct stat st;
  if (fstat(file_.get(), &st) != 0) throw_errno(name_);
  kept_ = static_cast<std::uint64_t>(st.st_size);
  size_ = size;
  const std::uint64_t from = holes ? 0 : kept_;
  if (size > from) {
    allocate(size, {}, from);
  } else if (ftruncate(file_.get(), static_cast<off_t>(size)) != 0) {
    throw_errno(name_);
  }
}

void Staging::extend(std::uint64_t size) {
  if (ftruncate(file_.get(), static_cast<off_t>(size)) != 0) throw_errno(name_);
}

void Staging::trim(const struct stat& st, std::uint64_t size) const noexcept {
  constexpr std::uint64_t page = 4096;
  const std::uint64_t needed = (size + page - 1) / page * page;
  const auto taken = static_cast<std::uint64_t>(st.st_blocks) * 512;
  if (taken <= needed) return;
  fallocate(file_.get(), FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, static_cast<off_t>(needed),
            static_cast<off_t>(std::max(huge_page_size(), taken - needed)));
}

void Staging::inherit_group(int directory) const {
  struct stat st;
  if (fstat(directory, &st) != 0 || (st.st_mode & S_ISGID) == 0) return;
  // Who is not in the group may not give it.
  if (fchown(file_.get(), static_cast<uid_t>(-1), st.st_gid) != 0 && errno != EPERM) {
    throw_errno(name_);
  }
}

bool Staging::in_memory() const noexcept {
  struct statfs fs {};
  return fstatfs(file_.get(), &fs) == 0 && fs.f_type == TMPFS_MAGIC;
}

int Staging::try_write(const void* data, std::uint64_t length,
                       std::uint64_t offset) const noexcept {
  const auto* at = static_cast<const char*>(data);
  while (length > 0) {
    const ssize_t n = pwrite(file_.get(), at, length, static_cast<off_t>(offset));
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return errno;
    at += n;
    offset += static_cast<std::uint64_t>(n);
    length -= static_cast<std::uint64_t>(n);
  }
  return 0;
}

int Staging::try_write(std::string_view header, const void* data,
                       std::uint64_t length) const noexcept {
  // Neither is written to.
  const std::array<iovec, 2> both = {iovec{const_cast<char*>(header.data()), header.size()},
                                     iovec{const_cast<void*>(data), length}};
  const ssize_t n = pwritev(file_.get(), both.data(), both.size(), 0);
  // What is missing, if only to hear why.
  const auto done = static_cast<std::uint64_t>(std::max<ssize_t>(n, 0));
  const std::uint64_t first = std::min<std::uint64_t>(done, header.size());
  const std::uint64_t second = done - first;
  const int error = try_write(header.data() + first, header.size() - first, first);
  if (error != 0) return error;
  return try_write(static_cast<const char*>(data) + second, length - second,
                   header.size() + second);
}

void Staging::write(const void* data, std::uint64_t length, std::uint64_t offset) const {
  const int error = try_write(data, length, offset);
  if (error == ENOSPC || error == EDQUOT) throw_no_space(error);
  if (error != 0) throw Error(error, name_.given());
}

void Staging::write_holes(std::uint64_t from, std::uint64_t to) const {
  constexpr std::uint64_t piece = std::uint64_t{1} << 20;
  for (; from < to; from += piece) {
    std::vector<char> there(std::min(piece, to - from));  // zeros where there is nothing
    for (std::uint64_t done = 0; done < there.size();) {
      const ssize_t n = pread(file_.get(), there.data() + done, there.size() - done,
                              static_cast<off_t>(from + done));
      if (n == 0) break;
      if (n < 0 && errno != EINTR) throw_errno(name_);
      if (n > 0) done += static_cast<std::uint64_t>(n);
    }
    write(there.data(), there.size(), from);
  }
}

void Staging::publish(bool replace) {
  // Somebody may remove an empty namespace before the array is in it, even in a tight loop that
  // wins nearly always: give up after a second or so.
  constexpr int many = 100'000;
  for (int tries = 0;; ++tries) {
    Place place;
    if (namespace_missing_) {
      try {
        place = place_of(name_, true);
      } catch (const Error& error) {
        if (error.errnum() == ENOENT && tries < many) continue;
        if (error.errnum() == ENOSPC) throw_no_inode();  // a directory takes nothing else
        throw;
      }
      inherit_group(place.at());
    }
    if (give(namespace_missing_ ? place : place_, replace)) return;
    const int errnum = errno;
    unmake(place.made);
    // What was linked once and has been removed with its namespace cannot be linked again.
    struct stat st;
    const bool lost = linked_ && (fstat(file_.get(), &st) != 0 || st.st_nlink == 0);
    if (errnum != ENOENT || !name_.shm() || lost || tries == many) throw_failed(errnum);
    namespace_missing_ = true;
  }
}

void Staging::publish(const Place& place, bool replace) {
  if (!give(place, replace)) throw_failed(errno);
}

bool Staging::give(const Place& place, bool replace) {
  return replace ? replace_name(place) : give_name(place);
}

bool Staging::replace_name(const Place& place) {
  const int at = place.at();
  const char* const file = place.file.c_str();
  if (!temporary_.empty()) {
    if (renameat(place_.at(), temporary_.c_str(), at, file) != 0) return false;
    temporary_.clear();
    return true;
  }
  if (link(at, file)) return true;
  if (errno != EEXIST) return false;
  // Only a rename replaces, and it takes a name. The lock tells sweep() that its maker lives; where
  // it cannot be had, somebody else's does.
  const bool locked = flock(file_.get(), LOCK_SH | LOCK_NB) == 0;
  std::string temporary;
  bool linked = false;
  do {
    temporary = place.directory + "/" + temporary_name();
    linked = link(at, temporary.c_str());
  } while (!linked && errno == EEXIST);
  linked_ = linked;
  const bool renamed = linked && renameat(at, temporary.c_str(), at, file) == 0;
  const int errnum = errno;
  if (linked && !renamed) unlinkat(at, temporary.c_str(), 0);
  if (locked) flock(file_.get(), LOCK_UN);
  errno = errnum;
  return renamed;
}

bool Staging::link(int at, const char* file) const {
  if (linkat(file_.get(), "", at, file, AT_EMPTY_PATH) == 0) return true;
  // Before Linux 6.10 that takes a capability, and its lack is ENOENT.
  if (errno != ENOENT) return false;
  const std::string self = formatted("/proc/self/fd/{}", file_.get());
  return linkat(AT_FDCWD, self.c_str(), at, file, AT_SYMLINK_FOLLOW) == 0;
}

bool Staging::give_name(const Place& place) {
  const int at = place.at();
  const char* const file = place.file.c_str();
  if (!temporary_.empty()) {
    if (renameat2(place_.at(), temporary_.c_str(), at, file, RENAME_NOREPLACE) == 0) {
      temporary_.clear();
      return true;
    }
    if (errno != EINVAL && errno != ENOSYS) return false;
    // The destructor removes the other name.
    return linkat(place_.at(), temporary_.c_str(), at, file, 0) == 0;
  }
  return link(at, file);
}

}  // namespace sharr::detail
