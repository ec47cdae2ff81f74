"""Merged files in the official `rwkv` package against the model with its adapters; and what merge.py refuses."""

import json
import re
import subprocess
import sys
import weakref
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import load_model, logits_of, random_tensors

import merge as command
import pissa_rwkv
from pissa_rwkv import Config, Fatal, PiSSALinear, build, merge_files, parse, read_described, save, train

TOKENS = [3, 141, 59, 26, 53, 58, 97, 93, 238, 46, 26, 43, 0, 83, 27]
MATRICES = [f"blocks.{i}.{m}" for i in range(2) for m in (
    "att.receptance", "att.key", "att.value", "att.output", "ffn.key", "ffn.value")]


def finished(folder, base, **options):
    """A run of two steps, in which every trained weight moves by about 0.02, and the files it leaves."""
    (text := folder.with_suffix(".txt")).write_text("What a run learns does not matter here. " * 3)
    run = build(Config(**dict(load_model=str(base), data_file=str(text), proj_dir=str(folder), rank=4, ctx_len=16,
                              micro_bsz=1, epoch_steps=2, lr_init=1e-2, lr_final=1e-2, accelerator="cpu", op="torch",
                              precision="fp32") | options))
    train(run)
    return SimpleNamespace(model=run.model.eval(), masters=run.optimiser.masters(), kind=run.cfg.peft, base=base,
                           init=folder / "init_pissa.pth", checkpoint=folder / "rwkv-0.pth",
                           output=folder / "merged.pth")


def merged(run, **changed):
    """The tensors of the merged file."""
    run = SimpleNamespace(**vars(run) | changed)
    save(run.output, merge_files(run.kind, str(run.base), str(run.init), str(run.checkpoint)))
    return torch.load(run.output, weights_only=True)


def exact(run, name, scale):
    """W - B0 A0 + scale B A in float64, from the files."""
    init = torch.load(run.init, weights_only=True) if run.kind == "pissa" else {}
    trained, W = torch.load(run.checkpoint, weights_only=True), torch.load(run.base)[f"{name}.weight"].double()
    A, B = (trained[f"{name}.lora_{x}"].double() for x in "AB")
    taken = init[f"{name}.init_lora_B"].double() @ init[f"{name}.init_lora_A"].double() if init else 0.0
    return W - taken + scale * B @ A


def spoilt(path, change):
    """Rewrites a file."""
    tensors, about = read_described(path, "")
    save(path, change(tensors), about or None)


def without_description(path):
    torch.save(torch.load(path, weights_only=True), path)


# ------------------------------------------------------------------------------------------------------ what is merged


@pytest.mark.parametrize("version, options", [
    ("x070", dict()), ("x070", dict(svd_niter=0, rank=16)), ("x070", dict(peft="lora", lora_alpha=6.0)),
    ("x070", dict(train_parts=("emb", "head", "ln"))), ("x060", dict()), ("x052", dict()),
    ("x060", dict(peft="lora")),
], ids=str)
def test_the_merged_file_in_the_official_package_is_the_model_with_adapters(
    version, options, model_file, tmp_path, official
):
    run = finished(tmp_path / "run", model_file(n_layer=2, n_embd=128, version=version), **options)
    merged(run)
    wanted, _ = logits_of(run.model, TOKENS)
    found, _ = official(run.output, TOKENS)
    base, _ = official(run.base, TOKENS)
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max() < 1e-3 * (found - base).abs().max()


@pytest.mark.parametrize("dtype, half_spacing", [(torch.float32, 2**-24), (torch.bfloat16, 2**-8)])
@pytest.mark.parametrize("options, scale", [(dict(), 1.0), (dict(peft="lora", lora_alpha=6.0), 1.5)], ids=str)
def test_every_merged_matrix_is_the_formula_rounded_once(dtype, half_spacing, options, scale, model_file, tmp_path):
    run = finished(tmp_path / "run", model_file(dtype=dtype), precision="bf16" if dtype == torch.bfloat16 else "fp32",
                   **options)
    found = merged(run)
    for name in MATRICES:
        wanted, W = exact(run, name, scale), found[f"{name}.weight"]
        assert W.dtype == dtype
        # one rounding to the file's dtype, and what ten roundings in fp32 of numbers up to the largest may do
        bound = half_spacing * wanted.abs() + 10 * 2**-24 * wanted.abs().max()
        assert ((W.double() - wanted).abs() <= bound).all(), name


@pytest.mark.parametrize("peft", ["pissa", "lora"])
def test_trained_parts_replace_the_bases_and_all_else_is_copied(peft, model_file, tmp_path):
    run = finished(tmp_path / "run", model_file(), peft=peft)
    base, found = torch.load(run.base), merged(run)
    replaced = {name for name in base if "ln" in name}
    for name, W in base.items():
        if name in replaced:
            assert torch.equal(found[name], run.masters[name]) and not torch.equal(found[name], W), name
        elif name.removesuffix(".weight") not in MATRICES:
            assert torch.equal(found[name], W), name


def test_keys_order_shapes_and_dtypes_are_the_bases_whatever_these_are(tmp_path):
    """A base with layer 0's unused v0 v1 v2, vectors as [C], dtypes mixed, keys in another order."""
    tensors = random_tensors(n_layer=2, layer0_v=True)
    dtypes = [torch.bfloat16, torch.float32, torch.float16]
    odd = {name: t.flatten() if t.shape[:2] == (1, 1) else t for name, t in reversed(tensors.items())}
    odd = {name: t.to(dtypes[i % 3]) for i, (name, t) in enumerate(odd.items())}
    torch.save(odd, tmp_path / "odd.pth")
    found = merged(finished(tmp_path / "run", tmp_path / "odd.pth"))
    assert type(found) in (dict, OrderedDict)
    assert [(n, t.shape, t.dtype) for n, t in found.items()] == [(n, t.shape, t.dtype) for n, t in odd.items()]
    assert all(t.is_contiguous() for t in found.values())
    assert all(found[f"blocks.0.att.v{i}"].isnan().all() for i in "012")


@pytest.mark.parametrize("write", [save, command.save_st])
def test_a_matrix_is_made_when_it_is_asked_for_and_none_is_kept(write, model_file, tmp_path, monkeypatch):
    run, alive, most = finished(tmp_path / "run", model_file()), weakref.WeakSet(), []
    residual = PiSSALinear.residual

    def seen(*args):
        alive.add(W := residual(*args))
        most.append(len(alive))
        return W

    monkeypatch.setattr(PiSSALinear, "residual", staticmethod(seen))
    found = merge_files(run.kind, str(run.base), str(run.init), str(run.checkpoint))
    assert not most and next(found)[0] == "emb.weight" and not most   # (all was compared with the base before)
    write(run.output, found)
    assert most == [1] * len(MATRICES)


def test_merging_what_was_not_trained_gives_the_base_again(model_file, tmp_path):
    run = finished(tmp_path / "run", model_file(dtype=torch.bfloat16), precision="bf16")
    start = torch.load(run.init, weights_only=True)
    spoilt(run.checkpoint, lambda t: {n: start[n.replace("lora_", "init_lora_")] for n in t if ".lora_" in n})
    base, found = torch.load(run.base), merged(run)
    for name, W in base.items():  # (W - P) + P errs by 2^-24 of P at most twice: seen only in numbers much below P
        assert (found[name].float() - W.float()).abs().max() <= 2**-22 * W.abs().max(), name


def test_files_whose_description_is_a_tensor_are_read_too(model_file, tmp_path):
    """As they were written until November 2026."""
    run = finished(tmp_path / "run", model_file(), peft="lora", lora_alpha=6.0)
    known = merged(run)
    tensors, about = read_described(run.checkpoint, "")
    text = torch.tensor([*json.dumps(about).encode()], dtype=torch.uint8)
    torch.save({n: t.clone() for n, t in tensors.items()} | {"pissa_rwkv.json": text}, old := tmp_path / "old.pth")
    old.replace(run.checkpoint)                                       # (which is mapped)
    assert read_described(run.checkpoint, "")[1] == about
    again = merged(run, output=tmp_path / "again.pth")                # without --lora_alpha: the file tells it
    assert again.keys() == known.keys() and all(torch.equal(t, known[name]) for name, t in again.items())


# ---------------------------------------------------------------------------------------------------- RWKV-PEFT's files


def as_rwkv_peft(path, prefix, dtype):
    """Rewrites a file of ours as RWKV-PEFT writes it: no description, keys with or without `model.`."""
    without_description(path)
    spoilt(path, lambda t: {prefix + n: x.to(dtype) for n, x in t.items()})


@pytest.mark.parametrize("prefix", ["model.", ""])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_files_of_rwkv_peft_are_merged_alike(prefix, dtype, model_file, tmp_path, capsys):
    run = finished(tmp_path / "run", model_file())
    as_rwkv_peft(run.checkpoint, "", dtype)
    as_rwkv_peft(run.init, prefix, torch.float32)
    found = merged(run)
    assert "no description" in capsys.readouterr().out
    spoilt(run.init, lambda t: {n.removeprefix("model."): x for n, x in t.items()})
    for name in MATRICES:
        torch.testing.assert_close(found[f"{name}.weight"].double(), exact(run, name, 1.0), rtol=1e-6, atol=1e-6)
    assert torch.equal(found["ln_out.weight"], run.masters["ln_out.weight"].to(dtype).float())


def test_lora_of_rwkv_peft_needs_its_alpha(model_file, tmp_path, capsys):
    run = finished(tmp_path / "run", model_file(), peft="lora", lora_alpha=6.0)
    as_rwkv_peft(run.checkpoint, "", torch.float32)
    line = ["--type", "lora", "--base_model", str(run.base), "--lora_checkpoint", str(run.checkpoint),
            "--output", str(run.output)]
    assert command.main(line) == 2 and "--lora_alpha" in capsys.readouterr().err
    assert command.main([*line, "--lora_alpha", "6"]) == 0
    found = torch.load(run.output)
    for name in MATRICES:
        torch.testing.assert_close(found[f"{name}.weight"].double(), exact(run, name, 1.5), rtol=1e-6, atol=1e-6)


# ------------------------------------------------------------------------------------------------------ what is refused


def test_another_base_is_refused(model_file, tmp_path):
    run = finished(tmp_path / "run", model_file())
    with pytest.raises(Fatal, match=r"rwkv-0\.pth: for another base model: made with base \w+, but here it is \w+"):
        merged(run, base=model_file(name="other.pth", seed=1))
    tensors = torch.load(run.base)
    tensors["blocks.1.att.w0"][0, 0, 5] += 0.5  # one weight
    torch.save(tensors, tmp_path / "almost.pth")
    with pytest.raises(Fatal, match="made with base"):
        merged(run, base=tmp_path / "almost.pth")
    assert not run.output.exists()


def test_the_init_file_of_another_run_is_refused(model_file, tmp_path):
    run = finished(tmp_path / "run", model_file())
    other = finished(tmp_path / "other", run.base, random_seed=1)
    with pytest.raises(Fatal, match=r"other/init_pissa\.pth: from another run: made with init \w+, but here it is \w+"):
        merged(run, init=other.init)


@pytest.mark.parametrize("kind", ["pissa", "lora"])
def test_adapters_of_another_kind_are_refused(kind, model_file, tmp_path):
    run = finished(tmp_path / "run", model_file(), peft=kind)
    pissa = finished(tmp_path / "pissa", run.base)
    other = {"pissa": "lora", "lora": "pissa"}[kind]
    with pytest.raises(Fatal, match=f"made with peft {kind}, but here it is {other}"):
        merged(run, kind=other, init=pissa.init)


BAD_CHECKPOINTS = {  # of RWKV-PEFT, which describes nothing: what is wrong -> (change, what the error names)
    "a factor is missing": (lambda t: {n: x for n, x in t.items() if n != "blocks.1.att.key.lora_B"},
                            r"blocks\.1\.att\.key\.lora_B"),
    "the other factor is missing": (lambda t: {n: x for n, x in t.items() if n != "blocks.1.att.key.lora_A"},
                                    r"blocks\.1\.att\.key\.lora_A"),
    "more layers": (lambda t: t | {"blocks.7.ln1.bias": torch.zeros(64)}, r"holds blocks\.7\.ln1\.bias"),
    "another rank": (lambda t: {n: x[:2] if n.endswith("lora_A") else x[:, :2] if n.endswith("lora_B") else x
                                for n, x in t.items()}, r"init_lora_A is \[4, 64\], expected \[2, 64\]"),
    "a part of another size": (lambda t: t | {"ln_out.bias": torch.zeros(65)}, r"ln_out\.bias is \[65\].*\[64\]"),
}


@pytest.mark.parametrize("wrong", BAD_CHECKPOINTS)
def test_a_checkpoint_that_does_not_fit_is_refused_by_name(wrong, model_file, tmp_path):
    change, message = BAD_CHECKPOINTS[wrong]
    run = finished(tmp_path / "run", model_file())
    without_description(run.checkpoint)
    spoilt(run.checkpoint, change)
    with pytest.raises(Fatal, match=message):
        merged(run)
    assert not run.output.exists()


@pytest.mark.parametrize("n_embd", [64, 192])
def test_a_base_of_another_width_is_refused_with_both_widths(n_embd, model_file, tmp_path):
    run = finished(tmp_path / "run", model_file(n_embd=128))
    spoilt(run.checkpoint, lambda t: {n: x for n, x in t.items() if ".lora_" in n})
    without_description(run.checkpoint), without_description(run.init)
    with pytest.raises(Fatal, match=r"blocks\.0\.att\.receptance") as error:
        merged(run, base=model_file(name="other.pth", n_embd=n_embd))
    assert f"[{n_embd}, {n_embd}]" in str(error.value) and "lora_A [4, 128]" in str(error.value)


@pytest.mark.parametrize("kind", ["pissa", "bone"])
def test_a_base_of_the_same_width_with_more_layers_is_refused(kind, model_file, tmp_path):
    """RWKV-7 of 7.2B and of 13.3B are both 4096 wide, and RWKV-PEFT's files do not say of which they are."""
    run = finished(tmp_path / "run", model_file(n_layer=2), peft=kind)
    without_description(run.checkpoint)
    if run.init.exists():
        without_description(run.init)
    with pytest.raises(Fatal, match="holds adapters for 2 of the base's 3 blocks; is it for another model"):
        merged(run, base=model_file(name="deeper.pth", n_layer=3))
    assert not run.output.exists()


# ----------------------------------------------------------------------------------------------------- the command line


def arguments(run, init="--lora_init", checkpoint="--lora_checkpoint"):
    return ["--type", run.kind, "--base_model", str(run.base), init, str(run.init), checkpoint, str(run.checkpoint),
            "--output", str(run.output)]


def test_the_command_merges_under_both_spellings_of_its_flags(model_file, tmp_path, capsys):
    run = finished(tmp_path / "run", model_file())
    done = subprocess.run([sys.executable, "merge.py", *arguments(run)], capture_output=True, text=True,
                          cwd=Path(command.__file__).parent, timeout=120)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, f"merged: {run.output}"), done.stderr
    first = torch.load(run.output)
    run.output = tmp_path / "again.pth"
    assert command.main(arguments(run, "--pissa_init", "--pissa_checkpoint")) == 0
    again = torch.load(run.output)
    assert list(first) == list(again) and all(torch.equal(t, again[name]) for name, t in first.items())
    wanted, _ = logits_of(run.model, TOKENS)
    assert (logits_of(load_model(run.output), TOKENS)[0] - wanted).abs().max() <= 1e-5 * wanted.abs().max()


@pytest.mark.parametrize("flag", ["lora", "pissa", "bone", "peft", "state"])
def test_the_words_of_rwkv_peft_are_taken_too(flag):
    line = ["--type", "disha", "--base_model", "m", f"--{flag}_checkpoint", "c", "--output", "o", "--device", "cuda"]
    args = command.parser().parse_args(line)
    assert args.lora_checkpoint == "c" and command.TYPE[args.type] == command.TYPE["bone"]


def refused(capsys, argv):
    """The one line on stderr of a command that exits 2."""
    capsys.readouterr()
    assert command.main(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("merge.py: error: ") and error.count("\n") == 1
    return error


def test_the_command_refuses_in_one_line(model_file, tmp_path, capsys):
    run = finished(tmp_path / "run", model_file())
    line = arguments(run)
    run.output.write_bytes(b"precious")
    assert f"--output {run.output} exists already" in refused(capsys, line)
    assert run.output.read_bytes() == b"precious"
    run.output.unlink()
    assert "no such folder" in refused(capsys, [*line[:-1], str(tmp_path / "nowhere" / "merged.pth")])
    assert "--lora_init is missing" in refused(capsys, [a for a in line if a not in ("--lora_init", str(run.init))])
    assert "--base_model" in refused(capsys, line[:2] + line[4:])
    assert "bone" in refused(capsys, ["--type", "bone", *line[2:]])
    assert "no such file" in refused(capsys, [*line[:3], str(tmp_path / "none.pth"), *line[4:]])
    assert "--output_dir" in refused(capsys, [*line, "--output_dir", "x"])
    assert not run.output.exists()


def test_the_bar_is_gone_before_the_error_is_printed(model_file, tmp_path, monkeypatch, capsys):
    """On a terminal the line would otherwise begin where the bar ends."""
    def bar(items, what):
        try:
            yield from items
        finally:
            print("gone", file=sys.stderr)

    run = finished(tmp_path / "run", model_file())
    monkeypatch.setattr(pissa_rwkv, "progress", bar)
    monkeypatch.setattr(pissa_rwkv, "write_part", lambda *_: open(tmp_path / "nowhere" / "x"))
    assert command.main(arguments(run)) == 2
    assert "gone\nmerge.py: error: cannot write " in capsys.readouterr().err


def test_ctrl_c_leaves_nothing(model_file, tmp_path, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    run = finished(tmp_path / "run", model_file())
    before = {*tmp_path.rglob("*")}
    monkeypatch.setattr(pissa_rwkv, "write_part", interrupted)
    assert command.main(arguments(run)) == 130
    assert capsys.readouterr().err.endswith("merge.py: stopped; nothing was written\n")
    assert {*tmp_path.rglob("*")} == before


@pytest.mark.parametrize("peft", ["pissa", "lora"])
def test_an_alpha_that_contradicts_the_run_never_changes_the_result(peft, model_file, tmp_path, capsys):
    """PiSSA has no alpha; a LoRA of ours knows its own. Another one is refused, or has no effect."""
    run = finished(tmp_path / "run", model_file(), peft=peft, lora_alpha=6.0)
    line = [a for a in arguments(run) if peft == "pissa" or a not in ("--lora_init", str(run.init))]
    if command.main([*line, "--lora_alpha", "20"]) == 0:
        found = torch.load(run.output)
        for name in MATRICES:
            wanted = exact(run, name, dict(pissa=1.0, lora=1.5)[peft])
            torch.testing.assert_close(found[f"{name}.weight"].double(), wanted, rtol=1e-6, atol=1e-6)
    else:
        assert "--lora_alpha 20" in capsys.readouterr().err


# Of what lies in a block: name in the .pth -> name in the .st, whether the last two dims are swapped. The rest stays.
OTHERWISE = {
    "x070": {f"att.{m}{i}": (f"att.{m}{i}", True) for m in "wavg" for i in "12"},
    "x060": {f"att.time_maa_{m}": (f"att.time_mix_{m}", False) for m in "xwkvrg"} | {
        "att.time_maa_w1": ("att.time_mix_w1", True), "att.time_maa_w2": ("att.time_mix_w2", True),
        "att.time_decay_w1": ("att.time_decay_w1", True), "att.time_decay_w2": ("att.time_decay_w2", True),
        "att.time_faaaa": ("att.time_first", False),
        "ffn.time_maa_k": ("ffn.time_mix_k", False), "ffn.time_maa_r": ("ffn.time_mix_r", False)},
    "x052": {"att.time_faaaa": ("att.time_first", False)},
}


@pytest.mark.parametrize("version", OTHERWISE)
def test_a_file_for_web_rwkv(version, tmp_path):
    """.st: fp16, names in lower case, some of them and layouts changed; opened with the format's own package."""
    from safetensors import safe_open

    base = random_tensors(seed=3, version=version, layer0_v=True, pre_ffn=version == "x052")  # (of x070: NaN, unused)
    base |= {"blocks.1.att.time_state": torch.randn(1, 64, 64)}
    otherwise = OTHERWISE[version] | {"att.time_state": ("att.time_state", True)}
    command.save_st(tmp_path / "m.st", base.items())
    (tmp_path / "plain").touch()
    assert (tmp_path / "m.st").stat().st_mode == (tmp_path / "plain").stat().st_mode
    with safe_open(tmp_path / "m.st", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        left = set(file.keys())
        for name, t in base.items():
            _, i, leaf = name.split(".", 2) if name.startswith("blocks.") else ("", "", name)
            new, swapped = otherwise.get(leaf, (leaf, False))
            wanted = (torch.einsum("...ij->...ji", t) if swapped else t).half()
            left.remove(new := (f"blocks.{i}.{new}" if i else new).lower())
            found = file.get_tensor(new)
            assert found.dtype == torch.float16 and torch.allclose(found, wanted, 0, 0, equal_nan=True), name
        assert not left


def test_two_names_that_become_one_are_refused(tmp_path):
    with pytest.raises(Fatal, match="two tensors would be called emb.weight"):
        command.save_st(tmp_path / "m.st", [("emb.weight", torch.ones(2, 2)), ("EMB.weight", torch.ones(2, 2))])
    assert not [*tmp_path.iterdir()]


def test_more_tensors_than_the_header_has_room_for_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "HEADER", 64)
    with pytest.raises(Fatal, match="its header has no room for 1 tensors"):
        command.save_st(tmp_path / "m.st", [("emb.weight", torch.ones(2, 2))])
    assert not [*tmp_path.iterdir()]


def test_a_number_too_large_for_fp16_is_refused(tmp_path):
    with pytest.raises(Fatal, match="emb.weight has numbers beyond"):
        command.save_st(tmp_path / "m.st", [("emb.weight", torch.full((2, 2), 1e5))])
    assert not (tmp_path / "m.st").exists()


# ---------------------------------------------------------------------------------------------- PiSSA written as a LoRA


def as_lora(run, *more):
    """`run` with --type pissa2lora: the file it wrote, as a run of LoRA; the command line of the merge of that."""
    lora = SimpleNamespace(kind="lora", base=run.base, checkpoint=run.output.with_name("lora.pth"), init="",
                           output=run.output.with_name("merged-lora.pth"))
    line = ["--type", "pissa2lora", *arguments(run)[2:-2], "--output", str(lora.checkpoint), *more]
    return lora, line, ["--type", "lora", "--base_model", str(run.base), "--lora_checkpoint", str(lora.checkpoint),
                        "--output", str(lora.output), "--lora_alpha", "8"]


@pytest.mark.parametrize("dtype, spacing", [(torch.float32, 2**-22), (torch.bfloat16, 2**-7)], ids=str)
def test_pissa_written_as_a_lora_merges_to_the_same_weights(dtype, spacing, model_file, tmp_path, capsys):
    run = finished(tmp_path / "run", model_file(dtype=dtype), precision="bf16" if dtype == torch.bfloat16 else "fp32")
    _, write, merge = as_lora(run)
    assert command.main(write) == 0
    said = re.search(r"rank 8, to be used with alpha 8(?s:.*) but for (\S+) of a matrix's", capsys.readouterr().out)
    assert command.main(merge) == 0
    direct, found = merged(run), torch.load(merge[7], weights_only=True)
    assert list(found) == list(direct)
    for name, W in direct.items():
        bound = spacing * W.float().abs().max() if name.removesuffix(".weight") in MATRICES else 0.0
        assert ((found[name].float() - W.float()).abs() <= bound).all(), name
    matrices = [(found[f"{name}.weight"].float(), direct[f"{name}.weight"].float()) for name in MATRICES]
    assert said[1] == f"{max((x - W).abs().max() / W.abs().max() for x, W in matrices):.0e}"


def test_a_quantised_base_is_refused_though_only_the_init_tells(model_file, tmp_path, capsys):
    run = finished(tmp_path / "run", model_file(), quant="nf4")
    torch.save(torch.load(run.checkpoint), run.checkpoint)            # (by a program that drops its description)
    lora, write, _ = as_lora(run)
    assert command.main(write) == 2 and not lora.checkpoint.exists()
    assert "held as nf4" in capsys.readouterr().err


def test_apart_is_a_distance_whatever_its_sign():
    assert command.apart(torch.tensor([1.0, -3.0]), torch.tensor([1.5, 2.0])) == 2.5


def test_the_lora_has_the_names_and_shapes_of_rwkv_peft(model_file, tmp_path):
    run = finished(tmp_path / "run", model_file())
    lora, write, _ = as_lora(run)
    assert command.main(write) == 0
    found, init = torch.load(lora.checkpoint, weights_only=True), torch.load(run.init, weights_only=True)
    factors = {f"{name}.lora_{x}" for name in MATRICES for x in "AB"}
    assert set(found) == factors | {name for name in torch.load(run.base) if "ln" in name}
    assert all(t.dtype == torch.float32 for t in found.values())
    for name in MATRICES:
        A, B = (found[f"{name}.lora_{x}"] for x in "AB")
        (A0, A1), (B0, B1) = A.split(4), B.split(4, dim=1)
        assert torch.equal(A0, run.masters[f"{name}.lora_A"]) and torch.equal(B0, run.masters[f"{name}.lora_B"])
        assert torch.equal(A1, init[f"{name}.init_lora_A"]) and torch.equal(B1, -init[f"{name}.init_lora_B"])


def test_training_goes_on_from_the_lora_at_the_adapted_model(model_file, tmp_path):
    run = finished(tmp_path / "run", model_file())
    lora, write, _ = as_lora(run)
    assert command.main(write) == 0
    config = f'{{"lora_load": "{lora.checkpoint}", "lora_r": 8, "lora_alpha": 8}}'
    there = build(parse(["--load_model", str(run.base), "--data_file", str(tmp_path / "run.txt"), "--proj_dir",
                         str(tmp_path / "there"), "--peft", "lora", "--lora_config", config, "--ctx_len", "16",
                         "--accelerator", "cpu", "--op", "torch", "--precision", "fp32"]))
    wanted, _ = logits_of(run.model, TOKENS)
    found, _ = logits_of(there.model.eval(), TOKENS)
    base, _ = logits_of(load_model(run.base), TOKENS)
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max() < 1e-3 * (base - wanted).abs().max()


@pytest.mark.parametrize("described, flag", [(True, []), (True, ["--quant", "none"]), (False, ["--quant", "nf4"])])
def test_pissa_on_a_quantised_base_is_no_lora(described, flag, model_file, tmp_path, capsys):
    run = finished(tmp_path / "run", model_file(), quant="nf4")
    if not described:
        as_rwkv_peft(run.checkpoint, "", torch.float32)
    lora, write, _ = as_lora(run, *flag)
    assert "held as nf4" in refused(capsys, write) and not lora.checkpoint.exists()


def test_a_lora_is_a_pth_and_belongs_to_its_base(model_file, tmp_path, capsys):
    run = finished(tmp_path / "run", model_file())
    _, write, _ = as_lora(run)
    assert "--lora_init is missing" in refused(capsys, write[:4] + write[6:])
    assert "'.pth'" in refused(capsys, [*write[:-1], str(tmp_path / "lora.st")])
    assert "--quant nf4" in refused(capsys, [*write, "--quant", "nf4"])
    assert "holds no adapters" in refused(capsys, [*write[:7], str(run.base), *write[8:]])
    other = model_file(name="other.pth", seed=1)
    assert "made with base" in refused(capsys, [*write[:3], str(other), *write[4:]])
