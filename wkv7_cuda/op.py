"""From a pair of plain kernels to an operator that autograd, torch.compile and FakeTensorMode know.

A kernel module (cpu.py, chunk.py, cuda.py, triton.py) supplies two functions over ordinary tensors:

    forward(r, w, k, v, a, b, state, save: bool) -> (y, state_T, saved)
    backward(r, w, k, v, a, b, state, saved, dy, dstate) -> (dr, dw, dk, dv, da, db, dstate0)

| tensor | shape | dtype |
|---|---|---|
| r w k v a b, y, dy, dr ... db | (B,T,H,N) | all the same: a floating dtype that the kernel names |
| state, state_T, dstate, dstate0 | (B,H,N value,N key) | float32; float64 if the others are |
| saved | the kernel's own affair | likewise; without `save` it is `state.new_empty(0)` |

Both receive contiguous tensors and run outside any autocast; both return new tensors that alias no argument. Nothing
else is asked of a kernel: shapes and dtypes were checked, missing gradients were replaced by zeros.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

WKV7 = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def register(
    name: str,
    forward: Callable[..., tuple[Tensor, Tensor, Tensor]],
    backward: Callable[..., tuple[Tensor, ...]],
    new_saved: Callable[[Tensor, Tensor], Tensor],
    *,
    device: str | None = None,
    dtypes: Sequence[torch.dtype] = FLOATS,
    head_size: int | None = None,
) -> WKV7:
    """Register `pissa_rwkv::wkv7_<name>` and `..._backward`; return f(r, w, k, v, a, b, state) -> (y, state_T).

    new_saved(r, state): an uninitialised tensor like the one `forward` saves (what the fake implementation returns).
    device, dtypes, head_size: what the kernel can do; None: anything. f raises ValueError on the rest, in one line.
    To be called once per name and process.
    """

    @torch.library.custom_op(f"pissa_rwkv::wkv7_{name}", mutates_args=(), device_types=device)
    def forward_op(
        r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor, save: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        with torch.autocast(r.device.type, enabled=False):
            return forward(*(x.contiguous() for x in (r, w, k, v, a, b, state)), save)

    @torch.library.custom_op(f"pissa_rwkv::wkv7_{name}_backward", mutates_args=(), device_types=device)
    def backward_op(
        r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor,
        saved: Tensor, dy: Tensor, dstate: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        with torch.autocast(r.device.type, enabled=False):
            return backward(*(x.contiguous() for x in (r, w, k, v, a, b, state, saved, dy, dstate)))

    @forward_op.register_fake
    def _(r, w, k, v, a, b, state, save):
        return r.new_empty(r.shape), state.new_empty(state.shape), new_saved(r, state) if save else state.new_empty(0)

    @backward_op.register_fake
    def _(r, w, k, v, a, b, state, saved, dy, dstate):
        return (*(r.new_empty(r.shape) for _ in range(6)), state.new_empty(state.shape))

    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:7], output[2])
        ctx.mark_non_differentiable(output[2])
        ctx.set_materialize_grads(False)  # else autograd would fill zeros as large as `saved`

    def gradient(ctx, dy, dstate, _):
        r, w, k, v, a, b, state, saved = ctx.saved_tensors
        dy = r.new_zeros(r.shape) if dy is None else dy
        dstate = state.new_zeros(state.shape) if dstate is None else dstate
        return (*backward_op(r, w, k, v, a, b, state, saved, dy, dstate), None)

    forward_op.register_autograd(gradient, setup_context=setup_context)

    def wkv7(r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        inputs = (r, w, k, v, a, b, state)
        check(name, inputs, device, dtypes, head_size)
        save = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
        y, state_T, _ = forward_op(*inputs, save)
        return y, state_T

    wkv7.__name__ = f"wkv7_{name}"
    return wkv7


def check(
    name: str, inputs: Sequence[Tensor], device: str | None, dtypes: Sequence[torch.dtype], head_size: int | None
) -> None:
    """Raise ValueError with one line that names the value, the choices and the way out."""
    r, state = inputs[0], inputs[6]
    for letter, x in zip("rwkvab", inputs[:6], strict=True):
        if x.dim() != 4 or x.shape != r.shape or 0 in x.shape:
            raise ValueError(f"wkv7 {name}: {letter} has shape {list(x.shape)}, not that of r, [B,T,H,N], all >= 1")
        if x.dtype != r.dtype or x.dtype not in dtypes:
            choices = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            raise ValueError(f"wkv7 {name}: {letter} is {x.dtype}, r is {r.dtype}; cast all six to one of {choices}")
    if head_size is not None and r.shape[3] != head_size:
        raise ValueError(f"wkv7 {name}: head size {r.shape[3]}, compiled for {head_size}; --op chunk takes any")
    (batch, _, heads, size), dtype = r.shape, torch.promote_types(r.dtype, torch.float32)
    if state.shape != (batch, heads, size, size) or state.dtype != dtype:
        expected = f"{dtype} [{batch},{heads},{size},{size}] (batch, head, value, key)"
        raise ValueError(f"wkv7 {name}: state is {state.dtype} {list(state.shape)}; pass {expected}")
    for letter, x in zip(("r", "w", "k", "v", "a", "b", "state"), inputs, strict=True):
        if x.device != r.device or device not in (None, x.device.type) and not x.is_meta:
            raise ValueError(
                f"wkv7 {name}: {letter} is on {x.device}, not {device or r.device}: move it, or use --op chunk, for any"
            )
