"""What a training step has done so far with one Tucker tensor: the record that its layers share."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from torch import Tensor, nn

import geotucker as gt
from geotucker._moments import regauge

if TYPE_CHECKING:
    from ._layers import TuckerModule
    from ._peers import Peers

__all__ = ["Drift", "Extension", "Lift", "Right", "Use", "Waiting", "regauged"]


Right: TypeAlias = Sequence[Tensor | None]
"""The Q_i of ``Mat_i(C)^T = Q_i S_i^T``, of the modes whose bases do not span everything."""


class Drift(NamedTuple):
    """How the moments of an optimizer are about to move the bases.

    Parameters
    ----------
    parts : tuple of Tensor, shapes (n_i, r_i)
        ``Kdot_i``, of the moment.
    right : Right
        The Q_i of ``Kdot_i Q_i^T`` that they stand for, those of the core when the bases moved
        last.
    weight : callable
        Gives how much of the moment goes into the next step, in the units of a gradient. It is
        asked when the bases move: schedulers change momentum between steps.
    """

    parts: tuple[Tensor, ...]
    right: Right
    weight: Callable[[], float]

    def fits(self, right: Right) -> bool:
        """Tell whether they are of the ranks that these Q_i have; others may have been loaded."""
        old, new = _by_mode(self.right), _by_mode(right)
        return all(mode in new and q.shape == new[mode].shape for mode, q in old.items())

    def at(self, right: Right) -> tuple[Tensor, ...]:
        """Return what it adds to the directions, with other Q_i, as far as it is tangent."""
        weight = self.weight()
        return tuple(weight * part for part in regauged(self.parts, self.right, right))


def regauged(parts: Sequence[Tensor], old: Right, new: Right) -> tuple[Tensor, ...]:
    """Return the parts that stand for the same, as far as it is tangent, with other Q_i."""
    return regauge(parts, _by_mode(old), _by_mode(new))


def _by_mode(right: Right) -> dict[int, Tensor]:
    """Return the Q_i that there are by their modes."""
    return {mode: q for mode, q in enumerate(right) if q is not None}


class Extension(NamedTuple):
    """How a layer extends its bases; set by an optimizer.

    Parameters
    ----------
    galerkin : bool
        Whether the gradient of the wider core is the whole one or a tangent vector.
    drift : Drift, optional
        What the optimizer's moments add to the directions.
    alone : bool
        Whether it does so in its own backward pass. Factors have no gradients then in steps
        between, whoever asks for them: they would count in norms that are clipped.
    """

    galerkin: bool = True
    drift: Drift | None = None
    alone: bool = False


class Use(NamedTuple):
    """What one use of a weight in a graph has for the gradients, at the point of that pass.

    Parameters
    ----------
    point : TuckerPoint
        The point; it shares its memory with the parameters of that moment.
    directions : list of Tensor, shapes (n_i, r_i) or (n_i, 0)
        The ``grad_{K_i} L``, if they are wanted.
    right : Right
    tangent : Tensor, optional
        Gradient of the core, if the directions and it are all that counts.
    whole : callable, optional
        Else: from any bases to the gradient of the core in them.
    """

    point: gt.TuckerPoint
    directions: list[Tensor]
    right: Right
    tangent: Tensor | None
    whole: Callable[[Sequence[Tensor]], Tensor] | None


@dataclass(eq=False)
class Lift:
    """The state of a Tucker tensor between two steps of an optimizer.

    Layers that are tied, that is have the same core and factors, have the same record too.
    """

    # Set by an optimizer: the core that it trains, of which it moves the bases, so that ranks may
    # change in any step.
    trained: nn.Parameter | None = None
    # Set by an optimizer: the processes whose gradients are averaged with those here (`_peers`).
    peers: "Peers | None" = None
    # Set by an optimizer: the next backward pass shall extend the bases, and how (see `_lift`).
    armed: bool = False
    extension: Extension = field(default_factory=Extension)
    # Of the loss whose gradients it has, as against the gradients that the optimizer steps with.
    loss_scale: Tensor | float = 1.0
    # The point before that happened, until a step is taken or the gradients are reset, and the
    # Q_i of Mat_i(C)^T = Q_i S_i^T of its incomplete modes; the largest entry of the gradient that
    # it left then, and the version of the core that it wrote.
    narrow: gt.TuckerPoint | None = None
    right: Right | None = None
    lifted_norm: Tensor | None = None
    version: int = 0
    # During a backward pass: the point that the tensor is lifted to at its end, None if that is not
    # finite, and the whole gradient of its core there.
    pending: tuple[gt.TuckerPoint | None, Tensor] | None = None
    # Forward passes since the bases were last moved: more than one may be in one graph.
    uses: int = 0
    # What they have for the gradients waits for the end of the backward pass, by the number of that
    # and by the identity of the core; shared by all tensors of an optimizer.
    waiting: "Waiting" = field(default_factory=dict)

    def __getstate__(self) -> dict[str, Any]:
        """Return all but what an optimizer has set, which would not truncate what a copy extends.

        One that is copied together with its model tells the copy what is to be.
        """
        bare, own = Lift(), ("trained", "peers", "armed", "extension", "pending", "uses", "waiting")
        return {**self.__dict__, **{name: getattr(bare, name) for name in own}}

    def forget_uses(self) -> None:
        """Start to count again, and drop what a backward pass that has failed left behind."""
        self.uses, self.pending = 0, None
        self.waiting.clear()


Waiting: TypeAlias = dict[int, dict[int, list[tuple["TuckerModule", Use]]]]
