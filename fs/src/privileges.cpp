#include "privileges.hpp"

#include <sys/capability.h>
#include <sys/prctl.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <memory>
#include <system_error>

namespace sharrfs {
namespace {

constexpr std::array kept = {
    CAP_SYS_ADMIN,     // passthrough, and to unmount
    CAP_SETUID,        // to do what a caller asks for with the caller's rights,
    CAP_SETGID,        // which takes them from
    CAP_CHOWN,         // these four
    CAP_FOWNER,        //
    CAP_DAC_OVERRIDE,  //
    CAP_DAC_READ_SEARCH,
    CAP_FSETID,      // root's directories keep their set-group-ID bit whatever their group
    CAP_SYS_PTRACE,  // to see which process has a file open
};

[[noreturn]] void fail() {
  throw std::system_error(errno, std::generic_category(), "capabilities");
}

struct Freed {
  void operator()(cap_t state) const { cap_free(state); }
};
using State = std::unique_ptr<std::remove_pointer_t<cap_t>, Freed>;

}  // namespace

void drop_privileges() {
  if (geteuid() != 0) return;
  const State had(cap_get_proc());
  const State left(cap_init());
  if (!had || !left) fail();
  for (const cap_value_t capability : kept) {
    cap_flag_value_t permitted = CAP_CLEAR;  // a container may have fewer
    if (cap_get_flag(had.get(), capability, CAP_PERMITTED, &permitted) != 0) fail();
    if (permitted == CAP_CLEAR) continue;
    for (const cap_flag_t set : {CAP_PERMITTED, CAP_EFFECTIVE}) {
      if (cap_set_flag(left.get(), set, 1, &capability, CAP_SET) != 0) fail();
    }
  }
  if (cap_set_proc(left.get()) != 0) fail();
  // Root would get all of them back by executing a program.
  if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0) fail();
}

}  // namespace sharrfs
