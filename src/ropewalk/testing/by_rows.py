# SPDX-License-Identifier: Apache-2.0
"""A model under a position map, computed by the model itself: nothing is re-rotated, and no frequency is looked at.

The same text is read several times in one batch. Row 0 has the true positions; for each band of the map that moves
tokens there is a row at its query positions and a row at its key positions, so that the model's own code rotates by
them. Where the model multiplies queries with keys, itself or by torch's attention, the pairs of a band take their score
from that band's two rows, and every row is given the scores that come of it. All else is the model's: scales, caps,
sinks, masks. So all rows attend alike, and what goes in at the next layer is the same in all of them.

Where scores have a bias by distance (ALiBi) there is one row. The slopes show in a text of one token repeated, whose
scores differ by nothing else; what a pair's mapped distance costs less than its true one is added to its score.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function

from ropewalk.maps import PositionMap
from ropewalk.maps.base import Band
from ropewalk.maps.edges import PAST_QUERY

_PRODUCTS = {torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm}
_SUMS = {torch.baddbmm, Tensor.baddbmm}
_SOFTMAXES = {torch.softmax, Tensor.softmax, nn.functional.softmax}
# Scores below this are of pairs that do not attend.
_HIDDEN = -1e8
# How far the rows of one text may be apart: float32 angles, and what models compute in float32.
_APART = 1e-4


class NotComputableError(Exception):
    """A model that cannot be computed by rows; the message says why."""


def logits_by_rows(
    model: PreTrainedModel,
    ids: Tensor,
    position_map: PositionMap,
    everywhere: bool = False,
    positions: Tensor | None = None,
    beside: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """The logits of a text under a map, (1, tokens, vocabulary).

    Layers that show a token a part of the text before it (sliding windows, chunks) are left alone, as `extend` leaves
    them. A factor of queries or keys that follows their position is the one at their true position. Frequencies that
    follow the length are held at those of the trained window.

    Args:
        model: newly made, with transformers' eager attention or "sdpa", in float64 where it can be.
        ids: (1, tokens), int64.
        position_map: one that shows every key, from the first query on.
        everywhere: whether windows are turned off, as by `sliding_window="disable"`.
        positions: of the tokens, (tokens,), or (axes, tokens) for a model whose positions have axes (images): each axis
            is then mapped for itself, with true distances where a key is further along it than the query. By default
            they count the tokens.
        beside: what the model is given beside the text, (1, ...) each: an image that layers of their own attend to.

    Raises:
        NotComputableError: the model multiplies queries and keys where it cannot be seen, or uses positions elsewhere.
    """
    if not position_map.sees_everything or position_map.start or position_map.by_pair:
        raise ValueError(f"{position_map} hides keys, starts late or goes by pair: that is not computed by rows")
    if positions is None:
        positions = torch.arange(ids.shape[1])
    beside = beside or {}
    with held_frequencies(model), _masks(everywhere):
        with _Look(ids.shape[1]) as look:
            _run(model, ids, **beside)
        if not look.sees_all:
            raise NotComputableError("it does not multiply queries and keys where that can be seen")
        if (slopes := _slopes(model, ids.shape[1])) is not None:
            with _Biased(position_map, ids.shape[1], slopes, look.sees_all):
                return _run(model, ids, **beside)
        with _Rows(position_map, positions, look.sees_all) as rows:
            given = {name: x.expand(rows.count, *x.shape[1:]) for name, x in {"input_ids": ids, **beside}.items()}
            logits = _run(model, given.pop("input_ids"), position_ids=rows.positions, **given)
    if rows.products != len(look.sees_all):
        raise NotComputableError(f"it multiplied queries and keys {rows.products} and {len(look.sees_all)} times")
    apart = float((logits - logits[:1]).abs().max())
    if apart > _APART:
        raise NotComputableError(f"the same text differs by {apart:.1g} between rows: positions matter elsewhere too")
    return logits[:1]


def output_of(result: Any) -> Tensor:
    """What a model computes for each token: logits, or hidden states where it has no head."""
    logits: Tensor = result.logits if hasattr(result, "logits") else result.last_hidden_state
    return logits


def _run(model: PreTrainedModel, ids: Tensor, **arguments: Tensor) -> Tensor:
    return output_of(model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **arguments))


def _slopes(model: PreTrainedModel, length: int) -> Tensor | None:
    """What a key's score rises by with each token that it is nearer, (heads, 1, 1); None where it is no such bias."""
    with _Scores(length) as seen:
        _run(model, torch.ones(1, length, dtype=torch.long))
    if seen.first is None:
        return None
    steps: Tensor = seen.first[0, :, -1, :length].double().diff()
    slopes = steps.mean(dim=-1, keepdim=True)
    even = float((steps - slopes).abs().max()) < 1e-6 * length  # and finite: windows hide keys
    return slopes[..., None] if even and float(slopes.abs().max()) > 1e-6 else None


class _Attention(TorchFunctionMode):
    """Sees the scores of a text's pairs where they are computed, and again on their way into the softmax."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length = length

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is nn.functional.scaled_dot_product_attention:
            return self._attention(*args, **kwargs)
        if function in _PRODUCTS and self._of_pairs(*args[:2]):
            return self.product(lambda left, right: function(left, right, **kwargs), *args)
        if function in _SUMS:
            return self._sum(function, *args, **kwargs)
        if function in _SOFTMAXES and args[0].ndim > 2 and args[0].shape[-2] == self.length <= args[0].shape[-1]:
            return function(self.into_softmax(args[0]), *args[1:], **kwargs)
        return function(*args, **kwargs)

    def _sum(self, function: Any, added: Tensor, batch1: Tensor, batch2: Tensor, **factors: float) -> Tensor:
        def multiply(left: Tensor, right: Tensor) -> Tensor:
            result: Tensor = function(added[: len(left)], left, right, **factors)
            return result

        return self.product(multiply, batch1, batch2) if self._of_pairs(batch1, batch2) else multiply(batch1, batch2)

    def _attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """torch's attention, as its documentation writes it down."""
        if enable_gqa:
            key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
        shown = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool)
        mask = shown.tril() if is_causal else shown if attn_mask is None else attn_mask
        right = key.transpose(-2, -1)
        multiply = self.product if self._of_pairs(query, right) else lambda function, *factors: function(*factors)
        scores = multiply(torch.matmul, query, right) * (query.shape[-1] ** -0.5 if scale is None else scale)
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
        if self._of_pairs(query, right):
            scores = self.into_softmax(scores)
        return scores.softmax(dim=-1) @ value

    def _of_pairs(self, left: Tensor, right: Tensor) -> bool:
        return min(left.ndim, right.ndim) > 2 and left.shape[-2] == right.shape[-1] == self.length

    def product(self, multiply: Callable[[Tensor, Tensor], Tensor], left: Tensor, right: Tensor) -> Tensor:
        """What goes on as the product of queries (rows, ..., tokens, dims) and keys (rows, ..., dims, tokens)."""
        return multiply(left, right)

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


class _Scores(_Attention):
    """Keeps the scores of the first layer."""

    def __init__(self, length: int) -> None:
        super().__init__(length)
        self.first: Tensor | None = None

    def into_softmax(self, scores: Tensor) -> Tensor:
        self.first = scores if self.first is None else self.first
        return scores


class _Biased(_Attention):
    """Gives each pair of a layer that sees all the bias of its mapped distance instead of its true one."""

    def __init__(self, position_map: PositionMap, length: int, slopes: Tensor, sees_all: list[bool]) -> None:
        super().__init__(length)
        self.products = 0
        self._sees_all = sees_all
        tokens = torch.arange(length)
        nearer = tokens[:, None] - tokens - position_map.relative_positions(length)
        self._more = slopes * nearer.tril()

    def product(self, multiply: Callable[[Tensor, Tensor], Tensor], left: Tensor, right: Tensor) -> Tensor:
        self.products += 1
        return multiply(left, right)

    def into_softmax(self, scores: Tensor) -> Tensor:
        return scores + self._more.to(scores.dtype) if self._sees_all[self.products - 1] else scores


class _Rows(_Attention):
    """Gives each pair of a layer that sees all the score of its band's rows."""

    def __init__(self, position_map: PositionMap, positions: Tensor, sees_all: list[bool]) -> None:
        super().__init__(positions.shape[-1])
        self.products = 0
        self._sees_all = sees_all
        axes = positions if positions.ndim > 1 else positions[None]
        rows = [axes]
        # Which pairs of a band there are, and the rows of its queries and keys. With axes: of a band for each.
        self._bands: list[tuple[Tensor, int, int]] = []
        for bands in itertools.product(position_map.bands, repeat=len(axes)):
            seen = torch.stack([_sees(band, axis) for band, axis in zip(bands, axes, strict=True)]).all(dim=0)
            if not seen.any() or all(band.is_true for band in bands):
                continue
            # Tokens that the band has no pair for may be anywhere.
            queries = [band.query_positions(axis) for band, axis in zip(bands, axes, strict=True)]
            keys = [band.key_positions(axis) for band, axis in zip(bands, axes, strict=True)]
            self._bands.append((seen, len(rows), len(rows) + 1))
            rows += [torch.stack(queries) * seen.any(dim=1), torch.stack(keys) * seen.any(dim=0)]
        self.count = len(rows)
        together = torch.stack(rows, dim=1)
        self.positions = together if positions.ndim > 1 else together[0]

    def product(self, multiply: Callable[[Tensor, Tensor], Tensor], left: Tensor, right: Tensor) -> Tensor:
        sees_all, self.products = self._sees_all[self.products], self.products + 1
        queries, keys = self._by_row(left), self._by_row(right)
        scores = multiply(queries[0], keys[0])
        if sees_all:
            for seen, query_row, key_row in self._bands:
                query = _as_long_as(queries[0], queries[query_row], dim=-1)
                key = _as_long_as(keys[0], keys[key_row], dim=-2)
                scores = torch.where(seen, multiply(query, key), scores)
        return scores.repeat(self.count, *(1 for _ in scores.shape[1:]))  # its own memory: some are changed in place

    def _by_row(self, x: Tensor) -> Tensor:
        """Row by row, of a dimension that may hold heads too."""
        return x.reshape(self.count, -1, *x.shape[1:])


def _sees(band: Band, positions: Tensor) -> Tensor:
    """Pairs of a band by their positions; a key that is further along than the query is in the nearest."""
    queries, keys = positions[:, None], positions
    ahead = (keys > queries) if band.high == PAST_QUERY else torch.tensor(False)
    return band.sees(queries, keys) | ahead


def _as_long_as(true: Tensor, turned: Tensor, dim: int) -> Tensor:
    """`turned` with the lengths of `true`: a rotation changes none, so what does is a factor that follows positions."""
    size, wanted = (torch.linalg.vector_norm(x, dim=dim, keepdim=True) for x in (turned, true))
    scaled: Tensor = turned * (wanted / size.clamp(min=1e-30))
    return scaled


@contextmanager
def held_frequencies(model: PreTrainedModel) -> Iterator[None]:
    """Frequencies that follow the length of a text stay what they are in a newly made model."""
    before: list[tuple[Any, Any]] = [(each, each.rope_type) for each in model.modules() if hasattr(each, "rope_type")]
    try:
        for module, kind in before:
            module.rope_type = dict.fromkeys(kind, "default") if isinstance(kind, dict) else "default"
        yield
    finally:
        for module, kind in before:
            module.rope_type = kind


@contextmanager
def _masks(everywhere: bool) -> Iterator[None]:
    """Every mask is written out: where there is none, models take the positions of the rows for packed texts.

    Args:
        everywhere: whether each is the causal one.
    """
    whole = {"allow_is_causal_skip": False}
    given = {**whole, "mask_function": causal_mask_function, "local_size": None} if everywhere else whole

    def changed(make: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return make(*args, **{**kwargs, **given})

    masks: Any = ALL_MASK_ATTENTION_FUNCTIONS
    names = ("eager", "sdpa")
    for name in names:
        masks[name] = partial(changed, masks[name])
    try:
        yield
    finally:
        for name in names:
            del masks[name]
