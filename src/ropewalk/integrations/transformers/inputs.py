# SPDX-License-Identifier: Apache-2.0
"""What a forward pass of an extended model may be given: positions and padding that its map can follow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from ropewalk.integrations.transformers import axes, refusals
from ropewalk.integrations.transformers.axes import Axes
from ropewalk.integrations.transformers.functions import LayoutMask
from ropewalk.integrations.transformers.limits import Limits
from ropewalk.integrations.transformers.plan import check_positions
from ropewalk.ops.layout import Layout, Span

# Attributes of a cache: how many tokens the pass found in it, how many the last one left, by what their keys are known
# again, and of how many tokens a pass itself dropped some.
_FOUND = "ropewalk_found"
_LENGTH = "ropewalk_length"
_MARKS = "ropewalk_marks"
_DROPPED = "ropewalk_dropped"
# Numbers of a key, and keys of a row that are looked for.
_TELLING, _SOUGHT = 4, 64


_TEXT_ALONE = (
    "torch.compile traces text alone: call the model without it (`generate` with disable_compile=True, or without a "
    "static cache), or restore it for these"
)


@dataclass
class Inputs:
    """A forward pre-hook, and by `after` a forward hook, of the module that is given the tokens and makes the masks.

    It reads nothing that lies on a device when there is one token a row, and the cache is as the last pass left it.

    Args:
        limits: lengths to check before the model looks anything up by its positions.
        decodes_fused: whether impl="fused" takes decode steps on the CPU, as it does on CUDA devices.
        without_windows: whether the model's sliding windows are disabled.
        layer: index in a cache of an extended layer.
        turns: whether an extended layer turns its keys, by positions that the model is given.
        axes: of the positions of images and videos, if the model has such and every extended layer's are known.
        rows: of the table that the model looks its rotations up in; None where it computes them.
        parameters: names of what the module's forward takes, in their order.
    """

    limits: Limits
    decodes_fused: bool
    without_windows: bool
    layer: int = 0
    turns: bool = True
    axes: int = 0
    rows: int | None = None
    parameters: tuple[str, ...] = ()

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = self._given(args, kwargs)
        if torch.compiler.is_compiling():
            return (), self._traced(given)
        if (tokens := _tokens(given)) is None:
            return None
        axes.give(None)
        used, queries = given.get("past_key_values"), tokens.shape[1]
        past: int | Tensor = used.get_seq_length(self.layer) if isinstance(used, Cache) else 0
        # A static cache counts on its device, and loses no keys.
        as_left = isinstance(past, Tensor) or past == getattr(used, _LENGTH, 0)
        as_left = as_left and not hasattr(used, axes.KEPT) and not hasattr(used, _DROPPED)
        if not (queries == 1 and as_left and (self.decodes_fused or tokens.device.type != "cpu")):
            self._check(tokens, given.get("position_ids"), given.get("attention_mask"), used, int(past))
        if isinstance(used, Cache):
            setattr(used, _FOUND, past)
        return None

    def after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Notes on the cache what the pass left in it, and the positions of its keys where the pass itself made it."""
        if torch.compiler.is_compiling():
            return
        found, made = axes.current(), getattr(output, "past_key_values", None)
        axes.give(None)
        if not isinstance(made, Cache):
            return
        length, known = made.get_seq_length(self.layer), getattr(made, _LENGTH, 0)
        if found is not None:
            setattr(made, axes.KEPT, found.keys)
        # A static cache counts on its device. Not at every step, for what is evicted is seldom young alone.
        if found is not None or (not isinstance(length, Tensor) and length != known + 1):
            setattr(made, _MARKS, _marks(made, self.layer))
        if not isinstance(length, Tensor):
            setattr(made, _LENGTH, length)
            tokens = _tokens(self._given(args, kwargs))
            held = vars(made).get(_FOUND, 0) + (length if tokens is None else tokens.shape[1])
            if length < held:
                setattr(made, _DROPPED, held)

    def _given(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        return {**dict(zip(self.parameters, args, strict=False)), **kwargs} if args else kwargs

    def keep(self, cache: Cache, positions: Tensor) -> None:
        """Notes the positions of a cache's keys, which are then no longer taken for its slots; see
        `Extension.keep_positions`."""
        if not isinstance(cache, Cache):
            raise ValueError(f"cache must be one of transformers' caches, got {type(cache).__name__}")
        if not self.turns:
            raise ValueError("an ALiBi model takes no position_ids, so keys must not be missing from its caches")
        axes.keep(cache, positions, int(cache.get_seq_length(self.layer)), self.axes)
        setattr(cache, _MARKS, _marks(cache, self.layer))
        vars(cache).pop(_DROPPED, None)

    def _traced(self, given: dict[str, Any]) -> dict[str, Any]:
        """What the module is given in a graph of torch.compile, which checks it when it runs."""
        positions, mask, used = (given.get(name) for name in ("position_ids", "attention_mask", "past_key_values"))
        mask = mask if isinstance(mask, Tensor) and mask.ndim == 2 else None
        name = next((one for one in ("position_ids", "input_ids", "inputs_embeds") if given.get(one) is not None), "")
        if not name:
            return given
        past = used.get_seq_length(self.layer) if isinstance(used, Cache) else 0
        if hasattr(used, axes.KEPT):
            checked = _refused_positions(given[name])
        elif positions is None and mask is None:
            return given
        elif isinstance(past, Tensor):
            # A static cache loses no keys, and a CUDA graph reads nothing.
            if given[name].shape[1] == 1 or (positions is not None and positions.shape[-1] == 1):
                return given
            checked = _checked_inputs(given[name], positions, mask, past, self.turns)
        else:
            # A tensor, or the graph would hold for this one length.
            checked = _checked_inputs(given[name], positions, mask, torch.tensor(past), self.turns)
        return {**given, name: checked}

    def _check(self, tokens: Tensor, positions: Tensor | None, mask: Any, used: Any, past: int) -> None:
        queries = tokens.shape[1]
        if isinstance(used, Cache) and not past:
            for attribute in (axes.KEPT, _MARKS, _LENGTH, _DROPPED):  # it was emptied
                vars(used).pop(attribute, None)
        if hasattr(used, _DROPPED):
            raise ValueError(
                f"this cache holds {past} keys of {getattr(used, _DROPPED)} tokens (it was compressed while they were "
                f"read): {self._how()}"
            )
        rows = self._rows(used, past) if isinstance(used, Cache) else None
        found = self._axes(tokens, positions, mask, used, past, rows)
        axes.give(found)
        for prepared in mask.values() if isinstance(mask, dict) else (mask,):
            if isinstance(prepared, LayoutMask):
                prepared.axes = found
        if found is None:
            spans = _spans(len(tokens), queries, past, mask)
            self.limits.check(max((span.count for span in spans), default=0))
            if self.turns:
                _check_counts(spans, positions, mask, past, len(tokens))
        if self.rows is not None and self.rows < past + queries:
            raise ValueError(
                f"a text of {past + queries} tokens is past the table of rotations for {self.rows} positions that the "
                "model was given when it was extended: enforce_limit=False goes no further on this model"
            )
        if isinstance(used, Cache):
            self._check_cache(used, past + queries, tokens, mask)

    def _rows(self, used: Cache, past: int) -> Tensor | None:
        """Which of the rows that the last pass left in a cache its rows are now; None where they are the same ones.

        Looked at where keys are missing, and where their positions are kept beside them.

        Raises:
            ValueError: keys are missing other than from the end.
        """
        before = getattr(used, _MARKS, None)
        if before is None or (past >= getattr(used, _LENGTH, 0) and not hasattr(used, axes.KEPT)):
            return None
        if (now := _marks(used, self.layer)) is None:
            return None
        known = min(past, before.shape[1])
        before, now = before.to(now.device), now[:, :known]
        if torch.equal(before[:, :known], now):
            return None
        same = torch.stack([_all_equal(before[:, :known], row) for row in now])  # (rows now, rows before)
        if same.any(dim=1).all():
            return same.long().argmax(dim=1)
        if any(_is_part(row, before) for row in now):
            raise ValueError(
                f"this cache holds {past} keys, and not the first {past} that it held after the last pass (it was "
                f"pruned or compressed): {self._how()}"
            )
        return None  # other keys, as of another text, or of another precision

    def _how(self) -> str:
        how = "say where these are with handle.keep_positions(cache, positions), and pass position_ids"
        return "an extended model takes a slot of the cache for the position of its key, so " + (
            how if self.turns else "keys must not be missing from it"
        )

    def _axes(
        self, tokens: Tensor, positions: Tensor | None, mask: Any, used: Any, past: int, rows: Tensor | None
    ) -> Axes | None:
        """The positions of the pass, where they do not count tokens one by one."""
        which = mask if isinstance(mask, Tensor) and mask.ndim == 2 else None
        if positions is not None and self.axes and positions.ndim == 3 and len(positions) == self.axes + 1:
            positions = positions[1:]  # the first counts the text
        several = positions is not None and positions.ndim == 3 and bool(self.axes) and _differ(positions, which).any()
        if not several and not hasattr(used, axes.KEPT):
            return None
        for one in self.limits.maps if several else ():
            if not one.sees_everything and not all(band.is_true for band in one.bands):
                raise ValueError(
                    f"{one} leaves keys out, and a patch of an image that one axis leaves out may be near by another, "
                    "where it would keep its true distance: read images under a map that sees all keys, such as "
                    "SelfExtend"
                )
        if positions is None:
            raise ValueError("this cache holds tokens whose positions are not their slots: pass position_ids as well")
        new = positions[None] if positions.ndim == 2 else positions
        new = new.long().permute(1, 2, 0).expand(len(tokens), -1, -1)
        return axes.of_pass(new, used if isinstance(used, Cache) else None, past, which, rows)

    def _check_cache(self, used: Cache, length: int, tokens: Tensor, mask: Any) -> None:
        if self.without_windows:
            for layer in used.layers:
                if getattr(layer, "is_sliding", False) and 0 <= layer.get_max_length() < length:
                    raise ValueError(
                        f"this cache keeps {layer.get_max_length()} tokens of a sliding window that is disabled on the "
                        "extended model: make it while the model is extended, from model.config"
                    )
        slides = not self.without_windows and any(getattr(layer, "is_sliding", False) for layer in used.layers)
        if slides and any(_has_gaps(found[:, :length].bool()) for found in _key_masks(mask)):
            raise ValueError(
                "attention_mask has gaps: slots without a token that lie after a row's first one. This cache drops "
                "keys by their slots, and a sliding window of an extended model counts tokens: pass "
                "past_key_values=DynamicCache(), which keeps every key"
            )
        on_device = self.decodes_fused or tokens.device.type == "cuda"
        steps = tokens.shape[1] > 1 and used.is_compileable and on_device
        if steps and any(_has_gaps(found[:, :length].bool()) for found in _key_masks(mask)):
            raise ValueError(
                "attention_mask has gaps: slots without a token that lie after a row's first one. The decode step of a "
                "static cache takes rows that are padded on the left only: use a dynamic cache, or pass an "
                "attention_mask of ones where pad tokens inside a prompt are part of the text"
            )


def _tokens(given: dict[str, Any]) -> Tensor | None:
    ids: Tensor | None = given.get("input_ids")
    return given.get("inputs_embeds") if ids is None else ids


def _marks(cache: Cache, layer: int) -> Tensor | None:
    """(batch, slots, 4) numbers of a layer's keys, where a cache holds them all as they are."""
    if layer >= len(cache.layers) or getattr(cache, "offloading", False):
        return None
    keys, length = getattr(cache.layers[layer], "keys", None), cache.get_seq_length(layer)
    if not isinstance(keys, Tensor) or keys.ndim != 4 or (isinstance(length, int) and keys.shape[2] < length):
        return None
    return keys[:, 0, :, :_TELLING].clone()


def _all_equal(rows: Tensor, row: Tensor) -> Tensor:
    """Whether each of some rows is this one, bool, (rows,)."""
    return (rows == row).flatten(1).all(dim=1)


def _is_part(row: Tensor, rows: Tensor) -> bool:
    """Whether the keys of a row, as far as some of them tell, are all of one of these rows, but not its first."""
    some = row[torch.linspace(0, len(row) - 1, min(_SOUGHT, len(row)), device=row.device).long()]
    found = (some[:, None, None] == rows).all(dim=3)  # (keys, rows, slots)
    return bool((found.any(dim=2).all(dim=0) & ~_all_equal(rows[:, : len(row)], row)).any())


def _key_masks(mask: Any) -> list[Tensor]:
    """The masks over keys that a model is given, prepared ones too."""
    masks = mask.values() if isinstance(mask, dict) else [mask]
    masks = [layout.key_mask if isinstance(layout, Layout) else layout for layout in masks]
    return [found for found in masks if isinstance(found, Tensor)]


def _spans(batch: int, queries: int, past: int, mask: Any) -> tuple[Span, ...]:
    """Where the tokens of a pass lie, and those in the cache before them."""
    length = past + queries
    # One that says less is refused by attention.
    masks = [one[:, :length] for one in _key_masks(mask) if one.shape[1] >= length]
    return Layout(queries, length, past, masks[0] if masks else None).spans(batch)


def _one_axis(positions: Tensor, mask: Any, why: str) -> Tensor:
    """(batch, tokens), from positions that may have several axes: the first dimension, for images and videos.

    Args:
        why: the axes of a token must not differ.

    Raises:
        ValueError: the axes of a token differ.
    """
    if positions.ndim < 3:
        return positions if positions.ndim == 2 else positions[None]
    differ = _differ(positions, mask if isinstance(mask, Tensor) and mask.ndim == 2 else None)
    if differ.any():
        row, token = differ.nonzero()[0].tolist()
        raise ValueError(
            f"position_ids have axes that differ ({positions[:, row, token].tolist()} at token {token} of row {row}), "
            f"as those of images and videos do, and {why}"
        )
    return positions[0]


def _differ(positions: Tensor, mask: Tensor | None) -> Tensor:
    """Whether the axes of a token differ, bool, (batch, tokens); of padding they may."""
    differ = (positions != positions[:1]).any(dim=0)
    return differ if mask is None else differ & mask[:, -differ.shape[1] :].bool()


def _check_counts(spans: tuple[Span, ...], positions: Tensor | None, mask: Any, past: int, batch: int) -> None:
    """Positions count the tokens of each row one by one, and go on from what the cache holds: its slots, or its tokens.

    Args:
        positions: that the model is given; None where it counts slots itself.

    Raises:
        ValueError: they do not.
    """
    if positions is None:
        if any(span.has_gaps for span in spans):
            raise ValueError(
                "attention_mask has gaps: slots without a token that lie after a row's first one, which a model counts "
                "as positions if it is given none: pass position_ids that count the tokens, "
                "(attention_mask.cumsum(-1) - 1).clamp(min=0)"
            )
        return
    text = _one_axis(positions, mask, refusals.axes_of_no_rotation()).expand(batch, -1)
    check_positions(spans, text)
    if not past:
        return
    for span in spans:
        first_query = span.queries.start if isinstance(span.queries, slice) else int(span.queries[0])
        first = text[span.rows, first_query]
        fits = (first == past + first_query) | (first == span.count - span.count_queries)
        if not fits.all():
            row = span.rows.start + int((~fits).nonzero()[0])
            raise ValueError(
                f"position_ids of row {row} go on at {int(text[row, first_query])}, and the cache holds {past} slots "
                "before them: an extended model takes a slot of the cache for the position of its key, so keys must "
                "not be missing from it (pruned or compressed caches) unless handle.keep_positions says where the "
                "others are, and the first token of a cached text has position 0"
            )


def _has_gaps(mask: Tensor) -> bool:
    """Whether a slot without a token comes after one with a token."""
    return bool((mask[:, :-1] & ~mask[:, 1:]).any())


# These read on the host, so that torch.compile must not trace into them.
@torch.library.custom_op("ropewalk::checked_inputs", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def _checked_inputs(x: Tensor, positions: Tensor | None, mask: Tensor | None, past: Tensor, turns: bool) -> Tensor:
    """x, an input of a pass, if the inputs are what a graph takes."""
    before = int(past)
    rows, queries = x.shape[:2] if positions is None else positions.shape[-2:]
    batch = rows if mask is None else len(mask)
    if positions is not None:
        _one_axis(positions, mask, _TEXT_ALONE)
    if turns:
        _check_counts(_spans(batch, queries, before, mask), positions, mask, before, batch)
    return x.clone()


@torch.library.custom_op("ropewalk::refused_positions", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def _refused_positions(x: Tensor) -> Tensor:
    raise ValueError(f"this cache holds tokens whose positions are not their slots, and {_TEXT_ALONE}")


@_checked_inputs.register_fake
@_refused_positions.register_fake
def _(x: Tensor, *others: Any) -> Tensor:
    return x.clone()
