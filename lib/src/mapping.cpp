#include "mapping.hpp"

#include <sys/mman.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstdint>
#include <mutex>
#include <unordered_map>
#include <unordered_set>
#include <utility>

namespace sharr::detail {
namespace {

struct Key {
  Identity identity;
  bool writable;
  bool operator==(const Key&) const = default;
};

struct Hash {
  std::size_t operator()(const Identity& identity) const noexcept {
    return static_cast<std::size_t>(identity.inode) * 2 + static_cast<std::size_t>(identity.birth);
  }
  std::size_t operator()(const Key& key) const noexcept {
    return (*this)(key.identity) + static_cast<std::size_t>(key.writable);
  }
};

struct File {
  Info info;
  timespec changed;  // its ctime
};

// When this process has opened what it has mapped: by which name, at which ctime, and as whom.
struct Opening {
  std::string uri;
  timespec changed = {};
  uid_t uid = 0;
  gid_t gid = 0;
};

struct Mapped {
  std::weak_ptr<const Mapping> mapping;
  Opening opening = {};  // without a name: none is known
};

// All guarded by memory_mutex().
auto& files() {
  static auto& files = *new std::unordered_map<Identity, File, Hash>;
  return files;
}

// Outlives whatever arrays are left when the process ends.
auto& mappings() {
  static auto& mappings = *new std::unordered_map<Key, Mapped, Hash>;
  return mappings;
}

// Of the openings, of those to read and of those to write.
auto& opened_names(bool writable) {
  static auto& names = *new std::array<std::unordered_set<std::string>, 2>;
  return names[writable ? 1 : 0];
}

// See memory_mutex().
[[maybe_unused]] const auto& first_files = files();
[[maybe_unused]] const auto& first_mappings = mappings();
[[maybe_unused]] const auto& first_names = opened_names(false);

// What this process has of the object in that mode; null where nothing is to be found.
Mapped* mapped(const Identity& identity, Mode mode) {
  if (mode == Mode::copy_on_write || identity.birth == 0) return nullptr;
  const auto found = mappings().find({identity, mode == Mode::read_write});
  return found == mappings().end() ? nullptr : &found->second;
}

}  // namespace

std::shared_ptr<const Mapping> Mapping::make(int fd, const Info& info, const Identity& identity,
                                             Mode mode, std::string_view name) {
  std::shared_ptr<Mapping> mapping(new Mapping(identity, mode));
  const std::uint64_t length = info.offset + info.nbytes;
  if (length == 0) {
    // An empty object of SharedArray: there is nothing to map, and data() must not be null.
    alignas(16) static std::byte nothing[16];
    mapping->base_ = nothing;
    return mapping;
  }
  if (length > SIZE_MAX) throw Error(ENOMEM, name);
  const int protection = mode == Mode::read ? PROT_READ : PROT_READ | PROT_WRITE;
  const int flags = mode == Mode::copy_on_write ? MAP_PRIVATE : MAP_SHARED;
  void* const base = mmap(nullptr, length, protection, flags, fd, 0);
  if (base == MAP_FAILED) {
    if (errno == ENODEV) {
      throw Error(ENODEV, name,
                  "cannot be mapped: its file system has no shared mappings (a sharrfs mount "
                  "without passthrough?)");
    }
    throw Error(errno, name);
  }
  mapping->base_ = static_cast<std::byte*>(base);
  mapping->length_ = length;
  if (mode != Mode::copy_on_write && identity.birth != 0) {
    std::shared_ptr<const Mapping> other;  // which takes the lock when it ends
    const std::lock_guard lock(memory_mutex());
    Mapped& found = mappings()[{identity, mode == Mode::read_write}];
    // Another thread may have been first. One that is shorter is of when the array was smaller.
    other = found.mapping.lock();
    if (other && other->length() >= length) return other;
    found.mapping = mapping;
    mapping->shared_ = true;
  }
  return mapping;
}

std::shared_ptr<const Mapping> Mapping::find(const Identity& identity, Mode mode) {
  const std::lock_guard lock(memory_mutex());
  const Mapped* const found = mapped(identity, mode);
  return found != nullptr ? found->mapping.lock() : nullptr;
}

void Mapping::note_opened(const std::string& uri, const Stat& stat, Mode mode) {
  Opening opening{.uri = uri, .changed = stat.st.st_ctim, .uid = geteuid(), .gid = getegid()};
  const std::lock_guard lock(memory_mutex());
  Mapped* const found = mapped(stat.identity, mode);
  if (found == nullptr) return;
  auto& names = opened_names(mode == Mode::read_write);
  names.insert(uri);
  if (found->opening.uri != uri) names.erase(found->opening.uri);
  found->opening = std::move(opening);
}

bool Mapping::opened(const std::string& uri, Mode mode) {
  if (mode == Mode::copy_on_write) return false;
  const std::lock_guard lock(memory_mutex());
  return opened_names(mode == Mode::read_write).contains(uri);
}

std::shared_ptr<const Mapping> Mapping::find_opened(const Stat& stat, Mode mode) {
  const std::lock_guard lock(memory_mutex());
  const Mapped* const found = mapped(stat.identity, mode);
  if (found == nullptr) return {};
  const Opening& opening = found->opening;
  if (opening.uri.empty() || !same(opening.changed, stat.st.st_ctim) || opening.uid != geteuid() ||
      opening.gid != getegid()) {
    return {};
  }
  return found->mapping.lock();
}

bool Mapping::exists(const Identity& identity) {
  const std::lock_guard lock(memory_mutex());
  return mappings().contains({identity, false}) || mappings().contains({identity, true});
}

bool Mapping::any() {
  const std::lock_guard lock(memory_mutex());
  return !mappings().empty();
}

Mapping::~Mapping() {
  if (shared_) {
    const std::lock_guard lock(memory_mutex());
    const auto found = mappings().find({identity_, mode_ == Mode::read_write});
    // Another may have taken its place since.
    if (found != mappings().end() && found->second.mapping.expired()) {
      opened_names(mode_ == Mode::read_write).erase(found->second.opening.uri);
      mappings().erase(found);
    }
  }
  if (length_ > 0) munmap(base_, length_);
}

std::optional<Info> known(const Stat& stat) {
  const std::lock_guard lock(memory_mutex());
  const auto found = files().find(stat.identity);
  if (found == files().end()) return {};
  const auto& [info, changed] = found->second;
  if (!same(changed, stat.st.st_ctim) ||
      info.offset + info.nbytes > static_cast<std::uint64_t>(stat.st.st_size)) {
    return {};
  }
  return info;
}

void remember(const Info& info, const Stat& stat, const timespec& now) {
  // Some 300 bytes each, but that a dtype can have any number of fields.
  constexpr std::size_t longest = 200;
  if (stat.identity.birth == 0 || !settled(stat.st.st_ctim, now) ||
      info.dtype.descr().size() > longest) {
    return;
  }
  File file{info, stat.st.st_ctim};
  file.info.name = {};
  const std::lock_guard lock(memory_mutex());
  // Who goes through more than this comes to none again soon.
  constexpr std::size_t most = 1000;
  if (files().size() >= most && !files().contains(stat.identity)) files().clear();
  files().insert_or_assign(stat.identity, std::move(file));
}

}  // namespace sharr::detail
