// Waiting for an array to appear, by inotify on the directory where it will.
#include <poll.h>
#include <sys/inotify.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstdint>
#include <filesystem>
#include <string>
#include <utility>
#include <vector>

#include "access.hpp"
#include "system.hpp"

namespace sharr {
namespace {

using Clock = std::chrono::steady_clock;

// The array, or none when it is not there yet: what stands in its place may go, and a file that
// another program is writing may become one. taken: whether there was such a file, and then whether
// there is.
std::optional<Array> attached(const Name& name, Mode mode, bool& taken) {
  const bool was_taken = std::exchange(taken, false);
  try {
    // To close what was open for writing is an event: who opens no array so would wait for himself.
    if (was_taken && mode == Mode::read_write) open_array(name);
    return attach(name, mode);
  } catch (const FormatError&) {
    taken = true;
    return {};
  } catch (const Error& error) {
    const int errnum = error.errnum();
    if (errnum != ENOENT && errnum != ENOTDIR && errnum != EISDIR) throw;
    return {};
  }
}

// Watches all directories on the way to a name, as far as there are any: whatever comes, goes or
// moves is seen in the one above. False when that is not so, because one cannot be read or the user
// has as many watches as fs.inotify.max_user_watches allows.
bool watch(const FileDescriptor& events, const Name& name) {
  constexpr std::uint32_t mask = IN_CREATE | IN_DELETE | IN_MOVE | IN_CLOSE_WRITE | IN_ATTRIB;
  std::vector<std::string> directories;
  for (std::filesystem::path path = std::filesystem::path(name.path()).parent_path();;
       path = path.parent_path()) {
    directories.push_back(path.empty() ? "." : path.string());
    if (path.empty() || path == path.parent_path() || path == detail::shm_directory) break;
  }
  std::ranges::reverse(directories);
  for (const std::string& directory : directories) {
    // Not kept open: a directory that is removed is gone only then.
    FileDescriptor fd;
    try {
      const std::size_t below = std::min(detail::shm_directory.size() + 1, directory.size());
      fd = open_directory(name.shm() ? Name::directory("shm://" + directory.substr(below))
                                     : Name::from_path(directory));
    } catch (const Error& error) {
      if (error.errnum() == ENOENT || error.errnum() == ENOTDIR) return true;
      if (error.errnum() == EACCES) return false;
      throw;
    }
    const std::string self = "/proc/self/fd/" + std::to_string(fd.get());
    if (inotify_add_watch(events.get(), self.c_str(), mask) < 0) {
      if (errno == EACCES || errno == ENOSPC) return false;
      throw Error(errno, name.given());
    }
  }
  return true;
}

// Until something happens, or not any longer.
void sleep(const FileDescriptor& events, std::optional<std::chrono::nanoseconds> patience,
           const std::function<void()>& on_signal, const Name& name) {
  constexpr std::chrono::nanoseconds enough = std::chrono::hours(1);
  // A signal that comes just before ppoll(2) does not end it.
  const std::chrono::nanoseconds deaf = on_signal ? std::chrono::milliseconds(100) : enough;
  const Clock::time_point until = Clock::now() + std::min(patience.value_or(enough), enough);
  int ready = 0;
  do {
    if (on_signal) on_signal();
    const std::chrono::nanoseconds left = until - Clock::now();
    const auto slice = std::clamp(left, left.zero(), deaf);
    const auto seconds = std::chrono::floor<std::chrono::seconds>(slice);
    const timespec time{.tv_sec = seconds.count(), .tv_nsec = (slice - seconds).count()};
    pollfd poll{.fd = events.get(), .events = POLLIN, .revents = 0};
    ready = ppoll(&poll, 1, &time, nullptr);
    if (ready < 0 && errno != EINTR) throw Error(errno, name.given());
  } while (ready <= 0 && Clock::now() < until);
}

}  // namespace

Array wait(const Name& given, Mode mode, std::optional<std::chrono::nanoseconds> timeout,
           const std::function<void()>& on_signal) {
  const Clock::time_point start = Clock::now();
  // What inotify does not tell of paths: changes behind a mount, where symbolic links end.
  constexpr std::chrono::nanoseconds unseen = std::chrono::seconds(1);
  // A user has 128 inotify instances where nobody has allowed more (fs.inotify.max_user_instances).
  // And of stores to a mapping it tells nothing, of a write not where the file stays open.
  constexpr std::chrono::nanoseconds without_inotify = std::chrono::milliseconds(50);
  bool taken = false;
  std::optional<Array> array = attached(given, mode, taken);
  while (!array) {
    const Name name = detail::behind_mount(given);
    const FileDescriptor events(inotify_init1(IN_CLOEXEC | IN_NONBLOCK));
    if (!events && errno != EMFILE) throw Error(errno, given.given());
    const bool all_seen = events && watch(events, name) && name.shm();
    array = attached(given, mode, taken);
    if (array) break;
    std::optional<std::chrono::nanoseconds> patience;
    if (timeout) {
      patience = *timeout - (Clock::now() - start);
      if (patience->count() <= 0) {
        throw Error(ETIMEDOUT, given.given(), "no such array within the time given");
      }
    }
    if (!all_seen || taken) {
      const auto next = events && !taken ? unseen : without_inotify;
      patience = patience ? std::min(*patience, next) : next;
    }
    sleep(events, patience, on_signal, given);
  }
  return *std::move(array);
}

}  // namespace sharr
