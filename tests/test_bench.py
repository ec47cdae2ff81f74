"""The benchmark's own parts: its sequential kernel is right, its rows are kept, its commands know what to do."""

import importlib.metadata
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_cuda_on_cpu import CPU_FLAGS, SHADOW
from test_wkv_cuda import NVCC, by_loop, needs_cpp, needs_nvcc, one_torch_thread  # noqa: F401

from wkv7_cuda import build

BENCH = Path(__file__).resolve().parent.parent / "bench"
sys.path.insert(0, str(BENCH))
import curves  # noqa: E402
import fla_tune  # noqa: E402
import gpu  # noqa: E402
import host  # noqa: E402
import readme  # noqa: E402
import record  # noqa: E402
import sass  # noqa: E402
import segments  # noqa: E402
import sequential  # noqa: E402
import step  # noqa: E402
import vram  # noqa: E402
import wkv  # noqa: E402

# ---------------------------------------------------------------------------------------------------- the kernel


@pytest.fixture(scope="module")
def on_cpu():
    headers = [*sequential.HEADERS, *sorted(SHADOW.glob("*.h"))]
    return sequential.operator(sequential.bind(
        build.load("wkv7_sequential_on_cpu", sequential.SOURCE, "g++", CPU_FLAGS, headers)))  # fmt: skip


def problem(time: int, dtype: torch.dtype, heads: int = 3):
    """r w k v a b and dy; the heads' decays are ordinary, near 1, at the floor (which stepping back bears worst)."""
    draw = torch.Generator().manual_seed(time)
    r, w, k, v, u, eta, dy = (torch.randn(2, time, heads, 64, generator=draw) for _ in range(7))
    w[:, :, 1], w[:, :, 2] = w[:, :, 1] - 6, 20
    kappa, eta = torch.nn.functional.normalize(u, dim=-1), eta.sigmoid()
    return [x.to(dtype) for x in (r, w, k * eta, v, -kappa, kappa * eta)], dy.to(dtype)


@needs_cpp
@pytest.mark.parametrize(("dtype", "bars"), [(torch.float32, (3e-5, 2e-6, 1e-3)), (torch.bfloat16, (3e-3,) * 3)])
@pytest.mark.parametrize("time", [16, 48])
def test_the_sequential_kernel(on_cpu, time, dtype, bars, monkeypatch):
    inputs, dy = problem(time, dtype)
    zero = torch.zeros(2, 3, 64, 64)
    exact = by_loop([*inputs, zero], [dy, zero], torch.float64)
    leaves = [x.requires_grad_() for x in inputs]
    results = []
    for order in ("0", "1", "2", "3"):
        monkeypatch.setenv("CUDA_CPU_ORDER", order)
        y, _ = on_cpu(*leaves, zero)
        results.append([y.detach(), *torch.autograd.grad(y, leaves, dy)])
        assert all(x.equal(first) for x, first in zip(results[-1], results[0], strict=True))
    names = ("y", "dr", "dw", "dk", "dv", "da", "db")
    for name, out, e in zip(names, results[0], [exact[0], *exact[2:8]], strict=True):
        for head, bar in enumerate(bars):
            difference, size = (out.double() - e)[:, :, head].norm(), e[:, :, head].norm()
            assert difference < bar * size, (name, head, difference / size)
    with torch.no_grad():
        assert on_cpu(*leaves, zero)[0].equal(results[0][0])


@needs_nvcc
def test_nvcc_compiles_it_and_nothing_spills(tmp_path):
    archs = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ("80", "90a", "120")]
    run = subprocess.run(
        [NVCC, *sequential.FLAGS, *archs, f"-I{sequential.HEADERS[0].parent}", "--threads", "2", "-Xptxas", "-v",
         sequential.SOURCE, "-o", tmp_path / "sequential.so"], capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    spills = re.findall(r"(\d+) bytes (?:spill|stack)", run.stdout + run.stderr)
    assert spills and set(spills) == {"0"}


# ---------------------------------------------------------------------------------------------------- its rows


def test_rows_of_other_machines_and_of_what_is_not_measured_again_are_kept(tmp_path):
    path, key = tmp_path / "x.json", ("op", "shape")
    old = [{"machine": "A", "op": op, "shape": [1, 2], "ms": 1, "commit": "old"} for op in ("cpu", "chunk")]
    old += [{"machine": "B", "op": "cpu", "shape": [1, 2], "ms": 2, "commit": "old"}]
    new = {"machine": "A", "op": "cpu", "shape": [1, 2], "ms": 3, "commit": "new"}
    record.update(path, old, key)
    record.update(path, [new], key)
    assert record.load(path) == [*old[1:], new]


@pytest.fixture(autouse=True)
def quick_ceilings(monkeypatch):
    monkeypatch.setattr(wkv, "ceilings", lambda device: {"copy_bytes_per_s": 1e10, "product_flop_per_s": 1e11})


def bench(out: Path, *options: str) -> int:
    return wkv.main(["--device", "cpu", "--threads", "1", "--seconds", "0.001", "--out", str(out), "--commit", "c",
                     "--ops", "torch", "chunk", "--shapes", "1,16,1", *options])  # fmt: skip


def test_a_run_writes_rows_and_the_next_one_goes_on(tmp_path, capsys):
    assert bench(tmp_path) == 0
    rows = record.load(tmp_path / "wkv-cpu.json")
    assert {row["op"] for row in rows} == {"torch", "chunk"} and {row["commit"] for row in rows} == {"c"}
    for row in rows:
        assert row["failed"] == "" and set(row["error"]) == {"y", "dr", "dw", "dk", "dv", "da", "db"}
        assert max(row["error"].values()) < 1e-5
        for label in wkv.PASSES:
            assert row[label]["low"] <= row[label]["ms"] <= row[label]["high"] and row[label]["n"] >= 3
        assert row["rates"]["both"]["floor_ms"] == pytest.approx(1e3 * 20 * 16 * 64 * 4 / row["copy_bytes_per_s"])
        assert set(row["faster_than"]) == {"torch", "chunk"} and row["faster_than"][row["op"]] == 1
    assert bench(tmp_path) == 0 and record.load(tmp_path / "wkv-cpu.json") == rows
    assert bench(tmp_path, "--again") == 0 and record.load(tmp_path / "wkv-cpu.json") != rows
    assert bench(tmp_path, "--shapes", "1,8,1", "--minutes", "0") == 0
    assert capsys.readouterr().out.count("out of time: 1 of 1 left") == 1


def test_wkv6_has_rows_of_its_own(tmp_path):
    """In a file of its own; regimes with all gradients, timed rows with those that have a batch."""
    assert bench(tmp_path, "--recurrence", "wkv6") == 0
    timed = record.load(tmp_path / "wkv6-cpu.json")
    assert [path.name for path in tmp_path.iterdir()] == ["wkv6-cpu.json"]
    assert [(row["op"], row["failed"], set(row["error"])) for row in timed] == [
        (op, "", {"y", "dr", "dw", "dk", "dv"}) for op in ("torch", "chunk")]  # fmt: skip
    assert timed[0]["rates"]["both"]["floor_ms"] == pytest.approx(1e3 * 14 * 16 * 64 * 4 / timed[0]["copy_bytes_per_s"])
    fs = {op: load() for op, load in wkv.contestants.loaders("cpu", torch.float32, "wkv6").items()
          if op not in ("cuda", "fla")}  # fmt: skip
    regimes = wkv.regime_rows(fs, (2, 20, 2), torch.float32, "cpu", wkv.RECURRENCES["wkv6"])
    assert {(row["op"], row["regime"]) for row in regimes} == {*itertools.product(fs, wkv.REGIMES[:4])}
    for row in regimes:
        assert set(row["error"]) == {"y", "dr", "dw", "dk", "dv", "du", "state", "dstate0"}
        assert max(row["error"].values()) < 1e-5


def test_who_fails_has_a_row_that_says_so(tmp_path, monkeypatch):
    def broken(*_):
        raise RuntimeError("no kernel for this\nand much more")

    works = {"torch": wkv.contestants.wkv7_ref, "chunk": broken}
    monkeypatch.setattr(wkv.contestants, "ready", lambda *_: (works, {}))
    assert bench(tmp_path) == 0
    failed = {row["op"]: row["failed"] for row in record.load(tmp_path / "wkv-cpu.json")}
    assert failed == {"torch": "", "chunk": "RuntimeError: no kernel for this"}


def test_a_lost_context_ends_the_run_and_the_next_one_leaves_its_cause_out(tmp_path, monkeypatch, capsys):
    asked = []

    def rows_of(job, fs, *_):
        asked.append(set(fs))
        if "chunk" in fs:
            raise wkv.ContextLost("chunk", "an illegal memory access")
        figures = {"rates": {"both": {"floor_ms": 1.0}}, "both": {"ms": 2.0}, "error": {"y": 0.0, "dr": 0.0}}
        return [{"op": op, "shape": [1, 16, 1], "dtype": "float32", "regime": "", "failed": ""} | figures for op in fs]

    monkeypatch.setattr(wkv, "rows_of", rows_of)
    assert [bench(tmp_path), bench(tmp_path), bench(tmp_path)] == [3, 0, 0]
    assert asked == [{"torch", "chunk"}, {"torch"}]
    assert {row["op"]: row["failed"] for row in record.load(tmp_path / "wkv-cpu.json")} == {
        "chunk": "an illegal memory access", "torch": ""}  # fmt: skip
    assert "run again" in capsys.readouterr().err


def test_who_ends_the_gpu_before_anything_is_measured_is_left_out_of_the_next_run(tmp_path, monkeypatch):
    """A kernel that fails does so after its launch: it is waited for, so that nobody else is blamed."""
    dead = []

    def settle(device):
        if dead:
            raise RuntimeError("an illegal memory access")

    loaders = {"chunk": lambda: lambda *_: dead.append("chunk"), "torch": lambda: wkv.contestants.wkv7_ref}
    monkeypatch.setattr(wkv.contestants, "settle", settle)
    monkeypatch.setattr(wkv.contestants, "loaders", lambda *_: loaders)
    assert bench(tmp_path) == 3
    dead.clear()
    assert bench(tmp_path) == 0
    assert {row["op"]: row["failed"] for row in record.load(tmp_path / "wkv-cpu.json")} == {
        "chunk": "ContextLost: RuntimeError: an illegal memory access", "torch": ""}  # fmt: skip


def test_what_is_measured_on_a_gpu_first():
    quick, all_of_it = wkv.jobs("cuda", True), wkv.jobs("cuda", False)
    assert [shape for shape, _, regimes in quick if not regimes] == [wkv.S1, wkv.S2, wkv.S3]
    assert all_of_it[:4] == quick and len(set(all_of_it)) == len(all_of_it)
    for heads in wkv.MODELS.values():
        for shape in itertools.product((1, 8), (1024, 4096), (heads,)):
            assert (shape, torch.bfloat16, False) in all_of_it


def test_contestants_take_turns():
    calls = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    order = []
    times = wkv.take_turns(calls, "cpu", 1e-9)
    assert order == ["a", "b"] * 4 and [len(t) for t in times.values()] == [3, 3]  # the first finds out how long
    spread = wkv.spread([0.001 * x for x in range(1, 21)], parts=2)
    assert spread == pytest.approx({"ms": 5.25, "low": 1.5, "high": 9.0, "n": 20})


def test_a_replay_is_timed_without_its_launch_and_a_call_with_it(monkeypatch):
    said = []

    class Event:
        def __init__(self, enable_timing):
            self.record, self.synchronize = lambda: said.append("event"), lambda: said.append("wait")

        def elapsed_time(self, end):
            return 2.0

    for name, value in dict(Event=Event, synchronize=lambda: said.append("idle"), _sleep=lambda n: said.append("busy"),
                            ).items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    call = lambda: said.append("call")  # noqa: E731
    replay = wkv.Replay(SimpleNamespace(replay=call))
    assert wkv.seconds_of(call, "cuda") == wkv.seconds_of(replay, "cuda") == 2e-3
    assert said == ["idle", "event", "call", "event", "wait", "idle", "busy", "event", "call", "event", "wait"]


def test_only_a_gpu_that_cannot_be_waited_for_is_lost(monkeypatch):
    def refuse():
        raise RuntimeError("captures_underway.empty() INTERNAL ASSERT FAILED")

    monkeypatch.setattr(torch.cuda, "empty_cache", refuse)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    wkv.check("chunk", ValueError("not captured"), "cuda")
    monkeypatch.setattr(torch.cuda, "synchronize", refuse)
    with pytest.raises(wkv.ContextLost):
        wkv.check("chunk", ValueError("not captured"), "cuda")


def test_a_gpu_that_nobody_in_particular_lost_ends_no_second_run_at_the_same_job(tmp_path, monkeypatch):
    def rows_of(*_):
        raise RuntimeError("an illegal memory access")

    def check(name, error, device):
        raise wkv.ContextLost(name, str(error))

    monkeypatch.setattr(wkv, "rows_of", rows_of)
    monkeypatch.setattr(wkv, "check", check)
    assert [bench(tmp_path), bench(tmp_path)] == [3, 0]
    assert {row["failed"] for row in record.load(tmp_path / "wkv-cpu.json")} == {"an illegal memory access"}


def test_every_number_of_segments_is_tried_once_and_the_best_is_named(monkeypatch):
    """By kernels whose forward takes a microsecond for a segment's chunks each, and one for each segment."""
    assert segments.numbers_of_segments(1) == {1: 1} and segments.numbers_of_segments(5) == {1: 5, 2: 3, 3: 2}
    assert [*segments.numbers_of_segments(32)] == [1, 2, 3, 4, 5, 6, 7, 8, 11, 16]

    def kernels(library, plan):
        length = plan(2, 9, segments.fast.MULTIPROCESSORS)
        return lambda *given: (length + -(-9 // length), 0, 0), lambda *given: (0,)

    monkeypatch.setattr(segments, "MODULES", {"wkv7": SimpleNamespace(kernels=kernels, library=None)})
    monkeypatch.setattr(segments, "in_a_graph", lambda calls: calls[0]()[0] / 1e6)
    row = segments.measure("wkv7", (1, 257, 2), "cpu")
    assert row == {"multiprocessors": 132, "chosen": 5, "best": 3, "us": {1: 20, 2: 14, 3: 12, 5: 14}}


# ---------------------------------------------------------------------------------------------------- one command


def test_the_one_command_says_what_is_missing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu.shutil, "which", lambda program: None)
    assert gpu.main([str(tmp_path / "a"), "--list"]) == 0 and not (tmp_path / "a").exists()
    assert capsys.readouterr().out.splitlines()[0] == "machine: nvidia-smi is not there"
    assert gpu.main([str(tmp_path / "a"), "--only", "build", "bench"]) == 0
    steps = json.loads((tmp_path / "a" / "steps.json").read_text())
    assert [row["step"] for row in steps] == ["build", "bench"]
    assert {row["status"] for row in steps} == {"left out: no NVIDIA GPU: nvidia-smi is not there"}
    with pytest.raises(SystemExit):
        gpu.main([str(tmp_path), "--only", "dance"])


NOT_INSTALLED = """
import os, runpy, sys
import numpy, torch, torch.utils.cpp_extension, tqdm
bench, failed = sys.argv[1], []
for script in sys.argv[2:]:
    if not (child := os.fork()):
        sys.path[0] = bench                                           # as for `python bench/script.py`
        try:
            runpy.run_path(script)
        except ImportError as error:
            print(script, error, flush=True)
            os._exit(1)
        os._exit(0)
    failed += [script] * (os.waitpid(child, 0)[1] != 0)
sys.exit(bool(failed))
"""


def test_scripts_begin_in_a_checkout_that_is_not_installed(tmp_path):
    """As on the machine that bench/gpu.py is for. (-S: without what `pip install -e` adds to the path.)"""
    bench, packages = Path(gpu.__file__).parent, Path(torch.__file__).parent.parent
    done = subprocess.run([sys.executable, "-S", "-c", NOT_INSTALLED, bench, *sorted(bench.glob("*.py"))], cwd=tmp_path,
                          env=os.environ | {"PYTHONPATH": str(packages)}, capture_output=True, text=True)  # fmt: skip
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr


def test_what_is_built_first_says_what_became_of_it():
    """Without a GPU, too: a line for each operator and kernel. (In a process of its own: each registers once.)"""
    code = f"import sys; sys.path[:0] = [{str(BENCH.parent)!r}, {str(BENCH)!r}]\n{gpu.BUILD}"
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
                          capture_output=True, text=True)  # fmt: skip
    said = dict(re.findall(r"^(.+?) (built$|not built: .*)", done.stdout, re.M))
    assert done.returncode == 0 and len(said) == 12, done.stdout + done.stderr
    assert all(said[name].startswith("not built: ") for name in ("wkv7 cuda", "wkv6 cuda", "dequant", "sequential"))
    assert said["wkv7 cuda"].startswith("not built: the cuda operator needs an NVIDIA GPU and torch sees none")
    assert said["wkv7 chunk"] == said["wkv6 chunk"] == "built"


def test_ways_to_compile_are_shared_out(monkeypatch):
    """Each to one process, none launched; one that does not compile keeps no other from it."""
    autotuner = pytest.importorskip("triton.runtime.autotuner").Autotuner
    monkeypatch.setattr(autotuner, "run", None)
    asked = []

    def compiled(x, warmup, number):
        asked.append((x, warmup, number))
        raise ValueError("too many registers")

    ways = [SimpleNamespace(all_kwargs=partial(dict, number=i)) for i in range(9)]
    kernel = SimpleNamespace(arg_names=["x"], prune_configs=lambda kwargs: ways, fn=SimpleNamespace(run=compiled),
                             base_fn=fla_tune.of_share)  # fmt: skip
    for share in range(4):
        fla_tune.compile_only(share, 4)
        autotuner.run(kernel, 7, warmup=False)
    assert sorted(asked) == [(7, True, i) for i in range(9)]
    shares = [sum(len(fla_tune.of_share(f"kernel {i}", range(3), share, 8)) for i in range(99)) for share in range(8)]
    assert sum(shares) == 297 and min(shares) > 20


def test_nothing_is_tuned_without_fla(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("sys.argv", ["fla_tune.py"])
    assert fla_tune.main() == 0 and capsys.readouterr().out == "fla is not installed\n"


def test_who_is_stopped_may_say_what_failed(tmp_path):
    waits = ("import signal, time\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
             "try: time.sleep(60)\nexcept KeyboardInterrupt: print('two tests failed')")
    row = gpu.run("x", gpu.Step([sys.executable, "-c", waits]), 2, tmp_path / "log.txt")
    assert row["status"] == "stopped after 2 s" and row["text"] == "two tests failed" and row["seconds"] < 15


def test_a_step_that_is_stopped_leaves_nothing_running(tmp_path, monkeypatch):
    """What it started would stay on the GPU, beside the next step."""
    monkeypatch.setattr(gpu, "LAST_WORDS", 1)                         # (a shell may have it ignore SIGINT)
    file = tmp_path / "pid"
    child = f"import os, time, pathlib; pathlib.Path({str(file)!r}).write_text(str(os.getpid())); time.sleep(600)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    row = gpu.run("x", gpu.Step([sys.executable, "-c", parent]), 5, tmp_path / "log.txt")
    assert row["status"] == "stopped after 5 s"
    state = Path(f"/proc/{file.read_text()}/stat")
    for _ in range(50):                                  # (it may take a moment to be gone, or stay as a zombie)
        if not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.1)
    pytest.fail("what it started is still there")


def test_its_steps_are_logged_limited_and_resumed(tmp_path, monkeypatch, capsys):
    again = "import os, sys; n = os.path.exists(sys.argv[2]); open(sys.argv[2], 'w'); raise SystemExit(0 if n else 3)"
    steps = {
        "build": gpu.Step([sys.executable, "-c", "print('one'); print('two')"]),
        "tests": gpu.Step([sys.executable, "-c", "raise SystemExit(1)"]),
        "memcheck": gpu.Step([sys.executable, "-c", "import time; time.sleep(60)"], "", 0.5),
        "bench": gpu.Step([sys.executable, "-c", again, "{minutes}", str(tmp_path / "count")], "", 0, (3,)),
    }
    monkeypatch.setattr(gpu, "LAST_WORDS", 1)
    monkeypatch.setattr(gpu, "steps", lambda *_: steps)
    monkeypatch.setattr(gpu, "missing", lambda step: "")
    assert gpu.main([str(tmp_path), "--minutes", "2"]) == 1
    statuses = [row["status"] for row in json.loads((tmp_path / "steps.json").read_text())]
    assert statuses == [0, 1, "stopped after 0 s", 3, 0]
    assert "==== build\none\ntwo\n" in (tmp_path / "log.txt").read_text()
    assert re.search(r"^build: 0, \S+ s, two$", capsys.readouterr().out, re.M)


def test_figures_are_short_and_labels_of_the_picture_do_not_overlap():
    assert [readme.short(x) for x in (0.01234, 12.34, 999.4, 1234.5)] == ["0.0123", "12.3", "999", "1234"]
    assert readme.apart([1.0, 8.0, 1.01, 1.02], 1.1) == pytest.approx([1.0, 8.0, 1.1, 1.21])


# ---------------------------------------------------------------------------------------------------- the whole step


class Plain(torch.nn.Module):
    """A model of two matrices."""

    def __init__(self, arch):
        super().__init__()
        self.emb, self.head = torch.nn.Embedding(arch.vocab_size, 64), torch.nn.Linear(64, arch.vocab_size)

    def forward(self, input_ids, labels):
        logits = self.head(self.emb(input_ids))
        return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def plain(model, bsz, ctx, dtype, quant, device, options):
    arch = vram.arch_of(model)
    net, rows = Plain(arch), step.RandomRows(arch.vocab_size, bsz, ctx - 1, device)
    optimiser = torch.optim.AdamW(net.parameters())

    def one_step():
        tokens = rows.tokens(0)
        loss = net(tokens, tokens)
        loss.backward()
        optimiser.step()
        return loss.item()

    return step.Contestant(one_step, lambda: [*net.parameters()])


def absent(*_):
    raise ModuleNotFoundError("No module named 'peer'")


@pytest.fixture
def small(monkeypatch):
    """A model of two layers under the name of one of the table."""
    arch = step.P.Arch("x070", 2, 64, 64, 128, 64, 1024, dict.fromkeys("agvw", 32))
    monkeypatch.setattr(vram, "arch_of", lambda name: arch)
    monkeypatch.setattr(step, "RANK", 8)
    monkeypatch.setitem(step.PROFILED, "cpu", 1)
    monkeypatch.setattr(step, "product_ceiling", lambda device, dtype: 1e10)


def test_a_step_beside_its_peers(tmp_path, monkeypatch, small, capsys, without_codegen):
    """Steps train; rates, ratios and parts belong together; a peer that is not there has a row that says so."""
    without_codegen()
    monkeypatch.setattr(step, "MAKERS", step.MAKERS | {"rwkv7-hf": plain, "fla": absent})
    entries = [("pissa_rwkv", "fp32", "none"), ("pissa_rwkv", "bf16", "nf4"), ("rwkv7-hf", "fp32", "none"),
               (step.FAST, "fp32", "none"), ("fla", "fp32", "none")]
    monkeypatch.setitem(step.ENTRIES, "cpu", entries)
    options = ["--device", "cpu", "--ctx", "16", "--seconds", "0.001", "--out", str(tmp_path), "--commit", "c"]
    assert step.main([*options, "--options", "weight_decay=0.1"]) == 0
    rows = record.load(tmp_path / "step-cpu.json")
    assert [(row["name"], row["dtype"], row["quant"]) for row in rows] == entries
    assert [row["failed"] for row in rows] == ["", "", "", "", "ModuleNotFoundError: No module named 'peer'"]
    blocks = 2 * (4 * 64**2 + 2 * 64 * 128 + 8 * 32 * 64) - 2 * 32 * 64  # layer 0 lacks v1 v2
    matrices = 1024 * 64 + blocks
    for row in rows[:4]:
        assert row["dtype"] == "bf16" or row["losses"][1] < row["losses"][0]
        assert row["tokens_per_s"] == pytest.approx(16e3 / row["step"]["ms"]) and row["step"]["n"] >= 3
        assert row["utilisation"] == pytest.approx(4 * matrices * row["tokens_per_s"] / 1e10)
        assert row["faster_than"]["rwkv7-hf fp32 none"] == row["tokens_per_s"] / rows[2]["tokens_per_s"]
    assert "parts" not in rows[3] and rows[3]["peak"] is None
    assert rows[3]["losses"] == pytest.approx(rows[0]["losses"], rel=1e-5) and rows[3]["setting"] == "weight_decay=0.1"
    for row in rows[:2]:
        assert row["setting"] == "weight_decay=0.1"
        assert tuple(row["parts"]) == step.PARTS and min(row["parts"].values()) > 0
        assert sum(row["parts"].values()) == pytest.approx(row["step"]["ms"])
    assert 4 * (2 * 1024 * 64 + blocks) < rows[0]["peak"] < 12 * (2 * 1024 * 64 + blocks) and rows[1]["peak"] > 0
    assert "No module named 'peer'" in capsys.readouterr().out


def test_what_is_not_in_effect_has_no_figure(tmp_path, monkeypatch, small):
    """A run goes on without; its row would be another's."""
    monkeypatch.setattr(step.P, "compiled", lambda run_block, device: run_block)
    monkeypatch.setitem(step.ENTRIES, "cpu", [(step.FAST, "fp32", "none"), (step.GRAPH, "fp32", "none")])
    options = ["--device", "cpu", "--ctx", "16", "--seconds", "0.001", "--out", str(tmp_path), "--commit", "c"]
    assert step.main(options) == 1
    assert [row["failed"] for row in record.load(tmp_path / "step-cpu.json")] == [
        "RuntimeError: --compile 1 is not in effect", "RuntimeError: --cuda_graph 1 is not in effect"]


def test_on_a_gpu_only_what_was_asked_for_is_measured(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(vram.dequant, "library_for", lambda device, say: None)
    cfg = vram.P.Config()
    assert vram.falls_back(cfg, "cuda") == vram.falls_back(vram.P.replace(cfg, op="chunk"), "chunk") == ""
    assert vram.falls_back(cfg, "triton") == "--op cuda is not in effect: triton is"
    assert vram.falls_back(vram.P.replace(cfg, quant="nf4"), "cuda") == "no kernel reads quantised matrices"


def test_who_would_not_be_ready_in_time_is_left_out(tmp_path, monkeypatch, small, capsys):
    monkeypatch.setattr(step, "COMPILING", 1e6)
    monkeypatch.setitem(step.ENTRIES, "cpu", [("pissa_rwkv", "fp32", "none"), (step.FAST, "fp32", "none")])
    assert step.main(["--device", "cpu", "--ctx", "16", "--seconds", "0.001", "--minutes", "60", "--out", str(tmp_path),
                      "--commit", "c"]) == 0  # fmt: skip
    assert [row["name"] for row in record.load(tmp_path / "step-cpu.json")] == ["pissa_rwkv"]
    assert f"out of time: {step.FAST} fp32 none" in capsys.readouterr().out


def test_what_a_step_takes_of_the_host(tmp_path, monkeypatch):
    """All ways take the same steps; each has a row, and its ratio to the usual one."""
    narrow, losses, made = host.narrow, {}, host.step.prepared

    def noted(*args):
        c = made(*args)
        return c._replace(step=lambda: losses.setdefault(id(c), []).append(c.step()))

    monkeypatch.setattr(host, "narrow", lambda model: host.P.replace(narrow(model), n_layer=2))
    monkeypatch.setattr(host.step, "prepared", noted)
    assert host.main(["--models", "RWKV7-0.1B", "--seconds", "0", "--out", str(tmp_path)]) == 0
    rows = {row["way"]: row for row in record.load(tmp_path / "host.json")}
    assert [*rows] == ["0", "products", "1", "products (torch)", "1 (torch)"]
    for row in rows.values():
        assert row["layers"] == 2 and row["step"]["n"] >= 3 and row["step"]["low"] > 0
        assert row["ratio"] == row["step"]["ms"] / rows["1"]["step"]["ms"]
    first, *others = losses.values()
    assert len(others) == 4 and first[-1] < first[0] and all(ls == first for ls in others)


def test_operations_are_told_apart(small):
    """Counted by name: each part has the operations that one knows to be its own, forward, recomputed and backward."""
    c = step.ours("pissa_rwkv", "RWKV7-0.1B", 1, 16, "fp32", "none", "cpu", {})
    with step.marked(c.run), step.profile(activities=[step.ProfilerActivity.CPU]) as prof:
        c.step()
    products = step.by_part(prof.events(), lambda e: e.name in step.PRODUCTS)
    matrices, layers = 6, 2
    low_rank = 8 * layers - 2                                         # two factors each; layer 0 lacks v1 v2
    assert products["base products"] == 3 * matrices * layers - layers  # (the last of a block is not computed again)
    assert products["adapters"] == (2 * 2 + 4) * matrices * layers    # A, B twice; backward has dx, dA and dh, dB
    assert products["low-rank"] == 3 * low_rank and products["head + loss"] == 2
    assert products["WKV"] == products["elementwise"] == products["optimiser"] == 0
    assert "forward" not in vars(c.run.model.blocks[0]) and "step" not in vars(c.run.optimiser)


def test_shapes_and_sizes_of_the_step():
    assert step.shapes("cpu", True) == [("RWKV7-0.1B", 1, 128)] and len(step.shapes("cuda", False)) == 9
    assert {model for model, _, _ in step.shapes("cuda", True)} == {"RWKV7-0.4B", "RWKV7-1.5B", "RWKV7-2.9B"}
    assert step.hf_sizes(vram.arch_of("RWKV7-1.5B")) == dict(
        vocab_size=65536, hidden_size=2048, num_hidden_layers=24, intermediate_size=8192, head_dim=64,
        decay_low_rank_dim=96, a_low_rank_dim=96, v_low_rank_dim=64, gate_low_rank_dim=256)  # fmt: skip


# ---------------------------------------------------------------------------------------------- the other programs


def test_a_row_of_a_client(monkeypatch, tmp_path):
    import clients

    for name, small in dict(LAYERS=2, C=64, V=256).items():
        monkeypatch.setattr(clients, name, small)
    tokens = [3, 141, 59, 26, 53, 58, 97, 93]
    clients.merged_files("x060", tmp_path)
    row = clients.compare("rwkv", tmp_path, "x060", tokens, clients.reference(tmp_path, "x060", tokens))
    assert row["relative"] < 1e-5 and row["same"] == row["tokens"] == 8
    assert row["package"] == f"rwkv {importlib.metadata.version('rwkv')}" and (tmp_path / "model.st").exists()


# ------------------------------------------------------------------------------------ the fast SVD, and the pictures


def test_rows_of_the_fast_svd(tmp_path, monkeypatch, capsys):
    """Beside a spectrum that is known: what is left and what is off are what numpy finds for the same factors."""
    import svd

    for name, small in dict(RANKS=(2, 6, 99), NITERS=(1, 4), DRAWS=2, THREADS=1, SHAPES=((40, 24),)).items():
        monkeypatch.setattr(svd, name, small)
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    svd.main(["--only", "i^-0.5"])
    svd.main(["--only", "i^-0.8"])  # rows of the first are kept
    rows = record.read("svd")
    assert [(r["matrix"], r["rank"], r["niter"]) for r in rows] == [
        *itertools.product([f"sigma i^-{decay}, 40 x 24" for decay in (0.5, 0.8)], (2, 6), (0, 1, 4))]
    (W,), sigma = svd.synthetic(40, 24, 0.5, 0), np.arange(1, 25.0) ** -0.5
    U, s, Vt = np.linalg.svd(W.double().numpy(), full_matrices=False)
    assert s == pytest.approx(sigma, rel=1e-5)
    for row in rows[:6]:
        assert row["seconds"] > 0 and row["shape"] == [40, 24]
        if row["niter"] == 0:
            assert row["excess"] == row["off"] == 0
            continue
        r = row["rank"]
        best = U[:, :r] * s[:r] @ Vt[:r]
        excess, off = [], []
        for seed in range(2):
            u, t, v = svd.P.top_singular(W, r, row["niter"], torch.Generator().manual_seed(seed))
            BA = (u * t @ v).double().numpy()
            excess.append(np.linalg.norm(W.double().numpy() - BA) / np.sqrt((sigma[r:] ** 2).sum()) - 1)
            off.append(np.linalg.norm(BA - best) / np.sqrt((sigma[:r] ** 2).sum()))
        assert row["excess"] == pytest.approx(max(excess), rel=0.01, abs=2e-6)
        assert row["off"] == pytest.approx(max(off), rel=0.01, abs=1e-5)
    assert rows[1]["excess"] > rows[2]["excess"] >= -1e-6 and rows[1]["off"] > rows[2]["off"]


def test_the_table_of_the_fast_svd(monkeypatch):
    """A cell is the worst of the spectra; a start of 24 layers has four matrices of one shape and two of the other."""
    about = {"machine": "M", "threads": 2, "load": 1.5, "torch": "2", "commit": "c", "date": "d"}
    rows = [about | {"matrix": name, "rank": 32, "niter": niter, "seconds": s * (1 if niter else 50),
                     "excess": niter and x, "off": niter and 0.5 * x}
            for name, s, x in (("base att", 0.001, 0.09), ("sigma i^-0.3, 2048 x 2048", 0.03, 0.00002),
                               ("sigma i^-0.5, 2048 x 2048", 0.05, 0.012), ("sigma i^-0.3, 8192 x 2048", 0.1, 0.001))
            for niter in (0, 4)]
    monkeypatch.setattr(record, "read", lambda name: rows)
    lines = readme.svd().splitlines()
    assert lines[2:5] == ["| base att | 32 | 1 ms, 9%, 4.5% | 50 ms |",
                          "| 2048 x 2048 | 32 | 40 ms, 1.2%, 0.6% | 2000 ms |",
                          "| 8192 x 2048 | 32 | 100 ms, 0.1%, 0.05% | 5000 ms |"]
    assert "144 matrices" in lines[-1] and "some 8.64 s with the default, 4, and 432 s with 0" in lines[-1]
    assert "at most 1.2% larger than the exact SVD's for such matrices, 9% for the small base's" in lines[-1]


def test_what_the_memory_of_the_picture_holds():
    """By outer products in float64: one rule sums up what a key was given, the other holds what it was given last."""
    import drawings

    k, k2 = (x.double().numpy() for x in drawings.KEYS.values())
    v, v2, v3 = (x.double().numpy() for x in drawings.VALUES.values())
    for token, old in ((drawings.sum_up, 1), (drawings.replace, 0)):
        after, read = drawings.memories(token)
        S = np.outer(v, k)
        assert after[0].numpy() == pytest.approx(S, abs=1e-6)
        S = S + np.outer(v2 - (1 - old) * S @ k2, k2)
        assert after[1].numpy() == pytest.approx(S, abs=1e-6)
        S = S + np.outer(v3 - (1 - old) * S @ k, k)
        assert after[2].numpy() == pytest.approx(S, abs=1e-6)
        assert read.numpy() == pytest.approx(S @ k, abs=1e-6)
        assert read.numpy() == pytest.approx(v3 + old * v, abs=1e-3)  # (the two keys overlap a little)


def test_the_picture_for_readers(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    import drawings

    monkeypatch.setattr(record, "RESULTS", tmp_path)
    W = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    parts = drawings.taken_apart(W, 16)
    sigma = np.linalg.svd(W.double().numpy(), compute_uv=False)
    assert parts["W_res"].double().norm().item() == pytest.approx(np.sqrt((sigma[16:] ** 2).sum()), rel=1e-5)
    torch.testing.assert_close(parts["W_res"] + parts["B"] @ parts["A"], W)
    first = drawings.reading_picture(W).read_bytes()
    assert first.startswith(b"<?xml") and first.count(b"<image") == 10 and len(first) < 150_000
    assert drawings.reading_picture(W).read_bytes() == first


# ---------------------------------------------------------------------------------------------- PiSSA beside LoRA

BEST_POWER = {"full": 2, "pissa": 4, "lora": 8}  # lora's is beyond its first range, at whose edge the 7th is


def made_up(plan, job):
    """A run whose loss is best at a rate of the method's own, and differs a little by seed."""
    off = abs(torch.log2(torch.tensor(job.lr / curves.rate(BEST_POWER[job.name]))).item())
    return {**job._asdict(), "trained": 5, "before": 9.0, "after": 1 + off + 0.1 * job.seed, "failed": "",
            "losses": [3.0 - 0.01 * i - 0.1 * job.seed for i in range(100)], "grad_norms": [5.0] * 10 + [2.0] * 90,
            "seconds": 1.0}  # fmt: skip


@pytest.fixture
def stubbed(tmp_path, monkeypatch):
    """The command with made-up runs, and the jobs that were run; the one of number die_at ends it."""
    jobs, dies = [], []

    def run(plan, job):
        if [len(jobs)] == dies:
            raise KeyboardInterrupt
        jobs.append(job)
        return made_up(plan, job)

    def command(*options, die_at=-1):
        dies[:] = [die_at]
        return curves.main(["--methods", *BEST_POWER, "--folder", str(tmp_path / "f"), "--out", str(tmp_path),
                            *options])  # fmt: skip

    monkeypatch.setattr(curves, "run", run)
    monkeypatch.setattr(curves, "pretrain", lambda cfg: {"name": "base", "trained": 9, "after": 1.0, "base": "abc"})
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    threads = torch.get_num_threads()
    yield command, jobs
    torch.set_num_threads(threads)


def test_rates_are_swept_until_no_best_is_at_an_edge_and_killed_runs_go_on(stubbed, tmp_path, capsys):
    command, jobs = stubbed
    with pytest.raises(KeyboardInterrupt):
        command(die_at=25)
    assert command("--minutes", "0") == 3 and len(jobs) == 25 and "out of time" in capsys.readouterr().out
    assert command() == 0
    assert len(set(jobs)) == len(jobs)                                # nothing was run twice
    rates = {name: sorted(job.lr for job in jobs if job.name == name and job.seed == 0) for name in BEST_POWER}
    assert rates == {name: [curves.rate(p) for p in powers] for name, powers in
                     {"full": range(-1, 6), "pissa": range(7), "lora": range(1, 10)}.items()}  # fmt: skip
    for name, power in BEST_POWER.items():
        others = {(job.lr, job.seed) for job in jobs if job.name == name and job.seed > 0}
        assert others == {*itertools.product({curves.rate(power), curves.rate(2)}, range(1, 5))}
    assert command() == 0 and len(set(jobs)) == len(jobs) == 23 + 20  # complete: nothing is left to run
    assert command("--text", __file__, "--minutes", "0") == 3         # another text is another measurement
    jobs.clear()
    assert command("--text", __file__, "--methods", "pissa") == 0     # no rate for all without full fine-tuning
    assert {(job.name, job.lr) for job in jobs if job.seed} == {("pissa", curves.rate(4))}


def test_the_summary_and_what_readme_makes_of_it(stubbed, tmp_path):
    command, _ = stubbed
    command()
    found = curves.summary(readme.learnt())
    assert [*found] == ["full", "pissa", "lora"] and found["full"]["equal"]["lr"] == curves.rate(2) == 0.002
    for name, power in BEST_POWER.items():
        best, equal = found[name]["best"], found[name]["equal"]
        assert best["lr"] == curves.rate(power) and best["n"] == equal["n"] == 5
        assert best["mean"] == pytest.approx(1.2) and best["sd"] == pytest.approx(0.025**0.5)
        assert equal["mean"] == pytest.approx(1.2 + power - 2)
        assert (best["norm10"], best["norm100"]) == (5.0, 2.0)
    text = readme.learning()
    assert "| LoRA | 5 | 0.128 | 1.2000 ± 0.1581 | 7.2000 ± 0.1581 | 5.00 |\n" in text
    assert "| LoRA |  |  | 8.000 | 7.000 | 6.000 | 5.000 | 4.000 | 3.000 | 2.000 | **1.000** | 2.000 |\n" in text
    assert "PiSSA beats LoRA in 5 of 5 seeds at the shared rate, in 0 of 5 with each at its own best." in text
    pytest.importorskip("matplotlib")
    readme.loss_picture()
    assert (tmp_path / "loss.svg").stat().st_size > 9999


def test_a_run_that_diverges_has_no_loss_after_and_is_no_best():
    rows = [{"name": "pissa", "lr": lr, "seed": 0, "trained": 5, "before": 9.0, "after": after, "grad_norms": [1, None]}
            for lr, after in ((1e-3, 4.0), (2e-3, 3.0), (4e-3, None))]
    assert curves.best_rate(rows, "pissa") == 2e-3 and "inf" in curves.table(rows)
    assert "equal" not in curves.summary(rows)["pissa"]


def test_one_real_run(tmp_path):
    """Of a tiny base, through the module: its row has what it trained and every step's figures."""
    args = ["--methods", "full", "pissa", "--quick", "--folder", str(tmp_path)]
    plan, base = curves.planned(curves.arguments(args), "cpu")
    tiny = dict(n_embd=64, n_layer=1, val_split=0.001, micro_bsz=2, ctx_len=32)
    row = curves.pretrain(curves.replace(base, **tiny))
    assert curves.pretrain(curves.replace(base, **tiny)) == row       # it is there already
    plan.common = curves.replace(plan.common, micro_bsz=2, ctx_len=32, val_split=0.0005)
    found = curves.silently(curves.run, plan, curves.Job("pissa", 1e-2, 0))
    assert len(found["losses"]) == len(found["grad_norms"]) == 6 and found["failed"] == ""
    assert found["adapters"] == 8 * (4 * (64 + 64) + 2 * (64 + 256)) and found["after"] < found["before"]
    assert found["trained"] == found["adapters"] + 2 * 64 * 5         # ln0 ln1 ln2 ln_x ln_out
    again = curves.silently(curves.run, plan, curves.Job("pissa", 1e-2, 1))
    assert again["losses"] != found["losses"] and again["before"] == pytest.approx(found["before"], abs=1e-4)


# --------------------------------------------------------------------------------------------- bench/sass.py


def sass_row(text, stall=1, sets=7, frees=7, waits=0, line=0):
    bits = stall << 41 | sets << 46 | frees << 49 | waits << 52
    where = [f'\t//## File "/x/device.cuh", line 9 inlined at "/x/k.cu", line {line}',
             f'\t//## File "/x/k.cu", line {line}']  # fmt: skip
    return [*where, f"        /*0010*/    {text} ;    /* 0x{7:016x} */", f"        /* 0x{bits:016x} */"]


def test_when_a_warp_issues_its_instructions():
    """By their control codes: a load, what waits for it, an inner loop gone through twice, two products in a row."""
    rows = ["        .type           k,@function", ".L_1:", *sass_row("LDS R1, [R2]", sets=0, line=3),
            *sass_row("FADD R3, R1, R1", stall=4, waits=1, line=4), ".L_2:",
            *sass_row("MUFU.EX2 R4, R3", sets=1, line=5),
            *sass_row("@P0 BRA `(.L_2)", stall=5, waits=2),
            *sass_row("HMMA.16816.F32.BF16 R8, R4.reuse, R6, RZ"), *sass_row("HMMA.16816.F32.BF16 R8, R4, R6, R8"),
            *sass_row("@!P1 BRA `(.L_1)", stall=5), *sass_row("EXIT")]  # fmt: skip
    code = sass.parse("\n".join(rows), "k.cu")["k"]
    assert [x.line for x in code if not isinstance(x, str)][:3] == [3, 4, 5]
    issued = [(when, x.text.split()[0]) for when, x in sass.walk(code, [2])]
    assert issued == [(1, "LDS"), (31, "FADD"), (35, "MUFU.EX2"), (59, "BRA"), (64, "MUFU.EX2"), (88, "BRA"),
                      (93, "HMMA.16816.F32.BF16"), (126, "HMMA.16816.F32.BF16"), (127, "BRA")]


@pytest.mark.skipif(not sass.nvdisasm() or not shutil.which("nvcc"), reason="no nvcc and nvdisasm")
def test_a_chunk_of_the_fast_walk_goes_from_barrier_to_barrier():
    path = sass.ROOT / "wkv7_cuda" / "wkv7_fast.cu"
    kernels = sass.parse(sass.disassemble(path, "90a"), path.name)
    for mode, barriers in (("ModeE0", 4), ("ModeE1", 6)):
        code, = (code for name, code in kernels.items() if mode in name)
        issued = sass.walk(code, sass.TRIPS[path.name])
        assert sum(x.op == "BAR" for _, x in issued) == barriers and issued[-1][0] < 8000
        assert all(before < when for (before, _), (when, _) in itertools.pairwise(issued))
