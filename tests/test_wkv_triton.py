"""The `triton` operator without a GPU: its kernels run in Triton's interpreter, and compile for GPUs that are not here.

Oracle: wkv7_ref in float64. The interpreter needs a process of its own, so `test_in_the_interpreter` starts pytest once
more; what that runs is marked INTERPRETED here and in test_wkv.py.
"""

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_wkv import FLOOR, NAMES, error, gpu, make, oracle, run
from triton_interpreter import INTERPRETED

import wkv7_cuda
from pissa_rwkv import wkv7_ref
from wkv7_cuda import chunk, op
from wkv7_cuda import triton as binding

each_device = pytest.mark.parametrize(
    "device", [pytest.param("cpu", marks=INTERPRETED, id="interpreted"), pytest.param("cuda", marks=gpu, id="gpu")]
)


def test_in_the_interpreter():
    """The tests marked INTERPRETED, all of them and none skipped."""
    here, one_thread = Path(__file__).parent, {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", "interpreted", "--no-header",
         here / "test_wkv.py", here / "test_wkv_triton.py"],
        cwd=here.parent, env={**os.environ, "TRITON_INTERPRET": "1", **one_thread},
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0 and "skipped" not in done.stdout.splitlines()[-1], done.stdout + done.stderr


@pytest.mark.parametrize("T", [15, 16, 17, 33, 63, 64, 100])
@each_device
def test_lengths_in_float32(device, T):
    """test_wkv.py's rule at every place in a chunk."""
    exact, plain = (oracle(1, T, 1, "random", dtype) for dtype in (torch.float64, torch.float32))
    found = run(wkv7_cuda.load("triton"), *make(1, T, 1, "random", torch.float32, device))
    for name, x, p, e in zip(NAMES, found, plain, exact, strict=True):
        assert error(x, e) <= 2 * min(error(p, e), 1e-6) + FLOOR, name


def half(regime, dtype, device, T, logits=None):
    """Errors of the operator and, as a measure, of rounding its inputs: against float64 on the same or unrounded."""
    inputs, dy, dstate = make(1, T, 1, regime)
    if logits is not None:
        inputs[1] = logits(inputs[1].detach()).requires_grad_()
    rounded = [x.detach().to(dtype) for x in inputs[:6]] + [inputs[6].detach().float()]
    wide = [x.double().requires_grad_() for x in rounded]
    exact = run(wkv7_ref, wide, dy.to(dtype).double(), dstate)
    unrounded = run(wkv7_ref, inputs, dy, dstate)
    found = run(
        wkv7_cuda.load("triton"), [x.to(device).requires_grad_() for x in rounded], dy.to(device, dtype),
        dstate.float().to(device),
    )  # fmt: skip
    assert [x.dtype for x in found] == [dtype, torch.float32, *[dtype] * 6, torch.float32]
    return [(name, error(x, e), error(e, u)) for name, x, e, u in
            zip(NAMES, found, exact, unrounded, strict=True)]  # fmt: skip


@pytest.mark.parametrize(
    "regime,T", [("random", 1), ("random", 33), ("random", 65), ("fast", 65), ("slow", 65), ("zero", 33)]
)
@each_device
def test_bfloat16(device, regime, T):
    """Less than 5e-3 in y and the state, 1e-2 in gradients: about what rounding the inputs to bfloat16 has cost."""
    for name, found, _ in half(regime, torch.bfloat16, device, T):
        assert found < (5e-3 if name in ("y", "state_T") else 1e-2), name


@pytest.mark.parametrize("T", [33, 100])
@each_device
def test_bfloat16_with_equal_keys(device, T):
    """Ill-conditioned. The bar is twice what rounding the inputs costs, or that of the other regimes if it is higher.
    Three gradients that pass through two rounded triangular products miss it (db by 3.6 times rounding; da and dv only
    while T is short), as the error model of an all-bfloat16 chunk says they must: for these it is a fixed number."""
    for name, found, rounding in half("equal", torch.bfloat16, device, T):
        bar = 2.5e-2 if name in ("dv", "da", "db") else max(2 * rounding, 5e-3 if name in ("y", "state_T") else 1e-2)
        assert found < bar, name


@each_device
def test_extreme_decays(device):
    """Logits to +-20 side by side."""
    for name, found, _ in half("random", torch.bfloat16, device, 65, lambda w: 20 * torch.tanh(3 * w)):
        assert found < (5e-3 if name in ("y", "state_T") else 1e-2), name


@pytest.mark.parametrize("regime", ["random", "slow", "equal"])
@each_device
def test_float16(device, regime):
    """Eight times closer than bfloat16, as it has three more bits; dw underflows where decays are near 1."""
    for name, found, _ in half(regime, torch.float16, device, 40):
        if (name, regime) != ("dw", "slow"):
            assert found < (2.5e-2 if regime == "equal" else 1e-2 if name[0] == "d" else 5e-3) / 8, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@each_device
def test_outputs_are_fully_written_and_only_they(device, dtype):
    """New tensors start as NaN and none is left: not in what is saved, not after the last token's row."""
    inputs, dy, dstate = make(1, 19, 2, dtype=dtype, device=device)
    inputs = [x.detach() for x in inputs]
    wkv7_cuda.load("triton")
    from wkv7_cuda import wkv7_triton

    forward, backward = binding.kernels(wkv7_triton)
    torch.use_deterministic_algorithms(True)  # with this, PyTorch fills what torch.empty returns
    try:
        assert torch.empty(1).isnan()
        outputs = forward(*inputs, True)
        outputs += tuple(backward(*inputs, outputs[2], dy, dstate))
    finally:
        torch.use_deterministic_algorithms(False)
    assert not any(x.isnan().any() for x in outputs)


# ------------------------------------------------------------------------ compiling for GPUs that are not here


class Recorder:
    """In the place of wkv7_triton: keeps what would be launched."""

    def __init__(self):
        self.launches = []

    def __getattr__(self, name):
        class Kernel:
            def __getitem__(_, grid):
                return lambda *args, **options: self.launches.append((name, args, options))

        return Kernel()


def compiled(target, dtype):
    """What the binding launches, compiled for a target: (name, kernel) of each."""
    from triton.compiler import ASTSource, compile

    from wkv7_cuda import wkv7_triton

    recorder, letters = Recorder(), {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
    inputs, dy, dstate = make(1, 70, 2, dtype=dtype)
    forward, backward = binding.kernels(recorder)
    saved = forward(*inputs, True)[2]
    backward(*inputs, saved, dy, dstate)
    for name, args, options in recorder.launches:
        function = getattr(wkv7_triton, name)
        known = dict(zip(function.arg_names, args, strict=False))
        signature = {key: letters[x.dtype] if isinstance(x, torch.Tensor) else "i32" for key, x in known.items()}
        constants = {key: options[key] for key in function.arg_names if key not in known}
        aligned = {(i,): [["tt.divisibility", 16]] for i, x in enumerate(args) if isinstance(x, torch.Tensor)}
        source = ASTSource(function, signature | dict.fromkeys(constants, "constexpr"), constants, aligned)
        yield name, compile(source, target, {key: x for key, x in options.items() if key not in constants})


@pytest.mark.parametrize("arch,dtype", [
    (80, torch.bfloat16), (90, torch.bfloat16), ("gfx942", torch.bfloat16), (80, torch.float32), (80, torch.float16),
    ("gfx942", torch.float32),
])  # fmt: skip
def test_compiles(arch, dtype, tmp_path, monkeypatch):
    """Every launch, for A100, H100 and MI300: fits 64 KB of shared memory (with fp32 operands the 99 KB that NVIDIA's
    smallest have); in bfloat16 on tensor cores and, on NVIDIA's, without a spilled register."""
    from triton import knobs
    from triton.backends.compiler import GPUTarget

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    nvidia = arch != "gfx942"
    for name, kernel in compiled(GPUTarget(*("cuda", arch, 32) if nvidia else ("hip", arch, 64)), dtype):
        assert kernel.metadata.shared <= (99 if nvidia and dtype != torch.bfloat16 else 64) * 1024, name
        if nvidia:
            (tmp_path / "cubin").write_bytes(kernel.asm["cubin"])
            usage = subprocess.run([knobs.nvidia.cuobjdump.path, "-res-usage", tmp_path / "cubin"],
                                   capture_output=True, text=True, check=True).stdout  # fmt: skip
            assert dtype != torch.bfloat16 or re.search(r" STACK:0 .* LOCAL:0 ", usage), (name, usage)
        assert dtype != torch.bfloat16 or re.search("mma|mfma", kernel.asm["ptx" if nvidia else "amdgcn"]), name


def test_every_launch_says_whether_products_and_sums_are_fused():
    """Triton's own default differs from version to version."""
    inputs, dy, dstate = make(1, 40, 1, dtype=torch.bfloat16)
    forward, backward = binding.kernels(recorder := Recorder())
    backward(*inputs, forward(*inputs, True)[2], dy, dstate)
    assert [options["enable_fp_fusion"] for _, _, options in recorder.launches] == [True] * 6


def test_what_was_compiled_is_looked_at(pretend_gpu, monkeypatch):
    pretend_gpu()
    asked = []
    driver = SimpleNamespace(active=SimpleNamespace(get_current_target=lambda: None))
    monkeypatch.setattr("triton.runtime.driver", driver)
    monkeypatch.setattr(op, "verify", lambda name, *rest, dtypes: asked.append((name, rest[-1], dtypes)))
    monkeypatch.setattr(op, "register", lambda *_, device, **__: device)  # (once per process: others may have)
    assert binding.load() == "cuda"
    assert asked == [("triton", chunk.differs, (torch.bfloat16,))]


def test_without_a_gpu(monkeypatch):
    """One line that says what to do; likewise without the package."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(wkv7_cuda.BuildError, match="needs a GPU and torch sees none: check the driver .* --op chunk"):
        binding.load()
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(wkv7_cuda.BuildError, match="needs the package triton .*: pip install triton, on Linux, or use"):
        binding.load()
