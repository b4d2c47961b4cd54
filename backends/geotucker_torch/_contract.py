"""The forward maps of Tucker layers, by contraction of their factors.

The functions are pure, and differentiable in every argument that asks for it. In which order
they contract is decided by `_plan`; what the contractions are is said by `_maps`.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ._maps import ConvMap, LayerMap, LinearMap, core_turned, modes_turned
from ._plan import Contraction, Sizes, both_folded, cheapest

__all__ = [
    "autocast_dtype",
    "cast",
    "contract",
    "core_gradient",
    "dense_weight",
    "fold",
    "tucker_conv",
    "tucker_linear",
    "without_autocast",
]


def contract(
    layer_map: LayerMap,
    x: Tensor,
    core: Tensor,  # shape: (r_out, r_in, r_k1, ...), with the first two swapped if transposed
    factors: Sequence[Tensor],  # shapes: (out, r_out), (in, r_in), (k_1, r_k1), ..., likewise
    bias: Tensor | None = None,  # shape: (out,)
    contraction: Contraction | None = None,
) -> Tensor:
    """Apply the layer with the weight ``core x_1 U_out x_2 U_in ...`` without forming it.

    Parameters
    ----------
    layer_map : LayerMap
        The kind of layer and its options.
    x : Tensor
        Input of the layer.
    core, factors : Tensor, sequence of Tensor
        Of the weight; the factors need not be orthonormal.
    bias : Tensor, optional
        Added to the output.
    contraction : Contraction, optional
        Forces an order (then the weight may be formed after all); default: the `cheapest`.

    Returns
    -------
    Tensor
        What the dense layer would return.

    Raises
    ------
    geotucker.ShapeError
        If `x` does not fit the layer.
    """
    core, factors = core_turned(layer_map, core), modes_turned(layer_map, factors)
    u_out, u_in = factors[:2]
    layer_map.check(x, u_in.shape[0])
    rows = layer_map.enter(x)
    sizes = layer_map.sizes(rows, core, u_out, u_in)
    trained = core.requires_grad and torch.is_grad_enabled()
    core_alone = trained and not any(factor.requires_grad for factor in factors)
    contraction = contraction or cheapest(sizes, core_alone)
    with without_autocast(core):
        kernel = fold(core, factors, contraction, sizes)
    a = layer_map.project_input(rows, u_in) if contraction.project_input else rows
    if contraction.project_output:
        b = layer_map.apply(a, kernel, None, contraction)
        return layer_map.leave(layer_map.spread_output(b, u_out, bias), x)
    return layer_map.leave(layer_map.apply(a, kernel, bias, contraction), x)


def core_gradient(
    layer_map: LayerMap,
    x: Tensor,
    g: Tensor,
    factors: Sequence[Tensor],  # shapes: (n_i, m_i)
    known: tuple[Tensor | None, Tensor | None] = (None, None),
    ranks: Sequence[int] = (0, 0),
) -> Tensor:  # shape: (m_1, ..., m_d)
    """Return the gradient with respect to the core in any bases.

    It is the gradient of the dense weight, seen through the bases, and does not depend on the
    core, so the bases may be wider than those of the forward pass: the kernel gradient of the
    map between projected input and projected output gradient, contracted with the spatial bases.

    Parameters
    ----------
    layer_map : LayerMap
        The kind of layer and its options.
    x, g : Tensor
        Input of the layer and gradient of its output, as `enter` and `enter_gradient` return
        them.
    factors : sequence of Tensor
        Bases, of the dtype of `g`, in the order of the weight's axes.
    known : pair of Tensor, optional
        The projections of g and of x on their first columns, where they have been computed.
    ranks : pair of int
        How many columns these are, of the output's basis and of the input's.

    Returns
    -------
    Tensor, shape (m_1, ..., m_d)
    """
    u_out, u_in, *spatial = modes_turned(layer_map, factors)

    def projected(
        project: Callable[[Tensor, Tensor], Tensor], t: Tensor, basis: Tensor, mode: int
    ) -> tuple[Tensor, bool]:
        if basis.shape[0] == basis.shape[1]:
            # A rotation: cheaper on the small result than on the activations.
            return t, False
        part = known[mode]
        if part is None:
            return project(t, basis), True
        new = basis[:, ranks[mode] :]
        return (layer_map.join(part, project(t, new)) if new.shape[1] else part), True

    h, out_projected = projected(layer_map.project_output, g, u_out, 0)
    a, in_projected = projected(layer_map.project_input, x, u_in, 1)
    kernel = layer_map.kernel_gradient(a, h, Contraction(out_projected, in_projected))
    if not in_projected:
        kernel = _move(kernel, 1, u_in.t()).movedim(-1, 1)
    if not out_projected:
        kernel = torch.tensordot(u_out.t(), kernel, 1)
    return core_turned(layer_map, _fold_spatial(kernel, [basis.t() for basis in spatial]))


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
) -> Tensor:  # shape: (..., out)
    """Return ``F.linear(x, W, bias)`` for ``W = U_out core U_in^T``; see `contract`.

    Examples
    --------
    >>> x, core = torch.ones(5, 3), torch.ones(1, 1)
    >>> tucker_linear(x, core, [torch.ones(4, 1), torch.ones(3, 1)]).shape
    torch.Size([5, 4])
    """
    return contract(LinearMap(), x, core, factors, bias, contraction)


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
) -> Tensor:  # shape: (batch, out, *spatial_out) or (out, *spatial_out)
    """Return the convolution with ``W = core x_1 U_out x_2 U_in x_3 U_k1 ...``; see `contract`.

    Options are those of ``torch.nn.functional.conv2d``, in one to three dimensions, with
    `padding_mode` as for ``nn.Conv2d``.

    Examples
    --------
    >>> factors = [torch.ones(4, 1), torch.ones(3, 1), torch.ones(5, 1)]
    >>> tucker_conv(torch.ones(2, 3, 10), torch.ones(1, 1, 1), factors, padding="same").shape
    torch.Size([2, 4, 10])
    """
    kernel = [factor.shape[0] for factor in factors[2:]]
    layer_map = ConvMap.of(kernel, stride, padding, dilation, groups, padding_mode)
    return contract(layer_map, x, core, factors, bias, contraction)


def without_autocast(tensor: Tensor) -> AbstractContextManager[Any]:
    """Let weights be formed in their own precision; only activations are for autocast.

    (It would round after every factor, and `torch.tensordot` fails under it.)
    """
    kind = tensor.device.type
    if torch.amp.is_autocast_available(kind):
        return torch.autocast(kind, enabled=False)
    return nullcontext()


def autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """Return what autocast casts to where a tensor is; None if it is off."""
    kind = tensor.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def cast(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Cast as autocast does, which leaves float64 alone."""
    left = dtype is None or not tensor.is_floating_point() or tensor.dtype == torch.float64
    return tensor if left else tensor.to(dtype)


def fold(
    core: Tensor,  # shape: (r_out, r_in, r_k1, ...)
    factors: Sequence[Tensor],  # shapes: (out, r_out), (in, r_in), (k_1, r_k1), ...
    contraction: Contraction,
    sizes: Sizes,
) -> Tensor:
    """Return the kernel: the core with the spatial factors and those that are not projected."""
    u_out, u_in, *spatial = factors
    kernel = _fold_spatial(core, spatial)
    input_first, output_first = both_folded(sizes)
    fold_input = not contraction.project_input
    if fold_input and input_first <= output_first:
        kernel = _move(kernel, 1, u_in).movedim(-1, 1)
        fold_input = False
    if not contraction.project_output:
        kernel = torch.tensordot(u_out, kernel, 1)
    if fold_input:
        kernel = _move(kernel, 1, u_in).movedim(-1, 1)
    return kernel


def _fold_spatial(core: Tensor, spatial: Sequence[Tensor]) -> Tensor:
    """Apply matrices to axes 2, 3, ... of a core."""
    for factor in spatial:  # axis 2 goes last each time, which restores the order at the end
        core = _move(core, 2, factor)
    return core


def _move(tensor: Tensor, axis: int, factor: Tensor) -> Tensor:
    """Multiply an axis by a factor and put it last."""
    return torch.tensordot(tensor, factor, ([axis], [1]))  # type: ignore[arg-type]
