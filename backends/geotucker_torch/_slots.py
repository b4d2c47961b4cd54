"""The Tucker tensors of a model, whatever module holds them."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import nn

import geotucker as gt

from ._layers import TuckerModule
from ._point import read_point, write_point

__all__ = ["Slot", "find_slots"]


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
        if not isinstance(module, TuckerModule) and not _is_tltorch_tucker(module):
            continue
        core = module.core
        if not isinstance(core, nn.Parameter):
            continue
        slot = slots.get(core)
        if slot is None:
            factors = tuple(module.factors)  # type: ignore[arg-type]
            slot = Slot(name, core, factors, tuple(_ranked(model, module)))
        if isinstance(module, TuckerModule):
            slot = replace(slot, layers=(*slot.layers, module))
        slots[core] = slot
    return list(slots.values())


def _is_tltorch_tucker(module: nn.Module) -> bool:
    # By name: importing tensorly-torch would switch TensorLy's backend for everyone.
    names = {
        base.__name__ for base in type(module).__mro__ if base.__module__.startswith("tltorch.")
    }
    return "TuckerTensor" in names and not any(name.startswith("Complex") for name in names)


def _ranked(model: nn.Module, tensor: nn.Module) -> Iterator[nn.Module]:
    """Yield the tensorly-torch modules that repeat the ranks of `tensor` in an attribute."""
    if isinstance(tensor, TuckerModule):
        return
    yield tensor
    for module in model.modules():
        # Not getattr: a layer of ours would form its dense weight.
        if module._modules.get("weight") is tensor and hasattr(module, "rank"):
            yield module
