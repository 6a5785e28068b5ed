"""sharr.Array: as numpy.memmap is, and by reference wherever it is pickled."""

import contextlib
import contextvars
import copy
import errno
import inspect
import itertools
import multiprocessing
import os
import pathlib
import pickle
import pickletools
import signal
import struct
import subprocess
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import sharr
from conftest import (
    IS_ROOT, NOBODY, PYTHON, SHM, as_nobody, in_small_shm, left_behind, needs_root, python, wait_until,
)  # fmt: skip

PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)


@contextlib.contextmanager
def meanwhile(step):
    """Calls step(1), step(2), ... in another thread while the block runs, and raises what it does."""
    stop = threading.Event()

    def steps():
        for number in itertools.count(1):
            if stop.is_set():
                return
            step(number)

    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(steps)
        try:
            yield done
        finally:
            stop.set()
    done.result()


@pytest.fixture(params=["memmap", "Array"])
def mapped(request, name, tmp_path):
    """NumPy's class and ours, on the same twelve numbers."""
    data = np.arange(12, dtype="f4").reshape(3, 4)
    if request.param == "memmap":
        a = np.memmap(tmp_path / "a", "f4", "w+", shape=(3, 4))
    else:
        a = sharr.create(name, (3, 4), "f4")
    a[:] = data
    return a


def kind(result, like):
    return "shared" if type(result) is type(like) else type(result)


def test_the_type_of_results_is_that_of_memmap(mapped):
    a = mapped
    for view in (a[1:], a[:, ::-1], a.T, a.reshape(4, 3), a.ravel(), a[None], a.view("i4"), a[...],
                 np.swapaxes(a, 0, 1), np.atleast_3d(a), a.squeeze(), np.split(a, 3)[0]):  # fmt: skip
        assert type(view) is type(a) and np.shares_memory(view, a)
    for plain in (a + 1, a + a, -a, a.sum(0), np.exp(a), a[[0, 2]], a[a > 3], a @ a.T, a * 1j,
                  np.concatenate([a, a]), np.where(a > 1, a, 0), np.array(a), a.mean(axis=1)):  # fmt: skip
        assert type(plain) is np.ndarray and not np.shares_memory(plain, a)
    for scalar in (a.sum(), a[1, 2], a.mean(), np.add.reduce(a, axis=None), a.max(), a.std()):
        assert isinstance(scalar, np.generic)
    out = np.add(a, 1, out=a)
    assert out is a and a[0, 0] == 1
    a += 1
    assert type(a) is type(mapped) and a[0, 0] == 2
    b = a[:1]
    assert np.multiply(a[1:2], 2, out=b) is b


def test_writeable_can_be_taken_and_given_back_as_with_memmap(mapped):
    a = mapped
    a.flags.writeable = True
    a.flags.writeable = False
    with pytest.raises(ValueError):
        a[0] = 1
    view = a[1:]
    a.flags.writeable = True
    view.setflags(write=True)
    view[0] = a[0] = 1


def test_what_is_mapped_to_read_cannot_be_made_writeable(name):
    sharr.create(name, 3)
    a = sharr.attach(name, "r")
    for each in (a, a[:], np.asarray(a), np.frombuffer(a.base), pickle.loads(pickle.dumps(a))):
        with pytest.raises(ValueError):
            each.flags.writeable = True
    private = sharr.attach(name, "c")
    private.flags.writeable = False
    private.flags.writeable = True
    private[0] = 1
    assert a[0] == 0


def test_subclasses_stay_as_with_memmap(mapped):
    class Sub(type(mapped)):
        pass

    a = mapped.view(Sub)
    for result in (a.sum(axis=0), a.sum(), a[1:, :-1], a[[0, 1]], a + 1):
        assert type(result) is Sub


try:
    from numpy._core.tests import test_memmap as numpys
except ImportError:  # NumPy 1
    from numpy.core.tests import test_memmap as numpys

# What is of raw files: without a header there is a length, but no shape, and data can be anywhere.
# File names that are Path objects (ours are str), and files without a name.
LEFT_OUT = ("test_attributes", "test_empty_array", "test_no_shape", "test_filename", "test_path", "test_unnamed_file",
            "test_mmap_offset_greater_than_allocation_granularity")  # fmt: skip


def opened(cls, file, dtype=np.uint8, mode="r+", offset=0, shape=None, order="C"):
    """Array(...), as numpy.memmap(...) has it."""
    path = file
    if hasattr(file, "fileno"):
        path = os.readlink(f"/proc/self/fd/{file.fileno()}").removesuffix(" (deleted)")
    path = pathlib.Path(os.path.abspath(path))
    if mode == "w+" or (shape is not None and not path.exists()) or path.stat().st_size == 0:
        path.unlink(missing_ok=True)
        a = sharr.create(path, shape, dtype, order=order)
    else:
        a = sharr.attach(path, mode)
    return a if cls is sharr.Array else a.view(cls)


@pytest.mark.parametrize("test", [one for one in dir(numpys.TestMemmap)
                                  if one.startswith("test_") and one not in LEFT_OUT])  # fmt: skip
def test_numpys_own_for_memmap(test, monkeypatch, tmp_path):
    monkeypatch.setattr(sharr.Array, "__new__", staticmethod(opened))
    monkeypatch.setattr(numpys, "memmap", sharr.Array)
    case = numpys.TestMemmap()
    case.setup_method()
    try:
        method = getattr(case, test)
        method(*[tmp_path] * ("tmp_path" in inspect.signature(method).parameters))
    finally:
        case.teardown_method()


def test_results_on_other_memory_are_plain(name):
    a = sharr.put(name, np.arange(12.0).reshape(3, 4))
    for plain in (a.copy(), a.astype("i4"), a.flatten(), a.T.ravel(), a.T.reshape(-1), np.sort(a),
                  a.take([1, 2]), a.repeat(2), a.argsort(), a.argmax(0), a.argmin(1), a.dot(a.T), a.round(1), np.copy(a), a.conj().copy(),
                  copy.copy(a), copy.deepcopy(a), np.cumsum(a), a.cumsum(), a.clip(0, 1),
                  np.linalg.svd(a)[0], np.roll(a, 1), a.dot(a.T), np.einsum("ij->i", a)):  # fmt: skip
        assert type(plain) is np.ndarray and not np.shares_memory(plain, a)
    assert type(a.astype("f8", copy=False)) is sharr.Array
    # What is of the class by NumPy's doing has no name, and is pickled as any array.
    like = np.zeros_like(a)
    assert like.name is None and like.mode is None and type(like + 1) is np.ndarray
    assert "name" not in repr(like)
    like.flush()
    assert type(pickle.loads(pickle.dumps(like))) is np.ndarray


def test_attributes(name, tmp_path, monkeypatch):
    a = sharr.create(name, (2, 3))
    assert (a.name, a.mode, a[1:].T.name) == (f"shm://{name}", "r+", f"shm://{name}")
    assert sharr.attach(name, "r").mode == "r" and sharr.attach(name, "c").mode == "c"
    assert repr(a[0]) == f"Array([0., 0., 0.], name='shm://{name}')"
    assert str(a[0]) == "[0. 0. 0.]"
    # A name that is good in every directory.
    monkeypatch.chdir(tmp_path)
    b = sharr.put("file://b.npy", [1])
    monkeypatch.chdir("/")
    assert b.name == f"file://{tmp_path}/b.npy"
    b[0] = 5
    b.flush()
    assert pickle.loads(pickle.dumps(b)) == [5]
    with pytest.raises(TypeError, match="sharr.create"):
        sharr.Array((3, 4))
    with pytest.raises(AttributeError):
        a.name = "b"


def test_the_memory_stays_while_a_view_does(name):
    a = sharr.create(name, 1 << 20)
    view = a.reshape(1024, -1)[5:, ::2].T
    a[:] = 3
    sharr.delete(name)
    del a
    assert view.sum() == 3 * view.size


VIEWS = {
    "all": lambda a: a,
    "slice": lambda a: a[1:3],
    "steps": lambda a: a[::2, ::3],
    "negative": lambda a: a[::-1, ::-2],
    "transposed": lambda a: a.T,
    "reshaped": lambda a: a.reshape(2, 2, -1, order="A"),
    "dtype": lambda a: a.view("u8"),
    "row": lambda a: a[2],
    "element": lambda a: a[1:2, 1].reshape(()),
    "nothing": lambda a: a[3:3],
    "new axis": lambda a: a[:, None],
    "broadcast": lambda a: np.broadcast_to(a[:1], (5, 6), subok=True),
    "window": lambda a: np.lib.stride_tricks.sliding_window_view(a, (2, 2), subok=True),
}


@pytest.mark.parametrize("order", "CF")
@pytest.mark.parametrize("view", VIEWS)
def test_pickled_by_reference(name, view, order):
    a = sharr.create(name, (4, 6), "f8", order=order)
    a[:] = np.arange(24).reshape(4, 6)
    v = VIEWS[view](a)
    for protocol in PROTOCOLS:
        buffers = []
        keywords = {"buffer_callback": buffers.append} if protocol == 5 else {}
        data = pickle.dumps(v, protocol, **keywords)
        assert len(data) < 400 and not buffers
        w = pickle.loads(data)
        assert type(w) is sharr.Array and w.name == a.name and w.mode == "r+"
        assert (w.shape, w.strides, w.dtype) == (v.shape, v.strides, v.dtype)
        assert w.tolist() == v.tolist() and w.flags.writeable == v.flags.writeable
    if w.size and w.flags.writeable:
        w[...] = 5
        assert v.tolist() == w.tolist()


@pytest.mark.parametrize(
    "dtype",
    ["f2", ">i4", "M8[ns]", "U3", "S5", "V7", "c16", "?", "g",
     [("a", "f4"), ("b", ">i2", (3,))],
     {"names": ["x", "y"], "formats": ["u1", "f8"], "offsets": [3, 8], "itemsize": 24}],
)  # fmt: skip
def test_every_dtype_by_reference(name, dtype):
    a = sharr.create(name, 5, dtype)
    b = pickle.loads(pickle.dumps(a[1:]))
    assert b.dtype == a.dtype and b.shape == (4,)
    if a.dtype.names:
        field = a[a.dtype.names[1]]
        other = pickle.loads(pickle.dumps(field))
        other[2] = 7
        assert field.tolist() == other.tolist() and other.strides == field.strides


def test_the_size_of_a_pickle_does_not_grow(name):
    sizes = {len(pickle.dumps(sharr.create(f"{name}-{n}", n))) for n in (1, 1000, 1 << 20)}
    assert max(sizes) < 300 and max(sizes) - min(sizes) < 16
    a = sharr.create(f"{name}-wide", 9, [(f"column_{i}", "f8") for i in range(300)])
    for view in (a, a[2:], a["column_7"], a[::-1]["column_299"]):
        data = pickle.dumps(view)
        assert len(data) < 350
        other = pickle.loads(data)
        assert other.dtype == view.dtype and other.strides == view.strides
        other[1] = 5
        assert view.tolist() == other.tolist()


def test_a_record_overwritten_by_another_of_its_size(name):
    a = sharr.create(name, 9, [("x", "f8"), ("y", "i8")])
    data = pickle.dumps(a), pickle.dumps(a["x"])
    other = np.zeros(9, [("x", "i8"), ("y", "f8")])
    with open(SHM / name, "r+b") as file:  # the same object
        header = file.read(4096)
        for was, now in ((b"<f8", b"?"), (b"<i8", b"<f8"), (b"?", b"<i8")):
            header = header.replace(was, now)
        file.seek(0)
        file.write(header)
    assert sharr.attach(name).dtype == other.dtype
    for one in data:
        with pytest.raises(sharr.UnpicklingError, match="overwritten since"):
            pickle.loads(one)


def test_modes_by_reference(name):
    a = sharr.put(name, [1, 2, 3])
    r = pickle.loads(pickle.dumps(sharr.attach(name, "r")))
    assert r.mode == "r" and not r.flags.writeable
    with pytest.raises(ValueError):
        r.flags.writeable = True
    c = sharr.attach(name, "c")
    c[0] = 9
    value = pickle.loads(pickle.dumps(c))
    assert type(value) is np.ndarray and value.tolist() == [9, 2, 3] and a[0] == 1
    # A copy is independent, whatever it is of.
    for one in (copy.copy, copy.deepcopy):
        for array in (a, r, a[::2]):
            other = one(array)
            assert type(other) is np.ndarray and other.flags.writeable and other.flags.owndata
    assert copy.deepcopy({"a": a})["a"].tolist() == [1, 2, 3]


def test_a_pickle_outlives_its_array(name):
    sharr.put(name, [1.0, 2.0])
    data = pickle.dumps(sharr.attach(name)[1:])
    assert pickle.loads(data) == [2.0]
    sharr.delete(name)
    with pytest.raises(sharr.UnpicklingError, match="deleted") as error:
        pickle.loads(data)
    assert (error.value.errno, error.value.filename) == (errno.ENOENT, f"shm://{name}")
    again = pickle.loads(pickle.dumps(error.value))
    assert str(again) == str(error.value) and again.errno == errno.ENOENT
    sharr.put(name, [1.0, 2.0])  # the same in all but identity
    with pytest.raises(sharr.UnpicklingError, match="replaced") as error:
        pickle.loads(data)
    assert error.value.errno == errno.ESTALE
    sharr.delete(name)
    for make in (lambda path: path.write_text("no array"), lambda path: path.mkdir(),
                 lambda path: path.symlink_to("x")):  # fmt: skip
        make(SHM / name)
        with pytest.raises(sharr.UnpicklingError, match="replaced") as error:
            pickle.loads(data)
        assert error.value.errno == errno.ESTALE
        (SHM / name).rmdir() if (SHM / name).is_dir() else (SHM / name).unlink()


def test_renamed_or_replaced_in_a_file_system_that_uses_inodes_again(tmp_path):
    data = pickle.dumps(sharr.put(tmp_path / "a.npy", [1]))
    for _ in range(20):
        sharr.delete(tmp_path / "a.npy")
        sharr.put(tmp_path / "a.npy", [1])
        with pytest.raises(sharr.UnpicklingError, match="replaced"):
            pickle.loads(data)


def test_forged_pickles(name):
    a = sharr.create(name, (4, 6), "f8")
    _, arguments = a.__reduce_ex__(4)
    load = a.__reduce_ex__(4)[0]

    def forged(**changed):
        names = ["cls", "name", "identity", "mode", "dtype", "shape", "strides", "offset", "w"]
        return load(*{**dict(zip(names, arguments)), **changed}.values())

    assert forged().shape == (4, 6)
    big = 1 << 62
    for changed in (
        {"offset": -8}, {"offset": 8}, {"offset": 192}, {"offset": big}, {"offset": -big},
        {"shape": (5, 6)}, {"shape": (4, 7)}, {"shape": (4, big)}, {"shape": (-1, 6)},
        {"strides": (48, 16)}, {"strides": (-48, 8)}, {"strides": (big, 8)},
        {"shape": (5, 6), "strides": (big, 8)}, {"shape": (5, 5), "strides": (big, -big)},
        {"shape": (big, big), "strides": (big, big)}, {"shape": (4,)}, {"strides": ()},
        {"dtype": "V1000"}, {"dtype": "O"}, {"dtype": [("a", "O")]}, {"shape": (0,), "offset": 500},
        {"shape": (0,), "strides": (8,), "offset": -1}, {"mode": "w+"}, {"mode": None},
        {"shape": (2**63,), "strides": (8,)}, {"shape": "ab"}, {"name": b"x"}, {"name": "no/../t"},
        {"identity": (1, 2)}, {"identity": None}, {"identity": (-1, 2**70, "")}, {"shape": 5},
        {"shape": None}, {"offset": 2**70}, {"offset": 2**70, "dtype": None},
        {"dtype": None, "shape": (25,)}, {"cls": dict}, {"cls": np.ndarray}, {"dtype": 7},
    ):  # fmt: skip
        with pytest.raises(sharr.UnpicklingError):
            forged(**changed)
    assert forged(mode="r", w=True).flags.writeable is False


def test_a_failed_put_all_keeps_no_memory(name):
    """Whoever keeps the error, as an interactive Python does, keeps its frames."""

    def mapped():
        with open("/proc/self/maps") as file:
            return sum("/dev/shm/" in line for line in file)

    before = mapped()
    with pytest.raises(TypeError) as error:
        sharr.put_all(name, {"x": np.zeros(5000), "y": [object()]})
    assert mapped() == before and error.traceback
    assert not list(SHM.glob(f"{name}*"))


def test_squeezed_it_is_passed_by_reference(name):
    a = sharr.create(name, (1, 6))
    for view in a.squeeze(), a.squeeze(0), np.squeeze(a[:, :3]):
        assert type(view) is sharr.Array and view.base is not None
        pickle.loads(pickle.dumps(view))[0] += 1
    assert a[0, 0] == 3 and type((a + 1).squeeze()) is np.ndarray
    assert type(np.add(a, 1, out=np.zeros((1, 6)))) is np.ndarray


@pytest.mark.parametrize("other", [np.ones((4, 4), "i4"), np.ones((3, 2)), np.ones(6), np.ones((3, 2)).T])
def test_what_was_overwritten_since(name, other):
    """In place, as np.save does it."""
    data = pickle.dumps(sharr.put(name, np.arange(6.0).reshape(2, 3))[1:])
    inode = (SHM / name).stat().st_ino
    with open(SHM / name, "wb") as file:
        np.save(file, other)
    assert (SHM / name).stat().st_ino == inode
    with pytest.raises(sharr.UnpicklingError, match="overwritten"):
        pickle.loads(data)


def test_a_process_that_cannot_see_the_array(name):
    data = pickle.dumps(sharr.create(name, 3))
    done = in_small_shm("1m", f"import pickle, sharr; pickle.loads({data!r})")
    assert "UnpicklingError" in done.stderr and "another container" in done.stderr


def test_a_pool_says_what_it_cannot_load(name, tmp_path):
    """An OSError would end its workers without a word."""
    program = tmp_path / "program.py"
    program.write_text(f"""
import multiprocessing, sharr, sys
if __name__ == "__main__":
    a = sharr.put({name!r}, [1.0])
    sharr.delete({name!r})
    pool = multiprocessing.get_context(sys.argv[1]).Pool(1)
    pool.apply_async(len, (a,))
    sys.stdin.read()
    pool.terminate()
""")
    for method in ("fork", "spawn"):
        with subprocess.Popen([PYTHON, program, method], stdin=subprocess.PIPE,
                              stderr=subprocess.PIPE, text=True) as process:  # fmt: skip
            lines = list(itertools.takewhile(lambda line: "deleted" not in line, process.stderr))
            process.stdin.close()
            process.stderr.read()
        assert lines[0].startswith("Process "), lines


def test_what_is_being_built_is_not_pickled(name):
    with sharr.build(name, 3) as a:
        a[:] = 1
        with pytest.raises(pickle.PicklingError, match="not published yet"):
            pickle.dumps(a[1:])
        with multiprocessing.get_context("fork").Pool(1) as pool:
            with pytest.raises(pickle.PicklingError, match="not published yet"):
                pool.map(len, [a])
        copied = copy.deepcopy(a)
    assert pickle.loads(pickle.dumps(a[1:])).tolist() == [1, 1] and copied.tolist() == [1, 1, 1]
    sharr.delete(name)
    with pytest.raises(pickle.PicklingError, match="deleted"):
        pickle.dumps(a)


@needs_root
def test_another_user_who_may_not_see_the_array(name, public_build):
    data = pickle.dumps(sharr.create(name, 3))
    os.chmod(SHM / name, 0o600)
    code = f"import pickle, sharr; pickle.loads({data!r})"
    done = subprocess.run(
        as_nobody(PYTHON, "-c", code),
        env={**os.environ, "PYTHONPATH": str(public_build / "python")}, text=True,
        capture_output=True,
    )  # fmt: skip
    assert f"UnpicklingError: [Errno 13] Permission denied: 'shm://{name}'" in done.stderr


# With what hands objects to other processes. The program says where the memory is that they write.

PROGRAM = """
    import multiprocessing, os, sys
    import numpy as np
    import sharr

    def fill(part, value):
        part[...] = value
        return type(part).__name__, part.mode

    def take(queue, answers):
        part = queue.get()
        answers.put(fill(part, 7))

    def main(name, method):
        a = sharr.create(name, (8, 1000))
        context = multiprocessing.get_context(method)
        process = context.Process(target=fill, args=(a[0], 1))
        process.start()
        process.join()
        with context.Pool(2) as pool:
            done = pool.starmap(fill, [(a[1], 2), (a[2], 3)])
        queue, answers = context.Queue(), context.Queue()
        process = context.Process(target=take, args=(queue, answers))
        process.start()
        queue.put(a[3, ::2])
        done.append(answers.get())
        process.join()
        from concurrent.futures import ProcessPoolExecutor
        with ProcessPoolExecutor(2, mp_context=context) as pool:
            done.append(pool.submit(fill, a[4], 5).result())
            returned = pool.submit(sharr.attach, name).result()
        assert set(done) == {("Array", "r+")}, done
        returned[5] = 6
        assert a[:, 0].tolist() == [1, 2, 3, 7, 5, 6, 0, 0] and a[3, 1] == 0

    if __name__ == "__main__":
        main(*sys.argv[1:])
"""


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_multiprocessing(name, tmp_path, method):
    (tmp_path / "program.py").write_text(textwrap.dedent(PROGRAM))
    done = subprocess.run(
        [PYTHON, tmp_path / "program.py", name, method], timeout=120, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_workers_use_the_memory_of_one(name, tmp_path):
    code = """
        import multiprocessing, re, sys
        import sharr

        def work(a, barrier, results):
            total = float(a.sum())
            barrier.wait()
            with open("/proc/self/smaps") as file:
                maps = re.split(r"(?m)^(?=[0-9a-f]+-[0-9a-f]+ )", file.read())
            pss = sum(int(re.search(r"Pss: +(\\d+)", m)[1]) for m in maps if sys.argv[1] in m)
            barrier.wait()
            results.put((total, pss * 1024))

        if __name__ == "__main__":
            a = sharr.create(sys.argv[1], 32 << 20)  # 256 MiB
            a[:] = 1
            nbytes = a.nbytes
            context = multiprocessing.get_context("spawn")
            barrier, results = context.Barrier(4), context.Queue()
            workers = [context.Process(target=work, args=(a, barrier, results)) for _ in range(4)]
            for worker in workers:
                worker.start()
            got = [results.get() for _ in workers]
            for worker in workers:
                worker.join()
            assert all(total == 32 << 20 for total, _ in got)
            share = sum(pss for _, pss in got) / nbytes
            assert 0.5 < share < 1.1, share
    """
    (tmp_path / "program.py").write_text(textwrap.dedent(code))
    done = subprocess.run(
        [PYTHON, tmp_path / "program.py", name], timeout=120, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_name_asked_for_by_nobody(name):
    code = """
        import _thread, operator, sys, time, sharr
        a = sharr.create(sys.argv[1], 3)
        for one in "name", "filename":
            _thread.start_new_thread(operator.attrgetter(one), (a,))
        while _thread._count():
            time.sleep(0.001)
    """
    assert python(code, name, check=False).stderr == ""


# Appear filled


def test_put(name):
    for source in (np.arange(6).reshape(2, 3), np.asfortranarray(np.ones((3, 4))), 5, [1.5, 2],
                   np.zeros((0, 3)), np.arange(10)[::-2], np.array(["a", "bc"]), range(3),
                   np.arange(24).reshape(2, 3, 4).transpose(1, 0, 2)):  # fmt: skip
        a = sharr.put(name, source)
        want = np.asarray(source)
        assert type(a) is sharr.Array and a.dtype == want.dtype and a.tolist() == want.tolist()
        assert a.flags.fnc == want.flags.fnc and not np.shares_memory(a, want)
        assert np.load(SHM / name).tolist() == want.tolist()
        with pytest.raises(FileExistsError) as error:
            sharr.put(name, source)
        assert error.value.filename == name
        sharr.delete(name)


@pytest.mark.parametrize("source", ["C", "F", "strided", "wide", "swapped"])
def test_put_by_several_threads(name, source, monkeypatch):
    monkeypatch.setattr(sharr, "_BYTES_PER_THREAD", 1000)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(7))
    data = np.arange(30_003.0).reshape(3, 10_001)
    data = {"C": data, "F": np.asfortranarray(data), "strided": data[::-1, ::3], "wide": data[:1],
            "swapped": data.astype(">f8")}[source]  # fmt: skip
    a = sharr.put(name, data)
    assert np.array_equal(a, data) and a.dtype == data.dtype
    assert np.array_equal(sharr.put_all(f"{name}-all", {"x": data})["x"], data)


@pytest.mark.parametrize("when", ["before", "after", "copying", "helping"])
@pytest.mark.parametrize("raised", [RuntimeError, IndexError])
def test_an_error_while_threads_copy(name, when, raised, monkeypatch):
    """As a signal handler's, which may come before a thread is started, after, or while it works."""
    at_work, seen = [], set()
    moveaxis, start = np.moveaxis, sharr._thread.start_new_thread
    me = threading.get_ident()

    class Slow:
        def __init__(self, array):
            self.array, self.shape = array, array.shape

        def __getitem__(self, part):
            return Slow(self.array[part])

        def __setitem__(self, all_of_it, source):
            seen.add(threading.get_ident())
            if when in ("copying", "helping"):
                wait_until(lambda: len(seen) == 2, "both")
                if (when == "copying") == (threading.get_ident() == me):
                    raise raised("a handler's")
            at_work.append(None)
            time.sleep(0.05)
            self.array[all_of_it] = source.array
            at_work.pop()

    def start_and_raise(*args):
        if when != "before":
            start(*args)
        if when == "after":
            wait_until(lambda: at_work, "the other")
        if when in ("before", "after"):
            raise raised("a handler's")

    monkeypatch.setattr(sharr, "_BYTES_PER_THREAD", 1000)
    monkeypatch.setattr(sharr._core, "available_processors", lambda: 2)
    monkeypatch.setattr(sharr._thread, "start_new_thread", start_and_raise)
    monkeypatch.setattr(np, "moveaxis", lambda *args: Slow(moveaxis(*args)))
    source = np.arange(30_000)[::2]
    for call in (lambda: sharr.put(name, source), lambda: sharr.put_all(name, {"x": source})):
        seen.clear()
        with pytest.raises(raised, match="a handler's"):
            call()
        assert not (SHM / name).exists()
        wait_until(lambda: not at_work, "who helps")


@pytest.mark.parametrize("who", ["main", "helper", "unthreaded"])
def test_an_error_keeps_no_memory(name, who, monkeypatch):
    """Whoever keeps it keeps the frames that it has come through."""
    moveaxis = np.moveaxis

    class FailsOnce:
        def __init__(self, array):
            self.array, self.shape = array, array.shape

        def __getitem__(self, part):
            return self.array[part] if part.start else self.array[part, None]

    def available_processors():
        if who == "unthreaded":
            raise ValueError
        return 2

    def start_new_thread(function, args):
        if who == "helper":
            function(*args)

    def held():
        with open("/proc/self/maps") as maps:
            mapped = sum(str(SHM) in line for line in maps)
        opened = 0
        for fd in os.listdir("/proc/self/fd"):
            with contextlib.suppress(FileNotFoundError):  # of the directory itself
                opened += os.readlink(f"/proc/self/fd/{fd}").startswith(str(SHM))
        return mapped, opened

    monkeypatch.setattr(sharr, "_BYTES_PER_THREAD", 1000)
    monkeypatch.setattr(sharr._core, "available_processors", available_processors)
    monkeypatch.setattr(sharr._thread, "start_new_thread", start_new_thread)
    made = itertools.cycle([lambda array: array, FailsOnce])  # where to, where from
    monkeypatch.setattr(np, "moveaxis", lambda *args: next(made)(moveaxis(*args)))
    source = np.arange(30_000)[::2]
    before = held()
    errors = []
    for call in (lambda: sharr.put(name, source), lambda: sharr.put_all(name, {"x": source})):
        with pytest.raises(ValueError) as error:
            call()
        errors.append(error)
        assert held() == before


def test_put_where_no_thread_is_to_be_had(name, monkeypatch):
    monkeypatch.setattr(sharr, "_BYTES_PER_THREAD", 1000)
    monkeypatch.setattr(sharr._core, "available_processors", lambda: 2)
    # It raises RuntimeError when it is entered again, in C as the other.
    context = contextvars.Context()
    monkeypatch.setattr(sharr._thread, "start_new_thread", context.run)
    source = np.arange(30_000)[::2]
    assert np.array_equal(context.run(sharr.put, name, source), source)


@pytest.mark.parametrize("kind", "SU")
def test_put_of_strings_without_bytes(name, kind):
    """What lies beside them is not theirs."""
    records = np.zeros(2, [("a", f"{kind}0"), ("b", "u4")])
    records["b"] = ord("A")
    a = sharr.put(name, records["a"])
    assert a.tolist() == records["a"].tolist() and a.dtype == f"{kind}1"


def test_put_looks_at_the_name_first(name):
    class Costly:
        def __array__(self, dtype=None, copy=None):
            raise AssertionError

    sharr.put(name, 1)
    with pytest.raises(FileExistsError):
        sharr.put(name, Costly())
    with pytest.raises(TypeError, match="mask"):
        sharr.put(name + "-m", np.ma.array([1, 2], mask=[0, 1]))


def test_a_child_does_not_publish(name):
    code = """
        import os, sys, sharr
        try:
            with sharr.build(sys.argv[1], 3) as a:
                pid = os.fork()
                if pid:
                    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
                    a[:] = 1
        except ValueError as error:
            os._exit(7 if not pid and "another process" in str(error) else 1)
    """
    python(code, name)
    assert sharr.attach(name).tolist() == [1, 1, 1]


def test_views_by_the_buffer_protocol(name):
    a = sharr.put(name, np.arange(5.0))
    v = np.asarray(memoryview(a)).view(sharr.Array)
    assert v.name == a.name and type(v[1:]) is sharr.Array and len(pickle.dumps(v)) < 300

    class Strange:
        """Not to be followed: a base may be anything."""

        __array_interface__ = a.__array_interface__
        keep = a

        @property
        def base(self):
            return self

    assert np.asarray(Strange()).view(sharr.Array).name is None


def test_put_of_what_is_no_array(name):
    for source in ([[1, 2], [3]], [object()], {"a": 1}, None, [None, 1], np.array([{}, 1])):
        with pytest.raises((TypeError, ValueError)):
            sharr.put(name, source)
        with pytest.raises((TypeError, ValueError)):
            sharr.put_all(name, {"good": [1], "bad": source})
    assert not (SHM / name).exists() and left_behind() == []


def test_build(name):
    with sharr.build(name, (2, 3), "i4", order="F") as a:
        assert not (SHM / name).exists() and a.flags.fnc and not a.any()
        a[:] = 4
    assert sharr.attach(name).tolist() == [[4] * 3] * 2
    a[0, 0] = 5
    assert sharr.attach(name)[0, 0] == 5
    # Nothing is made for nothing: the name is looked at first.
    with pytest.raises(FileExistsError) as error:
        with sharr.build(name, 1 << 60):
            assert False
    assert error.value.filename == name


def test_build_left_by_an_exception(name):
    for error in (ValueError("mine"), KeyboardInterrupt(), SystemExit(3), GeneratorExit()):
        with pytest.raises(type(error)) as raised:
            with sharr.build(name, 3):
                raise error
        assert raised.value is error
        assert not (SHM / name).exists() and left_behind() == []
    # Somebody else took the name meanwhile.
    with pytest.raises(FileExistsError):
        with sharr.build(name, 3):
            sharr.put(name, "theirs")
    assert sharr.attach(name) == "theirs"


@pytest.mark.parametrize("end", ["os._exit(3)", "os.kill(os.getpid(), 9)", "os.abort()"])
def test_build_left_by_death(name, end, tmp_path):
    free = os.statvfs("/dev/shm").f_bfree
    for where in (name, tmp_path / "a.npy"):
        code = """
            import os, pathlib, sys, sharr
            where = sys.argv[1] if sys.argv[1][0] != "/" else pathlib.Path(sys.argv[1])
            with sharr.build(where, 1 << 20) as a:
                a[:] = 1
                END
        """
        assert python(code.replace("END", end), where, check=False).returncode != 0
    assert not (SHM / name).exists() and left_behind() == [] and os.listdir(tmp_path) == []
    assert os.statvfs("/dev/shm").f_bfree > free - 2048


def test_replace(name):
    old = sharr.put(name, [1, 2, 3])
    os.chmod(SHM / name, 0o640)
    data = pickle.dumps(old)
    new = sharr.put(name, np.arange(10.0), replace=True)
    assert old.tolist() == [1, 2, 3] and sharr.attach(name).tolist() == new.tolist()
    assert (SHM / name).stat().st_mode & 0o777 == 0o640
    with pytest.raises(sharr.UnpicklingError, match="replaced"):
        pickle.loads(data)
    with pytest.raises(ZeroDivisionError):
        with sharr.build(name, 3, replace=True) as a:
            a[:] = 1 / 0
    assert sharr.attach(name).shape == (10,)
    assert sharr.put(f"{name}-new", 1, replace=True) == 1
    # What is no array is not replaced, neither at the beginning nor at the end.
    (SHM / f"{name}-text").write_text("text")
    os.mkdir(SHM / f"{name}-dir")
    os.symlink(name, SHM / f"{name}-link")
    for other in ("text", "dir", "link"):
        with pytest.raises(OSError):
            sharr.put(f"{name}-{other}", 1, replace=True)
    with pytest.raises(sharr.FormatError):
        with sharr.build(f"{name}-late", 1, replace=True):
            (SHM / f"{name}-late").write_text("text")
    assert (SHM / f"{name}-text").read_text() == (SHM / f"{name}-late").read_text() == "text"


@needs_root
def test_replaced_by_root_it_stays_whose_it_was(name):
    sharr.create(name, 3)
    os.chown(SHM / name, NOBODY, 8)
    os.chmod(SHM / name, 0o600)
    sharr.put(name, [1, 2], replace=True)
    st = (SHM / name).stat()
    assert (st.st_uid, st.st_gid, st.st_mode & 0o777) == (NOBODY, 8, 0o600)
    subprocess.run(as_nobody("cat", SHM / name), stdout=subprocess.DEVNULL, check=True)


# Lets NOBODY read and write (linux/posix_acl_xattr.h).
ACL = struct.pack("<I" + "HHI" * 5, 2, 1, 6, 2**32 - 1, 2, 6, NOBODY, 4, 0, 2**32 - 1,
                  0x10, 6, 2**32 - 1, 0x20, 0, 2**32 - 1)  # fmt: skip


@needs_root
def test_replaced_it_keeps_its_acl(name):
    sharr.create(name, 3)
    os.chown(SHM / name, 0, 8)
    try:
        os.setxattr(SHM / name, "system.posix_acl_access", ACL)
    except OSError:
        pytest.skip("a kernel without ACLs on tmpfs")
    sharr.put(name, [1, 2], replace=True)
    assert os.getxattr(SHM / name, "system.posix_acl_access") == ACL
    subprocess.run(as_nobody("cat", SHM / name), stdout=subprocess.DEVNULL, check=True)


@needs_root
def test_replaced_it_grants_nobody_more(name, public_build):
    (SHM / name).mkdir()
    old = SHM / name / "x"
    # Where the group cannot be kept: what both the group and all others might.
    os.chmod(SHM / name, 0o777)
    code = "import sys, sharr; sharr.put(sys.argv[1], [1.0, 2.0], replace=True)"
    for mode, wanted in ((0o664, 0o644), (0o646, 0o644)):
        sharr.put(old, [0.0], replace=True)
        os.chown(old, 8, 8), os.chmod(old, mode)
        env = {**os.environ, "PYTHONPATH": str(public_build / "python")}
        subprocess.run(as_nobody(PYTHON, "-c", code, old), env=env, check=True)
        st = old.stat()
        assert (st.st_uid, st.st_gid, st.st_mode & 0o777) == (NOBODY, NOBODY, wanted)
    # Nor by what its directory gives to new files.
    os.chmod(old, 0o640)
    try:
        os.setxattr(SHM / name, "system.posix_acl_default", ACL)
    except OSError:
        pytest.skip("a kernel without ACLs on tmpfs")
    sharr.put(old, [3.0], replace=True)
    assert os.listxattr(old) == [] and old.stat().st_mode & 0o777 == 0o640


@needs_root
def test_groups_are_inherited(name):
    (SHM / name).mkdir()
    os.chown(SHM / name, 0, 8)
    os.chmod(SHM / name, 0o2770)
    sharr.put(f"{name}/new/x", 1), sharr.put(f"{name}/new/y", 1)
    with sharr.build(f"{name}/other/x", 1):
        pass
    sharr.put_all(f"{name}/all", {"x": 1, "sub/x": 2})
    assert {path.stat().st_gid for path in (SHM / name).rglob("*")} == {8}


@needs_root
def test_a_colleagues_empty_namespace(name, public_build):
    (SHM / name).mkdir()
    os.chmod(SHM / name, 0o777)
    (SHM / name / "run").mkdir()
    code = f"import sharr; sharr.put_all('{name}/run', {{'x': [1]}})"
    env = {**os.environ, "PYTHONPATH": str(public_build / "python")}
    subprocess.run(as_nobody(PYTHON, "-c", code), env=env, check=True)
    assert sharr.attach(f"{name}/run/x").tolist() == [1]


def test_built_where_it_was_begun(tmp_path, monkeypatch):
    for directory in ("one", "other"):
        (tmp_path / directory).mkdir()
    monkeypatch.chdir(tmp_path / "one")
    for replace in (False, True):
        with sharr.build(pathlib.Path("a.npy"), 4, replace=replace) as a:
            a[:] = 1
            os.chdir(tmp_path / "other")
        assert os.listdir(tmp_path / "one") == ["a.npy"] and os.listdir() == []
        assert pickle.loads(pickle.dumps(a)).tolist() == [1, 1, 1, 1]
        os.chdir(tmp_path / "one")


def test_replaced_all_the_time(name):
    """Who attaches gets the one or the other, whole; the name is never missing."""
    sharr.put(name, np.zeros(1000))

    def replace(value):
        sharr.put(name, np.full(1000 + value % 7, value), replace=True)

    with meanwhile(replace):
        for _ in range(2000):
            a = sharr.attach(name)
            assert (a == a[0]).all() and len(a) == 1000 + a[0] % 7
    assert left_behind() == [name]


def test_a_full_store_leaves_nothing(name):
    done = in_small_shm("8m", """
        import os, sharr, numpy as np
        for attempt in (lambda: sharr.put("a", np.zeros(2 << 20)),
                        lambda: sharr.build("a", 2 << 20).__enter__(),
                        lambda: sharr.put_all("all", {"x": np.zeros(1000), "y": np.zeros(2 << 20)})):
            try:
                attempt()
            except OSError as error:
                assert error.errno == 28, error
            else:
                raise AssertionError
            assert os.listdir("/dev/shm") == []
            assert os.statvfs("/dev/shm").f_bfree == os.statvfs("/dev/shm").f_blocks
    """)  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_a_lack_of_descriptors_leaves_nothing():
    """Wherever on the way it comes."""
    done = in_small_shm("8m", """
        import os, resource, sharr, numpy as np
        x = np.zeros(3)
        before = resource.getrlimit(resource.RLIMIT_NOFILE)
        used = len(os.listdir("/proc/self/fd")) - 1
        for name in ("all", "of/them/all"):
            for arrays in ({"x": x}, {"x": x, "y": x}, {"a/b/c/x": x}, {"a/b/x": x, "a/c/x": x, "a/x": x},
                           {f"x{i}": x for i in range(20)}):
                for more in range(40):
                    resource.setrlimit(resource.RLIMIT_NOFILE, (used + more, before[1]))
                    try:
                        sharr.put_all(name, arrays)
                    except OSError as error:
                        resource.setrlimit(resource.RLIMIT_NOFILE, before)
                        assert error.errno == 24, error
                        assert os.listdir("/dev/shm") == [], (name, arrays, more)
                    else:
                        break
                resource.setrlimit(resource.RLIMIT_NOFILE, before)
                assert 2 < more < 39, more
                sharr.delete_all(name.split("/")[0])
                assert os.listdir("/dev/shm") == []
    """)  # fmt: skip
    assert done.returncode == 0, done.stderr


# Waiting


def test_wait(name, tmp_path):
    sharr.put(name, [1])
    assert sharr.wait(name, 0) == [1] and sharr.wait(name, mode="r").mode == "r"
    for timeout in (0, 0.05, -1):
        with pytest.raises(TimeoutError) as error:
            sharr.wait(f"{name}-none", timeout)
        assert error.value.filename == f"{name}-none"
    with pytest.raises(ValueError):
        sharr.wait(name, float("nan"))
    with pytest.raises(TypeError):
        sharr.wait(name + "-none", "soon")
    (SHM / f"{name}-link").symlink_to(name)
    with pytest.raises(OSError) as error:
        sharr.wait(f"{name}-link", 1)
    assert error.value.errno == errno.ELOOP


def waiting_for(where):
    """A thread that waits, once it does, and what it will have found."""
    found = []
    tid = []

    def run():
        tid.append(threading.get_native_id())
        found.append(sharr.wait(where, 60))

    thread = threading.Thread(target=run)
    thread.start()
    asleep = lambda: tid and open(f"/proc/self/task/{tid[0]}/syscall").read().split()[0] in ("271", "73")  # noqa: E731,E501
    wait_until(asleep, "ppoll")
    return thread, found


@pytest.mark.parametrize("change", ["directory", "ancestor", "moved", "file", "dir"])
def test_wait_while_namespaces_come_and_go(name, change):
    """No time is set within which this has to happen: what is not seen ends in a TimeoutError."""
    if change == "file":
        (SHM / name).write_text("in the way")
    elif change == "dir":
        (SHM / name / "e" / "z").mkdir(parents=True)
    else:
        (SHM / name / "e").mkdir(parents=True)
    thread, found = waiting_for(f"shm://{name}/e/z")
    if change == "directory":
        (SHM / name / "e").rmdir()
        sharr.put_all(f"shm://{name}/e", {"z": [1]})
    elif change == "ancestor":
        sharr.delete_all(f"shm://{name}")
        sharr.put(f"shm://{name}/e/z", [1])
    elif change == "moved":
        sharr.put(f"{name}-other/e/z", [1])
        os.rename(SHM / name, SHM / f"{name}-old")
        os.rename(SHM / f"{name}-other", SHM / name)
    elif change == "file":
        (SHM / name).unlink()
        sharr.put(f"{name}/e/z", [1])
    else:
        (SHM / name / "e" / "z").rmdir()
        sharr.put(f"{name}/e/z", [1])
    thread.join()
    assert found and found[0] == [1]


def test_wait_by_symbolic_links(tmp_path):
    for version in ("v1", "v2"):
        (tmp_path / version).mkdir()
    (tmp_path / "current").symlink_to("v1")
    thread, found = waiting_for(tmp_path / "current" / "a.npy")
    sharr.put(tmp_path / "v2" / "a.npy", [1])
    (tmp_path / "new").symlink_to("v2")
    os.rename(tmp_path / "new", tmp_path / "current")
    thread.join()
    assert found and found[0] == [1]


# How an array comes to its name, in a namespace that may not be there yet either.
COMING = {
    "create": "sharr.create(where, 3)[:] = 1",
    "put": "sharr.put(where, [1.0] * 3)",
    "namespace": "sharr.put_all(os.path.dirname(where), {os.path.basename(where): [1.0] * 3})",
    "replace": "sharr.put(where, [1.0] * 3, replace=True)",
    "rename": "sharr.put(where + '-', [1.0] * 3); sharr.rename(where + '-', where)",
    "np.save": "os.makedirs(os.path.dirname(path), exist_ok=True);"
    "open(path, 'wb').write(data[:50]); time.sleep(.1); open(path, 'wb').write(data)",
    "moved directory": "x = os.path.dirname(os.path.dirname(path)); os.makedirs(x + '-d/y');"
    "open(x + '-d/y/z', 'wb').write(data); os.rename(x + '-d', x)",
}


@pytest.mark.parametrize("base", ["shm", "file"])
@pytest.mark.parametrize("how", COMING)
def test_wait_for_what_comes(name, how, base, tmp_path):
    deep = how in ("moved directory",)
    if base == "shm":
        where = f"shm://{name}/y/z" if deep or how == "np.save" else f"shm://{name}/z"
        path = where.replace("shm://", "/dev/shm/")
    else:
        where = f"file://{tmp_path}/x/y/z" if deep else f"file://{tmp_path}/z"
        if how == "namespace":
            where = f"file://{tmp_path}/x/z"
        path = where.replace("file://", "")
    code = """
        import io, os, sys, time, numpy as np, sharr
        where, path = sys.argv[1:]
        buffer = io.BytesIO()
        np.save(buffer, [1.0] * 3)
        data = buffer.getvalue()
        sys.stdin.readline()
    """
    maker = subprocess.Popen(
        [PYTHON, "-c", textwrap.dedent(code) + COMING[how], where, path], stdin=subprocess.PIPE
    )
    found = []
    thread = threading.Thread(target=lambda: found.append(sharr.wait(where, 60)))
    thread.start()
    maker.communicate(b"\n")
    assert maker.returncode == 0
    thread.join(60)
    assert found and found[0].shape == (3,) and found[0].dtype == float


def test_waiting_can_be_interrupted_and_uses_no_time(name):
    code = """
        import os, sys, time, sharr
        print(os.getpid(), flush=True)
        try:
            sharr.wait(sys.argv[1])
        except KeyboardInterrupt:
            print(time.process_time() < 5)
    """
    waiter = subprocess.Popen([PYTHON, "-c", textwrap.dedent(code), name], stdout=subprocess.PIPE)
    pid = int(waiter.stdout.readline())
    wchan = lambda: open(f"/proc/{pid}/syscall").read().split()[0]  # noqa: E731
    wait_until(lambda: wchan() in ("271", "73"), "ppoll")
    waiter.send_signal(signal.SIGINT)
    assert waiter.communicate(timeout=60)[0] == b"True\n"


def test_waiting_can_be_interrupted_whatever_else_happens(name):
    """Other events keep a signal from coming while it sleeps."""
    storm = """
        import os, sys
        while True:
            open(sys.argv[1], "w").close()
            os.unlink(sys.argv[1])
    """
    code = """
        import sys, sharr
        try:
            print(flush=True)
            sharr.wait(sys.argv[1])
        except KeyboardInterrupt:
            print("heard")
    """
    blower = subprocess.Popen([PYTHON, "-c", textwrap.dedent(storm), SHM / f"{name}-storm"])
    try:
        for _ in range(3):
            waiter = subprocess.Popen([PYTHON, "-c", textwrap.dedent(code), name], stdout=subprocess.PIPE)
            waiter.stdout.readline()
            time.sleep(0.2)
            waiter.send_signal(signal.SIGINT)
            assert waiter.communicate(timeout=60)[0] == b"heard\n"
    finally:
        blower.kill(), blower.wait()
        (SHM / f"{name}-storm").unlink(missing_ok=True)


def test_copies_where_no_thread_can_be_had(name):
    """As in atexit; what is not contiguous is copied by Python's threads elsewhere."""
    python("""
        import atexit, sys, numpy as np, sharr
        x = np.arange(8 << 20).reshape(2048, -1)
        @atexit.register
        def last():
            sharr.put_all(f"{sys.argv[1]}/", {"x": x, "y": x[:, ::2]})
            sharr.put(f"{sys.argv[1]}-z", x[:, ::2])
        """, name)  # fmt: skip
    x = np.arange(8 << 20).reshape(2048, -1)
    assert (sharr.attach(f"{name}/x") == x).all()
    assert (sharr.attach(f"{name}/y") == x[:, ::2]).all() and (sharr.attach(f"{name}-z") == x[:, ::2]).all()


@needs_root
def test_wait_without_inotify(name):
    code = """
        import sys, threading, sharr
        threading.Timer(0.2, sharr.put, (sys.argv[1], [1, 2])).start()
        print(sharr.wait(sys.argv[1], 60).tolist())
        try:
            sharr.wait(sys.argv[1] + "-no", 0.1)
        except TimeoutError as error:
            print(error.filename)
    """
    limit = 'echo 0 > /proc/sys/user/max_inotify_instances && exec "$@"'
    command = ["unshare", "-Ur", "sh", "-c", limit, "sh", PYTHON, "-c", textwrap.dedent(code), name]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.stdout == f"[1, 2]\n{name}-no\n", done.stderr


# Whole data sets


@pytest.mark.parametrize("base", ["shm", "deep", "file", "path"])
def test_namespaces(name, base, tmp_path):
    where = {"shm": f"shm://{name}/", "deep": f"{name}/a/b", "file": f"file://{tmp_path}/run/",
             "path": tmp_path / "run"}[base]  # fmt: skip
    x, y = np.arange(5), np.asfortranarray(np.ones((2, 3)))
    made = sharr.put_all(where, {"x": x, "y": y, "ä b": 3})
    assert list(made) == ["x", "y", "ä b"] and made["y"].flags.fnc
    assert made["x"].name.endswith("/x") and pickle.loads(pickle.dumps(made["x"])).sum() == 10
    found = sharr.attach_all(where)
    assert list(found) == ["x", "y", "ä b"] and found["x"].tolist() == x.tolist()
    found["x"][0] = 9
    assert made["x"][0] == 9 and sharr.attach_all(where, "r")["x"].mode == "r"
    with pytest.raises(FileExistsError):
        sharr.put_all(where, {"x": x})
    sharr.delete_all(where)
    for gone in (sharr.attach_all, sharr.delete_all):
        with pytest.raises(FileNotFoundError):
            gone(where)
    assert found["x"].tolist() == [9, 1, 2, 3, 4]
    # A directory with nothing in it is no data set.
    directory = os.path.dirname(made["x"].filename)
    os.mkdir(directory)
    assert sharr.put_all(where, {}) == {} and sharr.attach_all(where) == {}
    if IS_ROOT:  # an empty one stays whose it was
        os.chown(directory, 7, 8)
        os.chmod(directory, 0o2750)
        x = sharr.put_all(where, {"x": 1})["x"].filename
        assert [(oct(s.st_mode), s.st_uid, s.st_gid) for s in map(os.stat, (directory, x))] == [
            ("0o42750", 7, 8), ("0o100644", 0, 8)]  # fmt: skip
        os.unlink(x)
    sharr.put_all(where, {"z": 1})
    sharr.delete_all(where)
    assert left_behind() == ([name] if base == "deep" else [])
    assert os.listdir(tmp_path) == []


def test_names_in_a_namespace(name):
    for key in ("", ".", "..", "/a", "a/", "a//b", "a/../b", "good/b", "a\0b", ".sharr-tmp-a",
                "a/.sharr-tmp-a", "x" * 256):  # fmt: skip
        with pytest.raises(OSError):
            sharr.put_all(name, {"good": 1, key: 2})
        assert left_behind() == []
    sharr.put_all(name, {"a": 1, "b/c/x": 2, "b/c/y": 3, "b/z": 4})
    copied = sharr.put_all(f"{name}-copy", sharr.attach_all(name))
    assert {key: int(value) for key, value in copied.items()} == {"a": 1, "b/c/x": 2, "b/c/y": 3, "b/z": 4}
    for one in (name, f"{name}-copy"):
        sharr.delete_all(one)
    with pytest.raises(TypeError):
        sharr.put_all(name, {1: 2})
    for where in ("shm://", "", "shm://../x", "http://x"):
        with pytest.raises(OSError):
            sharr.put_all(where, {"a": 1})
        with pytest.raises(OSError):
            sharr.delete_all(where)
    assert left_behind() == []
    sharr.put(name, 1)
    for call in (sharr.put_all, lambda where, _: sharr.delete_all(where),
                 lambda where, _: sharr.attach_all(where)):  # fmt: skip
        with pytest.raises((FileExistsError, NotADirectoryError)):
            call(name, {"a": 1})
    assert sharr.attach(name) == 1


def test_foreign_things_in_a_namespace_stay(name):
    sharr.put_all(name, {"x": 1})
    for other in ("text", "link", "sub/fifo"):
        path = SHM / name / other
        path.parent.mkdir(exist_ok=True)
        {"text": lambda: path.write_text("text"), "link": lambda: path.symlink_to("x"),
         "sub/fifo": lambda: os.mkfifo(path)}[other]()  # fmt: skip
        assert list(sharr.attach_all(name)) == ["x"]
        with pytest.raises(OSError, match=other) as error:
            sharr.delete_all(name)
        assert error.value.errno == errno.ENOTEMPTY and sharr.attach(f"{name}/x") == 1
        path.unlink()
    sharr.create(f"{name}/sub/deep/y", 3)
    assert list(sharr.attach_all(name)) == ["sub/deep/y", "x"]
    sharr.delete_all(name)
    assert left_behind() == []


@needs_root
def test_what_may_not_be_read_or_removed(name, public_build):
    sharr.put_all(name, {"x": 1, "y": 2})
    sharr.put(f"{name}/sub/z", 3)
    os.chmod(SHM / name / "x", 0o600)
    os.chown(SHM / name, 65534, 65534)

    def said(code):
        done = subprocess.run(
            as_nobody(PYTHON, "-c", f"import sharr; sharr.{code}"),
            env={**os.environ, "PYTHONPATH": str(public_build / "python")}, text=True,
            capture_output=True,
        )  # fmt: skip
        return done.stderr.splitlines()[-1]

    assert "PermissionError" in said(f"attach_all({name!r}, 'r')")
    assert "'x' in it cannot be read" in said(f"delete_all({name!r})")
    os.chmod(SHM / name / "x", 0o644)
    assert "'./sub' in it cannot be changed" in said(f"delete_all({name!r})")
    assert left_behind() == [name] and len(sharr.attach_all(name)) == 3


def test_delete_all_while_arrays_are_replaced(name):
    def replace(number):
        with contextlib.suppress(FileNotFoundError):
            sharr.put(f"{name}/x", [number], replace=True)

    deleted = 0
    with meanwhile(replace):
        while deleted < 1000:
            with contextlib.suppress(FileNotFoundError):
                sharr.delete_all(name)
                deleted += 1
    assert left_behind() in ([], [name])


def test_foreign_files_that_come_while_a_namespace_goes(name):
    """None of them is ever lost."""

    def cycle(_):
        try:
            sharr.put_all(name, {"a": 1, "b": 2})
            sharr.delete_all(name)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.EAGAIN):
                raise

    with meanwhile(cycle):
        for i in range(500):
            try:
                file = open(SHM / name / "notes", "x")
            except (FileNotFoundError, FileExistsError):
                continue
            with file:
                assert os.fstat(file.fileno()).st_nlink == 1
                for entry in os.listdir(SHM):
                    if entry.startswith(name):
                        try:
                            os.unlink(SHM / entry / "notes")
                        except (FileNotFoundError, NotADirectoryError):
                            pass


def test_put_into_a_namespace_that_is_deleted_all_the_time(name):
    def delete(_):
        try:
            sharr.delete_all(f"{name}/v")
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTEMPTY, errno.EAGAIN):
                raise

    with meanwhile(delete):
        for _ in range(300):
            try:
                sharr.put(f"{name}/v/a", [1], replace=True)
            except FileNotFoundError:  # an old one was replaced, and both deleted with the namespace
                pass
            try:
                sharr.put_all(f"{name}/v/p/ns", {"x": 1})
            except (FileNotFoundError, FileExistsError):
                pass


def test_namespaces_are_whole_at_every_moment(name):
    """Others see all of a namespace or none while it is put and deleted again and again."""

    def cycle(value):
        sharr.put_all(name, {key: np.full(100, value) for key in "abcdef"})
        sharr.delete_all(name)

    seen = 0
    with meanwhile(cycle):
        while seen < 300:
            try:
                found = sharr.attach_all(name)
            except FileNotFoundError:
                continue
            assert list(found) == list("abcdef")
            assert len({int(a[0]) for a in found.values()}) == 1
            seen += 1
    assert left_behind() == []


@pytest.mark.parametrize("what", ["put", "delete"])
def test_killed_while_a_namespace_comes_or_goes(name, what):
    """Whole or not there; what is left of it goes with the next listing."""
    code = """
        import sys, numpy as np, sharr
        arrays = {str(i): np.zeros(10) for i in range(300)}
        if sys.argv[2] == "delete":
            sharr.put_all(sys.argv[1], arrays)
        print(flush=True)
        while True:
            if sys.argv[2] == "delete":
                sharr.delete_all(sys.argv[1])
            sharr.put_all(sys.argv[1], arrays)
            if sys.argv[2] == "put":
                sharr.delete_all(sys.argv[1])
    """
    for delay in np.linspace(0.001, 0.05, 12):
        with subprocess.Popen(
            [PYTHON, "-c", textwrap.dedent(code), name, what], stdout=subprocess.PIPE
        ) as process:
            process.stdout.readline()
            threading.Event().wait(delay)
            process.kill()
        sharr.list()
        assert left_behind() in ([], [name])
        if (SHM / name).exists():
            assert len(sharr.attach_all(name)) == 300
            sharr.delete_all(name)


def test_rename(name):
    a = sharr.put(name, [1, 2])
    sharr.rename(name, f"{name}-b")
    assert not (SHM / name).exists() and sharr.attach(f"{name}-b").tolist() == [1, 2]
    sharr.put(name, [3])
    for new in (name, f"shm://{name}"):
        with pytest.raises(FileExistsError):
            sharr.rename(f"{name}-b", new)
    other = sharr.attach(name)
    sharr.rename(f"{name}-b", name, replace=True)
    assert sharr.attach(name).tolist() == a.tolist() and other == [3]
    sharr.rename(name, f"{name}-d/e/f")
    assert sharr.attach(f"{name}-d/e/f").tolist() == [1, 2]
    with pytest.raises(FileNotFoundError):
        sharr.rename(name, f"{name}-z/y")
    assert not (SHM / f"{name}-z").exists()
    (SHM / f"{name}-text").write_text("text")
    with pytest.raises(sharr.FormatError):
        sharr.rename(f"{name}-text", f"{name}-c")
    with pytest.raises(sharr.FormatError):
        sharr.rename(f"{name}-d/e/f", f"{name}-text", replace=True)


def test_rename_across_file_systems(name, tmp_path):
    sharr.put(name, [1])
    if os.stat(tmp_path).st_dev == os.stat("/dev/shm").st_dev:
        pytest.skip("one file system")
    with pytest.raises(OSError) as error:
        sharr.rename(name, tmp_path / "a.npy")
    assert error.value.errno == errno.EXDEV and sharr.attach(name) == [1]


def test_pickles_hold_no_data(name):
    text = np.frombuffer(b"secret!!" * 100, "u1")
    data = pickle.dumps(sharr.put(name, text)[5:])
    assert b"secret" not in data
    pickletools.dis(data, out=open(os.devnull, "w"))
