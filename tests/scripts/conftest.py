import pytest
import torch

from tests.scripts.runs import reset


@pytest.fixture(autouse=True)
def _fresh_state():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    reset()
