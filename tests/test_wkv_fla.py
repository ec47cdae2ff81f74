"""The `fla` operator: the calling convention against a stand-in with fla's documented semantics; the real one on a GPU.

fla's own kernels do not run in Triton's interpreter: they are tuned by timing on a device, and compute with loop
variables in a way the interpreter does not know.
"""

import math
import sys
from types import ModuleType

import pytest
import torch
from test_wkv import NAMES, error, gpu, make, run

import wkv7_cuda
from pissa_rwkv import wkv7_ref
from wkv7_cuda import fla


def chunk_rwkv7(r, w, k, v, a, b, *, scale, initial_state, output_final_state, safe_gate, lower_bound, chunk_size):
    """What fla documents, token by token: w is the log decay, the state is [B,H,key,value]."""
    assert (scale, output_final_state, safe_gate, chunk_size) == (1.0, True, True, 64)
    assert initial_state.is_contiguous() and w.dtype == initial_state.dtype
    assert math.isclose(lower_bound, -math.exp(-0.5)) and (lower_bound * (1 + 1e-6) <= w).all() and (w <= 0).all()
    S, ys = initial_state, []
    for t in range(r.shape[1]):
        u = torch.einsum("bhk,bhkv->bhv", a[:, t], S)
        S = S * w[:, t].exp()[..., None]
        S = S + torch.einsum("bhk,bhv->bhkv", b[:, t], u) + torch.einsum("bhk,bhv->bhkv", k[:, t], v[:, t])
        ys.append(torch.einsum("bhk,bhkv->bhv", r[:, t], S))
    return torch.stack(ys, 1), S


@pytest.mark.parametrize("regime", ["random", "fast"])
def test_calling_convention(regime):
    """The stand-in, called as fla is, equals the definition: values, and gradients through w and the two states."""
    exact = run(wkv7_ref, *make(2, 9, 2, regime))
    for name, x, e in zip(NAMES, run(fla.bind(chunk_rwkv7), *make(2, 9, 2, regime)), exact, strict=True):
        assert error(x, e) < 1e-13, name


def test_without_a_gpu_or_the_package(monkeypatch):
    """One line with the remedy, and fla not imported where it would only warn."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(wkv7_cuda.BuildError, match="the fla operator needs a GPU and torch sees none: .* --op chunk"):
        fla.load()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "fla", None)
    with pytest.raises(wkv7_cuda.BuildError, match=r"pip install pissa_rwkv\[fla\], or use"):
        fla.load()


def test_arguments_are_checked(monkeypatch):
    """As every operator's, in one line."""
    module = ModuleType("fla.ops.rwkv7")
    module.chunk_rwkv7 = chunk_rwkv7
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name, x in (("fla", ModuleType("fla")), ("fla.ops", ModuleType("fla.ops")), ("fla.ops.rwkv7", module)):
        monkeypatch.setitem(sys.modules, name, x)
    wkv7 = fla.load()
    with pytest.raises(ValueError, match="wkv7 fla: r is torch.float32, .* cast all six to one of bfloat16 or float16"):
        wkv7(*make(1, 3, 1, dtype=torch.float32)[0])
    with pytest.raises(ValueError, match="wkv7 fla: r is on cpu, not cuda: move it, or use --op chunk"):
        wkv7(*make(1, 3, 1, dtype=torch.bfloat16)[0])


@pytest.mark.parametrize("T", [1, 65, 200])
@pytest.mark.gpu
@gpu[1]
def test_on_a_gpu(T):
    """The real one in bfloat16, by the bars of the other operators."""
    pytest.importorskip("fla")
    inputs, dy, dstate = make(1, T, 2, dtype=torch.bfloat16, device="cuda")
    wide = [x.detach().cpu().double().requires_grad_() for x in inputs]
    exact = run(wkv7_ref, wide, dy.cpu().double(), dstate.cpu().double())
    for name, x, e in zip(NAMES, run(wkv7_cuda.load("fla"), inputs, dy, dstate), exact, strict=True):
        assert error(x, e) < (5e-3 if name in ("y", "state_T") else 1e-2), name
