# SPDX-License-Identifier: Apache-2.0
"""Extended models in other processes and in several threads."""

import subprocess
import sys
import threading

import torch
from tiny import CLOSE, MAP, logits, text
from torch.testing import assert_close

import ropewalk
from ropewalk.testing import tiny_model

IDS = text(50)

# The process that is spawned imports nothing of ours: it is given a model.
WORK = """
import multiprocessing, torch

def work(model, ids, queue):
    extension = model.ropewalk_extension
    with torch.no_grad():
        extended = model(ids).logits
        assert extension.active
        extension.restore()
        assert not extension.active
        queue.put((extended.numpy(), model(ids).logits.numpy(), model.config._attn_implementation))

if __name__ == "__main__":
    import ropewalk
    from ropewalk.testing import tiny_model
    model, ids = tiny_model("gemma3"), torch.arange(1, 60)[None]
    with torch.no_grad():
        plain = model(ids).logits
        ropewalk.extend(model, ropewalk.SelfExtend(3, 8))
        expected = model(ids).logits
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=work, args=(model, ids, queue))
    process.start()
    extended, restored, implementation = queue.get(timeout=300)
    process.join()
    torch.testing.assert_close(torch.from_numpy(extended), expected, rtol=0, atol=2e-4)
    torch.testing.assert_close(torch.from_numpy(restored), plain, rtol=0, atol=2e-4)
    assert (expected - plain).abs().max() > 0.1
    assert implementation == "sdpa"
"""


def test_a_spawned_process(tmp_path):
    script = tmp_path / "work.py"
    script.write_text(WORK)
    process = subprocess.run([sys.executable, script], text=True, capture_output=True)
    assert process.returncode == 0, process.stderr


def in_threads(*actions):
    failures = []

    def run(action):
        try:
            # Each thread has a mode of its own.
            with torch.no_grad():
                action()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(action,)) for action in actions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_models_are_extended_in_several_threads():
    names = ["llama", "gemma3", "phi", "qwen3"]
    models = [tiny_model(name) for name in names]
    expected = [logits(model, IDS) for model in models]

    def work(model, plain):
        for _ in range(4):
            with ropewalk.extend(model, MAP):
                assert (model(IDS).logits - plain).abs().max() > 0.1
            assert torch.equal(model(IDS).logits, plain)

    in_threads(*(lambda pair=pair: work(*pair) for pair in zip(models, expected, strict=True)))


def test_models_on_one_configuration_in_several_threads():
    one = tiny_model("llama")
    models = [one, *(type(one)(one.config).eval() for _ in range(3))]

    def work(model):
        plain = model(IDS).logits
        for _ in range(4):
            with ropewalk.extend(model, MAP):
                model(IDS)
            assert torch.equal(model(IDS).logits, plain)

    in_threads(*(lambda model=model: work(model) for model in models))
    assert one.config._attn_implementation == "sdpa"


def test_one_extended_model_in_several_threads():
    model = tiny_model("llama")
    with ropewalk.extend(model, MAP):
        expected = logits(model, IDS)

        def work():
            for _ in range(8):
                assert_close(model(IDS).logits, expected, **CLOSE)

        in_threads(*[work] * 4)
