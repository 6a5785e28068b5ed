// The protocols: create, attach, remove, info, list.
#include "sharr/store.hpp"

#include <fmt/format.h>
#include <sys/mman.h>
#include <sys/sysmacros.h>
#include <sys/xattr.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <charconv>
#include <cstring>
#include <fstream>
#include <utility>

#include "literal.hpp"
#include "npy.hpp"
#include "staging.hpp"
#include "system.hpp"

namespace sharr {

// Makes Arrays for the functions of this file.
struct ArrayAccess {
  static Array map(Info info, Mode mode, int fd, std::string_view name) {
    const std::uint64_t length = info.offset + info.nbytes;
    if (length == 0) {
      // An empty object of SharedArray: there is nothing to map, and data() must not be null.
      alignas(16) static std::byte nothing[16];
      return {std::move(info), mode, nothing, 0};
    }
    if (length > SIZE_MAX) throw Error(ENOMEM, name);
    const int protection = mode == Mode::read ? PROT_READ : PROT_READ | PROT_WRITE;
    const int flags = mode == Mode::copy_on_write ? MAP_PRIVATE : MAP_SHARED;
    void* const base = mmap(nullptr, length, protection, flags, fd, 0);
    if (base == MAP_FAILED) {
      if (errno == ENODEV) {
        throw Error(ENODEV, name,
                    "cannot be mapped: its file system has no shared mappings (a sharrfs mount "
                    "without passthrough?)");
      }
      throw Error(errno, name);
    }
    return {std::move(info), mode, static_cast<std::byte*>(base), length};
  }
};

namespace {

using detail::ParseError;

// True when the file system that st is on is a sharrfs mount of this user or root. Anyone can mount
// a FUSE file system that claims to stand for somebody else's array.
bool trusted_mount(const struct stat& st) {
  const std::string device = fmt::format(" {}:{} ", major(st.st_dev), minor(st.st_dev));
  std::ifstream mounts("/proc/self/mountinfo");
  for (std::string line; std::getline(mounts, line);) {
    const std::size_t type = line.find(" - fuse.sharrfs ");
    if (type == std::string::npos || line.find(device) > type) continue;
    const std::string_view key = "user_id=";
    const std::size_t at = line.find(key, type);
    if (at == std::string::npos) return false;
    uid_t user = 0;
    const char* const digits = line.data() + at + key.size();
    const auto [end, error] = std::from_chars(digits, line.data() + line.size(), user);
    return error == std::errc{} && (user == 0 || user == geteuid());
  }
  return false;
}

bool same_file(const struct stat& a, const struct stat& b) {
  return a.st_ino == b.st_ino && a.st_size == b.st_size && a.st_ctim.tv_sec == b.st_ctim.tv_sec &&
         a.st_ctim.tv_nsec == b.st_ctim.tv_nsec;
}

// Replaces a file on a sharrfs mount by the object behind it, where that can be reached. Whatever
// stands in the way, the file on the mount serves too.
void look_behind_mount(const Name& name, FileDescriptor& fd, struct stat& st, int flags) {
  std::array<char, PATH_MAX + 16> uri;
  const ssize_t length = fgetxattr(fd.get(), uri_attribute, uri.data(), uri.size());
  if (length <= 0 || !trusted_mount(st)) return;
  // A write(2) in between changes the time of the one or the other, a new array of that name all.
  int missing = 0;
  for (int tries = 0; tries < 100; ++tries) {
    try {
      const Name other(std::string_view(uri.data(), static_cast<std::size_t>(length)));
      FileDescriptor behind = detail::open_file(other, flags);
      const struct stat found = detail::stat_file(behind.get(), other.given());
      if (found.st_dev != st.st_dev && same_file(found, st)) {
        fd = std::move(behind);
        st = found;
        return;
      }
    } catch (const Error& error) {
      if (error.errnum() != ENOENT) return;
      if (++missing == 5) return;  // out of reach, as in another container
    }
    fd = detail::open_file(name, flags);  // which may say that the name is gone
    st = detail::stat_file(fd.get(), name.given());
  }
}

// The same for the directory in which a file is to be made; nothing changes where it is on no such
// mount.
Name behind_mount(const Name& name) {
  if (name.shm()) return name;
  const std::size_t leaf = name.path().rfind('/') + 1;
  const std::string directory = leaf == 0 ? "." : name.path().substr(0, leaf);
  for (int tries = 0; tries < 100; ++tries) {
    struct stat st;
    if (stat(directory.c_str(), &st) != 0 || major(st.st_dev) != 0 ||
        st.st_blksize != mount_block_size) {
      return name;
    }
    std::array<char, PATH_MAX + 16> uri;
    const ssize_t length = getxattr(directory.c_str(), uri_attribute, uri.data(), uri.size());
    if (length <= 0 || !trusted_mount(st)) return name;
    try {
      const Name other = Name::directory({uri.data(), static_cast<std::size_t>(length)});
      const FileDescriptor behind = open_directory(other);
      struct stat found;
      if (fstat(behind.get(), &found) == 0 && found.st_dev != st.st_dev && same_file(found, st)) {
        return name.moved_to(other, name.path().substr(leaf));
      }
    } catch (const Error&) {
      break;
    }
  }
  return name;
}

bool one_order(const Shape& shape) {
  return std::ranges::count_if(shape, [](std::int64_t extent) { return extent != 1; }) <= 1 ||
         std::ranges::find(shape, 0) != shape.end();
}

Array create_new(const Name& given, const Shape& shape, const Dtype& dtype,
                 const CreateOptions& options) {
  const Name name = behind_mount(given);
  std::string header;
  std::uint64_t nbytes = 0;
  try {
    nbytes = detail::data_size(shape, dtype.itemsize());
    header = detail::format_header(dtype, shape, options.order);
  } catch (const ParseError& error) {
    throw ArgumentError(name.given(), error.what());
  }
  Info info{.name = given.uri(),
            .dtype = dtype,
            .shape = shape,
            .order = options.order,
            .offset = header.size(),
            .nbytes = nbytes,
            .format = fmt::format("NPY {}.0", int{header[6]})};
  detail::Staging staging(name, header.size() + nbytes);
  staging.allocate(options.reserve ? header.size() + nbytes : header.size(), options.on_signal);
  Array array = ArrayAccess::map(std::move(info), Mode::read_write, staging.fd(), name.given());
  std::memcpy(static_cast<char*>(array.data()) - header.size(), header.data(), header.size());
  staging.publish();
  return array;
}

}  // namespace

Array::Array(Array&& other) noexcept
    : info_(std::move(other.info_)),
      mode_(other.mode_),
      base_(other.base_),
      length_(std::exchange(other.length_, 0)) {}

Array& Array::operator=(Array&& other) noexcept {
  std::swap(info_, other.info_);
  std::swap(mode_, other.mode_);
  std::swap(base_, other.base_);
  std::swap(length_, other.length_);
  return *this;
}

Array::~Array() {
  if (length_ > 0) munmap(base_, length_);
}

void Array::check_itemsize(std::size_t size) const {
  if (size != info_.dtype.itemsize()) {
    throw ArgumentError(info_.name, fmt::format("its elements have {} bytes, the type asked for {}",
                                                info_.dtype.itemsize(), size));
  }
}

void Array::msync(int flags) const {
  // With nothing mapped the kernel still has a say about the flags.
  if (::msync(length_ > 0 ? base_ : nullptr, length_, flags) != 0) throw Error(errno, info_.name);
}

void Array::mlock() const {
  if (::mlock(base_, length_) == 0) return;
  if (errno == ENOMEM || errno == EPERM) {
    throw Error(errno, info_.name,
                fmt::format("cannot lock {} in memory: see 'ulimit -l' (RLIMIT_MEMLOCK)",
                            detail::human_size(length_)));
  }
  throw Error(errno, info_.name);
}

void Array::munlock() const {
  if (::munlock(base_, length_) != 0) throw Error(errno, info_.name);
}

Array create(const Name& name, const Shape& shape, const Dtype& dtype,
             const CreateOptions& options) {
  if (!options.exist_ok) return create_new(name, shape, dtype, options);
  while (true) {
    try {
      Array array = attach(name);
      const Info& info = array.info();
      if (info.shape != shape || info.dtype != dtype ||
          (info.order != options.order && !one_order(shape))) {
        throw Error(EEXIST, name.given(),
                    fmt::format("exists with shape {}, dtype {}, order {}", shape_text(info.shape),
                                info.dtype.str(), static_cast<char>(info.order)));
      }
      return array;
    } catch (const Error& error) {
      if (error.errnum() != ENOENT) throw;
    }
    try {
      return create_new(name, shape, dtype, options);
    } catch (const Error& error) {
      if (error.errnum() != EEXIST) throw;
      // Somebody was quicker, and theirs is as good; a symbolic link to nothing stays so for ever.
      struct stat st;
      if (!name.shm() && lstat(name.path().c_str(), &st) == 0 && S_ISLNK(st.st_mode)) throw;
    }
  }
}

Array attach(const Name& name, Mode mode) {
  const int flags = mode == Mode::read_write ? O_RDWR : O_RDONLY;
  FileDescriptor fd = detail::open_file(name, flags);
  struct stat st = detail::stat_file(fd.get(), name.given());
  if (!name.shm() && major(st.st_dev) == 0 && st.st_blksize == mount_block_size) {
    look_behind_mount(name, fd, st, flags);
  }
  Info info = read_info(fd.get(), st, name.given());
  info.name = name.uri();
  return ArrayAccess::map(std::move(info), mode, fd.get(), name.given());
}

Info info(const Name& name) {
  const FileDescriptor fd = detail::open_file(name, O_RDONLY);
  Info info = read_info(fd.get(), detail::stat_file(fd.get(), name.given()), name.given());
  info.name = name.uri();
  return info;
}

void remove(const Name& name) {
  info(name);
  const detail::Place place = detail::place_of(name);
  if (unlinkat(place.at(), place.file.c_str(), 0) != 0) detail::throw_errno(name);
}

std::vector<Info> list(const Name& directory) {
  const FileDescriptor root = open_directory(directory);
  std::string prefix = directory.uri();
  if (!prefix.ends_with('/')) prefix += '/';
  std::vector<Info> found;
  // Paths below root still to be read. Directories are opened one at a time, so that depth costs no
  // descriptors.
  std::vector<std::string> left = {""};
  while (!left.empty()) {
    const std::string below = std::move(left.back());
    left.pop_back();
    std::vector<Entry> entries;
    try {
      const FileDescriptor opened =
          below.empty() ? FileDescriptor() : open_beneath(root.get(), below, O_PATH | O_DIRECTORY);
      if (!below.empty() && !opened) continue;
      entries = scan(below.empty() ? root.get() : opened.get(), prefix + below);
    } catch (const Error& error) {
      if (below.empty()) throw Error(error.errnum(), directory.given(), error.message());
      continue;  // gone since, or not to be read
    }
    for (Entry& entry : entries) {
      if (entry.info) {
        found.push_back(*std::move(entry.info));
      } else {
        left.push_back(below + entry.name + "/");
      }
    }
  }
  std::ranges::sort(found, {}, &Info::name);
  return found;
}

}  // namespace sharr
