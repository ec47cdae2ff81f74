"""Damaged files: 200 runs and 100 checkpoints of `bench/fuzz.py`, which does more of the same."""

import sys
from pathlib import Path

import pytest
import torch

import pissa_rwkv as P

sys.path.insert(0, str(Path(P.__file__).parent / "bench"))

import fuzz  # noqa: E402

CASES = 19  # of each of the eleven files


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("WORLD_SIZE", raising=False)
        patch.setattr(torch.cuda, "is_available", lambda: False)
        yield fuzz.Fuzz(tmp_path_factory.mktemp("fuzz"))
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", fuzz.SUBJECTS)
def test_a_damaged_file_is_refused_in_one_line_or_does_no_harm(place, name):
    before = place.count.copy()
    wrong = [text for number in range(CASES) if (text := place.case(name, number))]
    assert not wrong, "\n".join(wrong)
    count = place.count - before
    assert count["cases"] == CASES and count["refused"] + count["same_results"] + count["another_good_file"] == CASES


def test_every_way_of_a_format_is_tried():
    tried = {fuzz.way_of(name, number) for name in fuzz.SUBJECTS for number in range(CASES)}
    assert {*fuzz.ANY, *fuzz.OF_PTH, *fuzz.OF_IDX, *fuzz.OF_TAR} <= tried


def test_code_that_runs_would_be_seen(place, monkeypatch):
    """The judge is judged: with a careless reader a hostile file is found out."""
    load = torch.load
    monkeypatch.setattr(P, "check_names", lambda pickles: None)
    monkeypatch.setattr(torch, "load", lambda *inputs, **options: load(*inputs, **{**options, "weights_only": False}))
    number = next(n for n in range(99) if fuzz.way_of("base", n) is fuzz.OF_PTH[fuzz.FIRST_HOSTILE])
    assert "os.system" in place.case("base", number)


def test_a_checkpoint_never_loads_with_other_values(place):
    count = fuzz.checkpoints(place.good / "run", 100)
    assert count["other_values"] == 0 and count["refused"] > 70 and count["cuts"] == 25


def test_without_checksums_it_would(place, monkeypatch):
    monkeypatch.setattr(P.zipfile.ZipFile, "testzip", lambda archive: None)
    monkeypatch.setattr(P.zipfile.ZipExtFile, "_update_crc", lambda part, data: None)     # of the description
    assert fuzz.checkpoints(place.good / "run", 100)["other_values"] > 10
