"""``nn.Embedding`` whose table is kept as a tensor of higher order."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import geotucker as gt

from ._contract import without_autocast
from ._embedding import EmbeddingModule
from ._tensor_lookup import lifting_lookup, multi_index, row_products, tensor_lookup
from ._tensor_module import TensorModule, checked_shape
from ._tensor_plan import TensorSizes

__all__ = ["TuckerTensorEmbedding"]


class TuckerTensorEmbedding(TensorModule, EmbeddingModule):
    """``nn.Embedding`` with its table reshaped to a tensor, which is kept in Tucker format.

    The table of shape ``(num_embeddings, embedding_dim)`` becomes a tensor of shape ``(*row_shape,
    *column_shape)``, with a basis for each of these modes. An index is one of each mode of the rows
    (in C order, the last running fastest): a lookup multiplies rows of small factors with one
    another and with the core. The table is formed only where there are more lookups than it has
    rows. Inputs and outputs are those of ``nn.Embedding``.

    Parameters
    ----------
    row_shape, column_shape : sequence of int
        Their products are the sizes of the table.
    ranks : rank rule, int, float or tuple of int
        Ranks, of the modes of the rows first, see `geotucker.Fixed`. From scratch the rule cannot
        depend on singular values.
    padding_idx : int, optional
        The index whose lookups have no gradient; it may be negative. Its row is zero at first (and
        where all ranks of the rows are one, the others are too), but made of rows of factors that
        other indices have too, with which it changes in training.
    scale_grad_by_freq : bool
        Whether gradients are divided by the number of lookups of the same index in the batch.
    device, dtype
        Of all parameters.

    Raises
    ------
    TypeError
        If a shape is not a sequence.
    geotucker.ShapeError
        If a shape is not made of positive integers.
    geotucker.RankError
        If `ranks` cannot be used.
    ValueError
        If `padding_idx` is out of range.

    Notes
    -----
    As for `TuckerEmbedding` there is neither ``max_norm`` nor ``sparse``.

    Examples
    --------
    >>> layer = TuckerTensorEmbedding((10, 10, 10), (8, 8), ranks=3)
    >>> layer(torch.tensor([[1, 2, 999]])).shape, layer.ranks
    (torch.Size([1, 3, 64]), (3, 3, 3, 3, 3))
    """

    shape_names = ("row_shape", "column_shape")

    def __init__(
        self,
        row_shape: Sequence[int],
        column_shape: Sequence[int],
        ranks: Any = 0.25,
        padding_idx: int | None = None,
        scale_grad_by_freq: bool = False,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        number = math.prod(checked_shape("row_shape", row_shape))
        self._keep(number, padding_idx, scale_grad_by_freq)
        super().__init__(row_shape, column_shape, ranks, False, device=device, dtype=dtype)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw orthonormal factors and a core that give W the variance 1; the padding is zero."""
        super().reset_parameters()
        if self.padding_idx is None or self.core.is_meta:
            return
        rows = self.row_modes
        index = multi_index(torch.tensor(self.padding_idx, device=self.core.device), self.row_shape)
        wide = torch.promote_types(self.core.dtype, torch.float32)
        row = row_products(index, [u.to(wide) for u in self.factors[:rows]])
        core = self.core.to(wide).flatten(rows).flatten(0, rows - 1)
        core -= torch.outer(row, row @ core) / (row @ row)
        self.core.copy_(core.reshape(self.core.shape))

    @classmethod
    def from_dense(
        cls,
        layer: nn.Module,
        ranks: Any = 0.25,
        *,
        rescale: bool | None = None,
        row_shape: Sequence[int] | None = None,
        column_shape: Sequence[int] | None = None,
    ) -> "TuckerTensorEmbedding":
        """Build a tensorised layer from a dense one, by the HOSVD of its reshaped table.

        Parameters
        ----------
        layer : nn.Embedding
            It is not changed and shares nothing with the result.
        ranks, rescale
            As for the other layers.
        row_shape, column_shape : sequence of int, optional
            Default: two factors, as near to one another as can be.

        Raises
        ------
        geotucker.ShapeError
            If the products of the shapes are not the layer's sizes; else as for other layers.

        Examples
        --------
        >>> TuckerTensorEmbedding.from_dense(nn.Embedding(1000, 64), ranks=3).shape
        (25, 40, 8, 8)
        """
        return cls._from_matrix(layer, ranks, rescale, (row_shape or 2, column_shape or 2))

    @classmethod
    def _from_point(
        cls, layer: nn.Module, point: gt.TuckerPoint, rescale: bool | None = False, **shapes: Any
    ) -> "TuckerTensorEmbedding":
        options = {name: getattr(layer, name) for name in ("padding_idx", "scale_grad_by_freq")}
        return super()._from_point(layer, point, rescale, **shapes, **options)

    def forward(self, x: Tensor) -> Tensor:
        """Look up the embeddings of indices, in the weight's own precision, as nn.Embedding."""
        with without_autocast(self.core):
            return self._uncompiled(self._looked_up, x)

    def _looked_up(self, x: Tensor) -> Tensor:
        layer_map, number = self.map, self.num_embeddings
        layer_map.check(x, number)
        if x.numel() <= number:
            y = self._rows(x.flatten()).reshape(*x.shape, self.embedding_dim)
        else:  # every row once
            y = F.embedding(x, self._rows(torch.arange(number, device=x.device)))
        return layer_map.leave(y, x)

    def _rows(self, x: Tensor) -> Tensor:
        if self._lifts:
            return lifting_lookup(self, x).flatten(1)
        factors, rows = self._bases, self.row_modes
        return tensor_lookup(x, self.core, factors[:rows], factors[rows:]).flatten(1)

    def sizes_for(self, batch: int) -> TensorSizes:
        """Return everything that the price of a pass depends on."""
        return super().sizes_for(batch)._replace(looked_up=True)

    @property
    def row_shape(self) -> tuple[int, ...]:
        """Shape of the tensor that an index points into."""
        return self.split[0]

    @property
    def column_shape(self) -> tuple[int, ...]:
        """Shape of the tensor that an embedding is."""
        return self.split[1]

    @property
    def _sizes_shown(self) -> tuple[Any, Any]:
        return self.split
