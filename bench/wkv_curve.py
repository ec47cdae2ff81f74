"""Does the fast mode's rounding show in training? Loss curves of both modes, beside those of two seeds.

    python bench/wkv_curve.py [--steps 200]      # about 4 minutes on a CPU -> bench/results/wkv_curve-<device>.json

A small base, PiSSA of rank 8, bf16. On a GPU the modes are `cuda` and `cuda_precise`; elsewhere `chunk` with every
rounding of the fast mode (chunk.to_bf16; in float32 otherwise) and `cpu`, which computes in fp32. For each mode and two
seeds a run; the row has the root mean square of the difference of two loss curves, smoothed over 20 steps: of the two
modes with the same seed, and of the two seeds in the same mode. The first should not be the larger one.
"""

import argparse
import json
import tempfile
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path

import record
import torch

import pissa_rwkv as P
from wkv7_cuda import chunk, op

SEEDS, SMOOTH = (0, 1), 20


def rounded_chunks() -> op.WKV7:
    """The `chunk` operator with the fast mode's roundings."""
    forward, backward = (partial(f, cast=chunk.to_bf16) for f in (chunk.forward, chunk.backward))
    return op.register("chunk_rounded", forward, backward, chunk.new_saved)


def curve(cfg: P.Config) -> torch.Tensor:
    """The run's losses, smoothed."""
    P.train(P.build(cfg))
    lines = (Path(cfg.proj_dir) / "loss_data.jsonl").read_text().splitlines()
    losses = torch.tensor([row["loss"] for row in map(json.loads, lines) if "loss" in row])
    return losses.unfold(0, SMOOTH, 1).mean(-1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--out", type=Path, default=record.RESULTS, help="folder of the results")
    parser.add_argument("--commit", default="", help="name of the sources where git does not tell")
    args = parser.parse_args()
    steps = args.steps
    device = "cuda" if torch.cuda.is_available() else "cpu"
    modes = {"cuda": ("cuda_precise", "cuda"), "cpu": ("cpu", "chunk_rounded")}[device]
    P.WKV["x070"]["chunk_rounded"] = rounded_chunks
    with tempfile.TemporaryDirectory() as folder:
        common = P.Config(data_type="dummy", tokenizer="byte", vocab_size=128, ctx_len=96, micro_bsz=16, grad_cp="0",
                          rank=8, precision="bf16")
        base = replace(common, peft="none", n_layer=2, n_embd=128, data_file="base", epoch_steps=300, warmup_steps=20,
                       lr_init=3e-3, lr_final=1.5e-4, precision="fp32", proj_dir=f"{folder}/base")
        P.train(P.build(base))
        tuned = replace(common, load_model=f"{folder}/base/rwkv-0.pth", data_file="shift", epoch_steps=steps,
                        warmup_steps=5, lr_init=2e-3, lr_final=2e-4)
        curves = {(mode, seed): curve(replace(tuned, op=mode, random_seed=seed, proj_dir=f"{folder}/{mode}{seed}"))
                  for mode, seed in product(modes, SEEDS)}

    def apart(one: tuple, other: tuple) -> float:
        return (curves[one] - curves[other]).square().mean().sqrt().item()

    row = {"modes": modes, "steps": steps, "seeds": SEEDS,
           "between_modes": [apart((modes[0], seed), (modes[1], seed)) for seed in SEEDS],
           "between_seeds": [apart((mode, SEEDS[0]), (mode, SEEDS[1])) for mode in modes],
           "last_losses": {f"{mode}, seed {seed}": c[-1].item() for (mode, seed), c in curves.items()}}
    print(row)
    print(record.save(args.out / f"wkv_curve-{device}.json", [row | record.circumstances(device, args.commit)]))


if __name__ == "__main__":
    main()
