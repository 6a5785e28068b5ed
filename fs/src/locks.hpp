// Locks that are waited for: flock(2) and fcntl(2), taken on the backing file.
#pragma once

#include <fuse_lowlevel.h>
#include <pthread.h>

#include <atomic>
#include <functional>
#include <list>
#include <mutex>
#include <thread>

namespace sharrfs {

// Threads that wait, so that no other request has to. Thread-safe. stop() has to come before the
// end of the session.
class LockWaiters {
 public:
  LockWaiters();
  LockWaiters(const LockWaiters&) = delete;
  LockWaiters& operator=(const LockWaiters&) = delete;
  ~LockWaiters() { stop(); }

  // Answers the request with what lock(), a blocking call, returns: 0 or -1 with errno set. A
  // process that stops waiting, because of a signal, gets EINTR.
  void wait(fuse_req_t request, std::function<int()> lock);

  // Ends those that still wait; they answer EINTR.
  void stop();

 private:
  struct Waiter {
    std::thread thread;
    std::atomic<pthread_t> id{};  // of the thread, once it runs
    std::atomic<bool> given_up{false};
    std::atomic<bool> finished{false};
  };
  static void give_up(Waiter& waiter);

  std::mutex mutex_;
  std::list<Waiter> waiters_;
};

}  // namespace sharrfs
