"""Memory as it is predicted: beside the allocator's own count, the published numbers of parameters, and arithmetic."""

import sys
from pathlib import Path

import pytest
import torch
from conftest import random_model
from torch.profiler import ProfilerActivity, profile

import pissa_rwkv as P

sys.path.insert(0, str(Path(P.__file__).parent / "bench"))


def really_taken(function):
    """What a function returns, and of the bytes that the CPU's allocator had given out: the most, and those left."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        result = function()
    events = sorted((e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"),
                    key=lambda e: e.start_ns())  # fmt: skip
    live = most = 0
    for event in events:
        live += event.nbytes()
        most = max(most, live)
    return result, most, live


def plain(r, w, k, v, a, b, state):
    """In the operator's place: all it allocates is to be seen, in a few operations instead of thousands."""
    return r * w + k * v + a * b, state * 2


def loaded(cfg, tensors, arch, dtype):
    """A run as `build` makes it, of full rows; and the bytes of what init_pissa.pth will hold, which are the host's."""
    with torch.device("meta"):
        model = P.RWKV(arch, P.load_wkv("x070", 64, cfg.op, "cpu"), cfg.grad_cp)
    P.fill(model, tensors, cfg.load_model, "cpu", dtype, P.left_in_file(model, cfg))
    taken = P.add_adapters(model, cfg, {}, {}) if P.ADAPTER[cfg.peft] else {}
    optimiser = P.ZeroAdamW(((n, p) for n, p in model.named_parameters() if p.requires_grad), cfg)
    loader = P.FullRows(cfg.micro_bsz, cfg.ctx_len, "cpu")
    return P.Run(cfg, "cpu", arch, None, loader, None, model, optimiser, {}, 1), sum(t.nbytes for t in taken.values())


@pytest.mark.parametrize(("options", "dtype"), [
    (dict(op="cpu"), torch.float32), (dict(grad_cp=False), torch.float32),
    (dict(quant="nf4", ctx_len=100), torch.float32),
    (dict(quant="int8", micro_bsz=5), torch.bfloat16), (dict(quant="nf4dq", grad_cp=False), torch.bfloat16),
    (dict(peft="lora", emb_on_cpu=True), torch.bfloat16), (dict(peft="none", grad_cp=False), torch.float32),
    (dict(micro_bsz=4, accumulate_grad_batches=2, train_parts=()), torch.bfloat16)], ids=str)
def test_prediction_is_what_the_allocator_saw(options, dtype, tmp_path, monkeypatch):
    """Real tensors, through the same functions: held, at the peak of loading, and at the peak of a step."""
    monkeypatch.setitem(P.WKV, ("x070", "torch"), lambda: plain)
    path = random_model(tmp_path / "base.pth", n_layer=3, n_embd=192, vocab_size=2048, dtype=torch.bfloat16)
    cfg = P.Config(**dict(load_model=str(path), op="torch", ctx_len=64, micro_bsz=2, rank=8) | options)
    tensors = P.read_pth(path, "")                                    # (memory-mapped: not the allocator's)
    arch = P.detect(tensors, "")
    P.nf4_levels(torch.device("cpu")), P.dynamic_levels(torch.device("cpu"))  # (tables of levels are made once)
    (run, taken), loading, held = really_taken(lambda: loaded(cfg, tensors, arch, dtype))
    _, step, left = really_taken(lambda: P.train_step(run, 1e-5))
    found = P.Rehearsal(cfg, arch, "cpu", dtype).memory(cfg.micro_bsz)
    for name, predicted, real, within in (("loading", found.loading, loading - taken, 0.1),
                                          ("held", found.weights + found.optimiser, held, 0.01),
                                          ("step", found.activations, step, 0.05)):
        print(f"{name}: {predicted / real:.4f}")
        assert predicted == pytest.approx(real, rel=within), name
    assert abs(left) < 2**16
