# SPDX-License-Identifier: Apache-2.0
"""Loads a model and its tokenizer."""

from __future__ import annotations

import importlib.util
import io
from contextlib import nullcontext, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from ropewalk.integrations.transformers import gguf_rope
from ropewalk.integrations.transformers.presets import fetch_preset
from ropewalk.integrations.transformers.sources import ModelError, Source

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Dtype = Literal["auto", "bfloat16", "float16", "float32"]
Device = Literal["auto", "cpu", "cuda"]


@dataclass(frozen=True)
class LoadedModel:
    """A model in eval mode, and its tokenizer."""

    source: Source
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    @property
    def trained_window(self) -> int | None:
        """Tokens that the model says it was trained on: before its positions were scaled, where a GGUF file says so."""
        return trained_window(self.model)

    @property
    def dtype(self) -> str:
        return str(self.model.dtype).removeprefix("torch.")

    @property
    def device(self) -> str:
        return str(self.model.device)


def trained_window(model: PreTrainedModel) -> int | None:
    """Tokens that a model's configuration says it was trained on; None where it does not say."""
    config = model.config.get_text_config(decoder=True)
    # The last is MPT's.
    names = (gguf_rope.TRAINED_WINDOW, "max_position_embeddings", "max_seq_len")
    windows = [window for name in names if isinstance(window := getattr(config, name, None), int)]
    return windows[0] if windows else None


def load(
    source: Source,
    dtype: Dtype = "auto",
    device: Device = "auto",
    trust_remote_code: bool = False,
    show_progress: bool = False,
) -> LoadedModel:
    """Loads a model and its tokenizer.

    Args:
        source: from `sources.find`.
        dtype: of the weights; "auto" is bfloat16 where the device computes in it, else float32. GGUF weights are
            unpacked to it.
        device: "auto" is the first CUDA device where there is one, else the CPU.
        trust_remote_code: runs code that the model's folder or repository brings along.
        show_progress: shows the progress bars and advice of transformers.

    Raises:
        ModelError: the model cannot be loaded.
        ValueError: `dtype` or `device` is none of those named.
    """
    if dtype not in get_args(Dtype):
        raise ValueError(f"dtype must be one of {', '.join(get_args(Dtype))}, got {dtype!r}")
    if device not in get_args(Device):
        raise ValueError(f"device must be one of {', '.join(get_args(Device))}, got {device!r}")
    if source.gguf_file is not None:
        _require_packages_for_gguf()

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if device == "cuda" and not torch.cuda.is_available():
        raise ModelError("no CUDA device was found: leave --device out, or pass --device cpu")
    place = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    weights: dict[str, Any] = {"dtype": _default_dtype(place) if dtype == "auto" else getattr(torch, dtype)}
    if source.gguf_file is not None:
        from transformers import GgufConfig

        options["gguf_file"] = source.gguf_file
        weights["quantization_config"] = GgufConfig(dequantize=True)
    try:
        # The progress bar of the GGUF reader can be turned off in no other way.
        with nullcontext() if show_progress else redirect_stderr(io.StringIO()):
            tokenizer = AutoTokenizer.from_pretrained(source.location, **options)
            if source.gguf_file is not None:
                weights["config"] = gguf_rope.configuration(source.location, **options)
            model = AutoModelForCausalLM.from_pretrained(source.location, **options, **weights)
            fetch_preset(source.location)
        model.train(False)
        model.to(place)  # type: ignore[arg-type]
    except (KeyboardInterrupt, SystemExit, ModelError):
        raise
    except BaseException as error:  # whatever a broken file sets off in any reader, panics of those in Rust too
        hint = "" if Path(source.location).is_dir() else f" (there is no folder '{source.location}' here either)"
        raise ModelError(f"cannot load the model '{source.name}': {_first_sentence(error)}{hint}") from error
    return LoadedModel(source, model, tokenizer)


def _require_packages_for_gguf() -> None:
    missing = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise ModelError(f"reading a GGUF file needs {' and '.join(missing)}: run 'pip install \"ropewalk[gguf]\"'")


def _default_dtype(device: torch.device) -> torch.dtype:
    import torch

    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    fast = any(able for name, able in torch.cpu.get_capabilities().items() if "bf16" in name)
    return torch.bfloat16 if fast else torch.float32


def _first_sentence(error: BaseException) -> str:
    """The first line of an error, on one line and not too long."""
    lines = str(error).strip().splitlines()
    text = lines[0].strip() if lines else type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."
