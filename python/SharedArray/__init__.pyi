from typing import Any, NamedTuple, SupportsIndex

from collections.abc import Sequence
from numpy import generic
from numpy.typing import DTypeLike, NDArray

MS_ASYNC: int
MS_INVALIDATE: int
MS_SYNC: int

class ArrayDesc(NamedTuple):
    name: bytes
    dtype: type[generic]
    dims: tuple[int, ...]

SharedArray = ArrayDesc

def create(
    name: str,
    shape: SupportsIndex | Sequence[SupportsIndex] | NDArray[Any],
    dtype: DTypeLike = ...,
) -> NDArray[Any]: ...
def attach(name: str, ro: bool = ...) -> NDArray[Any]: ...
def delete(name: str, /) -> None: ...
def list() -> tuple[ArrayDesc, ...]: ...
def msync(array: NDArray[Any], flags: int) -> None: ...
def mlock(array: NDArray[Any]) -> None: ...
def munlock(array: NDArray[Any]) -> None: ...
