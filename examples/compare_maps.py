# SPDX-License-Identifier: Apache-2.0
"""Asks the same question of one model under every map, and of the model as it is.

python examples/compare_maps.py [MODEL]
"""

import sys
from contextlib import nullcontext
from time import perf_counter

from transformers import pipeline

import ropewalk
from ropewalk import SELF, LeakyReRoPE, ReRoPE, SelfExtend

chat = pipeline("text-generation", sys.argv[1] if len(sys.argv) > 1 else "HuggingFaceTB/SmolLM2-135M-Instruct")
filler = "The grass is green. The sky is blue. Here we go. " * 350
text = f"{filler}The pass key is 71432. {filler}What is the pass key?"

for kind in (None, SelfExtend, SELF, LeakyReRoPE, ReRoPE):
    # A kind of map takes the parameters that fit the length. The model is restored at the end of each turn.
    with nullcontext() if kind is None else ropewalk.extend(chat.model, kind, target_length=12_000) as handle:
        began = perf_counter()
        reply = chat([{"role": "user", "content": text}], max_new_tokens=12, do_sample=False)
        seconds = perf_counter() - began
        under = handle.position_map if handle else "unmodified"
        print(f"{under}: {reply[0]['generated_text'][-1]['content']!r}, {seconds:.0f} s", flush=True)
