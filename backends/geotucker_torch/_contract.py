"""The forward maps of Tucker layers: contraction of the factors, and which order is cheapest.

The weight of a layer is ``W = C x_1 U_out x_2 U_in x_3 U_k1 ...`` with ``C`` the core, so that
the output factor belongs to axis 0 of the weight as PyTorch stores it, ``(out, in / groups,
k_1, ...)``. The functions are pure, and differentiable in every argument that asks for it.

The spatial factors are always folded into the core, which is small. Each of the two channel
factors may then be *projected*, that is applied to the activations as a pointwise map, or
*folded* into the kernel. The four combinations give the same function at different costs
(`flops`); `cheapest` decides from the sizes at hand. Folding both rebuilds the dense weight,
which pays for ranks near the full ones.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import grad

from geotucker import ShapeError

__all__ = [
    "CONTRACTIONS",
    "Contraction",
    "Sizes",
    "cheapest",
    "conv_core_gradient",
    "dense_weight",
    "flops",
    "linear_core_gradient",
    "tucker_conv",
    "tucker_linear",
    "without_autocast",
]

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_CONV_WEIGHT: dict[int, Callable[..., Tensor]] = {
    1: grad.conv1d_weight,
    2: grad.conv2d_weight,
    3: grad.conv3d_weight,
}
_PAD_MODE = {"zeros": "constant"}  # the names of nn.ConvNd -> those of F.pad, where they differ


class Contraction(NamedTuple):
    """An order of contraction: which channel factors meet the activations."""

    project_output: bool  # else U_out is folded into the kernel
    project_input: bool  # else U_in is folded into the kernel


CONTRACTIONS = tuple(Contraction(out, in_) for out in (True, False) for in_ in (True, False))


class Sizes(NamedTuple):
    """Everything that the cost of a contraction depends on; a Linear layer is all ones below."""

    # fixed by the layer and its ranks
    out_channels: int
    in_channels: int  # of one group
    out_rank: int
    in_rank: int
    # fixed by the input
    batch: int
    # ones for a Linear layer
    groups: int = 1
    kernel: int = 1  # number of kernel entries, prod k_i
    positions_in: int = 1  # number of positions at which U_in would be applied
    positions_out: int = 1


def flops(contraction: Contraction, sizes: Sizes) -> int:
    """Count the multiply-adds of one forward pass, less those that all contractions share.

    With ``c`` the channels that enter the kernel (rank, or all channels of a group if the
    input factor is folded) the kernel costs ``c * kernel`` per output channel (rank, or
    channel) and position. A backward pass weighs the same terms by about two, and is left
    out.

    Parameters
    ----------
    contraction : Contraction
        The order to be priced.
    sizes : Sizes
        Of layer and input.

    Returns
    -------
    int
        Exact, however large.

    Examples
    --------
    >>> sizes = Sizes(out_channels=100, in_channels=100, out_rank=10, in_rank=10, batch=1)
    >>> flops(Contraction(True, True), sizes), flops(Contraction(False, False), sizes)
    (2100, 120000)
    """
    s = sizes
    rows_out = s.batch * s.positions_out
    channels = s.in_rank if contraction.project_input else s.in_channels
    total = 0
    if contraction.project_input:
        total += s.batch * s.groups * s.positions_in * s.in_channels * s.in_rank
    if contraction.project_output:
        # The kernel runs once per group, and its r_out channels are then spread.
        total += rows_out * s.groups * s.out_rank * channels * s.kernel
        total += rows_out * s.out_channels * s.out_rank
    else:
        total += rows_out * s.out_channels * channels * s.kernel
    return total + _fold_flops(contraction, s)


def _fold_flops(contraction: Contraction, s: Sizes) -> int:
    core = s.out_rank * s.in_rank * s.kernel
    if contraction == (False, False):
        return min(_both_folded(s))
    if not contraction.project_input:
        return core * s.in_channels
    return 0 if contraction.project_output else core * s.out_channels


def _both_folded(s: Sizes) -> tuple[int, int]:
    """Price of rebuilding the weight with the input factor first, and with the output first."""
    core = s.out_rank * s.in_rank * s.kernel
    dense = s.out_channels * s.in_channels * s.kernel
    return core * s.in_channels + dense * s.out_rank, core * s.out_channels + dense * s.in_rank


def cheapest(sizes: Sizes) -> Contraction:
    """Return the contraction with the fewest multiply-adds; a tie goes to more projections.

    Parameters
    ----------
    sizes : Sizes
        Of layer and input.

    Returns
    -------
    Contraction

    Examples
    --------
    Small ranks are contracted with the activations; at full rank and for many rows it is
    cheaper to rebuild the weight:

    >>> cheapest(Sizes(out_channels=100, in_channels=100, out_rank=10, in_rank=10, batch=64))
    Contraction(project_output=True, project_input=True)
    >>> cheapest(Sizes(out_channels=100, in_channels=100, out_rank=100, in_rank=100, batch=640))
    Contraction(project_output=False, project_input=False)
    """
    best, least = CONTRACTIONS[0], flops(CONTRACTIONS[0], sizes)
    for contraction in CONTRACTIONS[1:]:  # torch.compile cannot trace min(..., key=...)
        cost = flops(contraction, sizes)
        if cost < least:
            best, least = contraction, cost
    return best


def dense_weight(core: Tensor, factors: Sequence[Tensor]) -> Tensor:
    """Return ``core x_1 U_1 ... x_d U_d``, computed in float32 at least, autocast or not.

    Parameters
    ----------
    core : Tensor, shape (r_1, ..., r_d)
        Of any floating dtype.
    factors : sequence of Tensor, shapes (n_i, r_i)
        Of the same dtype.

    Returns
    -------
    Tensor, shape (n_1, ..., n_d)
        Of the dtype of `core`, differentiable, contiguous.

    Examples
    --------
    >>> dense_weight(torch.full((1, 1), 2.0), [torch.ones(2, 1), torch.ones(3, 1)])
    tensor([[2., 2., 2.],
            [2., 2., 2.]])
    """
    dtype = torch.promote_types(core.dtype, torch.float32)
    with without_autocast(core):
        weight = core.to(dtype)
        for factor in factors:  # each contraction moves its axis last: d of them restore the order
            weight = _move(weight, 0, factor.to(dtype))
    return weight.to(core.dtype)


def tucker_linear(
    x: Tensor,  # shape: (..., in)
    core: Tensor,  # shape: (r_out, r_in)
    factors: Sequence[Tensor],  # shapes: (out, r_out), (in, r_in)
    bias: Tensor | None = None,  # shape: (out,)
    *,
    contraction: Contraction | None = None,
) -> Tensor:
    """Return ``F.linear(x, W, bias)`` for ``W = U_out core U_in^T`` without forming ``W``.

    Parameters
    ----------
    x : Tensor, shape (..., in)
        Any leading dimensions, none included.
    core : Tensor, shape (r_out, r_in)
        Core of the weight.
    factors : pair of Tensor, shapes (out, r_out) and (in, r_in)
        Factors of the weight; they need not be orthonormal.
    bias : Tensor, shape (out,), optional
        Added to the output.
    contraction : Contraction, optional
        Forces an order (then ``W`` may be formed after all); default: the `cheapest`.

    Returns
    -------
    Tensor, shape (..., out)

    Raises
    ------
    geotucker.ShapeError
        If the last dimension of `x` is not ``in``.

    Examples
    --------
    >>> x, core = torch.ones(5, 3), torch.ones(1, 1)
    >>> tucker_linear(x, core, [torch.ones(4, 1), torch.ones(3, 1)]).shape
    torch.Size([5, 4])
    """
    u_out, u_in = factors
    if x.dim() == 0 or x.shape[-1] != u_in.shape[0]:
        raise ShapeError(
            f"x: expected a last dimension of {u_in.shape[0]} features, got shape {tuple(x.shape)}"
        )
    sizes = Sizes(*_layer_sizes(core, u_out, u_in), batch=math.prod(x.shape[:-1]))
    contraction = contraction or cheapest(sizes)
    with without_autocast(core):
        weight = _fold_channels(core, u_out, u_in, contraction, sizes)
    if contraction.project_input:
        x = F.linear(x, u_in.t())
    if not contraction.project_output:
        return F.linear(x, weight, bias)
    return F.linear(F.linear(x, weight), u_out, bias)


def tucker_conv(
    x: Tensor,  # shape: (batch, groups * in, *spatial) or (groups * in, *spatial)
    core: Tensor,  # shape: (r_out, r_in, r_k1, ...)
    factors: Sequence[Tensor],  # shapes: (out, r_out), (in, r_in), (k_1, r_k1), ...
    bias: Tensor | None = None,  # shape: (out,)
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
    *,
    contraction: Contraction | None = None,
) -> Tensor:
    """Return the convolution with ``W = core x_1 U_out x_2 U_in x_3 U_k1 ...``.

    A factor that acts on channels commutes with padding, so that it is the projected
    activation, with fewer channels, which is padded. Groups share ``U_in`` and the kernel;
    group g has its own block of rows of ``U_out``. Where the output is projected the groups
    are laid in the batch dimension, so that one small kernel serves them all.

    Parameters
    ----------
    x : Tensor, shape (batch, groups * in, *spatial) or (groups * in, *spatial)
        One to three spatial dimensions.
    core : Tensor, shape (r_out, r_in, r_k1, ...)
        Core of the weight.
    factors : sequence of Tensor, shapes (out, r_out), (in, r_in), (k_1, r_k1), ...
        Factors of the weight; they need not be orthonormal.
    bias : Tensor, shape (out,), optional
        Added to the output.
    stride, padding, dilation, groups, padding_mode
        As for ``torch.nn.Conv2d``: a number for all spatial dimensions or one for each, and
        "same" or "valid" for `padding`.
    contraction : Contraction, optional
        Forces an order (then ``W`` may be formed after all); default: the `cheapest`.

    Returns
    -------
    Tensor, shape (batch, out, *spatial_out) or (out, *spatial_out)

    Raises
    ------
    geotucker.ShapeError
        If `x` has another number of dimensions or channels.

    Examples
    --------
    >>> factors = [torch.ones(4, 1), torch.ones(3, 1), torch.ones(5, 1)]
    >>> tucker_conv(torch.ones(2, 3, 10), torch.ones(1, 1, 1), factors, padding="same").shape
    torch.Size([2, 4, 10])
    """
    u_out, u_in, *spatial = factors
    kernel = tuple(u.shape[0] for u in spatial)
    _check_conv_input(x, u_in.shape[0], groups, len(kernel))
    if x.dim() == len(kernel) + 1:
        options = (stride, padding, dilation, groups, padding_mode)
        return tucker_conv(
            x.unsqueeze(0), core, factors, bias, *options, contraction=contraction
        ).squeeze(0)
    stride, dilation = _each(stride, len(kernel)), _each(dilation, len(kernel))
    pads = _pads(padding, kernel, dilation)
    # A stride across a kernel of one entry skips positions: they need not be projected.
    skip = [
        s if k == 1 and p == (0, 0) else 1 for s, k, p in zip(stride, kernel, pads, strict=True)
    ]
    sizes = Sizes(
        *_layer_sizes(core, u_out, u_in),
        batch=x.shape[0],
        groups=groups,
        kernel=math.prod(kernel),
        positions_in=math.prod([-(-n // s) for n, s in zip(x.shape[2:], skip, strict=True)]),
        positions_out=_positions_out(x.shape[2:], kernel, stride, pads, dilation),
    )
    contraction = contraction or cheapest(sizes)
    with without_autocast(core):
        weight = core
        for factor in spatial:  # axis 2 goes last each time, which restores the order at the end
            weight = _move(weight, 2, factor)
        weight = _fold_channels(weight, u_out, u_in, contraction, sizes)
    if contraction.project_input:
        x = x[(..., *(slice(None, None, s) for s in skip))]
        stride = [1 if k > 1 else s for s, k in zip(stride, skip, strict=True)]
        x = _pointwise(_groups_to_batch(x, groups), u_in.t())
        x = x.reshape(sizes.batch, groups * sizes.in_rank, *x.shape[2:])
    if contraction.project_output:
        x = _groups_to_batch(x, groups)
        y = _convolve(x, weight, None, stride, pads, dilation, 1, padding_mode)
        y = y.reshape(sizes.batch, groups * sizes.out_rank, *y.shape[2:])
        return _pointwise(y, u_out, bias, groups)
    return _convolve(x, weight, bias, stride, pads, dilation, groups, padding_mode)


def _move(tensor: Tensor, axis: int, factor: Tensor) -> Tensor:
    """Multiply an axis by a factor and put it last."""
    return torch.tensordot(tensor, factor, ([axis], [1]))  # type: ignore[arg-type]


def linear_core_gradient(
    x: Tensor,  # shape: (..., in)
    g: Tensor,  # shape: (..., out)
    factors: Sequence[Tensor],  # shapes: (out, m_out), (in, m_in)
) -> Tensor:  # shape: (m_out, m_in)
    """Return the gradient with respect to the core of `tucker_linear` in any bases.

    ``(g U_out)^T (x U_in)``: the gradient of the dense weight, seen through the bases. It does
    not depend on the core, so the bases may be wider than those of the forward pass.

    Parameters
    ----------
    x : Tensor, shape (..., in)
        Input of the layer.
    g : Tensor, shape (..., out)
        Gradient with respect to its output.
    factors : pair of Tensor, shapes (out, m_out) and (in, m_in)
        Bases.

    Returns
    -------
    Tensor, shape (m_out, m_in)

    Examples
    --------
    >>> linear_core_gradient(torch.ones(5, 3), torch.ones(5, 4), [torch.eye(4), torch.eye(3)]).shape
    torch.Size([4, 3])
    """
    u_out, u_in = (factor.to(g.dtype) for factor in factors)
    x, g = x.to(g.dtype).reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])
    return (g @ u_out).T @ (x @ u_in)


def conv_core_gradient(
    x: Tensor,  # shape: (batch, groups * in, *spatial) or (groups * in, *spatial)
    g: Tensor,  # shape: (batch, out, *spatial_out) or (out, *spatial_out)
    factors: Sequence[Tensor],  # shapes: (out, m_out), (in, m_in), (k_1, m_k1), ...
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
) -> Tensor:  # shape: (m_out, m_in, m_k1, ...)
    """Return the gradient with respect to the core of `tucker_conv` in any bases.

    The weight gradient of the convolution that maps the projected input to the projected
    output, contracted with the spatial bases. It does not depend on the core, so the bases may
    be wider than those of the forward pass.

    Parameters
    ----------
    x : Tensor, shape (batch, groups * in, *spatial) or (groups * in, *spatial)
        Input of the layer.
    g : Tensor, shape (batch, out, *spatial_out) or (out, *spatial_out)
        Gradient with respect to its output.
    factors : sequence of Tensor, shapes (out, m_out), (in, m_in), (k_1, m_k1), ...
        Bases.
    stride, padding, dilation, groups, padding_mode
        As for `tucker_conv`.

    Returns
    -------
    Tensor, shape (m_out, m_in, m_k1, ...)

    Examples
    --------
    >>> bases = [torch.eye(4), torch.eye(3), torch.eye(5)]
    >>> conv_core_gradient(torch.ones(2, 3, 10), torch.ones(2, 4, 6), bases).shape
    torch.Size([4, 3, 5])
    """
    u_out, u_in, *spatial = (factor.to(g.dtype) for factor in factors)
    order = len(spatial)
    if x.dim() == order + 1:
        x, g = x.unsqueeze(0), g.unsqueeze(0)
    kernel = tuple(u.shape[0] for u in spatial)
    stride, dilation = _each(stride, order), _each(dilation, order)
    pads = _pads(padding, kernel, dilation)
    x = _pointwise(_groups_to_batch(x.to(g.dtype), groups), u_in.t())
    x, pad = _padded(x, pads, padding_mode)
    # Each group has its block of rows of U_out; then the groups are further images.
    g = _pointwise(g, _transposed_blocks(u_out, groups), groups=groups)
    g = _groups_to_batch(g, groups)
    size = (u_out.shape[1], u_in.shape[1], *kernel)
    weight: Tensor = _CONV_WEIGHT[order](x, size, g, stride, pad, dilation)
    for basis in spatial:  # axis 2 goes last each time, which restores the order at the end
        weight = _move(weight, 2, basis.t())
    return weight


def without_autocast(tensor: Tensor) -> AbstractContextManager[Any]:
    """Let weights be formed in their own precision; only activations are for autocast.

    (It would round after every factor, and `torch.tensordot` fails under it.)
    """
    kind = tensor.device.type
    if torch.amp.is_autocast_available(kind):
        return torch.autocast(kind, enabled=False)
    return nullcontext()


def _layer_sizes(core: Tensor, u_out: Tensor, u_in: Tensor) -> tuple[int, int, int, int]:
    return u_out.shape[0], u_in.shape[0], core.shape[0], core.shape[1]


def _fold_channels(
    kernel: Tensor,  # shape: (r_out, r_in, ...)
    u_out: Tensor,  # shape: (out, r_out)
    u_in: Tensor,  # shape: (in, r_in)
    contraction: Contraction,
    sizes: Sizes,
) -> Tensor:
    """Contract the kernel with the channel factors that are not projected."""
    input_first, output_first = _both_folded(sizes)
    fold_input = not contraction.project_input
    if fold_input and input_first <= output_first:
        kernel = _move(kernel, 1, u_in).movedim(-1, 1)
        fold_input = False
    if not contraction.project_output:
        kernel = torch.tensordot(u_out, kernel, 1)
    if fold_input:
        kernel = _move(kernel, 1, u_in).movedim(-1, 1)
    return kernel


def _groups_to_batch(x: Tensor, groups: int) -> Tensor:
    if groups == 1:  # a reshape would copy activations that are stored channels last
        return x
    return x.reshape(x.shape[0] * groups, x.shape[1] // groups, *x.shape[2:])


def _pointwise(x: Tensor, matrix: Tensor, bias: Tensor | None = None, groups: int = 1) -> Tensor:
    """Apply a matrix of shape (out, in / groups) to the channels at every position."""
    spatial = x.dim() - 2
    return _CONV[spatial](x, matrix.reshape(*matrix.shape, *(1,) * spatial), bias, groups=groups)


def _transposed_blocks(u_out: Tensor, groups: int) -> Tensor:
    """Stack the transposes of the groups' blocks of rows: (groups * r_out, out / groups)."""
    rows, rank = u_out.shape
    blocks = u_out.reshape(groups, rows // groups, rank).transpose(1, 2)
    return blocks.reshape(groups * rank, rows // groups)


def _padded(
    x: Tensor, pads: Sequence[tuple[int, int]], padding_mode: str
) -> tuple[Tensor, list[int]]:
    """Pad what the convolution cannot pad by itself; return the padding that is left to it."""
    padding = [left for left, _ in pads]
    if padding_mode != "zeros" or any(left != right for left, right in pads):
        flat = [side for pair in reversed(pads) for side in pair]  # F.pad begins at the last axis
        x = F.pad(x, flat, mode=_PAD_MODE.get(padding_mode, padding_mode))
        padding = [0] * len(pads)
    return x, padding


def _convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    pads: Sequence[tuple[int, int]],
    dilation: Sequence[int],
    groups: int,
    padding_mode: str,
) -> Tensor:
    x, padding = _padded(x, pads, padding_mode)
    return _CONV[len(pads)](x, weight, bias, stride, padding, dilation, groups)


def _each(value: int | Sequence[int], order: int) -> list[int]:
    """Spread one number over all spatial dimensions."""
    values = [value] if isinstance(value, int) else list(value)
    return values * order if len(values) == 1 else values


def _pads(
    padding: int | str | Sequence[int], kernel: Sequence[int], dilation: Sequence[int]
) -> list[tuple[int, int]]:
    """Return the padding before and after each spatial dimension; "same" may be uneven."""
    if padding == "valid":
        return [(0, 0)] * len(kernel)
    if padding == "same":
        totals = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        return [(total // 2, total - total // 2) for total in totals]
    assert not isinstance(padding, str)
    return [(pad, pad) for pad in _each(padding, len(kernel))]


def _positions_out(
    spatial: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    pads: Sequence[tuple[int, int]],
    dilation: Sequence[int],
) -> int:
    """Count output positions; none where the kernel does not fit (PyTorch then raises)."""
    extents = zip(spatial, kernel, stride, pads, dilation, strict=True)
    return math.prod([max(0, (n + sum(p) - d * (k - 1) - 1) // s + 1) for n, k, s, p, d in extents])


def _check_conv_input(x: Tensor, in_channels: int, groups: int, order: int) -> None:
    channels = groups * in_channels
    if x.dim() not in (order + 1, order + 2) or x.shape[-order - 1] != channels:
        sides = ", ".join(f"n_{i + 1}" for i in range(order))
        raise ShapeError(
            f"x: expected shape (batch, {channels}, {sides}) or ({channels}, {sides}), "
            f"got {tuple(x.shape)}"
        )
