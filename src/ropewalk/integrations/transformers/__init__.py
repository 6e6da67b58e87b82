"""transformers 5: extend a loaded model in place, and undo it."""

from ropewalk.integrations.transformers.extend import Extension, extend, restore
from ropewalk.integrations.transformers.probe import UnsupportedModelError

__all__ = ["Extension", "UnsupportedModelError", "extend", "restore"]
