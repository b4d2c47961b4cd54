"""One epoch of training and one look at the test set."""

import math
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from geotucker import NonFiniteError

from ._config import Config
from ._data import DataSet, augment
from ._errors import DivergedError
from ._networks import Network

__all__ = ["evaluate", "learning_rate", "train_epoch"]

_EVALUATION_BATCH = 1000  # large enough for speed; memory stays below that of training


def train_epoch(
    network: Network, data: DataSet, config: Config, after_step: Callable[[], None]
) -> None:
    """Train one network to the end of its epoch, from the step that its tally names.

    Parameters
    ----------
    network : Network
        Is changed in place.
    data : DataSet
        On the network's device.
    after_step : callable
        Called after every step, when the network can be saved.

    Raises
    ------
    DivergedError
        If a loss is NaN or infinite, or the optimizer refuses a gradient that is.
    """
    tally = network.tally
    if tally.step == 0:
        network.order.start_epoch()
    network.model.train()
    with network.own_randomness():
        while tally.step < network.order.steps:
            began = time.perf_counter()
            rate = learning_rate(config, network.epoch + tally.step / network.order.steps)
            for group in network.optimizer.param_groups:
                group["lr"] = rate
            loss, correct, count = _step(network, data)
            tally.step += 1
            tally.loss += loss * count
            tally.correct += correct
            tally.seen += count
            tally.seconds += time.perf_counter() - began
            after_step()


def _step(network: Network, data: DataSet) -> tuple[float, int, int]:
    """Take one optimizer step; return the loss, the hits and the number of images."""
    images, labels = _batch(network, data)
    network.optimizer.zero_grad()
    logits = network.model(images)
    loss = F.cross_entropy(logits, labels)
    if not math.isfinite(loss.item()):
        raise DivergedError(_diverged(network, f"the loss became {loss.item()}"))
    loss.backward()
    try:
        network.optimizer.step()
    except NonFiniteError as error:
        raise DivergedError(_diverged(network, str(error))) from error
    return loss.item(), int((logits.argmax(1) == labels).sum()), len(labels)


def _batch(network: Network, data: DataSet) -> tuple[Tensor, Tensor]:
    """Return normalised images, shape (batch, channels, height, width), and their labels."""
    index = network.order.batch(network.tally.step).to(data.train_images.device)
    images = data.train_images[index]
    if data.flips:
        images = augment(images, network.order.generator)
    return data.normalise(images), data.train_labels[index]


def _diverged(network: Network, what: str) -> str:
    """Say where it happened and what to try."""
    rate = network.optimizer.param_groups[0]["lr"]
    return (
        f"{network.name} network, epoch {network.epoch + 1}, step {network.tally.step + 1}: "
        f"{what}; try a smaller --lr (it was {rate:.3g} here) or a larger --batch-size"
    )


def learning_rate(config: Config, epoch: float) -> float:
    """Return the learning rate at a point in time, in epochs since the start.

    Examples
    --------
    >>> config = Config(lr=0.2, epochs=10)
    >>> learning_rate(config, 0.0), round(learning_rate(config, 5.0), 6)
    (0.2, 0.1)
    """
    base, epochs = float(config.lr or 0.0), int(config.epochs or 1)
    if config.schedule == "constant":
        return base
    return base * 0.5 * (1.0 + math.cos(math.pi * epoch / epochs))


@torch.no_grad()
def evaluate(model: nn.Module, data: DataSet) -> tuple[float, float]:
    """Return mean loss and accuracy, a fraction, on the test set."""
    model.eval()
    loss, correct = 0.0, 0
    for start in range(0, len(data.test_labels), _EVALUATION_BATCH):
        images = data.test_images[start : start + _EVALUATION_BATCH]
        labels = data.test_labels[start : start + _EVALUATION_BATCH]
        logits = model(data.normalise(images))
        loss += float(F.cross_entropy(logits, labels, reduction="sum"))
        correct += int((logits.argmax(1) == labels).sum())
    return loss / len(data.test_labels), correct / len(data.test_labels)
