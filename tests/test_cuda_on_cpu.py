"""The header that runs .cu files on a CPU, tested as an instrument: it must find the bugs planted in planted.cu."""

import ctypes
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
SHADOW = HERE / "cuda_on_cpu"
PLANTED = SHADOW / "planted.cu"
# `pattern` turns an uninitialised register variable into -1.7e38; g++ fuses no multiply-add without -march
CPU_FLAGS = [
    "-xc++", "-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-Wno-unused-function",
    "-ftrivial-auto-var-init=pattern", "-DCUDA_ON_CPU", f"-I{SHADOW}", f"-I{HERE.parent / 'wkv7_cuda'}",
    "-shared", "-fPIC",
]  # fmt: skip
SANITIZERS = ["-O0", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
ORDERS = [0, 1, 2, 3, 4]

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")


def compile_for_cpu(source: Path, folder: Path, *flags: str) -> Path:
    """The shared library made of a .cu file, in `folder`."""
    library = folder / f"{source.stem}.so"
    subprocess.run(["g++", *CPU_FLAGS, *flags, source, "-o", library], check=True, timeout=120)
    return library


def barriers(source: Path, folder: Path, monkeypatch, results, orders=(0, 1, 2, 3)) -> tuple[int, list[int]]:
    """How many barriers a .cu has; and those, by number, without which nothing is noticed: results(library), a tensor,
    is what it is with all of them, in every schedule."""
    pieces = source.read_text().split("__syncthreads();")
    text = "".join(f"{piece}if (removed != {i}) __syncthreads();" for i, piece in enumerate(pieces[:-1])) + pieces[-1]
    mutant = folder / "mutant.cu"
    mutant.write_text(f'static int removed = -1;\nextern "C" void remove_barrier(int i) {{ removed = i; }}\n{text}')
    library = ctypes.CDLL(str(compile_for_cpu(mutant, folder, "-O1")))

    def run(barrier: int, order: int) -> torch.Tensor:
        monkeypatch.setenv("CUDA_CPU_ORDER", str(order))
        library.remove_barrier(barrier)
        return results(library)

    right, count = run(-1, 0), len(pieces) - 1
    return count, [i for i in range(count) if all(run(i, order).equal(right) for order in orders)]


def run_sanitized(script: str, *arguments: object) -> subprocess.CompletedProcess:
    """Run a Python script in a process that may open libraries compiled with SANITIZERS."""
    asan = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)],
        env=os.environ | {"LD_PRELOAD": asan.stdout.strip(), "ASAN_OPTIONS": "detect_leaks=0", "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def bind(path: Path) -> ctypes.CDLL:
    library, floats = ctypes.CDLL(str(path)), ctypes.c_void_p
    library.rotate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int, floats, floats, ctypes.c_int]
    library.half_warp_sums.argtypes = [ctypes.c_int, floats, floats, ctypes.c_int]
    library.product.argtypes = [floats, floats, floats, ctypes.c_int]
    library.text.restype = ctypes.c_char_p
    return library


@pytest.fixture(scope="module", params=["asm", "ucontext"])
def planted(request, tmp_path_factory):
    """The library; with the assembler switch of fibers, and with the portable one."""
    flags = ["-DCUDA_CPU_UCONTEXT"] if request.param == "ucontext" else []
    return bind(compile_for_cpu(PLANTED, tmp_path_factory.mktemp(request.param), *flags))


def rotate(library, bug=0, threads=64, blocks=3):
    """What planted.cu's rotate makes of 0, 1, 2, ...; its expected result; the launch's code and text."""
    x = torch.arange(blocks * threads, dtype=torch.float32)
    y = torch.full_like(x, -1)
    code = library.rotate(blocks, threads, 4 * threads, x.data_ptr(), y.data_ptr(), bug)
    expected = x.view(blocks, threads).roll(-5, 1).flatten()
    return y, expected, code, library.text(code).decode()


def lines_of(pattern: str) -> list[int]:
    return [i for i, line in enumerate(PLANTED.read_text().splitlines(), 1) if re.search(pattern, line)]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("threads", [1, 33, 64, 1024])
def test_right_kernels_are_right_in_every_order(planted, monkeypatch, order, threads):
    monkeypatch.setenv("CUDA_CPU_ORDER", str(order))
    y, expected, code, text = rotate(planted, threads=threads)
    assert (code, text) == (0, "no error")
    assert torch.equal(y, expected)


@pytest.mark.parametrize("order", ORDERS)
def test_masked_shuffles(planted, monkeypatch, order):
    monkeypatch.setenv("CUDA_CPU_ORDER", str(order))
    x = torch.arange(96, dtype=torch.float32)
    y = torch.empty_like(x)
    assert planted.half_warp_sums(96, x.data_ptr(), y.data_ptr(), 0) == 0
    assert torch.equal(y, x.view(-1, 16).sum(1, keepdim=True).expand(-1, 16).flatten())


@pytest.mark.parametrize("order", ORDERS)
def test_reading_too_early_gives_nan(planted, monkeypatch, order):
    monkeypatch.setenv("CUDA_CPU_ORDER", str(order))
    y, _, code, _ = rotate(planted, 1)
    assert code == 0 and y.isnan().any()


def test_writing_too_early_is_seen_in_some_order(planted, monkeypatch):
    wrong = []
    for order in ORDERS:
        monkeypatch.setenv("CUDA_CPU_ORDER", str(order))
        y, expected, code, _ = rotate(planted, 2)
        assert code == 0
        wrong.append(not torch.equal(y, expected))
    assert any(wrong)


def test_unwritten_shared_memory_is_nan(planted):
    y, _, code, _ = rotate(planted, 5, blocks=1)
    # thread 2 reads the hole in each round, so 5 rounds later the NaN has come down to the threads 62, 63, 0, 1, 2
    assert code == 0
    assert y.isnan().nonzero().flatten().tolist() == [0, 1, 2, 62, 63]


def test_divergent_barrier(planted):
    *_, code, text = rotate(planted, 3)
    first, second, _ = lines_of(r"__syncthreads\(\)")
    assert code == 719
    assert text == (
        f"block (0,0,0): no thread can go on: threads 0-6 wait in __syncthreads (planted.cu:{first}); "
        f"threads 7-63 wait in __syncthreads (planted.cu:{second})"
    )


def test_return_before_a_barrier(planted):
    *_, code, text = rotate(planted, 4)
    assert code == 719
    assert "threads 0-4 wait in __syncthreads" in text and "threads 5 have returned; threads 6-63 wait" in text


@pytest.mark.parametrize(
    "bug, complaint",
    [
        (1, r"no thread can go on: threads 0-15 wait in __shfl_xor_sync \(.*\); threads 16-31 wait in __syncwarp"),
        (2, r"thread 20 is not in the mask it passes"),
        (3, r"lane 0 shuffles from a lane outside its mask"),
        (4, r"no thread can go on: .*threads 9 have returned"),
    ],
)
def test_warp_errors(planted, bug, complaint):
    x, y = torch.zeros(64), torch.zeros(64)
    code = planted.half_warp_sums(64, x.data_ptr(), y.data_ptr(), bug)
    assert code == 719 and re.search(complaint, planted.text(code).decode())
    assert planted.half_warp_sums(64, x.data_ptr(), y.data_ptr(), 0) == 0  # and the next launch starts afresh


def product(library, bug=0):
    """c of planted.cu's product, what it should be, and the launch's code and text."""
    draw = torch.Generator().manual_seed(0)
    a, b = (torch.randn(n, 16, generator=draw).bfloat16() for n in (16, 8))
    c = torch.full((16, 8), torch.nan)
    code = library.product(a.data_ptr(), b.data_ptr(), c.data_ptr(), bug)
    return c, a.float() @ b.float().T, code, library.text(code).decode()


@pytest.mark.parametrize("order", ORDERS)
def test_a_tensor_core_product(planted, monkeypatch, order):
    monkeypatch.setenv("CUDA_CPU_ORDER", str(order))
    c, expected, code, text = product(planted)
    assert (code, text) == (0, "no error")
    torch.testing.assert_close(c, expected, rtol=1e-6, atol=1e-5)


def test_errors_with_asynchronous_copies(planted):
    c, _, code, _ = product(planted, bug=1)  # read before they came
    assert code == 0 and c.isnan().all()
    _, _, code, text = product(planted, bug=2)
    assert code == 719 and "did not wait for its cp.async" in text
    _, _, code, text = product(planted, bug=3)
    assert code == 719 and "ldmatrix of a row not aligned to 16 bytes" in text


@pytest.mark.parametrize("blocks, threads, smem", [(0, 64, 0), (1, 0, 0), (1, 1025, 0), (1, 64, 99 * 1024 + 1)])
def test_impossible_launches(planted, blocks, threads, smem):
    code = planted.rotate(blocks, threads, smem, None, None, 0)
    assert code == 719
    assert planted.text(code).decode() == (
        f"launch of ({blocks},1,1) blocks of ({threads},1,1) threads with {smem} bytes of shared memory"
    )


@pytest.mark.parametrize("source", ["void f() { __shared__ float x[4]; }", "void f() { __ballot_sync(~0u, 1); }"])
def test_what_the_header_lacks_does_not_compile(source):
    program = f'#include "device.cuh"\n{source}\n'
    run = subprocess.run(
        ["g++", *CPU_FLAGS, "-fsyntax-only", "-"], input=program, capture_output=True, text=True, timeout=60
    )
    assert run.returncode and "error" in run.stderr


@pytest.mark.parametrize("name, dtype", [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_io_types_convert_as_torch_does(planted, name, dtype):
    bits = torch.arange(-(2**15), 2**15).to(torch.int16)  # all values
    values = torch.empty(2**16)
    getattr(planted, f"of_{name}")(*map(ctypes.c_void_p, (bits.data_ptr(), values.data_ptr())), 2**16)
    torch.testing.assert_close(values, bits.view(dtype).float(), rtol=0, atol=0, equal_nan=True)

    # every 4099th of all floats, and all ties: halfway between neighbours, whatever the format
    floats = torch.arange(-(2**31), 2**31, 4099).to(torch.int32).view(torch.float32)
    ordered = values[values.isfinite()].sort().values.double()
    x = torch.cat([floats, ((ordered[1:] + ordered[:-1]) / 2).float(), torch.tensor([65519.99, 65520.0, float("inf")])])
    x = x[~x.isnan()].contiguous()
    rounded = torch.empty(x.shape, dtype=dtype)
    getattr(planted, f"to_{name}")(*map(ctypes.c_void_p, (x.data_ptr(), rounded.data_ptr())), x.numel())
    assert rounded.view(torch.int16).equal(x.to(dtype).view(torch.int16))


def test_sanitizer_sees_one_float_too_far(tmp_path):
    library = compile_for_cpu(PLANTED, tmp_path, *SANITIZERS)
    script = """
        import ctypes, sys
        x, y = (ctypes.c_float * 64)(), (ctypes.c_float * 64)()
        print(ctypes.CDLL(sys.argv[1]).rotate(1, 64, 256, x, y, int(sys.argv[2])))
    """
    right, wrong = run_sanitized(script, library, 0), run_sanitized(script, library, 6)
    assert right.stdout == "0\n", right.stderr
    line = lines_of("ONE_TOO_FAR\\)")[0]
    assert wrong.returncode and "heap-buffer-overflow" in wrong.stderr and f"planted.cu:{line}" in wrong.stderr
