"""``nn.Linear`` whose matrix is kept as a tensor of higher order."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

import geotucker as gt

from ._maps import LinearMap
from ._tensor_module import TensorModule
from ._tensorised import lifting_tensorised, tensor_linear

__all__ = ["TuckerTensorLinear"]


class TuckerTensorLinear(TensorModule):
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
    shape_names = ("out_shape", "in_shape")

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
        super().__init__(out_shape, in_shape, ranks, bias, device=device, dtype=dtype)

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
        return cls._from_matrix(layer, ranks, rescale, (out_shape or 2, in_shape or 2))

    def forward(self, x: Tensor) -> Tensor:
        """Apply the dense layer's map, by contraction of core and factors."""
        return self._uncompiled(self._applied, x)

    def _applied(self, x: Tensor) -> Tensor:
        batch, factors, outputs = self._entered(x), self._bases, self.row_modes
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
        return self.split[1]

    @property
    def out_shape(self) -> tuple[int, ...]:
        """Shape of the tensor that an output is."""
        return self.split[0]

    @property
    def in_features(self) -> int:
        """Size of the last dimension of the input."""
        return math.prod(self.in_shape)

    @property
    def out_features(self) -> int:
        """Size of the last dimension of the output."""
        return math.prod(self.out_shape)

    @property
    def map(self) -> LinearMap:
        """The map, for the order of its modes."""
        return LinearMap()

    def _options_repr(self) -> str:
        return f"in_shape={self.in_shape}, out_shape={self.out_shape}"
