"""Every way to adapt a model, on bases held in every way, against plain models whose matrices are written out here."""

import re
import shlex
from types import SimpleNamespace

import pytest
import torch
from conftest import load_model, logits_of, random_model
from torch.func import functional_call

import merge as command
import pissa_rwkv as P

TOKENS = [3, 141, 59, 26, 53, 58, 97, 93, 238, 46, 26, 43, 0, 83, 27]
MATRICES = [f"blocks.{i}.{m}" for i in range(2) for m in (
    "att.receptance", "att.key", "att.value", "att.output", "ffn.key", "ffn.value")]
STATES = [f"blocks.{i}.att.time_state" for i in range(2)]
METHODS = {
    "pissa": dict(), "lora": dict(peft="lora", lora_alpha=6.0), "bone": dict(peft="bone", rank=6),
    "bat": dict(peft="bone", bone_mode="bat"), "state": dict(peft="state"),
    "none": dict(peft="none", train_parts=("ln", "head")),
}  # fmt: skip
BESIDE = {"pissa": ["lora_A", "lora_B"], "lora": ["lora_A", "lora_B"], "bone": ["disha"], "bat": ["disha"]}
each_method = pytest.mark.parametrize("method", METHODS)
each_quant = pytest.mark.parametrize("quant", ["none", "int8", "nf4"])


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def adapted_model(path, method, dtype=torch.float64, quant="none", **options):
    """A model with adapters, as `build` makes it."""
    cfg = P.Config(**dict(rank=4, quant=quant) | METHODS[method] | options)
    tensors = P.read_pth(path, "")
    arch, tensors = P.with_time_state(P.detect(tensors, ""), tensors, cfg)
    with torch.device("meta"):
        model = P.RWKV(arch, P.wkv7_ref)
    P.fill(model, tensors, "", "cpu", dtype)
    P.add_adapters(model, cfg, {}, {})
    return model


def loss_of(model, parameters=None):
    """The parameters are put in the model's place of the same names."""
    x, _ = functional_call(model, parameters or {}, (torch.tensor([TOKENS, TOKENS[::-1]]),))
    return (x @ (parameters or {}).get("head.weight", model.head.weight).T).logsumexp(-1).mean()


def written_out(method, W, numbers):
    """The matrix (out,in) that x is multiplied with, for what is frozen of it, W, and what is trained beside it."""
    if method in ("pissa", "lora"):
        A, B = numbers
        return W + dict(pissa=1.0, lora=6.0 / 4)[method] * B @ A
    D, = numbers
    columns = torch.arange(W.shape[1])
    if method == "bone":
        return W + D[columns % len(D)].T
    r, made = D.shape[1], []
    for b, part in enumerate(W.split(r, dim=1)):  # r columns: every block of them times D[b], and D[b] itself
        made.append(part + part @ D[b] + D[b].repeat(len(W) // r, 1))
    return torch.cat(made, 1)


@pytest.mark.parametrize("version", P.TIME_MIX)
def test_merging_knows_the_matrices_that_are_adapted(version):
    with torch.device("meta"):
        model = P.RWKV(P.new_arch(P.Config(version=version, n_layer=2)), None)
    found = [name for name, t in model.state_dict().items() if P.is_matrix(name, t)]
    assert found == [f"{name}.weight" for name in P.adapted(model)] and len(found) >= 12


# ------------------------------------------------------------------------------------------- the start and the formula


@each_method
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_at_first_a_model_computes_what_it_computed_before(method, dtype, tmp_path):
    path = random_model(tmp_path / "base.pth", dtype=dtype)
    before, _ = logits_of(load_model(path, dtype), TOKENS)
    after, _ = logits_of(adapted_model(path, method, dtype), TOKENS)
    if method == "pissa":                                             # (it sums in another order)
        exact, _ = logits_of(load_model(path, torch.float64), TOKENS)
        assert (after - exact).norm() <= 4 * (before - exact).norm()
    else:
        assert torch.equal(before, after)


@each_method
@each_quant
def test_values_and_gradients_are_those_of_the_matrices_written_out(method, quant, tmp_path):
    """In float64, with random numbers in the place of the trained ones, and the frozen matrices as they are read."""
    path = random_model(tmp_path / "base.pth")
    model, plain = adapted_model(path, method, quant=quant), load_model(path, torch.float64)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in trained.values():
            p.add_(0.1 * torch.randn(p.shape, generator=draw, dtype=p.dtype))
    model.run_block = P.GRAD_CP[{"int8": "1", "nf4": "products"}.get(quant, "0")]
    loss_of(model).backward()

    copies = {n: p.detach().clone().requires_grad_() for n, p in trained.items()}
    instead = {n: p for n, p in copies.items() if n in dict(plain.named_parameters())}
    for name in MATRICES:
        W = model.get_submodule(name).frozen.weight
        numbers = [copies[f"{name}.{x}"] for x in BESIDE.get(method, [])]
        instead[f"{name}.weight"] = written_out(method, W, numbers) if numbers else W
        base = plain.get_submodule(name).weight
        assert (W - base).norm() <= (0 if quant == "none" else 0.15) * base.norm() or method == "pissa"
    if method == "state":
        x, states = plain(torch.tensor([TOKENS, TOKENS[::-1]]), None)
        first = [P.BlockState(0 * s.att, copies[n].expand(2, -1, -1, -1), 0 * s.ffn)
                 for n, s in zip(STATES, states, strict=True)]
        x, _ = functional_call(plain, instead, (torch.tensor([TOKENS, TOKENS[::-1]]), first))
        wanted = (x @ plain.head.weight.T).logsumexp(-1).mean()
    else:
        wanted = loss_of(plain, instead)
    assert not torch.equal(wanted, loss_of(plain))
    torch.testing.assert_close(loss_of(model), wanted, rtol=1e-12, atol=0)
    gradients = torch.autograd.grad(wanted, copies.values())
    for (name, p), wanted in zip(trained.items(), gradients, strict=True):
        assert wanted.any(), name
        torch.testing.assert_close(p.grad, wanted, rtol=1e-9, atol=1e-14, msg=name)
    assert not any(p.grad is not None for p in model.parameters() if not p.requires_grad)


def names_with(tensors, parts):
    kinds = {"ln": lambda n: "ln" in n, "emb": lambda n: n == "emb.weight", "head": lambda n: n == "head.weight"}
    return {n for n in tensors for part in parts if part in kinds and kinds[part](n)}


@each_method
@pytest.mark.parametrize("parts", [("auto",), (), ("ln",), ("auto", "emb"), ("emb", "head", "time", "ln")], ids=str)
def test_what_is_trained(method, parts, tmp_path):
    path = random_model(tmp_path / "base.pth")
    tensors, usual = torch.load(path), ("ln",) if method in BESIDE else ()
    wanted = names_with(tensors, [p for part in parts for p in (usual if part == "auto" else (part,))])
    wanted |= {f"{m}.{x}" for m in MATRICES for x in BESIDE.get(method, [])} | {*(STATES if method == "state" else [])}
    if method == "none" and "auto" in parts:
        wanted = set(tensors)
    model = adapted_model(path, method, train_parts=parts)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == wanted
    if wanted:
        decayed = re.compile(r"(^emb|^head|\.(key|value|receptance|output))\.weight$|\.lora_[AB]$|\.disha$")
        trained = ((n, p) for n, p in model.named_parameters() if p.requires_grad)
        optimiser = P.ZeroAdamW(trained, P.Config(weight_decay=0.1))
        for name, where in optimiser.where.items():
            decay, = (d for span, _, d in optimiser.groups if span.start <= where.start < span.stop)
            assert (decay > 0) == bool(decayed.search(name)), name


@pytest.mark.parametrize("method, rank, possible", [
    ("bone", 65, "from 1 to 64"), ("bone", 0, "from 1 to 64"), ("bat", 3, "of 1, 2, 4, 8, 16, 32, 64"),
    ("bat", 128, "of 1, 2, 4"), ("pissa", 65, "from 1 to 64")])
def test_a_rank_that_does_not_fit_is_refused_with_those_that_do(method, rank, possible, tmp_path):
    with pytest.raises(P.Fatal, match=rf"--rank {rank}: blocks\.0\.att\.\w+ is 64 x 64; use a rank {possible}"):
        adapted_model(random_model(tmp_path / "base.pth"), method, rank=rank)


def test_bat_keeps_no_matrix_for_backward_and_makes_one_at_a_time():
    """At most what the frozen matrix takes alone, a few times x, and D; a second matrix of 4 MB would show."""
    draw, r, most = torch.Generator().manual_seed(0), 16, []
    W, x = torch.randn(1024, 1024, generator=draw), torch.randn(1, 4, 1024, generator=draw, requires_grad=True)
    frozen = P.FrozenLinear(W, W.dtype, "int8")
    layer = P.BoneLinear(P.Config(), frozen, disha=torch.randn(64, r, r, generator=draw))
    for module in (frozen, layer):
        kept = []
        with P.Peak("cpu") as peak:
            with torch.autograd.graph.saved_tensors_hooks(lambda t, k=kept: k.append(t.numel()) or t, lambda t: t):
                y = module(x)
            y.sum().backward()
        most.append(peak.most)
    assert most[1] <= most[0] + 2**18 and max(kept) <= layer.disha.numel()


# -------------------------------------------------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("methods")
    random_model(folder / "base.pth")
    (folder / "text.txt").write_text("What a run learns does not matter here. " * 3)
    return folder


def config(place, name, method, **options):
    return P.Config(**dict(load_model=str(place / "base.pth"), data_file=str(place / "text.txt"), rank=4, ctx_len=16,
                           micro_bsz=1, epoch_steps=2, lr_init=1e-2, lr_final=1e-2, accelerator="cpu", op="chunk",
                           proj_dir=str(place / name), grad_cp="0") | METHODS[method] | options)


def finished(place, name, method, **options):
    """A run of two steps in which every trained number moves by about 0.02."""
    run = P.build(config(place, name, method, **options))
    P.train(run)
    return SimpleNamespace(model=run.model.eval(), masters=run.optimiser.masters(), cfg=run.cfg, folder=run.folder)


@each_method
@each_quant
def test_the_merged_file_is_the_adapted_model(method, quant, place):
    run = finished(place, f"{method}-{quant}", method, quant=quant, auto_merge=True)
    file = run.folder / ("rwkv-0.pth" if method == "none" else "rwkv-0-merged.pth")
    base, found = torch.load(place / "base.pth"), torch.load(file, weights_only=True)
    added = STATES if method == "state" else []
    assert [n for n in found if n not in added] == list(base)
    assert all(t.dtype == base[n].dtype and t.shape == base[n].shape for n, t in found.items() if n in base)
    logits, _ = logits_of(run.model, TOKENS)
    again, _ = logits_of(load_model(file), TOKENS)
    first, _ = logits_of(load_model(place / "base.pth"), TOKENS)
    assert (again - logits).abs().max() <= 2e-5 * logits.abs().max() < 1e-2 * (first - logits).abs().max()
    changed = {n for n, t in base.items() if not torch.equal(found[n], t)}
    trained = {n for n in run.masters if n in base}
    held = {f"{m}.weight" for m in MATRICES} if method in BESIDE or quant != "none" else set()
    assert changed == trained | held


@pytest.mark.parametrize("method", ["bone", "bat", "state", "none", "lora"])
def test_a_run_goes_on_from_saved_files(method, place):
    """With --adapter_load in another folder and --epoch_begin in the same, from the fp32 values that were saved."""
    first = finished(place, f"first-{method}", method, quant="int8", precision="bf16")
    load = str(first.folder / "rwkv-0.pth")
    saved, _ = P.read_described(load, "")
    for options in (dict(proj_dir=str(place / f"second-{method}"), adapter_load=load), dict(epoch_begin=1)):
        run = P.build(config(place, f"first-{method}", method, **dict(quant="int8", precision="bf16") | options))
        masters = run.optimiser.masters()
        assert masters.keys() == first.masters.keys() and masters
        for name, t in masters.items():
            assert torch.equal(t, saved[name] if method != "none" else saved[name].bfloat16().float()), name
        if method != "none":                                          # (that quantises what was quantised)
            assert torch.equal(logits_of(run.model.eval(), TOKENS)[0], logits_of(first.model, TOKENS)[0])


@pytest.mark.parametrize("method, other, words", [
    ("bone", "lora", "made with peft lora, but here it is bone"), ("state", "bone", "made with peft bone"),
    ("bat", "bone", "made with mode bone, but here it is bat"), ("lora", "state", "made with peft state")])
def test_a_file_of_another_method_is_refused(method, other, words, place):
    file = place / f"of-{other}" / "rwkv-0.pth"
    if not file.exists():
        finished(place, f"of-{other}", other, epoch_steps=1, rank=4)
    with pytest.raises(P.Fatal, match=words):
        P.build(config(place, "never", method, adapter_load=str(file), rank=4))
    tensors, _ = P.read_described(file, "")                           # and as RWKV-PEFT writes it
    torch.save({n: t.clone() for n, t in tensors.items()}, place / "bare.pth")
    with pytest.raises(P.Fatal, match=r"bare\.pth: blocks\.0\.att\.\w+.* (does not fit this model|is \[)"):
        P.build(config(place, "never", method, adapter_load=str(place / "bare.pth"), rank=4))


# -------------------------------------------------------------------------------------------------------- state tuning


def test_a_learnt_state_is_the_state_a_text_begins_with_and_no_more(place, tmp_path):
    run = finished(place, "state-run", "state")
    states = [run.masters[n] for n in STATES]
    assert all(S.any() and S.shape == (1, 64, 64) for S in states)
    base = load_model(place / "base.pth")
    given = [P.BlockState(torch.zeros(1, 64), S[None], torch.zeros(1, 64)) for S in states]
    logits, after = logits_of(run.model, TOKENS)
    wanted, wanted_after = logits_of(base, TOKENS, given)
    torch.testing.assert_close(logits, wanted, rtol=1e-5, atol=1e-5)
    plain, _ = logits_of(base, TOKENS)
    assert (logits[0] - plain[0]).abs().max() > 1e-2                  # from the first token on
    # A text that goes on begins nowhere: 7 tokens and then 8 are 15.
    _, half = logits_of(run.model, TOKENS[:7])
    torch.testing.assert_close(logits_of(run.model, TOKENS[7:], half)[0], logits[7:], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(after[1].wkv, wanted_after[1].wkv, rtol=1e-5, atol=1e-5)
    models = (run.model, load_model(merged_state(run, tmp_path)))
    assert len({P.generate(model, P.ByteTokenizer(), "some text", 12) for model in models}) == 1


def test_a_block_without_a_memory_has_no_state(tmp_path):
    random_model(tmp_path / "pre.pth", version="x060", n_layer=3, pre_ffn=True)
    names = [n for n, p in adapted_model(tmp_path / "pre.pth", "state").named_parameters() if p.requires_grad]
    assert names == [f"blocks.{i}.att.time_state" for i in (1, 2)]


def merged_state(run, folder):
    P.save(folder / "merged.pth", P.merge_files("state", run.cfg.load_model, "", str(run.folder / "rwkv-0.pth")))
    return folder / "merged.pth"


def test_the_official_package_given_the_state_computes_the_same(place, official):
    """Its state: for each layer the last input of the time mixing, S, the last input of the channel mixing."""
    run = finished(place, "state-official", "state")
    zeros, state = torch.zeros(64), []
    for name in STATES:
        state += [zeros.clone(), run.masters[name].clone(), zeros.clone()]
    wanted, _ = official(place / "base.pth", TOKENS, state)
    logits, _ = logits_of(run.model, TOKENS)
    assert (logits - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_a_base_that_has_states_starts_from_them_and_gives_them_back(place, tmp_path, capsys):
    run = finished(place, "state-base", "state")
    base = merged_state(run, tmp_path)
    order = list(torch.load(base))
    at = order.index("blocks.1.att.time_state")
    assert order[at - 1: at + 2] == ["blocks.1.att.r_k", "blocks.1.att.time_state", "blocks.1.att.receptance.weight"]
    assert "RWKV-7" in capsys.readouterr().out
    more = P.build(config(tmp_path, "more", "state", load_model=str(base), data_file=run.cfg.data_file))
    assert all(torch.equal(t, run.masters[n]) for n, t in more.optimiser.masters().items())
    for method in ("pissa", "lora", "none"):
        parts = dict(train_parts=("ln",))
        tuned = finished(tmp_path, f"on-{method}", method, load_model=str(base), data_file=run.cfg.data_file,
                         auto_merge=True, **parts)
        file = tuned.folder / ("rwkv-0.pth" if method == "none" else "rwkv-0-merged.pth")
        found = torch.load(file, weights_only=True)
        assert list(found) == order and all(torch.equal(found[n], run.masters[n]) for n in STATES)
        wanted, _ = logits_of(tuned.model, TOKENS)
        assert (logits_of(load_model(file), TOKENS)[0] - wanted).abs().max() <= 2e-5 * wanted.abs().max()


@pytest.mark.parametrize("spoil, words", [
    (lambda t: {n: x for n, x in t.items() if n != STATES[1]}, "missing blocks.1.att.time_state"),
    (lambda t: t | {STATES[0]: torch.zeros(2, 32, 32, 1)}, "time_state is [2, 32, 32, 1]"),
    (lambda t: t | {STATES[0]: torch.zeros(2, 64, 64)}, "time_state is [2, 64, 64]|64 wide"),
    (lambda t: t | {"blocks.2.att.time_state": torch.zeros(1, 64, 64)}, "holds blocks.2.att.time_state"),
])
def test_states_that_do_not_fit_are_not_merged(spoil, words, tmp_path, capsys):
    base = random_model(tmp_path / "base.pth")
    torch.save(spoil({n: torch.ones(1, 64, 64) for n in STATES}), tmp_path / "state.pth")
    with pytest.raises(P.Fatal) as error:
        P.merge_files("state", str(base), "", str(tmp_path / "state.pth"))
    assert all(word in str(error.value) for word in words.split("|"))
    assert "the official `rwkv` package" not in capsys.readouterr().out  # of a file that is not made


# --------------------------------------------------------------------------------------------------- RWKV-PEFT's files


@pytest.mark.parametrize("key", ["bone", "disha"])
@pytest.mark.parametrize("method", ["bone", "bat"])
@pytest.mark.parametrize("quant", ["none", "nf4"])
def test_bone_of_rwkv_peft_is_known_by_its_shape(key, method, quant, tmp_path):
    """Undescribed, in bf16, with a rank that does not divide the width where that may be."""
    base, draw = random_model(tmp_path / "base.pth"), torch.Generator().manual_seed(1)
    tensors, numbers = torch.load(base), {}
    for name in MATRICES:
        out, inputs = tensors[f"{name}.weight"].shape
        shape = dict(bone=(6, out), bat=(inputs // 4, 4, 4))[method]
        numbers[f"{name}.{key}"] = (0.1 * torch.randn(shape, generator=draw)).bfloat16()
    torch.save(numbers, tmp_path / "rwkv-0.pth")
    line = f"--type bone --base_model {base} --lora_checkpoint {tmp_path}/rwkv-0.pth --output {tmp_path}/merged.pth"
    assert command.main([*line.split(), "--quant", quant]) == 0
    found = torch.load(tmp_path / "merged.pth")
    for name in MATRICES:
        W = tensors[f"{name}.weight"]
        W = W if quant == "none" else P.QUANT[quant].through(W, torch.bfloat16).float()
        wanted = written_out(method, W.double(), [numbers[f"{name}.{key}"].double()])
        torch.testing.assert_close(found[f"{name}.weight"].double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("words, wanted", [
    ("""--peft bone --bone_config '{"bone_load": "x.pth", "bone_r": 64}'""", ("bone", 64, "bone", "x.pth")),
    ("""--peft bone --bone_config '{"bone_mode": "bat", "bone_load": "", "bone_r": 16}'""", ("bone", 16, "bat", "")),
    ("""--peft disha --disha_config '{"mode": "bat", "load": "y.pth", "r": 64}'""", ("bone", 64, "bat", "y.pth")),
])
def test_options_as_rwkv_peft_writes_them(words, wanted):
    cfg = P.parse(shlex.split(words))
    assert (cfg.peft, cfg.rank, cfg.bone_mode, cfg.adapter_load) == wanted


def test_a_file_holds_nothing_but_what_was_trained(place):
    """Programs that take up a state count the layers of such a file."""
    if not (file := place / "state-none" / "rwkv-0.pth").exists():
        finished(place, "state-none", "state")
    assert [*torch.load(file, weights_only=True)] == [f"blocks.{i}.att.time_state" for i in range(2)]


def test_what_a_file_says_of_itself(place):
    """So that it is merged and loaded where it belongs."""
    for method, wanted in (("bone", dict(peft="bone", mode="bone", rank=6)), ("bat", dict(mode="bat", rank=4)),
                           ("state", dict(peft="state")), ("lora", dict(rank=4, scale=1.5))):
        file = place / f"{method}-nf4" / "rwkv-0.pth"
        if not file.exists():
            finished(place, f"{method}-nf4", method, quant="nf4")
        about = P.read_described(file, "")[1]
        assert about.items() >= (wanted | dict(quant="nf4", version="x070", dtype="float32")).items()
