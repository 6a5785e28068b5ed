#include "caller.hpp"

#include <endian.h>
#include <fcntl.h>
#include <grp.h>
#include <linux/limits.h>
#include <linux/posix_acl.h>
#include <linux/posix_acl_xattr.h>
#include <sys/fsuid.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/xattr.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <string>
#include <system_error>

#include "node.hpp"

namespace sharrfs {
namespace {

// glibc's setgroups() is for the whole process; the system call is for the thread.
long set_thread_groups(const std::vector<gid_t>& groups) {
  return syscall(SYS_setgroups, groups.size(), groups.data());
}

std::vector<gid_t> groups_of(fuse_req_t request) {
  std::vector<gid_t> groups(64);
  while (true) {
    const int count = fuse_req_getgroups(request, static_cast<int>(groups.size()), groups.data());
    if (count < 0)
      return {};  // the caller is gone, or in a pid namespace that is not seen from here
    const auto size = static_cast<std::size_t>(count);
    const bool all = size <= groups.size();
    groups.resize(size);
    if (all) return groups;
  }
}

constexpr const char* access_acl = "system.posix_acl_access";

// Empty where there is none, or the file system has none.
std::string acl_of(int fd) {
  std::array<char, XATTR_SIZE_MAX> value;
  const ssize_t size = getxattr(self(fd).c_str(), access_acl, value.data(), value.size());
  if (size < 0 && errno != ENODATA && errno != EOPNOTSUPP) fail(errno);
  return {value.data(), static_cast<std::size_t>(std::max<ssize_t>(size, 0))};
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

void set_mode(int to, mode_t mode, const std::string& acl) {
  // The directory may have given it one.
  if (acl.empty() && !acl_of(to).empty() && fremovexattr(to, access_acl) != 0) fail(errno);
  if (fchmod(to, mode) != 0) fail(errno);
  // Without it the mode, of which the group's part bounds it, would let in who was kept out.
  if (!acl.empty() && fsetxattr(to, access_acl, acl.data(), acl.size(), 0) != 0) fail(errno);
}

}  // namespace

AsCaller::AsCaller(fuse_req_t request) {
  const fuse_ctx* const caller = fuse_req_ctx(request);
  if (geteuid() != 0) return;
  if (caller->uid == 0) {
    set_file_system_ids(geteuid(), caller->gid);
    return;
  }
  const int count = getgroups(0, nullptr);
  if (count < 0) throw std::system_error(errno, std::generic_category());
  groups_.resize(static_cast<std::size_t>(count));
  if (getgroups(count, groups_.data()) != count || set_thread_groups(groups_of(request)) != 0) {
    throw std::system_error(errno, std::generic_category());
  }
  switched_ = true;
  set_file_system_ids(caller->uid, caller->gid);
}

AsCaller::~AsCaller() { restore(); }

// They return what was before, and do nothing without saying so where they may not.
void AsCaller::set_file_system_ids(uid_t uid, gid_t gid) {
  constexpr auto none = static_cast<id_t>(-1);
  setfsgid(gid);
  setfsuid(uid);
  if (static_cast<gid_t>(setfsgid(none)) == gid && static_cast<uid_t>(setfsuid(none)) == uid)
    return;
  restore();
  throw std::system_error(EPERM, std::generic_category());
}

void AsCaller::restore() noexcept {
  if (!switched_) {
    setfsgid(getegid());
    return;
  }
  setfsuid(geteuid());
  setfsgid(getegid());
  // Going on with somebody else's groups would be worse than not going on.
  if (set_thread_groups(groups_) != 0) std::abort();
}

bool may(fuse_req_t request, int fd, int access) {
  const fuse_ctx* const caller = fuse_req_ctx(request);
  if (caller->uid == 0 || caller->uid == geteuid()) return true;
  if (geteuid() == 0) {
    const AsCaller as(request);
    return faccessat(fd, "", access, AT_EACCESS | AT_EMPTY_PATH) == 0;
  }
  struct stat st;
  if (fstat(fd, &st) != 0) return false;
  const mode_t mode = mode_within_acl(fd, st.st_mode);
  const bool in_group =
      caller->gid == st.st_gid || std::ranges::count(groups_of(request), st.st_gid) > 0;
  const mode_t granted = caller->uid == st.st_uid ? mode >> 6U : in_group ? mode >> 3U : mode;
  if ((static_cast<mode_t>(access) & ~granted) == 0) return true;
  errno = EACCES;
  return false;
}

mode_t mode_within_acl(int fd, mode_t mode) { return within(acl_of(fd), mode); }

Rights rights_of(int fd) {
  struct stat st;
  if (fstat(fd, &st) != 0) fail(errno);
  return {.uid = st.st_uid, .gid = st.st_gid, .mode = st.st_mode & 01777, .acl = acl_of(fd)};
}

bool inherit(const Rights& rights, int to) {
  struct stat made;
  if (fstat(to, &made) != 0) fail(errno);
  const bool differs = made.st_uid != rights.uid || made.st_gid != rights.gid;
  if (!differs || fchown(to, rights.uid, rights.gid) == 0) {
    set_mode(to, rights.mode, rights.acl);
    return true;
  }
  if (errno != EPERM && errno != EINVAL) fail(errno);  // EINVAL: no such user in this namespace
  set_mode(to, mode_with_group(rights, made.st_gid), {});
  return made.st_uid == rights.uid;
}

void grant_no_more(const Rights& rights, int to) {
  const Rights own = rights_of(to);
  set_mode(to, within(own.acl, own.mode) & mode_with_group(rights, own.gid), {});
}

void give_to(fuse_req_t request, int fd, int directory) {
  if (geteuid() != 0) return;
  const fuse_ctx* const caller = fuse_req_ctx(request);
  const Rights rights = rights_of(fd);
  if (rights.uid == caller->uid) return;
  struct stat in;
  if (fstat(directory, &in) != 0) fail(errno);
  const gid_t group = (in.st_mode & S_ISGID) != 0 ? in.st_gid : caller->gid;
  set_mode(fd, mode_with_group(rights, group), {});
  if (fchown(fd, caller->uid, group) != 0) fail(errno);
}

}  // namespace sharrfs
