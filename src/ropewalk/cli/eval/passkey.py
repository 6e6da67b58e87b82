"""`ropewalk eval passkey` and `passkey-length`."""

from __future__ import annotations

from typing import Annotated

import typer

from ropewalk.cli.eval.run import Run, depths_of, evaluate, length_of, lengths_of, settings_of, with_run_options


@with_run_options
def passkey(
    run: Run,
    lengths: Annotated[str, typer.Option(help="Tokens of the prompts, comma-separated; 16k is 16384.")] = "4k,8k,16k",
    depths: Annotated[
        str, typer.Option(help="Where the key is, from 0 to 1, comma-separated; or a number of depths.")
    ] = "10",
    samples: Annotated[int, typer.Option(min=1, help="Prompts of each length and depth.")] = 10,
    span: Annotated[int, typer.Option(min=0, help="Tokens among which the place is drawn.")] = 400,
    digits: Annotated[int, typer.Option(min=1, max=1000, help="Of the key.")] = 5,
) -> None:
    """Pass key retrieval over lengths and depths (SelfExtend, section 4.2, figure 4)."""
    from ropewalk.eval.tasks.passkey import Passkey, PasskeySettings

    settings = settings_of(
        PasskeySettings,
        lengths=lengths_of(lengths),
        depths=depths_of(depths),
        samples=samples,
        span=span,
        digits=digits,
        seed=run.seed,
    )
    evaluate(lambda: Passkey(settings), run)


@with_run_options
def passkey_length(
    run: Run,
    digits: Annotated[str, typer.Option(help="Of the keys, comma-separated.")] = "5,8,16,36,48,64,100",
    length: Annotated[str, typer.Option(help="Tokens of the prompts; 16k is 16384.")] = "16k",
    samples: Annotated[int, typer.Option(min=1, help="Prompts of each number of digits.")] = 10,
) -> None:
    """Pass keys of more and more digits, at one length (SelfExtend, section 4.7, figure 6)."""
    from ropewalk.eval.tasks.passkey_length import PasskeyLength, PasskeyLengthSettings

    numbers = lengths_of(digits, "--digits")
    settings = settings_of(
        PasskeyLengthSettings, digits=numbers, length=length_of(length), samples=samples, seed=run.seed
    )
    evaluate(lambda: PasskeyLength(settings), run)
