import json

import pytest

from ropewalk.eval.results import Config, Facts, Results, ResultsError, Row, read_config, read_rows

CONFIG = Config(
    task="passkey", version=1, settings={"lengths": [8]}, methods=("unmodified",), model="m", model_hash="h", seed=0,
    trained_window=8192,
)  # fmt: skip
FACTS = Facts(model="m", model_hash="h", dtype="float32", device="cpu", seed=0, commit="", versions={})


def row(example, error=None, **scores):
    return Row(
        task="passkey", version=1, method="unmodified", example=example, cell={"length": 8}, seconds=0.1, error=error,
        scores=scores, facts=FACTS,
    )  # fmt: skip


def test_rows_come_back(tmp_path):
    results = Results(tmp_path / "new" / "folder", CONFIG)
    rows = [row("a", exact_match=1.0), row("b", exact_match=0.0)]
    for one in rows:
        results.add(one)
    assert list(read_rows(tmp_path / "new" / "folder")) == rows
    assert read_config(tmp_path / "new" / "folder") == CONFIG


@pytest.mark.parametrize("cut", [1, 20, 200])
def test_half_a_line_is_written_again(tmp_path, cut):
    """Whenever the process was killed, nothing is lost and nothing there twice."""
    results = Results(tmp_path, CONFIG)
    results.add(row("a"))
    results.add(row("b"))
    path = tmp_path / "results.jsonl"
    path.write_bytes(path.read_bytes()[:-cut])
    again = Results(tmp_path, CONFIG)
    assert again.done == {("unmodified", "a")}
    again.add(row("b"))
    assert [one.example for one in read_rows(tmp_path)] == ["a", "b"]


def test_answers_with_any_characters_come_back(tmp_path):
    results = Results(tmp_path, CONFIG)
    odd = row("a").model_copy(update={"output": "a\u2028b\x85c\x1ed\r\n"})
    results.add(odd)
    assert list(read_rows(tmp_path)) == [odd]


def test_half_a_line_is_no_row(tmp_path):
    """A run may be read while it goes on."""
    Results(tmp_path, CONFIG).add(row("a"))
    path = tmp_path / "results.jsonl"
    path.write_text(path.read_text() + path.read_text()[:-30])
    assert [one.example for one in read_rows(tmp_path)] == ["a"]


def test_a_failed_example_is_tried_again(tmp_path):
    results = Results(tmp_path, CONFIG)
    results.add(row("a", error="RuntimeError: no"))
    assert results.done == set()
    results.add(row("a", exact_match=1.0))
    assert [one.error for one in read_rows(tmp_path)] == [None]
    assert Results(tmp_path, CONFIG).done == {("unmodified", "a")}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "was started with seed 0, not 1: go on with what it was started with, or name another folder"),
        ({"trained_window": 4096}, "with trained_window 8192, not 4096"),
        ({"methods": ("unmodified", "x")}, r'with methods \["unmodified"\], not \["unmodified", "x"\]'),
    ],
)
def test_another_run_is_refused(tmp_path, change, message):
    Results(tmp_path, CONFIG)
    with pytest.raises(ResultsError, match=message):
        Results(tmp_path, CONFIG.model_copy(update=change))


def test_a_run_that_did_not_record_the_trained_window_goes_on(tmp_path):
    before = json.loads(CONFIG.model_dump_json())
    del before["trained_window"]
    (tmp_path / "config.json").write_text(json.dumps(before))
    assert read_config(tmp_path).trained_window is None
    Results(tmp_path, CONFIG).add(row("a"))
    assert [one.example for one in read_rows(tmp_path)] == ["a"]


def test_what_cannot_be_read(tmp_path):
    with pytest.raises(ResultsError, match=r"holds no results: there is no config\.json"):
        read_config(tmp_path)
    (tmp_path / "results.jsonl").write_text("")
    with pytest.raises(ResultsError, match=r"holds results.jsonl without a config.json"):
        Results(tmp_path, CONFIG)
    (tmp_path / "config.json").write_text(json.dumps({"task": "passkey"}))
    with pytest.raises(ResultsError, match=r"config.json cannot be read: version: Field required"):
        read_config(tmp_path)
    (tmp_path / "results.jsonl").write_text('{"task": 3}\n')
    with pytest.raises(ResultsError, match=r"results.jsonl, line 1, is no row: task"):
        list(read_rows(tmp_path))


@pytest.mark.parametrize("failed_in", [0, 1])
def test_an_example_that_another_process_did_in_the_end(tmp_path, failed_in):
    """Whichever file is read first."""
    Results(tmp_path, CONFIG, process=failed_in).add(row("a", "killed"))
    assert Results(tmp_path, CONFIG).done == set()
    Results(tmp_path, CONFIG, process=1 - failed_in).add(row("a", exact_match=1.0))
    assert [one.scores for one in read_rows(tmp_path)] == [{"exact_match": 1.0}]
    assert Results(tmp_path, CONFIG).done == {("unmodified", "a")}
