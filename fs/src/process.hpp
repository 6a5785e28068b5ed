// What /proc tells about the processes that use the mount.
//
// FUSE says that some descriptor of a file was closed, but neither whether it was the last nor why.
// An array appears when its writer closes it and not when the writer is killed, so somebody has to
// look.
#pragma once

#include <sys/types.h>

#include <cstdint>
#include <optional>

namespace sharrfs::process {

enum class Ending {
  none,    // the thread lives, or is out of sight
  exits,   // by itself
  killed,  // by a signal
};
// How the thread tid is coming to its end.
Ending ending(pid_t tid);

struct Mount {
  dev_t device;
  std::uint64_t id;  // in the daemon's mount namespace
};
// The mount at path, or none with errno set. Asks the kernel for no more than it knows: a daemon
// that waits for its own answer cannot even be killed.
std::optional<Mount> mount_at(const char* path);

// A file on the mount, by its inode number there.
struct File {
  Mount mount;
  ino_t inode;
};

// Where to look for descriptors of a file.
enum class Where {
  family,  // in the process of the thread, and in those that it has started
  everywhere,
};
enum class Holders {
  none,
  until_exec,  // what it has started, by copies which exec closes, if it comes to that
  children,    // what it has started; while exec closes copies, some look as if it would not
  some,        // the process, or one that it has not started; or nobody could tell, or not in time
  unknown,     // what it has started, maybe: one of these may not be looked at
};
// Who has a descriptor of the file. What is behind a descriptor of some process can make it wait
// for whoever it waits for, this daemon included, so another thread looks, and not for ever.
Holders holders(Where where, pid_t tid, const File& file);

// Whether the two threads are of one process.
bool same(pid_t tid, pid_t other);

}  // namespace sharrfs::process
