"""The optimizer TDLRT: any torch optimizer as the one-step integrator of Tucker cores."""

import math
import time
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import geotucker as gt
from geotucker import _ops
from geotucker._geometry import right_bases_of
from geotucker._hosvd import follow
from geotucker._integrators._base import observed
from geotucker._ranks import Sensitivities

from ._collectives import phase
from ._contract import without_autocast
from ._finite import Largest, Verdict, check_finite, largest_of
from ._guard import Before, restored_if_it_fails
from ._history import RankHistory
from ._layers import TuckerModule
from ._lifted import Drift, Extension, Lift, Right, Waiting
from ._peers import Peers, group_of, is_joint
from ._point import orthonormal
from ._rules import Rules, flops_of
from ._scale import decays_apart, moving_entries, normalises, scale_step, tangent_dimension
from ._slots import Slot, find_slots, layers_of
from ._state import (
    carry_state,
    check_tangents,
    drift,
    has_moments,
    lift_state,
    right_of,
)

__all__ = ["INTEGRATORS", "TDLRT"]

INTEGRATORS = ("tangent", "tdlrt")

_EARLY = 1000  # heuristic, from LeNet-5: with every second step from the start momentum diverged

# Adafactor's, over rows and over columns: of as many dimensions as the parameter, but smaller.
_SUMS = ("row_var", "col_var")


def _of_wrapped(name: str) -> Any:
    """Return a method that is the wrapped optimizer's."""

    def method(self: "TDLRT", *given: Any, **named: Any) -> Any:
        return getattr(self.wrapped, name)(*given, **named)

    method.__name__, method.__doc__ = name, f"Register a hook with the wrapped optimizer: `{name}`."
    return method


class TDLRT(Optimizer):
    """Train the Tucker tensors of a model along the projected gradient flow of TDLRT.

    Wraps a torch optimizer, which steps the cores and all other parameters as it always
    does. This class moves the bases: they are extended by the gradients with respect to the
    ``K_i = U_i S_i``, the core takes the wrapped optimizer's step in the wider bases, and the
    result is truncated to the ranks that a rule chooses (arXiv:2305.19059). Factors are never
    stepped or decayed; weight decay on the core is weight decay on the weight. Momentum and the
    like follow the bases, and move them.

    Use it as any optimizer: ``zero_grad``, ``backward``, ``step``. Param groups, state,
    schedulers, hooks and ``state_dict`` are those of the wrapped optimizer.

    Parameters
    ----------
    optimizer : torch.optim.Optimizer
        Built on the parameters of the factorised model. LBFGS, whose history is one flat
        vector over all parameters, cannot follow the bases and is refused.
    model : nn.Module
        Holds layers of this package or of ``tltorch.TuckerTensor``. Non-orthonormal factors
        are orthonormalised here; no weight changes.
    ranks : RankRule, int, float, tuple or mapping, optional
        What to truncate to: a rule for all Tucker tensors, or a mapping from patterns of
        module names (as in `fnmatch`; the first match counts) to rules. By default, and
        where no pattern matches, a tensor keeps the ranks it has now; its bases then follow the
        step without a decomposition, as those of a fixed-rank integrator (rules see the singular
        values of every tensor, and truncate by its HOSVD). A `geotucker.Budget` of
        parameters or bytes is one for the whole model, unless it is bound to a pattern; its
        schedule, if it names no start, begins at the present size. Operations are counted per
        batch of the last training input.
    integrator : {"tangent", "tdlrt"}
        The gradient of the wider core: its projection on the tangent space, at the cost of
        ordinary descent on core and factors; or all of it, which is Algorithm 1 of the paper, and
        costs half as much again. Both follow the same flow and differ in terms of second order.
    basis_every : int, optional
        Bases and ranks move in every so many steps; the others are steps of the cores, which
        cost less. By default in each of the first 1000 steps, in which bases turn fast and would
        lag behind, and in every second one from then on. (1 costs a quarter more time then; LeNet-5
        in a 5 % budget ended 0.15 points higher.)
    rate_power : float, optional
        The steps of a core are scaled by ``(N / n)`` to this power, for a weight of N entries of
        which a step moves n: learning rates are meant for dense weights, and the step grows as
        ranks fall. By default 1/2 for optimizers that normalise gradients entry by entry, such as
        Adam and RMSprop: the weight then moves as far as the dense one would at the same rate. For
        others n is the dimension of the tangent space, and the default is 0, the step of the
        gradient; with a few percent of the parameters left, 1/3 trains better.
    one_pass : bool
        Whether layers of this package extend their bases in their own backward pass. False: by
        two calls of a closure, as published, which gives the result of "tdlrt".
    late_check : bool, optional
        Whether a step between changes of the bases leaves it to the next step to tell that a
        gradient was not finite, so that nobody waits for the device: see *All or nothing*. By
        default on CUDA devices; True does so on the CPU as well. Where a step cannot be taken back
        by one device alone it is told at once: with gradients on several devices or in parts on
        several processes, in the first step, and by optimizers that keep other things than tensors.
    process_group : torch.distributed.ProcessGroup, optional
        The processes that train this model together, each with batches of its own; by default all
        of them, if torch.distributed is initialised. A group of one process trains alone.

    Raises
    ------
    TypeError, ValueError, geotucker.RankError
        For arguments that cannot be used; nothing is changed then.
    ProcessError
        If another process is lost.

    Notes
    -----
    *One pass.* Extending the bases does not change the weight, so both gradients of
    Algorithm 1 are taken at one weight, and a layer whose backward is ours has all that is
    needed for both. Between ``backward`` and ``step`` its core and factors are wider, and
    ``core.grad`` is the gradient of the wider core: it can be clipped (its norm is that of the
    projected gradient), scaled and added to by further micro-batches, whose gradients are taken
    in the bases of the first. A weight that is used several times in one graph, by one layer or by
    tied ones, is widened once, at the end of the backward pass, by the gradients of all uses
    (uses in a reentrant activation checkpoint count as a micro-batch). ``zero_grad`` without a step
    takes the padding away. In such a pass the gradient of the core goes straight to ``core.grad``,
    also under ``torch.autograd.grad``; hooks on the core do not see it, and second derivatives are
    refused.

    *Transforms.* In training ``torch.compile`` leaves Tucker layers that an optimizer moves outside
    of its graphs, so that no change of rank compiles anything anew. Under the transforms of
    ``torch.func`` layers are ordinary functions of their parameters and extend nothing.

    *Many processes.* Build it on all of them at the same time, after ``init_process_group``: all
    take the model of the first. At the end of each backward pass gradients that
    ``DistributedDataParallel`` does not average are averaged here, whether the model is wrapped in
    it or not. Bases and ranks are the same on all processes after every step.

    *Two passes.* Tucker tensors in modules of other kinds need a closure: ``step(closure)``
    calls it twice in a step that extends the bases, at one and the same weight.

    *All or nothing.* If a step raises (in the closure, for a gradient that is NaN or
    infinite, in the wrapped optimizer), parameters and state are as they were before it.
    That costs a copy of the stepped parameters and of their state while the step runs. With
    `late_check` the device itself drops a step with numbers that are not finite: it counts as a
    step, changes nothing, and the next `step` raises before it begins.

    Examples
    --------
    >>> import torch, geotucker as gt
    >>> from geotucker_torch import TDLRT, factorize
    >>> _ = torch.manual_seed(0)
    >>> model = factorize(torch.nn.Sequential(torch.nn.Linear(20, 10)), 4, verbose=False)
    >>> optimizer = TDLRT(torch.optim.SGD(model.parameters(), lr=0.1), model, gt.Tolerance(0.1))
    >>> x, y = torch.randn(8, 20), torch.randn(8, 10)
    >>> losses = []
    >>> for _ in range(50):
    ...     optimizer.zero_grad()
    ...     loss = torch.nn.functional.mse_loss(model(x), y)
    ...     loss.backward()
    ...     optimizer.step()
    ...     losses.append(loss.item())
    >>> losses[-1] < 0.5 * losses[0]
    True
    """

    def __init__(
        self,
        optimizer: Optimizer,
        model: nn.Module,
        ranks: Any = None,
        *,
        integrator: str = "tangent",
        basis_every: int | None = None,
        rate_power: float | None = None,
        one_pass: bool = True,
        late_check: bool | None = None,
        process_group: Any = None,
    ) -> None:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(
                f"optimizer: expected a torch.optim.Optimizer, got {type(optimizer).__name__}"
            )
        if isinstance(optimizer, (torch.optim.LBFGS, TDLRT)):
            raise TypeError(
                f"optimizer: {type(optimizer).__name__} cannot be wrapped; use SGD, Adam or "
                "another optimizer that keeps its state per parameter"
            )
        whole = isinstance(basis_every, int) and not isinstance(basis_every, bool)
        if basis_every is not None and not (whole and basis_every >= 1):
            raise ValueError(f"basis_every: expected a positive integer, got {basis_every!r}")
        number = isinstance(rate_power, Real) and not isinstance(rate_power, bool)
        if rate_power is not None and not (number and 0.0 <= rate_power <= 1.0):
            raise ValueError(f"rate_power: expected a number from 0 to 1, got {rate_power!r}")
        if integrator not in INTEGRATORS:
            raise ValueError(f"integrator: expected one of {INTEGRATORS}, got {integrator!r}")
        slots = _trained_slots(model, optimizer)
        Rules.of(ranks, model, slots)  # which raises before anything is changed
        group = group_of(process_group)
        for layer in layers_of(slots):  # an optimizer before this one may have lifted it
            layer.unlift()
        self._rules = Rules.of(ranks, model, slots)
        self.wrapped = optimizer
        self._model = model
        # Not Optimizer.__init__, which would make param groups and state of its own:
        # only what hooks and profiling need.
        super().__setstate__({})
        self.integrator = integrator
        self.basis_every = basis_every
        self.rate_power = None if rate_power is None else float(rate_power)
        self.late_check = late_check
        self._verdict: Verdict | None = None  # on the step before, if nobody has heard it yet
        self._slots = slots
        waiting = _share_lifts(slots)
        self.peers = None if group is None else Peers(group, model, optimizer, slots)
        self._disarm_at_the_end(waiting)
        self._steps = 0
        self._seconds: dict[str, float] = {}
        self._ended = time.perf_counter()
        for slot in slots:
            point = slot.point
            with without_autocast(point.core):
                same = orthonormal(point)
            if same is not point:
                slot.write(same)
            for factor in slot.factors:  # Adagrad makes its state beforehand
                self.state.pop(factor, None)
        # What it has left them at: other ranks later come from a model that was loaded since.
        self._left = self.ranks
        self._history = RankHistory({name: (ranks,) for name, ranks in self._left.items()})
        self._sensitivities = Sensitivities()
        self.one_pass = one_pass
        self._arm()

    # What an optimizer is for its users: all of it belongs to the wrapped one.

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The wrapped optimizer's parameter groups."""
        return self.wrapped.param_groups

    @property
    def state(self) -> defaultdict[Tensor, Any]:  # type: ignore[override]
        """The wrapped optimizer's state; a core's moments are in ``state[core]``."""
        return self.wrapped.state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        """The wrapped optimizer's defaults."""
        return self.wrapped.defaults

    @property
    def ranks(self) -> dict[str, tuple[int, ...]]:
        """The present ranks of every Tucker tensor, by module name."""
        return {slot.name: slot.point.ranks for slot in self._slots}

    @property
    def rank_history(self) -> dict[str, dict[int, tuple[int, ...]]]:
        """The ranks of every Tucker tensor by module name and number of steps taken.

        Step by step at first, later at every second, fourth ... step: at most 256 records. They are
        saved with the optimizer.
        """
        return self._history.by_step()

    @property
    def seconds(self) -> dict[str, float]:
        """How long parts of the last step took on the host; empty before one.

        "iteration" is the time from the end of the step before it, "step" that in `step`, "bases"
        that in which it truncated them, and "processes" that in which the backward passes before it
        exchanged gradients with other processes, waiting included.
        """
        return dict(self._seconds)

    @property
    def model(self) -> nn.Module:
        """The model that it was built on."""
        return self._model

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group to the wrapped optimizer.

        Raises
        ------
        ValueError
            If it has parameters of a Tucker tensor whose core was in no group when this was built:
            its bases would not move.
        """
        given = param_group["params"]
        if not isinstance(given, set):  # which torch refuses
            given = [given] if torch.is_tensor(given) else list(given)
        group = {
            parameter[-1] if isinstance(parameter, tuple) else parameter for parameter in given
        }
        known = {slot.core for slot in self._slots}
        for slot in find_slots(self._model):
            if slot.core not in known and not group.isdisjoint((slot.core, *slot.factors)):
                raise ValueError(
                    f"param_group: expected no parameters of {slot.name!r}, a Tucker tensor whose "
                    "bases this TDLRT does not move, got some; build it on an optimizer that has "
                    "them, and freeze the layer by requires_grad_(False) until its time comes"
                )
        self.wrapped.add_param_group({**param_group, "params": given})

    register_state_dict_pre_hook = _of_wrapped("register_state_dict_pre_hook")
    register_state_dict_post_hook = _of_wrapped("register_state_dict_post_hook")
    register_load_state_dict_pre_hook = _of_wrapped("register_load_state_dict_pre_hook")
    register_load_state_dict_post_hook = _of_wrapped("register_load_state_dict_post_hook")

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients of all parameters, factors included.

        Bases that a backward pass has extended without a step after it shrink again.
        """
        self.wrapped.zero_grad(set_to_none)
        for slot in self._slots:
            if slot.layer is not None:
                slot.layer.unlift()
            for factor in slot.factors:
                factor.grad = None

    def state_dict(self) -> dict[str, Any]:
        """Return the wrapped optimizer's ``state_dict`` with the entry ``"tdlrt"`` added."""
        if self._verdict is not None:
            self._verdict.hear()
        layers = {slot.name: slot.layer for slot in self._slots if slot.layer is not None}
        own = {
            "steps": self._steps,
            "ranks": {slot.name: slot.settled_ranks for slot in self._slots},
            "history": self._history.state(),
            "sensitivities": self._sensitivities.state(),
            "loss_scales": {name: float(layer.loss_scale) for name, layer in layers.items()},
            **self._rules.state(),
        }
        return {**self.wrapped.state_dict(), "tdlrt": own}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load what `state_dict` returned; load the model first, so that the ranks agree.

        Raises
        ------
        ValueError
            If it is not of this optimizer, or does not fit the ranks of the model; nothing is
            changed then.
        """
        if "tdlrt" not in state_dict:
            raise ValueError(
                "state_dict: expected an entry 'tdlrt', got only "
                f"{sorted(map(str, state_dict))}; a plain optimizer's state is loaded by "
                "optimizer.wrapped.load_state_dict"
            )
        own = state_dict["tdlrt"]
        try:
            _check_ranks(self._slots, own["ranks"])
            steps, rules = int(own["steps"]), self._rules.with_state(own)
            history = RankHistory.of_state(own["history"])
            scales = {name: float(scale) for name, scale in own["loss_scales"].items()}
            sensitivities = Sensitivities.of_state(own["sensitivities"])
            _check_shapes(state_dict, self.wrapped, self._slots)
            check_tangents(state_dict["state"].values())
        except (AttributeError, LookupError, TypeError) as error:
            raise ValueError(
                f"state_dict: expected what TDLRT.state_dict returns, got {error!r}"
            ) from error
        self.wrapped.load_state_dict({k: v for k, v in state_dict.items() if k != "tdlrt"})
        self._steps, self._rules, self._history = steps, rules, history
        self._sensitivities, self._verdict = sensitivities, None
        self._left = {slot.name: slot.settled_ranks for slot in self._slots}
        if self.peers is not None:
            self.peers.steps = steps
        for slot in self._slots:
            if slot.layer is not None:
                slot.layer.loss_scale = scales.get(slot.name, 1.0)
        self._arm()

    def __getstate__(self) -> dict[str, Any]:
        """Return everything, for copies and pickles."""
        if self._verdict is not None:
            self._verdict.hear()
        lifts = [layer.lift_state() for layer in layers_of(self._slots)]
        own = {**self.__dict__, "_verdict": None, "_lifts": lifts}  # the verdict is told here
        own.pop("step", None)  # a scheduler has wrapped it, and would step this one
        return own

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take everything, and move the bases of the copied model from now on."""
        lifts = state.pop("_lifts")
        super().__setstate__(state)
        layers = layers_of(self._slots)
        # A shallow copy has the layers of the other; of a layer that holds its optimizer nothing
        # but the object is there yet.
        if all("_lift" in vars(layer) and layer._lift.trained is None for layer in layers):
            self._disarm_at_the_end(_share_lifts(self._slots))
            self._arm()
            for layer, lift in zip(layers, lifts, strict=True):
                layer.restore_lift(lift)

    def _disarm_at_the_end(self, waiting: Waiting) -> None:
        """Have layers extend nothing when this optimizer is gone: nobody would truncate it."""
        weakref.finalize(self, _disarm, layers_of(self._slots), waiting, self.peers)

    def __repr__(self) -> str:
        """Show the wrapped optimizer and the rank rules."""
        options = f"basis_every={self.basis_every}, rate_power={self.rate_power}"
        return f"TDLRT({self.wrapped!r}, ranks={self._rules}, {options})"

    # The algorithm.

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Take one step, with the gradients that ``backward`` has left.

        Parameters
        ----------
        closure : callable, optional
            Resets the gradients, computes the loss, calls ``backward`` and returns the loss; it
            runs with gradients enabled. Only Tucker tensors in other modules than this
            package's layers need it: in a step that extends the bases it is called twice then.

        Returns
        -------
        loss
            What the first call of the closure returned; None without one.

        Raises
        ------
        TypeError
            Without a closure where one is needed.
        geotucker.NonFiniteError
            If a gradient or a new core is NaN or infinite; with `late_check` maybe one step later.
        """
        if self.peers is None and is_joint(group_of()):
            raise ValueError(
                "process_group: expected torch.distributed to be initialised before TDLRT is built "
                "(and the optimizer not to be a copy), got it initialised afterwards"
            )
        began = time.perf_counter()
        if self._verdict is not None:
            verdict, self._verdict = self._verdict, None
            verdict.check()
        slots = self._trained()
        foreign = [s for s in slots if s.layer is None or not self.one_pass]
        if closure is None and foreign and self._moves_bases:
            raise TypeError(
                "closure: expected a function that resets the gradients, computes the loss, "
                "calls backward and returns the loss; got None. The bases of "
                f"{', '.join(slot.name for slot in foreign)} are extended between two passes of it"
            )
        loss = None
        with restored_if_it_fails(self, self._slots) as start, torch.no_grad():
            for layer in layers_of(self._frozen()):  # maybe since the backward pass
                layer.unlift()
            previous = [slot.settled_ranks for slot in slots]
            self._forget_other_ranks(slots)
            right: dict[str, Right] = {}
            if closure is not None:
                loss, right = self._evaluate(torch.enable_grad()(closure), foreign)
            with without_autocast(self._slots[0].core):
                bases = self._take_step(slots, previous, right, start)
        self._tell("the time between steps")
        self._note_seconds(began, bases)
        return loss

    def _take_step(
        self,
        slots: list[Slot],
        previous: Sequence[tuple[int, ...]],
        right: dict[str, Right],
        start: Before,
    ) -> float:
        """Take the step that the gradients ask for; return how long the bases took."""
        bases, sensitivities = 0.0, self._sensitivities
        self._tell("step")
        for slot in self._slots:  # no optimizer steps bases
            for factor in slot.factors:
                factor.grad = None
        with phase("step"):
            largest = self._largest_gradients()  # which asks for those of tensors in parts
        right |= self._settle(slots)
        before = [slot.core.detach().clone() for slot in slots]
        self.wrapped.step()
        self._scale_steps(slots, previous, before)
        cores = [(f"{slot.name}.core after the step", slot.core) for slot in slots]
        self._check([*largest, *largest_of(cores)], start)
        if self._moves_bases:
            self._tell("truncation")
            bases = -time.perf_counter()
            moves = list(map(_Move, slots, previous, before))
            ruled = [move for move in moves if self._rules.owner(move.slot.name) is not None]
            free = [move for move in moves if self._rules.owner(move.slot.name) is None]
            facts, sensitivities = self._facts(ruled)
            self._write_cuts([*self._truncate(ruled, facts), *self._follow(free, right)])
            bases += time.perf_counter()
            if self.peers is not None:
                self.peers.agree(self.state)
        self._steps += 1
        self._left, self._sensitivities = self.ranks, sensitivities
        self._history = self._history.after(self._steps, self._left)
        self._arm()
        return bases

    def _tell(self, where: str) -> None:
        """Tell the other processes, if there are any, where this one is."""
        if self.peers is not None:
            self.peers.steps = self._steps
            self.peers.tell(where)

    def _note_seconds(self, began: float, bases: float) -> None:
        now = time.perf_counter()
        self._seconds = {"iteration": now - self._ended, "step": now - began, "bases": bases}
        self._ended = now
        if self.peers is not None:
            self._seconds["processes"] = self.peers.taken_seconds()

    @property
    def _moves_bases(self) -> bool:
        """Whether the coming step moves the bases."""
        if self.basis_every is None:
            return self._steps < _EARLY or self._steps % 2 == 0
        return self._steps % self.basis_every == 0

    def _evaluate(
        self, closure: Callable[[], Any], foreign: list[Slot]
    ) -> tuple[Any, dict[str, Right]]:
        """Run the closure, and once more if bases are to be extended from outside a layer."""
        extend, right = bool(foreign) and self._moves_bases, {}
        with _factors_require_grad(foreign, extend):
            loss = closure()
        if extend:
            check_finite(self._largest_gradients())
            with without_autocast(foreign[0].core):
                right = self._extend(foreign)
            with _factors_require_grad(foreign, False):
                closure()
        return loss, right

    def _arm(self) -> None:
        """Have our own layers extend their bases in the next backward pass, or not."""
        armed = self.one_pass and self._moves_bases
        for slot in self._slots:
            if slot.layer is not None:
                moving = self._drift(slot) if armed else None
                slot.layer.armed = armed and slot.layer.narrow is None
                slot.layer.extension = Extension(self.integrator == "tdlrt", moving, self.one_pass)

    def _drift(self, slot: Slot) -> Drift | None:
        """Return how the moments of a core are about to move its bases."""
        state = self.state.get(slot.core)
        if not state:
            return None
        return drift(state, self._group(slot))

    def _group(self, slot: Slot) -> dict[str, Any]:
        groups = self.param_groups
        return next(g for g in groups if any(p is slot.core for p in g["params"]))

    def _scale_steps(
        self, slots: list[Slot], previous: Sequence[tuple[int, ...]], before: Sequence[Tensor]
    ) -> None:
        """Scale the steps of cores by how few entries of their weights they move: see `_scale`."""
        for slot, ranks, old in zip(slots, previous, before, strict=True):
            normalised = normalises(self.state.get(slot.core, {}))
            power = (0.5 if normalised else 0.0) if self.rate_power is None else self.rate_power
            if slot.core.grad is None or power == 0.0:
                continue
            point, group = slot.point, self._group(slot)
            if normalised:
                tangent = self.integrator == "tangent" and slot.layer is not None and self.one_pass
                entries = moving_entries(ranks, point.ranks, tangent)
            else:
                entries = tangent_dimension(point.shape, ranks)
            factor = (math.prod(point.shape) / entries) ** power
            scale_step(slot.core, old, factor, group, decays_apart(self.wrapped, group))

    def _settle(self, slots: list[Slot]) -> dict[str, Right]:
        """Make the lifts of the backward pass final, and lift the moments after them.

        Returned are the Q_i of the cores before, by name.
        """
        found: dict[str, Right] = {}
        for slot in slots:
            if slot.layer is not None and slot.layer.narrow is not None:
                narrow, right = slot.layer.narrow, slot.layer.right
                assert right is not None
                found[slot.name] = right
                self._lift_state(slot, narrow, right)
                slot.layer.settle()
        return found

    def _lift_state(self, slot: Slot, narrow: gt.TuckerPoint, right: Right) -> None:
        if slot.core in self.state:
            state = self.state[slot.core]
            self.state[slot.core] = lift_state(state, narrow, slot.point, right)

    def _trained(self) -> list[Slot]:
        """Return the Tucker tensors that are not frozen now, or are stepped all the same."""
        return [s for s in self._slots if s.core.requires_grad or s.core.grad is not None]

    def _frozen(self) -> list[Slot]:
        """Return the Tucker tensors that a step leaves alone."""
        return [s for s in self._slots if not s.core.requires_grad and s.core.grad is None]

    def _extend(self, slots: list[Slot]) -> dict[str, Right]:
        """Extend the bases by the gradients of the factors, lift cores and moments.

        Returned are the Q_i of the cores before, by name.
        """
        # A layer that took no part in the loss keeps its bases.
        used = [s for s in slots if all(f.grad is not None for f in (s.core, *s.factors))]
        gradients = [[factor.grad for factor in slot.factors] for slot in used]
        for group in self.param_groups:  # the second pass starts from nothing
            for parameter in group["params"]:
                parameter.grad = None
        old = [slot.point for slot in used]
        found = {slot.name: right_of(point) for slot, point in zip(used, old, strict=True)}
        wide: Sequence[Any] = [
            gt.augment(point, self._with_drift(slot, point, directions, found[slot.name]))
            for slot, point, directions in zip(used, old, gradients, strict=True)
        ]
        if self.peers is not None:
            wide = self.peers.common(wide)
        for slot, before, after in zip(used, old, wide, strict=True):
            slot.write(after)
            self._lift_state(slot, before, found[slot.name])
        return found

    def _with_drift(
        self, slot: Slot, point: gt.TuckerPoint, gradients: Sequence[Any], right: Right
    ) -> Sequence[Any]:
        """Add what the moments contribute, in the units of grad_{U_i} = (grad_{K_i}) S_i^T."""
        moving = self._drift(slot)
        if moving is None:
            return gradients
        s = [
            None if q is None else _ops.unfold(point.core, mode) @ q for mode, q in enumerate(right)
        ]
        pairs = zip(gradients, moving.at(right), s, strict=True)
        return [d if t is None else d + v @ t.T for d, v, t in pairs]

    def _follow(
        self, moves: "Sequence[_Move]", right: Mapping[str, Right]
    ) -> "list[tuple[Slot, gt.Truncation]]":
        """Truncate cores to the ranks that they had, without a decomposition."""
        own = [right.get(move.slot.name, [None] * len(move.previous)) for move in moves]
        points = [move.slot.point for move in moves]
        cuts = follow(points, [move.previous for move in moves], own)
        return [(move.slot, cut) for move, cut in zip(moves, cuts, strict=True)]

    def _facts(self, moves: "Sequence[_Move]") -> tuple[list[gt.Facts], Sensitivities]:
        """Return what rank rules may want to know, and the sensitivities with those of now."""
        graded = [move for move in moves if move.slot.core.grad is not None]
        found = observed(
            [move.before for move in graded],
            [move.slot.core.grad for move in graded],
            [move.slot.core.detach() - move.before for move in graded],
            [move.previous for move in graded],
        )
        now = {move.slot.name: facts for move, facts in zip(graded, found, strict=True)}
        seen = self._sensitivities.after({n: facts.sensitivity for n, facts in now.items()})
        return [
            now.get(move.slot.name, gt.Facts(move.previous))._replace(
                flops=flops_of(move.slot), sensitivity=seen.means.get(move.slot.name)
            )
            for move in moves
        ], seen

    def _truncate(
        self, moves: "Sequence[_Move]", facts: Sequence[gt.Facts]
    ) -> "list[tuple[Slot, gt.Truncation]]":
        """Truncate cores by the rule."""
        names = [move.slot.name for move in moves]
        rule = self._rules.in_force(self._steps, names, self._frozen())
        points = [move.slot.point for move in moves]
        cuts = gt.truncate(points, rule, facts)
        return [(move.slot, cut) for move, cut in zip(moves, cuts, strict=True)]

    def _write_cuts(self, cuts: "Sequence[tuple[Slot, gt.Truncation]]") -> None:
        """Take the truncated points, and carry the moments along.

        What took no part in the step and keeps its ranks stays: there is no room for the basis
        parts of its moments in bases that were not extended.
        """
        cuts = [
            (slot, cut)
            for slot, cut in cuts
            if slot.core.grad is not None or cut.point.ranks != slot.point.ranks
        ]
        carried = [has_moments(self.state.get(slot.core, {})) for slot, _ in cuts]
        right = right_bases_of(
            (cut.point.core, cut.shrunk if wanted else ())
            for (_, cut), wanted in zip(cuts, carried, strict=True)
        )
        for (slot, cut), wanted, bases in zip(cuts, carried, right, strict=True):
            wide = slot.point
            slot.write(cut.point)
            if wanted:
                self.state[slot.core] = carry_state(self.state[slot.core], wide, cut, bases)

    def _forget_other_ranks(self, slots: list[Slot]) -> None:
        """Reset the moments of tensors that were loaded at other ranks, without their optimizer."""
        for slot in slots:
            if slot.settled_ranks != self._left[slot.name]:
                self.state.pop(slot.core, None)

    def _check(self, largest: Sequence[Largest], start: Before) -> None:
        """Raise unless the step was finite; or have the device take it back, and raise later."""
        devices = {one.magnitude.device for one in largest}
        late = self.late_check is None or self.late_check
        allowed = {"cuda"} if self.late_check is None else {"cuda", "cpu"}
        late = late and len(devices) == 1 and {device.type for device in devices} <= allowed
        changes = start.changes() if late and not self._moves_bases else None
        if changes is None:
            check_finite(largest)
        else:
            self._verdict = Verdict(largest, changes)

    def _largest_gradients(self) -> list[Largest]:
        """Return the largest magnitudes of all gradients that would be used."""
        parameters = {p: "a gradient" for group in self.param_groups for p in group["params"]}
        for slot in self._slots:
            parameters[slot.core] = f"the gradient of {slot.name}.core"
            for mode, factor in enumerate(slot.factors):
                parameters[factor] = f"the gradient of {slot.name}.factors.{mode}"
        gradients = [(name, p.grad) for p, name in parameters.items() if p.grad is not None]
        return largest_of(gradients, None if self.peers is None else self.peers.group)


def _disarm(layers: list[TuckerModule], waiting: Waiting, peers: Peers | None) -> None:
    for layer in layers:
        if layer.waiting is waiting:  # and not that of a later optimizer
            layer.armed, layer.extension = False, Extension()
            layer.peers = layer._lift.trained = None
    if peers is not None:
        peers.leave()


def _trained_slots(model: nn.Module, optimizer: Optimizer) -> list[Slot]:
    trained = {p for group in optimizer.param_groups for p in group["params"]}
    slots = [slot for slot in find_slots(model) if slot.core in trained]
    if not slots:
        raise ValueError(
            "model: expected Tucker layers whose cores are in the optimizer's parameter groups, "
            "found none; call factorize(model) first and build the optimizer on its parameters"
        )
    return slots


def _share_lifts(slots: Sequence[Slot]) -> Waiting:
    """Give layers one record for each tensor: some may have been tied, or untied, by hand.

    From now on their bases move. Returned is what these records have in common.
    """
    taken: list[Lift] = []
    waiting: Waiting = {}
    for slot in slots:
        if slot.layer is not None:
            lift = slot.layer._lift if slot.layer._lift not in taken else Lift()
            taken.append(lift)
            lift.trained, lift.waiting = slot.core, waiting
            for layer in slot.layers:
                layer._lift = lift
    return waiting


class _Move(NamedTuple):
    """A tensor whose core has been stepped in wider bases."""

    slot: Slot
    previous: tuple[int, ...]
    before: Tensor


@contextmanager
def _factors_require_grad(slots: list[Slot], required: bool) -> Iterator[None]:
    """Ask for gradients of all factors, or of none, and restore what was asked for before."""
    factors = [factor for slot in slots for factor in slot.factors]
    before = [factor.requires_grad for factor in factors]
    for factor in factors:
        factor.grad = None
        factor.requires_grad_(required)
    try:
        yield
    finally:
        for factor, flag in zip(factors, before, strict=True):
            factor.requires_grad_(flag)


def _check_ranks(slots: Sequence[Slot], saved: Mapping[str, Any]) -> None:
    """Raise ValueError unless a state was saved at the ranks that the tensors have now."""
    names = {slot.name for slot in slots}
    if set(saved) != names:
        raise ValueError(
            f"state_dict: expected the Tucker tensors {sorted(names)}, got {sorted(saved)}"
        )
    for slot in slots:
        if tuple(saved[slot.name]) != slot.settled_ranks:
            raise ValueError(
                f"state_dict: expected ranks {slot.settled_ranks} of {slot.name!r}, which the "
                f"model has, got {tuple(saved[slot.name])}; load the model's state_dict of the "
                "same moment first"
            )


def _check_shapes(
    state_dict: Mapping[str, Any], optimizer: Optimizer, slots: Sequence[Slot]
) -> None:
    """Raise ValueError if saved moments do not fit the parameters as they are now."""
    ranks = {slot.core: slot.settled_ranks for slot in slots}
    current = [p for group in optimizer.param_groups for p in group["params"]]
    saved = [key for group in state_dict["param_groups"] for key in group["params"]]
    for parameter, key in zip(current, saved, strict=False):
        shape = ranks.get(parameter, tuple(parameter.shape))
        for name, value in state_dict["state"].get(key, {}).items():
            if not torch.is_tensor(value) or value.dim() != len(shape) or name in _SUMS:
                continue
            if tuple(value.shape) != shape:
                raise ValueError(
                    f"state_dict: {name} of shape {tuple(value.shape)} does not fit a parameter "
                    f"of shape {shape}; load the model's state_dict of the same moment first"
                )
