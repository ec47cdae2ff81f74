"""What only a GPU can show: a run there computes what a run on the CPU computes."""

import json
from pathlib import Path

import pytest
import torch

import pissa_rwkv as P

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]


def losses(model: Path, folder: Path, *options: str) -> list[float]:
    (text := folder.with_suffix(".txt")).write_text("A quick brown fox jumps over the lazy dog. " * 40)
    command = ["--load_model", model, "--data_file", text, "--proj_dir", folder, "--rank", 4, "--ctx_len", 64,
               "--micro_bsz", 2, "--epoch_steps", 4, "--lr_init", 1e-4, *options]
    assert P.main(list(map(str, command))) == 0
    return [json.loads(line)["loss"] for line in (folder / "loss_data.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("grad_cp", ["0", "1"])
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("tf32", 1e-2), ("bf16", 3e-2), ("fp16", 1e-2)])
def test_losses_are_the_cpus(model_file, tmp_path, precision, tolerance, grad_cp):
    base = model_file()
    cpu = losses(base, tmp_path / "cpu", "--accelerator", "cpu", "--precision", "fp32")
    gpu = losses(base, tmp_path / "gpu", "--accelerator", "gpu", "--precision", precision, "--grad_cp", grad_cp)
    assert gpu == pytest.approx(cpu, rel=tolerance)
