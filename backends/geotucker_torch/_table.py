"""Tables as plain text, for terminals, logs and docstrings."""

from collections.abc import Sequence

__all__ = ["table"]

_TEXTS = 4  # columns to the left of the numbers


def table(head: Sequence[str], rows: Sequence[Sequence[str]], sums: Sequence[Sequence[str]]) -> str:
    """Return a table with a rule below the head and one above the sums.

    Four columns of text are aligned to the left, and the numbers behind them to the right; the
    last column is as wide as it comes.

    Examples
    --------
    >>> head = ("layer", "type", "shape", "ranks", "before", "after", "")
    >>> row = ("fc", "Linear", "(9, 9)", "(2, 2)", "81", "40", "49.4 %")
    >>> print(table(head, [row], [("sum", "", "", "", "81", "40", "49.4 %")]))
    layer  type    shape   ranks   before  after
    ----------------------------------------------------
    fc     Linear  (9, 9)  (2, 2)      81     40  49.4 %
    ----------------------------------------------------
    sum                                81     40  49.4 %
    """
    cells = [head, *rows, *sums]
    widths = [max(map(len, column)) for column in zip(*(row[:-1] for row in cells), strict=True)]
    lines = [_aligned(row, widths) for row in cells]
    rule = "-" * max(map(len, lines))
    below = len(lines) - len(sums)
    return "\n".join([lines[0], rule, *lines[1:below], rule, *lines[below:]])


def _aligned(row: Sequence[str], widths: Sequence[int]) -> str:
    cells = [
        cell.rjust(width) if i >= _TEXTS else cell.ljust(width)
        for i, (cell, width) in enumerate(zip(row, widths, strict=False))
    ]
    return "  ".join([*cells, row[-1]]).rstrip()
