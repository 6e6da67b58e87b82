"""`ropewalk eval perplexity`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, get_args

import typer

from ropewalk.cli import model_options
from ropewalk.cli.eval.run import Run, evaluate, lengths_of, settings_of, with_run_options


@with_run_options
def perplexity(
    run: Run,
    text: Annotated[str, typer.Option(help="Set of texts: pg19, or alice, which comes with the package.")] = "pg19",
    data_dir: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Folder that holds pg19/test_books/*.txt. \\[default: pg19 is loaded from the hub]"
        ),
    ] = None,
    lengths: Annotated[
        str, typer.Option(help="Tokens of the windows or texts, comma-separated; 16k is 16384.")
    ] = "4k,8k,16k,32k",
    mode: Annotated[
        str, typer.Option(help="Windows of each length, or one text by position.", metavar="sliding|positions")
    ] = "sliding",
    stride: Annotated[int, typer.Option(min=1, help="Tokens from window to window, which are scored.")] = 256,
    windows: Annotated[int, typer.Option(min=0, help="Of each book and length, spread over the book; 0 for all.")] = 16,
    bucket: Annotated[int, typer.Option(min=1, help="Positions that are summed up, with --mode positions.")] = 1024,
    books: Annotated[int, typer.Option(min=1, help="At most, drawn from the set by --seed.")] = 3,
    tokens: Annotated[
        int | None, typer.Option(min=2, help="Of each book, from its beginning. \\[default: all]")
    ] = None,
) -> None:
    """Perplexity on books, by length or by position (SelfExtend, appendix D.1)."""
    from ropewalk.eval.tasks.perplexity import Mode, Perplexity, PerplexitySettings

    model_options.choice("--mode", mode, get_args(Mode))
    settings = settings_of(
        PerplexitySettings,
        text=text,
        mode=mode,
        stride=stride,
        windows=windows,
        bucket=bucket,
        books=books,
        tokens=tokens,
        lengths=lengths_of(lengths),
        seed=run.seed,
    )
    evaluate(lambda: Perplexity(settings, data_dir), run)
