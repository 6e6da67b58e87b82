# SPDX-License-Identifier: Apache-2.0
"""Small models in the place of those that the documentation and the examples name."""

from __future__ import annotations

from pathlib import Path

import pytest


def save_stand_in(folder: Path) -> Path:
    """A tiny model that has SmolLM2's window, layers and rotary embedding, and a tokenizer of four sentences a token:
    texts of real lengths are read in moments."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from ropewalk.testing import tiny_model
    from ropewalk.testing.models import VOCABULARY
    from ropewalk.testing.saved import CHAT_TEMPLATE

    shape = {"num_hidden_layers": 30, "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 64}
    rotary = {"rope_type": "default", "rope_theta": 100_000.0}
    model = tiny_model("llama", 8192, **shape, rope_parameters=rotary)
    # Every second token ends an answer: examples ask for more than what a test needs.
    model.generation_config.eos_token_id = list(range(1, VOCABULARY, 2))
    model.save_pretrained(folder)
    vocabulary = {"<pad>": 0, "<unk>": 1, **{f"word{number} ": number for number in range(2, VOCABULARY)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"(?:[^.?!]*[.?!]+\s*){1,4}"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", padding_side="left"
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def stand_in(tmp_path_factory) -> Path:
    return save_stand_in(tmp_path_factory.mktemp("stand-in"))


@pytest.fixture
def workplace(stand_in, tmp_path, monkeypatch) -> Path:
    """A folder to work in, with what the pages speak of: a model, and reports to read."""
    (tmp_path / "my-model").symlink_to(stand_in)
    for name in ("report.txt", "minutes.txt"):
        (tmp_path / name).write_text("It rained. Nobody came. It was decided to wait. " * 50)
    monkeypatch.chdir(tmp_path)
    return tmp_path
