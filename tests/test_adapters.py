"""Adapters against singular values from LAPACK, the model they are put on, and LoRA's formula written out."""

import pytest
import torch
import torch.nn.functional as F
from conftest import load_model, logits_of

from pissa_rwkv import (
    GRAD_CP,
    Config,
    Fatal,
    FrozenLinear,
    LoRALinear,
    PiSSALinear,
    ZeroAdamW,
    add_adapters,
    build,
    check_adapters,
    top_singular,
    train,
)

TOKENS = [3, 141, 59, 26, 53, 58, 97, 93, 238, 46, 26, 43, 0, 83, 27]
MATRICES = [f"blocks.{i}.{m}" for i in range(2) for m in (
    "att.receptance", "att.key", "att.value", "att.output", "ffn.key", "ffn.value")]


def adapted_model(path, dtype=torch.float32, init=None, load=None, grad_cp="0", **options):
    """A model with adapters, and what was taken out of its matrices."""
    model, cfg = load_model(path, dtype, grad_cp=grad_cp), Config(**dict(rank=4) | options)
    check_adapters(model, cfg, init or {}, load or {})
    return model, add_adapters(model, cfg, init or {}, load or {})


def loss_of(model):
    x, _ = model(torch.tensor([TOKENS]))
    return (x @ model.head.weight.T).logsumexp(-1).mean()


def shaped(rows, columns, decay, seed=0):
    """A matrix with singular values 1, 2^-decay, 3^-decay, ..., in float64."""
    draw = torch.Generator().manual_seed(seed)
    U, V = (torch.linalg.qr(torch.randn(n, n, generator=draw, dtype=torch.float64)).Q for n in (rows, columns))
    k = min(rows, columns)
    sigma = torch.arange(1, k + 1, dtype=torch.float64) ** -decay
    return U[:, :k] * sigma @ V[:k], sigma


def start(W, kind=PiSSALinear, seed=0, **options):
    """A0 and B0."""
    return kind.start(W, Config(**options), torch.Generator().manual_seed(seed)).values()


# ---------------------------------------------------------------------------------------------------- PiSSA's start

each_shape = pytest.mark.parametrize("shape", [(96, 64), (64, 96), (80, 80)], ids=str)


@each_shape
def test_the_exact_start_is_the_best_approximation_of_its_rank(shape):
    W = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    A0, B0 = start(W, rank=8, svd_niter=0)
    best = torch.linalg.svdvals(W)[8:].square().sum().sqrt()  # Eckart and Young
    assert (A0.shape, B0.shape) == ((8, shape[1]), (shape[0], 8))
    torch.testing.assert_close((W - B0 @ A0).norm(), best, rtol=1e-12, atol=0)


@each_shape
def test_the_fast_start_errs_by_what_its_iterations_leave(shape):
    """Each iteration shrinks the share of direction j in the image by (sigma_j / sigma_r)^2; the first direction that
    the image has no room for is rank + 8."""
    W, sigma = shaped(*shape, decay=0.5)
    best, excess = sigma[8:].norm(), {}
    for niter in (1, 2, 4):
        A0, B0 = start(W, rank=8, svd_niter=niter)
        excess[niter] = ((W - B0 @ A0).norm() / best - 1).item()
        assert -1e-12 <= excess[niter] <= (sigma[16] / sigma[7]) ** (2 * niter + 1)
    assert excess[4] < excess[2] / 2 < excess[1] / 4  # the iterations are made, and they help


@pytest.mark.parametrize("niter", [0, 4])
def test_the_start_is_balanced(niter):
    """A = sqrt(sigma) V^T and B = U sqrt(sigma): A A^T = B^T B = diag(sigma)."""
    W, sigma = shaped(96, 64, decay=2)
    A0, B0 = start(W, rank=8, svd_niter=niter)
    for gram in (A0 @ A0.T, B0.T @ B0):
        torch.testing.assert_close(gram, sigma[:8].diag(), rtol=1e-6, atol=1e-9)


def test_singular_triplets_are_of_the_asked_rank_even_where_the_matrix_is_no_larger():
    W, sigma = shaped(12, 20, decay=1)
    for niter in (0, 4):
        U, s, Vt = top_singular(W, 12, niter, torch.Generator().manual_seed(0))
        torch.testing.assert_close(s, sigma, rtol=1e-10, atol=0)
        torch.testing.assert_close(U * s @ Vt, W, rtol=0, atol=1e-12)


def test_one_seed_gives_the_same_bits_and_another_gives_others(model_file):
    path = model_file()
    first, again, other = (adapted_model(path, random_seed=seed)[1] for seed in (5, 5, 6))
    assert all(torch.equal(t, again[name]) for name, t in first.items())
    assert not any(torch.equal(t, other[name]) for name, t in first.items())
    att = adapted_model(path, peft="lora")[0].blocks[0].att
    assert not torch.equal(att.key.lora_A, att.value.lora_A)          # each matrix draws its own


# --------------------------------------------------------------------------------------------- in the model, at first


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("niter", [0, 4])
def test_the_model_computes_what_it_computed_before(dtype, niter, model_file):
    """Where a matrix rounds once (W x), an adapted one rounds four times (R x, A x, B A x, the sum): at most four times
    as wrong, against the same weights in float64."""
    path = model_file(n_layer=2, dtype=dtype)
    exact, _ = logits_of(load_model(path, torch.float64), TOKENS)
    before, _ = logits_of(load_model(path, dtype), TOKENS)
    after, _ = logits_of(adapted_model(path, dtype, svd_niter=niter, rank=16)[0], TOKENS)
    assert 0 < (after - exact).norm() <= 4 * (before - exact).norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_subtracted_is_what_the_adapters_start_with(dtype, model_file):
    """A0 and B0 are numbers of the compute dtype, kept in fp32; W_res is W - B0 A0, rounded once."""
    path = model_file(n_layer=2, dtype=dtype)
    base = load_model(path, dtype)
    model, taken = adapted_model(path, dtype, rank=8)
    assert sorted(taken) == sorted(f"{m}.init_lora_{x}" for m in MATRICES for x in "AB")
    for name in MATRICES:
        A0, B0, W = taken[f"{name}.init_lora_A"], taken[f"{name}.init_lora_B"], base.get_submodule(name).weight
        adapter = model.get_submodule(name)
        for factor, p in ((A0, adapter.lora_A), (B0, adapter.lora_B)):
            assert factor.dtype == torch.float32 and p.dtype == dtype
            assert factor.any() and torch.equal(factor, p.float())
        R = W.double() - B0.double() @ A0.double()
        # half the spacing of W_res's numbers, and float32's error in a sum of 9 terms
        bound = R.abs() * torch.finfo(dtype).eps / 2 + 9 * 2**-24 * (B0.abs() @ A0.abs() + W.float().abs())
        assert adapter.frozen.weight.dtype == dtype
        assert ((adapter.frozen.weight.double() - R).abs() <= bound).all()


@pytest.mark.parametrize("niter", [0, 4])
def test_a_matrix_without_a_main_part_starts_as_lora_does(niter, model_file, tmp_path, capsys):
    tensors = torch.load(model_file(n_layer=2))
    tensors["blocks.0.att.output.weight"].zero_()  # as in a new model
    column = tensors["blocks.1.ffn.key.weight"][:, :1]
    tensors["blocks.1.ffn.key.weight"] = column @ column[:64].T  # of rank 1, less than the adapters'
    torch.save(tensors, tmp_path / "flat.pth")
    model, taken = adapted_model(tmp_path / "flat.pth", svd_niter=niter)
    special = ["blocks.0.att.output", "blocks.1.ffn.key"]
    for name in MATRICES:
        A, B = model.get_submodule(name).lora_A, model.get_submodule(name).lora_B
        assert A.any() and bool(B.any()) == (name not in special)
        assert torch.equal(taken[f"{name}.init_lora_B"], B)
    for name in special:
        assert torch.equal(model.get_submodule(name).frozen.weight, tensors[f"{name}.weight"])
    assert "2 matrices have no rank-4 part and start as LoRA does: " + ", ".join(special) in capsys.readouterr().out


@pytest.mark.parametrize("rank", [0, -1, 65])
def test_a_rank_that_no_matrix_has_is_refused(rank, model_file):
    with pytest.raises(Fatal, match=rf"--rank {rank}: blocks\.0\.att\.\w+ is 64 x 64; use a rank from 1 to 64"):
        adapted_model(model_file(), rank=rank)


# --------------------------------------------------------------------------------------------------- what is trained


@pytest.mark.parametrize("peft", ["pissa", "lora"])
@pytest.mark.parametrize("train_parts", [("time", "ln"), (), ("emb", "head")], ids=str)
def test_only_adapters_and_train_parts_are_trained(peft, train_parts, model_file):
    model, _ = adapted_model(model_file(n_layer=2), peft=peft, train_parts=train_parts)
    norms = [f"blocks.{i}.{n}" for i in range(2) for n in ("ln1", "ln2", "att.ln_x")] + ["blocks.0.ln0", "ln_out"]
    parts = {"ln": [f"{n}.{x}" for n in norms for x in ("weight", "bias")], "emb": ["emb.weight"],
             "head": ["head.weight"], "time": []}
    wanted = {name for part in train_parts for name in parts[part]}
    wanted |= {f"{m}.lora_{x}" for m in MATRICES for x in "AB"}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trained.keys() == wanted

    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimiser = ZeroAdamW(trained.items(), Config())
    for _ in range(2):  # LoRA's A first moves when B is no longer zero
        loss_of(model).backward()
        optimiser.reduce()
        optimiser.step(1e-3, 1.0)
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) == (name not in wanted), name
        assert not p.grad.any() if name in wanted else p.grad is None


# -------------------------------------------------------------------------------------------------------------- LoRA


def test_lora_is_its_formula_and_starts_at_nothing(model_file):
    path = model_file()
    model, taken = adapted_model(path, torch.float64, peft="lora", rank=4, lora_alpha=6.0)
    for name in MATRICES:
        layer, W = model.get_submodule(name), load_model(path, torch.float64).get_submodule(name).weight
        x = torch.randn(5, W.shape[1], dtype=torch.float64)
        assert torch.equal(layer(x), x @ W.T) and not taken
        assert 0.95 < layer.lora_A.abs().max() * W.shape[1] ** 0.5 <= 1.0001              # Kaiming's bound, uniform
        B = torch.randn(W.shape[0], 4, dtype=torch.float64)
        layer.lora_B.data.copy_(B)
        torch.testing.assert_close(layer(x), x @ (W + 6.0 / 4 * B @ layer.lora_A).T, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_gradients_of_an_adapter_are_those_of_its_formula(dropout):
    """By finite differences, with x used elsewhere too: what is summed in place must not be anyone else's."""
    draw = torch.Generator().manual_seed(0)
    shapes = (5, 8), (2, 8), (5, 2), (2, 3, 8)
    W, A, B, x = (torch.randn(shape, generator=draw, dtype=torch.float64) for shape in shapes)
    frozen = FrozenLinear(W, W.dtype, "none")

    def outputs(x, A, B):
        layer = LoRALinear(Config(rank=2, lora_alpha=3.0, lora_dropout=dropout), frozen, lora_A=A, lora_B=B).train()
        del layer.lora_A, layer.lora_B                                # (parameters would be leaves)
        layer.lora_A, layer.lora_B = A, B
        torch.manual_seed(1)
        return layer(x), x * x, layer(x * 2)

    assert torch.autograd.gradcheck(outputs, [t.requires_grad_() for t in (x, A, B)])


def test_loras_dropout_is_on_its_input_and_only_in_training():
    W, A, B, x = torch.randn(5, 8), torch.randn(2, 8), torch.randn(5, 2), torch.randn(300, 8)
    frozen = FrozenLinear(W, W.dtype, "none")
    layer = LoRALinear(Config(rank=2, lora_alpha=2.0, lora_dropout=0.25), frozen, lora_A=A, lora_B=B)
    torch.testing.assert_close(layer.eval()(x), x @ (W + B @ A).T, rtol=1e-5, atol=1e-5)
    torch.manual_seed(3)
    found = layer.train()(x)
    torch.manual_seed(3)
    dropped = F.dropout(x, 0.25)
    assert 0.2 < (dropped == 0).float().mean() < 0.3
    torch.testing.assert_close(found, x @ W.T + dropped @ (B @ A).T, rtol=1e-5, atol=1e-5)


def test_pissa_has_neither_scale_nor_dropout():
    W, A, B, x = torch.randn(5, 8), torch.randn(2, 8), torch.randn(5, 2), torch.randn(3, 8)
    frozen = FrozenLinear(W, W.dtype, "none")
    layer = PiSSALinear(Config(rank=2, lora_alpha=64.0, lora_dropout=0.9), frozen, lora_A=A, lora_B=B).train()
    torch.testing.assert_close(layer(x), x @ (W + B @ A).T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_grad_cp_gives_adapters_the_same_bits(dropout, model_file):
    """With dropout too: the second computation of a block drops what the first one dropped."""
    path, gradients = model_file(n_layer=2), []
    for grad_cp in GRAD_CP:
        model, _ = adapted_model(path, peft="lora", lora_dropout=dropout, grad_cp=grad_cp)
        torch.manual_seed(0)
        with torch.no_grad():
            for name in MATRICES:
                model.get_submodule(name).lora_B.normal_()
        loss_of(model.train()).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert all(g.any() and torch.equal(g, gradients[1][name]) for name, g in gradients[0].items())


# -------------------------------------------------------------------------------------------------------- going on


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_saved_factors_give_the_same_model_again(dtype, model_file):
    path = model_file(n_layer=2, dtype=dtype)
    model, taken = adapted_model(path, dtype)
    with torch.no_grad():
        for name in MATRICES:
            model.get_submodule(name).lora_A.mul_(1.5)
    load = {name: p.detach().float() for name, p in model.named_parameters() if ".lora_" in name}
    again, taken_again = adapted_model(path, dtype, init=taken, load=load, random_seed=9)
    assert torch.equal(logits_of(again, TOKENS)[0], logits_of(model, TOKENS)[0])
    assert all(torch.equal(t, taken[name]) for name, t in taken_again.items())


def test_a_bf16_run_goes_on_from_the_fp32_values_that_were_saved(model_file, tmp_path):
    """rwkv-0.pth holds fp32 masters; rounded to bf16 on the way in, the small steps of a run would be lost."""
    (tmp_path / "text.txt").write_text("What a run learns does not matter here. " * 3)
    common = dict(load_model=str(model_file(dtype=torch.bfloat16)), data_file=str(tmp_path / "text.txt"), rank=4,
                  ctx_len=16, micro_bsz=1, epoch_steps=2, accelerator="cpu", op="torch", precision="bf16")
    train(build(Config(**common, proj_dir=str(tmp_path / "first"))))
    saved = torch.load(tmp_path / "first" / "rwkv-0.pth", weights_only=True)
    files = dict(adapter_load=str(tmp_path / "first" / "rwkv-0.pth"),
                 adapter_init=str(tmp_path / "first" / "init_pissa.pth"))
    for options in (dict(proj_dir="second", **files), dict(proj_dir="first", epoch_begin=1)):
        run = build(Config(**common | options | dict(proj_dir=str(tmp_path / options["proj_dir"]))))
        for name, master in run.optimiser.masters().items():
            assert torch.equal(master, saved[name]), name


@pytest.mark.parametrize("spoil, message", [
    (lambda t: {n: x for n, x in t.items() if n != "blocks.1.ffn.key.init_lora_B"},
     r"run/init_pissa\.pth: missing blocks\.1\.ffn\.key\.init_lora_B"),
    (lambda t: {n: x[:2] if n.endswith("A") else x[:, :2] for n, x in t.items()},
     r"run/init_pissa\.pth: blocks\.0\.att\.\w+\.init_lora_A is \[2, 64\], expected \[4, 64\]; is --rank"),
])
def test_factors_of_another_rank_or_model_are_refused(spoil, message, model_file):
    path = model_file(n_layer=2)
    _, taken = adapted_model(path)
    with pytest.raises(Fatal, match=message):
        adapted_model(path, init=spoil(taken), adapter_init="run/init_pissa.pth")
