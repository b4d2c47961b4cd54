"""What is measured of a model, against the dense weights in double precision."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import geotucker as gt
from geotucker_torch import (
    TDLRT,
    TuckerConv2d,
    TuckerConvTranspose1d,
    TuckerConvTranspose3d,
    TuckerEmbedding,
    TuckerLinear,
    TuckerTensorEmbedding,
    TuckerTensorLinear,
    factorize,
    spectra,
    summary,
)

from .cases import DOUBLE, convolutions, linears, training


def exact(weight, mode):
    """Return the singular values of a dense weight's unfolding."""
    unfolding = weight.detach().double().movedim(mode, 0).flatten(1)
    return torch.linalg.svdvals(unfolding).numpy()


@given(case=st.one_of(linears(), convolutions()))
def test_values_are_those_of_the_dense_weight(case):
    layer, _ = case
    measured = spectra(layer)
    (weight,) = measured.tucker
    dense = layer.dense_weight()
    assert (weight.name, weight.type) == ("", type(layer).__name__)
    assert (weight.shape, weight.ranks) == (layer.shape, layer.ranks)
    assert len(weight.modes) == len(weight.values) == len(layer.ranks)
    assert weight.parameters == layer.point.size
    assert weight.dense_parameters == dense.numel()
    assert measured.parameters == sum(p.numel() for p in layer.parameters())
    assert measured.dense_parameters == sum(p.numel() for p in layer.to_dense().parameters())
    norm = float(dense.detach().norm())
    for mode, values in enumerate(weight.values):
        singular = exact(dense, mode)[: len(values)]
        assert np.abs(np.array(values) - singular).max() <= 1e-12 * norm
        assert math.hypot(*values) == pytest.approx(norm)
        energy = weight.energy(mode)
        assert len(energy) == len(values) + 1
        assert energy[-1] == 1.0
        assert list(energy) == sorted(energy)


@given(share=st.floats(0.0, 1.0), seed=st.integers(0, 100))
def test_the_ranks_for_a_share_are_the_smallest_that_keep_it(share, seed):
    torch.manual_seed(seed)
    (weight,) = spectra(TuckerConv2d(5, 6, 3, ranks=(4, 3, 2, 3), **DOUBLE)).weights
    for mode, rank in enumerate(weight.ranks_for(share)):
        energy = weight.energy(mode)
        assert energy[rank] >= share - 1e-12
        assert rank == 1 or energy[rank - 1] < share + 1e-12


def test_a_zero_weight_keeps_everything_at_rank_one():
    layer = TuckerLinear(5, 4, ranks=3)
    nn.init.zeros_(layer.core)
    (weight,) = spectra(layer).weights
    assert weight.values == ((0.0,) * 3,) * 2
    assert weight.ranks_for(1.0) == (1, 1)
    assert set(weight.energy(0)) == {1.0}


def test_modes_have_names():
    for layer, modes in (
        (TuckerLinear(5, 4), ("out", "in")),
        (TuckerConv2d(5, 4, 3), ("out", "in", "height", "width")),
        (TuckerConvTranspose1d(5, 4, 3), ("in", "out", "width")),
        (TuckerConvTranspose3d(5, 4, 3), ("in", "out", "depth", "height", "width")),
        (TuckerEmbedding(5, 4), ("rows", "columns")),
        (TuckerTensorLinear((2, 3), (4,)), ("out 1", "in 1", "in 2")),
        (TuckerTensorEmbedding((2, 3), (4,)), ("rows 1", "rows 2", "columns 1")),
    ):
        assert spectra(layer).weights[0].modes == layer.mode_names == modes


def test_every_parameter_of_the_model_counts_once():
    shared = nn.Linear(20, 20)
    model = nn.Sequential(shared, shared, nn.Linear(20, 20), nn.LayerNorm(20), nn.Embedding(7, 20))
    model[2].weight = nn.Linear(20, 20).weight
    model.attention = nn.MultiheadAttention(4, 2)
    dense = sum(p.numel() for p in model.parameters())
    model = factorize(model, {"0": 4}, verbose=False)
    measured = spectra(model)
    assert [(weight.name, weight.type, weight.ranks) for weight in measured.weights] == [
        ("0", "TuckerLinear", (4, 4)),
        ("2", "Linear", None),
        ("4", "Embedding", None),
        ("attention.in_proj_weight", "MultiheadAttention", None),
        ("attention.out_proj", "NonDynamicallyQuantizableLinear", None),
    ]
    assert measured.dense_parameters == dense
    assert measured.parameters == sum(p.numel() for p in model.parameters())
    assert [weight.name for weight in measured.tucker] == ["0"]


def test_the_summary_shows_ranks_and_sizes():
    optimizer, _ = training()
    measured, text = spectra(optimizer), summary(optimizer)
    assert text == str(measured) == summary(measured) == summary(optimizer.model)
    lines = text.splitlines()
    assert str(optimizer.ranks["3"]) in lines[3]
    assert "dense" in lines[4]
    assert f"{measured.dense_parameters:,}" in lines[-1]
    assert f"{measured.parameters:,}" in lines[-1]
    assert lines[-2].split()[-4:] == ["43", "43", "100.0", "%"]  # biases 8 + 16 + 3, norm 8 + 8


def test_of_a_model_without_weights_the_summary_is_empty():
    assert len(summary(nn.ReLU()).splitlines()) == 5


def test_amid_a_step_the_point_from_before_is_measured():
    optimizer, backward = training()
    before = spectra(optimizer)
    backward()
    layer = optimizer.model[3]
    assert layer.ranks != layer.settled_ranks  # the bases are extended
    assert spectra(optimizer) == before
    assert before.parameters < sum(p.numel() for p in optimizer.model.parameters())


@pytest.mark.parametrize("integrator", ["tangent", "tdlrt"])
def test_looking_changes_nothing(integrator):
    looked, blind = training(integrator=integrator), training(integrator=integrator)
    for optimizer, backward in (looked, blind):
        backward()
        if optimizer is looked[0]:
            spectra(optimizer)
        optimizer.step()
    states = [optimizer.model.state_dict() for optimizer, _ in (looked, blind)]
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name])


def test_what_was_written_into_a_lifted_core_by_hand_is_measured():
    optimizer, backward = training()
    backward()
    layer = optimizer.model[3]
    with torch.no_grad():
        layer.core.fill_(1.0)
    weight = spectra(layer).weights[0]
    assert weight.ranks == layer.ranks
    assert weight.values[0][0] == pytest.approx(math.sqrt(layer.core.numel()))


def test_an_optimizer_knows_the_ranks_over_time():
    optimizer, _ = training(steps=3)
    for weight in spectra(optimizer).tucker:
        assert weight.history == optimizer.rank_history[weight.name]
        assert list(weight.history) == [0, 1, 2, 3]
    assert all(not weight.history for weight in spectra(optimizer.model).weights)


def test_operations_are_known_after_a_training_step():
    torch.manual_seed(0)
    model = factorize(nn.Sequential(nn.Linear(50, 40)), 3, verbose=False)
    optimizer = TDLRT(torch.optim.SGD(model.parameters(), lr=0.1), model)
    assert spectra(optimizer).weights[0].flops is None
    model(torch.randn(7, 50)).sum().backward()
    (weight,) = spectra(optimizer).weights  # of the bases before they were extended
    assert weight.flops == 7 * (50 * 3 + 3 * 3 + 3 * 40)
    assert weight.dense_flops == 7 * 50 * 40


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_measured_in_single(dtype):
    torch.manual_seed(0)
    layer = TuckerConv2d(6, 5, 3, ranks=3).to(dtype)
    (weight,) = spectra(layer).weights
    dense = layer.double().dense_weight()  # of the rounded factors, which are not orthonormal
    for mode, values in enumerate(weight.values):
        assert np.allclose(values, exact(dense, mode)[: len(values)], rtol=1e-4)


@pytest.mark.gpu
def test_a_model_on_the_gpu_is_measured():
    torch.manual_seed(0)
    model = factorize(nn.Sequential(nn.Linear(50, 40)), 3, verbose=False)
    host = spectra(model).weights[0]
    device = spectra(model.cuda()).weights[0]
    assert np.allclose(host.values, device.values, rtol=1e-5)


def test_tensors_of_tensorly_torch_are_measured(tltorch):
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, 3)
    tucker = tltorch.FactorizedConv.from_conv(conv, rank=(4, 3, 3, 3), factorization="tucker")
    linear = tltorch.FactorizedLinear((2, 4), (3, 4), factorization="tucker", rank=0.5)
    linear.weight.normal_(0, 0.3)
    with torch.no_grad():
        linear.weight.factors[0].mul_(2.0)  # not orthonormal
    model = nn.Sequential(tucker, linear)
    for slot, dense in zip(
        spectra(model).tucker, (tucker.weight.to_tensor(), linear.weight.to_tensor()), strict=True
    ):
        assert slot.modes == tuple(f"mode {i + 1}" for i in range(len(slot.shape)))
        assert slot.flops is None
        for mode, values in enumerate(slot.values):
            singular = exact(dense, mode)[: len(values)]
            assert np.allclose(values, singular, atol=1e-5 * singular[0])
    assert "weight" in summary(model)


def test_what_cannot_be_measured_is_named():
    with pytest.raises(TypeError, match=r"source: expected .* got dict"):
        spectra({})
    with pytest.raises(ValueError, match="'0' on the meta device"):
        spectra(nn.Sequential(TuckerLinear(5, 4, device="meta")))
    layer = TuckerLinear(5, 4)
    with torch.no_grad():
        layer.core[0, 0] = math.nan
    with pytest.raises(gt.NonFiniteError, match="layer '1'"):
        spectra(nn.Sequential(nn.ReLU(), layer))
    (weight,) = spectra(TuckerLinear(5, 4)).weights
    for share in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="energy: expected a share from 0 to 1"):
            weight.ranks_for(share)
