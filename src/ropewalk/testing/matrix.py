# SPDX-License-Identifier: Apache-2.0
"""What `ropewalk.extend` does on every model of the zoo: `python -m ropewalk.testing.matrix --out rows.jsonl`.

A model is "right" if under two maps it computes what it computes by rows (`by_rows.py`), and the same however a text is
read: at once, in chunks, token by token, with a static cache, in a padded batch; if a text inside the neighbor window
gives what it gives unmodified; and if `restore` leaves the model as it was, to the bit. What the unmodified model does
not do itself (some have no static cache, or read padding) is not asked of it, and the row says so.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import fnmatch
import inspect
import io
import json
import logging
import math
import os
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import transformers
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache

import ropewalk
from ropewalk import DualChunk, Identity, PositionMap, SelfExtend, UnsupportedModelError
from ropewalk.integrations.transformers import functions
from ropewalk.ops import implementations
from ropewalk.ops.call import Call
from ropewalk.testing.by_rows import NotComputableError, held_frequencies, logits_by_rows, output_of
from ropewalk.testing.models import VOCABULARY
from ropewalk.testing.zoo import ZOO, Entry

Outcome = Literal["right", "unchecked", "wrong", "refused", "crashed", "not made"]

_Result = TypeVar("_Result")

WINDOW = 64
TOKENS = 120
SHORT = 16  # inside the near band of both maps
MAPS: tuple[PositionMap, ...] = (SelfExtend(4, 16), DualChunk(24, 8))

# In units of the logits' standard deviation, which is about 1. In float64 what remains is rounding of float32 inside
# the models: of angles (a millionth of a turn), and of what they compute in float32 themselves, made larger by two
# layers of sharp attention. A key at a wrong position costs a tenth and more.
TOLERANCE = 3e-4
# Below this a map changes nothing that could be checked.
EFFECT = 1e-2

_DISABLE = "sliding_window='disable'"
# Chunks end before, at and after the edges of windows, groups and chunks of the maps. Some models read several tokens
# at once only where nothing was read before.
_CHUNKS = (1, 1, 37, 1, 56, 24)
_TOKENS = (88, *32 * (1,))
_STATIC = (97, *23 * (1,))
_PADDING = 31


@dataclass
class Row:
    """What became of one model.

    Attributes:
        name: its name in the zoo.
        model_type: transformers' name of the architecture.
        family: "causal", "vision-language", "variant" or "encoder".
        positions: the rotary embeddings that were found, in words.
        outcome: "right"; "unchecked", where all is right but cannot be computed by rows, and the message says why;
            "wrong", where a check failed; "refused" by a reason; "crashed", where something else was
            raised; "not made", where the zoo itself does not know how to make or run the model.
        message: the refusal, the failed check, or the exception and where it was raised.
        error: the largest difference of all checks, in standard deviations of the logits.
        effect: what the less visible of the two maps changes, likewise.
        checks: what was done, with its largest difference; text says why it was not asked.
        implementations: those that take every call of the model in half precision, were it on a device of theirs.
        window: whether sliding windows had to be disabled.
        dtype: what it was computed in.
        transformers: version.
        seconds: that all took.
    """

    name: str
    model_type: str
    family: str
    positions: str = ""
    outcome: Outcome = "right"
    message: str = ""
    error: float = 0.0
    effect: float | None = None
    checks: dict[str, float | str] = field(default_factory=dict)
    implementations: list[str] = field(default_factory=list)
    window: Literal["keep", "disable"] = "keep"
    dtype: str = "float64"
    transformers: str = transformers.__version__
    seconds: float = 0.0


class _CheckError(Exception):
    """A check that failed."""


class _RefusedError(Exception):
    """What `extend` said instead of extending. The same at a forward pass comes too late, and is a crash."""


def examine(name: str) -> Row:
    """All checks of one model of the zoo; raises nothing."""
    entry, begin = ZOO[name], time.perf_counter()
    row = Row(name, entry.model_type, entry.family)
    with _quiet(), torch.no_grad():
        try:
            _Examination(entry, row).run()
        except _CheckError as problem:
            row.outcome, row.message = "wrong", str(problem)
        except _RefusedError as refusal:
            row.outcome, row.message = "refused", str(refusal)
        except Exception as error:  # whatever a model does
            row.outcome, row.message = "not made" if row.outcome == "not made" else "crashed", _where(error)
            if entry.grid and "position_ids have axes" in str(error):
                # Said before anything is computed.
                row.outcome, row.message = "refused", str(error)
    row.seconds = round(time.perf_counter() - begin, 2)
    return row


class _Examination:
    def __init__(self, entry: Entry, row: Row) -> None:
        self.entry, self.row = entry, row
        self.ids = _text(TOKENS)
        self.positions = None if entry.grid is None else around(entry.grid)

    def run(self) -> None:
        row = self.row
        row.outcome = "not made"
        model, self.build = self._make()
        row.outcome = "right"
        for position_map in MAPS:
            self._check_map(model, position_map)

    def _make(self) -> tuple[PreTrainedModel, Callable[..., PreTrainedModel]]:
        """The model, in float64 if it computes in that, and how it was made."""
        ids = _text(SHORT)
        for dtype in (torch.float64, torch.float32):

            def build(window: int, dtype: torch.dtype = dtype) -> PreTrainedModel:
                model = self.entry.tiny.build(window, dtype=dtype)
                if getattr(model.config.get_text_config(), "attn_logit_softcapping", None):
                    model.set_attn_implementation("eager")  # "sdpa" has no softcap, and transformers 5.17 chose it
                return model

            try:
                model = build(WINDOW)
                _logits(model, ids)
            except Exception:
                if dtype == torch.float32:
                    raise
            else:
                self.row.dtype = str(dtype).removeprefix("torch.")
                return model, build
        raise AssertionError  # the last one returned or raised

    def _check_map(self, model: PreTrainedModel, position_map: PositionMap) -> None:
        row, short = self.row, self._part(slice(0, SHORT))
        before, short_before = _state(model), _logits(model, **short)
        handle = self._extend(model, position_map)
        row.positions = "; ".join(handle.rotary)
        with _implementations() as row.implementations:
            full = self._full(model)
        self._scale = float(full.std())
        self._compare("short text = unmodified", _logits(model, **short), short_before)
        self._compare_with_rows(full, position_map)
        ways: dict[str, Callable[[PreTrainedModel], tuple[Tensor, Tensor]]] = {
            "chunks": lambda m: (self._in_parts(m, _CHUNKS), self._full(m)),
            "token by token": lambda m: (self._in_parts(m, _TOKENS), self._full(m)),
            "static cache": lambda m: (
                self._in_parts(m, _STATIC, StaticCache(config=m.config, max_cache_len=TOKENS + 8)),
                self._full(m),
            ),
        }
        if self.positions is None:
            ways["padded batch"] = self._padded
        for name, way in ways.items():
            self._same(name, way, model)
        ropewalk.restore(model)
        if _state(model) != before:
            raise _CheckError("restore: attributes are left on the model")
        if not torch.equal(_logits(model, **short), short_before):
            raise _CheckError("restore: the logits of a text differ from those before")
        row.checks["restore"] = 0.0

    def _part(self, part: slice) -> dict[str, Tensor]:
        """Some tokens, and what a model is given beside them: an image with the first, and always what all tokens up to
        these see of it."""
        beside = {} if self.entry.beside is None else self.entry.beside(TOKENS)
        of_tokens = {name: x[:, : part.stop] for name, x in beside.items() if x.shape[1] == TOKENS}
        return {"input_ids": self.ids[:, part], **({} if part.start else beside), **of_tokens}

    def _full(self, model: PreTrainedModel) -> Tensor:
        where = {} if self.positions is None else {"position_ids": self.positions[:, None]}
        return _logits(model, **self._part(slice(0, TOKENS)), **where)

    def _in_parts(self, model: PreTrainedModel, sizes: tuple[int, ...], cache: Any = None) -> Tensor:
        """Read in parts, as `generate` does, into a dynamic cache if none is given."""
        cache = _dynamic_cache(model) if cache is None else cache
        positions = torch.arange(TOKENS)[None] if self.positions is None else self.positions[:, None]
        outputs, begin = [], 0
        for size in sizes:
            part = slice(begin, begin + size)
            where = {"position_ids": positions[..., part]} if _takes_positions(model) else {}
            result = model(**self._part(part), past_key_values=cache, use_cache=True, **where)
            outputs.append(output_of(result))
            cache, begin = getattr(result, "past_key_values", cache), begin + size
        return torch.cat(outputs, dim=1)

    def _padded(self, model: PreTrainedModel) -> tuple[Tensor, Tensor]:
        """A text that is padded on the left in a batch, and alone."""
        long, other = self._part(slice(0, TOKENS)), _text(TOKENS - _PADDING, seed=1)
        short = {**long, "input_ids": other}
        short |= {name: x[:, _PADDING:] for name, x in long.items() if x.shape[1] == TOKENS and name != "input_ids"}
        mask = torch.ones(2, TOKENS, dtype=torch.long)
        mask[1, :_PADDING] = 0
        batch = {name: torch.cat((x, _after_padding(short[name], x.shape[1]))) for name, x in long.items()}
        given = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
        if not _takes_positions(model):
            del given["position_ids"]
        together = _logits(model, **batch, **given)
        alone = torch.cat((_logits(model, **long), _logits(model, **short)), dim=1)
        return torch.cat((together[0], together[1, _PADDING:])), alone[0]

    def _extend(self, model: PreTrainedModel, position_map: PositionMap) -> ropewalk.Extension:
        before = _state(model)
        try:
            return ropewalk.extend(model, position_map, trained_window=WINDOW, sliding_window=self.row.window)
        except UnsupportedModelError as refusal:
            if _state(model) != before:
                raise _CheckError(f"refused, and attributes are left on the model: {refusal}") from refusal
            if self.row.window == "disable" or _DISABLE not in str(refusal):
                raise _RefusedError(str(refusal)) from refusal
        self.row.window = "disable"
        return self._extend(model, position_map)

    def _compare_with_rows(self, full: Tensor, position_map: PositionMap) -> None:
        kind = type(position_map).__name__
        try:
            by_rows = self._by_rows(position_map)
        except NotComputableError as reason:
            self.row.outcome, self.row.message = "unchecked", f"no independent check: {reason}"
            return
        self._compare("computed by rows", full, by_rows, f" under {kind}")
        effect = self._difference(full, self._by_rows(Identity()))
        self.row.effect = effect if self.row.effect is None else min(effect, self.row.effect)
        if effect < EFFECT:
            raise _CheckError(f"{kind} changes nothing on this model")

    def _by_rows(self, position_map: PositionMap) -> Tensor:
        everywhere = self.row.window == "disable"
        beside = {name: x for name, x in self._part(slice(0, TOKENS)).items() if name != "input_ids"}
        return self._of_unmodified(
            lambda model: logits_by_rows(model, self.ids, position_map, everywhere, self.positions, beside)
        )

    def _of_unmodified(self, compute: Callable[[PreTrainedModel], _Result]) -> _Result:
        """Something of the unmodified model, with the frequencies of its trained window.

        Raises:
            NotComputableError: it raises something itself.
        """
        # Some have a table of positions that ends with the trained window: texts past it need a longer one.
        for window in (WINDOW, 4 * WINDOW):
            model = self.build(window)
            try:
                with held_frequencies(model):
                    return compute(model)
            except NotComputableError:
                raise
            except Exception as error:
                problem = error
        raise NotComputableError(f"the unmodified model raises {_where(problem)}") from problem

    def _same(self, name: str, way: Callable[[PreTrainedModel], tuple[Tensor, Tensor]], model: PreTrainedModel) -> None:
        """Two ways to read a text agree, if they do on the unmodified model."""
        if isinstance(self.row.checks.get(name), str):
            return
        try:
            error, problem = self._difference(*way(model)), None
        except Exception as raised:
            error, problem = math.nan, raised
        if error < TOLERANCE:
            self._record(name, error)
            return
        try:
            own = self._of_unmodified(lambda unmodified: self._difference(*way(unmodified)))
        except NotComputableError as reason:
            self.row.checks[name] = f"not asked: {reason}"
            return
        if problem is not None:
            raise problem
        if not error < 4 * own:
            raise _CheckError(f"{name}: off by {error:.2g} standard deviations")
        self.row.checks[name] = f"not asked: it is off by {own:.1g} in the unmodified model"

    def _compare(self, name: str, actual: Tensor, expected: Tensor, how: str = "") -> None:
        error = self._difference(actual, expected)
        if not error < TOLERANCE:  # a nan too
            raise _CheckError(f"{name}{how}: off by {error:.2g} standard deviations")
        self._record(name, error)

    def _difference(self, actual: Tensor, expected: Tensor) -> float:
        return float((actual - expected).abs().max()) / self._scale

    def _record(self, name: str, error: float) -> None:
        known = self.row.checks.get(name, 0.0)
        self.row.checks[name] = max(error, known if isinstance(known, float) else 0.0)
        self.row.error = max(error, self.row.error)


@contextlib.contextmanager
def _implementations() -> Iterator[list[str]]:
    """Names of those that take all calls that are made until the context ends."""
    place: Any = functions
    choose, found = place.choose, [name for name in implementations.IMPLEMENTATIONS if name != "reference"]

    def look(call: Call, impl: implementations.Implementation) -> str:
        half = dataclasses.replace(
            call, query=call.query.bfloat16(), key=call.key.bfloat16(), value=call.value.bfloat16(), far_keys=None
        )
        found[:] = [name for name in found if implementations.module(name).lacks(half) is None]
        return str(choose(call, impl))

    own = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"  # what the kernels take is asked, and nothing computed
    place.choose = look
    try:
        yield found
    finally:
        place.choose = choose
        if own is None:
            del os.environ["TRITON_INTERPRET"]
        else:
            os.environ["TRITON_INTERPRET"] = own


def around(grid: tuple[int, int, int]) -> Tensor:
    """Positions of a text with a picture in it, (axes, TOKENS), as in Qwen2-VL (arXiv 2409.12191, 2.1)."""
    before = 10
    axes = torch.meshgrid(*map(torch.arange, grid), indexing="ij")
    picture = torch.stack([axis.flatten() for axis in axes]) + before
    after = torch.arange(TOKENS - before - picture.shape[1]) + int(picture.max()) + 1
    return torch.cat((torch.arange(before).expand(3, -1), picture, after.expand(3, -1)), dim=1)


def _text(tokens: int, seed: int = 0) -> Tensor:
    """Token ids, without the padding token 0."""
    return torch.randint(1, VOCABULARY - 8, (1, tokens), generator=torch.Generator().manual_seed(seed))


def _logits(model: PreTrainedModel, input_ids: Tensor, **arguments: Any) -> Tensor:
    more = {"decoder_input_ids": input_ids} if model.config.is_encoder_decoder else {}
    return output_of(model(input_ids=input_ids, **more, **arguments))


def _dynamic_cache(model: PreTrainedModel) -> DynamicCache | None:
    """None, with which a model makes one, where that is of a kind of its own."""
    made = getattr(model(input_ids=_text(1), use_cache=True), "past_key_values", None)
    return DynamicCache(config=model.config) if made is None or type(made) is DynamicCache else None


def _takes_positions(model: PreTrainedModel) -> bool:
    """ALiBi counts the tokens instead."""
    return "position_ids" in inspect.signature(model.forward).parameters


def _after_padding(x: Tensor, length: int) -> Tensor:
    """With zeros before it along the second dimension, to a length."""
    return torch.cat((x.new_zeros((len(x), length - x.shape[1], *x.shape[2:])), x), dim=1)


def _state(model: PreTrainedModel) -> list[Any]:
    """What `restore` must put back: attributes by identity, hooks by number, configurations by content."""
    return [
        *((name, key, id(value)) for name, module in model.named_modules() for key, value in vars(module).items()),
        *((name, len(module._forward_pre_hooks), len(module._forward_hooks)) for name, module in model.named_modules()),
        model.config.to_dict(),
        model.config._attn_implementation,
    ]


def _where(error: Exception) -> str:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    text = " ".join(str(error).split())
    return f"{type(error).__name__} in {frame.name} ({Path(frame.filename).name}:{frame.lineno}): {text[:300]}"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what models say and warn of while they are made."""
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity(logging.ERROR)
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
        transformers.logging.set_verbosity(level)


def main(arguments: list[str] | None = None) -> int:
    """Examines the models whose names match, and writes a row each."""
    parser = argparse.ArgumentParser(prog="python -m ropewalk.testing.matrix", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=["*"], help="names of models, or patterns (default: all)")
    parser.add_argument("--out", type=Path, help="file for the rows, a JSON object a line (default: standard output)")
    options = parser.parse_args(arguments)
    names = [name for name in ZOO if any(fnmatch.fnmatch(name, pattern) for pattern in options.names)]
    if not names:
        parser.error(f"no model is called {' or '.join(options.names)}; there are {', '.join(ZOO)}")
    torch.set_num_threads(1)
    counts: Counter[str] = Counter()
    with options.out.open("w") if options.out else contextlib.nullcontext(sys.stdout) as file:
        for name in names:
            row = examine(name)
            counts[row.outcome] += 1
            print(json.dumps(dataclasses.asdict(row)), file=file, flush=True)
            if row.outcome != "right":
                print(f"{row.outcome:8} {name}: {row.message}", file=sys.stderr, flush=True)
    print(", ".join(f"{count} {outcome}" for outcome, count in counts.most_common()), file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
