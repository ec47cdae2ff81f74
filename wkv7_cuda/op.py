"""From a pair of plain kernels to an operator that autograd, torch.compile and FakeTensorMode know.

A kernel module (cpu.py, chunk.py, cuda.py, triton.py) supplies two functions over ordinary tensors, for WKV-7

    forward(r, w, k, v, a, b, state, save: bool) -> (y, state_T, saved)
    backward(r, w, k, v, a, b, state, saved, dy, dstate) -> (dr, dw, dk, dv, da, db, dstate0)

and for WKV-6 (wkv6_cpu.py, wkv6_chunk.py) the same with its own inputs, r w k v u: RECURRENCES.

| tensor | shape | dtype |
|---|---|---|
| r w k v a b, y, dy, dr ... db | (B,T,H,N) | all the same: a floating dtype that the kernel names |
| u, du | (H,N) | that of r |
| state, state_T, dstate, dstate0 | (B,H,N value,N key) | float32; float64 if the others are |
| saved | the kernel's own affair | likewise; without `save` it is `state.new_empty(0)` |

Both receive contiguous tensors and run outside any autocast; both return new tensors that alias no argument. Nothing
else is asked of a kernel: shapes and dtypes were checked, missing gradients were replaced by zeros.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import build

WKV7 = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
WKV6 = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Misfit(ValueError):
    """Inputs that an operator does not compute with. The text is one line: what it is, and the way out."""


class Recurrence(NamedTuple):
    """The inputs before `state`, a letter each: (B,T,H,N), then (H,N); and how many they are, for an error's text."""

    tokens: str
    heads: str
    count: str


RECURRENCES = {"wkv7": Recurrence("rwkvab", "", "six"), "wkv6": Recurrence("rwkv", "u", "five")}


def register(
    name: str,
    forward: Callable[..., tuple[Tensor, Tensor, Tensor]],
    backward: Callable[..., tuple[Tensor, ...]],
    new_saved: Callable[[Tensor, Tensor], Tensor],
    *,
    recurrence: str = "wkv7",
    device: str | None = None,
    dtypes: Sequence[torch.dtype] = FLOATS,
    head_size: int | None = None,
) -> WKV7 | WKV6:
    """Register `pissa_rwkv::<recurrence>_<name>` and `..._backward`; return f(r, w, k, v, ..., state) -> (y, state_T).

    new_saved(r, state): an uninitialised tensor like the one `forward` saves (what the fake implementation returns).
    recurrence: which of RECURRENCES it is, thus what the inputs are.
    device, dtypes, head_size: what the kernel can do; None: anything. f raises Misfit on the rest, in one line.
    To be called once per name, recurrence and process.
    """
    letters = (*RECURRENCES[recurrence].tokens, *RECURRENCES[recurrence].heads, "state")
    operator, takes = f"pissa_rwkv::{recurrence}_{name}", ", ".join(f"Tensor {letter}" for letter in letters)
    gives = ", ".join(["Tensor"] * len(letters))  # a gradient for each

    @torch.library.custom_op(
        operator, mutates_args=(), device_types=device, schema=f"({takes}, bool save) -> (Tensor, Tensor, Tensor)"
    )
    def forward_op(*arguments):
        *inputs, save = arguments
        with torch.autocast(inputs[0].device.type, enabled=False):
            return forward(*(x.contiguous() for x in inputs), save)

    @torch.library.custom_op(
        f"{operator}_backward", mutates_args=(), device_types=device,
        schema=f"({takes}, Tensor saved, Tensor dy, Tensor dstate) -> ({gives})",
    )  # fmt: skip
    def backward_op(*arguments):
        with torch.autocast(arguments[0].device.type, enabled=False):
            return backward(*(x.contiguous() for x in arguments))

    @forward_op.register_fake
    def _(*arguments):
        r, state, save = arguments[0], *arguments[-2:]
        return r.new_empty(r.shape), state.new_empty(state.shape), new_saved(r, state) if save else state.new_empty(0)

    @backward_op.register_fake
    def _(*arguments):
        return tuple(x.new_empty(x.shape) for x in arguments[: len(letters)])

    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:-1], output[2])
        ctx.mark_non_differentiable(output[2])
        ctx.set_materialize_grads(False)  # else autograd would fill zeros as large as `saved`

    def gradient(ctx, dy, dstate, _):
        *inputs, saved = ctx.saved_tensors
        r, state = inputs[0], inputs[-1]
        dy = r.new_zeros(r.shape) if dy is None else dy
        dstate = state.new_zeros(state.shape) if dstate is None else dstate
        return (*backward_op(*inputs, saved, dy, dstate), None)

    forward_op.register_autograd(gradient, setup_context=setup_context)

    def wkv(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        check(name, inputs, device, dtypes, head_size, recurrence)
        save = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
        y, state_T, _ = forward_op(*inputs, save)
        return y, state_T

    wkv.__name__ = f"{recurrence}_{name}"
    return wkv


def in_the_open(forward: Callable[..., tuple[Tensor, Tensor, Tensor]], backward: Callable[..., tuple[Tensor, ...]]):
    """The same f of kernels that are made of PyTorch's operations, without a custom op around them: whoever counts what
    a program allocates sees each."""

    class Operator(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):
            y, state_T, saved = forward(*(x.contiguous() for x in inputs), any(ctx.needs_input_grad))
            ctx.save_for_backward(*inputs, saved)
            return y, state_T

        @staticmethod
        def backward(ctx, dy, dstate):
            return backward(*(x.contiguous() for x in (*ctx.saved_tensors, dy, dstate)))

    return Operator.apply


# In the words of CUDA's runtime, its driver, Triton, our own launches, and cuBLAS or cuSOLVER.
FULL = ("CUDA error: out of memory", "CUDA driver error: out of memory", "Error [CUDA]: out of memory",
        "(CUDA error 2)", "ALLOC_FAILED")  # fmt: skip


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a GPU had no room: for a tensor, for CUDA's context, or for what a library of it works in."""
    return isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in FULL)


BARS = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 5e-2}  # beyond that an error is not rounding


def verify(
    name: str, forward: Callable, backward: Callable, differs: Callable[..., float], device: str = "cuda",
    dtypes: Sequence[torch.dtype] = tuple(BARS),
) -> None:  # fmt: skip
    """A look at what was compiled, for this GPU and by this compiler, before a run is trusted to it; BuildError if it
    errs.

    differs: the worst relative error of (forward, backward) in a dtype on a device.
    """
    for dtype in dtypes:
        try:
            with torch.device("cpu"):  # whoever loads an operator while a model is made on "meta" would get no numbers
                error = differs((forward, backward), dtype, device)
        except Exception as refused:  # of whichever compiler or driver
            if is_out_of_memory(refused):
                raise
            said = (str(refused).strip() or repr(refused)).splitlines()[0]
            problem = f"the {name} operator does not run on this GPU ({said})"
            raise build.BuildError(f"{problem}: is the driver as new as the compiler? {build.REMEDY}") from None
        if not error < BARS[dtype]:
            problem = f"the {name} operator computes wrongly on this GPU: in {dtype} it is off by {error:.1e}"
            raise build.BuildError(f"{problem}: please report it with nvidia-smi and nvcc --version, {build.REMEDY}")


def check(
    name: str, inputs: Sequence[Tensor], device: str | None, dtypes: Sequence[torch.dtype], head_size: int | None,
    recurrence: str = "wkv7",
) -> None:  # fmt: skip
    """Raise Misfit, that names the value, the choices and the way out."""
    (tokens, heads, count), name = RECURRENCES[recurrence], f"{recurrence} {name}"
    letters = (*tokens, *heads, "state")
    if len(inputs) != len(letters):
        raise Misfit(f"{name}: {len(inputs)} tensors; expected {' '.join(letters)}")
    r, state = inputs[0], inputs[-1]
    for letter, x in zip(letters[:-1], inputs, strict=False):
        if letter in tokens and (x.dim() != 4 or x.shape != r.shape or 0 in x.shape):
            raise Misfit(f"{name}: {letter} has shape {list(x.shape)}, not that of r, [B,T,H,N], all >= 1")
        if letter in heads and x.shape != r.shape[2:]:
            raise Misfit(f"{name}: {letter} has shape {list(x.shape)}, not {list(r.shape[2:])}, [H,N] of r")
        if x.dtype != r.dtype or x.dtype not in dtypes:
            choices = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            raise Misfit(f"{name}: {letter} is {x.dtype}, r is {r.dtype}; cast all {count} to one of {choices}")
    if head_size is not None and r.shape[3] != head_size:
        raise Misfit(f"{name}: head size {r.shape[3]}, compiled for {head_size}; --op chunk takes any")
    (batch, _, heads, size), dtype = r.shape, torch.promote_types(r.dtype, torch.float32)
    if state.shape != (batch, heads, size, size) or state.dtype != dtype:
        expected = f"{dtype} [{batch},{heads},{size},{size}] (batch, head, value, key)"
        raise Misfit(f"{name}: state is {state.dtype} {list(state.shape)}; pass {expected}")
    for letter, x in zip(letters, inputs, strict=True):
        if x.device != r.device or device not in (None, x.device.type) and not x.is_meta:
            raise Misfit(
                f"{name}: {letter} is on {x.device}, not {device or r.device}: move it, or use --op chunk, for any"
            )
