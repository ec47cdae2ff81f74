"""The model against the official `rwkv` package, its own pieces, and the formulas it is initialised by."""

import math
import re

import pytest
import torch
from conftest import load_model, logits_of, random_tensors

from pissa_rwkv import (
    RWKV,
    Arch,
    Config,
    Fatal,
    check_arch,
    detect,
    fill,
    fingerprint,
    new_arch,
    read_pth,
    wkv7_ref,
)

TOKENS = [3, 141, 59, 26, 53, 58, 97, 93, 238, 46, 26, 43, 0, 83, 27, 95, 2, 88, 41, 97]
SIZES = [
    dict(n_layer=1),
    dict(n_layer=2, n_embd=128, vocab_size=300, dim_ffn=96),
    dict(n_layer=3, head_size=32, layer0_v=True),
    dict(n_layer=4, vocab_size=65536),
]
each_size = pytest.mark.parametrize("sizes", SIZES, ids=str)


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
        assert_near(mine.wkv[0], state[3 * i + 1])  # (H,value,key) in both
        assert_near(mine.ffn[0], state[3 * i + 2])


@each_size
def test_a_carried_state_equals_the_official_packages(sizes, model_file, official):
    path = model_file(**sizes)
    model, state, states = load_model(path), None, None
    for piece in (TOKENS[:7], TOKENS[7:15], TOKENS[15:]):
        wanted, state = official(path, piece, state)
        found, states = logits_of(model, piece, states)
        assert_near(found, wanted)


def test_bf16_logits_are_at_most_twice_as_wrong_as_the_official_packages(model_file, official):
    path = model_file(n_layer=3, n_embd=128, dtype=torch.bfloat16)
    exact, _ = official(path, TOKENS)
    error = (official(path, TOKENS, dtype="bf16")[0] - exact).square().mean()
    assert (logits_of(load_model(path, torch.bfloat16), TOKENS)[0] - exact).square().mean() <= 4 * error


# ------------------------------------------------------------------------------------------------- state is an argument


@pytest.mark.parametrize("pieces", [(3, 4), (4, 3), (1,) * 7, (6, 1)], ids=str)
def test_feeding_pieces_equals_feeding_the_whole(pieces, model_file):
    model = load_model(model_file(n_layer=2), torch.float64)
    whole, last = logits_of(model, TOKENS[:7])
    states, found, at = None, [], 0
    for n in pieces:
        logits, states = logits_of(model, TOKENS[at: at + n], states)
        found, at = [*found, logits], at + n
    torch.testing.assert_close(torch.cat(found), whole, rtol=1e-11, atol=1e-11)
    for mine, wanted in zip(states, last, strict=True):
        torch.testing.assert_close(mine.wkv, wanted.wkv, rtol=1e-11, atol=1e-11)


def test_rows_of_a_batch_do_not_see_each_other(model_file):
    model = load_model(model_file(n_layer=2), torch.float64)
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

    for grad_cp in (False, True):
        model = load_model(path, wkv=counting, grad_cp=grad_cp)
        calls.clear()
        with torch.no_grad():
            model(torch.tensor([TOKENS]))
        assert len(calls) == 3
        calls.clear()
        x, _ = model(torch.tensor([TOKENS]))
        (x @ model.head.weight.T).logsumexp(-1).sum().backward()
        assert len(calls) == (6 if grad_cp else 3)
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient.abs().max() > 0 and torch.equal(gradient, gradients[1][name]), name


# ---------------------------------------------------------------------------------------------------- files and loading


@each_size
def test_the_architecture_is_read_from_the_file(sizes):
    sizes = dict(n_layer=2, n_embd=64, vocab_size=256, head_size=64, dim_ffn=4 * sizes.get("n_embd", 64)) | sizes
    arch = detect(random_tensors(**sizes), "base.pth")
    rank_v = 16 if sizes["n_layer"] > 1 else 32  # one layer has no v1 to read it from, and no use for it
    assert arch == Arch("x070", sizes["n_layer"], sizes["n_embd"], sizes["n_embd"], sizes["dim_ffn"],
                        sizes["head_size"], sizes["vocab_size"], (("a", 12), ("g", 20), ("v", rank_v), ("w", 8)))


def test_keys_shapes_and_order_of_a_saved_model_are_those_of_a_released_file(model_file):
    wanted = random_tensors(n_layer=3, head_size=32)
    found = load_model(model_file(n_layer=3, head_size=32)).state_dict()
    assert [(name, t.shape) for name, t in found.items()] == [(name, t.shape) for name, t in wanted.items()]


def store(tensors, path):
    torch.save(tensors, path)
    return path


VARIANTS = {
    "vectors as [C]": lambda name, t: (name, t.reshape(-1) if t.shape[:2] == (1, 1) else t),
    "deepspeed": lambda name, t: (f"_forward_module.{name}", t),
    "torch.compile": lambda name, t: (f"_orig_mod.{name}", t),
    "both": lambda name, t: (f"_forward_module._orig_mod.{name}", t),
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


def other_version(**renamed):
    """A file with another version's keys in the place of block attention's own."""
    def change(tensors):
        kept = {n: t for n, t in tensors.items() if ".att." not in n or n.endswith(".weight")}
        return kept | {f"blocks.{i}.att.{name}": torch.zeros(1, 64) for i in range(2) for name in renamed["keys"]}
    return change


BAD_FILES = {  # what is wrong -> (how the file is made, what the error names)
    "missing key": (without("blocks.1.att.w2"), r"lacks blocks\.1\.att\.w2"),
    "missing v0 of layer 1": (without("blocks.1.att.v0"), r"lacks blocks\.1\.att\.v0$"),
    "missing head": (without("head.weight"), r"lacks head\.weight"),
    "unknown key": (lambda t: t | {"blocks.1.att.time_state": torch.zeros(2)}, r"unknown blocks\.1\.att\.time_state$"),
    "unknown key that ends like layer 0's": (lambda t: t | {"blocks.1.att.v3": torch.zeros(2)}, r"unknown.*v3$"),
    "many": (without(*(f"blocks.1.att.x_{m}" for m in "rwkvag")), r"lacks blocks.*and 2 more"),
    "both": (lambda t: without("ln_out.bias")(t) | {"extra": torch.zeros(1)}, r"lacks ln_out.bias; has unknown extra"),
    "gap in the blocks": (renumbered(1, 2), r"\[0, 2\], with gaps"),
    "no block 0": (renumbered(0, 2), r"no RWKV model|gaps"),
    "wrong shape": (lambda t: t | {"head.weight": t["head.weight"][:-1]}, r"head\.weight is \[255, 64\].*\[256, 64\]"),
    "transposed": (lambda t: t | {"blocks.1.ffn.value.weight": t["blocks.1.ffn.value.weight"].T},
                   r"blocks\.1\.ffn\.value\.weight is \[64, 256\].*\[256, 64\]|is \[256, 64\].*\[64, 256\]"),
    "heads without a size": (lambda t: t | {"blocks.1.att.r_k": torch.zeros(64)}, r"blocks\.1\.att\.r_k"),
    "integers": (lambda t: t | {"ln_out.bias": torch.zeros(64, dtype=torch.int8)}, r"ln_out\.bias.*int8"),
    "x060": (other_version(keys=("time_maa_x", "time_maa_w1", "time_decay", "time_faaaa", "gate.weight")), "x060"),
    "x052": (other_version(keys=("time_mix_g", "time_decay", "time_faaaa", "gate.weight")), "x052"),
    "another kind of model": (lambda t: {"model.layers.0.weight": torch.zeros(2)}, "no RWKV model"),
}


@pytest.mark.parametrize("wrong", BAD_FILES)
def test_a_file_that_is_no_whole_model_is_refused_by_name(wrong, tmp_path):
    change, message = BAD_FILES[wrong]
    path = store({n: t.contiguous() for n, t in change(random_tensors(n_layer=2)).items()}, tmp_path / "bad.pth")
    with pytest.raises(Fatal, match=message) as error:
        load_model(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("flag", [dict(n_layer=12), dict(n_embd=768), dict(vocab_size=65536), dict(head_size=32),
                                  dict(version="x060"), dict(dim_att=128), dict(dim_ffn=224)], ids=str)
def test_a_flag_that_contradicts_the_file_is_refused_with_both_values(flag):
    arch = detect(random_tensors(n_layer=2), "base.pth")
    (name, given), = flag.items()
    with pytest.raises(Fatal, match=rf"--{name} {given}.* {getattr(arch, name)};"):
        check_arch(Config(load_model="base.pth", **flag), arch)
    check_arch(Config(load_model="base.pth", **{name: getattr(arch, name)}), arch)


# ---------------------------------------------------------------------------------------------------------- a new model

L, C, N, V = 3, 128, 64, 300


@pytest.fixture(scope="module")
def new():
    """A new model's tensors in float64."""
    torch.manual_seed(1)
    model = RWKV(new_arch(Config(n_layer=L, n_embd=C, vocab_size=V)), wkv7_ref).initialise()
    return {name: t.double() for name, t in model.state_dict().items()}


def formulas(i, c):
    """What RWKV-LM gives channel c of layer i, name by name."""
    rho, tau, delta, lin, z = i / (L - 1), 1 - i / L, c / C, c / (C - 1) - 0.5, (c % 64 - 31.5) / 31.5
    zig = z * abs(z)
    return {
        **{f"att.x_{m}": 1 - delta ** (e * tau) for m, e in zip("rwkvag", (0.2, 0.9, 0.7, 0.7, 0.9, 0.2), strict=True)},
        "att.w0": -6 + 6 * (c / (C - 1)) ** (1 + rho ** 0.3) + 0.5 + 2.5 * zig,
        "att.a0": -0.19 + 0.3 * zig + 0.4 * lin,
        **({"att.v0": 0.73 - 0.4 * lin} if i else {}),
        "att.k_k": 0.71 - 0.1 * lin, "att.k_a": 1.02, "att.r_k": -0.04,
        "att.ln_x.weight": ((1 + i) / L) ** 0.7, "att.ln_x.bias": 0.0,
        "ffn.x_k": 1 - delta ** (tau ** 4),
        "ln1.weight": 1.0, "ln1.bias": 0.0, "ln2.weight": 1.0, "ln2.bias": 0.0,
    }


@pytest.mark.parametrize("layer", range(L))
def test_vectors_of_a_new_model_follow_the_formulas(layer, new):
    for c in range(C):
        for name, wanted in formulas(layer, c).items():
            found = new[f"blocks.{layer}.{name}"].reshape(-1)[c].item()
            assert found == pytest.approx(wanted, abs=4e-6), (name, c)


def assert_orthogonal(W, gain):
    """All singular values are `gain`."""
    torch.testing.assert_close(torch.linalg.svdvals(W), torch.full((min(W.shape),), gain, dtype=W.dtype),
                               rtol=1e-5, atol=0)


def test_matrices_of_a_new_model_are_orthogonal_or_zero(new):
    for i in range(L):
        for name, gain in (("att.receptance.weight", 1.0), ("att.key.weight", 0.1), ("att.value.weight", 1.0),
                           ("ffn.key.weight", 1.0), *((f"att.{m}2", 0.1) for m in ("wag", "wavg")[i > 0])):
            assert_orthogonal(new[f"blocks.{i}.{name}"], gain)
        for name in ("att.output.weight", "ffn.value.weight", *(f"att.{m}1" for m in ("wag", "wavg")[i > 0])):
            assert not new[f"blocks.{i}.{name}"].any(), name
    assert_orthogonal(new["head.weight"], 0.5 * math.sqrt(V / C))
    emb = new["emb.weight"]
    assert 0.99e-4 < emb.abs().max() <= 1e-4 and abs(emb.mean()) < 1e-6


def test_every_weight_of_a_new_model_is_set_and_finite():
    """Built on memory full of NaN, as to_empty may give it; one layer, where the depth ratio would be 0/0."""
    for n_layer in (1, 2):
        model = RWKV(new_arch(Config(n_layer=n_layer, n_embd=64)), wkv7_ref)
        with torch.no_grad():
            for p in model.parameters():
                p.fill_(torch.nan)
        assert all(p.isfinite().all() for p in model.initialise().parameters())


@pytest.mark.parametrize("n_embd, ranks", [
    (768, dict(w=64, a=64, v=32, g=128)), (4096, dict(w=160, a=160, v=96, g=320)), (64, dict(w=32, a=32, v=32, g=32))])
def test_ranks_of_a_new_model_follow_its_width(n_embd, ranks):
    assert dict(new_arch(Config(n_embd=n_embd)).ranks) == ranks


def test_the_blocks_of_a_new_model_add_nothing_yet(new):
    """Their output matrices are zero: the logits are the head's view of the embedding."""
    arch = new_arch(Config(n_layer=L, n_embd=C, vocab_size=V))
    with torch.device("meta"):
        model = RWKV(arch, wkv7_ref)
    fill(model, new, "new.pth", "cpu", torch.float64)
    e = new["emb.weight"][TOKENS[:5]]
    normed = torch.nn.functional.layer_norm(torch.nn.functional.layer_norm(e, (C,)), (C,))
    torch.testing.assert_close(logits_of(model, TOKENS[:5])[0], normed @ new["head.weight"].T)


def test_the_head_size_must_divide_the_width():
    with pytest.raises(Fatal, match=re.escape("--n_embd 100 is no multiple of --head_size 64")):
        new_arch(Config(n_embd=100))
