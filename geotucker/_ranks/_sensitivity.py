"""How much an error of each tensor of a network costs the loss, learnt from its gradients.

Let g be the gradient of one sample's loss. Where the mean of g is small, as it is in training, an
error E raises the loss by about ``1/2 E^T H E``, and for a likelihood the Hessian is near the
Fisher information ``E[g g^T]`` (Theis, Korshunova, Tejani, Huszar 2018, arXiv:1801.05787). Taken
as a multiple of the identity for each tensor, that is ``1/2 ||E||^2 mean(g^2)``: a relative error e
costs ``e^2 s / 2`` with ``s = ||W||^2 mean(g^2)``. Only ratios between tensors matter, so the
gradient of a batch serves as well, whose variance is that of a sample divided by the size of the
batch, and so does a scaled loss. In the bases of a Tucker tensor W and g are its core and the
gradient of that, and s is the same in any gauge.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Sensitivities", "sensitivity"]

MEMORY = 100  # heuristic: samples that the mean goes back


def sensitivity(norm: float, gradient_norm: float, entries: int) -> float | None:
    """Return ``||C||^2 mean(G^2)`` of a core of so many entries; None if it is no finite number.

    Examples
    --------
    >>> sensitivity(5.0, 0.2, 4)
    0.25
    """
    found = (norm * gradient_norm) * (norm * gradient_norm) / max(entries, 1)
    return found if math.isfinite(found) else None


@dataclass(frozen=True)
class Sensitivities:
    """Running means, by name: of all values at first, then of about the last hundred.

    Parameters
    ----------
    means : mapping of str to float
    counts : mapping of str to int
        How many values each mean is of, at most `MEMORY`.
    """

    means: Mapping[str, float] = field(default_factory=dict)
    counts: Mapping[str, int] = field(default_factory=dict)

    def state(self) -> dict[str, Any]:
        """Return them as plain containers."""
        return {"means": dict(self.means), "counts": dict(self.counts)}

    @classmethod
    def of_state(cls, state: Mapping[str, Mapping[str, Any]]) -> "Sensitivities":
        """Return those with a state of `state`; it raises what `float` and `int` do.

        Examples
        --------
        >>> Sensitivities.of_state({"means": {"fc": 2}, "counts": {"fc": 1}})
        Sensitivities(means={'fc': 2.0}, counts={'fc': 1})
        """
        means = {name: float(mean) for name, mean in state["means"].items()}
        if not all(math.isfinite(mean) and mean >= 0.0 for mean in means.values()):
            raise ValueError(f"means: expected finite numbers of at least 0, got {means}")
        return cls(means, {name: int(state["counts"][name]) for name in means})

    def after(self, values: Mapping[str, float | None]) -> "Sensitivities":
        """Return the means with one more value for some names, where there is one.

        Examples
        --------
        >>> Sensitivities().after({"fc": 1.0}).after({"fc": 3.0, "conv": None}).means
        {'fc': 2.0}
        """
        means, counts = dict(self.means), dict(self.counts)
        for name, value in values.items():
            if value is not None:
                count = min(counts.get(name, 0) + 1, MEMORY)
                mean = means.get(name, 0.0)
                means[name], counts[name] = mean + (value - mean) / count, count
        return Sensitivities(means, counts)
