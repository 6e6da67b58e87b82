# SPDX-License-Identifier: Apache-2.0
import json
import runpy
import sys
from functools import partial

import pytest

pytest.importorskip("lm_eval")

import lm_eval.tasks
import torch
import yaml
from gguf_files import write_gguf
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model

import ropewalk
from ropewalk.integrations.lm_eval import RopewalkLM
from ropewalk.maps import LengthError
from ropewalk.testing.saved import save_tiny_model, tiny_tokenizer

WINDOW = 64
LONG, SHORT = "where is the sea? " * 8 + "where?", "a cat"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = save_tiny_model(tmp_path_factory.mktemp("model"), trained_window=WINDOW, eos_token_id=1)
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = "<unk>"  # lm-eval cannot do without one; it is number 1
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def make(folder):
    return partial(RopewalkLM, str(folder), device="cpu", dtype="float32")


def ask(model, kind, *arguments):
    requests = [Instance(kind, {}, argument, i) for i, argument in enumerate(arguments)]
    return getattr(model, kind)(requests, disable_tqdm=True)


def test_it_is_registered():
    assert get_model("ropewalk") is RopewalkLM
    assert get_model("hf") is not RopewalkLM


def test_arguments_in_one_string(folder):
    # lm-eval's Python functions split it at every comma.
    text = f"pretrained={folder},device=cpu,map=self,capacity=4,rate=0.1,window=16,max_length=30,batch_size=2"
    model = RopewalkLM.create_from_arg_string(text)
    assert model.extension.position_map == ropewalk.SELF(capacity=4, rate=0.1, window=16)
    assert (model.max_length, model.batch_size) == (30, 2)


def test_max_length_is_what_the_map_reaches(make):
    model = make(map="selfextend", group_size=4, window=16)
    assert model.extension.position_map == ropewalk.SelfExtend(4, 16)
    assert model.max_length == ropewalk.SelfExtend(4, 16).max_length(WINDOW) > WINDOW
    assert make(map="identity").max_length == WINDOW


def test_parameters_that_fit_a_length(make):
    model = make(max_length=200)
    assert model.extension.position_map == ropewalk.SelfExtend.for_length(200, WINDOW)
    assert model.max_length == 200


def test_a_gguf_file(gguf_file, tmp_path):
    model = RopewalkLM(str(gguf_file), device="cpu", map="selfextend", group_size=4, window=16)
    [(likelihood, _)] = ask(model, "loglikelihood", ("abc", "d"))
    assert likelihood < 0
    # Its weights are unpacked: packed ones cannot be saved.
    model.extension.restore()
    model.model.save_pretrained(tmp_path)


def test_a_gguf_file_that_is_scaled(tmp_path):
    scaling = {"type": "yarn", "factor": 4.0, "original_context_length": 64}
    metadata = {f"rope.scaling.{name}": value for name, value in scaling.items()}
    path = write_gguf(tmp_path / "model.gguf", metadata=metadata)
    model = RopewalkLM(str(path), device="cpu", map="selfextend", group_size=4, window=16)
    assert model.model.config.rope_parameters["rope_type"] == "yarn"
    assert model.extension.trained_window == 64


def test_it_says_what_was_done(make):
    info = make(map="rerope", window=16, max_length=99).get_model_info()
    told = {name: info[name] for name in ("map", "trained_window", "max_length")}
    assert told == {"map": {"map": "rerope", "window": 16, "start": 0}, "trained_window": WINDOW, "max_length": 99}
    assert info["model_dtype"] == torch.float32  # and all that lm-eval says of itself


def test_presets(make, folder, tmp_path):
    tuned = ropewalk.Preset(ropewalk.SelfExtend(4, 8), 60, query_scaling="yarn", name="tuned")
    tuned.save(tmp_path / "tuned.json")
    model = make(preset=str(tmp_path / "tuned.json"))
    assert model.extension.preset == tuned
    assert model.max_length == ropewalk.SelfExtend(4, 8).max_length(60)
    assert model.get_model_info()["preset"] == f"tuned, {tmp_path / 'tuned.json'}"
    assert make(preset=tuned, max_length=230).extension.position_map == ropewalk.SelfExtend.for_length(230, 60)
    assert make(preset=tuned, map="rerope", window=16, max_length=99).extension.position_map == ropewalk.ReRoPE(16)
    assert make(preset=tuned, map=None).extension is None
    with pytest.raises(ValueError, match="no preset is called 'tuned'"):
        make(preset="tuned")
    beside = folder / "ropewalk.json"
    tuned.save(beside)
    try:
        assert make().extension.preset == tuned
        assert make(map="rerope", window=16, max_length=99).extension.preset is None
        assert make(group_size=2, window=16).extension.position_map == ropewalk.SelfExtend(2, 16)
    finally:
        beside.unlink()


def test_a_model_as_it_is(make):
    model = make(map=None)
    assert model.extension is None
    assert "map" not in model.get_model_info()


@pytest.mark.filterwarnings("ignore:a text of .* tokens uses relative positions")
def test_likelihoods_in_a_padded_batch(make, folder):
    continuations = [(LONG, " yes"), (SHORT, " no"), (LONG, " no, never"), (SHORT, " yes")]
    alone = ask(make(map="selfextend", group_size=4, window=8), "loglikelihood", *continuations)
    together = ask(make(map="selfextend", group_size=4, window=8, batch_size=4), "loglikelihood", *continuations)
    assert [value for value, _ in together] == pytest.approx([value for value, _ in alone], abs=1e-3)

    # The same from the model itself.
    model = make(map="identity")
    ids = model.tok_encode(LONG + " yes")
    model.extension.restore()
    with ropewalk.extend(model.model, ropewalk.SelfExtend(4, 8)), torch.no_grad():
        scores = model.model(torch.tensor([ids])).logits.log_softmax(-1)[0]
    wanted = sum(scores[place - 1, ids[place]].item() for place in range(len(ids) - 4, len(ids)))
    assert alone[0][0] == pytest.approx(wanted, abs=1e-3)
    with torch.no_grad():
        plain = model.model(torch.tensor([ids])).logits.log_softmax(-1)[0]
    assert abs(sum(plain[place - 1, ids[place]].item() for place in range(len(ids) - 4, len(ids))) - wanted) > 0.1


@pytest.mark.filterwarnings("ignore:a text of .* tokens uses relative positions")
def test_answers_in_a_padded_batch(make):
    questions = [(text, {"until": ["\n"], "max_gen_toks": 8}) for text in (LONG, SHORT, LONG[5:])]
    alone = ask(make(map="selfextend", group_size=4, window=8), "generate_until", *questions)
    together = ask(make(map="selfextend", group_size=4, window=8, batch_size=3), "generate_until", *questions)
    assert together == alone
    assert alone != ask(make(map="selfextend", group_size=64, window=1), "generate_until", *questions)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"map": "selfexend"}, ValueError, "no map is called 'selfexend'. Did you mean 'selfextend'?"),
        ({}, ValueError, "map=selfextend needs group_size and window, or max_length"),
        ({"group_size": 8}, ValueError, "map 'selfextend' needs window"),
        ({"group_size": 8, "window": -1}, ValueError, "window must be 0 or more, got -1"),
        ({"map": "rerope", "window": 16}, ValueError, "reaches any length: pass max_length"),
        ({"map": "selfextend", "group_size": 2, "window": 16, "max_length": 500}, LengthError, "500 tokens"),
    ],
)
def test_refusals(make, options, error, message):
    with pytest.raises(error, match=message.replace("?", r"\?").replace("(", r"\(")):
        make(**options)


def test_the_command(folder, tmp_path, monkeypatch, capsys):
    (tmp_path / "questions.jsonl").write_text('{"question": "1 + 1 =", "answer": " 2"}\n' * 3)
    task = {
        "task": "sums",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "questions.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": [" 2", " 3"],
        "doc_to_target": 0,
    }
    (tmp_path / "sums.yaml").write_text(yaml.safe_dump(task))
    # lm-eval's whole catalogue takes ten seconds to read.
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", partial(lm_eval.tasks.TaskManager, include_defaults=False))

    monkeypatch.setenv("HF_HOME", str(tmp_path))
    arguments = (
        f"run --model ropewalk --model_args pretrained={folder},map=selfextend,group_size=4,window=16,dtype=float32"
    )
    more = f"--device cpu --tasks sums --include_path {tmp_path} --output_path {tmp_path / 'out'}"
    monkeypatch.setattr(sys, "argv", ["lm-eval", *arguments.split(), *more.split()])
    runpy.run_module("ropewalk.integrations.lm_eval", run_name="__main__", alter_sys=False)
    assert "sums" in capsys.readouterr().out
    [results] = (tmp_path / "out").rglob("results_*.json")
    written = json.loads(results.read_text())
    assert written["config"]["map"] == {"map": "selfextend", "group_size": 4, "window": 16, "start": 0}
    assert written["n-samples"]["sums"] == {"original": 3, "effective": 3}
