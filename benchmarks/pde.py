"""Partial differential equations in three dimensions, integrated in Tucker format.

Run from the root of the repository, with the extra ``command`` installed::

    python benchmarks/pde.py

Heat with an oscillating source (finite differences, 32 points an axis) and the Schroedinger
equation with the Henon-Heiles potential (12 Hermite functions an axis, real and imaginary part as a
fourth mode), against exact solutions of the dense systems by eigenvectors. Measured are the order
of convergence, with ranks by a tolerance and with fixed ranks beyond those that the solution needs,
whose singular values are tiny; and steps, ranks and errors at given tolerances. The tables are
``benchmarks/results/pde.csv`` and, the ranks over time, ``pde_ranks.csv``. A few minutes.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import typer
from tables import write

import geotucker as gt

RESULTS = Path(__file__).parent / "results"


class Problem(NamedTuple):
    """A differential equation, its start in Tucker format, and the dense solution at the end."""

    name: str
    field: Callable[[float, gt.TuckerPoint], gt.Sum]
    start: gt.TuckerPoint
    end: float
    solution: np.ndarray
    steps: tuple[float, ...]
    excess: int  # a common rank beyond what the solution needs


def apply(point: gt.TuckerPoint, matrices: Mapping[int, np.ndarray]) -> gt.TuckerPoint:
    """Apply matrices to some modes: to the factors, that is."""
    factors = [matrices[i] @ u if i in matrices else u for i, u in enumerate(point.factors)]
    return gt.TuckerPoint(point.core, tuple(factors))


def product(*vectors: np.ndarray) -> gt.TuckerPoint:
    """Return the outer product of vectors."""
    return gt.TuckerPoint(np.ones((1,) * len(vectors)), tuple(v[:, None] for v in vectors))


def heat(points: int = 32) -> Problem:
    """Heat in a cube, cold at the boundary: ``u_t = 0.005 Laplace u + cos(2 pi t) s``."""
    x = np.arange(1, points + 1) / (points + 1)
    second = np.diag(np.full(points, -2.0)) + np.eye(points, k=1) + np.eye(points, k=-1)
    laplace = 0.005 * (points + 1) ** 2 * second
    omega, end = 2 * math.pi, 0.5

    def bump(centre: float, width: float) -> np.ndarray:
        return np.exp(-(((x - centre) / width) ** 2))

    start = product(bump(0.3, 0.1), bump(0.3, 0.15), bump(0.6, 0.2))
    source = product(bump(0.7, 0.1), bump(0.5, 0.1), bump(0.4, 0.1))

    def field(t: float, u: gt.TuckerPoint) -> gt.Sum:
        diffusion = [apply(u, {mode: laplace}) for mode in range(3)]
        return gt.Sum([*diffusion, gt.scale(source, math.cos(omega * t))])

    # In the eigenvectors every entry is a scalar equation, a' = rate a + cos(omega t) b.
    values, vectors = np.linalg.eigh(laplace)
    rate = values[:, None, None] + values[:, None] + values
    turned = np.ascontiguousarray(vectors.T)
    a, b = (gt.to_dense(apply(v, dict.fromkeys(range(3), turned))) for v in (start, source))
    grown = np.exp(rate * end)
    forced = omega * math.sin(omega * end) - rate * (math.cos(omega * end) - grown)
    forced /= rate**2 + omega**2
    solution = gt.to_dense((grown * a + forced * b, [vectors] * 3))
    return Problem("heat", field, start, end, solution, (1 / 64, 1 / 128, 1 / 256), 8)


def schroedinger(functions: int = 12, coupling: float = 0.1) -> Problem:
    """Henon-Heiles in three dimensions, a displaced Gaussian at the start, in Hermite functions."""
    k = np.arange(functions)
    position = np.diag(np.sqrt(k[1:] / 2), 1) + np.diag(np.sqrt(k[1:] / 2), -1)
    square, cube = position @ position, position @ position @ position
    well = np.diag(k + 0.5)
    # V = sum x_i^2 / 2 + coupling sum (x_i^2 x_{i+1} - x_{i+1}^3 / 3)
    terms = [
        {1: well},
        {2: well - coupling / 3 * cube},
        {3: well - coupling / 3 * cube},
        {1: square, 2: coupling * position},
        {2: square, 3: coupling * position},
    ]
    turn = np.array([[0.0, 1.0], [-1.0, 0.0]])  # multiplication by -i

    def field(t: float, psi: gt.TuckerPoint) -> gt.Sum:
        return gt.Sum([apply(psi, {0: turn, **term}) for term in terms])

    displacement = 0.8
    gaussian = displacement**k / np.sqrt([math.factorial(n) for n in k])
    gaussian /= np.linalg.norm(gaussian)
    start, end = product(np.array([1.0, 0.0]), *[gaussian] * 3), 1.0
    unit = np.eye(functions)
    hamilton = sum(np.kron(np.kron(t.get(1, unit), t.get(2, unit)), t.get(3, unit)) for t in terms)
    values, vectors = np.linalg.eigh(hamilton)
    psi = vectors @ (np.exp(-1j * values * end) * (vectors.T @ gt.to_dense(start)[0].ravel()))
    solution = np.stack([psi.real, psi.imag]).reshape(2, *[functions] * 3)
    return Problem("schroedinger", field, start, end, solution, (1 / 64, 1 / 128, 1 / 256), 8)


def measure(problem: Problem, **settings: Any) -> tuple[dict[str, Any], gt.Evolution]:
    """Integrate, and return what is found of errors, ranks and cost."""
    begin = time.perf_counter()
    result = gt.integrate(problem.field, problem.start, (0.0, problem.end), **settings)
    seconds = time.perf_counter() - begin
    error = np.linalg.norm(gt.to_dense(result.point) - problem.solution)
    spectrum = gt.spectrum(result.point).values
    return {
        "problem": problem.name,
        "order": settings["order"],
        "ranks": _text(settings.get("ranks")),
        "step": settings.get("step", ""),
        "tolerance": settings.get("tolerance", ""),
        "relative_error": f"{error / np.linalg.norm(problem.solution):.3e}",
        "steps": len(result.history),
        "rejected": sum(record.rejected for record in result.history),
        "largest_ranks": "x".join(
            str(max(ranks)) for ranks in zip(*(r.ranks for r in result.history), strict=True)
        ),
        "smallest_singular_value": f"{min(s[-1] / s[0] for s in spectrum):.1e}",
        "largest_defect": f"{max(record.defect for record in result.history):.1e}",
        "seconds": f"{seconds:.1f}",
    }, result


def _text(rule: Any) -> str:
    if rule is None:
        return "by the tolerance"
    return f"tolerance {rule.tau:g}" if isinstance(rule, gt.Tolerance) else f"fixed at {rule.ranks}"


def orders(problem: Problem) -> Iterator[dict[str, Any]]:
    """Yield a row for each order, rule and step; the last of each series has the slope."""
    for order in (1, 2):
        for ranks in (gt.Tolerance(1e-9), gt.Fixed(problem.excess)):
            rows = [
                measure(problem, order=order, ranks=ranks, step=step)[0] for step in problem.steps
            ]
            errors = [float(row["relative_error"]) for row in rows]
            slope = np.polyfit(np.log(problem.steps), np.log(errors), 1)[0]
            yield from rows[:-1]
            yield rows[-1] | {"slope": f"{slope:.2f}"}


def tolerances(
    problem: Problem, values: Sequence[float]
) -> Iterator[tuple[dict[str, Any], gt.Evolution]]:
    """Yield row and evolution at each tolerance."""
    for tolerance in values:
        yield measure(problem, order=2, tolerance=tolerance)


def main(
    out: Annotated[Path, typer.Option(help="Folder of the tables.")] = RESULTS,
    quick: Annotated[bool, typer.Option("--quick", help="Small and coarse.")] = False,
) -> None:
    """Integrate everything and write the tables."""
    problems = [heat(8), schroedinger(4)] if quick else [heat(), schroedinger()]
    rows: list[dict[str, Any]] = []
    ranks: list[dict[str, Any]] = []
    for problem in problems:
        if quick:
            problem = problem._replace(steps=(1 / 24, 1 / 48))
        rows += orders(problem)
        for row, result in tolerances(problem, (1e-2,) if quick else (1e-2, 1e-3, 1e-4, 1e-5)):
            rows.append(row)
            ranks += [
                {
                    "problem": problem.name,
                    "tolerance": row["tolerance"],
                    "time": f"{record.time:.6g}",
                    "step": f"{record.length:.3g}",
                    "ranks": "x".join(map(str, record.ranks)),
                }
                for record in result.history
            ]
    write(out / "pde.csv", rows)
    write(out / "pde_ranks.csv", ranks)
    for row in rows:
        typer.echo("  ".join(f"{key} {value}" for key, value in row.items() if value != ""))


if __name__ == "__main__":
    typer.run(main)
