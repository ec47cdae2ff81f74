"""Writes README's tables and pictures from bench/results and from the module.

    python bench/readme.py          # pictures need the extra `plot`

A table stands in README between `<!-- NAME -->` and `<!-- /NAME -->`; here a function of that name makes it.
"""

import ast
import re
import statistics
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path

import curves
import record
import scaling
import torch
import vram
import wkv

import merge
import pissa_rwkv as P

README, OPS_README = record.ROOT / "README.md", record.ROOT / "wkv7_cuda" / "README.md"
CHINESE = record.ROOT / "README.zh.md"


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
    lines = ["| section | line | what is there | the question it answers |", "|---|---|---|---|"]
    for number, line in enumerate((record.ROOT / "pissa_rwkv.py").read_text("utf-8").splitlines(), 1):
        if m := re.match(r"# (\d+)\. ([^.:]+)[.:] ?(.*)", line):
            what, question = WHAT[int(m[1])]
            lines.append(f"| {m[1]} {m[2]} | {place(number)} | {what} | {question} |")
    return "\n".join(lines)


def place(number: int) -> str:
    return f"[{number}](pissa_rwkv.py#L{number})"


WHAT = {
    1: ("a command line from a dataclass", "How do options, their checks and README's table come from one definition?"),
    2: ("two recurrences, 15 lines each: a fading memory, and the delta rule",
        "How does a memory of fixed size replace what it holds under a key?"),
    3: ("time mixing, channel mixing, state as an argument",
        "What does a token pass through, and how is a model recognised from its file?"),
    4: ("nf4 and int8, bit by bit", "How does a weight fit into four bits, and what does backward multiply by?"),
    5: ("the randomised SVD, PiSSA, QPiSSA, LoRA, Bone; state tuning",
        "Where do A and B start, and why does that change nothing at first?"),
    6: ("a reader for each kind of file; rows as spans of one stream",
        "How do texts of any length become rows, and which of their tokens are learnt?"),
    7: ("cross-entropy that never holds the logits", "How are 65536 logits per token used without being kept?"),
    8: ("AdamW by hand on one flat buffer", "What does an optimiser hold, and how do several GPUs divide it?"),
    9: ("atomic files, the merge formula",
        "What prevents half-written files, and merging into the wrong base?"),
    10: ("the loop, and bit-exact resuming",
         "What is a step, and what must be saved so that the next one is the same?"),
}


def order() -> str:
    """What to read first, with lines and lengths as they are now."""
    tree = ast.parse((record.ROOT / "pissa_rwkv.py").read_text("utf-8"))
    found = {node.name: node for node in tree.body if isinstance(node, (ast.ClassDef, ast.FunctionDef))}
    lines, total = ["| | read | lines | what you see |", "|---|---|---|---|"], 0
    for step, (names, what) in enumerate(PATH.items(), 1):
        nodes = [found[name] for name in names.split()]
        length = sum(node.end_lineno - node.lineno + 1 for node in nodes)
        links = ", ".join(f"[`{node.name}`](pissa_rwkv.py#L{node.lineno})" for node in nodes)
        lines.append(f"| {step} | {links} | {length} | {what} |")
        total += length
    return "\n".join(lines) + f"\n\nThe mathematics is {total} lines in all."


PATH = {  # names of the module, in an order to read them in -> what one sees there
    "wkv6_ref wkv7_ref": "the memory, first as a sum, then with the delta rule: the right half of the picture",
    "TimeMix TimeMix_x070": "how r, w, k, v, a, b come from tokens: what all versions share, and what RWKV-7 adds",
    "ChannelMix ChannelMix_x070 Block": "the other half of a layer, and how state passes from chunk to chunk",
    "top_singular LoRALinear PiSSALinear": "the adapter, and what it starts from: the left half of the picture",
    "HeadLoss": "a gradient written by hand",
    "train_step": "one step on one screen",
}


def tutorial() -> str:
    """The options of RWKV-PEFT and its PiSSA tutorial, and what they are called here."""
    also = {f.metadata["also"]: f.name for f in fields(P.Config) if f.metadata["also"]}
    same = [name for name in TUTORIAL.split() if name in P.Config.__dataclass_fields__ and name not in P.JSON_OPTIONS]
    lines = ["| the tutorial's | here | |", "|---|---|---|", "| `python train.py` | `torchrun pissa_rwkv.py` | |",
             f"| {flags(same)} | the same | options that the base file determines may be omitted |",
             "| `--grad_cp` as accumulation | `--accumulate_grad_batches` | `--grad_cp` is gradient checkpointing |"]
    lines += [f"| `--{theirs}` | `--{ours}` | either name works |" for theirs, ours in also.items()]
    for option, keys in P.JSON_OPTIONS.items():
        shown = {name: key for key, name in reversed(keys.items())}   # (of two keys for one option the first)
        names = sorted(shown, key=[*keys.values()].index)
        lines.append(f"| `--{option}`: {' '.join(f'`{shown[name]}`' for name in names)} | {flags(names)} |"
                     " either works; JSON takes precedence |")
    lines.append(f"| `--fla` | `--op {P.parse(['--fla']).op}` | either works |")
    lines += [f"| `--peft {name}` | `--peft {P.parse(['--peft', name]).peft}` | either works |"
              for name in ("disha", "miss")]  # fmt: skip
    stages = {stage: name for name, stage in P.STAGE.items() if name.startswith("zero")}
    lines += [f"| `--strategy {name}` | `--strategy {stages[stage]}` | either works; DeepSpeed is not needed |"
              for name, stage in P.STAGE.items() if name.startswith("deepspeed")]  # fmt: skip
    for action in merge.parser()._actions:
        if theirs := [f"`{name}`" for name in action.option_strings[1:] if action.dest != "help"]:
            lines.append(f"| `merge.py`: {' '.join(theirs)} | `{action.option_strings[0]}` | any of them works |")
    grouped = {}
    for name, reason in P.WITHOUT_EFFECT.items():
        grouped.setdefault(re.sub(r"(--\w+)", r"`\1`", reason), []).append(name)
    lines += [f"| {flags(names)} | no effect | {reason} |" for reason, names in grouped.items()]
    return "\n".join(lines)


def flags(names: Iterable[str]) -> str:
    return " ".join(f"`--{name}`" for name in names)


TUTORIAL = """load_model proj_dir data_file n_layer n_embd micro_bsz epoch_save epoch_steps ctx_len pissa_config
data_type vocab_size epoch_count epoch_begin pre_ffn head_qk lr_init lr_final warmup_steps beta1 beta2
adam_eps accelerator devices precision strategy grad_cp my_testing dataload loss_mask fla op peft quant
train_parts wandb lr_schedule"""


def ops() -> str:
    """The operators on one shape per device, and the picture."""
    parts = [wkv_table(device, wkv_shapes(device)[:1]) for device in ("cuda", "cpu")]
    return "\n\n".join([*parts, wkv_caption("bench/results/wkv.svg")])


def measured() -> str:
    """The same on all shapes, for the operators' own README; errors by regime."""
    parts = [part for device in ("cuda", "cpu") for part in
             (wkv_table(device, wkv_shapes(device)), regimes_table(device)) if part]  # fmt: skip
    return "\n\n".join([*parts, wkv_caption("../bench/results/wkv.svg")])


ON = {"cuda": "On a GPU", "cpu": "On a CPU"}
AGAINST = {"cuda": ("sequential", "fla"), "cpu": ("torch",)}  # whose time is divided by an operator's


def wkv6() -> str:
    """The operators of WKV-6, on a GPU."""
    return wkv_table("cuda", wkv_shapes("cuda", "wkv6"), "wkv6")


def dequantising() -> str:
    """The kernel that reads quantised matrices, beside a copy of as many bytes, and PyTorch's reader."""
    rows = of_last_machine(record.read("dequant-cuda"))
    if not rows:
        return f"{ON['cuda']}: not yet measured."
    lines = ["| matrix | format | into | kernel, us | GB/s | share of a copy's | PyTorch, us |", "|---" * 7 + "|"]
    lines += [f"| {' x '.join(map(str, r['matrix']))} | {r['quant']} | {r['dtype']} | {short(r['kernel_us'])} |"
              f" {short(r['kernel_gb_s'])} | {r['share']:.0%} | {short(r['plain_us'])} |" for r in rows]
    return "\n".join(lines) + f"\n\n{ON['cuda']}. {sources(rows)}"


def wkv_rows(device: str, recurrence: str = "wkv") -> list[dict]:
    """The rows of the machine measured last, without those that only say what does not run there at all."""
    return [r for r in of_last_machine(record.read(f"{recurrence}-{device}")) if r["shape"]]


def wkv_shapes(device: str, recurrence: str = "wkv") -> list[tuple]:
    """(shape, dtype) of all timings but those for the picture alone."""
    have = {(tuple(r["shape"]), r["dtype"]) for r in wkv_rows(device, recurrence) if not r["regime"]}
    return [x for dtype in ("bfloat16", "float32") for shape in wkv.tabled(device) if (x := (shape, dtype)) in have]


def wkv_table(device: str, shapes: list[tuple], recurrence: str = "wkv") -> str:
    if not shapes:
        return f"{ON[device]}: not yet measured."
    rows = wkv_rows(device, recurrence)
    shown = [r for shape in shapes for r in rows if (tuple(r["shape"]), r["dtype"]) == shape and not r["regime"]]
    others = [name for name in AGAINST[device] if any(name in r.get("faster_than", ()) for r in shown)]
    lines = ["| op | (B,T,heads) | dtype | forward, ms | forward + backward, ms | share of the floor's speed | "
             + "".join(f"times faster than `{name}` | " for name in others)
             + "error of y, of the worst gradient |", "|---" * (7 + len(others)) + "|"]  # fmt: skip
    for r in shown:
        first = f"| `{r['op']}` | {', '.join(map(str, r['shape']))} | {r['dtype']} |"
        if r["failed"]:
            lines.append(f"{first} {r['failed'].replace('|', '&#124;')} |" + " |" * (4 + len(others)))
            continue
        share = r["rates"]["both"]["floor_ms"] / wkv.best(r, "both")
        ratios = "".join((short(r["faster_than"][name]) if name in r["faster_than"] else "") + " | " for name in others)
        lines.append(f"{first} {short(wkv.best(r, 'forward'))} | {short(wkv.best(r, 'both'))} | {share:.1%} | "
                     f"{ratios}{wkv_error(r)} |")  # fmt: skip
    return "\n".join(lines) + f"\n\n{ON[device]}. {sources(shown)}"


def regimes_table(device: str) -> str:
    rows = [r for r in wkv_rows(device) if r["regime"] and not r["failed"]]
    if not rows:
        return ""
    cells = {(r["op"], r["dtype"], r["regime"]): wkv_error(r) for r in rows}
    lines = ["| error of y, of the worst gradient | dtype | " + " | ".join(wkv.REGIMES) + " |",
             "|---" * (2 + len(wkv.REGIMES)) + "|"]  # fmt: skip
    for op, dtype in dict.fromkeys((op, dtype) for op, dtype, _ in cells):
        lines.append(f"| `{op}` | {dtype} | " + " | ".join(cells.get((op, dtype, x), "") for x in wkv.REGIMES) + " |")
    return "\n".join(lines) + f"\n\n{ON[device]}. {sources(rows)}"


def short(x: float) -> str:
    """Three significant digits, more where the whole part has more, never an exponent."""
    return f"{x:.3g}" if x < 999.5 else f"{x:.0f}"


def wkv_error(row: dict) -> str:
    return f"{row['error']['y']:.0e}, {max(e for name, e in row['error'].items() if name != 'y'):.0e}"


def wkv_caption(path: str) -> str:
    device, rows = wkv_curves()
    if not rows:
        return "No picture yet: `python bench/wkv.py` measures it."
    return (f"![Time of forward and backward against the number of tokens, one line per operator]({path})\n\n"
            f"*Forward + backward, B = 1, {rows[0]['shape'][2]} heads, {rows[0]['dtype']}; dashed: the time to move "
            f"inputs and outputs. `python bench/wkv.py --device {device} --threads {rows[0]['threads']}`; "
            f"{sources(rows)[1:-1]}*")  # fmt: skip


def wkv_curves() -> tuple[str, list[dict]]:
    """The device of the picture, a GPU if there is one, and its rows: B = 1, one number of heads, every T."""
    for device in ("cuda", "cpu"):
        rows = [r for r in wkv_rows(device) if not r["regime"] and not r["failed"]
                and r["shape"][0] == 1 and r["shape"][2] == wkv.CURVE_HEADS[device]]  # fmt: skip
        if rows:
            return device, [r for r in rows if r["dtype"] == rows[0]["dtype"]]
    return "cpu", []


def sources(rows: list[dict]) -> str:
    """`source` of rows that may come from several commits and days; the load average while they were measured."""
    commits, dates = (", ".join(dict.fromkeys(r[name] for r in rows)) for name in ("commit", "date"))
    low, high = (f(r["load"] for r in rows) for f in (min, max))
    r = rows[0]
    return f"({r['machine']}, {threads(r)}, load {low} to {high}, torch {r['torch']}, commit {commits}, {dates}.)"


def threads(r: dict) -> str:
    return f"{r['threads']} thread{'s' * (r['threads'] != 1)}"


def learnt() -> list[dict]:
    """The runs of `bench/curves.py` that belong together: on the small size's last base."""
    rows = record.read("curves-small")
    return [r for r in rows if r["base"] == rows[-1]["base"] and r["name"] != "base"]


def learning() -> str:
    """Every method at its own best rate and at the one for all; what the sweep found."""
    rows = learnt()
    found = {name: s for name, s in curves.summary(rows).items() if "equal" in s}
    equal = found[curves.EQUAL]["equal"]["lr"]
    lines = ["| method | trained numbers | best rate | held-out loss there | held-out loss at the shared rate,"
             f" {equal:g} | gradient norm there, steps 1 to 10 |", "|---|---|---|---|---|---|"]
    for name, s in found.items():
        at = [f"{s[which]['mean']:.4f} ± {s[which]['sd']:.4f}" for which in ("best", "equal")]
        lines.append(f"| {NAMED[name]} | {s['trained']:,} | {s['best']['lr']:g} | {' | '.join(at)} |"
                     f" {s['equal']['norm10']:.2f} |")
    rates = sorted({lr for s in found.values() for lr in s["sweep"]})
    swept = ["| method | " + " | ".join(f"{lr:g}" for lr in rates) + " |", "|---" * (len(rates) + 1) + "|"]
    for name, s in found.items():
        cells = [f"{s['sweep'][lr]:.3f}" if lr in s["sweep"] else "" for lr in rates]
        best = rates.index(s["best"]["lr"])
        cells[best] = f"**{cells[best]}**"
        swept.append(f"| {NAMED[name]} | " + " | ".join(cells) + " |")
    first, seeds = rows[0], found[curves.EQUAL]["equal"]["n"]
    return ("\n".join(lines) + f"\n\nMean ± standard deviation over {seeds} seeds; the base starts at"
            f" {found['pissa']['before']:.4f}. {versus(found)}\n\nThe sweep, with one seed:\n\n" + "\n".join(swept)
            + f"\n\nNats per byte after {first['steps']} steps of {first['micro_bsz']} rows of {first['ctx_len']}"
            f" bytes, rank {first['rank']}. `python bench/curves.py`; {source(rows)[1:-1]}")


NAMED = {"full": "all weights", "pissa": "PiSSA", "pissa 8bit": "PiSSA, 8-bit moments", "lora": "LoRA",
         "pissa nf4 T=1": "QPiSSA, nf4, T = 1", "pissa nf4 T=5": "QPiSSA, nf4, T = 5", "lora nf4": "QLoRA, nf4",
         "bone": "Bone"}  # fmt: skip


def versus(found: dict) -> str:
    """In how many seeds PiSSA's start beats LoRA's, whose runs had the same data in the same order."""
    parts = []
    for pair in (("pissa", "lora"), ("pissa nf4 T=1", "lora nf4"), ("pissa nf4 T=5", "lora nf4")):
        if not found.keys() >= set(pair):
            continue
        counts = []
        for which in ("equal", "best"):
            ours, other = ({r["seed"]: r["after"] or torch.inf for r in found[name][which]["runs"]} for name in pair)
            seeds = ours.keys() & other
            counts.append(f"{sum(ours[seed] < other[seed] for seed in seeds)} of {len(seeds)}")
        parts.append(f"{NAMED[pair[0]]} beats {NAMED[pair[1]]} in {counts[0]} seeds at the shared rate, in"
                     f" {counts[1]} with each at its own best")
    return "; ".join(parts) + "."


def svd() -> str:
    """Time of the fast SVD and what it loses against the exact one; per shape, the worst of the spectra."""
    rows, at = record.read("svd"), {}
    if not rows:
        return "Not yet measured: `python bench/svd.py`."
    for r in rows:
        at.setdefault((r["matrix"].rpartition(", ")[2], r["rank"]), {}).setdefault(r["niter"], []).append(r)
    fast = sorted({r["niter"] for r in rows} - {0})
    lines = ["| matrices | rank | " + " | ".join(f"`--svd_niter {n}`" for n in fast) + " | 0: exact |",
             "|---" * (len(fast) + 3) + "|"]  # fmt: skip
    for (shape, rank), of in at.items():
        cells = [f"{took(of[n])}, {worst(of[n], 'excess')}, {worst(of[n], 'off')}" for n in fast]
        lines.append(f"| {shape} | {rank} | " + " | ".join(cells) + f" | {took(of[0])} |")
    arch, rank, niter = vram.arch_of("RWKV7-1.5B"), P.Config.rank, P.Config.svd_niter
    att, ffn = (at[f"{out} x {arch.n_embd}", rank] for out in (arch.n_embd, arch.dim_ffn))
    base = [r for r in rows if r["matrix"].startswith("base") and (r["rank"], r["niter"]) == (rank, niter)]
    whole = {n: arch.n_layer * (4 * seconds(att[n]) + 2 * seconds(ffn[n])) for n in (0, niter)}
    return "\n".join(lines) + (
        f"\n\nSo the {6 * arch.n_layer} matrices of RWKV7-1.5B take some {short(whole[niter])} s with the default,"
        f" {niter}, and {short(whole[0])} s with 0. At rank {rank} the default leaves a residual at most"
        f" {worst(att[niter] + ffn[niter], 'excess')} larger than the exact SVD's for such matrices,"
        f" {worst(base, 'excess')} for the small base's. {sources(rows)}")


def seconds(rows: list[dict]) -> float:
    return statistics.median(r["seconds"] for r in rows)


def took(rows: list[dict]) -> str:
    return f"{short(1e3 * seconds(rows))} ms"


def worst(rows: list[dict], name: str) -> str:
    """The largest of a share, in percent with two digits."""
    x = 100 * max(r[name] for r in rows)
    return f"{x:.2g}%" if x >= 0.01 else "< 0.01%"


def quants() -> str:
    """The rows of QUANT, with their size and error measured on the spot."""
    W = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0))
    lines = ["| `--quant` | bits per weight | error, Gaussian W | what |", "|---|---|---|---|"]
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
    return "\n".join(lines) + (f"\n\nQPiSSA has the smaller error in {sum(q > loft for q, loft, _ in pairs)} of all"
                               f" {len(pairs)} pairs (rank 4 to 32, T 1 to 5); LoftQ wins only on {', '.join(won)}."
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
    return f"({r['machine']}, {threads(r)}, torch {r['torch']}, commit {r['commit']}, {r['date']}.)"


def reliability() -> str:
    r = record.read("reliability")[-1]
    return (f"A run that saves at every step was killed with SIGKILL at a random moment {r['kills']} times,"
            f" {r['kills_while_writing']} of them while it wrote a file: {r['unreadable_files']} unreadable files,"
            f" {r['failed_resumes']} failed resumes, and of {r['finished_runs']} runs resumed to their end,"
            f" {r['diverged_runs']} whose losses or weights differ in any bit from the undisturbed run's. {source([r])}"
            f"\n\n{crashes()}\n\n{damaged()}\n\n{drawn()}")


def crashes() -> str:
    """What an outside tester found."""
    rows = of_last_machine(record.read("chaos"))
    lines = ["| processes | crashed | points | passed | does not resume | other weights | lost work |",
             "|---|---|---|---|---|---|---|"]
    for r in rows:
        lost = r["LOST_WORK"] + r["older_step"]
        lines.append(f"| {r['ranks']} | {', '.join(r['modes'])} | {r['points']} | {r['PASS']} | {r['HARD_FAIL']} |"
                     f" {r['SILENT_DIVERGENCE'] + r['other_files']} | {lost} |")
    tool = f"[ckpt-chaos](https://pypi.org/project/ckpt-chaos/) {rows[0]['ckpt_chaos']}"
    return (f"{tool}, a third-party tester, crashes a run at every change of a file and resumes it (`bench/chaos.py`;"
            " before: just before the change; torn: with half the file written; term: SIGTERM; unsynced: all that was"
            " not flushed is lost):\n\n" + "\n".join(lines) + f"\n\n{source(rows)}")


def damaged() -> str:
    """What damaged files did."""
    runs, files = record.read("fuzz")
    return (f"{runs['cases']} runs with a damaged or hostile file, of models, checkpoints, corpora and logs"
            f" (`bench/fuzz.py`): {runs['refused']} ended with one line, {runs['same_results']} gave the results of the"
            f" undamaged file, in {runs['another_good_file']} the damage had made another valid corpus, and"
            f" {runs['wrong']} crashed, hung, ran code, wrote elsewhere or took more memory than twice the file plus"
            f" {runs['spare_mb']} MB. Of {files['flips']} checkpoints with a flipped bit and {files['cuts']} truncated"
            f" ones, {files['refused']} were refused, {files['same_values']} loaded with the same values,"
            f" {files['other_values']} with others. {source([runs])}")


def drawn() -> str:
    """What held for options drawn at random."""
    r = record.read("combinations")[-1]
    return (f"{r['draws']} commands, their options drawn at random, trained tiny models (`bench/combinations.py`):"
            f" {r['refused']} were refused with one line. The others were tested: a run that is killed and resumed ends"
            f" the same to the bit ({r['resumed']} times), and so does one with another `--grad_cp` ({r['kept']}); the"
            f" merged model computes what the adapted one does ({r['merged']}); `--dry_run` counts right"
            f" ({r['counted']}); two ranks find the losses of one ({r['shared']}). {r['wrong']} times this was not"
            f" so, or something else went wrong. {source([r])}")


def rank_kills() -> str:
    r = record.read("rank_kills")[-1]
    return (f"One of 2 or 3 ranks was killed with SIGKILL at a random moment, {r['kills']} times"
            " (`python bench/reliability.py --rank_kills 100`): the others ended within"
            f" {r['others_ended_within_s']:.0f} s, and {r['failed_resumes']} runs failed to resume."
            f" {r['under_torchrun']} were restarted by torchrun's agent: in {r['diverged_runs']} of these, losses or"
            " files differ in any bit from the undisturbed run's."
            f" {r['kills'] - r['under_torchrun']} ran without it: {r['before_they_met']} of these were hit before the"
            f" ranks had met, {r['unnamed_ranks']} of the others did not name the lost rank, and after resuming on"
            f" another number of ranks losses differed by {r['loss_off_on_another_size']:.0e} at most. {source([r])}")


def sharing() -> str:
    """Bytes that a rank holds of what is trained, and sends in a step."""
    at = {(r["model"], r["full"], r["stage"]): r for r in record.read("scaling") if r["kind"] == "bytes"}
    lines = ["| trained | numbers | held: `ddp` | `zero1`, 8 ranks | `zero2`, 8 ranks | `zero1`, 64 ranks | sent:"
             " `ddp` | `zero1`, `zero2` |", "|---" * 8 + "|"]
    for model, full in [*((m, False) for m in scaling.MODELS), ("RWKV7-7.2B", True)]:
        ddp, one, two = (at[model, full, stage] for stage in scaling.STAGES)
        cells = [ddp["held"][0], one["held"][0], two["held"][0], one["held"][1], ddp["sent"][1], one["sent"][1]]
        first = f"| {'all' if full else 'adapters'} of {model} | {ddp['numbers'] / 1e6:,.1f} million | "
        lines.append(first + " | ".join(f"{x / 1e9:.2f}" for x in cells) + " |")
    return "\n".join(lines)


def ranks() -> str:
    """Several ranks on this machine."""
    rows = [r for r in record.read("scaling") if r["kind"] == "measured"]
    lines = ["| ranks | `--strategy` | seconds per step | tokens per second | held, MB | sent, MB | in a ring, MB |",
             "|---" * 7 + "|"]
    for r in rows:
        name = f"`{scaling.STAGES[r['stage']]}`" if r["ranks"] > 1 else ""
        lines.append(f"| {r['ranks']} | {name} | {r['seconds']:.2f} | {r['tokens_s']:.0f} | {r['held'] / 1e6:.2f} |"
                     f" {r['sent'] / 1e6:.2f} | {r['sent_by_formula'] / 1e6:.2f} |")
    return "\n".join(lines) + f"\n\n{sources(rows)}"


def of_the_model() -> list[dict]:
    """What bench/scaling.py says of RWKV7-7.2B on many GPUs, at stage 1."""
    rows = (r for r in record.read("scaling") if r["kind"] == "modelled")
    return [r for r in rows if r["model"] == "RWKV7-7.2B" and r["stage"] == 1]


def efficiency() -> str:
    """The model's answer: step time on many GPUs, and the share of computing in it."""
    rows, shown = {(r["link"], r["full"]): r for r in of_the_model()}, (8, 64, 1024)
    heads = [f"{what}, {W} GPUs" for what in ("adapters", "everything") for W in shown]
    lines = ["| each GPU's link | " + " | ".join(heads) + " |", "|---" * 7 + "|"]
    for link in scaling.LINKS:
        cells = []
        for full in (False, True):
            r = rows[link, full]
            seconds = dict(zip(r["ranks"], r["seconds"], strict=True))
            cells += [f"{seconds[W]:.2f} s, {r['compute'] / seconds[W]:.0%}" if W in seconds else "" for W in shown]
        lines.append(f"| {link} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def curve() -> str:
    """How far apart loss curves are: of the two modes, of two seeds."""
    lines = ["| loss curves of | differ by (root mean square), nats |", "|---|---|"]
    rows = [r for device in ("cuda", "cpu") for r in record.read(f"wkv_curve-{device}")]
    for r in rows:
        lines += [f"| `{r['modes'][0]}` and `{r['modes'][1]}`, seed {seed} | {d:.4f} |"
                  for seed, d in zip(r["seeds"], r["between_modes"], strict=True)]
        lines += [f"| seeds {r['seeds'][0]} and {r['seeds'][1]}, `{mode}` | {d:.4f} |"
                  for mode, d in zip(r["modes"], r["between_seeds"], strict=True)]
    about = [f"{ON[r['device']]}: {r['steps']} steps, bf16. {source([r])}" for r in rows]
    gpu = [] if any(r["device"] == "cuda" for r in rows) else ["On a GPU: not yet measured."]
    return "\n".join(lines) + f"\n\n{' '.join(about + gpu)}"


def clients() -> str:
    """How near each program comes, with a merged file, to the same file here in float64."""
    rows = record.read("clients")
    versions = {"x070": "RWKV-7", "x060": "RWKV-6", "x052": "RWKV-5"}
    lines = ["| program | opens | " + " | ".join(versions.values()) + " |", "|---" * (len(versions) + 2) + "|"]
    for name, package in dict.fromkeys((r["client"], r["package"]) for r in rows):
        found = {r["version"]: r for r in rows if r["client"] == name}
        cells = ["{relative:.0e}, {same} of {tokens}".format(**found[v]) if v in found else "no" for v in versions]
        lines.append(f"| {name} ({package}) | {OPENS[name]} | {' | '.join(cells)} |")
    behind = max(r["behind"] for r in rows)
    ties = f"The other tokens are near ties: our logits differ by {behind:.0e} at most. " if behind else ""
    return "\n".join(lines) + f"\n\n{ties}{source(rows)}"


OPENS = {"rwkv": "`.pth`, in fp32", "web-rwkv": "`.st`, in fp16", "llama.cpp": "`.gguf` made of the `.pth`, in fp32"}


def cells(kind: str) -> dict[tuple[str, str], dict]:
    """(model, quant) -> the newest row, at the tutorial's setting."""
    return {(r["model"], r["quant"]): r for r in of_kind("vram", kind) if not r["setting"]}


def of_kind(name: str, kind: str) -> list[dict]:
    """Rows that were `predicted`, wherever, or `measured` on the machine that was last."""
    rows = [r for r in record.read(name) if r["kind"] == kind]
    return of_last_machine(rows) if kind == "measured" else rows


def of_last_machine(rows: list[dict]) -> list[dict]:
    return [r for r in rows if r["machine"] == rows[-1]["machine"]]


def memory() -> str:
    """The tutorial's table, beside it what is predicted and measured here; GB, bf16 / int8 / nf4."""
    predicted, measured = cells("predicted"), cells("measured")
    lines = ["| model | published | predicted | predicted / published | measured on a GPU |", "|---|---|---|---|---|"]
    for name in dict.fromkeys(name for name, _ in predicted):
        ours = [predicted[name, quant] for quant in vram.QUANTS]
        published = [f"{r['published']:.1f}" for r in ours if r["published"]] or ["not published"]
        ratios = [f"{r['ratio']:.2f}" for r in ours if r["ratio"]]
        found = [f"{GB(measured[name, q]):.2f}" if (name, q) in measured else "-" for q in vram.QUANTS]
        lines.append(f"| {name} | {' / '.join(published)} | {' / '.join(f'{GB(r):.2f}' for r in ours)} |"
                     f" {' / '.join(ratios)} | {' / '.join(found) if {*found} != {'-'} else 'not yet measured'} |")
    return ("\n".join(lines) + f"\n\n{source(list(predicted.values()))}"
            + (f" Measured: {source([*measured.values()])}" if measured else ""))


def GB(row: dict) -> float:
    return row["total"] / 1e9


def levers() -> str:
    """What each setting that saves memory comes to, predicted, and where it was measured on a GPU, that in brackets; of
    the newest commit there is."""
    predicted, measured = ({(r["setting"], r["model"]): r for r in of_kind("vram-levers", kind)}
                           for kind in ("predicted", "measured"))     # (the last of several is the newest)
    models = [m for m in vram.LEVER_CELLS if any(model == m for _, model in predicted)]
    shown = {cell: f"{GB(r):.2f}" + (f" ({GB(measured[cell]):.2f})" if cell in measured else "")
             for cell, r in predicted.items()}
    lines = ["| setting (nf4), GB | " + " | ".join(models) + " |", "|---" * (len(models) + 1) + "|"]
    for title, options in vram.LEVERS.items():
        flags = "".join(f" `--{name} {int(v) if isinstance(v, bool) else v}`" for name, v in options.items())
        lines.append(f"| {title}{flags} | " + " | ".join(shown[title, m] for m in models) + " |")
    return ("\n".join(lines) + f"\n\n{source([*predicted.values()][-1:])}"
            + (f" In brackets: measured. {source([*measured.values()][-1:])}" if measured else ""))


STEP_PEER = {"cuda": "fla bf16 none", "cpu": "rwkv7-hf fp32 none"}    # whose speed is 1


def steps() -> str:
    """Whole optimiser steps, beside a peer."""
    parts = [steps_table(device, record.read(f"step-{device}")) for device in STEP_PEER]
    return "\n\n".join(part or "On a GPU: not yet measured." for part in parts)


def steps_table(device: str, rows: list[dict]) -> str:
    """Nothing where there are no rows; a memory that could not be counted stays empty."""
    rows = of_last_machine([r for r in rows if not r["failed"] and not r["setting"]])
    peer, lines = STEP_PEER[device], []
    there = any(peer in r["faster_than"] for r in rows)               # (an optional package)
    for r in rows:
        model, quant = r["model"].removeprefix("RWKV7-"), "" if r["quant"] == "none" else f" {r['quant']}"
        times = (f"{r['faster_than'][peer]:.2f} | " if peer in r["faster_than"] else "| ") if there else ""
        memory = f"{r['peak'] / 1e9:.2f}" if r["peak"] else ""
        lines.append(f"| {model}, {r['bsz']} x {r['ctx']} | `{r['name']}`, {r['dtype']}{quant} |"
                     f" {r['tokens_per_s']:,.0f} | {times}{memory} | {r['utilisation']:.0%} |")
    beside = f"times {peer.removesuffix(' none')} | " if there else ""
    head = f"| model, tokens | | tokens/s | {beside}memory, GB | utilisation |"
    return "\n".join([head, "|---" * (5 + there) + "|", *lines]) + f"\n\n{sources(rows)}" if lines else ""


def host() -> str:
    """Milliseconds of one CPU thread."""
    rows = of_last_machine(record.read("host"))
    ms = {(r["layers"], r["way"]): r["step"]["ms"] for r in rows}
    depths, ways = sorted({layers for layers, _ in ms}), [*dict.fromkeys(way for _, way in ms)]
    lines = [f"| {way} | {' | '.join(f'{ms[layers, way]:.0f}' for layers in depths)} |" for way in ways]
    head = f"| `--grad_cp` | {' | '.join(f'{n} layers' for n in depths)} |\n" + "|---" * (1 + len(depths)) + "|"
    return "\n".join([head, *lines]) + f"\n\n{source(rows)}"


OPS = {  # what it needs, what it is; in README's order
    "cuda": ("a GPU and nvcc", "bf16: 32 tokens at a time on tensor cores; RWKV-7 in other dtypes: `cuda_precise`"),
    "cuda_precise": ("a GPU and nvcc", "the recurrence in fp32, state in registers"),
    "triton": ("a GPU and the package `triton`", "16 or 32 tokens at a time as matrix products, on tensor cores"),
    "fla": ("a GPU and `pip install flash-linear-attention`", "flash-linear-attention's kernels; only when asked for"),
    "cpu": ("a C++ compiler", "the recurrence in C++, threads over batch and heads"),
    "chunk": ("nothing", "16 or 32 tokens at a time as matrix products"),
    "torch": ("nothing", "the definition, one token at a time"),
}


def which() -> str:
    """The operators and the versions that have them."""
    versions = list(P.TIME_MIX)
    lines = [f"| op | {' | '.join(versions)} | needs | what it is |", "|---|---|---|---|---|---|"]
    for op, (needs, what) in OPS.items():
        has = " | ".join("yes" if op in P.WKV[version] else "" for version in versions)
        lines.append(f"| `{op}` | {has} | {needs} | {what} |")
    assert set().union(*P.WKV.values()) == OPS.keys()
    return "\n".join(lines)


TABLES = {
    README: (demo, options, sections, order, tutorial, which, ops, learning, svd, reliability, quants, qerror, int8,
             memory, levers, clients, sharing, ranks, efficiency, rank_kills, steps, host),
    OPS_README: (measured, curve, wkv6, dequantising),
    CHINESE: (demo, learning, quants, which, steps, memory),
}
WORDS = {  # of these tables, in Chinese; longer ones first
    "On a GPU: not yet measured.": "显卡上：尚未测量。", "not yet measured": "尚未测量", "not published": "未公布",
    "| model, tokens |": "| 模型，行数 x token |", "times rwkv7-hf": "相对 rwkv7-hf", "times fla": "相对 fla",
    "memory, GB": "内存，GB", "utilisation": "利用率", "| model |": "| 模型 |", "| published |": "| 公布 |",
    "| predicted |": "| 预测 |", "predicted / published": "预测 / 公布", "measured on a GPU": "显卡实测",
    "bits per weight": "每权重比特", "error, Gaussian W": "误差（高斯 W）", "| what |": "| 说明 |",
    "| needs |": "| 需要 |", "| method |": "| 方法 |", "trained numbers": "训练的参数", "best rate": "最佳学习率",
    "held-out loss there": "此时的留出损失", "held-out loss at the shared rate, ": "统一学习率下的留出损失，",
    "gradient norm there, steps 1 to 10": "此时前 10 步的梯度范数", "all weights": "全部参数",
    "The sweep, with one seed:": "扫学习率（一个种子）：",
    "what it is": "说明", " seconds. (": " 秒。（", ".)\n": "。）\n",
}


def filled(path: Path) -> str:
    """The file with its tables made anew."""
    text = path.read_text("utf-8")
    for table in TABLES[path]:
        name = table.__name__
        before, begin, rest = text.partition(f"<!-- {name} -->\n")
        _, end, after = rest.partition(f"<!-- /{name} -->")
        assert begin and end, f"{path.name} has no place for {name}"
        made = table() + "\n"
        for word, chinese in WORDS.items() if path == CHINESE else ():
            made = made.replace(word, chinese)
        text = f"{before}{begin}{made}{end}{after}"
    return text


def pyplot():
    """matplotlib's, so set that the same figures give the same file."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "pissa_rwkv"
    from matplotlib import pyplot

    return pyplot


def loss_picture() -> None:
    """loss.svg: losses and gradient norms of every step at the equal rate, losses at each one's best, means over the
    seeds with a band of one standard deviation; and the sweep."""
    found = {name: s for name, s in curves.summary(learnt()).items() if name in LOOK and "equal" in s}
    figure, axes = pyplot().subplots(2, 2, figsize=(9, 6), constrained_layout=True)
    (equal, best), (norms, sweep) = axes
    shown = found[curves.EQUAL]["equal"]["lr"]
    for ax, which, what in ((equal, "equal", "losses"), (best, "best", "losses"), (norms, "equal", "grad_norms")):
        for name, s in found.items():
            band(ax, s[which]["runs"], what, **LOOK[name])
    equal.set(title=f"training loss, all at the rate {shown:g}", xlabel="step", ylabel="nats per byte")
    best.set(title="training loss, each at its own best rate", xlabel="step", ylabel="nats per byte")
    norms.set(title=f"norm of the gradient, rate {shown:g}", xlabel="step", yscale="log")
    norms.yaxis.get_major_locator().set_params(subs=(1, 3))
    norms.yaxis.set_major_formatter("{x:g}")
    norms.yaxis.set_minor_formatter("")
    sweep.set(title="held-out loss against the learning rate", xlabel="learning rate", ylabel="nats per byte",
              xscale="log")
    sweep.xaxis.set_major_formatter("{x:g}")
    best.sharey(equal)
    for name, s in found.items():
        there = {lr: loss for lr, loss in s["sweep"].items() if loss < s["before"]}
        sweep.plot(*zip(*there.items(), strict=True), **LOOK[name])
        sweep.plot(s["best"]["lr"], s["sweep"][s["best"]["lr"]], marker="o", color=LOOK[name]["color"])
    sweep.axvline(shown, color="#bbbbbb", linewidth=1, linestyle=":")
    for ax in axes.flat:
        ax.spines[["top", "right"]].set_visible(False)
    figure.legend(*equal.get_legend_handles_labels(), loc="outside lower center", ncols=len(found), frameon=False)
    figure.savefig(record.RESULTS / "loss.svg", metadata={"Date": None})


def band(ax, runs: list[dict], what: str, smooth: int = 10, **look) -> None:
    """A figure of every step, a running mean of it: the mean over runs, and one standard deviation to both sides."""
    x = torch.tensor([r[what] for r in runs if r["after"]]).unfold(1, smooth, 1).mean(-1)  # (seeds,steps)
    steps, mean, sd = torch.arange(x.shape[1]) + smooth // 2, x.mean(0), x.std(0)
    ax.plot(steps, mean, **look)
    ax.fill_between(steps, mean - sd, mean + sd, color=look["color"], alpha=0.15, linewidth=0)


LOOK = {"full": dict(color="#777777", label="all weights"), "lora": dict(color="#2c6fbb", label="LoRA"),
        "lora nf4": dict(color="#2c6fbb", linestyle="--", label="QLoRA"),
        "pissa": dict(color="#c0392b", label="PiSSA"),
        "pissa nf4 T=1": dict(color="#c0392b", linestyle="--", label="QPiSSA-1"),
        "pissa nf4 T=5": dict(color="#e67e22", linestyle="--", label="QPiSSA-5")}  # fmt: skip


PARTS = {"weights": "#2c6fbb", "optimiser": "#27ae60", "activations": "#e67e22", "other": "#bbbbbb"}


def memory_picture() -> None:
    """vram.svg: for each model a bar for bf16, int8, nf4, in its parts; a line where the published table has it."""
    rows = cells("predicted")
    models = list(dict.fromkeys(name for name, _ in rows))
    figure, axes = pyplot().subplots(1, len(models), figsize=(9, 3.4), constrained_layout=True)
    for ax, name in zip(axes, models, strict=True):
        for x, quant in enumerate(vram.QUANTS):
            row, bottom = rows[name, quant], 0.0
            for part, colour in PARTS.items():
                ax.bar(x, row[part] / 1e9, 0.7, bottom, color=colour, label=part if x == 0 else None)
                bottom += row[part] / 1e9
            if row["published"]:
                ax.plot([x - 0.42, x + 0.42], [row["published"]] * 2, color="black", linewidth=1.5,
                        label="published" if x == 0 else None)  # fmt: skip
        ax.set_title(name.removeprefix("RWKV").replace("-", "\n"), fontsize=9)
        ax.set_xticks(range(len(vram.QUANTS)), ["bf16", *vram.QUANTS[1:]], fontsize=8)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("GB")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
    figure.savefig(record.RESULTS / "vram.svg", metadata={"Date": None})


def scaling_picture() -> None:
    """scaling.svg: modelled share of computing in a step against the number of GPUs; a line a link."""
    figure, axes = pyplot().subplots(1, 2, figsize=(9, 3.2), sharey=True, constrained_layout=True)
    for ax, full in zip(axes, (False, True), strict=True):
        for r in (r for r in of_the_model() if r["full"] == full and len(r["ranks"]) > 1):
            ax.plot(r["ranks"], [r["compute"] / t for t in r["seconds"]], marker="o", markersize=3.5, label=r["link"])
        ax.set(xscale="log", ylim=(0, 1.05), xlabel="GPUs", title=f"RWKV7-7.2B, {'everything' if full else 'adapters'}")
        ax.set_xticks([8, 64, 1024], ["8", "64", "1024"])
        ax.minorticks_off()
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("share of computing in a step")
    axes[0].legend(frameon=False)
    figure.savefig(record.RESULTS / "scaling.svg", metadata={"Date": None})


COLOURS = {"torch": "#888888", "chunk": "#2c6fbb", "cpu": "#c0392b", "cuda": "#c0392b", "cuda_precise": "#e67e22",
           "triton": "#27ae60", "fla": "#8e44ad", "sequential": "#555555"}  # fmt: skip


def wkv_picture() -> None:
    """wkv.svg: time of forward + backward against T, both logarithmic; a line per operator, and the floor."""
    _, rows = wkv_curves()
    if not rows:
        return
    figure, axes = pyplot().subplots(figsize=(7, 4.2), constrained_layout=True)
    floor = sorted({r["shape"][1]: r["rates"]["both"]["floor_ms"] for r in rows}.items())
    axes.plot(*zip(*floor, strict=True), color="black", linestyle="--", linewidth=1)
    ends = [("memory floor", "black", *floor[-1])]
    for op in dict.fromkeys(r["op"] for r in rows):
        points = sorted((r["shape"][1], wkv.best(r, "both")) for r in rows if r["op"] == op)
        axes.plot(*zip(*points, strict=True), color=COLOURS.get(op), marker="o", markersize=3.5)
        ends.append((op, axes.lines[-1].get_color(), *points[-1]))
    axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel="forward + backward, ms")
    axes.set_xticks([T for T, _ in floor], [str(T) for T, _ in floor])
    axes.minorticks_off()
    axes.yaxis.set_major_formatter("{x:g}")
    axes.spines[["top", "right"]].set_visible(False)
    low, high = axes.get_ylim()
    for (op, colour, T, _), y in zip(ends, apart([y for *_, y in ends], (high / low) ** 0.05), strict=True):
        axes.annotate(f" {op}", (T, y), (5, 0), textcoords="offset points", color=colour, va="center")
    figure.savefig(record.RESULTS / "wkv.svg", metadata={"Date": None})


def apart(ys: list[float], ratio: float) -> list[float]:
    """Heights of labels, moved up where one would stand less than `ratio` above the one below it."""
    placed, last = [0.0] * len(ys), 0.0
    for i in sorted(range(len(ys)), key=ys.__getitem__):
        placed[i] = last = max(ys[i], last * ratio)
    return placed


if __name__ == "__main__":
    loss_picture()
    wkv_picture()
    memory_picture()
    scaling_picture()
    for path in TABLES:
        path.write_text(filled(path), "utf-8")
