# SPDX-License-Identifier: Apache-2.0
"""Repairs to Triton 3.6's interpreter, which runs kernels on a CPU through numpy; tests of kernels import them.

- numpy >= 2.4 no longer turns an array of one element into an index, as loop bounds need.
- bfloat16 lives in uint16 arrays, whose bits `tl.dot` multiplies as if they were whole numbers.
- float32 is cut down to bfloat16 where a GPU rounds to nearest even.
- `triton.language` is searched for what to replace whenever one device function calls another, a third of all time.
"""

from __future__ import annotations

import inspect

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def _widened(bits):
    """float32 array of the bfloat16 numbers in a uint16 array."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _narrowed(x):
    """uint16 array of the bfloat16 numbers nearest to a float32 array's."""
    bits = x.view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(x), 0x7FC0, rounded).astype(np.uint16)


def _repair():
    builder = interpreter.InterpreterBuilder
    original_tensor, original_dot = interpreter._patch_lang_tensor, builder.create_dot
    original_casts = {name: getattr(builder, name) for name in ("cast_impl", "create_fp_to_fp")}

    def patch_lang_tensor(tensor, scope):
        original_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    def create_dot(self, a, b, *rest):
        a, b = (
            interpreter.TensorHandle(_widened(x.data), tl.float32) if x.dtype.scalar == tl.bfloat16 else x
            for x in (a, b)
        )
        return original_dot(self, a, b, *rest)

    def cast(name):
        def convert(self, source, target_type, *mode):
            pair = (source.dtype.scalar, target_type.scalar)
            if pair == (tl.bfloat16, tl.float32):
                return interpreter.TensorHandle(_widened(source.data), tl.float32)
            if pair == (tl.float32, tl.bfloat16):
                return interpreter.TensorHandle(_narrowed(source.data), tl.bfloat16)
            return original_casts[name](self, source, target_type, *mode)

        return convert

    original_patch = interpreter._patch_lang

    def patch_lang(function):
        used = [value for value in function.__globals__.values() if inspect.ismodule(value) and value in (tl, tl.core)]
        if any(tl.core.is_builtin(language.load) for language in used):
            return original_patch(function)
        return interpreter._LangPatchScope()  # all is replaced; what did it restores it

    interpreter._patch_lang = patch_lang
    interpreter._patch_lang_tensor = patch_lang_tensor
    builder.create_dot = create_dot
    for name in original_casts:
        setattr(builder, name, cast(name))


_repair()
