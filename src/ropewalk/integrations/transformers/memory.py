# SPDX-License-Identifier: Apache-2.0
"""Memory that a model, its cache and a process take."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def memory(model: PreTrainedModel, tokens: int) -> tuple[int, int]:
    """Bytes of the weights, and of the cache for `tokens` tokens as `generate` makes it; from what one token leaves in
    it."""
    import torch

    from ropewalk.integrations.transformers.far_keys import FarKeysLayer, new_cache
    from ropewalk.integrations.transformers.place import place
    from ropewalk.integrations.transformers.roomy import RoomyLayer, room_for

    weights = sum(parameter.nbytes for parameter in model.parameters())
    cache = new_cache(model)
    with torch.inference_mode():
        model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=place(model)), past_key_values=cache, use_cache=True)
    held = 0
    for layer in cache.layers:
        window = getattr(layer, "sliding_window", None)  # such layers hold no more tokens than it has
        # A far view is as large as the keys.
        names = ("keys", "values", "keys") if isinstance(layer, FarKeysLayer) else ("keys", "values")
        kept = (getattr(layer, name, None) for name in names)
        bytes_a_token = sum(tensor.nbytes for tensor in kept if tensor is not None)
        slots = tokens if window is None else min(tokens, window)
        held += bytes_a_token * (room_for(slots) if isinstance(layer, RoomyLayer) else slots)
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
