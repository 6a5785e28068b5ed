#include "file_system.hpp"

#include <fmt/format.h>
#include <linux/limits.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <functional>
#include <limits>
#include <system_error>
#include <thread>

#include "caller.hpp"
#include "node.hpp"
#include "passthrough.hpp"
#include "process.hpp"

namespace sharrfs {

using process::Holders;
using process::Where;
using sharr::Entry;
using sharr::FileDescriptor;

namespace {

// Far more than any tree has; a circle of directories, which moves beside the mount could make when
// they are seen in an unlucky order, has none.
constexpr std::size_t longest_path = std::size_t{1} << 20;
constexpr std::size_t deepest = 4096;  // that is looked for; what is deeper expires late

// Within this an open that was answered ESTALE has come back, or it has come to nothing.
constexpr std::chrono::seconds longest_retry{10};

// Not to look all the time for directories that are gone.
constexpr std::size_t least_swept = 64;

// Of nodes without a name that somebody may still be asking about.
constexpr std::size_t most_retired = 1024;

constexpr std::string_view shm_scheme = "shm://";

// To look is not to use: while this lives, reading leaves the time of access alone, where that may
// be asked for.
class Unnoticed {
 public:
  explicit Unnoticed(int fd) : fd_(fd), set_(fcntl(fd, F_SETFL, O_NOATIME) == 0) {}
  Unnoticed(const Unnoticed&) = delete;
  Unnoticed& operator=(const Unnoticed&) = delete;
  ~Unnoticed() {
    if (set_) fcntl(fd_, F_SETFL, 0);
  }

 private:
  int fd_;
  bool set_;
};

// The array in an open file; what is none is not there.
sharr::Info read_array(int fd, const struct stat& st, std::string_view uri = "") {
  const Unnoticed unnoticed(fd);
  try {
    return sharr::read_info(fd, st, uri);
  } catch (const sharr::FormatError&) {
    fail(ENOENT);
  }
}

struct stat stat_of(int fd) {
  struct stat st;
  if (fstat(fd, &st) != 0) fail(errno);
  return st;
}

// Whether somebody else has a file that the thread's process has closed. One that is just being
// started has copies for a moment, which are closed once it is; whoever closes a file that others
// keep waits for nothing, so not for long.
bool held_elsewhere(Where where, pid_t tid, const process::File& file) {
  bool starting = false;  // then its copies lose O_CLOEXEC before they are closed one by one
  for (int tries = 1;; ++tries) {
    const Holders holders = process::holders(where, tid, file);
    if (holders == Holders::none) return false;
    if (holders == Holders::some || holders == Holders::unknown) return true;
    starting = starting || holders == Holders::until_exec;
    if (tries >= (starting ? 200 : 20)) return true;
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
}

// For a line of the log.
std::string printable(std::string_view text) {
  std::string result;
  for (const char c : text) {
    const auto byte = static_cast<unsigned char>(c);
    result += byte < 0x20 || byte == 0x7F ? fmt::format("\\x{:02x}", byte) : std::string(1, c);
  }
  return result;
}

}  // namespace

bool is_foreign(int directory, const std::string& name) {
  // Twice: between the two looks an array may have come.
  const auto shown = [&] { return sharr::inspect(directory, name, "").has_value(); };
  return !shown() && is_there(directory, name) && !shown();
}

bool is_there(int directory, const std::string& name) {
  if (sharr::open_beneath(directory, name, O_PATH)) return true;
  if (errno == EACCES || errno == EMFILE || errno == ENFILE || errno == ENOMEM) fail(errno);
  return errno != ENOENT;
}

std::string self(int fd) { return fmt::format("/proc/self/fd/{}", fd); }

FileDescriptor reopen(int fd, int flags) {
  return FileDescriptor(::open(self(fd).c_str(), flags | O_CLOEXEC));
}

void fail(int errnum) { throw std::system_error(errnum, std::generic_category()); }

FileSystem::FileSystem(FileDescriptor source, std::string prefix, bool direct_io)
    : source_(std::move(source)), prefix_(std::move(prefix)), direct_io_(direct_io) {
  auto root = std::make_shared<Node>();
  root->id = FUSE_ROOT_ID;
  root->directory = true;
  root->key = key_of(stat_of(source_.get()));
  FileDescriptor copy(fcntl(source_.get(), F_DUPFD_CLOEXEC, 0));
  if (!copy) fail(errno);
  root->fd = std::make_shared<const FileDescriptor>(std::move(copy));
  root->lookups = 1;  // the kernel never forgets it
  if (prefix_.starts_with(shm_scheme) && prefix_ != shm_scheme) {
    shm_ = sharr::open_directory(sharr::Name::directory(std::string(shm_scheme)));
  }
  nodes_.emplace(root->id, root);
  ids_.emplace(root->key, root->id);
}

FileSystem::~FileSystem() {
  // The kernel does not release what is open when the mount goes.
  for (const auto& [id, node] : nodes_) {
    for (Handle* const handle : std::exchange(node->handles, {})) delete handle;
  }
}

bool FileSystem::passes_through() const noexcept {
  if (direct_io_) {
    errno = 0;
    return false;
  }
  FileDescriptor probe(openat(source_.get(), ".", O_TMPFILE | O_RDWR | O_CLOEXEC, 0600));
  if (!probe) {
    // Any file there says as much.
    try {
      for (const Entry& entry : sharr::scan(source_.get(), prefix_)) {
        if (!entry.info || probe) continue;
        probe = sharr::open_beneath(source_.get(), entry.name, O_RDONLY);
      }
    } catch (const sharr::Error&) {
      probe = FileDescriptor();
    }
  }
  if (!probe) probe = FileDescriptor(memfd_create("sharrfs", MFD_CLOEXEC));
  if (!probe) return false;
  const int id = passthrough::open(session_, probe.get());
  if (id == 0) return false;
  passthrough::close(session_, id);
  return true;
}

// Nodes

FileSystem::Key FileSystem::key_of(const struct stat& st) {
  return {st.st_dev, st.st_ino, S_ISDIR(st.st_mode)};
}

FileSystem::NodePtr FileSystem::find(fuse_ino_t id, fuse_req_t request, int access) {
  if (id == FUSE_ROOT_ID) follow_source();
  NodePtr node;
  {
    const std::lock_guard lock(mutex_);
    const auto found = nodes_.find(id);
    if (found == nodes_.end()) fail(ESTALE);
    node = found->second;
  }
  // The kernel may have let it pass by the rights of what the root was before.
  if (id == FUSE_ROOT_ID && followed_ && request != nullptr &&
      !may(request, open_directory(node)->get(), access)) {
    fail(errno);
  }
  return node;
}

void FileSystem::follow_source() {
  if (!shm_) return;
  NodePtr root;
  struct stat was;
  {
    const std::lock_guard lock(mutex_);
    root = nodes_.at(FUSE_ROOT_ID);
    if (!is_gone(*root)) return;
    was = stat_of(root->fd->get());
  }
  // Beneath that nothing is mounted, this mount least of all, which would ask itself.
  FileDescriptor now =
      sharr::open_beneath(shm_.get(), prefix_.substr(shm_scheme.size()), O_PATH | O_DIRECTORY);
  if (!now) return;
  const struct stat st = stat_of(now.get());
  if (st.st_uid != was.st_uid) return;  // whoever has taken its name
  const Key key = key_of(st);
  std::vector<NodePtr> lost;
  {
    const std::unique_lock tree(tree_mutex_);
    const std::lock_guard lock(mutex_);
    if (!is_gone(*root)) return;
    for (const auto& [id, node] : nodes_) {
      if (node->parent == root || (node != root && node->key == key)) lost.push_back(node);
    }
    // What was allowed in the old one is not in another; it is ENOENT now.
    const auto old = std::make_shared<Node>();
    old->id = next_id_++;
    old->directory = true;
    old->key = root->key;
    old->name = "(removed)";
    old->parent = root;
    for (const NodePtr& node : lost) {
      unwatch(*node);
      node->fd.reset();  // of the new root, if it was seen in the old one
      holding_.erase(node);
      if (node->writing) {
        unplace(*node);
      } else if (node->placed) {
        retire(node);
      }
      if (node->parent == root) node->parent = old;
    }
    unwatch(*root);
    ids_.erase(root->key);
    ids_[key] = root->id;
    root->key = key;
    old->fd = std::exchange(root->fd, std::make_shared<const FileDescriptor>(std::move(now)));
    root->listing.reset();
    ++root->changes;
    watch(root);
    followed_ = true;
  }
  expire_attributes(FUSE_ROOT_ID);
  expire_names_of(lost);
}

std::string FileSystem::path_of(const NodePtr& node) {
  const std::lock_guard lock(mutex_);
  return path_from(*nodes_.at(FUSE_ROOT_ID), *node);
}

std::string FileSystem::path_from(const Node& above, const Node& node) {
  std::vector<const std::string*> names;
  std::size_t length = 0;
  for (const Node* at = &node; at != &above; at = at->parent.get()) {
    names.push_back(&at->name);
    length += at->name.size() + 1;
    if (length > longest_path) fail(ENAMETOOLONG);
  }
  if (names.empty()) return ".";
  std::string path;
  path.reserve(length);
  while (!names.empty()) {
    if (!path.empty()) path += '/';
    path += *names.back();
    names.pop_back();
  }
  return path;
}

std::string FileSystem::prefix_of(const NodePtr& directory) {
  const std::string path = path_of(directory);
  return path == "." ? prefix_ : prefix_ + path + "/";
}

void FileSystem::bind(Node& node, const Key& key) {
  if (node.key == key) return;
  const auto old = ids_.find(node.key);
  if (old != ids_.end() && old->second == node.id) ids_.erase(old);
  node.key = key;
  ids_.try_emplace(key, node.id);  // where the file has a node already, it now has two
}

FileDescriptor FileSystem::open_node(const NodePtr& node, int flags, struct stat& st) {
  if (const WritingPtr draft = writing(node)) {
    FileDescriptor fd = reopen(draft->draft.fd(), flags);
    if (!fd) fail(errno);
    st = stat_of(fd.get());
    return fd;
  }
  FileDescriptor fd;
  if (node->directory) {
    fd = sharr::open_beneath(open_directory(node)->get(), ".", flags);
    if (!fd) fail(errno);
    st = stat_of(fd.get());
    return fd;
  }
  const auto [parent, name] = place_of(node);
  fd = sharr::open_beneath(open_directory(parent)->get(), name, flags);
  const int errnum = errno;
  if (fd) st = stat_of(fd.get());
  FileDescriptor open;
  {
    const std::lock_guard lock(mutex_);
    const bool same = fd && key_of(st) == node->key;
    if (same || node->handles.empty()) {
      if (!fd) fail(errnum);
      if (!S_ISREG(st.st_mode)) fail(ESTALE);
      bind(*node, key_of(st));
      // It may have been retired while the name was away.
      if (!node->placed && nodes_.contains(node->id)) place(node, parent, name);
      return fd;
    }
    open = FileDescriptor(fcntl(node->handles.front()->fd.get(), F_DUPFD_CLOEXEC, 0));
  }
  // Not with the lock, and no lease of somebody's is waited for, which whoever has it may keep.
  if (open) fd = reopen(open.get(), flags | O_NONBLOCK);
  if (!open || !fd) fail(errno);
  st = stat_of(fd.get());
  return fd;
}

FileSystem::DirectoryPtr FileSystem::open_directory(const NodePtr& node) {
  DirectoryPtr from;
  std::string path;
  {
    const std::lock_guard lock(mutex_);
    if (node->fd) return node->fd;
    const Node* above = node.get();
    for (std::size_t depth = 0; !above->fd; above = above->parent.get()) {
      if (++depth > longest_path) fail(ENAMETOOLONG);
    }
    from = above->fd;
    path = path_from(*above, *node);
  }
  FileDescriptor fd = sharr::open_beneath(from->get(), path, O_PATH | O_DIRECTORY);
  if (!fd) fail(errno);
  if (key_of(stat_of(fd.get())) != node->key) fail(ESTALE);
  return std::make_shared<const FileDescriptor>(std::move(fd));
}

void FileSystem::hold(const NodePtr& node, FileDescriptor fd) {
  if (until_sweep_ > 0) --until_sweep_;
  rlimit limit{};
  getrlimit(RLIMIT_NOFILE, &limit);
  if (static_cast<rlim_t>(fd.get()) > limit.rlim_cur / 2) return;
  node->fd = std::make_shared<const FileDescriptor>(std::move(fd));
  holding_.insert(node);
  watch(node);
}

// Directories may be gone without anybody having told.
void FileSystem::sweep() {
  std::set<NodePtr> gone;
  std::vector<NodePtr> within;
  {
    const std::lock_guard lock(mutex_);
    if (until_sweep_ > 0) return;
    for (const NodePtr& node : holding_) {
      if (is_gone(*node)) gone.insert(node);
    }
    until_sweep_ = holding_.size() - gone.size() + std::max(least_swept, nodes_.size() / 16);
    if (gone.empty()) return;
    within = all_within(gone);
    for (const NodePtr& node : within) {
      if (erasable(*node)) erase(node);
    }
  }
  prune(within);
}

bool FileSystem::is_gone(const Node& directory) {
  struct stat st;
  return directory.fd && fstat(directory.fd->get(), &st) == 0 && st.st_nlink == 0;
}

// These directories, and what was seen in them.
std::vector<FileSystem::NodePtr> FileSystem::all_within(
    const std::set<NodePtr>& directories) const {
  std::vector<NodePtr> result;
  for (const auto& [id, node] : nodes_) {
    std::size_t depth = 0;
    for (const NodePtr* at = &node; *at && ++depth < deepest; at = &(*at)->parent) {
      if (!directories.contains(*at)) continue;
      result.push_back(node);
      break;
    }
  }
  return result;
}

std::pair<FileSystem::NodePtr, std::string> FileSystem::place_of(const NodePtr& node) {
  const std::lock_guard lock(mutex_);
  return {node->parent, node->name};
}

struct stat FileSystem::stat_node(const NodePtr& node) {
  if (const WritingPtr draft = writing(node)) {
    if (const auto old = is_unopened(node) ? overwritten(node) : std::nullopt) return *old;
    struct stat st = stat_of(draft->draft.fd());
    st.st_nlink =
        std::max<nlink_t>(st.st_nlink, 1);  // what a program that has a name for it expects
    return st;
  }
  const auto stat_directory = [](int fd) {
    struct stat st = stat_of(fd);
    // The kernel goes by that alone. Who opens a file is asked for; see may().
    st.st_mode = sharr::mode_within_acl(fd, st.st_mode, "");
    return st;
  };
  {
    const std::lock_guard lock(mutex_);
    if (node->fd) return stat_directory(node->fd->get());
    if (!node->handles.empty()) return stat_of(node->handles.front()->fd.get());
  }
  if (node->directory) return stat_directory(open_directory(node)->get());
  struct stat st;
  open_node(node, O_PATH, st);
  return st;
}

struct stat FileSystem::presented(struct stat st) const {
  // A program that was written through a mount must not run with its owner's rights.
  if (S_ISREG(st.st_mode)) st.st_mode &= ~static_cast<mode_t>(S_ISUID | S_ISGID);
  st.st_blksize = sharr::mount_block_size;
  return st;
}

fuse_entry_param FileSystem::entry_of(const NodePtr& node, const struct stat& st, double name,
                                      double attributes) {
  fuse_entry_param reply{};
  reply.attr = presented(st);
  reply.ino = node->id;
  reply.entry_timeout = name;
  reply.attr_timeout = attributes;
  if (name > 0) node->epoch = epoch_;
  ++node->lookups;
  return reply;
}

std::optional<fuse_entry_param> FileSystem::enter(const NodePtr& parent, const std::string& name) {
  // The look itself cannot tell this from a name that is not there.
  if (name.size() > NAME_MAX) fail(ENAMETOOLONG);
  const std::shared_lock tree(tree_mutex_);
  const DirectoryPtr directory = open_directory(parent);
  const std::string prefix = prefix_of(parent);
  const std::uint64_t changes = changes_of(parent);
  std::optional<Entry> entry;
  FileDescriptor fd;
  do {
    entry = sharr::inspect(directory->get(), name, prefix);
    if (!entry) return {};
    fd = FileDescriptor();
    if (!entry->info) fd = sharr::open_beneath(directory->get(), name, O_PATH | O_DIRECTORY);
  } while (fd && key_of(stat_of(fd.get())) != key_of(entry->st));  // another one by now
  if (fd) {
    entry->st.st_mode = sharr::mode_within_acl(fd.get(), entry->st.st_mode, "");
    sweep();
  }
  std::unique_lock lock(mutex_);
  auto [node, added] = node_of(entry->st);
  // The root has no name, even if a bind mount or a race shows it below itself.
  if (node->id == FUSE_ROOT_ID) return entry_of(node, entry->st);
  if (remembered_elsewhere(*node, parent, name)) {
    // Inotify will tell, but whoever sees it here must not see it there any more.
    unplace(*node);
    lock.unlock();
    expire_names_of({node});
    lock.lock();
    std::tie(node, added) = node_of(entry->st);
  }
  if (added && node->directory) hold(node, std::move(fd));
  place(node, parent, name);
  const double time = name_time(*node, entry->st, changes);
  // What is in a directory has changed its times before it was watched, maybe.
  const bool steady = time > 0 && !(added && node->directory);
  return entry_of(node, entry->st, time, steady ? attribute_time(*node, entry->st) : 0);
}

std::pair<FileSystem::NodePtr, bool> FileSystem::node_of(const struct stat& st) {
  const Key key = key_of(st);
  const auto [known, added] = ids_.try_emplace(key, next_id_);
  if (!added) return {nodes_.at(known->second), false};
  auto node = std::make_shared<Node>();
  node->id = next_id_++;
  node->directory = S_ISDIR(st.st_mode);
  node->key = key;
  nodes_.emplace(node->id, node);
  return {std::move(node), true};
}

void FileSystem::moved(const std::vector<NodePtr>& nodes, const struct stat& st,
                       const NodePtr& parent, const std::string& name) {
  for (const NodePtr& node : nodes) place(node, parent, name);
  const auto known = ids_.find(key_of(st));
  if (known == ids_.end() || known->second == FUSE_ROOT_ID) return;
  place(nodes_.at(known->second), parent, name);
}

void FileSystem::forget(fuse_ino_t id, std::uint64_t count) {
  const std::lock_guard lock(mutex_);
  drop(id, count);
}

void FileSystem::drop(fuse_ino_t id, std::uint64_t count) {
  const auto found = nodes_.find(id);
  if (found == nodes_.end() || id == FUSE_ROOT_ID) return;
  Node& node = *found->second;
  node.lookups -= std::min(count, node.lookups);
  if (node.lookups == 0) erase(NodePtr(found->second));
}

void FileSystem::erase(const NodePtr& node) {
  const auto known = ids_.find(node->key);
  if (known != ids_.end() && known->second == node->id) ids_.erase(known);
  drafts_.erase(node);
  holding_.erase(node);
  unplace(*node);
  unwatch(*node);
  node->lookups = 0;
  nodes_.erase(node->id);
  forgotten_.notify_all();
}

// To what the kernel finds by a name that it remembers there has to be an answer: an open with
// O_TRUNC takes one ESTALE only, which it needs; see start_overwriting().
bool FileSystem::erasable(const Node& node) const {
  return node.handles.empty() && !node.writing && !remembered(node);
}

// A node has lost its name. The kernel may remember it for as long as it does not want the memory,
// but what it asks of it then is of no use to anybody, except who has it open.
void FileSystem::retire(const NodePtr& node) {
  unplace(*node);
  retired_.push_back(node->id);
  if (retired_.size() <= most_retired) return;
  const auto found = nodes_.find(retired_.front());
  retired_.pop_front();
  if (found == nodes_.end() || found->second->placed) return;
  const NodePtr oldest = found->second;
  if (!erasable(*oldest)) {
    retired_.push_back(oldest->id);
  } else if (!oldest->directory || is_gone(*oldest)) {
    erase(oldest);
  }
}

std::optional<sharr::Info> FileSystem::info_of(const NodePtr& node, fuse_req_t reader) {
  if (is_unopened(node)) fail(ESTALE);
  if (unpublished(node)) return {};
  struct stat st;
  const FileDescriptor fd = open_node(node, O_RDONLY, st);
  if (reader != nullptr && !may(reader, fd.get(), R_OK)) fail(errno);
  return read_array(fd.get(), st, prefix_ + path_of(node));
}

// Open files

std::pair<std::unique_ptr<FileSystem::Handle>, int> FileSystem::open_handle(const NodePtr& node,
                                                                            int flags) {
  auto opened = std::make_unique<Handle>();
  opened->node = node;
  opened->writable = (flags & O_ACCMODE) != O_RDONLY;
  const int access = opened->writable ? O_RDWR : O_RDONLY;
  while (true) {
    const WritingPtr draft = writing(node);
    struct stat st;
    std::optional<sharr::Info> info;
    if (draft) {
      opened->fd = reopen(draft->draft.fd(), access);
      // Whoever makes a file may write it, whatever its mode says from then on.
      if (!opened->fd) opened->fd = FileDescriptor(fcntl(draft->draft.fd(), F_DUPFD_CLOEXEC, 0));
      if (!opened->fd) fail(errno);
      st = stat_of(opened->fd.get());
    } else {
      opened->fd = open_node(node, access, st);
      info = read_array(opened->fd.get(), st);
    }
    const std::lock_guard lock(mutex_);
    if (node->writing != draft) continue;  // published in between
    const bool first = node->handles.empty();
    if (first) bind(*node, key_of(st));
    if (key_of(st) != node->key) continue;  // another thread was first to open another file
    if (info && opened->writable && !written(*node)) {
      // The last writer's close may have undone what was read.
      const struct stat now = stat_of(opened->fd.get());
      const bool same = now.st_size == st.st_size && now.st_ctim.tv_sec == st.st_ctim.tv_sec &&
                        now.st_ctim.tv_nsec == st.st_ctim.tv_nsec;
      if (!same) info = read_array(opened->fd.get(), now);
      remember(*node, opened->fd.get(), now, *info);
    }
    if (first && !direct_io_) node->backing_id = passthrough::open(session_, opened->fd.get());
    node->handles.push_back(opened.get());
    // Writes that pass through may go beyond the end, which there must be the trailer.
    opened->passthrough =
        node->backing_id != 0 && !(opened->writable && info && info->format == "SharedArray");
    const int backing_id = opened->passthrough ? node->backing_id : 0;
    return {std::move(opened), backing_id};
  }
}

// Undoes what writes that the kernel passed through have done to the array as such: a header that
// is none any more, and what they have added behind the end. A file that has become another array
// since, as when somebody wrote it anew beside the mount, is left alone.
bool FileSystem::repair(const Handle& handle) noexcept {
  const Node& node = *handle.node;
  const int fd = handle.fd.get();
  struct stat st;
  if (node.writing || fstat(fd, &st) != 0 || st.st_size < node.size) return false;
  bool restored = false;
  try {
    struct stat unbounded = st;
    unbounded.st_size = std::numeric_limits<off_t>::max();  // a header, whatever it promises
    const sharr::Info info = read_array(fd, unbounded);
    if (info.offset + info.nbytes != node.data_end) return false;
  } catch (const std::exception&) {
    const auto size = static_cast<ssize_t>(node.header.size());
    if (size == 0) return false;
    if (pwrite(fd, node.header.data(), node.header.size(), 0) != size) {
      fuse_log(FUSE_LOG_ERR, "%s: its header is overwritten, and cannot be restored: %s\n",
               printable(node.name).c_str(), strerror(errno));
      return false;
    }
    restored = true;
    fuse_log(FUSE_LOG_NOTICE, "%s: its header was overwritten, and is restored\n",
             printable(node.name).c_str());
  }
  if (st.st_size <= node.size) return restored;
  if (ftruncate(fd, node.size) == 0) return true;
  fuse_log(FUSE_LOG_ERR, "%s: cannot remove what was written beyond its end: %s\n",
           printable(node.name).c_str(), strerror(errno));
  return restored;
}

// Notes what repair() goes by. mutex_ is held, and nobody has the array open for writing, or it is
// a draft still.
void FileSystem::remember(Node& node, int fd, const struct stat& st, const sharr::Info& info) {
  node.size = st.st_size;
  node.data_end = info.offset + info.nbytes;
  node.header.resize(info.offset);  // an object of the SharedArray package has none
  const Unnoticed unnoticed(fd);
  const ssize_t n = pread(fd, node.header.data(), node.header.size(), 0);
  if (n != static_cast<ssize_t>(node.header.size())) node.header.clear();
}

// The others looked at are those who can have it from this one: what the process has started, or,
// when it has the file from somebody itself, everybody. family: who of the former has it.
bool FileSystem::last_close(const Handle& closed, pid_t tid, const Writing& writing, off_t size,
                            Holders family) {
  const NodePtr& node = closed.node;
  // By a path to one of the descriptors, as in /proc, anybody may have opened it.
  bool opened_again = false;
  {
    const std::lock_guard lock(mutex_);
    for (const Handle* other : node->handles) {
      if (other == &closed || !other->writable) continue;
      if (other->closed == Handle::Clock::time_point{}) return false;
      opened_again = true;
    }
  }
  // What nobody has written yet may be left to whoever came by the file in any way. Of parts of a
  // page that cannot be seen.
  const bool whole = !writing.grown && lseek(writing.draft.fd(), 0, SEEK_HOLE) >= size;
  const bool his = whole && !opened_again && process::same(tid, writing.opener);
  const process::File file{.mount = mount_, .inode = std::get<1>(node->key)};
  if (!his) return !held_elsewhere(Where::everywhere, tid, file);
  if (family == Holders::none || family == Holders::unknown) return family == Holders::none;
  return !held_elsewhere(Where::family, tid, file);
}

// Whether somebody has closed another open file of the node that may hold a lock.
bool FileSystem::others_are_closing(const Handle& handle) {
  const std::lock_guard lock(mutex_);
  return std::ranges::any_of(handle.node->handles, [&](const Handle* other) {
    return other != &handle && other->locked && other->closing();
  });
}

void FileSystem::close(std::unique_ptr<Handle> handle) noexcept {
  const NodePtr node = handle->node;
  bool repaired = false;
  bool draft = false;
  {
    const std::lock_guard lock(mutex_);
    std::erase(node->handles, handle.get());
    // The kernel may have the same open file as that which it passes reads and writes to.
    if (handle->locked) ::flock(handle->fd.get(), LOCK_UN);
    if (handle->writable) repaired = repair(*handle);
    std::erase_if(node->lock_owners, [&](auto& owner) {
      if (owner.second->through != handle.get()) return false;
      if (owner.second.use_count() == 1) return true;
      // Another thread waits for a lock, by a handle that is open while it does.
      owner.second->through = node->handles.empty() ? nullptr : node->handles.front();
      return false;
    });
    if (node->handles.empty()) {
      node->header = std::string();
      if (node->backing_id != 0) passthrough::close(session_, std::exchange(node->backing_id, 0));
    }
    draft = node->handles.empty() && node->writing;
    if (draft) node->writing->left = ++left_;
  }
  if (repaired) expire_attributes(node->id);
  if (draft) settle(node);
}

// Files that are being written

FileSystem::WritingPtr FileSystem::writing(const NodePtr& node) {
  const std::lock_guard lock(mutex_);
  return node->writing;
}

FileSystem::Unpublished FileSystem::unpublished(const NodePtr& node) {
  return Unpublished(writing(node));
}

// Whether a node is of a draft that was made for a thread that has not opened it yet; see
// start_overwriting(). To anything but that it does not exist: answered ESTALE, the thread finds
// what has the name.
bool FileSystem::is_unopened(const NodePtr& node) {
  const std::lock_guard lock(mutex_);
  return node->writing && node->handles.empty();
}

// By key, because the kernel may have forgotten the directory and looked it up anew.
bool FileSystem::is_at(const Node& draft, const Node& parent, const std::string& name) {
  return draft.parent->key == parent.key && draft.name == name;
}

// Makes the node of a draft. EEXIST when O_EXCL forbids it because of another.
FileSystem::NodePtr FileSystem::start_writing(const NodePtr& parent, const std::string& name,
                                              WritingPtr writing) {
  auto node = std::make_shared<Node>();
  node->directory = false;
  node->key = key_of(stat_of(writing->draft.fd()));
  node->parent = parent;
  node->name = name;
  node->writing = std::move(writing);
  const std::lock_guard lock(mutex_);
  purge_truncations();
  if (node->writing->exclusive && std::ranges::any_of(drafts_, [&](const NodePtr& other) {
        return is_at(*other, *parent, name);
      })) {
    fail(EEXIST);
  }
  node->id = next_id_++;
  nodes_.emplace(node->id, node);
  ids_[node->key] = node->id;  // the inode of a file that is gone may be used again
  drafts_.insert(node);
  return node;
}

FileSystem::Replaced::Replaced(int fd)
    : key(key_of(stat_of(fd))), rights(sharr::rights_of(fd, "")) {
  struct statx st;
  constexpr int flags = AT_EMPTY_PATH | AT_STATX_DONT_SYNC;
  if (statx(fd, "", flags, STATX_BTIME, &st) != 0) fail(errno);
  if ((st.stx_mask & STATX_BTIME) != 0) {
    born = {.tv_sec = st.stx_btime.tv_sec, .tv_nsec = st.stx_btime.tv_nsec};
    return;
  }
  kept = std::make_shared<const FileDescriptor>(reopen(fd, O_PATH));
  if (!*kept) fail(errno);
}

bool FileSystem::Replaced::same(const Replaced& other) const {
  return key == other.key && born.tv_sec == other.born.tv_sec && born.tv_nsec == other.born.tv_nsec;
}

// A draft is to take the place of an array. As open(2) with O_TRUNC has it, whoever may write the
// file may do this, and owner and mode stay. publishing_ is held.
void FileSystem::set_replaced(Writing& writing, Replaced old) {
  if (!sharr::inherit(old.rights, writing.draft.fd(), "")) fail(EPERM);
  writing.replaces = std::move(old);
}

// The array to be replaced has these rights now. What it has got since it was known is meant for
// what has its name; otherwise what the draft has of its own stays. publishing_ is held.
void FileSystem::take_rights(Writing& writing, const sharr::Rights& now, const std::string& uri) {
  const int fd = writing.draft.fd();
  const sharr::Rights& before = writing.replaces->rights;
  const sharr::Rights own = sharr::rights_of(fd, uri);
  const auto has = [&](int what) { return (writing.set & what) != 0; };
  sharr::Rights rights = now;
  if (has(FUSE_SET_ATTR_UID) && now.uid == before.uid) rights.uid = own.uid;
  if (has(FUSE_SET_ATTR_GID) && now.gid == before.gid) rights.gid = own.gid;
  const bool same_mode = now.mode == before.mode && now.acl == before.acl;
  const bool own_mode = same_mode && has(FUSE_SET_ATTR_MODE);
  // By its name its owner may say what is less for the draft of another, not what is more.
  const bool anothers = rights.uid != now.uid;
  const bool lost_group = anothers && now.gid != before.gid && own.gid == before.gid;
  if (own_mode || (same_mode && writing.created) || anothers) {
    // A group that is not to be had stays what it was when the mode was set.
    if (!anothers && (own.uid != rights.uid || own.gid != rights.gid) &&
        fchown(fd, rights.uid, rights.gid) != 0 && own.uid != rights.uid) {
      throw sharr::Error(EPERM, uri);
    }
    if (writing.given || !own_mode || lost_group) sharr::grant_no_more(rights, fd, uri);
  } else if (rights != own && !sharr::inherit(rights, fd, uri)) {
    throw sharr::Error(EPERM, uri);
  }
  writing.given = false;
}

// What is to take the place of an array, which is open as old (O_PATH).
FileSystem::WritingPtr FileSystem::replacement(int directory, const std::string& uri, int old,
                                               const fuse_ctx& caller) {
  auto writing = std::make_shared<Writing>(directory, uri, mode_t{0600}, caller);
  set_replaced(*writing, Replaced(old));
  return writing;
}

// What has the name of an array that the caller wants to overwrite, O_PATH; empty when nothing has.
FileDescriptor FileSystem::open_to_overwrite(int directory, const std::string& name,
                                             fuse_req_t request, int access) {
  FileDescriptor fd = sharr::open_beneath(directory, name, O_PATH);
  if (!fd && errno != ENOENT) fail(errno);
  if (fd && !S_ISREG(stat_of(fd.get()).st_mode)) fail(ENOENT);
  if (fd && !may(request, fd.get(), access)) fail(errno);
  return fd;
}

// Opens a published array with O_TRUNC, as far as that can be done before the kernel has looked the
// name up again. An open file belongs to the inode that the kernel has found, and the new array is
// another one. So OPEN answers ESTALE, upon which the kernel looks again, once; and to this thread,
// and for this once, the name is that of the draft.
//
// It looks no third time: what was begun then is in the thread's way until something shows that it
// has given up. Nobody sees that, because a draft looks like the file it is to replace until it is
// opened.
void FileSystem::start_overwriting(const NodePtr& node, fuse_req_t request, int access) {
  const pid_t tid = fuse_req_ctx(request)->pid;
  if (tid == 0)
    fail(EPERM);  // a process in a PID namespace out of sight cannot be told from others
  const auto [parent, name] = place_of(node);
  const std::lock_guard order(publishing_);
  WritingPtr writing;
  // What has the name now, by which the kernel will look again.
  const DirectoryPtr directory = open_directory(parent);
  const std::string uri = prefix_of(parent) + name;
  const FileDescriptor fd = open_to_overwrite(directory->get(), name, request, access);
  if (fd) {
    writing = replacement(directory->get(), uri, fd.get(), *fuse_req_ctx(request));
  } else {  // gone since the kernel looked; see go_on_overwriting()
    const AsCaller caller(request);
    writing =
        std::make_shared<Writing>(directory->get(), uri, mode_t{0600}, *fuse_req_ctx(request));
    writing->overwrites = true;
  }
  const NodePtr draft = start_writing(parent, name, std::move(writing));
  const std::lock_guard lock(mutex_);
  // Counts as a look-up: on its way the kernel looks more than once, and forgets in between.
  ++draft->lookups;
  truncations_.insert_or_assign(
      tid, Truncation{.draft = draft, .since = std::chrono::steady_clock::now()});
}

// The draft is opened. Where nothing had the name when it was begun, the array that the kernel has
// found meanwhile is the one to be replaced.
void FileSystem::go_on_overwriting(const NodePtr& draft, Writing& writing, fuse_req_t request,
                                   int access) {
  const auto [parent, name] = place_of(draft);
  const std::lock_guard order(publishing_);
  writing.overwrites = false;
  if (writing.replaces) return;
  const FileDescriptor fd = open_to_overwrite(open_directory(parent)->get(), name, request, access);
  // Without it it is gone again: a new one, of the caller alone.
  if (fd) set_replaced(writing, Replaced(fd.get()));
}

// A draft gives up what it has of its own.
void FileSystem::outdate(Writing& writing, int rights) {
  writing.set &= ~rights;
  if ((rights & FUSE_SET_ATTR_MODE) != 0) writing.created = false;
}

// A draft takes over what the array that it is to replace has got until now, if that still has the
// name; outdated: and gives up what it has of its own of that. publishing_ is held.
void FileSystem::catch_up(const NodePtr& draft, Writing& writing, int outdated) {
  const auto [parent, name] = place_of(draft);
  const FileDescriptor fd = sharr::open_beneath(open_directory(parent)->get(), name, O_PATH);
  if (!fd && errno != ENOENT && errno != ELOOP) fail(errno);
  if (!fd) return;
  Replaced now(fd.get());
  if (!now.same(*writing.replaces)) return;
  outdate(writing, outdated);
  take_rights(writing, now.rights, prefix_of(parent) + name);
  writing.replaces = std::move(now);
}

// A draft is about to get rights of its own, some of FUSE_SET_ATTR_UID, _GID and _MODE, which build
// upon what it has to take over. Returns which are the first of their kind.
int FileSystem::set_rights(const NodePtr& draft, Writing& writing, int rights) {
  const std::lock_guard order(publishing_);
  if (writing.replaces) catch_up(draft, writing, 0);
  const int first = rights & ~writing.set;
  writing.set |= rights;
  return first;
}

// They have not come about.
void FileSystem::unset_rights(Writing& writing, int rights) {
  const std::lock_guard order(publishing_);
  writing.set &= ~rights;
}

// An array has got such rights, by its name: a word later than what its drafts have got until now.
void FileSystem::outdate_rights(const struct stat& array, int rights) {
  std::vector<std::pair<NodePtr, WritingPtr>> drafts;  // may be the last to hold one
  const std::lock_guard order(publishing_);
  {
    const std::lock_guard lock(mutex_);
    for (const NodePtr& draft : drafts_) {
      const auto& replaces = draft->writing->replaces;
      if (replaces && replaces->key == key_of(array)) drafts.emplace_back(draft, draft->writing);
    }
  }
  for (const auto& [draft, writing] : drafts) {
    try {
      catch_up(draft, *writing, rights);
    } catch (const std::system_error&) {  // whoever closes it will hear, but for what was said now
      outdate(*writing, rights);
    }
  }
}

std::optional<struct stat> FileSystem::overwritten(const NodePtr& draft) {
  const auto [parent, name] = place_of(draft);
  const auto there = sharr::inspect(open_directory(parent)->get(), name, "");
  if (!there || !there->info) return {};
  struct stat st = there->st;
  st.st_ino = std::get<1>(draft->key);  // which the kernel keeps; see finish()
  return st;
}

std::optional<fuse_entry_param> FileSystem::enter_overwriting(const NodePtr& parent,
                                                              const std::string& name, pid_t tid) {
  NodePtr draft;
  {
    const std::lock_guard lock(mutex_);
    const auto found = truncations_.find(tid);
    if (found == truncations_.end()) return {};
    const Truncation& truncation = found->second;
    draft = truncation.draft;
    if (!is_at(*draft, *parent, name) || !draft->writing ||
        std::chrono::steady_clock::now() - truncation.since > longest_retry) {
      return {};
    }
  }
  const auto st = overwritten(draft);
  if (!st) return {};
  const std::lock_guard lock(mutex_);
  return entry_of(draft, *st);
}

// The thread opens a node, or does what shows that it has given up; then node is null. Whether that
// is the draft which was begun for it.
bool FileSystem::end_overwriting(const NodePtr& node, pid_t tid) {
  const std::lock_guard lock(mutex_);
  if (!node) insisting_.erase(tid);
  const auto found = truncations_.find(tid);
  if (found == truncations_.end()) return false;
  const Truncation truncation = found->second;
  truncations_.erase(found);
  if (truncation.draft != node) abandon(truncation.draft);
  drop(truncation.draft->id, 1);
  return truncation.draft == node;
}

// Those that came to nothing because the thread has ended on the way. mutex_ is held.
void FileSystem::purge_truncations() {
  std::erase_if(truncations_, [this](const auto& entry) {
    const bool gone = std::chrono::steady_clock::now() - entry.second.since > longest_retry ||
                      access(fmt::format("/proc/{}", entry.first).c_str(), F_OK) != 0;
    if (gone) {
      abandon(entry.second.draft);
      drop(entry.second.draft->id, 1);
    }
    return gone;
  });
}

// A draft that nobody has open and nobody will.
void FileSystem::abandon(const NodePtr& node) {
  if (!node->handles.empty()) return;
  drafts_.erase(node);
  node->writing.reset();
  drop(node->id, 0);  // where the kernel has it, it will forget it
}

void FileSystem::log_refusal(const NodePtr& node, const char* why) noexcept {
  try {
    fuse_log(FUSE_LOG_NOTICE, "%s: not published: %s\n", printable(prefix_ + path_of(node)).c_str(),
             printable(why).c_str());
  } catch (const std::exception& error) {  // a path longer than any line
    fuse_log(FUSE_LOG_NOTICE, "not published: %s\n", error.what());
  }
}

// A descriptor of a draft has been closed. If it was the last, the array appears now, or whoever
// closed it hears why not.
//
// A shell that redirects, and NumPy, close duplicates before and after the data is written, so the
// last has to be known: the process itself, and what it has started, is looked at each time,
// everybody when what is there is no array yet or when it may have the file from somebody itself.
// Should a descriptor be out of sight, say on its way through a socket, the answer is a guess, and
// settle() puts things right.
void FileSystem::finish(const Handle& closed, fuse_req_t request) {
  const NodePtr& node = closed.node;
  const WritingPtr writing = this->writing(node);
  if (!writing) return;
  const pid_t tid = fuse_req_ctx(request)->pid;  // 0 when it is in a PID namespace out of sight
  const process::File file{.mount = mount_, .inode = std::get<1>(node->key)};
  const std::lock_guard guard(writing->mutex);
  if (writing->published) return;
  const process::Ending ending = process::ending(tid);
  writing->killed = ending == process::Ending::killed;
  writing->refused = false;
  if (writing->killed) return;
  const Holders family = process::holders(Where::family, tid, file);
  if (family == Holders::some) return;
  std::optional<sharr::Info> info;
  for (bool waited = false; !info;) {
    try {
      info = writing->draft.check(writing->declared);
    } catch (const sharr::FormatError& error) {
      if (!waited) {
        const bool heard = tid != 0 && ending == process::Ending::none;
        if (!heard || held_elsewhere(Where::everywhere, tid, file)) return;
        waited = true;  // for somebody who has written the rest, maybe
        continue;
      }
      writing->refused = true;
      log_refusal(node, error.message().c_str());
      // Where a write has failed for that, this is what a program should hear that looks no further
      // than its last call.
      struct statvfs store;
      const bool full =
          fstatvfs(writing->draft.fd(), &store) == 0 && store.f_blocks > 0 && store.f_bavail == 0;
      if (full) fail(ENOSPC);
      throw;
    }
  }
  // Of a thread out of sight all that can be told now is whether there is room.
  const auto size = static_cast<off_t>(info->offset + info->nbytes);
  if (tid != 0 && !last_close(closed, tid, *writing, size, family)) return;
  try {
    writing->draft.reserve(*info);
    if (tid != 0) publish(node, *writing, request);
  } catch (const std::system_error& error) {
    writing->refused = true;
    log_refusal(node, error.what());
    throw;
  }
}

// Nobody has a draft open any more, unless somebody has opened it again meanwhile.
void FileSystem::settle(const NodePtr& node) noexcept {
  const WritingPtr writing = this->writing(node);
  if (!writing) return;
  const std::lock_guard guard(writing->mutex);
  const auto reopened = [&] {  // mutex_ is held
    if (node->handles.empty()) return false;
    writing->left = 0;
    return true;
  };
  {
    const std::lock_guard lock(mutex_);
    if (reopened()) return;
  }
  if (!writing->published && !writing->killed && !writing->refused) {
    try {
      writing->draft.reserve(writing->draft.check(writing->declared));
      publish(node, *writing, nullptr);
    } catch (const std::exception& error) {
      log_refusal(node, error.what());
    }
  }
  const std::lock_guard lock(mutex_);
  if (!writing->published && reopened()) return;
  drafts_.erase(node);
  node->writing.reset();
}

// Gives a draft its name. That was its opener's to give, which is what counts as long as there is
// what was there: nothing, or the array to be replaced. Otherwise the rights of whoever closes it
// do, if that is the same user: a program that exec(2) runs as another one closes what it knows
// nothing about. Whoever has put an array there gets no data. request: none when nobody closes it.
void FileSystem::publish(const NodePtr& node, Writing& writing, fuse_req_t request) {
  const auto [parent, name] = place_of(node);
  const std::string prefix = prefix_of(parent);
  const std::string uri = prefix + name;
  const DirectoryPtr directory = open_directory(parent);
  sharr::Info info = writing.draft.check(false);
  const bool asked = request != nullptr && fuse_req_ctx(request)->uid == writing.uid;
  const auto is_his = [&] { return may(request, directory->get(), W_OK | X_OK); };
  const auto give = [&] {
    if ((writing.set & FUSE_SET_ATTR_UID) == 0)
      give_to(request, writing.draft.fd(), directory->get());
  };
  // May be the last to hold an array: to free that takes time, and no lock.
  std::vector<FileDescriptor> seen;
  std::vector<std::optional<Replaced>> outdated;
  std::unique_lock order(publishing_);
  std::optional<Replaced> replaces, made;
  bool expected = false;
  for (bool done = false; !done;) {
    replaces.reset();
    const auto there = sharr::inspect(directory->get(), name, prefix);
    if (there && !there->info) throw sharr::Error(EISDIR, uri);
    if (there && !writing.exclusive) {
      const FileDescriptor& old =
          seen.emplace_back(sharr::open_beneath(directory->get(), name, O_PATH));
      if (!old && errno == ENOENT) continue;
      if (!old) throw sharr::Error(errno, uri);
      replaces.emplace(old.get());
      if (replaces->key != key_of(there->st)) continue;
      expected = writing.replaces && writing.replaces->same(*replaces);
      if (expected) {
        take_rights(writing, replaces->rights, uri);
      } else {
        if (!asked) throw sharr::Error(EEXIST, uri);
        if (geteuid() != 0 && writing.uid != geteuid()) throw sharr::Error(EACCES, uri);
        give();
      }
      made.emplace(writing.draft.fd());
      // Between this look and the rename another's may come, which only the kernel can tell: where
      // the owner's rights will do, these have to.
      const auto own = [&](const sharr::Rights& of) {
        return of.uid == fuse_req_ctx(request)->uid;
      };
      std::optional<AsCaller> caller;
      if (!expected ||
          (request != nullptr && own(replaces->rights) && own(made->rights) && is_his())) {
        caller.emplace(request);
      }
      writing.draft.publish(directory->get(), name, true);
      done = true;
      continue;
    }
    // Without the array that was to be replaced it is a new one, which its directory has to be
    // writable for.
    if (!there && writing.replaces) {
      if (!asked || !is_his()) throw sharr::Error(EACCES, uri);
      give();
    }
    made.emplace(writing.draft.fd());
    try {
      writing.draft.publish(directory->get(), name, false);
      done = true;
    } catch (const sharr::Error& error) {
      // Somebody has published an array in between: look again. Anything else is not replaced.
      if (error.errnum() != EEXIST || writing.exclusive || is_foreign(directory->get(), name)) {
        throw;
      }
    }
  }
  writing.published = true;
  const struct stat st = stat_of(writing.draft.fd());
  std::vector<NodePtr> replaced;
  {
    const std::lock_guard lock(mutex_);
    remember(*node, writing.draft.fd(), st, info);
    drafts_.erase(node);
    for (const NodePtr& other : drafts_) {
      Writing& next = *other->writing;
      // Who has put an array over another by his right to the directory has not had that open.
      const bool same = replaces ? expected && next.replaces && next.replaces->same(*replaces)
                                 : !next.replaces && !next.exclusive && next.uid == writing.uid;
      const bool here = is_at(*other, *parent, name);
      // Of those that nobody has open any more the one that was closed last is to stay.
      const bool earlier = next.left != 0 && (writing.left == 0 || next.left < writing.left);
      if (!same || !here || earlier) continue;
      if (!next.replaces && !next.overwrites) next.created = true;
      outdated.push_back(std::exchange(next.replaces, made));
      if ((next.set & FUSE_SET_ATTR_UID) == 0 &&
          made->rights.uid != stat_of(next.draft.fd()).st_uid) {
        next.given = true;
      }
      if (!replaces) continue;
      // What the old one had got meanwhile by its name stays a change.
      const sharr::Rights &known = outdated.back()->rights, &was = replaces->rights;
      const auto keep = [&](auto sharr::Rights::*part) {
        if (known.*part != was.*part) next.replaces->rights.*part = known.*part;
      };
      keep(&sharr::Rights::uid), keep(&sharr::Rights::gid);
      keep(&sharr::Rights::mode), keep(&sharr::Rights::acl);
    }
    node->writing.reset();
    ++parent->changes;
    replaced = placed_at(*parent, name);
    // Who hears of it by inotify, or has closed another, may have taken the name from the old one,
    // but not from the kernel yet.
    for (const fuse_ino_t id : retired_) {
      const auto found = nodes_.find(id);
      if (found == nodes_.end()) continue;
      const NodePtr& old = found->second;
      const bool here = old->parent == parent && old->name == name;
      if (!old->placed && here && remembered(*old)) replaced.push_back(old);
    }
    for (const NodePtr& old : replaced) {
      if (old->placed) retire(old);
    }
  }
  order.unlock();  // what follows may wait for the kernel
  // At once, and not when inotify tells: whoever looks after this sees it.
  expire_names_of(replaced);
  for (const NodePtr& old : replaced) expire_attributes(old->id);
  expire_attributes(parent->id);
}

}  // namespace sharrfs
