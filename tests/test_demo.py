"""The demonstration, in full: README's first command does what README says one should see."""

import io
import re
import signal
import sys

import pissa_rwkv as P


def test_demonstration(tmp_path, capfd, monkeypatch):
    assert P.main(["--proj_dir", str(tmp_path / "out"), "--accelerator", "cpu"]) == 0
    text = capfd.readouterr().out
    exact = {name: float(share) for name, share in re.findall(r"(base|pissa|lora) +\d\.\d+ +(\d+\.\d)%", text)}
    loss = {name: float(value) for name, value in re.findall(r"(base|pissa|lora) +(\d\.\d+) ", text)}
    assert exact["pissa"] > exact["lora"] + 10 > exact["base"] + 20, text
    assert loss["pissa"] < loss["lora"] < loss["base"], text
    assert float(re.search(r"held-out questions: (\d+\.\d)%", text)[1]) > 85, text
    assert float(re.search(r"largest difference of a logit: (\S+)", text)[1]) < 1e-4, text
    names = {p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*.pth")}
    assert {"base/rwkv-0.pth", "pissa/rwkv-0.pth", "pissa/init_pissa.pth", "pissa/rwkv-0-merged.pth"} <= names
    assert "torchrun pissa_rwkv.py --load_model" in text
    # Its last line is a command that works as printed, and that answers what was asked in step 4 as it was answered.
    command = re.search(r"python pissa_rwkv.py (--chat .*)", text)[1].split()
    asked = re.findall(r"^   (.+)  ->  (.+?)(?:  \(right: .*\))?$", text, re.M)
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{question}\n/reset\n" for question, _ in asked)))
    assert len(asked) == 4 and P.main([*command, "--accelerator", "cpu", "--sample_top_p", "0"]) == 0
    assert re.findall(r"^Assistant: (.+)$", capfd.readouterr().out, re.M) == [answer for _, answer in asked]


def test_a_stopped_demonstration_begins_anew(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(P, "train", lambda run: signal.SIGINT)
    command = ["--proj_dir", str(tmp_path / "out"), "--accelerator", "cpu"]
    assert P.main(command) == 130
    assert "begins anew, in another --proj_dir" in capfd.readouterr().out
    assert P.main(command) == 2
    assert "name another folder for the demonstration" in capfd.readouterr().err
