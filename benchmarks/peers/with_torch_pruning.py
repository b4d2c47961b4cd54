"""Beside torch-pruning: channels removed from any network.

Run with torch-pruning 1.6.1 installed beside the extra ``torch``::

    python benchmarks/peers/with_torch_pruning.py
"""

import torch
import torch_pruning
from checks import begin, fit, size, tell
from torch import nn

import geotucker as gt
from geotucker_torch import TDLRT, factorize, finalize


class Block(nn.Module):
    """Two convolutions and what goes past them."""

    def __init__(self):
        super().__init__()
        self.first, self.second = (nn.Conv2d(32, 32, 3, padding=1) for _ in range(2))

    def forward(self, x):
        """Add what the block has to say."""
        return torch.relu(x + self.second(torch.relu(self.first(x))))


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), Block(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
    )  # fmt: skip


def prune(model, x):
    """Take half of the channels away, by magnitude."""
    torch_pruning.MetaPruner(
        model,
        x,
        importance=torch_pruning.importance.MagnitudeImportance(),
        pruning_ratio=0.5,
        ignored_layers=[model[5]],
    ).step()
    return size(model)


def adam(model):
    return torch.optim.Adam(model.parameters(), 0.01)


def main():
    begin("torch-pruning")
    x, y = torch.randn(64, 3, 8, 8), torch.randn(64, 10)
    dense, tucker = network(), factorize(network(), 0.5, verbose=False)
    optimizer = TDLRT(adam(tucker), tucker, gt.Budget(parameters=0.25, steps=10))
    tell("while it trains", size(dense), size(tucker))
    loss, own = fit(dense, adam(dense), x, y, 50), fit(tucker, optimizer, x, y, 50)
    prune(dense, x)
    tell("after 50 steps", size(dense), size(tucker))
    tell("loss before it is pruned", f"{loss:.3f}", f"{own:.3f}")
    with torch.no_grad():
        cut = nn.functional.mse_loss(dense(x), y).item()
    tell("loss afterwards", f"{cut:.3f}", f"{own:.3f}")
    tell("loss, 50 steps more", f"{fit(dense, adam(dense), x, y, 50):.3f}",
         f"{fit(tucker, optimizer, x, y, 50):.3f}")  # fmt: skip
    tell("channels of a block", f"32 to {dense[2].first.out_channels}", tucker[2].first.shape[0])
    tucker = factorize(network(), 0.5, verbose=False)
    tell("prunes Tucker layers", f"{size(tucker)} to {prune(tucker, x)}")
    chain = finalize(tucker)
    tell("prunes what finalize gives", f"{size(chain)} to {prune(chain, x)}")
    tell(
        "pruned, then factorised",
        "",
        f"{size(dense)} to {size(factorize(dense, 0.5, verbose=False))}",
    )


if __name__ == "__main__":
    main()
