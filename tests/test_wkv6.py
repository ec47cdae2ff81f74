"""What WKV-6 has and WKV-7 has not: a decay without a floor, a bonus per head, version 5's constant decay, rows in WKV.

What both have (values, gradients, ends of chunks, opcheck ...) is tested in test_wkv.py.
"""

import math

import pytest
import torch
from test_wkv import RECURRENCES, error, make, run

import wkv7_cuda
from pissa_rwkv import WKV, load_wkv, wkv6_ref

NAMES = RECURRENCES["wkv6"].names
each_op = pytest.mark.parametrize("op", ["cpu", "chunk"])


def exact_of(inputs, dy, dstate):
    """The definition in float64 on the same numbers."""
    wide = [x.detach().double().requires_grad_() for x in inputs]
    return run(wkv6_ref, wide, dy.double(), dstate.double())


def test_the_definition_by_hand():
    """Two tokens of a head of size 1: y_1 = (S + u v k) r, S' = d S + v k, y_2 = (S' + u v k) r."""
    one = [torch.tensor(x, dtype=torch.float64) for x in ([2.0, 3.0], [0.0, 1.0], [5.0, 7.0], [11.0, 13.0])]
    r, w, k, v = (x.view(1, 2, 1, 1) for x in one)
    y, S = wkv6_ref(r, w, k, v, torch.full((1, 1), 0.5).double(), torch.full((1, 1, 1, 1), 17.0).double())
    middle = 17 * math.exp(-1) + 55
    assert y.flatten().tolist() == pytest.approx([2 * (17 + 27.5), 3 * (middle + 45.5)], rel=1e-15)
    assert S.item() == pytest.approx(middle * math.exp(-math.e) + 91, rel=1e-15)


@each_op
def test_a_constant_decay(op):
    """Version 5: w and u are (H,N), w expanded over batch and time; their gradients are sums."""
    (r, w, k, v, u, state), dy, dstate = make(2, 37, 2, dtype=torch.float64, recurrence="wkv6")
    w = w.detach()[0, 0].requires_grad_()
    leaves = [r, w, k, v, u, state]

    def eagle(f):
        return run(lambda r, w, *rest: f(r, w.expand(*r.shape), *rest), leaves, dy, dstate)

    found, exact = eagle(wkv7_cuda.load(op, "wkv6")), eagle(wkv6_ref)
    assert found[3].shape == w.shape
    for name, x, e in zip(NAMES, found, exact, strict=True):
        assert error(x, e) < 1e-13, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("w", [1e4, 100.0, 88.0, 20.0, -20.0, -100.0, -1e4, "inf", "both"])
@each_op
def test_extreme_decays(op, w, dtype):
    """exp(w) may overflow and d be 0; nothing is NaN and all is right, save a dw near float32's smallest number."""
    inputs, dy, dstate = make(1, 40, 2, dtype=dtype, recurrence="wkv6")
    with torch.no_grad():
        if w == "both":  # a token that forgets all among tokens that forget nothing
            inputs[1].copy_(torch.where(torch.arange(40) % 7 % 3 == 1, 1e4, -9.0).view(40, 1, 1))
        else:
            inputs[1].fill_(float(w))
    exact, found = exact_of(inputs, dy, dstate), run(wkv7_cuda.load(op, "wkv6"), inputs, dy, dstate)
    bar = {torch.float32: 5e-7, torch.float64: 1e-14, torch.bfloat16: 4e-3}[dtype]
    if float("inf") in inputs[1] or inputs[1].max() > 700:  # where the definition itself says 0 * inf
        exact[3] = exact[3].nan_to_num(0)
    for name, x, e in zip(NAMES, found, exact, strict=True):
        assert x.isfinite().all(), name
        assert (x.double() - e).norm() <= bar * e.norm() + 1e-32, name


@each_op
def test_nan_is_not_swallowed(op):
    """A NaN among the decays shows in all later tokens, and in none before."""
    inputs, _, _ = make(1, 40, 1, dtype=torch.float32, recurrence="wkv6")
    with torch.no_grad():
        inputs[1][0, 20, 0, 5] = torch.nan
        y, state = wkv7_cuda.load(op, "wkv6")(*inputs)
    assert y[:, :21].isfinite().all() and y[:, 21:].isnan().all() and state[..., 5].isnan().all()


@each_op
def test_decay_gradient_where_little_is_left(op):
    """w = 3: d = 2e-9. dw is as accurate as all else, relative to itself; from r o dr - k o dk it would be noise."""
    inputs, dy, dstate = make(1, 40, 2, "brisk", torch.float32, recurrence="wkv6")
    exact, found = exact_of(inputs, dy, dstate), run(wkv7_cuda.load(op, "wkv6"), inputs, dy, dstate)
    assert error(found[3], exact[3]) < 5e-7 and exact[3].abs().max() < 1e-5
    (r, _, k, *_), dr, dk = inputs, found[2].double(), found[4].double()
    h = r.double() * dr - k.double() * dk
    noise = h.flip(1).cumsum(1).flip(1) - r.double() * dr
    assert error(noise * -math.exp(3), exact[3]) > 1


@each_op
def test_a_token_reads_its_own_write_by_the_bonus_alone(op):
    """With d = 0 a token sees itself times u and the one before it, nothing else; the state is the last token's."""
    (r, w, k, v, u, state), _, _ = make(1, 35, 1, "fast", recurrence="wkv6")
    y, S = wkv7_cuda.load(op, "wkv6")(r, w, k, v, u, torch.zeros_like(state))
    last = torch.cat([torch.zeros_like(v[:, :1]), v[:, :-1] * (r[:, 1:] * k[:, :-1]).sum(-1, keepdim=True)], 1)
    assert error(y, last + v * (r * u * k).sum(-1, keepdim=True)) < 1e-14
    assert error(S, v[:, -1, :, :, None] * k[:, -1, :, None, :]) < 1e-14


@each_op
def test_the_bonus_is_checked(op):
    f, (inputs, _, _) = wkv7_cuda.load(op, "wkv6"), make(2, 9, 3, dtype=torch.float32, recurrence="wkv6")
    for u, message in ((inputs[4].flatten(), r"u has shape \[192\], not \[3, 64\], \[H,N\] of r"),
                       (inputs[4].expand(2, 3, 64), r"u has shape \[2, 3, 64\], not \[3, 64\]"),
                       (inputs[4].double(), "u is torch.float64, r is torch.float32; cast all five to one of")):
        with pytest.raises(ValueError, match=f"wkv6 {op}: {message}"):
            f(*inputs[:4], u, inputs[5])


def test_versions_5_and_6_share_their_operators(capsys):
    """The table and the choice among its rows."""
    assert {*WKV["x060"]} == {*wkv7_cuda.OPS["wkv6"], "torch"}
    assert {*WKV["x070"]} == {*wkv7_cuda.OPS["wkv7"], "torch"}
    for op in ("cpu", "chunk", "torch"):
        assert load_wkv("x060", 64, op, "cpu") is load_wkv("x052", 64, op, "cpu") is not load_wkv("x070", 64, op, "cpu")
    assert load_wkv("x052", 64, "", "cpu") is wkv7_cuda.load("cpu", "wkv6")
    assert load_wkv("x052", 32, "", "cpu") is wkv7_cuda.load("chunk", "wkv6")
    assert load_wkv("x060", 64, "torch", "cpu") is wkv6_ref
