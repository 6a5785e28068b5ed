// Objects that the SharedArray package wrote: data at offset 0, a trailer at the end of the file.
// FORMAT.md gives the layout.
#pragma once

#include <cstdint>
#include <optional>
#include <string_view>

#include "sharr/store.hpp"

namespace sharr::detail {

constexpr std::size_t max_trailer = 548;

// What the object is, without a name; none when tail, the last max_trailer bytes of a file of
// file_size (all of a smaller one), holds no trailer that agrees with the size. Throws ParseError
// for a trailer whose dtype memory cannot hold.
std::optional<Info> parse_trailer(std::string_view tail, std::uint64_t file_size);

}  // namespace sharr::detail
