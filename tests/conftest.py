"""What all Python tests share: the build under test, names that are cleaned up, other processes.

As root the tests run in a mount namespace of their own, so that no mount outlives them.
"""

import ctypes
import itertools
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import textwrap
import time

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
BUILD = pathlib.Path(os.environ.get("SHARR_BUILD", ROOT / "build"))
PYTHON = "/usr/bin/python3"
SHM = pathlib.Path("/dev/shm")
PREFIX = f"sharr-test-{os.getpid()}-"
IS_ROOT = os.geteuid() == 0
NOBODY = 65534

sys.path.insert(0, str(BUILD / "python"))
os.environ["PYTHONPATH"] = str(BUILD / "python")

needs_root = pytest.mark.skipif(not IS_ROOT, reason="needs root")


def pytest_configure(config):
    # A shell starts what runs in its background with SIGINT ignored, which children would inherit.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # So does nohup with SIGHUP. Children have the default of what is handled here.
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
        signal.signal(signal.SIGHUP, lambda number, frame: None)
    if IS_ROOT and ctypes.CDLL(None, use_errno=True).unshare(0x00020000) == 0:  # CLONE_NEWNS
        subprocess.run(["mount", "--make-rprivate", "/"], check=True)


def left_behind():
    """What these tests have left in /dev/shm; not what others, beside them, have on its way."""

    def there():
        return {entry for entry in os.listdir(SHM) if entry.startswith((PREFIX, ".sharr-tmp-"))}

    found = there()
    deadline = time.monotonic() + 10
    while any(not entry.startswith(PREFIX) for entry in found) and time.monotonic() < deadline:
        time.sleep(0.01)
        found &= there()
    return sorted(found)


_numbers = itertools.count()


@pytest.fixture
def name():
    """A name under shm:// that no other test has; what begins with it goes at the end."""
    stem = f"{PREFIX}{next(_numbers)}"
    yield stem
    for entry in SHM.glob(stem + "*"):
        shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
    assert left_behind() == []


def python(code, *args, check=True, timeout=120, **kwargs):
    """Run code in another process; returns what it printed."""
    done = subprocess.run(
        [PYTHON, "-c", textwrap.dedent(code), *map(str, args)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, timeout=timeout, **kwargs,
    )  # fmt: skip
    if check:
        assert done.returncode == 0, done.stderr
        return done.stdout
    return done


def in_small_shm(size, code, *args):
    """Run code where /dev/shm is a tmpfs of that size."""
    script = 'mount -t tmpfs -o size="$1",mode=1777 tmpfs /dev/shm && shift && exec "$@"'
    return subprocess.run(
        ["unshare", "-m", "sh", "-c", script, "sh", size, PYTHON, "-c", textwrap.dedent(code),
         *map(str, args)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, timeout=120,
    )  # fmt: skip


def traced(warm, code, *args):
    """The system calls that code makes when everything has been loaded that warm needs."""
    program = f"import os, sys, numpy, sharr\n{warm}\nos.write(2, b'MARK')\n{code}\nos.write(2, b'MARK')"
    done = subprocess.run(
        ["strace", "-qq", PYTHON, "-c", program, *args], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stderr.split('"MARK"')[1].splitlines()[1:-1]
    return [line.removeprefix("MARK").split("(")[0] for line in lines]


def tracing_works():
    try:
        return subprocess.run(["strace", "-qq", "true"], capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


needs_strace = pytest.mark.skipif(not tracing_works(), reason="needs strace and ptrace")


def wait_until(condition, what):
    """Poll for something another process does; a deadlock, not slowness, makes it fail."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain: {what}"
        time.sleep(0.005)


@pytest.fixture(scope="session")
def public_build(tmp_path_factory):
    """The build where every user can read it."""
    base = pathlib.Path("/tmp") / f"{PREFIX}build"
    shutil.copytree(BUILD / "python", base / "python")
    shutil.copytree(BUILD / "bin", base / "bin")
    shutil.copy2(sharrfs_binary(), base / "bin" / "sharrfs")
    for path in [base, *base.rglob("*")]:
        path.chmod(0o755)
    yield base
    shutil.rmtree(base)


def sharrfs_binary():
    return os.environ.get("SHARR_SHARRFS", str(BUILD / "bin" / "sharrfs"))


def as_nobody(*command):
    return [
        "setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", *map(str, command)
    ]  # fmt: skip
