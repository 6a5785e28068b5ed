#include "caller.hpp"

#include <fcntl.h>
#include <grp.h>
#include <sys/fsuid.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
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

// The system calls return what was before, and say nothing where they may do nothing.
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
  const mode_t mode = sharr::mode_within_acl(fd, st.st_mode, "");
  const bool in_group =
      caller->gid == st.st_gid || std::ranges::count(groups_of(request), st.st_gid) > 0;
  const mode_t granted = caller->uid == st.st_uid ? mode >> 6U : in_group ? mode >> 3U : mode;
  if ((static_cast<mode_t>(access) & ~granted) == 0) return true;
  errno = EACCES;
  return false;
}

void give_to(fuse_req_t request, int fd, int directory) {
  if (geteuid() != 0) return;
  const fuse_ctx* const caller = fuse_req_ctx(request);
  struct stat in;
  if (fstat(directory, &in) != 0) fail(errno);
  const gid_t group = (in.st_mode & S_ISGID) != 0 ? in.st_gid : caller->gid;
  sharr::give_away(fd, caller->uid, group, "");
}

}  // namespace sharrfs
