"""A run: two networks trained turn by turn, saved so that it can stop at any moment."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from .._checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from .._files import write_atomically
from ._config import Config
from ._data import DataSet, load
from ._errors import DivergedError, OptionError, ResumeError, RunError
from ._fetch import data_folder
from ._loop import evaluate, learning_rate, train_epoch
from ._networks import Network, build_networks

__all__ = ["CHECKPOINT", "CONFIG", "METRICS", "Run", "Watcher", "read_config", "start", "train"]

CHECKPOINT = "checkpoint.safetensors"
CONFIG = "config.json"
METRICS = "metrics.jsonl"


class Watcher(Protocol):
    """Whoever wants to see a run while it goes on."""

    def stepped(self, network: Network) -> None:
        """Take note of a step."""

    def finished_epoch(self, network: Network, record: dict[str, Any]) -> None:
        """Take note of an epoch and its line of metrics."""


@dataclass
class Run:
    """All that a run consists of.

    Parameters
    ----------
    folder : Path
        Where its files go.
    start_ranks : dict
        Ranks of the Tucker network's layers before the first step.
    start_compression : float
        Its compression then.
    metrics : list of dict
        One record per epoch and network, in the order of training.
    """

    # fixed
    folder: Path
    config: Config
    data: DataSet
    start_ranks: dict[str, tuple[int, ...]]
    start_compression: float
    # changes with every step
    networks: Sequence[Network]
    # changes with every epoch
    metrics: list[dict[str, Any]] = field(default_factory=list)

    @property
    def tucker(self) -> Network:
        """The network in Tucker format."""
        return self.networks[-1]

    @property
    def next(self) -> Network | None:
        """The network whose turn it is, or None when all epochs are done."""
        network = min(self.networks, key=lambda candidate: candidate.epoch)
        return network if network.epoch < int(self.config.epochs or 0) else None


def start(config: Config, folder: Path | None = None, resume: bool = False) -> Run:
    """Load the data, build the networks, and open the run's folder.

    Nothing is written before everything that can be wrong with the settings has been tried.

    Parameters
    ----------
    config : Config
        The settings; those that the run was started with if it is resumed.
    folder : Path, optional
        The run's folder; made here. By default one below ``runs`` that no other run has.
    resume : bool
        Whether to go on from the folder's checkpoint. A run that was killed before its first
        checkpoint begins anew.

    Raises
    ------
    RunError
        If an option, the data or the checkpoint cannot be used.
    """
    _make_reproducible(config)
    data = load(config.data, data_folder(config.data_dir)).to(torch.device(config.device))
    networks = build_networks(config, data)
    tucker = networks[-1]
    if folder is None or not resume:
        folder = _create(folder, config)
    run = Run(folder, config, data, tucker.ranks, tucker.compression, networks)
    if resume:
        _restore(run)
    _write_metrics(run)
    return run


def train(run: Run, watcher: Watcher) -> None:
    """Train to the last epoch, the networks taking turns, epoch by epoch.

    Raises
    ------
    DivergedError
        If a network breaks down. The last checkpoint stays.
    """
    while (network := run.next) is not None:

        def after_step(network: Network = network) -> None:
            watcher.stepped(network)
            every, step = run.config.checkpoint_every, network.tally.step
            if every and step % every == 0 and step < network.order.steps:
                network.keep_randomness()
                _save(run)

        train_epoch(network, run.data, run.config, after_step)
        record = _finish_epoch(run, network)
        run.metrics.append(record)
        _save(run)
        _write_metrics(run)
        watcher.finished_epoch(network, record)


def _finish_epoch(run: Run, network: Network) -> dict[str, Any]:
    """Evaluate, and turn the epoch's tally into a line of metrics."""
    with network.own_randomness():
        test_loss, test_accuracy = evaluate(network.model, run.data)
    if test_loss != test_loss or abs(test_loss) == float("inf"):
        raise DivergedError(
            f"{network.name} network, epoch {network.epoch + 1}: the loss on the test set became "
            f"{test_loss}; try a smaller --lr"
        )
    tally = network.tally
    record = {
        "network": network.name,
        "epoch": network.epoch + 1,
        "loss": tally.loss / tally.seen,
        "train_accuracy": tally.correct / tally.seen,
        "test_loss": test_loss,
        "test_accuracy": test_accuracy,
        "ranks": {name: list(ranks) for name, ranks in network.ranks.items()},
        "parameters": network.parameters,
        "compression": network.compression,
        "lr": learning_rate(run.config, network.epoch),
        "seconds": round(tally.seconds, 3),
    }
    network.epoch += 1
    network.tally = type(tally)()
    return record


def _make_reproducible(config: Config) -> None:
    """Fix what a result depends on besides the seed."""
    torch.set_num_threads(int(config.threads or 1))
    if config.device == "cuda":
        torch.backends.cudnn.benchmark = False
        torch.backends.cudnn.deterministic = True


def _create(folder: Path | None, config: Config) -> Path:
    """Make the run's folder, by default the first that is not there yet, and return it."""
    if folder is not None and (folder / CONFIG).exists():
        raise OptionError(
            "--out", folder, f"a folder without a run (to go on with that one: --resume {folder})"
        )
    place = folder or Path("runs")
    try:
        place.mkdir(parents=True, exist_ok=True)
        if folder is None:
            place = folder = next(filter(_is_made, _default_folders(config)))
        write_atomically(folder / CONFIG, config.to_json().encode())
    except OSError as error:
        raise RunError(f"--out: cannot write to {place} ({error.strerror})") from error
    return folder


def _default_folders(config: Config) -> Iterator[Path]:
    """Yield the default folder, then it with the numbers of further runs."""
    folder = Path("runs") / f"{config.data}-{config.model}-{config.seed}"
    yield folder
    for number in count(2):
        yield folder.with_name(f"{folder.name}-{number}")


def _is_made(folder: Path) -> bool:
    """Make a folder unless it is there: of runs that start at once, one does."""
    try:
        folder.mkdir()
    except FileExistsError:
        return False
    return True


def read_config(folder: Path) -> Config:
    """Return the settings that a run was started with.

    Raises
    ------
    ResumeError
        If there is no run in the folder.
    """
    path = folder / CONFIG
    try:
        return Config.from_mapping(json.loads(path.read_text()))
    except FileNotFoundError as error:
        raise ResumeError(f"--resume: no run in {folder} (no {CONFIG} there)") from error
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ResumeError(f"--resume: {path} is not a run's settings ({error})") from error


def _save(run: Run) -> None:
    """Write a checkpoint that replaces the last one."""
    networks = {network.name: network.state_dict() for network in run.networks}
    save_checkpoint(run.folder / CHECKPOINT, _models(run), networks=networks, metrics=run.metrics)


def _restore(run: Run) -> None:
    """Go back to the last checkpoint, if there is one yet."""
    path = run.folder / CHECKPOINT
    try:
        extra = load_checkpoint(path, _models(run))
        for network in run.networks:
            network.load_state_dict(extra["networks"][network.name])
        run.metrics = extra["metrics"]
    except FileNotFoundError:
        return
    except CheckpointError as error:
        raise ResumeError(str(error)) from error
    except (KeyError, RuntimeError, ValueError) as error:
        raise ResumeError(f"{path}: does not fit the settings in {CONFIG} ({error})") from error


def _models(run: Run) -> nn.Module:
    """Return the models of all networks as one, for one file and one rename."""
    return nn.ModuleDict({network.name: network.model for network in run.networks})


def _write_metrics(run: Run) -> None:
    """Write the whole metrics file: what a killed run wrote too much goes away by itself."""
    lines = "".join(json.dumps(record) + "\n" for record in run.metrics)
    write_atomically(run.folder / METRICS, lines.encode())
