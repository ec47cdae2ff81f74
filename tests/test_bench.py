"""The benchmark's own parts: its sequential kernel is right, its rows are kept, its commands know what to do."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_cuda_on_cpu import CPU_FLAGS, SHADOW
from test_wkv_cuda import NVCC, by_loop, needs_cpp, needs_nvcc, one_torch_thread  # noqa: F401

from wkv7_cuda import build

BENCH = Path(__file__).resolve().parent.parent / "bench"
sys.path.insert(0, str(BENCH))
import sequential  # noqa: E402

# ---------------------------------------------------------------------------------------------------- the kernel


@pytest.fixture(scope="module")
def on_cpu():
    headers = [*sequential.HEADERS, *sorted(SHADOW.glob("*.h"))]
    return sequential.operator(sequential.bind(
        build.load("wkv7_sequential_on_cpu", sequential.SOURCE, "g++", CPU_FLAGS, headers)))  # fmt: skip


def problem(time: int, dtype: torch.dtype, heads: int = 3):
    """r w k v a b and dy; the heads' decays are ordinary, near 1, at the floor (which stepping back bears worst)."""
    draw = torch.Generator().manual_seed(time)
    r, w, k, v, u, eta, dy = (torch.randn(2, time, heads, 64, generator=draw) for _ in range(7))
    w[:, :, 1], w[:, :, 2] = w[:, :, 1] - 6, 20
    kappa, eta = torch.nn.functional.normalize(u, dim=-1), eta.sigmoid()
    return [x.to(dtype) for x in (r, w, k * eta, v, -kappa, kappa * eta)], dy.to(dtype)


@needs_cpp
@pytest.mark.parametrize(("dtype", "bars"), [(torch.float32, (3e-5, 2e-6, 1e-3)), (torch.bfloat16, (3e-3,) * 3)])
@pytest.mark.parametrize("time", [16, 48])
def test_the_sequential_kernel(on_cpu, time, dtype, bars, monkeypatch):
    inputs, dy = problem(time, dtype)
    zero = torch.zeros(2, 3, 64, 64)
    exact = by_loop([*inputs, zero], [dy, zero], torch.float64)
    leaves = [x.requires_grad_() for x in inputs]
    results = []
    for order in ("0", "1", "2", "3"):
        monkeypatch.setenv("CUDA_CPU_ORDER", order)
        y, _ = on_cpu(*leaves, zero)
        results.append([y.detach(), *torch.autograd.grad(y, leaves, dy)])
        assert all(x.equal(first) for x, first in zip(results[-1], results[0], strict=True))
    names = ("y", "dr", "dw", "dk", "dv", "da", "db")
    for name, out, e in zip(names, results[0], [exact[0], *exact[2:8]], strict=True):
        for head, bar in enumerate(bars):
            difference, size = (out.double() - e)[:, :, head].norm(), e[:, :, head].norm()
            assert difference < bar * size, (name, head, difference / size)
    with torch.no_grad():
        assert on_cpu(*leaves, zero)[0].equal(results[0][0])


@needs_nvcc
def test_nvcc_compiles_it_and_nothing_spills(tmp_path):
    archs = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ("80", "90a", "120")]
    run = subprocess.run(
        [NVCC, *sequential.FLAGS, *archs, f"-I{sequential.HEADERS[0].parent}", "--threads", "2", "-Xptxas", "-v",
         sequential.SOURCE, "-o", tmp_path / "sequential.so"], capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    spills = re.findall(r"(\d+) bytes (?:spill|stack)", run.stdout + run.stderr)
    assert spills and set(spills) == {"0"}
