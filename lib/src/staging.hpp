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
  Staging(const Staging&) = delete;
  Staging& operator=(const Staging&) = delete;
  ~Staging();

  int fd() const noexcept { return file_.get(); }
  // Gives the file its size, with memory or blocks behind the first `reserved` bytes.
  void allocate(std::uint64_t reserved, const std::function<void()>& on_signal);
  // Gives the file its name. Throws Error EEXIST when there is one already.
  void publish();

 private:
  void open_temporary();
  void check_space() const;
  bool give_name(const Place& place);  // false with errno set
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

}  // namespace sharr::detail
