// An object on its way to a name: a file that nobody sees until it is complete, and that the kernel
// or the next create() takes away when its maker dies.
#pragma once

#include <cstdint>
#include <functional>
#include <string>

#include "system.hpp"

namespace sharr::detail {

class Staging {
 public:
  // Opens the file. size is what it will have: 64 MiB and more is checked against the name and the
  // space at once, because finding out the slow way takes seconds and other people's memory.
  // name must outlive this. Throws Error.
  Staging(const Name& name, std::uint64_t size);
  // In a directory that is open already (place.file does not count), for one who comes to know size
  // and name later. mode as for open(2).
  Staging(const Name& name, Place place, mode_t mode);
  Staging(const Staging&) = delete;
  Staging& operator=(const Staging&) = delete;
  ~Staging();

  int fd() const noexcept { return file_.get(); }
  // Gives the file its size, at least `reserved`, with memory or blocks behind that many bytes.
  void allocate(std::uint64_t reserved, const std::function<void()>& on_signal);
  // Gives the file its name. Throws Error EEXIST when there is one already.
  void publish();
  // The same for a name in a directory that is open already; with replace whatever has the name
  // loses it, in one step.
  void publish(const Place& place, bool replace);

 private:
  void open(mode_t mode);  // leaves file_ empty with errno set when it fails
  void open_temporary(mode_t mode);
  void check_space(std::uint64_t bytes) const;
  // These return false with errno set.
  bool give_name(const Place& place);
  bool replace_name(const Place& place);
  bool link(int at, const char* file) const;
  [[noreturn]] void throw_failed(int errnum) const;
  [[noreturn]] void throw_no_inode() const;
  [[noreturn]] void throw_no_space(int errnum) const;
  void write_zeros(std::uint64_t from, std::uint64_t to) const;

  const Name& name_;
  std::uint64_t size_;
  Place place_;
  bool namespace_missing_ = false;  // place_ is /dev/shm until publish() makes the namespace
  FileDescriptor file_;
  std::string temporary_;  // its name, relative to place_, where O_TMPFILE is not to be had
};

// Removes a file with a reserved name when its maker is dead: no living process holds it locked.
void sweep(int dirfd, const char* name) noexcept;

}  // namespace sharr::detail
