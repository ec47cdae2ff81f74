"""Writes README's tables and pictures from bench/results and from the module.

    python bench/readme.py          # pictures need the extra `plot`

A table stands in README between `<!-- NAME -->` and `<!-- /NAME -->`; here a function of that name makes it.
"""

import re
from dataclasses import fields

import record
import torch

import pissa_rwkv as P

README = record.ROOT / "README.md"


def demo() -> str:
    """The last screen of the demonstration, from what `bench/demo.py` recorded."""
    r = record.read("demo")[-1]
    return f"```\n{r['output']}\n```\n\n{r['seconds']:.0f} seconds. {source([r])}"


def options() -> str:
    lines = ["| option | default | what |", "|---|---|---|"]
    for f in fields(P.Config):
        shown = {tuple: " ".join, bool: int, float: "{:g}".format}.get(type(f.default), str)(f.default)
        shown = "" if f.default in ("", 0, False) else shown
        also = f" (also `--{f.metadata['also']}`)" if f.metadata["also"] else ""
        lines.append(f"| `--{f.name}` | {shown} | {f.metadata['help'].replace('|', '&#124;')}{also} |")
    return "\n".join(lines)


def sections() -> str:
    """The numbered sections of the module, with the line each begins at."""
    lines = ["| section | line | |", "|---|---|---|"]
    for number, line in enumerate((record.ROOT / "pissa_rwkv.py").read_text("utf-8").splitlines(), 1):
        if m := re.match(r"# (\d+)\. ([^.:]+)[.:] ?(.*)", line):
            lines.append(f"| {m[1]} {m[2]} | [{number}](pissa_rwkv.py#L{number}) | {WHAT[int(m[1])]} |")
    return "\n".join(lines)


WHAT = {
    1: "a command line from a dataclass", 2: "the delta rule as a recurrence, 15 lines",
    3: "time mixing, channel mixing, state as an argument", 4: "nf4 and int8, bit by bit",
    5: "the randomised SVD, PiSSA, QPiSSA, LoRA", 6: "nine lines a reader; rows as spans of one stream",
    7: "cross-entropy that never holds the logits", 8: "AdamW by hand on one flat buffer",
    9: "atomic files, the merge formula", 10: "a loop of fifteen lines, and resuming to the bit",
}


def ops() -> str:
    rows = record.read("wkv-cpu")
    lines = ["| op | (B,T,heads) | forward, ms | forward + backward, ms | speed-up | largest error |", "|---" * 6 + "|"]
    for r in rows:
        lines.append(f"| `{r['op']}` | {', '.join(map(str, r['shape']))} | {r['forward_ms']:.2f} | {r['both_ms']:.2f} |"
                     f" {r['ratio']:.1f} | {max(r['error'].values()):.0e} |")
    return "\n".join(lines) + f"\n\n{source(rows)} CUDA: not yet measured."


def learning() -> str:
    rows = record.read("pissa_vs_lora")
    rates = sorted({r["lr"] for r in rows if r["method"] in ("pissa", "lora")})
    after = {(r["method"], r["lr"]): r["after"] for r in rows}
    lines = ["| learning rate | " + " | ".join(f"{lr:g}" for lr in rates) + " |", "|---" * (len(rates) + 1) + "|"]
    for method, name in (("pissa", "PiSSA"), ("lora", "LoRA")):
        cells = [f"{after[method, lr]:.3f}" for lr in rates]
        best = min(range(len(cells)), key=lambda i: cells[i])
        cells[best] = f"**{cells[best]}**"
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    before = next(r["before"] for r in rows if r["method"] == "pissa")
    return "\n".join(lines) + f"\n\nThe base has {before:.3f}. {source(rows)}"


def quants() -> str:
    """The rows of QUANT, with their size and error measured on the spot."""
    W = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0))
    lines = ["| `--quant` | bits a weight | error, gaussian W | what |", "|---|---|---|---|"]
    for name, quant in P.QUANT.items():
        bits = 8 * sum(part.nbytes for part in quant.hold(W, torch.bfloat16).values()) / W.numel()
        error = (quant.through(W, torch.bfloat16) - W).norm() / W.norm()
        lines.append(f"| `{name}` | {bits:.4g} | {error:.2%} | {HELD[name]} |")
    return "\n".join(lines)


HELD = {
    "none": "the compute dtype, here bf16",
    "int8": "64 weights share a scale, max / 127 in fp16",
    "nf4": "bitsandbytes' format: 16 levels, 64 weights share an absmax in fp32",
    "nf4dq": "the same, the absmax in 8 bits (double quantisation)",
}


def qerror() -> str:
    """By how much QPiSSA and LoftQ lessen nf4's error; the better of two in bold."""
    rows = [r for r in record.read("qerror") if "T" in r]
    at = {(r["matrix"], r["rank"], r["T"], r["method"]): r for r in rows}
    columns = [(8, 1, "cut"), (8, 2, "cut"), (8, 5, "cut"), (8, 5, "nuclear_cut"), (32, 1, "cut"), (32, 5, "cut")]
    heads = [f"r {r}, T {T}{', nuclear' if kind == 'nuclear_cut' else ''}" for r, T, kind in columns]
    lines = ["| matrix | nf4's error | QPiSSA-1, r 8 (theory) | " + " | ".join(heads) + " |",
             "|---" * (len(heads) + 3) + "|"]
    for name in dict.fromkeys(r["matrix"] for r in rows):
        first = at[name, 8, 1, "QPiSSA"]
        cells = [f"{first['plain']:.4f}", f"{first['error']:.4f} ({first['oracle']:.4f})"]
        for rank, T, kind in columns:
            q, loft = (at[name, rank, T, method][kind] for method in ("QPiSSA", "LoftQ"))
            cells.append(f"**{q:.1%}** / {loft:.1%}" if q > loft else f"{q:.1%} / **{loft:.1%}**")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    pairs = [(r["cut"], at[r["matrix"], r["rank"], r["T"], "LoftQ"]["cut"], r) for r in rows if r["method"] == "QPiSSA"]
    won = sorted({r["matrix"] for q, loft, r in pairs if loft > q})
    return "\n".join(lines) + (f"\n\nOf all {len(pairs)} pairs (rank 4 to 32, T 1 to 5) QPiSSA errs less in"
                               f" {sum(q > loft for q, loft, _ in pairs)}; LoftQ wins on: {', '.join(won)}."
                               f" {source(rows)}")


def int8() -> str:
    rows = [r for r in record.read("qerror") if "factor" in r]
    factors = sorted({r["factor"] for r in rows})
    lines = ["| 8 of 1024 columns larger by | " + " | ".join(f"x{f}" for f in factors) + " |",
             "|---" * (len(factors) + 1) + "|"]
    for method, name in (("int8", "`int8`"), ("dynamic", "bitsandbytes' 8-bit code, block 64")):
        errors = [next(r["error"] for r in rows if (r["method"], r["factor"]) == (method, f)) for f in factors]
        lines.append(f"| {name} | " + " | ".join(f"{e:.2%}" for e in errors) + " |")
    return "\n".join(lines)


def source(rows: list[dict]) -> str:
    r = rows[0]
    return f"({r['machine']}, {r['threads']} threads, torch {r['torch']}, commit {r['commit']}, {r['date']}.)"


def reliability() -> str:
    r = record.read("reliability")[-1]
    return (f"{r['kills']} times a run that saves at every step was killed with SIGKILL at a random moment,"
            f" {r['kills_while_writing']} times while it wrote a file: {r['unreadable_files']} unreadable files,"
            f" {r['failed_resumes']} failed resumes, and of {r['finished_runs']} runs that were resumed to their end,"
            f" {r['diverged_runs']} with other losses or weights than the undisturbed run, to the bit. {source([r])}")


TABLES = (demo, options, sections, ops, learning, reliability, quants, qerror, int8)


def filled(text: str) -> str:
    """README with its tables made anew."""
    for table in TABLES:
        name = table.__name__
        before, begin, rest = text.partition(f"<!-- {name} -->\n")
        _, end, after = rest.partition(f"<!-- /{name} -->")
        assert begin and end, f"README has no place for {name}"
        text = f"{before}{begin}{table()}\n{end}{after}"
    return text


def picture() -> None:
    """loss.svg: every step's loss of PiSSA and LoRA at one learning rate; held-out loss against the learning rate."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "pissa_rwkv"  # the same figures give the same file
    from matplotlib import pyplot as plt

    rows = [r for r in record.read("pissa_vs_lora") if r["method"] in ("pissa", "lora")]
    style = {"pissa": dict(color="#c0392b", label="PiSSA"), "lora": dict(color="#2c6fbb", label="LoRA")}
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), constrained_layout=True)
    for r in rows:
        if r["lr"] == SHOWN_RATE:
            left.plot(r["losses"], **style[r["method"]])
    left.set(xlabel="step", ylabel="training loss (nats per byte)", title=f"rank 8, learning rate {SHOWN_RATE:g}")
    for method, look in style.items():
        points = sorted((r["lr"], r["after"]) for r in rows if r["method"] == method)
        right.plot(*zip(*points, strict=True), marker="o", **look)
    right.set(xscale="log", xlabel="learning rate", ylabel="nats per byte", title="held-out loss after 60 steps")
    for axes in (left, right):
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(record.RESULTS / "loss.svg", metadata={"Date": None})


SHOWN_RATE = 2e-3


if __name__ == "__main__":
    picture()
    README.write_text(filled(README.read_text("utf-8")), "utf-8")
