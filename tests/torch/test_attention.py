"""Attention with a layer for each projection: as PyTorch's, and trained in one pass."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import geotucker as gt
from geotucker_torch import (
    TDLRT,
    TuckerLinear,
    TuckerModule,
    TuckerMultiheadAttention,
    densify,
    factorize,
    finalize,
    load_weights,
    optimize_for_inference,
    plan,
)
from geotucker_torch._attention import split_attention

DOUBLE = {"dtype": torch.float64}


def close(a: Tensor, b: Tensor, atol: float = 1e-12) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


@given(
    bias=st.booleans(),
    batch_first=st.booleans(),
    batched=st.booleans(),
    sizes=st.sampled_from([None, (6, 10)]),
    mask=st.sampled_from([None, "bool", "float", "each"]),
    padding=st.sampled_from([None, "bool", "float"]),
    weights=st.sampled_from([(False, True), (True, True), (True, False)]),
)
def test_all_arguments_mean_what_they_mean_in_torch(
    bias: bool,
    batch_first: bool,
    batched: bool,
    sizes: Any,
    mask: Any,
    padding: Any,
    weights: tuple[bool, bool],
) -> None:
    torch.manual_seed(0)
    kdim, vdim = sizes or (8, 8)
    options = {"bias": bias, "kdim": kdim, "vdim": vdim, "batch_first": batch_first, **DOUBLE}
    dense = nn.MultiheadAttention(8, 2, **options)
    if bias:
        nn.init.normal_(dense.in_proj_bias)
    new = split_attention(dense)
    query, key, value = (torch.randn(3, n, s, **DOUBLE) for n, s in ((4, 8), (5, kdim), (5, vdim)))
    if not batched:
        query, key, value = query[0], key[0], value[0]
    elif not batch_first:
        query, key, value = (x.transpose(0, 1) for x in (query, key, value))
    attn_mask = None if mask is None else torch.randn(4, 5, **DOUBLE)
    if mask == "each":
        attn_mask = torch.randn(6 if batched else 2, 4, 5, **DOUBLE)
    if mask == "bool":
        attn_mask = torch.zeros(4, 5).index_fill(1, torch.tensor([1]), 1).bool()
    key_padding = torch.zeros(3, 5).index_fill(1, torch.tensor([4]), 1).bool()
    if padding == "float" or (padding and mask in ("float", "each")):
        key_padding = key_padding.double()
    if mask == "bool" and padding == "float":
        attn_mask = torch.zeros(4, 5, **DOUBLE).masked_fill(attn_mask, -torch.inf)
    masks = {
        "attn_mask": attn_mask,
        "key_padding_mask": None if padding is None else key_padding[slice(None) if batched else 0],
        "need_weights": weights[0],
        "average_attn_weights": weights[1],
    }
    expected, got = dense(query, key, value, **masks), new(query, key, value, **masks)
    close(got[0], expected[0])
    assert (got[1] is None) == (expected[1] is None)
    if got[1] is not None:
        close(got[1], expected[1])
    back = new.to_dense()
    for name, value in dense.state_dict().items():
        assert torch.equal(back.state_dict()[name], value)


def test_bad_inputs_are_refused() -> None:
    new = split_attention(nn.MultiheadAttention(8, 2))
    x = torch.ones(4, 8)
    with pytest.raises(ValueError, match="is_causal: expected an attn_mask"):
        new(x, x, x, is_causal=True)
    with pytest.raises(gt.ShapeError, match="query: "):
        new(x[0], x[0], x[0])


def encoder(layers: int = 2, **options: Any) -> nn.TransformerEncoder:
    torch.manual_seed(0)
    block = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True, **DOUBLE)
    return nn.TransformerEncoder(block, layers, **options)


def tucker_names(model: nn.Module) -> list[str]:
    return [name for name, m in model.named_modules() if isinstance(m, TuckerModule)]


def test_factorize_splits_attention() -> None:
    model = encoder(1)
    summary = plan(model, 3)
    assert [row.name.removeprefix("layers.0.") for row in summary.layers] == [
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.out_proj",
        "linear1",
        "linear2",
    ]
    assert type(model.layers[0].self_attn) is nn.MultiheadAttention
    assert summary.before == sum(p.numel() for p in model.parameters())
    out = model.layers[0].self_attn.out_proj.bias
    model = factorize(model, 3, verbose=False)
    assert summary.after == sum(p.numel() for p in model.parameters())
    attention = model.layers[0].self_attn
    assert type(attention) is TuckerMultiheadAttention
    assert attention.out_proj.bias is out
    assert len(tucker_names(model)) == 6


def test_what_was_trained_or_frozen_stays_so() -> None:
    for flag in (True, False):
        dense = nn.MultiheadAttention(16, 2).requires_grad_(flag)
        with torch.no_grad():
            new = factorize(dense, {"q_proj": 3}, verbose=False)
        cores = {name: p for name, p in new.named_parameters() if "factors" not in name}
        assert all(p.requires_grad == flag for p in cores.values())
        back = densify(new)
        assert all(p.requires_grad == flag for p in back.parameters())


def test_attention_without_a_projection_to_replace_stays() -> None:
    for options in ({"exclude": "*_proj"}, {"ranks": 8}, {"types": nn.Conv2d}):
        model = factorize(encoder(1), **{"ranks": 3, **options}, verbose=False)
        assert type(model.layers[0].self_attn) is nn.MultiheadAttention
    model = factorize(encoder(1), 3, include="*.q_proj", verbose=False)
    assert tucker_names(model) == ["layers.0.self_attn.q_proj"]
    assert type(model.layers[0].self_attn.k_proj) is nn.Linear
    for module in (
        nn.MultiheadAttention(16, 2, add_bias_kv=True),
        nn.MultiheadAttention(16, 2, add_zero_attn=True),
    ):
        assert factorize(module, 3, verbose=False) is module


def test_encoders_compute_the_same_in_every_form() -> None:
    model, x = encoder(), torch.randn(2, 5, 16, **DOUBLE)
    padding = torch.zeros(2, 5).index_fill(1, torch.tensor([4]), 1).bool()
    model = factorize(model, 3, verbose=False)
    for module in model.modules():
        if isinstance(module, TuckerLinear):
            nn.init.normal_(module.bias)
    plain, dense = finalize(model), densify(copy.deepcopy(model))
    fast = optimize_for_inference(model, x, repeats=1, verbose=False)
    assert not any("geotucker" in type(module).__module__ for module in plain.modules())
    assert not tucker_names(dense)
    model.eval()
    for other in (plain.eval(), dense.eval(), fast):
        for enabled in (False, True):  # without gradients encoders may take their fast path
            with torch.set_grad_enabled(enabled):
                close(other(x), model(x))
                close(
                    other(x, src_key_padding_mask=padding)[:, :4],
                    model(x, src_key_padding_mask=padding)[:, :4],
                )


@pytest.mark.parametrize("integrator", ["tangent", "tdlrt"])
def test_one_pass_reaches_every_projection(integrator: str) -> None:
    model, x = factorize(encoder(1), 3, verbose=False), torch.randn(2, 5, 16, **DOUBLE)
    results = []
    for one_pass in (True, False) if integrator == "tdlrt" else (True,):
        net = copy.deepcopy(model)
        optimizer = TDLRT(
            torch.optim.SGD(net.parameters(), 0.1, momentum=0.9),
            net,
            integrator=integrator,
            one_pass=one_pass,
        )

        def closure(net: Any = net, optimizer: TDLRT = optimizer) -> Tensor:
            optimizer.zero_grad()
            loss = (net(x) - 1).square().mean()
            loss.backward()
            return loss

        for _ in range(3):
            if one_pass:
                closure()
                assert all(ranks == (6, 6) for ranks in optimizer.ranks.values())
                optimizer.step()
            else:
                optimizer.step(closure)
        results.append([m.dense_weight() for m in net.modules() if isinstance(m, TuckerModule)])
    for a, b in zip(results[0], results[-1], strict=True):
        close(a, b, 1e-11)


def test_weights_load_in_either_direction() -> None:
    torch.manual_seed(1)
    dense, x = encoder(), torch.randn(2, 5, 16, **DOUBLE)
    for _, parameter in dense.named_parameters():
        nn.init.normal_(parameter, std=0.3)
    small = factorize(encoder(), 4, verbose=False)
    load_weights(small, dense.state_dict(), rescale=False)
    expected = factorize(copy.deepcopy(dense), 4, rescale=False, verbose=False)
    close(small(x), expected(x))
    small.load_state_dict(expected.state_dict())
    close(small(x), expected(x))
    small.load_state_dict(dense.state_dict())
    load_weights(dense, expected.state_dict())
    close(dense(x), expected(x))
