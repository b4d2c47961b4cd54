"""A stand-in for CuPy on the processor: as strict as CuPy, and it counts what crosses.

It shows without a GPU that the core gives CuPy nothing but CuPy's arrays, calls nothing that CuPy
lacks, and brings to the host no more than it says. NumPy computes. Where CuPy is lenient at times
(some functions return NumPy's arrays for NumPy's) the stand-in always raises TypeError; what it
offers is held against CuPy itself in ``test_stand_in.py``, where that is installed.
"""

import operator
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
from tensorly.backend import BackendManager
from tensorly.backend.core import Backend, backend_array, backend_basic_math

from geotucker import _ops

DEVICES = 2

# What the core and TensorLy's Tucker tensors call: the parameters that they may use, in CuPy's
# order. NumPy's functions of the same names compute.
FUNCTIONS = {
    "clip": "a a_min a_max",
    "concatenate": "tup axis",
    "dot": "a b",
    "max": "a axis",
    "moveaxis": "a source destination",
    "reshape": "a newshape",
    "stack": "tup axis",
    "sum": "a axis",
    "tensordot": "a b axes",
    "transpose": "a axes",
}
UFUNCS = {"abs": 1, "add": 2, "exp": 1, "log": 1, "sign": 1, "sqrt": 1, "tanh": 1}
CREATION = {"eye": "N M k dtype", "zeros": "shape dtype"}
LINALG = {"eigh": "a", "qr": "a", "svd": "a full_matrices"}
TYPES = ("int32", "int64", "float16", "float32", "float64", "complex64", "complex128")
METHODS = ("astype", "copy", "ravel", "reshape", "sum", "take", "transpose")  # as NumPy's
# TensorLy's backend takes these too when it is loaded; nothing here calls them.
UNUSED = {
    *backend_basic_math,
    *backend_array,
    *("arange", "argmax", "argsort", "conj", "copy", "diag", "flip", "kron", "log2", "mean"),
    *("shape", "sort", "trace"),
} - {*FUNCTIONS, *UFUNCS, *CREATION}
UNUSED_LINALG = ("lstsq", "solve")


class Traffic:
    """Bytes of each copy between host and device."""

    def __init__(self) -> None:
        self.to_host: list[int] = []
        self.to_device: list[int] = []

    @contextmanager
    def counted(self) -> Iterator["Traffic"]:
        """Count from here on."""
        self.to_host, self.to_device = [], []
        yield self


traffic = Traffic()


class Device:
    """A device; the current one within ``with``."""

    current = 0

    def __init__(self, id: int | None = None) -> None:
        self.id = Device.current if id is None else id
        self._before: list[int] = []

    def __enter__(self) -> "Device":
        """Make it the current one."""
        self._before.append(Device.current)
        Device.current = self.id
        return self

    def __exit__(self, *error: object) -> None:
        """Make the one before the current one again."""
        Device.current = self._before.pop()

    def __repr__(self) -> str:
        return f"<CUDA Device {self.id}>"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Device) and other.id == self.id

    def __hash__(self) -> int:
        return self.id


class CUDARuntimeError(RuntimeError):
    """What CuPy raises without a driver."""


class ndarray:  # noqa: N801
    """An array on a device; `_values` is what no user of CuPy could get at."""

    __array_priority__ = 100

    def __init__(self, values: np.ndarray) -> None:
        if values.dtype.kind not in "biufc":
            raise ValueError(f"Unsupported dtype {values.dtype}")
        self._values = values
        self.device = Device()

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        raise TypeError(
            "Implicit conversion to a NumPy array is not allowed. "
            "Please use `.get()` to construct a NumPy array explicitly."
        )

    # CuPy computes NumPy's ufuncs of its arrays on the device; the core should not rely on it.
    __array_ufunc__ = None

    dtype = property(lambda self: self._values.dtype)
    itemsize = property(lambda self: self._values.itemsize)
    nbytes = property(lambda self: self._values.nbytes)
    ndim = property(lambda self: self._values.ndim)
    shape = property(lambda self: self._values.shape)
    size = property(lambda self: self._values.size)
    strides = property(lambda self: self._values.strides)
    T = property(lambda self: _out(self._values.T))

    def get(self) -> np.ndarray:
        """Copy to the host."""
        traffic.to_host.append(self.nbytes)
        return self._values.copy()

    def item(self) -> Any:
        """Return the one entry."""
        return self.get().item()

    def tolist(self) -> Any:
        """Return all entries."""
        return self.get().tolist()

    def __float__(self) -> float:
        return float(self.item())

    def __int__(self) -> int:
        return int(self.item())

    def __bool__(self) -> bool:
        return bool(self.get())

    def __repr__(self) -> str:
        return repr(self.get())

    def __len__(self) -> int:
        return len(self._values)

    def __iter__(self) -> Iterator["ndarray"]:
        return iter([self[i] for i in range(len(self))])

    def __getitem__(self, index: Any) -> "ndarray":
        return _out(_in(self)[_index(index)])

    def __setitem__(self, index: Any, value: Any) -> None:
        _in(self)[_index(index)] = _in(value)

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, self.device.id  # kDLCUDA

    def __dlpack__(self, **options: Any) -> Any:
        raise BufferError("the stand-in has no memory on a device that others could take")


def _operator(name: str) -> Callable[..., Any]:
    reflected = not hasattr(operator, f"__{name}__")
    function = getattr(operator, f"__{name.removeprefix('r') if reflected else name}__")

    def method(self: ndarray, *others: Any) -> Any:
        values = [_in(self), *map(_in, others)]
        return _out(function(*(reversed(values) if reflected else values)))

    return method


_BINARY = ("add", "sub", "mul", "truediv", "pow", "matmul")
for _name in (
    *_BINARY,
    *(f"r{name}" for name in _BINARY),
    *("neg", "abs", "lt", "le", "gt", "ge", "eq", "ne"),
):
    setattr(ndarray, f"__{_name}__", _operator(_name))


def _method(name: str) -> Callable[..., Any]:
    def method(self: ndarray, *args: Any, **kwargs: Any) -> Any:
        function = getattr(_in(self), name)
        return _out(function(*_in(args), **{key: _in(value) for key, value in kwargs.items()}))

    return method


for _name in METHODS:
    setattr(ndarray, _name, _method(_name))
ndarray.__module__ = "cupy"


def _in(value: Any) -> Any:
    """Return what NumPy computes with; NumPy's own arrays are refused."""
    if isinstance(value, ndarray):
        if value.device.id != Device.current:
            raise ValueError(
                "Array device must be same as the current device: array device = "
                f"{value.device.id} while current = {Device.current}"
            )
        return value._values
    if isinstance(value, np.ndarray):
        raise TypeError(f"Unsupported type {type(value)}")
    if isinstance(value, (list, tuple)):
        return type(value)(_in(part) for part in value)
    return value


def _index(index: Any) -> Any:
    return tuple(map(_in, index)) if isinstance(index, tuple) else _in(index)


def _out(value: Any) -> Any:
    """Return arrays of the stand-in; sums and single entries are arrays of order 0, as CuPy's."""
    if isinstance(value, (list, tuple)):
        return tuple(map(_out, value))
    return ndarray(np.asarray(value))


def _arrays(arguments: Sequence[Any]) -> Iterator[ndarray]:
    for argument in arguments:
        if isinstance(argument, (list, tuple)):
            yield from _arrays(argument)
        elif isinstance(argument, ndarray):
            yield argument


def _function(
    computed: Callable[..., Any],
    parameters: str,
    check: Callable[[Sequence[ndarray]], object] | None = None,
) -> Callable[..., Any]:
    """Return CuPy's function of these parameters."""
    names = parameters.split()

    def function(*args: Any, **kwargs: Any) -> Any:
        if len(args) > len(names) or not set(kwargs) <= set(names[len(args) :]):
            raise TypeError(f"{computed.__name__}: the stand-in takes {names}")
        values = {**dict(zip(names, args, strict=False)), **kwargs}
        arrays = list(_arrays(list(values.values())))
        if names[0] in ("a", "tup"):
            given = values[names[0]]
            given = given if names[0] == "tup" else [given]
            if not all(isinstance(one, ndarray) for one in given):
                raise TypeError(f"{computed.__name__}: only CuPy's arrays can be converted")
        if check is not None:
            check(arrays)
        first, *others = map(_in, args)
        with np.errstate(all="ignore"):  # a GPU warns of nothing
            return _out(computed(first, *others, **{k: _in(v) for k, v in kwargs.items()}))

    function.parameters = names  # type: ignore[attr-defined]
    return function


class _Ufunc:
    def __init__(self, name: str) -> None:
        self._ufunc, self.nin = getattr(np, name), UFUNCS[name]

    def __call__(self, *args: Any) -> Any:
        if len(args) != self.nin or not list(_arrays(args)):
            raise TypeError(f"{self._ufunc.__name__}: expected {self.nin} of CuPy's arrays")
        with np.errstate(all="ignore"):
            return _out(self._ufunc(*map(_in, args)))

    def at(self, a: ndarray, indices: ndarray, b: ndarray) -> None:
        """Add in place, which CuPy does for floats and 32-bit integers."""
        if a.dtype not in (np.float16, np.float32, np.float64):
            raise TypeError(f"unsupported dtype {a.dtype}")
        self._ufunc.at(_in(a), _in(indices), _in(b))


def _no_half(arrays: Sequence[ndarray]) -> None:
    if any(array.dtype == np.float16 for array in arrays):
        raise TypeError("float16 is unsupported in linalg")


def _unstable(computed: Callable[..., Any]) -> Callable[..., Any]:
    """Return NaN where NumPy would say that a decomposition fails: cuSOLVER says nothing."""

    def function(a: np.ndarray, **options: Any) -> Any:
        whole = np.isfinite(a).all()
        results = computed(a if whole else np.zeros_like(a), **options)
        return tuple(part if whole else np.full_like(part, np.nan) for part in results)

    function.__name__ = computed.__name__
    return function


def _unused(name: str) -> Callable[..., Any]:
    def function(*args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"the stand-in does not compute {name}")

    return function


def _array(obj: Any, dtype: Any = None, copy: bool = True, *, blocking: bool = False) -> ndarray:
    if isinstance(obj, ndarray):
        values = _in(obj)
        return ndarray(values.astype(dtype or values.dtype, copy=copy))
    if isinstance(obj, (list, tuple)) and list(_arrays(obj)):
        raise TypeError("the stand-in makes no array of lists of arrays")
    values = np.array(obj, dtype=dtype)
    traffic.to_device.append(values.nbytes)
    return ndarray(values)


def _asarray(a: Any, dtype: Any = None) -> ndarray:
    same = isinstance(a, ndarray) and dtype in (None, a.dtype)
    return a if same else _array(a, dtype)


def _asnumpy(a: Any) -> np.ndarray:
    return a.get() if isinstance(a, ndarray) else np.asarray(a)


def _from_dlpack(array: Any) -> ndarray:
    if array.__dlpack_device__()[0] == 1:
        raise TypeError(
            "CPU arrays cannot be directly imported to CuPy. "
            "Use `cupy.array(numpy.from_dlpack(input))` instead."
        )
    return ndarray(_in(array))


def _module() -> ModuleType:
    cupy = ModuleType("cupy")
    offered: dict[str, Any] = {name: getattr(np, name) for name in TYPES}
    offered |= {name: getattr(np, name) for name in ("e", "inf", "nan", "pi")}
    offered |= {name: _unused(name) for name in UNUSED}
    offered |= {name: _function(getattr(np, name), FUNCTIONS[name]) for name in FUNCTIONS}
    offered |= {name: _function(getattr(np, name), CREATION[name]) for name in CREATION}
    offered |= {name: _Ufunc(name) for name in UFUNCS}
    offered |= {"array": _array, "asarray": _asarray, "asnumpy": _asnumpy}
    offered |= {"from_dlpack": _from_dlpack, "ndarray": ndarray}
    linalg: dict[str, Any] = {name: _unused(name) for name in UNUSED_LINALG}
    for name, parameters in LINALG.items():
        check = None if name == "eigh" else _no_half
        linalg[name] = _function(_unstable(getattr(np.linalg, name)), parameters, check)
    runtime = SimpleNamespace(CUDARuntimeError=CUDARuntimeError, getDeviceCount=lambda: DEVICES)
    cuda = SimpleNamespace(Device=Device, runtime=runtime)
    vars(cupy).update(offered, linalg=SimpleNamespace(**linalg), cuda=cuda)
    return cupy


@contextmanager
def installed() -> Iterator[ModuleType]:
    """Put the stand-in where CuPy would be found, and take it away again."""
    names = ("cupy", "cupyx", "cupyx.scipy", "cupyx.scipy.special", "tensorly.backend.cupy_backend")
    modules = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    registries: list[dict[str, Any]] = [
        BackendManager._loaded_backends,
        Backend._available_backends,
    ]
    before = [registry.pop("cupy", None) for registry in registries]
    cupy = _module()
    special = {name: ModuleType(name) for name in names[1:4]}
    special["cupyx"].scipy = special["cupyx.scipy"]  # type: ignore[attr-defined]
    special["cupyx.scipy"].special = special["cupyx.scipy.special"]  # type: ignore[attr-defined]
    sys.modules.update(special, cupy=cupy)
    _ops._load.cache_clear()
    try:
        yield cupy
    finally:
        for name in names:
            sys.modules.pop(name, None)
        sys.modules.update(modules)
        for registry, backend in zip(registries, before, strict=True):
            registry.pop("cupy", None)
            if backend is not None:
                registry["cupy"] = backend
        _ops._load.cache_clear()
