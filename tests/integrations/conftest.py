# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from gguf_files import write_gguf


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    # Tensors this small only lose time to threads that wait for each other.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory):
    """A tiny llama with random weights, as a GGUF file."""
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.Q8.gguf", context=64)
