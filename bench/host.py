"""What a step takes of the host, whatever its GPU: Python, autograd, dispatch -> bench/results/host.json

    python bench/host.py                                              # a minute on a quiet CPU

A GPU works through the operations that the host hands it. With small models, few rows or a fast GPU it waits for the
host, and a step takes as long as that does. Here are optimiser steps of PiSSA on as many layers as the models have, all
64 wide, with rows of 8 tokens and 256 of vocabulary, on one CPU thread: the arithmetic is next to nothing, the
operations are as many as ever. (Of a GPU's own runtime, which launches the kernels, nothing is in it.)

    ms        of the process, the median step; {ms, low, high: 10 % and 90 %, n: steps}
    way       --grad_cp, and in brackets who does it: torch's checkpoint and its selective one, where ours do not say so
    ratio     to the ms of --grad_cp 1 in the same run

All ways of a depth take turns step by step in one process.
"""

import argparse
import time
from functools import partial
from pathlib import Path

import record
import step
import torch
import vram
import wkv

import pissa_rwkv as P

MODELS = ("RWKV7-0.1B", "RWKV7-1.5B", "RWKV7-2.9B")                   # of 12, 24 and 32 layers
WIDTH, TOKENS, RANK = 64, 8, 8


def by_torch(block: P.Block, *inputs: object) -> tuple:
    return P.checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)


def by_torch_products(block: P.Block, x: torch.Tensor, *rest: object) -> tuple:
    return P.checkpointed(partial(P.save_products, x.shape[-1]), block, x, *rest)


WAYS = P.GRAD_CP | {"products (torch)": by_torch_products, "1 (torch)": by_torch}


def narrow(model: str) -> P.Arch:
    """As deep as a model, and no wider than a head."""
    arch = vram.arch_of(model)
    return P.replace(arch, n_embd=WIDTH, dim_att=WIDTH, dim_ffn=4 * WIDTH, vocab_size=256,
                     ranks=dict.fromkeys(arch.ranks, RANK))


def rows_of(model: str, seconds: float) -> list[dict]:
    cfg = P.Config(accelerator="cpu", peft="pissa", rank=RANK, svd_niter=1, ctx_len=TOKENS, micro_bsz=1)
    runs = {}
    for way, run_block in WAYS.items():
        runs[way] = step.prepared(narrow(model), cfg)
        runs[way].run.model.run_block = run_block
        runs[way].step(), runs[way].step()                            # they warm up
    times = {way: [] for way in runs}
    until = time.perf_counter() + seconds * len(runs)
    while time.perf_counter() < until or len(times["1"]) < 3:
        for way, c in runs.items():
            began = time.process_time()
            c.step()
            times[way].append(time.process_time() - began)
    spread = {way: wkv.spread(ts) for way, ts in times.items()}
    return [{"model": model, "layers": narrow(model).n_layer, "way": way, "step": x,
             "ratio": x["ms"] / spread["1"]["ms"]} for way, x in spread.items()]


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    p.add_argument("--models", nargs="+", choices=list(vram.MODELS), default=list(MODELS))
    p.add_argument("--seconds", type=float, default=4, help="for each way")
    p.add_argument("--out", type=Path, default=record.RESULTS, help="folder of the results")
    args = p.parse_args(argv)
    torch.set_num_threads(1)
    about = record.circumstances()
    for model in args.models:
        rows = rows_of(model, args.seconds)
        for row in rows:
            print("{layers} layers, --grad_cp {way:18}{step[ms]:8.1f} ms {ratio:6.2f}".format(**row), flush=True)
        record.update(args.out / "host.json", [row | about for row in rows], ("model", "way"))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
