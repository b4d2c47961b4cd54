"""The optimizer TDLRT: any torch optimizer as the one-step integrator of Tucker cores."""

import copy
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import geotucker as gt
from geotucker._ranks import PerTensor

from ._layers import TuckerModule
from ._slots import Slot, find_slots
from ._state import lift_state, rotate_state

__all__ = ["TDLRT"]


class TDLRT(Optimizer):
    """Train the Tucker tensors of a model by Algorithm 1 of TDLRT (arXiv:2305.19059).

    Wraps a torch optimizer, which steps the cores and all other parameters as it always
    does. This class moves the bases: they are extended by the gradients with respect to
    the factors, the core takes the wrapped optimizer's step in the wider bases, and the
    result is truncated to the ranks that a rule chooses. Factors are never stepped or
    decayed; weight decay on the core is weight decay on the weight. Momentum and the like
    follow the bases.

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
        where no pattern matches, a tensor keeps the ranks it has now.
    basis_every : int
        The bases are extended every so many steps; the steps between are ordinary steps of
        the cores in the extended bases, and the last of them truncates. 1 is the published
        algorithm. Larger values cost less, and let new directions grow before a tolerance
        judges them; between truncations the cores are larger.
    one_pass : bool
        Whether layers of this package extend their bases in their own backward pass, which
        gives the same result as two passes at the cost of about one. False: by two calls
        of a closure, as published.

    Raises
    ------
    TypeError, ValueError, geotucker.RankError
        For arguments that cannot be used; nothing is changed then.

    Notes
    -----
    *One pass.* Extending the bases does not change the weight, so both gradients of
    Algorithm 1 are taken at one weight, and a layer whose backward is ours has all that is
    needed for both. Between ``backward`` and ``step`` its core and factors are wider, and
    ``core.grad`` is the gradient of the wider core: it can be clipped, scaled and added to
    by further micro-batches. ``zero_grad`` without a step takes the padding away. In such a
    pass the gradient of the core goes straight to ``core.grad``, also under
    ``torch.autograd.grad``; hooks on the core do not see it, and second derivatives are
    refused.

    *Two passes.* Tucker tensors in modules of other kinds need a closure: ``step(closure)``
    calls it twice in a step that extends the bases, at one and the same weight.

    *All or nothing.* If a step raises (in the closure, for a gradient that is NaN or
    infinite, in the wrapped optimizer), parameters and state are as they were before it.
    That costs a copy of the trained parameters and of their state while the step runs.

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
        basis_every: int = 1,
        one_pass: bool = True,
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
        if isinstance(basis_every, bool) or not isinstance(basis_every, int) or basis_every < 1:
            raise ValueError(f"basis_every: expected a positive integer, got {basis_every!r}")
        slots = _trained_slots(model, optimizer)
        self._rules = _check_rules(ranks, slots)
        self.wrapped = optimizer
        # Not Optimizer.__init__, which would make param groups and state of its own:
        # only what hooks and profiling need.
        super().__setstate__({})
        self.basis_every = basis_every
        self._slots = slots
        self._phase = 0  # steps since the bases were extended, modulo basis_every
        for slot in slots:
            _orthonormalise(slot)
            for factor in slot.factors:  # Adagrad makes its state beforehand
                self.state.pop(factor, None)
        self._first_ranks = self.ranks
        self.one_pass = one_pass
        self._arm()
        # Without this optimizer nobody would truncate what they extend.
        weakref.finalize(self, _disarm, [slot.layer for slot in slots if slot.layer is not None])

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

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group to the wrapped optimizer."""
        self.wrapped.add_param_group(param_group)

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
        own = {"phase": self._phase, "first_ranks": self._first_ranks}
        return {**self.wrapped.state_dict(), "tdlrt": own}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load what `state_dict` returned; load the model first, so that the ranks agree.

        Raises
        ------
        ValueError
            If it is not of this optimizer, or moments do not fit the ranks of the model;
            nothing is changed then.
        """
        if "tdlrt" not in state_dict:
            raise ValueError(
                "state_dict: expected an entry 'tdlrt', got only "
                f"{sorted(map(str, state_dict))}; a plain optimizer's state is loaded by "
                "optimizer.wrapped.load_state_dict"
            )
        own = state_dict["tdlrt"]
        names = {slot.name for slot in self._slots}
        if set(own["first_ranks"]) != names:
            raise ValueError(
                f"state_dict: expected the Tucker tensors {sorted(names)}, "
                f"got {sorted(own['first_ranks'])}"
            )
        _check_shapes(state_dict, self.wrapped)
        self.wrapped.load_state_dict({k: v for k, v in state_dict.items() if k != "tdlrt"})
        self._phase = int(own["phase"]) % self.basis_every
        self._first_ranks = {name: tuple(ranks) for name, ranks in own["first_ranks"].items()}
        self._arm()

    def __getstate__(self) -> dict[str, Any]:
        """Return everything, for copies and pickles."""
        return self.__dict__.copy()

    def __repr__(self) -> str:
        """Show the wrapped optimizer and the rank rules."""
        return f"TDLRT({self.wrapped!r}, ranks={self._rules}, basis_every={self.basis_every})"

    # The algorithm.

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Take one step of Algorithm 1, with the gradients that ``backward`` has left.

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
            If a gradient or a new core is NaN or infinite.
        """
        slots = self._trained()
        foreign = [s for s in slots if s.layer is None or not self.one_pass]
        if closure is None and foreign and self._phase == 0:
            raise TypeError(
                "closure: expected a function that resets the gradients, computes the loss, "
                "calls backward and returns the loss; got None. The bases of "
                f"{', '.join(slot.name for slot in foreign)} are extended between two passes of it"
            )
        loss = None
        with self._all_or_nothing(), torch.no_grad():
            if closure is not None:
                loss = self._evaluate(torch.enable_grad()(closure), foreign)
            self._check_gradients()
            self._settle(slots)
            self.wrapped.step()
            for slot in slots:
                _check_finite(slot.core.detach(), f"{slot.name}.core after the step")
            self._phase = (self._phase + 1) % self.basis_every
            if self._phase == 0:
                self._truncate(slots)
            self._arm()
        return loss

    def _evaluate(self, closure: Callable[[], Any], foreign: list[Slot]) -> Any:
        """Run the closure, and once more if bases are to be extended from outside a layer."""
        extend = bool(foreign) and self._phase == 0
        with _factors_require_grad(foreign, extend):
            loss = closure()
        if extend:
            self._check_gradients()
            self._extend(foreign)
            with _factors_require_grad(foreign, False):
                closure()
        return loss

    def _arm(self) -> None:
        """Have our own layers extend their bases in the next backward pass, or not."""
        for slot in self._slots:
            if slot.layer is not None:
                slot.layer.armed = self.one_pass and self._phase == 0

    def _settle(self, slots: list[Slot]) -> None:
        """Make the lifts of the backward pass final, and lift the moments after them."""
        for slot in slots:
            if slot.layer is not None and slot.layer.narrow is not None:
                old, new = slot.layer.narrow.ranks, slot.point.ranks
                self._carry(slot, lambda state, o=old, n=new: lift_state(state, o, n))
                slot.layer.narrow = None

    def truncate(self) -> None:
        """Truncate all Tucker tensors now, by the rank rule, unless the last step has done so.

        With ``basis_every`` above 1 call it before measuring or saving the model; the next step
        extends the bases again.
        """
        if self._phase == 0:
            return
        with self._all_or_nothing(), torch.no_grad():
            self._truncate(self._trained())
            self._phase = 0
            self._arm()

    def _trained(self) -> list[Slot]:
        """Return the Tucker tensors that are not frozen now."""
        return [slot for slot in self._slots if slot.core.requires_grad]

    def _extend(self, slots: list[Slot]) -> None:
        """Extend the bases by the gradients of the factors, lift cores and moments."""
        # A layer that took no part in the loss keeps its bases.
        used = [s for s in slots if all(f.grad is not None for f in (s.core, *s.factors))]
        gradients = [[factor.grad for factor in slot.factors] for slot in used]
        for group in self.param_groups:  # the second pass starts from nothing
            for parameter in group["params"]:
                parameter.grad = None
        for slot, directions in zip(used, gradients, strict=True):
            old = slot.point
            wide = gt.augment(old, directions)
            slot.write(wide)
            self._carry(slot, lambda state, o=old, w=wide: lift_state(state, o.ranks, w.ranks))

    def _truncate(self, slots: list[Slot]) -> None:
        """Truncate cores by the rule and rotate their moments."""
        cuts = gt.truncate([slot.point for slot in slots], self._rule(slots))
        for slot, cut in zip(slots, cuts, strict=True):
            old = slot.point.ranks
            slot.write(cut.point)
            self._carry(slot, lambda state, o=old, c=cut: rotate_state(state, o, c.rotations))

    def _rule(self, slots: list[Slot]) -> gt.RankRule:
        """Return one rule for all slots; tensors that no pattern names keep their ranks."""
        if not isinstance(self._rules, dict):
            return self._rules
        rules = self._rules.items()
        return PerTensor(
            tuple(
                next(
                    (rule for pattern, rule in rules if fnmatchcase(slot.name, pattern)),
                    gt.Fixed(self._first_ranks[slot.name]),
                )
                for slot in slots
            )
        )

    def _carry(self, slot: Slot, transport: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        if slot.core in self.state:
            self.state[slot.core] = transport(self.state[slot.core])

    def _check_gradients(self) -> None:
        """Raise NonFiniteError if any gradient that would be used is not finite."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    _check_finite(parameter.grad, "a gradient")
        for slot in self._slots:
            for mode, factor in enumerate(slot.factors):
                if factor.grad is not None:
                    _check_finite(factor.grad, f"the gradient of {slot.name}.factors.{mode}")

    @contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        """Put parameters, state and counters back if the block raises."""
        points = [_copy_point(slot.point) for slot in self._slots]
        layers = [slot.layer for slot in self._slots if slot.layer is not None]
        lifts = [(layer.armed, layer.narrow) for layer in layers]
        gradients = {p: p.grad for slot in self._slots for p in (slot.core, *slot.factors)}
        others = [p for g in self.param_groups for p in g["params"] if p not in gradients]
        values = [p.detach().clone() for p in others]
        state = {p: _copy_state(self.state[p]) for p in self.state}
        phase = self._phase
        try:
            yield
        except BaseException:
            for slot, point in zip(self._slots, points, strict=True):
                slot.write(point)
            for parameter, gradient in gradients.items():
                parameter.grad = gradient
            for layer, lift in zip(layers, lifts, strict=True):
                layer.armed, layer.narrow = lift
            with torch.no_grad():
                for parameter, value in zip(others, values, strict=True):
                    parameter.copy_(value)
            self.state.clear()
            self.state.update(state)
            self._phase = phase
            raise


def _disarm(layers: list[TuckerModule]) -> None:
    for layer in layers:
        layer.armed = False


def _trained_slots(model: nn.Module, optimizer: Optimizer) -> list[Slot]:
    trained = {p for group in optimizer.param_groups for p in group["params"]}
    slots = [slot for slot in find_slots(model) if slot.core in trained]
    if not slots:
        raise ValueError(
            "model: expected Tucker layers whose cores are in the optimizer's parameter groups, "
            "found none; call factorize(model) first and build the optimizer on its parameters"
        )
    return slots


def _check_rules(ranks: Any, slots: list[Slot]) -> gt.RankRule | dict[str, gt.RankRule]:
    """Return a rule for all tensors, or rules by pattern (none if ranks stay as they are)."""
    if ranks is not None and not isinstance(ranks, Mapping):
        return gt.as_rule(ranks)
    rules = {pattern: gt.as_rule(rule) for pattern, rule in (ranks or {}).items()}
    for pattern in rules:
        if not any(fnmatchcase(slot.name, pattern) for slot in slots):
            names = ", ".join(slot.name for slot in slots)
            raise gt.RankError(f"ranks: the pattern {pattern!r} names none of {names}")
    return rules


def _orthonormalise(slot: Slot) -> None:
    """Make the factors orthonormal if they are not; the tensor does not change."""
    point = slot.point
    for factor in point.factors:
        gram = (factor.T @ factor).double()
        identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        if (gram - identity).abs().max() > 100 * torch.finfo(factor.dtype).eps:
            slot.write(gt.orthonormalise(point))
            return


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


def _check_finite(tensor: Tensor, name: str) -> None:
    values = tensor.coalesce().values() if tensor.is_sparse else tensor
    if not bool(torch.isfinite(values).all()):
        raise gt.NonFiniteError(
            f"{name}: expected finite numbers, got NaN or infinity. The step was undone; "
            "the usual causes are a learning rate that is too large and input that is not finite"
        )


def _check_shapes(state_dict: Mapping[str, Any], optimizer: Optimizer) -> None:
    """Raise ValueError if saved moments do not fit the parameters as they are now."""
    current = [p for group in optimizer.param_groups for p in group["params"]]
    saved = [key for group in state_dict["param_groups"] for key in group["params"]]
    for parameter, key in zip(current, saved, strict=False):
        for name, value in state_dict["state"].get(key, {}).items():
            fits = not torch.is_tensor(value) or value.dim() != parameter.dim()
            if not fits and value.shape != parameter.shape:
                raise ValueError(
                    f"state_dict: {name} of shape {tuple(value.shape)} does not fit a parameter "
                    f"of shape {tuple(parameter.shape)}; load the model's state_dict of the same "
                    "moment first"
                )


def _copy_point(point: gt.TuckerPoint) -> gt.TuckerPoint:
    return gt.TuckerPoint(point.core.clone(), tuple(factor.clone() for factor in point.factors))


def _copy_state(state: Any) -> Any:
    if isinstance(state, dict):
        return {k: v.clone() if torch.is_tensor(v) else copy.copy(v) for k, v in state.items()}
    return copy.deepcopy(state)
