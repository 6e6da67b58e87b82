# SPDX-License-Identifier: Apache-2.0
"""lm-evaluation-harness: the model `ropewalk`, with which any of its tasks reads under a position map.

Importing this module registers the model. lm-eval 0.4.13 looks for no plugins, so its own command does not know the
model; `python -m ropewalk.integrations.lm_eval` is that command with the model registered.
"""

from __future__ import annotations

import math
from dataclasses import MISSING, fields
from typing import TYPE_CHECKING, Any

from ropewalk.integrations.transformers.sources import find
from ropewalk.maps import MAPS, PositionMap, from_dict
from ropewalk.names import unknown
from ropewalk.presets import Preset, SlidingWindowChoice, read_preset

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ropewalk.integrations.transformers.extend import Extension
    from ropewalk.maps.query_scaling import QueryScalingKind

try:
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
except ImportError as error:
    raise ImportError(f"{error.name or 'lm_eval'} is not installed: run 'pip install \"ropewalk[lm-eval]\"'") from error

# Of every map; none of them is an option of HFLM.
PARAMETERS = tuple(dict.fromkeys(field.name for kind in MAPS.values() for field in fields(kind)))

# The map, unless one is named or given parameters: the preset's, or the default one where there is no preset.
PRESET, _DEFAULT = "preset", "selfextend"


@register_model("ropewalk")
class RopewalkLM(HFLM):
    """lm-eval's transformers model under a position map.

    Args:
        pretrained: a folder, a GGUF file, a name on the hub or a loaded model; by default the embedded
            SmolLM2-135M-Instruct.
        map: name of a position map; None for the model as it is, or as something else has extended it. By default the
            preset's map, or selfextend where there is no preset.
        max_length: longest text, in tokens, its answer included; by default what the map reaches on the trained window
            (SelfExtend, eq. 4). A map whose parameters are not given takes those that fit this length.
        trained_window: tokens that the model was trained on; by default its `max_position_embeddings`, or the original
            context length of a GGUF file that scales its positions.
        sliding_window: as in `ropewalk.extend`.
        query_scaling: as in `ropewalk.extend`.
        preset: as in `ropewalk.extend`; by default the model's own, where no map is given.
        options: parameters of the map, such as `group_size=8`; all others are HFLM's.

    Raises:
        ModelError: there is no such model.
        UnsupportedModelError: the model cannot be extended.
        LengthError: the map does not reach `max_length`.
        ValueError: there is no such map or preset, or its parameters do not fit.
    """

    def __init__(
        self,
        pretrained: str | PreTrainedModel | None = None,
        *,
        map: str | None = PRESET,
        max_length: int | None = None,
        trained_window: int | None = None,
        sliding_window: SlidingWindowChoice = "keep",
        query_scaling: QueryScalingKind | None = None,
        preset: Preset | str | None = None,
        **options: Any,
    ) -> None:
        from ropewalk.integrations.transformers.extend import extend
        from ropewalk.integrations.transformers.presets import find_preset

        parameters = {name: options.pop(name) for name in PARAMETERS if name in options}
        chosen = None if preset is None else read_preset(preset)
        if map == PRESET and parameters:
            map = _DEFAULT
        position_map = None if map in (None, PRESET) else _position_map(str(map), parameters, max_length)
        gguf_file = None
        if pretrained is None or isinstance(pretrained, str):
            source = find(pretrained)
            pretrained = source.location
            gguf_file = source.gguf_file
            if gguf_file is not None:
                options["gguf_file"] = gguf_file
        super().__init__(pretrained, max_length=max_length, **options)
        self.extension: Extension | None = None
        if map is None:
            return
        if position_map is None and chosen is None and (chosen := find_preset(self.model, gguf_file)) is None:
            position_map = _position_map(_DEFAULT, parameters, max_length)
        self.extension = extend(
            self.model,
            position_map,
            target_length=max_length,
            trained_window=trained_window,
            sliding_window=sliding_window,
            query_scaling=query_scaling,
            preset=chosen,
        )
        if max_length is None:
            self._max_length = _finite(self.extension.max_length, self.extension.position_map)

    def _create_model(self, pretrained: str, *, gguf_file: str | None = None, **options: Any) -> None:
        if gguf_file is not None:
            from transformers import GgufConfig

            from ropewalk.integrations.transformers import gguf_rope

            # Else transformers keeps the weights packed, and drops how the file scales its positions.
            options["quantization_config"] = GgufConfig(dequantize=True)
            found = {
                name: options[name] for name in ("trust_remote_code", "revision", "subfolder") if options.get(name)
            }
            options["config"] = gguf_rope.configuration(pretrained, gguf_file, **found)
        super()._create_model(pretrained, gguf_file=gguf_file, **options)

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval writes down beside its results."""
        info: dict[str, Any] = super().get_model_info()
        if self.extension is None:
            return info
        return {
            **info,
            "map": self.extension.position_map.to_dict(),
            "trained_window": self.extension.trained_window,
            "max_length": self.max_length,
            "preset": None if self.extension.preset is None else str(self.extension.preset),
        }


def _position_map(name: str, parameters: dict[str, Any], max_length: int | None) -> PositionMap | type[PositionMap]:
    """The map; its kind alone where its parameters are to fit a length."""
    if name not in MAPS:
        raise ValueError(unknown("map", name, MAPS))
    kind = MAPS[name]
    needed = [field.name for field in fields(kind) if field.default is MISSING]
    if needed and not parameters:
        if max_length is None:
            raise ValueError(
                f"map={name} needs {' and '.join(needed)}, or max_length, the tokens of the longest text, to choose "
                "them by"
            )
        return kind
    return from_dict({"map": name, **parameters})


def _finite(length: int | float, position_map: PositionMap) -> int:
    """lm-eval cuts what is longer, so it must know a number."""
    if math.isinf(length):
        raise ValueError(f"{position_map} reaches any length: pass max_length, the tokens of the longest text")
    return int(length)
