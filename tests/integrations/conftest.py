# SPDX-License-Identifier: Apache-2.0
import pytest
import torch


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    # Tensors this small only lose time to threads that wait for each other.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory):
    """A tiny llama with random weights, as a GGUF file."""
    gguf = pytest.importorskip("gguf")
    path = tmp_path_factory.mktemp("gguf") / "tiny.Q8.gguf"
    hidden, heads, inner, letters = 64, 4, 64, [*map(chr, range(33, 126)), "ab"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(hidden)
    writer.add_block_count(1)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(len(letters))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(letters)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    shapes = {
        "token_embd": (len(letters), hidden),
        "output_norm": (hidden,),
        "output": (len(letters), hidden),
        "blk.0.attn_norm": (hidden,),
        **{f"blk.0.attn_{kind}": (hidden, hidden) for kind in ("q", "k", "v", "output")},
        "blk.0.ffn_norm": (hidden,),
        **{f"blk.0.ffn_{kind}": (inner, hidden) for kind in ("gate", "up")},
        "blk.0.ffn_down": (hidden, inner),
    }
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", torch.randn(shape).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
