"""Runs on a device that is not the host (simgpu.cpp, as strict as CUDA) compute what a CPU computes, to the bit, leave
nothing on the host, and wait for the device twice a step. They are made in a process of their own, by the second half
of this file: there is no way to make torch forget a device."""

import contextlib
import ctypes
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import traceback
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import random_model

import pissa_rwkv
from wkv7_cuda import build

DATA = "--data_file data.txt"
COMMON = f"{DATA} --rank 4 --ctx_len 24 --micro_bsz 2 --epoch_steps 2 --lr_init 1e-4 --precision fp32 --op chunk"
INFCTX = "--train_type infctx --chunk_ctx 8"
DROPOUT = f"--peft lora --lora_dropout 0.5 {INFCTX} --chunk_grad full"
RUNS = {  # commands that follow each other in one folder, for the base that the name begins with
    "x070": ["--val_split 0.3 --sample_prompt a --sample_len 4 --auto_merge"],
    "x070, nf4dq": ["--quant nf4dq --qpissa_iters 2 --precision bf16 --grad_cp auto --vram_gb 9 --auto_merge"],
    "x060, lora, int8": ["--peft lora --quant int8 --precision fp16 --grad_cp products"],
    "x052, bat, nf4": ["--peft bone --bone_mode bat --quant nf4 --op torch --grad_cp 0"],
    "x070, embedding in its file": ["--emb_on_cpu --accumulate_grad_batches 2"],
    "x070, everything": [f"--peft none --precision fp16 {more}" for more in ("", "--epoch_begin 1")],
    "x070, truncated": [f"{INFCTX} --precision bf16 {more}" for more in ("", "--epoch_begin 1")],
    "x070, state": [f"--peft state {INFCTX} --chunk_grad full"],
    "x070, dropout": [f"{DROPOUT} {more}" for more in ("", "--epoch_count 2 --resume")],
    "x070, 8bit": [f"--moments 8bit --precision bf16 {more}" for more in ("", "--epoch_count 2 --resume")],
    "x070, chat": ["--quant nf4", "--chat --adapter_load {out}/rwkv-0.pth --sample_len 8"],
    "qk": ["--train_parts emb head ln time", "--chat --sample_len 8"],
}
PLANTED = {  # what is wrong -> what stands in the module, what is put there, and the commands that show it
    "a sum on the host": ("loss = torch.zeros((), dtype=dtype, device=x.device)", "loss = torch.zeros(())", [""]),
    "codes on the host": ("uint8, pairs, blocks, absmax)", "uint8, pairs, blocks, absmax).cpu()", ["--quant nf4"]),
    "targets on the host": ("x in self))", "x in self[:2]), self.targets)", [""]),
    "a loss read twice": ("loss += share.detach()", "loss += share.item()", [""]),
    "tokens fetched back": ("tokens if model.emb.weight.is_cpu else chunk.", "chunk.", ["--emb_on_cpu"]),
    "masks drawn anew": ("rest), model.head.weight, model,", "rest), None, model,", [DROPOUT]),
    "masks not resumed": ('"rng_cuda" in state', '"rng_cuda" in {}', [DROPOUT, f"{DROPOUT} --epoch_count 2 --resume"]),
}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Name of a run, or of a fault -> what was found on the CPU, and on the device."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    child = subprocess.run([sys.executable, __file__], cwd=tmp_path_factory.mktemp("device"), env=env, text=True,
                           capture_output=True)
    assert child.returncode == 0, child.stderr[-3000:]
    results = json.loads(child.stdout.splitlines()[-1])
    if isinstance(results, str):
        pytest.skip(results)
    return results


@pytest.mark.parametrize("name", RUNS)
def test_a_run_is_the_cpus(found, name):
    cpu, there = found[name]
    assert there == cpu and len(cpu["log"]) >= 2 and not cpu["wrong"]


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_fault_is_seen(found, name):
    """As what it is: by the line that it causes, or by other losses alone."""
    cpu, there = found[name]
    wrong = {"host": "on the same device", "twice": "train_step waits: ", "back": "train_step waits: "}
    assert len(cpu["log"]) >= 2 and not cpu["wrong"]
    if line := wrong.get(name.split()[-1]):
        assert line in there["wrong"][0]
    else:
        assert not there["wrong"] and there["log"] != cpu["log"]


# ------------------------------------------------------------------------------------------ the process of its own

MAY_WAIT = {"train_step": 2, "evaluate": 1}  # function -> how often, at most, it waits for the device
waits = []  # for what, and where


@ctypes.CFUNCTYPE(None, ctypes.c_char_p)
def waited(why):
    lines = [f.lineno for f in traceback.extract_stack() if f.filename == pissa_rwkv.__file__]
    waits.append(f"{why.decode()} in line {lines[-1] if lines else '?'}")


def open_device() -> None:
    """torch knows simgpu from now on."""
    at = Path(torch.__file__).parent
    library = build.load("simgpu", Path(__file__).with_name("simgpu.cpp"), "c++", [
        "-std=c++20", "-O0", "-shared", "-fPIC", f"-DTORCH={torch.__version__}", f"-I{at}/include",
        f"-I{at}/include/torch/csrc/api/include", f"-L{at}/lib", "-Wl,--no-as-needed", "-ltorch_cpu", "-lc10"])
    library.open_device(waited)

    def get_rng_state(device: int = 0) -> torch.Tensor:
        state = torch.get_rng_state()
        library.get_rng(ctypes.c_void_p(state.data_ptr()))
        return state

    def set_rng_state(state: torch.Tensor, device: int = 0) -> None:
        library.set_rng(ctypes.c_void_p(state.data_ptr()))

    torch.utils.rename_privateuse1_backend("simgpu")
    torch._register_device_module("simgpu", types.SimpleNamespace(
        get_rng_state=get_rng_state, set_rng_state=set_rng_state, _initialized=True, _is_in_bad_fork=lambda: False,
        manual_seed_all=lambda seed: set_rng_state(torch.Generator().manual_seed(seed).get_state()),
        is_available=lambda: True, current_device=lambda: 0, device_count=lambda: 1, device=contextlib.nullcontext,
        get_amp_supported_dtype=lambda: [torch.bfloat16, torch.float16]))


def module_on(device: str, old: str = "", new: str = "") -> types.ModuleType:
    """pissa_rwkv anew, with a fault in it; with simgpu in the place of CUDA."""
    source = Path(pissa_rwkv.__file__).read_text()
    assert not old or source.count(old) == 1, f"{old} is there {source.count(old)} times"
    source = source.replace(old, new) if old else source
    source = source.replace('"cuda"', f'"{device}"').replace("torch.cuda", f"torch.{device}").replace(
        "partial(dequant.fused", f'partial(dequant.fused, device="{device}", choose=lambda device: None')
    module = sys.modules[device] = types.ModuleType(device)
    module.__file__ = pissa_rwkv.__file__
    exec(compile(source, module.__file__, "exec"), vars(module))
    return module


def watched(P: types.ModuleType, wrong: list[str]) -> types.ModuleType:
    """A module whose steps say what they wait for and what lies on the host, if that is wrong."""
    def watch(name: str, most: int, function: Callable) -> Callable:
        def counted(*inputs):
            waits.clear()
            out = function(*inputs)
            wrong.extend([f"{name} waits: {waits}"] if len(waits) > most else [])
            wrong.extend(left_on_host(inputs[0]) if name == "train_step" else [])
            return out
        return counted

    for name, most in MAY_WAIT.items():
        setattr(P, name, watch(name, most, getattr(P, name)))
    return P


def left_on_host(run) -> list[str]:
    """Of what a run keeps, the optimiser's buffers by number."""
    kept = [*run.model.named_parameters(), *run.model.named_buffers(), *enumerate(run.optimiser.buffers())]
    may = ["emb.weight"] if run.cfg.emb_on_cpu else []
    return [f"{name} is on the host" for name, t in kept if t.is_cpu and name not in may]


def results(P: types.ModuleType, device: str, base: str, commands: list[str], wrong: list[str]) -> dict:
    """What commands print and write, one after the other, and what goes wrong."""
    out, said = tempfile.mkdtemp(dir=os.getcwd()), io.StringIO()
    place = f"--proj_dir {out} --load_model {base}.pth --accelerator {dict(simgpu='gpu').get(device, device)}"
    for command in commands:
        sys.stdin = io.StringIO("a question\nand another\n")
        argv = f"{place} {COMMON.replace(DATA, '') if '--chat' in command else COMMON} {command.format(out=out)}"
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(io.StringIO()) as error:
            try:
                P.main(argv.split())
            except Exception as e:
                error.write(f"{type(e).__name__}: {e}")
        wrong.extend(line for line in error.getvalue().splitlines() if "rror: " in line)
    files = {p.name: pissa_rwkv.fingerprint(pissa_rwkv.read_pth(p, "")) for p in Path(out).glob("*.pth")
             if not p.name.startswith("resume")}                      # (which holds the device's random state too)
    rows = [json.loads(line) for p in Path(out).glob("loss_data.jsonl") for line in p.read_text().splitlines()]
    log = [[row.get(x) for x in ("loss", "grad_norm", "val_loss")] for row in rows]
    lines = [line for line in said.getvalue().replace(out, "").splitlines() if "--grad_cp auto" not in line]
    return {"log": log, "files": files, "said": lines, "wrong": wrong}


def main() -> dict | str:
    Path("data.txt").write_text("A quick brown fox jumps over the lazy dog. " * 12)
    random_model("x070.pth"), random_model("x052.pth", version="x052")
    random_model("x060.pth", version="x060", pre_ffn=True), random_model("qk.pth", head_qk=16)
    if not shutil.which("c++"):
        return "no C++ compiler"
    open_device()
    work = [(name, name[:4].strip(","), commands, ()) for name, commands in RUNS.items()]
    work += [(name, "x070", commands, fault) for name, (*fault, commands) in PLANTED.items()]
    return {name: [results(pissa_rwkv, "cpu", base, commands, []),
                   results(watched(module_on("simgpu", *fault), wrong := []), "simgpu", base, commands, wrong)]
            for name, base, commands, fault in work}


if __name__ == "__main__":
    print(json.dumps(main()))
