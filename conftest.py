"""What the examples in docstrings share with the tests; see also ``tests/conftest.py``."""

import pytest
import tensorly


@pytest.fixture(autouse=True)
def numpy_is_the_backend_of_tensorly() -> None:
    """Start every test and example as a new process would: importing tltorch switches it."""
    tensorly.set_backend("numpy")
