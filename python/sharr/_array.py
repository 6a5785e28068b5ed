"""The array class. It follows `numpy.memmap`, but keeps no state of its own.

What an Array stands on is found by its ``base``, so that a view costs no more
than NumPy's. The two methods that every operation may call are in C.
"""

import errno
import pickle
import sys

import numpy as np

from . import _core


class UnpicklingError(pickle.UnpicklingError):
    """An array that was pickled is not there, is another one by now, or was forged.

    No `OSError`, though it has one's attributes ``errno`` (``ENOENT``: deleted
    or renamed since, or out of this process's sight; ``ESTALE``: replaced;
    ``EINVAL``: forged), ``strerror`` and ``filename``: `multiprocessing.Pool`
    takes an OSError for the end of its pipe, and would wait for ever without a
    word.
    """

    def __init__(self, number, strerror, filename):
        super().__init__(number, strerror, filename)
        self.errno, self.strerror, self.filename = number, strerror, filename

    def __str__(self):
        return f"[Errno {self.errno}] {self.strerror}: {self.filename!r}"


def _asked_by(*packages):
    """Whether code of one of these asks for the attribute whose getter calls this."""
    try:
        asking = sys._getframe(2).f_globals.get("__name__", "")
    except ValueError:  # nothing in Python does
        return False
    return asking.partition(".")[0] in packages


class Array(np.ndarray):
    """A NumPy array on the memory of a named array.

    Made by `sharr.create`, `sharr.attach` and others. A view of it is one too
    and keeps the memory; whatever does not share the memory is a plain
    `numpy.ndarray`. `pickle` takes an Array by reference: loading it, in this
    process or another one, gives an Array on the same memory. In mode "c" it is
    copied, as plain ndarrays on the memory are.

    Attributes
    ----------
    name : str or None
        The URI, ``shm://jobs/7/a`` or ``file:///data/a.npy``. None if the
        memory is no named array's, as that of ``numpy.empty_like(array)``.
    mode : {"r", "r+", "c"} or None
        As `sharr.attach` has it.
    filename : str or None
        The path of the file, as `numpy.memmap` has it.
    offset : int or None
        Where the array's data begins in the file, in bytes; that of a view is
        the array's, as with `numpy.memmap`.
    """

    __slots__ = ()
    __array_priority__ = -100.0  # as numpy.memmap: the other operand decides

    def __new__(cls, *args, **kwargs):
        raise TypeError("use sharr.create, sharr.attach or sharr.put")

    @property
    def name(self):
        # To pandas an array that has a name is a column, to xarray a variable of that name. They
        # are to see what they see of a memmap.
        if _asked_by("pandas", "xarray"):
            return None
        mapping = _core.mapping(self)
        return mapping and mapping._uri

    @property
    def mode(self):
        mapping = _core.mapping(self)
        return mapping and mapping._mode

    @property
    def filename(self):
        # Dask takes what a file of that name holds, and when it was written, for what a memmap
        # holds. It is to see a plain array, of whose elements it makes a key.
        if _asked_by("dask"):
            raise AttributeError("filename")
        mapping = _core.mapping(self)
        return mapping and mapping._path

    @property
    def offset(self):
        mapping = _core.mapping(self)
        return mapping and mapping._offset

    @property
    def _mmap(self):  # what tells those who know memmap whether two are on one mapping
        return _core.mapping(self)

    def flush(self):
        """Write changes to the file; see msync(2). Nothing for arrays in /dev/shm."""
        mapping = _core.mapping(self)
        if mapping is not None:
            mapping.msync(_core.MS_SYNC)

    def __repr__(self):
        text = np.array_repr(self)
        name = self.name
        return text if name is None else f"{text[:-1]}, name={name!r})"

    def __reduce_ex__(self, protocol):
        mapping = _core.mapping(self)
        if mapping is None or mapping._mode == "c":
            return np.asarray(self).__reduce_ex__(protocol)
        dtype = self.dtype
        if dtype.metadata is None:
            if dtype.names is None and np.dtype(dtype.str) == dtype:
                dtype = dtype.str  # a fifth of the size
            elif dtype == mapping._dtype and not dtype.isalignedstruct:
                dtype = None  # the array's own
        offset = self.__array_interface__["data"][0] - mapping.addr if self.size else 0
        reference = (
            type(self), mapping._uri, mapping._identity, mapping._mode, dtype,
            self.shape, self.strides, offset, self.flags.writeable,
        )  # fmt: skip
        if mapping._built:
            try:
                _load(*reference)
            except UnpicklingError as error:
                raise pickle.PicklingError(
                    f"{mapping._uri}: not published yet, or deleted or replaced since"
                ) from error
        return _load, reference

    def __reduce__(self):
        return self.__reduce_ex__(2)

    def __copy__(self):
        return np.array(self)

    def __deepcopy__(self, memo):
        return np.array(self)


def _load(cls, name, identity, mode, dtype, shape, strides, offset, writeable):
    """The view of an array that was pickled, if it still is the same object.

    Raises
    ------
    UnpicklingError
    """
    try:
        if not (isinstance(cls, type) and issubclass(cls, Array)):
            raise TypeError("not a class of sharr arrays")
        return _core.load(
            cls, name, identity, mode, dtype, shape, strides, offset, bool(writeable)
        )
    except OSError as error:
        raise UnpicklingError(error.errno, error.strerror, error.filename) from None
    except (TypeError, ValueError, OverflowError, RuntimeError, SyntaxError) as error:
        raise UnpicklingError(errno.EINVAL, "damaged or forged reference", name) from error


def _plain(method):
    """The method, giving plain arrays where NumPy would give an Array on other memory."""

    def call(self, *args, **kwargs):
        return _core.plain(method(self, *args, **kwargs))

    call.__name__ = call.__qualname__ = method.__name__
    call.__doc__ = method.__doc__
    return call


for _name in (
    "argmax argmin argpartition argsort astype byteswap choose compress copy dot flatten ravel repeat reshape round"
    " searchsorted take conj conjugate"
).split():  # fmt: skip
    setattr(Array, _name, _plain(getattr(np.ndarray, _name)))

_core.install(Array)
