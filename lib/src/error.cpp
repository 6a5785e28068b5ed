#include "sharr/error.hpp"

#include <cerrno>

namespace sharr {

Error::Error(int errnum, std::string_view name, std::string_view message)
    : std::system_error(errnum, std::generic_category()),
      name_(name),
      message_(message.empty() ? code().message() : std::string(message)),
      what_(name_.empty() ? message_ : name_ + ": " + message_) {}

ArgumentError::ArgumentError(std::string_view name, std::string_view message)
    : Error(EINVAL, name, message) {}

FormatError::FormatError(std::string_view name, std::string_view message)
    : Error(EINVAL, name, message) {}

}  // namespace sharr
