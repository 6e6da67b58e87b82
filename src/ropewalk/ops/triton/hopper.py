"""Fused two-band attention for Hopper GPUs, at the speed of the fastest plain attention there; see `hopper_kernel`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ropewalk.ops.triton import hopper_kernel
from ropewalk.ops.triton.launch import Launch, multiples_of_16
from ropewalk.ops.triton.tuned import tuned

_DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}
_FARTHEST = hopper_kernel.FARTHEST.value


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
    return HopperConfig(**tuned("hopper", head_dim, dtype.itemsize, device))


_HEAD_DIMS = (64, 128)
# No configuration takes narrower tiles of keys, and a neighbor window must hold one.
_TILE = 128


def lacks(query: Tensor, key: Tensor, value: Tensor, far_key: Tensor | None, window: int | None) -> str | None:
    """What a call on a Hopper GPU needs that `banded` does not have; None if it has all."""
    if query.dtype not in (torch.bfloat16, torch.float16):
        return f"{query.dtype}"
    if query.shape[-1] not in _HEAD_DIMS:
        return f"head dimension {query.shape[-1]}"
    if window is not None and window < _TILE:
        return f"a neighbor window of {window} tokens, less than a tile"
    if any(x is not None and not can_be_described(x) for x in (query, key, value, far_key)):
        return "tensors whose rows do not begin at multiples of 16 bytes"
    return None


def can_be_described(x: Tensor) -> bool:
    """Whether the tensor memory accelerator can read x."""
    *strides, last = x.stride()
    size = x.element_size()
    return last == 1 and multiples_of_16((x.data_ptr(), *[stride * size for stride in strides]))


def banded(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    far_query: Tensor | None,
    far_key: Tensor | None,
    scale: float,
    window: int | None,
    far_first: int | None = None,
    return_lse: bool = False,
    config: HopperConfig | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention over a near and a far band, as `ropewalk.ops.triton.prefill.banded`, for what `lacks` finds nothing in.

    Args:
        query, far_query: (batch, heads, queries, head_dim), bfloat16 or float16, the last query beside the last key.
        key, value: (batch, key heads, keys, head_dim).
        far_key: (batch, key heads, at least keys - far_first, head_dim).
        window: keys at a distance less than this are scored with query and key; None for all.
        far_first: keys at this distance or more are scored with far_query and far_key; by default `window`.
        return_lse: also return the log-sum-exp of the scores, float32, (batch, heads, queries).

    Returns:
        (batch, heads, queries, head_dim), in memory as (batch, queries, heads, head_dim).
    """
    config = config or default_config(query.shape[-1], query.dtype, query.device)
    batch, heads, queries, head_dim = query.shape
    key_heads, keys = key.shape[1:3]
    groups = heads // key_heads
    # Memory as transformers wants it next, so that nothing is copied there.
    out = torch.empty(batch, queries, heads, head_dim, dtype=query.dtype, device=query.device).transpose(1, 2)
    lse = torch.empty(batch, heads, queries, dtype=torch.float32, device=query.device) if return_lse else None
    if window is None:
        window = _FARTHEST
    if far_query is None or far_key is None or not far_key.shape[2]:
        far_query, far_key, far_first = query, key, _FARTHEST
    elif far_first is None:
        far_first = window
    tiles = -(-queries // (config.rows * config.consumers))
    launch = _launch(config, head_dim, query.dtype, query.device, return_lse)
    with torch.cuda.device_of(query):  # type: ignore[no-untyped-call]
        launch(
            (tiles * groups, key_heads, batch),
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
            min(window, _FARTHEST),
            min(far_first, _FARTHEST),
            scale * math.log2(math.e),
        )
    return out if lse is None else (out, lse)


@cache
def _launch(config: HopperConfig, head_dim: int, dtype: torch.dtype, device: torch.device, return_lse: bool) -> Launch:
    """Calls that differ in these arguments need launches of their own."""
    consumer_registers, producer_registers = config.registers
    constants = {
        "ROWS": config.rows,
        "KEYS": config.keys,
        "D": head_dim,
        "STAGES": config.stages,
        "CONSUMERS": config.consumers,
        "CONSUMER_REGISTERS": consumer_registers,
        "PRODUCER_REGISTERS": producer_registers,
    }
    return Launch(hopper_kernel.banded, constants, {"num_warps": 4})


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
