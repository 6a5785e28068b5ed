// Array objects by file descriptor: for programs that present stored arrays in another form, as the
// sharrfs mount does. All that is read here is untrusted. Thread-safe, like store.hpp.
#pragma once

#include <fcntl.h>
#include <sys/stat.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "sharr/store.hpp"

namespace sharr {

// Owns a file descriptor. A moved-from or default one is -1 and owns nothing.
class FileDescriptor {
 public:
  FileDescriptor() noexcept = default;
  explicit FileDescriptor(int fd) noexcept : fd_(fd) {}
  FileDescriptor(FileDescriptor&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  FileDescriptor& operator=(FileDescriptor&& other) noexcept {
    std::swap(fd_, other.fd_);
    return *this;
  }
  FileDescriptor(const FileDescriptor&) = delete;
  FileDescriptor& operator=(const FileDescriptor&) = delete;
  ~FileDescriptor();

  int get() const noexcept { return fd_; }
  int release() noexcept { return std::exchange(fd_, -1); }
  explicit operator bool() const noexcept { return fd_ >= 0; }

 private:
  int fd_ = -1;
};

// A directory of arrays, opened O_PATH. Under shm:// follows no symbolic link. Throws Error.
FileDescriptor open_directory(const Name& name);

// Opens path below dirfd without following a symbolic link, leaving dirfd's tree or its file
// system, or blocking on a FIFO. The path may be longer than PATH_MAX. Returns an empty descriptor
// with errno set when it cannot be had.
FileDescriptor open_beneath(int dirfd, const std::string& path, int flags);

// Names that begin so are those of files on their way to another name, where that takes one for a
// moment; no array and no namespace may have one.
constexpr std::string_view temporary_prefix = ".sharr-tmp-";
constexpr bool reserved(std::string_view name) noexcept {
  return name.starts_with(temporary_prefix);
}

// Who may do what with a file or directory. ACLs are the bytes of the attributes; empty where there
// is none.
struct Rights {
  uid_t uid;
  gid_t gid;
  mode_t mode;
  std::string acl;
  std::string default_acl;  // of a directory

  bool operator==(const Rights&) const = default;
};
// Those of what is open as fd, which may be O_PATH. Throws Error, like the functions that follow,
// of which name is for messages.
Rights rights_of(int fd, std::string_view name);
// A mode that grants nobody more than the ACL of a file of that mode does: the group's part of its
// own is what the ACL grants to anybody. Each of the group, and each of all others, may do as much
// by the ACL; whom that grants more has less.
mode_t mode_within_acl(int fd, mode_t mode, std::string_view name);
// Gives a new file or directory, to, the rights of another, owner and group as far as this process
// may. If the group stays its own, it and others are granted what both were. Whether it has the
// other's owner.
bool inherit(const Rights& rights, int to, std::string_view name);
// Takes from a new file, to, what another of its owner's does not grant.
void grant_no_more(const Rights& rights, int to, std::string_view name);
// Makes another user the owner of a file, if it is not: nobody but the old owner is granted more
// than before.
void give_away(int fd, uid_t uid, gid_t gid, std::string_view name);

// Opens an array to read it, not to map it: a read finds zeros where a file has holes, and takes no
// memory for them. Throws as attach().
struct OpenArray {
  FileDescriptor fd;
  Info info;
};
OpenArray open_array(const Name& name);

// For NPY files that come or go by other ways than names. header_size: of the header, where the
// data starts, by the first 12 bytes. parse_header: what that many bytes say. format_header: the
// header of an array that create() makes. The first two throw FormatError, named by uri.
std::size_t header_size(std::string_view head, std::string_view uri);
Info parse_header(std::string_view head, std::string_view uri);
std::string format_header(const Info& info);

// Reads what the array in an open file is. st is the file's fstat, uri becomes Info::name.
// Throws FormatError, named by uri, when it is no array; Error when reading fails.
Info read_info(int fd, const struct stat& st, std::string_view uri);

// One entry of a directory: an array, or a directory.
struct Entry {
  std::string name;
  struct stat st;
  std::shared_ptr<const Info> info;  // of an array; none: a directory
};

// The arrays and directories directly in a directory, by name, with URIs that begin with prefix.
// What is neither, cannot be opened, is on another file system or has a reserved name is left out;
// a file of a reserved name whose maker is dead is removed. Throws Error when the directory itself
// cannot be read, or when descriptors or memory run out (EMFILE, ENFILE, ENOMEM).
std::vector<Entry> scan(int dirfd, std::string_view prefix);

// As list(); the same objects again for arrays that have not changed since the last time.
std::vector<std::shared_ptr<const Info>> list_shared(const Name& directory);

// The one entry of that name, by the same rules and with the same errors; none when scan() would
// leave it out.
std::optional<Entry> inspect(int dirfd, const std::string& name, std::string_view prefix);

// A file on its way to being an array, for whoever writes it byte by byte. Nobody sees it before it
// is published; unless that happens it goes with this object, and when the process is killed, by
// itself. One thread at a time.
class Draft {
 public:
  // An empty file in the directory dirfd (O_PATH will do), mode as for open(2). uri is for
  // messages. Throws Error: EACCES, ENOSPC, ENOENT where the directory has been removed.
  Draft(int dirfd, std::string_view uri, mode_t mode);
  Draft(Draft&& other) noexcept;
  ~Draft();

  // Open for reading and writing.
  int fd() const noexcept;
  // Gives the file another size, in bytes, with memory or blocks for what is added. Throws Error
  // ENOSPC where there is none; then it stays as it is.
  void resize(std::uint64_t size);
  // Whether there would be room for that. Throws as resize().
  void check_space(std::uint64_t size);
  // What the file is when it is one whole NPY array and nothing else. With `declared` a header
  // alone will do; it stands for an array of zeros. Throws FormatError, Error when reading fails.
  Info check(bool declared) const;
  // Gives the file the size that info says, which check() returned, and memory or blocks where it
  // has holes; its time of modification stays, if it may be set. Throws Error ENOSPC.
  void reserve(const Info& info);
  // Gives it its name in the directory dirfd. Throws Error EEXIST when there is one already, unless
  // that is to be replaced, which happens in one step; ENOENT where the directory has been removed.
  void publish(int dirfd, const std::string& name, bool replace);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

// The processors that this process may keep busy: by its affinity, and by the CPU limits of its
// control groups (cpu.max, cpu.cfs_quota_us). At least 1.
unsigned available_processors();

// How attach() knows a file on a sharrfs mount: its st_blksize, and the xattr that holds the URI of
// the object behind it.
constexpr blksize_t mount_block_size = blksize_t{1} << 20;
constexpr const char* uri_attribute = "user.sharr.uri";

}  // namespace sharr
