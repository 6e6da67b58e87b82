"""`attention`: checks the input, chooses an implementation, takes padded batches apart."""

from __future__ import annotations

import logging
from functools import cache
from typing import Literal, get_args

import torch
from torch import Tensor

from ropewalk.maps import PositionMap
from ropewalk.maps.query_scaling import QueryScaling
from ropewalk.ops import blocks, flash, reference, windowed
from ropewalk.ops.layout import Layout, Slots, Span
from ropewalk.ops.rotary import Rotary, far_band

Implementation = Literal["auto", "reference", "blocks", "flash"]

logger = logging.getLogger("ropewalk")


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    position_map: PositionMap,
    rotary: Rotary | None,
    *,
    layout: Layout | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    query_scaling: QueryScaling | None = None,
    far_keys: Tensor | None = None,
    impl: Implementation = "auto",
) -> Tensor:
    """Causal attention under a position map, for prefill, chunked prefill and decode.

    Query and key arrive rotated by the model at their true positions, as a cache holds them; `rotary` says how, so that
    each band can re-rotate them: `R(b) = R(b - n) R(n)`. With 5 keys, 3 queries and W = 2 (n: near, f: far, -: unseen):

        f f n n... query slot 2:  f n n - -
                   query slot 3:  f f n n -
                   query slot 4:  f f f n n

    Args:
        query: (batch, heads, queries, head_dim), float32, bfloat16, float16 or float64.
        key: (batch, key heads, keys, head_dim); heads is a multiple of key heads, which are never expanded.
        value: (batch, key heads, keys, value_dim).
        position_map: which positions the rotation uses.
        rotary: the model's rotary embedding; None for a layer without one, where only which keys are seen matters.
        layout: which slots hold tokens; by default all do, and the queries are the last keys. A query slot that holds
            no token gives zeros.
        scale: of the scores, by default `head_dim ** -0.5`.
        softcap: `softcap * tanh(score / softcap)` instead of the score (Gemma 2).
        sinks: (heads,), a logit a head that takes part in the softmax and adds nothing (gpt-oss).
        query_scaling: factor on each query by its true position.
        far_keys: (batch, key heads, far slots, head_dim), the key slots before the last query's neighbor window,
            already turned to the far band's `key_positions`, for a map with one far band: a caller that keeps them
            between calls spares the operator the work. Slots of keys that are far from no query may hold anything.
            impl="reference" turns the keys itself.
        impl: "auto" chooses; "reference" is the specification, in float32, and holds the whole matrix; "flash" is one
            kernel pass a band; "blocks" is plain tensor operations, for whatever "flash" cannot take. The last two use
            memory linear in the number of keys.

    Returns:
        (batch, heads, queries, value_dim), in the query's dtype.

    Raises:
        ValueError: shapes, layout or rotary embedding do not fit, or `impl` does not take this call.
    """
    layout = layout or Layout(query.shape[2], key.shape[2])
    _check(query, key, value, rotary, layout, impl)
    if far_keys is not None:
        _check_far_keys(far_keys, key, position_map, layout)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if impl == "flash" and (reason := _flash_lacks(query, key, value, softcap)):
        raise ValueError(f"attention: impl='flash' does not take {reason}; impl='blocks' does")
    chosen = choose_impl(query, key, value, softcap) if impl == "auto" else impl

    def attend(span: Span) -> Tensor:
        q = _take(query, span.rows, span.queries)
        k = _take(key, span.rows, span.keys)
        v = _take(value, span.rows, span.keys)
        far = None if far_keys is None else _take(far_keys, span.rows, _before(span.keys, far_keys.shape[2]))
        if query_scaling is not None:
            tokens = torch.arange(k.shape[2] - q.shape[2], k.shape[2], device=q.device)
            q = q * query_scaling(tokens).to(q.dtype)[:, None]
        if chosen == "flash":
            return flash.attend(q, k, v, position_map, rotary, scale, sinks, far)
        if chosen == "reference":
            return reference.attend(q, k, v, position_map, rotary, scale, softcap, sinks).to(q.dtype)
        return blocks.attend(q, k, v, position_map, rotary, scale, softcap, sinks, far)

    spans = layout.spans(query.shape[0])
    if len(spans) == 1 and _is_everything(spans[0], query):
        return attend(spans[0])
    output = query.new_zeros((*query.shape[:3], value.shape[-1]))
    for span in spans:
        output[span.rows, :, span.queries] = attend(span)
    return output


def choose_impl(query: Tensor, key: Tensor, value: Tensor, softcap: float | None = None) -> Literal["flash", "blocks"]:
    """The implementation that "auto" means for these tensors; the reason for the slower one is logged once."""
    reason = _flash_lacks(query, key, value, softcap)
    if reason is None:
        return "flash"
    _log_fallback(reason)
    return "blocks"


def _flash_lacks(query: Tensor, key: Tensor, value: Tensor, softcap: float | None) -> str | None:
    """What this call needs that impl="flash" does not have; None if it has all."""
    if softcap is not None:
        return "softcap"
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
        return "gradients (torch.inference_mode() turns them off)"
    return windowed.unsupported(query, key, value)


@cache
def _log_fallback(reason: str) -> None:
    logger.info("attention runs on impl='blocks', slower than 'flash', which does not take %s", reason)


def _take(x: Tensor, rows: slice, slots: Slots) -> Tensor:
    return x[rows][:, :, slots]


def _before(slots: Slots, end: int) -> Slots:
    return slots if isinstance(slots, slice) else slots[slots < end]


def _is_everything(span: Span, query: Tensor) -> bool:
    return span.rows == slice(0, query.shape[0]) and span.queries == slice(0, query.shape[2])


def _check(query: Tensor, key: Tensor, value: Tensor, rotary: Rotary | None, layout: Layout, impl: str) -> None:
    problem = _problem(query, key, value, rotary, layout, impl)
    if problem is not None:
        shapes = f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
        raise ValueError(f"attention: {problem}; {shapes}")


def _problem(query: Tensor, key: Tensor, value: Tensor, rotary: Rotary | None, layout: Layout, impl: str) -> str | None:
    """What does not fit. Text is made only where something is wrong: a decode step has microseconds to spare."""
    if impl not in get_args(Implementation):
        return f"impl must be one of {', '.join(get_args(Implementation))}, got {impl!r}"
    if not query.ndim == key.ndim == value.ndim == 4:
        return "tensors must be (batch, heads, tokens, head_dim)"
    if not query.shape[0] == key.shape[0] == value.shape[0]:
        return "batch sizes differ"
    if key.shape[1:3] != value.shape[1:3]:
        return "key and value heads or lengths differ"
    if query.shape[-1] != key.shape[-1]:
        return "query and key head dimensions differ"
    if query.shape[1] % key.shape[1] != 0:
        return "query heads must be a multiple of key heads"
    if not query.dtype == key.dtype == value.dtype:
        return f"dtypes differ: {query.dtype}, {key.dtype}, {value.dtype}"
    if (layout.query_length, layout.key_length) != (query.shape[2], key.shape[2]):
        return f"layout is for {layout.query_length} queries and {layout.key_length} keys"
    if not 0 <= layout.first_query <= key.shape[2] - query.shape[2]:
        return f"query_start {layout.first_query} leaves no room for {query.shape[2]} queries among {key.shape[2]} keys"
    if rotary is not None and rotary.offset + rotary.dim > query.shape[-1]:
        return f"a rotary embedding of {rotary.dim} dimensions does not fit"
    mask = layout.key_mask
    if mask is not None and (mask.ndim != 2 or mask.shape[0] != query.shape[0]):
        return f"key_mask must be (batch, keys), got {tuple(mask.shape)}"
    return None


def _check_far_keys(far_keys: Tensor, key: Tensor, position_map: PositionMap, layout: Layout) -> None:
    band = far_band(position_map)
    if band is None:
        raise ValueError(f"attention: far_keys needs a map with one far band, which {position_map} is not")
    needed = layout.first_query + layout.query_length - band.first
    fits = far_keys.ndim == 4 and (*far_keys.shape[:2], far_keys.shape[3]) == (*key.shape[:2], key.shape[3])
    if not fits or far_keys.shape[2] < needed or far_keys.dtype != key.dtype:
        raise ValueError(
            f"attention: far_keys {tuple(far_keys.shape)}, {far_keys.dtype}, do not fit key {tuple(key.shape)}, "
            f"{key.dtype}: {max(needed, 0)} slots are needed"
        )
