import pickle
from typing import Any, Literal

from numpy import dtype, ndarray

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
