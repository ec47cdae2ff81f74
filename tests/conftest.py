"""What the tests share: random model files, written from the format's description and not by the project; the official
`rwkv` package as an oracle."""

import contextlib
import functools
import importlib.util
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from pissa_rwkv import RWKV, WKV, BlockState, detect, fill, read_pth

if "PYTEST_XDIST_WORKER" in os.environ:  # one of several processes: each has one thread, and so have those it starts
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)


@pytest.fixture
def pretend_gpu(monkeypatch):
    """pretend_gpu(capability): torch says that there is a GPU; nothing but that and its memory can be asked."""

    def pretend(capability: tuple[int, int] = (9, 0)) -> None:
        def capability_of(device: Any = None) -> tuple[int, int]:
            if device is not None and torch.device(device).type != "cuda":
                raise ValueError(f"Expected a cuda device, but got: {device}")  # as torch does
            return capability

        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", capability_of)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (8_000_000_000, 8_500_000_000))

    return pretend


@pytest.fixture
def without_codegen(monkeypatch):
    """without_codegen(): torch.compile traces as ever, and chooses what to keep for backward, but what it traced is
    run by PyTorch: to generate C++ and to compile that takes most of its time. (One test does.)"""
    traced = functools.partial(torch.compile, backend="aot_eager_decomp_partition")
    return lambda: monkeypatch.setattr(torch, "compile", traced)


LONGEST = "test_demo", "test_paths", "test_ranks", "test_wkv_triton", "test_ptx", "test_vram", "test_quant"  # a minute


def pytest_configure(config):
    """Only `-m gpu` sees a GPU: all other tests say what happens on a CPU, also where there is one."""
    if config.option.markexpr.strip() != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # CUDA reads it when it is first asked for
    config.option.loadscopereorder = False  # xdist would begin with the files that have most tests


def pytest_collection_modifyitems(items):
    """The files that take longest come first, or one process would work on one when the others are done."""
    items.sort(key=lambda item: item.path.stem not in LONGEST)


RANKS = dict(w=8, a=12, v=16, g=20)  # all different, so that a mix-up is an error of shapes
MIX_RANK, DECAY_RANK = 12, 20  # likewise, of x060


def random_tensors(
    n_layer: int = 2, n_embd: int = 64, vocab_size: int = 256, dtype: torch.dtype = torch.float32, seed: int = 0,
    head_size: int = 64, dim_ffn: int = 0, layer0_v: bool = False, version: str = "x070", pre_ffn: bool = False,
    head_qk: int = 0,
) -> dict[str, Tensor]:
    """A model in the keys, shapes and order of a released file, with no weight at zero.

    layer0_v: also blocks.0.att.v0 v1 v2, which some files have and nothing uses (they are NaN here).
    """
    draw, C, F = torch.Generator().manual_seed(seed), n_embd, dim_ffn or 4 * n_embd
    HN = (C // head_size, head_size)

    def normal(*shape: int, std: float = 1.0, mean: float = 0.0) -> Tensor:
        return mean + std * torch.randn(shape, generator=draw)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(shape or (1, 1, C), generator=draw)

    def norm(name: str) -> dict[str, Tensor]:
        return {f"{name}.weight": normal(C, std=0.2, mean=1.0), f"{name}.bias": normal(C, std=0.1)}

    def maps(*names: str) -> dict[str, Tensor]:
        return {f"{name}.weight": normal(C, C, std=C**-0.5) for name in names}

    def att_x070(i: int) -> dict[str, Tensor]:
        t = {f"x_{m}": uniform(0, 1) for m in "rwkvag"}
        for m, low, high in (("w", -6, 1), ("a", -1, 1), ("v", -1, 1), ("g", 0, 0)):
            t |= {f"{m}1": normal(C, RANKS[m], std=C**-0.5), f"{m}2": normal(RANKS[m], C, std=0.3)}
            t |= {f"{m}0": uniform(low, high)} if m != "g" else {}
            if m == "v" and i == 0:
                unused = {name: t.pop(name) for name in ("v1", "v2", "v0")}
                t |= {name: x * torch.nan for name, x in unused.items()} if layer0_v else {}
        t |= {"k_k": uniform(0.5, 1.5), "k_a": uniform(0.5, 1.5), "r_k": normal(*HN, std=0.2)}
        return t | maps("receptance", "key", "value", "output")

    def att_x060(i: int) -> dict[str, Tensor]:
        t = {f"time_maa_{m}": uniform(0, 1) for m in "xwkvrg"}
        t |= {"time_maa_w1": normal(C, 5 * MIX_RANK, std=C**-0.5), "time_maa_w2": normal(5, MIX_RANK, C, std=0.1)}
        t |= {"time_decay": uniform(-6, 1), "time_decay_w1": normal(C, DECAY_RANK, std=C**-0.5)}
        t |= {"time_decay_w2": normal(DECAY_RANK, C, std=0.3), "time_faaaa": normal(*HN, std=0.5)}
        return t | maps("receptance", "key", "value", "output", "gate")

    def att_x052(i: int) -> dict[str, Tensor]:
        t = {f"time_mix_{m}": uniform(0, 1) for m in "kvrg"}
        t |= {"time_decay": uniform(-6, 1, *HN), "time_faaaa": normal(*HN, std=0.5)}
        return t | maps("receptance", "key", "value", "output", "gate")

    def ffn() -> dict[str, Tensor]:
        mixes = dict(x070=["x_k"], x060=["time_maa_k", "time_maa_r"], x052=["time_mix_k", "time_mix_r"])[version]
        gate = maps("receptance") if version != "x070" else {}
        return ({m: uniform(0, 1) for m in mixes} | {"key.weight": normal(F, C, std=C**-0.5)} | gate
                | {"value.weight": normal(C, F, std=F**-0.5)})

    def block(i: int) -> dict[str, Tensor]:
        t = norm("ln1") | norm("ln2") | (norm("ln0") if i == 0 else {})
        if pre_ffn and i == 0:
            t |= {f"ffnPre.{name}": x for name, x in ffn().items()}
        else:
            att = dict(x070=att_x070, x060=att_x060, x052=att_x052)[version](i)
            t |= {f"att.{name}": x for name, x in att.items()} | norm("att.ln_x")
        return t | {f"ffn.{name}": x for name, x in ffn().items()}

    tensors = {"emb.weight": normal(vocab_size, C)}
    for i in range(n_layer):
        tensors |= {f"blocks.{i}.{name}": t for name, t in block(i).items()}
    tensors |= norm("ln_out") | {"head.weight": normal(vocab_size, C, std=C**-0.5)}
    if head_qk:
        tensors |= {f"head_{m}.weight": normal(head_qk, C, std=C**-0.5) for m in "qk"}
    return {name: t.to(dtype) for name, t in tensors.items()}


def random_model(path: str | Path, **sizes: object) -> Path:
    """`random_tensors` as a .pth."""
    torch.save(random_tensors(**sizes), path)
    return Path(path)


@pytest.fixture
def model_file(tmp_path: Path) -> Callable[..., Path]:
    """model_file(n_layer=2, n_embd=64, ...) -> a random model's file, base.pth in tmp_path unless `name` is given."""
    return lambda name="base.pth", **sizes: random_model(tmp_path / name, **sizes)


def load_model(
    path: Path, dtype: torch.dtype = torch.float32, wkv: Callable | None = None, grad_cp: str = "0"
) -> RWKV:
    """A model file as the project loads it; wkv: the operator, by default the definition."""
    tensors = read_pth(path, "--load_model")
    arch = detect(tensors, str(path))
    with torch.device("meta"):
        model = RWKV(arch, wkv or WKV[arch.version]["torch"](), grad_cp)
    return fill(model, tensors, str(path), "cpu", dtype)


def logits_of(
    model: RWKV, tokens: list[int], states: list[BlockState] | None = None
) -> tuple[Tensor, list[BlockState]]:
    """The logits (T,V) of one text, and the states after it."""
    with torch.no_grad():
        x, states = model(torch.tensor([tokens]), states)
        return x[0] @ model.head.weight.T, states


@contextlib.contextmanager
def official_package(version: str) -> Iterator[ModuleType]:
    """The `rwkv` package's model, of x070 or of older versions: which, it decides when it is imported."""
    v7 = "1" if version == "x070" else "0"
    with pytest.MonkeyPatch.context() as patch:  # it reads these whenever it likes, and sets others
        patch.setattr(os, "environ", {**os.environ, "RWKV_V7_ON": v7, "RWKV_JIT_ON": "0", "RWKV_CUDA_ON": "0"})
        yield imported(v7)


@functools.cache
def imported(v7: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"rwkv_{v7}", importlib.util.find_spec("rwkv.model").origin)
    package = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(package)
    return package


@pytest.fixture(scope="session")
def official() -> Callable[..., tuple[Tensor, list[Tensor]]]:
    """official(path, tokens, state=None, dtype="fp32") -> logits (T,V) and state, by the `rwkv` package.

    A state has three entries a layer, of which the second is (H,value,key) for x070 and (H,key,value) for the others.
    """
    pytest.importorskip("rwkv")
    models = {}

    @torch.no_grad()
    def run(path: Path, tokens: list[int], state: list[Tensor] | None = None, dtype: str = "fp32") -> tuple:
        with official_package(detect(read_pth(path, "--load_model"), str(path)).version) as package:
            package.DTYPE = dict(fp32=torch.float32, bf16=torch.bfloat16)[dtype]  # a global of the package's
            if (path, dtype) not in models:
                models[path, dtype] = package.RWKV(str(path).removesuffix(".pth"), f"cpu {dtype}")
            logits, state = models[path, dtype].forward(tokens, state, full_output=True)
        return logits.view(len(tokens), -1), state  # (it drops a dimension where there is one token)

    return run


# --------------------------------------------------------- in CI a test may be skipped only where it needs a GPU


def forbid_skip(report: pytest.TestReport | pytest.CollectReport) -> None:
    if report.skipped and os.environ.get("CI") == "true" and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        if not reason.removeprefix("Skipped: ").startswith("no GPU"):
            report.outcome, report.longrepr = "failed", f"skipped in CI: {reason}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> object:
    report = yield
    forbid_skip(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> object:
    report = yield
    forbid_skip(report)
    return report


# ------------------------------------------------------------------------ what tests/test_cells.py found, as a table

CELLS: list[tuple[str, str, str, str]] = []  # version, method, quant, what was found


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    CELLS.extend(tuple(value) for name, value in report.user_properties if name == "cell" and report.when == "call")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not CELLS:
        return
    terminalreporter.section("loss before and after 6 steps; error of the merged file's logits")
    quants = sorted({cell[2] for cell in CELLS}, reverse=True)
    terminalreporter.write_line("".join(f"{word:<27}" for word in ["", *quants]))
    for version, method in sorted({cell[:2] for cell in CELLS}):
        found = {quant: text for v, m, quant, text in CELLS if (v, m) == (version, method)}
        row = [f"{version} {method}", *(found.get(quant, "") for quant in quants)]
        terminalreporter.write_line("".join(f"{word:<27}" for word in row))
