// Memory for large arrays: huge pages, taken and filled by several threads.
#pragma once

#include <sys/types.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <functional>

namespace sharr::detail {

// Arrays of this many bytes get huge pages by themselves, where there are any. Only whole huge
// pages are taken, and the rest of the file in small ones, so that none of it is wasted.
constexpr std::uint64_t huge_threshold = std::uint64_t{4} << 20;

// How a file gets its memory: in pages as its file system gives them, or as they are asked for.
enum class Pages { of_file, small, huge };

// In bytes; 0 where the kernel has none.
std::uint64_t huge_page_size() noexcept;
// Whether the file system on that device is a tmpfs that gives huge pages to mappings that ask for
// them: mounted huge=advise, within_size or always.
bool gives_huge_pages(dev_t device);
// How many of the `size` bytes of a file on a tmpfs are in huge pages, as far as the kernel maps
// them as such: not where it is mounted huge=never by now, nor in a process that is to have none
// (PR_SET_THP_DISABLE).
std::uint64_t huge_bytes(int fd, std::uint64_t size);

// Makes the pages of a shared mapping exist, writable. Returns 0 or an errno: ENOSPC when there is
// no memory for them, EINVAL from a kernel that has no such call (before 5.14).
int populate(std::byte* at, std::uint64_t length) noexcept;

// Makes the pages of memory that is to be read exist, so that reading them does not end in a SIGBUS.
// Returns 0 or an errno: EFAULT when they cannot be had, ENOMEM; 0 from a kernel that cannot tell.
int readable(const void* at, std::uint64_t length) noexcept;

// How many threads can work together; to find out takes a dozen system calls.
std::uint64_t max_threads();

// Of so many bytes in memory the pieces for in_pieces(): not so few that a thread has none, nor so
// many that what is done after each takes long. least: what takes longer than to start a thread.
constexpr std::uint64_t piece_of(std::uint64_t size, std::uint64_t least) noexcept {
  return std::clamp(size / 32, least, std::uint64_t{32} << 20) / least * least;
}

// Calls task(from, length) for all pieces of size, by as many threads as are worth it, until one
// returns an errno, and returns that, or 0. on_signal is called by the calling thread after each of
// its pieces; what it throws ends the work. threads: max_threads(), from who has asked already.
int in_pieces(std::uint64_t size, std::uint64_t piece,
              const std::function<int(std::uint64_t from, std::uint64_t length)>& task,
              const std::function<void()>& on_signal, std::uint64_t threads = 0);

}  // namespace sharr::detail
