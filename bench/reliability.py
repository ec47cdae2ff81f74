"""Kills training runs with SIGKILL at random moments, resumes them, and compares the end with an undisturbed run.

    python bench/reliability.py --kills 50          # about a minute -> bench/results/reliability.json

The run saves after every step. What is counted: kills; kills in the middle of writing a file (its unfinished neighbour
is left); .pth files that could not be read after a kill; resumed runs that failed; finished runs whose losses or files
differ in one bit from the undisturbed run's. A kill ends a whole process; these are forked from a server that has torch
imported already, so that one kill costs about a second.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import random
import sys
import tempfile
import threading
import time
from pathlib import Path

import record
import torch
from tqdm import tqdm

import pissa_rwkv as P

COUNTS = ("kills", "kills_while_writing", "unreadable_files", "failed_resumes", "finished_runs", "diverged_runs")


def work(argv: list[str], log: Path) -> None:
    """The process that is killed: one command, its output in a file."""
    with open(log, "a") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())                                  # its own one would outlive a killed process
    sys.exit(P.main(argv))


def start(argv: list[str], log: Path) -> multiprocessing.Process:
    """Starts `pissa_rwkv.py argv` in a process of its own."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch._dynamo"])                 # what torch imports sooner or later, 4 seconds
    process = context.Process(target=work, args=(list(map(str, argv)), log))
    process.start()
    return process


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        count = torture(small_run(Path(folder)), Path(folder), args.kills, args.seed)
    count["seconds"] = round(time.perf_counter() - began)
    print(", ".join(f"{number} {name.replace('_', ' ')}" for name, number in count.items()))
    print(f"-> {record.write('reliability', [count])}")


if __name__ == "__main__":
    main()
