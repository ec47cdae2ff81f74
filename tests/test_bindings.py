"""What stands between an operator and its .cu file: which library is opened and looked at, what kernels are passed.

No kernel runs here: what they compute is in test_wkv_cuda.py, test_wkv_fast.py and test_wkv6_cuda.py.
"""

import math
import re
from pathlib import Path

import pytest
import test_wkv6_cuda
import test_wkv_cuda
import test_wkv_fast
import torch
from test_wkv_cuda import one_torch_thread  # noqa: F401  (a fixture for this module too)

from wkv7_cuda import build, chunk, cpu, cuda, cuda_precise, fast, nvcc, op, wkv6_chunk, wkv6_cuda

PROBLEMS = {  # module -> inputs and gradients; of what is cut into segments, a batch of 2 of 3 heads, 4 chunks each
    cuda_precise: lambda: test_wkv_cuda.problem(2, 100, torch.bfloat16),
    fast: lambda: test_wkv_fast.problem(100, batch=2, heads=3),
    wkv6_cuda: lambda: test_wkv6_cuda.problem(100, torch.bfloat16, 2, ["random"] * 3),
}
LOADS = {  # module -> the modules with its sources, what is looked at with it
    cuda: ([cuda_precise, fast], ("cuda", chunk.differs)),
    cuda_precise: ([cuda_precise], ("cuda_precise", chunk.differs)),
    wkv6_cuda: ([wkv6_cuda], ("cuda", wkv6_chunk.differs)),
}


def name(x):
    return x.__name__.removeprefix("wkv7_cuda.") if hasattr(x, "__name__") else None


# ---------------------------------------------------------------------------------------------- what kernels are passed


def shifted(x, size):
    """A copy that starts `size` bytes after a 16-byte unit's start."""
    n = size // x.itemsize
    return torch.cat([x.flatten()[:n], x.flatten()])[n:].view(x.shape)


@pytest.mark.parametrize("size", [4, 8])
@pytest.mark.parametrize("module", PROBLEMS, ids=name)
def test_kernels_get_whole_16_byte_units_wherever_tensors_start(module, size, monkeypatch):
    """On a CPU nothing else tells: there any address can be read."""
    passed = []

    def call(library, name, r, sizes, *arguments):
        passed.extend(x for a in arguments if a is not None for x in (a if isinstance(a, list) else [a]))

    monkeypatch.setattr(module, "call", call)
    forward, backward = module.kernels(lambda device: None)
    inputs, grads = ([shifted(x, size) for x in tensors] for tensors in PROBLEMS[module]())
    assert all(x.data_ptr() % 16 for x in (*inputs, *grads))
    _, _, saved = forward(*inputs, True)
    backward(*inputs, shifted(saved, size), *grads)
    assert len(passed) > 20 and not any(x.data_ptr() % 16 for x in passed)


@pytest.mark.parametrize("module", [fast, wkv6_cuda], ids=name)
def test_segments_are_planned_by_the_heads_of_all_rows(module, monkeypatch):
    planned = []
    monkeypatch.setattr(module, "call", lambda *arguments: None)
    forward, backward = module.kernels(lambda device: None, lambda *sizes: planned.append(sizes) or 2)
    inputs, grads = PROBLEMS[module]()
    backward(*inputs, forward(*inputs, True)[2], *grads)
    assert planned == [(6, 4, fast.MULTIPROCESSORS)] * 2


# ------------------------------------------------------------------------------------ which library it is, and the look


@pytest.mark.parametrize("module", LOADS, ids=name)
def test_load_compiles_what_calls_use_and_looks_at_it(module, pretend_gpu, monkeypatch):
    pretend_gpu((8, 0))
    (parts, look), did = LOADS[module], []
    for each in {module, *parts}:
        monkeypatch.setattr(each, "open_library", lambda *arguments: did.append(arguments))
    monkeypatch.setattr(op, "verify", lambda *arguments: did.append((arguments[0], arguments[-1])))
    assert module.load() is module.operator()
    used = [(part.SOURCE, part.bind, (8, 0), *(["-ftz=true"] if part is fast else [])) for part in parts]
    assert did == [*used, look]
    did.clear()
    for part in parts:
        part.library(torch.device("cuda", 0))
    assert did == used


def test_wkv6_needs_a_gpu_of_sm_80(pretend_gpu):
    pretend_gpu((7, 5))
    with pytest.raises(build.BuildError, match="of wkv6 needs a GPU of sm_80, not sm_75: .* --op chunk"):
        wkv6_cuda.load()


def test_nvcc_gets_the_flags_of_all_of_the_machine_and_of_the_source(monkeypatch):
    asked = []
    monkeypatch.setattr(build, "load", lambda *arguments: asked.extend(arguments))
    monkeypatch.setattr(nvcc, "find_nvcc", lambda: Path("nvcc"))
    monkeypatch.setattr(nvcc, "of_this_machine", lambda nvcc: ["-Lthere"])
    nvcc.open_library.__wrapped__(fast.SOURCE, lambda library: library, (9, 0), "-ftz=true")
    flags = [*nvcc.FLAGS, "-Lthere", "-ftz=true", "-arch=sm_90"]
    assert asked == ["wkv7_fast_sm_90", fast.SOURCE, "nvcc", flags, nvcc.HEADERS]


@pytest.mark.parametrize("sources, headers", [("*.cu*", nvcc.HEADERS), ("*.cpp", [cpu.HEADER])])
def test_whatever_a_source_includes_counts_for_its_key(sources, headers):
    folder = Path(build.__file__).parent
    texts = [path.read_text() for path in folder.glob(sources)]
    assert {folder / name for text in texts for name in re.findall(r'#include "(.*)"', text)} == {*headers}


@pytest.mark.parametrize("differs, reference, module", [
    (chunk.differs, chunk, fast), (wkv6_chunk.differs, wkv6_chunk, wkv6_cuda)], ids=name)  # fmt: skip
def test_the_look_takes_three_segments_the_last_one_short(differs, reference, module):
    shapes = []

    def forward(r, *rest):
        shapes.append(r.shape)
        return reference.forward(r, *rest)

    differs((forward, reference.backward), torch.float32, "cpu")
    ((batch, time, heads, _),) = shapes
    chunks = -(-time // module.L)
    length = fast.segment_chunks(batch * heads, chunks)
    assert chunks > 2 * length and chunks % length and time % module.L


@pytest.mark.parametrize("dtype, error", [(torch.float32, 2e-4), (torch.bfloat16, 0.06), (torch.float16, 0.06),
                                          (torch.bfloat16, math.nan)])  # fmt: skip
def test_an_error_that_no_rounding_explains_is_refused(dtype, error):
    with pytest.raises(build.BuildError, match=f"in {dtype} it is off by"):
        op.verify("cuda", None, None, lambda *_: error, dtypes=[dtype])


@pytest.mark.parametrize("reference", [chunk, wkv6_chunk], ids=name)
def test_the_look_has_numbers_where_a_model_is_made_without(reference):
    """`load_model` and the benchmarks load an operator while the default device is "meta"."""
    with torch.device("meta"):
        op.verify("cuda", reference.forward, reference.backward, reference.differs, "cpu", [torch.float32])


def test_a_full_gpu_is_no_fault_of_the_operator():
    def differs(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with pytest.raises(torch.OutOfMemoryError):
        op.verify("cuda", None, None, differs)
