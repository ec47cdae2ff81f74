"""Into how many segments do the fast kernels best cut a head? The time of many plans, beside that of the chosen one.

    python bench/segments.py                    # half a minute on a GPU -> bench/results/segments-cuda.json

`fast.segment_chunks` chooses by the number of heads, of chunks and of the GPU's multiprocessors; this shows whether it
chooses well on the GPU at hand. For each shape (batch, tokens, heads) and each number of segments: a forward that saves
nothing, as in the first pass of checkpointing, one that saves, and a backward, as CUDA graphs, in bf16; a step makes
all three. The same inputs every time: they are in the cache where there is room, as they are in training.
"""

import argparse
import sys
from functools import partial
from pathlib import Path

import record
import torch
import wkv
from dequant import in_a_graph

from wkv7_cuda import fast, wkv6_cuda

MODULES = {"wkv7": fast, "wkv6": wkv6_cuda}
SHAPES = [(1, 1024, 12), (1, 1024, 16), (1, 1024, 32), (1, 1024, 40), (1, 1024, 64), (1, 4096, 40), (4, 1024, 16),
          (4, 1024, 40)]
MOST = 24  # segments
CALLS = 8  # in a graph


def numbers_of_segments(chunks: int) -> dict[int, int]:
    """Number of segments -> chunks of each: all plans of up to MOST segments that differ."""
    lengths = [-(-chunks // n) for n in range(1, MOST + 1)]
    return {-(-chunks // length): length for length in lengths if length >= fast.SHORTEST or chunks < fast.SHORTEST}


def microseconds(recurrence: str, case: list[torch.Tensor], length: int) -> float:
    """Of what a step does, with segments of this many chunks."""
    *inputs, state, dy, dstate = case
    forward, backward = MODULES[recurrence].kernels(MODULES[recurrence].library, lambda *sizes: length)
    saved = forward(*inputs, state, True)[2]
    calls = [partial(forward, *inputs, state, False), partial(forward, *inputs, state, True),
             partial(backward, *inputs, state, saved, dy, dstate)]
    return 1e6 * sum(in_a_graph([call] * CALLS) for call in calls)


def measure(recurrence: str, shape: tuple[int, int, int], device: str) -> dict:
    """The figures of one row."""
    batch, tokens, heads = shape
    case = wkv.make(shape, torch.bfloat16, device, its=wkv.RECURRENCES[recurrence])
    chunks, there = -(-tokens // fast.L), fast.multiprocessors_of(torch.device(device))
    length = min(fast.segment_chunks(batch * heads, chunks, there), chunks)
    chosen = -(-chunks // length)
    plans = numbers_of_segments(chunks) | {chosen: length}
    us = {n: microseconds(recurrence, case, plan) for n, plan in plans.items()}
    return {"multiprocessors": there, "chosen": chosen, "best": min(us, key=us.get), "us": us}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--out", type=Path, default=record.RESULTS, help="folder of the results")
    parser.add_argument("--commit", default="", help="name of the sources where git does not tell")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("no GPU here: there is nothing to measure")
    about = record.circumstances("cuda", args.commit)
    print("{machine}, torch {torch}, commit {commit}".format(**about))
    for recurrence in MODULES:
        for shape in SHAPES:
            row = {"recurrence": recurrence, "shape": list(shape)} | measure(recurrence, shape, "cuda")
            file = record.update(args.out / "segments-cuda.json", [row | about], ("recurrence", "shape"))
            us = row["us"]
            print(f"{recurrence} {shape}: chosen {row['chosen']}, {us[row['chosen']]:.0f} us; best {row['best']},"
                  f" {us[row['best']]:.0f} us; all:", *(f"{n}: {t:.0f}" for n, t in us.items()), flush=True)
    print(file)


if __name__ == "__main__":
    main()
