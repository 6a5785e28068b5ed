// sharrfs: mounts a directory of arrays. The command line, the background, and readiness.
#include <fcntl.h>
#include <fmt/format.h>
#include <malloc.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <syslog.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "file_system.hpp"
#include "passthrough.hpp"
#include "privileges.hpp"
#include "process.hpp"

namespace sharrfs {
namespace {

constexpr const char* usage =
    "usage: sharrfs SOURCE MOUNTPOINT [options]\n"
    "\n"
    "Mounts the arrays of SOURCE (shm://, shm://jobs or file:///dir) on the directory\n"
    "MOUNTPOINT. Returns when the mount answers; 'umount MOUNTPOINT' or\n"
    "'fusermount3 -u MOUNTPOINT' ends it.\n"
    "\n"
    "    -h, --help             show this text\n"
    "    -V, --version          show the versions of sharrfs and libfuse\n"
    "    -f                     stay in the foreground, log to stderr, tell systemd when\n"
    "                           the mount answers\n"
    "    -d                     -f, and log every request\n"
    "    -s                     answer one request at a time\n"
    "    -o direct_io           do not use FUSE passthrough\n"
    "    -o allow_other         let other users in, with the rights that they have\n"
    "    -o allow_root          let root in\n"
    "    -o ro                  read only\n"
    "    -o max_threads=N       answer at most N requests at a time (10)\n"
    "    -o clone_fd            a descriptor of /dev/fuse for each thread\n"
    "\n"
    "and the options of mount(8) that are for all file systems. See sharrfs(1).\n";

struct Failure : std::runtime_error {
  using std::runtime_error::runtime_error;
};
// The command line is wrong.
struct Misuse : Failure {
  using Failure::Failure;
};

struct Options {
  std::string source;
  int direct_io = 0;
};

bool log_to_syslog = false;

// libfuse, and what is here, log by this. A line may come in pieces.
void log(fuse_log_level level, const char* format, va_list arguments) {
  thread_local std::string line;
  std::array<char, 4096> text;
  const int length = std::vsnprintf(text.data(), text.size(), format, arguments);
  if (length < 0) return;
  line.append(text.data(),
              std::min<std::size_t>(static_cast<std::size_t>(length), text.size() - 1));
  for (std::size_t end = 0; (end = line.find('\n')) != std::string::npos;) {
    const std::string whole = line.substr(0, end);
    line.erase(0, end + 1);
    if (log_to_syslog) {
      syslog(level, "%s", whole.c_str());  // the levels are syslog's
    } else {
      std::fprintf(stderr, "sharrfs: %s\n", whole.c_str());
    }
  }
}

struct Freed {
  void operator()(char* text) const { std::free(text); }
  void operator()(fuse_session* session) const { fuse_session_destroy(session); }
};

class Arguments {
 public:
  Arguments(int argc, char** argv) : args_(FUSE_ARGS_INIT(argc, argv)) {}
  Arguments(const Arguments&) = delete;
  Arguments& operator=(const Arguments&) = delete;
  ~Arguments() { fuse_opt_free_args(&args_); }
  fuse_args* get() { return &args_; }

 private:
  fuse_args args_;
};

constexpr int key_ignored = 1;

int take_source(void* data, const char* argument, int key, fuse_args*) {
  auto& options = *static_cast<Options*>(data);
  if (key == key_ignored) return 0;
  if (key != FUSE_OPT_KEY_NONOPT || !options.source.empty()) return 1;
  options.source = argument;
  return 0;
}

void add_option(char** options, const std::string& option) {
  if (fuse_opt_add_opt_escaped(options, option.c_str()) != 0) throw std::bad_alloc();
}

// What the mount is to be called, and the rules that no option may lift.
void add_mount_options(fuse_args* args, const std::string& source) {
  char* raw = nullptr;
  for (const char* option : {"default_permissions", "nosuid", "nodev", "subtype=sharrfs"}) {
    add_option(&raw, option);
  }
  add_option(&raw, "fsname=" + source);
  const std::unique_ptr<char, Freed> options(raw);
  if (fuse_opt_add_arg(args, "-o") != 0 || fuse_opt_add_arg(args, options.get()) != 0) {
    throw std::bad_alloc();
  }
}

void check_mount_point(const std::string& path, int source) {
  struct statx point {};
  // Asks whoever has mounted there, even if the kernel remembers what the answer was.
  constexpr int flags = AT_NO_AUTOMOUNT | AT_STATX_FORCE_SYNC;
  if (statx(AT_FDCWD, path.c_str(), flags, STATX_BASIC_STATS, &point) != 0) {
    if (errno == ENOTCONN || errno == ECONNABORTED) {
      throw Failure(
          fmt::format("{}: a mount whose daemon has died; 'umount {}' first", path, path));
    }
    throw Failure(fmt::format("{}: {}", path, strerror(errno)));
  }
  if (!S_ISDIR(point.stx_mode)) throw Failure(path + ": not a directory");
  struct stat mounted;
  struct stat behind;
  if (stat(path.c_str(), &mounted) == 0 && fstat(source, &behind) == 0 &&
      mounted.st_dev == behind.st_dev && mounted.st_ino == behind.st_ino) {
    throw Failure(path + ": is the source itself");
  }
  if ((point.stx_attributes & STATX_ATTR_MOUNT_ROOT) != 0) {
    throw Failure(path + ": busy, something is mounted there already");
  }
  if (access("/dev/fuse", F_OK) != 0) {
    throw Failure(fmt::format("/dev/fuse: {}; is the kernel module fuse loaded?", strerror(errno)));
  }
}

// Another process that looks whether the mount answers. The daemon must not do so itself: killed
// while it waits for its own answer it could not die, and the mount would hang for everybody.
class Watcher {
 public:
  // In the background the waiting parent is the watcher, and the daemon its child; in the
  // foreground it is the other way round. Returns in the daemon only.
  Watcher(const std::string& point, bool background) : background_(background) {
    int ends[2];
    if (pipe2(ends, O_CLOEXEC) != 0) throw Failure(fmt::format("pipe: {}", strerror(errno)));
    sharr::FileDescriptor read_end(ends[0]);
    mounted_ = sharr::FileDescriptor(ends[1]);
    std::fflush(nullptr);
    const pid_t child = fork();
    if (child < 0) throw Failure(fmt::format("fork: {}", strerror(errno)));
    if ((child > 0) == background) {
      mounted_ = sharr::FileDescriptor();
      _exit(watch(read_end.get(), point, background ? child : 0));
    }
    if (background) {
      setsid();
    } else {
      watcher_ = child;
    }
  }

  // Tells the watcher to look.
  void mounted() {
    if (background_) {
      const sharr::FileDescriptor null(open("/dev/null", O_RDWR | O_CLOEXEC));
      for (const int fd : {0, 1, 2}) {
        if (null) dup2(null.get(), fd);
      }
      if (chdir("/") != 0) throw Failure(fmt::format("/: {}", strerror(errno)));
      openlog("sharrfs", LOG_PID, LOG_DAEMON);
      log_to_syslog = true;
    }
    // It may have been killed: the mount stands all the same.
    if (write(mounted_.get(), "m", 1) != 1) fuse_log(FUSE_LOG_WARNING, "nobody waits\n");
    mounted_ = sharr::FileDescriptor();
  }

  // In the foreground: waits until it has looked; false when the mount does not answer.
  bool answers() const {
    int status = 0;
    while (waitpid(watcher_, &status, 0) < 0 && errno == EINTR) {
    }
    return WIFEXITED(status) && WEXITSTATUS(status) == 0;
  }

 private:
  static int watch(int mounted, const std::string& point, pid_t daemon) {
    char word = 0;
    while (read(mounted, &word, 1) < 0 && errno == EINTR) {
    }
    struct stat st;
    if (word == 'm') {
      if (stat(point.c_str(), &st) == 0) return 0;
      std::fprintf(stderr, "sharrfs: %s: does not answer: %s\n", point.c_str(), strerror(errno));
    }
    // Without the word the daemon has said on stderr what is wrong, if it could.
    int status = 0;
    if (daemon <= 0 || waitpid(daemon, &status, 0) != daemon) return 1;
    if (WIFSIGNALED(status)) {
      std::fprintf(stderr, "sharrfs: %s: killed at start by signal %d; try 'umount %s'\n",
                   point.c_str(), WTERMSIG(status), point.c_str());
    }
    return WIFEXITED(status) && WEXITSTATUS(status) != 0 ? WEXITSTATUS(status) : 1;
  }

  bool background_;
  pid_t watcher_ = 0;
  sharr::FileDescriptor mounted_;
};

// Tells systemd, or whoever else listens at $NOTIFY_SOCKET, see sd_notify(3).
void notify(const std::string& state) {
  const char* const path = std::getenv("NOTIFY_SOCKET");
  if (path == nullptr || (path[0] != '/' && path[0] != '@')) return;
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  const std::size_t length = std::strlen(path);
  if (length >= sizeof(address.sun_path)) {
    fuse_log(FUSE_LOG_WARNING, "NOTIFY_SOCKET %s: too long\n", path);
    return;
  }
  std::memcpy(address.sun_path, path, length);
  if (path[0] == '@') address.sun_path[0] = '\0';  // an abstract one
  const sharr::FileDescriptor fd(socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0));
  const auto size = static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + length);
  if (!fd || sendto(fd.get(), state.data(), state.size(), MSG_NOSIGNAL,
                    reinterpret_cast<const sockaddr*>(&address), size) < 0) {
    fuse_log(FUSE_LOG_WARNING, "NOTIFY_SOCKET %s: %s\n", path, strerror(errno));
  }
}

// Each open array takes a descriptor.
void raise_descriptor_limit() {
  rlimit limit{};
  if (getrlimit(RLIMIT_NOFILE, &limit) == 0) {
    limit.rlim_cur = limit.rlim_max;
    setrlimit(RLIMIT_NOFILE, &limit);
  }
}

std::string mode_line(const FileSystem& fs, const std::string& source, const std::string& point) {
  const bool native = fs.passes_through();
  const int why = errno;
  const std::string how =
      native ? "passthrough"
             : "direct_io" + (why == 0 ? std::string() : fmt::format(" ({})", strerror(why)));
  return fmt::format("{} on {}: {}", source, point, how);
}

int loop(fuse_session* session, const fuse_cmdline_opts& cmdline) {
  if (cmdline.singlethread != 0) return fuse_session_loop(session);
  fuse_loop_config* const config = fuse_loop_cfg_create();
  fuse_loop_cfg_set_clone_fd(config, static_cast<unsigned>(cmdline.clone_fd));
  fuse_loop_cfg_set_max_threads(config, cmdline.max_threads);
  const int result = fuse_session_loop_mt(session, config);
  fuse_loop_cfg_destroy(config);
  return result;
}

int mount(fuse_args* args, const Options& options, const fuse_cmdline_opts& cmdline) {
  sharr::Name name = sharr::Name::directory(options.source);
  if (!name.shm()) {
    // URIs are for everybody, whatever their working directory.
    const std::unique_ptr<char, Freed> real(realpath(name.path().c_str(), nullptr));
    if (!real) throw Failure(fmt::format("{}: {}", options.source, strerror(errno)));
    name = sharr::Name::directory(std::string("file://") + real.get());
  }
  sharr::FileDescriptor directory = sharr::open_directory(name);
  const std::string point = cmdline.mountpoint;
  check_mount_point(point, directory.get());

  std::string prefix = name.uri();
  if (!prefix.ends_with('/')) prefix += '/';
  add_mount_options(args, name.uri());
  raise_descriptor_limit();
  const bool foreground = cmdline.foreground != 0;
  Watcher watcher(point, !foreground);

  FileSystem fs(std::move(directory), prefix, options.direct_io != 0);
  const std::unique_ptr<fuse_session, Freed> session(
      fuse_session_new(args, &FileSystem::operations(), sizeof(fuse_lowlevel_ops), &fs));
  if (!session) throw Misuse("cannot start a FUSE session");  // libfuse has said which option
  if (fuse_set_signal_handlers(session.get()) != 0) throw Failure("cannot set signal handlers");
  if (fuse_session_mount(session.get(), point.c_str()) != 0) {
    fuse_remove_signal_handlers(session.get());
    throw Failure(point + ": cannot mount");
  }
  int result = 0;
  std::thread announcer;
  const auto unmount = [&] {
    fs.stop();
    fuse_session_unmount(session.get());
    if (announcer.joinable()) announcer.join();
    fuse_remove_signal_handlers(session.get());
  };
  try {
    const auto mounted = process::mount_at(point.c_str());
    if (!mounted) throw Failure(fmt::format("{}: {}", point, strerror(errno)));
    fs.set_session(session.get(), *mounted);
    mallopt(M_ARENA_MAX, 2);                // threads come and go, and each would leave one behind
    mallopt(M_MMAP_THRESHOLD, 128 * 1024);  // the default, for good: a listing leaves no hole
    umask(0);                               // callers have their own, which the kernel has applied
    drop_privileges();
    fs.start_watching();
    result = passthrough::prepare(session.get());
    if (result == 0) {
      watcher.mounted();
      if (foreground) {
        announcer = std::thread([&] {
          if (!watcher.answers()) return;
          const std::string line = mode_line(fs, name.uri(), point);
          fuse_log(FUSE_LOG_INFO, "%s\n", line.c_str());
          notify("READY=1\nSTATUS=" + line);
        });
      }
      result = loop(session.get(), cmdline);
      if (foreground) notify("STOPPING=1");
    }
  } catch (...) {
    unmount();
    throw;
  }
  unmount();
  if (result < 0) throw Failure(fmt::format("{}: {}", point, strerror(-result)));
  return 0;  // a signal to end is no failure
}

// Where a standard stream is closed, the next descriptor opened would be taken for it.
void open_standard_streams() {
  int fd = 0;
  do {
    fd = open("/dev/null", O_RDWR);
  } while (fd >= 0 && fd <= 2);
  if (fd > 2) close(fd);
}

int run(int argc, char** argv) {
  Arguments arguments(argc, argv);
  Options options;
  // Options for all file systems that make no difference here, and that libfuse does not know.
  std::vector<fuse_opt> specification = {{"direct_io", offsetof(Options, direct_io), 1}};
  for (const char* ignored : {"relatime", "norelatime", "strictatime", "nostrictatime", "diratime",
                              "nodiratime", "lazytime", "nolazytime", "iversion", "noiversion",
                              "mand", "nomand", "silent", "loud", "symfollow", "nosymfollow"}) {
    specification.push_back(FUSE_OPT_KEY(ignored, key_ignored));
  }
  specification.push_back(FUSE_OPT_END);
  if (fuse_opt_parse(arguments.get(), &options, specification.data(), take_source) != 0) return 2;
  fuse_cmdline_opts cmdline{};
  if (fuse_parse_cmdline(arguments.get(), &cmdline) != 0) return 2;
  const std::unique_ptr<char, Freed> point(cmdline.mountpoint);
  if (cmdline.show_help != 0) {
    std::fputs(usage, stdout);
    return 0;
  }
  if (cmdline.show_version != 0) {
    fmt::print("sharrfs {}, libfuse {}\n", SHARRFS_VERSION, fuse_pkgversion());
    return 0;
  }
  if (options.source.empty() || cmdline.mountpoint == nullptr) {
    std::fputs(usage, stderr);
    return 2;
  }
  return mount(arguments.get(), options, cmdline);
}

}  // namespace
}  // namespace sharrfs

int main(int argc, char** argv) try {
  sharrfs::open_standard_streams();
  fuse_set_log_func(sharrfs::log);
  return sharrfs::run(argc, argv);
} catch (const sharrfs::Misuse& error) {
  std::fprintf(stderr, "sharrfs: %s\n", error.what());
  return 2;
} catch (const std::exception& error) {
  std::fprintf(stderr, "sharrfs: %s\n", error.what());
  return 1;
}
