// What every call of the library throws.
//
// The errors of a call carry an errno, the name as the caller gave it, and a message that says what
// is wrong and, where that helps, what to do. Nothing is changed or left behind when one is thrown,
// unless its message says so.
#pragma once

#include <string>
#include <string_view>
#include <system_error>

namespace sharr {

// A system call or a resource said no. code() is the errno in std::generic_category().
class Error : public std::system_error {
 public:
  // An empty message stands for what strerror says of errnum.
  Error(int errnum, std::string_view name, std::string_view message = {});

  // The name as the caller gave it; empty where the error is about no name.
  const std::string& name() const noexcept { return name_; }
  // The message alone; what() is "NAME: MESSAGE".
  const std::string& message() const noexcept { return message_; }
  const char* what() const noexcept override { return what_.c_str(); }
  int errnum() const noexcept { return code().value(); }

 private:
  std::string name_;
  std::string message_;
  std::string what_;
};

// What the caller asked for cannot be: a malformed name, a shape that overflows, an unknown dtype.
class ArgumentError : public Error {
 public:
  ArgumentError(std::string_view name, std::string_view message);
};

// There is something under the name, but it is no array that can be used: not an array at all,
// truncated, of a dtype that memory cannot hold (EINVAL).
class FormatError : public Error {
 public:
  FormatError(std::string_view name, std::string_view message);
};

}  // namespace sharr
