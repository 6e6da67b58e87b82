# SPDX-License-Identifier: Apache-2.0
"""An extended layer's attention as operators of torch.library, which torch.compile traces around instead of into."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ropewalk.integrations.transformers.plan import plans
from ropewalk.ops.implementations import choose, run, step_of
from ropewalk.ops.layout import GAPS, Layout, Step, left_padding


# Reads the layout on the host, which a captured CUDA graph could not do.
@torch.library.custom_op("ropewalk::extended_attention", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def extended_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_start: Tensor | None,
    key_mask: Tensor | None,
    position_ids: Tensor | None,
    sinks: Tensor | None,
    scale: float | None,
    softcap: float | None,
    handle: int,
) -> Tensor:
    plan = plans[handle]
    layout = Layout(query.shape[2], key.shape[2], query_start, key_mask)
    call = plan.call(query, key, value, layout, sinks, scale, softcap)
    name = choose(call, plan.impl)
    step = step_of(call, name)
    plan.check(call, step, position_ids)
    return run(call, name, step).contiguous()


@extended_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *arguments: Any) -> Tensor:
    return query.new_empty((*query.shape[:3], value.shape[-1]))


# A decode step needs nothing from the host, so CUDA graphs may hold it.
@torch.library.custom_op("ropewalk::extended_step", mutates_args=())
def extended_step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Tensor | None,
    first_slots: Tensor | None,
    sinks: Tensor | None,
    scale: float | None,
    softcap: float | None,
    handle: int,
) -> Tensor:
    plan, slots = plans[handle], key.shape[2]
    step = Step(lengths, first_slots, slots if lengths is None else None)
    if plan.limits is not None:
        plan.limits.check_step(step, slots)
    # The queries are scaled already, in what was traced.
    call = replace(plan.call(query, key, value, None, sinks, scale, softcap), query_scaling=None)
    return run(call, "fused", step)


@extended_step.register_fake
def _(query: Tensor, *arguments: Any) -> Tensor:
    return query.new_empty(query.shape)


@torch.library.custom_op("ropewalk::step_slots", mutates_args=())
def step_slots(query_start: Tensor | None, key_mask: Tensor | None, batch: int, slots: int) -> tuple[Tensor, Tensor]:
    """`lengths` and `first_slots` of a `Step`, of rows that are padded on the left only.

    Raises:
        ValueError: they are not. In a CUDA graph, where nothing can be read, the device asserts that they are; a model
            gives no such rows to a graph, as `Inputs` refuses them in a static cache.
    """
    end = slots if query_start is None else query_start.reshape(1) + 1
    if key_mask is None:
        assert isinstance(end, Tensor)
        return end.repeat(batch), end.new_zeros(batch)
    lengths, first_slots, gaps = left_padding(key_mask, end)
    if gaps.is_cuda and torch.cuda.is_current_stream_capturing():
        torch._assert_async(~gaps, GAPS)
    elif gaps:
        raise ValueError(f"{GAPS}: pad on the left, or do not compile the model for such rows")
    return lengths, first_slots


@step_slots.register_fake
def _(query_start: Tensor | None, key_mask: Tensor | None, batch: int, slots: int) -> tuple[Tensor, Tensor]:
    known = query_start if key_mask is None else key_mask
    assert known is not None
    return known.new_empty(batch, dtype=torch.int64), known.new_empty(batch, dtype=torch.int64)
