"""Arrays in the hands of the packages that programs use: no copy, no line of glue.

Each is tested where it is installed; .ci/run installs them all.
"""

import pickle
import subprocess
import textwrap

import numpy as np
import pytest

import sharr
from conftest import PYTHON


def program(tmp_path, code, *args):
    """Run code as a program, as what spawns processes wants it."""
    path = tmp_path / "program.py"
    path.write_text(textwrap.dedent(code))
    done = subprocess.run(
        [PYTHON, path, *map(str, args)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr


def test_joblib(name, tmp_path):
    pytest.importorskip("joblib")
    code = """
        import sys
        import joblib, numpy as np, sharr

        def fill(part, value):
            part[...] = value
            return type(part).__name__, part.name

        if __name__ == "__main__":
            for backend in "loky", "multiprocessing", "threading":
                a = sharr.create(f"{sys.argv[1]}-{backend}", (4, 300_000))  # more than joblib dumps
                done = joblib.Parallel(2, backend)(
                    joblib.delayed(fill)(a[i, ::2], i + 1) for i in range(4)
                )
                assert done == [("Array", a.name)] * 4, done
                assert a.sum() == 10 * 150_000
    """
    program(tmp_path, code, name)


def test_joblib_dump_and_hash(name, tmp_path):
    joblib = pytest.importorskip("joblib")
    a = sharr.put(name, np.arange(10.0))
    joblib.dump({"a": a[2:]}, tmp_path / "a.joblib")
    b = joblib.load(tmp_path / "a.joblib")["a"]
    b[0] = -1
    assert a[2] == -1
    joblib.hash(a)


def test_cloudpickle(name):
    cloudpickle = pytest.importorskip("cloudpickle")
    a = sharr.put(name, np.zeros(1 << 20))
    data = cloudpickle.dumps(lambda i: a[i : i + 2])
    assert len(data) < 3000
    part = pickle.loads(data)(5)
    part[0] = 7
    assert a[5] == 7


def test_torch(name, tmp_path):
    torch = pytest.importorskip("torch")
    a = sharr.put(name, np.zeros((4, 5), "f4"))
    tensor = torch.from_numpy(a)
    tensor += 1
    assert a.sum() == 20 and torch.as_tensor(a[1:]).shape == (3, 5)
    assert np.array_equal(np.asarray(tensor), a)
    code = """
        import sys
        import numpy as np, sharr, torch.utils.data as data

        class Rows(data.Dataset):
            def __init__(self, a):
                self.a = a
            def __len__(self):
                return len(self.a)
            def __getitem__(self, i):
                self.a[i, 0] = -1  # seen by whoever made it, if the memory is shared
                return np.asarray(self.a[i])

        if __name__ == "__main__":
            for method in "fork", "spawn":
                a = sharr.put(f"{sys.argv[1]}-{method}", np.arange(32.0).reshape(8, 4))
                loader = data.DataLoader(Rows(a), 2, num_workers=2, multiprocessing_context=method)
                assert sum(float(batch[:, 1].sum()) for batch in loader) == float(a[:, 1].sum())
                assert (a[:, 0] == -1).all()
    """
    program(tmp_path, code, name)


def test_dask(name, tmp_path):
    pytest.importorskip("dask.array")
    code = """
        import sys
        import dask, dask.array as da, numpy as np, sharr

        def mark(block):
            block[0] = -1
            return block.sum()

        if __name__ == "__main__":
            a = sharr.put(sys.argv[1], np.ones(1000))
            x = da.from_array(a, chunks=100)
            for scheduler in "threads", "processes":
                assert (x + 1).sum().compute(scheduler=scheduler) == 2000
            parts = [dask.delayed(mark)(a[i : i + 100]) for i in range(0, 1000, 100)]
            assert dask.compute(*parts, scheduler="processes") == (98.0,) * 10
            assert a.sum() == 980
    """
    program(tmp_path, code, name)


def test_dask_tells_arrays_apart(name):
    """By their elements, as plain ones."""
    da = pytest.importorskip("dask.array")
    old = sharr.put(name, np.arange(8.0))
    new = sharr.put(name, np.ones(8), replace=True)
    sharr.delete(name)
    private = sharr.put(name, np.arange(8.0) + 1)
    pairs = [(old, new), (old[4:], old[:4]), (old[1:], new[1:]), (sharr.attach(name, "c"), old)]
    pairs.append(pickle.loads(pickle.dumps((private[:4], private[4:]))))
    for one, other in pairs:
        found = da.from_array(one, chunks=3) - da.from_array(other, chunks=3)
        assert (found.compute() == np.asarray(one) - np.asarray(other)).all()


def test_pandas(name):
    pandas = pytest.importorskip("pandas")
    a = sharr.put(name, np.arange(12.0).reshape(3, 4))
    assert pandas.DataFrame(a).shape == (3, 4)
    frame = pandas.DataFrame(a, columns=list("abcd"), copy=False)
    a[0, 0] = 7
    assert frame.loc[0, "a"] == 7 and np.shares_memory(frame["a"].to_numpy(), a)
    assert frame.sum().tolist() == a.sum(0).tolist()
    assert type((frame + 1).to_numpy()) is np.ndarray
    assert pandas.Series(a[0]).groupby(np.array([0, 0, 1, 1])).sum().tolist() == [8, 5]


def test_xarray(name):
    xarray = pytest.importorskip("xarray")
    a = sharr.put(name, np.arange(12.0).reshape(3, 4))
    x = xarray.DataArray(a, dims=("x", "y"))
    a[0, 0] = 7
    assert x.name is None and x.to_dataset(name="v")["v"].shape == (3, 4)
    assert float(x[0, 0]) == 7 and x.mean("x").shape == (4,) and (x + x).sum() == 2 * a.sum()


def test_scipy(name):
    pytest.importorskip("scipy")
    from scipy import fft, linalg, ndimage, sparse

    a = sharr.put(name, np.arange(9.0).reshape(3, 3) + np.eye(3))
    assert np.allclose(linalg.inv(a) @ a, np.eye(3))
    assert np.allclose(fft.ifft(fft.fft(a)).real, a)
    assert ndimage.gaussian_filter(a, 1).shape == a.shape
    assert sparse.csr_matrix(a).sum() == a.sum()


def test_numba(name):
    numba = pytest.importorskip("numba")
    a = sharr.put(name, np.arange(10.0))

    @numba.njit
    def double(x):
        for i in range(len(x)):
            x[i] *= 2
        return x.sum()

    assert double(a) == 90 and a.tolist() == (np.arange(10.0) * 2).tolist()
    assert double(a[::2]) == 80


@pytest.mark.parametrize("order", ["contourpy, sharr", "sharr, contourpy"])
def test_exceptions_of_another_module_in_cpp(name, tmp_path, order):
    """Ours has a standard library of its own: what either throws, the other must not catch."""
    pytest.importorskip("contourpy")
    code = f"""
        import ctypes, sys
        import {order}
        uncaught = ctypes.CDLL("libstdc++.so.6")["_ZSt19uncaught_exceptionsv"]
        name = sys.argv[1]
        for call in [lambda: contourpy.contour_generator(z=[[0, 1], [2, 3]]).filled(2, 1),
                     lambda: sharr.info(name), lambda: sharr.list(name)] * 3:
            try:
                call()
            except (ValueError, FileNotFoundError):
                assert uncaught() == 0, uncaught()
            else:
                raise AssertionError
    """
    program(tmp_path, code, name)
