# SPDX-License-Identifier: Apache-2.0
"""`ropewalk presets`: the built-in presets."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from ropewalk.explanation import number
from ropewalk.presets import built_in


def command(as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False) -> None:
    """Show the built-in presets: how models are extended where nothing else is said."""
    presets = [entry.preset for entry in built_in().values()]
    if as_json:
        print(json.dumps([preset.to_dict() for preset in presets], indent=2))
        return
    for preset in presets:
        window = f"trained window {number(preset.trained_window)}"
        windows = "" if preset.sliding_window == "keep" else ", sliding windows disabled"
        print(f"{preset.name}\n  {preset.position_map}, {window}{windows}\n  {preset.source}")
