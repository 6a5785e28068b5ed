// Owner, mode and ACLs of what takes another's place.
#include <endian.h>
#include <linux/limits.h>
#include <linux/posix_acl.h>
#include <linux/posix_acl_xattr.h>
#include <sys/stat.h>
#include <sys/xattr.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>

#include "format.hpp"
#include "sharr/object.hpp"

namespace sharr {
namespace {

constexpr const char* access_acl = "system.posix_acl_access";
constexpr const char* default_acl = "system.posix_acl_default";

// Empty where there is none, or the file system has none.
std::string acl_of(int fd, const char* key, std::string_view name) {
  std::array<char, XATTR_SIZE_MAX> value;
  ssize_t size = fgetxattr(fd, key, value.data(), value.size());
  if (size < 0 && errno == EBADF) {  // O_PATH
    const std::string self = detail::formatted("/proc/self/fd/{}", fd);
    size = getxattr(self.c_str(), key, value.data(), value.size());
  }
  if (size < 0 && errno != ENODATA && errno != EOPNOTSUPP) throw Error(errno, name);
  return {value.data(), static_cast<std::size_t>(std::max<ssize_t>(size, 0))};
}

void set_acl(int fd, const char* key, const std::string& acl, std::string_view name) {
  // The directory that it is in may have given it one.
  if (acl.empty() && acl_of(fd, key, name).empty()) return;
  const int failed =
      acl.empty() ? fremovexattr(fd, key) : fsetxattr(fd, key, acl.data(), acl.size(), 0);
  if (failed != 0) throw Error(errno, name);
}

// As mode_within_acl().
mode_t within(const std::string& acl, mode_t mode) {
  mode_t group = mode >> 3U & S_IRWXO;
  mode_t other = mode & S_IRWXO;
  mode_t mask = S_IRWXO;
  // From the end, where the mask is, to what it bounds: acl(5) has an order.
  posix_acl_xattr_entry entry;
  for (std::size_t end = acl.size(); end >= sizeof(posix_acl_xattr_header) + sizeof(entry);
       end -= sizeof(entry)) {
    std::memcpy(&entry, acl.data() + end - sizeof(entry), sizeof(entry));
    const mode_t granted = le16toh(entry.e_perm) & mask;
    const unsigned tag = le16toh(entry.e_tag);
    if (tag == ACL_MASK) mask = granted;
    if (tag == ACL_GROUP_OBJ || tag == ACL_USER) group &= granted;
    if (tag == ACL_GROUP || tag == ACL_USER) other &= granted;
  }
  return (mode & ~static_cast<mode_t>(S_IRWXG | S_IRWXO)) | group << 3U | other;
}

// Rights as a mode alone. With another group nobody knows who is in which: all have what both had.
mode_t mode_with_group(const Rights& rights, gid_t group) {
  const mode_t mode = within(rights.acl, rights.mode);
  if (group == rights.gid) return mode;
  const mode_t both = mode & mode >> 3U & S_IRWXO;
  return (mode & ~static_cast<mode_t>(S_IRWXG | S_IRWXO)) | both << 3U | both;
}

struct stat stat_of(int fd, std::string_view name) {
  struct stat st;
  if (fstat(fd, &st) != 0) throw Error(errno, name);
  return st;
}

void set_mode(int to, mode_t mode, const std::string& acl, std::string_view name) {
  // Without its ACL the mode, of which the group's part bounds that, would let in who was kept out.
  set_acl(to, access_acl, acl, name);
  if (fchmod(to, mode) != 0) throw Error(errno, name);
}

}  // namespace

Rights rights_of(int fd, std::string_view name) {
  const struct stat st = stat_of(fd, name);
  const bool directory = S_ISDIR(st.st_mode);
  return {.uid = st.st_uid,
          .gid = st.st_gid,
          .mode = st.st_mode & (directory ? 07777 : 01777),
          .acl = acl_of(fd, access_acl, name),
          .default_acl = directory ? acl_of(fd, default_acl, name) : std::string()};
}

mode_t mode_within_acl(int fd, mode_t mode, std::string_view name) {
  return within(acl_of(fd, access_acl, name), mode);
}

bool inherit(const Rights& rights, int to, std::string_view name) {
  const struct stat st = stat_of(to, name);
  bool owner = st.st_uid == rights.uid;
  bool group = st.st_gid == rights.gid;
  // EINVAL: there is no such user in this namespace.
  const auto refused = [&] {
    if (errno != EPERM && errno != EINVAL) throw Error(errno, name);
    return true;
  };
  if (!owner || !group) {
    if (fchown(to, rights.uid, rights.gid) == 0) {
      owner = group = true;
    } else if (refused() && !group) {
      // Only root may give files away; others, to a group that they are in.
      group = fchown(to, static_cast<uid_t>(-1), rights.gid) == 0 || !refused();
    }
  }
  if (group) {
    set_mode(to, rights.mode, rights.acl, name);
  } else {
    set_mode(to, mode_with_group(rights, st.st_gid), {}, name);
  }
  if (S_ISDIR(st.st_mode)) set_acl(to, default_acl, rights.default_acl, name);
  return owner;
}

void grant_no_more(const Rights& rights, int to, std::string_view name) {
  const Rights own = rights_of(to, name);
  if (own.gid == rights.gid && own.acl == rights.acl) {
    return set_mode(to, own.mode & rights.mode, own.acl, name);
  }
  set_mode(to, within(own.acl, own.mode) & mode_with_group(rights, own.gid), {}, name);
}

void give_away(int fd, uid_t uid, gid_t gid, std::string_view name) {
  const Rights rights = rights_of(fd, name);
  if (rights.uid == uid) return;
  set_mode(fd, mode_with_group(rights, gid), {}, name);
  if (fchown(fd, uid, gid) != 0) throw Error(errno, name);
}

}  // namespace sharr
