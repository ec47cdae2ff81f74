"""Kills training runs with SIGKILL at random moments, resumes them, and compares the end with an undisturbed run.

    python bench/reliability.py --kills 50          # about a minute -> bench/results/reliability.json
    python bench/reliability.py --rank_kills 100    # one of 2 or 3 ranks; half an hour -> rank_kills.json

The run saves after every step. What is counted: kills; kills in the middle of writing a file (its unfinished neighbour
is left); .pth files that could not be read after a kill; resumed runs that failed; finished runs whose losses or files
differ in one bit from the undisturbed run's. A kill ends a whole process; these are forked from a server that has torch
imported already, so that one kill costs about a second.

With --rank_kills a random rank of a run on 2 or 3 is killed. Half of the runs have torchrun's own agent above them (its
processes forked from the same server), which restarts all ranks; they have to end like the undisturbed run on as many
ranks, in every bit. In the other half the ranks are alone: the survivors have to find out by themselves and name the
rank; then the run is resumed on another number of ranks with as many rows a step, and its losses are compared. What is
counted besides: the longest time in which survivors ended, and the largest difference of a loss.
"""

import argparse
import hashlib
import itertools
import json
import logging
import multiprocessing
import os
import random
import re
import signal
import socket
import sys
import tempfile
import threading
import time
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any

import record
import torch
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from tqdm import tqdm

import pissa_rwkv as P

COUNTS = ("kills", "kills_while_writing", "unreadable_files", "failed_resumes", "finished_runs", "diverged_runs")


def work(argv: list[str], log: Path, env: dict[str, str]) -> None:
    """The process that is killed: one command, its output in a file, its number beside that."""
    os.environ.update(env)
    with open(log, "a") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    pid_file(log, os.environ.get("RANK", "0")).write_text(str(os.getpid()))
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())                                  # its own one would outlive a killed process
    if status := P.main(argv):
        sys.exit(status)


def pid_file(log: Path, rank: int | str) -> Path:
    return log.with_suffix(f".{rank}.pid")


def server() -> Any:
    """What processes are forked from."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch._dynamo", "pissa_rwkv"])   # what torch imports sooner or later, 4 seconds
    return context


def start(argv: list[str], log: Path, **env: str) -> multiprocessing.Process:
    """Starts `pissa_rwkv.py argv` in a process of its own."""
    process = server().Process(target=work, args=(list(map(str, argv)), log, env))
    process.start()
    return process


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def meeting_place(size: int) -> dict[str, str]:
    """What ranks on this machine read in their environment to find each other."""
    return dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()), WORLD_SIZE=str(size))


def start_ranks(argv: list[str], size: int, log: Path) -> list[multiprocessing.Process]:
    """The same on `size` ranks, which nobody watches."""
    place = meeting_place(size)
    return [start(argv, log, RANK=str(rank), LOCAL_RANK=str(rank), **place) for rank in range(size)]


class Agent(threading.Thread):
    """torchrun's own agent, which starts the same on `size` ranks, watches and restarts them, in a thread."""

    def __init__(self, argv: list[str], size: int, log: Path, restarts: int = 1):
        super().__init__()
        server()
        for name in ("torch.distributed.elastic", "torch.multiprocessing.spawn"):         # they say who was killed
            logging.getLogger(name).setLevel(logging.CRITICAL)
        config = LaunchConfig(1, 1, size, run_id=log.stem, rdzv_backend="c10d", rdzv_endpoint="127.0.0.1:0",
                              max_restarts=restarts, start_method="forkserver")
        self.job = lambda: elastic_launch(config, work)(list(map(str, argv)), log, {})
        self.error: Exception | None = None
        self.start()

    def run(self) -> None:
        try:
            self.job()
        except Exception as error:     # ChildFailedError, or whatever the agent meets
            self.error = error

    def failed(self) -> bool:
        """Waits for its end."""
        self.join()
        return self.error is not None


def results(folder: Path) -> dict[str, object]:
    """What a run leaves, but for times: the digest of every .pth, and the numbers of every step."""
    files = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.glob("*.pth"))}
    steps = [json.loads(line) for line in (folder / "loss_data.jsonl").read_text().splitlines()]
    return files | {"steps": [{k: v for k, v in row.items() if k not in ("kt_s", "t_cost")} for row in steps]}


def unreadable(folder: Path) -> int:
    """How many of a folder's .pth files cannot be read."""
    bad = 0
    for path in folder.glob("*.pth"):
        try:
            P.read_pth(path, "after a kill")
        except P.Fatal as error:
            tqdm.write(str(error))
            bad += 1
    return bad


def torture(argv: list[str], folder: Path, kills: int, seed: int = 0) -> dict[str, int]:
    """Kills runs of argv (a command without --proj_dir) `kills` times in all, lets the last one finish, and counts."""
    draw, count = random.Random(seed), dict.fromkeys(COUNTS, 0)

    def run(name: str) -> multiprocessing.Process:
        return start([*argv, "--proj_dir", folder / name, "--resume"], folder / f"{name}.log")

    run("first").join()                                               # its time is mostly importing
    began = time.perf_counter()
    run("undisturbed").join()
    duration, wanted = time.perf_counter() - began, results(folder / "undisturbed")
    count["diverged_runs"] += results(folder / "first") != wanted
    with tqdm(total=kills, desc="kills", disable=None) as bar:
        while not count["finished_runs"] + count["failed_resumes"] or count["kills"] < kills:
            name = f"run-{count['finished_runs'] + count['failed_resumes']}"
            process = run(name)
            # (below the duration: no run should finish without having been killed)
            process.join(draw.uniform(0, 0.8 * duration) if count["kills"] < kills else None)
            if process.exitcode is None:
                process.kill()
                process.join()
                count["kills"] += 1
                count["kills_while_writing"] += any((folder / name).glob(".*.part"))
                count["unreadable_files"] += unreadable(folder / name)
                bar.update()
            elif process.exitcode:
                count["failed_resumes"] += 1
            else:
                count["finished_runs"] += 1
                count["diverged_runs"] += results(folder / name) != wanted
    return count


def small_run(folder: Path) -> list[str]:
    """A base model and a corpus, written into the folder, and the command that trains on them for 20 steps."""
    data, base = folder / "data.jsonl", folder / "base" / "rwkv-0.pth"
    lines = [json.dumps({"text": P.chat(q, a)}) for q, a in P.dummy_tasks("base", 64, 0)]
    data.write_text("\n".join(lines), "utf-8")
    common = f"--data_file {data} --op torch --ctx_len 8 --micro_bsz 2 --grad_cp 0"
    new = f"--peft none --n_layer 2 --n_embd 128 --epoch_steps 2 --lr_init 1e-2 --proj_dir {folder / 'base'} {common}"
    if P.main(new.split()):
        raise SystemExit("the base model could not be made")
    return f"--load_model {base} {common} --rank 64 --epoch_steps 5 --epoch_count 4 --save_steps 1".split()


# ---------------------------------------------------------------------------------------------- several processes

RANK_COUNTS = ("kills", "under_torchrun", "before_they_met", "hung_ranks", "unnamed_ranks", "failed_resumes",
               "diverged_runs", "others_ended_within_s", "loss_off_on_another_size")
LARGEST = RANK_COUNTS[-2:]
NAMES = r"rank (\d+, )*%d(, \d+)* (stopped|is lost)"                 # (more than one, if others are late to answer)
ROWS = 6                                                              # of an optimiser step, whoever makes them


def on_ranks(argv: list[str], size: int, folder: Path) -> list[str]:
    """The command on `size` ranks, with ROWS rows a step, all in micro-batches of one."""
    return [*argv, "--micro_bsz", 1, "--accumulate_grad_batches", ROWS // size, "--proj_dir", folder, "--resume"]


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in results(folder)["steps"] if "loss" in row]


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        return True
    except ProcessLookupError:
        return False


def pids_of(log: Path, size: int) -> list[int]:
    """Waits until all ranks have begun."""
    files = [pid_file(log, rank) for rank in range(size)]
    while not all(file.exists() and file.read_text() for file in files):
        time.sleep(0.01)
    return [int(file.read_text()) for file in files]


def kill_one(pids: list[int], after: float, draw: random.Random) -> tuple[int, float]:
    """Kills a random rank after this many seconds. Returns which, or -1 if it had ended, and when the others ended."""
    time.sleep(after)
    rank = draw.randrange(len(pids))
    if not alive(pids[rank]):
        return -1, 0.0
    os.kill(pids[rank], signal.SIGKILL)
    began = time.monotonic()
    while any(map(alive, pids)) and time.monotonic() - began < 60:
        time.sleep(0.01)
    return rank, time.monotonic() - began


def kill_and_go_on(argv: list[str], size: int, watched: bool, folder: Path, whole: dict[int, tuple[Path, float]],
                   draw: random.Random) -> dict[str, float]:
    """One run on `size` ranks of which one is killed, watched by torchrun's agent or not, and what became of it."""
    (wanted, duration), log = whole[size], folder.with_suffix(".log")
    other = draw.choice([n for n in (1, 2, 3) if n != size])
    agent = Agent(on_ranks(argv, size, folder), size, log) if watched else None
    ranks = [] if watched else start_ranks(on_ranks(argv, size, folder), size, log)
    rank, seconds = kill_one(pids_of(log, size), draw.uniform(0, 0.8 * duration), draw)
    for process in ranks:
        process.kill()                                                # (a rank that hangs; it is counted)
        process.join()
    failed, said = watched and agent.failed(), log.read_text()
    if rank < 0:                                                      # too late
        return dict.fromkeys(RANK_COUNTS, 0)
    named, met = re.search(NAMES % rank, said), "did not find each other" not in said     # who never came has no name
    if not watched:
        again = start_ranks(on_ranks(argv, other, folder), other, log)
        failed = any([process.join() or process.exitcode for process in again])           # (a list: all are waited for)
    count = dict(kills=1, under_torchrun=watched, hung_ranks=seconds >= 60, before_they_met=not met,
                 unnamed_ranks=met and not (watched or named), failed_resumes=failed, others_ended_within_s=seconds,
                 diverged_runs=0, loss_off_on_another_size=0.0)
    if watched and not failed:
        count["diverged_runs"] = results(folder) != results(wanted)
    elif not failed:
        count["loss_off_on_another_size"] = max(
            abs(a - b) for a, b in zip(losses(folder), losses(wanted), strict=True))
    if failed or count["diverged_runs"] or count["unnamed_ranks"]:
        tqdm.write(f"rank {rank} of {size}, watched {watched}: {log.read_text()}")
    return count


def torture_ranks(
    argv: list[str], folder: Path, kills: int, seed: int = 0, sizes: tuple[int, ...] = (2, 3), at_once: int = 3
) -> dict[str, float]:
    """Kills a rank in each of so many runs of argv, `at_once` side by side, lets them go on, and counts."""
    total, whole, argv = dict.fromkeys(RANK_COUNTS, 0), {}, [*argv, "--dist_timeout", 15]
    Agent(on_ranks(argv, 1, folder / "first"), 1, folder / "first.log").failed()          # (its time is mostly imports)
    for size in sizes:
        run, began = folder / f"undisturbed-{size}", time.perf_counter()
        if Agent(on_ranks(argv, size, run), size, run.with_suffix(".log")).failed():
            raise SystemExit(run.with_suffix(".log").read_text())
        whole[size] = run, time.perf_counter() - began

    def one(number: int) -> Future:
        size, watched = sizes[number % len(sizes)], number // len(sizes) % 2 == 0
        draw = random.Random(f"{seed} {number}")
        return pool.submit(kill_and_go_on, argv, size, watched, folder / f"run-{number}", whole, draw)

    # (In threads of one process they would read each other's children's exit statuses.)
    numbers, pool = itertools.count(), ProcessPoolExecutor(at_once, multiprocessing.get_context("forkserver"))
    with pool, tqdm(total=kills, desc="kills", disable=None) as bar:
        while total["kills"] < kills:
            futures = [one(number) for number in itertools.islice(numbers, kills - total["kills"])]
            for count in (future.result() for future in futures):
                bar.update(count["kills"])
                total = {name: max(n, count[name]) if name in LARGEST else n + count[name] for name, n in total.items()}
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--rank_kills", type=int, default=0, help="instead, of one rank among several")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args = parser.parse_args()
    name, how, kills = ("reliability", torture, args.kills)
    if args.rank_kills:
        name, how, kills = "rank_kills", torture_ranks, args.rank_kills
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        count = how(small_run(Path(folder)), Path(folder), kills, args.seed)
    count["seconds"] = round(time.perf_counter() - began)
    print(", ".join(f"{number:.3g} {name.replace('_', ' ')}" for name, number in count.items()))
    print(f"-> {record.write(name, [count])}")


if __name__ == "__main__":
    main()
