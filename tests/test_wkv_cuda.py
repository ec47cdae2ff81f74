"""wkv7.cu, the file that ships: executed on the CPU under tests/cuda_on_cpu, compiled by nvcc, run on a GPU if any.

Oracle: the recurrence as a loop over tokens in float64, its gradients from autograd. Rulers: the same loop in float32
(a kernel that computes in fp32 is at most twice as wrong), and the rounding of the output's own type.
"""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from test_cuda_on_cpu import CPU_FLAGS, HERE, SANITIZERS, SHADOW, barriers, compile_for_cpu, run_sanitized

import wkv7_cuda
from wkv7_cuda import build, cuda_precise, nvcc, op

N = 64
REGIMES = ["random", "decay floor", "decay near 1", "equal keys", "zeros"]  # one head each
LENGTHS = [1, 15, 16, 17, 63, 64, 65, 100]
OUTPUTS = ["y", "state_T", "dr", "dw", "dk", "dv", "da", "db", "dstate"]
NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")

needs_cpp = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="no nvcc")


# ---------------------------------------------------------------------------------------------------- the oracle


def problem(batch: int, time: int, dtype: torch.dtype) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Inputs r, w, k, v, a, b (B,T,H,N) and state (B,H,N,N); gradients of y and state_T. Head h is in REGIMES[h]."""
    generator = torch.Generator().manual_seed(time)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    shape = (batch, time, len(REGIMES), N)
    r, w, k, v = (normal(*shape) for _ in range(4))
    eta = torch.rand(shape, generator=generator)
    w[:, :, 1], w[:, :, 2] = 20, -20
    # breaks chunked algorithms that take powers of the triangular matrix; here, each key passes its error to the next
    k[:, :, 3], eta[:, :, 3], w[:, :, 3] = normal(batch, 1, N) + 0.01 * k[:, :, 3], 0.98, w[:, :, 3] - 6
    kappa = torch.nn.functional.normalize(k, dim=-1)
    inputs = [r, w, kappa * (0.5 + 0.5 * eta), v, -kappa, kappa * eta]
    for x in (inputs[0], *inputs[2:]):  # w stays: one constant decay would pile up one rounding error T times
        x[:, :, 4] = 0
    inputs = [x.to(dtype) for x in inputs] + [normal(batch, len(REGIMES), N, N)]
    return inputs, [normal(*shape).to(dtype), normal(batch, len(REGIMES), N, N)]


def loop(r, w, k, v, a, b, S):
    """One token after another, letters as in wkv7.cu."""
    ys = []
    for t in range(r.shape[1]):
        d = torch.exp(-(torch.e**-0.5) * torch.sigmoid(w[:, t]))
        u = torch.einsum("bhij,bhj->bhi", S, a[:, t])
        S = S * d[:, :, None, :] + u[..., None] * b[:, t, :, None] + v[:, t, ..., None] * k[:, t, :, None]
        ys.append(torch.einsum("bhij,bhj->bhi", S, r[:, t]))
    return torch.stack(ys, 1), S


def by_loop(inputs, grads, dtype):
    """y, state_T and the gradients of inputs and state, in `dtype` arithmetic."""
    leaves = [x.to(dtype).requires_grad_() for x in inputs]
    outputs = loop(*leaves)
    return [x.detach() for x in (*outputs, *torch.autograd.grad(outputs, leaves, [g.to(dtype) for g in grads]))]


def by_kernels(kernels, inputs, grads, device="cpu"):
    """The same through (forward, backward) of cuda_precise.py; every tensor allocated on the way starts as NaN."""
    forward, backward = kernels
    inputs, grads = [x.to(device) for x in inputs], [x.to(device) for x in grads]
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # the default, written out: this is what gives the NaN
    try:
        y, state_T, saved = forward(*inputs, True)
        outputs = [y, state_T, *backward(*inputs, saved, *grads)]
        assert not saved.isnan().any()  # all of it is used
        y, state_T, saved = forward(*inputs, False)
    finally:
        torch.use_deterministic_algorithms(False)
    assert y.equal(outputs[0]) and state_T.equal(outputs[1]) and saved.numel() == 0
    return [x.cpu() for x in outputs]


def by_head(x):
    """(B,T,H,N) or (B,H,N,N) -> (H, all the rest)."""
    return x.movedim(2 if x.shape[2] == len(REGIMES) else 1, 0).flatten(1).double()


def check(outputs, inputs, grads, expf=0.0):
    """Outputs of the kernels against the loop, each tensor and regime on its own. expf: how much wronger a token's
    decay may make them; where decays are constant, this adds up."""
    reference, plain = by_loop(inputs, grads, torch.float64), by_loop(inputs, grads, torch.float32)
    worst = {}
    for name, out, exact, fp32 in zip(OUTPUTS, outputs, reference, plain, strict=True):
        for regime, o, e, p in zip(REGIMES, by_head(out), by_head(exact), by_head(fp32), strict=True):
            label, size = f"{name}, {regime}", e.norm()
            if size == 0:
                assert not o.any(), label
                continue
            if out.dtype == torch.float32:
                error, error_of_plain = ((o - e).norm() / size).item(), ((p - e).norm() / size).item()
                # min: torch rounds 1 - sigma(20) to 0, so its dw there is all wrong. 2^-23, one unit in the last place:
                # at T = 1 there are so few roundings that one more is twice as many.
                bar = 2 * min(error_of_plain, 1e-6) + 2**-23 + expf * inputs[0].shape[1]
                assert error < bar, (label, error, error_of_plain)
                worst[name] = max(worst.get(name, 0), error)
            else:  # the nearest number of that type to something that is right to 2e-5
                unit = torch.finfo(out.dtype).eps / 2
                slack = torch.finfo(out.dtype).smallest_normal * unit + 2e-5 * e.pow(2).mean().sqrt()
                assert ((o - e).abs() <= unit * e.abs() + slack).all(), label
    print({name: f"{error:.1e}" for name, error in worst.items()})


# ---------------------------------------------------------------------------------------------------- on the CPU


@pytest.fixture(scope="module", autouse=True)
def one_torch_thread():
    """The loops' tensors are small: where cores are shared, two threads mostly wait for each other (10 x slower)."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def on_cpu():
    """(forward, backward) of cuda_precise.py over wkv7.cu compiled for the CPU."""
    headers = [*nvcc.HEADERS, *sorted(SHADOW.glob("*.h"))]
    library = cuda_precise.bind(build.load("wkv7_on_cpu", cuda_precise.SOURCE, "g++", CPU_FLAGS, headers))
    return cuda_precise.kernels(lambda device: library)


@needs_cpp
@pytest.mark.parametrize("time", LENGTHS)
def test_fp32(on_cpu, time):
    inputs, grads = problem(2, time, torch.float32)
    check(by_kernels(on_cpu, inputs, grads), inputs, grads)


@needs_cpp
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("time", [1, 17, 64])
def test_16_bit(on_cpu, time, dtype):
    inputs, grads = problem(2, time, dtype)
    check(by_kernels(on_cpu, inputs, grads), inputs, grads)


@needs_cpp
def test_the_same_bits_in_every_schedule(on_cpu, monkeypatch):
    inputs, grads = problem(1, 35, torch.float32)
    results = []
    for order in (0, 1, 2, 3, 4):
        monkeypatch.setenv("CUDA_CPU_ORDER", str(order))
        results.append(by_kernels(on_cpu, inputs, grads))
    for other in results[1:]:
        assert all(x.equal(y) for x, y in zip(results[0], other, strict=True))


@needs_cpp
def test_two_halves_are_the_whole(on_cpu):
    forward, _ = on_cpu
    (*inputs, state), _ = problem(2, 50, torch.float32)
    y, state_T, _ = forward(*inputs, state, False)
    y_1, middle, _ = forward(*(x[:, :23].contiguous() for x in inputs), state, False)
    y_2, end, _ = forward(*(x[:, 23:].contiguous() for x in inputs), middle, False)
    assert torch.cat([y_1, y_2], 1).equal(y) and end.equal(state_T)


@needs_cpp
def test_tensors_that_start_inside_a_16_byte_unit(on_cpu):
    forward, backward = on_cpu
    inputs, grads = problem(1, 5, torch.bfloat16)

    def shifted(x):
        return torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape)

    _, _, saved = forward(*inputs, True)
    expected = [*forward(*inputs, False)[:2], *backward(*inputs, saved, *grads)]
    moved = [shifted(x) for x in inputs]
    outputs = [*forward(*moved, False)[:2], *backward(*moved, saved, *map(shifted, grads))]
    assert all(x.equal(y) for x, y in zip(outputs, expected, strict=True))


@needs_cpp
def test_each_barrier_is_needed(tmp_path, monkeypatch):
    """wkv7.cu without one of its barriers is wrong, or depends on the schedule: so such a mistake would be noticed."""
    inputs, grads = problem(1, 35, torch.float32)

    def results(library):
        forward, backward = cuda_precise.kernels(lambda device: cuda_precise.bind(library))
        y, state_T, saved = forward(*inputs, True)
        return torch.cat([x.flatten() for x in (y, state_T, *backward(*inputs, saved, *grads))])

    assert barriers(cuda_precise.SOURCE, tmp_path, monkeypatch, results) == (4, [])


@needs_cpp
def test_sanitizers(tmp_path):
    library = compile_for_cpu(cuda_precise.SOURCE, tmp_path, *SANITIZERS)
    script = """
        import ctypes, sys
        sys.path[:0] = sys.argv[2:]
        from test_wkv_cuda import cuda_precise, problem, torch
        library = cuda_precise.bind(ctypes.CDLL(sys.argv[1]))
        forward, backward = cuda_precise.kernels(lambda device: library)
        inputs, grads = problem(2, 17, torch.bfloat16)
        inputs = [*(x[:, :, :1].contiguous() for x in inputs[:6]), inputs[6][:, :1].contiguous()]
        _, _, saved = forward(*inputs, True)
        backward(*inputs, saved, grads[0][:, :, :1].contiguous(), grads[1][:, :1].contiguous())
        print("clean")
    """
    run = run_sanitized(script, library, HERE, HERE.parent)
    assert run.stdout == "clean\n", run.stderr


@needs_cpp
def test_as_an_operator(on_cpu):
    """The saved tensor has the shape that its fake has, gradients arrive, and torch.library is content."""
    wkv7 = op.register("cuda_on_cpu", *on_cpu, cuda_precise.new_saved, device="cpu", dtypes=nvcc.DTYPES, head_size=N)
    inputs, grads = problem(1, 18, torch.float32)
    leaves = [x.requires_grad_() for x in inputs]
    outputs = wkv7(*leaves)
    outputs = [*outputs, *torch.autograd.grad(outputs, leaves, grads)]
    check([x.detach() for x in outputs], [x.detach() for x in inputs], grads)
    torch.library.opcheck(torch.ops.pissa_rwkv.wkv7_cuda_on_cpu, (*leaves, True))


@needs_cpp
def test_a_failed_launch_is_one_line(on_cpu):
    forward, _ = on_cpu
    r, state = torch.zeros(1, 0, 0, N), torch.zeros(1, 0, N, N)  # no heads: a launch of no blocks
    with pytest.raises(RuntimeError, match=r"^wkv7_forward: launch of \(0,1,1\) blocks .*\(CUDA error 719\)$"):
        forward(r, r, r, r, r, r, state, False)


# ---------------------------------------------------------------------------------------------------- nvcc


@pytest.fixture(scope="module")
def by_nvcc(tmp_path_factory):
    """The shipped library for four architectures in one file, and what ptxas reported on the way."""
    library = tmp_path_factory.mktemp("nvcc") / "wkv7.so"
    archs = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ("80", "90a", "100", "120")]
    run = subprocess.run(
        [NVCC, *nvcc.FLAGS, *archs, "--threads", "2", "-Xptxas", "-v", cuda_precise.SOURCE, "-o", library],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    return library, run.stdout + run.stderr


@needs_nvcc
def test_nvcc_compiles_and_nothing_spills(by_nvcc):
    _, log = by_nvcc
    kernels = log.split("Compiling entry function '")[1:]
    assert len(kernels) == 4 * 3 * 3  # architectures, kernels, I/O types
    for kernel in kernels:
        name, io = re.match(r"\S*?(wkv7_(?:forward|backward_\w+)_kernel)I(f|6__half|13__nv_bfloat16)E", kernel).groups()
        arch, registers = re.search(r"for '(sm_\w+)'", kernel)[1], re.search(r"Used (\d+) registers", kernel)[1]
        print(f"{arch:7} {name:29} {io.lstrip('0123456789'):13} {registers} registers")
        spilled = set(re.findall(r"(\d+) bytes (?:spill|stack)", kernel))
        assert spilled == {"0"} or (arch, spilled) == ("sm_100", {"8"}) and io != "f", (arch, name, io)


@needs_nvcc
def test_loading_without_a_gpu(monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("a GPU is there")
    with pytest.raises(build.BuildError, match="needs an NVIDIA GPU.*--op chunk") as error:
        cuda_precise.load()
    assert "\n" not in str(error.value)


def test_loading_without_nvcc(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    monkeypatch.setattr(Path, "exists", lambda _: False)
    with pytest.raises(build.BuildError, match="needs nvcc.*install the CUDA toolkit") as error:
        nvcc.open_library.__wrapped__(cuda_precise.SOURCE, cuda_precise.bind, (9, 0))
    assert "\n" not in str(error.value)


@needs_nvcc
def test_the_shipped_library_opens_without_a_driver(by_nvcc, monkeypatch):
    """On a machine without a GPU the launch fails, and says so in one line."""
    if torch.cuda.is_available():
        pytest.skip("a GPU is there")
    asked = []
    monkeypatch.setattr(build, "load", lambda *arguments: asked.extend(arguments) or build.ctypes.CDLL(str(by_nvcc[0])))
    library = nvcc.open_library.__wrapped__(cuda_precise.SOURCE, cuda_precise.bind, (9, 0))
    assert asked == ["wkv7_sm_90", cuda_precise.SOURCE, NVCC, [*nvcc.FLAGS, "-arch=sm_90"], nvcc.HEADERS]
    forward, _ = cuda_precise.kernels(lambda device: library)
    with pytest.raises(RuntimeError, match=r"^wkv7_forward: .*driver.* \(CUDA error \d+\)$"):
        forward(*problem(1, 3, torch.float32)[0], False)


# ---------------------------------------------------------------------------------------------------- on a GPU

GPU_EXPF = 2**-23  # of CUDA's expf the nearest number is not promised, but one of the two around the exact one


@pytest.fixture(scope="module")
def on_gpu():
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    library = cuda_precise.library(torch.device("cuda"))
    return cuda_precise.kernels(lambda device: library)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("time", LENGTHS)
def test_gpu(on_gpu, time, dtype):
    inputs, grads = problem(2, time, dtype)
    check(by_kernels(on_gpu, inputs, grads, "cuda"), inputs, grads, GPU_EXPF)


@pytest.mark.gpu
def test_gpu_gives_the_same_bits_twice(on_gpu):
    inputs, grads = problem(8, 300, torch.bfloat16)
    first, second = (by_kernels(on_gpu, inputs, grads, "cuda") for _ in range(2))
    assert all(x.equal(y) for x, y in zip(first, second, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif("not torch.cuda.is_available()", reason="no GPU")
def test_gpu_operator_on_another_stream():
    """Through autograd, on a stream of its own and with non-contiguous inputs."""
    wkv7 = wkv7_cuda.load("cuda_precise")
    inputs, grads = problem(2, 40, torch.float32)
    with torch.cuda.stream(torch.cuda.Stream()):
        leaves = [x.cuda().requires_grad_() for x in inputs]
        strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in leaves[:6]]
        outputs = wkv7(*strided, leaves[6])
        outputs = [*outputs, *torch.autograd.grad(outputs, leaves, [g.cuda() for g in grads])]
        torch.cuda.current_stream().synchronize()
    check([x.detach().cpu() for x in outputs], inputs, grads, GPU_EXPF)
