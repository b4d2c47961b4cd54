"""``nn.Linear`` whose matrix is kept as a tensor of higher order."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

import geotucker as gt

from ._layers import TuckerModule, decompose
from ._tensorised import lifting_tensorised, tensor_linear

__all__ = ["Split", "TuckerTensorLinear", "near_equal_factors", "split_of"]

Split = tuple[tuple[int, ...], tuple[int, ...]]
"""Shapes (out_shape, in_shape) that a matrix is reshaped to."""


class TuckerTensorLinear(TuckerModule):
    """``nn.Linear`` with its matrix reshaped to a tensor, which is kept in Tucker format.

    The matrix of shape ``(out_features, in_features)`` becomes a tensor of shape ``(*out_shape,
    *in_shape)``, with a basis for each of these modes. It has fewer parameters than a matrix in
    Tucker format at the same ranks, as the bases are small; whether it fits as well depends on the
    data. Inputs and outputs are those of ``nn.Linear``.

    Parameters
    ----------
    in_shape, out_shape : sequence of int
        Their products are the sizes of the last dimension of input and output.
    ranks : rank rule, int, float or tuple of int
        Ranks, of the output's modes first, see `geotucker.Fixed`. From scratch the rule cannot
        depend on singular values.
    bias : bool
        Whether a bias is learned.
    device, dtype
        Of all parameters.

    Raises
    ------
    geotucker.ShapeError
        If a shape is not made of positive integers.
    geotucker.RankError
        If `ranks` cannot be used.

    Examples
    --------
    >>> layer = TuckerTensorLinear(in_shape=(20, 25), out_shape=(10, 80), ranks=4)
    >>> layer(torch.ones(3, 500)).shape, tuple(layer.core.shape)
    (torch.Size([3, 800]), (4, 4, 4, 4))
    """

    dense_type = nn.Linear
    _options = ("in_features", "out_features")

    # How many of the modes, from the first, are the output's.
    out_modes: int

    def __init__(
        self,
        in_shape: Sequence[int],
        out_shape: Sequence[int],
        ranks: Any = 0.25,
        bias: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        inputs, outputs = _checked("in_shape", in_shape), _checked("out_shape", out_shape)
        # Needed where the weight is drawn; modules take attributes that are no parameters before.
        vars(self)["out_modes"] = len(outputs)
        size = math.prod(outputs) if bias else None
        super().__init__((*outputs, *inputs), ranks, size, device, dtype)

    @classmethod
    def from_dense(
        cls,
        layer: nn.Module,
        ranks: Any = 0.25,
        *,
        rescale: bool | None = None,
        in_shape: Sequence[int] | None = None,
        out_shape: Sequence[int] | None = None,
    ) -> "TuckerTensorLinear":
        """Build a tensorised layer from a dense one, by the HOSVD of its reshaped weight.

        Parameters
        ----------
        layer : nn.Linear
            It is not changed and shares nothing with the result.
        ranks, rescale
            As for the other layers.
        in_shape, out_shape : sequence of int, optional
            Default: two factors, as near to one another as can be (see `near_equal_factors`).

        Raises
        ------
        geotucker.ShapeError
            If the products of the shapes are not the layer's sizes; else as for other layers.

        Examples
        --------
        >>> TuckerTensorLinear.from_dense(nn.Linear(500, 800), ranks=4).shape
        (25, 32, 20, 25)
        """
        weight = cls._weight_of(layer)
        rows, columns = weight.shape
        outputs, inputs = split_of((rows, columns), (out_shape or 2, in_shape or 2))
        shapes: dict[str, Any] = {"in_shape": inputs, "out_shape": outputs}
        shape = (*outputs, *inputs)
        if weight.is_meta:
            meta = cls(**shapes, ranks=ranks, device="meta", dtype=weight.dtype)
            return cls._from_point(layer, meta.point, **shapes)
        return cls._from_point(layer, decompose(weight.reshape(shape), ranks), rescale, **shapes)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the dense layer's map, by contraction of core and factors."""
        return self._uncompiled(self._applied, x)

    def _applied(self, x: Tensor) -> Tensor:
        batch, factors, outputs = self._entered(x), list(self.factors), self.out_modes
        if self._lifts:
            return self._left(lifting_tensorised(self, batch), x)
        return self._left(tensor_linear(batch, self.core, factors[:outputs], factors[outputs:]), x)

    def _entered(self, x: Tensor) -> Tensor:
        if x.dim() == 0 or x.shape[-1] != self.in_features:
            raise gt.ShapeError(
                f"x: expected a last dimension of {self.in_features} features, got shape "
                f"{tuple(x.shape)}"
            )
        return x.reshape(math.prod(x.shape[:-1]), *self.in_shape)

    def _left(self, y: Tensor, x: Tensor) -> Tensor:
        y = y.reshape(*x.shape[:-1], self.out_features)
        # Autocast would give a sum of two precisions in the wider one.
        return y if self.bias is None else y + self.bias.to(y.dtype)

    @property
    def in_shape(self) -> tuple[int, ...]:
        """Shape of the tensor that an input is."""
        return self.shape[self.out_modes :]

    @property
    def out_shape(self) -> tuple[int, ...]:
        """Shape of the tensor that an output is."""
        return self.shape[: self.out_modes]

    @property
    def in_features(self) -> int:
        """Size of the last dimension of the input."""
        return math.prod(self.in_shape)

    @property
    def out_features(self) -> int:
        """Size of the last dimension of the output."""
        return math.prod(self.out_shape)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape (out_features, in_features) of the dense layer's weight."""
        return self.out_features, self.in_features

    @property
    def mode_names(self) -> tuple[str, ...]:
        """What the modes are called: "out 1", ..., "in 1", ..."""
        sides = (("out", self.out_shape), ("in", self.in_shape))
        return tuple(f"{name} {i + 1}" for name, side in sides for i in range(len(side)))

    def _options_repr(self) -> str:
        return f"in_shape={self.in_shape}, out_shape={self.out_shape}"


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


def split_of(weight_shape: tuple[int, int], wanted: Any) -> Split:
    """Return the shapes that a matrix is reshaped to.

    Parameters
    ----------
    weight_shape : pair of int
        Sizes of output and input.
    wanted : int or pair
        How many near-equal factors both have, or for output and input a number or a shape.

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
            "shapes: expected a number of factors, or a pair (out_shape, in_shape) of numbers or "
            f"shapes, got {wanted!r}"
        )
    sides = zip(("out_shape", "in_shape"), weight_shape, pair, strict=True)
    outputs, inputs = (_side(name, size, side) for name, size, side in sides)
    return outputs, inputs


def _side(name: str, size: int, wanted: Any) -> tuple[int, ...]:
    if isinstance(wanted, int):
        return near_equal_factors(size, _checked(name, (wanted,))[0])
    shape = _checked(name, wanted)
    if math.prod(shape) != size:
        raise gt.ShapeError(f"{name}: expected integers whose product is {size}, got {shape}")
    return shape


def _checked(name: str, shape: Any) -> tuple[int, ...]:
    if not isinstance(shape, Sequence) or isinstance(shape, str) or not shape:
        raise TypeError(f"{name}: expected a sequence of positive integers, got {shape!r}")
    if not all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in shape):
        raise gt.ShapeError(f"{name}: expected positive integers, got {shape!r}")
    return tuple(shape)
