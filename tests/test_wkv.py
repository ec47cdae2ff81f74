"""Every WKV-7 operator against one-token loops: values, gradients, ends of chunks, regimes, what PyTorch asks of ops.

Oracles: `loop` below, which shares no code with the project, for `wkv7_ref`; `wkv7_ref` in float64 for all else.
Accuracy: an operator in float32 may be twice as wrong against float64 as plain PyTorch in float32 is, plus FLOOR.
"""

import functools
import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from triton_interpreter import INTERPRETED

import wkv7_cuda
from pissa_rwkv import wkv7_ref
from wkv7_cuda import chunk, cpu

NAMES = ("y", "state_T", "dr", "dw", "dk", "dv", "da", "db", "dstate")
LENGTHS = (1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100)
REGIMES = ("random", "fast", "slow", "equal", "zero")
# Relative; four times float32's spacing. Where states fade fast the recurrence errs by about one rounding, while a
# chunk always sums up to 64 terms, and dw is a difference of such sums.
FLOOR = 4 * torch.finfo(torch.float32).eps
N = 64

gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
OPS = [  # (op, device)
    pytest.param(("cpu", "cpu"), id="cpu"),
    pytest.param(("chunk", "cpu"), id="chunk"),
    pytest.param(("chunk", "cuda"), id="chunk-on-cuda", marks=gpu),
    pytest.param(("cuda", "cuda"), id="cuda", marks=gpu),
    pytest.param(("triton", "cuda"), id="triton", marks=gpu),
    pytest.param(("triton", "cpu"), id="triton-interpreted", marks=INTERPRETED),
]
each_op = pytest.mark.parametrize("op", OPS)
cpu_op = pytest.mark.parametrize("op", OPS[:2])  # float64, raw kernels: what the cuda op lacks or others test


def loop(r, w, k, v, a, b, state):
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


def make(B, T, H, regime="random", dtype=torch.float64, device="cpu", size=N):
    """Seven inputs and the two gradients that enter the backward, float32 numbers in any dtype."""
    generator = torch.Generator().manual_seed(1)
    rand = functools.partial(torch.randn, generator=generator)
    r, w, k0, v, u, eta, dy = (rand(B, T, H, size) for _ in range(7))
    state, dstate = rand(B, H, size, size), rand(B, H, size, size)
    eta = eta.sigmoid()
    if regime == "fast":
        w = torch.full_like(w, 20.0)  # d = 0.545 at every token: the floor
    if regime == "slow":
        w = torch.full_like(w, -20.0)  # d = 1 - 1e-9
    if regime == "equal":  # nearly equal keys, almost complete removal: where powers of A_ab explode
        u, w, eta = rand(1, 1, H, size) + 0.1 * u, w - 6, torch.full_like(eta, 0.98)
        k0 = u / u.norm(dim=-1, keepdim=True)
    kappa = u / u.norm(dim=-1, keepdim=True)
    inputs = [r, w, k0 * eta, v, -kappa, kappa * eta, state]
    if regime == "zero":
        inputs = [torch.zeros_like(x) for x in inputs]
    state_dtype = torch.promote_types(dtype, torch.float32)
    inputs = [x.to(device, dtype) for x in inputs[:6]] + [inputs[6].to(device, state_dtype)]
    return [x.requires_grad_() for x in inputs], dy.to(device, dtype), dstate.to(device, state_dtype)


def run(f, inputs, dy, dstate):
    """The nine results, as NAMES."""
    y, state_T = f(*inputs)
    return [x.detach() for x in (y, state_T, *torch.autograd.grad((y, state_T), inputs, (dy, dstate)))]


@functools.cache
def oracle(B, T, H, regime, dtype):
    return run(wkv7_ref, *make(B, T, H, regime, dtype))


def error(x, exact):
    """Relative, in the Frobenius norm; absolute where the exact result is zero."""
    norm = exact.norm().item()
    return (x.cpu().double() - exact).norm().item() / (norm if norm else 1)


def load(op):
    return wkv7_cuda.load(op[0])


@pytest.mark.parametrize("T", [1, 5])
def test_reference_is_the_equation(T):
    """wkv7_ref, values and gradients, equals the loop over tokens and heads."""
    case = make(2, T, 2, size=8)
    for name, x, exact in zip(NAMES, run(wkv7_ref, *case), run(loop, *case), strict=True):
        assert error(x, exact) < 1e-14, name


@pytest.mark.parametrize("T", LENGTHS)
@cpu_op
def test_exact_in_float64(op, T):
    """In float64 an operator differs from the recurrence by rounding alone, at every place in a chunk."""
    exact = oracle(2, T, 3, "random", torch.float64)
    for name, x, e in zip(NAMES, run(load(op), *make(2, T, 3)), exact, strict=True):
        assert error(x, e) < 1e-12, name


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("B,T,H", [(1, 65, 2), (2, 17, 1), (1, 1, 3)])
@each_op
def test_float32_accuracy(op, B, T, H, regime):
    """The rule above; but where plain PyTorch fails (dw at w = 20: it rounds 1 - sigma to 0), it counts as 1e-6."""
    exact, plain = oracle(B, T, H, regime, torch.float64), oracle(B, T, H, regime, torch.float32)
    found = run(load(op), *make(B, T, H, regime, torch.float32, op[1]))
    for name, x, p, e in zip(NAMES, found, plain, exact, strict=True):
        assert error(x, e) <= 2 * min(error(p, e), 1e-6) + FLOOR, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("op", OPS[:4])  # triton multiplies in half types too: test_wkv_triton.py
def test_half_types(op, dtype):
    """Half-precision inputs cost the rounding of the outputs and no more: half types travel, float32 computes."""
    inputs, dy, dstate = make(1, 33, 2, dtype=dtype, device=op[1])
    wide = [x.detach().cpu().double().requires_grad_() for x in inputs]
    exact = run(wkv7_ref, wide, dy.cpu().double(), dstate.cpu().double())
    found = run(load(op), inputs, dy, dstate)
    assert [x.dtype for x in found] == [dtype, torch.float32, *[dtype] * 6, torch.float32]
    for name, x, e in zip(NAMES, found, exact, strict=True):
        assert error(x, e) < torch.finfo(dtype).eps / 2, name


@each_op
def test_whole_is_its_parts(op):
    """40 tokens, then 25 from the state that they left, are 65 tokens; gradients flow back through that state."""
    inputs, dy, dstate = make(2, 65, 2, dtype=torch.float32, device=op[1])
    f = load(op)

    def parts(*inputs):
        y1, state = f(*(x[:, :40] for x in inputs[:6]), inputs[6])
        y2, state = f(*(x[:, 40:] for x in inputs[:6]), state)
        return torch.cat([y1, y2], 1), state

    for name, x, whole in zip(NAMES, run(parts, inputs, dy, dstate), run(f, inputs, dy, dstate), strict=True):
        assert error(x, whole.cpu().double()) < 2e-6, name


@cpu_op
def test_gradcheck(op):
    """Finite differences in float64, for all seven inputs, through y and the final state."""
    inputs, _, _ = make(1, 18, 1)
    assert torch.autograd.gradcheck(load(op), inputs, fast_mode=True)


@pytest.mark.parametrize("kernels", [cpu.kernels, lambda: (chunk.forward, chunk.backward)], ids=["cpu", "chunk"])
def test_outputs_are_fully_written(kernels):
    """With every new tensor filled with NaN, the raw kernels leave none, in what they save neither."""
    inputs, dy, dstate = make(1, 19, 2, dtype=torch.float32)
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


@pytest.mark.parametrize("op", OPS[:-1])  # the interpreter has no threads
def test_same_bits_twice_and_with_any_threads(op):
    case = make(2, 50, 3, dtype=torch.float32, device=op[1])
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 2):
            torch.set_num_threads(n)
            results.append(run(load(op), *case))
    finally:
        torch.set_num_threads(threads)
    for name, one, two, again in zip(NAMES, *results, strict=True):
        assert torch.equal(two, again), name
        assert torch.equal(one, two) or op[0] == "chunk", name  # a library may split its matrix products by threads


@each_op
def test_nothing_saved_without_a_gradient(op):
    """save=True only if a gradient is wanted: else, the third output is empty; y is the same."""
    f, calls = load(op), []
    inputs, _, _ = make(1, 33, 1, dtype=torch.float32, device=op[1])
    raw = getattr(torch.ops.pissa_rwkv, f"wkv7_{op[0]}")
    assert raw(*(x.detach() for x in inputs), False)[2].numel() == 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is raw.default:
                calls.append(args[7])
            return function(*args, **(kwargs or {}))

    with Watch():
        y = f(*inputs)[0]
        with torch.no_grad():
            assert torch.equal(y, f(*inputs)[0])
    assert calls == [True, False]


@each_op
def test_one_gradient_missing(op):
    """A loss on y alone, on the final state alone, and inputs that want no gradient."""
    inputs, dy, dstate = make(1, 20, 1, dtype=torch.float32, device=op[1])
    f = load(op)
    full = run(f, inputs, dy, torch.zeros_like(dstate))[2:]
    for x, e in zip(torch.autograd.grad(f(*inputs)[0], inputs, dy), full, strict=True):
        assert torch.equal(x, e)
    full = run(f, inputs, torch.zeros_like(dy), dstate)[2:]
    for x, e in zip(torch.autograd.grad(f(*inputs)[1], inputs, dstate), full, strict=True):
        assert torch.equal(x, e)
    some = [x.detach() for x in inputs]
    some[6].requires_grad_()
    assert torch.equal(torch.autograd.grad(f(*some)[1], some[6], dstate)[0], full[6])


@each_op
def test_strides_and_autocast_change_nothing(op):
    """Transposed inputs; a surrounding autocast must not turn the operator's float32 into bfloat16."""
    inputs, dy, dstate = make(2, 20, 2, dtype=torch.float32, device=op[1])
    plain = run(load(op), inputs, dy, dstate)
    *strided, dy, dstate = (x.detach().transpose(1, 2).contiguous().transpose(1, 2) for x in (*inputs, dy, dstate))
    strided = [x.requires_grad_() for x in strided]
    with torch.autocast(op[1], dtype=torch.bfloat16):
        found = run(load(op), strided, dy, dstate)
    for name, x, e in zip(NAMES, found, plain, strict=True):
        assert torch.equal(x, e), name


@each_op
def test_opcheck(op):
    """PyTorch's own examination: schema, autograd registration, fake tensors, ahead-of-time tracing."""
    load(op)
    inputs, dy, dstate = make(1, 17, 2, dtype=torch.float32, device=op[1])
    forward = getattr(torch.ops.pissa_rwkv, f"wkv7_{op[0]}")
    torch.library.opcheck(forward, (*inputs, True))
    torch.library.opcheck(forward, (*(x.detach() for x in inputs), False))
    backward = getattr(torch.ops.pissa_rwkv, f"wkv7_{op[0]}_backward")
    inputs = [x.detach() for x in inputs]
    saved = forward(*inputs, True)[2]
    torch.library.opcheck(backward, (*inputs, saved, dy, dstate))


@each_op
def test_compiled_is_equal(op):
    """One graph, no break, the same bits."""
    case = make(1, 33, 2, dtype=torch.float32, device=op[1])
    f = load(op)
    compiled = torch.compile(lambda *x: f(*x), fullgraph=True, backend="aot_eager")
    for name, x, e in zip(NAMES, run(compiled, *case), run(f, *case), strict=True):
        assert torch.equal(x, e), name


@each_op
def test_fake_tensors(op):
    """Shapes, dtypes and strides of values and gradients without computing them, here for half-precision inputs."""
    real = run(load(op), *make(1, 17, 2, dtype=torch.bfloat16, device=op[1]))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        inputs, dy, dstate = make(1, 17, 2, dtype=torch.bfloat16, device=op[1])
        fake = [mode.from_tensor(x) for x in inputs]
        found = run(load(op), fake, mode.from_tensor(dy), mode.from_tensor(dstate))
    for name, x, e in zip(NAMES, found, real, strict=True):
        assert (x.shape, x.dtype, x.stride()) == (e.shape, e.dtype, e.stride()), name


@pytest.mark.parametrize(
    "index, change, message",
    [
        (0, lambda x: x[:, :, :, :32], "w has shape"),
        (2, lambda x: x[:, :5], "k has shape"),
        (3, lambda x: x.bfloat16(), "v is torch.bfloat16, r is torch.float32; cast all six to one of float32 or"),
        (6, lambda x: x.bfloat16(), r"state is torch.bfloat16 .* pass torch.float32 \[1,2,64,64\]"),
        (6, lambda x: x[0], r"state is torch.float32 \[2, 64, 64\]"),
        (4, lambda x: x.to("meta"), "a is on meta"),
    ],
)
@each_op
def test_wrong_arguments_are_named_in_one_line(op, index, change, message):
    inputs, _, _ = make(1, 9, 2, dtype=torch.float32, device=op[1])
    inputs[index] = change(inputs[index])
    with pytest.raises(ValueError, match=message) as caught:
        load(op)(*inputs)
    assert "\n" not in str(caught.value)


def test_head_sizes():
    """The compiled op says what it was compiled for; chunk takes any head size."""
    case = make(1, 40, 2, size=24)
    with pytest.raises(ValueError, match="head size 24, compiled for 64; --op chunk takes any"):
        wkv7_cuda.load("cpu")(*case[0])
    for name, x, exact in zip(NAMES, run(wkv7_cuda.load("chunk"), *case), run(wkv7_ref, *case), strict=True):
        assert error(x, exact) < 1e-12, name


def test_unknown_op():
    with pytest.raises(ValueError, match=r"no operator 'tile'; it has \['cuda', 'cuda_precise', 'triton', 'fla',"):
        wkv7_cuda.load("tile")
