"""The attention and mask functions that transformers calls on an extended model.

transformers hands every attention call to a registered function, with query and key already rotated at their true
positions and the key as the cache holds it. The mask function gives it a `Layout` instead of a matrix.
"""

from __future__ import annotations

import itertools
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache

from ropewalk.integrations.transformers import probe
from ropewalk.integrations.transformers.far_keys import FarKeys
from ropewalk.maps import LengthError, PositionMap, SelfExtend
from ropewalk.maps.query_scaling import QueryScaling
from ropewalk.ops.api import Implementation, attend_step, attention, choose_impl, kernels_lack
from ropewalk.ops.layout import GAPS, Layout, Slots, Span, Step, left_padding
from ropewalk.ops.rotary import Rotary

# Names with "flash", "sdpa" or a slash would set off transformers' own loaders and checks.
NAME = "ropewalk"
# The attribute of an extended model's attention modules; gone after restore.
PLAN = "ropewalk_plan"


@dataclass
class Limits:
    """Lengths that a map can reach on a model. The warning of eq. 5 is given once."""

    position_map: PositionMap
    trained_window: int
    enforced: bool
    max_length: int | float = field(init=False)
    recommended_length: int | float = field(init=False)
    _warned: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self.max_length = self.position_map.max_length(self.trained_window)
        self.recommended_length = self.position_map.recommended_length(self.trained_window)

    def check(self, length: int) -> None:
        """Raises LengthError past eq. 4 and warns once past eq. 5."""
        if length > self.max_length and self.enforced:
            raise LengthError(
                f"a text of {length} tokens is past what {self.position_map} can reach on a trained window of "
                f"{self.trained_window}: {self.max_length} tokens (eq. 4). {self._suggestion(length)}"
            )
        if length > self.recommended_length and not self._warned:
            self._warned = True
            warnings.warn(
                f"a text of {length} tokens uses relative positions past half the trained window of "
                f"{self.trained_window}, which are less well trained: {self.position_map} is recommended up to "
                f"{self.recommended_length} tokens (eq. 5). {self._suggestion(length)}",
                stacklevel=_frames_of_libraries() + 1,
            )

    def check_step(self, step: Step, slots: int) -> None:
        """The same for one token a row among `slots` key slots, without waiting for the device.

        A length that only the device knows, in a static cache that the text can outgrow the map in, is checked there
        against eq. 4: a failed assertion of the device, which CUDA does not recover from, and never a wrong answer. The
        warning of eq. 5 would need the host, so it comes at the next call of several tokens.
        """
        if step.tokens is not None:
            self.check(step.tokens)
        elif self.enforced and slots > self.max_length and not step.limits_checked:
            step.limits_checked = True
            assert step.lengths is not None
            tokens = step.lengths if step.first_slots is None else step.lengths - step.first_slots
            torch._assert_async(
                (tokens <= self.max_length).all(),
                f"a text is past what {self.position_map} can reach on a trained window of {self.trained_window}: "
                f"{self.max_length} tokens (eq. 4)",
            )

    def _suggestion(self, length: int) -> str:
        for kind in (type(self.position_map), SelfExtend):
            try:
                suggested = kind.for_length(length, self.trained_window)
            except LengthError:
                continue
            if suggested != self.position_map:
                return f"{suggested} would do."
        return "None keeps it inside half the trained window (eq. 5)."


def _frames_of_libraries() -> int:
    """Frames between the caller's and the first that is not a library's: where a warning should point."""
    count, frame = 0, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] in (
        "ropewalk",
        "transformers",
        "torch",
    ):
        count, frame = count + 1, frame.f_back
    return count


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
    # Stands for the plan in a compiled graph, whose operators take no objects.
    handle: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "handle", next(_handles))
        _plans[self.handle] = self

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


_handles = itertools.count(1)
_plans: WeakValueDictionary[int, LayerPlan] = WeakValueDictionary()


class LayoutMask(Layout):
    """A layout where transformers expects a mask: for static caches, `generate` makes it ahead of the forward pass."""

    ndim = 4  # as masks that are prepared have

    def contiguous(self) -> LayoutMask:
        """Itself."""
        return self


def register_functions() -> None:
    """Makes the functions known to transformers. Both are needed: without the second, masks would silently be None."""
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, layout_mask)


def layout_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | LayoutMask | None = None,
    **kwargs: Any,
) -> LayoutMask:
    """Mask function in transformers' sense; see `transformers.masking_utils.sdpa_mask` for the arguments."""
    if isinstance(attention_mask, LayoutMask):
        return attention_mask
    probe.check_mask(mask_function, kwargs)
    query_start: Tensor | None = None
    if isinstance(q_offset, Tensor):
        # A static cache's own counter, which moves on before the attention is computed.
        query_start = q_offset.clone() - kv_offset
    else:
        if q_offset - kv_offset + q_length != kv_length:
            # A tensor too, or a compiled graph would hold for this one step.
            query_start = torch.tensor(q_offset - kv_offset)
        if attention_mask is not None and attention_mask.shape[1] < q_offset + q_length:
            raise ValueError(
                f"attention_mask has {attention_mask.shape[1]} columns, and there are {q_offset + q_length} tokens, "
                "those in the cache included: every one needs a column"
            )
    key_mask = None if attention_mask is None else attention_mask[:, kv_offset : kv_offset + kv_length]
    if key_mask is not None and isinstance(q_offset, Tensor):
        # A shape that grows would be a new graph at every step.
        key_mask = nn.functional.pad(key_mask, (0, kv_length - key_mask.shape[1]))
    return LayoutMask(q_length, kv_length, query_start, key_mask)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Layout | Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_ids: Tensor | None = None,
    cache: Cache | None = None,
    output_attentions: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention function in transformers' sense: query (batch, heads, queries, head_dim), returns (batch, queries,
    heads, value_dim) and no weights."""
    plan: LayerPlan | None = getattr(module, PLAN, None)
    if plan is None:
        raise RuntimeError(f"{type(module).__name__} was not part of the model when it was extended: extend it again")
    if dropout:
        raise ValueError(f"attention dropout of {dropout} is not supported on an extended model: call model.eval()")
    if cache is not None:
        raise ValueError("paged caches (continuous batching) are not supported on an extended model")
    if output_attentions:
        raise ValueError("output_attentions=True is not supported on an extended model, which never holds the weights")
    if isinstance(attention_mask, Tensor):
        raise ValueError(
            f"an extended model takes a 2-D attention mask (batch, tokens), got shape {tuple(attention_mask.shape)}"
        )
    layout = attention_mask or Layout(query.shape[2], key.shape[2])
    if torch.compiler.is_compiling():
        query_start = layout.query_start
        if query_start is not None:
            query_start = torch.as_tensor(query_start, device=query.device)
        output: Tensor
        if plan.takes_step(query, key, value):
            if layout.traced_slots is None and not (query_start is None and layout.key_mask is None):
                layout.traced_slots = _step_slots(query_start, layout.key_mask, query.shape[0], key.shape[2])
            lengths, first_slots = layout.traced_slots or (None, None)
            step = Step(lengths, first_slots, None)
            if plan.query_scaling is not None:
                factors = plan.query_scaling(step.positions(key.shape[2], query.device))
                query = query * factors.to(query.dtype)[:, None, None, None]
            output = _extended_step(
                query, key, value, step.lengths, step.first_slots, s_aux, scaling, softcap, plan.handle
            )
        else:
            output = _extended_attention(
                query, key, value, query_start, layout.key_mask, position_ids, s_aux, scaling, softcap, plan.handle
            )
    else:
        far_keys = None if plan.far_keys is None else plan.far_keys.view(query, key, value, layout)
        output = plan.attend(query, key, value, layout, position_ids, s_aux, scaling, softcap, far_keys)
    return output.transpose(1, 2).contiguous(), None


# Opaque operators, so that torch.compile traces around them instead of into them. This one reads the layout on the
# host, which a captured CUDA graph could not do.
@torch.library.custom_op("ropewalk::extended_attention", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def _extended_attention(
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
    layout = Layout(query.shape[2], key.shape[2], query_start, key_mask)
    return _plans[handle].attend(query, key, value, layout, position_ids, sinks, scale, softcap).contiguous()


@_extended_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *arguments: Any) -> Tensor:
    return query.new_empty((*query.shape[:3], value.shape[-1]))


# A decode step needs nothing from the host, so CUDA graphs may hold it.
@torch.library.custom_op("ropewalk::extended_step", mutates_args=())
def _extended_step(
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
    plan, slots = _plans[handle], key.shape[2]
    step = Step(lengths, first_slots, slots if lengths is None else None)
    if plan.limits is not None:
        plan.limits.check_step(step, slots)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return attend_step(query, key, value, plan.position_map, plan.rotary, step, scale, softcap, sinks)


@_extended_step.register_fake
def _(query: Tensor, *arguments: Any) -> Tensor:
    return query.new_empty(query.shape)


@torch.library.custom_op("ropewalk::step_slots", mutates_args=())
def _step_slots(query_start: Tensor | None, key_mask: Tensor | None, batch: int, slots: int) -> tuple[Tensor, Tensor]:
    """`lengths` and `first_slots` of a `Step`; the device checks that rows are padded on the left only."""
    end = slots if query_start is None else query_start.reshape(1) + 1
    if key_mask is None:
        assert isinstance(end, Tensor)
        return end.repeat(batch), end.new_zeros(batch)
    lengths, first_slots, gaps = left_padding(key_mask, end)
    torch._assert_async(~gaps, GAPS)
    return lengths, first_slots


@_step_slots.register_fake
def _(query_start: Tensor | None, key_mask: Tensor | None, batch: int, slots: int) -> tuple[Tensor, Tensor]:
    known = query_start if key_mask is None else key_mask
    assert known is not None
    return known.new_empty(batch, dtype=torch.int64), known.new_empty(batch, dtype=torch.int64)


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
