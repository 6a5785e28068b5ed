// FUSE passthrough: the kernel reads, writes and maps the backing file itself.
//
// libfuse has it since 3.17; for earlier ones this file speaks the kernel's protocol past libfuse.
// The source of the protocol is Linux's include/uapi/linux/fuse.h, 7.40 and later.
#pragma once

#include <fuse_lowlevel.h>

namespace sharrfs::passthrough {

// To be called after fuse_session_mount() and before the loop. Returns 0 or -errno.
int prepare(fuse_session* session);

// To be called in init: asks for passthrough where the kernel has it, and to be spared the question
// for security.capability before every write.
void enable(fuse_conn_info* conn);

// Registers the file open as fd with the kernel, which keeps it. Returns the backing id, or 0 where
// the daemon may not (it takes CAP_SYS_ADMIN in the first user namespace) or the backing file
// system cannot, with errno set.
int open(fuse_session* session, int fd) noexcept;
void close(fuse_session* session, int backing_id) noexcept;

// fuse_reply_open() and fuse_reply_create() for a file whose reads, writes and mappings go to
// backing_id.
int reply_open(fuse_req_t request, fuse_file_info* file, int backing_id);
int reply_create(fuse_req_t request, const fuse_entry_param& entry, fuse_file_info* file,
                 int backing_id);

}  // namespace sharrfs::passthrough
