#!/usr/bin/env python3
"""Print what a SharedArray module does with a long list of calls, as JSON.

    peer_probe.py [TEXT ...]        only the cases whose id contains a TEXT

Runs against whichever SharedArray comes first on sys.path and prints one
document, {case id: outcome}, so that two modules are compared by running this
twice.  A case is one or more calls.  The outcome of a call is a description of
the value, or {"error": class, "errno", "filename", "message"}; a case of
several calls has {label: outcome}.  A case whose process died or hung has
{"crash": signal} or {"timeout": true} beside what it did before that.

Texts of errors, sizes of mappings and file sizes are for the reader:
"message", "mapped" and "file_size" are not something to compare.

Every case has a child process, a token for its names and a directory of its
own.  In outcomes the token reads "@" and the directory "$TMP".  Some cases need
root and are {"skipped": why} otherwise.  Root also gets a /dev/shm apart from
the system's, since list() reads what lies there and some of it is hostile.
"""

import copy
import ctypes
import gc
import json
import multiprocessing
import os
import pathlib
import pickle
import re
import resource
import select
import shutil
import signal
import socket
import stat
import struct
import sys
import tempfile
import time
import warnings
import weakref

import numpy as np

import SharedArray as sa

SHM = "/dev/shm"
PAGE = 4096
TIMEOUT = 3  # seconds; only a case that hangs comes near it
NOBODY = 65534
BIG = 1 << 40  # bytes; never backed by memory, see skip_unless_small_shm

CASES = {}


def case(name):
    """Register the decorated function as the case called `name`."""

    def register(function):
        assert name not in CASES, name
        CASES[name] = function
        return function

    return register


# --- describing -------------------------------------------------------------


# Scalar classes whose names depend on the release of NumPy.
NAMES_OF_CLASSES = {
    np.bool_: "numpy.bool_",
    np.longdouble: "numpy.longdouble",
    np.clongdouble: "numpy.clongdouble",
}


def class_name(cls):
    if cls in NAMES_OF_CLASSES:
        return NAMES_OF_CLASSES[cls]
    return cls.__name__ if cls.__module__ == "builtins" else f"{cls.__module__}.{cls.__name__}"


def describe_dtype(dtype):
    return {
        "dtype": dtype.str,
        "itemsize": dtype.itemsize,
        "native": dtype.isnative,
        "fields": None if dtype.names is None else repr(dtype.descr),
    }


def describe_contents(array):
    if array.nbytes > 4096:
        return "not read"
    data = array.tobytes()
    return data.hex() if any(data) else "zero"


def is_direct(array):
    """Whether something other than an array or nothing keeps its memory."""
    return not (array.base is None or isinstance(array.base, np.ndarray))


def describe_base(base):
    if base is None:
        return None
    if isinstance(base, np.ndarray):
        return "ndarray"
    return {
        "type": class_name(type(base)),
        "name": getattr(base, "name", "no such attribute"),
        "mapped": getattr(base, "size", "no such attribute"),
    }


def describe_array(array):
    flags = array.flags
    address = array.__array_interface__["data"][0]
    return {
        "type": class_name(type(array)),
        **describe_dtype(array.dtype),
        "shape": list(array.shape),
        "strides": list(array.strides),
        "flags": {
            "writeable": flags.writeable,
            "c_contiguous": flags.c_contiguous,
            "f_contiguous": flags.f_contiguous,
            "aligned": flags.aligned,
            "owndata": flags.owndata,
        },
        "contents": describe_contents(array),
        "base": describe_base(array.base),
        # Where the allocator puts an array of its own is no outcome.
        "page_offset": address % PAGE if is_direct(array) else None,
    }


def describe(value):
    if value is None or type(value) in (bool, int, str):
        return value
    if isinstance(value, np.ndarray):
        return describe_array(value)
    if isinstance(value, np.dtype):
        return describe_dtype(value)
    if isinstance(value, type):
        return {"class": class_name(value)}
    if isinstance(value, dict):
        return {key: describe(item) for key, item in value.items()}
    if isinstance(value, bytes):
        return {"bytes": value.decode("latin-1")}
    if isinstance(value, (tuple, list)):
        return {class_name(type(value)): [describe(item) for item in value]}
    return {"type": class_name(type(value)), "repr": repr(value)}


def describe_error(error):
    outcome = {"error": class_name(type(error)), "message": str(error)}
    if isinstance(error, OSError):
        outcome["errno"] = error.errno
        outcome["filename"] = describe(error.filename)
        outcome["filename2"] = describe(error.filename2)
    return outcome


# --- running ----------------------------------------------------------------


class Context:
    """What a case gets: names of its own, and step() to run and report a call."""

    def __init__(self, token, directory, pipe):
        self.token = token
        self.uri = "shm://" + token
        self.path = os.path.join(SHM, token)
        self.dir = directory
        self.pipe = pipe

    def step(self, label, call):
        """Report the outcome of call(); return its value, or None if it raised.

        Reported at once, so that a crash later in the case does not lose it.
        """
        value = None
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                value = call()
                outcome = describe(value)
            except Exception as error:
                outcome = describe_error(error)
        self.report(label, outcome)
        if caught:
            self.report(label + " warns", sorted({class_name(w.category) for w in caught}))
        return value

    def report(self, label, outcome):
        text = json.dumps([label, outcome]) + "\n"
        text = text.replace(self.dir, "$TMP").replace(os.path.basename(self.dir), "$DIR")
        text = text.replace(self.token, "@")
        text = re.sub(r"(x|\./){20,}", r"\1...", text)  # of the very long names
        data = text.encode()
        while data:
            data = data[os.write(self.pipe, data):]

    def files(self):
        """The case's files, with their modes: what a call made or left behind."""
        found = {}
        for where, top in (("shm", SHM), ("tmp", self.dir)):
            for folder, directories, names in os.walk(top):
                for name in directories + names:
                    path = os.path.join(folder, name)
                    if where == "shm" and self.token not in path:
                        continue
                    mode = os.lstat(path).st_mode
                    found[f"{where}/{os.path.relpath(path, top)}"] = oct(mode)
        return dict(sorted(found.items()))

    def listed(self):
        """What list() has of this case, by name; others may have arrays too."""
        mine = []
        for entry in sa.list():
            name = entry[0] if isinstance(entry[0], str) else os.fsdecode(entry[0])
            if self.token in name:
                mine.append(entry)
        return sorted(mine, key=lambda entry: entry[0])


def remove(path):
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path)
    else:
        os.unlink(path)


def run_child(function, context):
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.chdir(context.dir)
    try:
        function(context)
    except Exception as error:
        context.report("", describe_error(error))


def collect(pid, pipe):
    """The steps that the child reports until it ends, or until its time is up."""
    data = b""
    deadline = time.monotonic() + TIMEOUT
    hung = False
    while True:
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([pipe], [], [], left)[0]:
            os.kill(pid, signal.SIGKILL)
            hung = True
            break
        chunk = os.read(pipe, 65536)
        if not chunk:
            break
        data += chunk
    status = os.waitpid(pid, 0)[1]
    outcome = {}
    for line in data.decode().splitlines():
        label, value = json.loads(line)
        outcome[label] = value
    if hung:
        outcome["timeout"] = True
    elif os.WIFSIGNALED(status):
        outcome["crash"] = signal.Signals(os.WTERMSIG(status)).name
    return outcome[""] if list(outcome) == [""] else outcome


def run(function, number):
    token = f"peer-probe-{os.getpid():07}-{number:04}-"  # its length must not vary
    directory = tempfile.mkdtemp()
    os.chmod(directory, 0o755)  # for the cases that become nobody
    reader, writer = os.pipe()
    try:
        pid = os.fork()
        if pid == 0:
            os.close(reader)
            try:
                run_child(function, Context(token, directory, writer))
            finally:
                os._exit(0)
        os.close(writer)
        return collect(pid, reader)
    finally:
        os.close(reader)
        shutil.rmtree(directory)
        for name in os.listdir(SHM):
            if token in name:
                remove(os.path.join(SHM, name))


# --- helpers of cases -------------------------------------------------------


def filled(c, name=None, shape=6, dtype="i4"):
    """A new array that counts up from 1, so that it differs from a zeroed one."""
    array = sa.create(name or c.uri, shape, dtype)
    array[...] = np.arange(1, array.size + 1).reshape(array.shape)
    return array


def become_nobody():
    os.setgroups([])
    os.setgid(NOBODY)
    os.setuid(NOBODY)


def skip_unless_root(c):
    if os.geteuid() == 0:
        return False
    c.report("", {"skipped": "needs root"})
    return True


def private_shm(size, inodes=100000):
    """Put a /dev/shm of `size` bytes over the real one, for this process and its children."""
    libc = ctypes.CDLL(None, use_errno=True)
    new_mounts, private, recursive = 0x20000, 1 << 18, 1 << 14
    options = b"size=%d,nr_inodes=%d" % (size, inodes)
    return not (libc.unshare(new_mounts)
                or libc.mount(b"none", b"/", None, private | recursive, None)
                or libc.mount(b"tmpfs", SHM.encode(), b"tmpfs", 0, options))


def skip_unless_small_shm(c, inodes=1000):
    """Give the case a /dev/shm of 1 MiB."""
    if private_shm(1 << 20, inodes):
        return False
    c.report("", {"skipped": "cannot mount"})
    return True


def mappings(c):
    with open("/proc/self/maps") as maps:
        return sorted(line.split()[1] for line in maps if c.token in line)


# --- the module -------------------------------------------------------------


@case("about")
def _(c):
    c.step("numpy", lambda: np.__version__)
    c.step("python", lambda: sys.version.split()[0])
    c.step("doc", lambda: sa.__doc__)


@case("module/names")
def _(c):
    for name in sorted(dir(sa)):
        if not name.startswith("__"):
            value = getattr(sa, name)
            c.step(name, lambda: value if isinstance(value, int) else type(value))


for attribute in ("__version__", "__all__", "ArrayDesc", "SharedArray"):

    @case(f"module/{attribute}")
    def _(c, attribute=attribute):
        c.step("", lambda: getattr(sa, attribute))


@case("module/star-import")
def _(c):
    scope = {}
    exec("from SharedArray import *", scope)
    c.step("", lambda: sorted(name for name in scope if not name.startswith("__")))


# --- names ------------------------------------------------------------------


class StrSubclass(str):
    pass


class PathLike:
    def __init__(self, path):
        self.path = path

    def __fspath__(self):
        return self.path


# Each takes the context; the token in a name lets the clean-up find the file.
NAMES = {
    "shm://x": lambda c: c.uri,
    "x": lambda c: c.token,
    "/x": lambda c: "/" + c.token,
    "//x": lambda c: "//" + c.token,
    "shm:///x": lambda c: "shm:///" + c.token,
    "shm:////x": lambda c: "shm:////" + c.token,
    "SHM://x": lambda c: "SHM://" + c.token,
    "shm:x": lambda c: "shm:" + c.token,
    "shm:/x": lambda c: "shm:/" + c.token,
    " shm://x": lambda c: " " + c.uri,
    "shm://x?y#z": lambda c: c.uri + "?y#z",
    "shm://%41": lambda c: c.uri + "%41",
    "shm://x.npy": lambda c: c.uri + ".npy",
    "shm://with space": lambda c: c.uri + " a\tb\nc",
    "shm://a/b": lambda c: c.uri + "/b",
    "a/b": lambda c: c.token + "/b",
    "shm://x/": lambda c: c.uri + "/",
    "x/": lambda c: c.token + "/",
    "shm://./x": lambda c: "shm://./" + c.token,
    "./x": lambda c: "./" + c.token,
    "shm://../shm/x": lambda c: "shm://../shm/" + c.token,
    "../x": lambda c: "../" + os.path.basename(c.dir) + "/" + c.token,
    "shm://.x": lambda c: "shm://." + c.token,
    "empty": lambda c: "",
    "shm://": lambda c: "shm://",
    "shm:///": lambda c: "shm:///",
    "shm://.": lambda c: "shm://.",
    "shm://..": lambda c: "shm://..",
    ".": lambda c: ".",
    "..": lambda c: "..",
    "/": lambda c: "/",
    "/.": lambda c: "/.",
    "file:///abs/x": lambda c: f"file://{c.dir}/{c.token}",
    "file://rel": lambda c: "file://" + c.token,
    "file://./rel": lambda c: "file://./" + c.token,
    "file://sub/rel": lambda c: "file://sub/" + c.token,
    "file://no-dir/rel": lambda c: "file://no-dir/" + c.token,
    "file://localhost/abs/x": lambda c: f"file://localhost{c.dir}/{c.token}",
    "file:///dev/shm/x": lambda c: "file://" + c.path,
    "FILE:///abs/x": lambda c: f"FILE://{c.dir}/{c.token}",
    "file:/abs/x": lambda c: f"file:{c.dir}/{c.token}",
    "file:x": lambda c: "file:" + c.token,
    "file://": lambda c: "file://",
    "file:///": lambda c: "file:///",
    "file://.": lambda c: "file://.",
    "file://dir": lambda c: "file://" + c.dir,
    "file://x/": lambda c: f"file://{c.dir}/{c.token}/",
    "/dir/x": lambda c: f"{c.dir}/{c.token}",
    "/dev/shm/x": lambda c: c.path,
    "/no-dir/x": lambda c: f"{c.dir}/no-dir/{c.token}",
    "http://x": lambda c: "http://" + c.token,
    "://x": lambda c: "://" + c.token,
    "x://": lambda c: c.token + "://",
    "shm:/": lambda c: "shm:/",
    "shm://x 255 bytes": lambda c: (c.uri + "x" * 255)[:6 + 255],
    "shm://x 256 bytes": lambda c: (c.uri + "x" * 256)[:6 + 256],
    "x 255 bytes": lambda c: (c.token + "x" * 255)[:255],
    "/x 255 bytes": lambda c: ("/" + c.token + "x" * 255)[:256],
    "shm://x 5000 bytes": lambda c: (c.uri + "x" * 5000)[:5000],
    "file://x 256 bytes": lambda c: "file://" + (c.token + "x" * 256)[:256],
    "file:///x 5000 bytes": lambda c: f"file://{c.dir}/" + "./" * 2500 + c.token,
    "shm://x NUL y": lambda c: c.uri + "\0y",
    "file://x NUL y": lambda c: "file://" + c.token + "\0y",
    "NUL": lambda c: "\0",
    "shm://x non-ASCII": lambda c: c.uri + "å∫𝕔",
    "shm://x surrogate": lambda c: c.uri + "\udcff",
    "file://x surrogate": lambda c: "file://" + c.token + "\udcff",
    "bytes": lambda c: c.uri.encode(),
    "bytearray": lambda c: bytearray(c.uri.encode()),
    "memoryview": lambda c: memoryview(c.uri.encode()),
    "str subclass": lambda c: StrSubclass(c.uri),
    "numpy.str_": lambda c: np.str_(c.uri),
    "numpy.bytes_": lambda c: np.bytes_(c.uri.encode()),
    "Path": lambda c: pathlib.Path(c.dir, c.token),
    "Path of a bare name": lambda c: pathlib.Path(c.token),
    "PathLike": lambda c: PathLike(c.uri),
    "PathLike of bytes": lambda c: PathLike(c.uri.encode()),
    "int": lambda c: 7,
    "float": lambda c: 7.0,
    "bool": lambda c: True,
    "None": lambda c: None,
    "list": lambda c: [c.uri],
    "tuple": lambda c: (c.uri,),
    "array": lambda c: np.zeros(2),
    "type": lambda c: str,
}

for label, make_name in NAMES.items():

    @case(f"name/{label}")
    def _(c, make_name=make_name):
        os.mkdir("sub")
        name = make_name(c)
        c.step("attach missing", lambda: sa.attach(name))
        c.step("delete missing", lambda: sa.delete(name))
        c.step("create", lambda: sa.create(name, 2, "u1"))
        c.step("files", c.files)
        c.step("list", c.listed)
        c.step("create again", lambda: sa.create(name, 3, "u2"))
        c.step("attach", lambda: sa.attach(name))
        c.step("attach ro", lambda: sa.attach(name, ro=True))
        c.step("delete", lambda: sa.delete(name))
        c.step("delete again", lambda: sa.delete(name))
        c.step("files left", c.files)


# A namespace directory that already exists.
for label in ("shm://a/b", "shm:///a/b", "a/b", "/a/b", "file:///dev/shm/a/b", "/dev/shm/a/b"):

    @case(f"name-in-directory/{label}")
    def _(c, label=label):
        os.mkdir(c.path)
        name = label.replace("a/b", c.token + "/b")
        c.step("create", lambda: sa.create(name, 2, "u1"))
        c.step("files", c.files)
        c.step("attach", lambda: sa.attach(name))
        c.step("list", c.listed)
        c.step("delete", lambda: sa.delete(name))


# Which forms of a name mean one object.
SAME = ("shm://x", "x", "/x", "//x", "shm:///x", "file:///dev/shm/x", "/dev/shm/x")
for label in SAME:

    @case(f"name-of-shm-object/{label}")
    def _(c, label=label):
        filled(c)
        name = NAMES[label](c)
        c.step("attach", lambda: sa.attach(name))
        c.step("create", lambda: sa.create(name, 2, "u1"))
        c.step("delete", lambda: sa.delete(name))
        c.step("files", c.files)


# --- shapes -----------------------------------------------------------------


class Index:
    def __index__(self):
        return 3


SHAPES = {
    "3": 3,
    "0": 0,
    "1": 1,
    "-1": -1,
    "(3,)": (3,),
    "[3]": [3],
    "(2, 3)": (2, 3),
    "[2, 3]": [2, 3],
    "(2, 3, 4)": (2, 3, 4),
    "()": (),
    "[]": [],
    "(0,)": (0,),
    "(3, 0)": (3, 0),
    "(0, 3)": (0, 3),
    "(0, 0)": (0, 0),
    "(1,)": (1,),
    "(1, 1)": (1, 1),
    "(3, 1)": (3, 1),
    "(-1,)": (-1,),
    "(2, -1)": (2, -1),
    "(-2, -2)": (-2, -2),
    "(0, -1)": (0, -1),
    "array int64 (2, 3)": np.array([2, 3]),
    "array int32 (2, 3)": np.array([2, 3], "i4"),
    "array uint8 (2, 3)": np.array([2, 3], "u1"),
    "array big-endian (2, 3)": np.array([2, 3], ">i8"),
    "array float (2, 3)": np.array([2.0, 3.0]),
    "array bool": np.array([True, True]),
    "array 0-d": np.array(3),
    "array empty": np.array([], int),
    "array empty float": np.array([]),
    "array 2-d": np.array([[2, 3]]),
    "array object": np.array([2, 3], object),
    "numpy.int64": np.int64(3),
    "numpy.int32": np.int32(3),
    "numpy.uint8": np.uint8(3),
    "numpy.uint64": np.uint64(3),
    "numpy.uint64 2**63": np.uint64(1 << 63),
    "numpy.float64": np.float64(3),
    "numpy.bool_": np.bool_(True),
    "tuple of numpy.int64": (np.int64(2), np.int64(3)),
    "tuple of numpy.float64": (np.float64(2), np.float64(3)),
    "tuple of __index__": (Index(), 2),
    "__index__": Index(),
    "True": True,
    "False": False,
    "(True, 2)": (True, 2),
    "3.0": 3.0,
    "3.5": 3.5,
    "(3.0,)": (3.0,),
    "(2, 3.5)": (2, 3.5),
    "nan": float("nan"),
    "complex": 3j,
    "'3'": "3",
    "''": "",
    "'ab'": "ab",
    "('3',)": ("3",),
    "b'ab'": b"ab",
    "bytearray": bytearray(b"\2\3"),
    "memoryview": memoryview(b"\2\3"),
    "None": None,
    "(None,)": (None,),
    "(2, None)": (2, None),
    "dict": {2: 3},
    "set": {2},
    "range(2, 4)": range(2, 4),
    "generator": iter((2, 3)),
    "nested list": [[2, 3]],
    "nested tuple": ((2,), 3),
    "slice": slice(2),
    "Ellipsis": ...,
    "type": int,
    "object": object(),
    "dtype": np.dtype("i4"),
    "32 dims": (1,) * 32,
    "33 dims": (1,) * 33,
    "64 dims": (1,) * 64,
    "65 dims": (1,) * 65,
    "1000 dims": (1,) * 1000,
    "16 dims": (2,) * 10 + (1,) * 6,
    "17 dims": (2,) * 10 + (1,) * 7,
    "2**57": 1 << 57,
    "2**60": 1 << 60,
    "2**61": 1 << 61,
    "2**62": 1 << 62,
    "2**63 - 1": (1 << 63) - 1,
    "2**63": 1 << 63,
    "2**64": 1 << 64,
    "2**64 + 3": (1 << 64) + 3,
    "-2**63": -(1 << 63),
    "-2**63 - 1": -(1 << 63) - 1,
    "10**30": 10**30,
    "(2**64 + 3,)": ((1 << 64) + 3,),
    "(2**32, 2**32)": (1 << 32, 1 << 32),
    "(2**32, 2**31)": (1 << 32, 1 << 31),
    "(2**31, 2**31, 2**2)": (1 << 31, 1 << 31, 1 << 2),
    "(2**61 + 1,)": ((1 << 61) + 1,),
    "(2**61, 8)": (1 << 61, 8),
    "(3, 2**63)": (3, 1 << 63),
    "(0, 2**62)": (0, 1 << 62),
    "(0, 2**62, 2**62)": (0, 1 << 62, 1 << 62),
    "(2**62, 2**62, 0)": (1 << 62, 1 << 62, 0),
    "(0, 2**63)": (0, 1 << 63),
}

for label, shape in SHAPES.items():
    for dtype in ("f8", "u1") if "2**6" in label else ("f8",):

        @case(f"shape/{label}" + ("" if dtype == "f8" else " " + dtype))
        def _(c, shape=shape, dtype=dtype):
            c.step("create", lambda: sa.create(c.uri, shape, dtype))
            c.step("files", c.files)
            c.step("attach", lambda: sa.attach(c.uri))
            c.step("list", c.listed)
            c.step("delete", lambda: sa.delete(c.uri))


# --- dtypes -----------------------------------------------------------------


SIMPLE = "?bBhHiIlLqQpPefdgFDGcaSUV"
STRUCT = [("a", "<i4"), ("b", "<f8")]
DTYPES = {char: char for char in SIMPLE}
DTYPES.update({text: text for text in (
    "bool", "int", "int8", "int16", "int32", "int64", "uint8", "uint64", "float", "float16",
    "float32", "float64", "longdouble", "complex64", "complex128", "str", "bytes", "object",
    "O", "<i4", ">i4", "=i4", "|i1", ">i2", ">u8", ">f2", ">f4", ">f8", ">g", ">c8", ">c16",
    "S1", "S5", "S0", "S4096", "U1", "U3", "U0", ">U3", "V1", "V7", "V0", "V16",
    "M8", "m8", "M8[ns]", "M8[D]", "M8[Y]", "M8[25s]", "m8[us]", "m8[7D]", ">M8[ns]", ">m8[s]",
    "datetime64[ms]", "i4,f8", "2i4", "(2,3)i4", "", "nonsense", "f8 ", "x", "i3", "f3", "int 32",
)})
DTYPES.update({
    "class float": float,
    "class int": int,
    "class bool": bool,
    "class complex": complex,
    "class str": str,
    "class bytes": bytes,
    "class object": object,
    "class list": list,
    "class numpy.float32": np.float32,
    "class numpy.longdouble": np.longdouble,
    "class numpy.bool_": np.bool_,
    "class numpy.bytes_": np.bytes_,
    "class numpy.str_": np.str_,
    "class numpy.void": np.void,
    "class numpy.datetime64": np.datetime64,
    "class numpy.number": np.number,
    "class numpy.generic": np.generic,
    "None": None,
    "3": 3,
    "3.0": 3.0,
    "b'f8'": b"f8",
    "scalar": np.float32(3),
    "array": np.zeros(2, "f4"),
    "dtype f4": np.dtype("f4"),
    "dtype >f4": np.dtype(">f4"),
    "dtype with metadata": np.dtype("i4", metadata={"x": 1}),
    "struct": STRUCT,
    "struct dtype": np.dtype(STRUCT),
    "struct big-endian": [("a", ">i4"), ("b", ">f8")],
    "struct aligned": np.dtype(STRUCT, align=True),
    "struct with gaps": {
        "names": ["a", "b"], "formats": ["i4", "f8"], "offsets": [4, 16], "itemsize": 32,
    },
    "struct overlapping": {"names": ["a", "b"], "formats": ["i4", "i2"], "offsets": [0, 2]},
    "struct titles": [(("title", "a"), "i4"), ("b", "f8")],
    "struct nested": [("a", STRUCT), ("b", "S3")],
    "struct subarray": [("a", "i4", (2, 3)), ("b", "U2")],
    "struct datetime": [("t", "M8[us]")],
    "struct empty": [],
    "struct with no bytes": [("a", "S0")],
    "struct of object": [("a", "O")],
    "struct non-latin name": [("å∫𝕔", "i4")],
    "struct long name": [("x" * 5000, "i4")],
    "record": np.dtype((np.record, STRUCT)),
    "subarray": ("i4", (2, 3)),
    "subarray of struct": (STRUCT, 2),
    "(void, 7)": (np.void, 7),
    "tuple too long": (1, 2, 3, 4),
})
if hasattr(np, "dtypes") and hasattr(np.dtypes, "StringDType"):
    DTYPES["StringDType"] = np.dtypes.StringDType()
    DTYPES["class StringDType"] = np.dtypes.StringDType

for label, dtype in DTYPES.items():

    @case(f"dtype/{label}")
    def _(c, dtype=dtype):
        a = c.step("create", lambda: sa.create(c.uri, 2, dtype))
        c.step("files", c.files)
        c.step("attach", lambda: sa.attach(c.uri))
        c.step("list", c.listed)
        if a is not None and a.nbytes:
            # Through the pages, so that the bytes and not a conversion are compared.
            ctypes.memmove(a.ctypes.data, bytes(i % 2 for i in range(a.nbytes)), a.nbytes)
            c.step("attach filled", lambda: sa.attach(c.uri))
        c.step("delete", lambda: sa.delete(c.uri))


@case("dtype/default")
def _(c):
    c.step("create", lambda: sa.create(c.uri, 2))


for label in ("struct", "struct aligned", "struct subarray", "struct titles"):

    @case(f"dtype-assign/{label}")
    def _(c, label=label):
        dtype = np.dtype(DTYPES[label])
        values = np.zeros(2, dtype)
        values["b"] = 7
        a = sa.create(c.uri, 2, dtype)

        def assign():
            a[:] = values

        c.step("assign array", assign)
        c.step("contents", lambda: a.tobytes().hex())
        c.step("field", lambda: a["b"].tolist())
        c.step("view", lambda: sa.attach(c.uri).view(dtype)["b"].tolist())

        def assign_void():
            a[0] = np.void(bytes(range(dtype.itemsize)))

        def assign_record():
            a[1] = values[0]

        def assign_tuple():
            a[1] = tuple(values[1])

        c.step("assign void", assign_void)
        c.step("assign record", assign_record)
        c.step("assign tuple", assign_tuple)
        c.step("contents then", lambda: a.tobytes().hex())
        c.step("dtype of an element", lambda: a[0].dtype)


@case("dtype-assign/subarray")
def _(c):
    a = sa.create(c.uri, 2, ("i4", (2, 3)))
    c.step("", lambda: a)


# --- how functions are called -----------------------------------------------


CALLS = {
    "create()": lambda c: sa.create(),
    "create(name)": lambda c: sa.create(c.uri),
    "create(name, shape, dtype)": lambda c: sa.create(c.uri, (2,), "i4"),
    "create(name, shape, dtype, 1)": lambda c: sa.create(c.uri, (2,), "i4", 1),
    "create(name=, shape=, dtype=)": lambda c: sa.create(name=c.uri, shape=(2,), dtype="i4"),
    "create(dtype=, shape=, name=)": lambda c: sa.create(dtype="i4", shape=2, name=c.uri),
    "create(name, dtype=, shape=)": lambda c: sa.create(c.uri, dtype="i4", shape=2),
    "create(name, shape=)": lambda c: sa.create(c.uri, shape=2),
    "create(name, dtype=)": lambda c: sa.create(c.uri, dtype="i4"),
    "create(shape=)": lambda c: sa.create(shape=2),
    "create(name, shape, name=)": lambda c: sa.create(c.uri, 2, name=c.uri),
    "create(uri=)": lambda c: sa.create(uri=c.uri, shape=2),
    "create(name, shape, order=)": lambda c: sa.create(c.uri, 2, order="C"),
    "create(name, shape, mode=)": lambda c: sa.create(c.uri, 2, mode=0o600),
    "create(shape, name)": lambda c: sa.create(2, c.uri),
    "create(bad name, bad shape)": lambda c: sa.create(7, "x"),
    "create(bad name, bad dtype)": lambda c: sa.create(7, 2, "nonsense"),
    "create(bad shape, bad dtype)": lambda c: sa.create(c.uri, "x", "nonsense"),
    "create(bad scheme, bad dtype)": lambda c: sa.create("http://x", 2, "O"),
    "create(bad scheme, bad shape)": lambda c: sa.create("http://x", -2),
    "attach()": lambda c: sa.attach(),
    "attach(name)": lambda c: sa.attach(c.uri),
    "attach(name=)": lambda c: sa.attach(name=c.uri),
    "attach(uri=)": lambda c: sa.attach(uri=c.uri),
    "attach(name, True)": lambda c: sa.attach(c.uri, True),
    "attach(name, False)": lambda c: sa.attach(c.uri, False),
    "attach(name, ro=True)": lambda c: sa.attach(c.uri, ro=True),
    "attach(name, ro=False)": lambda c: sa.attach(c.uri, ro=False),
    "attach(name=, ro=)": lambda c: sa.attach(name=c.uri, ro=True),
    "attach(ro=, name=)": lambda c: sa.attach(ro=True, name=c.uri),
    "attach(name, ro=1)": lambda c: sa.attach(c.uri, ro=1),
    "attach(name, ro=0)": lambda c: sa.attach(c.uri, ro=0),
    "attach(name, ro=2)": lambda c: sa.attach(c.uri, ro=2),
    "attach(name, ro=2**32)": lambda c: sa.attach(c.uri, ro=1 << 32),
    "attach(name, ro=10**30)": lambda c: sa.attach(c.uri, ro=10**30),
    "attach(name, ro=0.0)": lambda c: sa.attach(c.uri, ro=0.0),
    "attach(name, ro=0.5)": lambda c: sa.attach(c.uri, ro=0.5),
    "attach(name, ro=None)": lambda c: sa.attach(c.uri, ro=None),
    "attach(name, ro='')": lambda c: sa.attach(c.uri, ro=""),
    "attach(name, ro='r')": lambda c: sa.attach(c.uri, ro="r"),
    "attach(name, ro=[])": lambda c: sa.attach(c.uri, ro=[]),
    "attach(name, ro=array)": lambda c: sa.attach(c.uri, ro=np.zeros(2)),
    "attach(name, ro=numpy.bool_)": lambda c: sa.attach(c.uri, ro=np.bool_(True)),
    "attach(name, True, 1)": lambda c: sa.attach(c.uri, True, 1),
    "attach(name, readonly=)": lambda c: sa.attach(c.uri, readonly=True),
    "delete()": lambda c: sa.delete(),
    "delete(name)": lambda c: sa.delete(c.uri),
    "delete(name=)": lambda c: sa.delete(name=c.uri),
    "delete(uri=)": lambda c: sa.delete(uri=c.uri),
    "delete(name, 1)": lambda c: sa.delete(c.uri, 1),
    "delete(array)": lambda c: sa.delete(sa.attach(c.uri)),
    "list(1)": lambda c: sa.list(1),
    "list(name)": lambda c: sa.list(c.uri),
    "list(x=1)": lambda c: sa.list(x=1),
    "list(None)": lambda c: sa.list(None),
}

for label, call in CALLS.items():

    @case(f"call/{label}")
    def _(c, label=label, call=call):
        if not label.startswith("create"):
            filled(c)
        c.step("call", lambda: call(c))
        c.step("files", c.files)


for function in ("create", "attach", "delete", "list", "msync", "mlock", "munlock"):

    @case(f"function/{function}")
    def _(c, function=function):
        value = getattr(sa, function)
        c.step("__name__", lambda: value.__name__)
        c.step("__module__", lambda: value.__module__)
        c.step("type", lambda: type(value))


# --- what is at the name ----------------------------------------------------


@case("exists/same shape")
def _(c):
    filled(c)
    c.step("create", lambda: sa.create(c.uri, 6, "i4"))
    c.step("attach", lambda: sa.attach(c.uri))  # and it is as it was


@case("exists/another shape")
def _(c):
    filled(c)
    c.step("create", lambda: sa.create(c.uri, (2, 2)))
    c.step("attach", lambda: sa.attach(c.uri))


@case("exists/bad dtype")
def _(c):
    filled(c)
    c.step("create", lambda: sa.create(c.uri, 6, "O"))
    c.step("attach", lambda: sa.attach(c.uri))


@case("exists/catch, delete, recreate")
def _(c):
    filled(c)
    try:
        sa.create(c.uri, 2, "u1")
    except FileExistsError:
        sa.delete(c.uri)
        c.step("create", lambda: sa.create(c.uri, 2, "u1"))


def at_name(c, kind, path):
    """Put something that is no array at `path`."""
    if kind == "nothing":
        return
    if kind == "empty":
        open(path, "xb").close()
    elif kind == "text":
        with open(path, "x") as file:
            file.write("just a text\n" * 100)
    elif kind == "short text":
        with open(path, "x") as file:
            file.write("hi\n")
    elif kind == "one page":
        with open(path, "xb") as file:
            file.write(bytes(PAGE))
    elif kind == "sparse":
        with open(path, "xb") as file:
            file.truncate(1 << 33)
    elif kind == "directory":
        os.mkdir(path)
    elif kind == "full directory":
        os.mkdir(path)
        open(os.path.join(path, "x"), "x").close()
    elif kind == "FIFO":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path)
    elif kind == "device":
        os.mknod(path, 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    elif kind == "dangling symlink":
        os.symlink(path + "target", path)
    elif kind == "symlink loop":
        os.symlink(path, path)
    elif kind == "symlink to text":
        os.symlink(path + "target", path)
        at_name(c, "text", path + "target")
    elif kind == "symlink to array":
        os.symlink(path + "target", path)
        filled(c, "file://" + path + "target")
    elif kind == "symlink to array elsewhere":
        os.symlink(os.path.join(c.dir, "target"), path)
        filled(c, f"file://{c.dir}/target")
    elif kind == "symlink to directory":
        os.symlink(c.dir, path)
    elif kind == "hard link to array":
        filled(c, "file://" + path + "target")
        os.link(path + "target", path)
    else:
        filled(c, "file://" + path)
        size = os.path.getsize(path)
        if kind == "truncated by 1":
            os.truncate(path, size - 1)
        elif kind == "truncated to half":
            os.truncate(path, size // 2)
        elif kind == "truncated to 8":
            os.truncate(path, 8)
        elif kind == "longer by 1":
            os.truncate(path, size + 1)
        elif kind == "longer by a page":
            os.truncate(path, size + PAGE)
        elif kind == "shifted by 1":
            with open(path, "r+b") as file:
                data = file.read()
                file.seek(0)
                file.write(b"\0" + data)
        elif kind == "zeroed":
            with open(path, "r+b") as file:
                file.write(bytes(size))
        elif kind == "mode 0":
            os.chmod(path, 0)
        elif kind == "mode 0444":
            os.chmod(path, 0o444)
        elif kind == "mode 0666":
            os.chmod(path, 0o666)
        else:
            raise ValueError(kind)


KINDS = (
    "nothing", "empty", "text", "short text", "one page", "sparse", "directory", "full directory",
    "FIFO", "socket", "device", "dangling symlink", "symlink loop", "symlink to text",
    "symlink to array", "symlink to array elsewhere", "symlink to directory",
    "hard link to array", "truncated by 1", "truncated to half", "truncated to 8", "longer by 1",
    "longer by a page", "shifted by 1", "zeroed", "mode 0", "mode 0444", "mode 0666",
)

# One case a call, since a call on a FIFO may hang.
OPERATIONS = {
    "attach": sa.attach,
    "attach ro": lambda name: sa.attach(name, ro=True),
    "delete": sa.delete,
    "create": lambda name: sa.create(name, 2, "u1"),
}

for kind in KINDS:
    for where in ("shm", "file"):
        for label, operation in OPERATIONS.items():

            @case(f"at {where}/{kind}/{label}")
            def _(c, kind=kind, where=where, operation=operation):
                if kind == "device" and skip_unless_root(c):
                    return
                name, path = c.uri, c.path
                if where == "file":
                    name, path = f"file://{c.dir}/x", c.dir + "/x"
                at_name(c, kind, path)
                c.step("call", lambda: operation(name))
                c.step("files", c.files)

    @case(f"at shm/{kind}/list")
    def _(c, kind=kind):
        if kind == "device" and skip_unless_root(c):
            return
        at_name(c, kind, c.path)
        c.step("list", c.listed)


for kind in ("mode 0", "mode 0444", "mode 0666", "text"):
    for label, operation in OPERATIONS.items():

        @case(f"as nobody/{kind}/{label}")
        def _(c, kind=kind, operation=operation):
            if skip_unless_root(c):
                return
            at_name(c, kind, c.path)
            become_nobody()
            c.step("call", lambda: operation(c.uri))
            c.step("files", c.files)

    @case(f"as nobody/{kind}/list")
    def _(c, kind=kind):
        if skip_unless_root(c):
            return
        at_name(c, kind, c.path)
        become_nobody()
        c.step("list", c.listed)


@case("as nobody/create in a directory of root")
def _(c):
    if skip_unless_root(c):
        return
    become_nobody()
    c.step("create", lambda: sa.create(f"file://{c.dir}/x", 2))


# --- objects with the trailer of the PyPI package, good and bad -------------


def trailer(ndims_max, itemsize_field, size, typenum, itemsize, ndims, dims,
            magic=b"[SharedArray]"):
    data = struct.pack("=16sQi", magic, size, typenum)
    if itemsize_field:
        data += struct.pack("=i", itemsize)
    dims = (list(dims) + [0] * ndims_max)[:ndims_max]
    return data + struct.pack(f"=i{ndims_max}q", ndims, *dims)


FORMATS = {160: (16, False), 288: (32, False), 292: (32, True), 548: (64, True)}

# size, typenum (12 is float64), itemsize, ndims, dims of an object of at most 48 data bytes
GOOD_TRAILERS = {
    "2-d": (48, 12, 8, 2, (2, 3)),
    "0-d": (8, 12, 8, 0, ()),
    "empty": (0, 12, 8, 1, (0,)),
}

# The package reads beyond its memory on some of these: outcomes are not the same each time.
BAD_TRAILERS = {
    "size less than shape": (8, 12, 8, 2, (2, 3)),
    "size 0": (0, 12, 8, 2, (2, 3)),
    "size more than shape": (64, 12, 8, 2, (2, 3)),
    "size huge": ((1 << 64) - 1, 12, 8, 2, (2, 3)),
    "dims more than file": (48, 12, 8, 2, (2, 3000000)),
    "dims huge": (48, 12, 8, 2, (1 << 62, 1 << 62)),
    "dims negative": (48, 12, 8, 2, (-2, -3)),
    "dims one negative": (48, 12, 8, 2, (-2, 3)),
    "ndims negative": (48, 12, 8, -1, (2, 3)),
    "ndims 17": (8, 12, 8, 17, (1,) * 17),
    "ndims 33": (8, 12, 8, 33, (1,) * 33),
    "ndims 65": (8, 12, 8, 65, (1,) * 64),
    "ndims huge": (48, 12, 8, 1 << 30, (2, 3)),
    "typenum negative": (48, -1, 8, 2, (2, 3)),
    "typenum unknown": (48, 999, 8, 2, (2, 3)),
    "typenum object": (48, 17, 8, 2, (2, 3)),
    "typenum datetime": (48, 21, 8, 2, (2, 3)),
    "typenum bytes": (48, 18, 8, 2, (2, 3)),
    "typenum bytes no itemsize": (48, 18, 0, 2, (2, 3)),
    "typenum void": (48, 20, 8, 2, (2, 3)),
    "typenum str odd itemsize": (48, 19, 7, 2, (2, 3)),
    "itemsize of another type": (48, 12, 4, 2, (2, 3)),
    "itemsize negative": (48, 12, -8, 2, (2, 3)),
    "itemsize negative void": (48, 20, -8, 2, (2, 3)),
    "itemsize huge void": (48, 20, 1 << 30, 2, (2, 3)),
}

for total, (ndims_max, itemsize_field) in FORMATS.items():
    for label, fields in [*GOOD_TRAILERS.items(), *BAD_TRAILERS.items()]:

        @case(f"{'trailer' if label in GOOD_TRAILERS else 'bad trailer'} {total}/{label}")
        def _(c, fields=fields, ndims_max=ndims_max, itemsize_field=itemsize_field):
            data = bytes(i % 2 for i in range(min(fields[0], 48)))
            with open(c.path, "xb") as file:
                file.write(data + trailer(ndims_max, itemsize_field, *fields))
            c.step("list", c.listed)
            # Its shape only: reading the array may crash, and that comes last.
            a = c.step("attach", lambda: sa.attach(c.uri).__array_interface__["shape"])
            c.step("delete", lambda: [sa.attach(c.uri)] and sa.delete(c.uri))
            if a is not None:
                with open(c.path, "wb") as file:
                    file.write(data + trailer(ndims_max, itemsize_field, *fields))
                c.step("read", lambda: sa.attach(c.uri))

    @case(f"bad trailer {total}/magic only")
    def _(c):
        with open(c.path, "xb") as file:
            file.write(b"[SharedArray]")
        c.step("attach", lambda: sa.attach(c.uri))

    @case(f"bad trailer {total}/magic longer")
    def _(c, ndims_max=ndims_max, itemsize_field=itemsize_field):
        with open(c.path, "xb") as file:
            file.write(bytes(48) + trailer(ndims_max, itemsize_field, *GOOD_TRAILERS["2-d"],
                                           magic=b"[SharedArray]123"))
        c.step("attach", lambda: sa.attach(c.uri))

    @case(f"bad trailer {total}/at the start")
    def _(c, ndims_max=ndims_max, itemsize_field=itemsize_field):
        with open(c.path, "xb") as file:
            file.write(trailer(ndims_max, itemsize_field, *GOOD_TRAILERS["2-d"]) + bytes(48))
        c.step("attach", lambda: sa.attach(c.uri))


# --- life of an array -------------------------------------------------------


@case("life/attach sees create")
def _(c):
    a = filled(c, shape=(2, 3))
    b = c.step("attach", lambda: sa.attach(c.uri))
    a[0, 0] = 77
    c.step("through b", lambda: int(b[0, 0]))
    b[1, 2] = 78
    c.step("through a", lambda: int(a[1, 2]))
    c.step("shares memory", lambda: bool(np.shares_memory(a, b)))
    c.step("one address", lambda: a.ctypes.data == b.ctypes.data)


@case("life/another process")
def _(c):
    filled(c)

    def write():
        sa.attach(c.uri)[0] = 99

    process = multiprocessing.get_context("fork").Process(target=write)
    process.start()
    process.join()
    c.step("exit", lambda: process.exitcode)
    c.step("attach", lambda: sa.attach(c.uri))


@case("life/del")
def _(c):
    a = filled(c)
    b = sa.attach(c.uri)
    c.step("mapped", lambda: mappings(c))
    del a
    gc.collect()
    c.step("mapped after del", lambda: mappings(c))
    c.step("other attachment", lambda: b)
    c.step("attach again", lambda: sa.attach(c.uri))
    c.step("files", c.files)


@case("life/view keeps the mapping")
def _(c):
    a = filled(c)
    view = a[2:]
    c.step("view.base is a", lambda: view.base is a)
    del a
    gc.collect()
    c.step("view", lambda: view)
    c.step("mapped", lambda: mappings(c))
    del view
    gc.collect()
    c.step("mapped then", lambda: mappings(c))


@case("life/base keeps the mapping")
def _(c):
    a = filled(c)
    base = a.base
    del a
    gc.collect()
    c.step("mapped", lambda: mappings(c))
    c.step("name", lambda: base.name)
    c.step("msync", lambda: base.msync(sa.MS_SYNC))
    del base
    gc.collect()
    c.step("mapped then", lambda: mappings(c))


@case("life/delete keeps attachments")
def _(c):
    a = filled(c)
    b = sa.attach(c.uri)
    c.step("delete", lambda: sa.delete(c.uri))
    c.step("files", c.files)
    c.step("list", c.listed)
    a[0] = 55
    c.step("b", lambda: b)
    c.step("attach", lambda: sa.attach(c.uri))
    c.step("msync", lambda: b.base.msync(sa.MS_SYNC))
    c.step("mlock", lambda: b.base.mlock())
    c.step("munlock", lambda: b.base.munlock())


@case("life/recreate")
def _(c):
    a = filled(c)
    sa.delete(c.uri)
    b = c.step("create", lambda: sa.create(c.uri, 6, "i4"))
    b[0] = 9
    c.step("old", lambda: a)


@case("life/descriptors")
def _(c):
    before = len(os.listdir("/proc/self/fd"))
    a = filled(c)
    b = sa.attach(c.uri)
    for name in (c.uri, "http://x", c.uri + "missing", 7):
        for call in (sa.attach, sa.delete, lambda n: sa.create(n, 2, "O")):
            try:
                call(name) if name != c.uri or call is not sa.delete else None
            except Exception:
                pass
    sa.list()
    c.step("", lambda: len(os.listdir("/proc/self/fd")) - before)
    del a, b


@case("life/references")
def _(c):
    before = sys.getrefcount(c.uri)
    a = filled(c)
    base = a.base
    c.step("to the array", lambda: sys.getrefcount(a) - 2)
    c.step("to the base", lambda: sys.getrefcount(base) - 2)
    del a, base
    c.step("to the name", lambda: sys.getrefcount(c.uri) - before)


@case("life/many")
def _(c):
    arrays = [sa.create(f"{c.uri}{i}", 3, "u1") for i in range(200)]
    arrays += [sa.attach(f"{c.uri}{i}") for i in range(200)]
    c.step("list", lambda: len(c.listed()))
    c.step("mapped", lambda: len(mappings(c)))
    del arrays
    gc.collect()
    c.step("mapped then", lambda: mappings(c))


# --- the array --------------------------------------------------------------


@case("array/mapping permissions")
def _(c):
    a = filled(c)
    c.step("create", lambda: mappings(c))
    del a
    b = sa.attach(c.uri)
    c.step("attach", lambda: mappings(c))
    del b
    b = sa.attach(c.uri, ro=True)
    c.step("attach ro", lambda: mappings(c))
    del b


@case("array/zero fill")
def _(c):
    a = sa.create(c.uri, 1 << 20, "u1")
    c.step("any", lambda: bool(a.any()))


@case("array/memory is reserved at create")
def _(c):
    sa.create(c.uri, 1 << 20, "u1")
    c.step("", lambda: os.stat(c.path).st_blocks * 512 >= 1 << 20)


for label, mask in (("022", 0o022), ("077", 0o077), ("000", 0), ("777", 0o777)):

    @case(f"array/mode with umask {label}")
    def _(c, mask=mask):
        os.umask(mask)
        c.step("shm", lambda: sa.create(c.uri, 2) is not None)
        c.step("file", lambda: sa.create(f"file://{c.dir}/x", 2) is not None)
        c.step("files", c.files)


@case("array/file size")
def _(c):
    for size in (0, 1, 5000):
        sa.create(f"{c.uri}{size}", size, "u1")
        c.report(str(size), {"file_size": os.path.getsize(f"{c.path}{size}")})


for label, how in (("create", lambda c: None), ("attach", lambda c: sa.attach(c.uri)),
                   ("attach ro", lambda c: sa.attach(c.uri, ro=True))):

    @case(f"array/{label}/writeable")
    def _(c, how=how):
        a = filled(c)
        a = how(c) if how(c) is not None else a

        def write(value):
            a[0] = value

        def set_flag(value):
            a.flags.writeable = value

        c.step("write", lambda: write(5))
        c.step("set False", lambda: set_flag(False))
        c.step("write then", lambda: write(6))
        c.step("set True", lambda: set_flag(True))
        c.step("flag", lambda: a.flags.writeable)
        c.step("setflags", lambda: a.setflags(write=True))
        c.step("of a view", lambda: a[1:].flags.writeable)
        c.step("view setflags", lambda: a[1:].setflags(write=True))
        c.step("memoryview is read-only", lambda: memoryview(a).readonly)
        c.step("other attachment", lambda: sa.attach(c.uri).flags.writeable)
        c.step("write at last", lambda: write(7))


@case("array/attach ro/write to the page")
def _(c):
    filled(c)
    a = sa.attach(c.uri, ro=True)
    c.step("", lambda: ctypes.memset(a.ctypes.data, 1, 1))


@case("array/attach ro sees writes")
def _(c):
    a = filled(c)
    b = sa.attach(c.uri, ro=True)
    a[0] = 42
    c.step("", lambda: int(b[0]))


@case("array/attach ro while the first is flagged read-only")
def _(c):
    a = filled(c)
    a.flags.writeable = False
    c.step("", lambda: sa.attach(c.uri).flags.writeable)


@case("array/attached file is truncated")
def _(c):
    a = sa.create(c.uri, 4 * PAGE, "u1")
    os.truncate(c.path, 0)
    c.step("read", lambda: int(a[2 * PAGE]))


ARRAY_USES = {
    "+ 1": lambda a: a + 1,
    "copy()": lambda a: a.copy(),
    "slice": lambda a: a[1:],
    "T": lambda a: a.T,
    "reshape": lambda a: a.reshape(3, 2),
    "view(u1)": lambda a: a.view("u1"),
    "astype": lambda a: a.astype("f4"),
    "numpy.asarray": lambda a: np.asarray(a),
    "numpy.asarray is a": lambda a: np.asarray(a) is a,
    "element": lambda a: type(a[0, 0]),
    "sum()": lambda a: type(a.sum()),
    "pickle": lambda a: pickle.loads(pickle.dumps(a)),
    "pickle protocol 5": lambda a: pickle.loads(pickle.dumps(a, 5)),
    "copy.copy": lambda a: copy.copy(a),
    "copy.deepcopy": lambda a: copy.deepcopy(a),
    "resize": lambda a: a.resize(3, refcheck=False),
    "set shape": lambda a: setattr(a, "shape", (6,)),
    "set dtype": lambda a: setattr(a, "dtype", "f4"),
    "set an attribute": lambda a: setattr(a, "x", 1),
    "weakref": lambda a: weakref.ref(a)() is a,
    "memoryview": lambda a: [memoryview(a).format, memoryview(a).nbytes],
    "fill": lambda a: [a.fill(3), a.tolist()],
    "byteswap(True)": lambda a: [a.byteswap(True), a.tobytes().hex()],
    "sort": lambda a: [a.sort(axis=0), a.tolist()],
    "tofile": lambda a: [a.tofile("out"), os.path.getsize("out")],
    "numpy.save": lambda a: [np.save("out.npy", a), np.load("out.npy").tolist()],
    "type is ndarray": lambda a: type(a) is np.ndarray,
    "del base": lambda a: delattr(a, "base"),
}

for label, use in ARRAY_USES.items():

    @case(f"array/use/{label}")
    def _(c, use=use):
        a = filled(c, shape=(2, 3))
        c.step("", lambda: use(a))


# --- base -------------------------------------------------------------------


@case("base/of create and attach")
def _(c):
    a = filled(c)
    b = sa.attach(c.token)
    c.step("name of create", lambda: a.base.name)
    c.step("name of attach", lambda: b.base.name)
    c.step("name is the str given", lambda: a.base.name is c.uri)
    c.step("addr is the data's address", lambda: a.base.addr == a.ctypes.data)
    c.step("types of name, addr, size",
           lambda: [type(a.base.name), type(a.base.addr), type(a.base.size)])
    c.step("size covers the data", lambda: a.base.size >= a.nbytes)
    c.step("size is the file's", lambda: a.base.size == os.path.getsize(c.path))
    c.step("one type", lambda: type(a.base) is type(b.base))


@case("base/dir")
def _(c):
    a = filled(c)
    c.step("", lambda: sorted(name for name in dir(a.base) if not name.startswith("_")))


BASE_USES = {
    "set name": lambda b: setattr(b, "name", "x"),
    "set addr": lambda b: setattr(b, "addr", 0),
    "set size": lambda b: setattr(b, "size", 0),
    "set another": lambda b: setattr(b, "x", 0),
    "del name": lambda b: delattr(b, "name"),
    "del size": lambda b: delattr(b, "size"),
    "new": lambda b: type(type(b)()),
    "new(name)": lambda b: type(type(b)("x")),
    "subclass": lambda b: type("X", (type(b),), {}),
    "buffer": lambda b: len(memoryview(b)),
    "bytes": lambda b: bytes(b),
    "len": lambda b: len(b),
    "iter": lambda b: iter(b),
    "==": lambda b: b == b,
    "hash": lambda b: isinstance(hash(b), int),
    "pickle": lambda b: type(pickle.loads(pickle.dumps(b))),
    "copy": lambda b: type(copy.copy(b)),
    "weakref": lambda b: weakref.ref(b)() is b,
    "with": lambda b: b.__enter__(),
    "close": lambda b: b.close(),
    "array interface": lambda b: b.__array_interface__,
    "doc": lambda b: type(b).__doc__,
    "repr has addr": lambda b: hex(id(b)) in repr(b),
}

for label, use in BASE_USES.items():

    @case(f"base/use/{label}")
    def _(c, use=use):
        a = filled(c)
        c.step("", lambda: use(a.base))


@case("base/new/methods")
def _(c):
    new = c.step("new", lambda: type(filled(c).base)())
    for label, use in (("name", lambda: new.name), ("size", lambda: new.size),
                       ("addr", lambda: new.addr), ("mlock", lambda: new.mlock()),
                       ("msync", lambda: new.msync(4)), ("munlock", lambda: new.munlock())):
        c.step(label, use)


# --- msync, mlock, munlock --------------------------------------------------


class Flag:
    def __index__(self):
        return 4


FLAGS = {
    "MS_SYNC": 4, "MS_ASYNC": 1, "MS_INVALIDATE": 2, "SYNC | INVALIDATE": 6,
    "ASYNC | INVALIDATE": 3, "SYNC | ASYNC": 5, "0": 0, "8": 8, "-1": -1, "2**31": 1 << 31,
    "2**32 + 4": (1 << 32) + 4, "2**40": 1 << 40, "2**64": 1 << 64, "True": True, "False": False,
    "4.0": 4.0, "'4'": "4", "None": None,
    "numpy.int64": np.int64(4), "numpy.float64": np.float64(4),
    "numpy.bool_": np.bool_(True), "array": np.array(4), "__index__": Flag(), "list": [4],
}

for label, flags in FLAGS.items():

    @case(f"sync/{label}")
    def _(c, flags=flags):
        a = filled(c)
        c.step("base", lambda: a.base.msync(flags))
        c.step("module", lambda: sa.msync(a, flags))
        filled(c, f"file://{c.dir}/x")
        b = sa.attach(f"file://{c.dir}/x")
        c.step("base of file", lambda: b.base.msync(flags))
        c.step("module of file", lambda: sa.msync(b, flags))


BASE_CALLS = {
    "msync()": lambda b: b.msync(),
    "msync(flags=)": lambda b: b.msync(flags=4),
    "msync(4, 4)": lambda b: b.msync(4, 4),
    "mlock()": lambda b: b.mlock(),
    "mlock() twice": lambda b: [b.mlock(), b.mlock()],
    "mlock(1)": lambda b: b.mlock(1),
    "mlock(x=1)": lambda b: b.mlock(x=1),
    "munlock()": lambda b: b.munlock(),
    "munlock() after mlock()": lambda b: [b.mlock(), b.munlock()],
    "munlock(1)": lambda b: b.munlock(1),
}

for label, call in BASE_CALLS.items():

    @case(f"base/call/{label}")
    def _(c, call=call):
        a = filled(c)
        c.step("", lambda: call(a.base))


for label, how in (("attach ro", lambda c: sa.attach(c.uri, ro=True)),
                   ("empty", lambda c: sa.create(c.uri + "e", 0)),
                   ("0-d", lambda c: sa.create(c.uri + "e", ()))):

    @case(f"base/of {label}")
    def _(c, how=how):
        filled(c)
        a = how(c)
        c.step("msync", lambda: a.base.msync(4))
        c.step("mlock", lambda: a.base.mlock())
        c.step("munlock", lambda: a.base.munlock())
        c.step("module msync", lambda: sa.msync(a, 4))
        c.step("module mlock", lambda: sa.mlock(a))
        c.step("module munlock", lambda: sa.munlock(a))


@case("base/mlock over the limit")
def _(c):
    if skip_unless_root(c):
        return
    a = sa.create(c.uri, 1 << 20, "u1")
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (PAGE, PAGE))
    become_nobody()
    c.step("base", lambda: a.base.mlock())
    c.step("module", lambda: sa.mlock(a))
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (0, 0))
    c.step("base, none allowed", lambda: a.base.mlock())
    c.step("base munlock", lambda: a.base.munlock())


class ArraySubclass(np.ndarray):
    pass


# What the module's functions take: the shared array, something made of it, or something else.
SUBJECTS = {
    "shared": lambda c: filled(c, shape=(2, 3)),
    "attached": lambda c: [filled(c), sa.attach(c.uri)][1],
    "slice": lambda c: filled(c)[2:],
    "slice of another page": lambda c: sa.create(c.uri, 4 * PAGE, "u1")[2 * PAGE:3 * PAGE],
    "slice of slice": lambda c: filled(c)[1:][1:],
    "transposed": lambda c: filled(c, shape=(2, 3)).T,
    "reshaped": lambda c: filled(c).reshape(2, 3),
    "view u1": lambda c: filled(c).view("u1"),
    "subclass view": lambda c: filled(c).view(ArraySubclass),
    "numpy.asarray": lambda c: np.asarray(filled(c)),
    "copy": lambda c: filled(c).copy(),
    "plain array": lambda c: np.zeros(3),
    "big plain array": lambda c: np.zeros(1 << 20, "u1"),
    "slice of plain array": lambda c: np.zeros(10)[2:],
    "empty plain array": lambda c: np.zeros(0),
    "array of bytes": lambda c: np.frombuffer(b"x" * 100, "u1"),
    "memmap": lambda c: np.memmap(c.dir + "/m", "u1", "w+", shape=PAGE),
    "element": lambda c: filled(c)[0],
    "base": lambda c: filled(c).base,
    "memoryview": lambda c: memoryview(filled(c)),
    "name": lambda c: [filled(c), c.uri][1],
    "list": lambda c: [1, 2],
    "int": lambda c: 7,
    "None": lambda c: None,
    "type": lambda c: np.ndarray,
}

for label, make in SUBJECTS.items():
    for function, arguments in (("msync", (4,)), ("mlock", ()), ("munlock", ())):

        @case(f"module-{function}/{label}")
        def _(c, make=make, function=function, arguments=arguments):
            subject = make(c)
            c.step("", lambda: getattr(sa, function)(subject, *arguments))


MODULE_CALLS = {
    "msync()": lambda a: sa.msync(),
    "msync(array)": lambda a: sa.msync(a),
    "msync(array, flags=)": lambda a: sa.msync(a, flags=4),
    "msync(array=, flags=)": lambda a: sa.msync(array=a, flags=4),
    "msync(flags, array)": lambda a: sa.msync(4, a),
    "msync(array, 4, 4)": lambda a: sa.msync(a, 4, 4),
    "mlock()": lambda a: sa.mlock(),
    "mlock(array=)": lambda a: sa.mlock(array=a),
    "mlock(array, 1)": lambda a: sa.mlock(a, 1),
    "munlock()": lambda a: sa.munlock(),
    "munlock(array=)": lambda a: sa.munlock(array=a),
    "munlock(array, 1)": lambda a: sa.munlock(a, 1),
}

for label, call in MODULE_CALLS.items():

    @case(f"module-call/{label}")
    def _(c, call=call):
        a = filled(c)
        c.step("", lambda: call(a))


# --- list -------------------------------------------------------------------


@case("list/type")
def _(c):
    filled(c)
    c.step("type", lambda: type(sa.list()))
    c.step("own object each time", lambda: sa.list() is not sa.list())


@case("list/several")
def _(c):
    sa.create(c.uri + "a", 3)
    sa.create(c.uri + "b", (2, 3), "i2")
    sa.create(c.uri + "c", (), "?")
    sa.create(c.uri + "d", 0, "c8")
    sa.create(c.uri + "e", (1, 0, 2), "S3")
    sa.create(f"file://{c.dir}/x", 3)
    sa.create("file://" + c.path + "f", 3)
    c.step("", c.listed)


@case("list/of hidden, odd and nested names")
def _(c):
    os.mkdir(c.path)
    sa.create("shm://." + c.token, 1, "u1")
    sa.create(f"file://{c.path}/nested", 1, "u1")
    sa.create(c.uri + "å∫𝕔", 1, "u1")
    os.link(os.fsencode(SHM + "/." + c.token), os.fsencode(c.path) + b"\xff")
    c.step("", c.listed)


@case("list/order")
def _(c):
    for i in (3, 1, 2):
        sa.create(f"{c.uri}{i}", 1, "u1")
    c.step("created as 3, 1, 2", lambda: "".join(
        chr(entry[0][-1]) for entry in sa.list() if c.token.encode() in entry[0]))
    c.step("listdir", lambda: "".join(n[-1] for n in os.listdir(SHM) if c.token in n))


DESC_USES = {
    "type": lambda d: type(d),
    "bases": lambda d: type(d).__mro__,
    "is SharedArray.SharedArray": lambda d: type(d) is sa.SharedArray,
    "is SharedArray.ArrayDesc": lambda d: type(d) is sa.ArrayDesc,
    "module": lambda d: type(d).__module__,
    "qualname": lambda d: type(d).__qualname__,
    "doc": lambda d: type(d).__doc__,
    "attributes": lambda d: sorted(name for name in dir(d) if not name.startswith("__")),
    "repr": lambda d: repr(d),
    "str": lambda d: str(d),
    "name": lambda d: d.name,
    "dtype": lambda d: d.dtype,
    "dims": lambda d: d.dims,
    "shape": lambda d: d.shape,
    "type of a dim": lambda d: type(d.dims[0]),
    "len": lambda d: len(d),
    "[0], [1], [2]": lambda d: [d[0], d[1], d[2]],
    "[3]": lambda d: d[3],
    "[-1]": lambda d: d[-1],
    "['name']": lambda d: d["name"],
    "unpack": lambda d: [*d],
    "== tuple": lambda d: d == tuple(d),
    "== itself": lambda d: d == d,
    "hash": lambda d: hash(d) == hash(tuple(d)),
    "set name": lambda d: setattr(d, "name", 1),
    "set another": lambda d: setattr(d, "x", 1),
    "d[0] = 1": lambda d: d.__setitem__(0, 1),
    "isinstance tuple": lambda d: isinstance(d, tuple),
    "_fields": lambda d: d._fields,
    "n_fields": lambda d: [d.n_fields, d.n_sequence_fields, d.n_unnamed_fields],
    "__match_args__": lambda d: type(d).__match_args__,
    "_replace": lambda d: d._replace(name=b"x"),
    "_asdict": lambda d: d._asdict(),
    "pickle": lambda d: pickle.loads(pickle.dumps(d)),
    "copy": lambda d: copy.copy(d),
    "new of a tuple": lambda d: type(d)((b"x", float, (1,))),
    "new of three": lambda d: type(d)(b"x", float, (1,)),
    "new of two": lambda d: type(d)((b"x", float)),
    "new of nothing": lambda d: type(d)(),
    "attach(name)": lambda d: sa.attach(d.name),
    "attach(name.decode())": lambda d: sa.attach(d.name.decode()),
    "numpy.zeros of it": lambda d: np.zeros(d.dims, d.dtype),
    "numpy.dtype of it": lambda d: np.dtype(d.dtype),
}

for label, use in DESC_USES.items():

    @case(f"list/element/{label}")
    def _(c, use=use):
        filled(c, shape=(2, 3))
        entry = c.listed()[0]
        c.step("", lambda: use(entry))


# --- a full /dev/shm, and sizes that only a file without memory behind it has


@case("full/more than there is")
def _(c):
    if skip_unless_small_shm(c):
        return
    a = c.step("create", lambda: sa.create(c.uri, 4 << 20, "u1"))
    c.step("files", c.files)
    if a is not None:
        c.step("fill", lambda: a.fill(1))


@case("full/nothing left")
def _(c):
    if skip_unless_small_shm(c):
        return
    with open(c.path + "ballast", "xb") as file:
        file.write(bytes(1 << 20))
    c.step("create", lambda: sa.create(c.uri, 10, "u1"))
    c.step("files", c.files)


@case("full/no inode left")
def _(c):
    # One inode: the root directory has it.
    if skip_unless_small_shm(c, inodes=1):
        return
    c.step("create", lambda: sa.create(c.uri, 10, "u1"))


@case("full/2**40 bytes")
def _(c):
    if skip_unless_small_shm(c):
        return
    c.step("create", lambda: sa.create(c.uri, BIG, "u1"))
    c.step("files", c.files)
    c.step("attach", lambda: sa.attach(c.uri))
    c.step("list", c.listed)


@case("full/file size limit")
def _(c):
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
    c.step("create", lambda: sa.create(c.uri, 1 << 20, "u1"))
    c.step("files", c.files)


@case("full/address space limit")
def _(c):
    used = int(open("/proc/self/statm").read().split()[0]) * PAGE
    resource.setrlimit(resource.RLIMIT_AS, (used + (8 << 20), used + (8 << 20)))
    c.step("create", lambda: sa.create(c.uri, 32 << 20, "u1"))
    c.step("files", c.files)


@case("full/no descriptor left")
def _(c):
    filled(c)
    path = c.uri + "x"
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))
    c.step("create", lambda: sa.create(path, 10, "u1"))
    c.step("attach", lambda: sa.attach(c.uri))
    c.step("list", lambda: sa.list())
    c.step("delete", lambda: sa.delete(c.uri))


@case("full/no /dev/shm")
def _(c):
    if skip_unless_small_shm(c):
        return
    os.chmod(SHM, 0o700)
    become_nobody()
    c.step("list", lambda: sa.list())
    c.step("create", lambda: sa.create(c.uri, 10, "u1"))
    c.step("attach", lambda: sa.attach(c.uri))
    c.step("delete", lambda: sa.delete(c.uri))


def main():
    wanted = sys.argv[1:]
    private_shm(1 << 30)  # where it cannot be had, the system's serves
    outcomes = {}
    for number, (name, function) in enumerate(CASES.items()):
        if not wanted or any(text in name for text in wanted):
            outcomes[name] = run(function, number)
    json.dump(outcomes, sys.stdout, indent=1)
    print()


if __name__ == "__main__":
    main()
