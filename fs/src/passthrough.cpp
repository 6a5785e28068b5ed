#include "passthrough.hpp"

#include <sys/ioctl.h>
#include <sys/uio.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstdint>
#include <cstring>

namespace sharrfs::passthrough {
namespace {

// Debian 12's linux/fuse.h has neither.
struct BackingMap {
  std::int32_t fd;
  std::uint32_t flags;
  std::uint64_t padding;
};
constexpr unsigned long backing_open = _IOW(229, 1, BackingMap);
constexpr unsigned long backing_close = _IOW(229, 2, std::uint32_t);

// Layers of file systems, this one included: 2 is what Linux allows, and lets the source be on an
// overlayfs.
constexpr std::uint32_t max_depth = 2;

}  // namespace

int open(fuse_session* session, int fd) noexcept {
  BackingMap map{.fd = fd, .flags = 0, .padding = 0};
  const int id = ioctl(fuse_session_fd(session), backing_open, &map);
  return id > 0 ? id : 0;
}

void close(fuse_session* session, int backing_id) noexcept {
  const auto id = static_cast<std::uint32_t>(backing_id);
  // Can only fail when the connection is gone, and the id with it.
  ioctl(fuse_session_fd(session), backing_close, &id);
}

#if FUSE_VERSION >= FUSE_MAKE_VERSION(3, 17)

int prepare(fuse_session*) { return 0; }

void enable(fuse_conn_info* conn) {
  if (fuse_set_feature_flag(conn, FUSE_CAP_PASSTHROUGH))
    conn->max_backing_stack_depth = max_depth - 1;
  fuse_set_feature_flag(conn, FUSE_CAP_HANDLE_KILLPRIV_V2);
}

int reply_open(fuse_req_t request, fuse_file_info* file, int backing_id) {
  file->backing_id = backing_id;
  return fuse_reply_open(request, file);
}

int reply_create(fuse_req_t request, const fuse_entry_param& entry, fuse_file_info* file,
                 int backing_id) {
  file->backing_id = backing_id;
  return fuse_reply_create(request, &entry, file);
}

#else

namespace {

constexpr std::uint32_t opcode_init = 26;
constexpr std::uint32_t handle_killpriv_v2 = 1U << 28;
constexpr std::uint32_t init_ext = 1U << 30;
constexpr std::uint32_t passthrough2 = 1U << 5;  // in flags2
constexpr std::uint32_t fopen_passthrough = 1U << 7;

struct InHeader {
  std::uint32_t length, opcode;
  std::uint64_t unique, nodeid;
  std::uint32_t uid, gid, pid, padding;
};
struct InitIn {
  std::uint32_t major, minor, max_readahead, flags, flags2;
};
struct OutHeader {
  std::uint32_t length;
  std::int32_t error;
  std::uint64_t unique;
};
struct InitOut {
  std::uint32_t major, minor, max_readahead, flags;
  std::uint16_t max_background, congestion_threshold;
  std::uint32_t max_write, time_gran;
  std::uint16_t max_pages, map_alignment;
  std::uint32_t flags2, max_stack_depth;
};
struct OpenOut {
  std::uint64_t fh;
  std::uint32_t open_flags;
  std::int32_t backing_id;
};

// One session a process. INIT is the first request and is answered before any other is sent.
std::atomic<std::uint64_t> init_unique{0};
std::atomic<std::uint32_t> offered{0}, offered2{0};
std::atomic<bool> wanted{false};
// What the reply that this thread is about to send is to carry.
thread_local int reply_backing_id = 0;

ssize_t read_request(int fd, void* buffer, size_t size, void*) {
  const ssize_t n = ::read(fd, buffer, size);
  if (n >= static_cast<ssize_t>(sizeof(InHeader) + sizeof(InitIn))) {
    InHeader header;
    std::memcpy(&header, buffer, sizeof(header));
    if (header.opcode == opcode_init) {
      InitIn init;
      std::memcpy(&init, static_cast<char*>(buffer) + sizeof(header), sizeof(init));
      offered = init.flags;
      offered2 = (init.flags & init_ext) != 0 ? init.flags2 : 0;
      init_unique = header.unique;
    }
  }
  return n;
}

// Adds to the reply to INIT what this libfuse does not know.
void amend_init(const iovec& body) {
  InitOut reply;
  if (body.iov_len < sizeof(reply)) return;
  std::memcpy(&reply, body.iov_base, sizeof(reply));
  if ((offered & handle_killpriv_v2) != 0) reply.flags |= handle_killpriv_v2;
  if ((offered2 & passthrough2) != 0) {
    reply.flags |= init_ext;
    reply.flags2 |= passthrough2;
    reply.max_stack_depth = max_depth;
  }
  std::memcpy(body.iov_base, &reply, sizeof(reply));
}

// Adds the backing id to the reply to OPEN or CREATE, which ends in an OpenOut.
void amend_open(const iovec& body) {
  if (body.iov_len < sizeof(OpenOut)) return;
  char* const at = static_cast<char*>(body.iov_base) + body.iov_len - sizeof(OpenOut);
  OpenOut reply;
  std::memcpy(&reply, at, sizeof(reply));
  reply.open_flags |= fopen_passthrough;
  reply.backing_id = reply_backing_id;
  std::memcpy(at, &reply, sizeof(reply));
}

ssize_t write_reply(int fd, iovec* iov, int count, void*) {
  if (reply_backing_id != 0 && count >= 2) amend_open(iov[1]);
  if (wanted && count >= 2 && iov[0].iov_len == sizeof(OutHeader)) {
    OutHeader header;
    std::memcpy(&header, iov[0].iov_base, sizeof(header));
    if (header.unique != 0 && header.unique == init_unique && header.error == 0) {
      init_unique = 0;
      amend_init(iov[1]);
    }
  }
  return ::writev(fd, iov, count);
}

}  // namespace

int prepare(fuse_session* session) {
  fuse_custom_io io{};
  io.read = read_request;
  io.writev = write_reply;
  return fuse_session_custom_io(session, &io, fuse_session_fd(session));
}

void enable(fuse_conn_info*) { wanted = true; }

int reply_open(fuse_req_t request, fuse_file_info* file, int backing_id) {
  reply_backing_id = backing_id;
  const int result = fuse_reply_open(request, file);
  reply_backing_id = 0;
  return result;
}

int reply_create(fuse_req_t request, const fuse_entry_param& entry, fuse_file_info* file,
                 int backing_id) {
  reply_backing_id = backing_id;
  const int result = fuse_reply_create(request, &entry, file);
  reply_backing_id = 0;
  return result;
}

#endif

}  // namespace sharrfs::passthrough
