"""The theorems of the method, measured on training runs.

Run from the root of the repository, with the extra ``train`` installed::

    python benchmarks/theorems.py

LeNet-5 in its original size (61,706 parameters), all layers in Tucker format, on MNIST. For the
first three tables the loss is that over a fixed set of images, so that its gradient is exact:

``theorems_descent.csv``
    Theorem 3.1, step by step: what the loss is bound to fall by, and what it fell by.
``theorems_convergence.csv``
    Theorem 3.2: the norm of the projected gradient under steps that fall as Robbins and Monro ask.
``theorems_approximation.csv``
    Theorem 3.3: the distance to the gradient flow of the dense network.
``theorems_spectra.csv``
    The singular values of every layer over an epoch, of the dense network and with growing ranks.

They are written to ``benchmarks/results``, and ``python benchmarks/figures.py`` draws them. MNIST
is downloaded, or read from the folder that ``GEOTUCKER_DATA_DIR`` names. One thread; about 15
minutes.
"""

import copy
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeAlias

import numpy as np
import torch
import typer
from networks import convert
from robustness import lenet
from tables import write
from theorem_figures import FEW, power
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import vector_to_parameters

import geotucker as gt
from geotucker_torch import TDLRT, TuckerModule, densify, spectra
from geotucker_torch._train._data import DataSet, load
from geotucker_torch._train._fetch import data_folder

Row: TypeAlias = dict[str, Any]
RESULTS = Path(__file__).parent / "results"
RANK = 8  # of every mode that has as many dimensions, where ranks are fixed
FULL = 10_000
TIME = 0.5  # of the flows


class Scale(NamedTuple):
    """How much is measured."""

    exact: int = 256  # images of the loss that descends, in double precision
    smooth: int = 128  # images of the loss whose flow is followed, in double precision
    sampled: int = 1000  # images of one in single precision
    warm: tuple[int, int] = (30, 150)  # steps before descent and convergence, approximation
    descent: int = 120
    probe: int = 30  # steps between estimates of the smoothness
    full: int = 400
    sampling: int = 3000
    times: int = 40  # at which the projected gradient is measured
    flow: int = 16  # steps of the Runge-Kutta method
    steps: tuple[int, ...] = (8, 16, 32, 64)  # of TDLRT
    ranks: tuple[int, ...] = (8, 16, 32, 64)
    taus: tuple[float, ...] = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2)
    epoch: int = 469
    every: int = 50


TOY = Scale(8, 8, 8, (1, 1), 2, 1, 2, 4, 2, 2, (2, 4), (2, 3), (1e-3, 1e-1), 3, 2)


class Problem(NamedTuple):
    """The mean loss over fixed images."""

    images: Tensor
    labels: Tensor

    @classmethod
    def first(cls, data: DataSet, count: int, dtype: torch.dtype) -> "Problem":
        """Return that over the first images of the training set."""
        images = data.normalise(data.train_images[:count])
        return cls(images.to(dtype), data.train_labels[:count])

    def loss(self, model: nn.Module) -> Tensor:
        """Return the loss of a model."""
        return F.cross_entropy(model(self.images), self.labels)

    def part(self, index: Tensor) -> "Problem":
        """Return the problem over some of the images."""
        return Problem(self.images[index], self.labels[index])


def batches(data: DataSet, size: int) -> Iterator[Problem]:
    """Yield mini-batches of the training set for ever, in the same order each time."""
    generator = torch.Generator().manual_seed(0)
    while True:
        for index in torch.randperm(len(data.train_labels), generator=generator).split(size):
            images = data.normalise(data.train_images[index])
            yield Problem(images, data.train_labels[index])


def warmed(data: DataSet, steps: int, smooth: bool = False) -> nn.Sequential:
    """Return the dense network after a few steps: before them its gradients are nearly zero.

    A smooth one has hyperbolic tangents and means in place of ReLU and maxima.
    """
    torch.manual_seed(0)
    model = lenet()
    if smooth:
        others = {nn.ReLU: nn.Tanh(), nn.MaxPool2d: nn.AvgPool2d(2)}
        model = nn.Sequential(*(others.get(type(layer), layer) for layer in model))
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    for batch in itertools.islice(batches(data, 64), steps):
        optimizer.zero_grad()
        batch.loss(model).backward()
        optimizer.step()
    return model


def tucker(dense: nn.Sequential, rank: int, dtype: torch.dtype) -> nn.Sequential:
    """Return a copy of a network in Tucker format."""
    return convert(copy.deepcopy(dense).to(dtype), rank)


def layers_of(model: nn.Module) -> list[TuckerModule]:
    return [module for module in model.modules() if isinstance(module, TuckerModule)]


def optimizer_of(
    model: nn.Module, rate: float, ranks: Any = None, integrator: str = "tdlrt"
) -> TDLRT:
    """Return explicit Euler steps of every layer and bias; by default all of Algorithm 1."""
    sgd = torch.optim.SGD(model.parameters(), rate)
    return TDLRT(sgd, model, ranks, integrator=integrator, basis_every=1)


def gradient_norm(model: nn.Module) -> float:
    """Return the norm of all gradients; of extended layers, of the gradient seen through bases."""
    grads = (p.grad for p in model.parameters() if p.grad is not None)
    return math.sqrt(sum(grad.square().sum().item() for grad in grads))


def joined(tensors: Iterable[Tensor]) -> Tensor:
    """Return all entries as one vector."""
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


# Theorem 3.1


def descent(data: DataSet, scale: Scale) -> Iterator[Row]:
    """Yield a row for each step of each run."""
    problem = Problem.first(data, scale.exact, torch.float64)
    dense = warmed(data, scale.warm[0])
    rules = {
        "fixed": None,
        "tolerance 0.003": gt.Tolerance(0.003),
        "tolerance 0.03": gt.Tolerance(0.03),
        "descent-safe": gt.DescentSafe(),
    }
    starts = [*((rule, 1.0) for rule in rules), ("fixed", 1e-8)]
    for rate, (rule, smallest) in itertools.product((0.01, 0.05), starts):
        model = tucker(dense, RANK, torch.float64)
        if smallest < 1.0:
            spread(model, smallest)
        run = {
            "learning_rate": rate,
            "ranks": rule,
            "start": "ordinary" if smallest == 1.0 else "ill-conditioned",
        }
        for row in descend(model, problem, rate, rules[rule], scale):
            yield run | row


@torch.no_grad()
def spread(model: nn.Module, smallest: float) -> None:
    """Give the first unfolding of every core singular values from 1 to `smallest` of the largest.

    Its norm stays, so that the network is no weaker.
    """
    for layer in layers_of(model):
        u, s, v = torch.linalg.svd(layer.core.flatten(1), full_matrices=False)
        decay = torch.logspace(0, math.log10(smallest), len(s), dtype=s.dtype)
        core = (u * (s.norm() / decay.norm() * decay)) @ v
        layer.core.copy_(core.reshape(layer.core.shape))


def descend(
    model: nn.Sequential, problem: Problem, rate: float, rule: Any, scale: Scale
) -> list[Row]:
    """Return what is known of each step; see `guaranteed`."""
    optimizer, layers, rows = optimizer_of(model, rate, rule), layers_of(model), list[Row]()
    found = 0.0
    for step in range(scale.descent + 1):
        condition, size = conditions(layers), sum(layer.point.size for layer in layers)
        probed = step % scale.probe == 0 or step == scale.descent
        dense = densify(copy.deepcopy(model)) if probed else model
        optimizer.zero_grad()
        loss = problem.loss(model)
        loss.backward()
        wide = [layer.point for layer in layers]  # the same weights in extended bases
        if probed:
            found = smoothness(dense, problem, wide)
            for row in rows[-scale.probe :]:
                row["smoothness"] = max(row["smoothness"], found)  # of both ends
        if rows:
            rows[-1]["decrease"] = rows[-1]["loss"] - loss.item()
        if step == scale.descent:
            break
        norm = gradient_norm(model)
        gradients = [
            gt.to_dense((core, point.factors))
            for point, core in zip(wide, _grads(layers), strict=True)
        ]
        pairs = zip(wide, gradients, strict=True)
        stepped = [gt.to_dense(point) - rate * gradient for point, gradient in pairs]
        optimizer.step()
        pairs = zip(layers, stepped, strict=True)
        errors = [gt.to_dense(layer.point) - before for layer, before in pairs]
        cut = math.hypot(*(float(error.norm()) for error in errors))
        row = {
            "step": step,
            "loss": loss.item(),
            "gradient": norm,
            "truncation": cut,
            "price": sum(
                float((error * gradient).sum())
                for error, gradient in zip(errors, gradients, strict=True)
            ),
            "condition": condition,
            "parameters": size,
            "guaranteed": guaranteed(rate, norm, cut, 1 / rate),
            "smoothness": found,
        }
        rows.append(row)
    return rows


def _grads(layers: Iterable[TuckerModule]) -> Iterator[Tensor]:
    for layer in layers:
        assert layer.core.grad is not None
        yield layer.core.grad


def conditions(layers: Iterable[TuckerModule]) -> float:
    """Return the smallest singular value of an unfolding, relative to its largest."""
    spectra = [gt.spectrum(layer.point).values for layer in layers]
    return min(float(values[-1] / values[0]) for modes in spectra for values in modes)


def guaranteed(rate: float, gradient: float, truncation: float, smoothness: float) -> float:
    """Return what the loss falls by at least, if its gradient has the Lipschitz constant.

    The step is ``S = E - lr G``, with G the gradient seen through the extended bases, in which the
    truncation error E lies too. So ``L(W + S) <= L(W) + <G, S> + smoothness / 2 ||S||^2``, which
    is linear in ``<G, E>``, and that is at most ``||G|| ||E||``. At ``lr * smoothness = 1``
    nothing is left but ``lr / 2 ||G||^2 - ||E||^2 / (2 lr)``.
    """
    return (
        rate * (1 - rate * smoothness / 2) * gradient**2
        - abs(1 - rate * smoothness) * gradient * truncation
        - smoothness / 2 * truncation**2
    )


def smoothness(
    dense: nn.Module, problem: Problem, wide: Sequence[gt.TuckerPoint], iterations: int = 8
) -> float:
    """Estimate the norm of the Hessian seen through extended bases, by power iteration.

    Only that matters, as steps and truncation errors lie in these bases. Single precision will do.
    """
    dense, problem = dense.float(), problem._replace(images=problem.images.float())
    parameters = list(dense.parameters())
    factors = iter([[(u @ u.T).float() for u in point.factors] for point in wide])
    bases = [next(factors) if p.dim() > 1 else None for p in parameters]
    gradient = torch.autograd.grad(problem.loss(dense), parameters, create_graph=True)
    generator = torch.Generator().manual_seed(0)
    vectors = [torch.randn(p.shape, generator=generator) for p in parameters]
    norm = 1.0
    for _ in range(iterations + 1):
        seen = [
            v if own is None else gt.to_dense((v, own))
            for v, own in zip(vectors, bases, strict=True)
        ]
        norm = float(joined(seen).norm())
        scaled = [v / norm for v in seen]
        vectors = list(torch.autograd.grad(gradient, parameters, scaled, retain_graph=True))
    return norm


def tell_descent(rows: list[Row]) -> None:
    """Say in how many steps the inequality held, run by run."""
    for run, group in itertools.groupby(
        rows, lambda row: (row["learning_rate"], row["ranks"], row["start"])
    ):
        steps, rate = list(group), run[0]
        held = [row["decrease"] >= row["guaranteed"] for row in steps]
        small = [rate * row["smoothness"] <= 1 for row in steps]
        both = sum(a for a, b in zip(held, small, strict=True) if b)
        told = sum(row["guaranteed"] > 0 for row in steps)
        own = sum(
            row["decrease"]
            >= guaranteed(rate, row["gradient"], row["truncation"], row["smoothness"])
            for row in steps
        )
        ratio = np.median([row["decrease"] / (rate * row["gradient"] ** 2) for row in steps])
        typer.echo(
            f"{run}: lr * smoothness <= 1 in {sum(small)} of {len(steps)} steps, {both} of these "
            f"and {sum(held)} of all fell as guaranteed, by a positive number in {told}; with the "
            f"smoothness itself {own}; decrease / (lr ||G||^2) {ratio:.2f} in the median; least "
            f"singular value {min(row['condition'] for row in steps):.0e}; largest lr * smoothness "
            f"{rate * max(row['smoothness'] for row in steps):.2g}; the loss rose in "
            f"{sum(row['decrease'] < 0 for row in steps)}"
        )


# Theorem 3.2


def convergence(data: DataSet, scale: Scale) -> Iterator[Row]:
    """Yield the norm of the projected gradient over time."""
    problem = Problem.first(data, scale.sampled, torch.float32)
    dense = warmed(data, scale.warm[0])
    for batch, steps, falls in (
        (scale.sampled, scale.full, True),
        (50, scale.sampling, True),
        (50, scale.sampling, False),
    ):
        model = tucker(dense, RANK, torch.float32)
        optimizer = optimizer_of(model, 0.1, integrator="tangent")
        # The sum of the rates diverges, that of their squares does not.
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda k, f=falls, n=steps: (1 + 10 * k / n) ** -0.75 if f else 1.0
        )
        generator, order = torch.Generator().manual_seed(0), list[Tensor]()
        for step in range(steps + 1):
            if step % max(steps // scale.times, 1) == 0:
                optimizer.zero_grad()
                loss = problem.loss(model)
                loss.backward()
                yield {
                    "batch": batch,
                    "rates": "falling" if falls else "constant",
                    "step": step,
                    "learning_rate": schedule.get_last_lr()[0],
                    "loss": loss.item(),
                    "gradient": gradient_norm(model),
                }
            order = order or list(torch.randperm(scale.sampled, generator=generator).split(batch))
            optimizer.zero_grad()
            problem.part(order.pop()).loss(model).backward()
            optimizer.step()
            schedule.step()


def tell_convergence(rows: list[Row]) -> None:
    """Say how far the projected gradient fell."""
    for run, group in itertools.groupby(rows, lambda row: (row["batch"], row["rates"])):
        norms = [row["gradient"] for row in group]
        typer.echo(f"{run}: from {max(norms):.2g} at its largest to {np.mean(norms[-4:]):.2g}")


# Theorem 3.3


def approximation(data: DataSet, scale: Scale) -> Iterator[Row]:
    """Yield a row for each trajectory of low rank, with its distance to the flow.

    The network is smooth, as the theorem asks: at kinks no method keeps its order.
    """
    problem = Problem.first(data, scale.smooth, torch.float64)
    dense = warmed(data, scale.warm[1], smooth=True)
    least, *others = scale.ranks
    start = tucker(dense, least, torch.float64)
    exact = flow(start, problem, scale.flow)
    moved = float((exact - flat(start)).norm())
    error = float((flow(start, problem, scale.flow // 2) - exact).norm())
    yield {
        "term": "flow", "start": least, "lambda": 2 * TIME / scale.flow,
        "distance": error, "moved": moved,
    }  # fmt: skip
    # Ranks grow to what the flow needs at once: neither eps nor tau are left.
    ends: dict[int, Tensor] = {}
    for steps in scale.steps:
        end, _ = follow(start, problem, steps, gt.Tolerance(1e-10))
        ends[steps] = end
        yield {
            "term": "lambda", "start": least, "lambda": TIME / steps, "tau": 1e-10,
            "distance": float((end - exact).norm()), "moved": moved,
        }  # fmt: skip
    # Both trajectories have the same step size, and differ by truncation alone.
    for steps, tau in itertools.product(scale.steps[1:-1] or scale.steps, scale.taus):
        end, _ = follow(start, problem, steps, gt.Tolerance(tau))
        yield {
            "term": "tau", "start": least, "lambda": TIME / steps, "tau": tau,
            "distance": float((end - exact).norm()),
            "apart": float((end - ends[steps]).norm()), "moved": moved,
        }  # fmt: skip
    # Ranks stay: eps is what the gradient has outside of the tangent space.
    for rank in (least, *others):
        start = tucker(dense, rank, torch.float64)
        exact = exact if rank == least else flow(start, problem, scale.flow)
        for steps in scale.steps:
            end, eps = follow(start, problem, steps, None, steps == scale.steps[-1])
            yield {
                "term": "eps", "start": rank, "lambda": TIME / steps, "eps": eps or "",
                "distance": float((end - exact).norm()),
                "moved": float((exact - flat(start)).norm()),
            }  # fmt: skip


def flat(model: nn.Module) -> Tensor:
    """Return all weights in full and all biases, as one vector."""
    return joined(densify(copy.deepcopy(model)).parameters()).detach()


def flow(model: nn.Module, problem: Problem, steps: int) -> Tensor:
    """Return the dense network at the end of its gradient flow, by Runge and Kutta's method."""
    dense = densify(copy.deepcopy(model))

    def velocity(vector: Tensor) -> Tensor:
        vector_to_parameters(vector, dense.parameters())
        gradient = torch.autograd.grad(problem.loss(dense), list(dense.parameters()))
        return -joined(gradient)

    vector, h = flat(model), TIME / steps
    for _ in range(steps):
        a = velocity(vector)
        b = velocity(vector + h / 2 * a)
        c = velocity(vector + h / 2 * b)
        d = velocity(vector + h * c)
        vector = vector + h / 6 * (a + 2 * b + 2 * c + d)
    return vector


def follow(
    start: nn.Module, problem: Problem, steps: int, rule: Any, watched: bool = False
) -> tuple[Tensor, float]:
    """Return the network after the same time with TDLRT, and the largest `outside` if `watched`."""
    model, largest = copy.deepcopy(start), 0.0
    optimizer = optimizer_of(model, TIME / steps, rule)
    for step in range(steps):
        if watched and step % 4 == 0:
            largest = max(largest, outside(model, problem))
        optimizer.zero_grad()
        problem.loss(model).backward()
        optimizer.step()
    return flat(model), largest


def outside(model: nn.Module, problem: Problem) -> float:
    """Return the norm of what the gradient has outside of the tangent space."""
    dense = densify(copy.deepcopy(model))
    problem.loss(dense).backward()
    squares = 0.0
    for name, layer in model.named_modules():
        if isinstance(layer, TuckerModule):
            gradient = dense.get_submodule(name).weight.grad
            tangent = gt.project(layer.point, gradient)
            squares += float(gradient.square().sum()) - gt.inner_tangent(tangent, tangent)
    return math.sqrt(max(squares, 0.0))


def tell_approximation(rows: list[Row]) -> None:
    """Say by which powers the terms grow."""

    def told(text: str, runs: list[Row], x: str, y: str) -> None:
        got = power(np.array([row[x] for row in runs]), np.array([row[y] for row in runs]))
        typer.echo(f"{y} ~ {x}^{got:.2f} {text}")

    of = {term: [row for row in rows if row["term"] == term] for term in ("lambda", "tau", "eps")}
    told("without truncation", of["lambda"], "lambda", "distance")
    told("at the least lambda", [row for row in of["eps"] if row["eps"]], "eps", "distance")
    for rate, group in itertools.groupby(of["tau"], lambda row: row["lambda"]):
        runs = list(group)
        told(f"at lambda {rate:.3g}, at first", runs[:FEW], "tau", "apart")
        worst = max(row["apart"] / (row["tau"] / rate) for row in runs)
        typer.echo(f"and at most {worst:.3g} tau / lambda")


# Singular values over time


def singular_values(data: DataSet, scale: Scale) -> Iterator[Row]:
    """Yield the largest singular values of every unfolding, dense and with growing ranks."""
    for network in ("dense", "growing"):
        torch.manual_seed(0)
        model = lenet()
        if network == "growing":
            convert(model, 2)
        optimizer: torch.optim.Optimizer
        optimizer = torch.optim.SGD(model.parameters(), 0.03, momentum=0.9)
        if network == "growing":
            optimizer = TDLRT(optimizer, model, gt.Tolerance(0.1, spare=4))
        for step, batch in zip(range(scale.epoch), batches(data, 128), strict=False):
            if step % scale.every == 0 or step == scale.epoch - 1:
                yield from _spectra(model, network, step)
            optimizer.zero_grad()
            batch.loss(model).backward()
            optimizer.step()


def _spectra(model: nn.Sequential, network: str, step: int) -> Iterator[Row]:
    """Yield what a model's layers have; a dense one's are those of its full decomposition."""
    shown = tucker(model, FULL, torch.float32) if network == "dense" else model
    for weight in spectra(shown).tucker:
        # Both unfoldings of a matrix have the same.
        modes = [0] if len(weight.shape) == 2 else range(len(weight.shape))
        for mode in modes:
            for number, value in enumerate(weight.values[mode][:24]):
                yield {
                    "network": network, "step": step, "layer": weight.name,
                    "mode": weight.modes[mode], "number": number + 1, "value": value,
                }  # fmt: skip


def tell_spectra(rows: list[Row]) -> None:
    """Say how much the largest singular values of the first linear layer are of all."""
    for run, group in itertools.groupby(rows, lambda row: (row["network"], row["step"])):
        values = [row["value"] for row in group if row["layer"] == "7"]
        typer.echo(f"{run}, first linear layer: {', '.join(f'{v:.2f}' for v in values[:10])}")


class Part(NamedTuple):
    """A table: what yields its rows, and what sums them up."""

    measure: Callable[[DataSet, Scale], Iterator[Row]]
    tell: Callable[[list[Row]], None]


PARTS = {
    "descent": Part(descent, tell_descent),
    "convergence": Part(convergence, tell_convergence),
    "approximation": Part(approximation, tell_approximation),
    "spectra": Part(singular_values, tell_spectra),
}


def measure(name: str, data: DataSet, out: Path, scale: Scale) -> None:
    """Measure one part, write its table and sum it up."""
    rows, began, shown = list[Row](), time.perf_counter(), 0.0
    for row in PARTS[name].measure(data, scale):
        rows.append(row)
        seconds = time.perf_counter() - began
        if seconds > shown + 30:
            typer.echo(f"{name}, {seconds:.0f} s: {', '.join(map(str, list(row.values())[:4]))}")
            shown = seconds
    typer.echo(f"{name}: {time.perf_counter() - began:.0f} s")
    PARTS[name].tell(rows)
    short = [{k: f"{v:.6g}" if isinstance(v, float) else v for k, v in r.items()} for r in rows]
    write(out / f"theorems_{name}.csv", short)


def main(
    only: Annotated[str, typer.Option(help="Parts, with commas between.")] = ",".join(PARTS),
    out: Annotated[Path, typer.Option(help="Folder of the tables.")] = RESULTS,
) -> None:
    """Measure, write the tables and say what came out."""
    torch.set_num_threads(1)
    data = load("mnist", data_folder(None))
    for name in only.split(","):
        measure(name, data, out, Scale())


if __name__ == "__main__":
    typer.run(main)
