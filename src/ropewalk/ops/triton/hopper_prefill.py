# SPDX-License-Identifier: Apache-2.0
"""Attention to one or two bands on Hopper GPUs, at the speed of the fastest plain attention there.

The kernel is in `hopper_prefill_kernel`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ropewalk.maps.edges import BEGINNING
from ropewalk.ops.triton import hopper_prefill_kernel
from ropewalk.ops.triton.banded import Banded
from ropewalk.ops.triton.launch import Launch, multiples_of_16
from ropewalk.ops.triton.primitives import LOG2_E
from ropewalk.ops.triton.tables import edge_numbers
from ropewalk.ops.triton.tuned import tuned

_DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}


@dataclass(frozen=True)
class HopperConfig:
    """Tile sizes of the kernel.

    Args:
        consumers: warp groups that multiply, each with its own `rows` queries.
        keys: keys of a tile.
        stages: tiles of keys, and of values, in shared memory.
    """

    consumers: int
    keys: int
    stages: int
    rows: int = 64

    @property
    def registers(self) -> tuple[int, int]:
        """Registers a thread of a consumer and of the producer has."""
        return {2: (240, 24), 3: (160, 24)}[self.consumers]


@cache
def default_config(head_dim: int, dtype: torch.dtype, device: torch.device) -> HopperConfig:
    """The tiles measured best on this GPU."""
    return HopperConfig(**tuned("hopper_prefill", head_dim, dtype.itemsize, device))


_HEAD_DIMS = (64, 128)
# No configuration takes narrower tiles of keys, and a diagonal window must hold one.
_TILE = 128


def lacks(banded: Banded) -> str | None:
    """What a call on a Hopper GPU needs that `attend` does not have; None if it has all."""
    query = banded.query
    if query.dtype not in _DTYPES:
        return f"{query.dtype}"
    if query.shape[-1] not in _HEAD_DIMS:
        return f"head dimension {query.shape[-1]}"
    if banded.softcap is not None or banded.sinks is not None:
        return "softcap or sinks"
    if banded.slopes is not None:
        return "slopes (ALiBi)"
    if not query.numel():
        return "no queries"
    if banded.is_diagonal and not banded.near_low.is_beginning and banded.near_low.back < _TILE - 1:
        return f"a neighbor window of {banded.near_low.back + 1} tokens, less than a tile"
    tensors = query, banded.key, banded.value, banded.far_key, banded.far_query
    if any(x is not None and not can_be_described(x) for x in tensors):
        return "tensors whose rows do not begin at multiples of 16 bytes"
    return None


def can_be_described(x: Tensor) -> bool:
    """Whether the tensor memory accelerator can read x."""
    *strides, last = x.stride()
    size = x.element_size()
    return last == 1 and multiples_of_16((x.data_ptr(), *[stride * size for stride in strides]))


def attend(banded: Banded, config: HopperConfig | None = None) -> tuple[Tensor, Tensor | None]:
    """As `ropewalk.ops.triton.prefill.attend`, for what `lacks` finds nothing in.

    Returns:
        (batch, heads, queries, head_dim), in memory as (batch, queries, heads, head_dim); the log-sum-exp if wanted.
    """
    query, key, value = banded.query, banded.key, banded.value
    config = config or default_config(query.shape[-1], query.dtype, query.device)
    batch, heads, queries, head_dim = query.shape
    key_heads, keys = key.shape[1:3]
    groups = heads // key_heads
    # Memory as transformers wants it next, so that nothing is copied there.
    out = torch.empty(batch, queries, heads, head_dim, dtype=query.dtype, device=query.device).transpose(1, 2)
    lse = torch.empty(batch, heads, queries, dtype=torch.float32, device=query.device) if banded.return_lse else None
    far_query, far_key, far_high = banded.far_query, banded.far_key, banded.far_high
    if far_query is None or far_key is None or not banded.has_far:
        far_query, far_key, far_high = query, key, BEGINNING
    tiles = -(-queries // (config.rows * config.consumers))
    launch = _launch(config, head_dim, query.dtype, query.device, banded.return_lse, banded.is_diagonal)
    with torch.cuda.device_of(query):  # type: ignore[no-untyped-call]
        launch[tiles * groups, key_heads, batch](
            descriptor(query, config.rows),
            descriptor(far_query, config.rows),
            descriptor(key, config.keys),
            descriptor(far_key, config.keys),
            descriptor(value, config.keys),
            descriptor(out, config.rows),
            lse,
            heads,
            groups,
            queries,
            keys - queries,
            *edge_numbers(banded.near_low),
            *edge_numbers(banded.near_high),
            *edge_numbers(far_high),
            banded.scale * LOG2_E.value,
            *launch.constants,
        )
    return out, lse


@cache
def _launch(
    config: HopperConfig, head_dim: int, dtype: torch.dtype, device: torch.device, return_lse: bool, diagonal: bool
) -> Launch:
    """Calls that differ in these arguments need launches of their own."""
    consumer_registers, producer_registers = config.registers
    constants = {
        "ROWS": config.rows,
        "KEYS": config.keys,
        "D": head_dim,
        "STAGES": config.stages,
        "CONSUMERS": config.consumers,
        "DIAGONAL": diagonal,
        "CONSUMER_REGISTERS": consumer_registers,
        "PRODUCER_REGISTERS": producer_registers,
    }
    return Launch(hopper_prefill_kernel.banded, constants, {"num_warps": 4})


def descriptor(x: Tensor, *block: int) -> TensorDescriptor:
    """x (..., tokens, head_dim) as tiles of so many tokens, or of `block` in the dimensions before the last. What lies
    past the end reads as zero. x must be such that `can_be_described`."""
    # Checking each tensor anew, as making a descriptor does, would be a third of what a call costs the host.
    made = object.__new__(TensorDescriptor)
    made.__dict__.update(_alike(x.ndim, x.dtype, x.shape[-1], block))
    made.__dict__.update(base=x, shape=list(x.shape), strides=list(x.stride()))
    return made


@cache
def _alike(dimensions: int, dtype: torch.dtype, head_dim: int, block: tuple[int, ...]) -> dict[str, object]:
    """What the descriptors of such tensors have in common, checked on a small one."""
    whole = [1] * (dimensions - 1 - len(block)) + [*block, head_dim]
    x = torch.empty((1,) * (dimensions - 1) + (head_dim,), dtype=dtype, device="cpu")
    made = TensorDescriptor(x, list(x.shape), list(x.stride()), whole, _layout(tuple(whole), dtype))
    return {name: value for name, value in vars(made).items() if name not in ("base", "shape", "strides")}


@cache
def _layout(block: tuple[int, ...], dtype: torch.dtype) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout.get_default_for(list(block), _DTYPES[dtype])
