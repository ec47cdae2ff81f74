"""The `fla` operators: the calling convention against stand-ins that do what fla documents; the real ones on a GPU.

fla's own kernels do not run in Triton's interpreter: they are tuned by timing on a device, and compute with loop
variables in a way the interpreter does not know.
"""

import math
import sys
from types import ModuleType

import pytest
import torch
from test_wkv import RECURRENCES, error, gpu, make, run

import wkv7_cuda
from pissa_rwkv import find_wkv
from wkv7_cuda import fla, op, wkv6_fla


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


def chunk_rwkv6(r, k, v, w, u, *, scale, initial_state, output_final_state):
    """Likewise."""
    assert (scale, output_final_state) == (1.0, True) and u.shape == r.shape[2:]
    assert initial_state.is_contiguous() and w.dtype == initial_state.dtype
    assert (-21 < w).all() and (w <= 0).all()  # else its differences of sums would be useless, or NaN
    S, ys = initial_state, []
    for t in range(r.shape[1]):
        kv = torch.einsum("bhk,bhv->bhkv", k[:, t], v[:, t])
        ys.append(torch.einsum("bhk,bhkv->bhv", r[:, t], S + u[:, :, None] * kv))
        S = S * w[:, t].exp()[..., None] + kv
    return torch.stack(ys, 1), S


OPERATORS = {  # recurrence -> its module, the name of fla's module and function, a stand-in for the latter
    "wkv7": (fla, "fla.ops.rwkv7", chunk_rwkv7),
    "wkv6": (wkv6_fla, "fla.ops.rwkv6", chunk_rwkv6),
}
each = pytest.mark.parametrize("recurrence", OPERATORS)


@pytest.mark.parametrize("regime", ["random", "fast", "constant"])
@each
def test_calling_convention(recurrence, regime):
    """The stand-in, called as fla is, equals the definition: values, and gradients through w and the two states."""
    (module, _, stand_in), its = OPERATORS[recurrence], RECURRENCES[recurrence]
    bar = {"wkv7": 1e-13, "wkv6": 1e-8}[recurrence]  # 2e-9 takes the place of a smaller d
    found, exact = (run(f, *make(2, 9, 2, regime, recurrence=recurrence)) for f in (module.bind(stand_in), its.ref))
    for name, x, e in zip(its.names, found, exact, strict=True):
        assert error(x, e) < bar, name


@each
def test_without_a_gpu_or_the_package(recurrence, monkeypatch):
    """One line with the remedy, and fla not imported where it would only warn."""
    module, _, _ = OPERATORS[recurrence]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(wkv7_cuda.BuildError, match="the fla operator needs a GPU and torch sees none: .* --op chunk"):
        module.load()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "fla", None)
    with pytest.raises(wkv7_cuda.BuildError, match=r"pip install flash-linear-attention, or use"):
        module.load()


@each
def test_arguments_are_checked(recurrence, monkeypatch):
    """As every operator's, in one line."""
    module, path, stand_in = OPERATORS[recurrence]
    theirs = ModuleType(path)
    setattr(theirs, stand_in.__name__, stand_in)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name, x in (("fla", ModuleType("fla")), ("fla.ops", ModuleType("fla.ops")), (path, theirs)):
        monkeypatch.setitem(sys.modules, name, x)
    f = module.load()
    for dtype, problem in ((torch.float32, "r is torch.float32, .* cast all (six|five) to one of bfloat16 or float16"),
                           (torch.bfloat16, "r is on cpu, not cuda: move it, or use --op chunk")):
        with pytest.raises(wkv7_cuda.Misfit, match=f"{recurrence} fla: {problem}"):
            f(*make(1, 3, 1, dtype=dtype, recurrence=recurrence)[0])


def test_it_computes_outside_any_autocast(monkeypatch):
    monkeypatch.setattr(op, "check", lambda *arguments: None)
    wkv = fla.operator("wkv7", lambda: torch.is_autocast_enabled("cuda"))
    torch.set_autocast_enabled("cuda", True)
    try:
        assert torch.is_autocast_enabled("cuda") and not wkv()
    finally:
        torch.set_autocast_enabled("cuda", False)


def test_its_kernels_never_see_tensors_without_values(monkeypatch):
    """They would be launched on them. What is counted in its place is the `cuda` operator."""
    monkeypatch.setattr(fla, "load", lambda: pytest.fail("loaded"))
    name, wkv7 = find_wkv("x070", 64, "fla", "cuda", ready=False)
    inputs = [torch.empty(1, 3, 1, 64, device="meta") for _ in range(6)]
    assert wkv7(*inputs, torch.empty(1, 1, 64, 64, device="meta"))[0].shape == (1, 3, 1, 64)
    assert name == "cuda"


@pytest.mark.parametrize("T", [1, 65, 200])
@each
@pytest.mark.gpu
@gpu[1]
def test_on_a_gpu(recurrence, T):
    """The real one in bfloat16, by the bars of the other operators."""
    pytest.importorskip("fla")
    its, (inputs, dy, dstate) = RECURRENCES[recurrence], make(1, T, 2, dtype=torch.bfloat16, device="cuda",
                                                              recurrence=recurrence)  # fmt: skip
    wide = [x.detach().cpu().double().requires_grad_() for x in inputs]
    exact = run(its.ref, wide, dy.cpu().double(), dstate.cpu().double())
    for name, x, e in zip(its.names, run(wkv7_cuda.load("fla", recurrence), inputs, dy, dstate), exact, strict=True):
        assert error(x, e) < (5e-3 if name in ("y", "state_T") else 1e-2), name
