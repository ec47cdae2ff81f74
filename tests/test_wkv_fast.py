"""wkv7_fast.cu, the file that ships: run on the CPU under tests/cuda_on_cpu, compiled by nvcc, run on a GPU if any.

Oracles: the recurrence in float64 (wkv7_ref) for the error; for how large it may be chunk.py, which rounds the same
tensors to bf16 and knows nothing of threads, fragments or shared memory.
"""

import ctypes
import functools
import itertools
import re
import shutil
import subprocess

import pytest
import torch
from test_cuda_on_cpu import CPU_FLAGS, HERE, SANITIZERS, SHADOW, barriers, compile_for_cpu, run_sanitized
from test_wkv_cuda import NVCC, needs_cpp, needs_nvcc, one_torch_thread  # noqa: F401  (a fixture for this module too)

import wkv7_cuda
from pissa_rwkv import load_wkv, wkv7_ref
from wkv7_cuda import build, chunk, cuda, cuda_precise, fast, nvcc, op

N, BARS = 64, {"y": 5e-3, "state_T": 5e-3}  # the others, gradients: 1e-2
LENGTHS = [1, 15, 16, 17, 63, 64, 65, 100, 256]
ORDINARY = ["random", "decay floor", "decay near 1", "mixed decays"]
OTHERS = ["equal keys", "logits to 20", "zeros"]
OUTPUTS = ["y", "state_T", "dr", "dw", "dk", "dv", "da", "db", "dstate"]
STATES = ("state_T", "dstate")  # fp32; the others are bf16

PLANS = {"whole": lambda heads, chunks, sms: chunks, "segments": lambda heads, chunks, sms: 1}


def problem(time, regime="random", batch=1, heads=2, rounded=True):
    """Inputs r w k v a b, in bf16 if `rounded`, and the state; gradients of y and state_T."""
    draw = torch.Generator().manual_seed(time)
    normal = functools.partial(torch.randn, generator=draw)
    r, w, k, v, u, dy = (normal(batch, time, heads, N) for _ in range(6))
    eta = torch.rand(batch, time, heads, N, generator=draw)
    w = {"decay floor": torch.full_like(w, 20), "decay near 1": w - 6, "equal keys": w - 6,
         "logits to 20": 20 * w.tanh(), "mixed decays": w + torch.linspace(-8, 6, N)}.get(regime, w)
    if regime == "equal keys":  # and almost complete removal: here powers of the triangular matrix explode
        u, eta = normal(batch, 1, heads, N) + 0.1 * u, torch.full_like(eta, 0.98)
        k = u / u.norm(dim=-1, keepdim=True)
    kappa = u / u.norm(dim=-1, keepdim=True)
    inputs = [r, w, k * eta, v, -kappa, kappa * eta]
    if regime == "zeros":
        inputs = [torch.zeros_like(x) for x in inputs]
    inputs = [x.bfloat16() if rounded else x for x in inputs] + [normal(batch, heads, N, N)]
    return inputs, [dy.bfloat16(), normal(batch, heads, N, N)]


def by_recurrence(inputs, grads):
    leaves = [x.double().requires_grad_() for x in inputs]
    outputs = wkv7_ref(*leaves)
    return [x.detach() for x in (*outputs, *torch.autograd.grad(outputs, leaves, [g.double() for g in grads]))]


def by_model(inputs, grads, cast=chunk.to_bf16):
    """chunk.py in float64, each named tensor rounded by `cast`; then the outputs, as the kernel's are."""
    inputs, grads = [x.double() for x in inputs], [g.double() for g in grads]
    y, state_T, saved = chunk.forward(*inputs, True, cast=cast)
    outputs = [y, state_T, *chunk.backward(*inputs, saved, *grads, cast=cast)]
    return [x if name in STATES else x.bfloat16() for name, x in zip(OUTPUTS, outputs, strict=True)]


def by_kernels(kernels, inputs, grads, device="cpu"):
    """(forward, backward) of fast.py; every tensor that is allocated on the way starts as NaN."""
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


def errors(outputs, exact):
    """Relative, in the Frobenius norm; absolute where the exact result is zero."""
    return {name: ((x.double() - e).norm() / (e.norm() if e.any() else 1)).item()
            for name, x, e in zip(OUTPUTS, outputs, exact, strict=True)}  # fmt: skip


def check(outputs, inputs, grads, regime):
    """Under the bars in ordinary regimes; never more than a fifth above what its roundings predict."""
    exact = by_recurrence(inputs, grads)
    found, predicted = errors(outputs, exact), errors(by_model(inputs, grads), exact)
    print({name: f"{1e3 * found[name]:.2f} ({1e3 * predicted[name]:.2f})" for name in OUTPUTS})
    for name in OUTPUTS:
        assert found[name] <= 1.2 * predicted[name] + 1e-4, (name, found[name], predicted[name])
        assert regime not in ORDINARY or found[name] < BARS.get(name, 1e-2), (name, found[name])


@pytest.fixture(scope="module")
def library():
    headers = [*nvcc.HEADERS, *sorted(SHADOW.glob("*.h"))]
    return fast.bind(build.load("wkv7_fast_on_cpu", fast.SOURCE, "g++", CPU_FLAGS, headers))


@pytest.fixture(params=PLANS)
def on_cpu(library, request):
    """(forward, backward) of fast.py over wkv7_fast.cu compiled for the CPU: heads walked whole, or in segments."""
    return fast.kernels(lambda device: library, PLANS[request.param])


# ---------------------------------------------------------------------------------------------------- on the CPU


@needs_cpp
@pytest.mark.parametrize("time", LENGTHS)
def test_lengths(on_cpu, time):
    inputs, grads = problem(time, batch=2)
    check(by_kernels(on_cpu, inputs, grads), inputs, grads, "random")


@needs_cpp
@pytest.mark.parametrize("regime", ORDINARY[1:] + OTHERS)
@pytest.mark.parametrize("time", [65, 256])
def test_regimes(on_cpu, regime, time):
    inputs, grads = problem(time, regime)
    check(by_kernels(on_cpu, inputs, grads), inputs, grads, regime)


@needs_cpp
def test_equal_keys_cost_about_what_rounding_the_inputs_costs(on_cpu):
    """An ill-conditioned problem: nothing in the results is wronger than twice the worst that rounded inputs cause."""
    inputs, grads = problem(256, "equal keys")
    exact = by_recurrence(inputs, grads)
    effect = errors(exact, by_recurrence(problem(256, "equal keys", rounded=False)[0], grads))
    found = errors(by_kernels(on_cpu, inputs, grads), exact)
    print(found, effect)
    assert max(found.values()) < 2 * max(effect.values())


@needs_cpp
def test_the_same_bits_in_every_schedule(on_cpu, monkeypatch):
    inputs, grads = problem(80, heads=1)
    results = []
    for order in (0, 1, 2, 3, 4):
        monkeypatch.setenv("CUDA_CPU_ORDER", str(order))
        results.append(by_kernels(on_cpu, inputs, grads))
    for other in results[1:]:
        assert all(x.equal(y) for x, y in zip(results[0], other, strict=True))


@needs_cpp
def test_two_halves_are_the_whole(on_cpu):
    """Cut where a chunk ends, only the state between is rounded to fp32, in which it is carried anyway."""
    forward, _ = on_cpu
    (*inputs, state), _ = problem(100)
    y, state_T, _ = forward(*inputs, state, False)
    y_1, middle, _ = forward(*(x[:, :64].contiguous() for x in inputs), state, False)
    y_2, end, _ = forward(*(x[:, 64:].contiguous() for x in inputs), middle, False)
    torch.testing.assert_close(end, state_T, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(torch.cat([y_1, y_2], 1).float(), y.float(), rtol=1e-2, atol=1e-2)


@needs_cpp
def test_more_blocks_than_a_launch_may_have_are_refused(library):
    """Rather than what is left of their number in 32 bits be launched."""
    code = library.wkv7_fast_forward(2**31, 1, 1, 1, (ctypes.c_void_p * 6)(), *[None] * 6)
    assert code == 9  # cudaErrorInvalidConfiguration


@needs_cpp
def test_each_barrier_is_needed(tmp_path, monkeypatch):
    """Without one of its barriers it is wrong or depends on the schedule: so such a mistake would be noticed."""
    inputs, grads = problem(100, heads=1)

    def results(library):
        forward, backward = fast.kernels(lambda device: fast.bind(library), PLANS["segments"])
        y, state_T, saved = forward(*inputs, True)
        return torch.cat([x.flatten().float() for x in (y, state_T, *backward(*inputs, saved, *grads))])

    assert barriers(fast.SOURCE, tmp_path, monkeypatch, results) == (9, [])


@needs_cpp
def test_sanitizers(tmp_path):
    library = compile_for_cpu(fast.SOURCE, tmp_path, *SANITIZERS)
    script = """
        import ctypes, sys
        sys.path[:0] = sys.argv[2:]
        from test_wkv_fast import PLANS, fast, problem
        library = fast.bind(ctypes.CDLL(sys.argv[1]))
        inputs, grads = problem(49, heads=1)
        for plan in PLANS.values():
            forward, backward = fast.kernels(lambda device: library, plan)
            _, _, saved = forward(*inputs, True)
            backward(*inputs, saved, *grads)
        print("clean")
    """
    run = run_sanitized(script, library, HERE, HERE.parent)
    assert run.stdout == "clean\n", run.stderr


@needs_cpp
def test_as_an_operator(library):
    """The saved tensor has the shape that its fake has, gradients arrive, and torch.library is content."""
    kernels = fast.kernels(lambda device: library)
    wkv7 = op.register("fast_on_cpu", *kernels, fast.new_saved, device="cpu", dtypes=[torch.bfloat16], head_size=N)
    inputs, grads = problem(40)
    leaves = [x.requires_grad_() for x in inputs]
    outputs = wkv7(*leaves)
    outputs = [*outputs, *torch.autograd.grad(outputs, leaves, grads)]
    check([x.detach() for x in outputs], [x.detach() for x in inputs], grads, "random")
    torch.library.opcheck(torch.ops.pissa_rwkv.wkv7_fast_on_cpu, (*leaves, True))


@needs_cpp
def test_what_was_compiled_is_looked_at(library, monkeypatch):
    """cuda.load compares with chunk.py before anything is trained: right kernels pass, those of each dtype's mode;
    wrong ones are refused."""
    asked = []

    def noted(kernel):
        return lambda r, *rest: asked.append(r.dtype) or kernel(r, *rest)

    monkeypatch.setattr(fast, "library", lambda device: asked.append("fast") or library)
    monkeypatch.setattr(cuda_precise, "kernels", lambda _: (noted(chunk.forward), noted(chunk.backward)))
    forward, backward = cuda.kernels()
    op.verify("cuda", forward, backward, chunk.differs, "cpu")
    assert asked == [*[torch.float32] * 2, *["fast"] * 2, *[torch.float16] * 2]

    def swapped(*arguments):
        dr, dw, dk, dv, da, db, dstate = backward(*arguments)
        return dr, dw, dk, dv, db, da, dstate

    with pytest.raises(build.BuildError, match=r"wrongly on this GPU: in torch.float32 it is off by .*--op chunk"):
        op.verify("cuda", chunk.forward, lambda *x: [2 * d for d in chunk.backward(*x)], chunk.differs, "cpu")
    with pytest.raises(build.BuildError, match=r"in torch.bfloat16 it is off by"):
        op.verify("cuda", forward, lambda r, *rest: (swapped if r.dtype == torch.bfloat16 else backward)(r, *rest),
                  chunk.differs, "cpu")  # fmt: skip


def test_a_gpu_that_takes_no_launch_is_left_to_the_next_operator(monkeypatch, capsys):
    """nvcc 13 beside a driver of CUDA 12: all compiles, and nothing runs."""

    def refuses(r, *arguments):
        raise RuntimeError("wkv7_forward: CUDA driver version is insufficient for CUDA runtime version (CUDA error 35)")

    monkeypatch.setattr(cuda, "check_gpu", lambda name: (9, 0))
    monkeypatch.setattr(cuda, "open_library", lambda *arguments: None)
    monkeypatch.setattr(cuda, "kernels", lambda: (refuses, refuses))
    monkeypatch.setattr(op, "verify", functools.partial(op.verify, device="cpu"))
    assert load_wkv("x070", 64, "", "cuda") is not None
    said = capsys.readouterr().out
    assert re.match(r"no WKV operator cuda: the cuda operator does not run on this GPU \(wkv7_forward: CUDA .*35\)\)"
                    r": is the driver as new as the compiler\?; using the next one", said)  # fmt: skip


@pytest.mark.parametrize("heads, chunks, sms, length", [
    (128, 32, 132, 32), (320, 5, 132, 5), (40, 32, 132, 6), (12, 32, 132, 2), (64, 128, 132, 32),
    (2, 5, 132, 2), (2, 5, 3, 2),                                      # of `differs`
    (89, 32, 132, 32), (88, 32, 132, 11), (40, 32, 28, 32), (12, 32, 28, 8), (1, 1, 14, 1),
    (1, 4, 132, 4)])  # fmt: skip
def test_segments_fill_a_gpu_unless_the_heads_do(heads, chunks, sms, length):
    assert fast.segment_chunks(heads, chunks, sms) == length


def test_no_segment_waits_for_another():
    for heads, chunks, sms in itertools.product(range(1, 200), (2, 3, 31, 32, 128, 1024), (14, 28, 132)):
        segments = -(-chunks // fast.segment_chunks(heads, chunks, sms))
        assert segments == 1 or heads * segments <= 2 * sms


def test_each_dtype_has_its_mode():
    """The `cuda` op without a GPU, on meta tensors: what it would save tells which mode it would take."""
    wkv7 = wkv7_cuda.load("cuda", ready=False)
    for dtype, numbers in ((torch.bfloat16, 2 * 3 * 64 * 64), (torch.float32, 2 * (5 * 64 * 64 + 70 * 64))):
        inputs = [torch.empty(1, 70, 2, N, dtype=dtype, device="meta", requires_grad=True) for _ in range(6)]
        y, _ = wkv7(*inputs, torch.empty(1, 2, N, N, device="meta"))
        saved = y.grad_fn.saved_tensors[-1]
        assert (saved.numel(), saved.dtype) == (numbers, dtype)
        assert [g.shape for g in torch.autograd.grad(y, inputs, y)] == [x.shape for x in inputs]
    assert not cuda.is_fast(torch.empty(1, dtype=torch.float16))


@pytest.mark.parametrize("capability, quick", [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_where_a_gpu_is_its_mode_is_that_of_tensors_without_values(pretend_gpu, capability, quick):
    pretend_gpu(capability)
    assert cuda.is_fast(torch.empty(1, dtype=torch.bfloat16, device="meta")) == quick


# ---------------------------------------------------------------------------------------------------- nvcc


@needs_nvcc
@pytest.mark.parametrize("arch", ["80", "89", "90a", "100", "120"])
def test_nvcc_compiles_nothing_spills_and_tensor_cores_are_used(tmp_path, arch):
    command = [NVCC, *fast_flags(), f"-arch=sm_{arch}", "-Xptxas", "-v", "-cubin", "-o", tmp_path / "fast.cubin"]
    run = subprocess.run([*command, "--keep", "--keep-dir", tmp_path, fast.SOURCE], capture_output=True, text=True,
                         timeout=120)  # fmt: skip
    assert run.returncode == 0, run.stderr
    kernels = run.stderr.split("Compiling entry function '")[1:]
    assert len(kernels) == 6  # four modes of the walk, two scans
    for kernel in kernels:
        print(arch, re.search(r"wkv7_\w+?_kernelI\w+?E", kernel)[0], re.search(r"Used (\d+) registers", kernel)[0])
        assert set(re.findall(r"(\d+) bytes (?:spill|stack)", kernel)) == {"0"}, kernel
    for kernel in (tmp_path / "wkv7_fast.ptx").read_text().split(".entry ")[1:]:
        assert kernel.count("mma.sync.aligned.m16n8k16") >= 32 and kernel.count("ldmatrix") >= 32
        assert "cp.async.cg" in kernel and "atom" not in kernel
        assert "st.global.u8" not in kernel and "st.global.b8" not in kernel  # what becomes of an unaligned memcpy


def fast_flags():
    return [flag for flag in (*nvcc.FLAGS, *fast.FLAGS) if flag.startswith(("-std", "-O", "-ftz"))]


@needs_nvcc
def test_missing_nvcc_names_the_file(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    monkeypatch.setattr("pathlib.Path.exists", lambda _: False)
    with pytest.raises(build.BuildError, match=r"^wkv7_fast\.cu needs nvcc.*install the CUDA toolkit"):
        nvcc.open_library.__wrapped__(fast.SOURCE, fast.bind, (9, 0))


# ---------------------------------------------------------------------------------------------------- on a GPU


@pytest.fixture(params=PLANS)
def on_gpu(request):
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < fast.CAPABILITY:
        pytest.skip("no GPU of sm_80 or newer")
    return fast.kernels(fast.library, PLANS[request.param])


@pytest.mark.gpu
@pytest.mark.parametrize("time, regime", [(t, "random") for t in LENGTHS] + [(256, r) for r in ORDINARY[1:] + OTHERS])
def test_gpu(on_gpu, time, regime):
    inputs, grads = problem(time, regime, batch=2)
    check(by_kernels(on_gpu, inputs, grads, "cuda"), inputs, grads, regime)


@pytest.mark.gpu
def test_gpu_gives_the_same_bits_twice(on_gpu):
    inputs, grads = problem(300, batch=8, heads=5)
    first, second = (by_kernels(on_gpu, inputs, grads, "cuda") for _ in range(2))
    assert all(x.equal(y) for x, y in zip(first, second, strict=True))
