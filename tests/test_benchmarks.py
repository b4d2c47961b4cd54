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
    assert [row["case"] for row in rows] == ["conv128"] * 13 + ["vgg16"] * 5
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
    assert 0.095 < sizes["Tucker layers"] / sizes["dense"] <= 0.1


def test_rows_of_other_cases_stay_in_the_table(tmp_path: Path) -> None:
    from speed import write

    def row(case: str, threads: int, method: str) -> dict[str, object]:
        return {"case": case, "threads": threads, "method": method}

    def table() -> list[tuple[str, str, str]]:
        with path.open() as file:
            return [(r["case"], r["threads"], r["method"]) for r in csv.DictReader(file)]

    path = tmp_path / "speed.csv"
    write([row("vgg16", 1, "a"), row("vgg16", 2, "b")], path)
    write([row("conv128", 2, "c")], path)
    write([row("vgg16", 1, "d"), row("vgg16", 1, "e")], path)
    assert table() == [
        ("conv128", "2", "c"),
        ("vgg16", "1", "d"),
        ("vgg16", "1", "e"),
        ("vgg16", "2", "b"),
    ]


def test_completion_of_a_small_tensor(tmp_path: Path) -> None:
    path = tmp_path / "new" / "completion.csv"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    options = ["--only", "IL2", "--fractions", "0.1", "--seconds", "0.2", "--out", str(path)]
    options += ["--methods", "geotucker;geotucker, fixed;TensorLy CP"]  # what is always there
    command = [sys.executable, str(FOLDER / "completion.py"), *options]
    subprocess.run(command, check=True, env=environment, timeout=200, stdout=subprocess.DEVNULL)
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert [row["method"] for row in rows] == ["geotucker", "geotucker, fixed", "TensorLy CP"]
    for row in rows:
        assert row["entries"] == "480"
        assert 0.2 < float(row["error"]) < 1.0
        assert row["failures"] == ""
        assert float(row["process_s"]) > 0
        assert "--only IL2" in row["command"]


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
def test_exchange_of_processes(tmp_path: Path) -> None:
    path = tmp_path / "distributed.csv"
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    options = ["--steps", "2", "--channels", "32", "--processes", "1,2", "--out", str(path)]
    command = [sys.executable, "-W", "ignore", str(FOLDER / "distributed.py"), *options]
    subprocess.run(command, check=True, env=environment, timeout=200, stdout=subprocess.DEVNULL)
    with path.open() as file:
        rows = list(csv.DictReader(file))
    measured = [row for row in rows if row["kind"] == "measured"]
    assert [int(row["processes"]) for row in measured] == [1] * 3 + [2] * 3
    for row in measured[3:]:  # all that is beside the gradients is small
        sent, gradients = int(row["wire_bytes"]), int(row["wire_model_bytes"])
        assert gradients < sent < 1.1 * gradients + 20_000
    assert all(float(row["step_ms"]) > 0 for row in rows)
    beyond = [row for row in rows if row["kind"] == "model"]
    assert [int(row["processes"]) for row in beyond] == [4] * 3 + [16] * 3 + [64] * 3
    for dense, *tucker in (beyond[:3], beyond[3:6], beyond[6:]):
        for row in tucker:
            assert int(row["wire_model_bytes"]) < 0.2 * int(dense["wire_model_bytes"])


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


def _published(folder: Path, name: str) -> nn.Module:
    """Write fresh weights in the form of the published ones, and return their network."""
    from networks import _SHA256

    from geotucker_torch._train._models import build

    model = build(name, channels=3, image_size=32, classes=10)
    saved = {f"module.{key}": value for key, value in model.state_dict().items()}
    path = folder / "pretrained-cifar-resnet" / f"{name}-{_SHA256[name][:8]}.th"
    path.parent.mkdir(exist_ok=True)
    torch.save({"state_dict": saved, "best_prec1": 91.0}, path)
    return model


@pytest.mark.parametrize(("name", "parameters"), [("resnet20", 269_722), ("resnet32", 464_154)])
def test_published_weights_are_read(tmp_path: Path, name: str, parameters: int) -> None:
    from networks import pretrained

    written, model = _published(tmp_path, name), pretrained(name, tmp_path)
    assert sum(p.numel() for p in model.parameters()) == parameters
    images = torch.randn(2, 3, 8, 8)
    assert torch.equal(model.eval()(images), written.eval()(images))


@pytest.mark.data
@pytest.mark.parametrize("name", ["resnet20", "resnet32"])
def test_published_weights_know_the_images(name: str) -> None:
    import fine_tuning
    from networks import pretrained

    from geotucker_torch._train._fetch import data_folder

    folder = data_folder(None)
    if folder is None:
        pytest.skip("GEOTUCKER_DATA_DIR names no folder")
    if not (folder / "pretrained-cifar-resnet").is_dir():
        pytest.skip("the published weights are not there")
    data = fine_tuning.images()
    some = slice(0, None, 40)  # sorted by class
    with torch.no_grad():
        guess = pretrained(name, folder).eval()(data.normalise(data.test_images[some])).argmax(1)
    assert (guess == data.test_labels[some]).float().mean() > 0.75  # 0.81 and more of all


def test_fine_tuning_by_all_methods(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from concurrent.futures import ThreadPoolExecutor

    import fine_tuning
    import runs

    from geotucker_torch._train._data import DataSet

    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (52, 3, 8, 8), generator=generator, dtype=torch.uint8)
    labels = torch.arange(52) % 10
    parts = (images[:32], labels[:32], images[32:], labels[32:])
    small = DataSet("noise", *parts, mean=(128.0,) * 3, deviation=(60.0,) * 3, flips=True)
    _published(tmp_path, "resnet20")
    monkeypatch.setenv("GEOTUCKER_DATA_DIR", str(tmp_path))
    monkeypatch.setattr(fine_tuning, "images", lambda: small)
    monkeypatch.setattr(runs, "ProcessPoolExecutor", ThreadPoolExecutor)  # which sees `small`
    path = tmp_path / "fine_tuning.csv"

    def table(**options: object) -> list[dict[str, str]]:
        fine_tuning.main(**{"epochs": 2, "images": 24, "jobs": 1, "out": path, **options})
        return runs.read(path)

    rows = table(budgets="0.1")
    assert {row["method"] for row in rows} == set(fine_tuning.DEFAULT)
    assert {(row["data"], row["images"]) for row in rows} == {("noise", "24")}
    ends = {(row["method"], row["kept"]): row for row in rows}  # of the last epoch
    assert len(ends) == len(fine_tuning.DEFAULT)
    for (method, kept), row in ends.items():
        share = int(row["parameters"]) / 269_722
        assert 0.95 * float(kept) < share <= float(kept)
        looked = method in ("as it came", "HOSVD, not trained")
        assert row["epoch"] == ("0" if looked else "2")
        assert (row["train_loss"] == "nan") == looked
    first = {row["method"]: row for row in reversed(rows) if row["kept"] == "0.1"}
    sizes = {method: int(row["parameters"]) for method, row in first.items()}
    assert sizes["TDLRT"] > sizes["TDLRT, truncated at once"]
    assert table(methods="as it came;TDLRT", budgets="0.1") == rows  # nothing was left to do
    assert len(table(methods="as it came", images=20)) == len(rows) + 1


def test_fine_tuning_by_no_method() -> None:
    import fine_tuning
    import typer

    with pytest.raises(typer.BadParameter, match="got 'magic', expected some of dense; TDLRT"):
        fine_tuning.main(methods="dense;magic")


def test_figure_of_fine_tuning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import figures
    import fine_tuning
    import runs

    def row(method: str, kept: float, seed: int, epoch: int, accuracy: float) -> dict[str, str]:
        run = fine_tuning.Run(
            "resnet20", method, kept, fine_tuning.IMAGES, fine_tuning.EPOCHS, fine_tuning.RATE, seed
        )
        seen = {"data": "noise", "epoch": epoch, "parameters": int(1000 * kept)}
        rows = {**run._asdict(), **seen, "test_accuracy": accuracy}
        return {name: str(value) for name, value in rows.items()}

    rows = [row("dense", 1.0, 0, 3, 90.0)]
    for seed, accuracy in enumerate((80.0, 84.0)):
        rows += [row("TDLRT", 0.1, seed, 1, 50.0), row("TDLRT", 0.1, seed, 3, accuracy)]
        rows.append(row("TDLRT", 0.5, seed, 3, 88.0))
    rows.append({**row("TDLRT", 0.2, 0, 3, 10.0), "images": "5000"})  # a trial
    path = tmp_path / "table.csv"
    runs._write(path, rows)
    figure = figures.compression(path)
    (axes,) = figure.axes
    assert axes.get_title() == "resnet20, noise"
    dense, line = axes.get_lines()
    assert list(dense.get_ydata()) == [90.0, 90.0]
    assert list(line.get_xdata()) == [100, 500]
    assert list(line.get_ydata()) == [82.0, 88.0]
    with pytest.raises(ValueError, match="expected a table with runs of the whole recipe"):
        figures.compression(tmp_path / "none.csv")
    monkeypatch.setitem(figures.FIGURES, "fine_tuning", lambda: figure)
    figures.main(["fine_tuning"], tmp_path / "new")
    assert (tmp_path / "new" / "fine_tuning.png").stat().st_size > 5000
