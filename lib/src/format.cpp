#include "format.hpp"

namespace sharr::detail {

std::string formatted_arguments(fmt::string_view text, fmt::format_args arguments) {
  return fmt::vformat(text, arguments);
}

}  // namespace sharr::detail
