import builtins
from os import PathLike
from typing import Any, Literal, SupportsIndex

from collections.abc import Sequence
from numpy.typing import DTypeLike, NDArray

from ._core import MS_ASYNC as MS_ASYNC
from ._core import MS_INVALIDATE as MS_INVALIDATE
from ._core import MS_SYNC as MS_SYNC
from ._core import ArgumentError as ArgumentError
from ._core import FormatError as FormatError
from ._core import Info as Info

_Name = str | PathLike[str] | PathLike[bytes]

def create(
    name: _Name,
    shape: SupportsIndex | Sequence[SupportsIndex] | NDArray[Any],
    dtype: DTypeLike = ...,
    *,
    order: Literal["C", "F"] = ...,
    reserve: bool = ...,
    exist_ok: bool = ...,
) -> NDArray[Any]: ...
def attach(name: _Name, mode: Literal["r", "r+", "c"] = ...) -> NDArray[Any]: ...
def delete(name: _Name, missing_ok: bool = ...) -> None: ...
def info(name: _Name) -> Info: ...
def list(where: _Name = ...) -> builtins.list[Info]: ...
def msync(array: NDArray[Any], flags: int = ...) -> None: ...
def mlock(array: NDArray[Any]) -> None: ...
def munlock(array: NDArray[Any]) -> None: ...
