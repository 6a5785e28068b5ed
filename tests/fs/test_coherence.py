"""What the kernel remembers of a mount, and that it is never wrong for long."""

import contextlib
import ctypes
import errno
import io
import multiprocessing
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import time

import numpy as np
import pytest
from conftest import PYTHON, SHM, needs_root, sharrfs_binary, wait_until
from mounts import alone, daemons, fails, mounted, mounting, needs_fuse, unmount

import sharr

pytestmark = [needs_fuse, needs_root]

# Half the time after which the kernel would ask by itself.
SOON = 5
EVENTS = pathlib.Path("/proc/sys/fs/inotify/max_queued_events")
libc = ctypes.CDLL(None, use_errno=True)


LINUX = tuple(int(n) for n in re.findall(r"\d+", os.uname().release)[:2])
# The kernel can be made to forget names: all that it knows, or those of one inode.
needs_epochs = pytest.mark.skipif(LINUX < (6, 16), reason="needs Linux 6.16")
needs_prune = pytest.mark.skipif(LINUX < (6, 18), reason="needs Linux 6.18")


def soon(condition, what):
    deadline = time.monotonic() + SOON
    while not condition():
        assert time.monotonic() < deadline, f"not seen: {what}"
        time.sleep(0.001)


@pytest.fixture(scope="module", autouse=True)
def machine():
    """Inotify's limits, and what the kernel's caches hold, are the same for other test runs."""
    with alone():
        yield


def known(point):
    """Makes the kernel remember all that is there."""
    return {path.relative_to(point): path.stat() for path in sorted(point.rglob("*"))}


@pytest.fixture
def place(name, tmp_path):
    """A namespace, not mounted yet: (URI, path behind, where to mount)."""
    (SHM / name).mkdir()
    (tmp_path / "mnt").mkdir()
    return f"shm://{name}", SHM / name, tmp_path / "mnt"


@pytest.fixture
def space(place):
    with mounting(place[0], place[2]):
        yield place


class Log:
    """A mount whose daemon logs each request."""

    def __init__(self, source, point):
        self.path, self.point = point.with_name("log"), point
        with open(self.path, "w") as log:
            command = [sharrfs_binary(), source, str(point), "-d"]
            self.daemon = subprocess.Popen(command, stdout=log, stderr=log)
        wait_until(lambda: "shm://" in self.path.read_text(), "the mount")

    def requests(self, call):
        """What the kernel asks while call() runs."""
        start = self.path.stat().st_size
        call()
        os.statvfs(self.point)  # always asked: all before it has been logged
        with open(self.path) as log:
            log.seek(start)
            asked = re.findall(r"opcode: (\w+)", log.read())
        # Told, and not waited for.
        return [one for one in asked if one not in ("STATFS", "RELEASE", "FORGET", "BATCH_FORGET")]


@contextlib.contextmanager
def logging(source, point):
    log = Log(source, point)
    try:
        yield log
    finally:
        if mounted(point):
            unmount(point)
        log.daemon.wait()


def read_header(path):
    file = os.open(path, os.O_RDONLY)
    os.read(file, 128)
    os.close(file)


@needs_epochs
def test_what_is_asked(place):
    uri, _, point = place
    for i in range(300):
        sharr.create(f"{uri}/a{i}", 3)
    with logging(uri, point) as log:
        one = point / "a1"
        assert log.requests(lambda: os.stat(one)) == ["LOOKUP"]
        assert log.requests(lambda: [os.stat(one) for _ in range(100)]) == []
        assert log.requests(lambda: read_header(one)) == ["OPEN", "FLUSH"]
        assert log.requests(lambda: os.getxattr(one, "user.sharr.dtype")) == ["GETXATTR"]
        assert "LOOKUP" not in log.requests(lambda: known(point))
        assert log.requests(lambda: [os.stat(point / f"a{i}") for i in range(300)]) == []
        listing = log.requests(lambda: subprocess.run(["ls", "-l", point], stdout=subprocess.DEVNULL))
        assert len([one for one in listing if not one.endswith("XATTR")]) < 30
        # What has a second name may change by it.
        os.link(SHM / uri[6:] / "a1", SHM / uri[6:] / "b")
        asked = log.requests(lambda: [os.stat(point / "b") for _ in range(5)])
        assert asked.count("LOOKUP") == 5


@contextlib.contextmanager
def set_to_none(limit):
    """While the block runs inotify gives nobody any."""
    file = pathlib.Path("/proc/sys/fs/inotify", limit)
    before = file.read_text()
    try:
        file.write_text("0")
        yield
    finally:
        file.write_text(before)


@pytest.mark.parametrize("limit", ["max_user_instances", "max_user_watches"])
def test_nothing_is_remembered_that_is_not_watched(place, limit):
    uri, behind, point = place
    sharr.create(f"{uri}/a", 3)
    sharr.create(f"{uri}/d/b", 3)
    with set_to_none(limit), logging(uri, point) as log:
        for path in ("a", "d/b"):
            known(point)
            assert "LOOKUP" in log.requests(lambda path=path: os.stat(point / path))
            os.chmod(behind / path, 0o640)
            assert os.stat(point / path).st_mode & 0o777 == 0o640
            os.rename(behind / path, behind / "c")
            fails(errno.ENOENT, os.stat, point / path)
            assert os.listdir(point / os.path.dirname(path)) in (["c", "d"], ["d", "c"], [])
            assert os.stat(point / "c").st_ino == os.stat(behind / "c").st_ino


def changes(behind):
    """Each change beside a mount, as what makes it and what is to be seen then."""
    inode = {path.name: path.stat().st_ino for path in behind.iterdir()}

    def gone(*names):
        return lambda point: not any(os.path.lexists(point / one) for one in names)

    def is_(one, other):
        return lambda point: (point / one).stat().st_ino == inode[other]

    def mode(one, bits):
        return lambda point: (point / one).stat().st_mode & 0o777 == bits

    def shrink():
        os.truncate(behind / "cut", 100)

    def spoil():
        with open(behind / "spoilt", "r+b") as file:
            file.write(b"nothing")

    yield "chmod", lambda: os.chmod(behind / "mode", 0o604), mode("mode", 0o604)
    yield "utime", lambda: os.utime(behind / "time", (7, 7)), lambda p: (p / "time").stat().st_mtime == 7
    yield "chown", lambda: os.chown(behind / "own", 7, 8), lambda p: (p / "own").stat().st_uid == 7
    yield "unlink", lambda: os.unlink(behind / "gone"), gone("gone")
    yield "rename", lambda: os.rename(behind / "old", behind / "new"), lambda p: (
        gone("old")(p) and is_("new", "old")(p))  # fmt: skip
    yield "replace", lambda: os.rename(behind / "source", behind / "target"), lambda p: (
        gone("source")(p) and is_("target", "source")(p))  # fmt: skip
    yield "truncate", shrink, gone("cut")
    yield "spoil", spoil, gone("spoilt")
    yield "rmdir", lambda: os.rmdir(behind / "empty"), gone("empty")
    yield "move a directory", lambda: os.rename(behind / "d", behind / "e"), lambda p: (
        gone("d", "d/in")(p) and (p / "e/in").is_file())  # fmt: skip
    yield "move into it", lambda: os.rename(behind / "move", behind / "e/in"), lambda p: (
        gone("move")(p) and is_("e/in", "move")(p))  # fmt: skip
    yield "chmod of a directory", lambda: os.chmod(behind / "e", 0o711), mode("e", 0o711)
    yield "chmod of the root", lambda: os.chmod(behind, 0o711), mode(".", 0o711)
    yield "mkdir", lambda: os.mkdir(behind / "made"), lambda p: (
        p.stat().st_nlink == 4 and p.stat().st_mtime == behind.stat().st_mtime
    )
    yield "link", lambda: os.link(behind / "link", behind / "linked"), lambda p: (
        (p / "link").stat().st_nlink == 2)  # fmt: skip
    yield "chmod by another name", lambda: os.chmod(behind / "linked", 0o604), mode("link", 0o604)
    yield "exchange", lambda: exchange(behind / "time", behind / "mode"), lambda p: (
        is_("time", "mode")(p) and is_("mode", "time")(p))  # fmt: skip
    yield "a file for a directory", lambda: (os.rmdir(behind / "made"),
        os.rename(behind / "own", behind / "made")), is_("made", "own")  # fmt: skip


def exchange(one, other):
    if libc.renameat2(-100, os.fsencode(one), -100, os.fsencode(other), 2) != 0:
        raise OSError(ctypes.get_errno(), "renameat2", str(one), None, str(other))


def test_each_change_beside(space):
    uri, behind, point = space
    for one in ("mode time own gone old source target cut spoilt link d/in move".split()):
        sharr.create(f"{uri}/{one}", 3)
    (behind / "empty").mkdir()
    for what, change, seen in changes(behind):
        known(point)
        assert not seen(point), what
        change()
        soon(lambda seen=seen: seen(point), what)
    # And what is open is still what it was.
    with open(point / "new", "rb") as file:
        os.unlink(behind / "new")
        soon(lambda: not (point / "new").exists(), "its end")
        assert os.fstat(file.fileno()).st_nlink == 0
        assert os.stat(f"/proc/self/fd/{file.fileno()}").st_nlink == 0
        with open(f"/proc/self/fd/{file.fileno()}", "rb") as again:
            assert again.read() == file.read() != b""


def test_changes_by_a_descriptor_that_had_no_name(space):
    uri, behind, point = space
    sharr.create(f"{uri}/a", 3)
    file = os.open(behind, os.O_TMPFILE | os.O_RDWR)
    os.write(file, (behind / "a").read_bytes())
    os.link(f"/proc/self/fd/{file}", behind / "b", src_dir_fd=file)
    known(point)
    os.fchmod(file, 0o604)
    soon(lambda: (point / "b").stat().st_mode & 0o777 == 0o604, "the mode")
    os.ftruncate(file, 0)
    soon(lambda: not (point / "b").exists(), "its end")
    os.close(file)


@needs_prune
def test_what_is_open_stays_what_it_is(space, monkeypatch):
    """Changes of others do not make it look deleted."""
    uri, behind, point = space
    for one in "abcd":
        sharr.put(f"{uri}/{one}", np.arange(3))
    sharr.put(f"{uri}/here/x", np.arange(3))
    lost = 0
    with contextlib.ExitStack() as stack:

        def opened():
            file = stack.enter_context(open(point / "a", "rb"))
            monkeypatch.chdir(point / "here")
            return file

        file = opened()

        def check():
            nonlocal file, lost
            (point / "a").stat(), (point / "here").stat()
            paths = os.readlink(f"/proc/self/fd/{file.fileno()}"), os.readlink("/proc/self/cwd")
            if paths != (str(point / "a"), str(point / "here")):
                lost += 1
                file = opened()

        for i in range(100):
            known(point)
            os.unlink(behind / "b")
            soon(lambda: not (point / "b").exists(), "its end")
            check()
            sharr.put(f"{uri}/b", np.arange(3))
            sharr.put(f"{uri}/c", np.arange(4 + i), replace=True)
            soon(lambda: (point / "c").stat().st_ino == (behind / "c").stat().st_ino, "the other")
            check()
            with open(point / "d", "wb") as other:
                np.save(other, np.arange(5 + i))
            assert (point / "d").stat().st_size == (behind / "d").stat().st_size
            check()
    # A machine that is busy with something else may forget later than the daemon waits.
    assert lost < 5, "of 300"


def test_a_directory_that_moves_is_known_by_its_place(space, monkeypatch):
    """Also to whoever is in it."""
    uri, behind, point = space
    sharr.create(f"{uri}/d/x", 3)
    monkeypatch.chdir(point / "d")
    known(point)
    os.rename(behind / "d", behind / "e")
    sharr.create(f"{uri}/d/x", 4)
    soon(lambda: os.getxattr(".", "user.sharr.uri").decode() == f"{uri}/e/", "its place")
    assert os.getxattr("x", "user.sharr.uri").decode() == f"{uri}/e/x"


def descriptors(point):
    (pid,) = daemons(point)
    return len(os.listdir(f"/proc/{pid}/fd"))


@contextlib.contextmanager
def limited(uri, point, number):
    """A mount whose daemon has so many descriptors."""
    command = ["prlimit", f"--nofile={number}:{number}", sharrfs_binary(), uri, str(point)]
    subprocess.run(command, check=True)
    try:
        yield
    finally:
        unmount(point)


@pytest.mark.parametrize("inotify", [True, False])
def test_directories_that_are_gone_take_no_descriptors(place, inotify):
    uri, behind, point = place
    sharr.create(f"{uri}/a", 3)
    with contextlib.ExitStack() as stack:
        with contextlib.nullcontext() if inotify else set_to_none("max_user_instances"):
            stack.enter_context(limited(uri, point, 1000))
        for i in range(150):
            (behind / f"d{i}/e").mkdir(parents=True)
            sharr.create(f"{uri}/d{i}/x", 3)
            assert len(known(point)) == 4
            shutil.rmtree(behind / f"d{i}")
            assert descriptors(point) < 200
        assert (point / "a").stat().st_ino == (behind / "a").stat().st_ino


def test_more_directories_than_descriptors(place):
    uri, behind, point = place
    for i in range(300):
        sharr.create(f"{uri}/d{i}/x", 3)
    with limited(uri, point, 100):
        for _ in range(2):
            assert len(known(point)) == 600
            for i in range(300):
                assert os.getxattr(point / f"d{i}/x", "user.sharr.uri").decode() == f"{uri}/d{i}/x"
        os.rename(behind / "d299", behind / "e")
        soon(lambda: (point / "e/x").exists() and not (point / "d299/x").exists(), "the move")
        np.save(point / "e/new.npy", np.arange(3))
        assert sharr.attach(f"{uri}/e/new.npy").tolist() == [0, 1, 2]
        # Deeper than descriptors, and than a path can be.
        there, here = (os.open(top, os.O_RDONLY) for top in (behind, point))
        for depth in range(3000):
            os.mkdir("d", dir_fd=there)
            there, before = os.open("d", os.O_RDONLY, dir_fd=there), there
            here, above = os.open("d", os.O_RDONLY, dir_fd=here), here
            os.close(before), os.close(above)
        assert os.listdir(here) == [] and os.fstat(here).st_ino == os.fstat(there).st_ino
        os.close(here), os.close(there)
        subprocess.run(["rm", "-r", behind / "d"], check=True)  # deeper than Python goes


def looked_at(uri, behind, point, name):
    sharr.create(f"{uri}/{name}", 3)
    (point / name).stat()
    os.unlink(behind / name)


still_open = []


def open_when_it_goes(uri, behind, point, name):
    sharr.create(f"{uri}/{name}", 3)
    still_open.append(open(point / name, "rb"))  # noqa: SIM115
    os.unlink(behind / name)
    if len(still_open) == 20:
        time.sleep(0.003)  # mostly it is told before it is closed
        while still_open:
            still_open.pop().close()


def missed_in_a_directory(uri, behind, point, name):
    (behind / name).mkdir()
    assert not (point / name / "x").exists()
    os.rmdir(behind / name)


def in_a_tree(uri, behind, point, name):
    sharr.create(f"{uri}/{name}/b/c/x", 3)
    (point / name / "b/c/x").stat()
    shutil.rmtree(behind / name)


@pytest.mark.parametrize("life", [looked_at, open_when_it_goes, missed_in_a_directory, in_a_tree])
def test_names_that_are_gone_take_no_memory(space, life):
    uri, behind, point = space
    (pid,) = daemons(point)

    def turn(number):
        for i in range(1000):
            life(uri, behind, point, f"{number}-{i}")
        return int(re.search(r"RssAnon:\s*(\d+)", pathlib.Path(f"/proc/{pid}/status").read_text())[1])

    memory = [turn(number) for number in range(6)]
    if "SHARR_SHARRFS" not in os.environ:  # a sanitizer keeps what was freed
        # 400 more each time if each took 400 bytes; threads that come now and then take some, too.
        assert min(b - a for a, b in zip(memory[1:], memory[2:])) < 200, memory


def test_what_is_opened_is_what_is_told_of_it(space):
    uri, _, point = space
    for i in range(200):
        sharr.put(f"{uri}/a", np.arange(3 + i), replace=True)
        with open(point / "a", "rb") as file:
            assert os.fstat(file.fileno()).st_size == len(file.read())
        os.stat(point / "a")


def test_opened_is_what_has_the_name(space):
    """An open by a name that the kernel remembers, of a file that is open and replaced."""
    uri, _, point = space
    sharr.put(f"{uri}/a", np.arange(3))
    with contextlib.ExitStack() as stack:
        for i in range(200):
            file = stack.enter_context(open(point / "a", "rb"))
            sharr.put(f"{uri}/a", np.arange(3) + i, replace=True)
            assert np.load(point / "a")[0] == i
            again = os.open(f"/proc/self/fd/{file.fileno()}", os.O_RDONLY)
            assert os.fstat(again).st_ino == os.fstat(file.fileno()).st_ino
            os.close(again)
        os.unlink(f"{SHM}/{uri[6:]}/a")
        fails(errno.ENOENT, os.open, point / "a", os.O_RDONLY)


def test_opens_never_fail_while_others_have_the_file_open(space):
    uri, behind, point = space
    reader = """
import sys, numpy as np
for _ in range(3000):
    a = np.load(sys.argv[1])
    assert (a == a[0]).all()
"""
    sharr.put(f"{uri}/a", np.full(8, 0))
    readers = [
        subprocess.Popen([PYTHON, "-c", reader, point / "a"], stderr=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    i = 0
    while any(one.poll() is None for one in readers):
        i += 1
        sharr.put(f"{uri}/a", np.full(8, i), replace=True)
        time.sleep(0.0005)
    for one in readers:
        assert one.communicate()[1] == "" and one.returncode == 0


def test_what_was_renamed_is_what_has_the_new_name(space):
    """Also when the file had taken the name of another beside the mount."""
    uri, behind, point = space
    for i in range(30):
        for name, value in (("x", 1), ("y", 2), ("z", 3)):
            sharr.put(f"{uri}/{name}", np.full(4, value))
        os.stat(point / "x"), os.stat(point / "y")
        os.rename(behind / "y", behind / "x")
        assert np.load(point / "x")[0] == 2
        wait_until(lambda: not (point / "y").exists(), "y to be gone")
        if i % 2:
            os.rename(point / "x", point / "c")
            os.rename(behind / "z", behind / "x")
        else:
            exchange(point / "x", point / "z")
            os.rename(point / "z", point / "c")
        assert np.load(point / "c")[0] == 2
        with open(point / "c", "r+b") as file:
            file.seek(4096), file.write(np.int64(7))
        assert sharr.attach(f"{uri}/c")[0] == 7
        assert np.load(point / "x")[0] == 3
        os.unlink(behind / "c"), os.unlink(behind / "x")
        wait_until(lambda: not any((point / n).exists() for n in "cxz"), "all to be gone")


def test_changes_through_the_mount_are_seen_at_once(space):
    uri, behind, point = space
    data = (np.arange(5), np.arange(7000))
    for i in range(100):
        known(point)
        np.save(point / "a", data[i % 2])
        assert not (point / "a").exists()
        os.rename(point / "a.npy", point / "a")
        assert (point / "a").stat().st_size == (behind / "a").stat().st_size
        old = os.open(point / "a", os.O_RDONLY)
        with open(point / "a", "wb") as file:
            np.save(file, data[1 - i % 2])
            assert (point / "a").stat().st_size == (behind / "a").stat().st_size
        there_ino = (behind / "a").stat().st_ino
        assert (point / "a").stat().st_ino == there_ino
        assert os.fstat(old).st_ino != there_ino
        os.close(old)
        inside = subprocess.run(["stat", "-c%s %i", point / "a"], capture_output=True, text=True).stdout
        there = (behind / "a").stat()
        assert inside == f"{there.st_size} {there.st_ino}\n"
        assert point.stat().st_mtime == behind.stat().st_mtime
        with open(point / "a", "r+b") as file:
            file.seek(0, 2)
            file.write(b"too much")
            file.flush()
            assert os.stat(point / "a").st_size >= there.st_size
        assert (point / "a").stat().st_size == there.st_size
        os.chmod(point / "a", 0o600 + i % 8)
        assert (point / "a").stat().st_mode & 0o777 == 0o600 + i % 8
        (point / "d").mkdir()
        os.rename(point / "a", point / "d/b")
        assert not (point / "a").exists() and (point / "d/b").exists()
        os.unlink(point / "d/b")
        assert not (point / "d/b").exists()
        os.rmdir(point / "d")
        assert not (point / "d").exists() and not list(point.iterdir())


def test_found_elsewhere_before_it_is_told(space):
    """A look-up may be faster than inotify."""
    uri, behind, point = space
    sharr.create(f"{uri}/a", 3)
    for _ in range(100):
        os.stat(point / "a")
        os.rename(behind / "a", behind / "b")
        os.stat(point / "b")
        soon(lambda: not (point / "a").exists(), "its end")
        os.rename(behind / "b", behind / "a")
        soon(lambda: not (point / "b").exists(), "its end")


@contextlib.contextmanager
def short_queue():
    """Of inotify, for whoever begins to use it meanwhile: it overflows all the time."""
    before = EVENTS.read_text()
    try:
        EVENTS.write_text("4")
        yield
    finally:
        EVENTS.write_text(before)


def test_events_are_lost(place):
    uri, behind, point = place
    for i in range(100):
        sharr.create(f"{uri}/{i}", 3)
        sharr.create(f"{uri}/d/{i}", 3)
    with contextlib.ExitStack() as stack:
        with short_queue():
            stack.enter_context(mounting(uri, point))
        for mode in (0o600, 0o640, 0o604):
            known(point)
            for i in range(100):
                os.chmod(behind / f"{i}", mode)
                os.chmod(behind / f"d/{i}", mode)
            paths = [point / d / f"{i}" for d in ("", "d") for i in range(100)]
            soon(lambda paths=paths, mode=mode: {os.stat(one).st_mode & 0o777 for one in paths}
                 == {mode}, "the modes")  # fmt: skip
            os.unlink(behind / f"{mode % 100}")
            for i in range(100):
                os.rename(behind / f"d/{i}", behind / f"d/{i}-")
            for i in range(100):
                soon(lambda i=i: not (point / f"d/{i}").exists(), "the old name")
                os.rename(behind / f"d/{i}-", behind / f"d/{i}")
            soon(lambda mode=mode: not (point / f"{mode % 100}").exists(), "its end")
            sharr.create(f"{uri}/{mode % 100}", 3)


NAMES = [f"{d}{i}" for d in ("", "p/", "q/") for i in range(12)]


def storm(uri, behind, seed, end):
    """Creates, replaces, renames, deletes, spoils and moves, as fast as it can."""
    rng = random.Random(seed)
    while time.monotonic() < end:
        one, other = (behind / rng.choice(NAMES) for _ in range(2))
        with contextlib.suppress(OSError):
            what = rng.randrange(9)
            if what < 3:
                sharr.put(one, np.zeros(rng.randrange(2000), "u1"), replace=rng.random() < 0.5)
            elif what == 3:
                os.unlink(one)
            elif what == 4:
                os.rename(one, other)
            elif what == 5:
                os.chmod(one, 0o600 + rng.randrange(64))
            elif what == 6:
                os.truncate(one, rng.randrange(4096))
            elif what == 7:
                exchange(behind / "p", behind / "q")
            else:
                exchange(one, other)


def look(point, seed, end):
    rng = random.Random(seed)
    while time.monotonic() < end:
        with contextlib.suppress(OSError):
            if rng.random() < 0.1:
                known(point)
            elif rng.random() < 0.3:
                with open(point / rng.choice(NAMES), "rb") as file:
                    os.fstat(file.fileno())
            else:
                os.stat(point / rng.choice(NAMES))


def view(top):
    result = {}
    for one in ["p", "q", *NAMES]:
        with contextlib.suppress(OSError, ValueError):
            st = os.stat(top / one)
            if top.name != "mnt" and os.path.isfile(top / one):
                sharr.info(top / one)
            result[one] = (st.st_ino, st.st_mode, st.st_size, st.st_mtime_ns, st.st_nlink)
    return result


def blow(place, seconds, also=lambda: None):
    uri, behind, point = place
    end = time.monotonic() + seconds
    spawn = multiprocessing.get_context("fork")
    at_work = [spawn.Process(target=storm, args=(uri, behind, i, end)) for i in range(2)]
    at_work += [spawn.Process(target=look, args=(point, i, end)) for i in range(2)]
    for process in at_work:
        process.start()
    also()
    for process in at_work:
        process.join()
    assert [process.exitcode for process in at_work] == [0] * 4


def agree(behind, point):
    with contextlib.suppress(AssertionError):
        soon(lambda: view(point) == view(behind), "the truth")
    assert view(point) == view(behind)


@pytest.mark.parametrize("queue", ["long", "short"])
def test_storm(place, queue):
    uri, behind, point = place
    for one in ("p", "q"):
        (behind / one).mkdir()
    with contextlib.ExitStack() as stack:
        with short_queue() if queue == "short" else contextlib.nullcontext():
            stack.enter_context(mounting(uri, point))
        for _ in range(3):
            blow(place, 1.2)
            agree(behind, point)


def test_killed_in_a_storm(place):
    """The daemon dies at once whatever it is about to say, and the mount can be taken away."""
    uri, behind, point = place
    for one in ("p", "q"):
        (behind / one).mkdir()

    def kill():
        time.sleep(random.Random(attempt).random() * 0.2)
        for pid in daemons(point):
            os.kill(pid, signal.SIGKILL)

    for attempt in range(8):
        with mounting(uri, point):
            blow(place, 0.3, kill)
            wait_until(lambda: not daemons(point), "its end")
            # What is asked while its descriptors are being closed is ECONNABORTED.
            with contextlib.suppress(OSError):
                os.listdir(point)
            fails(errno.ENOTCONN, os.listdir, point)
            subprocess.run(["umount", point], check=True)


def test_a_namespace_that_is_made_again_is_shown(space):
    uri, behind, point = space
    ones = np.ones(3)

    def shown(*names):
        soon(lambda: os.listdir(point) == sorted(names), names)
        for name in names:
            assert (np.load(point / name) == ones).all()

    sharr.put(f"{uri}/a", ones)
    shown("a")
    sharr.delete(f"{uri}/a")
    content = io.BytesIO()
    np.save(content, ones)
    begun = os.open(point / "begun", os.O_CREAT | os.O_WRONLY)
    os.write(begun, content.getvalue())
    opened = os.open(point, os.O_RDONLY)
    sharr.put_all(f"{uri}/", {"x": ones, "y": ones})  # in the place of the empty one
    shown("x", "y")
    fails(errno.ENOENT, os.close, begun)  # what it was to be put into is not there
    assert os.listdir(opened) == []
    os.close(opened)
    shown("x", "y")
    with open(point / "new", "wb") as file:
        np.save(file, ones)
    assert behind.joinpath("new").exists()
    with open(point / "x", "rb") as file:
        sharr.delete_all(f"{uri}/")
        shown()
        soon(lambda: not (point / "x").exists(), "x")
        fails(errno.ENOENT, open, point / "y", "rb")
        sharr.put(f"{uri}/x", ones * 2)  # a file beside the old one
        soon(lambda: (point / "x").exists(), "x")
        assert (np.load(point / "x") == 2).all()
        assert (np.load(file) == 1).all()
    shutil.rmtree(behind)
    sharr.put_all(f"{uri}/", {"z": ones})
    shown("z")
    sharr.delete(f"{point}/z")
    shown()
    # Somebody else's is not followed.
    other = behind.with_name(behind.name + "-other")
    other.mkdir()
    sharr.put(f"{uri}-other/theirs", ones)
    os.chown(other, 65534, 65534)
    sharr.delete_all(f"{uri}/")
    other.rename(behind)
    shown()
    shutil.rmtree(behind)
    sharr.put(f"{uri}/mine", ones)
    shown("mine")
    sharr.delete(f"{uri}/mine")
    # Of what is only moved away it is the directory that is mounted.
    moved = behind.with_name(behind.name + "-moved")
    behind.rename(moved)
    try:
        sharr.put(f"{uri}/other", ones)
        shown()
    finally:
        moved.rmdir()
    shown("other")
