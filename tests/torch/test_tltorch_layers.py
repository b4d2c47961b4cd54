"""Layers of tensorly-torch become ours and back, and what it gets wrong is worked around."""

import copy
import importlib
import math
import subprocess
import sys

import pytest
import tensorly as tl
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tensorly import plugins
from torch import nn

import geotucker as gt
from geotucker.testing import check_orthonormal
from geotucker_torch import (
    TDLRT,
    TuckerConv1d,
    TuckerConv2d,
    TuckerConv3d,
    TuckerEmbedding,
    TuckerLinear,
    TuckerModule,
    TuckerTensorEmbedding,
    TuckerTensorLinear,
    factorize,
    from_tltorch,
    load_weights,
    to_tltorch,
)

DOUBLE = {"dtype": torch.float64}
SIDES = st.lists(st.integers(1, 4), min_size=1, max_size=3).map(tuple)
shares_the_fixture = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


def close(a, b):
    assert a.shape == b.shape and a.dtype == b.dtype
    torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


def filled(module):
    """Give a module of theirs weights that it does not initialise well, or at all."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return module


# Theirs to ours


@shares_the_fixture
@given(
    order=st.integers(1, 3),
    stride=st.tuples(*[st.integers(1, 3)] * 3),
    padding=st.tuples(*[st.integers(0, 2)] * 3),
    dilation=st.tuples(*[st.integers(1, 2)] * 3),
    ranks=st.tuples(*[st.integers(1, 4)] * 5),  # above the dimensions, too
    bias=st.booleans(),
    implementation=st.sampled_from(["factorized", "reconstructed"]),
)
def test_convolutions(tltorch, order, stride, padding, dilation, ranks, bias, implementation):
    theirs = filled(
        tltorch.FactorizedConv(
            3, 4, (2, 3, 1)[:order], stride=stride[:order], padding=padding[:order],
            dilation=dilation[:order], rank=ranks[: order + 2], factorization="tucker",
            bias=bias, implementation=implementation, **DOUBLE,
        )
    )  # fmt: skip
    x = torch.randn(2, 3, *[8] * order, **DOUBLE)
    expected = theirs(x)
    ours = from_tltorch(theirs)
    assert type(ours) is {1: TuckerConv1d, 2: TuckerConv2d, 3: TuckerConv3d}[order]
    assert ours.bias is theirs.bias
    check_orthonormal(ours.point)
    close(ours(x), expected)
    back = to_tltorch(ours)
    assert type(back) is tltorch.FactorizedConv and back.rank == ours.ranks
    close(back(x), expected)


@shares_the_fixture
@given(
    inputs=SIDES,
    outputs=SIDES,
    rank=st.integers(1, 3),
    lead=st.sampled_from([(2,), (2, 3)]),
    bias=st.booleans(),
    implementation=st.sampled_from(["factorized", "reconstructed"]),
)
def test_linear_layers(tltorch, inputs, outputs, rank, lead, bias, implementation):
    if len(inputs) != len(outputs):
        implementation = "reconstructed"  # the other fails, see below
    theirs = filled(
        tltorch.FactorizedLinear(
            inputs, outputs, factorization="tucker", bias=bias,
            rank=(rank,) * len(inputs + outputs), implementation=implementation, **DOUBLE,
        )
    )  # fmt: skip
    x = torch.randn(*lead, int(theirs.in_features), **DOUBLE)
    expected = theirs(x)
    ours = from_tltorch(theirs)
    matrix = len(inputs) == len(outputs) == 1
    assert type(ours) is (TuckerLinear if matrix else TuckerTensorLinear)
    assert ours.bias is theirs.bias
    close(ours(x), expected)
    back = to_tltorch(ours)
    assert back.in_tensorized_features == inputs and back.out_tensorized_features == outputs
    close(back(x), expected)


# What turns indices into those of each mode is NumPy, which they give tensors.
NUMPY = "ignore:__array__ implementation:DeprecationWarning"


@pytest.mark.filterwarnings(NUMPY)
@shares_the_fixture
@given(
    rows=SIDES,
    columns=SIDES,
    rank=st.integers(1, 3),
    shape=st.sampled_from([(3,), (2, 5)]),
)
def test_embeddings(tltorch, rows, columns, rank, shape):
    number, size = math.prod(rows), math.prod(columns)
    theirs = filled(
        tltorch.FactorizedEmbedding(
            number, size, auto_tensorize=False, tensorized_num_embeddings=rows,
            tensorized_embedding_dim=columns, factorization="tucker",
            rank=(rank,) * len(rows + columns), **DOUBLE,
        )
    )  # fmt: skip
    x = torch.randint(number, shape)
    expected, table = theirs(x), theirs(torch.arange(number))
    ours = from_tltorch(theirs)
    matrix = len(rows) == len(columns) == 1
    assert type(ours) is (TuckerEmbedding if matrix else TuckerTensorEmbedding)
    check_orthonormal(ours.point)
    close(ours(x), expected)
    close(ours.dense_weight(), table)
    back = to_tltorch(ours)
    assert type(back) is tltorch.FactorizedEmbedding
    assert back.tensor_shape == (rows, columns) and tuple(back.rank) == ours.ranks
    close(back(x), expected)
    assert from_tltorch(back).ranks == ours.ranks


@pytest.mark.filterwarnings(NUMPY)
def test_embeddings_as_they_build_them(tltorch):
    for module in (
        tltorch.FactorizedEmbedding(60, 20, factorization="tucker", rank=(2,) * 4,
                                    n_tensorized_modes=2),
        tltorch.FactorizedEmbedding.from_embedding(nn.Embedding(60, 20), 2 * (3,) + 2 * (2,),
                                                   "tucker"),
    ):  # fmt: skip
        filled(module).double()
        x = torch.randint(60, (4, 3))
        expected = module(x)
        ours = from_tltorch(nn.Sequential(module.eval()))[0]
        assert type(ours) is TuckerTensorEmbedding and not ours.training
        close(ours(x), expected)


@shares_the_fixture
@given(inputs=SIDES, outputs=SIDES, rank=st.integers(1, 3), bias=st.booleans())
def test_regression_layers(tltorch, inputs, outputs, rank, bias):
    theirs = filled(
        tltorch.TRL(
            inputs, outputs, bias=bias, factorization="tucker",
            rank=(rank,) * len(inputs + outputs), **DOUBLE,
        )
    )  # fmt: skip
    x = torch.randn(5, *inputs, **DOUBLE)
    expected = theirs(x)
    ours = from_tltorch(theirs)
    close(ours(x), expected)
    back = to_tltorch(ours)
    assert type(back[1]) is tltorch.FactorizedLinear
    close(back(x), expected)


def test_whole_models_keep_modes_biases_and_what_is_shared(tltorch):
    linear = filled(tltorch.FactorizedLinear((2, 3), (2, 3), factorization="tucker", rank=(2,) * 4))
    linear.weight.core.requires_grad_(False)
    model = nn.Sequential(linear, nn.Tanh(), linear).eval()
    x = torch.randn(4, 6)
    expected = model(x)
    assert from_tltorch(model) is model
    assert model[0] is model[2] and isinstance(model[0], TuckerTensorLinear)
    assert not model[0].training and not model[0].core.requires_grad
    assert not any(factor.requires_grad for factor in model[0].factors)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
    to_tltorch(model)
    assert model[0] is model[2] and not model[0].training
    assert not any(p.requires_grad for p in model[0].weight.parameters())
    assert model[0].bias.requires_grad


def test_a_random_state_is_not_touched(tltorch):
    layer = TuckerTensorLinear((2, 3), (2, 3), 2)
    state = torch.get_rng_state()
    from_tltorch(to_tltorch(layer))
    assert torch.equal(state, torch.get_rng_state())


def test_half_precision(tltorch):
    theirs = filled(tltorch.FactorizedConv(3, 4, (3,), factorization="tucker", rank=(2, 2, 2)))
    ours = from_tltorch(theirs.to(torch.bfloat16))
    assert {p.dtype for p in ours.parameters()} == {torch.bfloat16}


def stays(tltorch):
    tucker = {"factorization": "tucker", "rank": 0.5}
    conv = filled(tltorch.FactorizedConv(3, 4, (3, 3), **tucker))
    hooked = tltorch.FactorizedConv(3, 4, (3, 3), **tucker)
    hooked.register_forward_hook(lambda *_: None)
    dropped = tltorch.FactorizedConv(3, 4, (3, 3), **tucker)
    tltorch.tensor_hooks.tensor_dropout(dropped.weight, 0.5)
    derived = type("Derived", (tltorch.FactorizedConv,), {})(3, 4, (3, 3), **tucker)
    assert from_tltorch(copy.deepcopy(conv)) is not conv  # the others differ from it
    tied = nn.Sequential(conv, tltorch.FactorizedConv(3, 4, (3, 3), **tucker))
    tied[1].weight = conv.weight
    return {
        "hooked": hooked,
        "tied": tied,
        "dropped": dropped,
        "derived": derived,
        "joint": tltorch.FactorizedConv(3, 4, (3, 3), n_layers=2, **tucker),
        "joint linear": tltorch.FactorizedLinear((2, 2), (2, 2), n_layers=2, **tucker),
        "joint regression": tltorch.TRL((2, 2), (2,), n_layers=2, **tucker),
        "cp": tltorch.FactorizedConv(3, 4, (3, 3), factorization="cp", rank=3),
        "joint embedding": tltorch.FactorizedEmbedding(16, 4, n_layers=2, **tucker),
        "contraction": tltorch.TCL((4, 3), 2),
        "dense": nn.Linear(3, 4),
        "complex": spectral(tltorch),
    }


NAMES = [
    "hooked", "tied", "dropped", "derived", "joint", "joint linear", "joint regression", "cp",
    "joint embedding", "contraction", "dense", "complex",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_what_has_no_counterpart_stays(tltorch, name):
    module = stays(tltorch)[name]
    assert from_tltorch(module) is module
    assert not any(isinstance(m, TuckerModule) for m in module.modules())


@pytest.mark.parametrize(
    "layer",
    [
        TuckerConv2d(4, 4, 3, 2, groups=2),
        TuckerConv2d(4, 4, 3, 2, padding=1, padding_mode="circular"),
        TuckerConv2d(4, 4, 2, 2, padding="same"),
        type("Derived", (TuckerLinear,), {})(4, 4, 2),
        TuckerTensorEmbedding((2, 3), (4,), 2, padding_idx=0),
        TuckerEmbedding(6, 4, 2, scale_grad_by_freq=True),
    ],
    ids=["groups", "padding mode", "uneven padding", "subclass", "padding index", "frequencies"],
)
def test_what_they_do_not_have_stays_ours(tltorch, layer):
    assert to_tltorch(layer) is layer


def test_tied_layers_and_projections_of_attention_stay_ours(tltorch):
    tied = nn.Sequential(TuckerLinear(4, 4, 2), TuckerLinear(4, 4, 2), TuckerLinear(4, 4, 2))
    tied[1].tie(tied[0])
    before = list(tied)
    to_tltorch(tied)
    assert [new is old for new, old in zip(tied, before, strict=True)] == [True, True, False]
    model = factorize(nn.Sequential(nn.MultiheadAttention(16, 2)), 2, verbose=False)
    assert isinstance(to_tltorch(model)[0].q_proj, TuckerLinear)


def test_a_lift_does_not_leave_the_layer(tltorch):
    layer, x = TuckerTensorLinear((2, 3), (2, 3), 1, **DOUBLE), torch.randn(5, 6, **DOUBLE)
    optimizer = TDLRT(torch.optim.SGD(layer.parameters(), 0.1), layer)
    layer(x).square().sum().backward()
    assert optimizer.ranks[""] == (2, 2, 2, 2)
    theirs = to_tltorch(layer)
    assert tuple(theirs.weight.core.shape) == (1, 1, 1, 1)
    close(theirs(x), layer(x))


def test_only_modules_are_taken():
    for convert in (from_tltorch, to_tltorch):
        with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got int"):
            convert(3)


def test_weights_that_are_not_finite_replace_nothing(tltorch):
    conv = filled(tltorch.FactorizedConv(3, 3, (3,), factorization="tucker", rank=(2, 2, 2)))
    model = nn.Sequential(conv, copy.deepcopy(conv))
    with torch.no_grad():
        model[1].weight.core[0, 0, 0] = float("nan")
    with pytest.raises(gt.NonFiniteError, match=r"layer '1'"):
        from_tltorch(model)
    assert not any(isinstance(m, TuckerModule) for m in model.modules())


def test_without_tensorly_torch_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "tltorch", None)
    with pytest.raises(ImportError, match=r"geotucker\[tltorch\]"):
        to_tltorch(TuckerLinear(3, 3, 1))
    assert tl.get_backend() == "numpy"


def test_the_backend_stays():
    script = (
        "import tensorly as tl, sys, torch\n"
        "from geotucker_torch import TDLRT, TuckerLinear, factorize, from_tltorch, to_tltorch\n"
        "model = factorize(torch.nn.Linear(8, 8), 2, verbose=False)\n"
        "TDLRT(torch.optim.SGD(model.parameters(), 0.1), model)\n"
        "from_tltorch(torch.nn.Linear(2, 2))\n"
        "assert 'tltorch' not in sys.modules and tl.get_backend() == 'numpy'\n"
        "model = to_tltorch(TuckerLinear(4, 4, 2))\n"
        "assert 'tltorch' in sys.modules and tl.get_backend() == 'numpy'\n"
        "assert isinstance(from_tltorch(model), TuckerLinear) and tl.get_backend() == 'numpy'\n"
    )
    path = f"import sys; sys.path[:0] = {[p for p in sys.path if p]!r}\n"
    subprocess.run([sys.executable, "-W", "ignore", "-c", path + script], check=True)


# The rest trains in place


def train(model, call, target, steps=30, rule=None):
    adam = torch.optim.Adam(model.parameters(), 0.02)
    optimizer = TDLRT(adam, model, rule)

    def closure():
        optimizer.zero_grad()
        loss = (call() - target).abs().square().mean()
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(steps)]
    assert losses[-1] < losses[0]
    return optimizer


@pytest.mark.filterwarnings(NUMPY)
def test_embeddings_train_in_place(tltorch):
    torch.manual_seed(0)
    embedding = tltorch.FactorizedEmbedding(16, 6, factorization="tucker", rank=(2,) * 4,
                                            n_tensorized_modes=2)  # fmt: skip
    filled(embedding)
    indices = torch.tensor([1, 5, 9, 15])
    optimizer = train(embedding, lambda: embedding(indices), torch.ones(4, 6), rule=gt.Fixed(1))
    assert optimizer.ranks == {"weight": (1, 1, 1, 1)} and tuple(embedding.rank) == (1, 1, 1, 1)


def test_contraction_layers_are_stepped_by_the_wrapped_optimizer(tltorch):
    torch.manual_seed(0)
    model = nn.Sequential(tltorch.TCL((4, 3), (2, 2)), nn.Flatten(), TuckerLinear(4, 3, 2))
    x, before = torch.randn(8, 4, 3), model[0].factor_0.detach().clone()
    optimizer = train(model, lambda: model(x), torch.ones(8, 3))
    assert list(optimizer.ranks) == ["2"] and not torch.equal(model[0].factor_0, before)


def test_a_converted_model_trains_without_a_closure_as_it_would_with_one(tltorch):
    torch.manual_seed(0)
    theirs = tltorch.FactorizedLinear(
        (2, 4), (2, 3), factorization="tucker", rank=(2,) * 4, **DOUBLE
    )
    filled(theirs)
    ours, x = from_tltorch(copy.deepcopy(theirs)), torch.randn(9, 8, **DOUBLE)
    for model in (theirs, ours):
        sgd = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
        optimizer = TDLRT(sgd, model, integrator="tdlrt")

        def closure(net=model, opt=optimizer):
            opt.zero_grad()
            loss = (net(x) - 1).square().mean()
            loss.backward()
            return loss

        for _ in range(3):
            if model is theirs:
                optimizer.step(closure)
            else:
                closure()
                optimizer.step()
    close(ours(x), theirs(x))


def spectral(tltorch):
    """Build what neuraloperator's spectral convolution does: complex, of the plain type."""

    class Spectral(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = tltorch.FactorizedTensor.new(
                (4, 4, 5), rank=(3, 3, 3), factorization="tucker", dtype=torch.cfloat
            )
            filled(self.weight)

        def forward(self, x):
            spectrum = torch.fft.rfft(x)
            weight = self.weight.to_tensor()
            low = torch.einsum("bik,oik->bok", spectrum[..., :5], weight)
            return torch.fft.irfft(low, n=x.shape[-1])

    return Spectral()


def test_complex_tensors_are_left_alone(tltorch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(2, 4, 1), spectral(tltorch), nn.Conv1d(4, 8, 3))
    factorize(model, 2, verbose=False)
    with pytest.raises(ValueError, match="found none"):
        TDLRT(torch.optim.Adam(model[1].parameters()), model[1])
    before = model[1].weight.core.detach().clone()
    x = torch.randn(3, 2, 16)
    optimizer = train(model, lambda: model(x), torch.ones(3, 8, 14))
    assert list(optimizer.ranks) == ["2"]
    assert not torch.equal(model[1].weight.core, before)  # by the wrapped optimizer


@pytest.fixture
def neuralop(tltorch, monkeypatch):
    """neuraloperator, with TensorLy's einsum put back afterwards (its import replaces it)."""
    monkeypatch.setitem(sys.modules, "wandb", None)  # it does without; wandb is slow to import
    yield importlib.import_module("neuralop")  # a missing one is an error, not a skip
    plugins.use_default_einsum()


def test_tfno_trains_at_ranks_that_adapt(neuralop):
    def build():
        torch.manual_seed(0)
        return neuralop.models.TFNO(
            n_modes=(6, 6), hidden_channels=12, in_channels=1, out_channels=1, n_layers=2,
            factorization="tucker", rank=0.4,
        )  # fmt: skip

    def loss_of(model):
        return (model(x) - target).square().mean()

    x = torch.randn(8, 1, 16, 16)
    target = x.cumsum(-1) / 4
    plain, model = build(), factorize(build(), 0.5, verbose=False)
    assert isinstance(model.fno_blocks.channel_mlp[0].fcs[0], TuckerConv1d)
    layers = {name: m.ranks for name, m in model.named_modules() if isinstance(m, TuckerModule)}
    spectral = model.fno_blocks.convs[0].weight.core
    assert spectral.is_complex()
    start, before = loss_of(model).item(), spectral.detach().clone()

    optimizer = train(model, lambda: model(x), target, 20, gt.Budget(parameters=0.9))
    adam = torch.optim.Adam(plain.parameters(), 0.02)
    for _ in range(20):
        adam.zero_grad()
        loss_of(plain).backward()
        adam.step()

    assert optimizer.ranks.keys() == layers.keys()  # the spectral weights are not among them
    assert optimizer.ranks != layers
    assert not torch.equal(spectral, before)  # the wrapped optimizer steps them
    size, whole = (sum(p.numel() for p in m.parameters()) for m in (model, plain))
    assert size <= 0.9 * whole
    gained, expected = start - loss_of(model).item(), start - loss_of(plain).item()
    assert gained > 0.5 * expected > 0


# What tensorly-torch gets wrong. Each fails when that is mended; then the workaround can go.


def converted(tltorch, conv):
    """Go from a dense convolution to theirs by way of ours, at full ranks."""
    kind = {nn.Conv1d: TuckerConv1d, nn.Conv2d: TuckerConv2d}[type(conv)]
    return to_tltorch(kind.from_dense(conv, gt.Tolerance(0.0)))


def from_conv(tltorch, conv, rank="same"):
    return tltorch.FactorizedConv.from_conv(conv, rank=rank, factorization="tucker")


def test_defect_the_first_stride_is_taken_for_all(tltorch):
    conv, x = nn.Conv2d(3, 4, 3, stride=(1, 2)), torch.randn(1, 3, 8, 8)
    assert from_conv(tltorch, conv)(x).shape != conv(x).shape
    torch.testing.assert_close(converted(tltorch, conv)(x), conv(x), rtol=1e-4, atol=1e-5)


def test_defect_padding_in_words_fails(tltorch):
    conv, x = nn.Conv2d(3, 4, 3, padding="same"), torch.randn(1, 3, 8, 8)
    with pytest.raises(Exception):  # noqa: B017, PT011 - whatever it raises
        from_conv(tltorch, conv)(x)
    torch.testing.assert_close(converted(tltorch, conv)(x), conv(x), rtol=1e-4, atol=1e-5)


def test_defect_padding_modes_are_ignored(tltorch):
    conv, x = nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"), torch.randn(1, 3, 8, 8)
    wrong = from_conv(tltorch, conv, (4, 3, 3, 3))(x)
    assert wrong.shape == conv(x).shape and not torch.allclose(wrong, conv(x), atol=1e-2)
    ours = converted(tltorch, conv)  # stays ours rather than be wrong
    torch.testing.assert_close(ours(x), conv(x), rtol=1e-4, atol=1e-5)


def test_defect_groups_fail(tltorch):
    conv, x = nn.Conv2d(4, 4, 3, groups=2), torch.randn(1, 4, 8, 8)
    with pytest.raises(Exception):  # noqa: B017, PT011 - whatever it raises
        from_conv(tltorch, conv)(x)
    torch.testing.assert_close(converted(tltorch, conv)(x), conv(x), rtol=1e-4, atol=1e-5)


def test_defect_bfloat16_fails(tltorch):
    conv = nn.Conv2d(3, 4, 3, dtype=torch.bfloat16)
    with pytest.raises(Exception):  # noqa: B017, PT011 - whatever it raises
        from_conv(tltorch, conv)
    assert converted(tltorch, conv).weight.core.dtype == torch.bfloat16


def test_defect_a_fraction_leaves_nothing_of_the_kernel(tltorch):
    conv = nn.Conv2d(32, 32, 3)
    theirs = from_conv(tltorch, conv, rank=0.1)
    assert 1 in theirs.weight.core.shape[2:]
    assert min(TuckerConv2d.from_dense(conv, 0.1).ranks[2:]) > 1


def test_defect_a_tensor_that_is_given_is_registered_twice(tltorch):
    weight = tltorch.FactorizedTensor.new((4, 3, 3, 3), rank=(2,) * 4, factorization="tucker")
    theirs = tltorch.FactorizedConv(3, 4, (3, 3), factorization=weight)
    assert "factorization.core" in theirs.state_dict()
    assert "factorization.core" not in to_tltorch(TuckerConv2d(3, 4, 3, 2)).state_dict()


def test_defect_unequal_numbers_of_modes_fail(tltorch):
    theirs = tltorch.FactorizedLinear((2, 2), (4,), factorization="tucker", rank=(1, 1, 1))
    with pytest.raises(ValueError, match="same number of modes"):
        theirs(torch.ones(1, 4))
    ours = TuckerTensorLinear((2, 2), (4,), 1)
    torch.testing.assert_close(to_tltorch(ours)(torch.ones(1, 4)), ours(torch.ones(1, 4)))


def test_defect_ranks_are_kept_beside_the_tensor(tltorch):
    conv = to_tltorch(TuckerConv2d(3, 4, 3, 2))
    conv.weight.core = nn.Parameter(torch.zeros(1, 1, 1, 1))
    conv.weight.factors = tltorch.factorized_tensors.core.nn.ParameterList(
        nn.Parameter(torch.zeros(n, 1)) for n in (4, 3, 3, 3)
    )
    assert conv.rank == conv.weight.rank == (2, 2, 2, 2)  # stale
    assert from_tltorch(conv).ranks == (1, 1, 1, 1)


def test_defect_other_ranks_cannot_be_loaded(tltorch):
    small, large = (to_tltorch(TuckerConv2d(3, 4, 3, rank)) for rank in (1, 2))
    with pytest.raises(RuntimeError, match="size mismatch"):
        small.load_state_dict(large.state_dict())
    load_weights(small, large.state_dict())
    x = torch.randn(1, 3, 5, 5)
    torch.testing.assert_close(small(x), large(x))


def test_defect_importing_it_switches_the_backend():
    script = "import tensorly as tl, tltorch; assert tl.get_backend() == 'pytorch'"
    subprocess.run([sys.executable, "-W", "ignore", "-c", script], check=True)
