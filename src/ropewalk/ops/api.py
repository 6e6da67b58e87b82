"""`attention`: checks the input, chooses an implementation, takes padded batches apart."""

from __future__ import annotations

import importlib.util
import logging
import os
from functools import cache
from typing import Literal, get_args

import torch
from torch import Tensor

from ropewalk.maps import PositionMap
from ropewalk.maps.query_scaling import QueryScaling
from ropewalk.ops import blocks, flash, reference, windowed
from ropewalk.ops.layout import Layout, Slots, Span, Step
from ropewalk.ops.rotary import Rotary, far_band

Implementation = Literal["auto", "reference", "blocks", "flash", "fused"]

_IMPLEMENTATIONS = get_args(Implementation)
_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# What is wrong with this installation for Triton kernels; looked up without importing Triton, which takes long.
_NO_KERNELS = (
    "ROCm"
    if torch.version.hip
    else None
    if importlib.util.find_spec("triton")
    else "this installation, which has no Triton"
)

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
        scale: of the scores, above 0; by default `head_dim ** -0.5`.
        softcap: `softcap * tanh(score / softcap)` instead of the score (Gemma 2).
        sinks: (heads,), a logit a head that takes part in the softmax and adds nothing (gpt-oss).
        query_scaling: factor on each query by its true position.
        far_keys: (batch, key heads, far slots, head_dim), the key slots before the last query's neighbor window,
            already turned to the far band's `key_positions`, for a map with one far band: a caller that keeps them
            between calls spares the operator the work. Slots of keys that are far from no query may hold anything.
            impl="reference" turns the keys itself, and so does "fused" for one query.
        impl: "auto" chooses; "reference" is the specification, in float32, and holds the whole matrix; "fused" is one
            kernel for near and far keys, on CUDA devices; "flash" is one kernel pass a band; "blocks" is plain tensor
            operations, for whatever the others cannot take. The last three use memory linear in the number of keys.
            For one query a row without gaps "fused" does not wait for the device: a tensor `query_start` is not read,
            and what lies past the last key slot counts as that slot. torch.compile does not trace "fused".

    Returns:
        (batch, heads, queries, value_dim), in the query's dtype.

    Raises:
        ValueError: shapes, layout or rotary embedding do not fit, or `impl` does not take this call.
    """
    layout = layout or Layout(query.shape[2], key.shape[2])
    _check(query, key, value, rotary, layout, impl)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if not scale > 0:
        raise ValueError(f"attention: scale must be above 0, got {scale}")
    chosen = choose_impl(query, key, value, softcap) if impl == "auto" else impl
    if impl in _LACKS and (reason := _LACKS[impl](query, key, value, softcap)):
        raise ValueError(f"attention: impl={impl!r} does not take {reason}; impl='blocks' does")
    step = layout.step(query.shape[0], query.device) if chosen == "fused" and layout.query_length == 1 else None
    if step is None or not isinstance(layout.query_start, Tensor):
        _check_start(layout)
    if far_keys is not None:
        _check_far_keys(far_keys, key, position_map, layout)
    if step is not None:
        return attend_step(query, key, value, position_map, rotary, step, scale, softcap, sinks, query_scaling)

    def attend(span: Span) -> Tensor:
        q = _take(query, span.rows, span.queries)
        k = _take(key, span.rows, span.keys)
        v = _take(value, span.rows, span.keys)
        far = None if far_keys is None else _take(far_keys, span.rows, _before(span.keys, far_keys.shape[2]))
        if query_scaling is not None:
            tokens = torch.arange(k.shape[2] - q.shape[2], k.shape[2], device=q.device)
            q = q * query_scaling(tokens).to(q.dtype)[:, None]
        if chosen == "fused":
            from ropewalk.ops import fused

            return fused.attend(q, k, v, position_map, rotary, scale, softcap, sinks, far)
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


def attend_step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    position_map: PositionMap,
    rotary: Rotary | None,
    step: Step,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    query_scaling: QueryScaling | None = None,
) -> Tensor:
    """`attention` of one query a row that impl="fused" takes, whose slots are known already. Nothing is checked."""
    from ropewalk.ops import fused

    if query_scaling is not None:
        factors = step.query_factors.get(query_scaling)
        if factors is None:
            factors = query_scaling(step.positions(key.shape[2], query.device))[:, None, None, None]
            step.query_factors[query_scaling] = factors
        query = query * factors.to(query.dtype)
    return fused.attend_step(query, key, value, position_map, rotary, step, scale, softcap, sinks)


def choose_impl(
    query: Tensor, key: Tensor, value: Tensor, softcap: float | None = None
) -> Literal["fused", "flash", "blocks"]:
    """The implementation that "auto" means for these tensors; the reason for a slower one is logged once.

    On CUDA devices "fused", or else as elsewhere: "flash", or else "blocks".
    """
    on_gpu = query.device.type == "cuda"
    not_fused = _fused_lacks(query, key, value, softcap) if on_gpu else None
    if on_gpu and not_fused is None:
        return "fused"
    not_flash = _flash_lacks(query, key, value, softcap)
    chosen: Literal["flash", "blocks"] = "flash" if not_flash is None else "blocks"
    # A log would end the graph that torch.compile traces.
    if not torch.compiler.is_compiling():
        if not_fused is not None:
            _log_fallback(chosen, "fused", not_fused)
        elif not_flash is not None:
            _log_fallback(chosen, "flash", not_flash)
    return chosen


def device_lacks(device: torch.device) -> str | None:
    """What a device needs to be right under a map, and has not; None where nothing is known to be missing."""
    if device.type == "mps" or (device.type == "xpu" and not torch.xpu.get_device_properties(device).has_fp64):
        return f"device {device.type} has no float64, in which positions become angles: move it to the CPU"
    return None


def kernels_lack(query: Tensor, key: Tensor, value: Tensor) -> str | None:
    """What these tensors need that the Triton kernels do not have; None if they have all. Can be traced."""
    device = query.device.type
    if device != "cuda" and not (device == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"):
        return f"device {device}"
    if _NO_KERNELS is not None:
        return _NO_KERNELS
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
        return "gradients (torch.inference_mode() turns them off)"
    if query.dtype not in _KERNEL_DTYPES:
        return f"{query.dtype}"
    head_dim, value_dim = key.shape[-1], value.shape[-1]
    if value_dim != head_dim:
        return f"value heads of {value_dim} dimensions beside key heads of {head_dim}"
    return f"head dimension {head_dim}" if head_dim > 256 or head_dim % 8 else None


def _fused_lacks(query: Tensor, key: Tensor, value: Tensor, softcap: float | None) -> str | None:
    """What this call needs that impl="fused" does not have; None if it has all."""
    # Neither would get to the kernels as numbers in memory.
    if torch.compiler.is_compiling():
        return "tracing by torch.compile"
    if not (type(query) is type(key) is type(value) is Tensor):
        return f"{type(query).__name__}, {type(key).__name__} and {type(value).__name__} instead of plain tensors"
    return kernels_lack(query, key, value)


def _flash_lacks(query: Tensor, key: Tensor, value: Tensor, softcap: float | None) -> str | None:
    """What this call needs that impl="flash" does not have; None if it has all."""
    if softcap is not None:
        return "softcap"
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
        return "gradients (torch.inference_mode() turns them off)"
    return windowed.unsupported(query, key, value)


_LACKS = {"fused": _fused_lacks, "flash": _flash_lacks}


@cache
def _log_fallback(chosen: str, faster: str, reason: str) -> None:
    # On a GPU much is lost, and few expect it.
    level = logging.WARNING if faster == "fused" else logging.INFO
    logger.log(level, "attention runs on impl=%r, slower than %r, which does not take %s", chosen, faster, reason)


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
    q, k, v = query.shape, key.shape, value.shape
    if impl not in _IMPLEMENTATIONS:
        return f"impl must be one of {', '.join(_IMPLEMENTATIONS)}, got {impl!r}"
    if not len(q) == len(k) == len(v) == 4:
        return "tensors must be (batch, heads, tokens, head_dim)"
    if not q[0] == k[0] == v[0]:
        return "batch sizes differ"
    if k[1] != v[1] or k[2] != v[2]:
        return "key and value heads or lengths differ"
    if q[3] != k[3]:
        return "query and key head dimensions differ"
    if q[1] % k[1] != 0:
        return "query heads must be a multiple of key heads"
    if not query.dtype == key.dtype == value.dtype:
        return f"dtypes differ: {query.dtype}, {key.dtype}, {value.dtype}"
    if layout.query_length != q[2] or layout.key_length != k[2]:
        return f"layout is for {layout.query_length} queries and {layout.key_length} keys"
    if rotary is not None and rotary.offset + rotary.dim > q[3]:
        return f"a rotary embedding of {rotary.dim} dimensions does not fit"
    if (lacks := device_lacks(query.device)) is not None:
        return lacks
    mask = layout.key_mask
    if mask is not None and (mask.ndim != 2 or mask.shape[0] != q[0]):
        return f"key_mask must be (batch, keys), got {tuple(mask.shape)}"
    return None


def _check_start(layout: Layout) -> None:
    queries, keys = layout.query_length, layout.key_length
    if not 0 <= layout.first_query <= keys - queries:
        raise ValueError(
            f"attention: query_start {layout.first_query} leaves no room for {queries} queries among {keys} keys"
        )


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
