"""Many processes at once, through the mount and beside it."""

import contextlib
import os
import pathlib
import subprocess
import textwrap

import numpy as np
import sharr
from conftest import PYTHON, SHM, wait_until
from mounts import alone, daemons, mode, needs_fuse, space  # the fixtures come by import

pytestmark = needs_fuse

PROCESSES, STEPS = 16, 120

# An array here has one value throughout, its first element is its length, and so a mix of two, or a
# part of one, is seen.
WORKER = """
import io, os, random, sys
import numpy as np, sharr

uri, behind, point, seed, steps = *sys.argv[1:4], int(sys.argv[4]), int(sys.argv[5])
rng = random.Random(seed)
names = [f"a{i}" for i in range(12)] + [f"d{i}/a{j}" for i in range(2) for j in range(4)]
GONE = (FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError)

def fresh():
    size = rng.choice([2, 50, 5000, 40_000])
    return np.full(size, size, "i4")

def check(a):
    assert a.size >= 2 and (a == a.size).all(), (a.size, a[:10])

def write(top, name):
    file = io.BytesIO()
    np.save(file, fresh())
    flags = rng.choice([os.O_TRUNC, os.O_EXCL])
    fd = os.open(f"{point}/{name}", os.O_WRONLY | os.O_CREAT | flags)
    data = file.getvalue()
    if rng.random() < 0.2:
        data = data[: rng.randrange(len(data))]  # not whole: refused
    half = rng.randrange(len(data) + 1)
    os.write(fd, data[:half]), os.write(fd, data[half:])
    try:
        os.close(fd)
    except OSError as error:
        assert error.errno in (22, 17, 2), error

def create(top, name):
    value = fresh()
    temporary = f"{uri}/tmp{seed}"
    a = sharr.create(temporary, value.shape, value.dtype)
    a[:] = value
    os.rename(f"{behind}/tmp{seed}", f"{behind}/{name}")

def read(top, name):
    check(np.load(f"{top}/{name}"))

def attach(top, name):
    check(sharr.attach(f"{top}/{name}", "r"))

def rename(top, name):
    os.rename(f"{top}/{name}", f"{top}/{rng.choice(names)}")

def remove(top, name):
    os.unlink(f"{top}/{name}")

def listing(top, name):
    for directory, _, files in os.walk(top):
        for file in files:
            if not file.startswith("."):
                os.stat(f"{directory}/{file}")

def directory(top, name):
    try:
        os.mkdir(f"{top}/d{rng.randrange(2)}")
    except FileExistsError:
        os.rmdir(f"{top}/d{rng.randrange(2)}")

def attributes(top, name):
    os.getxattr(f"{point}/{name}", "user.sharr.shape")
    os.chmod(f"{top}/{name}", 0o644), os.utime(f"{top}/{name}")

for step in range(steps):
    action = rng.choice([write, write, create, read, attach, rename, remove, listing, directory, attributes])
    top, name = rng.choice([behind, point]), rng.choice(names)
    try:
        action(top, name)
    except GONE:
        pass
    except OSError as error:
        # ENOTEMPTY; ESTALE of a name replaced twice in one call; ENODEV of one that is replaced too
        # often to be found behind a mount that cannot be mapped
        if error.errno not in (39, 116) and (error.errno, action) != (19, attach):
            raise
"""


def resident(pid):
    status = dict(
        line.split(":\t", 1) for line in pathlib.Path(f"/proc/{pid}/status").read_text().splitlines()
    )
    return int(status["VmRSS"].split()[0])


def test_listings_in_progress_share_memory(space):
    """A program that stops in the middle of a directory, and twenty of them."""
    uri, _, point = space
    for i in range(10_000):
        sharr.create(f"{uri}/many/{i:0100}", 1, "u1")
    (pid,) = daemons(point)
    os.listdir(point / "many")
    memory = []
    with contextlib.ExitStack() as stack:
        for _ in range(20):
            next(stack.enter_context(os.scandir(point / "many")))
            memory.append(resident(pid))
    if "SHARR_SHARRFS" not in os.environ:  # a sanitizer keeps what was freed
        assert memory[-1] < memory[3] + 6000, memory


def run(uri, behind, point, seed):
    workers = [
        subprocess.Popen(
            [PYTHON, "-c", WORKER, uri, behind, point, str(seed + i), str(STEPS)], stderr=-1, text=True
        )
        for i in range(PROCESSES)
    ]
    for worker in workers:
        _, err = worker.communicate(timeout=300)
        assert worker.returncode == 0, err


def test_load(space, mode):
    """Ends with every array whole, and with nothing left in the daemon."""
    uri, behind, point = space
    (pid,) = daemons(point)
    sanitized = "SHARR_SHARRFS" in os.environ  # it keeps what was freed
    first = 0 if sanitized else 3  # threads and what malloc keeps for each come with the first loads
    for turn in range(first):
        run(uri, behind, point, turn * 100)
    fds = len(os.listdir(f"/proc/{pid}/fd"))
    memory = []
    for turn in range(first, first + 4):
        run(uri, behind, point, turn * 100)
        for array in sharr.list(uri):
            value = sharr.attach(array.name, "r")
            assert (value == value.size).all()
        seen = {os.path.relpath(os.path.join(d, f), point) for d, _, fs in os.walk(point) for f in fs}
        assert seen == {a.name.removeprefix(f"{uri}/") for a in sharr.list(uri)}
        assert not [n for _, _, files in os.walk(behind) for n in files if n.startswith(".sharr-tmp-")]
        # The daemon knows a file for as long as the kernel does, which is until it wants the memory.
        with contextlib.suppress(OSError), alone(), open("/proc/sys/vm/drop_caches", "w") as file:
            file.write("2")
        memory.append(resident(pid))
    wait_until(lambda: len(os.listdir(f"/proc/{pid}/fd")) <= fds, "descriptors to be closed")
    if not sanitized:
        assert memory[-1] < memory[0] + 3000, memory
    # No backing id holds the memory of what is deleted.
    free = os.statvfs(SHM).f_bfree
    sharr.create(f"{uri}/large", 64 << 20, "u1")
    np.load(point / "large"), (point / "large").write_bytes((point / "large").read_bytes())
    os.unlink(point / "large")
    wait_until(lambda: os.statvfs(SHM).f_bfree > free - 2000, "its memory to be free")
