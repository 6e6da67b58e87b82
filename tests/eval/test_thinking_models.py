# SPDX-License-Identifier: Apache-2.0
"""Models that think first, asked by every task that has answers in words."""

import json

import pytest
from typer.testing import CliRunner

from ropewalk.cli import app
from ropewalk.eval.results import read
from ropewalk.eval.subjects import Dummy, Hashes, Model
from ropewalk.eval.tasks import TASKS, metrics_of
from ropewalk.eval.tasks.base import UNFINISHED
from ropewalk.integrations.transformers import generation
from ropewalk.integrations.transformers.models import LoadedModel
from ropewalk.integrations.transformers.sources import Source
from ropewalk.testing import tiny_model
from ropewalk.testing.saved import tiny_tokenizer

# As of DeepSeek-R1-Distill since February 2025, and before: then the model began its thoughts itself.
OPEN = "{{ messages[0]['content'] }}<|A|>{% if add_generation_prompt %}<think>\n{% endif %}"
CLOSED = "{{ messages[0]['content'] }}<|A|>"


# What a tokenizer takes the marks of a thought for, which a decoded text then holds or not: ordinary tokens, as those
# of DeepSeek-R1 and Qwen 3 do; special ones; only the second; letters.
KINDS = {"ordinary": ([], ["<think>", "</think>"]), "special": (["<think>", "</think>"], []),
         "half": (["</think>"], ["<think>"]), "letters": ([], [])}  # fmt: skip


def tokenizer(template, marks="ordinary"):
    """With the marks of a thought of one of `KINDS`."""
    made = tiny_tokenizer()
    special, ordinary = KINDS[marks]
    made.add_tokens(["<|A|>", *ordinary])
    made.add_tokens(special, special_tokens=True)
    # Signs that the marks may be written with.
    made.add_tokens(["<", "/", "#"])
    made.chat_template = template
    return made


def saying(monkeypatch, template, text, marks="ordinary"):
    """A model with this chat template that says this, as far as what ends an answer lets it."""

    def answer(model, tokenizer, prompts, *, stop, **options):
        ids = tokenizer(text)["input_ids"]
        said = generation._decode(tokenizer, ids)
        said = said if stop is None else said.partition(stop)[0]
        return [generation.Answer(said, tuple(ids), len(one), 0.0, 0.0, True) for one in prompts]

    monkeypatch.setattr(generation, "generate_batch", answer)
    made = tokenizer(template, marks)
    return Model(LoadedModel(Source("tiny", ""), tiny_model("llama"), made), 64, Hashes("hash"))


@pytest.fixture
def data_dir(tmp_path):
    """One example of each task that reads files, whose answer is B."""

    def write(name, line):
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{json.dumps(line)}\n")

    write("leval/closed/tpo.jsonl", {"input": "long " * 90, "instructions": ["Which?"], "outputs": ["B"]})
    write("longbench/full/qasper.jsonl", {"context": "a word " * 90, "input": "Which?", "answers": ["B"]})
    return tmp_path / "data"


def asked(name, data_dir):
    """One example of a task, and a right answer to it."""
    small = {
        "passkey": {"lengths": (900,), "depths": (0.5,), "samples": 1, "chat": True},
        "passkey-length": {"length": 900, "digits": (5,), "samples": 1, "chat": True},
        "needle": {"text": "alice", "lengths": (1200,), "depths": (0.5,), "samples": 1},
        "leval": {"data_dir": data_dir, "tasks": ("tpo",)},
        "longbench": {"data_dir": data_dir, "tasks": ("qasper",)},
    }
    one = TASKS[name](**small[name])
    [example] = one.examples()
    words = {"leval": "B", "longbench": "B", "needle": "Eat a sandwich and sit in Dolores Park on a sunny day."}
    return one, example, words.get(name) or one.prepare(example, Dummy()).target


THINKING = ["passkey", "passkey-length", "needle", "leval", "longbench"]


def test_every_task_that_answers_in_words_has_room_for_thoughts():
    assert {name for name, kind in TASKS.items() if "new_tokens" not in kind.model_fields} == {"perplexity"}
    assert all(UNFINISHED in metrics_of(name) for name in THINKING)


@pytest.mark.parametrize("marks", KINDS)
@pytest.mark.parametrize("name", THINKING)
@pytest.mark.parametrize(
    ("template", "before"),
    [(OPEN, "Is it A?\nNo, 9.\n</think>\n\n"), (CLOSED, "<think>\nIs it A?\n\nNo, 9.\n</think>\n\n")],
)
def test_a_thought_is_no_answer(monkeypatch, data_dir, name, template, before, marks):
    one, example, right = asked(name, data_dir)
    for output, score in ((before + right, 1.0), (f"{before.replace('9', right)}Z", 0.0)):
        [outcome] = one.outcomes([example], saying(monkeypatch, template, output, marks))
        assert outcome.output == output
        assert outcome.scores.pop(UNFINISHED) == 0.0
        assert set(outcome.scores.values()) == {score}


@pytest.mark.parametrize("name", THINKING)
def test_without_a_thought_there_is_no_such_score(monkeypatch, data_dir, name):
    one, example, right = asked(name, data_dir)
    [outcome] = one.outcomes([example], saying(monkeypatch, CLOSED, right))
    assert outcome.output == right
    assert set(outcome.scores.values()) == {1.0}
    assert UNFINISHED not in outcome.scores


@pytest.mark.parametrize("marks", KINDS)
@pytest.mark.parametrize("name", THINKING)
@pytest.mark.parametrize(("template", "before"), [(OPEN, ""), (CLOSED, "<think>\n")])
def test_a_thought_without_an_end_is_wrong(monkeypatch, data_dir, name, template, before, marks):
    one, example, right = asked(name, data_dir)
    [outcome] = one.outcomes([example], saying(monkeypatch, template, f"{before}It may be {right}. Or", marks))
    assert outcome.scores.pop(UNFINISHED) == 1.0
    assert set(outcome.scores.values()) == {0.0}
    assert outcome.output == f"{before}It may be {right}. Or"


@pytest.mark.parametrize("marks", ["ordinary", "special"])
@pytest.mark.parametrize(("template", "before"), [(OPEN, ""), (CLOSED, "<think>")])
def test_what_ends_an_answer_does_not_end_a_thought(monkeypatch, data_dir, template, before, marks):
    """The stop of solved problems, which a model may well write while it thinks."""
    line = {"input": "1 + 1", "instructions": ["2 + 2"], "outputs": ["4"]}
    (data_dir / "leval/closed/gsm100.jsonl").write_text(json.dumps(line))
    one = TASKS["leval"](data_dir=data_dir, tasks=("gsm100",))
    [example] = one.examples()
    said = f"{before}So\n\nQuestion: 2 and 2\n</think>\n\nThe answer is 4\n\nQuestion: 5 and 5\nThe answer is 10"
    [outcome] = one.outcomes([example], saying(monkeypatch, template, said, marks))
    assert outcome.scores == {"exact_match": 1.0, UNFINISHED: 0.0}
    assert outcome.output == said


def test_options_are_no_thoughts(monkeypatch, data_dir):
    one = TASKS["leval"](data_dir=data_dir, tasks=("tpo",), mode="options")
    [example] = one.examples()
    with pytest.raises(ValueError, match="chat template begins a thought, so nothing can be scored as its answer"):
        one.prepare(example, saying(monkeypatch, OPEN, ""))
    assert one.prepare(example, saying(monkeypatch, CLOSED, ""))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    made = tokenizer(OPEN)
    tiny_model("llama", 64, vocab_size=len(made)).save_pretrained(folder)
    made.save_pretrained(folder)
    return folder


def run(*arguments):
    return CliRunner().invoke(app, [*map(str, arguments)])


def test_rows_and_page_of_a_model_that_never_ends_its_thought(folder, tmp_path):
    small = ["--lengths", "500", "--depths", "2", "--samples", "2", "--chat", "--new-tokens", "9"]
    asked = ["eval", "passkey", "--model", folder, *small, "--method", "unmodified", "-o", tmp_path / "out"]
    result = run(*asked)
    assert result.exit_code == 0, result.output
    rows = read(tmp_path / "out").rows
    assert len(rows) == 4
    assert all(row.scores == {"exact_match": 0.0, UNFINISHED: float("</think>" not in row.output)} for row in rows)
    assert any(row.scores[UNFINISHED] for row in rows)
    assert run("report", tmp_path / "out", "-o", tmp_path / "page.html").exit_code == 0
    assert "houghts without an end" in (tmp_path / "page.md").read_text()
    # Scored again, each begins inside a thought as well.
    result = run(*asked[:-4], "--rescore", tmp_path / "out", "-o", tmp_path / "scored")
    assert result.exit_code == 0, result.output
    assert [(row.key, row.scores) for row in read(tmp_path / "scored").rows] == [(row.key, row.scores) for row in rows]
    again = run(*asked, "--new-tokens", "10")
    assert again.exit_code == 2
    assert "was started with settings" in again.stderr
