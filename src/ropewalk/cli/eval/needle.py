"""`ropewalk eval needle`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ropewalk.cli.eval.run import Run, depths_of, evaluate, lengths_of, settings_of, with_run_options


@with_run_options
def needle(
    run: Run,
    text: Annotated[str, typer.Option(help="Set of texts: essays, or alice, which comes with the package.")] = "essays",
    data_dir: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Folder that holds needle/PaulGrahamEssays/*.txt. \\[default: essays are loaded from the hub]",
        ),
    ] = None,
    lengths: Annotated[str, typer.Option(help="Tokens of the prompts, comma-separated; 16k is 16384.")] = "4k,8k,16k",
    depths: Annotated[
        str, typer.Option(help="Where the needle is, from 0 to 1, comma-separated; or a number of depths.")
    ] = "10",
    samples: Annotated[int, typer.Option(min=1, help="Prompts of each length and depth.")] = 3,
    chat: Annotated[bool, typer.Option(help="Ask as a message where the model has a chat template.")] = True,
) -> None:
    """Needle in a haystack of essays, over lengths and depths (SelfExtend, appendix G, figure 10)."""
    from ropewalk.eval.tasks.needle import Needle, NeedleSettings

    settings = settings_of(
        NeedleSettings,
        text=text,
        lengths=lengths_of(lengths),
        depths=depths_of(depths),
        samples=samples,
        chat=chat,
        seed=run.seed,
    )
    evaluate(lambda: Needle(settings, data_dir), run)
