"""Weights from one format into the other: dense into Tucker layers, and the reverse."""

import math
import sys
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

import geotucker as gt

from ._attention import PROJECTIONS, TuckerMultiheadAttention, join_state, split_state
from ._contract import dense_weight, without_autocast
from ._guard import untouched_if_loading_fails
from ._layers import decompose, rescaled, tucker_state
from ._modules import check_model
from ._parts import is_sharded, parts_of
from ._rules import Rules, flops_of
from ._slots import Slot, find_slots

__all__ = ["dense_state_dict", "load_weights"]


def load_weights(
    model: nn.Module,
    state_dict: Mapping[str, Any],
    ranks: Any = None,
    *,
    rescale: bool | None = None,
    strict: bool = True,
    assign: bool = False,
) -> Any:
    """Load a ``state_dict``, of a dense or a factorised model, into either: all or nothing.

    Tucker layers take Tucker weights at the ranks that they find, and dense weights by the HOSVD,
    as `factorize` would have decomposed them. Dense layers take Tucker weights multiplied out.
    ``model.load_state_dict`` does the first two as well, dense weights at the ranks that the layers
    have; but it knows no rules, leaves a model half loaded where a layer does not fit, and refuses
    other ranks for Tucker tensors of tensorly-torch.

    Parameters
    ----------
    model : nn.Module
        On any device. Its Parameter objects stay, unless `assign` is given. What is in parts on
        several processes takes its part of a whole tensor.
    state_dict : mapping of str to Tensor
        For instance from ``safetensors.torch.load_file(path)`` or ``torch.load(path,
        weights_only=True)``, neither of which runs code from the file. It is not changed.
    ranks : rank rule, int, float, tuple or mapping, optional
        For dense weights in Tucker layers, as for `TDLRT`; of a schedule, its end. By default, and
        where no pattern matches, layers keep the ranks that they have.
    rescale : bool, optional
        Whether truncated dense weights are scaled up, as for `factorize`: by default where they
        look untrained.
    strict, assign : bool
        As for ``nn.Module.load_state_dict``. With `assign` a model on the meta device gets values.

    Returns
    -------
    NamedTuple
        ``missing_keys`` and ``unexpected_keys``.

    Raises
    ------
    RuntimeError
        If the state does not fit the model.
    geotucker.GeotuckerError
        If `ranks` cannot be used, or a weight cannot be decomposed by them, because of NaN, say.
        In any case the model is unchanged.

    Examples
    --------
    >>> import torch
    >>> from geotucker_torch import factorize, load_weights
    >>> dense = torch.nn.Sequential(torch.nn.Linear(20, 10))
    >>> model = factorize(torch.nn.Sequential(torch.nn.Linear(20, 10)), 2, verbose=False)
    >>> load_weights(model, dense.state_dict(), ranks=5), model[0].ranks
    (<All keys matched successfully>, (5, 5))
    """
    check_model(model)
    state = _copied(state_dict)
    _split_attention(state, model)
    shapes = {prefix: _dense_shape(model, prefix) for prefix in _tucker_prefixes(state)}
    for prefix, shape in shapes.items():
        if shape is not None:
            _to_dense(state, [prefix])
            key = prefix + "weight"
            if state[key].numel() == math.prod(shape):  # else loading tells of the sizes
                state[key] = state[key].reshape(shape)  # a tensorised one
    _join_attention(state, model)
    _to_tucker(state, model, ranks, rescale, assign)
    tied = [slot.layers for slot in find_slots(model) if len(slot.layers) > 1]
    with untouched_if_loading_fails(model):
        _make_room(model, state)
        _split(state, model)
        result = model.load_state_dict(state, strict=strict, assign=assign)
        for first, *others in tied:  # PyTorch assigns to each layer a parameter of its own
            for layer in others:
                layer.tie(first)
        return result


def dense_state_dict(state_dict: Mapping[str, Any]) -> "OrderedDict[str, Any]":
    """Return a ``state_dict`` with dense weights for all Tucker weights, for whoever has no layers.

    Attention stays split into four layers, as the state does not tell what model it is for;
    `load_weights` joins them where the model has ``nn.MultiheadAttention``.

    Parameters
    ----------
    state_dict : mapping of str to Tensor
        Of a model with Tucker layers. It is not changed.

    Returns
    -------
    OrderedDict of str to Tensor
        ``weight`` instead of ``core``, ``factors.0`` ...; all else, such as biases, is the same.
        The weight of a `TuckerTensorLinear` or `TuckerTensorEmbedding` is the tensor, as a state
        does not say which modes are rows: reshape it to the matrix.

    Examples
    --------
    >>> import torch
    >>> from geotucker_torch import TuckerLinear, dense_state_dict
    >>> layer, dense = TuckerLinear(6, 4, ranks=2), torch.nn.Linear(6, 4)
    >>> dense.load_state_dict(dense_state_dict(layer.state_dict()))
    <All keys matched successfully>
    """
    state = _copied(state_dict)
    _to_dense(state, _tucker_prefixes(state))
    return state


def _copied(state_dict: Mapping[str, Any]) -> "OrderedDict[str, Any]":
    """Return another container for the same tensors, with the versions of modules."""
    if not isinstance(state_dict, Mapping):
        raise TypeError(
            "state_dict: expected a mapping from names to tensors, got "
            f"{type(state_dict).__name__}; read files with safetensors.torch.load_file or "
            "torch.load(path, weights_only=True)"
        )
    state = OrderedDict(state_dict)
    if hasattr(state_dict, "_metadata"):
        state._metadata = state_dict._metadata  # type: ignore[attr-defined]
    return state


def _tucker_prefixes(state: Mapping[str, Any]) -> list[str]:
    """Return what stands before ``core`` where core and factors are a Tucker tensor."""
    prefixes = [key.removesuffix("core") for key in state if f".{key}".endswith(".core")]
    return [prefix for prefix in prefixes if _fits_together(list(_parts(state, prefix)))]


def _parts(state: Mapping[str, Any], prefix: str) -> Iterator[Any]:
    """Yield core and factors."""
    core = state[prefix + "core"]
    yield core
    for mode in range(core.dim() if torch.is_tensor(core) else 0):
        yield state.get(f"{prefix}factors.{mode}")


def _fits_together(parts: list[Any]) -> bool:
    if not all(map(torch.is_tensor, parts)):
        return False
    core, *factors = parts
    return len(factors) == core.dim() > 0 and all(
        factor.dim() == 2 and factor.shape[1] == rank
        for factor, rank in zip(factors, core.shape, strict=True)
    )


def _dense_shape(model: nn.Module, prefix: str) -> tuple[int, ...] | None:
    """Return the shape of the weight of the module of this name, if that is a parameter of its own.

    It is () if the weight has none yet.
    """
    owner, _, part = prefix.removesuffix(".").rpartition(".")
    try:
        attention = model.get_submodule(owner)
        if part in PROJECTIONS and isinstance(attention, nn.MultiheadAttention):
            size = attention.embed_dim
            return size, {"k_proj": attention.kdim, "v_proj": attention.vdim}.get(part, size)
        module = model.get_submodule(prefix.removesuffix("."))
    except AttributeError:
        return None
    weight = module._parameters.get("weight")
    if weight is None:
        return None
    return () if nn.parameter.is_lazy(weight) else tuple(weight.shape)


def _split_attention(state: "OrderedDict[str, Any]", model: nn.Module) -> None:
    """Turn joint weights into those of layers where the model has these, in place."""
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, TuckerMultiheadAttention):
            split_state(state, f"{name}." if name else "")


def _join_attention(state: "OrderedDict[str, Any]", model: nn.Module) -> None:
    """Turn the weights of layers into joint ones where the model has these, in place."""
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, nn.MultiheadAttention):
            join_state(state, f"{name}." if name else "", module.in_proj_weight is not None)


@torch.no_grad()
def _to_dense(state: "OrderedDict[str, Any]", prefixes: list[str]) -> None:
    """Multiply Tucker weights out, in place."""
    for prefix in prefixes:
        core, *factors = _parts(state, prefix)
        state[prefix + "weight"] = dense_weight(core, factors)
        del state[prefix + "core"]
        for mode in range(len(factors)):
            del state[f"{prefix}factors.{mode}"]


def _to_tucker(
    state: "OrderedDict[str, Any]",
    model: nn.Module,
    ranks: Any,
    rescale: bool | None,
    assign: bool,
) -> None:
    """Decompose dense weights of Tucker layers by a rank rule, in place; wrong shapes stay."""
    names: dict[nn.Module, list[str]] = {}  # a shared layer has several
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(f"{name}." if name else "")
    found: list[tuple[Slot, list[str]]] = []
    for slot in find_slots(model):
        if slot.layer is not None:
            named = [(layer, prefix) for layer in slot.layers for prefix in names[layer]]
            prefixes = [prefix for layer, prefix in named if layer.finds_dense(state, prefix)]
            shapes = {tuple(state[prefix + "weight"].shape) for prefix in prefixes}
            if shapes == {slot.layer.weight_shape}:
                found.append((slot, prefixes))
    if not found:
        return
    slots = [slot for slot, _ in found]
    weights = [state[prefixes[0] + "weight"] for _, prefixes in found]
    # What a schedule comes down to in the end.
    rule = Rules.of(ranks, model, slots).in_force(sys.maxsize, [slot.name for slot in slots])
    facts = [gt.Facts(previous=slot.settled_ranks, flops=flops_of(slot)) for slot in slots]
    points = [
        _decomposed(slot.name, weight.reshape(slot.point.shape))
        for slot, weight in zip(slots, weights, strict=True)
    ]
    with without_autocast(weights[0]):
        cuts = gt.truncate(points, rule, facts)
    for (_, prefixes), weight, cut in zip(found, weights, cuts, strict=True):
        point = rescaled(cut.point, weight, rescale)
        for prefix in prefixes:
            del state[prefix + "weight"]
            state.update(tucker_state(point, prefix, weight.dtype if assign else None))


def _make_room(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Give Tucker tensors in modules of other packages, which do not do so, the ranks to come."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    for slot in find_slots(model):
        parameters = (slot.core, *slot.factors)
        parts: list[Any] = [state.get(names[parameter]) for parameter in parameters]
        if slot.layer is None and _fits_together(parts):
            shape = tuple(len(factor) for factor in parts[1:])
            if shape == slot.point.shape and tuple(parts[0].shape) != slot.point.ranks:
                core, *factors = (
                    parameter.new_empty(part.shape)
                    for parameter, part in zip(parameters, parts, strict=True)
                )
                slot.write(gt.TuckerPoint(core, tuple(factors)))


def _split(state: "OrderedDict[str, Any]", model: nn.Module) -> None:
    """Take this process's part of whole tensors where the model is in parts, in place."""
    for key, own in model.state_dict().items():
        given = state.get(key)
        if is_sharded(own) and torch.is_tensor(given) and not is_sharded(given):
            state[key] = parts_of(given, own)


def _decomposed(name: str, weight: Tensor) -> gt.TuckerPoint:
    """Decompose a weight at all its ranks; errors name the layer."""
    try:
        return decompose(weight, gt.Tolerance(0.0))
    except gt.GeotuckerError as error:
        raise type(error)(f"layer {name!r}: {error}") from error
