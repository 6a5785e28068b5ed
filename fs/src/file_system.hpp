// The FUSE file system: arrays and namespaces below one directory, as files and directories.
//
// Holds no truth of its own. A node is a name for an inode of the backing file system that the
// kernel has asked about; everything said of it is read from there at the moment of asking, so that
// nothing changed beside the mount can be stale. A file's node holds no descriptor unless somebody
// has it open: a descriptor would keep a deleted array's memory. A directory's holds one (O_PATH),
// so that it is found wherever it goes.
//
// A file that is being written is a sharr::Draft, which has no name on the backing file system and
// none here, until whoever writes it closes it; see finish().
#pragma once

#include <fuse_lowlevel.h>
#include <sys/stat.h>

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <shared_mutex>
#include <sharr/object.hpp>
#include <string>
#include <tuple>
#include <unordered_map>
#include <utility>
#include <vector>

#include "locks.hpp"
#include "process.hpp"

namespace sharrfs {

class FileSystem {
 public:
  // source: the directory behind the mount, O_PATH. prefix: what the URIs of its arrays begin with,
  // "shm://jobs/". direct_io: do not use passthrough.
  FileSystem(sharr::FileDescriptor source, std::string prefix, bool direct_io);

  FileSystem(const FileSystem&) = delete;
  FileSystem& operator=(const FileSystem&) = delete;
  ~FileSystem();

  // The operations, for fuse_session_new() with this as userdata. Called by several threads.
  static const fuse_lowlevel_ops& operations();
  // To be called before the loop runs.
  void set_session(fuse_session* session, const process::Mount& mount) {
    session_ = session;
    mount_ = mount;
  }

  // To be called after the loop, while the session still is.
  void stop() { lock_waiters_.stop(); }

  // Whether the kernel lets this daemon pass files of the source through; asks it, so the mount has
  // to be answering. errno says why not.
  bool passes_through() const noexcept;

 private:
  struct Directory;
  struct Handle;
  struct Node;
  struct Operations;
  struct Truncation;
  enum class Retry { none, draft, same, failed };
  class Unpublished;
  struct Writing;
  using NodePtr = std::shared_ptr<Node>;
  using WritingPtr = std::shared_ptr<Writing>;
  using Key = std::tuple<dev_t, ino_t, bool>;  // device, inode, is a directory

  static Key key_of(const struct stat& st);
  NodePtr find(fuse_ino_t id);
  std::pair<NodePtr, std::string> place_of(const NodePtr& node);
  // Where a node is below the source, "." for the root.
  std::string path_of(const NodePtr& node);
  std::string prefix_of(const NodePtr& directory);
  // Opens what a node's name stands for. A file that has taken the name of one that nobody has open
  // takes its node too, so that a name that always exists never fails; one that is open is opened
  // again. ESTALE for a directory that is somewhere else now.
  sharr::FileDescriptor open_node(const NodePtr& node, int flags, struct stat& st);
  sharr::FileDescriptor open_directory(const NodePtr& node);
  void bind(Node& node, const Key& key);
  struct stat stat_node(const NodePtr& node);
  struct stat presented(struct stat st) const;
  std::vector<std::pair<std::string, std::string>> attributes(fuse_ino_t id);

  // Looks a name up and counts that; ENOENT when there is nothing to show.
  fuse_entry_param enter(const NodePtr& parent, const std::string& name);
  fuse_entry_param entry_of(const NodePtr& node, const struct stat& st);  // mutex_ is held
  void forget(fuse_ino_t id, std::uint64_t count);
  void drop(fuse_ino_t id, std::uint64_t count);  // mutex_ is held
  void moved(const struct stat& st, const NodePtr& parent, const std::string& name);  // as well

  // Open files. A backing id of 0 stands for direct_io.
  std::pair<std::unique_ptr<Handle>, int> open_handle(const NodePtr& node, int flags, pid_t tid);
  // Whether a descriptor that the thread has closed was the last one of a file that opener opened.
  bool last_close(const NodePtr& node, pid_t tid, pid_t opener);
  void close(std::unique_ptr<Handle> handle) noexcept;
  static void repair(const Handle& handle) noexcept;
  static void remember(Node& node, int fd, const struct stat& st, const sharr::Info& info);

  // Files that are being written.
  WritingPtr writing(const NodePtr& node);
  Unpublished unpublished(const NodePtr& node);
  NodePtr start_writing(const NodePtr& parent, const std::string& name, WritingPtr writing);
  WritingPtr replacement(const NodePtr& parent, const std::string& name, const struct stat& st,
                         pid_t tid);
  void start_overwriting(const NodePtr& node, fuse_req_t request);
  std::optional<fuse_entry_param> enter_overwriting(const NodePtr& parent, const std::string& name,
                                                    pid_t tid);
  Retry end_overwriting(const NodePtr& node, pid_t tid);
  void purge_truncations();
  void abandon(const NodePtr& node);  // mutex_ is held
  void finish(const NodePtr& node, fuse_req_t request);
  void settle(const NodePtr& node) noexcept;
  void publish(const NodePtr& node, Writing& writing, fuse_req_t request);
  void log_refusal(const NodePtr& node, const char* why) noexcept;

  const sharr::FileDescriptor source_;
  const std::string prefix_;
  const bool direct_io_;
  fuse_session* session_ = nullptr;
  process::Mount mount_{};
  LockWaiters lock_waiters_;

  // Held exclusively while a name changes its place, so that a look-up that has seen the old place
  // does not write it down after the new one.
  std::shared_mutex tree_mutex_;

  std::mutex mutex_;  // guards what follows, and the mutable parts of nodes
  fuse_ino_t next_id_ = FUSE_ROOT_ID + 1;
  std::unordered_map<fuse_ino_t, NodePtr> nodes_;
  std::map<Key, fuse_ino_t> ids_;
  std::set<NodePtr> drafts_;  // the nodes with a Writing
  std::map<pid_t, Truncation> truncations_;
};

}  // namespace sharrfs
