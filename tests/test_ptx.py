"""What nvcc makes of the kernels, run on the CPU: see ptx.py. Results, and in one schedule all races there could be.

Oracles: those of the tests of the sources (test_wkv_cuda, test_wkv_fast, test_wkv6_cuda, test_dequant). The instrument
itself has to find what is planted, and to know what instructions do.
"""

import ctypes
import functools
import struct
import subprocess
from pathlib import Path

import numpy as np
import ptx
import pytest
import test_dequant
import test_wkv6_cuda
import test_wkv_cuda
import test_wkv_fast
import torch
from test_cuda_on_cpu import CPU_FLAGS, PLANTED, bind, lines_of, rotate
from test_wkv_cuda import NVCC, needs_cpp, needs_nvcc, one_torch_thread  # noqa: F401  (a fixture for this module too)

from wkv7_cuda import cuda_precise, dequant, fast, nvcc, wkv6_cuda

DTYPES = torch.float32, torch.bfloat16
pytestmark = [needs_cpp, needs_nvcc]


@functools.cache
def ptx_of(source: Path, *flags: str) -> str:
    flags = ["-std=c++17", "-O3", "-lineinfo", "-arch=sm_80", f"-I{nvcc.HEADERS[0].parent}", *flags]
    return subprocess.run([NVCC, "-ptx", *flags, source, "-o", "-"], check=True, timeout=120, text=True,
                          stdout=subprocess.PIPE).stdout  # fmt: skip


def compile_cpp(text: str, folder: Path) -> ctypes.CDLL:
    source = folder / "translated.cpp"
    source.write_text(text)
    flags = [*CPU_FLAGS, "-O0", "-fwrapv", "-Wno-unused-label"]
    subprocess.run(["g++", *flags, source, "-o", source.with_suffix(".so")], check=True, timeout=120)
    return ctypes.CDLL(str(source.with_suffix(".so")))


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """compiled(source, flags): the library of a .cu whose kernels are nvcc's PTX. Once each. (Those for fp16 are left
    out: they are those for fp32 but for how a number is read and written, and take a third of the time.)"""

    @functools.cache
    def library(source: Path, *flags: str) -> ctypes.CDLL:
        folder = tmp_path_factory.mktemp(source.stem)
        return compile_cpp(ptx.of_ptx(ptx_of(source, *flags), source, without="__half"), folder)

    return library


# ---------------------------------------------------------------------------------------------------- the kernels


@pytest.mark.parametrize("plan", test_wkv_fast.PLANS)
@pytest.mark.parametrize("time, regime", [(1, "random"), (33, "equal keys"), (100, "random")])
def test_wkv7_fast(compiled, plan, time, regime):
    library = fast.bind(compiled(fast.SOURCE, *fast.FLAGS))
    inputs, grads = test_wkv_fast.problem(time, regime)
    outputs = test_wkv_fast.by_kernels(fast.kernels(lambda device: library, test_wkv_fast.PLANS[plan]), inputs, grads)
    test_wkv_fast.check(outputs, inputs, grads, regime)


@pytest.mark.parametrize("dtype", DTYPES)
def test_wkv7_precise(compiled, dtype):
    library = cuda_precise.bind(compiled(cuda_precise.SOURCE))
    inputs, grads = test_wkv_cuda.problem(1, 20, dtype)
    test_wkv_cuda.check(test_wkv_cuda.by_kernels(cuda_precise.kernels(lambda device: library), inputs, grads),
                        inputs, grads)  # fmt: skip


@pytest.mark.parametrize("plan, dtype", [*zip(test_wkv6_cuda.PLANS, DTYPES, strict=True)])
def test_wkv6(compiled, plan, dtype):
    library = wkv6_cuda.bind(compiled(wkv6_cuda.SOURCE))
    inputs, grads = test_wkv6_cuda.problem(70, dtype)
    kernels = wkv6_cuda.kernels(lambda device: library, test_wkv6_cuda.PLANS[plan])
    test_wkv6_cuda.check(test_wkv6_cuda.by_kernels(kernels, inputs, grads), inputs, grads)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quant", test_dequant.PLAIN)
def test_dequantising(compiled, quant, dtype):
    library = dequant.bind(compiled(dequant.SOURCE))
    for n in (1, 67, 4096, 6001):
        test_dequant.check(library, quant, test_dequant.parts_of(quant, n), n, dtype)


def test_tiles_are_stored_8_or_16_bytes_at_a_time():
    for source, flags in ((cuda_precise.SOURCE, ()), (wkv6_cuda.SOURCE, ()), (fast.SOURCE, fast.FLAGS)):
        text = ptx_of(source, *flags)
        assert ".v2.u16" not in text and text.count("st.global.wb.v4.u32") + text.count("st.global.v4.u32") >= 8


def traced(call, file: Path, monkeypatch) -> np.ndarray:
    """The accesses of all launches that call() makes. (The next launch closes the file.)"""
    monkeypatch.setenv("PTX_TRACE", str(file))
    call()
    monkeypatch.delenv("PTX_TRACE")
    call()
    return np.fromfile(file, ptx.TRACED)


def test_memory_is_used_well(compiled, tmp_path, monkeypatch):
    """No bank of shared memory is waited for, but by a few accesses; of global memory whole sectors are read and
    written."""
    tokens, quantised = test_wkv_fast.problem(64, heads=1), test_dequant.parts_of("nf4", 16384)

    def walk(library, kernels):
        forward, backward = kernels.kernels(lambda device: kernels.bind(library), lambda *sizes: 1)
        (inputs, grads) = tokens if kernels is fast else test_wkv6_cuda.problem(64, torch.bfloat16, regimes=["random"])
        backward(*inputs, forward(*inputs, True)[2], *grads)

    for i, (source, flags, call, shared, sectors) in enumerate([
        (fast.SOURCE, fast.FLAGS, lambda library: walk(library, fast), 1.02, 1.05),
        (wkv6_cuda.SOURCE, (), lambda library: walk(library, wkv6_cuda), 1.08, 1.1),
        (dequant.SOURCE, (), lambda library: test_dequant.check(dequant.bind(library), "nf4", quantised, 16384,
                                                                torch.bfloat16), 1.0, 1.0),
    ]):  # fmt: skip
        library = compiled(source, *flags)
        trace = traced(lambda call=call, library=library: call(library), tmp_path / f"{i}", monkeypatch)
        for space, bar in ((ptx.SHARED, shared), (ptx.GLOBAL, sectors)):
            found = ptx.cost(trace, space)
            print(source.name, space, found)
            assert found and all(spent <= bar * least for spent, least in found.values()), (source.name, space, found)


# ---------------------------------------------------------------------------------------------------- the instrument


def test_cost():
    """Lanes 0..31 at 4 bytes each: side by side, all at one word, every second word, in one bank; 16 bytes each."""
    lanes = np.arange(32)
    for addresses, size, wavefronts, sectors in ((4 * lanes, 4, (1, 1), (4, 4)), (0 * lanes, 4, (1, 1), (1, 4)),
                                                 (8 * lanes, 4, (2, 1), (8, 4)), (128 * lanes, 4, (32, 1), (32, 4)),
                                                 (16 * lanes, 16, (4, 4), (16, 16))):  # fmt: skip
        for space, expected in ((ptx.SHARED, wavefronts), (ptx.GLOBAL, sectors)):
            trace = np.zeros(32, ptx.TRACED)
            trace["thread"], trace["address"], trace["size"], trace["space"] = lanes, addresses, size, space
            assert ptx.cost(trace, space) == {0: expected}


@pytest.mark.parametrize("bug, found", [
    (0, "no error"),
    (1, r"a write by thread 1 at planted.cu:\d+ .* races with a read by thread 0 at planted.cu:\d+ .* of byte 4: .*"),
    (2, r"a write by thread 1 at planted.cu:\d+ .* races with a read by thread 0 at planted.cu:\d+ .* of byte 4: .*"),
    (3, r"no thread can go on: threads 0-6 wait in bar.sync .*"),
    (4, r"no thread can go on: .*threads 5 have returned.*"),
    (6, r"4 bytes at address 0x1100 are not in shared memory .*"),
])  # fmt: skip
def test_planted_bugs_are_found_in_one_schedule(compiled, bug, found):
    y, expected, code, text = rotate(bind_planted(compiled), bug)
    assert code == (719 if bug else 0) and torch.equal(y, expected) == (bug == 0)
    assert ptx.re.fullmatch(rf"(block \(0,0,0\): )?{found}", text)


@pytest.mark.parametrize("bug, found", [
    (0, "no error"),
    (1, r"a read by warp 0 at device.cuh:\d+, called at planted.cu:{ldmatrix} .* races with a copy by thread .*"),
    (2, r"a read by warp 0 at device.cuh:\d+, called at planted.cu:{ldmatrix} .* races with a copy by thread .*"),
    (3, r"16 bytes at address 0x1[0-9a-f]+2 are not aligned .*"),
    (4, r"a write by thread 0 at planted.cu:\d+ .* races with a copy by thread 5 at device.cuh:.*"),
])  # fmt: skip
def test_planted_bugs_of_tensor_cores(compiled, bug, found):
    library = bind_planted(compiled)
    a, b, c = torch.randn(16, 16).bfloat16(), torch.randn(8, 16).bfloat16(), torch.empty(16, 8)
    code = library.product(a.data_ptr(), b.data_ptr(), c.data_ptr(), bug)
    found = found.replace("{ldmatrix}", str(lines_of(r"ldmatrix\(left")[0]))
    assert ptx.re.fullmatch(rf"(block \(0,0,0\): )?{found}", library.text(code).decode())
    assert bug or torch.allclose(c, a.float() @ b.float().T, atol=1e-5)


def bind_planted(compiled) -> ctypes.CDLL:
    compiled(PLANTED)
    return bind(Path(compiled(PLANTED)._name))


SUBNORMAL = 2.0**-140
INSTRUCTIONS = [  # operation, operands, result; an operand with a point is a float's bits
    ("prmt.b32", [0x33221100, 0x77665544, 0x6542], 0x66554422), ("prmt.b32", [0x80, 0, 0x8], 0x808080ff),
    ("bfi.b32", [0b111, 0xff00, 4, 2], 0xff30), ("bfi.b32", [0xabcd1234, 5, 0, 32], 0xabcd1234),
    ("shl.b32", [3, 31], 1 << 31), ("shl.b32", [3, 32], 0), ("shr.u32", [1 << 31, 31], 1),
    ("shr.u32", [1 << 31, 40], 0), ("shr.s32", [1 << 31, 40], 2**32 - 1), ("not.b32", [5], 2**32 - 6),
    ("mad.lo.s32", [2**31, 3, 7], 2**31 + 7), ("min.s32", [2**32 - 1, 1], 2**32 - 1), ("max.s32", [2**32 - 1, 1], 1),
    ("neg.s32", [1], 2**32 - 1),
    ("add.rn.f32", [0.1, 0.2], 0.1 + 0.2), ("fma.rn.f32", [3.0, 5.0, 2.0**-30], 15.0),
    ("fma.rm.f32", [3.0, 5.0, -(2.0**-30)], 15.0 - 2.0**-20), ("rcp.rn.f32", [4.0], 0.25),
    ("ex2.approx.f32", [-3.0], 0.125), ("ex2.approx.ftz.f32", [-140.0], 0.0),
    ("add.ftz.f32", [2 * SUBNORMAL, 1.0], 1.0), ("mul.ftz.f32", [SUBNORMAL, 2.0**100], 0.0),
    ("ex2.approx.f32", [-140.0], SUBNORMAL),
    ("min.f32", [float("nan"), 2.0], 2.0), ("max.s32", [7, 2**32 - 7], 7), ("bfi.b32", [7, 0xff00, 40, 2], 0xff00),
    ("fma.rm.f32", [1.0, 2.0**-60, 1.0], 1.0), ("fma.rm.f32", [1.0, -(2.0**-60), 1.0], 1.0 - 2.0**-24),
    ("cvt.ftz.sat.f32.f32", [1.5], 1.0), ("div.approx.f32", [1.0, 4.0], 0.25),
    ("div.approx.f32", [2.0**126, 2.0**127], 0.0),
    ("cvt.sat.f32.f32", [1.5], 1.0), ("cvt.sat.f32.f32", [-1.5], 0.0), ("cvt.rn.bf16x2.f32", [1.0, 2.0], 0x3f804000),
]  # fmt: skip


def bits(x: float) -> int:
    return struct.unpack("I", struct.pack("f", x))[0] if isinstance(x, float) else x


def test_instructions(tmp_path):
    """Each by the PTX ISA's words, on registers: a kernel written here, with which nvcc has nothing to do."""
    lines = []
    for i, (operation, operands, expected) in enumerate(INSTRUCTIONS):
        names = [f"%{'f' if isinstance(x, float) else 'r'}{n}" for n, x in enumerate(operands)]
        target = "%f4" if isinstance(expected, float) else "%r4"
        lines += [f"ld.global.b32 {name}, [%rd0+{4 * n}];" for n, name in enumerate(names)]
        lines += [f"add.s64 %rd0, %rd0, {4 * len(operands)};"]
        lines += [f"{operation} {target}, {', '.join(names)};", f"st.global.b32 [%rd1+{4 * i}], {target};"]
    registers = [".reg .f32 %f<5>;", ".reg .b32 %r<5>;", ".reg .b64 %rd<2>;"]
    loads = [f"ld.param.u64 %rd{n}, [_Z5probePKjPj_param_{n}];" for n in range(2)]
    text = "\n".join([".entry _Z5probePKjPj(", ")", "{", *registers, *loads, *lines, "ret;", "}", ""])
    (source := tmp_path / "probe.cu").write_text(
        '#include "device.cuh"\n__global__ void probe(const unsigned*, unsigned*) {}\n'
        'extern "C" int run(const unsigned* x, unsigned* y) { return launch(probe, 1, 1, 0, nullptr, x, y); }\n'
    )
    library = compile_cpp(ptx.of_ptx(text, source), tmp_path)
    given = [bits(x) for _, operands, _ in INSTRUCTIONS for x in operands]
    x, y = (ctypes.c_uint32 * len(given))(*given), (ctypes.c_uint32 * len(INSTRUCTIONS))()
    assert library.run(x, y) == 0
    for (operation, operands, expected), found in zip(INSTRUCTIONS, y, strict=True):
        assert found == bits(expected), (operation, operands, hex(found))


@pytest.mark.parametrize("line", [
    "vote.sync.any.pred %p1, %p2, -1;", "add.rm.f32 %f1, %f2, %f3;", "mov.b64 {%r1, %r2}, %rd1;", "bar.sync 1;",
    "setp.lt.and.f32 %p1, %f1, %f2, %p2;", "cvt.rz.bf16.f32 %rs1, %f1;", "bfi.b64 %rd1, %rd2, %rd3, 1, 2;",
    "ld.volatile.global.u32 %r1, [%rd1];", "shfl.sync.up.b32 %r1|%p1, %r2, 1, 31, -1;",
])  # fmt: skip
def test_what_is_not_known_is_an_error(line, tmp_path):
    with pytest.raises(ValueError, match=f"PTX line 5: {ptx.re.escape(line)}"):
        ptx.of_ptx(f".entry _Z5probePKjPj(\n)\n{{\n.reg .b32 %r<2>;\n{line}\n}}\n", tmp_path / "probe.cu")
