# SPDX-License-Identifier: Apache-2.0
import json
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("lm_eval")

import lm_eval
import lm_eval.tasks
from lm_eval.models.dummy import DummyLM
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from ropewalk.eval import report
from ropewalk.eval.data_files import DataError
from ropewalk.eval.methods import Method, parse
from ropewalk.eval.results import Results, read
from ropewalk.eval.runner import config_of, facts_of, run
from ropewalk.eval.subjects import Dummy, Hashes, Model
from ropewalk.eval.tasks.short import BENCHMARKS, Short
from ropewalk.integrations.transformers import models, sources
from ropewalk.testing.saved import save_tiny_model, tiny_tokenizer

SUBJECTS = sorted(
    file.stem.removeprefix("mmlu_") for file in Path(lm_eval.tasks.__file__).parent.glob("mmlu/default/mmlu_*")
)
PLAIN, OTHER = Method("unmodified"), Method("other")


def arc_line(i):
    choices = [{"text": f"{i + 1}", "label": "A"}, {"text": f"{i + 2}", "label": "B"}]
    return {"id": f"q{i}", "question": {"stem": f"What is {i} + 1?", "choices": choices}, "answerKey": "A"}


def write_lines(path, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A few questions of each task, in files as the real ones."""
    folder = tmp_path_factory.mktemp("data") / "short"
    write_lines(folder / "arc" / "ARC-Challenge-Test.jsonl", map(arc_line, range(28)))
    scene = {"activity_label": "Walking", "ctx_a": "A man walks.", "ctx_b": "he", "label": 1}
    endings = ["sits down.", "walks on.", "sings.", "is a lamp."]
    write_lines(
        folder / "hellaswag" / "hellaswag_val_1000.jsonl",
        ({**scene, "ctx_a": f"A man walks {i} miles.", "endings": endings} for i in range(12)),
    )
    write_lines(
        folder / "gsm8k" / "test.jsonl",
        ({"question": f"Two and {i}?", "answer": f"It is <<2+{i}={i + 2}>>.\n#### {i + 2}"} for i in range(8)),
    )
    for subject in SUBJECTS:
        for part, count in (("dev", 5), ("test", 2)):
            path = folder / "mmlu" / part / f"{subject}_{part}.csv"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(f'"Which, in {part}, is {i}?",{i},a,b,c,A\n' for i in range(count)))
    truth = folder / "truthfulqa" / "TruthfulQA.csv"
    truth.parent.mkdir()
    truth.write_text(
        "Type,Category,Question,Best Answer,Correct Answers,Incorrect Answers,Source\n"
        "A,B,Is it so?,No,No; Not so,Yes; It is; Of course,nowhere\n"
    )
    return folder.parent


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A model that computes."""
    folder = save_tiny_model(tmp_path_factory.mktemp("model"), trained_window=2048, eos_token_id=1)
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = "<unk>"  # number 1
    tokenizer.save_pretrained(folder)
    return Model(models.load(sources.find(str(folder)), dtype="float32", device="cpu"), 2048, Hashes("hash"))


def task(data, *names, **settings):
    return Short(data_dir=data, tasks=names or tuple(BENCHMARKS), **settings)


def ask(folder, one, subject, methods=(PLAIN,), **options):
    results = Results(folder, config_of(one, methods, subject, 0), **options)
    counts = run(one, methods, subject, results, facts_of(one, subject, 0))
    return counts, list(read(folder).rows)


@pytest.fixture
def asked(monkeypatch):
    """The requests of each call of a language model."""
    calls = []

    def listening(answers):
        def answer(self, requests, disable_tqdm=False):
            calls.append(requests)
            return answers(self, requests, disable_tqdm)

        return answer

    for kind in ("loglikelihood", "generate_until"):
        monkeypatch.setattr(DummyLM, kind, listening(getattr(DummyLM, kind)))
    return calls


def prompts(one, asked, numbers=None):
    """Of the questions of these numbers, or of all, by number."""
    asked.clear()
    examples = list(one.examples())
    one.outcomes(examples if numbers is None else [examples[i] for i in numbers], Dummy())
    [requests] = asked
    return {request.doc_id: request.args[0] for request in requests}


def test_every_task_is_asked_at_once(data, tmp_path, asked):
    one = task(data, questions=2)
    counts, rows = ask(tmp_path, one, Dummy(), methods=(PLAIN, OTHER))
    assert (counts.done_before, counts.done, counts.failed) == (0, 2 * (2 + 2 + 2 + 1 + 2), 0)
    assert [row.example for row in rows[:3]] == ["arc_challenge-0", "arc_challenge-1", "hellaswag-0"]
    assert {tuple(row.cell) for row in rows} == {("task",), ("task", "subject")}
    scores = {row.cell["task"]: set(row.scores) for row in rows}
    assert scores == {
        "arc_challenge": {"acc", "acc_norm"},
        "hellaswag": {"acc", "acc_norm"},
        "mmlu": {"acc"},
        "truthfulqa_mc2": {"acc"},
        "gsm8k": {"exact_match,strict-match", "exact_match,flexible-extract"},
    }
    targets = {row.example: row.target for row in rows}
    assert targets["arc_challenge-0"] == "1"
    assert targets[f"mmlu_{SUBJECTS[0]}-0"] == "A"
    assert targets["gsm8k-0"].endswith("#### 2")
    assert [len(call) for call in asked] == [2 * 2, 2 * 4, 2 * 4, 5, 2] * 2


def test_settings_say_what_was_used(data):
    one = task(data, "mmlu", "arc_challenge", "truthfulqa_mc2", "mmlu", questions=58)
    assert one.settings["tasks"] == ["arc_challenge", "mmlu", "truthfulqa_mc2"]
    assert one.settings["shots"] == {"arc_challenge": 25, "mmlu": 5, "truthfulqa_mc2": 0}
    assert one.settings["shots_from"] == {"arc_challenge": "test", "mmlu": "dev", "truthfulqa_mc2": ""}
    # The first: all 28, the second question of one subject, and the only one.
    assert one.settings["asked"] == {"arc_challenge": 28, "mmlu": 58, "truthfulqa_mc2": 1}
    assert one.settings["lm_eval"] == lm_eval.__version__
    assert "no training questions of arc_challenge: their shots" in one.notes[0]
    assert task(data, "truthfulqa_mc2").notes == []
    names = [example.name for example in one.examples()][28:31]
    assert names == [f"mmlu_{SUBJECTS[0]}-0", f"mmlu_{SUBJECTS[0]}-1", f"mmlu_{SUBJECTS[1]}-0"]


def test_a_limit_asks_no_more(data, tmp_path, asked):
    """It is spread over all, 2 of 66; those before them are not asked, though their shots are drawn."""
    _, rows = ask(tmp_path, task(data, "gsm8k", "hellaswag"), Dummy(), limit=3)
    assert [row.example for row in rows] == ["hellaswag-0", "hellaswag-6", "gsm8k-1"]
    assert [[one.doc_id for one in call] for call in asked] == [[0] * 4 + [6] * 4, [1]]


def test_the_hash_is_of_the_questions_and_of_the_shots(data, tmp_path):
    def hash_of(folder):
        return task(folder, "arc_challenge").settings["texts"]["arc_challenge"]

    files = tmp_path / "short" / "arc"
    write_lines(files / "ARC-Challenge-Test.jsonl", map(arc_line, range(28)))
    assert hash_of(tmp_path) == hash_of(data)
    write_lines(files / "ARC-Challenge-Train.jsonl", map(arc_line, range(28, 60)))
    with_train = hash_of(tmp_path)
    write_lines(files / "ARC-Challenge-Train.jsonl", map(arc_line, range(29, 60)))
    assert len({hash_of(data), with_train, hash_of(tmp_path)}) == 3


def test_shots_are_from_the_training_questions_where_there_are_any(data, tmp_path, asked):
    for i, prompt in prompts(task(data, "arc_challenge"), asked).items():
        assert prompt.count("Question:") == 26
        assert prompt.count(f"What is {i} + 1?") == 1  # not among its own shots
    write_lines(tmp_path / "short" / "arc" / "ARC-Challenge-Test.jsonl", map(arc_line, range(28)))
    write_lines(tmp_path / "short" / "arc" / "ARC-Challenge-Train.jsonl", map(arc_line, range(100, 130)))
    one = task(tmp_path, "arc_challenge", questions=2)
    assert (one.notes, one.settings["shots_from"]) == ([], {"arc_challenge": "train"})
    assert [prompt.count("What is 1") > 24 for prompt in prompts(one, asked).values()] == [True, True]


def test_shots_do_not_depend_on_what_else_is_asked(data, asked):
    everything = prompts(task(data, "gsm8k"), asked)
    assert len(everything) == 8
    few = prompts(task(data, "gsm8k", questions=3), asked)
    assert few == {i: everything[i] for i in range(3)}
    assert prompts(task(data, "gsm8k"), asked, [1, 5]) == {i: everything[i] for i in (1, 5)}
    assert prompts(task(data, "gsm8k", questions=3, seed=1), asked) != few


def test_scores_are_those_of_lm_eval(data, tiny, tmp_path):
    names = ["arc_challenge", "hellaswag", "truthfulqa_mc2", "gsm8k"]
    one = task(data, *names)
    # Three questions of each, of one the only.
    examples = [example for example in one.examples() if example.about[1] < 3]
    mine = {
        example.name: outcome
        for batch in one.batches(examples, 2)
        for example, outcome in zip(batch, one.outcomes(batch, replace(tiny, batch_size=2)), strict=True)
    }
    there = lm_eval.simple_evaluate(
        HFLM(pretrained=tiny.loaded.model, tokenizer=tiny.loaded.tokenizer, max_length=tiny.trained_window),
        tasks=list(dict.fromkeys(example.about[0].task for example in examples)),
        limit=3,
        fewshot_random_seed=0,
        bootstrap_iters=0,
        task_manager=TaskManager(include_defaults=False),
    )
    samples = [(f"{name}-{one['doc_id']}", one) for name in names for one in there["samples"][name]]
    assert {name for name, _ in samples} == {*mine} == {example.name for example in examples}
    for name, sample in samples:
        outcome, answers = mine[name], [answer for answer, *_ in sample["resps"]]
        for metric in sample["metrics"]:
            key = metric if sample["filter"] == "none" else f"{metric},{sample['filter']}"
            assert outcome.scores[key] == pytest.approx(sample[metric], abs=1e-4), (name, metric)
        assert outcome.output == (
            answers[0] if "gsm8k" in name else sample["arguments"][answers.index(max(answers))][1].strip()
        )


@pytest.mark.filterwarnings("ignore:a text of .* tokens uses relative positions")
def test_a_method_changes_the_answers(data, tiny, tmp_path):
    # Prompts of some 150 tokens, most of them past the neighbor window.
    maps = "selfextend(group_size=1, window=8)", "selfextend(group_size=32, window=2)"
    methods = PLAIN, *(parse(text, 1, tiny.trained_window) for text in maps)
    _, rows = ask(tmp_path, task(data, "gsm8k", questions=3), tiny, methods)
    outputs = [[row.output for row in rows if row.method == method.name] for method in methods]
    assert outputs[0] == outputs[1] != outputs[2]


def test_a_stopped_run_goes_on_by_task(data, tmp_path, monkeypatch):
    def stop(self, requests, disable_tqdm=False):
        raise KeyboardInterrupt

    one = task(data, "gsm8k", "hellaswag")
    with monkeypatch.context() as stopped:
        stopped.setattr(DummyLM, "generate_until", stop)
        with pytest.raises(KeyboardInterrupt):
            ask(tmp_path, one, Dummy())
    before = (tmp_path / "results.jsonl").read_text()
    counts, rows = ask(tmp_path, one, Dummy())
    assert (counts.done_before, counts.done, len({row.key for row in rows})) == (12, 8, 20)
    assert (tmp_path / "results.jsonl").read_text().startswith(before)


def test_questions_that_fail_are_recorded(data, tmp_path, monkeypatch):
    one, answers = task(data, "gsm8k", questions=5), DummyLM.generate_until

    def generate_until(self, requests, disable_tqdm=False):
        if any(request.doc_id == 4 for request in requests):
            raise RuntimeError("out of\nmemory")
        return answers(self, requests, disable_tqdm)

    with monkeypatch.context() as failing:
        failing.setattr(DummyLM, "generate_until", generate_until)
        counts, rows = ask(tmp_path, one, Dummy())
    assert (counts.done, counts.failed) == (4, 1)
    assert {row.example: row.error for row in rows if row.error} == {"gsm8k-4": "RuntimeError: out of memory"}
    assert ask(tmp_path, one, Dummy())[0].done == 1


def test_a_report_shows_all_scores_by_task(data, tmp_path):
    ask(tmp_path, task(data, "arc_challenge", "gsm8k", questions=2), Dummy())
    (section,) = report.build([report.read(tmp_path)]).sections
    names = "Acc", "Acc norm", "Exact match (flexible-extract)", "Exact match (strict-match)"
    assert sorted(table.caption for table in section.tables) == [f"{name} by task" for name in names]
    assert all("better" not in table.note for table in section.tables)


def test_files_become_what_the_hub_has(data):
    def read(name, subject=""):
        return BENCHMARKS[name].questions(data, subject)

    assert read("arc_challenge")["test"][0]["choices"] == {"text": ["1", "2"], "label": ["A", "B"]}
    assert [*read("hellaswag")] == ["validation"]
    [question] = read("truthfulqa_mc2")["validation"]
    assert question["mc2_targets"] == {
        "choices": ["No", "Not so", "Yes", "It is", "Of course"],
        "labels": [1, 1, 0, 0, 0],
    }
    assert read("mmlu", "anatomy")["dev"][1] == {
        "question": "Which, in dev, is 1?",
        "choices": ["1", "a", "b", "c"],
        "answer": 0,
        "subject": "anatomy",
    }


def test_other_forms_of_mmlu(tmp_path):
    path = tmp_path / "short" / "mmlu" / "test" / "law_test.csv"
    path.parent.mkdir(parents=True)
    # U+0085 is no end of a line.
    path.write_text("question,choice0,choice1,choice2,choice3,answer\nWhich\x85one?,a,b,c,d,3\n", encoding="utf-8-sig")
    [question] = BENCHMARKS["mmlu"].questions(tmp_path, "law")["test"]
    assert (question["question"], question["answer"]) == ("Which\x85one?", 3)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (None, "cannot read .*Challenge-Test.jsonl .No such file or directory.: --data-dir must hold short/arc/ARC"),
        (['{"id": 1}'], "ARC-Challenge-Test.jsonl holds something else than questions: KeyError 'question'"),
        (["nonsense"], "ARC-Challenge-Test.jsonl, line 1, is not what it should be: Invalid JSON"),
        ([json.dumps(arc_line(0))] * 25, "arc_challenge asks with 25 solved examples, .* 25 questions to ask and 24"),
    ],
)
def test_bad_data(tmp_path, lines, message):
    if lines is not None:
        (tmp_path / "short" / "arc").mkdir(parents=True)
        (tmp_path / "short" / "arc" / "ARC-Challenge-Test.jsonl").write_text("\n".join(lines))
    with pytest.raises(DataError, match=message):
        task(tmp_path, "arc_challenge").read()


def test_a_hub_that_cannot_be_reached(monkeypatch):
    import datasets

    def load_dataset(**options):
        raise ConnectionError("no\nroute")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError, match=r"gsm8k cannot be loaded \(ConnectionError: no route\): name a folder"):
        task(None, "gsm8k").read()
