# SPDX-License-Identifier: Apache-2.0
"""Block by block, against one forward pass with a block-diagonal mask and positions m mod window."""

import pytest
import torch

from ropewalk.eval.methods import Method
from ropewalk.eval.subjects import Hashes, Model, Passage, Prompt
from ropewalk.integrations.transformers.models import LoadedModel
from ropewalk.integrations.transformers.sources import Source
from ropewalk.maps import Infinite
from ropewalk.testing import tiny_model
from ropewalk.testing.saved import tiny_tokenizer

WINDOW = 8


def under(model, window=WINDOW):
    subject = Model(LoadedModel(Source("tiny", ""), model, tiny_tokenizer()), 64, Hashes(), chunk=5)
    return subject.under(Method(f"infinite(window={window})", Infinite(window)))


@pytest.fixture(scope="module", params=["llama", "phi"])
def model(request):
    return tiny_model(request.param).double()


@torch.no_grad()
def by_definition(model, ids, window):
    """Logits with the mask and the positions written out."""
    block = torch.arange(len(ids)) // window
    seen = (block[:, None] == block) & torch.ones(len(ids), len(ids)).tril().bool()
    mask = torch.zeros(seen.shape, dtype=model.dtype).masked_fill(~seen, torch.finfo(model.dtype).min)
    positions = torch.arange(len(ids)) % window
    return model(torch.tensor([ids]), attention_mask=mask[None, None], position_ids=positions[None]).logits[0]


def written_by_definition(model, ids, new_tokens):
    tokens = list(ids)
    for _ in range(new_tokens):
        tokens.append(int(by_definition(model, tokens, WINDOW)[-1].argmax()))
    return tokens[len(ids) :]


def decoded(tokens):
    return tiny_tokenizer().decode(tokens, skip_special_tokens=True)


def text(tokens, seed=0):
    return torch.randint(1, 96, (tokens,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.mark.parametrize("tokens", [2, 8, 9, 10, 17, 40])
def test_scores(model, tokens):
    ids = text(tokens)
    expected = by_definition(model, ids, WINDOW).log_softmax(-1)[range(tokens - 1), ids[1:]]
    for first in {1, 2, 7, 8, 9, 10, 16, 17, 39} & set(range(tokens)):
        with under(model) as subject:
            scores = torch.tensor(subject.log_likelihoods([Passage(ids, first)])[0], dtype=torch.float64)
        # They are computed from logits in float32.
        torch.testing.assert_close(scores, expected[first - 1 :], rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("tokens", [1, 7, 8, 9, 16])
@pytest.mark.parametrize("new_tokens", [1, 9, 20])
def test_answers(model, tokens, new_tokens):
    ids = text(tokens, seed=1)
    with under(model) as subject:
        answer = subject.answers([Prompt(ids, new_tokens)])[0]
    assert answer == decoded(written_by_definition(model, ids, new_tokens))


@pytest.mark.parametrize("place", [0, 1, 5])
def test_a_stop(place):
    """At the end of a block, where one begins, and across both."""
    model, ids = tiny_model("llama").double(), text(WINDOW)
    written = written_by_definition(model, ids, 20)
    whole = decoded(written)
    with under(model) as subject:
        for stop in (decoded(written[place : place + 1]), decoded(written[place : place + 2])):
            assert stop in whole
            assert subject.answers([Prompt(ids, 20, stop)])[0] == whole.partition(stop)[0]


@pytest.mark.parametrize("place", [0, 1, 8, 9])
def test_an_end_token(place):
    model, ids = tiny_model("llama").double(), text(WINDOW)
    written = written_by_definition(model, ids, 20)
    assert written[place] not in written[:place], "pick another text"
    model.generation_config.eos_token_id = [95, written[place]]
    with under(model) as subject:
        assert subject.answers([Prompt(ids, 20)])[0] == decoded(written[: place + 1])
