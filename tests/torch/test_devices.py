"""The same training on the processor and, where there is one, on a GPU; mixed precision on both."""

import copy

import pytest
import torch
from torch import nn

import geotucker as gt
from geotucker.testing import check_orthonormal
from geotucker_torch import TDLRT, factorize

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(128, 5)
    )
    return factorize(model, {"2": 4, "4": 4}, verbose=False)


def batch(device: str) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(32, 3, 8, 8, generator=generator)
    return x.to(device), torch.randint(5, (32,), generator=generator).to(device)


@pytest.mark.parametrize("ranks", [None, gt.Tolerance(0.05), gt.Budget(parameters=0.5)])
@pytest.mark.parametrize("kind", ["sgd", "adam"])
@pytest.mark.parametrize("device", DEVICES)
def test_every_device_trains_alike(device, kind, ranks):
    losses = {}
    for where in ("cpu", device):
        model = network().to(where)
        wrapped = (
            torch.optim.SGD(model.parameters(), 0.02, momentum=0.9)
            if kind == "sgd"
            else torch.optim.Adam(model.parameters(), 1e-3)
        )
        optimizer = TDLRT(wrapped, model, ranks)
        x, y = batch(where)
        own = []
        for _ in range(6):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            own.append(loss.item())
        losses[where] = own, optimizer.ranks
        for name in ("2", "4"):
            assert all(p.device.type == where for p in model.get_submodule(name).parameters())
    (host, host_ranks), (found, ranks_found) = losses["cpu"], losses[device]
    assert ranks_found == host_ranks
    assert found == pytest.approx(host, rel=1e-3)
    assert found[-1] < found[0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("device", DEVICES)
def test_mixed_precision_keeps_linear_algebra_in_single(device, dtype):
    model = network().to(device)
    single = copy.deepcopy(model)
    losses = {}
    for name, net in (("mixed", model), ("single", single)):
        optimizer = TDLRT(torch.optim.SGD(net.parameters(), 0.02, momentum=0.9), net)
        scaler = torch.amp.GradScaler(device, enabled=name == "mixed", init_scale=1024.0)
        x, y = batch(device)
        losses[name] = []
        for _ in range(8):
            optimizer.zero_grad()
            with torch.autocast(device, dtype, enabled=name == "mixed"):
                loss = nn.functional.cross_entropy(net(x), y)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(net.parameters(), 5.0)
            scaler.step(optimizer)
            scaler.update()
            losses[name].append(loss.item())
    for layer in (model[2], model[4]):
        assert all(p.dtype == torch.float32 for p in layer.parameters())
        check_orthonormal(
            gt.TuckerPoint(layer.core.detach().cpu(), [f.cpu() for f in layer.factors])
        )
    assert losses["mixed"] == pytest.approx(losses["single"], rel=0.05)
    assert losses["mixed"][-1] < losses["mixed"][0]


@pytest.mark.gpu
def test_the_host_never_waits_for_the_device_in_a_step_between_bases():
    model = network().cuda()
    optimizer = TDLRT(torch.optim.SGD(model.parameters(), 0.01), model, basis_every=10**9)
    x, y = batch("cuda")
    for step in range(3):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        torch.cuda.synchronize()
        if step:  # the first one moves the bases
            torch.cuda.set_sync_debug_mode("error")
        try:
            loss.backward()
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
