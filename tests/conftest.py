"""What the tests share: random model files, written from the format's description and not by the project; the official
`rwkv` package as an oracle."""

import importlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pissa_rwkv import RWKV, BlockState, detect, fill, read_pth, wkv7_ref

RANKS = dict(w=8, a=12, v=16, g=20)  # all different, so that a mix-up is an error of shapes


def random_tensors(
    n_layer: int = 2, n_embd: int = 64, vocab_size: int = 256, dtype: torch.dtype = torch.float32, seed: int = 0,
    head_size: int = 64, dim_ffn: int = 0, layer0_v: bool = False,
) -> dict[str, Tensor]:
    """An RWKV-7 model in the keys, shapes and order of a released file, with no weight at zero.

    layer0_v: also blocks.0.att.v0 v1 v2, which some files have and nothing uses (they are NaN here).
    """
    draw, C, F = torch.Generator().manual_seed(seed), n_embd, dim_ffn or 4 * n_embd

    def normal(*shape: int, std: float = 1.0, mean: float = 0.0) -> Tensor:
        return mean + std * torch.randn(shape, generator=draw)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(1, 1, C, generator=draw)

    def norm(name: str) -> dict[str, Tensor]:
        return {f"{name}.weight": normal(C, std=0.2, mean=1.0), f"{name}.bias": normal(C, std=0.1)}

    def block(i: int) -> dict[str, Tensor]:
        t = norm("ln1") | norm("ln2") | (norm("ln0") if i == 0 else {})
        t |= {f"att.x_{m}": uniform(0, 1) for m in "rwkvag"}
        for m, low, high in (("w", -6, 1), ("a", -1, 1), ("v", -1, 1), ("g", 0, 0)):
            t |= {f"att.{m}1": normal(C, RANKS[m], std=C**-0.5), f"att.{m}2": normal(RANKS[m], C, std=0.3)}
            t |= {f"att.{m}0": uniform(low, high)} if m != "g" else {}
            if m == "v" and i == 0:
                unused = {name: t.pop(name) for name in ("att.v1", "att.v2", "att.v0")}
                t |= {name: x * torch.nan for name, x in unused.items()} if layer0_v else {}
        t |= {"att.k_k": uniform(0.5, 1.5), "att.k_a": uniform(0.5, 1.5)}
        t |= {"att.r_k": normal(C // head_size, head_size, std=0.2)}
        t |= {f"att.{m}.weight": normal(C, C, std=C**-0.5) for m in ("receptance", "key", "value", "output")}
        t |= norm("att.ln_x")
        t |= {"ffn.x_k": uniform(0, 1)}
        return t | {"ffn.key.weight": normal(F, C, std=C**-0.5), "ffn.value.weight": normal(C, F, std=F**-0.5)}

    tensors = {"emb.weight": normal(vocab_size, C)}
    for i in range(n_layer):
        tensors |= {f"blocks.{i}.{name}": t for name, t in block(i).items()}
    tensors |= norm("ln_out") | {"head.weight": normal(vocab_size, C, std=C**-0.5)}
    return {name: t.to(dtype) for name, t in tensors.items()}


def random_model(path: str | Path, **sizes: object) -> Path:
    """`random_tensors` as a .pth."""
    torch.save(random_tensors(**sizes), path)
    return Path(path)


@pytest.fixture
def model_file(tmp_path: Path) -> Callable[..., Path]:
    """model_file(n_layer=2, n_embd=64, ...) -> a random model's file, base.pth in tmp_path unless `name` is given."""
    return lambda name="base.pth", **sizes: random_model(tmp_path / name, **sizes)


def load_model(path: Path, dtype: torch.dtype = torch.float32, wkv: Callable = wkv7_ref, grad_cp: bool = False) -> RWKV:
    """A model file as the project loads it."""
    tensors = read_pth(path, "--load_model")
    with torch.device("meta"):
        model = RWKV(detect(tensors, str(path)), wkv, grad_cp)
    return fill(model, tensors, str(path), "cpu", dtype)


def logits_of(
    model: RWKV, tokens: list[int], states: list[BlockState] | None = None
) -> tuple[Tensor, list[BlockState]]:
    """The logits (T,V) of one text, and the states after it."""
    with torch.no_grad():
        x, states = model(torch.tensor([tokens]), states)
        return x[0] @ model.head.weight.T, states


@pytest.fixture(scope="session")
def official() -> Callable[..., tuple[Tensor, list[Tensor]]]:
    """official(path, tokens, state=None, dtype="fp32") -> logits (T,V) and state, by the `rwkv` package."""
    pytest.importorskip("rwkv")
    with pytest.MonkeyPatch.context() as patch:  # the package reads these as it is imported, and sets others
        patch.setattr(os, "environ", {**os.environ, "RWKV_V7_ON": "1", "RWKV_JIT_ON": "0", "RWKV_CUDA_ON": "0"})
        package = importlib.import_module("rwkv.model")
    models = {}

    @torch.no_grad()
    def run(path: Path, tokens: list[int], state: list[Tensor] | None = None, dtype: str = "fp32") -> tuple:
        package.DTYPE = dict(fp32=torch.float32, bf16=torch.bfloat16)[dtype]  # a global of the package's
        if (path, dtype) not in models:
            models[path, dtype] = package.RWKV(str(path).removesuffix(".pth"), f"cpu {dtype}")
        return models[path, dtype].forward(tokens, state, full_output=True)

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
