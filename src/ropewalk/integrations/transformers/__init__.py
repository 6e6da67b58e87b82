# SPDX-License-Identifier: Apache-2.0
"""transformers 5: load a model, extend it in place, undo it, and generate from long prompts.

Nothing is imported here: transformers takes seconds to import, and the command line shows its help without it.
"""
