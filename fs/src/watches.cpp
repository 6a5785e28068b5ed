#include "watches.hpp"

#include <fmt/format.h>
#include <linux/limits.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/inotify.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstring>

namespace sharrfs {
namespace {

// Everything that changes what stat(2) says of an entry, or which entry has a name. Not IN_OPEN and
// IN_ACCESS: who only attaches an array must not pay for a mount.
constexpr std::uint32_t mask =
    IN_CREATE | IN_DELETE | IN_MOVED_FROM | IN_MOVED_TO | IN_ATTRIB | IN_MODIFY | IN_ONLYDIR;

// How long events gather before they are read: who makes many is woken for, and waits for, none of
// this.
constexpr int gather_ms = 2;

}  // namespace

bool Watches::start(Handler handler) {
  sharr::FileDescriptor inotify(inotify_init1(IN_CLOEXEC | IN_NONBLOCK));
  if (!inotify) return false;
  stop_ = sharr::FileDescriptor(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  if (!stop_) return false;
  inotify_ = std::move(inotify);
  handler_ = std::move(handler);
  thread_ = std::thread([this] { run(); });
  return true;
}

void Watches::stop() {
  if (!thread_.joinable()) return;
  eventfd_write(stop_.get(), 1);
  thread_.join();
}

int Watches::add(int directory) const {
  const std::string path = fmt::format("/proc/self/fd/{}", directory);
  return inotify_add_watch(inotify_.get(), path.c_str(), mask);
}

void Watches::remove(int watch) const noexcept {
  if (watch >= 0) inotify_rm_watch(inotify_.get(), watch);
}

void Watches::run() {
  std::array<pollfd, 2> fds{pollfd{.fd = stop_.get(), .events = POLLIN, .revents = 0},
                            pollfd{.fd = inotify_.get(), .events = POLLIN, .revents = 0}};
  std::vector<Event> events;
  int timeout = -1;
  while (true) {
    if (poll(fds.data(), fds.size(), timeout) < 0) continue;  // EINTR: nothing else can be
    if (fds[0].revents != 0) return;
    events.clear();
    read_events(events);
    timeout = handler_(events);
    if (!events.empty() && poll(fds.data(), 1, gather_ms) > 0) return;
  }
}

// What there is by now; somebody may add more as fast as it is read.
void Watches::read_events(std::vector<Event>& events) const {
  alignas(inotify_event) std::array<char, 64 * (sizeof(inotify_event) + NAME_MAX + 1)> buffer;
  int left = 0;
  if (ioctl(inotify_.get(), FIONREAD, &left) != 0) return;
  while (left > 0) {
    const ssize_t n = read(inotify_.get(), buffer.data(), buffer.size());
    if (n <= 0) return;
    left -= static_cast<int>(n);
    for (ssize_t at = 0; at < n;) {
      inotify_event event;
      std::memcpy(&event, buffer.data() + at, sizeof(event));
      const char* const name = buffer.data() + at + sizeof(event);
      events.push_back({.watch = event.wd,
                        .mask = event.mask,
                        .name = event.len > 0 ? std::string(name) : std::string()});
      at += static_cast<ssize_t>(sizeof(event) + event.len);
    }
  }
}

}  // namespace sharrfs
