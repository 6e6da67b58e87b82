# SPDX-License-Identifier: Apache-2.0
"""A model's rotary embedding as data, and the re-rotation of tensors that it has already rotated."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor

from ropewalk.maps import Band, PositionMap
from ropewalk.maps.positions import TRUE_POSITIONS, PositionFunction
from ropewalk.ops import graphs

# Position functions whose angles are kept; SelfExtend needs two, maps with a band a group size need many more.
_ANGLES_KEPT = 8
# Tokens rotated at a time on a CPU: the float32 products of more would no longer fit its cache.
_TOKENS_ROTATED = 2048

T = TypeVar("T")


class Tables:
    """What is computed once for a rotary embedding, and kept as long as it or a CUDA graph that was captured with it.

    May be used by several threads.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._kept: dict[Hashable, Any] = {}
        self._angles: OrderedDict[Hashable, Tensor] = OrderedDict()

    def get(self, key: Any, make: Callable[..., T], *arguments: Any) -> T:
        """What is kept under the key; `make(key, *arguments)` makes it where there is nothing yet."""
        found: T | None = self._kept.get(key)
        if found is None:
            with self._lock:
                found = self._kept.get(key)
                if found is None:
                    found = self._kept[key] = make(key, *arguments)
        if graphs.is_capturing():
            graphs.tie(found)
        return found

    def angles(self, key: Hashable, tokens: int, make: Callable[[int, int], Tensor]) -> Tensor:
        """A tensor (2, at least `tokens`, pairs) that `make(begin, end)` lengthens. Only the last few are kept."""
        with self._lock:
            kept = self._angles.pop(key, None)
            have = 0 if kept is None else kept.shape[1]
            if kept is None or tokens > have:
                # A decoding text grows by one token a step: room for more is made at once.
                grown = make(have, tokens + max(256, tokens // 8))
                kept = grown if kept is None else torch.cat((kept, grown), dim=1)
            self._angles[key] = kept
            while len(self._angles) > _ANGLES_KEPT:
                self._angles.popitem(last=False)
        if graphs.is_capturing():
            graphs.tie(kept)
        return kept


@dataclass(frozen=True, eq=False)
class Rotary:
    """Rotary embedding of one attention layer: R(p) turns each pair of dimensions by `p * inverse_frequencies`.

    It owns the tables that the operator makes for it: they are kept between calls, and go when it goes.

    Args:
        inverse_frequencies: float32, shape (pairs,); without any, nothing is rotated.
        interleaved: pairs are (0, 1), (2, 3), ... instead of (0, pairs), (1, pairs + 1), ...
        offset: first rotated dimension of a head; the dimensions around the rotated ones pass through.

    Raises:
        ValueError: the frequencies are something else.
    """

    inverse_frequencies: Tensor
    interleaved: bool = False
    offset: int = 0
    tables: Tables = field(default_factory=Tables, init=False, repr=False)

    def __post_init__(self) -> None:
        frequencies: object = self.inverse_frequencies
        if not (isinstance(frequencies, Tensor) and frequencies.ndim == 1 and frequencies.is_floating_point()):
            given = tuple(frequencies.shape) if isinstance(frequencies, Tensor) else f"{frequencies!r:.60}"
            raise ValueError(f"inverse_frequencies must be floating-point numbers, shape (pairs,), got {given}")
        # On another device nothing is waited for.
        is_read = frequencies.device.type == "cpu" and frequencies.numel() > 0 and type(frequencies) is Tensor
        if frequencies.is_meta or (is_read and not frequencies.isfinite().all()):
            raise ValueError(f"inverse_frequencies must be finite, got {frequencies}")

    def __reduce__(self) -> tuple[Any, ...]:
        return Rotary, (self.inverse_frequencies, self.interleaved, self.offset)

    @classmethod
    def none(cls) -> Rotary:
        """Of a layer without rotary embedding."""
        return cls(torch.empty(0, device="cpu"))

    @cached_property
    def pairs(self) -> int:
        """Rotated pairs of dimensions of a head."""
        return self.inverse_frequencies.shape[0]

    @property
    def dim(self) -> int:
        """Rotated dimensions of a head."""
        return 2 * self.pairs

    def frequencies(self, device: torch.device) -> Tensor:
        """`inverse_frequencies` on a device, float32; copied once, for a model may move after it was measured."""

        def copy(device: torch.device) -> Tensor:
            with torch.inference_mode(False), torch.no_grad():
                return self.inverse_frequencies.to(device, torch.float32)

        return self.tables.get(device, copy)

    def phases(self, positions: Tensor, by_pair: bool = False) -> Tensor:
        """Angles of R(positions), float64, shape (*positions.shape, pairs).

        The product is rounded to float32 as models round it, so that differences of phases lead exactly to where the
        model itself would have rotated.

        Args:
            positions: of tokens, any shape; `by_pair`: of the pairs of tokens, (..., pairs).
        """
        positions = positions.float() if by_pair else positions.float()[..., None]
        return (positions * self.frequencies(positions.device)).double()

    def angles(self, function: PositionFunction, tokens: Tensor) -> Tensor:
        """Angles from tokens' true positions (int64, any shape) to the function's, float64, (..., pairs)."""
        return self.phases(function(tokens), function.by_pair) - self.phases(tokens)

    def table(self, function: PositionFunction, begin: int, end: int, device: torch.device) -> Tensor:
        """Cosine and sine of `angles` of the tokens `begin .. end - 1`, kept.

        Returns:
            float32, shape (2, end - begin, pairs).
        """

        def make(first: int, stop: int) -> Tensor:
            # Tables made in inference mode could not take part in a later backward pass.
            with torch.inference_mode(False), torch.no_grad():
                angles = self.angles(function, torch.arange(first, stop, device=device))
                return torch.stack((angles.cos(), angles.sin())).float()

        return self.tables.angles((function, device), end, make)[:, begin:end]

    def positions(self, function: PositionFunction, tokens: int, device: torch.device) -> Tensor | None:
        """Where the first tokens are, float32, (tokens,), kept; None for their true positions."""
        if function == TRUE_POSITIONS:
            return None

        def make(first: int, stop: int) -> Tensor:
            with torch.inference_mode(False), torch.no_grad():
                return function(torch.arange(first, stop, device=device)).float()[None, :, None]

        return self.tables.angles(("positions", function, device), tokens, make)[0, :tokens, 0]

    def rotate(self, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        """x (..., tokens, head_dim) turned by tables (..., tokens, pairs): in float32, rounded once to x.dtype."""
        rotated = x.clone() if x.shape[-1] > self.dim else torch.empty_like(x)
        step = _TOKENS_ROTATED if x.device.type == "cpu" else max(x.shape[-2], 1)
        for begin in range(0, x.shape[-2], step):
            tokens = slice(begin, begin + step)
            first, second = self.halves(x[..., tokens, :])
            c, s = cosine[..., tokens, :], sine[..., tokens, :]
            # A view taken anew for each assignment is what lets gradients through.
            self.halves(rotated[..., tokens, :])[0].copy_(first * c - second * s)
            self.halves(rotated[..., tokens, :])[1].copy_(second * c + first * s)
        return rotated

    def halves(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Views of the two dimensions of every pair, each (..., pairs)."""
        x = x[..., self.offset : self.offset + self.dim]
        if self.interleaved:
            return x[..., 0::2], x[..., 1::2]
        return x[..., : self.pairs], x[..., self.pairs :]

    def moves(self, function: PositionFunction) -> bool:
        """Whether anything is turned to be at the function's positions."""
        return self.pairs > 0 and function != TRUE_POSITIONS


def rerotated(x: Tensor, function: PositionFunction, begin: int, rotary: Rotary) -> Tensor:
    """x (batch, heads, tokens, head_dim), rotated by the model at true positions from `begin` on, as if it had been
    rotated at `function`'s positions."""
    if not rotary.moves(function):
        return x
    cosine, sine = rotary.table(function, begin, begin + x.shape[2], x.device)
    return rotary.rotate(x, cosine, sine)


def far_band(position_map: PositionMap) -> Band | None:
    """The band whose keys are turned, if it is the only one and goes from the first key to a diagonal: its view of the
    keys can be kept."""
    *near, far = position_map.bands
    only = far.low.is_beginning and not far.is_true and all(band.is_true for band in near)
    return far if only and far.high.is_diagonal else None


def band_keys(key: Tensor, band: Band, begin: int, end: int, rotary: Rotary, far_keys: Tensor | None) -> Tensor:
    """Keys `begin .. end - 1` of a span as the band sees them; taken from `far_keys` where it has them."""
    if far_keys is not None and not band.is_true:
        return far_keys[:, :, begin:end]
    return rerotated(key[:, :, begin:end], band.key_positions, begin, rotary)
