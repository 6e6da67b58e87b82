# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

import ropewalk
from ropewalk.integrations.transformers.far_keys import new_cache
from ropewalk.integrations.transformers.generation import prefill
from ropewalk.integrations.transformers.memory import memory, peak_memory
from ropewalk.integrations.transformers.roomy import RoomyLayer
from ropewalk.testing import tiny_model


def taken(layer):
    """Bytes of a layer, and of the room that it has."""
    tensors = [tensor for name in ("keys", "values", "_far") if (tensor := getattr(layer, name, None)) is not None]
    return sum(x.untyped_storage().nbytes() if isinstance(layer, RoomyLayer) else x.nbytes for x in tensors)


@pytest.mark.filterwarnings("ignore:a text of:UserWarning")
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "gpt-neox"])
@pytest.mark.parametrize("tokens", [10, 100])
@pytest.mark.parametrize("far", [False, True])
def test_memory(name, tokens, far):
    model = tiny_model(name)
    if far:
        ropewalk.extend(model, ropewalk.SelfExtend(4, 2))
    cache = new_cache(model)
    prefill(model, torch.randint(1, 90, (1, tokens + 1)), cache)
    held = sum(map(taken, cache.layers))
    weights, estimate = memory(model, tokens)
    assert weights == sum(parameter.nbytes for parameter in model.parameters())
    assert held <= estimate <= 1.05 * held  # a sliding window holds one token less than it sees


def test_peak_memory():
    peak = peak_memory(torch.device("cpu"))
    assert peak is None or peak > 10**7
