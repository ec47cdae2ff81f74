"""wkv6.cu, the file that ships: run on the CPU under tests/cuda_on_cpu, compiled by nvcc, run on a GPU if any.

Oracle: the recurrence in float64, wkv6_ref, its gradients from autograd. The algebra in float64 is tests/test_wkv6.py's
affair (wkv6_chunk.py); here it is in bf16, or in pairs of bf16, over threads, fragments and shared memory.
"""

import re
import subprocess

import pytest
import torch
from test_cuda_on_cpu import CPU_FLAGS, HERE, SANITIZERS, SHADOW, barriers, compile_for_cpu, run_sanitized
from test_wkv_cuda import NVCC, needs_cpp, needs_nvcc, one_torch_thread  # noqa: F401  (a fixture for this module too)

import wkv7_cuda
from pissa_rwkv import wkv6_ref
from wkv7_cuda import build, nvcc, op, wkv6_chunk, wkv6_cuda

N = 64
LENGTHS = [1, 15, 16, 17, 63, 64, 65, 100]
REGIMES = [  # one head each
    "random", "fast", "erases all", "slow", "mixed keys", "mixed tokens", "constant", "logits of 100", "zeros",
]  # fmt: skip
OUTPUTS = ["y", "state_T", "dr", "dw", "dk", "dv", "du", "dstate"]
STATES = ("state_T", "dstate")  # fp32; the others are of the inputs' dtype
PLANS = {"whole": lambda heads, chunks, sms: chunks, "segments": lambda heads, chunks, sms: 1}
TINY = 1e-30  # where the exact result is no larger, this is how large it may be: exp(-100) has no place in fp32


def problem(time, dtype, batch=1, regimes=REGIMES):
    """Inputs r w k v u and the state; gradients of y and state_T. Head h is in regimes[h]."""
    draw = torch.Generator().manual_seed(time)

    def normal(*shape):
        return torch.randn(shape, generator=draw)

    shape = (batch, time, len(regimes), N)
    r, x, k, v, dy = (normal(*shape) for _ in range(5))
    u, state, dstate = normal(len(regimes), N), *normal(2, batch, len(regimes), N, N)
    w = {
        "random": x - 1, "fast": x / 4 + 3, "erases all": x + 20, "slow": x - 20, "constant": x[:1, :1] - 1,
        "mixed keys": x / 4 + torch.linspace(-8, 5, N), "mixed tokens": 8 * x, "logits of 100": 100 * x.sign(),
        "zeros": x,
    }  # fmt: skip
    w = torch.stack([w[regime].expand_as(x)[:, :, h] for h, regime in enumerate(regimes)], 2)
    if "zeros" in regimes:
        for tensor in (r, k, v, u, state):
            tensor.movedim(0 if tensor is u else 1 if tensor is state else 2, 0)[regimes.index("zeros")] = 0
    return [*(x.to(dtype) for x in (r, w, k, v, u)), state], [dy.to(dtype), dstate]


def by_recurrence(inputs, grads):
    leaves = [x.double().requires_grad_() for x in inputs]
    outputs = wkv6_ref(*leaves)
    return [x.detach() for x in (*outputs, *torch.autograd.grad(outputs, leaves, [g.double() for g in grads]))]


def by_kernels(kernels, inputs, grads, device="cpu"):
    """(forward, backward) of wkv6_cuda.py; every tensor that is allocated on the way starts as NaN."""
    forward, backward = kernels
    inputs, grads = [x.to(device) for x in inputs], [g.to(device) for g in grads]
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        y, state_T, saved = forward(*inputs, True)
        outputs = [y, state_T, *backward(*inputs, saved, *grads)]
        assert not saved.isnan().any()
        y, state_T, saved = forward(*inputs, False)
    finally:
        torch.use_deterministic_algorithms(False)
    assert y.equal(outputs[0]) and state_T.equal(outputs[1]) and saved.numel() == 0
    return [x.cpu() for x in outputs]


def by_head(name, x):
    """-> (H, all the rest)"""
    return x.movedim({"du": 0, "state_T": 1, "dstate": 1}.get(name, 2), 0).flatten(1).double()


def bar(name, dtype):
    """How far off a tensor may be, in the Frobenius norm."""
    if dtype == torch.bfloat16:
        return 5e-3 if name in ("y", "state_T") else 1e-2
    return 2e-5 if dtype == torch.float32 or name in STATES else 3e-4


def check(outputs, inputs, grads, regimes=REGIMES):
    """Each tensor and regime on its own."""
    exact, dtype, worst = by_recurrence(inputs, grads), inputs[0].dtype, {}
    for name, x, e in zip(OUTPUTS, outputs, exact, strict=True):
        assert x.dtype == (torch.float32 if name in STATES else dtype)
        # fp16 has nothing below 6e-8: what rounding to it costs is no error of the kernel
        e = e if x.dtype != torch.float16 else e.half().double()
        for regime, found, expected in zip(regimes, by_head(name, x), by_head(name, e), strict=True):
            size = expected.norm().item()
            if size <= TINY:
                assert found.abs().max() <= TINY, (name, regime)
                continue
            error = ((found - expected).norm() / size).item()
            slack = 6e-8 * expected.numel() ** 0.5 / size if x.dtype == torch.float16 else 0
            assert error < bar(name, dtype) + slack, (name, regime, error)
            worst[name] = max(worst.get(name, 0), error)
    print(dtype, {name: f"{error:.1e}" for name, error in worst.items()})


@pytest.fixture(scope="module")
def library():
    headers = [*nvcc.HEADERS, *sorted(SHADOW.glob("*.h"))]
    return wkv6_cuda.bind(build.load("wkv6_on_cpu", wkv6_cuda.SOURCE, "g++", CPU_FLAGS, headers))


@pytest.fixture(params=PLANS)
def on_cpu(library, request):
    """(forward, backward) of wkv6_cuda.py over wkv6.cu compiled for the CPU: heads walked whole, or in segments."""
    return wkv6_cuda.kernels(lambda device: library, PLANS[request.param])


# ---------------------------------------------------------------------------------------------------- on the CPU


@needs_cpp
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("time", LENGTHS)
def test_lengths(on_cpu, time, dtype):
    inputs, grads = problem(time, dtype, batch=2, regimes=["random", "mixed tokens"])
    check(by_kernels(on_cpu, inputs, grads), inputs, grads, ["random", "mixed tokens"])


@needs_cpp
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("time", [20, 256])
def test_regimes(on_cpu, time, dtype):
    inputs, grads = problem(time, dtype)
    check(by_kernels(on_cpu, inputs, grads), inputs, grads)


@needs_cpp
def test_logits_that_overflow(on_cpu):
    """exp(w) is inf: then d = 0, dw = 0, and nothing is NaN. By wkv6_ref it would be: inf times 0."""
    (r, w, *rest), grads = problem(40, torch.float32, regimes=["random"])
    w[:, ::3], w[:, 1::7] = torch.inf, -1e4
    finite = [r, w.clamp(max=50), *rest]
    outputs = by_kernels(on_cpu, [r, w, *rest], grads)
    check(outputs, finite, grads, ["random"])
    assert not outputs[OUTPUTS.index("dw")][:, ::3].any()


@needs_cpp
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_bits_in_every_schedule(on_cpu, monkeypatch, dtype):
    inputs, grads = problem(80, dtype, regimes=["random"])
    results = []
    for order in (0, 1, 2, 3, 4):
        monkeypatch.setenv("CUDA_CPU_ORDER", str(order))
        results.append(by_kernels(on_cpu, inputs, grads))
    for other in results[1:]:
        assert all(x.equal(y) for x, y in zip(results[0], other, strict=True))


@needs_cpp
@pytest.mark.parametrize("cut", [37, 64])
@pytest.mark.parametrize("dtype, bar", [(torch.float32, 2e-5), (torch.bfloat16, 5e-3)])
def test_the_pieces_are_the_whole(on_cpu, cut, dtype, bar):
    """Outputs, state, and the gradients that a carried state brings back, summed where pieces share an input."""
    forward, backward = on_cpu
    (*tokens, u, state), (dy, dstate) = problem(100, dtype, regimes=["random", "slow"])
    whole = by_kernels(on_cpu, [*tokens, u, state], [dy, dstate])
    (*early, dy_1), (*late, dy_2) = zip(*((x[:, :cut].clone(), x[:, cut:].clone()) for x in (*tokens, dy)), strict=True)
    y_1, middle, saved_1 = forward(*early, u, state, True)
    y_2, end, saved_2 = forward(*late, u, middle, True)
    *d_late, du_2, dmiddle = backward(*late, u, middle, saved_2, dy_2, dstate)
    *d_early, du_1, dstart = backward(*early, u, state, saved_1, dy_1, dmiddle)
    joined = [torch.cat(pair, 1) for pair in zip([y_1, *d_early], [y_2, *d_late], strict=True)]
    for x, expected in zip([joined[0], end, *joined[1:], du_1 + du_2, dstart], whole, strict=True):
        assert (x.double() - expected.double()).norm() < bar * expected.double().norm()


@needs_cpp
def test_each_barrier_is_needed(tmp_path, monkeypatch):
    """Without one of its barriers it is wrong or depends on the schedule: so such a mistake would be noticed."""
    problems = [problem(100, dtype, regimes=["random"]) for dtype in (torch.float32, torch.bfloat16)]

    def results(library):
        forward, backward = wkv6_cuda.kernels(lambda device: wkv6_cuda.bind(library), lambda heads, chunks, sms: 2)
        tensors = []
        for inputs, grads in problems:
            y, state_T, saved = forward(*inputs, True)
            tensors += [y, state_T, *backward(*inputs, saved, *grads)]
        return torch.cat([x.flatten().float() for x in tensors])

    assert barriers(wkv6_cuda.SOURCE, tmp_path, monkeypatch, results) == (7, [])


@needs_cpp
def test_sanitizers(tmp_path):
    library = compile_for_cpu(wkv6_cuda.SOURCE, tmp_path, *SANITIZERS)
    script = """
        import ctypes, sys
        sys.path[:0] = sys.argv[2:]
        from test_wkv6_cuda import PLANS, problem, torch, wkv6_cuda
        library = wkv6_cuda.bind(ctypes.CDLL(sys.argv[1]))
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            inputs, grads = problem(49, dtype, regimes=["random"])
            for plan in PLANS.values():
                forward, backward = wkv6_cuda.kernels(lambda device: library, plan)
                _, _, saved = forward(*inputs, True)
                backward(*inputs, saved, *grads)
        print("clean")
    """
    run = run_sanitized(script, library, HERE, HERE.parent)
    assert run.stdout == "clean\n", run.stderr


@needs_cpp
def test_as_an_operator(library):
    """The saved tensor has the shape that its fake has, gradients arrive, and torch.library is content."""
    kernels = wkv6_cuda.kernels(lambda device: library)
    wkv6 = op.register("cuda_on_cpu", *kernels, wkv6_cuda.new_saved, recurrence="wkv6", device="cpu",
                       dtypes=nvcc.DTYPES, head_size=N)  # fmt: skip
    for dtype in (torch.float32, torch.bfloat16):
        inputs, grads = problem(40, dtype, regimes=["random"])
        leaves = [x.requires_grad_() for x in inputs]
        outputs = wkv6(*leaves)
        outputs = [*outputs, *torch.autograd.grad(outputs, leaves, grads)]
        check([x.detach() for x in outputs], [x.detach() for x in inputs], grads, ["random"])
        torch.library.opcheck(torch.ops.pissa_rwkv.wkv6_cuda_on_cpu, (*leaves, True))


@needs_cpp
def test_what_was_compiled_is_looked_at(library):
    """load compares with wkv6_chunk.py before anything is trained: right kernels pass, wrong ones are refused."""
    forward, backward = wkv6_cuda.kernels(lambda device: library)
    op.verify("cuda", forward, backward, wkv6_chunk.differs, "cpu")

    def swapped(*arguments):
        dr, dw, dk, dv, du, dstate = backward(*arguments)
        return dk, dw, dr, dv, du, dstate

    with pytest.raises(build.BuildError, match=r"wrongly on this GPU: in torch.float32 it is off by .*--op chunk"):
        op.verify("cuda", forward, swapped, wkv6_chunk.differs, "cpu")


def test_what_is_saved_is_known_without_a_gpu():
    """The `cuda` op on meta tensors: 256 bytes per token and head in bf16, else 512."""
    wkv6 = wkv7_cuda.load("cuda", "wkv6", ready=False)
    for dtype, kept in ((torch.bfloat16, torch.bfloat16), (torch.float32, torch.float32), (torch.half, torch.float32)):
        tokens = [torch.empty(1, 70, 2, N, dtype=dtype, device="meta", requires_grad=True) for _ in range(4)]
        u = torch.empty(2, N, dtype=dtype, device="meta", requires_grad=True)
        y, _ = wkv6(*tokens, u, torch.empty(1, 2, N, N, device="meta"))
        saved = y.grad_fn.saved_tensors[-1]
        assert (saved.numel(), saved.dtype) == (2 * 3 * 64 * 64, kept)
        assert [g.shape for g in torch.autograd.grad(y, [*tokens, u], y)] == [x.shape for x in (*tokens, u)]


# ---------------------------------------------------------------------------------------------------- nvcc


@needs_nvcc
@pytest.mark.parametrize("arch", ["80", "90a", "120"])
def test_nvcc_compiles_nothing_spills_and_tensor_cores_are_used(tmp_path, arch):
    flags = [flag for flag in nvcc.FLAGS if flag.startswith(("-std", "-O"))]
    command = [NVCC, *flags, f"-arch=sm_{arch}", "-Xptxas", "-v", "-cubin", "-o", tmp_path / "wkv6.cubin"]
    run = subprocess.run([*command, "--keep", "--keep-dir", tmp_path, wkv6_cuda.SOURCE], capture_output=True, text=True,
                         timeout=120)  # fmt: skip
    assert run.returncode == 0, run.stderr
    kernels = run.stderr.split("Compiling entry function '")[1:]
    assert len(kernels) == 4 * 3 + 1  # the walk's modes in three dtypes, the scan
    for kernel in kernels:
        print(arch, kernel[: kernel.index("'")], re.search(r"Used (\d+) registers", kernel)[0])
        assert set(re.findall(r"(\d+) bytes (?:spill|stack)", kernel)) == {"0"}, kernel
    assert "warning" not in run.stderr, run.stderr
    for kernel in (tmp_path / "wkv6.ptx").read_text().split(".entry ")[1:]:
        if "wkv6_scan" not in kernel[:80]:
            assert kernel.count("mma.sync.aligned.m16n8k16") >= 8 and kernel.count("ldmatrix") >= 5
            assert "bfloat16" not in kernel[:200] or "cp.async.cg" in kernel
        assert "atom" not in kernel and "st.global.u8" not in kernel and "st.global.b8" not in kernel


# ---------------------------------------------------------------------------------------------------- on a GPU


@pytest.fixture(params=PLANS)
def on_gpu(request):
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < wkv6_cuda.CAPABILITY:
        pytest.skip("no GPU of sm_80 or newer")
    return wkv6_cuda.kernels(wkv6_cuda.library, PLANS[request.param])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("time", [*LENGTHS, 256])
def test_gpu(on_gpu, time, dtype):
    inputs, grads = problem(time, dtype, batch=2)
    check(by_kernels(on_gpu, inputs, grads, "cuda"), inputs, grads)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gpu_gives_the_same_bits_twice(on_gpu, dtype):
    inputs, grads = problem(300, dtype, batch=8)
    first, second = (by_kernels(on_gpu, inputs, grads, "cuda") for _ in range(2))
    assert all(x.equal(y) for x, y in zip(first, second, strict=True))
