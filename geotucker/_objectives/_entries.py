"""Some entries are observed: completion from a list of coordinates.

Everything is computed slice by slice. The entries of slice i of a mode need one matrix product,
``G_i = sum_k e_k (u_k (x) v_k) = (diag(e) U)^T V`` with the rows u_k, v_k of the other factors, and
so do the predictions, ``p_k = u_k T_i v_k^T``. What sparse formats do with scattered additions is
here done by products of small dense matrices, in all libraries.

Slices differ in their numbers of entries. They are cut into blocks of the mean number, the last one
of each filled up, so that blocks stack: less than twice the entries in all.
"""

import math
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from .. import _ops
from .._errors import BackendError, ShapeError
from .._ops import Array
from .._tensor import TuckerPoint, check_floating
from ._fit import Fit
from ._losses import SQUARED, EntryLoss

__all__ = ["Entries", "completion"]

Host: TypeAlias = "np.ndarray[Any, np.dtype[Any]]"

# Entries whose rows are gathered at a time: their products then stay in a processor's cache.
_CHUNK = 2**14


class _Blocks(NamedTuple):
    """The entries sorted by their index in one mode, in blocks of one slice each."""

    entries: Array  # shape: (blocks, length), positions of entries; the number of all for "none"
    owners: Array  # shape: (blocks,), index in the mode, ascending

    def chunks(self) -> Iterator[tuple[Array, Array]]:
        """Yield entries and owners of some blocks at a time."""
        blocks, length = _ops.shape(self.entries)
        step = max(1, _CHUNK // length)
        for first in range(0, blocks, step):
            some = slice(first, first + step)
            yield self.entries[some], self.owners[some]


def _blocks(rows: Host, like: Array) -> tuple[_Blocks, Host]:
    """Sort the entries with these indices in a mode into blocks; return where each one stands."""
    order = np.argsort(rows, kind="stable")
    owners, counts = np.unique(rows, return_counts=True)
    length = min(-(-len(rows) // len(owners)), _CHUNK)
    each = -(-counts // length)  # blocks of each slice
    first_place = length * (np.cumsum(each) - each)
    within = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
    sorted_places = np.repeat(first_place, counts) + within
    entries = np.full(int(each.sum()) * length, len(rows))
    entries[sorted_places] = order
    places = np.empty_like(order)
    places[order] = sorted_places
    blocks = _Blocks(
        _ops.index_like(entries.reshape(-1, length), like),
        _ops.index_like(np.repeat(owners, each), like),
    )
    return blocks, places


@dataclass(frozen=True, eq=False)
class Entries:
    """The map from a tensor to some of its entries.

    Memory is proportional to the number of entries (about ``2 d`` integers each), and with the
    ranks it grows as the contractions ``n_i prod_{j != i} r_j`` do: nothing is dense. Entries that
    are listed several times count several times.

    Parameters
    ----------
    indices : sequence of d integer arrays, shape (m,)
        Coordinates of the entries, as ``numpy.nonzero`` returns them: ``tensor[indices]`` are the
        entries. A stack of shape (d, m) is one too.
    shape : tuple of int
        Shape (n_1, ..., n_d) of the tensor.
    like : array
        Of the library and device that will compute.

    Raises
    ------
    ShapeError
        If there is not one array for each mode, they differ in length or are empty, or an index
        is outside of the shape.
    BackendError
        If an array does not hold integers, or `like` is not real floating.

    Examples
    --------
    >>> import numpy as np, geotucker as gt
    >>> point = gt.hosvd(np.arange(12.0).reshape(3, 4), 2)
    >>> gt.Entries(([0, 2], [1, 3]), (3, 4), like=point.core).predict(point).round(6).tolist()
    [1.0, 11.0]
    """

    indices: Sequence[Any] = field(repr=False)
    shape: tuple[int, ...]
    like: Array = field(repr=False)
    # Made from these: per mode the index of each entry, with one more for "none", and the blocks.
    _rows: tuple[Array, ...] = field(init=False, repr=False)
    _blocks: tuple[_Blocks, ...] = field(init=False, repr=False)
    # The mode by which predictions go, and where in its blocks each entry stands.
    _mode: int = field(init=False, repr=False)
    _places: Array = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Check the indices and sort the entries."""
        check_floating(self.like, "like")
        hosts = _checked(self.indices, self.shape)
        rows = tuple(_ops.index_like(np.append(host, 0), self.like) for host in hosts)
        blocks, places = zip(*(_blocks(host, self.like) for host in hosts), strict=True)
        # Long blocks make large products: the mode with the fewest of them.
        mode = min(range(len(hosts)), key=lambda i: _ops.shape(blocks[i].owners)[0])
        made = {"indices": hosts, "_rows": rows, "_blocks": blocks, "_mode": mode}
        made["_places"] = _ops.index_like(places[mode], self.like)
        for name, value in made.items():
            object.__setattr__(self, name, value)

    @property
    def observed_shape(self) -> tuple[int, ...]:
        """``(m,)``, the number of entries."""
        return (len(self.indices[0]),)

    def predict(self, point: TuckerPoint) -> Array:
        """Return the entries of a Tucker tensor, shape (m,)."""
        mode = self._mode
        left, right = self._halves(mode)
        slices = _ops.unfold(_ops.mode_product(point.core, point.factors[mode], mode), mode)
        sides = [math.prod(point.ranks[i] for i in half) for half in (left, right)]
        slices = _ops.reshape(slices, (-1, *sides))
        predicted = []
        for entries, owners in self._blocks[mode].chunks():
            u = self._products(point.factors, left, entries)
            v = self._products(point.factors, right, entries)
            p = _ops.sum_last((u @ _ops.take(slices, owners)) * v)
            predicted.append(_ops.reshape(p, (-1,)))
        return _ops.take(_ops.concatenate(predicted, 0), self._places)

    def adjoint(self, weights: Array) -> "_Sparse":
        """Return the tensor with these entries and zeros elsewhere, never formed."""
        none = _ops.zeros((1,), like=weights)
        return _Sparse(self, _ops.concatenate([weights, none], 0))

    def select(self, numbers: Host) -> "Entries":
        """Return the map to the entries at some positions."""
        return Entries([rows[numbers] for rows in self.indices], self.shape, self.like)

    def _halves(self, mode: int) -> tuple[list[int], list[int]]:
        """Split the other modes into the two sides of the matrix products."""
        others = [i for i in range(len(self.shape)) if i != mode]
        return others[: len(others) // 2], others[len(others) // 2 :]

    def _products(
        self,
        factors: Sequence[Array],
        modes: Sequence[int],
        entries: Array,  # shape: (blocks, length)
    ) -> Array:  # shape: (blocks, length, prod r_i)
        """Return the rows of the factors' Khatri-Rao product that belong to entries."""
        product = None
        for mode in modes:
            rows = _ops.take(factors[mode], _ops.take(self._rows[mode], entries))
            if product is None:
                product = rows
            else:
                wide = product[:, :, :, None] * rows[:, :, None, :]
                product = _ops.reshape(wide, (*_ops.shape(rows)[:2], -1))
        if product is None:
            return _ops.zeros((*_ops.shape(entries), 1), like=factors[0]) + 1.0
        return product


class _Sparse(NamedTuple):
    """A tensor with weights at the observed entries and zeros elsewhere."""

    map: Entries
    weights: Array  # shape: (m + 1,), the last one zero

    def contract(self, factors: Sequence[Array], skip: int | None) -> Array:
        """Return ``Z x_{j != skip} factors[j]^T``."""
        if skip is None:
            partial = self.contract(factors, 0)
            return _ops.mode_product(partial, factors[0], 0, transpose=True)
        left, right = self.map._halves(skip)
        rows = []
        blocks = self.map._blocks[skip]
        for entries, _ in blocks.chunks():
            u = self.map._products(factors, left, entries)
            u = u * _ops.take(self.weights, entries)[:, :, None]
            v = self.map._products(factors, right, entries)
            product = _ops.moveaxis(u, 1, 2) @ v
            rows.append(_ops.reshape(product, (_ops.shape(entries)[0], -1)))
        n = self.map.shape[skip]
        matrix = _ops.add_rows(_ops.concatenate(rows, 0), blocks.owners, n)
        extent = [_ops.shape(u)[1] for u in factors]
        extent[skip] = n
        return _ops.fold(matrix, skip, extent)


def completion(
    indices: Sequence[Any],
    values: Array,
    shape: Sequence[int],
    loss: EntryLoss = SQUARED,
    ridge: float = 0.0,
) -> Fit:
    """Return the objective of tensor completion, ``sum_k l(W[i_k], y_k)`` over observed entries.

    Loss and gradient cost about ``m prod_{j != i} r_j`` operations each for m entries, and memory
    proportional to m: a tensor with millions of observed entries may be too large to be stored.

    Parameters
    ----------
    indices : sequence of d integer arrays, shape (m,)
        Coordinates of the entries, as ``numpy.nonzero`` returns them; see `Entries`.
    values : array, shape (m,)
        The entries, of the library, dtype and device that are to compute.
    shape : sequence of int
        Shape (n_1, ..., n_d) of the tensor.
    loss : EntryLoss
        `Squared`; `Logistic` for zeros and ones, `Poisson` for counts.
    ridge : float
        Weight of ``||W||^2 / 2``.

    Returns
    -------
    Fit

    Raises
    ------
    BackendError, NonFiniteError, ShapeError, ValueError
        As for `Entries` and `Fit`.

    Examples
    --------
    >>> import numpy as np, geotucker as gt
    >>> truth = gt.to_dense(gt.testing.random_point((20, 20, 20), (2, 2, 2)))
    >>> known = np.nonzero(np.random.default_rng(0).random(truth.shape) < 0.4)
    >>> objective = gt.completion(known, truth[known], truth.shape)
    >>> result = gt.minimize(objective, objective.start(1), ranks=gt.Growing(2, every=5),
    ...                      integrator=gt.ConjugateGradient())
    >>> bool(np.linalg.norm(gt.to_dense(result.point) - truth) < 1e-6 * np.linalg.norm(truth))
    True
    """
    check_floating(values, "values")
    try:
        sides = tuple(map(operator.index, shape))
    except TypeError as error:
        raise ShapeError(f"shape: expected integers, got {shape!r}") from error
    return Fit(Entries(indices, sides, values), values, loss, ridge)


def _checked(indices: Sequence[Any], shape: tuple[int, ...]) -> tuple[Host, ...]:
    """Return the indices as host arrays, if they fit the shape."""
    if len(indices) != len(shape) or not shape:
        raise ShapeError(
            f"indices: expected one array for each of the {len(shape)} modes of shape {shape}, as "
            f"numpy.nonzero returns, got {len(indices)}"
        )
    hosts: list[Host] = []
    for mode, rows in enumerate(indices):
        host = _ops.to_numpy(rows) if hasattr(rows, "dtype") else np.asarray(rows)
        if host.dtype.kind not in "iu":
            raise BackendError(f"indices[{mode}]: expected integers, got {host.dtype}")
        if host.ndim != 1 or len(host) == 0 or (hosts and len(host) != len(hosts[0])):
            expected = f"({len(hosts[0])},)" if hosts else "(m,) with m at least 1"
            raise ShapeError(f"indices[{mode}]: expected shape {expected}, got {host.shape}")
        if host.min() < 0 or host.max() >= shape[mode]:
            raise ShapeError(
                f"indices[{mode}]: expected from 0 to {shape[mode] - 1}, "
                f"got from {host.min()} to {host.max()}"
            )
        hosts.append(host.astype(np.int64))
    return tuple(hosts)
