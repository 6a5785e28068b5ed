// The protocols of one array that exists: attach, rename, remove, info; and list.
#include "sharr/store.hpp"

#include <linux/limits.h>
#include <sys/mman.h>
#include <sys/sysmacros.h>
#include <sys/xattr.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <charconv>
#include <chrono>
#include <cstring>
#include <thread>
#include <utility>

#include "access.hpp"
#include "format.hpp"
#include "mapping.hpp"
#include "memory.hpp"
#include "system.hpp"

namespace sharr {

Array ArrayAccess::map(Info info, const Identity& identity, Mode mode, int fd,
                       std::string_view name) {
  auto mapping = detail::Mapping::make(fd, info, identity, mode, name);
  return {std::move(info), identity, mode, std::move(mapping)};
}

namespace {

// Elsewhere to look is not as good as to open: in a namespace no symbolic link is to be followed,
// and there are file systems that ask somebody else, or remember what was.
bool directly_in_shm(std::string_view uri) {
  constexpr std::string_view scheme = "shm://";
  return uri.starts_with(scheme) && uri.find('/', scheme.size()) == std::string_view::npos;
}

}  // namespace

Array ArrayAccess::attach(int fd, const detail::Stat& stat, Mode mode, std::string_view name,
                          std::string uri) {
  std::optional<Info> info = detail::known(stat);
  const bool known = info.has_value();
  if (!known) {
    timespec now{};
    clock_gettime(CLOCK_REALTIME_COARSE, &now);
    info = read_info(fd, stat.st, name);
    detail::remember(*info, stat, now);
  }
  auto mapping = detail::Mapping::find(stat.identity, mode);
  if (!mapping || info->offset + info->nbytes > mapping->length()) {
    mapping = detail::Mapping::make(fd, *info, stat.identity, mode, name);
  } else if (known && directly_in_shm(uri)) {
    detail::Mapping::note_opened(uri, stat, mode);
  }
  info->name = std::move(uri);
  return {*std::move(info), stat.identity, mode, std::move(mapping)};
}

std::optional<Array> ArrayAccess::attach_again(const Name& name, Mode mode,
                                               const std::string& uri) {
  if (!directly_in_shm(uri) || !detail::Mapping::opened(uri, mode)) return {};
  try {
    const detail::Stat stat =
        detail::stat_at(AT_FDCWD, name.path(), AT_SYMLINK_NOFOLLOW, name.given());
    auto mapping = detail::Mapping::find_opened(stat, mode);
    std::optional<Info> info = mapping ? detail::known(stat) : std::nullopt;
    if (!info || info->offset + info->nbytes > mapping->length()) return {};
    info->name = uri;
    return Array(*std::move(info), stat.identity, mode, std::move(mapping));
  } catch (const Error&) {
    return {};
  }
}

namespace {

// True when the file system that st is on is a sharrfs mount of this user or root. Anyone can mount
// a FUSE file system that claims to stand for somebody else's array.
bool trusted_mount(const struct stat& st) {
  const std::string mount = detail::mount_of(st.st_dev);
  const std::string_view key = "user_id=";
  // In the options, which are the last of it: whoever mounts gives the source its name.
  const std::size_t at = mount.find(key, mount.rfind(' ') + 1);
  if (!mount.starts_with("fuse.sharrfs ") || at == std::string::npos) return false;
  uid_t user = 0;
  const auto [end, error] =
      std::from_chars(mount.data() + at + key.size(), mount.data() + mount.size(), user);
  return error == std::errc{} && (user == 0 || user == geteuid());
}

bool same_file(const struct stat& a, const struct stat& b) {
  return a.st_ino == b.st_ino && a.st_size == b.st_size && a.st_ctim.tv_sec == b.st_ctim.tv_sec &&
         a.st_ctim.tv_nsec == b.st_ctim.tv_nsec;
}

// How often to look until a mount and what is behind it say the same, as they do but for a moment:
// a write(2) in between changes the time of the one or the other, a new array of that name all, and
// of a change beside the mount the kernel hears milliseconds later.
constexpr int most_looks = 40;

// Before each of them.
void wait_for_mount(int looks) {
  constexpr int at_once = 10;
  if (looks >= at_once) std::this_thread::sleep_for(std::chrono::milliseconds(1));
}

// Replaces a file on a sharrfs mount by the object behind it, where that can be reached. Whatever
// stands in the way, the file on the mount serves too.
void look_behind_mount(const Name& name, FileDescriptor& fd, detail::Stat& stat, int flags) {
  std::array<char, PATH_MAX + 16> uri;
  const ssize_t length = fgetxattr(fd.get(), uri_attribute, uri.data(), uri.size());
  if (length <= 0 || !trusted_mount(stat.st)) return;
  int missing = 0;
  for (int looks = 0; looks < most_looks; ++looks) {
    wait_for_mount(looks);
    try {
      const Name other(std::string_view(uri.data(), static_cast<std::size_t>(length)));
      FileDescriptor behind = detail::open_file(other, flags);
      const detail::Stat found = detail::stat_file(behind.get(), other.given());
      if (found.st.st_dev != stat.st.st_dev && same_file(found.st, stat.st)) {
        fd = std::move(behind);
        stat = found;
        return;
      }
    } catch (const Error& error) {
      if (error.errnum() != ENOENT) return;
      if (++missing == 5) return;  // out of reach, as in another container
    }
    fd = detail::open_file(name, flags);  // which may say that the name is gone
    stat = detail::stat_file(fd.get(), name.given(), AT_STATX_FORCE_SYNC);
  }
}

}  // namespace

namespace detail {

// For a directory what look_behind_mount() is for a file.
Name behind_mount(const Name& name) {
  if (name.shm()) return name;
  const std::size_t leaf = name.path().rfind('/') + 1;
  const std::string directory = leaf == 0 ? "." : name.path().substr(0, leaf);
  for (int looks = 0; looks < most_looks; ++looks) {
    wait_for_mount(looks);
    try {
      // What the kernel remembers may be older than what this process has just made there.
      const struct stat st = stat_at(AT_FDCWD, directory, AT_STATX_FORCE_SYNC, name.given()).st;
      if (major(st.st_dev) != 0 || st.st_blksize != mount_block_size) return name;
      std::array<char, PATH_MAX + 16> uri;
      const ssize_t length = getxattr(directory.c_str(), uri_attribute, uri.data(), uri.size());
      if (length <= 0 || !trusted_mount(st)) return name;
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

std::optional<Rights> rights_of_array(const Name& name) {
  try {
    const FileDescriptor fd = open_file(name, O_RDONLY);
    const Stat stat = stat_file(fd.get(), name.given());
    read_info(fd.get(), stat.st, name.given());
    return rights_of(fd.get(), name.given());
  } catch (const Error& error) {
    if (error.errnum() != ENOENT) throw;
    return {};
  }
}

}  // namespace detail

Array::Array(Info info, const Identity& identity, Mode mode,
             std::shared_ptr<const detail::Mapping> mapping) noexcept
    : info_(std::move(info)),
      identity_(identity),
      mode_(mode),
      mapping_(std::move(mapping)),
      base_(mapping_->base()) {}
Array::Array(Array&& other) noexcept = default;
Array& Array::operator=(Array&& other) noexcept = default;
Array::~Array() = default;

void Array::check_itemsize(std::size_t size) const {
  if (size != info_.dtype.itemsize()) {
    throw ArgumentError(info_.name,
                        detail::formatted("its elements have {} bytes, the type asked for {}",
                                          info_.dtype.itemsize(), size));
  }
}

void Array::msync(int flags) const {
  // With nothing mapped the kernel still has a say about the flags.
  const std::size_t length = mapping_->length();
  if (::msync(length > 0 ? base_ : nullptr, length, flags) != 0) throw Error(errno, info_.name);
}

void Array::mlock() const {
  if (::mlock(base_, mapping_->length()) == 0) return;
  if (errno == ENOMEM || errno == EPERM) {
    throw Error(errno, info_.name,
                detail::formatted("cannot lock {} in memory: see 'ulimit -l' (RLIMIT_MEMLOCK)",
                                  detail::human_size(mapping_->length())));
  }
  throw Error(errno, info_.name);
}

void Array::munlock() const {
  if (::munlock(base_, mapping_->length()) != 0) throw Error(errno, info_.name);
}

namespace {

// The object itself, also by a path on a sharrfs mount.
FileDescriptor open_object(const Name& name, int flags, detail::Stat& stat) {
  FileDescriptor fd = detail::open_file(name, flags);
  stat = detail::stat_file(fd.get(), name.given());
  if (!name.shm() && major(stat.st.st_dev) == 0 && stat.st.st_blksize == mount_block_size) {
    look_behind_mount(name, fd, stat, flags);
  }
  return fd;
}

}  // namespace

Array attach(const Name& name, Mode mode) {
  std::string uri = name.uri();
  if (std::optional<Array> array = ArrayAccess::attach_again(name, mode, uri)) {
    return *std::move(array);
  }
  detail::Stat stat{};
  const FileDescriptor fd = open_object(name, mode == Mode::read_write ? O_RDWR : O_RDONLY, stat);
  return ArrayAccess::attach(fd.get(), stat, mode, name.given(), std::move(uri));
}

OpenArray open_array(const Name& name) {
  FileDescriptor fd = detail::open_file(name, O_RDONLY);
  Info info = read_info(fd.get(), detail::stat_file(fd.get(), name.given()).st, name.given());
  info.name = name.uri();
  return {std::move(fd), std::move(info)};
}

Info info(const Name& name) {
  detail::Stat stat{};
  const FileDescriptor fd = open_object(name, O_RDONLY, stat);
  Info info = read_info(fd.get(), stat.st, name.given());
  info.name = name.uri();
  const std::uint64_t size = info.offset + info.nbytes;
  if (size >= detail::huge_page_size() && detail::gives_huge_pages(stat.st.st_dev)) {
    info.huge = detail::huge_bytes(fd.get(), size);
  }
  return info;
}

namespace {

// Where the array is, if this process has it mapped: then there is no need to read it.
std::optional<detail::Place> place_if_mapped(const Name& name) {
  if (!detail::Mapping::any()) return {};
  try {
    detail::Place place = detail::place_of(name);
    const detail::Stat stat =
        detail::stat_at(place.at(), place.file, AT_SYMLINK_NOFOLLOW, name.given());
    if (detail::Mapping::exists(stat.identity)) return place;
  } catch (const Error&) {  // which reading it explains better
  }
  return {};
}

}  // namespace

void remove(const Name& name) {
  std::optional<detail::Place> place = place_if_mapped(name);
  if (!place) {
    open_array(name);
    place = detail::place_of(name);
  }
  if (unlinkat(place->at(), place->file.c_str(), 0) != 0) detail::throw_errno(name);
}

void rename(const Name& from, const Name& to, bool replace) {
  const Name old_name = detail::behind_mount(from);
  const Name new_name = detail::behind_mount(to);
  open_array(old_name);
  if (replace) detail::rights_of_array(new_name);
  const detail::Place old_place = detail::place_of(old_name);
  detail::Place place = detail::place_of(new_name, true);
  if (renameat2(old_place.at(), old_place.file.c_str(), place.at(), place.file.c_str(),
                replace ? 0U : RENAME_NOREPLACE) == 0) {
    return;
  }
  const int errnum = errno;
  detail::unmake(place.made);
  throw Error(errnum, errnum == EEXIST ? to.given() : from.given());
}

std::vector<Info> list(const Name& directory) {
  std::vector<Info> found;
  for (const auto& info : list_shared(directory)) found.push_back(*info);
  return found;
}

std::vector<std::shared_ptr<const Info>> list_shared(const Name& directory) {
  return detail::list(open_directory(directory), directory);
}

std::string detail::list_prefix(const Name& directory) {
  std::string prefix = directory.uri();
  if (!prefix.ends_with('/')) prefix += '/';
  return prefix;
}

std::vector<std::shared_ptr<const Info>> detail::list(const FileDescriptor& root,
                                                      const Name& directory) {
  const std::string prefix = list_prefix(directory);
  std::vector<std::shared_ptr<const Info>> found;
  // Paths below root still to be read. Directories are opened one at a time, so that depth costs no
  // descriptors.
  std::vector<std::string> left = {""};
  while (!left.empty()) {
    const std::string below = std::move(left.back());
    left.pop_back();
    std::vector<std::string> directories;
    try {
      const FileDescriptor opened =
          below.empty() ? FileDescriptor() : open_beneath(root.get(), below, O_PATH | O_DIRECTORY);
      if (!below.empty() && !opened) throw Error(errno, prefix + below);
      scan_infos(below.empty() ? root.get() : opened.get(), prefix + below, found, directories);
    } catch (const Error& error) {
      if (below.empty() || exhausted(error.errnum())) {
        throw Error(error.errnum(), directory.given(), error.message());
      }
      continue;  // gone since, or not to be read
    }
    for (const std::string& name : directories) {
      std::string path = below + name;
      path += '/';
      // No name reaches what is deeper, which costs the more the deeper it is.
      if (directory.path().size() + 1 + path.size() < PATH_MAX) left.push_back(std::move(path));
    }
  }
  // Where nothing has directories it is in order already.
  const auto name = [](const auto& info) -> const std::string& { return info->name; };
  if (!std::ranges::is_sorted(found, {}, name)) std::ranges::sort(found, {}, name);
  return found;
}

}  // namespace sharr
