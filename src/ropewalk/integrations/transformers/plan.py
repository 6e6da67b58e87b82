"""How one attention module computes while its model is extended."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakValueDictionary

from torch import Tensor

from ropewalk.integrations.transformers.far_keys import FarKeys
from ropewalk.integrations.transformers.limits import Limits
from ropewalk.maps import PositionMap
from ropewalk.maps.query_scaling import QueryScaling
from ropewalk.ops.api import Implementation, attend_step, attention, choose_impl, kernels_lack
from ropewalk.ops.layout import Layout, Slots, Span
from ropewalk.ops.rotary import Rotary

# The attribute of an extended model's attention modules; gone after restore.
PLAN = "ropewalk_plan"

# By what stands for a plan in a compiled graph, whose operators take no objects.
plans: WeakValueDictionary[int, LayerPlan] = WeakValueDictionary()
_handles = itertools.count(1)


@dataclass(frozen=True, eq=False)
class LayerPlan:
    """How one attention module computes while its model is extended. A copy is a plan of its own.

    Args:
        limits: lengths to check; None for a layer that is left alone.
        far_keys: keeps the far view of the layer's keys; None to turn them at every call.
    """

    position_map: PositionMap
    rotary: Rotary | None
    query_scaling: QueryScaling | None
    impl: Implementation
    limits: Limits | None
    far_keys: FarKeys | None = None
    # Its key in `plans`.
    handle: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "handle", next(_handles))
        plans[self.handle] = self

    def __reduce__(self) -> tuple[Any, ...]:
        return LayerPlan, (self.position_map, self.rotary, self.query_scaling, self.impl, self.limits, self.far_keys)

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        layout: Layout,
        position_ids: Tensor | None,
        sinks: Tensor | None,
        scale: float | None,
        softcap: float | None,
        far_keys: Tensor | None = None,
    ) -> Tensor:
        """`ropewalk.ops.attention` of one call, after a check of what the call asks for."""
        impl = choose_impl(query, key, value, softcap) if self.impl == "auto" else self.impl
        step = None
        if impl == "fused" and layout.query_length == 1 and (self.impl == "auto" or self.takes_step(query, key, value)):
            step = layout.step(query.shape[0], query.device)
        if step is not None:
            # One token without gaps has no positions to compare.
            if self.limits is not None:
                self.limits.check_step(step, key.shape[2])
            scale = query.shape[-1] ** -0.5 if scale is None else scale
            # What `attention` would check is as the model made it, and there are microseconds to spare.
            return attend_step(
                query, key, value, self.position_map, self.rotary, step, scale, softcap, sinks, self.query_scaling
            )
        if self.limits is not None:
            spans = layout.spans(query.shape[0])
            self.limits.check(max((_count(span.keys) for span in spans), default=0))
            if position_ids is not None and not layout.positions_checked:
                layout.positions_checked = True
                _check_positions(spans, position_ids.expand(query.shape[0], -1))
        return attention(
            query,
            key,
            value,
            self.position_map,
            self.rotary,
            layout=layout,
            scale=scale,
            softcap=softcap,
            sinks=sinks,
            query_scaling=self.query_scaling,
            far_keys=far_keys,
            impl=impl,
        )

    def takes_step(self, query: Tensor, key: Tensor, value: Tensor) -> bool:
        """Whether a compiled call is one token a row that the decode kernel takes."""
        wanted = self.impl == "fused" or (self.impl == "auto" and query.device.type == "cuda")
        return wanted and query.shape[2] == 1 and kernels_lack(query, key, value) is None


def _count(slots: Slots) -> int:
    return slots.stop - slots.start if isinstance(slots, slice) else len(slots)


def _check_positions(spans: tuple[Span, ...], position_ids: Tensor) -> None:
    """Each row's positions must count its tokens one by one, from wherever."""
    for span in spans:
        # Slots without a token lie between the keys: positions that follow the slots would count them.
        has_gaps = isinstance(span.keys, Tensor)
        if _count(span.queries) == 1 and not has_gaps:
            continue
        positions = position_ids[span.rows][:, span.queries]
        fits = bool((positions.diff(dim=1) == 1).all())
        if has_gaps:
            fits &= bool((positions[:, 0] == _count(span.keys) - _count(span.queries)).all())
        if not fits:
            raise ValueError(
                "position_ids must count the tokens of each row one by one on an extended model (packed sequences and "
                f"attention masks whose gaps are counted are not supported), got {positions.tolist()[0][:16]} ..."
            )
