# SPDX-License-Identifier: Apache-2.0
import gzip
import json

import pytest

from ropewalk.eval.data_files import DataError
from ropewalk.eval.subjects import Dummy
from ropewalk.eval.tasks.kv_retrieval import KVRetrieval, Record, scores
from ropewalk.eval.tasks.settings import evenly

PAIRS = [["k0", "v0"], ["k1", "v1"], ["k2", "V2"]]
RECORD = {"ordered_kv_records": PAIRS, "key": "k2", "value": "V2"}
FILE = "kv-retrieval-3_keys.jsonl.gz"


def task(folder, *records, at="kv_retrieval", **settings):
    path = folder / at / FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress("".join(f"{json.dumps(one)}\n" for one in records).encode()))
    return KVRetrieval(data_dir=folder, **{"keys": "3", **settings})


@pytest.mark.parametrize(
    ("keys", "places"), [(75, [0, 24, 49, 74]), (140, [0, 34, 69, 104, 139]), (300, [0, 49, 99, 149, 199, 249, 299])]
)
def test_the_places_of_the_authors(keys, places):
    pairs = [(f"k{i}", f"v{i}") for i in range(keys)]
    record = Record(ordered_kv_records=pairs, key="k5", value="v5")
    found = [record.pairs(depth) for depth in evenly(len(places))]
    assert [its.index(("k5", "v5")) for its in found] == places
    assert all([pair for pair in its if pair[0] != "k5"] == [*pairs[:5], *pairs[6:]] for its in found)


def test_the_prompts(tmp_path):
    one = task(tmp_path, RECORD, depths="3")
    begin, middle, end = (one.prompt(*example.about[:1], True, example.about[1]) for example in one.examples())
    data = '{"k0": "v0",\n "k2": "V2",\n "k1": "v1"}'
    asked = "Extract the value corresponding to the specified key in the JSON object below."
    assert middle == f'{asked}\n\nJSON data:\n{data}\n\nKey: "k2"\nCorresponding value:'
    assert '{"k2": "V2",\n "k0"' in begin
    assert ' "k2": "V2"}\n' in end
    aware = task(tmp_path, RECORD, query_aware=True)
    [first, *_] = aware.examples()
    text = aware.prompt(first.about[0], True, 0.5)
    assert text == f'{asked}\n\nKey: "k2"\n\nJSON data:\n{data}\n\nKey: "k2"\nCorresponding value:'


def test_examples_and_their_cells(tmp_path):
    one = task(tmp_path, RECORD, RECORD, depths="0,0.5")
    subject = Dummy()
    one.measure(subject)
    length = len(one.prompt(one.records[3][0], True).split())
    assert [(example.name, example.tokens, example.cell) for example in one.examples()] == [
        (f"3-{depth:.3f}-{number}", length, {"length": length, "depth": depth})
        for depth in (0.0, 0.5)
        for number in (0, 1)
    ]
    assert one.longest >= length + 100
    *_, last = one.examples()
    generation = one.prepare(last, subject)
    assert list(generation.prompt.token_ids) == subject.encode(one.prompt(one.records[3][0], True, 0.5))
    assert (generation.prompt.new_tokens, generation.target) == (100, "V2")


@pytest.mark.parametrize(("answer", "right"), [("v2", 1), ('It is "V2".\nKey: k0', 1), ("v 2", 0), ("", 0)])
def test_the_value_counts_wherever_it_stands(answer, right):
    assert scores("V2", answer) == {"accuracy": right}


def test_a_copy_of_the_repository_will_do(tmp_path):
    assert task(tmp_path, RECORD, at="kv_retrieval_data").records


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"value": "v1"}, "k2 with v1 is asked for and is not among the pairs"),
        ({"ordered_kv_records": [*PAIRS, ["k2", "x"]]}, "a key is there twice"),
        ({"ordered_kv_records": PAIRS[2:]}, "at least 2 items"),
    ],
)
def test_lists_that_are_something_else(tmp_path, change, message):
    with pytest.raises(DataError, match=f"{FILE}, line 1, is not what it should be.*{message}"):
        _ = task(tmp_path, {**RECORD, **change}).records


def test_a_damaged_file(tmp_path):
    one = task(tmp_path, RECORD)
    path = tmp_path / "kv_retrieval" / FILE
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DataError, match=r"is damaged .*: get it again from kv_retrieval_data of nelson-liu"):
        _ = one.records
