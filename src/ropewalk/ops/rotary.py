"""A model's rotary embedding as data, and the re-rotation of tensors that it has already rotated."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ropewalk.maps import Band, PositionMap
from ropewalk.maps.positions import TRUE_POSITIONS, PositionFunction

# Position functions whose tables are kept; SelfExtend needs two, maps with a band a group size need many more.
_TABLES_KEPT = 8
# Tokens rotated at a time on a CPU: the float32 products of more would no longer fit its cache.
_TOKENS_ROTATED = 2048


@dataclass(frozen=True, eq=False)
class Rotary:
    """Rotary embedding of one attention layer: R(p) turns each pair of dimensions by `p * inverse_frequencies`.

    Args:
        inverse_frequencies: float32, shape (pairs,).
        interleaved: pairs are (0, 1), (2, 3), ... instead of (0, pairs), (1, pairs + 1), ...
        offset: first rotated dimension of a head; the dimensions around the rotated ones pass through.
    """

    inverse_frequencies: Tensor
    interleaved: bool = False
    offset: int = 0
    _tables: OrderedDict[tuple[PositionFunction, torch.device], Tensor] = field(
        default_factory=OrderedDict, init=False, repr=False
    )
    _frequencies: dict[torch.device, Tensor] = field(default_factory=dict, init=False, repr=False)

    @property
    def dim(self) -> int:
        """Rotated dimensions of a head."""
        return 2 * self.inverse_frequencies.shape[0]

    def frequencies(self, device: torch.device) -> Tensor:
        """`inverse_frequencies` on a device, float32; copied once, for a model may move after it was measured."""
        if device not in self._frequencies:
            with torch.inference_mode(False), torch.no_grad():
                self._frequencies[device] = self.inverse_frequencies.to(device, torch.float32)
        return self._frequencies[device]

    def phases(self, positions: Tensor) -> Tensor:
        """Angles of R(positions), float64, shape (*positions.shape, pairs).

        The product is rounded to float32 as models round it, so that differences of phases lead exactly to where the
        model itself would have rotated.
        """
        return (positions.float()[..., None] * self.frequencies(positions.device)).double()

    def shift(self, function: PositionFunction, begin: int, end: int, device: torch.device) -> Tensor:
        """Cosine and sine that turn tokens `begin .. end - 1` from their true positions to `function`'s.

        Returns:
            float32, shape (2, end - begin, pairs).
        """
        cached = self._tables.get((function, device))
        have = 0 if cached is None else cached.shape[1]
        if end > have:
            # A decoding text grows by one token a step: room for more is made at once. Tables made in inference mode
            # could not take part in a later backward pass.
            with torch.inference_mode(False), torch.no_grad():
                tokens = torch.arange(have, end + max(256, end // 8), device=device)
                angles = self.phases(function(tokens)) - self.phases(tokens)
                grown = torch.stack((angles.cos(), angles.sin())).float()
                cached = grown if cached is None else torch.cat((cached, grown), dim=1)
            self._tables[function, device] = cached
            while len(self._tables) > _TABLES_KEPT:
                self._tables.popitem(last=False)
        self._tables.move_to_end((function, device))
        assert cached is not None
        return cached[:, begin:end]

    def rotate(self, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        """x (..., tokens, head_dim) turned by tables of shape (tokens, pairs): in float32, rounded once to x.dtype."""
        rotated = x.clone() if x.shape[-1] > self.dim else torch.empty_like(x)
        step = _TOKENS_ROTATED if x.device.type == "cpu" else max(x.shape[-2], 1)
        for begin in range(0, x.shape[-2], step):
            tokens = slice(begin, begin + step)
            first, second = self._halves(x[..., tokens, :])
            c, s = cosine[tokens], sine[tokens]
            # A view taken anew for each assignment is what lets gradients through.
            self._halves(rotated[..., tokens, :])[0].copy_(first * c - second * s)
            self._halves(rotated[..., tokens, :])[1].copy_(second * c + first * s)
        return rotated

    def _halves(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Views of the two dimensions of every pair, each (..., pairs)."""
        x = x[..., self.offset : self.offset + self.dim]
        if self.interleaved:
            return x[..., 0::2], x[..., 1::2]
        pairs = self.dim // 2
        return x[..., :pairs], x[..., pairs:]


def moved(x: Tensor, function: PositionFunction, begin: int, rotary: Rotary | None) -> Tensor:
    """x (batch, heads, tokens, head_dim), rotated by the model at true positions from `begin` on, as if it had been
    rotated at `function`'s positions. Without rotary embedding there is nothing to move."""
    if rotary is None or function == TRUE_POSITIONS:
        return x
    cosine, sine = rotary.shift(function, begin, begin + x.shape[2], x.device)
    return rotary.rotate(x, cosine, sine)


def far_band(position_map: PositionMap) -> Band | None:
    """The band whose keys are turned, if it is the only one and has no end: its view of the keys can be kept."""
    *near, far = position_map.bands
    return far if far.stop is None and not far.is_true and all(band.is_true for band in near) else None


def band_keys(key: Tensor, band: Band, begin: int, end: int, rotary: Rotary | None, far_keys: Tensor | None) -> Tensor:
    """Keys `begin .. end - 1` of a span as the band sees them; taken from `far_keys` where it has them."""
    if far_keys is not None and not band.is_true:
        return far_keys[:, :, begin:end]
    return moved(key[:, :, begin:end], band.key_positions, begin, rotary)
