"""`extend` and `restore`: put a position map under a loaded model's attention, and take it away again."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Literal, Self, get_args

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from ropewalk.integrations.transformers import far_keys, functions, models, probe
from ropewalk.integrations.transformers.functions import NAME
from ropewalk.integrations.transformers.limits import Limits
from ropewalk.integrations.transformers.plan import PLAN, LayerPlan
from ropewalk.maps import Identity, PositionMap, SelfExtend
from ropewalk.maps.query_scaling import QueryScaling, QueryScalingKind
from ropewalk.maps.sliding_window import SlidingWindow
from ropewalk.ops import Implementation

logger = logging.getLogger("ropewalk")

SlidingWindowChoice = Literal["keep", "disable"]

# The attribute of an extended model that holds its Extension; gone after restore.
EXTENSION = "ropewalk_extension"

# Stands for "no window" in configurations whose cache and mask code wants a number.
_NO_WINDOW = 1 << 40


@dataclass(frozen=True)
class Layer:
    """One attention layer of an extended model, and what it does now."""

    name: str
    extended: bool
    reason: str


@dataclass(eq=False)
class Extension:
    """What `extend` did to a model. A context manager: leaving it restores the model.

    Attributes:
        position_map: the map in use.
        trained_window: tokens that the model was trained on.
        layers: every attention layer, extended or left alone, and why.
        rotary: the rotary embeddings found, in words.
        impl: implementation asked for; "auto" chooses for each call.
        far_keys: "kept", or "recomputed" and why where keeping them was asked for.
    """

    model: PreTrainedModel = field(repr=False)
    position_map: PositionMap
    trained_window: int
    layers: tuple[Layer, ...]
    rotary: tuple[str, ...]
    impl: Implementation
    _limits: Limits = field(repr=False)
    query_scaling: QueryScaling | None = None
    far_keys: str = "recomputed"
    _undo: list[tuple[Any, str, Any]] = field(default_factory=list, repr=False)
    _modules: list[nn.Module] = field(default_factory=list, repr=False)
    _hooks: list[RemovableHandle] = field(default_factory=list, repr=False)
    _previous_attention: str = field(default="", repr=False)

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
        return _extension(self.model) is self

    def restore(self) -> None:
        """Makes the model exactly what it was. Does nothing the second time."""
        if not self.active:
            return
        probe.set_attention(self.model, self._previous_attention)
        for owner, attribute, value in reversed(self._undo):
            setattr(owner, attribute, value)
        for module in self._modules:
            plan: LayerPlan = getattr(module, PLAN)
            if plan.far_keys is not None:
                plan.far_keys.clear()
            delattr(module, PLAN)
        for hook in self._hooks:
            hook.remove()
        delattr(self.model, EXTENSION)

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
        lines = [
            f"{type(self.model).__name__} under {self.position_map}",
            f"  trained window   {self.trained_window} tokens",
            f"  reaches          {self.max_length} tokens (eq. 4), recommended {self.recommended_length} (eq. 5)",
            f"  layers           {len(extended)} of {len(self.layers)} extended",
            *(f"                   {count} left alone: {reason}" for reason, count in alone.items()),
            f"  rotary           {'; '.join(self.rotary)}",
            f"  implementation   {self.impl}",
        ]
        if self.query_scaling is not None:
            lines.append(f"  query scaling    {self.query_scaling.kind}")
        if self.far_keys != "recomputed":
            lines.append(f"  far keys         {self.far_keys}")
        return "\n".join(lines)


def _extension(model: PreTrainedModel) -> Extension | None:
    # On the model itself, so that a copy of an extended model has an extension of its own.
    return getattr(model, EXTENSION, None)


def check_length(model: PreTrainedModel, tokens: int) -> None:
    """Says of a text, before it is read chunk by chunk, what attention would say at the chunk that goes too far.

    Raises:
        LengthError: the model is extended, and so many tokens are past eq. 4.
    """
    if (extension := _extension(model)) is not None:
        extension._limits.check(tokens)


def extend(
    model: PreTrainedModel,
    position_map: PositionMap | type[PositionMap] | None = None,
    *,
    target_length: int | None = None,
    trained_window: int | None = None,
    sliding_window: SlidingWindowChoice = "keep",
    query_scaling: QueryScalingKind | None = None,
    impl: Implementation = "auto",
    keep_far_keys: bool = False,
    enforce_limit: bool = True,
) -> Extension:
    """Lets a loaded transformers model read past its training window. No weight and no forward is changed.

    Args:
        model: a decoder whose attention goes through transformers' AttentionInterface and that has rotary embeddings.
        position_map: a map, or a kind of map with its parameters chosen for `target_length`; by default SelfExtend.
        target_length: tokens that the model should read, its answer included.
        trained_window: tokens that the model was trained on; by default its `max_position_embeddings`.
        sliding_window: "keep" leaves sliding-window layers as they are, their windows counted in tokens even where
            padding lies between them; "disable" turns their window off and extends
            them, as the paper does for Mistral. The configuration then says so too, until the model is restored:
            restore a model before saving it.
        query_scaling: "log-n" or "yarn" scale the queries past the trained window; by default none.
        impl: implementation of the attention, see `ropewalk.ops.attention`.
        keep_far_keys: decode faster on the CPU for more memory: beside a dynamic cache, the far keys are kept as the
            far band sees them, instead of turned at every step. They take half of what the cache takes, and an eighth
            of that as room to grow (64 keys a layer at least), so 1.57 times the cache in all. Other caches, attention
            masks with gaps, gradients and compiled models do without; the handle says where the whole model does.
        enforce_limit: whether a text past eq. 4 is an error.

    Returns:
        A handle that says what was done. `with extend(...):` restores the model at the end.

    Raises:
        UnsupportedModelError: the model cannot be extended; nothing was changed.
        LengthError: no such map reaches `target_length`.
        ValueError: the model is already extended, or an argument does not fit.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"extend takes a transformers PreTrainedModel, got {type(model).__name__}")
    if (present := _extension(model)) is not None:
        raise ValueError(f"the model is already extended; call ropewalk.restore(model) first\n{present}")
    if sliding_window not in get_args(SlidingWindowChoice):
        raise ValueError(f"sliding_window must be 'keep' or 'disable', got {sliding_window!r}")
    if impl not in get_args(Implementation):
        raise ValueError(f"impl must be one of {', '.join(get_args(Implementation))}, got {impl!r}")
    probe.check_decoder(model)
    window = trained_window if trained_window is not None else _trained_window(model)
    chosen = _choose_map(position_map, target_length, window)
    limits = Limits(chosen, window, enforced=enforce_limit)
    if target_length is not None:
        limits.check(target_length)
    scaling = None if query_scaling is None else QueryScaling(query_scaling, window)

    probe.register_functions()
    functions.register_functions()
    probed = probe.probe(model, window)

    if sliding_window == "keep" and all(layer.sliding_window is not None for layer in probed):
        raise probe.UnsupportedModelError(
            f"every layer of {type(model).__name__} has a sliding window ({probed[0].sliding_window} tokens), so there "
            "is nothing to extend; sliding_window='disable' turns the windows off, as the SelfExtend paper does for "
            "Mistral"
        )

    extension = Extension(
        model=model,
        position_map=chosen,
        trained_window=window,
        layers=(),
        rotary=(),
        impl=impl,
        _limits=limits,
        query_scaling=scaling,
    )
    layers, recomputed = [], ""
    for layer in probed:
        reason = _left_alone(layer, sliding_window)
        if not reason:
            kept = None
            if keep_far_keys and layer.rotary is not None:
                recomputed = far_keys.unsupported(model, layer.module, chosen, impl)
                if not recomputed:
                    kept = far_keys.FarKeys(chosen, layer.rotary)
                    extension._hooks.append(layer.module.register_forward_pre_hook(kept, with_kwargs=True))
            plan = LayerPlan(chosen, layer.rotary, scaling, impl, limits, kept)
        else:
            own = Identity() if layer.sliding_window is None else SlidingWindow(layer.sliding_window)
            plan = LayerPlan(own, layer.rotary, None, impl, None)
        setattr(layer.module, PLAN, plan)
        extension._modules.append(layer.module)
        layers.append(Layer(layer.name, not reason, reason))
        if sliding_window == "disable" and layer.sliding_window is not None:
            _disable_window(getattr(layer.module, "config", model.config.get_text_config()), extension)
    extension.layers = tuple(layers)
    if keep_far_keys:
        extension.far_keys = f"recomputed ({recomputed})" if recomputed else "kept"
    extension.rotary = tuple(_describe(layer) for layer in {layer.rotary: layer for layer in probed}.values())
    extension._previous_attention = probe.set_attention(model, NAME)
    setattr(model, EXTENSION, extension)
    logger.info("%s", extension)
    return extension


def restore(model: PreTrainedModel) -> None:
    """Makes an extended model exactly what it was.

    Raises:
        ValueError: the model is not extended.
    """
    extension = _extension(model)
    if extension is None:
        raise ValueError(f"this {type(model).__name__} is not extended")
    extension.restore()


def _trained_window(model: PreTrainedModel) -> int:
    window = models.trained_window(model)
    if window is None:
        raise ValueError(f"{type(model).__name__} does not say how long its training window was: pass trained_window=")
    return window


def _choose_map(
    position_map: PositionMap | type[PositionMap] | None, target_length: int | None, trained_window: int
) -> PositionMap:
    if isinstance(position_map, PositionMap):
        return position_map
    if position_map is not None and not (isinstance(position_map, type) and issubclass(position_map, PositionMap)):
        raise TypeError(f"position_map must be a position map such as SelfExtend(8, 1024), got {position_map!r}")
    if target_length is None:
        raise ValueError("pass a position map such as SelfExtend(group_size=8, window=1024), or target_length=...")
    return (position_map or SelfExtend).for_length(target_length, trained_window)


def _left_alone(layer: probe.ProbedLayer, sliding_window: SlidingWindowChoice) -> str:
    """Why a layer is left alone; empty if it is extended."""
    if layer.sliding_window is not None and sliding_window == "keep":
        return f"sliding window of {layer.sliding_window} tokens"
    return "no rotary embedding" if layer.rotary is None else ""


def _disable_window(config: Any, extension: Extension) -> None:
    """Caches and masks of the whole configuration then keep every key."""
    if config.sliding_window != _NO_WINDOW:
        extension._undo.append((config, "sliding_window", config.sliding_window))
        config.sliding_window = _NO_WINDOW


def _describe(layer: probe.ProbedLayer) -> str:
    rotary = layer.rotary
    if rotary is None:
        return "none"
    kind = "interleaved" if rotary.interleaved else "half-split"
    partial = f"{rotary.dim} of {layer.head_dim}" if layer.head_dim != rotary.dim else f"{rotary.dim}"
    frequencies = rotary.inverse_frequencies
    slowest = 2 * torch.pi / frequencies.min().item()
    return f"{kind}, {partial} dimensions, periods from {2 * torch.pi / frequencies.max().item():.3g} to {slowest:.3g}"
