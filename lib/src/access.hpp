// What the library's parts know of each other's insides: an Array is made of an open file, an array
// on its way is a staged file and the Array on it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "memory.hpp"
#include "sharr/store.hpp"
#include "staging.hpp"

namespace sharr {

struct ArrayAccess {
  // Maps what info says of the file. Throws Error.
  static Array map(Info info, const Identity& identity, Mode mode, int fd, std::string_view name);
  // Maps an array that was there before, or takes the mapping that this process has. name is for
  // messages, uri becomes Info::name. Throws FormatError, Error.
  static Array attach(int fd, const detail::Stat& stat, Mode mode, std::string_view name,
                      std::string uri);
  // The array that has the name, without opening it: this process has done so as the same user and
  // group, has it mapped, and nothing has changed the file since, its rights included. What else
  // has been taken from the process meanwhile, it has that memory. None when it has to be opened,
  // which also tells what is wrong.
  static std::optional<Array> attach_again(const Name& name, Mode mode, const std::string& uri);
};

struct NewArray::State {
  // In `directory`, when that is given, until the name is known to exist. With the elements, when
  // they are given.
  State(const Name& name, const Shape& shape, const Dtype& dtype, const CreateOptions& options,
        std::optional<detail::Place> directory = {}, const void* elements = nullptr);

  const Name name;
  const bool replace;
  std::optional<detail::Staging> staging;
  std::optional<Array> array;

 private:
  bool write_whole(const std::string& header, std::uint64_t nbytes, const void* elements);
  void take(std::byte* base, std::size_t header, std::uint64_t size, detail::Pages pages,
            const void* elements, const std::function<void()>& on_signal);
  // Throws what a system call's errno says.
  [[noreturn]] void fail(int errnum) const;
};

namespace detail {

// The name by which a file on a sharrfs mount is to be made, renamed or waited for: that of the
// object behind it. Other names, and those whose object is out of reach, stay what they are.
Name behind_mount(const Name& name);

// Those of the array that has the name; none when nothing has. Throws FormatError for what is no
// array, Error.
std::optional<Rights> rights_of_array(const Name& name);

// What the names that list() gives begin with.
std::string list_prefix(const Name& directory);
// As scan(): the arrays directly in a directory, and the names of its directories. Appends.
void scan_infos(int dirfd, std::string_view prefix,
                std::vector<std::shared_ptr<const Info>>& arrays,
                std::vector<std::string>& directories);
// As list_shared(), of a directory that is open.
std::vector<std::shared_ptr<const Info>> list(const FileDescriptor& root, const Name& directory);

}  // namespace detail
}  // namespace sharr
