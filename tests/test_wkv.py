"""Every WKV operator against one-token loops: values, gradients, ends of chunks, regimes, what PyTorch asks of ops.

Oracles: the loops below, which share no code with the project, for the definitions `wkv7_ref` and `wkv6_ref`; these, in
float64, for all else. What WKV-6 alone has is tested in test_wkv6.py.
Accuracy: an operator in float32 may be twice as wrong against float64 as plain PyTorch in float32 is, plus FLOOR.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest
import torch
from test_cuda_on_cpu import HERE, SANITIZERS, compile_for_cpu, run_sanitized
from test_wkv_cuda import GPU_EXPF, needs_cpp
from torch._subclasses.fake_tensor import FakeTensorMode
from triton_interpreter import INTERPRETED

import wkv7_cuda
from pissa_rwkv import wkv6_ref, wkv7_ref
from wkv7_cuda import chunk, cpu, wkv6_chunk, wkv6_cpu

LENGTHS = (1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100)
# Relative; four times float32's spacing. Where states fade fast the recurrence errs by about one rounding, while a
# chunk always sums up to 64 terms, and dw is a difference of such sums.
FLOOR = 4 * torch.finfo(torch.float32).eps
N = 64

gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]


def loop7(r, w, k, v, a, b, state):
    """One token, one head after the other, written from the equation."""
    y, states = torch.zeros_like(v), []
    for n in range(r.shape[0]):
        for h in range(r.shape[2]):
            S = state[n, h]
            for t in range(r.shape[1]):
                d = torch.exp(-math.exp(-0.5) / (1 + torch.exp(-w[n, t, h])))
                S = S @ torch.diag(d) + torch.outer(S @ a[n, t, h], b[n, t, h]) + torch.outer(v[n, t, h], k[n, t, h])
                y[n, t, h] = S @ r[n, t, h]
            states.append(S)
    return y, torch.stack(states).view_as(state)


def loop6(r, w, k, v, u, state):
    """Likewise: the token itself is written with the bonus for its own y, without it for those to come."""
    y, states = torch.zeros_like(v), []
    for n in range(r.shape[0]):
        for h in range(r.shape[2]):
            S = state[n, h]
            for t in range(r.shape[1]):
                y[n, t, h] = (S + torch.outer(v[n, t, h], torch.diag(u[h]) @ k[n, t, h])) @ r[n, t, h]
                S = S @ torch.diag(torch.exp(-torch.exp(w[n, t, h]))) + torch.outer(v[n, t, h], k[n, t, h])
            states.append(S)
    return y, torch.stack(states).view_as(state)


class Recurrence(NamedTuple):
    """The definition; the loop; the inputs' letters before the state's; the inputs that are tried."""

    ref: Callable
    loop: Callable
    letters: str
    regimes: tuple[str, ...]

    @property
    def names(self):
        """Of what `run` returns."""
        return ("y", "state_T", *(f"d{letter}" for letter in self.letters), "dstate")


RECURRENCES = {
    "wkv7": Recurrence(wkv7_ref, loop7, "rwkvab", ("random", "fast", "slow", "equal", "zero")),
    "wkv6": Recurrence(wkv6_ref, loop6, "rwkvu", ("random", "fast", "brisk", "slow", "constant", "zero")),
}
NAMES = RECURRENCES["wkv7"].names


class Op(NamedTuple):
    """An operator of wkv7_cuda on a device."""

    name: str
    device: str
    recurrence: str = "wkv7"

    def load(self):
        return wkv7_cuda.load(self.name, self.recurrence)

    def make(self, B, T, H, regime="random", dtype=torch.float32):
        return make(B, T, H, regime, dtype, self.device, recurrence=self.recurrence)

    @property
    def its(self):
        return RECURRENCES[self.recurrence]

    @property
    def raw(self):
        """What PyTorch knows it as: forward, backward."""
        name = f"{self.recurrence}_{self.name}"
        return getattr(torch.ops.pissa_rwkv, name), getattr(torch.ops.pissa_rwkv, f"{name}_backward")


CPU_OPS = [  # float64, raw kernels: what the cuda op lacks or others test
    pytest.param(Op("cpu", "cpu"), id="cpu"),
    pytest.param(Op("chunk", "cpu"), id="chunk"),
    pytest.param(Op("cpu", "cpu", "wkv6"), id="wkv6-cpu"),
    pytest.param(Op("chunk", "cpu", "wkv6"), id="wkv6-chunk"),
]
FP32_OPS = [  # which compute half types in float32
    *CPU_OPS,
    pytest.param(Op("chunk", "cuda"), id="chunk-on-cuda", marks=gpu),
    pytest.param(Op("cuda_precise", "cuda"), id="cuda_precise", marks=gpu),
    pytest.param(Op("chunk", "cuda", "wkv6"), id="wkv6-chunk-on-cuda", marks=gpu),
]
OPS = [
    *FP32_OPS,
    pytest.param(Op("cuda", "cuda"), id="cuda", marks=gpu),
    pytest.param(Op("triton", "cuda"), id="triton", marks=gpu),
    pytest.param(Op("triton", "cpu"), id="triton-interpreted", marks=INTERPRETED),
]
each_op = pytest.mark.parametrize("op", OPS)
cpu_op = pytest.mark.parametrize("op", CPU_OPS)


def make(B, T, H, regime="random", dtype=torch.float64, device="cpu", size=N, recurrence="wkv7"):
    """The inputs and the two gradients that enter the backward, float32 numbers in any dtype."""
    generator = torch.Generator().manual_seed(1)
    rand = functools.partial(torch.randn, generator=generator)
    r, w, k, v, u, eta, dy = (rand(B, T, H, size) for _ in range(7))
    state, dstate = rand(B, H, size, size), rand(B, H, size, size)
    eta = eta.sigmoid()
    if regime == "constant":  # version 5
        w = w[:1, :1].expand(B, T, H, size)
    # WKV-7, WKV-6: fast, d = 0.545 at every token: the floor, d = 0; brisk, 2e-9; slow, 1 - 1e-9
    pace = {"fast": 20.0, "brisk": 3.0, "slow": -20.0}.get(regime)
    w = w if pace is None else torch.full_like(w, pace)
    if regime == "equal":  # nearly equal keys, almost complete removal: where powers of A_ab explode
        u, w, eta = rand(1, 1, H, size) + 0.1 * u, w - 6, torch.full_like(eta, 0.98)
        k = u / u.norm(dim=-1, keepdim=True)
    kappa = u / u.norm(dim=-1, keepdim=True)
    inputs = {"wkv7": [r, w, k * eta, v, -kappa, kappa * eta], "wkv6": [r, w, k, v, u[0, 0]]}[recurrence]
    if regime == "zero":
        inputs, state = [torch.zeros_like(x) for x in inputs], torch.zeros_like(state)
    state_dtype = torch.promote_types(dtype, torch.float32)
    inputs = [x.to(device, dtype) for x in inputs] + [state.to(device, state_dtype)]
    return [x.requires_grad_() for x in inputs], dy.to(device, dtype), dstate.to(device, state_dtype)


def run(f, inputs, dy, dstate):
    """y, the final state, the inputs' gradients."""
    y, state_T = f(*inputs)
    return [x.detach() for x in (y, state_T, *torch.autograd.grad((y, state_T), inputs, (dy, dstate)))]


@functools.cache
def oracle(B, T, H, regime, dtype, recurrence="wkv7"):
    return run(RECURRENCES[recurrence].ref, *make(B, T, H, regime, dtype, recurrence=recurrence))


def error(x, exact):
    """Relative, in the Frobenius norm; absolute where the exact result is zero."""
    norm = exact.norm().item()
    return (x.cpu().double() - exact).norm().item() / (norm if norm else 1)


@pytest.mark.parametrize("T", [1, 5])
@pytest.mark.parametrize("recurrence", RECURRENCES)
def test_reference_is_the_equation(recurrence, T):
    """The definition, values and gradients, equals the loop over tokens and heads."""
    its, case = RECURRENCES[recurrence], make(2, T, 2, size=8, recurrence=recurrence)
    for name, x, exact in zip(its.names, run(its.ref, *case), run(its.loop, *case), strict=True):
        assert error(x, exact) < 1e-14, name


@pytest.mark.parametrize("dtype, bar", [(torch.float32, 4), (torch.float64, 16)])  # cpu.h says why
@pytest.mark.parametrize("recurrence, kernels", [("wkv7", cpu.kernels), ("wkv6", wkv6_cpu.kernels)])
def test_decays_to_the_last_bits(recurrence, kernels, dtype, bar):
    """If nothing is written, the state is its decay after a token, and w's gradient is N times that one's slope. The
    error counts in spacings of the dtype; of WKV-6, whose decay is steep, in what a spacing of w changes."""
    w = torch.linspace(-20, {"wkv7": 20, "wkv6": 4}[recurrence], 40 * N, dtype=dtype).view(1, 1, 40, N)
    x, one = w.numpy().astype(np.longdouble), torch.ones(1, 40, N, N, dtype=dtype)
    zero, (forward, backward) = torch.zeros_like(w), kernels()
    inputs = [zero, w, zero, zero, *([zero, zero] if recurrence == "wkv7" else [zero[0, 0]]), one]
    _, state, saved = forward(*inputs, True)
    slope = backward(*inputs, saved, zero, one)[1] / N
    if recurrence == "wkv7":
        rate, strength = np.exp(np.longdouble(-0.5)) / (1 + np.exp(-x)), 1
        exact = -rate / (1 + np.exp(x)) * np.exp(-rate)
    else:
        rate = np.exp(x)
        exact, strength = -rate * np.exp(-rate), 1 + rate
    for found, wanted in ((state[:, None, :, 5], np.exp(-rate)), (slope, exact)):
        assert (abs(found.numpy() / wanted - 1) / strength).max() < bar * torch.finfo(dtype).eps


@pytest.mark.parametrize("T", LENGTHS)
@cpu_op
def test_exact_in_float64(op, T):
    """In float64 an operator differs from the recurrence by rounding alone, at every place in a chunk."""
    exact = oracle(2, T, 3, "random", torch.float64, op.recurrence)
    for name, x, e in zip(op.its.names, run(op.load(), *op.make(2, T, 3, dtype=torch.float64)), exact, strict=True):
        assert error(x, e) < 1e-12, name


@pytest.mark.parametrize("op, regime", [
    pytest.param(op.values[0], regime, id=f"{op.id}-{regime}", marks=op.marks)
    for op in OPS for regime in op.values[0].its.regimes])  # fmt: skip
@pytest.mark.parametrize("B,T,H", [(1, 65, 2), (2, 17, 1), (1, 1, 3)])
def test_float32_accuracy(op, B, T, H, regime):
    """The rule above; but where plain PyTorch fails (dw at w = 20: it rounds 1 - sigma to 0), it counts as 1e-6. And on
    a GPU a decay may be off by a unit, by the same in each of T tokens where it is constant."""
    floor = FLOOR + (GPU_EXPF * T if op.device == "cuda" else 0)
    exact, plain = (oracle(B, T, H, regime, dtype, op.recurrence) for dtype in (torch.float64, torch.float32))
    found = run(op.load(), *op.make(B, T, H, regime))
    for name, x, p, e in zip(op.its.names, found, plain, exact, strict=True):
        assert error(x, e) <= 2 * min(error(p, e), 1e-6) + floor, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("op", FP32_OPS)  # the others multiply in half types: test_wkv_fast.py, _triton.py
def test_half_types(op, dtype):
    """Half-precision inputs cost the rounding of the outputs and no more: half types travel, float32 computes."""
    inputs, dy, dstate = op.make(1, 33, 2, dtype=dtype)
    wide = [x.detach().cpu().double().requires_grad_() for x in inputs]
    exact = run(op.its.ref, wide, dy.cpu().double(), dstate.cpu().double())
    found = run(op.load(), inputs, dy, dstate)
    assert [x.dtype for x in found] == [dtype, torch.float32, *[dtype] * len(op.its.letters), torch.float32]
    for name, x, e in zip(op.its.names, found, exact, strict=True):
        assert error(x, e) < torch.finfo(dtype).eps / 2, name


@each_op
def test_whole_is_its_parts(op):
    """40 tokens, then 25 from the state that they left, are 65 tokens; gradients flow back through that state."""
    case, f = op.make(2, 65, 2), op.load()

    def parts(*inputs):
        *inputs, state = inputs
        y1, state = f(*(x[:, :40] if x.dim() == 4 else x for x in inputs), state)
        y2, state = f(*(x[:, 40:] if x.dim() == 4 else x for x in inputs), state)
        return torch.cat([y1, y2], 1), state

    for name, x, whole in zip(op.its.names, run(parts, *case), run(f, *case), strict=True):
        assert error(x, whole.cpu().double()) < 2e-6, name


@cpu_op
def test_gradcheck(op):
    """Finite differences in float64, for all inputs, through y and the final state."""
    inputs, _, _ = op.make(1, 18, 1, dtype=torch.float64)
    assert torch.autograd.gradcheck(op.load(), inputs, fast_mode=True)


@pytest.mark.parametrize("recurrence, kernels", [
    pytest.param("wkv7", cpu.kernels, id="cpu"),
    pytest.param("wkv7", lambda: (chunk.forward, chunk.backward), id="chunk"),
    pytest.param("wkv6", wkv6_cpu.kernels, id="wkv6-cpu"),
    pytest.param("wkv6", lambda: (wkv6_chunk.forward, wkv6_chunk.backward), id="wkv6-chunk"),
])  # fmt: skip
def test_outputs_are_fully_written(recurrence, kernels):
    """With every new tensor filled with NaN, the raw kernels leave none, in what they save neither."""
    inputs, dy, dstate = make(1, 19, 2, dtype=torch.float32, recurrence=recurrence)
    inputs = [x.detach() for x in inputs]
    forward, backward = kernels()
    torch.use_deterministic_algorithms(True)  # with this, PyTorch fills what torch.empty returns
    try:
        assert torch.empty(1).isnan()
        outputs = forward(*inputs, True)
        outputs += tuple(backward(*inputs, outputs[2], dy, dstate))
    finally:
        torch.use_deterministic_algorithms(False)
    assert not any(x.isnan().any() for x in outputs)


@needs_cpp
def test_sanitizers(tmp_path):
    """The C++, too, reads and writes what it is given and nothing behind it."""
    folder = HERE.parent / "wkv7_cuda"
    libraries = [compile_for_cpu(folder / f"{name}_cpu.cpp", tmp_path, *SANITIZERS) for name in RECURRENCES]
    script = """
        import ctypes, sys
        sys.path[:0] = sys.argv[3:]
        import torch
        from wkv7_cuda import cpu, wkv6_cpu
        for module, path, tokens, heads in ((cpu, sys.argv[1], 6, 0), (wkv6_cpu, sys.argv[2], 4, 1)):
            cpu.open_library = lambda recurrence: ctypes.CDLL(path)
            forward, backward = module.kernels()
            for T in (1, 16, 17):
                x, dy = [torch.randn(1, T, 1, 64) for _ in range(tokens)], torch.randn(1, T, 1, 64)
                inputs = [*x, *[torch.randn(1, 64)] * heads, torch.randn(1, 1, 64, 64)]
                backward(*inputs, forward(*inputs, True)[2], dy, torch.randn(1, 1, 64, 64))
        print("clean")
    """
    run = run_sanitized(script, *libraries, HERE.parent)
    assert run.stdout == "clean\n", run.stderr


@pytest.mark.parametrize("op", OPS[:-1])  # the interpreter has no threads
def test_same_bits_twice_and_with_any_threads(op):
    case = op.make(2, 50, 3)
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 2):
            torch.set_num_threads(n)
            results.append(run(op.load(), *case))
    finally:
        torch.set_num_threads(threads)
    for name, one, two, again in zip(op.its.names, *results, strict=True):
        assert torch.equal(two, again), name
        assert torch.equal(one, two) or op.name == "chunk", name  # a library may split its matrix products by threads


@each_op
def test_nothing_saved_without_a_gradient(op):
    """save=True only if a gradient is wanted: else, the third output is empty; y is the same."""
    f, calls = op.load(), []
    inputs, _, _ = op.make(1, 33, 1)
    raw, _ = op.raw
    assert raw(*(x.detach() for x in inputs), False)[2].numel() == 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is raw.default:
                calls.append(args[-1])
            return function(*args, **(kwargs or {}))

    with Watch():
        y = f(*inputs)[0]
        with torch.no_grad():
            assert torch.equal(y, f(*inputs)[0])
    assert calls == [True, False]


@each_op
def test_one_gradient_missing(op):
    """A loss on y alone, on the final state alone, and inputs that want no gradient."""
    inputs, dy, dstate = op.make(1, 20, 1)
    f = op.load()
    full = run(f, inputs, dy, torch.zeros_like(dstate))[2:]
    for x, e in zip(torch.autograd.grad(f(*inputs)[0], inputs, dy), full, strict=True):
        assert torch.equal(x, e)
    full = run(f, inputs, torch.zeros_like(dy), dstate)[2:]
    for x, e in zip(torch.autograd.grad(f(*inputs)[1], inputs, dstate), full, strict=True):
        assert torch.equal(x, e)
    some = [x.detach() for x in inputs]
    some[-1].requires_grad_()
    assert torch.equal(torch.autograd.grad(f(*some)[1], some[-1], dstate)[0], full[-1])


@cpu_op
def test_no_zeros_as_large_as_what_is_saved(op):
    """Autograd would make them as the gradient of what is saved, which nobody asks for."""
    inputs, dy, dstate = op.make(1, 100, 1)
    outputs, zeros = op.load()(*inputs), []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if "zeros" in str(function):
                zeros.append(result.numel())
            return result

    saved = outputs[0].grad_fn.saved_tensors[-1]
    with Watch():
        torch.autograd.grad(outputs, inputs, (dy, dstate))
    assert saved.numel() not in zeros


@each_op
def test_strides_and_autocast_change_nothing(op):
    """Transposed inputs; a surrounding autocast must not turn the operator's float32 into bfloat16."""
    inputs, dy, dstate = op.make(2, 20, 2)
    plain = run(op.load(), inputs, dy, dstate)
    *strided, dy, dstate = (x.detach().transpose(0, -2).contiguous().transpose(0, -2) for x in (*inputs, dy, dstate))
    strided = [x.requires_grad_() for x in strided]
    with torch.autocast(op.device, dtype=torch.bfloat16):
        found = run(op.load(), strided, dy, dstate)
    for name, x, e in zip(op.its.names, found, plain, strict=True):
        assert torch.equal(x, e), name


@each_op
def test_opcheck(op):
    """PyTorch's own examination: schema, autograd registration, fake tensors, ahead-of-time tracing."""
    op.load()
    inputs, dy, dstate = op.make(1, 17, 2)
    forward, backward = op.raw
    torch.library.opcheck(forward, (*inputs, True))
    torch.library.opcheck(forward, (*(x.detach() for x in inputs), False))
    inputs = [x.detach() for x in inputs]
    saved = forward(*inputs, True)[2]
    torch.library.opcheck(backward, (*inputs, saved, dy, dstate))


@each_op
def test_compiled_is_equal(op):
    """One graph, no break, the same bits."""
    case, f = op.make(1, 33, 2), op.load()
    compiled = torch.compile(lambda *x: f(*x), fullgraph=True, backend="aot_eager")
    for name, x, e in zip(op.its.names, run(compiled, *case), run(f, *case), strict=True):
        assert torch.equal(x, e), name


@each_op
def test_fake_tensors(op):
    """Shapes, dtypes and strides of values and gradients without computing them, here for half-precision inputs."""
    real = run(op.load(), *op.make(1, 17, 2, dtype=torch.bfloat16))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        inputs, dy, dstate = op.make(1, 17, 2, dtype=torch.bfloat16)
        fake = [mode.from_tensor(x) for x in inputs]
        found = run(op.load(), fake, mode.from_tensor(dy), mode.from_tensor(dstate))
    for name, x, e in zip(op.its.names, found, real, strict=True):
        assert (x.shape, x.dtype, x.stride()) == (e.shape, e.dtype, e.stride()), name


@pytest.mark.parametrize(
    "index, change, message",
    [
        (0, lambda x: x[:, :, :, :32], "w has shape"),
        (2, lambda x: x[:, :5], "k has shape"),
        (3, lambda x: x.bfloat16(), "v is torch.bfloat16, r is torch.float32; cast all (six|five) to one of float32"),
        (-1, lambda x: x.bfloat16(), r"state is torch.bfloat16 .* pass torch.float32 \[1,2,64,64\]"),
        (-1, lambda x: x[0], r"state is torch.float32 \[2, 64, 64\]"),
        (4, lambda x: x.to("meta"), "(a|u) is on meta"),
    ],
)
@each_op
def test_wrong_arguments_are_named_in_one_line(op, index, change, message):
    inputs, _, _ = op.make(1, 9, 2)
    inputs[index] = change(inputs[index])
    with pytest.raises(ValueError, match=f"^{op.recurrence} {op.name}: {message}") as caught:
        op.load()(*inputs)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("recurrence", RECURRENCES)
def test_no_tokens_are_refused(recurrence):
    (*inputs, state), _, _ = make(1, 9, 2, recurrence=recurrence)
    with pytest.raises(wkv7_cuda.Misfit, match=r"r has shape \[1, 0, 2, 64\], not that of r, \[B,T,H,N\], all >= 1"):
        wkv7_cuda.load("chunk", recurrence)(*(x[:, :0] if x.dim() == 4 else x for x in inputs), state)


@cpu_op
def test_a_wrong_number_of_arguments(op):
    inputs, _, _ = op.make(1, 9, 2)
    with pytest.raises(ValueError, match=f"{len(inputs) - 1} tensors; expected {' '.join(op.its.letters)} state$"):
        op.load()(*inputs[:-1])


@pytest.mark.parametrize("recurrence", RECURRENCES)
def test_head_sizes(recurrence):
    """The compiled op says what it was compiled for; chunk takes any head size."""
    its, case = RECURRENCES[recurrence], make(1, 40, 2, size=24, recurrence=recurrence)
    with pytest.raises(ValueError, match="head size 24, compiled for 64; --op chunk takes any"):
        wkv7_cuda.load("cpu", recurrence)(*case[0])
    found = run(wkv7_cuda.load("chunk", recurrence), *case)
    for name, x, exact in zip(its.names, found, run(its.ref, *case), strict=True):
        assert error(x, exact) < 1e-12, name


def test_unknown_op():
    with pytest.raises(ValueError, match=r"no operator 'tile'; choose from \['cuda', 'cuda_precise', 'triton', 'fla',"):
        wkv7_cuda.load("tile")
    with pytest.raises(ValueError, match=r"wkv6 has no operator 'triton'; choose from \['.*'cpu', 'chunk'\]"):
        wkv7_cuda.load("triton", "wkv6")
    with pytest.raises(ValueError, match=r"unknown recurrence 'wkv5'; choose from \['wkv7', 'wkv6'\]"):
        wkv7_cuda.load("cpu", "wkv5")


def test_the_same_operator_however_it_is_asked_for():
    assert wkv7_cuda.load("chunk") is wkv7_cuda.load("chunk", "wkv7") is wkv7_cuda.load("chunk", recurrence="wkv7")
