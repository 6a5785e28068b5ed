"""Named NumPy arrays shared between processes at memory speed.

An array is a file that holds a valid NPY file: ``shm://a`` is ``/dev/shm/a``,
``file:///data/a.npy`` (or a path, see below) any other. Attaching maps it, so
every process that attaches a name works on the same memory.

A name is ``shm://a``, ``shm://jobs/7/a`` (directories are namespaces),
``file:///data/a.npy``, or short ``a`` for ``shm://a``. A str that begins with
``/`` and every `os.PathLike` is a path. A path on a sharrfs mount stands for
the array behind it.

Errors are `OSError` with ``errno`` and ``filename``: `FileNotFoundError`,
`FileExistsError`, `PermissionError`, ``ENOSPC`` when the memory is not there.
`ArgumentError` (a name or shape that cannot be) and `FormatError` (no array
under the name) are `OSError` and `ValueError` both.

>>> import sharr
>>> a = sharr.create("shm://doc/example", (2, 3))
>>> a[:] = 7
>>> b = sharr.attach("shm://doc/example")   # in any process
>>> float(b.sum())
42.0
>>> sharr.delete("shm://doc/example")
"""

import numpy as _np

from ._core import (
    MS_ASYNC,
    MS_INVALIDATE,
    MS_SYNC,
    ArgumentError,
    FormatError,
    Info,
)
from . import _core

__all__ = [
    "ArgumentError", "FormatError", "Info", "MS_ASYNC", "MS_INVALIDATE", "MS_SYNC",
    "attach", "create", "delete", "info", "list", "mlock", "msync", "munlock",
]  # fmt: skip


def create(name, shape, dtype=float, *, order="C", reserve=True, exist_ok=False):
    """Create a zeroed array under a new name.

    The name appears when the array is complete; nobody ever sees less. Missing
    namespaces under ``shm://`` are made.

    Parameters
    ----------
    name : str or os.PathLike
    shape : int or sequence of ints
    dtype : dtype_like
        Any dtype of fixed size; object dtype is a `TypeError`.
    order : {"C", "F"}
    reserve : bool
        Take the memory now. With False the array costs memory as it is
        written, and a write for which there is none kills the process.
    exist_ok : bool
        Return the existing array if its shape, dtype and order agree.

    Returns
    -------
    numpy.ndarray
        Page-aligned, on shared memory.

    Raises
    ------
    FileExistsError
        The name is taken (with ``exist_ok``: by an array that differs).
    OSError
        ``ENOSPC``: the memory is not there. Nothing is left behind.
    ArgumentError
        No such name or shape can be.
    """
    return _core.create(name, shape, dtype, order, bool(reserve), bool(exist_ok))


def attach(name, mode="r+"):
    """Map an existing array.

    Parameters
    ----------
    name : str or os.PathLike
    mode : {"r+", "r", "c"}
        Read and write, read only, or copy on write: changes stay in this
        process. As in `numpy.memmap`.

    Returns
    -------
    numpy.ndarray
        Stays valid when the array is deleted. Its ``base`` has ``name``,
        ``addr`` and ``size`` (bytes), ``msync``, ``mlock`` and ``munlock``.

    Raises
    ------
    FileNotFoundError, PermissionError
    FormatError
        No array, or a truncated one.
    """
    return _core.attach(name, mode)


def delete(name, missing_ok=False):
    """Remove an array's name.

    Attached arrays stay valid; the memory goes with the last of them. What is
    no array is not removed.

    Parameters
    ----------
    name : str or os.PathLike
    missing_ok : bool
        Do nothing if there is no such array.

    Raises
    ------
    FileNotFoundError, PermissionError, FormatError
    """
    try:
        _core.remove(name)
    except FileNotFoundError:
        if not missing_ok:
            raise


def info(name):
    """Tell what an array is without attaching it.

    Returns
    -------
    Info
        With ``name`` (a URI), ``dtype``, ``shape``, ``order``, ``nbytes``,
        ``offset`` (of the data in the file) and ``format``.
    """
    return _core.info(name)


def list(where="shm://"):
    """List the arrays in a directory and the directories below it.

    Parameters
    ----------
    where : str or os.PathLike
        ``shm://``, ``shm://jobs/``, ``file:///dir``.

    Returns
    -------
    list of Info
        Sorted by name. What is no array, or cannot be read, is left out.
    """
    return _core.list(where)


def _mapping(array):
    mapping = _core.mapping(array) if isinstance(array, _np.ndarray) else None
    if mapping is None:
        raise TypeError("not an array that sharr made, nor a view of one")
    return mapping


def msync(array, flags=MS_SYNC):
    """Write an array's changes to its file; see msync(2).

    Arrays in ``/dev/shm`` have no disk behind them and need none of this.
    A view stands for the whole array.
    """
    _mapping(array).msync(flags)


def mlock(array):
    """Keep an array's memory from being swapped out; see mlock(2)."""
    _mapping(array).mlock()


def munlock(array):
    """Undo `mlock`."""
    _mapping(array).munlock()
