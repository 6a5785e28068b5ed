// What whoever made a request may do with files.
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

 private:
  void set_file_system_ids(uid_t uid, gid_t gid);
  void restore() noexcept;

  bool switched_ = false;
  std::vector<gid_t> groups_;  // the daemon's own
};

// Whether the caller may read or write (R_OK, W_OK) the file open as fd, which may be O_PATH. The
// kernel has asked that of the mode alone, and perhaps of another file that had the name. False
// with errno set.
bool may(fuse_req_t request, int fd, int access);

// Makes the caller, in whose directory a new file is to be, its owner, if it has inherited another:
// nobody but the old owner is granted more than before. Does nothing in a daemon that is not root.
// Throws std::system_error.
void give_to(fuse_req_t request, int fd, int directory);

}  // namespace sharrfs
