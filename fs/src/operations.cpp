// What libfuse calls. Each operation answers its request exactly once, with an errno for an
// exception. What changes names or attributes is done with the caller's rights: the kernel has
// checked them, but on what it knew, and what is there now may be somebody else's.
#include <fcntl.h>
#include <linux/limits.h>
#include <sys/file.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <exception>
#include <system_error>
#include <thread>

#include "caller.hpp"
#include "file_system.hpp"
#include "node.hpp"
#include "passthrough.hpp"

namespace sharrfs {

using sharr::FileDescriptor;

namespace {

void check_new_name(const std::string& name) {
  if (name.size() > NAME_MAX) fail(ENAMETOOLONG);
  if (sharr::reserved(name)) fail(EINVAL);
}

timespec time_to_set(int to_set, int given, int now, const timespec& time) {
  if ((to_set & now) != 0) return {.tv_sec = 0, .tv_nsec = UTIME_NOW};
  if ((to_set & given) != 0) return time;
  return {.tv_sec = 0, .tv_nsec = UTIME_OMIT};
}

// What an open asks of a file that is there.
int access_of(int flags) {
  int access = (flags & O_ACCMODE) != O_WRONLY ? R_OK : 0;
  if ((flags & O_ACCMODE) != O_RDONLY || (flags & O_TRUNC) != 0) access |= W_OK;
  return access;
}

// What the extended attributes say of an array.
using Attribute = std::pair<std::string_view, std::string (*)(const sharr::Info&)>;
constexpr auto attributes = std::to_array<Attribute>({
    {"user.sharr.dtype", [](const sharr::Info& info) { return info.dtype.str(); }},
    {"user.sharr.descr", [](const sharr::Info& info) { return info.dtype.descr(); }},
    {"user.sharr.shape", [](const sharr::Info& info) { return sharr::shape_text(info.shape); }},
    {"user.sharr.order",
     [](const sharr::Info& info) { return std::string(1, static_cast<char>(info.order)); }},
    {"user.sharr.ndim", [](const sharr::Info& info) { return std::to_string(info.shape.size()); }},
    {"user.sharr.size", [](const sharr::Info& info) { return std::to_string(info.size()); }},
    {"user.sharr.itemsize",
     [](const sharr::Info& info) { return std::to_string(info.dtype.itemsize()); }},
    {"user.sharr.nbytes", [](const sharr::Info& info) { return std::to_string(info.nbytes); }},
    {"user.sharr.offset", [](const sharr::Info& info) { return std::to_string(info.offset); }},
    {"user.sharr.format", [](const sharr::Info& info) { return info.format; }},
    {sharr::uri_attribute, [](const sharr::Info& info) { return info.name; }},
});

}  // namespace

struct FileSystem::Operations {
  static FileSystem& self_of(fuse_req_t request) {
    return *static_cast<FileSystem*>(fuse_req_userdata(request));
  }

  // of: what the request is about. A file that is not there any more may be so by a name that the
  // kernel remembers: upon ESTALE it looks again, and answers ENOENT itself.
  enum class Of { name, inode, opening };

  template <class F>
  static void answer(fuse_req_t request, F&& f, Of of = Of::name) {
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
    refuse(request, errnum, of);
  }

  static void refuse(fuse_req_t request, int errnum, Of of) {
    if (of != Of::name && errnum == ENOENT) errnum = ESTALE;
    // Whatever fails, an open that was on its way has.
    if (of != Of::opening) self_of(request).end_overwriting(nullptr, caller_of(request));
    fuse_reply_err(request, errnum);
  }

  static pid_t caller_of(fuse_req_t request) { return fuse_req_ctx(request)->pid; }

  static Handle& handle(fuse_file_info* file) { return *reinterpret_cast<Handle*>(file->fh); }

  static void init(void* fs, fuse_conn_info* conn) {
    passthrough::enable(conn);
    static_cast<FileSystem*>(fs)->remember_if(conn->proto_minor);
  }

  static void reply_entry(fuse_req_t request, FileSystem& fs, const fuse_entry_param& entry) {
    // An interrupted request was not delivered, so it will not be forgotten either.
    if (fuse_reply_entry(request, &entry) != 0) fs.forget(entry.ino, 1);
  }

  static void lookup(fuse_req_t request, fuse_ino_t parent, const char* name) {
    answer(request, [&] {
      FileSystem& fs = self_of(request);
      const NodePtr directory = fs.find(parent, request, X_OK);
      if (const auto draft = fs.enter_overwriting(directory, name, caller_of(request))) {
        return reply_entry(request, fs, *draft);
      }
      const auto entry = fs.enter(directory, name);
      // No exception, which takes longer than the look: whatever is created is looked up before.
      if (!entry) return refuse(request, ENOENT, Of::name);
      reply_entry(request, fs, *entry);
    });
  }

  static void forget(fuse_req_t request, fuse_ino_t id, std::uint64_t count) {
    self_of(request).forget(id, count);
    fuse_reply_none(request);
  }

  static void forget_multi(fuse_req_t request, size_t count, fuse_forget_data* forgets) {
    for (size_t i = 0; i < count; ++i) self_of(request).forget(forgets[i].ino, forgets[i].nlookup);
    fuse_reply_none(request);
  }

  static void getattr(fuse_req_t request, fuse_ino_t id, fuse_file_info*) {
    answer(
        request,
        [&] {
          FileSystem& fs = self_of(request);
          const NodePtr node = fs.find(id);
          const struct stat st = fs.stat_node(node);
          const struct stat shown = fs.presented(st);
          double time = 0;
          bool nameless = false;
          {
            const std::lock_guard lock(fs.mutex_);
            time = fs.attribute_time(*node, st);
            nameless = st.st_nlink == 0 && fs.remembered(*node);
          }
          // Who sees that a file has no name must not find it by one.
          if (nameless) fs.expire_names();
          fuse_reply_attr(request, &shown, time);
        },
        Of::inode);
  }

  static void setattr(fuse_req_t request, fuse_ino_t id, struct stat* attr, int to_set,
                      fuse_file_info*) {
    answer(
        request,
        [&] {
          FileSystem& fs = self_of(request);
          const NodePtr node = fs.find(id);
          if (fs.is_unopened(node)) fail(ESTALE);
          struct stat st;
          const FileDescriptor opened = fs.open_node(node, O_PATH, st);
          const std::string path = self(opened.get());
          if ((to_set & FUSE_SET_ATTR_SIZE) != 0) {
            // The size is an array's for good; what is no array yet may have any.
            if (const Unpublished draft = fs.unpublished(node)) {
              // It may be mapped: what it grows by is to be there.
              draft->draft.resize(static_cast<std::uint64_t>(attr->st_size));
              if (attr->st_size > st.st_size) draft->grown = true;
            } else if (attr->st_size != st.st_size) {
              fail(EPERM);
            }
          }
          if ((to_set & FUSE_SET_ATTR_MODE) != 0 && S_ISREG(st.st_mode) &&
              (attr->st_mode & (S_ISUID | S_ISGID)) != 0) {
            fail(EPERM);
          }
          const timespec times[] = {
              time_to_set(to_set, FUSE_SET_ATTR_ATIME, FUSE_SET_ATTR_ATIME_NOW, attr->st_atim),
              time_to_set(to_set, FUSE_SET_ATTR_MTIME, FUSE_SET_ATTR_MTIME_NOW, attr->st_mtim)};
          const bool any = times[0].tv_nsec != UTIME_OMIT || times[1].tv_nsec != UTIME_OMIT;
          // For the present time the right to write is enough, to the kernel by the mode.
          const bool now = times[0].tv_nsec == UTIME_NOW && times[1].tv_nsec == UTIME_NOW;
          if (now && fuse_req_ctx(request)->uid != st.st_uid && !may(request, opened.get(), W_OK)) {
            fail(errno);
          }
          // First, because the draft may be published meanwhile.
          const int rights = to_set & (FUSE_SET_ATTR_UID | FUSE_SET_ATTR_GID | FUSE_SET_ATTR_MODE);
          int first = 0;
          if (rights != 0) {
            if (const Unpublished draft = fs.unpublished(node)) {
              first = fs.set_rights(node, *draft, rights);
            }
          }
          try {
            const AsCaller caller(request);
            if ((to_set & (FUSE_SET_ATTR_UID | FUSE_SET_ATTR_GID)) != 0) {
              const uid_t uid =
                  (to_set & FUSE_SET_ATTR_UID) != 0 ? attr->st_uid : static_cast<uid_t>(-1);
              const gid_t gid =
                  (to_set & FUSE_SET_ATTR_GID) != 0 ? attr->st_gid : static_cast<gid_t>(-1);
              if (fchownat(opened.get(), "", uid, gid, AT_EMPTY_PATH) != 0) fail(errno);
            }
            if ((to_set & FUSE_SET_ATTR_MODE) != 0 &&
                chmod(path.c_str(), attr->st_mode & ~static_cast<mode_t>(S_IFMT)) != 0) {
              fail(errno);
            }
            if (any && utimensat(AT_FDCWD, path.c_str(), times, 0) != 0) fail(errno);
          } catch (const std::system_error&) {
            if (const Unpublished draft = fs.unpublished(node)) fs.unset_rights(*draft, first);
            throw;
          }
          if (rights != 0 && !fs.unpublished(node)) fs.outdate_rights(st, rights);
          st = fs.presented(fs.stat_node(node));
          {
            const std::lock_guard lock(fs.mutex_);
            if (node->parent) ++node->parent->changes;  // what is being listed has the old ones
          }
          fuse_reply_attr(request, &st,
                          0);  // to this the kernel listens even if it has changed since
        },
        Of::inode);
  }

  // Open files

  static void open(fuse_req_t request, fuse_ino_t id, fuse_file_info* file) {
    answer(
        request, [&] { open_file(request, id, file); }, Of::opening);
  }

  static void open_file(fuse_req_t request, fuse_ino_t id, fuse_file_info* file) {
    FileSystem& fs = self_of(request);
    const NodePtr node = fs.find(id);
    const bool truncates = (file->flags & O_TRUNC) != 0;
    const bool begun = fs.end_overwriting(node, caller_of(request));
    if (const Unpublished draft = fs.unpublished(node)) {
      {
        // Whoever has it open may open it again, as by /dev/stdout. Nobody else comes here but a
        // thread whose open with O_TRUNC came to nothing, and who means what has the name.
        const std::lock_guard lock(fs.mutex_);
        if (node->handles.empty() && (!begun || !truncates)) {
          if (node->writing && node->writing->left == 0) fs.abandon(node);  // or it is settled now
          fail(ESTALE);
        }
      }
      if (truncates) {
        if (!begun && !may(request, draft->draft.fd(), W_OK)) fail(errno);
        if (begun) {
          try {
            fs.go_on_overwriting(node, *draft, request, access_of(file->flags));
          } catch (...) {
            const std::lock_guard lock(fs.mutex_);
            fs.abandon(node);
            throw;
          }
        }
        draft->draft.resize(0);
      }
      if ((file->flags & O_ACCMODE) == O_RDWR) draft->declared = true;
    } else if (truncates) {
      fs.start_overwriting(node, request, access_of(file->flags));
      fail(ESTALE);
    } else if ((file->flags & O_APPEND) != 0) {
      fail(EPERM);  // an array does not grow
    } else if (!fs.displaced(node)) {
      const std::lock_guard lock(fs.mutex_);
      fs.insisting_.erase(caller_of(request));
    } else if (!fs.insists(caller_of(request))) {
      fail(ESTALE);  // by a name that the kernel remembers, it looks again
    }
    const auto key = [&] {
      const std::lock_guard lock(fs.mutex_);
      return node->key;
    };
    const Key before = key();
    auto [opened, backing_id] = fs.open_handle(node, file->flags);
    try {
      if (!begun && !may(request, opened->fd.get(), access_of(file->flags))) fail(errno);
      // See written(); or another file has taken the name, and the node.
      if (opened->writable || key() != before) fs.expire_attributes(id);
    } catch (...) {
      fs.close(std::move(opened));
      throw;
    }
    file->fh = reinterpret_cast<std::uint64_t>(opened.get());
    Handle* const handle = opened.release();
    // Never cached: the pages change without the kernel's FUSE side knowing.
    file->direct_io = backing_id == 0;
    const int failed = backing_id != 0 ? passthrough::reply_open(request, file, backing_id)
                                       : fuse_reply_open(request, file);
    if (failed != 0) fs.close(std::unique_ptr<Handle>(handle));
  }

  static void create(fuse_req_t request, fuse_ino_t parent, const char* name, mode_t mode,
                     fuse_file_info* file) {
    answer(request, [&] {
      FileSystem& fs = self_of(request);
      fs.end_overwriting(nullptr, caller_of(request));
      check_new_name(name);
      if ((mode & (S_ISUID | S_ISGID)) != 0) fail(EPERM);
      const bool exclusive = (file->flags & O_EXCL) != 0;
      const NodePtr directory = fs.find(parent, request, W_OK | X_OK);
      const DirectoryPtr fd = fs.open_directory(directory);
      const std::string prefix = fs.prefix_of(directory);
      std::unique_lock order(fs.publishing_);
      // The kernel has looked, and found nothing, but by now there may be something.
      const auto there = sharr::inspect(fd->get(), name, prefix);
      if (there && exclusive) fail(EEXIST);
      if (there && ((file->flags & O_TRUNC) == 0 || !there->info)) fail(ESTALE);  // look again
      if (!there && is_foreign(fd->get(), name)) fail(EEXIST);
      WritingPtr writing;
      if (there) {
        const FileDescriptor old = sharr::open_beneath(fd->get(), name, O_PATH);
        if (!old) fail(errno == ENOENT ? ESTALE : errno);  // look again
        struct stat st, in;
        if (fstat(old.get(), &st) != 0 || fstat(fd->get(), &in) != 0) fail(errno);
        if (key_of(st) != key_of(there->st)) fail(ESTALE);  // look again
        if (!may(request, old.get(), access_of(file->flags))) fail(errno);
        // As with fs.protected_regular, which the kernel asks of what it finds itself.
        const uid_t uid = fuse_req_ctx(request)->uid;
        const bool sticky = (in.st_mode & S_ISVTX) != 0;
        if (sticky && st.st_uid != uid && st.st_uid != in.st_uid) fail(EACCES);
        writing = replacement(fd->get(), prefix + name, old.get(), *fuse_req_ctx(request));
      } else {
        const AsCaller caller(request);
        writing = std::make_shared<Writing>(fd->get(), prefix + name, mode, *fuse_req_ctx(request));
      }
      writing->exclusive = exclusive;
      writing->declared = (file->flags & O_ACCMODE) == O_RDWR;
      const NodePtr node = fs.start_writing(directory, name, std::move(writing));
      order.unlock();
      std::unique_ptr<Handle> opened;
      int backing_id = 0;
      fuse_entry_param entry;
      try {
        // The draft of another has had the name in between, and given it to an array.
        if (exclusive && is_there(fd->get(), name)) fail(EEXIST);
        std::tie(opened, backing_id) = fs.open_handle(node, file->flags);
        const struct stat st = fs.stat_node(node);
        const std::lock_guard lock(fs.mutex_);
        entry = fs.entry_of(node, st);
      } catch (...) {
        if (opened) fs.close(std::move(opened));
        const std::lock_guard lock(fs.mutex_);
        fs.abandon(node);
        throw;
      }
      file->fh = reinterpret_cast<std::uint64_t>(opened.get());
      Handle* const handle = opened.release();
      file->direct_io = backing_id == 0;
      const int failed = backing_id != 0
                             ? passthrough::reply_create(request, entry, file, backing_id)
                             : fuse_reply_create(request, &entry, file);
      if (failed != 0) {
        fs.close(std::unique_ptr<Handle>(handle));
        fs.forget(entry.ino, 1);
      }
    });
  }

  static void flush(fuse_req_t request, fuse_ino_t, fuse_file_info* file) {
    answer(request, [&] {
      FileSystem& fs = self_of(request);
      Handle& closed = handle(file);
      bool repaired = false;
      {
        const std::lock_guard lock(fs.mutex_);
        // As POSIX has it, whichever descriptor the process has closed; but who waits for a lock in
        // another thread is to have it.
        if (const auto found = closed.node->lock_owners.find(file->lock_owner);
            found != closed.node->lock_owners.end()) {
          struct flock all {};
          all.l_type = F_UNLCK;
          fcntl(found->second->fd.get(), F_OFD_SETLK, &all);
          if (found->second.use_count() == 1) closed.node->lock_owners.erase(found);
        }
        closed.closed = Handle::Clock::now();
        closed.closed_by = file->lock_owner;
        if (closed.writable) repaired = repair(closed);
      }
      if (repaired) fs.expire_attributes(closed.node->id);
      fs.finish(closed, request);
      fuse_reply_err(request, 0);
    });
  }

  static void release(fuse_req_t request, fuse_ino_t, fuse_file_info* file) {
    answer(request, [&] {
      self_of(request).close(std::unique_ptr<Handle>(&handle(file)));
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
      const Handle& opened = handle(file);
      size_t fits = size;
      if (!self_of(request).writing(opened.node)) {
        struct stat st;
        if (fstat(opened.fd.get(), &st) != 0) fail(errno);
        const std::string& header = opened.node->header;
        // An array does not grow: what reaches beyond its end is not written. What has no header
        // says behind its data what it is.
        off_t end = st.st_size;
        if (header.empty()) end = std::min(end, static_cast<off_t>(opened.node->data_end));
        if (size > 0 && offset >= end) fail(EPERM);
        fits = std::min(size, static_cast<size_t>(end - offset));
        // Nor does it become another one.
        const auto start = static_cast<size_t>(offset);
        if (start < header.size() &&
            header.compare(start, fits, data, std::min(fits, header.size() - start)) != 0) {
          fail(EPERM);
        }
      }
      const ssize_t n = pwrite(opened.fd.get(), data, fits, offset);
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

  static void fallocate(fuse_req_t request, fuse_ino_t, int mode, off_t offset, off_t length,
                        fuse_file_info* file) {
    answer(request, [&] {
      const Unpublished draft = self_of(request).unpublished(handle(file).node);
      if (!draft) fail(EPERM);
      if ((mode & ~FALLOC_FL_KEEP_SIZE) == 0) {
        draft->draft.check_space(static_cast<std::uint64_t>(offset) +
                                 static_cast<std::uint64_t>(length));
        draft->grown = true;
      }
      if (::fallocate(handle(file).fd.get(), mode, offset, length) != 0) fail(errno);
      fuse_reply_err(request, 0);
    });
  }

  // Locks, on the backing file, so that they hold between the mount and what is beside it.

  // Those of an open file go when the kernel says that it is closed, which is a moment after
  // close(2) has returned. So who would not wait for such a lock waits for that.

  // Tries for a lock, or waits for something else, for as long as the kernel may take.
  template <class Try>
  static int patiently(const Try& attempt) {
    for (auto tries = Handle::most_late.count();; --tries) {
      if (attempt() == 0) return 0;
      if ((errno != EAGAIN && errno != EACCES) || tries <= 1) return -1;
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
      errno = EAGAIN;
    }
  }

  static void flock(fuse_req_t request, fuse_ino_t, fuse_file_info* file, int operation) {
    answer(request, [&] {
      FileSystem& fs = self_of(request);
      Handle& opened = handle(file);
      const int fd = opened.fd.get();  // open while the request lasts
      opened.locked = true;
      const auto attempt = [=] { return ::flock(fd, operation | LOCK_NB); };
      int errnum = attempt() == 0 ? 0 : errno;
      if (errnum == EWOULDBLOCK) {
        if ((operation & LOCK_NB) == 0) {
          fs.lock_waiters_.wait(request, [=] { return ::flock(fd, operation); });
          return;
        }
        if (fs.others_are_closing(opened)) {
          fs.lock_waiters_.wait(request, [=] { return patiently(attempt); });
          return;
        }
        errnum = attempt() == 0 ? 0 : errno;  // one may have gone in between
      }
      fuse_reply_err(request, errnum);
    });
  }

  // The open file that holds a process's locks on a node: with F_OFD_SETLK they are as much its own
  // as they are the process's. None with errno set. An owner's locks go with the file that it has
  // used last: of a process every close has ended them before, and an open file may have the owner
  // of one whose end the kernel has yet to tell.
  static std::shared_ptr<Node::LockOwner> lock_owner(FileSystem& fs, const Handle& opened,
                                                     std::uint64_t owner, pid_t pid) {
    {
      const std::lock_guard lock(fs.mutex_);
      const auto found = opened.node->lock_owners.find(owner);
      if (found != opened.node->lock_owners.end()) {
        found->second->through = &opened;
        return found->second;
      }
    }
    // A lease of somebody's would have an open wait for as long as he likes.
    FileDescriptor fd = reopen(opened.fd.get(), O_RDWR | O_NONBLOCK);
    if (!fd && errno != EWOULDBLOCK) fd = reopen(opened.fd.get(), O_RDONLY | O_NONBLOCK);
    if (!fd) return {};
    const std::lock_guard lock(fs.mutex_);
    std::shared_ptr<Node::LockOwner>& made = opened.node->lock_owners[owner];
    if (!made) {
      made = std::make_shared<Node::LockOwner>(Node::LockOwner{.fd = std::move(fd), .pid = pid});
    }
    made->through = &opened;
    return made;
  }

  static void setlk(fuse_req_t request, fuse_ino_t, fuse_file_info* file, struct flock* lock,
                    int sleeps) {
    answer(request, [&] {
      FileSystem& fs = self_of(request);
      Handle& opened = handle(file);
      opened.locked = true;
      struct flock wanted = *lock;
      wanted.l_pid = 0;
      const auto set = [&fs, &opened, owner = file->lock_owner, pid = lock->l_pid,
                        wanted](int command) {
        struct flock changed = wanted;
        const auto holder = lock_owner(fs, opened, owner, pid);
        if (!holder || fcntl(holder->fd.get(), command, &changed) != 0) return -1;
        const std::lock_guard guard(fs.mutex_);
        holder->through = &opened;  // others may have gone while this one waited
        return 0;
      };
      // The owner may be that of an open file which is about to go, with all its locks; but not if
      // it closes descriptors itself, as a process does.
      const auto goes = [&fs, &opened, owner = file->lock_owner] {
        const std::lock_guard guard(fs.mutex_);
        const auto found = opened.node->lock_owners.find(owner);
        if (found == opened.node->lock_owners.end()) return false;
        const Handle* const last = found->second->through;
        return last != nullptr && last != &opened && last->closing() && last->closed_by != owner;
      };
      const bool first = goes();
      const auto attempt = [=] { return set(F_OFD_SETLK); };
      int errnum = EAGAIN;
      if (!first) errnum = attempt() == 0 ? 0 : errno;
      if (errnum == EAGAIN || errnum == EACCES) {
        if (first || sleeps != 0 || fs.others_are_closing(opened)) {
          fs.lock_waiters_.wait(request, [=] {
            if (first) {
              patiently([&] {
                errno = EAGAIN;
                return goes() ? -1 : 0;
              });
            }
            return sleeps != 0 ? set(F_OFD_SETLKW) : patiently(attempt);
          });
          return;
        }
        errnum = attempt() == 0 ? 0 : errno;  // one may have gone in between
      }
      fuse_reply_err(request, errnum);
    });
  }

  static void getlk(fuse_req_t request, fuse_ino_t, fuse_file_info* file, struct flock* lock) {
    answer(request, [&] {
      FileSystem& fs = self_of(request);
      const NodePtr& node = handle(file).node;
      std::shared_ptr<Node::LockOwner> own;
      pid_t other = 0;
      {
        const std::lock_guard guard(fs.mutex_);
        for (const auto& [owner, entry] : node->lock_owners) {
          if (owner == file->lock_owner)
            own = entry;
          else
            other = entry->pid;
        }
      }
      struct flock found = *lock;
      found.l_pid = 0;
      const int fd = own ? own->fd.get() : handle(file).fd.get();
      if (fcntl(fd, F_OFD_GETLK, &found) != 0) fail(errno);
      // The kernel does not say whose an open file is; of several processes here, one is named.
      if (found.l_type != F_UNLCK && found.l_pid < 0) found.l_pid = other;
      fuse_reply_lock(request, &found);
    });
  }

  // Directories

  static void opendir(fuse_req_t request, fuse_ino_t id, fuse_file_info* file) {
    answer(request, [&] {
      FileSystem& fs = self_of(request);
      auto directory = std::make_unique<Directory>();
      const NodePtr node = fs.find(id, request, R_OK);
      {
        const std::lock_guard lock(fs.mutex_);
        directory->key = node->key;
      }
      file->fh = reinterpret_cast<std::uint64_t>(directory.get());
      if (fuse_reply_open(request, file) == 0) static_cast<void>(directory.release());
    });
  }

  static void readdir(fuse_req_t request, fuse_ino_t id, size_t size, off_t offset,
                      fuse_file_info* file) {
    answer(request, [&] { list(request, id, size, offset, file, false); });
  }

  static void readdirplus(fuse_req_t request, fuse_ino_t id, size_t size, off_t offset,
                          fuse_file_info* file) {
    answer(request, [&] { list(request, id, size, offset, file, true); });
  }

  // plus: with what a look-up of each array would answer, and counted as one.
  static void list(fuse_req_t request, fuse_ino_t id, size_t size, off_t offset,
                   fuse_file_info* file, bool plus) {
    FileSystem& fs = self_of(request);
    auto& directory = *reinterpret_cast<Directory*>(file->fh);
    const NodePtr node = fs.find(id);
    fs.taken(directory);
    if (offset == 0) fs.read_directory(node, directory);  // the start, or rewinddir
    std::vector<char> buffer(size);
    std::vector<fuse_ino_t> entered;
    size_t used = 0;
    {
      std::unique_lock lock(fs.mutex_, std::defer_lock);
      if (plus) lock.lock();
      plus = plus && fs.holds(directory.changes, *node);
      const size_t count = directory.items ? directory.items->size() : 0;
      for (auto i = static_cast<size_t>(offset); i < count; ++i) {
        const auto& [name, st] = (*directory.items)[i];
        char* const at = buffer.data() + used;
        const size_t left = size - used;
        const auto next = static_cast<off_t>(i + 1);
        size_t length = 0;
        if (!lock.owns_lock()) {
          length = fuse_add_direntry(request, at, left, name.c_str(), &st, next);
          if (length > left) break;
        } else {
          length = fuse_add_direntry_plus(request, nullptr, 0, name.c_str(), nullptr, 0);
          if (length > left) break;
          fuse_entry_param entry{};  // ino 0: no more than the name
          entry.attr = st;
          if (plus && S_ISREG(st.st_mode)) {
            const NodePtr file_node = fs.node_of(st).first;
            // What the kernel knows by another name it is to look up; see enter().
            if (!file_node->writing && !fs.remembered_elsewhere(*file_node, node, name)) {
              fs.place(file_node, node, name);
              const double time = fs.name_time(*file_node, st, directory.changes);
              const double attributes = time > 0 ? fs.attribute_time(*file_node, st) : 0;
              entry = fs.entry_of(file_node, st, time, attributes);
              entered.push_back(file_node->id);
            }
          }
          fuse_add_direntry_plus(request, at, left, name.c_str(), &entry, next);
        }
        used += length;
      }
      if (!entered.empty()) fs.listed(directory);
    }
    if (fuse_reply_buf(request, buffer.data(), used) == 0) return;
    for (const fuse_ino_t each : entered) fs.forget(each, 1);
  }

  static void releasedir(fuse_req_t request, fuse_ino_t, fuse_file_info* file) {
    answer(request, [&] {
      const std::unique_ptr<Directory> directory(reinterpret_cast<Directory*>(file->fh));
      self_of(request).taken(*directory);
      fuse_reply_err(request, 0);
    });
  }

  static void fsyncdir(fuse_req_t request, fuse_ino_t id, int, fuse_file_info*) {
    answer(request, [&] {
      FileSystem& fs = self_of(request);
      struct stat st;
      const FileDescriptor fd = fs.open_node(fs.find(id), O_RDONLY | O_DIRECTORY, st);
      if (::fsync(fd.get()) != 0) fail(errno);
      fuse_reply_err(request, 0);
    });
  }

  static void mkdir(fuse_req_t request, fuse_ino_t parent, const char* name, mode_t mode) {
    answer(request, [&] {
      FileSystem& fs = self_of(request);
      check_new_name(name);
      const NodePtr directory = fs.find(parent, request, W_OK | X_OK);
      const DirectoryPtr fd = fs.open_directory(directory);
      {
        const AsCaller caller(request);
        if (mkdirat(fd->get(), name, mode) != 0) fail(errno);
      }
      const auto entry = fs.enter(directory, name);
      if (!entry) fail(ENOENT);
      reply_entry(request, fs, *entry);
    });
  }

  // unlink and rmdir.
  static void remove(fuse_req_t request, fuse_ino_t parent, const char* name, bool directory) {
    answer(request, [&] {
      FileSystem& fs = self_of(request);
      const NodePtr node = fs.find(parent, request, W_OK | X_OK);
      const DirectoryPtr fd = fs.open_directory(node);
      const auto entry = sharr::inspect(fd->get(), name, fs.prefix_of(node));
      if (!entry) fail(ENOENT);
      if (entry->info && directory) fail(ENOTDIR);
      if (!entry->info && !directory) fail(EISDIR);
      {
        const AsCaller caller(request);
        if (unlinkat(fd->get(), name, directory ? AT_REMOVEDIR : 0) != 0) fail(errno);
      }
      {
        const std::lock_guard lock(fs.mutex_);  // the kernel forgets the name by itself
        ++node->changes;
        for (const NodePtr& removed : fs.placed_at(*node, name)) fs.retire(removed);
      }
      fuse_reply_err(request, 0);
    });
  }
  static void unlink(fuse_req_t request, fuse_ino_t parent, const char* name) {
    remove(request, parent, name, false);
  }
  static void rmdir(fuse_req_t request, fuse_ino_t parent, const char* name) {
    remove(request, parent, name, true);
  }

  static void rename(fuse_req_t request, fuse_ino_t parent, const char* name, fuse_ino_t new_parent,
                     const char* new_name, unsigned flags) {
    answer(request, [&] {
      FileSystem& fs = self_of(request);
      constexpr unsigned no_replace = RENAME_NOREPLACE;
      constexpr unsigned exchange = RENAME_EXCHANGE;
      if ((flags & ~(no_replace | exchange)) != 0) fail(EINVAL);
      check_new_name(new_name);
      const NodePtr from = fs.find(parent, request, W_OK | X_OK);
      const NodePtr to = fs.find(new_parent, request, W_OK | X_OK);
      const std::unique_lock tree(fs.tree_mutex_);
      const DirectoryPtr from_fd = fs.open_directory(from);
      const DirectoryPtr to_fd = fs.open_directory(to);
      std::optional<sharr::Entry> source;
      std::optional<sharr::Entry> target;
      while (true) {
        source = sharr::inspect(from_fd->get(), name, fs.prefix_of(from));
        target = sharr::inspect(to_fd->get(), new_name, fs.prefix_of(to));
        if (!source || (!target && (flags & exchange) != 0)) fail(ENOENT);
        // What is no array is not replaced, though it is not shown either.
        const unsigned how = target ? flags : no_replace;
        const AsCaller caller(request);
        if (renameat2(from_fd->get(), name, to_fd->get(), new_name, how) == 0) break;
        const int errnum = errno;
        // Somebody has published an array in between.
        if (how != flags && errnum == EEXIST && sharr::inspect(to_fd->get(), new_name, ""))
          continue;
        // A file system without flags.
        if (how == flags || errnum != EINVAL || is_foreign(to_fd->get(), new_name)) fail(errnum);
        if (renameat(from_fd->get(), name, to_fd->get(), new_name) != 0) fail(errno);
        break;
      }
      {
        const std::lock_guard lock(fs.mutex_);
        ++from->changes;
        ++to->changes;
        const std::vector<NodePtr> sources = fs.placed_at(*from, name);
        const std::vector<NodePtr> targets = fs.placed_at(*to, new_name);
        fs.moved(sources, source->st, to, new_name);
        if (target && (flags & exchange) != 0) fs.moved(targets, target->st, from, name);
      }
      fuse_reply_err(request, 0);
    });
  }

  // Attributes

  static void getxattr(fuse_req_t request, fuse_ino_t id, const char* name, size_t size) {
    answer(
        request,
        [&] {
          // The kernel asks for others (security.capability) on its own account, and ls(1) for each
          // file until it hears that there are none at all.
          if (!std::string_view(name).starts_with("user.")) {
            return refuse(request, EOPNOTSUPP, Of::inode);
          }
          FileSystem& fs = self_of(request);
          const NodePtr node = fs.find(id);
          if (node->directory) {
            if (name != std::string_view(sharr::uri_attribute)) fail(ENODATA);
            return reply_xattr(request, fs.prefix_of(node), size);
          }
          const auto info = fs.info_of(node, request);
          const auto* const found = std::ranges::find(attributes, name, &Attribute::first);
          if (!info || found == attributes.end()) fail(ENODATA);
          reply_xattr(request, found->second(*info), size);
        },
        Of::inode);
  }

  static void listxattr(fuse_req_t request, fuse_ino_t id, size_t size) {
    answer(
        request,
        [&] {
          std::string names;
          FileSystem& fs = self_of(request);
          const NodePtr node = fs.find(id);
          // A directory's is for attach() and create(), and nothing to be copied with it.
          const auto info = node->directory ? std::nullopt : fs.info_of(node);
          for (const auto& [name, value_of] : attributes) {
            if (info && value_of(*info).size() <= XATTR_SIZE_MAX) names.append(name) += '\0';
          }
          reply_xattr(request, names, size);
        },
        Of::inode);
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

  static void statfs(fuse_req_t request, fuse_ino_t) {
    struct statvfs st;
    if (fstatvfs(self_of(request).source_.get(), &st) != 0) {
      fuse_reply_err(request, errno);
    } else {
      fuse_reply_statfs(request, &st);
    }
  }

  // Refused: what an array cannot be. With EOPNOTSUPP programs that copy attributes pass over it.
  static void mknod(fuse_req_t request, fuse_ino_t, const char*, mode_t, dev_t) {
    fuse_reply_err(request, EPERM);
  }
  static void symlink(fuse_req_t request, const char*, fuse_ino_t, const char*) {
    fuse_reply_err(request, EPERM);
  }
  static void link(fuse_req_t request, fuse_ino_t, fuse_ino_t, const char*) {
    fuse_reply_err(request, EPERM);
  }
  static void setxattr(fuse_req_t request, fuse_ino_t, const char*, const char*, size_t, int) {
    fuse_reply_err(request, EOPNOTSUPP);
  }
  static void removexattr(fuse_req_t request, fuse_ino_t, const char*) {
    fuse_reply_err(request, EOPNOTSUPP);
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
    ops.create = Operations::create;
    ops.flush = Operations::flush;
    ops.release = Operations::release;
    ops.read = Operations::read;
    ops.write = Operations::write;
    ops.fsync = Operations::fsync;
    ops.lseek = Operations::lseek;
    ops.fallocate = Operations::fallocate;
    ops.flock = Operations::flock;
    ops.setlk = Operations::setlk;
    ops.getlk = Operations::getlk;
    ops.opendir = Operations::opendir;
    ops.readdir = Operations::readdir;
    ops.readdirplus = Operations::readdirplus;
    ops.releasedir = Operations::releasedir;
    ops.fsyncdir = Operations::fsyncdir;
    ops.mkdir = Operations::mkdir;
    ops.unlink = Operations::unlink;
    ops.rmdir = Operations::rmdir;
    ops.rename = Operations::rename;
    ops.getxattr = Operations::getxattr;
    ops.listxattr = Operations::listxattr;
    ops.setxattr = Operations::setxattr;
    ops.removexattr = Operations::removexattr;
    ops.statfs = Operations::statfs;
    ops.mknod = Operations::mknod;
    ops.symlink = Operations::symlink;
    ops.link = Operations::link;
    return ops;
  }();
  return operations;
}

}  // namespace sharrfs
