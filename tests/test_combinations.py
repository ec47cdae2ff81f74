"""Options drawn at random: two draws of `bench/combinations.py`, which makes more; and the judge is judged."""

import collections
import sys
from pathlib import Path

import pytest
import torch

import pissa_rwkv as P

sys.path.insert(0, str(Path(P.__file__).parent / "bench"))

import combinations  # noqa: E402


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    combinations.write_data(folder := tmp_path_factory.mktemp("combinations"))
    yield folder
    torch.set_num_threads(threads)


@pytest.mark.parametrize("number", [1000, 1003])
def test_what_must_hold_does(number, place):
    count = collections.Counter()
    assert not combinations.examine(number, place, count)
    assert count["refused"] == 1 or count["kept"] == count["resumed"] == count["counted"] == 1


def wrong_ways(monkeypatch):
    monkeypatch.setitem(P.GRAD_CP, "0", lambda *inputs: P.keep_all(inputs[0], 1.01 * inputs[1], *inputs[2:]))


def forgotten_moments(monkeypatch):
    load = P.ZeroAdamW.load
    monkeypatch.setattr(P.ZeroAdamW, "load", lambda self, state: load(self, state | {"v": 2 * state["v"]}))


def another_scale(monkeypatch):
    for layer in (P.LowRank, P.BoneLinear):
        monkeypatch.setattr(layer, "delta", lambda W, scale, delta=layer.delta, **own: 2 * delta(W, scale, **own))


def a_traceback(monkeypatch):
    monkeypatch.setattr(P, "end_epoch", lambda *inputs: {}["no such key"])


def another_count(monkeypatch):
    monkeypatch.setattr(P, "dry_run", lambda plan: P.say("would train 7 of 8 numbers"))


def half_a_gradient(monkeypatch):
    """Of one rank: the two are processes of their own, without the fault."""
    reduce = P.ZeroAdamW.reduce
    monkeypatch.setattr(P.ZeroAdamW, "reduce", lambda self: (self.grad.mul_(0.5), reduce(self))[1])
    monkeypatch.setattr(combinations, "SHARED", 1.0)


def nothing_finite(monkeypatch):
    monkeypatch.setitem(P.GRAD_CP, "1", lambda block, x, *rest: P.keep_input(block, x * torch.nan, *rest))


def all_refused(monkeypatch):
    def refuse(cfg):
        raise P.Fatal("no reason at all")

    monkeypatch.setattr(P, "check", refuse)


FAULTS = [("kept", wrong_ways), ("resumed", forgotten_moments), ("merged", another_scale), ("traceback", a_traceback),
          ("counted", another_count), ("shared", half_a_gradient), ("refused", nothing_finite),
          ("refused", all_refused)]


@pytest.mark.parametrize("check, plant", FAULTS)
def test_a_planted_fault_is_seen(check, plant, place, monkeypatch):
    plant(monkeypatch)
    monkeypatch.setattr(combinations, "CHECKS", [f for f in combinations.CHECKS if f.__name__ == check])
    wrong, count, number = [], collections.Counter(), 2000
    while count["draws"] < 6 and not wrong:
        wrong, number = combinations.examine(number, place, count), number + 1
    assert any(f" {check}: " in text for text in wrong), wrong
