# SPDX-License-Identifier: Apache-2.0
"""A cache that keeps its keys as the far band sees them, too: memory that buys decode speed on the CPU.

Keys stay in a cache at their true positions, so every decode step turns the far ones again. The layers of this cache
hold the turned copy beside their keys and are attached to the keys that they hand out, where attention finds them.
"""

from __future__ import annotations

import logging
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicSlidingWindowLayer

from ropewalk.integrations.transformers.place import place
from ropewalk.integrations.transformers.plan import PLAN, LayerPlan, Unchanged
from ropewalk.integrations.transformers.roomy import RoomyLayer, grown, roomy_cache
from ropewalk.maps import PositionMap
from ropewalk.maps.positions import TRUE_POSITIONS
from ropewalk.ops import Layout, Rotary
from ropewalk.ops.rotary import far_band, rerotated

logger = logging.getLogger("ropewalk")

# The attribute of keys that a layer of this cache handed out: the layer.
LAYER = "ropewalk_layer"
# Keys turned at a time, so that they pass through a processor's cache.
_KEYS_AT_A_TIME = 2048


def new_cache(model: PreTrainedModel) -> DynamicCache:
    """An empty dynamic cache to read and write with: on a CPU with room, and with the far keys of extended layers
    where they can be kept."""
    if place(model).type != "cpu":
        return DynamicCache(config=model.config)
    try:
        return far_keys_cache(model)
    except ValueError as error:
        logger.debug("%s", error)
        return roomy_cache(model)


def far_keys_cache(model: PreTrainedModel) -> DynamicCache:
    """An empty dynamic cache whose extended layers keep the far view of their keys.

    Raises:
        ValueError: this extension turns no keys that could be kept.
    """
    made = roomy_cache(model)
    reason = "no attention module says which layer of a cache is its own"
    for module in model.modules():
        plan: LayerPlan | Unchanged | None = vars(module).get(PLAN)
        if not isinstance(plan, LayerPlan) or plan.limits is None:
            continue
        if plan.rotary is None:
            raise ValueError("far keys cannot be kept: the model has ALiBi, which turns no key")
        if why := _unsupported(model, plan):
            raise ValueError(f"far keys cannot be kept: {why}")
        index = getattr(module, "layer_idx", len(made.layers))
        # Models whose sliding window is disabled have layers with a window that is never reached.
        if index < len(made.layers) and type(made.layers[index]) in (RoomyLayer, DynamicSlidingWindowLayer):
            made.layers[index], reason = FarKeysLayer(plan.position_map, plan.rotary), ""
    if reason:
        raise ValueError(f"far keys cannot be kept: {reason}")
    return made


def _unsupported(model: PreTrainedModel, plan: LayerPlan) -> str:
    """Why the far keys of a layer cannot be kept; empty if they can."""
    turned = sum(band.key_positions != TRUE_POSITIONS for band in plan.position_map.bands)
    if turned != 1:
        return f"{plan.position_map} turns keys in {turned} bands" if turned else f"{plan.position_map} turns no key"
    if far_band(plan.position_map) is None:
        return f"{plan.position_map} does not turn all keys from the first to some distance from the query"
    if plan.impl == "reference":
        return "impl='reference' uses none"
    if (device := place(model)).type != "cpu":
        return f"the model is on {device.type}, where turning keys is cheap"
    return ""


class FarKeysLayer(RoomyLayer):  # type: ignore[no-untyped-call]
    """A cache layer that turns each key for the far band once.

    The view begins anew where the keys were changed by anything but an update or a crop: reordered, selected, assigned,
    written in place. What is written in place in inference mode, which torch does not count, cannot be seen.
    """

    def __init__(self, position_map: PositionMap, rotary: Rotary) -> None:
        super().__init__()
        self._map, self._rotary = position_map, rotary
        self._forget()

    def _forget(self) -> None:
        # (batch, key heads, slots, head_dim); slots without a token, and those from `_filled` on, hold anything.
        self._far: Tensor | None = None
        self._filled = 0
        # Rows of the batch, and the first slot that holds a token in them.
        self._starts: tuple[tuple[slice, int], ...] | None = None
        # The keys as they were left here, and how often they had been written.
        self._left: tuple[Tensor | None, int | None] = None, None
        self._waiting = False

    def __getstate__(self) -> dict[str, Any]:
        self._check()
        return vars(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._left = _written(self.keys)  # a copy's tensors are counted anew

    @property
    def far_nbytes(self) -> int:
        """Memory that the view takes, in bytes."""
        return 0 if self._far is None else self._far.nbytes

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self._waiting:
            _log_recomputed("the model does not attend to the keys as its cache holds them")
        self._check()
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        if torch.compiler.is_compiling():
            return keys, values
        self._left, self._waiting = _written(keys), True
        # Another object for the same keys: the layer would keep itself alive through its own.
        handed = keys.view_as(keys)
        setattr(handed, LAYER, self)
        return handed, values

    def crop(self, tokens_to_remove: int) -> None:
        self._check()
        super().crop(tokens_to_remove)
        self._left, self._filled = _written(self.keys), min(self._filled, self.get_seq_length())

    def _check(self) -> None:
        keys, count = _written(self.keys)
        if keys is not self._left[0] or count != self._left[1]:
            self._forget()

    def view(self, plan: LayerPlan, query: Tensor, key: Tensor, value: Tensor, layout: Layout) -> Tensor | None:
        """The far view of the keys that were handed out, brought up to date; None where there is none to keep.

        Returns:
            As `far_keys` of `ropewalk.ops.attention`: (batch, key heads, slots, head_dim).
        """
        self._waiting = False
        band, rotary = far_band(plan.position_map), plan.rotary
        if band is None or rotary is None or key.device.type != "cpu":
            return None
        if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
            return None
        if plan.position_map != self._map or not (rotary is self._rotary or _alike(rotary, self._rotary)):
            _log_recomputed("the cache was made for another extension")
            return None
        self._rotary = rotary
        starts, end = _starts(layout, key.shape[0]), band.high(key.shape[2] - 1)
        first_far = max(band.first_query, plan.position_map.start)
        if starts is None or key.shape[2] - min(start for _, start in starts) <= first_far:
            return None
        if self._starts != starts:
            self._far, self._filled, self._starts = None, 0, starts
        # A buffer made in inference mode could not be written outside it.
        with torch.inference_mode(False), torch.no_grad():
            if self._far is None or self._far.shape[2] < end:
                self._far = grown(None if self._far is None else self._far[:, :, : self._filled], key, end)
            for rows, start in starts:
                for begin in range(max(self._filled, start), end, _KEYS_AT_A_TIME):
                    slots = slice(begin, min(begin + _KEYS_AT_A_TIME, end))
                    turned = rerotated(key[rows, :, slots], band.key_positions, begin - start, rotary)
                    self._far[rows, :, slots] = turned
        self._filled = max(self._filled, end)
        return self._far[:, :, :end]


def _written(keys: Tensor | None) -> tuple[Tensor | None, int | None]:
    """Keys, and how often they were written in place, where that is counted."""
    return keys, None if keys is None or keys.is_inference() else keys._version


def _alike(one: Rotary, other: Rotary) -> bool:
    """Whether two rotary embeddings are the same, as those of a copied cache and its model are."""
    kinds = (one.interleaved, one.offset) == (other.interleaved, other.offset)
    return kinds and torch.equal(one.inverse_frequencies, other.inverse_frequencies)


@cache
def _log_recomputed(reason: str) -> None:
    logger.info("far keys are recomputed: %s", reason)


def _starts(layout: Layout, batch: int) -> tuple[tuple[slice, int], ...] | None:
    """First key slot that holds a token, by rows; None where a row has gaps or no query."""
    spans = layout.spans(batch)
    if sum(span.rows.stop - span.rows.start for span in spans) != batch:
        return None
    starts = []
    for span in spans:
        if not isinstance(span.keys, slice):
            return None
        starts.append((span.rows, span.keys.start))
    return tuple(starts)
