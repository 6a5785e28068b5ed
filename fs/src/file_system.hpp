// The FUSE file system: arrays and namespaces below one directory, as files and directories.
//
// Holds no truth of its own. A node is a name for an inode of the backing file system that the
// kernel has asked about; everything said of it is read from there at the moment of asking, so that
// nothing changed beside the mount can be stale. A node holds no descriptor unless somebody has it
// open: a descriptor would keep a deleted array's memory.
#pragma once

#include <fuse_lowlevel.h>
#include <sys/stat.h>

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <sharr/object.hpp>
#include <string>
#include <tuple>
#include <unordered_map>
#include <vector>

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
  void set_session(fuse_session* session) { session_ = session; }

  // Whether the kernel lets this daemon pass files of the source through; asks it, so the mount has
  // to be answering. errno says why not.
  bool passes_through() const noexcept;

 private:
  struct Handle;
  struct Node;
  struct Operations;
  using NodePtr = std::shared_ptr<Node>;
  using Key = std::tuple<dev_t, ino_t, bool>;  // device, inode, is a directory

  static Key key_of(const struct stat& st);
  NodePtr find(fuse_ino_t id);
  // Where a node is below the source, "." for the root.
  std::string path_of(const NodePtr& node);
  // Opens what a node's name stands for. A file that has taken the name of one that nobody has open
  // takes its node too, so that a name that always exists never fails; one that is open is opened
  // again. ESTALE for a directory that is somewhere else now.
  sharr::FileDescriptor open_node(const NodePtr& node, int flags, struct stat& st);
  void bind(Node& node, const Key& key);
  struct stat stat_node(const NodePtr& node);
  std::vector<std::pair<std::string, std::string>> attributes(fuse_ino_t id);
  fuse_entry_param add(const NodePtr& parent, const sharr::Entry& entry);
  void forget(fuse_ino_t id, std::uint64_t count);
  void close(std::unique_ptr<Handle> handle) noexcept;
  static void trim(const Handle& handle) noexcept;
  struct stat presented(struct stat st) const;
  std::string prefix_of(const NodePtr& directory);

  const sharr::FileDescriptor source_;
  const std::string prefix_;
  const bool direct_io_;
  fuse_session* session_ = nullptr;

  std::mutex mutex_;  // guards what follows, and the mutable parts of nodes
  fuse_ino_t next_id_ = FUSE_ROOT_ID + 1;
  std::unordered_map<fuse_ino_t, NodePtr> nodes_;
  std::map<Key, fuse_ino_t> ids_;
};

}  // namespace sharrfs
