"""The chunked loss against cross-entropy written out over all logits at once, in float64."""

import pytest
import torch
import torch.nn.functional as F
from conftest import load_model

import pissa_rwkv
from pissa_rwkv import Batch, Config, HeadLoss, batch_losses

M, V, C, n = 10, 7, 5, 13
DOUBLE = dict(rtol=1e-12, atol=1e-14)


def inputs(M=M, V=V, C=C, dtype=torch.float64, spread=3.0):
    draw = torch.Generator().manual_seed(0)
    x = (spread * torch.randn(M, C, generator=draw, dtype=torch.float64)).to(dtype).requires_grad_()
    W = torch.randn(V, C, generator=draw, dtype=torch.float64).to(dtype).requires_grad_()
    return x, W, torch.randint(V, (M,), generator=draw)


def plain(x, W, targets, n):
    """The formula: the value, and the function whose gradient is wanted."""
    logits = x @ W.T
    value = F.cross_entropy(logits, targets, reduction="sum") / n
    first = torch.tensor([[row.index(max(row))] for row in logits.tolist()])  # of the largest, where several are
    largest = logits.gather(1, first)
    return value, value + 0.5 * 1e-4 / n * largest.square().sum()


@pytest.fixture(params=[1, 3 * V, 4 * V, M * V, 2**24], ids="held={}".format)
def held(request, monkeypatch):
    monkeypatch.setattr(pissa_rwkv, "LOGITS_HELD", request.param)


@pytest.mark.parametrize("grad", [False, True])
def test_without_gradients_none_is_made_of_the_head(monkeypatch, model_file, grad):
    """Not even of one that is trained: in validation it would take as long as all else."""
    model, made = load_model(model_file()), []
    zeros_like = torch.zeros_like
    monkeypatch.setattr(torch, "zeros_like", lambda x, **more: made.append(x.shape) or zeros_like(x, **more))
    tokens = torch.arange(8)[None]
    with torch.set_grad_enabled(grad):
        pissa_rwkv.chunk_loss(model, Batch(tokens[:, :-1], torch.arange(7), tokens[0, 1:]), 7, None)
    assert (model.head.weight.shape in made) == grad


def test_value_and_gradients_are_the_formulas_for_any_number_of_logits_held(held):
    x, W, targets = inputs()
    value, with_l2_wrap = plain(x, W, targets, n)
    wanted = torch.autograd.grad(with_l2_wrap, (x, W))
    loss = HeadLoss.apply(x, W, targets, n)
    torch.testing.assert_close(loss, value, **DOUBLE)
    for found, gradient in zip(torch.autograd.grad(loss, (x, W)), wanted, strict=True):
        torch.testing.assert_close(found, gradient, **DOUBLE)


def test_ignored_targets_teach_nothing(held):
    x, W, targets = inputs()
    some = torch.arange(M) % 3 > 0
    value, with_l2_wrap = plain(x[some], W, targets[some], n)
    wanted = torch.autograd.grad(with_l2_wrap, (x, W))
    loss = HeadLoss.apply(x, W, torch.where(some, targets, pissa_rwkv.IGNORED), torch.tensor(float(n)))
    torch.testing.assert_close(loss, value, **DOUBLE)
    for found, gradient in zip(torch.autograd.grad(loss, (x, W)), wanted, strict=True):
        torch.testing.assert_close(found, gradient, **DOUBLE)


def test_l2_wrap_is_in_the_gradient_and_not_in_the_value():
    """A position whose target is certain: cross-entropy gives no gradient, what is left is m 1e-4/n."""
    x, W = torch.tensor([[200.0, 0.0]]).double().requires_grad_(), torch.eye(2).double()
    loss = HeadLoss.apply(x, W, torch.tensor([0]), 4)
    assert loss.item() == 0
    torch.testing.assert_close(torch.autograd.grad(loss, x)[0], torch.tensor([[200 * 1e-4 / 4, 0]]).double())


def test_gradients_scale_with_the_incoming_gradient():
    x, W, targets = inputs()
    one = torch.autograd.grad(HeadLoss.apply(x, W, targets, n), (x, W))
    many = torch.autograd.grad(HeadLoss.apply(x, W, targets, n) * 1024.0, (x, W))
    assert all(torch.equal(a * 1024, b) for a, b in zip(one, many, strict=True))


def test_of_equal_largest_logits_the_first_is_pulled():
    W = torch.tensor([[0.0, 1], [1, 0], [1, 0], [-1, 0]]).double().requires_grad_()  # tokens 1 and 2 are alike
    x, targets = torch.tensor([[3.0, -2]]).double().requires_grad_(), torch.tensor([0])
    found = torch.autograd.grad(HeadLoss.apply(x, W, targets, 1), W)[0]
    torch.testing.assert_close(found, torch.autograd.grad(plain(x, W, targets, 1)[1], W)[0], **DOUBLE)
    torch.testing.assert_close(found[1] - found[2], 1e-4 * 3 * x[0].detach(), rtol=1e-9, atol=0)


def test_a_frozen_head_gets_no_gradient_and_nothing_is_computed_for_it():
    x, W, targets = inputs()
    wanted = torch.autograd.grad(HeadLoss.apply(x, W, targets, n), x)[0]
    loss = HeadLoss.apply(x, W.detach(), targets, n)
    assert loss.grad_fn.saved_tensors[1] is None
    assert torch.equal(torch.autograd.grad(loss, x)[0], wanted)


def test_large_logits_do_not_overflow():
    x, W, targets = inputs(spread=1e4)
    value, with_l2_wrap = plain(x, W, targets, n)
    loss = HeadLoss.apply(x, W, targets, n)
    torch.testing.assert_close(loss, value, **DOUBLE)
    wanted = torch.autograd.grad(with_l2_wrap, x)[0]
    torch.testing.assert_close(torch.autograd.grad(loss, x)[0], wanted, rtol=1e-10, atol=1e-12)


def test_no_learnt_position_is_a_loss_of_zero():
    x, W, targets = inputs(M=0)
    loss = HeadLoss.apply(x, W, targets, n)
    assert loss.item() == 0 and torch.autograd.grad(loss, x)[0].shape == (0, C)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scale, n", [(1.0, 13), (2.0**16, 13), (2.0**16, 8192)])
def test_gradients_of_half_precision_are_as_good_as_plain_pytorchs(dtype, scale, n):
    """The whole gradient, relative to float64's, is at most twice as wrong as that of F.cross_entropy on logits in this
    dtype, differentiated without n, which is divided by in float64. `scale` is fp16's loss scale: what it lifts into
    fp16's range must not have been lost before."""
    x, W, targets = inputs(M=64, V=500, C=32, dtype=dtype, spread=0.3)
    loss = HeadLoss.apply(x, W, targets, n)
    assert loss.dtype == torch.float32
    found = torch.autograd.grad(loss * scale, (x, W))
    peer = torch.autograd.grad(F.cross_entropy((x @ W.T).float(), targets, reduction="sum"), (x, W))
    x, W = (t.detach().double().requires_grad_() for t in (x, W))
    exact = torch.autograd.grad(plain(x, W, targets, 1)[1], (x, W))
    for mine, theirs, wanted in zip(found, peer, exact, strict=True):
        assert mine.dtype == dtype and mine.isfinite().all()
        error = (mine.double() * (n / scale) - wanted).norm()
        assert error <= 2 * (theirs.double() - wanted).norm() + 1e-4 * wanted.norm()


# -------------------------------------------------------------------------------------------------------- micro-batches


def batch(rows, learnt):
    """Rows of tokens of one length, and which of their targets are learnt."""
    rows, at = torch.tensor(rows), torch.tensor(learnt).flatten().nonzero().flatten()
    return Batch(rows[:, :-1], at, rows[:, 1:].flatten()[at])


def test_two_micro_batches_are_one_large_batch(model_file):
    """With unequal numbers of learnt tokens (5 and 2): the mean is over all 7, not over two means."""
    rows = [[3, 14, 15, 92, 65, 35], [89, 79, 32, 38, 46, 26], [43, 38, 32, 79, 50, 28], [84, 19, 71, 69, 39, 93]]
    learnt = [[1, 1, 0, 1, 0], [0, 0, 1, 1, 0], [0, 0, 0, 0, 1], [0, 1, 0, 0, 0]]
    results = []
    for groups in ([slice(0, 4)], [slice(0, 2), slice(2, 4)]):
        model, loss = load_model(model_file(), torch.float64), 0.0
        for group in groups:
            share, = batch_losses(model, batch(rows[group], learnt[group]), 7, Config())
            share.backward()
            loss += share.item()
        results.append((loss, {name: p.grad for name, p in model.named_parameters()}))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-12)
    for name, gradient in results[0][1].items():
        assert gradient.any()
        torch.testing.assert_close(gradient, results[1][1][name], rtol=1e-9, atol=1e-12)


def test_a_batch_s_loss_is_cross_entropy_with_minus_100_for_what_is_not_learnt(model_file):
    rows, learnt = [[3, 14, 15, 92, 65, 35], [89, 79, 32, 38, 46, 26]], [[1, 0, 0, 1, 0], [0, 0, 1, 1, 1]]
    model = load_model(model_file(), torch.float64)
    with torch.no_grad():
        logits = model(torch.tensor(rows)[:, :-1])[0] @ model.head.weight.T
        targets = torch.tensor(rows)[:, 1:].masked_fill(torch.tensor(learnt) == 0, -100)
        wanted = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        torch.testing.assert_close(sum(batch_losses(model, batch(rows, learnt), 5, Config())), wanted, **DOUBLE)
