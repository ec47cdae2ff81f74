"""Where a warp waits in the walks of wkv7_fast.cu and wkv6.cu, by their machine code: a model, for want of a GPU.

    python bench/sass.py [--source wkv6.cu] [--arch 90a] [--lines 8]

ptxas writes into every instruction how many cycles the warp waits after it, and which of six scoreboards it waits for
(the control codes). With a table of latencies that says when a warp that is alone issues each instruction of the loop
over chunks, and so what each line of the source takes. It shows what was serialised without need: a load behind a
branch, a chain of products. Not seen: caches, bank conflicts, other warps and blocks. No figure of it is a measurement.

nvdisasm comes with CUDA, with `pip install triton`, or with `pip install nvidia-cuda-nvdisasm`.
"""

import argparse
import importlib.util
import itertools
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
# Cycles from issue to result where a scoreboard says when: published micro-benchmarks of Ampere and Hopper, rounded.
LATENCY = {"LDS": 30, "LDSM": 33, "MUFU": 24, "SHFL": 24, "LDG": 450, "LDC": 30, "MOVM": 30, "STS": 12, "STG": 12}
OTHERS, READ = 20, 12                                                 # of any other; until its operands have been read
PRODUCT, NEXT_PRODUCT, NEXT_MUFU = 33, 6, 8                           # HMMA is interlocked by its registers
TRIPS = {"wkv7_fast.cu": [], "wkv6.cu": [4, 2]}                       # how often its last inner loops are gone through


class Instruction(NamedTuple):
    text: str                                                         # without its predicate
    guarded: bool                                                     # has one
    line: int                                                         # of the source; 0: of none
    stall: int                                                        # cycles until the next one
    sets: int                                                         # scoreboard that its result sets; 7: none
    frees: int                                                        # that it sets when its operands are read
    waits: int                                                        # a bit a scoreboard

    @property
    def op(self) -> str:
        return re.split(r"[. ]", self.text, maxsplit=1)[0]

    def registers(self, operand: int, count: int) -> range:
        operands = [x.strip() for x in self.text.partition(" ")[2].split(",")]
        found = re.match(r"R(\d+)", operands[operand]) if operand < len(operands) else None
        return range(int(found[1]), int(found[1]) + count) if found else range(0)


Code = list["Instruction | str"]                                      # a str is a label


def parse(listing: str, source: str) -> dict[str, Code]:
    """Kernels of `nvdisasm -c -hex -gi`. Of the 128 bits of an instruction the upper half has the control codes. A line
    is that in the file `source` from which what stands there was called, if it is of another."""
    kernels: dict[str, Code] = {}
    code, line, text, begins = [], 0, "", True
    for row in listing.splitlines():
        if m := re.match(r"\s*\.type\s+(\S+),@function", row):
            code = kernels.setdefault(m[1], [])
        elif m := re.match(r'\s*//## File "(?:.*/)?([^"]+)", line (\d+)', row):
            line = 0 if begins else line
            line, begins = line or int(m[2]) * (m[1] == source), False
        elif m := re.match(r"(\.L_\w+):", row):
            code.append(m[1])
        elif m := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;\s+/\* 0x[0-9a-f]{16} \*/", row):
            text = m[1]
        elif (m := re.match(r"\s+/\* 0x([0-9a-f]{16}) \*/", row)) and text:
            bits, bare = int(m[1], 16), re.sub(r"^@!?U?P\w+\s+", "", text)
            code.append(Instruction(bare, bare != text, line, bits >> 41 & 15, bits >> 46 & 7, bits >> 49 & 7,
                                    bits >> 52 & 63))
            text, begins = "", True
    return kernels


def target(instruction: "Instruction | str") -> str:
    m = re.search(r"\((\.L_\w+)\)", instruction.text) if not isinstance(instruction, str) else None
    return m[1] if m and instruction.op == "BRA" else ""


def walk(code: Code, trips: list[int]) -> list[tuple[float, Instruction]]:
    """When each instruction is issued in one turn of the largest loop. What is guarded by a forward branch is gone
    through, inner loops as often as `trips` says."""
    at = {x: i for i, x in enumerate(code) if isinstance(x, str)}
    back = {i: at[t] for i, x in enumerate(code) if (t := target(x)) in at and at[t] < i}
    last = max(back, key=lambda i: i - back[i])
    inner = [i for i in sorted(back) if back[last] < back[i] and i < last]
    left = dict(zip(reversed(inner), reversed([1] * len(inner) + trips), strict=False))   # turns
    score, products, free = [0.0] * 8, {}, Counter()
    now, stall, out, i = 0.0, 1, [], back[last]
    while i <= last:
        x, i = code[i], i + 1
        if isinstance(x, str):
            continue
        ready = max([now + max(1, stall), free[x.op], *(score[n] for n in range(6) if x.waits >> n & 1)])
        used = [*x.registers(1, 4), *x.registers(2, 2), *x.registers(3, 4)] if x.op == "HMMA" else [
            int(n) for n in re.findall(r"\bR(\d+)", x.text)]
        ready = max([ready, *(products.get(n, 0) for n in used)])
        out.append((ready, x))
        now, stall = ready, x.stall
        for n in x.registers(0, 4 if x.op == "HMMA" else 1):
            products[n] = now + PRODUCT if x.op == "HMMA" else 0
        free[x.op] = now + {"HMMA": NEXT_PRODUCT, "MUFU": NEXT_MUFU}.get(x.op, 0)
        score[x.sets] = max(score[x.sets], now + LATENCY.get(x.op, OTHERS)) if x.sets < 6 else 0
        score[x.frees] = max(score[x.frees], now + READ) if x.frees < 6 else 0
        if left.get(i - 1, 1) > 1:
            left[i - 1] -= 1
            i = back[i - 1]
        elif not x.guarded and (to := at.get(target(x), 0)) > i:
            i = to
    return out


def nvdisasm() -> str:
    spec = importlib.util.find_spec("triton")
    beside = Path(spec.submodule_search_locations[0]) / "backends/nvidia/bin/nvdisasm" if spec else Path()
    return shutil.which("nvdisasm") or (str(beside) if beside.is_file() else "")


def disassemble(source: Path, arch: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        flags = ["-ftz=true"] if source.name == "wkv7_fast.cu" else []
        subprocess.run(["nvcc", "-std=c++17", "-O3", *flags, "-lineinfo", f"-arch=sm_{arch}", "-cubin", "-o",
                        f"{folder}/x.cubin", source], check=True)  # fmt: skip
        return subprocess.run([nvdisasm(), "-c", "-hex", "-gi", f"{folder}/x.cubin"], check=True, capture_output=True,
                              text=True).stdout  # fmt: skip


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--source", default="wkv7_fast.cu", choices=list(TRIPS))
    p.add_argument("--arch", default="90a")
    p.add_argument("--lines", type=int, default=8, help="of the source that waited longest, to be shown")
    args = p.parse_args()
    if not nvdisasm() or not shutil.which("nvcc"):
        sys.exit("needs nvcc and nvdisasm: the CUDA toolkit, or nvidia-cuda-nvcc and nvidia-cuda-nvdisasm from pip")
    path = ROOT / "wkv7_cuda" / args.source
    source = path.read_text().splitlines()
    modes = re.search(r"enum Mode \{(.*?)\}", path.read_text())[1].replace(" ", "").split(",")
    for name, code in parse(disassemble(path, args.arch), path.name).items():
        mode = re.search(r"walk_kernel.*?ModeE(\d)E(f|6__half|13__nv_bfloat16)?", name)
        if not mode or mode[2] in ("f", "6__half"):
            continue
        issued = walk(code, TRIPS[args.source])
        at = [when for when, x in issued if x.op == "BAR"] + [issued[-1][0]]
        stages = " ".join(f"{b - a:.0f}" for a, b in itertools.pairwise(at))
        print(f"{modes[int(mode[1])]}: a chunk is {len(issued)} instructions of a warp, {at[-1]:.0f} cycles if it is"
              f" alone; from barrier to barrier {stages}")
        taken = Counter()
        for (before, _), (when, x) in itertools.pairwise(issued):
            taken[x.line] += when - before
        for line, cycles in taken.most_common(args.lines):
            print(f"{cycles:8.0f} in line {line:4}  {source[line - 1].strip()[:90] if line else ''}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
