"""--cuda_graph: a micro-batch's work, recorded once and repeated. Here a CPU does what CUDA's capture does: it writes
the operations down with the memory they work on, refuses those that ask for a value, and repeats them blindly."""

import json
import math

import pytest
import torch
from conftest import load_model, random_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import pissa_rwkv as P

STEPS = 8
RUNS = {  # options -> how many graphs the run has
    "full rows": (dict(dataload="get"), 1),
    "rows of two lengths, nf4": (dict(quant="nf4", micro_bsz=1), 2),
    "answers, several micro-batches, clipping": (dict(loss_mask="qa", accumulate_grad_batches=2, grad_clip=0.1), 3),
    "products kept, lora": (dict(dataload="get", grad_cp="products", peft="lora", lr_init=1e-3), 1),
    "x060, everything, fp16 whose loss scale grows": (dict(dataload="get", peft="none", precision="fp16"), 1),
}


class Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        by_number = func is torch.ops.aten.index.Tensor and all(i is None or i.dtype == torch.long for i in args[1])
        if {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(func.tags) and not by_number:
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}")
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    @torch.no_grad()
    def replay(self):
        for func, args, kwargs, out in self.calls:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class OnCPU(P.Graphs):
    """Graphs without a GPU. `replays`: how often each was repeated."""

    def __init__(self, run):
        super().__init__()
        self.run, self.replays = run, []

    def captured(self, work):
        recorder, before = Recorder(), self.run.optimiser.grad.clone()
        try:
            with recorder:
                loss = work()
        finally:
            self.run.optimiser.grad.copy_(before)                     # a capture runs nothing
        self.replays.append(0)
        loss, number = loss.fill_(torch.nan), len(self.replays) - 1

        def replay():
            self.replays[number] += 1
            recorder.replay()

        return replay, loss

    def aside(self, work):
        return work()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("graphs")
    for version in P.TIME_MIX:
        random_model(folder / f"{version}.pth", version=version)
    texts = [f"User: {i}\n\nAssistant: {i} it is{', and so on' * (i % 2)}" for i in range(10, 50)]
    (folder / "data.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    return folder


def build(place, folder, version="x070", **options):
    options = dict(accelerator="cpu", load_model=f"{place}/{version}.pth", data_file=f"{place}/data.jsonl", op="chunk",
                   proj_dir=str(folder), rank=4, ctx_len=40, micro_bsz=2, epoch_steps=STEPS, lr_init=2e-4) | options
    return P.build(P.Config(**options))


def trained(run):
    """The loss of every step, and the gradient's norm."""
    assert not P.train(run)                                           # nothing stopped it
    rows = [json.loads(line) for line in (run.folder / "loss_data.jsonl").read_text().splitlines()]
    return [[math.inf if row[x] is None else row[x] for row in rows] for x in ("loss", "grad_norm")]


@pytest.mark.parametrize("name", RUNS)
def test_repeated_work_is_the_work(name, place, tmp_path, monkeypatch):
    monkeypatch.setattr(P, "SCALE_GROWS", 3)
    options, count = RUNS[name]
    options = dict(version=name[:4]) | options if name.startswith("x") else options
    losses, norms = trained(build(place, tmp_path / "as ever", **options))
    run = build(place, tmp_path / "graphs", **options)
    run.add_gradient = OnCPU(run)
    again, norms_again = trained(run)
    assert len(run.add_gradient.graphs) == count
    made = STEPS * options.get("accumulate_grad_batches", 1)
    assert sum(run.add_gradient.replays) >= made - 2 * len(run.add_gradient.places)       # all but the first of a shape
    assert again == pytest.approx(losses, rel=1e-6 if run.model.head.weight.dtype == torch.float32 else 1e-3)
    assert norms_again == pytest.approx(norms, rel=1e-2)


def test_what_cannot_be_recorded_runs_as_ever(place, tmp_path, monkeypatch, capsys):
    """Here the loss is asked for in the middle of backward, when some gradients are made and none may be used."""
    losses, norms = trained(build(place, tmp_path / "as ever", micro_bsz=1))
    run = build(place, tmp_path / "graphs", micro_bsz=1)
    run.add_gradient = OnCPU(run)
    run.model.blocks[0].register_full_backward_hook(lambda module, given, made: (made[0].sum().item(), None)[1])
    again, norms_again = trained(run)
    assert (again, norms_again) == (pytest.approx(losses, rel=1e-5), pytest.approx(norms, rel=1e-2))
    said = capsys.readouterr().out
    assert said.count("could not be recorded (operation not permitted when stream is capturing") == 1
    assert not run.add_gradient.graphs


def test_there_are_few_graphs(place, tmp_path):
    run = build(place, tmp_path / "out", micro_bsz=1)
    run.add_gradient = OnCPU(run)
    run.add_gradient.most = 1
    P.train(run)
    assert len(run.add_gradient.graphs) == 1 < len(run.add_gradient.places)


@pytest.mark.parametrize(("options", "reason"), [
    (dict(peft="lora", lora_dropout=0.1), "draws dropout anew each time"),
    (dict(emb_on_cpu=True), "reads its embedding from a file (--emb_on_cpu)"),
    (dict(train_type="infctx", chunk_ctx=20), "passes on states from chunk to chunk (--train_type infctx)"),
    ({}, "runs on a cpu"),
])
def test_a_step_that_is_no_graph_says_why(options, reason, place, tmp_path, capsys):
    run = build(place, tmp_path / "out", cuda_graph=True, **options)
    assert run.add_gradient is P.add_gradient
    assert f"--cuda_graph 1 has no effect: this run {reason}\n" in capsys.readouterr().out


def test_zero2_of_several_ranks_is_no_graph(place, capsys):
    model, cfg = load_model(place / "x070.pth"), P.Config(cuda_graph=True, strategy="zero2")
    assert P.graphs(model, cfg, "cuda", P.Ranks(0, 2)) is P.add_gradient
    assert "sends gradients while it makes them" in capsys.readouterr().out
    for several, strategy in ((P.Ranks(0, 2), "zero1"), (P.ONE_RANK, "zero2")):
        assert isinstance(P.graphs(model, P.replace(cfg, strategy=strategy), "cuda", several), P.Graphs)


def test_a_filled_batch_is_the_same_batch(place, tmp_path):
    """In its loss, and in all gradients; in fp64."""
    run = build(place, tmp_path / "out", loss_mask="qa", peft="none")
    run.model.double()
    batch = P.Batch(torch.randint(1, 256, (3, 17)), torch.tensor([4, 16, 17, 30, 50]), torch.arange(5) + 7)
    filled = batch.filled(41)
    assert (filled.inputs.shape, len(filled.learnt)) == ((3, 18), 7)  # eighths of 41 and of 3 x 18, rounded up
    assert (filled.inputs.flatten()[filled.learnt[:5]] == batch.inputs.flatten()[batch.learnt]).all()
    found = []
    for b in (batch, filled):
        loss, = P.batch_losses(run.model, b, 5, run.cfg)
        found.append([loss, *torch.autograd.grad(loss, run.model.parameters())])
    for plain, again in zip(*found, strict=True):
        torch.testing.assert_close(again, plain, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("size", [1, 7, 8, 1000])
def test_eighths(size):
    found = {n: P.eighths(n, size) for n in range(size + 1)}
    assert all(n <= up <= size for n, up in found.items()) and found[0] == 0
    assert len(set(found.values())) <= 9


def test_nothing_is_drawn_so_no_random_state_is_kept(place, tmp_path, monkeypatch):
    """Asking for a GPU's would break a capture. With dropout a block is computed again with the same numbers."""
    asked = []
    monkeypatch.setattr(torch, "get_rng_state", lambda state=torch.get_rng_state: asked.append(1) or state())
    for dropout in (0.0, 0.1):
        run = build(place, tmp_path / str(dropout), peft="lora", lora_dropout=dropout)
        asked.clear()
        P.train_step(run, 1e-4)
        assert bool(asked) == (dropout > 0)
