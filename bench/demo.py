"""Times the demonstration and keeps what it printed last -> bench/results/demo.json, which README shows.

    python bench/demo.py
"""

import subprocess
import sys
import tempfile
import time

import record


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        command = [sys.executable, "-m", "torch.distributed.run", str(record.ROOT / "pissa_rwkv.py")]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
        seconds = time.perf_counter() - began
    output = done.stdout[done.stdout.index("   held out"):].rstrip()
    print(output, record.write("demo", [{"seconds": round(seconds), "output": output}]), sep="\n")


if __name__ == "__main__":
    main()
