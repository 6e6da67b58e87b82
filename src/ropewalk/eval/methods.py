# SPDX-License-Identifier: Apache-2.0
"""The ways to run a model that an evaluation compares, each with a name that says all of it.

unmodified                               the model as it is
unmodified(sliding_window='disable')     all of whose layers see all tokens, however long the text
selfextend(group_size=8, window=1024)    under a position map
linear(factor=4.0)                       with scaled rotary frequencies
infinite(window=1024)                    block by block
selfextend                               with what is recommended for the longest text; so for every name
selfextend(sliding_window='disable')     as ropewalk.extend has it; query_scaling='log-n' likewise

A sweep is a method for each combination of several values: selfextend(group_size={4, 8}, window={512, 1024}).
"""

from __future__ import annotations

import ast
import dataclasses
import re
from collections import ChainMap, Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from itertools import product
from typing import TYPE_CHECKING, Any

from ropewalk.eval.scalings import SCALINGS, RopeScaling
from ropewalk.maps import MAPS, Identity, PositionMap
from ropewalk.maps.edges import PAST_QUERY
from ropewalk.maps.query_scaling import QueryScaling, QueryScalingKind
from ropewalk.names import did_you_mean, unknown
from ropewalk.presets import Preset, SlidingWindowChoice, check_sliding_window

if TYPE_CHECKING:
    from transformers import PreTrainedModel

UNMODIFIED = "unmodified"
# More than any text has: the positions of a model that is not extended go on.
_NO_END = 1 << 30

# What a method does to a model.
Change = PositionMap | RopeScaling

# How any map is put under a model, if nothing else is said; parameters of a map that are called so are its own.
_HOW: dict[str, Any] = {"sliding_window": "keep", "query_scaling": None}

# Not copied out of `MAPS`: packages that bring a map are asked for it when it is named.
CHANGES: Mapping[str, type[Change]] = ChainMap({kind.name: kind for kind in SCALINGS}, MAPS)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Method:
    """A way to run a model.

    Attributes:
        name: complete: `parse` gives the same method for it.
        change: None for the model as it is.
        sliding_window: of a position map, or of the model as it is: as in `ropewalk.extend`.
        query_scaling: of a position map, likewise.
        swept: whether it was named as a part of a sweep.
    """

    name: str
    change: Change | None = None
    sliding_window: SlidingWindowChoice = "keep"
    query_scaling: QueryScalingKind | None = None
    swept: bool = field(default=False, compare=False)

    def falls_short(self, longest: int, trained_window: int) -> str:
        """Why it does not reach a text of `longest` tokens (eq. 4); empty where it does."""
        if not isinstance(self.change, PositionMap) or longest <= (reach := self.change.max_length(trained_window)):
            return ""
        return (
            f"method {self.name} reaches {reach} tokens on a trained window of {trained_window} (eq. 4), and the "
            f"longest text with its answer has {longest}"
        )

    def changes_nothing(self, longest: int, trained_window: int) -> bool:
        """Whether the model reads all texts of up to `longest` tokens as it is: a map whose far keys are farther than
        those have any, as one that is chosen for texts inside the trained window, or a factor of 1."""
        change = self.change
        if change is None or self.sliding_window != "keep" or (self.query_scaling and longest > trained_window):
            return False
        if not isinstance(change, PositionMap):
            return change.factor == 1
        nearest = change.bands[0]
        # No query up to the last one sees a key but through the nearest band, and it sees all.
        sees_all = nearest.is_true and nearest.high == PAST_QUERY and nearest.low(longest - 1) == 0
        return sees_all or longest <= change.start

    def enter(self, model: PreTrainedModel, trained_window: int) -> AbstractContextManager[object]:
        """The model under this method, until the context ends.

        Raises:
            UnsupportedModelError: the method does not take the model.
        """
        if self.change is None and self.sliding_window == "keep":
            return nullcontext()
        if self.change is None or isinstance(self.change, PositionMap):
            from ropewalk.integrations.transformers.extend import extend

            return extend(
                model,
                self.change or Identity(),
                trained_window=trained_window if self.change else _NO_END,
                sliding_window=self.sliding_window,
                query_scaling=self.query_scaling,
            )
        from ropewalk.integrations.transformers.rope_scaling import scaled

        return scaled(model, self.change.name, self.change.factor, trained_window)


def of_preset(preset: Preset, longest: int, trained_window: int) -> Method:
    """What a preset says, for texts of `longest` tokens; see `Preset.map_for`.

    Raises:
        LengthError: no map of its kind reaches that far.
    """
    return _of_map(preset.map_for(longest, trained_window), preset.sliding_window, preset.query_scaling)


def parse(text: str, longest: int, trained_window: int) -> Method:
    """The method that a text means; `parse_all` for texts that may be sweeps.

    Args:
        text: a name, or a name with parameters as Python writes them.
        longest: tokens of the longest text, for a method without parameters.
        trained_window: of the model, likewise.

    Raises:
        ValueError: there is no such method, a parameter does not fit, or it is a sweep.
    """
    method, *others = parse_all([text], longest, trained_window)
    if others:
        raise ValueError(f"{text!r} is a sweep of {1 + len(others)} methods, and one is expected")
    return method


def parse_all(texts: Iterable[str], longest: int, trained_window: int) -> list[Method]:
    """The methods that texts mean, in their order and each once; of a sweep all combinations, the last parameter
    changing fastest.

    Args:
        texts: as `parse` takes them, where a set {4, 8} for a parameter stands for each of its values.

    Raises:
        ValueError: as of `parse`, for any combination.
    """
    found: dict[str, Method] = {}
    for text in texts:
        name, choices, swept = _taken_apart(text)
        for values in product(*choices.values()):
            method = _method(name, dict(zip(choices, values, strict=True)), longest, trained_window)
            found.setdefault(method.name, replace(method, swept=swept))
    return list(found.values())


def _method(name: str, parameters: dict[str, Any], longest: int, trained_window: int) -> Method:
    if name != UNMODIFIED and name not in CHANGES:
        raise ValueError(unknown("method", name, [UNMODIFIED, *CHANGES]))
    kind = CHANGES[name] if name != UNMODIFIED else None
    own = dataclasses.fields(kind) if kind else ()
    how = {"sliding_window"} if kind is None else set()
    if kind and issubclass(kind, PositionMap):
        how = _HOW.keys() - {field.name for field in own}
    shape = {key: value for key, value in parameters.items() if key not in how}
    _check_names(name, own, parameters, how)
    try:
        if kind is None:
            return _of_map(None, **{**_HOW, **parameters})
        change = kind(**shape) if shape else kind.for_length(longest, trained_window)
        if not isinstance(change, PositionMap):
            return Method(_name_of(change), change)
        chosen = {**_HOW, **{key: value for key, value in parameters.items() if key in how}}
        if chosen["query_scaling"] is not None:
            QueryScaling(chosen["query_scaling"], trained_window)
        return _of_map(change, **chosen)
    except (TypeError, ValueError) as error:
        raise ValueError(f"method {_written(name, parameters)}: {error}") from error


def _of_map(
    position_map: PositionMap | None, sliding_window: SlidingWindowChoice, query_scaling: QueryScalingKind | None
) -> Method:
    check_sliding_window(sliding_window)
    how = {"sliding_window": sliding_window, "query_scaling": query_scaling}
    told = {key: value for key, value in how.items() if value != _HOW[key]}
    return Method(_name_of(position_map, told), position_map, sliding_window, query_scaling)


def _check_names(
    name: str, known: Sequence[dataclasses.Field[Any]], given: dict[str, Any], more: Collection[str]
) -> None:
    """Raises ValueError: a parameter is not of this method or one `more`, or one that it needs is missing."""
    names, written = [*(field.name for field in known), *sorted(more)], _written(name, given)
    for one in given:
        if one not in names:
            those = f"Its parameters are {', '.join(names)}" if names else "It has none"
            raise ValueError(f"method {written}: there is no parameter {one!r}.{did_you_mean(one, names)} {those}")
    needed = [field.name for field in known if dataclasses.MISSING is field.default is field.default_factory]
    missing = [one for one in needed if one not in given]
    if missing and given.keys() - more:
        raise ValueError(f"method {written}: it needs {' and '.join(missing)} too, or no parameter at all")


def _name_of(change: Change | None, how: Mapping[str, Any] | None = None) -> str:
    parameters = dataclasses.asdict(change) if change else {}
    if not parameters.get("start"):
        parameters.pop("start", None)
    return _written(change.name if change else UNMODIFIED, {**parameters, **(how or {})})


def _written(name: str, parameters: dict[str, Any]) -> str:
    return f"{name}({', '.join(f'{key}={value!r}' for key, value in parameters.items())})" if parameters else name


def _taken_apart(text: str) -> tuple[str, dict[str, list[Any]], bool]:
    """A name, the values of each of its parameters, which are literals: nothing is executed; and whether there is a set
    among them."""
    found = re.fullmatch(r"([a-z][a-z0-9-]*)(?:\((.*)\))?", text.strip())
    parameters, swept = None, False
    if found:
        try:
            call = ast.parse(f"f({found[2] or ''})", mode="eval").body
            if isinstance(call, ast.Call) and not call.args and all(word.arg for word in call.keywords):
                parameters = [(str(word.arg), _values(word.value)) for word in call.keywords]
                swept = any(isinstance(word.value, ast.Set) for word in call.keywords)
        except (SyntaxError, ValueError):
            pass
    if found and parameters is not None:
        twice = [name for name, count in Counter(name for name, _ in parameters).items() if count > 1]
        if twice:
            raise ValueError(f"{text!r} gives {' and '.join(twice)} more than once: write a set such as {{4, 8}}")
        return found[1], dict(parameters), swept
    raise ValueError(
        "a method is a name, or a name with parameters such as selfextend(group_size=8, window=1024), each of which "
        f"may be a set of values such as {{4, 8}}: got {text!r}"
    )


def _values(written: ast.expr) -> list[Any]:
    """Of a parameter, in the order in which they are written. Raises ValueError: it is no literal, or none."""
    if isinstance(written, ast.Set):
        return [ast.literal_eval(one) for one in written.elts]
    value = ast.literal_eval(written)
    if value == {}:
        raise ValueError("a set without values")
    return [value]
