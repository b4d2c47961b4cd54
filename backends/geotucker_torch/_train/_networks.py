"""The networks of a run: a model, its optimizer, and where it stands."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from geotucker import Budget, RankError, RankRule, Tolerance

from .. import TDLRT, TuckerModule, factorize
from ._config import Config
from ._data import DataSet
from ._errors import OptionError
from ._models import build
from ._order import Order
from ._ranks import parse_budget

__all__ = ["Network", "Tally", "build_networks", "parameter_count"]


@dataclass
class Tally:
    """What an epoch has gathered so far."""

    step: int = 0
    loss: float = 0.0  # sum over the images seen
    correct: int = 0
    seen: int = 0
    seconds: float = 0.0


@dataclass
class Network:
    """One of the networks that are trained side by side.

    Parameters
    ----------
    name : str
        ``"dense"`` or ``"tucker"``.
    dense_parameters : int
        Number of parameters of the dense network, to which compression refers.
    random_state : dict
        State of torch's global generators. Each network has its own, so that neither sees
        whether the other is there.
    """

    # fixed
    name: str
    dense_parameters: int
    # changes with every step
    model: nn.Module
    optimizer: Optimizer | TDLRT
    random_state: dict[str, Any]
    tally: Tally = field(default_factory=Tally)
    # changes with every epoch
    order: Order = field(kw_only=True)
    epoch: int = 0

    @property
    def ranks(self) -> dict[str, tuple[int, ...]]:
        """Ranks of the layers in Tucker format, by name."""
        return {name: layer.ranks for name, layer in tucker_layers(self.model).items()}

    @property
    def parameters(self) -> int:
        """Number of parameters: weights, cores, factors, biases, normalisation."""
        return parameter_count(self.model)

    @property
    def compression(self) -> float:
        """Fraction of the dense network's parameters that is saved."""
        return 1.0 - self.parameters / self.dense_parameters

    @contextmanager
    def own_randomness(self) -> Iterator[None]:
        """Let torch's global generators continue where this network left them."""
        _set_random_state(self.random_state)
        try:
            yield
        finally:
            self.keep_randomness()

    def keep_randomness(self) -> None:
        """Take note of the global generators; also needed before saving amid an epoch."""
        self.random_state = _random_state()

    def state_dict(self) -> dict[str, Any]:
        """Return all that is needed to go on from here, bit by bit the same, but for the model."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "order": self.order.state_dict(),
            "random_state": self.random_state,
            "tally": asdict(self.tally),
            "epoch": self.epoch,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back to a saved state; the model is there already."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.order.load_state_dict(state["order"])
        self.random_state = state["random_state"]
        self.tally = Tally(**state["tally"])
        self.epoch = state["epoch"]


def build_networks(config: Config, data: DataSet) -> list[Network]:
    """Build the dense baseline (unless it is not wanted) and the Tucker network.

    Both start from the same weights; those of the Tucker network are truncated to its
    starting ranks.

    Raises
    ------
    OptionError
        If the model does not fit the images or the ranks do not fit the model.
    """
    torch.manual_seed(config.seed)
    dense = build(str(config.model), data.channels, data.image_size, data.classes)
    tucker = copy.deepcopy(dense)
    size = parameter_count(dense)
    order = Order(len(data.train_labels), int(config.batch_size or 0), config.seed)
    rule = _rule(config, order.steps, size)
    ranks = rule if config.tensorise else config.plan.for_model(layer_shapes(dense))
    with _blaming_the_budget(config):
        factorize(tucker, ranks, tensorise=config.tensorise, verbose=False)
    if not tucker_layers(tucker):
        raise OptionError("--ranks", "ranks at which no layer shrinks", "smaller ones")
    networks = []
    for name, model in (("dense", dense), ("tucker", tucker)):
        if name == "dense" and not config.baseline:
            continue
        model.to(config.device)
        optimizer: Optimizer | TDLRT = _optimizer(model, config)
        if name == "tucker":
            with _blaming_the_budget(config):
                every, power = config.basis_every, config.rate_power
                optimizer = TDLRT(optimizer, model, rule, basis_every=every, rate_power=power)
        own = copy.deepcopy(order)
        networks.append(Network(name, size, model, optimizer, _random_state(), order=own))
    return networks


@contextmanager
def _blaming_the_budget(config: Config) -> Iterator[None]:
    try:
        yield
    except RankError as error:
        if config.budget is None:
            raise
        raise OptionError("--budget", config.budget, str(error)) from error


def layer_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return names and weight shapes of the layers that can take the Tucker format."""
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return {
        name: tuple(module.weight.shape)
        for name, module in model.named_modules()
        if isinstance(module, kinds)
    }


def tucker_layers(model: nn.Module) -> dict[str, TuckerModule]:
    """Return the layers in Tucker format, by name."""
    modules = model.named_modules()
    return {name: module for name, module in modules if isinstance(module, TuckerModule)}


def parameter_count(model: nn.Module) -> int:
    """Return the number of parameters; bases count, though no gradient descends on them."""
    return sum(parameter.numel() for parameter in model.parameters())


def _optimizer(model: nn.Module, config: Config) -> Optimizer:
    """Return the optimizer that ``--optimizer`` names."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    lr, decay = float(config.lr or 0.0), float(config.weight_decay or 0.0)
    if config.optimizer == "adam":
        return Adam(parameters, lr=lr, weight_decay=decay)
    if config.optimizer == "adamw":
        return AdamW(parameters, lr=lr, weight_decay=decay)
    momentum = 0.9 if config.optimizer == "momentum" else 0.0
    return SGD(parameters, lr=lr, weight_decay=decay, momentum=momentum)


def _rule(config: Config, steps: int, size: int) -> RankRule | None:
    """Return the rule that ranks follow, or None for the ranks that the layers start with.

    A budget is reached after half of all steps, so that the other half trains what is left. Layers
    that are taken as tensors begin at a tenth of the parameters, or at the budget if it is more.
    """
    if config.budget is not None:
        amount = parse_budget(config.budget)
        half = max(1, int(config.epochs or 1) * steps // 2)
        tenth = 0.1 if isinstance(amount, float) else size // 10
        start = max(amount, tenth) if config.tensorise else None
        return Budget(
            parameters=amount, floor=config.floor, cap=config.cap, steps=half, start=start
        )
    if config.tolerance is None:
        return None
    return Tolerance(config.tolerance, config.floor, config.cap)


def _random_state() -> dict[str, Any]:
    """Return the state of torch's global generators; a GPU's only if it is in use."""
    gpu = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
    return {"cpu": torch.get_rng_state(), "cuda": gpu}


def _set_random_state(state: dict[str, Any]) -> None:
    """Put torch's global generators back."""
    torch.set_rng_state(state["cpu"])
    if state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"])
