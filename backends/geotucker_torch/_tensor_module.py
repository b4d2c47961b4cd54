"""What layers share whose matrix is kept as a tensor of higher order, and how it is split."""

import math
from collections.abc import Sequence
from typing import Any, ClassVar, TypeVar

from torch import nn

import geotucker as gt

from ._layers import TuckerModule, decompose
from ._tensor_plan import TensorSizes

__all__ = ["Split", "TensorModule", "checked_shape", "near_equal_factors", "split_of"]

Split = tuple[tuple[int, ...], tuple[int, ...]]
"""Shapes that the rows and the columns of a matrix are reshaped to."""

_Layer = TypeVar("_Layer", bound="TensorModule")


class TensorModule(TuckerModule):
    """Base of layers whose matrix is reshaped to a tensor: modes of the rows, then of the columns.

    Attributes
    ----------
    row_modes : int
        How many of the modes, from the first, are those of the rows.
    """

    # Arguments of the constructor: the shapes of rows and columns.
    shape_names: ClassVar[tuple[str, str]]

    row_modes: int

    def __init__(self, rows: Any, columns: Any, ranks: Any, bias: bool, **like: Any) -> None:
        sides = zip(self.shape_names, (rows, columns), strict=True)
        row_shape, column_shape = (checked_shape(name, shape) for name, shape in sides)
        # Needed where the weight is drawn; modules take attributes that are no parameters before.
        vars(self)["row_modes"] = len(row_shape)
        size = math.prod(row_shape) if bias else None
        super().__init__((*row_shape, *column_shape), ranks, size, **like)

    @classmethod
    def _from_matrix(
        cls: type[_Layer], layer: nn.Module, ranks: Any, rescale: bool | None, wanted: Any
    ) -> _Layer:
        """Build the layer from a dense one, split as `split_of` says."""
        weight = cls._weight_of(layer)
        rows, columns = weight.shape
        split = split_of((rows, columns), wanted, cls.shape_names)
        shapes: dict[str, Any] = dict(zip(cls.shape_names, split, strict=True))
        shape = (*split[0], *split[1])
        if weight.is_meta:
            make: Any = cls
            meta = make(**shapes, ranks=ranks, device="meta", dtype=weight.dtype)
            return cls._from_point(layer, meta.point, **shapes)
        return cls._from_point(layer, decompose(weight.reshape(shape), ranks), rescale, **shapes)

    @property
    def split(self) -> Split:
        """Shapes of the rows and of the columns."""
        return self.shape[: self.row_modes], self.shape[self.row_modes :]

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the dense layer's weight, a matrix."""
        rows, columns = self.split
        return math.prod(rows), math.prod(columns)

    @property
    def mode_names(self) -> tuple[str, ...]:
        """What the modes are called: "out 1", ..., "in 1", ..., or "rows 1", ..., "columns 1"."""
        sides = zip(self._axes, self.split, strict=True)
        return tuple(f"{name} {i + 1}" for name, side in sides for i in range(len(side)))

    def sizes_for(self, batch: int) -> TensorSizes:
        """Return everything that the price of a pass depends on."""
        rows, ranks = self.row_modes, self.settled_ranks
        return TensorSizes(*self.split, ranks[:rows], ranks[rows:], batch)


def near_equal_factors(number: int, count: int) -> tuple[int, ...]:
    """Split a number into factors above one whose sum is the least: as equal as can be.

    Parameters
    ----------
    number : int
        Positive.
    count : int
        How many factors there shall be; fewer if it has no more prime factors.

    Returns
    -------
    tuple of int
        Ascending.

    Examples
    --------
    >>> near_equal_factors(800, 2), near_equal_factors(800, 3), near_equal_factors(7, 2)
    ((25, 32), (8, 10, 10), (7,))
    """
    return min(_factorisations(number, count, 2), key=lambda f: (-len(f), sum(f)))


def _factorisations(number: int, count: int, least: int) -> list[tuple[int, ...]]:
    """Return all ascending factorisations into at most `count` factors of at least `least`."""
    found = [(number,)]
    if count > 1:
        for first in range(least, math.isqrt(number) + 1):
            if number % first == 0:
                rest = _factorisations(number // first, count - 1, first)
                found += [(first, *others) for others in rest]
    return found


def split_of(
    weight_shape: tuple[int, int], wanted: Any, names: tuple[str, str] = ("out_shape", "in_shape")
) -> Split:
    """Return the shapes that a matrix is reshaped to.

    Parameters
    ----------
    weight_shape : pair of int
        Rows and columns.
    wanted : int or pair
        How many near-equal factors both have, or for rows and columns a number or a shape.
    names : pair of str
        What the shapes are called in errors.

    Raises
    ------
    TypeError
        If `wanted` is neither.
    geotucker.ShapeError
        If a number is not positive, or a shape does not have the size as its product.

    Examples
    --------
    >>> split_of((800, 500), 2), split_of((800, 500), ((10, 80), 1))
    (((25, 32), (20, 25)), ((10, 80), (500,)))
    """
    pair = wanted if isinstance(wanted, (tuple, list)) else (wanted, wanted)
    if len(pair) != 2:
        raise TypeError(
            f"shapes: expected a number of factors, or a pair ({', '.join(names)}) of numbers or "
            f"shapes, got {wanted!r}"
        )
    sides = zip(names, weight_shape, pair, strict=True)
    rows, columns = (_side(name, size, side) for name, size, side in sides)
    return rows, columns


def _side(name: str, size: int, wanted: Any) -> tuple[int, ...]:
    if isinstance(wanted, int):
        return near_equal_factors(size, checked_shape(name, (wanted,))[0])
    shape = checked_shape(name, wanted)
    if math.prod(shape) != size:
        raise gt.ShapeError(f"{name}: expected integers whose product is {size}, got {shape}")
    return shape


def checked_shape(name: str, shape: Any) -> tuple[int, ...]:
    """Return a shape as a tuple; TypeError or ShapeError if it is none."""
    if not isinstance(shape, Sequence) or isinstance(shape, str) or not shape:
        raise TypeError(f"{name}: expected a sequence of positive integers, got {shape!r}")
    if not all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in shape):
        raise gt.ShapeError(f"{name}: expected positive integers, got {shape!r}")
    return tuple(shape)
