"""Who may do what: other users on root's mount, an ordinary user's own, the daemon's privileges."""

import contextlib
import errno
import inspect
import io
import os
import pathlib
import random
import re
import stat
import struct
import subprocess
import textwrap
import threading

import numpy as np
import pytest
import sharr
import test_tree
from conftest import NOBODY, PYTHON, ROOT, SHM, as_nobody, needs_root, sharrfs_binary, wait_until
from mounts import NATIVE, daemons, mode, mounted, mounting, needs_fuse, unmount

pytestmark = [needs_fuse, needs_root]

PRELUDE = """
import errno, fcntl, io, os, shutil, stat, subprocess, sys, time
import numpy as np
def npy(value):
    file = io.BytesIO()
    np.save(file, value)
    return file.getvalue()
def no(number, call, *args, **kwargs):
    try:
        call(*args, **kwargs)
    except OSError as error:
        assert error.errno == number, (error, call, args)
    else:
        raise AssertionError((call, args))
behind, point = sys.argv[1:3]
os.umask(0o022)
"""


def npy(value):
    file = io.BytesIO()
    np.save(file, value)
    return file.getvalue()


@pytest.fixture
def world(name, mode):
    """A namespace that is like /dev/shm, and root's mount of it for everybody."""
    behind, point = SHM / name, pathlib.Path("/tmp") / name
    behind.mkdir(), point.mkdir()
    os.chmod(behind, 0o1777)
    options = "allow_other" + ("" if mode == NATIVE else ",direct_io")
    try:
        with mounting(f"shm://{name}", point, "-o", options):
            yield behind, point
    finally:
        point.rmdir()


def run_as(code, *args, groups=()):
    command = as_nobody(PYTHON, "-c", PRELUDE + textwrap.dedent(code), *args)
    if groups:
        command[command.index("--clear-groups")] = "--groups=" + ",".join(map(str, groups))
    done = subprocess.run(command, capture_output=True, text=True, cwd="/", timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def started_as_nobody(code, *args):
    """The process once it has printed a line; it goes on when it is given one."""
    command = as_nobody(PYTHON, "-c", PRELUDE + textwrap.dedent(code), *args)
    child = subprocess.Popen(command, stdin=-1, stdout=-1, text=True, cwd="/")
    child.stdout.readline()
    return child


def let_in(path):
    """Opens the way to a directory of pytest's to all users."""
    for above in (path, *path.parents):
        if above.owner() == "root" and above != pathlib.Path("/tmp"):
            above.chmod(above.stat().st_mode | 0o011)


def test_what_a_caller_makes_is_the_callers(world):
    behind, point = world
    run_as("""
        with open(f"{point}/a", "wb") as file:
            file.write(npy(3.0))
        subprocess.run(["cp", "-p", f"{point}/a", f"{point}/b"], check=True)
        os.mkdir(f"{point}/d", 0o700)
        with open(f"{point}/d/c", "wb") as file:
            file.write(npy(4.0))
        os.rename(f"{point}/d/c", f"{point}/c")
        os.chmod(f"{point}/c", 0o600)
        os.utime(f"{point}/c", (5, 6))
        os.truncate(f"{point}/c", os.stat(f"{point}/c").st_size)
        no(errno.EPERM, os.chown, f"{point}/c", 0, 0)
    """, behind, point)  # fmt: skip
    for name in ("a", "b", "c", "d"):
        status = os.stat(behind / name)
        assert (status.st_uid, status.st_gid) == (NOBODY, NOBODY), name
    assert stat.S_IMODE(os.stat(behind / "c").st_mode) == 0o600
    assert os.stat(behind / "c").st_mtime == 6


def test_what_root_makes_with_another_group_is_the_groups(world):
    behind, point = world
    (behind / "x").write_bytes(npy(1.0))
    script = f"mkdir {point}/d && cp {behind}/x {point}/a"
    subprocess.run(["setpriv", "--regid=1234", "--clear-groups", "sh", "-c", script], check=True)
    assert [os.stat(behind / name).st_gid for name in ("d", "a")] == [1234] * 2


def test_what_is_somebody_elses_stays_theirs(world):
    behind, point = world
    for name, mode in (("a", 0o644), ("secret", 0o600), ("open", 0o666)):
        (behind / name).write_bytes(npy(np.arange(5.0)))
        os.chmod(behind / name, mode)
    (behind / "d").mkdir(0o755), (behind / "d/a").write_bytes(npy(1.0))
    before = sorted((p.name, p.stat().st_mode, p.stat().st_ino) for p in behind.rglob("*"))
    run_as("""
        for path in ("a", "secret"):
            no(errno.EACCES, open, f"{point}/{path}", "r+b")
            no(errno.EACCES, open, f"{point}/{path}", "wb")
            no(errno.EACCES, os.truncate, f"{point}/{path}", 0)
        for path in ("a", "secret", "open"):
            no(errno.EPERM, os.unlink, f"{point}/{path}")  # the directory is sticky
            no(errno.EPERM, os.rename, f"{point}/{path}", f"{point}/mine")
            no(errno.EPERM, os.chmod, f"{point}/{path}", 0o777)
            no(errno.EPERM, os.chown, f"{point}/{path}", os.getuid(), -1)
            no(errno.EPERM, os.utime, f"{point}/{path}", (1, 2))
        no(errno.EACCES, open, f"{point}/secret", "rb")
        with open(f"{point}/mine", "wb") as file:
            file.write(npy(3.0))
        no(errno.EPERM, os.rename, f"{point}/mine", f"{point}/a")
        no(errno.EACCES, open, f"{point}/d/new", "wb")
        no(errno.EACCES, os.mkdir, f"{point}/d/new")
        no(errno.EACCES, os.unlink, f"{point}/d/a")
        no(errno.EACCES, os.rename, f"{point}/mine", f"{point}/d/mine")
        no(errno.EACCES, os.rename, f"{point}/d/a", f"{point}/e")
        os.unlink(f"{point}/mine")
        with open(f"{point}/open", "r+b") as file:
            file.seek(128), file.write(b"1234")
    """, behind, point)  # fmt: skip
    assert before == sorted((p.name, p.stat().st_mode, p.stat().st_ino) for p in behind.rglob("*"))
    assert (behind / "open").read_bytes()[128:132] == b"1234"


def test_overwriting_as_open_has_it(world):
    """O_TRUNC takes the right to write the file, not one to the directory; owner and mode stay."""
    behind, point = world
    (behind / "d").mkdir(0o755)
    (behind / "d/x").write_bytes(npy(1.0))
    os.chmod(behind / "d/x", 0o666)
    run_as("""
        with open(f"{point}/d/x", "wb") as file:
            file.write(npy(7.0))
        assert os.listdir(f"{point}/d") == ["x"]
    """, behind, point)  # fmt: skip
    assert np.load(behind / "d/x") == 7 and os.listdir(behind / "d") == ["x"]
    status = os.stat(behind / "d/x")
    assert (status.st_uid, stat.S_IMODE(status.st_mode)) == (0, 0o666)


@contextlib.contextmanager
def acting_as(uid):
    os.setegid(uid), os.seteuid(uid)
    try:
        yield
    finally:
        os.seteuid(0), os.setegid(0)


def tree(top):
    """Without times: where a call has failed half way, nobody has set them."""
    return {
        path: found[:5] + found[6:] if stat.S_ISREG(found[0]) else found
        for path, found in test_tree.tree(top).items()
    }


@pytest.mark.parametrize("seed", range(8))
def test_call_by_call_as_several_users(world, tmp_path, seed):
    """Same results, errors and trees as in a native directory, whoever calls."""
    behind, point = world
    native = SHM / f"{behind.name}-native"
    native.mkdir()
    os.chmod(native, 0o1777)
    rng = random.Random(seed)
    names = ["a", "b", "c", "d", "d/a", "d/b", "d/e", "d/e/a", "e", "e/a"]
    kinds = [kind for kind in test_tree.KINDS if kind not in ("statvfs", "fsync")] + ["mkdir", "write"]
    modes = [0o700, 0o755, 0o777, 0o600, 0o644, 0o666, 0o444, 0o222, 0o1777, 0o070]
    groups, mask = os.getgroups(), os.umask(0o002)
    os.setgroups([])
    try:
        for step in range(600):
            kind, uid = rng.choice(kinds), rng.choice([0, NOBODY, NOBODY - 1])
            count, extra = test_tree.KINDS[kind]
            args = [kind, *rng.choices(names, k=count), *extra(rng)]
            if kind in ("chmod", "mkdir"):
                args[-1] = rng.choice(modes)
            if kind == "chown":
                args[-2:] = rng.choice([-1, NOBODY, NOBODY - 1, 0]), rng.choice([-1, NOBODY, NOBODY - 1])
            outcomes = []
            for top in (point, native):
                with acting_as(uid):
                    outcomes.append(test_tree.outcome(top, *args))
            assert outcomes[0] == outcomes[1], (step, uid, args)
            if step % 30 == 0:
                assert tree(point) == tree(native), (step, uid, args)
        assert tree(point) == tree(native) == tree(behind)
    finally:
        os.umask(mask), os.setgroups(groups)


def test_overwriting_at_once(world):
    """The second to close replaces the first's, as it may write that."""
    behind, point = world
    (behind / "x").write_bytes(npy(1.0))
    os.chmod(behind / "x", 0o666)
    run_as("""
        fds = [os.open(f"{point}/x", os.O_WRONLY | os.O_TRUNC) for _ in range(2)]
        for number, fd in enumerate(fds):
            os.write(fd, npy(float(number))), os.close(fd)
    """, behind, point)  # fmt: skip
    assert np.load(behind / "x") == 1.0


def test_roots_directories_keep_their_bits(world):
    behind, point = world
    (point / "d").mkdir()
    os.chown(point / "d", -1, 4444)
    os.chmod(point / "d", 0o2770)
    assert stat.S_IMODE(os.stat(behind / "d").st_mode) == 0o2770
    os.chmod(point / "d", 0o2775)
    assert stat.S_IMODE(os.stat(behind / "d").st_mode) == 0o2775


@pytest.mark.parametrize("theirs", [0o644, 0o666])
def test_what_came_meanwhile_is_replaced_only_by_right(world, theirs):
    """A new name, under which somebody else publishes an array before it is closed."""
    behind, point = world
    child = started_as_nobody("""
        fd = os.open(f"{point}/x", os.O_WRONLY | os.O_CREAT, 0o600)
        os.write(fd, npy(1.0))
        print(flush=True), sys.stdin.readline()
        no(errno.EPERM, os.close, fd)  # sticky, and not ours
    """, behind, point)  # fmt: skip
    (behind / "x").write_bytes(npy(2.0))
    os.chmod(behind / "x", theirs)
    child.communicate("\n")
    assert child.returncode == 0
    assert np.load(behind / "x") == 2 and os.listdir(behind) == ["x"]


@pytest.mark.parametrize("new", [True, False])
def test_whoever_puts_an_array_there_meanwhile_gets_no_data(world, new):
    """Nor does the one that was to be replaced give its owner to what replaces another."""
    behind, point = world
    (behind / "d").mkdir()
    os.chmod(behind / "d", 0o777)
    if not new:
        (behind / "d/x").write_bytes(npy(1.0))
        os.chown(behind / "d/x", 0, 4444), os.chmod(behind / "d/x", 0o662)
    child = started_as_nobody("""
        fd = os.open(f"{point}/d/x", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o640)
        os.write(fd, npy(2.0))
        print(flush=True), sys.stdin.readline()
        os.close(fd)
    """, behind, point)  # fmt: skip
    (behind / "theirs").write_bytes(npy(3.0))
    os.chown(behind / "theirs", 1234, 1234), os.chmod(behind / "theirs", 0o666)
    os.rename(behind / "theirs", behind / "d/x")
    child.communicate("\n")
    assert child.returncode == 0 and np.load(behind / "d/x") == 2
    status = os.stat(behind / "d/x")
    assert (status.st_uid, status.st_gid) == (NOBODY, NOBODY)
    assert stat.S_IMODE(status.st_mode) == (0o640 if new else 0o622)


@pytest.mark.parametrize("gone", [True, False])
def test_a_program_of_another_user_that_closes_it_has_no_say(world, gone):
    """As one that is setuid does with what it has got by exec(2)."""
    behind, point = world
    (behind / "x").write_bytes(npy(1.0))
    os.chown(behind / "x", NOBODY, NOBODY)
    script = PRELUDE + textwrap.dedent("""
        os.setegid(int(sys.argv[3])), os.seteuid(int(sys.argv[3]))
        fd = os.open(f"{point}/x", os.O_WRONLY | os.O_TRUNC)
        os.write(fd, npy(2.0))
        os.seteuid(0), os.setegid(0)
        os.unlink(f"{behind}/x")
        gone = sys.argv[4] == "True"
        if not gone:
            with open(f"{behind}/x", "wb") as file:
                file.write(npy(3.0))
        no(errno.EACCES if gone else errno.EEXIST, os.close, fd)
    """)
    subprocess.run([PYTHON, "-c", script, behind, point, str(NOBODY), str(gone)], check=True)
    assert os.listdir(behind) == ([] if gone else ["x"])
    assert gone or (np.load(behind / "x") == 3 and os.stat(behind / "x").st_uid == 0)


def test_what_is_gone_meanwhile_comes_back_only_by_right(world):
    """As a new array, of whoever closes it."""
    behind, point = world
    for directory, mode, number in (("d", 0o755, errno.EACCES), ("e", 0o777, None)):
        (behind / directory).mkdir()
        os.chmod(behind / directory, mode)
        (behind / directory / "x").write_bytes(npy(1.0))
        os.chown(behind / directory / "x", 0, 4444), os.chmod(behind / directory / "x", 0o662)
        close = f"no({number}, os.close, fd)" if number else "os.close(fd)"
        code = f"""
            fd = os.open(f"{{point}}/{directory}/x", os.O_WRONLY | os.O_TRUNC)
            os.write(fd, npy(2.0))
            print(flush=True), sys.stdin.readline()
            {close}
        """
        child = started_as_nobody(code, behind, point)
        os.unlink(behind / directory / "x")
        child.communicate("\n")
        assert child.returncode == 0
    assert os.listdir(behind / "d") == [] and np.load(behind / "e/x") == 2
    status = os.stat(behind / "e/x")
    assert (status.st_uid, status.st_gid) == (NOBODY, NOBODY)
    assert stat.S_IMODE(status.st_mode) == 0o622  # what all may do


OWNERS = "import contextlib\n" + inspect.getsource(acting_as) + """
N, M = int(sys.argv[3]), 1234
def put(path, owner, mode, group=None):
    with open(path, "wb") as file:
        file.write(npy(1.0))
    os.chown(path, owner, owner if group is None else group), os.chmod(path, mode)
def opened(path, value=2.0):
    fd = os.open(path, os.O_WRONLY | os.O_TRUNC)
    os.write(fd, npy(value))
    return fd
def created(path, mode, value):
    fd = os.open(path, os.O_WRONLY | os.O_CREAT, mode)
    os.write(fd, npy(value))
    return fd
def is_now(path, value, *rights):
    status = os.stat(path)
    seen = (np.load(path), status.st_uid, status.st_gid, oct(stat.S_IMODE(status.st_mode)))
    assert seen == (value, *rights[:2], oct(rights[2])), seen
os.mkdir(f"{behind}/d")  # root's
x, there = f"{point}/d/x", f"{behind}/d/x"
"""


@pytest.mark.parametrize("code", [
    pytest.param("""
        put(there, 0, 0o644)
        fd = opened(x)
        os.fchown(fd, N, N), os.fchmod(fd, 0o640)
        os.unlink(there)
        os.close(fd)
        is_now(there, 2, N, N, 0o640)
    """, id="what root sets stays when the old one is gone"),
    pytest.param("""
        put(there, 0, 0o644)
        for flags in (os.O_TRUNC, os.O_CREAT):
            fds = [os.open(x, os.O_WRONLY | flags) for _ in range(2)]
            for value, fd in enumerate(fds):
                os.write(fd, npy(float(value))), os.fchown(fd, N, N), os.fchmod(fd, 0o640)
            for fd in fds:
                os.close(fd)
            is_now(there, 1, N, N, 0o640)
            os.unlink(x)
    """, id="what two of root's set"),
    pytest.param("""
        put(there, N, 0o644)
        with acting_as(N):
            fds = [opened(x, 2.0), opened(x, 3.0)]
            for fd in fds:
                os.fchmod(fd, 0o600)
            for fd in fds:
                os.close(fd)
        is_now(there, 3, N, N, 0o600)
    """, id="twice by its owner in a directory that is not his"),
    pytest.param("""
        os.chmod(f"{behind}/d", 0o777)
        put(there, N, 0o600), put(f"{behind}/d/public", N, 0o644)
        with acting_as(N):
            fd = opened(x)
        with acting_as(M):
            os.rename(f"{behind}/d/public", there)
        with acting_as(N):
            os.close(fd)
        is_now(there, 2, N, N, 0o600)
    """, id="not as public as what is put there meanwhile"),
    pytest.param("""
        put(there, N, 0o644)
        with acting_as(N):
            fd = opened(x)
            os.fchmod(fd, 0o644)
        os.chown(there, 0, 0), os.chmod(there, 0o600)
        with acting_as(N):
            os.close(fd)
        is_now(there, 2, 0, 0, 0o600)
    """, id="what is taken from its owner meanwhile does not come back"),
    pytest.param("""
        put(there, N, 0o644), os.link(there, f"{behind}/d/y")
        with acting_as(N):
            fds = [opened(x, 2.0), opened(f"{point}/d/y", 3.0)]
            for fd in fds:
                os.close(fd)
        is_now(there, 2, N, N, 0o644), is_now(f"{behind}/d/y", 3, N, N, 0o644)
    """, id="each of two names of one array"),
    pytest.param("""
        put(there, N, 0o644)
        with acting_as(N):
            fds = [opened(x, 2.0), opened(x, 3.0)]
        for fd in fds:
            os.close(fd)
        is_now(there, 3, N, N, 0o644)
    """, id="twice by a program that root runs with it"),
    pytest.param("""
        os.chmod(f"{behind}/d", 0o777)
        put(there, 0, 0o606, group=4444)
        with acting_as(N):
            fd = opened(x)
            os.unlink(there)
            os.close(fd)
        is_now(there, 2, N, N, 0o600)
    """, id="whom the group's bits kept out stay out"),
    pytest.param("""
        os.chmod(f"{point}/d", 0o777)
        with acting_as(M):
            other = created(x, 0o666, 1.0)
        put(there, N, 0o600)
        with acting_as(N):
            fd = opened(x, 3.0)
        with acting_as(M):
            os.close(other)
        is_now(there, 1, M, M, 0o644)
        with acting_as(N):
            os.close(fd)
        is_now(there, 3, N, N, 0o600)
    """, id="not theirs who may replace it in its directory"),
    pytest.param("""
        os.chmod(f"{point}/d", 0o1777)
        other = created(x, 0o600, 10.0)
        put(there, N, 0o600)
        with acting_as(N):
            fd = opened(x)
        os.close(other)
        with acting_as(N):
            no(errno.EPERM, os.close, fd)
        is_now(there, 10, 0, 0, 0o600)
    """, id="root's that root has put in the place of another's"),
    pytest.param("""
        os.chmod(f"{point}/d", 0o777)
        for modes in ((0o600, 0o644), (0o644, 0o600)):
            with acting_as(N):
                fds = [created(x, mode, float(mode)) for mode in modes]
                os.close(fds[1])
                is_now(there, modes[1], N, N, modes[1])
                os.close(fds[0])
            is_now(there, modes[0], N, N, 0o600)
            os.unlink(there)
    """, id="of two created at once as private as the more private"),
    pytest.param("""
        put(there, N, 0o640)
        with acting_as(N):
            fd = opened(x)
            os.chmod(x, 0o644), os.fchmod(fd, 0o600)
            os.close(fd)
        is_now(there, 2, N, N, 0o600)
    """, id="the last word is said to the open file"),
    pytest.param("""
        put(there, N, 0o640)
        with acting_as(N):
            fd = opened(x)
        os.chown(there, M, M), os.chmod(there, 0o600)
        with acting_as(N):
            no(errno.EPERM, os.fchmod, fd, 0o666)
            os.close(fd)
        is_now(there, 2, M, M, 0o600)
    """, id="nor is it the former owner's"),
    pytest.param("""
        put(there, N, 0o644)
        with acting_as(N):
            fd = opened(x)
        os.chmod(there, 0o600)
        with acting_as(N):
            os.fchown(fd, -1, N)
            os.close(fd)
        is_now(there, 2, N, N, 0o600)
    """, id="nor about a mode of which it says nothing"),
    pytest.param("""
        put(there, N, 0o644)
        with acting_as(N):
            fds = [opened(x, 2.0), opened(x, 3.0)]
            os.fchmod(fds[0], 0o600), os.close(fds[0])
            os.fchown(fds[1], -1, N), os.close(fds[1])
        is_now(there, 3, N, N, 0o600)
    """, id="also if it has got that here"),
    pytest.param("""
        os.chmod(f"{point}/d", 0o777)
        with acting_as(N):
            fds = [created(x, 0o600, 2.0), created(x, 0o644, 3.0)]
            os.close(fds[0])
            os.fchown(fds[1], -1, N), os.close(fds[1])
        is_now(there, 3, N, N, 0o600)
    """, id="of two created at once too"),
    pytest.param("""
        put(there, N, 0o640)
        for mode in (None, 0o644):
            with acting_as(N):
                fd = opened(x)
                if mode:
                    os.fchmod(fd, mode)
            other = opened(x, 3.0)
            os.fchown(other, M, M), os.fchmod(other, 0o600), os.close(other)
            with acting_as(N):
                if not mode:
                    no(errno.EPERM, os.fchmod, fd, 0o666)
                os.close(fd)
            is_now(there, 2, M, M, 0o600)
            os.chown(x, N, N), os.chmod(x, 0o640)
    """, id="nor is it the former owner's if root has written it meanwhile"),
    pytest.param("""
        for mode in (0o666, 0o644):
            put(there, 0, mode)
            fds = [opened(x, 2.0), opened(x, 3.0)]
            os.fchmod(fds[1], 0o600)
            os.fchown(fds[0], -1, 55), os.close(fds[0])
            is_now(there, 2, 0, 55, mode)
            os.close(fds[1])
            is_now(there, 3, 0, 55, 0o600)
        put(there, N, 0o644)
        with acting_as(N):
            fd = opened(x)
            os.fchmod(fd, 0o600)
        other = opened(x, 3.0)
        os.fchown(other, M, M), os.close(other)
        os.chown(x, -1, 55)
        with acting_as(N):
            os.close(fd)
        is_now(there, 2, M, 55, 0o600)
    """, id="its mode stays when what it replaces gets another owner or group"),
    pytest.param("""
        fds = [created(x, mode, float(mode)) for mode in (0o600, 0o644, 0o644)]
        os.fchown(fds[1], -1, 55)
        for fd in fds[::-1]:
            os.close(fd)
        is_now(there, 0o600, 0, 55, 0o600)
        os.unlink(x)
        fds = [created(x, mode, float(mode)) for mode in (0o600, 0o644)]
        os.fchown(fds[1], -1, 55)
        os.close(fds[0]), os.close(fds[1])
        is_now(there, 0o644, 0, 55, 0o600)
    """, id="so does that of what is created"),
    pytest.param("""
        put(there, N, 0o600)
        with acting_as(N):
            for modes in ((0o600,), (0o640, 0o600)):
                fd = opened(x)
                os.fchmod(fd, 0o644)
                for mode in modes:
                    os.chmod(x, mode)
                os.close(fd)
                is_now(there, 2, N, N, 0o600)
    """, id="the last word may be the one that was said before"),
    pytest.param("""
        put(there, N, 0o644)
        with acting_as(N):
            fds = [opened(x, 2.0), opened(x, 3.0)]
            os.fchown(fds[1], -1, N)
            os.fchmod(fds[0], 0o600)
            os.close(fds[0]), os.close(fds[1])
        is_now(there, 3, N, N, 0o600)
        os.chmod(x, 0o640)
        fd = opened(x)
        os.fchown(fd, -1, 55)
        other = opened(x, 3.0)
        os.fchown(other, M, M), os.fchmod(other, 0o600), os.close(other)
        os.close(fd)
        is_now(there, 2, M, 55, 0o600)
    """, id="a group of its own is no mode and no owner of its own"),
    pytest.param("""
        put(there, N, 0o640)
        fds = [opened(x, 2.0), opened(x, 3.0)]
        os.fchown(fds[0], M, M), os.fchmod(fds[0], 0o644)
        os.fchmod(fds[1], 0o600), os.fchown(fds[1], -1, 55)
        os.close(fds[0]), os.close(fds[1])
        is_now(there, 3, M, 55, 0o600)
        os.unlink(x)
        fds = [created(x, mode, float(mode)) for mode in (0o600, 0o644, 0o640)]
        os.close(fds[1])
        os.fchown(fds[2], M, M), os.close(fds[2])
        is_now(there, 0o640, M, M, 0o640)
        os.close(fds[0])
        is_now(there, 0o600, M, M, 0o600)
    """, id="what another is given to may have a mode of its own"),
    pytest.param("""
        for owner in (0, N):
            fds = [created(x, 0o640, float(value)) for value in range(2)]
            os.fchown(fds[0], -1, 55)
            if owner:
                os.fchown(fds[1], owner, owner)
            os.close(fds[1]), os.close(fds[0])
            is_now(there, 0, owner, 55, 0o640)
            os.unlink(x)
    """, id="what is created with it has its owner, and the mode in a group of its own"),
    pytest.param("""
        fds = [created(x, mode, float(mode)) for mode in (0o600, 0o644)]
        os.close(fds[1])
        os.chmod(x, 0o644)
        os.close(fds[0])
        is_now(there, 0o600, 0, 0, 0o644)
        fd = opened(x)
        os.chmod(x, 0o600)
        os.unlink(x)
        os.close(fd)
        is_now(there, 2, 0, 0, 0o600)
    """, id="the last word by its name holds when it is said again, and when the name goes"),
    pytest.param("""
        put(there, 0, 0o644)
        for go in (lambda: os.rename(x, f"{x}.bak"), lambda: os.unlink(x)):
            old = os.open(x, os.O_RDWR)
            fd = opened(x)
            os.fchmod(fd, 0o600)
            go()
            os.fchmod(old, 0o644), os.close(old)
            os.close(fd)
            is_now(there, 2, 0, 0, 0o600)
    """, id="what has lost the name says nothing"),
    pytest.param("""
        put(there, N, 0o644)
        fd = opened(x)
        os.fchown(fd, 0, 0), os.fchmod(fd, 0o640)
        with acting_as(N):
            os.chmod(x, 0o666)
        os.close(fd)
        is_now(there, 2, 0, 0, 0o640)
        os.chown(x, N, N)
        fd = opened(x)
        os.fchown(fd, 0, 0), os.fchmod(fd, 0o644)
        with acting_as(N):
            os.chmod(x, 0o600)
        os.close(fd)
        is_now(there, 2, 0, 0, 0o600)
        for words in range(3):
            put(there, N, 0o644)
            fd = opened(x)
            os.fchown(fd, 0, 0 if words > 0 else -1)
            if words > 1:
                os.fchmod(fd, 0o660)
            with acting_as(N):
                os.chown(x, -1, N), os.chmod(x, 0o640 if words == 0 else 0o644)
            os.close(fd)
            is_now(there, 2, 0, 0 if words > 0 else N, (0o640, 0o644, 0o640)[words])
        put(there, N, 0o660)
        fd = opened(x)
        os.fchown(fd, 0, -1), os.fchmod(fd, 0o660)
        os.chown(x, -1, 0)
        os.close(fd)
        is_now(there, 2, 0, N, 0o600)
    """, id="its owner's word by its name grants nothing to what is another's"),
    pytest.param("""
        os.chmod(f"{behind}/d", 0o777)
        with acting_as(N):
            fds = [created(x, 0o644, float(value)) for value in range(2)]
            os.fchmod(fds[0], 0o666)
        os.fchown(fds[1], M, M), os.fchmod(fds[1], 0o600)
        os.close(fds[1])
        with acting_as(N):
            os.close(fds[0])
        is_now(there, 0, M, M, 0o600)
    """, id="nor does the former owner's to what was created with it"),
])  # fmt: skip
def test_whose_it_is_in_the_end(world, code):
    behind, point = world
    command = [PYTHON, "-c", PRELUDE + OWNERS + textwrap.dedent(code), behind, point, str(NOBODY)]
    subprocess.run(command, check=True, timeout=60)


def test_two_created_and_closed_at_once_out_of_sight(name):
    """Of a daemon that cannot see who closes them: the one that is closed last stays, and private."""
    behind, point = SHM / name, pathlib.Path("/tmp") / name
    behind.mkdir(), point.mkdir()
    command = ["unshare", "-pf", "--kill-child", sharrfs_binary(), "-f", f"shm://{name}", point]
    daemon = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        wait_until(lambda: mounted(point), "the mount")
        wait_until(lambda: len(daemons(point)) == 1, "the one that mounts to be gone")
        (pid,) = daemons(point)

        def drafts():
            with contextlib.suppress(FileNotFoundError):  # closed since
                files = pathlib.Path(f"/proc/{pid}/fd").iterdir()
                return sum(os.readlink(file).startswith(f"{behind}/#") for file in files)
            return 1

        for _ in range(400):
            fds = [os.open(point / "x", os.O_WRONLY | os.O_CREAT, mode) for mode in (0o644, 0o600)]
            for value, fd in enumerate(fds):
                os.write(fd, npy(float(value)))
            threads = [threading.Thread(target=os.close, args=(fd,)) for fd in fds]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            wait_until(lambda: not drafts(), "both to be settled")
            private = stat.S_IMODE(os.stat(behind / "x").st_mode) == 0o600
            assert private or np.load(behind / "x") == 0
            os.unlink(behind / "x")
    finally:
        unmount(point)
        daemon.wait()
        point.rmdir()


def test_groups(world):
    behind, point = world
    (behind / "d").mkdir()
    os.chown(behind / "d", 0, 4444), os.chmod(behind / "d", 0o2770)
    run_as("""
        with open(f"{point}/d/a", "wb") as file:
            file.write(npy(1.0))
        os.mkdir(f"{point}/d/e")
        os.chown(f"{point}/d/a", -1, 5555)
        no(errno.EPERM, os.chown, f"{point}/d/a", -1, 6666)
        os.unlink(f"{point}/d/a")
        with open(f"{point}/d/b", "wb") as file:
            file.write(npy(1.0))
    """, behind, point, groups=(4444, 5555))  # fmt: skip
    assert os.stat(behind / "d/b").st_gid == os.stat(behind / "d/e").st_gid == 4444
    assert os.stat(behind / "d/b").st_uid == NOBODY
    run_as("""
        no(errno.EACCES, os.listdir, f"{point}/d")
        no(errno.EACCES, open, f"{point}/d/c", "wb")
    """, behind, point)  # fmt: skip


def acl(**entries):
    """An ACL as its attribute has it (linux/posix_acl_xattr.h); nobody and other_user are users' entries, root a group's."""
    tags = {"owner": (1, -1), "nobody": (2, NOBODY), "other_user": (2, NOBODY - 1), "group": (4, -1), "root": (8, 0), "mask": (16, -1), "other": (32, -1)}
    rows = [(*tags[tag], permissions) for tag, permissions in entries.items()]
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHi", tag, permissions, who) for tag, who, permissions in rows)


def test_no_more_than_an_acl_grants(world):
    """To directories, where the kernel asks nobody; and as it is now."""
    behind, point = world
    key = "system.posix_acl_access"
    # The ACL, and the mode that all of the group and all others have by it.
    wanted = {
        acl(owner=7, nobody=5, group=0, mask=7, other=0): 0o700,  # the mode is 0o770
        acl(owner=7, nobody=0, group=5, mask=7, other=5): 0o700,
        acl(owner=7, nobody=7, group=7, mask=5, other=7): 0o755,
        acl(owner=7, group=7, mask=1, other=5): 0o715,
        acl(owner=7, group=5, root=1, mask=7, other=5): 0o751,
        acl(owner=7, nobody=7, group=5, root=7, mask=7, other=5): 0o755,
    }
    (behind / "d/e").mkdir(parents=True), (behind / "d/e/a").write_bytes(npy(1.0))
    os.chown(behind / "d/e", 0, NOBODY)
    try:
        os.setxattr(behind / "d/e", key, next(iter(wanted)))
    except OSError:
        pytest.skip("no ACLs here")
    for value, mode in wanted.items():
        os.setxattr(behind / "d/e", key, value)
        wait_until(lambda mode=mode: os.stat(point / "d/e").st_mode == 0o40000 | mode, oct(mode))
    for value in list(wanted)[:2]:
        os.setxattr(behind / "d/e", key, value)
        wait_until(lambda: os.stat(point / "d/e").st_mode == 0o40700, "the ACL")
        for groups in ([], [NOBODY]):
            run_as("""
                no(errno.EACCES, os.listdir, f"{point}/d/e")
                no(errno.EACCES, os.stat, f"{point}/d/e/a")
                no(errno.EACCES, open, f"{point}/d/e/a", "rb")
            """, behind, point, groups=groups)  # fmt: skip
    os.removexattr(behind / "d/e", key)
    os.chmod(behind / "d/e", 0o755)
    wait_until(lambda: os.stat(point / "d/e").st_mode == 0o40755, "the ACL is gone")
    # That of a file counts when it is opened.
    os.setxattr(behind / "d/e/a", key, acl(owner=6, nobody=0, group=6, mask=6, other=6))
    run_as('assert os.listdir(f"{point}/d/e") == ["a"]' + FORBIDDEN, behind, point)
    assert np.load(behind / "d/e/a") == 1


# What nobody may do to d/e/a by its ACL, and could by its mode.
FORBIDDEN = """
for how in ("rb", "r+b", "wb"):
    no(errno.EACCES, open, f"{point}/d/e/a", how)
for key in ("dtype", "uri"):
    no(errno.EACCES, os.getxattr, f"{point}/d/e/a", f"user.sharr.{key}")
"""


def test_no_more_than_an_acl_grants_by_a_users_mount(name, tmp_path, public_build):
    """Whose daemon cannot try what others may."""
    behind, point = SHM / name, pathlib.Path("/tmp") / name
    if not os.path.exists("/etc/fuse.conf"):
        pytest.skip("needs /etc/fuse.conf")
    (tmp_path / "fuse.conf").write_text("user_allow_other\n")
    os.mknod(tmp_path / "fuse", stat.S_IFCHR, os.stat("/dev/fuse").st_rdev)
    os.chmod(tmp_path / "fuse", 0o666)
    other = NOBODY - 1
    (behind / "d/e").mkdir(parents=True), point.mkdir()
    for file, group in (("d/e/a", NOBODY), ("d/e/b", other), ("d/e/c", NOBODY)):
        (behind / file).write_bytes(npy(1.0))
        os.chown(behind / file, NOBODY, group)
    os.chmod(behind / "d/e/c", 0o600)
    (behind / "g").mkdir()
    os.chown(behind / "g", NOBODY, other), os.chmod(behind / "g", 0o070)
    (behind / "h").mkdir()
    (behind / "h/x").write_bytes(npy(0.0))
    for path, rights in ((behind / "h", 0o777), (behind / "h/x", 0o666)):
        os.chown(path, NOBODY, NOBODY), os.chmod(path, rights)
    for path in (behind, point):
        os.chown(path, NOBODY, NOBODY)
    try:
        for file, value in (
            ("a", acl(owner=6, other_user=0, group=6, mask=6, other=6)),
            ("b", acl(owner=6, group=4, root=6, mask=6, other=0)),
        ):
            os.setxattr(behind / "d/e" / file, "system.posix_acl_access", value)
    except OSError:
        pytest.skip("no ACLs here")
    code = PRELUDE + FORBIDDEN + textwrap.dedent("""
        assert np.load(f"{point}/d/e/b") == 1
        no(errno.EACCES, open, f"{point}/d/e/b", "r+b")
        no(errno.EACCES, open, f"{point}/d/e/c", "rb")
        no(errno.EACCES, os.utime, f"{point}/d/e/a")
        no(errno.EACCES, open, f"{point}/g/new", "xb")  # to its group, in which the daemon is not
        assert os.getxattr(f"{point}/d/e/b", "user.sharr.dtype") == b"float64"
        for i in range(60):  # what is written later is what stays
            with open(f"{point}/h/x", "rb"):
                for value in (0.0, i + 1.0):
                    with open(f"{point}/h/x", "wb") as file:
                        file.write(npy(value))
            late = time.monotonic() + 20
            while np.load(f"{point}/h/x") != i + 1:
                assert time.monotonic() < late
                time.sleep(0.001)
    """)  # fmt: skip
    script = """
        umask 022
        mount --bind "$1/fuse.conf" /etc/fuse.conf && mount --bind "$1/fuse" /dev/fuse &&
            setpriv --reuid=$2 --regid=$2 --clear-groups "$3" "$4" "$5" -o allow_other &&
            setpriv --reuid=$6 --regid=$6 --clear-groups "$7" -c "$8" "$4" "$5"
        status=$?; umount "$5"; exit $status
    """
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", script, "sh", tmp_path, str(NOBODY), public_build / "bin/sharrfs", f"shm://{name}", point,
         str(other), PYTHON, code],
        capture_output=True, text=True, cwd="/", timeout=60,
    )  # fmt: skip
    wait_until(lambda: not daemons(point), "the daemon's end")
    point.rmdir()
    assert done.returncode == 0, done.stderr
    assert [np.load(behind / "d/e" / file) for file in "abc"] == [1] * 3


def test_an_inode_that_is_used_again(name, tmp_path):
    """Is not the one that was open to be overwritten."""
    behind, point = tmp_path / "behind", pathlib.Path("/tmp") / name
    behind.mkdir(), point.mkdir()
    let_in(behind)
    os.chmod(behind, 0o1777)
    (behind / "x").write_bytes(npy(1.0))
    os.chmod(behind / "x", 0o666)
    with mounting(f"file://{behind}", point, "-o", "allow_other"):
        code = """
            fd = os.open(f"{point}/x", os.O_WRONLY | os.O_TRUNC)
            os.write(fd, npy(2.0))
            print(flush=True), sys.stdin.readline()
            no(errno.EPERM, os.close, fd)  # sticky
        """
        child = started_as_nobody(code, behind, point)
        before = os.stat(behind / "x").st_ino
        os.unlink(behind / "x")
        (behind / "x").write_bytes(npy(3.0))
        os.chmod(behind / "x", 0o600)
        same = os.stat(behind / "x").st_ino == before
        child.communicate("\n")
        assert child.returncode == 0 and np.load(behind / "x") == 3
    point.rmdir()
    if not same:
        pytest.skip("no inode is used again here")


@pytest.mark.parametrize("capability", ["setgid", "setuid"])
def test_a_daemon_that_cannot_act_for_others(name, tmp_path, capability):
    """As in a container that is given less: it refuses them, and answers on."""
    behind, point = SHM / name, tmp_path / "mnt"
    behind.mkdir(), point.mkdir()
    let_in(tmp_path)
    (behind / "x").write_bytes(npy(1.0))
    less = tmp_path / "sharrfs"
    less.write_text(
        f'#!/bin/sh\nexec setpriv --bounding-set=-{capability} "{sharrfs_binary()}" "$@"\n'
    )
    less.chmod(0o755)
    with mounting(f"shm://{name}", point, "-o", "allow_other", binary=less):
        for mode in (0o644, 0o664, 0o666):
            run_as('no(errno.EPERM, open, f"{point}/x", "rb")', behind, point)
            os.chmod(behind / "x", mode)
            wait_until(lambda mode=mode: os.stat(point / "x").st_mode & 0o777 == mode, "the mode")
            assert np.load(point / "x") == 1


def test_set_id_and_devices(world):
    behind, point = world
    with open("/proc/self/mounts") as mounts:
        (line,) = [line for line in mounts if line.split()[1] == str(point)]
    assert {"nosuid", "nodev", "default_permissions"} <= set(line.split()[3].split(","))
    assert line.split()[2] == "fuse.sharrfs"
    (behind / "a").write_bytes(npy(1.0))
    os.chmod(behind / "a", 0o6777)
    assert stat.S_IMODE(os.stat(point / "a").st_mode) == 0o777
    run_as('no(errno.EPERM, os.chmod, f"{point}/a", 0o4777)', behind, point)


def test_only_its_owner_without_allow_other(name, tmp_path):
    point = pathlib.Path("/tmp") / name
    point.mkdir()
    sharr.create(name, 3)
    try:
        with mounting("shm://", point):
            run_as("no(errno.EACCES, os.listdir, point)", "/", point)
    finally:
        point.rmdir()


def test_the_daemon_keeps_no_more_than_the_manual_says(world):
    behind, point = world
    manual = (ROOT / "fs/sharrfs.1").read_text()
    section = manual[manual.index(".SH PRIVILEGES") : manual.index(".SH EXIT STATUS")]
    wanted = set(re.findall(r"CAP_[A-Z_]+", section))
    numbers = {"CHOWN": 0, "DAC_OVERRIDE": 1, "DAC_READ_SEARCH": 2, "FOWNER": 3, "FSETID": 4, "SETGID": 6,
               "SETUID": 7, "SYS_PTRACE": 19, "SYS_ADMIN": 21}  # fmt: skip
    bits = sum(1 << numbers[capability.removeprefix("CAP_")] for capability in wanted)
    (pid,) = daemons(point)
    (behind / "a").write_bytes(npy(1.0))
    run_as('open(f"{point}/a", "rb").read()', behind, point)
    tasks = list(pathlib.Path(f"/proc/{pid}/task").iterdir())
    if "SHARR_SHARRFS" in os.environ:  # a sanitizer has a thread before there is a main()
        tasks = [pathlib.Path(f"/proc/{pid}/task/{pid}")]
    for task in tasks:
        status = dict(line.split(":\t", 1) for line in (task / "status").read_text().splitlines())
        assert int(status["CapPrm"], 16) == int(status["CapEff"], 16) == bits
        assert status["CapInh"].strip("0") == "" and status["NoNewPrivs"] == "1"
        assert status["Uid"].split() == ["0"] * 4
    # The unit gives no less.
    unit = (ROOT / "fs/sharrfs@.service.in").read_text()
    assert set(re.search(r"CapabilityBoundingSet=(.*)", unit)[1].split()) == wanted


def test_an_ordinary_users_mount_writes(name, public_build):
    """By fusermount3, without passthrough; everything belongs to that user."""
    behind, point = SHM / name, pathlib.Path("/tmp") / name
    behind.mkdir(), point.mkdir()
    os.chown(behind, NOBODY, NOBODY), os.chown(point, NOBODY, NOBODY)
    (behind / "roots").write_bytes(npy(1.0))
    (behind / "grouped").write_bytes(npy(1.0))
    os.chown(behind / "grouped", NOBODY, 4444)
    fuse_mode = stat.S_IMODE(os.stat("/dev/fuse").st_mode)
    os.chmod("/dev/fuse", 0o666)
    try:
        out = run_as("""
            subprocess.run([sys.argv[3], f"shm://{os.path.basename(behind)}", point], check=True)
            try:
                data = npy(np.arange(100_000.0))
                def sh(script):
                    subprocess.run(["bash", "-e", "-c", script], cwd=point, check=True)
                with open(f"{point}/a", "wb") as file:
                    file.write(data)
                sh("cp a b; cat a > c; cat c > b; mv b d; mkdir e; mv d e/; cmp a e/d; chmod 600 a; touch a")
                sh("rm c; rm -r e; dd if=a of=f status=none; cmp a f; flock -n f true")
                with open(f"{point}/f", "wb") as file:
                    file.write(data[:-1])
                    no(errno.EINVAL, file.close)
                no(errno.EACCES, open, f"{point}/roots", "r+b")
                no(errno.EACCES, open, f"{point}/roots", "wb")
                fd = os.open(f"{point}/locked", os.O_WRONLY | os.O_CREAT, 0o400)
                os.write(fd, data), os.close(fd)
                os.unlink(f"{point}/roots")  # the directory is ours
                fd = os.open(f"{point}/grouped", os.O_WRONLY | os.O_TRUNC)  # by a group that is ours
                os.write(fd, data), os.fchmod(fd, 0o640), os.close(fd)
                assert stat.S_IMODE(os.stat(f"{point}/grouped").st_mode) == 0o640
                os.unlink(f"{point}/grouped")
                print(*sorted(os.listdir(point)))
            finally:
                subprocess.run(["fusermount3", "-u", point], check=True)
        """, behind, point, public_build / "bin/sharrfs")  # fmt: skip
    finally:
        os.chmod("/dev/fuse", fuse_mode)
        if mounted(point):
            unmount(point)
        point.rmdir()
    assert out == "a f locked\n"
    assert sorted(os.listdir(behind)) == ["a", "f", "locked"]
    for entry in behind.iterdir():
        assert entry.stat().st_uid == NOBODY
    assert (behind / "f").read_bytes() == (behind / "a").read_bytes()


def test_who_may_enter_a_namespace_that_is_made_again(world):
    behind, point = world
    uri = f"shm://{behind.name}"
    value = "sys.stdout.write(str(np.load(f'{point}/a')))"
    sharr.put(f"{uri}/a", 1.0)
    assert run_as(value, behind, point) == "1.0"  # the kernel remembers what there is
    sharr.delete_all(f"{uri}/")
    behind.mkdir(0o700)
    sharr.put(f"{uri}/a", 2.0)
    for denied in (value, "os.listdir(point)"):
        run_as(f"""
            try:
                {denied}
            except PermissionError:
                sys.exit()
            sys.exit("let in")
        """, behind, point)  # fmt: skip
    assert np.load(point / "a") == 2.0
    behind.chmod(0o755)
    assert run_as(value, behind, point) == "2.0"
