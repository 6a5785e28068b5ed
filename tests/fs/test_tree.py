"""What a file system does with names and attributes, held against a native directory call by call.

Of pjdfstest apply, with arrays for its regular files: chmod, chown, mkdir, open, rename, rmdir, unlink
and utimensat, for regular files and directories, and their error cases ENOENT, ENOTDIR, EISDIR, EEXIST,
ENOTEMPTY, ENAMETOOLONG, EINVAL, EACCES, EPERM, EROFS and EBUSY; the calls are made at random here, and
by several users in test_users.py. Not what it does with links, symbolic links, FIFOs, sockets, devices
and set-id bits, which are refused, with truncate, ftruncate and posix_fallocate, which an array's size
forbids, and with files that are no arrays.
"""

import ctypes
import errno
import fcntl
import itertools
import os
import pathlib
import random
import shutil
import signal
import socket
import stat
import subprocess
import textwrap
import threading

import numpy as np
import pytest
import sharr
from conftest import IS_ROOT, PYTHON, needs_root, python, wait_until
from mounts import DIRECT, daemons, fails, mode, needs_fuse, space  # the fixtures come by import

pytestmark = needs_fuse

NPY = b"\x93NUMPY\x01\0v\0{'descr': '<f8', 'fortran_order': False, 'shape': (2,), }".ljust(127) + b"\n"
RENAME_NOREPLACE, RENAME_EXCHANGE, RENAME_WHITEOUT = 1, 2, 4


def content(number):
    return NPY + bytes([number]) * 16


def renameat2(old, new, flags):
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.renameat2(-100, os.fsencode(old), -100, os.fsencode(new), flags) != 0:
        raise OSError(ctypes.get_errno(), "renameat2")


def tree(top):
    """Everything below a directory that a program can see, but for inode numbers and times."""
    found = {}
    for directory, directories, files in os.walk(top):
        for name in directories + files:
            path = os.path.join(directory, name)
            status = os.lstat(path)
            key = os.path.relpath(path, top)
            found[key] = (status.st_mode, status.st_uid, status.st_gid, status.st_nlink)
            if stat.S_ISREG(status.st_mode):
                with open(path, "rb") as file:
                    found[key] += (status.st_size, status.st_mtime_ns, file.read())
    return found


# One call each, of (kind, arguments); paths are relative.


def call(top, kind, *args):
    path = [os.path.join(top, arg) if isinstance(arg, str) else arg for arg in args]
    if kind == "write":
        with open(path[0], "wb") as file:
            file.write(content(args[1]))
            file.close()
            return os.utime(path[0], ns=(1, args[1]))
    if kind == "exclusive":
        with open(path[0], "xb") as file:
            file.write(content(args[1]))
            file.close()
            return os.utime(path[0], ns=(1, args[1]))
    if kind == "update":
        with open(path[0], "r+b") as file:
            file.seek(130), file.write(bytes([args[1]]) * 5)
        return os.utime(path[0], ns=(1, args[1]))
    if kind == "read":
        with open(path[0], "rb") as file:
            return file.read()
    if kind == "list":
        return sorted(os.listdir(path[0]))
    if kind == "stat":
        status = os.lstat(path[0])
        return status.st_mode, status.st_nlink, size_of(status)
    if kind == "rename2":
        return renameat2(*path)
    if kind == "times":
        return os.utime(path[0], ns=(args[1], args[1] + 1))
    if kind == "statvfs":
        return os.statvfs(path[0]).f_namemax
    if kind == "access":
        return os.access(path[0], args[1])
    if kind == "fsync":
        fd = os.open(path[0], os.O_RDONLY)
        try:
            return os.fsync(fd)
        finally:
            os.close(fd)
    return {"mkdir": os.mkdir, "rmdir": os.rmdir, "unlink": os.unlink, "rename": os.rename,
            "chmod": os.chmod, "chown": os.chown, "rmtree": shutil.rmtree}[kind](*path)  # fmt: skip


def size_of(status):
    return status.st_size if stat.S_ISREG(status.st_mode) else None


def outcome(top, *args):
    try:
        return call(top, *args)
    except OSError as error:
        return errno.errorcode[error.errno]


KINDS = {
    "write": (1, lambda rng: [rng.randrange(250)]), "exclusive": (1, lambda rng: [rng.randrange(250)]),
    "update": (1, lambda rng: [rng.randrange(250)]), "read": (1, lambda rng: []),
    "list": (1, lambda rng: []), "stat": (1, lambda rng: []), "mkdir": (1, lambda rng: [0o755]),
    "rmdir": (1, lambda rng: []), "unlink": (1, lambda rng: []), "rename": (2, lambda rng: []),
    "rename2": (2, lambda rng: [rng.choice([RENAME_NOREPLACE, RENAME_EXCHANGE, 3])]),
    "chmod": (1, lambda rng: [rng.choice([0o600, 0o644, 0o444, 0o777])]),
    "times": (1, lambda rng: [rng.randrange(10**18)]), "statvfs": (1, lambda rng: []),
    "access": (1, lambda rng: [rng.choice([os.R_OK, os.W_OK, os.X_OK, os.F_OK])]),
    "fsync": (1, lambda rng: []), "chown": (1, lambda rng: [rng.randrange(5), rng.randrange(5)]),
}  # fmt: skip


@pytest.mark.parametrize("seed", range(8))
def test_call_by_call(space, tmp_path, seed):
    """The same calls on the mount and on a native directory: same results, errors and trees."""
    uri, behind, point = space
    native = tmp_path / "native"
    native.mkdir()
    os.chmod(native, stat.S_IMODE(os.stat(behind).st_mode))
    rng = random.Random(seed)
    names = ["a", "b", "d", "d/a", "d/b", "d/e", "d/e/a", "c" * 255, "c" * 256, "d/e/é\udc80\n", "a/b"]
    for step in range(400):
        kind = rng.choice(list(KINDS))
        if kind == "chown" and not IS_ROOT:
            continue
        count, extra = KINDS[kind]
        args = [kind, *rng.choices(names, k=count), *extra(rng)]
        ours, theirs = outcome(point, *args), outcome(native, *args)
        assert ours == theirs, (step, args)
        if step % 20 == 0:
            assert tree(point) == tree(native), (step, args)
    assert tree(point) == tree(native) == tree(behind)


def test_rename(space):
    uri, behind, point = space
    for number, name in enumerate("abc"):
        (point / name).write_bytes(content(number))
    a = sharr.attach(f"{uri}/a", "r")
    with open(point / "a", "rb") as reader:
        os.rename(point / "a", point / "z")
        assert reader.read() == content(0) and sorted(os.listdir(behind)) == ["b", "c", "z"]
        renameat2(point / "z", point / "b", RENAME_EXCHANGE)
        assert (behind / "b").read_bytes() == content(0)
        assert (behind / "z").read_bytes() == content(1)
        fails(errno.EEXIST, renameat2, point / "b", point / "c", RENAME_NOREPLACE)
        os.rename(point / "b", point / "c")
        assert reader.seek(0) == 0 and reader.read() == content(0)
    assert a.tobytes() == content(0)[128:]
    fails(errno.EINVAL, renameat2, point / "c", point / "d", RENAME_WHITEOUT)
    # What is no array is not shown, and is safe.
    (behind / "text").write_text("no array")
    fails(errno.EEXIST, os.rename, point / "c", point / "text")
    fails(errno.ENOENT, os.rename, point / "text", point / "c")
    fails(errno.ENOENT, renameat2, point / "c", point / "text", RENAME_EXCHANGE)
    assert (behind / "text").read_text() == "no array"
    os.mkdir(point / "d"), os.mkdir(behind / "e"), (behind / "e/text").write_text("no array")
    fails(errno.ENOTEMPTY, os.rename, point / "d", point / "e")
    fails(errno.ENOTEMPTY, os.rmdir, point / "e")


def test_open_in_a_directory_that_moves(space):
    """Directories are found where they are now, with files open and a process inside."""
    uri, behind, point = space
    os.makedirs(point / "d/e")
    (point / "d/e/a").write_bytes(content(1))
    inside = os.open(point / "d/e", os.O_RDONLY)
    with open(point / "d/e/a", "rb") as reader:
        os.rename(point / "d", point / "f")
        assert reader.read() == content(1)
        assert os.listdir(inside) == ["a"] and os.stat("a", dir_fd=inside).st_size == 144
        with open(os.open("b", os.O_WRONLY | os.O_CREAT, dir_fd=inside), "wb") as file:
            file.write(content(2))
    assert sorted(os.listdir(behind / "f/e")) == ["a", "b"]
    os.rename(point / "f/e", point / "g")
    assert sorted(os.listdir(inside)) == ["a", "b"]
    shutil.rmtree(point / "g")
    fails(errno.ENOENT, os.stat, "a", dir_fd=inside)
    fails(errno.ENOENT, os.open, "c", os.O_WRONLY | os.O_CREAT, dir_fd=inside)
    os.close(inside)


def test_a_directory_that_is_gone(space):
    uri, behind, point = space
    for top in (point, behind):  # removed through the mount, and beside it
        os.mkdir(point / "d")
        fd = os.open(point / "d", os.O_RDONLY)
        os.rmdir(top / "d")
        assert stat.S_ISDIR(os.fstat(fd).st_mode) and os.listdir(fd) == []
        os.fsync(fd), os.fchmod(fd, 0o700)
        fails(errno.ENOENT, os.mkdir, "e", dir_fd=fd)
        os.close(fd)
    os.mkdir(point / "d")
    (point / "d/a").write_bytes(content(1))
    fd = os.open(point / "d", os.O_RDONLY)
    os.rename(behind / "d", behind / "e")  # moved beside
    assert os.fstat(fd).st_ino == os.stat(behind / "e").st_ino and os.listdir(fd) == ["a"]
    assert os.stat("a", dir_fd=fd).st_size == 144
    os.close(fd)


def test_refused(space):
    uri, behind, point = space
    (point / "a").write_bytes(content(1))
    fails(errno.EPERM, os.symlink, "a", point / "l")
    fails(errno.EPERM, os.link, point / "a", point / "l")
    fails(errno.EPERM, os.mkfifo, point / "l")
    fails(errno.EPERM, os.mknod, point / "l", stat.S_IFREG | 0o644)
    fails(errno.EPERM, os.mknod, point / "l", stat.S_IFSOCK | 0o644)
    if IS_ROOT:
        fails(errno.EPERM, os.mknod, point / "l", stat.S_IFCHR | 0o644, os.makedev(1, 3))
    for bits in (stat.S_ISUID, stat.S_ISGID, stat.S_ISUID | stat.S_ISGID):
        fails(errno.EPERM, os.chmod, point / "a", 0o755 | bits)
        fails(errno.EPERM, os.open, point / "l", os.O_WRONLY | os.O_CREAT, 0o755 | bits)
    fails(errno.EOPNOTSUPP, os.setxattr, point / "a", "user.x", b"1")
    fails(errno.EOPNOTSUPP, os.open, point, os.O_TMPFILE | os.O_RDWR)
    assert os.listdir(behind) == ["a"] and (behind / "a").read_bytes() == content(1)
    assert stat.S_IMODE(os.stat(behind / "a").st_mode) == 0o644


def test_attributes(space):
    uri, behind, point = space
    (point / "a").write_bytes(content(1))
    (point / "d").mkdir(0o750)
    for path in ("a", "d"):
        os.chmod(point / path, 0o710)
        os.utime(point / path, ns=(10**18 + 1, 10**18 + 2))
        ours, native = os.stat(point / path), os.stat(behind / path)
        assert stat.S_IMODE(native.st_mode) == 0o710
        assert (native.st_atime_ns, native.st_mtime_ns) == (10**18 + 1, 10**18 + 2)
        for field in ("st_mode", "st_mtime_ns", "st_atime_ns", "st_ctime_ns", "st_uid", "st_ino"):
            assert getattr(ours, field) == getattr(native, field)
    subprocess.run(["touch", "-m", point / "a"], check=True)
    assert os.stat(behind / "a").st_mtime_ns > 10**18 + 2
    assert os.stat(behind / "a").st_atime_ns == 10**18 + 1
    os.chmod(point / "d", 0o2755)  # who makes files there gives them its group
    assert stat.S_IMODE(os.stat(point / "d").st_mode) == 0o2755
    os.chmod(behind / "a", 0o6755)
    assert stat.S_IMODE(os.stat(point / "a").st_mode) == 0o755  # hidden


def test_sync(space):
    uri, behind, point = space
    with open(point / "a", "wb") as file:
        file.write(content(1)), file.flush(), os.fsync(file.fileno()), os.fdatasync(file.fileno())
    directory = os.open(point, os.O_RDONLY)
    os.fsync(directory), os.close(directory)
    os.sync()


# Names


def test_any_name(space):
    uri, behind, point = space
    names = [bytes([byte]) for byte in range(1, 256) if byte not in b"/."]
    names += [b"...", b"..a", b"a.", b" ", b"\xff" * 255, "日本語.npy".encode(), b"-rf", b"*", b"a b\tc\n"]
    names = sorted(set(names))
    for name in names:
        with open(os.path.join(os.fsencode(point), name), "wb") as file:
            file.write(content(1))
    assert sorted(os.listdir(os.fsencode(point))) == sorted(os.listdir(os.fsencode(behind))) == names
    for name in names:
        path = os.path.join(os.fsencode(point), name)
        assert os.getxattr(path, "user.sharr.uri") == f"{uri}/".encode() + name
        os.unlink(path)
    assert os.listdir(behind) == []


def test_as_deep_as_one_goes(space):
    """Far longer than a path that one call takes."""
    uri, behind, point = space
    script = """
        import os, sys
        os.chdir(sys.argv[1])
        for depth in range(60):
            os.mkdir("d" * 200)
            os.chdir("d" * 200)
        data = bytes.fromhex(sys.argv[2])
        for name in ("a", "a"):
            with open(name, "wb") as file:
                file.write(data)
        assert open("a", "rb").read() == data and os.listdir() == ["a"]
        assert os.getxattr("a", "user.sharr.dtype") == b"float64"
        os.rename("a", "b"), os.chmod("b", 0o600), os.utime("b")
        assert os.stat("b").st_mode & 0o777 == 0o600
        for directory, mode in ((sys.argv[3], 1), (sys.argv[1], 2)):
            os.chdir(directory)
            for depth in range(60):
                os.chdir("d" * 200)
            assert os.listdir() == ["b"], os.listdir()
        os.unlink("b")
    """
    python(script, point, content(1).hex(), behind)
    subprocess.run(["rm", "-r", point / ("d" * 200)], check=True)
    assert os.listdir(behind) == []


def test_100_000_arrays(space, mode):
    uri, behind, point = space
    if mode == DIRECT and IS_ROOT:
        pytest.skip("has been done with passthrough")
    for number in range(100_000):
        fd = os.open(behind / f"a{number}", os.O_WRONLY | os.O_CREAT)
        os.write(fd, content(number % 256))
        os.close(fd)
    assert len(os.listdir(point)) == 100_000
    with os.scandir(point) as entries:
        assert sum(entry.is_file() for entry in entries) == 100_000
    for number in (0, 99_999):
        assert (point / f"a{number}").read_bytes() == content(number % 256)
    subprocess.run(["find", point, "-name", "a*9", "-delete"], check=True)
    assert len(os.listdir(behind)) == 90_000


def test_positions_in_a_directory_that_changes(space):
    """telldir and seekdir, rewinddir, and arrays that come and go in between."""
    uri, behind, point = space
    names = {f"a{number:03}" for number in range(300)}
    for name in names:
        (behind / name).write_bytes(content(1))
    script = """
        import ctypes, os, sys
        libc = ctypes.CDLL(None, use_errno=True)
        class Dirent(ctypes.Structure):
            _fields_ = [("ino", ctypes.c_ulong), ("off", ctypes.c_long), ("len", ctypes.c_ushort),
                        ("type", ctypes.c_ubyte), ("name", ctypes.c_char * 256)]
        libc.opendir.restype = ctypes.c_void_p
        libc.readdir.restype = ctypes.POINTER(Dirent)
        for function in (libc.readdir, libc.rewinddir, libc.telldir, libc.seekdir, libc.closedir):
            function.argtypes = [ctypes.c_void_p]
        libc.telldir.restype = ctypes.c_long
        libc.seekdir.argtypes = [ctypes.c_void_p, ctypes.c_long]
        stream = libc.opendir(os.fsencode(sys.argv[1]))
        def read():
            entry = libc.readdir(stream)
            return entry.contents.name.decode() if entry else None
        order, places = [], []
        while True:
            places.append(libc.telldir(stream))
            name = read()
            if name is None: break
            order.append(name)
        assert len(order) == 302 and set(order) >= {".", ".."}
        os.unlink(f"{sys.argv[2]}/a000")
        open(f"{sys.argv[2]}/new", "wb").write(bytes.fromhex(sys.argv[3]))
        for i in (300, 5, 150, 0, 301, 302):
            if i < 302 and i > 0:
                libc.seekdir(stream, places[i])
                assert read() == order[i], i
        libc.rewinddir(stream)
        again = set(iter(read, None))
        assert again == set(order) - {"a000"} | {"new"}
        libc.closedir(stream)
    """
    python(script, point, behind, content(1).hex())


# Locks


def holder(path, kind, how):
    """A process that holds a lock on path until its stdin is closed."""
    script = """
        import fcntl, sys
        file = open(sys.argv[1], "r+b")
        getattr(fcntl, sys.argv[2])(file, getattr(fcntl, sys.argv[3]))
        print("locked", flush=True)
        sys.stdin.readline()
    """
    child = subprocess.Popen(
        [PYTHON, "-c", textwrap.dedent(script), path, kind, how], stdin=-1, stdout=-1, text=True
    )
    return child


@pytest.mark.parametrize("kind", ["flock", "lockf"])
def test_locks_hold_on_both_sides(space, kind):
    uri, behind, point = space
    (point / "a").write_bytes(content(1))
    lock = getattr(fcntl, kind)
    for held_by, wanted_by in itertools.product((point, behind), repeat=2):
        child = holder(held_by / "a", kind, "LOCK_EX")
        assert child.stdout.readline() == "locked\n"
        with open(wanted_by / "a", "r+b") as file:
            for how in (fcntl.LOCK_EX, fcntl.LOCK_SH):
                with pytest.raises(BlockingIOError):
                    lock(file, how | fcntl.LOCK_NB)
            if kind == "lockf":
                query = fcntl.fcntl(file, fcntl.F_GETLK, fcntl_flock(fcntl.F_WRLCK))
                assert fcntl_type(query) == fcntl.F_WRLCK
                if held_by == wanted_by:
                    assert fcntl_pid(query) == child.pid
            waiting = holder(wanted_by / "a", kind, "LOCK_EX")
            child.communicate("\n")  # lets go
            assert waiting.stdout.readline() == "locked\n"
            with pytest.raises(BlockingIOError):
                lock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            waiting.kill(), waiting.communicate()
            lock(file, fcntl.LOCK_EX)
            lock(file, fcntl.LOCK_UN)
        # Shared locks are.
        child = holder(held_by / "a", kind, "LOCK_SH")
        child.stdout.readline()
        with open(wanted_by / "a", "r+b") as file:
            lock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            with pytest.raises(BlockingIOError):
                lock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        child.communicate("\n")


def fcntl_flock(kind, start=0, length=0):
    return np.array([(kind, 0, start, length, 0)], FLOCK).tobytes()


FLOCK = np.dtype([("type", "i2"), ("whence", "i2"), ("start", "i8"), ("len", "i8"), ("pid", "i4")], align=True)


def fcntl_type(query):
    return np.frombuffer(query, FLOCK)["type"][0]


def fcntl_pid(query):
    return np.frombuffer(query, FLOCK)["pid"][0]


def test_record_locks(space):
    """Ranges; a close of any descriptor lets go of the process's locks, as POSIX has it."""
    uri, behind, point = space
    (point / "a").write_bytes(content(1))
    one = open(point / "a", "r+b")
    fcntl.lockf(one, fcntl.LOCK_EX, 10, 0)
    try_range = """
        import fcntl, sys
        with open(sys.argv[1], "r+b") as file:
            for start in (0, 9, 10, 20):
                try:
                    fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, start)
                    print(start, end=" ")
                except BlockingIOError:
                    pass
    """
    for path in (point / "a", behind / "a"):
        assert python(try_range, path) == "10 20 "
    open(point / "a", "rb").close()
    for path in (point / "a", behind / "a"):
        assert python(try_range, path) == "0 9 10 20 "
    fcntl.lockf(one, fcntl.LOCK_EX)
    child = os.fork()
    if child == 0:
        one.close()  # which are not the child's
        os._exit(0)
    os.waitpid(child, 0)
    assert python(try_range, behind / "a") == ""
    one.close()
    assert python(try_range, behind / "a") == "0 9 10 20 "


F_OFD_SETLK = 37


def test_open_file_locks(space):
    """Those of F_OFD_SETLK go with the open file, not with the process."""
    uri, behind, point = space
    (point / "a").write_bytes(content(1))
    keep = open(point / "a", "rb")
    for _ in range(20):
        with open(point / "a", "r+b") as file:
            wait_until(lambda: not blocked(file), "the last one's lock to go")
            with open(behind / "a", "r+b") as other:
                with pytest.raises(BlockingIOError):
                    fcntl.lockf(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
            open(point / "a", "rb").close()
            with open(behind / "a", "r+b") as other:
                with pytest.raises(BlockingIOError):
                    fcntl.lockf(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    keep.close()


@needs_root
def test_locks_of_the_open_file_before(space, tmp_path):
    """The kernel knows an open file by its address, which the next one may get, and says of the end
    of the first when it comes to it: here, when it may have requests in the background again."""
    uri, behind, point = space
    (point / "a").write_bytes(content(1))
    connections = tmp_path / "connections"
    connections.mkdir()
    subprocess.run(["mount", "-t", "fusectl", "fusectl", str(connections)], check=True)
    try:
        limit = connections / str(os.minor(os.stat(point).st_dev)) / "max_background"
        usual = limit.read_text()
        inherited = False
        for _ in range(20):
            limit.write_text("0")
            with open(point / "a", "r+b") as file:
                assert not blocked(file)
            file = open(point / "a", "r+b")
            inherited = not blocked(file)
            limit.write_text(usual)
            if inherited:
                break
            file.close()
    finally:
        subprocess.run(["umount", str(connections)], check=True)
    with file:
        if not inherited:
            pytest.skip("no open file had the address of the one before")
        open(point / "a", "rb").close()  # with whose end that of the first one goes
        [daemon] = daemons(point)
        wait_until(lambda: descriptors(daemon, behind / "a") <= 2, "the end of the first one")
        with open(behind / "a", "r+b") as other:
            fails(errno.EAGAIN, fcntl.lockf, other, fcntl.LOCK_EX | fcntl.LOCK_NB)


def descriptors(pid, path):
    """How many of a process's are of a file."""
    found = pathlib.Path(f"/proc/{pid}/fd").iterdir()
    return sum(os.path.exists(fd) and os.path.samefile(fd, path) for fd in found)


def blocked(file):
    try:
        fcntl.fcntl(file, F_OFD_SETLK, fcntl_flock(fcntl.F_WRLCK))
    except BlockingIOError:
        return True
    return False


@pytest.mark.parametrize("kind", ["flock", "lockf"])
def test_waiting_for_a_lock_can_be_given_up(space, kind):
    uri, behind, point = space
    (point / "a").write_bytes(content(1))
    with open(behind / "a", "r+b") as file:
        getattr(fcntl, kind)(file, fcntl.LOCK_EX)
        script = """
            import fcntl, signal, sys
            file = open(sys.argv[1], "r+b")
            class Alarm(Exception): pass
            def ring(*_): raise Alarm
            signal.signal(signal.SIGALRM, ring)
            signal.setitimer(signal.ITIMER_REAL, 0.2)
            try:
                getattr(fcntl, sys.argv[2])(file, fcntl.LOCK_EX)
            except Alarm:
                print("given up")
        """
        assert python(script, point / "a", kind) == "given up\n"
        children = [holder(point / "a", kind, "LOCK_EX") for _ in range(20)]
        for child in children[:19]:
            child.kill(), child.communicate()
    assert children[19].stdout.readline() == "locked\n"
    children[19].communicate("\n")


def flocked(path):
    with open(path, "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False


def test_flock_is_let_go_when_the_last_descriptor_is_closed(space):
    """The kernel tells of it after the close."""
    uri, behind, point = space
    (point / "a").write_bytes(content(1))
    for _ in range(50):
        for path in (point / "a", behind / "a"):
            with open(path, "rb") as file:
                wait_until(lambda: not flocked(path), "the last one's lock to go")
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                duplicate = os.dup(file.fileno())
            assert flocked(behind / "a")
            os.close(duplicate)
    for path in (point / "a", behind / "a") * 10:
        wait_until(lambda: subprocess.run(["flock", "-n", path, "true"]).returncode == 0, "the lock")


def closed_elsewhere(path, how):
    """Takes a lock by a descriptor that is closed here and open somewhere else. Returns what ends that."""
    file = os.open(path, os.O_RDWR)
    fcntl.flock(file, fcntl.LOCK_EX)
    read, write = os.pipe()
    sockets = ()
    if how == "message":
        sockets = socket.socketpair()
        socket.send_fds(sockets[0], [b"x"], [file])
    elif os.fork() == 0:  # which execs nothing
        if how == "grandchild" and os.fork() > 0:
            os._exit(0)
        os.close(write)
        os.read(read, 1)
        os._exit(0)
    elif how == "grandchild":
        os.wait()
    os.close(file), os.close(read)

    def end():
        [each.close() for each in sockets]
        os.close(write)
        if how == "child":
            os.wait()

    return end


@pytest.mark.parametrize("how", ["child", "grandchild", "message"])
def test_flock_stays_with_whoever_has_the_open_file(space, how):
    uri, behind, point = space
    (point / "a").write_bytes(content(1))
    end = closed_elsewhere(point / "a", how)
    assert flocked(behind / "a") and flocked(point / "a")
    end()
    wait_until(lambda: not flocked(behind / "a"), "the lock to go")


def waited_for(path):
    """Whether anybody waits for a lock on a file."""
    inode = f":{os.stat(path).st_ino} "
    locks = pathlib.Path("/proc/locks").read_text().splitlines()
    return any("->" in line and inode in line for line in locks)


def test_who_waits_for_a_lock_gets_it_whatever_else_is_closed(space):
    uri, behind, point = space
    (point / "a").write_bytes(content(1))
    child = holder(behind / "a", "lockf", "LOCK_EX")
    child.stdout.readline()
    other = open(point / "a", "rb")
    with open(point / "a", "r+b") as file:
        thread = threading.Thread(target=lambda: fcntl.lockf(file, fcntl.LOCK_EX))
        thread.start()
        wait_until(lambda: waited_for(behind / "a"), "the thread to wait")
        other.close()
        child.communicate("\n")
        thread.join()
        with open(behind / "a", "r+b") as beside:
            fails(errno.EAGAIN, fcntl.lockf, beside, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert not flocked(behind / "a")
    with open(behind / "a", "r+b") as beside:
        fcntl.lockf(beside, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_who_waits_for_a_lock_gets_it_whatever_else_was_used(space):
    """By another handle than the process's last."""
    uri, behind, point = space
    (point / "a").write_bytes(content(1))
    child = holder(behind / "a", "lockf", "LOCK_EX")
    child.stdout.readline()
    with open(point / "a", "r+b") as file:
        thread = threading.Thread(target=lambda: fcntl.lockf(file, fcntl.LOCK_EX, 10))
        thread.start()
        wait_until(lambda: waited_for(behind / "a"), "the thread to wait")
        with open(point / "a", "r+b") as other:
            fcntl.lockf(other, fcntl.LOCK_UN, 10, 200)
        [daemon] = daemons(point)
        wait_until(lambda: descriptors(daemon, behind / "a") <= 3, "the end of the other")
        child.communicate("\n")
        thread.join()
        with open(behind / "a", "r+b") as beside:
            fails(errno.EAGAIN, fcntl.lockf, beside, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_lease_lets_nobody_else_wait(space):
    """Of a file that is found by who has it open."""
    uri, behind, point = space
    for name in ("a", "b"):
        (point / name).write_bytes(content(1))
    signal.signal(signal.SIGIO, signal.SIG_IGN)
    with open(point / "a", "rb") as file, open(behind / "a", "rb") as leased:
        wait_until(lambda: lease(leased), "a lease")
        os.rename(behind / "a", behind / "c")
        script = "import os, sys; os.open(sys.argv[1], os.O_RDWR)"
        opener = subprocess.Popen(
            [PYTHON, "-c", script, f"/proc/{os.getpid()}/fd/{file.fileno()}"], stderr=subprocess.PIPE, text=True
        )
        try:
            wait_until(lambda: "BREAKING" in pathlib.Path("/proc/locks").read_text(), "the open")
            subprocess.run(["getfattr", "-n", "user.sharr.dtype", point / "b"], check=True, timeout=20)
            assert f"[Errno {errno.EAGAIN}]" in opener.communicate(timeout=20)[1]
        finally:
            fcntl.fcntl(leased, fcntl.F_SETLEASE, fcntl.F_UNLCK)
            opener.wait()
    signal.signal(signal.SIGIO, signal.SIG_DFL)


def test_a_lock_waits_for_no_lease(space):
    """Which would keep everybody waiting."""
    uri, behind, point = space
    (point / "a").write_bytes(content(1))
    signal.signal(signal.SIGIO, signal.SIG_IGN)
    with open(point / "a", "rb") as file, open(behind / "a", "rb") as leased:
        wait_until(lambda: lease(leased), "a lease")
        fails(errno.EAGAIN, fcntl.lockf, file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    signal.signal(signal.SIGIO, signal.SIG_DFL)


def lease(file):
    try:
        fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_RDLCK)
    except BlockingIOError:  # somebody has it open for writing
        return False
    return True
