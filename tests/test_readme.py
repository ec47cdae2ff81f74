"""README says nothing that does not run: its commands, its ten lines, its tables."""

import io
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
from conftest import random_model

import merge
import pissa_rwkv as P

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "bench"))
README = (ROOT / "README.md").read_text("utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


FILES = [ROOT / "README.md", ROOT / "wkv7_cuda" / "README.md"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.parent.name)
def test_tables_are_what_the_module_and_the_results_say(file):
    import readme

    assert set(readme.TABLES) == set(FILES)
    assert readme.filled(file) == file.read_text("utf-8"), "run `python bench/readme.py`"


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.parent.name)
def test_pictures_exist(file):
    for path in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", file.read_text("utf-8")):
        assert (file.parent / path).is_file()


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.parent.name)
def test_links_lead_somewhere(file):
    for path in re.findall(r"\]\((?!https?:|#)([^)#]+)", file.read_text("utf-8")):
        assert (file.parent / path).exists()


def test_the_ten_lines_of_pissa():
    code = next(block for block in blocks("python") if "W_res" in block)
    names = {"top_singular": P.top_singular, "rank": 4, "niter": 4, "draw": torch.Generator().manual_seed(0),
             "W": torch.randn(24, 16), "x": torch.randn(3, 16)}
    exec(code, names)
    torch.testing.assert_close(names["y"], names["x"] @ names["W"].T)
    torch.testing.assert_close(names["W_merged"], names["W"])
    assert names["A"].shape == (4, 16) and names["B"].shape == (24, 4)


def test_commands_run(tmp_path, monkeypatch):
    """Every command but those that install, shrunk, in README's order: what one writes the next reads."""
    monkeypatch.chdir(tmp_path)
    random_model(tmp_path / "M.pth")
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hi\n/exit\n" * 9))       # of those that talk
    (tmp_path / "chats.jsonl").write_text('{"text": "User: Hi\\n\\nAssistant: Hello!"}\n' * 4)
    commands = [line for block in blocks("bash") for line in block.splitlines() if ".venv" not in line]
    assert len(commands) >= 2
    for line in commands:
        launcher, program, *words = shlex.split(line)
        assert launcher in ("torchrun", "python")
        words = [re.sub(r"^RWKV-.*\.pth$", "M.pth", word) for word in words]
        if program == "pissa_rwkv.py":
            shrunk = "--ctx_len 8 --epoch_steps 1 --micro_bsz 2 --rank 2 --accelerator cpu --op chunk --chunk_ctx 3"
            assert P.main([*words, *shrunk.split()]) == 0, line
        else:
            assert program == "merge.py" and merge.main(words) == 0, line
    assert (tmp_path / "tuned.pth").exists()


def test_every_type_sampler_and_mask_has_its_line():
    for flag, table in (("data_type", P.CORPUS), ("dataload", P.SAMPLER), ("loss_mask", P.MASK)):
        rows = README[README.index(f"| `--{flag}` |"):].split("\n\n")[0].partition("\n")[2]
        assert set(re.findall(r"^\| `([\w-]+)` \|", rows, re.M)) == set(table)


@pytest.mark.parametrize("option", sorted(set(re.findall(r"`--(\w+)", README))))
def test_options_named_exist(option):
    known = {name for action in [*P.parser()._actions, *merge.parser()._actions] for name in action.option_strings}
    assert f"--{option}" in known
