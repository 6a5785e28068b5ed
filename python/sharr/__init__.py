"""Named NumPy arrays shared between processes at memory speed.

An array is a file that holds a valid NPY file: ``shm://a`` is ``/dev/shm/a``,
``file:///data/a.npy`` (or a path, see below) any other. Attaching maps it, so
every process that attaches a name works on the same memory.

A name is ``shm://a``, ``shm://jobs/7/a`` (directories are namespaces),
``file:///data/a.npy``, or short ``a`` for ``shm://a``. A str that begins with
``/`` and every `os.PathLike` is a path. A path on a sharrfs mount stands for
the array behind it.

What `create`, `attach`, `put` and `build` give is an `Array`: an ndarray whose
pickle is a reference, so that multiprocessing, concurrent.futures, joblib and
whatever else pickles hands arrays over without a copy.

Errors are `OSError` with ``errno`` and ``filename``: `FileNotFoundError`,
`FileExistsError`, `PermissionError`, ``ENOSPC`` when the memory is not there.
`ArgumentError` (a name or shape that cannot be) and `FormatError` (no array
under the name) are `OSError` and `ValueError` both. An array that was pickled
and cannot be loaded is an `UnpicklingError`.

>>> import sharr
>>> a = sharr.create("shm://doc/example", (2, 3))
>>> a[:] = 7
>>> b = sharr.attach("shm://doc/example")   # in any process
>>> float(b.sum())
42.0
>>> sharr.delete("shm://doc/example")
"""

import _thread
import contextlib as _contextlib
import itertools as _itertools
import sys as _sys

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
from ._array import Array, UnpicklingError

__all__ = [
    "ArgumentError", "Array", "FormatError", "Info", "MS_ASYNC", "MS_INVALIDATE", "MS_SYNC",
    "UnpicklingError", "attach", "attach_all", "build", "create", "delete", "delete_all", "info",
    "list", "mlock", "msync", "munlock", "put", "put_all", "rename", "wait",
]  # fmt: skip


def create(name, shape, dtype=float, *, order="C", reserve=True, exist_ok=False, huge=None):
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
    huge : bool, optional
        Huge pages. None takes them for arrays of 4 MiB or more where the mount
        of ``/dev/shm`` gives them; True for smaller ones too, and where it does
        not is an error (``EOPNOTSUPP``); False never. Without ``reserve`` the
        mount decides. `info` tells what an array has got.

    Returns
    -------
    Array
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
    return _core.create(name, shape, dtype, order, reserve, exist_ok, huge, None)


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
    Array
        Stays valid when the array is deleted. Its ``base`` has ``name``,
        ``addr`` and ``size`` (bytes), ``msync``, ``mlock`` and ``munlock``.

    Raises
    ------
    FileNotFoundError, PermissionError
    FormatError
        No array, or a truncated one.
    """
    return _core.attach(name, mode, None)


@_contextlib.contextmanager
def build(name, shape, dtype=float, *, order="C", replace=False):
    """Create an array that appears when it is filled: a context manager.

    The block gets the zeroed array, which nobody else sees yet. At its end the
    array is published. If the block raises, or the process dies in it, nothing
    is left. Until then it cannot be pickled: other processes would not find it.

    Parameters
    ----------
    name, shape, dtype, order
        As for `create`.
    replace : bool
        Take the name of an existing array, in one step and with its
        permissions. Whoever has attached the old one keeps it.

    Raises
    ------
    FileExistsError
        The name is taken, now or at the end of the block.
    FormatError
        What was to be replaced is no array.
    OSError
        As `create`.

    Examples
    --------
    >>> with sharr.build("shm://doc/squares", 5, "i8") as a:
    ...     for i in range(5):
    ...         a[i] = i * i
    >>> sharr.attach("shm://doc/squares")
    Array([ 0,  1,  4,  9, 16], name='shm://doc/squares')
    >>> sharr.delete("shm://doc/squares")
    """
    new = _core.NewArray(name, shape, dtype, order, bool(replace))
    try:
        yield new.array()
    except BaseException:
        new.discard()
        raise
    new.publish()


def put(name, array_like, *, replace=False):
    """Copy an array to a new name, where it appears complete.

    Parameters
    ----------
    name : str or os.PathLike
    array_like : array_like
        Copied once, by several threads where that is quicker. An array in
        Fortran order stays so.
    replace : bool
        As for `build`.

    Returns
    -------
    Array

    Raises
    ------
    FileExistsError
        The name is taken. If it was before, nothing was copied.
    TypeError, ValueError
        NumPy makes no array, or one of Python objects, of this.
    OSError
        As `create`. ``EFAULT``: what is to be copied, if it is contiguous, is a
        mapped file that has been cut short; cut short meanwhile, SIGBUS.

    Examples
    --------
    >>> a = sharr.put("shm://doc/put", [[1, 2], [3, 4]])
    >>> a.shape
    (2, 2)
    >>> sharr.delete("shm://doc/put")
    """
    if not isinstance(array_like, _np.ndarray):
        _core.check_new(name, bool(replace))  # before it becomes an array, which may cost
    source = _source(array_like)
    if source.flags.forc:
        return _core.put(name, source, bool(replace))
    new = array = None
    try:
        new = _core.NewArray(name, source.shape, source.dtype, _order(source), bool(replace))
        array = new.array()
        _fill(array, source)
        new.publish()
    except BaseException:
        del new, array  # whoever keeps the error keeps this frame, but is to keep no memory by that
        raise
    return array


def _source(array_like):
    if isinstance(array_like, _np.ma.MaskedArray):
        raise TypeError("a mask cannot be shared: put .filled(), or .data and .mask")
    return _np.asarray(array_like)


def _order(source):
    return "F" if source.flags.fnc else "C"


# Below this a thread costs more than it saves.
_BYTES_PER_THREAD = 8 << 20


def _fill(array, source):
    """Copy source, which is not contiguous, into array, of the same shape."""
    parts, numbers, copied, errors, at_work = [], _itertools.count(), [], [], []

    def copy():
        for number in numbers:
            if number >= len(parts):
                return
            parts[number][0][...] = parts[number][1]
            copied.append(number)

    def help_copy(lock):
        try:
            copy()
        except BaseException as error:
            errors.append(error)
        finally:
            lock.release()

    try:
        threads = min(_core.available_processors(), array.nbytes // _BYTES_PER_THREAD)
        if threads < 2 or _sys.is_finalizing():
            array[...] = source
            return
        array = array.view(_np.ndarray)
        axis = max(range(array.ndim), key=array.shape.__getitem__)
        array, source = _np.moveaxis(array, axis, 0), _np.moveaxis(source, axis, 0)
        # Several for each thread, so that whoever presses Ctrl-C need not wait for all.
        count = 4 * threads
        ends = [array.shape[0] * i // count for i in range(count + 1)]
        parts += [(array[start:end], source[start:end]) for start, end in zip(ends, ends[1:])]
        for _ in range(threads - 1):
            lock = _thread.allocate_lock()
            lock.acquire()
            try:
                _thread.start_new_thread(help_copy, (lock,))
            except RuntimeError as error:  # too many processes
                if error.__traceback__.tb_next is not None:
                    raise  # a signal handler's
                break
            at_work.append(lock)
        copy()
        for lock in at_work:
            while not lock.acquire(timeout=0.1):
                if len(copied) == count or errors:
                    break  # it has not begun, and will find nothing left
        del errors[1:]
        if len(copied) < count:
            raise errors.pop() if errors else MemoryError
    finally:
        array = source = None  # see put()
        parts.clear()  # nobody begins another one


def wait(name, timeout=None, mode="r+"):
    """Attach an array as soon as it is published, which may be now.

    Parameters
    ----------
    name : str or os.PathLike
    timeout : float, optional
        Seconds. None waits for ever.
    mode : {"r+", "r", "c"}
        As for `attach`.

    Returns
    -------
    Array

    Raises
    ------
    TimeoutError
    PermissionError, OSError
        As `attach`, except that what is no array may become one.

    Examples
    --------
    >>> sharr.wait("shm://doc/nothing", timeout=0)
    Traceback (most recent call last):
        ...
    TimeoutError: [Errno 110] no such array within the time given: 'shm://doc/nothing'
    """
    return _core.wait(name, timeout, mode)


def rename(name, new_name, *, replace=False):
    """Give an array another name, in one step.

    Parameters
    ----------
    name, new_name : str or os.PathLike
        On the same file system. Missing namespaces under ``shm://`` are made.
    replace : bool
        Take the name of an existing array; whoever has attached it keeps it.

    Raises
    ------
    FileNotFoundError, PermissionError, FormatError
    FileExistsError
        The new name is taken.
    OSError
        ``EXDEV``: the new name is on another file system.
    """
    _core.rename(name, new_name, bool(replace))


def put_all(where, arrays):
    """Copy arrays to a new namespace, which appears with all of them.

    Parameters
    ----------
    where : str or os.PathLike
        ``shm://run7/``, or a directory. May exist if it is empty, and keeps its
        owner and permissions as far as this process may give them.
    arrays : mapping of str to array_like
        By their names in it, ``"sub/x"`` in a namespace in it. Each takes a
        file descriptor until all are published, of which a process has 1024
        unless ``ulimit -n`` says otherwise.

    Returns
    -------
    dict of str to Array

    Raises
    ------
    FileExistsError
        The namespace exists. If it did before, nothing was copied.
    TypeError, ValueError, OSError
        As `put`. Nothing is left.

    Examples
    --------
    >>> both = sharr.put_all("shm://doc/run7/", {"x": [1, 2], "y": [0.5]})
    >>> sharr.attach_all("shm://doc/run7/")["x"]
    Array([1, 2], name='shm://doc/run7/x')
    >>> sharr.delete_all("shm://doc/run7/")
    """
    new = _core.NewNamespace(where)
    made = {}
    try:
        for key, value in arrays.items():
            source = _source(value)
            made[key] = new.add(key, source, _order(source))
            if not source.flags.forc:
                _fill(made[key], source)
        new.publish()
    except BaseException:
        del new  # see put()
        made.clear()
        raise
    return made


def attach_all(where, mode="r+"):
    """Map all arrays of a namespace and of those in it.

    Parameters
    ----------
    where : str or os.PathLike
    mode : {"r+", "r", "c"}
        As for `attach`.

    Returns
    -------
    dict of str to Array
        By names relative to the namespace, sorted. All are of one namespace,
        even if it is deleted and put again meanwhile.

    Raises
    ------
    FileNotFoundError, NotADirectoryError, PermissionError
    """
    return dict(_core.attach_all(where, mode))


def delete_all(where):
    """Remove a namespace with all arrays in it; to others it is gone in one step.

    Attached arrays stay valid.

    Raises
    ------
    FileNotFoundError, NotADirectoryError, PermissionError
    OSError
        ``ENOTEMPTY``: something in it is no array. Nothing was removed.
    """
    _core.remove_all(where)


def delete(name, missing_ok=False):
    """Remove an array's name.

    Attached arrays stay valid; the memory goes with the last of them. What is
    no array is not removed, unless this process has it attached, other than in
    mode "c", from when it was one.

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
        ``offset`` (of the data in the file), ``format`` and ``huge``: how many
        bytes of the file are in huge pages. Only this function looks for them.
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
