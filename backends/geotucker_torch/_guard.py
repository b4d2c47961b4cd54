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
from ._slots import Slot, find_slots, layers_of
from ._state import TANGENT

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
        self._layers = layers_of(slots)
        self._lifts = [layer.lift_state() for layer in self._layers]
        self._gradients = {p: p.grad for slot in slots for p in (slot.core, *slot.factors)}
        factors = {factor for slot in slots for factor in slot.factors}
        stepped = [p for group in optimizer.param_groups for p in group["params"]]
        # What has a gradient is stepped, also where it has been frozen since.
        stepped = [p for p in stepped if p.requires_grad or p.grad is not None]
        self._values = {p: p.detach().clone() for p in stepped if p not in factors}
        self._state = {p: _state_copy(entry) for p, entry in optimizer.state.items()}
        self._settings = [_settings_copy(group) for group in optimizer.param_groups]

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
        for group, settings in zip(self._optimizer.param_groups, self._settings, strict=False):
            group.clear()
            group.update(settings)

    def changes(self) -> list[tuple[Tensor, Tensor]] | None:
        """Return each tensor that a step of the cores writes, with what was in it.

        None if there is more to a way back than these: the state is new, holds other things than
        plain tensors that have changed, or tensors that share memory; or the step has changed a
        setting in a parameter group.
        """
        state, groups = self._optimizer.state, self._optimizer.param_groups
        if set(state) != set(self._state) or len(groups) != len(self._settings):
            return None
        pairs: list[tuple[Any, Any]] = [(p.detach(), value) for p, value in self._values.items()]
        entries = [(state[parameter], entry) for parameter, entry in self._state.items()]
        for now, before in chain(entries, zip(groups, self._settings, strict=True)):
            pairs += _differences(now, before)
        return pairs if _are_apart(pairs) else None


@contextmanager
def restored_if_it_fails(optimizer: Optimizer, slots: Sequence[Slot]) -> Iterator[Before]:
    """Put everything back, as `Before` describes it, if the block raises."""
    before = Before(optimizer, slots)
    try:
        yield before
    except BaseException:
        before.put_back()
        raise


def _state_copy(entry: Any) -> Any:
    """Return a copy; the basis parts of moments are never written in place."""
    if not isinstance(entry, dict):
        return copy.deepcopy(entry)
    return {k: dict(v) if k == TANGENT else _copy(v) for k, v in entry.items()}


def _copy(value: Any) -> Any:
    return value.clone() if torch.is_tensor(value) else copy.deepcopy(value)


def _settings_copy(group: dict[str, Any]) -> dict[str, Any]:
    """Return a copy with the same parameters, and the same tensor for a learning rate."""
    own = {k: copy.copy(v) for k, v in group.items() if isinstance(v, (dict, list))}
    return {**group, **own, "params": group["params"]}


def _differences(now: Any, before: Any) -> Iterator[tuple[Any, Any]]:
    """Yield what is not what it was, or may not be: all tensors that were copied."""
    alike = type(now) is type(before)
    if alike and isinstance(now, dict) and now.keys() == before.keys():
        for key in now:
            if key != TANGENT:  # made anew where bases change
                yield from _differences(now[key], before[key])
    elif alike and isinstance(now, (list, tuple)) and len(now) == len(before):
        for pair in zip(now, before, strict=True):
            yield from _differences(*pair)
    else:
        plain = alike and isinstance(now, (bool, int, float, complex, str))
        if now is not before and not (plain and now == before):
            yield now, before


def _is_plain(tensor: Any) -> bool:
    return type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided


def _are_apart(pairs: Sequence[tuple[Any, Any]]) -> bool:
    """Tell whether these are pairs of plain tensors, alike, and no two in one place."""
    for now, before in pairs:
        if not (_is_plain(now) and _is_plain(before)):
            return False
        if (now.shape, now.dtype, now.device) != (before.shape, before.dtype, before.device):
            return False
    places = [now.data_ptr() for now, _ in pairs if now.numel()]
    return len(set(places)) == len(places)


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
