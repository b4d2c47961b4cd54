"""Averages of models over steps: of weights, not of cores and factors entry by entry."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import swa_utils

import geotucker as gt
from geotucker import _ops
from geotucker._tensor import check_finite

from ._contract import without_autocast
from ._slots import find_slots

__all__ = ["AveragedModel"]


class AveragedModel(swa_utils.AveragedModel):
    """The running average of a model with Tucker layers: EMA, SWA and the like.

    `torch.optim.swa_utils.AveragedModel`, which averages parameters entry by entry, gives a wrong
    model there, and no error as long as ranks stay: bases turn from step to step, and the
    coordinates in them mean nothing without them. Here average and model are written in common
    bases, in which cores are averaged entry by entry; that is the average of weights. It is
    truncated to the ranks that the model has by then, so that it is no larger. All other
    parameters are averaged as ever.

    Parameters
    ----------
    model : nn.Module
        Is copied.
    device, avg_fn, multi_avg_fn, use_buffers
        As there. A function must be linear in the two, as those of `torch.optim.swa_utils` are.

    Examples
    --------
    >>> import torch
    >>> from torch.optim.swa_utils import get_ema_multi_avg_fn
    >>> from geotucker_torch import AveragedModel, factorize
    >>> model = factorize(torch.nn.Sequential(torch.nn.Linear(20, 10)), 4, verbose=False)
    >>> average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.99))
    >>> average.update_parameters(model)  # after each step
    >>> average(torch.randn(2, 20)).shape
    torch.Size([2, 10])
    """

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Take a model into the average.

        Raises
        ------
        ValueError
            If its Tucker layers are of other shapes; nothing is changed then.
        geotucker.NonFiniteError
            If one of them has NaN or infinite entries; nothing is changed then.
        """
        mine, theirs = find_slots(self.module), find_slots(model)
        expected, got = ([slot.point.shape for slot in slots] for slots in (mine, theirs))
        if got != expected:
            raise ValueError(
                f"model: expected Tucker tensors of shapes {expected}, as the averaged model has, "
                f"got {got}"
            )
        before = [slot.point for slot in mine]
        wides, given, ranks = [], dict[Tensor, Tensor](), []
        for point, slot in zip(before, theirs, strict=True):
            own = gt.TuckerPoint(*_like(point.core, slot.settled_point))
            check_finite(own.core, f"{slot.name}.core")
            with without_autocast(point.core):
                wide = gt.augment(point, own.factors)
                turns = [u.mT @ v for u, v in zip(wide.factors, own.factors, strict=True)]
                core = _ops.multi_mode_product(own.core, turns)
            given |= dict(zip((slot.core, *slot.factors), (core, *wide.factors), strict=True))
            wides.append(wide)
            ranks.append(own.ranks)
        try:
            for slot, wide in zip(mine, wides, strict=True):
                # Copies: what is averaged is written in place.
                slot.write(gt.TuckerPoint(wide.core, tuple(u.clone() for u in wide.factors)))
            super().update_parameters(_Seen(model, given))  # type: ignore[arg-type]
            averaged = [
                gt.TuckerPoint(slot.core.detach(), wide.factors)
                for slot, wide in zip(mine, wides, strict=True)
            ]
            for slot, point, own_ranks in zip(mine, averaged, ranks, strict=True):
                with without_autocast(point.core):
                    (cut,) = gt.truncate([point], gt.Fixed(own_ranks))
                slot.write(cut.point)
        except BaseException:
            for slot, point in zip(mine, before, strict=True):
                slot.write(point)
            raise


class _Seen:
    """The parameters and buffers of a model, some of them as they are to be seen."""

    def __init__(self, model: nn.Module, given: Mapping[Tensor, Tensor]) -> None:
        self.model, self.given = model, given

    def parameters(self) -> Iterator[Tensor]:
        return (self.given.get(parameter, parameter) for parameter in self.model.parameters())

    def buffers(self) -> Iterator[Tensor]:
        return self.model.buffers()


def _like(core: Tensor, point: gt.TuckerPoint) -> Any:
    """Return core and factors on the device and in the precision of another core."""
    return point.core.to(core), tuple(factor.to(core) for factor in point.factors)
