"""The model against the official `rwkv` package, its own pieces, and the formulas it is initialised by."""

import functools
import math
import re
from dataclasses import replace

import pytest
import token_by_token
import torch
from conftest import load_model, logits_of, random_tensors

from pissa_rwkv import (
    GRAD_CP,
    RWKV,
    TIME_MIX,
    WKV,
    Arch,
    Batch,
    ByteTokenizer,
    Config,
    Fatal,
    Mixed,
    Product,
    SquaredReLU,
    Unit,
    check_arch,
    chunk_loss,
    detect,
    fill,
    fingerprint,
    generate,
    new_arch,
    read_pth,
    wkv7_ref,
)

TOKENS = [3, 141, 59, 26, 53, 58, 97, 93, 238, 46, 26, 43, 0, 83, 27, 95, 2, 88, 41, 97]
SIZES = [
    dict(version="x060", n_embd=128, vocab_size=300, dim_ffn=96),
    dict(version="x060", n_layer=3, head_size=32),
    dict(version="x060", n_layer=1),
    dict(version="x052", n_embd=128, vocab_size=300, dim_ffn=96),
    dict(version="x052", n_layer=3),
    dict(n_layer=1),
    dict(n_layer=2, n_embd=128, vocab_size=300, dim_ffn=96),
    dict(n_layer=3, head_size=32, layer0_v=True),
    dict(n_layer=4, vocab_size=65536),
]
each_size = pytest.mark.parametrize("sizes", SIZES, ids=str)
each_version = pytest.mark.parametrize("version", TIME_MIX)


def assert_near(found, wanted, of=1e-4):
    assert found.shape == wanted.shape
    assert (found - wanted).abs().max() <= of * wanted.std()


# ------------------------------------------------------------------------------------------------ the official package


@each_size
def test_logits_and_states_equal_the_official_packages(sizes, model_file, official):
    path = model_file(**sizes)
    wanted, state = official(path, TOKENS)
    found, states = logits_of(load_model(path), TOKENS)
    assert_near(found, wanted)
    for i, mine in enumerate(states):
        assert_near(mine.att[0], state[3 * i])
        older = sizes.get("version", "x070") != "x070"
        assert_near(mine.wkv[0].mT if older else mine.wkv[0], state[3 * i + 1])
        assert_near(mine.ffn[0], state[3 * i + 2])


@each_size
def test_a_carried_state_equals_the_official_packages(sizes, model_file, official):
    path = model_file(**sizes)
    model, state, states = load_model(path), None, None
    for piece in (TOKENS[:7], TOKENS[7:15], TOKENS[15:]):
        wanted, state = official(path, piece, state)
        found, states = logits_of(model, piece, states)
        assert_near(found, wanted)


@each_version
def test_bf16_logits_are_at_most_twice_as_wrong_as_the_official_packages(version, model_file, official):
    path = model_file(version=version, n_layer=3, n_embd=128, dtype=torch.bfloat16)
    exact, _ = official(path, TOKENS)
    error = (official(path, TOKENS, dtype="bf16")[0] - exact).square().mean()
    assert (logits_of(load_model(path, torch.bfloat16), TOKENS)[0] - exact).square().mean() <= 4 * error


# -------------------------------------------------------------------------------------------------- one token at a time

FORMS = [dict(version="x070"), dict(version="x070", head_size=32, n_layer=3), dict(version="x060", head_size=32),
         dict(version="x052", head_size=32), dict(version="x060", pre_ffn=True), dict(version="x052", pre_ffn=True),
         *(dict(version=version, head_qk=16) for version in TIME_MIX)]


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_logits_and_gradients_equal_the_token_by_token_models(form, tmp_path):
    """The loss of 12 tokens after 12, whole and through the chunked loss of training, in float64."""
    tensors = random_tensors(vocab_size=32, dtype=torch.float64, **form)
    tokens, targets = [t % 32 for t in TOKENS[:12]], [t % 32 for t in TOKENS[1:13]]
    leaves = {name: t.clone().requires_grad_() for name, t in tensors.items()}
    wanted = token_by_token.logits(leaves, tokens)
    loss = torch.nn.functional.cross_entropy(wanted, torch.tensor(targets))
    (loss + 0.5e-4 / 12 * wanted.amax(1).square().sum()).backward()                       # with L2Wrap's gradient

    model = load_model(store(tensors, tmp_path / "base.pth"), torch.float64)
    batch = Batch(torch.tensor([tokens]), torch.arange(12), torch.tensor(targets))
    found, _ = chunk_loss(model, batch, 12, None)
    found.backward()
    torch.testing.assert_close(found, loss, rtol=1e-12, atol=0)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, leaves[name].grad, rtol=1e-8, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")
    with torch.no_grad():
        x, _ = model(batch.inputs)
        torch.testing.assert_close(model.next_logits(x, batch.inputs)[0], wanted[-1].detach(), rtol=1e-10, atol=1e-10)


def test_a_copying_head_writes_as_its_logits_say(model_file):
    path = model_file(vocab_size=200, head_qk=16)
    tensors = {name: t.double() for name, t in read_pth(path, "--load_model").items()}
    tensors["head_q.weight"] = 40 * tensors["head_q.weight"]  # votes that decide
    torch.save(tensors, path)
    tokens, plain = [*b"To copy"], {name: t for name, t in tensors.items() if "head_" not in name}
    for _ in range(4):
        tokens.append(int(token_by_token.logits(tensors, tokens)[-1].argmax()))
    written = generate(load_model(path, torch.float64), ByteTokenizer(), "To copy", 4)
    assert written == bytes(tokens[7:]).decode(errors="replace")
    assert int(token_by_token.logits(plain, [*b"To copy"])[-1].argmax()) != tokens[7]


# ------------------------------------------------------------------------------------------------- state is an argument


@each_version
@pytest.mark.parametrize("pieces", [(3, 4), (4, 3), (1,) * 7, (6, 1)], ids=str)
def test_feeding_pieces_equals_feeding_the_whole(pieces, version, model_file):
    model = load_model(model_file(version=version, n_layer=2), torch.float64)
    whole, last = logits_of(model, TOKENS[:7])
    states, found, at = None, [], 0
    for n in pieces:
        logits, states = logits_of(model, TOKENS[at: at + n], states)
        found, at = [*found, logits], at + n
    torch.testing.assert_close(torch.cat(found), whole, rtol=1e-11, atol=1e-11)
    for mine, wanted in zip(states, last, strict=True):
        torch.testing.assert_close(mine.wkv, wanted.wkv, rtol=1e-11, atol=1e-11)


@each_version
def test_rows_of_a_batch_do_not_see_each_other(version, model_file):
    model = load_model(model_file(version=version, n_layer=2), torch.float64)
    rows = [TOKENS[:9], TOKENS[9:18]]
    with torch.no_grad():
        x, _ = model(torch.tensor(rows))
    for i, row in enumerate(rows):
        torch.testing.assert_close(x[i] @ model.head.weight.T, logits_of(model, row)[0], rtol=1e-11, atol=1e-11)


def test_grad_cp_gives_the_same_bits_and_computes_blocks_twice(model_file):
    path, calls, gradients = model_file(n_layer=3), [], []

    def counting(*inputs):
        calls.append(1)
        return wkv7_ref(*inputs)

    for grad_cp in GRAD_CP:
        model = load_model(path, wkv=counting, grad_cp=grad_cp)
        calls.clear()
        with torch.no_grad():
            model(torch.tensor([TOKENS]))
        assert len(calls) == 3
        calls.clear()
        x, _ = model(torch.tensor([TOKENS]))
        (x @ model.head.weight.T).logsumexp(-1).sum().backward()
        assert len(calls) == (3 if grad_cp == "0" else 6)
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient.abs().max() > 0 and torch.equal(gradient, gradients[1][name]), name


# ---------------------------------------------------------------------------------------------------- files and loading


@each_size
def test_the_architecture_is_read_from_the_file(sizes):
    sizes = dict(n_layer=2, n_embd=64, vocab_size=256, head_size=64, dim_ffn=4 * sizes.get("n_embd", 64)) | sizes
    arch = detect(random_tensors(**sizes), "base.pth")
    version, v = sizes.get("version", "x070"), dict(v=16) if sizes["n_layer"] > 1 else {}  # one layer has no v1
    ranks = dict(x070=dict(a=12, g=20, w=8) | v, x060=dict(decay=20, mix=12), x052={})
    assert arch == Arch(version, sizes["n_layer"], sizes["n_embd"], sizes["n_embd"], sizes["dim_ffn"],
                        sizes["head_size"], sizes["vocab_size"], ranks[version])


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_keys_shapes_and_order_of_a_saved_model_are_those_of_a_released_file(form, model_file):
    wanted = random_tensors(**form)
    found = load_model(model_file(**form)).state_dict()
    assert [(name, t.shape) for name, t in found.items()] == [(name, t.shape) for name, t in wanted.items()]


def store(tensors, path):
    torch.save(tensors, path)
    return path


VARIANTS = {
    "vectors as [C]": lambda name, t: (name, t.reshape(-1) if t.shape[:2] == (1, 1) else t),
    "deepspeed": lambda name, t: (f"_forward_module.{name}", t),
    "torch.compile": lambda name, t: (f"_orig_mod.{name}", t),
    "both": lambda name, t: (f"_forward_module._orig_mod.{name}", t),
    "merged by today's RWKV-PEFT": lambda name, t: (f"model.base_model.model.{name}", t),
    "not contiguous": lambda name, t: (name, t.T.contiguous().T if t.dim() == 2 else t),
    "nn.Parameter": lambda name, t: (name, torch.nn.Parameter(t)),
    "mixed dtypes": lambda name, t: (name, t.double() if "ffn" in name else t),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_file_in_another_form_is_the_same_model(variant, tmp_path):
    tensors = random_tensors(n_layer=2)
    plain = store(tensors, tmp_path / "plain.pth")
    other = store(dict(VARIANTS[variant](name, t) for name, t in tensors.items()), tmp_path / "other.pth")
    fingerprint(read_pth(other, "--load_model"))  # a run takes it, so it must not fail
    assert torch.equal(logits_of(load_model(other), TOKENS)[0], logits_of(load_model(plain), TOKENS)[0])


def test_vectors_stored_as_c_are_read_as_the_official_package_reads_them(tmp_path, official):
    tensors = {name: t.squeeze() if t.shape[:2] == (1, 1) else t for name, t in random_tensors().items()}
    path = store(tensors, tmp_path / "flat.pth")
    assert_near(logits_of(load_model(path), TOKENS)[0], official(path, TOKENS)[0])


def without(*names):
    return lambda t: {name: x for name, x in t.items() if name not in names}


def renumbered(old, new):
    return lambda t: {name.replace(f"blocks.{old}.", f"blocks.{new}."): x for name, x in t.items()}


BAD_FILES = {  # what is wrong -> (how the file is made, what the error names)
    "missing key": (without("blocks.1.att.w2"), r"missing blocks\.1\.att\.w2"),
    "missing v0 of layer 1": (without("blocks.1.att.v0"), r"missing blocks\.1\.att\.v0$"),
    "missing head": (without("head.weight"), r"missing head\.weight"),
    "unknown key": (lambda t: t | {"blocks.1.att.time_stat": torch.zeros(2)}, r"unexpected blocks\.1\.att\.time_stat$"),
    "unknown key that ends like layer 0's": (lambda t: t | {"blocks.1.att.v3": torch.zeros(2)}, r"unexpected.*v3$"),
    "many": (without(*(f"blocks.1.att.x_{m}" for m in "rwkvag")), r"missing blocks.*and 2 more"),
    "both": (lambda t: without("ln_out.bias")(t) | {"extra": torch.zeros(1)}, r"missing ln_out.bias; unexpected extra"),
    "gap in the blocks": (renumbered(1, 2), r"\[0, 2\], with gaps"),
    "no block 0": (renumbered(0, 2), r"not an RWKV model|gaps"),
    "wrong shape": (lambda t: t | {"head.weight": t["head.weight"][:-1]}, r"head\.weight is \[255, 64\].*\[256, 64\]"),
    "transposed": (lambda t: t | {"blocks.1.ffn.value.weight": t["blocks.1.ffn.value.weight"].T},
                   r"blocks\.1\.ffn\.value\.weight is \[64, 256\].*\[256, 64\]|is \[256, 64\].*\[64, 256\]"),
    "heads without a size": (lambda t: t | {"blocks.1.att.r_k": torch.zeros(64)}, r"blocks\.1\.att\.r_k"),
    "integers": (lambda t: t | {"ln_out.bias": torch.zeros(64, dtype=torch.int8)}, r"ln_out\.bias.*int8"),
    "v4": (lambda t: {"blocks.0.att.time_first": t["ln_out.bias"], "blocks.0.att.time_decay": t["ln_out.bias"]},
           "this is RWKV-4"),
    "DeepEmbed": (lambda t: t | {"blocks.0.ffn.s_emb.weight": torch.zeros(2)}, r"this is x070a \(DeepEmbed\)"),
    "with attention": (lambda t: t | {"blocks.0.ffn.s_emb.weight": torch.zeros(2), "blocks.0.qkv.qq.weight":
                                      torch.zeros(2)}, "this is x070b"),
    "pre_ffn of x070": (lambda t: t | {"blocks.0.ffnPre.key.weight": t["blocks.0.ffn.key.weight"]},
                        r"unexpected blocks\.0\.ffnPre\.key"),
    "another kind of model": (lambda t: {"model.layers.0.weight": torch.zeros(2)}, "not an RWKV model"),
}


@pytest.mark.parametrize("wrong", BAD_FILES)
def test_a_file_that_is_no_whole_model_is_refused_by_name(wrong, tmp_path):
    change, message = BAD_FILES[wrong]
    path = store({n: t.contiguous() for n, t in change(random_tensors(n_layer=2)).items()}, tmp_path / "bad.pth")
    with pytest.raises(Fatal, match=message) as error:
        load_model(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("flag", [dict(n_layer=12), dict(n_embd=768), dict(vocab_size=65536), dict(head_size=32),
                                  dict(version="x060"), dict(dim_att=128), dict(dim_ffn=224), dict(pre_ffn=True),
                                  dict(head_qk=8)], ids=str)
def test_a_flag_that_contradicts_the_file_is_refused_with_both_values(flag):
    arch = detect(random_tensors(n_layer=2), "base.pth")
    (name, given), = flag.items()
    with pytest.raises(Fatal, match=rf"--{name} {given}.* {getattr(arch, name)};"):
        check_arch(Config(load_model="base.pth", **flag), arch)
    check_arch(Config(load_model="base.pth", **{name: getattr(arch, name)}), arch)


# ---------------------------------------------------------------------------------------------------------- a new model

L, C, N, V = 3, 128, 64, 300


@functools.cache
def new(version):
    """A new model's tensors in float64."""
    torch.manual_seed(1)
    arch = new_arch(Config(version=version, n_layer=L, n_embd=C, vocab_size=V))
    return {name: t.double() for name, t in RWKV(arch, wkv7_ref).initialise().state_dict().items()}


def formulas(version, i, c):
    """What RWKV-LM gives channel c of layer i, name by name."""
    rho, tau, delta, lin, z = i / (L - 1), 1 - i / L, c / C, c / (C - 1) - 0.5, (c % 64 - 31.5) / 31.5
    zig = z * abs(z)
    common = {"att.ln_x.weight": ((1 + i) / L) ** 0.7, "att.ln_x.bias": 0.0,
              "ln1.weight": 1.0, "ln1.bias": 0.0, "ln2.weight": 1.0, "ln2.bias": 0.0}
    older = {"att.time_decay": -6 + 5 * (c / (C - 1)) ** (0.7 + 1.3 * rho),
             "att.time_faaaa": rho * (1 - c / (C - 1)) + 0.1 * ((c + 1) % 3 - 1)}
    own = {
        "x070": {
            **{f"att.x_{m}": 1 - delta ** (e * tau) for m, e in dict(r=0.2, w=0.9, k=0.7, v=0.7, a=0.9, g=0.2).items()},
            "att.w0": -6 + 6 * (c / (C - 1)) ** (1 + rho ** 0.3) + 0.5 + 2.5 * zig,
            "att.a0": -0.19 + 0.3 * zig + 0.4 * lin,
            **({"att.v0": 0.73 - 0.4 * lin} if i else {}),
            "att.k_k": 0.71 - 0.1 * lin, "att.k_a": 1.02, "att.r_k": -0.04,
            "ffn.x_k": 1 - delta ** (tau ** 4),
        },
        "x060": older | {
            **{f"att.time_maa_{m}": 1 - delta ** tau for m in "xwk"},
            "att.time_maa_v": 1 - (delta ** tau + 0.3 * rho),
            **{f"att.time_maa_{m}": 1 - delta ** (0.5 * tau) for m in "rg"},
            "ffn.time_maa_k": 1 - delta ** (tau ** 3), "ffn.time_maa_r": 1 - delta ** (tau ** 3),
        },
        "x052": older | {
            "att.time_mix_k": delta ** tau, "att.time_mix_v": delta ** tau + 0.3 * rho,
            "att.time_mix_r": delta ** (0.5 * tau), "att.time_mix_g": delta ** (0.5 * tau),
            "ffn.time_mix_k": delta ** tau, "ffn.time_mix_r": delta ** tau,
        },
    }
    return common | own[version]


@each_version
@pytest.mark.parametrize("layer", range(L))
def test_vectors_of_a_new_model_follow_the_formulas(layer, version):
    for c in range(C):
        for name, wanted in formulas(version, layer, c).items():
            found = new(version)[f"blocks.{layer}.{name}"].reshape(-1)[c].item()
            assert found == pytest.approx(wanted, abs=4e-6), (name, c)


def assert_orthogonal(W, gain):
    """All singular values are `gain`."""
    torch.testing.assert_close(torch.linalg.svdvals(W), torch.full((min(W.shape),), gain, dtype=W.dtype),
                               rtol=1e-5, atol=0)


GAINS = [("att.receptance.weight", 1.0), ("att.key.weight", 0.1), ("att.value.weight", 1.0), ("ffn.key.weight", 1.0),
         ("att.gate.weight", 0.1), *((f"att.{m}2", 0.1) for m in "wavg")]
ZEROS = ["att.output.weight", "ffn.value.weight", "ffn.receptance.weight", "att.time_maa_w1", "att.time_decay_w1",
         *(f"att.{m}1" for m in "wavg")]


@each_version
def test_matrices_of_a_new_model_are_orthogonal_small_or_zero(version):
    tensors, seen = new(version), set()
    for i in range(L):
        mine = {n.removeprefix(f"blocks.{i}."): t for n, t in tensors.items() if n.startswith(f"blocks.{i}.")}
        for name in [name for name, _ in GAINS if name in mine]:
            assert_orthogonal(mine[name], dict(GAINS)[name])
        assert not any(mine[name].any() for name in ZEROS if name in mine)
        small = [name for name in ("att.time_maa_w2", "att.time_decay_w2") if name in mine]
        assert all(0.0098 < mine[name].abs().max() <= 0.01 for name in small)
        seen |= {*mine} - {*dict(GAINS), *ZEROS, *small, *formulas(version, i, 0)}
    assert seen <= {"ln0.weight", "ln0.bias"}  # nothing is left that no test looks at
    assert_orthogonal(tensors["head.weight"], 0.5 * math.sqrt(V / C))
    emb = tensors["emb.weight"]
    assert 0.99e-4 < emb.abs().max() <= 1e-4 and abs(emb.mean()) < 1e-6


@each_version
def test_every_weight_of_a_new_model_is_set_and_finite(version):
    """Built on memory full of NaN, as to_empty may give it; one layer, where the depth ratio would be 0/0."""
    for n_layer, head_qk in ((1, 0), (2, 8)):
        model = RWKV(new_arch(Config(version=version, n_layer=n_layer, n_embd=64, head_qk=head_qk)), wkv7_ref)
        with torch.no_grad():
            for p in model.parameters():
                p.fill_(torch.nan)
        assert all(p.isfinite().all() for p in model.initialise().parameters())


@pytest.mark.parametrize("version, n_embd, dim_ffn, ranks", [
    ("x070", 768, 3072, dict(w=64, a=64, v=32, g=128)), ("x070", 4096, 16384, dict(w=160, a=160, v=96, g=320)),
    ("x070", 64, 256, dict(w=32, a=32, v=32, g=32)), ("x060", 2048, 7168, dict(decay=64, mix=32)),
    ("x060", 4096, 14336, dict(decay=128, mix=64)), ("x052", 2560, 8960, {})])
def test_sizes_of_a_new_model_follow_its_width(version, n_embd, dim_ffn, ranks):
    arch = new_arch(Config(version=version, n_embd=n_embd))
    assert (arch.dim_ffn, arch.ranks) == (dim_ffn, ranks)


RELEASED = {  # version, L, C, ranks -> parameters
    ("x070", 12, 768, (("a", 64), ("g", 128), ("v", 32), ("w", 64))): 191_034_624,
    ("x060", 24, 2048, (("decay", 64), ("mix", 32))): 1_599_873_024,
    ("x060", 32, 4096, (("decay", 128), ("mix", 64))): 7_635_746_816,
    ("x052", 24, 1024, ()): 461_721_600,
}


@pytest.mark.parametrize("release", RELEASED, ids=str)
def test_released_sizes_have_the_released_number_of_parameters(release):
    version, n_layer, n_embd, ranks = release
    arch = new_arch(Config(version=version, n_layer=n_layer, n_embd=n_embd, vocab_size=65536))
    arch = replace(arch, ranks=dict(ranks))
    with torch.device("meta"):
        assert sum(p.numel() for p in RWKV(arch, wkv7_ref).parameters()) == RELEASED[release]


@each_version
def test_the_blocks_of_a_new_model_add_nothing_yet(version):
    """Their output matrices are zero: the logits are the head's view of the embedding."""
    arch, tensors = new_arch(Config(version=version, n_layer=L, n_embd=C, vocab_size=V)), new(version)
    with torch.device("meta"):
        model = RWKV(arch, WKV[version]["torch"]())
    fill(model, tensors, "new.pth", "cpu", torch.float64)
    e = tensors["emb.weight"][TOKENS[:5]]
    normed = torch.nn.functional.layer_norm(torch.nn.functional.layer_norm(e, (C,)), (C,))
    torch.testing.assert_close(logits_of(model, TOKENS[:5])[0], normed @ tensors["head.weight"].T)


def test_a_new_x070_cannot_begin_with_a_channel_mixing():
    with pytest.raises(Fatal, match="--pre_ffn 1: x070 .* x060 and x052"):
        new_arch(Config(pre_ffn=True))


def test_the_head_size_must_divide_the_width():
    with pytest.raises(Fatal, match=re.escape("--n_embd 100: expected a multiple of --head_size 64")):
        new_arch(Config(n_embd=100))


def test_gradient_of_the_squared_relu():
    x = torch.tensor([-2.0, -0.1, 0.3, 5.0], dtype=torch.float64, requires_grad=True)
    assert SquaredReLU.apply(x).tolist() == pytest.approx([0, 0, 0.09, 25])
    assert torch.autograd.gradcheck(SquaredReLU.apply, x)
    low = torch.randn(1000).bfloat16().requires_grad_()
    theirs = torch.relu(low) ** 2
    dy = torch.randn(1000).bfloat16()
    found, = torch.autograd.grad(SquaredReLU.apply(low), low, dy)
    assert torch.equal(found, torch.autograd.grad(theirs, low, dy)[0])


@pytest.mark.parametrize("trained", [(True, True), (False, True), (True, False)])
def test_gradients_of_a_product(trained):
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=trained[0])
    W = torch.randn(5, 4, dtype=torch.float64, requires_grad=trained[1])
    assert torch.equal(Product.apply(x, W), torch.nn.functional.linear(x, W))
    assert torch.autograd.gradcheck(Product.apply, (x, W))


def test_gradients_of_what_token_shift_mixes():
    def weights(*shape, trained):
        return torch.rand(*shape, dtype=torch.float64).requires_grad_(trained)

    x, y = (torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    for mus in ([weights(1, 1, 4, trained=True), weights(2, 3, 4, trained=True)],
                [weights(1, 1, 4, trained=False) for _ in range(3)], [weights(1, 1, 4, trained=True)]):
        for z, mu in zip(Mixed.apply(x, y, *mus), mus, strict=True):
            torch.testing.assert_close(z, x + (y - x) * mu)
        assert torch.autograd.gradcheck(Mixed.apply, (x, y, *mus))


def test_gradient_of_the_unit_vector():
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    torch.testing.assert_close(Unit.apply(x), torch.nn.functional.normalize(x, dim=-1))
    assert torch.autograd.gradcheck(Unit.apply, x.requires_grad_())
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert not Unit.apply(torch.zeros(2, 4, dtype=dtype)).any()


def relative_errors(f, inputs, dys):
    """Of f's gradients in bf16, against those in float64."""
    found = []
    for dtype in (torch.bfloat16, torch.float64):
        leaves = [x.to(dtype).requires_grad_() for x in inputs]
        outputs = f(*leaves)
        dxs = torch.autograd.grad(outputs, leaves, [dy.to(dtype) for dy in dys[: len(outputs)]])
        found.append([dx.double() for dx in dxs])
    return [((a - b).norm() / b.norm()).item() for a, b in zip(*found, strict=True)]


def test_in_bf16_these_gradients_are_no_worse_than_autograds():
    x, y, *dys = torch.randn(8, 4, 50, 64).bfloat16()
    mus = torch.rand(6, 1, 1, 64).bfloat16()
    for ours, autograds, inputs in (
        (lambda x, y: Mixed.apply(x, y, *mus.to(x)), lambda x, y: [torch.lerp(x, y, mu) for mu in mus.to(x)], (x, y)),
        (lambda x: [Unit.apply(x)], lambda x: [torch.nn.functional.normalize(x, dim=-1)], (x,)),
    ):
        errors, usual = (relative_errors(f, inputs, dys) for f in (ours, autograds))
        assert all(error < 1.1 * its for error, its in zip(errors, usual, strict=True)), (errors, usual)
