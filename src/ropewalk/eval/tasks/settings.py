# SPDX-License-Identifier: Apache-2.0
"""Types of tasks' settings, which may be given as text, as an option's value is."""

from __future__ import annotations

from collections.abc import Collection
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic_core import PydanticCustomError

from ropewalk.names import as_option, did_you_mean
from ropewalk.token_counts import tokens

# Kind of an error of ours, which says what a setting must be and what it is.
OURS = "setting"
_MOST_DEPTHS = 1000


def refused(expected: str, given: object, hint: str = "") -> PydanticCustomError:
    """An error of a validator: what a setting must be, as in "must be a number"."""
    return PydanticCustomError(OURS, "{text}", {"text": f"{expected}, got {given!r}{hint}"})


def no_effect(name: str, why: str) -> PydanticCustomError:
    """An error of a setting that was given and changes nothing, beside others as options are written."""
    text = f"{as_option(name)} has no effect with {why}: leave it out, or change that"
    return PydanticCustomError(OURS, "{text}", {"text": text})


def _apart(value: object) -> object:
    return [part.strip() for part in value.split(",")] if isinstance(value, str) else value


def _once(values: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(dict.fromkeys(values))


def _tokens(value: object) -> object:
    if not isinstance(value, str):
        return value
    try:
        found = tokens(value)
    except ValueError:
        found = 0
    if found < 1:
        raise refused("must be whole numbers such as 4096 or 16k", value)
    return found


def _depths(value: object) -> object:
    """Numbers from 0 to 1, or of how many, evenly spread, there are to be."""
    if not isinstance(value, str):
        return value
    try:
        depths = [float(part) for part in value.split(",")]
    except ValueError:
        depths = []
    if value.strip().isdecimal() and depths[0] > 1:
        if depths[0] > _MOST_DEPTHS:
            raise refused(f"must be numbers from 0 to 1, or how many there are, up to {_MOST_DEPTHS}", value)
        return evenly(int(value))
    if not depths or not all(0 <= depth <= 1 for depth in depths):
        raise refused("must be numbers from 0 to 1, or how many there are", value)
    return depths


def evenly(count: int) -> tuple[float, ...]:
    """So many depths from 0 to 1."""
    return tuple(i / (count - 1) for i in range(count))


# With words for what most tasks mean by them.
Tokens = Annotated[int, BeforeValidator(_tokens), Field(ge=1)]  # "16k"
Lengths = Annotated[  # "4k,8k"
    tuple[Tokens, ...],
    BeforeValidator(_apart),
    AfterValidator(_once),
    Field(min_length=1, description="Tokens of the prompts, comma-separated; 16k is 16384."),
]
Depths = Annotated[  # "10", "0.1,0.5"
    tuple[Annotated[float, Field(ge=0, le=1)], ...],
    BeforeValidator(_depths),
    Field(min_length=1, description="Where it is hidden, from 0 to 1, comma-separated; or a number of depths."),
]
NewTokens = Annotated[  # "8k"
    Tokens | None,
    Field(
        description="Tokens of an answer, at most; if not given, as few as the paper or the benchmark allows. A model "
        "that thinks first needs thousands."
    ),
]
Chat = Annotated[bool, Field(description="Ask as a message where the model has a chat template.")]
Names = Annotated[tuple[str, ...], BeforeValidator(_apart)]  # "qasper,trec"


def among(known: Collection[str]) -> AfterValidator:
    """Of `Names`, for `Annotated`: each is one of these, and they come once and in this order."""

    def each_once(names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            if name not in known:
                hint = did_you_mean(name, known)
                raise refused(f"must be one of {', '.join(known)}", name, f".{hint}" if hint else "")
        return tuple(name for name in known if name in names)

    return AfterValidator(each_once)


def written(value: object) -> str:
    """A setting as an option's value."""
    if isinstance(value, tuple):
        depths = len(value) > 1 and value == evenly(len(value))
        return str(len(value)) if depths else ",".join(map(written, value))
    return str(value)


def folder_of_data(holds: str) -> Any:
    """The field `data_dir` of a task that reads data, from a folder that holds such files."""
    return Field(None, description=f"Folder that holds {holds}. Without one they are loaded from the hub.")
