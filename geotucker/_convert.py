"""From library to library: the same memory, seen as another library's arrays."""

from types import ModuleType
from typing import Any

from . import _ops
from ._errors import BackendError
from ._tensor import TuckerPoint, TuckerTangent, as_fitting, labels

__all__ = ["convert"]


def convert(value: Any, library: ModuleType) -> Any:
    """Return an array, a point or a tangent vector as another library's, without a copy.

    The memory is shared by the DLPack protocol: what is written into one is seen in the other.
    Nothing moves between devices. JAX alone copies, on the host, memory that does not begin at
    a multiple of 64 bytes; its arrays are never to be written to, also as seen by others.

    Parameters
    ----------
    value : array, TuckerPoint, TuckerTangent or other pair
        An array of any dtype, or ``(core, factors)``.
    library : module
        ``numpy``, ``torch``, ``jax.numpy``, ``cupy``, or any with a function ``from_dlpack``.

    Returns
    -------
    array, TuckerPoint or TuckerTangent

    Raises
    ------
    BackendError
        If the library cannot share the memory: it lies on a device that the library does not
        know, it may not be written to (NumPy's read-only arrays, which only NumPy itself takes),
        a stride is negative, the dtype is unknown there (bfloat16 in NumPy, float64 in JAX as
        long as its 64-bit mode is off), or PyTorch would have to differentiate through it.
    ShapeError
        If it is neither an array nor a pair.

    References
    ----------
    https://data-apis.org/array-api/latest/design_topics/data_interchange.html

    Examples
    --------
    >>> import numpy as np, torch, geotucker as gt
    >>> point = gt.testing.random_point((4, 5), (2, 2))
    >>> there = gt.convert(point, torch)
    >>> there.core.dtype
    torch.float64
    >>> gt.convert(there, np).core.ctypes.data == point.core.ctypes.data
    True
    """
    if not isinstance(library, ModuleType) or not hasattr(library, "from_dlpack"):
        got = library.__name__ if isinstance(library, ModuleType) else repr(library)
        raise BackendError(
            "library: expected a module with a function from_dlpack, such as numpy, torch, "
            f"jax.numpy or cupy, got {got}"
        )
    if hasattr(value, "__dlpack__"):
        return _shared(value, library, "value")
    kind = TuckerTangent if isinstance(value, TuckerTangent) else TuckerPoint
    point = as_fitting(tuple(value) if kind is TuckerTangent else value, "value")
    core, *factors = (
        _shared(array, library, part)
        for part, array in zip(labels(point, "value"), (point.core, *point.factors), strict=True)
    )
    return kind(core, tuple(factors))


def _shared(array: _ops.Array, library: ModuleType, name: str) -> _ops.Array:
    try:
        return _ops.from_dlpack(array, library)
    except BackendError as error:
        raise BackendError(f"{name}: {error}") from error.__cause__
