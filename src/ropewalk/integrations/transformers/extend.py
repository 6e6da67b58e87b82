# SPDX-License-Identifier: Apache-2.0
"""`extend` and `restore`: put a position map under a loaded model's attention, and take it away again."""

from __future__ import annotations

import logging
import math
import os
from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self, get_args

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from transformers import Cache, DynamicCache, PreTrainedModel

from ropewalk.integrations.transformers import axes, functions, models, probe, weights
from ropewalk.integrations.transformers.adapters import adapt
from ropewalk.integrations.transformers.changes import Changes, own_configurations
from ropewalk.integrations.transformers.far_keys import far_keys_cache
from ropewalk.integrations.transformers.frequencies import hold
from ropewalk.integrations.transformers.functions import NAME, WITH_CHUNKS
from ropewalk.integrations.transformers.inputs import Inputs
from ropewalk.integrations.transformers.limits import Limits
from ropewalk.integrations.transformers.plan import PLAN, LayerPlan, Unchanged
from ropewalk.integrations.transformers.presets import find_preset, why_none
from ropewalk.integrations.transformers.probe import ProbedLayer, UnsupportedModelError
from ropewalk.integrations.transformers.watch import Watch, paths
from ropewalk.integrations.transformers.wrappers import unwrapped
from ropewalk.maps import Identity, PositionMap, SelfExtend
from ropewalk.maps.numbers import whole
from ropewalk.maps.query_scaling import QueryScaling, QueryScalingKind
from ropewalk.maps.sliding_window import SlidingWindow
from ropewalk.ops import Implementation
from ropewalk.presets import Preset, SlidingWindowChoice, check_sliding_window, read_preset

logger = logging.getLogger("ropewalk")

# The attribute of an extended model that holds its Extension; gone after restore.
EXTENSION = "ropewalk_extension"

# Why layers are left alone.
_SLIDING, _CHUNKS = "sliding window", "attention in chunks"
_CROSS = "cross-attention, whose keys are no tokens of the text"

# Stands for "no window" in configurations whose cache and mask code wants a number.
_NO_WINDOW = 1 << 40


@dataclass(frozen=True)
class Layer:
    """One attention layer of an extended model, and what it does now.

    Attributes:
        reason: why it is left alone.
        position_map: that it computes under; None where it is left alone.
    """

    name: str
    extended: bool
    reason: str
    position_map: PositionMap | None = None


@dataclass(eq=False)
class Extension:
    """What `extend` did to a model. A context manager: leaving it restores the model.

    Attributes:
        position_map: the map in use; where layers have maps of their own (`layers`), the one that reaches least.
        trained_window: tokens that the model was trained on.
        layers: every attention layer, extended or left alone, and why.
        rotary: the rotary embeddings found, in words.
        impl: implementation asked for; "auto" chooses for each call.
        preset: the preset that said what nobody else did; None where there was none.
    """

    model: PreTrainedModel = field(repr=False)
    position_map: PositionMap
    trained_window: int
    layers: tuple[Layer, ...]
    rotary: tuple[str, ...]
    impl: Implementation
    _limits: Limits = field(repr=False)
    query_scaling: QueryScaling | None = None
    preset: Preset | None = None
    _changes: Changes = field(default_factory=Changes, repr=False)
    _watch: Watch | None = field(default=None, repr=False)
    _hooks: list[RemovableHandle] = field(default_factory=list, repr=False)

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A copy may come to life in another process, whose transformers knows nothing of this one's functions.
        functions.register_functions()
        vars(self).update(state)

    @property
    def max_length(self) -> int | float:
        """Longest text that stays inside the trained window (eq. 4), in tokens."""
        return self._limits.max_length

    @property
    def recommended_length(self) -> int | float:
        """Longest text that stays inside its better trained half (eq. 5), in tokens."""
        return self._limits.recommended_length

    @property
    def active(self) -> bool:
        """Whether the model still computes under this extension."""
        return self._problem is None

    @property
    def _attached(self) -> bool:
        return _extension(self.model) is self

    @property
    def _problem(self) -> str | None:
        """Why the model no longer computes under this extension."""
        if not self._attached:
            return "restored"
        return None if self._watch is None else self._watch.problem()

    def far_keys_cache(self) -> DynamicCache:
        """An empty cache to decode with, faster on the CPU for more memory: `past_key_values=` of one text or batch.

        Beside the keys it keeps them as the far band sees them, instead of having them turned at every step. That takes
        half of what keys and values take, and an eighth of that as room to grow (64 keys a layer at least), so 1.57
        times in all. Rows with gaps, gradients and compiled models do without.

        Raises:
            ValueError: the model is not extended any more, or turns no keys that could be kept.
        """
        if not self._attached:
            raise ValueError(f"this {type(self.model).__name__} is not extended")
        return far_keys_cache(self.model)

    def keep_positions(self, cache: Cache, positions: Tensor) -> None:
        """Says where the keys of a cache are that are no longer all there, as after an eviction.

        From here on the cache keeps positions beside its keys, and `position_ids` are those of the text.

        Args:
            cache: with the same keys left in every extended layer.
            positions: int64, (batch, slots), or (batch, slots, axes) for images.

        Raises:
            ValueError: they are not as many as the cache has slots.
        """
        axes.keep(cache, positions)

    def attention_weights(self, queries: Sequence[int]) -> AbstractContextManager[dict[str, Tensor]]:
        """What chosen tokens of the next forward pass attend to, in every layer, as the specification computes it.

        `with handle.attention_weights([-1]) as weights: model(ids)` fills `weights` by the layers' names: float32,
        (batch, heads, chosen tokens, key slots); each row sums to 1, but for what sinks take. Costs one row of scores a
        token and layer, beside the pass itself. Of several passes the last one's is kept.

        Args:
            queries: indices of tokens of the pass, from its end where negative.

        Raises:
            ValueError: the model is not extended any more, or an index is no whole number.
            IndexError: at the pass, which has no such token.
        """
        if not self._attached:
            raise ValueError(f"this {type(self.model).__name__} is not extended")
        return weights.recorded(self.model, [whole("queries", one) for one in queries])

    def restore(self) -> None:
        """Makes the model exactly what it was. Does nothing the second time."""
        if self._attached:
            _undo(self._changes, self._hooks)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.restore()

    def __str__(self) -> str:
        extended = [layer for layer in self.layers if layer.extended]
        alone: dict[str, int] = {}
        for layer in self.layers:
            if not layer.extended:
                alone[layer.reason] = alone.get(layer.reason, 0) + 1
        problem = self._problem
        counts = Counter(str(layer.position_map) for layer in extended)
        maps = ", ".join(
            f"{one} ({count} of {len(extended)} layers)" if len(counts) > 1 else one for one, count in counts.items()
        )
        lines = [
            f"{type(self.model).__name__} under {maps}" + (f" (no longer: {problem})" if problem else ""),
            f"  trained window   {self.trained_window} tokens",
            f"  reaches          {self.max_length} tokens (eq. 4), recommended {self.recommended_length} (eq. 5)",
            f"  layers           {len(extended)} of {len(self.layers)} extended",
            *(f"                   {count} left alone: {reason}" for reason, count in alone.items()),
            f"  rotary           {'; '.join(self.rotary)}",
            f"  implementation   {self.impl}",
        ]
        if self.query_scaling is not None:
            lines.append(f"  query scaling    {self.query_scaling.kind}")
        if self.preset is not None:
            lines.append(f"  preset           {self.preset}")
            if (own := self.preset.position_map) != self.position_map:
                reaches = own.max_length(self.trained_window)
                lines.append(f"                   in the place of its map {own}, which reaches {reaches} tokens")
        return "\n".join(lines)


def _extension(model: PreTrainedModel) -> Extension | None:
    # On the model itself, so that a copy of an extended model has an extension of its own. A shallow copy has its
    # original's, which is not the copy's to restore.
    extension: Extension | None = getattr(model, EXTENSION, None)
    return extension if extension is not None and extension.model is model else None


def check_length(model: PreTrainedModel, tokens: int) -> None:
    """Says of a text, before it is read chunk by chunk, what attention would say at the chunk that goes too far.

    Raises:
        LengthError: the model is extended, and so many tokens are past eq. 4.
    """
    if (extension := _extension(unwrapped(model))) is not None:
        extension._limits.check(tokens)


def extend(
    model: PreTrainedModel,
    position_map: PositionMap | type[PositionMap] | Sequence[PositionMap] | None = None,
    *,
    target_length: int | None = None,
    trained_window: int | None = None,
    sliding_window: SlidingWindowChoice = "keep",
    query_scaling: QueryScalingKind | None = None,
    impl: Implementation = "auto",
    enforce_limit: bool = True,
    preset: Preset | str | os.PathLike[str] | None = None,
) -> Extension:
    """Lets a loaded transformers model read past its training window. No weight and no forward is changed.

    Args:
        model: a decoder whose attention goes through transformers' AttentionInterface and that has rotary embeddings.
            Of a PEFT model, `torch.compile(model)` and `DataParallel` the model inside is extended, which is the
            handle's.
        position_map: a map, or a kind of map with its parameters chosen for `target_length`; by default a preset's, or
            SelfExtend. Or a map for each attention layer, in their order; those of layers that are left alone are not
            looked at.
        target_length: tokens that the model should read, its answer included. A preset's map that does not reach them
            (eq. 4) is replaced by one of its kind chosen for them.
        trained_window: tokens that the model was trained on; by default a preset's, or its `max_position_embeddings`.
        sliding_window: "keep" leaves sliding-window layers as they are, their windows counted in tokens even where
            padding lies between them; "disable" turns their window off and extends
            them, as the paper does for Mistral. The configuration then says so too, until the model is restored:
            restore a model before saving it.
        query_scaling: "log-n" or "yarn" scale the queries past the trained window; by default none.
        impl: implementation of the attention, see `ropewalk.ops.attention`.
        enforce_limit: whether a text past eq. 4 is an error.
        preset: what goes for all that is left at its default above: a `Preset`, the name of a built-in one, or the path
            of a file. Where neither it nor a map is given, the one in `ropewalk.json` beside the model's files (of the
            hub's, if it was downloaded), or else the built-in one of the model's kind, sizes and name, if there is one.

    Returns:
        A handle that says what was done. `with extend(...):` restores the model at the end.

    Raises:
        UnsupportedModelError: the model cannot be extended; nothing was changed.
        TypeError: it is no transformers model, nor around one in a way that is known.
        LengthError: no such map reaches `target_length`.
        ValueError: the model is already extended, an argument does not fit, or a preset's file holds none.
        OSError: a preset's file cannot be read.
    """
    model = unwrapped(model)
    if (present := _extension(model)) is not None:
        raise ValueError(f"the model is already extended; call ropewalk.restore(model) first\n{present}")
    _check_free(model)
    check_sliding_window(sliding_window)
    if impl not in get_args(Implementation):
        raise ValueError(f"impl must be one of {', '.join(get_args(Implementation))}, got {impl!r}")
    if target_length is not None:
        target_length = whole("target_length", target_length, 1)
    if trained_window is not None:
        trained_window = whole("trained_window", trained_window, 1)
    probe.check_decoder(model)
    if preset is not None:
        preset = read_preset(preset)
    elif position_map is None:
        preset = find_preset(model)
    if preset is not None:
        trained_window = preset.trained_window if trained_window is None else trained_window
        sliding_window = preset.sliding_window if sliding_window == "keep" else sliding_window
        query_scaling = preset.query_scaling if query_scaling is None else query_scaling
    window = trained_window if trained_window is not None else _trained_window(model)
    maps = _choose_maps(model, position_map, target_length, window, preset)
    for one in maps:
        one.check()
    limits = Limits(maps, window, enforced=enforce_limit)
    if target_length is not None:
        limits.check(target_length)
    scaling = None if query_scaling is None else QueryScaling(query_scaling, window)

    probe.register_functions()
    functions.register_functions()
    changes = Changes()
    hooks: list[RemovableHandle] = []
    try:
        hold(model, window, changes)
        reach = limits.max_length if enforce_limit else math.inf
        slopes = adapt(model, probe.farthest(window, reach) + 1, changes)
        probed = probe.probe(model, window, reach, slopes)
        if len(maps) == 1:
            maps *= len(probed)
        elif len(maps) != len(probed):
            raise ValueError(
                f"{type(model).__name__} has {len(probed)} attention layers, and there are {len(maps)} maps: pass one "
                "for all, or one for each"
            )
        layers = tuple(_decide(layer, sliding_window, one) for layer, one in zip(probed, maps, strict=True))
        _check_some_extended(model, probed, layers)
        measured = [layer for layer in probed if not layer.is_cross]
        rotary = tuple(dict.fromkeys(map(_describe, {layer.rotary: layer for layer in measured}.values())))
        limits = Limits(tuple(layer.position_map for layer in layers if layer.position_map), window, enforce_limit)
        extension = Extension(
            model,
            limits.position_map,
            window,
            layers,
            rotary,
            impl,
            limits,
            scaling,
            preset,
            _changes=changes,
            _hooks=hooks,
        )
        for layer, decision in zip(probed, layers, strict=True):
            if decision.position_map is not None:
                one = decision.position_map
                plan: LayerPlan | Unchanged = LayerPlan(
                    one, layer.rotary, scaling, impl, limits, layer.slopes, layer.axis_of_pair
                )
            else:
                plan = _own_plan(layer, impl)
            extension._changes.set(layer.module, PLAN, plan)
        _switch(extension, probed, sliding_window)
        extension._changes.set(model, EXTENSION, extension)
        logger.info("%s", extension)
        return extension
    except BaseException:
        _undo(changes, hooks)
        raise


def _undo(changes: Changes, hooks: list[RemovableHandle]) -> None:
    changes.undo()
    for hook in hooks:
        hook.remove()


def _check_free(model: PreTrainedModel) -> None:
    """Raises ValueError where a part of the model is extended already, on behalf of another."""
    for name, module in model.named_modules():
        if hasattr(module, PLAN):
            raise ValueError(
                f"{name} of this {type(model).__name__} is extended already, as a part of another model that shares it "
                "(the whole that it belongs to, a submodel or a shallow copy): call ropewalk.restore on that one first"
            )


def _own_plan(layer: ProbedLayer, impl: Implementation) -> LayerPlan | Unchanged:
    """Of a layer that is left alone."""
    if layer.chunk is not None:
        return Unchanged("sdpa")  # as the masks of `WITH_CHUNKS` are
    if layer.is_cross:
        configuration: Any = layer.module.config
        return Unchanged(configuration._attn_implementation)
    own = Identity() if layer.sliding_window is None else SlidingWindow(layer.sliding_window)
    return LayerPlan(own, layer.rotary, None, impl, None, layer.slopes)


def _decide(layer: ProbedLayer, sliding_window: SlidingWindowChoice, position_map: PositionMap) -> Layer:
    if layer.sliding_window is not None and sliding_window == "keep":
        return Layer(layer.name, False, f"{_SLIDING} of {layer.sliding_window} tokens")
    if layer.chunk is not None:
        return Layer(layer.name, False, f"{_CHUNKS} of {layer.chunk} tokens")
    if layer.is_cross:
        return Layer(layer.name, False, _CROSS)
    if layer.rotary is None and layer.slopes is None:
        return Layer(layer.name, False, "no rotary embedding")
    return Layer(layer.name, True, "", position_map)


def _check_some_extended(model: PreTrainedModel, probed: list[ProbedLayer], layers: tuple[Layer, ...]) -> None:
    """Raises UnsupportedModelError where nothing would be extended."""
    if any(layer.extended for layer in layers):
        return
    whose = "layer" if all(layer.rotary is not None for layer in probed) else "layer with a rotary embedding"
    reasons = dict.fromkeys(f"a {layer.reason}" for layer in layers if layer.reason.startswith(_SLIDING))
    reasons |= dict.fromkeys(layer.reason for layer in layers if layer.reason.startswith(_CHUNKS))
    hint = "; sliding_window='disable' turns the windows off, as the SelfExtend paper does for Mistral"
    raise UnsupportedModelError(
        f"every {whose} of {type(model).__name__} has {' or '.join(reasons)}, so there is nothing to extend"
        + (hint if any(layer.sliding_window for layer in probed) else "")
    )


def _switch(extension: Extension, probed: list[ProbedLayer], sliding_window: SlidingWindowChoice) -> None:
    """Has the model attend through its plans, and watches that it goes on doing so."""
    model, changes = extension.model, extension._changes
    attention = [layer.name for layer in probed]
    # What attention is in, and no other model has.
    around = sorted({"", *(path for name in attention for path in paths(name))})
    configurations = own_configurations(map(model.get_submodule, around), changes)
    text = model.config.get_text_config(decoder=True)
    implementation = WITH_CHUNKS if any(layer.chunk for layer in probed) else NAME
    for configuration in {id(each): each for each in (*configurations, text)}.values():
        changes.set(configuration, "_attn_implementation_internal", implementation)
    disabled = [layer for layer in probed if sliding_window == "disable" and layer.sliding_window is not None]
    for layer in disabled:
        # Caches and masks of the whole configuration then keep every key.
        for configuration in (getattr(layer.module, "config", text), text):
            if getattr(configuration, "sliding_window", None) is not None:
                changes.set(configuration, "sliding_window", _NO_WINDOW)

    # The innermost model that all attention is in: whoever calls whichever model around it, it is called.
    inner = max(
        (
            name
            for name in around
            if isinstance(model.get_submodule(name), PreTrainedModel)
            and all(name in ("", *paths(each)) for each in attention)
        ),
        key=len,
    )
    frequencies = {
        layer.frequencies[0]: layer.frequencies[1]
        for layer in probed
        if layer.frequencies is not None and layer.rotary is not None
    }
    extension._watch = Watch(model, around, frequencies)
    inputs = Inputs(extension.impl == "fused", bool(disabled), _axes(probed, extension.layers))
    hooks: list[tuple[str, Any, bool]] = [(inner, extension._watch, False), (inner, inputs, True)]
    if inner:
        hooks.append(("", Watch(model, paths(inner), {}), False))
    for name, hook, with_kwargs in hooks:
        extension._hooks.append(model.get_submodule(name).register_forward_pre_hook(hook, with_kwargs=with_kwargs))

    if inputs.axes:
        extension._hooks.append(model.get_submodule(inner).register_forward_hook(inputs.after))


def _axes(probed: list[ProbedLayer], layers: tuple[Layer, ...]) -> int:
    """Axes of the positions that all extended layers follow."""
    extended = [layer for layer, decision in zip(probed, layers, strict=True) if decision.extended]
    counts = {layer.axes for layer in extended}
    return counts.pop() if len(counts) == 1 else 0


def restore(model: PreTrainedModel) -> None:
    """Makes an extended model exactly what it was; it may be given in what it was extended in, or by itself.

    Raises:
        ValueError: the model is not extended.
    """
    model = unwrapped(model)
    extension = _extension(model)
    if extension is None:
        raise ValueError(f"this {type(model).__name__} is not extended")
    extension.restore()


def _trained_window(model: PreTrainedModel) -> int:
    window = models.trained_window(model)
    if window is None:
        raise ValueError(f"{type(model).__name__} does not say how long its training window was: pass trained_window=")
    return window


def _choose_maps(
    model: PreTrainedModel,
    position_map: PositionMap | type[PositionMap] | Sequence[PositionMap] | None,
    target_length: int | None,
    trained_window: int,
    preset: Preset | None,
) -> tuple[PositionMap, ...]:
    """One for all layers, or one for each."""
    if isinstance(position_map, PositionMap):
        return (position_map,)
    if isinstance(position_map, list | tuple) and position_map:
        if all(isinstance(one, PositionMap) for one in position_map):
            return tuple(position_map)
        raise TypeError(f"position_map must be a position map, or one a layer, got {position_map!r:.100}")
    if position_map is not None and not (isinstance(position_map, type) and issubclass(position_map, PositionMap)):
        raise TypeError(f"position_map must be a position map such as SelfExtend(8, 1024), got {position_map!r}")
    if position_map is None and preset is not None:
        return (preset.map_for(target_length, trained_window),)
    if target_length is None:
        why = why_none(model)
        raise ValueError(
            "pass a position map such as SelfExtend(group_size=8, window=1024), or target_length=..., or preset=..."
            + (f"; {why}" if why else "")
        )
    return ((position_map or SelfExtend).for_length(target_length, trained_window),)


def _describe(layer: probe.ProbedLayer) -> str:
    rotary = layer.rotary
    if layer.slopes is not None:
        return f"none; ALiBi with slopes from {layer.slopes.min():.3g} to {layer.slopes.max():.3g}"
    if rotary is None:
        return "none"
    kind = "interleaved" if rotary.interleaved else "half-split"
    partial = f"{rotary.dim} of {layer.head_dim}" if layer.head_dim != rotary.dim else f"{rotary.dim}"
    turning = rotary.inverse_frequencies[rotary.inverse_frequencies != 0]
    still = len(rotary.inverse_frequencies) - len(turning)
    periods = f"{2 * torch.pi / turning.abs().max().item():.3g} to {2 * torch.pi / turning.abs().min().item():.3g}"
    return f"{kind}, {partial} dimensions, periods from {periods}" + (f", {2 * still} of them at rest" if still else "")
