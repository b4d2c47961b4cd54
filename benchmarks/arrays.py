"""The core over the array libraries and devices that are at hand, side by side.

Run from the root of the repository, with the extras ``all`` (and ``cupy``, where there is a GPU)
installed::

    OMP_NUM_THREADS=1 python benchmarks/arrays.py

Indian Pines (145 x 145 x 200, real, shipped with TensorLy) is decomposed, approximated by a step of
an integrator and by conjugate gradients, and completed from 5 % of its entries; a synthetic tensor
of a billion entries is completed from 200,000. Each case runs in NumPy, PyTorch, JAX and CuPy, on
the processor and on CUDA devices, in turns in one process; the table has medians, ratios to NumPy
(of the time on the clock, which counts on a GPU, and of the processor's, which other work on the
machine hardly touches), and by how much the norm of the result's core differs from NumPy's. JAX
compiles in a first call that does not count; CUDA devices are waited for. What is not at hand is
said, also in the table: ``benchmarks/results/arrays.csv``. A few minutes on one core.

What came out, on a busy machine without a GPU (one thread; only ratios of processor time mean
something): PyTorch takes 0.4 of NumPy's time for decompositions in double precision, about the same
for least squares, and 1.4 to 2.1 times as much for completion; JAX, which starts every operation by
itself here, 2.4 to 3.4 times as much for completion.
"""

from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
import typer
from measuring import Timed, interleaved
from tables import write
from tensorly import datasets

import geotucker as gt
from geotucker_cupy import DeviceError, require_device

RESULTS = Path(__file__).parent / "results" / "arrays.csv"
RANKS = (10, 10, 5)

Put = Callable[[np.ndarray], Any]


class Library(NamedTuple):
    """An array library on a device."""

    name: str
    device: str
    put: Put
    wait: Callable[[gt.TuckerPoint], object]  # until the device has made it


class Missing(NamedTuple):
    """A library or device that is not at hand, and why."""

    name: str
    device: str
    reason: str


def _numpy() -> Iterator[Library]:
    yield Library("NumPy", "cpu", np.asarray, lambda point: None)


def _pytorch() -> Iterator[Library | Missing]:
    yield Library("PyTorch", "cpu", torch.from_numpy, lambda point: None)
    if not torch.cuda.is_available():
        yield Missing("PyTorch", "cuda", f"torch {torch.__version__} finds no CUDA device")
        return
    yield Library(
        "PyTorch",
        torch.cuda.get_device_name(),
        lambda array: torch.from_numpy(array).cuda(),
        lambda point: torch.cuda.synchronize(),
    )


def _jax() -> Iterator[Library | Missing]:
    try:
        jax = import_module("jax")
    except ImportError as error:
        yield Missing("JAX", "cpu", str(error))
        return
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_default_matmul_precision", "highest")  # as the others compute
    devices = {device.platform: device for device in reversed(jax.local_devices())}
    devices["cpu"] = jax.local_devices(backend="cpu")[0]
    for platform, device in sorted(devices.items()):
        kind = "cpu" if platform == "cpu" else device.device_kind
        yield Library(
            "JAX", kind, lambda array, to=device: jax.device_put(array, to), jax.block_until_ready
        )
    if len(devices) == 1:
        yield Missing("JAX", "cuda", f"jax {jax.__version__} finds no CUDA device")


def _cupy() -> Iterator[Library | Missing]:
    try:
        device = require_device()
    except DeviceError as error:
        yield Missing("CuPy", "cuda", str(error))
        return
    cupy = import_module("cupy")
    name = cupy.cuda.runtime.getDeviceProperties(device.id)["name"].decode()
    yield Library("CuPy", name, cupy.asarray, lambda point: device.synchronize())


# NumPy first: times are compared to its.
LIBRARIES: dict[str, Callable[[], Iterator[Library | Missing]]] = {
    "NumPy": _numpy,
    "PyTorch": _pytorch,
    "JAX": _jax,
    "CuPy": _cupy,
}


class Data(NamedTuple):
    """What the cases work on, on the host."""

    tensor: np.ndarray
    seen: tuple[np.ndarray, ...]  # entries of it that are known
    truth: gt.TuckerPoint  # of a tensor too large to be formed
    known: tuple[np.ndarray, ...]


def data(quick: bool) -> Data:
    """Return the real tensor, or a corner of it, scaled to entries of about one, and the rest."""
    rng = np.random.default_rng(0)
    tensor = np.array(datasets.load_indian_pines().tensor, float)
    tensor = tensor[:20, :20, :20] if quick else tensor
    tensor /= np.sqrt(np.mean(tensor**2))
    seen = np.nonzero(rng.random(tensor.shape) < 0.05)
    shape, entries = ((50,) * 3, 2_000) if quick else ((1000,) * 3, 200_000)
    truth = gt.testing.random_point(shape, (3, 3, 3))
    return Data(tensor, seen, truth, tuple(rng.integers(0, n, entries) for n in shape))


def cases(found: Data, dtype: str, put: Put) -> dict[str, Callable[[], gt.TuckerPoint]]:
    """Return what is measured, with all data in place."""
    ours = put(found.tensor.astype(dtype))
    fit = gt.least_squares(ours)
    start = fit.start(RANKS)
    completion = gt.completion(
        found.seen, put(found.tensor[found.seen].astype(dtype)), found.tensor.shape
    )
    begun = completion.start(RANKS)
    exact = gt.Entries(found.known, found.truth.shape, found.truth.core).predict(found.truth)
    exact = exact / np.sqrt(np.mean(exact**2))
    large = gt.completion(found.known, put(exact.astype(dtype)), found.truth.shape)
    far = large.start(3)
    integrator = gt.TDLRT(0.1)
    rule = gt.Fixed(RANKS)

    def gradient() -> gt.TuckerPoint:
        return gt.TuckerPoint(*gt.project(begun, completion(begun)[1]))

    def solved(objective: gt.Fit, point: gt.TuckerPoint, steps: int) -> gt.TuckerPoint:
        return gt.minimize(objective, point, integrator=gt.ConjugateGradient(), steps=steps).point

    return {
        "HOSVD": lambda: gt.hosvd(ours, RANKS),
        "ST-HOSVD": lambda: gt.st_hosvd(ours, RANKS),
        "least squares, a step of TDLRT": lambda: (
            integrator.step(start, fit, integrator.init(start), rule).point
        ),
        "least squares, 5 steps of conjugate gradients": lambda: solved(fit, start, 5),
        "completion, gradient": gradient,
        "completion, 10 steps of conjugate gradients": lambda: solved(completion, begun, 10),
        "large completion, 10 steps of conjugate gradients": lambda: solved(large, far, 10),
    }


def size(point: gt.TuckerPoint) -> float:
    """Return the norm of the core."""
    return float((point.core * point.core).sum()) ** 0.5


def measured(
    found: Data, dtype: str, here: Sequence[Library], repeats: int
) -> Iterator[dict[str, Any]]:
    """Yield a row for each case and library."""
    made = {(one.name, one.device): cases(found, dtype, one.put) for one in here}
    waits = {(one.name, one.device): one.wait for one in here}
    for case in next(iter(made.values())):

        def timed(key: tuple[str, str], case: str = case) -> Timed:
            return Timed(lambda: waits[key](made[key][case]()))

        times = interleaved({f"{key}": timed(key) for key in made}, repeats)
        sizes = {key: size(made[key][case]()) for key in made}
        first = next(iter(sizes.values()))
        for key in made:
            time = times[f"{key}"]
            yield {
                "case": case,
                "dtype": dtype,
                "library": key[0],
                "device": key[1],
                "wall_ms": f"{1e3 * time.wall:.2f}",
                "cpu_ms": f"{1e3 * time.cpu:.2f}",
                "wall_ratio": f"{time.wall_ratio:.3f}",
                "cpu_ratio": f"{time.cpu_ratio:.3f}",
                "difference": f"{abs(sizes[key] - first) / first:.1e}",
            }


def main(
    dtypes: Annotated[str, typer.Option(help="By commas.")] = "float32,float64",
    only: Annotated[str, typer.Option(help="Libraries beside NumPy, by commas; else all.")] = "",
    repeats: Annotated[int, typer.Option(help="Turns that are timed.")] = 3,
    quick: Annotated[bool, typer.Option(help="On small tensors.")] = False,
    out: Annotated[Path, typer.Option(help="The table.")] = RESULTS,
) -> None:
    """Measure, write the table and print it."""
    names = ["NumPy", *only.split(",")] if only else list(LIBRARIES)
    if unknown := set(names) - set(LIBRARIES):
        raise typer.BadParameter(f"expected some of {', '.join(LIBRARIES)}, got {unknown}")
    every = [one for name in names for one in LIBRARIES[name]()]
    here = [one for one in every if isinstance(one, Library)]
    found = data(quick)
    rows: list[dict[str, Any]] = []
    for dtype in dtypes.split(","):
        for row in measured(found, dtype, here, repeats):
            rows.append(row | {"threads": torch.get_num_threads(), "repeats": repeats})
            typer.echo("  ".join(map(str, row.values())))
    for one in every:
        if isinstance(one, Missing):
            rows.append({"library": one.name, "device": one.device, "not_measured": one.reason})
            typer.echo(f"not measured: {one.name} on {one.device}: {one.reason}", err=True)
    write(out, rows)


if __name__ == "__main__":
    typer.run(main)
