"""Whole runs: what they write, that a stopped run goes on to the last bit, that nothing bad reaches the weights."""

import json
import math
import os
import re
import shlex
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import random_model

import merge
import pissa_rwkv as P

sys.path.insert(0, str(Path(P.__file__).parent / "bench"))

import reliability  # noqa: E402

COMMON = "--op torch --ctx_len 8 --micro_bsz 2 --rank 4 --grad_cp 0 --lr_init 1e-4"
ADAPTED = [f"blocks.{i}.{m}" for i in range(2)
           for m in ("att.receptance", "att.key", "att.value", "att.output", "ffn.key", "ffn.value")]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with base.pth and data.jsonl."""
    folder = tmp_path_factory.mktemp("train")
    random_model(folder / "base.pth")
    texts = [f"line {i} of the text, and its {'long ' * (i % 3)}rest" for i in range(12)]
    (folder / "data.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    return folder


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """Bit-identical figures are promised for the same number of threads."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def command(place, tmp_path):
    """command(options, name) -> argv of a small run into tmp_path / name."""
    def make(options="", name="out"):
        paths = f"--load_model {place}/base.pth --data_file {place}/data.jsonl --proj_dir '{tmp_path / name}'"
        return shlex.split(f"{paths} {COMMON} {options}")
    return make


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def steps(folder, *keys):
    rows = [json.loads(line) for line in (folder / "loss_data.jsonl").read_text().splitlines()]
    return [tuple(row[k] for k in keys) for row in rows if "loss" in row] if keys else rows


def epochs(folder):
    """The epoch lines of train_log.txt, without the clock."""
    found = [line.split(" ") for line in (folder / "train_log.txt").read_text().splitlines()]
    return [(*line[:4], line[-1]) for line in found if line[0].isdigit()]


def files(folder):
    return sorted(p.name for p in folder.glob("*.pth") if p.name != "resume.1.pth")  # (the one before the last)


# ------------------------------------------------------------------------------------------- commands and files

TUTORIAL = """
--load_model {model} --proj_dir {out} --data_file {data}
--vocab_size 65536 --n_layer 2 --n_embd 64
--data_type binidx --dataload pad --loss_mask pad
--ctx_len 16 --micro_bsz 2 --epoch_steps 3 --epoch_count 2 --epoch_begin 0 --epoch_save 1
--lr_init 2e-5 --lr_final 2e-5 --warmup_steps 0 --beta1 0.9 --beta2 0.99 --adam_eps 1e-8
--accelerator cpu --devices 1 --precision bf16 --strategy deepspeed_stage_1 --grad_cp 1
--my_testing "x070"
--peft pissa --pissa_config {config}
"""


def test_the_tutorials_command(tmp_path, capfd):
    model = random_model(tmp_path / "RWKV.pth", vocab_size=65536, dtype=torch.bfloat16)
    texts = [{"text": "User: 你好。\n\nAssistant: 你好！很高兴。"}, {"text": "Hello, world! " * 20}] * 3
    (tmp_path / "novel.jsonl").write_text("".join(json.dumps(t, ensure_ascii=False) + "\n" for t in texts), "utf-8")
    assert P.main(["--make_binidx", str(tmp_path / "novel.jsonl")]) == 0
    config = '{"pissa_load":"","pissa_init":"","pissa_r":32,"svd_niter":4}'
    # (the shell's $pissa_config is one word, because it has no spaces)
    argv = [word.format(model=model, out=tmp_path / "out", data=tmp_path / "novel", config=config)
            for word in shlex.split(TUTORIAL)]
    assert P.main(argv) == 0, capfd.readouterr().err
    folder = tmp_path / "out"
    assert files(folder) == ["init_pissa.pth", "resume.pth", "rwkv-0.pth", "rwkv-1.pth"]
    for name, prefix in (("init_pissa.pth", "init_lora_"), ("rwkv-1.pth", "lora_")):
        tensors = P.read_pth(folder / name, "")
        assert {t.dtype for t in tensors.values()} == {torch.float32}
        factors = {f"{m}.{prefix}{x}" for m in ADAPTED for x in "AB"}
        others = tensors.keys() - factors
        assert factors <= tensors.keys()
        assert tensors[f"blocks.1.ffn.key.{prefix}A"].shape == (32, 64)
        assert tensors[f"blocks.1.ffn.key.{prefix}B"].shape == (256, 32)
        base = torch.load(model, weights_only=True)
        wanted = {k for k in base if ".ln" in k or k.startswith("ln")} if prefix == "lora_" else set()
        assert others == wanted and all(tensors[k].shape == base[k].shape for k in others)
    assert len(steps(folder)) == 6 and all(math.isfinite(loss) for loss, in steps(folder, "loss"))
    assert merge.main(["--type", "pissa", "--base_model", str(model), "--pissa_init", str(folder / "init_pissa.pth"),
                       "--pissa_checkpoint", str(folder / "rwkv-1.pth"), "--output", str(tmp_path / "new.pth")]) == 0
    merged = torch.load(tmp_path / "new.pth", weights_only=True)
    assert [(k, t.shape, t.dtype) for k, t in merged.items()] == [(k, t.shape, t.dtype) for k, t in base.items()]


def test_the_short_command(place, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert P.main(["--load_model", str(place / "base.pth"), "--data_file", str(place / "data.jsonl"),
                   "--ctx_len", "16"]) == 0
    assert files(tmp_path / "out") == ["init_pissa.pth", "resume.pth", "rwkv-0.pth"]
    assert "done: out" in capsys.readouterr().out


def test_logs(command, out):
    began = time.time()
    assert P.main(command("--epoch_steps 2 --epoch_count 2 --lr_final 5e-5 --accumulate_grad_batches 2")) == 0
    rows = steps(out)
    assert [(row["step"], row["epoch"]) for row in rows] == [(0, 0), (1, 0), (2, 1), (3, 1)]
    for row in rows:
        assert row["tokens"] == 4 * 8 or row["tokens"] < 4 * 8
        seconds = 1 / row["t_cost"]
        assert 0 < seconds < time.time() - began and row["kt_s"] == pytest.approx(row["tokens"] / seconds / 1000)
    lines = (out / "train_log.txt").read_text().splitlines()
    assert re.fullmatch(r"NEW RUN \d{4}(-\d\d){5}", lines[0]) and "'rank': 4" in lines[1] and len(lines) == 4
    for epoch in (0, 1):
        loss = sum(row["loss"] for row in rows[2 * epoch: 2 * epoch + 2]) / 2
        lr = f"{rows[2 * epoch + 1]['lr']:.8f}"
        number, found, perplexity, found_lr, day, clock, of_run = lines[2 + epoch].split(" ")
        assert (number, found, found_lr, of_run) == (str(epoch), f"{loss:.6f}", lr, str(epoch))
        assert perplexity == f"{math.exp(loss):.4f}"
        assert re.fullmatch(r"\d{4}-\d\d-\d\d", day) and re.fullmatch(r"\d\d:\d\d:\d\d\.\d+", clock)
    assert rows[0]["lr"] == 1e-4 and rows[-1]["lr"] == pytest.approx(5e-5)


def test_epoch_save_numbers(command, out):
    assert P.main(command("--epoch_steps 1 --epoch_count 4 --epoch_save 2")) == 0
    assert files(out) == ["init_pissa.pth", "resume.pth", "rwkv-0.pth", "rwkv-2.pth", "rwkv-3.pth"]


def test_an_epoch_is_one_pass_unless_told(command, out):
    assert P.main(command("--ctx_len 64 --micro_bsz 4 --accumulate_grad_batches 2")) == 0
    assert len(steps(out)) == 2  # 12 documents by 8
    assert sum(n for n, in steps(out, "learnt")) > 0


# ------------------------------------------------------------------------------------------------ going on, part 1


def crash_at(monkeypatch, step, how):
    """Makes train_step do `how` when this step is reached, once."""
    train_step = P.train_step

    def stumbling(run, lr):
        if run.step == step:
            monkeypatch.setattr(P, "train_step", train_step)
            how()
        return train_step(run, lr)

    monkeypatch.setattr(P, "train_step", stumbling)


class Crash(Exception):
    pass


def crash():
    raise Crash


VARIANTS = {
    "pissa": "", "lora with dropout": "--peft lora --lora_dropout 0.3", "accumulation": "--accumulate_grad_batches 2",
    "bf16": "--precision bf16 --grad_cp 1", "fp16": "--precision fp16",
    "all parameters": "--peft none --precision bf16",
    "int8": "--quant int8 --peft lora", "nf4": "--quant nf4 --qpissa_iters 3 --precision bf16 --grad_cp 1",
    "nf4dq": "--quant nf4dq", "lora on nf4": "--quant nf4 --peft lora --precision bf16",
    "chunks": "--train_type infctx --chunk_ctx 3 --precision bf16 --micro_bsz 3",
    "chunks, full gradient": "--train_type infctx --chunk_ctx 3 --chunk_grad full --peft lora --lora_dropout 0.3",
    "bone": "--peft bone --rank 5",
    "bat on nf4": "--peft bone --bone_mode bat --quant nf4 --precision bf16 --grad_cp 1",
    "state": "--peft state --quant int8 --precision bf16 --grad_cp 1",
    "some parts": "--peft none --train_parts ln head --quant nf4",
    "moments of 8 bits": "--moments 8bit --precision bf16 --train_parts ln",
    "windows": "--dataload get --lr_schedule wsd --warmup_steps 2 --weight_decay 0.1",
}  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
def test_resumed_is_uninterrupted_to_the_last_bit(variant, command, tmp_path, monkeypatch, capsys):
    options = f"{VARIANTS[variant]} --epoch_steps 4 --epoch_count 2 --save_steps 3"
    assert P.main(command(options, "whole")) == 0
    wanted = reliability.results(tmp_path / "whole")

    # Asked to stop in step 1, in the middle of an epoch: that step is finished and saved; the status names the signal.
    by = signal.SIGINT if variant == "bone" else signal.SIGTERM
    crash_at(monkeypatch, 1, lambda: signal.raise_signal(by))
    assert P.main(command(options, "asked")) == 128 + by
    assert len(steps(tmp_path / "asked")) == 2 and "--resume continues" in capsys.readouterr().out
    # Crashed in step 5, after the last saving in step 4, at the end of epoch 0.
    crash_at(monkeypatch, 5, crash)
    with pytest.raises(Crash):
        P.main(command(f"{options} --resume", "asked"))
    assert len(steps(tmp_path / "asked")) == 5
    capsys.readouterr()
    assert P.main(command(f"{options} --resume", "asked")) == 0
    assert "resumed at step 4 of 8" in capsys.readouterr().out
    assert reliability.results(tmp_path / "asked") == wanted
    assert epochs(tmp_path / "asked") == epochs(tmp_path / "whole")
    # Once more, when there is nothing to do.
    assert P.main(command(f"{options} --resume", "asked")) == 0
    assert reliability.results(tmp_path / "asked") == wanted


def test_fp16s_loss_scale_grows_after_good_steps_and_resumes(command, tmp_path, monkeypatch):
    monkeypatch.setattr(P, "SCALE_GROWS", 3)
    options = "--precision fp16 --epoch_steps 8 --save_steps 1"
    scales = {}

    def kept(run, lr, train_step=P.train_step):
        run.loss_scale = run.loss_scale if run.step else 4.0          # (the usual one overflows in such a model)
        row = train_step(run, lr)
        scales.setdefault(run.folder.name, []).append(run.loss_scale)
        return row

    monkeypatch.setattr(P, "train_step", kept)
    assert P.main(command(options, "whole")) == 0
    assert scales["whole"] == [4.0] * 3 + [8.0] * 3 + [16.0] * 2
    crash_at(monkeypatch, 5, crash)
    with pytest.raises(Crash):
        P.main(command(options, "crashed"))
    assert P.main(command(f"{options} --resume", "crashed")) == 0
    assert scales["crashed"] == scales["whole"]
    assert reliability.results(tmp_path / "crashed") == reliability.results(tmp_path / "whole")
    # From 1 it grows as well.
    run = P.build(P.parse(command(options, "low")))
    run.loss_scale = 1.0
    for run.step in range(1, 4):
        P.train_step(run, 1e-4)
    assert run.loss_scale == 2.0


def test_a_save_that_was_killed_between_its_renames_is_made_good(tmp_path):
    path = tmp_path / "resume.pth"
    P.write_whole(path, lambda f: f.write(b"1"), keep=2)
    path.rename(P.aged(path, 1))                                      # the new one was still to be renamed
    for text in (b"2", b"3"):
        P.write_whole(path, lambda f, text=text: f.write(text), keep=2)
        assert path.read_bytes() == text
        assert sorted(p.name for p in tmp_path.iterdir()) == ["resume.1.pth", "resume.pth"]
    assert P.aged(path, 1).read_bytes() == b"2"


def test_resume_with_only_an_older_file(command, out, capsys):
    assert P.main(command("--epoch_steps 2")) == 0
    (out / "resume.pth").rename(out / "resume.1.pth")
    assert P.main(command("--epoch_steps 2")) == 2 and "resume.1.pth" in capsys.readouterr().err
    assert P.main(command("--epoch_steps 2 --epoch_count 2 --resume")) == 0
    assert "resumed at step 2 of 4" in capsys.readouterr().out


def test_an_epoch_that_is_made_again_replaces_its_files(command, tmp_path, capsys):
    """After going back to resume.1.pth, with another learning rate: what is on the disk is what was trained last."""
    for name, options in (("out", "--epoch_count 2"), ("straight", "--epoch_count 1")):
        assert P.main(command(f"--epoch_steps 2 {options} --lr_final 1e-4 --auto_merge", name)) == 0
    resume, last = tmp_path / "out" / "resume.pth", [tmp_path / "out" / f"rwkv-1{kind}.pth" for kind in ("", "-merged")]
    before = [file.read_bytes() for file in last]
    resume.write_bytes(resume.read_bytes()[:-100])
    changed = "--epoch_steps 2 --epoch_count 2 --auto_merge --resume --lr_init 3e-4 --lr_final 3e-4"
    assert P.main(command(changed)) == 0
    assert "using the one before it" in capsys.readouterr().out
    assert all(file.read_bytes() != old for file, old in zip(last, before, strict=True))
    assert P.main(command(changed, "straight")) == 0
    ours, wanted = (P.read_pth(tmp_path / name / "rwkv-1-merged.pth", "") for name in ("out", "straight"))
    assert all(torch.equal(ours[key], wanted[key]) for key in wanted)


def test_save_steps_saves_at_the_end_of_an_epoch_too(command, monkeypatch, capsys):
    options = "--epoch_steps 2 --epoch_count 3 --epoch_save 9 --save_steps 2"
    crash_at(monkeypatch, 5, crash)
    with pytest.raises(Crash):
        P.main(command(options))
    assert P.main(command(f"{options} --resume")) == 0
    assert "resumed at step 4" in capsys.readouterr().out


def test_resume_in_an_empty_folder_starts(command, out, capsys):
    assert P.main(command("--epoch_steps 2 --resume")) == 0
    said = capsys.readouterr().out
    assert len(steps(out)) == 2 and "resumed" not in said and f"has not written {out / 'resume.pth'} yet" in said


def test_later_epochs_that_were_killed_before_they_saved_do_not_resume_the_earlier_ones(command, out, tmp_path, capsys):
    assert P.main(command("--epoch_steps 2")) == 0
    shutil.copytree(out, again := tmp_path / "again")
    assert P.main(command("--epoch_steps 2 --epoch_begin 1")) == 0
    assert P.main([*command("--epoch_steps 2 --epoch_begin 1 --resume"), "--proj_dir", str(again)]) == 0
    assert "yet; it starts from rwkv-0.pth" in capsys.readouterr().out
    same = [P.read_pth(folder / "rwkv-1.pth", "") for folder in (out, again)]
    assert P.fingerprint(same[0]) == P.fingerprint(same[1])
    assert P.main([*command("--epoch_steps 2 --epoch_begin 1 --epoch_count 2 --resume"), "--proj_dir", str(again)]) == 0
    assert "resumed at step 4 of 6" in capsys.readouterr().out         # its own files it takes


def test_parts_that_would_not_be_saved_again_are_not_taken(command, out, tmp_path, capsys):
    assert P.main(command("--epoch_steps 1 --train_parts head ln")) == 0
    argv = [*command("--epoch_steps 1"), "--adapter_load", str(out / "rwkv-0.pth"), "--proj_dir", str(tmp_path / "two")]
    assert P.main(argv) == 2
    assert "rwkv-0.pth: holds head.weight, which --train_parts auto does not train" in capsys.readouterr().err
    assert not [*(tmp_path / "two").glob("*.pth")] and P.main([*argv, "--train_parts", "auto", "head"]) == 0


def test_only_what_a_killed_run_left_is_removed(command, out):
    out.mkdir()
    mine = [".resume.pth.77.part", ".rwkv-0-merged.pth.5.part", ".probe.8.part",
            "..opened_by.9.part"]
    others = [".film.mp4.part", ".film.mp4.5.part", "resume.pth.5.part", ".resume.pth.part"]
    for name in mine + others:
        (out / name).touch()
    assert P.main(command("--epoch_steps 1")) == 0
    assert [(out / name).exists() for name in mine + others] == 4 * [False] + 4 * [True]


def test_adapters_are_taken_with_the_init_file_beside_them(command, out, tmp_path, capsys):
    assert P.main(command("--epoch_steps 2")) == 0
    assert P.main([*command("--epoch_steps 1"), "--adapter_load", str(out / "rwkv-0.pth"), "--proj_dir",
                   str(tmp_path / "again")]) == 0
    same = [P.read_pth(folder / "init_pissa.pth", "") for folder in (out, tmp_path / "again")]
    assert P.fingerprint(same[0]) == P.fingerprint(same[1])


def test_resume_beside_a_stale_init_starts_with_a_fitting_one(command, out, capfd):
    """A run was killed before it first saved; now another seed is wanted. The files must belong together."""
    assert P.main(command("--epoch_steps 1 --random_seed 5")) == 0
    for name in ("rwkv-0.pth", "resume.pth"):
        (out / name).unlink()
    if P.main(command("--epoch_steps 1 --resume")) == 0:
        described = [P.read_described(out / name, "")[1]["init"] for name in ("init_pissa.pth", "rwkv-0.pth")]
        assert described[0] == described[1]
    else:
        assert "init_pissa.pth" in capfd.readouterr().err


def test_resume_merges_what_was_left_unmerged(command, out):
    assert P.main(command("--epoch_steps 1")) == 0
    assert P.main(command("--epoch_steps 1 --resume --auto_merge")) == 0
    assert (out / "rwkv-0-merged.pth").exists()


def test_resume_says_what_changed(command, capsys):
    assert P.main(command("--epoch_steps 1")) == 0
    assert P.main(command("--epoch_steps 1 --epoch_count 2 --resume")) == 0
    assert "epoch_count 1 -> 2" in capsys.readouterr().out


def test_only_ctrl_c_ends_a_run_that_is_asked_to_stop(monkeypatch):
    """A cluster that sends SIGTERM to every process, and torchrun's agent after it, must not cost what is saved."""
    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)
    with P.Stop() as stop:
        for number in (signal.SIGTERM, signal.SIGTERM):
            signal.raise_signal(number)
        assert stop.asked and not ended
        signal.raise_signal(signal.SIGINT)
    assert ended == [130]


# ---------------------------------------------------------------------------- going on, part 2: other processes


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_sigterm_finishes_the_step_and_saves(command, out, tmp_path):
    options = "--epoch_steps 30 --save_steps 7"
    assert P.main(command(options, "whole")) == 0
    process = reliability.start(command(options), tmp_path / "log")
    wait_for(lambda: (out / "loss_data.jsonl").exists() and len(steps(out)) > 2)
    os.kill(process.pid, signal.SIGTERM)
    process.join(60)
    log = (tmp_path / "log").read_text()
    assert process.exitcode == 128 + signal.SIGTERM and "--resume continues" in log and "Traceback" not in log
    assert 2 < len(steps(out)) < 30 and files(out) == ["init_pissa.pth", "resume.pth"]
    assert P.main(command(f"{options} --resume")) == 0
    assert reliability.results(out) == reliability.results(tmp_path / "whole")


def test_sigkill_at_random_moments(tmp_path):
    """As `bench/reliability.py`, which kills more often."""
    count = reliability.torture(reliability.small_run(tmp_path), tmp_path, kills=3, seed=1)
    assert count["kills"] == 3 and count["finished_runs"] >= 1
    assert not (count["unreadable_files"] or count["failed_resumes"] or count["diverged_runs"]), count


# --------------------------------------------------------------------------------------------- nothing bad gets in


@pytest.fixture
def run_of(command):
    def make(options=""):
        run = P.build(P.parse(command(f"--epoch_steps 9 {options}")))
        run.model.train()
        return run
    return make


@pytest.mark.parametrize("precision, loss_scale", [("fp32", 1.0), ("fp16", 4.0)])
def test_a_step_is_clipped_by_the_norm_of_its_gradient(command, precision, loss_scale):
    """Whatever the gradient was multiplied with in fp16; never scaled up, and with --grad_clip 0 not at all."""
    for name, grad_clip in (("none", 0.0), ("low", 1e-3), ("high", 1e3), ("norm", 1.0)):
        run = P.build(P.parse(command(f"--epoch_steps 9 --precision {precision} --grad_clip {grad_clip}", name)))
        run.loss_scale, taken = loss_scale, []
        run.optimiser.step = lambda lr, scale, taken=taken: taken.append(scale)
        norm = P.train_step(run, 1e-4)["grad_norm"]
        if name == "none":
            wanted = norm if precision == "fp16" else math.sqrt(run.optimiser.grad.double().square().sum())
        assert norm == pytest.approx(wanted, rel=1e-6)
        clip = min(1.0, grad_clip / norm) if grad_clip else 1.0
        assert taken == [pytest.approx(clip / loss_scale, rel=2e-6 + 1e-6 / norm)]
    assert 0.1 < norm < 50


def test_dropout_is_on_in_training(command, tmp_path):
    """Also where no validation came before it, which would have switched it off and on."""
    for name, dropout in (("with", 0.5), ("without", 0.0)):
        assert P.main(command(f"--epoch_steps 2 --peft lora --lora_dropout {dropout}", name)) == 0
    (first, with_), (again, without) = (steps(tmp_path / name, "loss") for name in ("with", "without"))
    assert first == again and with_ != without                        # (at first B is 0)


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_a_step_without_finite_numbers_changes_nothing(run_of, monkeypatch, capsys, kind):
    run, good = run_of(), P.chunk_loss
    P.train_step(run, 1e-4)
    run.step += 1
    before = [x.clone() for x in run.optimiser.buffers()[:-1]]

    def bad(*inputs):
        no_slope = (run.model.ln_out.weight * 0).sum().sqrt()  # is 0, but the slope of a root there is infinite
        loss, states = good(*inputs)
        return loss * math.nan if kind == "loss" else loss + no_slope, states

    monkeypatch.setattr(P, "chunk_loss", bad)
    capsys.readouterr()
    row = P.train_step(run, 1e-4)
    assert math.isfinite(row["loss"]) == (kind == "gradient")
    after = run.optimiser.buffers()[:-1]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True)) and run.optimiser.t == 1
    assert not run.optimiser.grad.any()
    assert f"step 1: the {kind} is not finite" in (said := capsys.readouterr().out) and "rows 2 to 3" in said
    monkeypatch.setattr(P, "chunk_loss", good)
    run.step += 1
    assert math.isfinite(P.train_step(run, 1e-4)["loss"]) and run.optimiser.t == 2 and run.bad_steps == 0


@pytest.fixture
def bad_steps(monkeypatch):
    """bad_steps({3, 4}): in these steps the loss is NaN."""
    def at(numbers):
        train_step, batch_losses = P.train_step, P.batch_losses

        def step(run, lr):
            factor = math.nan if run.step in numbers else 1.0
            monkeypatch.setattr(P, "batch_losses", lambda *inputs: (x * factor for x in batch_losses(*inputs)))
            return train_step(run, lr)

        monkeypatch.setattr(P, "train_step", step)
    return at


def test_three_bad_steps_in_a_row_end_the_run(command, out, bad_steps, capfd):
    bad_steps({2, 3, 4})
    assert P.main(command("--epoch_steps 9 --save_steps 2")) == 2
    err = capfd.readouterr().err
    assert "pissa_rwkv: error: 3 steps in a row, up to step 4" in err
    assert files(out) == ["init_pissa.pth", "resume.pth"]
    saved, about = P.read_described(out / "resume.pth", "")
    assert about["step"] == 4 and all(t.isfinite().all() for t in saved.values() if t.is_floating_point())


def test_a_run_without_a_good_step_has_learnt_nothing(command, out, bad_steps, capsys):
    bad_steps({0, 1})
    assert P.main(command("--epoch_steps 2")) == 2
    assert "no step had a finite loss and gradient; nothing was learnt" in capsys.readouterr().err
    assert files(out) == ["init_pissa.pth"]


def test_single_bad_steps_do_not_end_it(command, out, bad_steps):
    bad_steps({0, 1, 3, 4, 6})
    assert P.main(command("--epoch_steps 8")) == 0
    trained, _ = P.read_described(out / "rwkv-0.pth", "")
    assert all(t.isfinite().all() for t in trained.values())
    # What the logs say is about the good steps, and is JSON (which has no NaN) and numbers.
    assert math.isfinite(float(epochs(out)[0][1]))
    for line in (out / "loss_data.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_a_base_with_nan_never_gets_far(place, tmp_path, command, out, capfd):
    tensors = torch.load(place / "base.pth", weights_only=True)
    tensors["emb.weight"] *= math.nan
    torch.save(tensors, tmp_path / "nan.pth")
    assert P.main(command(f"--epoch_steps 9 --load_model {tmp_path}/nan.pth")) == 2
    assert "pissa_rwkv: error:" in capfd.readouterr().err and "rwkv-0.pth" not in files(out)


# ---------------------------------------------------------------------------------------------- saved adapters


def test_start_from_saved_adapters(command, tmp_path, place):
    assert P.main(command("--epoch_steps 3", "first")) == 0
    trained, _ = P.read_described(tmp_path / "first" / "rwkv-0.pth", "")
    load, init = (str(tmp_path / "first" / name) for name in ("rwkv-0.pth", "init_pissa.pth"))
    as_json = json.dumps({"pissa_load": load, "pissa_init": init, "pissa_r": 4})
    for number, options in enumerate((f"--adapter_load {load} --adapter_init {init}", f"--pissa_config '{as_json}'")):
        run = P.build(P.parse(command(options, f"second-{number}")))
        masters = run.optimiser.masters()
        assert masters.keys() == trained.keys()
        assert all(torch.equal(masters[name], trained[name]) for name in trained)
    # What they compute together is what the merged model computes.
    assert merge.main(["--type", "pissa", "--base_model", str(place / "base.pth"), "--lora_init", init,
                       "--lora_checkpoint", load, "--output", str(tmp_path / "merged.pth")]) == 0
    with torch.device("meta"):
        merged = P.RWKV(run.arch, P.wkv7_ref)
    P.fill(merged, P.read_pth(tmp_path / "merged.pth", ""), "", "cpu", torch.float32)
    tokens = torch.tensor([list(b"some text")])
    torch.testing.assert_close(merged(tokens)[0], run.model(tokens)[0], rtol=1e-4, atol=1e-5)


def test_epoch_begin_goes_on_in_number_data_and_schedule(command, tmp_path):
    lr = "--epoch_steps 3 --lr_init 1e-4 --lr_final 1e-5"
    assert P.main(command(f"{lr} --epoch_count 2", "whole")) == 0
    assert P.main(command(f"{lr} --epoch_count 1", "parts")) == 0
    assert P.main(command(f"{lr} --epoch_count 1 --epoch_begin 1", "parts")) == 0
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert files(parts) == files(whole) == ["init_pissa.pth", "resume.pth", "rwkv-0.pth", "rwkv-1.pth"]
    keys = ("step", "epoch", "lr", "learnt")  # (the losses differ: Adam's moments begin anew)
    assert steps(parts, *keys)[3:] == steps(whole, *keys)[3:]
    assert steps(parts, "step") == [(i,) for i in range(6)]
    assert [(e[0], e[-1]) for e in epochs(parts)] == [("0", "0"), ("1", "0")]
    # It starts from what was saved; only the schedule of the first half was another.
    assert steps(parts, "loss")[3][0] == pytest.approx(steps(whole, "loss")[3][0], abs=0.02)


# ------------------------------------------------------------------------------------------------------- the rest


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("bf16", 0.05), ("fp16", 0.01), ("tf32", 1e-5)])
def test_adapters_change_nothing_at_first(command, out, capsys, precision, tolerance):
    assert P.main(command(f"--epoch_steps 2 --precision {precision}")) == 0
    said = capsys.readouterr().out
    base, adapted = map(float, re.search(r"first batch: base ([\d.]+), with adapters ([\d.]+)", said).groups())
    assert adapted == pytest.approx(base, abs=tolerance)
    assert steps(out, "loss")[0][0] == pytest.approx(adapted, abs=1e-6)
    assert all(math.isfinite(loss) for loss, in steps(out, "loss"))


@pytest.mark.parametrize("options", ["", "--peft lora --lora_alpha 8", "--precision bf16", "--peft none",
                                     "--peft bone", "--peft bone --bone_mode bat"])
def test_the_loss_falls_on_a_text_learnt_by_heart(command, out, tmp_path, options):
    (tmp_path / "one.txt").write_text("to be or not to be, that is the question")
    assert P.main(command(f"{options} --data_file {tmp_path}/one.txt --dataload pad --ctx_len 64 --micro_bsz 1"
                          " --epoch_steps 25 --lr_init 1e-2 --lr_final 1e-2")) == 0
    losses = [loss for loss, in steps(out, "loss")]
    assert losses[-1] < 0.5 * losses[0], losses


def test_validation_and_sample(command, out, capsys, monkeypatch):
    kept = []
    monkeypatch.setattr(P, "train", lambda run, train=P.train: (kept.append(run), train(run))[1])
    options = "--epoch_steps 2 --epoch_count 2 --val_split 0.3 --sample_prompt 'line ' --sample_len 7 --sample_top_p 0"
    assert P.main(command(options)) == 0
    said, rows, (run,) = capsys.readouterr().out, steps(out), kept
    held = [(row["step"], row["epoch"], row["val_loss"]) for row in rows if "val_loss" in row]
    assert [h[:2] for h in held] == [(1, 0), (3, 1)]
    assert f"epoch 1: loss {sum(r['loss'] for r in rows[3:5]) / 2:.4f}, held out {held[1][2]:.4f}" in said
    # The oracle: every document of the held-out part, row by row, with torch's cross-entropy.
    total = count = 0
    with torch.no_grad():
        for start, stop in map(run.held_out.span, range(run.held_out.pass_rows)):
            tokens = torch.tensor(run.held_out.corpus.tokens[start:stop].astype(int))
            logits = run.model(tokens[None, :-1])[0] @ run.model.head.weight.T
            total += F.cross_entropy(logits[0], tokens[1:], reduction="sum").item()
            count += len(tokens) - 1
    assert held[1][2] == pytest.approx(total / count, abs=1e-5)
    assert len(run.held_out.corpus.tokens) + len(run.loader.corpus.tokens) == sum(
        len(json.loads(line)["text"]) + 1 for line in Path(run.cfg.data_file).read_text().splitlines())
    assert f"\nline {P.generate(run.model, run.tokenizer, 'line ', 7)}\n" in said and said.count("\nline ") == 2


def test_a_validation_that_a_kill_prevented_is_made_up_for(command, tmp_path, monkeypatch):
    def held_out(name):
        return [row for row in map(json.loads, (tmp_path / name / "loss_data.jsonl").read_text().splitlines())
                if "val_loss" in row]

    options = "--epoch_steps 2 --epoch_count 2 --val_split 0.3"
    assert P.main(command(options, "whole")) == 0
    with monkeypatch.context() as patched:
        patched.setattr(P, "finish_epoch", lambda *_: patched.setattr(P, "evaluate", lambda *_: crash()))
        with pytest.raises(Crash):
            P.main(command(options, "killed"))
    assert not held_out("killed")
    for _ in range(2):                                                # (the second time there is nothing to do)
        assert P.main(command(f"{options} --resume", "killed")) == 0
        assert held_out("killed") == held_out("whole") and len(held_out("whole")) == 2
    log = tmp_path / "killed" / "loss_data.jsonl"
    log.write_text("".join(log.read_text().splitlines(True)[:3]))     # up to the first epoch's: the rest is lost
    assert P.main(command(f"{options} --resume", "killed")) == 0
    assert held_out("killed") == held_out("whole")


def test_no_validation_is_made_up_where_no_epoch_had_ended(command, out, monkeypatch):
    """A step in the middle of an epoch may become the end of a shorter one."""
    options, step = "--epoch_count 2 --val_split 0.3 --save_steps 1", P.train_step
    with monkeypatch.context() as patched, pytest.raises(Crash):
        patched.setattr(P, "train_step", lambda run, lr: crash() if run.step == 5 else step(run, lr))
        P.main(command(f"{options} --epoch_steps 4"))
    assert P.main(command(f"{options} --epoch_steps 2 --resume")) == 0   # 5 steps of 4 are 2 of 2
    assert [(row["step"], row["epoch"]) for row in steps(out) if "val_loss" in row] == [(3, 0), (3, 1)]


def test_other_rows_per_step_are_said(command, capsys):
    assert P.main(command("--epoch_steps 2 --save_steps 1")) == 0
    assert P.main(command("--epoch_steps 2 --epoch_count 2 --accumulate_grad_batches 3 --resume")) == 0
    assert "a step had 2 rows and has 6 now: the data continue at row 12" in capsys.readouterr().out


def test_what_was_logged_stays_where_steps_are_counted_anew(command, out, monkeypatch):
    options, step = "--epoch_count 2 --save_steps 1", P.train_step
    for epoch_steps, last in ((6, 9), (2, 3)):                        # (9 of 6 are 3 of 2)
        with monkeypatch.context() as patched, pytest.raises(Crash):
            patched.setattr(P, "train_step", lambda run, lr, last=last: crash() if run.step == last else step(run, lr))
            P.main(command(f"{options} --epoch_steps {epoch_steps} --resume"))
    with open(out / "loss_data.jsonl", "a") as file:                  # what a crash may leave: a step that is not in
        file.write('{"step": 3, "loss": 1.0}\n{"st')                  # resume.pth, and a part of a line
    assert P.main(command(f"{options} --epoch_steps 2 --resume")) == 0
    assert [row["step"] for row in steps(out)] == [*range(9), 3]


def test_a_validation_file_is_held_out_whole(command, out, tmp_path, capsys):
    """And its type is told by its own name."""
    (tmp_path / "held.txt").write_text("a text that is nowhere else")
    mask_id = '{"mask0": "x", "mask1": "y"}'
    run = P.build(P.parse(command(f"--val_file {tmp_path}/held.txt --mask_id '{mask_id}'")))
    assert bytes(run.held_out.corpus.tokens.tolist()) == b"a text that is nowhere else\0"
    said = capsys.readouterr().out
    assert "held out: 1 documents, 28 tokens, 4 rows a pass (pad)" in said
    assert "--mask_id has no effect without --loss_mask se" in said


@pytest.mark.parametrize("options", [
    "", "--peft lora --rank 7", "--peft none", "--train_parts emb head time ln", "--precision bf16 --grad_cp 1",
    "--peft bone", "--peft state --quant nf4", "--peft none --train_parts ln --quant int8"])
def test_dry_run_counts_right_and_writes_nothing(command, place, out, capsys, options):
    assert P.main(command(f"{options} --epoch_steps 5 --epoch_count 3 --dry_run")) == 0
    said = capsys.readouterr().out
    assert not out.exists()
    trained, every = (int(n.replace(",", "")) for n in re.search(r"train ([\d,]+) of ([\d,]+)", said).groups())
    run = P.build(P.parse(command(f"{options} --epoch_steps 5 --epoch_count 3")))
    assert trained == run.optimiser.numbers == sum(p.numel() for p in run.model.parameters() if p.requires_grad)
    base = torch.load(place / "base.pth", weights_only=True)
    assert every == sum(t.numel() for t in base.values()) + sum(
        p.numel() for name, p in run.model.named_parameters() if name not in base)
    assert "would make 15 steps of 2 rows: at most 240 tokens" in said and run.steps == 15


def test_a_dry_run_of_a_resumed_run_says_what_is_left(command, out, capsys):
    assert P.main(command("--epoch_steps 2")) == 0
    assert P.main(command("--epoch_steps 2 --epoch_count 3 --resume --dry_run")) == 0
    assert "would make 4 steps of 2 rows" in capsys.readouterr().out
    assert P.main(command("--epoch_steps 1 --epoch_count 3 --resume --dry_run")) == 0     # one of three is done
    assert "would make 2 steps of 2 rows" in capsys.readouterr().out


@pytest.mark.parametrize("options, words", [
    ("--precision bf16", "resume.pth: made with dtype float32, but here it is bfloat16"),
    ("--train_parts time", "resume.pth: made with trained "), ("--rank 5", "is --rank the file's?")])
def test_a_dry_run_refuses_what_resuming_would(options, words, command, out, capsys):
    assert P.main(command("--epoch_steps 2")) == 0
    errors = []
    for dry in ("--dry_run", ""):
        assert P.main(command(f"--epoch_steps 2 --resume {options} {dry}")) == 2
        errors += capsys.readouterr().err.splitlines()[-1:]
    assert errors[0] == errors[1] and words in errors[0]


def test_auto_merge(command, out, place):
    assert P.main(command("--epoch_steps 1 --epoch_count 2 --auto_merge")) == 0
    assert files(out)[-2:] == ["rwkv-1-merged.pth", "rwkv-1.pth"]
    merged, base = (torch.load(p, weights_only=True) for p in (out / "rwkv-1-merged.pth", place / "base.pth"))
    assert list(merged) == list(base) and any(not torch.equal(merged[k], base[k]) for k in base)


def test_what_is_written_ends_with_the_document(run_of, monkeypatch):
    monkeypatch.setattr(P, "tokens_of", lambda *_: iter((token, None) for token in (72, 105, 0, 33)))
    run = run_of()
    assert P.generate(run.model, run.tokenizer, "a text", 9) == "Hi"
    assert P.generate(run.model, run.tokenizer, "a text", 1) == "H"


def test_a_new_model_is_pretrained_without_a_base(tmp_path):
    small = "--data_type dummy --op torch --ctx_len 16 --micro_bsz 2 --epoch_steps 2 --rank 4"
    assert P.main(f"--peft none --n_layer 1 --n_embd 64 {small} --proj_dir {tmp_path}/out".split()) == 0
    model = torch.load(tmp_path / "out" / "rwkv-0.pth", weights_only=True)
    assert P.detect(model, "").n_layer == 1 and P.read_described(tmp_path / "out" / "rwkv-0.pth", "")[1] == {}
    assert P.main(f"--load_model {tmp_path}/out/rwkv-0.pth {small} --proj_dir {tmp_path}/next".split()) == 0


def test_the_first_steps_of_two_runs_are_the_same_and_of_another_seed_are_not(command, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert P.main(command(f"--epoch_steps 3 --random_seed {seed}", name)) == 0
    a, b, c = (reliability.results(tmp_path / name) for name in "abc")
    assert a == b and a["steps"] != c["steps"] and a["init_pissa.pth"] != c["init_pissa.pth"]
