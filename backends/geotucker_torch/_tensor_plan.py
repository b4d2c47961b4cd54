"""Which factors of a tensorised linear map meet the activations, and what that costs.

As `_plan` for maps of one input and one output mode.
"""

import math
from collections.abc import Sequence
from functools import lru_cache, reduce
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch

import geotucker as gt

__all__ = [
    "Projected",
    "TensorSizes",
    "cheapest_projections",
    "operations",
    "ordered",
    "price",
]

Projected: TypeAlias = tuple[bool, ...]
"""For each mode, outputs first, whether its factor meets the activations."""


class TensorSizes(NamedTuple):
    """Everything that the price of a contraction depends on."""

    out_shape: tuple[int, ...]
    in_shape: tuple[int, ...]
    out_ranks: tuple[int, ...]
    in_ranks: tuple[int, ...]
    batch: int
    # Whether the output's modes are those of a table, in which a lookup costs nothing. (Its rows
    # are the outputs of the linear layer that has the same weight; see `_adjoint_maps`.)
    looked_up: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor."""
        return self.out_shape + self.in_shape

    @property
    def ranks(self) -> tuple[int, ...]:
        """Its ranks."""
        return self.out_ranks + self.in_ranks


def operations(sizes: TensorSizes, projected: Projected, folding: bool = True) -> int:
    """Count the multiply-adds of one forward pass.

    Parameters
    ----------
    sizes : TensorSizes
        Of layer and input.
    projected : tuple of bool
        For each mode, outputs first.
    folding : bool
        Whether forming the kernel counts.

    Examples
    --------
    >>> sizes = TensorSizes((10, 10), (10, 10), (2, 2), (2, 2), batch=1)
    >>> operations(sizes, (True,) * 4), operations(sizes, (False,) * 4)
    (496, 34960)
    """
    modes = list(zip(sizes.shape, sizes.ranks, projected, strict=True))
    outputs, inputs = modes[: len(sizes.out_shape)], modes[len(sizes.out_shape) :]
    # Lists, as torch.compile cannot trace generators here.
    kernel_out, kernel_in = [
        math.prod([r if meets else n for n, r, meets in side]) for side in (outputs, inputs)
    ]
    total = sizes.batch * kernel_out * kernel_in
    sides = [outputs, inputs]
    if sizes.looked_up:
        if not any(projected[: len(outputs)]):
            total = 0
        sides = [inputs]
    for side in sides:
        steps = [(n, r) for n, r, meets in side if meets]
        rest = sizes.batch * math.prod([n for n, _, meets in side if not meets])
        # Projecting takes n to r, and spreading r to n by the same steps backwards.
        total += _chain(rest, steps)
    if folding:
        core = math.prod([r for _, r, meets in modes if meets])
        total += _chain(core, [(r, n) for n, r, meets in modes if not meets])
    return total


def _chain(rest: int, steps: Sequence[tuple[int, int]]) -> int:
    """Count the multiply-adds of applying matrices to the axes of a tensor, in `ordered` order.

    Parameters
    ----------
    rest : int
        Entries of the tensor for each entry of these axes.
    steps : sequence of pairs
        Sizes of the axes, before and after.
    """
    total, extent = 0, rest * math.prod([before for before, _ in steps])
    for i in ordered(steps):
        before, after = steps[i]
        total += extent * after
        extent = extent // before * after
    return total


def ordered(steps: Sequence[tuple[int, int]]) -> list[int]:
    """Return the cheapest order of applying matrices to the axes of a tensor.

    Taking axis a (n_a to m_a) before b costs ``n_a n_b m_a + m_a n_b m_b`` a position, after it
    ``n_a n_b m_b + n_a m_a m_b``; that is more if ``1/n_a - 1/m_a < 1/n_b - 1/m_b``. As no other
    step sees the exchange of neighbours, sorting by this is best.
    """
    return sorted(range(len(steps)), key=lambda i: 1 / steps[i][0] - 1 / steps[i][1])


def cheapest_projections(sizes: TensorSizes) -> Projected:
    """Return which factors shall meet the activations, so that there is the least to do.

    A descent from the better of all and none, which changes its mind about one mode at a time.
    Modes that are looked up are projected, so that no table is formed.

    Examples
    --------
    A complete basis is folded, as that does not make the kernel larger:

    >>> cheapest_projections(TensorSizes((10, 10), (10, 10), (2, 2), (2, 10), batch=1000))
    (True, True, True, False)
    """
    # torch.compile cannot trace a cache.
    return _descend(sizes) if torch.compiler.is_compiling() else _known(sizes)


def _descend(sizes: TensorSizes) -> Projected:
    order, free = len(sizes.shape), len(sizes.out_shape) if sizes.looked_up else 0
    best, least = (True,) * order, operations(sizes, (True,) * order)
    candidates: list[Projected] = [(True,) * free + (False,) * (order - free)]
    starts = True
    while candidates:
        found = best
        for candidate in candidates:
            cost = operations(sizes, candidate)
            if cost < least:
                found, least = candidate, cost
        flipped = [(*found[:i], not found[i], *found[i + 1 :]) for i in range(free, order)]
        candidates = flipped if found != best or starts else []
        best, starts = found, False
    return best


_known = lru_cache(maxsize=1024)(_descend)


def price(sizes: TensorSizes) -> gt.Cost:
    """Return the price of a forward pass for one input, for rank rules.

    It is that of projecting all modes in their order or none: products and sums of ranks, which a
    rule can evaluate for many ranks at a time. The layer may find a cheaper way.
    """
    outputs = len(sizes.out_shape)

    def tucker(ranks: Any) -> Any:
        modes = list(zip(sizes.shape, ranks, strict=True))
        sides = [modes[outputs:]]
        if not sizes.looked_up:
            sides.append([(r, n) for n, r in modes[:outputs]])
        whole = _in_turn([(r, n) for n, r in modes])
        projected = reduce(lambda a, r: a * r, ranks) + sum(map(_in_turn, sides))
        return np.minimum(sizes.batch * projected, whole + sizes.batch * dense)

    dense = math.prod(sizes.shape)
    return gt.Cost(tucker, 0 if sizes.looked_up else sizes.batch * dense)


def _in_turn(steps: Sequence[tuple[Any, Any]]) -> Any:
    """Count as `_chain` does, in the given order, of numbers or arrays of them."""
    total: Any = 0
    for i in range(len(steps)):
        after = [m for _, m in steps[: i + 1]]
        total += reduce(lambda a, b: a * b, [*after, *(n for n, _ in steps[i:])])
    return total
