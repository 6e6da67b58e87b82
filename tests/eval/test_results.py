# SPDX-License-Identifier: Apache-2.0
import json
import os
import subprocess
import sys

import pytest

from ropewalk.eval.results import Config, Facts, Results, ResultsError, Row, read, read_config
from ropewalk.eval.share import ALL, Share
from ropewalk.eval.tasks.passkey import Passkey

CONFIG = Config(
    task="passkey", version=1, settings={"lengths": [8]}, methods=("unmodified",), model="m", model_hash="h",
    config_hash="c", tokenizer_hash="t", seed=0, trained_window=8192,
)  # fmt: skip
FACTS = Facts(
    task="passkey", version=1, model="m", model_hash="h", config_hash="c", tokenizer_hash="t", dtype="float32",
    device="cpu", seed=0, commit="", versions={},
)  # fmt: skip


def row(example, error=None, facts=FACTS, **scores):
    return Row(
        method="unmodified", example=example, cell={"length": 8}, seconds=0.1, error=error, scores=scores, facts=facts
    )


def add(folder, *rows, config=CONFIG, share=ALL):
    with Results(folder, config, share) as results:
        for one in rows:
            results.add(one)


def done(folder):
    with Results(folder, CONFIG) as results:
        return {example for _, example in results.done}


def examples(folder):
    return [one.example for one in read(folder).rows]


def test_rows_come_back(tmp_path):
    later = FACTS.model_copy(update={"commit": "abc"})
    # Also what is large, and characters that end lines.
    rows = [row("a", exact_match=1.0), row("b", score=1e49), row("c\u2028\x85\x1e\r\n", facts=later)]
    add(tmp_path / "new" / "folder", *rows)
    assert read(tmp_path / "new" / "folder").rows == tuple(rows)
    assert read_config(tmp_path / "new" / "folder") == CONFIG
    files = sorted(path.name for path in (tmp_path / "new" / "folder").iterdir() if not path.name.startswith("."))
    assert files == ["config.json", *sorted(f"facts-{one.name}.json" for one in (FACTS, later)), "results.jsonl"]


@pytest.mark.parametrize(
    ("task", "example", "cluster"),
    [
        ("passkey", "4096-0.100-7", "4096-0.100"),
        ("needle", "4096-0.100-2", "4096-0.100"),
        ("passkey-length", "16-3", "16-3"),
        ("perplexity", "4096-a-book", "a-book"),
        ("perplexity", "32768-a-book", "a-book"),
        ("leval", "sci_fi-3-2-fact", "sci_fi-3"),
        ("leval", "topic_retrieval_longchat-12-1", "topic_retrieval_longchat-12"),
        ("short", "arc_challenge-4", "arc_challenge-4"),
        ("somebody_elses", "a-b-c", "a-b-c"),
    ],
)
def test_what_was_sampled_is_known_of_rows_that_do_not_say_it(tmp_path, task, example, cluster):
    facts = FACTS.model_copy(update={"task": task})
    config = CONFIG.model_copy(update={"task": task})
    (tmp_path / "old").mkdir()
    line = row(example, facts=facts).model_dump(mode="json", exclude={"cluster"})
    add(tmp_path / "old", config=config)
    add(tmp_path / "new", row(example, facts=facts).model_copy(update={"cluster": "book 7"}), config=config)
    facts_file = next((tmp_path / "new").glob("facts-*.json"))
    (tmp_path / "old" / facts_file.name).write_bytes(facts_file.read_bytes())
    (tmp_path / "old" / "results.jsonl").write_text(json.dumps(line) + "\n")
    assert read(tmp_path / "old").rows[0].cluster == cluster
    assert read(tmp_path / "new").rows[0].cluster == "book 7"


def as_once(*rows):
    """Lines as they were when each held its facts: with what is now one of them beside the others."""
    for one in rows:
        facts = one.facts.model_dump()
        beside = {name: facts.pop(name) for name in ("task", "version")}
        yield json.dumps({**beside, **one.model_dump(), "facts": facts}) + "\n"


def test_a_setting_that_came_later_had_its_default(tmp_path):
    """So a folder from before can be gone on with, and with nothing else."""
    add(tmp_path, row("a"))
    now = CONFIG.model_copy(update={"settings": Passkey(lengths=(8,)).settings})
    assert "new_tokens" not in CONFIG.settings
    assert now.settings["new_tokens"] is None
    add(tmp_path, row("b"), config=now)
    assert examples(tmp_path) == ["a", "b"]
    assert read_config(tmp_path) == CONFIG
    for other in ({"new_tokens": 9}, {"tiled": True}, {"digits": 8}):
        with pytest.raises(ResultsError, match="was started with settings"):
            add(tmp_path, config=now.model_copy(update={"settings": {**now.settings, **other}}))


def test_rows_that_hold_their_facts_are_read(tmp_path):
    rows = [row("a", exact_match=1.0), row("b", "RuntimeError: no")]
    add(tmp_path)
    (tmp_path / "results.jsonl").write_text("".join(as_once(*rows)))
    assert read(tmp_path).rows == tuple(rows)
    add(tmp_path, row("b", exact_match=0.0))
    assert examples(tmp_path) == ["a", "b"]


@pytest.mark.parametrize("cut", [1, 20, 80])
def test_half_a_line_is_written_again(tmp_path, cut):
    """Whenever the process was killed, nothing is lost and nothing there twice."""
    add(tmp_path, row("a"), row("b"))
    path = tmp_path / "results.jsonl"
    path.write_bytes(path.read_bytes()[:-cut])
    assert examples(tmp_path) == ["a"], "a run may be read while it goes on"
    assert done(tmp_path) == {"a"}
    add(tmp_path, row("b"))
    assert examples(tmp_path) == ["a", "b"]
    assert read(tmp_path).damaged == ()


@pytest.mark.parametrize(
    "damage", [b"", b"{", b"null", b"\xff\x00", b'{"method": "unmodified"}', b"[" * 10**5, b'{"seconds": NaN}']
)
def test_a_damaged_line_costs_its_example_alone(tmp_path, damage):
    add(tmp_path, row("a"), row("b"), row("c"))
    path = tmp_path / "results.jsonl"
    lines = path.read_bytes().split(b"\n")
    path.write_bytes(before := b"\n".join([lines[0], damage, *lines[2:]]))
    assert examples(tmp_path) == ["a", "c"]
    [told] = read(tmp_path).damaged
    assert told.startswith("results.jsonl, line 2, is no row: ")
    assert done(tmp_path) == {"a", "c"}
    add(tmp_path, row("b"))
    assert path.read_bytes().startswith(before), "nothing is lost"
    assert examples(tmp_path) == ["a", "c", "b"]


@pytest.mark.parametrize(
    ("task", "scores"),
    [
        *(
            ("anything", {"score": text})
            for text in ("NaN", "Infinity", "-Infinity", "1e400", "1e308", "-1e51", "null")
        ),
        *(("passkey", {"exact_match": text}) for text in ("-0.5", "1.01", "1e49")),
        ("perplexity", {"nll": 1, "tokens": 0}),
        ("perplexity", {"nll": -1, "tokens": 1}),
        ("perplexity", {"nll_8": 7001, "tokens_8": 10}),
    ],
)
def test_what_is_no_score_damages_its_line(tmp_path, task, scores):
    facts, config = (one.model_copy(update={"task": task}) for one in (FACTS, CONFIG))
    add(tmp_path, row("a", facts=facts), row("b", facts=facts), config=config)
    path = tmp_path / "results.jsonl"
    first, second = path.read_text().splitlines()
    written = ", ".join(f'"{name}": {value}' for name, value in scores.items())
    path.write_text(f'{{"scores": {{{written}}}, {first[1:]}\n{second}\n')
    assert examples(tmp_path) == ["b"]
    [told] = read(tmp_path).damaged
    assert told.startswith(f"results.jsonl, line 1, is no row: scores.{next(iter(scores))}: Input should be ")


@pytest.mark.parametrize(
    ("name", "value"),
    [("task", "needle"), ("version", 2), ("model", "n"), ("seed", 1)]
    + [(f"{of}_hash", "g") for of in ("model", "config", "tokenizer")],
)
@pytest.mark.parametrize("old", [False, True])
def test_rows_of_something_else_are_refused_by_name(tmp_path, name, value, old):
    other = row("b", facts=FACTS.model_copy(update={name: value}))
    add(tmp_path, row("a"))
    add(tmp_path / "other", other, config=CONFIG.model_copy(update={name: value}))
    if old:
        (tmp_path / "results-7.jsonl").write_text("".join(as_once(other)))
    else:
        (tmp_path / "other" / "results.jsonl").rename(tmp_path / "results-7.jsonl")
        for path in (tmp_path / "other").glob("facts-*"):
            path.rename(tmp_path / path.name)
    for use in (read, done):
        with pytest.raises(
            ResultsError, match=rf"results-7.jsonl, line 1, is of {name.replace('_', ' ')} {json.dumps(value)}"
        ):
            use(tmp_path)


@pytest.mark.parametrize("failed_in", [0, 1])
def test_a_failed_example_is_tried_again(tmp_path, failed_in):
    """By whichever process, and whichever file is read first."""
    add(tmp_path, row("a", "RuntimeError: no"), share=Share(failed_in, 2))
    assert done(tmp_path) == set()
    add(tmp_path, row("a", exact_match=1.0), share=Share(1 - failed_in, 2))
    assert [one.scores for one in read(tmp_path).rows] == [{"exact_match": 1.0}]
    assert done(tmp_path) == {"a"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "was started with seed 0, not 1: go on with what it was started with, or name another folder"),
        ({"trained_window": 4096}, "with trained_window 8192, not 4096"),
        ({"config_hash": "d"}, 'with config_hash "c", not "d"'),
        ({"tokenizer_hash": "u"}, 'with tokenizer_hash "t", not "u"'),
        ({"methods": ("unmodified", "x")}, r'with methods \["unmodified"\], not \["unmodified", "x"\]'),
    ],
)
def test_another_run_is_refused(tmp_path, change, message):
    add(tmp_path)
    with pytest.raises(ResultsError, match=message):
        Results(tmp_path, CONFIG.model_copy(update=change))
    assert done(tmp_path) == set(), "it is open to its own"


LATER = ("trained_window", "config_hash", "tokenizer_hash")


@pytest.mark.parametrize("name", LATER)
def test_what_a_run_did_not_record_is_not_held_against_it(tmp_path, name):
    (tmp_path / "config.json").write_text(CONFIG.model_copy(update={name: None}).model_dump_json(exclude_none=True))
    assert getattr(read_config(tmp_path), name) is None
    before = FACTS.model_copy(update={name: None}) if name != "trained_window" else FACTS
    (tmp_path / f"facts-{before.name}.json").write_text(before.model_dump_json(exclude_none=True))
    (tmp_path / "results.jsonl").write_text(row("old", facts=before).line + "\n")
    add(tmp_path, row("a"))
    assert examples(tmp_path) == ["old", "a"]


@pytest.mark.parametrize("name", LATER[1:])
def test_rows_of_two_models_are_told_where_the_folder_does_not_know_its_own(tmp_path, name):
    unknown = CONFIG.model_copy(update={name: None})
    add(tmp_path, row("a"), row("b", facts=FACTS.model_copy(update={name: "other"})), config=unknown)
    with pytest.raises(ResultsError, match=f'results.jsonl, line 2, is of {name.replace("_", " ")} "other", and'):
        read(tmp_path)


def test_facts_that_were_changed_are_not_believed(tmp_path):
    add(tmp_path, row("a"))
    [path] = tmp_path.glob("facts-*.json")
    path.write_text(path.read_text().replace('"cpu"', '"another"'))
    for use in (read, done):
        with pytest.raises(ResultsError, match=f"{path.name} was changed or renamed"):
            use(tmp_path)


def test_what_cannot_be_read(tmp_path):
    with pytest.raises(ResultsError, match=r"holds no results: there is no config\.json"):
        read_config(tmp_path)
    (tmp_path / "results.jsonl").write_text("")
    with pytest.raises(ResultsError, match=r"holds results.jsonl without a config.json"):
        Results(tmp_path, CONFIG)
    (tmp_path / "config.json").write_text(json.dumps({"task": "passkey"}))
    with pytest.raises(ResultsError, match=r"config.json cannot be read: version: Field required"):
        read_config(tmp_path)


@pytest.mark.skipif(sys.platform == "win32", reason="devices")
@pytest.mark.parametrize("name", ["results.jsonl", "results-1.jsonl", "config.json", "facts-a.json"])
@pytest.mark.parametrize("kind", ["pipe", "/dev/zero", "/dev/full"])
def test_what_may_never_end_is_refused(tmp_path, name, kind):
    add(tmp_path, row("a"))
    (tmp_path / name).unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(tmp_path / name)
    else:
        (tmp_path / name).symlink_to(kind)
    for use in (read, done):
        with pytest.raises(OSError, match="is no regular file") as caught:
            use(tmp_path)
        assert caught.value.filename == str(tmp_path / name)


# Shares of an evaluation, as (index, count, limit): which others may write while the first does.
ONE = (0, 1, None)


@pytest.mark.parametrize(
    ("mine", "others", "together"),
    [
        (ONE, ONE, False),
        ((0, 2, None), (0, 2, None), False),
        ((0, 2, None), (1, 2, None), True),
        ((1, 12, 5), (11, 12, 5), True),
        # Their examples may be the same.
        ((1, 2, None), (0, 1, None), False),
        ((1, 2, None), (0, 12, None), False),
        ((1, 2, None), (0, 2, 100), False),
    ],
)
def test_nobody_does_what_another_process_does(tmp_path, mine, others, together):
    def opened(index, count, limit):
        return Results(tmp_path, CONFIG, Share(index, count), limit)

    with opened(*mine):
        if together:
            opened(*others).close()
        else:
            with pytest.raises(ResultsError, match="another process is writing to"):
                opened(*others)
    opened(*others).close()


def test_a_killed_process_locks_nobody_out(tmp_path):
    code = (
        "import sys; from pathlib import Path; from ropewalk.eval.results import *\n"
        "results = Results(Path(sys.argv[1]), Config.model_validate_json(sys.argv[2]))\n"
        "print('open', flush=True); input()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, tmp_path, CONFIG.model_dump_json()], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout.readline() == b"open\n"
    for share in (ALL, Share(1, 2)):
        with pytest.raises(ResultsError, match="another process is writing to"):
            Results(tmp_path, CONFIG, share)
    process.kill()
    process.communicate()
    for share in (Share(1, 2), ALL):
        Results(tmp_path, CONFIG, share).close()
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_a_full_disk_is_named(tmp_path):
    with Results(tmp_path, CONFIG) as results:
        results.add(row("a"))
        (tmp_path / "results.jsonl").rename(tmp_path / "kept")
        (tmp_path / "results.jsonl").symlink_to("/dev/full")
        with pytest.raises(OSError, match="No space left on device") as caught:
            results.add(row("b"))
        assert caught.value.filename == os.fspath(tmp_path / "results.jsonl")
    (tmp_path / "kept").replace(tmp_path / "results.jsonl")
    assert examples(tmp_path) == ["a"]


def test_ctrl_c_while_a_row_is_written_is_no_error(monkeypatch):
    """A function that pydantic calls while it writes would turn it into a ValueError."""

    def stopped(facts):
        raise KeyboardInterrupt

    monkeypatch.setattr(type(FACTS), "name", property(stopped))
    with pytest.raises(KeyboardInterrupt):
        _ = row("a").line
