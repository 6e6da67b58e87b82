"""The ways to run a model that an evaluation compares, each with a name that says all of it.

unmodified                               the model as it is
selfextend(group_size=8, window=1024)    under a position map
selfextend                               the same, with what the map recommends for the longest text
"""

from __future__ import annotations

import ast
import re
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from ropewalk.maps import MAPS, PositionMap, from_dict

if TYPE_CHECKING:
    from transformers import PreTrainedModel

UNMODIFIED = "unmodified"


@dataclass(frozen=True)
class Method:
    """A way to run a model.

    Attributes:
        name: complete: `parse` gives the same method for it.
        position_map: None for the model as it is.
    """

    name: str
    position_map: PositionMap | None = None

    def enter(self, model: PreTrainedModel, trained_window: int | None) -> AbstractContextManager[object]:
        """The model under this method, until the context ends.

        Raises:
            UnsupportedModelError: the model cannot be extended.
        """
        if self.position_map is None:
            return nullcontext()
        from ropewalk.integrations.transformers.extend import extend

        return extend(model, self.position_map, trained_window=trained_window)


def parse(text: str, longest: int, trained_window: int) -> Method:
    """The method that a text means.

    Args:
        text: a name, or a name with parameters as Python writes them.
        longest: tokens of the longest text, for a map without parameters.
        trained_window: of the model, likewise.

    Raises:
        ValueError: there is no such method, or a parameter does not fit.
    """
    name, parameters = _taken_apart(text)
    if name == UNMODIFIED and not parameters:
        return Method(UNMODIFIED)
    if name not in MAPS:
        known = [UNMODIFIED, *MAPS]
        close = get_close_matches(name, known, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"no method is called {name!r}.{hint} The methods are {', '.join(known)}")
    try:
        position_map = (
            from_dict({"map": name, **parameters}) if parameters else MAPS[name].for_length(longest, trained_window)
        )
    except TypeError as error:
        raise ValueError(f"method {text!r}: {error}") from error
    return Method(_name_of(position_map), position_map)


def _name_of(position_map: PositionMap) -> str:
    parameters = {key: value for key, value in position_map.to_dict().items() if key != "map"}
    if not parameters.get("start"):
        parameters.pop("start", None)
    return f"{position_map.name}({', '.join(f'{key}={value!r}' for key, value in parameters.items())})"


def _taken_apart(text: str) -> tuple[str, dict[str, Any]]:
    """A name and its parameters, which are literals: nothing is executed."""
    found = re.fullmatch(r"([a-z][a-z0-9-]*)(?:\((.*)\))?", text.strip())
    if found:
        try:
            call = ast.parse(f"f({found[2] or ''})", mode="eval").body
            if isinstance(call, ast.Call) and not call.args and all(word.arg for word in call.keywords):
                return found[1], {str(word.arg): ast.literal_eval(word.value) for word in call.keywords}
        except (SyntaxError, ValueError):
            pass
    raise ValueError(
        f"a method is a name, or a name with parameters such as selfextend(group_size=8, window=1024): got {text!r}"
    )
