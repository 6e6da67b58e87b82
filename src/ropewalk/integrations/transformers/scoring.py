# SPDX-License-Identifier: Apache-2.0
"""How likely a model finds a text, token by token, without ever holding the scores of a whole text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from transformers import DynamicCache

from ropewalk.integrations.transformers.extend import check_length
from ropewalk.integrations.transformers.generation import OnProgress, prefill
from ropewalk.integrations.transformers.place import place
from ropewalk.integrations.transformers.rope_scaling import fixed_frequencies
from ropewalk.integrations.transformers.wrappers import callable_alone

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Positions whose scores over the vocabulary are held at a time: 512 of 128k tokens are 256 MiB in float32.
_BLOCK = 512


@torch.inference_mode()
def log_likelihoods(
    model: PreTrainedModel,
    texts: Sequence[Sequence[int]],
    firsts: Sequence[int],
    chunk: int = 2048,
    on_progress: OnProgress | None = None,
) -> list[Tensor]:
    """Natural logarithm of the probability of each token of each text from `first` on, given all tokens before it.

    Reads the texts once, side by side and with a cache, so that memory grows with the cache alone. A model whose rotary
    frequencies change with the length has those of the longest text.

    Args:
        model: in eval mode, extended or not.
        texts: token ids, special ones included.
        firsts: of each text, index of the first token that is scored; those before it are only read.
        chunk: tokens of each text in one forward pass; at most 512 of all together where tokens are scored.
        on_progress: called after each chunk, and once before the first.

    Returns:
        For each text (tokens - first,), float32, on the model's device.

    Raises:
        LengthError: a text is past what the map of an extended model reaches (eq. 4); nothing was read.
        ValueError: a `first` has no token before it or none to score, or `chunk` is below 1.
    """
    model = callable_alone(model)
    for text, first in zip(texts, firsts, strict=True):
        if not 1 <= first < len(text):
            raise ValueError(f"first must be from 1 to {len(text) - 1} for {len(text)} tokens, got {first}")
    longest, begin_scores = max(map(len, texts)), min(firsts)
    # What follows a text, on the right, is seen by none of its tokens.
    input_ids = torch.tensor([[*text, *[0] * (longest - len(text))] for text in texts], device=place(model))
    # The last token is scored but not read: nothing follows it.
    total = longest - 1
    check_length(model, total)
    block = max(1, min(chunk, _BLOCK // len(texts)))
    report = on_progress or (lambda done, total: None)
    cache = DynamicCache(config=model.config)
    scores = []
    with fixed_frequencies(model, longest):
        prefill(model, input_ids[:, :begin_scores], cache, chunk, lambda done, _: report(done, total))
        for begin in range(begin_scores - 1, total, block):
            end = min(begin + block, total)
            logits = model(input_ids=input_ids[:, begin:end], past_key_values=cache, use_cache=True).logits
            following = input_ids[:, begin + 1 : end + 1]
            losses = F.cross_entropy(logits.flatten(0, 1).float(), following.flatten(), reduction="none")
            scores.append(-losses.view_as(following))
            report(end, total)
    together = torch.cat(scores, dim=1)
    return [
        row[first - begin_scores : len(text) - begin_scores]
        for row, text, first in zip(together, texts, firsts, strict=True)
    ]
