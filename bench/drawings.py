"""The picture for readers of the module -> bench/results/reading.svg

    python bench/drawings.py                # trains the demonstration's base first, a minute; needs the extra `plot`

Its numbers are computed: on the left a matrix of a trained base, taken apart by `pissa_rwkv.PiSSALinear`, on the right
what `pissa_rwkv.wkv6_ref` and `wkv7_ref` hold and read.
"""

import tempfile
from pathlib import Path

import qerror
import readme
import record
import torch
from torch import Tensor

import pissa_rwkv as P

RED, BLUE, GREY = "#c0392b", "#2c6fbb", "#999999"
RANK, MATRIX = 16, "base att.key"
N = 16                                                                # of the head that is drawn


def taken_apart(W: Tensor, rank: int) -> dict[str, Tensor]:
    """What becomes of W (out,in): name in the picture -> matrix."""
    start = P.PiSSALinear.start(W, P.Config(rank=rank, svd_niter=0), torch.Generator())
    return {"W": W, "W_res": P.PiSSALinear.residual(W, start), "B": start["lora_B"], "A": start["lora_A"]}


def bump(at: float, width: float = 1.2) -> Tensor:
    """A vector (N) of length 1, whose largest numbers stand around `at`."""
    x = torch.exp(-((torch.arange(N) - at) / width) ** 2 / 2)
    return x / x.norm()


KEYS = {"k": bump(4), "k'": bump(11)}
VALUES = {"v": bump(3), "v'": bump(8), "v''": bump(12)}
WRITES = [("k", "v"), ("k'", "v'"), ("k", "v''")]                     # the last one gives the first key another value
NO_DECAY = torch.full((N,), -30.0)                                    # the raw logit: d = 1 in fp32, for both rules


def sum_up(S: Tensor, r: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """A token of RWKV-6, without decay and bonus: what is read from S with r (N), and S with (k, v) written to it."""
    y, S = P.wkv6_ref(*(x.view(1, 1, 1, N) for x in (r, NO_DECAY, k, v)), torch.zeros(1, N), S)
    return y.flatten(), S


def replace(S: Tensor, r: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The same of RWKV-7, with the key itself as removal key (kappa = k) and learning rate eta = 1."""
    y, S = P.wkv7_ref(*(x.view(1, 1, 1, N) for x in (r, NO_DECAY, k, v, -k, k)), S)
    return y.flatten(), S


RULES = {  # what a token does to S -> its name and equation
    sum_up: ("RWKV-5, 6: values add up", r"$S_t = S_{t-1}\,\mathrm{diag}(d) + v\,k^{\mathsf{T}}$"),
    replace: ("RWKV-7: the old value is taken out first",
              r"$S_t = S_{t-1}\,\mathrm{diag}(d) + (S_{t-1}a)\,b^{\mathsf{T}} + v\,k^{\mathsf{T}}$"),
}


def memories(token) -> tuple[list[Tensor], Tensor]:
    """The memory (N value,N key) after each of WRITES, and what the first key reads in the end (N)."""
    S, nothing, after = torch.zeros(1, 1, N, N), torch.zeros(N), []
    for key, value in WRITES:
        _, S = token(S, nothing, KEYS[key], VALUES[value])
        after.append(S[0, 0])
    return after, token(S, KEYS[WRITES[-1][0]], nothing, nothing)[0]


def reading_picture(W: Tensor) -> Path:
    """reading.svg: on the left PiSSA's parts of W and W's singular values, on the right the two rules of a memory."""
    figure = readme.pyplot().figure(figsize=(9, 5))
    draw_pissa(figure, taken_apart(W, RANK))
    for row, (token, (name, equation)) in enumerate(RULES.items()):
        draw_memory(figure, 2.4 - 2.05 * row, token, name, equation)
    words(figure, 4.9, 4.72, "The memory of a head", 12, fontweight="bold")
    words(figure, 4.9, 0.35, r"$a = -\kappa$, $b = \kappa\,\eta$; here $\kappa = k$, $\eta = 1$, and $d = 1$: nothing"
                             " fades", 9)
    path = record.RESULTS / "reading.svg"
    figure.savefig(path, metadata={"Date": None})
    return path


def panel(figure, x: float, y: float, width: float, height: float):
    """Axes at a place in inches, from the lower left."""
    w, h = figure.get_size_inches()
    return figure.add_axes((x / w, y / h, width / w, height / h))


def words(figure, x: float, y: float, text: str, size: float = 9, **look) -> None:
    w, h = figure.get_size_inches()
    figure.text(x / w, y / h, text, fontsize=size, **look)


def heat(ax, M: Tensor, most: float) -> None:
    """A matrix in 7 colours from -most to most; one point of the image a number."""
    from matplotlib import colormaps

    ax.imshow(M.numpy(), colormaps["RdBu_r"].resampled(7), vmin=-most, vmax=most, interpolation="none", aspect="auto")
    ax.set_xticks([])
    ax.set_yticks([])
    for side in ax.spines.values():
        side.set(linewidth=0.6, color=GREY)


def draw_pissa(figure, parts: dict[str, Tensor]) -> None:
    W, (outputs, inputs) = parts["W"], parts["W"].shape
    words(figure, 0.25, 4.72, "PiSSA", 12, fontweight="bold")
    words(figure, 0.9, 4.72, r"$W = W_\mathrm{res} + B A$,   $A = \sqrt{\sigma}\,V^{\mathsf{T}}$,"
                             r"  $B = U\sqrt{\sigma}$", 10)
    size, thin = 1.15, 1.15 * RANK / inputs
    top = 4.2 - size
    places = {"W": (0.25, top, size, size), "W_res": (1.68, top, size, size), "B": (3.11, top, thin, size),
              "A": (3.36, top + size - thin, size, thin)}
    said = {"W": ("$W$", f"{outputs} x {inputs}"), "W_res": (r"$W_\mathrm{res}$", "frozen"), "B": ("$B$", ""),
            "A": ("$A$", "")}
    for name, (x, y, width, height) in places.items():
        M = parts[name]
        heat(panel(figure, x, y, width, height), M, 3 * (W if name in ("W", "W_res") else M).std().item())
        words(figure, x + width / 2, y + height + 0.06, said[name][0], 10, ha="center")
        words(figure, x + width / 2, y - 0.17, said[name][1], 8, ha="center", color="#555555")
    for x, sign in ((1.54, "="), (2.97, "+")):
        words(figure, x, top + size / 2, sign, 12, ha="center", va="center")
    words(figure, 3.42, top + 0.3, f"trained: {outputs} x {RANK}\nand {RANK} x {inputs}", 8, color=RED)
    words(figure, 0.25, 2.58, r"$y = x\,W_\mathrm{res}^{\mathsf{T}} + x A^{\mathsf{T}} B^{\mathsf{T}}$:"
                              r" at first the same as $x\,W^{\mathsf{T}}$", 9)
    sigma = torch.linalg.svdvals(W)
    share = (sigma[:RANK].square().sum() / sigma.square().sum()).item()
    ax = panel(figure, 0.55, 0.5, 3.95, 1.85)
    edges = torch.arange(len(sigma) + 1) + 0.5
    ax.stairs(sigma[:RANK], edges[:RANK + 1], fill=True, color=RED)
    ax.stairs(sigma[RANK:], edges[RANK:], fill=True, color="#bbbbbb")
    ax.set(xlim=(0, len(sigma) + 1), ylim=(0, None))
    ax.set_xlabel("singular value, by size", fontsize=9)
    ax.tick_params(labelsize=8)
    ax.spines[["top", "right"]].set_visible(False)
    ax.text(RANK + 3, 0.75 * sigma[0].item(), f"the first {RANK} of {len(sigma)} hold {share:.0%}\nof $|W|^2$: they are"
                                              " trained", color=RED, fontsize=9)
    ax.text(0.6 * len(sigma), 1.25 * sigma[len(sigma) // 2].item(), "the rest is frozen", color="#666666", fontsize=9)


def draw_memory(figure, y: float, token, name: str, equation: str) -> None:
    """One rule: the memory after each write, and what is read in the end."""
    left, size, step = 4.95, 0.95, 1.05
    words(figure, left - 0.05, y + 1.98, name, 9, color=BLUE)
    words(figure, left - 0.05, y + 1.74, equation, 9)
    after, read = memories(token)
    for column, (S, (key, value)) in enumerate(zip(after, WRITES, strict=True)):
        ax = panel(figure, left + column * step, y + 0.5, size, size)
        heat(ax, S, 0.35)
        ax.set_title(f"${key} \\to {value}$", fontsize=9, pad=3)
    words(figure, left - 0.09, y + 0.5 + size / 2, "value", 7, rotation=90, ha="center", va="center", color="#555555")
    words(figure, left + size / 2, y + 0.36, "key", 7, ha="center", color="#555555")
    ax = panel(figure, left + 3 * step + 0.02, y + 0.5, 0.72, size)
    look = dict(edges=torch.arange(N + 1) - 0.5, orientation="horizontal")
    ax.stairs(read, fill=True, color=BLUE, alpha=0.6, **look)
    ax.stairs(VALUES[WRITES[-1][1]], color="black", linewidth=1, **look)
    ax.set(xlim=(0, 0.75), ylim=(N - 0.5, -0.5), xticks=[], yticks=[])
    ax.set_title("$S_t k$", fontsize=9, pad=3)
    ax.spines[["top", "right", "bottom"]].set_visible(False)
    words(figure, left + 3 * step + 0.02, y + 0.36, "read", 7, color=BLUE)
    words(figure, left + 3 * step + 0.32, y + 0.36, "wanted", 7)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        matrices = qerror.trained_base(Path(folder) / "base")
    print(reading_picture(matrices[MATRIX][0]))


if __name__ == "__main__":
    main()
