"""`attention` as one opaque operator, so that torch.compile traces around it instead of into it."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from ropewalk.maps import PositionMap
from ropewalk.maps.query_scaling import QueryScaling
from ropewalk.ops.api import Implementation, attention
from ropewalk.ops.layout import Layout
from ropewalk.ops.rotary import Rotary


@dataclass(frozen=True, eq=False)
class Settings:
    """What stays the same from call to call: arguments of `attention` that an operator's schema cannot hold."""

    position_map: PositionMap
    rotary: Rotary | None
    query_scaling: QueryScaling | None = None
    impl: Implementation = "auto"


_settings: dict[int, Settings] = {}
_handles = itertools.count(1)


def register(settings: Settings) -> int:
    """A number that stands for the settings in a compiled graph."""
    handle = next(_handles)
    _settings[handle] = settings
    return handle


def release(handle: int) -> None:
    """Forgets registered settings; graphs compiled with them no longer run."""
    del _settings[handle]


# The layout is read on the host, which a captured CUDA graph could not do.
@torch.library.custom_op("ropewalk::attention", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def compiled_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_start: Tensor | None,
    key_mask: Tensor | None,
    sinks: Tensor | None,
    scale: float | None,
    softcap: float | None,
    handle: int,
) -> Tensor:
    """`attention` with the settings behind `handle`."""
    settings = _settings[handle]
    return attention(
        query,
        key,
        value,
        settings.position_map,
        settings.rotary,
        layout=Layout(query.shape[2], key.shape[2], query_start, key_mask),
        scale=scale,
        softcap=softcap,
        sinks=sinks,
        query_scaling=settings.query_scaling,
        impl=settings.impl,
    ).contiguous()


@compiled_attention.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_start: Tensor | None,
    key_mask: Tensor | None,
    sinks: Tensor | None,
    scale: float | None,
    softcap: float | None,
    handle: int,
) -> Tensor:
    return query.new_empty((*query.shape[:3], value.shape[-1]))
