#include "upstream.hpp"

#include <array>
#include <cstring>

#include "literal.hpp"
#include "npy.hpp"

namespace sharr::detail {
namespace {

constexpr std::string_view magic("[SharedArray]\0\0\0", 16);

struct Layout {
  std::size_t dims;
  bool itemsize;  // since 3.1

  // magic, u64 size, i32 typenum, [i32 itemsize], i32 ndims, i64 dims[]
  std::size_t size() const { return 16 + 8 + 4 + (itemsize ? 4 : 0) + 4 + 8 * dims; }
};

// 1.x; 2.x and 3.0; 3.1 and later; the same built with NumPy 2.
constexpr std::array layouts = {Layout{16, false}, Layout{32, false}, Layout{32, true},
                                Layout{64, true}};

template <class T>
T take(std::string_view& bytes) {
  T value;
  std::memcpy(&value, bytes.data(), sizeof(T));
  bytes.remove_prefix(sizeof(T));
  return value;
}

// The typestring of a NumPy type number, without the size where elements have any number of bytes.
std::string_view typestring(std::int32_t number) {
  static constexpr std::array<std::string_view, 24> types = {
      "?", "b", "B", "h", "H", "i", "I", "l", "L", "q",  "Q",  "f",
      "d", "g", "F", "D", "G", "O", "S", "U", "V", "M8", "m8", "e"};
  if (number < 0 || static_cast<std::size_t>(number) >= types.size()) return {};
  return types[static_cast<std::size_t>(number)];
}

std::optional<Info> parse(std::string_view trailer, const Layout& layout, std::uint64_t data) {
  if (!trailer.starts_with(magic)) return {};
  trailer.remove_prefix(magic.size());
  if (take<std::uint64_t>(trailer) != data) return {};
  const std::string_view type = typestring(take<std::int32_t>(trailer));
  const std::int32_t stored = layout.itemsize ? take<std::int32_t>(trailer) : 0;
  const auto ndims = take<std::int32_t>(trailer);
  if (type.empty() || stored < 0 || ndims < 0 || static_cast<std::size_t>(ndims) > layout.dims) {
    return {};
  }
  Shape shape;
  for (std::int32_t i = 0; i < ndims; ++i) shape.push_back(take<std::int64_t>(trailer));

  std::string descr(type);
  if (type == "S" || type == "U" || type == "V") {
    const std::uint64_t count = data_size(shape, 1);
    std::uint64_t itemsize = static_cast<std::uint64_t>(stored);
    // Before 3.1 only the data's size tells.
    if (!layout.itemsize) itemsize = count == 0 ? 0 : data / count;
    descr += std::to_string(type == "U" ? itemsize / 4 : itemsize);
  } else if (type == "O") {
    throw ParseError("object dtype: its elements are pointers, not data");
  }
  Dtype dtype(descr);
  if (layout.itemsize && static_cast<std::size_t>(stored) != dtype.itemsize()) return {};
  if (data_size(shape, dtype.itemsize()) != data) return {};
  return Info{.name = {},
              .dtype = std::move(dtype),
              .shape = std::move(shape),
              .order = Order::c,
              .offset = 0,
              .nbytes = data,
              .format = "SharedArray"};
}

}  // namespace

std::optional<Info> parse_trailer(std::string_view tail, std::uint64_t file_size) {
  for (const Layout& layout : layouts) {
    if (tail.size() < layout.size()) break;  // they grow
    auto info = parse(tail.substr(tail.size() - layout.size()), layout, file_size - layout.size());
    if (info) return info;
  }
  return {};
}

}  // namespace sharr::detail
