# SPDX-License-Identifier: Apache-2.0
"""Positions that are no slots: those of images and videos, which have several axes (M-RoPE), and of caches that lost
keys. They are data of the cache, and kept beside its keys."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from ropewalk.ops.call import Positions

# The attribute of a cache that holds the positions of its keys, (batch, slots, axes), int64.
KEPT = "ropewalk_positions"


@dataclass(eq=False)
class Axes:
    """True positions of the tokens of a forward pass, on one axis or several.

    Args:
        queries: (batch, tokens, axes), int64.
        keys: (batch, slots, axes), those before the tokens included.
    """

    queries: Tensor
    keys: Tensor
    _made: dict[tuple[int, int, int, torch.device], Positions] = field(default_factory=dict, init=False)

    @cached_property
    def length(self) -> int:
        """Tokens of a text that reaches as far."""
        return int(self.keys.max()) + 1

    def positions(self, axis_of_pair: Tensor | None, queries: int, key: Tensor) -> Positions:
        """As the operator takes them.

        Args:
            axis_of_pair: (pairs,), int64, of a layer; not looked at where there is one axis.
            queries: of the call, the last tokens of the pass.
            key: of the call, (batch, heads, slots, head_dim); slots past those of this pass hold no token.
        """
        slots, device = key.shape[2], key.device
        made_for = (id(axis_of_pair), queries, slots, device)
        if made_for not in self._made:
            keys = torch.nn.functional.pad(self.keys, (0, 0, 0, slots - self.keys.shape[1])).to(device)
            at = self.queries[:, self.queries.shape[1] - queries :].to(device)
            if self.keys.shape[2] == 1:
                made = Positions(at[..., 0], keys[..., 0])
            else:
                assert axis_of_pair is not None
                made = Positions(at, keys, axis_of_pair.to(device))
            self._made[made_for] = made
        return self._made[made_for]


# Of the forward pass that begins in this thread, until its masks are made, which hand them to the layers.
_given: ContextVar[Axes | None] = ContextVar("positions of a forward pass", default=None)


def current() -> Axes | None:
    """Of the forward pass that begins in this thread; None where positions count tokens one by one."""
    return _given.get()


def give(axes: Axes | None) -> None:
    """For the masks of the forward pass that begins."""
    _given.set(axes)


def keep(cache: Cache, positions: Tensor, slots: int, axes: int) -> None:
    """Notes the positions of a cache's keys, which are then no longer taken for its slots.

    Args:
        cache: with one slot a key, the same in every extended layer.
        positions: int64, (batch, slots), or (batch, slots, axes) for models that have several.
        slots: that the cache has.
        axes: of the model's positions; 0 where it has one.

    Raises:
        ValueError: they are not as many as the cache has, or have other axes than the model's.
    """
    wanted = f"positions must be an int64 tensor, (batch, {slots}) as the cache has slots"
    wanted += f", or (batch, {slots}, {axes}) with the model's axes" if axes else ""
    if not isinstance(positions, Tensor):
        raise ValueError(f"{wanted}, got {type(positions).__name__}")
    fits = positions.ndim == 2 or (positions.ndim == 3 and positions.shape[2] in (1, axes))
    if not fits or positions.shape[1] != slots or positions.dtype != torch.int64:
        raise ValueError(f"{wanted}, got {positions.dtype} {tuple(positions.shape)}")
    if (positions < 0).any():
        raise ValueError(f"positions must be 0 or more, got {int(positions.min())}")
    positions = positions if positions.ndim == 3 else positions[..., None]
    setattr(cache, KEPT, positions.expand(-1, -1, max(axes, 1)))


def of_pass(new: Tensor, cache: Cache | None, past: int, mask: Tensor | None, rows: Tensor | None) -> Axes:
    """The positions of a pass's tokens and of all keys before them; the cache keeps them.

    Args:
        new: (batch, tokens, axes), int64.
        past: tokens in the cache.
        mask: of all tokens, (batch, slots); None where all are there.
        rows: (batch,), int64: the row that each was when positions were kept; None where they are as they were.

    Raises:
        ValueError: the positions of the cache are not known, or those of the pass are below 0.
    """
    kept: Tensor | None = getattr(cache, KEPT, None)
    if kept is None:
        # Until now they counted tokens.
        there = torch.ones(len(new), past, dtype=torch.long, device=new.device) if mask is None else mask[:, :past]
        kept = (there.long().cumsum(1) - 1).clamp(min=0)[..., None].expand(-1, -1, new.shape[2])
    elif rows is not None:
        kept = kept[rows.to(kept.device)]
    if new.shape[2] == 1:
        new = new.expand(-1, -1, kept.shape[2])  # of text the axes agree
    if len(kept) != len(new) or kept.shape[1] < past or kept.shape[2] != new.shape[2]:
        raise ValueError(
            f"this cache holds {past} tokens of {len(new)} rows, and positions are known of {kept.shape[1]} of "
            f"{len(kept)}: it was changed since it was read, by more than a crop"
        )
    keys = torch.cat((kept[:, :past].to(new.device), new), dim=1)
    if (new < 0).any():
        raise ValueError(f"position_ids must be 0 or more, got {int(new.min())}")
    if cache is not None:
        setattr(cache, KEPT, keys)
    return Axes(new, keys)
