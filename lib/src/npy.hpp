// The NPY header: reading any, writing ours. FORMAT.md is the specification.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>

#include "sharr/store.hpp"

namespace sharr::detail {

// Data of the arrays that we write starts at a multiple of this.
constexpr std::size_t alignment = 4096;
// The longest header that is read: room for tens of thousands of fields, and a bound on what a
// hostile file makes us allocate.
constexpr std::size_t max_header = std::size_t{1} << 20;

// Size of magic, version, length and header together: where the data starts. 0 when head is no NPY
// file at all. head is the first bytes of the file, 12 or more unless the file is shorter.
// Throws ParseError for an unknown version or a header that is longer than max_header.
std::size_t header_size(std::string_view head);

// Reads the header. head holds exactly header_size() bytes. Throws ParseError. The result has no
// name.
Info parse_header(std::string_view head);

// Magic, version, length and header, padded so that the data can follow. Throws ParseError when it
// would be longer than max_header. The next one that is alike may be the same string.
std::shared_ptr<const std::string> format_header(const Dtype& dtype, const Shape& shape,
                                                 Order order);

// Bytes of shape x itemsize. Throws ParseError when an extent is negative, there are too many, or
// the array would not fit the address space. As in NumPy, the other extents count even when one is
// 0.
std::uint64_t data_size(const Shape& shape, std::size_t itemsize);

}  // namespace sharr::detail
