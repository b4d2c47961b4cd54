"""The examples of the README and of the documentation run as tests, page by page.

The fixtures of the tests are in ``tests/conftest.py``.
"""

from pathlib import Path

import pytest
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser

pytest_collect_file = Sybil(
    parsers=[PythonCodeBlockParser(), SkipParser()], pattern="*.md"
).pytest()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep the examples of one page on one worker: each goes on from the one before."""
    for item in items:
        if Path(item.path).suffix == ".md":
            item.add_marker(pytest.mark.xdist_group(str(item.path)))
