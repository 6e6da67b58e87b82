# SPDX-License-Identifier: Apache-2.0
"""The options that `generate` and `chat` share."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from ropewalk.cli import model_options
from ropewalk.cli.documents import check_encoding
from ropewalk.cli.errors import UserError
from ropewalk.cli.map_options import MapOptions
from ropewalk.cli.paths import path
from ropewalk.cli.token_options import check_tokens, token_option

# Any length and window for which every map exists: a mistyped map is found before the model is loaded.
_ANY_LENGTH, _ANY_WINDOW = 1, 8192
# What is divided by less may be too large for a float; with so much the likeliest token is nearly always taken already.
_LEAST_TEMPERATURE = 0.001

FileOption = Annotated[
    list[str] | None,
    typer.Option("--file", help="Text to read before any question; - is standard input. May be given several times."),
]
EncodingOption = Annotated[
    str | None,
    typer.Option(help="Of the files. \\[default: UTF-8, or what a byte order mark says]", show_default=False),
]
KeepOption = Annotated[
    Path | None,
    typer.Option(
        parser=path,
        help="Keep what was read in this file; where it is there already, the text is not read again.",
        metavar="FILE",
    ),
]
AllowControlTokensOption = Annotated[
    bool,
    typer.Option(
        "--allow-control-tokens", help="Let <|im_end|> and the like in a text be control tokens instead of text."
    ),
]
TargetLengthOption = Annotated[
    int | None,
    token_option(help="Tokens that the model should reach. \\[default: the prompt's and the answer's]"),
]
MaxNewTokensOption = Annotated[int, token_option(help="Longest answer, in tokens.")]
ChunkOption = Annotated[int, token_option(help="Tokens read in one pass: fewer need less memory.")]
TemperatureOption = Annotated[float, typer.Option(help="Of the sampling; 0 always takes the likeliest token.")]
ChatTemplateOption = Annotated[
    bool | None,
    typer.Option(
        "--chat/--no-chat", help="Apply the model's chat template. \\[default: if it has one]", show_default=False
    ),
]


@dataclass(frozen=True)
class Wanted:
    """The options of a command that asks about a text; see there."""

    map_options: MapOptions
    model: str | None
    file: list[str] | None
    encoding: str | None
    keep: Path | None
    allow_control_tokens: bool
    target_length: int | None
    max_new_tokens: int
    chunk: int
    temperature: float
    chat: bool | None
    dtype: str
    device: str
    trained_window: int | None
    sliding_window: str | None
    query_scaling: str | None
    trust_remote_code: bool
    verbose: bool

    def check(self) -> None:
        """Refuses what can be known to be wrong before any file is read.

        Raises:
            UserError: an option is out of range.
        """
        model_options.check(self.dtype, self.device, self.sliding_window, self.query_scaling)
        check_tokens("--max-new-tokens", self.max_new_tokens)
        check_tokens("--chunk", self.chunk)
        for option, value in (("--target-length", self.target_length), ("--trained-window", self.trained_window)):
            if value is not None:
                check_tokens(option, value)
        if self.temperature != 0 and not _LEAST_TEMPERATURE <= self.temperature < math.inf:
            raise UserError(f"--temperature must be 0, or {_LEAST_TEMPERATURE} or more, got {self.temperature}")
        self.map_options.choose(_ANY_LENGTH, _ANY_WINDOW)
        check_encoding(self.encoding)
