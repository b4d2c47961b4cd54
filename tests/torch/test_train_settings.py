"""Options, ranks and models of the train command."""

import json

import pytest
import torch

from geotucker_torch._train._config import Config
from geotucker_torch._train._errors import OptionError
from geotucker_torch._train._models import MODELS, build
from geotucker_torch._train._ranks import parse_ranks

LAYERS = {"conv1": (20, 1, 5, 5), "conv2": (50, 20, 5, 5), "fc1": (500, 800), "fc2": (10, 500)}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("10", {"conv1": 10, "conv2": 10, "fc1": 10, "fc2": 10}),
        ("0.1", dict.fromkeys(LAYERS, 0.1)),
        ("1.0", dict.fromkeys(LAYERS, 1.0)),
        ("conv2=8,8,5,5;fc1=9", {"conv2": (8, 8, 5, 5), "fc1": 9}),
        ("conv*=0.2; fc1 = 9, 9", {"conv1": 0.2, "conv2": 0.2, "fc1": (9, 9)}),
        ("7;fc2=dense", {"conv1": 7, "conv2": 7, "fc1": 7}),
        ("conv1=dense;conv*=6", {"conv2": 6}),
    ],
)
def test_ranks_are_read(text: str, expected: dict[str, object]) -> None:
    assert parse_ranks([text], default=None).for_model(LAYERS) == expected
    assert parse_ranks(text.split(";"), default=None).for_model(LAYERS) == expected


def test_without_ranks_all_layers_take_the_default() -> None:
    assert parse_ranks([], default=0.25).for_model(LAYERS) == dict.fromkeys(LAYERS, 0.25)


@pytest.mark.parametrize(
    "text",
    ["0", "-3", "1.5", "nan", "ten", "8,", "8,0", "8,8.5", "=9", "fc1=", "fc1=0", "10;20", "inf"],
)
def test_unreadable_ranks_name_the_option(text: str) -> None:
    with pytest.raises(OptionError, match=r"^--ranks: got .*, expected "):
        parse_ranks([text], default=None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("convv2=8", "convv2.*conv1, conv2, fc1, fc2"),
        ("conv2=8,8,5", r"4 ranks for layer conv2 of shape \(50, 20, 5, 5\)"),
        ("*=dense", "no layer to factorise"),
    ],
)
def test_ranks_that_do_not_fit_the_model(text: str, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        parse_ranks([text], default=None).for_model(LAYERS)


def test_settings_without_values_are_filled_in() -> None:
    config = Config()
    assert None not in (config.model, config.lr, config.epochs, config.batch_size, config.threads)
    assert config.adaptive
    assert not Config(ranks=("10",)).adaptive
    assert Config(ranks=("10",), tolerance=0.1).adaptive


def test_settings_survive_json() -> None:
    config = Config(data="mnist", ranks=("10", "fc2=dense"), lr=0.123456789012345, baseline=False)
    assert Config.from_mapping(json.loads(config.to_json())) == config


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"data": "minst"}, r"--data: got 'minst', expected one of .*did you mean mnist\?"),
        ({"model": "alexnet"}, "--model: got 'alexnet', expected one of"),
        ({"optimizer": "lbfgs"}, "--optimizer"),
        ({"schedule": "linear"}, "--schedule"),
        ({"device": "tpu"}, "--device"),
        ({"lr": 0.0}, "--lr: got 0.0, expected a positive number"),
        ({"lr": float("nan")}, "--lr: got nan"),
        ({"lr": float("inf")}, "--lr: got inf"),
        ({"weight_decay": -0.1}, "--weight-decay: got -0.1"),
        ({"tolerance": 1.0}, "--tolerance: got 1.0"),
        ({"tolerance": -0.1}, "--tolerance: got -0.1"),
        ({"epochs": 0}, "--epochs: got 0, expected an integer of at least 1"),
        ({"batch_size": 0}, "--batch-size: got 0"),
        ({"basis_every": 0}, "--basis-every: got 0"),
        ({"rate_power": -0.5}, "--rate-power: got -0.5, expected a number from 0 to 1"),
        ({"rate_power": float("nan")}, "--rate-power: got nan"),
        ({"tensorise": 1, "budget": "5%"}, "--tensorise: got 1, expected an integer of at least 2"),
        ({"tensorise": 2}, "--tensorise: got 2, expected a --budget"),
        ({"tensorise": 2, "budget": "5%", "ranks": ("8",)}, "--tensorise: .* no --ranks"),
        ({"checkpoint_every": -1}, "--checkpoint-every: got -1"),
        ({"threads": -1}, "--threads: got -1"),
        ({"seed": -1}, "--seed: got -1"),
        ({"seed": 2**63}, f"--seed: got {2**63}, expected an integer of at most {2**63 - 1}"),
        ({"epochs": 10**400}, "--epochs: got 10*, expected an integer of at most"),
        ({"threads": 5000}, "--threads: got 5000, expected an integer of at most 4096"),
        ({"lr": 1e32}, r"--lr: got 1e\+32, expected a positive number below 1e\+32"),
        ({"weight_decay": 1e300}, r"--weight-decay: got 1e\+300, expected zero or .* below 1e\+32"),
        ({"budget": "9" * 400}, "--budget: got '9+', expected a share"),
        ({"floor": 0}, "--floor: got 0"),
        ({"floor": 5, "cap": 4}, "--cap: got 4, expected at least --floor"),
        ({"ranks": ("x",)}, "--ranks: got 'x'"),
    ],
)
def test_bad_settings_name_the_option(values: dict[str, object], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Config(**values)  # type: ignore[arg-type]


def test_cuda_without_a_gpu_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(OptionError, match="--device: got cuda"):
        Config(device="cuda")
    assert Config(device="auto").device == "cpu"


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("channels", "size"), [(1, 28), (3, 32)])
def test_models_take_the_images(name: str, channels: int, size: int) -> None:
    model = build(name, channels, size, 10)
    assert model(torch.zeros(2, channels, size, size)).shape == (2, 10)


def test_lenet5_has_the_published_size() -> None:
    parameters = build("lenet5", 1, 28, 10).parameters()
    assert sum(parameter.numel() for parameter in parameters) == 431_080


def test_images_too_small_for_a_model_are_an_error() -> None:
    with pytest.raises(OptionError, match=r"--model: got lenet5, expected one that takes 8x8"):
        build("lenet5", 1, 8, 10)
