#include "npy.hpp"

#include <cstring>
#include <optional>

#include "dtype.hpp"
#include "literal.hpp"

namespace sharr::detail {
namespace {

constexpr std::string_view magic = "\x93NUMPY";
constexpr std::size_t prefix_v1 = 10;  // magic, two bytes of version, u16 length
constexpr std::size_t prefix_v2 = 12;  // the same with u32; version 3.0 too

std::size_t little_endian(std::string_view bytes) {
  std::size_t value = 0;
  for (std::size_t i = bytes.size(); i-- > 0;) {
    value = (value << 8) | static_cast<unsigned char>(bytes[i]);
  }
  return value;
}

// Without the spaces that fill the header, where it is filled with nothing else. Most of a header
// is padding, and to look at it a byte at a time took longer than all the rest.
std::string_view unpadded(std::string_view text) {
  const void* const brace = memrchr(text.data(), '}', text.size());
  if (brace == nullptr) return text;
  const auto end = static_cast<std::size_t>(static_cast<const char*>(brace) - text.data()) + 1;
  std::string_view rest = text.substr(end);
  if (rest.ends_with('\n')) rest.remove_suffix(1);
  const bool spaces = rest.starts_with(' ') && rest.substr(1) == rest.substr(0, rest.size() - 1);
  return spaces ? text.substr(0, end) : text;
}

// As parse_header().
Info parse(std::string_view head) {
  const int major = static_cast<unsigned char>(head[6]);
  std::string_view text = unpadded(head.substr(major == 1 ? prefix_v1 : prefix_v2));
  std::string converted;
  if (major == 3) {
    check_utf8(text);
  } else if (text.find_first_of('\0') != std::string_view::npos) {
    throw ParseError("a NUL byte in the header");
  } else {
    for (const char c : text) {
      if (static_cast<unsigned char>(c) < 0x80) continue;
      text = converted = latin1_to_utf8(text);
      break;
    }
  }

  std::optional<Dtype> dtype;
  std::optional<bool> fortran;
  std::optional<Shape> shape;
  Lexer lexer(text);
  lexer.expect('{');
  bool comma = true;
  while (!lexer.accept('}')) {
    if (!comma) throw ParseError("expected ',' in the header");
    const std::string key = lexer.string().value;
    lexer.expect(':');
    if (key == "descr" && !dtype) {
      dtype = DtypeAccess::parse(lexer);
    } else if (key == "fortran_order" && !fortran) {
      fortran = lexer.boolean();
    } else if (key == "shape" && !shape) {
      shape = lexer.shape();
    } else {
      throw ParseError("a key in the header that NPY does not have");
    }
    comma = lexer.accept(',');
  }
  if (!lexer.at_end()) throw ParseError("something follows the header");
  if (!dtype || !fortran || !shape) {
    throw ParseError("the header lacks descr, fortran_order or shape");
  }
  const std::uint64_t nbytes = data_size(*shape, dtype->itemsize());
  return {.name = {},
          .dtype = *std::move(dtype),
          .shape = *std::move(shape),
          .order = *fortran ? Order::fortran : Order::c,
          .offset = head.size(),
          .nbytes = nbytes,
          .format = major == 1 ? "NPY 1.0" : (major == 2 ? "NPY 2.0" : "NPY 3.0")};
}

}  // namespace

std::size_t header_size(std::string_view head) {
  if (!head.starts_with(magic) || head.size() < prefix_v1) return 0;
  const char major = head[6];
  if (major < 1 || major > 3 || head[7] != 0) {
    throw ParseError("an NPY file of unknown version");
  }
  const std::size_t prefix = major == 1 ? prefix_v1 : prefix_v2;
  if (head.size() < prefix) throw ParseError("the NPY header is truncated");
  const std::size_t size = prefix + little_endian(head.substr(8, prefix - 8));
  if (size > max_header) throw ParseError("the NPY header is too long");
  return size;
}

Info parse_header(std::string_view head) {
  // Arrays come in series, as frames and batches do: all alike.
  thread_local struct {
    std::string head;
    std::optional<Info> info;
  } last;
  if (last.info && last.head == head) return *last.info;
  Info info = parse(head);
  if (head.size() <= alignment) {
    last.info.reset();  // until both are there
    last.head = head;
    last.info = info;
  }
  return info;
}

namespace {

// As format_header().
std::string format(const Dtype& dtype, const Shape& shape, Order order) {
  const std::string text = "{'descr': " + dtype.literal() +
                           ", 'fortran_order': " + (order == Order::fortran ? "True" : "False") +
                           ", 'shape': " + shape_text(shape) + ", }";
  std::string body;
  char major = 1;
  if (!utf8_to_latin1(text, body)) {
    body = text;
    major = 3;
  }
  const auto padded = [&](std::size_t prefix) {
    return (prefix + body.size() + 1 + alignment - 1) / alignment * alignment;
  };
  if (major == 1 && padded(prefix_v1) - prefix_v1 > 0xFFFF) major = 2;
  const std::size_t prefix = major == 1 ? prefix_v1 : prefix_v2;
  const std::size_t size = padded(prefix);
  if (size > max_header) throw ParseError("a dtype with too many fields");

  std::string header;
  header.reserve(size);
  header += magic;
  header += major;
  header += '\0';
  for (std::size_t length = size - prefix, i = 8; i < prefix; ++i, length >>= 8) {
    header += static_cast<char>(length & 0xFF);
  }
  header += body;
  header.resize(size, ' ');
  header.back() = '\n';
  return header;
}

}  // namespace

std::shared_ptr<const std::string> format_header(const Dtype& dtype, const Shape& shape,
                                                 Order order) {
  // As for parse_header(): the last one made, as likely the next.
  thread_local struct {
    std::optional<Dtype> dtype;
    Shape shape;
    Order order;
    std::shared_ptr<const std::string> header;
  } last;
  if (last.dtype == dtype && last.shape == shape && last.order == order) return last.header;
  auto header = std::make_shared<const std::string>(format(dtype, shape, order));
  if (header->size() <= alignment) {
    last.dtype.reset();  // until all are there
    last.shape = shape;
    last.order = order;
    last.header = header;
    last.dtype = dtype;
  }
  return header;
}

std::uint64_t data_size(const Shape& shape, std::size_t itemsize) {
  if (shape.size() > max_ndim) throw ParseError("more than 64 dimensions");
  // Elements without bytes count as one, so that the number of elements fits too.
  std::int64_t product = itemsize == 0 ? 1 : static_cast<std::int64_t>(itemsize);
  bool empty = itemsize == 0;
  for (const std::int64_t extent : shape) {
    if (extent < 0) throw ParseError("negative dimensions are not allowed: " + shape_text(shape));
    if (extent == 0) {
      empty = true;
    } else if (__builtin_mul_overflow(product, extent, &product)) {
      throw ParseError("the array is too big: " + shape_text(shape));
    }
  }
  // Room for a header, so that no sum of the two overflows.
  if (product > INT64_MAX - static_cast<std::int64_t>(2 * max_header)) {
    throw ParseError("the array is too big: " + shape_text(shape));
  }
  return empty ? 0 : static_cast<std::uint64_t>(product);
}

}  // namespace sharr::detail
