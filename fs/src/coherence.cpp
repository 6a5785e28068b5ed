// What the kernel may remember of names and attributes, and how it hears that they have changed.
//
// An answer says for how long the kernel may do without asking. It may when inotify tells of all
// that could make the answer wrong; then it is told:
//
// - FUSE_NOTIFY_INVAL_INODE: the attributes of an inode are to be asked for again.
// - FUSE_NOTIFY_PRUNE: an inode is to be forgotten, with all its names, unless somebody uses it.
//   That it was shows by a FORGET. Linux has this since 6.18 (FUSE 7.45).
// - FUSE_NOTIFY_INC_EPOCH: all names are to be looked up again. What is open, or is somebody's
//   working directory, then looks deleted to some programs, so that this is for what the other does
//   not reach. Linux has it since 6.16 (FUSE 7.44); before, nothing is remembered.
//
// FUSE_NOTIFY_INVAL_ENTRY is for one name, but waits for the lock of its directory, which is held
// by whoever waits for an answer of this daemon: killed while both wait, it could not die, and the
// mount would hang for ever.
//
// None of these waits for anything. What is not there is never remembered, so that a new name needs
// no word. What inotify does not tell ends with the time that was given: a store to a mapping sets
// the time of modification, a read that of access, and a file system may be mounted on a directory.
#include <fcntl.h>
#include <sys/inotify.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <sys/uio.h>
#include <sys/vfs.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <charconv>
#include <chrono>
#include <cstring>
#include <functional>

#include "file_system.hpp"
#include "node.hpp"

namespace sharrfs {
namespace {

// Of an answer that inotify watches over, in seconds.
constexpr double memory = 10;

// How often it is said again that names have changed, while the kernel may still be at work on a
// listing from before: in milliseconds, doubling.
constexpr int first_repeat = 4;
constexpr int last_repeat = static_cast<int>(memory * 1000);

// Linux's include/uapi/linux/fuse.h.
constexpr std::int32_t inc_epoch_code = 8;
constexpr unsigned inc_epoch_minor = 44;
constexpr std::int32_t prune_code = 9;
constexpr unsigned prune_minor = 45;
struct OutHeader {
  std::uint32_t length;
  std::int32_t error;  // of a notification, its code
  std::uint64_t unique;
};
struct Prune {
  OutHeader header;
  std::uint32_t count;  // of nodes, whose numbers follow
  std::uint32_t padding;
  std::uint64_t spare;
};

// Within this a FORGET has come, or somebody uses the inode. Whoever looks it up does so for a
// moment only, so that the kernel is asked more than once.
constexpr std::chrono::milliseconds patience{3};
constexpr std::chrono::milliseconds again{1};

// Whether all changes on the file system are made on this machine, past inotify.
bool is_local(int fd) {
  constexpr std::uint32_t known[] = {0x01021994,   // tmpfs
                                     0x858458F6,   // ramfs
                                     0x0000EF53,   // ext2, ext3, ext4
                                     0x58465342,   // xfs
                                     0x9123683E,   // btrfs
                                     0xF2F52010,   // f2fs
                                     0x794C7630};  // overlayfs
  struct statfs st;
  if (fstatfs(fd, &st) != 0) return false;
  return std::ranges::find(known, static_cast<std::uint32_t>(st.f_type)) != std::end(known);
}

// Which inode has a name, and how many names that has. What is mounted there is not asked: it may
// be this mount, which has to ask itself no question.
bool look(int directory, const std::string& name, struct stat& st) {
  struct statx found;
  constexpr int flags = AT_SYMLINK_NOFOLLOW | AT_NO_AUTOMOUNT | AT_STATX_DONT_SYNC;
  constexpr unsigned wanted = STATX_TYPE | STATX_INO | STATX_NLINK;
  if (statx(directory, name.c_str(), flags, wanted, &found) != 0) return false;
  st = {};
  st.st_dev = makedev(found.stx_dev_major, found.stx_dev_minor);
  st.st_ino = found.stx_ino;
  st.st_mode = found.stx_mode;
  st.st_nlink = found.stx_nlink;
  return true;
}

std::size_t place_hash(fuse_ino_t parent, std::string_view name) {
  return std::hash<std::string_view>{}(name) ^ (parent * 0x9E3779B97F4A7C15U);
}

}  // namespace

void FileSystem::start_watching() {
  if (!is_local(source_.get())) return;
  const auto handler = [this](const std::vector<Watches::Event>& events) {
    try {
      return noticed(events);
    } catch (const std::exception& error) {  // memory has run out
      fuse_log(FUSE_LOG_ERR, "no longer remembers names: %s\n", error.what());
      forget_everything();
      return -1;
    }
  };
  if (!watches_.start(handler)) {
    fuse_log(FUSE_LOG_NOTICE, "inotify: %s; names and attributes are not remembered\n",
             strerror(errno));
    return;
  }
  const std::lock_guard lock(mutex_);
  watch(nodes_.at(FUSE_ROOT_ID));
}

void FileSystem::remember_if(unsigned minor) {
  remembers_ = minor >= inc_epoch_minor;
  prunes_ = minor >= prune_minor;
}

void FileSystem::stop() {
  watches_.stop();
  lock_waiters_.stop();
}

void FileSystem::watch(const NodePtr& node) {
  if (!node->fd) return;
  node->watch = watches_.add(node->fd->get());
  if (node->watch >= 0) watched_[node->watch] = node->id;
}

void FileSystem::unwatch(Node& node) {
  if (node.watch < 0) return;
  watched_.erase(node.watch);
  watches_.remove(std::exchange(node.watch, -1));
}

// What is open for writing here changes all the time. And the kernel drops an answer during which
// it is told to ask again, so that lseek(2) would find an end that is none any more.
bool FileSystem::written(const Node& node) {
  return std::ranges::any_of(node.handles, [](const Handle* handle) { return handle->writable; });
}

double FileSystem::name_time(const Node& node, const struct stat& st, std::uint64_t changes) const {
  if (!holds(changes, *node.parent) || node.writing) return 0;
  // With a second name it may change where nobody looks.
  return node.directory || st.st_nlink == 1 ? memory : 0;
}

double FileSystem::attribute_time(const Node& node, const struct stat& st) const {
  if (!remembers_ || node.writing || written(node)) return 0;
  if (node.directory) return node.watch >= 0 ? memory : 0;
  const bool watched = node.placed && node.parent->watch >= 0 && st.st_nlink == 1;
  return watched ? memory : 0;
}

std::uint64_t FileSystem::changes_of(const NodePtr& directory) {
  const std::lock_guard lock(mutex_);
  return directory->changes;
}

bool FileSystem::holds(std::uint64_t changes, const Node& directory) const {
  return remembers_ && directory.watch >= 0 && directory.changes == changes;
}

bool FileSystem::remembered(const Node& node) const {
  return node.lookups > 0 && node.epoch >= expired_;
}

bool FileSystem::remembered_elsewhere(const Node& node, const NodePtr& parent,
                                      const std::string& name) const {
  // What has no name here any more may have one there for a moment.
  return remembered(node) && !(node.placed && node.parent == parent && node.name == name);
}

void FileSystem::place(const NodePtr& node, const NodePtr& parent, const std::string& name) {
  unplace(*node);
  node->parent = parent;
  node->name = name;
  places_.emplace(place_hash(parent->id, name), node->id);
  node->placed = true;
}

void FileSystem::unplace(Node& node) {
  if (!node.placed) return;
  node.placed = false;
  const auto [begin, end] = places_.equal_range(place_hash(node.parent->id, node.name));
  for (auto at = begin; at != end; ++at) {
    if (at->second != node.id) continue;
    places_.erase(at);
    return;
  }
}

std::vector<FileSystem::NodePtr> FileSystem::placed_at(const Node& parent,
                                                       const std::string& name) const {
  std::vector<NodePtr> result;
  const auto [begin, end] = places_.equal_range(place_hash(parent.id, name));
  for (auto at = begin; at != end; ++at) {
    const NodePtr& node = nodes_.at(at->second);
    if (node->parent.get() == &parent && node->name == name) result.push_back(node);
  }
  return result;
}

void FileSystem::expire_names() {
  std::uint64_t epoch = 0;
  {
    const std::lock_guard lock(mutex_);
    // Before the kernel's, so that what has this one has not an earlier one there.
    epoch = ++epoch_;
    if (listings_ > 0) repeat_ = true;
  }
  const OutHeader notification{.length = sizeof(OutHeader), .error = inc_epoch_code, .unique = 0};
  if (write(fuse_session_fd(session_), &notification, sizeof(notification)) < 0 &&
      errno != ENODEV && remembers_.exchange(false)) {  // ENODEV: unmounted
    fuse_log(FUSE_LOG_ERR, "cannot make the kernel forget names: %s\n", strerror(errno));
  }
  // Not before: whoever finds that a name need not expire any more answers its caller.
  const std::lock_guard lock(mutex_);
  expired_ = std::max(expired_, epoch);
}

void FileSystem::prune(const std::vector<NodePtr>& nodes) {
  if (nodes.empty() || !prunes_) return;
  // What has anything in it is in use, and was looked up before that, mostly.
  std::vector<std::uint64_t> ids(nodes.size());
  std::ranges::transform(nodes, ids.begin(), [](const NodePtr& node) { return node->id; });
  std::ranges::sort(ids, std::greater{});
  const std::size_t size = ids.size() * sizeof(ids[0]);
  Prune notification{.header = {.length = static_cast<std::uint32_t>(sizeof(Prune) + size),
                                .error = prune_code,
                                .unique = 0},
                     .count = static_cast<std::uint32_t>(ids.size()),
                     .padding = 0,
                     .spare = 0};
  const std::array<iovec, 2> message{iovec{.iov_base = &notification, .iov_len = sizeof(Prune)},
                                     iovec{.iov_base = ids.data(), .iov_len = size}};
  if (writev(fuse_session_fd(session_), message.data(), message.size()) < 0 && errno != ENODEV) {
    prunes_ = false;
  }
}

void FileSystem::expire_names_of(const std::vector<NodePtr>& nodes, std::vector<NodePtr> also) {
  // The kernel takes some microseconds for each, and whoever has other changes to see waits.
  constexpr std::size_t most = 500;
  also.insert(also.end(), nodes.begin(), nodes.end());
  {
    const std::lock_guard lock(mutex_);
    std::erase_if(also, [&](const NodePtr& node) { return node->lookups == 0; });  // it has none
  }
  if (also.size() > most) {
    expire_names();
    return;
  }
  prune(also);
  if (nodes.empty()) return;
  {
    std::unique_lock lock(mutex_);
    const auto forgotten = [&] {
      return std::ranges::none_of(nodes, [&](const NodePtr& node) { return remembered(*node); });
    };
    const bool in_use = std::ranges::any_of(
        nodes, [&](const NodePtr& node) { return remembered(*node) && !node->handles.empty(); });
    const auto end = std::chrono::steady_clock::now() + patience;
    while (prunes_ && !in_use && !forgotten_.wait_for(lock, again, forgotten) &&
           std::chrono::steady_clock::now() < end) {
      lock.unlock();
      prune(also);
      lock.lock();
    }
    if (forgotten()) return;
  }
  expire_names();
}

bool FileSystem::expire_attributes(fuse_ino_t id) const {
  // With an offset below 0, attributes only.
  return fuse_lowlevel_notify_inval_inode(session_, id, -1, 0) != -ENOENT;
}

void FileSystem::read_directory(const NodePtr& node, Directory& directory) {
  struct stat st;
  const sharr::FileDescriptor fd = open_node(node, O_PATH | O_DIRECTORY, st);
  directory.changes = changes_of(node);
  directory.items.reset();
  if (key_of(st) != directory.key) return;  // that was removed: there is nothing in it
  auto items = std::make_shared<Directory::Items>();
  {
    std::vector<sharr::Entry> entries = sharr::scan(fd.get(), prefix_of(node));
    items->reserve(entries.size() + 2);
    for (const char* name : {".", ".."}) items->push_back({.name = name, .st = st});
    for (sharr::Entry& entry : entries) {
      items->push_back({.name = std::move(entry.name), .st = entry.st});
    }
  }
  // Some megabytes for 10,000 arrays, so one for all who read the same.
  {
    const std::lock_guard lock(mutex_);
    directory.items = node->listing.lock();
  }
  if (directory.items && *directory.items == *items) return;
  directory.items = std::move(items);
  const std::lock_guard lock(mutex_);
  node->listing = directory.items;
}

void FileSystem::forget_everything() {
  remembers_ = false;
  expire_names();
  const std::lock_guard lock(mutex_);  // which no notification waits for
  for (const auto& [id, node] : nodes_) expire_attributes(id);
}

bool FileSystem::displaced(const NodePtr& node) {
  DirectoryPtr directory;
  std::string name;
  Key key;
  {
    const std::lock_guard lock(mutex_);
    if (!remembers_ || node->directory || node->handles.empty()) return false;
    directory = node->parent->fd;
    name = node->name;
    key = node->key;
  }
  struct stat st;
  return !directory || !look(directory->get(), name, st) || key_of(st) != key;
}

bool FileSystem::insists(pid_t tid) {
  constexpr std::size_t most = 1024;  // of those that never come back
  if (tid == 0) return true;          // in a PID namespace out of sight
  const std::lock_guard lock(mutex_);
  if (insisting_.erase(tid) > 0) return true;
  if (insisting_.size() >= most) insisting_.clear();
  insisting_.insert(tid);
  return false;
}

// The kernel makes names of a listing after it has taken the answer, and takes them for as new as
// that moment; so if any have expired in between, they have to once more. That it has done so shows
// when it asks for more, or closes.
void FileSystem::listed(Directory& directory) {
  if (!std::exchange(directory.in_kernel, true)) ++listings_;
}

void FileSystem::taken(Directory& directory) {
  bool repeat = false;
  {
    const std::lock_guard lock(mutex_);
    if (!std::exchange(directory.in_kernel, false)) return;
    --listings_;
    repeat = repeat_;
    if (listings_ == 0) repeat_ = false;
  }
  if (repeat) expire_names();
}

// Something has come to have a name.
void FileSystem::arrived(const NodePtr& directory, const std::string& name,
                         std::set<NodePtr>& changed, std::vector<NodePtr>& misnamed) {
  struct stat st;
  if (!look(directory->fd->get(), name, st)) return;
  const auto known = ids_.find(key_of(st));
  if (known == ids_.end() || known->second == FUSE_ROOT_ID) return;
  const NodePtr& node = nodes_.at(known->second);
  if (node->directory) {
    // For whoever is in it and looks up nothing, too.
    if (remembered_elsewhere(*node, directory, name)) misnamed.push_back(node);
    place(node, directory, name);
  } else if (st.st_nlink > 1) {
    // When a file gets a second name, the directory of the first is told nothing.
    changed.insert(node);
    misnamed.push_back(node);
  }
}

int FileSystem::noticed(const std::vector<Watches::Event>& events) {
  struct Look {
    NodePtr node;
    NodePtr parent;
    std::string name;
  };
  std::set<NodePtr> changed;
  std::vector<NodePtr> misnamed;
  std::vector<NodePtr> prunable;
  std::vector<Look> looks;
  std::map<NodePtr, DirectoryPtr> directories;
  bool expire = events.empty();
  {
    const std::unique_lock tree(tree_mutex_);
    const std::lock_guard lock(mutex_);
    purge_truncations();
    std::set<const Node*> looked_at;
    for (const auto& [watch, mask, name] : events) {
      if ((mask & IN_Q_OVERFLOW) != 0) {
        for (const auto& [id, node] : nodes_) {
          ++node->changes;
          if (written(*node)) continue;
          changed.insert(node);
          misnamed.push_back(node);
        }
        expire = true;
        continue;
      }
      const auto found = watched_.find(watch);
      if (found == watched_.end()) continue;  // forgotten
      const NodePtr directory = nodes_.at(found->second);
      ++directory->changes;
      if ((mask & IN_IGNORED) != 0) {  // it is gone
        watched_.erase(found);
        directory->watch = -1;
        expire = true;
      }
      constexpr std::uint32_t entries = IN_CREATE | IN_DELETE | IN_MOVED_FROM | IN_MOVED_TO;
      if (name.empty() || (mask & entries) != 0) changed.insert(directory);
      if (name.empty() || sharr::reserved(name)) continue;
      if ((mask & (IN_CREATE | IN_MOVED_TO)) != 0) arrived(directory, name, changed, misnamed);
      std::vector<NodePtr> concerned = placed_at(*directory, name);
      // To inotify a descriptor of what was made without a name has this one for ever.
      if (name.starts_with('#')) {
        ino_t inode = 0;
        std::from_chars(name.data() + 1, name.data() + name.size(), inode);
        const auto known = ids_.find({std::get<0>(directory->key), inode, false});
        if (known != ids_.end()) concerned.push_back(nodes_.at(known->second));
      }
      for (const NodePtr& node : concerned) {
        if (!written(*node)) changed.insert(node);
        constexpr std::uint32_t attributes_only = IN_ATTRIB | IN_ISDIR;
        if ((mask & ~attributes_only) == 0 || !node->placed) continue;
        if (!looked_at.insert(node.get()).second) continue;
        looks.push_back({.node = node, .parent = node->parent, .name = node->name});
        directories.try_emplace(node->parent, node->parent->fd);
      }
    }
  }
  // What is being put into the kernel has no inode there yet, but its name will be too old.
  for (const NodePtr& node : changed) {
    if (!expire_attributes(node->id)) misnamed.push_back(node);
  }
  for (const auto& [node, parent, name] : looks) {
    const DirectoryPtr& directory = directories.at(parent);
    std::optional<sharr::Entry> entry;
    try {
      if (directory) entry = sharr::inspect(directory->get(), name, "");
    } catch (const sharr::Error&) {  // no descriptor to look with: the name expires
    }
    const std::lock_guard lock(mutex_);
    if (entry && key_of(entry->st) == node->key) continue;
    misnamed.push_back(node);
    if (node->placed && node->parent == parent && node->name == name) retire(node);
  }
  {
    const std::lock_guard lock(mutex_);
    std::set<NodePtr> moved;
    for (const NodePtr& node : misnamed) {
      if (node->directory && !is_gone(*node)) moved.insert(node);
    }
    // Names in a directory keep the kernel from forgetting it.
    if (!moved.empty()) prunable = all_within(moved);
  }
  if (expire) expire_names();
  expire_names_of(misnamed, std::move(prunable));
  follow_source();
  const std::lock_guard lock(mutex_);
  if (!repeat_) return -1;
  repeat_after_ = events.empty() ? repeat_after_ * 2 : first_repeat;
  if (repeat_after_ > last_repeat) repeat_ = false;
  return repeat_ ? repeat_after_ : -1;
}

}  // namespace sharrfs
