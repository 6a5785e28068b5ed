// System calls that every file here needs: opening by name under the rules of store.hpp, reading
// whole, errors with names.
#pragma once

#include <cstdint>
#include <ctime>
#include <mutex>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "sharr/object.hpp"

namespace sharr::detail {

// What names under shm:// are relative to.
constexpr std::string_view shm_directory = "/dev/shm";

// Throws Error for errno.
[[noreturn]] void throw_errno(const Name& name);

// Opens an array's file. Under shm:// follows no symbolic link; never blocks on a FIFO or a lease.
// Throws Error, FormatError when it is a socket.
FileDescriptor open_file(const Name& name, int flags);

// What statx(2) says; of st what the library looks at. Throws Error.
struct Stat {
  struct stat st;
  Identity identity;
};
Stat stat_at(int dirfd, const std::string& path, int flags, std::string_view name);
// Of a regular file that is open, with the same flags. FormatError when it is something else.
Stat stat_file(int fd, std::string_view name, int flags = 0);

// Where a name lives, for calls that end in "at": a flat name and a path are as good as a path
// gets, a name in a namespace needs its directory opened first, so that no symbolic link is
// followed.
struct Place {
  // A directory that place_of() made, by its parent and its name there.
  struct Made {
    FileDescriptor parent;
    std::string name;
  };

  FileDescriptor opened;
  std::string directory;  // relative to at()
  std::string file;       // likewise
  std::vector<Made> made;

  int at() const noexcept { return opened ? opened.get() : AT_FDCWD; }
};
// Where what is to be in a namespace that may be missing is made: /dev/shm itself.
Place place_in_shm();
// Throws Error; a namespace that is missing is ENOENT unless it is to be made.
Place place_of(const Name& name, bool make_namespace = false);
// Opens a directory below another one, "a/b", and makes what is missing of it, which goes to
// `made`. Empty with errno set when that cannot be.
FileDescriptor make_directories(FileDescriptor directory, const std::string& path,
                                std::vector<Place::Made>& made);
// Removes the directories that were made for a place, as far as nobody has used them.
void unmake(std::vector<Place::Made>& made) noexcept;

// What /proc/self/mountinfo says of the file system on a device: "TYPE SOURCE OPTIONS"; empty where
// it is not mounted in sight.
std::string mount_of(dev_t device);

// Guards what the library remembers from call to call. A child of fork(2) has it unlocked, whatever
// its parent's other threads were doing. It and what it guards are made when the library is loaded:
// for what another thread was making just then the child would wait for ever.
std::mutex& memory_mutex();

// Whether a file whose ctime is `changed` can be told by it from what it becomes later. now: of no
// later than when the file was read (CLOCK_REALTIME_COARSE). The clock of files has ticks of up to
// 10 ms.
bool settled(const timespec& changed, const timespec& now) noexcept;

inline bool same(const timespec& a, const timespec& b) noexcept {
  return a.tv_sec == b.tv_sec && a.tv_nsec == b.tv_nsec;
}

// Whether an open(2) that failed with this says nothing of what was to be opened: descriptors or
// memory have run out.
bool exhausted(int errnum) noexcept;

// "1.5 MiB".
std::string human_size(std::uint64_t bytes);

}  // namespace sharr::detail
