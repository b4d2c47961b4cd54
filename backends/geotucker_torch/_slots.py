"""The Tucker tensors of a model, whatever module holds them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import nn

import geotucker as gt

from ._layers import TuckerModule
from ._point import read_point, write_point
from ._tltorch import holds_tucker, ranked_modules

__all__ = ["Slot", "find_slots", "layers_of"]


@dataclass(frozen=True)
class Slot:
    """One Tucker tensor of a model: the parameters that hold it, under their dotted name.

    Reading detaches; writing keeps the Parameter objects and gives them new storage, so that
    param groups, the optimizer's state and references elsewhere stay valid at any rank.
    """

    name: str
    core: nn.Parameter
    factors: tuple[nn.Parameter, ...]
    # Modules with an attribute `rank` to keep in step (tensorly-torch reads it in forward).
    ranked: tuple[nn.Module, ...] = ()
    # Our own layers, whose backward can extend the bases; several if they are tied.
    layers: tuple[TuckerModule, ...] = ()

    @property
    def layer(self) -> TuckerModule | None:
        """The first of our own layers, which speaks for all."""
        return self.layers[0] if self.layers else None

    @property
    def point(self) -> gt.TuckerPoint:
        """The tensor as a detached point that shares storage with the parameters."""
        return read_point(self.core, self.factors)

    @property
    def settled_point(self) -> gt.TuckerPoint:
        """The point without a lift that no step has used."""
        return self.point if self.layer is None else self.layer.settled_point

    @property
    def settled_ranks(self) -> tuple[int, ...]:
        """The ranks without a lift that no step has used."""
        return self.point.ranks if self.layer is None else self.layer.settled_ranks

    def write(self, point: gt.TuckerPoint) -> None:
        """Put a point of any ranks into the parameters; their gradients are dropped."""
        write_point(self.core, self.factors, point)
        for module in self.ranked:
            module.rank = point.ranks  # type: ignore[assignment]


def find_slots(model: nn.Module) -> list[Slot]:
    """Return the Tucker tensors of a model, each once, in the order of its modules.

    Found are the layers of this package and every ``tltorch.TuckerTensor`` (which
    FactorizedConv, FactorizedLinear, TRL and the like hold). Complex ones are left alone.
    """
    slots: dict[nn.Parameter, Slot] = {}
    for name, module in model.named_modules():
        if not isinstance(module, TuckerModule) and not holds_tucker(module):
            continue
        core = module.core
        if not isinstance(core, nn.Parameter):
            continue
        slot = slots.get(core)
        if slot is None:
            factors = tuple(module.factors)  # type: ignore[arg-type]
            ranked = () if isinstance(module, TuckerModule) else ranked_modules(model, module)
            slot = Slot(name, core, factors, tuple(ranked))
        if isinstance(module, TuckerModule):
            slot = replace(slot, layers=(*slot.layers, module))
        slots[core] = slot
    return list(slots.values())


def layers_of(slots: Sequence[Slot]) -> list[TuckerModule]:
    """Return the layers of this package that tensors are in, one for each of their tensors."""
    return [slot.layer for slot in slots if slot.layer is not None]
