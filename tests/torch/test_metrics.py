"""Numbers for loggers, of any optimizer that holds a TDLRT."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

import geotucker as gt
from geotucker_torch import TDLRT, factorize, metrics

from .cases import training


def test_metrics_count_the_model_before_and_after_a_step() -> None:
    optimizer, backward = training(steps=0)
    dense, small = 2 * 8 * 9 + 8 + 16 + 72 * 16 + 16 + 16 * 3 + 3, optimizer.model
    before = metrics(optimizer)
    assert not any(key.startswith("seconds/") for key in before)
    backward()
    assert small[0].ranks != (4, 2, 2, 2)  # wider, until the step
    assert metrics(optimizer) == before
    optimizer.step()
    after = metrics(optimizer)
    parameters = sum(p.numel() for p in small.parameters())
    assert after["parameters"] == parameters
    assert after["compression"] == pytest.approx(1 - parameters / dense)
    ranks = {key: value for key, value in after.items() if key.startswith("ranks/")}
    assert ranks["ranks/0/height"] == small[0].ranks[2]
    assert len(ranks) == 4 + 2
    assert after["seconds/iteration"] >= after["seconds/step"] >= after["seconds/bases"] > 0
    assert set(optimizer.seconds) == {"iteration", "step", "bases"}


def test_metrics_look_into_what_trainers_make_of_optimizers() -> None:
    model = factorize(nn.Linear(30, 20), 4, verbose=False)
    optimizer = TDLRT(torch.optim.SGD(model.parameters(), lr=0.1), model, gt.Fixed(4))
    wrapped = SimpleNamespace(optimizer=SimpleNamespace(optimizer=optimizer))
    assert metrics(wrapped) == metrics(optimizer)
    assert metrics(optimizer)["ranks/out"] == 4  # a model that is the layer itself


@pytest.mark.parametrize("other", [torch.optim.SGD([torch.ones(1)], lr=0.1), 3])
def test_metrics_of_other_optimizers_are_refused(other: object) -> None:
    with pytest.raises(TypeError, match="optimizer: expected a TDLRT, got"):
        metrics(other)
