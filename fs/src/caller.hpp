// File system permissions of whoever made a request, for as long as the object lives.
#pragma once

#include <fuse_lowlevel.h>
#include <sys/types.h>

#include <vector>

namespace sharrfs {

// Gives the calling thread the caller's file system gid, and where its uid is not 0 that and its
// groups, which takes the file capabilities away; the destructor gives everything back. Does
// nothing in a daemon that is not root: then the kernel compares with the daemon's own rights.
// Throws std::system_error.
class AsCaller {
 public:
  explicit AsCaller(fuse_req_t request);
  AsCaller(const AsCaller&) = delete;
  AsCaller& operator=(const AsCaller&) = delete;
  ~AsCaller();
  // Whether that makes a difference to what is allowed.
  bool switched() const { return switched_; }

 private:
  bool switched_ = false;
  std::vector<gid_t> groups_;  // the daemon's own
};

}  // namespace sharrfs
