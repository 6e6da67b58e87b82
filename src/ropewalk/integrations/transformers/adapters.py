# SPDX-License-Identifier: Apache-2.0
"""Models whose attention does not go through transformers' AttentionInterface: while they are extended, it does.

A method of each of their attention modules is replaced on the module by one that computes the same and leaves the
attention itself to the interface. Those of them that have ALiBi are given it as slopes instead of as a bias.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ropewalk.integrations.transformers.changes import Changes
from ropewalk.integrations.transformers.place import place
from ropewalk.integrations.transformers.watch import paths


@dataclass(eq=False)
class _Method:
    """Stands for a method of a module. Made of nothing but what can be copied and pickled.

    Args:
        name: in `_METHODS`.
        model: the innermost model that the module is in, whose configuration says what attends.
    """

    name: str
    module: nn.Module
    model: PreTrainedModel

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _METHODS[self.name](self, *args, **kwargs)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Any, scale: float) -> Tensor:
        """By the interface: (batch, heads, tokens, head_dim) each, returns (batch, tokens, heads, head_dim)."""
        function = ALL_ATTENTION_FUNCTIONS[self.model.config._attn_implementation]
        dropout = _dropout(self.module) if self.module.training else 0.0
        output: Tensor = function(self.module, query, key, value, mask, scaling=scale, dropout=dropout)[0]
        return output


def _dropout(module: Any) -> float:
    """Share of the weights that a module leaves out while it is trained, under the names that they have for it."""
    names = ("attn_dropout", "attention_dropout", "attn_dropout_p")
    found = next(getattr(module, name) for name in names if hasattr(module, name))
    return float(getattr(found, "p", found))


def _after_rotation(
    self: _Method, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None
) -> tuple[Tensor, None]:
    """`_attn` of GPT-J, CodeGen and GPT-NeoX Japanese."""
    module: Any = self.module
    divisor = module.norm_factor if hasattr(module, "norm_factor") else module.scale_attn
    output = self.attend(query.to(value.dtype), key.to(value.dtype), value, attention_mask, 1 / float(divisor))
    return output.transpose(1, 2), None


def _falcon(
    self: _Method,
    hidden_states: Tensor,
    alibi: None,
    attention_mask: Any,
    position_ids: Tensor | None = None,
    layer_past: Cache | None = None,
    use_cache: bool = False,
    output_attentions: bool = False,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, None]:
    from transformers.models.falcon.modeling_falcon import apply_rotary_pos_emb

    module: Any = self.module
    query, key, value = (x.transpose(1, 2) for x in module._split_heads(module.query_key_value(hidden_states)))
    if not self.model.config.alibi:
        assert position_embeddings is not None
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)  # type: ignore[no-untyped-call]
    if layer_past is not None:
        key, value = layer_past.update(key, value, module.layer_idx)
    output = self.attend(query, key, value, attention_mask, module.inv_norm_factor)
    return module.dense(output.flatten(2)), None


def _bloom(
    self: _Method,
    hidden_states: Tensor,
    residual: Tensor,
    alibi: Tensor,
    attention_mask: Any,
    layer_past: Cache | None = None,
    use_cache: bool = False,
    output_attentions: bool = False,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    module: Any = self.module
    query, key, value = module._reshape(module.query_key_value(hidden_states))
    if layer_past is not None:
        key, value = layer_past.update(key, value, module.layer_idx)
    output = module.dense(self.attend(query, key, value, attention_mask, module.inv_norm_factor).flatten(2))
    return residual + nn.functional.dropout(output, module.hidden_dropout, module.training), None


def _mpt(
    self: _Method,
    hidden_states: Tensor,
    position_bias: Tensor,
    past_key_values: Cache | None = None,
    attention_mask: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    module: Any = self.module
    projected = module.Wqkv(hidden_states)
    if module.clip_qkv:
        projected = projected.clamp(min=-module.clip_qkv, max=module.clip_qkv)
    query, key, value = (
        x.unflatten(2, (module.n_heads, module.head_dim)).transpose(1, 2) for x in projected.chunk(3, dim=2)
    )
    if past_key_values is not None:
        key, value = past_key_values.update(key, value, module.layer_idx)
    return module.out_proj(self.attend(query, key, value, attention_mask, module.softmax_scale).flatten(2)), None


def _no_alibi(self: _Method, attention_mask: Any, num_heads: int, dtype: torch.dtype) -> Tensor:
    """In place of the bias of a whole BLOOM model, which nobody reads."""
    return torch.empty(0, dtype=dtype, device=place(self.model))


_METHODS: dict[str, Callable[..., Any]] = {
    "after rotation": _after_rotation,
    "falcon": _falcon,
    "bloom": _bloom,
    "mpt": _mpt,
    "no alibi": _no_alibi,
}


def _falcon_slopes(model: Any) -> Tensor | None:
    from transformers.models.falcon.modeling_falcon import build_alibi_tensor

    if not model.config.alibi:
        return None
    bias = build_alibi_tensor(torch.ones(1, 2, dtype=torch.long), model.num_heads, torch.float32)
    return bias[:, 0, 1] / math.sqrt(model.config.hidden_size // model.num_heads)


def _bloom_slopes(model: Any) -> Tensor:
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor

    return build_alibi_tensor(torch.ones(1, 2, dtype=torch.long), model.num_heads, torch.float32)[:, 0, 1]


def _mpt_slopes(model: Any) -> Tensor:
    bias: Tensor = model.build_mpt_alibi_tensor(model.num_heads, 2)
    return (bias[:, 0, 1] - bias[:, 0, 0]).float()


def _no_slopes(model: Any) -> None:
    return None


@dataclass(frozen=True)
class _Adapter:
    """How the attention modules of a class are made to use the interface.

    Args:
        attribute: the method that is replaced, by that one of `_METHODS`.
        slopes: of the model's heads, float32, in its own unit of scores; None if it has no ALiBi.
    """

    attribute: str
    method: str
    slopes: Callable[[Any], Tensor | None] = _no_slopes


_ADAPTERS = {
    "GPTJAttention": _Adapter("_attn", "after rotation"),
    "CodeGenAttention": _Adapter("_attn", "after rotation"),
    "GPTNeoXJapaneseAttention": _Adapter("_attn", "after rotation"),
    "FalconAttention": _Adapter("forward", "falcon", _falcon_slopes),
    "BloomAttention": _Adapter("forward", "bloom", _bloom_slopes),
    "MptAttention": _Adapter("forward", "mpt", _mpt_slopes),
}


def has_adapter(module: nn.Module) -> bool:
    """Whether `adapt` knows the module."""
    return type(module).__name__ in _ADAPTERS and type(module).__module__.startswith("transformers.models.")


def replaces_forward(module: nn.Module) -> bool:
    """Whether `adapt` puts something in the place of the module's forward."""
    return has_adapter(module) and _ADAPTERS[type(module).__name__].attribute == "forward"


def adapt(model: PreTrainedModel, rows: int, changes: Changes) -> dict[nn.Module, Tensor]:
    """Has the attention modules that need it use the interface, until the changes are undone.

    Args:
        rows: positions that tables of rotations, where a model has such, must have.

    Returns:
        The slopes of those that have ALiBi.
    """
    found: dict[nn.Module, Tensor] = {}
    models = {name: module for name, module in model.named_modules() if isinstance(module, PreTrainedModel)}
    tables: dict[tuple[Any, ...], Tensor] = {}
    for name, module in model.named_modules():
        if not has_adapter(module):
            continue
        adapter = _ADAPTERS[type(module).__name__]
        inner: Any = models[max((path for path in ("", *paths(name)) if path in models), key=len)]
        changes.set(module, adapter.attribute, _Method(adapter.method, module, inner))
        if (slopes := adapter.slopes(inner)) is not None:
            found[module] = slopes
            if vars(inner).get("use_alibi"):
                changes.set(inner, "use_alibi", False)
            if hasattr(inner, "build_alibi_tensor"):
                changes.set(inner, "build_alibi_tensor", _Method("no alibi", inner, inner))
        table = module._buffers.get("embed_positions")
        if table is not None and len(table) < rows:
            # One for all layers: they turn alike.
            key = (tuple(table.shape), table.dtype, table.device)
            if key not in tables:
                tables[key] = _lengthened(table, rows)
            changes.set(module, "embed_positions", tables[key])
    return found


def rows_of_tables(model: PreTrainedModel) -> int | None:
    """Positions that the model can look its rotations up for, where it does so."""
    tables = [module._buffers.get("embed_positions") for module in model.modules() if has_adapter(module)]
    return min((len(table) for table in tables if table is not None), default=None)


def table_frequencies(table: Tensor) -> Tensor:
    """The inverse frequencies of a table of sines and, beside them, cosines by position, (rows, 2 * pairs).

    The last row tells them exactly, up to whole turns, and the second says how many those are.
    """
    sine, cosine = table.double().cpu().chunk(2, dim=1)
    angles, last = torch.atan2(sine, cosine), len(table) - 1
    turns = ((angles[1] * last - angles[last]) / (2 * math.pi)).round()
    return ((angles[last] + 2 * math.pi * turns) / last).float()


def _lengthened(table: Tensor, rows: int) -> Tensor:
    """The table with more rows, the first as they are."""
    positions = torch.arange(len(table), rows, device=table.device)
    angles = positions[:, None].float() * table_frequencies(table).to(table.device)
    return torch.cat((table, torch.cat((angles.sin(), angles.cos()), dim=1).to(table.dtype)))
