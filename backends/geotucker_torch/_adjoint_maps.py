"""The maps of layers whose weight has the input's axis first: embeddings, transposed convolutions.

Such a layer applies the adjoint of what a linear layer or a convolution with the same weight does:
``nn.ConvTransposeNd`` that of ``nn.ConvNd``, a lookup that of ``nn.Linear``, on vectors with a
single one. Weights that are tied therefore have one and the same order of axes.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from geotucker import ShapeError

from ._maps import CONV, KERNEL_GRADIENT, ConvMap, LinearMap
from ._plan import Contraction, Sizes

__all__ = ["ConvTransposeMap", "EmbeddingMap"]

_CONV_TRANSPOSE: dict[int, Callable[..., Tensor]] = {
    1: F.conv_transpose1d,
    2: F.conv_transpose2d,
    3: F.conv_transpose3d,
}


@dataclass(frozen=True)
class EmbeddingMap(LinearMap):
    """The maps of ``nn.Embedding``: projecting the input gathers rows of ``U_in``.

    Parameters
    ----------
    num_embeddings : int
    padding_idx : int, optional
        The index whose lookups have no gradient.
    scale_grad_by_freq : bool
        Whether gradients are divided by the number of lookups of the same index.
    """

    transposed: ClassVar[bool] = True

    num_embeddings: int
    padding_idx: int | None
    scale_grad_by_freq: bool

    def sizes(self, x: Tensor, core: Tensor, u_out: Tensor, u_in: Tensor) -> Sizes:
        """See `LayerMap`: a lookup is free, so that the rows of ``U_in`` are never multiplied out.

        (All else is as for a linear layer, in which every input has all entries.)
        """
        like = u_out.shape[0], u_in.shape[0], core.shape[0], core.shape[1]
        return Sizes(*like, batch=x.numel(), positions_in=0)

    def check(self, x: Tensor, in_channels: int) -> None:
        """See `LayerMap`; indices out of range are found by PyTorch."""
        if x.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"x: expected indices of dtype int32 or int64, got {x.dtype}")

    def leave(self, y: Tensor, x: Tensor) -> Tensor:
        """See `LayerMap`: with its gradient changed if the layer does so."""
        if y.requires_grad and self._changes_gradients:
            y.register_hook(lambda g: self.enter_gradient(g, x))
        return y

    def enter_gradient(self, g: Tensor, x: Tensor) -> Tensor:
        """See `LayerMap`: as it counts for the weight; indices have no gradient."""
        if not self._changes_gradients:
            return g
        share = torch.ones_like(x, dtype=g.dtype)
        if self.scale_grad_by_freq:
            _, which, counts = torch.unique(x, return_inverse=True, return_counts=True)
            share = share / counts[which]
        if self.padding_idx is not None:
            share = share.masked_fill(x == self.padding_idx, 0)
        return g * share.unsqueeze(-1)

    def project_input(self, x: Tensor, u_in: Tensor) -> Tensor:
        """See `LayerMap`."""
        return F.embedding(x, u_in)

    def input_factor_gradient(self, x: Tensor, d: Tensor) -> Tensor:
        """See `LayerMap`."""
        rows = d.reshape(-1, d.shape[-1])
        return rows.new_zeros(self.num_embeddings, rows.shape[1]).index_add_(0, x.flatten(), rows)

    def apply(self, a: Tensor, kernel: Tensor, bias: Tensor | None, order: Contraction) -> Tensor:
        """See `LayerMap`."""
        if order.project_input:
            return super().apply(a, kernel, bias, order)
        return F.embedding(a, kernel.t())

    def kernel_gradient(self, a: Tensor, h: Tensor, order: Contraction) -> Tensor:
        """See `LayerMap`."""
        if order.project_input:
            return super().kernel_gradient(a, h, order)
        return self.input_factor_gradient(a, h).t()

    @property
    def _changes_gradients(self) -> bool:
        return self.scale_grad_by_freq or self.padding_idx is not None


@dataclass(frozen=True)
class ConvTransposeMap:
    """The maps of ``nn.ConvTransposeNd``, the adjoint of a convolution.

    Groups share ``U_out`` and the kernel; group g has its own block of rows of ``U_in``. Where the
    input is projected the groups are laid in the batch dimension.

    Parameters
    ----------
    adjoint : ConvMap
        The convolution, padded with zeros. What it does to its output happens to the input here.
    output_padding : tuple of int
        Positions that the output has beyond the least number.
    """

    transposed: ClassVar[bool] = True

    adjoint: ConvMap
    output_padding: tuple[int, ...]

    def sizes(self, x: Tensor, core: Tensor, u_out: Tensor, u_in: Tensor) -> Sizes:
        """See `LayerMap`; with groups, folding a factor is priced as if they shared ``U_in``."""
        conv = self.adjoint
        extents = x.shape[2:], conv.kernel, conv.stride, conv.pads, conv.dilation
        out = [
            max(0, (n - 1) * s - sum(p) + d * (k - 1) + extra + 1)
            for (n, k, s, p, d), extra in zip(
                zip(*extents, strict=True), self.output_padding, strict=True
            )
        ]
        positions = math.prod(x.shape[2:])
        return Sizes(
            u_out.shape[0] * conv.groups,
            u_in.shape[0] // conv.groups,
            core.shape[0],
            core.shape[1],
            batch=x.shape[0],
            groups=conv.groups,
            kernel=math.prod(conv.kernel),
            positions_in=positions,
            positions_out=math.prod(out),
            positions_kernel=positions,
        )

    def check(self, x: Tensor, in_channels: int) -> None:
        """See `LayerMap`; `in_channels` are those of all groups."""
        order = len(self.adjoint.kernel)
        if x.dim() not in (order + 1, order + 2) or x.shape[-order - 1] != in_channels:
            sides = ", ".join(f"n_{i + 1}" for i in range(order))
            raise ShapeError(
                f"x: expected shape (batch, {in_channels}, {sides}) or ({in_channels}, {sides}), "
                f"got {tuple(x.shape)}"
            )

    def enter(self, x: Tensor) -> Tensor:
        """See `LayerMap`: with a batch dimension."""
        return x.unsqueeze(0) if self._unbatched(x) else x

    def leave(self, y: Tensor, x: Tensor) -> Tensor:
        """See `LayerMap`."""
        return y.squeeze(0) if self._unbatched(x) else y

    def enter_gradient(self, g: Tensor, x: Tensor) -> Tensor:
        """See `LayerMap`."""
        return g.unsqueeze(0) if self._unbatched(x) else g

    def leave_gradient(self, d: Tensor, x: Tensor) -> Tensor:
        """See `LayerMap`."""
        return d.squeeze(0) if self._unbatched(x) else d

    def project_input(self, x: Tensor, u_in: Tensor) -> Tensor:
        """See `LayerMap`."""
        return self.adjoint.project_output(x, u_in)

    def spread_input(self, d: Tensor, k_in: Tensor) -> Tensor:
        """See `LayerMap`."""
        return self.adjoint.spread_output(d, k_in, None)

    def input_factor_gradient(self, x: Tensor, d: Tensor) -> Tensor:
        """See `LayerMap`."""
        return self.adjoint.output_factor_gradient(x, d)

    def apply(self, a: Tensor, kernel: Tensor, bias: Tensor | None, order: Contraction) -> Tensor:
        """See `LayerMap`."""
        conv, weight = self.adjoint, kernel.transpose(0, 1)
        transpose = _CONV_TRANSPOSE[len(conv.kernel)]
        sides = conv.stride, self._padding, self.output_padding
        if not order.project_input or conv.groups == 1:
            return transpose(a, weight, bias, *sides, conv.groups, conv.dilation)
        y = conv.together(transpose(conv.apart(a), weight, None, *sides, 1, conv.dilation))
        return y if bias is None else y + self._beside(bias)

    def input_gradient(self, h: Tensor, kernel: Tensor, a: Tensor, order: Contraction) -> Tensor:
        """See `LayerMap`."""
        conv, weight = self.adjoint, kernel.transpose(0, 1)
        forward, sides = CONV[len(conv.kernel)], (conv.stride, self._padding, conv.dilation)
        if order.project_input:
            d = conv.together(forward(conv.apart(h), weight, None, *sides))
        else:
            d = forward(h, weight, None, *sides, conv.groups)
        # An output padding beyond the stride, which a dilation allows, has room for more positions.
        return d[(..., *(slice(n) for n in a.shape[2:]))]

    def kernel_gradient(self, a: Tensor, h: Tensor, order: Contraction) -> Tensor:
        """See `LayerMap`."""
        conv, groups = self.adjoint, self.adjoint.groups
        room = [extra // s for extra, s in zip(self.output_padding, conv.stride, strict=True)]
        if any(room):
            a = F.pad(a, [side for extra in reversed(room) for side in (0, extra)])
        if order.project_input:
            a, h, groups = conv.apart(a), conv.apart(h), 1
        shape = (a.shape[1], h.shape[1] // groups, *conv.kernel)
        gradient = KERNEL_GRADIENT[len(conv.kernel)]
        sides = conv.stride, self._padding, conv.dilation
        return gradient(h, shape, a, *sides, groups).transpose(0, 1)

    def spread_output(self, b: Tensor, k_out: Tensor, bias: Tensor | None) -> Tensor:
        """See `LayerMap`."""
        y = self.adjoint.spread_input(b, k_out)
        return y if bias is None else y + self._beside(bias)

    def project_output(self, g: Tensor, u_out: Tensor) -> Tensor:
        """See `LayerMap`."""
        return self.adjoint.project_input(g, u_out)

    def output_factor_gradient(self, g: Tensor, b: Tensor) -> Tensor:
        """See `LayerMap`."""
        return self.adjoint.input_factor_gradient(g, b)

    def bias_gradient(self, g: Tensor) -> Tensor:
        """See `LayerMap`."""
        return self.adjoint.bias_gradient(g)

    def join(self, first: Tensor, second: Tensor) -> Tensor:
        """See `LayerMap`."""
        return self.adjoint.join(first, second)

    @property
    def _padding(self) -> Sequence[int]:
        return [before for before, _ in self.adjoint.pads]

    def _beside(self, bias: Tensor) -> Tensor:
        return bias.reshape(-1, *(1,) * len(self.adjoint.kernel))

    def _unbatched(self, x: Tensor) -> bool:
        return x.dim() == len(self.adjoint.kernel) + 1
