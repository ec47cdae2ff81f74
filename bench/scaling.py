"""What several ranks cost: measured over gloo on this machine, and modelled for GPUs, from formulas that stand here.

    python bench/scaling.py          # two minutes -> bench/results/scaling.json

Measured: a small base adapted in bf16, on 1, 2 and 4 ranks and at every stage of ZeroAdamW: seconds of the fastest
step, tokens a second, bytes that a rank gives to its sockets in a step (the kernel's count of what the process wrote),
and bytes that its optimiser holds. Each rank has its micro-batch: more ranks, more rows. Ranks beyond the number of
cores take turns.

Modelled, nothing of it measured: W ranks that each compute c seconds a step, over links of b bytes/s a rank and with a
delay of d seconds a message. A ring passes 1/W of a buffer on W - 1 times; four sums of one number a step (learnt
tokens, loss, norm, whether to stop) go down and up a tree:

    t = c + exposed + S / b (W - 1) / W + 2 (W - 1) d + 8 log2(W) d

    stage   S, bytes of P trained numbers             exposed
    0       8 P   (gradients, fp32, there and back)   0
    1       4 P + 2 P   (gradients; working, bf16)    0
    2       the 2 P of working                        what of the 4 P does not fit into backward, 2/3 of c

The share of c in t is the efficiency.
"""

import argparse
import itertools
import math
import multiprocessing
import os
import re
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import record
import reliability
import torch
import vram
from tqdm import tqdm

import pissa_rwkv as P

STAGES = {0: "ddp", 1: "zero1", 2: "zero2"}
SIZES, STEPS, WARM_UP = (1, 2, 4), 6, 2


# ------------------------------------------------------------------------------------------------------------ measured


def written() -> int:
    """Bytes that this process gave to files and sockets so far."""
    return int(re.search(r"^wchar: (\d+)", Path("/proc/self/io").read_text(), re.M)[1])


def rank(argv: list[str], env: dict[str, str], found: multiprocessing.Queue) -> None:
    """One rank: a few steps, timed and counted."""
    os.environ.update(env)
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())
    sys.stdout = sys.stderr = open(os.devnull, "w")
    run = P.build(P.parse(argv))
    times, tokens, at = [], 0, []
    for _ in range(WARM_UP + STEPS):
        at, began = [*at, written()], time.perf_counter()
        tokens = P.train_step(run, 1e-4)["tokens"]
        times.append(time.perf_counter() - began)
        run.step += 1
    found.put(dict(seconds=min(times), tokens=tokens, sent=(written() - at[WARM_UP]) / STEPS,
                   held=run.optimiser.nbytes(), numbers=run.optimiser.numbers))


def measure(base: Path, size: int, stage: int) -> dict:
    argv = (f"--load_model {base} --data_type dummy --data_file base --tokenizer byte --ctx_len 128 --dataload get"
            f" --loss_mask pad --micro_bsz 2 --rank 32 --train_parts ln --precision bf16 --lr_init 1e-4"
            f" --strategy {STAGES[stage]} --epoch_steps 100 --proj_dir {base.parent}/{size}-{stage}").split()
    place = reliability.meeting_place(size)
    found = reliability.server().Queue()
    ranks = [reliability.server().Process(target=rank, args=(argv, place | {"RANK": str(r)}, found))
             for r in range(size)]
    for process in ranks:
        process.start()
    rows = [found.get(timeout=300) for _ in ranks]
    for process in ranks:
        process.join()
    row = {key: sum(r[key] for r in rows) / size for key in rows[0]}                      # mean over ranks
    return dict(kind="measured", ranks=size, stage=stage, **row, sent_by_formula=sent(row["numbers"], size, stage),
                tokens_s=row["tokens"] / row["seconds"])


# ------------------------------------------------------------------------------------------------------------ modelled


def sent(numbers: float, ranks: int, stage: int) -> float:
    """Bytes that a rank sends in a step, the parameters in bf16."""
    return (8 if stage == 0 else 4 + 2) * numbers * (ranks - 1) / ranks


def held(numbers: float, ranks: int, stage: int) -> float:
    """Bytes that a rank holds of what is trained: working, gradient, and master, m, v (and the summed gradient)."""
    return numbers * {0: 2 + 4 + 10, 1: 2 + 4 + 14 / ranks, 2: 2 + 14 / ranks}[stage]


def step_time(numbers: float, ranks: int, stage: int, compute: float, bandwidth: float, delay: float) -> float:
    """The docstring's t."""
    part = (ranks - 1) / ranks / bandwidth                                                # seconds a byte
    exposed = max(0.0, 4 * numbers * part - compute * 2 / 3) if stage == 2 else 0.0
    size = {0: 8, 1: 4 + 2, 2: 2}[stage] * numbers
    return compute + exposed + size * part + (2 * (ranks - 1) + 8 * math.log2(ranks)) * delay


def compute_time(parameters: float, tokens: int, full: bool) -> float:
    """Seconds in which a GPU makes a step: 2 operations a parameter and token forward, as many again to recompute, 2
    for the gradient of what comes in and, where the matrix is trained, 2 for its own."""
    return (8 if full else 6) * parameters * tokens / (SHARE * OPERATIONS)


OPERATIONS, SHARE = 989e12, 0.4                                       # of an H100 in bf16; what of it a run reaches
TOKENS = 4 * 1024                                                     # of a rank's step
LINKS = {"NVLink": (450e9, 3e-6, (8,)), "400 Gbit/s": (50e9, 1e-5, (8, 16, 32, 64, 128, 256, 512, 1024)),
         "25 Gbit/s": (3.125e9, 2e-5, (8, 16, 32, 64, 128, 256, 512, 1024)),
         "1 Gbit/s": (0.125e9, 5e-5, (8, 16, 32, 64, 128, 256, 512, 1024))}  # a GPU's bytes/s, seconds a message, ranks
MODELS = ("RWKV7-0.4B", "RWKV7-1.5B", "RWKV7-7.2B", "RWKV7-13.3B")


def adapter_numbers(name: str, rank: int = 32) -> int:
    """Trained numbers of PiSSA on an x070: 4 matrices (C,C), two of (F,C), and the norms."""
    m = vram.MODELS[name]
    C, F = m.n_embd, m.dim_ffn
    return m.n_layer * (rank * (4 * 2 * C + 2 * (C + F)) + 6 * C) + 4 * C


def modelled() -> Iterator[dict]:
    for name, full, stage in itertools.product(MODELS, (False, True), STAGES):
        numbers = vram.MODELS[name].parameters if full else adapter_numbers(name)
        what = dict(model=name, full=full, stage=stage, numbers=numbers)
        yield dict(kind="bytes", **what, ranks=[8, 64, 1024], held=[held(numbers, W, stage) for W in (8, 64, 1024)],
                   sent=[sent(numbers, W, stage) for W in (8, 64, 1024)])
        compute = compute_time(vram.MODELS[name].parameters, TOKENS, full)
        for link, (bandwidth, delay, ranks) in LINKS.items():
            yield dict(kind="modelled", **what, link=link, compute=compute, ranks=ranks,
                       seconds=[step_time(numbers, W, stage, compute, bandwidth, delay) for W in ranks])


def main() -> None:
    argparse.ArgumentParser(description=__doc__.split("\n")[0]).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "base" / "rwkv-0.pth"
        new = (f"--peft none --n_layer 4 --n_embd 256 --data_type dummy --data_file base --tokenizer byte --ctx_len 16"
               f" --epoch_steps 1 --micro_bsz 1 --proj_dir {base.parent}")
        if P.main(new.split()):
            raise SystemExit("the base model could not be made")
        rows = []
        for size, stage in [(1, 0), *((size, stage) for size in SIZES[1:] for stage in STAGES)]:
            rows.append(measure(base, size, stage))
            print(rows[-1], flush=True)
    print(f"-> {record.write('scaling', [*rows, *modelled()])}")


if __name__ == "__main__":
    main()
