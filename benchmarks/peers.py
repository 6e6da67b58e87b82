# SPDX-License-Identifier: Apache-2.0
"""Attention to compare with: plain attention by the kernels that can be had, and a map put together from such kernels.

All take query (batch, heads, queries, head_dim), key and value (batch, key heads, keys, head_dim), never expanded, and
are causal with the queries as the last keys. What cannot run a case raises, so that the table can say why.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from rows import Kind
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from ropewalk.maps import Band, PositionMap
from ropewalk.maps.base import EVERYTHING
from ropewalk.ops import Rotary

# Prepares a call on these tensors: what can be made once (masks, tables, compiled code) is made here, and not timed.
Make = Callable[[Tensor, Tensor, Tensor], Callable[[], Tensor]]

TRUE_POSITIONS = "true positions"  # what rows of plain attention have as their map

_BLOCK = 128  # of FlexAttention's block masks


@dataclass(frozen=True)
class Implementation:
    """A way to compute attention.

    Args:
        map: the position map, in words.
        context: what has to be entered around calls.
    """

    name: str
    kind: Kind
    map: str
    make: Make
    ships_with_torch: bool = False
    context: Callable[[], AbstractContextManager[object]] = nullcontext


def plain(work: str) -> list[Implementation]:
    """Plain attention for a kind of work: "prefill", "chunk" or "decode"."""
    if work == "prefill":
        return [
            _torchs("cuDNN", _sdpa, SDPBackend.CUDNN_ATTENTION),
            _torchs("FlashAttention 2", _sdpa, SDPBackend.FLASH_ATTENTION),
            _implementation("FlashAttention 4", _flash_4),
            _torchs("FlexAttention", _flex),
        ]
    if work == "chunk":
        return [
            _torchs("cuDNN", _sdpa_of_chunk),
            _torchs("cuDNN, two parts merged", _cudnn_in_parts),
            _torchs("FlashAttention 2", _flash_2_of_chunk),
            _implementation("FlashAttention 4", _flash_4),
            _torchs("FlexAttention", _flex),
        ]
    return [
        _torchs("cuDNN", _sdpa, SDPBackend.CUDNN_ATTENTION),
        _torchs("cuDNN, packed heads", _packed, SDPBackend.CUDNN_ATTENTION),
        _torchs("FlashAttention 2", _sdpa, SDPBackend.FLASH_ATTENTION),
        _torchs("FlashAttention 2, packed heads", _packed, SDPBackend.FLASH_ATTENTION),
        _implementation("FlashAttention 4", _flash_4),
        _implementation("FlashAttention 4, split keys", _flash_4_split),
        _torchs("FlexAttention", _flex),
    ]


def composition(position_map: PositionMap, rotary: Rotary) -> Implementation:
    """The map from one FlexAttention pass a band, with re-rotation and merge compiled into the same function."""

    def make(query: Tensor, key: Tensor, value: Tensor) -> Callable[[], Tensor]:
        return _flex_passes(query, key, value, position_map, rotary)

    return Implementation("two FlexAttention passes", "composition", str(position_map), make)


def _implementation(name: str, make: Make) -> Implementation:
    return Implementation(name, "plain", TRUE_POSITIONS, make)


def _torchs(name: str, make: Make, backend: SDPBackend | None = None) -> Implementation:
    context = nullcontext if backend is None else lambda: sdpa_kernel(backend)
    return Implementation(name, "plain", TRUE_POSITIONS, make, ships_with_torch=True, context=context)


def _sdpa(query: Tensor, key: Tensor, value: Tensor) -> Callable[[], Tensor]:
    causal, grouped = query.shape[2] > 1, query.shape[1] != key.shape[1]
    return lambda: scaled_dot_product_attention(query, key, value, is_causal=causal, enable_gqa=grouped)


def _packed(query: Tensor, key: Tensor, value: Tensor) -> Callable[[], Tensor]:
    """One query: the heads that share a key become its queries, which all see every key."""
    batch, heads, _, head_dim = query.shape
    packed = query.reshape(batch, key.shape[1], heads // key.shape[1], head_dim)
    return lambda: scaled_dot_product_attention(packed, key, value).reshape(query.shape)


def _sdpa_of_chunk(query: Tensor, key: Tensor, value: Tensor) -> Callable[[], Tensor]:
    raise ValueError("torch aligns cuDNN's causal mask with the first key, where a chunk needs the last one")


def _cudnn_in_parts(query: Tensor, key: Tensor, value: Tensor) -> Callable[[], Tensor]:
    """cuDNN on the keys before the chunk, which every query sees, and on the chunk's own; merged."""
    past = key.shape[2] - query.shape[2]

    def attend(begin: int, end: int, causal: bool) -> tuple[Tensor, Tensor]:
        output, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
            query, key[:, :, begin:end], value[:, :, begin:end], None, True, 0.0, causal, False
        )
        return output, lse.reshape(query.shape[:3])

    merge = torch.compile(_merge, dynamic=False) if query.is_cuda else _merge
    return lambda: merge(*attend(0, past, causal=False), *attend(past, key.shape[2], causal=True)).to(query.dtype)


def _flash_2_of_chunk(query: Tensor, key: Tensor, value: Tensor) -> Callable[[], Tensor]:
    # The operator itself: unlike SDPA's `is_causal`, its mask is aligned with the last key, and no other kernel can
    # take its place.
    return lambda: torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, 0.0, True)[0]


def _flash_4(query: Tensor, key: Tensor, value: Tensor, splits: int = 1) -> Callable[[], Tensor]:
    from flash_attn.cute import flash_attn_func  # type: ignore[import-not-found]

    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    causal = query.shape[2] > 1

    def call() -> Tensor:
        output: Any = flash_attn_func(q, k, v, causal=causal, num_splits=splits)
        return (output[0] if isinstance(output, tuple) else output).transpose(1, 2)

    return call


def _flash_4_split(query: Tensor, key: Tensor, value: Tensor) -> Callable[[], Tensor]:
    return _flash_4(query, key, value, splits=0)  # 0: as many as its heuristic says


def _flex(query: Tensor, key: Tensor, value: Tensor) -> Callable[[], Tensor]:
    attend, grouped = _compiled(_flex_plain, query), query.shape[1] != key.shape[1]
    mask = None if query.shape[2] == 1 else band_mask(EVERYTHING, query, key)
    return lambda: attend(query, key, value, mask, grouped)


def _flex_plain(query: Tensor, key: Tensor, value: Tensor, mask: BlockMask | None, grouped: bool) -> Tensor:
    return flex_attention(query, key, value, block_mask=mask, enable_gqa=grouped)


def _flex_passes(
    query: Tensor, key: Tensor, value: Tensor, position_map: PositionMap, rotary: Rotary
) -> Callable[[], Tensor]:
    if len(position_map.bands) != 2:
        raise ValueError(f"two passes do not make the {len(position_map.bands)} bands of {position_map}")
    near, far = position_map.bands
    past, keys = key.shape[2] - query.shape[2], key.shape[2]
    turn_query = rotary.table(far.query_positions, past, keys, query.device)
    turn_key = rotary.table(far.key_positions, 0, keys, query.device)
    grouped = query.shape[1] != key.shape[1]
    if query.shape[2] == 1:  # its bands are slices of the keys
        end = far.high(keys - 1)
        attend = _compiled(_flex_two_slices, query)
        return lambda: attend(query, key, value, turn_query, turn_key[:, :end], end, grouped)
    masks = band_mask(near, query, key), band_mask(far, query, key)
    attend = _compiled(_flex_two_masks, query)
    return lambda: attend(query, key, value, turn_query, turn_key, *masks, grouped)


def _flex_two_masks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    turn_query: Tensor,
    turn_key: Tensor,
    near: BlockMask,
    far: BlockMask,
    grouped: bool,
) -> Tensor:
    parts = (
        _flex_with_lse(query, key, value, near, grouped),
        _flex_with_lse(_turned(query, turn_query), _turned(key, turn_key), value, far, grouped),
    )
    return _merge(*parts[0], *parts[1]).to(query.dtype)


def _flex_two_slices(
    query: Tensor, key: Tensor, value: Tensor, turn_query: Tensor, turn_key: Tensor, end: int, grouped: bool
) -> Tensor:
    parts = (
        _flex_with_lse(query, key[:, :, end:], value[:, :, end:], None, grouped),
        _flex_with_lse(
            _turned(query, turn_query), _turned(key[:, :, :end], turn_key), value[:, :, :end], None, grouped
        ),
    )
    return _merge(*parts[0], *parts[1]).to(query.dtype)


def _flex_with_lse(
    query: Tensor, key: Tensor, value: Tensor, mask: BlockMask | None, grouped: bool
) -> tuple[Tensor, Tensor]:
    output, extra = flex_attention(
        query, key, value, block_mask=mask, enable_gqa=grouped, return_aux=AuxRequest(lse=True)
    )
    return output, extra.lse


def _turned(x: Tensor, table: Tensor) -> Tensor:
    """x turned by a table of `Rotary.shift`, half-split pairs over the whole head; fused when compiled."""
    first, second = x.float().chunk(2, dim=-1)
    cosine, sine = table[0], table[1]
    return torch.cat((first * cosine - second * sine, second * cosine + first * sine), dim=-1).to(x.dtype)


def _merge(output: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> Tensor:
    weight = torch.sigmoid(other_lse - lse)[..., None]
    return torch.lerp(output.float(), other.float(), weight)


def _compiled(function: Callable[..., Tensor], query: Tensor) -> Callable[..., Tensor]:
    """Compiled for these very shapes, as is best for FlexAttention; off a GPU as it is."""
    if not query.is_cuda:
        return function
    # Every shape is one more version of the same code, and torch gives up on code with many.
    torch._dynamo.config.recompile_limit = 256
    torch._dynamo.config.accumulated_recompile_limit = 4096
    return torch.compile(function, dynamic=False, fullgraph=True)


def band_mask(band: Band, query: Tensor, key: Tensor) -> BlockMask:
    """The band as a block mask. `create_block_mask` would hold the whole query x key matrix: 16 GiB at 128k tokens."""
    queries, keys = query.shape[2], key.shape[2]
    assert band.distances is not None
    first, stop = band.distances[0], keys if band.distances[1] is None else band.distances[1]
    past = keys - queries

    def inside(batch: Tensor, head: Tensor, query_index: Tensor, key_index: Tensor) -> Tensor:
        distance = query_index + past - key_index
        return (distance >= first) & (distance < stop)

    low_query, high_query = _block_edges(queries, query.device)
    low_key, high_key = _block_edges(keys, query.device)
    nearest = (low_query + past)[:, None] - high_key
    farthest = (high_query + past)[:, None] - low_key
    any_inside = (farthest >= first) & (nearest < stop)
    all_inside = (nearest >= first) & (farthest < stop)
    return BlockMask.from_kv_blocks(
        *_block_lists(any_inside & ~all_inside),
        *_block_lists(all_inside),
        BLOCK_SIZE=_BLOCK,
        mask_mod=inside,
        seq_lengths=(queries, keys),
    )


def _block_edges(tokens: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """First and last token of each block."""
    low = torch.arange(0, tokens, _BLOCK, device=device)
    return low, (low + _BLOCK - 1).clamp(max=tokens - 1)


def _block_lists(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix of blocks as BlockMask holds it: how many of a row, and their columns, those that count first."""
    order = torch.argsort(blocks.int(), dim=1, descending=True, stable=True)
    return blocks.sum(dim=1).int()[None, None], order.int()[None, None].contiguous()
