"""dequant.cu, the file that ships: executed on the CPU under tests/cuda_on_cpu, compiled by nvcc, run on a GPU if any.

Oracle: the readers of section 4, which test_quant.py compares with bitsandbytes. Every comparison is of bits.
"""

import importlib
import json
import re
import runpy
import shutil
import subprocess
from functools import partial
from pathlib import Path

import pytest
import torch
from test_cuda_on_cpu import CPU_FLAGS, HERE, SANITIZERS, SHADOW, compile_for_cpu, run_sanitized
from test_wkv_cuda import NVCC, needs_cpp, needs_nvcc
from torch._subclasses.fake_tensor import FakeTensorMode

import pissa_rwkv as P
from wkv7_cuda import build, dequant, nvcc

PLAIN = {"int8": P.read_int8, "nf4": P.read_nf4, "nf4dq": P.read_nf4dq}
SIZES = [1, 2, 15, 63, 64, 65, 2047, 2048, 2049, 4096, 4097, 4096 + 77, 8192, 20_001]  # a warp makes 2048, a block 4096
BITS = {4: torch.int32, 2: torch.int16}
each_dtype = pytest.mark.parametrize("dtype", nvcc.DTYPES, ids=str)
each_code = pytest.mark.parametrize("quant", PLAIN)


@pytest.fixture(autouse=True)
def no_number_in_what_is_not_written():
    """What torch.empty gives is NaN."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


def parts_of(quant, n, seed=0, size=1.0):
    W = size * torch.randn(1, n, generator=torch.Generator().manual_seed(seed))
    parts = P.QUANT[quant].hold(W, torch.float32)
    return {name: x.clone() for name, x in parts.items()}  # memory that ends where the part does: sanitizers see it


def by_kernel(library, quant, parts, shape, dtype):
    levels = P.levels_of_codes(parts["codes"].device)
    return dequant.dequantise(library, quant, [*parts.values()], levels, shape, dtype)


def check(library, quant, parts, n, dtype):
    found = by_kernel(library, quant, parts, (n,), dtype).cpu()
    wanted = PLAIN[quant]({name: part.cpu() for name, part in parts.items()}, torch.Size([n]), dtype)
    assert found.dtype == dtype and not found.isnan().any()
    assert torch.equal(found.view(BITS[dtype.itemsize]), wanted.view(BITS[dtype.itemsize]))


# ---------------------------------------------------------------------------------------------------- on the CPU


@pytest.fixture(scope="module")
def on_cpu():
    headers = [*nvcc.HEADERS, *sorted(SHADOW.glob("*.h"))]
    return dequant.bind(build.load("dequant_on_cpu", dequant.SOURCE, "g++", CPU_FLAGS, headers))


@needs_cpp
@each_code
@each_dtype
def test_any_size(on_cpu, quant, dtype):
    for n in SIZES:
        check(on_cpu, quant, parts_of(quant, n), n, dtype)


@needs_cpp
@each_dtype
def test_every_byte_under_scales_small_and_large(on_cpu, dtype):
    """Subnormal results, infinite ones in fp16, zeros."""
    codes, scales = torch.arange(256, dtype=torch.uint8).repeat(16), torch.logspace(-44, 6, 126)
    scales = torch.cat([torch.zeros(2), scales])
    check(on_cpu, "nf4", {"codes": codes, "absmax": scales}, 8192, dtype)
    scale = torch.cat([torch.zeros(1), torch.logspace(-7.5, 4.8, 63)]).half()
    check(on_cpu, "int8", {"codes": codes.view(torch.int8), "scale": scale}, 4096, dtype)
    twice = {"codes": codes.repeat(8), "absmax_codes": torch.arange(256, dtype=torch.uint8).repeat(4)}
    twice |= {"absmax_max": torch.tensor([0.0, 1e-38, 0.37, 3e3]), "offset": torch.tensor(0.123)}
    check(on_cpu, "nf4dq", twice, 65536, dtype)


@needs_cpp
@each_code
def test_a_nan_stays_in_its_block(on_cpu, quant):
    parts = parts_of(quant, 300)
    parts[{"nf4dq": "offset"}.get(quant, [*parts][1])].view(-1)[-1] = torch.nan
    found = by_kernel(on_cpu, quant, parts, (300,), torch.bfloat16)
    wanted = PLAIN[quant](parts, torch.Size([300]), torch.bfloat16)
    assert found.isnan().any() and torch.allclose(found, wanted, rtol=0, atol=0, equal_nan=True)


@needs_cpp
@each_code
def test_the_same_bits_in_every_schedule(on_cpu, quant, monkeypatch):
    for order in (0, 1, 2, 3, 4):
        monkeypatch.setenv("CUDA_CPU_ORDER", str(order))
        check(on_cpu, quant, parts_of(quant, 9000), 9000, torch.bfloat16)


@needs_cpp
@each_code
def test_parts_that_start_inside_a_16_byte_unit(on_cpu, quant):
    parts = {name: torch.cat([x.view(-1)[:1], x.view(-1)])[1:] for name, x in parts_of(quant, 5000).items()}
    assert parts["codes"].data_ptr() % 16
    check(on_cpu, quant, parts, 5000, torch.float16)


@needs_cpp
@each_code
def test_parts_with_strides(on_cpu, quant):
    parts = {name: torch.stack([x, x], -1)[..., 0] for name, x in parts_of(quant, 5000).items()}
    assert not parts["codes"].is_contiguous()
    check(on_cpu, quant, parts, 5000, torch.bfloat16)


@needs_cpp
def test_the_barrier_is_needed(tmp_path, monkeypatch):
    text = dequant.SOURCE.read_text()
    assert text.count("__syncthreads();") == 1
    (mutant := tmp_path / "mutant.cu").write_text(text.replace("__syncthreads();", ""))
    library = dequant.bind(build.ctypes.CDLL(str(compile_for_cpu(mutant, tmp_path, "-O1"))))
    with pytest.raises(AssertionError):
        check(library, "nf4", parts_of("nf4", 4096), 4096, torch.bfloat16)


@needs_cpp
def test_sanitizers(tmp_path):
    library = compile_for_cpu(dequant.SOURCE, tmp_path, *SANITIZERS)
    script = """
        import ctypes, sys
        sys.path[:0] = sys.argv[2:]
        from test_dequant import PLAIN, check, dequant, nvcc, parts_of
        library = dequant.bind(ctypes.CDLL(sys.argv[1]))
        for quant in PLAIN:
            for dtype in nvcc.DTYPES:
                for n in (1, 67, 4096, 6001):
                    check(library, quant, parts_of(quant, n), n, dtype)
        print("clean")
    """
    run = run_sanitized(script, library, HERE, HERE.parent)
    assert run.stdout == "clean\n", run.stderr


# ---------------------------------------------------------------------------------------- as the reader of section 4


@needs_cpp
@each_code
def test_as_an_operator(on_cpu, quant):
    """As on a GPU, with the CPU in its place: real, under torch.compile, without values."""
    read = dequant.fused(quant, None, P.levels_of_codes, None, device="cpu", choose=lambda device: on_cpu)
    parts, shape = parts_of(quant, 35 * 99), torch.Size([35, 99])
    wanted = PLAIN[quant](parts, shape, torch.bfloat16)
    assert torch.equal(read(parts, shape, torch.bfloat16), wanted)
    op = getattr(torch.ops.pissa_rwkv, f"read_{quant}_cpu")
    torch.library.opcheck(op, ([*parts.values()], list(shape), torch.bfloat16))
    twice = torch.compile(lambda parts: 2 * read(parts, shape, torch.bfloat16), backend="aot_eager", fullgraph=True)
    assert torch.equal(twice(parts), 2 * wanted)
    with FakeTensorMode() as mode:
        fake = read({name: mode.from_tensor(x) for name, x in parts.items()}, shape, torch.bfloat16)
    assert (fake.shape, fake.dtype, fake.stride()) == (shape, torch.bfloat16, wanted.stride())


@each_code
def test_where_the_kernel_cannot_be_built_pytorch_reads_and_it_is_said_once(quant, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    monkeypatch.setattr(Path, "exists", lambda _: False)
    dequant.library_for.cache_clear()
    said = []
    choose = partial(dequant.library_for, say=said.append)
    read = dequant.fused(quant, PLAIN[quant], P.levels_of_codes, None, device="cpu", choose=choose)
    parts, shape = parts_of(quant, 100), torch.Size([10, 10])
    for _ in range(2):
        assert torch.equal(read(parts, shape, torch.float16), PLAIN[quant](parts, shape, torch.float16))
    assert len(said) == 1 and re.fullmatch(
        r"no kernel reads quantised matrices: dequant\.cu needs nvcc, .*: install .*; PyTorch does, .*",
        said[0])  # fmt: skip


def test_where_the_gpu_takes_no_launch_pytorch_reads(monkeypatch):
    class Refuses:
        def dequant(self, *arguments):
            return 35

        def dequant_error(self, code):
            return b"CUDA driver version is insufficient for CUDA runtime version"

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(dequant, "open_library", lambda *arguments: Refuses())
    dequant.library_for.cache_clear()
    said = []
    assert dequant.library_for(torch.device("cpu"), said.append) is None
    assert said == ["no kernel reads quantised matrices: int8: CUDA driver version is insufficient for CUDA runtime"
                    " version (CUDA error 35); PyTorch does, the same values more slowly"]
    dequant.library_for.cache_clear()


def test_a_full_gpu_is_said_and_no_other_reader_taken(monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(dequant, "open_library", full)
    dequant.library_for.cache_clear()
    with pytest.raises(torch.OutOfMemoryError):
        dequant.library_for(torch.device("cpu"), pytest.fail)


@each_code
def test_torch_compile_sees_the_op_wherever_the_parts_are(quant):
    """Rather than the long program of the plain reader."""
    called = []

    def backend(graph, inputs):
        called.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph

    parts, shape = parts_of(quant, 24 * 40), torch.Size([24, 40])
    read = torch.compile(lambda parts: P.QUANT[quant].read(parts, shape, torch.bfloat16), backend=backend)
    assert torch.equal(read(parts), PLAIN[quant](parts, shape, torch.bfloat16))
    assert [name for name in called if "read_" in name] == [f"pissa_rwkv.read_{quant}_cuda.default"]


@each_code
def test_off_the_gpu_the_plain_reader_is_called_and_nothing_is_built(quant, monkeypatch):
    monkeypatch.setattr(build, "load", None)
    for device in ("cpu", "meta"):
        frozen = P.FrozenLinear(torch.randn(24, 40, device=device), torch.bfloat16, quant)
        x = torch.randn(3, 40, dtype=torch.bfloat16, device=device, requires_grad=True)
        frozen(x).sum().backward()
        assert frozen.weight.device.type == x.grad.device.type == device


@each_code
def test_a_run_without_values_leaves_nothing_behind(quant):
    """Tables of levels made under FakeTensorMode hold no numbers: they are not kept, nor are kept ones used there."""
    for _ in range(2):
        with FakeTensorMode():
            frozen = P.FrozenLinear(torch.randn(24, 40), torch.bfloat16, quant)
            assert frozen(torch.randn(3, 40, dtype=torch.bfloat16)).shape == (3, 24)
        W = torch.randn(24, 40)
        assert P.QUANT[quant].through(W, torch.float32).sub(W).abs().max() < 1


@needs_cpp
def test_what_does_not_fit_is_refused_in_one_line(on_cpu):
    parts = parts_of("nf4", 100)
    with pytest.raises(ValueError, match=r"^nf4: absmax is 2 x torch.float32 on cpu; 130 weights need 3 x torch.fl"):
        by_kernel(on_cpu, "nf4", parts | {"codes": torch.zeros(65, dtype=torch.uint8)}, (130,), torch.bfloat16)
    with pytest.raises(ValueError, match=r"^int8: scale is .* 100 weights need 2 x torch.float16"):
        by_kernel(on_cpu, "int8", {"codes": torch.zeros(100, dtype=torch.int8), "scale": torch.ones(2)}, (100,),
                  torch.bfloat16)
    with pytest.raises(ValueError, match=r"^nf4: absmax is 3 x .* 100 weights need 2 x torch.float32"):
        by_kernel(on_cpu, "nf4", parts | {"absmax": torch.ones(3)}, (100,), torch.bfloat16)
    with pytest.raises(ValueError, match=r"^nf4: absmax is 2 x torch.float32 on meta; .* need .* on cpu"):
        by_kernel(None, "nf4", parts | {"absmax": parts["absmax"].to("meta")}, (100,), torch.bfloat16)
    with pytest.raises(ValueError, match=r"^nf4: cannot make torch.float64; choose from torch.float32, "):
        by_kernel(on_cpu, "nf4", parts, (100,), torch.float64)


def test_the_benchmark_without_a_gpu(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(HERE.parent / "bench"))
    record, file = importlib.import_module("record"), HERE.parent / "bench" / "dequant.py"
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["dequant.py", "--shapes", "64x96", "--dtypes", "float16"])
    with pytest.raises(SystemExit, match="^0$"):
        runpy.run_path(str(file), run_name="__main__")
    assert "no GPU here: these are PyTorch's readers on the CPU" in capsys.readouterr().out
    rows = json.loads((tmp_path / "dequant-cpu.json").read_text())
    assert [row["quant"] for row in rows] == [*PLAIN] and all(row["plain_us"] > 0 for row in rows)


# ---------------------------------------------------------------------------------------------------- nvcc


@needs_nvcc
def test_nvcc_compiles_and_nothing_spills(tmp_path):
    archs = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ("80", "90a", "120")]
    library = tmp_path / "dequant.so"
    run = subprocess.run(
        [NVCC, *nvcc.FLAGS, *archs, "--threads", "2", "-Xptxas", "-v", dequant.SOURCE, "-o", library],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    kernels = (run.stdout + run.stderr).split("Compiling entry function '")[1:]
    assert len(kernels) == 3 * 3 * 3  # architectures, formats, output types
    for kernel in kernels:
        arch, registers = re.search(r"for '(sm_\w+)'", kernel)[1], int(re.search(r"Used (\d+) registers", kernel)[1])
        assert set(re.findall(r"(\d+) bytes (?:spill|stack)", kernel)) == {"0"}, (arch, kernel)
        assert registers <= 48, (arch, kernel)  # of 65536: then at least 1344 threads are on a multiprocessor
    if not torch.cuda.is_available():  # it opens without a driver, and says why it cannot run
        with pytest.raises(RuntimeError, match=r"^nf4: .*driver.* \(CUDA error \d+\)$"):
            by_kernel(dequant.bind(build.ctypes.CDLL(str(library))), "nf4", parts_of("nf4", 9), (9,), torch.float32)


@needs_nvcc
def test_memory_is_reached_16_bytes_at_a_time(tmp_path):
    """All codes; and the results, but for the first store of each loop: its parts are joined by ptxas only."""
    ptx = tmp_path / "dequant.ptx"
    subprocess.run([NVCC, "-std=c++17", "-O3", "-ptx", "-arch=compute_80", dequant.SOURCE, "-o", ptx], check=True)
    kernels = ptx.read_text().split(".entry ")[1:]
    assert len(kernels) == 9
    for kernel in kernels:
        name = kernel.split("(")[0]
        assert "fma" not in kernel, name  # else absmax of nf4dq would be rounded once, not twice
        assert len(re.findall(r"ld\.global[\w.]*\.v4", kernel)) == (4 if "Int8" in name else 2), name
        assert len(re.findall(r"st\.global[\w.]*\.v4", kernel)) >= (15 if re.search("(Int8|Nf4|Twice)Ef", name) else 7)


# ---------------------------------------------------------------------------------------------------- on a GPU


@pytest.mark.gpu
@pytest.mark.skipif("not torch.cuda.is_available()", reason="no GPU")
@each_code
@each_dtype
def test_gpu(quant, dtype):
    library = dequant.library_for(torch.device("cuda", 0), say=print)
    for n in [*SIZES, 3_000_001]:
        check(library, quant, {name: x.cuda() for name, x in parts_of(quant, n).items()}, n, dtype)


@pytest.mark.gpu
@pytest.mark.skipif("not torch.cuda.is_available()", reason="no GPU")
@each_code
def test_gpu_in_a_frozen_layer(quant):
    """Forward and backward, compiled too, by the op and as PyTorch alone would have it."""
    frozen = P.FrozenLinear(torch.randn(640, 384, device="cuda"), torch.bfloat16, quant)
    wanted = PLAIN[quant](dict(frozen.named_buffers()), frozen.shape, frozen.dtype)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    assert torch.equal(frozen.weight, wanted)
    assert torch.cuda.max_memory_allocated() - before < 1.6 * wanted.nbytes  # W, and whether they are equal
    x = torch.randn(5, 384, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    for layer in (frozen, torch.compile(frozen, backend="aot_eager")):
        y = layer(x)
        dx, = torch.autograd.grad(y, x, torch.ones_like(y))
        assert torch.equal(y, x @ wanted.T) and torch.equal(dx, torch.ones_like(y) @ wanted)
