#!/usr/bin/env python3
"""Write objects with the SharedArray package of PyPI, and print what they hold.

    peer_write.py PREFIX

Runs under any release that has shm:// names (1.0 to 3.x).  Every object is
/dev/shm/PREFIX<something>; whoever runs this removes them.  Prints one JSON
document: the size of the trailer that this release writes after the data, and
for each object its name, shape, the dtype that the package gave the array, the
SHA-256 of its bytes in C order, and the size of its file.  A datetime unit is
not stored by the package, nor are the fields of a structured dtype.
"""

import hashlib
import json
import os
import sys

import numpy as np

import SharedArray

SIMPLE = "?bBhHiIlLqQefdgFDGmM"
# Stored with an item size only from 3.1 on; releases before that die on them.
SIZED = ["S1", "S5", "U1", "U3", "V1", "V7", [("a", "i4"), ("b", "f8")], ("i4", (2, 3))]
OLD_TRAILERS = (160, 288)
SHAPES = {
    "0d": (),
    "1": (1,),
    "empty": (0,),
    "empty2d": (3, 0),
    "2d": (2, 3),
    "3d": (2, 3, 4),
    "page": (4096,),
    "pages": (3, 5000),
    "16dims": (2,) * 4 + (1,) * 12,
    "32dims": (1,) * 30 + (2, 3),
    "64dims": (1,) * 62 + (2, 3),
}


def path_of(name):
    return "/dev/shm/" + name


def fill(array):
    """Give the array contents that differ from element to element."""
    kind = array.dtype.kind
    count = np.arange(array.size).reshape(array.shape)
    if kind in "SU":
        array[...] = (count % 10).astype(array.dtype)
    elif kind == "V":
        # Byte by byte, since nothing converts to void.  (A view needs a dimension.)
        array.reshape(-1).view("u1")[...] = np.arange(array.nbytes) % 251
    elif kind in "mM":
        array.reshape(-1).view("i8")[...] = count.reshape(-1)
    else:
        array[...] = count


def write(name, shape, dtype):
    array = SharedArray.create("shm://" + name, shape, dtype)
    fill(array)
    return {
        "name": name,
        "shape": list(array.shape),
        "dtype": array.dtype.str,
        "itemsize": array.dtype.itemsize,
        "sha256": hashlib.sha256(array.tobytes()).hexdigest(),
        "file_size": os.path.getsize(path_of(name)),
    }


def trailer_size(prefix):
    """How much longer than its data an object is."""
    name = prefix + "trailer"
    array = SharedArray.create("shm://" + name, 1, "u1")
    size = os.path.getsize(path_of(name)) - array.nbytes
    SharedArray.delete("shm://" + name)
    return size


def main():
    prefix = sys.argv[1]
    trailer = trailer_size(prefix)
    dtypes = list(SIMPLE) + ([] if trailer in OLD_TRAILERS else SIZED)
    objects = []
    for number, dtype in enumerate(dtypes):
        objects.append(write("%sdtype%d" % (prefix, number), 5, dtype))
    for label, shape in SHAPES.items():
        # As many dimensions as the trailer has room for.
        if len(shape) <= {160: 16, 288: 32, 292: 32}.get(trailer, 64):
            objects.append(write(prefix + "shape-" + label, shape, "f4"))
    manifest = {"trailer": trailer, "numpy": np.__version__, "objects": objects}
    json.dump(manifest, sys.stdout, indent=1)
    print()


if __name__ == "__main__":
    main()
