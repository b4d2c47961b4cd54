"""The forward maps against PyTorch's own layers on the dense weight, in float64."""

import math
import warnings
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

import geotucker as gt
from geotucker_torch import _contract
from geotucker_torch._contract import dense_weight, tucker_conv, tucker_linear
from geotucker_torch._maps import ConvMap
from geotucker_torch._plan import CONTRACTIONS, Contraction, Sizes, cheapest, flops

CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
EINSUM = {2: "ab,ia,jb->ij", 3: "abc,ia,jb,kc->ijk", 4: "abcd,ia,jb,kc,ld->ijkl"}
EINSUM |= {5: "abcde,ia,jb,kc,ld,me->ijklm"}
FORCED = [*CONTRACTIONS, None]


class Case(NamedTuple):
    """A Tucker weight, a bias or none, an input, and the options of a convolution."""

    core: Tensor
    factors: list[Tensor]
    bias: Tensor | None
    x: Tensor
    options: dict[str, Any]

    @property
    def leaves(self) -> list[Tensor]:
        """Everything that may ask for a gradient."""
        return [self.core, *self.factors, self.x, *([] if self.bias is None else [self.bias])]


def parameters(shape: tuple[int, ...], ranks: tuple[int, ...], bias: bool) -> tuple[Any, ...]:
    core = torch.randn(ranks, dtype=torch.float64, requires_grad=True)
    pairs = zip(shape, ranks, strict=True)
    factors = [torch.randn(n, r, dtype=torch.float64, requires_grad=True) for n, r in pairs]
    shift = torch.randn(shape[0], dtype=torch.float64, requires_grad=True) if bias else None
    return core, factors, shift


def inputs(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


@st.composite
def linear_cases(draw: st.DrawFn, least: int = 1) -> Case:
    torch.manual_seed(draw(st.integers(0, 2**31)))
    shape = draw(st.tuples(st.integers(least, 6), st.integers(least, 6)))
    ranks = tuple(draw(st.integers(least, n)) for n in shape)
    lead = draw(st.lists(st.integers(0, 3), max_size=3))
    return Case(*parameters(shape, ranks, draw(st.booleans())), inputs((*lead, shape[1])), {})


@st.composite
def conv_cases(draw: st.DrawFn, least: int = 1) -> Case:
    torch.manual_seed(draw(st.integers(0, 2**31)))
    order = draw(st.integers(1, 3))
    each = st.lists(st.integers(1, 3), min_size=order, max_size=order).map(tuple)
    kernel, groups = draw(each), draw(st.integers(1, 3))
    dilation = tuple(min(entry, 2) for entry in draw(each))
    numbers = st.tuples(*(st.integers(0, 3),) * order)
    padding = draw(st.one_of(st.sampled_from(["same", "valid"]), numbers))
    options = {
        "stride": (1,) * order if padding == "same" else draw(each),
        "padding": padding,
        "dilation": dilation,
        "groups": groups,
        "padding_mode": draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"])),
    }
    channels = st.integers(least, 4)
    shape = (groups * draw(channels), draw(channels), *kernel)
    ranks = tuple(draw(st.integers(least if i < 2 else 1, n)) for i, n in enumerate(shape))
    batch = draw(st.sampled_from([(), (1,), (3,)]))
    spatial = [draw(st.integers(5, 7)) for _ in kernel]  # wide enough for every option above
    x = inputs((*batch, groups * shape[1], *spatial))
    return Case(*parameters(shape, ranks, draw(st.booleans())), x, options)


def reference(case: Case) -> Tensor:
    """Run PyTorch's layer on the weight that einsum forms."""
    weight = torch.einsum(EINSUM[case.core.dim()], case.core, *case.factors)
    out, in_, *kernel = weight.shape
    shared: dict[str, Any] = {"bias": case.bias is not None, "device": "meta"}
    if not kernel:
        layer: nn.Module = nn.Linear(in_, out, **shared)
    else:
        channels = in_ * case.options["groups"]
        layer = CONVS[len(kernel)](channels, out, tuple(kernel), **case.options, **shared)
    weights = {"weight": weight} | ({} if case.bias is None else {"bias": case.bias})
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Using padding='same' with even kernel")
        return functional_call(layer, weights, (case.x,))


def contract(case: Case, contraction: Contraction | None) -> Tensor:
    if case.core.dim() == 2:
        return tucker_linear(case.x, case.core, case.factors, case.bias, contraction=contraction)
    return tucker_conv(
        case.x, case.core, case.factors, case.bias, **case.options, contraction=contraction
    )


@pytest.mark.parametrize("contraction", FORCED, ids=str)
@given(case=st.one_of(linear_cases(), conv_cases(), conv_cases()))
def test_output_and_gradients_equal_the_dense_layers(
    contraction: Contraction | None, case: Case
) -> None:
    expected, got = reference(case), contract(case, contraction)
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)
    cotangent = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, case.leaves, cotangent)
    given_ = torch.autograd.grad(got, case.leaves, cotangent)
    for a, b in zip(given_, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@given(case=st.one_of(linear_cases(), conv_cases()))
def test_dense_weight_is_the_multilinear_product(case: Case) -> None:
    weight = dense_weight(case.core, case.factors)
    expected = torch.einsum(EINSUM[case.core.dim()], case.core, *case.factors)
    torch.testing.assert_close(weight, expected, rtol=1e-12, atol=1e-12)
    assert weight.is_contiguous()


def small_conv(groups: int = 2, dtype: torch.dtype = torch.float64) -> Case:
    torch.manual_seed(0)
    core, factors, bias = parameters((6, 4, 3, 2), (3, 2, 2, 2), True)
    x = inputs((2, 4 * groups, 8, 7))
    options = {"stride": 1, "padding": 1, "dilation": 1, "groups": groups}
    tensors = [tensor.detach().to(dtype).requires_grad_() for tensor in (core, *factors, bias, x)]
    return Case(tensors[0], tensors[1:5], tensors[5], tensors[6], options)


@pytest.mark.parametrize("contraction", CONTRACTIONS, ids=str)
def test_gradients_of_gradients_exist(contraction: Contraction) -> None:
    case = small_conv()
    assert case.bias is not None
    arguments = (case.x[:1, :, :4, :4].detach().requires_grad_(), case.core, case.bias)
    factors = [factor.detach() for factor in case.factors]

    def run(x: Tensor, core: Tensor, bias: Tensor) -> Tensor:
        return tucker_conv(x, core, factors, bias, **case.options, contraction=contraction)

    assert torch.autograd.gradgradcheck(run, arguments)


@pytest.mark.parametrize("contraction", FORCED, ids=str)
def test_factors_that_ask_for_no_gradient_get_none(contraction: Contraction | None) -> None:
    case = small_conv()
    for factor in case.factors:
        factor.requires_grad_(False)
    contract(case, contraction).sum().backward()
    assert all(factor.grad is None for factor in case.factors)
    assert case.core.grad is not None
    assert case.x.grad is not None


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("contraction", FORCED, ids=str)
def test_empty_batches_pass(contraction: Contraction | None, groups: int) -> None:
    case = small_conv(groups)
    case = case._replace(x=case.x[:0])
    assert contract(case, contraction).shape == reference(case).shape


@pytest.mark.parametrize("contraction", CONTRACTIONS, ids=str)
@pytest.mark.parametrize("groups", [1, 2])
def test_channels_last_input(contraction: Contraction, groups: int) -> None:
    case = small_conv(groups)
    last = case._replace(x=case.x.to(memory_format=torch.channels_last))
    torch.testing.assert_close(contract(last, contraction), contract(case, contraction))


@pytest.mark.parametrize(
    ("last", "side"),
    [(torch.channels_last, 1), (torch.channels_last, 3), (torch.channels_last_3d, 3)],
    ids=str,
)
def test_gradients_of_inputs_lie_as_those_of_outputs(last: torch.memory_format, side: int) -> None:
    order = 2 if last == torch.channels_last else 3
    layer_map = ConvMap.of([side] * order, 1, side // 2, 1, 1, "zeros")
    kernel = torch.randn(4, 3, *(side,) * order)
    h, a = torch.randn(2, 4, *(6,) * order), torch.randn(2, 3, *(6,) * order)
    both = Contraction(project_output=True, project_input=True)
    expected = layer_map.input_gradient(h, kernel, a, both)
    assert expected.is_contiguous()
    got = layer_map.input_gradient(h.to(memory_format=last), kernel, a, both)
    assert got.is_contiguous(memory_format=last)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.1), (torch.float16, 0.02)]
)
@pytest.mark.parametrize("contraction", FORCED, ids=str)
def test_lower_precision(
    contraction: Contraction | None, dtype: torch.dtype, tolerance: float
) -> None:
    expected, got = reference(small_conv()), contract(small_conv(dtype=dtype), contraction)
    assert got.dtype == dtype
    assert (got - expected).abs().max() < tolerance * expected.abs().max()


@pytest.mark.parametrize("contraction", FORCED, ids=str)
def test_autocast(contraction: Contraction | None) -> None:
    expected, case = reference(small_conv()), small_conv(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = contract(case, contraction)
        weight = dense_weight(case.core, case.factors)
    assert got.dtype == torch.bfloat16
    assert weight.dtype == torch.float32
    assert (got - expected).abs().max() < 0.1 * expected.abs().max()
    torch.testing.assert_close(weight, dense_weight(case.core, case.factors))
    got.float().sum().backward()
    assert case.core.grad is not None
    assert case.core.grad.dtype == torch.float32


def test_dense_weight_of_half_precision_is_rounded_once() -> None:
    case = small_conv(dtype=torch.bfloat16)
    wide = dense_weight(case.core.double(), [factor.double() for factor in case.factors])
    got = dense_weight(case.core, case.factors)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, wide.float().bfloat16())


# The planner


# Where all is 1 PyTorch multiplies numbers, which it does not count.
counted_cases = st.one_of(linear_cases(least=2), conv_cases(least=2), conv_cases(least=2))


def measured(case: Case, contraction: Contraction | None) -> int:
    """Count multiply-adds as PyTorch does, less those of folding the spatial factors."""
    if case.core.dim() == 2:
        case = case._replace(x=case.x.reshape(-1, case.x.shape[-1]))  # vectors are not counted
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        contract(case, contraction)
    spatial, kernel = 0, list(case.core.shape)
    for factor in case.factors[2:]:
        spatial += math.prod(kernel) * factor.shape[0]
        kernel = [*kernel[:2], *kernel[3:], factor.shape[0]]
    return counter.get_total_flops() // 2 - spatial


def sizes_of(case: Case) -> Sizes:
    u_out, u_in, *spatial = case.factors
    layer = (u_out.shape[0], u_in.shape[0], case.core.shape[0], case.core.shape[1])
    if not spatial:
        return Sizes(*layer, batch=case.x.shape[:-1].numel())
    out, options = reference(case), case.options
    batched = case.x.dim() == len(spatial) + 2
    positions_in = 1
    for i, (factor, n) in enumerate(zip(spatial, case.x.shape[-len(spatial) :], strict=True)):
        padded = options["padding"] not in ("same", "valid") and options["padding"][i] > 0
        skips = factor.shape[0] == 1 and not padded  # positions that no output sees
        positions_in *= math.ceil(n / options["stride"][i]) if skips else n
    return Sizes(
        *layer,
        batch=case.x.shape[0] if batched else 1,
        groups=options["groups"],
        kernel=math.prod(factor.shape[0] for factor in spatial),
        positions_in=positions_in,
        positions_out=out.shape[-len(spatial) :].numel(),
    )


@pytest.mark.parametrize("contraction", CONTRACTIONS, ids=str)
@given(case=counted_cases)
def test_flops_are_those_that_run(contraction: Contraction, case: Case) -> None:
    assert measured(case, contraction) == flops(contraction, sizes_of(case))


def measured_with_backward(case: Case, contraction: Contraction | None) -> int:
    """Count multiply-adds of both passes where only the core is trained."""
    x, core = case.x.reshape(-1, case.x.shape[-1]).requires_grad_(), case.core.requires_grad_()
    case = case._replace(x=x, core=core, factors=[f.detach() for f in case.factors])
    with FlopCounterMode(display=False) as counter:
        contract(case, contraction).sum().backward()
    return counter.get_total_flops() // 2


@pytest.mark.parametrize("contraction", CONTRACTIONS, ids=str)
@given(case=linear_cases(least=2))
def test_flops_where_the_core_is_trained_alone(contraction: Contraction, case: Case) -> None:
    expected = flops(contraction, sizes_of(case), core_alone=True)
    assert measured_with_backward(case, contraction) == expected
    least = measured_with_backward(case, None)
    assert least == min(measured_with_backward(case, forced) for forced in CONTRACTIONS)


@given(case=counted_cases)
def test_the_cheapest_runs(case: Case) -> None:
    assert measured(case, None) == min(measured(case, forced) for forced in CONTRACTIONS)
    assert measured(case, None) == measured(case, cheapest(sizes_of(case)))


STRIDED = {"stride": (2,), "padding": (0,), "dilation": (1,), "groups": 1}


@example(Case(*parameters((4, 4, 1), (2, 2, 1), False), inputs((1, 4, 7)), STRIDED))
@given(case=st.one_of(linear_cases(), conv_cases(), conv_cases()))
def test_the_sizes_are_those_of_layer_and_input(case: Case) -> None:
    with mock.patch.object(_contract, "cheapest", wraps=cheapest) as chooser:
        contract(case, None)
    chooser.assert_called_once_with(sizes_of(case), False)


@pytest.mark.parametrize("contraction", FORCED, ids=str)
def test_positions_that_a_stride_skips_are_not_projected(contraction: Contraction | None) -> None:
    torch.manual_seed(0)
    options = {"stride": (2, 3), "padding": (0, 0), "dilation": (1, 1), "groups": 2}
    case = Case(*parameters((8, 4, 1, 1), (2, 2, 1, 1), True), inputs((3, 8, 7, 5)), options)
    torch.testing.assert_close(contract(case, contraction), reference(case))
    assert sizes_of(case).positions_in == sizes_of(case).positions_out == 4 * 2
    assert measured(case, contraction) == flops(
        contraction or cheapest(sizes_of(case)), sizes_of(case)
    )


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        # small ranks, and a batch of one that could never pay for a weight
        (Sizes(500, 800, 20, 20, batch=128), (True, True)),
        (Sizes(500, 800, 400, 400, batch=1), (True, True)),
        # ranks nearly full, and rows enough to pay for folding: one mode, the other, both
        (Sizes(64, 64, 60, 4, 32, 1, 9, 256, 256), (False, True)),
        (Sizes(64, 64, 4, 60, 32, 1, 9, 256, 256), (True, False)),
        (Sizes(64, 64, 60, 60, 32, 1, 9, 256, 256), (False, False)),
        # the same layer, if only few positions are seen
        (Sizes(64, 64, 60, 60, 1, 1, 9, 2, 1), (True, True)),
    ],
)
def test_the_choice_depends_on_ranks_and_input(sizes: Sizes, expected: tuple[bool, bool]) -> None:
    assert cheapest(sizes) == expected


def test_a_gradient_of_the_core_alone_is_a_reason_to_project() -> None:
    sizes = Sizes(4096, 4096, 200, 200, batch=8192)
    assert cheapest(sizes) == (True, False)
    assert cheapest(sizes, core_alone=True) == (True, True)


def test_flops_are_exact_integers_beyond_64_bits() -> None:
    sizes = Sizes(10**8, 10**8, 10**7, 10**7, batch=10**6, positions_out=1, positions_in=1)
    expected = 10**6 * (10**15 + 10**14 + 10**15)
    assert flops(Contraction(True, True), sizes) == expected


# Failures


def test_linear_names_the_features_it_wants() -> None:
    factors = [torch.ones(4, 1), torch.ones(3, 1)]
    with pytest.raises(gt.ShapeError, match=r"x: expected .* 3 features, got shape \(2, 5\)"):
        tucker_linear(torch.ones(2, 5), torch.ones(1, 1), factors)
    with pytest.raises(gt.ShapeError, match=r"x: expected .* 3 features, got shape \(\)"):
        tucker_linear(torch.tensor(1.0), torch.ones(1, 1), factors)


@pytest.mark.parametrize("shape", [(2, 7, 9), (9,), (1, 1, 6, 9), (7, 9)])
def test_conv_names_the_shape_it_wants(shape: tuple[int, ...]) -> None:
    factors = [torch.ones(4, 1), torch.ones(3, 1), torch.ones(5, 1)]
    wanted = r"x: expected shape \(batch, 6, n_1\) or \(6, n_1\), got \("
    with pytest.raises(gt.ShapeError, match=wanted):
        tucker_conv(torch.ones(shape), torch.ones(1, 1, 1), factors, groups=2)


def test_a_kernel_that_does_not_fit_raises_as_in_torch() -> None:
    factors = [torch.ones(4, 1), torch.ones(3, 1), torch.ones(5, 1)]
    with pytest.raises(RuntimeError, match="Kernel size can't be greater"):
        tucker_conv(torch.ones(1, 3, 4), torch.ones(1, 1, 1), factors)
