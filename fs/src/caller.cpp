#include "caller.hpp"

#include <grp.h>
#include <sys/fsuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <system_error>

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
    setfsgid(caller->gid);
    return;
  }
  const int count = getgroups(0, nullptr);
  if (count < 0) throw std::system_error(errno, std::generic_category());
  groups_.resize(static_cast<std::size_t>(count));
  if (getgroups(count, groups_.data()) != count || set_thread_groups(groups_of(request)) != 0) {
    throw std::system_error(errno, std::generic_category());
  }
  switched_ = true;
  setfsgid(caller->gid);
  setfsuid(caller->uid);
}

AsCaller::~AsCaller() {
  setfsgid(getegid());
  if (!switched_) return;
  setfsuid(geteuid());
  // Going on with somebody else's groups would be worse than not going on.
  if (set_thread_groups(groups_) != 0) std::abort();
}

}  // namespace sharrfs
