"""Every flag of the tutorial's tables, of its run_pissa.sh and its merge_pissa.sh, seen doing what the tutorial says.

One test a flag, named test_<flag>: small runs, with the flag and without or with two of its values.
"""

import json
import math
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import logits_of, random_model, random_tensors

import merge
import pissa_rwkv as P

FLAGS = """load_model proj_dir data_file n_layer n_embd micro_bsz epoch_save epoch_steps ctx_len pissa_config data_type
vocab_size epoch_count epoch_begin pre_ffn head_qk lr_init lr_final warmup_steps beta1 beta2 adam_eps accelerator
devices precision strategy grad_cp my_testing dataload loss_mask fla op peft quant train_parts wandb lr_schedule
""".split()
MERGE_FLAGS = "base_model lora_init pissa_init lora_checkpoint pissa_checkpoint output type quant".split()

TEXTS = ["User: hello there\n\nAssistant: hi", "one more line of text", "User: 2+2?\n\nAssistant: 4", "and a last one"]


def test_every_flag_has_a_test():
    tests = {name.removeprefix("test_") for name in globals()} | {"devices", "strategy"}  # (which share one)
    assert [flag for flag in FLAGS if flag not in tests] == []
    assert {f"merge_{flag}" for flag in MERGE_FLAGS if f"test_merge_{flag}" not in globals()} == SEEN_ABOVE


@pytest.fixture
def place(tmp_path):
    random_model(tmp_path / "base.pth")
    (tmp_path / "data.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS))
    return tmp_path


COMMON = dict(op="torch", ctx_len=8, micro_bsz=2, epoch_steps=2, rank=4, lr_init=1e-4, lr_final=1e-4)


@pytest.fixture
def cfg(place):
    """cfg(name=value, ...) -> the Config of a small run."""
    def make(**flags):
        common = COMMON | dict(load_model=place / "base.pth", data_file=place / "data.jsonl", proj_dir=place / "out")
        words = [w for name, value in (common | flags).items() if value is not None for w in
                 ([f"--{name}", *map(str, value)] if isinstance(value, (list, tuple)) else [f"--{name}", str(value)])]
        return P.parse(words)
    return make


@pytest.fixture
def build(cfg):
    return lambda **flags: P.build(cfg(**flags))


@pytest.fixture
def train(build):
    """train(name=value, ...) -> the run, trained."""
    def run(**flags):
        run = build(**flags)
        P.train(run)
        return run
    return run


def logged(run, key):
    return [json.loads(line)[key] for line in (run.folder / "loss_data.jsonl").read_text().splitlines()]


def files(folder):
    return sorted(p.name for p in folder.glob("rwkv-*.pth"))


# ------------------------------------------------------------------------------------------------- paths and sizes


def test_load_model(build, place):
    random_model(place / "other.pth", seed=1)
    fingerprints = [build(proj_dir=place / n, load_model=place / f"{n}.pth").about["base"] for n in ("base", "other")]
    assert fingerprints == [P.fingerprint(P.read_pth(place / f"{n}.pth", "")) for n in ("base", "other")]


def test_proj_dir(train, place):
    train(proj_dir=place / "deep" / "here")
    assert {"rwkv-0.pth", "init_pissa.pth", "train_log.txt", "loss_data.jsonl"} <= {
        p.name for p in (place / "deep" / "here").iterdir()}


def test_data_file(build, place):
    (place / "other.jsonl").write_text('{"text": "zzzzzzzz"}\n')
    assert set(build(data_file=place / "other.jsonl").loader.corpus.tokens.tolist()) == {0, ord("z")}


@pytest.mark.parametrize("flag, value", [("n_layer", 24), ("n_embd", 1024), ("vocab_size", 65536)])
def test_sizes_that_contradict_the_file(flag, value, build):
    with pytest.raises(P.Fatal, match=f"--{flag} {value}: .* has {flag} "):
        build(**{flag: value})


def test_n_layer(build):
    assert len(build(n_layer=2).model.blocks) == 2


def test_n_embd(build):
    assert build(n_embd=64).model.emb.weight.shape == (256, 64)


def test_vocab_size(build, place):
    assert build(vocab_size=0).arch.vocab_size == 256
    np.save(place / "tokens.npy", np.array([1, 2, 299, 0], np.uint16))
    new = dict(load_model=None, peft="none", n_layer=1, n_embd=64, data_file=place / "tokens.npy", data_type="numpy",
               ctx_len=2)
    run = build(vocab_size=0, proj_dir=place / "new", **new)
    assert 300 <= run.arch.vocab_size == len(run.model.head.weight) < 65536
    assert build(vocab_size=512, proj_dir=place / "512", **new).arch.vocab_size == 512


# --------------------------------------------------------------------------------------------- the length of the run


def test_micro_bsz(build, place):
    assert [len(build(proj_dir=place / str(n), micro_bsz=n).loader.batch(0).inputs) for n in (1, 3)] == [1, 3]


def test_ctx_len(build, place):
    assert [build(proj_dir=place / str(n), ctx_len=n).loader.batch(0).inputs.shape[1] for n in (4, 6)] == [4, 6]


def test_epoch_steps(train):
    assert logged(train(epoch_steps=3), "step") == [0, 1, 2]


def test_epoch_count(train):
    assert logged(train(epoch_count=3), "epoch") == [0, 0, 1, 1, 2, 2]


def test_epoch_save(train, place):
    train(epoch_count=4, epoch_save=2)
    assert files(place / "out") == ["rwkv-0.pth", "rwkv-2.pth", "rwkv-3.pth"]  # every second, and the last
    train(epoch_begin=4, epoch_count=4, epoch_save=3)
    assert files(place / "out")[3:] == ["rwkv-4.pth", "rwkv-7.pth"]   # of this run, whatever came before


def test_epoch_begin(train, place):
    whole = train(proj_dir=place / "whole", epoch_count=2)
    train(epoch_count=1)
    run = train(epoch_begin=1, epoch_count=1)
    assert files(place / "out") == ["rwkv-0.pth", "rwkv-1.pth"] and logged(run, "epoch")[-2:] == [1, 1]
    first = [P.read_pth(place / name / "rwkv-0.pth", "") for name in ("whole", "out")]
    assert all(torch.equal(first[0][n], first[1][n]) for n in first[0])
    # the same rows of the data, from the weights of epoch 0 (Adam begins anew, so the next step is another)
    assert logged(run, "loss")[2] == pytest.approx(logged(whole, "loss")[2], rel=1e-6)


# ------------------------------------------------------------------------------------------------------ the optimiser


def test_lr_init(train):
    assert logged(train(lr_init=3e-5, lr_final=3e-5), "lr") == [3e-5, 3e-5]


def test_lr_final(train):
    lr = logged(train(lr_init=1e-4, lr_final=1e-5, epoch_steps=5), "lr")
    assert lr[0] == 1e-4 and lr[-1] == pytest.approx(1e-5) and lr == sorted(lr, reverse=True)


def test_warmup_steps(train):
    assert logged(train(warmup_steps=4, epoch_steps=5), "lr")[:4] == pytest.approx([2.5e-5, 5e-5, 7.5e-5, 1e-4])


def test_lr_schedule(train, place):
    flags = dict(lr_init=1e-4, lr_final=0, epoch_steps=11)
    wsd = logged(train(lr_schedule="wsd", **flags), "lr")
    cos = logged(train(proj_dir=place / "cos", lr_schedule="cos_decay", **flags), "lr")
    assert wsd[:9] == pytest.approx([1e-4] * 9) and 0 < wsd[9] < 1e-4 and wsd[10] == pytest.approx(0)
    assert cos[5] == pytest.approx(0.5e-4)


def moments(train, place, **flags):
    """m / v of the optimiser after one step, and the largest change of an adapter's weight."""
    run = train(proj_dir=place / str(flags), epoch_steps=1, **flags)
    start = P.read_pth(run.folder / "init_pissa.pth", "")
    moved = max((run.optimiser.masters()[n.replace("init_", "")] - start[n]).abs().max().item() for n in start
                if "init_lora" in n)
    return run.optimiser.m.held, run.optimiser.v.held, moved


def test_beta1(train, place):
    (m, v, _), (m2, v2, _) = (moments(train, place, beta1=b) for b in (0.9, 0.8))
    torch.testing.assert_close(m2, 2 * m)                                                 # (1 - beta1) g
    torch.testing.assert_close(v2, v)


def test_beta2(train, place):
    (m, v, _), (m2, v2, _) = (moments(train, place, beta2=b) for b in (0.99, 0.98))
    torch.testing.assert_close(v2, 2 * v)                                                 # (1 - beta2) g^2
    torch.testing.assert_close(m2, m)


def test_adam_eps(train, place):
    small, large = (moments(train, place, adam_eps=e)[2] for e in (1e-8, 10.0))
    assert small == pytest.approx(1e-4, rel=0.05) and large < 0.1 * small                 # lr g / (|g| + eps)


# ------------------------------------------------------------------------------------------------------- the machine


@pytest.mark.parametrize("devices, strategy", [(1, "deepspeed_stage_1"), (2, "deepspeed_stage_1"),
                                               (2, "deepspeed_stage_2")])
def test_devices_and_strategy(devices, strategy, place):
    """Plain python starts the processes; the same rows make the same losses, however they are divided."""
    rows = dict(micro_bsz=4 // devices, devices=devices, strategy=strategy, proj_dir=place / "out")
    flags = [w for name, value in (COMMON | rows).items() for w in (f"--{name}", str(value))]
    argv = [sys.executable, P.__file__, "--load_model", str(place / "base.pth"), "--data_file",
            str(place / "data.jsonl"), *flags]
    env = {k: v for k, v in os.environ.items() if k != "RANK" and k != "WORLD_SIZE"} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(argv, capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("done: ") == 1                                               # one of them speaks
    losses = [json.loads(line)["loss"] for line in (place / "out" / "loss_data.jsonl").read_text().splitlines()]
    SEEN.setdefault("losses", losses)
    assert losses == pytest.approx(SEEN["losses"], rel=1e-6)


SEEN = {}


def test_accelerator(build):
    assert build(accelerator="cpu").model.head.weight.device.type == "cpu"
    if not torch.cuda.is_available():
        with pytest.raises(P.Fatal, match="--accelerator gpu: torch finds none here"):
            build(accelerator="gpu")


@pytest.mark.parametrize("value, dtype", [("fp32", torch.float32), ("tf32", torch.float32), ("bf16", torch.bfloat16),
                                          ("fp16", torch.float16)])
def test_precision(value, dtype, train):
    run = train(precision=value)
    assert run.model.head.weight.dtype == run.model.blocks[0].att.key.lora_A.dtype == dtype
    assert torch.get_float32_matmul_precision() == ("high" if value == "tf32" else "highest")
    assert all(map(math.isfinite, logged(run, "loss"))) and (run.loss_scale > 1) == (value == "fp16")


def test_grad_cp(build, place):
    """1 keeps fewer bytes for backward and computes blocks twice; it is not accumulation, as the tutorial has it."""
    held, losses = [], []
    for grad_cp in "01":
        run, kept = build(proj_dir=place / grad_cp, grad_cp=grad_cp), []
        batch = run.loader.batch(0)
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t.nbytes) or t, lambda t: t):
            losses += [loss.item() for loss in P.batch_losses(run.model, batch, len(batch.learnt), run.cfg)]
        held.append(sum(kept))
        assert len(batch.inputs) == 2
    assert losses[0] == losses[1] and held[1] < held[0] / 3


def test_my_testing(build):
    assert build(my_testing="x070").arch.version == "x070"
    with pytest.raises(P.Fatal, match="--version x060: .* has version x070"):
        build(my_testing="x060")


@pytest.mark.parametrize("version", P.TIME_MIX)
def test_my_testing_of_each_version(version, train, place):
    random_model(place / "base.pth", version=version)
    run = train(my_testing=version)
    assert run.arch.version == version and all(map(math.isfinite, logged(run, "loss")))


def test_op(build, place, capsys):
    for op in ("cpu", "chunk", "torch"):
        wkv = build(proj_dir=place / op, op=op).model.blocks[0].att.wkv
        assert wkv.__name__ == {"torch": "wkv7_ref"}.get(op, f"wkv7_{op}")
    with pytest.raises(P.Fatal, match=r"--op quick: unknown; choose from 'cuda', .*'torch'"):
        build(op="quick")
    if not torch.cuda.is_available():
        for op in ("cuda", "triton", "fla"):
            with pytest.raises(P.Fatal, match=f"--op {op}: .*GPU"):
                build(op=op)


def test_fla(cfg):
    assert cfg(op=None, fla="1").op == "fla" and cfg(op=None).op == ""


# ------------------------------------------------------------------------------------------------------------ the data


def test_data_type(build, place):
    """The same document in every form; wds_img and dummy have documents of their own (tests/test_data.py)."""
    text = "some text, 8 bit"
    tokens = np.array([*text.encode(), 0])
    (place / "a.txt").write_bytes(text.encode())
    (place / "a16.txt").write_bytes(text.encode("utf-16-le"))
    np.save(place / "a.npy", tokens.astype(np.int64))
    (place / "a.u16").write_bytes(tokens.astype("<u2").tobytes())
    P.write_binidx(str(place / "b"), P.Corpus(tokens, np.array([0, len(tokens)])))
    for data_type, file in [("utf-8", "a.txt"), ("utf-16le", "a16.txt"), ("numpy", "a.npy"), ("uint16", "a.u16"),
                            ("binidx", "b")]:
        run = build(proj_dir=place / data_type, data_type=data_type, data_file=place / file)
        assert run.loader.corpus.tokens.tolist() == tokens.tolist(), data_type
    assert len(build(proj_dir=place / "dummy", data_type="dummy", data_file=None).loader.corpus.starts) == 4097
    with pytest.raises(P.Fatal, match="wds_img"):
        build(data_type="no such")


def test_dataload(build, place):
    pad = build(proj_dir=place / "pad", dataload="pad", micro_bsz=3, ctx_len=50).loader.batch(0)
    only = build(proj_dir=place / "only", dataload="only", micro_bsz=3, ctx_len=50).loader
    assert len(pad.inputs) == 3 and (pad.inputs == 0).any() and len(only.batch(0).inputs) == 1
    assert len({only.batch(i).inputs.shape[1] for i in range(4)}) > 1 and not (only.batch(0).inputs == 0).any()


def test_loss_mask(build, place):
    learnt = {}
    for mask in ("pad", "qa"):
        batch = build(proj_dir=place / mask, loss_mask=mask, micro_bsz=4, ctx_len=50).loader.batch(0)
        learnt[mask] = sorted(chr(t) for t in batch.targets.tolist() if t)
    answers = " hi", " 4", TEXTS[1], TEXTS[3]  # a text without roles is learnt whole (but for its first token)
    assert learnt["qa"] == sorted(answers[0] + answers[1] + answers[2][1:] + answers[3][1:])
    assert len(learnt["pad"]) == sum(len(t) - 1 for t in TEXTS)


# -------------------------------------------------------------------------------------------------- what is trained

MATRIX = "blocks.0.att.key"


def test_pissa_config(train, place):
    config = '{"pissa_load":"","pissa_init":"","pissa_r":6,"svd_niter":0}'
    train(pissa_config=config, lr_init=1e-2, lr_final=1e-2)
    trained = P.read_pth(place / "out" / "rwkv-0.pth", "")
    init = P.read_pth(place / "out" / "init_pissa.pth", "")
    A0, B0 = init[f"{MATRIX}.init_lora_A"], init[f"{MATRIX}.init_lora_B"]
    assert A0.shape == (6, 64)                                                            # pissa_r
    W = random_tensors()[f"{MATRIX}.weight"]
    exact = torch.linalg.svdvals(W)[6:].square().sum().sqrt()                             # svd_niter 0: the best
    assert (W - B0 @ A0).norm() == pytest.approx(exact.item(), rel=1e-5)
    rough = train(proj_dir=place / "rough", pissa_config='{"pissa_r":6,"svd_niter":1}')
    R = P.read_pth(rough.folder / "init_pissa.pth", "")
    assert (W - R[f"{MATRIX}.init_lora_B"] @ R[f"{MATRIX}.init_lora_A"]).norm() > exact * (1 + 1e-6)
    paths = {"pissa_load": str(place / "out" / "rwkv-0.pth"), "pissa_init": str(place / "out" / "init_pissa.pth")}
    again = train(proj_dir=place / "again", epoch_steps=1, lr_init=0, lr_final=0,
                  pissa_config=json.dumps(paths | {"pissa_r": 6}))
    assert torch.equal(again.model.get_submodule(MATRIX).lora_A, trained[f"{MATRIX}.lora_A"])
    assert not torch.equal(trained[f"{MATRIX}.lora_A"], A0)


def test_peft(build, place):
    trained = {}
    for peft in ("pissa", "lora", "bone", "state", "none"):
        run = build(proj_dir=place / peft, peft=peft)
        trained[peft] = {name for name, _ in run.optimiser.named}
    assert {f"{MATRIX}.lora_A", f"{MATRIX}.lora_B"} <= trained["pissa"] == trained["lora"]
    assert not [name for name in trained["bone"] if "lora" in name] and any(MATRIX in name for name in trained["bone"])
    assert trained["state"] == {"blocks.0.att.time_state", "blocks.1.att.time_state"}
    assert trained["none"] == set(random_tensors())


def test_train_parts(build, place):
    every = set(random_tensors())
    kinds = dict(emb={"emb.weight"}, head={"head.weight"}, ln={name for name in every if "ln" in name}, time=set())
    for part, wanted in kinds.items():
        run = build(proj_dir=place / part, train_parts=[part])
        assert {name for name, _ in run.optimiser.named if "lora_" not in name} == wanted
    assert {name for name, _ in build().optimiser.named if "lora_" not in name} == kinds["ln"]       # time and ln
    json_list = build(proj_dir=place / "json", train_parts='["emb","head"]')                         # RWKV-PEFT's form
    assert {name for name, _ in json_list.optimiser.named if "lora_" not in name} == {"emb.weight", "head.weight"}
    random_model(place / "base.pth", version="x060")
    run = build(proj_dir=place / "x060", train_parts=["time"])
    assert {name for name, _ in run.optimiser.named if "lora_" not in name} == {
        name for name in random_tensors(version="x060") if "time_" in name}


@pytest.mark.parametrize("value, bits", [("none", 32), ("int8", 8.25), ("nf4", 4.5)])
def test_quant(value, bits, build):
    frozen = build(quant=value).model.get_submodule(MATRIX).frozen
    assert sum(b.nbytes for b in frozen.buffers()) == 64 * 64 * bits / 8


def test_pre_ffn(train, place):
    new = dict(load_model=None, peft="none", my_testing="x060", n_layer=2, n_embd=64)
    for value in (0, 1):
        run = train(proj_dir=place / str(value), pre_ffn=value, **new)
        assert hasattr(run.model.blocks[0], "ffnPre") == bool(value) and hasattr(run.model.blocks[1], "att")
        assert ("blocks.0.ffnPre.key.weight" in P.read_pth(run.folder / "rwkv-0.pth", "")) == bool(value)


def test_head_qk(train, place):
    new = dict(load_model=None, peft="none", n_layer=1, n_embd=64)
    for value in (0, 8):
        run = train(proj_dir=place / str(value), head_qk=value, **new)
        tensors = P.read_pth(run.folder / "rwkv-0.pth", "")
        assert ("head_q.weight" in tensors) == bool(value)
    assert tensors["head_q.weight"].shape == (8, 64) and tensors["head_q.weight"].any()   # it was zero: it learns


def test_wandb(cfg):
    assert cfg(wandb="RWKV-PEFT-Pissa").wandb == "RWKV-PEFT-Pissa" and not cfg().wandb    # more: tests/test_wandb.py


# --------------------------------------------------------------------------------------------------- merge_pissa.sh


@pytest.fixture
def trained(train, place):
    run = train(proj_dir=place / "out", lr_init=1e-2, lr_final=1e-2)
    return run, place


def merging(place, *, base="base.pth", init="--lora_init", checkpoint="--lora_checkpoint", extra=(), out="merged.pth"):
    return merge.main(["--base_model", str(place / base), init, str(place / "out" / "init_pissa.pth"),
                       checkpoint, str(place / "out" / "rwkv-0.pth"), "--output", str(place / out), *extra])


def assert_merged(run, path):
    merged, base = P.read_pth(path, ""), random_tensors()
    assert [*merged] == [*base] and not torch.equal(merged[f"{MATRIX}.weight"], base[f"{MATRIX}.weight"])
    with torch.device("meta"):
        model = P.RWKV(run.arch, P.wkv7_ref)
    P.fill(model, merged, str(path), "cpu", torch.float32)
    found, wanted = (logits_of(m.eval(), [5, 9, 200, 7, 1])[0] for m in (model, run.model))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("init, checkpoint", [("--lora_init", "--lora_checkpoint"),
                                              ("--pissa_init", "--pissa_checkpoint")])
def test_merge_lora_init(init, checkpoint, trained):
    run, place = trained
    assert merging(place, init=init, checkpoint=checkpoint, extra=["--type", "pissa"]) == 0
    assert_merged(run, place / "merged.pth")


SEEN_ABOVE = {"merge_pissa_init", "merge_lora_checkpoint", "merge_pissa_checkpoint", "merge_output"}


def test_merge_base_model(trained, capsys):
    _, place = trained
    random_model(place / "another.pth", seed=3)
    assert merging(place, base="another.pth", extra=["--type", "pissa"]) == 2
    assert re.search(r"made with base \w+, but here it is \w+", capsys.readouterr().err)


def test_merge_type(trained, capsys):
    _, place = trained
    assert merging(place, extra=["--type", "lora"]) == 2 and "peft pissa" in capsys.readouterr().err


def test_merge_quant(train, place, capsys):
    run = train(quant="nf4", lr_init=1e-2, lr_final=1e-2)
    assert merging(place, extra=["--type", "pissa", "--quant", "nf4"]) == 0
    assert_merged(run, place / "merged.pth")
    assert merging(place, extra=["--type", "pissa", "--quant", "int8"], out="other.pth") == 2
    assert "was trained with --quant nf4" in capsys.readouterr().err
