"""All or nothing: what a failed step has spoiled is put back."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.optim import Optimizer

import geotucker as gt

from ._slots import Slot

__all__ = ["restored_if_it_fails"]


@contextmanager
def restored_if_it_fails(optimizer: Optimizer, slots: Sequence[Slot]) -> Iterator[None]:
    """Put parameters, gradients, lifts and the optimizer's state back if the block raises.

    Costs a copy of all that the optimizer steps, and of its state, while the block runs. Factors
    are not copied: they are never written in place.

    Parameters
    ----------
    optimizer : torch.optim.Optimizer
        That steps the parameters.
    slots : sequence of Slot
        The Tucker tensors.
    """
    points = [slot.point for slot in slots]
    layers = [slot.layer for slot in slots if slot.layer is not None]
    lifts = [layer.lift_state() for layer in layers]
    gradients = {p: p.grad for slot in slots for p in (slot.core, *slot.factors)}
    factors = {factor for slot in slots for factor in slot.factors}
    stepped = [p for group in optimizer.param_groups for p in group["params"]]
    values = {p: p.detach().clone() for p in stepped if p.requires_grad and p not in factors}
    state = {p: _copy_state(entry) for p, entry in optimizer.state.items()}
    try:
        yield
    except BaseException:
        for slot, point in zip(slots, points, strict=True):
            slot.write(gt.TuckerPoint(values.get(slot.core, point.core), point.factors))
        for parameter, gradient in gradients.items():
            parameter.grad = gradient
        for layer, lift in zip(layers, lifts, strict=True):
            layer.restore_lift(lift)
        with torch.no_grad():
            for parameter, value in values.items():
                if parameter not in gradients:
                    parameter.copy_(value)
        optimizer.state.clear()
        optimizer.state.update(state)
        raise


def _copy_state(state: Any) -> Any:
    if isinstance(state, dict):
        return {k: v.clone() if torch.is_tensor(v) else copy.copy(v) for k, v in state.items()}
    return copy.deepcopy(state)
