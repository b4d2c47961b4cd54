"""One recipe for all methods: how a network is trained on images, and what is seen of it."""

import math
import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from measuring import Timed, peak_bytes, repeat
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import geotucker as gt
from geotucker_torch._train._data import DataSet, augment


@dataclass(frozen=True)
class Recipe:
    """What all methods that are compared have in common.

    Parameters
    ----------
    epochs, batch, seed : int
    rate, momentum, decay : float
        Of `torch.optim.SGD`; `decay` is its weight decay.
    cosine : bool
        Whether the learning rate falls to zero along a cosine; else it is constant.
    """

    epochs: int
    rate: float
    batch: int = 128
    momentum: float = 0.0
    decay: float = 0.0
    cosine: bool = True
    seed: int = 0

    def sgd(self, model: nn.Module) -> torch.optim.SGD:
        """Return the optimizer of a model's trainable parameters."""
        parameters = [p for p in model.parameters() if p.requires_grad]
        return torch.optim.SGD(parameters, self.rate, self.momentum, weight_decay=self.decay)


class Cost(NamedTuple):
    """What a network asks for: operations for an image, and memory in a step of training.

    Products count as two operations each, and those with an entry that is pruned as any others:
    they are carried out; decompositions, 1 to 5 % of the time of a step, are not counted. A step
    is the mean of two, as bases may move in every second one.
    """

    inference_mflops: float = math.nan
    training_mflops: float = math.nan
    peak_mib: float = math.nan


class Epoch(NamedTuple):
    """What is seen at the end of an epoch.

    Accuracy in percent; `seconds` is the processor time of all training up to here, without looks
    at the test set. `parameters` are all that the network holds: entries that are pruned count as
    nothing, and so do the places of the others.
    """

    epoch: int
    parameters: int
    train_loss: float
    test_accuracy: float
    seconds: float
    cost: Cost = Cost()


class Diverged(Exception):  # noqa: N818
    """The loss is no number any more."""


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: DataSet,
    recipe: Recipe,
    epochs: range | None = None,
    after_step: Callable[[int, int], Any] = lambda step, steps: None,
    count: Callable[[nn.Module], int] | None = None,
    by_closure: bool = False,
    seconds: float = 0.0,
) -> Iterator[Epoch]:
    """Train a network, all of the recipe's epochs or some of them, and report each.

    The images come in the same order for all methods. A run that diverges reports NaN, and ends.

    Parameters
    ----------
    model : nn.Module
        In training mode while it trains; images come to it in channels-last order.
    optimizer : torch.optim.Optimizer
        Its rate is set in every step.
    data : DataSet
    recipe : Recipe
    epochs : range, optional
        Of those of the recipe, for methods in several parts.
    after_step : callable, optional
        Is told the number of steps taken and that of the whole recipe.
    count : callable, optional
        What the network's parameters are; all of them by default.
    by_closure : bool
        Whether the optimizer evaluates the loss itself.
    seconds : float
        What earlier parts took.
    """
    count = count or size
    steps = math.ceil(len(data.train_labels) / recipe.batch)
    for epoch in range(recipe.epochs) if epochs is None else epochs:
        began, losses = time.process_time(), []
        for i, (images, labels) in enumerate(batches(data, recipe, epoch)):
            step = epoch * steps + i
            set_rate(optimizer, recipe, step / steps)
            try:
                losses.append(descend(model.train(), optimizer, images, labels, by_closure))
            except (Diverged, gt.NonFiniteError):
                yield Epoch(recipe.epochs, count(model), math.nan, math.nan, math.nan)
                return
            after_step(step + 1, steps * recipe.epochs)
        seconds += time.process_time() - began
        loss = sum(losses) / len(losses)
        first = next(batches(data, recipe, epoch))  # the last one may be smaller
        spent = cost(model, optimizer, first, by_closure)
        yield Epoch(epoch + 1, count(model), loss, accuracy(model, data), seconds, spent)


def batches(data: DataSet, recipe: Recipe, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Return an epoch's images and labels, by their order under the recipe's seed."""
    generator = torch.Generator().manual_seed(1000 * recipe.seed + epoch)
    order = torch.randperm(len(data.train_labels), generator=generator)
    for index in order.split(recipe.batch):
        images = data.train_images[index]
        if data.flips:
            images = augment(images, generator)
        normalised = data.normalise(images).contiguous(memory_format=torch.channels_last)
        yield normalised, data.train_labels[index]


def set_rate(optimizer: torch.optim.Optimizer, recipe: Recipe, epoch: float) -> None:
    """Set the rate at a point in time, in epochs from the start."""
    wave = 0.5 * (1.0 + math.cos(math.pi * epoch / recipe.epochs)) if recipe.cosine else 1.0
    for group in optimizer.param_groups:
        group["lr"] = recipe.rate * wave


def descend(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    labels: Tensor,
    by_closure: bool = False,
) -> float:
    """Take a step and return the loss before it."""

    def evaluate() -> float:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        if not math.isfinite(loss.item()):
            raise Diverged
        loss.backward()
        return loss.item()

    if by_closure:
        return cast(float, optimizer.step(evaluate))
    loss = evaluate()
    optimizer.step()
    return loss


def cost(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: tuple[Tensor, Tensor],
    by_closure: bool = False,
) -> Cost:
    """Measure some steps, and take them back; NaN where training breaks down in them."""
    before = deepcopy((model.state_dict(), optimizer.state_dict()))
    try:
        return _cost(model, optimizer, batch, by_closure)
    except (Diverged, gt.NonFiniteError):
        return Cost()
    finally:
        model.load_state_dict(before[0])
        optimizer.load_state_dict(before[1])
        optimizer.zero_grad()


def _cost(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: tuple[Tensor, Tensor],
    by_closure: bool,
) -> Cost:
    steps = Timed(lambda: descend(model.train(), optimizer, *batch, by_closure), 2)
    with FlopCounterMode(display=False) as training:
        repeat(steps)
    with FlopCounterMode(display=False) as inference, torch.no_grad():
        model.eval()(batch[0])
    peak = peak_bytes(steps, model, optimizer, batch)
    images = 1e6 * len(batch[0])
    return Cost(
        inference.get_total_flops() / images,
        training.get_total_flops() / images / steps.calls,
        peak / 2**20,
    )


@torch.no_grad()
def accuracy(model: nn.Module, data: DataSet) -> float:
    """Return the accuracy on the test set in percent."""
    hits = 0
    for images, labels in zip(
        data.test_images.split(500), data.test_labels.split(500), strict=True
    ):
        batch = data.normalise(images).contiguous(memory_format=torch.channels_last)
        hits += int((model.eval()(batch).argmax(1) == labels).sum())
    return 100.0 * hits / len(data.test_labels)


def size(model: nn.Module) -> int:
    """Return the number of a network's parameters."""
    return sum(p.numel() for p in model.parameters())


def row(epoch: Epoch) -> dict[str, str | int]:
    """Return an epoch as a row of a table, rounded."""
    return {
        "epoch": epoch.epoch,
        "parameters": epoch.parameters,
        "train_loss": f"{epoch.train_loss:.4f}",
        "test_accuracy": f"{epoch.test_accuracy:.2f}",
        "seconds": f"{epoch.seconds:.1f}",
        **{name: f"{number:.3f}" for name, number in epoch.cost._asdict().items()},
    }


def lenet5() -> nn.Sequential:
    """LeNet-5 in the size of the low-rank literature: 20 and 50 channels, 500 units; 431,080.

    Pooling stands before ReLU, which is the same function and less work.
    """
    return nn.Sequential(
        nn.Conv2d(1, 20, 5), nn.MaxPool2d(2), nn.ReLU(),
        nn.Conv2d(20, 50, 5), nn.MaxPool2d(2), nn.ReLU(), nn.Flatten(),
        nn.Linear(800, 500), nn.ReLU(), nn.Linear(500, 10),
    ).to(memory_format=torch.channels_last)  # fmt: skip
