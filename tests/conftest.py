"""Put the article on the path, and offer both precisions to the tests."""

import sys
from pathlib import Path

import jax
import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))


@pytest.fixture(params=[False, True], ids=["float32", "float64"])
def x64(request):
    """Run a test in float32 and again in float64."""
    with jax.enable_x64(request.param):
        yield request.param
