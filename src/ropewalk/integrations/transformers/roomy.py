# SPDX-License-Identifier: Apache-2.0
"""A cache with room for the tokens to come.

The layers of transformers' own dynamic cache hold exactly what there is, so that each token that is written copies all
keys and values once more. These hold them in larger tensors, and write the new ones behind the old.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

# Room for tokens to come is an eighth of those that are there, and this many at least.
_LEAST_ROOM = 64


def roomy_cache(model: PreTrainedModel) -> DynamicCache:
    """An empty dynamic cache whose layers that keep every token have room; the others are as they are."""
    made = DynamicCache(config=model.config)
    made.layers = [RoomyLayer() if type(layer) is DynamicLayer else layer for layer in made.layers]
    return made


class RoomyLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """A layer of a dynamic cache that copies what it holds once in a while, not with every token.

    Where its tensors were replaced, as by a crop or a reordering, it copies what is there then: whoever holds the old
    ones keeps them as they are. Where gradients are on, it is as any dynamic layer.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        # Of (batch, heads, slots, head_dim) each, and what was left in them: the beginning of either.
        self._room: tuple[Tensor, Tensor] | None = None
        self._held: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        # A backward pass would need them as they were.
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            self._room = self._held = None
            return super().update(key_states, value_states, *args, **kwargs)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        before = self.get_seq_length()
        length = before + key_states.shape[2]
        as_left = self._held is not None and self.keys is self._held[0] and self.values is self._held[1]
        # Tensors made in inference mode could not be written outside it.
        with torch.inference_mode(False), torch.no_grad():
            if self._room is None or not as_left or self._room[0].shape[2] < length:
                old = (self.keys, self.values) if before else (None, None)
                self._room = grown(old[0], key_states, length), grown(old[1], value_states, length)
            for room, new in zip(self._room, (key_states, value_states), strict=True):
                room[:, :, before:length] = new
            self._held = self.keys, self.values = self._room[0][:, :, :length], self._room[1][:, :, :length]
        return self.keys, self.values

    def reset(self) -> None:
        super().reset()
        self._room = self._held = None


def room_for(length: int) -> int:
    """Slots of a tensor that is made for so many tokens."""
    return length + max(_LEAST_ROOM, length // 8)


def grown(old: Tensor | None, new: Tensor, length: int) -> Tensor:
    """A tensor like `new` (batch, heads, tokens, head_dim) for `length` tokens and some more, with the old ones."""
    room = new.new_empty((*new.shape[:2], room_for(length), new.shape[3]))
    if old is not None:
        room[:, :, : old.shape[2]] = old
    return room
