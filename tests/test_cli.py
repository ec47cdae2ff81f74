"""The command line: every option, its other spellings, and what flags without effect say."""

import os
import re
import shlex
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch

import merge
import pissa_rwkv as P


def parse(text):
    return P.parse(shlex.split(text))


@pytest.mark.parametrize("program", [P, merge])
def test_help(program, capsys):
    with pytest.raises(SystemExit) as end:
        program.main(["--help"])
    assert end.value.code == 0
    said, err = capsys.readouterr()
    names = [f.name for f in fields(P.Config)] if program is P else ["type", "base_model", "lora_init", "output"]
    assert not err and all(re.search(rf"^  --{name}\b", said, re.M) for name in names)
    assert not any(f"--{name}" in said for name in P.WITHOUT_EFFECT)


def test_help_from_a_shell_where_there_is_no_model(tmp_path):
    found = subprocess.run([sys.executable, P.__file__, "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert found.returncode == 0 and "--pissa_config" in found.stdout and not found.stderr
    assert not [*tmp_path.iterdir()]


def test_every_option_has_help_of_one_line():
    for f in fields(P.Config):
        assert 0 < len(f.metadata["help"]) < 100 and "\n" not in f.metadata["help"], f.name
        assert not f.metadata["help"].endswith("."), f.name


def test_every_option_takes_what_its_default_is():
    for f in fields(P.Config):
        if isinstance(f.default, bool):
            assert getattr(parse(f"--{f.name} {int(not f.default)}"), f.name) is not f.default
        elif f.name not in P.JSON_OPTIONS:
            words = f.default if isinstance(f.default, tuple) else (f.default,)
            given = parse(shlex.join([f"--{f.name}", *map(str, words)]))
            assert given == P.Config(**{f.name: list(f.default) if isinstance(f.default, tuple) else f.default})


def test_the_default_is_the_dataclass():
    assert parse("") == P.Config()


@pytest.mark.parametrize(("text", "value"), [
    ("", False), ("--resume", True), ("--resume 1", True), ("--resume 0", False), ("--resume true", True),
    ("--resume False", False), ("--resume --rank 3", True), ("--rank 3 --resume", True)])
def test_switch_that_is_off(text, value):
    assert parse(text).resume is value


@pytest.mark.parametrize(("text", "value"), [("", True), ("--data_shuffle 0", False), ("--data_shuffle 1", True)])
def test_switch_that_is_on(text, value):
    assert parse(text).data_shuffle is value


@pytest.mark.parametrize(("text", "value"), [("", "1"), ("--grad_cp 0", "0"), ("--grad_cp true", "1"),
                                             ("--grad_cp products", "products")])
def test_grad_cp_was_a_switch(text, value):
    assert parse(text).grad_cp == value


def test_lists_and_other_names():
    cfg = parse('--train_parts emb head --sft_fields q a --my_testing "x070" --head_size_a 64 --gradient_clip_val 0.5')
    assert (cfg.train_parts, cfg.sft_fields, cfg.version) == (["emb", "head"], ["q", "a"], "x070")
    assert (cfg.head_size, cfg.grad_clip) == (64, 0.5)
    assert parse("--train_parts").train_parts == []  # the adapters and nothing else
    for text in ("""'["time", "ln"]'""", """["time", "ln"]""", """["time","ln"]""", "'[time, ln]'", "time ln"):
        assert parse(f"--train_parts {text}").train_parts == ["time", "ln"]
    assert parse("--train_parts []").train_parts == []
    assert parse("--train_type state").peft == "state" and parse("--train_type infctx").peft == "pissa"
    assert parse("""--sft_fields '["in put", "out\\u0070ut"]'""").sft_fields == ["in put", "output"]
    assert parse("--lr_init=1e-3 --rank=5") == P.Config(lr_init=1e-3, rank=5)


def test_json_goes_over_flags():
    text = """'{"pissa_load": "a", "pissa_init": "b", "pissa_r": 8, "svd_niter": 0}'"""
    cfg = parse(f"--rank 4 --svd_niter 9 --pissa_config {text}")
    assert (cfg.adapter_load, cfg.adapter_init, cfg.rank, cfg.svd_niter) == ("a", "b", 8, 0)
    cfg = parse("""--peft lora --lora_config '{"lora_load": "", "lora_r": 8, "lora_alpha": 16, "lora_dropout": 0.1}'""")
    assert (cfg.adapter_load, cfg.rank, cfg.lora_alpha, cfg.lora_dropout) == ("", 8, 16.0, 0.1)
    assert isinstance(cfg.lora_alpha, float)
    for nothing in ("", "{}"):
        cfg = parse(f"--pissa_config '{nothing}'")
        assert cfg == P.Config(pissa_config=nothing)


def test_json_of_another_method_has_no_effect(capsys):
    configs = """--pissa_config '{"pissa_load": "a", "pissa_r": 16}' --lora_config '{"lora_load": "", "lora_r": 64}'"""
    cfg = parse(configs)
    assert (cfg.adapter_load, cfg.rank) == ("a", 16)
    assert "--lora_config has no effect with --peft pissa" in capsys.readouterr().out


def test_the_json_of_todays_rwkv_peft(capsys):
    """Its README: one option for every method, in Hugging Face's names; bone is called miss there."""
    cfg = parse("""--peft lora --peft_config '{"r":8,"lora_alpha":32,"lora_dropout":0.05}'""")
    assert (cfg.peft, cfg.rank, cfg.lora_alpha, cfg.lora_dropout) == ("lora", 8, 32, 0.05)
    text = """--peft miss --peft_config '{"r":64}'"""
    assert (parse(text).peft, parse(text).rank, parse(text).bone_mode) == ("bone", 64, "bone")
    assert merge.TYPE["miss"] == merge.TYPE["bone"]
    assert P.options_given(shlex.split(text), "bone") == {"peft", "peft_config", "rank"}
    assert not capsys.readouterr().out
    assert parse("""--peft state --peft_config '{"r":64}'""").rank == P.Config.rank
    assert capsys.readouterr().out == "--peft_config has no effect with --peft state\n"


@pytest.mark.parametrize(("flag", "meant"), [
    ("--lora", "--peft lora"), ("--lora_r", "--rank"), ("--lora_load", "--adapter_load"),
    ("--lora_parts", "--train_parts"), ("--pissa_init", "--adapter_init"), ("--epoch_stepp", "--epoch_steps")])
def test_flags_of_other_programs_are_answered_with_ours(flag, meant):
    with pytest.raises(P.Fatal, match=rf"^unknown option {flag}; did you mean {meant}\?; --help lists them all$"):
        parse(f"--rank 8 {flag} 8")


def test_json_null_leaves_the_default():
    assert parse("""--peft bone --bone_config '{"bone_r": 8, "r": null}'""").rank == 8
    assert parse("""--pissa_config '{"pissa_load": null, "pissa_r": 8}'""").adapter_load == ""
    given = P.options_given(["--pissa_config", '{"pissa_load": null, "pissa_r": 8}'], "pissa")
    assert given == {"pissa_config", "rank"}


def test_as_a_program_it_lets_waiting_threads_sleep(tmp_path):
    """And only then: an import changes nothing."""
    for name, found in (("__main__", "3000"), ("other", "None")):
        script = (f"import os, runpy, sys; sys.argv[1:] = ['--help']\n"
                  f"try: runpy.run_path({P.__file__!r}, run_name={name!r})\nexcept SystemExit: pass\n"
                  "print(os.environ.get('GOMP_SPINCOUNT'))")
        clean = {k: v for k, v in os.environ.items() if k != "GOMP_SPINCOUNT"}
        run = subprocess.run([sys.executable, "-c", script], env=clean | {"PYTHONPATH": str(Path(P.__file__).parent)},
                             capture_output=True, text=True, timeout=120)  # fmt: skip
        assert run.stdout.split()[-1] == found, run.stderr


@pytest.mark.parametrize("error, words", [
    (MemoryError("Unable to allocate 589. GiB"), "out of memory (Unable to allocate 589. GiB); a smaller --micro_bsz"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "out of memory (Default"),
    (torch.OutOfMemoryError("CUDA out of memory."), "out of GPU memory (CUDA out of memory.); a smaller --micro_bsz"),
    (RuntimeError("CUDA driver error: out of memory"), "out of GPU memory (CUDA driver error: out of memory); a "),
    (RuntimeError("Triton Error [CUDA]: out of memory"), "out of GPU memory (Triton Error [CUDA]: out of memory); a "),
    (RuntimeError("wkv7: out of memory (CUDA error 2)"), "out of GPU memory (wkv7: out of memory (CUDA error 2)); a "),
    (RuntimeError("wkv7: no image (CUDA error 209)"), ""),
    (RuntimeError("CUDA driver error: operation not supported"), "CUDA driver error: operation not supported; if"),
    (BrokenPipeError(32, "Broken pipe"), "nothing reads the standard output"),
    (OSError(28, "No space left"), "No space"),
    (FileNotFoundError(2, "No such file", "x.pth"), "x.pth: No such file"), (RuntimeError("our own fault"), ""),
])  # fmt: skip
def test_what_a_user_can_mend_is_one_line(error, words):
    assert P.in_one_line(error).startswith(words) and bool(P.in_one_line(error)) == bool(words)


def test_json_takes_no_half_rank(capsys):
    assert P.main(shlex.split("""--load_model x --pissa_config '{"pissa_r": 8.7}'""")) == 2
    assert "8.7" in capsys.readouterr().err


def test_fla_is_short_for_op_fla():
    assert P.parse(["--fla"]).op == P.parse(["--fla", "1", "--op", "fla"]).op == "fla"
    assert P.parse(["--fla", "0"]).op == "" and P.parse(["--fla", "0", "--op", "chunk"]).op == "chunk"
    with pytest.raises(P.Fatal, match="--fla is short for --op fla, and --op cuda is given too: give one of them"):
        P.parse(["--fla", "--op", "cuda"])


@pytest.mark.parametrize("name", P.WITHOUT_EFFECT)
def test_flags_without_effect_say_so_in_one_line(name, capsys):
    for text in (f"--{name} 1", f"--{name}"):
        assert parse(f"{text} --rank 3") == P.Config(rank=3)
        assert capsys.readouterr().out == f"--{name} has no effect here: {P.WITHOUT_EFFECT[name]}\n"


def test_no_flag_is_both_with_and_without_effect():
    names = {f.name for f in fields(P.Config)} | {f.metadata["also"] for f in fields(P.Config)}
    assert not names & P.WITHOUT_EFFECT.keys()


# What RWKV-PEFT's scripts carry in June 2025 and before; the first lines are the tutorial's, the last two of 2026, and
# RWKV-LM's for RWKV-7.
SCRIPTS = """
--load_model M --proj_dir O --data_file D --vocab_size 65536 --n_layer 32 --n_embd 2560 --data_type binidx
--dataload pad --loss_mask pad --ctx_len 512 --micro_bsz 8 --epoch_steps 1000 --epoch_count 1 --epoch_begin 0
--epoch_save 1 --lr_init 2e-5 --lr_final 2e-5 --warmup_steps 0 --beta1 0.9 --beta2 0.99 --adam_eps 1e-8
--accelerator gpu --devices 1 --precision bf16 --strategy deepspeed_stage_1 --grad_cp 1 --my_testing "x070"
--peft pissa --pissa_config '{"pissa_load":"","pissa_init":"","pissa_r":32,"svd_niter":4}'
--pre_ffn 0 --head_qk 0
--wandb W --lr_schedule cos_decay --accumulate_grad_batches 4 --head_size_a 64 --head_size_divisor 8 --dim_att 0
--dim_ffn 0 --weight_decay 0.01 --weight_decay_final -1 --layerwise_lr 1 --ds_bucket_mb 200 --dropout 0
--train_parts emb time ln --random_seed 1 --my_pile_version 1 --my_pile_stage 0 --my_exit_tokens 0 --magic_prime 0
--my_qa_mask 0 --data_shuffle 1 --op cuda --optim none --sft_field query response --sft_split train --avg_loss 0
--merge 0 --fused_kernel --optimizer none --num_workers 8 --persistent_workers --prefetch_factor 2 --loss_mask pad
--tiny_att_dim 0 --tiny_att_layer -999 --my_pos_emb 0 --num_nodes 1 --quant none --train_type none
--peft lora --peft_config '{"r":64,"lora_alpha":128,"lora_dropout":0.01}' --op fla --my_testing x070
--train_stage 3 --my_exit_tokens 1498226207 --magic_prime 2926181 --adam_eps 1e-18 --enable_progress_bar True
"""


@pytest.mark.parametrize("line", SCRIPTS.strip().split("\n"))
def test_commands_written_for_rwkv_peft(line):
    parse(line)


def test_the_pile_of_flags_means_what_it_says(capsys):
    cfg = parse(" ".join(SCRIPTS.split("\n")[:6]))
    capsys.readouterr()
    assert (cfg.load_model, cfg.proj_dir, cfg.data_file) == ("M", "O", "D")
    assert (cfg.n_layer, cfg.n_embd, cfg.vocab_size, cfg.version) == (32, 2560, 65536, "x070")
    assert (cfg.ctx_len, cfg.micro_bsz, cfg.epoch_steps, cfg.epoch_count) == (512, 8, 1000, 1)
    assert (cfg.accelerator, cfg.precision, cfg.strategy, cfg.grad_cp) == ("gpu", "bf16", "deepspeed_stage_1", "1")
    assert (cfg.peft, cfg.rank, cfg.svd_niter, cfg.adapter_load) == ("pissa", 32, 4, "")


@pytest.mark.parametrize("cuda, why", [("13.0", "may be too old for CUDA 13.0 (13 needs 580)"), (None, "is not used")])
def test_a_driver_that_torch_cannot_use_is_named(cuda, why, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    for there, variable in ((True, False), (False, False), (True, True)):
        monkeypatch.setattr(P, "DRIVERS", (P.__file__,) if there else ("/nowhere",))
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if variable:                                                  # (whoever set it may want none)
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        assert P.setup(P.Config())[1] == "cpu"
        said = capsys.readouterr().out
        assert said.strip().endswith(why) and "finds no GPU" in said if there and not variable else not said


def test_streams_that_are_closed_lead_nowhere(monkeypatch):
    for name in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    P.open_streams()
    assert sys.stdin.read() == "" and sys.stdout.write("x") and sys.stderr.write("x")


def test_importing_does_nothing(tmp_path):
    code = "import pissa_rwkv, merge"
    found = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True,
                           env={"PYTHONPATH": str(Path(P.__file__).parent), "PATH": "", "PYTHONDONTWRITEBYTECODE": "1"})
    assert (found.returncode, found.stdout, found.stderr) == (0, "", "") and not [*tmp_path.iterdir()]
