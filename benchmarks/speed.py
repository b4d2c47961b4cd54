"""Time of a training step and of inference, and memory, in Tucker format and dense.

Run from the root of the repository, with the extras ``train`` and ``tltorch`` installed::

    python benchmarks/speed.py

Single layers and whole networks have a tenth of the parameters of the dense ones. Layers are also
compared with plain gradient descent on core and factors, by our layers and by those of
tensorly-torch; inference by a convolution also where images are stored channels last, in and out.
Everything that is compared is timed in turns in one process, and there is one process for each
number of threads. The gradient of the output is a fixed random tensor: that of, say, a sum of
squares would lie in the span of the output's basis, and new directions would be nothing but
rounding. The table goes to ``benchmarks/results/speed.csv``; rows of other cases stay there. About
an hour on two cores.
"""

import os
import platform
import shlex
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from copy import deepcopy
from dataclasses import dataclass
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import tensorly
import torch
import typer
from measuring import Timed, Times, interleaved, peak_bytes, shares
from networks import NETWORKS, at_compression, sgd
from tables import read, write
from torch import Tensor, nn

import geotucker as gt
from geotucker_torch import TDLRT, factorize, optimize_for_inference

RANKS = gt.Fixed(0.1)
KEPT = 0.1  # of a network's parameters
NEVER = sys.maxsize  # bases move in the first step, which is not timed, and not again
DEFAULT = {"basis_every": 2}  # what it is after the first 1000 steps
RESULTS = Path(__file__).parent / "results" / "speed.csv"
VERSIONS = ("geotucker", "torch", "tensorly", "tensorly-torch")
FIELDS = ["case", "input", "ranks", "threads", "phase", "method", "parameters", "wall_ms", "cpu_ms",
          "wall_ratio", "cpu_ratio", "linear_algebra", "moving_bases", "peak_mib", "repeats",
          *VERSIONS, "python", "machine", "command"]  # fmt: skip
Row = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """What is timed, in full size and in the small one of ``--quick``.

    Parameters
    ----------
    build : callable
        From the size to the dense model.
    shape : callable
        From the size to the shape of the input.
    sizes : pair
        The full one and the small one.
    """

    build: Callable[[Any], nn.Module]
    shape: Callable[[Any], tuple[int, ...]]
    sizes: tuple[Any, Any]

    def draw(self, quick: bool) -> tuple[nn.Module, Tensor]:
        """Return model and input, the same ones each time."""
        torch.manual_seed(0)
        size = self.sizes[quick]
        return self.build(size), torch.randn(self.shape(size))


def _conv(channels: int) -> Case:
    return Case(
        lambda size: nn.Sequential(nn.Conv2d(size[0], size[0], 3, padding=1)),
        lambda size: (size[1], size[0], size[2], size[2]),
        ((channels, 32, 16), (channels // 8, 2, 8)),
    )


def _linear(features: int) -> Case:
    return Case(
        lambda size: nn.Sequential(nn.Linear(size[0], size[0])),
        lambda size: (size[1], size[0]),
        ((features, 8192), (features // 16, 64)),
    )


def _network(name: str) -> Case:
    return Case(
        lambda size: NETWORKS[name](size[0]),
        lambda size: (size[1], 3, 32, 32),
        ((1.0, 128), (0.25, 2)),
    )


LAYERS = {
    **{f"conv{channels}": _conv(channels) for channels in (128, 256, 512)},
    **{f"linear{features}": _linear(features) for features in (1024, 4096)},
}
CASES = {**LAYERS, **{name: _network(name) for name in NETWORKS}}
SLOW = {"linear4096", *NETWORKS}  # get a third of the turns


# One step of training


class _Input(torch.autograd.Function):
    """What comes from a layer below: its gradient is computed, and taken without a copy."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, below: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None]:
        return None, None


class Training:
    """One step of a model's training, with an output gradient that is always the same."""

    def __init__(self, model: Any, x: Tensor, optimizer: Any, closure: bool = False) -> None:
        self.model, self.optimizer, self.closure = model.train(), optimizer, closure
        self.x, self.below = x.detach(), torch.ones((), requires_grad=x.requires_grad)
        with torch.no_grad():
            output = deepcopy(model)(x)
        generator = torch.Generator().manual_seed(1)
        # Small, so that nothing runs away, however many steps are taken.
        self.gradient = 1e-4 * torch.randn(output.shape, generator=generator)

    def evaluate(self) -> None:
        """Run forward and backward."""
        self.optimizer.zero_grad()
        x = _Input.apply(self.x, self.below) if self.below.requires_grad else self.x
        self.model(x).backward(self.gradient)

    def step(self) -> None:
        """Take a step; what is given a closure evaluates it itself."""
        if self.closure:
            self.optimizer.step(self.evaluate)
        else:
            self.evaluate()
            self.optimizer.step()

    @property
    def timed(self) -> Timed:
        """A whole period of the optimizer, if it ever ends."""
        period = self.optimizer.basis_every if isinstance(self.optimizer, TDLRT) else 1
        assert period is not None, "a benchmark states how often bases move"
        return Timed(self.step, 1 if period == NEVER else period)


def layer_trainings(dense: Any, x: Tensor) -> dict[str, Training]:
    """Return the methods for a sequence of one layer; ratios refer to the first, the dense one."""
    methods = {"dense": Training(dense, x, sgd(dense))}
    plain = _tucker(dense)
    for factor in plain[0].factors:
        factor.requires_grad_(True)
    methods["descent on core and factors"] = Training(plain, x, sgd(plain))
    for implementation in ("factorized", "reconstructed"):
        other = nn.Sequential(tltorch_layer(dense[0], implementation))
        methods[f"tltorch {implementation}"] = Training(other, x, sgd(other))
    settings: dict[str, dict[str, Any]] = {
        "TDLRT, whole gradient, one pass": {"integrator": "tdlrt", "basis_every": 1},
        "TDLRT, whole gradient, two passes": {"one_pass": False, "basis_every": 1},
        "TDLRT, bases in every step": {"basis_every": 1},
        "TDLRT, default": DEFAULT,
        "TDLRT between bases": {"basis_every": NEVER},
    }
    for name, options in settings.items():
        model = _tucker(dense)
        optimizer = TDLRT(sgd(model), model, **options)
        methods[name] = Training(model, x, optimizer, closure="one_pass" in options)
    return methods


def _tucker(dense: nn.Module) -> Any:
    """Return the model in Tucker format, with random weights: no large ones are decomposed."""
    model = factorize(deepcopy(dense).to("meta"), RANKS, verbose=False).to_empty(device="cpu")
    for layer in model:
        layer.reset_parameters()
    return model


def tltorch_layer(dense: nn.Linear | nn.Conv2d, implementation: str) -> nn.Module:
    """Return tensorly-torch's layer of the same shape and ranks, with random weights."""
    import tltorch  # switches TensorLy's backend, so not at the top

    ranks = RANKS.for_shape(tuple(dense.weight.shape))
    options: dict[str, Any] = {
        "factorization": "tucker",
        "implementation": implementation,
        "rank": ranks,
    }
    if isinstance(dense, nn.Linear):
        layer = tltorch.FactorizedLinear((dense.in_features,), (dense.out_features,), **options)
    else:
        layer = tltorch.FactorizedConv.from_conv(dense, decompose_weights=False, **options)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(0, 0.1)
    return layer


# The rows of a case


def layer_rows(case: Case, quick: bool, repeats: int) -> list[Row]:
    """Time training and inference of one layer, as within a network: its input has a gradient."""
    dense, x = case.draw(quick)
    ranks = RANKS.for_shape(tuple(next(dense.parameters()).shape))
    trainings = layer_trainings(dense, x.clone().requires_grad_())
    rows = training_rows(trainings, repeats)
    between = next(row for row in rows if row["method"] == "TDLRT between bases")
    assert between["linear_algebra"] == 0, "a step between changes of bases decomposes something"
    models = {
        "dense": deepcopy(dense).eval(),
        "Tucker layer": trainings["TDLRT, default"].model.eval(),
        "tltorch factorized": trainings["tltorch factorized"].model.eval(),
    }
    rows += inference_rows(models, x, repeats)
    if x.dim() == 4:  # as a convolution before it hands images on, once one stores them so
        last = {"memory_format": torch.channels_last}
        models = {name: deepcopy(model).to(**last) for name, model in models.items()}
        rows += inference_rows(models, x.to(**last), repeats, "inference, channels last")
    return [{"ranks": ranks, **row} for row in rows]


def network_rows(case: Case, quick: bool, repeats: int) -> list[Row]:
    """Time training and inference of a whole network, and find the peaks of memory."""
    dense, x = case.draw(quick)
    model, fraction = at_compression(deepcopy(dense), KEPT)
    trainings = {
        "dense": Training(dense, x, sgd(dense)),
        "TDLRT, default": Training(model, x, TDLRT(sgd(model), model, **DEFAULT)),
    }
    rows = training_rows(trainings, repeats)
    for row, training in zip(rows, trainings.values(), strict=True):
        tensors = (training.x, training.gradient)
        peak = peak_bytes(training.timed, training.model, training.optimizer, tensors)
        row["peak_mib"] = round(peak / 2**20, 1)
    rows += inference_rows({"dense": dense.eval(), "Tucker layers": model.eval()}, x, repeats)
    return [{"ranks": f"Fixed({fraction:.4f})", **row} for row in rows]


def training_rows(trainings: dict[str, Training], repeats: int) -> list[Row]:
    """Time the steps of all methods, and profile those of ours."""
    times = interleaved({name: t.timed for name, t in trainings.items()}, repeats)
    rows = []
    for name, training in trainings.items():
        row = _row("training", name, training.model, times[name])
        if isinstance(training.optimizer, TDLRT):
            found = shares(training.timed)
            row["linear_algebra"] = round(found.linear_algebra, 4)
            row["moving_bases"] = round(found.moving, 4)
        rows.append(row)
    return rows


@torch.no_grad()
def inference_rows(
    models: dict[str, nn.Module], x: Tensor, repeats: int, phase: str = "inference"
) -> list[Row]:
    """Time the models on `x`, and what is made of the Tucker model for it."""

    def forward(model: nn.Module) -> Timed:
        return Timed(lambda: model(x))

    tucker = next(model for name, model in models.items() if name.startswith("Tucker"))
    optimised = optimize_for_inference(tucker, x, repeats=repeats, verbose=False)
    models = {**models, "optimize_for_inference": optimised}
    times = interleaved({name: forward(model) for name, model in models.items()}, repeats)
    return [_row(phase, name, model, times[name]) for name, model in models.items()]


def _row(phase: str, method: str, model: nn.Module, times: Times) -> Row:
    return {
        "phase": phase,
        "method": method,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "wall_ms": round(1e3 * times.wall, 3),
        "cpu_ms": round(1e3 * times.cpu, 3),
        "wall_ratio": round(times.wall_ratio, 4),
        "cpu_ratio": round(times.cpu_ratio, 4),
    }


def case_rows(name: str, threads: int, quick: bool, repeats: int) -> list[Row]:
    """Measure one case, in a process with that number of threads."""
    torch.set_num_threads(threads)
    case = CASES[name]
    with tensorly.backend_context("pytorch"):  # for tensorly-torch; our layers ask for nothing
        rows = (layer_rows if name in LAYERS else network_rows)(case, quick, repeats)
    shape = case.shape(case.sizes[quick])
    common = {"case": name, "input": shape, "threads": threads, "repeats": repeats}
    return [{**common, **row} for row in rows]


# The table


def _origin() -> Row:
    """Return what belongs to every row: who measured, and with what."""
    versions = {name: version(name) for name in VERSIONS}
    command = shlex.join(["python", "benchmarks/speed.py", *sys.argv[1:]])
    machine = f"{platform.machine()}, {os.cpu_count()} cores"
    return {**versions, "python": platform.python_version(), "machine": machine, "command": command}


def merge(rows: list[Row], path: Path) -> None:
    """Write the rows in place of older ones of the same cases and threads."""
    new = {(row["case"], str(row["threads"])) for row in rows}
    old: list[Row] = [{**r} for r in read(path) if (r["case"], r["threads"]) not in new]
    order = list(CASES)
    merged = sorted([*old, *rows], key=lambda row: (order.index(row["case"]), int(row["threads"])))
    write(path, [{name: row.get(name, "") for name in FIELDS} for row in merged])


def show(rows: list[Row]) -> None:
    """Print the rows of one case."""
    first = rows[0]
    typer.echo(f"\n{first['case']}, input {first['input']}, {first['threads']} threads")
    for row in rows:
        notes = [
            f"linear algebra {row['linear_algebra']:.1%}" if "linear_algebra" in row else "",
            f"moving bases {row['moving_bases']:.1%}" if "moving_bases" in row else "",
            f"peak {row['peak_mib']} MiB" if "peak_mib" in row else "",
        ]
        typer.echo(
            f"  {row['phase']:<24} {row['method']:<30} {row['wall_ms']:>10.2f} ms "
            f"{row['wall_ratio']:>7.3f} (cpu {row['cpu_ratio']:.3f})  "
            + ", ".join(filter(None, notes))
        )


def main(
    cases: Annotated[str, typer.Option(help="Which, by commas.")] = ",".join(CASES),
    threads: Annotated[str, typer.Option(help="Numbers of threads, by commas.")] = "1,2",
    repeats: Annotated[int, typer.Option(help="Turns; slow cases take a third of them.")] = 9,
    quick: Annotated[bool, typer.Option("--quick", help="Small sizes and two turns.")] = False,
    out: Annotated[Path | None, typer.Option(help="The table; --quick needs it.")] = None,
) -> None:
    """Measure everything and write the table."""
    names = cases.split(",")
    if unknown := [name for name in names if name not in CASES]:
        raise typer.BadParameter(f"expected some of {', '.join(CASES)}, got {unknown[0]!r}")
    path = out or (None if quick else RESULTS)
    for number in map(int, threads.split(",")):
        os.environ["OMP_NUM_THREADS"] = str(number)
        with ProcessPoolExecutor(1, get_context("spawn")) as process:
            for name in names:
                turns = 2 if quick else max(1, repeats // 3) if name in SLOW else repeats
                rows = process.submit(case_rows, name, number, quick, turns).result()
                show(rows)
                if path is not None:
                    merge([{**row, **_origin()} for row in rows], path)


if __name__ == "__main__":
    typer.run(main)
