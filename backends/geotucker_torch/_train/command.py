"""The command line of ``geotucker train``."""

from pathlib import Path
from typing import Annotated

import typer

from ._config import DEFAULT_LR, OPTIMIZERS, RECIPES, SCHEDULES
from ._data import DATA_SETS
from ._models import MODELS

__all__ = ["train"]


def _names(names: object) -> str:
    return ", ".join(names)  # type: ignore[call-overload, no-any-return]


_BY_DATA = "depends on --data"
_TUCKER = "Tucker format"
_RECIPE = "Recipe, the same for the dense baseline"
_RUN = "The run"


def train(
    context: typer.Context,
    data: Annotated[str, typer.Option(help=f"Data set: {_names(DATA_SETS)}.")] = "digits",
    data_dir: Annotated[
        str | None,
        typer.Option(
            help="Folder with the data's files; otherwise GEOTUCKER_DATA_DIR, otherwise they are "
            "downloaded once and checked.",
            show_default=False,
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help=f"Network: {_names(MODELS)}. "
            f"[default: {'; '.join(f'{r.model} for {d}' for d, r in RECIPES.items())}]",
            show_default=False,
        ),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            help="Parameters of the whole network: a share of the dense one (3% or 0.03) or a "
            "number (20000). The ranks of all layers are chosen for it, and it is reached after "
            "half of the training.",
            show_default=False,
        ),
    ] = None,
    tolerance: Annotated[
        float | None,
        typer.Option(
            help="Relative error that a truncation may make; the ranks adapt to it. "
            "[default: depends on --data, unless --ranks or --budget is given]",
            show_default=False,
        ),
    ] = None,
    ranks: Annotated[
        list[str] | None,
        typer.Option(
            help="Fixed ranks, or with --budget or --tolerance the ranks to start from: 10 (every "
            "mode), 0.1 (fraction of each dense layer), 8,8,5,5 (each mode), or by layer: "
            "'conv2=8,8,5,5;fc1=9' (layers not named stay dense; fc*=0.1 matches names; "
            "fc2=dense leaves one out). May be repeated.",
            show_default=False,
        ),
    ] = None,
    floor: Annotated[
        int, typer.Option(help="With --budget or --tolerance: no rank goes below.")
    ] = 1,
    cap: Annotated[
        int | None,
        typer.Option(help="With --budget or --tolerance: no rank goes above.", show_default=False),
    ] = None,
    basis_every: Annotated[
        int | None,
        typer.Option(
            help="Move the bases once in so many steps; only cores in between. "
            "[default: 1 for 1000 steps, then 2]",
            show_default=False,
        ),
    ] = None,
    rate_power: Annotated[
        float | None,
        typer.Option(
            help="Steps of a core grow as its weight shrinks, by this power of the ratio: for "
            "SGD, 0.25 where a few percent are to be left. [default: 0 for SGD, 0.5 for others]",
            show_default=False,
        ),
    ] = None,
    tensorise: Annotated[
        int | None,
        typer.Option(
            help="With --budget: take linear layers as tensors, their numbers of inputs and of "
            "outputs split into so many factors. For a few percent: 2.",
            show_default=False,
        ),
    ] = None,
    optimizer: Annotated[
        str | None,
        typer.Option(
            help=f"{_names(OPTIMIZERS)}; steps the cores and all other parameters. "
            f"[default: {_BY_DATA}]",
            show_default=False,
        ),
    ] = None,
    lr: Annotated[
        float | None,
        typer.Option(
            help="Learning rate. "
            f"[default: {'; '.join(f'{v:g} for {k}' for k, v in DEFAULT_LR.items())}]",
            show_default=False,
        ),
    ] = None,
    weight_decay: Annotated[
        float | None, typer.Option(help=f"[default: {_BY_DATA}]", show_default=False)
    ] = None,
    schedule: Annotated[
        str, typer.Option(help=f"Learning rate over time: {_names(SCHEDULES)}.")
    ] = "cosine",
    batch_size: Annotated[
        int | None, typer.Option(help=f"[default: {_BY_DATA}]", show_default=False)
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(help=f"[default: {_BY_DATA}]", show_default=False)
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the weights and of the images' order.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    threads: Annotated[
        int | None,
        typer.Option(
            help="CPU threads. [default: 1 for digits, else torch's choice]", show_default=False
        ),
    ] = None,
    baseline: Annotated[
        bool, typer.Option(help="Train the dense network too, by the same recipe.")
    ] = True,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for the results. [default: runs/DATA-MODEL-SEED]", show_default=False
        ),
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(
            help="Folder (or checkpoint) of a run to go on with; all other options are taken "
            "from it.",
            show_default=False,
        ),
    ] = None,
    checkpoint_every: Annotated[
        int, typer.Option(help="Save every so many steps too, not only after each epoch.")
    ] = 0,
    quiet: Annotated[bool, typer.Option("--quiet", help="Show nothing but errors.")] = False,
) -> None:
    """Train a network in Tucker format, its ranks adapting, beside its dense baseline.

    Without options: scikit-learn's digits, in less than a minute. Each run has a folder with
    the weights (safetensors), the metrics (JSON lines), a picture, a page on the ranks, and a
    checkpoint: a run that was killed goes on with --resume FOLDER and ends bit by bit as if it
    had not been.
    """
    from ._main import main  # here: the help page needs neither matplotlib nor rich

    options = dict(context.params)
    sources = {name: context.get_parameter_source(name) for name in options}
    given = {name for name, source in sources.items() if source and source.name == "COMMANDLINE"}
    raise typer.Exit(main(options, given))
