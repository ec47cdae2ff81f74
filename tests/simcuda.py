"""A GPU of sm_90 in a torch that was built without CUDA: simgpu.cpp under the name "cuda", torch.cuda as far as a
training run and the operators ask for it, and an nvcc that is g++ and the headers of cuda_on_cpu.

`open_device()`, once a process and for good. What a user types then runs unmodified, only more slowly. torch asks what
it was built with when it is imported, so the process begins once more, with the library already there.

    python tests/simcuda.py -q         the tests marked gpu, in a few minutes; what follows is pytest's
"""

import atexit
import contextlib
import ctypes
import functools
import importlib
import os
import shlex
import shutil
import sys
import tempfile
import types
from pathlib import Path

import pytest
import torch
from test_cuda_on_cpu import CPU_FLAGS
from test_graphs import Recorder
from torch.utils._pytree import tree_leaves

from wkv7_cuda import build

NVCC = """#!/bin/sh
test "$1" = --version && exec g++ --version
for x; do
  shift
  case $x in -O3 | -Xcompiler | -ftz=* | -arch=*) ;; *) set -- "$@" "$x" ;; esac
done
exec g++ {flags} "$@"
"""

waits = []  # what the host waited for
replays = []  # how often each graph was repeated
waited = ctypes.CFUNCTYPE(None, ctypes.c_char_p)(lambda why: waits.append(why.decode()))


def open_device() -> None:
    """torch knows a GPU from now on; BuildError without a compiler."""
    at = Path(torch.__file__).parent
    library = build.load("simcuda", Path(__file__).with_name("simgpu.cpp"), "c++", [
        "-std=c++20", "-O0", "-shared", "-fPIC", "-DAS_CUDA", f"-DTORCH={torch.__version__}", f"-I{at}/include",
        f"-I{at}/include/torch/csrc/api/include", f"-L{at}/lib", "-Wl,--no-as-needed", f"-Wl,-rpath,{at}/lib",
        "-ltorch_cpu", "-lc10"])
    preloaded = {"LD_PRELOAD": library._name, "TRITON_INTERPRET": "1"}
    if os.environ.get("LD_PRELOAD") != library._name:
        if torch.backends.cuda.is_built():
            sys.exit("no GPU is simulated: this torch is built with CUDA, whose place in it is taken")
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | preloaded)
    for name in ("triton.experimental.gluon", "triton_interpreter", "wkv7_cuda.wkv7_triton"):
        importlib.import_module(name)  # a kernel is Triton's interpreter's if that is on when it is defined
    for name in preloaded:
        del os.environ[name]  # else compilers load the library too, and the triton operator is one of the CPU
    library.open_device(waited)

    atexit.register(shutil.rmtree, folder := tempfile.mkdtemp())
    nvcc = Path(folder, "bin", "nvcc")
    nvcc.parent.mkdir()
    nvcc.write_text(NVCC.format(flags=shlex.join([*CPU_FLAGS, "-O1"])))
    nvcc.chmod(0o755)
    os.environ |= {"CUDA_HOME": folder, "TORCH_EXTENSIONS_DIR": folder}
    for name in os.environ.keys() & {"NVCC_CCBIN", "CUDAHOSTCXX", "CXX"}:
        del os.environ[name]

    def get_rng_state(device: object = None) -> torch.Tensor:
        state = torch.get_rng_state()
        library.get_rng(ctypes.c_void_p(state.data_ptr()))
        return state

    def set_rng_state(state: torch.Tensor, device: object = None) -> None:
        library.set_rng(ctypes.c_void_p(state.data_ptr()))

    held, most = (ctypes.c_size_t.in_dll(library, name) for name in ("held", "most"))
    stream = types.SimpleNamespace(cuda_stream=0, wait_stream=lambda other: None, synchronize=lambda: None)
    torch.compile = functools.partial(torch.compile, backend="aot_eager")  # inductor would write kernels for a GPU
    torch._C._cuda_getCurrentRawStream = lambda device: 0  # bitsandbytes asks when it is imported
    vars(torch.cuda).update(
        is_available=lambda: True, device_count=lambda: 1, current_device=lambda: 0, device=contextlib.nullcontext,
        _lazy_init=lambda: None, _is_in_bad_fork=lambda: False, get_device_capability=lambda device=None: (9, 0),
        get_device_properties=lambda device=None: types.SimpleNamespace(major=9, minor=0, multi_processor_count=132),
        is_bf16_supported=lambda including_emulation=True: True,
        memory_allocated=lambda device=None: held.value, max_memory_allocated=lambda device=None: most.value,
        reset_peak_memory_stats=lambda device=None: setattr(most, "value", held.value),
        get_rng_state=get_rng_state, set_rng_state=set_rng_state,
        manual_seed_all=lambda seed: set_rng_state(torch.Generator().manual_seed(seed).get_state()),
        Stream=lambda: stream, current_stream=lambda device=None: stream, stream=contextlib.nullcontext,
        graph_pool_handle=lambda: None, CUDAGraph=Graph, graph=capture)


class Graph(Recorder):
    """A recorded graph. What was written to while it was recorded is put back: a capture runs nothing."""

    def __init__(self):
        super().__init__()
        self.before, self.number = {}, len(replays)  # address -> memory, and its bytes
        replays.append(0)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for given, x in zip(func._schema.arguments, args, strict=False):
            for t in tree_leaves(x) if given.alias_info and given.alias_info.is_write else []:
                memory = t.untyped_storage()
                if (at := memory.data_ptr()) not in self.before:
                    self.before[at] = memory, ctypes.string_at(at, memory.nbytes())
        waits.clear()
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if waits:
            raise RuntimeError(f"operation not permitted when stream is capturing: {func} waits {waits[0]}")
        return out

    def __exit__(self, *error):
        super().__exit__(*error)
        for at, (_, was) in self.before.items():
            ctypes.memmove(at, was, len(was))

    def replay(self):
        replays[self.number] += 1
        super().replay()


def capture(graph: Graph, pool: object, stream: object, capture_error_mode: str) -> Graph:
    """As torch.cuda.graph: records what is done inside `with`."""
    return graph


class Skips:
    """A plugin of pytest: what such a GPU cannot run."""

    @staticmethod
    def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
        for item in items:
            if item.path.name == "test_wkv_fla.py":
                item.add_marker(pytest.mark.skip(reason="no GPU that runs fla's kernels: Triton's interpreter cannot"))


def run_tests(*arguments: str) -> int:
    """The tests marked gpu, on the device that is open -> pytest's exit status."""
    from triton.runtime import driver

    driver.set_active(types.SimpleNamespace(get_current_target=lambda: None))  # what the operator asks
    return pytest.main(["-m", "gpu", *arguments], [Skips()])


if __name__ == "__main__":
    open_device()
    sys.exit(run_tests(*sys.argv[1:]))
