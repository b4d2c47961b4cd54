"""The layers as modules: start, conversion, state_dict at any rank, copies, errors."""

import copy
import io
import math
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import geotucker as gt
from geotucker_torch import (
    TDLRT,
    TuckerConv1d,
    TuckerConv2d,
    TuckerConv3d,
    TuckerLinear,
    TuckerModule,
)

TUCKER: dict[type[nn.Module], type[TuckerModule]] = {
    nn.Linear: TuckerLinear,
    nn.Conv1d: TuckerConv1d,
    nn.Conv2d: TuckerConv2d,
    nn.Conv3d: TuckerConv3d,
}
DOUBLE = {"dtype": torch.float64}


def layers() -> list[TuckerModule]:
    """One layer of each kind, small, in float64."""
    torch.manual_seed(0)
    return [
        TuckerLinear(7, 5, ranks=3, **DOUBLE),
        TuckerConv1d(4, 6, 3, ranks=2, groups=2, bias=False, **DOUBLE),
        TuckerConv2d(4, 6, (3, 2), ranks=3, stride=2, padding=1, **DOUBLE),
        TuckerConv3d(4, 6, 3, 2, padding="same", padding_mode="circular", **DOUBLE),
    ]


def example(layer: nn.Module) -> Tensor:
    """Draw an input that the layer (Tucker or dense) accepts."""
    torch.manual_seed(1)
    if hasattr(layer, "in_features"):
        return torch.randn(3, layer.in_features, **DOUBLE)
    return torch.randn(2, layer.in_channels, *(6,) * len(layer.kernel_size), **DOUBLE)


every_layer = pytest.mark.parametrize("layer", layers(), ids=lambda layer: type(layer).__name__)


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def assert_orthonormal(factors: Any) -> None:
    for factor in factors:
        gram = factor.mT @ factor
        eps = torch.finfo(factor.dtype).eps
        assert (gram - torch.eye(gram.shape[0], dtype=gram.dtype)).abs().max() < 50 * eps


@st.composite
def dense_layers(draw: st.DrawFn) -> nn.Module:
    torch.manual_seed(draw(st.integers(0, 2**31)))
    bias, channels = draw(st.booleans()), st.integers(1, 5)
    order = draw(st.integers(0, 3))
    if order == 0:
        return nn.Linear(draw(channels), draw(channels), bias, **DOUBLE)
    kind = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[order]
    each = st.tuples(*(st.integers(1, 3),) * order)
    groups = draw(st.integers(1, 3))
    padding = draw(st.one_of(st.sampled_from(["same", "valid", 0, 1, 2]), each))
    return kind(
        groups * draw(channels),
        groups * draw(channels),
        draw(st.one_of(st.integers(1, 3), each)),
        stride=1 if padding == "same" else draw(st.one_of(st.integers(1, 3), each)),
        padding=padding,
        dilation=draw(st.integers(1, 2)),
        groups=groups,
        bias=bias,
        padding_mode=draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"])),
        **DOUBLE,
    )


# From dense and back


@given(layer=dense_layers())
def test_full_rank_layer_equals_the_dense_one(layer: nn.Module) -> None:
    tucker = TUCKER[type(layer)].from_dense(layer, gt.Tolerance(0.0))
    x = example(layer)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Using padding='same' with even kernel")
        close(tucker(x), layer(x))
        back = tucker.to_dense()
        close(back(x), layer(x))
    assert repr(back) == repr(layer)
    assert_orthonormal(tucker.factors)
    close(tucker.dense_weight(), layer.weight)


@given(layer=dense_layers(), rank=st.integers(1, 5))
def test_truncated_layer_is_the_hosvd_of_the_weight(layer: nn.Module, rank: int) -> None:
    tucker = TUCKER[type(layer)].from_dense(layer, rank, rescale=False)
    point = gt.hosvd(layer.weight.detach(), rank)
    assert tucker.ranks == point.ranks == gt.Fixed(rank).for_shape(layer.weight.shape)
    assert tucker.shape == tuple(layer.weight.shape)
    close(tucker.dense_weight(), gt.to_dense(point))


@every_layer
def test_to_dense_computes_the_same_and_shares_nothing(layer: TuckerModule) -> None:
    dense, x = layer.to_dense(), example(layer)
    assert type(dense) is layer.dense_type
    close(dense(x), layer(x))
    before = layer(x).detach()
    with torch.no_grad():
        for parameter in dense.parameters():
            parameter.zero_()
    close(layer(x), before)


def test_from_dense_shares_nothing_with_the_dense_layer() -> None:
    dense = nn.Linear(4, 3)
    layer = TuckerLinear.from_dense(dense, 2)
    with torch.no_grad():
        dense.weight.zero_()
        dense.bias.zero_()
    assert layer.dense_weight().abs().max() > 0
    assert layer.bias is not None
    assert layer.bias.abs().max() > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_conversion_keeps_dtype_mode_and_what_is_frozen(dtype: torch.dtype) -> None:
    dense = nn.Conv2d(4, 5, 3, dtype=dtype).eval()
    dense.weight.requires_grad_(False)
    layer = TuckerConv2d.from_dense(dense, gt.Fixed(1.0))
    back = layer.to_dense()
    for module in (layer, back):
        assert {parameter.dtype for parameter in module.parameters()} == {dtype}
        assert not module.training
        assert module.bias.requires_grad
    assert not layer.core.requires_grad
    assert not back.weight.requires_grad
    exact = TuckerConv2d.from_dense(dense, gt.Tolerance(0.0))
    error = (exact.dense_weight() - dense.weight).double().norm()
    assert error <= 16 * torch.finfo(dtype).eps * dense.weight.double().norm()


def test_conversion_ignores_autocast_and_the_random_state() -> None:
    dense = nn.Linear(8, 6)
    state = torch.get_rng_state()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        layer = TuckerLinear.from_dense(dense, gt.Tolerance(0.0))
        weight = layer.to_dense().weight
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(weight, dense.weight, rtol=1e-5, atol=1e-6)


def test_parameters_are_plain_tensors_of_their_own() -> None:
    layer = TuckerConv2d.from_dense(nn.Conv2d(8, 9, 3), 2)
    for parameter in layer.parameters():
        assert parameter.is_contiguous()
        assert parameter.untyped_storage().nbytes() == parameter.numel() * 4


# What a layer shows


@every_layer
def test_shape_ranks_and_point_are_read_off_the_parameters(layer: TuckerModule) -> None:
    point = layer.point
    assert point.shape == layer.shape == tuple(layer.dense_weight().shape)
    assert point.ranks == layer.ranks == tuple(layer.core.shape)
    assert not any(array.requires_grad for array in (point.core, *point.factors))
    assert point.core.data_ptr() == layer.core.data_ptr()
    close(gt.to_dense(point), layer.dense_weight())
    assert torch.equal(layer.weight, layer.dense_weight())


def test_bases_are_parameters_that_ask_for_no_gradient() -> None:
    layer = TuckerConv2d(4, 6, 3, ranks=2)
    names = ["core", "bias", *(f"factors.{i}" for i in range(4))]
    assert sorted(dict(layer.named_parameters())) == sorted(names)
    layer(torch.randn(1, 4, 5, 5)).sum().backward()
    graded = {name for name, p in layer.named_parameters() if p.grad is not None}
    assert graded == {"core", "bias"}


def test_repr_says_options_ranks_and_sizes() -> None:
    text = repr(TuckerLinear(20, 10, ranks=3))
    assert "in_features=20, out_features=10, bias=True, ranks=(3, 3)" in text
    assert "weight parameters 99 of 200" in text
    layer = TuckerConv2d(4, 6, 3, 2, stride=2, groups=2, bias=False, padding_mode="reflect")
    plain = "4, 6, kernel_size=(3, 3), stride=(2, 2), groups=2, padding_mode=reflect, bias=False"
    assert plain in repr(layer)
    assert "padding=same" in repr(TuckerConv1d(2, 2, 3, padding="same"))


def test_a_weight_cannot_be_assigned() -> None:
    layer = TuckerLinear(4, 3)
    with pytest.raises(KeyError, match="weight"):
        layer.weight = nn.Parameter(torch.zeros(3, 4))  # type: ignore[misc]


def test_encoders_with_tucker_layers_run_on_their_fast_path() -> None:
    torch.manual_seed(0)
    block = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, **DOUBLE)
    encoder = nn.TransformerEncoder(block, 1).eval()
    first = encoder.layers[0]
    first.linear1 = TuckerLinear.from_dense(first.linear1, 3)  # type: ignore[assignment]
    x = torch.randn(2, 5, 8, **DOUBLE)
    mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    slow = encoder(x, src_key_padding_mask=mask).detach()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The PyTorch API of nested tensors")
        fast = encoder(x, src_key_padding_mask=mask)
    close(fast[~mask], slow[~mask])


def test_layers_compile_into_one_graph() -> None:
    torch.manual_seed(0)
    conv = TuckerConv2d(4, 6, 3, ranks=2, groups=2, padding="same", padding_mode="reflect")
    model = nn.Sequential(conv, nn.Flatten(), TuckerLinear(6 * 36, 5, ranks=3))
    compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=True)
    for batch in (3, 1):
        x = torch.randn(batch, 4, 6, 6)
        torch.testing.assert_close(compiled(x), model(x))


# The start


@pytest.mark.parametrize("ranks", [1, 3, (2, 4), 0.5, 1.0])
def test_linear_starts_with_the_variance_of_the_dense_layer(ranks: Any) -> None:
    torch.manual_seed(0)
    layer, dense = TuckerLinear(12, 16, ranks), nn.Linear(12, 16)
    compare_starts(layer, dense)


@pytest.mark.parametrize("ranks", [1, 2, (4, 3, 1, 3), 1.0])
@pytest.mark.parametrize("groups", [1, 2])
def test_conv_starts_with_the_variance_of_the_dense_layer(ranks: Any, groups: int) -> None:
    torch.manual_seed(0)
    options = {"kernel_size": 3, "groups": groups}
    compare_starts(TuckerConv2d(6, 8, ranks=ranks, **options), nn.Conv2d(6, 8, **options))


def compare_starts(layer: TuckerModule, dense: Any, draws: int = 300) -> None:
    ours, theirs, shifts = [], [], []
    for _ in range(draws):
        layer.reset_parameters()
        dense.reset_parameters()
        ours.append(layer.dense_weight().detach())
        theirs.append(dense.weight.detach().clone())
        assert layer.bias is not None
        shifts.append(torch.stack([layer.bias.detach(), dense.bias.detach()], 1))
    assert_orthonormal(layer.factors)
    fan_in = math.prod(layer.shape[1:])
    weights = torch.stack(ours)
    # ||W||^2 / prod n_i is a mean over prod r_i independent core entries, for each draw.
    samples = draws * math.prod(layer.ranks)
    ratio = weights.square().mean() * 3 * fan_in
    assert abs(ratio - 1) < 5 * math.sqrt(2 / samples)
    assert abs(torch.stack(theirs).square().mean() * 3 * fan_in - 1) < 0.05
    # No entry is favoured: all have the mean 0, and all slices the common variance.
    assert (weights.mean(0) * math.sqrt(3 * fan_in * draws)).abs().max() < 6
    for mode in range(1, weights.dim()):
        others = [axis for axis in range(weights.dim()) if axis != mode]
        assert (weights.square().mean(others) * 3 * fan_in - 1).abs().max() < 0.8
    bound = 1 / math.sqrt(fan_in)
    for largest in (torch.cat(shifts).amax(0), -torch.cat(shifts).amin(0)):
        assert ((largest <= bound) & (largest > 0.9 * bound)).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_starts(dtype: torch.dtype) -> None:
    layer = TuckerLinear(40, 30, 8, dtype=dtype)
    gram = layer.factors[0].float().mT @ layer.factors[0].float()
    assert (gram - torch.eye(8)).abs().max() < 8 * torch.finfo(dtype).eps
    assert layer.core.dtype == dtype
    assert torch.isfinite(layer(torch.ones(2, 40, dtype=dtype))).all()


@every_layer
def test_arguments_mean_what_they_mean_in_torch(layer: TuckerModule) -> None:
    dense = layer.to_dense()
    names = [name for name in layer._options if name != "ranks"]
    assert {name: getattr(layer, name) for name in names} == {
        name: getattr(dense, name) for name in names
    }


# state_dict, copies, conversions


def test_state_dict_has_the_documented_keys() -> None:
    keys = ["core", "bias", "factors.0", "factors.1"]
    assert sorted(TuckerLinear(4, 3, 2).state_dict()) == sorted(keys)
    assert sorted(TuckerLinear(4, 3, 2, bias=False).state_dict()) == ["core", *keys[2:]]


def resized(layer: TuckerModule, ranks: Any) -> TuckerModule:
    return type(layer).from_dense(layer.to_dense(), ranks)


@pytest.mark.parametrize("ranks", [1, 2, 4, gt.Tolerance(0.0)], ids=str)
@every_layer
def test_state_of_any_ranks_loads(layer: TuckerModule, ranks: Any) -> None:
    source, target = resized(layer, ranks), resized(layer, 2)
    model = nn.Sequential(target)
    objects = dict(model.named_parameters())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    result = model.load_state_dict(nn.Sequential(source).state_dict())
    assert not result.missing_keys
    assert target.ranks == source.ranks
    assert all(objects[name] is p for name, p in model.named_parameters())
    assert [p.requires_grad for p in target.parameters()] == [
        p.requires_grad for p in source.parameters()
    ]
    for parameter in model.parameters():  # a stale gradient would break the next step
        assert parameter.grad is None or parameter.grad.shape == parameter.shape
    close(target(example(layer)), source(example(layer)))
    with torch.no_grad():
        source.core.zero_()
    assert target.core.abs().max() > 0


@pytest.mark.parametrize("on_meta", [False, True])
def test_state_of_other_ranks_is_assigned(on_meta: bool) -> None:
    source = TuckerConv2d(4, 6, 3, ranks=3)
    target = TuckerConv2d(4, 6, 3, ranks=1, device="meta" if on_meta else None)
    target.load_state_dict(source.state_dict(), assign=True)
    assert target.ranks == (3, 3, 3, 3)
    assert target.core.device.type == "cpu"
    assert [p.requires_grad for p in target.factors] == [False] * 4
    x = torch.randn(1, 4, 5, 5)
    torch.testing.assert_close(target(x), source(x))


def test_meta_layer_takes_over_shapes_without_data() -> None:
    target = TuckerLinear(6, 5, ranks=1, device="meta")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*copying from a non-meta parameter")
        target.load_state_dict(TuckerLinear(6, 5, ranks=4).state_dict())
    assert target.ranks == (4, 4)
    assert target.core.is_meta


def test_training_goes_on_after_loading_other_ranks() -> None:
    layer = TuckerLinear(6, 5, ranks=1)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    layer(torch.ones(2, 6)).sum().backward()
    layer.load_state_dict(TuckerLinear(6, 5, ranks=3).state_dict())
    before = layer.core.detach().clone()
    layer(torch.ones(2, 6)).sum().backward()
    optimizer.step()
    assert not torch.equal(layer.core, before)


def test_other_ranks_load_while_an_older_loss_is_alive() -> None:
    layer, source = TuckerLinear(6, 5, ranks=3, **DOUBLE), TuckerLinear(6, 5, ranks=1, **DOUBLE)
    x = torch.randn(4, 6, **DOUBLE)
    old = layer(x).sum()
    layer.load_state_dict(source.state_dict())
    layer(x).sum().backward()
    source(x).sum().backward()
    assert layer.core.grad is not None
    close(layer.core.grad, source.core.grad)
    assert torch.isfinite(old)


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_a_loaded_state_outlives_a_lift_that_no_step_has_used(ranks: int) -> None:
    layer, source = TuckerLinear(10, 8, ranks=2), TuckerLinear(10, 8, ranks=ranks)
    layer.armed, layer._lift.trained = True, layer.core  # as an optimizer sets them
    layer(torch.randn(4, 10)).sum().backward()
    assert layer.narrow is not None
    layer.load_state_dict(source.state_dict())
    layer.unlift()
    assert torch.equal(layer.dense_weight(), source.dense_weight())
    assert layer.armed


def change(state: dict[str, Tensor], key: str, shape: tuple[int, ...]) -> None:
    state[key] = torch.full(shape, 7.0)


@pytest.mark.parametrize(
    ("key", "shape", "named"),
    [
        ("factors.0", (8, 3), "factors.0"),  # another number of outputs
        ("factors.1", (9, 3), "factors.1"),  # of inputs
        ("factors.1", (6, 2), "factors.1"),  # a factor that does not fit the core
        ("core", (3, 2), "factors.1"),  # likewise
        ("core", (3, 3, 1), "core"),  # another order
        ("core", (6, 3), "core"),  # more columns than rows: no basis
        ("bias", (4,), "bias"),
    ],
)
@pytest.mark.parametrize("assign", [False, True])
def test_state_that_does_not_fit_changes_nothing(
    key: str, shape: tuple[int, ...], named: str, assign: bool
) -> None:
    layer = TuckerLinear(6, 5, ranks=2)
    state = TuckerLinear(6, 5, ranks=3).state_dict()
    change(state, key, shape)
    objects = list(layer.parameters())
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(RuntimeError, match=f"size mismatch for {named}: copying a param with"):
        layer.load_state_dict(state, assign=assign)
    assert all(a is b for a, b in zip(layer.parameters(), objects, strict=True))
    for name, tensor in layer.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert torch.equal(state[key], torch.full(shape, 7.0))  # neither is the state
    layer(torch.ones(6)).sum().backward()


def test_part_of_a_state_loads_only_at_equal_ranks() -> None:
    layer = TuckerLinear(6, 5, ranks=2)
    same = {"core": torch.ones(2, 2)}
    assert "factors.0" in layer.load_state_dict(same, strict=False).missing_keys
    assert torch.equal(layer.core, torch.ones(2, 2))
    with pytest.raises(RuntimeError, match="size mismatch for core"):
        layer.load_state_dict({"core": torch.ones(3, 3)}, strict=False)
    assert layer.ranks == (2, 2)
    with pytest.raises(RuntimeError, match="Missing key"):
        layer.load_state_dict(same)


@every_layer
def test_state_of_a_dense_layer_is_decomposed_at_the_ranks_of_the_layer(
    layer: TuckerModule,
) -> None:
    dense = layer.to_dense()
    target, expected = resized(layer, 2), type(layer).from_dense(dense, 2)
    model, state = nn.Sequential(target), nn.Sequential(dense).state_dict()
    objects = dict(model.named_parameters())
    keys = list(state)
    result = model.load_state_dict(state)
    assert not result.missing_keys and list(state) == keys
    assert all(objects[name] is p for name, p in model.named_parameters())
    assert [p.requires_grad for p in target.factors] == [False] * len(target.factors)
    close(target.dense_weight(), expected.dense_weight())
    if dense.bias is not None:
        assert torch.equal(target.bias, dense.bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_of_a_dense_layer_is_assigned_to_a_layer_without_data(dtype: torch.dtype) -> None:
    dense = nn.Linear(6, 5, dtype=dtype)
    target = TuckerLinear(6, 5, ranks=5, device="meta")
    target.load_state_dict(dense.state_dict(), assign=True)
    assert {p.dtype for p in target.parameters()} == {dtype}
    assert [p.requires_grad for p in target.factors] == [False] * 2
    rounding = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(target.dense_weight(), dense.weight, rtol=rounding, atol=rounding)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.ones(6, 5), r"size mismatch for weight: .*\[6, 5\]\) from .*\[5, 6\]\)"),
        (torch.full((5, 6), float("nan")), "While decomposing weight: .*NaN"),
        (torch.ones(5, 6, device="meta"), "While decomposing weight: .*without values"),
    ],
)
def test_a_dense_weight_that_does_not_fit_changes_nothing(weight: Tensor, message: str) -> None:
    layer = TuckerLinear(6, 5, ranks=2)
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(RuntimeError, match=message):
        layer.load_state_dict({"weight": weight, "bias": torch.ones(5)})
    for name, tensor in layer.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_a_dense_weight_beside_a_core_is_unexpected() -> None:
    layer = TuckerLinear(6, 5, ranks=2)
    state = {**layer.state_dict(), "weight": torch.ones(5, 6)}
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"weight"'):
        layer.load_state_dict(state)
    assert layer.load_state_dict(state, strict=False).unexpected_keys == ["weight"]


def test_the_state_amid_a_step_is_that_from_before_the_lift() -> None:
    model = nn.Sequential(TuckerLinear(10, 8, ranks=2))
    before = copy.deepcopy(model.state_dict())
    optimizer = TDLRT(torch.optim.SGD(model.parameters(), 0.1), model)
    model(torch.randn(4, 10)).sum().backward()
    assert model[0].armed is False
    assert model[0].core.shape == (4, 4)
    assert optimizer.ranks == {"0": (4, 4)}
    state = model.state_dict()
    assert list(state) == list(before)
    assert all(torch.equal(state[name], before[name]) for name in before)
    kept = model.state_dict(keep_vars=True)
    assert all(kept[name] is p for name, p in model.named_parameters())
    with torch.no_grad():
        model[0].core += 1.0  # by hand: that is to be seen
    assert model.state_dict()["0.core"].shape == (4, 4)


def test_extra_parameters_of_a_subclass_load_as_usual() -> None:
    class Scaled(TuckerLinear):
        def __init__(self, ranks: int) -> None:
            super().__init__(6, 5, ranks)
            self.scale = nn.Parameter(torch.ones(2))

    source, target = Scaled(3), Scaled(1)
    with torch.no_grad():
        source.scale.fill_(4.0)
    target.load_state_dict(source.state_dict())
    assert target.ranks == (3, 3)
    assert torch.equal(target.scale, source.scale)


@every_layer
def test_copies_and_pickles_compute_the_same(layer: TuckerModule) -> None:
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(layer), torch.load(buffer, weights_only=False)):
        assert repr(other) == repr(layer)
        assert [p.requires_grad for p in other.parameters()] == [
            p.requires_grad for p in layer.parameters()
        ]
        close(other(example(layer)), layer(example(layer)))
        assert other.core.data_ptr() != layer.core.data_ptr()


@every_layer
def test_modules_change_dtype_as_a_whole(layer: TuckerModule) -> None:
    layer, wanted = copy.deepcopy(layer), layer.dense_weight().detach()
    core = layer.core
    for convert, dtype in [
        (TuckerModule.float, torch.float32),
        (TuckerModule.half, torch.float16),
        (TuckerModule.bfloat16, torch.bfloat16),
        (TuckerModule.double, torch.float64),
        (lambda module: module.to(torch.float32), torch.float32),
    ]:
        convert(layer)
        assert {parameter.dtype for parameter in layer.parameters()} == {dtype}
        assert layer.core is core
        assert layer(example(layer).to(dtype)).dtype == dtype
    assert (layer.dense_weight() - wanted).abs().max() < 0.05 * wanted.abs().max()


def test_meta_layers_have_shapes_only() -> None:
    layer = TuckerConv2d(4, 6, 3, ranks=2, device="meta")
    assert all(parameter.is_meta for parameter in layer.parameters())
    assert layer(torch.empty(1, 4, 5, 5, device="meta")).shape == (1, 6, 3, 3)
    assert layer.dense_weight().shape == (6, 4, 3, 3)
    assert "ranks=(2, 2, 2, 2)" in repr(layer)
    converted = TuckerLinear.from_dense(nn.Linear(6, 5, device="meta"), 2)
    assert converted.core.is_meta
    assert converted.to_dense().weight.is_meta


# Failures


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"in_features": 0}, "in_features: expected a positive integer, got 0"),
        ({"in_features": 2.0}, "in_features: expected a positive integer, got 2.0"),
        ({"out_features": -3}, "out_features: expected a positive integer, got -3"),
        ({"out_features": True}, "out_features: expected a positive integer, got True"),
    ],
)
def test_linear_refuses_sizes(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(gt.ShapeError, match=message):
        TuckerLinear(**({"in_features": 4, "out_features": 3} | arguments))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"in_channels": 0}, "in_channels: expected a positive integer, got 0"),
        ({"out_channels": "6"}, "out_channels: expected a positive integer, got '6'"),
        ({"groups": 0}, "groups: expected a positive integer, got 0"),
        ({"groups": 3}, "groups: expected a divisor of in_channels = 4, got 3"),
        ({"groups": 4}, "groups: expected a divisor of out_channels = 6, got 4"),
        ({"kernel_size": 0}, "kernel_size: expected an integer of at least 1 or 2 of them, got 0"),
        ({"kernel_size": (3,)}, r"kernel_size: .*, got \(3,\)"),
        ({"kernel_size": (3, 3, 3)}, r"kernel_size: .*, got \(3, 3, 3\)"),
        ({"stride": 0}, "stride: expected an integer of at least 1 or 2 of them, got 0"),
        ({"stride": (1, 2, 1)}, r"stride: .*, got \(1, 2, 1\)"),
        ({"dilation": -1}, "dilation: .*, got -1"),
        ({"padding": -1}, "padding: expected an integer of at least 0 or 2 of them, got -1"),
        ({"padding": (1, 2, 3)}, r"padding: .*, got \(1, 2, 3\)"),
        ({"padding": (1,), "padding_mode": "reflect"}, r"padding: .*, got \(1,\)"),
        ({"padding": 1.5}, "padding: .*, got 1.5"),
        ({"padding": "full"}, "padding: expected 'same', 'valid' or integers, got 'full'"),
        ({"padding": "same", "stride": 2}, "stride: expected 1 with padding='same', got 2"),
        ({"padding_mode": "zero"}, "padding_mode: expected one of .*, got 'zero'"),
    ],
)
def test_conv_refuses_arguments(arguments: dict[str, Any], message: str) -> None:
    good = {"in_channels": 4, "out_channels": 6, "kernel_size": 3}
    with pytest.raises(ValueError, match=message):
        TuckerConv2d(**(good | arguments))


@pytest.mark.parametrize("padding", [(1,), "valid"])
def test_single_numbers_in_tuples_spread_as_in_torch(padding: Any) -> None:
    layer = TuckerConv2d(4, 6, 3, stride=(2,), dilation=(1,), padding=padding, **DOUBLE)
    close(layer(example(layer)), layer.to_dense()(example(layer)))


@pytest.mark.parametrize("ranks", [0, -1, 1.5, "three", (2, 2, 2), gt.Tolerance(0.1), None])
def test_ranks_that_cannot_be_used(ranks: Any) -> None:
    with pytest.raises(gt.RankError, match="ranks"):
        TuckerLinear(6, 5, ranks)


def test_dtypes_that_cannot_be_trained() -> None:
    with pytest.raises(TypeError, match=r"dtype: expected a real floating dtype, got torch.int64"):
        TuckerLinear(6, 5, dtype=torch.int64)


def test_from_dense_refuses_other_layers() -> None:
    wanted = "layer: expected nn.Conv2d for TuckerConv2d.from_dense, got nn.Linear"
    with pytest.raises(TypeError, match=wanted):
        TuckerConv2d.from_dense(nn.Linear(4, 3))
    with pytest.raises(TypeError, match=r"expected a layer with a shape, got nn\.LazyLinear"):
        TuckerLinear.from_dense(nn.LazyLinear(3))
    with pytest.raises(ValueError, match=r"layer: .* computed from others"):
        TuckerLinear.from_dense(nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)))
    with pytest.raises(gt.RankError, match="Tolerance"):
        TuckerLinear.from_dense(nn.Linear(4, 3, device="meta"), gt.Tolerance(0.1))


def test_from_dense_refuses_weights_that_are_not_finite() -> None:
    dense = nn.Linear(4, 3)
    with torch.no_grad():
        dense.weight[0, 0] = torch.nan
    with pytest.raises(gt.NonFiniteError):
        TuckerLinear.from_dense(dense)


def test_forward_names_the_shape_it_wants() -> None:
    with pytest.raises(gt.ShapeError, match="x: expected a last dimension of 6 features"):
        TuckerLinear(6, 5)(torch.ones(2, 7))
    with pytest.raises(gt.ShapeError, match=r"x: expected shape \(batch, 4, n_1, n_2\)"):
        TuckerConv2d(4, 6, 3)(torch.ones(1, 3, 8, 8))
