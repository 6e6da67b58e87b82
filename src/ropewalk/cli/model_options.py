# SPDX-License-Identifier: Apache-2.0
"""The options that choose and load a model, shared by every command that runs one; and how such a command behaves."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from ropewalk.cli.errors import UserError, did_you_mean
from ropewalk.cli.map_options import MapOptions
from ropewalk.cli.token_options import token_option
from ropewalk.files import shown
from ropewalk.integrations.transformers.models import Device, Dtype, LoadedModel, load
from ropewalk.integrations.transformers.quiet import quiet
from ropewalk.integrations.transformers.sources import ModelError, Source, find
from ropewalk.maps.query_scaling import QueryScalingKind
from ropewalk.presets import Preset, SlidingWindowChoice

if TYPE_CHECKING:
    from ropewalk import Extension, PositionMap

_PANEL = "Model"
_SLIDING_WINDOW = get_args(SlidingWindowChoice)
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
        help="Tokens that the model was trained on. \\[default: what its preset or configuration says]",
        rich_help_panel=_PANEL,
    ),
]
SlidingWindowOption = Annotated[
    str | None,
    typer.Option(
        help="What becomes of layers with a sliding window: left alone, or extended like the others. "
        "\\[default: what the preset says, or keep]",
        metavar="|".join(_SLIDING_WINDOW),
        rich_help_panel=_PANEL,
    ),
]
QueryScalingOption = Annotated[
    str | None,
    typer.Option(
        help="Scale the queries past the trained window. \\[default: what the preset says]",
        metavar="|".join(_QUERY_SCALING),
        rich_help_panel=_PANEL,
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


def check(dtype: str, device: str, sliding_window: str | None = None, query_scaling: str | None = None) -> None:
    """Refuses values that no model could be loaded or extended with.

    Raises:
        UserError: one of them.
    """
    choice("--dtype", dtype, get_args(Dtype))
    choice("--device", device, get_args(Device))
    if sliding_window is not None:
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


@dataclass(frozen=True)
class How:
    """How a model is to be extended: what was given, and else what its preset says.

    Attributes:
        preset: with what was given in the place of its own settings; None where none was given, and none is the
            model's.
    """

    map_options: MapOptions
    preset: Preset | None
    trained_window: int
    sliding_window: SlidingWindowChoice
    query_scaling: QueryScalingKind | None

    def choose(self, length: int) -> PositionMap:
        """The map for a text of `length` tokens: the one given, or the preset's if it reaches so far.

        Raises:
            UserError: there is none.
        """
        return replace(self.map_options, preset=self.preset).choose(length, self.trained_window)

    @contextmanager
    def extended(self, loaded: LoadedModel, position_map: PositionMap, length: int) -> Iterator[Extension]:
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
                    trained_window=self.trained_window,
                    sliding_window=self.sliding_window,
                    query_scaling=self.query_scaling,
                    preset=self.preset,
                )
        except (LengthError, UnsupportedModelError) as error:
            raise UserError(str(error).replace("sliding_window='disable'", "--sliding-window disable")) from error
        for warning in caught:
            print(f"warning: {' '.join(str(warning.message).split())}", file=sys.stderr)
        with extension:
            yield extension


def how(
    loaded: LoadedModel,
    map_options: MapOptions,
    trained_window: int | None = None,
    sliding_window: str | None = None,
    query_scaling: str | None = None,
) -> How:
    """What goes for a model: what was given, else what its preset says, else the defaults.

    Raises:
        UserError: no trained window is known, or the preset beside the model's files cannot be read.
    """
    preset = map_options.preset
    if preset is None and not map_options.given:
        from ropewalk.integrations.transformers.presets import find_preset

        try:
            preset = find_preset(loaded.model, loaded.source.gguf_file)
        except ValueError as error:
            raise UserError(str(error)) from error
    window: int = window_of(loaded, trained_window, preset)
    sliding: Any = sliding_window or (preset.sliding_window if preset else "keep")
    scaling: Any = query_scaling or (preset.query_scaling if preset else None)
    if preset is not None:
        preset = replace(preset, trained_window=window, sliding_window=sliding, query_scaling=scaling)
    return How(map_options, preset, window, sliding, scaling)


def window_of(loaded: LoadedModel, given: int | None, preset: Preset | None = None) -> int:
    """The trained window: the one given, or what the preset or the model's configuration says.

    Raises:
        UserError: none is known.
    """
    if given is None and preset is not None:
        given = preset.trained_window
    window = given if given is not None else loaded.trained_window
    if window is None:
        raise UserError(f"{loaded.source.name} does not say how long its training window was: pass --trained-window")
    return window


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
