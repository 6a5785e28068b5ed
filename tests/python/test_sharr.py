"""sharr itself: create, attach, delete, list, info, and every way to get them wrong."""

import ast
import errno
import gc
import io
import mmap
import os
import pathlib
import pickle
import random
import signal
import socket
import stat
import subprocess
import sys
import textwrap
import threading
import time

import numpy as np
import pytest
import SharedArray
import sharr
from conftest import (
    PYTHON, SHM, as_nobody, in_small_shm, left_behind, needs_root, needs_strace, python, traced,
    wait_until,
)  # fmt: skip

DTYPES = [
    "?", "i1", "u1", "i2", "<u2", ">i2", "i4", "u4", ">u4", "i8", "u8", ">i8", "f2", ">f2", "f4",
    ">f4", "f8", ">f8", "g", "c8", ">c8", "c16", "G", "S1", "S7", "U1", "U5", ">U5", "V3", "V16",
    "M8[ns]", "M8[25s]", ">M8[D]", "M8", "m8[us]", ">m8[7D]", "m8", "l", "q", "L", "Q",
]  # fmt: skip
STRUCTURED = [
    [("x", "f4"), ("y", ">i2")],
    [("x", "f4", (2, 3)), ("n", [("a", "u1"), ("b", "M8[ns]", 2)])],
    [(("a title", "x"), "f8"), ("é", "S3")],
    [("日本", "i4"), ("it's", "i1"), ('"', "i1"), ("\\", "i1"), ("a\nb", "i1")],
    np.dtype([("a", "u1"), ("b", "f8"), ("c", "u1")], align=True),
    np.dtype({"names": ["a", "b"], "formats": ["u1", "f4"], "offsets": [3, 10], "itemsize": 20}),
    [("a", "S0"), ("b", "i4")],
    [],
]
SHAPES = [(), (0,), (1,), (5,), (3, 4), (2, 0, 3), (2, 3, 4, 5), (1, 1), (1,) * 32]


def test_two_processes_share_memory(name):
    a = sharr.create(name, (3, 4), "f4")
    a[:] = 1
    python(
        "import sharr, sys\na = sharr.attach(sys.argv[1])\nassert (a == 1).all()\na[1] = 7", name
    )
    assert a[1].tolist() == [7] * 4 and a.sum() == 8 + 28
    assert a.__array_interface__["data"][0] % 4096 == 0
    sharr.delete(name)
    a[0] = 2  # attachments outlive the name
    with pytest.raises(FileNotFoundError) as error:
        sharr.attach(name)
    assert error.value.errno == errno.ENOENT and error.value.filename == name


def contents(dtype, shape):
    """Bytes of all sorts; for floats and dates also NaN and NaT."""
    dtype = np.dtype(dtype)
    count = int(np.prod(shape, dtype=int)) * dtype.itemsize
    if dtype.kind == "U":
        filled = np.full(shape, "aé☃"[: dtype.itemsize // 4], dtype)
    elif dtype.kind == "b":
        filled = np.arange(count).reshape(shape) % 2 == 0
    else:
        filled = np.ndarray(shape, dtype, np.arange(count or 1, dtype="u4").astype("u1").tobytes())
    return filled


@pytest.mark.parametrize("order", "CF")
@pytest.mark.parametrize("dtype", [*DTYPES, *STRUCTURED], ids=str)
def test_every_dtype_and_shape_comes_back(name, dtype, order):
    dtype = np.dtype(dtype)
    for number, shape in enumerate(SHAPES):
        one = f"{name}-{number}"
        a = sharr.create(one, shape, dtype, order=order)
        assert type(a) is sharr.Array and a.dtype == dtype and a.shape == shape
        assert not a.tobytes().strip(b"\0")
        filled = contents(dtype, shape)
        if a.size and dtype.itemsize:
            a[...] = filled
        expected = a.tobytes("A")
        for b in (sharr.attach(one), sharr.attach(one, "r"), np.load(SHM / one)):
            assert b.dtype == dtype and b.dtype.str == dtype.str and b.shape == shape
            assert b.flags.c_contiguous == a.flags.c_contiguous
            assert b.flags.f_contiguous == a.flags.f_contiguous
            assert b.tobytes("A") == expected
            assert (b.strides == a.strides) or b.nbytes == 0
        info = sharr.info(one)
        assert (info.name, info.dtype, info.shape, info.order) == (
            f"shm://{one}", dtype, shape, order,
        )  # fmt: skip
        assert info.nbytes == a.nbytes and info.offset % 4096 == 0
        assert os.stat(SHM / one).st_size == info.offset + info.nbytes
        sharr.delete(one)


def test_the_file_is_what_numpy_writes(name, tmp_path):
    """The same header as NumPy's own writer makes, but for the padding."""
    for number, dtype in enumerate([*DTYPES, *STRUCTURED]):
        a = sharr.create(f"{name}-{number}", (3, 2), dtype, order="F")
        with (SHM / f"{name}-{number}").open("rb") as ours:
            version = np.lib.format.read_magic(ours)
            length = 2 if version == (1, 0) else 4
            ours.read(length)
            text = ours.read(4096).split(b"\n")[0]
        header = ast.literal_eval(text.decode("utf8" if version == (3, 0) else "latin1"))
        assert header == {
            "descr": np.lib.format.dtype_to_descr(a.dtype), "fortran_order": True, "shape": (3, 2),
        }  # fmt: skip
        assert text.rstrip().endswith(b", }")


def test_many_fields_take_version_2(name):
    dtype = np.dtype([(f"field_{i}", "f8") for i in range(4000)])
    sharr.create(name, 3, dtype)
    assert sharr.info(name).format == "NPY 2.0"
    assert sharr.attach(name).dtype == dtype
    assert np.load(SHM / name, max_header_size=10**6).dtype == dtype


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
def test_any_npy_file_attaches(tmp_path, version):
    for dtype in ["f8", ">i4", [("x", "u1"), ("y", "f8")]]:
        for order in "CF":
            saved = np.array(contents(dtype, (3, 5)), order=order)
            with (tmp_path / "a.npy").open("wb") as file:
                np.lib.format.write_array(file, saved, version)
                file.write(b"what follows the data does no harm")
            a = sharr.attach(tmp_path / "a.npy")
            assert a.dtype == saved.dtype and a.tobytes() == saved.tobytes()
            assert a.flags.f_contiguous == saved.flags.f_contiguous


def test_numpys_own_collection(name):
    formats = pytest.importorskip("numpy.lib.tests.test_format")
    made = []
    for number, original in enumerate([*formats.basic_arrays, *formats.record_arrays]):
        one = f"{name}-{number}"
        if original.dtype.hasobject:
            with pytest.raises(TypeError, match="object"):
                sharr.create(one, original.shape, original.dtype)
            continue
        fortran = original.flags.f_contiguous and not original.flags.c_contiguous
        a = sharr.create(one, original.shape, original.dtype, order="F" if fortran else "C")
        a[...] = original
        np.save(SHM / f"{one}-expected.npy", original)
        assert np.load(SHM / one).tobytes() == original.tobytes()
        made.append(one)
    same = python(
        """
        import sys, numpy as np, sharr
        for one in sys.argv[2:]:
            a, b = sharr.attach(one, "r"), np.load(f"{sys.argv[1]}/{one}-expected.npy")
            assert a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes(), one
            assert a.flags.f_contiguous == b.flags.f_contiguous, one
            print("same")
        """,
        SHM, *made,
    )  # fmt: skip
    assert same.split() == ["same"] * len(made)


# Modes, exist_ok, reserve


def test_modes(name):
    a = sharr.create(name, 4, "i4")
    a[:] = 5
    private = sharr.attach(name, "c")
    private[:] = 9
    read_only = sharr.attach(name, mode="r")
    assert a.tolist() == read_only.tolist() == [5] * 4 and private.tolist() == [9] * 4
    with pytest.raises(ValueError):
        read_only[0] = 1
    with pytest.raises(ValueError):
        read_only.flags.writeable = True
    a[0] = 6
    assert read_only[0] == 6
    for wrong in ("w+", None, b"r"):
        with pytest.raises(ValueError, match="mode"):
            sharr.attach(name, wrong)


def test_exist_ok(name):
    a = sharr.create(name, (2, 3), "i4", exist_ok=True)
    a[:] = 3
    assert (sharr.create(name, (2, 3), "i4", exist_ok=True) == 3).all()
    for shape, dtype, order in [((3, 2), "i4", "C"), ((2, 3), "u4", "C"), ((2, 3), "i4", "F")]:
        with pytest.raises(FileExistsError) as error:
            sharr.create(name, shape, dtype, order=order, exist_ok=True)
        assert "(2, 3)" in str(error.value) and "int32" in str(error.value)
    with pytest.raises(FileExistsError):
        sharr.create(name, (2, 3), "i4")
    assert (a == 3).all()


def test_reserve(name):
    sharr.create(name + "-r", 1 << 20, "u1")
    assert os.stat(SHM / f"{name}-r").st_blocks * 512 >= 1 << 20
    a = sharr.create(name + "-s", 1 << 30, "u1", reserve=False)
    assert os.stat(SHM / f"{name}-s").st_blocks * 512 <= 1 << 16
    a[-1] = 7
    assert sharr.attach(name + "-s")[-1] == 7


def test_umask(name):
    old = os.umask(0o027)
    try:
        sharr.create(name, 3)
    finally:
        os.umask(old)
    assert stat.S_IMODE(os.stat(SHM / name).st_mode) == 0o640


# Names


def test_names_of_one_array(name, tmp_path, monkeypatch):
    a = sharr.create(name, 3)
    for same in (f"shm://{name}", f"shm:///{name}", f"file:///dev/shm/{name}", SHM / name,
                 f"/dev/shm/{name}"):  # fmt: skip
        a[0] += 1
        b = sharr.attach(same)
        assert b[0] == a[0] and b.base.name == str(same)
    assert sharr.info(f"/dev/shm/{name}").name == f"file:///dev/shm/{name}"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rel").mkdir()
    sharr.create("file://rel/b.npy", 3)[:] = 4
    assert np.load("rel/b.npy").tolist() == [4] * 3
    assert sharr.attach(pathlib.Path("rel/../rel/b.npy")).tolist() == [4] * 3
    sharr.delete(pathlib.Path("rel/b.npy"))
    assert not os.listdir("rel")


def test_namespaces(name):
    sharr.create(f"shm://{name}/7/a", 3)[:] = 1
    assert np.load(SHM / name / "7" / "a").tolist() == [1] * 3
    sharr.create(f"{name}/7/b", 3)
    sharr.create(f"{name}/c", 3)
    listed = [info.name for info in sharr.list(f"shm://{name}/")]
    assert listed == [f"shm://{name}/{one}" for one in ("7/a", "7/b", "c")]
    assert [i.name for i in sharr.list(f"{name}/7")] == [f"shm://{name}/7/{c}" for c in "ab"]
    assert set(listed) <= {info.name for info in sharr.list()}
    sharr.delete(f"shm://{name}/7/a")
    assert [info.name for info in sharr.list(f"shm://{name}/7")] == [f"shm://{name}/7/b"]


@pytest.mark.parametrize("bytes_", [b"caf\xe9", b"tab\tnewline\n", b" ", b"-", b".hidden", b"%s{}"])
def test_odd_names(name, bytes_):
    odd = name + os.fsdecode(bytes_)
    sharr.create(odd, 3)
    assert sharr.attach(odd).base.name == odd
    assert f"shm://{odd}" in [info.name for info in sharr.list()]
    sharr.delete(odd)
    assert os.fsencode(odd) not in os.listdir(b"/dev/shm")


def test_list_of_the_drop_in(name):
    """One follows upon another that has the same shape or dtype, or neither."""
    arrays = [
        (name + "a", np.float32, (0, 3)),
        (name + "b", np.float32, (2,)),
        (name + "c", np.int8, (2,)),
        (name + "d", np.dtype([("x", "f8"), ("y", "i4", 2)]), ()),
        (name + "é", np.dtype("V16"), ()),
        (name + os.fsdecode(b"\xff"), np.dtype("U3"), (1, 2, 3)),
    ]
    for each, dtype, shape in reversed(arrays):
        sharr.create(each, shape, dtype)
    found = [desc for desc in SharedArray.list() if desc.name.startswith(os.fsencode(name))]
    types = [np.float32, np.float32, np.int8, np.void, np.void, np.str_]
    assert found == [
        (os.fsencode(each), type_, shape) for (each, _, shape), type_ in zip(arrays, types)
    ]
    assert all(type(desc) is SharedArray.ArrayDesc for desc in found)
    assert pickle.loads(pickle.dumps(found)) == found
    assert repr(found[1]).startswith("ArrayDesc(name=b'")
    assert [desc.dims for desc in found] == [shape for _, _, shape in arrays]
    try:
        for switch in (gc.disable, gc.enable):
            switch()
            SharedArray.list()
            assert gc.isenabled() == (switch is gc.enable)
    finally:
        gc.enable()
    for each, _, _ in arrays:
        sharr.delete(each)


def test_list_of_the_drop_in_leaves_out_what_numpy_cannot_read(name):
    """A sub-array of 40 dimensions, which NumPy 2 can."""
    descr = [("x", "<f8", (1,) * 40)]
    text = f"{{'descr': {descr}, 'fortran_order': False, 'shape': (1,), }}".encode().ljust(501)
    for each in ("a", "c"):
        sharr.create(name + each, 3)
    with open(f"{SHM}/{name}b", "wb") as file:
        file.write(b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + bytes(8))
    found = [desc for desc in SharedArray.list() if desc.name.startswith(name.encode())]
    there = "abc" if np.lib.NumpyVersion(np.__version__) >= "2.0.0" else "ac"
    assert [desc.name for desc in found] == [(name + each).encode() for each in there]
    for each in "abc":
        os.unlink(f"{SHM}/{name}{each}")


@pytest.mark.parametrize(
    "wrong",
    ["", "shm://", "shm:///", ".", "..", "shm://..", "a/../b", "a//b", "a/", "shm:////a", "a/.",
     "http://a", "SHM://a", "://", "shm:/a", "file:/a", "a\0b", "file://a\0b", "file://",
     ".sharr-tmp-1", "shm://a/.sharr-tmp-1", "file:///tmp/.sharr-tmp-1", "x" * 256,
     "shm://" + "d/" * 2500 + "a"],
)  # fmt: skip
def test_wrong_names(wrong):
    before = sorted(os.listdir(SHM))
    for call in (lambda: sharr.create(wrong, 3), lambda: sharr.attach(wrong),
                 lambda: sharr.delete(wrong), lambda: sharr.info(wrong)):  # fmt: skip
        with pytest.raises(OSError) as error:
            call()
        assert error.value.errno in (errno.EINVAL, errno.ENAMETOOLONG, errno.ENOENT)
        assert error.value.filename == wrong
        assert isinstance(error.value, ValueError) == (error.value.errno == errno.EINVAL)
    assert sorted(os.listdir(SHM)) == before


@pytest.mark.parametrize("wrong", [None, 3, b"a", ["a"], 2.5])
def test_a_name_is_a_str_or_a_path(wrong):
    for call in (lambda: sharr.create(wrong, 3), lambda: sharr.attach(wrong),
                 lambda: sharr.delete(wrong), lambda: sharr.list(wrong)):  # fmt: skip
        with pytest.raises(TypeError):
            call()


# Shapes and dtypes


@pytest.mark.parametrize(
    "shape",
    [7, (7,), [7], np.array([7]), np.int64(7), (np.uint8(7),), range(7, 8), [np.int32(7)]],
    ids=repr,
)
def test_kinds_of_shapes(name, shape):
    assert sharr.create(name, shape, "i1").shape == (7,)


@pytest.mark.parametrize(
    "shape, error",
    [(-1, ValueError), ((2, -3), ValueError), (2**63, ValueError), ((2**62, 8), ValueError),
     ((2**32, 2**32), ValueError), ((0, 2**62, 2**62), ValueError), (2.0, TypeError),
     ("3", TypeError), ((2, None), TypeError), ((1,) * 65, ValueError), ([[1]], TypeError),
     (2**63 - 1, ValueError), ({}, TypeError)],
)  # fmt: skip
def test_wrong_shapes(name, shape, error):
    with pytest.raises(error):
        sharr.create(name, shape)
    assert not (SHM / name).exists()


@pytest.mark.parametrize(
    "dtype",
    ["O", object, [("a", "i4"), ("b", "O")],
     {"names": ["a", "b"], "formats": ["i4", "i4"], "offsets": [0, 2]},
     {"names": ["a", "b"], "formats": ["i4", "i4"], "offsets": [4, 0]}, "no such", 3.5],
)  # fmt: skip
def test_wrong_dtypes(name, dtype):
    with pytest.raises(TypeError):
        sharr.create(name, 3, dtype)
    assert not (SHM / name).exists()


def test_dtypes_that_numpy_changes(name):
    for number, dtype in enumerate(["S", "U", "(2,3)f4", float, int, bool, complex]):
        expected = np.zeros((4,), dtype)
        a = sharr.create(f"{name}-{number}", (4,), dtype)
        assert a.dtype == expected.dtype and a.shape == expected.shape


def test_wrong_order(name):
    with pytest.raises(ValueError, match="order"):
        sharr.create(name, 3, order="K")
    assert not (SHM / name).exists()


# What is no array


def npy(shape, dtype="f8"):
    header = repr({"descr": dtype, "fortran_order": False, "shape": shape}).encode()
    return b"\x93NUMPY\1\0" + len(header).to_bytes(2, "little") + header


HOSTILE = {
    "empty": b"",
    "text": b"hello\n" * 100,
    "magic only": b"\x93NUMPY",
    "header cut": npy((3,))[:-20],
    "header beyond the file": b"\x93NUMPY\2\0\xff\xff\xff\xff{",
    "unknown version": b"\x93NUMPY\7\0\x10\0" + b" " * 16,
    "object dtype": npy((3,), "|O") + b"\0" * 24,
    "negative": npy((-1,)) + b"\0" * 800,
    "overflow": npy((2**62, 2**62)) + b"\0" * 800,
    "zero and overflow": npy((0, 2**62, 2**62)),
    "too many dimensions": npy((1,) * 65) + b"\0" * 800,
    "expression": b"\x93NUMPY\1\0\x40\0" + b"__import__('os').system('touch /tmp/owned')".ljust(64),
    "deep": b"\x93NUMPY\2\0\x00\x00\x10\0" + b"[" * (1 << 20),
    "trailer": b"\0" * 600 + b"[SharedArray]\0\0\0" + b"\xff" * 532,
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE.keys())
def test_foreign_files(name, content):
    (SHM / name).write_bytes(content)
    for call in (sharr.attach, sharr.info, sharr.delete):
        with pytest.raises(sharr.FormatError) as error:
            call(name)
        assert error.value.errno == errno.EINVAL and error.value.filename == name
    with pytest.raises(FileExistsError):
        sharr.create(name, 3)
    assert f"shm://{name}" not in [info.name for info in sharr.list()]
    assert (SHM / name).read_bytes() == content
    assert not os.path.exists("/tmp/owned")


def test_truncated(name):
    sharr.create(name, 1000)
    os.truncate(SHM / name, 5000)
    with pytest.raises(sharr.FormatError, match="12096.*5000"):
        sharr.attach(name)


def test_special_files(name):
    """Refused without blocking, without following, and without a trace."""
    os.mkfifo(SHM / f"{name}-fifo")
    sharr.create(f"{name}-real", 3)
    os.symlink(SHM / f"{name}-real", SHM / f"{name}-link")
    os.symlink(SHM / f"{name}-no", SHM / f"{name}-dangling")
    os.mkdir(SHM / f"{name}-dir")
    os.symlink(SHM / f"{name}-dir", SHM / f"{name}-dirlink")
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(SHM / f"{name}-socket"))
    server.close()
    before = sorted(os.listdir(SHM))
    expected = {"fifo": errno.EINVAL, "link": errno.ELOOP, "dangling": errno.ELOOP,
                "dir": errno.EISDIR, "socket": errno.EINVAL}  # fmt: skip
    for kind, number in expected.items():
        for call in (sharr.attach, sharr.info, sharr.delete, lambda n: sharr.attach(n, "r")):
            with pytest.raises(OSError) as error:
                call(f"{name}-{kind}")
            assert error.value.errno == number, kind
        with pytest.raises(FileExistsError):
            sharr.create(f"{name}-{kind}", 3)
    for call in (lambda n: sharr.create(n, 3), sharr.attach, sharr.delete):
        with pytest.raises(OSError) as error:
            call(f"{name}-dirlink/a")
        assert error.value.errno == errno.ELOOP
    assert [info.name for info in sharr.list() if name in info.name] == [f"shm://{name}-real"]
    assert sorted(os.listdir(SHM)) == before and os.listdir(SHM / f"{name}-dir") == []


@needs_root
def test_another_user(name, public_build):
    """Under the file's permissions; what cannot be read is not listed."""
    for suffix, mode in (("open", 0o666), ("read", 0o644), ("none", 0o600)):
        sharr.create(f"{name}-{suffix}", 3)
        os.chmod(SHM / f"{name}-{suffix}", mode)
    code = """
        import sys, os, sharr
        stem = sys.argv[1]
        def outcome(f):
            try:
                f()
                return "ok"
            except PermissionError as error:
                return error.filename.removeprefix(stem)
        print([outcome(lambda: sharr.attach(stem + s, m)) for s, m in
               (("-open", "r+"), ("-read", "r+"), ("-read", "r"), ("-read", "c"), ("-none", "r"))])
        print([outcome(lambda: sharr.delete(stem + s)) for s in ("-open", "-none")])
        print([i.name.removeprefix("shm://" + stem) for i in sharr.list() if stem in i.name])
        sharr.create(stem + "-mine", 3)
        sharr.delete(stem + "-mine")
    """

    done = subprocess.run(
        as_nobody(PYTHON, "-c", textwrap.dedent(code), name),
        env={"PYTHONPATH": str(public_build / "python")}, capture_output=True, text=True, cwd="/",
    )  # fmt: skip
    assert done.stdout.splitlines() == [
        "['ok', '-read', 'ok', 'ok', '-none']", "['-open', '-none']", "['-open', '-read']",
    ], done.stderr  # fmt: skip


# delete, list, msync


def test_delete(name):
    with pytest.raises(FileNotFoundError) as error:
        sharr.delete(name)
    assert error.value.filename == name
    assert sharr.delete(name, missing_ok=True) is None
    (SHM / name).write_text("no array")
    with pytest.raises(sharr.FormatError):
        sharr.delete(name, missing_ok=True)
    assert (SHM / name).exists()


def test_list_is_whole_or_fails(name):
    for i in range(3):
        sharr.create(f"{name}/d/{i}", 1)
    found = python("""
        import errno, os, resource, sys, sharr
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
        sharr.list(sys.argv[1])  # what is imported for it, is
        os.utime("/dev/shm/" + sys.argv[1][6:] + "d")  # and what is remembered is not
        for free in range(8):
            files = []
            try:
                while True: files.append(os.open("/", os.O_PATH))
            except OSError: pass
            for file in files[:free]: os.close(file)
            try:
                print(len(sharr.list(sys.argv[1])))
            except OSError as error:
                assert error.errno == errno.EMFILE, error
                print("EMFILE")
            for file in files[free:]: os.close(file)
        """, f"shm://{name}/")  # fmt: skip
    # The namespace, the one in it, and one that is read, or read by.
    assert found.split() == ["EMFILE"] * 3 + ["3"] * 5


@needs_strace
@pytest.mark.parametrize("count", [100, 150])
def test_a_listing_has_threads_as_it_has_use_for(name, count):
    for i in range(count):
        sharr.create(f"{name}/{i}", 1)
    calls = traced("pass", "x = sharr.list(sys.argv[1])", f"shm://{name}")
    threads = min(-(-count // 100), len(os.sched_getaffinity(0)))
    assert sum(call.startswith("clone") for call in calls) == threads - 1


@pytest.mark.parametrize("huge", ["never", "", []])
def test_huge_is_a_bool(name, huge):
    with pytest.raises(TypeError, match="None, True or False"):
        sharr.create(name, 1, huge=huge)


def test_an_error_can_quote_anything(name):
    (SHM / name).write_bytes(npy((1,), "\ud800") + bytes(8))
    for call in (
        sharr.attach, sharr.info, sharr.delete, lambda name: sharr.put(name, 1, replace=True),
        lambda name: sharr.create(name, 1, exist_ok=True),
    ):  # fmt: skip
        with pytest.raises(sharr.FormatError, match="xed"):
            call(name)


@pytest.mark.parametrize("attached", [False, True])
def test_delete_of_a_name_that_ends_in_a_slash(name, tmp_path, attached):
    held = sharr.create(name, 1) if attached else None
    np.save(tmp_path / "a.npy", np.zeros(3))
    for end in ("/", "/.", "/.."):
        sharr.delete(f"{tmp_path}/missing{end}", missing_ok=True)
        for path, error in (
            ("/missing", FileNotFoundError), ("/a.npy", NotADirectoryError), ("", IsADirectoryError),
        ):  # fmt: skip
            with pytest.raises(error) as caught:
                sharr.delete(f"{tmp_path}{path}{end}")
            assert caught.value.filename == f"{tmp_path}{path}{end}"
    assert held is None or held.shape == (1,)


def test_list_of_a_directory(tmp_path):
    np.save(tmp_path / "b.npy", np.zeros((2, 3), "i4"))
    (tmp_path / "sub").mkdir()
    np.save(tmp_path / "sub" / "a.npy", np.zeros(4, order="F"))
    (tmp_path / "text.npy").write_text("no")
    os.mkfifo(tmp_path / "fifo")
    os.symlink(tmp_path / "b.npy", tmp_path / "link.npy")
    expected = [f"file://{tmp_path}/b.npy", f"file://{tmp_path}/sub/a.npy"]
    for where in (f"file://{tmp_path}", f"file://{tmp_path}/", tmp_path, str(tmp_path)):
        infos = sharr.list(where)
        assert [info.name for info in infos] == expected
    assert (infos[0].dtype, infos[0].shape, infos[0].order, infos[0].nbytes) == (
        np.dtype("i4"), (2, 3), "C", 24,
    )  # fmt: skip
    with pytest.raises(FileNotFoundError):
        sharr.list(tmp_path / "no")
    with pytest.raises(NotADirectoryError):
        sharr.list(tmp_path / "b.npy")
    with pytest.raises(FileNotFoundError):
        sharr.list("shm://no-such-namespace/")


def test_sync_and_lock(tmp_path, name):
    a = sharr.create(tmp_path / "a.npy", (64, 64))
    a[:] = 3
    sharr.msync(a)
    sharr.msync(a[3:, ::2].T, sharr.MS_ASYNC)
    sharr.mlock(a)
    sharr.munlock(a[1:])
    with pytest.raises(OSError) as error:
        sharr.msync(a, sharr.MS_SYNC | sharr.MS_ASYNC)
    assert error.value.errno == errno.EINVAL
    for other in (np.zeros(3), a.copy(), a + 1, [1], None):
        for call in (sharr.msync, sharr.mlock, sharr.munlock):
            with pytest.raises(TypeError):
                call(other)


def test_base(name):
    a = sharr.create(name, 1000)
    assert a.base.name == name and a.base.size == 8000 and a.base.addr == a.ctypes.data
    view = a[5:]
    del a
    view[:] = 1  # the view keeps the mapping
    assert view.sum() == 995


# Promises


@needs_root
def test_a_full_shm_is_an_error(name):
    done = in_small_shm(
        "16m",
        """
        import errno, os, sharr
        try:
            sharr.create("big", 17 << 20, "u1")
        except OSError as error:
            assert error.errno == errno.ENOSPC and error.filename == "big"
            text = str(error)
            assert "17.0 MiB needed" in text and "16.0 MiB free" in text and "remount" in text, text
        else:
            raise AssertionError("created")
        assert os.listdir("/dev/shm") == []
        kept = []
        try:
            for i in range(1000):
                kept.append(sharr.create(f"n/{i}", 100_000, "u1"))
        except OSError as error:
            assert error.errno == errno.ENOSPC
        assert len(os.listdir("/dev/shm/n")) == len(kept) > 100
        for a in kept:
            a[:] = 1  # every page is there
        for i in range(len(kept)):
            sharr.delete(f"n/{i}")
        kept.clear(); del a
        sharr.create("again", 15 << 20, "u1")[:] = 1
        for n in ("0", "sparse"):
            try:
                sharr.create(n, 1 << 30, "u1", reserve=n != "sparse")
            except OSError as error:
                assert n == "0" and error.errno == errno.ENOSPC
        try:
            while True:
                sharr.create(f"fill{len(os.listdir('/dev/shm'))}", 0, reserve=False)
        except OSError as error:
            assert error.errno == errno.ENOSPC
        print("done")
        """,
    )
    assert done.stdout == "done\n", (done.returncode, done.stderr)


@needs_root
def test_the_same_with_shared_memory():
    """What the README says of the standard library: it dies where sharr has an error."""
    done = in_small_shm(
        "16m",
        """
        from multiprocessing import shared_memory
        x = shared_memory.SharedMemory("x", True, 64 << 20)
        print("made", flush=True)
        x.buf[:] = bytes(64 << 20)
        """,
    )
    assert done.stdout == "made\n" and done.returncode == -signal.SIGBUS


@needs_root
def test_full_inodes_and_what_a_failed_create_leaves():
    done = in_small_shm(
        "16m,nr_inodes=6",
        """
        import errno, os, sharr
        for wrong in ("new/" + "x" * 300, "a/b/c/d/e/f/g/h"):
            try:
                sharr.create(wrong, 3)
            except OSError as error:
                assert error.errno in (errno.ENAMETOOLONG, errno.ENOSPC), error
                assert error.errno != errno.ENOSPC or "nr_inodes" in str(error)
            assert os.listdir("/dev/shm") == [], os.listdir("/dev/shm")
        try:
            for i in range(10):
                sharr.create(f"{i}", 3)
        except OSError as error:
            assert error.errno == errno.ENOSPC and "nr_inodes" in str(error), error
        print("done")
        """,
    )
    assert done.stdout == "done\n", (done.returncode, done.stderr)


def test_a_namespace_that_somebody_removes(name):
    remover = subprocess.Popen(
        [PYTHON, "-c", "import os, sys\nwhile True:\n try: os.rmdir(sys.argv[1])\n"
         " except OSError: pass", SHM / name],
    )  # fmt: skip
    try:
        for i in range(2000):
            sharr.create(f"{name}/a", 3, exist_ok=bool(i % 2))
            sharr.delete(f"{name}/a")
    finally:
        remover.kill()
        remover.wait()


def test_one_winner(name):
    code = """
        import sys, sharr
        won = []
        for i in range(200):
            try:
                a = sharr.create(f"{sys.argv[1]}-{i}", 1000, "i8")
                assert not a.any()
                a[:] = int(sys.argv[2])
                won.append(i)
            except FileExistsError:
                # It is there whole, or somebody has deleted it
                assert sharr.attach(f"{sys.argv[1]}-{i}").shape == (1000,)
        print(won)
    """

    racers = [
        subprocess.Popen([PYTHON, "-c", textwrap.dedent(code), name, str(i)], stdout=-1, text=True)
        for i in range(4)
    ]
    won = [ast.literal_eval(racer.communicate()[0]) for racer in racers]
    assert [racer.returncode for racer in racers] == [0] * 4
    assert sorted(sum(won, [])) == list(range(200))
    for number, wins in enumerate(won):
        for i in wins:
            assert (sharr.attach(f"{name}-{i}") == number).all()


def test_killed_creators_leave_nothing_half(name):
    code = """
        import sys, sharr
        i = 0
        while True:
            sharr.create(f"shm://{sys.argv[1]}/{i % 50}", (1 + i % 3) * 200_000, "u1", exist_ok=False)
            sharr.delete(f"shm://{sys.argv[1]}/{i % 50}") if i % 2 else sharr.delete(
                f"shm://{sys.argv[1]}/{i % 50}", missing_ok=True)
            i += 1
            if i == 1:
                print(flush=True)  # the namespace is there
    """

    generator = random.Random(1)
    for _ in range(40):
        child = subprocess.Popen([PYTHON, "-c", textwrap.dedent(code), name], stdout=-1)
        child.stdout.readline()
        threading.Event().wait(generator.random() * 0.02)
        child.kill()
        child.wait()
        child.stdout.close()
        for entry in os.listdir(SHM / name):
            a = sharr.attach(f"shm://{name}/{entry}")  # whole, or this raises
            assert a.nbytes % 200_000 == 0 and not a.any()
            sharr.delete(f"shm://{name}/{entry}")
        assert left_behind() == [name]


def test_ctrl_c_in_a_large_create(name):
    free = os.statvfs(SHM).f_bavail * os.statvfs(SHM).f_frsize
    size = min(4 << 30, free // 2)
    child = subprocess.Popen(
        [PYTHON, "-c", "import sharr, sys; print(flush=True); "
         "sharr.create(sys.argv[1], int(sys.argv[2]), 'u1'); print('created', flush=True); "
         "import time; time.sleep(60)", name, str(size)],
        stdout=-1, stderr=-1, text=True,
    )  # fmt: skip
    child.stdout.readline()
    child.send_signal(signal.SIGINT)
    out, err = child.communicate()
    assert "KeyboardInterrupt" in err and child.returncode != 0
    assert out == "" and not (SHM / name).exists()


def test_the_gil_is_released(name):
    """Another thread runs while create waits for the kernel; it is given no other chance."""
    count, stop = [0], threading.Event()

    def counter():
        while not stop.is_set():
            count[0] += 1
            time.sleep(0)  # gives the GIL back

    interval = sys.getswitchinterval()
    thread = threading.Thread(target=counter)
    thread.start()
    try:
        wait_until(lambda: count[0] > 0, "the thread")
        sys.setswitchinterval(1000)
        before = count[0]
        sharr.create(name, 300 << 20, "u1")
        after = count[0]
    finally:
        sys.setswitchinterval(interval)
        stop.set()
    thread.join()
    assert after > before


def test_daemon_threads_end_with_the_interpreter(name):
    sharr.create(name, 3)
    for _ in range(3):
        done = python("""
            import sharr, sys, threading, time
            def work():
                started.release()
                while True:
                    sharr.attach(sys.argv[1])
                    sharr.list("shm://")
            started = threading.Semaphore(0)
            for _ in range(3):
                threading.Thread(target=work, daemon=True).start()
                started.acquire()
            """, name, check=False)  # fmt: skip
        assert done.returncode == 0 and done.stderr == ""


@pytest.mark.parametrize("work, times", [
    # which listens to signals
    ("sharr.delete(sharr.create(f'{name}-{i}', 70 << 20, 'u1', exist_ok=True).name)", 5),
    # whose dtype is made by Python code, and most threads are in its midst
    ("sys.setswitchinterval(1e-6); sharr.attach(name)", 15),
])  # fmt: skip
def test_daemon_threads_in_python_end_with_the_interpreter(name, work, times):
    sharr.create(name, 3, [("a", "f4"), ("b", "i2", (2,))])
    for _ in range(times):
        done = python(f"""
            import sharr, sys, threading, time
            name = sys.argv[1]
            def work(i):
                while True:
                    {work}
            for i in range(4):
                threading.Thread(target=work, args=(i,), daemon=True).start()
            time.sleep(0.1)
            """, name, check=False)  # fmt: skip
        assert done.returncode == 0 and done.stderr == ""


def test_threads_do_not_wait_for_what_python_makes(name):
    """Where the compiled part has Python make what it keeps for good, a thread that needs the same
    waits for it with the GIL."""
    called = python("""
        import sharr, sys
        a = sharr.create(sys.argv[1], 10)
        called = []
        sys.setprofile(lambda frame, event, _: called.append(frame.f_code) if event == "call" else None)
        a[1:5]
        a + 1
        sharr._core.create(sys.argv[1] + "-1", (10,), "f8", "C", True, False, None, None)
        sys.setprofile(None)
        sharr.delete(sys.argv[1] + "-1")
        print(called)
        """, name)  # fmt: skip
    assert called == "[]\n"


def test_code_in_python_comes_before_the_array(name):
    """In it signals are heard, whose exceptions say that there is none."""
    there = python("""
        import os, sharr, sys
        there = []
        def look(frame, event, _):
            if event == "call":
                there.append(os.path.exists("/dev/shm/" + sys.argv[1]))
        sys.setprofile(look)
        sharr._core.create(sys.argv[1], 1, [("a", "f4"), ("b", "i2")], "C", True, False, None, None)
        sys.setprofile(None)
        print(len(there) > 0, any(there))
        """, name)  # fmt: skip
    assert there == "True False\n"


def test_a_relative_path_in_a_directory_that_is_gone(tmp_path):
    gone = tmp_path / "gone"
    gone.mkdir()
    done = python("""
        import os, sharr, sys
        os.chdir(sys.argv[1])
        os.rmdir(sys.argv[1])
        print(sharr.create("file://../a.npy", 3).name)
        """, gone)  # fmt: skip
    assert done == "file://../a.npy\n"


def test_attach_all_takes_the_mapping_that_is_there(name):
    sharr.put_all(f"{name}/", {"x": np.zeros(10)})
    x = sharr.attach(f"{name}/x")
    assert sharr.attach_all(f"{name}/")["x"].base.addr == x.base.addr == sharr.attach(f"{name}/x").base.addr


@pytest.mark.parametrize("mode", ["r", "r+"])
@pytest.mark.parametrize("how", ["write", "store"])
def test_wait_for_a_file_that_stays_open(name, mode, how):
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f8", "fortran_order": False, "shape": (1000,)})
    path = f"/dev/shm/{name}"
    with open(path, "w+b", buffering=0) as file:
        file.write(header.getvalue())
        if how == "store":
            file.seek(0)
            file.write(b"\0")
            file.truncate(len(header.getvalue()) + 8000)
            view = mmap.mmap(file.fileno(), 0)
            view[1] = view[1]
        waiting = subprocess.Popen([PYTHON, "-c", textwrap.dedent("""
            import sharr, sys
            print("waits", flush=True)
            print(sharr.wait(sys.argv[1], 30, mode=sys.argv[2]).shape)
            """), name, mode], stdout=subprocess.PIPE, text=True)  # fmt: skip
        assert waiting.stdout.readline() == "waits\n"
        time.sleep(0.2)
        if how == "store":
            view[0] = header.getvalue()[0]
        else:
            file.write(bytes(8000))
        assert waiting.communicate()[0] == "(1000,)\n"


@needs_root
def test_more_than_the_machine_has_where_nothing_else_is_a_limit():
    done = in_small_shm("0", """
        import resource, sharr
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 30, 1 << 30))  # a test that fails fills no memory
        try:
            sharr.create("x", 1 << 40, "u1")
        except OSError as error:
            print(error.errno, sharr.list())
        """)  # fmt: skip
    assert done.stdout == f"{errno.ENOSPC} []\n", done.stderr


def test_a_listing_keeps_no_dtypes_of_any_size(name):
    """One file of many fields, linked often, costs whoever makes it next to nothing."""
    header = {"descr": [(f"f{i}", "|u1") for i in range(40_000)], "fortran_order": False, "shape": (0,)}
    space = SHM / name
    space.mkdir()
    with open(space / "0", "wb") as file:
        np.lib.format.write_array_header_2_0(file, header)
    for i in range(1, 100):
        os.link(space / "0", space / str(i))
    grown = python("""
        import ctypes, sharr, sys
        def memory():
            ctypes.CDLL(None).malloc_trim(0)
            with open("/proc/self/statm") as file:
                return int(file.read().split()[1]) * 4096
        before = memory()
        assert len(sharr.list(sys.argv[1])) == 100
        print((memory() - before) / 1e6)
        """, f"shm://{name}/")  # fmt: skip
    assert float(grown) < 60  # of 160


@needs_strace
@pytest.mark.parametrize("mode", ["r", "r+", "c"])
def test_system_calls_of_attach(name, mode):
    sharr.create(name, 1000)
    sharr.create(name + "-other", 1000)
    time.sleep(0.1)  # what was changed just now might change again unnoticed
    attach = f"sharr._core.attach(sys.argv[1], {mode!r}, None)"
    calls = traced(attach.replace("]", "] + '-other'"), f"x = {attach}", name)
    assert calls == ["openat", "statx", "pread64", "mmap", "close"]
    calls = traced(f"w = {attach}; del w", f"x = {attach}", name)
    assert calls == ["openat", "statx", "mmap", "close"]
    if mode != "c":
        held = f"w = {attach}\n"
        calls = traced(held, f"x = {attach}", name)
        assert calls == ["openat", "statx", "geteuid", "getegid", "close"]
        # What is not as it was then has to be opened.
        again = traced(held + held, f"x = {attach}", name)
        assert again == ["statx", "geteuid", "getegid"]
        private = attach.replace(repr(mode), "'c'")
        assert traced(held + held, f"x = {private}", name) == ["openat", "statx", "mmap", "close"]
        sharr.create(f"{name}-in/x", 1000)
        time.sleep(0.1)
        assert traced(held + held, f"x = {attach}", f"{name}-in/x")[-1] == "close"


@needs_strace
def test_what_takes_much_memory_is_not_remembered(name):
    sharr.create(name, 1, [(f"field{i}", "f8") for i in range(100)])
    time.sleep(0.1)
    attach = "sharr._core.attach(sys.argv[1], 'r', None)"
    calls = traced(f"w = {attach}; del w", f"x = {attach}", name)
    assert "pread64" in calls, calls


@needs_strace
def test_system_calls_of_delete(name):
    sharr.create(name, 1000)
    sharr.create(name + "-other", 1000)
    delete = "sharr._core.remove(sys.argv[1])"
    attach = "w = sharr._core.attach(sys.argv[1], 'r', None)"
    assert traced(attach, delete, name) == ["statx", "unlinkat"]
    calls = traced("pass", delete, name + "-other")
    assert calls == ["openat", "statx", "pread64", "close", "unlinkat"]


# Before Linux 6.10 an ordinary user's link takes a second call.
PUBLISHED = ["linkat", "close"], ["linkat", "linkat", "close"]


@needs_strace
def test_system_calls_of_create(name):
    create = "sharr._core.create(sys.argv[1] + {!r}, ({},), t, 'C', True, False, None, None)"
    warm = f"t = numpy.dtype(float)\nw = {create.format('-1', 1000)}"
    calls = traced(warm, f"x = {create.format('-2', 1000)}", name)
    assert calls[:4] == ["openat", "pwritev", "statx", "mmap"] and calls[4:] in PUBLISHED
    calls = traced(warm, f"x = {create.format('-3', 100_000)}", name + "-large")
    assert calls[:5] == ["openat", "fallocate", "statx", "mmap", "pwrite64"]
    assert calls[5:] in PUBLISHED


@needs_strace
def test_on_disk_space_is_reserved_for_what_is_small(tmp_path):
    if subprocess.check_output(["stat", "-f", "-c", "%T", tmp_path], text=True) == "tmpfs\n":
        pytest.skip("the temporary directory is no disk")
    warm = "t = numpy.ones(9)\nw = sharr.put(sys.argv[1] + '-1', t, replace=True)"
    for make in ("sharr.put(sys.argv[1], t)", "sharr.create(sys.argv[1] + '-2', 9)"):
        calls = traced(warm, f"x = {make}", f"file://{tmp_path}/a")
        assert "fallocate" in calls and "pwritev" not in calls, calls


@needs_strace
@pytest.mark.parametrize("nbytes", [1000, 3_000_000])
def test_system_calls_of_put(name, nbytes):
    warm = f"t = numpy.ones({nbytes}, 'u1')\nw = sharr.put(sys.argv[1] + '-1', t)"
    calls = traced(warm, "x = sharr.put(sys.argv[1] + '-2', t)", name)
    assert calls[:5] == ["newfstatat", "openat", "pwritev", "statx", "mmap"]
    assert calls[5:] in PUBLISHED


def test_doctest():
    import doctest

    done = doctest.testmod(sharr, extraglobs={"sharr": sharr})
    assert done.attempted > 12 and done.failed == 0
    os.rmdir(SHM / "doc")


def test_stubs(tmp_path):
    pytest.importorskip("mypy")
    (tmp_path / "sample.py").write_text(
        "import sharr, SharedArray\n"
        "import numpy as np\n"
        "a = sharr.create('shm://a', (3, 4), np.float32, order='F', exist_ok=True)\n"
        "b = sharr.attach('a', 'r')\n"
        "n: int = a.nbytes + b.nbytes\n"
        "for info in sharr.list():\n"
        "    name: str = info.name\n"
        "    shape: tuple[int, ...] = info.shape\n"
        "sharr.delete('a', missing_ok=True)\n"
        "with sharr.build('b', 3, replace=True) as filled:\n"
        "    filled[:] = 1\n"
        "    where: str | None = filled.name\n"
        "p: sharr.Array = sharr.put('p', [[1, 2], [3, 4]], replace=True)\n"
        "p.flush()\n"
        "p += 1\n"
        "p @= [[0, 1], [1, 0]]\n"
        "w = sharr.wait('p', 1.5, 'r') + p\n"
        "total: int = sum(x.nbytes for x in sharr.put_all('ns', {'x': p, 'y': [1]}).values())\n"
        "names: list[str] = [*sharr.attach_all('ns', 'c')]\n"
        "sharr.delete_all('ns')\n"
        "sharr.rename('p', 'q', replace=True)\n"
        "sharr.msync(a, sharr.MS_SYNC)\n"
        "try:\n"
        "    view: object = a[1:]\n"
        "except sharr.UnpicklingError as error:\n"
        "    number: int = error.errno\n"
        "if isinstance(view, sharr.Array):\n"
        "    print(view.name, view.mode, view.filename, view.offset)\n"
        "c = SharedArray.create('shm://c', 3)\n"
        "d = SharedArray.attach('shm://c', ro=True)\n"
        "for desc in SharedArray.list():\n"
        "    raw: bytes = desc.name\n"
        "    same: tuple[int, ...] = desc[2] + desc.dims\n"
    )
    done = subprocess.run(
        [PYTHON, "-m", "mypy", "--strict", "--cache-dir", str(tmp_path / "cache"), "sample.py"],
        cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, "MYPYPATH": os.environ["PYTHONPATH"]},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    (tmp_path / "wrong.py").write_text("import sharr\nsharr.attach('a', 'w')\nsharr.create(3, 3)\n")
    done = subprocess.run(
        [PYTHON, "-m", "mypy", "--strict", "--cache-dir", str(tmp_path / "cache"), "wrong.py"],
        cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, "MYPYPATH": os.environ["PYTHONPATH"]},
    )  # fmt: skip
    assert done.stdout.count("error:") == 2, done.stdout
