"""What quantising costs, and what PiSSA's start saves of it: QPiSSA beside LoftQ -> bench/results/qerror.json

    python bench/qerror.py                                            # about two minutes on two CPU cores

Matrices: those of a base trained here, the demonstration's (width 128, pooled by type over its layers), and synthetic
ones of 512 x 512. A row is one matrix type, rank, method and T, the number of singular value decompositions spent:

    QPiSSA-T   factors of W, then T-1 times: quantise what is left, take the factors of what that lost (`new_start`)
    LoftQ-T    T times: quantise W less the factors so far (none at first), take the factors of what that lost
               (arXiv 2310.08659, algorithm 1)

Both end with W ~ Q + B A. error is |W - (Q + B A)| / |W| in the Frobenius norm, plain that of nf4 alone; cut is
1 - error / plain, and nuclear_cut the same in the nuclear norm, the measure of PiSSA's paper (arXiv 2404.02948).
oracle is what QPiSSA-1 should come to by theory, plain * sqrt(1 - E_r), E_r the energy of the first r singular values.

And two codes of 8 bits at the same block of 64, without adapters: `int8`, and bitsandbytes' dynamic one, on gaussian
matrices in which 8 columns of 1024 are larger by a factor.
"""

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

import record
import torch
from torch import Tensor

import pissa_rwkv as P

RANKS, ITERATIONS, QUANT = (4, 8, 16, 32), (1, 2, 3, 4, 5), "nf4"
DECAYS = (0.3, 0.5, 0.8)


def trained_base(folder: Path) -> dict[str, list[Tensor]]:
    """The demonstration's base, as `pissa_rwkv.demo` makes it: matrix type -> the matrices of its layers."""
    cfg = P.Config(data_type="dummy", data_file="base", tokenizer="byte", vocab_size=128, ctx_len=96, micro_bsz=32,
                   val_split=0.1, grad_cp="0", peft="none", n_layer=2, n_embd=128, epoch_steps=300, warmup_steps=20,
                   lr_init=3e-3, lr_final=1.5e-4, accelerator="cpu", proj_dir=str(folder))
    run = P.build(cfg)
    P.train(run)
    found = {}
    for name, linear in P.adapted(run.model).items():
        found.setdefault(f"base {name.split('.', 2)[2]}", []).append(linear.weight.detach().clone())
    return found


def synthetic(n: int = 512, seed: int = 0) -> dict[str, list[Tensor]]:
    """Gaussian numbers; singular values i^-0.3, i^-0.5, i^-0.8; gaussian with eight columns ten times as large."""
    draw = torch.Generator().manual_seed(seed)
    gaussian = torch.randn(n, n, generator=draw)
    outliers = gaussian.clone()
    outliers[:, torch.randperm(n, generator=draw)[:8]] *= 10
    matrices = {"gaussian": [gaussian], "outlier columns": [outliers]}
    return matrices | {f"sigma i^-{decay}": [decaying(n, n, decay, draw)] for decay in DECAYS}


def decaying(outputs: int, inputs: int, decay: float, draw: torch.Generator) -> Tensor:
    """A matrix (out,in), out >= in, with random directions and the singular values i^-decay."""
    U, Vt = (torch.linalg.qr(torch.randn(rows, inputs, generator=draw)).Q for rows in (outputs, inputs))
    return U * torch.arange(1, inputs + 1.0).pow(-decay) @ Vt


def qpissa(W: Tensor, rank: int, T: int) -> Tensor:
    """Q + B A of QPiSSA with T decompositions."""
    cfg = P.Config(rank=rank, svd_niter=0, quant=QUANT, qpissa_iters=T)
    taken, start = P.new_start(W, W.dtype, cfg, torch.Generator())
    held = P.QUANT[QUANT].through(P.PiSSALinear.residual(W, taken), W.dtype)
    return held + P.PiSSALinear.delta(held, 1.0, **start)


def loftq(W: Tensor, rank: int, T: int) -> Tensor:
    """Q + B A of LoftQ with T decompositions."""
    BA = torch.zeros_like(W)
    for _ in range(T):
        Q = P.QUANT[QUANT].through(W - BA, W.dtype)
        U, sigma, Vt = P.top_singular(W - Q, rank, 0, torch.Generator())
        BA = U * sigma @ Vt
    return Q + BA


METHOD: dict[str, Callable[[Tensor, int, int], Tensor]] = {"QPiSSA": qpissa, "LoftQ": loftq}


def dynamic(W: Tensor) -> Tensor:
    """W through bitsandbytes' dynamic 8-bit code, the nearest level always, in blocks of 64."""
    blocks, levels = P.in_blocks(W, P.BLOCK), P.dynamic_levels(W.device)
    absmax = blocks.abs().amax(1)
    return (levels[P.nearest_level(blocks, absmax, levels)] * absmax[:, None]).view(W.shape)


def eight_bits(seed: int) -> list[dict]:
    """The error of both codes, by the factor of the outliers."""
    rows = []
    for factor in (1, 3, 5, 10, 20):
        W = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(seed))
        W[:, 5::128] *= factor
        for method, held in (("int8", P.QUANT["int8"].through(W, W.dtype)), ("dynamic", dynamic(W))):
            rows.append({"matrix": "8 of 1024 columns larger", "factor": factor, "method": method,
                         "error": frobenius([W - held]) / frobenius([W])})
    return rows


def frobenius(matrices: list[Tensor]) -> float:
    return sum(M.square().sum().item() for M in matrices) ** 0.5


def nuclear(matrices: list[Tensor]) -> float:
    return sum(torch.linalg.svdvals(M).sum().item() for M in matrices)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seed", type=int, default=0, help="of the synthetic matrices")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        matrices = trained_base(Path(folder) / "base") | synthetic(seed=args.seed)
    rows = eight_bits(args.seed)
    for name, Ws in matrices.items():
        plain = [W - P.QUANT[QUANT].through(W, W.dtype) for W in Ws]
        energy = [torch.linalg.svdvals(W).square() for W in Ws]
        for rank in RANKS:
            oracle = frobenius([E * (e[rank:].sum() / e.sum()).sqrt() for E, e in zip(plain, energy, strict=True)])
            for method, approximate in METHOD.items():
                for T in ITERATIONS:
                    lost = [W - approximate(W, rank, T) for W in Ws]
                    row = {"matrix": name, "quant": QUANT, "rank": rank, "method": method, "T": T,
                           "error": frobenius(lost) / frobenius(Ws), "plain": frobenius(plain) / frobenius(Ws),
                           "cut": 1 - frobenius(lost) / frobenius(plain),
                           "nuclear_cut": 1 - nuclear(lost) / nuclear(plain)}
                    if method == "QPiSSA" and T == 1:
                        row["oracle"] = oracle / frobenius(Ws)
                    rows.append(row)
        for method in METHOD:
            cuts = [f"{r['cut']:.1%}" for r in rows if (r["matrix"], r["method"], r.get("rank")) == (name, method, 8)]
            print(f"{name:<20} {method:<6} rank 8, T 1..5: less error than nf4 by {', '.join(cuts)}")
    print(record.write("qerror", rows))


if __name__ == "__main__":
    main()
