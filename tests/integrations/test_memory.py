# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from transformers import DynamicCache

from ropewalk.integrations.transformers.generation import prefill
from ropewalk.integrations.transformers.memory import memory, peak_memory
from ropewalk.testing import tiny_model


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "gpt-neox"])
@pytest.mark.parametrize("tokens", [10, 100])
def test_memory(name, tokens):
    model = tiny_model(name)
    cache = DynamicCache(config=model.config)
    prefill(model, torch.randint(1, 90, (1, tokens + 1)), cache)
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    weights, estimate = memory(model, tokens)
    assert weights == sum(parameter.nbytes for parameter in model.parameters())
    assert held <= estimate <= 1.05 * held  # a sliding window holds one token less than it sees


def test_peak_memory():
    peak = peak_memory(torch.device("cpu"))
    assert peak is None or peak > 10**7
