"""DistributedDataParallel and Tucker tensors: it must leave them alone.

Its reducer knows the shapes that parameters had when the model was wrapped, and breaks with the
first change of a rank. What the names in an attribute of the model name it ignores.
"""

from collections.abc import Sequence
from typing import TypeVar

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ._modules import check_model
from ._slots import Slot, find_slots

__all__ = ["active_wrapper", "check_ignored", "distribute"]

_Model = TypeVar("_Model", bound=nn.Module)
_IGNORED = "_ddp_params_and_buffers_to_ignore"


def distribute(model: _Model) -> _Model:
    """Tell DistributedDataParallel to leave the Tucker tensors of a model to `TDLRT`.

    `factorize` does it for the model that it is given. It is needed where that is only a part of
    what is wrapped later, by hand or by a trainer: call it on the whole, before it is wrapped.

    Parameters
    ----------
    model : nn.Module
        What DistributedDataParallel will be given. Nothing else about it changes.

    Returns
    -------
    nn.Module
        The model.

    Raises
    ------
    TypeError
        If `model` is not a module.
    ValueError
        If it is wrapped already.

    Examples
    --------
    >>> from geotucker_torch import distribute, factorize
    >>> body = factorize(nn.Sequential(nn.Linear(20, 10)), 4, verbose=False)
    >>> model = distribute(nn.Sequential(body, nn.Linear(10, 2)))
    """
    check_model(model)
    if isinstance(model, DistributedDataParallel):
        raise ValueError(
            "model: expected one that is not wrapped yet, got a DistributedDataParallel, which "
            "knows its parameters for good; call distribute(model) before"
        )
    kept = [name for name in getattr(model, _IGNORED, ()) if name not in _tucker_names(model)]
    setattr(model, _IGNORED, [*kept, *_tucker_names(model)])
    return model


def active_wrapper() -> DistributedDataParallel | None:
    """Return what the forward pass that is under way has gone through, if anything."""
    return DistributedDataParallel._get_active_ddp_module()


def check_ignored(wrapper: DistributedDataParallel, slots: Sequence[Slot]) -> None:
    """Raise ValueError if a wrapper of a model averages Tucker tensors."""
    cores = {slot.core for slot in slots}
    names = [
        name
        for name, p in _tucker_names(wrapper.module).items()
        if p in cores and name not in wrapper.parameters_to_ignore
    ]
    if names:
        raise ValueError(
            f"model: expected DistributedDataParallel to leave {', '.join(names)} to TDLRT, got "
            "it averaging them, which fails when ranks change; call "
            "geotucker_torch.distribute(model) on the whole model before it is wrapped"
        )


def _tucker_names(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return cores and factors by all their names, as DistributedDataParallel says them."""
    tucker = {p for slot in find_slots(model) for p in (slot.core, *slot.factors)}
    named: dict[str, nn.Parameter] = {}
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter in tucker:
                # The parameters of the root itself are ".core" in one place, "core" in another.
                named |= {f"{prefix}.{name}": parameter, f"{prefix}.{name}".lstrip("."): parameter}
    return named
