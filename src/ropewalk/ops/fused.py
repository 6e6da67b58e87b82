"""Attention under a position map from the Triton kernels: near and far keys in one pass, a decode step in two launches.

Imports Triton only when a call runs.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ropewalk.maps import Band
from ropewalk.maps.positions import PositionFunction
from ropewalk.ops.call import Call
from ropewalk.ops.layout import Step
from ropewalk.ops.rotary import Rotary
from ropewalk.ops.windowed import merge

if TYPE_CHECKING:
    from ropewalk.ops.triton.banded import Banded
    from ropewalk.ops.triton.narrow_keys import Narrow

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Offsets within a tile, of up to 256 tokens, are 32 bits.
_LARGEST_STRIDE = 1 << 23
# What is wrong with this installation for Triton kernels; looked up without importing Triton, which takes long.
_NO_KERNELS = (
    "ROCm"
    if torch.version.hip
    else None
    if importlib.util.find_spec("triton")
    else "this installation, which has no Triton"
)

logger = logging.getLogger("ropewalk")


def lacks(call: Call) -> str | None:
    """What this call needs that `attend` does not have; None if it has all."""
    # Neither would get to the kernels as numbers in memory.
    if torch.compiler.is_compiling():
        return "tracing by torch.compile"
    query, key, value = call.query, call.key, call.value
    if not (type(query) is type(key) is type(value) is Tensor):
        return f"{type(query).__name__}, {type(key).__name__} and {type(value).__name__} instead of plain tensors"
    return kernels_lack(call)


def kernels_lack(call: Call) -> str | None:
    """The same, but for tracing: what this call, once it is traced, needs that the kernels do not have."""
    device = call.query.device.type
    if device != "cuda" and not (device == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"):
        return f"device {device}"
    if _NO_KERNELS is not None:
        return _NO_KERNELS
    if call.needs_gradients:
        return "gradients (torch.inference_mode() turns them off)"
    if call.query.dtype not in _DTYPES:
        return f"{call.query.dtype}"
    head_dim, value_dim = call.key.shape[-1], call.value.shape[-1]
    if value_dim != head_dim:
        return f"value heads of {value_dim} dimensions beside key heads of {head_dim}"
    return f"head dimension {head_dim}" if head_dim > 256 or head_dim % 8 else call.extra()


def attend(call: Call) -> Tensor:
    """See `ropewalk.ops.attention`."""
    from ropewalk.ops.triton import narrow, prefill
    from ropewalk.ops.triton.narrow_keys import Narrow

    call = _readable(call)
    runs = []
    for run, bands in _runs(call):
        strips, passes = _passes(run, bands)
        output = lse = None
        for banded in passes:
            hopper = _hopper_prefill(banded)
            part, part_lse = (hopper or prefill).attend(banded)
            if output is None or lse is None or part_lse is None:
                output, lse = part, part_lse
            else:
                merged, lse = merge(output, lse, part, part_lse)
                output = merged.to(call.query.dtype)
        assert output is not None
        if strips:
            assert lse is not None
            work = Narrow(run.query, run.key, run.value, strips, run.rotary, output, lse, run.scale, run.softcap)
            (_hopper_narrow(work) or narrow).attend(work)
        runs.append(output)
    return torch.cat(runs, dim=2) if len(runs) > 1 else runs[0]


def attend_step(call: Call, step: Step) -> Tensor:
    """Attention of one query a row. Far keys are re-rotated on their way from memory: kept ones would cost as much."""
    from ropewalk.ops.triton import decode

    if call.query_scaling is not None:
        factors = step.query_factors.get(call.query_scaling)
        if factors is None:
            positions = step.positions(call.key.shape[2], call.query.device)
            factors = call.query_scaling(positions)[:, None, None, None]
            step.query_factors[call.query_scaling] = factors
        call = replace(call, query=call.query * factors.to(call.query.dtype), query_scaling=None)
    return decode.decode(call, step)


def _readable(call: Call) -> Call:
    """The call with tensors whose tokens lie near enough to each other for a tile's offsets."""
    names = ("query", "key", "value", "far_keys")
    tensors = {name: x for name in names if (x := getattr(call, name)) is not None}
    wide = {name: x.contiguous() for name, x in tensors.items() if x.stride(2) >= _LARGEST_STRIDE and x.shape[2] > 1}
    return replace(call, **wide) if wide else call


def _runs(call: Call) -> Iterator[tuple[Call, tuple[Band, ...]]]:
    """Parts of the queries that share their bands."""
    past, keys = call.past, call.key.shape[2]
    for first, stop, bands in call.position_map.bands_by_query(past, keys):
        if stop - first == keys - past:
            yield call, bands
        else:
            yield (
                replace(
                    call,
                    query=call.query[:, :, first - past : stop - past],
                    key=call.key[:, :, :stop],
                    value=call.value[:, :, :stop],
                ),
                bands,
            )


def _passes(call: Call, bands: tuple[Band, ...]) -> tuple[list[Band], list[Banded]]:
    """The narrow bands, and what is to be done for the others: the nearest band and the one that goes on to the first
    key in one pass, and a pass for each other one. All but a single pass give their log-sum-exp."""
    from ropewalk.ops.triton.banded import Banded
    from ropewalk.ops.triton.narrow_keys import is_narrow

    keys, past, rotary = call.key.shape[2], call.past, call.rotary
    nearest, *farther = (band for band in bands if band.first_query < max(keys, 1))
    far = farther.pop() if farther and farther[-1].low.is_beginning else None
    strips = [band for band in farther if is_narrow(band)]
    others = [band for band in farther if not is_narrow(band)]

    def seen_through(band: Band) -> Banded:
        return Banded(
            query=_rerotated_from(band.first_query - past, call.query, band.query_positions, past, rotary),
            key=_rerotated(call.key, band.key_positions, 0, rotary),
            value=call.value,
            scale=call.scale,
            near_low=band.low,
            near_high=band.high,
            softcap=call.softcap,
            return_lse=bool(farther),
        )

    first = seen_through(nearest)
    first.sinks = call.sinks
    if far is not None:
        end = far.high(keys - 1)
        first.far_query = _rerotated_from(far.first_query - past, call.query, far.query_positions, past, rotary)
        first.far_key = call.far_keys
        if first.far_key is None:
            first.far_key = _rerotated(call.key[:, :, :end], far.key_positions, 0, rotary)
        first.far_high = far.high
    return strips, [first, *map(seen_through, others)]


def _hopper_prefill(banded: Banded) -> Any:
    """The module of the kernel for Hopper GPUs, if it takes the pass. Which and why is logged once."""
    reason = _not_hopper(banded.query.device)
    if reason is None:
        from ropewalk.ops.triton import hopper_prefill

        reason = hopper_prefill.lacks(banded)
        if reason is None:
            _log_kernel("prefill", None)
            return hopper_prefill
    _log_kernel("prefill", reason)
    return None


def _hopper_narrow(narrow: Narrow) -> Any:
    """The same for narrow bands."""
    reason = _not_hopper(narrow.query.device)
    if reason is None:
        from ropewalk.ops.triton import hopper_narrow

        reason = hopper_narrow.lacks(narrow)
        if reason is None:
            _log_kernel("prefill of narrow bands", None)
            return hopper_narrow
    _log_kernel("prefill of narrow bands", reason)
    return None


@cache
def _not_hopper(device: torch.device) -> str | None:
    """Why the kernels for Hopper GPUs cannot be had; None if they can."""
    if device.type != "cuda":
        return f"device {device.type}"
    if torch.cuda.get_device_capability(device) != (9, 0):
        return torch.cuda.get_device_name(device)
    try:
        from ropewalk.ops.triton import hopper_narrow  # noqa: F401
    except ImportError as error:
        return f"this installation ({error})"
    return None


@cache
def _log_kernel(work: str, reason: str | None) -> None:
    if reason is None:
        logger.info("%s runs on the kernel for Hopper GPUs", work)
    else:
        logger.info("%s runs on the portable kernel; the one for Hopper GPUs does not take %s", work, reason)


def _rerotated(x: Tensor, function: PositionFunction, begin: int, rotary: Rotary, out: Tensor | None = None) -> Tensor:
    """As `rotary.rerotated`, in one pass through memory; into `out` where there is something to do."""
    if not rotary.moves(function):
        return x
    from ropewalk.ops.triton.rerotate import rerotate

    cosine, sine = rotary.table(function, begin, begin + x.shape[2], x.device)
    return rerotate(x, cosine, sine, rotary, out)


def _rerotated_from(first: int, x: Tensor, function: PositionFunction, begin: int, rotary: Rotary) -> Tensor:
    """The same, with anything in the tokens before `first`."""
    if first <= 0 or not rotary.moves(function):
        return _rerotated(x, function, begin, rotary)
    found = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if first < x.shape[2]:
        _rerotated(x[:, :, first:], function, begin + first, rotary, found[:, :, first:])
    return found
