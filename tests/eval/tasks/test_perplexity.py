# SPDX-License-Identifier: Apache-2.0
import math

import pytest
import torch
from pydantic import ValidationError

from ropewalk.data import alice
from ropewalk.eval.data_files import DataError
from ropewalk.eval.subjects import Dummy, Hashes, Model
from ropewalk.eval.tasks.perplexity import Perplexity, all_windows, some_windows
from ropewalk.integrations.transformers.models import LoadedModel
from ropewalk.integrations.transformers.sources import Source
from ropewalk.testing import tiny_model

WORDS = 500


@pytest.fixture
def data_dir(tmp_path):
    """Four books whose words are all of other lengths than their neighbours'."""
    folder = tmp_path / "pg19" / "test_books"
    folder.mkdir(parents=True)
    for number in range(4):
        words = ["x" * (1 + (i * i + number) % 7) for i in range(WORDS + number)]
        (folder / f"{number}.txt").write_text(" ".join(words))
    return tmp_path


class Recording(Dummy):
    """Tokens are the places of words in the book, and each as likely as its place says."""

    def __init__(self, special=0):
        super().__init__()
        self.__dict__.update(special=special, asked=[])

    def encode(self, text, chat=False):
        return [-1] * self.special + list(range(len(text.split()))) + [-2] * (self.special > 1)

    def log_likelihoods(self, passages):
        self.asked += [(list(one.token_ids), one.first) for one in passages]
        return [[-token / WORDS for token in one.token_ids[one.first :]] for one in passages]

    @property
    def scored(self):
        return [token for ids, first in self.asked for token in ids[first:]]


def task(data_dir=None, **settings):
    wanted = {"data_dir": data_dir, "lengths": (64,), "stride": 16, "books": 1}
    idle = Perplexity(**{name: its for name, its in settings.items() if name in ("mode", "text")}).without_effect
    return Perplexity(**{name: its for name, its in wanted.items() if name not in idle} | settings)


def run(one, subject):
    return [one.outcomes([example], subject)[0] for example in one.examples()]


@pytest.mark.parametrize("tokens", [64, 65, 79, 80, 81, 500])
@pytest.mark.parametrize("length", [17, 64])
def test_all_windows_score_every_token_once(tokens, length):
    windows = all_windows(tokens, length, 16)
    assert [i for window in windows for i in range(window.first, window.end)] == list(range(tokens))
    assert (windows[0].begin, windows[0].end) == (0, length)
    assert all(window.end - window.begin == length for window in windows)
    assert all(window.end - window.first <= 16 for window in windows[1:])


@pytest.mark.parametrize("count", [1, 2, 5, 100])
@pytest.mark.parametrize("tokens", [64, 79, 80, 500])
def test_some_windows_score_the_same_tokens_for_every_length(tokens, count):
    short, long = (some_windows(tokens, length, 16, 64, count) for length in (17, 64))
    assert [(window.first, window.end) for window in short] == [(window.first, window.end) for window in long]
    assert len(long) == min(count, (tokens - 64) // 16 + 1)
    assert long[0].begin == 0
    for window in long:
        assert (window.end - window.begin, window.end - window.first) == (64, 16)
        assert window.end <= tokens
    if tokens == 500 and count == 5:
        assert [window.end for window in long] == [64, 144, 240, 320, 416]


def test_a_book_is_encoded_once(data_dir):
    class Counting(Recording):
        def encode(self, text, chat=False):
            self.__dict__.setdefault("texts", []).append(text)
            return super().encode(text, chat)

    subject = Counting()
    run(task(data_dir, lengths=(32, 64), books=3), subject)
    assert len([text for text in subject.texts if text]) == 3


@pytest.mark.parametrize("special", [0, 1, 2])
def test_sliding_over_a_whole_book(data_dir, special):
    subject = Recording(special)
    [outcome] = run(task(data_dir, windows=0, tokens=200), subject)
    # Without special tokens nothing stands before the first.
    assert subject.scored == list(range(special == 0, 200))
    assert outcome.scores["tokens"] == len(subject.scored)
    assert outcome.scores["nll"] == pytest.approx(sum(range(200)) / WORDS)
    assert outcome.scores["perplexity"] == pytest.approx(math.exp(outcome.scores["nll"] / len(subject.scored)))
    assert outcome.prompt_tokens == 64
    for ids, _ in subject.asked:
        assert len(ids) == 64
        assert ids[:special] == [-1] * special
        assert -1 not in ids[special:]
        assert -2 not in ids


@pytest.mark.parametrize("special", [0, 1])
def test_sliding_with_a_cap(data_dir, special):
    subject = Recording(special)
    outcomes = run(task(data_dir, windows=4, lengths=(32, 128)), subject)
    assert [outcome.scores["tokens"] for outcome in outcomes] == [64, 64]
    assert outcomes[0].scores == outcomes[1].scores
    assert [len(ids) for ids, _ in subject.asked] == [32] * 4 + [128] * 4
    assert subject.scored[:64] == subject.scored[64:]
    assert min(subject.scored) < 128 < 300 < max(subject.scored)


@pytest.mark.parametrize("special", [0, 1])
@pytest.mark.parametrize(("settings", "read"), [({}, 128), ({"tokens": 200}, 200)])
def test_the_start_of_all_books(data_dir, special, settings, read):
    subject = Recording(special)
    one = task(data_dir, mode="start", lengths=(32, 128), **settings)
    outcomes = run(one, subject)
    assert [example.cell["length"] for example in one.examples()] == [32] * 4 + [128] * 4
    # Every token of the start is scored once, and so by every length; special ones count as read.
    end = read - special if read == 128 else read
    each = list(range(special == 0, end))
    assert subject.scored == each * 8
    assert {outcome.scores["tokens"] for outcome in outcomes} == {len(each)}
    assert max(len(ids) for ids, _ in subject.asked[: -4 if read == 128 else None]) <= 128


def test_positions(data_dir):
    subject = Recording()
    [outcome] = run(task(data_dir, mode="positions", lengths=(50,), bucket=20), subject)
    assert subject.asked == [(list(range(50)), 1)]
    scores = outcome.scores
    assert {name: scores[name] for name in scores if name.startswith("tokens")} == {
        "tokens": 49, "tokens_0": 19, "tokens_20": 20, "tokens_40": 10,
    }  # fmt: skip
    assert scores["nll_0"] == pytest.approx(sum(range(20)) / WORDS)
    assert scores["nll_20"] == pytest.approx(sum(range(20, 40)) / WORDS)
    assert scores["nll"] == pytest.approx(sum(scores[f"nll_{begin}"] for begin in (0, 20, 40)))


def test_special_tokens_have_positions_and_no_scores(data_dir):
    subject = Recording(special=2)
    [outcome] = run(task(data_dir, mode="positions", lengths=(50,), bucket=20), subject)
    assert subject.asked == [([-1, -1, *range(48)], 2)]
    assert [outcome.scores[f"tokens_{begin}"] for begin in (0, 20, 40)] == [18, 20, 10]
    assert outcome.scores["nll_20"] == pytest.approx(sum(range(18, 38)) / WORDS)


@pytest.mark.parametrize(("length", "bucket", "last"), [(40, 20, 20), (41, 20, 40), (2, 1, 1), (5, 100, 0)])
def test_edges_of_the_buckets(data_dir, length, bucket, last):
    subject = Recording(special=1)
    [outcome] = run(task(data_dir, mode="positions", lengths=(length,), bucket=bucket), subject)
    buckets = [int(name.removeprefix("tokens_")) for name in outcome.scores if name.startswith("tokens_")]
    assert max(buckets) == last
    assert sum(outcome.scores[f"tokens_{begin}"] for begin in buckets) == length - 1
    assert outcome.scores["tokens_0"] == min(bucket, length) - 1 if 0 in buckets else bucket == 1


def test_books_are_drawn_by_the_seed(data_dir):
    def books(**settings):
        return [example.name for example in task(data_dir, **settings).examples()]

    assert len(books(books=9)) == 4
    assert books(books=4)[:2] == books(books=2)
    assert len({tuple(books(books=2, seed=seed)) for seed in range(9)}) > 3
    assert books(lengths=(64, 32)) == books(lengths=(64,)) + books(lengths=(32,))


def test_what_identifies_a_run(data_dir, tmp_path_factory):
    one = task(data_dir)
    assert str(data_dir) not in str(one.settings)
    assert len(one.settings["sha256"]) == 64
    again = task(data_dir.rename(tmp_path_factory.mktemp("other") / "place"))
    assert again.settings == one.settings
    assert task(text="alice").settings != one.settings
    folder = tmp_path_factory.mktemp("changed")
    (folder / "pg19" / "test_books").mkdir(parents=True)
    for number in range(4):
        (folder / "pg19" / "test_books" / f"{number}.txt").write_text("other words")
    assert task(folder).settings != one.settings


def test_what_cannot_be_scored(data_dir):
    class Broken(Dummy):
        def log_likelihoods(self, passages):
            return [[math.nan]] * len(passages)

    with pytest.raises(ValueError, match="the model gives probabilities that are not numbers, or 0"):
        run(task(data_dir), Broken())
    with pytest.raises(ValueError, match="17 tokens, 2 of them special, are too few for a stride of 16"):
        run(task(data_dir, lengths=(17,)), Recording(special=2))
    with pytest.raises(ValueError, match=r"\d has 50\d tokens, and 600 are needed"):
        run(task(data_dir, lengths=(64, 600)), Dummy())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lengths": (300, 16)}, "must be longer than the stride of 16 tokens, got 16"),
        ({"lengths": (1,), "mode": "positions"}, "must be 2 tokens or more, got 1"),
        ({"lengths": (300, 16), "mode": "start"}, "must be longer than the stride of 16 tokens, got 16"),
        ({"lengths": ()}, "at least 1 item"),
        ({"tokens": 63}, "must be no more than the 63 tokens of each book, got 64"),
        ({"mode": "slide"}, "'sliding', 'start' or 'positions'"),
    ],
)
def test_settings_that_do_not_fit(settings, message):
    with pytest.raises(ValidationError, match=message):
        task(**settings)


def test_no_such_texts():
    with pytest.raises(DataError, match="Did you mean 'alice'"):
        task(text="alise").read()


@pytest.mark.parametrize("mode", ["sliding", "positions"])
def test_on_a_model(mode):
    """Against the loss that the model itself computes."""

    class Words:
        def __call__(self, text):
            return {"input_ids": [1 + len(word) % 90 for word in text.split()]}

    model = tiny_model("llama")
    subject = Model(LoadedModel(Source("tiny", ""), model, Words()), 64, Hashes(), chunk=10)
    one = task(text="alice", mode=mode, lengths=(40,), **({"windows": 1} if mode == "sliding" else {}))
    [outcome] = run(one, subject)
    ids = torch.tensor([Words()(alice())["input_ids"][:40]])
    labels = ids.clone()
    if mode == "sliding":
        labels[0, : 40 - 16] = -100
    assert outcome.scores["perplexity"] == pytest.approx(math.exp(model(ids, labels=labels).loss.item()), rel=1e-4)
