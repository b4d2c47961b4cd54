"""Plain torch modules in place of Tucker layers: what every form of deployment shares.

Once the weights are fixed, a Tucker layer is a chain of up to three plain layers: *project*, a
pointwise layer by U_in^T, *kernel*, the core with the spatial factors folded in, and *spread*, a
pointwise layer by U_out. Either channel factor may be folded into the kernel too (see `_plan`);
with both folded the dense layer is left.
"""

import copy
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

from ._contract import dense_weight
from ._layers import TuckerConv1d, TuckerConv2d, TuckerConv3d, TuckerLinear, TuckerModule
from ._modules import has_hooks
from ._plan import Contraction
from ._point import own_parameter
from ._tensor_linear import TuckerTensorLinear
from ._tensor_plain import plain_tensor_linear

__all__ = ["obstacle", "parts", "plain_module", "settled_copy", "tucker_layers", "weight_readers"]

_KNOWN = (TuckerLinear, TuckerConv1d, TuckerConv2d, TuckerConv3d, TuckerTensorLinear)


# Layers


def parts(order: Contraction) -> list[str]:
    """Return the names of the chain's members, first to last."""
    there = {"project": order.project_input, "kernel": True, "spread": order.project_output}
    return [name for name, is_there in there.items() if is_there]


@torch.no_grad()
def plain_module(layer: TuckerModule, order: Contraction) -> nn.Module:
    """Build what computes the layer's map in the given order of contraction.

    Each group has its own channels but the same ``U_in`` and core, which are repeated, and its
    own block of rows of ``U_out``: all three are then grouped layers. A pointwise layer without
    bias commutes with every kind of padding, so that the padding is the kernel's.

    Parameters
    ----------
    layer : TuckerModule
        Of one of the types that this package brings.
    order : Contraction
        The channel factors that are not projected are folded into the kernel.

    Returns
    -------
    nn.Module
        A layer of the dense type, or an ``nn.Sequential`` of two or three, in the layer's mode; for
        a tensorised layer see `plain_tensor_linear`. Weights ask for gradients if the core does. It
        shares nothing with the layer.
    """
    if isinstance(layer, TuckerTensorLinear):
        return plain_tensor_linear(layer, order)
    u_out, u_in = layer.factors[0], layer.factors[1]
    groups = getattr(layer, "groups", 1)
    sampling, options = _options(layer, order)
    kernel = _kernel(layer, order)
    modules: dict[str, nn.Module] = {}
    if order.project_input:
        modules["project"] = _plain(layer, _repeat(u_in.t(), groups), None, groups, sampling)
    if order.project_output:
        modules["kernel"] = _plain(layer, _repeat(kernel, groups), None, groups, options)
        modules["spread"] = _plain(layer, u_out, layer.bias, groups, {})
    else:
        modules["kernel"] = _plain(layer, kernel, layer.bias, groups, options)
    chain = nn.Sequential(OrderedDict(modules)) if len(modules) > 1 else modules["kernel"]
    return chain.train(layer.training)


def _options(layer: TuckerModule, order: Contraction) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return options of projection and kernel: the projection skips what the kernel would not see.

    The positions between the strides of a kernel with one entry are seen by nobody.
    """
    if isinstance(layer, TuckerLinear):
        return {}, {}
    conv: Any = layer
    stride = conv.map.stride_left if order.project_input else conv.stride
    names = ("padding", "dilation", "padding_mode")
    return {"stride": tuple(conv.map.skip)}, {
        "stride": tuple(stride),
        **{name: getattr(conv, name) for name in names},
    }


def _kernel(layer: TuckerModule, order: Contraction) -> Tensor:
    """Fold into the core what is not projected; the spatial factors always are."""
    factors = list(layer.factors)
    for mode, projected in enumerate(order):  # the output's mode is 0, the input's 1
        if projected:
            rank = layer.ranks[mode]
            factors[mode] = torch.eye(rank, dtype=layer.core.dtype, device=layer.core.device)
    return dense_weight(layer.core, factors)


def _repeat(matrix: Tensor, groups: int) -> Tensor:
    return matrix.repeat(groups, *(1,) * (matrix.dim() - 1))


def _plain(
    layer: TuckerModule,
    weight: Tensor,  # shape: (out, in / groups) or (out, in / groups, k_1, ...)
    bias: Tensor | None,  # shape: (out,)
    groups: int,
    options: dict[str, Any],
) -> nn.Module:
    """Build a layer of the same dense type; a matrix becomes a pointwise convolution."""
    kind, order = layer.dense_type, len(layer.shape) - 2
    if order:
        weight = weight.reshape(*weight.shape, *(1,) * (order + 2 - weight.dim()))
        options = {"kernel_size": weight.shape[2:], "groups": groups, **options}
    # On the meta device nothing is drawn: the state of the random generators stays.
    module = kind(
        weight.shape[1] * groups, weight.shape[0], bias=bias is not None, device="meta", **options
    )
    module.weight = own_parameter(weight, layer.core.requires_grad)
    if bias is not None:
        module.bias = own_parameter(bias, bias.requires_grad)
    return module


# Models


def settled_copy(model: nn.Module) -> nn.Module:
    """Copy a model that is no longer trained as it is: bases lifted for a step shrink again."""
    new = copy.deepcopy(model)
    for module in new.modules():
        if isinstance(module, TuckerModule):
            module.unlift()
            module.armed = False
    return new


def tucker_layers(model: nn.Module) -> dict[tuple[str, ...], TuckerModule]:
    """Return the Tucker layers by all their names."""
    names: dict[TuckerModule, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, TuckerModule):
            names.setdefault(module, []).append(name)
    return {tuple(found): layer for layer, found in names.items()}


def obstacle(layer: TuckerModule) -> str:
    """Say what keeps a layer as it is; nothing if it may be replaced."""
    if type(layer) not in _KNOWN:
        return "a subclass, which may do more than its base"
    if has_hooks(layer):
        return "it has hooks, which a new layer would lack"
    if {*layer._parameters, *layer._buffers, *layer._modules} != {"core", "factors", "bias"}:
        return "it holds more than core, factors and bias"
    return ""


def weight_readers(model: nn.Module) -> set[nn.Module]:
    """Return layers in modules of PyTorch that read weights, on some of their paths at least."""
    owners = (m for m in model.modules() if isinstance(m, nn.TransformerEncoderLayer))
    return {child for owner in owners for child in owner.children()}
