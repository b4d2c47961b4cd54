"""Beside PEFT: adapters for fine-tuning.

Run with peft 0.21.2 installed beside the extra ``torch``::

    python benchmarks/peers/with_peft.py
"""

import tempfile

import peft
import torch
from checks import attempt, begin, data_parallel, departure, fit, size, tell
from torch import nn

import geotucker as gt
from geotucker_torch import TDLRT, distribute, factorize

TARGETS = {"target_modules": ["0", "3"]}
KINDS = {
    "LoRA": peft.LoraConfig(r=4, **TARGETS),
    "LoHa": peft.LoHaConfig(r=4, use_effective_conv2d=True, **TARGETS),
    "LoKr": peft.LoKrConfig(r=4, **TARGETS),
}


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(1024, 64)
    )


def adam(model):
    return torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 0.01)


def trained(model, optimizer, x, y):
    return f"loss {fit(model, optimizer, x, y, 30):.3f}"


def trainable(model):
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def ranks(model):
    """Count the singular values of AdaLoRA's adapters that its mask has left."""
    return [int((m.lora_E["default"] != 0).sum()) for m in layers(model)]


def layers(model):
    return [m for m in model.modules() if len(getattr(m, "lora_E", ()))]


def main():
    begin("peft")
    x, y = torch.randn(64, 3, 8, 8), torch.randn(64, 64)
    tell("parameters of the network", size(network()))
    for name, config in KINDS.items():
        model = peft.get_peft_model(network(), config)
        loss = trained(model, adam(model), x, y)
        tell(name, f"{trainable(model)} of {size(model)} trained, {loss}")
    whole = factorize(network(), 0.5, verbose=False)
    tdlrt = TDLRT(adam(whole), whole, gt.Budget(parameters=0.07, steps=10))
    loss = trained(whole, tdlrt, x, y)
    tell("no adapter", "", f"{size(whole)} in all, {loss}")

    config = peft.AdaLoraConfig(
        init_r=8, target_r=2, tinit=5, tfinal=5, deltaT=1, total_step=40, **TARGETS
    )
    model = peft.get_peft_model(network(), config)
    before, optimizer = size(model), adam(model)
    for step in range(40):
        fit(model, optimizer, x, y, 1)
        model.base_model.update_and_allocate(step)
    tell("ranks of AdaLoRA", f"[8, 8] to {ranks(model)}", [m.ranks for m in (whole[0], whole[3])])
    tell("parameters saved by that", before - size(model), size(network()) - size(whole))
    bases = [m.lora_A["default"].detach().flatten(1).T for m in layers(model)]
    tell("bases", departure(*bases), departure(*whole[0].factors, *whole[3].factors))

    model = peft.get_peft_model(network(), KINDS["LoRA"])
    trained(model, adam(model), x, y)
    merged = model.merge_and_unload()
    tell("merged into the weights", f"{type(merged[3]).__name__}, {size(merged)} parameters")
    with tempfile.TemporaryDirectory() as folder:
        peft.get_peft_model(network(), KINDS["LoRA"]).save_pretrained(folder)
        tell("an adapter's own file", attempt(lambda: type(reloaded(folder)).__name__))
    tell(
        "two processes (DDP)",
        attempt(lambda: data_parallel(lambda: (m := adapted(), adam(m), x, y))),
        attempt(
            lambda: data_parallel(lambda: (m := distribute(low_rank()), TDLRT(adam(m), m), x, y))
        ),
    )


def reloaded(folder):
    return peft.PeftModel.from_pretrained(network(), folder)


def adapted():
    return peft.get_peft_model(network(), KINDS["LoRA"])


def low_rank():
    return factorize(network(), 0.5, verbose=False)


if __name__ == "__main__":
    main()
