# SPDX-License-Identifier: Apache-2.0
"""Shared by the tests of the transformers integration: tiny models, made once, and ways to run them."""

from functools import cache

import torch
from transformers import DynamicCache

import ropewalk
from ropewalk.testing import TINY_MODELS, tiny_model

# Both edges that matter fall inside the texts of these tests: the window's, at 8, and several of the groups' of 3.
MAP = ropewalk.SelfExtend(group_size=3, window=8)
TOKENS = 70

# Float32, with another order of summation.
CLOSE = {"rtol": 0, "atol": 2e-4}


@cache
def shared(name):
    """A tiny model that tests share: each leaves it as it was."""
    return tiny_model(name)


def options(name):
    """What `extend` needs to find layers to extend in every model."""
    return {"sliding_window": "disable"} if TINY_MODELS[name].disable_window else {}


def extended(name, position_map=MAP, **changes):
    """The shared model, extended; past eq. 5 the extension would warn, and tests mean to go there."""
    return ropewalk.extend(shared(name), position_map, **{**options(name), **changes})


def text(tokens=TOKENS, batch=1, seed=0):
    """Random token ids, without the padding token 0."""
    return torch.randint(1, 96, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def logits(model, ids, **arguments):
    return model(ids, **arguments).logits


def in_chunks(model, ids, sizes, cache=None):
    """Logits of a text that is read chunk by chunk; the last size repeats."""
    cache = DynamicCache(config=model.config) if cache is None else cache
    parts, begin = [], 0
    while begin < ids.shape[1]:
        size = sizes[min(len(parts), len(sizes) - 1)]
        parts.append(model(ids[:, begin : begin + size], past_key_values=cache, use_cache=True).logits)
        begin += size
    return torch.cat(parts, dim=1)
