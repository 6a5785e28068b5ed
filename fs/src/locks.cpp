#include "locks.hpp"

#include <cerrno>
#include <chrono>
#include <csignal>
#include <utility>

namespace sharrfs {
namespace {

// Makes a system call that blocks return EINTR, and does nothing else.
constexpr int wake_signal = SIGUSR1;

void ignore(int) {}

}  // namespace

LockWaiters::LockWaiters() {
  struct sigaction action {};
  action.sa_handler = ignore;  // without SA_RESTART
  sigaction(wake_signal, &action, nullptr);
}

void LockWaiters::stop() {
  const std::lock_guard guard(mutex_);
  for (Waiter& waiter : waiters_) {
    give_up(waiter);
    waiter.thread.join();
  }
  waiters_.clear();
}

void LockWaiters::give_up(Waiter& waiter) {
  waiter.given_up = true;
  // libfuse calls back at once, from the thread itself, for a request that was interrupted before.
  if (pthread_equal(waiter.id, pthread_self()) != 0) return;
  // The signal may come before the system call has begun, and is lost then.
  while (!waiter.finished) {
    if (waiter.id != pthread_t{}) pthread_kill(waiter.id, wake_signal);
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
}

void LockWaiters::wait(fuse_req_t request, std::function<int()> lock) {
  const std::lock_guard guard(mutex_);
  for (auto at = waiters_.begin(); at != waiters_.end();) {
    if (at->finished) {
      at->thread.join();
      at = waiters_.erase(at);
    } else {
      ++at;
    }
  }
  Waiter& waiter = waiters_.emplace_back();
  try {
    waiter.thread = std::thread([request, &waiter, lock = std::move(lock)]() mutable {
      waiter.id = pthread_self();
      fuse_req_interrupt_func(
          request, [](fuse_req_t, void* data) { give_up(*static_cast<Waiter*>(data)); }, &waiter);
      int errnum = EINTR;
      while (errnum == EINTR && !waiter.given_up) errnum = lock() == 0 ? 0 : errno;
      lock = {};  // what it keeps, the lock among it, may go from the moment of the answer
      waiter.finished = true;
      fuse_req_interrupt_func(request, nullptr, nullptr);  // waits for one that is running
      fuse_reply_err(request, errnum);
    });
  } catch (...) {
    waiters_.pop_back();
    throw;
  }
}

}  // namespace sharrfs
