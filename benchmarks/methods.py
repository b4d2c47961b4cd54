"""Methods that are compared: each trains a network by one recipe, at a share of its parameters.

A method is a function of a dense network at its start, the share of its parameters that may be
kept, data and recipe. It yields what is seen at the end of each of the recipe's epochs, so that
all methods see the same images as often.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import decompositions
import pruning
from decompositions import plain_descent, plain_descent_by_tltorch
from torch import nn
from training import Epoch, Recipe, train

import geotucker as gt
from geotucker_torch import TDLRT, factorize
from geotucker_torch._train._data import DataSet

Method = Callable[[nn.Module, float, DataSet, Recipe], Iterator[Epoch]]

START = 0.1  # heuristic: share of the parameters at which ranks begin, if more is to be saved


def dense(model: nn.Module, kept: float, data: DataSet, recipe: Recipe) -> Iterator[Epoch]:
    """Descend on all weights, whatever share is asked for."""
    return train(model, recipe.sgd(model), data, recipe)


def budget(kept: float, data: DataSet, recipe: Recipe, start: float) -> gt.Budget:
    """Return a budget that is reached after half of the steps, from a share at the start."""
    steps = math.ceil(len(data.train_labels) / recipe.batch) * recipe.epochs
    return gt.Budget(parameters=kept, start=max(kept, start), steps=max(1, steps // 2))


def tdlrt(
    model: nn.Module,
    kept: float,
    data: DataSet,
    recipe: Recipe,
    start: float = START,
    tensorise: Any = None,
    rate_power: float | None = None,
) -> Iterator[Epoch]:
    """Train in Tucker format by geotucker's defaults, ranks by a budget for the whole network.

    `tensorise` names linear layers that are taken as tensors, see `geotucker_torch.factorize`;
    with `rate_power` the steps grow as ranks fall, see `geotucker_torch.TDLRT`.
    """
    rule = budget(kept, data, recipe, start)
    model = factorize(model, rule, tensorise=tensorise, verbose=False)
    optimizer = TDLRT(recipe.sgd(model), model, rule, rate_power=rate_power)
    return train(model, optimizer, data, recipe)


def cut(
    model: nn.Module, kept: float, tensorise: Any = None, rescale: bool | None = None
) -> nn.Module:
    """Return a network in Tucker format at ranks that a budget for all of it picks at once."""
    rule = gt.Budget(parameters=kept)
    return factorize(model, rule, tensorise=tensorise, rescale=rescale, verbose=False)


def riemannian(model: nn.Module, kept: float, data: DataSet, recipe: Recipe) -> Iterator[Epoch]:
    """Descend along the Riemannian gradient at fixed ranks, with the HOSVD as retraction.

    D. Kressner, M. Steinlechner, B. Vandereycken, Low-rank tensor completion by Riemannian
    optimization, BIT 2014, sections 2 and 3, for a network: ranks are those that the budget picks
    at the start. Without momentum, which would have to be transported; the rate is the recipe's.
    """
    model = cut(model, kept)
    sgd = replace(recipe, momentum=0.0).sgd(model)
    optimizer = TDLRT(sgd, model, as_before, integrator="tangent", basis_every=1)
    return train(model, optimizer, data, recipe)


def as_before(spectra: Sequence[gt.Spectrum]) -> list[Any]:
    """Return the ranks that tensors had; as a rule it truncates by the HOSVD."""
    return [spectrum.facts.previous for spectrum in spectra]


def plain_descent_by_budget(
    model: nn.Module, kept: float, data: DataSet, recipe: Recipe, tensorise: Any = None
) -> Iterator[Epoch]:
    """Descend on cores and factors as on any parameters, at the ranks of `tdlrt`'s rule."""
    model = cut(model, kept, tensorise).requires_grad_(True)
    return train(model, recipe.sgd(model), data, recipe)


def fine_tuned(
    model: nn.Module, kept: float, data: DataSet, recipe: Recipe, tensorise: Any = None
) -> Iterator[Epoch]:
    """Train densely for half of the epochs, truncate, and descend on cores and factors.

    Y.-D. Kim et al., Compression of deep convolutional neural networks, ICLR 2016,
    arXiv:1511.06530, with a budget for the whole network as rule for the ranks, and factors for the
    modes of the kernel too. Momentum begins anew, and no weight is scaled, however short the
    training.
    """
    half, seconds = recipe.epochs // 2, 0.0
    for epoch in train(model, recipe.sgd(model), data, recipe, range(half)):
        yield epoch
        seconds = epoch.seconds
    if math.isnan(seconds):  # diverged
        return
    model = cut(model, kept, tensorise, rescale=False).requires_grad_(True)
    rest = range(half, recipe.epochs)
    yield from train(model, recipe.sgd(model), data, recipe, rest, seconds=seconds)


GROWING: dict[str, Method] = {
    "TDLRT, rate_power 1/4": partial(tdlrt, rate_power=1 / 4),
    "TDLRT, rate_power 1/3": partial(tdlrt, rate_power=1 / 3),
}

METHODS: dict[str, Method] = {
    "dense": dense,
    "TDLRT": tdlrt,
    **GROWING,
    "Tucker, plain descent": partial(plain_descent_by_tltorch, decompositions.tucker),
    "CP": partial(plain_descent_by_tltorch, decompositions.cp),
    "TT": partial(plain_descent_by_tltorch, decompositions.tt),
    "UV^T, plain descent": partial(plain_descent, decompositions.matrix),
    "Riemannian descent": riemannian,
    "HOSVD, fine-tuned": fine_tuned,
    "magnitude pruning": pruning.magnitude,
    "iterative pruning": pruning.iterative,
    "SNIP": partial(pruning.prune_at_start, pruning.snip),
    "GraSP": partial(pruning.prune_at_start, pruning.grasp),
    "SynFlow": partial(pruning.prune_at_start, pruning.synflow),
}
# Those that can take linear layers as tensors: with an argument `tensorise`.
AS_TENSORS: dict[str, Callable[..., Iterator[Epoch]]] = {
    "TDLRT": tdlrt,
    **GROWING,
    "Tucker, plain descent": plain_descent_by_budget,
    "HOSVD, fine-tuned": fine_tuned,
}
