"""Crashes training runs at every change of a file, by `ckpt-chaos`, a tester by others, and resumes each of them.

    pip install ckpt-chaos
    python bench/chaos.py               # 1 and 2 ranks, about half an hour -> bench/results/chaos.json

The tool runs the command once to the end and counts what it does to files: opened for writing, renamed, removed. Then
it runs it anew for every one of these and every way to crash there, resumes, and judges. The ways: before (killed just
before), torn (the file cut in half, and killed), term (SIGTERM, and killed 5 seconds later if it is still there), and
unsynced (killed, and all that was not flushed to the disk is lost). Its verdicts: PASS, HARD_FAIL (it does not resume),
SILENT_DIVERGENCE (other weights in the end), LOST_WORK (resumed from an older file of an epoch).

It knows nothing of resume.pth, whose name has no number. So three more things are counted: runs that resumed from an
earlier step than that of the last resume.pth renamed to its place; finished runs of which any .pth differs from the
uninterrupted run's in one bit; and points where the crash was not at the event it was meant for.
"""

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path

import record
import reliability

MODES = ("before", "torn", "term", "unsynced")
VERDICTS = ("PASS", "HARD_FAIL", "SILENT_DIVERGENCE", "LOST_WORK")


def events(point: Path) -> list[tuple[str, str]]:
    """What rank 0 did to files: how, and the file's name without the number of the process that is part of it."""
    lines = (line.split("\t") for line in (point / "events.log.rank0").read_text().splitlines())
    return [(kind, re.sub(r"\.\d+\.part$", ".part", name)) for _, kind, name, _ in lines]


def weights(point: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted((point / "out").glob("*.pth"))}


def count_more(work: Path) -> dict[str, int]:
    """What the tool does not see, counted from what it leaves behind."""
    planned, wanted = events(work / "reference"), weights(work / "reference")
    count = dict.fromkeys(("older_step", "other_files", "elsewhere"), 0)
    for path in work.glob("pt_[0-9]*/result.json"):
        result = json.loads(path.read_text())
        number, mode = result["point"]
        saved = planned[:number - 1].count(("os.rename", ".resume.pth.part"))
        count["older_step"] += (result["outcome"]["resumed_from_step"] or 0) < saved
        count["other_files"] += weights(path.parent) != wanted
        count["elsewhere"] += events(path.parent)[:number] != planned[:number]
    return count


def torture(argv: list[str], work: Path, ranks: int, jobs: int = 1, modes: tuple[str, ...] = MODES) -> dict:
    """Runs the tool's whole matrix on a command without --proj_dir, and counts its verdicts."""
    program = [sys.executable, str(record.ROOT / "pissa_rwkv.py"), *argv, "--proj_dir", "{out}", "--resume"]
    tool = ["-m", "ckpt_chaos", "run", "--work", work, "--ranks", ranks, "--jobs", jobs, "--max-points", 10_000,
            "--modes", ",".join(modes), "--checkpoint-glob", "{out}/rwkv-*.pth", "--result-file", "{out}/rwkv-1.pth",
            "--step-regex", r"resumed at step (\d+)", "--fail-on", ",".join(VERDICTS[1:]), "--"]
    began, env = time.perf_counter(), {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(record.ROOT)}
    status = subprocess.call([sys.executable, *map(str, tool), *program], env=env)
    verdicts = [json.loads(path.read_text()) for path in work.glob("pt_*/result.json")]
    if not verdicts:
        raise SystemExit(f"ckpt-chaos gave no verdict (status {status})")
    from ckpt_chaos.runner import rejudge

    found = [row.verdict for row in rejudge(work)]
    return {"ranks": ranks, "modes": list(modes), "events": len(events(work / "reference")), "points": len(found),
            **{verdict: found.count(verdict) for verdict in VERDICTS}, **count_more(work), "status": status,
            "ckpt_chaos": metadata.version("ckpt-chaos"), "seconds": round(time.perf_counter() - began)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--ranks", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--modes", nargs="*", default=MODES)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    args = parser.parse_args()
    for ranks in args.ranks:
        with tempfile.TemporaryDirectory() as folder:
            argv = [*reliability.small_run(Path(folder)), *"--rank 4 --epoch_steps 1 --epoch_count 2".split()]
            row = torture(argv, Path(folder) / "chaos", ranks, args.jobs, tuple(args.modes))
        print(row)
        record.update(record.RESULTS / "chaos.json", [{**row, **record.circumstances()}], ("ranks", "modes"))


if __name__ == "__main__":
    main()
