# SPDX-License-Identifier: Apache-2.0
"""Tiny GGUF files with random weights, written as converters write them."""

import numpy as np
import pytest
import torch

CONTEXT = 256
LETTERS = [*map(chr, range(33, 126)), "ab"]


def write_gguf(path, architecture="llama", *, metadata=None, tensors=None, context=CONTEXT, hidden=64, heads=4):
    """A file of one layer, with `metadata` under the architecture's name and `tensors` beside the weights."""
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(context)
    writer.add_embedding_length(hidden)
    writer.add_block_count(1)
    writer.add_feed_forward_length(64)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(LETTERS))
    for key, value in ({"rope.freq_base": 10_000.0} | (metadata or {})).items():
        add = {str: writer.add_string, float: writer.add_float32, int: writer.add_uint32, bool: writer.add_bool}
        add[type(value)](f"{architecture}.{key}", value)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(LETTERS)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(1)
    for name, shape in _shapes(architecture, hidden).items():
        writer.add_tensor(name, torch.randn(shape).numpy() / 4)
    for name, value in (tensors or {}).items():
        writer.add_tensor(name, np.asarray(value, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _shapes(architecture, hidden):
    shapes = {
        "token_embd": (len(LETTERS), hidden),
        "output_norm": (hidden,),
        "output": (len(LETTERS), hidden),
        "blk.0.attn_norm": (hidden,),
        "blk.0.attn_output": (hidden, hidden),
        "blk.0.ffn_norm": (hidden,),
        "blk.0.ffn_down": (hidden, 64),
    }
    if architecture == "phi3":
        shapes |= {"blk.0.attn_qkv": (3 * hidden, hidden), "blk.0.ffn_up": (128, hidden)}
    else:
        shapes |= {f"blk.0.attn_{kind}": (hidden, hidden) for kind in "qkv"}
        shapes |= {f"blk.0.ffn_{kind}": (64, hidden) for kind in ("gate", "up")}
    weights = {f"{name}.weight": shape for name, shape in shapes.items()}
    if architecture == "qwen2":
        weights |= {f"blk.0.attn_{kind}.bias": (hidden,) for kind in "qkv"}
    if architecture == "gemma3":
        weights |= {f"blk.0.{name}.weight": (hidden,) for name in ("post_attention_norm", "post_ffw_norm")}
    return weights
