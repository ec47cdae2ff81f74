"""Weights & Biases: the package itself writes a run offline, and its file is read back record by record."""

import json
import math
import os
import shlex
import struct
import sys
from pathlib import Path

import pytest
import torch
from conftest import random_model

import pissa_rwkv as P

wandb = pytest.importorskip("wandb")
records = pytest.importorskip("wandb.proto.wandb_internal_pb2")


@pytest.fixture
def command(tmp_path, monkeypatch):
    """command(options) -> argv of a small run into tmp_path/out, beside an empty home folder."""
    for name in [*os.environ]:
        if name.startswith("WANDB_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_CACHE_DIR", "")                         # (so that what a run sets is undone)
    for name in ("home", "elsewhere"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "elsewhere")
    random_model(tmp_path / "base.pth")
    (tmp_path / "data.jsonl").write_text('{"text": "some text that is long enough"}\n' * 6)
    yield lambda options: shlex.split(
        f"--load_model '{tmp_path}/base.pth' --data_file '{tmp_path}/data.jsonl' --proj_dir '{tmp_path}/out' --op torch"
        f" --rank 4 --ctx_len 8 --micro_bsz 2 --wandb a-project {options}")
    wandb.teardown()


def read(path):
    """The records of a .wandb file: a head of 7 bytes, then LevelDB's log format, whose records (checksum, length,
    kind: 1 whole, 2 first, 3 middle, 4 last part) never cross the border of a block of 32 KiB."""
    wandb.teardown()                                                  # (ends the process that writes the file)
    data, at, whole, found = path.read_bytes(), 7, b"", []
    assert data[:4] == b":W&B"
    while at + 7 <= len(data):
        if 2**15 - at % 2**15 < 7:
            at += 2**15 - at % 2**15
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        whole, at = whole + data[at + 7: at + 7 + length], at + 7 + length
        if kind in (1, 4):
            found.append(records.Record.FromString(whole))
            whole = b""
    return found


def of_kind(found, kind):
    return [getattr(record, kind) for record in found if record.WhichOneof("record_type") == kind]


def test_a_run_logged_offline(command, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    options = "--epoch_steps 2 --epoch_count 2 --val_split 0.3"
    assert P.main(command(options)) == 0
    file, = (tmp_path / "out").glob("wandb/offline-run-*/*.wandb")
    found = read(file)
    run = of_kind(found, "run")[0]
    assert run.project == "a-project" and run.display_name == "out"
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert config["rank"] == 4 and config["val_split"] == 0.3
    # The same rows as in loss_data.jsonl, those of a step together.
    wanted = {}
    for line in (tmp_path / "out" / "loss_data.jsonl").read_text().splitlines():
        row = json.loads(line)
        wanted.setdefault(row["step"], {}).update(row)
    rows = [{(item.key or item.nested_key[0]): json.loads(item.value_json) for item in history.item}
            for history in of_kind(found, "history")]
    assert [row["_step"] for row in rows] == [0, 1, 2, 3] == [*wanted]
    assert [{k: v for k, v in row.items() if k[0] != "_"} for row in rows] == [*wanted.values()]
    assert ["val_loss" in row for row in rows] == [False, True, False, True]
    assert [end.exit_code for end in of_kind(found, "exit")] == [0] and wandb.run is None
    # Nothing is left anywhere else.
    assert {p.name for p in tmp_path.iterdir()} == {"home", "elsewhere", "base.pth", "data.jsonl", "out"}
    assert not [*(tmp_path / "home").iterdir(), *(tmp_path / "elsewhere").iterdir()]


def test_a_run_that_fails_is_ended_as_failed(command, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("WANDB_MODE", "offline")
    train_step = P.train_step

    def step(run, lr):
        if run.step == 1:
            raise P.Fatal("the second step fails")
        return train_step(run, lr)

    monkeypatch.setattr(P, "train_step", step)
    assert P.main(command("--epoch_steps 3")) == 2
    file, = (tmp_path / "out").glob("wandb/offline-run-*/*.wandb")
    found = read(file)
    assert [end.exit_code for end in of_kind(found, "exit")] == [1] and wandb.run is None
    assert len(of_kind(found, "history")) == 1


def test_a_run_that_fails_before_its_first_step_is_ended_as_failed(command, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    weights = torch.load(tmp_path / "base.pth")
    weights["blocks.0.ffn.key.weight"][0] = math.nan
    torch.save(weights, tmp_path / "base.pth")
    assert P.main(command("--epoch_steps 1")) == 2
    file, = (tmp_path / "out").glob("wandb/offline-run-*/*.wandb")
    assert [end.exit_code for end in of_kind(read(file), "exit")] == [1] and wandb.run is None


def test_ctrl_c_before_the_first_step_ends_it_as_failed(command, tmp_path, monkeypatch):
    def stopped(*args):
        raise KeyboardInterrupt

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(P, "load_model", stopped)
    assert P.main(command("--epoch_steps 1")) == 130
    file, = (tmp_path / "out").glob("wandb/offline-run-*/*.wandb")
    assert [end.exit_code for end in of_kind(read(file), "exit")] == [1] and wandb.run is None


def one_line(capfd):
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("pissa_rwkv: error:")]
    assert len(lines) == 1
    return lines[0]


def test_online_without_a_key(command, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("WANDB_MODE", "online")
    assert P.main(command("--epoch_steps 1")) == 2
    assert "--wandb a-project: No API key" in (line := one_line(capfd)) and "WANDB_MODE=offline" in line
    assert not [*tmp_path.glob("out/*.pth")]                          # (before the adapters' start is computed)


def test_the_package_is_not_there(command, tmp_path, monkeypatch, capfd):
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert P.main(command("--epoch_steps 1")) == 2
    assert "--wandb a-project: the package is not installed: `pip install wandb`" in one_line(capfd)
    assert not Path(tmp_path / "out").exists()
