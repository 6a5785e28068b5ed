"""New arrays by writing files on the mount, and new ones in the place of old ones."""

import contextlib
import ctypes
import errno
import io
import mmap
import os
import pathlib
import shutil
import signal
import socket
import stat
import struct
import subprocess
import textwrap
import threading
import time

import numpy as np
import pytest
import sharr
from conftest import (
    PYTHON, SHM, needs_root, needs_strace, python, sharrfs_binary, traced, wait_until,
)  # fmt: skip
from mounts import (  # the fixtures come by import
    DIRECT, NATIVE, daemons, fails, mode, mounting, needs_fuse, space,
)  # fmt: skip

pytestmark = needs_fuse

A = np.random.default_rng(7).random((300, 70))
B = np.arange(5, dtype=">i2")


def npy(value, **kwargs):
    file = io.BytesIO()
    np.lib.format.write_array(file, np.asarray(value), **kwargs)
    return file.getvalue()


def sh(script, *args, check=True, **kwargs):
    done = subprocess.run(
        ["bash", "-c", script, "bash", *map(str, args)], capture_output=True, timeout=60, **kwargs
    )
    if check:
        assert done.returncode == 0, done.stderr
    return done


def by_python(write):
    """A writer: calls write(source, target) in this process."""
    return lambda source, target: write(pathlib.Path(source), pathlib.Path(target))


def by_shell(script):
    return lambda source, target: sh(script, source, target)


def write_twice(source, target):
    with open(target, "wb", buffering=0) as file:
        data = source.read_bytes()
        file.write(data[:100])
        assert file.tell() == 100 and os.fstat(file.fileno()).st_size == 100
        file.write(data[100:])


def write_backwards(source, target):
    data = source.read_bytes()
    with open(target, "wb", buffering=0) as file:
        for start in range(len(data) // 100 * 100, -1, -100):
            os.pwrite(file.fileno(), data[start : start + 100], start)


def write_mapped(source, target):
    data = source.read_bytes()
    with open(target, "w+b") as file:
        file.truncate(len(data))
        try:
            with mmap.mmap(file.fileno(), 0) as memory:
                memory[:] = data
        except OSError as error:  # without passthrough
            assert error.errno == errno.ENODEV
            file.write(data)


def write_too_much_then_cut(source, target):
    with open(target, "wb") as file:
        file.write(source.read_bytes() + b"x" * 5000)
        file.truncate(source.stat().st_size)


def read_back(source, target):
    with open(target, "w+b") as file:
        file.write(source.read_bytes())
        file.seek(0)
        assert file.read() == source.read_bytes()


WRITERS = {
    "cp": by_shell('cp "$1" "$2"'),
    "cp -p": by_shell('cp -p "$1" "$2"'),
    "cp -a": by_shell('cp -a "$1" "$2"'),
    "cp --sparse": by_shell('cp --sparse=always "$1" "$2"'),
    "mv": by_shell('cp "$1" "$1.2" && mv -f "$1.2" "$2"'),
    "cat": by_shell('cat "$1" > "$2"'),
    "cat >>": by_shell('rm -f "$2" && cat "$1" >> "$2"'),
    "two cats": by_shell('{ head -c 100 "$1"; tail -c +101 "$1"; } > "$2"'),
    "exec": by_shell('exec 3> "$2" && cat "$1" >&3 && exec 3>&-'),
    "dd": by_shell('dd if="$1" of="$2" bs=1M status=none'),
    "dd 512": by_shell('dd if="$1" of="$2" status=none'),
    "dd direct": by_shell('dd if="$1" of="$2" bs=1M conv=fsync status=none'),
    "install": by_shell('install -m 644 "$1" "$2"'),
    "tar": by_shell('cp "$1" "$1.dir.npy"; tar -C "${1%/*}" -c "${1##*/}" --transform '
                    '"s|.*|${2##*/}|" | tar -C "${2%/*}" -x'),
    "tee": by_shell('tee "$2" < "$1" > /dev/null'),
    "sparse": by_shell('truncate -s 10 "$1.x"; cp --sparse=always "$1" "$2"'),
    "wb": by_python(lambda source, target: target.write_bytes(source.read_bytes())),
    "two writes": by_python(write_twice),
    "backwards": by_python(write_backwards),
    "mapped": by_python(write_mapped),
    "cut": by_python(write_too_much_then_cut),
    "w+b": by_python(read_back),
    "shutil.copy": by_python(shutil.copy),
    "shutil.copy2": by_python(shutil.copy2),
    "shutil.copyfile": by_python(shutil.copyfile),
    "os.open": by_python(lambda source, target: sh('"$0" -c "import os, sys; '
        'fd = os.open(sys.argv[2], os.O_WRONLY | os.O_CREAT | os.O_TRUNC); '
        'os.write(fd, open(sys.argv[1], \'rb\').read()); os._exit(0)" "$1" "$2"'.replace('"$0"', PYTHON),
        source, target)),  # ends without closing
}  # fmt: skip
if shutil.which("rsync"):
    WRITERS["rsync"] = by_shell('rsync -I "$1" "$2"')
    WRITERS["rsync -a"] = by_shell('rsync -aI "$1" "$2"')


@pytest.mark.parametrize("how", WRITERS)
def test_writers(space, tmp_path, how):
    """New, over another of another size, and over itself: the bytes are kept, in one step."""
    uri, behind, point = space
    source = tmp_path / "a.npy"
    for data in (npy(A), npy(B), npy(B), npy(A[::-1])):
        source.write_bytes(data)
        before = (behind / "x").exists() and (os.stat(behind / "x").st_ino, sharr.attach(f"{uri}/x"))
        WRITERS[how](source, point / "x")
        assert (point / "x").read_bytes() == data == (behind / "x").read_bytes()
        assert os.listdir(behind) == os.listdir(point) == ["x"]
        assert sharr.attach(f"{uri}/x").tobytes() == np.load(source).tobytes()
        if before:
            assert os.stat(behind / "x").st_ino != before[0]
    if before:
        assert before[1].tolist() == B.tolist()  # whoever is attached keeps what he has


CONTENTS = {
    "C": npy(A), "F": npy(np.asfortranarray(A)), "empty": npy(np.zeros((3, 0))), "scalar": npy(3.5),
    "2.0": npy(A, version=(2, 0)), "structured": npy(np.zeros(3, [("a", "f4"), ("b", "S3")])),
    "4096": b"\x93NUMPY\x01\0" + (4086).to_bytes(2, "little")
            + b"{'descr': '|u1', 'fortran_order': False, 'shape': (9,), }".ljust(4085) + b"\n" + b"x" * 9,
}  # fmt: skip


@pytest.mark.parametrize("content", CONTENTS)
def test_any_array(space, content):
    uri, behind, point = space
    data = CONTENTS[content]
    (point / "x").write_bytes(data)
    assert (behind / "x").read_bytes() == data
    assert sharr.attach(point / "x").tobytes() == np.load(io.BytesIO(data)).tobytes()


def test_np_save(space):
    uri, behind, point = space
    for value in (A, B, np.asfortranarray(A), np.array(3), np.zeros((0, 3))):
        np.save(point / "x.npy", value)
        with open(point / "y", "wb") as file:
            np.save(file, value)
        for name in ("x.npy", "y"):
            assert (behind / name).read_bytes() == npy(value)
            assert sharr.attach(f"{uri}/{name}").tolist() == value.tolist()
    fails(errno.EINVAL, np.savez, point / "z.npz", A)
    with open(point / "two", "wb") as file:
        np.save(file, A), np.save(file, B)
        fails(errno.EINVAL, file.close)
    fails(errno.EINVAL, np.savetxt, point / "text", A)
    assert sorted(os.listdir(behind)) == ["x.npy", "y"]


def test_open_memmap(space, mode):
    """It writes a header, closes, opens again, maps, and then the array is to be filled."""
    uri, behind, point = space
    for shape in ((3, 4), (1000, 1000), (2,)):
        if mode == DIRECT:
            fails(errno.ENODEV, np.lib.format.open_memmap, point / "x", "w+", "f4", shape)
        else:
            m = np.lib.format.open_memmap(point / "x", "w+", "f4", shape)
            m[:] = 7
            m.flush()
            assert (sharr.attach(f"{uri}/x") == 7).all()
            m = np.lib.format.open_memmap(point / "x", "r+")
            m[0] = 8
            assert (np.load(point / "x")[0] == 8).all()
        assert sharr.attach(f"{uri}/x").shape == shape
        # All of its memory is there.
        assert os.stat(behind / "x").st_blocks * 512 >= os.stat(behind / "x").st_size


BAD = {
    "nothing": b"", "text": b"hello, world\n", "magic": b"\x93NUMPY", "no data": npy(A)[:128],
    "half a header": npy(A)[:60], "one short": npy(A)[:-1], "one more": npy(A) + b"\0",
    "half": npy(A)[: len(npy(A)) // 2], "twice": npy(A) * 2, "zip": b"PK\3\4" + b"\0" * 1000,
    "object": npy(np.array([{}], object), allow_pickle=True),
    "version 9": b"\x93NUMPY\x09\0" + npy(A)[8:],
    "huge": npy(B).replace(b"(5,), }    ", b"(1152921504606846976,), }"[:15].ljust(15)),
    "negative": npy(B).replace(b"(5,)", b"(-5,)"),
    "sharedarray": b"\0" * 48 + b"[SharedArray]\0\0\0" + np.array([48], "u8").tobytes()
                   + np.array([11, 4, 2], "i4").tobytes() + np.array([3, 4] + [0] * 30, "i8").tobytes(),
}  # fmt: skip


@pytest.mark.parametrize("over", [False, True])
@pytest.mark.parametrize("what", BAD)
def test_what_is_no_array_is_refused_at_close(space, tmp_path, what, over):
    uri, behind, point = space
    if over:
        np.save(behind / "x", B)
        os.rename(behind / "x.npy", behind / "x")
    fd = os.open(point / "x", os.O_WRONLY | os.O_CREAT | (os.O_TRUNC if over else os.O_EXCL), 0o644)
    assert os.write(fd, BAD[what]) == len(BAD[what])
    duplicate = os.dup(fd)
    os.close(fd)  # not the last
    fails(errno.EINVAL, os.close, duplicate)
    (tmp_path / "bad").write_bytes(BAD[what])
    for command in ('cp "$1" "$2"', 'cat "$1" > "$2"', 'dd if="$1" of="$2" status=none'):
        done = sh(command, tmp_path / "bad", point / "x", check=False)
        assert done.returncode == 1 and b"Invalid argument" in done.stderr, (command, done)
    assert os.listdir(behind) == (["x"] if over else []) == os.listdir(point)
    if over:
        assert np.load(point / "x").tolist() == B.tolist()


def test_every_length(space):
    """Cut anywhere, an array is refused; only the whole is one."""
    uri, behind, point = space
    data = npy(B)
    for length in range(len(data)):
        fails(errno.EINVAL, (point / "x").write_bytes, data[:length])
    assert os.listdir(behind) == []
    (point / "x").write_bytes(data)
    assert os.listdir(behind) == ["x"]


def test_nobody_sees_it_before(space):
    uri, behind, point = space
    data = npy(A)
    with open(point / "x", "wb", buffering=0) as file:
        for piece in (data[:100], data[100:-1], data[-1:]):
            for where in (point, behind):
                assert os.listdir(where) == [] and not (where / "x").exists()
            assert sharr.list(uri) == []
            fails(errno.ENOENT, os.unlink, point / "x")
            fails(errno.ENOENT, os.rename, point / "x", point / "y")
            assert sh('ls "$1"', point / "x", check=False).returncode == 2
            file.write(piece)
            status = os.fstat(file.fileno())
            assert status.st_nlink == 1 and stat.S_IMODE(status.st_mode) == 0o644
            os.fsync(file.fileno())
    assert np.load(point / "x").tolist() == A.tolist()


def test_attributes_set_while_it_is_written(space):
    uri, behind, point = space
    with open(point / "x", "wb") as file:
        os.fchmod(file.fileno(), 0o640)
        np.save(file, A)
        file.flush()
        os.utime(file.fileno(), ns=(10**18, 10**18 + 5))
        fails(errno.EPERM, os.fchmod, file.fileno(), 0o4755)
        assert os.listxattr(file.fileno()) == []
    status = os.stat(behind / "x")
    assert stat.S_IMODE(status.st_mode) == 0o640 and status.st_mtime_ns == 10**18 + 5
    before = os.umask(0o027)
    try:
        np.save(point / "y", A)
        os.close(os.open(point / "x", os.O_RDONLY))
    finally:
        os.umask(before)
    assert stat.S_IMODE(os.stat(behind / "y.npy").st_mode) == 0o640


def test_duplicates_and_children(space):
    """Which close is the last is not for one process to know."""
    uri, behind, point = space
    data = npy(A)
    fd = os.open(point / "x", os.O_WRONLY | os.O_CREAT)
    os.write(fd, data[:5000])
    child = os.fork()
    if child == 0:
        os.close(fd)  # while the parent has it
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    child = os.fork()
    if child == 0:
        os.write(fd, data[5000:])
        os._exit(0)  # without closing: the kernel does
    assert os.waitpid(child, 0)[1] == 0
    assert os.listdir(behind) == []  # complete, but still open here
    os.close(fd)
    assert (behind / "x").read_bytes() == data

    # The child goes on when the parent has closed.
    read, write = os.pipe()
    fd = os.open(point / "y", os.O_WRONLY | os.O_CREAT)
    os.write(fd, data[:5000])
    child = os.fork()
    if child == 0:
        os.close(write), os.read(read, 1)
        os.write(fd, data[5000:])
        os.close(fd)
        os._exit(0 if os.path.exists(behind / "y") else 1)
    os.close(read), os.close(fd)
    assert os.listdir(behind) == ["x"]
    os.close(write)
    assert os.waitpid(child, 0)[1] == 0
    assert (behind / "y").read_bytes() == data


def test_a_parent_hears_nothing_of_what_its_child_completes(space):
    """Which it does while the parent's close waits for the child's."""
    uri, behind, point = space
    data = npy(A)
    for i in range(10):
        fd = os.open(point / f"x{i}", os.O_WRONLY | os.O_CREAT)
        os.write(fd, data[:5000])
        child = os.fork()
        if child == 0:
            time.sleep(0.005)
            os.write(fd, data[5000:])
            os._exit(0)
        os.close(fd)
        os.waitpid(child, 0)
        wait_until((point / f"x{i}").exists, "the array")
        assert (point / f"x{i}").read_bytes() == data


def test_a_fork_while_another_thread_closes(space):
    """The child has the file before it is among the children: for as long as memory is copied."""
    uri, behind, point = space
    libc = ctypes.CDLL(None)
    close = ctypes.cast(libc.close, ctypes.c_void_p)  # by a thread that needs no interpreter
    memory = bytearray(b"x") * (40 << 20)  # in small pages, which NumPy's would not be
    had = 0
    for i in range(60):
        fd = os.open(point / f"x{i}", os.O_WRONLY | os.O_CREAT)
        os.write(fd, npy(B))
        closer = ctypes.c_ulong()
        assert libc.pthread_create(ctypes.byref(closer), None, close, ctypes.c_void_p(fd)) == 0
        child = os.fork()
        if child == 0:
            try:
                os.fstat(fd)
            except OSError:  # closed before
                os._exit(0)
            time.sleep(0.01)
            os._exit(2 if os.path.exists(point / f"x{i}") else 1)
        assert libc.pthread_join(closer, None) == 0
        found = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert found != 2, "the child has it open"
        had += found
    assert had > 10 and len(memory) == 40 << 20


def test_whom_a_fork_gave_the_file_has_to_close_it(space):
    """A parent that makes the file and leaves it to its children to fill it has not written it."""
    uri, behind, point = space
    with open(point / "x", "w+b") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<i8", "fortran_order": False, "shape": (9,)})
        file.flush()
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(write)
            os.read(read, 1)
            os.pwrite(file.fileno(), np.arange(9).tobytes(), file.tell())
            os._exit(0)
    assert not (point / "x").exists() and not (behind / "x").exists()
    os.close(read), os.close(write)
    os.waitpid(child, 0)
    wait_until((point / "x").exists, "the array")
    assert np.load(point / "x").tolist() == list(range(9))


def test_exec_closes_too(space):
    """While a process is in exec much of /proc waits for it, and it waits for the daemon."""
    uri, behind, point = space
    for run in (
        lambda: os.system("true"),
        lambda: os.waitpid(os.posix_spawn("/bin/true", ["true"], {}), 0),
        lambda: subprocess.run(["true"], close_fds=False, timeout=30),
    ):
        with open(point / "x", "wb", buffering=0) as file:
            file.write(npy(A)[:5000])
            run()
            assert os.listdir(point) == []
            file.write(npy(A)[5000:])
            run()
            assert os.listdir(point) == []
        assert (behind / "x").read_bytes() == npy(A)
        os.unlink(point / "x")
    # The writer itself, complete and not.
    script = """
        import os, sys
        data = open(sys.argv[2], "rb").read()
        fds = [os.open(f"{sys.argv[1]}/{n}", os.O_WRONLY | os.O_CREAT) for n in "xy"]
        os.write(fds[0], data), os.write(fds[1], data[:-1])
        os.execv("/bin/true", ["true"])
    """
    (point.parent / "a.npy").write_bytes(npy(A))
    python(script, point, point.parent / "a.npy")
    assert (behind / "x").read_bytes() == npy(A)
    assert os.listdir(point) == ["x"]

    # What is about to be started has copies for a moment; the array is there all the same. To a daemon
    # that is slow, because of a sanitizer, the moment may be too long.
    slow = "SHARR_SHARRFS" in os.environ
    lost, heard = [], []

    def save(number):
        for i in range(30):
            path = point / f"t{number}"
            path.write_bytes(npy(B))
            if slow:
                wait_until(path.exists, "the array")
            lost.extend([path] if not path.exists() else [])
            path.unlink()
            try:
                path.write_bytes(npy(B)[:-1])
            except OSError as error:
                heard.append(error.errno)
        path.write_bytes(npy(B))

    threads = [threading.Thread(target=save, args=[number]) for number in range(3)]
    [thread.start() for thread in threads]
    while any(thread.is_alive() for thread in threads):
        os.waitpid(os.posix_spawn("/bin/true", ["true"], {}), 0)
    assert not lost and (heard == [errno.EINVAL] * 90 or slow)
    assert all((behind / f"t{number}").read_bytes() == npy(B) for number in range(3))


def test_opened_again_by_its_descriptor(space, tmp_path):
    """As /dev/stdout has it: there is no name yet."""
    uri, behind, point = space
    (tmp_path / "a.npy").write_bytes(npy(A))
    for script in ('cp "$1" /dev/stdout > "$2"', 'cat "$1" > /dev/stdout > "$2"',
                   'dd if="$1" of=/dev/stdout status=none > "$2"', '(cat "$1" > /dev/stdout) > "$2"',
                   'tee /dev/stderr < "$1" 2> "$2" > /dev/null'):  # fmt: skip
        sh(script, tmp_path / "a.npy", point / "x")
        assert (behind / "x").read_bytes() == npy(A), script
        os.unlink(point / "x")


def test_busy_with_something_that_waits_for_the_daemon(space):
    """/proc tells of an epoll descriptor when nobody adds to it, which may be who asks the daemon."""
    uri, behind, point = space
    (point / "x").write_bytes(npy(B))
    (pid,) = daemons(point)
    script = """
        import os, select, sys, threading, time
        point, pid, data = sys.argv[1], int(sys.argv[2]), open(f"{sys.argv[1]}/x", "rb").read()
        files = [os.open(f"{point}/f{i}", os.O_WRONLY | os.O_CREAT) for i in range(12)]
        for file in files:
            os.write(file, data)
        polled = os.open(f"{point}/x", os.O_RDONLY)
        epoll = select.epoll()
        os.kill(pid, 19)
        threads = [threading.Thread(target=os.close, args=[file]) for file in files]
        def register():
            try:
                epoll.register(polled)
            except OSError:
                pass  # a file without poll
        threads.append(threading.Thread(target=register))
        for thread in threads:
            thread.start()
            time.sleep(0.02)
        os.kill(pid, 18)
        for thread in threads:
            thread.join(30)
        print(sum(thread.is_alive() for thread in threads), flush=True)
        os._exit(0)
    """
    assert python(script, point, pid) == "0\n"
    wait_until(lambda: len(os.listdir(behind)) == 13, "all arrays")


def test_passed_through_a_socket(space):
    uri, behind, point = space
    data = npy(A)
    one, two = socket.socketpair()
    fd = os.open(point / "x", os.O_WRONLY | os.O_CREAT)
    os.write(fd, data[:100])
    socket.send_fds(one, [b"x"], [fd])
    with contextlib.suppress(OSError):  # nobody can see the one on its way
        os.close(fd)
    _, (fd,), _, _ = socket.recv_fds(two, 1, 1)
    os.write(fd, data[100:])
    os.close(fd)
    assert (behind / "x").read_bytes() == data


def test_killed_writers_leave_nothing(space, tmp_path):
    """At any moment: also with all written and nothing closed, or the size set before the data."""
    uri, behind, point = space
    script = """
        import os, signal, sys
        path, data, step, full, over = sys.argv[1], open(sys.argv[2], "rb").read(), *map(int, sys.argv[3:])
        fd = os.open(path, os.O_RDWR | os.O_CREAT | (os.O_TRUNC if over else os.O_EXCL))
        if full:
            os.ftruncate(fd, len(data))
        for start in range(0, step * 10_000, 10_000):
            os.pwrite(fd, data[start : start + 10_000], start)
        os.kill(os.getpid(), signal.SIGTERM if full else signal.SIGKILL)
    """
    (tmp_path / "a").write_bytes(npy(A))
    for over in (0, 1):
        if over:
            (point / "x").write_bytes(npy(B))
        for full in (0, 1):
            for step in (0, 1, 2, 16, 17):
                done = python(script, point / "x", tmp_path / "a", step, full, over, check=False)
                assert done.returncode in (-signal.SIGKILL, -signal.SIGTERM), done.stderr
                assert os.listdir(behind) == (["x"] if over else [])
                if over:
                    assert (point / "x").read_bytes() == npy(B)
    (pid,) = daemons(point)
    open_files = lambda: [os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")]
    def released():
        with contextlib.suppress(FileNotFoundError):
            return not any(str(behind) in name and "deleted" in name for name in open_files())
    wait_until(released, "the drafts to go")


def test_a_killed_child_does_not_spoil_its_parents_file(space):
    uri, behind, point = space
    fd = os.open(point / "x", os.O_WRONLY | os.O_CREAT)
    os.write(fd, npy(A)[:100])
    child = os.fork()
    if child == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    os.write(fd, npy(A)[100:])
    os.close(fd)
    assert (behind / "x").read_bytes() == npy(A)


def test_a_killed_daemon_leaves_nothing(space, tmp_path):
    uri, behind, point = space
    (point / "x").write_bytes(npy(B))
    fds = [os.open(point / n, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) for n in ("x", "y")]
    for fd in fds:
        os.write(fd, npy(A))
    (pid,) = daemons(point)
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not daemons(point), "its end")
    for fd in fds:
        with pytest.raises(OSError):
            os.close(fd)
    assert os.listdir(behind) == ["x"] and (behind / "x").read_bytes() == npy(B)


@needs_root
@pytest.mark.parametrize("options", [[], ["-o", "direct_io"]])
@pytest.mark.parametrize("how", ["write", "hole", "grown", "declared", "over"])
def test_full(tmp_path, options, how):
    """ENOSPC at write or at close, and nothing is left."""
    source, point = tmp_path / "source", tmp_path / "mnt"
    source.mkdir(), point.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", source], check=True)
    try:
        with mounting(f"file://{source}", point, *options):
            if how == "over":
                (point / "x").write_bytes(npy(np.ones(1 << 19)))  # half of it
            free = os.statvfs(source).f_bfree
            data = npy(np.ones(1 << (19 if how == "over" else 20)))
            fd = os.open(point / "x", os.O_RDWR | os.O_CREAT | os.O_TRUNC)
            if how in ("write", "over"):
                with pytest.raises(OSError) as error:
                    for start in range(0, len(data), 1 << 20):
                        os.pwrite(fd, data[start : start + (1 << 20)], start)
                assert error.value.errno == errno.ENOSPC
                fails(errno.ENOSPC, os.close, fd)  # what `with open(...)` would raise
            elif how == "hole":
                os.write(fd, data[:4096])
                os.pwrite(fd, data[-1:], len(data) - 1)
                fails(errno.ENOSPC, os.close, fd)
            elif how == "grown":  # and so nothing that can be mapped but is not there
                os.write(fd, data[:4096])
                fails(errno.ENOSPC, os.ftruncate, fd, len(data))
                assert os.fstat(fd).st_size == 4096
                fails(errno.EINVAL, os.close, fd)
            else:
                os.write(fd, data[:128])
                fails(errno.ENOSPC, os.close, fd)
            assert os.listdir(source) == (["x"] if how == "over" else [])
            wait_until(lambda: os.statvfs(source).f_bfree == free, "the space to be free again")
            if how == "over":
                assert np.load(point / "x").sum() == 1 << 19
            (point / "y").write_bytes(npy(np.ones(1 << 18)))  # what fits, fits
    finally:
        subprocess.run(["umount", source], check=True)


def test_holes_get_memory(space):
    uri, behind, point = space
    data = npy(np.zeros(1 << 20))
    with open(point / "x", "wb") as file:
        file.write(data[:128])
        file.truncate(len(data))
    assert os.stat(behind / "x").st_blocks * 512 >= len(data)
    assert not np.load(point / "x").any()


# In the place of another


def test_an_open_that_comes_to_nothing_leaves_no_trace(space):
    """Opening with O_TRUNC takes the kernel two looks, and in between the name can go."""
    uri, behind, point = space
    script = """
        import os, sys
        behind, point = sys.argv[1:]
        GONE = (2, 116)  # ENOENT; ESTALE: gone each time the kernel has looked
        for i in range(3000):
            try:
                os.close(os.open(f"{point}/d/x", os.O_WRONLY | os.O_TRUNC))
            except OSError as error:
                assert error.errno in GONE + (22,), error  # EINVAL: nothing was written
            try:
                with open(f"{point}/d/x", "rb") as file:
                    assert len(file.read()) == 168
            except OSError as error:
                assert error.errno in GONE, error
            try:
                status = os.stat(f"{point}/d/x")
                assert status.st_size == 168, status
            except OSError as error:
                assert error.errno in GONE, error
    """
    (behind / "d").mkdir()
    data = npy(np.arange(5.0))
    (behind / "d/x").write_bytes(data)
    assert len(data) == 168
    child = subprocess.Popen([PYTHON, "-c", textwrap.dedent(script), behind, point], stderr=-1, text=True)
    while child.poll() is None:
        for one, other in (("d", "e"), ("e", "d")):
            os.rename(behind / one, behind / other)
        os.rename(behind / "d/x", behind / "d/y"), os.rename(behind / "d/y", behind / "d/x")
    assert child.wait() == 0, child.stderr.read()
    child.stderr.close()
    assert (behind / "d/x").read_bytes() == data
    (pid,) = daemons(point)
    for target in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):
            assert "(deleted)" not in os.readlink(f"/proc/{pid}/fd/{target}").replace("/dev/shm/#", "")


def test_whoever_has_the_old_one_keeps_it(space, mode):
    uri, behind, point = space
    (point / "x").write_bytes(npy(A))
    attached = sharr.attach(f"{uri}/x")
    reader = open(point / "x", "rb")
    writer = open(point / "x", "r+b", buffering=0)
    mapped = np.load(point / "x", mmap_mode="r") if mode == NATIVE else None
    np.save(behind / "other.npy", A + 1)
    for replace in (
        lambda: (point / "x").write_bytes(npy(B)),
        lambda: os.replace(point / "other.npy", point / "x"),
    ):
        replace()
        assert reader.seek(0) == 0 and reader.read() == npy(A)
        assert os.fstat(reader.fileno()).st_size == len(npy(A))
        assert attached.tolist() == A.tolist()
        assert mapped is None or mapped.tolist() == A.tolist()
    assert os.pwrite(writer.fileno(), b"\1" * 8, 128) == 8  # into the old one
    assert attached[0, 0] != A[0, 0] and reader.seek(128) and reader.read(8) == b"\1" * 8
    assert np.load(point / "x").tolist() == (A + 1).tolist()
    reader.close(), writer.close()


def test_the_name_is_never_away_nor_half(space):
    """Written over again and again, from two sides, it is always there and always whole."""
    uri, behind, point = space
    (point / "x").write_bytes(npy(np.full(1000, 0)))
    script = """
        import io, itertools, sys, numpy as np
        for i in itertools.count(int(sys.argv[2]), 2):
            file = io.BytesIO()
            np.save(file, np.full(1000 + i % 100, i))
            open(sys.argv[1], "wb").write(file.getvalue())
    """
    writers = [
        subprocess.Popen([PYTHON, "-c", textwrap.dedent(script), point / "x", str(i)])
        for i in range(2)
    ]
    try:
        seen = set()
        while len(seen) < 300:
            for where in (point / "x", behind / "x"):
                value = np.load(where)
                assert (value == value[0]).all()
                seen.add(int(value[0]))
            seen.add(int(sharr.attach(f"{uri}/x", "r")[0]))
        assert all(writer.poll() is None for writer in writers)
    finally:
        for writer in writers:
            writer.kill()
            writer.wait()
    assert os.listdir(point) == ["x"]
    assert os.listdir(behind) == ["x"]


def test_overwriting_keeps_owner_and_mode(space):
    uri, behind, point = space
    (point / "x").write_bytes(npy(A))
    os.chmod(point / "x", 0o604)
    if os.geteuid() == 0:
        os.chown(point / "x", 1234, 4321)
    before = os.stat(behind / "x")
    (point / "x").write_bytes(npy(B))
    after = os.stat(behind / "x")
    assert before.st_ino != after.st_ino
    for field in ("st_mode", "st_uid", "st_gid"):
        assert getattr(before, field) == getattr(after, field)


def test_an_open_that_has_failed_is_in_nobodys_way(space, mode):
    """What it had begun stays with the thread, which does not see it."""
    uri, behind, point = space

    def fail_to_open(data=npy(A)):
        assert not (point / "nothing").exists()  # an error ends what was begun before
        (behind / "x").write_bytes(data)
        # By no name, so that the kernel looks at nothing in between; and what has only the name of it
        # is not open.
        fd = os.open(point / "x", os.O_PATH)
        fails(errno.ESTALE, os.open, f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_TRUNC)
        os.close(fd)

    def shape():
        return os.getxattr(point / "x", "user.sharr.shape").decode()

    fail_to_open()
    assert os.stat(point / "x").st_size == len(npy(A))
    assert shape() == str(A.shape)
    fail_to_open()
    assert len(os.listxattr(point / "x")) > 5
    fail_to_open()
    os.utime(point / "x", (1, 2))
    assert os.stat(behind / "x").st_mtime == os.stat(point / "x").st_mtime == 2
    fail_to_open()
    assert (point / "x").read_bytes() == npy(A)
    fail_to_open()
    fails(errno.EPERM, os.truncate, point / "x", 0)
    fail_to_open(npy(B))
    assert shape() == str(B.shape)
    fail_to_open()
    os.replace(point / "x", point / "y")
    fails(errno.ENOENT, os.stat, point / "x")
    assert (behind / "y").read_bytes() == npy(A)
    fail_to_open()
    os.unlink(behind / "x")
    wait_until(lambda: not (point / "x").exists(), "x to be gone")
    fail_to_open()
    with open(point / "x", "wb") as file:  # at last
        file.write(npy(B))
    assert (behind / "x").read_bytes() == npy(B)
    assert sorted(os.listdir(behind)) == ["x", "y"]


def test_a_size_is_for_good(space, mode):
    uri, behind, point = space
    (point / "x").write_bytes(npy(A))
    size = len(npy(A))
    for wanted in (0, 10, 128, size - 1, size + 1, 1 << 40):
        fails(errno.EPERM, os.truncate, point / "x", wanted)
        with open(point / "x", "r+b") as file:
            fails(errno.EPERM, os.ftruncate, file.fileno(), wanted)
            fails(errno.EPERM, os.posix_fallocate, file.fileno(), 0, wanted + size + 1)
    os.truncate(point / "x", size)  # no change
    if shutil.which("rsync"):
        np.save(point.parent / "a.npy", A + 1)
        sh('rsync -I --inplace "$1" "$2"', point.parent / "a.npy", point / "x")
        assert np.load(behind / "x").tolist() == (A + 1).tolist()
        np.save(behind / "x2.npy", A), os.rename(behind / "x2.npy", behind / "x")
    fails(errno.EPERM, open, point / "x", "ab")
    assert sh('echo more >> "$1"', point / "x", check=False).returncode == 1
    punch = sh('fallocate -p -o 0 -l 4096 "$1"', point / "x", check=False)
    assert punch.returncode == 1 and b"Operation not permitted" in punch.stderr
    # Not by a name: the kernel does not look it up anew.
    with open(point / "x", "rb") as file:
        fails(errno.ESTALE, open, f"/proc/self/fd/{file.fileno()}", "wb")
    assert (behind / "x").read_bytes() == npy(A)
    (point / "x").write_bytes(npy(B))  # which has spoilt nothing


def test_writes_beyond_the_end_leave_nothing(space, mode):
    uri, behind, point = space
    a = sharr.create(f"{uri}/a", 1000, "u1")
    fd = os.open(point / "a", os.O_RDWR)
    other = os.open(point / "a", os.O_RDONLY)
    if mode == DIRECT:
        assert os.pwrite(fd, b"x" * 200, 4096 + 900) == 100
        fails(errno.EPERM, os.pwrite, fd, b"x", 4096 + 1000)
        fails(errno.EPERM, os.pwrite, fd, b"x", 1 << 30)
    else:
        # The kernel asks nobody; what came too much goes when the writer closes.
        os.pwrite(fd, b"x" * 200, 4096 + 900)
        os.pwrite(fd, b"x", 100_000)
        assert sharr.attach(f"{uri}/a").size == 1000
    os.close(fd)
    assert os.stat(behind / "a").st_size == 4096 + 1000
    assert a[900:].tobytes() == b"x" * 100 and not a[:900].any()
    assert os.fstat(other).st_size == 5096
    os.close(other)


def test_writers_beyond_the_end_who_come_and_go(space, mode):
    """What one notes while another is beyond the end is not what the array was."""
    uri, behind, point = space
    if mode == DIRECT:
        pytest.skip("nobody gets there")
    (point / "x").write_bytes(npy(A))
    size = os.stat(point / "x").st_size
    script = """
        import os, sys, time
        end = time.monotonic() + 1
        while time.monotonic() < end:
            fd = os.open(sys.argv[1], os.O_RDWR)
            os.pwrite(fd, b"more", int(sys.argv[2]))
            os.close(fd)
    """
    with open(point / "x", "rb"):
        writers = [
            subprocess.Popen([PYTHON, "-c", textwrap.dedent(script), point / "x", str(size + 1000 * i)])
            for i in range(3)
        ]
        assert [writer.wait() for writer in writers] == [0, 0, 0]
        assert os.stat(behind / "x").st_size == size
    os.close(os.open(point / "x", os.O_RDWR))
    assert (behind / "x").read_bytes() == npy(A)


def test_the_header_is_for_good(space, mode):
    """Written in place an array stays one: what is none is refused, or undone at close."""
    uri, behind, point = space
    for where, data in ((0, b"garbage"), (0, b"\0" * 200), (8, b"\xff\xff"), (127, b"x")):
        (point / "x").write_bytes(npy(A))
        # Whoever reads has opened it first, which is not when it is noted what it was.
        with open(point / "x", "rb"), open(point / "x", "r+b", buffering=0) as file:
            if mode == DIRECT:
                fails(errno.EPERM, os.pwrite, file.fileno(), data, where)
            else:
                os.pwrite(file.fileno(), data, where)
                os.pwrite(file.fileno(), b"y" * 1000, len(npy(A)))
        left = (behind / "x").read_bytes()
        assert left[:128] == npy(A)[:128] and len(left) == len(npy(A)) and left[200:] == npy(A)[200:]
        with open(point / "x", "r+b", buffering=0) as file:
            file.write(npy(A + 1))  # the same header
        assert np.load(point / "x").tolist() == (A + 1).tolist()
        os.unlink(point / "x")


def test_one_winner(space, tmp_path):
    """Of many processes that open with O_CREAT and O_EXCL at once, for each of many names."""
    uri, behind, point = space
    np.save(tmp_path / "b.npy", B)
    script = """
        import os, sys
        won = []
        sys.stdin.readline()
        for i in range(40):
            try:
                fd = os.open(f"{sys.argv[1]}/{i}", os.O_WRONLY | os.O_CREAT | os.O_EXCL)
            except FileExistsError:
                continue
            won.append((i, fd))
        print(*(i for i, fd in won), flush=True)
        sys.stdin.readline()  # holds them until all have tried
        for i, fd in won:
            os.write(fd, open(sys.argv[2], "rb").read())
            os.close(fd)
    """
    children = [
        subprocess.Popen([PYTHON, "-c", textwrap.dedent(script), point, tmp_path / "b.npy"],
                         stdin=-1, stdout=-1, text=True)
        for _ in range(8)
    ]  # fmt: skip
    for child in children:
        child.stdin.write("\n"), child.stdin.flush()
    won = [int(i) for child in children for i in child.stdout.readline().split()]
    assert sorted(won) == list(range(40))
    assert os.listdir(behind) == []
    for child in children:
        child.communicate("\n")
        assert child.returncode == 0
    assert all((behind / f"{i}").read_bytes() == npy(B) for i in range(40))


def test_one_winner_of_threads(space):
    uri, behind, point = space
    for i in range(30):
        barrier, won, lost = threading.Barrier(8), [], []

        def attempt():
            barrier.wait()
            try:
                won.append(os.open(point / f"{i}", os.O_WRONLY | os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                lost.append(1)

        threads = [threading.Thread(target=attempt) for _ in range(8)]
        [thread.start() for thread in threads], [thread.join() for thread in threads]
        assert len(won) == 1 and len(lost) == 7
        os.write(won[0], npy(B))
        os.close(won[0])
        assert (behind / f"{i}").read_bytes() == npy(B)
        fails(errno.EEXIST, os.open, point / f"{i}", os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    # A name that came to nothing is free again.
    fd = os.open(point / "x", os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    fails(errno.EEXIST, os.open, point / "x", os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    fails(errno.EINVAL, os.close, fd)

    def free():
        with contextlib.suppress(FileExistsError), open(point / "x", "xb") as file:
            return file.write(npy(B))

    wait_until(free, "the name to be free again")
    assert (behind / "x").read_bytes() == npy(B)


def test_published_beside_meanwhile(space):
    uri, behind, point = space
    for flags, outcome in ((os.O_EXCL, errno.EEXIST), (0, 0)):
        fd = os.open(point / "x", os.O_WRONLY | os.O_CREAT | flags)
        os.write(fd, npy(B))
        a = sharr.create(f"{uri}/x", 7)
        if outcome:
            fails(outcome, os.close, fd)
            assert sharr.attach(f"{uri}/x").shape == (7,)
        else:
            os.close(fd)
            assert (point / "x").read_bytes() == npy(B) and a.shape == (7,)
        os.unlink(point / "x")
    (behind / "text").write_text("no array")  # which is not shown, and not replaced either
    fails(errno.EEXIST, open, point / "text", "wb")
    fd = os.open(point / "later", os.O_WRONLY | os.O_CREAT)
    os.write(fd, npy(B))
    (behind / "later").write_text("no array")
    fails(errno.EEXIST, os.close, fd)
    fd = os.open(point / "dir", os.O_WRONLY | os.O_CREAT)
    os.write(fd, npy(B))
    (behind / "dir").mkdir()
    fails(errno.EISDIR, os.close, fd)
    assert (behind / "text").read_text() == (behind / "later").read_text() == "no array"


def test_removed_while_it_is_written(space):
    """The directory beneath, and the name that is written over."""
    uri, behind, point = space
    (point / "d").mkdir()
    (point / "e").mkdir()
    fds = [os.open(point / n, os.O_WRONLY | os.O_CREAT) for n in ("d/x", "e/x")]
    for fd in fds:
        os.write(fd, npy(A))
    (point / "d").rmdir()
    fails(errno.ENOENT, os.close, fds[0])
    os.rename(point / "e", point / "f")  # which moves what is written in it
    os.close(fds[1])
    assert (behind / "f/x").read_bytes() == npy(A)
    fd = os.open(point / "f/x", os.O_WRONLY | os.O_TRUNC)
    os.write(fd, npy(B))
    os.unlink(point / "f/x")
    os.close(fd)
    assert (behind / "f/x").read_bytes() == npy(B)


def test_fallocate_is_for_what_is_being_written(space):
    uri, behind, point = space
    data = npy(A)
    with open(point / "x", "wb") as file:
        os.posix_fallocate(file.fileno(), 0, len(data))
        file.write(data)
    assert (behind / "x").read_bytes() == data


def test_names_that_are_no_arrays(space):
    uri, behind, point = space
    fails(errno.EINVAL, open, point / ".sharr-tmp-x", "wb")
    fails(errno.EINVAL, os.mkdir, point / ".sharr-tmp-x")
    (point / "x").write_bytes(npy(B))
    fails(errno.EINVAL, os.rename, point / "x", point / ".sharr-tmp-x")
    fails(errno.ENAMETOOLONG, open, point / ("x" * 256), "wb")
    fails(errno.ENAMETOOLONG, os.stat, point / ("x" * 256))
    (point / ("x" * 255)).write_bytes(npy(B))
    assert (behind / ("x" * 255)).read_bytes() == npy(B)


def test_the_log_says_why(name, tmp_path, mode):
    daemon = subprocess.Popen(
        [sharrfs_binary(), "-f", "shm://", tmp_path, *(["-o", "direct_io"] if mode == DIRECT else [])],
        stderr=-1, text=True,
    )  # fmt: skip
    # On a machine without inotify instances left there is a line on that before.
    assert any(line.startswith("sharrfs: shm:// on ") for line in daemon.stderr)
    try:
        fails(errno.EINVAL, (tmp_path / f"{name}\n").write_bytes, npy(A)[:-1])
        line = daemon.stderr.readline()
        assert line == (
            f"sharrfs: shm://{name}\\x0a: not published: truncated: (300, 70) of <f8 need "
            f"{len(npy(A))} bytes, the file has {len(npy(A)) - 1}\n"
        )
    finally:
        daemon.terminate()
        assert daemon.wait(30) == 0
        daemon.stderr.close()


@needs_strace
def test_the_library_finds_what_is_behind_at_once(space):
    """What the kernel remembers of the directory is older than the array before."""
    uri, behind, point = space
    calls = traced("", "for i in range(20): sharr.create(f'{sys.argv[1]}/{i}', 3)", point)
    assert calls.count("getxattr") == 20 and len(os.listdir(behind)) == 20
    calls = traced("", "for i in range(20): sharr.attach(f'{sys.argv[1]}/{i}')[:] = i", point)
    assert calls.count("fgetxattr") == 20


def test_the_library_creates_by_the_mounts_path(space):
    """Behind the mount, at once and with all its memory."""
    uri, behind, point = space
    (point / "d").mkdir()
    for path in (point / "d/a", f"file://{point}/b"):
        a = sharr.create(path, (3, 4))
        a[:] = 5
        with open("/proc/self/maps") as maps:
            assert any(str(behind) in line for line in maps)
        assert (np.load(str(path).removeprefix("file://")) == 5).all()
        fails(errno.EEXIST, sharr.create, path, 3)
        sharr.delete(path)
    assert os.listdir(behind) == ["d"] and os.listdir(behind / "d") == []


@needs_root
def test_an_acl_stays_when_its_file_is_overwritten(space):
    """Without it the mode, which bounds what it grants, would grant it to the group."""
    uri, behind, point = space
    (behind / "x").write_bytes(npy(A))
    entries = [(1, 6, 2**32 - 1), (2, 6, 65534), (4, 0, 2**32 - 1), (16, 6, 2**32 - 1), (32, 0, 2**32 - 1)]
    acl = struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)
    try:
        os.setxattr(behind / "x", "system.posix_acl_access", acl)
    except OSError:
        pytest.skip("no ACLs here")
    (point / "x").write_bytes(npy(B))
    assert (behind / "x").read_bytes() == npy(B)
    assert os.getxattr(behind / "x", "system.posix_acl_access") == acl


@needs_root
def test_overwriting_adds_no_acl(space):
    """Of those that a directory gives to what is new in it."""
    uri, behind, point = space
    (behind / "x").write_bytes(npy(A))
    os.chmod(behind / "x", 0o660)
    entries = [(1, 7, 2**32 - 1), (2, 6, 65534), (4, 5, 2**32 - 1), (16, 7, 2**32 - 1), (32, 5, 2**32 - 1)]
    acl = struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)
    try:
        os.setxattr(behind, "system.posix_acl_default", acl)
    except OSError:
        pytest.skip("no ACLs here")
    (point / "x").write_bytes(npy(B))
    assert (behind / "x").read_bytes() == npy(B)
    fails(errno.ENODATA, os.getxattr, behind / "x", "system.posix_acl_access")
    assert os.stat(behind / "x").st_mode & 0o777 == 0o660


@pytest.mark.parametrize("through", [False, True])
def test_what_is_done_to_what_is_being_overwritten(space, through):
    """Counts for what takes its place."""
    uri, behind, point = space
    (behind / "x").write_bytes(npy(A))
    os.chmod(behind / "x", 0o644)
    with open(point / "x", "wb") as file:
        file.write(npy(B))
        os.chmod((point if through else behind) / "x", 0o600)
    assert (behind / "x").read_bytes() == npy(B) and os.stat(behind / "x").st_mode & 0o777 == 0o600
    with open(point / "x", "wb") as file:
        file.write(npy(A))
        os.fchmod(file.fileno(), 0o640)
        os.utime(behind / "x")
    assert (behind / "x").read_bytes() == npy(A) and os.stat(behind / "x").st_mode & 0o777 == 0o640
    with open(point / "x", "wb") as first, open(point / "x", "wb") as second:
        first.write(npy(A)), second.write(npy(B))
        os.chmod((point if through else behind) / "x", 0o604)
    assert (behind / "x").read_bytes() == npy(A) and os.stat(behind / "x").st_mode & 0o777 == 0o604


def test_the_time_that_a_program_sets_stays(space, tmp_path):
    """Also where memory is added when it is closed."""
    uri, behind, point = space
    np.lib.format.open_memmap(tmp_path / "x", "w+", "f8", (200_000,))
    os.utime(tmp_path / "x", (5, 6))
    subprocess.run(["cp", "-p", "--sparse=always", tmp_path / "x", point / "x"], check=True)
    assert os.stat(point / "x").st_mtime == os.stat(behind / "x").st_mtime == 6
    assert os.stat(behind / "x").st_blocks * 512 >= 200_000 * 8


@pytest.mark.parametrize("array", [A, A[0, :16]])
def test_what_is_left_to_another_process_to_fill(space, array):
    """Which is no child of the one that has opened it."""
    uri, behind, point = space
    data = npy(array)
    fd = os.open(point / "x", os.O_RDWR | os.O_CREAT, 0o644)
    os.write(fd, data[:128]), os.ftruncate(fd, len(data))
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        if os.fork() == 0:
            os.close(write)
            os.read(read, 1)
            os.pwrite(fd, data[128:], 128)
        os._exit(0)
    os.waitpid(child, 0)
    os.close(fd)
    early = (point / "x").exists()
    os.close(write), os.close(read)
    wait_until((point / "x").exists, "it to be closed")
    assert not early and (point / "x").read_bytes() == data


@pytest.mark.parametrize("again", [False, True])
def test_what_another_process_has_opened_by_its_descriptor(space, again):
    """Neither has got it from the other, and nothing of it is missing."""
    uri, behind, point = space
    data = npy(A)
    fd = os.open(point / "x", os.O_RDWR | os.O_CREAT, 0o644)
    os.write(fd, data[:128] + bytes(len(data) - 128))
    path = f"/proc/{os.getpid()}/fd/{fd}"
    (opened, opens), (waits, goes) = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        if os.fork() == 0:
            os.close(fd), os.close(goes)
            own = os.open(path, os.O_RDWR)
            if again:  # as a shell does that redirects
                own, opened_first = os.dup(own), own
                os.close(opened_first)
            os.write(opens, b".")
            os.read(waits, 1)
            os.pwrite(own, data[128:], 128)
        os._exit(0)
    os.waitpid(child, 0)
    os.read(opened, 1)
    os.close(fd)
    early = (point / "x").exists()
    for each in (opened, opens, waits, goes):
        os.close(each)
    wait_until((point / "x").exists, "it to be closed")
    assert not early and (point / "x").read_bytes() == data


@needs_root
@pytest.mark.parametrize("options", [[], ["-o", "direct_io"]])
def test_room_for_what_a_draft_grows_by(tmp_path, options):
    """What it has already counts; what the machine has not is refused at once."""
    source, point = tmp_path / "source", tmp_path / "mnt"
    source.mkdir(), point.mkdir()
    for size in ("8m", "0"):  # 0: without a limit
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", source], check=True)
        try:
            with mounting(f"file://{source}", point, *options):
                data = npy(np.ones(6 << 17))
                fd = os.open(point / "x", os.O_RDWR | os.O_CREAT)
                for call in (os.ftruncate, lambda fd, size: os.posix_fallocate(fd, 0, size)):
                    fails(errno.ENOSPC, call, fd, 1 << 44)
                assert os.fstat(fd).st_size == 0
                subprocess.run(["fallocate", "-n", "-l", "6M", f"/proc/{os.getpid()}/fd/{fd}"], check=True)
                os.ftruncate(fd, len(data))
                assert os.pwrite(fd, data, 0) == len(data)
                os.close(fd)
                assert (source / "x").read_bytes() == data
        finally:
            subprocess.run(["umount", source], check=True)


def test_many_closes_at_once_are_all_told(space, tmp_path):
    """However many of them there are: each has the daemon look at other processes."""
    uri, behind, point = space
    mine = tmp_path / "many"
    mine.mkdir()

    def write(number):
        told = True
        for i in range(10):
            with open(mine / f"x{number}-{i}", "wb") as file:
                file.write(npy(A))
            told = told and os.path.exists(file.name)
            fd = os.open(mine / f"y{number}-{i}", os.O_WRONLY | os.O_CREAT)
            os.write(fd, npy(A)[:-8])
            try:
                os.close(fd)
                told = False
            except OSError:
                pass
        return told

    with mounting(uri, mine, "-o", "max_threads=100"):
        read, start = os.pipe()
        writers = []
        for number in range(40):
            writers.append(os.fork())
            if writers[-1] == 0:
                try:
                    os.close(start)
                    os.read(read, 1)
                    os._exit(0 if write(number) else 1)
                finally:
                    os._exit(2)
        os.close(read), os.close(start)
        assert [os.waitpid(writer, 0)[1] for writer in writers] == [0] * 40


@needs_root
def test_a_name_of_ours_removes_nothing_of_others(space):
    """Whoever may rename another's directory may not always empty it: nor may we for him."""
    uri, behind, point = space
    (behind / "shared" / "his").mkdir(parents=True)
    os.chmod(behind / "shared", 0o777)
    (behind / "shared" / "his" / "x").write_bytes(npy(A))
    os.chown(behind / "shared" / "his", 65534, 65534)
    os.rename(behind / "shared" / "his", behind / "shared" / ".sharr-tmp-0")
    assert os.listdir(point / "shared") == []
    assert sharr.list(f"{uri}/shared/") == []
    assert (behind / "shared" / ".sharr-tmp-0" / "x").exists()
    os.chmod(behind / "shared", 0o755)
    assert sharr.list(f"{uri}/shared/") == []
    assert not (behind / "shared" / ".sharr-tmp-0").exists()


def asking(script, mounted_at, source, tmp_path, *args):
    """Runs what makes a daemon ask itself if anything does; then nobody ever gets an answer."""
    with mounting(f"shm://{source}", mounted_at, *args):
        connection = os.minor(os.stat(mounted_at).st_dev)
        child = subprocess.Popen(["bash", "-ec", script], cwd=SHM / source)
        try:
            assert child.wait(timeout=60) == 0
            assert subprocess.run(["ls", mounted_at], timeout=60, capture_output=True).returncode == 0
        except subprocess.TimeoutExpired:
            subprocess.run(["mount", "-t", "fusectl", "fusectl", tmp_path], check=True)
            (tmp_path / str(connection) / "abort").write_text("1")
            subprocess.run(["umount", tmp_path], check=True)
            child.wait()
            raise


@needs_root
@pytest.mark.parametrize("script", [
    # Where it is mounted gets another name, from where nothing is mounted.
    "sleep 0.5; touch t; rm t; sleep 0.1; unshare -m sh -c 'umount -l m; mv m n; sleep 0.5; mv n m'",
    # Its attributes are asked for when the directory has changed.
    "for i in {1..300}; do touch t; rm t; : > m/m || :; done 2> /dev/null",
])  # fmt: skip
def test_a_daemon_asks_itself_nothing(name, script, tmp_path):
    (SHM / name / "m").mkdir(parents=True)
    asking(script, SHM / name / "m", name, tmp_path, "-s")


def test_inside_of_what_it_shows(name):
    """The daemon's one thread comes by its own mount when it lists the source."""
    behind = SHM / name
    (behind / "m").mkdir(parents=True)
    script = """
        import os, sharr, sys
        for i in range(300):
            sharr.create(sys.argv[1] + "/x", 3)
            assert os.listdir(f"/dev/shm/{sys.argv[1]}/m") == ["x"]
            sharr.delete(sys.argv[1] + "/x")
    """
    with mounting(f"shm://{name}", behind / "m", "-s"):
        child = subprocess.Popen([PYTHON, "-c", textwrap.dedent(script), name])
        try:
            assert child.wait(timeout=60) == 0
        except subprocess.TimeoutExpired:  # the child cannot be killed before
            os.kill(daemons(behind / "m")[0], signal.SIGKILL)
            raise
