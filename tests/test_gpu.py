"""What only a GPU can show: a run there computes what a run on the CPU computes."""

import json
from pathlib import Path

import pytest
import torch

import pissa_rwkv as P

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]


@pytest.fixture(autouse=True)
def precision_of_others():
    """A run in tf32 would leave other tests of this process products that are off by 4e-4."""
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


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


@pytest.mark.parametrize("options", [
    "", "--precision fp32 --op cuda_precise", "--grad_cp products --quant nf4", "--grad_cp 0 --peft lora",
    "--compile 1 --grad_cp products", "--dataload pad", "--peft none", "--accumulate_grad_batches 2",
    "--train_parts emb ln time",
])
def test_a_graph_computes_what_it_recorded(model_file, tmp_path, monkeypatch, capsys, options):
    replays, captured = [], P.Graphs.captured

    def counted(graphs, work):
        replay, loss = captured(graphs, work)
        return lambda: (replays.append(1), replay()), loss

    monkeypatch.setattr(P.Graphs, "captured", counted)
    base, options = model_file(), ["--epoch_steps", "12", *options.split()]
    eager = losses(base, tmp_path / "eager", *options)
    graphs = losses(base, tmp_path / "graphs", *options, "--cuda_graph", "1")
    assert graphs == pytest.approx(eager, rel=1e-5 if "fp32" in options else 1e-2)
    assert "could not be recorded" not in capsys.readouterr().out and len(replays) >= 8


@pytest.mark.parametrize("options", [
    "", "--moments 8bit --quant nf4", "--moments 8bit --precision fp16", "--peft none"])
def test_a_run_goes_on_where_it_stopped(model_file, tmp_path, options):
    base, options = model_file(), ["--lr_final", "1e-4", *options.split()]
    whole = losses(base, tmp_path / "run", *options, "--epoch_count", "2")
    losses(base, tmp_path / "parts", *options)
    parts = losses(base, tmp_path / "parts", *options, "--epoch_count", "2", "--resume")
    assert len(parts) == len(whole) == 8 and parts == pytest.approx(whole, rel=1e-6)
