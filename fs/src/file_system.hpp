// The FUSE file system: arrays and namespaces below one directory, as files and directories.
//
// Holds no truth of its own. A node is a name for an inode of the backing file system that the
// kernel has asked about; everything said of it is read from there at the moment of asking, and
// what the kernel remembers of it expires when it changes; see coherence.cpp. A file's node holds
// no descriptor unless somebody has it open: a descriptor would keep a deleted array's memory. A
// directory's holds one (O_PATH), so that it is found wherever it goes; or is found by its name,
// like a file, when there are more directories than half of the descriptors that the daemon may
// have.
//
// A file that is being written is a sharr::Draft, which has no name on the backing file system and
// none here, until whoever writes it closes it; see finish().
#pragma once

#include <fuse_lowlevel.h>
#include <sys/stat.h>

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
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
#include "watches.hpp"

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

  // To be called before the loop runs, with the rights that it will have: where changes of the
  // source can be watched, lets the kernel remember what it has been told.
  void start_watching();
  // To be called after the loop, while the session still is.
  void stop();

  // Whether the kernel lets this daemon pass files of the source through; asks it, so the mount has
  // to be answering. errno says why not.
  bool passes_through() const noexcept;

 private:
  struct Directory;
  struct Handle;
  struct Node;
  struct Operations;
  struct Replaced;
  struct Truncation;
  class Unpublished;
  struct Writing;
  using NodePtr = std::shared_ptr<Node>;
  using WritingPtr = std::shared_ptr<Writing>;
  using Key = std::tuple<dev_t, ino_t, bool>;  // device, inode, is a directory
  // Of a directory: who looks at it keeps it open, whatever becomes of the node.
  using DirectoryPtr = std::shared_ptr<const sharr::FileDescriptor>;

  static Key key_of(const struct stat& st);
  // access: what the request is to be allowed in it, where it is a directory; see access(2).
  NodePtr find(fuse_ino_t id, fuse_req_t request = nullptr, int access = 0);
  // Where the source was a namespace that is gone, and its owner has one of that name again, the
  // root becomes that: to fill an empty one with arrays that appear together replaces it. No lock
  // is held.
  void follow_source();
  std::pair<NodePtr, std::string> place_of(const NodePtr& node);
  // Where a node is below the source, "." for the root.
  std::string path_of(const NodePtr& node);
  static std::string path_from(const Node& above, const Node& node);  // mutex_ is held
  std::string prefix_of(const NodePtr& directory);
  // Opens what a node's name stands for. A file that has taken the name of one that nobody has open
  // takes its node too, so that a name that always exists never fails; one that is open is opened
  // again. ESTALE for a directory that is somewhere else now.
  sharr::FileDescriptor open_node(const NodePtr& node, int flags, struct stat& st);
  DirectoryPtr open_directory(const NodePtr& node);
  void sweep();
  // With mutex_ held.
  void hold(const NodePtr& node, sharr::FileDescriptor fd);
  static bool is_gone(const Node& directory);
  std::vector<NodePtr> all_within(const std::set<NodePtr>& directories) const;
  void bind(Node& node, const Key& key);
  // The node of a file, new when there is none. mutex_ is held.
  std::pair<NodePtr, bool> node_of(const struct stat& st);
  struct stat stat_node(const NodePtr& node);
  struct stat presented(struct stat st) const;
  // What a file's node is, for a reader who has to be allowed to read it; none while it is written.
  std::optional<sharr::Info> info_of(const NodePtr& node, fuse_req_t reader = nullptr);

  // Looks a name up and counts that; none when there is nothing to show.
  std::optional<fuse_entry_param> enter(const NodePtr& parent, const std::string& name);
  // remember: for how many seconds the kernel may do so with the name, and with the attributes.
  fuse_entry_param entry_of(const NodePtr& node, const struct stat& st, double name = 0,
                            double attributes = 0);  // mutex_ is held
  void forget(fuse_ino_t id, std::uint64_t count);
  void drop(fuse_ino_t id, std::uint64_t count);  // mutex_ is held
  void erase(const NodePtr& node);                // as well: to the kernel it is stale
  bool erasable(const Node& node) const;          // as well
  void retire(const NodePtr& node);               // as well
  // As well. nodes: those placed where the file was, which the kernel moves, whoever has taken the
  // name since.
  void moved(const std::vector<NodePtr>& nodes, const struct stat& st, const NodePtr& parent,
             const std::string& name);

  // What the kernel remembers; coherence.cpp. Those in this block are called with mutex_ held.
  static bool written(
      const Node& node);  // open for writing here: its attributes are not remembered
  void watch(const NodePtr& node);
  void unwatch(Node& node);
  // Whether the entries of a directory are as they were when it had changed so often.
  bool holds(std::uint64_t changes, const Node& directory) const;
  // For how many seconds attributes read from now on may be remembered.
  double attribute_time(const Node& node, const struct stat& st) const;
  double name_time(const Node& node, const struct stat& st, std::uint64_t changes) const;
  // Whether the kernel may remember a name of the node, other than this one if it is given.
  bool remembered(const Node& node) const;
  bool remembered_elsewhere(const Node& node, const NodePtr& parent, const std::string& name) const;
  // Where a node is, so that a change there leads to it.
  void place(const NodePtr& node, const NodePtr& parent, const std::string& name);
  void unplace(Node& node);
  std::vector<NodePtr> placed_at(const Node& parent, const std::string& name) const;
  // And these without.
  void remember_if(unsigned minor);  // of the protocol that the kernel speaks
  // To be asked before its entries are looked at.
  std::uint64_t changes_of(const NodePtr& directory);
  void read_directory(const NodePtr& node, Directory& directory);
  void expire_names();
  // Makes the kernel forget the names of nodes, whichever they are: expires all where it cannot do
  // without. also: what else it may forget.
  void expire_names_of(const std::vector<NodePtr>& nodes, std::vector<NodePtr> also = {});
  // Makes it forget those of them that nobody uses, if it can be told to.
  void prune(const std::vector<NodePtr>& nodes);
  // False when the kernel has no such inode.
  bool expire_attributes(fuse_ino_t id) const;
  void forget_everything();
  // Whether another file, or none, has the name of a file that somebody has open. To open it by
  // that name is to open the other; by a descriptor, as through /proc/self/fd, it is not. Answered
  // ESTALE, a thread looks the name up or, without one, insists. It does so once: a file that is
  // displaced again had the name a moment ago.
  bool displaced(const NodePtr& node);
  bool insists(pid_t tid);
  void listed(Directory& directory);  // mutex_ is held
  void taken(Directory& directory);
  void arrived(const NodePtr& directory, const std::string& name, std::set<NodePtr>& changed,
               std::vector<NodePtr>& misnamed);  // mutex_ is held, and tree_mutex_
  int noticed(const std::vector<Watches::Event>& events);

  // Open files. A backing id of 0 stands for direct_io.
  std::pair<std::unique_ptr<Handle>, int> open_handle(const NodePtr& node, int flags);
  // Whether a descriptor of a draft that the thread has closed was the last one. size: of the
  // array.
  bool last_close(const Handle& closed, pid_t tid, const Writing& writing, off_t size,
                  process::Holders family);
  bool others_are_closing(const Handle& handle);
  void close(std::unique_ptr<Handle> handle) noexcept;
  // True when something was to be done.
  static bool repair(const Handle& handle) noexcept;
  static void remember(Node& node, int fd, const struct stat& st, const sharr::Info& info);

  // Files that are being written.
  WritingPtr writing(const NodePtr& node);
  Unpublished unpublished(const NodePtr& node);
  bool is_unopened(const NodePtr& node);
  static bool is_at(const Node& draft, const Node& parent, const std::string& name);
  NodePtr start_writing(const NodePtr& parent, const std::string& name, WritingPtr writing);
  static void set_replaced(Writing& writing, Replaced old);
  static void take_rights(Writing& writing, const sharr::Rights& now, const std::string& uri);
  static sharr::FileDescriptor open_to_overwrite(int directory, const std::string& name,
                                                 fuse_req_t request, int access);
  static WritingPtr replacement(int directory, const std::string& uri, int old,
                                const fuse_ctx& caller);
  void start_overwriting(const NodePtr& node, fuse_req_t request, int access);
  void go_on_overwriting(const NodePtr& draft, Writing& writing, fuse_req_t request, int access);
  int set_rights(const NodePtr& draft, Writing& writing, int rights);
  void unset_rights(Writing& writing, int rights);
  void outdate_rights(const struct stat& array, int rights);
  static void outdate(Writing& writing, int rights);
  void catch_up(const NodePtr& draft, Writing& writing, int outdated);
  std::optional<struct stat> overwritten(const NodePtr& draft);
  std::optional<fuse_entry_param> enter_overwriting(const NodePtr& parent, const std::string& name,
                                                    pid_t tid);
  bool end_overwriting(const NodePtr& node, pid_t tid);
  void purge_truncations();
  void abandon(const NodePtr& node);  // mutex_ is held
  void finish(const Handle& closed, fuse_req_t request);
  void settle(const NodePtr& node) noexcept;
  void publish(const NodePtr& node, Writing& writing, fuse_req_t request);
  void log_refusal(const NodePtr& node, const char* why) noexcept;

  const sharr::FileDescriptor source_;
  const std::string prefix_;
  sharr::FileDescriptor shm_;  // /dev/shm, if the source is a namespace in it
  const bool direct_io_;
  fuse_session* session_ = nullptr;
  process::Mount mount_{};
  LockWaiters lock_waiters_;
  Watches watches_;
  std::atomic<bool> followed_{false};  // once
  std::atomic<bool> remembers_{false};
  std::atomic<bool> prunes_{false};

  // Held exclusively while a name changes its place, so that a look-up that has seen the old place
  // does not write it down after the new one.
  std::shared_mutex tree_mutex_;

  // Held while a draft gets its name, or rights of its own, and while an array is opened to be
  // overwritten, or has got rights by its name, so that of those who have the same open each finds
  // the other's for its own. After Writing::mutex, before mutex_.
  std::mutex publishing_;

  std::mutex mutex_;                   // guards what follows, and the mutable parts of nodes
  std::condition_variable forgotten_;  // a node is, by the kernel
  fuse_ino_t next_id_ = FUSE_ROOT_ID + 1;
  std::uint64_t left_ = 0;  // counts drafts that nobody has open any more
  std::unordered_map<fuse_ino_t, NodePtr> nodes_;
  std::map<Key, fuse_ino_t> ids_;
  std::set<NodePtr> drafts_;        // the nodes with a Writing
  std::set<NodePtr> holding_;       // the directories that hold a descriptor, but for the root
  std::deque<fuse_ino_t> retired_;  // have had a name
  std::size_t until_sweep_ = 0;     // how many more may come before the dead are let go
  std::map<pid_t, Truncation> truncations_;
  std::set<pid_t> insisting_;                    // the threads that insists() has refused
  std::unordered_map<int, fuse_ino_t> watched_;  // directories, by watch
  std::unordered_multimap<std::size_t, fuse_ino_t> places_;  // by hash of parent and name
  std::uint64_t epoch_ = 1;                                  // of the names that the kernel is told
  std::uint64_t expired_ = 1;                                // those of earlier ones it has no more
  std::size_t listings_ = 0;                                 // Directory::in_kernel
  bool repeat_ = false;                                      // names expired during one of them
  int repeat_after_ = 0;                                     // milliseconds
};

}  // namespace sharrfs
