"""Codes against bitsandbytes; what a quantised matrix costs in bytes and error; runs on quantised bases, to the end."""

import json
import math
import re
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import load_model, logits_of, random_tensors

import merge as command
import pissa_rwkv as P

bnb = pytest.importorskip("bitsandbytes.functional")

CODED = ("int8", "nf4", "nf4dq")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_code = pytest.mark.parametrize("quant", CODED)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def share(difference, W):
    return (difference.norm() / W.norm()).item()


def half_zero(W):
    W.view(-1)[W.numel() // 2:] = 0
    return W


SHAPES = [(1, 1), (3, 5), (7, 9), (33, 65), (64, 64), (130, 127)]  # (odd numbers of weights, unfinished blocks)
KINDS = {
    "normal": normal, "constant": lambda *s: torch.full(s, -0.3), "zero": torch.zeros,
    "half zero": lambda *s: half_zero(normal(*s)), "tiny": lambda *s: 1e-6 * normal(*s),
    "huge": lambda *s: 1e4 * normal(*s), "uniform": lambda *s: normal(*s).sigmoid(),
    "a large row": lambda *s: normal(*s).index_fill(0, torch.tensor([0]), 30.0),
}  # fmt: skip
each_kind = pytest.mark.parametrize("kind", KINDS)


def of_bnb(state, codes):
    """bitsandbytes' codes and scales, called as ours."""
    parts = {"codes": codes.view(-1)}
    if not state.nested:
        return "nf4", parts | {"absmax": state.absmax}
    return "nf4dq", parts | {"absmax_codes": state.absmax, "absmax_max": state.state2.absmax, "offset": state.offset}


# ------------------------------------------------------------------------------------------------ codes of bitsandbytes


@each_dtype
@each_kind
def test_bitsandbytes_codes_are_read_to_the_bit(kind, dtype):
    for shape in SHAPES:
        W = KINDS[kind](*shape).to(dtype)
        for double in (False, True):
            codes, state = bnb.quantize_4bit(W, quant_type="nf4", compress_statistics=double)
            quant, parts = of_bnb(state, codes)
            found = P.QUANT[quant].read(parts, W.shape, dtype)
            assert found.dtype == dtype and torch.equal(found, bnb.dequantize_4bit(codes, state)), (shape, double)


@each_dtype
@each_kind
def test_ours_are_the_codes_of_bitsandbytes(kind, dtype):
    for shape in SHAPES:
        W = KINDS[kind](*shape).to(dtype)
        codes, state = bnb.quantize_4bit(W, quant_type="nf4")
        parts = P.QUANT["nf4"].hold(W.float(), dtype)
        assert torch.equal(parts["codes"], codes.view(-1)), shape
        # (for an unfinished block of zeros bitsandbytes has an absmax of 1e-38)
        assert torch.equal(parts["absmax"], torch.where(state.absmax < 1e-37, 0, state.absmax)), shape


def test_of_four_million_codes_few_differ_and_only_at_midpoints():
    levels = torch.tensor(P.NF4)
    different = 0
    for seed, dtype in enumerate(DTYPES * 2):
        W = normal(1024, 1024, seed=seed).to(dtype)
        ours, theirs = P.QUANT["nf4"].hold(W.float(), dtype), bnb.quantize_4bit(W, quant_type="nf4")[0].view(-1)
        at = (ours["codes"] != theirs).nonzero().view(-1)
        x = (P.in_blocks(W.float(), 64) / ours["absmax"][:, None]).view(-1, 2)[at]
        midpoints = (levels[1:] + levels[:-1]) / 2
        assert ((x[..., None] - midpoints).abs().amin(-1).amin(-1) < 1e-6).all()
        different += len(at)
    assert different <= 6


def test_the_dynamic_code_is_bitsandbytes_and_ours_is_never_the_worse_choice():
    assert torch.equal(P.dynamic_levels(torch.device("cpu")), bnb.create_dynamic_map())
    absmax = normal(40, 256).abs()
    codes, state = bnb.quantize_blockwise(absmax, blocksize=256)
    levels = P.dynamic_levels(absmax.device)
    ours = levels[P.nearest_level(absmax, state.absmax, levels)] * state.absmax[:, None]
    theirs = bnb.dequantize_blockwise(codes, state)
    assert ((ours - absmax).abs() <= (theirs - absmax).abs() + 1e-7).all()


def test_error_of_int8_below_that_of_bitsandbytes_8_bit_code_unless_outliers_are_extreme(record_property):
    """At the same block of 64. Eight columns of 1024 are larger than the others by a factor."""
    for factor in (1, 3, 5, 10, 20):
        W = normal(512, 1024)
        W[:, 5::128] *= factor
        ours = share(P.QUANT["int8"].through(W, torch.float32) - W, W)
        theirs = share(bnb.dequantize_blockwise(*bnb.quantize_blockwise(W, blocksize=64)) - W, W)
        print(f"outliers x{factor}: int8 {ours:.5f}, dynamic {theirs:.5f}")
        record_property(f"x{factor}", (ours, theirs))
        assert ours < theirs or factor >= 10


# ------------------------------------------------------------------------------------------------- the formats by hand


def test_nf4_by_hand():
    W = torch.zeros(1, 67)
    W[0, :4], W[0, 64:] = torch.tensor([2.0, -2.0, 0.161, 0.158]), torch.tensor([0.5, 0.0, 0.1])
    parts = P.QUANT["nf4"].hold(W, torch.float32)
    assert parts["absmax"].tolist() == [2.0, 0.5] and parts["absmax"].dtype == torch.float32
    assert [f"{byte:02x}" for byte in parts["codes"].tolist()] == ["f0", "88"] + ["77"] * 30 + ["f7", "97"]
    dense = P.QUANT["nf4"].read(parts, W.shape, torch.float32)[0]
    assert dense[:5].tolist() == [2.0, -2.0, 2 * P.NF4[8], 2 * P.NF4[8], 0.0]
    assert dense[64:].tolist() == [0.5, 0.0, 0.5 * P.NF4[9]]


def test_int8_by_hand():
    W = torch.zeros(1, 66)
    W[0, :4], W[0, 64] = torch.tensor([127.0, -127.0, 2.5, -0.6]), -12.7
    parts = P.QUANT["int8"].hold(W, torch.float32)
    assert parts["scale"].dtype == torch.float16 and parts["scale"].tolist() == [1.0, torch.tensor(0.1).half().item()]
    assert parts["codes"].tolist() == [127, -127, 2, -1] + [0] * 60 + [-127, 0]
    assert P.QUANT["int8"].read(parts, W.shape, torch.float32)[0, :5].tolist() == [127.0, -127.0, 2.0, -1.0, 0.0]


@each_code
@pytest.mark.parametrize("shape", [(64, 64), (33, 7)])
def test_what_a_code_can_say_it_says_exactly(quant, shape):
    """Once coded and read, a matrix comes back as it is. (Not so with double quantisation: its absmax is rounded.)"""
    once = P.QUANT[quant].through(normal(*shape), torch.float32)
    again = P.QUANT[quant].through(once, torch.float32)
    assert share(again - once, once) <= {"int8": 3e-4, "nf4": 0, "nf4dq": 2e-2}[quant]


@each_code
@each_kind
def test_no_weight_is_further_off_than_half_a_step(quant, kind):
    for shape in SHAPES:
        W = KINDS[kind](*shape)
        largest = P.in_blocks(W, 64).abs().amax(1).repeat_interleave(64)[:W.numel()].view(shape)
        # half the widest gap of nf4 is 0.152; of int8 1/254, and its scale is fp16: 2^-11, or a fixed step below 6e-5
        bound = {"int8": 5e-3 * largest + 4e-6, "nf4": 0.153 * largest, "nf4dq": 0.3 * largest.amax()}[quant]
        assert ((P.QUANT[quant].through(W, torch.float32) - W).abs() <= bound).all(), shape


@pytest.mark.parametrize("quant, size", [("none", 2.0), ("int8", 1 + 2 / 64), ("nf4", 0.5 + 4 / 64),
                                         ("nf4dq", 0.5 + 1 / 64 + 4 / 64 / 256)])
def test_bytes_per_weight(quant, size):
    parts = P.QUANT[quant].hold(normal(256, 512), torch.bfloat16)
    assert sum(t.nbytes for t in parts.values()) == 256 * 512 * size + 4 * (quant == "nf4dq")


@each_code
@each_dtype
def test_reading_rounds_once_to_the_compute_dtype(quant, dtype):
    W = normal(96, 70)
    exact = P.QUANT[quant].through(W, torch.float32)
    assert torch.equal(P.QUANT[quant].through(W, dtype), exact.to(dtype))


# ---------------------------------------------------------------------------------------------------- what is kept


@pytest.mark.parametrize("quant", P.QUANT)
def test_a_frozen_matrix_is_kept_as_codes_and_made_again_in_backward(quant):
    """Peak counts live bytes: between forward and backward there are the codes and y, no dense matrix and no x."""
    frozen, x = P.FrozenLinear(normal(512, 384), torch.bfloat16, quant), normal(5, 384).bfloat16().requires_grad_()
    assert not [*frozen.parameters()] and sum(b.nbytes for b in frozen.buffers()) <= 512 * 384 * 2
    kept, dense = [], frozen.weight.clone()                           # (and tables of levels are made once)
    peak = P.Peak("cpu", frozen.buffers())
    with peak, torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = frozen(x * 1)
        assert not kept and peak.live <= y.nbytes + 8
        assert peak.most < 1.6 * dense.nbytes or quant == "none"
        dx, = torch.autograd.grad(y.square().sum(), x)
    assert torch.equal(y, F.linear(x, dense)) and torch.equal(dx, 2 * y @ dense)


def file_and_tensors(tmp_path, **sizes):
    torch.save(random_tensors(**sizes), tmp_path / "base.pth")
    return str(tmp_path / "base.pth"), P.read_pth(tmp_path / "base.pth", "")


@pytest.mark.parametrize("options", [dict(), dict(svd_niter=0), dict(peft="lora"), dict(qpissa_iters=3)], ids=str)
@pytest.mark.parametrize("quant", P.QUANT)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_loading_takes_what_stays_and_four_copies_of_the_largest_matrix(dtype, quant, options, tmp_path):
    if quant == "none" and "qpissa_iters" in options:
        options = {}
    path, tensors = file_and_tensors(tmp_path, n_layer=3, n_embd=256, dtype=torch.bfloat16)
    with torch.device("meta"):
        model = P.RWKV(P.detect(tensors, path), P.wkv7_ref)
    cfg, largest = P.Config(**dict(rank=4, quant=quant) | options), 4 * 256 * 1024
    with P.Peak("cpu", tensors.values()) as peak:
        P.fill(model, tensors, path, "cpu", dtype, P.adapted(model))
        taken = P.add_adapters(model, cfg, {}, {})
    held = sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
    assert peak.live <= held + sum(t.nbytes for t in taken.values()) + 2**16
    assert peak.most <= peak.live + 4 * largest
    assert not any(p.is_meta or p.untyped_storage().nbytes() > p.nbytes for p in model.parameters())


# ------------------------------------------------------------------------------------------------------------- QPiSSA


def shaped(rows, columns, decay, seed=0):
    """Singular values 1, 2^-decay, 3^-decay, ..."""
    U, V = (torch.linalg.qr(normal(n, n, seed=seed + i)).Q for i, n in enumerate((rows, columns)))
    k = min(rows, columns)
    return U[:, :k] * torch.arange(1, k + 1.0).pow(-decay) @ V[:k]


def started(W, **options):
    """A0, B0, A, B of a start, and what its residual is read as."""
    cfg = P.Config(**dict(quant="nf4", svd_niter=0, rank=16) | options)
    start = P.new_start(W, W.dtype, cfg, torch.Generator().manual_seed(0))
    factors = [x[name] for x in start for name in ("lora_A", "lora_B")]
    return factors, P.QUANT[cfg.quant].through(residual(W, *factors[:2]), W.dtype)


def residual(W, A, B):
    return P.PiSSALinear.residual(W, {"lora_A": A, "lora_B": B})


@pytest.mark.parametrize("quant", ["nf4", "nf4dq"])
@pytest.mark.parametrize("decay", [None, 0.3, 0.5, 0.8])
@pytest.mark.parametrize("rank", [4, 16, 64])
def test_quantised_without_its_main_part_a_matrix_loses_less(decay, rank, quant):
    """Quantising errs by a share of what is quantised: the error is nf4's times sqrt(1 - E_r), E_r the energy of the
    top r singular values."""
    W = normal(256, 384) if decay is None else shaped(256, 384, decay)
    energy = torch.linalg.svdvals(W).square()
    (A0, B0, A, B), held = started(W, rank=rank, quant=quant)
    assert A is A0 and B is B0
    plain = (W - P.QUANT[quant].through(W, W.dtype)).norm()
    wanted = plain * (energy[rank:].sum() / energy.sum()).sqrt()
    torch.testing.assert_close((W - held - B @ A).norm(), wanted, rtol=0.03, atol=0)


def test_the_residual_does_not_depend_on_the_order_of_summing():
    """So another device, another number of threads, finds the same codes. (A product in fp32 would not.)"""
    W, A0, B0, order = normal(300, 400), normal(16, 400, seed=1), normal(300, 16, seed=2), torch.arange(16).flip(0)
    assert torch.equal(residual(W, A0, B0), residual(W, A0[order], B0[:, order]))
    assert not torch.equal(W - B0 @ A0, W - B0[:, order] @ A0[order])


@pytest.mark.parametrize("T", [2, 3, 5])
def test_the_refit_is_the_best_there_is_for_its_codes(T):
    """B A is the main part of W - W_res; the codes are those of W without the factors of one iteration before."""
    W = shaped(96, 128, 0.5)
    (A0, B0, A, B), held = started(W, rank=8, qpissa_iters=T)
    torch.testing.assert_close((W - held - B @ A).norm(), torch.linalg.svdvals(W - held)[8:].norm(), rtol=1e-5, atol=0)
    (_, _, *before), _ = started(W, rank=8, qpissa_iters=T - 1)
    assert torch.equal(A0, before[0]) and torch.equal(B0, before[1]) and not torch.equal(A, A0)


def test_more_iterations_err_less():
    W, errors = shaped(96, 128, 0.5), []
    for T in range(1, 6):
        (_, _, A, B), held = started(W, rank=8, qpissa_iters=T)
        errors.append((W - held - B @ A).norm().item())
    assert errors == sorted(errors, reverse=True) and errors[4] < 0.9 * errors[0]


# --------------------------------------------------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A base that has learnt one family of questions: trained/rwkv-0.pth."""
    folder = tmp_path_factory.mktemp("quant")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    options = ("--peft none --n_layer 2 --n_embd 64 --vocab_size 128 --data_type dummy --data_file base --ctx_len 64"
               " --micro_bsz 16 --epoch_steps 80 --warmup_steps 5 --lr_init 4e-3 --lr_final 4e-4 --grad_cp 0")
    options += f" --op chunk --accelerator cpu --proj_dir {folder}/trained"
    assert P.main(options.split()) == 0
    yield folder
    torch.set_num_threads(threads)


def finished(place, name, **options):
    """A run of a few steps on that base, and its files."""
    options = dict(epoch_steps=8) | options
    cfg = P.Config(load_model=str(place / "trained" / "rwkv-0.pth"), data_type="dummy", data_file="shift", ctx_len=64,
                   micro_bsz=16, op="chunk", grad_cp="0", lr_init=3e-3, lr_final=3e-4, lora_alpha=8.0, rank=8,
                   accelerator="cpu", proj_dir=str(place / name), **options)
    run = P.build(cfg)
    P.train(run)
    folder = place / name
    losses = [json.loads(line)["loss"] for line in (folder / "loss_data.jsonl").read_text().splitlines()]
    return SimpleNamespace(model=run.model.eval(), folder=folder, losses=losses, base=cfg.load_model, kind=cfg.peft,
                           init=folder / "init_pissa.pth", checkpoint=folder / "rwkv-0.pth", quant=cfg.quant)


def merged(run, output="merged.pth", *more):
    line = ["--type", run.kind, "--base_model", run.base, "--lora_init", str(run.init), "--lora_checkpoint",
            str(run.checkpoint), "--output", str(run.folder / output), *more]
    assert command.main(line) == 0
    return run.folder / output


@pytest.fixture(scope="module")
def unquantised(place):
    return {peft: finished(place, f"{peft}-none", peft=peft, epoch_steps=30) for peft in ("pissa", "lora")}


RUNS = [(peft, quant, 1) for peft in ("pissa", "lora") for quant in CODED] + [("pissa", "nf4", 5)]
TOKENS = list(b"User: 3 + 4?\n\nAssistant:")


@pytest.mark.parametrize("peft, quant, T", RUNS)
def test_a_quantised_run_learns_as_well_and_merged_is_adapted(peft, quant, T, place, unquantised, capsys):
    run = finished(place, f"{peft}-{quant}-{T}", peft=peft, quant=quant, qpissa_iters=T, epoch_steps=30)
    said, wanted = capsys.readouterr().out, unquantised[peft].losses
    assert sum(run.losses[-10:]) == pytest.approx(sum(wanted[-10:]), rel=0.02) and run.losses[-1] < 0.75 * run.losses[0]
    # the start is what the log says it is
    base, adapted = map(float, re.search(r"first batch: base ([\d.]+), with adapters ([\d.]+)", said).groups())
    assert adapted == pytest.approx(base, rel=0.1) and run.losses[0] == pytest.approx(adapted, abs=1e-5)
    for ours, plain in re.findall(r"(?:att|ffn)\.\w+ (\S+) \((\S+)\)", said):
        assert 0 < float(ours) < float(plain) if peft == "pissa" else ours == plain
    # decomposed at full precision, before anything is quantised
    init, about = P.read_described(run.init, "") if peft == "pissa" else ({}, {})
    if peft == "pissa" and T == 1:
        full, _ = P.read_described(unquantised[peft].init, "")
        assert init.keys() == full.keys() and all(torch.equal(t, full[name]) for name, t in init.items())
    assert any("start_lora" in name for name in init) == (T > 1)
    # and at the end
    logits, _ = logits_of(run.model, TOKENS)
    again, _ = logits_of(load_model(merged(run)), TOKENS)
    other, _ = logits_of(load_model(merged(unquantised[peft], f"{quant}-{T}.pth")), TOKENS)
    assert (again - logits).abs().max() <= 2e-5 * logits.abs().max() < 2e-2 * (other - logits).abs().max()


@each_code
@pytest.mark.parametrize("peft", ["pissa", "lora"])
def test_merging_meets_the_matrix_that_was_trained_on(peft, quant, place):
    """In bf16, to the bit: merged is the frozen matrix, as training read it, plus B A, rounded once."""
    run = finished(place, f"exact-{peft}-{quant}", peft=peft, quant=quant, precision="bf16", epoch_steps=2)
    trained, _ = P.read_described(run.checkpoint, "")
    found = torch.load(merged(run), weights_only=True)
    for name, adapter in ((n, m) for n, m in run.model.named_modules() if isinstance(m, P.LowRank)):
        A, B = (trained[f"{name}.lora_{x}"] for x in "AB")
        wanted = adapter.frozen.weight.float() + adapter.scale * (B @ A)
        assert adapter.frozen.weight.dtype == torch.bfloat16 and torch.equal(found[f"{name}.weight"], wanted), name


def test_a_start_with_refit_goes_on_from_its_files(place):
    """Taken out of W is init_lora, wherever training started: a run that loads both files has the same W_res."""
    run = finished(place, "refit", quant="nf4", qpissa_iters=3)
    again = P.build(P.Config(load_model=run.base, data_type="dummy", data_file="shift", ctx_len=64, op="chunk", rank=8,
                             accelerator="cpu", quant="nf4", adapter_load=str(run.checkpoint),
                             adapter_init=str(run.init), proj_dir=str(place / "on")))
    assert torch.equal(logits_of(again.model.eval(), TOKENS)[0], logits_of(run.model, TOKENS)[0])
    first, second = (P.read_described(f, "")[0] for f in (run.init, place / "on" / "init_pissa.pth"))
    assert first.keys() == second.keys() and all(torch.equal(t, second[name]) for name, t in first.items())


def undescribed(run):
    """The files as RWKV-PEFT writes them."""
    for path in (run.init, run.checkpoint):
        tensors, _ = P.read_described(path, "")
        torch.save({f"model.{n}" if path == run.init else n: t.clone() for n, t in tensors.items()}, path)
    return run


@pytest.mark.parametrize("quant", ["none", "nf4", "nf4dq"])           # (int8 is another story: the next test)
def test_of_files_without_description_the_flag_says_how_the_base_was_held(quant, place):
    run = finished(place, f"peft-{quant}", quant=quant, precision="bf16", epoch_steps=2)
    known = torch.load(merged(run), weights_only=True)
    said = torch.load(merged(undescribed(run), "said.pth", "--quant", quant), weights_only=True)
    assert all(torch.equal(t, said[name]) for name, t in known.items())


def test_a_checkpoint_that_others_saved_again_is_still_of_the_base_that_its_init_tells(place):
    run = finished(place, "again", quant="int8", precision="bf16", epoch_steps=2)
    known = torch.load(merged(run), weights_only=True)
    torch.save(torch.load(run.checkpoint, weights_only=True), run.checkpoint)
    for name, options in (("again.pth", ()), ("said-again.pth", ("--quant", "int8"))):
        again = torch.load(merged(run, name, *options), weights_only=True)
        assert all(torch.equal(t, again[n]) for n, t in known.items())


def test_the_int8_of_rwkv_peft(place):
    """The nearest of 256 levels to w / max |W|, here in a loop over the levels; then rounded to bf16."""
    run = undescribed(finished(place, "legacy", epoch_steps=2))
    found = torch.load(merged(run, "merged.pth", "--quant", "legacy_int8"), weights_only=True)
    as_there = torch.load(merged(run, "as-there.pth", "--quant", "int8"), weights_only=True)
    assert all(torch.equal(t, as_there[name]) for name, t in found.items())
    base, init, trained = (torch.load(f, weights_only=True) for f in (run.base, run.init, run.checkpoint))
    for name in [n.removesuffix(".lora_A") for n in trained if n.endswith(".lora_A")]:
        W, A0, B0 = base[f"{name}.weight"], *(init[f"model.{name}.init_lora_{x}"] for x in "AB")
        R = (W.double() - B0.double() @ A0.double()).float()
        nearest, gap = torch.zeros_like(R), torch.full_like(R, math.inf)
        for level in bnb.create_dynamic_map().tolist():
            closer = (R / R.abs().max() - level).abs() < gap
            nearest[closer], gap = level, torch.where(closer, (R / R.abs().max() - level).abs(), gap)
        held = (nearest * R.abs().max()).bfloat16().float()
        wanted = held + trained[f"{name}.lora_B"] @ trained[f"{name}.lora_A"]
        different = (found[f"{name}.weight"] - wanted).abs() > 1e-6
        assert different.float().mean() < 1e-3, name                  # (ties, and roundings at midpoints)
        ours = share(P.QUANT["int8"].through(R, torch.bfloat16) - R, R)
        assert 1.5 * ours < share(held - R, R) < 8 * ours


# ------------------------------------------------------------------------------------------------------ what is refused


def test_numbers_that_a_code_cannot_hold_are_refused_by_name(tmp_path, capsys):
    tensors = random_tensors(n_layer=1)
    tensors["blocks.0.ffn.key.weight"][3, 5] = 2e7
    torch.save(tensors, tmp_path / "large.pth")
    for quant, message in (("int8", r"--quant int8: blocks\.0\.ffn\.key reaches 2\.0e\+07.*nf4"), ("nf4", None)):
        model, cfg = load_model(tmp_path / "large.pth"), P.Config(peft="lora", rank=2, quant=quant)
        if message:
            with pytest.raises(P.Fatal, match=message):
                P.add_adapters(model, cfg, {}, {})
        else:
            P.add_adapters(model, cfg, {}, {})


@pytest.mark.parametrize("change, words", [
    (["--quant", "nf4"], "--quant nf4|with --quant int8"), (["--quant", "none"], "--quant none|with --quant int8"),
    (["--quant", "int4"], "--quant int4|'legacy_int8'|int8"),
])
def test_merging_with_another_quantisation_is_refused(change, words, place, capsys):
    if not (place / "int8-run").exists():
        finished(place, "int8-run", quant="int8", epoch_steps=1)
    folder = place / "int8-run"
    capsys.readouterr()
    assert command.main(["--type", "pissa", "--base_model", str(place / "trained" / "rwkv-0.pth"), "--lora_init",
                         str(folder / "init_pissa.pth"), "--lora_checkpoint", str(folder / "rwkv-0.pth"), "--output",
                         str(folder / "merged.pth"), *change]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and all(word in error for word in words.split("|")), error
    assert not (folder / "merged.pth").exists()


@pytest.mark.parametrize("quant", P.QUANT)
def test_dry_run_counts_what_a_matrix_is_held_as(quant):
    """Of a model of 0.9 billion parameters, 12 layers of width 2048, from shapes alone."""
    cfg = P.Config(data_type="dummy", data_file="base", ctx_len=64, micro_bsz=1, n_layer=12, n_embd=2048, quant=quant,
                   vocab_size=65536, tokenizer="byte")
    with torch.device("meta"):
        model = P.RWKV(P.new_arch(cfg), P.wkv7_ref)
    rest = sum(p.numel() for p in model.parameters()) - 12 * 12 * 2048**2
    trained = sum(p.numel() for name, p in model.named_parameters() if "ln" in name)
    memory = P.Rehearsal(cfg, P.new_arch(cfg), "cuda", torch.bfloat16).memory(1)
    a_weight = {"none": 2, "int8": 1 + 2 / 64, "nf4": 0.5 + 4 / 64, "nf4dq": 0.5 + 1 / 64 + 4 / 16384}[quant]
    wanted = 12 * 12 * 2048**2 * a_weight + 2 * (rest - trained)
    assert memory.weights / 1e9 == pytest.approx(wanted / 1e9, abs=0.006)
