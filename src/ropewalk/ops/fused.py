# SPDX-License-Identifier: Apache-2.0
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
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ropewalk.maps import Band
from ropewalk.ops.call import Call
from ropewalk.ops.layout import Step
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
    return f"head dimension {head_dim}" if head_dim > 256 or head_dim % 8 else call.extra("slopes")


def attend(call: Call) -> Tensor:
    """See `ropewalk.ops.attention`."""
    rerotate = kernel("rerotate").rerotate
    call = _readable(call)
    rotary, runs = call.rotary, []
    for run, bands in _runs(call):
        keys = run.key.shape[2]
        passes, strips = _passes(bands, keys)
        output = lse = None
        for near, far in passes:
            banded = kernel("banded").Banded(
                query=rerotate(run.query, near.query_positions, run.past, rotary, near.first_query - run.past),
                key=rerotate(run.key, near.key_positions, 0, rotary),
                value=run.value,
                scale=run.scale,
                near_low=near.low,
                near_high=near.high,
                softcap=run.softcap,
                sinks=run.sinks if near is bands[0] else None,
                return_lse=len(passes) > 1 or bool(strips),
                slopes=run.slopes,
            )
            if run.slopes is not None:
                banded.near_positions = _positions(run, near)
            if far is not None:
                seen = run.key[:, :, : far.high(keys - 1)]
                banded.far_query = rerotate(
                    run.query, far.query_positions, run.past, rotary, far.first_query - run.past
                )
                banded.far_key = (
                    run.far_keys if run.far_keys is not None else rerotate(seen, far.key_positions, 0, rotary)
                )
                banded.far_high = far.high
                if run.slopes is not None:
                    banded.far_positions = _positions(run, far)
            part, part_lse = kernel(_prefill_kernel(banded)).attend(banded)
            if output is None or lse is None:
                output, lse = part, part_lse
            else:
                output, lse = merge(output, lse, part, part_lse)
                output = output.to(run.query.dtype)
        if strips:
            narrow = kernel("narrow_keys").Narrow(
                run.query, run.key, run.value, strips, rotary, output, lse, run.scale, run.softcap, run.slopes
            )
            kernel(_narrow_kernel(narrow)).attend(narrow)
        assert output is not None
        runs.append(output)
    return torch.cat(runs, dim=2) if len(runs) > 1 else runs[0]


def attend_step(call: Call, step: Step) -> Tensor:
    """Attention of one query a row. Far keys are re-rotated on their way from memory: kept ones would cost as much."""
    if call.query_scaling is not None:
        factors = step.query_factors.get(call.query_scaling)
        if factors is None:
            positions = step.positions(call.key.shape[2], call.query.device)
            factors = call.query_scaling(positions)[:, None, None, None]
            step.query_factors[call.query_scaling] = factors
        call = replace(call, query=call.query * factors.to(call.query.dtype), query_scaling=None)
    output: Tensor = kernel("decode").attend(call, step)
    return output


def _positions(call: Call, band: Band) -> tuple[Tensor | None, Tensor | None]:
    """Where the band has the queries and the keys, by token."""
    keys, device = call.key.shape[2], call.query.device
    query, key = (call.rotary.positions(function, keys, device) for function in band.functions)
    return query, key


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


def _passes(bands: tuple[Band, ...], keys: int) -> tuple[list[tuple[Band, Band | None]], list[Band]]:
    """What each pass sees near and far, and the narrow bands. The nearest band and the one that goes on to the first
    key share a pass; each other one that is not narrow has its own."""
    nearest, *farther = (band for band in bands if band.high(keys - 1) > 0)
    far = farther.pop() if farther and farther[-1].low.is_beginning else None
    strips = [band for band in farther if kernel("narrow_keys").takes(band)]
    others = [(band, None) for band in farther if band not in strips]
    return [(nearest, far), *others], strips


@cache
def kernel(name: str) -> Any:
    """A module of `ropewalk.ops.triton`."""
    return import_module(f"ropewalk.ops.triton.{name}")


def _prefill_kernel(banded: Banded) -> str:
    """The kernel that takes the pass. Which and why is logged once."""
    reason = _not_hopper(banded.query.device) or kernel("hopper_prefill").lacks(banded)
    _log_kernel("prefill", reason)
    return "hopper_prefill" if reason is None else "prefill"


def _narrow_kernel(narrow: Narrow) -> str:
    """The same for narrow bands."""
    reason = _not_hopper(narrow.query.device) or kernel("hopper_narrow").lacks(narrow)
    _log_kernel("prefill of narrow bands", reason)
    return "hopper_narrow" if reason is None else "narrow"


@cache
def _not_hopper(device: torch.device) -> str | None:
    """Why the kernels for Hopper GPUs cannot be had; None if they can."""
    if device.type != "cuda":
        return f"device {device.type}"
    if torch.cuda.get_device_capability(device) != (9, 0):
        return torch.cuda.get_device_name(device)
    try:
        kernel("hopper_narrow")
    except ImportError as error:
        return f"this installation ({error})"
    return None


@cache
def _log_kernel(work: str, reason: str | None) -> None:
    if reason is None:
        logger.info("%s runs on the kernel for Hopper GPUs", work)
    else:
        logger.info("%s runs on the portable kernel; the one for Hopper GPUs does not take %s", work, reason)
