#!/usr/bin/python3
"""Seeds for npy_fuzz: corpus.py DIR writes there what NumPy's own writer makes of many arrays."""

import hashlib
import io
import pathlib
import struct
import sys
import warnings

import numpy as np
from numpy.lib import format as npy

CODES = "? b B h H i I l L q Q e f d g F D G S0 S3 U0 U2 V0 V5".split()
UNITS = "Y M W D h m s ms us ns ps fs as 25s 7D".split()
SHAPES = [(), (0,), (1,), (7,), (2, 3), (3, 0, 2), (1,) * 32]


def dtypes():
    for code in CODES:
        yield np.dtype(code)
        yield np.dtype(code).newbyteorder(">")
    for unit in UNITS:
        yield np.dtype(f"M8[{unit}]")
        yield np.dtype(f">m8[{unit}]")
    yield np.dtype("M8")
    point = np.dtype([("x", "<f4"), ("y", ">f4")])
    padded = np.dtype([("a", "i1"), ("b", "f8"), ("c", "i2")], align=True)
    yield from (point, padded, np.dtype([]), np.dtype({"names": [], "formats": [], "itemsize": 8}))
    yield np.dtype([("p", point, (2, 3)), ("q", padded), ("r", "U4", (1,))])
    yield np.dtype([(("a title", "name"), "f8"), ("plain", "S2")])
    yield np.dtype([("it's", "i4"), ('"both"\'', "i4"), ("back\\slash", "i4"), ("line\n", "i4")])
    yield np.dtype([("größe", "f4")])  # latin-1
    yield np.dtype([("名前", "f4"), (("título", "𝔵"), "M8[us]")])  # version 3
    yield np.dtype({"names": ["a", "b"], "formats": ["u1", "<i4"], "offsets": [4, 8], "itemsize": 20})
    nested = np.dtype("f8")
    for _ in range(12):
        nested = np.dtype([("n", nested)])
    yield nested
    yield np.dtype([(f"f{i}", "u1") for i in range(50)])


def files():
    for dtype in dtypes():
        array = np.zeros((2, 2), dtype)
        for version in (None, (1, 0), (2, 0), (3, 0)):
            out = io.BytesIO()
            try:
                npy.write_array(out, array, version=version)
            except (ValueError, UnicodeError):
                continue  # this version does not take that dtype
            yield out.getvalue()
        descr = npy.dtype_to_descr(dtype)
        yield str(descr).encode()
        yield str({"descr": descr, "fortran_order": False, "shape": (2, 2)}).encode()
    for shape in SHAPES:
        for order in "CF":
            out = io.BytesIO()
            npy.write_array(out, np.zeros(shape, "i2", order=order))
            yield out.getvalue()
    # What Python 2 wrote.
    text = b"{'descr': [('x', '<f4')], 'fortran_order': False, 'shape': (3L, 2L), }\n"
    yield b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + bytes(24)
    # The trailers of the SharedArray package.
    for dims, itemsize in ((16, False), (32, False), (32, True), (64, True)):
        for number, size in ((12, 8), (18, 3), (20, 5)):
            trailer = struct.pack("<16sQi", b"[SharedArray]", 6 * size, number)
            trailer += struct.pack("<i", size) if itemsize else b""
            trailer += struct.pack("<i", 2) + struct.pack(f"<{dims}q", 2, 3, *[0] * (dims - 2))
            yield bytes(6 * size) + trailer


def main():
    warnings.simplefilter("ignore")
    target = pathlib.Path(sys.argv[1])
    target.mkdir(parents=True, exist_ok=True)
    for data in files():
        (target / hashlib.sha1(data).hexdigest()).write_bytes(data)


if __name__ == "__main__":
    main()
