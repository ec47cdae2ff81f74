"""Time and error of every WKV operator that runs on this machine, ours and others', side by side.

    python bench/wkv.py                         # on the GPU if there is one -> bench/results/wkv-<device>.json
    python bench/wkv.py --quick                 # three shapes
    python bench/wkv.py --recurrence wkv6       # WKV-6's -> bench/results/wkv6-<device>.json
    python bench/wkv.py --minutes 8             # the most important first; the next run goes on where this one stopped

WHAT IS MEASURED, for a shape (B,T,H) with heads of 64, an initial state of zero and no gradient of the final one:

    forward     y alone, without autograd
    save        forward with what a backward will need
    both        forward, and backward to all inputs but the state

each called from Python, GPU idle before the call (so that launching counts), and on a GPU also replayed as a CUDA graph
(what the kernels themselves take). Contestants take turns call by call, on several sets of random inputs that together
exceed the L2 twice. A time is {ms: the median, low, high: 10 % and 90 %, n: calls}.

Floors: `forward` must move 7 tensors [B,T,H,64] through memory (r w k v a b in, y out), `both` 20 (those; again the six
and dy in, six gradients out), at the copy bandwidth measured in the same run. The definition's arithmetic is 9 * 64^2
operations per token and head forward and 19 * 64^2 backward, whatever an algorithm does instead. WKV-6: 5 tensors (r w
k v, y) and 14, 5 * 64^2 operations and 11 * 64^2.

Errors are relative (Frobenius), against the recurrence in float64 on the same inputs, by the `chunk` operator (which is
that, shows tests/test_wkv.py): per shape for the first 4 heads, and for a small shape in five regimes of decays and
keys (WKV-6: four of decays), then also with an initial state, its gradient, and a gradient of the final state, where a
contestant has them. The gradient of WKV-6's u sums over the batch; only the small shape has its error.

A row whose `failed` is not empty says why there is no figure. A row of this commit and machine is not measured again
without --again. Status 3: a contestant broke the CUDA context; run again and it goes on without that one.
"""

import argparse
import contextlib
import itertools
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import contestants
import record
import torch
from contestants import ContextLost
from torch import Tensor

import wkv7_cuda

N = 64
S1, S2, S3 = (1, 1024, 40), (8, 512, 32), (1, 4096, 64)
MODELS = {"0.1B": 12, "0.4B": 16, "1.5B": 32, "2.9B": 40}  # RWKV-7 -> heads
BF16, FP32 = torch.bfloat16, torch.float32
REGIMES = ("fast", "slow", "mix", "normal", "equal keys")
ERROR_SHAPE = {"cpu": (1, 256, 4), "cuda": (1, 1024, 4)}
PASSES = ("forward", "save", "both")
DEFINITION_LIMIT = {"cpu": 2**13, "cuda": 2**17}  # tokens x heads up to which `torch` takes a few seconds at most
CURVE_HEADS = {"cpu": 32, "cuda": 40}  # of the picture: time against T at B = 1
KEY = ("op", "shape", "dtype", "regime")

Job = tuple[tuple[int, int, int], torch.dtype, bool]  # shape; dtype; whether it is the regimes


class Recurrence(NamedTuple):
    """What is measured: the letters of the inputs before the state; how their errors are tried; what a pass costs at
    least, tensors moved and operations / N^2 per token and head; the stem of the rows' file."""

    name: str
    letters: str
    regimes: tuple[str, ...]
    costs: dict[str, tuple[int, int]]
    file: str

    @property
    def names(self) -> tuple[str, ...]:
        """Of what `results` returns."""
        return ("y", *(f"d{letter}" for letter in self.letters), "state", "dstate0")


RECURRENCES = {
    "wkv7": Recurrence("wkv7", "rwkvab", REGIMES, {"forward": (7, 9), "save": (7, 9), "both": (20, 28)}, "wkv"),
    "wkv6": Recurrence("wkv6", "rwkvu", REGIMES[:4], {"forward": (5, 5), "save": (5, 5), "both": (14, 16)}, "wkv6"),
}
WKV7 = RECURRENCES["wkv7"]


def curve(device: str) -> list[tuple]:
    """The shapes of the picture."""
    return [(1, 2**e, CURVE_HEADS[device]) for e in (range(4, 12) if device == "cpu" else range(6, 15))]


def tabled(device: str) -> list[tuple]:
    """The shapes of the tables, the most important first."""
    if device == "cpu":
        return [(1, 512, 12), (1, 128, 12), (4, 128, 12), (1, 1, 12)]
    models = [(B, T, H) for T, B in ((1024, 1), (1024, 8), (4096, 1), (4096, 8)) for H in MODELS.values()]
    return list(dict.fromkeys((S1, S2, S3, *models)))


def jobs(device: str, quick: bool) -> list[Job]:
    """What is to be measured, the most important first."""
    dtype, many = (FP32, 4) if device == "cpu" else (BF16, 3)
    first, regimes = [(shape, dtype, False) for shape in tabled(device)[:many]], (ERROR_SHAPE[device], dtype, True)
    rest = [(shape, dtype, False) for shape in (*curve(device), *tabled(device)[many:])]
    in_fp32 = [*((shape, FP32, False) for shape in (S1, S2, S3)), (ERROR_SHAPE[device], FP32, True)]
    wanted = [*first, regimes] + ([] if quick else rest) + ([] if quick or device == "cpu" else in_fp32)
    return list(dict.fromkeys(wanted))


# ---------------------------------------------------------------------------------------------------- inputs


def make(shape: tuple[int, int, int], dtype: torch.dtype, device: str, seed: int = 0, regime: str = "",
         its: Recurrence = WKV7) -> list[Tensor]:
    """The inputs, the initial state last; dy, and the gradient of the final state.

    As a trained model makes them: r k v ~ N(0,1), kappa of length 1, decays from 0.55 to nearly 1; WKV-6: u ~ N(0,1),
    most decays above 0.8. Regimes: decay at its floor (WKV-6: 0.07); near 1; of its own strength per channel; of
    N(0,1); near 1 with keys equal up to a tenth and eta near 1.
    """
    B, T, H = shape
    draw = torch.Generator(device).manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, N, generator=draw, device=device)

    r, w, k, v, u, eta, dy = (normal(B, T, H) for _ in range(7))
    state, dstate = (normal(B, H, N) for _ in range(2))
    usual, fast, strongest = {"wkv7": (3 * w - 3, 20, 6), "wkv6": (w - 3, 1, 2)}[its.name]
    logit = {"": usual, "fast": torch.full_like(w, fast), "slow": w - 6, "normal": w, "equal keys": w - 6,
             "mix": torch.empty_like(w[:1, :1]).uniform_(-8, strongest, generator=draw).expand_as(w)}[regime]
    eta = eta.sigmoid()
    if regime == "equal keys":
        u, eta = normal(B, 1, H) + 0.1 * u, torch.full_like(eta, 0.98)
    kappa = u / u.norm(dim=-1, keepdim=True)
    inputs = {"wkv7": [r, logit, k * eta, v, -kappa, kappa * eta], "wkv6": [r, logit, k, v, u[0, 0]]}[its.name]
    return [*(x.to(dtype).contiguous() for x in inputs), state, dy.to(dtype), dstate]


def forward(f: Callable, case: list[Tensor]) -> object:
    with torch.no_grad():
        return f(*case[:-2])


def save(f: Callable, case: list[Tensor]) -> object:
    return f(*case[:-2])


def both(f: Callable, case: list[Tensor]) -> object:
    y = f(*case[:-2])[0]
    return torch.autograd.grad(y, case[:-3], case[-2], materialize_grads=True)  # WKV-6's one token has no use for w


# ---------------------------------------------------------------------------------------------------- time


class Replay:
    """A CUDA graph as a call. Timed are its kernels, not its launch."""

    def __init__(self, graph: torch.cuda.CUDAGraph):
        self.graph = graph

    def __call__(self) -> None:
        self.graph.replay()


def keep_busy() -> None:
    """The GPU does nothing for some 0.1 ms: what is queued meanwhile, events too, then follows at once."""
    torch.cuda._sleep(200_000)                                        # cycles


def seconds_of(call: Callable[[], object], device: str) -> float:
    """One call, from an idle device until the device has finished; of a Replay, from its first kernel."""
    if device == "cpu":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    if isinstance(call, Replay):
        keep_busy()
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def spread(times: list[float], parts: int = 1) -> dict:
    """Seconds of calls that each did the work `parts` times -> the figures of a row."""
    times = sorted(1e3 * t / parts for t in times)
    tenth = len(times) // 10
    return {"ms": statistics.median(times), "low": times[tenth], "high": times[-1 - tenth], "n": len(times)}


def take_turns(calls: dict[object, Callable], device: str, seconds: float) -> dict[object, list[float]]:
    """Times of each warmed call, which gets about `seconds`, 3 to 200 times, spread over the whole run."""
    times = {key: [] for key in calls}
    wanted = {key: min(200, max(3, int(seconds / seconds_of(call, device)))) for key, call in calls.items()}
    rounds = max(wanted.values(), default=0)
    for i in range(rounds):
        for key, call in calls.items():
            if (i + 1) * wanted[key] // rounds > i * wanted[key] // rounds:
                times[key].append(seconds_of(call, device))
    return times


def rotating(f: Callable, run: Callable, cases: list[list[Tensor]]) -> Callable[[], object]:
    """A call without arguments that uses the next set of inputs each time."""
    turn = itertools.cycle(cases)
    return lambda: run(f, next(turn))


def captured(f: Callable, run: Callable, cases: list[list[Tensor]], pool: object) -> Replay:
    """A CUDA graph that does it once on each set of inputs; its replay. Nobody reads what a replay computes, and none
    runs beside another: so all graphs of a shape can share the memory of one pool."""
    side, usual = torch.cuda.Stream(), torch.cuda.current_stream()
    side.wait_stream(usual)
    with torch.cuda.stream(side):
        for case in (cases[0], *cases):
            run(f, case)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, pool=pool):
            # (Kept until all are captured: in memory used twice, results would be written to lines that are in the
            # cache.)
            kept = [run(f, case) for case in cases]
    finally:
        torch.cuda.set_stream(usual)                                  # (a capture that fails as it ends leaves its own)
    del kept
    return Replay(graph)


def ceilings(device: str) -> dict:
    """Bytes per second of a large copy, read plus written; operations per second of a large product."""
    size, side, dtype = (2**30, 8192, BF16) if device == "cuda" else (2**27, 1024, FP32)
    source, x = torch.randn(size // 4, device=device), torch.randn(side, side, device=device).to(dtype)
    target = torch.empty_like(source)
    target.copy_(source), x @ x  # warm
    times = take_turns({"copy": lambda: target.copy_(source), "product": lambda: x @ x}, device, 0.3)
    return {"copy_bytes_per_s": 2 * size / statistics.median(times["copy"]),
            "product_flop_per_s": 2 * side**3 / statistics.median(times["product"])}  # fmt: skip


# ---------------------------------------------------------------------------------------------------- error


def exact(case: list[Tensor], stateful: bool, its: Recurrence) -> list[Tensor]:
    """What its names name, in float64; without a state the last two are left out."""
    wide = [x.detach().double() for x in case]
    return results(wkv7_cuda.load("chunk", its.name), wide if stateful else stateless(wide), stateful)


def results(f: Callable, case: list[Tensor], stateful: bool) -> list[Tensor]:
    *inputs, state, dy, dstate = case
    leaves = [*(x.detach().requires_grad_() for x in inputs), state.detach().requires_grad_(stateful)]
    y, state_T = f(*leaves)
    outputs, grads = ((y, state_T), (dy, dstate)) if stateful else ((y,), (dy,))
    grads = torch.autograd.grad(outputs, leaves if stateful else leaves[:-1], grads, materialize_grads=True)
    return [x.detach() for x in (y, *grads[:len(inputs)], *((state_T, grads[-1]) if stateful else ()))]


def stateless(case: list[Tensor]) -> list[Tensor]:
    return [*case[:-3], torch.zeros_like(case[-3]), *case[-2:]]


def errors(found: list[Tensor], true: list[Tensor], its: Recurrence) -> dict[str, float]:
    """Name -> relative error. Of what is zero there is none: from a zero state the first token has no da, db, dw."""
    pairs = zip(its.names, found, true, strict=False)
    return {name: ((x.double() - e).norm() / e.norm()).item() for name, x, e in pairs if e.norm() > 1e-12}


def first_heads(case: list[Tensor]) -> list[Tensor]:
    """A case of batch entry 0 and up to 4 heads."""
    *inputs, state, dy, dstate = case
    return [*(by_token(x) if x.dim() == 4 else x[:4] for x in inputs), state[:1, :4], by_token(dy), dstate[:1, :4]]


def by_token(x: Tensor) -> Tensor:
    """Of [B,T,H,N]: batch entry 0, up to 4 heads."""
    return x[:1, :, :4]


# ---------------------------------------------------------------------------------------------------- jobs


def attempt(name: str, failed: dict[str, str], action: Callable, device: str) -> object:
    """action(), or None and a line in `failed`."""
    try:
        result = action()
        if device == "cuda":
            torch.cuda.synchronize()                                  # a kernel that fails does so after its launch
        return result
    except Exception as error:  # other people's code may raise anything
        failed[name] = contestants.one_line(error)
        check(name, error, device)


def check(name: str, error: Exception, device: str) -> None:
    """After an error: ContextLost if the GPU can no longer be used."""
    if device == "cpu":
        return
    try:
        torch.cuda.synchronize()
    except Exception:
        raise ContextLost(name, contestants.one_line(error)) from error
    with contextlib.suppress(RuntimeError):                           # (torch 2.11's allocator refuses for good once a
        torch.cuda.empty_cache()                                      # capture has failed as it ended; all else works)


def regime_rows(fs: dict[str, Callable], shape: tuple, dtype: torch.dtype, device: str, its: Recurrence) -> list[dict]:
    rows = []
    for regime in its.regimes:
        case = make(shape, dtype, device, regime=regime, its=its)
        truth = {stateful: exact(case, stateful, its) for stateful in {name in contestants.STATEFUL for name in fs}}
        for name, f in fs.items():
            stateful, failed = name in contestants.STATEFUL, {}
            used = case if stateful else stateless(case)
            found = attempt(name, failed, partial(results, f, used, stateful), device)
            found = found and errors(found, truth[stateful], its)
            rows.append({"op": name, "regime": regime, "error": found, "failed": failed.get(name, "")})
    return rows


def sets_of_inputs(shape: tuple, dtype: torch.dtype, device: str, its: Recurrence) -> list[list[Tensor]]:
    """As many as it takes to exceed the GPU's L2 twice, at least one."""
    cache = torch.cuda.get_device_properties(0).L2_cache_size if device == "cuda" else 0
    volume = its.costs["forward"][0] * math.prod(shape) * N * dtype.itemsize
    sets = max(1, math.ceil(2 * cache / volume))
    return [stateless(make(shape, dtype, device, seed, its=its)) for seed in range(sets)]


def time_rows(fs: dict[str, Callable], shape: tuple, dtype: torch.dtype, device: str, seconds: float,
              ceiling: dict, its: Recurrence) -> list[dict]:
    """A row per contestant: errors, times of every pass, eager and as a graph, memory; and ratios among them."""
    on_gpu, cases = device == "cuda", sets_of_inputs(shape, dtype, device, its)
    pool = torch.cuda.graph_pool_handle() if on_gpu else None
    failed, rows, calls = {}, {name: {"op": name, "regime": ""} for name in fs}, {}
    truth = exact(first_heads(cases[0]), False, its)
    for name, f in fs.items():
        found = attempt(name, failed, partial(results, f, cases[0], False), device)
        if found:
            rows[name]["error"] = errors([by_token(x) for x in found if x.dim() == 4], truth, its)
            rows[name]["peak_mib"] = attempt(name, failed, partial(peak_mib, f, cases[0], device), device)
    for case in cases:
        for x in case[:-3]:
            x.requires_grad_()
    for label, run in zip(PASSES, (forward, save, both), strict=True):
        for name, f in fs.items():
            if name in failed:
                continue
            calls[name, label] = rotating(f, run, cases)
            attempt(name, failed, calls[name, label], device)
            if name in failed:
                continue
            if on_gpu and name != "torch":  # whose graph would have 10 T nodes and more
                notes = {}
                replay = attempt(name, notes, partial(captured, f, run, cases, pool), device)
                if replay:
                    calls[name, f"{label}_graph"] = replay
                else:
                    rows[name]["no_graph"] = notes[name]
                    pool = torch.cuda.graph_pool_handle()             # (the other may count as being recorded still)
    calls = {key: call for key, call in calls.items() if key[0] not in failed}
    for (name, label), times in take_turns(calls, device, seconds).items():
        rows[name][label] = spread(times, len(cases) if label.endswith("_graph") else 1)
    return [derived(rows[name] | {"failed": failed.get(name, "")}, rows, shape, dtype, ceiling, its) for name in fs]


def peak_mib(f: Callable, case: list[Tensor], device: str) -> float | None:
    """Memory that forward and backward take beyond their inputs, MiB; None on a CPU."""
    if device == "cpu":
        return None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results(f, case, False)
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def best(row: dict, label: str) -> float | None:
    """Milliseconds of a pass: of the graph where there is one."""
    figure = row.get(f"{label}_graph") or row.get(label)
    return figure and figure["ms"]


def derived(row: dict, rows: dict[str, dict], shape: tuple, dtype: torch.dtype, ceiling: dict, its: Recurrence) -> dict:
    """The row with floors, rates, and how many times faster `both` is than the other contestants' of this run."""
    token_heads, rates = math.prod(shape), {}
    for label, (tensors, operations) in its.costs.items():
        moved = token_heads * N * dtype.itemsize * tensors
        rates[label] = {"floor_ms": 1e3 * moved / ceiling["copy_bytes_per_s"]}
        if ms := best(row, label):
            rates[label] |= {"bytes_per_s": 1e3 * moved / ms, "flop_per_s": 1e3 * token_heads * N * N * operations / ms}
    mine = best(row, "both")
    faster = {name: best(other, "both") / mine for name, other in rows.items() if mine and best(other, "both")}
    return row | {"rates": rates, "faster_than": faster} | ceiling


def line(row: dict) -> str:
    """A row of the table."""
    if row["failed"]:
        return f"  {row['op']:13} {row['failed'][:100]}"
    worst = max((name for name in row["error"] if name != "y"), key=lambda n: row["error"][n])
    accuracy = f"{row['error']['y']:.1e} {row['error'][worst]:.1e} {worst}"
    if row["regime"]:
        return f"  {row['op']:13} {row['regime']:11} {accuracy}"
    cells = [f"{row[label]['ms']:8.3f}" if label in row else "       -" for label in
             ("forward", "both", "forward_graph", "both_graph")]  # fmt: skip
    share = 100 * row["rates"]["both"]["floor_ms"] / best(row, "both")
    return f"  {row['op']:13}{' '.join(cells)} {share:4.0f} {accuracy}"


HEADING = "ms             forward     both  as graphs: both  % of floor, error of y, worst gradient"


def name_of(job: Job) -> str:
    shape, dtype, regimes = job
    return f"{','.join(map(str, shape))} {str(dtype).removeprefix('torch.')}{' regimes' if regimes else ''}"


def rows_of(job: Job, fs: dict[str, Callable], device: str, seconds: float, ceiling: dict,
            its: Recurrence) -> list[dict]:
    shape, dtype, regimes = job
    if regimes:
        rows = regime_rows(fs, shape, dtype, device, its)
    else:
        rows = time_rows(fs, shape, dtype, device, seconds, ceiling, its)
    return [{"shape": list(shape), "dtype": str(dtype).removeprefix("torch.")} | row for row in rows]


def left_to_do(job: Job, fs: dict[str, Callable], old: list[dict], device: str) -> dict[str, Callable]:
    """Those to be measured now: none if all have their rows, else all (ratios are of one run) but those that failed."""
    shape, dtype, regimes = job
    have = {row["op"]: row["failed"] for row in old if row["shape"] == list(shape)
            and row["dtype"] == str(dtype).removeprefix("torch.") and bool(row["regime"]) == regimes}  # fmt: skip
    small = math.prod(shape) <= DEFINITION_LIMIT[device]
    todo = {name: f for name, f in fs.items() if not have.get(name) and (small or name != "torch")}
    return {} if all(name in have for name in todo) else todo


# ---------------------------------------------------------------------------------------------------- the run


class Run:
    """What stays the same from job to job: where rows go, who takes part, the ceilings, the time that is left."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.device, self.its = args, args.device, RECURRENCES[args.recurrence]
        self.path = args.out / f"{self.its.file}-{args.device}.json"
        self.deadline = time.monotonic() + 60 * args.minutes
        self.about = record.circumstances(args.device, args.commit)
        self.ceiling, self.contestants, self.printed = ceilings(args.device), {}, 0

    def old(self) -> list[dict]:
        """Rows of this machine and commit, which need not be measured again."""
        same = [all(row[x] == self.about[x] for x in ("machine", "commit")) for row in record.load(self.path)]
        return [] if self.args.again else [r for r, s in zip(record.load(self.path), same, strict=True) if s]

    def ready(self, dtype: torch.dtype) -> dict[str, Callable]:
        """Who takes part; who does not says why, and has a row for it unless there is no reason that it should."""
        if dtype not in self.contestants:
            short = str(dtype).removeprefix("torch.")
            lost = {row["op"] for row in self.old() if not row["shape"] and row["dtype"] == short
                    and row["failed"].startswith("ContextLost")}  # fmt: skip
            try:
                works, fails = contestants.ready(self.device, dtype, self.its.name, lost)
            except ContextLost as error:
                name, reason = error.args
                self.keep([{"op": name, "shape": [], "dtype": short, "regime": "", "failed": f"ContextLost: {reason}"}])
                raise
            for name, reason in fails.items():
                print(f"  without {name}: {reason}")
            expected = self.device == "cuda"
            absent = ("ImportError", "ModuleNotFoundError", "ValueError", "Misfit")
            self.keep([{"op": name, "shape": [], "dtype": short, "regime": "", "failed": reason}
                       for name, reason in fails.items() if expected and not reason.startswith(absent)])
            asked = self.args.ops or works
            self.contestants[dtype] = {name: f for name, f in works.items() if name in asked}
        return self.contestants[dtype]

    def keep(self, rows: list[dict]) -> None:
        record.update(self.path, [row | self.about | {"load": record.load_now()} for row in rows], KEY)

    def give_up(self, job: Job, names: Iterable[str], reason: str) -> None:
        """Rows that say why these contestants have no others of this job, so that the next run leaves them out."""
        shape, dtype, regimes = job
        self.keep([{"op": name, "shape": list(shape), "dtype": str(dtype).removeprefix("torch."), "regime": regime,
                    "failed": reason} for name in names for regime in (self.its.regimes if regimes else [""])])

    def do(self, job: Job) -> None:
        fs = left_to_do(job, self.ready(job[1]), self.old(), self.device)
        if not fs:
            return
        try:
            rows = rows_of(job, fs, self.device, self.args.seconds, self.ceiling, self.its)
        except ContextLost as lost:
            self.give_up(job, lost.args[:1], lost.args[1])
            raise
        except Exception as error:  # of no single contestant; what went wrong once may not the next time
            print(f"{name_of(job)}: {contestants.one_line(error)}", flush=True)
            try:
                return check(name_of(job), error, self.device)
            except ContextLost as lost:                               # but this would end every run at the same place
                self.give_up(job, fs, lost.args[1])
                raise
        self.keep(rows)
        floor = "" if job[2] else f", floor {rows[0]['rates']['both']['floor_ms']:.3f} ms"
        self.show([name_of(job) + floor, *map(line, rows)])

    def show(self, lines: list[str], limit: int = 10_500) -> None:
        """The lines; of late shapes only the first, so that all that is printed fits into 12,000 characters."""
        if self.printed + sum(map(len, lines)) > limit:
            lines = lines[:1]
        self.printed += sum(map(len, lines))
        print(*lines, sep="\n", flush=True)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    p.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--recurrence", choices=RECURRENCES, default="wkv7")
    p.add_argument("--quick", action="store_true", help="the first shapes and errors only")
    p.add_argument("--shapes", nargs="+", help="these instead, each B,T,H")
    p.add_argument("--dtype", choices=["float32", "bfloat16"], help="with --shapes; float32, and bfloat16 on a GPU")
    p.add_argument("--ops", nargs="+", help="only these contestants")
    p.add_argument("--seconds", type=float, default=0.3, help="for each contestant and pass of a shape")
    p.add_argument("--minutes", type=float, default=1e6, help="begin no shape that would not end in this time")
    p.add_argument("--again", action="store_true", help="measure what this commit has rows for, too")
    p.add_argument("--threads", type=int, help="CPU threads; on a machine with other work 1 is steadier")
    p.add_argument("--out", type=Path, default=record.RESULTS, help="folder of the results")
    p.add_argument("--commit", default="", help="name of the sources where git does not tell")
    return p


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    wanted = jobs(args.device, args.quick)
    if args.shapes:
        dtype = getattr(torch, args.dtype or ("bfloat16" if args.device == "cuda" else "float32"))
        wanted = [(tuple(map(int, shape.split(","))), dtype, False) for shape in args.shapes]
    torch.set_num_threads(args.threads or torch.get_num_threads())
    run, longest = Run(args), 0.0
    print("{machine}, {threads} threads, load {load:.1f}, torch {torch}, commit {commit}".format(**run.about))
    print("copy {copy_bytes_per_s:.3g} bytes/s, product {product_flop_per_s:.3g} FLOP/s".format(**run.ceiling))
    print(HEADING, flush=True)
    status = 0
    try:
        for dtype in {dtype for _, dtype, _ in wanted}:               # what they compile is not the first shape's time
            run.ready(dtype)
    except ContextLost as lost:
        print("the CUDA context is lost, run again to go on: {}: {}".format(*lost.args), file=sys.stderr)
        return 3
    for i, job in enumerate(wanted):
        start = time.monotonic()
        if start + longest > run.deadline:
            print(f"out of time: {len(wanted) - i} of {len(wanted)} left")
            break
        try:
            run.do(job)
        except ContextLost as lost:
            print("the CUDA context is lost, run again to go on: {}: {}".format(*lost.args), file=sys.stderr)
            status = 3
            break
        longest = max(longest, time.monotonic() - start)
    print(run.path.name)
    return status


if __name__ == "__main__":
    sys.exit(main())
