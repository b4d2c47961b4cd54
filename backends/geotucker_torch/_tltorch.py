"""tensorly-torch: its layers into ours and back, and all that it does not do by itself.

What it gets wrong is worked around here, or by going through the layers of this package:

- importing it switches TensorLy's backend for everyone (`_imported`);
- a FactorizedLinear with unequal numbers of input and output modes runs only "reconstructed", and a
  tensor that a FactorizedConv is built around is registered twice (`_theirs`);
- its modules keep the ranks in an attribute beside the tensor, and read that (`ranked_modules`);
- ``FactorizedConv.from_conv`` takes the first stride for all and ignores padding modes, groups and
  the like: a convolution goes there by ``TuckerConv2d.from_dense`` and `to_tltorch`, which leaves
  what cannot be said there.

The tests of this module fail as soon as one of these is mended.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import tensorly as tl
import torch
from torch import Tensor, nn

import geotucker as gt
from geotucker import _ops

from ._attention import TuckerMultiheadAttention
from ._embedding import EmbeddingModule, TuckerEmbedding
from ._layers import TuckerConv1d, TuckerConv2d, TuckerConv3d, TuckerLinear, TuckerModule
from ._modules import check_model, has_hooks, replaced
from ._point import own_parameter
from ._tensor_embedding import TuckerTensorEmbedding
from ._tensor_linear import TuckerTensorLinear
from ._tensor_module import TensorModule

__all__ = ["from_tltorch", "holds_tucker", "ranked_modules", "to_tltorch"]

_Model = TypeVar("_Model", bound=nn.Module)

_CONVS: dict[int, type[TuckerModule]] = {1: TuckerConv1d, 2: TuckerConv2d, 3: TuckerConv3d}


def from_tltorch(model: _Model) -> _Model | nn.Module:
    """Replace layers of tensorly-torch by layers of this package, in place: the same function.

    Those train in one pass, without a closure, and contract faster. Replaced are FactorizedConv,
    FactorizedLinear, FactorizedEmbedding and TRL with a Tucker weight, real and for one layer. All
    else stays, and trains as it is: joint layers, weights that several layers share, complex
    tensors, other formats, subclasses, and modules or weights with hooks (tensor dropout is one). A
    TCL has a matrix for each mode and no core, so that there is no basis to be moved: it stays, and
    the optimizer that `TDLRT` wraps trains its matrices like all dense ones.

    Parameters
    ----------
    model : nn.Module
        Any model; a layer itself is returned replaced. Cores and factors are new parameters, so
        build the optimizer afterwards.

    Returns
    -------
    nn.Module
        The model, or the layer in its place. Factors are orthonormalised. Biases stay the same
        Parameter objects. A TRL becomes an ``nn.Sequential`` of `TuckerTensorLinear` and what
        reshapes its input and output.

    Raises
    ------
    TypeError
        If `model` is not a module.
    geotucker.NonFiniteError
        If a weight has NaN or infinite entries; nothing is replaced then.

    Examples
    --------
    >>> import tltorch
    >>> theirs = tltorch.FactorizedLinear((2, 4), (3, 4), factorization="tucker", rank=(2,) * 4)
    >>> from_tltorch(theirs).ranks
    (2, 2, 2, 2)
    """
    check_model(model)
    owners = Counter(child for m in model.modules() for child in m._modules.values())
    found = {
        module: _ours(name, module)
        for name, module in model.named_modules()
        if owners[module._modules.get("weight")] == 1
    }
    return replaced(model, {module: new for module, new in found.items() if new is not None})


def to_tltorch(model: _Model) -> _Model | nn.Module:
    """Replace layers of this package by layers of tensorly-torch, in place: the same function.

    Convolutions become FactorizedConv, linear layers FactorizedLinear (in what a TRL has become,
    too), embeddings FactorizedEmbedding. A convolution with groups, a padding mode or uneven
    padding, or an embedding with ``padding_idx`` or ``scale_grad_by_freq``, which tensorly-torch
    does not have, stays, and so do other kinds of layers, tied ones, the projections of attention,
    subclasses, and layers with hooks.

    Parameters
    ----------
    model : nn.Module
        Any model; a layer itself is returned replaced.

    Returns
    -------
    nn.Module
        The model, or the layer in its place. Factors ask for gradients if the core does, as is
        usual there. Biases stay the same Parameter objects.

    Raises
    ------
    TypeError
        If `model` is not a module.
    ImportError
        If tensorly-torch is not installed.

    Notes
    -----
    TensorLy's backend stays as it is. Layers of tensorly-torch need ``tl.set_backend("pytorch")``
    when they run.

    Examples
    --------
    >>> model = to_tltorch(nn.Sequential(TuckerLinear(6, 4, ranks=2), nn.ReLU()))
    >>> type(model[0]).__name__, tl.get_backend()
    ('FactorizedLinear', 'numpy')
    """
    check_model(model)
    with _imported() as tltorch:
        layers = [m for m in model.modules() if isinstance(m, TuckerModule)]
        owners = Counter(layer.core for layer in layers)
        attentions = (m for m in model.modules() if isinstance(m, TuckerMultiheadAttention))
        kept = {child for attention in attentions for child in attention.children()}
        kept |= {layer for layer in layers if owners[layer.core] > 1}
        found = {layer: _theirs(layer, tltorch) for layer in layers if layer not in kept}
    return replaced(model, {layer: new for layer, new in found.items() if new is not None})


def holds_tucker(module: nn.Module) -> bool:
    """Tell whether a module is a real ``tltorch.TuckerTensor``."""
    # By name: importing tensorly-torch would switch TensorLy's backend for everyone.
    names = {
        base.__name__ for base in type(module).__mro__ if base.__module__.startswith("tltorch.")
    }
    if "TuckerTensor" not in names or any(name.startswith("Complex") for name in names):
        return False
    # neuraloperator's spectral weights are complex without saying so in their type.
    core = module.core
    return torch.is_tensor(core) and not core.is_complex()


def ranked_modules(model: nn.Module, tensor: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules that repeat the ranks of a ``tltorch.TuckerTensor`` in an attribute."""
    yield tensor
    for module in model.modules():
        # Not getattr: a layer of ours would form its dense weight.
        if module._modules.get("weight") is tensor and hasattr(module, "rank"):
            yield module


@contextmanager
def _imported() -> Iterator[Any]:
    """Give tensorly-torch, and TensorLy the backend that it needs, for a while."""
    backend = tl.get_backend()
    try:
        import tltorch

        tl.set_backend("pytorch")
        yield tltorch
    except ImportError as error:
        raise ImportError(
            "tensorly-torch is not installed; it comes with: pip install 'geotucker[tltorch]'"
        ) from error
    finally:
        tl.set_backend(backend)


# Theirs to ours


def _ours(name: str, module: nn.Module) -> nn.Module | None:
    """Return the layer of ours that computes what a module computes, if there is one."""
    kind = type(module)
    converters: dict[str, Callable[[Any], nn.Module | None]] = {
        "FactorizedConv": _from_conv,
        "FactorizedEmbedding": _from_embedding,
        "FactorizedLinear": _from_linear,
        "TRL": _from_regression,
    }
    convert = converters.get(kind.__name__)
    weight = module._modules.get("weight")
    if convert is None or not kind.__module__.startswith("tltorch.") or weight is None:
        return None
    known = holds_tucker(weight) and isinstance(weight.core, nn.Parameter)
    if not known or has_hooks(module) or has_hooks(weight):
        return None
    if not all(map(math.isfinite, _ops.largest([p.detach() for p in weight.parameters()]))):
        raise gt.NonFiniteError(
            f"model: expected finite weights, got NaN or infinity in layer {name!r}"
        )
    return convert(module)


def _from_conv(conv: Any) -> nn.Module | None:
    order = len(conv.weight.factors) - 2
    if conv.n_layers != 1 or order not in _CONVS:
        return None
    out_channels, in_channels, *kernel = (len(factor) for factor in conv.weight.factors)
    options = {name: tuple(getattr(conv, name).tolist()) for name in _OPTIONS}
    layer = _built(conv, _CONVS[order], (in_channels, out_channels, tuple(kernel)), options)
    layer.bias = conv.bias
    return layer


_OPTIONS = ("stride", "padding", "dilation")


def _from_linear(linear: Any) -> nn.Module | None:
    if linear.n_layers != 1:
        return None
    layer = _built_linear(linear, *_sides(linear))
    layer.bias = linear.bias
    return layer


def _from_embedding(embedding: Any) -> nn.Module | None:
    if embedding.n_layers != 1:
        return None
    rows, columns = _sides(embedding)
    if len(rows) == len(columns) == 1:
        return _built(embedding, TuckerEmbedding, (*rows, *columns), {})
    return _built(embedding, TuckerTensorEmbedding, (rows, columns), {})


def _sides(module: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the shapes of rows and columns of a weight that is a matrix."""
    shapes = module.weight.tensorized_shape
    rows, columns = ((side,) if isinstance(side, int) else tuple(side) for side in shapes)
    return rows, columns


def _from_regression(regression: Any) -> nn.Module | None:
    """Their axes are those of the input, then those of the output."""
    inputs, outputs = regression.input_shape, regression.output_shape
    if len(regression.weight.factors) != len(inputs) + len(outputs):
        return None
    layer = _built_linear(regression, outputs, inputs, turn=len(inputs))
    layer.bias = bias = regression.bias
    if bias is not None and bias.dim() > 1:
        layer.bias = own_parameter(bias.flatten(), bias.requires_grad)
    return nn.Sequential(nn.Flatten(), layer, nn.Unflatten(1, outputs)).train(regression.training)


def _built_linear(
    module: Any, outputs: tuple[int, ...], inputs: tuple[int, ...], turn: int = 0
) -> TuckerModule:
    if len(outputs) == len(inputs) == 1:
        return _built(module, TuckerLinear, (*inputs, *outputs), {}, turn)
    return _built(module, TuckerTensorLinear, (inputs, outputs), {}, turn)


def _built(
    module: Any,
    kind: type[TuckerModule],
    sizes: Sequence[Any],
    options: dict[str, Any],
    turn: int = 0,
) -> TuckerModule:
    """Build the layer with the weight of the module, the first `turn` of whose modes go last."""
    core, factors = module.weight.core, list(module.weight.factors)
    modes = [*range(turn, core.dim()), *range(turn)]
    point = _orthonormal(core.permute(modes), [factors[mode] for mode in modes])
    make: Any = kind
    # On the meta device nothing is drawn: the state of the random generators stays.
    if not issubclass(kind, EmbeddingModule):
        options = {**options, "bias": False}
    layer: TuckerModule = make(*sizes, ranks=1, device="meta", **options)
    layer.core = own_parameter(point.core.to(core.dtype), core.requires_grad)
    layer.factors = nn.ParameterList(
        own_parameter(factor.to(core.dtype), False) for factor in point.factors
    )
    return layer.train(module.training)


@torch.no_grad()
def _orthonormal(core: Tensor, factors: Sequence[Tensor]) -> gt.TuckerPoint:
    """Bring a Tucker tensor into our form, in float32 at least."""
    wide = torch.promote_types(core.dtype, torch.float32)
    return gt.orthonormalise((core.detach().to(wide), [u.detach().to(wide) for u in factors]))


# Ours to theirs


def _theirs(layer: TuckerModule, tltorch: Any) -> Any:
    """Return tensorly-torch's layer that computes what ours computes, if there is one."""
    if has_hooks(layer):
        return None
    core, factors = _parameters(layer)
    # Built around a tensor they would register it twice; and on the meta device nothing is drawn.
    options = {"factorization": "tucker", "rank": tuple(core.shape), "device": "meta"}
    if type(layer) in _CONVS.values():
        sizes = _conv_options(layer)
        if sizes is None:
            return None
        new = tltorch.FactorizedConv(**sizes, bias=False, **options)
        new.weight = tltorch.TuckerTensor(core, factors)
    elif type(layer) in (TuckerLinear, TuckerTensorLinear):
        sides = _split(layer)
        # Their contraction takes as many output modes as there are input modes.
        way = "factorized" if len(sides[0]) == len(sides[1]) else "reconstructed"
        new = tltorch.FactorizedLinear(*reversed(sides), implementation=way, bias=False, **options)
        new.weight = tltorch.factorized_tensors.TuckerTensorized(core, factors, sides)
    elif type(layer) in (TuckerEmbedding, TuckerTensorEmbedding):
        if layer.padding_idx is not None or layer.scale_grad_by_freq:
            return None
        sides = _split(layer)
        names = "tensorized_num_embeddings", "tensorized_embedding_dim"
        shapes = dict(zip(names, sides, strict=True))
        new = tltorch.FactorizedEmbedding(
            *layer.weight_shape, auto_tensorize=False, **shapes, **options
        )
        new.weight = tltorch.factorized_tensors.TuckerTensorized(core, factors, sides)
        return new.train(layer.training)
    else:
        return None
    new.bias = layer.bias
    return new.train(layer.training)


def _split(layer: TuckerModule) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the shapes of rows and columns of a weight that is a matrix."""
    return layer.split if isinstance(layer, TensorModule) else (layer.shape[:1], layer.shape[1:])


def _conv_options(layer: Any) -> dict[str, Any] | None:
    pads = layer.map.pads
    if layer.groups != 1 or layer.padding_mode != "zeros" or any(a != b for a, b in pads):
        return None
    names = ("in_channels", "out_channels", "kernel_size", "stride", "dilation")
    return {**{name: getattr(layer, name) for name in names}, "padding": [pad for pad, _ in pads]}


def _parameters(layer: TuckerModule) -> tuple[nn.Parameter, list[nn.Parameter]]:
    """Return parameters of their own at the point that no lift has widened."""
    point = layer.point if layer.narrow is None else layer.narrow
    wanted = layer.core.requires_grad
    return own_parameter(point.core, wanted), [own_parameter(u, wanted) for u in point.factors]
