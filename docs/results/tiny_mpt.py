# SPDX-License-Identifier: Apache-2.0
"""Trains a tiny MPT, a model with ALiBi, on one book, in minutes of a CPU: `python docs/results/tiny_mpt.py FOLDER`.

FOLDER then holds the model, which was trained on `--window` tokens and whose `max_seq_len` is raised so that it reads
longer texts as it is, and the last fifth of the book in passages, as `ropewalk eval perplexity --data-dir` reads them.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Annotated

import torch
import typer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.utils import clip_grad_norm_
from transformers import MptConfig, MptForCausalLM, PreTrainedTokenizerFast

from ropewalk.data import alice

# With 8 heads the slopes of ALiBi are 1/2, 1/4, ... 1/256; MPT takes them from the number of heads alone.
WIDTH, HEADS, LAYERS = 192, 8, 4
VOCABULARY = 512
# Times the trained window: as far as the model reads when it is not extended.
FARTHEST = 16


def split(book: str) -> tuple[str, str]:
    """What is trained on, and the last fifth of a book, which is not."""
    end = len(book) * 4 // 5
    return book[:end], book[end:]


def tokenizer_for(text: str) -> PreTrainedTokenizerFast:
    """Pairs of bytes that `text` has often, from a vocabulary that lacks no byte."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([text], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)  # type: ignore[no-untyped-call]


def trained(tokens: torch.Tensor, window: int, steps: int, batch: int, seed: int) -> MptForCausalLM:
    """A model that has read `steps` times `batch` stretches of `window` tokens, from anywhere in the text.

    Args:
        tokens: of the text, [tokens], int64; more than `window`.
    """
    torch.manual_seed(seed)
    shape = MptConfig(d_model=WIDTH, n_heads=HEADS, n_layers=LAYERS, vocab_size=VOCABULARY, max_seq_len=window)
    model = MptForCausalLM(shape)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.98), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps, pct_start=0.1)
    stretches = tokens.unfold(0, window, 1)
    for step in range(1, steps + 1):
        read = stretches[torch.randint(len(stretches), (batch,))]
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=read, labels=read).loss
        optimizer.zero_grad()
        loss.backward()
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == steps:
            typer.echo(f"step {step} of {steps}: loss {loss.item():.3f}")
    return model


def passages(text: str, tokenizer: PreTrainedTokenizerFast, length: int) -> list[str]:
    """A text cut into pieces of `length` tokens and a little more, without the rest."""
    # The margin is for pairs that a cut takes apart.
    places = [begin for begin, _ in tokenizer(text, return_offsets_mapping=True)["offset_mapping"]][:: length + 16]
    return [text[begin:end] for begin, end in pairwise(places)]


def main(
    folder: Annotated[Path, typer.Argument(help="Where the model and the passages go.")],
    book: Annotated[Path | None, typer.Option(help="A text file. [default: Alice's Adventures in Wonderland]")] = None,
    window: Annotated[int, typer.Option(min=2, help="Tokens that the model is trained on.")] = 256,
    steps: Annotated[int, typer.Option(min=20, help="More learn a book of this length by heart.")] = 240,
    batch: Annotated[int, typer.Option(min=1, help="Stretches of text a step.")] = 8,
    seed: int = 0,
) -> None:
    seen, unseen = split(alice() if book is None else book.read_text(encoding="utf-8"))
    tokenizer = tokenizer_for(seen)
    found = passages(unseen, tokenizer, FARTHEST * window)
    if not found:
        raise typer.BadParameter(f"its last fifth has fewer than the {FARTHEST * window} tokens to measure on: {book}")
    model = trained(torch.tensor(tokenizer(seen)["input_ids"]), window, steps, batch, seed)
    model.config.max_seq_len = FARTHEST * window
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    data = folder / "pg19/test_books"
    data.mkdir(parents=True, exist_ok=True)
    for number, passage in enumerate(found):
        (data / f"{number:03}.txt").write_text(passage, encoding="utf-8")
    typer.echo(f"{len(found)} passages of {FARTHEST * window} tokens to measure on")


if __name__ == "__main__":
    typer.run(main)
