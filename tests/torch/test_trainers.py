"""The same three lines under Accelerate, the Hugging Face Trainer and Lightning, two processes."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from geotucker_torch import densify, factorize

from . import trainers

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork"),
    pytest.mark.slow,
    pytest.mark.xdist_group("processes"),  # one worker starts them, once
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run all trainers, in one program."""
    folder = tmp_path_factory.mktemp("trainers")
    path = [str(Path(trainers.__file__).parent), *sys.path]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(path)}
    program = [sys.executable, "-W", "ignore", trainers.__file__, str(folder), "2"]
    done = subprocess.run(
        [*program, *trainers.TRAINERS],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(params=trainers.TRAINERS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def results(name: str, folder: Path) -> list[dict[str, Any]]:
    """Return what the processes of a trainer have found."""
    results = [torch.load(folder / f"{name}.{rank}") for rank in range(2)]
    assert all(isinstance(result, dict) for result in results), results
    return results


def test_processes_agree_on_weights_and_ranks(results: list[dict[str, Any]]) -> None:
    for result in results:
        unbroken = result["unbroken"]
        assert unbroken["wrapped"]  # by the trainer, in DistributedDataParallel
        assert set(unbroken["ranks"].values()) == {(5, 5)}  # from (8, 8), for the budget
        assert unbroken["seconds"].keys() == {"iteration", "step", "bases", "processes"}
        for key, tensor in unbroken["state"].items():
            assert torch.equal(tensor, results[0]["unbroken"]["state"][key])


def test_a_resumed_training_ends_as_an_unbroken_one(results: list[dict[str, Any]]) -> None:
    for result in results:
        for key, tensor in result["unbroken"]["state"].items():
            assert torch.equal(tensor, result["resumed"]["state"][key])


def test_trainers_stop_early(name: str, results: list[dict[str, Any]]) -> None:
    expected = {"accelerate": 3, "transformers": 4, "lightning": 8}
    assert [result["stopped"] for result in results] == [expected[name]] * 2


def test_the_best_model_comes_back_at_its_own_ranks(folder: Path) -> None:
    for rank in range(2):
        best = torch.load(folder / f"transformers.{rank}")["best"]
        assert best == {"body.0.core": (7, 7)}  # after two steps; after four they are lower


def test_tensorboard_sees_ranks_and_times(name: str, folder: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    # The first training; Lightning has another folder for the resumed one.
    first = min(file.parent for file in folder.joinpath(name).rglob("events.out.tfevents.*"))
    log = EventAccumulator(str(first)).Reload()
    (tag,) = (tag for tag in log.Tags()["scalars"] if tag.endswith("/out"))
    ranks = [event.value for event in log.Scalars(tag)]
    assert ranks[0] > ranks[-1] == 5
    for key in ("compression", "seconds/iteration", "seconds/step", "seconds/processes"):
        (tag,) = (tag for tag in log.Tags()["scalars"] if tag.endswith(key))
        assert all(event.value >= 0 for event in log.Scalars(tag))


def test_a_model_of_transformers_with_tied_weights_is_saved(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes: dict[str, Any] = {
        "vocab_size": 40,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
    }
    model: Any = LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=True))
    factorize(model, 0.5, verbose=False)
    model.save_pretrained(tmp_path / "tucker")  # as their Trainer does for a checkpoint
    saved = load_file(tmp_path / "tucker" / "model.safetensors")
    assert saved.keys() == {name for name, _ in model.named_parameters()}
    model.tie_weights()
    assert model.lm_head.core is model.model.embed_tokens.core
    x = torch.arange(6)[None]
    expected = model(x).logits
    densify(model).save_pretrained(tmp_path / "dense")
    dense = LlamaForCausalLM.from_pretrained(tmp_path / "dense")
    torch.testing.assert_close(dense(x).logits, expected)
