# SPDX-License-Identifier: Apache-2.0
import hashlib
import json
import re
import sys
import zipfile

import pytest
from pydantic import ValidationError

from ropewalk.eval.data_files import DataError
from ropewalk.eval.subjects import Dummy
from ropewalk.eval.tasks.base import Example
from ropewalk.eval.tasks.longbench import KINDS, LongBench, shortened
from ropewalk.eval.tasks.longbench.scores import rouge_l, score

CLASSES = ["Food", "City", "City hall", "Date"]


def example(context="A lamp is lit. " * 40, input="What is lit?", answers=("A lamp",), **more):
    return {"context": context, "input": input, "answers": list(answers), "_id": "x", "length": 9, **more}


def write(folder, **tasks):
    folder.mkdir(parents=True, exist_ok=True)
    for task, examples in tasks.items():
        lines = [json.dumps(one, ensure_ascii=False) for one in examples]
        (folder / f"{task}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


@pytest.fixture
def data_dir(tmp_path):
    write(
        tmp_path / "longbench" / "full",
        qasper=[example(), example(answers=("unanswerable", "none"), input="Who {lit} it?")],
        trec=[example(answers=("City hall",), all_classes=CLASSES)],
        samsum=[example(answers=("Ann is late.",))],
        lcc=[example(context="x = {1: 2}\n", input="", answers=("y = 1",))],
    )
    write(tmp_path / "longbench" / "minilongbench", qasper=[example(context="short")])
    return tmp_path


class Recording(Dummy):
    """Tokens are the places of words; remembers what was asked as a chat."""

    def __init__(self, special=0):
        super().__init__()
        self.__dict__.update(special=special, words=[], texts=[])

    def encode(self, text, chat=False):
        self.texts.append((text, chat))
        self.words[:] = text.split(" ")
        return [-1] * self.special + list(range(len(self.words)))

    def decode(self, token_ids):
        return " ".join(self.words[token] for token in token_ids if token >= 0)


def task(data_dir=None, **settings):
    return LongBench(**{"data_dir": data_dir, "tasks": ("qasper",), **settings})


def test_the_tasks_of_table_2():
    assert list(KINDS) == [
        "narrativeqa", "qasper", "multifieldqa_en", "hotpotqa", "2wikimqa", "musique", "gov_report", "qmsum",
        "multi_news", "trec", "triviaqa", "samsum", "passage_count", "passage_retrieval_en", "lcc", "repobench-p",
    ]  # fmt: skip
    assert LongBench().tasks == tuple(KINDS)
    for kind in KINDS.values():
        assert re.findall(r"{(.*?)}", kind.prompt) in (["context"], ["context", "input"])
    assert {name: kind.new_tokens for name, kind in KINDS.items() if kind.new_tokens >= 128} == {
        "narrativeqa": 128, "qasper": 128, "samsum": 128, "gov_report": 512, "qmsum": 512, "multi_news": 512,
    }  # fmt: skip


def test_examples(data_dir):
    one = task(data_dir, tasks=("trec", "qasper", "trec"), length=100)
    assert one.tasks == ("qasper", "trec")
    assert list(one.examples()) == [
        Example("qasper-0", 100, {"task": "qasper"}, cluster="qasper-0"),
        Example("qasper-1", 100, {"task": "qasper"}, cluster="qasper-0"),
        Example("trec-0", 100, {"task": "trec"}, cluster="qasper-0"),
    ]
    assert next(iter(task(data_dir, subset="mini").examples())).tokens == len("short" + "What is lit?") // 4


def test_questions_about_one_text_are_of_one_document(data_dir):
    clusters = {one.name: one.cluster for one in task(data_dir, tasks=("qasper", "lcc")).examples()}
    assert clusters == {"qasper-0": "qasper-0", "qasper-1": "qasper-0", "lcc-0": "lcc-0"}


def test_what_identifies_a_run(data_dir):
    one = task(data_dir, tasks=("trec", "qasper"))
    folder = data_dir / "longbench" / "full"
    both = (folder / "qasper.jsonl").read_bytes() + (folder / "trec.jsonl").read_bytes()
    assert one.settings["sha256"] == hashlib.sha256(both).hexdigest()
    assert str(data_dir) not in str(one.settings)
    assert task(data_dir, subset="mini").settings["sha256"] != task(data_dir).settings["sha256"]


@pytest.mark.parametrize(
    ("tasks", "settings", "longest"),
    [(("qasper", "lcc"), {}, 356), (("qasper", "lcc"), {"chat": False}, 228), (("lcc",), {}, 164)],
)
def test_longest(data_dir, tasks, settings, longest):
    assert task(data_dir, tasks=tasks, length=100, **settings).longest == longest


@pytest.mark.parametrize(
    ("name", "settings", "asked_as_chat"),
    [("qasper", {}, True), ("qasper", {"chat": False}, False), ("trec", {}, False)],
)
def test_the_prompt(data_dir, name, settings, asked_as_chat):
    subject = Recording()
    [first, *_] = (one := task(data_dir, tasks=(name,), **settings)).examples()
    generation = one.prepare(first, subject)
    text, was_chat = subject.texts[-1]
    assert was_chat is asked_as_chat
    assert text == KINDS[name].prompt.replace("{context}", "A lamp is lit. " * 40).replace("{input}", "What is lit?")
    assert list(generation.prompt.token_ids) == list(range(len(text.split(" "))))
    assert (generation.prompt.new_tokens, generation.prompt.stop) == (KINDS[name].new_tokens, None)


def test_braces_in_a_text_are_no_places(data_dir):
    subject = Recording()
    for name in ("lcc", "qasper"):
        *_, last = (one := task(data_dir, tasks=(name,))).examples()
        one.prepare(last, subject)
    assert any("x = {1: 2}\n" in text for text, _ in subject.texts)
    assert any("Who {lit} it?" in text for text, _ in subject.texts)


@pytest.mark.parametrize(
    ("length", "left"),
    [(10, "0 1 2 3 4 5 6 7 8"), (9, "0 1 25 6 7 8"), (8, "0 1 25 6 7 8"), (7, "0 16 7 8"), (2, "8")],
)
def test_the_middle_is_left_out(length, left):
    """Of ten tokens; the first is special: it counts, and is not in the text."""
    assert shortened("0 1 2 3 4 5 6 7 8", length, Recording(special=1)) == left


def test_a_long_prompt_keeps_its_ends(data_dir):
    subject = Recording()
    [first, *_] = (one := task(data_dir, length=40)).examples()
    generation = one.prepare(first, subject)
    text, was_chat = subject.texts[-1]
    # The two words on both sides of the cut become one.
    assert len(generation.prompt.token_ids) == 39
    assert was_chat
    assert text.startswith("You are given a scientific article")
    assert text.endswith("Question: What is lit?\n\nAnswer:")
    assert "lamp" not in text


@pytest.mark.parametrize(
    ("name", "answer", "references", "worth"),
    [
        # Words without articles, punctuation and case.
        ("qasper", "The LAMP!", ["a lamp"], 1),
        ("qasper", "the lamp is lit", ["a lamp"], 2 * 1 / (3 + 1)),
        ("qasper", "lamp lamp", ["lamp"], 2 * 1 / (2 + 1)),
        ("qasper", "a lamp", ["nobody", "the lamp there", "lamp post lamp"], 2 / 3),
        ("qasper", "", ["lamp"], 0),
        ("hotpotqa", "yes\nI am sure", ["yes"], 2 * 1 / (4 + 1)),
        # One line alone is read.
        ("triviaqa", "\n\nyes\nI am sure", ["yes"], 1),
        # By a class each, but for classes that are a part of the right one.
        ("trec", "City hall", ["City hall"], 1),
        ("trec", "City hall or Food", ["City hall"], 0.5),
        ("trec", "City hall", ["City"], 0.5),
        ("trec", "\nFood\nQuestion: which Date?", ["Food"], 1),
        ("trec", "food", ["Food"], 0),
        ("passage_count", "12, no: 13 of 12", ["12"], 2 / 3),
        ("passage_count", "twelve", ["12"], 0),
        ("passage_retrieval_en", "Paragraph 3", ["Paragraph 3"], 1),
        ("passage_retrieval_en", "13 and 3", ["Paragraph 3"], 0.5),
        # The first line that looks like code.
        ("lcc", "```\n# so\n// or\nx = 1\nx = 2", ["x = 1"], 1),
        ("lcc", "\nabcd", ["abxy"], 0.5),
        ("lcc", "abc", ["abd"], 0.67),
        ("repobench-p", "# nothing", ["x"], 0),
    ],
)
def test_what_an_answer_is_worth(name, answer, references, worth):
    assert score(name, answer, references, CLASSES) == pytest.approx(worth)


@pytest.mark.parametrize(
    ("name", "answer", "worth"),
    [
        # Each word once, whichever sentence it stands in: 3 of 4 given, 3 of 3 wanted.
        ("gov_report", "the cat sat. the cat ran", 2 * 0.75 / 1.75),
        ("gov_report", "ran cat the", 1 / 3),
        ("gov_report", "The cat ran", 2 / 3),
        ("gov_report", "no.\nthe cat ran", 6 / 7),
        ("samsum", "no.\nthe cat ran", 0),
        ("qmsum", "", 0),
        ("multi_news", "...", 0),
    ],
)
def test_what_a_summary_is_worth(name, answer, worth):
    assert score(name, answer, ["the cat ran"]) == pytest.approx(worth, abs=1e-6)


def test_outcomes(data_dir):
    subject = Dummy(lambda token_ids: "None, or a lamp")
    one = task(data_dir)
    outcomes = one.outcomes(list(one.examples()), subject)
    assert [outcome.scores["score"] for outcome in outcomes] == [0.5, 0.5]
    assert [outcome.target for outcome in outcomes] == ["A lamp", "unanswerable | none"]
    assert outcomes[0].output == "None, or a lamp"


def test_rouge_of_a_text_without_a_full_stop():
    """`rouge` alone ends in a RecursionError, with the first of these too."""
    words = [f"word{i}" for i in range(3 * sys.getrecursionlimit())]
    limit = sys.getrecursionlimit()
    score = rouge_l(" ".join(words), "word1 word7 word70. No, word2.")
    assert score == pytest.approx(2 * 4 / (len(words) + 5), rel=1e-6)
    assert rouge_l("word1 word7 word70. No, word2.", " ".join(words)) == pytest.approx(score)
    assert sys.getrecursionlimit() == limit


def test_without_rouge(data_dir, monkeypatch):
    monkeypatch.setitem(sys.modules, "rouge", None)
    assert list(task(data_dir).examples())
    with pytest.raises(DataError, match=r"summaries are scored with rouge: pip install 'ropewalk\[eval\]'"):
        task(data_dir, tasks=("qasper", "samsum")).read()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tasks": ("qaspr",)}, "must be one of narrativeqa, .*, got 'qaspr'. Did you mean 'qasper'"),
        ({"tasks": ()}, "at least 1 item"),
        ({"length": 1}, "greater than or equal to 2"),
        ({"subset": "small"}, "'full' or 'mini'"),
    ],
)
def test_settings_that_do_not_fit(settings, message):
    with pytest.raises(ValidationError, match=message):
        task(**settings)


def test_texts_hold_other_ends_of_lines(tmp_path):
    write(tmp_path / "longbench" / "full", qasper=[example(context="one\u2028two\x85three\r\nfour")])
    assert len(list(task(tmp_path).examples())) == 1


@pytest.mark.parametrize(
    ("subset", "repository", "folder"),
    [("full", "THUDM/LongBench", "full"), ("mini", "linggm/MiniLongBench", "minilongbench")],
)
def test_from_the_hub(data_dir, monkeypatch, subset, repository, folder):
    source = data_dir / "longbench" / folder / "qasper.jsonl"

    def download(name, file, repo_type):
        assert (name, file, repo_type) == (repository, "data.zip", "dataset")
        with zipfile.ZipFile(data_dir / file, "w") as archive:
            archive.write(source, "data/qasper.jsonl")
            archive.writestr("data/qasper_e.jsonl", "another")
            archive.writestr("__MACOSX/data/._qasper.jsonl", "no text")
        return data_dir / file

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert task(subset=subset).settings == task(data_dir, subset=subset).settings
    with pytest.raises(DataError, match=rf"data.zip of {repository} holds no trec.jsonl"):
        task(tasks=("trec",), subset=subset).read()
