#include "process.hpp"

#include <dirent.h>
#include <fcntl.h>
#include <fmt/format.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <charconv>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <exception>
#include <future>
#include <iterator>
#include <memory>
#include <mutex>
#include <optional>
#include <sharr/object.hpp>
#include <sstream>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

// While a process executes another program it closes what is to be closed then, with a lock held
// that much of /proc waits for: stat, wchan and fd/N among it, but not statm, status, fdinfo/N,
// children and mountinfo. A daemon that reads the former before it has answered the close waits for
// ever. (And fdinfo/N of an epoll descriptor waits for whoever adds to it; see holders().)

namespace sharrfs::process {
namespace {

// From Linux's include/linux/sched.h: the thread is on its way out.
constexpr unsigned long pf_exiting = 0x4;

// What a file of /proc says, nothing when its process is gone. (A std::filebuf would throw then.)
std::string read_file(const std::string& path) {
  const sharr::FileDescriptor fd(open(path.c_str(), O_RDONLY | O_CLOEXEC));
  std::string text;
  std::array<char, 4096> buffer;
  while (fd) {
    const ssize_t n = read(fd.get(), buffer.data(), buffer.size());
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) break;
    text.append(buffer.data(), static_cast<std::size_t>(n));
  }
  return text;
}

// Calls what(name) for the entries of a directory until it returns true.
template <class What>
bool any_entry(const std::string& path, What&& what) {
  const std::unique_ptr<DIR, int (*)(DIR*)> stream(opendir(path.c_str()), closedir);
  if (!stream) return false;
  while (const dirent* item = readdir(stream.get())) {
    if (item->d_name[0] != '.' && what(item->d_name)) return true;
  }
  return false;
}

template <class Number>
std::optional<Number> number(std::string_view text, int base = 10) {
  const std::size_t start = text.find_first_not_of(" \t");
  if (start == std::string_view::npos) return {};
  text.remove_prefix(start);
  Number value{};
  if (std::from_chars(text.data(), text.data() + text.size(), value, base).ec != std::errc{})
    return {};
  return value;
}

// The number in the line of a file of /proc that begins with key.
template <class Number>
std::optional<Number> field(std::string_view text, std::string_view key, int base = 10) {
  for (std::size_t at = text.find(key); at != std::string_view::npos; at = text.find(key, at + 1)) {
    if (at == 0 || text[at - 1] == '\n') return number<Number>(text.substr(at + key.size()), base);
  }
  return {};
}

// Whether a mount is of a device, by the mounts that some process sees. (A file that was opened
// before its process got mounts of its own is on one that it does not see.)
bool is_mounted(const std::string& mountinfo, std::uint64_t mount, dev_t device) {
  const std::string mounts = read_file(mountinfo);
  const std::string id = fmt::format("{} ", mount);
  const std::string on = fmt::format(" {}:{} ", major(device), minor(device));
  for (std::size_t start = 0; start < mounts.size();) {
    const std::size_t end = std::min(mounts.find('\n', start), mounts.size());
    const std::string_view line = std::string_view(mounts).substr(start, end - start);
    if (line.starts_with(id)) return line.find(on) != std::string_view::npos;
    start = end + 1;
  }
  return false;
}

pid_t process_of(pid_t tid) {
  return field<pid_t>(read_file(fmt::format("/proc/{}/status", tid)), "Tgid:").value_or(tid);
}

}  // namespace

Ending ending(pid_t tid) {
  // A thread that ends has no memory any more when its files are closed. One in exec has, and must
  // not be asked for its stat.
  if (number<std::uint64_t>(read_file(fmt::format("/proc/{}/statm", tid))) != 0) {
    return Ending::none;
  }
  // The second field is the name in parentheses, which may hold anything.
  std::string stat = read_file(fmt::format("/proc/{}/stat", tid));
  const std::size_t name_end = stat.rfind(')');
  if (name_end == std::string::npos) return Ending::none;
  std::istringstream fields(stat.substr(name_end + 1));
  std::vector<std::string> values{std::istream_iterator<std::string>(fields), {}};
  // proc(5) counts from 1, and the first here is the third there: flags is 9, exit_code 52.
  if (values.size() < 50) return Ending::none;
  if ((number<unsigned long>(values[6]).value_or(0) & pf_exiting) == 0) return Ending::none;
  const int code = number<int>(values[49]).value_or(0);
  return (code & 0x7F) != 0 ? Ending::killed : Ending::exits;
}

std::optional<Mount> mount_at(const char* path) {
  struct statx st {};
  constexpr int flags = AT_STATX_DONT_SYNC | AT_NO_AUTOMOUNT;
  if (statx(AT_FDCWD, path, flags, STATX_MNT_ID, &st) != 0) return {};
  return Mount{.device = makedev(st.stx_dev_major, st.stx_dev_minor), .id = st.stx_mnt_id};
}

namespace {

// Whether a process has a file: some says yes, and until_exec that exec would close it.
Holders in_process(pid_t tid, const File& file) {
  const std::string directory = fmt::format("/proc/{}/fdinfo", tid);
  // A process that shows nothing to its own user's programs (PR_SET_DUMPABLE).
  if (access(directory.c_str(), R_OK | X_OK) != 0 && errno == EACCES) return Holders::unknown;
  Holders found = Holders::none;
  any_entry(directory, [&](const char* fd) {
    const std::string info = read_file(directory + "/" + fd);
    if (field<ino_t>(info, "ino:") != file.inode) return false;
    const auto mount = field<std::uint64_t>(info, "mnt_id:");
    if (!mount || !(mount == file.mount.id ||
                    is_mounted(fmt::format("/proc/{}/mountinfo", tid), *mount, file.mount.device) ||
                    is_mounted("/proc/self/mountinfo", *mount, file.mount.device))) {
      return false;
    }
    const auto flags = field<unsigned long>(info, "flags:", 8).value_or(0);
    found = (flags & O_CLOEXEC) != 0 ? std::max(found, Holders::until_exec) : Holders::some;
    return found == Holders::some;
  });
  return found;
}

// How often this thread has waited for something.
long waits() {
  rusage usage{};
  getrusage(RUSAGE_THREAD, &usage);
  return usage.ru_nvcsw;
}

Holders in_family(pid_t tid, const File& file) {
  // First, so that it starts none with a copy after that.
  if (in_process(tid, file) != Holders::none) return Holders::some;
  int threads = 0;
  any_entry(fmt::format("/proc/{}/task", tid), [&](const char*) { return ++threads > 1; });
  if (threads > 1) {
    // Another one may be forking: the child has the descriptors long before it is among the
    // children, and the memory, for which a look at the arguments waits, shortly before. Or it has
    // moved one from where it was still to be seen to where it had been looked.
    const long before = waits();
    read_file(fmt::format("/proc/{}/cmdline", tid));
    if (waits() != before) std::this_thread::sleep_for(std::chrono::milliseconds(1));
    if (in_process(tid, file) != Holders::none) return Holders::some;
  }
  Holders found = Holders::none;
  std::vector<pid_t> left = {tid};  // whose task directory is its process's
  while (!left.empty()) {
    const std::string tasks = fmt::format("/proc/{}/task", left.back());
    left.pop_back();
    any_entry(tasks, [&](const char* task) {
      std::istringstream children(read_file(fmt::format("{}/{}/children", tasks, task)));
      for (pid_t child = 0; children >> child;) {
        const Holders one = in_process(child, file);
        found = std::max(found, one == Holders::some ? Holders::children : one);
        left.push_back(child);
      }
      return false;
    });
  }
  return found;
}

// Whether a process comes from another, or is gone.
bool descends(pid_t pid, pid_t from) {
  while (pid != 0 && pid != from) {
    pid = field<pid_t>(read_file(fmt::format("/proc/{}/status", pid)), "PPid:").value_or(from);
  }
  return pid == from;
}

Holders in_all(pid_t tid, const File& file) {
  const pid_t process = process_of(tid);
  Holders found = Holders::none;
  any_entry("/proc", [&](const char* name) {
    const auto pid = number<pid_t>(name);
    Holders one = pid ? in_process(*pid, file) : Holders::none;
    // To a daemon of a user most of them are other people's, which have nothing of his.
    if (one == Holders::none || one == Holders::unknown) return false;
    if (*pid == process || !descends(*pid, process)) {
      one = Holders::some;
    } else if (one == Holders::some) {
      one = Holders::children;
    }
    found = std::max(found, one);
    return found == Holders::some;
  });
  return found;
}

// Threads that look. They have no share in the daemon's descriptors: while somebody has that of the
// mount, even by a thread that cannot die, those who wait for the daemon wait on when it is gone.
class Lookers {
 public:
  // apart: whether it is so.
  using Look = std::packaged_task<Holders(bool apart)>;

  // False when there can be no more threads.
  bool start(Look look) {
    const std::lock_guard lock(mutex_);
    looks_.push_back(std::move(look));
    if (idle_ > 0) {
      --idle_;
      changed_.notify_one();
      return true;
    }
    try {
      std::thread([this] { run(); }).detach();
    } catch (const std::exception&) {
      looks_.pop_back();
      return false;
    }
    return true;
  }

 private:
  void run() {
    constexpr int most_idle = 4;
#ifdef __SANITIZE_THREAD__  // which takes all threads' descriptors for the same
    constexpr bool apart = true;
#else
    const bool apart = close_range(STDERR_FILENO + 1, ~0U, CLOSE_RANGE_UNSHARE) == 0;
#endif
    std::unique_lock lock(mutex_);
    while (true) {
      changed_.wait(lock, [this] { return !looks_.empty(); });
      Look look = std::move(looks_.front());
      looks_.pop_front();
      lock.unlock();
      look(apart);
      lock.lock();
      if (!apart || idle_ >= most_idle) return;
      ++idle_;
    }
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<Look> looks_;
  int idle_ = 0;  // more threads than there are looks to take
};

}  // namespace

Holders holders(Where where, pid_t tid, const File& file) {
  constexpr std::chrono::seconds patience{3};
  constexpr int most_left = 32;
  // How many threads still look for whom nobody waits any more: each of them takes one when it is
  // done, and who has waited for it adds one. One process that cannot be looked at makes looks at
  // all come to nothing, but not at others.
  static std::array<std::atomic<int>, 2> counts{};
  std::atomic<int>& left = counts.at(where == Where::everywhere ? 1 : 0);
  if (left >= most_left) return Holders::some;
  Lookers::Look look([where, tid, file, &left](bool apart) {
    const std::unique_ptr<std::atomic<int>, void (*)(std::atomic<int>*)> done(
        &left, [](std::atomic<int>* all) { --*all; });
    if (!apart) return Holders::some;
    return where == Where::family ? in_family(tid, file) : in_all(tid, file);
  });
  std::future<Holders> found = look.get_future();
  static auto& lookers = *new Lookers;  // who look on when the daemon ends
  if (!lookers.start(std::move(look))) return Holders::some;
  const bool done = found.wait_for(patience) == std::future_status::ready;
  ++left;
  return done ? found.get() : Holders::some;
}

bool same(pid_t tid, pid_t other) { return tid == other || process_of(tid) == process_of(other); }

}  // namespace sharrfs::process
