# SPDX-License-Identifier: Apache-2.0
"""The options that choose and load a model, shared by every command that runs one; and how such a command behaves."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Annotated, get_args

import typer

from ropewalk.cli.errors import UserError, did_you_mean
from ropewalk.cli.token_options import token_option
from ropewalk.files import shown
from ropewalk.integrations.transformers.models import Device, Dtype, LoadedModel, load
from ropewalk.integrations.transformers.quiet import quiet
from ropewalk.integrations.transformers.sources import ModelError, Source, find
from ropewalk.maps.query_scaling import QueryScalingKind

if TYPE_CHECKING:
    from ropewalk import Extension, PositionMap

_PANEL = "Model"
_SLIDING_WINDOW = ("keep", "disable")
_QUERY_SCALING = get_args(QueryScalingKind)

ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model",
        help="A folder, a GGUF file or a name on the hub. \\[default: the embedded SmolLM2-135M-Instruct]",
        metavar="MODEL",
        rich_help_panel=_PANEL,
    ),
]
DtypeOption = Annotated[
    str,
    typer.Option(
        help="Of the weights; auto is bfloat16 where the device computes in it.",
        metavar="|".join(get_args(Dtype)),
        rich_help_panel=_PANEL,
    ),
]
DeviceOption = Annotated[
    str,
    typer.Option(
        help="auto is CUDA where there is a device.", metavar="|".join(get_args(Device)), rich_help_panel=_PANEL
    ),
]
TrainedWindowOption = Annotated[
    int | None,
    token_option(
        help="Tokens that the model was trained on. \\[default: what its configuration says]", rich_help_panel=_PANEL
    ),
]
SlidingWindowOption = Annotated[
    str,
    typer.Option(
        help="What becomes of layers with a sliding window: left alone, or extended like the others.",
        metavar="|".join(_SLIDING_WINDOW),
        rich_help_panel=_PANEL,
    ),
]
QueryScalingOption = Annotated[
    str | None,
    typer.Option(
        help="Scale the queries past the trained window.", metavar="|".join(_QUERY_SCALING), rich_help_panel=_PANEL
    ),
]
TrustRemoteCodeOption = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run code that the model brings along.", rich_help_panel=_PANEL)
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
VerboseOption = Annotated[
    bool, typer.Option("--verbose", help="Say what was done to the model, and let transformers speak.")
]


def choice(option: str, value: str, choices: Iterable[str]) -> None:
    """Refuses a value that is none of the choices.

    Raises:
        UserError: with a suggestion where one resembles it.
    """
    choices = list(choices)
    if value not in choices:
        raise UserError(f"{option} must be one of {', '.join(choices)}, got {value!r}.{did_you_mean(value, choices)}")


def check(dtype: str, device: str, sliding_window: str = "keep", query_scaling: str | None = None) -> None:
    """Refuses values that no model could be loaded or extended with.

    Raises:
        UserError: one of them.
    """
    choice("--dtype", dtype, get_args(Dtype))
    choice("--device", device, get_args(Device))
    choice("--sliding-window", sliding_window, _SLIDING_WINDOW)
    if query_scaling is not None:
        choice("--query-scaling", query_scaling, _QUERY_SCALING)


def find_model(model: str | None) -> Source:
    """Finds a model, with its errors as the user's."""
    try:
        return find(model)
    except ModelError as error:
        raise UserError(str(error)) from error


def load_model(source: Source, dtype: str, device: str, trust_remote_code: bool, verbose: bool) -> LoadedModel:
    """Loads a model, with its errors as the user's; says on stderr that it takes a while."""
    print(f"Loading {shown(source.name)} ...", file=sys.stderr, flush=True)
    try:
        return load(source, dtype, device, trust_remote_code, show_progress=verbose)  # type: ignore[arg-type]
    except ModelError as error:
        raise UserError(str(error)) from error


def window_of(loaded: LoadedModel, given: int | None) -> int:
    """The trained window: the one given, or what the model's configuration says.

    Raises:
        UserError: neither is known.
    """
    window = given if given is not None else loaded.trained_window
    if window is None:
        raise UserError(f"{loaded.source.name} does not say how long its training window was: pass --trained-window")
    return window


@contextmanager
def extended(
    loaded: LoadedModel,
    position_map: PositionMap,
    length: int,
    trained_window: int,
    sliding_window: str = "keep",
    query_scaling: str | None = None,
) -> Iterator[Extension]:
    """The model under a map that must reach `length` tokens, and then as it was; warnings in one line on stderr.

    Raises:
        UserError: the model cannot be extended, or not that far.
    """
    from ropewalk import LengthError, UnsupportedModelError, extend

    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            extension = extend(
                loaded.model,
                position_map,
                target_length=length,
                trained_window=trained_window,
                sliding_window=sliding_window,  # type: ignore[arg-type]
                query_scaling=query_scaling,  # type: ignore[arg-type]
            )
    except (LengthError, UnsupportedModelError) as error:
        raise UserError(str(error).replace("sliding_window='disable'", "--sliding-window disable")) from error
    for warning in caught:
        print(f"warning: {' '.join(str(warning.message).split())}", file=sys.stderr)
    with extension:
        yield extension


@contextmanager
def running(verbose: bool) -> Iterator[None]:
    """A command that runs a model: other packages' warnings and advice only if `verbose`; Ctrl-C ends it with exit
    code 130."""
    try:
        with nullcontext() if verbose else quiet():
            yield
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        raise typer.Exit(130) from None
