# SPDX-License-Identifier: Apache-2.0
"""What a forward pass of an extended model may be given: positions and padding that its map can follow."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from ropewalk.integrations.transformers import axes, refusals
from ropewalk.integrations.transformers.axes import Axes
from ropewalk.ops.layout import Layout

# The attribute of a cache that says how many tokens the last forward pass left in it.
_LENGTH = "ropewalk_length"


@dataclass
class Inputs:
    """A forward pre-hook (with keyword arguments) of the module that is given the tokens and makes the masks.

    It reads nothing that lies on a device when there is one token a row, and the cache is as the last pass left it.

    Args:
        decodes_fused: whether impl="fused" takes decode steps on the CPU, as it does on CUDA devices.
        without_windows: whether the model's sliding windows are disabled.
        axes: of the positions of images and videos, if the model has such and every extended layer's are known.
    """

    decodes_fused: bool
    without_windows: bool
    axes: int = 0

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if torch.compiler.is_compiling():
            positions, mask = kwargs.get("position_ids"), kwargs.get("attention_mask")
            if positions is None or positions.ndim < 3 or positions.shape[-1] == 1:
                return None
            which = mask if isinstance(mask, Tensor) and mask.ndim == 2 else None
            return args, {**kwargs, "position_ids": _checked_axes(positions, which)}
        given = {**dict(zip(_parameters(type(module).forward), args, strict=False)), **kwargs} if args else kwargs
        tokens = given.get("input_ids")
        tokens = given.get("inputs_embeds") if tokens is None else tokens
        if tokens is None:
            return None
        axes.give(None)
        used, queries = given.get("past_key_values"), tokens.shape[1]
        past: int | Tensor = used.get_seq_length() if isinstance(used, Cache) else 0
        # A static cache counts on its device, and loses no keys.
        as_left = (isinstance(past, Tensor) or past == getattr(used, _LENGTH, 0)) and not hasattr(used, axes.KEPT)
        if not (queries == 1 and as_left and (self.decodes_fused or tokens.device.type != "cpu")):
            self._check(tokens, given.get("position_ids"), given.get("attention_mask"), used, int(past))
        if isinstance(used, Cache) and isinstance(past, int):
            setattr(used, _LENGTH, past + queries)
        return None

    def _check(self, tokens: Tensor, positions: Tensor | None, mask: Any, used: Any, past: int) -> None:
        found = self._axes(tokens, positions, mask, used, past)
        axes.give(found)
        if positions is not None and found is None:
            text = _one_axis(positions, mask, refusals.axes_of_no_rotation())
            if past and (mask is None or (isinstance(mask, Tensor) and mask.ndim == 2)):
                _check_follow(text.expand(len(tokens), -1), past, mask)
        if isinstance(used, Cache):
            self._check_cache(used, past + tokens.shape[1], tokens, mask)

    def _axes(self, tokens: Tensor, positions: Tensor | None, mask: Any, used: Any, past: int) -> Axes | None:
        """The positions of the pass, where they do not count tokens one by one."""
        which = mask if isinstance(mask, Tensor) and mask.ndim == 2 else None
        if positions is not None and self.axes and positions.ndim == 3 and len(positions) == self.axes + 1:
            positions = positions[1:]  # the first counts the text
        several = positions is not None and positions.ndim == 3 and bool(self.axes) and _differ(positions, which).any()
        if not several and not hasattr(used, axes.KEPT):
            return None
        if positions is None:
            raise ValueError("this cache holds tokens whose positions are not their slots: pass position_ids as well")
        new = positions[None] if positions.ndim == 2 else positions
        new = new.permute(1, 2, 0).expand(len(tokens), -1, -1)
        return axes.of_pass(new, used if isinstance(used, Cache) else None, past, which)

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """A forward hook: a cache that the pass itself made is told the positions of its keys."""
        found, made = axes.current(), getattr(output, "past_key_values", None)
        if found is not None and isinstance(made, Cache) and not hasattr(made, axes.KEPT):
            setattr(made, axes.KEPT, found.keys)

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


def _key_masks(mask: Any) -> list[Tensor]:
    """The masks over keys that a model is given, prepared ones too."""
    masks = mask.values() if isinstance(mask, dict) else [mask]
    masks = [layout.key_mask if isinstance(layout, Layout) else layout for layout in masks]
    return [found for found in masks if isinstance(found, Tensor)]


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


def _check_follow(positions: Tensor, past: int, mask: Tensor | None) -> None:
    """Positions go on from what the cache holds: they count its slots, or its tokens.

    Raises:
        ValueError: they do not.
    """
    first = positions[:, 0]
    if positions.shape[1] == 1 and first.tolist() == [past] * len(first):
        return
    if mask is not None and mask.shape[1] >= past + positions.shape[1]:
        new = mask[:, past : past + positions.shape[1]].bool()
        column = new.long().argmax(dim=1)
        first = positions.gather(1, column[:, None])[:, 0]
        fits = (first == past + column) | (first == mask[:, :past].bool().sum(dim=1)) | ~new.any(dim=1)
    else:
        fits = first == past
    if not fits.all():
        row = int((~fits).nonzero()[0])
        raise ValueError(
            f"position_ids of row {row} go on at {int(first[row])}, and the cache holds {past} slots before them: an "
            "extended model takes a slot of the cache for the position of its key, so keys must not be missing from it "
            "(pruned or compressed caches), and the first token of a cached text has position 0"
        )


def _has_gaps(mask: Tensor) -> bool:
    """Whether a slot without a token comes after one with a token."""
    return bool((mask[:, :-1] & ~mask[:, 1:]).any())


@cache
def _parameters(forward: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(inspect.signature(forward).parameters)[1:]


# Reads on the host, so that torch.compile must not trace into it.
@torch.library.custom_op("ropewalk::checked_axes", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def _checked_axes(positions: Tensor, mask: Tensor | None) -> Tensor:
    _one_axis(positions, mask, "torch.compile traces text alone: call the model without it, or restore it for these")
    return positions.clone()


@_checked_axes.register_fake
def _(positions: Tensor, mask: Tensor | None) -> Tensor:
    return positions.clone()
