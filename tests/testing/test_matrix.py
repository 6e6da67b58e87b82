# SPDX-License-Identifier: Apache-2.0
"""One model of each kind of positions and attention is right, or is refused by the reason that is true of it."""

import json

import pytest

import ropewalk
from ropewalk.testing import matrix
from ropewalk.testing.matrix import examine
from ropewalk.testing.zoo import ZOO

RIGHT = {
    "llama": "half-split, grouped queries",
    "cohere": "interleaved",
    "phi": "a part of each head",
    "gpt_neox": "a part of each head, in parallel with the feed-forward layer",
    "llama, yarn": "frequencies and a scale",
    "llama, llama3": "frequencies by part",
    "llama, one key head": "one key for all queries",
    "qwen3_moe": "normed queries and keys, experts",
    "deepseek_v3": "latent attention",
    "diffllama": "two attentions a module",
    "gemma2, a low softcap": "softcap, a window in every second layer",
    "gpt_oss": "sinks, a window in every second layer",
    "gemma3_text": "frequencies of their own in layers with a window",
    "gemma4, shared keys": "layers that read others' keys, dimensions at rest",
    "mistral, sliding": "windows in all layers, which are turned off",
    "smollm3, some turn": "layers without positions",
    "qwen3_next": "linear attention between",
    "lfm2": "convolutions between",
    "qwen2_vl": "positions with three axes, on text",
    "mllama": "layers that look at images alone, without one",
    "mllama, an image": "layers that look at images alone",
    "molmo2": "a mask that is made for a model within it",
    "qwen2, without a head": "hidden states",
}
REFUSED = {
    "gpt2": "position embeddings are learned",
    "jamba": "attention without positions",
    "deepseek_v32": "sparse attention",
    "inkling_text": "a bias of its own",
    "doge": "an attention mask of its own",
    "gpt_neo": "position embeddings are learned",
    "roformer": "computes with its attention mask itself",
    "rwkv": "no attention layer",
    "recurrent_gemma": "changes with the position",
    "hunyuan_vl, an image": "which is no rotation",
    "modernbert": "only causal attention",
    "t5": "encoder-decoder",
}


@pytest.mark.parametrize("name", RIGHT)
def test_right(name):
    row = examine(name)
    assert row.outcome == "right", row.message
    assert row.error < matrix.TOLERANCE
    assert row.effect > 100 * matrix.TOLERANCE  # or nothing would have been checked
    unasked = {check for check, reason in row.checks.items() if isinstance(reason, str)}
    assert unasked == ({"static cache"} if "mllama, an image" in name else set())  # it needs layers of another length
    assert row.checks.keys() >= {
        "computed by rows",
        "chunks",
        "token by token",
        "static cache",
        "padded batch",
        "restore",
    }


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    row = examine(name)
    assert row.outcome == "refused", row.message
    assert REFUSED[name] in row.message


def test_what_extend_does_wrong_is_found(monkeypatch):
    right = ropewalk.extend

    def extend(model, position_map, **options):
        return right(model, ropewalk.SelfExtend(4, 17), **options)

    monkeypatch.setattr(ropewalk, "extend", extend)
    row = examine("llama")
    assert row.outcome == "wrong"
    assert row.message.startswith("computed by rows under SelfExtend: off by ")


def test_what_is_left_on_a_model_is_found(monkeypatch):
    right = ropewalk.restore

    def restore(model):
        right(model)
        model.config.note = 1

    monkeypatch.setattr(ropewalk, "restore", restore)
    row = examine("llama")
    assert (row.outcome, row.message) == ("wrong", "restore: attributes are left on the model")


def test_what_is_raised_is_found(monkeypatch):
    def extend(*_, **__):
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr(ropewalk, "extend", extend)
    row = examine("llama")
    assert row.outcome == "crashed"
    assert row.message.startswith("ZeroDivisionError in extend (test_matrix.py:")


def test_rows(tmp_path, capsys):
    matrix.main(["gpt2", "t?", "--out", str(tmp_path / "rows.jsonl")])
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [(row["name"], row["outcome"], row["family"]) for row in rows] == [
        ("gpt2", "refused", "causal"),
        ("t5", "refused", "encoder"),
    ]
    assert "refused  t5: T5ForConditionalGeneration is an encoder-decoder" in capsys.readouterr().err


def test_a_name_that_is_not_there(capsys):
    with pytest.raises(SystemExit):
        matrix.main(["llamma"])
    assert "no model is called llamma" in capsys.readouterr().err


def test_every_kind_is_in_the_zoo():
    assert {entry.family for entry in ZOO.values()} == {"causal", "vision-language", "variant", "encoder"}
    assert len(ZOO) > 230
