"""ZeroAdamW against torch.optim.AdamW, one tensor at a time; the learning rate against values worked out by hand."""

import pytest
import torch
from torch import nn

import pissa_rwkv as P
from pissa_rwkv import Config, Fatal, ZeroAdamW, check, lr_at

SHAPES = {"a.lora_A": (3, 5), "ln.weight": (5,), "b.weight": (2, 3), "att.time_decay": (4, 2), "x_r": (1, 1, 6),
          "att.w0": (7,), "att.a0": (3,), "time_decay_w1": (4, 3)}
DECAYED = ("a.lora_A", "b.weight")  # the matrices that a linear map multiplies with


def parameters(dtype=torch.float32):
    draw = torch.Generator().manual_seed(0)
    return {name: nn.Parameter(torch.randn(s, generator=draw).to(dtype)) for name, s in SHAPES.items()}


def gradients(steps, dtype=torch.float32):
    """What each parameter's gradient is at each step: their sizes vary, so that clipping sometimes acts."""
    draw = torch.Generator().manual_seed(1)
    return [{name: (torch.randn(s, generator=draw) * 0.3 * (1 + t % 3)).to(dtype) for name, s in SHAPES.items()}
            for t in range(steps)]


def backward(parameters, wanted):
    """Gives the parameters these gradients, by autograd."""
    sum((p * wanted[name]).sum() for name, p in parameters.items()).backward()


def peer(parameters, cfg, scales=None):
    """torch's AdamW, each parameter a group of its own."""
    scales = scales or {}
    groups = [dict(params=[p], scale=scales.get(name, 1.0), weight_decay=cfg.weight_decay if name in DECAYED else 0.0)
              for name, p in parameters.items()]
    return torch.optim.AdamW(groups, betas=(cfg.beta1, cfg.beta2), eps=cfg.adam_eps, foreach=False, fused=False)


def peer_step(optimiser, lr):
    for group in optimiser.param_groups:
        group["lr"] = lr * group["scale"]
    optimiser.step()
    optimiser.zero_grad()


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_twenty_steps_are_torchs_to_the_bit(weight_decay):
    cfg = Config(weight_decay=weight_decay, layerwise_lr=False)
    mine, theirs = parameters(), parameters()
    optimiser, oracle = ZeroAdamW(mine.items(), cfg), peer(theirs, cfg)
    for step, wanted in enumerate(gradients(20)):
        backward(mine, wanted)
        backward(theirs, wanted)
        optimiser.reduce()
        optimiser.step(1e-2 / (1 + step), 1.0)
        peer_step(oracle, 1e-2 / (1 + step))
        assert all(torch.equal(p, theirs[name]) for name, p in mine.items()), step


def test_clipping_is_torchs():
    """The two clip factors differ by roundings of float32 (torch takes a norm of norms): so may the result."""
    cfg, clipped = Config(weight_decay=0.1, layerwise_lr=False, grad_clip=1.0), 0
    mine, theirs = parameters(), parameters()
    optimiser, oracle = ZeroAdamW(mine.items(), cfg), peer(theirs, cfg)
    for wanted in gradients(20):
        wanted = {name: g * 0.3 for name, g in wanted.items()}
        backward(mine, wanted)
        backward(theirs, wanted)
        norm = nn.utils.clip_grad_norm_(theirs.values(), cfg.grad_clip, foreach=False)
        found = optimiser.reduce()
        assert found == pytest.approx(norm.item(), rel=1e-6)
        clipped += norm.item() > cfg.grad_clip
        optimiser.step(1e-2, min(1.0, cfg.grad_clip / (found + 1e-6)))
        peer_step(oracle, 1e-2)
        for name, p in mine.items():
            torch.testing.assert_close(p, theirs[name], rtol=2**-22, atol=2**-22)
    assert 0 < clipped < 20


@pytest.mark.parametrize("layerwise_lr", [True, False])
def test_layerwise_learning_rates_and_decay_are_by_name_and_shape(layerwise_lr):
    cfg = Config(weight_decay=0.1, layerwise_lr=layerwise_lr)
    mine, theirs = parameters(), parameters()
    scales = {"att.time_decay": 2.0, "att.w0": 2.0} if layerwise_lr else {}
    optimiser, oracle = ZeroAdamW(mine.items(), cfg), peer(theirs, cfg, scales)
    for wanted in gradients(5):
        backward(mine, wanted)
        backward(theirs, wanted)
        optimiser.reduce()
        optimiser.step(1e-2, 1.0)
        peer_step(oracle, 1e-2)
    assert all(torch.equal(p, theirs[name]) for name, p in mine.items())


@pytest.mark.parametrize("rank, dtype", [(0, torch.float32), (1, torch.float32), (1, torch.bfloat16)])
def test_only_rank_0_has_masters_though_all_ranks_hold_them(rank, dtype):
    """As plain data parallel does: or all ranks would write the files."""
    optimiser = ZeroAdamW(parameters(dtype).items(), Config(), ranks=P.Unheard(rank, 2), stage=0)
    assert optimiser.masters().keys() == (SHAPES.keys() if rank == 0 else set())


def test_bf16_parameters_are_roundings_of_fp32_masters_that_move_at_a_small_learning_rate():
    cfg = Config(weight_decay=0.1, layerwise_lr=False)
    mine = parameters(torch.bfloat16)
    start = {name: p.detach().clone() for name, p in mine.items()}
    theirs = {name: nn.Parameter(p.detach().float()) for name, p in mine.items()}
    optimiser, oracle = ZeroAdamW(mine.items(), cfg), peer(theirs, cfg)
    for wanted in gradients(20, torch.bfloat16):
        backward(mine, wanted)
        backward(theirs, {name: g.float() for name, g in wanted.items()})
        optimiser.reduce()
        optimiser.step(2e-5, 1.0)
        peer_step(oracle, 2e-5)
    for name, master in optimiser.masters().items():
        assert master.dtype == torch.float32 and mine[name].dtype == torch.bfloat16
        assert torch.equal(master, theirs[name]) and torch.equal(mine[name], master.bfloat16())
        assert (master != start[name].float()).all()
    # Rounded after every step, most would not have moved: 20 steps of 2e-5 are less than half of bf16's spacing at 1.
    stuck = sum((mine[name] == p).sum().item() for name, p in start.items())
    assert stuck > sum(p.numel() for p in start.values()) / 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_are_accumulated_in_fp32_and_freed(dtype):
    p = nn.Parameter(torch.ones(2, 2, dtype=dtype))
    optimiser = ZeroAdamW([("p", p)], Config(accumulate_grad_batches=3))
    for gradient in (1.0, 2.0**-12, 2.0**-12):  # bf16 has no 1 + 2^-12
        (p * gradient).sum().backward()
        assert p.grad is None or p.grad.data_ptr() == optimiser.grad.data_ptr()  # (in fp32: where it is added up)
    assert torch.equal(optimiser.grad, torch.full((4,), 1 + 2.0**-11))
    optimiser.reduce()
    optimiser.step(1e-3, 1.0)
    assert not optimiser.grad.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_gradient_alone_is_kept_as_it_came_and_parts_change_nothing(dtype, monkeypatch):
    """16 bytes a bf16 number instead of 18, and the same bits after three steps, in parts of 7 numbers too."""
    results, steps = [], gradients(3, dtype)
    for accumulate, part in ((1, 2**18), (2, 2**18), (1, 7)):
        monkeypatch.setitem(ZeroAdamW.PART, "cpu", part)
        optimiser = ZeroAdamW(
            (ps := parameters(dtype)).items(), Config(weight_decay=0.1, accumulate_grad_batches=accumulate))
        assert optimiser.grad.dtype == (dtype if accumulate == 1 else torch.float32)
        for wanted in steps:
            backward(ps, wanted)
            norm = optimiser.reduce()
            optimiser.step(1e-2, 0.3)
        results.append((norm, optimiser.state()))
    for norm, state in results[1:]:
        assert norm == pytest.approx(results[0][0], rel=1e-14)
        assert all(torch.equal(state[name], value) for name, value in results[0][1].items())


def test_micro_batches_are_one_step_with_the_summed_gradient():
    mine, theirs, cfg = parameters(), parameters(), Config(accumulate_grad_batches=2)
    optimiser, whole = ZeroAdamW(mine.items(), cfg), ZeroAdamW(theirs.items(), cfg)
    first, second = gradients(2)
    backward(mine, first)
    backward(mine, second)
    backward(theirs, {name: first[name] + second[name] for name in first})
    optimiser.reduce()
    optimiser.step(1e-2, 0.5)
    whole.reduce()
    whole.step(1e-2, 0.5)
    assert all(torch.equal(p, theirs[name]) for name, p in mine.items())


@pytest.mark.parametrize("moments", P.MOMENTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_loaded_state_goes_on_to_the_bit(dtype, moments):
    steps, cfg = gradients(6, dtype), Config(weight_decay=0.1, moments=moments)
    whole = parameters(dtype)
    optimiser = ZeroAdamW(whole.items(), cfg)
    for step, wanted in enumerate(steps):
        if step == 3:
            state = {name: t.clone() for name, t in optimiser.state().items()}
        backward(whole, wanted)
        optimiser.reduce()
        optimiser.step(1e-3, 1.0)
    resumed = {name: nn.Parameter(torch.zeros_like(p)) for name, p in whole.items()}
    again = ZeroAdamW(resumed.items(), cfg)
    again.load(state)
    for wanted in steps[3:]:
        backward(resumed, wanted)
        again.reduce()
        again.step(1e-3, 1.0)
    assert all(torch.equal(again.state()[name], t) for name, t in optimiser.state().items())
    assert all(torch.equal(p, whole[name]) for name, p in resumed.items())


def test_low_bits_lose_no_bit_of_a_master_weight():
    """Of all sizes, ties and the largest; and the high bits are torch's rounding, but at ties, which they round up."""
    draw = torch.Generator().manual_seed(0)
    bits = torch.randint(-2**31, 2**31, (2**16,), generator=draw).to(torch.int32)
    ties = bits[: 2**12].bitwise_and(-2**16) + 2**15
    x = torch.cat([bits, ties]).view(torch.float32)
    x = torch.cat([x[x.isfinite()], torch.tensor([0.0, -0.0, 1.0, -1.0, 1e-45, 3.4028234e38])])
    own = torch.empty(len(x), dtype=torch.bfloat16)
    master, part = P.LowBits(own), slice(0, len(x))
    master.write(part, x)
    assert torch.equal(master.read(part).view(torch.int32), x.view(torch.int32))
    tie = x.view(torch.int32) & 0xffff == 2**15
    assert torch.equal(own[~tie], x[~tie].bfloat16()) and tie.sum() > 2**11
    assert (own[tie].float().abs() > x[tie].abs()).all()


def test_levels_of_8_bits():
    signed, above = (kind(torch.empty(256)).levels for kind in (P.CodedNumbers, P.CodedSquares))
    assert (len(signed), len(above)) == (256, 255) and above.min() > 0
    assert all((levels.diff() > 0).all() for levels in (signed, above))
    assert {-1.0, 0.0, 1.0} <= set(signed.tolist()) and above[-1] == 1


def coded(kind, x):
    numbers = kind(torch.empty(len(x)))
    numbers.write(slice(0, len(x)), x)
    return numbers.read(slice(0, len(x)))


@pytest.mark.parametrize("kind", [P.CodedNumbers, P.CodedSquares])
def test_what_is_held_in_8_bits_is_held_as_the_same_again(kind):
    """So that a resumed run, whose file has the numbers in fp32, has the very codes of the one that stopped."""
    x = torch.randn(8, 256, generator=torch.Generator().manual_seed(0)) * 10.0 ** -torch.arange(8)[:, None]
    x[1], x[2, ::2], x[0, 0] = 0, 0, -9                               # nothing; half of it nothing; negative, and large
    x = (x.square() if kind is P.CodedSquares else x).flatten()
    assert not kind(x).read(slice(0, len(x))).any()                   # it begins at 0
    held = coded(kind, x)
    assert torch.equal(coded(kind, held), held)
    assert torch.equal(held.abs().view(8, 256).amax(1), x.abs().view(8, 256).amax(1))
    assert not held[x == 0].any() if kind is P.CodedNumbers else (held >= 0).all() and held[512: 768].all()


def test_8_bits_lose_no_more_than_bitsandbytes():
    """Its codes, of the same 256 numbers each, of either sign and of none."""
    functional = pytest.importorskip("bitsandbytes.functional")
    x = torch.randn(512 * 256, generator=torch.Generator().manual_seed(0)) * 1e-3
    for kind, numbers, signed in ((P.CodedNumbers, x, True), (P.CodedSquares, x.square(), False)):
        code = functional.create_dynamic_map(signed=signed)
        theirs = functional.dequantize_blockwise(*functional.quantize_blockwise(numbers, code=code, blocksize=256))
        error, their_error = ((found - numbers).abs().mean() for found in (coded(kind, numbers), theirs))
        assert error < 1.02 * their_error, (kind, error / their_error)


def test_with_moments_of_8_bits_it_goes_nearly_where_it_went():
    """Where a gradient is never but 0, nothing moves, whatever stands in its block."""
    ends = {}
    for moments in P.MOMENTS:
        mine = {name: nn.Parameter(p.detach().repeat(*[40] * p.dim())) for name, p in parameters().items()}
        begun = {name: p.detach().clone() for name, p in mine.items()}
        optimiser = ZeroAdamW(mine.items(), Config(moments=moments))
        draw = torch.Generator().manual_seed(2)
        for _ in range(50):
            wanted = {name: 0.3 + torch.randn(p.shape, generator=draw) for name, p in mine.items()}
            wanted["a.lora_A"][:, ::2] = 0
            backward(mine, wanted)
            optimiser.reduce()
            optimiser.step(1e-2, 1.0)
        assert torch.equal(mine["a.lora_A"][:, ::2], begun["a.lora_A"][:, ::2])
        ends[moments] = torch.cat([(p.detach() - begun[name]).flatten() for name, p in mine.items()])
        numbers, held = optimiser.numbers, sum(t.nbytes for t in (*optimiser.m.tensors(), *optimiser.v.tensors()))
        assert held == pytest.approx({"fp32": 8, "8bit": 2 + 8 / 256}[moments] * numbers, rel=0.01)
    assert (ends["8bit"] - ends["fp32"]).norm() < 0.03 * ends["fp32"].norm()


def test_nothing_to_train_is_an_error():
    with pytest.raises(Fatal, match="nothing is trained"):
        ZeroAdamW([], Config())


# ---------------------------------------------------------------------------------------------------- the learning rate


def rates(steps, **options):
    return [lr_at(step, steps, Config(**options)) for step in range(steps)]


@pytest.mark.parametrize("schedule", ["cos_decay", "cos", "wsd"])
@pytest.mark.parametrize("lr_final", [1e-5, 4e-4])  # the second: as lr_init
def test_warm_up_is_linear_whatever_the_schedule(schedule, lr_final):
    found = rates(20, lr_schedule=schedule, lr_init=4e-4, lr_final=lr_final, warmup_steps=4)
    assert found[:5] == pytest.approx([1e-4, 2e-4, 3e-4, 4e-4, 4e-4], rel=1e-12)
    assert found[-1] == pytest.approx(lr_final, rel=1e-12)
    if lr_final == 4e-4:
        assert found[4:] == pytest.approx([4e-4] * 16, rel=1e-12)


@pytest.mark.parametrize("warmup_steps", [0, 5])
def test_cosine_is_torchs_from_the_first_to_the_last_step(warmup_steps):
    found = rates(36, lr_init=3e-4, lr_final=1e-5, warmup_steps=warmup_steps)[warmup_steps:]
    oracle = torch.optim.SGD([torch.zeros(1)], lr=3e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(oracle, T_max=35 - warmup_steps, eta_min=1e-5)
    wanted = []
    for _ in found:
        wanted.append(schedule.get_last_lr()[0])
        oracle.step()
        schedule.step()
    assert found == pytest.approx(wanted, rel=1e-9)
    assert (found[0], found[-1]) == pytest.approx((3e-4, 1e-5), rel=1e-12)


def test_wsd_is_constant_and_then_linear_over_the_last_part():
    options = dict(lr_schedule="wsd", lr_init=5.0, lr_final=1.0, decay_frac=0.4)
    for warmup_steps in (0, 1, 4):                                    # the share is the run's, also with warm-up
        found = rates(11, warmup_steps=warmup_steps, **options)
        assert found[warmup_steps:] == pytest.approx([5, 5, 5, 5, 5, 5, 5, 4, 3, 2, 1][warmup_steps:])  # 4 of 10 fall
    assert rates(11, warmup_steps=8, **options)[7:] == pytest.approx([5, 5, 3, 1])  # where no more is left


@pytest.mark.parametrize("schedule", ["cos_decay", "wsd"])
def test_the_rate_stays_between_its_ends_and_ends_where_it_should(schedule):
    for steps, warmup_steps in ((1, 0), (2, 0), (2, 1), (3, 3), (3, 10), (50, 7)):
        options = dict(lr_schedule=schedule, lr_init=1.0, lr_final=0.1, warmup_steps=warmup_steps)
        found = rates(steps, **options)
        assert all(0 < lr <= 1 for lr in found) and (warmup_steps > 0 or found[0] == 1)
        assert lr_at(steps + 10, steps, Config(**options)) == pytest.approx(0.1)  # a run that is longer than was said


@pytest.mark.parametrize("decay_frac", [0.0, -0.5, 1.5])
def test_a_share_that_is_none_is_refused(decay_frac):
    with pytest.raises(Fatal, match="decay_frac"):
        check(Config(peft="none", lr_schedule="wsd", decay_frac=decay_frac))
