"""Rows trained in chunks: with the full gradient as whole ones, truncated as in a loop that detaches by hand."""

import json
import re
import shlex
from functools import lru_cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import load_model, random_model

import pissa_rwkv as P
import wkv7_cuda

ROWS = [[3, 14, 15, 92, 65, 35, 89, 79, 32, 38, 46, 26, 43], [84, 19, 71, 69, 39, 93, 75, 10, 58, 20, 97]]  # 13, 11


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return random_model(tmp_path_factory.mktemp("chunks") / "base.pth", vocab_size=100, dim_ffn=96)


def batch_of(rows, learnt):
    """Padded on the right; `learnt` are the places (row, place of the target) that are learnt."""
    T = max(map(len, rows)) - 1
    inputs = torch.tensor([row[:-1] + [0] * (T + 1 - len(row)) for row in rows])
    places, targets = torch.tensor([(i * T + t - 1, rows[i][t]) for i, t in learnt], dtype=torch.long).view(-1, 2).T
    return P.Batch(inputs, places, targets)


EVERY = [(i, t) for i, row in enumerate(ROWS) for t in range(1, len(row))]
LEARNT = {"every": EVERY, "some": EVERY[1::3], "nothing in a middle chunk": [x for x in EVERY if not 4 < x[1] <= 10],
          "nothing in the first and the last": [(0, 6), (0, 7), (1, 8)], "one": [(1, 10)], "nothing": []}


def config(**options):
    return P.Config(**{"ctx_len": 12, "train_type": "infctx", **options})


def gradients(model, batch, n, cfg, scale=1.0):
    """The loss and every parameter's gradient, as the training loop finds them."""
    loss = 0.0
    for share in P.batch_losses(model, batch, n, cfg):
        (share * scale).backward()
        loss += share.item()
    return loss, {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}


def cross_entropy(model, tokens, targets, n, states):
    """Of one row's piece, target -100 where nothing is learnt, with L2Wrap as a term whose gradient it is."""
    x, states = model(tokens[None], states)
    logits = x[0] @ model.head.weight.T
    kept = targets >= 0
    largest = logits[kept].max(-1).values
    loss = F.cross_entropy(logits, targets, reduction="sum", ignore_index=-100) / n
    return loss, loss + 0.5e-4 / n * largest.square().sum(), states


def by_hand(model, size, learnt, n, detached):
    """Row by row and chunk by chunk. Detached: states are copied, without history, before the next chunk."""
    total, loss = 0.0, 0.0
    for i, row in enumerate(ROWS):
        tokens, states = torch.tensor(row[:-1]), None
        targets = torch.tensor([row[t] if (i, t) in learnt else -100 for t in range(1, len(row))])
        for start in range(0, len(tokens), size):
            stop = start + size
            value, differentiated, states = cross_entropy(model, tokens[start:stop], targets[start:stop], n, states)
            loss, total = loss + value.item(), total + differentiated
            if detached:
                states = [P.BlockState(*(torch.tensor(x.tolist(), dtype=x.dtype) for x in (s.att, s.wkv, s.ffn)))
                          for s in states]
    total.backward()
    return loss, {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}


def same(found, wanted, rtol=1e-9, atol=1e-12):
    assert found[0] == pytest.approx(wanted[0], rel=1e-12)
    for name, gradient in wanted[1].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=rtol, atol=atol)


@lru_cache
def whole_rows(base, learnt, n):
    model = load_model(base, torch.float64)
    return gradients(model, batch_of(ROWS, LEARNT[learnt]), n, config(train_type="normal"))


# --------------------------------------------------------------------------------------------------------- cutting


@pytest.mark.parametrize("size", [1, 3, 4, 5, 11, 12, 99])
def test_chunks_hold_every_token_and_every_learnt_place_once(size):
    batch = batch_of(ROWS, LEARNT["some"])
    chunks = [*batch.chunks(size)]
    assert torch.equal(torch.cat([c.inputs for c in chunks], 1), batch.inputs)
    assert [c.inputs.shape[1] for c in chunks[:-1]] == [size] * (len(chunks) - 1) and chunks[-1].inputs.shape[1] <= size
    found = {(i, k * size + t + 1): target for k, c in enumerate(chunks)
             for (i, t), target in zip((divmod(p, c.inputs.shape[1]) for p in c.learnt.tolist()), c.targets.tolist(),
                                       strict=True)}
    assert found == {(i, t): ROWS[i][t] for i, t in LEARNT["some"]}


# ------------------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize(("size", "grad_cp"), [(1, "0"), (5, "1"), (6, "products")])
@pytest.mark.parametrize("learnt", LEARNT)
def test_the_full_gradient_is_that_of_whole_rows(base, learnt, size, grad_cp):
    n, batch = 7, batch_of(ROWS, LEARNT[learnt])
    whole = whole_rows(base, learnt, n)
    same(gradients(load_model(base, torch.float64, grad_cp=grad_cp), batch, n,
                   config(chunk_ctx=size, chunk_grad="full")), whole)
    if learnt == "every" and size == 6:
        same(by_hand(load_model(base, torch.float64), 99, LEARNT[learnt], n, False), whole)
        assert all(gradient.any() for gradient in whole[1].values())


def test_what_is_computed_again_draws_the_same_numbers(base, monkeypatch):
    """torch's checkpoint keeps the random state of the devices on which tensors among its arguments are: on a GPU
    without one it would keep the CPU's alone, and backward dropped out other numbers."""
    seen = []

    def recorded(f, *arguments, **options):
        seen.append([x for x in arguments if isinstance(x, torch.Tensor)])
        return f(*arguments)

    monkeypatch.setattr(P, "checkpoint", recorded)
    model = load_model(base, torch.float64, grad_cp="0")
    gradients(model, batch_of(ROWS, LEARNT["some"]), 7, config(chunk_ctx=5, chunk_grad="full"))
    assert len(seen) > 1 and all(tensors and tensors[0] is model.head.weight for tensors in seen)


@pytest.mark.parametrize(("size", "grad_cp"), [(1, "0"), (5, "1"), (6, "products")])
@pytest.mark.parametrize("learnt", [name for name in LEARNT if name != "nothing"])
def test_the_truncated_gradient_is_that_of_states_detached_by_hand(base, learnt, size, grad_cp):
    n, batch = 7, batch_of(ROWS, LEARNT[learnt])
    found = gradients(load_model(base, torch.float64, grad_cp=grad_cp), batch, n, config(chunk_ctx=size))
    same(found, by_hand(load_model(base, torch.float64), size, LEARNT[learnt], n, True))
    whole = whole_rows(base, learnt, n)
    assert found[0] == pytest.approx(whole[0], rel=1e-12)             # the same loss, but
    assert any(not torch.allclose(found[1][name], whole[1][name]) for name in found[1])


def test_nothing_learnt_is_a_loss_of_zero_and_no_backward_pass(base):
    batch = batch_of(ROWS, [])
    loss, gradient = gradients(load_model(base, torch.float64), batch, 1, config(chunk_ctx=5))
    assert loss == 0 and not any(g.any() for g in gradient.values())
    assert len([*P.batch_losses(load_model(base), batch_of(ROWS, LEARNT["one"]), 1, config(chunk_ctx=5))]) == 1


def test_one_chunk_is_whole_to_the_bit(base):
    batch = batch_of(ROWS, EVERY)
    whole = gradients(load_model(base), batch, 7, config(train_type="normal"))
    for options in (dict(chunk_ctx=12), dict(chunk_ctx=12, chunk_grad="full"), dict(train_type="none"), dict()):
        found = gradients(load_model(base), batch, 7, config(**options))
        assert found[0] == whole[0] and all(torch.equal(found[1][name], g) for name, g in whole[1].items())


@pytest.mark.parametrize("op", ["chunk", "cpu"])
def test_four_chunks_of_256_are_1024(base, op):
    draw = torch.Generator().manual_seed(0)
    rows = torch.randint(1, 100, (1, 1025), generator=draw).tolist()
    batch = batch_of(rows, [(0, t) for t in range(1, 1025)])
    wkv = wkv7_cuda.load(op)
    whole = gradients(load_model(base, wkv=wkv), batch, 1024, config(ctx_len=1024, train_type="normal"))
    found = gradients(load_model(base, wkv=wkv), batch, 1024, config(ctx_len=1024, chunk_ctx=256, chunk_grad="full"))
    assert found[0] == pytest.approx(whole[0], rel=1e-6)
    for name, gradient in whole[1].items():
        assert (found[1][name] - gradient).norm() <= 2e-4 * gradient.norm(), name


def test_a_loss_scale_is_only_a_factor(base):
    batch = batch_of(ROWS, EVERY)
    for options in (dict(chunk_ctx=5), dict(chunk_ctx=5, chunk_grad="full")):
        one = gradients(load_model(base), batch, 7, config(**options))
        many = gradients(load_model(base), batch, 7, config(**options), scale=2.0**16)
        assert all(torch.equal(many[1][name], gradient * 2**16) for name, gradient in one[1].items())


def test_gradients_of_several_chunks_are_added_in_fp32():
    def dtype(**options):
        weight = torch.nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))
        return P.ZeroAdamW([("x", weight)], config(**options)).grad.dtype

    assert dtype(chunk_ctx=4) == dtype(train_type="normal", accumulate_grad_batches=2) == torch.float32
    assert dtype(chunk_ctx=12) == dtype(chunk_ctx=4, chunk_grad="full") == torch.bfloat16


# ---------------------------------------------------------------------------------------------------------- memory


def bytes_of(path, ctx_len, step, **options):
    """The most bytes alive on the CPU while step(run) runs, above those before."""
    cfg = config(load_model=str(path), peft="none", op="cpu", micro_bsz=2, ctx_len=ctx_len, grad_cp="0", **options)
    model = load_model(path, wkv=P.load_wkv("x070", 64, "cpu", "cpu"))
    optimiser = P.ZeroAdamW(model.named_parameters(), cfg)
    loader = P.FullRows(2, ctx_len, "cpu")
    dtype = model.head.weight.dtype
    run = P.Run(cfg, P.ONE_RANK, "cpu", dtype, model.arch, None, loader, None, 1, {}, model, optimiser)
    with P.Peak("cpu") as peak:
        step(run)
    return peak.most


def test_memory_follows_the_chunk_and_not_the_row(base):
    def train(run):
        P.train_step(run, 1e-5)

    def validate(run):
        run.loader.cfg, run.loader.pass_rows, run.loader.one_pass = run.cfg, 2, range(1)
        full_batch = run.loader.batch
        run.loader.batch = lambda number, last: full_batch(number)
        P.evaluate(run.model, run.loader)

    of_tokens = 64                                                    # bytes a token: its number, its places, masks
    for step, options in ((train, dict()), (validate, dict()), (validate, dict(chunk_grad="full"))):
        short, long = (bytes_of(base, T, step, chunk_ctx=16, **options) for T in (64, 256))
        assert long - short < of_tokens * 2 * (256 - 64)
        whole = [bytes_of(base, T, step, train_type="normal") for T in (64, 256)]
        assert whole[1] > 2.5 * whole[0] and long < whole[1] / 2
    # The full gradient keeps the states between chunks, and of them only.
    short, long = (bytes_of(base, T, train, chunk_ctx=16, chunk_grad="full") for T in (64, 256))
    states = 4 * 2 * (2 * (2 * 64 + 64 * 64)) + 3 * 512               # two layers, two rows, fp32
    assert 0 < (long - short) / 12 < 1.2 * states + 16 * 2 * of_tokens


@pytest.mark.parametrize("chunk_grad", ["truncated", "full"])
def test_the_rehearsal_counts_chunks(base, chunk_grad):
    arch = P.detect(P.read_pth(base, ""), "")

    def activations(**options):
        cfg = config(load_model=str(base), peft="pissa", rank=4, micro_bsz=2, **options)
        return P.Rehearsal(cfg, arch, "cuda", torch.bfloat16).memory(2).activations

    # (From three chunks on, one has states both before and after it.)
    chunks = [activations(ctx_len=T, chunk_ctx=64, chunk_grad=chunk_grad) for T in (192, 512)]
    assert (chunks[0] == chunks[1]) == (chunk_grad == "truncated")
    assert chunks[1] < activations(ctx_len=512, train_type="normal") / 2


# ------------------------------------------------------------------------------------------------------ whole runs


@pytest.fixture
def command(base, tmp_path):
    texts = [f"line {i} of the text, and its {'long ' * (i % 3)}rest" for i in range(12)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    random_model(tmp_path / "m.pth")
    return lambda options, name: shlex.split(
        f"--load_model {tmp_path}/m.pth --data_file {tmp_path}/data.jsonl --proj_dir {tmp_path}/{name} --op torch"
        f" --ctx_len 16 --micro_bsz 2 --rank 4 --epoch_steps 3 --accumulate_grad_batches 2 --lr_init 1e-4 {options}")


@pytest.mark.parametrize("options", [
    "--dataload pad", "--dataload only", "--dataload get", "--dataload pad --val_split 0.3 --grad_cp 0",
    """--dataload pad --loss_mask se --mask_id '{"mask1": "text", "mask0": "rest"}' --peft lora"""])
def test_runs_in_chunks_have_the_losses_of_whole_ones(command, tmp_path, options, capsys):
    losses = {}
    for name, chunked in {"whole": "", "full": "--train_type infctx --chunk_ctx 5 --chunk_grad full",
                          "truncated": "--train_type infctx --chunk_ctx 5"}.items():
        assert P.main(command(f"{options} {chunked} --sample_prompt line --sample_len 3", name)) == 0
        rows = [json.loads(line) for line in (tmp_path / name / "loss_data.jsonl").read_text().splitlines()]
        losses[name] = [row.get("loss", row.get("val_loss")) for row in rows]
        losses[name].append(float(re.search(r"base ([\d.]+),", capsys.readouterr().out)[1]))
        assert all(np.isfinite(losses[name]))
    assert losses["full"] == pytest.approx(losses["whole"], abs=1e-4)
    assert losses["truncated"][0] == pytest.approx(losses["whole"][0], abs=1e-5)
    assert losses["truncated"] == pytest.approx(losses["whole"], abs=0.05)


def test_flags_that_do_nothing_say_so(command, capsys):
    for options in ("--chunk_ctx 8", "--chunk_grad full", "--train_type none --chunk_ctx 512"):
        P.check(P.parse(command(options, "x")))
        assert "no effect without --train_type infctx" in capsys.readouterr().out
    P.check(P.parse(command("--train_type infctx --chunk_ctx 16 --chunk_grad full", "x")))
    assert "effect" not in capsys.readouterr().out
