"""Memory as it is predicted: beside the allocator's own count, the published numbers of parameters, and arithmetic."""

import gc
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
from conftest import random_model
from torch.profiler import ProfilerActivity, profile

import pissa_rwkv as P

sys.path.insert(0, str(Path(P.__file__).parent / "bench"))
import record  # noqa: E402
import vram  # noqa: E402


@pytest.fixture(autouse=True)
def one_thread():
    """The tensors are tiny, and a second thread only waits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def really_taken(function):
    """What a function returns, and of the bytes that the CPU's allocator had given out: the most, and those left."""
    gc.collect()                                                      # what earlier tests left must not go meanwhile
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        result = function()
    events = sorted((e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"),
                    key=lambda e: e.start_ns())  # fmt: skip
    live = most = 0
    for event in events:
        live += event.nbytes()
        most = max(most, live)
    return result, most, live


def plain(r, w, k, v, a, b, state):
    """In the operator's place: all it allocates is to be seen, in a few operations instead of thousands."""
    return r * w + k * v + a * b + state.sum(), state * 2


def loaded(cfg, tensors, arch, dtype):
    """A run as `build` makes it, of full rows; and the bytes of what init_pissa.pth will hold, which are the host's."""
    with torch.device("meta"):
        model = P.RWKV(arch, P.load_wkv("x070", 64, cfg.op, "cpu"), cfg.grad_cp)
    P.fill(model, tensors, cfg.load_model, "cpu", dtype, P.left_in_file(model, cfg))
    taken = P.add_adapters(model, cfg, {}, {})
    optimiser = P.ZeroAdamW(((n, p) for n, p in model.named_parameters() if p.requires_grad), cfg)
    loader = P.FullRows(cfg.micro_bsz, cfg.ctx_len, "cpu")
    run = P.Run(cfg, P.ONE_RANK, "cpu", dtype, arch, None, loader, None, 1, {}, model, optimiser)
    return run, sum(t.nbytes for t in taken.values())


@pytest.mark.parametrize(("options", "dtype"), [
    (dict(op="cpu"), torch.float32), (dict(op="chunk", ctx_len=100), torch.float32),
    (dict(op="chunk", quant="nf4"), torch.bfloat16),
    (dict(grad_cp="0"), torch.float32), (dict(grad_cp="products"), torch.bfloat16),
    (dict(op="cpu", grad_cp="products", quant="nf4"), torch.float32),
    (dict(quant="nf4", ctx_len=100), torch.float32),
    (dict(quant="int8", micro_bsz=5), torch.bfloat16), (dict(quant="nf4dq", grad_cp="0"), torch.bfloat16),
    (dict(peft="lora", emb_on_cpu=True, micro_bsz=8), torch.bfloat16), (dict(peft="none", grad_cp="0"), torch.float32),
    (dict(peft="bone", quant="int8"), torch.float32), (dict(peft="bone", bone_mode="bat"), torch.float32),
    (dict(peft="state", quant="nf4", micro_bsz=5), torch.bfloat16),
    (dict(peft="none", train_parts=("ln", "head"), quant="int8", grad_cp="0"), torch.float32),
    (dict(moments="8bit", micro_bsz=8), torch.bfloat16),
    (dict(micro_bsz=4, accumulate_grad_batches=2, train_parts=()), torch.bfloat16)], ids=str)
def test_prediction_is_what_the_allocator_saw(options, dtype, tmp_path, monkeypatch):
    """Real tensors, through the same functions: held, at the peak of loading, and at the peak of a step.

    (A CPU's products in bf16 take 0.3 MB for themselves, which no one predicts: with few rows that is a tenth.)"""
    monkeypatch.setitem(P.WKV["x070"], "torch", lambda: plain)
    path = random_model(tmp_path / "base.pth", n_layer=3, n_embd=192, vocab_size=2048, dtype=torch.bfloat16)
    cfg = P.Config(**dict(load_model=str(path), op="torch", ctx_len=64, micro_bsz=2, rank=8) | options)
    tensors = P.read_pth(path, "")                                    # (memory-mapped: not the allocator's)
    arch, tensors = P.with_time_state(P.detect(tensors, ""), tensors, cfg)
    P.nf4_levels(torch.device("cpu")), P.dynamic_levels(torch.device("cpu"))  # (tables of levels are made once)
    (run, taken), loading, held = really_taken(lambda: loaded(cfg, tensors, arch, dtype))
    _, step, left = really_taken(lambda: P.train_step(run, 1e-5))
    found = P.Rehearsal(cfg, arch, "cpu", dtype).memory(cfg.micro_bsz)
    for name, predicted, real, within in (("loading", found.loading, loading - taken, 0.05),
                                          ("held", found.weights + found.optimiser, held, 0.01),
                                          ("step", found.activations, step, 0.05)):
        print(f"{name}: {predicted / real:.4f}")
        assert predicted == pytest.approx(real, rel=within), name
    assert abs(left) < 2**16


@pytest.mark.parametrize("name", vram.MODELS)
def test_models_have_the_published_number_of_parameters(name):
    with torch.device("meta"):
        model = P.RWKV(vram.arch_of(name), P.wkv7_ref)
    assert sum(p.numel() for p in model.parameters()) == vram.MODELS[name].parameters
    a_layer = {"x070": 576, "x060": 672}[model.arch.version] * model.arch.n_embd
    assert sum(32 * sum(m.weight.shape) for m in P.adapted(model).values()) == a_layer * model.arch.n_layer


def test_a_prediction_for_a_gpu_needs_none_and_adds_up():
    cfg, arch = vram.setting("nf4", {"ctx_len": 256}), P.replace(vram.arch_of("RWKV7-0.1B"), n_layer=3)
    rehearsal = P.Rehearsal(cfg, arch, "cuda", torch.bfloat16)
    one, two = rehearsal.memory(1), rehearsal.memory(2)
    trained = sum(p.numel() for _, p in rehearsal.run.optimiser.named)
    assert one.optimiser == pytest.approx(14 * trained, abs=5 * 512) and rehearsal.peak.live == rehearsal.held
    assert one[:2] == two[:2] and one.loading == two.loading and one.activations < two.activations
    without = P.Rehearsal(P.replace(cfg, emb_on_cpu=True), arch, "cuda", torch.bfloat16).memory(1)
    assert one.weights - without.weights == pytest.approx(2 * 65536 * 768, abs=4096)  # (nf4's tables are made once)
    best, room = rehearsal.largest_bsz(15 * 10**8), 15 * 10**8
    assert rehearsal.memory(best).total <= room < rehearsal.memory(best + 1).total and best > 4
    assert rehearsal.largest_bsz(10**8) == 0


def test_graphs_have_memory_of_their_own():
    cfg, arch = vram.setting("none", {"ctx_len": 64}), P.replace(vram.arch_of("RWKV7-0.1B"), n_layer=2)
    without, with_graphs = (P.Rehearsal(P.replace(cfg, cuda_graph=on), arch, "cuda", torch.bfloat16).memory(1)
                            for on in (False, True))
    assert with_graphs.activations == 2 * without.activations and with_graphs[:2] == without[:2]


def test_auto_keeps_as_much_as_fits(tmp_path, capsys):
    cfg, arch = vram.setting("none", {"ctx_len": 256}), P.replace(vram.arch_of("RWKV7-0.1B"), n_layer=4)
    rehearsal, taken = P.Rehearsal(cfg, arch, "cuda", torch.bfloat16), {}
    for way, rehearsal.run.model.run_block in P.GRAD_CP.items():
        taken[way] = rehearsal.memory(1).total
    assert taken["0"] > taken["products"] > taken["1"]
    for way, room in (("0", taken["0"]), ("products", taken["0"] - 1), ("products", taken["products"]),
                      ("1", taken["products"] - 1), ("1", 10**8)):
        assert rehearsal.fastest(1, room) == way
    kept = (taken["products"] - taken["1"]) / 1.03 / (256 * 768 * 2)                      # in rows of C numbers
    assert kept == pytest.approx(8 * arch.n_layer - 1, abs=0.1)       # (one is there at the peak anyway)
    run = f"--load_model {random_model(tmp_path / 'base.pth')} --data_file {tmp_path}/d.txt --grad_cp auto --rank 4"
    (tmp_path / "d.txt").write_text("a text " * 99)
    assert P.main([*run.split(), "--accelerator", "gpu", "--vram_gb", "24", "--dry_run"]) == 0
    assert re.search(r"--grad_cp auto: 0, 0\.\d\d of 24.00 GB\n(.*\n)*would hold", capsys.readouterr().out)
    assert P.main([*run.split(), "--accelerator", "cpu", "--proj_dir", str(tmp_path / "out")]) == 2
    assert "--grad_cp auto: how much memory it may use is not known for a cpu; set --vram_gb" in " ".join(
        capsys.readouterr().err.split())


def test_dry_run_for_a_card_that_is_not_here(tmp_path, capsys):
    path = random_model(tmp_path / "base.pth")
    words = "--data_type dummy --data_file base --ctx_len 16 --rank 4 --accelerator gpu --dry_run --vram_gb 0.6"
    assert P.main(["--load_model", str(path), *words.split()]) == 0
    said = capsys.readouterr().out
    assert re.search(r"would hold 0\.5\d GB on the cuda", said)
    assert said.splitlines()[-2].endswith(", with --op cuda (chunk takes more: give --op)")
    assert int(re.search(r"largest --micro_bsz that fits is (\d+)", said)[1]) > 4


@pytest.mark.parametrize("op, head_size, words", [
    ("cuda", 64, "loaded"), ("chunk", 32, "loaded"), ("", 32, "loaded, with --op chunk"),
    ("triton", 64, "loaded, with --op cuda (triton's own bytes are not known)")])
def test_a_dry_run_says_which_operator_it_counts(op, head_size, words, tmp_path, capsys):
    path = random_model(tmp_path / "base.pth", head_size=head_size)
    options = f"--data_type dummy --data_file base --ctx_len 16 --rank 4 --accelerator gpu --dry_run --op '{op}'"
    assert P.main(["--load_model", str(path), *shlex.split(options)]) == 0
    assert capsys.readouterr().out.strip().endswith(words)


@pytest.mark.parametrize("version, quant, precision", [("x070", "none", "bf16"), ("x060", "int8", "fp16"),
                                                       ("x052", "nf4dq", "fp32")])
def test_dry_run_where_a_gpu_is(version, quant, precision, tmp_path, capsys, pretend_gpu):
    """Only its memory is asked for: what is counted has no values and lies on no device."""
    path = random_model(tmp_path / "base.pth", version=version)
    words = (f"--data_type dummy --data_file base --ctx_len 16 --rank 4 --dry_run --grad_cp auto --quant {quant}"
             f" --precision {precision}")  # fmt: skip
    pretend_gpu()
    assert P.main(["--load_model", str(path), *words.split()]) == 0
    said = capsys.readouterr().out
    assert "--grad_cp auto: 0, " in said and " of 8.50 GB" in said and "would hold 0.5" in said


def test_the_embedding_left_in_its_file_changes_no_loss(tmp_path):
    path, losses = random_model(tmp_path / "base.pth", dtype=torch.bfloat16), []
    for word in ("0", "1"):
        out = str(tmp_path / word)
        words = f"--data_type dummy --data_file base --ctx_len 16 --rank 4 --epoch_steps 3 --emb_on_cpu {word}"
        assert P.main(["--load_model", str(path), "--proj_dir", out, "--accelerator", "cpu", *words.split()]) == 0
        losses.append(re.findall(r'"loss": ([^,]+)', (tmp_path / word / "loss_data.jsonl").read_text()))
    assert losses[0] == losses[1] and len(losses[0]) == 3


@pytest.mark.parametrize("words", ["--train_parts emb", "--peft none"])
def test_a_trained_embedding_is_not_left_in_its_file(words, capsys):
    assert P.main(f"--load_model x --data_file y --emb_on_cpu {words}".split()) == 2
    assert "--emb_on_cpu" in capsys.readouterr().err


def test_cells_are_made_once(tmp_path, capsys):
    words = ["--predict", "--models", "RWKV7-0.1B", "--quants", "int8", "--out", str(tmp_path), "--commit", "x",
             "--options", "ctx_len=32"]
    assert vram.main(words) == 0 and vram.main(words) == 0
    assert "is there" in capsys.readouterr().out
    row, = record.load(tmp_path / "vram.json")
    assert row["options"] == {"ctx_len": 32} and row["total"] > sum(row[p] for p in ("weights", "optimiser"))


def test_every_lever_saves(tmp_path, monkeypatch):
    """By their rows: each of these takes less than the defaults, all together least."""
    monkeypatch.setattr(vram, "cell", vram.run_cell)                  # (a process for each begins slowly)
    monkeypatch.setattr(vram, "LEVER_CELLS", ("RWKV7-0.1B",))
    whole = vram.arch_of("RWKV7-0.1B")
    monkeypatch.setattr(vram, "arch_of", lambda name: P.replace(whole, n_layer=4))
    words = ["--predict", "--levers", "--models", "RWKV7-0.1B", "--out", str(tmp_path), "--commit", "x",
             "--options", "ctx_len=512"]
    assert vram.main(words) == 0
    total = {row["setting"]: row["total"] for row in record.load(tmp_path / "vram-levers.json")}
    assert list(total) == [*vram.LEVERS] and min(total, key=total.get) == "all levers"
    *single, _ = [*vram.LEVERS][3:]
    assert all(total[lever] < total["the defaults"] for lever in single)
