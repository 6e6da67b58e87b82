# SPDX-License-Identifier: Apache-2.0
"""Attention to narrow bands on Hopper GPUs; see `narrow` and, for the kernel, `hopper_narrow_kernel`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import triton
from torch import Tensor
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ropewalk.maps import Band
from ropewalk.ops.triton import hopper_narrow_kernel
from ropewalk.ops.triton.hopper_prefill import can_be_described, descriptor
from ropewalk.ops.triton.launch import Launch
from ropewalk.ops.triton.narrow_keys import Narrow, in_parts, prepare, width
from ropewalk.ops.triton.primitives import LOG2_E
from ropewalk.ops.triton.tuned import tuned

_HEAD_DIMS = (64, 128)
_ROWS = hopper_narrow_kernel.ROWS.value
_CONSUMERS = hopper_narrow_kernel.CONSUMERS.value
# Before everything: what is there has no keys.
_NOWHERE = -(1 << 30)


@dataclass(frozen=True)
class HopperNarrowConfig:
    """How the work is cut.

    Args:
        keys: keys of a tile.
        stages: tiles of keys, and of values, in shared memory; two at most.
    """

    keys: int
    stages: int


@cache
def default_config(head_dim: int, dtype: torch.dtype, device: torch.device) -> HopperNarrowConfig:
    """The tiles measured best on this GPU."""
    return HopperNarrowConfig(**tuned("hopper_narrow", head_dim, dtype.itemsize, device))


def lacks(narrow: Narrow) -> str | None:
    """What a call on a Hopper GPU needs that `attend` does not have; None if it has all."""
    query, rotary = narrow.query, narrow.rotary
    if query.dtype not in (torch.bfloat16, torch.float16):
        return f"{query.dtype}"
    if query.shape[-1] not in _HEAD_DIMS:
        return f"head dimension {query.shape[-1]}"
    if narrow.softcap is not None:
        return "softcap"
    if narrow.slopes is not None:
        return "slopes (ALiBi)"
    if rotary.dim != query.shape[-1] or rotary.interleaved:
        return "a rotary embedding of other dimensions than all, or interleaved"
    if not all(can_be_described(x) for x in (query, narrow.key, narrow.value, narrow.output)):
        return "tensors whose rows do not begin at multiples of 16 bytes"
    return None


def attend(narrow: Narrow, chunk: int | None = None, config: HopperNarrowConfig | None = None) -> Tensor:
    """As `ropewalk.ops.triton.narrow.attend`, for what `lacks` finds nothing in."""
    work = prepare(narrow)
    if work is None:
        return narrow.output
    query, key, value, output, lse, rotary = (
        narrow.query, narrow.key, narrow.value, narrow.output, narrow.lse, narrow.rotary
    )  # fmt: skip
    heads, queries, head_dim = query.shape[1:]
    key_heads = key.shape[1]
    groups = heads // key_heads
    config = config or default_config(head_dim, query.dtype, query.device)
    together = min(int(triton.next_power_of_2(groups)), _ROWS)
    positions = _ROWS // together * _CONSUMERS  # of a program
    tiles = rotary.tables.get(
        ("tiles", work.bands, positions, config.keys, query.device),
        lambda _: _tiles(work.bands, positions, config.keys, query.device),
    )
    constants = {
        "HEADS": together,
        "POSITIONS": _ROWS // together,
        "KEYS": config.keys,
        "D": head_dim,
        "STAGES": config.stages,
        "MOST_TILES": max(triton.next_power_of_2(tiles.shape[0]), 32),
    }
    launch = rotary.tables.get(
        ("hopper_narrow", tuple(constants.values()), query.dtype, query.device, lse.stride(2)),
        lambda _: Launch(hopper_narrow_kernel.narrow, constants, {"num_warps": 4}),
    )
    # Whole programs, for what a program writes ends nowhere but at the last query.
    for part in in_parts(key, work, rotary, chunk, multiple=positions):
        here = part.rows
        grid = (
            triton.cdiv(part.end - part.begin, positions),
            key_heads * triton.cdiv(groups, together),
            query[here].shape[0],
        )
        with torch.cuda.device_of(query):  # type: ignore[no-untyped-call]
            if part.write_keys is not None:
                part.write_keys()
            launch[grid](
                _grouped(query[here], key_heads, together),
                descriptor(part.keys, config.keys),
                descriptor(value[here], config.keys),
                _grouped(output[here], key_heads, together),
                lse[here],
                tiles,
                work.table.bands,
                work.frequencies,
                work.past,
                part.begin,
                queries,
                part.chunk,
                tiles.shape[0] - 1,
                groups,
                narrow.scale * LOG2_E.value,
                *lse.stride(),
                *launch.constants,
            )
    return output


def _grouped(x: Tensor, key_heads: int, together: int) -> TensorDescriptor:
    """x (batch, heads, tokens, head_dim) as tiles of some heads that share a key head, at some positions."""
    grouped = x.unflatten(1, (key_heads, -1))  # type: ignore[no-untyped-call]
    return descriptor(grouped, together, _ROWS // together)


def _tiles(bands: tuple[Band, ...], positions: int, keys: int, device: torch.device) -> Tensor:
    """The tiles that a program with so many positions goes through, one a row, and a row more; for the columns see
    `hopper_narrow_kernel.COLUMNS`."""
    rows, slot = [], 0
    for number, band in enumerate(bands):
        first, stop = band.high.back + 1, band.low.back + 1
        # From the band's near end on.
        for end in range(positions - first, 1 - stop, -keys):
            rows.append([end - keys, first, stop, number, 0, slot + stop - 1, 0, 0])
        slot += width(band)
    farthest = _NOWHERE
    for row in reversed(rows):
        farthest = row[4] = max(farthest, row[0])
    rows.append([_NOWHERE, 0, 0, len(bands), _NOWHERE, 0, 0, 0])
    with torch.inference_mode(False), torch.no_grad():
        tiles = torch.tensor(rows, dtype=torch.int32, device=device)
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
    return tiles
