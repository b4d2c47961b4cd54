"""Plain modules to keep, fine-tune or export: what becomes of each Tucker layer is counted.

The choice depends on sizes alone, so that it is the same on every machine and needs no example;
`optimize_for_inference` measures instead.
"""

import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, Literal, get_args

from torch import nn

from ._attention import TuckerMultiheadAttention
from ._layers import TuckerModule
from ._maps import modes_turned
from ._modules import Selection, check_model, replaced, selector
from ._plain import (
    obstacle,
    plain_module,
    settled_copy,
    tucker_layers,
    weight_readers,
)
from ._plan import CONTRACTIONS, Contraction, Sizes, folded_flops
from ._point import Shared
from ._tensor_module import TensorModule
from ._tensor_plain import plain_operations, plain_parameters

__all__ = ["finalize"]

Cost = Literal["parameters", "flops"]

_DENSE = Contraction(project_output=False, project_input=False)


def finalize(model: nn.Module, *, cost: Cost = "parameters", dense: Selection = None) -> nn.Module:
    """Return a copy with plain ``torch.nn`` modules in place of the Tucker layers.

    Each Tucker layer becomes an ``nn.Sequential`` of two or three small layers (a tensorised one a
    ``torch.fx.GraphModule``, as no layers of torch permute axes), or one dense layer where that
    costs no more. The result needs this package neither to be loaded nor to run: it can be pickled,
    traced, compiled, quantised, and exported to ONNX like any other.

    Parameters
    ----------
    model : nn.Module
        Any model. It is neither changed nor run.
    cost : {"parameters", "flops"}
        What each layer shall have least of: parameters, or multiply-adds for each position of
        its output. The two differ where a convolution has a stride: a projection runs on all the
        positions between which the kernel then strides; and for embeddings: to look rows up in the
        dense table takes no operation.
    dense : str, sequence of str, or callable, optional
        Layers that become dense at any cost, because their owner reads their weight: patterns
        with the wildcards of `fnmatch` for the dotted name, or a predicate ``(name, module) ->
        bool``. Those in ``nn.TransformerEncoderLayer``, whose fast path reads weights, always do,
        and attention becomes ``nn.MultiheadAttention`` again.

    Returns
    -------
    nn.Module
        The copy, in the same mode, dtypes and devices. Modules that were shared are shared, and
        hooks on other modules are kept. Weights ask for gradients if the layer's core did, and
        biases as before, so that the model can be fine-tuned: by descent on each member of a
        chain, with a new optimizer. Tied layers have the parameters in common that are the same
        matrix in both: all, if they are of one kind; of an embedding and a linear layer the large
        one, the rows of the vocabulary, but not the small one, which is transposed in one of them,
        so that only as `dense` layers they stay one weight in fine-tuning. If one of them becomes
        dense, so do the others. Layers of tensorly-torch
        stay as they are.

    Raises
    ------
    TypeError
        If `model` is not a module, or `dense` of the wrong kind.
    ValueError
        If `cost` is none of these, a pattern in `dense` matches no module, or a Tucker layer
        cannot be replaced, because it has hooks, or is of a subclass, which may do more.

    See Also
    --------
    densify : Replaces every Tucker layer by a dense one.
    optimize_for_inference : Chooses by time instead, for inference on one machine.

    Examples
    --------
    >>> from geotucker_torch import TuckerLinear
    >>> finalize(nn.Sequential(TuckerLinear(100, 50, ranks=8), nn.ReLU(), nn.Linear(50, 10)))
    Sequential(
      (0): Sequential(
        (project): Linear(in_features=100, out_features=8, bias=False)
        (kernel): Linear(in_features=8, out_features=50, bias=True)
      )
      (1): ReLU()
      (2): Linear(in_features=50, out_features=10, bias=True)
    )
    """
    check_model(model)
    if cost not in get_args(Cost):
        raise ValueError(f"cost: expected 'parameters' or 'flops', got {cost!r}")
    is_wanted = selector("dense", dense, default=False)
    _check_patterns(dense, model)
    layers = tucker_layers(model)
    _check_layers(layers)
    new = settled_copy(model)
    readers = weight_readers(new)
    tied: dict[nn.Parameter, list[TuckerModule]] = {}
    read: set[nn.Parameter] = set()
    for (names, old), layer in zip(layers.items(), tucker_layers(new).values(), strict=True):
        tied.setdefault(layer.core, []).append(layer)
        if layer in readers or any(is_wanted(name, old) for name in names):
            read.add(layer.core)
    shared: Shared = {}
    successors: dict[nn.Module, nn.Module] = {}
    for core, members in tied.items():
        modes = _DENSE if core in read else _cheapest(members, cost)
        for layer in members:
            successors[layer] = _successor(layer, _turned(layer, modes), shared)
    for module in new.modules():
        if isinstance(module, TuckerMultiheadAttention):  # PyTorch has none made of chains
            successors[module] = module.to_dense()
    return replaced(new, successors)


def _cheapest(layers: Sequence[TuckerModule], cost: Cost) -> Contraction:
    """Return which modes are to be projected, in the order of the weight's axes.

    Of several choices that cost least it is the one of the fewest layers.
    """

    def price(modes: Contraction) -> int:
        return sum(_price(layer, _turned(layer, modes), cost) for layer in layers)

    return min(reversed(CONTRACTIONS), key=price)


def _turned(layer: TuckerModule, modes: Contraction) -> Contraction:
    """Return the layer's order of contraction."""
    return Contraction(*modes_turned(layer.map, modes))


def _price(layer: TuckerModule, order: Contraction, cost: Cost) -> int:
    if isinstance(layer, TensorModule):
        count = plain_parameters if cost == "parameters" else plain_operations
        return count(layer, order)
    layer_map: Any = layer.map
    out, in_ = modes_turned(layer_map, layer.shape)[:2]
    out_rank, in_rank = modes_turned(layer_map, layer.ranks)[:2]
    kernel, groups = math.prod(layer.shape[2:]), getattr(layer, "groups", 1)
    sizes = Sizes(out, in_, out_rank, in_rank, batch=1, kernel=kernel, groups=groups)
    is_conv, by_flops = len(layer.shape) > 2, cost == "flops"
    if is_conv and layer_map.transposed:
        sizes = sizes._replace(out_channels=out * groups, in_channels=in_ // groups)
        if by_flops:  # in a large image each position of the input has so many of the output
            outputs = math.prod(layer_map.adjoint.stride)
            sizes = sizes._replace(positions_out=outputs, positions_kernel=1)
    elif is_conv and by_flops:
        # In a large image each position of the output has so many that the projection is run on.
        sizes = sizes._replace(positions_in=math.prod(layer_map.stride_left))
    elif layer_map.transposed and by_flops:  # what is looked up is not multiplied
        looked_up = 1 if order.project_input else 0
        sizes = sizes._replace(positions_in=0, positions_kernel=looked_up)
    return folded_flops(order, sizes)


def _successor(layer: TuckerModule, order: Contraction, shared: Shared) -> nn.Module:
    """Build the plain module, with the layer's own bias: other modules may have it too."""
    new = plain_module(layer, order, shared)
    last: Any = new[-1] if isinstance(new, nn.Sequential) else new
    if layer.bias is not None:
        last.bias = layer.bias
    return new


def _check_patterns(selection: Selection, model: nn.Module) -> None:
    if selection is None or callable(selection):
        return
    names = [name for name, _ in model.named_modules(remove_duplicate=False)]
    for pattern in [selection] if isinstance(selection, str) else selection:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(
                f"dense: expected patterns of module names, got {pattern!r}, which matches none"
            )


def _check_layers(layers: Mapping[tuple[str, ...], TuckerModule]) -> None:
    """Raise if a layer would have to stay: the model would still need this package."""
    reasons = {names[0]: obstacle(layer) for names, layer in layers.items()}
    stuck = [f"{name!r} ({reason})" for name, reason in reasons.items() if reason]
    if stuck:
        raise ValueError(
            "model: expected Tucker layers that plain modules can replace, got "
            f"{', '.join(stuck)}; remove the hooks, or put them on the module around the layer, "
            "and replace layers of your own classes yourself"
        )
