import pytest
import torch


@pytest.fixture(autouse=True)
def poisoned():
    """Memory that nobody wrote reads as NaN, and nothing that depends on the order of threads passes."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
