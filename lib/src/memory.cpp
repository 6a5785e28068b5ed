#include "memory.hpp"

#include <pthread.h>
#include <sched.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <charconv>
#include <csignal>
#include <exception>
#include <fstream>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include "sharr/object.hpp"
#include "system.hpp"

namespace sharr {
namespace {

// Of the limits of one control group; 0 where it has none.
double processors_of(const std::string& quota_file, const std::string& period_file) {
  std::ifstream in(quota_file);
  double quota = 0;
  double period = 0;
  if (!(in >> quota) || quota <= 0) return 0;  // "max", -1, or no such file
  if (period_file.empty()) {
    in >> period;
  } else {
    std::ifstream(period_file) >> period;
  }
  return period > 0 ? quota / period : 0;
}

}  // namespace

namespace detail {

std::uint64_t huge_page_size() noexcept {
  static const std::uint64_t size = [] {
    std::uint64_t value = 0;
    std::ifstream("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size") >> value;
    return value;
  }();
  return size;
}

namespace {
[[maybe_unused]] const std::uint64_t first = huge_page_size();  // see memory_mutex()
}  // namespace

bool gives_huge_pages(dev_t device) {
  const std::string mount = mount_of(device);
  const std::string options = "," + mount.substr(mount.rfind(' ') + 1) + ",";
  return mount.starts_with("tmpfs ") && options.find(",huge=") != std::string::npos &&
         options.find(",huge=never,") == std::string::npos && huge_page_size() > 0;
}

namespace {

// How much of what is mapped of a file, `size` bytes of it from an offset on, is in huge pages.
std::uint64_t huge_bytes_mapped(int fd, std::uint64_t from, char* base, std::uint64_t size) {
  const std::uint64_t page = huge_page_size();
  // What a mapping has mapped whole is a huge page. To touch a hole would take memory.
  for (std::uint64_t at = 0; at + page <= size; at += page) {
    const off_t data = lseek(fd, static_cast<off_t>(from + at), SEEK_DATA);
    if (data < 0 || static_cast<std::uint64_t>(data) >= from + size) break;
    const std::uint64_t found = static_cast<std::uint64_t>(data) - from;
    at = found / page * page;
    madvise(base + found / 4096 * 4096, 4096, MADV_POPULATE_READ);
  }
  std::uint64_t kib = 0;
  bool inside = false;
  std::ifstream smaps("/proc/self/smaps");
  const auto begin = reinterpret_cast<std::uintptr_t>(base);
  for (std::string line; std::getline(smaps, line);) {
    std::uintptr_t start = 0;
    const auto [end, error] = std::from_chars(line.data(), line.data() + line.size(), start, 16);
    if (error == std::errc{} && *end == '-') {
      inside = start >= begin && start < begin + size;
    } else if (inside && line.starts_with("ShmemPmdMapped:")) {
      const std::string_view value =
          std::string_view(line).substr(line.find_first_of("0123456789"));
      std::uint64_t mapped = 0;
      std::from_chars(value.data(), value.data() + value.size(), mapped);
      kib += mapped;
    }
  }
  return kib * 1024;
}

}  // namespace

std::uint64_t huge_bytes(int fd, std::uint64_t size) {
  const std::uint64_t page = huge_page_size();
  std::uint64_t found = 0;
  if (page == 0) return 0;
  // At once, unless the process may not map so much.
  std::uint64_t window = size;
  for (std::uint64_t from = 0; from + page <= size;) {
    const std::uint64_t length = std::min(window, size - from);
    void* const base = mmap(nullptr, length, PROT_NONE, MAP_SHARED, fd, static_cast<off_t>(from));
    if (base == MAP_FAILED) {
      if (window <= page) break;
      window = std::max(page, window / 2 / page * page);
      continue;
    }
    // After mlockall(MCL_FUTURE) to map a hole readable would fill it.
    munlock(base, length);
    if (mprotect(base, length, PROT_READ) == 0) {
      found += huge_bytes_mapped(fd, from, static_cast<char*>(base), length);
    }
    munmap(base, length);
    from += length;
  }
  return found;
}

int populate(std::byte* at, std::uint64_t length) noexcept {
  while (madvise(at, length, MADV_POPULATE_WRITE) != 0) {
    if (errno == EINTR) continue;
    return errno == EFAULT ? ENOSPC : errno;  // a fault that would have been a SIGBUS
  }
  return 0;
}

int readable(const void* at, std::uint64_t length) noexcept {
  const std::uint64_t before =
      reinterpret_cast<std::uintptr_t>(at) % static_cast<std::uint64_t>(sysconf(_SC_PAGESIZE));
  // madvise() takes what may be changed, and changes nothing here.
  auto* const start = const_cast<std::byte*>(static_cast<const std::byte*>(at)) - before;
  while (madvise(start, length + before, MADV_POPULATE_READ) != 0) {
    if (errno == EFAULT || errno == EHWPOISON) return EFAULT;
    if (errno != EINTR) return errno == ENOMEM ? ENOMEM : 0;
  }
  return 0;
}

std::uint64_t max_threads() {
  // Beyond this many memory is the limit.
  return std::min(available_processors(), 16U);
}

int in_pieces(std::uint64_t size, std::uint64_t piece,
              const std::function<int(std::uint64_t from, std::uint64_t length)>& task,
              const std::function<void()>& on_signal, std::uint64_t threads) {
  const std::uint64_t pieces = (size + piece - 1) / piece;
  const std::uint64_t wanted =
      pieces > 1 ? std::min(pieces, threads > 0 ? threads : max_threads()) : 1;
  std::atomic<std::uint64_t> next = 0;
  std::atomic<int> failure = 0;
  const auto work = [&](const std::function<void()>& after) {
    while (failure == 0) {
      const std::uint64_t from = next.fetch_add(piece);
      if (from >= size) return;
      const int error = task(from, std::min(piece, size - from));
      int none = 0;
      if (error != 0) failure.compare_exchange_strong(none, error);
      if (after) after();
    }
  };

  std::vector<std::jthread> others;  // joined before the above goes
  try {
    // Signals are the caller's. Those of the work itself cannot be put off.
    sigset_t all;
    sigset_t before;
    sigfillset(&all);
    for (const int own : {SIGBUS, SIGSEGV, SIGFPE, SIGILL}) sigdelset(&all, own);
    pthread_sigmask(SIG_BLOCK, &all, &before);
    try {
      while (others.size() + 1 < wanted) others.emplace_back([&] { work({}); });
    } catch (const std::exception&) {  // neither threads nor memory to be had: fewer will do
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    work(on_signal);
  } catch (...) {
    failure = ECANCELED;
    throw;
  }
  others.clear();
  return failure;
}

}  // namespace detail

unsigned available_processors() {
  cpu_set_t set;
  double count = 1;
  if (sched_getaffinity(0, sizeof(set), &set) == 0) {
    count = CPU_COUNT(&set);
  } else if (const long online = sysconf(_SC_NPROCESSORS_ONLN); online > 0) {
    count = static_cast<double>(online);  // more than a cpu_set_t holds
  }
  // ID:CONTROLLERS:PATH. In a container PATH may be that of the host, and the limit at the top.
  std::ifstream groups("/proc/self/cgroup");
  for (std::string line; std::getline(groups, line);) {
    const std::size_t first = line.find(':');
    const std::size_t second = line.find(':', first + 1);
    if (second == std::string::npos) continue;
    const std::string controllers = "," + line.substr(first + 1, second - first - 1) + ",";
    const bool unified = controllers == ",,";
    if (!unified && controllers.find(",cpu,") == std::string::npos) continue;
    std::string path = line.substr(second + 1);
    while (true) {
      if (path.ends_with('/')) path.pop_back();
      double limit = 0;
      if (unified) {
        limit = processors_of("/sys/fs/cgroup" + path + "/cpu.max", "");
      } else {
        const std::string directory = "/sys/fs/cgroup/cpu" + path;
        limit = processors_of(directory + "/cpu.cfs_quota_us", directory + "/cpu.cfs_period_us");
      }
      if (limit > 0) count = std::min(count, limit);
      if (path.empty()) break;
      path.resize(path.rfind('/'));
    }
  }
  return static_cast<unsigned>(std::clamp(count + 0.5, 1.0, 1024.0));
}

}  // namespace sharr
