"""What tests with random input need."""

import pytest
import torch


@pytest.fixture(autouse=True)
def every_float():
    """Hypothesis draws denormal numbers too; training in the same process sets them to 0."""
    torch.set_flush_denormal(False)
