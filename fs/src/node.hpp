// The parts of the file system that its operations share.
#pragma once

#include <sys/types.h>

#include <atomic>
#include <chrono>
#include <cstring>
#include <memory>
#include <mutex>
#include <optional>

#include "caller.hpp"
#include "file_system.hpp"

namespace sharrfs {

[[noreturn]] void fail(int errnum);
// The inode open as fd, which may be O_PATH, by a name.
std::string self(int fd);
// Another open file of it; empty with errno set when that is not to be had.
sharr::FileDescriptor reopen(int fd, int flags);
// Whether something has the name; what is mounted there is not asked.
bool is_there(int directory, const std::string& name);
// And is not shown here.
bool is_foreign(int directory, const std::string& name);

// An open file.
struct FileSystem::Handle {
  using Clock = std::chrono::steady_clock;
  static constexpr std::chrono::milliseconds most_late{100};

  NodePtr node;
  sharr::FileDescriptor fd;  // of its own, so that a lock on it is this open file's
  bool writable = false;
  bool passthrough = false;
  std::atomic<bool> locked{false};  // may hold a lock
  // When, and by what owner of locks, a descriptor of it was closed last, which may be the last of
  // all. Guarded by mutex_.
  Clock::time_point closed;
  std::uint64_t closed_by = 0;

  // Whether the kernel may be about to say that it is gone.
  bool closing() const { return Clock::now() - closed < most_late; }
};

// What an open directory showed when it was read last.
struct FileSystem::Directory {
  struct Item {
    std::string name;
    struct stat st;

    bool operator==(const Item& other) const {
      return name == other.name && std::memcmp(&st, &other.st, sizeof(st)) == 0;
    }
  };
  using Items = std::vector<Item>;
  Key key;                             // whose it was when it was opened
  std::shared_ptr<const Items> items;  // of all who read the same
  std::uint64_t changes = 0;           // before that
  bool in_kernel = false;              // entries are on their way to names there
};

// An array that is to be replaced.
struct FileSystem::Replaced {
  // Of an open file (O_PATH will do). Throws std::system_error.
  explicit Replaced(int fd);
  bool same(const Replaced& other) const;

  Key key;
  timespec born{};  // which tells it from a file that has got its inode since
  // Where the file system does not know that: so that none gets it.
  std::shared_ptr<const sharr::FileDescriptor> kept;
  sharr::Rights rights;
};

// An array that is being written.
struct FileSystem::Writing {
  Writing(int directory, const std::string& uri, mode_t mode, const fuse_ctx& caller)
      : draft(directory, uri, mode), opener(caller.pid), uid(caller.uid) {}

  sharr::Draft draft;
  const pid_t opener;
  const uid_t uid;         // the opener's
  bool exclusive = false;  // opened with O_EXCL: takes no other's place
  // Opened with O_TRUNC: takes this one's. Without drafts all who do so would write to one file;
  // when the draft of one takes its place, the others are to replace that. Guarded by publishing_.
  std::optional<Replaced> replaces;
  // Replaces what has been created after it, so that it keeps what is more private of its own
  // rights, until that gets others by its name. Likewise.
  bool created = false;
  // Begun to overwrite what was gone at that moment, and not opened yet. Likewise.
  bool overwrites = false;
  // What it replaces has got another owner by what another has written: a mode of its own may have
  // been the old owner's word. Likewise.
  bool given = false;
  // What it has got of its own of owner, group and mode (FUSE_SET_ATTR_UID, _GID, _MODE), since
  // what it replaces has got that by its name on the mount. Likewise.
  int set = 0;
  std::uint64_t left = 0;  // by when nobody had it open any more, in order. Guarded by mutex_

  std::mutex mutex;  // guards what follows, and the draft's way to its name
  // A header alone stands for an array of zeros if whoever writes can also read, as NumPy's
  // open_memmap does. Who cannot, as cp, has lost the data.
  bool declared = false;
  bool grown = false;  // has got memory that nobody may have written to
  bool published = false;
  bool killed = false;   // so was the last to close it
  bool refused = false;  // and the last to close it was told so
};

// What a node is being written into, if it is, and kept from being published while this lives. A
// name leads to a node a moment before the node knows that it is published.
class FileSystem::Unpublished {
 public:
  explicit Unpublished(WritingPtr writing) : writing_(std::move(writing)) {
    if (!writing_) return;
    lock_ = std::unique_lock(writing_->mutex);
    if (!writing_->published) return;
    lock_ = {};
    writing_.reset();
  }
  explicit operator bool() const { return writing_ != nullptr; }
  Writing& operator*() const { return *writing_; }
  Writing* operator->() const { return writing_.get(); }

 private:
  WritingPtr writing_;
  std::unique_lock<std::mutex> lock_;
};

// An open with O_TRUNC on its way through the kernel; see start_overwriting().
struct FileSystem::Truncation {
  NodePtr draft;
  std::chrono::steady_clock::time_point since;
};

struct FileSystem::Node {
  fuse_ino_t id;
  bool directory;
  Key key;  // of a directory for good, but for follow_source(); of a file as bind() says
  std::uint64_t lookups = 0;
  // Where it was seen last; of a draft, where it is to appear.
  NodePtr parent;
  std::string name;
  // Of a directory; none when it is gone or there are too many.
  DirectoryPtr fd;
  bool placed = false;        // parent and name are in places_
  std::uint64_t epoch = 0;    // when the kernel was last told to remember its name
  int watch = -1;             // of a directory
  std::uint64_t changes = 0;  // in it
  std::weak_ptr<const Directory::Items> listing;  // the last that was read
  WritingPtr writing;
  // While it is open: one backing id for all, because the kernel has room for one.
  std::vector<Handle*> handles;
  int backing_id = 0;
  // When the file was opened for writing first: its size, where its data ended, its header.
  off_t size = 0;
  std::uint64_t data_end = 0;
  std::string header;
  // fcntl(2)'s locks belong to a process and an inode: an open file each.
  struct LockOwner {
    sharr::FileDescriptor fd;
    pid_t pid;
    // Used last. Of an F_OFD_SETLK's the kernel says nothing but its end.
    const Handle* through = nullptr;
  };
  std::map<std::uint64_t, std::shared_ptr<LockOwner>> lock_owners;
};

}  // namespace sharrfs
