import json
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("lm_eval")

import lm_eval
import lm_eval.tasks
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.dummy import DummyLM
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from ropewalk.eval import report
from ropewalk.eval.methods import Method, parse
from ropewalk.eval.report import runs
from ropewalk.eval.results import Results, read_rows
from ropewalk.eval.runner import config_of, facts_of, run
from ropewalk.eval.subjects import Dummy, Model
from ropewalk.eval.tasks.short import BENCHMARKS, DataError, Short, ShortSettings, harness
from ropewalk.eval.tasks.short.files import arc_challenge, hellaswag, mmlu, truthfulqa_mc2
from ropewalk.eval.tasks.short.harness import load
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
    return Model(models.load(sources.find(str(folder)), dtype="float32", device="cpu"), 2048, "hash")


def task(data, *names, **settings):
    return Short(ShortSettings(tasks=names or tuple(BENCHMARKS), **settings), data)


def ask(folder, one, subject, methods=(PLAIN,), **options):
    results = Results(folder, config_of(one, methods, subject, 0))
    counts = run(one, methods, subject, results, facts_of(subject, 0), **options)
    return counts, list(read_rows(folder))


def shots_of(one):
    return [requests[0].args[0] for requests in one.requests]


@pytest.fixture
def asked(monkeypatch):
    """The names of lm-eval's tasks in each call of a language model."""
    calls = []

    def ask(model, requests):
        calls.append([request.task_name for request in requests])
        harness.ask(model, requests)

    monkeypatch.setattr("ropewalk.eval.tasks.short.ask", ask)
    return calls


def test_every_task_is_asked(data, tmp_path):
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


def test_settings_say_what_was_used(data):
    one = task(data, "mmlu", "arc_challenge", "truthfulqa_mc2", "mmlu")
    assert one.settings.tasks == ("arc_challenge", "mmlu", "truthfulqa_mc2")
    assert one.settings.shots == {"arc_challenge": 25, "mmlu": 5, "truthfulqa_mc2": 0}
    assert one.settings.shots_from == {"arc_challenge": "test", "mmlu": "dev", "truthfulqa_mc2": ""}
    assert one.settings.asked == {"arc_challenge": 28, "mmlu": 2 * 57, "truthfulqa_mc2": 1}
    assert one.settings.lm_eval == lm_eval.__version__
    assert one.shots_asked == ["arc_challenge"]


def test_a_task_that_is_not_there():
    with pytest.raises(ValueError, match="no short task 'helaswag'; there are arc_challenge, hellaswag, "):
        ShortSettings(tasks=("gsm8k", "helaswag"))


def test_the_first_questions(data, tmp_path, monkeypatch):
    one = task(data, "mmlu", "gsm8k", questions=58)
    assert one.settings.asked == {"mmlu": 58, "gsm8k": 8}  # of two questions a subject, and of eight
    assert one.settings.texts == task(data, "mmlu", "gsm8k").settings.texts
    names = [example.name for example in one.examples()]
    assert names[:3] == [f"mmlu_{SUBJECTS[0]}-0", f"mmlu_{SUBJECTS[0]}-1", f"mmlu_{SUBJECTS[1]}-0"]
    # A limit is spread over all: 2 of 66. Requests are made for those of their two tasks alone.
    built = []
    monkeypatch.setattr(ConfigurableTask, "build_all_requests", counted(ConfigurableTask.build_all_requests, built))
    _, rows = ask(tmp_path, one, Dummy(), limit=2)
    assert [row.example for row in rows] == [f"mmlu_{SUBJECTS[0]}-0", f"mmlu_{SUBJECTS[32]}-0"]
    assert built == [2, 1]


def counted(build, built):
    def building(self, **options):
        build(self, **options)
        built.append(len({request.doc_id for request in self.instances}))

    return building


def test_a_batch_is_asked_benchmark_by_benchmark(data, asked):
    one = task(data)
    wanted = ["gsm8k-1", f"mmlu_{SUBJECTS[0]}-1", f"mmlu_{SUBJECTS[1]}-0", "gsm8k-0", "hellaswag-2"]
    examples = {example.name: example for example in one.examples()}
    outcomes = one.outcomes([examples[name] for name in wanted], Dummy())
    subjects = [f"mmlu_{subject}" for subject in SUBJECTS[:2] for _ in range(4)]
    assert asked == [["gsm8k"], subjects, ["gsm8k"], ["hellaswag"] * 4]
    assert [outcome.target.rpartition(" ")[2] for outcome in outcomes] == ["3", "A", "A", "2", "on."]


def test_batches_hold_questions_of_one_task_where_they_can(data, asked, tmp_path):
    ask(tmp_path, task(data, "gsm8k", "hellaswag", "truthfulqa_mc2"), Dummy(batch_size=4))
    # Of 12 questions of HellaSwag, 1 of TruthfulQA and 8 of GSM8K.
    assert [(call[0], len(call)) for call in asked] == [
        *[("hellaswag", 16)] * 3,
        *[("truthfulqa_mc2", 5), ("gsm8k", 3), ("gsm8k", 4), ("gsm8k", 1)],
    ]


def test_the_hash_is_of_the_questions_and_of_the_shots(data, tmp_path):
    def hash_of(folder):
        return task(folder, "arc_challenge").settings.texts["arc_challenge"]

    files = tmp_path / "short" / "arc"
    write_lines(files / "ARC-Challenge-Test.jsonl", map(arc_line, range(28)))
    assert hash_of(tmp_path) == hash_of(data)
    write_lines(files / "ARC-Challenge-Train.jsonl", map(arc_line, range(28, 60)))
    with_train = hash_of(tmp_path)
    write_lines(files / "ARC-Challenge-Train.jsonl", map(arc_line, range(29, 60)))
    assert len({hash_of(data), with_train, hash_of(tmp_path)}) == 3


def test_shots_are_from_the_training_questions_where_there_are_any(data, tmp_path):
    [one] = load(["arc_challenge"], data)
    assert one.shots_are_asked
    for i, prompt in enumerate(shots_of(one)):
        assert prompt.count("Question:") == 26
        assert prompt.count(f"What is {i} + 1?") == 1  # not among its own shots
    write_lines(tmp_path / "short" / "arc" / "ARC-Challenge-Test.jsonl", map(arc_line, range(28)))
    write_lines(tmp_path / "short" / "arc" / "ARC-Challenge-Train.jsonl", map(arc_line, range(100, 130)))
    [one] = load(["arc_challenge"], tmp_path, questions=2)
    assert (one.shots_are_asked, one.shots_from) == (False, "train")
    assert [prompt.count("What is 1") > 24 for prompt in shots_of(one)] == [True, True]


def test_shots_do_not_depend_on_how_many_are_asked(data):
    [all_of_them], [few], [others] = (
        load(["gsm8k"], data, questions, seed) for questions, seed in ((None, 0), (3, 0), (3, 1))
    )
    assert shots_of(all_of_them)[:3] == shots_of(few)
    assert len(shots_of(all_of_them)) == 8
    assert shots_of(few) != shots_of(others)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_scores_are_those_of_lm_eval(data, tiny, tmp_path, batch_size):
    names = ["arc_challenge", "hellaswag", "truthfulqa_mc2", "gsm8k"]
    _, rows = ask(tmp_path, task(data, *names, questions=3), replace(tiny, batch_size=batch_size))
    there = lm_eval.simple_evaluate(
        HFLM(pretrained=tiny.loaded.model, tokenizer=tiny.loaded.tokenizer, max_length=tiny.trained_window),
        tasks=[one.task for one in load(names, data)],
        limit=3,
        fewshot_random_seed=0,
        bootstrap_iters=0,
        task_manager=TaskManager(include_defaults=False),
    )
    for name in names:
        mine = [row for row in rows if row.cell["task"] == name]
        for metric, value in there["results"][name].items():
            metric = metric.removesuffix(",none")
            if metric in mine[0].scores:
                mean = sum(row.scores[metric] for row in mine) / len(mine)
                assert mean == pytest.approx(value, abs=1e-4), (name, metric)
        samples = {sample["doc_id"]: sample for sample in there["samples"][name]}
        assert len(mine) == len(samples) == (1 if name == "truthfulqa_mc2" else 3)
        for row in mine:
            sample = samples[int(row.example.rpartition("-")[2])]
            [*answers] = (answer[0] for answer in sample["resps"])
            if name == "gsm8k":
                assert row.output == answers[0]
            else:
                best = answers.index(max(answers))
                assert row.output == sample["arguments"][best][1].strip()


@pytest.mark.filterwarnings("ignore:a text of .* tokens uses relative positions")
def test_a_method_changes_the_answers(data, tiny, tmp_path, monkeypatch):
    made = []

    class Counted(HFLM):
        def __init__(self, **options):
            made.append(options["pretrained"])
            super().__init__(**options)

    monkeypatch.setattr("lm_eval.models.huggingface.HFLM", Counted)
    # Prompts of some 150 tokens, most of them past the neighbor window.
    maps = "selfextend(group_size=1, window=8)", "selfextend(group_size=32, window=2)"
    methods = PLAIN, *(parse(text, 1, tiny.trained_window) for text in maps)
    _, rows = ask(tmp_path, task(data, "gsm8k", questions=3), tiny, methods)
    assert made == [tiny.loaded.model]
    outputs = [[row.output for row in rows if row.method == method.name] for method in methods]
    assert outputs[0] == outputs[1] != outputs[2]


def test_a_stopped_run_goes_on(data, tmp_path):
    class Stopped(Dummy):
        def encode(self, text):
            if len(list(read_rows(tmp_path))) == 6:
                raise KeyboardInterrupt
            return super().encode(text)

    one = task(data, "gsm8k", "arc_challenge")
    with pytest.raises(KeyboardInterrupt):
        ask(tmp_path, one, Stopped(batch_size=3))
    before = (tmp_path / "results.jsonl").read_text()
    counts, rows = ask(tmp_path, one, Dummy(batch_size=4))
    assert (counts.done_before, counts.done, len(rows)) == (6, 30, 36)
    assert (tmp_path / "results.jsonl").read_text().startswith(before)
    assert len({row.key for row in rows}) == 36


def test_questions_that_fail_are_recorded(data, tmp_path, monkeypatch):
    one, subject = task(data, "gsm8k"), Dummy(batch_size=3)
    answers = DummyLM.generate_until

    def generate_until(self, requests, **options):
        if any(request.doc_id == 4 for request in requests):
            raise RuntimeError("out of\nmemory")
        return answers(self, requests, **options)

    monkeypatch.setattr(DummyLM, "generate_until", generate_until)
    counts, rows = ask(tmp_path, one, subject)
    assert (counts.done, counts.failed) == (7, 1)
    assert {row.example: row.error for row in rows if row.error} == {"gsm8k-4": "RuntimeError: out of memory"}
    monkeypatch.undo()
    assert ask(tmp_path, one, subject)[0].done == 1


def test_infinite_is_refused_before_anything_is_asked(data, tmp_path):
    methods = PLAIN, parse("infinite(window=64)", 1, 2048)
    with pytest.raises(ValueError, match=r"^infinite\(window=64\) reads texts block by block, .* leave it out$"):
        ask(tmp_path, task(data, "gsm8k"), Dummy(), methods)
    assert not (tmp_path / "results.jsonl").exists()


def test_a_report_shows_all_scores_by_task(data, tmp_path):
    ask(tmp_path, task(data, "arc_challenge", "gsm8k", questions=2), Dummy())
    (section,) = report.build([runs.read(tmp_path)]).sections
    names = "Acc", "Acc norm", "Exact match (flexible-extract)", "Exact match (strict-match)"
    assert sorted(table.caption for table in section.tables) == [f"{name} by task" for name in names]
    assert all("better" not in table.note for table in section.tables)


def test_files_become_what_the_hub_has(data):
    folder = data / "short"
    assert arc_challenge(folder).asked[0]["choices"] == {"text": ["1", "2"], "label": ["A", "B"]}
    assert hellaswag(folder).shots is None
    assert truthfulqa_mc2(folder).asked[0]["mc2_targets"] == {
        "choices": ["No", "Not so", "Yes", "It is", "Of course"],
        "labels": [1, 1, 0, 0, 0],
    }
    assert mmlu(folder, "anatomy").shots[1] == {
        "question": "Which, in dev, is 1?",
        "choices": ["1", "a", "b", "c"],
        "answer": 0,
        "subject": "anatomy",
    }


def test_other_forms_of_mmlu(tmp_path):
    for part in ("dev", "test"):
        path = tmp_path / "mmlu" / part / f"law_{part}.csv"
        path.parent.mkdir(parents=True)
        # U+0085 is no end of a line.
        path.write_text("question,choice0,choice1,choice2,choice3,answer\nWhich\x85one?,a,b,c,d,3\n", encoding="utf-8")
    [question] = mmlu(tmp_path, "law").asked
    assert (question["question"], question["answer"]) == ("Which\x85one?", 3)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (None, "cannot read .*ARC-Challenge-Test.jsonl .No such file or directory.: --data-dir must hold it"),
        (['{"id": 1}'], "ARC-Challenge-Test.jsonl holds something else than questions: KeyError 'question'"),
        (["nonsense"], "ARC-Challenge-Test.jsonl holds something else than questions: JSONDecodeError"),
        ([json.dumps(arc_line(0))] * 25, "arc_challenge asks with 25 solved examples, .* 25 questions to ask and 24"),
    ],
)
def test_bad_data(tmp_path, lines, message):
    if lines is not None:
        (tmp_path / "short" / "arc").mkdir(parents=True)
        (tmp_path / "short" / "arc" / "ARC-Challenge-Test.jsonl").write_text("\n".join(lines))
    with pytest.raises(DataError, match=message):
        load(["arc_challenge"], tmp_path)


def test_a_hub_that_cannot_be_reached(monkeypatch):
    import datasets

    def load_dataset(**options):
        raise ConnectionError("no\nroute")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError, match=r"gsm8k cannot be loaded \(ConnectionError: no route\): name a folder"):
        load(["gsm8k"])
