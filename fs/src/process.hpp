// What /proc tells about the processes that use the mount.
//
// FUSE says that some descriptor of a file was closed, but neither whether it was the last nor why.
// An array appears when its writer closes it and not when the writer is killed, so somebody has to
// look.
#pragma once

#include <sys/types.h>

#include <optional>

namespace sharrfs::process {

enum class Ending {
  none,    // the thread lives, or is out of sight
  exits,   // by itself
  killed,  // by a signal
};
// How the thread tid is coming to its end.
Ending ending(pid_t tid);

// A file on the mount: the mount's device, and the inode number there.
struct File {
  dev_t device;
  ino_t inode;
};
// The device of the mount at path, or none with errno set. Asks the kernel for no more than it
// knows: a daemon that waits for its own answer cannot even be killed.
std::optional<dev_t> device_of(const char* path);

// Whether the thread's process has a descriptor of the file.
bool holds(pid_t tid, const File& file);
// Whether any process has one.
bool anyone_holds(const File& file);
// Whether a process that the thread's process has started has one.
bool children_hold(pid_t tid, const File& file);

// Whether the two threads are of one process.
bool same(pid_t tid, pid_t other);

}  // namespace sharrfs::process
