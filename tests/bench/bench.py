"""Times sharr and its peers side by side and prints medians, ratios and their spread.

usage: bench.py PYTHON, where PYTHON has the package SharedArray

Every row is measured in rounds; in each round ours and the peer run one after the other, so that a
machine whose speed drifts does so for both. The ratio is the median over the rounds.
"""

import os
import statistics
import subprocess
import sys
import tempfile

ROUNDS = 15
NAME = f"sharr-bench-{os.getpid()}"

# Runs in the Python of whoever is measured: setup once, then for each number on stdin that many
# repetitions of the statement, in seconds each.
WORKER = """
import sys, time
exec(sys.argv[1])
code = compile(sys.argv[2], "statement", "exec")
def run(count):
    for _ in range(count):
        exec(code, globals())
run(50)
for line in sys.stdin:
    count = int(line)
    start = time.perf_counter()
    run(count)
    print((time.perf_counter() - start) / count, flush=True)
"""


class Side:
    def __init__(self, label, python, setup, statement):
        self.label = label
        self.process = subprocess.Popen(
            [python, "-c", WORKER, setup, statement], stdin=-1, stdout=-1, text=True
        )

    def measure(self, count):
        self.process.stdin.write(f"{count}\n")
        self.process.stdin.flush()
        return float(self.process.stdout.readline())

    def close(self):
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


def row(what, count, ours, *peers):
    """Prints a line per peer."""
    sides = [ours, *peers]
    times = {side.label: [] for side in sides}
    for _ in range(ROUNDS):
        for side in sides:
            times[side.label].append(side.measure(count))
    for side in sides:
        side.close()
    for peer in peers:
        ratios = sorted(a / b for a, b in zip(times[ours.label], times[peer.label]))
        micro = [statistics.median(times[side.label]) * 1e6 for side in (ours, peer)]
        print(
            f"| {what} | {ours.label} {micro[0]:.1f} µs | {peer.label} {micro[1]:.1f} µs "
            f"| {statistics.median(ratios):.2f} | {ratios[len(ratios) // 4]:.2f}"
            f"–{ratios[-1 - len(ratios) // 4]:.2f} |",
            flush=True,
        )


def main(peer):
    me = sys.executable
    a, s, m, f = (f"{NAME}-{letter}" for letter in "asmf")
    print(f"{ROUNDS} rounds; ratio below 1: sharrfs is faster. Array of 1 KiB unless said otherwise.\n")
    print("| what | ours | other | ratio | quartiles |\n| --- | --- | --- | --- | --- |")
    ours = f"import sharr; sharr.create({a!r}, 128, exist_ok=True)"
    dropin = f"import SharedArray as S; import sharr; sharr.create({a!r}, 128, exist_ok=True)"
    real = (
        f"import SharedArray as S\ntry: S.create({s!r}, 128)\nexcept FileExistsError: pass"
    )
    memory = (
        "from multiprocessing import shared_memory\nimport numpy as np\n"
        f"try: shared_memory.SharedMemory({m!r}, True, 1024).close()\nexcept FileExistsError: pass"
    )
    load = f"import numpy as np\nnp.save('/dev/shm/{f}.npy', np.zeros(128))"
    def real_side(statement):
        ours = os.environ.pop("PYTHONPATH")  # where the drop-in has the same name
        side = Side("SharedArray", peer, real, statement)
        os.environ["PYTHONPATH"] = ours
        return side

    def attach_memory():
        return Side(
            "shared_memory", me, memory,
            f"x = shared_memory.SharedMemory({m!r}); y = np.ndarray(128, float, x.buf); "
            "del y; x.close()",
        )  # fmt: skip

    def attach_load():
        return Side("np.load(mmap_mode)", me, load, f"x = np.load('/dev/shm/{f}.npy', mmap_mode='r+')")

    row("attach", 300, Side("sharr", me, ours, f"x = sharr.attach({a!r})"),
        real_side(f"x = S.attach({s!r})"), attach_memory(), attach_load())  # fmt: skip
    row("attach, drop-in", 300, Side("SharedArray (ours)", me, dropin, f"x = S.attach({a!r})"),
        real_side(f"x = S.attach({s!r})"))  # fmt: skip
    new = f"{NAME}-new"
    row("create + delete", 200,
        Side("sharr", me, ours, f"x = sharr.create({new!r}, 128); sharr.delete({new!r})"),
        real_side(f"x = S.create({new + 's'!r}, 128); S.delete({new + 's'!r})"),
        Side("shared_memory", me, memory,
             f"x = shared_memory.SharedMemory({new + 'm'!r}, True, 1024); x.close(); x.unlink()"),
        )  # fmt: skip

    size = 256 << 20
    with tempfile.TemporaryDirectory() as point:
        subprocess.run(["build/bin/sharrfs", "shm://", point], check=True)
        big = f"{NAME}-big"
        setup = (
            f"import sharr, os\na = sharr.create({big!r}, {size}, 'u1', exist_ok=True); a[:] = 1\n"
            "b = bytearray(1 << 20)\n"
        )
        read = f"for o in range(0, {size}, 1 << 20): os.preadv(fd, [b], o)"
        row("read 256 MiB in 1 MiB blocks", 1,
            Side("mount", me, setup + f"fd = os.open('{point}/{big}', os.O_RDONLY)", read),
            Side("file in /dev/shm", me, setup + f"fd = os.open('/dev/shm/{big}', os.O_RDONLY)", read),
            )  # fmt: skip
        subprocess.run(["umount" if os.geteuid() == 0 else "fusermount3",
                        *([] if os.geteuid() == 0 else ["-u"]), point], check=True)  # fmt: skip


if __name__ == "__main__":
    try:
        main(sys.argv[1])
    finally:
        for entry in os.listdir("/dev/shm"):
            if entry.startswith(NAME):
                os.unlink(f"/dev/shm/{entry}")
