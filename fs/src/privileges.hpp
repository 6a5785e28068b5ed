// What the daemon may do once it has mounted.
#pragma once

namespace sharrfs {

// Gives up, for good and for everything that is started from here on, all capabilities but those
// that sharrfs(1) lists under PRIVILEGES. To be called before there are threads. Does nothing in a
// daemon that has none. Throws std::system_error.
void drop_privileges();

}  // namespace sharrfs
