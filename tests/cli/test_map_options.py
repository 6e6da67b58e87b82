# SPDX-License-Identifier: Apache-2.0
"""Options follow from the fields of the maps, whatever those are: also maps of packages that nobody here has seen."""

import re
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

import pytest
import typer
from typer.testing import CliRunner

from ropewalk.cli import map_options
from ropewalk.cli.errors import Commands
from ropewalk.cli.map_options import with_map_options
from ropewalk.maps import SELF, ReRoPE
from ropewalk.maps.registry import Registry


@dataclass(frozen=True)
class Odd(ReRoPE):
    """A map whose parameters are of every type that an option can hold, and of some that none can.

    Args:
        rate: of the
            first [bold]kind[/bold]. Or not.
        tokens: the command has an option of this name.
    """

    name: ClassVar[str] = "odd"
    rate: Literal[1, 2] = 1
    capacity: float | None = None
    grouping: str = "none"
    loud: bool = False
    tokens: int = 5
    weights: tuple[float, ...] = field(default_factory=tuple)


@dataclass(frozen=True)
class Heavy(ReRoPE):
    name: ClassVar[str] = "heavy"
    sizes: dict[str, int]


@pytest.fixture
def run(monkeypatch):
    """Runs a command that takes maps, and gives the map that it was asked for."""
    monkeypatch.setattr(map_options, "MAPS", Registry(SELF, ReRoPE, Odd, Heavy))
    app = typer.Typer(cls=Commands, rich_markup_mode="rich")
    chosen = []

    @app.callback()
    def root():
        pass

    @app.command("take")
    @with_map_options("self")
    def command(map_options: map_options.MapOptions, tokens: Annotated[int, typer.Option(help="Of a text.")] = 7):
        chosen.append(map_options.choose())

    def run(*arguments):
        chosen.clear()
        result = CliRunner().invoke(app, ["take", *map(str, arguments)], env={"COLUMNS": "300"})
        return chosen[0] if chosen else (result.exit_code, result.stderr or result.stdout)

    return run


def test_every_type_that_an_option_can_hold_is_given_to_the_map(run):
    given = ["--window", 3, "--rate", 2, "--capacity", 2.5, "--grouping", "any", "--loud", "--start", 4]
    assert run("--map", "odd", *given) == Odd(3, 2, 2.5, "any", True, start=4)
    assert run("--map", "odd", "--window", 3, "--no-loud") == Odd(3)


def test_options_of_one_name_are_read_as_the_map_that_was_asked_for_has_them(run):
    assert run("--map", "self", "--rate", 0.5, "--capacity", 12) == SELF(12, 0.5)
    assert type(run("--map", "self", "--capacity", 12).capacity) is int
    assert run("--map", "odd", "--window", 3, "--capacity", 12).capacity == 12.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--map", "self", "--capacity", "1.5"], "--capacity of --map self must be INTEGER, got '1.5'"),
        (["--map", "self", "--rate", "fast"], "--rate of --map self must be NUMBER, got 'fast'"),
        (["--map", "odd", "--capacity", "many"], "--capacity of --map odd must be NUMBER, got 'many'"),
        (["--map", "self", "--loud"], "--map self has no --loud; its options are"),
        (["--map", "heavy", "--window", "3"], "no option can hold sizes: make the map in Python"),
        (["--map", "odd"], "--map odd needs --window"),
        (["--map", "odd", "--window", "x"], "--window"),
    ],
)
def test_a_mistake_names_the_option(run, arguments, message):
    code, error = run(*arguments)
    assert code == 2
    assert error.count("\n") == 1
    assert message in error


def test_an_option_of_the_command_stays_the_commands(run):
    assert run("--map", "odd", "--window", 3, "--tokens", 9).tokens == 5


def test_help_says_what_each_map_means(run):
    code, output = run("--help")
    assert code == 0
    text = " ".join(re.sub("[│╭╰─╮╯]", " ", output).split())
    for expected in (
        "--rate NUMBER|1|2 self: r, the growth rate of the curve. [default: 0.02] "
        "odd: of the first [bold]kind[/bold]. [default: 1]",
        "--capacity INTEGER|NUMBER self: C, one more than the largest group size. [default: 33] odd.",
        "--window INTEGER self: W, the neighbor window, in tokens. [default: 1024] "
        "rerope: W, the neighbor window, in tokens. odd, heavy.",
        "odd. [default: False]",
        "--start INTEGER Queries before this position keep true distances. [default: 0]",
    ):
        assert expected in text, text
    assert "--weights" not in text
    assert "--sizes" not in text
