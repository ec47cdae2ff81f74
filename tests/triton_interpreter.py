"""Triton's interpreter, which runs kernels on the CPU if TRITON_INTERPRET=1 stood in the environment before triton was
first imported. tests/test_wkv_triton.py starts a second pytest so, which runs the tests marked INTERPRETED."""

import os

import pytest

ON = os.environ.get("TRITON_INTERPRET") == "1"
INTERPRETED = pytest.mark.skipif(not ON, reason="no GPU; test_wkv_triton.py runs this in Triton's interpreter")


def mend() -> None:
    """Triton 3.9 holds bfloat16 as uint16: it rounds towards zero, and multiplies matrices of these integers. Triton
    3.6 counts loops by arrays of one number, which numpy 2.5 does not take for numbers. Neither makes TF32 of what is
    multiplied in TF32, of which a GPU reads no more than 10 bits of the fraction."""
    import numpy as np
    import triton.language as tl
    from triton._C.libtriton import ir
    from triton.runtime import interpreter
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    cast, dot, patch = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot, interpreter._patch_lang_tensor

    def with_index(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    def to_nearest(self, x, to):
        if (x.dtype.scalar, to.scalar) != (tl.float32, tl.bfloat16):
            return cast(self, x, to)
        bits = x.data.view(np.uint32)
        return TensorHandle(((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16), tl.bfloat16)

    def tf32(x):
        return TensorHandle((x.data.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32), x.dtype.scalar)

    def of_floats(self, a, b, d, precision, *rest):
        if precision == ir.INPUT_PRECISION.TF32:
            a, b = (tf32(x) if x.dtype.scalar == tl.float32 else x for x in (a, b))
        a, b = (self.cast_impl(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
        return dot(self, a, b, d, precision, *rest)

    InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot = to_nearest, of_floats
    interpreter._patch_lang_tensor = with_index


if ON:
    mend()
