"""README says nothing that does not run: its commands, its ten lines, its tables."""

import io
import re
import shlex
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from conftest import random_model

import merge
import pissa_rwkv as P

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "bench"))
README = (ROOT / "README.md").read_text("utf-8")


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.S)


FILES = [ROOT / "README.md", ROOT / "README.zh.md", ROOT / "wkv7_cuda" / "README.md"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}-{file.name}")
def test_tables_are_what_the_module_and_the_results_say(file):
    import readme

    assert set(readme.TABLES) == set(FILES)
    assert readme.filled(file) == file.read_text("utf-8"), "run `python bench/readme.py`"


def test_tables_of_a_gpu_measured_in_part(monkeypatch):
    """Which quant a figure is of; each row's own machine; no column for a peer that is not there."""
    import readme

    read, about = readme.record.read, {"machine": "a GPU", "threads": 1, "torch": "2", "commit": "c", "date": "d"}
    cell = {"kind": "measured", "model": "RWKV7-1.5B", "quant": "int8", "setting": "", "total": 3.21e9}
    step = {"name": "pissa_rwkv", "model": "RWKV7-1.5B", "bsz": 8, "ctx": 1024, "dtype": "bf16", "quant": "none",
            "setting": "", "failed": "", "tokens_per_s": 1e5, "faster_than": {"pissa_rwkv bf16 none": 1.0},
            "peak": None, "utilisation": 0.4, "load": 0.5}
    curve = {"device": "cuda", "modes": ["cuda_precise", "cuda"], "steps": 7, "seeds": [0, 1],
             "between_modes": [1, 2], "between_seeds": [3, 4]}
    kernel = {"matrix": [768, 512], "quant": "nf4", "dtype": "bfloat16", "kernel_us": 1.234, "kernel_gb_s": 3210.0,
              "share": 0.81, "plain_us": 99.6, "load": 0.5}
    six = {"op": "cuda", "shape": [*next(iter(readme.wkv.tabled("cuda")))], "dtype": "bfloat16", "regime": "",
           "failed": "no time", "load": 0.5}
    new = {"vram": [cell], "step-cuda": [step], "wkv_curve-cuda": [curve], "dequant-cuda": [kernel],
           "wkv6-cuda": [six]}
    monkeypatch.setattr(readme.record, "read", lambda name: read(name) + [r | about for r in new.get(name, [])])
    memory, steps, curves = readme.memory(), readme.steps(), readme.curve()
    assert "| 768 x 512 | nf4 | bfloat16 | 1.23 | 3210 | 81% | 99.6 |\n" in readme.dequantising()
    assert re.search(r"\| `cuda` \| .* \| bfloat16 \| no time \|", readme.wkv6())
    assert " - / 3.21 / - |\n" in memory and memory.count("not yet measured") == memory.count("| RWKV") - 1
    assert "| tokens/s | memory, GB |" in steps and "| 100,000 |  | 40% |" in steps
    assert re.search(r"On a GPU: 7 steps, bf16. \(a GPU, .* On a CPU: 200 steps, bf16. \((?!a GPU)", curves)


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}-{file.name}")
def test_pictures_exist(file):
    for path in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", file.read_text("utf-8")):
        assert (file.parent / path).is_file()


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}-{file.name}")
def test_links_lead_somewhere(file):
    for path in re.findall(r"\]\((?!https?:|#)([^)#]+)", file.read_text("utf-8")):
        assert (file.parent / path).exists()


def test_both_languages_have_the_same_commands_and_sections():
    chinese = (ROOT / "README.zh.md").read_text("utf-8")
    assert blocks("bash", chinese) == blocks("bash") and chinese.count("\n## ") == README.count("\n## ")


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


def test_the_tutorial_s_options_have_a_row_and_work():
    """Every flag stands on the left once; where another option stands beside it, the parser takes both for the same."""
    import readme
    from test_tutorial import FLAGS

    assert set(readme.TUTORIAL.split()) == set(FLAGS)
    rows = [line.split(" | ") for line in readme.tutorial().splitlines()[3:]]
    named = [name for left, *_ in rows for name in re.findall(r"`--(\w+)`", left)]
    also = [f.metadata["also"] for f in fields(P.Config) if f.metadata["also"]]
    assert set(FLAGS) | set(also) | set(P.WITHOUT_EFFECT) | set(P.JSON_OPTIONS) <= set(named)
    assert [name for name in named if named.count(name) > 1] == ["grad_cp"] * 2  # (it has a remark of its own)
    actions = [*P.parser()._actions, *merge.parser()._actions]
    pairs = {(theirs, ours) for left, right, what in rows if what.startswith(("either name", "any of"))
             for theirs in re.findall(r"--\w+", left) for ours in re.findall(r"--\w+", right)}
    assert len(pairs) == len(also) + 5
    for pair in pairs:
        assert any(set(pair) <= set(action.option_strings) for action in actions), pair


@pytest.mark.parametrize("option", sorted(set(re.findall(r"`--(\w+)", README))))
def test_options_named_exist(option):
    known = {name for action in [*P.parser()._actions, *merge.parser()._actions] for name in action.option_strings}
    assert f"--{option}" in known
