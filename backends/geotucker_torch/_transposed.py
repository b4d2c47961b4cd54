"""Transposed convolutions in Tucker format."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

import geotucker as gt

from ._adjoint_maps import ConvTransposeMap
from ._layers import TuckerModule, check_convolution, check_sizes, convolution_repr
from ._maps import ConvMap

__all__ = ["TuckerConvTranspose1d", "TuckerConvTranspose2d", "TuckerConvTranspose3d"]

_ORDER: dict[type[nn.Module], int] = {
    nn.ConvTranspose1d: 1,
    nn.ConvTranspose2d: 2,
    nn.ConvTranspose3d: 3,
}


class _TuckerConvTranspose(TuckerModule):
    """What the transposed convolutions share; they differ in `dense_type` only."""

    _options = (
        "in_channels",
        "out_channels",
        "kernel_size",
        "stride",
        "padding",
        "output_padding",
        "groups",
        "dilation",
    )
    _axes = ("in", "out")

    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    output_padding: tuple[int, ...]
    groups: int
    dilation: tuple[int, ...]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        ranks: Any = 0.25,
        stride: int | tuple[int, ...] = 1,
        padding: int | tuple[int, ...] = 0,
        output_padding: int | tuple[int, ...] = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: int | tuple[int, ...] = 1,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        order = _ORDER[self.dense_type]
        check_convolution(in_channels, out_channels, groups, order, kernel_size, stride, dilation)
        check_sizes("padding", padding, order, 0, single=False)
        check_sizes("output_padding", output_padding, order, 0, single=False)
        # The dense layer on the meta device brings the arguments into PyTorch's normal form.
        dense = self.dense_type(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            output_padding,
            groups,
            bias,
            dilation,
            device="meta",
        )
        sides = dense.output_padding, dense.stride, dense.dilation
        if any(extra >= max(s, d) for extra, s, d in zip(*sides, strict=False)):
            raise gt.ShapeError(
                f"output_padding: expected less than stride {dense.stride} or dilation "
                f"{dense.dilation}, got {output_padding!r}"
            )
        size = out_channels if bias else None
        super().__init__(tuple(dense.weight.shape), ranks, size, device, dtype)
        for name in self._options:
            setattr(self, name, getattr(dense, name))

    def forward(self, x: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        """Apply the dense layer's map, by contraction of core and factors.

        Parameters
        ----------
        x : Tensor, shape (batch, in_channels, n_1, ...) or (in_channels, n_1, ...)
            Input.
        output_size : sequence of int, optional
            Sizes of the output's spatial dimensions (or its whole shape), as for the dense layer:
            with a stride several are possible. Default: as `output_padding` says.

        Raises
        ------
        geotucker.ShapeError
            If `x` does not fit the layer, or no output has `output_size`.
        """
        layer_map = self.map
        if output_size is not None:
            layer_map.check(x, self.in_channels)
            extra = self._extra(x, tuple(output_size))
            layer_map = replace(layer_map, output_padding=extra)
        return self._apply_map(layer_map, x)

    def _extra(self, x: Tensor, output_size: tuple[int, ...]) -> tuple[int, ...]:
        """Return the output padding that leads to a size."""
        order = len(self.kernel_size)
        least = [
            (n - 1) * s - 2 * p + d * (k - 1) + 1
            for n, s, p, d, k in zip(
                x.shape[-order:],
                self.stride,
                self.padding,
                self.dilation,
                self.kernel_size,
                strict=True,
            )
        ]
        most = [n + s - 1 for n, s in zip(least, self.stride, strict=True)]
        sizes = output_size[-order:]
        fits = len(output_size) in (order, x.dim())
        if not fits or not all(
            low <= n <= high for low, n, high in zip(least, sizes, most, strict=True)
        ):
            raise gt.ShapeError(
                f"output_size: expected sizes from {least} to {most} for an input of shape "
                f"{tuple(x.shape)}, got {output_size}"
            )
        return tuple(n - low for n, low in zip(sizes, least, strict=True))

    @property
    def map(self) -> ConvTransposeMap:
        """The linear maps that the layer is a chain of."""
        sides = self.kernel_size, self.stride, self.padding, self.dilation
        return ConvTransposeMap(ConvMap(*sides, self.groups, "zeros"), self.output_padding)

    def _options_repr(self) -> str:
        return convolution_repr(self, self._options)


class TuckerConvTranspose1d(_TuckerConvTranspose):
    """``nn.ConvTranspose1d`` with its weight in Tucker format; see `TuckerConvTranspose2d`.

    Examples
    --------
    >>> TuckerConvTranspose1d(16, 8, kernel_size=4, ranks=4, stride=2)(torch.ones(16, 10)).shape
    torch.Size([8, 22])
    """

    dense_type = nn.ConvTranspose1d


class TuckerConvTranspose2d(_TuckerConvTranspose):
    """``nn.ConvTranspose2d`` with ``W = C x_1 U_in x_2 U_out x_3 U_kh x_4 U_kw``.

    Parameters
    ----------
    in_channels, out_channels : int
        Channels of input and output, divisible by `groups`.
    kernel_size : int or tuple of int
        One number for all spatial dimensions, or one for each.
    ranks : rank rule, int, float or tuple of int
        Ranks (r_in, r_out, r_kh, r_kw), in the order of the axes of PyTorch's weight, see
        `geotucker.Fixed`. From scratch the rule cannot depend on singular values. With groups the
        weight has out_channels / groups in its second axis: the groups share U_out.
    stride, padding, output_padding, groups, bias, dilation
        As for ``nn.ConvTranspose2d``.
    device, dtype
        Of all parameters.

    Raises
    ------
    geotucker.ShapeError
        If a size is out of its range, or `groups` does not divide the channels.
    geotucker.RankError
        If `ranks` cannot be used.

    Examples
    --------
    >>> layer = TuckerConvTranspose2d(50, 20, kernel_size=4, ranks=10, stride=2, padding=1)
    >>> layer.ranks, layer(torch.ones(2, 50, 6, 6)).shape
    ((10, 10, 4, 4), torch.Size([2, 20, 12, 12]))
    """

    dense_type = nn.ConvTranspose2d


class TuckerConvTranspose3d(_TuckerConvTranspose):
    """``nn.ConvTranspose3d`` with its weight in Tucker format; see `TuckerConvTranspose2d`.

    Examples
    --------
    >>> TuckerConvTranspose3d(8, 4, kernel_size=2, ranks=2, stride=2)(torch.ones(8, 3, 3, 3)).shape
    torch.Size([4, 6, 6, 6])
    """

    dense_type = nn.ConvTranspose3d
