"""One array, in every way that there is to read and write it, against a plain copy: as fsx does."""

import io
import mmap
import os
import random

import numpy as np
import pytest
import sharr
from mounts import NATIVE, mode, needs_fuse, space  # the fixtures come by import

pytestmark = needs_fuse

STEPS = 6000
LARGEST = 300_000


def npy(data):
    file = io.BytesIO()
    np.save(file, np.frombuffer(data, "u1"))
    return file.getvalue()


class Exerciser:
    def __init__(self, uri, behind, point, mode, seed):
        self.rng = random.Random(seed)
        self.uri, self.mount, self.behind, self.mode = f"{uri}/x", point / "x", behind / "x", mode
        self.files, self.log, self.number = [], [], 0
        self.replace()

    def replace(self):
        """A new array takes the name; every file open, mapped and attached is of the old one."""
        for file in self.files:
            os.close(file)
        data = self.rng.randbytes(self.rng.randrange(1, LARGEST))
        how = self.rng.choice(["write", "rename", "beside", "rename2"])
        self.log.append(("replace", how, len(data)))
        if how == "write":
            self.mount.write_bytes(npy(data))
        elif how == "beside":
            other = self.behind.with_name("other")
            a = sharr.create(other, len(data), "u1")
            a[:] = np.frombuffer(data, "u1")
            os.rename(other, self.behind)
        else:
            other = self.mount.with_name("other")
            other.write_bytes(npy(data))
            os.replace(other, self.mount)
        self.copy = bytearray(self.behind.read_bytes())
        self.offset = len(self.copy) - len(data)
        self.files = [os.open(path, os.O_RDWR) for path in (self.mount, self.mount, self.behind)]
        self.attached = [sharr.attach(self.uri), sharr.attach(self.mount)]
        self.maps = [mmap.mmap(self.files[2], 0)]
        if self.mode == NATIVE:
            self.maps += [mmap.mmap(self.files[0], 0), mmap.mmap(self.files[1], 0, access=mmap.ACCESS_READ)]

    def place(self):
        start = self.rng.randrange(self.offset, len(self.copy))
        return start, min(len(self.copy), start + self.rng.randrange(1, 70_000))

    def same(self, data, start, what):
        assert bytes(data) == self.copy[start : start + len(data)], (what, start, self.log[-10:])

    def read(self):
        start, stop = self.place()
        file = self.rng.choice(self.files)
        data = os.pread(file, stop - start, start)
        assert len(data) == stop - start
        self.same(data, start, "read")

    def write(self):
        start, stop = self.place()
        data = self.rng.randbytes(stop - start)
        assert os.pwrite(self.rng.choice(self.files), data, start) == len(data)
        self.copy[start:stop] = data

    def map_read(self):
        start, stop = self.place()
        self.same(self.rng.choice(self.maps)[start:stop], start, "map_read")

    def map_write(self):
        start, stop = self.place()
        data = self.rng.randbytes(stop - start)
        memory = self.rng.choice(self.maps[:2])
        memory[start:stop] = data
        if self.rng.random() < 0.2:
            memory.flush()
        self.copy[start:stop] = data

    def attached_read(self):
        start, stop = self.place()
        a = self.rng.choice(self.attached)
        self.same(a[start - self.offset : stop - self.offset].tobytes(), start, "attached_read")

    def attached_write(self):
        start, stop = self.place()
        data = self.rng.randbytes(stop - start)
        self.rng.choice(self.attached)[start - self.offset : stop - self.offset] = np.frombuffer(data, "u1")
        self.copy[start:stop] = data

    def reopen(self):
        index = self.rng.randrange(2)
        os.close(self.files[index])
        self.files[index] = os.open(self.mount, self.rng.choice([os.O_RDWR, os.O_RDWR | os.O_SYNC]))

    def rename(self):
        away = self.mount.with_name("away")
        os.rename(self.mount, away)
        self.same(away.read_bytes(), 0, "rename")
        os.rename(away, self.mount)

    def beyond(self):
        """Too much: refused, or gone when the file is closed."""
        file = os.open(self.mount, os.O_RDWR)
        try:
            os.pwrite(file, b"x" * 5000, len(self.copy) + self.rng.randrange(10_000))
        except PermissionError:
            assert self.mode != NATIVE
        os.close(file)
        assert os.stat(self.behind).st_size == len(self.copy)

    def attributes(self):
        os.fsync(self.rng.choice(self.files))
        assert os.fstat(self.rng.choice(self.files)).st_size == len(self.copy)
        assert os.stat(self.mount).st_size == len(self.copy)
        assert os.getxattr(self.mount, "user.sharr.nbytes") == b"%d" % (len(self.copy) - self.offset)

    def seek(self):
        file = self.rng.choice(self.files)
        assert os.lseek(file, 0, os.SEEK_END) == len(self.copy)
        start, stop = self.place()
        os.lseek(file, start, os.SEEK_SET)
        self.same(os.read(file, stop - start), start, "seek")

    def whole(self):
        for path in (self.mount, self.behind):
            self.same(path.read_bytes(), 0, path)


@pytest.mark.parametrize("seed", range(4))
def test_exerciser(space, mode, seed):
    exerciser = Exerciser(*space, mode, seed)
    steps = ["read", "write", "map_read", "map_write", "attached_read", "attached_write"] * 6
    steps += ["reopen", "rename", "beyond", "attributes", "seek", "whole", "replace"]
    for _ in range(STEPS):
        step = exerciser.rng.choice(steps)
        exerciser.log.append((step,))
        getattr(exerciser, step)()
    exerciser.whole()
    for file in exerciser.files:
        os.close(file)
