# SPDX-License-Identifier: Apache-2.0
"""Which parameters each map takes for a length, and how far it then reaches. Nothing is loaded but a configuration.

python examples/choose_parameters.py [MODEL] [TOKENS]
"""

import sys

from transformers import AutoConfig

from ropewalk import LengthError
from ropewalk.maps import MAPS

name = sys.argv[1] if len(sys.argv) > 1 else "HuggingFaceTB/SmolLM2-135M-Instruct"
tokens = int(sys.argv[2]) if len(sys.argv) > 2 else 32_768
window = AutoConfig.from_pretrained(name).max_position_embeddings

print(f"trained on {window} tokens, to read {tokens}")
for kind in MAPS.values():
    try:
        chosen = kind.for_length(tokens, window)
    except LengthError as error:
        print(f"- {error}")
        continue
    highest = chosen.largest_relative_position(tokens)
    print(f"- {chosen}: positions up to {highest:.0f}, recommended up to {chosen.recommended_length(window)} tokens")
