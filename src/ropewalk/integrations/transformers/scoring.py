"""How likely a model finds a text, token by token, without ever holding the scores of a whole text."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from transformers import DynamicCache

from ropewalk.integrations.transformers.generation import OnProgress, prefill
from ropewalk.integrations.transformers.rope_scaling import fixed_frequencies

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Positions whose scores over the vocabulary are held at a time: 512 of 128k tokens are 256 MiB in float32.
_BLOCK = 512


@torch.inference_mode()
def log_likelihoods(
    model: PreTrainedModel,
    input_ids: Tensor,
    first: int,
    chunk: int = 2048,
    on_progress: OnProgress | None = None,
) -> Tensor:
    """Natural logarithm of the probability of each token from `first` on, given all tokens before it.

    Reads the text once, with a cache, so that memory grows with the cache alone. A model whose rotary frequencies
    change with the length has those of the whole text.

    Args:
        model: in eval mode, extended or not.
        input_ids: (1, tokens), int64.
        first: index of the first token that is scored; those before it are only read.
        chunk: tokens in one forward pass; at most 512 where tokens are scored.
        on_progress: called after each chunk, and once before the first.

    Returns:
        (tokens - first,), float32, on the model's device.

    Raises:
        ValueError: `first` has no token before it or none to score, `chunk` is below 1, or `input_ids` is not one row.
    """
    if input_ids.ndim != 2 or input_ids.shape[0] != 1 or input_ids.shape[1] < 2:
        raise ValueError(
            f"input_ids must be one row of 2 or more tokens (1, tokens), got shape {tuple(input_ids.shape)}"
        )
    tokens = input_ids.shape[1]
    if not 1 <= first < tokens:
        raise ValueError(f"first must be from 1 to {tokens - 1} for {tokens} tokens, got {first}")
    # The last token is scored but not read: nothing follows it.
    total = tokens - 1
    report = on_progress or (lambda done, total: None)
    cache = DynamicCache(config=model.config)
    scores = []
    with fixed_frequencies(model, tokens):
        prefill(model, input_ids[:, :first], cache, chunk, lambda done, _: report(done, total))
        input_ids = input_ids.to(model.device)
        for begin in range(first - 1, total, min(chunk, _BLOCK)):
            end = min(begin + min(chunk, _BLOCK), total)
            logits = model(input_ids=input_ids[:, begin:end], past_key_values=cache, use_cache=True).logits[0]
            scores.append(-F.cross_entropy(logits.float(), input_ids[0, begin + 1 : end + 1], reduction="none"))
            report(end, total)
    return torch.cat(scores)
