// Array objects by file descriptor: for programs that present stored arrays in another form, as the
// sharrfs mount does. All that is read here is untrusted. Thread-safe, like store.hpp.
#pragma once

#include <fcntl.h>
#include <sys/stat.h>

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
// system, or blocking on a FIFO. Returns an empty descriptor with errno set when it cannot be had.
FileDescriptor open_beneath(int dirfd, const std::string& path, int flags) noexcept;

// Reads what the array in an open file is. st is the file's fstat, uri becomes Info::name.
// Throws FormatError, named by uri, when it is no array; Error when reading fails.
Info read_info(int fd, const struct stat& st, std::string_view uri);

// One entry of a directory: an array, or a directory.
struct Entry {
  std::string name;
  struct stat st;
  std::optional<Info> info;  // of an array; none: a directory
};

// The arrays and directories directly in a directory, unsorted, with URIs that begin with prefix.
// What is neither, cannot be opened, is on another file system or is a temporary name of create()
// is left out. Throws Error when the directory itself cannot be read.
std::vector<Entry> scan(int dirfd, std::string_view prefix);

// The one entry of that name, by the same rules; none when scan() would leave it out.
std::optional<Entry> inspect(int dirfd, const std::string& name, std::string_view prefix);

// How attach() knows a file on a sharrfs mount: its st_blksize, and the xattr that holds the URI of
// the object behind it.
constexpr blksize_t mount_block_size = blksize_t{1} << 20;
constexpr const char* uri_attribute = "user.sharr.uri";

}  // namespace sharr
