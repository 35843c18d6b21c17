import pytest
import torch


@pytest.fixture(scope='module')
def one_thread():
    """Small models of torch are computed by one thread: others would turn for work of their own."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
