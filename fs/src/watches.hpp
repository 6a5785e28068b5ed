// What happens in directories, seen by inotify(7) in a thread of its own.
#pragma once

#include <cstdint>
#include <functional>
#include <sharr/object.hpp>
#include <string>
#include <thread>
#include <vector>

namespace sharrfs {

class Watches {
 public:
  struct Event {
    int watch;           // that add() returned; -1 for IN_Q_OVERFLOW: some events are lost
    std::uint32_t mask;  // see inotify(7)
    std::string name;    // in the directory; empty: the directory itself
  };
  // Called in the thread, with what has happened or, after as many milliseconds as it returned the
  // last time (-1: never), with nothing.
  using Handler = std::function<int(const std::vector<Event>&)>;

  Watches() = default;
  Watches(const Watches&) = delete;
  Watches& operator=(const Watches&) = delete;
  ~Watches() { stop(); }

  // False, with errno set, when there is no inotify to be had; add() then returns -1.
  bool start(Handler handler);
  void stop();

  // Watches what is open as directory, O_PATH will do. -1 with errno set when that cannot be.
  // Thread-safe, as is remove().
  int add(int directory) const;
  void remove(int watch) const noexcept;

 private:
  void run();
  void read_events(std::vector<Event>& events) const;

  Handler handler_;
  sharr::FileDescriptor inotify_;
  sharr::FileDescriptor stop_;  // an eventfd
  std::thread thread_;
};

}  // namespace sharrfs
