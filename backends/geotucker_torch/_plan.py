"""Which order of contraction is cheapest: the planner of the Tucker layers' forward maps.

The weight of a layer is ``W = C x_1 U_out x_2 U_in x_3 U_k1 ...`` with ``C`` the core, so that
the output factor belongs to axis 0 of the weight as PyTorch stores it, ``(out, in / groups,
k_1, ...)``. The spatial factors are always folded into the core, which is small. Each of the two
channel factors may then be *projected*, that is applied to the activations as a pointwise map, or
*folded* into the kernel. The four combinations give the same function at different costs
(`flops`); `cheapest` decides from the sizes at hand. Folding both rebuilds the dense weight,
which pays for ranks near the full ones.
"""

from typing import NamedTuple

__all__ = [
    "CONTRACTIONS",
    "Contraction",
    "Sizes",
    "both_folded",
    "cheapest",
    "flops",
    "folded_flops",
]


class Contraction(NamedTuple):
    """An order of contraction: which channel factors meet the activations."""

    project_output: bool  # else U_out is folded into the kernel
    project_input: bool  # else U_in is folded into the kernel


CONTRACTIONS = tuple(Contraction(out, in_) for out in (True, False) for in_ in (True, False))


class Sizes(NamedTuple):
    """Everything that the cost of a contraction depends on; a Linear layer is all ones below."""

    # fixed by the layer and its ranks
    out_channels: int
    in_channels: int  # of one group
    out_rank: int
    in_rank: int
    # fixed by the input
    batch: int
    # ones for a Linear layer
    groups: int = 1
    kernel: int = 1  # number of kernel entries, prod k_i
    positions_in: int = 1  # number of positions at which U_in would be applied; none for a lookup
    positions_out: int = 1
    positions_kernel: int | None = (
        None  # at which the kernel is applied, if not those of the output
    )


def flops(contraction: Contraction, sizes: Sizes, core_alone: bool = False) -> int:
    """Count the multiply-adds of one forward pass, less those that all contractions share.

    With ``c`` the channels that enter the kernel (rank, or all channels of a group if the
    input factor is folded) the kernel costs ``c * kernel`` per output channel (rank, or
    channel) and position. A backward pass to core and factors weighs the same terms by two, and is
    left out.

    Parameters
    ----------
    contraction : Contraction
        The order to be priced.
    sizes : Sizes
        Of layer and input.
    core_alone : bool
        Whether to count forward and backward pass where the factors are not trained: the kernel is
        passed three times then, for it has a gradient, projections twice.

    Returns
    -------
    int
        Exact, however large.

    Examples
    --------
    >>> sizes = Sizes(out_channels=100, in_channels=100, out_rank=10, in_rank=10, batch=1)
    >>> flops(Contraction(True, True), sizes), flops(Contraction(False, False), sizes)
    (2100, 120000)
    """
    folding = _fold_flops(contraction, sizes)
    projecting, applying = _passes(contraction, sizes)
    if core_alone:
        return 2 * projecting + 3 * applying + 2 * folding
    return projecting + applying + folding


def folded_flops(contraction: Contraction, sizes: Sizes) -> int:
    """Count the multiply-adds of one forward pass once the kernel is formed.

    With one position each and a batch of one this is the number of weights.

    Parameters
    ----------
    contraction : Contraction
        The order to be priced.
    sizes : Sizes
        Of layer and input.

    Returns
    -------
    int

    Examples
    --------
    >>> sizes = Sizes(out_channels=100, in_channels=100, out_rank=10, in_rank=10, batch=1)
    >>> folded_flops(Contraction(True, False), sizes)
    2000
    """
    return sum(_passes(contraction, sizes))


def _passes(contraction: Contraction, s: Sizes) -> tuple[int, int]:
    """Price of the projections, and of the kernel, in one forward pass."""
    rows_out = s.batch * s.positions_out
    rows = rows_out if s.positions_kernel is None else s.batch * s.positions_kernel
    channels = s.in_rank if contraction.project_input else s.in_channels
    projecting = 0
    if contraction.project_input:
        projecting += s.batch * s.groups * s.positions_in * s.in_channels * s.in_rank
    if contraction.project_output:
        # The kernel runs once per group, and its r_out channels are then spread.
        projecting += rows_out * s.out_channels * s.out_rank
        return projecting, rows * s.groups * s.out_rank * channels * s.kernel
    return projecting, rows * s.out_channels * channels * s.kernel


def _fold_flops(contraction: Contraction, s: Sizes) -> int:
    core = s.out_rank * s.in_rank * s.kernel
    if contraction == (False, False):
        return min(both_folded(s))
    if not contraction.project_input:
        return core * s.in_channels
    return 0 if contraction.project_output else core * s.out_channels


def both_folded(s: Sizes) -> tuple[int, int]:
    """Price of rebuilding the weight with the input factor first, and with the output first."""
    core = s.out_rank * s.in_rank * s.kernel
    dense = s.out_channels * s.in_channels * s.kernel
    return core * s.in_channels + dense * s.out_rank, core * s.out_channels + dense * s.in_rank


def cheapest(sizes: Sizes, core_alone: bool = False) -> Contraction:
    """Return the contraction with the fewest multiply-adds; a tie goes to more projections.

    Parameters
    ----------
    sizes : Sizes
        Of layer and input.
    core_alone : bool
        See `flops`.

    Returns
    -------
    Contraction

    Examples
    --------
    Small ranks are contracted with the activations; at full rank and for many rows it is
    cheaper to rebuild the weight:

    >>> cheapest(Sizes(out_channels=100, in_channels=100, out_rank=10, in_rank=10, batch=64))
    Contraction(project_output=True, project_input=True)
    >>> cheapest(Sizes(out_channels=100, in_channels=100, out_rank=100, in_rank=100, batch=640))
    Contraction(project_output=False, project_input=False)
    """
    best, least = CONTRACTIONS[0], flops(CONTRACTIONS[0], sizes, core_alone)
    for contraction in CONTRACTIONS[1:]:  # torch.compile cannot trace min(..., key=...)
        cost = flops(contraction, sizes, core_alone)
        if cost < least:
            best, least = contraction, cost
    return best
