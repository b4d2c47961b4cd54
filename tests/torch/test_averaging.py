"""Averages over steps are averages of weights."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.optim import swa_utils

import geotucker as gt
from geotucker_torch import TDLRT, AveragedModel, TuckerConv1d, TuckerLinear, factorize

from .cases import sgd


def weights(model):
    return [m.dense_weight().detach() for m in model.modules() if hasattr(m, "dense_weight")]


@given(
    ranks=st.lists(st.integers(1, 4), min_size=2, max_size=4),
    multi=st.sampled_from([None, swa_utils.get_ema_multi_avg_fn(0.7)]),
    seed=st.integers(0, 99),
)
def test_it_is_the_average_of_weights_as_far_as_ranks_allow(ranks, multi, seed):
    torch.manual_seed(seed)
    models = [
        nn.Sequential(TuckerLinear(8, 8, rank), nn.BatchNorm1d(8), TuckerLinear(8, 3, 3)).double()
        for rank in ranks
    ]
    ours = AveragedModel(models[0], multi_avg_fn=multi)
    dense = [[w.clone() for w in weights(model)] for model in models]
    theirs = swa_utils.AveragedModel(nn.ParameterList(dense[0]), multi_avg_fn=multi)
    before = copy.deepcopy([model.state_dict() for model in models])
    for model, own in zip(models, dense, strict=True):
        ours.update_parameters(model)
        theirs.update_parameters(nn.ParameterList(own))
        # What is cut is cut from the average so far.
        best = gt.to_dense(gt.hosvd(theirs.module[0].detach(), model[0].ranks[0]))
        with torch.no_grad():
            theirs.module[0].copy_(best)
        torch.testing.assert_close(weights(ours), list(theirs.module), rtol=0, atol=1e-12)
        assert ours.module[0].ranks == model[0].ranks
    for model, state in zip(models, before, strict=True):
        torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)
    bias = [model[0].bias.detach() for model in models]
    plain = swa_utils.AveragedModel(nn.ParameterList([bias[0]]), multi_avg_fn=multi)
    for own in bias:
        plain.update_parameters(nn.ParameterList([own]))
    torch.testing.assert_close(ours.module[0].bias, plain.module[0])


@pytest.mark.parametrize("rule", [None, gt.Budget(parameters=0.4, start=0.8, steps=60)])
def test_the_average_of_a_training_is_no_worse_than_its_end(rule):
    torch.manual_seed(0)
    weight = torch.randn(10, 4) @ torch.randn(4, 20)
    model = factorize(nn.Sequential(nn.Linear(20, 10)), 4, verbose=False)
    optimizer = TDLRT(sgd(model, momentum=0.9), model, rule)
    average = AveragedModel(model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.9))

    def loss(net):
        return (net(x) - y).square().mean()

    for _ in range(150):
        x = torch.randn(64, 20)
        y = x @ weight.T + torch.randn(64, 10)
        optimizer.zero_grad()
        loss(model).backward()
        average.update_parameters(model)  # amid a step: the weight is the same
        optimizer.step()
        average.update_parameters(model)
    x = torch.randn(2000, 20)
    y = x @ weight.T
    assert loss(average) < 1.01 * loss(model) < 0.8 * y.square().mean()
    assert average.module[0].ranks == model[0].ranks


def test_models_that_do_not_fit_change_nothing():
    average = AveragedModel(nn.Sequential(TuckerLinear(8, 6, 2)))
    state = copy.deepcopy(average.state_dict())
    with pytest.raises(ValueError, match=r"model: expected Tucker tensors of shapes \[\(6, 8\)\]"):
        average.update_parameters(nn.Sequential(TuckerConv1d(8, 6, 1, ranks=2)))
    broken = nn.Sequential(TuckerLinear(8, 6, 2))
    nn.init.constant_(broken[0].core, float("nan"))
    average.update_parameters(nn.Sequential(TuckerLinear(8, 6, 2)))
    state = copy.deepcopy(average.state_dict())
    with pytest.raises(gt.NonFiniteError, match=r"0\.core"):
        average.update_parameters(broken)
    torch.testing.assert_close(average.state_dict(), state, rtol=0, atol=0)


def test_functions_that_add_add_weights():
    model = nn.Sequential(TuckerLinear(4, 4, 4)).double()
    total = AveragedModel(model, avg_fn=lambda sum_, one, _: sum_ + one)
    for _ in range(3):
        total.update_parameters(model)
    torch.testing.assert_close(total.module[0].dense_weight(), 3 * model[0].dense_weight())
