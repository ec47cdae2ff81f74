"""What PiSSA's start is worth: its loss curves beside LoRA's and full fine-tuning's -> bench/results/curves-<size>.json

    python bench/curves.py                           # about an hour on one CPU thread; --quick: minutes, no results
    python bench/curves.py --size large --qa QUESTIONS.jsonl --minutes 8                          # needs a GPU

small: a byte-level base of 3 layers that read English prose (pydoc_data.topics) learns Python code (the standard
library's); both come with Python, so another release of it gives other figures. large: 10 layers of width 512 that read
both, or --text FILE, learn to answer the questions of a file, such as GSM8K's.

All methods start at the same base. Rows of data and their order depend on the seed alone; rank, steps, warm-up (5
steps) and cosine (to a tenth) are the same. Every adapter method trains adapters on all matrices of the blocks and,
besides, the layer norms (--train_parts auto), and scales its update by 1; `lora` draws A uniformly from +-1/sqrt(in),
and B is zero; `full` trains everything, without adapters.

First the learning rate is swept with one seed, by factors of 2; where a method's best lies at an edge, its range grows
until it does not. Then all seeds at each method's own best rate, and all at one rate for all, as in PiSSA's paper: the
best of full fine-tuning. A row is one run: held-out loss before and after; of each step the loss, and the norm of the
gradient before it is clipped to 1. A row is written as soon as its run ends, and what has a row is not run again: the
same command goes on after it was killed. Status 3: --minutes are over and runs are left.
"""

import argparse
import contextlib
import io
import json
import math
import multiprocessing
import shutil
import statistics
import sys
import sysconfig
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import record
import torch

import pissa_rwkv as P


class Method(NamedTuple):
    """A line of the table: the options it is, and the first sweep's rates as powers of 2 (see `rate`)."""

    options: dict[str, Any]
    powers: range


METHODS = {
    "full": Method(dict(peft="none"), range(-1, 6)),
    "pissa": Method(dict(peft="pissa"), range(0, 7)),
    "pissa 8bit": Method(dict(peft="pissa", moments="8bit"), range(0, 7)),
    "lora": Method(dict(peft="lora"), range(1, 8)),
    "pissa nf4 T=1": Method(dict(peft="pissa", quant="nf4"), range(0, 7)),
    "pissa nf4 T=5": Method(dict(peft="pissa", quant="nf4", qpissa_iters=5), range(0, 7)),
    "lora nf4": Method(dict(peft="lora", quant="nf4"), range(1, 8)),
    "bone": Method(dict(peft="bone"), range(0, 7)),
}
RANK, EQUAL = 8, "full"  # EQUAL: whose best rate is the one for all


def rate(power: int) -> float:
    return 5e-4 * 2.0**power


class Size(NamedTuple):
    """A base and what it is given to learn."""

    base: dict[str, Any]
    base_steps: int
    tuned: dict[str, Any]
    steps: int
    seeds: int
    powers: range  # of a method's, which are swept first
    share: float  # of what is learnt, held out; not of --qa_held_out
    held_out: int  # questions of that


SIZES = {
    "small": Size(dict(n_layer=3, n_embd=128, ctx_len=256, micro_bsz=16, lr_init=4e-3, lr_final=2e-4), 900,
                  dict(ctx_len=256, micro_bsz=8), 100, 5, range(7), 0.02, 200),
    "large": Size(dict(n_layer=10, n_embd=512, ctx_len=512, micro_bsz=32, lr_init=1e-3, lr_final=5e-5), 1500,
                  dict(ctx_len=768, micro_bsz=8), 100, 3, range(5), 0.02, 200),
}  # fmt: skip


def quick(size: Size) -> Size:
    """The same way, in a few steps of few rows."""
    few = dict(ctx_len=64, micro_bsz=4)
    return size._replace(base=size.base | few, base_steps=6, tuned=size.tuned | few, steps=6, seeds=2, powers=range(3),
                         share=0.002, held_out=4)  # fmt: skip


@dataclass
class Plan:
    """All that a run depends on, but for method, rate and seed."""

    size: Size
    common: P.Config                                                  # of every run on the base
    methods: list[str]
    about: dict[str, Any]                                             # in every row; rows with other values are others'


class Job(NamedTuple):
    name: str
    lr: float
    seed: int


# ------------------------------------------------------------------------------------------- texts, base, one run


def texts(folder: Path) -> tuple[Path, Path]:
    """prose.txt and code.txt, written into `folder`."""
    from pydoc_data.topics import topics

    library = Path(sysconfig.get_path("stdlib"))
    prose, code = folder / "prose.txt", folder / "code.txt"
    folder.mkdir(parents=True, exist_ok=True)
    prose.write_text("\n".join(topics[name] for name in sorted(topics)), "utf-8")
    sources = "\n".join(p.read_text("utf-8", "replace") for p in sorted(library.glob("*.py")))
    code.write_text(sources[:2_000_000], "utf-8")
    return prose, code


def silently(f: Any, *args: Any) -> Any:
    """f(*args), without what it prints."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return f(*args)


def log_of(folder: Path) -> list[dict]:
    """What a run logged, step by step."""
    path = folder / "loss_data.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def pretrain(cfg: P.Config) -> dict:
    """Trains the base, unless it is there already. Returns its row."""
    folder = Path(cfg.proj_dir)
    if not any("val_loss" in line for line in log_of(folder)):        # (the last that is written)
        shutil.rmtree(folder, ignore_errors=True)
        job = silently(P.build, cfg)
        silently(P.train, job)
        if job.step < job.steps:
            raise KeyboardInterrupt
    lines, tensors = log_of(folder), P.read_pth(folder / "rwkv-0.pth", "base")
    return {"name": "base", "lr": cfg.lr_init, "steps": cfg.epoch_steps, "after": lines[-1]["val_loss"],
            "trained": sum(t.numel() for t in tensors.values()), "base": P.fingerprint(tensors)}


def run(plan: Plan, job: Job) -> dict:
    """One run's row. One that diverges has no loss after, and says why."""
    with tempfile.TemporaryDirectory() as folder:
        cfg = replace(plan.common, **METHODS[job.name].options, lr_init=job.lr, lr_final=job.lr / 10,
                      random_seed=job.seed, proj_dir=folder)
        began, failed, after = time.perf_counter(), "", math.nan
        training = P.build(cfg)
        held_out, training.held_out = training.held_out, None         # (so that `train` does not look at it too)
        before = P.evaluate(training.model, held_out)
        try:
            P.train(training)
            if training.step < training.steps:
                raise KeyboardInterrupt
            after = P.evaluate(training.model, held_out)
        except P.Fatal as e:
            failed = str(e)
        lines = log_of(Path(folder))
    learnt = {name: p.numel() for name, p in training.optimiser.named}
    adapters = sum(n for name, n in learnt.items() if P.ADAPTER[cfg.peft].is_own(name))
    return {**job._asdict(), "method": cfg.peft, "quant": cfg.quant, "T": cfg.qpissa_iters,
            "trained": sum(learnt.values()), "adapters": adapters, "before": round(before, 5),
            "after": round(after, 5) if math.isfinite(after) else None, "failed": failed,
            "losses": rounded(x["loss"] for x in lines), "grad_norms": rounded(x["grad_norm"] for x in lines),
            "seconds": round(time.perf_counter() - began, 1)}  # fmt: skip


def rounded(xs: Iterator[float | None]) -> list[float | None]:
    return [x if x is None else float(f"{x:.4g}") for x in xs]


# ------------------------------------------------------------------------------------------- what is to be run


def loss_at(rows: list[dict], name: str) -> dict[float, float]:
    """Rate -> held-out loss with seed 0."""
    found = {r["lr"]: r["after"] for r in rows if (r["name"], r.get("seed")) == (name, 0)}
    return {lr: math.inf if found[lr] is None else found[lr] for lr in sorted(found)}


def best_rate(rows: list[dict], name: str) -> float:
    losses = loss_at(rows, name)
    return min(losses, key=losses.__getitem__)


def sweep(plan: Plan, rows: list[dict]) -> list[Job]:
    """The first rates of each method, then one more at an edge where its best is."""
    jobs = []
    for name in plan.methods:
        losses, powers = loss_at(rows, name), METHODS[name].powers
        wanted = [rate(powers[i]) for i in plan.size.powers]
        missing = [lr for lr in wanted if lr not in losses]
        if not missing:
            best = best_rate(rows, name)
            missing = [lr for lr in (best / 2, best * 2) if lr not in losses]
        jobs += [Job(name, lr, 0) for lr in missing]
    return jobs


def repeats(plan: Plan, rows: list[dict]) -> list[Job]:
    """The seeds at each one's best rate, and at the one for all."""
    done, swept = {(r["name"], r["lr"], r.get("seed")) for r in rows}, {r["name"] for r in rows}
    jobs = []
    for seed in range(plan.size.seeds):
        for name in plan.methods:
            rates = {best_rate(rows, x): 0 for x in (name, EQUAL) if x in swept}
            jobs += [job for lr in rates if (job := Job(name, lr, seed)) not in done]
    return jobs


# ------------------------------------------------------------------------------------------- what came out


def summary(rows: list[dict]) -> dict[str, dict[str, Any]]:
    """For each method its best rate, and at that and at the one for all the held-out loss, mean and standard deviation
    over the seeds, and the median norm of the gradient over the first 10 and 100 steps."""
    found, names = {}, [name for name in METHODS if any(r["name"] == name for r in rows)]
    for name in names:
        rates = {"best": best_rate(rows, name)} | ({"equal": best_rate(rows, EQUAL)} if EQUAL in names else {})
        mine = [r for r in rows if r["name"] == name]
        found[name] = {"trained": mine[0]["trained"], "before": mine[0]["before"], "sweep": loss_at(rows, name)}
        for which, lr in rates.items():
            there = sorted((r for r in mine if r["lr"] == lr), key=lambda r: r["seed"])
            if there:
                found[name][which] = {"lr": lr, "runs": there} | figures(there)
    return found


def figures(runs: list[dict]) -> dict[str, float]:
    losses = [math.inf if r["after"] is None else r["after"] for r in runs]
    several = len(losses) > 1 and all(map(math.isfinite, losses))
    norms = {f"norm{n}": statistics.median([x for r in runs for x in r["grad_norms"][:n] if x is not None])
             for n in (10, 100)}  # fmt: skip
    return {"mean": statistics.mean(losses), "sd": statistics.stdev(losses) if several else 0.0,
            "n": len(losses)} | norms


def shown(at: dict[str, Any] | None) -> str:
    return f"{at['mean']:.4f} +- {at['sd']:.4f} ({at['n']})" if at else ""


def table(rows: list[dict]) -> str:
    """The summary as it is printed."""
    lines = [f"{'':<14} {'trained':>9} {'best rate':>9}  {'held out at it':<21} {'at the equal rate':<21}"
             " norm of the gradient there, steps 1-10, 1-100"]  # fmt: skip
    for name, s in summary(rows).items():
        equal = s.get("equal")
        norms = f"{equal['norm10']:.3g}, {equal['norm100']:.3g}" if equal else ""
        lines.append(f"{name:<14} {s['trained']:>9,} {s['best']['lr']:>9g}  {shown(s['best']):<21} {shown(equal):<21}"
                     f" {norms}")  # fmt: skip
        lines.append(" " * 15 + ", ".join(f"{lr:g}: {loss:.3f}" for lr, loss in s["sweep"].items()))
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------- the command


def planned(args: argparse.Namespace, device: str) -> tuple[Plan, P.Config]:
    """What is run on the base, and how the base is trained. Writes the texts into the folder."""
    size, folder = (quick if args.quick else lambda s: s)(SIZES[args.size]), args.folder / args.size
    prose, code = texts(folder)
    text, text_name = args.text, args.text.name if args.text else "pydoc_data.topics"
    if not text and args.size == "large":
        text, text_name = folder / "both.txt", "pydoc_data.topics, standard library"
        text.write_text(prose.read_text("utf-8") + code.read_text("utf-8"), "utf-8")
    text = text or prose
    common = P.Config(tokenizer="byte", vocab_size=256, grad_cp="0", warmup_steps=5,
                      accelerator={"cuda": "gpu"}.get(device, device))
    where = folder / f"base-{size.base_steps}-{zlib.crc32(text.read_bytes()):08x}"
    base = replace(common, **size.base, peft="none", data_type="utf-8", data_file=str(text), val_split=0.03,
                   epoch_steps=size.base_steps, proj_dir=str(where))
    if args.qa:
        learns, data = dict(data_type="sft", loss_mask="qa", data_file=str(args.qa)), args.qa.name
        if args.qa_held_out:
            first = folder / "held_out.jsonl"
            with open(args.qa_held_out, encoding="utf-8") as file:
                first.write_text("".join(line for line, _ in zip(file, range(size.held_out), strict=False)), "utf-8")
            learns |= dict(val_split=0.0, val_file=str(first))
    else:
        learns, data = dict(data_type="utf-8", data_file=str(code)), "standard library"
    learns = dict(val_split=size.share) | learns
    tuned = replace(common, **size.tuned, **learns, rank=RANK, lora_alpha=float(RANK), epoch_steps=size.steps,
                    load_model=str(where / "rwkv-0.pth"))
    about = {"size": args.size, "rank": RANK, "steps": size.steps, "base_steps": size.base_steps, "text": text_name,
             "data": data, **size.tuned}
    return Plan(size, tuned, args.methods, about), base


def attempt(plan: Plan, deadline: float, job: Job) -> dict | None:
    """The row, or None where the time is over before it begins."""
    return silently(run, plan, job) if time.time() < deadline else None


@contextlib.contextmanager
def workers(args: argparse.Namespace) -> Iterator[Callable]:
    """A `map` that gives results as they come; from this process, or from several."""
    if args.jobs == 1:
        yield map
        return
    with multiprocessing.get_context("spawn").Pool(args.jobs, torch.set_num_threads, (args.threads,)) as pool:
        yield pool.imap_unordered
        pool.close()
        pool.join()                                                   # (they tidy up; leaving the block ends them)


KEY = ("size", "name", "lr", "seed", "rank", "steps", "base_steps", "text", "data", "base")


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=[*METHODS], metavar="NAME")
    parser.add_argument("--text", type=Path, help="what the base reads; Python's prose, and for large its code too")
    parser.add_argument("--qa", type=Path, help="questions to learn: a .jsonl with question and answer in each line")
    parser.add_argument("--qa_held_out", type=Path, help="likewise, held out; without it the last 2 %% of --qa are")
    parser.add_argument("--quick", action="store_true", help="a few small steps; the rows go to --folder")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no run later than that")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, a process each")
    parser.add_argument("--threads", type=int, default=1, help="of each")
    parser.add_argument("--folder", type=Path, help="for texts and base (out/curves)")
    parser.add_argument("--out", type=Path, help="folder of the results (bench/results)")
    parser.add_argument("--commit", default="", help="of sources without git")
    args = parser.parse_args(argv)
    if args.size == "large" and not args.qa:
        parser.error("--size large learns questions: --qa FILE.jsonl names them, such as the train.jsonl of GSM8K,"
                     " which has a question and an answer in each line")
    args.folder = args.folder or Path("out/curves-quick" if args.quick else "out/curves")
    args.out = args.out or (args.folder if args.quick else record.RESULTS)
    return args


def main(argv: list[str] | None = None) -> int:
    args, began = arguments(argv), time.time()
    torch.set_num_threads(args.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    now = record.circumstances(device, args.commit)
    path, deadline = args.out / f"curves-{args.size}.json", began + 60 * args.minutes
    plan, base = planned(args, device)
    print("a base is trained first, which takes minutes; then about an hour of runs, each with a line", flush=True)
    row = plan.about | pretrain(base) | now
    record.update(path, [row], KEY)
    print(f"base: {row['trained']:,} numbers, held out {row['after']:.4f}, {time.time() - began:.0f} s", flush=True)
    plan.about |= {"base": row["base"]}
    mine = plan.about | {"machine": now["machine"]}
    rows = [r for r in record.load(path) if all(r.get(k) == v for k, v in mine.items()) and r["name"] != "base"]
    with workers(args) as each:
        left = rounds(plan, rows, path, now, deadline, each)
    print(table(rows))
    print(f"out of time: run again, with the same --folder, for what is left ({left} of this round)" if left else path)
    return 3 if left else 0


def rounds(plan: Plan, rows: list[dict], path: Path, now: dict, deadline: float, each: Callable) -> int:
    """Makes all runs that have no row yet, and adds their rows. Returns how many are left when the time is over."""
    made, start = 0, time.time()
    while jobs := (first := sweep(plan, rows)) or repeats(plan, rows):
        later = 2 * (plan.size.seeds - 1) * len(plan.methods) if first else 0
        for i, found in enumerate(each(partial(attempt, plan, deadline), jobs)):
            if found is None:
                return len(jobs) - i
            row, made = plan.about | found | now, made + 1
            record.update(path, [row], KEY)
            rows.append(row)
            left, pace = len(jobs) - i - 1 + later, (time.time() - start) / made
            print(f"{found['name']:<14} lr {found['lr']:<8g} seed {found['seed']}: held out {found['before']:.4f} ->"
                  f" {found['after'] or math.nan:.4f}{', ' * bool(found['failed'])}{found['failed']};"
                  f" {found['seconds']:.0f} s, {left} left, about {left * pace / 60:.0f} minutes", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
