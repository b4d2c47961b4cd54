"""The one door to TensorLy: every array operation of the core passes here.

TensorLy's ``tl.xyz`` functions run under a *global* backend that users switch and that
importing other packages may flip; under the wrong one some return NumPy arrays without a
word, and autograd's threads do not see a thread-local choice. So the functions below ask
TensorLy for the backend *object* that belongs to the array at hand and call that. The
global choice is neither read nor written.
"""

import math
import sys
from collections.abc import Callable, Collection, Sequence
from functools import lru_cache
from threading import Lock
from types import ModuleType
from typing import Any, TypeAlias

import numpy as np
from tensorly.backend import BackendManager

from ._errors import BackendError

__all__ = [
    "Array",
    "add_rows",
    "backend_name",
    "batched",
    "component",
    "concatenate",
    "diagonal",
    "dtype_name",
    "eps",
    "exp",
    "eye",
    "floats",
    "fold",
    "from_dlpack",
    "index_like",
    "is_dense",
    "is_real_floating",
    "itemsize",
    "largest",
    "largest_number",
    "leading",
    "like",
    "lists",
    "max_abs",
    "mode_product",
    "moveaxis",
    "multi_mode_product",
    "norm",
    "norms",
    "qr",
    "reshape",
    "shape",
    "sigmoid",
    "sign",
    "softplus",
    "square_norm",
    "sum_last",
    "svd",
    "svd_both",
    "take",
    "tensordot",
    "to_numpy",
    "total",
    "transpose",
    "unfold",
    "value_and_gradient",
    "vdot",
    "vdots",
    "zeros",
]

Array: TypeAlias = Any
"""An array of any of TensorLy's backends; there is no common static type."""

# Top-level module of the array's class -> TensorLy's name for it.
_BACKENDS = {"numpy": "numpy", "torch": "pytorch", "jax": "jax", "jaxlib": "jax", "cupy": "cupy"}

_EPS = {"float16": 2.0**-10, "bfloat16": 2.0**-7, "float32": 2.0**-23, "float64": 2.0**-52}
_REAL = set(_EPS)
# The smallest normal numbers.
_TINY = {
    "float16": 2.0**-14,
    "bfloat16": 2.0**-126,
    "float32": 2.0**-126,
    "float64": 2.0**-1022,
}
_LARGEST = {
    "float16": 65504.0,
    "bfloat16": (2.0 - 2.0**-7) * 2.0**127,
    "float32": (2.0 - 2.0**-23) * 2.0**127,
    "float64": sys.float_info.max,
}
# LAPACK has no half precision: QR and SVD of these run in float32.
_HALF = {"float16", "bfloat16"}


@lru_cache(maxsize=256)
def _name_of(kind: type) -> str:
    if issubclass(kind, np.ma.MaskedArray):
        raise BackendError(
            "expected an array without a mask, which would be ignored, got a masked one; pass the "
            "entries that are known to geotucker.completion, or fill it"
        )
    if issubclass(kind, np.matrix):
        raise BackendError(
            "expected an array, got numpy.matrix, whose products and shapes differ; convert it "
            "with numpy.asarray"
        )
    for base in kind.__mro__:
        name = _BACKENDS.get(base.__module__.partition(".")[0])
        if name is not None and hasattr(kind, "dtype"):  # torch.nn.Module is no array
            return name
    raise BackendError(
        f"expected an array of NumPy, PyTorch, JAX or CuPy, got {kind.__module__}.{kind.__name__}; "
        "convert it first, for instance with numpy.asarray"
    )


_LOADING = Lock()


@lru_cache(maxsize=8)
def _load(name: str) -> Any:
    """Return TensorLy's backend object called `name`, without side effects on the process."""
    if name != "jax":
        return BackendManager.load_backend(name)
    # Importing TensorLy's JAX backend turns on 64-bit mode for the whole process. A thread that
    # came in between would take that for the users' choice.
    config = sys.modules["jax"].config
    with _LOADING:
        x64 = config.jax_enable_x64
        backend = BackendManager.load_backend(name)
        config.update("jax_enable_x64", x64)
    return backend


def backend_name(array: Array) -> str:
    """Return TensorLy's name of the library that `array` belongs to.

    Raises
    ------
    BackendError
        For what is no array, and for an array of CuPy that is not on the current device: there
        CuPy computes, wherever its arrays are.
    """
    kind: type = type(array)
    name = _name_of(kind)
    if name == "cupy":
        _check_current(array)
    return name


def _check_current(array: Array) -> None:
    current = sys.modules["cupy"].cuda.Device().id
    if array.device.id != current:
        raise BackendError(
            f"expected an array on the current CUDA device, {current}, got one on device "
            f"{array.device.id}; compute within `with array.device:`, or move the array"
        )


def _backend(array: Array) -> Any:
    return _load(backend_name(array))


def dtype_name(array: Array) -> str:
    """Return the dtype as a plain word: ``"float32"`` for any library's float32."""
    return _word(array.dtype)


@lru_cache(maxsize=64)  # NumPy takes longer to spell a dtype than to add two small arrays
def _word(dtype: Any) -> str:
    return str(dtype).rpartition(".")[2]


def is_dense(array: Array) -> bool:
    """Tell whether all entries are stored, unlike those of PyTorch's sparse layouts."""
    return str(getattr(array, "layout", "torch.strided")) == "torch.strided"


def is_real_floating(array: Array) -> bool:
    """Tell whether the dtype is a real floating one."""
    return dtype_name(array) in _REAL


def itemsize(array: Array) -> int:
    """Return the bytes that one entry takes."""
    return int(array.dtype.itemsize)


def shape(array: Array) -> tuple[int, ...]:
    """Return the shape as a tuple of Python integers."""
    return tuple(map(int, array.shape))


def reshape(array: Array, new_shape: Sequence[int]) -> Array:
    """Return `array` in another shape, C order."""
    return _backend(array).reshape(array, tuple(new_shape))


def moveaxis(array: Array, source: int, destination: int) -> Array:
    """Move one axis to another place."""
    order = _order(len(array.shape), source, destination)
    return array if order is None else _backend(array).transpose(array, order)


@lru_cache(maxsize=256)  # NumPy's moveaxis takes longer to find the order than small arrays to add
def _order(axes: int, source: int, destination: int) -> tuple[int, ...] | None:
    """Return the axes in their new order, or None if it is the old one."""
    order = list(range(axes))
    order.insert(range(axes)[destination], order.pop(source))
    return None if source % axes == destination % axes else tuple(order)


def tensordot(a: Array, b: Array, axes: tuple[Sequence[int], Sequence[int]]) -> Array:
    """Contract axes of `a` with axes of `b`."""
    return _backend(a).tensordot(a, b, axes=(list(axes[0]), list(axes[1])))


def concatenate(arrays: Sequence[Array], axis: int) -> Array:
    """Join arrays along an existing axis."""
    return _backend(arrays[0]).concatenate(list(arrays), axis=axis)


def zeros(new_shape: Sequence[int], like: Array) -> Array:
    """Return zeros with the library, dtype and device of `like`, outside any autograd graph."""
    backend = _backend(like)
    context = backend.context(like)
    context.pop("requires_grad", None)  # TensorLy would make the zeros trainable
    return backend.zeros(tuple(new_shape), **context)


def eye(size: int, like: Array) -> Array:
    """Return the identity matrix with the library, dtype and device of `like`."""
    backend = _backend(like)
    context = backend.context(like)
    context.pop("requires_grad", None)
    return backend.eye(size, **context)


def eps(array: Array) -> float:
    """Return the distance from 1 to the next number of the array's dtype."""
    return _EPS[dtype_name(array)]


def largest_number(array: Array) -> float:
    """Return the largest finite number of the array's dtype."""
    return _LARGEST[dtype_name(array)]


def leading(array: Array, extents: Sequence[int], skip: int | None = None) -> Array:
    """Return the leading entries of every mode but `skip`: the first ``extents[i]`` of them."""
    cuts = [slice(None) if mode == skip else slice(n) for mode, n in enumerate(extents)]
    return array[tuple(cuts)]


def transpose(matrix: Array) -> Array:
    """Return the transpose of a matrix, or of each of a stack along the first axis."""
    return moveaxis(matrix, -1, -2)


def sign(array: Array) -> Array:
    """Entry-wise sign."""
    return _backend(array).sign(array)


def diagonal(matrix: Array) -> Array:
    """Return the main diagonal of a square matrix, or of each of a stack."""
    identity = eye(shape(matrix)[-1], like=matrix)
    return _backend(matrix).sum(matrix * identity, axis=-1)


def like(values: Any, reference: Array) -> Array:
    """Return host values as an array with the library, dtype and device of `reference`."""
    backend = _backend(reference)
    context = backend.context(reference)
    context.pop("requires_grad", None)
    return backend.tensor(np.asarray(values), **context)


def index_like(numbers: "np.ndarray[Any, np.dtype[Any]]", reference: Array) -> Array:
    """Return host integers as an index array for arrays like `reference`."""
    backend = _backend(reference)
    device = {"device": reference.device} if backend_name(reference) == "pytorch" else {}
    return backend.tensor(numbers, dtype=None, **device)


def take(array: Array, index: Array) -> Array:
    """Return the slices ``array[index]`` of the first axis, in the shape of `index`."""
    if backend_name(array) == "pytorch":
        return array[index]
    return array.take(index, axis=0)  # NumPy's array[index] takes ten times as long


def add_rows(rows: Array, owners: Array, size: int) -> Array:
    """Return a matrix of `size` rows, each the sum of the `rows` that it owns.

    The owners ascend. (TensorLy has no scatter-add; each library has one of its own.)
    """
    name = backend_name(rows)
    result = zeros((size, shape(rows)[1]), like=rows)
    if name == "pytorch":
        return result.index_add(0, owners, rows)
    if name == "jax":
        return result.at[owners].add(rows)
    if name == "cupy":
        sys.modules["cupy"].add.at(result, owners, rows)
        return result
    present, starts = np.unique(owners, return_index=True)
    result[present] = np.add.reduceat(rows, starts, axis=0)
    return result


def exp(array: Array) -> Array:
    """Entry-wise exponential; infinite, without a warning, where it overflows."""
    with np.errstate(over="ignore"):
        return _backend(array).exp(array)


def softplus(array: Array) -> Array:
    """Entry-wise ``log(1 + exp(x))``, without overflow."""
    backend = _backend(array)
    size = backend.abs(array)
    return 0.5 * (array + size) + backend.log(1.0 + backend.exp(-size))


def sigmoid(array: Array) -> Array:
    """Entry-wise ``1 / (1 + exp(-x))``, without overflow."""
    return 0.5 + 0.5 * _backend(array).tanh(0.5 * array)


def sum_last(array: Array) -> Array:
    """Sum over the last axis."""
    return _backend(array).sum(array, axis=-1)


def total(array: Array) -> float:
    """Return the sum of all entries."""
    return float(_backend(array).sum(array).item())


def value_and_gradient(function: Callable[[Array], Array], array: Array) -> tuple[float, Array]:
    """Return a scalar function's value and gradient by the automatic differentiation at hand.

    Raises
    ------
    BackendError
        If the library of `array` has none.
    """
    name = backend_name(array)
    if name == "pytorch":
        torch = sys.modules["torch"]
        with torch.enable_grad():
            leaf = array.detach().requires_grad_(True)
            value, gradient = function(leaf), None
            if torch.is_tensor(value) and value.requires_grad:
                (gradient,) = torch.autograd.grad(value, leaf, allow_unused=True)
            if gradient is None:
                raise BackendError(
                    "function: expected a scalar that PyTorch computed from the tensor, got "
                    f"{type(value).__name__} without a graph to it; was it detached or rounded?"
                )
        return float(value.detach()), gradient
    if name == "jax":
        value, gradient = sys.modules["jax"].value_and_grad(function)(array)
        return float(value), gradient
    raise BackendError(
        f"automatic differentiation: expected arrays of PyTorch or JAX, got {name}; convert the "
        "start, or give the gradient yourself"
    )


def max_abs(array: Array, axis: int | None = None) -> Array:
    """Largest magnitude, along an axis or (as a Python float, 0 for none) of all entries.

    A float is a question to the device: see `floats` for many.

    NaN propagates on every backend, so a finite result proves that every entry is finite.
    """
    if axis is None:
        return largest([array])[0]
    backend = _backend(array)
    return backend.max(backend.abs(array), axis=axis)


def largest(arrays: Sequence[Array]) -> list[float]:
    """Return `max_abs` of each array, with one question to the device."""
    found = [0.0] * len(arrays)
    full = [index for index, array in enumerate(arrays) if 0 not in shape(array)]
    scalars = [_backend(arrays[i]).max(_backend(arrays[i]).abs(arrays[i])) for i in full]
    for index, value in zip(full, floats(scalars), strict=True):
        found[index] = value
    return found


def norm(array: Array) -> float:
    """Frobenius norm, safe against overflow and underflow of the squares."""
    return norms([array])[0]


def square_norm(array: Array) -> float:
    """Square of the Frobenius norm; infinite where it leaves the range of float64."""
    root = norm(array)
    return root * root  # root**2 would raise OverflowError


def norms(arrays: Sequence[Array]) -> list[float]:
    """Return `norm` of each array, with one question to the device."""
    found = [0.0] * len(arrays)
    full = [index for index, array in enumerate(arrays) if 0 not in shape(array)]
    parts = [_scaled(arrays[index]) for index in full]
    squares = [_backend(scaled).sum(scaled * scaled) for scaled, _ in parts]
    numbers = floats([*(scale for _, scale in parts), *squares])
    for index, scale, square in zip(full, numbers, numbers[len(full) :], strict=False):
        found[index] = scale * math.sqrt(square)
    return found


def _scaled(array: Array) -> tuple[Array, Array]:
    """Return an array divided by about its largest magnitude, and that; both on the device."""
    backend = _backend(array)
    if dtype_name(array) in _HALF:  # sums of many squares would overflow
        array = _cast(array, backend.float32)
    scale = as_divisor(backend.max(backend.abs(array)))
    return array / scale, scale


def as_divisor(magnitudes: Array) -> Array:
    """Return magnitudes by which may be divided: zero becomes tiny, and the largest a quarter."""
    # XLA multiplies by reciprocals, which have to be normal numbers.
    tiny = _TINY[dtype_name(magnitudes)]
    return _backend(magnitudes).clip(magnitudes, tiny, 1.0 / tiny)


def component(a: Array, b: Array) -> Array:
    """Return ``<a, b> / ||a||``, still on the device; 0 if a is zero.

    Safe against overflow and underflow of the squares of a.
    """
    backend = _backend(a)
    scaled, _ = _scaled(a)
    squares = backend.sum(scaled * scaled)
    return backend.sum(scaled * b) / backend.sqrt(squares + (squares == 0))


def vdot(a: Array, b: Array) -> float:
    """Euclidean inner product of two arrays of one shape, safe against overflow and underflow.

    It may leave the range of the arrays' dtype, and is infinite where it leaves that of float64.
    """
    return vdots([(a, b)])[0]


def vdots(pairs: Sequence[tuple[Array, Array]]) -> list[float]:
    """Return `vdot` of each pair, with one question to the device."""
    parts = [(_scaled(a), _scaled(b)) for a, b in pairs]
    sums = [_backend(a).sum(a * b) for (a, _), (b, _) in parts]
    numbers = floats([*sums, *(scale for pair in parts for _, scale in pair)])
    scales = numbers[len(parts) :]
    return [x * y * z for x, y, z in zip(numbers, scales[::2], scales[1::2], strict=False)]


def to_numpy(array: Array) -> "np.ndarray[Any, np.dtype[Any]]":
    """Copy to a NumPy array on the host; bfloat16, which NumPy lacks, becomes float32."""
    if dtype_name(array) == "bfloat16":
        array = _cast(array, _backend(array).float32)
    return np.asarray(_backend(array).to_numpy(array))


def from_dlpack(array: Array, library: ModuleType) -> Array:
    """Return the array of another library over the same memory.

    Raises
    ------
    BackendError
        If the library cannot share it.
    """
    name = backend_name(array)
    what = f"{library.__name__} cannot share this {dtype_name(array)} array of {name}"
    if name in ("numpy", "cupy") and any(step < 0 for step in array.strides):
        # torch.from_dlpack would end the process.
        raise BackendError(f"{what}: a stride is negative; copy the array first")
    if name == "numpy" and library is not np and not array.flags.writeable:
        # PyTorch would write to it all the same.
        raise BackendError(f"{what}: it is read-only; copy it first")
    try:
        shared = library.from_dlpack(array)
    except (AssertionError, BufferError, RuntimeError, TypeError, ValueError) as error:
        # The assertion is PyTorch's, where it was built without CUDA.
        place = getattr(array, "device", "the host")
        raise BackendError(
            f"{what} on {place}: {str(error).splitlines()[0]} (nothing is moved between devices, "
            "cast or detached; do that first)"
        ) from error
    if dtype_name(shared) != dtype_name(array):
        raise BackendError(
            f"{what}: it would become {dtype_name(shared)}; in JAX, 64 bits are enabled by "
            'jax.config.update("jax_enable_x64", True)'
        )
    return shared


def _cast(array: Array, dtype: Any) -> Array:
    # TensorLy's tensor() would detach PyTorch's from their graph.
    return array.to(dtype) if backend_name(array) == "pytorch" else array.astype(dtype)


def floats(scalars: Sequence[Array]) -> list[float]:
    """Return numbers on a device, arrays of order 0, as Python's: see `lists`."""
    if len(scalars) < 2 or backend_name(scalars[0]) == "numpy":
        return [float(scalar.item()) for scalar in scalars]  # a tenth of the time, on the host
    return [value for (value,) in lists([reshape(scalar, (1,)) for scalar in scalars])]


def lists(vectors: Sequence[Array]) -> list[list[float]]:
    """Return vectors on a device as lists of Python's numbers, with one question to each device.

    Every question makes the host wait for the device.
    """
    groups: dict[Any, list[int]] = {}
    for index, vector in enumerate(vectors):
        groups.setdefault(_kind(vector)[1:], []).append(index)
    found: list[list[float]] = [[]] * len(vectors)
    for members in groups.values():
        values = concatenate([vectors[index] for index in members], 0).tolist()
        for index in members:
            (size,) = shape(vectors[index])
            found[index], values = values[:size], values[size:]
    return found


def batched(
    function: Callable[..., tuple[Array, ...]], rows: Sequence[tuple[Array, ...]]
) -> list[tuple[Array, ...]]:
    """Apply a function of matrices to every row of them, at once to all rows of like shapes.

    Many small matrices cost little more than one then, where a device is slow to start and quick
    to compute.

    Parameters
    ----------
    function : callable
        Takes matrices, or stacks of them along a first axis, and returns matrices likewise.
    rows : sequence of tuples of arrays
        The arguments of each call.

    Returns
    -------
    list of tuples of arrays
        What the function returns for each row.
    """
    groups: dict[Any, list[int]] = {}
    for index, row in enumerate(rows):
        groups.setdefault(tuple(map(_kind, row)), []).append(index)
    results: list[tuple[Array, ...]] = [()] * len(rows)
    for members in groups.values():
        if len(members) == 1:
            results[members[0]] = function(*rows[members[0]])
            continue
        columns = zip(*(rows[index] for index in members), strict=True)
        stacks = function(*(_stack(column) for column in columns))
        for place, index in enumerate(members):
            results[index] = tuple(stack[place] for stack in stacks)
    return results


def _kind(array: Array) -> tuple[Any, ...]:
    """Return what arrays have in common that can be stacked."""
    return shape(array), dtype_name(array), str(getattr(array, "device", ""))


def _stack(arrays: Sequence[Array]) -> Array:
    return _backend(arrays[0]).stack(list(arrays), axis=0)


def qr(matrix: Array) -> tuple[Array, Array]:
    """Reduced QR decomposition by Householder reflections, of a matrix or of each of a stack.

    Q is orthonormal to rounding even if `matrix` is rank-deficient or zero.
    """
    backend = _backend(matrix)
    if dtype_name(matrix) in _HALF:
        q, r = backend.qr(_cast(matrix, backend.float32))
        return _cast(q, matrix.dtype), _cast(r, matrix.dtype)
    q, r = backend.qr(matrix)
    return q, r


def svd(matrix: Array) -> tuple[Array, Array]:
    """Left singular vectors and singular values, descending, of a matrix or of each of a stack.

    A wide matrix is first reduced by a QR decomposition of its transpose, which costs
    far less than the SVD and, unlike the Gram matrix, keeps small singular values exact. In
    single precision the Gram matrix in double precision is as exact, and faster: its error of
    eps_64 ||A||^2 is one of 1e-8 ||A|| in the singular values, where float32 has 1e-7 ||A||.
    """
    backend = _backend(matrix)
    if dtype_name(matrix) in _HALF:
        u, s = svd(_cast(matrix, backend.float32))
        return _cast(u, matrix.dtype), s
    rows, columns = shape(matrix)[-2:]
    if columns > rows and dtype_name(matrix) == "float32" and backend_name(matrix) != "jax":
        return _svd_by_gram(matrix)  # JAX has no float64 unless its users ask for it
    if columns > rows:
        matrix = transpose(backend.qr(transpose(matrix))[1])
    u, s, _ = backend.svd(matrix, full_matrices=False)
    return u, s


def _svd_by_gram(matrix: Array) -> tuple[Array, Array]:
    backend, single = _backend(matrix), matrix.dtype
    matrix = _cast(matrix, backend.float64)
    squares, vectors = backend.eigh(-(matrix @ transpose(matrix)))  # the largest come first
    return _cast(vectors, single), _cast(backend.sqrt(backend.clip(-squares, 0.0)), single)


def svd_both(matrix: Array) -> tuple[Array, Array, Array]:
    """Left and right singular vectors, as columns, and singular values between them."""
    backend = _backend(matrix)
    if dtype_name(matrix) in _HALF:
        u, s, v = svd_both(_cast(matrix, backend.float32))
        return _cast(u, matrix.dtype), s, _cast(v, matrix.dtype)
    u, s, vt = backend.svd(matrix, full_matrices=False)
    return u, s, transpose(vt)


def unfold(tensor: Array, mode: int) -> Array:
    """Return Mat_i(tensor), the mode-i unfolding, of shape ``(n_i, prod_{j != i} n_j)``."""
    return reshape(moveaxis(tensor, mode, 0), (shape(tensor)[mode], -1))


def fold(matrix: Array, mode: int, new_shape: Sequence[int]) -> Array:
    """Return Ten_i(matrix), the tensor of shape `new_shape` whose mode-i unfolding it is."""
    moved = [new_shape[mode], *new_shape[:mode], *new_shape[mode + 1 :]]
    return moveaxis(reshape(matrix, moved), 0, mode)


def mode_product(tensor: Array, matrix: Array, mode: int, transpose: bool = False) -> Array:
    """Return ``tensor x_mode matrix`` (or its transpose): the matrix applied to one mode."""
    product = tensordot(matrix, tensor, ((0 if transpose else 1,), (mode,)))
    return moveaxis(product, 0, mode)


def multi_mode_product(
    tensor: Array,  # shape: (m_1, ..., m_d)
    matrices: Sequence[Array],  # shapes: (n_i, m_i), or (m_i, n_i) with transpose
    transpose: bool = False,
    skip: Collection[int] = (),
) -> Array:  # shape: (n_1, ..., n_d), with m_i at each i of skip
    """Apply a matrix to every mode that is not in `skip`, the strongest reduction first."""

    def growth(mode: int) -> float:
        rows, columns = shape(matrices[mode])
        return columns / rows if transpose else rows / columns

    modes = [mode for mode in range(len(matrices)) if mode not in skip]
    for mode in sorted(modes, key=growth):
        tensor = mode_product(tensor, matrices[mode], mode, transpose)
    return tensor
