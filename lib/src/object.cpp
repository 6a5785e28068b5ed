// What an open file is, and what a directory holds.
#include "sharr/object.hpp"

#include <dirent.h>
#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <ctime>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <tuple>
#include <unordered_map>
#include <utility>

#include "literal.hpp"
#include "memory.hpp"
#include "npy.hpp"
#include "staging.hpp"
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

// What the header says, which may be more than the file holds. header: its size, of which head is
// the beginning.
Info read_header(int fd, std::string_view head, std::size_t header, std::uint64_t file_size,
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

// The same of the file open as fd; none when it is no NPY file at all.
std::optional<Info> read_npy(int fd, std::uint64_t file_size, std::string_view uri) {
  std::array<char, page> buffer;
  const std::size_t wanted = std::min<std::uint64_t>(page, file_size);
  const std::string_view head(buffer.data(), read_at(fd, buffer.data(), wanted, 0, uri));
  const std::size_t header = detail::header_size(head);
  if (header == 0) return {};
  return read_header(fd, head, header, file_size, uri);
}

void check_size(const Info& info, std::uint64_t file_size, std::string_view uri) {
  if (info.nbytes > file_size - info.offset) {
    throw FormatError(uri, fmt::format("truncated: {} of {} need {} bytes, the file has {}",
                                       shape_text(info.shape), info.dtype.descr(),
                                       info.offset + info.nbytes, file_size));
  }
}

Info read(int fd, std::uint64_t file_size, std::string_view uri) {
  if (auto info = read_npy(fd, file_size, uri)) {
    check_size(*info, file_size, uri);
    return *std::move(info);
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
// device: of the directory; what is mounted there is left out.
std::optional<Entry> read_entry(int dirfd, dev_t device, std::string name, std::string_view prefix,
                                bool regular) {
  if (reserved(name) || name == "." || name == ".." || name.find('/') != std::string::npos) {
    return {};
  }
  Entry entry{.name = std::move(name), .st = {}, .info = {}};
  // A name without directories needs none of the care that open_beneath() takes, and pays for.
  const auto open = [&](int flags) {
    return FileDescriptor(openat(dirfd, entry.name.c_str(), flags | O_CLOEXEC | O_NOFOLLOW));
  };
  if (!regular) {
    const FileDescriptor fd = open(O_PATH);
    if (!fd || fstat(fd.get(), &entry.st) != 0 || entry.st.st_dev != device) return {};
    if (S_ISDIR(entry.st.st_mode)) return entry;
    if (!S_ISREG(entry.st.st_mode)) return {};
  }
  // To look is not to use. Who may not leave the time of access alone looks all the same.
  constexpr int flags = O_RDONLY | O_NONBLOCK | O_NOCTTY;
  FileDescriptor fd = open(flags | O_NOATIME);
  if (!fd && errno == EPERM) fd = open(flags);
  if (!fd || fstat(fd.get(), &entry.st) != 0 || entry.st.st_dev != device ||
      !S_ISREG(entry.st.st_mode)) {
    return {};
  }
  try {
    entry.info = read_info(fd.get(), entry.st, std::string(prefix) + entry.name);
  } catch (const Error&) {
    return {};  // no array, or not to be read: to whoever asks here it does not exist
  }
  return entry;
}

// What the arrays of a directory were when it was read last, by inode. One whose file has changed
// since has another ctime.
struct Seen {
  timespec changed;
  Info info;
};
using Listing = std::unordered_map<ino_t, Seen>;

// Of directories, by device, inode and who has read them. Guarded by memory_mutex().
struct Listings {
  // A hundred bytes or two each.
  static constexpr std::size_t max_arrays = std::size_t{1} << 17;
  using Key = std::tuple<dev_t, ino_t, uid_t>;

  std::map<Key, std::shared_ptr<const Listing>> known;
  std::size_t arrays = 0;
};

Listings& listings() {
  static auto& listings = *new Listings;
  return listings;
}

std::shared_ptr<const Listing> known_listing(const Listings::Key& key) {
  const std::lock_guard lock(detail::memory_mutex());
  const auto found = listings().known.find(key);
  return found == listings().known.end() ? std::make_shared<const Listing>() : found->second;
}

void remember_listing(const Listings::Key& key, Listing listing) {
  auto shared = std::make_shared<const Listing>(std::move(listing));
  std::map<Listings::Key, std::shared_ptr<const Listing>> dropped;  // after the lock
  const std::lock_guard lock(detail::memory_mutex());
  Listings& all = listings();
  if (const auto found = all.known.find(key); found != all.known.end()) {
    all.arrays -= found->second->size();
    std::swap(found->second, dropped[key]);
    all.known.erase(found);
  }
  if (shared->size() > Listings::max_arrays || shared->empty()) return;
  if (all.arrays + shared->size() > Listings::max_arrays) {
    dropped.merge(all.known);
    all.known.clear();
    all.arrays = 0;
  }
  all.arrays += shared->size();
  all.known[key] = std::move(shared);
}

// The entry of a regular file, if it is in the listing and has not changed since.
std::optional<Entry> unchanged(int dirfd, const std::string& name, std::string_view prefix,
                               const Listing& listing) {
  Entry entry{.name = name, .st = {}, .info = {}};
  if (fstatat(dirfd, name.c_str(), &entry.st, AT_SYMLINK_NOFOLLOW | AT_NO_AUTOMOUNT) != 0)
    return {};
  const auto seen = listing.find(entry.st.st_ino);
  if (seen == listing.end() || !S_ISREG(entry.st.st_mode)) return {};
  const timespec& changed = seen->second.changed;
  const Info& info = seen->second.info;
  if (changed.tv_sec != entry.st.st_ctim.tv_sec || changed.tv_nsec != entry.st.st_ctim.tv_nsec ||
      info.offset + info.nbytes > static_cast<std::uint64_t>(entry.st.st_size)) {
    return {};
  }
  entry.info = info;
  entry.info->name.assign(prefix).append(name);
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

namespace {

// What read says, with its errors as read_info() promises them.
template <class Read>
auto reading(std::string_view uri, Read&& read) {
  try {
    return read();
  } catch (const detail::ParseError& error) {
    throw FormatError(uri, std::string("not an array: ") + error.what());
  } catch (const ArgumentError& error) {
    throw FormatError(uri, std::string("not an array: ") + error.message());
  }
}

template <class Read>
Info named(std::string_view uri, Read&& read) {
  Info info = reading(uri, std::forward<Read>(read));
  info.name = uri;
  return info;
}

}  // namespace

std::size_t header_size(std::string_view head, std::string_view uri) {
  return reading(uri, [&] {
    const std::size_t size = detail::header_size(head);
    if (size <= head.size()) throw FormatError(uri, "not an array: not an NPY file");
    return size;
  });
}

Info parse_header(std::string_view head, std::string_view uri) {
  if (header_size(head.substr(0, 12), uri) != head.size()) {
    throw FormatError(uri, "truncated: no whole header");
  }
  return named(uri, [&] { return detail::parse_header(head); });
}

std::string format_header(const Info& info) {
  return detail::format_header(info.dtype, info.shape, info.order);
}

Info read_info(int fd, const struct stat& st, std::string_view uri) {
  return named(uri, [&] { return read(fd, static_cast<std::uint64_t>(st.st_size), uri); });
}

std::vector<Entry> scan(int dirfd, std::string_view prefix) {
  // A descriptor of its own, because O_PATH ones cannot be read and a directory has one position.
  FileDescriptor fd = open_beneath(dirfd, ".", O_RDONLY | O_DIRECTORY);
  if (!fd) throw Error(errno, prefix);
  const std::unique_ptr<DIR, int (*)(DIR*)> stream(fdopendir(fd.get()), closedir);
  if (!stream) throw Error(errno, prefix);
  fd.release();  // the stream closes it
  const int directory = ::dirfd(stream.get());

  struct stat st;
  if (fstat(directory, &st) != 0) throw Error(errno, prefix);
  const Listings::Key key{st.st_dev, st.st_ino, geteuid()};
  const auto known = known_listing(key);
  timespec now{};
  clock_gettime(CLOCK_REALTIME_COARSE, &now);

  struct Item {
    std::string name;
    bool regular;
    bool read = false;  // anew
    std::optional<Entry> entry = {};
  };
  std::vector<Item> items;
  while (true) {
    errno = 0;
    const dirent* item = readdir(stream.get());
    if (item == nullptr) {
      if (errno != 0) throw Error(errno, prefix);
      break;
    }
    const std::string_view name = item->d_name;
    if (name == "." || name == "..") continue;
    if (reserved(name)) {
      detail::sweep(directory, item->d_name);
      continue;
    }
    if (item->d_type != DT_REG && item->d_type != DT_DIR && item->d_type != DT_UNKNOWN) continue;
    items.push_back({.name = item->d_name, .regular = item->d_type == DT_REG});
  }

  const auto look = [&](Item& item) {
    if (item.regular && !known->empty()) {
      item.entry = unchanged(directory, item.name, prefix, *known);
      // On another file system: something is mounted on the file.
      if (item.entry && item.entry->st.st_dev != st.st_dev) item.entry.reset();
      if (item.entry) return;
    }
    item.read = true;
    item.entry = read_entry(directory, st.st_dev, item.name, prefix, item.regular);
  };
  constexpr std::uint64_t piece = 500;  // some of them take as long as to start a thread
  const int error = detail::in_pieces(items.size(), piece,
                                      [&](std::uint64_t from, std::uint64_t length) {
                                        try {
                                          for (std::uint64_t i = from; i < from + length; ++i)
                                            look(items[i]);
                                        } catch (const std::bad_alloc&) {
                                          return ENOMEM;
                                        }
                                        return 0;
                                      },
                                      {});
  if (error != 0) throw Error(error, prefix);

  std::vector<Entry> entries;
  entries.reserve(items.size());
  Listing listing;
  bool news = false;
  for (Item& item : items) {
    if (!item.entry) continue;
    news = news || (item.read && item.entry->info);
    entries.push_back(*std::move(item.entry));
  }
  if (news || entries.size() < known->size()) {
    for (const Entry& entry : entries) {
      if (entry.info && detail::settled(entry.st.st_ctim, now)) {
        listing.insert_or_assign(entry.st.st_ino, Seen{entry.st.st_ctim, *entry.info});
      }
    }
    remember_listing(key, std::move(listing));
  }
  return entries;
}

std::optional<Entry> inspect(int dirfd, const std::string& name, std::string_view prefix) {
  struct stat st;
  if (fstat(dirfd, &st) != 0) throw Error(errno, prefix);
  return read_entry(dirfd, st.st_dev, name, prefix, false);
}

struct Draft::State {
  State(int dirfd, std::string_view uri, mode_t mode)
      : name(uri), staging(name, place(dirfd, {}), mode) {}

  detail::Place place(int dirfd, const std::string& file) const {
    FileDescriptor opened = open_beneath(dirfd, ".", O_PATH | O_DIRECTORY);
    if (!opened) detail::throw_errno(name);
    return {.opened = std::move(opened), .directory = ".", .file = file, .made = {}};
  }

  Name name;
  detail::Staging staging;
};

Draft::Draft(int dirfd, std::string_view uri, mode_t mode)
    : state_(std::make_unique<State>(dirfd, uri, mode)) {}
Draft::Draft(Draft&& other) noexcept = default;
Draft::~Draft() = default;

int Draft::fd() const noexcept { return state_->staging.fd(); }

Info Draft::check(bool declared) const {
  const std::string& uri = state_->name.given();
  const auto size = static_cast<std::uint64_t>(detail::stat_file(fd(), uri).st.st_size);
  Info info = named(uri, [&] {
    auto npy = read_npy(fd(), size, uri);
    if (!npy) throw FormatError(uri, "not an array: not an NPY file");
    return *std::move(npy);
  });
  if (declared && size == info.offset) return info;
  check_size(info, size, uri);
  if (size > info.offset + info.nbytes) {
    throw FormatError(uri, fmt::format("too long: {} of {} need {} bytes, the file has {}",
                                       shape_text(info.shape), info.dtype.descr(),
                                       info.offset + info.nbytes, size));
  }
  return info;
}

void Draft::reserve(const Info& info) {
  const std::uint64_t size = info.offset + info.nbytes;
  const off_t hole = lseek(fd(), 0, SEEK_HOLE);
  // A file system that knows no holes says EINVAL, one without any the size.
  if (hole < 0 || static_cast<std::uint64_t>(hole) < size) state_->staging.allocate(size, {});
}

void Draft::publish(int dirfd, const std::string& name, bool replace) {
  state_->staging.publish(state_->place(dirfd, name), replace);
}

}  // namespace sharr
