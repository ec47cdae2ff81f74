"""The fast SVD of PiSSA's start: seconds and error against `--svd_niter` -> bench/results/svd.json

    python bench/svd.py                                               # about three minutes on two quiet CPU cores
    python bench/svd.py --only "8192 x 2048"                          # these matrices again; other rows are kept

Matrices: those of the demonstration's base, trained here (width 128, attention's and channel mixing's), and synthetic
ones with the shapes of RWKV7-1.5B and singular values i^-0.3, i^-0.5, i^-0.8. A row is one kind of matrix, rank r and
niter; niter 0 is the exact SVD, U diag(sigma) Vt is what `pissa_rwkv.top_singular` returns, best its exact counterpart:

    seconds    of one matrix, the median of three calls; the exact SVD is called once, for it takes long
    excess     |W - U diag(sigma) Vt| / |W - best| - 1: what PiSSA leaves frozen, beside the least that rank r can leave
    off        |U diag(sigma) Vt - best| / |best|: how far the B A that training starts at is from the exact one

in the Frobenius norm, the largest of three draws and of all matrices of the kind. Both are the same for every rotation
and sign of the factors, which leave B A as it is: A and B by themselves are not determined by W.
"""

import argparse
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

import qerror
import record
import torch
from torch import Tensor

import pissa_rwkv as P

RANKS, NITERS, DRAWS, THREADS = (8, 32, 128), (1, 2, 4, 8, 16), 3, 2
BASE = ("base att", "base ffn")
SHAPES = ((2048, 2048), (8192, 2048))                                 # of RWKV7-1.5B: att, and ffn.key


def base_matrices() -> dict[str, list[Tensor]]:
    """The base's, in two kinds; all of a kind have one shape, or its transpose."""
    with tempfile.TemporaryDirectory() as folder:
        base = qerror.trained_base(Path(folder) / "base")
    return {kind: [W for name, Ws in base.items() if name.startswith(f"{kind}.") for W in Ws] for kind in BASE}


def synthetic(outputs: int, inputs: int, decay: float, seed: int) -> list[Tensor]:
    return [qerror.decaying(outputs, inputs, decay, torch.Generator().manual_seed(seed))]


def timed(W: Tensor, rank: int, niter: int, seed: int) -> tuple[float, tuple[Tensor, Tensor, Tensor]]:
    began = time.perf_counter()
    factors = P.top_singular(W, rank, niter, torch.Generator().manual_seed(seed))
    return time.perf_counter() - began, factors


def product(U: Tensor, sigma: Tensor, Vt: Tensor, rank: int) -> Tensor:
    return U[:, :rank] * sigma[:rank] @ Vt[:rank]


def norm(x: Tensor) -> float:
    return x.double().norm().item()


def rows_of(kind: str, Ws: list[Tensor]) -> list[dict]:
    """The rows of one kind, for the ranks below its full one."""
    exact = [timed(W, min(W.shape), 0, 0) for W in Ws]
    rows = []
    for rank in (r for r in RANKS if r < min(Ws[0].shape)):
        about = {"matrix": kind, "shape": [*Ws[0].shape], "rank": rank}
        bests = [product(*factors, rank) for _, factors in exact]
        rows.append(about | {"niter": 0, "seconds": statistics.median(s for s, _ in exact), "excess": 0.0, "off": 0.0})
        for niter in NITERS:
            seconds, excess, off = [], [], []
            for W, best in zip(Ws, bests, strict=True):
                for seed in range(DRAWS):
                    took, factors = timed(W, rank, niter, seed)
                    BA = product(*factors, rank)
                    seconds.append(took)
                    excess.append(norm(W - BA) / norm(W - best) - 1)
                    off.append(norm(BA - best) / norm(best))
            rows.append(about | {"niter": niter, "seconds": statistics.median(seconds), "excess": max(excess),
                                 "off": max(off)})
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seed", type=int, default=0, help="of the synthetic matrices")
    parser.add_argument("--only", default="", help="measure the kinds whose name has this in it")
    args = parser.parse_args(argv)
    torch.set_num_threads(THREADS)
    makers = {f"sigma i^-{decay}, {shape[0]} x {shape[1]}": partial(synthetic, *shape, decay, args.seed)
              for shape in SHAPES for decay in qerror.DECAYS}  # fmt: skip
    if any(args.only in kind for kind in BASE):
        makers = {kind: lambda Ws=Ws: Ws for kind, Ws in base_matrices().items()} | makers
    for niter in (0, 1):                                              # the first call of a LAPACK is slow
        timed(torch.randn(512, 512), 8, niter, 0)
    path = record.RESULTS / "svd.json"
    for kind in (kind for kind in makers if args.only in kind):
        rows = [{**row, **record.circumstances()} for row in rows_of(kind, makers[kind]())]
        for r in rows:
            print("{matrix:<28} rank {rank:>3}, niter {niter:>2}: {seconds:8.4f} s, excess {excess:.1e}, off {off:.1e},"
                  " load {load}".format(**r), flush=True)
        record.update(path, rows, ("matrix", "rank", "niter"))
    print(path)


if __name__ == "__main__":
    main()
