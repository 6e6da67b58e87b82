# SPDX-License-Identifier: Apache-2.0
"""A model under a position map, computed by the model itself: nothing is re-rotated, and no frequency is looked at.

The same text is read several times in one batch. Row 0 has the true positions; for each band of the map that moves
tokens there is a row at its query positions and a row at its key positions, so that the model's own code rotates by
them. Where the model multiplies queries with keys, in its eager attention, the pairs of a band take their score from
that band's two rows, and every row is given the scores that come of it. All else is the model's: scales, caps, sinks,
masks. So all rows attend alike, and what goes in at the next layer is the same in all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function, eager_mask

from ropewalk.maps import PositionMap

_PRODUCTS = {torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm}
_SUMS = {torch.baddbmm, Tensor.baddbmm}
_SOFTMAXES = {torch.softmax, Tensor.softmax, nn.functional.softmax}
# Scores below this are of pairs that do not attend.
_HIDDEN = -1e8
# How far the rows of one text may be apart: float32 angles, and what models compute in float32.
_APART = 1e-6


class NotComputableError(Exception):
    """A model that cannot be computed by rows; the message says why."""


def logits_by_rows(model: PreTrainedModel, ids: Tensor, position_map: PositionMap, everywhere: bool = False) -> Tensor:
    """The logits of a text under a map, (1, tokens, vocabulary).

    Layers that show a token a part of the text before it (sliding windows, chunks) are left alone, as `extend` leaves
    them. A factor of queries or keys that follows their position is the one at their true position. Frequencies that
    follow the length are held at those of the trained window.

    Args:
        model: newly made, with `attn_implementation="eager"`, in float64 where it can be.
        ids: (1, tokens), int64.
        position_map: one that shows every key, from the first query on.
        everywhere: whether windows are turned off, as by `sliding_window="disable"`.

    Raises:
        NotComputableError: the model multiplies queries and keys where it cannot be seen, or uses positions elsewhere.
    """
    if not position_map.sees_everything or position_map.start or position_map.by_pair:
        raise ValueError(f"{position_map} hides keys, starts late or goes by pair: that is not computed by rows")
    with _held_frequencies(model), _without_windows() if everywhere else nullcontext():
        with _Look(ids.shape[1]) as look:
            model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
        if not look.sees_all:
            raise NotComputableError("its eager attention does not multiply queries and keys where that can be seen")
        with _Rows(position_map, ids.shape[1], look.sees_all) as rows:
            logits: Tensor = model(
                input_ids=ids.expand(len(rows.positions), -1),
                position_ids=rows.positions,
                attention_mask=torch.ones_like(rows.positions),
                use_cache=False,
            ).logits
    if rows.products != len(look.sees_all):
        raise NotComputableError(f"it multiplied queries and keys {rows.products} and {len(look.sees_all)} times")
    apart = float((logits - logits[:1]).abs().max())
    if apart > _APART:
        raise NotComputableError(f"the same text differs by {apart:.1g} between rows: positions matter elsewhere too")
    return logits[:1]


class _Attention(TorchFunctionMode):
    """Sees the scores of a text's pairs where they are computed, and again on their way into the softmax."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length = length

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function in _PRODUCTS and self._of_pairs(*args[:2]):
            return self.product(lambda left, right: function(left, right, **kwargs), *args)
        if function in _SUMS and self._of_pairs(*args[1:3]):
            added, *factors = args
            return self.product(lambda left, right: function(added[: len(left)], left, right, **kwargs), *factors)
        if function in _SOFTMAXES and args[0].ndim > 2 and args[0].shape[-2] == self.length <= args[0].shape[-1]:
            return function(self.into_softmax(args[0]), *args[1:], **kwargs)
        return function(*args, **kwargs)

    def _of_pairs(self, left: Tensor, right: Tensor) -> bool:
        return min(left.ndim, right.ndim) > 2 and left.shape[-2] == right.shape[-1] == self.length

    def product(self, multiply: Callable[[Tensor, Tensor], Tensor], left: Tensor, right: Tensor) -> Tensor:
        """What goes on as the product of queries (rows, ..., tokens, dims) and keys (rows, ..., dims, tokens)."""
        raise NotImplementedError

    def into_softmax(self, scores: Tensor) -> Tensor:
        """What goes on as masked scores, (rows, ..., tokens, tokens and sinks)."""
        return scores


class _Look(_Attention):
    """Finds out which products are of layers that show all of the text before a token."""

    def __init__(self, length: int) -> None:
        super().__init__(length)
        self.sees_all: list[bool] = []

    def product(self, multiply: Callable[[Tensor, Tensor], Tensor], left: Tensor, right: Tensor) -> Tensor:
        # True also of products that are no attention, such as those of linear attention, which are alike in all rows.
        self.sees_all.append(True)
        return multiply(left, right)

    def into_softmax(self, scores: Tensor) -> Tensor:
        if self.sees_all:
            shown = scores[..., : self.length] > _HIDDEN
            self.sees_all[-1] = torch.equal(shown, torch.ones_like(shown).tril())
        return scores


class _Rows(_Attention):
    """Gives each pair of a layer that sees all the score of its band's rows."""

    def __init__(self, position_map: PositionMap, length: int, sees_all: list[bool]) -> None:
        super().__init__(length)
        self.products = 0
        self._sees_all = sees_all
        tokens = torch.arange(length)
        rows = [tokens]
        # Whether a band has a pair, and the rows of its queries and keys.
        self._bands: list[tuple[Tensor, int, int]] = []
        for band in position_map.bands:
            seen = band.sees(tokens[:, None], tokens)
            if band.is_true or not seen.any():
                continue
            # Tokens that the band has no pair for may be anywhere.
            queries = torch.where(seen.any(dim=1), band.query_positions(tokens), 0)
            keys = torch.where(seen.any(dim=0), band.key_positions(tokens), 0)
            self._bands.append((seen, len(rows), len(rows) + 1))
            rows += [queries, keys]
        self.positions = torch.stack(rows)

    def product(self, multiply: Callable[[Tensor, Tensor], Tensor], left: Tensor, right: Tensor) -> Tensor:
        sees_all, self.products = self._sees_all[self.products], self.products + 1
        queries, keys = self._by_row(left), self._by_row(right)
        scores = multiply(queries[0], keys[0])
        if sees_all:
            for seen, query_row, key_row in self._bands:
                query = _as_long_as(queries[0], queries[query_row], dim=-1)
                key = _as_long_as(keys[0], keys[key_row], dim=-2)
                scores = torch.where(seen, multiply(query, key), scores)
        return scores.expand(len(self.positions), *scores.shape).flatten(0, 1)

    def _by_row(self, x: Tensor) -> Tensor:
        """Row by row, of a dimension that may hold heads too."""
        return x.unflatten(0, (len(self.positions), -1))


def _as_long_as(true: Tensor, turned: Tensor, dim: int) -> Tensor:
    """`turned` with the lengths of `true`: a rotation changes none, so what does is a factor that follows positions."""
    return turned * (true.norm(dim=dim, keepdim=True) / turned.norm(dim=dim, keepdim=True).clamp(min=1e-30))


@contextmanager
def _held_frequencies(model: PreTrainedModel) -> Iterator[None]:
    """Frequencies that follow the length of a text stay what they are in a newly made model."""
    before = [(module, module.rope_type) for module in model.modules() if hasattr(module, "rope_type")]
    try:
        for module, kind in before:
            module.rope_type = dict.fromkeys(kind, "default") if isinstance(kind, dict) else "default"
        yield
    finally:
        for module, kind in before:
            module.rope_type = kind


@contextmanager
def _without_windows() -> Iterator[None]:
    """Every mask of eager attention is the causal one."""

    def causal(*args: Any, **kwargs: Any) -> Tensor:
        mask: Tensor = eager_mask(*args, **{**kwargs, "mask_function": causal_mask_function, "local_size": None})
        return mask

    ALL_MASK_ATTENTION_FUNCTIONS["eager"] = causal
    try:
        yield
    finally:
        del ALL_MASK_ATTENTION_FUNCTIONS["eager"]
