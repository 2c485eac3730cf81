"""One thread, here and in the processes that tests start: sums are then added in one order."""

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    torch.set_num_threads(1)
