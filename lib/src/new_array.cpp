// The making of an array: create, put, and what is published later.
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <utility>

#include "access.hpp"
#include "format.hpp"
#include "literal.hpp"
#include "memory.hpp"
#include "npy.hpp"
#include "system.hpp"

namespace sharr {
namespace {

using detail::Pages;
using detail::ParseError;

bool one_order(const Shape& shape) {
  return std::ranges::count_if(shape, [](std::int64_t extent) { return extent != 1; }) <= 1 ||
         std::ranges::find(shape, 0) != shape.end();
}

// As options has it. of_file: as the file system gives them to whoever writes.
Pages pages_of(const CreateOptions& options, std::uint64_t size, int fd, const Name& name) {
  const bool demanded = options.huge.value_or(false);
  if (demanded && !options.reserve) {
    throw ArgumentError(name.given(), "huge pages are taken when the memory is reserved");
  }
  const std::uint64_t least = options.huge
                                  ? detail::huge_page_size()
                                  : std::max(detail::huge_page_size(), detail::huge_threshold);
  const bool large = options.reserve && size >= least;
  if (!large && !demanded) return Pages::of_file;
  if (!detail::gives_huge_pages(detail::stat_file(fd, name.given()).st.st_dev)) {
    if (!demanded) return Pages::of_file;
    throw Error(
        EOPNOTSUPP, name.given(),
        detail::formatted("no huge pages there; root can allow them{}",
                          name.shm() ? ": mount -o remount,huge=advise /dev/shm"
                                     : " where it is a tmpfs, with the mount option huge=advise"));
  }
  if (!large) return Pages::of_file;
  return options.huge.value_or(true) ? Pages::huge : Pages::small;
}

}  // namespace

NewArray::State::State(const Name& given, const Shape& shape, const Dtype& dtype,
                       const CreateOptions& options, std::optional<detail::Place> directory,
                       const void* elements)
    : name(directory ? given : detail::behind_mount(given)), replace(options.replace) {
  std::shared_ptr<const std::string> made;
  std::uint64_t nbytes = 0;
  try {
    nbytes = detail::data_size(shape, dtype.itemsize());
    made = detail::format_header(dtype, shape, options.order);
  } catch (const ParseError& error) {
    throw ArgumentError(name.given(), error.what());
  }
  const std::string& header = *made;
  const std::uint64_t size = header.size() + nbytes;
  if (directory) {
    staging.emplace(name, *std::move(directory), detail::creation_mode, size);
  } else {
    // Where it has a name already, nobody is to read it who may not read the old one.
    const bool old = replace && detail::rights_of_array(name);
    staging.emplace(name, size, replace, old ? mode_t{0600} : detail::creation_mode);
  }
  const Pages pages = pages_of(options, size, staging->fd(), name);
  // By take(), once it is mapped.
  const bool taken =
      pages != Pages::of_file || (elements != nullptr && size >= detail::huge_threshold);
  const bool whole = !taken && options.reserve && write_whole(header, nbytes, elements);
  if (taken) {
    staging->check_space(size);
  } else if (!whole) {
    staging->allocate(options.reserve ? size : header.size(), options.on_signal);
  }
  const detail::Stat stat = detail::stat_file(staging->fd(), name.given());
  staging->trim(stat.st, options.reserve ? size : header.size());
  Info info{.name = given.uri(),
            .dtype = dtype,
            .shape = shape,
            .order = options.order,
            .offset = header.size(),
            .nbytes = nbytes,
            .format = std::string("NPY ") + static_cast<char>('0' + header[6]) + ".0"};
  array = ArrayAccess::map(std::move(info), stat.identity, Mode::read_write, staging->fd(),
                           name.given());
  auto* const data = static_cast<std::byte*>(array->data());
  if (whole) return;
  if (taken) {
    take(data - header.size(), header.size(), size, pages, elements, options.on_signal);
  } else if (elements != nullptr && nbytes > 0) {
    if (const int failed = detail::readable(elements, nbytes); failed != 0) fail(failed);
    std::memcpy(data, elements, nbytes);
  }
  // Not through the mapping, which would take a fault for a page that nobody touches again.
  staging->write(header.data(), header.size(), 0);
}

// In memory, where to write a page is to take it, a small array is written at once, which spares a
// call that takes it and a fault for each page of the elements. False where that is no gain.
bool NewArray::State::write_whole(const std::string& header, std::uint64_t nbytes,
                                  const void* elements) {
  static const std::array<std::byte, 16 << 10> zeros{};  // more are had quicker otherwise
  if (elements == nullptr && nbytes > zeros.size()) return false;
  if (!name.shm() && !staging->in_memory()) return false;
  const void* const data = elements != nullptr ? elements : zeros.data();
  if (const int failed = staging->try_write(header, data, nbytes); failed != 0) fail(failed);
  return true;
}

// Takes the memory, and copies the elements, if there are any. As the file system gives it, it is
// had quickest by writing them to the file: pages that are written whole are not zeroed before, nor
// is there a fault for each. But the file's lock lets one thread do so at a time. The others, and
// all where the pages are to be huge or small ones, take it through the mapping, and copy while
// what was taken is in the cache.
void NewArray::State::take(std::byte* base, std::size_t header, std::uint64_t size, Pages pages,
                           const void* elements, const std::function<void()>& on_signal) {
  const bool written = pages == Pages::of_file;
  const std::uint64_t page =
      pages == Pages::huge ? detail::huge_page_size() : std::uint64_t{2} << 20;
  const std::uint64_t whole = pages == Pages::huge ? size / page * page : 0;
  if (!written && ((whole > 0 && madvise(base, whole, MADV_HUGEPAGE) != 0) ||
                   (whole < size && madvise(base + whole, size - whole, MADV_NOHUGEPAGE) != 0))) {
    detail::throw_errno(name);
  }
  // Not before: after mlockall(MCL_FUTURE) to map what is there is to take it, in pages of any
  // size.
  staging->extend(size);
  const auto* const source = static_cast<const std::byte*>(elements);
  const auto write = [&](std::uint64_t from, std::uint64_t length) {
    const std::uint64_t start = std::max<std::uint64_t>(from, header);
    return staging->try_write(source + (start - header), from + length - start, start);
  };
  const auto copy = [&](std::uint64_t from, std::uint64_t length) {
    std::uint64_t at = std::max<std::uint64_t>(from, header);
    const std::uint64_t end = from + length;
    if (elements == nullptr || at >= end) return 0;
    if (const int failed = detail::readable(source + (at - header), end - at)) return failed;
    // More at once than fits a core's own cache the C library copies in a slower way.
    constexpr std::uint64_t piece = std::uint64_t{128} << 10;
    for (; at < end; at += piece) {
      std::memcpy(base + at, source + (at - header), std::min(piece, end - at));
    }
    return 0;
  };
  std::atomic<bool> writing = false;
  const auto piece = [&](std::uint64_t from, std::uint64_t length) {
    if (written && !writing.exchange(true)) {
      const int failed = write(from, length);
      writing = false;
      return failed;
    }
    for (std::uint64_t done = 0; done < length; done += page) {
      const std::uint64_t step = std::min(page, length - done);
      int failed = detail::populate(base + from + done, step);
      if (failed == EINVAL && written) return write(from, length);  // an older kernel
      if (failed == 0) failed = copy(from + done, step);
      if (failed != 0) return failed;
    }
    return 0;
  };
  const std::uint64_t least = std::uint64_t{pages == Pages::huge ? 16U : 4U} << 20;
  const bool several = !written || staging->in_memory();
  const int error = detail::in_pieces(size, std::max(page, detail::piece_of(size, least)), piece,
                                      on_signal, several ? 0 : 1);
  if (error == EINVAL && !written) {  // an older kernel
    staging->allocate(size, on_signal);
    if (const int failed = copy(0, size); failed != 0) fail(failed);
  } else if (error != 0) {
    fail(error);
  }
}

void NewArray::State::fail(int errnum) const {
  if (errnum == ENOSPC || errnum == EDQUOT) staging->throw_no_space(errnum);
  if (errnum != EFAULT) throw Error(errnum, name.given());
  throw Error(EFAULT, name.given(),
              "what is to be copied cannot be read: a mapped file that has been cut short, or an "
              "array without the memory for it?");
}

NewArray::NewArray(std::unique_ptr<State> state) noexcept : state_(std::move(state)) {}
NewArray::NewArray(NewArray&& other) noexcept = default;
NewArray::~NewArray() = default;

NewArray::NewArray(const Name& name, const Shape& shape, const Dtype& dtype,
                   const CreateOptions& options) {
  if (!options.replace) check(name, false);
  state_ = std::make_unique<State>(name.absolute(), shape, dtype, options);
}

void NewArray::check(const Name& name, bool replace) {
  struct stat st;
  if (replace) {
    detail::rights_of_array(name);
  } else if (lstat(name.path().c_str(), &st) == 0) {
    throw Error(EEXIST, name.given());
  }
}

Array NewArray::take() {
  if (!state_->array) throw Error(EINVAL, state_->name.given(), "the array was taken before");
  Array array = *std::move(state_->array);
  state_->array.reset();
  return array;
}

void NewArray::publish() {
  for (int tries = 0;; ++tries) {
    // Who could not read the old one cannot read the new one either.
    const auto old = state_->replace ? detail::rights_of_array(state_->name) : std::nullopt;
    if (old) inherit(*old, state_->staging->fd(), state_->name.given());
    try {
      return state_->staging->publish(old.has_value());
    } catch (const Error& error) {
      // Something has come since the look, which may be no array, or a private one.
      const bool again = state_->replace && !old && error.errnum() == EEXIST;
      if (!again || tries == detail::max_tries) throw;
    }
  }
}

Array put(const Name& name, const Shape& shape, const Dtype& dtype, const void* elements,
          const CreateOptions& options) {
  if (!options.reserve || options.exist_ok) {
    throw ArgumentError(name.given(), "put() takes neither exist_ok nor reserve = false");
  }
  if (!options.replace) NewArray::check(name, false);
  NewArray made(
      std::make_unique<NewArray::State>(name, shape, dtype, options, std::nullopt, elements));
  made.publish();
  return made.take();
}

Array create(const Name& name, const Shape& shape, const Dtype& dtype,
             const CreateOptions& options) {
  const auto make = [&] {
    NewArray made(std::make_unique<NewArray::State>(name, shape, dtype, options));
    made.publish();
    return made.take();
  };
  if (!options.exist_ok) return make();
  for (int tries = 0;; ++tries) {
    try {
      Array array = attach(name);
      const Info& info = array.info();
      if (info.shape != shape || info.dtype != dtype ||
          (info.order != options.order && !one_order(shape))) {
        throw Error(
            EEXIST, name.given(),
            detail::formatted("exists with shape {}, dtype {}, order {}", shape_text(info.shape),
                              info.dtype.str(), static_cast<char>(info.order)));
      }
      return array;
    } catch (const Error& error) {
      if (error.errnum() != ENOENT) throw;
    }
    // Something may be there all the same, and for ever: a symbolic link to nothing, or what a
    // mount does not show.
    const Name behind = detail::behind_mount(name);
    struct stat st;
    if (lstat(behind.path().c_str(), &st) == 0) {
      detail::rights_of_array(behind);
      if (tries == detail::max_tries) throw Error(EEXIST, name.given());
    } else {
      try {
        return make();
      } catch (const Error& error) {
        // Somebody was quicker, and theirs is as good.
        if (error.errnum() != EEXIST || tries == detail::max_tries) throw;
      }
    }
    if (options.on_signal) options.on_signal();
  }
}

}  // namespace sharr
