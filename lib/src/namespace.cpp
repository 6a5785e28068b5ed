// Arrays that come and go together: a namespace is a directory, put in its place by a rename.
#include <dirent.h>
#include <linux/limits.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <chrono>
#include <exception>
#include <memory>
#include <string>
#include <thread>
#include <utility>

#include "access.hpp"
#include "format.hpp"
#include "system.hpp"

namespace sharr {
namespace {

using detail::Place;

// Whether a directory has anything in it.
bool empty(int at, const std::string& directory) {
  const int fd = openat(at, directory.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC | O_NOFOLLOW);
  if (fd < 0) return false;
  const std::unique_ptr<DIR, int (*)(DIR*)> stream(fdopendir(fd), closedir);
  if (!stream) {
    close(fd);
    return false;
  }
  while (const dirent* item = readdir(stream.get())) {
    const std::string_view name = item->d_name;
    if (name != "." && name != "..") return false;
  }
  return true;
}

// A directory of a reserved name, locked to tell that its maker lives.
struct Temporary {
  std::string name;
  FileDescriptor fd;
};

Temporary make_temporary(const Place& place, const Name& name) {
  while (true) {
    Temporary made{.name = place.directory + "/" + detail::temporary_name(), .fd = {}};
    if (mkdirat(place.at(), made.name.c_str(), detail::namespace_mode) != 0) {
      if (errno == EEXIST) continue;
      detail::throw_errno(name);
    }
    made.fd = FileDescriptor(
        openat(place.at(), made.name.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC | O_NOFOLLOW));
    int errnum = made.fd ? 0 : errno;
    // A sweep may have come before the lock, which not every file system has.
    if (made.fd && (flock(made.fd.get(), LOCK_EX | LOCK_NB) == 0 || errno != EWOULDBLOCK)) {
      struct stat st;
      if (fstat(made.fd.get(), &st) != 0) {
        errnum = errno;
      } else if (st.st_nlink > 0) {
        return made;
      }
    }
    // Who sweeps may not be allowed to remove it.
    unlinkat(place.at(), made.name.c_str(), AT_REMOVEDIR);
    if (errnum != 0 && errnum != ENOENT) throw Error(errnum, name.given());
  }
}

// Calls other(path, errnum) for whatever in a directory or below is no array that can be read and
// no namespace; errnum is EACCES when it cannot be read, or ENOTEMPTY. Calls entered(path, fd) for
// each directory, which is "." first.
template <class Other, class Entered>
void survey(int root, Other&& other, Entered&& entered) {
  std::vector<std::string> left = {"."};
  while (!left.empty()) {
    std::string below = std::move(left.back());
    left.pop_back();
    FileDescriptor fd = open_beneath(root, below, O_RDONLY | O_DIRECTORY);
    const std::unique_ptr<DIR, int (*)(DIR*)> stream(fd ? fdopendir(fd.get()) : nullptr, closedir);
    if (!stream && errno == ENOENT) continue;  // gone since
    if (!stream) {
      other(below, errno);
      continue;
    }
    fd.release();
    const int at = dirfd(stream.get());
    entered(below, at);
    while (const dirent* item = readdir(stream.get())) {
      const std::string name = item->d_name;
      if (name == "." || name == "..") continue;
      std::string path = below == "." ? name : detail::formatted("{}/{}", below, name);
      // On its way to a name, if its maker lives.
      if (reserved(name)) {
        detail::sweep(at, name.c_str());
        continue;
      }
      const auto entry = inspect(at, name, "");
      if (entry) {
        if (!entry->info) left.push_back(std::move(path));
        continue;
      }
      struct stat st;
      if (fstatat(at, name.c_str(), &st, AT_SYMLINK_NOFOLLOW) != 0) continue;  // gone since
      const bool hidden = S_ISREG(st.st_mode) &&
                          faccessat(at, name.c_str(), R_OK, AT_EACCESS) != 0 && errno == EACCES;
      other(path, hidden ? EACCES : ENOTEMPTY);
    }
  }
}

Name plain(const Name& directory) {
  if (directory.path() == detail::shm_directory) {
    throw ArgumentError(directory.given(), "all of /dev/shm is not a namespace");
  }
  return detail::behind_mount(directory);
}

}  // namespace

struct NewNamespace::State {
  explicit State(const Name& directory) : given(directory), name(plain(directory)) {}

  const Name given;
  const Name name;
  std::vector<std::pair<std::string, NewArray>> arrays;
  bool failed = false;  // to be published; then there are none any more

  // Where the arrays are until then: under shm:// not in a namespace, which might go.
  Place staging_place() const {
    if (!name.shm()) return detail::place_of(name);
    return detail::place_in_shm();
  }

  void throw_taken(const Place& where) const {
    struct stat st;
    if (where.file.empty() ||
        fstatat(where.at(), where.file.c_str(), &st, AT_SYMLINK_NOFOLLOW) != 0) {
      return;
    }
    // Deleting one array after the other leaves an empty directory.
    if (!S_ISDIR(st.st_mode) || !empty(where.at(), where.file)) throw Error(EEXIST, given.given());
  }
};

NewNamespace::NewNamespace(const Name& directory) : state_(std::make_unique<State>(directory)) {
  try {
    state_->throw_taken(detail::place_of(state_->name));
  } catch (const Error& error) {
    if (error.errnum() != ENOENT || !directory.shm()) throw;
  }
}
NewNamespace::NewNamespace(NewNamespace&& other) noexcept = default;
NewNamespace::~NewNamespace() = default;

Array NewNamespace::add(std::string_view leaf, const Shape& shape, const Dtype& dtype,
                        const CreateOptions& options, const void* elements) {
  const std::string name(leaf);
  const std::string given = detail::formatted("{}/{}", state_->given.given(), leaf);
  if (elements != nullptr && !options.reserve) {
    throw ArgumentError(given, "what is to have elements takes memory for them");
  }
  for (std::size_t from = 0; from <= name.size();) {
    const std::size_t end = std::min(name.find('/', from), name.size());
    const std::string part = name.substr(from, end - from);
    if (part.empty() || part == "." || part == ".." || part.find('\0') != std::string::npos ||
        reserved(part)) {
      throw ArgumentError(given, "no name for an array in a namespace");
    }
    if (part.size() > NAME_MAX) throw Error(ENAMETOOLONG, given);
    from = end + 1;
  }
  const auto same = [&](const auto& array) { return array.first == name; };
  if (std::ranges::any_of(state_->arrays, same)) throw Error(EEXIST, given);
  NewArray array(
      std::make_unique<NewArray::State>(Name(detail::formatted("{}/{}", state_->given.uri(), leaf)),
                                        shape, dtype, options, state_->staging_place(), elements));
  Array taken = array.take();
  state_->arrays.emplace_back(name, std::move(array));
  return taken;
}

void NewNamespace::publish() {
  const Name& name = state_->name;
  if (state_->failed) throw Error(EINVAL, state_->given.given(), "failed before; put it anew");
  Place place;
  Temporary temporary;
  // Somebody may remove the namespace above before anything is in it.
  for (int tries = 0; !temporary.fd; ++tries) {
    try {
      place = detail::place_of(name, true);
      state_->throw_taken(place);
      temporary = make_temporary(place, name);
    } catch (const Error& error) {
      detail::unmake(place.made);
      if (error.errnum() != ENOENT || !name.shm() || tries == detail::max_tries) throw;
    }
  }
  std::array<FileDescriptor, 5> spare;  // for remove_arrays(), when there are no others
  try {
    for (FileDescriptor& fd : spare) {
      fd = FileDescriptor(fcntl(temporary.fd.get(), F_DUPFD_CLOEXEC, 0));
      if (!fd) detail::throw_errno(name);
    }
    // Of O_PATH rights are read by way of /proc, which may not be there.
    FileDescriptor empty;
    for (const int flags : {O_RDONLY, O_PATH}) {
      empty = FileDescriptor(
          openat(place.at(), place.file.c_str(), flags | O_DIRECTORY | O_CLOEXEC | O_NOFOLLOW));
      if (empty || errno != EACCES) break;
    }
    if (!empty && detail::exhausted(errno)) detail::throw_errno(name);
    if (empty) {
      inherit(rights_of(empty.get(), name.given()), temporary.fd.get(), name.given());
    }
    for (auto& [leaf, array] : state_->arrays) {
      const std::size_t slash = leaf.rfind('/');
      std::vector<Place::Made> within;  // goes with the directory if it has to
      FileDescriptor at =
          detail::make_directories(FileDescriptor(fcntl(temporary.fd.get(), F_DUPFD_CLOEXEC, 0)),
                                   leaf.substr(0, slash + 1), within);
      if (!at) detail::throw_errno(name);
      array.state_->staging->inherit_group(at.get());
      array.state_->staging->publish(
          {.opened = std::move(at), .directory = ".", .file = leaf.substr(slash + 1), .made = {}},
          false);
    }
    // Of directories rename(2) replaces those that are empty only.
    if (renameat(place.at(), temporary.name.c_str(), place.at(), place.file.c_str()) != 0) {
      const bool taken = errno == ENOTEMPTY || errno == ENOTDIR;
      throw Error(taken ? EEXIST : errno, state_->given.given());
    }
  } catch (...) {
    state_->failed = true;
    state_->arrays.clear();
    spare = {};
    try {
      if (unlinkat(place.at(), temporary.name.c_str(), AT_REMOVEDIR) != 0 && errno != ENOENT) {
        detail::remove_arrays(place.at(), temporary.name);
      }
    } catch (const std::exception&) {  // of somebody else's is something in it; see sweep()
      temporary.fd = FileDescriptor();
    }
    detail::unmake(place.made);
    throw;
  }
}

std::vector<Array> attach_all(const Name& directory, Mode mode) {
  const int flags = mode == Mode::read_write ? O_RDWR : O_RDONLY;
  while (true) {
    const FileDescriptor root = open_directory(detail::behind_mount(directory));
    std::vector<Array> arrays;
    const std::string prefix = detail::list_prefix(directory);
    survey(
        root.get(),
        [&](const std::string& path, int errnum) {
          if (errnum == EACCES) throw Error(EACCES, prefix + path);
        },
        [](const std::string&, int) {});
    for (const auto& listed : detail::list(root, directory)) {
      const std::string& uri = listed->name;
      const FileDescriptor fd = open_beneath(root.get(), uri.substr(prefix.size()), flags);
      if (!fd && errno == ENOENT) continue;
      if (!fd) throw Error(errno, uri);
      const detail::Stat stat = detail::stat_file(fd.get(), uri);
      arrays.push_back(ArrayAccess::attach(fd.get(), stat, mode, uri, uri));
    }
    // Of a namespace that is being removed there may be less than it had.
    const FileDescriptor now = open_directory(detail::behind_mount(directory));
    struct stat before, after;
    if (fstat(root.get(), &before) != 0 || fstat(now.get(), &after) != 0) {
      throw Error(errno, directory.given());
    }
    if (before.st_dev == after.st_dev && before.st_ino == after.st_ino) return arrays;
  }
}

void detail::remove_arrays(int dirfd, const std::string& name) {
  const FileDescriptor root(
      openat(dirfd, name.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC | O_NOFOLLOW));
  if (!root) throw Error(errno, name);
  // Directories in the order in which they are found: those below come later.
  std::vector<std::string> directories = {"."};
  for (std::size_t i = 0; i < directories.size(); ++i) {
    const std::string below = directories[i];
    const FileDescriptor at = open_beneath(root.get(), below, O_RDONLY | O_DIRECTORY);
    if (!at) throw Error(errno, below);
    for (const Entry& entry : scan(at.get(), "")) {
      if (!entry.info) {
        directories.push_back(below == "." ? entry.name
                                           : detail::formatted("{}/{}", below, entry.name));
      } else if (unlinkat(at.get(), entry.name.c_str(), 0) != 0 && errno != ENOENT) {
        throw Error(errno, entry.name);
      }
    }
  }
  for (; directories.size() > 1; directories.pop_back()) {
    const std::string& path = directories.back();
    const std::size_t slash = path.rfind('/');
    const FileDescriptor at = open_beneath(
        root.get(), slash == std::string::npos ? "." : path.substr(0, slash), O_PATH | O_DIRECTORY);
    if (!at) throw Error(errno, path);
    if (unlinkat(at.get(), path.substr(slash + 1).c_str(), AT_REMOVEDIR) != 0) {
      throw Error(errno, path);
    }
  }
  if (unlinkat(dirfd, name.c_str(), AT_REMOVEDIR) != 0) throw Error(errno, name);
}

void remove_all(const Name& directory) {
  const Name name = plain(directory);
  const Place place = detail::place_of(name);
  const FileDescriptor fd(
      openat(place.at(), place.file.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC | O_NOFOLLOW));
  if (!fd) detail::throw_errno(directory);
  const auto check = [&] {
    std::string fixed;
    survey(
        fd.get(),
        [&](const std::string& path, int errnum) {
          throw Error(errnum, directory.given(),
                      detail::formatted("'{}' in it {}", path,
                                        errnum == EACCES ? "cannot be read" : "is no array"));
        },
        [&](const std::string& path, int at) {
          if (!fixed.empty() || faccessat(at, ".", W_OK | X_OK, AT_EACCESS) == 0) return;
          if (errno == EACCES) fixed = path == "." ? path : "./" + path;
        });
    if (!fixed.empty()) {
      throw Error(EACCES, directory.given(),
                  detail::formatted("'{}' in it cannot be changed", fixed));
    }
  };
  check();
  // The lock keeps others from sweeping what cannot be removed before it is put back. Whatever is
  // left when this process is killed goes with the next listing.
  flock(fd.get(), LOCK_EX | LOCK_NB);
  const std::string temporary = place.directory + "/" + detail::temporary_name();
  if (renameat(place.at(), place.file.c_str(), place.at(), temporary.c_str()) != 0) {
    detail::throw_errno(directory);
  }
  try {
    struct stat looked_at, moved;
    if (fstat(fd.get(), &looked_at) != 0 ||
        fstatat(place.at(), temporary.c_str(), &moved, AT_SYMLINK_NOFOLLOW) != 0 ||
        looked_at.st_ino != moved.st_ino || looked_at.st_dev != moved.st_dev) {
      throw Error(EAGAIN, directory.given(), "another namespace has its name since");
    }
    // Who was about to publish an array in it may do so still.
    for (int tries = 0;; ++tries) {
      check();  // what has come since
      try {
        detail::remove_arrays(place.at(), temporary);
        break;
      } catch (const Error& error) {
        if (error.errnum() != ENOTEMPTY || tries == detail::max_tries) throw;
      }
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
  } catch (const Error& error) {
    if (renameat2(place.at(), temporary.c_str(), place.at(), place.file.c_str(),
                  RENAME_NOREPLACE) == 0) {
      throw Error(error.errnum(), directory.given(), error.message());
    }
    // The name is taken. No reserved one, or the content would be swept.
    const std::string kept =
        detail::formatted("{}.kept{}", place.file, temporary.substr(temporary.rfind('-')));
    const bool moved = renameat(place.at(), temporary.c_str(), place.at(), kept.c_str()) == 0;
    throw Error(error.errnum(), directory.given(),
                detail::formatted("{}; what is left of it is now '{}'", error.message(),
                                  moved ? kept : temporary));
  }
}

}  // namespace sharr
