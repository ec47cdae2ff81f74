"""flash-linear-attention's kernels, compiled by all cores and tuned before anything is measured; on a GPU.

    python bench/fla_tune.py

Triton tries some 270 ways to compile fla's kernels of WKV-7 and 170 those of WKV-6, one after another, when they first
run: minutes, in whatever runs first, and again in each process beside it. Here as many processes as there are cores
compile a share each and launch nothing; then one process, which finds all of it in Triton's cache, takes the times. The
choices lie in the cache too and hold for every number of heads and tokens.
"""

import argparse
import contextlib
import importlib.util
import os
import subprocess
import sys
import time
import zlib

SHAPE = (1, 1024, 40)


def of_share(name: str, configs: list, share: int, shares: int) -> list:
    """Those ways to compile a kernel that are this share's; of all kernels together each has about as many."""
    first = zlib.crc32(name.encode())
    return [config for i, config in enumerate(configs) if (first + i) % shares == share]


def compile_only(share: int, shares: int) -> None:
    """From now on a tuned kernel is compiled in this share's ways, and not run."""
    from triton.runtime.autotuner import Autotuner

    def run(self, *args, **kwargs):
        self.nargs = dict(zip(self.arg_names, args, strict=False))
        for config in of_share(self.base_fn.__name__, self.prune_configs(kwargs), share, shares):
            with contextlib.suppress(Exception):                      # (some do not compile: tuning leaves them out)
                self.fn.run(*args, **kwargs | {"warmup": True} | config.all_kwargs())

    Autotuner.run = run


def train_once() -> None:
    """Forward and backward of every recurrence: all kernels are met."""
    import torch
    import wkv

    import wkv7_cuda

    for its in wkv.RECURRENCES.values():
        start = time.monotonic()
        f = wkv7_cuda.load("fla", its.name)
        wkv.results(f, wkv.stateless(wkv.make(SHAPE, torch.bfloat16, "cuda", its=its)), False)
        torch.cuda.synchronize()
        print(f"fla {its.name}: {time.monotonic() - start:.0f} s", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--share", nargs=2, type=int, help=argparse.SUPPRESS)  # of a process that compiles: which, of n
    args = parser.parse_args()
    if importlib.util.find_spec("fla") is None:
        print("fla is not installed")
        return 0
    if args.share:
        compile_only(*args.share)
    else:
        shares = max(1, (os.cpu_count() or 1) - 2)
        start, words = time.monotonic(), [sys.executable, __file__, "--share"]
        compilers = [subprocess.Popen([*words, str(i), str(shares)], stdout=subprocess.DEVNULL) for i in range(shares)]
        failed = sum(process.wait() != 0 for process in compilers)
        print(f"{shares} processes, {failed} failed: {time.monotonic() - start:.0f} s", flush=True)
    train_once()
    return 0


if __name__ == "__main__":
    sys.exit(main())
