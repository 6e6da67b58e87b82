# SPDX-License-Identifier: Apache-2.0
"""RULER without a network: what its texts are made from lies in a folder, and the tokenizer may be in a GGUF file."""

import json
import runpy
import sys
from functools import partial

import pytest

pytest.importorskip("lm_eval")
pytest.importorskip("wonderwords")

import lm_eval.tasks
import nltk
import requests
from lm_eval.tasks import TaskManager
from lm_eval.tasks.ruler import qa_utils
from transformers import AutoTokenizer

from ropewalk.integrations.lm_eval import ruler
from ropewalk.testing.saved import save_tiny_model, tiny_tokenizer

RULER = [
    "niah_multikey_1", "niah_multikey_2", "niah_multikey_3", "niah_multiquery", "niah_multivalue", "niah_single_1",
    "niah_single_2", "niah_single_3", "ruler_cwe", "ruler_fwe", "ruler_qa_hotpot", "ruler_qa_squad", "ruler_vt",
]  # fmt: skip
SQUAD = "https://rajpurkar.github.io/SQuAD-explorer/dataset/dev-v2.0.json"
ESSAY = "We wrote software. It was fun. Dr. Graham said so! He was right about most of it. "


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    def refuse(*arguments, **options):
        raise requests.ConnectionError("no network in this test")

    monkeypatch.setattr(requests, "get", refuse)
    monkeypatch.setattr(nltk, "download", lambda *arguments, **options: False)  # as it answers then


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of data: an essay, and a question of SQuAD's for each of 500 samples."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "needle" / "PaulGrahamEssays").mkdir(parents=True)
    (folder / "needle" / "PaulGrahamEssays" / "fun.txt").write_text(ESSAY * 60)
    (folder / "ruler").mkdir()
    asked = [{"question": f"Who {i}?", "is_impossible": False, "answers": [{"text": f"A{i}"}]} for i in range(500)]
    text = {"paragraphs": [{"context": "A short text.", "qas": asked}, {"context": "And another.", "qas": []}]}
    (folder / "ruler" / "dev-v2.0.json").write_text(json.dumps({"data": [text]}))
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = save_tiny_model(tmp_path_factory.mktemp("model"), trained_window=64, eos_token_id=1)
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = "<unk>"
    tokenizer.save_pretrained(folder)
    return str(folder)


def made(function, **metadata):
    return ruler.dataset(function, **metadata)["test"]


def test_every_task_of_ruler(tmp_path):
    ruler.write_tasks(tmp_path)
    tasks = TaskManager(include_path=str(tmp_path), include_defaults=False)
    assert tasks.all_subtasks == RULER
    named = {name: tasks.task_index[name].cfg["dataset_kwargs"]["made_by"] for name in RULER}
    assert named["niah_single_2"] == "niah_utils.niah_single_2"
    assert named["ruler_qa_squad"] == "qa_utils.get_squad"
    assert len(set(named.values())) == len(RULER)


def test_a_gguf_file_measures_by_its_own_tokenizer(gguf_file, folder):
    samples = made("niah_utils.niah_single_1", pretrained=str(gguf_file), data_dir=str(folder), max_seq_lengths=[2000])
    own = AutoTokenizer.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name)
    assert len(samples) == 500
    assert 1200 < len(own(samples[0]["input"]).input_ids) < 2000
    written = AutoTokenizer.from_pretrained(ruler._tokenizer({"pretrained": str(gguf_file)}))
    text = "abc ab, a test: Äß <s> </s>\n\n  x"
    assert written(text).input_ids == own(text).input_ids
    assert written.all_special_ids == own.all_special_ids


def test_what_tokenizer_is_taken(model, gguf_file):
    assert ruler._tokenizer({"pretrained": model}) == model
    assert ruler._tokenizer({"pretrained": str(gguf_file), "tokenizer": model}) == model
    assert ruler._tokenizer({"model": "an-api's"}) == "an-api's"


def test_needles_in_essays_of_a_folder(model, folder):
    samples = made("niah_utils.niah_multikey_1", pretrained=model, data_dir=str(folder), max_seq_lengths=[4000])
    assert 400 <= len(samples) <= 500
    for sample in samples.select(range(9)):
        assert sample["length"] <= sample["max_length"] == 4000
        assert sample["input"].count("One of the special magic numbers") == 4
        assert "It was fun." in sample["input"]
    # lm-eval's own function is back in its place.
    from lm_eval.tasks.ruler import niah_utils, prepare_niah

    assert niah_utils.get_haystack is prepare_niah.get_haystack


def test_essays_as_rulers_script_writes_them(folder, tmp_path):
    (tmp_path / "ruler").mkdir()
    (tmp_path / "ruler" / "PaulGrahamEssays.json").write_text(json.dumps({"text": "One. \n Two."}))
    assert ruler._haystack(None, tmp_path, type_haystack="essay") == ["One.", "Two."]
    assert ruler._haystack(None, folder, type_haystack="essay") == (ESSAY * 60).split()


def test_sentences_are_told_apart_without_nltks_model(monkeypatch):
    monkeypatch.setattr(nltk.data, "path", [])
    text = ESSAY.replace("fun", "made") * 400
    ruler._tell_sentences_apart(text)
    from nltk.tokenize.punkt import PunktTokenizer

    assert PunktTokenizer("english").tokenize(ESSAY) == [
        "We wrote software.", "It was fun.", "Dr. Graham said so!", "He was right about most of it.",
    ]  # fmt: skip


def test_questions_of_a_folder(model, folder):
    samples = made("qa_utils.get_squad", pretrained=model, data_dir=str(folder), max_seq_lengths=[400])
    assert len(samples) == 500
    assert samples[7]["outputs"] == ["A7"]
    assert "A short text." in samples[7]["input"]
    assert qa_utils.download_json.__module__ == "lm_eval.tasks.ruler.qa_utils"


@pytest.mark.parametrize(
    ("function", "data", "message"),
    [
        ("qa_utils.get_squad", True, rf"holds no ruler/dev-v2.0.json: fetch {SQUAD}$"),
        ("qa_utils.get_hotpotqa", True, r"holds no ruler/hotpot_dev_distractor_v1.json: fetch https://\S+$"),
        ("qa_utils.get_squad", False, rf"{SQUAD} cannot be fetched \(ConnectionError\): fetch it elsewhere, and name"),
        ("niah_utils.niah_single_2", True, "holds no essays: it must hold ruler/PaulGrahamEssays.json or needle/"),
        ("niah_utils.niah_single_2", False, "the essays cannot be fetched .*: name a folder that holds ruler/"),
    ],
)
def test_what_is_missing_is_said(model, tmp_path, monkeypatch, function, data, message):
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", requests.get)
    with pytest.raises(ruler.RulerError, match=message):
        made(function, pretrained=model, data_dir=str(tmp_path) if data else None)
    assert qa_utils.download_json.__module__ == "lm_eval.tasks.ruler.qa_utils"


def test_packages_and_folders_that_are_missing(monkeypatch, model):
    with pytest.raises(ruler.RulerError, match=r"data_dir must be a folder that holds .*, got 'nowhere'"):
        made("qa_utils.get_squad", pretrained=model, data_dir="nowhere")
    monkeypatch.delitem(sys.modules, "lm_eval.tasks.ruler.cwe_utils", raising=False)
    monkeypatch.setitem(sys.modules, "wonderwords", None)
    with pytest.raises(ruler.RulerError, match=r"run 'pip install \"lm-eval\[ruler\]\"'"):
        made("cwe_utils.get_cw_dataset", pretrained=model)


def command(monkeypatch, model, *arguments):
    # lm-eval's whole catalogue takes ten seconds to read.
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", partial(TaskManager, include_defaults=False))
    run = f"run --model ropewalk --model_args pretrained={model},map=None,max_length=600,dtype=float32 --device cpu"
    monkeypatch.setattr(sys, "argv", ["lm-eval", *run.split(), *map(str, arguments)])
    runpy.run_module("ropewalk.integrations.lm_eval", run_name="__main__", alter_sys=False)


def test_the_command(monkeypatch, model, folder, tmp_path, capsys):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    metadata = ["--metadata", "max_seq_lengths=[400]", f"data_dir={folder}"]
    command(monkeypatch, model, "--tasks", "ruler_qa_squad", "--limit", 1, "--gen_kwargs", "max_gen_toks=2", *metadata)
    assert "ruler_qa_squad" in capsys.readouterr().out


def test_a_map_that_does_not_reach_is_one_line(monkeypatch, model):
    with pytest.raises(SystemExit, match=r"^error: a text of 600 tokens is past what Identity"):
        command(monkeypatch, model, "--tasks", "ruler_qa_squad", "--model_args", "map=identity")


def test_the_command_says_what_to_fetch_in_a_line(monkeypatch, model, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        command(monkeypatch, model, "--tasks", "ruler_qa_squad", "--metadata", f"data_dir={tmp_path}")
    assert stopped.value.code == f"error: {tmp_path} holds no ruler/dev-v2.0.json: fetch {SQUAD}"
