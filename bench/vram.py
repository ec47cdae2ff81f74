"""Memory of a PiSSA run, predicted without a device or measured on one -> bench/results/vram.json

    python bench/vram.py --predict                                    # every cell, without a GPU; about two minutes
    python bench/vram.py                                              # every cell that fits, on the GPU at hand
    python bench/vram.py --levers --models RWKV7-7.2B                 # what each option that saves memory saves
    python bench/vram.py --levers --predict                           # the same without a GPU, of four models
    python bench/vram.py --predict --models RWKV7-7.2B --quants nf4 --options emb_on_cpu=1 ctx_len=2048

A cell is a model and a way to hold its matrices, at the setting of RWKV-PEFT's tutorial (one row of 1024 tokens, rank
32, every matrix adapted); each runs in a process of its own. A cell that the results hold already, of this commit,
machine and setting, is skipped: stopped, the command goes on where it was. Bytes are bytes, GB are 10^9.

| of a row | what |
|---|---|
| weights, optimiser, activations | tensors at the peak of a step; `pissa_rwkv.Memory` says more |
| loading | most bytes of tensors while the model is loaded and decomposed |
| other, total | what is not tensors, and all together: what the driver would report of the process |
| allocated, reserved (measured) | peaks of torch's allocator, over loading and four optimiser steps |
| device (measured) | the driver's count of the whole card, less what was in use before |
| init_seconds (measured) | of PiSSA's start, all matrices |

Measuring goes through the functions of training, on random weights: one block's, drawn on the GPU and moved to the
host, stands for all blocks, as their bytes and their time are the same.
"""

import argparse
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import record
import torch
from torch import Tensor

import pissa_rwkv as P
from wkv7_cuda import dequant


class Model(NamedTuple):
    version: str
    n_layer: int
    n_embd: int
    dim_ffn: int
    ranks: dict[str, int]
    parameters: int                                                   # the published count
    published: dict[str, float]                                       # --quant -> GB of the process, RWKV-PEFT's table


MODELS = {
    "RWKV7-0.1B": Model("x070", 12, 768, 3072, dict(w=64, a=64, v=32, g=128), 191_034_624,
                        dict(none=2.6, int8=2.4, nf4=2.5)),
    "RWKV7-0.4B": Model("x070", 24, 1024, 4096, dict(w=64, a=64, v=32, g=128), 450_767_872,
                        dict(none=3.4, int8=3.0, nf4=2.7)),
    "RWKV7-1.5B": Model("x070", 24, 2048, 8192, dict(w=96, a=96, v=64, g=256), 1_527_404_544,
                        dict(none=5.6, int8=4.6, nf4=3.9)),
    "RWKV7-2.9B": Model("x070", 32, 2560, 10240, dict(w=96, a=96, v=64, g=320), 2_947_735_040,
                        dict(none=8.8, int8=6.7, nf4=5.7)),
    "RWKV7-7.2B": Model("x070", 32, 4096, 16384, dict(w=128, a=128, v=96, g=480), 7_199_141_888, {}),
    "RWKV7-13.3B": Model("x070", 61, 4096, 16384, dict(w=192, a=192, v=128, g=384), 13_269_245_952, {}),
    "RWKV6-1.6B": Model("x060", 24, 2048, 7168, dict(mix=32, decay=64), 1_599_873_024,
                        dict(none=7.3, int8=5.9, nf4=5.4)),
    "RWKV6-3B": Model("x060", 32, 2560, 8960, dict(mix=32, decay=64), 3_099_863_040,
                      dict(none=11.8, int8=9.4, nf4=8.1)),
    "RWKV6-7B": Model("x060", 32, 4096, 14336, dict(mix=64, decay=128), 7_635_746_816,
                      dict(none=23.7, int8=17.3, nf4=14.9)),
}  # fmt: skip
QUANTS = ("none", "int8", "nf4")
STEPS = 4
LEVERS = {  # what a setting is called -> the options that make it; from "all saved" to the defaults and beyond
    "nothing computed again": {"grad_cp": "0"},
    "all but products computed again": {"grad_cp": "products"},
    "the defaults": {},
    "embedding left in the file": {"emb_on_cpu": True},
    "double quantisation": {"quant": "nf4dq"},
    "Adam's moments in 8 bits": {"moments": "8bit"},
    "all levers": {"emb_on_cpu": True, "quant": "nf4dq", "moments": "8bit"},
}
LEVER_CELLS = ("RWKV7-0.4B", "RWKV7-1.5B", "RWKV7-7.2B", "RWKV7-13.3B")


def arch_of(name: str) -> P.Arch:
    m = MODELS[name]
    return P.Arch(m.version, m.n_layer, m.n_embd, m.n_embd, m.dim_ffn, 64, 65536, m.ranks)


def setting(quant: str, options: dict) -> P.Config:
    """The tutorial's, and `options` over it."""
    tutorial = P.Config(accelerator="gpu", precision="bf16", peft="pissa", rank=32, svd_niter=4, ctx_len=1024,
                        micro_bsz=1, strategy="deepspeed_stage_1", quant=quant)
    return P.replace(tutorial, **options)


def predict(name: str, cfg: P.Config) -> dict:
    """A rehearsal's count, for a GPU."""
    memory = P.Rehearsal(cfg, arch_of(name), "cuda", torch.bfloat16).memory(cfg.micro_bsz)
    return memory._asdict() | {"total": memory.total}


def random_tensors(arch: P.Arch, device: str = "cuda") -> dict[str, Tensor]:
    """A model file's tensors in bf16, drawn on the device and kept on the host; all blocks share one block's. Values
    that keep everything finite."""
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in P.RWKV(arch, P.wkv7_ref).named_parameters()}
    drawn, tensors, draw = {}, {}, torch.Generator(device).manual_seed(0)
    for name, shape in shapes.items():
        kind = re.sub(r"blocks\.\d+", "block", name)
        if kind not in drawn:
            matrix = sum(n > 1 for n in shape) > 1
            x = (torch.randn if matrix else torch.rand)(shape, device=device, generator=draw)
            x /= shape[-1] ** 0.5 if matrix else 1
            drawn[kind] = (torch.ones_like(x) if re.search(r"ln\w*\.weight", name) else x).bfloat16().cpu()
        tensors[name] = drawn[kind]
    return tensors


def in_use() -> int:
    """Bytes of the card that are in use, by anyone, as the driver reports them."""
    found = subprocess.run(["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "--id=0"],
                           capture_output=True, text=True, check=True).stdout
    return int(found) * 2**20


def falls_back(cfg: P.Config, op: str) -> str:
    """What a run on a GPU does not do as it was asked to; nothing if all is as it should be. (A run says so and goes
    on more slowly: in a table that would be another's figure.)"""
    if op != (cfg.op or "cuda"):
        return f"--op {cfg.op or 'cuda'} is not in effect: {op} is"
    device = torch.device("cuda", torch.cuda.current_device())
    if cfg.quant != "none" and dequant.library_for(device, P.warn) is None:
        return "no kernel reads quantised matrices"
    return ""


def prepare(cfg: P.Config, device: str, dtype: torch.dtype) -> None:
    """What is done once in a process, and not for each matrix: libraries are opened, kernels compiled."""
    W = torch.randn(256, 256, device=device)
    P.top_singular(W, 8, cfg.svd_niter, torch.Generator().manual_seed(0))
    P.QUANT[cfg.quant].through(W, dtype)
    torch.cuda.synchronize()


def measure(name: str, cfg: P.Config) -> dict:
    """Loads, adapts and trains on the GPU."""
    before = in_use()
    _, device, dtype = P.setup(cfg)
    arch = arch_of(name)
    tensors = random_tensors(arch)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    op, wkv = P.find_wkv(arch.version, arch.head_size, cfg.op, device)
    if why := falls_back(cfg, op):
        raise SystemExit(f"{why}: no figure")
    with torch.device("meta"):
        model = P.RWKV(arch, wkv, cfg.grad_cp)
    P.fill(model, tensors, name, device, dtype, P.left_in_file(model, cfg))
    prepare(cfg, device, dtype)
    start = time.perf_counter()
    P.add_adapters(model, cfg, {}, {})
    torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    optimiser = P.ZeroAdamW(((n, p) for n, p in model.named_parameters() if p.requires_grad), cfg)
    loader = P.FullRows(cfg.micro_bsz, cfg.ctx_len, device)
    run = P.Run(cfg, P.ONE_RANK, device, dtype, arch, None, loader, None, STEPS, {}, model, optimiser)
    loading, held = torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    losses = [P.train_step(run, 1e-5)["loss"] for _ in range(STEPS)]
    torch.cuda.synchronize()
    step, own, used = torch.cuda.max_memory_allocated(), optimiser.nbytes(), in_use() - before
    if used < max(step, loading):
        raise SystemExit("another process on the GPU let go of its memory meanwhile: no figure")
    reserved = torch.cuda.max_memory_reserved()
    return {"weights": held - own, "optimiser": own, "activations": step - held, "loading": loading,
            "other": used - max(step, loading), "total": used, "allocated": max(step, loading), "reserved": reserved,
            "device": used, "init_seconds": round(seconds, 2), "losses": losses}


def cell(kind: str, name: str, quant: str, options: dict) -> dict:
    """One row, made in a process of its own."""
    words = [sys.executable, __file__, "--cell", json.dumps([kind, name, quant, options])]
    done = subprocess.run(words, cwd=record.ROOT, capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
        return {"failed": lines[-1]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def run_cell(kind: str, name: str, quant: str, options: dict) -> dict:
    start, cfg = time.perf_counter(), setting(quant, options)
    row = {"predicted": predict, "measured": measure}[kind](name, cfg)
    return row | {"seconds": round(time.perf_counter() - start, 1)}


def described(row: dict) -> str:
    if "failed" in row:
        return row["failed"]
    parts = ", ".join(f"{row[part] / 1e9:.2f} {part}" for part in ("weights", "optimiser", "activations", "other"))
    ratio = f", {row['ratio']:.2f} of the published {row['published']}" if row["published"] else ""
    return f"{row['total'] / 1e9:.2f} GB{ratio} ({parts}; {row['seconds']} s)"


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    p.add_argument("--predict", action="store_true", help="count, without a device")
    p.add_argument("--levers", action="store_true", help="what each option saves, on some cells")
    p.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    p.add_argument("--quants", nargs="+", choices=list(P.QUANT), default=QUANTS)
    p.add_argument("--options", nargs="*", default=[], metavar="NAME=VALUE", help="of pissa_rwkv, over the setting")
    p.add_argument("--out", type=Path, default=record.RESULTS, help="folder of the results")
    p.add_argument("--commit", default="", help="name of the sources where git does not tell")
    p.add_argument("--minutes", type=float, default=1e6, help="begin no cell later than that")
    p.add_argument("--cell", help=argparse.SUPPRESS)                  # of a cell's own process
    return p


def todo(args: argparse.Namespace) -> list[tuple[str, str, str, str, dict]]:
    """Every cell: kind, model, quant, what its setting is called, options."""
    words = [word for pair in args.options for word in ("--" + pair.partition("=")[0], pair.partition("=")[2])]
    given, default = P.asdict(P.parse(words)), P.asdict(P.Config())
    options = {k: v for k, v in given.items() if v != default[k]}
    kind, title = "predicted" if args.predict else "measured", " ".join(args.options)
    if args.levers:
        return [(kind, name, (lever | {"quant": lever.get("quant", "nf4")})["quant"], title, lever | options)
                for name in args.models if name in LEVER_CELLS for title, lever in LEVERS.items()]
    published_first = sorted(args.models, key=lambda name: not MODELS[name].published)
    return [(kind, name, quant, title, options) for name in published_first for quant in args.quants]


def main(argv: list[str] | None = None) -> int:
    """Status 0 if every cell has its row; a cell that does not fit is said and gives none."""
    args = parser().parse_args(argv)
    if args.cell:
        print(json.dumps(run_cell(*json.loads(args.cell))))
        return 0
    if not args.predict and not torch.cuda.is_available():
        print("bench/vram.py: no GPU here; --predict needs none", file=sys.stderr)
        return 2
    file = args.out / ("vram-levers.json" if args.levers else "vram.json")
    key = ("kind", "model", "quant", "setting", *(["commit"] if args.levers else []))
    failed, deadline = 0, time.monotonic() + 60 * args.minutes
    for kind, name, quant, title, options in todo(args):
        about = record.circumstances("cuda" if kind == "measured" else "cpu", args.commit)
        row = {"kind": kind, "model": name, "quant": quant, "setting": title, "options": options}
        same = [*row, "machine", "commit"]
        if any(all(r.get(k) == (row | about)[k] for k in same) for r in record.load(file)):
            print(f"{kind} {name} {quant} {title}: is there", flush=True)
            continue
        if time.monotonic() > deadline:
            print("out of time: run again for what is left", flush=True)
            return 1
        row |= cell(kind, name, quant, options)
        if "failed" not in row:
            published = MODELS[name].published.get(quant)
            row |= {"published": published, "ratio": published and row["total"] / 1e9 / published}
            record.update(file, [row | about], key)
        failed += "failed" in row
        print(f"{kind} {name} {quant} {title}: {described(row)}", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
