#include "mapping.hpp"

#include <sys/mman.h>

#include <cerrno>
#include <cstdint>
#include <mutex>
#include <unordered_map>
#include <utility>

namespace sharr::detail {
namespace {

struct Key {
  Identity identity;
  bool writable;
  bool operator==(const Key&) const = default;
};

struct Hash {
  std::size_t operator()(const Key& key) const noexcept {
    const auto inode = static_cast<std::size_t>(key.identity.inode);
    return inode * 2 + static_cast<std::size_t>(key.writable) +
           static_cast<std::size_t>(key.identity.birth);
  }
};

// Guarded by memory_mutex(). Outlives whatever arrays are left when the process ends.
auto& mappings() {
  static auto& mappings = *new std::unordered_map<Key, std::weak_ptr<const Mapping>, Hash>;
  return mappings;
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
    const std::lock_guard lock(memory_mutex());
    mappings()[{identity, mode == Mode::read_write}] = mapping;
    mapping->shared_ = true;
  }
  return mapping;
}

std::shared_ptr<const Mapping> Mapping::find(const Identity& identity, Mode mode) {
  if (mode == Mode::copy_on_write || identity.birth == 0) return {};
  const std::lock_guard lock(memory_mutex());
  const auto found = mappings().find({identity, mode == Mode::read_write});
  return found == mappings().end() ? nullptr : found->second.lock();
}

Mapping::~Mapping() {
  if (shared_) {
    const std::lock_guard lock(memory_mutex());
    const auto found = mappings().find({identity_, mode_ == Mode::read_write});
    // Another may have taken its place since.
    if (found != mappings().end() && found->second.expired()) mappings().erase(found);
  }
  if (length_ > 0) munmap(base_, length_);
}

std::optional<Info> Mapping::info(const Stat& stat) const {
  const std::lock_guard lock(memory_mutex());
  const timespec& changed = stat.st.st_ctim;
  if (!info_ || changed.tv_sec != changed_.tv_sec || changed.tv_nsec != changed_.tv_nsec ||
      info_->offset + info_->nbytes > static_cast<std::uint64_t>(stat.st.st_size)) {
    return {};
  }
  return info_;
}

void Mapping::remember(const Info& info, const Stat& stat, const timespec& now) const {
  const std::lock_guard lock(memory_mutex());
  info_.reset();
  if (!settled(stat.st.st_ctim, now)) return;
  info_ = info;
  changed_ = stat.st.st_ctim;
}

}  // namespace sharr::detail
