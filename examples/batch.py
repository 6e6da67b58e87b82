# SPDX-License-Identifier: Apache-2.0
"""Asks several texts of unlike length at once; each row answers as it would alone.

python examples/batch.py [MODEL]
"""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

import ropewalk

name = sys.argv[1] if len(sys.argv) > 1 else "HuggingFaceTB/SmolLM2-135M-Instruct"
tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left")  # the answers begin side by side
if tokenizer.pad_token is None:
    tokenizer.pad_token = tokenizer.eos_token
model = AutoModelForCausalLM.from_pretrained(name)

chats = []
for key, sentences in (("71432", 100), ("20518", 600), ("96307", 700)):
    filler = "The grass is green. The sky is blue. Here we go. " * sentences
    text = f"The pass key is {key}. {filler}What is the pass key?"
    chats.append([{"role": "user", "content": text}])
prompts = tokenizer.apply_chat_template(chats, add_generation_prompt=True, tokenize=False)
inputs = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)

with ropewalk.extend(model, target_length=12_000):
    output = model.generate(**inputs, max_new_tokens=12, do_sample=False)
answers = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
for tokens, answer in zip(inputs["attention_mask"].sum(dim=1).tolist(), answers, strict=True):
    print(f"{tokens:6} tokens: {answer}")
