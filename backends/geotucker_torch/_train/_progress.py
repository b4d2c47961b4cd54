"""What a run shows while it goes on: two bars in a terminal, and a line per epoch anywhere."""

import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.text import Text

from ._networks import Network, layer_shapes
from ._run import Run

__all__ = ["Display", "ranks_text"]

_REFRESH = 0.1  # seconds between updates of the bars; faster is not seen
_MANY = 6  # layers; more are summarised


class Display:
    """A watcher of a run; use it as a context.

    Parameters
    ----------
    run : Run
        The run to watch.
    console : rich.console.Console
        Where to print. Bars need a terminal; epochs are printed as plain lines elsewhere.
    quiet : bool
        Whether to show nothing at all.
    """

    def __init__(self, run: Run, console: Console, quiet: bool = False) -> None:
        self._run = run
        self._console = console
        self._quiet = quiet
        self._records: dict[str, dict[str, Any]] = {}
        self._updated = 0.0
        self._bars = Progress(
            TextColumn("{task.description:<6}"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[state]}"),
            expand=True,
        )
        self._tasks: dict[str, TaskID] = {}
        self._ranks = Text(no_wrap=False)
        self._live = Live(Group(self._bars, self._ranks), console=console, refresh_per_second=10)

    def __enter__(self) -> "Display":
        """Print the header and what earlier parts of the run have done; start the bars."""
        if self._quiet:
            return self
        self._console.print(Text(_header(self._run)), soft_wrap=not self._console.is_terminal)
        for note in _notes(self._run):
            self._console.print(Text(note), soft_wrap=not self._console.is_terminal)
        self._line(_columns(self._run))
        self._line(_start_line(self._run))
        for record in self._run.metrics:
            self._print_epoch(record)
        if self._console.is_terminal:
            for network in self._run.networks:
                total = network.order.steps * int(self._run.config.epochs or 0)
                self._tasks[network.name] = self._bars.add_task(
                    label(network.name), total=total, state="", completed=_steps_done(network)
                )
                self._update(network)
            self._live.start(refresh=True)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Leave the bars as they stand."""
        if self._tasks:
            self._live.stop()

    def stepped(self, network: Network) -> None:
        """Move the network's bar, unless that was done a moment ago."""
        if self._tasks and time.monotonic() - self._updated > _REFRESH:
            self._update(network)

    def finished_epoch(self, network: Network, record: dict[str, Any]) -> None:
        """Print the epoch's line when the last network has finished it."""
        if self._quiet:
            return
        self._print_epoch(record)
        if self._tasks:
            self._update(network)

    def _update(self, network: Network) -> None:
        self._updated = time.monotonic()
        tally = network.tally
        last = self._records.get(network.name, {})
        epochs = int(self._run.config.epochs or 0)
        parts = [f"epoch {min(network.epoch + 1, epochs)}/{epochs}"]
        if tally.seen:
            parts.append(f"loss {tally.loss / tally.seen:.4f}")
        elif last:
            parts.append(f"loss {last['loss']:.4f}")
        parts.append(f"test {100 * last['test_accuracy']:5.2f}%" if last else "test   ... ")
        parts.append(f"saved {_saved(network.compression)}" if network.ranks else " " * 11)
        done = _steps_done(network)
        self._bars.update(self._tasks[network.name], completed=done, state="  ".join(parts))
        if network.ranks:
            self._ranks.plain = f"ranks  {ranks_text(network.ranks)}"

    def _print_epoch(self, record: dict[str, Any]) -> None:
        self._records[record["network"]] = record
        if record["network"] == self._run.tucker.name:
            pair = [self._records[n.name] for n in self._run.networks if n.name in self._records]
            self._line(_epoch_line(pair))

    def _line(self, text: str) -> None:
        """Print one line: cut at a terminal's edge, whole in a file."""
        on_screen = self._console.is_terminal
        self._console.print(
            Text(text, no_wrap=True, overflow="ellipsis"),
            soft_wrap=not on_screen,
            no_wrap=on_screen,
            overflow="ellipsis" if on_screen else "ignore",
        )


def label(name: str) -> str:
    """Return a network's name as it is shown."""
    return {"tucker": "Tucker"}.get(name, name)


def ranks_text(ranks: Mapping[str, Sequence[int]]) -> str:
    """Return ranks in the form that ``--ranks`` takes, or their range if there are many.

    Examples
    --------
    >>> ranks_text({"conv1": (8, 1, 3, 3), "fc1": (9, 9)})
    'conv1=8,1,3,3  fc1=9,9'
    """
    if len(ranks) > _MANY:
        values = sorted(rank for layer in ranks.values() for rank in layer)
        middle = values[len(values) // 2]
        return f"{len(ranks)} layers, ranks {values[0]} to {values[-1]}, median {middle}"
    return "  ".join(f"{name}={','.join(map(str, layer))}" for name, layer in ranks.items())


def _steps_done(network: Network) -> int:
    return network.epoch * network.order.steps + network.tally.step


def _header(run: Run) -> str:
    """Return a line that says what is trained, on what, how."""
    config, data = run.config, run.data
    rule = "fixed ranks" if config.tolerance is None else f"tolerance {config.tolerance:g}"
    rule = rule if config.budget is None else f"budget {config.budget}"
    threads = f", {config.threads} thread{'s' if config.threads != 1 else ''}"
    return (
        f"{config.model} on {data.name} ({len(data.train_labels):,} + {len(data.test_labels):,} "
        f"images), {rule}, {config.optimizer}, lr {config.lr:g}, batch {config.batch_size}, "
        f"seed {config.seed}, {config.device}{threads if config.device == 'cpu' else ''}"
    )


def _notes(run: Run) -> list[str]:
    """Say which layers stay dense though they were to be factorised."""
    plan, dense = run.config.plan, layer_shapes(run.tucker.model)
    names = [name for name in dense if plan.for_layer(name) is not None]
    if not names:
        return []
    return [f"{', '.join(names)} would not shrink at the ranks to start from: left dense"]


def _columns(run: Run) -> str:
    """Return the heading of the epochs' lines."""
    names = "".join(f"  {label(network.name) + ' loss':>11}    test" for network in run.networks)
    return f"epoch{names}  saved  ranks"


def _start_line(run: Run) -> str:
    """Return the line of what the Tucker network starts from."""
    cells = "".join(f"{'':21}" for _ in run.networks)
    return f"start{cells}  {_saved(run.start_compression)}  {ranks_text(run.start_ranks)}"


def _saved(fraction: float) -> str:
    return f"{100 * fraction:4.1f}%"


def _epoch_line(records: Sequence[dict[str, Any]]) -> str:
    """Return one line for one epoch of both networks."""
    cells = "".join(f"  {r['loss']:11.4f}  {100 * r['test_accuracy']:5.2f}%" for r in records)
    tucker = records[-1]
    saved = _saved(tucker["compression"])
    return f"{tucker['epoch']:>5}{cells}  {saved}  {ranks_text(tucker['ranks'])}"
