// What an open file is, and what a directory holds.
#include "sharr/object.hpp"

#include <dirent.h>
#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <memory>

#include "literal.hpp"
#include "npy.hpp"
#include "system.hpp"
#include "upstream.hpp"

namespace sharr {
namespace {

constexpr std::size_t page = 4096;

// Fills buffer from offset on; less only at the end of the file.
std::size_t read_at(int fd, char* buffer, std::size_t size, std::uint64_t offset,
                    std::string_view uri) {
  std::size_t done = 0;
  while (done < size) {
    const ssize_t n = pread(fd, buffer + done, size - done, static_cast<off_t>(offset + done));
    if (n == 0) break;
    if (n < 0) {
      if (errno == EINTR) continue;
      throw Error(errno, uri);
    }
    done += static_cast<std::size_t>(n);
  }
  return done;
}

Info read_npy(int fd, std::string_view head, std::size_t header, std::uint64_t file_size,
              std::string_view uri) {
  if (header > file_size) {
    throw FormatError(uri, fmt::format("truncated: its header needs {} bytes, the file has {}",
                                       header, file_size));
  }
  if (header <= head.size()) return detail::parse_header(head.substr(0, header));
  std::string whole(head);
  whole.resize(header);
  const std::size_t rest = header - head.size();
  if (read_at(fd, whole.data() + head.size(), rest, head.size(), uri) != rest) {
    throw FormatError(uri, "truncated while it was read");
  }
  return detail::parse_header(whole);
}

Info read(int fd, std::uint64_t file_size, std::string_view uri) {
  std::array<char, page> buffer;
  const std::size_t wanted = std::min<std::uint64_t>(page, file_size);
  const std::string_view head(buffer.data(), read_at(fd, buffer.data(), wanted, 0, uri));
  if (const std::size_t header = detail::header_size(head)) {
    Info info = read_npy(fd, head, header, file_size, uri);
    if (info.nbytes > file_size - info.offset) {
      throw FormatError(uri, fmt::format("truncated: {} of {} need {} bytes, the file has {}",
                                         shape_text(info.shape), info.dtype.descr(),
                                         info.offset + info.nbytes, file_size));
    }
    return info;
  }
  std::array<char, detail::max_trailer> tail;
  const std::size_t size = std::min<std::uint64_t>(tail.size(), file_size);
  if (read_at(fd, tail.data(), size, file_size - size, uri) == size) {
    if (auto info = detail::parse_trailer({tail.data(), size}, file_size)) return *std::move(info);
  }
  throw FormatError(uri, "not an array: neither an NPY file nor an object of SharedArray");
}

// regular: the directory says that the name is a regular file's, which saves a look before opening
// it. Opening anything else to read could wake whoever waits at a FIFO or move a tape.
std::optional<Entry> read_entry(int dirfd, std::string name, std::string_view prefix,
                                bool regular) {
  if (detail::reserved(name) || name == "." || name == "..") return {};
  Entry entry{.name = std::move(name), .st = {}, .info = {}};
  if (!regular) {
    const FileDescriptor fd = open_beneath(dirfd, entry.name, O_PATH);
    if (!fd || fstat(fd.get(), &entry.st) != 0) return {};
    if (S_ISDIR(entry.st.st_mode)) return entry;
    if (!S_ISREG(entry.st.st_mode)) return {};
  }
  const FileDescriptor fd = open_beneath(dirfd, entry.name, O_RDONLY);
  if (!fd || fstat(fd.get(), &entry.st) != 0 || !S_ISREG(entry.st.st_mode)) return {};
  try {
    entry.info = read_info(fd.get(), entry.st, std::string(prefix) + entry.name);
  } catch (const Error&) {
    return {};  // no array, or not to be read: to whoever asks here it does not exist
  }
  return entry;
}

}  // namespace

std::string shape_text(const Shape& shape) {
  std::string text = "(";
  for (std::size_t i = 0; i < shape.size(); ++i) {
    if (i > 0) text += ", ";
    text += std::to_string(shape[i]);
  }
  return text + (shape.size() == 1 ? ",)" : ")");
}

std::uint64_t Info::size() const noexcept {
  // Cannot overflow: data_size() has checked the product.
  std::uint64_t count = 1;
  for (const std::int64_t extent : shape) count *= static_cast<std::uint64_t>(extent);
  return count;
}

Info read_info(int fd, const struct stat& st, std::string_view uri) {
  try {
    Info info = read(fd, static_cast<std::uint64_t>(st.st_size), uri);
    info.name = uri;
    return info;
  } catch (const detail::ParseError& error) {
    throw FormatError(uri, std::string("not an array: ") + error.what());
  } catch (const ArgumentError& error) {
    throw FormatError(uri, std::string("not an array: ") + error.message());
  }
}

std::vector<Entry> scan(int dirfd, std::string_view prefix) {
  // A descriptor of its own, because O_PATH ones cannot be read and a directory has one position.
  FileDescriptor fd = open_beneath(dirfd, ".", O_RDONLY | O_DIRECTORY);
  if (!fd) throw Error(errno, prefix);
  const std::unique_ptr<DIR, int (*)(DIR*)> stream(fdopendir(fd.get()), closedir);
  if (!stream) throw Error(errno, prefix);
  fd.release();  // the stream closes it
  const int directory = ::dirfd(stream.get());

  std::vector<Entry> entries;
  while (true) {
    errno = 0;
    const dirent* item = readdir(stream.get());
    if (item == nullptr) {
      if (errno != 0) throw Error(errno, prefix);
      return entries;
    }
    const std::string_view name = item->d_name;
    if (name == "." || name == "..") continue;
    if (item->d_type != DT_REG && item->d_type != DT_DIR && item->d_type != DT_UNKNOWN) continue;
    auto entry = read_entry(directory, item->d_name, prefix, item->d_type == DT_REG);
    if (entry) entries.push_back(*std::move(entry));
  }
}

std::optional<Entry> inspect(int dirfd, const std::string& name, std::string_view prefix) {
  return read_entry(dirfd, name, prefix, false);
}

}  // namespace sharr
