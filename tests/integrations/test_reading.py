# SPDX-License-Identifier: Apache-2.0
"""A text that is read once gives the answers of a text that is read for each question."""

import itertools
from contextlib import nullcontext

import pytest
import torch

import ropewalk
from ropewalk.integrations.transformers.framing import Document, Frame
from ropewalk.integrations.transformers.generation import generate
from ropewalk.integrations.transformers.kept import Kept, ReadingError, check_place
from ropewalk.integrations.transformers.reading import Reading, read
from ropewalk.integrations.transformers.rope_scaling import fixed_frequencies, scaled
from ropewalk.testing import TINY_MODELS, tiny_model
from ropewalk.testing.models import TinyModel
from ropewalk.testing.saved import tiny_tokenizer

MAP = ropewalk.SelfExtend(group_size=4, window=8)
TEXT = "The sea is wide. The hill is high. The bread is warm.\n"
QUESTIONS = ("What is wide?", "", "Why?", "What is wide?", "\n\n And what, beside it, is high?")
NEW = 6


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer(chat=True)


@pytest.fixture
def model():
    return tiny_model("llama")


@pytest.fixture
def kept(model, tokenizer, tmp_path):
    """A reading in a file, made by the model extended."""
    with ropewalk.extend(model, MAP):
        read(model, tokenizer, TEXT).save(tmp_path / "kept")
    return tmp_path / "kept"


def extended(model, name, is_extended):
    if not is_extended:
        return nullcontext()
    disable = name in TINY_MODELS and TINY_MODELS[name].disable_window
    return ropewalk.extend(model, MAP, sliding_window="disable" if disable else "keep")


def unsplit(reading, question):
    """The answer of one generation from the whole prompt."""
    prompt = reading.document.prompt(question)
    with fixed_frequencies(reading.model, reading.length):
        return generate(reading.model, reading.document.tokenizer, prompt, max_new_tokens=NEW)


@pytest.mark.parametrize("is_extended", [False, True])
@pytest.mark.parametrize("name", TINY_MODELS)
def test_answers_are_those_of_the_whole_prompt(name, is_extended, tokenizer, tmp_path):
    """Also of layers with a window, which keep only the last tokens; also from a file."""
    # Without a map, where a text is longer than a table of rotations, there is none for its end.
    model = tiny_model(name, 64 if is_extended or name not in ("gptj", "codegen") else 500)
    with extended(model, name, is_extended):
        reading = read(model, tokenizer, TEXT, chunk=16)
        assert reading.tokens == len(reading.document.prompt()) - 2
        for question in QUESTIONS:
            answer, whole = reading.ask(question, max_new_tokens=NEW), unsplit(reading, question)
            assert (answer.token_ids, answer.text) == (whole.token_ids, whole.text)
            assert answer.prompt_tokens == whole.prompt_tokens
        reading.save(tmp_path / "kept")
        loaded = Reading.load(tmp_path / "kept", model, tokenizer)
        for question in reversed(QUESTIONS):
            assert loaded.ask(question, max_new_tokens=NEW).token_ids == unsplit(reading, question).token_ids


def test_the_order_of_questions_does_not_matter(model, tokenizer):
    with ropewalk.extend(model, MAP):
        reading = read(model, tokenizer, TEXT)
        expected = {question: unsplit(reading, question).token_ids for question in QUESTIONS[:3]}
        assert len(set(expected.values())) == 3
        for order in itertools.permutations(expected):
            for question in order:
                assert reading.ask(question, max_new_tokens=NEW).token_ids == expected[question]


def test_the_text_is_read_once(model, tokenizer):
    reading = read(model, tokenizer, TEXT)
    done = []
    with torch.no_grad():
        hook = model.register_forward_pre_hook(
            lambda module, args, kwargs: done.append(kwargs["input_ids"].shape[1]), with_kwargs=True
        )
        answer = reading.ask("Why?", max_new_tokens=NEW)
        hook.remove()
    assert sum(done) == answer.prompt_tokens - reading.tokens + NEW - 1
    assert [layer.keys.shape[2] for layer in reading.cache.layers] == [reading.tokens] * 2


@pytest.mark.parametrize("name", ["llama", "qwen2-sliding"])
@pytest.mark.parametrize("passes", [0, 1, 3])
def test_an_interrupted_answer_leaves_no_trace(name, tokenizer, passes):
    """In the middle of a pass: the first layer has the new keys, and the second does not."""
    model = tiny_model(name)
    reading = read(model, tokenizer, TEXT)
    count = itertools.count()

    def stop(*arguments):
        if next(count) == passes:
            raise KeyboardInterrupt

    hook = model.model.layers[1].self_attn.register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        reading.ask("What is wide?", max_new_tokens=NEW)
    hook.remove()
    assert reading.ask("Why?", max_new_tokens=NEW).token_ids == unsplit(reading, "Why?").token_ids


class Merging(Document):
    """Reads the end of the text otherwise before one question."""

    def prompt(self, question=""):
        ids = super().prompt(question)
        return [*ids[:20], 5, *ids[21:]] if question == "merge" else ids


def test_a_question_that_changes_how_the_text_is_read(model, tokenizer):
    from ropewalk.integrations.transformers.reading import read_document

    document = Merging(tokenizer, TEXT, Frame.of(tokenizer))
    reading = read_document(model, document)
    for question in ("Why?", "merge", "Why?", "merge", "merge", "What is wide?"):
        assert reading.ask(question, max_new_tokens=NEW).token_ids == unsplit(reading, question).token_ids
    reading = read_document(tiny_model("qwen2-sliding"), document)
    with pytest.raises(ReadingError, match="layer 0 keeps a DynamicSlidingWindowLayer, which cannot go back"):
        reading.ask("merge", max_new_tokens=NEW)
    assert reading.ask("Why?", max_new_tokens=NEW).token_ids == unsplit(reading, "Why?").token_ids


def test_no_text(model, tokenizer):
    reading = read(model, tokenizer, "", chat=False)
    assert reading.tokens == 0
    for question in ("Why?", "What is wide?"):
        assert reading.ask(question, max_new_tokens=NEW).token_ids == unsplit(reading, question).token_ids
    with pytest.raises(ValueError, match="a prompt must have 1 token or more"):
        reading.ask("")


def test_frequencies_that_follow_the_length(tokenizer):
    """They are those of the text, a question and its answer together, throughout."""
    model = tiny_model("llama-dynamic")
    reading = read(model, tokenizer, TEXT, target_length=400)
    assert reading.length == 400
    whole = unsplit(reading, "Why?")
    assert reading.ask("Why?", max_new_tokens=NEW).token_ids == whole.token_ids
    with pytest.raises(ReadingError, match=r"read with the frequencies of 400: read it anew with target_length=1115"):
        reading.ask("Why?" * 200)
    assert read(tiny_model("llama"), tokenizer, TEXT, target_length=100).ask("Why?" * 40, max_new_tokens=1)
    with pytest.raises(ValueError, match="target_length must be more than the 55 tokens of the text, got 55"):
        read(model, tokenizer, TEXT, target_length=55)


def test_the_model_must_be_as_it_was(model, tokenizer):
    plain = read(model, tokenizer, TEXT)
    with ropewalk.extend(model, MAP):
        reading = read(model, tokenizer, TEXT)
        with pytest.raises(ReadingError, match=r"was read with no map, and the model now has the map SelfExtend\("):
            plain.ask("Why?")
    with pytest.raises(ReadingError, match=r"was read with the map SelfExtend\(.*\) in 2 layers, .* now has no map"):
        reading.ask("Why?")
    with scaled(model, "linear", 2.0, 64), pytest.raises(ReadingError, match="with other rotary frequencies"):
        plain.ask("Why?")
    plain.ask("Why?", max_new_tokens=1)
    model.to(torch.bfloat16)
    with pytest.raises(ReadingError, match="read in float32, and the model now is in bfloat16"):
        plain.ask("Why?")


@pytest.mark.filterwarnings("ignore:a text of")
def test_past_what_the_map_reaches(model, tokenizer):
    with ropewalk.extend(model, MAP):
        with pytest.raises(ropewalk.LengthError):
            read(model, tokenizer, TEXT * 10)
        reading = read(model, tokenizer, TEXT)
        with pytest.raises(ropewalk.LengthError):
            reading.ask("Why?" * 100)
        assert reading.ask("Why?", max_new_tokens=NEW).token_ids == unsplit(reading, "Why?").token_ids


# In a file.


def test_settings_are_kept(model, tokenizer, tmp_path):
    reading = read(model, tokenizer, "a<pad>b", chat=False, target_length=77, allow_control_tokens=True)
    reading.save(tmp_path / "kept")
    loaded = Reading.load(tmp_path / "kept", model, tokenizer, chunk=3)
    assert (loaded.length, loaded.chunk) == (77, 3)
    assert loaded.document == reading.document
    assert list(tmp_path.iterdir()) == [tmp_path / "kept"]


def changed(model, change):
    with torch.no_grad():
        change(model)
    return model


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda model: model.lm_head.weight[3, 5].mul_(1.01), "its model has other weights"),
        (lambda model: model.model.norm.weight.copy_(model.model.norm.weight.flip(0) * 1.01), "other weights"),
        (lambda model: setattr(model.config, "rms_norm_eps", 1e-3), "its model has another configuration"),
        (lambda model: model.model.rotary_emb.inv_freq.mul_(0.5), "its model rotates by other frequencies"),
        (lambda model: model.to(torch.bfloat16), r"its model has another dtype \(float32, not bfloat16\)"),
    ],
)
def test_another_model(kept, tokenizer, change, said):
    model = changed(tiny_model("llama"), change)
    with ropewalk.extend(model, MAP), pytest.raises(ReadingError, match=said) as caught:
        Reading.load(kept, model, tokenizer)
    assert str(caught.value).startswith(f"{str(kept)!r} does not fit: ")
    assert str(caught.value).endswith("Read the text anew, into another file")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (None, r"read with the map SelfExtend\(group_size=4, window=8\) in 2 layers, and the model has no map"),
        (
            {"position_map": ropewalk.SelfExtend(4, 9)},
            r"and the model has the map SelfExtend\(group_size=4, window=9\)",
        ),
        ({"position_map": MAP, "query_scaling": "log-n"}, "in 2 layers and query scaling log-n"),
    ],
)
def test_another_map(kept, model, tokenizer, options, said):
    with (
        nullcontext() if options is None else ropewalk.extend(model, **options),
        pytest.raises(ReadingError, match=said),
    ):
        Reading.load(kept, model, tokenizer)


def test_another_tokenizer(kept, model, tokenizer):
    other = tiny_tokenizer()
    other.add_tokens(["The sea"])
    with ropewalk.extend(model, MAP), pytest.raises(ReadingError, match="the tokenizer reads its text as other tokens"):
        Reading.load(kept, model, other)


@pytest.mark.parametrize("name", ["ropewalk", "torch", "transformers"])
def test_other_versions(kept, model, tokenizer, name, monkeypatch):
    from ropewalk.integrations.transformers import reading

    versions = {**reading.versions(), name: "0.0.1"}
    monkeypatch.setattr(reading, "versions", lambda: versions)
    with ropewalk.extend(model, MAP), pytest.raises(ReadingError, match=rf"made with {name} .*, not 0\.0\.1"):
        Reading.load(kept, model, tokenizer)


def test_every_flipped_byte_is_noticed(kept, model, tokenizer):
    """Whatever it says then, in one line: nothing of a broken file is used."""
    whole = kept.read_bytes()
    header = int.from_bytes(whole[:8], "little") + 8
    generator = torch.Generator().manual_seed(0)
    numbers = (header + torch.randint(0, len(whole) - header, (30,), generator=generator)).tolist()
    begin = whole.index(b"ropewalk.reading")
    facts = range(begin + 1, whole.index(b"}", whole.index(b"tensors", begin)), 7)
    assert len(facts) > 100
    with ropewalk.extend(model, MAP):
        Reading.load(kept, model, tokenizer)
        for place in [0, 7, 8, 9, *facts, header, *numbers, len(whole) - 1]:
            kept.write_bytes(whole[:place] + bytes([whole[place] ^ 0x11]) + whole[place + 1 :])
            with pytest.raises(ReadingError) as caught:
                Reading.load(kept, model, tokenizer)
            assert "\n" not in str(caught.value)


@pytest.mark.parametrize("size", [0, 1, 8, 100, -100, -1])
def test_a_truncated_file(kept, size):
    kept.write_bytes(kept.read_bytes()[:size])
    with pytest.raises(ReadingError, match="is no kept reading, or a broken one"):
        Kept.open(kept)


def test_foreign_files(tmp_path, model, tokenizer):
    from safetensors.torch import save_file

    path = tmp_path / "weights.safetensors"
    save_file({"a": torch.zeros(3)}, path)
    with pytest.raises(ReadingError, match="is no kept reading: it holds other tensors"):
        Reading.load(path, model, tokenizer)
    save_file({"a": torch.zeros(3)}, path, {"ropewalk.reading": '{"format": 99}'})
    with pytest.raises(ReadingError, match="a kept reading of format 99, and this version of ropewalk knows format 1"):
        Reading.load(path, model, tokenizer)
    save_file({"text": torch.zeros(3).byte()}, path, {"ropewalk.reading": '{"format": 1}'})
    with pytest.raises(ReadingError, match="is a broken kept reading"):
        Reading.load(path, model, tokenizer)
    path.write_text("some text " * 100)
    with pytest.raises(ReadingError, match="is no kept reading, or a broken one"):
        Reading.load(path, model, tokenizer)
    with pytest.raises(ReadingError, match="there is no file"):
        Reading.load(tmp_path / "nothing", model, tokenizer)
    with pytest.raises(ReadingError, match="is a folder, not a file"):
        Reading.load(tmp_path, model, tokenizer)


def test_where_it_cannot_be_written(model, tokenizer, tmp_path):
    reading = read(model, tokenizer, TEXT)
    path = tmp_path / "kept"
    path.write_text("something dear")
    with pytest.raises(ReadingError, match=r"would take 1,099,511,627,776 MiB, and [\d,]+ MiB are free there"):
        check_place(path, 1 << 60)
    with pytest.raises(ReadingError, match="there is no folder"):
        reading.save(tmp_path / "nowhere" / "kept")
    with pytest.raises(ReadingError, match="is a folder, not a file"):
        reading.save(tmp_path)
    with pytest.raises(ReadingError, match="File name too long"):
        reading.save(tmp_path / ("x" * 300))
    assert path.read_text() == "something dear"
    reading.save(path)
    assert Kept.open(path).text == TEXT


def test_other_kinds_of_layers(tokenizer, tmp_path):
    """Ones that use another layer's keys, and ones that keep a state, into which they write."""
    sharing = TinyModel(
        "Gemma3nTextConfig",
        {
            "head_dim": 16,
            "num_hidden_layers": 4,
            "num_kv_shared_layers": 2,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "sliding_window": 24,
            "vocab_size_per_layer_input": 96,
            "hidden_size_per_layer_input": 8,
            "laurel_rank": 8,
            "altup_num_inputs": 2,
            "activation_sparsity_pattern": [0.0] * 4,
            "intermediate_size": [64] * 4,
        },
    ).build(64)
    reading = read(sharing, tokenizer, TEXT)
    reading.save(tmp_path / "kept")
    for one in (reading, Reading.load(tmp_path / "kept", sharing, tokenizer)):
        for question in QUESTIONS:
            assert one.ask(question, max_new_tokens=NEW).token_ids == unsplit(reading, question).token_ids
    options = {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False}
    reading = read(TinyModel("Lfm2Config", options).build(64), tokenizer, TEXT)
    for question in QUESTIONS:
        assert reading.ask(question, max_new_tokens=NEW).token_ids == unsplit(reading, question).token_ids
    with pytest.raises(ReadingError, match="layer 0 keeps a LinearAttentionLayer, which cannot be kept in a file"):
        reading.save(tmp_path / "other")
