"""Speed of a whole optimiser step of PiSSA, and where its time goes -> bench/results/step-<device>.json

    python bench/step.py --device cpu                                 # 0.1B, one row of 128 and of 512 tokens
    python bench/step.py                                              # on the GPU: 0.1B to 7.2B, 1 and 8 rows of 1024
    python bench/step.py --quick                                      # 0.4B, 1.5B, 2.9B; on a CPU 128 tokens alone
    python bench/step.py --models RWKV7-1.5B --bsz 8 --ctx 4096 --options rank=64

WHAT IS MEASURED: `pissa_rwkv.train_step` at the setting of a user, that is rank 32 on every matrix, every block
recomputed in backward, clipping and AdamW; on a model of the real shape with random weights and random tokens. Beside
it the same with other options, whose names are in the row's, and what one would use otherwise, with PiSSA by Hugging
Face's PEFT, at the same rank, recomputing too:

    rwkv7-hf    the package of that name, RWKV-7 in plain PyTorch     CPU
    fla         flash-linear-attention's RWKV-7                       GPU

The contestants of a shape take turns step by step in one process, so that ratios hold on a machine with other work.
Their packages are optional; who cannot run has a row that says why in `failed`, and so has our own code where an option
is not in effect.

| of a row | what |
|---|---|
| step, tokens_per_s | {ms: the median, low, high: 10 % and 90 %, n: steps}; tokens of the step over the median |
| parts | ms of the median step, shared out as the operations of three profiled steps are; on a GPU, of their kernels |
| | between: on a CPU Python and dispatch, on a GPU the time in which no kernel runs |
| utilisation | 4 x the weights of the matrices x tokens/s (a forward, and a backward to the inputs alone; what is |
| | recomputed does not count) over the operations/s of a large product of this dtype in this run |
| op | the WKV operator of our own code |
| peak | bytes of tensors at the step's peak, the model and the optimiser among them; null where compiled for a CPU, |
| | and for a CUDA graph, whose memory the allocator does not count as taken |
| faster_than | tokens/s over those of the others, each under "<name> <dtype> <quant>" |

Profiled are only the steps of our own code as it stands, whose functions have names that tell the parts apart.
"""

import argparse
import contextlib
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import contestants
import record
import torch
import vram
import wkv
from torch import Tensor
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function

import pissa_rwkv as P

RANK = 32
PROFILED = {"cpu": 3, "cuda": 1}                                      # steps (of a GPU each is many thousand events)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
KEY = ("name", "model", "bsz", "ctx", "dtype", "quant", "setting")


class Contestant(NamedTuple):
    """A model that is trained. `step` makes one optimiser step and returns its loss; `held`: all that lies in memory
    between steps."""

    step: Callable[[], float]
    held: Callable[[], Iterable[Tensor]]
    run: P.Run | None = None                                          # of our own
    op: str = ""                                                      # its WKV operator

    @property
    def opaque(self) -> bool:
        """Compiled, or a graph: its parts are not seen."""
        return bool(self.run and (self.run.cfg.compile or self.run.cfg.cuda_graph))

    def gave_up(self, device: str) -> str:
        """Which option of our own is not in effect, after the first steps; nothing if all are. (A run says so, and goes
        on without: in a table it would be another's figure.)"""
        if self.run is None:
            return ""
        cfg = self.run.cfg
        if cfg.compile and self.run.model.run_block is P.GRAD_CP[cfg.grad_cp]:
            return "--compile 1 is not in effect"
        if cfg.cuda_graph and not getattr(self.run.add_gradient, "graphs", None):
            return "--cuda_graph 1 is not in effect"
        return vram.falls_back(cfg, self.op) if device == "cuda" else ""


class RandomRows(P.FullRows):
    """As many random tokens, all of them learnt."""

    def __init__(self, vocab_size: int, bsz: int, ctx_len: int, device: str):
        super().__init__(bsz, ctx_len, device)
        self.vocab_size = vocab_size

    def tokens(self, number: int) -> Tensor:
        draw = torch.Generator().manual_seed(number)
        return torch.randint(self.vocab_size, (self.bsz, self.ctx_len + 1), generator=draw).to(self.device)

    def batch(self, number: int) -> P.Batch:
        tokens = self.tokens(number)
        targets = tokens[:, 1:].reshape(-1)
        return P.Batch(tokens[:, :-1], torch.arange(len(targets), device=self.device), targets)


# ------------------------------------------------------------------------------------------------- who takes part


def ours(
    name: str, model: str, bsz: int, ctx: int, dtype: str, quant: str, device: str, options: dict
) -> Contestant:
    """name: `pissa_rwkv`, and options of its own as on the command line."""
    cfg = P.Config(accelerator={"cuda": "gpu"}.get(device, device), precision=dtype, peft="pissa", rank=RANK,
                   svd_niter=1, ctx_len=ctx, micro_bsz=bsz, quant=quant)
    options = changed(name.split()[1:]) | options
    return prepared(vram.arch_of(model), P.replace(cfg, **options))


def prepared(arch: P.Arch, cfg: P.Config) -> Contestant:
    """A run of ours on random weights and tokens."""
    _, device, compute = P.setup(cfg)
    with torch.device("meta"):
        op, wkv7 = P.find_wkv(arch.version, arch.head_size, cfg.op, device)
        rwkv = P.RWKV(arch, wkv7, cfg.grad_cp)
    P.fill(rwkv, vram.random_tensors(arch, device), "", device, compute, P.left_in_file(rwkv, cfg))
    P.add_adapters(rwkv, cfg, {}, {})
    optimiser = P.ZeroAdamW(((n, p) for n, p in rwkv.named_parameters() if p.requires_grad), cfg)
    rwkv.run_block = P.compiled(rwkv.run_block, device) if cfg.compile else rwkv.run_block
    rows = RandomRows(arch.vocab_size, cfg.micro_bsz, cfg.ctx_len, device)
    run = P.Run(cfg, P.ONE_RANK, device, compute, arch, None, rows, None, 1, {}, rwkv, optimiser)
    if cfg.cuda_graph:
        run.add_gradient = P.graphs(rwkv, cfg, device, P.ONE_RANK)
    held = [*rwkv.parameters(), *rwkv.buffers(), *optimiser.buffers()]
    return Contestant(lambda: P.train_step(run, 1e-5)["loss"], lambda: held, run, op)


def changed(words: list[str]) -> dict:
    """The options of a command line that differ from their defaults."""
    given, default = P.asdict(P.parse(words)), P.asdict(P.Config())
    return {k: v for k, v in given.items() if v != default[k]}


def rwkv7_hf(arch: P.Arch) -> torch.nn.Module:
    from rwkv7_hf.configuration_rwkv7 import RWKV7Config
    from rwkv7_hf.modeling_rwkv7 import RWKV7ForCausalLM

    return RWKV7ForCausalLM(RWKV7Config(**hf_sizes(arch)))


def fla(arch: P.Arch) -> torch.nn.Module:
    from fla.models import RWKV7Config, RWKV7ForCausalLM

    return RWKV7ForCausalLM(RWKV7Config(**hf_sizes(arch)))


def hf_sizes(arch: P.Arch) -> dict[str, int]:
    """What both packages call the sizes of an RWKV-7."""
    low_rank = {f"{dict(w='decay', g='gate').get(m, m)}_low_rank_dim": rank for m, rank in arch.ranks.items()}
    return dict(vocab_size=arch.vocab_size, hidden_size=arch.n_embd, num_hidden_layers=arch.n_layer,
                intermediate_size=arch.dim_ffn, head_dim=arch.head_size, **low_rank)


def with_peft(
    make: Callable[[P.Arch], torch.nn.Module], model: str, bsz: int, ctx: int, dtype: str, quant: str, device: str,
    options: dict,
) -> Contestant:
    """As PEFT's documentation has it; adapters are fp32 there, whatever the model is in."""
    arch = vram.arch_of(model)
    with torch.device(device):
        net = make(arch).to(DTYPES[dtype])                            # (its package may not be there)

    from peft import LoraConfig, get_peft_model

    adapters = LoraConfig(r=RANK, lora_alpha=RANK, init_lora_weights="pissa_niter_1",
                          target_modules=["r_proj", "k_proj", "v_proj", "o_proj", "ffn.key", "ffn.value"])
    with torch.device(device):
        net = get_peft_model(net, adapters)
    net.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    net.enable_input_require_grads()
    net.train()
    trained = [p for p in net.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, 1e-5, fused=True)
    rows = RandomRows(arch.vocab_size, bsz, ctx - 1, device)

    def step() -> float:
        tokens = rows.tokens(0)
        loss = net(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        optimiser.zero_grad()
        return loss.item()

    def held() -> list[Tensor]:
        moments = [t for state in optimiser.state.values() for t in state.values()]
        return [*net.parameters(), *net.buffers(), *moments]

    return Contestant(step, held)


COMPILED, FAST = "pissa_rwkv --compile 1", "pissa_rwkv --compile 1 --grad_cp products"
KEPT = "pissa_rwkv --grad_cp products"
GRAPH, FASTEST = "pissa_rwkv --cuda_graph 1", f"{FAST} --cuda_graph 1"
OURS = ("pissa_rwkv", KEPT, COMPILED, FAST, "pissa_rwkv --compile 1 --grad_cp 0", GRAPH, FASTEST)
MAKERS = {name: partial(ours, name) for name in OURS} | {
    "rwkv7-hf": partial(with_peft, rwkv7_hf), "fla": partial(with_peft, fla)}
ENTRIES = {  # device -> who takes part in a shape: name, dtype, quant
    "cpu": [(name, dtype, "none") for name in ("pissa_rwkv", KEPT, COMPILED, FAST, "rwkv7-hf") for dtype in DTYPES],
    "cuda": [*((name, "bf16", "none") for name in ("fla", *OURS)),
             *((name, "bf16", "nf4") for name in ("pissa_rwkv", FAST, FASTEST))],
}
QUICK = {  # those of them that --quick asks: on a GPU a shape takes a minute to compile
    "cpu": ENTRIES["cpu"],
    "cuda": [*((name, "bf16", "none") for name in ("fla", "pissa_rwkv", KEPT, FAST, FASTEST)),
             ("pissa_rwkv", "bf16", "nf4")],
}


def shapes(device: str, quick: bool) -> list[tuple[str, int, int]]:
    """(model, bsz, ctx) of the table."""
    if device == "cpu":
        return [("RWKV7-0.1B", 1, ctx) for ctx in ((128,) if quick else (128, 512))]
    sizes = ("0.4B", "1.5B", "2.9B") if quick else ("0.1B", "0.4B", "1.5B", "2.9B", "7.2B")
    # (Of 7.2B with 8 rows no two contestants fit beside each other.)
    return [(f"RWKV7-{size}", bsz, 1024) for size in sizes for bsz in (1, 8) if (size, bsz) != ("7.2B", 8)]


# -------------------------------------------------------------------------------------------------------- by parts

MARK = "part: "
PARTS = ("WKV", "base products", "adapters", "low-rank", "elementwise", "head + loss", "optimiser", "between")
OF_NAME = {  # how the name of an operation or of a node of the graph begins -> its part, and that of all inside it
    "pissa_rwkv::wkv": "WKV", "GeneratedBackwardFor_pissa_rwkv_wkv": "WKV", "FrozenProduct": "base products",
    "HeadLoss": "head + loss", "torch::autograd::AccumulateGrad": "optimiser",
}
PRODUCTS = ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm")   # outside of all others they are the low-rank maps
NODE = "autograd::engine::evaluate_function"


@contextlib.contextmanager
def marked(run: P.Run) -> Iterable[None]:
    """While it lasts, the profiler sees the functions of a run whose operations bear no name of their own."""
    methods = [(block, "forward", "elementwise") for block in run.model.blocks]
    methods += [(m, "forward", "adapters") for m in run.model.modules() if isinstance(m, P.Adapter)]
    methods += [(run.optimiser, name, "optimiser") for name in ("reduce", "step", "clear")]

    def inside(part: str, method: Callable) -> Callable:
        def call(*args: Any) -> Any:
            with record_function(MARK + part):
                return method(*args)
        return call

    for owner, name, part in methods:
        setattr(owner, name, inside(part, getattr(owner, name)))
    yield
    for owner, name, _ in methods:
        delattr(owner, name)


def on_cpu(e: FunctionEvent) -> float:
    """Microseconds of an operation itself; of marks and nodes that is Python, and counts for `between`."""
    is_python = e.name.startswith((MARK, NODE)) or e.name.endswith(("Backward", "Backward0"))
    return 0.0 if is_python else e.self_cpu_time_total


def on_gpu(e: FunctionEvent) -> float:
    """Microseconds of the kernels that an operation launches itself."""
    return e.self_device_time_total


COST = {"cpu": on_cpu, "cuda": on_gpu}


def by_part(events: Iterable[FunctionEvent], cost: Callable[[FunctionEvent], float]) -> dict[str, float]:
    """What the operations of every part cost, of all parts but `between`.

    An operation belongs to the nearest one above it that tells; a node of backward, to the part of the operation that
    put it into the graph. (What a block recomputes lies inside a node, and inside a mark of its own.)
    """
    operations = sorted((e for e in events if e.device_type == torch.autograd.DeviceType.CPU),
                        key=lambda e: (e.time_range.start, -e.time_range.end))
    parts, of_node, total = {}, {}, dict.fromkeys(PARTS[:-1], 0.0)
    for e in operations:
        above = parts.get(id(e.cpu_parent), "elementwise")            # (CUDA's runtime has e.id of its own)
        part = next((part for start, part in OF_NAME.items() if e.name.startswith(start)), above)
        if e.name.startswith(MARK):
            part = e.name.removeprefix(MARK)
        elif e.name.startswith(NODE):
            part = of_node.get((e.fwd_thread, e.sequence_nr), part)
        if e.sequence_nr >= 0 and not is_backward(e):
            of_node[e.thread, e.sequence_nr] = part
        parts[id(e)] = part
        total["low-rank" if part == "elementwise" and e.name in PRODUCTS else part] += cost(e)
    return total


def is_backward(e: FunctionEvent) -> bool:
    return e.scope == 1 or e.name.startswith(NODE)


def parts_of(c: Contestant, ms: float, device: str) -> dict[str, float]:
    """Milliseconds of a step that takes `ms`."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device == "cuda")
    steps = PROFILED[device]
    with marked(c.run), profile(activities=activities) as prof:
        start = time.perf_counter()
        for _ in range(steps):
            c.step()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    parts = {part: us / 1e3 / steps for part, us in by_part(prof.events(), COST[device]).items()}
    scale = 1 if device == "cuda" else ms / (1e3 * seconds / steps)  # the profiler does not slow down kernels
    parts = {part: scale * t for part, t in parts.items()}
    return parts | {"between": ms - sum(parts.values())}


# ------------------------------------------------------------------------------------------------------------ rows


def product_ceiling(device: str, dtype: torch.dtype) -> float:
    """Operations per second of a large product."""
    side = 8192 if device == "cuda" else 1024
    draw = torch.Generator(device).manual_seed(0)                     # (torch's own is unusable once a capture failed)
    x = torch.randn(side, side, device=device, generator=draw).to(dtype)
    x @ x                                                             # (opens the library)
    times = wkv.take_turns({"": lambda: x @ x}, device, 0.3)[""]      # (so long, as a GPU's clock rises under load)
    return 2 * side**3 / statistics.median(times)


def peak(c: Contestant, device: str) -> int | None:
    """Bytes of tensors at the peak of a step; None where that cannot be counted: in what is compiled for a CPU."""
    storages = {s.data_ptr(): s for s in (t.untyped_storage() for t in c.held())}
    held = sum(map(P.allocated, storages.values()))
    if device == "cuda" and c.run and c.run.cfg.cuda_graph:
        return None
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        c.step()
        return held + torch.cuda.max_memory_allocated() - before
    if c.opaque:
        return None
    with P.Peak(device, c.held()) as counted:
        c.step()
    return held + counted.most


def matrix_parameters(arch: P.Arch) -> int:
    """Weights that a token is multiplied with: all matrices but the embedding."""
    with torch.device("meta"):
        named = dict(P.RWKV(arch, P.wkv7_ref).named_parameters())
    return sum(p.numel() for n, p in named.items() if n != "emb.weight" and sum(size > 1 for size in p.shape) > 1)


LOADING, COMPILING = 25, 90                                           # seconds; on a GPU, about


def rows_of(
    shape: tuple[str, int, int], entries: list[tuple[str, str, str]], device: str, seconds: float, options: list[str],
    deadline: float = math.inf,
) -> list[dict]:
    """A row for each contestant of a shape. options: NAME=VALUE, of our own. Whoever would not be ready in time to be
    timed with the others before the deadline (of time.monotonic) has no row."""
    given = changed([word for pair in options for word in f"--{pair}".split("=", 1)])
    (model, bsz, ctx), rows, there = shape, {}, {}
    torch._dynamo.reset()                                             # (of another shape it would make one for any)
    ceiling = {dtype: product_ceiling(device, DTYPES[dtype]) for dtype in {dtype for _, dtype, _ in entries}}
    for entry in entries:
        name, dtype, quant = entry
        ready = time.monotonic() + (COMPILING if "--compile" in name else LOADING)
        if ready + (1 + len(there)) * seconds > deadline:
            print(f"out of time: {' '.join(entry)} of {model}, {bsz} x {ctx} tokens", flush=True)
            continue
        rows[entry] = {"name": name, "model": model, "bsz": bsz, "ctx": ctx, "dtype": dtype, "quant": quant,
                       "setting": " ".join(options) if name in OURS else "", "failed": ""}
        try:
            there[entry] = MAKERS[name](model, bsz, ctx, dtype, quant, device, given)
            rows[entry]["losses"] = [there[entry].step() for _ in range(2)]   # they also warm up
            if why := there[entry].gave_up(device):
                raise RuntimeError(why)
            rows[entry] |= {"op": there[entry].op} if there[entry].run else {}
        except Exception as error:  # other people's code may raise anything
            there.pop(entry, None)
            rows[entry]["failed"] = contestants.one_line(error)
    try:
        times = wkv.take_turns({entry: c.step for entry, c in there.items()}, device, seconds)
    except Exception as error:  # of whoever had his turn; other shapes may go well
        return [row | {"failed": row["failed"] or contestants.one_line(error)} for row in rows.values()]
    for entry, c in there.items():
        step = wkv.spread(times[entry])
        rate = 1e3 * bsz * ctx / step["ms"]
        rows[entry] |= {"step": step, "tokens_per_s": rate, "product_flop_per_s": ceiling[entry[1]],
                        "utilisation": 4 * matrix_parameters(vram.arch_of(model)) * rate / ceiling[entry[1]],
                        "peak": None}
        try:
            rows[entry]["peak"] = peak(c, device)
            rows[entry] |= {"parts": parts_of(c, step["ms"], device)} if c.run and not c.opaque else {}
        except Exception as error:  # of a profiler that does not work here, of a full GPU; the time is measured
            rows[entry]["no_parts"] = contestants.one_line(error)
    for entry in there:
        rows[entry]["faster_than"] = {" ".join(other): rows[entry]["tokens_per_s"] / rows[other]["tokens_per_s"]
                                      for other in there}
    return list(rows.values())


def line(row: dict) -> str:
    who = f"  {row['name']:42}{row['dtype']:5}{row['quant']:5}"
    if row["failed"]:
        return who + row["failed"]
    ratios = ", ".join(f"{ratio:.2f} x {other}" for other, ratio in row["faster_than"].items()
                       if not other.startswith("pissa_rwkv"))
    parts = "".join(f"\n      {part:14}{ms:9.1f} ms {100 * ms / row['step']['ms']:4.0f} %"
                    for part, ms in row.get("parts", {}).items())
    memory = f"{row['peak'] / 1e9:7.2f} GB" if row["peak"] else " " * 10
    return (f"{who}{row['tokens_per_s']:9,.1f} tokens/s {row['step']['ms']:9.1f} ms {memory}"
            f" {100 * row['utilisation']:4.0f} % of {row['product_flop_per_s']:.2g} FLOP/s  {ratios}{parts}")


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    p.add_argument("--device", choices=list(ENTRIES), default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--quick", action="store_true", help="fewer shapes")
    p.add_argument("--models", nargs="+", choices=list(vram.MODELS), help="these instead")
    p.add_argument("--bsz", nargs="+", type=int, help="likewise")
    p.add_argument("--ctx", nargs="+", type=int, help="likewise")
    p.add_argument("--names", nargs="+", choices=list(MAKERS), default=list(MAKERS), help="only these contestants")
    p.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    p.add_argument("--options", nargs="*", default=[], metavar="NAME=VALUE", help="of pissa_rwkv, over the setting")
    p.add_argument("--seconds", type=float, help="for each contestant of a shape, at least three steps (20; GPU 4)")
    p.add_argument("--minutes", type=float, default=1e6, help="begin nothing that would not end in this time")
    p.add_argument("--threads", type=int, help="CPU threads; on a machine with other work 1 is steadier")
    p.add_argument("--out", type=Path, default=record.RESULTS, help="folder of the results")
    p.add_argument("--commit", default="", help="name of the sources where git does not tell")
    return p


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    deadline = time.monotonic() + 60 * args.minutes
    torch.set_num_threads(args.threads or torch.get_num_threads())
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # as P.setup does, before CUDA begins
    about = record.circumstances(args.device, args.commit)
    print("{machine}, {threads} threads, load {load:.1f}, torch {torch}, commit {commit}".format(**about), flush=True)
    usual = shapes(args.device, args.quick)
    wanted = {(model, bsz, ctx) for model in args.models or {m for m, _, _ in usual}
              for bsz in args.bsz or {b for _, b, _ in usual} for ctx in args.ctx or {c for _, _, c in usual}}
    wanted &= set(usual) if not (args.models or args.bsz or args.ctx) else wanted
    there = (QUICK if args.quick else ENTRIES)[args.device]
    entries = [e for e in there if e[0] in args.names and e[1] in args.dtypes]
    seconds, failed = args.seconds or {"cpu": 20, "cuda": 4}[args.device], 0
    for shape in sorted(wanted, key=lambda s: (list(vram.MODELS).index(s[0]), *s[1:])):
        rows = rows_of(shape, entries, args.device, seconds, args.options, deadline)
        print("{}, {} x {} tokens".format(*shape), *map(line, rows), sep="\n", flush=True)
        record.update(args.out / f"step-{args.device}.json", [row | about for row in rows], KEY)
        failed += any(row["failed"] for row in rows if row["name"] in ("pissa_rwkv", FAST))
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
