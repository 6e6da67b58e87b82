"""Generation of an extended model on a CUDA device."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

import ropewalk
from ropewalk.testing import tiny_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: make test-gpu on one"),
]


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def model(request):
    return tiny_model("llama").to("cuda", request.param)


@pytest.mark.parametrize("cache", [None, "static"])
def test_generate_equals_cpu(model, cache):
    """The default static cache compiles its decoding step on a GPU."""
    ids = torch.arange(3, 90)[None] % model.config.vocab_size
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "cache_implementation": cache}
    with ropewalk.extend(model, ropewalk.SelfExtend(4, 16)):
        tokens = model.generate(ids.cuda(), **options)[0, ids.shape[1] :].cpu()
    if model.dtype == torch.float32:
        on_cpu = tiny_model("llama")
        with ropewalk.extend(on_cpu, ropewalk.SelfExtend(4, 16)):
            expected = on_cpu.generate(ids, max_new_tokens=12, min_new_tokens=12, do_sample=False)
        assert tokens.tolist() == expected[0, ids.shape[1] :].tolist()


def test_left_padded_batch_equals_its_rows_alone():
    model = tiny_model("llama").cuda()
    ids = torch.randint(3, 90, (2, 60), device="cuda")
    mask = torch.ones_like(ids)
    mask[0, :25] = 0
    with ropewalk.extend(model, ropewalk.SelfExtend(4, 16)), torch.inference_mode():
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        both = model(ids, attention_mask=mask, position_ids=positions).logits
        alone = model(ids[:1, 25:]).logits
    torch.testing.assert_close(both[:1, 25:], alone, rtol=0, atol=1e-4)
