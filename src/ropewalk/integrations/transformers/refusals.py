# SPDX-License-Identifier: Apache-2.0
"""Why models cannot be extended: one sentence for each kind of model, with the reason and what to do instead."""

from __future__ import annotations

AS_IT_IS = "use it as it is, up to the length that it was trained on"
_LONGER = "give it longer texts as it is"
_IN_PARTS = "cut longer texts into parts, or use a decoder with rotary embeddings"
_TEXT_ALONE = "an extended model reads text alone, from left to right"


class UnsupportedModelError(ValueError):
    """A model that cannot be extended; the message says why."""


def encoder_decoder(model: str) -> str:
    return f"{model} is an encoder-decoder, and only decoders can be extended: {_IN_PARTS}"


def not_causal(attention: str) -> str:
    return (
        f"only causal attention can be extended, and {attention} is not causal: its tokens, or those of its prompts, "
        f"see what comes after them; {_IN_PARTS}"
    )


def not_causal_mask() -> str:
    return (
        "only causal attention can be extended, and this mask shows tokens what comes after them, as those of encoders "
        f"do, and those of prompts and images in some models: {_TEXT_ALONE}"
    )


def sparse(model: str, indexer: str) -> str:
    return (
        f"{model} has sparse attention: its indexers ({indexer}) choose the keys of each query by scores of their own, "
        f"which a position map does not reach; {AS_IT_IS}"
    )


def compressed(attention: str, keys: int, tokens: int) -> str:
    return (
        f"{attention} attends to {keys} keys of a text of {tokens} tokens (compressed or added ones), and only "
        f"attention to one key a token can be extended; {AS_IT_IS}"
    )


def without_positions(model: str) -> str:
    return (
        f"{model} has attention without positions: its keys are the same wherever they are, so there is nothing to "
        f"extend, and no position that it was not trained on; {_LONGER}"
    )


def without_attention(model: str) -> str:
    return (
        f"{model} has no attention layer that could be extended: no layer of it weighs the tokens before a token; "
        f"{_LONGER}"
    )


def learned(model: str) -> str:
    return (
        f"{model} has no rotary embedding and no ALiBi: its position embeddings are learned or added to the tokens, "
        f"one for each position, so there is none for positions that it was not trained on; {_IN_PARTS}"
    )


def bias(attention: str, name: str) -> str:
    return (
        f"{attention} adds a bias of its own to its scores ({name}), which follows distances and is neither a rotary "
        f"embedding nor ALiBi, so a position map would leave it where it was; {AS_IT_IS}"
    )


def unknown_argument(attention: str, name: str) -> str:
    return (
        f"{attention} gives transformers' AttentionInterface a tensor that Ropewalk's attention would ignore ({name}); "
        f"{AS_IT_IS}"
    )


def own_mask(attention: str) -> str:
    return (
        f"{attention} makes an attention mask of its own, from what the tokens hold or where they are, and only "
        f"attention to all keys, or to those in a sliding window, can be extended; {AS_IT_IS}"
    )


def own_use_of_mask(module: str) -> str:
    return (
        f"{module} computes with its attention mask itself, outside of transformers' AttentionInterface, so nothing "
        f"can be put in its place; {AS_IT_IS}"
    )


def own_attention(model: str) -> str:
    return (
        f"the attention of {model} does not go through transformers' AttentionInterface, so nothing can be put in its "
        f"place; {AS_IT_IS}"
    )


def positions_elsewhere(layer: str, model: str) -> str:
    return (
        f"what {layer} of {model} is given for the same token changes with the position, by other means than a rotary "
        "embedding (recurrent layers that begin anew at position 0, embeddings that are added), so that the rotation "
        f"of its keys cannot be measured; {AS_IT_IS}"
    )


def axes_of_no_rotation() -> str:
    return (
        "this model turns the two dimensions of a pair by different axes, which is no rotation where they differ, so "
        f"its keys cannot be turned again: {_TEXT_ALONE}"
    )
