// Text for errors and paths. fmt is header-only here, so that a program needs no other library to
// load ours; its own format() would be compiled anew in every file that calls it.
#pragma once

#include <fmt/core.h>

#include <string>

namespace sharr::detail {

std::string formatted_arguments(fmt::string_view text, fmt::format_args arguments);

// As fmt::format.
template <class... A>
std::string formatted(fmt::format_string<const A&...> text, const A&... arguments) {
  return formatted_arguments(text, fmt::make_format_args(arguments...));
}

}  // namespace sharr::detail
