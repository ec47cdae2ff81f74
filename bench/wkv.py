"""Time and error of every WKV-7 operator that runs on this machine.

    python bench/wkv.py                 # CPU, or CUDA if there is a GPU -> bench/results/wkv-<device>.json and a table
    python bench/wkv.py --device cpu --shapes 1,512,12

One row per operator and shape (B,T,H), head size 64: median time of a forward pass without gradients and of forward
plus backward (all seven gradients, also through the final state), how many times faster the latter is than that of the
plain recurrence `torch` (pissa_rwkv.wkv7_ref with autograd), peak memory on CUDA, and the relative error of y and each
gradient against the plain recurrence in float64 on the same inputs. float32, and on CUDA bfloat16 too. Figures from a
machine with other work (see `load`, the load average at the start) mean little.
"""

import argparse
import statistics
import sys
import time

import record
import torch

import wkv7_cuda
from pissa_rwkv import wkv7_ref

OPS = {  # name -> (devices, what loads it); the first is what the others are compared with
    "torch": (("cpu", "cuda"), lambda: wkv7_ref),
    "chunk": (("cpu", "cuda"), lambda: wkv7_cuda.load("chunk")),
    "cpu": (("cpu",), lambda: wkv7_cuda.load("cpu")),
    "cuda": (("cuda",), lambda: wkv7_cuda.load("cuda")),
    "triton": (("cuda",), lambda: wkv7_cuda.load("triton")),
    "fla": (("cuda",), lambda: wkv7_cuda.load("fla")),
}
SHAPES = {"cpu": ["1,512,12", "1,128,12", "4,128,12", "1,1,12"], "cuda": ["1,512,12", "8,512,32", "1,1024,40"]}
DTYPES = {"cpu": [torch.float32], "cuda": [torch.float32, torch.bfloat16]}
NAMES = ("y", "state", "dr", "dw", "dk", "dv", "da", "db", "dstate")


def make(B, T, H, dtype, device):
    """Inputs as a trained model makes them: r k v ~ N(0,1), kappa of length 1, decays from 0.55 to nearly 1."""
    generator = torch.Generator().manual_seed(0)
    r, w, k, v, u, eta, dy = (torch.randn(B, T, H, 64, generator=generator) for _ in range(7))
    state, dstate = (torch.randn(B, H, 64, 64, generator=generator) for _ in range(2))
    kappa, eta = u / u.norm(dim=-1, keepdim=True), eta.sigmoid()
    inputs = [x.to(device, dtype) for x in (r, 3 * w - 3, k * eta, v, -kappa, kappa * eta)] + [state.to(device)]
    return [x.requires_grad_() for x in inputs], dy.to(device, dtype), dstate.to(device)


def both(f, inputs, dy, dstate):
    """Forward and backward; the nine results, as NAMES."""
    y, state = f(*inputs)
    return y, state, *torch.autograd.grad((y, state), inputs, (dy, dstate))


def milliseconds(call, device, seconds):
    """Median over as many calls as fit into `seconds`, at least 3; the first call is not counted."""
    times, deadline = [], None
    while len(times) < 4 or time.perf_counter() < deadline:
        if device == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
        else:
            start = time.perf_counter()
            call()
            times.append(1e3 * (time.perf_counter() - start))
        deadline = deadline or time.perf_counter() + seconds
    return statistics.median(times[1:])


def measure(f, shape, dtype, device, seconds, exact):
    """The numbers of one row."""
    case = make(*shape, dtype, device)

    def forward():
        with torch.no_grad():
            f(*case[0])

    row = {"forward_ms": milliseconds(forward, device, seconds)}
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    row["both_ms"] = milliseconds(lambda: both(f, *case), device, seconds)
    if device == "cuda":
        row["peak_mib"] = (torch.cuda.max_memory_allocated() - before) / 2**20
    found = both(f, *case)
    row["error"] = {
        name: ((x.double() - e).norm() / e.norm()).item() for name, x, e in zip(NAMES, found, exact, strict=True)
    }
    return row


def rows_of(shape, dtype, device, seconds):
    """One row per operator; one that cannot be built here says so on stderr and has none."""
    inputs, dy, dstate = make(*shape, dtype, device)
    exact = both(wkv7_ref, [x.detach().double().requires_grad_() for x in inputs], dy.double(), dstate.double())
    exact, plain = [x.detach() for x in exact], None
    for op, (devices, load) in OPS.items():
        if device not in devices:
            continue
        try:
            row = measure(load(), shape, dtype, device, seconds, exact)
        except wkv7_cuda.BuildError as error:
            print(f"{op}: {error}", file=sys.stderr)
            continue
        plain = plain or row["both_ms"]
        yield {"op": op, "shape": list(shape), "dtype": str(dtype).removeprefix("torch."), **row,
               "ratio": plain / row["both_ms"]}  # fmt: skip


def main():
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--device", choices=["cpu", "cuda"], default=default)
    parser.add_argument("--shapes", nargs="+", help="each B,T,H")
    parser.add_argument("--seconds", type=float, default=2, help="spent on each median")
    args = parser.parse_args()
    about, rows = record.circumstances(args.device), []
    print("{machine}, {threads} threads, load {load:.1f}, torch {torch}, commit {commit}".format(**about))
    print("op          B,T,H     dtype  forward ms   both ms   ratio  error y    worst gradient")
    for shape in args.shapes or SHAPES[args.device]:
        for dtype in DTYPES[args.device]:
            for row in rows_of(tuple(map(int, shape.split(","))), dtype, args.device, args.seconds):
                rows.append(row)
                worst = max(NAMES[2:], key=row["error"].get)
                print(f"{row['op']:6} {shape:>10} {row['dtype']:>9} {row['forward_ms']:11.2f} {row['both_ms']:9.2f} "
                      f"{row['ratio']:7.1f} {row['error']['y']:8.1e} {worst:>8} {row['error'][worst]:.1e}")  # fmt: skip
    print(record.write(f"wkv-{args.device}", rows, args.device))


if __name__ == "__main__":
    main()
