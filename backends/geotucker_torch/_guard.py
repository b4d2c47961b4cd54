"""All or nothing: what a failed step, or a failed load, has spoiled is put back."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import geotucker as gt

from ._layers import TuckerModule
from ._parts import is_sharded
from ._slots import Slot, find_slots

__all__ = ["Before", "restored_if_it_fails", "untouched_if_loading_fails"]


class Before:
    """All that a step may spoil, as it was before.

    Costs a copy of what the optimizer steps, and of its state. Factors are not copied: they are
    never written in place.

    Parameters
    ----------
    optimizer : torch.optim.Optimizer
        That steps the parameters.
    slots : sequence of Slot
        The Tucker tensors.
    """

    def __init__(self, optimizer: Optimizer, slots: Sequence[Slot]) -> None:
        self._optimizer, self._slots = optimizer, slots
        self._points = [slot.point for slot in slots]
        self._layers = [slot.layer for slot in slots if slot.layer is not None]
        self._lifts = [layer.lift_state() for layer in self._layers]
        self._gradients = {p: p.grad for slot in slots for p in (slot.core, *slot.factors)}
        factors = {factor for slot in slots for factor in slot.factors}
        stepped = [p for group in optimizer.param_groups for p in group["params"]]
        stepped = [p for p in stepped if p.requires_grad and p not in factors]
        self._values = {p: p.detach().clone() for p in stepped}
        self._state = {p: _copy_state(entry) for p, entry in optimizer.state.items()}

    def put_back(self) -> None:
        """Put parameters, gradients, lifts and the optimizer's state back."""
        for slot, point in zip(self._slots, self._points, strict=True):
            core = self._values.get(slot.core, point.core)
            slot.write(gt.TuckerPoint(core, point.factors))
        for parameter, gradient in self._gradients.items():
            parameter.grad = gradient
        for layer, lift in zip(self._layers, self._lifts, strict=True):
            layer.restore_lift(lift)
        with torch.no_grad():
            for parameter, value in self._values.items():
                if parameter not in self._gradients:
                    parameter.copy_(value)
        self._optimizer.state.clear()
        self._optimizer.state.update(self._state)

    def changes(self) -> list[tuple[Tensor, Tensor]] | None:
        """Return each tensor that a step of the cores writes, with what was in it.

        None if there is more to a way back than these: the state is new, or holds other things
        than tensors that have changed.
        """
        pairs = [(parameter.detach(), value) for parameter, value in self._values.items()]
        state = self._optimizer.state
        if set(state) != set(self._state):
            return None
        for parameter, old in self._state.items():
            new = state[parameter]
            if not isinstance(old, dict) or set(new) != set(old):
                return None
            for key, value in old.items():
                if torch.is_tensor(value):
                    pairs.append((new[key], value))
                elif not isinstance(value, dict) and new[key] != value:
                    return None
        same = all(torch.is_tensor(now) and now.shape == then.shape for now, then in pairs)
        return pairs if same and not any(is_sharded(now) for now, _ in pairs) else None


@contextmanager
def restored_if_it_fails(optimizer: Optimizer, slots: Sequence[Slot]) -> Iterator[Before]:
    """Put everything back, as `Before` describes it, if the block raises."""
    before = Before(optimizer, slots)
    try:
        yield before
    except BaseException:
        before.put_back()
        raise


def _copy_state(state: Any) -> Any:
    if isinstance(state, dict):
        return {k: v.clone() if torch.is_tensor(v) else copy.copy(v) for k, v in state.items()}
    return copy.deepcopy(state)


@contextmanager
def untouched_if_loading_fails(
    model: nn.Module, optimizer: Optimizer | None = None, scheduler: Any = None
) -> Iterator[None]:
    """Put everything back if the block raises.

    PyTorch loads layer by layer, and leaves a model half loaded where one does not fit. Costs a
    copy of the model while the block runs; the states of the others are replaced by loading, not
    written into.

    Parameters
    ----------
    model : nn.Module
        Its tensors, gradients and lifts; lazy parameters, which have no values, are left.
    optimizer, scheduler : optional
        By their ``state_dict``.
    """
    model.state_dict()  # has FSDP2 put parts back where a forward pass has left whole parameters
    tensors = [t for t in chain(model.parameters(), model.buffers()) if not nn.parameter.is_lazy(t)]
    # The aliases keep the memory, whatever shape the tensors take; the copies what is in it.
    aliases = [tensor.detach() for tensor in tensors]
    copies = [alias.clone() for alias in aliases]
    gradients = [tensor.grad for tensor in tensors]
    modules = list(model.modules())
    places: list[dict[str, Any]] = []
    for module in modules:
        places += [module._parameters, module._buffers]
    objects = [dict(place) for place in places]
    ranked = [(module, module.rank) for slot in find_slots(model) for module in slot.ranked]
    lifts = [(m, m.lift_state()) for m in modules if isinstance(m, TuckerModule)]
    others = [(part, part.state_dict()) for part in (optimizer, scheduler) if part is not None]
    try:
        yield
    except BaseException:
        for place, before in zip(places, objects, strict=True):
            place.update(before)
        with torch.no_grad():
            for tensor, alias, copied in zip(tensors, aliases, copies, strict=True):
                alias.copy_(copied)
                tensor.grad = None
                if not is_sharded(tensor):  # what is in parts keeps its shape
                    tensor.set_(alias)  # type: ignore[call-overload]
        for tensor, gradient in zip(tensors, gradients, strict=True):
            tensor.grad = gradient
        for module, rank in ranked:
            module.rank = rank
        for layer, lift in lifts:
            layer.restore_lift(lift)
        for part, state in others:
            part.load_state_dict(state)
        for layer, lift in lifts:  # the optimizer has needed the lift, and has armed the layer
            layer.restore_lift(lift)
        raise
