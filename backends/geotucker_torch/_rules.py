"""Rank rules for the Tucker tensors of a model."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import reduce
from typing import Any, TypeAlias

import numpy as np
from torch import nn

import geotucker as gt
from geotucker._ranks import in_force

from ._layers import TuckerModule
from ._maps import modes_turned
from ._plan import CONTRACTIONS, Sizes, both_folded, flops, folded_flops
from ._slots import Slot
from ._tensor_plan import TensorSizes, price

__all__ = ["Rules", "flops_of", "whole_model"]

Ranks: TypeAlias = tuple[int, ...]


@dataclass(frozen=True)
class Rules:
    """Rules by pattern of module names; each sees all of its tensors together.

    Parameters
    ----------
    rules : dict of str to RankRule
        The first pattern that matches a tensor's name counts.
        Tensors that no pattern names keep the ranks that they have.
    """

    rules: dict[str, gt.RankRule]

    @classmethod
    def of(cls, ranks: Any, model: nn.Module, slots: Sequence[Slot]) -> "Rules":
        """Read the argument `ranks` of an optimizer: a rule, rules by pattern, or None.

        A budget that is not bound to a pattern is one for the whole model.

        Raises
        ------
        geotucker.RankError
            If it is none of these, or a pattern names no tensor.
        """
        names = [slot.name for slot in slots]
        if ranks is not None and not isinstance(ranks, Mapping):
            rule = gt.as_rule(ranks)
            if isinstance(rule, gt.Budget):
                rule = whole_model(rule, model, {slot.core: slot.point for slot in slots})
            return cls({"*": rule})
        rules = {pattern: gt.as_rule(rule) for pattern, rule in (ranks or {}).items()}
        for pattern in rules:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise gt.RankError(
                    f"ranks: the pattern {pattern!r} names none of {', '.join(names)}"
                )
        return cls(rules)

    def state(self) -> dict[str, Any]:
        """Return what a schedule needs to go on elsewhere: where budgets began."""
        budgets = {p: rule for p, rule in self.rules.items() if isinstance(rule, gt.Budget)}
        return {"starts": {pattern: _plain(rule.start) for pattern, rule in budgets.items()}}

    def with_state(self, state: Mapping[str, Any]) -> "Rules":
        """Return these rules with a state of theirs.

        Raises
        ------
        ValueError
            If it is the state of other budgets.
        """
        starts, own = state["starts"], self.state()["starts"]
        if set(starts) != set(own):
            raise ValueError(
                f"state_dict: expected budgets for the patterns {sorted(own)}, as the rule "
                f"{self} has, got {sorted(starts)}; load with the rule that was saved, and build "
                "TDLRT anew to go on by another"
            )
        begun = {
            pattern: dataclasses.replace(rule, start=starts[pattern])
            for pattern, rule in self.rules.items()
            if isinstance(rule, gt.Budget)
        }
        return Rules(self.rules | begun)

    def owner(self, name: str) -> str | None:
        """Return the pattern whose rule is for the tensor of this name, None if there is none."""
        return next((pattern for pattern in self.rules if fnmatchcase(name, pattern)), None)

    def in_force(self, step: int, names: Sequence[str], frozen: Sequence[Slot] = ()) -> gt.RankRule:
        """Return one rule for the tensors of these names, as it is at a step.

        Those that no rule is for keep their previous ranks (`geotucker.Facts`). Of a budget they
        have what tensors that are `frozen` leave, and their own share at least.
        """
        owners = [self.owner(name) for name in names]

        def rule(spectra: Sequence[gt.Spectrum], /) -> list[Ranks]:
            chosen: dict[int, Ranks] = {
                i: gt.Fixed(_previous(spectra[i]))([spectra[i]])[0]
                for i, owner in enumerate(owners)
                if owner is None
            }
            for pattern, own in self.rules.items():
                members = [i for i, owner in enumerate(owners) if owner == pattern]
                if members:
                    seen = [spectra[i] for i in members]
                    beside = [slot for slot in frozen if self.owner(slot.name) == pattern]
                    ranks = _what_is_left(in_force(own, step), seen, beside)(seen)
                    chosen.update(zip(members, map(tuple, ranks), strict=True))
            return [chosen[i] for i in range(len(spectra))]

        return rule

    def __str__(self) -> str:
        """Show the rules."""
        return ", ".join(f"{pattern}: {rule}" for pattern, rule in self.rules.items()) or "as now"


def _what_is_left(
    rule: gt.RankRule, spectra: Sequence[gt.Spectrum], frozen: Sequence[Slot]
) -> gt.RankRule:
    """Return what a budget leaves for tensors beside others that stay as they are."""
    if not (isinstance(rule, gt.Budget) and frozen):
        return rule
    unit = next(u for u in ("parameters", "bytes", "flops") if getattr(rule, u) is not None)
    amount = getattr(rule, unit)
    own = sum(
        _sizes(unit, spectrum.shape, spectrum.shape, spectrum.itemsize, spectrum.facts.flops)[1]
        for spectrum in spectra
    )
    if not own:  # operations that nobody knows: the rule says so
        return rule
    others = [
        _sizes(unit, slot.point.shape, slot.settled_ranks, slot.core.element_size(), flops_of(slot))
        for slot in frozen
    ]
    taken, dense = (sum(sizes) for sizes in zip(*others, strict=True))
    total = amount * (own + dense) if isinstance(amount, float) else amount
    left = max(total - taken, total * own / (own + dense))
    if isinstance(amount, float):
        return dataclasses.replace(rule, **{unit: min(left / own, 1.0)})
    return dataclasses.replace(rule, **{unit: max(int(left), 1)})


def _sizes(
    unit: str, shape: Ranks, ranks: Ranks, itemsize: int, cost: gt.Cost | None
) -> tuple[int, int]:
    """Return what a tensor takes at some ranks, and as a dense one."""
    if unit == "flops":
        return (0, 0) if cost is None else (int(cost.tucker(ranks)), cost.dense)
    size = itemsize if unit == "bytes" else 1
    entries = math.prod(ranks) + sum(n * r for n, r in zip(shape, ranks, strict=True))
    return size * entries, size * math.prod(shape)


def _previous(spectrum: gt.Spectrum) -> Ranks:
    assert spectrum.facts.previous is not None
    return spectrum.facts.previous


def _plain(number: Any) -> Any:
    """Return a number of NumPy as one of Python: pickles with others are not read safely."""
    return number.item() if isinstance(number, np.generic) else number


def whole_model(
    budget: gt.Budget,
    model: nn.Module,
    points: Mapping[nn.Parameter, gt.TuckerPoint],
    dense: bool = False,
) -> gt.Budget:
    """Turn a budget for a model into one for its Tucker tensors.

    What the model has besides counts too: of parameters and bytes, the rest of the budget is
    left for the tensors. A schedule without a start begins at what they take now. (Operations
    are those of the Tucker layers only.)

    Parameters
    ----------
    budget : Budget
        A fraction is one of the model with dense weights.
    model : nn.Module
    points : mapping of nn.Parameter to TuckerPoint
        The Tucker tensors, by their cores, or by their dense weights.
    dense : bool
        Whether the model still holds the dense weights.

    Raises
    ------
    geotucker.RankError
        If the rest of the model takes the budget alone.
    """
    unit = "parameters" if budget.parameters is not None else "bytes"
    amount = getattr(budget, unit)
    if amount is None:
        return budget

    def size(numbers: int, like: Any) -> int:
        return numbers * (like.element_size() if unit == "bytes" else 1)

    everything = sum(size(p.numel(), p) for p in model.parameters())
    full = sum(size(math.prod(point.shape), point.core) for point in points.values())
    now = full if dense else sum(size(point.size, point.core) for point in points.values())
    rest = everything - now
    total = amount * (full + rest) if isinstance(amount, float) else amount
    if total <= rest:
        least = rest / (full + rest)
        raise gt.RankError(
            f"{unit}: expected more than {rest:,} ({least:.4g} of the dense model), which the "
            f"parameters outside of Tucker tensors take, got {amount}"
        )
    changes: dict[str, Any] = {unit: total - rest}
    start = budget.start
    if isinstance(amount, float):
        changes[unit] = min((total - rest) / full, 1.0)
        if budget.steps:
            start = now / full if start is None else (start * (full + rest) - rest) / full
            changes["start"] = min(max(start, changes[unit]), 1.0)
    elif budget.steps:
        changes["start"] = max(now if start is None else start - rest, changes[unit])
    return dataclasses.replace(budget, **changes)


def flops_of(slot: Slot) -> gt.Cost | None:
    """Return the price of a tensor's forward passes for the last training input.

    Where it is tied, every layer that has been used adds its own.
    """
    prices = [_price(layer, layer.sizes) for layer in slot.layers if layer.sizes is not None]
    if len(prices) < 2:
        return prices[0] if prices else None
    dense = sum(cost.dense for cost in prices)
    return gt.Cost(lambda ranks: sum(cost.tucker(ranks) for cost in prices), dense)


def _price(layer: TuckerModule, sizes: Sizes | TensorSizes) -> gt.Cost:
    if isinstance(sizes, TensorSizes):
        return price(sizes)
    layer_map = layer.map
    *chains, dense = CONTRACTIONS

    def tucker(ranks: Any) -> Any:
        out_rank, in_rank = modes_turned(layer_map, ranks)[:2]
        s = sizes._replace(out_rank=out_rank, in_rank=in_rank)
        prices = [flops(contraction, s) for contraction in chains]
        prices.append(folded_flops(dense, s) + np.minimum(*both_folded(s)))
        return reduce(np.minimum, prices)

    is_lookup = sizes.positions_in == 0  # which costs a dense layer nothing
    return gt.Cost(tucker, 0 if is_lookup else folded_flops(dense, sizes))
