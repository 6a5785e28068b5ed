import builtins
from os import PathLike
from typing import Any, Literal, SupportsIndex

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from numpy.typing import ArrayLike, DTypeLike, NDArray

from ._core import MS_ASYNC as MS_ASYNC
from ._core import MS_INVALIDATE as MS_INVALIDATE
from ._core import MS_SYNC as MS_SYNC
from ._core import ArgumentError as ArgumentError
from ._core import FormatError as FormatError
from ._core import Info as Info

_Name = str | PathLike[str] | PathLike[bytes]
_Mode = Literal["r", "r+", "c"]

from ._array import Array as Array
from ._array import UnpicklingError as UnpicklingError

def create(
    name: _Name,
    shape: SupportsIndex | Sequence[SupportsIndex] | NDArray[Any],
    dtype: DTypeLike = ...,
    *,
    order: Literal["C", "F"] = ...,
    reserve: bool = ...,
    exist_ok: bool = ...,
    huge: bool | None = ...,
) -> Array: ...
def attach(name: _Name, mode: _Mode = ...) -> Array: ...
def build(
    name: _Name,
    shape: SupportsIndex | Sequence[SupportsIndex] | NDArray[Any],
    dtype: DTypeLike = ...,
    *,
    order: Literal["C", "F"] = ...,
    replace: bool = ...,
) -> AbstractContextManager[Array]: ...
def put(name: _Name, array_like: ArrayLike, *, replace: bool = ...) -> Array: ...
def wait(name: _Name, timeout: float | None = ..., mode: _Mode = ...) -> Array: ...
def rename(name: _Name, new_name: _Name, *, replace: bool = ...) -> None: ...
def put_all(where: _Name, arrays: Mapping[str, ArrayLike]) -> dict[str, Array]: ...
def attach_all(where: _Name, mode: _Mode = ...) -> dict[str, Array]: ...
def delete_all(where: _Name) -> None: ...
def delete(name: _Name, missing_ok: bool = ...) -> None: ...
def info(name: _Name) -> Info: ...
def list(where: _Name = ...) -> builtins.list[Info]: ...
def msync(array: NDArray[Any], flags: int = ...) -> None: ...
def mlock(array: NDArray[Any]) -> None: ...
def munlock(array: NDArray[Any]) -> None: ...
