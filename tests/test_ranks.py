"""Runs on several ranks: the same losses however the work is divided; a rank that dies, hangs or is asked to stop.

Oracles: the run on one rank, and the run that nobody disturbed.
"""

import ctypes
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import random_model

import pissa_rwkv as P

sys.path.insert(0, str(Path(P.__file__).parent / "bench"))

import reliability  # noqa: E402
import scaling  # noqa: E402
import vram  # noqa: E402

ROWS = 6  # of an optimiser step
COMMON = ("--op torch --ctx_len 12 --rank 4 --grad_cp 0 --lr_init 1e-3 --lr_final 1e-3 --loss_mask qa --micro_bsz 1"
          " --epoch_steps 2 --val_split 0.2 --dist_timeout 60")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with base.pth and data.jsonl, whose documents teach between one and forty tokens."""
    folder = tmp_path_factory.mktemp("ranks")
    random_model(folder / "base.pth")
    texts = [f"User: {i}?\n\nAssistant: {'a' * (i * i % 41)}." for i in range(24)]
    (folder / "data.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    return folder


def command(place, folder, size=1, options=""):
    paths = f"--load_model {place}/base.pth --data_file {place}/data.jsonl --proj_dir {folder}"
    return shlex.split(f"{paths} {COMMON} --accumulate_grad_batches {ROWS // size} {options}")


def on(place, folder, size, options=""):
    """A run on `size` ranks, each a process. Returns what they say."""
    log = folder.with_suffix(".log")
    processes = reliability.start_ranks(command(place, folder, size, options), size, log)
    ended = [process.join(100) or process.exitcode for process in processes]
    assert ended == [0] * size, log.read_text()
    return log.read_text()


def rows(folder):
    return [json.loads(line) for line in (folder / "loss_data.jsonl").read_text().splitlines()]


def curve(folder):
    """Of every step the loss, the gradient's norm and what is learnt; of every epoch the held-out loss."""
    return [number for row in rows(folder) for key in ("loss", "grad_norm", "learnt", "val_loss")
            if (number := row.get(key)) is not None]


def wait_for(condition, seconds=100):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


# --------------------------------------------------------------------------- the division of the work does not matter

KINDS = {"plain": "", "quantised": "--quant nf4 --qpissa_iters 2 --train_parts ln"}


@pytest.fixture(scope="module")
def alone(place):
    """kind -> the folder of that run on one rank."""
    for kind, options in KINDS.items():
        on(place, place / kind, 1, f"{options} --epoch_count 3")
    return {kind: place / kind for kind in KINDS}


@pytest.mark.parametrize("size, strategy, kind", [(2, "ddp", "plain"), (2, "zero2", "plain"), (3, "zero1", "plain"),
                                                  (3, "zero2", "quantised"), (2, "zero1", "quantised")])
def test_losses_do_not_depend_on_how_ranks_divide_the_rows(size, strategy, kind, alone, place, tmp_path):
    on(place, tmp_path / "out", size, f"{KINDS[kind]} --epoch_count 3 --strategy {strategy}")
    assert curve(tmp_path / "out") == pytest.approx(curve(alone[kind]), rel=2e-6)
    learnt = [row["learnt"] for row in rows(tmp_path / "out") if "loss" in row]
    assert len(learnt) == 6 and len(set(learnt)) > 3                  # (they are not all alike)
    ours, theirs = (P.read_pth(folder / "init_pissa.pth", "") for folder in (tmp_path / "out", alone[kind]))
    assert ours.keys() == theirs.keys() and any("start_lora_A" in name for name in ours) == (kind == "quantised")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_larger_micro_batches_are_the_same_rows(alone, place, tmp_path):
    on(place, tmp_path / "out", 2, "--epoch_count 3 --micro_bsz 3 --accumulate_grad_batches 1")
    assert curve(tmp_path / "out") == pytest.approx(curve(alone["plain"]), rel=2e-6)


@pytest.mark.parametrize("strategy", ["zero1", "zero2", "ddp"])
def test_chunks_of_rows_over_ranks(strategy, place, tmp_path):
    """Each chunk has a backward pass of its own: what is sent while gradients are made waits for the last."""
    options = "--epoch_count 2 --train_type infctx --chunk_ctx 5 --loss_mask pad"
    on(place, tmp_path / "one", 1, options)
    on(place, tmp_path / "two", 2, f"{options} --strategy {strategy}")
    assert curve(tmp_path / "two") == pytest.approx(curve(tmp_path / "one"), rel=2e-6)


THREADS = """
import os, sys
import pissa_rwkv
status = pissa_rwkv.main(sys.argv[1:])
threads = [open(f"/proc/self/task/{thread}/comm").read().strip() for thread in os.listdir("/proc/self/task")]
sys.stdout.write(f"\\nthreads {' '.join(threads)}\\n")
sys.exit(status)
"""


def test_no_thread_of_the_process_group_outlives_it(place, tmp_path):
    """One that lets go of a tensor while Python ends aborts the process, once in some hundred runs."""
    script = tmp_path / "run.py"
    script.write_text(THREADS)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", script]
    env = os.environ | {"PYTHONPATH": str(Path(P.__file__).parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*torchrun, *command(place, tmp_path / "out", 2)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    threads = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("threads")]
    assert len(threads) == 2 and not any("gloo" in name for names in threads for name in names), threads


def test_going_on_with_another_number_of_ranks(alone, place, tmp_path):
    for epochs, size, strategy in ((1, 2, "zero1"), (2, 1, ""), (3, 3, "zero2")):
        said = on(place, tmp_path / "out", size, f"--epoch_count {epochs} --resume --strategy '{strategy}'")
    assert "accumulate_grad_batches 6 -> 2" in said and "resumed at step 4 of 6" in said
    assert curve(tmp_path / "out") == pytest.approx(curve(alone["plain"]), rel=1e-5)


def test_going_on_with_as_many_is_exact_and_each_rank_draws_its_own_dropout(place, tmp_path):
    options = "--peft lora --lora_dropout 0.3 --strategy zero2 --dataload get --loss_mask pad"  # (rows of one length)
    on(place, tmp_path / "whole", 2, f"{options} --epoch_count 2")
    on(place, tmp_path / "out", 2, f"{options} --epoch_count 1")
    on(place, tmp_path / "out", 2, f"{options} --epoch_count 2 --resume")
    whole, out = (P.read_pth(tmp_path / name / "resume.pth", "") for name in ("whole", "out"))
    assert curve(tmp_path / "out") == curve(tmp_path / "whole")
    assert all(torch.equal(whole[name], out[name]) for name in whole)
    assert len(whole["rng"]) == 2 and not torch.equal(*whole["rng"])


# -------------------------------------------------------------------------------------- ranks that are stopped, or die


def start_and_disturb(place, folder, size, rank, signal_, options=""):
    """Starts a run of a hundred epochs and sends a rank a signal once it makes steps. Returns the processes."""
    argv = command(place, folder, size, f"--save_steps 1 --epoch_save 1000 --epoch_count 100 {options}")
    processes = reliability.start_ranks(argv, size, folder.with_suffix(".log"))
    wait_for(lambda: (folder / "loss_data.jsonl").exists() and len(rows(folder)) > 3)
    os.kill(processes[rank].pid, signal_)
    return processes


def test_sigterm_to_any_rank_saves_once(place, tmp_path):
    processes = start_and_disturb(place, tmp_path / "out", 2, 1, signal.SIGTERM, "--save_steps 0 --epoch_steps 1000")
    assert [p.join(60) or p.exitcode for p in processes] == [143, 143]                    # 128 + SIGTERM
    log, steps = (tmp_path / "out.log").read_text(), [row["step"] for row in rows(tmp_path / "out") if "loss" in row]
    assert log.count("--resume continues from here") == 1 and f"stopped before step {steps[-1] + 1};" in log
    _, about = P.read_described(tmp_path / "out" / "resume.pth", "")
    assert about["step"] == steps[-1] + 1 and not (tmp_path / "out" / "resume.1.pth").exists()


SLOW = """
import os, sys, time
import pissa_rwkv as P
folder, save, rank = sys.argv.pop(1), P.save, os.environ["RANK"]
def slowly(path, *rest):
    time.sleep(3)
    save(path, *rest)
P.save = slowly
with open(f"{folder}/pid {rank}", "w") as file:
    file.write(str(os.getpid()))
status = P.main()
print(rank, "ends", status, os.path.exists(f"{folder}/out/resume.pth"), flush=True)
sys.exit(status)
"""


def test_a_rank_that_is_stopped_waits_for_the_save(place, tmp_path):
    """torchrun kills the other ranks 30 seconds after the first has ended with a status."""
    argv = [sys.executable, "-c", SLOW, tmp_path, *command(place, tmp_path / "out", 2, "--epoch_steps 100000")]
    env = os.environ | reliability.meeting_place(2) | dict(PYTHONPATH=str(Path(P.__file__).parent), OMP_NUM_THREADS="1")
    ranks = [subprocess.Popen(argv, env=env | dict(RANK=rank, LOCAL_RANK=rank), stdout=subprocess.PIPE, text=True)
             for rank in "01"]  # fmt: skip
    wait_for(lambda: (tmp_path / "out" / "loss_data.jsonl").exists() and len(rows(tmp_path / "out")) > 3)
    os.kill(int((tmp_path / "pid 1").read_text()), signal.SIGTERM)
    said = [process.communicate(timeout=60)[0].splitlines()[-1] for process in ranks]
    assert said == ["0 ends 143 True", "1 ends 143 True"]


def test_a_rank_that_hangs_is_named(place, tmp_path):
    processes = start_and_disturb(place, tmp_path / "out", 3, 1, signal.SIGSTOP, "--dist_timeout 4")
    assert [processes[rank].join(60) or processes[rank].exitcode for rank in (0, 2)] == [2, 2]
    processes[1].kill()
    processes[1].join()
    error = re.findall("^pissa_rwkv: error: .*$", (tmp_path / "out.log").read_text(), re.M)[0]
    assert re.search("rank 1 stopped, or does not answer .*; --dist_timeout must be longer than rank 0 takes to save;"
                     " --resume continues from the last save", error)


def serve(port):
    """A process that has the store, as rank 0 does."""
    store = torch.distributed.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    store.set("served", "")
    time.sleep(100)


def test_a_host_that_is_frozen_is_named():
    """It has the store, which is asked who is lost; its connections stay open, and it answers nothing."""
    port, names = reliability.free_port(), []
    host = reliability.server().Process(target=serve, args=(port,))
    host.start()
    store = torch.distributed.TCPStore("127.0.0.1", port, is_master=False)
    store.get("served")
    os.kill(host.pid, signal.SIGSTOP)
    threads = Path(f"/proc/{host.pid}/task")
    while not all("State:\tT" in status.read_text() for status in threads.glob("*/status")):
        time.sleep(0.01)                                              # (the store's thread may still answer)
    ask = P.Ranks(1, 2, store).who_is_lost
    asking = reliability.threading.Thread(target=lambda: names.append(ask(0.1)), daemon=True)
    asking.start()
    asking.join(10)
    host.kill()
    assert names == ["rank 1: the host of rank 0 stopped, or does not answer"]


def test_only_the_rank_that_failed_is_named():
    """Not those that wait for a rank that has found out, nor that one, which ends because of it."""
    store = torch.distributed.TCPStore("127.0.0.1", reliability.free_port(), is_master=True, wait_for_workers=False)
    ranks, began = [P.Ranks(rank, 4, store) for rank in range(4)], time.monotonic()
    ranks[2].tell_failure()
    for rank in (0, 1, 3):
        assert ranks[rank].who_is_lost() == "rank 2 stopped, with an error of its own"
        ranks[rank].tell_failure()
    assert time.monotonic() - began < 4


def test_a_rank_says_that_it_fails(place, tmp_path):
    where, log = reliability.meeting_place(2), tmp_path / "log"
    argv = [command(place, tmp_path / "out", 2, options) for options in ("", "--vocab_file . --tokenizer world")]
    ranks = [reliability.start(argv[rank], log, RANK=str(rank), **where) for rank in range(2)]
    assert [process.join(60) or process.exitcode for process in ranks] == [2, 2]
    assert "error: rank 1 stopped, with an error of its own (" in log.read_text()


def test_a_rank_killed_at_a_random_moment(tmp_path):
    """As `bench/reliability.py --rank_kills`, which kills more often: two under torchrun's agent, one alone."""
    count = reliability.torture_ranks(reliability.small_run(tmp_path), tmp_path, kills=3, seed=2, sizes=(2,))
    assert count["kills"] == 3 and 0 < count["under_torchrun"] < 3
    assert not any(count[name] for name in ("hung_ranks", "unnamed_ranks", "failed_resumes", "diverged_runs")), count
    assert count["others_ended_within_s"] < 60 and count["loss_off_on_another_size"] < 1e-5


def test_the_store_of_a_restarted_job():
    """torchrun's store survives its ranks: what these left in it is not met again."""
    port = reliability.free_port()
    server = torch.distributed.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    for _ in range(3):
        threads = [Agreeing(port, rank) for rank in range(3)]
        for thread in threads:
            thread.join(30)
        assert [thread.found for thread in threads] == [[b"address of 0", b"address of 1", b"address of 2"]] * 3
        assert not any(thread.leftover for thread in threads)
    assert server.num_keys() > 3 * 3                                  # (it has kept them all)


def test_who_does_not_join_is_named(monkeypatch):
    monkeypatch.setattr(P, "rendezvous", lambda *_, **__: iter([(torch.distributed.HashStore(), 0, 3)]))
    with pytest.raises(P.Fatal, match="did not find each other: rank 1, 2 did not join within 0.1 s"):
        P.join(P.Config(dist_timeout=0.1), "cpu")


def test_more_processes_than_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(P.Fatal, match="process 2 of this machine finds 1 GPUs; start one process per GPU"):
        P.join(P.Config(), "cuda")


class Agreeing(reliability.threading.Thread):
    """One rank: looks whether its address is in the store already, leaves it there, and reads those of all."""

    def __init__(self, port, rank):
        super().__init__()
        self.port, self.rank = port, rank
        self.start()

    def run(self):
        store = torch.distributed.TCPStore("127.0.0.1", self.port, is_master=False)
        store = P.agreed(store, self.rank, 3, 20.0)
        self.leftover = store.check([f"address {self.rank}"])
        store.set(f"address {self.rank}", f"address of {self.rank}")
        self.found = [store.get(f"address {rank}") for rank in range(3)]


# ------------------------------------------------------------------------------------------------- what the user reads


@pytest.mark.parametrize("options, error", [
    ("--load_model missing.pth", "--load_model missing.pth: no such file"),
    ("--devices 3", "--devices 3: torchrun started 2; give it --nproc_per_node=3")])
def test_wrong_input_gives_one_line_under_torchrun(options, error, place, tmp_path):
    log = tmp_path / "log"
    assert reliability.Agent(command(place, tmp_path / "out", 2, options), 2, log, restarts=0).failed()
    errors = re.findall("^pissa_rwkv: error: (.*)$", log.read_text(), re.M)
    assert len(errors) == 1 and error in errors[0] and "Traceback" not in log.read_text()


def test_machines_that_meet_and_cannot_connect(place, tmp_path):
    """What helps is the name of a network card, and not --resume."""
    where, log = reliability.meeting_place(2) | {"GLOO_SOCKET_IFNAME": "nosuch0"}, tmp_path / "log"
    ranks = [reliability.start(command(place, tmp_path / "out", 2), log, RANK=str(rank), **where) for rank in range(2)]
    assert [process.join(60) or process.exitcode for process in ranks] == [2, 2]
    assert "error: the processes did not find each other's address: " in log.read_text()
    assert "set GLOO_SOCKET_IFNAME on every machine" in log.read_text() and "--resume" not in log.read_text()


def test_the_one_before_a_damaged_file_is_taken(alone, place, tmp_path):
    on(place, tmp_path / "out", 2, "--epoch_count 2")
    file = tmp_path / "out" / "resume.pth"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    said = on(place, tmp_path / "out", 2, "--epoch_count 3 --resume")
    assert said.count("resume.pth: damaged") == said.count("; using the one before it") == 1
    assert "resumed at step 2 of 6" in said
    assert curve(tmp_path / "out") == pytest.approx(curve(alone["plain"]), rel=2e-6)


class Second(P.Ranks):
    """The second of two ranks, where rank 0 goes on from resume.1.pth."""

    def each(self, question, own):
        return ["resume.1.pth" if question == "newest" else own, own]


def test_other_ranks_read_the_file_that_rank_0_has_looked_at(tmp_path):
    """And no more of it than they need."""
    P.save(tmp_path / "resume.pth", {"x": torch.zeros(1)})
    P.save(tmp_path / "resume.1.pth", {"x": torch.tensor([torch.nan])})
    path, state, _ = P.newest_of_all(P.Config(proj_dir=str(tmp_path)), Second(1, 2))
    assert path == tmp_path / "resume.1.pth" and state["x"].isnan()


def test_ranks_that_do_not_see_the_same_folder(place, tmp_path):
    on(place, tmp_path / "out", 2, "--epoch_count 1")
    where, log = reliability.meeting_place(2), tmp_path / "log"
    commands = [command(place, tmp_path / name, 2, "--epoch_count 2 --resume") for name in ("out", "elsewhere")]
    ranks = [reliability.start(argv, log, RANK=str(rank), **where) for rank, argv in enumerate(commands)]
    assert [process.join(60) or process.exitcode for process in ranks] == [2, 2]
    assert re.search("rank 1 differs from rank 0: the step .* is None, not 2; --proj_dir", log.read_text())


@pytest.mark.parametrize("others", [False, True])
def test_ranks_that_would_not_train_the_same(others, place, tmp_path):
    """Another name of the same file is well; another file or option ends all, with a line that names it."""
    random_model(tmp_path / "base.pth", seed=int(others))
    lines = (place / "data.jsonl").read_text().splitlines()
    (tmp_path / "data.jsonl").write_text("".join(line + "\n" for line in lines[others:]))
    where, log = reliability.meeting_place(2), tmp_path / "log"
    argv = [command(folder, tmp_path / "out", 2) for folder in (place, tmp_path)]
    argv[1] += ["--lr_init", "0.5", "--precision", "bf16"] if others else []
    ranks = [reliability.start(argv[rank], log, RANK=str(rank), **where) for rank in range(2)]
    assert [process.join(60) or process.exitcode for process in ranks] == [2 * others] * 2
    said = set(re.findall("^pissa_rwkv: error: (.*)$", log.read_text(), re.M))
    assert len(said) == others
    if others:
        found = (r"base is \w+, not \w+, data is \w+, not \w+, dtype is torch.bfloat16, not torch.float32, "
                 "lr_init is 0.5, not 0.001 and 1 more; give")
        assert re.match(f"rank 1 differs from rank 0: {found}", said.pop())


def test_all_resume_where_one_was_restarted(place, tmp_path):
    """Of two nodes the agent whose ranks failed counts a restart, the other may not."""
    on(place, tmp_path / "out", 2, "--epoch_count 1")
    argv, where = command(place, tmp_path / "out", 2, "--epoch_count 2"), reliability.meeting_place(2)
    ranks = [reliability.start(argv, tmp_path / "log", RANK=str(rank), TORCHELASTIC_RESTART_COUNT=str(rank), **where)
             for rank in range(2)]
    assert [process.join(60) or process.exitcode for process in ranks] == [0, 0]
    assert "resumed at step 2 of 4" in (tmp_path / "log").read_text()


@pytest.mark.parametrize("job, resumes", [("the same", True), ("another", False)])
def test_a_restart_resumes_only_what_its_own_job_has_opened(job, resumes, place, tmp_path, monkeypatch, capsys):
    """torchrun --max-restarts starts a refused command anew: the run that is in the folder stays as it is."""
    argv = command(place, tmp_path / "out", 1, "--epoch_count 2")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "the same")
    assert P.main([*argv, "--epoch_count", "1"]) == 0
    held = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", job)
    assert P.main(argv) == 2 and "already holds a run" in capsys.readouterr().err
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert P.main(argv) == (0 if resumes else 2)
    assert ("resumed at step 2 of 4" in capsys.readouterr().out) == resumes
    assert ({p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == held) == (not resumes)


def test_what_changed_between_runs_is_said(place, tmp_path, capsys):
    (tmp_path / "data.jsonl").write_text((place / "data.jsonl").read_text())
    data = f"--data_file {tmp_path}/data.jsonl"
    argv = command(place, tmp_path / "out", 1, f"{data} --epoch_count 1")
    assert P.main(argv) == 0
    again = [*argv, "--epoch_count", "2", "--resume"]
    assert P.main(again) == 0
    assert re.search("changes: epoch_count 1 -> 2$", capsys.readouterr().out, re.M)
    (tmp_path / "data.jsonl").write_text((place / "data.jsonl").read_text().replace("User: 7?", "User: 8?"))
    assert P.main([*again, "--epoch_count", "3"]) == 0
    assert re.search(r"changes: epoch_count 2 -> 3, corpus \w{16} -> \w{16}$", capsys.readouterr().out, re.M)
    random_model(tmp_path / "other.pth", seed=1)
    assert P.main([*again, "--epoch_count", "4", "--load_model", str(tmp_path / "other.pth")]) == 2
    assert "made with base" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------- several machines


def agents(place, folder, options=""):
    """Two agents of torchrun on this machine, each with a rank, as they would run on two; the first is where all meet.
    """
    port = reliability.free_port()
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1",
                "--rdzv_backend", "c10d", "--rdzv_endpoint", f"127.0.0.1:{port}", "--max-restarts", "0"]
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")} | {"OMP_NUM_THREADS": "1"}
    argv = [P.__file__, *command(place, folder, 2, options)]
    logs = [open(folder.with_suffix(f".{node}.log"), "a") for node in range(2)]
    return [subprocess.Popen([*torchrun, "--rdzv_conf", f"is_host={node == 0}", *argv], env=env, stdout=log, stderr=log)
            for node, log in enumerate(logs)]


def test_two_nodes_and_a_cut_link(alone, place, tmp_path):
    out = tmp_path / "out"
    kept, cut = agents(place, out, "--save_steps 1 --epoch_save 1000 --epoch_count 100")
    wait_for(lambda: (out / "loss_data.jsonl").exists() and len(rows(out)) > 3)
    for pid in (cut.pid, *Path(f"/proc/{cut.pid}/task/{cut.pid}/children").read_text().split()):
        os.kill(int(pid), signal.SIGKILL)                             # a whole machine
    assert kept.wait(60) != 0 and cut.wait(10) != 0
    log = out.with_suffix(".0.log").read_text()
    lost = 1 if "epoch 0" in log else 0                               # (rank 0 may be on either; it alone speaks)
    assert re.search(f"error: .*rank {lost} (stopped|is lost).*--resume continues", log)
    done = max(row["step"] for row in rows(out)) // 2 + 2             # epochs
    again = agents(place, out, f"--epoch_save 1000 --epoch_count {done} --resume")
    assert [process.wait(100) for process in again] == [0, 0]
    assert curve(out)[:7 * 3] == pytest.approx(curve(alone["plain"])[:len(curve(out))], rel=1e-5)


# --------------------------------------------------------------------------------------------- what README's model says


@pytest.mark.parametrize("stage", scaling.STAGES)
def test_bytes_held_are_the_formulas(stage):
    """Of one of eight ranks, from its tensors; but for the sum of the gradient, which is there in a step only."""
    p = torch.nn.Parameter(torch.zeros(2**16, dtype=torch.bfloat16))
    optimiser = P.ZeroAdamW([("a.lora_A", p)], P.Config(), ranks=P.Ranks(3, 8), stage=stage)
    summed = 4 * 2**16 / 8 if stage == 1 else 0
    assert optimiser.nbytes() == scaling.held(2**16, 8, stage) - summed


def test_the_numbers_that_adapters_train():
    run = P.Rehearsal(vram.setting("none", {}), vram.arch_of("RWKV7-0.1B"), "cuda", torch.bfloat16).run
    assert run.optimiser.numbers == scaling.adapter_numbers("RWKV7-0.1B")


def test_the_modelled_time_of_a_step():
    """By hand: 8 ranks, 10^9 numbers, 1 GB/s, a delay of 1 ms, a step that computes for 3 s."""
    times = [scaling.step_time(1e9, 8, stage, 3.0, 1e9, 1e-3) for stage in (0, 1, 2)]
    delays = (7 + 7 + 8 * 3) * 1e-3
    assert times == pytest.approx([3 + 7 + delays, 3 + 5.25 + delays, 3 + (3.5 - 2) + 1.75 + delays])


# -------------------------------------------------------------------------------------------------- the host's memory


def loading(argv, env, found):
    """A rank that loads: what its private memory grew by at most, and what it holds in the end, in bytes."""
    os.environ.update(env)
    torch.set_num_threads(1)
    ctypes.CDLL(None).mallopt(-3, 2**16)                              # M_MMAP_THRESHOLD: what is freed is given back
    sampler = Sampler()
    run = P.build(P.parse(argv))
    tensors = [*run.model.parameters(), *run.model.buffers(), *vars(run.optimiser).values()]
    storages = [t.untyped_storage() for t in tensors if isinstance(t, torch.Tensor)]
    found.put((sampler.growth(), sum({s.data_ptr(): s.nbytes() for s in storages}.values())))


class Sampler(reliability.threading.Thread):
    """Looks all the time at the memory that is in no file."""

    def __init__(self):
        super().__init__(daemon=True)
        self.before = self.most = self.now()
        self.ends = False
        self.start()

    def now(self):
        return 1024 * int(re.search(r"^Anonymous: +(\d+)", Path("/proc/self/smaps_rollup").read_text(), re.M)[1])

    def run(self):
        while not self.ends:
            self.most = max(self.most, self.now())
            time.sleep(0.001)

    def growth(self):
        self.ends = True
        self.join()
        return self.most - self.before


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux's /proc")
def test_a_rank_takes_no_more_private_memory_than_its_tensors_and_the_work_on_a_matrix(tmp_path):
    """Of a model of 70 MB, in fp32, whose matrices stay as they are; the file is mapped, and shared."""
    random_model(tmp_path / "base.pth", n_layer=6, n_embd=512)
    (tmp_path / "data.jsonl").write_text('{"text": "User: Hi.\\n\\nAssistant: Hello."}\n' * 8)
    matrix = 4 * 2048 * 512
    for size in (1, 3):
        place, found = reliability.meeting_place(size), reliability.server().Queue()
        argv = command(tmp_path, tmp_path / f"out-{size}", size, "--rank 8")
        ranks = [reliability.server().Process(target=loading, args=(argv, place | {"RANK": str(r)}, found))
                 for r in range(size)]
        for process in ranks:
            process.start()
        for grown, held in [found.get(timeout=100) for _ in ranks]:
            assert held > 7e7 and grown < held + 4 * matrix           # (3.0 to 3.2, by the machine)


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux's /proc")
def test_looking_at_every_number_of_a_file_takes_the_memory_of_a_piece(tmp_path):
    """A file of 64 MB: all of it at once took 116 more."""
    P.save(tmp_path / "resume.pth", {"x": torch.zeros(2**24)})
    sampler = Sampler()
    assert P.read_described(tmp_path / "resume.pth", "")[0]["x"].shape == (2**24,)
    assert sampler.growth() < 2**25
