# SPDX-License-Identifier: Apache-2.0
"""The attention and mask functions that transformers calls on an extended model.

transformers hands every attention call to a registered function, with query and key already rotated at their true
positions and the key as the cache holds it. The mask function gives it a `Layout` instead of a matrix.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache
from transformers.masking_utils import sdpa_mask

from ropewalk.integrations.transformers import axes, compiled, probe, weights
from ropewalk.integrations.transformers.far_keys import LAYER, FarKeysLayer
from ropewalk.integrations.transformers.plan import PLAN, LayerPlan, Unchanged
from ropewalk.integrations.transformers.watch import ModelChangedError
from ropewalk.ops.implementations import choose, run, step_of
from ropewalk.ops.layout import Layout, Step

# Names with "flash", "sdpa" or a slash would set off transformers' own loaders and checks.
NAME = "ropewalk"
# For models with layers that attend in chunks, which transformers goes on computing.
WITH_CHUNKS = "ropewalk-with-chunks"


class LayoutMask(Layout):
    """A layout where transformers expects a mask: for static caches, `generate` makes it ahead of the forward pass."""

    ndim = 4  # as masks that are prepared have

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """As of a mask that goes for all rows and heads."""
        return 1, 1, self.query_length, self.key_length

    def contiguous(self) -> LayoutMask:
        """Itself."""
        return self

    def to(self, *args: Any, **kwargs: Any) -> LayoutMask:
        """Itself."""
        return self

    @classmethod
    def __torch_function__(cls, *arguments: Any) -> NoReturn:
        """
        Raises:
            ModelChangedError: computed with as a tensor, by an attention that does not know what it is.
        """
        raise ModelChangedError(
            "an attention module that was not part of the model when it was extended was given its mask (an adapter "
            "with modules of its own was switched on or off, or a module was replaced): call ropewalk.restore(model), "
            "and extend it again once it is what it is to be"
        )

    def __getitem__(self, index: tuple[slice, ...]) -> LayoutMask:
        """The last queries alone, `[:, :, -n:, :]`: where layers share keys, models drop tokens whose scores nobody
        asked for.

        Raises:
            TypeError: anything else was asked for.
        """
        match index:
            case slice(), slice(), slice(start=int(first), stop=None, step=None), slice() if first <= 0:
                dropped = self.query_length - len(range(*index[2].indices(self.query_length)))
            case _:
                raise TypeError(f"the mask of an extended model has its last queries alone, asked for {index}")
        if not dropped:
            return self
        start = None if self.query_start is None else self.query_start + dropped
        kept = LayoutMask(self.query_length - dropped, self.key_length, start, self.key_mask)
        kept.positions_checked = True  # by the layers before, on all queries
        return kept


def register_functions() -> None:
    """Makes the functions known to transformers. Both are needed: without the second, masks would silently be None."""
    for name, mask in ((NAME, layout_mask), (WITH_CHUNKS, _layout_or_chunks)):
        AttentionInterface.register(name, attention_forward)
        AttentionMaskInterface.register(name, mask)


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
    probe.check_mask(mask_function, batch_size, q_length, kv_length, q_offset, kwargs.get("device"))
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


def _layout_or_chunks(*args: Any, local_size: int | None = None, **kwargs: Any) -> LayoutMask | Tensor | None:
    """A layout, or transformers' own mask where only the tokens of a chunk are seen."""
    if local_size is None or isinstance(kwargs.get("attention_mask"), LayoutMask):
        return layout_mask(*args, local_size=local_size, **kwargs)
    return sdpa_mask(*args, **{**kwargs, "local_size": local_size})


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
    plan: LayerPlan | Unchanged | None = getattr(module, PLAN, None)
    if plan is None:
        raise RuntimeError(f"{type(module).__name__} was not part of the model when it was extended: extend it again")
    if isinstance(plan, Unchanged):
        if isinstance(attention_mask, Layout):
            raise RuntimeError(f"{type(module).__name__} attends to the text, which it did not do when it was extended")
        more = {"scaling": scaling, "dropout": dropout, "softcap": softcap, "s_aux": s_aux, **kwargs}
        more = {name: value for name, value in more.items() if value is not None}
        return plan.attend(module, query, key, value, attention_mask, **more)
    _refuse(dropout, cache, output_attentions, attention_mask)
    if torch.is_autocast_enabled(query.device.type):
        # As torch's own attention does.
        query, key, value = (x.to(torch.get_autocast_dtype(query.device.type)) for x in (query, key, value))
    layout = _layout(attention_mask, query, key)
    if not torch.compiler.is_compiling():
        layer: FarKeysLayer | None = getattr(key, LAYER, None)
        given = None if plan.limits is None else axes.current()
        positions = None if given is None else given.positions(plan.axis_of_pair, query.shape[2], key)
        far_keys = None if layer is None or given else layer.view(plan, query, key, value, layout)
        call = plan.call(query, key, value, layout, s_aux, scaling, softcap, far_keys, positions)
        name = choose(call, plan.impl)
        step = step_of(call, name)
        plan.check(call, step, position_ids)
        output: Tensor = run(call, name, step)
        weights.note(module, call)
    else:
        query_start = layout.query_start
        if query_start is not None:
            query_start = torch.as_tensor(query_start, device=query.device)
        if plan.takes_step(plan.call(query, key, value, None, s_aux, scaling, softcap)):
            if layout.traced_slots is None and not (query_start is None and layout.key_mask is None):
                layout.traced_slots = compiled.step_slots(query_start, layout.key_mask, query.shape[0], key.shape[2])
            lengths, first_slots = layout.traced_slots or (None, None)
            step = Step(lengths, first_slots, None)
            if plan.query_scaling is not None:
                factors = plan.query_scaling(step.positions(key.shape[2], query.device))
                query = query * factors.to(query.dtype)[:, None, None, None]
            output = compiled.extended_step(
                query, key, value, step.lengths, step.first_slots, s_aux, scaling, softcap, plan.handle
            )
        else:
            output = compiled.extended_attention(
                query, key, value, query_start, layout.key_mask, position_ids, s_aux, scaling, softcap, plan.handle
            )
    return output.transpose(1, 2).contiguous(), None


def _refuse(dropout: float, cache: Cache | None, output_attentions: bool | None, mask: Layout | Tensor | None) -> None:
    """Raises ValueError where a model asks for what an extended one does not give."""
    if dropout:
        raise ValueError(f"attention dropout of {dropout} is not supported on an extended model: call model.eval()")
    if cache is not None:
        raise ValueError("paged caches (continuous batching) are not supported on an extended model")
    if output_attentions:
        raise ValueError(
            "output_attentions=True is not supported on an extended model, which never holds the weights: "
            "handle.attention_weights gives those of chosen tokens"
        )
    if isinstance(mask, Tensor):
        raise ValueError(f"an extended model takes a 2-D attention mask (batch, tokens), got shape {tuple(mask.shape)}")


def _layout(mask: Layout | Tensor | None, query: Tensor, key: Tensor) -> Layout:
    layout = mask if isinstance(mask, Layout) else Layout(query.shape[2], key.shape[2])
    if layout.key_length != key.shape[2]:
        raise ValueError(
            f"attention_mask is for {layout.key_length} tokens, and there are {key.shape[2]}, those in the cache "
            "included: every one needs a column, and no other has one"
        )
    return layout.on(query.device)
