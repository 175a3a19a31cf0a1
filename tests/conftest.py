"""Puts the repository's root on the path and keeps the tests to the cores that are there."""
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


@pytest.fixture
def rng():
    """A seeded CPU generator; every draw of a test comes from one."""
    return torch.Generator().manual_seed(0)
