"""Drop-in for the SharedArray package, on sharr's arrays.

The functions of releases 2 and 3, with their arguments, results and errors.
What differs on purpose: memory that is not there is an error and not a crash,
byte order and datetime units are kept, an array appears whole, object dtype is
refused, and ``shm://dir/x`` and ``/dir/x`` (a path) are names too. New programs
use `sharr`, which does more.
"""

import errno as _errno

import numpy as _np

import sharr as _sharr
from sharr._core import MS_ASYNC, MS_INVALIDATE, MS_SYNC, ArrayDesc
from sharr import _core

SharedArray = ArrayDesc  # its name upstream


def _names(name):
    """The name, and what sharr calls it. Upstream's shm_open strips leading slashes."""
    if type(name) is not str:
        if not isinstance(name, str):
            raise TypeError(f"name must be str, not {type(name).__name__}")
        name = str.__str__(name)
    if "\0" in name:
        raise ValueError("embedded null character")
    if name.startswith(("shm:///", "/")):
        scheme = "" if name.startswith("/") else "shm://"
        below = name[len(scheme):].lstrip("/")
        if scheme or "/" not in below:
            return name, "shm://" + below
    return name, name


def _overlaps(dtype):
    """True for fields that the NPY format cannot describe; as void they can be kept."""
    if dtype.names is None:
        return False  # only they can, and to ask takes a tenth of what creating takes
    try:
        dtype.descr
    except ValueError:
        return not dtype.hasobject
    return False


def _raise(error, name):
    """Raise what upstream raises for an error of sharr's."""
    if isinstance(error, _sharr.FormatError):
        raise OSError("No SharedArray at this address") from error
    number = error.errno
    if number == _errno.EISDIR and not name.startswith(("file://", "/")):
        number = _errno.EINVAL
    raise OSError(number, error.strerror, name) from error


def create(name, shape, dtype=float):
    """Create a zeroed array. Raises FileExistsError, or OSError with errno."""
    name, uri = _names(name)
    dtype = _np.dtype(dtype)
    if dtype.subdtype is not None or _overlaps(dtype):
        dtype = _np.dtype(f"V{dtype.itemsize}")
    if dtype.itemsize == 0:
        raise ValueError("dtype has no size")
    try:
        return _core.create(uri, shape, dtype, "C", True, False, None, name)
    except IsADirectoryError as error:
        raise FileExistsError(_errno.EEXIST, error.strerror, name) from error
    except OSError as error:
        _raise(error, name)


def attach(name, ro=False):
    """Attach an existing array, read-only if asked."""
    name, uri = _names(name)
    try:
        return _core.attach(uri, "r" if ro else "r+", name)
    except OSError as error:
        _raise(error, name)


def delete(name, /):
    """Remove an array's name; attached arrays stay valid."""
    name, uri = _names(name)
    try:
        _core.remove(uri)
    except OSError as error:
        _raise(error, name)


def list():
    """List the arrays in shared memory, as a tuple of ArrayDesc."""
    return _core.describe_all()


def _mapping(array):
    if not isinstance(array, _np.ndarray):
        raise TypeError(f"array must be numpy.ndarray, not {type(array).__name__}")
    mapping = _core.mapping(array)
    if mapping is None:
        raise RuntimeError("the array is not on shared memory")
    return mapping


def msync(array, flags):
    """Write an array's changes to its file; flags as in msync(2)."""
    _mapping(array).msync(flags)


def mlock(array):
    """Keep an array's memory from being swapped out."""
    _mapping(array).mlock()


def munlock(array):
    """Undo mlock."""
    _mapping(array).munlock()
