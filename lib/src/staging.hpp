// An object on its way to a name: a file that nobody sees until it is complete, and that the kernel
// or the next create() takes away when its maker dies.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <string_view>

#include "system.hpp"

namespace sharr::detail {

class Staging {
 public:
  // Opens the file. size is what it will have: 64 MiB and more is checked against the name and the
  // space at once, because finding out the slow way takes seconds and other people's memory.
  // With replace the name may be taken. name must outlive this. temporary_mode: as for open(2),
  // where the file has a name meanwhile. Throws Error.
  Staging(const Name& name, std::uint64_t size, bool replace, mode_t temporary_mode);
  // In a directory that is open already (place.file does not count), for one who comes to know the
  // name, and perhaps the size, later. mode as for open(2).
  Staging(const Name& name, Place place, mode_t mode, std::uint64_t size = 0);
  Staging(const Staging&) = delete;
  Staging& operator=(const Staging&) = delete;
  ~Staging();

  int fd() const noexcept { return file_.get(); }
  // Gives the file its size, at least `reserved`, with memory or blocks behind that many bytes but
  // the first `from`.
  void allocate(std::uint64_t reserved, const std::function<void()>& on_signal,
                std::uint64_t from = 0);
  // Gives the file another size, with memory or blocks for what is added, and with `holes` for the
  // holes that it has. Where there is less it keeps what it has.
  void resize(std::uint64_t size, bool holes);
  // Whether there would be room for it to have that size. Throws as throw_no_space().
  void check_space(std::uint64_t size);
  // Gives the file its size, without the memory.
  void extend(std::uint64_t size);
  // A tmpfs mounted huge=always gives a huge page to the smallest file: gives back what lies behind
  // the first `size` bytes. st: of the file. Where that fails it stays so, which is no more than
  // was asked for by mounting it so.
  void trim(const struct stat& st, std::uint64_t size) const noexcept;
  // As a file that is made in that directory gets it.
  void inherit_group(int directory) const;
  bool in_memory() const noexcept;  // on a tmpfs
  // Writes to the file; takes what memory that needs.
  void write(const void* data, std::uint64_t length, std::uint64_t offset) const;
  // The same by any thread: returns 0 or an errno.
  int try_write(const void* data, std::uint64_t length, std::uint64_t offset) const noexcept;
  // The same at the file's beginning, of a header and what follows it, by one call.
  int try_write(std::string_view header, const void* data, std::uint64_t length) const noexcept;
  // What is said when there is none: errnum is ENOSPC or EDQUOT.
  [[noreturn]] void throw_no_space(int errnum) const;
  // Gives the file its name. Throws Error EEXIST when there is one already; with replace whatever
  // has the name loses it, in one step.
  void publish(bool replace);
  // The same for a name in a directory that is open already.
  void publish(const Place& place, bool replace);

 private:
  // Leaves file_ empty with errno set when it fails.
  void open(mode_t mode, mode_t temporary_mode);
  void open_temporary(mode_t mode);
  // These return false with errno set.
  bool give(const Place& place, bool replace);
  bool give_name(const Place& place);
  bool replace_name(const Place& place);
  bool link(int at, const char* file) const;
  [[noreturn]] void throw_failed(int errnum) const;
  [[noreturn]] void throw_no_inode() const;
  void write_holes(std::uint64_t from, std::uint64_t to) const;  // by what is read there

  const Name& name_;
  std::uint64_t size_;
  std::uint64_t kept_ = 0;  // of the file, where there is no memory for the rest
  Place place_;
  bool namespace_missing_ = false;  // place_ is /dev/shm until publish() makes the namespace
  FileDescriptor file_;
  bool linked_ = false;    // has had another name for a moment, to replace by
  std::string temporary_;  // its name, relative to place_, where O_TMPFILE is not to be had
  pid_t maker_ = 0;        // of that name; a child of fork(2) is not to remove it
};

// The permissions that an array or a namespace is made with, less the umask.
constexpr mode_t creation_mode = 0666;
constexpr mode_t namespace_mode = 0777;

// How often to try again what others undo, one after the other, in the moment between two calls.
constexpr int max_tries = 1000;

// A new reserved name.
std::string temporary_name();
// Removes what has a reserved name when its maker is dead: no living process holds it locked.
void sweep(int dirfd, const char* name) noexcept;
// Removes a directory and the arrays in it; nothing else. Throws Error with what cannot be removed,
// ENOTEMPTY because of what is no array.
void remove_arrays(int dirfd, const std::string& name);

}  // namespace sharr::detail
