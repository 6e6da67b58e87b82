# SPDX-License-Identifier: Apache-2.0
"""`ropewalk explain`: what a position map does to a text of a given length."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Column, Table

from ropewalk.cli.errors import UserError
from ropewalk.cli.map_options import MapOptions, with_map_options
from ropewalk.cli.paths import path
from ropewalk.cli.token_options import check_tokens, token_option
from ropewalk.explanation import BandSummary, Explanation, explain, number
from ropewalk.files import shown
from ropewalk.map_picture import PICTURE_SUFFIXES, draw

# Bands printed at most; SELF by distance has one for each group size.
_ROWS = 8


@with_map_options()
def command(
    map_options: MapOptions,
    length: Annotated[int, token_option(help="Tokens of the text.")],
    trained_window: Annotated[
        int | None, token_option(help="Tokens that the model was trained on. \\[default: what the preset says]")
    ] = None,
    picture: Annotated[
        Path | None, typer.Option(parser=path, metavar="FILE", help="Draw the map to this PNG or SVG file.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
) -> None:
    """Show what a position map does to a text: its bands, the positions used, the longest texts, and a picture.

    Without parameters of the map, those that its paper's rule gives for the length are taken.
    """
    if picture is not None and picture.suffix.lower() not in PICTURE_SUFFIXES:
        raise UserError(f"--picture must end in {' or '.join(PICTURE_SUFFIXES)}, got {str(picture)!r}")
    if trained_window is None:
        if map_options.preset is None:
            raise UserError(
                "pass --trained-window, the tokens that the model was trained on, or a --preset that says it"
            )
        trained_window = map_options.preset.trained_window
    check_tokens("--trained-window", trained_window)
    check_tokens("--length", length)
    explanation = explain(map_options.choose(length, trained_window), trained_window, length)
    if picture is not None:
        draw(explanation, picture)
    if as_json:
        drawn = {"picture": str(picture)} if picture is not None else {}
        print(json.dumps({**explanation.to_dict(), **drawn}, indent=2))
    else:
        _print(explanation, picture)


def _print(explanation: Explanation, picture: Path | None) -> None:
    console = Console(highlight=False, markup=False, emoji=False)
    console.print(str(explanation.position_map), style="bold")
    console.print()
    console.print(_bands(explanation.bands))
    console.print()
    window = number(explanation.trained_window)
    for label, value in (
        ("tokens of the text", number(explanation.length)),
        ("highest relative position", f"{number(explanation.largest_relative_position)} (trained window: {window})"),
        ("longest text (eq. 4)", number(explanation.max_length)),
        ("recommended up to (eq. 5)", number(explanation.recommended_length)),
    ):
        console.print(f"{label:<27}{value}", soft_wrap=True)
    console.print()
    console.print(explanation.advice)
    if picture is not None:
        console.print(f"\nPicture: {shown(picture)}", soft_wrap=True)


def _bands(bands: tuple[BandSummary, ...]) -> Table:
    by_distance = all(band.first is not None for band in bands)
    heads = ("distance m - n" if by_distance else "keys n of query m", "query m at", "key n at")
    # On a narrow terminal nothing is cut off.
    table = Table(*(Column(head, overflow="fold") for head in heads))
    hidden = len(bands) - _ROWS
    for index, band in enumerate(bands):
        if hidden > 0 and index == _ROWS // 2:
            table.add_row(f"... {hidden} more bands", "", "")
        if hidden <= 0 or not _ROWS // 2 <= index < len(bands) - _ROWS // 2:
            table.add_row(_distances(band) if by_distance else band.keys, band.query_position, band.key_position)
    return table


def _distances(band: BandSummary) -> str:
    first = band.first or 0
    if band.stop is None:
        return f"{number(first)} and more"
    if band.stop - first == 1:
        return number(first)
    return f"{number(first)} to {number(band.stop - 1)}"
