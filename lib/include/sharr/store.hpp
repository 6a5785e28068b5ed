// Named arrays shared between processes: create, fill, attach, wait for, rename, delete, list.
//
// An array is a file that holds a valid NPY file whose data starts on a page boundary (FORMAT.md).
// The file system is the only registry: nothing runs in the background, and a process that dies at
// any instruction leaves nothing to repair. What the library remembers of files it looks up again
// by their inode and ctime each time; a header that is overwritten through a mapping changes
// neither.
//
// Names
//   shm://a          the file /dev/shm/a; one more leading slash is accepted, as shm_open has it
//   shm://jobs/7/a   /dev/shm/jobs/7/a: directories are namespaces
//   file:///data/a   the path /data/a;  file://rel/a  the relative path rel/a
//   a, jobs/7/a      the same as shm://a and shm://jobs/7/a
//   /data/a          the same as file:///data/a
// Empty components, "." and ".." under shm://, a NUL byte, an unknown scheme, a component under
// shm:// or a file name that begins with ".sharr-tmp-" are ArgumentErrors; an empty path is ENOENT.
// Under shm:// no symbolic link is followed and nothing but regular files is opened: /dev/shm is
// world-writable. A path is resolved as open(2) does it. A path under a sharrfs mount stands for
// the object behind it, which is mapped directly when this process can reach it.
//
// Threads: every function here may be called from any thread at any time. An Array and an Info are
// like standard containers: reading from several threads is safe, moving or destroying is not. What
// threads and processes do with the elements is theirs to agree on.
//
// Errors: see error.hpp. The errno values named below are those of the library's own checks; others
// of the system calls underneath come through as they are.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "sharr/dtype.hpp"
#include "sharr/error.hpp"

namespace sharr {

namespace detail {
class Mapping;
}

using Shape = std::vector<std::int64_t>;

// "(3, 4)", "(3,)", "()": as Python prints a tuple.
std::string shape_text(const Shape& shape);

// Of the elements in memory: last index varies fastest (C), or first (Fortran).
enum class Order : char { c = 'C', fortran = 'F' };

// As numpy.memmap has them: "r", "r+", "c".
enum class Mode {
  read,           // shared, and writing is a memory fault
  read_write,     // shared
  copy_on_write,  // writes stay in this process
};

// The name of an array or of a directory of arrays, checked and resolved to a path.
class Name {
 public:
  // Throws ArgumentError (EINVAL) for what is no name, see above; Error ENAMETOOLONG, and ENOENT for
  // an empty path.
  Name(std::string_view name);                              // NOLINT(google-explicit-constructor)
  Name(const char* name) : Name(std::string_view(name)) {}  // NOLINT(google-explicit-constructor)
  Name(const std::string& name) : Name(std::string_view(name)) {}  // NOLINT
  // A path, whatever it looks like.
  static Name from_path(std::string_view path);
  // A directory: a trailing slash and the bare scheme "shm://" are accepted too.
  static Name directory(std::string_view name);

  const std::string& given() const noexcept { return given_; }  // as the caller gave it
  const std::string& path() const noexcept { return path_; }
  bool shm() const noexcept { return shm_; }
  // The file `leaf` of a directory, under the name that was given here.
  Name moved_to(const Name& directory, std::string_view leaf) const {
    return {given_, directory.path_ + "/" + std::string(leaf), directory.shm_};
  }
  // The same name, whatever becomes the working directory. Throws Error when there is none.
  Name absolute() const;
  // "shm://jobs/7/a" or "file:///data/a".
  std::string uri() const;

 private:
  Name(std::string_view given, std::string path, bool shm)
      : given_(given), path_(std::move(path)), shm_(shm) {}
  static Name parse(std::string_view name, bool directory);

  std::string given_;
  std::string path_;
  bool shm_ = false;
};

// What an array is. Taken from its file at one moment; a value, not a view.
struct Info {
  std::string name;  // URI
  Dtype dtype;
  Shape shape;
  Order order = Order::c;
  std::uint64_t offset = 0;  // of the data in the file, in bytes
  std::uint64_t nbytes = 0;  // of the data
  std::string format;        // "NPY 1.0", "NPY 2.0", "NPY 3.0" or "SharedArray"
  // Bytes of the file in huge pages, where info() has looked; none in a process that is to have
  // none (PR_SET_THP_DISABLE).
  std::uint64_t huge = 0;

  std::uint64_t size() const noexcept;  // number of elements
};

// Which object it is: no other one has the same, at the same time or later. birth is in nanoseconds
// since 1970, 0 where the file system does not know it; inode numbers may be used again.
struct Identity {
  std::uint64_t device = 0;
  std::uint64_t inode = 0;
  std::int64_t birth = 0;

  bool operator==(const Identity&) const = default;
};

// An array in memory. Owns the mapping, not the stored object: destroying it leaves the object and
// every other attachment alone, and deleting the object leaves this array valid. Arrays of one
// object in one process share a mapping, unless they are copy_on_write: what mlock() and munlock()
// say holds for all of them.
class Array {
 public:
  Array(Array&& other) noexcept;
  Array& operator=(Array&& other) noexcept;
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;
  ~Array();

  // The first element. Page-aligned in what create() makes, anywhere in a foreign NPY file. Never
  // null, but nothing may be read or written through it when nbytes is 0.
  void* data() const noexcept { return base_ + info_.offset; }
  // The elements in memory order. The size of T must be the itemsize: EINVAL otherwise.
  template <class T>
  std::span<T> as() const {
    check_itemsize(sizeof(T));
    return {static_cast<T*>(data()), static_cast<std::size_t>(info_.size())};
  }
  const Info& info() const noexcept { return info_; }
  const Identity& identity() const noexcept { return identity_; }
  Mode mode() const noexcept { return mode_; }

  // As msync(2) with flags of MS_ASYNC, MS_SYNC and MS_INVALIDATE, mlock(2) and munlock(2), on the
  // whole array.
  void msync(int flags) const;
  void mlock() const;
  void munlock() const;

 private:
  friend struct ArrayAccess;
  Array(Info info, const Identity& identity, Mode mode,
        std::shared_ptr<const detail::Mapping> mapping) noexcept;
  void check_itemsize(std::size_t size) const;

  Info info_;
  Identity identity_;
  Mode mode_;
  std::shared_ptr<const detail::Mapping> mapping_;
  std::byte* base_;  // of the mapping, which starts at the file's first byte
};

struct CreateOptions {
  Order order = Order::c;
  // Take the memory now. Without it the object is sparse: it costs nothing until it is written, and
  // writing it when memory has run out is a SIGBUS.
  bool reserve = true;
  // Huge pages (of 2 MiB on most machines): none takes them for arrays of 4 MiB or more where the
  // mount of a tmpfs gives them (huge=advise, within_size, always), true for smaller ones too, and
  // is an error where it does not (EOPNOTSUPP), false never. Only whole ones are taken, the rest in
  // small pages, so that nothing is wasted; where memory is too fragmented the kernel gives small
  // ones instead, see Info::huge. Of what is not reserved the mount decides when it is written.
  std::optional<bool> huge = {};
  // Return the existing array when its shape, dtype and order agree.
  bool exist_ok = false;
  // Take the name of an existing array, in one step and with its mode, ACL and, as far as this
  // process may give files away, owner; where the group cannot be kept, without the ACL, and the new
  // group and others may do what both could. Those attached to it keep it. What is no array is not
  // replaced. So says a look just before: what another process puts there between that and the
  // rename goes, whatever it is. Where there is no O_TMPFILE and the old array goes meanwhile, the new
  // one is its owner's alone.
  bool replace = false;
  // Called by the calling thread when a signal interrupts the reservation of memory, and after
  // every 64 MiB or less of a large one. May throw to give up.
  std::function<void()> on_signal = {};
};

// Makes a zeroed array and publishes it whole: nobody ever sees the name on less. Mode 0666 less
// the umask. Under shm:// missing namespaces are made; a path's directory must exist. On a sharrfs
// mount the array is made in the directory behind it, which this process must be able to reach.
//
// System calls where the file system has O_TMPFILE: open, fallocate, statx, mmap, pwrite, linkat,
// close. Under shm:// and on a tmpfs, which fstatfs tells, an array of 16 KiB or less is written by
// one pwritev, in place of fallocate and pwrite; by put() any of less than 4 MiB.
// With huge pages madvise, in as many threads as the process has processors, takes the place of
// fallocate. Three things add to them: a name in a namespace opens the directory first; an array of
// 64 MiB or more first checks that the name and the memory are there, so that it fails at once;
// where there is no O_TMPFILE a temporary name and renameat2 take its place.
//
// Throws Error EEXIST (also with exist_ok, when the existing array differs), ENOSPC (memory is not
// there; says what was needed and what is free), ENOENT, EACCES; ArgumentError EINVAL (name, a
// negative or overflowing shape, more than 64 dimensions).
Array create(const Name& name, const Shape& shape, const Dtype& dtype,
             const CreateOptions& options = {});

// An array that nobody else sees yet, to be filled. It appears when it is published; unless that
// happens it goes with this object, and when the process is killed, by itself.
class NewArray {
 public:
  // Throws as the constructor does when the name is taken, or is that of something that is not to
  // be replaced.
  static void check(const Name& name, bool replace);
  // As create(). Without options.replace a name that is taken is EEXIST already here; exist_ok does
  // not count.
  NewArray(const Name& name, const Shape& shape, const Dtype& dtype,
           const CreateOptions& options = {});
  NewArray(NewArray&& other) noexcept;
  ~NewArray();

  // The array, once. It stays valid whatever becomes of the name.
  Array take();
  // Gives it its name. Throws as create().
  void publish();

 private:
  friend class NewNamespace;
  friend Array create(const Name&, const Shape&, const Dtype&, const CreateOptions&);
  friend Array put(const Name&, const Shape&, const Dtype&, const void*, const CreateOptions&);
  struct State;
  explicit NewArray(std::unique_ptr<State> state) noexcept;
  std::unique_ptr<State> state_;
};

// Arrays that appear together, as a namespace: a directory that has all of them, or none.
class NewNamespace {
 public:
  // Throws Error EEXIST when the name is taken; under shm:// missing namespaces above are made. An
  // empty directory may have it, and gives its permissions to the namespace as an array that is
  // replaced does.
  explicit NewNamespace(const Name& directory);
  NewNamespace(NewNamespace&& other) noexcept;
  ~NewNamespace();

  // Adds an array by a name in the namespace, or in one in it ("x", "sub/x"), and returns it; with
  // elements, when they are given, as put() has them. Throws as create() and put(); EEXIST when there
  // is one of that name.
  Array add(std::string_view leaf, const Shape& shape, const Dtype& dtype,
            const CreateOptions& options = {}, const void* elements = nullptr);
  // Throws as create().
  void publish();

 private:
  struct State;
  std::unique_ptr<State> state_;
};

// Makes an array with the elements given, which are as many bytes as shape and dtype say, in memory
// order (options.order). Copied once, by several threads where that is quicker; takes what memory
// it needs as it goes, and neither exist_ok nor reserve = false (EINVAL). Otherwise as create(),
// but a name that is taken is EEXIST before anything is copied, and elements that cannot be read, as
// those of a mapped file that has been cut short, are EFAULT; cut short while they are copied, SIGBUS.
Array put(const Name& name, const Shape& shape, const Dtype& dtype, const void* elements,
          const CreateOptions& options = {});

// Maps an existing array: any valid NPY file, or an object of the SharedArray package.
// System calls: open, statx, pread, mmap, close; no pread where this process has read the file
// lately and it has not been written to by other means since, no mmap where it has the object mapped
// (a header or a SharedArray trailer that the first page does not hold takes one pread more; a path
// on a sharrfs mount looks for the object behind it). Directly in /dev/shm, where the object is
// mapped, was opened before in the same mode, and has not been changed since: statx alone, which
// finds the name and the object; who asks by geteuid and getegid. What has been taken from the
// process in other ways since (fsuid, groups, capabilities, a mount made read-only) is not seen.
//
// Throws Error ENOENT, EACCES, ELOOP (a symbolic link under shm://); FormatError EINVAL (no array,
// truncated).
Array attach(const Name& name, Mode mode = Mode::read_write);

// Attaches an array as soon as it is published, which may be now. The kernel tells (inotify); for
// paths, where it does not tell everything, a second may pass, and 50 ms where a file that has the
// name becomes an array or the user has as many inotify instances as he may. timeout: none for
// ever. on_signal is called within 100 ms of a signal, and at other times, and may throw.
// Throws Error ETIMEDOUT; as attach otherwise, except for what may still go or become an array:
// ENOENT, ENOTDIR, EISDIR, FormatError.
Array wait(const Name& name, Mode mode = Mode::read_write,
           std::optional<std::chrono::nanoseconds> timeout = {},
           const std::function<void()>& on_signal = {});

// All arrays in a directory and the directories below it: of one namespace, be it deleted and put
// again meanwhile. Sorted by name; throws as list and attach do, EACCES also for one of the arrays.
std::vector<Array> attach_all(const Name& directory, Mode mode = Mode::read_write);

// Gives an array another name on the same file system (EXDEV otherwise), in one step. Throws Error
// EEXIST when that is taken, unless by an array that is to be replaced; as remove otherwise.
void rename(const Name& from, const Name& to, bool replace = false);

// Removes the name. Attachments stay valid; the memory goes with the last of them.
// Throws as attach does: what is no array is not removed. What this process has mapped (not
// copy_on_write) is not read, so that it is removed whatever it is by now, and whoever may read it.
void remove(const Name& name);

// Removes a namespace and all arrays in it; to others it is gone in one step. Throws Error
// ENOTEMPTY when something in it is no array, which is named; ENOTDIR, EACCES.
void remove_all(const Name& directory);

// What the array is, and how much of it is in huge pages. Throws as attach does.
Info info(const Name& name);

// The arrays in a directory and the directories below it, sorted by name. What is no array or
// cannot be read is left out; other file systems mounted below are not entered. Throws Error
// ENOENT, ENOTDIR, EACCES for the directory itself; EMFILE, ENFILE, ENOMEM for what is in it, too.
std::vector<Info> list(const Name& directory = Name::directory("shm://"));

}  // namespace sharr
