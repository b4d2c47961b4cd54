"""Methods that are compared: each trains a network by one recipe, at a share of its parameters.

A method is a function of a dense network at its start, the share of its parameters that may be
kept, data and recipe. It yields what is seen at the end of each of the recipe's epochs, so that
all methods see the same images as often.
"""

import math
from collections.abc import Callable, Iterator

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
    model: nn.Module, kept: float, data: DataSet, recipe: Recipe, start: float = START
) -> Iterator[Epoch]:
    """Train in Tucker format by geotucker's defaults, ranks by a budget for the whole network."""
    rule = budget(kept, data, recipe, start)
    model = factorize(model, rule, verbose=False)
    return train(model, TDLRT(recipe.sgd(model), model, rule), data, recipe)


METHODS: dict[str, Method] = {"dense": dense, "TDLRT": tdlrt}
