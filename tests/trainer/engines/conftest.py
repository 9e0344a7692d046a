"""What the tests of engines share."""

import pytest
import torch.distributed as dist


@pytest.fixture(scope="module", autouse=True)
def process_group():
    """Ends the group of one that a sharded engine forms."""
    yield
    if dist.is_initialized():
        dist.destroy_process_group()
