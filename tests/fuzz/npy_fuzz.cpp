// Everything that reads bytes which a stranger may have written: the NPY header, the trailer of the
// SharedArray package, a dtype's text, a whole file.
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <optional>
#include <string>
#include <string_view>

#include "literal.hpp"
#include "npy.hpp"
#include "sharr/object.hpp"
#include "upstream.hpp"

namespace {

using namespace sharr;  // NOLINT(google-build-using-namespace)

void require(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "broken: %s\n", what);
  std::abort();
}

// What the library has taken for a dtype must be one to it again, and printable.
void check_dtype(const Dtype& dtype) {
  const Dtype again(dtype.descr());
  require(again == dtype && again.itemsize() == dtype.itemsize(), "a dtype's descr reads the same");
  require(!dtype.str().empty(), "a dtype can be printed");
}

bool equal(const Info& a, const Info& b) {
  return a.dtype == b.dtype && a.dtype.itemsize() == b.dtype.itemsize() && a.shape == b.shape &&
         a.order == b.order && a.nbytes == b.nbytes;
}

void check_info(const Info& info) {
  check_dtype(info.dtype);
  require(info.nbytes == info.size() * info.dtype.itemsize(), "nbytes is size times itemsize");
  require(info.nbytes == detail::data_size(info.shape, info.dtype.itemsize()), "nbytes of shape");
}

void header(std::string_view bytes) {
  std::optional<Info> info;
  try {
    const std::size_t size = detail::header_size(bytes);
    if (size == 0 || size > bytes.size()) return;
    info = detail::parse_header(bytes.substr(0, size));
    require(info->offset == size, "the data follows the header");
  } catch (const detail::ParseError&) {
    return;
  }
  check_info(*info);
  const std::string written = *detail::format_header(info->dtype, info->shape, info->order);
  require(written.size() % detail::alignment == 0, "our header ends on a page");
  require(detail::header_size(written) == written.size(), "our header has its size");
  require(equal(detail::parse_header(written), *info), "our header reads the same");
}

// The bytes as the text of a header, so that mutations need not keep its length right.
void header_text(std::string_view bytes) {
  for (const char major : {'\1', '\3'}) {
    std::string head = std::string("\x93NUMPY") + major + '\0';
    const std::size_t width = major == 1 ? 2 : 4;
    for (std::size_t i = 0; i < width; ++i) {
      head += static_cast<char>((bytes.size() >> (8 * i)) & 0xFF);
    }
    header(head.append(bytes));
  }
}

void trailer(std::string_view bytes) {
  const std::size_t size = std::min(bytes.size(), detail::max_trailer);
  try {
    const auto info = detail::parse_trailer(bytes.substr(bytes.size() - size), bytes.size());
    if (!info) return;
    check_info(*info);
    require(info->nbytes < bytes.size(), "a trailer follows the data");
  } catch (const detail::ParseError&) {
  }
}

void dtype(std::string_view text) {
  try {
    check_dtype(Dtype(text));
  } catch (const ArgumentError&) {
  }
}

void file(std::string_view bytes) {
  static const int fd = memfd_create("npy_fuzz", MFD_CLOEXEC);
  struct stat st;
  require(ftruncate(fd, 0) == 0 &&
              pwrite(fd, bytes.data(), bytes.size(), 0) == static_cast<ssize_t>(bytes.size()) &&
              fstat(fd, &st) == 0,
          "a file in memory");
  try {
    const Info info = read_info(fd, st, "file:///fuzz");
    check_info(info);
    require(info.offset + info.nbytes <= bytes.size(), "the file holds the data");
  } catch (const FormatError&) {
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const unsigned char* data, std::size_t size) {
  const std::string_view bytes(reinterpret_cast<const char*>(data), size);
  header(bytes);
  header_text(bytes);
  trailer(bytes);
  dtype(bytes);
  file(bytes);
  return 0;
}
