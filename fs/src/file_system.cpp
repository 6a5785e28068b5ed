#include "file_system.hpp"

#include <fmt/format.h>
#include <linux/limits.h>
#include <sys/mman.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <exception>
#include <system_error>
#include <utility>

#include "caller.hpp"
#include "passthrough.hpp"

namespace sharrfs {

using sharr::Entry;
using sharr::FileDescriptor;

// An open file.
struct FileSystem::Handle {
  NodePtr node;
  FileDescriptor fd;
  bool writable = false;
  bool passthrough = false;
};

struct FileSystem::Node {
  fuse_ino_t id;
  bool directory;
  Key key;  // of a directory for good; of a file as bind() says
  std::uint64_t lookups = 0;
  // Where it was seen last.
  NodePtr parent;
  std::string name;
  // While it is open: one backing id for all, because the kernel has room for one.
  std::vector<Handle*> handles;
  int backing_id = 0;
  // When the file was opened first: its size, and where its data ended.
  off_t size = 0;
  std::uint64_t data_end = 0;
};

namespace {

constexpr std::string_view attribute_prefix = "user.sharr.";

[[noreturn]] void fail(int errnum) { throw std::system_error(errnum, std::generic_category()); }

struct Directory {
  std::vector<Entry> entries;
};

// The array in an open file; what is none is not there.
sharr::Info read_array(int fd, const struct stat& st) {
  try {
    return sharr::read_info(fd, st, "");
  } catch (const sharr::FormatError&) {
    fail(ENOENT);
  }
}

}  // namespace

// What libfuse calls. Each answers its request exactly once, with an errno for an exception.
struct FileSystem::Operations {
  static FileSystem& self(fuse_req_t request) {
    return *static_cast<FileSystem*>(fuse_req_userdata(request));
  }

  template <class F>
  static void answer(fuse_req_t request, F&& f) {
    int errnum = 0;
    try {
      f();
      return;
    } catch (const std::system_error& error) {
      errnum = error.code().value();
    } catch (const std::bad_alloc&) {
      errnum = ENOMEM;
    } catch (const std::exception& error) {
      fuse_log(FUSE_LOG_ERR, "%s\n", error.what());
      errnum = EIO;
    }
    fuse_reply_err(request, errnum);
  }

  static Handle& handle(fuse_file_info* file) { return *reinterpret_cast<Handle*>(file->fh); }

  static void init(void*, fuse_conn_info* conn) { passthrough::enable(conn); }

  static void lookup(fuse_req_t request, fuse_ino_t parent, const char* name) {
    answer(request, [&] {
      FileSystem& fs = self(request);
      const NodePtr directory = fs.find(parent);
      struct stat st;
      const FileDescriptor fd = fs.open_node(directory, O_PATH | O_DIRECTORY, st);
      const auto entry = sharr::inspect(fd.get(), name, fs.prefix_of(directory));
      if (!entry) fail(ENOENT);
      const fuse_entry_param reply = fs.add(directory, *entry);
      // An interrupted request was not delivered, so it will not be forgotten either.
      if (fuse_reply_entry(request, &reply) != 0) fs.forget(reply.ino, 1);
    });
  }

  static void forget(fuse_req_t request, fuse_ino_t id, std::uint64_t count) {
    self(request).forget(id, count);
    fuse_reply_none(request);
  }

  static void forget_multi(fuse_req_t request, size_t count, fuse_forget_data* forgets) {
    for (size_t i = 0; i < count; ++i) self(request).forget(forgets[i].ino, forgets[i].nlookup);
    fuse_reply_none(request);
  }

  static void getattr(fuse_req_t request, fuse_ino_t id, fuse_file_info*) {
    answer(request, [&] {
      FileSystem& fs = self(request);
      const struct stat st = fs.presented(fs.stat_node(fs.find(id)));
      fuse_reply_attr(request, &st, 0);
    });
  }

  static void open(fuse_req_t request, fuse_ino_t id, fuse_file_info* file) {
    answer(request, [&] {
      FileSystem& fs = self(request);
      // Both could only change the array's size.
      if ((file->flags & (O_TRUNC | O_APPEND)) != 0) fail(EPERM);
      const bool writable = (file->flags & O_ACCMODE) != O_RDONLY;
      const NodePtr node = fs.find(id);
      auto opened = std::make_unique<Handle>();
      opened->node = node;
      opened->writable = writable;
      int backing_id = 0;
      for (bool same = false; !same;) {
        struct stat st;
        opened->fd = fs.open_node(node, writable ? O_RDWR : O_RDONLY, st);
        sharr::Info info = read_array(opened->fd.get(), st);
        const std::lock_guard lock(fs.mutex_);
        if (node->handles.empty()) {
          fs.bind(*node, key_of(st));
          node->size = st.st_size;
          node->data_end = info.offset + info.nbytes;
          if (!fs.direct_io_) node->backing_id = passthrough::open(fs.session_, opened->fd.get());
        }
        same = key_of(st) == node->key;  // else another thread was first to open another file
        if (!same) continue;
        node->handles.push_back(opened.get());
        // Writes that pass through may go beyond the end, which there must be the trailer.
        opened->passthrough = node->backing_id != 0 && !(writable && info.format == "SharedArray");
        backing_id = opened->passthrough ? node->backing_id : 0;
      }
      file->fh = reinterpret_cast<std::uint64_t>(opened.get());
      Handle* const handle = opened.release();
      file->noflush = 1;  // there is nothing to flush: that saves each close(2) a round trip
      int failed = 0;
      if (backing_id != 0) {
        failed = passthrough::reply_open(request, file, backing_id);
      } else {
        // Never cached: the pages change without the kernel's FUSE side knowing.
        file->direct_io = 1;
        failed = fuse_reply_open(request, file);
      }
      if (failed != 0) fs.close(std::unique_ptr<Handle>(handle));
    });
  }

  static void release(fuse_req_t request, fuse_ino_t, fuse_file_info* file) {
    answer(request, [&] {
      self(request).close(std::unique_ptr<Handle>(&handle(file)));
      fuse_reply_err(request, 0);
    });
  }

  static void read(fuse_req_t request, fuse_ino_t, size_t size, off_t offset,
                   fuse_file_info* file) {
    answer(request, [&] {
      std::vector<char> buffer(size);
      const ssize_t n = pread(handle(file).fd.get(), buffer.data(), size, offset);
      if (n < 0) fail(errno);
      fuse_reply_buf(request, buffer.data(), static_cast<size_t>(n));
    });
  }

  static void write(fuse_req_t request, fuse_ino_t, const char* data, size_t size, off_t offset,
                    fuse_file_info* file) {
    answer(request, [&] {
      const int fd = handle(file).fd.get();
      struct stat st;
      if (fstat(fd, &st) != 0) fail(errno);
      // An array does not grow: what reaches beyond its end is not written.
      if (size > 0 && offset >= st.st_size) fail(EPERM);
      const auto fits = std::min(size, static_cast<size_t>(st.st_size - offset));
      const ssize_t n = pwrite(fd, data, fits, offset);
      if (n < 0) fail(errno);
      fuse_reply_write(request, static_cast<size_t>(n));
    });
  }

  static void fsync(fuse_req_t request, fuse_ino_t, int data_only, fuse_file_info* file) {
    const int fd = handle(file).fd.get();
    const int failed = data_only != 0 ? fdatasync(fd) : ::fsync(fd);
    fuse_reply_err(request, failed != 0 ? errno : 0);
  }

  static void lseek(fuse_req_t request, fuse_ino_t, off_t offset, int whence,
                    fuse_file_info* file) {
    const off_t found = ::lseek(handle(file).fd.get(), offset, whence);
    if (found < 0) {
      fuse_reply_err(request, errno);
    } else {
      fuse_reply_lseek(request, found);
    }
  }

  static void opendir(fuse_req_t request, fuse_ino_t, fuse_file_info* file) {
    answer(request, [&] {
      auto directory = std::make_unique<Directory>();
      file->fh = reinterpret_cast<std::uint64_t>(directory.get());
      if (fuse_reply_open(request, file) == 0) static_cast<void>(directory.release());
    });
  }

  static void readdir(fuse_req_t request, fuse_ino_t id, size_t size, off_t offset,
                      fuse_file_info* file) {
    answer(request, [&] {
      FileSystem& fs = self(request);
      Directory& directory = *reinterpret_cast<Directory*>(file->fh);
      if (offset == 0) {  // the start, or rewinddir
        const NodePtr node = fs.find(id);
        struct stat st;
        const FileDescriptor fd = fs.open_node(node, O_PATH | O_DIRECTORY, st);
        directory.entries = sharr::scan(fd.get(), fs.prefix_of(node));
        for (const char* name : {".", ".."}) {
          directory.entries.push_back(Entry{.name = name, .st = st, .info = {}});
        }
      }
      std::vector<char> buffer(size);
      size_t used = 0;
      for (auto i = static_cast<size_t>(offset); i < directory.entries.size(); ++i) {
        const Entry& entry = directory.entries[i];
        const size_t length =
            fuse_add_direntry(request, buffer.data() + used, size - used, entry.name.c_str(),
                              &entry.st, static_cast<off_t>(i + 1));
        if (length > size - used) break;
        used += length;
      }
      fuse_reply_buf(request, buffer.data(), used);
    });
  }

  static void releasedir(fuse_req_t request, fuse_ino_t, fuse_file_info* file) {
    delete reinterpret_cast<Directory*>(file->fh);
    fuse_reply_err(request, 0);
  }

  static void getxattr(fuse_req_t request, fuse_ino_t id, const char* name, size_t size) {
    answer(request, [&] {
      // The kernel asks for others (security.capability, ACLs) on its own account.
      if (!std::string_view(name).starts_with(attribute_prefix)) fail(ENODATA);
      for (const auto& [key, value] : self(request).attributes(id)) {
        if (key == name) return reply_xattr(request, value, size);
      }
      fail(ENODATA);
    });
  }

  static void listxattr(fuse_req_t request, fuse_ino_t id, size_t size) {
    answer(request, [&] {
      std::string names;
      for (const auto& [key, value] : self(request).attributes(id)) {
        if (value.size() <= XATTR_SIZE_MAX) names += key + '\0';
      }
      reply_xattr(request, names, size);
    });
  }

  static void reply_xattr(fuse_req_t request, const std::string& value, size_t size) {
    if (value.size() > XATTR_SIZE_MAX) fail(E2BIG);
    if (size == 0) {
      fuse_reply_xattr(request, value.size());
    } else if (value.size() > size) {
      fail(ERANGE);
    } else {
      fuse_reply_buf(request, value.data(), value.size());
    }
  }

  static void unlink(fuse_req_t request, fuse_ino_t parent, const char* name) {
    answer(request, [&] {
      FileSystem& fs = self(request);
      const NodePtr directory = fs.find(parent);
      struct stat st;
      const FileDescriptor fd = fs.open_node(directory, O_PATH | O_DIRECTORY, st);
      const auto entry = sharr::inspect(fd.get(), name, fs.prefix_of(directory));
      if (!entry) fail(ENOENT);
      if (!entry->info) fail(EISDIR);
      {
        // The kernel has checked the caller's rights on what it knew; what is there now may be
        // somebody else's.
        const AsCaller caller(request);
        if (unlinkat(fd.get(), name, 0) != 0) fail(errno);
      }
      fuse_reply_err(request, 0);
    });
  }

  static void statfs(fuse_req_t request, fuse_ino_t) {
    struct statvfs st;
    if (fstatvfs(self(request).source_.get(), &st) != 0) {
      fuse_reply_err(request, errno);
    } else {
      fuse_reply_statfs(request, &st);
    }
  }

  // Refused: what would change an array's size or bring in a new file.
  static void setattr(fuse_req_t request, fuse_ino_t, struct stat*, int, fuse_file_info*) {
    fuse_reply_err(request, EPERM);
  }
  static void mknod(fuse_req_t request, fuse_ino_t, const char*, mode_t, dev_t) {
    fuse_reply_err(request, EPERM);
  }
  static void mkdir(fuse_req_t request, fuse_ino_t, const char*, mode_t) {
    fuse_reply_err(request, EPERM);
  }
  static void rmdir(fuse_req_t request, fuse_ino_t, const char*) { fuse_reply_err(request, EPERM); }
  static void symlink(fuse_req_t request, const char*, fuse_ino_t, const char*) {
    fuse_reply_err(request, EPERM);
  }
  static void rename(fuse_req_t request, fuse_ino_t, const char*, fuse_ino_t, const char*,
                     unsigned) {
    fuse_reply_err(request, EPERM);
  }
  static void link(fuse_req_t request, fuse_ino_t, fuse_ino_t, const char*) {
    fuse_reply_err(request, EPERM);
  }
  static void create(fuse_req_t request, fuse_ino_t, const char*, mode_t, fuse_file_info*) {
    fuse_reply_err(request, EPERM);
  }
  static void setxattr(fuse_req_t request, fuse_ino_t, const char*, const char*, size_t, int) {
    fuse_reply_err(request, EPERM);
  }
  static void removexattr(fuse_req_t request, fuse_ino_t, const char*) {
    fuse_reply_err(request, EPERM);
  }
  static void fallocate(fuse_req_t request, fuse_ino_t, int, off_t, off_t, fuse_file_info*) {
    fuse_reply_err(request, EPERM);
  }
};

const fuse_lowlevel_ops& FileSystem::operations() {
  static const fuse_lowlevel_ops operations = [] {
    fuse_lowlevel_ops ops{};
    ops.init = Operations::init;
    ops.lookup = Operations::lookup;
    ops.forget = Operations::forget;
    ops.forget_multi = Operations::forget_multi;
    ops.getattr = Operations::getattr;
    ops.setattr = Operations::setattr;
    ops.open = Operations::open;
    ops.release = Operations::release;
    ops.read = Operations::read;
    ops.write = Operations::write;
    ops.fsync = Operations::fsync;
    ops.lseek = Operations::lseek;
    ops.opendir = Operations::opendir;
    ops.readdir = Operations::readdir;
    ops.releasedir = Operations::releasedir;
    ops.getxattr = Operations::getxattr;
    ops.listxattr = Operations::listxattr;
    ops.setxattr = Operations::setxattr;
    ops.removexattr = Operations::removexattr;
    ops.unlink = Operations::unlink;
    ops.statfs = Operations::statfs;
    ops.mknod = Operations::mknod;
    ops.mkdir = Operations::mkdir;
    ops.rmdir = Operations::rmdir;
    ops.symlink = Operations::symlink;
    ops.rename = Operations::rename;
    ops.link = Operations::link;
    ops.create = Operations::create;
    ops.fallocate = Operations::fallocate;
    return ops;
  }();
  return operations;
}

FileSystem::FileSystem(FileDescriptor source, std::string prefix, bool direct_io)
    : source_(std::move(source)), prefix_(std::move(prefix)), direct_io_(direct_io) {
  struct stat st;
  if (fstat(source_.get(), &st) != 0) fail(errno);
  auto root = std::make_shared<Node>();
  root->id = FUSE_ROOT_ID;
  root->directory = true;
  root->key = key_of(st);
  root->lookups = 1;  // the kernel never forgets it
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

FileSystem::Key FileSystem::key_of(const struct stat& st) {
  return {st.st_dev, st.st_ino, S_ISDIR(st.st_mode)};
}

FileSystem::NodePtr FileSystem::find(fuse_ino_t id) {
  const std::lock_guard lock(mutex_);
  const auto found = nodes_.find(id);
  if (found == nodes_.end()) fail(ESTALE);
  return found->second;
}

std::string FileSystem::path_of(const NodePtr& node) {
  const std::lock_guard lock(mutex_);
  std::string path;
  for (const Node* at = node.get(); at->parent; at = at->parent.get()) {
    path = path.empty() ? at->name : fmt::format("{}/{}", at->name, path);
    // Directories moved beside the mount, seen in an unlucky order, could even make a circle.
    if (path.size() >= PATH_MAX) fail(ENAMETOOLONG);
  }
  return path.empty() ? "." : path;
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
  FileDescriptor fd = sharr::open_beneath(source_.get(), path_of(node), flags);
  const int errnum = errno;
  if (fd && fstat(fd.get(), &st) != 0) fail(errno);
  const std::lock_guard lock(mutex_);
  if (fd && key_of(st) == node->key) return fd;
  if (node->handles.empty()) {
    if (!fd) fail(errnum);
    if (node->directory || !S_ISREG(st.st_mode)) fail(ESTALE);
    bind(*node, key_of(st));
    return fd;
  }
  const std::string self = fmt::format("/proc/self/fd/{}", node->handles.front()->fd.get());
  fd = FileDescriptor(::open(self.c_str(), flags | O_CLOEXEC));
  if (!fd || fstat(fd.get(), &st) != 0) fail(errno);
  return fd;
}

struct stat FileSystem::stat_node(const NodePtr& node) {
  struct stat st;
  {
    const std::lock_guard lock(mutex_);
    if (!node->handles.empty()) {
      if (fstat(node->handles.front()->fd.get(), &st) != 0) fail(errno);
      return st;
    }
  }
  open_node(node, O_PATH, st);
  return st;
}

struct stat FileSystem::presented(struct stat st) const {
  if (S_ISREG(st.st_mode)) {
    // A program that was written through a mount must not run with its owner's rights.
    st.st_mode &= ~static_cast<mode_t>(S_ISUID | S_ISGID);
    st.st_blksize = sharr::mount_block_size;
  }
  return st;
}

fuse_entry_param FileSystem::add(const NodePtr& parent, const Entry& entry) {
  fuse_entry_param reply{};  // timeouts of 0: what is beside the mount may change at any time
  reply.attr = presented(entry.st);
  const Key key = key_of(entry.st);
  const std::lock_guard lock(mutex_);
  auto [known, added] = ids_.try_emplace(key, next_id_);
  NodePtr& node = nodes_[known->second];
  if (added) {
    node = std::make_shared<Node>();
    node->id = next_id_++;
    node->directory = S_ISDIR(entry.st.st_mode);
    node->key = key;
  }
  // The root has no name, even if a bind mount or a race shows it below itself.
  if (node->id != FUSE_ROOT_ID) {
    node->parent = parent;
    node->name = entry.name;
  }
  ++node->lookups;
  reply.ino = node->id;
  return reply;
}

void FileSystem::forget(fuse_ino_t id, std::uint64_t count) {
  const std::lock_guard lock(mutex_);
  const auto found = nodes_.find(id);
  if (found == nodes_.end() || id == FUSE_ROOT_ID) return;
  Node& node = *found->second;
  node.lookups -= std::min(count, node.lookups);
  if (node.lookups > 0) return;
  const auto known = ids_.find(node.key);
  if (known != ids_.end() && known->second == id) ids_.erase(known);
  nodes_.erase(found);
}

// Removes what writes that the kernel passed through have added behind the end. A file that has
// become another array since, because somebody wrote it anew beside the mount, is left alone.
void FileSystem::trim(const Handle& handle) noexcept {
  const Node& node = *handle.node;
  struct stat st;
  if (fstat(handle.fd.get(), &st) != 0 || st.st_size <= node.size) return;
  try {
    const sharr::Info info = read_array(handle.fd.get(), st);
    if (info.offset + info.nbytes != node.data_end) return;
  } catch (const std::system_error&) {
    return;
  }
  if (ftruncate(handle.fd.get(), node.size) != 0) {
    fuse_log(FUSE_LOG_ERR, "%s: cannot remove what was written beyond its end: %s\n",
             node.name.c_str(), strerror(errno));
  }
}

void FileSystem::close(std::unique_ptr<Handle> handle) noexcept {
  Node& node = *handle->node;
  const std::lock_guard lock(mutex_);
  std::erase(node.handles, handle.get());
  if (handle->writable && handle->passthrough) trim(*handle);
  if (node.handles.empty() && node.backing_id != 0) {
    passthrough::close(session_, std::exchange(node.backing_id, 0));
  }
}

std::vector<std::pair<std::string, std::string>> FileSystem::attributes(fuse_ino_t id) {
  const NodePtr node = find(id);
  if (node->directory) return {};
  struct stat st;
  const FileDescriptor fd = open_node(node, O_RDONLY, st);
  const std::string path = path_of(node);
  const sharr::Info info = sharr::read_info(fd.get(), st, prefix_ + path);
  const auto key = [](const char* name) { return std::string(attribute_prefix) + name; };
  return {{key("dtype"), info.dtype.str()},
          {key("descr"), info.dtype.descr()},
          {key("shape"), sharr::shape_text(info.shape)},
          {key("order"), std::string(1, static_cast<char>(info.order))},
          {key("ndim"), std::to_string(info.shape.size())},
          {key("size"), std::to_string(info.size())},
          {key("itemsize"), std::to_string(info.dtype.itemsize())},
          {key("nbytes"), std::to_string(info.nbytes)},
          {key("offset"), std::to_string(info.offset)},
          {key("format"), info.format},
          {sharr::uri_attribute, info.name}};
}

}  // namespace sharrfs
