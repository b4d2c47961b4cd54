"""The experiments behind the documentation's pages of evidence run, on little."""

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import typer
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from geotucker_torch import factorize
from geotucker_torch._train._data import DataSet

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="the benchmarks are not here")


@pytest.fixture(autouse=True)
def import_as_scripts_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """Find what the scripts share in their own folder, and keep all in one process."""
    monkeypatch.syspath_prepend(str(FOLDER))
    import runs

    def pool(jobs: int, **options: Any) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(jobs)

    monkeypatch.setattr(runs, "ProcessPoolExecutor", pool)  # processes would not see what is small


@pytest.fixture
def no_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure no costs, which takes longer than the training; that they are has its own tests."""
    import training

    monkeypatch.setattr(training, "cost", lambda *_: training.Cost())


@pytest.fixture
def digits() -> DataSet:
    """Return a few images of noise, as a data set of the size of MNIST's images."""
    torch.manual_seed(0)
    images = torch.randint(0, 256, (16, 1, 28, 28), dtype=torch.uint8)
    labels = torch.arange(16) % 10
    return DataSet("noise", images, labels, images, labels, (128.0,), (74.0,))


class Toss(NamedTuple):
    """A run that needs no network."""

    coin: str
    seed: int


def test_a_table_goes_on_where_it_was_left(tmp_path: Path) -> None:
    from runs import fill
    from tables import read

    path, done = tmp_path / "new" / "table.csv", []

    def work(run: Toss) -> Iterator[dict[str, object]]:
        done.append(run)
        if run.coin == "broken":
            raise ValueError("no such coin")
        yield {"epoch": 1, "side": "heads"}
        yield {"epoch": 2, "side": "tails"}

    with pytest.raises(ValueError, match="no such coin"):
        fill(path, [Toss("penny", 0), Toss("broken", 0)], work, jobs=1)
    assert [row["side"] for row in read(path)] == ["heads", "tails"]  # what ended before is kept
    rows = fill(path, [Toss("penny", 0), Toss("penny", 1)], work, jobs=1)
    assert done == [Toss("penny", 0), Toss("broken", 0), Toss("penny", 1)]
    assert rows == read(path) == fill(path, [Toss("penny", 1)], work, jobs=1)
    expected = {"coin": "penny", "seed": "1", "epoch": "2", "side": "tails"}
    assert rows[-1] == expected and len(rows) == 4
    assert not list(path.parent.glob("*.part"))


def test_a_table_of_other_columns_is_refused(tmp_path: Path) -> None:
    from runs import fill

    path = tmp_path / "table.csv"
    path.write_text("coin,side\npenny,heads\n")
    with pytest.raises(ValueError, match=r"path: expected a table that begins with coin, seed"):
        fill(path, [Toss("penny", 0)], lambda run: [{"side": "tails"}], jobs=1)
    assert path.read_text() == "coin,side\npenny,heads\n"


def test_a_share_that_cannot_be_met_is_a_row_without_numbers(
    digits: DataSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    import compression

    monkeypatch.setattr(compression, "load", lambda *_: digits)
    for method in ("UV^T, plain descent", "TDLRT"):
        run = compression.Run("lenet5", method, 0.001, 0.1, 0, 1)
        (row,) = compression.work(run)
        assert row["epoch"] == 1 and row["parameters"] == 0 and row["test_accuracy"] == "nan"


@pytest.mark.usefixtures("no_costs")
def test_stability_by_all_methods(
    digits: DataSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import figures
    import stability
    import tables

    monkeypatch.setattr(stability, "load", lambda *_: digits)
    ordinary, decaying, _ = (stability.network(start, 0) for start in stability.STARTS)
    for one, other in zip(ordinary.children(), decaying.children(), strict=True):
        if hasattr(one, "core"):
            ranks = (20, 1, 5, 5), (20, 20, 5, 5), (20, 20), (10, 10)
            assert tuple(one.core.shape) in ranks and one.core.shape == other.core.shape
            assert one.core.norm().item() == pytest.approx(other.core.norm().item(), rel=1e-5)
            values = torch.linalg.svdvals(other.core.detach().double().flatten(1))
            low, high = (0.75, 1.05) if other.core.dim() == 2 else (0.03, 2.5)
            for j in (1, 4, 9):
                assert low < 2.0**j * float(values[j] / values[0]) < high
    path = tmp_path / "stability.csv"
    stability.main(jobs=1, seeds=1, epochs=1, methods="", out=path)
    rows = tables.read(path)
    assert [(row["start"], row["method"]) for row in rows] == [
        (start, method) for method in stability.METHODS for start in stability.STARTS
    ]
    sizes = {row["method"]: int(row["parameters"]) for row in rows}
    assert sizes["dense"] == 431_080
    assert {v for k, v in sizes.items() if "T" in k and k != "UV^T, plain descent"} == {44_581}
    # All start from one function, so the first losses agree.
    for start in stability.STARTS:
        losses = [float(row["train_loss"]) for row in rows if row["start"] == start]
        assert max(losses) - min(losses) <= 2e-4
    axes = figures.FIGURES["stability"](tmp_path).axes
    assert [panel.get_title() for panel in axes] == [
        "ordinary start",
        "decaying start",
        "steep start",
    ]
    assert len(axes[0].get_lines()) == len(stability.METHODS)


@pytest.mark.usefixtures("no_costs")
def test_compression_by_some_methods(
    digits: DataSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import compression
    import figures
    import tables

    monkeypatch.setattr(compression, "load", lambda *_: digits)
    path = tmp_path / "compression.csv"
    known = compression.methods_of(compression.PROBLEMS["lenet5"])
    tensors = [name for name in known if name.endswith(", layers as tensors")]
    assert len(tensors) == 5
    methods = ";".join(["dense", "TDLRT", "SNIP", *tensors])
    options: dict[str, Any] = {"problem": "lenet5", "kept": "0.05,0.02", "epochs": 2, "jobs": 1}
    options |= {"seeds": 1, "device": "cpu", "methods": methods, "out": path}
    compression.main(rate=None, **options)
    compression.main(rate=0.1, **{**options, "methods": "SNIP", "kept": "0.02"})
    rows = tables.read(path)
    ends = [row for row in rows if row["epoch"] == "2"]
    assert len(rows) == 2 * len(ends) == 2 * (2 + 2 * 7)
    for row in ends:
        share = int(row["parameters"]) / 431_080
        assert 0.97 * float(row["kept"]) <= share <= float(row["kept"])
    (axes,) = figures.FIGURES["compression"](tmp_path).axes
    assert axes.get_title() == "lenet5, noise"
    lines = {line.get_label(): line for line in axes.get_lines()}
    own = [row for row in ends if row["method"] == "SNIP" and row["kept"] == "0.02"]
    assert len(own) == 2  # at two rates, of which the better one is drawn
    assert lines["SNIP"].get_ydata()[0] == max(float(row["test_accuracy"]) for row in own)
    assert len(lines["TDLRT"].get_xdata()) == 2
    assert figures.FIGURES["time"](tmp_path).axes[0].get_xlabel().startswith("processor time")


@pytest.mark.parametrize("method", ["dense", "TDLRT", "iterative pruning"])
def test_costs_are_measured_in_steps_that_are_taken_back(
    digits: DataSet, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    import compression
    import training

    monkeypatch.setattr(compression, "load", lambda *_: digits)
    run = compression.Run("lenet5", method, 0.1, 0.05, 0, 2)
    rows = list(compression.work(run))
    monkeypatch.setattr(training, "cost", lambda *_: training.Cost())
    assert [row["train_loss"] for row in compression.work(run)] == [r["train_loss"] for r in rows]
    for row in rows:
        # 20 x 25 products at 24 x 24 places, 50 x 500 at 8 x 8, and the two linear layers'.
        dense = 2e-6 * (500 * 24**2 + 50 * 500 * 8**2 + 800 * 500 + 500 * 10)
        inference = float(row["inference_mflops"])
        if method == "TDLRT":
            assert inference < 0.5 * dense
        else:
            assert inference == pytest.approx(dense, abs=1e-3)
        assert 2 * inference < float(row["training_mflops"]) < 4 * inference
        assert float(row["peak_mib"]) > 4 * int(row["parameters"]) / 2**20


@pytest.mark.usefixtures("no_costs")
def test_sensitivity_to_all_settings(
    digits: DataSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import figures
    import sensitivity
    import tables

    monkeypatch.setattr(sensitivity, "load", lambda *_: digits)
    ends = {name: (values[0], values[-1]) for name, values in sensitivity.VALUES.items()}
    monkeypatch.setattr(sensitivity, "VALUES", ends)
    path = tmp_path / "sensitivity.csv"
    sensitivity.main(jobs=1, seeds=1, epochs=1, settings=";".join(ends), out=path)
    rows = tables.read(path)
    assert [(row["setting"], row["value"]) for row in rows] == [
        (name, str(value)) for name, values in ends.items() for value in values
    ]
    axes = figures.FIGURES["sensitivity"](tmp_path).axes
    assert [panel.get_title() for panel in axes if panel.axison] == list(ends)


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


def published_folder() -> Path:
    """Return the folder of the data, with the published weights in it."""
    from geotucker_torch._train._fetch import data_folder

    folder = data_folder(None)
    if folder is None:
        pytest.skip("GEOTUCKER_DATA_DIR names no folder")
    if not (folder / "pretrained-cifar-resnet").is_dir():
        pytest.skip("the published weights are not there")
    return folder


@pytest.mark.data
@pytest.mark.xdist_group("images")  # one worker reads them, once
@pytest.mark.parametrize("name", ["resnet20", "resnet32"])
def test_published_weights_know_the_images(name: str) -> None:
    import fine_tuning
    from networks import pretrained

    folder = published_folder()
    data = fine_tuning.images()
    some = slice(0, None, 40)  # sorted by class
    with torch.no_grad():
        guess = pretrained(name, folder).eval()(data.normalise(data.test_images[some])).argmax(1)
    assert (guess == data.test_labels[some]).float().mean() > 0.75  # 0.81 and more of all


@pytest.mark.data
@pytest.mark.parametrize("name", ["resnet20", "resnet32"])
def test_published_weights_do_not_count_as_untrained(name: str) -> None:
    from networks import pretrained

    folder = published_folder()
    ours, nearest = (
        factorize(pretrained(name, folder), 2, rescale=rescale, verbose=False)
        for rescale in (None, False)
    )
    for found, expected in zip(ours.parameters(), nearest.parameters(), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.usefixtures("no_costs")
def test_fine_tuning_by_all_methods(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fine_tuning
    import tables

    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (52, 3, 8, 8), generator=generator, dtype=torch.uint8)
    labels = torch.arange(52) % 10
    parts = (images[:32], labels[:32], images[32:], labels[32:])
    small = DataSet("noise", *parts, mean=(128.0,) * 3, deviation=(60.0,) * 3, flips=True)
    _published(tmp_path, "resnet20")
    monkeypatch.setenv("GEOTUCKER_DATA_DIR", str(tmp_path))
    monkeypatch.setattr(fine_tuning, "images", lambda: small)
    monkeypatch.setattr(fine_tuning, "HELD_OUT", 8)
    path = tmp_path / "fine_tuning.csv"

    def table(**options: object) -> list[dict[str, str]]:
        fine_tuning.main(**{"epochs": 2, "images": 24, "jobs": 1, "out": path, **options})
        return tables.read(path)

    rows = table(budgets="0.1", rates="0.05")
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
    assert sizes["TDLRT"] > sizes["HOSVD, fine-tuned"]  # in its first epoch
    assert table(methods="as it came;TDLRT", budgets="0.1", rates="0.05") == rows  # all is there

    assert len(table(methods="as it came", images=20)) == len(rows) + 1

    number = len(tables.read(path))
    with pytest.raises(typer.BadParameter, match="begin with --trial"):
        table(methods="TDLRT", budgets="0.1")
    trials = table(methods="TDLRT", budgets="0.1", rates="0.01;0.1", trial=True)[number:]
    assert {(row["held_out"], row["rate"]) for row in trials} == {("8", "0.01"), ("8", "0.1")}
    best = max(trials, key=lambda row: (row["epoch"], float(row["test_accuracy"])))
    added = table(methods="TDLRT", budgets="0.2")[number + len(trials) :]
    assert {(row["held_out"], row["rate"]) for row in added} == {("0", best["rate"])}


def test_fine_tuning_by_no_method() -> None:
    import fine_tuning
    import typer

    with pytest.raises(typer.BadParameter, match="got 'magic', expected some of dense; TDLRT"):
        fine_tuning.main(methods="dense;magic")


def test_figure_of_fine_tuning(tmp_path: Path) -> None:
    import figures
    import fine_tuning
    import tables

    def row(method: str, kept: float, seed: int, epoch: int, accuracy: float) -> dict[str, str]:
        run = fine_tuning.Run(
            "resnet20", method, kept, fine_tuning.IMAGES, 0, fine_tuning.EPOCHS, 0.05, seed
        )
        seen = {"data": "noise", "epoch": epoch, "parameters": int(1000 * kept)}
        rows = {**run._asdict(), **seen, "test_accuracy": accuracy}
        return {name: str(value) for name, value in rows.items()}

    rows = [row("dense", 1.0, 0, 3, 90.0)]
    for seed, accuracy in enumerate((80.0, 84.0)):
        rows += [row("TDLRT", 0.1, seed, 1, 50.0), row("TDLRT", 0.1, seed, 3, accuracy)]
        rows.append(row("TDLRT", 0.5, seed, 3, 88.0))
        other = row("TDLRT", 0.5, seed, 3, float("nan") if seed else 99.0)
        rows.insert(1, {**other, "rate": "0.4"})  # a rate that serves worse over all seeds
    rows.append({**row("TDLRT", 0.2, 0, 3, 10.0), "images": "5000"})  # a trial
    tables.write(tmp_path / "fine_tuning.csv", rows)
    (axes,) = figures.FIGURES["fine_tuning"](tmp_path).axes
    assert axes.get_title() == "resnet20, noise"
    dense, line = axes.get_lines()
    assert list(dense.get_ydata()) == [90.0, 90.0]
    assert list(line.get_xdata()) == [0.1, 0.5]
    assert list(line.get_ydata()) == [82.0, 88.0]


def test_the_theorems_are_measured_and_drawn(digits: DataSet, tmp_path: Path) -> None:
    import figures
    import tables
    import theorems

    for name in theorems.PARTS:
        theorems.measure(name, digits, tmp_path, theorems.TOY)

    def rows(name: str) -> list[dict[str, str]]:
        return tables.read(tmp_path / f"theorems_{name}.csv")

    descent = rows("descent")
    assert len(descent) == 10 * theorems.TOY.descent
    for row in descent:
        assert float(row["guaranteed"]) <= float(row["decrease"])
        # To first order the loss falls by <G, lr G - E>, and E is a part of -lr G.
        rate, gradient = float(row["learning_rate"]), float(row["gradient"])
        price, cut = float(row["price"]), float(row["truncation"])
        assert rate * gradient**2 - price == pytest.approx(float(row["decrease"]), rel=0.3)
        assert price == pytest.approx(cut**2 / rate, rel=0.1, abs=1e-2 * rate * gradient**2)
    assert min(float(row["condition"]) for row in descent) < 1.1e-8
    assert {row["rates"] for row in rows("convergence")} == {"falling", "constant"}
    approximation = rows("approximation")
    assert {row["term"] for row in approximation} == {"flow", "lambda", "tau", "eps"}
    for row in approximation:
        assert 0 < float(row["distance"]) < float(row["moved"])
    assert {row["network"] for row in rows("spectra")} == {"dense", "growing"}

    names = [name for name in figures.FIGURES if name.startswith("theorems")]
    for folder in ("one", "two"):
        figures.main(only=",".join(figures.FIGURES), tables=tmp_path, out=tmp_path / folder)
        assert {path.stem for path in (tmp_path / folder).iterdir()} == set(names)  # as tables are
    for name in names:
        one, two = ((tmp_path / folder / f"{name}.svg").read_bytes() for folder in ("one", "two"))
        assert one.startswith(b"<?xml") and one == two


def test_truncations_cost_what_is_expected(
    digits: DataSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import figures
    import tables
    import truncation

    monkeypatch.setattr(truncation, "load", lambda *_: digits)
    truncation.main(epochs=1, out=tmp_path / "truncation.csv")
    rows = tables.read(tmp_path / "truncation.csv")
    layers = {row["layer"]: int(row["mode"]) for row in rows}
    assert layers == {"3": 3, "7": 3, "9": 2}  # the last mode of each
    for row in rows:
        assert 1 <= int(row["rank"]) < int(row["of"])
        ratio = float(row["expected"]) / max(float(row["attenuation"]), 1e-6)
        assert 0.0 < ratio < 100.0 and math.isfinite(float(row["measured"]))
    (axes,) = figures.FIGURES["truncation"](tmp_path).axes
    assert axes.get_xscale() == axes.get_yscale() == "log"


@given(*(st.floats(0.01, 3.0) for _ in range(4)))
def test_a_step_may_gain_no_more_than_is_guaranteed(
    rate: float, smoothness: float, w: float, error: float
) -> None:
    # On L(w) = smoothness / 2 w^2 a truncation error along the gradient, or against it, is worst.
    from theorems import guaranteed

    gradient = smoothness * w
    ends = (w - rate * gradient + sign * error for sign in (-1, 1))
    worst = min(smoothness / 2 * (w**2 - end**2) for end in ends)
    bound = guaranteed(rate, gradient, error, smoothness)
    assert bound == pytest.approx(worst, abs=1e-9 * smoothness * (w + error + gradient) ** 2)
    if rate * smoothness <= 1:
        assert guaranteed(rate, gradient, error, 1 / rate) <= bound + 1e-9 * (1 + abs(bound))
