"""The sharrfs mount: held against the directory behind it, with and without passthrough."""

import contextlib
import errno
import fcntl
import filecmp
import mmap
import os
import pathlib
import select
import shutil
import signal
import stat
import subprocess
import textwrap

import numpy as np
import pytest
import sharr
from conftest import (
    IS_ROOT, NOBODY, PYTHON, SHM, as_nobody, needs_root, python, sharrfs_binary,
    wait_until,
)  # fmt: skip
from mounts import (  # the fixtures come by import
    DIRECT, NATIVE, attributes, daemons, fails, mode, mounted, mounting, needs_fuse, space, unmount,
)  # fmt: skip

pytestmark = needs_fuse


# What is there


def test_entries_are_those_behind(space):
    uri, behind, point = space
    sharr.create(f"{uri}/a", (3, 4))[:] = 1
    sharr.create(f"{uri}/jobs/7/b", 100_000, "f4")
    sharr.create(f"{uri}/sparse", 1 << 24, "u1", reserve=False)
    os.chmod(behind / "a", 0o640)
    os.utime(behind / "a", ns=(10**18 + 1, 10**18 + 2))
    (behind / "text").write_text("no array")
    (behind / "short").write_bytes((behind / "a").read_bytes()[:4100])
    os.mkfifo(behind / "fifo")
    os.symlink("a", behind / "link")
    os.symlink("jobs", behind / "dirlink")
    temporary = open(behind / ".sharr-tmp-0", "wb")
    fcntl.flock(temporary, fcntl.LOCK_SH)  # its maker lives
    temporary.write((behind / "a").read_bytes())
    assert sorted(os.listdir(point)) == ["a", "jobs", "sparse"]
    assert os.listdir(point / "jobs") == ["7"] and os.listdir(point / "jobs/7") == ["b"]
    for other in ("text", "short", "fifo", "link", "dirlink", "dirlink/7", ".sharr-tmp-0", "no"):
        fails(errno.ENOENT, os.lstat, point / other)
    for path in (".", "a", "jobs", "jobs/7", "jobs/7/b", "sparse"):
        ours, native = os.stat(point / path), os.stat(behind / path)
        for field in ("st_ino", "st_mode", "st_nlink", "st_uid", "st_gid", "st_size", "st_mtime_ns",
                      "st_ctime_ns", "st_blocks"):  # fmt: skip
            assert getattr(ours, field) == getattr(native, field), (path, field)
    found = subprocess.run(["find", ".", "-type", "f"], cwd=point, capture_output=True, text=True)
    assert sorted(found.stdout.split()) == ["./a", "./jobs/7/b", "./sparse"]
    du = [subprocess.run(["du", "-k", where / "jobs/7/b"], capture_output=True).stdout.split()[0]
          for where in (point, behind)]  # fmt: skip
    assert du[0] == du[1]
    ours, native = os.statvfs(point), os.statvfs(behind)
    assert (ours.f_blocks, ours.f_bsize, ours.f_namemax) == (
        native.f_blocks, native.f_bsize, native.f_namemax,
    )  # fmt: skip
    for entry in os.scandir(point):
        assert entry.is_dir() == (entry.name == "jobs") and entry.is_file() != entry.is_dir()
        assert entry.inode() == os.stat(behind / entry.name).st_ino
    assert (behind / ".sharr-tmp-0").exists()
    temporary.close()
    os.listdir(point)  # and now it does not
    assert not (behind / ".sharr-tmp-0").exists()


def test_changes_beside_are_seen(space):
    uri, behind, point = space
    for i in range(200):
        sharr.create(f"{uri}/a", i + 1, "u1")
        assert os.stat(point / "a").st_size == 4096 + i + 1
        assert os.listdir(point) == ["a"]
        sharr.delete(f"{uri}/a")
        assert os.listdir(point) == []
        wait_until(lambda: not os.path.exists(point / "a"), "its end")
    os.mkdir(behind / "d")
    assert os.listdir(point) == ["d"]
    os.rmdir(behind / "d")
    wait_until(lambda: not os.path.exists(point / "d"), "its end")
    fails(errno.ENOENT, os.stat, point / "d")
    sharr.create(f"{uri}/x", 3)
    os.rename(behind / "x", behind / "y")
    assert os.listdir(point) == ["y"]
    wait_until(lambda: not os.path.exists(point / "x"), "its end")


def test_many_entries(space):
    uri, _, point = space
    names = {f"array-{i:05}" for i in range(3000)}
    for one in names:
        sharr.create(f"{uri}/{one}", 1, "u1")
    assert set(os.listdir(point)) == names
    with os.scandir(point) as entries:  # in pieces, some deleted on the way
        seen = set()
        for number, entry in enumerate(entries):
            seen.add(entry.name)
            if number == 10:
                for one in sorted(names)[:100]:
                    sharr.delete(f"{uri}/{one}")
    assert seen == names
    assert len(os.listdir(point)) == 2900


# xattrs

XATTR_DTYPES = [
    "f8", "f4", ">f8", "i1", "?", "u2", ">u2", "c8", "c16", "f2", "g", "S5", "U3", ">U3", "V7",
    "M8[ns]", "M8[25s]", ">M8[D]", "m8", "m8[us]",
    [("x", "f4"), ("y", ">i2")], [("x", "f4", (2, 3)), ("n", [("a", "?"), ("b", "M8[ns]")])],
    [(("title", "name"), "f8")], [("日本", "i4"), ("it's", "i1")],
    np.dtype([("a", "u1"), ("b", "f8")]), np.dtype({"names": ["a", "b"], "formats": ["u1", ("f4", 2)],
    "offsets": [3, 10], "itemsize": 20}), [("c", ("f8", (5,)), (2,))],
]  # fmt: skip


@pytest.mark.parametrize("dtype", XATTR_DTYPES, ids=str)
def test_xattrs(space, dtype):
    uri, _, point = space
    for number, shape in enumerate([(), (3,), (2, 0), (3, 4, 5)]):
        for order in "CF":
            a = sharr.create(f"{uri}/{number}{order}", shape, dtype, order=order)
            assert attributes(point / f"{number}{order}") == {
                "user.sharr.dtype": str(a.dtype),
                "user.sharr.descr": str(np.lib.format.dtype_to_descr(a.dtype)),
                "user.sharr.shape": str(shape),
                "user.sharr.order": order,
                "user.sharr.ndim": str(a.ndim),
                "user.sharr.size": str(a.size),
                "user.sharr.itemsize": str(a.itemsize),
                "user.sharr.nbytes": str(a.nbytes),
                "user.sharr.offset": "4096",
                "user.sharr.format": "NPY 3.0" if "日" in str(a.dtype) else "NPY 1.0",
                "user.sharr.uri": f"{uri}/{number}{order}",
            }


def test_other_xattrs(space):
    uri, behind, point = space
    sharr.create(f"{uri}/d/a", 3)
    os.setxattr(behind / "d/a", "trusted.x", b"1") if IS_ROOT else None
    for path in (point, point / "d", point / "d/a"):
        fails(errno.ENODATA, os.getxattr, path, "user.sharr.no")
        fails(errno.ENODATA, os.getxattr, path, "user.other")
        for key in ("user.sharr.dtype", "user.other"):
            fails(errno.EOPNOTSUPP, os.setxattr, path, key, b"f4")
            fails(errno.EOPNOTSUPP, os.removexattr, path, key)
    assert os.listxattr(point / "d") == []
    assert os.getxattr(point / "d", "user.sharr.uri").decode() == f"{uri}/d/"
    shown = subprocess.run(["getfattr", "-d", "a"], cwd=point / "d", capture_output=True, text=True)
    assert 'user.sharr.shape="(3,)"' in shown.stdout.splitlines()


# Reading and writing the pages


def test_reads_are_the_same_bytes(space, tmp_path):
    uri, behind, point = space
    a = sharr.create(f"{uri}/a", (300, 1000))
    a[:] = np.random.default_rng(1).random(a.shape)
    assert filecmp.cmp(point / "a", behind / "a", shallow=False)
    subprocess.run(["cp", point / "a", tmp_path / "a.npy"], check=True)
    assert filecmp.cmp(tmp_path / "a.npy", behind / "a", shallow=False)
    assert (np.load(point / "a") == a).all()
    assert (np.load(point / "a", mmap_mode="c") == a).all()
    sparse = sharr.create(f"{uri}/s", 1 << 22, "u1", reserve=False)
    sparse[1 << 21] = 1
    fd = os.open(point / "s", os.O_RDONLY)
    native = os.open(behind / "s", os.O_RDONLY)
    for whence in (os.SEEK_DATA, os.SEEK_HOLE):
        for offset in (0, 5000, 1 << 21):
            assert os.lseek(fd, offset, whence) == os.lseek(native, offset, whence)
    assert os.pread(fd, 10, 4096 + (1 << 22)) == b""
    os.close(fd), os.close(native)


def test_never_stale(space):
    """A value written on one side is read on the other, each time, by every way."""
    uri, behind, point = space
    a = sharr.create(f"{uri}/a", 5000, "i8")
    fd = os.open(point / "a", os.O_RDWR)
    for i in range(500):
        a[i * 10] = i
        assert int.from_bytes(os.pread(fd, 8, 4096 + i * 80), "little") == i
        os.pwrite(fd, (i + 7).to_bytes(8, "little"), 4096 + i * 80)
        assert a[i * 10] == i + 7
        if i % 50 == 0:
            assert np.load(point / "a")[i * 10] == i + 7
            with open(behind / "a", "r+b") as file:
                file.seek(4096)
                file.write((i + 9).to_bytes(8, "little"))
            assert int.from_bytes(os.pread(fd, 8, 4096), "little") == i + 9
    os.fsync(fd), os.fdatasync(fd)
    os.close(fd)


def test_mapping(space, mode):
    uri, behind, point = space
    a = sharr.create(f"{uri}/a", (3, 1000))
    if mode == DIRECT:
        fails(errno.ENODEV, np.load, point / "a", mmap_mode="r+")
        return
    m = np.load(point / "a", mmap_mode="r+")
    m[1] = 7
    assert (a[1] == 7).all()
    a[2] = 8
    assert (m[2] == 8).all()
    m.flush()
    # The kernel maps the file behind, so its pages are those of the attached array.
    assert (np.load(point / "a", mmap_mode="r")[2] == 8).all()
    with open(point / "a", "r+b") as one, open(behind / "a", "r+b") as other:
        x, y = mmap.mmap(one.fileno(), 0), mmap.mmap(other.fileno(), 0)
        for i in range(4096, len(x), 1000):
            x[i] = i % 251
            assert y[i] == i % 251


@needs_root
def test_passthrough_asks_the_daemon_nothing(name, tmp_path):
    """The daemon is stopped, and reads, writes and page faults of an open file go on."""
    sharr.create(name, 100_000, "u1")[:] = 3
    script = """
        import mmap, os, sys
        file = os.open(sys.argv[1], os.O_RDWR)
        m = mmap.mmap(file, 50_000)  # asks for the size
        os.pwrite(file, b"\\3", 4096)  # a first write after that asks for security.capability
        print(flush=True)
        sys.stdin.readline()
        assert os.pread(file, 5, 5000) == bytes([3] * 5)
        assert os.pwrite(file, b"xyz", 6000) == 3
        assert m[6000:6003] == b"xyz" and m[45_000] == 3
        m[40_000] = 9
        print(os.pread(file, 1, 40_000)[0], flush=True)
    """
    with mounting("shm://", tmp_path):
        (pid,) = daemons(tmp_path)
        child = subprocess.Popen(
            [PYTHON, "-c", textwrap.dedent(script), tmp_path / name], stdin=-1, stdout=-1, text=True
        )
        child.stdout.readline()
        os.kill(pid, signal.SIGSTOP)
        try:
            child.stdin.write("\n"), child.stdin.flush()
            assert select.select([child.stdout], [], [], 20)[0], "it waits for the daemon"
            assert child.stdout.readline() == "9\n"
        finally:
            os.kill(pid, signal.SIGCONT)
            child.communicate()  # closing a file asks the daemon again


# Deleting


def test_rm(space):
    uri, behind, point = space
    a = sharr.create(f"{uri}/d/a", 3)
    subprocess.run(["rm", point / "d/a"], check=True)
    assert os.listdir(behind / "d") == []
    a[:] = 5
    assert a.sum() == 15
    fails(errno.ENOENT, os.unlink, point / "d/a")
    (behind / "text").write_text("no array")
    fails(errno.ENOENT, os.unlink, point / "text")
    assert (behind / "text").exists()
    fails(errno.EISDIR, os.unlink, point / "d")


def test_open_while_deleted_and_replaced(space):
    uri, behind, point = space
    old = sharr.create(f"{uri}/a", 1000, "u1")
    old[:] = 1
    with open(point / "a", "r+b", buffering=0) as file:
        sharr.delete(f"{uri}/a")
        wait_until(lambda: os.fstat(file.fileno()).st_nlink == 0, "its end")
        fails(errno.ENOENT, os.stat, point / "a")
        sharr.create(f"{uri}/a", 1000, "u1")[:] = 2
        assert np.load(point / "a").sum() == 2000
        assert os.pread(file.fileno(), 2, 4096) == b"\1\1"
        os.pwrite(file.fileno(), b"\7", 4096)
        assert old[0] == 7 and sharr.attach(f"{uri}/a")[0] == 2
        with open(f"/proc/self/fd/{file.fileno()}", "rb", buffering=0) as again:
            assert os.pread(again.fileno(), 2, 4096) == b"\7\1"
        assert os.fstat(file.fileno()).st_size == 5096


@needs_root
def test_permissions_of_the_caller(name, tmp_path, public_build):
    """Modes, the sticky bit of /dev/shm and groups hold for whoever calls."""
    tmp_path = pathlib.Path(f"/tmp/{name}")
    tmp_path.mkdir()
    sharr.create(f"{name}-root", 3)
    sharr.create(f"{name}-own", 3)
    sharr.create(f"{name}-private", 3)
    os.chown(SHM / f"{name}-own", NOBODY, NOBODY)
    os.chmod(SHM / f"{name}-private", 0o600)
    sharr.create(f"{name}/group", 3)
    os.chown(SHM / name, 0, 54321)
    os.chmod(SHM / name, 0o770)
    script = """
        import os, sys
        def outcome(f):
            try:
                f()
                return "ok"
            except OSError as error:
                return error.errno
        p = sys.argv[1]
        print([outcome(lambda: os.unlink(p + s)) for s in ("-root", "-own", "-private")],
              [outcome(lambda: open(p + s, m).close()) for s in ("-root", "-private") for m in
               ("rb", "r+b")], outcome(lambda: os.unlink(p + "/group")))
    """

    def run(point, *prefix):
        return subprocess.run(
            [*prefix, PYTHON, "-c", textwrap.dedent(script), f"{point}/{name}"],
            capture_output=True, text=True, cwd="/",
        ).stdout  # fmt: skip

    try:
        with mounting("shm://", tmp_path, "-o", "allow_other"):
            assert run(tmp_path, *as_nobody()) == "[1, 'ok', 1] ['ok', 13, 13, 13] 13\n"
            assert not (SHM / f"{name}-own").exists()
            grouped = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--groups=54321"]
            assert run(tmp_path, *grouped).endswith(" ok\n")
            assert not (SHM / name / "group").exists()
            with open("/proc/self/mounts") as mounts:
                (line,) = [line for line in mounts if f" {tmp_path} " in line]
            assert {"nosuid", "nodev", "default_permissions"} <= set(line.split()[3].split(","))
        with mounting("shm://", tmp_path):
            denied = run(tmp_path, *as_nobody())
        assert denied == "[13, 13, 13] [13, 13, 13, 13] 13\n"
    finally:
        tmp_path.rmdir()


def test_set_id_bits_are_hidden(space):
    uri, behind, point = space
    sharr.create(f"{uri}/a", 3)
    os.chmod(behind / "a", 0o6755)
    assert stat.S_IMODE(os.stat(point / "a").st_mode) == 0o755


# What is refused


def test_what_others_write_beside_is_not_cut(space, mode):
    """The trim at a writer's end is for what went through the mount only."""
    uri, behind, point = space
    np.save(behind / "a.npy", np.zeros(10))
    with open(point / "a.npy", "r+b") as file:
        np.save(behind / "a.npy", np.ones(100_000))  # by somebody else, in place
        file.fileno()
    assert np.load(behind / "a.npy").sum() == 100_000
    reader = os.open(point / "a.npy", os.O_RDONLY)
    np.save(behind / "a.npy", np.ones(200_000))
    with open(point / "a.npy", "r+b", buffering=0) as file:
        os.pwrite(file.fileno(), b"\0" * 8, 1_000_000)
    os.close(reader)
    wait_until(lambda: len(os.listdir(f"/proc/{daemons(point)[0]}/fd")) < 12, "the release")
    assert np.load(behind / "a.npy").sum() == 199_999


def test_a_replaced_name_never_fails(space, mode):
    """One process renames new arrays over a name that always exists; another reads it."""
    uri, behind, point = space
    sharr.create(f"{uri}/a", 100, "u1")
    writer = subprocess.Popen(
        [PYTHON, "-c", textwrap.dedent("""
            import os, sys, sharr
            uri, behind = sys.argv[1:]
            while True:
                sharr.create(f"{uri}/new", 100, "u1")
                os.rename(f"{behind}/new", f"{behind}/a")
        """), uri, behind],
    )  # fmt: skip
    try:
        for turn in range(1000):
            assert os.stat(point / "a").st_size == 4196
            with open(point / "a", "rb") as file:
                assert len(file.read()) == 4196
            # Some milliseconds each: what is behind has to stand still for a moment. Where the
            # mount cannot be mapped, there is nothing to fall back to.
            if mode == NATIVE and turn % 10 == 0:
                assert sharr.attach(point / "a").shape == (100,)
    finally:
        writer.kill()
        writer.wait()


# The library through the mount


def test_attach_by_the_mounts_path(space):
    """Maps what is behind, which the kernel's list of mappings shows."""
    uri, behind, point = space
    sharr.create(f"{uri}/d/a", (3, 4))
    for path in (str(point / "d/a"), point / "d/a", f"file://{point}/d/a"):
        b = sharr.attach(path)
        b[1] += 1
        with open("/proc/self/maps") as maps:
            assert any(str(behind / "d/a") in line for line in maps)
        a = sharr.attach(f"{uri}/d/a")
        assert a.base.addr == b.base.addr  # of one object, by whatever name
        del a, b
    a = sharr.attach(f"{uri}/d/a")
    assert a[1].tolist() == [3] * 4
    assert sharr.info(point / "d/a").shape == (3, 4)
    assert [info.shape for info in sharr.list(point)] == [(3, 4)]
    assert (sharr.attach(point / "d/a", "r") == a).all()
    sharr.delete(point / "d/a")
    assert not (behind / "d/a").exists()


@needs_root
def test_attach_where_what_is_behind_is_out_of_reach(name, tmp_path):
    """Another /dev/shm, as in a container, even with an array of that name and size in it."""
    sharr.create(name, 1000, "u1")[:] = 5
    with mounting("shm://", tmp_path):
        script = """
            import os, sys, sharr
            decoy = sharr.create(sys.argv[1], 1000, "u1")
            a = sharr.attach(f"{sys.argv[2]}/{sys.argv[1]}")
            assert (a == 5).all()
            a[0] = 6
            assert not decoy.any()
            print("ok")
        """
        done = subprocess.run(
            ["unshare", "-m", "sh", "-c", 'mount -t tmpfs tmpfs /dev/shm && exec "$@"', "sh",
             PYTHON, "-c", textwrap.dedent(script), name, tmp_path],
            capture_output=True, text=True,
        )  # fmt: skip
        assert done.stdout == "ok\n", done.stderr
    assert sharr.attach(name)[0] == 6


def test_objects_of_the_sharedarray_package(space):
    """Trailer of 3.1 and later: magic, u64 size, i32 typenum, itemsize, ndims, i64 dims[32]."""
    uri, behind, point = space
    data = np.arange(12, dtype="f4")
    trailer = b"[SharedArray]\0\0\0" + np.array([48], "u8").tobytes()
    trailer += np.array([11, 4, 2], "i4").tobytes() + np.array([3, 4] + [0] * 30, "i8").tobytes()
    (behind / "old").write_bytes(data.tobytes() + trailer)
    shown = attributes(point / "old")
    assert shown["user.sharr.format"] == "SharedArray" and shown["user.sharr.offset"] == "0"
    assert shown["user.sharr.shape"] == "(3, 4)" and shown["user.sharr.dtype"] == "float32"
    assert (point / "old").read_bytes()[:48] == data.tobytes()
    assert sharr.attach(f"{point}/old").tolist() == data.reshape(3, 4).tolist()
    with open(point / "old", "r+b", buffering=0) as file:
        assert os.pwrite(file.fileno(), bytes(100), 40) == 8  # up to the trailer
        fails(errno.EPERM, os.pwrite, file.fileno(), b"\0", 48)
    assert (behind / "old").read_bytes() == data.tobytes()[:40] + bytes(8) + trailer
    os.unlink(point / "old")
    assert os.listdir(behind) == []


def test_create_where_the_mount_hides_something(space, tmp_path):
    """Which is there for ever, and never an array."""
    uri, behind, point = space
    (behind / "x").write_bytes(b"junk")
    (behind / "y").symlink_to("nothing")
    with pytest.raises(sharr.FormatError):
        sharr.create(point / "x", 3, exist_ok=True)
    with pytest.raises(OSError):
        sharr.create(point / "y", 3, exist_ok=True)
    assert (behind / "x").read_bytes() == b"junk"
    if not IS_ROOT:
        return
    np.save(tmp_path / "z.npy", [1.0, 2.0, 3.0]), (behind / "z").touch()
    subprocess.run(["mount", "--bind", tmp_path / "z.npy", behind / "z"], check=True)
    try:
        with pytest.raises(FileExistsError):
            sharr.create(point / "z", 3, exist_ok=True)
    finally:
        subprocess.run(["umount", behind / "z"], check=True)


# The daemon


def daemon_state(pid):
    return len(os.listdir(f"/proc/{pid}/fd"))


def test_nothing_leaks(space):
    uri, _, point = space
    sharr.create(f"{uri}/a", 3)
    (pid,) = daemons(point)
    np.load(point / "a")
    before = daemon_state(pid)
    for i in range(300):
        sharr.create(f"{uri}/{i}", 3)
        np.load(point / f"{i}")
        os.listdir(point)
        attributes(point / f"{i}")
        os.unlink(point / f"{i}")
    wait_until(lambda: daemon_state(pid) <= before, "descriptors to be closed")


def test_deleted_memory_is_free_at_once(space):
    """The daemon holds nothing of an array that it has shown."""
    uri, behind, point = space
    sharr.create(f"{uri}/a", 64 << 20, "u1")
    os.stat(point / "a"), np.load(point / "a", mmap_mode="c"), attributes(point / "a")
    (pid,) = daemons(point)

    def holds():
        with contextlib.suppress(FileNotFoundError):  # closed while we look
            return any(link.readlink().name == "a" for link in pathlib.Path(f"/proc/{pid}/fd").iterdir())
        return True

    wait_until(lambda: not holds(), "the release")
    used = os.statvfs(SHM).f_bfree
    sharr.delete(f"{uri}/a")
    assert (os.statvfs(SHM).f_bfree - used) * 4096 > 32 << 20


def test_kill_9_of_the_daemon(space):
    uri, behind, point = space
    a = sharr.create(f"{uri}/a", 3)
    b = sharr.attach(point / "a")
    (pid,) = daemons(point)
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not daemons(point), "its end")
    a[:] = 7
    assert b.tolist() == sharr.attach(f"{uri}/a").tolist() == [7] * 3
    with pytest.raises(OSError) as error:
        os.listdir(point)
    assert error.value.errno in (errno.ENOTCONN, errno.ECONNABORTED)
    done = subprocess.run([sharrfs_binary(), uri, point], capture_output=True, text=True)
    assert done.returncode != 0 and "umount" in done.stderr
    unmount(point)
    with mounting(uri, point):
        assert np.load(point / "a").tolist() == [7] * 3


@pytest.mark.parametrize("how", [["umount"], ["fusermount3", "-u"], signal.SIGTERM, signal.SIGINT])
def test_ends(name, tmp_path, how):
    if how == ["umount"] and not IS_ROOT:
        pytest.skip("needs root")
    sharr.create(name, 3)
    with mounting("shm://", tmp_path):
        if isinstance(how, list):
            subprocess.run([*how, tmp_path], check=True)
        else:
            os.kill(daemons(tmp_path)[0], how)
        wait_until(lambda: not daemons(tmp_path), "the daemon's end")
        assert not mounted(tmp_path)
    assert sharr.attach(name).shape == (3,)


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_standard_streams(name, tmp_path, closed):
    sharr.create(name, 3)
    done = subprocess.run(
        ["sh", "-c", f'exec "$@" {closed}', "sh", sharrfs_binary(), "shm://", tmp_path]
    )
    assert done.returncode == 0
    assert np.load(tmp_path / name).shape == (3,)
    unmount(tmp_path)


@needs_root
def test_killed_at_start(name, tmp_path):
    """At any moment: the process is gone, and the mount is not there or answers ENOTCONN."""
    for delay in range(40):
        daemon = subprocess.Popen([sharrfs_binary(), "-f", "shm://", tmp_path], stderr=-1)
        if delay % 2:
            wait_until(lambda: mounted(tmp_path) or daemon.poll() is not None, "the mount")
        for _ in range(delay * 500):
            pass
        daemon.kill()
        daemon.communicate(timeout=30)
        if mounted(tmp_path):
            with pytest.raises(OSError):
                os.listdir(tmp_path)
            subprocess.run(["umount", tmp_path], check=True)


def test_foreground(name, tmp_path, mode):
    options = ["-o", "direct_io"] if mode == DIRECT else []
    sharr.create(name, 3)
    daemon = subprocess.Popen(
        [sharrfs_binary(), "-f", "shm://", tmp_path, *options], stderr=-1, text=True
    )
    line = daemon.stderr.readline()
    assert line == f"sharrfs: shm:// on {tmp_path}: {mode}\n"
    assert np.load(tmp_path / name).shape == (3,)
    daemon.send_signal(signal.SIGTERM)
    assert daemon.wait(30) == 0 and not mounted(tmp_path)
    assert daemon.stderr.read() == ""
    daemon.stderr.close()


def test_a_directory_as_source(tmp_path):
    """file:///dir, on whatever file system /tmp is: also relative, also the root of a tree."""
    (tmp_path / "data").mkdir()
    (tmp_path / "mnt").mkdir()
    np.save(tmp_path / "data/a.npy", np.arange(10))
    for source in (f"file://{tmp_path}/data", "file://data", str(tmp_path / "data")):
        done = subprocess.run(
            [sharrfs_binary(), source, "mnt"], cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        try:
            assert os.getxattr(tmp_path / "mnt/a.npy", "user.sharr.uri").decode() == (
                f"file://{tmp_path}/data/a.npy"
            )
            m = np.load(tmp_path / "mnt/a.npy", mmap_mode="r+" if IS_ROOT else None)
            assert m.tolist() == list(range(10))
            del m
        finally:
            unmount(tmp_path / "mnt")


def test_a_mount_below_its_source(name):
    """The mount does not show itself."""
    sharr.create(f"{name}/a", 3)
    point = SHM / name / "mnt"
    point.mkdir()
    with mounting(f"shm://{name}", point):
        assert os.listdir(point) == ["a"]
        fails(errno.ENOENT, os.stat, point / "mnt")
        assert [info.name for info in sharr.list(f"shm://{name}")] == [f"shm://{name}/a"]


ERRORS = {
    "no such namespace": (["shm://no-such-namespace", "MNT"], "shm://no-such-namespace"),
    "no such directory": (["file:///no/such", "MNT"], "/no/such"),
    "a file as source": (["file://FILE", "MNT"], "FILE"),
    "unknown scheme": (["http://x", "MNT"], "http://x"),
    "bad name": (["shm://a/../b", "MNT"], "shm://a/../b"),
    "no mount point": (["shm://", "MNT/no"], "MNT/no"),
    "a file as mount point": (["shm://", "FILE"], "FILE"),
    "busy": (["shm://", "/proc"], "/proc"),
    "the source itself": (["file://MNT", "MNT"], "MNT"),
    "no arguments": ([], "usage"),
    "one argument": (["shm://"], "usage"),
    "unknown option": (["shm://", "MNT", "-o", "no_such_option"], "no_such_option"),
    "unknown flag": (["shm://", "MNT", "--no-such-flag"], "--no-such-flag"),
    "three arguments": (["shm://", "MNT", "MNT"], "MNT"),
}


@pytest.mark.parametrize("foreground", [False, True])
@pytest.mark.parametrize("case", ERRORS)
def test_errors_at_start(tmp_path, case, foreground):
    arguments, named = ERRORS[case]
    (tmp_path / "mnt").mkdir()
    (tmp_path / "file").write_text("")
    fill = lambda text: text.replace("MNT", f"{tmp_path}/mnt").replace("FILE", f"{tmp_path}/file")
    done = subprocess.run(
        [sharrfs_binary(), *map(fill, arguments), *(["-f"] if foreground else [])],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode not in (0, -signal.SIGABRT, -signal.SIGSEGV), done
    assert fill(named) in done.stderr and done.stdout == ""
    assert not mounted(tmp_path / "mnt")


def test_two_mounts(name, tmp_path):
    sharr.create(name, 3)
    for number in "12":
        (tmp_path / number).mkdir()
    with mounting("shm://", tmp_path / "1"):
        done = subprocess.run(
            [sharrfs_binary(), "shm://", tmp_path / "1"], capture_output=True, text=True
        )
        assert done.returncode != 0 and "busy" in done.stderr
        with mounting("shm://", tmp_path / "2"):
            for number in "12":
                with open(tmp_path / number / name, "r+b", buffering=0) as file:
                    os.pwrite(file.fileno(), number.encode(), 4096)
                assert {(tmp_path / n / name).read_bytes()[4096] for n in "12"} == {ord(number)}
            os.unlink(tmp_path / "1" / name)
            wait_until(lambda: not (tmp_path / "2" / name).exists(), "the other mount")


@needs_root
def test_no_dev_fuse(tmp_path):
    (tmp_path / "shm").mkdir()
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c",
         'mount --bind "$1" /dev && shift && exec "$@"', "sh", tmp_path,
         sharrfs_binary(), "shm://", tmp_path],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode != 0 and "/dev/fuse" in done.stderr


def test_help_and_version():
    shown = subprocess.run([sharrfs_binary(), "--help"], capture_output=True, text=True)
    assert shown.returncode == 0 and "SOURCE MOUNTPOINT" in shown.stdout
    assert "-f" in shown.stdout and "allow_other" in shown.stdout
    shown = subprocess.run([sharrfs_binary(), "--version"], capture_output=True, text=True)
    assert shown.returncode == 0 and shown.stdout.startswith("sharrfs ")


@needs_root
def test_an_ordinary_user_mounts(name, public_build):
    """By fusermount3, with direct_io, and everything but shared mappings works."""
    sharr.create(name, 1000, "u1")[:] = 1
    os.chmod(SHM / name, 0o666)
    point = pathlib.Path(f"/tmp/{name}")
    point.mkdir()
    os.chown(point, NOBODY, NOBODY)
    fuse_mode = stat.S_IMODE(os.stat("/dev/fuse").st_mode)
    os.chmod("/dev/fuse", 0o666)  # as udev has it
    script = f"""
        import os, subprocess, sys, numpy as np, sharr
        name, point, binary = sys.argv[1:]
        daemon = subprocess.Popen([binary, "-f", "shm://", point], stderr=-1, text=True)
        print(daemon.stderr.readline(), end="")
        a = sharr.attach(f"{{point}}/{{name}}")  # maps what is behind
        assert np.load(f"{{point}}/{{name}}").sum() == 1000
        fd = os.open(f"{{point}}/{{name}}", os.O_RDWR)
        os.pwrite(fd, b"\\x07", 4096)
        assert a[0] == 7
        try:
            np.load(f"{{point}}/{{name}}", mmap_mode="r")
        except OSError as error:
            print(error.errno)
        os.close(fd)
        try:
            os.unlink(f"{{point}}/{{name}}")
        except PermissionError as error:
            print("kept")
        subprocess.run(["fusermount3", "-u", point], check=True)
        print(daemon.wait(30))
    """
    try:
        done = subprocess.run(
            as_nobody(PYTHON, "-c", textwrap.dedent(script), name, point,
                      public_build / "bin/sharrfs"),
            env={"PYTHONPATH": str(public_build / "python"), "PATH": os.environ["PATH"]},
            capture_output=True, text=True, cwd="/", timeout=60,
        )  # fmt: skip
    finally:
        os.chmod("/dev/fuse", fuse_mode)
        if mounted(point):
            unmount(point)
        point.rmdir()
    assert done.stdout.splitlines() == [
        f"sharrfs: shm:// on {point}: direct_io (Operation not permitted)", "19", "kept", "0",
    ], done.stderr  # fmt: skip


@needs_root
@pytest.mark.parametrize("layer", ["overlay", "ext"])
def test_passthrough_on_other_file_systems(tmp_path, layer):
    """Also where the source is an overlay, as in a container."""
    source = tmp_path / "source"
    for one in ("source", "low", "up", "work", "mnt"):
        (tmp_path / one).mkdir()
    if layer == "overlay":
        options = "lowerdir=low,upperdir=up,workdir=work"
        done = subprocess.run(
            ["mount", "-t", "overlay", "overlay", "-o", options, source], cwd=tmp_path
        )
        if done.returncode != 0:
            pytest.skip("no overlay on this file system")
    try:
        sharr.create(source / "a", 1000)[:] = 3
        with mounting(f"file://{source}", tmp_path / "mnt"):
            m = np.load(tmp_path / "mnt/a", mmap_mode="r+")
            m[0] = 4
            assert sharr.attach(source / "a")[0] == 4
            del m
    finally:
        if layer == "overlay":
            subprocess.run(["umount", source], check=True)
