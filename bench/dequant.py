"""How fast quantised matrices are read: dequant.cu beside a copy and PyTorch -> bench/results/dequant-<device>.json

    python bench/dequant.py                    # without a GPU only PyTorch's readers
    python bench/dequant.py --shapes 4096x4096 --dtypes bfloat16 float16 float32

One row per matrix, format and dtype. bytes is what must move: codes and scales in, W out; GB/s are bytes / time. `copy`
is `dst.copy_(src)` moving the same number of bytes, in the same way and the same run: share = kernel / copy is how much
of the memory's speed is used (target: 0.8). A matrix much smaller than the GPU's L2 measures the start of a kernel.

On a GPU as many matrices take turns, each with an output of its own, as make 4 times its L2 (at least 512 MB): none is
met in a cache (PyTorch's readers: at most 8). Their calls are one CUDA graph, timed by events; the median of its
replays over the calls: the host does not count. call_us is what a call takes with the host, one after another, as in
training. On a CPU: the median of calls.
Before that the values are compared, bit by bit.
"""

import argparse
import itertools
import statistics
import sys
import time
from functools import partial
from pathlib import Path

import record
import torch
import wkv

import pissa_rwkv as P
from wkv7_cuda import dequant

WIDTHS = {"0.1B": 768, "0.4B": 1024, "1.5B": 2048, "2.9B": 2560, "7.2B": 4096}
SHAPES = {f"{rows}x{C}": model for model, C in WIDTHS.items() for rows in (C, 4 * C)}  # att; ffn.key
PLAIN = {"int8": P.read_int8, "nf4": P.read_nf4, "nf4dq": P.read_nf4dq}
REPLAYS = 15


def in_a_graph(calls):
    """Seconds of one of the calls, median over replays. What they return is kept, or it would share memory."""
    calls[0]()
    torch.cuda.synchronize()
    graph, times = torch.cuda.CUDAGraph(), []
    with torch.cuda.graph(graph):
        kept = [call() for call in calls]
    for _ in range(3 + REPLAYS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        wkv.keep_busy()
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3 / len(kept))
    return statistics.median(times[3:])


def with_host(calls):
    """Seconds of one of the calls, issued one after another."""
    for _ in range(2):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for call in calls:
            call()
        end.record()
        end.synchronize()
    return begin.elapsed_time(end) / 1e3 / len(calls)


def on_cpu(call, seconds=0.3):
    times, deadline = [], time.perf_counter() + seconds
    while len(times) < 4 or time.perf_counter() < deadline:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def copies(bytes_each, count):
    """Calls that copy: each reads and writes as many bytes, together, as a matrix (but for a few of rounding)."""
    sizes = [2, -(-bytes_each // 32) * 16]
    pairs = [torch.empty(sizes, dtype=torch.uint8, device="cuda") for _ in range(count)]
    return [partial(pair[1].copy_, pair[0]) for pair in pairs]


def measure(quant, shape, dtype, device):
    """The figures of one row."""
    read, plain = P.QUANT[quant].read, PLAIN[quant]
    parts = P.QUANT[quant].hold(torch.randn(shape, device=device), dtype)
    nbytes = sum(part.nbytes for part in parts.values()) + shape.numel() * dtype.itemsize
    row = {"bytes": nbytes, "weights": shape.numel()}
    if device == "cpu":
        seconds = on_cpu(partial(plain, parts, shape, dtype))
        return row | {"plain_us": 1e6 * seconds, "plain_gb_s": nbytes / seconds / 1e9}
    row["same"] = torch.equal(read(parts, shape, dtype), plain(parts, shape, dtype))
    count = -(-max(4 * torch.cuda.get_device_properties(0).L2_cache_size, 2**29) // nbytes)
    turns = [{name: part.clone() for name, part in parts.items()} for _ in range(count)]
    figures = {
        "kernel": in_a_graph([partial(read, parts, shape, dtype) for parts in turns]),
        "copy": in_a_graph(copies(nbytes, count)),
        "plain": in_a_graph([partial(plain, parts, shape, dtype) for parts in turns[:8]]),
    }
    for name, seconds in figures.items():
        row |= {f"{name}_us": 1e6 * seconds, f"{name}_gb_s": nbytes / seconds / 1e9}
    call = with_host([partial(read, parts, shape, dtype) for parts in turns])
    return row | {"call_us": 1e6 * call, "share": figures["copy"] / figures["kernel"]}


def main():
    """Returns the number of matrices in which the kernel differs from PyTorch's reader."""
    device, different = "cuda" if torch.cuda.is_available() else "cpu", 0
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--shapes", nargs="+", default=[*SHAPES], help="each ROWSxCOLUMNS")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16"], choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--out", type=Path, default=record.RESULTS, help="folder of the results")
    parser.add_argument("--commit", default="", help="name of the sources where git does not tell")
    args = parser.parse_args()
    about = record.circumstances(device, args.commit)
    print("{machine}, {threads} threads, load {load:.1f}, torch {torch}, commit {commit}".format(**about))
    if device == "cpu":
        print("no GPU here: these are PyTorch's readers on the CPU; of the kernel they say nothing")
    elif dequant.library_for(torch.device("cuda", torch.cuda.current_device()), P.say) is None:
        sys.exit("without the kernel there is nothing to compare")
    heads = "  kernel us    GB/s   copy GB/s  share   call us" if device == "cuda" else ""
    print(f"     matrix  format     dtype    MB {heads}    PyTorch us    GB/s")
    for name, quant, dtype in itertools.product(args.shapes, PLAIN, args.dtypes):
        shape = torch.Size(map(int, name.split("x")))
        row = measure(quant, shape, getattr(torch, dtype), device)
        what = {"model": SHAPES.get(name, ""), "matrix": list(shape), "quant": quant, "dtype": dtype}
        file = record.update(args.out / f"dequant-{device}.json", [what | row | about], tuple(what))
        line = f"{name:>11}  {quant:6} {dtype:>9} {row['bytes'] / 1e6:5.1f} "
        if device == "cuda":
            line += "{kernel_us:11.1f} {kernel_gb_s:7.0f} {copy_gb_s:11.0f} {share:6.2f} ".format(**row)
            line += f"{row['call_us']:9.1f}"
        line += "{plain_us:14.1f} {plain_gb_s:7.1f}".format(**row)
        differs = not row.get("same", True)
        different += differs
        print(line + "  not the same!" * differs, flush=True)
    print(file)
    return different


if __name__ == "__main__":
    sys.exit(min(main(), 1))
