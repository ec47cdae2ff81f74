"""Every version with every method on every quantisation: trained, stopped and resumed, merged. The table of these cells
stands at the end of the test run."""

import json
import math

import pytest
import torch
from conftest import load_model, logits_of, random_model

import merge
import pissa_rwkv as P

METHODS = {"pissa": ["--svd_niter", "2"], "lora": [], "bone": ["--bone_mode", "bat"], "state": []}
LR = {"pissa": 1e-3, "lora": 5e-3, "bone": 1e-3, "state": 0.1}
TEXTS = ["the same short text, again and again", "User: 2+2?\n\nAssistant: 4", "and a last one"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cells")
    for version in P.TIME_MIX:
        random_model(folder / f"{version}.pth", version=version)
    (folder / "data.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS))
    return folder


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def losses(folder):
    return [json.loads(line)["loss"] for line in (folder / "loss_data.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("quant", ["none", "int8", "nf4"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("version", P.TIME_MIX)
def test_a_cell_trains_resumes_to_the_bit_and_merges_into_what_it_was(
    version, method, quant, place, tmp_path, capsys, record_property
):
    base = str(place / f"{version}.pth")

    def run(name, *more):
        argv = ["--load_model", base, "--data_file", str(place / "data.jsonl"), "--proj_dir", str(tmp_path / name),
                "--peft", method, *METHODS[method], "--quant", quant, "--rank", "4", "--op", "cpu", "--ctx_len", "16",
                "--micro_bsz", "3", "--epoch_steps", "3", "--lr_init", str(LR[method]), "--lr_final", str(LR[method])]
        assert P.main([*argv, *more]) == 0, capsys.readouterr().err
        return tmp_path / name

    whole = run("whole", "--epoch_count", "2")
    run("parts", "--epoch_count", "1")
    parts = run("parts", "--epoch_count", "2", "--resume")
    assert losses(parts) == losses(whole)                                                 # to the bit
    assert all(map(math.isfinite, losses(whole))) and min(losses(whole)[3:]) < losses(whole)[0]
    tensors = [P.read_pth(folder / "rwkv-1.pth", "") for folder in (whole, parts)]
    assert all(torch.equal(tensors[0][name], t) for name, t in tensors[1].items())

    cfg = P.parse(["--load_model", base, "--data_file", str(place / "data.jsonl"), "--proj_dir", str(parts), "--resume",
                   "--peft", method, *METHODS[method], "--quant", quant, "--rank", "4", "--op", "cpu", "--ctx_len",
                   "16", "--micro_bsz", "3", "--epoch_steps", "3", "--epoch_count", "2"])
    adapted = P.build(cfg).model
    merged = str(tmp_path / "merged.pth")
    init = ["--lora_init", str(whole / "init_pissa.pth")] if method == "pissa" else []
    assert merge.main(["--type", method, "--base_model", base, *init, "--lora_checkpoint", str(whole / "rwkv-1.pth"),
                       "--output", merged]) == 0, capsys.readouterr().err
    tokens = [5, 9, 200, 7, 1, 65, 32]
    found, wanted, before = (logits_of(m.eval(), tokens)[0] for m in (load_model(merged), adapted, load_model(base)))
    error = ((found - wanted).abs().max() / wanted.std()).item()
    assert error < 1e-4 < (wanted - before).abs().max() / wanted.std()
    record_property("cell", (version, method, quant, f"{losses(whole)[0]:.3f} -> {losses(whole)[-1]:.3f}, {error:.0e}"))
