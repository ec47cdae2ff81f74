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


def circumstances(device: str = "cpu") -> dict:
    """What a figure depends on besides the code it measures."""
    if device == "cuda":
        machine = torch.cuda.get_device_name()
        driver = subprocess.run(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
                                capture_output=True, text=True).stdout.strip()
    else:
        cpuinfo = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
        model, driver = re.search(r"^model name\s*: (.*)$", cpuinfo, re.M), ""
        machine = model[1].strip() if model else platform.processor()
    git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    return {"device": device, "machine": machine, "driver": driver, "threads": torch.get_num_threads(),
            "torch": torch.__version__, "python": platform.python_version(), "commit": git.stdout.strip() or "none",
            "date": date.today().isoformat(), "load": round(os.getloadavg()[0], 1)}


def write(name: str, rows: list[dict], device: str = "cpu") -> Path:
    """Writes the rows, with their circumstances, and returns the file."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    path, about = RESULTS / f"{name}.json", circumstances(device)
    path.write_text("[\n" + ",\n".join(json.dumps({**row, **about}) for row in rows) + "\n]\n")
    return path


def read(name: str) -> list[dict]:
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else []
