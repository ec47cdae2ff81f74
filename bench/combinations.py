"""Draws options at random, trains tiny models with them, and looks at what must hold whatever they are.

    python bench/combinations.py                # 500 draws, half an hour -> bench/results/combinations.json

Either a run ends with status 2 and one line for one of `REASONS`, and then its --dry_run does too; or it ends well, and
then all of `CHECKS` must hold. Nothing else may happen.
"""

import argparse
import collections
import contextlib
import io
import json
import random
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import record
import reliability
import torch
from tqdm import tqdm

import merge
import pissa_rwkv as P

# A draw takes one of each, side by side on a command line. (@: the folder.)
CHOICES = [
    ["--peft pissa", "--peft pissa --svd_niter 0", "--peft pissa --quant nf4 --qpissa_iters 3 --train_parts",
     "--peft pissa --train_parts emb head ln time", "--peft lora", "--peft lora --lora_alpha 12.5 --quant nf4",
     "--peft lora --lora_dropout 0.1", "--peft bone", "--peft bone --bone_mode bat", "--peft state --train_parts ln",
     "--peft none", "--peft none --train_parts ln head"],
    ["", "", "", "--quant int8", "--quant nf4", "--quant nf4dq"],
    ["--rank 1", "--rank 4", "--rank 16"],
    ["--data_file @d.jsonl --val_file @d.txt", "--data_file @d.txt", "--data_file @d.npy",
     "--data_file @d.u16 --data_type uint16", "--data_file @sft.jsonl --data_type sft",
     "--data_file @talk.jsonl --data_type sft --sft_fields messages"],
    ["", "", "--dataload only", "--dataload get", "--data_shuffle 0"],
    ["", "", "--loss_mask qa", "--loss_mask pad", '--loss_mask se --mask_id {"mask1":"Assistant:","mask0":"e"}'],
    ["", "", "--val_split 0.2"],
    ["--ctx_len 7", "--ctx_len 24", "--ctx_len 33"],
    ["--micro_bsz 1", "--micro_bsz 3"],
    ["", "", "--train_type infctx --chunk_ctx 5", "--train_type infctx --chunk_ctx 7 --chunk_grad full"],
    ["", "--accumulate_grad_batches 2"],
    ["--epoch_count 1", "--epoch_count 2", "--epoch_count 2 --epoch_save 2"],
    ["--precision fp32", "--precision fp32", "--precision tf32", "--precision bf16", "--precision fp16"],
    ["", "", "--op torch", "--op chunk"],
    ["", "--moments 8bit"],
    ["", "--emb_on_cpu 1"],
    ["", "--weight_decay 0.1 --grad_clip 0.01", "--lr_schedule wsd --warmup_steps 2", "--layerwise_lr 0"],
    ["", "--sample_prompt User: --sample_len 3", "--auto_merge"],
    ["", "--strategy ddp", "--strategy zero2"],
    ["--random_seed 0", "--random_seed 7"],
]
MODELS = [f"{version} {sizes}" for sizes in ("--n_layer 2 --n_embd 64", "--n_layer 3 --n_embd 128",
                                             "--n_layer 2 --n_embd 64 --head_size 16")
          for version in ("", "", "--version x060", "--version x052", "--version x060 --pre_ffn 1", "--head_qk 16")]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
REASONS = (  # for which draws are refused, and no others
    "this model has head_qk, which looks back at a whole row", "is held out already; give one of them",
    "--peft none or --train_parts emb trains it", "--peft none trains every matrix, and only frozen ones are quantised",
    "with --peft state only the first chunk would be learnt from")
COMMON = "--epoch_steps 2 --lr_init 1e-2 --lr_final 1e-2 --save_steps 1 --keep 1"


# ------------------------------------------------------------------------------------------ what a run is given


def write_data(folder: Path) -> None:
    asked = [(f"what is line {i}?", f"the text of {i}, and its rest") for i in range(40)]
    texts = [P.chat(*both) for both in asked]
    rows = {"d.jsonl": [{"text": text} for text in texts],
            "sft.jsonl": [{"question": q, "answer": a} for q, a in asked],
            "talk.jsonl": [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}] * 2}
                           for q, a in asked]}
    for name, lines in rows.items():
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "d.txt").write_text("\n".join(texts))
    tokens = np.frombuffer("\0".join(texts).encode(), np.uint8).astype("<u2")
    np.save(folder / "d.npy", tokens)
    tokens.tofile(folder / "d.u16")


@torch.no_grad()
def write_model(path: Path, sizes: str, dtype: torch.dtype) -> None:
    """A new model to whose weights something is added, so that none is zero."""
    torch.manual_seed(0)
    model = P.without_values(P.new_arch(P.parse(sizes.split()))).to_empty(device="cpu").initialise()
    for p in model.parameters():
        p += 0.3 * torch.randn(p.shape) / p.shape[-1] ** 0.5
    P.save(path, {name: p.to(dtype) for name, p in model.named_parameters()})


# ------------------------------------------------------------------------------------------ what must hold


class Killed(Exception):
    """A run ends where it does not expect it."""


@contextlib.contextmanager
def killed_before(step: int) -> Iterator[None]:
    usual = P.train_step

    def train_step(run: P.Run, lr: float) -> dict:
        if run.step == step:
            raise Killed
        return usual(run, lr)

    P.train_step = train_step
    try:
        with contextlib.suppress(Killed):
            yield
    finally:
        P.train_step = usual


def run(*argv: object) -> tuple[int, str, str]:
    """The status of a command, what it prints, and its errors."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        status = P.main(" ".join(map(str, argv)).split())
    errors = [line for line in err.getvalue().splitlines() if "it/s" not in line and "step/s" not in line]
    return status, out.getvalue(), "\n".join(errors)


class Case:
    """One draw. A check returns what is wrong, "" if nothing is, None if it cannot be made."""

    def __init__(self, number: int, folder: Path):
        self.draw, self.folder = random.Random(number), folder / str(number)
        self.folder.mkdir()
        self.base, self.dtype = self.folder / "base.pth", self.draw.choice(DTYPES)
        write_model(self.base, self.draw.choice(MODELS), self.dtype)
        drawn = " ".join(map(self.draw.choice, CHOICES)).replace("@", f"{folder}/")
        self.argv = f"--load_model {self.base} {COMMON} {drawn}"
        self.cfg = P.parse(self.argv.split())
        self.last = self.folder / "out" / f"rwkv-{self.cfg.epoch_count - 1}.pth"

    def run(self, name: str, *more: object) -> tuple[int, str, str]:
        return run(self.argv, "--proj_dir", self.folder / name, *more)

    def results(self, name: str, but: str = "-") -> dict[str, object]:
        found = reliability.results(self.folder / name)
        return {item: x for item, x in found.items() if not item.startswith(but)}

    def refused(self, status: int, error: str) -> str:
        """What is wrong with a run that did not end well."""
        dry, _, again = self.run("dry", "--dry_run")
        late = "finite" in error and self.cfg.precision == "fp16"     # (found by the steps themselves)
        known = late or dry == 2 and any(reason in error for reason in REASONS)
        right = status == 2 and re.fullmatch("pissa_rwkv: error: .*", error) and known
        return "" if right else f"status {status}: {error}; dry run: {dry} {again}"

    def kept(self) -> str:
        """--grad_cp 0 and products lead to what 1 does, to the bit."""
        for way in ("0", "products"):
            status, _, error = self.run(way, "--grad_cp", way)
            refused = status == 2 and way == "products" and self.cfg.chunk_grad == "full"
            if not refused and (status or self.results(way, "resume") != self.results("out", "resume")):
                return f"--grad_cp {way}: {error or 'other results'}"
        return ""

    def resumed(self) -> str:
        """So does a run that is killed and resumed: the same files, and lines of loss_data.jsonl."""
        with killed_before(step := self.draw.randrange(1, 2 * self.cfg.epoch_count)):
            self.run("again")
        status, _, error = self.run("again", "--resume")
        return "" if not status and self.results("again") == self.results("out") else f"{step}: {error or 'differs'}"

    def counted(self) -> str:
        """--dry_run says how many numbers are trained: so many are saved."""
        status, said, error = self.run("dry", "--dry_run")
        trained = sum(t.numel() for t in P.read_pth(self.last, "").values())
        right = self.cfg.peft == "none" or f"would train {trained:,} of" in said
        return "" if status == 0 and right and not (self.folder / "dry").exists() else error or f"{trained}: {said}"

    @torch.no_grad()
    def merged(self) -> str | None:
        """The merged file computes what the base does with adapters, both as --chat opens them, in fp32: to rounding,
        if nothing was stored or computed in 16 bits. (At the median of five texts: single ones can be chaotic.)"""
        if self.cfg.peft == "none":
            return None
        file = self.folder / "merged.pth"
        init = f"--lora_init {self.last.with_name('init_pissa.pth')}" if self.cfg.peft == "pissa" else ""
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as err:
            if merge.main(f"--type {self.cfg.peft} --base_model {self.base} {init} --lora_checkpoint {self.last}"
                          f" --output {file}".split()):
                return err.getvalue()
            models = [P.load_chat(P.chat_config(P.parse(f"--chat --precision fp32 --load_model {x}".split()), set()))[0]
                      for x in (f"{self.base} --adapter_load {self.last}", file)]
        tokens = torch.tensor([[self.draw.randrange(1, 256) for _ in range(9)] for _ in range(5)])
        ours, wanted = (model(tokens)[0] @ model.head.weight.T for model in models)       # (5,9,V)
        off = ((ours - wanted).norm(dim=(1, 2)) / wanted.norm(dim=(1, 2))).median().item()
        exact = self.dtype == torch.float32 and self.cfg.precision in ("fp32", "tf32")
        return "" if off < (1e-5 if exact else 0.05) else f"logits differ by {off:.1e}"

    def shared(self) -> str | None:
        """Two ranks of one micro-batch find the losses of one rank with two, and the first gradient's norm. (It takes
        seconds: a share of the draws. At a low rate: Adam's first steps magnify how a sum is rounded.)"""
        if self.cfg.lora_dropout or self.draw.random() > SHARED:
            return None
        low = "--lr_init 1e-4 --lr_final 1e-4"
        self.run("one", low, "--accumulate_grad_batches 2")
        two, log = self.folder / "two", self.folder / "two.log"
        argv = f"{self.argv} {low} --accumulate_grad_batches 1 --proj_dir {two}"
        processes = reliability.start_ranks(argv.split(), 2, log)
        for process in processes:
            process.join(300)
        if any(process.exitcode != 0 for process in processes) or not (two / self.last.name).exists():
            return f"ranks ended with {[process.exitcode for process in processes]}: {log.read_text()}"
        ours, wanted = (self.results(name)["steps"] for name in ("two", "one"))
        pairs = zip(*([row.get("loss", row.get("val_loss")) for row in rows] for rows in (ours, wanted)), strict=True)
        off, exact = max(abs(a - b) / max(1, abs(b)) for a, b in pairs), self.cfg.precision in ("fp32", "tf32")
        norm, its = wanted[0]["grad_norm"], ours[0]["grad_norm"]
        norm_off = abs(its - norm) / max(norm, 1e-6)                  # (0: of windows in which nothing is learnt)
        good = off < (2e-5 if exact else 1e-2) and norm_off < (1e-3 if exact else 0.1)
        return "" if good else f"losses differ by {off:.1e}, the first gradient's norm by {norm_off:.1e}"


SHARED = 0.1                                                          # of the draws
CHECKS = (Case.kept, Case.resumed, Case.counted, Case.merged, Case.shared)


def examine(number: int, folder: Path, count: collections.Counter) -> list[str]:
    """Makes a draw, and all that must hold; counts, and returns what is wrong."""
    case = Case(number, folder)
    count["draws"] += 1
    try:
        status, _, error = case.run("out")
        count["refused"] += status == 2
        if status:
            found = {"refused": case.refused(status, error)}
        else:
            found = {check.__name__: wrong for check in CHECKS if (wrong := check(case)) is not None}
            count.update(found.keys())
    except Exception as e:             # whatever it is, it should have been a line
        found = {"traceback": f"{type(e).__name__}: {e}"}
    shutil.rmtree(case.folder)
    wrong = [f"{number} {check}: {text}\n    {case.argv}" for check, text in found.items() if text]
    count["wrong"] += len(wrong)
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--draws", type=int, default=500)
    parser.add_argument("--first", type=int, default=0, help="number of the first one")
    args = parser.parse_args()
    torch.set_num_threads(1)
    began, count = time.perf_counter(), collections.Counter(wrong=0)
    with tempfile.TemporaryDirectory() as folder:
        write_data(Path(folder))
        for number in tqdm(range(args.first, args.first + args.draws), disable=None):
            for text in examine(number, Path(folder), count):
                tqdm.write(text)
    row = {**count, "seconds": round(time.perf_counter() - began)}
    print(", ".join(f"{n} {name}" for name, n in row.items()))
    print(f"-> {record.write('combinations', [row])}")


if __name__ == "__main__":
    main()
