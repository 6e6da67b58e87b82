# SPDX-License-Identifier: Apache-2.0
"""How one attention module computes while its model is extended."""

from __future__ import annotations

import itertools
import sys
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ropewalk.integrations.transformers.axes import Axes
from ropewalk.integrations.transformers.limits import Limits
from ropewalk.maps import PositionMap
from ropewalk.maps.query_scaling import QueryScaling
from ropewalk.ops.call import Call, Positions, check, check_start
from ropewalk.ops.fused import kernels_lack
from ropewalk.ops.implementations import Implementation
from ropewalk.ops.layout import Layout, Span, Step
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
        slopes: float32, (heads,), of a layer with ALiBi.
        axis_of_pair: int64, (pairs,), of a layer whose positions may have several axes.
    """

    position_map: PositionMap
    rotary: Rotary | None
    query_scaling: QueryScaling | None
    impl: Implementation
    limits: Limits | None
    slopes: Tensor | None = None
    axis_of_pair: Tensor | None = None
    # Its key in `plans`.
    handle: int = field(init=False)
    # The rotary embedding as the operator wants it, which keeps tables in it.
    _rotary: Rotary = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_rotary", Rotary.none() if self.rotary is None else self.rotary)
        object.__setattr__(self, "handle", next(_handles))
        plans[self.handle] = self

    def __reduce__(self) -> tuple[Any, ...]:
        given = (self.position_map, self.rotary, self.query_scaling, self.impl, self.limits)
        return LayerPlan, (*given, self.slopes, self.axis_of_pair)

    def call(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        layout: Layout | None,
        sinks: Tensor | None,
        scale: float | None,
        softcap: float | None,
        far_keys: Tensor | None = None,
        positions: Positions | None = None,
    ) -> Call:
        """What the operator is asked by one call of the module."""
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        return Call(
            query,
            key,
            value,
            self.position_map,
            self._rotary,
            layout,
            scale,
            softcap,
            sinks,
            self.query_scaling,
            far_keys,
            positions=positions,
            slopes=None if self.slopes is None else self._slopes(query.device),
        )

    def _slopes(self, device: torch.device) -> Tensor:
        """On the device of a call: a model may move after it was measured."""
        slopes = self.slopes
        assert slopes is not None
        return self._rotary.tables.get(("slopes", device), lambda _: slopes.to(device))

    def check(self, call: Call, step: Step | None, position_ids: Tensor | None, given: Axes | None = None) -> None:
        """Refuses what the module may ask for and the plan does not take.

        Args:
            step: what one query a row sees, if the call runs as a step.
            position_ids: that the module was given, if models give it any.
            given: positions that do not count tokens one by one.

        Raises:
            LengthError: the text is past eq. 4.
            ValueError: positions do not count tokens one by one, or an argument of the operator does not fit.
        """
        if step is not None:
            # One token without gaps has no positions to compare, and what `check` would look at is as the model made
            # it: there are microseconds to spare.
            if self.limits is not None:
                self.limits.check_step(step, call.key.shape[2])
            return
        assert call.layout is not None
        check(call)
        check_start(call.layout)
        if self.limits is not None:
            batch = call.query.shape[0]
            if given is not None:
                self.limits.check(given.length)
                return
            spans = call.layout.spans(batch)
            self.limits.check(max((span.count for span in spans), default=0))
            if position_ids is not None and not call.layout.positions_checked:
                call.layout.positions_checked = True
                # Where there are several axes, they agree: `Inputs` has seen to that.
                one_axis = position_ids if position_ids.ndim == 2 else position_ids[0]
                check_positions(spans, one_axis.expand(batch, -1))

    def takes_step(self, call: Call) -> bool:
        """Whether a call that is traced is one token a row that the decode kernel takes."""
        wanted = self.impl == "fused" or (self.impl == "auto" and call.query.device.type == "cuda")
        return wanted and call.query.shape[2] == 1 and kernels_lack(call) is None


@dataclass(frozen=True)
class Unchanged:
    """In place of a plan: of a module that transformers goes on computing.

    Args:
        implementation: transformers' name of what computes its attention.
    """

    implementation: str

    def attend(self, module: nn.Module, *tensors: Any, **arguments: Any) -> tuple[Tensor, Any]:
        """As an attention function in transformers' sense."""
        default = sdpa_attention_forward
        if self.implementation == "eager":  # which is in the module's own file
            default = getattr(sys.modules[type(module).__module__], "eager_attention_forward", default)
        function = ALL_ATTENTION_FUNCTIONS.get_interface(self.implementation, default)
        output: tuple[Tensor, Any] = function(module, *tensors, **arguments)
        return output


def check_positions(spans: tuple[Span, ...], position_ids: Tensor) -> None:
    """Each row's positions must count its tokens one by one, from wherever.

    Raises:
        ValueError: they do not.
    """
    for span in spans:
        # Slots without a token lie between the keys: positions that follow the slots would count them.
        if span.count_queries == 1 and not span.has_gaps:
            continue
        positions = position_ids[span.rows][:, span.queries]
        fits = bool((positions.diff(dim=1) == 1).all())
        if span.has_gaps:
            fits &= bool((positions[:, 0] == span.count - span.count_queries).all())
        if not fits:
            raise ValueError(
                "position_ids must count the tokens of each row one by one on an extended model (packed sequences and "
                f"attention masks whose gaps are counted are not supported), got {positions.tolist()[0][:16]} ..."
            )
