# SPDX-License-Identifier: Apache-2.0
"""Asks about a document that is longer than the model's training window.

python examples/long_document.py [MODEL] [FILE] [QUESTION]
"""

import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer

import ropewalk
from ropewalk.data import alice

name = sys.argv[1] if len(sys.argv) > 1 else "HuggingFaceTB/SmolLM2-135M-Instruct"
document = Path(sys.argv[2]).read_text(encoding="utf-8") if len(sys.argv) > 2 else alice()[:50_000]
question = sys.argv[3] if len(sys.argv) > 3 else "Who is this story about?"

tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoModelForCausalLM.from_pretrained(name)
messages = [{"role": "user", "content": f"{document}\n\n{question}"}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
tokens = inputs["input_ids"].shape[1]

# The handle says which map was chosen, how far it reaches, and what was found in the model.
with ropewalk.extend(model, target_length=tokens + 100) as handle:
    print(handle, f"\n\nReading {tokens} tokens ...\n")
    # prefill_chunk_size: the text is read in pieces, so that memory grows with the cache alone.
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    model.generate(**inputs, max_new_tokens=100, do_sample=False, prefill_chunk_size=2048, streamer=streamer)
