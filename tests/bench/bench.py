"""Times sharr, its peers and its floors side by side.

usage: bench.py PEER_PYTHON FLOOR OUTPUT [ROW ...]

PEER_PYTHON has the package SharedArray, FLOOR is the program built from floor.cpp. Every row is
measured in rounds; in each, all sides run one after the other, so that a machine whose speed drifts
does so for all. A ratio is the median over the rounds of ours divided by the other's: below 1, ours
is faster. Runs in a mount namespace of its own, as root, with a /dev/shm of its own for each page
size, so that nothing of the machine's is touched: huge=advise gives huge pages to who asks for them,
as sharr does and no peer, huge=always to all.
"""

import contextlib
import glob
import hashlib
import json
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time

PEER, FLOOR, OUTPUT = sys.argv[1:4]
ME = sys.executable
SHM = "/dev/shm"
GIB = 1 << 30

# Runs in the Python of whoever is measured: setup once, then for each number on stdin that many
# repetitions of the statement, in seconds each; or what sample() returns, where setup defines that.
WORKER = """
import sys, time
exec(sys.argv[1])
if sys.argv[2]:
    code = compile(sys.argv[2], "statement", "exec")
    def sample(count):
        start = time.perf_counter()
        for _ in range(count):
            exec(code, globals())
        return (time.perf_counter() - start) / max(count, 1)
for line in sys.stdin:
    print(sample(int(line)), flush=True)
"""

# A sample() in a process of its own: what is first there is first. repeats: in work().
FRESH = """
import os
repeats = 1
def sample(count):
    ends = os.pipe()
    if os.fork() == 0:
        try:
            start = time.perf_counter()
            work()
            os.write(ends[1], repr(time.perf_counter() - start).encode())
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            os._exit(0)
    os.close(ends[1])
    text = os.read(ends[0], 100)
    os.close(ends[0])
    os.wait()
    return float(text) / repeats
"""


class Side:
    """One of those that are compared: a process that answers counts with seconds."""

    def __init__(self, label, command, ours=True):
        environment = {k: v for k, v in os.environ.items() if ours or k != "PYTHONPATH"}
        # shared_memory takes what another process may still use for leaked, and removes it.
        environment["PYTHONWARNINGS"] = "ignore"
        self.label = label
        self.samples = []
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def measure(self, count):
        self.process.stdin.write(f"{count}\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            sys.exit(f"bench: {self.label} has failed, see above")
        return float(answer)

    def memory(self):
        """Its own memory and its share of files in memory, bytes; a page of n processes counts 1/n."""
        with open(f"/proc/{self.process.pid}/smaps_rollup") as rollup:
            return sum(map(int, re.findall(r"Pss_(?:Anon|Shmem):\s+(\d+)", rollup.read()))) * 1024

    def close(self):
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


def ours(setup, statement="", label="sharr"):
    return Side(label, [ME, "-c", WORKER, "import sharr\n" + setup, statement])


def dropin(setup, statement):
    setup = "import SharedArray as S\n" + setup
    return Side("SharedArray (ours)", [ME, "-c", WORKER, setup, statement])


def upstream(setup, statement=""):
    setup = "import SharedArray as S\n" + setup
    return Side("SharedArray", [PEER, "-c", WORKER, setup, statement], ours=False)


def plain(label, setup, statement=""):
    return Side(label, [ME, "-c", WORKER, setup, statement])


def floor(name, file="none"):
    label = "floor" if name in ("attach", "attach-first", "create", "create-let-go", "touch") else name
    return bare(label, name, f"{SHM}/{file}")


def bare(label, name, path):
    """A system call by itself, without Python around it."""
    return Side(label, [FLOOR, name, path])


def library(name):
    """The same by the library, from C++."""
    return bare("sharr in C++", f"library-{name}", f"{SHM}/l")


results = []
now = ""  # which of ROWS is being measured


def progress(text):
    print(f"bench: {now}: {text}", file=sys.stderr, flush=True)


def add(found):
    at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    results.append({"row": now.split()[0], "measured": at, **found})


def single(what, value, limit, unit, text="", samples=()):
    """A row of one number, in units, that has no other side; samples: that it was taken from, too."""
    found = {"what": what, "value": value, "unit": unit, "limit": limit, "samples": samples}
    add(found)
    print(f"| {what} | {value:.3g} {unit}{text} | – | – | – | {verdict(found)} |", flush=True)


def row(what, count, rounds, first, others, limits={}, twice=False):
    """Measures, and prints a line for each other side.

    count: repetitions in a sample; none: as many as take 30 ms. limits: what the ratio must not
    exceed. twice: each side runs once more before each sample. What takes large memory is to take
    what was free a moment ago: from a virtual machine the host may have taken back what was free
    for some seconds, and what it takes to be given it again is no side's doing.
    """
    progress(what)
    sides = [first, *others]
    try:
        for side in sides:
            once = side.measure(count or 300)  # warm
            side.count = count or max(1, round(0.03 / once))
        for turn in range(rounds):
            first_now = turn % len(sides)
            for side in sides[first_now:] + sides[:first_now]:
                if twice:
                    side.measure(side.count)
                side.samples.append(side.measure(side.count))
    finally:  # nobody is left to write where this /dev/shm was
        for side in sides:
            side.close()
    for other in others:
        ratios = sorted(a / b for a, b in zip(first.samples, other.samples))
        report(what, first, other, ratios, limits.get(other.label))


def report(what, first, other, ratios, limit):
    quarter = len(ratios) // 4
    found = {
        "what": what, "ours": first.label, "other": other.label,
        "ours_seconds": first.samples, "other_seconds": other.samples,
        "ratio": statistics.median(ratios), "quartiles": [ratios[quarter], ratios[-1 - quarter]],
        "limit": limit,
    }  # fmt: skip
    add(found)
    print(
        f"| {what} | {first.label} {duration(first.samples)} | {other.label} "
        f"{duration(other.samples)} | {found['ratio']:.2f} "
        f"| {found['quartiles'][0]:.2f}–{found['quartiles'][1]:.2f} | {verdict(found)} |",
        flush=True,
    )


def missed(found):
    return found["limit"] is not None and found.get("ratio", found.get("value")) > found["limit"]


def verdict(found):
    if found["limit"] is None:
        return "–"
    unit = f" {found['unit']}" if "unit" in found else ""
    return f"≤ {found['limit']}{unit}{' missed' if missed(found) else ''}"


def duration(samples):
    seconds = statistics.median(samples)
    for unit, scale in (("s", 1), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds * 1e9:.0f} ns"


@contextlib.contextmanager
def shm(options):
    """A /dev/shm of its own while the block runs."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", SHM], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", SHM], check=True)


SMALL = "size=80%,nr_inodes=1m"
HUGE = SMALL + ",huge=advise"
ALWAYS = SMALL + ",huge=always"

# Everybody's array of 1 KiB.
MAKE = "sharr.create('a', 128, exist_ok=True)\n"
MAKE_UPSTREAM = "try: S.create('shm://s', 128)\nexcept FileExistsError: pass\n"
MAKE_MEMORY = (
    "from multiprocessing import shared_memory\nimport numpy as np\n"
    "try: shared_memory.SharedMemory('m', True, 1024).close()\nexcept FileExistsError: pass\n"
)
ATTACH_MEMORY = (
    "x = shared_memory.SharedMemory('m'); y = np.ndarray(128, float, x.buf); del y; x.close()"
)
NPY = b"{'descr': '|u1', 'fortran_order': False, 'shape': (0,), }"
NPY = b"\x93NUMPY\x01\x00\x76\x00" + NPY.ljust(117) + b"\n"
DUMP = f"import joblib, numpy as np\njoblib.dump(np.zeros(128), '{SHM}/j')\n"


def saved(file):
    return f"import numpy as np\nnp.save('{SHM}/{file}', np.zeros(128))\n"


def memory_side():
    return plain("shared_memory", MAKE_MEMORY, ATTACH_MEMORY)


def load_side():
    return plain("np.load(mmap_mode)", saved("f.npy"), f"x = np.load('{SHM}/f.npy', mmap_mode='r+'); del x")


def fresh(label, name, setup, make, attach, python=ME):
    """Attaches 300 arrays that its process has not seen, so that their headers have to be read."""
    setup = f"import contextlib\n{setup}\nnames = [{name!r}.format(i) for i in range(300)]\n"
    setup += f"for n in names:\n    with contextlib.suppress(FileExistsError): {make}\n"
    setup += f"def work():\n    for n in names: {attach}; del x\n{FRESH}repeats = len(names)\n"
    return Side(label, [python, "-c", WORKER, setup, ""], ours=python == ME)


def attach_first():
    package = "import SharedArray as S", "S.create(n, 128)", "x = S.attach(n)"

    def peers():
        return [
            fresh("SharedArray", "shm://theirs{}", *package, PEER),
            fresh("shared_memory", "memory{}",
                  "from multiprocessing import shared_memory\nimport numpy as np",
                  "shared_memory.SharedMemory(n, True, 1024).close()",
                  "x = shared_memory.SharedMemory(n); y = np.ndarray(128, float, x.buf); del y; x.close()"),
            fresh("np.load(mmap_mode)", SHM + "/first{}.npy", "import numpy as np",
                  "np.save(n, np.zeros(128))", "x = np.load(n, mmap_mode='r+')"),
            floor("attach-first", "floor"),
        ]  # fmt: skip

    row("attach, the first time", 1, 25,
        fresh("sharr", "first{}", "import sharr", "sharr.create(n, 128)", "x = sharr.attach(n)"),
        peers(), {"SharedArray": 1.15})  # fmt: skip
    row("attach, the first time, drop-in", 1, 25,
        fresh("SharedArray (ours)", "shm://first{}", *package), peers(),
        {"SharedArray": 1.0, "shared_memory": 0.45, "np.load(mmap_mode)": 0.15})  # fmt: skip


def attach():
    with shm(SMALL):
        row("attach, seen before", None, 25, ours(MAKE, "x = sharr.attach('a'); del x"),
            [upstream(MAKE_UPSTREAM, "x = S.attach('shm://s'); del x"), memory_side(), load_side(),
             plain("np.memmap", saved("g.npy"),
                   f"x = np.memmap('{SHM}/g.npy', float, 'r+', 128, 128); del x"),
             plain("joblib.load", DUMP, f"x = joblib.load('{SHM}/j', mmap_mode='r+'); del x"),
             floor("attach", "a")], {"SharedArray": 1.15})  # fmt: skip
        row("attach, seen before, C++", None, 25, library("attach"), [floor("attach", "a")])
        row("attach, seen before, drop-in", None, 25,
            dropin("import sharr\n" + MAKE, "x = S.attach('shm://a'); del x"),
            [upstream(MAKE_UPSTREAM, "x = S.attach('shm://s'); del x"), memory_side(), load_side()],
            {"SharedArray": 1.0, "shared_memory": 0.45, "np.load(mmap_mode)": 0.15})  # fmt: skip
        row("attach again, while attached", None, 25,
            ours(MAKE + "held = sharr.attach('a'); time.sleep(0.1)", "x = sharr.attach('a'); del x"),
            [upstream(MAKE_UPSTREAM + "held = S.attach('shm://s')", "x = S.attach('shm://s'); del x")],
            {"SharedArray": 0.45})  # fmt: skip
        attach_first()


def create():
    with shm(SMALL):

        def pair(what, keep, label, side, make, delete):
            theirs = f"{keep}S.create('shm://o', 128); S.delete('shm://o')"
            row(what, None, 25, side("", f"{keep}{make}; {delete}"),
                [floor(label, "x"), upstream("", theirs),
                 plain("shared_memory", MAKE_MEMORY,
                       "x = shared_memory.SharedMemory('p', True, 1024); x.close(); x.unlink()")],
                {"floor": 1.1, "SharedArray": 1.0})  # fmt: skip

        own = "sharr.create('n', 128)", "sharr.delete('n')"
        pair("create + delete", "x = ", "create", ours, *own)
        pair("create, let go + delete", "", "create-let-go", ours, *own)
        package = "S.create('shm://n', 128)", "S.delete('shm://n')"
        pair("create + delete, drop-in", "x = ", "create", dropin, *package)
        row("create + delete, C++", None, 25, library("create"), [floor("create", "x")], {"floor": 1.1})


# Without the time that it takes to delete it.
UNTIL_DELETED = """
import os
def sample(count):
    start = time.perf_counter()
    {}
    taken = time.perf_counter() - start
    {}
    return taken
"""
FILL = UNTIL_DELETED.format("x = {}; x[:] = 1; del x", "{}")


def fill():
    for what, options, limit in (
        ("huge=advise", HUGE, 0.33), ("4 KiB pages", SMALL, 1.1), ("huge=always", ALWAYS, None)
    ):  # fmt: skip
        with shm(options):
            row(f"create + fill 1 GiB, {what}", 1, 7,
                ours(FILL.format(f"sharr.create('n', {GIB}, 'u1')", "sharr.delete('n')")),
                [upstream(FILL.format(f"S.create('shm://o', {GIB}, 'u1')", "S.delete('shm://o')"))],
                {"SharedArray": limit}, twice=True)  # fmt: skip


TOUCH = "x = {}; x[::4096] = 1; del x"


def touch():
    with shm(HUGE):
        row("attach + touch 1 GiB again, huge=advise", 1, 7,
            ours(f"x = sharr.create('a', {GIB}, 'u1'); del x", TOUCH.format("sharr.attach('a')")),
            [upstream(f"x = S.create('shm://o', {GIB}, 'u1'); x[:] = 1; del x",
                      TOUCH.format("S.attach('shm://o')")),
             floor("touch", "a")], {"SharedArray": 0.05, "floor": 1.5}, twice=True)  # fmt: skip


PUT = f"import numpy as np\ns = np.ones({GIB}, 'u1')" + UNTIL_DELETED


def put():
    for what, options, take in (
        ("huge=advise", HUGE, "take-huge"), ("4 KiB pages", SMALL, "take-small")
    ):  # fmt: skip
        with shm(options):
            row(f"put 1 GiB, {what}", 1, 7,
                ours(PUT.format("x = sharr.put('n', s); del x", "sharr.delete('n')")),
                [floor("memcpy"), floor("memcpy-threads"), bare("memory alone", take, f"{SHM}/f"),
                 upstream(PUT.format(f"x = S.create('shm://o', {GIB}, 'u1'); x[:] = s; del x",
                                     "S.delete('shm://o')")),
                 plain("np.save", PUT.format(f"np.save('{SHM}/f.npy', s)", f"os.remove('{SHM}/f.npy')")),
                 plain("joblib.dump", "import joblib\n" + PUT.format(
                     f"joblib.dump(s, '{SHM}/j')", f"os.remove('{SHM}/j')"))],
                {"memcpy": 1.15}, twice=True)  # fmt: skip


def list_pair(number, first=False, drop_in=False):
    """Both list all of a /dev/shm, so that each has its own."""
    alone = ["unshare", "-m", "sh", "-c", f'mount -t tmpfs -o {SMALL} none {SHM} && exec "$@"', "sh"]
    sides = []
    upstream = ("SharedArray", "SharedArray.list()", "SharedArray.create(f'shm://a{i}', 128)")
    own = ("sharr", "sharr.list()", "sharr.create(f'a{i}', 128)")
    for label, python, (module, call, create) in (
        ("SharedArray (ours)" if drop_in else "sharr", ME, upstream if drop_in else own),
        ("SharedArray", PEER, upstream),
    ):
        setup = f"import {module}\nfor i in range({number}): {create}\ntime.sleep(0.1)\n"
        setup += f"def work(): {call}\n" + (FRESH if first else "")
        command = [*alone, python, "-c", WORKER, setup, "" if first else "work()"]
        sides.append(Side(label, command, ours=python == ME))
    return sides[0], sides[1:]


def list_():
    row("list 10,000, first", 1, 9, *list_pair(10_000, True), {"SharedArray": 0.6})
    row("list 10,000, again", 1, 15, *list_pair(10_000), {"SharedArray": 0.3})
    row("list 10,000, first, drop-in", 1, 9, *list_pair(10_000, True, True), {"SharedArray": 0.6})
    row("list 10,000, again, drop-in", 1, 15, *list_pair(10_000, False, True), {"SharedArray": 0.3})
    for number in (1, 100, 100_000):
        row(f"list {number:,}, again", 1 if number > 100 else 300, 7, *list_pair(number))


def import_():
    """The time that an import takes beyond NumPy's, each in a fresh process."""

    def importing(module, label, python=ME):
        program = f"import numpy, time; s = time.perf_counter(); import {module}; "
        program += "print(time.perf_counter() - s)"
        setup = "import subprocess, sys\ndef sample(count):\n"
        setup += f"    return float(subprocess.check_output([sys.executable, '-c', {program!r}]))"
        return Side(label, [python, "-c", WORKER, setup, ""], ours=python == ME)

    row("import sharr", 1, 15, importing("sharr", "sharr"),
        [importing("multiprocessing.shared_memory", "shared_memory"),
         importing("joblib", "joblib")])  # fmt: skip
    row("import SharedArray", 1, 15, importing("SharedArray", "SharedArray (ours)"),
        [importing("SharedArray", "SharedArray", PEER)])  # fmt: skip
    seconds = {r["ours"]: r["ours_seconds"] for r in results[-3:]}
    for label, module, limit in (("sharr", "sharr", 5), ("SharedArray (ours)", "SharedArray", 3)):
        taken = [second * 1e3 for second in seconds[label]]
        single(f"import {module} beyond NumPy", statistics.median(taken), limit, "ms", samples=taken)


@contextlib.contextmanager
def mounted():
    """A mount of shm:// while the block runs: (where, the daemon's process id)."""
    with tempfile.TemporaryDirectory() as point:
        subprocess.run(["build/bin/sharrfs", "shm://", point], check=True)
        daemon = None
        try:
            daemons = map(int, subprocess.check_output(["pidof", "sharrfs"], text=True).split())
            (daemon,) = [p for p in daemons if point in open(f"/proc/{p}/cmdline").read().split("\0")]
            yield point, daemon
        finally:
            subprocess.run(["umount", point], check=True)
            while os.path.exists(f"/proc/{daemon}"):  # it has what is behind the mount open
                time.sleep(0.01)


def mount():
    with shm(SMALL), mounted() as (point, daemon):
        mount_rows(point)
        seen_rows(point)
        memory_rows(point, daemon)


# Of what is opened, read and closed, the time of one of the three.
STEP = """
def sample(count):
    taken = 0
    for _ in range(count):
        times = [time.perf_counter()]
        fd = os.open({path!r}, os.O_RDONLY); times.append(time.perf_counter())
        os.pread(fd, 4096, 0); times.append(time.perf_counter())
        os.close(fd); times.append(time.perf_counter())
        at = ("open", "read header", "close").index({step!r})
        taken += times[at + 1] - times[at]
    return taken / count
"""


def seen_rows(point):
    """How long after a change beside the mount it is seen through it."""
    progress("changes beside the mount are seen")
    beside = f"{SHM}/seen"
    os.makedirs(beside, exist_ok=True)
    for i in range(300):
        with open(f"{SHM}/made{i}", "wb") as file:
            file.write(NPY)
    for what, name, change in (
        ("a creation", "", lambda i: os.rename(f"{SHM}/made{i}", f"{beside}/{i}")),
        ("a rename", "", lambda i: os.rename(f"{beside}/{i}", f"{beside}/new{i}")),
        ("a deletion", "new", lambda i: os.remove(f"{beside}/new{i}")),
    ):
        found = []
        for i in range(300):
            there = f"{point}/seen/{name}{i}"
            before = os.path.exists(there)  # which the kernel remembers
            change(i)
            start = time.perf_counter()
            while os.path.exists(there) == before:
                pass
            found.append((time.perf_counter() - start) * 1e3)
        found.sort()
        middle, late, last = (found[int(len(found) * part) - 1] for part in (0.5, 0.99, 1))
        single(f"{what} beside the mount is seen after", last, 10, "ms",
               f" at most, {middle:.2f} median, {late:.2f} in 99 of 100", found)  # fmt: skip


def mount_rows(point):
    size = 256 << 20
    base = "import os, mmap, random\n"
    base += f"x = sharr.create('big', {size}, 'u1', exist_ok=True); x[:] = 1; del x\n"
    opened = "where = '{}'\nfd = os.open(where + '/big', os.O_RDWR)\n"

    def pair(what, count, setup, statement, limit, rounds=15):
        through = ours(base + opened.format(point) + setup, statement, "mount")
        beside = ours(base + opened.format(SHM) + setup, statement, "tmpfs")
        row(what, count, rounds, through, [beside], {"tmpfs": limit})

    # By time, so that less is better: at least 0.95 and 0.9 of the speed.
    pair("read 256 MiB in 1 MiB blocks", 1, "b = bytearray(1 << 20)\n",
         f"for o in range(0, {size}, 1 << 20): os.preadv(fd, [b], o)", 1.05)  # fmt: skip
    row("4 KiB random reads", None, 25, bare("mount", "read-4k", f"{point}/big"),
        [bare("tmpfs", "read-4k", f"{SHM}/big")], {"tmpfs": 1.11})  # fmt: skip
    pair("mmap faults", 1, "import numpy as np\n",
         f"m = mmap.mmap(fd, {size}); v = np.frombuffer(m, 'u1'); v[::4096].sum(); del v; m.close()",
         1.11)  # fmt: skip
    pair("in-place writes of 1 MiB", 1, "b = bytes(1 << 20)\n",
         f"for o in range(4096, {size} - (1 << 20), 1 << 20): os.pwrite(fd, b, o)", 1.11)  # fmt: skip
    pair("write an array of 1 KiB, delete it", None,
         "sharr.create('a', 128, exist_ok=True)\ndata = open(where + '/a', 'rb').read()\n",
         "f = os.open(where + '/w', os.O_CREAT | os.O_WRONLY); os.write(f, data); os.close(f)\n"
         "os.unlink(where + '/w')", None)  # fmt: skip
    make = "sharr.create('a', 128, exist_ok=True)\nimport os\n"
    row("stat", None, 25, bare("mount", "stat", f"{point}/big"),
        [bare("tmpfs", "stat", f"{SHM}/big")], {"tmpfs": 1.15})  # fmt: skip

    def against_empty(what, setup, statement=""):
        """Against the round trip of an empty request: statfs, which the kernel never answers."""
        opened = f"import os\nfd = os.open('{point}', os.O_RDONLY)\n"
        row(what, None, 15, ours(make + setup, statement, "mount"),
            [plain("empty request", opened, "os.statvfs(fd)")])  # fmt: skip

    against_empty("getxattr", "", f"os.getxattr('{point}/a', 'user.sharr.dtype')")
    against_empty("open + read header + close", "",
        f"fd = os.open('{point}/a', os.O_RDONLY); os.pread(fd, 4096, 0); os.close(fd)")  # fmt: skip
    for step in ("open", "read header", "close"):
        against_empty(f"{step} alone", STEP.format(step=step, path=f"{point}/a"))
    many = "import os\nfor i in range(10000): sharr.create(f'many/{i}', 128, exist_ok=True)\n"
    warm = "import subprocess as s\n"
    warm += "def ls(where): s.run(['ls', '-l', where], stdout=s.DEVNULL, check=True)\n"
    cold = "def drop(): open('/proc/sys/vm/drop_caches', 'w').write('2')\n"
    sample = "def sample(count):\n    drop(); start = time.perf_counter()\n"
    sample += "    ls('{}/many'); return time.perf_counter() - start\n"
    row("ls -l of 10,000, warm", 1, 7, ours(many + warm, f"ls('{point}/many')", "mount"),
        [ours(many + warm, f"ls('{SHM}/many')", "tmpfs")], {"tmpfs": 2})  # fmt: skip
    row("ls -l of 10,000, cold", 1, 7, ours(many + warm + cold + sample.format(point), "", "mount"),
        [ours(many + warm + cold + sample.format(SHM), "", "tmpfs")], {"tmpfs": 6})  # fmt: skip


def memory_rows(point, daemon):
    """The memory of a process that has listed 10,000 arrays.

    And of the daemon while the kernel looks up, and forgets, 10,000 again and again.
    """

    def resident(process):
        with open(f"/proc/{process}/status") as status:
            return int(re.search(r"VmRSS:\s+(\d+)", status.read())[1]) * 1024

    progress("memory with 10,000 arrays seen")
    listing = ours("", "sharr.list('many')")
    listing.measure(0)  # it has begun
    before = resident(listing.process.pid)
    listing.measure(10)
    library = resident(listing.process.pid) - before
    listing.close()
    found = [resident(daemon) / (1 << 20)]
    for _ in range(30):
        with open("/proc/sys/vm/drop_caches", "w") as file:
            file.write("2")
        for i in range(10_000):
            os.stat(f"{point}/many/{i}")
        subprocess.run(["ls", "-l", f"{point}/many"], stdout=subprocess.DEVNULL, check=True)
        found.append(resident(daemon) / (1 << 20))
    first, most, last = found[0], max(found), found[-1]
    single("memory of a process that lists 10,000", library / (1 << 20), None, "MiB")
    single("memory of the daemon with 10,000 seen", most, 32, "MiB",
           f" at most, {first:.1f} at first, {last:.1f} after 300,000 look-ups", found)  # fmt: skip


curves = {}  # by panel of a plot: its axes' names and, by label, points


def curve(panel, x, y, at, count, sides, rounds=5, scale=1):
    """Adds a point for each side: the median of its samples."""
    progress(f"{panel}: {at:,}")
    try:
        for side in sides:
            side.measure(count)
        for _ in range(rounds):
            for side in sides:
                side.samples.append(side.measure(count) * scale)
    finally:  # as in row()
        for side in sides:
            side.close()
    found = curves.setdefault(panel, {"x": x, "y": y, "lines": {}, "samples": {}})
    for side in sides:
        found["lines"].setdefault(side.label, []).append((at, statistics.median(side.samples)))
        found["samples"].setdefault(side.label, []).append(side.samples)


HOLD = """
def sample(count):
    global x
    if count:
        x = sharr.create('n', {}, 'u1', exist_ok=True)
        x.sum()
    return 0
"""


def growth():
    """What things cost as there is more of it."""
    with shm(SMALL), mounted() as (point, _):
        for number in (1, 100, 10_000, 100_000):
            made = MAKE + f"for i in range({number}): sharr.create(f'many{{i}}', 1, exist_ok=True)\n"
            curve("attach", "arrays in the directory", "µs", number, 300, [
                ours(made, "x = sharr.attach('a'); del x"),
                upstream(MAKE_UPSTREAM, "x = S.attach('shm://s'); del x")], scale=1e6)  # fmt: skip
            stat = "import os\nos.listdir('{0}')\n"
            stat += f"at = [f'{{0}}/many{{{{i}}}}' for i in range({number})]\n"
            stat += "import itertools\nat = itertools.cycle(at)\n"
            curve("stat", "arrays looked at", "µs", number, max(number, 300), [
                ours(stat.format(point), "os.stat(next(at))", "mount"),
                ours(stat.format(SHM), "os.stat(next(at))", "tmpfs")], scale=1e6)  # fmt: skip
    for number in (1, 100, 10_000, 100_000):
        first, others = list_pair(number)
        curve("list", "arrays", "µs for each", number, max(1, 300 // number), [first, *others],
              scale=1e6 / number)  # fmt: skip
    for options, label in ((HUGE, "huge=advise"), (SMALL, "4 KiB pages")):
        with shm(options):
            for size in (1 << shift for shift in range(10, 31, 4)):
                made = f"x = sharr.create('n', {size}, 'u1'); del x; sharr.delete('n')"
                sides = [ours("", made, label)]
                curve("create + delete", "bytes", "ms", size, 1 if size > 1 << 22 else 50, sides, scale=1e3)
    with shm(SMALL):
        size = 256 << 20
        for number in (1, 2, 4, 8):
            progress(f"memory: {number}")
            with contextlib.ExitStack() as ends:
                held = [ours(HOLD.format(size)) for _ in range(number)]
                for side in held:
                    ends.callback(side.close)
                total = 0
                for count in (0, 1):  # before, and with it
                    for side in held:
                        side.measure(count)
                    total = sum(side.memory() for side in held) - total
            axes = {"x": "processes on one array of 256 MiB", "y": "MiB that they take more"}
            panel = curves.setdefault("memory", {**axes, "lines": {}})
            panel["lines"].setdefault("sharr", []).append((number, total / (1 << 20)))
            panel["lines"].setdefault("the array", []).append((number, size / (1 << 20)))
    print("\n| as it grows | unit | side | " + " | ".join("at: cost" for _ in range(6)) + " |")
    print("| --- " * 9 + "|")
    for name, panel in curves.items():
        for label, line in panel["lines"].items():
            cells = " | ".join(f"{at:,}: {cost:.3g}" for at, cost in line)
            print(f"| {name} | {panel['y']} by {panel['x']} | {label} | {cells} |")
    add({"what": "growth", "panels": curves})


ROWS = {
    "attach": attach, "create": create, "fill": fill, "touch": touch, "put": put, "list": list_,
    "import": import_, "mount": mount, "growth": growth,
}  # fmt: skip


def machine():
    """What the figures are of; rows of another machine, or of another build, are not kept."""
    with open("/proc/cpuinfo") as file:
        model = re.search(r"model name\s*:\s*(.*)", file.read())
    build = hashlib.sha256()
    built = "build/lib/libsharr.a", "build/bin/sharrfs", *sorted(glob.glob("build/python/*/*.[ps]*"))
    for part in (*built, FLOOR, __file__):
        with open(part, "rb") as file:
            build.update(file.read())
    versions = {}
    for python, packages in ((ME, "numpy joblib"), (PEER, "numpy SharedArray")):
        code = f"import importlib.metadata as m\nfor p in '{packages}'.split(): print(p, m.version(p))"
        done = subprocess.run([python, "-c", code], capture_output=True, text=True, env={})
        name = "peer's " if python == PEER else ""
        versions |= {f"{name}{k}": v for k, v in map(str.split, done.stdout.splitlines())}
    return {
        "processor": model[1] if model else platform.machine(), "processors": os.cpu_count(),
        "kernel": platform.release(), "python": platform.python_version(), **versions,
        "build": build.hexdigest()[:12],
    }  # fmt: skip


COLORS = {
    "ours is faster": "tab:blue", "the other is": "tab:gray", "more than a floor": "lightgray",
    "limit missed": "tab:red",
}  # fmt: skip
FLOORS = {"floor", "memcpy", "memcpy-threads", "memory alone", "tmpfs", "empty request"}


def draw(rows):
    """The ratios, as bars from 1: to the left ours is faster."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import lines, patches, pyplot

    rows = [r for r in rows if "ratio" in r][::-1]
    figure, axes = pyplot.subplots(figsize=(9, 1.3 + 0.28 * len(rows)), layout="constrained")
    mark = {"color": "tab:orange", "marker": "|", "linestyle": "", "markersize": 9, "markeredgewidth": 2}
    for y, found in enumerate(rows):
        kind = "limit missed" if missed(found) else "ours is faster"
        if found["ratio"] > 1 and not missed(found):
            kind = "more than a floor" if found["other"] in FLOORS else "the other is"
        axes.barh(y, found["ratio"] - 1, left=1, color=COLORS[kind])
        axes.plot(found["quartiles"], [y, y], color="black", linewidth=1)
        if found["limit"] is not None:
            axes.plot(found["limit"], y, **mark)
    axes.set_xscale("log")
    ticks = [0.01, 0.03, 0.1, 0.3, 1, 3, 10]
    axes.set_xticks(ticks, map(str, ticks)), axes.set_xticks([], minor=True)
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(range(len(rows)), [f"{r['what']}: {r['ours']} / {r['other']}" for r in rows])
    axes.set_xlabel("time of ours / time of the other")
    keys = [patches.Patch(color=color, label=kind) for kind, color in COLORS.items()]
    keys.append(lines.Line2D([], [], label="limit", **mark))
    keys.append(lines.Line2D([], [], color="black", linewidth=1, label="half of the rounds"))
    axes.legend(handles=keys, loc="lower center", bbox_to_anchor=(0.2, 1), ncols=3, fontsize="small")
    for suffix in ("png", "svg"):
        figure.savefig(os.path.join(OUTPUT, f"ratios.{suffix}"), dpi=120)
    pyplot.close(figure)


def draw_growth(panels):
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(panels), figsize=(4 * len(panels), 3.2), layout="constrained")
    for axis, (name, panel) in zip(axes, panels.items()):
        for label, line in panel["lines"].items():
            style = "--" if label in ("tmpfs", "the array") else "-"
            axis.plot(*zip(*line), style, marker="o", markersize=3, label=label)
        if name == "create + delete":  # over as many decades as bytes
            axis.set_yscale("log")
        else:
            axis.set_ylim(0, axis.get_ylim()[1] * 1.1)
        axis.set_xscale("linear" if name == "memory" else "log")
        axis.set(title=name, xlabel=panel["x"], ylabel=panel["y"])
        axis.legend(fontsize="small")
    for suffix in ("png", "svg"):
        figure.savefig(os.path.join(OUTPUT, f"growth.{suffix}"), dpi=120)


def save(about, others):
    """Writes what has been measured until now beside what other rows have left there; returns all."""
    rows = sorted(results + others, key=lambda found: list(ROWS).index(found["row"]))
    with open(os.path.join(OUTPUT, "results.json"), "w") as file:
        json.dump({"machine": about, "rows": rows}, file, indent=1)
    return rows


def left(about, names):
    """What other rows have left, of the same."""
    with contextlib.suppress(FileNotFoundError, KeyError, ValueError):
        with open(os.path.join(OUTPUT, "results.json")) as file:
            found = json.load(file)
        if found["machine"] == about:
            return [r for r in found["rows"] if r["row"] in ROWS and r["row"] not in names]
    return []


def main(names):
    global now
    unknown = set(names) - set(ROWS)
    if unknown:
        sys.exit(f"bench: no such row: {', '.join(unknown)}; there are {', '.join(ROWS)}")
    about = machine()
    print(" · ".join(f"{key} {value}" for key, value in about.items()) + "\n")
    print("| what | ours | other | ratio | quartiles | limit |\n| --- | --- | --- | --- | --- | --- |")
    names = names or list(ROWS)
    others = left(about, names)
    os.makedirs(OUTPUT, exist_ok=True)
    for i, name in enumerate(names):
        now = f"{name} ({i + 1} of {len(names)})"
        ROWS[name]()
        rows = save(about, others)
    draw(rows)
    for found in rows:
        if "panels" in found:
            draw_growth(found["panels"])
    progress(f"results.json and plots are in {OUTPUT}")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what is mounted is unmounted
    main(sys.argv[4:])
