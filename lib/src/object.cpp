// What an open file is, and what a directory holds.
#include "sharr/object.hpp"

#include <dirent.h>
#include <linux/capability.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <condition_variable>
#include <ctime>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <tuple>
#include <utility>

#include "access.hpp"
#include "format.hpp"
#include "literal.hpp"
#include "memory.hpp"
#include "npy.hpp"
#include "staging.hpp"
#include "system.hpp"
#include "upstream.hpp"

namespace sharr {
namespace {

using detail::same;

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
    throw FormatError(
        uri, detail::formatted("truncated: its header needs {} bytes, the file has {}", header,
                               file_size));
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
    throw FormatError(uri, detail::formatted("truncated: {} of {} need {} bytes, the file has {}",
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

// What a directory held when it was read last.
struct Listing {
  enum class Kind : std::uint8_t { unknown, file, directory };
  struct Item {
    std::string name;
    Kind kind = Kind::unknown;  // as the directory says, or as it was found
    bool settled = false;       // unless it has changed within that time
    std::uint32_t weight = 1;   // in arrays of some three hundred bytes
    ino_t inode = 0;
    timespec changed = {};                  // its ctime; a file that has changed since has another
    std::shared_ptr<const Info> info = {};  // of an array

    bool shown() const noexcept { return info || kind == Kind::directory; }
  };
  std::optional<timespec> changed;  // the directory's ctime; none: it may have changed within that
  std::vector<Item> items;          // by name
  std::size_t weight = 0;           // of them all
};
using Kind = Listing::Kind;

// Looks at what has the item's name, by the rules of scan(), and says whether that is to be shown.
// A kind that is known to be a file's saves a look before opening it: to open anything else to read
// could wake whoever waits at a FIFO or move a tape.
// device: of the directory; what is mounted there is left out. now: before the look. Throws Error
// when descriptors or memory have run out.
bool read_item(int dirfd, dev_t device, std::string_view prefix, const timespec& now,
               Listing::Item& item, struct stat& st) {
  const std::string& name = item.name;
  item.info.reset();
  item.weight = 1;
  if (reserved(name) || name == "." || name == ".." || name.find('/') != std::string::npos) {
    return false;
  }
  // A name without directories needs none of the care that open_beneath() takes, and pays for.
  const auto open = [&](int flags) {
    FileDescriptor fd(openat(dirfd, name.c_str(), flags | O_CLOEXEC | O_NOFOLLOW));
    if (!fd && detail::exhausted(errno)) throw Error(errno, std::string(prefix).append(name));
    return fd;
  };
  if (item.kind != Kind::file) {
    item.kind = Kind::unknown;
    const FileDescriptor fd = open(O_PATH);
    // Whoever asks may be the daemon of what is mounted there, which has to ask itself no question.
    struct statx here;
    constexpr int unasked = AT_EMPTY_PATH | AT_STATX_DONT_SYNC;
    if (!fd || statx(fd.get(), "", unasked, 0, &here) != 0 ||
        makedev(here.stx_dev_major, here.stx_dev_minor) != device || fstat(fd.get(), &st) != 0) {
      return false;
    }
    if (S_ISDIR(st.st_mode)) item.kind = Kind::directory;
    if (!S_ISREG(st.st_mode)) return item.shown();
  }
  // To look is not to use. Who may not leave the time of access alone looks all the same.
  constexpr int flags = O_RDONLY | O_NONBLOCK | O_NOCTTY;
  FileDescriptor fd = open(flags | O_NOATIME);
  if (!fd && errno == EPERM) fd = open(flags);
  if (!fd || fstat(fd.get(), &st) != 0 || st.st_dev != device || !S_ISREG(st.st_mode)) return false;
  item.inode = st.st_ino;
  item.changed = st.st_ctim;
  item.settled = detail::settled(st.st_ctim, now);
  try {
    item.info =
        std::make_shared<const Info>(read_info(fd.get(), st, std::string(prefix).append(name)));
    // A dtype can have any number of fields, at no cost to whoever links the file many times.
    item.weight += static_cast<std::uint32_t>(item.info->dtype.descr().size() / 200);
  } catch (const Error&) {
    return false;  // no array, or not to be read: to whoever asks here it does not exist
  }
  return true;
}

// Whether a file is the array that it was.
bool unchanged(int dirfd, dev_t device, std::string_view prefix, const Listing::Item& item,
               struct stat& st) {
  if (!item.info || !item.settled) return false;
  const std::string& uri = item.info->name;
  return uri.size() == prefix.size() + item.name.size() && uri.starts_with(prefix) &&
         fstatat(dirfd, item.name.c_str(), &st, AT_SYMLINK_NOFOLLOW | AT_NO_AUTOMOUNT) == 0 &&
         st.st_dev == device && st.st_ino == item.inode && same(st.st_ctim, item.changed) &&
         item.info->offset + item.info->nbytes <= static_cast<std::uint64_t>(st.st_size);
}

// What decides on what this thread may read: a listing is not for who may read less.
std::string credentials() {
  std::array<gid_t, 64> groups;
  const int count = getgroups(static_cast<int>(groups.size()), groups.data());
  __user_cap_header_struct header{.version = _LINUX_CAPABILITY_VERSION_3, .pid = 0};
  std::array<__user_cap_data_struct, 2> capabilities{};
  // Of so many groups that they cannot be told, or without an answer: nobody's.
  if (count < 0 || syscall(SYS_capget, &header, capabilities.data()) != 0) return {};
  std::string text = detail::formatted("{} {} {:x} {:x}", geteuid(), getegid(),
                                       capabilities[0].effective, capabilities[1].effective);
  for (int i = 0; i < count; ++i)
    text += detail::formatted(" {}", groups[static_cast<std::size_t>(i)]);
  return text;
}

// The listings that are remembered: of directories, by device, inode and the credentials() that
// have read them. Guarded by memory_mutex().
struct Listings {
  static constexpr std::size_t max_weight = std::size_t{1} << 17;
  using Key = std::tuple<dev_t, ino_t, std::string>;

  const std::shared_ptr<const Listing> none = std::make_shared<const Listing>();
  std::map<Key, std::shared_ptr<const Listing>> known;
  std::size_t weight = 0;  // of them all
};

Listings& listings() {
  static auto& listings = *new Listings;
  return listings;
}

// See memory_mutex().
[[maybe_unused]] const Listings& first = listings();

std::shared_ptr<const Listing> known_listing(const Listings::Key& key) {
  const std::lock_guard lock(detail::memory_mutex());
  const Listings& all = listings();
  const auto found = all.known.find(key);
  return found == all.known.end() ? all.none : found->second;
}

void remember(const Listings::Key& key, std::shared_ptr<const Listing> listing) {
  std::map<Listings::Key, std::shared_ptr<const Listing>> dropped;  // after the lock
  const std::lock_guard lock(detail::memory_mutex());
  Listings& all = listings();
  if (const auto found = all.known.find(key); found != all.known.end()) {
    all.weight -= found->second->weight;
    std::swap(found->second, dropped[key]);
    all.known.erase(found);
  }
  const std::size_t weight = listing->weight;
  if (weight > Listings::max_weight || weight == 0 || std::get<2>(key).empty()) return;
  if (all.weight + weight > Listings::max_weight) {
    dropped.merge(all.known);
    all.known.clear();
    all.weight = 0;
  }
  all.weight += weight;
  all.known[key] = std::move(listing);
}

// Some names of a directory, and what has them.
struct Batch {
  static constexpr std::size_t size = 100;  // takes longer to look at than a thread to start

  std::vector<Listing::Item> items;
  std::vector<struct stat> stats;  // of them, if wanted
};

// The names of a directory as one thread reads them, for all to look at.
class Batches {
 public:
  void add(Batch batch) {
    const std::lock_guard lock(mutex_);
    batches_.push_back(std::move(batch));
    changed_.notify_one();
  }
  void end() {
    const std::lock_guard lock(mutex_);
    ended_ = true;
    changed_.notify_all();
  }
  // Waits for one that nobody has; null when there will be none. Stays where it is.
  Batch* next() {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return ended_ || taken_ < batches_.size(); });
    return taken_ < batches_.size() ? &batches_[taken_++] : nullptr;
  }
  // All of them, for the thread that has added them.
  std::deque<Batch>& all() noexcept { return batches_; }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<Batch> batches_;
  std::size_t taken_ = 0;
  bool ended_ = false;
};

using Stream = std::unique_ptr<DIR, int (*)(DIR*)>;

Stream open_stream(int dirfd, std::string_view prefix) {
  // A descriptor of its own, because O_PATH ones cannot be read and a directory has one position.
  FileDescriptor fd = open_beneath(dirfd, ".", O_RDONLY | O_DIRECTORY);
  Stream stream(fd ? fdopendir(fd.get()) : nullptr, closedir);
  if (!stream) throw Error(errno, prefix);
  fd.release();  // the stream closes it
  return stream;
}

// The next names of a directory; less than a whole batch at its end. temporary: whether there are
// reserved ones, which are swept.
Batch read_names(DIR* stream, std::string_view prefix, bool& temporary) {
  Batch batch;
  batch.items.reserve(Batch::size);
  while (batch.items.size() < Batch::size) {
    errno = 0;
    const dirent* item = readdir(stream);
    if (item == nullptr) {
      if (errno != 0) throw Error(errno, prefix);
      break;
    }
    const std::string_view name = item->d_name;
    if (name == "." || name == "..") continue;
    if (reserved(name)) {
      temporary = true;
      detail::sweep(dirfd(stream), item->d_name);
      continue;
    }
    if (item->d_type != DT_REG && item->d_type != DT_DIR && item->d_type != DT_UNKNOWN) continue;
    batch.items.push_back(
        {.name = std::string(name), .kind = item->d_type == DT_REG ? Kind::file : Kind::unknown});
  }
  return batch;
}

// Takes over what is known of a name, but for the name itself, by which another thread may be
// sorting. known: sorted.
void carry_over(const std::vector<Listing::Item>& known, Listing::Item& item) {
  const auto at = std::ranges::lower_bound(known, item.name, {}, &Listing::Item::name);
  if (at == known.end() || at->name != item.name || at->kind != item.kind) return;
  item.inode = at->inode;
  item.changed = at->changed;
  item.settled = at->settled;
  item.weight = at->weight;
  item.info = at->info;
}

// The first eight bytes, as a number that compares as they do.
std::uint64_t start_of(std::string_view name) {
  std::uint64_t start = 0;
  for (std::size_t i = 0; i < sizeof(start); ++i) {
    start = start << 8 | (i < name.size() ? static_cast<unsigned char>(name[i]) : 0U);
  }
  return start;
}

template <class F>
int errnum_of(F&& work) {
  try {
    work();
  } catch (const std::bad_alloc&) {
    return ENOMEM;
  } catch (const Error& error) {
    return error.errnum();
  }
  return 0;
}

// Reads a directory while other threads look at what has been read. Returns all, by name.
// temporary: as for read_names().
std::vector<Listing::Item> read_items(int dirfd, std::string_view prefix, bool& temporary,
                                      std::vector<struct stat>* stats,
                                      const std::function<void(int dirfd, Batch&)>& look_at) {
  Stream stream = open_stream(dirfd, prefix);  // until all has been read
  Batches batches;
  const auto add = [&] {
    Batch batch = read_names(stream.get(), prefix, temporary);
    if (batch.items.size() < Batch::size) stream.reset();
    if (!batch.items.empty()) batches.add(std::move(batch));
  };
  add();
  // As many as can be looked at at once.
  const std::uint64_t threads = stream ? detail::max_threads() : 1;
  while (stream && batches.all().size() < threads) add();

  struct Place {
    std::uint64_t start;  // of the name, which decides mostly
    Batch* batch;
    std::size_t i;
  };
  std::vector<Place> order;
  const auto before = [](const Place& a, const Place& b) {
    return a.start != b.start ? a.start < b.start
                              : a.batch->items[a.i].name < b.batch->items[b.i].name;
  };
  const auto read_and_sort = [&] {
    while (stream) add();
    batches.end();
    order.reserve(batches.all().size() * Batch::size);
    for (Batch& batch : batches.all()) {
      for (std::size_t i = 0; i < batch.items.size(); ++i) {
        order.push_back({start_of(batch.items[i].name), &batch, i});
      }
    }
    std::ranges::sort(order, before);
  };
  const auto work = [&](std::uint64_t number, std::uint64_t /*one*/) {
    // However it ends, nobody is to wait for what will not come.
    const std::unique_ptr<Batches, void (*)(Batches*)> end(&batches,
                                                           [](Batches* all) { all->end(); });
    return errnum_of([&] {
      if (number == 0) read_and_sort();
      // To open files in it counts its users, for which threads that share it wait for each other.
      const FileDescriptor own =
          number == 0 ? FileDescriptor() : open_beneath(dirfd, ".", O_PATH | O_DIRECTORY);
      while (Batch* const batch = batches.next()) look_at(own ? own.get() : dirfd, *batch);
    });
  };
  if (const int error = detail::in_pieces(batches.all().size(), 1, work, {}, threads); error != 0) {
    throw Error(error, prefix);
  }

  std::vector<Listing::Item> items;
  items.reserve(order.size());
  for (const auto& [start, batch, i] : order) {
    // While others rename, the kernel may tell a name more than once.
    if (!items.empty() && items.back().name == batch->items[i].name) continue;
    items.push_back(std::move(batch->items[i]));
    if (stats != nullptr) stats->push_back(batch->stats[i]);
  }
  return items;
}

// Calls task(i) for 0 to count, by several threads where that is worth it.
void for_each(std::size_t count, std::string_view prefix,
              const std::function<void(std::size_t)>& task) {
  constexpr std::uint64_t piece = 500;  // some of them take as long as to start a thread
  const auto some = [&](std::uint64_t from, std::uint64_t length) {
    return errnum_of([&] {
      for (std::uint64_t i = from; i < from + length; ++i) task(i);
    });
  };
  if (const int error = detail::in_pieces(count, piece, some, {}); error != 0) {
    throw Error(error, prefix);
  }
}

// Where that of an item goes; if none are wanted, where it does not matter.
struct stat& stat_of(std::vector<struct stat>* stats, std::size_t i) {
  thread_local struct stat unwanted;
  return stats != nullptr ? (*stats)[i] : unwanted;
}

// What the directory holds now: at what is known of it a look by fstatat(2) will do. stats: of the
// items that are shown, if wanted.
std::shared_ptr<const Listing> look(int dirfd, std::string_view prefix,
                                    std::vector<struct stat>* stats) {
  // Before the look, so that what happens meanwhile has later times.
  timespec now{};
  clock_gettime(CLOCK_REALTIME_COARSE, &now);
  struct stat st;
  if (fstat(dirfd, &st) != 0) throw Error(errno, prefix);
  const dev_t device = st.st_dev;
  const Listings::Key key{device, st.st_ino, credentials()};
  std::shared_ptr<const Listing> known = known_listing(key);
  const bool same_names = known->changed && same(*known->changed, st.st_ctim);
  std::shared_ptr<Listing> read;
  if (!same_names) {
    read = std::make_shared<Listing>();
    const auto look_at = [&](int at, Batch& batch) {
      std::vector<struct stat>* const wanted = stats != nullptr ? &batch.stats : nullptr;
      if (wanted != nullptr) wanted->resize(batch.items.size());
      for (std::size_t i = 0; i < batch.items.size(); ++i) {
        struct stat& found = stat_of(wanted, i);
        Listing::Item& item = batch.items[i];
        carry_over(known->items, item);
        if (!unchanged(at, device, prefix, item, found)) {
          read_item(at, device, prefix, now, item, found);
        }
      }
    };
    bool temporary = false;
    read->items = read_items(dirfd, prefix, temporary, stats, look_at);
    // While something is left to be swept, it has to be looked for.
    if (!temporary && detail::settled(st.st_ctim, now)) read->changed = st.st_ctim;
  } else {
    const std::size_t count = known->items.size();
    if (stats != nullptr) stats->resize(count);
    std::vector<char> stale(count);  // not of bool, which threads could not share
    for_each(count, prefix, [&](std::size_t i) {
      stale[i] = unchanged(dirfd, device, prefix, known->items[i], stat_of(stats, i)) ? 0 : 1;
    });
    // A file that is no array is read each time: it can become one by a store to a mapping.
    std::vector<std::pair<std::size_t, Listing::Item>> again;
    for (std::size_t i = 0; i < count; ++i) {
      if (stale[i] != 0) again.emplace_back(i, known->items[i]);
    }
    for_each(again.size(), prefix, [&](std::size_t n) {
      auto& [i, item] = again[n];
      read_item(dirfd, device, prefix, now, item, stat_of(stats, i));
    });
    const auto as_before = [&](const auto& at) {
      const Listing::Item& before = known->items[at.first];
      return !at.second.info && !before.info && at.second.kind == before.kind;
    };
    if (std::ranges::all_of(again, as_before)) return known;
    read = std::make_shared<Listing>(*known);
    for (auto& [i, item] : again) read->items[i] = std::move(item);
  }
  read->weight = 0;
  for (const Listing::Item& item : read->items) read->weight += item.weight;
  remember(key, read);
  return read;
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
  return *detail::format_header(info.dtype, info.shape, info.order);
}

Info read_info(int fd, const struct stat& st, std::string_view uri) {
  return named(uri, [&] { return read(fd, static_cast<std::uint64_t>(st.st_size), uri); });
}

std::vector<Entry> scan(int dirfd, std::string_view prefix) {
  std::vector<struct stat> stats;
  const auto listing = look(dirfd, prefix, &stats);
  std::vector<Entry> entries;
  entries.reserve(stats.size());
  for (std::size_t i = 0; i < stats.size(); ++i) {
    const Listing::Item& item = listing->items[i];
    if (item.shown()) entries.push_back({.name = item.name, .st = stats[i], .info = item.info});
  }
  return entries;
}

void detail::scan_infos(int dirfd, std::string_view prefix,
                        std::vector<std::shared_ptr<const Info>>& arrays,
                        std::vector<std::string>& directories) {
  const auto listing = look(dirfd, prefix, nullptr);
  arrays.reserve(arrays.size() + listing->items.size());
  for (const Listing::Item& item : listing->items) {
    if (item.info) {
      arrays.push_back(item.info);
    } else if (item.shown()) {
      directories.push_back(item.name);
    }
  }
}

std::optional<Entry> inspect(int dirfd, const std::string& name, std::string_view prefix) {
  struct stat st;
  if (fstat(dirfd, &st) != 0) throw Error(errno, prefix);
  Listing::Item item{.name = name};
  Entry entry{.name = name, .st = {}, .info = {}};
  if (!read_item(dirfd, st.st_dev, prefix, {}, item, entry.st)) return {};
  entry.info = std::move(item.info);
  return entry;
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

void Draft::resize(std::uint64_t size) { state_->staging.resize(size, false); }

void Draft::check_space(std::uint64_t size) { state_->staging.check_space(size); }

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
    throw FormatError(uri, detail::formatted("too long: {} of {} need {} bytes, the file has {}",
                                             shape_text(info.shape), info.dtype.descr(),
                                             info.offset + info.nbytes, size));
  }
  return info;
}

void Draft::reserve(const Info& info) {
  const std::uint64_t size = info.offset + info.nbytes;
  const off_t hole = lseek(fd(), 0, SEEK_HOLE);
  // A file system that knows no holes says EINVAL, one without any the size.
  const bool whole = hole >= 0 && static_cast<std::uint64_t>(hole) >= size;
  const auto now = [&] {
    struct stat st;
    if (fstat(fd(), &st) != 0) throw Error(errno, state_->name.given());
    return st;
  };
  const struct stat before = now();
  if (!whole) state_->staging.resize(size, true);
  state_->staging.trim(now(), size);
  // Whoever has written it may have set that, as cp -p does. Without it the array is one, too.
  const timespec times[] = {{.tv_sec = 0, .tv_nsec = UTIME_OMIT}, before.st_mtim};
  if (!same(now().st_mtim, before.st_mtim)) futimens(fd(), times);
}

void Draft::publish(int dirfd, const std::string& name, bool replace) {
  state_->staging.publish(state_->place(dirfd, name), replace);
}

}  // namespace sharr
