# SPDX-License-Identifier: Apache-2.0
import json
import math

import pytest
from pydantic import ValidationError

from ropewalk.eval.data_files import DataError
from ropewalk.eval.subjects import Dummy
from ropewalk.eval.tasks.base import Generation
from ropewalk.eval.tasks.leval import LEval, option_scores, scores
from ropewalk.eval.tasks.leval.exams import loyal_and_fact

WORLD = "based on the world described in the document."
PAPERS = {
    "coursera": [
        {
            "input": "A ship. " * 300,
            "instructions": ["Question 1. What?\nA. One\nB. Two\nC. Three\nD. Four", "Question 2. Which?\nA. 1\nB. 2"],
            "outputs": ["C", "ABD"],
        },
        {"input": "A rope. " * 30, "instructions": ["Question 1. Who?\nA. We\nB. You"], "outputs": ["B"]},
    ],
    "quality": [{"input": "{Story}", "instructions": ["Why? \n (A) No \n (B) Yes"], "outputs": ["(B) Yes, because A"]}],
    "tpo": [{"input": "a lecture", "instructions": ["why\nA. so\nB. not so"], "outputs": ["A"]}],
    "gsm100": [{"input": "Question: 1 + 1\nThe answer is 2\n", "instructions": ["Question: 2 + 2"], "outputs": ["4"]}],
    "sci_fi": [
        {"input": "Mars is wet.", "instructions": [f"Mars is wet. Answer {WORLD}"], "outputs": ["True [fact: False]"]}
    ],
    "codeU": [
        {
            "input": " ".join(f"line{i}" for i in range(500)),
            "instructions": ["What is the output of f(1)?"],
            "outputs": ["[1, 2]"],
        }
    ],
}


@pytest.fixture
def data_dir(tmp_path):
    folder = tmp_path / "leval" / "closed"
    folder.mkdir(parents=True)
    for name, papers in PAPERS.items():
        lines = [json.dumps({"source": "us", "evaluation": "exam", **paper}) for paper in papers]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path


class Reading(Dummy):
    """Keeps what it was asked, and finds an answer the likelier the further on its first letter is in `order`."""

    def __init__(self, reply="C", order="ABCDTF", template=False):
        super().__init__(lambda token_ids: reply)
        self.__dict__.update(order=order, template=template, texts=[], asked=[])

    def encode(self, text, chat=False):
        self.texts.append(text)
        return [-1] * (chat and self.template) + [sum(map(ord, word)) for word in text.split()]

    def answers(self, prompts):
        self.asked += prompts
        return super().answers(prompts)

    def log_likelihoods(self, passages):
        self.asked += passages
        words = {sum(map(ord, word)): word for word in ("A", "B", "C", "D", "True", "False")}
        assert all(len(one.token_ids) == one.first + 1 for one in passages)
        return [[float(self.order.index(words[one.token_ids[-1]][0]))] for one in passages]


def test_what_was_sampled(data_dir):
    """Documents, whichever lines have them; behind one prompt for all, the problems."""
    shared = {
        "tpo": ["a lecture", "another", "a lecture"],
        "sci_fi": ["Mars is wet.", "Mars is dry.", "Mars is wet."],
        "gsm100": ["Question: 1 + 1\nThe answer is 2\n"] * 3,
    }
    for exam, documents in shared.items():
        [paper, *_] = PAPERS[exam]
        lines = [json.dumps({**paper, "input": document}) for document in documents]
        (data_dir / "leval" / "closed" / f"{exam}.jsonl").write_text("\n".join(lines))
    one = task(data_dir, tasks=tuple(shared))
    assert {example.name: example.cluster for example in one.examples()} == {
        "gsm100-0-0": "gsm100-0-0", "gsm100-1-0": "gsm100-1-0", "gsm100-2-0": "gsm100-2-0",
        "tpo-0-0": "tpo-0", "tpo-1-0": "tpo-1", "tpo-2-0": "tpo-0",
        "sci_fi-0-0": "sci_fi-0", "sci_fi-0-0-fact": "sci_fi-0", "sci_fi-1-0": "sci_fi-1",
        "sci_fi-1-0-fact": "sci_fi-1", "sci_fi-2-0": "sci_fi-0", "sci_fi-2-0-fact": "sci_fi-0",
    }  # fmt: skip
    # So they are read from rows that do not say.
    assert [LEval.cluster_of(name) for name in ("tpo-1-2", "sci_fi-3-4-fact")] == ["tpo-1", "sci_fi-3"]
    assert LEval.cluster_of("somebody's") == "somebody's"
    assert LEval.cluster_of("gsm100-0-7") != LEval.cluster_of("gsm100-0-8")


def task(data_dir, **settings):
    return LEval(**{"data_dir": data_dir, "tasks": tuple(PAPERS), "length": 4000, **settings})


def run(one, subject):
    return {example.name: one.outcomes([example], subject)[0] for example in one.examples()}


def prompt_of(one, name, subject=None):
    """The text of an example's prompt, and what was prepared."""
    subject = subject or Reading()
    [example] = [example for example in one.examples() if example.name == name]
    prepared = one.prepare(example, subject)
    return subject.texts[-1], prepared


def test_an_example_a_question(data_dir):
    one = task(data_dir)
    cells = {example.name: example.cell["task"] for example in one.examples()}
    assert cells == {
        "coursera-0-0": "coursera",
        "coursera-0-1": "coursera",
        "coursera-1-0": "coursera",
        "quality-0-0": "quality",
        "tpo-0-0": "tpo",
        "gsm100-0-0": "gsm100",
        "sci_fi-0-0": "sci_fi",
        "sci_fi-0-0-fact": "sci_fi",
        "codeU-0-0": "codeU",
    }
    outcomes = run(one, Reading("C"))
    assert {name: outcome.scores["exact_match"] for name, outcome in outcomes.items() if outcome.scores} == {
        name: float(name == "coursera-0-0") for name in cells
    }
    assert (outcomes["sci_fi-0-0"].target, outcomes["sci_fi-0-0-fact"].target) == ("True", "False")
    assert outcomes["quality-0-0"].target == "(B) Yes, because A"
    assert all(outcome.output == "C" for outcome in outcomes.values())


def test_prompts(data_dir):
    one = task(data_dir, new_tokens=33)
    text, prepared = prompt_of(one, "quality-0-0")
    assert text.startswith("Now you are given a very long document.")
    assert "there is only a sinlge correct option" in text
    assert text.endswith(
        "\n\nDocument is as follows. {Story} \nQuestion: Why? \n (A) No \n (B) Yes.  "
        "Please directly give the answer without any additional output or explanation \nAnswer:"
    )
    assert (prepared.prompt.new_tokens, prepared.prompt.stop) == (33, None)
    text, prepared = prompt_of(one, "gsm100-0-0")
    assert text.endswith("The answer is _ .\n\nQuestion: 1 + 1\nThe answer is 2\n\n\nQuestion: 2 + 2")
    assert prepared.prompt.stop == "\n\nQuestion:"
    assert "multiple correct options" in prompt_of(one, "coursera-0-0")[0]
    assert 'should be "True" or "False"' in prompt_of(one, "sci_fi-0-0")[0]


def test_a_fact_is_asked_without_the_document(data_dir):
    text, _ = prompt_of(task(data_dir), "sci_fi-0-0-fact")
    assert text == (
        "Mars is wet. Answer based on the real-world knowledge and facts up until your last training\n"
        "Please directly give answer without any additional output or explanation \nAnswer:"
    )


@pytest.mark.parametrize("mode", ["generate", "options"])
@pytest.mark.parametrize("length", [100, 101, 250])
def test_documents_are_cut_at_their_end(data_dir, length, mode):
    one = task(data_dir, length=length, mode=mode, tasks=("coursera",))
    short, long = (prompt_of(one, name)[0] for name in ("coursera-1-0", "coursera-0-0"))
    assert "A ship. A ship." in long
    tokens = len(long.split()) + (mode == "options" and not long.endswith(" D"))
    assert tokens == length
    assert long.count("ship.") < 300
    assert ("A rope. " * 29 in short) == (length == 250)


def test_code_is_cut_at_its_beginning(data_dir):
    text, prepared = prompt_of(task(data_dir, length=200), "codeU-0-0")
    assert "line499" in text
    assert "line0" not in text
    assert len(prepared.prompt.token_ids) == 200


def test_messages(data_dir):
    for chat in (True, False):
        _, prepared = prompt_of(task(data_dir, chat=chat), "tpo-0-0", Reading(template=True))
        assert isinstance(prepared, Generation)
        assert (prepared.prompt.token_ids[0] == -1) == chat


@pytest.mark.parametrize("chat", [True, False])
def test_options(data_dir, chat):
    one = task(data_dir, mode="options", tasks=("coursera", "quality", "sci_fi"), chat=chat)
    assert one.notes == ["coursera: questions left out because several options are right: 1"]
    subject = Reading(order="ABDCFT", template=True)
    outcomes = run(one, subject)
    assert {name: (outcome.target, outcome.output) for name, outcome in outcomes.items()} == {
        "coursera-0-0": ("C", "C"),
        "coursera-1-0": ("B", "C"),
        "quality-0-0": ("B", "C"),
        "sci_fi-0-0": ("True", "True"),
        "sci_fi-0-0-fact": ("False", "True"),
    }
    assert [outcome.scores["accuracy"] for outcome in outcomes.values()] == [1, 0, 0, 1, 0]
    share = 1 / (1 + math.exp(-1) + math.exp(-2) + math.exp(-3))
    assert outcomes["coursera-0-0"].scores["probability"] == pytest.approx(share)
    # Four options of three questions, two of two.
    assert len(subject.asked) == 3 * 4 + 2 * 2
    assert outcomes["coursera-0-0"].prompt_tokens == len(subject.asked[0].token_ids) - 1


def test_scores_of_options():
    assert option_scores([-1.0, -2.0], 0) == {"accuracy": 1.0, "probability": pytest.approx(1 / (1 + math.exp(-1)))}
    assert option_scores([-1.0, -2.0], 1)["accuracy"] == 0.0
    assert option_scores([-1.0, -1.0, -9.0, -1.0], 3)["accuracy"] == pytest.approx(1 / 3)
    assert option_scores([-1000.0, -1000.0], 0)["probability"] == 0.5


@pytest.mark.parametrize("broken", [math.nan, -math.inf])
def test_options_that_cannot_be_scored(data_dir, broken):
    class Broken(Dummy):
        def log_likelihoods(self, passages):
            return [[-1.0, broken] for _ in passages]

    one = task(data_dir, mode="options", tasks=("quality",))
    with pytest.raises(ValueError, match="not numbers, or 0"):
        one.outcomes([*one.examples()], Broken())


@pytest.mark.parametrize(
    ("answer", "target", "score"),
    [
        ("B", "(B) Yes", 1),
        (" The answer is C.", "C", 1),
        ("Answer: C", "C", 0),  # the first capital from A to D
        ("i cannot say", "A", 1),  # a guess, as L-Eval's
        ("", "A", 0),
        ("ABC", "A", 0),
        ("ACD", "A", 1),
        # Space counts, as in L-Eval: behind it letters are no answer of letters alone.
        (" AB", "A", 1),
        ("AB\n", "A", 1),
        (" \n", "A", 0),
    ],
)
def test_one_letter(answer, target, score):
    assert scores.one_letter(answer, target) == score


@pytest.mark.parametrize(
    ("answer", "target", "score"),
    [
        ("ABC", "ABC", 1),
        ("BA", "AB", 1),
        ("AB because D. is wrong", "AB", 1),
        ("AB", "ABC", 0.25),
        ("ABD", "ABC", 0),
        ("ABC", "AB", 0),
        ("C. Answer questions using data", "C", 1),
        ("A. One\nC. Three", "AC", 1),
        ("A, C", "AC", 0.25),  # a comma ends it: "A", and "C" before nothing
        ("A. One\nQuestion 2. Why B. or C.", "A", 1),
        ("The options are B) and D) here", "BD", 1),
        ("it is BD", "BD", 1),
        ("no idea", "A", 1),
        ("  ", "A", 0),
        (" AB", "AB", 1),
        (" ABC. D.", "CD", 1),  # no letters at its beginning, so those before "."
        (" it is BA", "AB", 0.25),  # a run in another order
        ("it is BB", "B", 0.25),
        ("BA. ", "AB", 1),
    ],
)
def test_several_letters(answer, target, score):
    assert scores.several_letters(answer, target) == score


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("So 9 and 9.\nThe answer is 18", 1),
        ("The answer is $18.00.", 1),
        ("The answer is 1,8", 1),
        ("The answer is 19. No, 18", 0),
        ("She makes 9 * 2 = 18 dollars", 1),
        ("She makes 18\n\nOr 20", 1),
        ("She makes 18\n\nOr 20\n\nThe answer is 20", 0),
        ("", 0),
        ("none", 0),
        # Digits of every script are digits.
        ("The answer is \uff11\uff18", 1),
        ("The answer is ١٨.", 1),
        ("She makes १८ dollars", 1),
        ("18 is ②", 0),
        ("The answer is 1²8", 0),
    ],
)
def test_number(answer, score):
    assert scores.number(answer, "18") == score


@pytest.mark.parametrize(
    ("answer", "target", "score"),
    [
        ("True.", "True", 1),
        ("It is false, not true", "False", 1),
        ("It is false", "True", 0),
        ("Yes", "True", 0),
        ("false/true", "True", 1),
        ("false/true", "False", 0),
        ("false / true", "False", 1),
        ("", "False", 0),
    ],
)
def test_truth(answer, target, score):
    assert scores.truth(answer, target) == score


@pytest.mark.parametrize(
    ("answer", "target", "score"),
    [
        ("The value of f is [1, 2]", "[1, 2]", 1),
        ("[ [1,2] ]", "[[1, 2]]", 1),
        ("4.0", "4", 1),
        ("Hello World", "hello world", 1),
        ("so the final output is 7, as one sees when one reads all of it again", "7", 1),
        ("7, as one sees when one reads all of it again", "7", 0),
        ("It is 8", "7", 0),
    ],
)
def test_code(answer, target, score):
    assert scores.code(answer, target) == score


def test_answers_about_fictions():
    assert loyal_and_fact("True [fact: False]") == ("True", "False")
    for wrong in ("True", "True [fact: ]", "maybe [fact: True]"):
        with pytest.raises(ValueError, match=r"must be like 'True \[fact: False\]', got"):
            loyal_and_fact(wrong)


def test_what_identifies_a_run(data_dir, tmp_path_factory):
    one = task(data_dir)
    assert len(one.settings["sha256"]) == 64
    assert str(data_dir) not in str(one.settings)
    again = task(data_dir.rename(tmp_path_factory.mktemp("other") / "place"))
    assert again.settings == one.settings


def test_changed_data_is_another_run(data_dir):
    before = task(data_dir, tasks=("tpo",)).settings
    path = data_dir / "leval" / "closed" / "tpo.jsonl"
    path.write_text(path.read_text().replace("lecture", "talk"))
    assert task(data_dir, tasks=("tpo",)).settings != before


def test_longest(data_dir):
    assert task(data_dir).longest == 4000 + 512
    assert task(data_dir, mode="options", tasks=("tpo",)).longest == 4000


def test_default_tasks():
    assert LEval().tasks == ("coursera", "gsm100", "quality", "tpo", "sci_fi")
    assert LEval(mode="options").tasks == ("coursera", "quality", "tpo", "sci_fi")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"mode": "options", "tasks": ("tpo", "gsm100")},
            "must have options to choose from, as the mode asks for, got 'gsm100'",
        ),
        ({"mode": "options", "tasks": ("toefl",)}, "must be one of coursera, .*, got 'toefl'"),
        ({"length": 0}, "greater than or equal to 1"),
    ],
)
def test_settings_that_do_not_fit(data_dir, settings, message):
    with pytest.raises(ValidationError, match=message):
        task(data_dir, **settings)


def test_as_many_answers_as_questions(data_dir):
    (data_dir / "leval" / "closed" / "tpo.jsonl").write_text('\n{"input": "a", "instructions": ["q"], "outputs": []}')
    with pytest.raises(DataError, match=r"tpo\.jsonl, line 2, is not what it should be: .*1 questions and 0 answers"):
        task(data_dir, tasks=("tpo",)).read()


def test_from_the_hub(data_dir, monkeypatch):
    asked = []

    def download(repository, file, repo_type):
        asked.append((repository, file, repo_type))
        return str(data_dir / "leval" / "closed" / file.rpartition("/")[2])

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert task(None, tasks=("tpo", "codeU")).settings == task(data_dir, tasks=("tpo", "codeU")).settings
    assert asked == [("L4NLP/LEval", f"LEval/Exam/{name}.jsonl", "dataset") for name in ("tpo", "codeU")]
