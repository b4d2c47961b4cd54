"""The wrapped optimizer's state for a core, carried through basis change and truncation.

The part of a linear moment in the core's coordinates stays where the optimizer keeps it; the
part that moves the bases lies beside it, in ``state[core]["tangent"]``: by name of the moment, one
tensor ``Kdot_i`` of shape (n_i, r_i) per mode (see `geotucker._moments`). They stand for
``Kdot_i Q_i^T`` with the Q_i that lie beside them as ``"right"``, those of the core when the bases
moved last: in the steps after that the core moves alone.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

import geotucker as gt
from geotucker._geometry import right_bases_of
from geotucker._moments import carry, lift, lift_squares, rotate_squares, zero

from ._lifted import Drift, Right, regauged

__all__ = [
    "TANGENT",
    "carry_state",
    "check_tangents",
    "drift",
    "has_moments",
    "lift_state",
    "right_of",
]

TANGENT = "tangent"
_RIGHT = "right"
# Second moments of torch.optim, which have no exact transport (see geotucker._moments).
_SECOND = {"exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum", "acc_delta", "exp_inf"}
# Bound to coordinates: means nothing in other bases.
_COORDINATE = {"step_size"}
# The mean of centred RMSprop, which subtracts its square from the second moment: transported, the
# two would not fit, and their difference could be negative. From zero it is learnt anew.
_FORGOTTEN = {"grad_avg"}


def lift_state(
    state: dict[str, Any], point: gt.TuckerPoint, wide: gt.TuckerPoint, right: Right
) -> dict[str, Any]:
    """Return the state for the core of ``wide = augment(point, ...)``; `right` as in `lift`.

    Linear moments are written in the wide bases, second ones get means; if any tensor has another
    shape than the core the whole state is reset: it cannot be carried.
    """
    tangent = state.get(TANGENT, {})

    def lifted(key: str, moment: Tensor) -> Tensor:
        if key in _SECOND:
            return lift_squares(moment, wide.ranks)
        own = tangent.get(key)
        parts = zero(point) if own is None else regauged(own, tangent[_RIGHT], right)
        return lift(point, wide, gt.TuckerTangent(moment, parts), right)

    return _mapped(state, point.ranks, lifted)


def carry_state(
    state: dict[str, Any], wide: gt.TuckerPoint, cut: gt.Truncation, right: Mapping[int, Tensor]
) -> dict[str, Any]:
    """Return the state for the truncation `cut` of `wide`; `right` as in `carry`."""
    tangent: dict[str, tuple[Tensor | None, ...]] = {}

    def carried(key: str, moment: Tensor) -> Tensor:
        if key in _SECOND:
            return rotate_squares(moment, cut)
        part = carry(wide, cut, moment, right)
        tangent[key] = part.factors
        return part.core

    mapped = _mapped(state, wide.ranks, carried)
    if not (mapped and tangent):
        return mapped
    # Where a basis lost nothing its parts are zero, in any gauge.
    bases = [right.get(mode) for mode in range(wide.order)]
    # Contiguous, as they come out of a file: products of other strides are rounded otherwise.
    own = tuple(q if q is None else q.contiguous() for q in bases)
    return {**mapped, TANGENT: {**tangent, _RIGHT: own}}


def check_tangents(states: Iterable[Any]) -> None:
    """Raise ValueError if basis parts of moments lack the Q_i that they are written with."""
    for state in states:
        tangent = state.get(TANGENT) if isinstance(state, Mapping) else None
        if tangent and _RIGHT not in tangent:
            raise ValueError(
                f"state_dict: expected {_RIGHT!r} beside the basis parts of moments, got only "
                f"{sorted(tangent)}; it was saved by another version: load the model alone, and "
                "begin with a new optimizer"
            )


def _incomplete(point: gt.TuckerPoint) -> list[int]:
    """Return the modes whose bases do not span everything: the others never move."""
    return [m for m, (n, r) in enumerate(zip(point.shape, point.ranks, strict=True)) if r < n]


def right_of(point: gt.TuckerPoint) -> Right:
    """Return the Q_i of a point's core."""
    (bases,) = right_bases_of([(point.core, _incomplete(point))])
    return [bases.get(mode) for mode in range(point.order)]


def has_moments(state: Mapping[str, Any]) -> bool:
    """Tell whether there is anything to carry."""
    return any(torch.is_tensor(value) and value.dim() for value in state.values())


def drift(state: Mapping[str, Any], group: Mapping[str, Any]) -> Drift | None:
    """Return how the moments are about to move the bases, in the units of a gradient.

    With SGD's momentum the next velocity is ``momentum * v + gradient``, with Adam's it is
    ``beta * m + (1 - beta) * gradient``. Bases that are extended by the sum of ``grad_{K_i}`` and
    this drift hold it exactly. None where there is no moment, or where it is in other units.
    """
    tangent = state.get(TANGENT, {})
    if "momentum_buffer" in tangent and "square_avg" not in state:
        key, weight = "momentum_buffer", partial(_share_of_velocity, group)
    elif "exp_avg" in tangent and "betas" in group:
        key, weight = "exp_avg", partial(_share_of_mean, group)
    else:
        return None
    return Drift(tangent[key], tangent[_RIGHT], weight)


def _share_of_velocity(group: Mapping[str, Any]) -> float:
    """Return what the last velocity counts in the next one, per unit of the gradient."""
    # Muon's velocity is a mean, whose gradients count 1 - momentum.
    lost = group["momentum"] if "ns_steps" in group else group.get("dampening", 0.0)
    return _share(group, group["momentum"], 1.0 - lost)


def _share_of_mean(group: Mapping[str, Any]) -> float:
    """Return what the last mean counts in the next one, per unit of the gradient."""
    return _share(group, group["betas"][0], 1.0 - group["betas"][0])


def _share(group: Mapping[str, Any], kept: float, taken: float) -> float:
    if not taken:  # gradients count nothing: neither do bases that they have turned
        return 0.0
    return (-kept if group.get("maximize", False) else kept) / taken


def _mapped(
    state: dict[str, Any], shape: Sequence[int], transport: Callable[[str, Tensor], Tensor]
) -> dict[str, Any]:
    mapped: dict[str, Any] = {}
    for key, value in state.items():
        if key == TANGENT:
            continue
        if not torch.is_tensor(value) or value.dim() == 0:
            mapped[key] = value
        elif tuple(value.shape) == tuple(shape) and key not in _COORDINATE:
            moved = transport(key, value).contiguous()
            mapped[key] = torch.zeros_like(moved) if key in _FORGOTTEN else moved
        else:
            return {}
    return mapped
