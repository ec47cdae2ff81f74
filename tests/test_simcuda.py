"""A run on a GPU takes the GPU's operators, and computes with them: the shipped .cu files, built and chosen as on a
user's machine (simcuda.py). So that the tests marked gpu do not rot where there is none, one of each file runs too.
In a process of their own, the second half of this file: torch cannot forget a device."""

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import random_model
from test_cuda_on_cpu import HERE

import pissa_rwkv as P
from wkv7_cuda import op

COMMON = "--data_file data.txt --dataload get --rank 4 --ctx_len 24 --micro_bsz 2 --lr_init 1e-3"
RUNS = {  # on the GPU and, with `chunk` and the precision, on the CPU -> options, precision, how far losses may differ
    "x070": ("", "bf16", 1e-2),
    "x060": ("", "bf16", 1e-2),
    "x070, nf4": ("--quant nf4", "bf16", 1e-2),
    "x070, fp32": ("--precision fp32", "fp32", 1e-4),
    "x060, fp32": ("--precision fp32", "fp32", 1e-4),
    "x070, cuda_precise": ("--op cuda_precise --precision fp32", "fp32", 1e-4),
}
GRAPHS = {"x070, as ever": "", "x070, a graph": "--cuda_graph 1"}
OF_EACH_FILE = [  # (all of them: `python tests/simcuda.py`)
    "test_dequant.py::test_gpu_in_a_frozen_layer[nf4]", "test_gpu.py::test_losses_are_the_cpus[bf16-0.03-1]",
    "test_wkv.py::test_compiled_is_equal[cuda]", "test_wkv6_cuda.py::test_gpu[segments-17-dtype1]",
    "test_wkv_cuda.py::test_gpu_operator_on_another_stream", "test_wkv_fast.py::test_gpu[segments-17-random]",
    "test_wkv_triton.py::test_lengths_in_float32[gpu-17]",
]
LOOK = 'with torch.device("cpu"):'  # in op.verify


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Name of a run -> its losses, and what it says; of RUNS also those of the CPU's."""
    if torch.backends.cuda.is_built():
        pytest.skip("no GPU is simulated: this torch is built with CUDA, whose place in it is taken")
    if not shutil.which("g++") or not shutil.which("c++"):
        pytest.skip("no C++ compiler")
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    child = subprocess.run([sys.executable, __file__], cwd=tmp_path_factory.mktemp("simcuda"), env=env, text=True,
                           capture_output=True)
    assert child.returncode == 0, child.stderr[-3000:]
    return json.loads(child.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", RUNS)
def test_a_run_takes_the_gpus_operator(found, name):
    (losses, said), (of_cpu, _) = found[name]
    options, _, bar = RUNS[name]
    assert ("WKV operator: cuda\n" in said) == ("--op" not in options)
    assert "no WKV operator" not in said and "no kernel reads" not in said
    assert losses == pytest.approx(of_cpu, rel=bar) and len(losses) == 2


def test_a_look_without_numbers_is_seen(found):
    _, said = found["no numbers"]
    assert "no WKV operator cuda" in said and "WKV operator: cuda\n" not in said


def test_a_graph_is_recorded_and_repeated(found):
    (losses, _), (again, said) = (found[name] for name in GRAPHS)
    assert found["replays"] == [3]                                    # of 4 steps: the first runs as ever
    assert again == losses and len(losses) == 4 and "--cuda_graph 1" not in said


def test_a_test_of_each_file_passes(found):
    status, said = found["gpu tests"]
    assert status == 0 and f"{len(OF_EACH_FILE)} passed in" in said, said


# ------------------------------------------------------------------------------------------ the process of its own


def run(name: str, options: str) -> tuple[list[float], str]:
    """The losses of a run, and what it says."""
    out, said = Path(tempfile.mkdtemp(dir=".")), io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        P.main(f"--load_model {name[:4]}.pth --proj_dir {out} {COMMON} {options}".split())
    rows = [json.loads(line) for line in (out / "loss_data.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows], said.getvalue()


@contextlib.contextmanager
def numbers_missing() -> Iterator[None]:
    """What once was wrong: an operator is loaded while tensors are made on "meta", and looked at with those."""
    source, load, verify = Path(op.__file__).read_text(), P.load_wkv, op.verify
    assert source.count(LOOK) == 1
    module = dict(vars(op))
    exec(compile(source.replace(LOOK, "if True:"), op.__file__, "exec"), module)

    def load_on_meta(*arguments):
        with torch.device("meta"):
            return load(*arguments)

    op.verify, P.load_wkv = module["verify"], load_on_meta
    yield
    op.verify, P.load_wkv = verify, load


def main() -> dict:
    import simcuda
    Path("data.txt").write_text("A quick brown fox jumps over the lazy dog. " * 12)
    random_model("x070.pth"), random_model("x060.pth", version="x060")
    simcuda.open_device()
    with numbers_missing():                                           # (first: an operator that loads is kept)
        results = {"no numbers": run("x070", "--epoch_steps 2")}
    for name, (options, precision, _) in RUNS.items():
        cpu = f"--accelerator cpu --op chunk --precision {precision}"
        results[name] = [run(name, f"--epoch_steps 2 {options} {more}") for more in ("", cpu)]
    results |= {name: run(name, f"--epoch_steps 4 {options}") for name, options in GRAPHS.items()}
    results["replays"] = list(simcuda.replays)                        # (before others record more)
    with contextlib.redirect_stdout(io.StringIO()) as said:
        status = simcuda.run_tests("-p", "no:cacheprovider", *(f"{HERE / test}" for test in OF_EACH_FILE))
    return results | {"gpu tests": (status, said.getvalue())}


if __name__ == "__main__":
    print(json.dumps(main()))
