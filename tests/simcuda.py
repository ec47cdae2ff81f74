"""A GPU of sm_90 in a torch that was built without CUDA: simgpu.cpp under the name "cuda", torch.cuda as far as a
training run and the operators ask for it, and an nvcc that is g++ and the headers of cuda_on_cpu.

`open_device(folder)`, once a process and for good. What a user types then runs unmodified, only more slowly. torch asks
what it was built with when it is imported, so the process begins once more, with the library already there.
"""

import contextlib
import ctypes
import os
import shlex
import sys
import types
from pathlib import Path

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


def open_device(folder: Path) -> None:
    """torch knows a GPU from now on. folder: for nvcc and what it builds; BuildError without a compiler."""
    at = Path(torch.__file__).parent
    library = build.load("simcuda", Path(__file__).with_name("simgpu.cpp"), "c++", [
        "-std=c++20", "-O0", "-shared", "-fPIC", "-DAS_CUDA", f"-DTORCH={torch.__version__}", f"-I{at}/include",
        f"-I{at}/include/torch/csrc/api/include", f"-L{at}/lib", "-Wl,--no-as-needed", f"-Wl,-rpath,{at}/lib",
        "-ltorch_cpu", "-lc10"])
    if "LD_PRELOAD" not in os.environ:
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | {"LD_PRELOAD": library._name})
    del os.environ["LD_PRELOAD"]  # of compilers it would be in the way
    library.open_device(waited)

    nvcc = folder / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(NVCC.format(flags=shlex.join([*CPU_FLAGS, "-O1"])))
    nvcc.chmod(0o755)
    os.environ |= {"CUDA_HOME": str(folder), "TORCH_EXTENSIONS_DIR": str(folder)}
    for name in os.environ.keys() & {"NVCC_CCBIN", "CUDAHOSTCXX", "CXX"}:
        del os.environ[name]

    def get_rng_state(device: object = None) -> torch.Tensor:
        state = torch.get_rng_state()
        library.get_rng(ctypes.c_void_p(state.data_ptr()))
        return state

    def set_rng_state(state: torch.Tensor, device: object = None) -> None:
        library.set_rng(ctypes.c_void_p(state.data_ptr()))

    stream = types.SimpleNamespace(cuda_stream=0, wait_stream=lambda other: None)
    vars(torch.cuda).update(
        is_available=lambda: True, device_count=lambda: 1, current_device=lambda: 0, device=contextlib.nullcontext,
        _lazy_init=lambda: None, _is_in_bad_fork=lambda: False, get_device_capability=lambda device=None: (9, 0),
        is_bf16_supported=lambda including_emulation=True: True,
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
