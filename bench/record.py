"""Where measurements go: bench/results/<name>.json, a list of rows, each with the machine, version, commit and date."""

import json
import os
import platform
import re
import subprocess
import sys
from datetime import date
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
sys.path.insert(0, str(ROOT))  # benchmarks run from a checkout that is not installed


def circumstances(device: str = "cpu", commit: str = "") -> dict:
    """What a figure depends on besides the code it measures. commit: of a copy of the sources that is no checkout."""
    if device == "cuda":
        machine = torch.cuda.get_device_name()
        driver = output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    else:
        cpuinfo = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
        model, driver = re.search(r"^model name\s*: (.*)$", cpuinfo, re.M), ""
        machine = model[1].strip() if model else platform.processor()
    return {"device": device, "machine": machine, "driver": driver, "threads": torch.get_num_threads(),
            "torch": torch.__version__, "python": platform.python_version(), "commit": commit or head(),
            "date": date.today().isoformat(), "load": load_now()}


def load_now() -> float:
    """The load average of the last minute."""
    return round(os.getloadavg()[0], 1)


def head() -> str:
    """The commit, with `-dirty` if anything but results and text that is made from them differs; `none` without git."""
    changed = output("git", "status", "--porcelain", "--untracked-files=no", "--", ".", ":!bench/results", ":!*.md")
    return (output("git", "rev-parse", "--short", "HEAD") or "none") + ("-dirty" if changed else "")


def output(*command: str) -> str:
    """What the command prints; nothing where there is no such command."""
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    except FileNotFoundError:
        return ""


def write(name: str, rows: list[dict], device: str = "cpu") -> Path:
    """Writes the rows, with their circumstances, and returns the file."""
    about = circumstances(device)
    return save(RESULTS / f"{name}.json", [{**row, **about} for row in rows])


def save(path: Path, rows: list[dict]) -> Path:
    """One row a line; the file is written beside its place and renamed, so that stopping leaves the old or the new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".tmp")
    beside.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
    beside.replace(path)
    return path


def update(path: Path, rows: list[dict], key: tuple[str, ...]) -> Path:
    """Rows whose circumstances are in them already join the file's. Each takes the place of the one that it measures
    again: the same machine and the same values of `key`. All others stay, of other machines and of earlier commits."""
    def identity(row: dict) -> str:
        return json.dumps([row.get(name) for name in ("machine", *key)])

    new = {identity(row) for row in rows}
    return save(path, [row for row in load(path) if identity(row) not in new] + rows)


def load(path: Path) -> list[dict]:
    return json.loads(path.read_text()) if path.exists() else []


def read(name: str) -> list[dict]:
    return load(RESULTS / f"{name}.json")
