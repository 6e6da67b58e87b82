# SPDX-License-Identifier: Apache-2.0
"""A tiny model saved to a folder, with a tokenizer, as users have theirs on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from ropewalk.testing.models import VOCABULARY, tiny_model

# Letters, digits and signs that prompts are made of: with these a vocabulary of single characters is complete.
_CHARACTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 \n.,:;?!'"
CHAT_TEMPLATE = (
    "{% for message in messages %}[{{ message['content'] }}]{% endfor %}{% if add_generation_prompt %}>{% endif %}"
)


def tiny_tokenizer(chat: bool = False) -> PreTrainedTokenizerFast:
    """A tokenizer of single bytes, whose vocabulary fits the tiny models'; with a chat template if `chat`."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<pad>", "<unk>"], limit_alphabet=VOCABULARY - 2, show_progress=False
    )
    tokenizer.train_from_iterator([_CHARACTERS, "[]>"], trainer)
    fast = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>"
    )
    if chat:
        fast.chat_template = CHAT_TEMPLATE
    return fast


def save_tiny_model(
    folder: Path, name: str = "llama", trained_window: int = 64, chat: bool = False, **changes: Any
) -> Path:
    """Saves `tiny_model(name, trained_window)` with `tiny_tokenizer(chat)`; returns the folder."""
    tiny_model(name, trained_window, **changes).save_pretrained(folder)
    tiny_tokenizer(chat).save_pretrained(folder)
    return folder
