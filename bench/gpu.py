"""Everything that needs a GPU, in one command, for someone who has one for a short time.

    python bench/gpu.py OUT                          # builds, tests, sanitizers, benchmarks: an hour
    python bench/gpu.py OUT --minutes 9 --only build tune tests bench
    python bench/gpu.py OUT --minutes 9 --only dequant segments memory levers
    python bench/gpu.py OUT --minutes 9 --only step learning --qa gsm8k_train.jsonl gsm8k_test.jsonl
    python bench/gpu.py OUT --minutes 6 --only memory step --models RWKV7-1.5B
    python bench/gpu.py OUT --list                   # what would be done, and what is missing; does nothing

Into OUT, which need not exist: log.txt (all output), steps.json (what happened and how long it took) and the results,
each as soon as there is a row: copy them to bench/results (they began as those there), then `python bench/readme.py`.
A step that cannot run says why in one line, and the next begins. Sources without git: give --commit.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import record

TABLE = 11_000  # characters of the benchmark's output that are shown
LAST_WORDS = 15  # s that a step which is stopped may still take


class Step(NamedTuple):
    """A command; the program it needs; the most it may take, s (0: what is left); statuses after which it runs again;
    the file of its results"""

    command: list[str]
    needs: str = ""
    seconds: float = 300
    again_after: tuple[int, ...] = ()
    result: str = ""


BUILD = """
import concurrent.futures, functools
import sequential, torch, wkv7_cuda
from wkv7_cuda import cpu, cuda_precise, dequant, fast, nvcc, wkv6_cuda

def opened(module, *flags):
    return nvcc.open_library(module.SOURCE, module.bind, torch.cuda.get_device_capability(), *flags)

def reads():
    if dequant.library_for(torch.device("cuda"), print) is None:
        raise RuntimeError("PyTorch reads quantised matrices")

compiled = [(opened, wkv6_cuda), (opened, fast, *fast.FLAGS), (opened, cuda_precise), (opened, dequant),
            (sequential.load,), (cpu.open_library, "wkv7"), (cpu.open_library, "wkv6")]
with concurrent.futures.ThreadPoolExecutor() as pool:  # one after another they take three times as long as the longest
    for call in compiled:
        pool.submit(*call)                             # who fails does so below again, and is told
ours = {f"{recurrence} {op}": functools.partial(wkv7_cuda.load, op, recurrence)
        for recurrence, ops in wkv7_cuda.OPS.items() for op in ops}
for name, load in (ours | {"dequant": reads, "sequential": sequential.load}).items():
    try:
        load()
        print(name, "built", flush=True)
    except Exception as error:
        print(name, "not built:", str(error).splitlines()[0][:200], flush=True)
"""
SMALL = """
import os
os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # what is beyond a tensor would be the cache's, and so no error
import contestants, torch, wkv, wkv7_cuda
for dtype in (torch.bfloat16, torch.float32):
    for its in wkv.RECURRENCES.values():
        for name in (op for op in wkv7_cuda.OPS[its.name] if op.startswith("cuda")):
            f = wkv7_cuda.load(name, its.name)
            for shape in ((1, 1, 1), (1, 33, 2), (2, 80, 1)):
                wkv.results(f, wkv.make(shape, dtype, "cuda", its=its), True)
            torch.cuda.synchronize()
            print(its.name, name, dtype, "ran", flush=True)
"""


def steps(out: Path, commit: str, qa: list[str] | None = None, models: list[str] | None = None) -> dict[str, Step]:
    """In the order of their worth. qa: files of questions, to train on and held out; models: of `memory` and `step`."""
    python, bench = sys.executable, record.ROOT / "bench"
    into = ["--out", str(out), *(["--commit", commit] if commit else [])]
    run = f"import sys; sys.path[:0] = [{str(record.ROOT)!r}, {str(bench)!r}]\n"
    checker = ["compute-sanitizer", "--error-exitcode", "9", "--tool"]
    timed = ["--minutes", "{minutes}", *into]
    measure = [python, str(bench / "wkv.py"), "--device", "cuda", *timed]
    twelve = ["-n", "12"] if importlib.util.find_spec("xdist") else []
    tests = ["env", "OMP_NUM_THREADS=1", python, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", *twelve,
             "tests"]                                    # (twelve times all cores would mostly wait for each other)
    of_models = ["--models", *models] if models else []
    learning = [python, str(bench / "curves.py"), "--size", "large", "--jobs", "4", *timed,
                *(["--qa", qa[0], "--qa_held_out", qa[1]] if qa else [])]  # fmt: skip
    return {
        "machine": Step(["nvidia-smi"], "nvidia-smi", 60),
        "build": Step([python, "-c", run + BUILD], "", 600),
        "tune": Step([python, str(bench / "fla_tune.py")], "", 240),
        "tests": Step(tests, "", 180),                   # (what comes later needs the rest)
        # (Whether a function of the driver is there, libraries ask by calls that fail: no error of a kernel.)
        "memcheck": Step([*checker, "memcheck", "--report-api-errors", "no", python, "-c", run + SMALL],
                         "compute-sanitizer", 240),
        "racecheck": Step([*checker, "racecheck", python, "-c", run + SMALL], "compute-sanitizer", 240),
        "dequant": Step([python, str(bench / "dequant.py"), *into], "", 150, (), "dequant-cuda"),
        "segments": Step([python, str(bench / "segments.py"), *into], "", 90, (), "segments-cuda"),
        "curve": Step([python, str(bench / "wkv_curve.py"), *into], "", 240, (), "wkv_curve-cuda"),
        "memory": Step([python, str(bench / "vram.py"), *of_models, *timed], "", 480, (), "vram"),
        "levers": Step([python, str(bench / "vram.py"), "--levers", "--models", "RWKV7-7.2B", *timed], "", 300, (),
                       "vram-levers"),
        "step": Step([python, str(bench / "step.py"), "--quick", *of_models, *timed], "", 500, (), "step-cuda"),
        "learning": Step(learning, "", 500, (3,), "curves-large"),
        "wkv6": Step([*measure, "--recurrence", "wkv6"], "", 240, (3,), "wkv6-cuda"),
        "bench": Step(measure, "", 0, (3,), "wkv-cuda"),
    }


def allocator() -> str:
    """Where the driver knows no growing segments, which a run asks for: what to tell torch's allocator instead."""
    run = [sys.executable, "-c", "import torch; torch.zeros(2**26, device='cuda')"]
    env = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"} | os.environ
    if not shutil.which("nvidia-smi") or os.environ.keys() & {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"}:
        return ""
    said = subprocess.run(run, env=env, capture_output=True).stderr
    return "expandable_segments:False" if b"operation not supported" in said else ""


def missing(step: Step) -> str:
    """Why a step cannot run, or nothing."""
    places = [step.needs, f"/usr/local/cuda/bin/{step.needs}"]
    if step.needs and not any(map(shutil.which, places)):
        return f"{step.needs} is not there"
    if not shutil.which("nvidia-smi"):
        return "no NVIDIA GPU: nvidia-smi is not there"
    return ""


def run(name: str, step: Step, seconds: float, log: Path) -> dict:
    """The step's command, its output at the end of the log; status, seconds and last lines."""
    program = shutil.which(step.command[0]) or f"/usr/local/cuda/bin/{step.command[0]}"
    command = [program, *(word.replace("{minutes}", f"{seconds / 60 - 0.5:.1f}") for word in step.command[1:])]
    start = time.monotonic()
    with open(log, "a") as file:
        print(f"\n==== {name}", file=file, flush=True)
        begin = file.tell()
        process = subprocess.Popen(command, cwd=record.ROOT, stdout=file, stderr=subprocess.STDOUT,
                                   start_new_session=True, env=os.environ | {"PYTHONUNBUFFERED": "1"})  # fmt: skip
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            status = f"stopped after {seconds:.0f} s"
            with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(process.pid, signal.SIGINT)    # at which pytest says what failed
                process.wait(LAST_WORDS)
        finally:                                         # with all that it started, which would stay on the GPU
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    text = log.read_bytes()[begin:].decode(errors="replace").strip()
    return {"step": name, "status": status, "seconds": round(time.monotonic() - start, 1), "text": text}


def perform(name: str, step: Step, deadline: float, log: Path) -> list[dict]:
    """Rows of steps.json: one, or one for each time that the step went on after a failure it can go on from."""
    reason = missing(step)
    if reason:
        return [{"step": name, "status": f"left out: {reason}", "seconds": 0, "text": ""}]
    rows = []
    while not rows or rows[-1]["status"] in step.again_after and len(rows) < 5:
        left = deadline - time.monotonic()
        if left < 40:
            return rows or [{"step": name, "status": "left out: no time is left", "seconds": 0, "text": ""}]
        rows.append(run(name, step, min(step.seconds or left, left), log))
    return rows


def show(row: dict) -> None:
    """One line; of the benchmark all that it printed."""
    lines = row["text"].splitlines()
    if row["step"] == "bench":
        print(row["text"][-TABLE:])
    print(f"{row['step']}: {row['status']}, {row['seconds']} s" + (f", {lines[-1][:120]}" if lines else ""), flush=True)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    p.add_argument("out", type=Path, help="folder for all that comes out")
    p.add_argument("--minutes", type=float, default=60, help="for everything")
    p.add_argument("--only", nargs="+", choices=list(steps(Path(), "")), help="these steps alone")
    p.add_argument("--qa", nargs=2, metavar=("TRAIN", "HELD_OUT"), help="questions for bench/curves.py, .jsonl")
    p.add_argument("--models", nargs="+", help="of memory and step, instead of all, such as RWKV7-1.5B")
    p.add_argument("--commit", default="", help="name of the sources where git does not tell")
    p.add_argument("--list", action="store_true", help="list the steps and what is missing")
    return p


def main(argv: list[str] | None = None) -> int:
    """Status 0 if every step that could run ended well."""
    args = parser().parse_args(argv)
    out, deadline = args.out.resolve(), time.monotonic() + 60 * args.minutes
    todo = {name: step for name, step in steps(out, args.commit, args.qa, args.models).items()
            if name in (args.only or [name]) and (name != "learning" or args.qa)}
    if args.list:
        for name, step in todo.items():
            print(f"{name}: {missing(step) or 'can run'}")
        return 0
    out.mkdir(parents=True, exist_ok=True)
    # Rows that are there already are kept, and most of them not measured again.
    for file in (f"{step.result}.json" for step in todo.values() if step.result):
        if not (out / file).exists() and (record.RESULTS / file).exists():
            shutil.copy(record.RESULTS / file, out)
    if setting := allocator():
        print(f"growing segments do not work here: PYTORCH_ALLOC_CONF={setting}", flush=True)
        os.environ["PYTORCH_ALLOC_CONF"] = setting
    rows = []
    for name, step in todo.items():
        for row in perform(name, step, deadline, out / "log.txt"):
            show(row)
            rows.append({k: v for k, v in row.items() if k != "text"})
            (out / "steps.json").write_text(json.dumps(rows, indent=1) + "\n")
    return int(any(row["status"] not in (0, *todo[row["step"]].again_after)
                   and not str(row["status"]).startswith("left out") for row in rows))  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
