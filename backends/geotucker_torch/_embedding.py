"""Embeddings in Tucker format."""

from typing import Any

import torch
from torch import Tensor, nn

from ._adjoint_maps import EmbeddingMap
from ._contract import without_autocast
from ._layers import TuckerModule, check_count

__all__ = ["EmbeddingModule", "TuckerEmbedding"]


class EmbeddingModule(TuckerModule):
    """Base of embeddings: all but how the weight is kept."""

    dense_type = nn.Embedding
    _options = ("num_embeddings", "embedding_dim", "padding_idx", "scale_grad_by_freq")
    _start_variance = 1.0
    _takes_bias = False
    _axes = ("rows", "columns")

    padding_idx: int | None
    scale_grad_by_freq: bool

    def _keep(self, number: int, padding_idx: int | None, scale_grad_by_freq: bool) -> None:
        """Check and set the options, which must be there before the weight is drawn."""
        if padding_idx is not None and not -number <= padding_idx < number:
            raise ValueError(
                f"padding_idx: expected an index of {number} embeddings, got {padding_idx}"
            )
        row = None if padding_idx is None else padding_idx % number
        vars(self).update(padding_idx=row, scale_grad_by_freq=scale_grad_by_freq)

    @classmethod
    def check_dense(cls, layer: nn.Module) -> None:
        """Raise ValueError if the dense layer does what this one does not."""
        if getattr(layer, "max_norm", None) is not None:
            raise ValueError(
                "layer: expected nn.Embedding without max_norm, which changes the weight in every "
                f"lookup, got max_norm={layer.max_norm}"
            )
        if getattr(layer, "sparse", False):
            raise ValueError(
                "layer: expected nn.Embedding with sparse=False, got sparse=True, whose gradients "
                "only some optimizers take; in Tucker format they are small"
            )

    @property
    def num_embeddings(self) -> int:
        """Rows of the table."""
        return self.weight_shape[0]

    @property
    def embedding_dim(self) -> int:
        """Columns of the table."""
        return self.weight_shape[1]

    @property
    def map(self) -> EmbeddingMap:
        """The linear maps that the layer is a chain of."""
        return EmbeddingMap(self.num_embeddings, self.padding_idx, self.scale_grad_by_freq)

    @property
    def _sizes_shown(self) -> tuple[Any, Any]:
        return self.num_embeddings, self.embedding_dim

    def _options_repr(self) -> str:
        shown = list(map(str, self._sizes_shown))
        if self.padding_idx is not None:
            shown.append(f"padding_idx={self.padding_idx}")
        if self.scale_grad_by_freq:
            shown.append("scale_grad_by_freq=True")
        return ", ".join(shown)


class TuckerEmbedding(EmbeddingModule):
    """``nn.Embedding`` with the weight ``W = U_0 C U_1^T`` in Tucker format.

    A lookup gathers rows of ``U_0`` and multiplies them by ``C U_1^T``: neither the table nor its
    gradient is ever formed.

    Parameters
    ----------
    num_embeddings, embedding_dim : int
        Sizes of the table.
    ranks : rank rule, int, float or tuple of int
        Ranks (r_0, r_1), see `geotucker.Fixed`; they are equal after clamping to what a matrix can
        have. From scratch the rule cannot depend on singular values.
    padding_idx : int, optional
        The index whose lookups have no gradient; it may be negative. Its row is zero at first and,
        as the bases never learn of it, stays zero unless the weight is tied and used elsewhere. A
        row of a dense layer that is not zero follows changes of the bases.
    scale_grad_by_freq : bool
        Whether gradients are divided by the number of lookups of the same index in the batch.
    device, dtype
        Of all parameters.

    Raises
    ------
    geotucker.ShapeError
        If a size is not a positive integer.
    geotucker.RankError
        If `ranks` cannot be used.
    ValueError
        If `padding_idx` is out of range.

    Notes
    -----
    There is no ``max_norm``, which changes rows of the weight in every lookup, and no ``sparse``:
    gradients are small and dense. `from_dense` refuses layers that have them, and `factorize`
    leaves these as they are.

    Examples
    --------
    >>> layer = TuckerEmbedding(1000, 64, ranks=8)
    >>> layer(torch.tensor([[1, 2, 999]])).shape, layer.ranks
    (torch.Size([1, 3, 64]), (8, 8))
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        ranks: Any = 0.25,
        padding_idx: int | None = None,
        scale_grad_by_freq: bool = False,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_count("num_embeddings", num_embeddings)
        check_count("embedding_dim", embedding_dim)
        self._keep(num_embeddings, padding_idx, scale_grad_by_freq)
        super().__init__((num_embeddings, embedding_dim), ranks, None, device, dtype)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw orthonormal factors and a core that give W the variance 1; the padding is zero."""
        super().reset_parameters()
        if self.padding_idx is not None and not self.core.is_meta:
            rows = self.factors[0]
            rows[self.padding_idx] = 0
            wide = torch.promote_types(rows.dtype, torch.float32)  # half has no QR
            rows.copy_(torch.linalg.qr(rows.to(wide))[0])
            row = rows[self.padding_idx]  # zero, but in a complete basis
            self.core.sub_(torch.outer(row, row @ self.core))

    def forward(self, x: Tensor) -> Tensor:
        """Look up the embeddings of indices, in the weight's own precision, as nn.Embedding."""
        with without_autocast(self.core):
            return super().forward(x)
