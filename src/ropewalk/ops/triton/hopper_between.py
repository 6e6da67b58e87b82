"""Attention to the bands between the nearest one and the one without an end, on Hopper GPUs; see `between` and, for the
kernel, `hopper_between_kernel`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache

import torch
import triton
from torch import Tensor
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ropewalk.maps import Band
from ropewalk.ops.rotary import Rotary
from ropewalk.ops.triton import hopper_between_kernel
from ropewalk.ops.triton.between import prepare, turned_keys
from ropewalk.ops.triton.hopper import can_be_described, descriptor
from ropewalk.ops.triton.tuned import tuned

_HEAD_DIMS = (64, 128)
_ROWS = hopper_between_kernel.ROWS.value
_CONSUMERS = hopper_between_kernel.CONSUMERS.value
# Before everything: what is there has no keys.
_NOWHERE = -(1 << 30)


@dataclass(frozen=True)
class HopperBetweenConfig:
    """How the work is cut.

    Args:
        keys: keys of a tile.
        stages: tiles of keys, and of values, in shared memory; two at most.
    """

    keys: int
    stages: int


@cache
def default_config(head_dim: int, dtype: torch.dtype, device: torch.device) -> HopperBetweenConfig:
    """The tiles measured best on this GPU."""
    return HopperBetweenConfig(**tuned("hopper_between", head_dim, dtype.itemsize, device))


def lacks(
    query: Tensor, key: Tensor, value: Tensor, output: Tensor, rotary: Rotary | None, softcap: float | None
) -> str | None:
    """What a call on a Hopper GPU needs that `between` does not have; None if it has all."""
    if query.dtype not in (torch.bfloat16, torch.float16):
        return f"{query.dtype}"
    if query.shape[-1] not in _HEAD_DIMS:
        return f"head dimension {query.shape[-1]}"
    if softcap is not None:
        return "softcap"
    if rotary is None or rotary.dim != query.shape[-1] or rotary.interleaved:
        return "a rotary embedding of other dimensions than all, or interleaved"
    if not all(can_be_described(x) for x in (query, key, value, output)):
        return "tensors whose rows do not begin at multiples of 16 bytes"
    return None


def between(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bands: Sequence[Band],
    rotary: Rotary | None,
    output: Tensor,
    lse: Tensor,
    scale: float,
    chunk: int | None = None,
    config: HopperBetweenConfig | None = None,
) -> Tensor:
    """Adds the keys of some bands to attention over the others, as `between.between`, for what `lacks` finds nothing
    in."""
    work = prepare(query, key, value, bands, rotary, output, lse)
    if work is None:
        return output
    heads, queries, head_dim = query.shape[1:]
    key_heads = key.shape[1]
    groups = heads // key_heads
    config = config or default_config(head_dim, query.dtype, query.device)
    together = min(int(triton.next_power_of_2(groups)), _ROWS)
    positions = _ROWS // together * _CONSUMERS  # of a program
    tiles = _tiles(work.bands, positions, config.keys, query.device)
    # Whole programs, for what a program writes ends nowhere but at the last query.
    for part in turned_keys(key, work, rotary, chunk, multiple=positions):
        here = part.rows
        grid = (
            triton.cdiv(part.end - part.begin, positions),
            key_heads * triton.cdiv(groups, together),
            query[here].shape[0],
        )
        with torch.cuda.device_of(query):  # type: ignore[no-untyped-call]
            hopper_between_kernel.between[grid](
                _grouped(query[here], key_heads, together),
                descriptor(part.keys, config.keys),
                descriptor(value[here], config.keys),
                _grouped(output[here], key_heads, together),
                lse[here],
                tiles,
                work.tables.bands,
                work.tables.positions,
                work.frequencies,
                work.past,
                part.begin,
                queries,
                part.chunk,
                tiles.shape[0] - 1,
                work.capacity,
                groups,
                scale * math.log2(math.e),
                *lse.stride(),
                HEADS=together,
                POSITIONS=_ROWS // together,
                KEYS=config.keys,
                D=head_dim,
                STAGES=config.stages,
                MOST_TILES=max(triton.next_power_of_2(tiles.shape[0]), 32),
                num_warps=4,
            )
    return output


def _grouped(x: Tensor, key_heads: int, together: int) -> TensorDescriptor:
    """x (batch, heads, tokens, head_dim) as tiles of some heads that share a key head, at some positions."""
    grouped = x.unflatten(1, (key_heads, -1))  # type: ignore[no-untyped-call]
    return descriptor(grouped, together, _ROWS // together)


@lru_cache(maxsize=16)
def _tiles(bands: tuple[Band, ...], positions: int, keys: int, device: torch.device) -> Tensor:
    """The tiles that a program with so many positions goes through, one a row, and a row more; for the columns see
    `hopper_between_kernel.COLUMNS`."""
    rows, slot = [], 0
    for number, band in enumerate(bands):
        stop = band.stop or 0
        # From the band's near end on.
        for end in range(positions - band.first, 1 - stop, -keys):
            rows.append([end - keys, band.first, stop, number, 0, slot + stop - 1, 0, 0])
        slot += stop - band.first
    farthest = _NOWHERE
    for row in reversed(rows):
        farthest = row[4] = max(farthest, row[0])
    rows.append([_NOWHERE, 0, 0, len(bands), _NOWHERE, 0, 0, 0])
    with torch.inference_mode(False), torch.no_grad():
        tiles = torch.tensor(rows, dtype=torch.int32, device=device)
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
    return tiles
