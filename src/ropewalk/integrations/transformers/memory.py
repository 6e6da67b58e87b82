# SPDX-License-Identifier: Apache-2.0
"""Memory that a model, its cache and a process take."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def memory(model: PreTrainedModel, tokens: int) -> tuple[int, int]:
    """Bytes of the weights, and of the key/value cache for `tokens` tokens; from what one token leaves in the cache."""
    import torch
    from transformers import DynamicCache

    from ropewalk.integrations.transformers.place import place

    weights = sum(parameter.nbytes for parameter in model.parameters())
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=place(model)), past_key_values=cache, use_cache=True)
    held = 0
    for layer in cache.layers:
        window = getattr(layer, "sliding_window", None)  # such layers hold no more tokens than it has
        kept = (getattr(layer, name, None) for name in ("keys", "values"))
        bytes_a_token = sum(tensor.nbytes for tensor in kept if tensor is not None)
        held += bytes_a_token * (tokens if window is None else min(tokens, window))
    return weights, held


def peak_memory(device: torch.device) -> int | None:
    """Most bytes held so far: on a CUDA device its tensors', on the CPU the process's. None where nobody counts."""
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
