"""Whole models: dense layers replaced by Tucker layers, and back."""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from itertools import chain
from typing import Any, TypeAlias, TypeVar

from torch import nn

import geotucker as gt

from ._attention import TuckerMultiheadAttention, split_attention
from ._distribute import distribute
from ._embedding import TuckerEmbedding
from ._layers import (
    TuckerConv1d,
    TuckerConv2d,
    TuckerConv3d,
    TuckerLinear,
    TuckerModule,
    decompose,
)
from ._modules import (
    Selection,
    blamed_on,
    check_model,
    has_hooks,
    replaced,
    selector,
)
from ._rules import whole_model
from ._table import table
from ._tensor_embedding import TuckerTensorEmbedding
from ._tensor_linear import TuckerTensorLinear
from ._tensor_module import Split, TensorModule, split_of
from ._transposed import TuckerConvTranspose1d, TuckerConvTranspose2d, TuckerConvTranspose3d

__all__ = ["Factorization", "FactorizedLayer", "densify", "factorize", "plan"]

_Model = TypeVar("_Model", bound=nn.Module)

_TUCKER: dict[type[nn.Module], type[TuckerModule]] = {
    nn.Linear: TuckerLinear,
    nn.Conv1d: TuckerConv1d,
    nn.Conv2d: TuckerConv2d,
    nn.Conv3d: TuckerConv3d,
    nn.ConvTranspose1d: TuckerConvTranspose1d,
    nn.ConvTranspose2d: TuckerConvTranspose2d,
    nn.ConvTranspose3d: TuckerConvTranspose3d,
    nn.Embedding: TuckerEmbedding,
}
_TYPES = tuple(_TUCKER)
# Layers whose weight is a matrix that may be reshaped.
_TENSOR: dict[type[nn.Module], type[TensorModule]] = {
    nn.Linear: TuckerTensorLinear,
    nn.Embedding: TuckerTensorEmbedding,
}
_Splits: TypeAlias = dict[nn.Module, TuckerMultiheadAttention]


@dataclass(frozen=True)
class FactorizedLayer:
    """What happens, or happened, to one weight: a row of the table.

    Parameters
    ----------
    names : tuple of str
        Dotted names of its layers in the model, several if a layer is shared or the weight tied;
        the root's name is "".
    type : str
        Name of the dense layer's class; several are joined by " = ".
    shape : tuple of int
        Shape of the weight; empty if it has none yet.
    ranks : tuple of int, optional
        Ranks of the Tucker layer; None if the layer stays dense.
    before, after : int
        Parameters, biases included.
    reason : str
        Why the layer stays dense; empty if it does not.
    """

    names: tuple[str, ...]
    type: str
    shape: tuple[int, ...]
    ranks: tuple[int, ...] | None
    before: int
    after: int
    reason: str = ""

    @property
    def name(self) -> str:
        """The first of the names."""
        return self.names[0]


@dataclass(frozen=True)
class Factorization:
    """What `factorize` does to a model; ``str()`` gives a table.

    Parameters
    ----------
    layers : tuple of FactorizedLayer
        All layers of the wanted types, in the order of the model, replaced or not; those that share
        a weight in one.
    before, after : int
        Parameters of the whole model, each counted once.
    unmatched : tuple of str
        Patterns that match none of these layers: misspelt, perhaps.
    """

    layers: tuple[FactorizedLayer, ...]
    before: int
    after: int
    unmatched: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Return the table as plain text."""
        head = ("layer", "type", "shape", "ranks", "before", "after", "")
        done = [layer for layer in self.layers if layer.ranks is not None]
        sums = (sum(layer.before for layer in done), sum(layer.after for layer in done))
        replaced = f"{len(done)} of {len(self.layers)} layers"
        rows = [_cells(layer) for layer in self.layers]
        whole = ("whole model", "", "", "", *_counts(self.before, self.after))
        text = table(head, rows, [(replaced, "", "", "", *_counts(*sums)), whole])
        notes = [f"note: the pattern {text!r} matches no layer" for text in self.unmatched]
        return "\n".join([text, *notes])


def plan(
    model: nn.Module,
    ranks: Any = 0.25,
    *,
    types: Iterable[type[nn.Module]] = _TYPES,
    include: Selection = None,
    exclude: Selection = None,
    tensorise: Any = None,
) -> Factorization:
    """Say what `factorize` would do, without changing the model.

    Parameters and exceptions are those of `factorize`.

    Returns
    -------
    Factorization
        Its ``str()`` is the table that `factorize` prints.

    Examples
    --------
    >>> print(plan(nn.Sequential(nn.Linear(100, 50), nn.ReLU(), nn.Linear(50, 40)), ranks=8))
    layer          type    shape      ranks   before  after
    ---------------------------------------------------------------
    0              Linear  (50, 100)  (8, 8)   5,050  1,314  26.0 %
    2              Linear  (40, 50)   (8, 8)   2,040    824  40.4 %
    ---------------------------------------------------------------
    2 of 2 layers                              7,090  2,138  30.2 %
    whole model                                7,090  2,138  30.2 %
    """
    candidates, _ = _survey(model, ranks, types, include, exclude, tensorise)
    return _summary(model, candidates, (ranks, include, exclude, tensorise))


def factorize(
    model: _Model,
    ranks: Any = 0.25,
    *,
    types: Iterable[type[nn.Module]] = _TYPES,
    include: Selection = None,
    exclude: Selection = None,
    tensorise: Any = None,
    rescale: bool | None = None,
    verbose: bool = True,
) -> _Model | TuckerModule:
    """Replace the dense layers of a model by Tucker layers, by the HOSVD of their weights.

    The model is changed in place; only a model that is itself a dense layer is returned
    replaced. Everything is computed before anything is replaced. Biases stay the same
    Parameter objects; the weights are new parameters, so build the optimizer afterwards.

    Layers that share a weight (an embedding and the output layer of a language model, say) stay
    tied: they get the same core and factors, and are one row of the table.

    ``nn.MultiheadAttention`` becomes a `TuckerMultiheadAttention` if one of its four projections
    is replaced; in the table, in patterns and for rules these are layers of their own, ``q_proj``,
    ``k_proj``, ``v_proj`` and ``out_proj``, and their biases new parameters.

    A layer stays dense, and the table says why, if it would not shrink, if its weight is a
    parameter elsewhere too or computed from other parameters, if it has hooks, which its successor
    would lack, if it is of a subclass, which may do more than its base, or an embedding with
    ``max_norm`` or ``sparse``. Of layers that share a weight all stay dense, or none.

    Parameters
    ----------
    model : nn.Module
        Any model.
    ranks : rank rule, int, float, tuple, or mapping from pattern to one of these
        See `geotucker.Fixed`, `geotucker.Tolerance` and `geotucker.Budget`. In a mapping the first
        pattern that matches a layer's dotted name counts, and layers without a match stay dense.
        A rule that weighs layers against each other sees all of its layers together. A budget
        is one for the whole model (in parameters or bytes); in a mapping, for the weights of
        its layers. Of a budget with a `start` the end chooses the layers, and the start their
        ranks.
    types : iterable of type
        Among ``nn.Linear``, ``nn.Embedding``, ``nn.ConvNd`` and ``nn.ConvTransposeNd`` in one to
        three dimensions (default: all).
    include, exclude : str, sequence of str, or callable, optional
        Which layers: patterns with the wildcards of `fnmatch` for the dotted name, or a
        predicate ``(name, module) -> bool``. Default: all, and none. A shared layer or weight is
        matched if one of its names is.
    tensorise : int, pair, or mapping from pattern to one of these, optional
        Linear and embedding layers whose matrix is reshaped to a tensor of higher order and become
        a `TuckerTensorLinear` or `TuckerTensorEmbedding`: into how many factors, as near to one
        another as can be, the numbers of rows and columns are split, or a pair of such numbers or
        of shapes: ``(out_shape, in_shape)`` of a linear layer, ``(row_shape, column_shape)`` of an
        embedding, say ``((10, 80), (20, 25))`` for 800 and 500. In a mapping the first pattern that
        matches a name counts. A layer that no pattern names, whose sizes are prime, or an embedding
        with a ``padding_idx``, whose row would change with the others, stays a matrix; so do all by
        default.
    rescale : bool, optional
        Whether truncated weights are scaled up towards the norm of the dense ones instead of
        being the nearest to them. By default those are that look untrained, as independent random
        numbers do: the HOSVD of noise keeps little of its energy, and signals would fade from
        layer to layer. State it where training may have been too short to tell.
    verbose : bool
        Whether the table is printed.

    Returns
    -------
    nn.Module
        The model, or the Tucker layer in its place.

    Raises
    ------
    TypeError
        If an argument is of the wrong kind.
    geotucker.RankError
        If `ranks` cannot be used.
    geotucker.NonFiniteError
        If a weight has NaN or infinite entries.

    Examples
    --------
    >>> model = nn.Sequential(nn.Conv2d(16, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3))
    >>> model = factorize(model, ranks=0.25, exclude="0", verbose=False)
    >>> model[2].ranks
    (12, 12, 3, 3)
    """
    candidates, splits = _survey(model, ranks, types, include, exclude, tensorise)
    summary = _summary(model, candidates, (ranks, include, exclude, tensorise))
    chosen = [candidate for candidate in candidates if candidate.ranks is not None]
    layers = dict(chain.from_iterable(c.successors(rescale) for c in chosen))
    if verbose:
        print(summary)
    attentions = {
        old: _swap(split, layers)
        for old, split in splits.items()
        if any(child in layers for child in split.children())
    }
    for encoder in model.modules():  # whose path with nested tensors would read joint weights
        if isinstance(encoder, nn.TransformerEncoder) and not attentions.keys().isdisjoint(
            encoder.modules()
        ):
            encoder.use_nested_tensor = False
    return distribute(_swap(model, {**layers, **attentions}))


def densify(model: _Model) -> _Model | nn.Module:
    """Replace all Tucker layers of a model by dense layers with the same weights, in place.

    Parameters
    ----------
    model : nn.Module
        Any model; a Tucker layer itself is returned replaced.

    Returns
    -------
    nn.Module
        The model, or the dense layer in its place. Biases stay the same Parameter objects, and
        tied layers have one weight.

    Raises
    ------
    TypeError
        If `model` is not a module.

    Examples
    --------
    >>> densify(nn.Sequential(TuckerLinear(8, 4, ranks=2)))
    Sequential(
      (0): Linear(in_features=8, out_features=4, bias=True)
    )
    """
    check_model(model)
    layers = [module for module in model.modules() if isinstance(module, TuckerModule)]
    dense: dict[nn.Module, Any] = {layer: layer.to_dense() for layer in layers}
    weights: dict[Any, nn.Parameter] = {}
    for layer in layers:
        key = layer.core, layer.weight_shape
        dense[layer].weight = weights.setdefault(key, dense[layer].weight)
    attentions = [m for m in model.modules() if isinstance(m, TuckerMultiheadAttention)]
    dense |= {attention: attention.to_dense() for attention in attentions}
    return _swap(model, dense)


@dataclass
class _Candidate:
    """A weight in one layer of a wanted type, or in several, on its way to a decision."""

    layers: dict[nn.Module, list[str]] = field(default_factory=dict)  # with their names
    # the decision: ranks, with the decomposed weight where that chose them, or why none
    ranks: tuple[int, ...] | None = None
    point: gt.TuckerPoint | None = None
    reason: str = ""
    # what the weight is reshaped to, if it is
    reshaped: Split | None = None

    @property
    def module(self) -> Any:
        """The first layer, which stands for all where only the weight counts."""
        return next(iter(self.layers))

    @property
    def names(self) -> list[str]:
        return list(chain.from_iterable(self.layers.values()))

    @property
    def shape(self) -> tuple[int, ...]:
        if self.reshaped is not None:
            return (*self.reshaped[0], *self.reshaped[1])
        weight = self.module._parameters.get("weight")
        return () if weight is None or nn.parameter.is_lazy(weight) else tuple(weight.shape)

    def decide(self, ranks: tuple[int, ...]) -> None:
        """Take the ranks if the layer shrinks by them."""
        size, dense = _tucker_size(self.shape, ranks), math.prod(self.shape)
        if size < dense:
            self.ranks = ranks
        else:
            verb = "grow" if size > dense else "not shrink"
            self.reason = f"would {verb}: {size:,} for {dense:,} weights at ranks {ranks}"

    def successors(self, rescale: bool | None) -> Iterator[tuple[nn.Module, TuckerModule]]:
        """Build the layers that take the place of these, tied as these are."""
        first = None
        for layer in self.layers:
            kind: Any = _TUCKER[type(layer)]
            shapes: dict[str, Any] = {}
            if self.reshaped is not None:
                kind = _TENSOR[type(layer)]
                shapes = dict(zip(kind.shape_names, self.reshaped, strict=True))
            if first is not None:
                new = kind._from_point(layer, first.point, **shapes)
                new.tie(first)
            elif self.point is not None:
                first = new = kind._from_point(layer, self.point, rescale, **shapes)
            else:
                assert self.ranks is not None
                with blamed_on(self.names[0]):
                    first = new = kind.from_dense(layer, self.ranks, rescale=rescale, **shapes)
            yield layer, new


def _survey(
    model: nn.Module,
    ranks: Any,
    types: Iterable[type[nn.Module]],
    include: Selection,
    exclude: Selection,
    tensorise: Any,
) -> tuple[list[_Candidate], _Splits]:
    """Find all layers of the wanted types and decide about each.

    Returned with the attention modules that have layers only when they are split.
    """
    check_model(model)
    kinds = _checked_types(types)
    included, excluded = selector("include", include, True), selector("exclude", exclude, False)
    rules, requests = _checked_rules(ranks), _checked_requests(tensorise)
    owners = _owners(model)
    splits = _splits(model, owners) if nn.Linear in kinds else {}
    candidates = _candidates(model, kinds, splits)
    wanted: dict[str, list[_Candidate]] = {pattern: [] for pattern in rules}
    for candidate in candidates:
        named = [(name, layer) for layer, names in candidate.layers.items() for name in names]
        patterns = [p for p in rules if any(fnmatchcase(name, p) for name, _ in named)]
        if not any(included(name, layer) for name, layer in named):
            candidate.reason = "not included"
        elif any(excluded(name, layer) for name, layer in named):
            candidate.reason = "excluded"
        elif not patterns:
            candidate.reason = "no pattern of ranks matches"
        else:
            reasons = (_obstacle(layer, kinds) for layer in candidate.layers)
            candidate.reason = next(filter(None, reasons), "") or _tie(candidate, owners)
            if not candidate.reason:
                candidate.reshaped = _reshaped(candidate, requests)
                wanted[patterns[0]].append(candidate)
    for pattern, chosen in wanted.items():
        rule = rules[pattern]
        if isinstance(rule, gt.Budget):
            own = nn.ParameterList(candidate.module.weight for candidate in chosen)
            _share(chosen, rule, own if isinstance(ranks, Mapping) else model)
        else:
            _decide(chosen, rule)
    return candidates, splits


def _share(candidates: list[_Candidate], budget: gt.Budget, whole: nn.Module) -> None:
    """Share a budget for all parameters of a module; what stays dense of them is spent first.

    Where a schedule ends says which layers are to be Tucker layers, and its start their ranks.
    """

    def cut(rule: gt.Budget) -> list[gt.Truncation]:
        chosen = {candidate.module.weight: point for candidate, point in pairs}
        rule = whole_model(rule, whole, chosen, dense=True)
        return gt.truncate([point for _, point in pairs], rule)

    points = [_decomposed(candidate, gt.Tolerance(0.0)) for candidate in candidates]
    pairs = list(zip(candidates, points, strict=True))
    while pairs:
        cuts = cut(replace(budget, steps=0, start=None))
        for (candidate, _), found in zip(pairs, cuts, strict=True):
            candidate.point, candidate.ranks, candidate.reason = found.point, None, ""
            candidate.decide(found.point.ranks)
        shrinking = [pair for pair in pairs if pair[0].ranks is not None]
        if len(shrinking) == len(pairs):
            break
        pairs = shrinking
    if pairs and budget.start is not None:
        cuts = cut(replace(budget.at(0), start=None))
        for (candidate, _), found in zip(pairs, cuts, strict=True):
            candidate.point, candidate.ranks = found.point, found.point.ranks


def _reshaped(candidate: _Candidate, requests: Mapping[str, Any]) -> Split | None:
    """Return what a matrix is reshaped to, by the first pattern that names one of its layers.

    A row of padding would not stay what it is: as a tensor's it is made of what other rows have.
    """
    layers = candidate.layers
    if any(type(m) not in _TENSOR or getattr(m, "padding_idx", None) is not None for m in layers):
        return None
    named = (p for p in requests if any(fnmatchcase(name, p) for name in candidate.names))
    pattern = next(named, None)
    if pattern is None:
        return None
    with blamed_on(candidate.names[0]):
        rows, columns = candidate.module.weight.shape
        shapes = split_of((rows, columns), requests[pattern])
    return shapes if len(shapes[0]) + len(shapes[1]) > 2 else None


def _decomposed(candidate: _Candidate, rule: gt.RankRule) -> gt.TuckerPoint:
    with blamed_on(candidate.names[0]):
        return decompose(candidate.module.weight.reshape(candidate.shape), rule)


def _decide(candidates: list[_Candidate], rule: gt.RankRule) -> None:
    """Choose ranks by one rule; singular values are computed only if the rule asks for them."""
    if isinstance(rule, gt.Fixed):
        for candidate in candidates:
            with blamed_on(candidate.names[0]):
                candidate.decide(rule.for_shape(candidate.shape))
        return
    # A rule that is not per mode may weigh tensors against each other: it sees all at once.
    first = rule if isinstance(rule, gt.ModeRule) else gt.Tolerance(0.0)
    points = [_decomposed(candidate, first) for candidate in candidates]
    if first is not rule and points:
        points = [truncation.point for truncation in gt.truncate(points, rule)]
    for candidate, point in zip(candidates, points, strict=True):
        candidate.decide(point.ranks)
        candidate.point = point


def _splits(model: nn.Module, owners: Counter[nn.Parameter]) -> _Splits:
    """Return what attention modules of PyTorch are split into, where nothing of them is tied."""
    found: _Splits = {}
    for module in model.modules():
        split = split_attention(module)
        if split is not None and all(owners[p] == 1 for p in module.parameters()):
            found[module] = split
    return found


def _candidates(
    model: nn.Module, kinds: tuple[type[nn.Module], ...], splits: _Splits
) -> list[_Candidate]:
    found: dict[nn.Module | nn.Parameter, _Candidate] = {}

    def add(name: str, module: nn.Module) -> None:
        weight = module._parameters.get("weight")
        key = module if weight is None or nn.parameter.is_lazy(weight) else weight
        found.setdefault(key, _Candidate()).layers.setdefault(module, []).append(name)

    inside = {child for attention in splits for child in attention.children()}
    for name, module in model.named_modules(remove_duplicate=False):
        if module in splits:
            for part, layer in splits[module].named_children():
                add(f"{name}.{part}" if name else part, layer)
        elif isinstance(module, kinds) and module not in inside:
            add(name, module)
    return list(found.values())


def _owners(model: nn.Module) -> Counter[nn.Parameter]:
    """Count the places where each parameter is kept."""
    return Counter(
        parameter
        for module in model.modules()
        for parameter in module._parameters.values()
        if parameter is not None
    )


def _tie(candidate: _Candidate, owners: Counter[nn.Parameter]) -> str:
    """Say what keeps the layers dense if others have their weight too."""
    if owners[candidate.module.weight] > len(candidate.layers):
        return "its weight is tied to another parameter"
    return ""


def _obstacle(module: nn.Module, kinds: tuple[type[nn.Module], ...]) -> str:
    """Say what keeps a layer dense at any ranks; nothing if it may be replaced."""
    weight = module._parameters.get("weight")
    if weight is None:
        return "its weight is computed from other parameters"
    if nn.parameter.is_lazy(weight):
        return "lazy: it has no shape before its first forward pass"
    if type(module) not in kinds:
        return "a subclass, which may need the weight itself"
    if not weight.is_floating_point():
        return f"its weight is {str(weight.dtype).removeprefix('torch.')}"
    if weight.numel() == 0:
        return "its weight is empty"
    if has_hooks(module):
        return "it has hooks, which a new layer would lack"
    if not {*module._parameters, *module._buffers, *module._modules} <= {"weight", "bias"}:
        return "it holds more than weight and bias"
    if getattr(module, "max_norm", None) is not None:
        return "max_norm, which changes the weight in every lookup"
    if getattr(module, "sparse", False):
        return "sparse gradients, which cores do not have"
    return ""


def _summary(
    model: nn.Module, candidates: list[_Candidate], patterns: Iterable[Any]
) -> Factorization:
    layers = tuple(map(_row, candidates))
    before = _count(model.parameters())
    after = before + sum(layer.after - layer.before for layer in layers)
    names = [name for candidate in candidates for name in candidate.names]
    unmatched = tuple(
        text
        for text in chain.from_iterable(map(_patterns, patterns))
        if not any(fnmatchcase(name, text) for name in names)
    )
    return Factorization(layers, before, after, unmatched)


def _row(candidate: _Candidate) -> FactorizedLayer:
    parameters = (p for layer in candidate.layers for p in layer.parameters(recurse=False))
    before = after = _count(dict.fromkeys(parameters))
    shape, ranks = candidate.shape, candidate.ranks
    if ranks is not None:
        after += _tucker_size(shape, ranks) - math.prod(shape)
    kinds = dict.fromkeys(type(layer).__name__ for layer in candidate.layers)
    names = tuple(candidate.names)
    return FactorizedLayer(names, " = ".join(kinds), shape, ranks, before, after, candidate.reason)


def _count(parameters: Iterable[nn.Parameter]) -> int:
    return sum(p.numel() for p in parameters if not nn.parameter.is_lazy(p))


def _tucker_size(shape: Sequence[int], ranks: Sequence[int]) -> int:
    return math.prod(ranks) + sum(n * r for n, r in zip(shape, ranks, strict=True))


def _cells(layer: FactorizedLayer) -> tuple[str, ...]:
    name = " = ".join(text or "(the model)" for text in layer.names)
    ranks = "dense" if layer.ranks is None else str(layer.ranks)
    shape = str(layer.shape) if layer.shape else "?"
    return (name, layer.type, shape, ranks, *_counts(layer.before, layer.after, layer.reason))


def _counts(before: int, after: int, reason: str = "") -> tuple[str, str, str]:
    return f"{before:,}", f"{after:,}", reason or f"{100 * after / max(before, 1):.1f} %"


def _swap(model: nn.Module, successors: Mapping[nn.Module, nn.Module]) -> Any:
    """Put each successor, with the old bias, wherever its predecessor is; return the model."""
    for old, new in successors.items():
        if "bias" in old._parameters and "bias" in new._parameters:
            new.bias = old.bias
    return replaced(model, successors)


def _checked_types(types: Any) -> tuple[type[nn.Module], ...]:
    kinds = (types,) if isinstance(types, type) else tuple(types)
    for kind in kinds:
        if kind not in _TUCKER:
            known = ", ".join(f"nn.{known.__name__}" for known in _TUCKER)
            raise TypeError(f"types: expected some of {known}, got {kind!r}")
    return kinds


def _checked_rules(ranks: Any) -> dict[str, gt.RankRule]:
    """Return the rules by pattern, in their order."""
    rules: dict[str, gt.RankRule] = {}
    for pattern, rule in (ranks if isinstance(ranks, Mapping) else {"*": ranks}).items():
        if not isinstance(pattern, str):
            raise TypeError(f"ranks: expected patterns (str) as keys, got {pattern!r}")
        rules[pattern] = gt.as_rule(rule)
    return rules


def _checked_requests(tensorise: Any) -> dict[str, Any]:
    """Return the requests to tensorise by pattern, in their order; their sizes are not checked."""
    requests = tensorise if isinstance(tensorise, Mapping) else {"*": tensorise}
    for pattern, wanted in requests.items():
        number = isinstance(wanted, int) and not isinstance(wanted, bool)
        known = number or isinstance(wanted, (tuple, list)) or wanted is None
        if not isinstance(pattern, str) or not known:
            raise TypeError(
                "tensorise: expected a number of factors, a pair (out_shape, in_shape), or a "
                f"mapping from patterns (str) to these, got {tensorise!r}"
            )
    return {pattern: wanted for pattern, wanted in requests.items() if wanted is not None}


def _patterns(selection: Any) -> list[str]:
    """Return the patterns in an argument; predicates and rank rules have none."""
    if isinstance(selection, str):
        return [selection]
    return list(selection) if isinstance(selection, (Mapping, list, set)) else []
