"""The train command as its user sees it: files, output, errors, resuming."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest
import safetensors.torch
import torch
import typer
from typer.testing import CliRunner, Result

from geotucker_torch import TuckerModule
from geotucker_torch._train import _loop, _main, _run
from geotucker_torch._train._config import Config
from geotucker_torch._train._data import load
from geotucker_torch._train._errors import ResumeError
from geotucker_torch._train._loop import evaluate
from geotucker_torch._train._networks import build_networks
from geotucker_torch._train._run import start, train
from geotucker_torch._train._weights import load_weights
from geotucker_torch._train.command import train as command

APP = typer.Typer(add_completion=False, rich_markup_mode=None)
APP.command()(command)

QUICK = ["--batch-size", "256", "--epochs", "2", "--model", "mlp"]
QUICK += ["--ranks", "16", "--tolerance", "0.2"]
DRAW, REPORT = _main.draw, _main.report
FILES = {
    "checkpoint.safetensors",
    "config.json",
    "dense.safetensors",
    "metrics.jsonl",
    "model.safetensors",
    "picture.png",
    "report.html",
}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in an empty folder; draw no pictures, which takes longer than the training."""
    for name in ("draw", "report"):
        monkeypatch.setattr(_main, name, lambda *arguments, **_: arguments[-1].touch())
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GEOTUCKER_DATA_DIR", raising=False)
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(APP, arguments, catch_exceptions=False)


def metrics(folder: str | Path) -> list[dict[str, Any]]:
    lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def without_seconds(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in record.items() if k != "seconds"} for record in records]


def test_a_run_leaves_its_files_and_says_where(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_main, "draw", DRAW)
    monkeypatch.setattr(_main, "report", REPORT)
    result = run(*QUICK)
    assert result.exit_code == 0, result.output
    folder = Path("runs/digits-mlp-0")
    assert {entry.name for entry in folder.iterdir()} == FILES
    for name in FILES:
        assert str(folder / name) in result.output
    assert "\x1b" not in result.output  # not a terminal: plain text
    records = metrics(folder)
    order = [(r["network"], r["epoch"]) for r in records]
    assert order == [("dense", 1), ("tucker", 1), ("dense", 2), ("tucker", 2)]
    last = records[-1]
    assert f"{last['parameters']:,}" in result.output
    assert f"{100 * last['test_accuracy']:.2f}%" in result.output
    picture = matplotlib.image.imread(folder / "picture.png")
    assert picture.shape[1] >= 1200
    assert picture.std() > 0.05
    page = (folder / "report.html").read_text()
    assert "mlp on digits" in page
    for ranks in last["ranks"].values():
        assert str(tuple(ranks)) in result.output
        assert "x".join(map(str, ranks)) in page


def test_metrics_agree_with_the_saved_weights() -> None:
    run(*QUICK)
    data = load("digits", None)
    for name, network in (("model", "tucker"), ("dense", "dense")):
        path = Path("runs/digits-mlp-0") / f"{name}.safetensors"
        model = load_weights(path)
        record = [r for r in metrics(path.parent) if r["network"] == network][-1]
        loss, accuracy = evaluate(model, data)
        assert accuracy == record["test_accuracy"]
        assert loss == pytest.approx(record["test_loss"], rel=1e-5)
        layers = {k: m for k, m in model.named_modules() if isinstance(m, TuckerModule)}
        assert {k: list(m.ranks) for k, m in layers.items()} == record["ranks"]
        assert sum(p.numel() for p in model.parameters()) == record["parameters"]
        stored = safetensors.torch.load_file(path)
        assert sum(t.numel() for t in stored.values()) == record["parameters"]


def test_loading_weights_leaves_the_random_state_alone() -> None:
    run(*QUICK, "--quiet")
    before = torch.get_rng_state()
    load_weights("runs/digits-mlp-0/model.safetensors")
    assert torch.equal(torch.get_rng_state(), before)
    Path("other").write_bytes(b"no weights")
    with pytest.raises(ResumeError, match="other"):
        load_weights("other")


def test_default_settings_reach_a_good_accuracy_at_clear_compression(tmp_path: Path) -> None:
    run_ = start(Config(baseline=False, epochs=5, threads=1), tmp_path / "run")
    train(run_, Silent())
    last = run_.metrics[-1]
    assert last["test_accuracy"] > 0.96
    assert last["compression"] > 0.85
    assert last["ranks"] != {name: list(ranks) for name, ranks in run_.start_ranks.items()}


class Silent:
    """A watcher that does not look."""

    def stepped(self, network: Any) -> None: ...

    def finished_epoch(self, network: Any, record: dict[str, Any]) -> None: ...


def test_the_baseline_does_not_change_the_tucker_network() -> None:
    assert run(*QUICK, "--out", "both").exit_code == 0
    assert run(*QUICK, "--out", "alone", "--no-baseline").exit_code == 0
    assert not Path("alone/dense.safetensors").exists()
    alone, both = metrics("alone"), metrics("both")
    assert without_seconds(alone) == without_seconds([r for r in both if r["network"] == "tucker"])


def test_fixed_ranks_stay_and_name_their_layers() -> None:
    result = run(*QUICK[:6], "--ranks", "fc1=12;fc2=7", "--optimizer", "momentum")
    assert result.exit_code == 0, result.output
    for record in metrics("runs/digits-mlp-0"):
        if record["network"] == "tucker":
            assert record["ranks"] == {"fc1": [12, 12], "fc2": [7, 7]}


@pytest.mark.parametrize("budget", ["20%", "4000"])
def test_linear_layers_as_tensors_come_down_to_a_budget(budget: str) -> None:
    arguments = (*QUICK[:6], "--budget", budget, "--tensorise", "2", "--optimizer", "momentum")
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    dense, *_ = (r["parameters"] for r in metrics("runs/digits-mlp-0") if r["network"] == "dense")
    asked = 0.2 * dense if budget == "20%" else 4000
    last = metrics("runs/digits-mlp-0")[-1]
    assert 0.9 * asked < last["parameters"] <= asked
    assert len(last["ranks"]["fc1"]) == 4  # two factors on each side
    result = run(*arguments[:-5], "0.1%", *arguments[-4:], "--out", "new")
    assert result.exit_code == 2 and "--budget: got 0.1%" in result.stderr


def test_reported_weights_are_truncated_though_bases_move_seldom() -> None:
    arguments = (*QUICK[:6], "--ranks", "8", "--basis-every", "4", "--optimizer", "adamw")
    assert run(*arguments).exit_code == 0
    assert metrics("runs/digits-mlp-0")[-1]["ranks"] == {
        "fc1": [8, 8],
        "fc2": [8, 8],
        "fc3": [8, 8],
    }


def test_runs_of_one_seed_are_equal_and_get_folders_of_their_own() -> None:
    for seed in ("0", "0", "1"):
        assert run(*QUICK, "--no-baseline", "--quiet", "--seed", seed).output == ""
    first, second, other = (
        Path(f"runs/digits-mlp-{end}/model.safetensors").read_bytes() for end in ("0", "0-2", "1")
    )
    assert first == second
    assert first != other


@pytest.mark.parametrize("out", [[], ["--out", "runs/digits-mlp-0"]])
def test_of_runs_that_start_at_once_none_takes_the_folder_of_another(
    monkeypatch: pytest.MonkeyPatch, out: list[str]
) -> None:
    first = Path("runs/digits-mlp-0")

    def load_while_another_starts(*arguments: Any) -> Any:
        monkeypatch.setattr(_run, "load", load)
        start(Config(model="mlp", lr=0.1), first)
        return load(*arguments)

    monkeypatch.setattr(_run, "load", load_while_another_starts)
    result = run(*QUICK, "--no-baseline", *out)
    assert json.loads((first / "config.json").read_text())["lr"] == 0.1
    assert {entry.name for entry in first.iterdir()} == {"config.json", "metrics.jsonl"}
    if out:
        assert result.exit_code == 2
        assert "--out: got runs/digits-mlp-0, expected a folder without a run" in result.stderr
    else:
        assert result.exit_code == 0
        assert "results go to runs/digits-mlp-0-2" in result.output
        assert len(metrics("runs/digits-mlp-0-2")) == 2


def test_a_disk_that_is_full_at_the_start_leaves_no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        result = run(*QUICK, "--out", "here")
    assert result.exit_code == 1
    assert "--out: cannot write to here (No space left on device)" in result.stderr
    assert list(Path("here").iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "minst"], "--data: got 'minst'"),
        (["--model", "lenet5"], "--model: got lenet5, expected one that takes 8x8 images"),
        (["--lr", "-1"], "--lr: got -1.0, expected a positive number"),
        (["--ranks", "fc9=3"], "--ranks: got 'fc9', expected a pattern for one of: conv1"),
        (["--ranks", "conv2=3,3"], "expected 4 ranks for layer conv2"),
        (["--ranks", "fc2=100"], "--ranks: got ranks at which no layer shrinks"),
        (["--data-dir", "nowhere", "--data", "mnist"], "--data-dir: got nowhere"),
        (["--out", "file"], "--out: got file, expected a folder"),
    ],
)
def test_a_bad_value_is_one_line_and_creates_nothing(arguments: list[str], message: str) -> None:
    Path("file").touch()
    result = run(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert [entry.name for entry in Path().iterdir()] == ["file"]


def test_a_value_that_is_no_number_is_refused_too() -> None:
    result = run("--epochs", "ten")
    assert result.exit_code == 2
    assert "--epochs" in result.stderr


def test_missing_data_ends_with_one_line(tmp_path: Path) -> None:
    result = run("--data", "mnist", "--data-dir", str(tmp_path))
    assert result.exit_code == 1
    assert "mnist/train-images-idx3-ubyte.gz" in result.stderr
    assert not Path("runs").exists()


def test_a_folder_with_a_run_is_not_overwritten() -> None:
    assert run(*QUICK, "--out", "here", "--no-baseline").exit_code == 0
    before = Path("here/model.safetensors").read_bytes()
    result = run(*QUICK, "--out", "here", "--seed", "5")
    assert result.exit_code == 2
    assert "--resume here" in result.stderr
    assert Path("here/model.safetensors").read_bytes() == before


def test_a_folder_that_cannot_be_written_is_named() -> None:
    Path("file").touch()
    result = run(*QUICK, "--out", "file/below")
    assert result.exit_code == 1
    assert "--out: cannot write to file/below" in result.stderr


def test_divergence_names_epoch_and_step_and_keeps_the_checkpoint() -> None:
    result = run(*QUICK, "--lr", "1e30")
    assert result.exit_code == 1
    assert "dense network, epoch 1, step 2" in result.stderr
    assert "try a smaller --lr" in result.stderr


def test_divergence_of_the_tucker_network(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(*QUICK, "--out", "good", "--no-baseline", "--epochs", "1").exit_code == 0

    def nan_later(config: Config, epoch: float) -> float:
        return 0.2 if epoch < 1 else float("nan")

    monkeypatch.setattr(_loop, "learning_rate", nan_later)
    result = run(*QUICK, "--out", "bad", "--no-baseline")
    assert result.exit_code == 1
    assert "tucker network, epoch 2, step 1" in result.stderr
    assert "the last checkpoint is kept; to go on: --resume bad" in result.stderr
    assert len(metrics("bad")) == 1


def test_an_interrupted_run_says_how_to_go_on_and_does(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(*QUICK, "--out", "whole").exit_code == 0
    calls = 0

    def interrupted(*arguments: Any) -> tuple[float, float]:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return evaluate(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(_run, "evaluate", interrupted)
        result = run(*QUICK, "--out", "broken")
    assert result.exit_code == 130
    assert "--resume broken" in result.stderr
    assert len(metrics("broken")) == 2

    result = run("--resume", "broken/checkpoint.safetensors")
    assert result.exit_code == 0, result.output
    assert without_seconds(metrics("broken")) == without_seconds(metrics("whole"))
    for name in ("model.safetensors", "dense.safetensors"):
        assert Path("broken", name).read_bytes() == Path("whole", name).read_bytes()


def test_a_finished_run_is_resumed_to_the_same_files() -> None:
    assert run(*QUICK, "--out", "here").exit_code == 0
    before = Path("here/model.safetensors").read_bytes()
    Path("here/picture.png").unlink()
    result = run("--resume", "here")
    assert result.exit_code == 0, result.output
    assert Path("here/model.safetensors").read_bytes() == before
    assert Path("here/picture.png").exists()


def test_options_that_contradict_the_run_are_named() -> None:
    assert run(*QUICK, "--out", "here", "--quiet").exit_code == 0
    for arguments, message in (
        (["--lr", "0.5"], "--lr: got 0.5, expected 0.2, as the run in here has it"),
        (["--batch-size", "7"], "--batch-size: got 7, expected 256"),
        (["--ranks", "3"], "--ranks: got ('3',), expected ('16',)"),
        (["--no-baseline"], "--no-baseline: got False, expected True"),
        (["--out", "there"], "--out: got there, expected here"),
    ):
        result = run("--resume", "here", *arguments)
        assert result.exit_code == 2
        assert message in result.stderr
    agreeing = ("--lr", "0.2", "--ranks", "16", "--out", "./here", "--device", "auto")
    agreeing += ("--checkpoint-every", "2")
    assert run("--resume", "here", *agreeing).exit_code == 0


def test_nothing_to_resume_is_said() -> None:
    result = run("--resume", "nowhere")
    assert result.exit_code == 1
    assert "--resume: no folder nowhere" in result.stderr
    Path("empty").mkdir()
    assert "no run in empty" in run("--resume", "empty").stderr
    Path("empty/config.json").write_text("{")
    assert "not a run's settings" in run("--resume", "empty").stderr


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("ranks", [1], "ranks: expected tuple[str, ...], got (1,)"),
        ("budget", 5, "budget: expected str | None, got 5"),
        ("data_dir", 5, "data_dir: expected str | None, got 5"),
        ("epochs", 1.5, "epochs: expected int | None, got 1.5"),
        ("seed", None, "seed: expected int, got None"),
        ("baseline", "no", "baseline: expected bool, got 'no'"),
    ],
)
def test_damaged_settings_are_named(name: str, value: Any, message: str) -> None:
    values = json.loads(Config(model="mlp", lr=1).to_json())
    assert Config.from_mapping(values).lr == 1
    Path("here").mkdir()
    Path("here/config.json").write_text(json.dumps({**values, name: value}))
    result = run("--resume", "here")
    assert result.exit_code == 1
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_run_killed_before_its_first_checkpoint_begins_anew() -> None:
    assert run(*QUICK, "--out", "here").exit_code == 0
    before = Path("here/model.safetensors").read_bytes()
    for name in FILES - {"config.json"}:
        Path("here", name).unlink()
    assert run("--resume", "here").exit_code == 0
    assert Path("here/model.safetensors").read_bytes() == before


def test_a_damaged_checkpoint_is_said() -> None:
    assert run(*QUICK, "--out", "here", "--quiet").exit_code == 0
    path = Path("here/checkpoint.safetensors")
    path.write_bytes(path.read_bytes()[:500])
    result = run("--resume", "here")
    assert result.exit_code == 1
    assert "not a whole checkpoint" in result.stderr
    assert len(result.stderr.splitlines()) == 1  # not to resume, which would fail again


def test_lenet5_learns_mnist(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def first_images(name: str, folder: Path | None) -> Any:
        data = load(name, folder)
        return replace(
            data,
            train_images=data.train_images[:3000],
            train_labels=data.train_labels[:3000],
            test_images=data.test_images[:500],
            test_labels=data.test_labels[:500],
        )

    monkeypatch.setattr(_run, "load", first_images)
    arguments = [
        "--data",
        "mnist",
        "--data-dir",
        str(data_dir),
        "--ranks",
        "conv2=10,10,5,5;fc1=10",
    ]
    arguments += ["--epochs", "1", "--batch-size", "20", "--optimizer", "adam", "--lr", "0.005"]
    result = run(*arguments, "--no-baseline")
    assert result.exit_code == 0, result.output
    last = metrics("runs/mnist-lenet5-0")[-1]
    assert last["parameters"] == 20 * 25 + 20 + 3250 + 50 + 13_100 + 500 + 5010
    assert last["compression"] == 1 - last["parameters"] / 431_080
    assert last["test_accuracy"] > 0.8


def test_help_names_every_option() -> None:
    text = run("--help").output
    for option in ("--tolerance", "--ranks", "--resume", "--no-baseline", "--checkpoint-every"):
        assert option in text


def test_bars_and_ranks_are_drawn_in_a_terminal(tmp_path: Path) -> None:
    from io import StringIO

    from rich.console import Console

    from geotucker_torch._train._progress import Display

    settings = Config(model="mlp", ranks=("16",), tolerance=0.2, epochs=1, batch_size=256)
    run_ = start(settings, tmp_path / "run")
    screen = StringIO()
    console = Console(file=screen, force_terminal=True, width=100, color_system=None)
    with Display(run_, console) as display:
        train(run_, display)
    text = screen.getvalue()
    assert "epoch 1/1" in text
    assert "━" in text
    assert "ranks  fc1=" in text
    assert f"saved {100 * run_.tucker.compression:4.1f}%" in text


def test_layers_that_would_not_shrink_are_named() -> None:
    result = run(*QUICK[:6], "--ranks", "12", "--no-baseline")
    assert "fc3 would not shrink at the ranks to start from: left dense" in result.output


def test_a_full_disk_ends_with_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(_run, "save_checkpoint", full)
    result = run(*QUICK, "--quiet")
    assert result.exit_code == 1
    assert result.stderr.splitlines() == ["geotucker train: [Errno 28] No space left on device"]


def test_networks_have_random_numbers_of_their_own() -> None:
    data = load("digits", None)
    first, second = build_networks(Config(model="mlp", seed=3), data)
    draws: list[list[float]] = []
    for turns in ((first, first, second, second), (first, second, first, second)):
        for network in (first, second):
            network.random_state["cpu"] = torch.Generator().manual_seed(7).get_state()
        drawn = []
        for network in turns:
            with network.own_randomness():
                drawn.append(torch.rand(1).item())
        draws.append(drawn)
    assert draws[0] == [draws[0][0], draws[0][1]] * 2
    assert draws[1] == [draws[0][0], draws[0][0], draws[0][1], draws[0][1]]
    assert draws[0][0] != draws[0][1]
