import pickle
from typing import Any, Literal

from numpy import dtype, ndarray
from typing_extensions import Self

class UnpicklingError(pickle.UnpicklingError):
    errno: int
    strerror: str
    filename: str
    def __init__(self, errno: int, strerror: str, filename: str) -> None: ...

class Array(ndarray[Any, dtype[Any]]):
    @property
    def name(self) -> str | None: ...
    @property
    def filename(self) -> str | None: ...
    @property
    def offset(self) -> int | None: ...
    @property
    def mode(self) -> Literal["r", "r+", "c"] | None: ...
    def flush(self) -> None: ...
    # NumPy's own say that they return plain arrays.
    def __iadd__(self, other: Any, /) -> Self: ...  # type: ignore
    def __isub__(self, other: Any, /) -> Self: ...  # type: ignore
    def __imul__(self, other: Any, /) -> Self: ...  # type: ignore
    def __itruediv__(self, other: Any, /) -> Self: ...  # type: ignore
    def __ifloordiv__(self, other: Any, /) -> Self: ...  # type: ignore
    def __imod__(self, other: Any, /) -> Self: ...  # type: ignore
    def __ipow__(self, other: Any, /) -> Self: ...  # type: ignore
    def __imatmul__(self, other: Any, /) -> Self: ...  # type: ignore
    def __ilshift__(self, other: Any, /) -> Self: ...  # type: ignore
    def __irshift__(self, other: Any, /) -> Self: ...  # type: ignore
    def __iand__(self, other: Any, /) -> Self: ...  # type: ignore
    def __ior__(self, other: Any, /) -> Self: ...  # type: ignore
    def __ixor__(self, other: Any, /) -> Self: ...  # type: ignore
