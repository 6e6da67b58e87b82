"""The attention and mask functions that transformers calls on an extended model.

transformers hands every attention call to a registered function, with query and key already rotated at their true
positions and the key as the cache holds it. The mask function gives it a `Layout` instead of a matrix.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache

from ropewalk.maps import LengthError, PositionMap
from ropewalk.ops.api import attention
from ropewalk.ops.compiled import Settings, compiled_attention, register, release
from ropewalk.ops.layout import Layout, Slots

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
                stacklevel=2,
            )

    def _suggestion(self, length: int) -> str:
        from ropewalk.maps import SelfExtend

        for kind in (type(self.position_map), SelfExtend):
            try:
                return f"{kind.for_length(length, self.trained_window)} would do."
            except LengthError:
                continue
        return "No map of this kind reaches it."


@dataclass(frozen=True, eq=False)
class LayerPlan:
    """How one attention module computes while its model is extended."""

    settings: Settings
    limits: Limits | None  # None for a layer that is left alone
    handle: int

    @classmethod
    def make(cls, settings: Settings, limits: Limits | None) -> LayerPlan:
        return cls(settings, limits, register(settings))

    def release(self) -> None:
        release(self.handle)


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
    attention_mask: Tensor | None = None,
    use_vmap: bool = False,
    **kwargs: Any,
) -> Layout:
    """Mask function in transformers' sense; see `transformers.masking_utils.sdpa_mask` for the arguments."""
    if use_vmap:
        raise ValueError(
            "an extended model attends causally: masks that add to the causal one (image tokens seen both ways, "
            "prefix language models) are not supported"
        )
    query_start: int | Tensor | None = None
    if isinstance(q_offset, Tensor):
        # A static cache's own counter, which moves on before the attention is computed.
        query_start = q_offset.clone() - kv_offset
        if not torch.compiler.is_compiling():
            query_start = int(query_start)
    elif q_offset - kv_offset + q_length != kv_length:
        query_start = q_offset - kv_offset
    key_mask = None if attention_mask is None else attention_mask[:, kv_offset : kv_offset + kv_length]
    return Layout(q_length, kv_length, query_start, key_mask)


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
    if isinstance(attention_mask, Tensor):
        raise ValueError(
            f"an extended model takes a 2-D attention mask (batch, tokens), got shape {tuple(attention_mask.shape)}"
        )
    if torch.compiler.is_compiling():
        output = _compiled(plan, query, key, value, attention_mask, s_aux, scaling, softcap)
    else:
        layout = attention_mask or Layout(query.shape[2], key.shape[2])
        if plan.limits is not None:
            spans = layout.spans(query.shape[0])
            plan.limits.check(max((_count(span.keys) for span in spans), default=0))
            if position_ids is not None and query.shape[2] > 1:
                _check_positions(layout, position_ids.expand(query.shape[0], -1))
        settings = plan.settings
        output = attention(
            query,
            key,
            value,
            settings.position_map,
            settings.rotary,
            layout=layout,
            scale=scaling,
            softcap=softcap,
            sinks=s_aux,
            query_scaling=settings.query_scaling,
            impl=settings.impl,
        )
    return output.transpose(1, 2).contiguous(), None


def _compiled(
    plan: LayerPlan,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout | None,
    sinks: Tensor | None,
    scaling: float | None,
    softcap: float | None,
) -> Tensor:
    # The length in use may be on the device only; the length that was allocated is known.
    if plan.limits is not None and key.shape[2] > plan.limits.max_length:
        plan.limits.check(key.shape[2])
    query_start = None
    if layout is not None and layout.query_start is not None:
        query_start = torch.as_tensor(layout.query_start, device=query.device)
    key_mask = None if layout is None else layout.key_mask
    output: Tensor = compiled_attention(query, key, value, query_start, key_mask, sinks, scaling, softcap, plan.handle)
    return output


def _count(slots: Slots) -> int:
    return slots.stop - slots.start if isinstance(slots, slice) else len(slots)


def _check_positions(layout: Layout, position_ids: Tensor) -> None:
    """Each row's positions must count its tokens one by one, from wherever: checked once a forward pass."""
    if layout.positions_checked:
        return
    layout.positions_checked = True
    for span in layout.spans(position_ids.shape[0]):
        positions = position_ids[span.rows][:, span.queries]
        if not bool((positions.diff(dim=1) == 1).all()):
            raise ValueError(
                "position_ids must count the tokens of each row one by one on an extended model (packed sequences and "
                f"attention masks whose gaps are counted are not supported), got {positions.tolist()[0][:16]} ..."
            )
