"""What the weights of a model are made of: ranks, singular values, sizes, ranks over time."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod, sqrt
from typing import TypeAlias

import numpy as np
import torch
from torch import nn

import geotucker as gt
from geotucker._ranks import tail_norms
from geotucker._ranks._base import smallest_rank

from ._contract import without_autocast
from ._layers import TuckerModule
from ._modules import blamed_on
from ._optimizer import TDLRT
from ._point import orthonormal
from ._rules import flops_of
from ._slots import Slot, find_slots
from ._table import table

__all__ = ["Source", "Spectra", "WeightSpectra", "spectra", "summary"]

Ranks: TypeAlias = tuple[int, ...]


@dataclass(frozen=True)
class WeightSpectra:
    """One weight of a model: a Tucker tensor, or a matrix or kernel that is dense.

    Parameters
    ----------
    name : str
        Dotted name of the module that holds it; of the parameter if that is not its ``weight``.
    type : str
        Name of the module's class.
    shape : tuple of int
        Shape (n_1, ..., n_d) of the dense weight.
    parameters, dense_parameters : int
        Entries of core and factors, and of the dense weight.
    ranks : tuple of int, optional
        Ranks (r_1, ..., r_d); None for a dense weight, for which all that follows is empty.
    modes : tuple of str
        What the modes are called: "out", "in", "height", ...
    values : tuple of tuple of float
        Per mode, the singular values of the weight's unfolding, descending, at most r_i.
    flops, dense_flops : int, optional
        Multiply-adds in forward on the last training batch, in Tucker format and dense; None before
        one, and for modules of other packages.
    history : mapping of int to tuple of int
        Ranks by number of steps taken; empty where no optimizer is known.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    parameters: int
    dense_parameters: int
    ranks: Ranks | None = None
    modes: tuple[str, ...] = ()
    values: tuple[tuple[float, ...], ...] = ()
    flops: int | None = None
    dense_flops: int | None = None
    history: Mapping[int, Ranks] = field(default_factory=dict)

    def energy(self, mode: int) -> tuple[float, ...]:
        """Return the share of ``||W||^2`` that is kept if one mode is cut to rank 0, 1, ..., r_i.

        Examples
        --------
        >>> weight = WeightSpectra("fc", "TuckerLinear", (9, 9), 40, 81, values=((4.0, 3.0),) * 2)
        >>> [round(share, 2) for share in weight.energy(0)]
        [0.0, 0.64, 1.0]
        """
        tails = tail_norms(np.asarray(self.values[mode]))
        norm = tails[0] or 1.0
        return tuple(float(1.0 - (tail / norm) ** 2) for tail in tails)

    def ranks_for(self, energy: float) -> Ranks:
        """Return for each mode the smallest rank that alone keeps a share of ``||W||^2``.

        Raises
        ------
        ValueError
            If the share is not within 0 and 1.

        Examples
        --------
        >>> weight = WeightSpectra("fc", "TuckerLinear", (9, 9), 40, 81, values=((4.0, 3.0),) * 2)
        >>> weight.ranks_for(0.6), weight.ranks_for(0.99)
        ((1, 1), (2, 2))
        """
        if not 0.0 <= energy <= 1.0:
            raise ValueError(f"energy: expected a share from 0 to 1, got {energy!r}")
        tails = [tail_norms(np.asarray(values)) for values in self.values]
        lost = sqrt(1.0 - energy)
        return tuple(max(1, smallest_rank(tail, lost * tail[0])) for tail in tails)


@dataclass(frozen=True)
class Spectra:
    """What `spectra` has measured; ``str()`` gives a table.

    Parameters
    ----------
    weights : tuple of WeightSpectra
        All Tucker tensors and dense matrices and kernels, in the order of the model.
    parameters, dense_parameters : int
        Of the whole model, biases and all, as it is and with dense weights.
    """

    weights: tuple[WeightSpectra, ...]
    parameters: int
    dense_parameters: int

    @property
    def tucker(self) -> tuple[WeightSpectra, ...]:
        """The weights in Tucker format."""
        return tuple(weight for weight in self.weights if weight.ranks is not None)

    def __str__(self) -> str:
        """Return the table as plain text."""
        head = ("weight", "type", "shape", "ranks", "99 %", "dense", "now", "")
        rows = [_cells(weight) for weight in self.weights]
        now = sum(weight.parameters for weight in self.weights)
        dense = sum(weight.dense_parameters for weight in self.weights)
        rest = (self.dense_parameters - dense, self.parameters - now)
        sums = [
            ("biases and others", "", "", "", "", *_counts(*rest)),
            ("whole model", "", "", "", "", *_counts(self.dense_parameters, self.parameters)),
        ]
        return table(head, rows, sums)


Source: TypeAlias = nn.Module | TDLRT | Spectra


def spectra(source: Source) -> Spectra:
    """Measure the weights of a model: ranks, singular values, sizes.

    Between ``backward`` and ``step``, when bases may be extended, it is the point from before:
    the same weights, without the zeros. Nothing is changed.

    Parameters
    ----------
    source : nn.Module or TDLRT
        A model, or the optimizer that trains it, which knows the ranks over time too. What this
        function has returned is returned as it is.

    Returns
    -------
    Spectra
        Plain numbers on the host, wherever and of whatever dtype the model is.

    Raises
    ------
    TypeError
        If `source` is neither.
    ValueError
        If a Tucker tensor is on the meta device, and so has no values.
    geotucker.NonFiniteError
        If a core holds NaN or infinity.

    Examples
    --------
    >>> from torch import nn
    >>> from geotucker_torch import factorize, spectra
    >>> model = nn.Sequential(nn.Linear(100, 50), nn.ReLU(), nn.Linear(50, 10))
    >>> weight = spectra(factorize(model, {"0": 8}, verbose=False)).weights[0]
    >>> weight.name, weight.ranks, weight.modes, len(weight.values[0])
    ('0', (8, 8), ('out', 'in'), 8)
    """
    if isinstance(source, Spectra):
        return source
    history: Mapping[str, Mapping[int, Ranks]] = {}
    model = source
    if isinstance(source, TDLRT):
        model, history = source.model, source.rank_history
    if not isinstance(model, nn.Module):
        raise TypeError(
            "source: expected a torch.nn.Module, a TDLRT or what spectra() has returned, got "
            f"{type(source).__name__}"
        )
    return _of_model(model, history)


def summary(source: Source) -> str:
    """Return a table of a model's weights: ranks, those that keep 99 % of the energy, sizes.

    Parameters and exceptions are those of `spectra`.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> from geotucker_torch import factorize, summary
    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Linear(100, 50), nn.ReLU(), nn.Linear(50, 10))
    >>> print(summary(factorize(model, {"0": 4}, verbose=False)))
    weight             type          shape      ranks     99 %  dense    now
    ---------------------------------------------------------------------------------
    0                  TuckerLinear  (50, 100)  (4, 4)  (4, 4)  5,000    616  12.3 %
    2                  Linear        (10, 50)   dense             500    500  100.0 %
    ---------------------------------------------------------------------------------
    biases and others                                              60     60  100.0 %
    whole model                                                 5,560  1,176  21.2 %
    """
    return str(spectra(source))


def _of_model(model: nn.Module, history: Mapping[str, Mapping[int, Ranks]]) -> Spectra:
    slots = {slot.core: slot for slot in find_slots(model)}
    factors = {factor for slot in slots.values() for factor in slot.factors}
    weights, rest = [], 0
    for name, parameter in model.named_parameters():
        if parameter in slots:
            slot = slots[parameter]
            weights.append(_tucker(slot, model, history.get(slot.name, {})))
        elif parameter in factors or nn.parameter.is_lazy(parameter):
            continue
        elif parameter.dim() > 1:
            weights.append(_dense(name, parameter, model))
        else:
            rest += parameter.numel()
    return Spectra(
        tuple(weights),
        rest + sum(weight.parameters for weight in weights),
        rest + sum(weight.dense_parameters for weight in weights),
    )


@torch.no_grad()
def _tucker(slot: Slot, model: nn.Module, history: Mapping[int, Ranks]) -> WeightSpectra:
    point = slot.settled_point
    if point.core.is_meta:
        raise ValueError(
            f"source: expected weights with values, got {slot.name!r} on the meta device"
        )
    with blamed_on(slot.name), without_autocast(point.core):
        values = gt.spectrum(orthonormal(_single(point))).values
    cost = flops_of(slot)
    return WeightSpectra(
        slot.name,
        type(model.get_submodule(slot.name)).__name__,
        point.shape,
        point.size,
        prod(point.shape),
        point.ranks,
        _modes(slot.layer, point.order),
        tuple(tuple(mode.tolist()) for mode in values),
        None if cost is None else int(cost.tucker(point.ranks)),
        None if cost is None else int(cost.dense),
        dict(history),
    )


def _dense(name: str, parameter: nn.Parameter, model: nn.Module) -> WeightSpectra:
    owner, _, last = name.rpartition(".")
    kind = type(model.get_submodule(owner)).__name__
    size = parameter.numel()
    return WeightSpectra(owner if last == "weight" else name, kind, (*parameter.shape,), size, size)


def _single(point: gt.TuckerPoint) -> gt.TuckerPoint:
    """Return the point in single precision at least: in half one sees no lack of orthonormality."""
    arrays = (point.core, *point.factors)
    core, *factors = (a.to(torch.promote_types(a.dtype, torch.float32)) for a in arrays)
    return gt.TuckerPoint(core, tuple(factors))


def _modes(layer: TuckerModule | None, order: int) -> tuple[str, ...]:
    if layer is None:
        return tuple(f"mode {i + 1}" for i in range(order))
    return layer.mode_names


def _cells(weight: WeightSpectra) -> tuple[str, ...]:
    ranks, enough = "dense", ""
    if weight.ranks is not None:
        ranks, enough = str(weight.ranks), str(weight.ranks_for(0.99))
    name = weight.name or "(the model)"
    counts = _counts(weight.dense_parameters, weight.parameters)
    return (name, weight.type, str(weight.shape), ranks, enough, *counts)


def _counts(dense: int, now: int) -> tuple[str, str, str]:
    return f"{dense:,}", f"{now:,}", f"{100 * now / dense:.1f} %" if dense else ""
