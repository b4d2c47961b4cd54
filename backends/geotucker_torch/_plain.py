"""Plain torch modules in place of Tucker layers: what every form of deployment shares.

Once the weights are fixed, a Tucker layer is a chain of up to three plain layers: *project*, a
pointwise layer by U_in^T (or the lookup of its rows), *kernel*, the core with the spatial factors
folded in, and *spread*, a pointwise layer by U_out. Either channel factor may be folded into the
kernel too (see `_plan`); with both folded the dense layer is left.
"""

import copy
from collections import OrderedDict
from typing import Any, cast

import torch
from torch import Tensor, nn

from ._contract import dense_weight
from ._embedding import TuckerEmbedding
from ._layers import TuckerConv1d, TuckerConv2d, TuckerConv3d, TuckerLinear, TuckerModule
from ._maps import modes_turned
from ._modules import has_hooks
from ._plan import Contraction
from ._point import Shared, own_parameter, shared_parameter, write_point
from ._tensor_embedding import TuckerTensorEmbedding
from ._tensor_linear import TuckerTensorLinear
from ._tensor_module import TensorModule
from ._tensor_plain import plain_tensor
from ._transposed import TuckerConvTranspose1d, TuckerConvTranspose2d, TuckerConvTranspose3d

__all__ = [
    "obstacle",
    "parts",
    "plain_module",
    "settled_copy",
    "tucker_layers",
    "weight_readers",
]

_KNOWN = (
    TuckerLinear,
    TuckerConv1d,
    TuckerConv2d,
    TuckerConv3d,
    TuckerConvTranspose1d,
    TuckerConvTranspose2d,
    TuckerConvTranspose3d,
    TuckerEmbedding,
    TuckerTensorLinear,
    TuckerTensorEmbedding,
)
# Kinds whose weight has the input's axis first.
_TRANSPOSED = (nn.Embedding, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
# By the number of axes of the weight.
_POINTWISE = {2: nn.Linear, 3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}


# Layers


def parts(order: Contraction) -> list[str]:
    """Return the names of the chain's members, first to last."""
    there = {"project": order.project_input, "kernel": True, "spread": order.project_output}
    return [name for name, is_there in there.items() if is_there]


@torch.no_grad()
def plain_module(
    layer: TuckerModule, order: Contraction, shared: Shared | None = None
) -> nn.Module:
    """Build what computes the layer's map in the given order of contraction.

    Each group has its own channels but the same kernel and one of the factors, which are repeated,
    and its own block of rows of the other factor: all three are then grouped layers. A pointwise
    layer without bias commutes with every kind of padding, so that the padding is the kernel's. A
    lookup begins with an embedding of few columns.

    Parameters
    ----------
    layer : TuckerModule
        Of one of the types that this package brings.
    order : Contraction
        The channel factors that are not projected are folded into the kernel.
    shared : dict, optional
        The parameters of modules built before; what is the same matrix of the same tensor is
        taken from there, so that layers that are tied stay so, and what is new is added.

    Returns
    -------
    nn.Module
        A layer of the dense type, or an ``nn.Sequential`` of two or three, in the layer's mode; for
        a tensorised layer see `plain_tensor`. Weights ask for gradients if the core does. It
        shares nothing with the layer.
    """
    shared = {} if shared is None else shared
    if isinstance(layer, TensorModule):
        return plain_tensor(layer, order, shared)
    modules: dict[str, nn.Module] = {}
    if order.project_input:
        modules["project"] = _project(layer, shared)
    modules["kernel"] = _kernel(layer, order, shared)
    if order.project_output:
        modules["spread"] = _spread(layer, shared)
    chain = nn.Sequential(OrderedDict(modules)) if len(modules) > 1 else modules["kernel"]
    return chain.train(layer.training)


def _project(layer: TuckerModule, shared: Shared) -> nn.Module:
    """Build what applies U_in^T."""
    mode = modes_turned(layer.map, (0, 1))[1]
    u_in = layer.factors[mode]
    if isinstance(layer, TuckerEmbedding):
        return _plain(
            nn.Embedding, shared_parameter(shared, layer.core, mode, u_in), **_lookup(layer)
        )
    if isinstance(layer, TuckerLinear):
        return _plain(nn.Linear, shared_parameter(shared, layer.core, (mode, "T"), u_in.t()))
    conv: Any = layer
    groups = conv.groups
    if conv.map.transposed:  # a block of rows for each group
        matrix, stride = u_in.reshape(groups, -1, u_in.shape[1]).mT.flatten(0, 1), 1
    else:  # the positions between the strides of a kernel with one entry are seen by nobody
        matrix, stride = u_in.t().repeat(groups, 1), tuple(conv.map.skip)
    weight = shared_parameter(shared, layer.core, (mode, "T"), _pointwise(layer, matrix))
    return _plain(_POINTWISE[len(layer.shape)], weight, None, groups, stride=stride)


def _kernel(layer: TuckerModule, order: Contraction, shared: Shared) -> nn.Module:
    """Build what applies the core with all that is not projected; spatial factors never are."""
    factors, projected = list(layer.factors), modes_turned(layer.map, order)
    for mode, is_projected in enumerate(projected):
        if is_projected:
            rank = layer.ranks[mode]
            factors[mode] = torch.eye(rank, dtype=layer.core.dtype, device=layer.core.device)
    kernel = dense_weight(layer.core, factors)
    bias, key = None if order.project_output else layer.bias, tuple(projected)
    if isinstance(layer, TuckerEmbedding) and not order.project_input:
        return _plain(
            nn.Embedding, shared_parameter(shared, layer.core, key, kernel), **_lookup(layer)
        )
    if isinstance(layer, TuckerEmbedding):
        return _plain(nn.Linear, shared_parameter(shared, layer.core, (key, "T"), kernel.t()))
    if isinstance(layer, TuckerLinear):
        return _plain(nn.Linear, shared_parameter(shared, layer.core, key, kernel), bias)
    conv: Any = layer
    if projected[0]:  # its rows are no blocks of channels any more: all groups have the same
        kernel = kernel.repeat(conv.groups, *(1,) * (kernel.dim() - 1))
    skips = order.project_input and not conv.map.transposed
    names = "padding", "dilation", "output_padding" if conv.map.transposed else "padding_mode"
    options = {name: getattr(conv, name) for name in names}
    options["stride"] = tuple(conv.map.stride_left) if skips else conv.stride
    weight = shared_parameter(shared, layer.core, key, kernel)
    return _plain(layer.dense_type, weight, bias, conv.groups, **options)


def _spread(layer: TuckerModule, shared: Shared) -> nn.Module:
    """Build what applies U_out."""
    mode = modes_turned(layer.map, (0, 1))[0]
    u_out: Tensor = layer.factors[mode]
    groups = getattr(layer, "groups", 1)
    if layer.map.transposed and groups > 1:
        u_out = u_out.repeat(groups, 1)
    kind = _POINTWISE[len(layer.shape)]
    weight = shared_parameter(shared, layer.core, mode, _pointwise(layer, u_out))
    return _plain(kind, weight, layer.bias, groups)


def _pointwise(layer: TuckerModule, matrix: Tensor) -> Tensor:
    """Return a matrix as the kernel of a pointwise layer."""
    return matrix.reshape(*matrix.shape, *(1,) * (len(layer.shape) - 2))


def _lookup(layer: TuckerEmbedding) -> dict[str, Any]:
    return {name: getattr(layer, name) for name in ("padding_idx", "scale_grad_by_freq")}


def _plain(
    kind: type[Any],
    weight: nn.Parameter,  # shape: that of the kind's weight
    bias: Tensor | None = None,  # shape: (out,)
    groups: int = 1,
    **options: Any,
) -> nn.Module:
    """Build a layer with a weight."""
    first, second = weight.shape[:2]
    sizes = (first, second * groups) if kind in _TRANSPOSED else (second * groups, first)
    if weight.dim() > 2:
        options |= {"kernel_size": weight.shape[2:], "groups": groups}
    if kind is not nn.Embedding:
        options["bias"] = bias is not None
    # On the meta device nothing is drawn: the state of the random generators stays.
    module: Any = kind(*sizes, device="meta", **options)
    module.weight = weight
    if bias is not None:
        module.bias = own_parameter(bias, bias.requires_grad)
    return cast("nn.Module", module)


# Models


def settled_copy(model: nn.Module) -> nn.Module:
    """Copy a model that is no longer trained as it is: bases lifted for a step shrink again."""
    new = copy.deepcopy(model)
    for old, module in zip(model.modules(), new.modules(), strict=True):
        if isinstance(old, TuckerModule) and isinstance(module, TuckerModule):
            narrow = module.narrow if old.is_lifted else None
            module.unlift()
            if narrow is not None:
                write_point(module.core, module.factors, narrow)
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
