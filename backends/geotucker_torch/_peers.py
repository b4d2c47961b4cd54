"""Many processes, one model: what `TDLRT` has in common with those that train the same model.

Each process has the whole model and a batch of its own. Bases must be the same on all of them, so
what they are formed from is averaged *before* they are: at the end of a backward pass the layers'
gradients ``grad_{K_i} L`` and ``grad_C L`` of all processes meet in one message, and then each
process extends the bases by the same averages. These are of the size of the factors and cores; no
dense gradient is formed, let alone sent. In steps that move no bases the gradients of the cores
are all there is. All parameters that ``DistributedDataParallel`` does not average (all of them,
without it) are averaged here.

*Who averages what.* A reducer of DistributedDataParallel knows the shapes that parameters had when
the model was wrapped, and breaks with the first change of a rank: it must leave the Tucker tensors
alone (`distribute`). Averaging is idempotent, so that a gradient that is averaged twice, with
micro-batches added in between, is right all the same: within its ``no_sync`` a pass sends nothing,
unless it extends the bases, which must agree from then on.

*All alike.* NaN on one process is NaN on all after the average: none extends its bases, and `step`
raises on all. Wider bases, and truncated ones, are computed by each from the same numbers. Should
the results differ in a single bit, as on machines of different kinds they may, all take those of
the first process: gradients in different bases of one space have no average.
"""

import time
import weakref
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Variable
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

import geotucker as gt
from geotucker._moments import zero

from ._collectives import (
    Group,
    Part,
    ProcessError,
    all_equal,
    all_objects,
    average,
    fingerprint,
    object_of_first,
    phase,
)
from ._contract import without_autocast
from ._distribute import active_wrapper, check_ignored
from ._layers import TuckerModule
from ._lift import finish
from ._lifted import Use
from ._parts import is_sharded
from ._slots import Slot
from ._state import right_of
from ._whereabouts import Whereabouts

__all__ = ["Peers", "group_of", "group_that_trains", "is_first", "is_joint", "telling"]


def group_of(process_group: Any = None) -> Group | None:
    """Return the group whose processes train together, None without torch.distributed.

    Raises
    ------
    TypeError, ValueError
        If `process_group` is no group, or this process is not in it.
    """
    if not (dist.is_available() and dist.is_initialized()):
        if process_group is not None:
            raise ValueError(
                f"process_group: expected None without torch.distributed, got {process_group!r}"
            )
        return None
    if process_group is None:
        return dist.group.WORLD
    if process_group == dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError("process_group: expected a group that this process is in, got another")
    if not isinstance(process_group, dist.ProcessGroup):
        raise TypeError(
            "process_group: expected a torch.distributed.ProcessGroup, got "
            f"{type(process_group).__name__}"
        )
    return process_group


def is_joint(group: Group | None) -> bool:
    """Tell whether a group has more processes than one."""
    return group is not None and dist.get_world_size(group) > 1


def is_first(model: nn.Module, optimizer: Any = None) -> bool:
    """Tell whether no other process comes before this one among those that train the model."""
    return all(peers.is_first for peers in _peers_of(model, optimizer))


def group_that_trains(model: nn.Module, optimizer: Any = None) -> Group | None:
    """Return the group of the processes that train the model, None if nothing is said of them."""
    peers = next(_peers_of(model, optimizer), None)
    return None if peers is None else peers.group


@contextmanager
def telling(phase: str, model: nn.Module, optimizer: Any = None) -> Iterator[None]:
    """Tell those that train the model that this process is in a phase, and then that it is back."""
    peers = next(_peers_of(model, optimizer), None)
    if peers is None:
        yield
        return
    after = peers.phase
    peers.tell(phase)
    try:
        yield
    except ProcessError:
        after = phase  # those that find out later ask where this one has waited
        raise
    finally:
        peers.tell(after)


def _peers_of(model: nn.Module, optimizer: Any) -> "Iterator[Peers]":
    held = [optimizer, *(m for m in model.modules() if isinstance(m, TuckerModule))]
    return (peers for peers in (getattr(h, "peers", None) for h in held) if peers)


class Peers:
    """The processes that train one model, seen from one of them.

    Parameters
    ----------
    group : torch.distributed.ProcessGroup
        All of them; on each this is built at the same time, for the same model.
    model : nn.Module
        Takes the values, and the ranks, that it has on the first process.
    optimizer : torch.optim.Optimizer
        Steps the parameters.
    slots : sequence of Slot
        The Tucker tensors.

    Raises
    ------
    ValueError
        If the models of the processes differ.
    ProcessError
        If another process is lost.
    """

    def __init__(
        self, group: Group, model: nn.Module, optimizer: Optimizer, slots: Sequence[Slot]
    ) -> None:
        self._group, self._optimizer, self._slots = group, optimizer, slots
        # Backward passes under way at whose end gradients are to be averaged, by their number.
        self._expected: set[int] = set()
        # What has wrapped the model in its last forward passes, and whether that averages then.
        self._wrappers: dict[DistributedDataParallel, bool] = {}
        self._met = True
        self._seconds = 0.0
        self._whereabouts = Whereabouts(group)
        self.steps = 0  # that have been taken, kept by the optimizer
        self.tell("start")
        with phase("start"), torch.no_grad():
            self._start(model)
        for slot in slots:
            for layer in slot.layers:
                layer.peers = self
        ref = weakref.ref(self)
        self._handles = [
            p.register_post_accumulate_grad_hook(lambda _: _expect(ref))
            for p in self._parameters()
            if p.requires_grad and p.is_leaf
        ]

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle as None: a copy of a model has no part in what this one is told."""
        return type(None), ()

    def _start(self, model: nn.Module) -> None:
        tucker = {p for slot in self._slots for p in (slot.core, *slot.factors)}
        rest = [t for t in (*model.parameters(), *model.buffers()) if t not in tucker]
        rest = [t.detach() for t in rest if not is_sharded(t)]
        shapes = {
            "Tucker tensors": {slot.name: tuple(slot.point.shape) for slot in self._slots},
            "other tensors": [tuple(t.shape) for t in rest],
        }
        for process, other in enumerate(found := all_objects(shapes, self._group)):
            if other != found[0]:
                raise ValueError(
                    f"model: expected the same on all processes, got {other} on process {process}, "
                    f"{found[0]} on process 0"
                )
        points, values = object_of_first(([slot.point for slot in self._slots], rest), self._group)
        for slot, point in zip(self._slots, points, strict=True):
            slot.write(_to(point, slot.core.device))
        for tensor, value in zip(rest, values, strict=True):
            tensor.copy_(value)

    @property
    def phase(self) -> str:
        """What was told last."""
        return self._whereabouts.phase

    def tell(self, phase: str) -> None:
        """Tell the others which phase this process enters, should it be lost there."""
        self._whereabouts.tell(phase, self.steps)

    # A training step, in its order.

    def enter(self) -> None:
        """Take note of what has wrapped the model; layers call it in forward.

        Raises
        ------
        ValueError
            If it would average the Tucker tensors.
        """
        if self._met:
            self._wrappers, self._met = {}, False
        # In backward it is an activation checkpoint that runs again.
        if self.phase != "forward" and torch._C._current_graph_task_id() == -1:
            self.tell("forward")
        wrapper = active_wrapper()
        if wrapper is not None:
            if wrapper not in self._wrappers:
                check_ignored(wrapper, self._slots)
            self._wrappers[wrapper] = bool(wrapper.require_backward_grad_sync)

    def expect(self) -> None:
        """Have the gradients averaged at the end of the backward pass that is under way."""
        backward = torch._C._current_graph_task_id()
        if backward not in self._expected:
            self._expected.add(backward)
            self.tell("backward")
            Variable._execution_engine.queue_callback(lambda: self._meet(backward))

    def _meet(self, backward: int) -> None:
        """Average gradients, and extend the bases of layers that are armed by the averages."""
        self._expected.discard(backward)
        self._met = True
        start = time.perf_counter()
        waiting: dict[int, list[tuple[TuckerModule, Use]]] = {}
        for slot in self._slots:
            if slot.layer is not None:
                waiting |= slot.layer.waiting.pop(backward, {})
        unused = [s for s in self._slots if s.layer is not None and id(s.core) not in waiting]
        for slot in unused:  # what was used has found out in the forward pass
            if slot.layer is not None and slot.layer.is_dropped:
                slot.layer.unlift()
        moving = {
            slot.layer: [use for _, use in waiting.get(id(slot.core), [])]
            for slot in self._slots
            if slot.layer is not None and slot.layer.armed and slot.core.requires_grad
        }
        others = self._others(moving) if all(self._wrappers.values()) else []
        with torch.no_grad(), without_autocast(self._slots[0].core):
            sent = [
                *(_part(layer, uses) for layer, uses in moving.items()),
                *(_gradient_part(p) for p in others),
            ]
            means = iter(self._average(sent))
            used = [
                (layer, _joint(layer, uses, mean))
                for (layer, uses), mean in zip(
                    moving.items(), islice(means, len(moving)), strict=True
                )
                if mean is not None
            ]
            for layer, use in used:
                if use.tangent is not None:
                    layer.core.grad = None  # it is in the average
            finish([(layer, [use]) for layer, use in used], self.common)
            for parameter, mean in zip(others, means, strict=True):
                parameter.grad = None if mean is None else mean[0]
            whole = [layer for layer, use in used if use.whole is not None]
            cores = self._average([_gradient_part(layer.core) for layer in whole])
            for layer, mean in zip(whole, cores, strict=True):
                assert mean is not None
                layer.core.grad = mean[0]
                if layer.lifted_norm is not None:
                    layer.lifted_norm = mean[0].abs().amax()
        self.tell("the time between backward and step")
        self._seconds += time.perf_counter() - start

    def _others(self, moving: Mapping[TuckerModule, Any]) -> list[nn.Parameter]:
        """Return the parameters whose gradients nobody else averages."""
        cores = {layer.core for layer in moving}
        reduced = {p for wrapper in self._wrappers for p in wrapper.module.parameters()}
        reduced -= {p for slot in self._slots for p in (slot.core, *slot.factors)}
        return [
            p
            for p in self._parameters()
            if p.requires_grad and p not in cores and p not in reduced and not is_sharded(p)
        ]

    def _parameters(self) -> dict[nn.Parameter, None]:
        """Return all that has gradients, each once, in the same order on all processes."""
        tucker = [p for slot in self._slots for p in (slot.core, *slot.factors)]
        stepped = [p for group in self._optimizer.param_groups for p in group["params"]]
        return dict.fromkeys([*tucker, *stepped])

    def _average(self, parts: Sequence[Part]) -> list[list[Tensor] | None]:
        if not parts:
            return []
        self.tell("synchronisation")
        with phase("synchronisation"):
            return average(parts, self._group)

    def common(self, points: Sequence[gt.TuckerPoint | None]) -> Sequence[gt.TuckerPoint | None]:
        """Return points that each process has computed; the first one's, should any differ."""
        if not points:
            return points
        self.tell("synchronisation")
        with phase("synchronisation"):
            if self._same([point for point in points if point is not None]):
                return points
            first = object_of_first(points, self._group)
        elsewhere = self._slots[0].core.device  # where this process has none of its own
        devices = [elsewhere if point is None else point.core.device for point in points]
        pairs = zip(first, devices, strict=True)
        return [None if point is None else _to(point, device) for point, device in pairs]

    def _same(self, points: Sequence[gt.TuckerPoint]) -> bool:
        """Tell whether points are the same on all processes, to the last bit."""
        arrays = [array for point in points for array in (point.core, *point.factors)]
        return all_equal(fingerprint(arrays), self._group, self._slots[0].core.device)

    @property
    def group(self) -> Group:
        """All of them."""
        return self._group

    @property
    def is_first(self) -> bool:
        """Whether this process is the first of its group."""
        return dist.get_rank(self._group) == 0

    def leave(self) -> None:
        """Have no more gradients averaged."""
        for handle in self._handles:
            handle.remove()

    def taken_seconds(self) -> float:
        """Return the time that averages have taken since this was asked last."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def agree(self, state: MutableMapping[Tensor, Any]) -> None:
        """Take the Tucker tensors and their state from the first process, should any differ.

        Parameters
        ----------
        state : mapping of Tensor to Any
            The optimizer's, by core.
        """
        points = [slot.point for slot in self._slots]
        with phase("truncation"):
            if self._same(points):
                return
            own = [(point, state.get(s.core)) for s, point in zip(self._slots, points, strict=True)]
            first = object_of_first(own, self._group)
        for slot, (point, moments) in zip(self._slots, first, strict=True):
            slot.write(_to(point, slot.core.device))
            if moments is not None:
                state[slot.core] = _to(moments, slot.core.device)


def _expect(ref: "Callable[[], Peers | None]") -> None:
    peers = ref()
    if peers is not None:
        peers.expect()


def _part(layer: TuckerModule, uses: Sequence[Use]) -> Part:
    """Return what the bases of a layer are formed from, and its gradient if that is all of it."""
    core = layer.core
    directions = [
        k if u.shape[0] > u.shape[1] else k[:, :0]  # complete bases have no directions
        for k, u in zip(zero(layer.point), layer.factors, strict=True)
    ]
    for use in uses:
        directions = [d + part for d, part in zip(directions, use.directions, strict=True)]
    # A pass at another point may have left its gradient already.
    present = bool(uses) or core.grad is not None
    if layer.extension.galerkin:
        return Part(present, directions)
    gradient = torch.zeros_like(core) if core.grad is None else core.grad
    for use in uses:
        assert use.tangent is not None
        gradient = gradient + use.tangent
    return Part(present, [gradient, *directions])


def _joint(layer: TuckerModule, uses: Sequence[Use], mean: list[Tensor]) -> Use:
    """Return one use that stands for those on all processes, at least one of which has used it."""
    point = layer.point
    right = uses[0].right if uses else right_of(point)
    if not layer.extension.galerkin:
        gradient, *directions = mean
        return Use(point, directions, right, gradient, None)

    def whole(bases: Sequence[Tensor]) -> Tensor:
        parts = [use.whole(bases) for use in uses if use.whole is not None]
        empty = layer.core.new_zeros([basis.shape[1] for basis in bases])
        return sum(parts, empty)

    return Use(point, mean, right, None, whole)


def _gradient_part(parameter: nn.Parameter) -> Part:
    if parameter.grad is None:
        return Part(False, [parameter.detach()])
    if parameter.grad.is_sparse:
        raise ValueError(
            f"gradient: expected a dense one of the parameter of shape {tuple(parameter.shape)}, "
            "got a sparse one; wrap the model in DistributedDataParallel, which averages it"
        )
    return Part(True, [parameter.grad])


def _to(tree: Any, device: torch.device) -> Any:
    """Move all tensors of a tree."""
    if isinstance(tree, Tensor):
        return tree.to(device)
    if isinstance(tree, gt.TuckerPoint):
        return gt.TuckerPoint(*_to(tuple(tree), device))
    if isinstance(tree, dict):
        return {key: _to(value, device) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(_to(value, device) for value in tree)
    return tree
