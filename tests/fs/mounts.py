"""Mounting, and looking at a mount and its daemon: what the tests of the mount share."""

import contextlib
import fcntl
import os
import pathlib
import subprocess

import pytest
from conftest import IS_ROOT, SHM, needs_root, sharrfs_binary, wait_until

NATIVE = "passthrough"
DIRECT = "direct_io"
needs_fuse = pytest.mark.skipif(not os.path.exists("/dev/fuse"), reason="needs /dev/fuse")
MODES = [pytest.param(NATIVE, marks=needs_root), DIRECT]


def mounted(point):
    with open("/proc/self/mounts") as mounts:
        return any(line.split()[1] == str(point) for line in mounts)


def daemons(point):
    """Process ids of the daemons of a mount point."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            argv = pathlib.Path("/proc", pid, "cmdline").read_bytes().split(b"\0")
            if argv[0].endswith(b"sharrfs") and os.fsencode(point) in argv:
                found.append(int(pid))
    return found


def unmount(point):
    command = [*(["umount"] if IS_ROOT else ["fusermount3", "-u"]), str(point)]
    # Whoever is about to end has closed what it had open a moment before the kernel lets it go.
    wait_until(lambda: subprocess.run(command).returncode == 0, "the mount to be free")
    wait_until(lambda: not daemons(point), "the daemon's end")


@contextlib.contextmanager
def alone():
    """Alone of all test runs on the machine, also in other roots, for what holds for all of it."""
    file = os.open("/sys/fs/fuse", os.O_RDONLY)
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
    finally:
        os.close(file)


@contextlib.contextmanager
def mounting(source, point, *options, binary=None):
    done = subprocess.run(
        [binary or sharrfs_binary(), source, str(point), *options], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    try:
        yield point
    finally:
        if mounted(point):
            unmount(point)


@pytest.fixture(params=MODES)
def mode(request):
    return request.param


@pytest.fixture
def space(name, tmp_path, mode):
    """A namespace and its mount: (URI, path behind, path of the mount)."""
    (SHM / name).mkdir()
    point = tmp_path / "mnt"
    point.mkdir()
    with mounting(f"shm://{name}", point, *(["-o", "direct_io"] if mode == DIRECT else [])):
        yield f"shm://{name}", SHM / name, point


def attributes(path):
    return {key: os.getxattr(path, key).decode() for key in os.listxattr(path)}


def fails(number, call, *args, **kwargs):
    with pytest.raises(OSError) as error:
        call(*args, **kwargs)
    assert error.value.errno == number, error.value
