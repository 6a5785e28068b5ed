// What this process keeps of objects: files in memory, one mapping for all arrays that stand on the
// same one; and what a file was that has not changed since.
#pragma once

#include <cstddef>
#include <ctime>
#include <memory>
#include <optional>
#include <string>
#include <string_view>

#include "system.hpp"

namespace sharr::detail {

class Mapping {
 public:
  // Maps what info says of the file, from its first byte on. What it gives is found from then on by
  // find(), unless it is copy_on_write or the file system cannot tell the object from a later one.
  // Throws Error, in which name is.
  static std::shared_ptr<const Mapping> make(int fd, const Info& info, const Identity& identity,
                                             Mode mode, std::string_view name);
  // The mapping of an object that the process has; none when there is none.
  static std::shared_ptr<const Mapping> find(const Identity& identity, Mode mode);
  // Whether it has one of that object, or any at all.
  static bool exists(const Identity& identity);
  static bool any();

  // Notes that this process, which has it mapped so, has opened the object by the name uri, when it
  // was as stat says and known(). Does nothing for what find() does not find.
  static void note_opened(const std::string& uri, const Stat& stat, Mode mode);
  // Whether that has been noted of the name, and what had it then is still mapped so;
  // false costs an attach the time that it takes to open.
  static bool opened(const std::string& uri, Mode mode);
  // As find(), of what has been opened by any name as the user that this process is, and has not
  // changed since, its rights included.
  static std::shared_ptr<const Mapping> find_opened(const Stat& stat, Mode mode);

  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;
  ~Mapping();

  std::byte* base() const noexcept { return base_; }
  std::size_t length() const noexcept { return length_; }  // 0 when there is nothing to map

 private:
  Mapping(const Identity& identity, Mode mode) noexcept : identity_(identity), mode_(mode) {}

  Identity identity_;
  Mode mode_;
  bool shared_ = false;
  std::byte* base_ = nullptr;
  std::size_t length_ = 0;
};

// What a file is, but for its name, when it is known to be unchanged since remember(), except for
// what was stored through mappings. stat: as it is now.
std::optional<Info> known(const Stat& stat);
// stat and now: of before info was read.
void remember(const Info& info, const Stat& stat, const timespec& now);

}  // namespace sharr::detail
