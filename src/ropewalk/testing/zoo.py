# SPDX-License-Identifier: Apache-2.0
"""One tiny model of every architecture that transformers has for text, and of each kind of positions and attention."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from ropewalk.testing.models import REFUSED_MODELS, TINY_MODELS, TinyModel


@dataclass(frozen=True)
class Entry:
    """A model of the zoo.

    Attributes:
        tiny: how to make it.
        model_type: transformers' name of its architecture.
        family: "causal", "vision-language", "variant" or "encoder".
    """

    tiny: TinyModel
    model_type: str
    family: str


ZOO = {name: Entry(tiny, name, "variant") for name, tiny in {**TINY_MODELS, **REFUSED_MODELS}.items()}
