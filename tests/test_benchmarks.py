"""The benchmarks run from end to end, on little."""

import csv
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="the benchmarks are not here")


@pytest.fixture(autouse=True)
def import_as_scripts_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """Find what the scripts share in their own folder."""
    monkeypatch.syspath_prepend(str(FOLDER))


def test_speed_of_a_layer_and_of_a_network(tmp_path: Path) -> None:
    pytest.importorskip("tltorch", reason="tensorly-torch is not installed")
    path = tmp_path / "new" / "speed.csv"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    options = ["--quick", "--threads", "1", "--cases", "conv128,vgg16", "--out", str(path)]
    command = [sys.executable, str(FOLDER / "speed.py"), *options]
    subprocess.run(command, check=True, env=environment, timeout=200, stdout=subprocess.DEVNULL)
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert [row["case"] for row in rows] == ["conv128"] * 17 + ["vgg16"] * 5
    for row in rows:
        assert float(row["wall_ms"]) > 0
        assert float(row["cpu_ms"]) > 0
        assert (row["method"] != "dense") or float(row["wall_ratio"]) == 1
        assert row["torch"] == torch.__version__
        assert "--quick" in row["command"]
        ours = row["method"].startswith("TDLRT")
        assert bool(row["moving_bases"]) == bool(row["linear_algebra"]) == ours
        assert bool(row["peak_mib"]) == (row["case"] == "vgg16" and row["phase"] == "training")
    sizes = {row["method"]: int(row["parameters"]) for row in rows if row["case"] == "vgg16"}
    phases = {row["phase"] for row in rows if row["case"] == "conv128"}
    assert phases == {"training", "inference", "inference, channels last"}
    assert 0.095 < sizes["Tucker layers"] / sizes["dense"] <= 0.1


def test_rows_of_other_cases_stay_in_the_table(tmp_path: Path) -> None:
    from speed import merge

    def row(case: str, threads: int, method: str) -> dict[str, object]:
        return {"case": case, "threads": threads, "method": method}

    def table() -> list[tuple[str, str, str]]:
        with path.open() as file:
            return [(r["case"], r["threads"], r["method"]) for r in csv.DictReader(file)]

    path = tmp_path / "speed.csv"
    merge([row("vgg16", 1, "a"), row("vgg16", 2, "b")], path)
    merge([row("conv128", 2, "c")], path)
    merge([row("vgg16", 1, "d"), row("vgg16", 1, "e")], path)
    assert table() == [
        ("conv128", "2", "c"),
        ("vgg16", "1", "d"),
        ("vgg16", "1", "e"),
        ("vgg16", "2", "b"),
    ]


def test_completion_of_a_small_tensor(tmp_path: Path) -> None:
    import completion

    path = tmp_path / "new" / "completion.csv"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    options = {"only": "IL2", "fractions": "0.1", "masks": 2, "seconds": 0.1, "jobs": 1}
    options |= {"methods": "geotucker;TensorLy CP", "out": path}  # these are always there
    command = [sys.executable, str(FOLDER / "completion.py")]
    command += [f"--{name}={value}" for name, value in options.items()]

    def table() -> list[dict[str, str]]:
        with path.open() as file:
            return list(csv.DictReader(file))

    subprocess.run(command, check=True, env=environment, timeout=200, stdout=subprocess.DEVNULL)
    rows = table()
    runs = [(row["mask"], row["method"]) for row in rows]
    assert sorted(runs) == [(m, name) for m in "01" for name in ("TensorLy CP", "geotucker")]
    completion.main(**options)  # nothing is left to do
    assert table() == rows
    for row in rows:
        assert row["entries"] == "480"
        assert 0.2 < float(row["error"]) < 1.0
        assert row["failures"] == ""
        assert float(row["process_s"]) > 0


def test_arrays_side_by_side(tmp_path: Path) -> None:
    import arrays

    arrays.main("float64", only="PyTorch,CuPy", repeats=1, quick=True, out=tmp_path / "arrays.csv")
    with (tmp_path / "arrays.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert "CuPy" in {row["library"] for row in rows}  # measured, or said to be missing
    measured = [row for row in rows if not row["not_measured"]]
    assert [(row["library"], row["device"]) for row in measured[:2]] == [
        ("NumPy", "cpu"),
        ("PyTorch", "cpu"),
    ]
    assert len({row["case"] for row in measured}) == 7
    for row in measured:
        assert float(row["wall_ms"]) > 0
        assert float(row["difference"]) < 1e-8
        assert row["library"] != "NumPy" or float(row["wall_ratio"]) == 1


def test_peak_of_memory() -> None:
    import measuring

    model = nn.Linear(256, 1024)  # about 1 MiB
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    x = torch.ones(1, 256)

    def step() -> None:
        optimizer.zero_grad()
        model(x).sum().backward()
        optimizer.step()

    def wasteful() -> None:
        step()
        torch.empty(2**20, dtype=torch.uint8)

    kept = 4 * 3 * (256 + 1) * 1024  # parameters, gradients, momentum
    peak = measuring.peak_bytes(measuring.Timed(step), model, optimizer)
    assert kept <= peak < kept + 50_000
    peak = measuring.peak_bytes(measuring.Timed(wasteful, 2), model, optimizer)
    assert kept + 2**20 <= peak < kept + 2**20 + 50_000


def test_times_are_per_call_and_relative_to_the_first() -> None:
    import measuring

    def work(size: int) -> Callable[[], int]:
        return lambda: sum(range(size))

    times = measuring.interleaved(
        {"a": measuring.Timed(work(100_000)), "b": measuring.Timed(work(400_000), 3)}, 5
    )
    assert times["a"].wall_ratio == times["a"].cpu_ratio == 1
    assert 2 < times["b"].cpu_ratio < 8


@pytest.mark.skipif(not Path("/proc/net/dev").exists(), reason="the bytes are Linux's")
@pytest.mark.xdist_group("processes")  # the loopback's bytes are those of all who use it
def test_exchange_of_processes(tmp_path: Path) -> None:
    path = tmp_path / "distributed.csv"
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    options = ["--steps", "2", "--channels", "32", "--processes", "2", "--out", str(path)]
    command = [sys.executable, "-W", "ignore", str(FOLDER / "distributed.py"), *options]
    subprocess.run(command, check=True, env=environment, timeout=200, stdout=subprocess.DEVNULL)
    with path.open() as file:
        rows = list(csv.DictReader(file))
    measured = [row for row in rows if row["kind"] == "measured"]
    assert [int(row["processes"]) for row in measured] == [1] * 5 + [2] * 5
    assert all(float(row["model_ms"]) == float(row["step_ms"]) for row in measured[:5])
    for row in measured[5:]:  # all that is beside the gradients is small
        sent, gradients = int(row["wire_bytes"]), int(row["wire_model_bytes"])
        assert gradients < sent < 1.1 * gradients + 20_000
        assert 0 < float(row["fastest_ms"]) <= float(row["step_ms"])
        ratio = float(row["step_ms"]) / float(row["model_ms"])
        assert float(row["ratio"]) == pytest.approx(ratio, abs=2e-3)
        assert float(row["exchange_model_ms"]) > 0
    beyond = [row for row in rows if row["kind"] == "model"]
    assert [int(row["processes"]) for row in beyond] == [4] * 5 + [16] * 5 + [64] * 5
    for dense, *tucker in (beyond[:5], beyond[5:10], beyond[10:]):
        sizes = [int(row["wire_model_bytes"]) / int(dense["wire_model_bytes"]) for row in tucker]
        assert sizes == pytest.approx([0.25, 0.1, 0.05, 0.02], rel=0.05)


def test_model_of_an_exchange() -> None:
    import distributed

    network = distributed.Network(latency=1e-3, bandwidth=1e6)
    # Each of 3 processes sends and receives a third of 3 kB four times.
    assert distributed.exchange(3, 1, 3000, network) == pytest.approx(4 * (1e-3 + 1e-3))
    assert distributed.exchange(3, 5, 3000, network) == pytest.approx(4 * (5e-3 + 1e-3))
    assert distributed.exchange(1, 5, 3000, network) == 0
    for cores, crowd in ((1, 3), (2, 1.5), (4, 1)):
        step = distributed.predicted(0.1, 3, 1, 3000, network, cores)
        assert step == pytest.approx(0.1 * crowd + 8e-3)
    small, large = (
        distributed.exchange(4, 1, size, network) for size in (distributed.SMALL, distributed.LARGE)
    )
    assert distributed.fitted(4, small, large) == pytest.approx(network)
    assert distributed.exchange(1, 1, 9, distributed.fitted(1, small, large)) == 0


def test_what_the_scripts_beside_others_share(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(FOLDER / "peers"))
    import checks

    basis = torch.linalg.qr(torch.randn(6, 3)).Q
    assert float(checks.departure(basis)) < 1e-5
    assert float(checks.departure(basis, 2 * basis)) == 3  # the worst of them
    assert checks.attempt(lambda: 1) == 1
    assert checks.attempt(lambda: int("a\nb")).startswith("ValueError: invalid literal")
    x = torch.randn(64, 4)

    def optimize(model: nn.Module, rate: float) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), rate)

    monkeypatch.setattr(checks, "RATES", (0.5, 1000.0))  # the larger diverges, and spoils nothing
    assert float(checks.best(lambda: nn.Linear(4, 2), optimize, x, x[:, :2])) < 1e-10
    checks.tell("bases", "1e-07")
    assert capsys.readouterr().out == f"{'bases':<28} | 1e-07\n"


def test_operations_of_a_step() -> None:
    from networks import NETWORKS, at_compression, sgd
    from operations import count

    from geotucker_torch import TDLRT

    dense = NETWORKS["vgg16"]()
    operations, decompositions, waits = count(dense, sgd(dense))
    assert operations > 100 and decompositions == waits == 0
    small, _ = at_compression(dense, 0.1)
    moving = count(small, TDLRT(sgd(small), small, basis_every=1))
    assert operations < moving[0] < 3000
    assert 0 < moving[1] < 100 and 2 <= moving[2] <= 4
    between = count(small, TDLRT(sgd(small), small, basis_every=10**9, late_check=True))
    assert operations < between[0] < moving[0] / 2 and between[1:] == (0, 0)


def test_differential_equations(tmp_path: Path) -> None:
    import pde

    pde.main(tmp_path, quick=True)
    with (tmp_path / "pde.csv").open() as file:
        rows = list(csv.DictReader(file))
    slopes = {(row["problem"], row["order"]): float(row["slope"]) for row in rows if row["slope"]}
    assert slopes["heat", "1"] == pytest.approx(1, abs=0.1)
    assert slopes["heat", "2"] == pytest.approx(2, abs=0.1)
    assert slopes["schroedinger", "2"] == pytest.approx(2, abs=0.1)
    for row in rows:
        if row["tolerance"]:
            assert float(row["relative_error"]) <= 2 * float(row["tolerance"])
    with (tmp_path / "pde_ranks.csv").open() as file:
        assert {row["problem"] for row in csv.DictReader(file)} == {"heat", "schroedinger"}


def test_a_large_tensor(tmp_path: Path) -> None:
    script, path = FOLDER / "large_tensor.py", tmp_path / "large.csv"
    options = ["--rows", "32", "--memory", "40M", "--folder", str(tmp_path), "--out", str(path)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, str(script), *options]
    subprocess.run(command, check=True, env=environment, timeout=200, stdout=subprocess.DEVNULL)
    with path.open() as file:
        (row,) = csv.DictReader(file)
    assert row["ranks"] == "12x10x8"
    assert float(row["distance_from_truth"]) < 1e-3
    assert list(tmp_path.iterdir()) == [path]
