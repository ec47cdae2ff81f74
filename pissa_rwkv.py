"""pissa_rwkv: fine-tune RWKV-7, 6 and 5 with PiSSA, all in one file, to be read from top to bottom.

A trained matrix W acts more strongly along some directions than along others. PiSSA takes the strongest out,
W = W_res + B A, trains A and B, and freezes the rest. A run starts exactly at the base model and trains one to three
numbers in a hundred. At the end B A is added back, and the file is an ordinary model again.

    torchrun pissa_rwkv.py                                                       # a demonstration, 3 minutes on a CPU
    torchrun pissa_rwkv.py --load_model RWKV-x070.pth --data_file chats.jsonl    # your model, your data
    python merge.py --type pissa --base_model RWKV-x070.pth --lora_init out/init_pissa.pth \\
                    --lora_checkpoint out/rwkv-0.pth --output tuned.pth

The file follows a run; a section uses only what is above it:

     1 configuration    the options, once: default, help; processes         Config, parse, Ranks
     2 the operator     the memory as a recurrence, two kinds of it         wkv7_ref, wkv6_ref
     3 the model        time mixing, channel mixing, loading, detection     RWKV, TimeMix_x070, detect, fill
     4 frozen weights   how untrained matrices are held; nf4, int8          QUANT, FrozenLinear
     5 adapters         PiSSA, LoRA, Bone; state tuning                     ADAPTER, PiSSALinear, add_adapters
     6 data             readers -> one stream; samplers; masks              Corpus, Loader
     7 loss             cross-entropy without all the logits; chunks        HeadLoss, batch_losses
     8 optimiser        AdamW on one flat buffer, shared out; schedules     ZeroAdamW, lr_at
     9 files            read and written safely; merging                    read_pth, save, merge
    10 training         the loop, resuming, talking, --dry_run, demo        build, train, generate, main

Names. Parameters are named as in model files; locals use the papers' letters.

    code                    word                                shape           in the papers
    B T C V L               batch, time, width, vocabulary, layers
    H N A F                 heads, head size, A = H N, width of the channel mixing
    S                       state of a head: its memory         (N value,N key) wkv / S
    r w k v                 receptance, raw decay logit, key, value   (B,T,H,N)
    d                       decay, exp(-exp(-1/2) sigmoid(w))   (B,T,H,N)       w
    eta; a0 a1 a2           in-context learning rate            (B,T,A)         a
    kappa; k_k              removal key, of length 1            (B,T,A)         kappa hat
    a, b (operator)         -kappa and kappa * eta              (B,T,H,N)
    g; g1 g2                output gate                         (B,T,A)         g
    v_first; v0 v1 v2       layer 0's value, mixed into all others'             v_0
    r_k                     bonus of the token itself           (H,N)           rho
    x_r ... x_g             token-shift weights mu, of x_{t-1}  (1,1,C)         mu
    time_maa_*, time_mix_*  the same in x060; in x052 of x_t    (1,1,C)         mu
    time_decay; *_w1 *_w2   x060, x052: the raw decay logit w   (1,1,A); (H,N)  omega, lambda
    time_faaaa              u, the bonus in x060 and x052       (H,N)           u
    ln_x                    group norm, one group a head        (A)
    lora_A, lora_B          an adapter's factors A, B           (r,in), (out,r) A, B
    sigma                   singular values (S is taken)        (r)             S
    disha                   Bone's matrix D                     (r,out)         D
    time_state              S_0, where it is learnt             (H,N value,N key)
    codes; absmax, scale    what a quantised matrix is held as  (n), (n/2); (n/64)
    row; micro-batch; step  one sequence; the rows of one backward; those of one update
    n                       learnt tokens of an optimiser step

References: RWKV-7 "Goose" arXiv 2503.14456 - RWKV-5/6 "Eagle and Finch" 2404.05892 - PiSSA 2404.02948 - LoRA 2106.09685
- DiSHA, Bone 2409.15371
- nf4, QLoRA 2305.14314 - dynamic 8-bit code 1511.04561 - randomised SVD 0909.4061 - AdamW 1711.05101 - ZeRO 1910.02054.
"""

from __future__ import annotations

import argparse
import ast
import bisect
import codecs
import contextlib
import copy
import ctypes
import difflib
import errno
import glob
import hashlib
import importlib.util
import io
import itertools
import json
import logging
import math
import os
import pickle
import pickletools
import platform
import random
import re
import shutil
import signal
import struct
import sys
import tarfile
import threading
import time
import warnings
import weakref
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import datetime, timedelta
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import IO, Any, NamedTuple, NoReturn

if __name__ == "__main__":
    # A waiting thread spins for some 10 us, then sleeps. (OpenMP's default is a hundred times that: with other programs
    # running, a step takes ten times as long. It reads this when torch is imported: too late for the command that pip
    # installs, which imports this file.)
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.rendezvous import rendezvous
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from tqdm import tqdm

import wkv7_cuda
from wkv7_cuda import dequant

# ======================================================================================================================
# 1. Configuration: every option is defined once, with its default and help. The parser, the checks, the checkpoint's
#    description and README's table of options are all made from this class.
# ======================================================================================================================

__version__ = "0.1.0"


class Fatal(Exception):
    """Something the user can fix: one line that names the file or flag, what was found, and what to do."""


def pick(table: dict[str, Any], flag: str, name: str) -> Any:
    """The row `name` of a table, or an error that lists those it has."""
    if name not in table:
        names = [row for row in table if row]                         # ('' stands for the default)
        raise Fatal(f"{flag} {name}: unknown; choose from {', '.join(map(repr, names))}{nearest(name, names)}")
    return table[name]


def nearest(name: str, names: Iterable[str], prefix: str = "") -> str:
    """`; did you mean X?`, or nothing if no name is close."""
    near = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {prefix}{near[0]}?" if near else ""


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def some(names: Iterable[str]) -> str:
    """The first names of many."""
    names = sorted(names)
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if names[4:] else "")


def refuse_device(path: str | Path, what: str) -> None:
    """Refuses a pipe or a device: reading one to its end may never finish."""
    if Path(path).exists() and not Path(path).is_file() and not Path(path).is_dir():
        raise Fatal(f"{what} {path}: not a regular file; write its contents to one")


def opt(default: Any, help: str, also: str = "", within: str = "[0,1e9]") -> Any:
    """One option: its default, which also sets its type (0 an integer, 0.0 any number), its help, a second name, and
    the interval that a number must be in."""
    return field(default=default, metadata={"help": help, "also": also, "within": within})


def check_within(flag: str, x: float, interval: str) -> None:
    """Refuses an x outside an interval like [0,1), which includes 0 but not 1. (NaN is in none.)"""
    has_low, has_high = interval[0] == "[", interval[-1] == "]"
    low, high = interval[1:-1].split(",")
    if not (float(low) < x < float(high) or (has_low and x == float(low)) or (has_high and x == float(high))):
        raise Fatal(f"{flag} {x}: expected a number {'from' if has_low else 'above'} {low} to"
                    f" {'below ' * (not has_high)}{high}")


@dataclass
class Config:
    """What one run does. A default named in a help text replaces the empty string or 0 given here: it comes from the
    base file, the data or the machine."""

    # the base model
    load_model: str = opt("", "base model, a .pth of RWKV-7, 6 or 5; without one, --peft none pretrains a new model")
    version: str = opt("", "x070, x060 or x052; default: the base file's (new models: x070)", "my_testing")
    n_layer: int = opt(0, "layers; default: the base file's (new models: 12)", within="[0,1e3]")
    n_embd: int = opt(0, "embedding width; default: the base file's (new models: 768)")
    dim_att: int = opt(0, "attention width; default: the base file's (new models: n_embd)")
    dim_ffn: int = opt(0, "width of the channel mixing; default: the base file's (new models: 4 or 3.5 n_embd)")
    head_size: int = opt(0, "channels per head; default: the base file's (new models: 64)", "head_size_a")
    pre_ffn: bool = opt(False, "x052, x060: block 0 has channel mixing, not time mixing; default: the base file's")
    head_qk: int = opt(0, "width of a head that copies earlier tokens; default: the base file's")
    vocab_size: int = opt(0, "vocabulary size; default: the base file's (new: 65536 world, 256 byte, or the data's)")
    # data
    data_file: str = opt("", "corpus: .jsonl, .txt, .npy, .tar, folder or binidx prefix; for dummy: base or shift")
    data_type: str = opt("", "binidx, jsonl, sft, utf-8, utf-16le, numpy, uint16, wds_img, dummy; default: by its name")
    sft_fields: tuple = opt(("question", "answer"), "sft: question and answer, or one with all messages", "sft_field")
    img_side: int = opt(64, "wds_img: side of the square images, in pixels", "my_img_size", within="[1,1e6]")
    tokenizer: str = opt("", "world or byte; default: world for a vocabulary of 65536 tokens, byte for up to 512")
    vocab_file: str = opt("", "the World vocabulary; default: found in the `rwkv` package")
    dataload: str = opt("", "sampler: pad, only or get; default: pad; get if the corpus is one long document")
    loss_mask: str = opt("", "tokens learnt: pad (all), qa (the assistant's) or se; default: pad; qa for sft, dummy")
    mask_id: str = opt("", 'se: JSON {"mask1": learn what follows this string, "mask0": up to this one}')
    data_shuffle: bool = opt(True, "pad, only: a new order in every pass")
    val_file: str = opt("", "corpus held out for validation, of the type of data_file")
    val_split: float = opt(0.0, "share of the corpus held out for validation, taken from its end", within="[0,1)")
    make_binidx: str = opt("", "only convert this .jsonl or folder (--data_type jsonl or sft) to binidx, then stop")
    # the length of the run
    ctx_len: int = opt(1024, "tokens per training row", within="[1,1e6]")
    train_type: str = opt("normal", "normal: whole rows at once; infctx: in chunks that pass on their state")
    chunk_ctx: int = opt(0, "infctx: tokens per chunk; memory grows with these, not with ctx_len; default: 512")
    chunk_grad: str = opt("truncated", "infctx: gradients reach back through the chunk (truncated) or the row (full)")
    micro_bsz: int = opt(4, "rows per micro-batch", within="[1,1e6]")
    accumulate_grad_batches: int = opt(1, "micro-batches per optimiser step", within="[1,1e6]")
    epoch_steps: int = opt(0, "optimiser steps per epoch; default: one pass over the corpus")
    epoch_count: int = opt(1, "epochs in this run", within="[1,1e6]")
    epoch_begin: int = opt(0, "number of the first epoch; above 0 it continues from rwkv-<N-1>.pth in proj_dir")
    # the optimiser
    lr_init: float = opt(2e-5, "learning rate after warm-up")
    lr_final: float = opt(2e-5, "learning rate at the end")
    lr_schedule: str = opt("cos_decay", "cos_decay (cosine), or wsd (constant, then linear over the last part)")
    decay_frac: float = opt(0.2, "wsd: the share of the run that decays", within="(0,1]")
    warmup_steps: int = opt(0, "steps of linear warm-up")
    beta1: float = opt(0.9, "Adam's decay of the first moment", within="[0,1)")
    beta2: float = opt(0.99, "Adam's decay of the second moment", within="[0,1)")
    adam_eps: float = opt(1e-8, "Adam's epsilon", within="(0,1e9]")
    moments: str = opt("fp32", "how Adam's moments are held: fp32, or 8bit, which saves 6 bytes a number")
    weight_decay: float = opt(0.0, "decoupled weight decay, on matrices only")
    grad_clip: float = opt(1.0, "largest global norm of the gradient; 0 never clips", "gradient_clip_val")
    layerwise_lr: bool = opt(True, "double the learning rate of the decay: w0, or time_decay in x060 and x052")
    # adapters
    peft: str = opt("pissa", "what is trained: pissa, lora, bone (disha, miss), state, none (no adapters: everything)")
    rank: int = opt(32, "rank of the adapters")
    svd_niter: int = opt(4, "PiSSA: power iterations of the fast SVD; 0: the exact SVD")
    lora_alpha: float = opt(32.0, "LoRA: its output is scaled by alpha / rank")
    lora_dropout: float = opt(0.0, "LoRA: dropout on its input", within="[0,1)")
    bone_mode: str = opt("bone", "bone: bone, or bat, whose update is multiplied by the matrix")
    adapter_load: str = opt("", "start from these adapters, a rwkv-<N>.pth")
    adapter_init: str = opt("", "PiSSA: the init_pissa.pth that belongs to adapter_load")
    pissa_config: str = opt("", "the tutorial's JSON for the same: pissa_load, pissa_init, pissa_r, svd_niter")
    lora_config: str = opt("", "likewise: lora_load, lora_r, lora_alpha, lora_dropout")
    bone_config: str = opt("", "likewise: bone_load, bone_r, bone_mode; or load, r, mode", "disha_config")
    peft_config: str = opt("", "likewise, of today's RWKV-PEFT, for any adapters: r, lora_alpha, lora_dropout")
    train_parts: tuple = opt(("auto",), "also train names with emb, head, ln or time (not in x070); auto: time ln")
    quant: str = opt("none", "how frozen matrices are held: none (as they are), int8, nf4, nf4dq (8.3, 4.5, 4.1 bits)")
    qpissa_iters: int = opt(1, "PiSSA on a quantised base: SVDs for its start; more reduce its error", within="[1,5]")
    # the machine
    accelerator: str = opt("", "gpu or cpu; default: gpu if there is one")
    devices: int = opt(0, "processes, one device each, for plain python to start; torchrun has --nproc_per_node")
    strategy: str = opt("", "sharded over ranks: zero1 (optimiser), zero2 (gradients too), ddp (none); default: zero1")
    dist_timeout: float = opt(600.0, "seconds to wait for another process before giving up; longer than a save takes")
    precision: str = opt("", "bf16, fp16, fp32, tf32; default: bf16 on a GPU, fp16 before Ampere, fp32 on a CPU")
    op: str = opt("", "WKV operator: cuda, cuda_precise, triton, fla, cpu, chunk, torch; default: the fastest here")
    grad_cp: str = opt("1", "kept for backward: 1 block inputs, products these too, 0 all; auto: as much as fits")
    compile: bool = opt(False, "torch.compile: faster steps, but the first takes a minute longer")
    cuda_graph: bool = opt(False, "on a GPU: forward and backward as one launch; rows are padded to a few lengths")
    emb_on_cpu: bool = opt(False, "leave the embedding in its file and fetch the rows of each micro-batch")
    random_seed: int = opt(0, "seeds the SVD, new weights, dropout and the order of the data", within="[0,1e18]")
    # results
    proj_dir: str = opt("out", "folder for the results")
    epoch_save: int = opt(1, "save after this run's first epoch, every N after it, and the last", within="[1,1e6]")
    save_steps: int = opt(0, "also write what --resume needs every N steps")
    keep: int = opt(2, "how many of these files to keep; --resume uses the newest that is intact", within="[1,999]")
    resume: bool = opt(False, "continue the run in proj_dir exactly where it stopped")
    auto_merge: bool = opt(False, "merge into a full model, rwkv-<N>-merged.pth, after the last epoch", "merge")
    sample_prompt: str = opt("", "after every epoch, print how the model continues this text")
    sample_len: int = opt(100, "most tokens in that sample, or in an answer of --chat")
    sample_top_p: float = opt(0.5, "nucleus sampling; 0 always takes the likeliest token", within="[0,1]")
    sample_temperature: float = opt(1.0, "of sampling; below 1 favours likely tokens", within="(0,1e9]")
    chat: bool = opt(False, "talk to load_model, with adapter_load if given: a line is a question, /exit ends")
    wandb: str = opt("", "Weights & Biases project to log to (`pip install wandb`); WANDB_MODE=offline: no network")
    dry_run: bool = opt(False, "say what would be trained, in how many steps, with how much memory; then stop")
    vram_gb: float = opt(0.0, "dry_run, grad_cp auto: memory to fill, in 10^9 bytes; default: what is free on the GPU")


JSON_OPTIONS = {  # the tutorial's JSON options: their keys -> fields of Config
    "pissa_config": {"pissa_load": "adapter_load", "pissa_init": "adapter_init",
                     "pissa_r": "rank", "svd_niter": "svd_niter"},
    "lora_config": {"lora_load": "adapter_load",
                    "lora_r": "rank", "lora_alpha": "lora_alpha", "lora_dropout": "lora_dropout"},
    "bone_config": {f"{prefix}{key}": name for prefix in ("bone_", "")
                    for key, name in {"load": "adapter_load", "r": "rank", "mode": "bone_mode"}.items()},
    "peft_config": {"r": "rank", "lora_alpha": "lora_alpha", "lora_dropout": "lora_dropout"},
}
WITHOUT_EFFECT = {  # RWKV-PEFT's flags that commands may still have -> why ignoring them loses nothing
    "num_nodes": "torchrun sets how many nodes a run has",
    **dict.fromkeys("ds_bucket_mb enable_progress_bar fp32_logits num_workers persistent_workers"
                    " prefetch_factor fused_kernel".split(), "there is nothing to tune"),
    **dict.fromkeys("my_pile_version my_pile_stage my_pile_shift my_pile_edecay train_stage my_random_steps my_qa_mask"
                    " my_sample_len".split(), "it belongs to pretraining on the Pile"),
    **dict.fromkeys("magic_prime my_exit my_exit_tokens".split(), "a run ends after --epoch_count epochs"),
    **dict.fromkeys("head_size_divisor my_ffn_shift my_att_shift my_pos_emb tiny_att_dim tiny_att_layer load_partial"
                    " dropout".split(), "no released model uses it"),
    "weight_decay_final": "weight decay is constant",
    "l2warp_sparse": "the logits are never all held at once",
    "avg_loss": "a step's loss is always the mean over its learnt tokens",
    **dict.fromkeys(["optim", "optimizer"], "the optimiser is AdamW"),
    "sft_split": "all rows of --data_file are used",
}


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise Fatal(message)


def parser() -> Parser:
    """The parser that Config describes. Its result has only what the command line names: the defaults are Config's.
    (Options must be spelt out: torchrun takes abbreviations for its own.)"""
    p = Parser("torchrun pissa_rwkv.py", allow_abbrev=False, argument_default=argparse.SUPPRESS,
               description="Without options it runs a demonstration.")
    a_switch = dict(type=switch, nargs="?", const=True)
    kinds = {t: dict(type=t) for t in (str, int, float)} | {bool: a_switch | {"metavar": "0|1"}, tuple: {"nargs": "*"}}
    for f in fields(Config):
        help = f.metadata["help"]
        if f.default != "" and "default: " not in help:
            help += f" (default: {f.default})"
        names = [f"--{name}" for name in (f.name, f.metadata["also"]) if name]
        p.add_argument(*names, dest=f.name, help=help, **kinds[type(f.default)])
    for name in WITHOUT_EFFECT:
        p.add_argument(f"--{name}", nargs="?", const="", help=argparse.SUPPRESS)
    p.add_argument("--fla", **a_switch, help=argparse.SUPPRESS)
    return p


def options_given(argv: list[str], peft: str) -> set[str]:
    """The options that a command line names, including those in the JSON of --pissa_config and the like."""
    given = vars(parser().parse_known_args(argv)[0])
    inside = ((JSON_OPTIONS[option], read_json(option, given.get(option, ""))) for option in json_options(peft))
    return {*given, *(keys[x] for keys, values in inside for x, y in values.items() if x in keys and y is not None)}


def json_options(peft: str) -> list[str]:
    """The JSON options that a method reads."""
    own = f"{peft}_config"
    return [own, "peft_config"] if own in JSON_OPTIONS else []


def is_text(x: Any) -> bool:
    """Whether x is a string that UTF-8 can encode. (Undecodable bytes of a command line become lone surrogates.)"""
    try:
        return isinstance(x, str) and x.encode() is not None
    except UnicodeEncodeError:
        return False


def switch(text: str) -> bool:
    """0 or 1, as the tutorial writes its switches."""
    known = {"0": False, "1": True, "false": False, "true": True}
    if text.lower() not in known:
        raise argparse.ArgumentTypeError(f"{text!r}: expected 0 or 1")
    return known[text.lower()]


def parse(argv: list[str]) -> Config:
    """The command line as a Config. Raises Fatal on an unknown flag, a wrong type, or JSON with a typo."""
    named, unknown = parser().parse_known_args(argv)
    given = asdict(Config()) | vars(named)
    if unknown and unknown[0][:1] != "-":                             # (the shell has made several words of one)
        raise Fatal(f"{unknown[0]!r} belongs to no option: put a pattern, or a name with spaces, in quotes")
    if unknown:
        known = [*given, "fla", *WITHOUT_EFFECT, *filter(None, (f.metadata["also"] for f in fields(Config)))]
        name = unknown[0].lstrip("-").partition("=")[0]
        meant = {key: f"--{ours}" for keys in JSON_OPTIONS.values() for key, ours in keys.items() if "_" in key}
        meant["lora"] = "--peft lora"                                 # (as RWKV-LM-LoRA has it, and --lora_r)
        hint = f"; did you mean {meant[name]}?" if name in meant else nearest(name, known, "--")
        raise Fatal(f"unknown option {unknown[0]}{hint}; --help lists them all")
    if given.pop("fla", False):  # the tutorial's word for it
        if given["op"] not in ("", "fla"):
            raise Fatal(f"--fla is short for --op fla, and --op {given['op']} is given too: give one of them")
        given["op"] = "fla"
    given["grad_cp"] = {"true": "1", "false": "0"}.get(given["grad_cp"].lower(), given["grad_cp"])
    given["peft"] = {"disha": "bone", "miss": "bone"}.get(given["peft"], given["peft"])   # RWKV-PEFT renamed it, twice
    if given["train_type"] == "state" and "peft" not in named:
        given["peft"] = "state"                                       # RWKV-PEFT's way to say it
    for f in fields(Config):
        if isinstance(f.default, tuple):
            given[f.name] = list_of(f.name, given[f.name])
        if isinstance(f.default, str) and not is_text(given[f.name]):
            raise Fatal(f"--{f.name} {given[f.name]!r}: not valid UTF-8")
    for name, reason in WITHOUT_EFFECT.items():
        if given.pop(name, None) is not None:
            say(f"--{name} has no effect here: {reason}")
    inside: dict[str, Any] = {}
    for option in JSON_OPTIONS:
        if option in json_options(given["peft"]):
            inside = in_json(option, given, inside)
        elif read_json(option, given[option]):                        # (its load and r are for another method)
            say(f"--{option} has no effect with --peft {given['peft']}")
    return Config(**given | inside)


def in_json(option: str, given: dict[str, Any], inside: dict[str, Any]) -> dict[str, Any]:
    """The options given inside another, with values of their types, added to those of an earlier one, `inside`; null
    leaves one as it was."""
    keys, values = JSON_OPTIONS[option], dict(inside)
    for key, value in read_json(option, given[option]).items():
        if key not in keys:
            raise Fatal(f"--{option}: unknown key {key!r}; it takes {', '.join(keys)}{nearest(key, keys)}")
        if value is None:
            continue
        usual = given[keys[key]]
        try:
            typed = type(usual)(value)
            if not isinstance(usual, str) and (isinstance(value, bool) or float(value) != typed):
                raise ValueError
        except (TypeError, ValueError, OverflowError):
            raise Fatal(f"--{option}: {key} is {value!r}; expected a value like {usual!r}") from None
        if (other := values.setdefault(keys[key], typed)) != typed:
            raise Fatal(f"--{option}: {key} is {value!r}, but {other!r} is given for --{keys[key]} too; leave one out")
    return values


def list_of(option: str, words: Sequence[str]) -> Sequence[str]:
    """The words of an option. Scripts also write them as '["time", "ln"]'; without the outer quotes a shell strips some
    of the inner ones."""
    text = " ".join(words)
    if text[:1] != "[":
        return words
    with contextlib.suppress(ValueError, RecursionError):
        return [str(word) for word in json.loads(text)]
    if text[-1] != "]":
        raise Fatal(f"--{option} {text}: the list has no closing bracket; write words, or a list in brackets")
    return re.findall(r"""[^][,\s"']+""", text)


def read_json(option: str, text: str) -> dict[str, Any]:
    """The JSON object given to an option; an empty one if none was."""
    def once(items: list[tuple[str, Any]]) -> dict[str, Any]:
        twice = [key for i, (key, _) in enumerate(items) if key in dict(items[:i])]
        if twice:
            raise Fatal(f"--{option}: {twice[0]!r} appears twice: {text}")
        return dict(items)

    try:
        value = json.loads(text or "{}", object_pairs_hook=once)
    except (ValueError, RecursionError) as e:                         # (also of 5000 digits, or of deep nesting)
        raise Fatal(f"--{option}: not valid JSON ({first_line(e)}): {text[:200]}") from None
    if not isinstance(value, dict):
        raise Fatal(f'--{option}: expected an object like {{"key": 1}}, not {text}')
    return value


# --------------------------------------------------------------------- the processes of a run, and what they say


def is_first() -> bool:
    """Whether this process speaks for all that torchrun started."""
    return os.environ.get("RANK", "0") == "0"


def say(text: str) -> None:
    """One line for the user, above any progress bar."""
    if is_first():
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()


def warn(text: str) -> None:
    """One line from any process, first or not: if one GPU lacks something, all the others wait for it."""
    say(text) if is_first() else print(f"rank {os.environ['RANK']}: {text}", file=sys.stderr, flush=True)


def progress(items: Iterable, what: str, total: int | None = None) -> Iterable:
    """The items, with a bar that vanishes at the end; no bar if nobody is watching."""
    return tqdm(items, what, total, leave=False, disable=None if is_first() else True)


def of_gloo(error: RuntimeError) -> str:
    """The error's first sentence, without gloo's source locations."""
    return re.sub(r"\[\S+:\d+\] ", "", first_line(error)).partition(". ")[0]


def in_time(seconds: float, action: Callable[[], Any]) -> Any:
    """What action() returns, or None if it takes longer: then it is abandoned."""
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(action()), daemon=True)
    thread.start()
    thread.join(seconds)
    return found[0] if found else None


@dataclass(frozen=True)
class Ranks:
    """The processes that train together, and which of them this is. Collectives do nothing if there is only one. All
    ranks must call the same collectives in the same order.

    A gloo collective fails when a rank is lost; then an error names that rank. (NCCL's collectives return at once: if a
    rank is lost during one, NCCL's watchdog ends the others after --dist_timeout, with its own message.)"""

    rank: int = 0
    size: int = 1
    store: Any = None                                                 # a dist.Store, which outlives a rank

    def call(self, collective: Callable, *inputs: Any) -> Any:
        """Calls it; if it fails, says which rank is missing."""
        try:
            return collective(*inputs)
        except RuntimeError as e:
            slow = "--dist_timeout must be longer than rank 0 takes to save; " if "imed out" in str(e) else ""
            raise Fatal(f"{self.who_is_lost()} ({of_gloo(e)}); {slow}--resume continues from the last save, as"
                        " torchrun --max-restarts=3 does by itself") from None

    def who_is_lost(self, patience: float = 5.0) -> str:
        """After a collective has failed: which rank is lost, or that the store is. (On a host that has stopped, it does
        not answer at all.)"""
        found = in_time(patience + 2, partial(self.ask_all, patience))
        return found or f"rank {self.rank}: the host of rank 0 stopped, or does not answer"

    def ask_all(self, patience: float) -> str:
        """For `patience` seconds, ranks that are alive say so; the others are lost. If a rank has reported a failure of
        its own, it is that one: the others may still be waiting for a rank that already knows."""
        ranks, deadline = range(self.size), time.monotonic() + patience
        try:
            self.store.set(f"{self.rank} is there", "")
            while time.monotonic() < deadline:
                if failed := [rank for rank in ranks if self.store.check([f"{rank} failed"])]:
                    return f"rank {', '.join(map(str, failed))} stopped, with an error of its own"
                lost = [rank for rank in ranks if not self.store.check([f"{rank} is there"])]
                if not lost:
                    return f"rank {self.rank}: the connection to the other ranks failed"
                time.sleep(0.1)
        except RuntimeError:                                          # the store is lost too
            return f"rank {self.rank}: the connection to the host of rank 0 is lost"
        return f"rank {', '.join(map(str, lost))} stopped, or does not answer"

    def tell_failure(self) -> None:
        """Before this rank ends: tells the store that it failed, unless it ends because another did."""
        def tell() -> None:
            with contextlib.suppress(RuntimeError):                   # (the store may be lost)
                if not self.store.check([f"{self.rank} is there"]):
                    self.store.set(f"{self.rank} failed", "")

        if self.size > 1:
            in_time(2, tell)

    def sum(self, x: Tensor) -> Tensor:
        """All-reduce, in place: x summed over the ranks."""
        if self.size > 1:
            self.call(dist.all_reduce, x)
        return x

    def totals(self, *numbers: float) -> list[float]:
        """Each number summed over the ranks, in fp64, on the host even if there are GPUs: gloo notices at once that a
        rank is lost. (A step begins with such a sum, and makes another after backward, before NCCL is used.)"""
        return self.sum(torch.tensor(numbers, dtype=torch.float64)).tolist()

    def first(self, action: Callable[[], Any]) -> Any:
        """What action() returns. Rank 0 does it first: if it fails there, the others never try."""
        result = action() if self.rank == 0 else None
        self.totals(0)
        return result if self.rank == 0 else action()

    def each(self, question: str, own: str) -> list[str]:
        """Every rank's answer to a question, in rank order, through the store. A question is asked only once."""
        if self.size == 1:
            return [own]
        self.call(self.store.set, f"{question} {self.rank}", own)
        self.totals(0)                                                # (which notices at once that a rank is lost)
        answers = [self.call(self.store.get, f"{question} {rank}").decode() for rank in range(self.size)]
        self.totals(0)                                                # rank 0, which may host the store, waits for all
        return answers

    def agree(self, question: str, own: dict[str, Any], advice: str) -> None:
        """If a rank differs from rank 0, all end with one line: which rank, in what, and what to do."""
        first, *others = map(json.loads, self.each(question, json.dumps(own)))
        for rank, its in enumerate(others, 1):
            odd = [f"{item} is {its.get(item)}, not {value}" for item, value in first.items() if its.get(item) != value]
            if odd:
                raise Fatal(f"rank {rank} differs from rank 0: {some(odd)}; {advice}")

    def sum_slices(self, x: Tensor) -> Tensor:
        """Reduce-scatter: of x (R S) summed over the ranks, this rank's slice (S)."""
        if self.size == 1:
            return x
        own = x.new_empty(len(x) // self.size)
        self.call(getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor), own, x)
        return own

    def gather_slices(self, x: Tensor, own: Tensor) -> None:
        """All-gather: fills x (R S) with the slices (S) of all; `own` may be the slice of x itself."""
        if self.size > 1:                                             # (torch 2.13 has a new name for it, as above)
            self.call(getattr(dist, "all_gather_single", dist.all_gather_into_tensor), x, own.clone())

    def collect(self, own: Tensor) -> Tensor | None:
        """For rank 0: the `own` (S,...) of all ranks, end to end (R S,...), in host memory."""
        all_ranks = own.new_empty(self.size * len(own), *own.shape[1:]) if self.size > 1 else own
        self.gather_slices(all_ranks, own)
        return all_ranks.cpu() if self.rank == 0 else None

    def copy_from(self, owner: int, x: Tensor) -> Tensor:
        """Broadcast, in place: x as `owner` has it."""
        if self.size > 1:
            self.call(dist.broadcast, x, owner)
        return x


class Unheard(Ranks):
    """One of several ranks, but it sends nothing and leaves tensors as they are: to count bytes, not values."""

    def each(self, question: str, own: str) -> list[str]:
        return [own]

    def call(self, collective: Callable, *inputs: Any) -> Any:
        return self                                                   # as an asynchronous collective: with a `wait`

    def wait(self) -> None:
        pass


ONE_RANK = Ranks()
JOINED = [ONE_RANK]                                                   # the last: those that this process has joined


# ======================================================================================================================
# 2. The WKV operator: a memory S that maps keys to values. Every token makes it fade and writes to it; in RWKV-7 it
#    also takes out what the memory answers to the key. The definitions are here; `wkv7_cuda/` computes the same faster.
# ======================================================================================================================


def wkv7_ref(r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """The recurrence of RWKV-7 (arXiv 2503.14456), in at least fp32.

        d_t = exp(-exp(-1/2) sigmoid(w_t))                        decay, in (0.545, 1)
        S_t = S_{t-1} diag(d_t) + (S_{t-1} a_t) b_t^T + v_t k_t^T
        y_t = S_t r_t

    With a = -kappa and b = kappa eta the second summand erases a share eta of what S answers to kappa, a unit vector.
    Takes r w k v a b (B,T,H,N), w the raw decay logit, and the state S_0 (B,H,N value,N key).
    Returns y (B,T,H,N) in the inputs' dtype, and S_T like S_0.
    """
    y_dtype, dtype = r.dtype, torch.promote_types(r.dtype, torch.float32)
    r, w, k, v, a, b = (x.to(dtype) for x in (r, w, k, v, a, b))
    d = torch.exp(-math.exp(-0.5) * torch.sigmoid(w))                                     # (B,T,H,N)
    S, ys = state.to(dtype), []
    for t in range(r.shape[1]):
        Sa = S @ a[:, t, :, :, None]                                                      # (B,H,N,1)
        S = S * d[:, t, :, None, :] + Sa * b[:, t, :, None, :] + v[:, t, :, :, None] * k[:, t, :, None, :]
        ys.append(S @ r[:, t, :, :, None])                                                # (B,H,N,1)
    return torch.stack(ys, 1).squeeze(-1).to(y_dtype), S


def wkv6_ref(r: Tensor, w: Tensor, k: Tensor, v: Tensor, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """The recurrence of RWKV-6, and of RWKV-5, whose decay is the same at every token (arXiv 2404.05892).

        d_t = exp(-exp(w_t))                                      decay, in (0, 1): it has no floor
        y_t = (S_{t-1} + v_t (u k_t)^T) r_t                       what was there before, and this token with a bonus
        S_t = S_{t-1} diag(d_t) + v_t k_t^T

    Takes r w k v (B,T,H,N), w the raw decay logit, the bonus u (H,N), and the state S_0 (B,H,N value,N key).
    Returns y (B,T,H,N) in the inputs' dtype, and S_T like S_0. Computes in at least fp32.
    """
    y_dtype, dtype = r.dtype, torch.promote_types(r.dtype, torch.float32)
    r, w, k, v, u = (x.to(dtype) for x in (r, w, k, v, u))
    d, bonus = torch.exp(-torch.exp(w)), (r * u * k).sum(-1, keepdim=True)                # (B,T,H,N), (B,T,H,1)
    S, ys = state.to(dtype), []
    for t in range(r.shape[1]):
        ys.append((S @ r[:, t, :, :, None]).squeeze(-1) + bonus[:, t] * v[:, t])          # (B,H,N)
        S = S * d[:, t, :, None, :] + v[:, t, :, :, None] * k[:, t, :, None, :]
    return torch.stack(ys, 1).to(y_dtype), S


RECURRENCE = {"x070": ("wkv7", wkv7_ref), "x060": ("wkv6", wkv6_ref), "x052": ("wkv6", wkv6_ref)}
WKV: dict[str, dict[str, Callable[[], Callable]]] = {  # version -> op -> what loads it
    version: {op: partial(wkv7_cuda.load, op, name) for op in wkv7_cuda.OPS[name]} | {"torch": lambda ref=ref: ref}
    for version, (name, ref) in RECURRENCE.items()
}
FOR_HEADS_OF_64 = ("cuda", "cuda_precise", "triton", "fla", "cpu")    # all that are compiled support only these
COUNTED = ("cuda", "cuda_precise", "chunk")                           # whose bytes are counted unbuilt, without a GPU
FASTEST_FIRST = {"cuda": ("cuda", "triton", "chunk", "torch"), "cpu": ("cpu", "chunk", "torch")}


def find_wkv(version: str, head_size: int, op: str, device: str, ready: bool = True) -> tuple[str, Callable]:
    """The operator `op` of a version, and its name; for op "" the fastest that this machine can build.

    Not `ready`: to count bytes, with tensors that have no values. Then a GPU's operator is loaded but not built; triton
    and fla, whose kernels would run regardless, are replaced by the fastest of the others.
    """
    if head_size != 64 and op in FOR_HEADS_OF_64:
        raise Fatal(f"--op {op}: it needs heads of 64 channels, this model's have {head_size}; use chunk")
    ops = {o: load for o, load in WKV[version].items() if head_size == 64 or o not in FOR_HEADS_OF_64}
    if not ready:
        op = "" if op in ops and op in ("triton", "fla") and device == "cuda" else op
        ops |= {o: partial(ops[o], ready=False) for o in COUNTED if o in ops}
    if op:
        load = pick(ops, f"--version {version} --op", op)
        try:
            return op, load()
        except wkv7_cuda.BuildError as e:
            raise Fatal(f"--op {op}: {e}") from None
    for op in (o for o in FASTEST_FIRST[device] if o in ops):
        try:
            return op, ops[op]()
        except wkv7_cuda.BuildError as e:
            warn(f"no WKV operator {op}: {e.why}; using the next one, which is slower")
    raise AssertionError("the definition always loads")


def load_wkv(version: str, head_size: int, op: str, device: str) -> Callable:
    """The operator that a run computes with; if it was chosen automatically, a line names it."""
    name, wkv = find_wkv(version, head_size, op, device)
    if not op:
        why = f" (faster ones need heads of 64, these have {head_size})" * (head_size != 64)
        say(f"WKV operator: {name}{why}")
    return wkv


# ======================================================================================================================
# 3. The model. Parameters have the checkpoint's names, locals the paper's letters. State is an argument: training on
#    chunks, continuing a text and generating token by token are the same forward pass.
# ======================================================================================================================


@dataclass(frozen=True)
class Arch:
    """The sizes of a model, all of them readable from its file."""

    version: str
    n_layer: int
    n_embd: int                                                       # C
    dim_att: int                                                      # A = H N
    dim_ffn: int                                                      # F
    head_size: int                                                    # N
    vocab_size: int                                                   # V
    ranks: dict[str, int]                                             # of the built-in low-rank maps
    pre_ffn: bool = False                                             # block 0 has channel mixing, not time mixing
    head_qk: int = 0                                                  # Q, the width of the copying head
    time_state: bool = False                                          # blocks hold the memory that a text begins with

    @property
    def n_head(self) -> int:
        return self.dim_att // self.head_size

    def depth(self, layer: int) -> tuple[float, float]:
        """rho, from 0 in the first layer to 1 in the last, and tau, from 1 in the first down to 1/L."""
        return layer / max(self.n_layer - 1, 1), 1 - layer / self.n_layer


@dataclass
class BlockState:
    """What one block remembers of the past. Zeros at the beginning of a text."""

    att: Tensor                                                       # (B,C) the last input of the time mixing
    wkv: Tensor                                                       # (B,H,N value,N key), fp32
    ffn: Tensor                                                       # (B,C) the last input of the channel mixing

    def detach(self) -> BlockState:
        return BlockState(self.att.detach(), self.wkv.detach(), self.ffn.detach())


def shift(x: Tensor, last: Tensor) -> Tensor:
    """Token shift: x_{t-1} in place of x_t; `last` (B,C) is what came before the first token. (B,T,C)"""
    return torch.cat([last[:, None], x[:, :-1]], dim=1)


class Mixed(torch.autograd.Function):
    """z_i = x + (y - x) mu_i, for x y (B,T,C) and each mu_i (1,1,C) or (B,T,C); their backward passes in one:

        dy = sum of dz_i mu_i,   dx = sum of dz_i - dy,   dmu_i = dz_i (y - x), summed to mu_i's shape

    dx and dy are summed in fp32. (Autograd makes twice the operations, and in bf16 twice the error.)
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, *mus: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*mus, *((x, y) if any(ctx.needs_input_grad[2:]) else ()))
        return tuple(torch.lerp(x, y, mu) for mu in mus)

    @staticmethod
    def backward(ctx: Any, *dzs: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        mus, xy = saved[:len(dzs)], saved[len(dzs):]
        total = dzs[0].to(torch.promote_types(dzs[0].dtype, torch.float32))
        dy = total * mus[0]
        for dz, mu in zip(dzs[1:], mus[1:], strict=True):
            total, dy = total + dz, torch.addcmul(dy, dz, mu)
        dmus = [None] * len(mus)
        if xy:
            p = xy[1] - xy[0]
            dmus = [(dz * p).sum_to_size(mu.shape) for dz, mu in zip(dzs, mus, strict=True)]
        return (total - dy).to(dzs[0]), dy.to(dzs[0]), *dmus


class Unit(torch.autograd.Function):
    """u = x / |x| along the last dimension; dx = (du - (du . u) u) / |x|. (Autograd makes three times the operations.)
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        least = max(1e-12, torch.finfo(x.dtype).tiny)                 # (1e-12 is 0 in fp16)
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(least)
        u = x / length
        ctx.save_for_backward(u, length)
        return u

    @staticmethod
    def backward(ctx: Any, du: Tensor) -> Tensor:
        u, length = ctx.saved_tensors
        return torch.addcmul(du, (du * u).sum(-1, keepdim=True), u, value=-1) / length


def parameters_of(module: nn.Module, shapes: dict[str, tuple[int, ...]]) -> None:
    for name, shape in shapes.items():
        module.register_parameter(name, nn.Parameter(torch.empty(shape)))


Compute = Callable[[], Tensor]
WAYS: list[Callable[[Compute], Tensor]] = []                          # the last: of the block that is running


def product(compute: Compute) -> Tensor:
    """A product with a matrix of a block: computed, or the one that --grad_cp products has kept."""
    return WAYS[-1](compute) if WAYS else compute()


@contextlib.contextmanager
def through(way: Callable[[Compute], Tensor]) -> Iterator[None]:
    """In this context, `way` says what becomes of a product."""
    WAYS.append(way)
    try:
        yield
    finally:
        WAYS.pop()


class Product(torch.autograd.Function):
    """y = x W^T, for a W (out,in) that may be trained; y may be kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor) -> Tensor:
        ctx.save_for_backward(x, W)
        return product(lambda: F.linear(x, W))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, W = ctx.saved_tensors
        dx = dy @ W if ctx.needs_input_grad[0] else None
        return dx, dy.flatten(0, -2).T @ x.flatten(0, -2) if ctx.needs_input_grad[1] else None


class Linear(nn.Linear):
    """y = x W^T. Until it gets adapters, W may stay in the file it came from; each use then fetches it."""

    def forward(self, x: Tensor) -> Tensor:
        W = self.weight.to(x)
        # (F.linear saves x and W before it multiplies, and what is computed again may end there; Product saves after.)
        return Product.apply(x, W) if WAYS else F.linear(x, W)


class TimeMix(nn.Module):
    """What all versions share: token shift, the WKV memory, a norm per head, the gate, the output projection.

    A version adds `project`, which turns tokens into the operator's inputs and the gate, and maybe `bonus`, which is
    added to what was read from the memory. Four attributes describe its files.
    """

    signature: tuple[str, ...]                                        # parameters that no other version has all of
    per_head: str                                                     # the parameter that shows H and N
    low_rank: dict[str, str]                                          # low-rank map -> its second factor (rank,A)
    maps = ("receptance", "key", "value", "output")                   # in the order of the file

    def __init__(self, arch: Arch, layer: int, wkv: Callable):
        super().__init__()
        self.arch, self.layer, self.wkv = arch, layer, wkv
        C, A = arch.n_embd, arch.dim_att
        H, N = arch.n_head, arch.head_size
        self.register_parameter("time_state", None)                   # (H,N value,N key): S_0, where it is not zero
        parameters_of(self, self.shapes() | ({"time_state": (H, N, N)} if arch.time_state else {}))
        for name in self.maps:
            self.add_module(name, Linear(A if name == "output" else C, C if name == "output" else A, bias=False))
        self.ln_x = nn.GroupNorm(arch.n_head, A, eps=64e-5)           # (RWKV-LM: 1e-5, of y / 8: the same)

    def heads(self, x: Tensor) -> Tensor:
        """(...,A) -> (...,H,N)"""
        return x.unflatten(-1, (self.arch.n_head, self.arch.head_size))

    def bonus(self, *inputs: Tensor) -> Tensor | float:
        return 0.0

    def forward(self, x: Tensor, v_first: Tensor | None, last: Tensor, S: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (B,T,C), v_first (B,T,A), last (B,C), S (B,H,N,N) -> the update (B,T,C), v_first, the next S."""
        B, T, _ = x.shape
        inputs, g, v_first = self.project(x, shift(x, last), v_first)
        y, S = self.wkv(*inputs, S)                                                       # (B,T,H,N)
        y = self.heads(self.ln_x(y.view(B * T, -1)).view(B, T, -1)) + self.bonus(*inputs)
        return self.output(y.flatten(-2) * g), v_first, S

    def initialise(self) -> None:
        """A new model's weights, as RWKV-LM draws them; a version adds its own."""
        for name in self.maps:
            nn.init.orthogonal_(self.get_submodule(name).weight, dict(key=0.1, gate=0.1).get(name, 1.0))
        self.output.weight.zero_()
        self.ln_x.weight.fill_(((1 + self.layer) / self.arch.n_layer) ** 0.7)
        self.ln_x.bias.zero_()


class TimeMix_x052(TimeMix):
    """RWKV-5.2 "Eagle" (arXiv 2404.05892): every channel forgets at its own pace, the same at every token."""

    signature, per_head, low_rank = ("time_mix_g", "time_decay", "time_faaaa", "gate.weight"), "time_faaaa", {}
    maps = (*TimeMix.maps, "gate")

    @staticmethod
    def new_ranks(C: int) -> dict[str, int]:
        return {}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        C, HN = self.arch.n_embd, (self.arch.n_head, self.arch.head_size)
        return {f"time_mix_{i}": (1, 1, C) for i in "kvrg"} | {"time_decay": HN, "time_faaaa": HN}

    def mix(self, x: Tensor, previous: Tensor) -> tuple[Tensor, ...]:
        # Version 5 stores the weight of x_t, 6 and 7 that of x_{t-1}.
        return Mixed.apply(previous, x, self.time_mix_k, self.time_mix_v, self.time_mix_r, self.time_mix_g)

    def decay(self) -> Tensor:
        return self.time_decay                                                            # (H,N)

    def project(self, x: Tensor, previous: Tensor, v_first: None) -> tuple[list[Tensor], Tensor, None]:
        x_k, x_v, x_r, x_g, *x_w = self.mix(x, previous)                                  # (x_w: for x060's decay)
        r, k, v = map(self.heads, (self.receptance(x_r), self.key(x_k), self.value(x_v)))  # (B,T,H,N)
        w = self.decay(*x_w).expand_as(r)                                                 # raw decay logit
        return [r, w, k, v, self.time_faaaa], F.silu(self.gate(x_g)), v_first

    def initialise(self) -> None:
        super().initialise()
        A, (rho, _) = self.arch.dim_att, self.arch.depth(self.layer)
        c = torch.arange(A)
        self.time_decay.view(-1)[:] = -6 + 5 * (c / (A - 1)) ** (0.7 + 1.3 * rho)
        self.time_faaaa.view(-1)[:] = rho * (1 - c / (A - 1)) + 0.1 * ((c + 1) % 3 - 1)
        weights = self.new_mix()
        for name, p in self.named_parameters():
            if name.startswith("time_mix_"):
                p[:] = weights[name[-1]]

    def new_mix(self) -> dict[str, Tensor]:
        """The weights of x_t in a new model."""
        delta, (rho, tau) = torch.arange(self.arch.n_embd) / self.arch.n_embd, self.arch.depth(self.layer)
        x, v, r = delta**tau, delta**tau + 0.3 * rho, delta ** (tau / 2)
        return dict(x=x, w=x, k=x, v=v, r=r, g=r)


class TimeMix_x060(TimeMix_x052):
    """RWKV-6 "Finch" (arXiv 2404.05892): the token decides what is mixed into it, and how fast the memory forgets."""

    signature = ("time_maa_x", "time_maa_w1", "time_faaaa", "gate.weight")
    low_rank = {"decay": "time_decay_w2", "mix": "time_maa_w2"}

    @staticmethod
    def new_ranks(C: int) -> dict[str, int]:
        return dict(decay=128, mix=64) if C >= 4096 else dict(decay=64, mix=32)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        C, A, D = self.arch.n_embd, self.arch.dim_att, self.arch.ranks
        mix = {f"time_maa_{i}": (1, 1, C) for i in "xwkvrg"}
        mix |= {"time_maa_w1": (C, 5 * D["mix"]), "time_maa_w2": (5, D["mix"], C)}
        decay = {"time_decay": (1, 1, A), "time_decay_w1": (C, D["decay"]), "time_decay_w2": (D["decay"], A)}
        return mix | decay | {"time_faaaa": (self.arch.n_head, self.arch.head_size)}

    def mix(self, x: Tensor, previous: Tensor) -> tuple[Tensor, ...]:
        x_x = torch.lerp(x, previous, self.time_maa_x)
        hidden = torch.tanh(x_x @ self.time_maa_w1).unflatten(-1, (5, -1))                # (B,T,5,D)
        m_w, m_k, m_v, m_r, m_g = torch.einsum("btfd,fdc->fbtc", hidden, self.time_maa_w2)
        return Mixed.apply(x, previous, self.time_maa_k + m_k, self.time_maa_v + m_v, self.time_maa_r + m_r,
                           self.time_maa_g + m_g, self.time_maa_w + m_w)

    def decay(self, x_w: Tensor) -> Tensor:
        return self.heads(self.time_decay + torch.tanh(x_w @ self.time_decay_w1) @ self.time_decay_w2)

    def initialise(self) -> None:
        super().initialise()
        for i, m in self.new_mix().items():
            self.get_parameter(f"time_maa_{i}")[:] = 1 - m
        for m in ("time_maa", "time_decay"):
            self.get_parameter(f"{m}_w1").zero_()
            self.get_parameter(f"{m}_w2").uniform_(-0.01, 0.01)


class TimeMix_x070(TimeMix):
    """RWKV-7 "Goose" (arXiv 2503.14456): what is stored under a key is taken out before something new is put there."""

    signature, per_head = ("r_k", "x_r", "w0", "a0", "g1"), "r_k"
    low_rank = {m: f"{m}2" for m in "wavg"}

    @staticmethod
    def new_ranks(C: int) -> dict[str, int]:
        """RWKV-LM's for this width, since July 2025."""
        return {m: max(32, 32 * round(f * math.sqrt(C) / 32)) for m, f in dict(w=2.5, a=2.5, v=1.7, g=5).items()}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        C, D = self.arch.n_embd, self.arch.ranks
        shapes = {f"x_{i}": (1, 1, C) for i in "rwkvag"}
        # The first layer's value is v_first itself: it has nothing to mix with, and v0 v1 v2 there would never be used.
        for m in "wavg" if self.layer > 0 else "wag":
            shapes |= {f"{m}1": (C, D[m]), f"{m}2": (D[m], C)} | ({f"{m}0": (1, 1, C)} if m != "g" else {})
        return shapes | {"k_k": (1, 1, C), "k_a": (1, 1, C), "r_k": (self.arch.n_head, self.arch.head_size)}

    def project(self, x: Tensor, previous: Tensor, v_first: Tensor | None) -> tuple[list[Tensor], Tensor, Tensor]:
        mus = self.x_r, self.x_w, self.x_k, self.x_v, self.x_a, self.x_g
        x_r, x_w, x_k, x_v, x_a, x_g = Mixed.apply(x, previous, *mus)
        r, k, v = self.receptance(x_r), self.key(x_k), self.value(x_v)                    # (B,T,A)
        w = self.w0 + torch.tanh(x_w @ self.w1) @ self.w2                                 # raw decay logit
        eta = torch.sigmoid(self.a0 + (x_a @ self.a1) @ self.a2)                          # in-context learning rate
        g = torch.sigmoid(x_g @ self.g1) @ self.g2
        if v_first is None:                                                               # this is the first layer
            v_first = v
        else:                                                                             # value residual
            v = torch.lerp(v, v_first, torch.sigmoid(self.v0 + (x_v @ self.v1) @ self.v2))
        # The removal key is taken from k as it is before the learning rate is folded into k.
        kappa = Unit.apply(self.heads(k * self.k_k))                                      # (B,T,H,N)
        k = k * (1 + (eta - 1) * self.k_a)
        return [*map(self.heads, (r, w, k, v)), -kappa, kappa * self.heads(eta)], g, v_first

    def bonus(self, r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return (r * k * self.r_k).sum(-1, keepdim=True) * v                               # (B,T,H,N)

    def initialise(self) -> None:
        """As RWKV-LM has done since May 2025."""
        C, N, (rho, tau) = self.arch.n_embd, self.arch.head_size, self.arch.depth(self.layer)
        c = torch.arange(C)
        linear, delta = c / (C - 1) - 0.5, c / C
        z = (c % N - (N - 1) / 2) / ((N - 1) / 2)
        zigzag = z * z.abs()
        for name, e in dict(x_r=0.2, x_w=0.9, x_k=0.7, x_v=0.7, x_a=0.9, x_g=0.2).items():
            self.get_parameter(name)[:] = 1 - delta ** (e * tau)
        self.w0[:] = -5.5 + 6 * (c / (C - 1)) ** (1 + rho**0.3) + 2.5 * zigzag
        self.a0[:] = -0.19 + 0.3 * zigzag + 0.4 * linear
        if self.layer > 0:
            self.v0[:] = 0.73 - 0.4 * linear
        for m in "wavg" if self.layer > 0 else "wag":
            self.get_parameter(f"{m}1").zero_()
            nn.init.orthogonal_(self.get_parameter(f"{m}2"), 0.1)
        self.k_k[:], self.k_a[:], self.r_k[:] = 0.71 - 0.1 * linear, 1.02, -0.04
        super().initialise()


class SquaredReLU(torch.autograd.Function):
    """y = max(x, 0)^2. These are the widest tensors of a block; torch's own backward makes three more of them.

    (In place, but for compilers, which need no help: torch 2.11's makes wrong code of it.)
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        h = torch.relu(x)
        return h * h if torch.compiler.is_compiling() else h.square_()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        x, = ctx.saved_tensors
        h = torch.relu(x)
        return h * dy * 2 if torch.compiler.is_compiling() else h.mul_(dy).mul_(2)


class ChannelMix(nn.Module):
    """key, squared relu, value: the memory of a token's own channels. Before version 7 a gate follows."""

    mixes: tuple[str, ...]                                            # token-shift weights
    maps = ("key", "receptance", "value")                             # in the order of the file

    def __init__(self, arch: Arch, layer: int):
        super().__init__()
        self.arch, self.layer = arch, layer
        C, width = arch.n_embd, arch.dim_ffn
        parameters_of(self, {name: (1, 1, C) for name in self.mixes})
        for name in self.maps:
            self.add_module(name, Linear(width if name == "value" else C, width if name == "key" else C, bias=False))

    def recall(self, x_k: Tensor) -> Tensor:
        return self.value(SquaredReLU.apply(self.key(x_k)))                               # (B,T,F) in between

    def initialise(self) -> None:
        delta, (_, tau) = torch.arange(self.arch.n_embd) / self.arch.n_embd, self.arch.depth(self.layer)
        for name in self.mixes:
            self.get_parameter(name)[:] = self.new_mix(delta, tau)
        for name in self.maps:
            self.get_submodule(name).weight.zero_()
        nn.init.orthogonal_(self.key.weight, 1.0)


class ChannelMix_x052(ChannelMix):
    mixes = ("time_mix_k", "time_mix_r")

    @staticmethod
    def new_width(C: int) -> int:
        return int(3.5 * C) // 32 * 32

    @staticmethod
    def new_mix(delta: Tensor, tau: float) -> Tensor:
        return delta**tau

    def mix(self, x: Tensor, previous: Tensor) -> tuple[Tensor, Tensor]:
        return Mixed.apply(previous, x, self.time_mix_k, self.time_mix_r)

    def forward(self, x: Tensor, last: Tensor) -> Tensor:
        """x (B,T,C), last (B,C) -> the update (B,T,C)."""
        x_k, x_r = self.mix(x, shift(x, last))
        return torch.sigmoid(self.receptance(x_r)) * self.recall(x_k)


class ChannelMix_x060(ChannelMix_x052):
    mixes = ("time_maa_k", "time_maa_r")

    @staticmethod
    def new_mix(delta: Tensor, tau: float) -> Tensor:
        return 1 - delta**tau**3

    def mix(self, x: Tensor, previous: Tensor) -> tuple[Tensor, Tensor]:
        return Mixed.apply(x, previous, self.time_maa_k, self.time_maa_r)


class ChannelMix_x070(ChannelMix):
    mixes, maps = ("x_k",), ("key", "value")

    @staticmethod
    def new_width(C: int) -> int:
        return 4 * C

    @staticmethod
    def new_mix(delta: Tensor, tau: float) -> Tensor:
        return 1 - delta**tau**4

    def forward(self, x: Tensor, last: Tensor) -> Tensor:
        return self.recall(torch.lerp(x, shift(x, last), self.x_k))


TIME_MIX = {"x070": TimeMix_x070, "x060": TimeMix_x060, "x052": TimeMix_x052}
CHANNEL_MIX = {"x070": ChannelMix_x070, "x060": ChannelMix_x060, "x052": ChannelMix_x052}
PRE_FFN = ("x060", "x052")                                            # x070's first time mixing makes v_first


class Block(nn.Module):
    draws = False                                                     # random numbers, for an adapter's dropout

    def __init__(self, arch: Arch, layer: int, wkv: Callable):
        super().__init__()
        self.ln1 = nn.LayerNorm(arch.n_embd)
        self.ln2 = nn.LayerNorm(arch.n_embd)
        if layer == 0:
            self.ln0 = nn.LayerNorm(arch.n_embd)
        if layer == 0 and arch.pre_ffn:
            self.ffnPre = CHANNEL_MIX[arch.version](arch, layer)
        else:
            self.att = TIME_MIX[arch.version](arch, layer, wkv)
        self.ffn = CHANNEL_MIX[arch.version](arch, layer)

    def forward(self, x: Tensor, v_first: Tensor | None, state: BlockState) -> tuple[Tensor, Tensor, BlockState]:
        """x (B,T,C) -> x (B,T,C), v_first (B,T,A), the state after the last token."""
        h, S = self.ln1(x), state.wkv
        if hasattr(self, "ffnPre"):
            update = self.ffnPre(h, state.att)
        else:
            update, v_first, S = self.att(h, v_first, state.att, S)
        x = x + update
        h2 = self.ln2(x)
        x = x + self.ffn(h2, state.ffn)
        return x, v_first, BlockState(h[:, -1].clone(), S, h2[:, -1].clone())  # (a view would keep all of h)


# What --grad_cp keeps of a block for backward. Under a compiler torch's checkpoint sees to this, by policies, which are
# asked whether the result of an operation is saved; otherwise Recomputed does.


def policy(usual: CheckpointPolicy, context: Any, op: Any, *inputs: Any, **options: Any) -> CheckpointPolicy:
    """The usual answer, but a matrix made from its codes is never saved."""
    return CheckpointPolicy.MUST_RECOMPUTE if op.name().startswith("pissa_rwkv::read") else usual


save_all = partial(policy, CheckpointPolicy.PREFER_SAVE)
save_nothing = partial(policy, CheckpointPolicy.PREFER_RECOMPUTE)


def save_products(C: int, context: Any, op: Any, *inputs: Any, **options: Any) -> CheckpointPolicy:
    """Products that sum over C terms or more: those with a block's matrices, and the first of two thin ones, whose
    results are short."""
    left = {torch.ops.aten.mm.default: 0, torch.ops.aten.addmm.default: 1}.get(op)        # which input: (M,terms)
    if left is not None and inputs[left].shape[1] >= C:
        return CheckpointPolicy.MUST_SAVE
    return save_nothing(context, op)


RunBlock = Callable[[Block, Tensor, Tensor | None, BlockState], tuple[Tensor, Tensor, BlockState]]


def checkpointed(policy: Callable, block: Block, *inputs: Any) -> tuple[Tensor, Tensor, BlockState]:
    """Runs the block; backward recomputes what the policy did not save."""
    return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=block.draws,
                      context_fn=partial(create_selective_checkpoint_contexts, policy))


def random_state(x: Tensor) -> Any:
    """The module of torch that has the random state of x's device."""
    return torch.cuda if x.device.type == "cuda" else torch


class Saved(torch.autograd.Function):
    """Saves tensors for backward, as an operation does, and returns an empty one that leads to them."""

    @staticmethod
    def forward(ctx: Any, empty: Tensor, *tensors: Tensor | None) -> Tensor:
        ctx.save_for_backward(*tensors)
        return empty.clone()


class Complete(Exception):
    """All that backward needs has been computed again."""


class Recomputed:
    """A block that backward runs again. So does torch's checkpoint, but that also checks every tensor, for which a step
    takes the host 1.3 times as long (bench/host.py).

    Of each tensor that an operation saves for backward only its number is kept. When backward asks for the first of
    them, the block runs a second time, up to the operation that saves the last. products: keep those that the second
    run needs.
    """

    def __init__(self, block: Block, products: bool = False):
        self.block, self.products = block, products
        self.held: list[Tensor | None] = []                           # by number; filled by the second run
        self.kept: list[tuple[int, Tensor]] = []                      # products, and how many were saved before each

    def __call__(self, x: Tensor, v_first: Tensor | None, state: BlockState) -> tuple[Tensor, Tensor, BlockState]:
        """The first run."""
        if self.block.draws:
            self.random = random_state(x).get_rng_state()
        self.inputs = Saved.apply(torch.empty(0, requires_grad=True), x, v_first, state.att, state.wkv, state.ffn)
        with saved_tensors_hooks(self.forget, self.recall), self.products_by(self.keep):
            after = self.block(x, v_first, state)
        if self.kept and self.kept[-1][0] == len(self.held):          # nothing is saved after it: the second run ends
            self.kept.pop()                                           # before it
        return after

    def forget(self, t: Tensor) -> int:
        self.held.append(None)
        return len(self.held) - 1

    def keep(self, compute: Compute) -> Tensor:
        self.kept.append((len(self.held), y := compute()))
        return y.detach()

    def recall(self, number: int) -> Tensor:
        """In backward: the tensor that was forgotten under this number."""
        if self.held[number] is None:
            self.run_again()
        t, self.held[number] = self.held[number], None
        return t

    def run_again(self) -> None:
        x, v_first, *state = self.inputs.grad_fn.saved_tensors
        hooks = saved_tensors_hooks(partial(self.hold, itertools.count()), lambda t: t)
        with (contextlib.suppress(Complete), torch.enable_grad(), hooks, self.products_by(self.take),
              torch.random.fork_rng([x.device] * (x.device.type == "cuda"), self.block.draws, device_type="cuda")):
            if self.block.draws:
                random_state(x).set_rng_state(self.random)
            self.block(x, v_first, BlockState(*state))

    def hold(self, numbers: Iterator[int], t: Tensor) -> Tensor:
        number = next(numbers)
        self.held[number] = t = t.detach()
        if number + 1 == len(self.held):
            raise Complete
        return t

    def take(self, compute: Compute) -> Tensor:
        return self.kept.pop(0)[1] if self.kept else compute()

    def products_by(self, way: Callable[[Compute], Tensor]) -> contextlib.AbstractContextManager:
        return through(way) if self.products else contextlib.nullcontext()


def keep_all(block: Block, *inputs: Any) -> tuple[Tensor, Tensor, BlockState]:
    # Eager code does not keep what is made from codes (see FrozenProduct); a compiler must be told.
    return checkpointed(save_all, block, *inputs) if torch.compiler.is_compiling() else block(*inputs)


def keep_products(block: Block, x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, BlockState]:
    """The input, and the products with the block's matrices that are needed again: some 9 C numbers a token with
    adapters, 10 C without (before x070 11.5 C)."""
    if torch.compiler.is_compiling():
        return checkpointed(partial(save_products, x.shape[-1]), block, x, *rest)
    return Recomputed(block, products=True)(x, *rest)


def keep_input(block: Block, *inputs: Any) -> tuple[Tensor, Tensor, BlockState]:
    # (The compilers of torch 2.10 and 2.11 need a policy even here.)
    return checkpointed(save_nothing, block, *inputs) if torch.compiler.is_compiling() else Recomputed(block)(*inputs)


# From fast and large to slow and small.
GRAD_CP: dict[str, RunBlock] = {"0": keep_all, "products": keep_products, "1": keep_input}


class RWKV(nn.Module):
    """Tokens to hidden states; `head` turns these into logits. When gradients are needed, `run_block` calls the blocks.
    """

    def __init__(self, arch: Arch, wkv: Callable, grad_cp: str = "0"):
        super().__init__()
        self.arch, self.run_block = arch, GRAD_CP[grad_cp]
        self.emb = nn.Embedding(arch.vocab_size, arch.n_embd)
        self.blocks = nn.ModuleList(Block(arch, i, wkv) for i in range(arch.n_layer))
        self.ln_out = nn.LayerNorm(arch.n_embd)
        self.head = nn.Linear(arch.n_embd, arch.vocab_size, bias=False)
        if arch.head_qk:
            self.head_q = nn.Linear(arch.n_embd, arch.head_qk, bias=False)
            self.head_k = nn.Linear(arch.n_embd, arch.head_qk, bias=False)

    def forward(self, tokens: Tensor, states: list[BlockState] | None = None) -> tuple[Tensor, list[BlockState]]:
        """tokens (B,T) -> what the head reads (B,T,C), and the state of every block after the last token."""
        x = self.emb(tokens.to(self.emb.weight.device)).to(self.head.weight, non_blocking=True)  # (B,T,C)
        x = self.blocks[0].ln0(x)
        states = states or self.first_states(len(tokens), x)
        run_block, after = self.run_block if torch.is_grad_enabled() else keep_all, []
        v_first = None                                                # (of these tokens, so not part of the state)
        for block, state in zip(self.blocks, states, strict=True):
            x, v_first, state = run_block(block, x, v_first, state)
            after.append(state)
        return self.ln_out(x), after

    def first_states(self, B: int, like: Tensor) -> list[BlockState]:
        """The states of B texts at their beginning: zeros, or the memory that was learnt."""
        H, N, C = self.arch.n_head, self.arch.head_size, self.arch.n_embd
        S = like.new_zeros(B, H, N, N, dtype=torch.promote_types(like.dtype, torch.float32))
        zeros = BlockState(like.new_zeros(B, C), S, like.new_zeros(B, C))
        learnt = [block.att.time_state if hasattr(block, "att") else None for block in self.blocks]
        return [zeros if S_0 is None else replace(zeros, wkv=S_0.to(S).expand_as(S)) for S_0 in learnt]

    def votes(self, x: Tensor) -> Tensor:
        """head_qk: what each position adds to the logits of the tokens up to its own, (B,T,T); without it (B,T,0).

            c_ts = (W_q x_t) . (W_k x_s) / Q  for s <= t, else 0;     logits_t += sum over s of c_ts onehot(token_s)
        """
        if not self.arch.head_qk:
            return x.new_empty(*x.shape[:2], 0)
        return (self.head_q(x) @ self.head_k(x).mT / self.arch.head_qk).tril()

    def next_logits(self, x: Tensor, tokens: Tensor) -> Tensor:
        """Logits (B,V) for the token after tokens (B,T), which forward turned into x (B,T,C)."""
        votes = self.votes(x)[:, -1]                                                      # (B,T) or (B,0)
        return (x[:, -1] @ self.head.weight.T).scatter_add(-1, tokens[:, :votes.shape[-1]], votes)

    @torch.no_grad()
    def initialise(self) -> RWKV:
        """Draws the weights of a new model."""
        V, C = self.arch.vocab_size, self.arch.n_embd
        for module in self.modules():
            if isinstance(module, nn.LayerNorm):
                module.reset_parameters()
            elif isinstance(module, (TimeMix, ChannelMix)):
                module.initialise()
        self.emb.weight.uniform_(-1e-4, 1e-4)
        nn.init.orthogonal_(self.head.weight, 0.5 * math.sqrt(max(V / C, 1)))
        if self.arch.head_qk:
            self.head_q.weight.zero_()
            nn.init.orthogonal_(self.head_k.weight, 0.1)
        return self


NOT_OURS = {  # how a key ends -> what the file is
    "att.time_first": "RWKV-4 or an early RWKV-5", "att.gate_w1": "x060a, an experiment",
    "att.time_maa_rkvw_w1": "x060b or x060c, experiments",
    "qkv.qq.weight": "x070b (with attention)", "ffn.s_emb.weight": "x070a (DeepEmbed)",
    "pos_emb_x": "a model with --my_pos_emb", "tiny_q.weight": "a model with --tiny_att_dim",
    **dict.fromkeys((".lora_A", ".disha"), "a run's adapters, for --adapter_load; --load_model takes their base"),
    "init_lora_A": "a run's init_pissa.pth, for --adapter_init", "master": "a run's resume.pth, for --resume",
}
# Some files hold a value residual for layer 0; those with head_qk, the mask that `tril` applies.
UNUSED = (*(f"blocks.0.att.v{i}" for i in "012"), "copy_mask")


def detect(tensors: dict[str, Tensor], path: str) -> Arch:
    """The Arch of a model file, from its keys and shapes alone."""
    layers = {int(m[1]) for name in tensors if (m := re.match(r"blocks\.(\d{1,9})\.", name))}
    last = f"blocks.{max(layers, default=0)}."                        # (block 0 may lack what the others have)
    held = {name.partition("att.")[2] for name in tensors}
    version = next((v for v, mix in TIME_MIX.items() if held.issuperset(mix.signature)), None)
    odd = next((what for key, what in NOT_OURS.items() if any(name.endswith(key) for name in tensors)), "")
    if odd or version is None:
        raise Fatal(f"--load_model {path}: {f'this is {odd}' if odd else 'not an RWKV model'} ({len(tensors)} tensors,"
                    f" first {next(iter(tensors))!r}); supported are {', '.join(TIME_MIX)}")
    if layers != set(range(len(layers))):
        raise Fatal(f"--load_model {path}: its blocks are numbered {sorted(layers)}, with gaps; the file is incomplete")
    mix = TIME_MIX[version]
    low_rank = {m: f"{last}att.{factor}" for m, factor in mix.low_rank.items() if (m, len(layers)) != ("v", 1)}
    matrices = ["emb.weight", "head.weight", f"{last}att.key.weight", f"{last}ffn.key.weight",
                f"{last}att.{mix.per_head}", *(["head_q.weight"] if "head_q.weight" in tensors else [])]
    missing = [name for name in (*matrices, *low_rank.values())
               if name not in tensors or tensors[name].dim() < 2 or name in matrices and tensors[name].dim() > 2]
    if missing:
        raise Fatal(f"--load_model {path}: missing {', '.join(missing)} (as matrices)")
    V, C = tensors["emb.weight"].shape
    A, width = (tensors[f"{last}{part}.key.weight"].shape[0] for part in ("att", "ffn"))
    H, N = tensors[f"{last}att.{mix.per_head}"].shape
    if A != H * N or not A:
        raise Fatal(f"--load_model {path}: its attention is {A} wide, but has {H} heads of {N}")
    ranks = {m: tensors[factor].shape[-2] for m, factor in low_rank.items()}
    return Arch(version, len(layers), C, A, width, N, V, ranks,
                pre_ffn=version in PRE_FFN and "blocks.0.ffnPre.key.weight" in tensors,
                head_qk=len(tensors["head_q.weight"]) if "head_q.weight" in tensors else 0,
                time_state=f"{last}att.time_state" in tensors)


def new_arch(cfg: Config) -> Arch:
    """The sizes of a new model: from the flags, the rest as RWKV-LM chooses them for this width."""
    C, N, version = cfg.n_embd or 768, cfg.head_size or 64, cfg.version or "x070"
    time_mix, channel_mix = pick(TIME_MIX, "--version", version), CHANNEL_MIX[version]
    if N < 2:
        raise Fatal(f"--head_size {N}: expected at least 2, and 64 for the fast operators")
    if C % N or cfg.dim_att not in (0, C):
        raise Fatal(f"--n_embd {C}: expected a multiple of --head_size {N}, equal to --dim_att {cfg.dim_att or C}")
    if cfg.pre_ffn and cfg.n_layer == 1:
        raise Fatal("--pre_ffn 1: a model of one layer would have no memory; use --n_layer 2 or more")
    if cfg.pre_ffn and version not in PRE_FFN:
        raise Fatal(f"--pre_ffn 1: {version} does not support it; {' and '.join(PRE_FFN)} do")
    vocab_size = cfg.vocab_size or (65536 if cfg.tokenizer == "world" else 256)
    return Arch(version, cfg.n_layer or 12, C, C, cfg.dim_ffn or channel_mix.new_width(C), N, vocab_size,
                time_mix.new_ranks(C), cfg.pre_ffn, cfg.head_qk)


def check_arch(cfg: Config, arch: Arch) -> None:
    """Refuses a flag that contradicts the file, and shows both."""
    for name, found in vars(arch).items():
        flag = getattr(cfg, name, None)                               # (ranks and time_state have none)
        if flag and flag != found:
            raise Fatal(f"--{name} {flag}: {cfg.load_model} has {name} {found}; leave the flag out")


def check_tensors(model: RWKV, tensors: dict[str, Tensor], path: str) -> None:
    """A file must have every key of the model and no others, and every shape must match."""
    wanted = dict(model.named_parameters())
    missing, unknown = wanted.keys() - tensors.keys(), tensors.keys() - wanted.keys() - set(UNUSED)
    if missing or unknown:
        wrong = [f"{word} {some(names)}" for word, names in (("missing", missing), ("unexpected", unknown)) if names]
        raise Fatal(f"--load_model {path}: {'; '.join(wrong)}")
    for name, p in wanted.items():
        t = tensors[name]
        if [n for n in t.shape if n > 1] != [n for n in p.shape if n > 1] or not t.is_floating_point():
            raise Fatal(f"--load_model {path}: {name} is {list(t.shape)} {t.dtype}; expected {list(p.shape)}")


def fill(
    model: RWKV, tensors: dict[str, Tensor], path: str, device: str, dtype: torch.dtype, in_file: Container[str] = ()
) -> RWKV:
    """Puts a file's tensors into a model built on the meta device.

    The modules named in `in_file` get theirs memory-mapped, as they are in the file: that takes no memory.
    """
    check_tensors(model, tensors, path)
    for name, p in progress(list(model.named_parameters()), "loading"):
        t = tensors[name]
        largest = torch.stack(t.aminmax()).abs().max() if t.numel() else torch.zeros(())  # (of NaN it is NaN)
        if not largest.isfinite():
            raise Fatal(f"--load_model {path}: {name} holds NaN or infinity; the file is unusable")
        if not largest.double() <= torch.finfo(dtype).max:
            raise Fatal(f"--load_model {path}: {name} reaches {largest:.1e}, beyond {dtype}; use --precision bf16")
        module, _, leaf = name.rpartition(".")
        if module not in in_file:
            t = t.to(device=device, dtype=dtype, copy=True, memory_format=torch.contiguous_format)
        model.get_submodule(module).register_parameter(leaf, nn.Parameter(t.reshape(p.shape)))
    return model


def fingerprint(tensors: dict[str, Tensor]) -> str:
    """Identifies a model by its contents: names, shapes, and some thousand values spread over every tensor."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        flat = tensors[name].reshape(-1)
        values = flat[:: max(1, len(flat) // 1024)].float().contiguous()
        digest.update(f"{name}{tuple(tensors[name].shape)}{tensors[name].dtype}".encode() + values.numpy().tobytes())
    return digest.hexdigest()[:16]


# ======================================================================================================================
# 4. Frozen weights: matrices that take part in products but are never trained. `QUANT` says how they are held: as they
#    are, or as codes of 8 or 4 bits, from which a matrix is made whenever it is needed, one at a time.
# ======================================================================================================================

BLOCK = 64                                                            # weights, in row-major order, that share a scale
SLABS = 8                                                             # a matrix is processed in this many pieces

# The sixteen levels of nf4, quantiles of the normal distribution (QLoRA, arXiv 2305.14314): exactly the float32 numbers
# of bitsandbytes, since the formula does not give them to the last bit.
NF4 = (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
       -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
       0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0)


def once_per_device(make: Callable[[torch.device], Any]) -> Callable[[torch.device], Any]:
    """make(device), made once for each device; but always anew if tensors have no values (under FakeTensorMode)."""
    once = lru_cache(make)
    return lambda device: once(device) if type(torch.empty(0)) is Tensor else make(device)


@once_per_device
def nf4_levels(device: torch.device) -> tuple[Tensor, Tensor]:
    """The levels (16), and for each byte the two levels it stands for (256,2), the high nibble's first."""
    levels = torch.tensor(NF4, device=device)
    return levels, torch.stack([levels.repeat_interleave(16), levels.repeat(16)], 1)


def magnitudes(density: int) -> Tensor:
    """Ascending, fp32: for i = 0..6 the midpoints of density 2^i equal parts of [0.1, 1], times 10^(i-6)."""
    edges = (torch.linspace(0.1, 1, density * 2**i + 1) for i in range(7))
    return torch.cat([10.0 ** (i - 6) * ((e[:-1] + e[1:]) / 2) for i, e in enumerate(edges)])


@once_per_device
def dynamic_levels(device: torch.device) -> Tensor:
    """The 256 levels of bitsandbytes' dynamic 8-bit numbers (arXiv 1511.04561), ascending: magnitudes of both signs,
    and 0 and 1."""
    half, one = magnitudes(1), torch.ones(1)
    return torch.cat([-half.flip(0), 0 * one, half, one]).to(device)


def in_blocks(x: Tensor, size: int) -> Tensor:
    """x, row after row, as (blocks,size); the last block is padded with zeros."""
    flat = x.reshape(-1)
    return (F.pad(flat, (0, -len(flat) % size)) if len(flat) % size else flat).view(-1, size)


def in_slabs(width: int, dtype: torch.dtype, rows_of: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """rows_of(rows of the inputs), (rows,width), an eighth at a time, so that no second matrix is ever held."""
    out = inputs[0].new_empty(len(inputs[0]), width, dtype=dtype)
    for rows, *parts in zip(out.chunk(SLABS), *(x.chunk(SLABS) for x in inputs), strict=True):
        rows.copy_(rows_of(*parts))
    return out


def nearest_level(x: Tensor, absmax: Tensor, levels: Tensor) -> Tensor:
    """For x (blocks,size) and absmax (blocks): the index of the level nearest to x / absmax, the lower of two."""
    scaled = torch.where(absmax > 0, absmax, 1)[:, None].reciprocal() * x                 # (zeros stay zeros)
    return torch.bucketize(scaled, (levels[:-1] + levels[1:]) / 2, out_int32=True)


Parts = dict[str, Tensor]                                             # a matrix as it is held


def hold_dense(W: Tensor, dtype: torch.dtype) -> Parts:
    """W itself, rounded to the compute dtype."""
    return {"dense": W.to(dtype)}


def read_dense(parts: Parts, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    return parts["dense"]


def hold_int8(W: Tensor, dtype: torch.dtype) -> Parts:
    """8.25 bits a weight. codes (n) int8, from -127 to 127, and scale (n/64) fp16:

        scale = fp16(max |w| / 127),  code = round(w / scale);   w ~ code * scale

    n = out * in weights in row-major order; a block is 64 consecutive ones, maybe fewer at the end. Magnitudes above
    8.3e6 overflow the scale; below 4e-6 they are lost.
    """
    blocks = in_blocks(W, BLOCK)                                                          # (n/64,64)
    absmax = blocks.abs().amax(1)
    scale = (absmax / absmax.new_tensor(127)).half()                  # (for a plain 127 CUDA multiplies by 1/127)

    def whole(w: Tensor, s: Tensor) -> Tensor:
        return (w / torch.where(s > 0, s.float(), 1)[:, None]).round_().clamp_(-127, 127)

    codes = in_slabs(BLOCK, torch.int8, whole, blocks, scale)
    return {"codes": codes.view(-1)[:W.numel()], "scale": scale}


def read_int8(parts: Parts, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    codes = in_blocks(parts["codes"], BLOCK)                                              # (n/64,64)
    W = in_slabs(BLOCK, dtype, lambda c, s: c * s.float()[:, None], codes, parts["scale"])
    return W.view(-1)[:shape.numel()].view(shape)


def hold_nf4(W: Tensor, dtype: torch.dtype) -> Parts:
    """4.5 bits a weight, bitsandbytes' format to the bit. codes (n/2) uint8 and absmax (n/64) fp32:

        absmax = max |w|,  code = the level of NF4 nearest to w / absmax, the lower of two;   w ~ NF4[code] * absmax

    n = out * in weights in row-major order; a block is 64 consecutive ones, maybe fewer at the end. A byte holds two
    codes, the first in its high four bits; if n is odd, the last low ones are 7, the code of 0. For zeros absmax is 0.
    """
    blocks, (levels, _) = in_blocks(W, BLOCK), nf4_levels(W.device)                       # (n/64,64)
    absmax = blocks.abs().amax(1).float()

    def pairs(w: Tensor, m: Tensor) -> Tensor:
        code = nearest_level(w.float(), m, levels)
        return code[:, ::2] << 4 | code[:, 1::2]                                          # (n/64,32)

    codes = in_slabs(BLOCK // 2, torch.uint8, pairs, blocks, absmax)
    return {"codes": codes.view(-1)[:-(-W.numel() // 2)], "absmax": absmax}


def read_nf4(parts: Parts, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    codes = in_blocks(parts["codes"], BLOCK // 2)                                         # (n/64,32)
    _, pairs = nf4_levels(codes.device)

    def weights(c: Tensor, m: Tensor) -> Tensor:
        return pairs.index_select(0, c.reshape(-1).int()).view(-1, BLOCK).mul_(m[:, None])

    return in_slabs(BLOCK, dtype, weights, codes, parts["absmax"]).view(-1)[:shape.numel()].view(shape)


def hold_nf4dq(W: Tensor, dtype: torch.dtype) -> Parts:
    """4 + 8/64 + 32/(64 256) = 4.127 bits a weight: nf4 with its absmax quantised as well (bitsandbytes' double
    quantisation, to the bit).

        offset = mean of absmax,  absmax_max = max |absmax - offset| of 256 in a row;
        absmax_code = the dynamic level nearest to (absmax - offset) / absmax_max

    codes as in nf4, chosen with the exact absmax; absmax_codes (n/64) uint8, absmax_max (n/16384) and offset () fp32.
    """
    parts = hold_nf4(W, dtype)
    absmax = parts.pop("absmax")
    offset = absmax.double().mean().float()                           # (in fp64: the same bits in any order)
    blocks = in_blocks(absmax - offset, 256)                                              # (n/16384,256)
    absmax_max = blocks.abs().amax(1)
    codes = nearest_level(blocks, absmax_max, dynamic_levels(W.device)).to(torch.uint8)
    return parts | {"absmax_codes": codes.view(-1)[:len(absmax)], "absmax_max": absmax_max, "offset": offset}


def read_nf4dq(parts: Parts, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    blocks = in_blocks(parts["absmax_codes"], 256)
    absmax = dynamic_levels(blocks.device)[blocks.int()] * parts["absmax_max"][:, None]   # (n/16384,256)
    absmax = absmax.view(-1)[:len(parts["absmax_codes"])] + parts["offset"]
    return read_nf4({"codes": parts["codes"], "absmax": absmax}, shape, dtype)


class Quant(NamedTuple):
    """A way to hold a matrix: into parts and back."""

    hold: Callable[[Tensor, torch.dtype], Parts]                      # W (out,in) fp32, compute dtype -> its parts
    read: Callable[[Parts, torch.Size, torch.dtype], Tensor]          # parts -> W in fp32, rounded to the compute dtype
    lossy: bool = True

    def through(self, W: Tensor, dtype: torch.dtype) -> Tensor:
        """W as products see it when held this way: in the compute dtype."""
        return self.read(self.hold(W, dtype), W.shape, dtype)

    def merged_as(self, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
        """Returns a function from W to the matrix that an adapter is merged into. If W was quantised: the very matrix
        that training multiplied by, or the adapter would correct errors that are not there. Else W in fp32: what the
        compute dtype rounded off comes back."""
        return partial(self.through, dtype=dtype if self.lossy else torch.float32)


def levels_of_codes(device: torch.device) -> tuple[Tensor, Tensor]:
    return nf4_levels(device)[0], dynamic_levels(device)


# On a GPU a kernel (dequant.cu) replaces `read_*`, in one pass: the same parts, the same values.
fused = partial(dequant.fused, levels=levels_of_codes, say=warn)
QUANT = {"none": Quant(hold_dense, read_dense, lossy=False),
         "int8": Quant(hold_int8, fused("int8", read_int8)),
         "nf4": Quant(hold_nf4, fused("nf4", read_nf4)),
         "nf4dq": Quant(hold_nf4dq, fused("nf4dq", read_nf4dq))}


class FrozenProduct(torch.autograd.Function):
    """y = x W^T + u, where u (...,out) may be None. For backward it keeps the parts that W is held as, neither x nor W
    itself."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, u: Tensor | None, frozen: FrozenLinear) -> Tensor:
        ctx.frozen = frozen
        return product(lambda: F.linear(x, frozen.weight) if u is None else torch.addmm(u, x, frozen.weight.T))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor | None, None]:
        return dy @ ctx.frozen.weight, dy if ctx.needs_input_grad[1] else None, None


class FrozenLinear(nn.Module):
    """y = x W^T, or x W^T + u, for W (out,in), held as QUANT[quant] says, multiplied in the compute dtype. W gets no
    gradient. (With u, x and u have two dimensions.)"""

    def __init__(self, W: Tensor, dtype: torch.dtype, quant: str):
        super().__init__()
        self.shape, self.dtype, self.read = W.shape, dtype, QUANT[quant].read
        for name, part in QUANT[quant].hold(W, dtype).items():
            self.register_buffer(name, part)

    @property
    def weight(self) -> Tensor:
        """W in the compute dtype; if it is held as codes, a new one each time."""
        return self.read(self._buffers, self.shape, self.dtype)

    def forward(self, x: Tensor, u: Tensor | None = None) -> Tensor:
        return FrozenProduct.apply(x, u, self)


# ======================================================================================================================
# 5. Adapters: a few numbers beside each frozen matrix. LoRA's and Bone's start from nothing, PiSSA's from the matrix's
#    main part. State tuning leaves the matrices alone and trains what the memory holds when a text begins.
# ======================================================================================================================

OVERSAMPLE = 8                                                        # extra directions, for the last singular values


def top_singular(W: Tensor, rank: int, niter: int, draw: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """The first `rank` singular vectors and values: W (out,in) ~ U (out,r) diag(sigma (r)) Vt (r,in).

    niter 0: exact. Otherwise by randomised subspace iteration (Halko, Martinsson and Tropp, arXiv 0909.4061): a
    random image of W, sharpened niter times, holds the leading directions; only a small matrix is left to decompose.
    """
    if niter == 0:
        U, sigma, Vt = torch.linalg.svd(W, full_matrices=False)
        return U[:, :rank], sigma[:rank], Vt[:rank]
    width = min(rank + OVERSAMPLE, *W.shape)
    image = W @ torch.randn(W.shape[1], width, generator=draw, dtype=W.dtype).to(W.device)
    Q = torch.linalg.qr(image).Q                                                          # (out,width)
    for _ in range(niter):
        Q = torch.linalg.qr(W @ torch.linalg.qr(W.T @ Q).Q).Q
    U, sigma, Vt = torch.linalg.svd(Q.T @ W, full_matrices=False)                         # of (width,in)
    return (Q @ U)[:, :rank], sigma[:rank], Vt[:rank]


class Adapter(nn.Module):
    """Replaces a matrix W (out,in): holds it frozen, and beside it a few numbers that are trained. This class has none:
    methods use it for matrices that they leave alone.

    A kind of adapter says what its numbers are and where they start (`shapes`, `start`), what of W is then frozen
    (`residual`), and what they add: to y, the short way (`forward`), and to W, when it is merged (`delta`). For files
    it also says whether their numbers fit a matrix (`fits`, `ranks`), and what else describes them (`describe`).
    """

    names: tuple[str, ...] = ()                                       # of its parameters
    taken: tuple[str, ...] = ()                                       # those whose start is taken out of W
    unsaid_scale: float | None = 1.0                                  # of delta; None: a file must say it
    dropout = 0.0

    def __init__(self, cfg: Config, frozen: FrozenLinear, **trained: Tensor):
        super().__init__()
        self.frozen = frozen
        for name, t in trained.items():
            self.register_parameter(name, nn.Parameter(t))

    def forward(self, x: Tensor) -> Tensor:
        return self.frozen(x)

    @staticmethod
    def describe(cfg: Config) -> dict[str, Any]:
        """What a file says about its adapters, needed to compute with them; --resume requires the same."""
        return {}

    @staticmethod
    def ranks(shape: torch.Size, cfg: Config) -> Sequence[int]:
        """The ranks that fit a matrix (out,in)."""
        return (cfg.rank,)

    @staticmethod
    def shapes(shape: torch.Size, cfg: Config) -> dict[str, tuple[int, ...]]:
        """The shapes of what is trained beside a matrix (out,in)."""
        return {}

    @staticmethod
    def fits(shape: torch.Size, **trained: Tensor) -> bool:
        """Whether the numbers in a file fit a matrix (out,in)."""
        return True

    @classmethod
    def start(cls, W: Tensor, cfg: Config, draw: torch.Generator) -> dict[str, Tensor]:
        """Where training begins, for W (out,in) in fp32: at 0, unless a kind says otherwise."""
        return {name: W.new_zeros(shape) for name, shape in cls.shapes(W.shape, cfg).items()}

    @staticmethod
    def residual(W: Tensor, taken: dict[str, Tensor]) -> Tensor:
        """What is frozen of W (out,in)."""
        return W

    @staticmethod
    def delta(W: Tensor, scale: float, **trained: Tensor) -> Tensor | float:
        """What is added to the frozen W (out,in): y = x (W + delta)^T."""
        return 0.0


class ThinProduct(torch.autograd.Function):
    """x (M,in) itself, and z = x A^T (M,r). What multiplies that x by W leaves its gradient here, where

        dx += dz A,  dA = dz^T x

    is a sum in place. (Autograd would make dz A, as wide as x, beside it.)
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, A)
        return x.view_as(x), x @ A.T

    @staticmethod
    def backward(ctx: Any, dx: Tensor, dz: Tensor) -> tuple[Tensor, Tensor]:
        x, A = ctx.saved_tensors
        return dx.addmm_(dz, A), dz.T @ x


class LowRank(Adapter):
    """y = x W^T + scale drop(x) A^T B^T, for A (r,in), B (out,r); only A and B are trained. What LoRA and PiSSA share:
    they differ in where A and B start, and PiSSA has neither scale nor dropout."""

    names = ("lora_A", "lora_B")
    scale = 1.0

    @staticmethod
    def ranks(shape: torch.Size, cfg: Config) -> Sequence[int]:
        return range(1, min(shape) + 1)

    @staticmethod
    def shapes(shape: torch.Size, cfg: Config) -> dict[str, tuple[int, ...]]:
        return {"lora_A": (cfg.rank, shape[1]), "lora_B": (shape[0], cfg.rank)}

    @staticmethod
    def fits(shape: torch.Size, lora_A: Tensor, lora_B: Tensor) -> bool:
        r = lora_A.shape[:1]
        return lora_A.shape == (*r, shape[1]) and lora_B.shape == (shape[0], *r) and lora_A.numel() > 0

    @staticmethod
    def start(W: Tensor, cfg: Config, draw: torch.Generator) -> dict[str, Tensor]:
        A = (torch.rand(cfg.rank, W.shape[1], generator=draw) * 2 - 1) / math.sqrt(W.shape[1])
        return {"lora_A": A.to(W), "lora_B": W.new_zeros(W.shape[0], cfg.rank)}

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)                                                           # (M,in)
        if self.dropout:
            z = F.linear(F.dropout(rows, self.dropout, self.training), self.lora_A)       # (M,r)
        else:
            rows, z = ThinProduct.apply(rows, self.lora_A)
        u = F.linear(z if self.scale == 1 else self.scale * z, self.lora_B)               # (M,out)
        # W's product comes last and keeps nothing: a block that ends with it is computed again only up to here.
        return self.frozen(rows, u).view(*x.shape[:-1], -1)

    @staticmethod
    def delta(W: Tensor, scale: float, lora_A: Tensor, lora_B: Tensor) -> Tensor:
        return scale * (lora_B @ lora_A)


class LoRALinear(LowRank):
    """A at random, B at zero: at first nothing is added (arXiv 2106.09685)."""

    unsaid_scale = None

    def __init__(self, cfg: Config, frozen: FrozenLinear, **trained: Tensor):
        super().__init__(cfg, frozen, **trained)
        self.scale, self.dropout = cfg.lora_alpha / cfg.rank, cfg.lora_dropout

    @staticmethod
    def describe(cfg: Config) -> dict[str, Any]:
        return {"rank": cfg.rank, "scale": cfg.lora_alpha / cfg.rank}


class PiSSALinear(LowRank):
    """LoRA's two matrices, started at W's principal part (arXiv 2404.02948): with W = U diag(sigma) V^T cut at rank r,

        A = sqrt(sigma) V^T,  B = U sqrt(sigma),  W_res = W - B A;   y = x W_res^T + x A^T B^T

    which is W at first. This trains the directions in which W acts most strongly; the rest is frozen.
    """

    taken = ("lora_A", "lora_B")

    @staticmethod
    def describe(cfg: Config) -> dict[str, Any]:
        return {"rank": cfg.rank, "scale": 1.0, "svd_niter": cfg.svd_niter, "qpissa_iters": cfg.qpissa_iters,
                "seed": cfg.random_seed}

    @staticmethod
    def start(W: Tensor, cfg: Config, draw: torch.Generator) -> dict[str, Tensor]:
        U, sigma, Vt = top_singular(W, cfg.rank, cfg.svd_niter, draw)
        # W has rank below r: rows of A and columns of B that are both 0 get no gradient, so it starts as LoRA does.
        if sigma[-1] <= 1e-6 * W.norm():
            return LowRank.start(W, cfg, draw)
        root = sigma.sqrt()
        return {"lora_A": root[:, None] * Vt, "lora_B": U * root}

    @staticmethod
    def residual(W: Tensor, taken: dict[str, Tensor]) -> Tensor:
        """W - B0 A0; W, if nothing is taken out.

        Computed in float64 and rounded once, so that a GPU, a CPU and any number of threads find the same numbers (but
        for one in 10^8), hence the same codes: merging must reproduce the matrix that was trained on.
        """
        if not taken:
            return W
        A0, B0 = taken["lora_A"].double(), taken["lora_B"]
        return in_slabs(W.shape[1], W.dtype, lambda w, b: torch.addmm(w.double(), b.double(), A0, alpha=-1), W, B0)


BONE_MODES = ("bone", "bat")                                          # the forms of its update


class BoneLinear(Adapter):
    """y = x (W + dW)^T, with dW built from one D that starts at zero (Bone, or DiSHA, arXiv 2409.15371). With W
    (out,in) in blocks W[a,b] of r x r, and x in pieces x[b] of r:

        bone   D (r,out):       dW[o,j] = D[j mod r, o]               y = x W^T + (sum of x[b]) D
        bat    D (in/r,r,r):    dW[a,b] = W[a,b] D[b] + D[b]          y[a] = sum of W[a,b] (x[b] + z[b]) + sum of z[b]
                                                                      with z[b] = D[b] x[b]

    where W is as it is held, quantised or not: bat multiplies it by x + z, and no second matrix is made. In bone the
    last piece of x is padded with zeros. Files call D `disha`; older ones, `bone`.
    """

    names = ("disha",)

    @staticmethod
    def describe(cfg: Config) -> dict[str, Any]:
        return {"rank": cfg.rank, "mode": cfg.bone_mode}

    @staticmethod
    def ranks(shape: torch.Size, cfg: Config) -> Sequence[int]:
        fitting = range(1, shape[1] + 1)
        return fitting if cfg.bone_mode == "bone" else [r for r in fitting if shape[0] % r == shape[1] % r == 0]

    @staticmethod
    def shapes(shape: torch.Size, cfg: Config) -> dict[str, tuple[int, ...]]:
        r = cfg.rank
        return {"disha": {"bone": (r, shape[0]), "bat": (shape[1] // r, r, r)}[cfg.bone_mode]}

    @staticmethod
    def fits(shape: torch.Size, disha: Tensor) -> bool:
        if disha.dim() < 2 or 0 in disha.shape:
            return False
        r = disha.shape[-2]
        bone, bat = (r, shape[0]), (shape[1] // r, r, r)
        return disha.shape == bone or disha.shape == bat and shape[0] % r == shape[1] % r == 0

    def forward(self, x: Tensor) -> Tensor:
        D, r = self.disha, self.disha.shape[-2]
        lacking = -x.shape[-1] % r
        pieces = (F.pad(x, (0, lacking)) if lacking else x).unflatten(-1, (-1, r))        # (B,T,in/r,r)
        if D.dim() == 2:
            return pieces.sum(-2) @ D + self.frozen(x)                # (the frozen product last, as in LowRank)
        z = torch.einsum("bij,...bj->...bi", D, pieces)                                   # (B,T,in/r,r)
        y = self.frozen(x + z.flatten(-2)).unflatten(-1, (-1, r))                         # (B,T,out/r,r)
        return (y + z.sum(-2, keepdim=True)).flatten(-2)

    @staticmethod
    def delta(W: Tensor, scale: float, disha: Tensor) -> Tensor:
        D, r = disha, disha.shape[-2]
        if D.dim() == 2:
            return D.T.repeat(1, -(-W.shape[1] // r))[:, :W.shape[1]]
        blocks = W.view(-1, r, W.shape[1] // r, r)                                        # (out/r,r,in/r,r)
        return (torch.einsum("aibk,bkj->aibj", blocks, D) + D.transpose(0, 1)).reshape(W.shape)


class Method(NamedTuple):
    """A way to adapt a model."""

    layer: type[Adapter]                                              # what replaces a frozen matrix
    parts: tuple[str, ...]                                            # what else is trained: --train_parts auto
    state: bool = False                                               # blocks are given a time_state, and it is trained
    whole: bool = False                                               # its files are whole models
    low_lr: float = 0.0                                               # below this rate hardly anything is learnt
    high_lr: float = math.inf                                         # a higher one is unusual: it moves the main part

    def is_own(self, name: str) -> bool:
        """Whether a parameter is the method's, and so trained whatever --train_parts says."""
        return name.rpartition(".")[2] in (*self.layer.names, *(["time_state"] if self.state else []))


EVERYTHING = ""                                                       # a part that every name contains
ADAPTER = {"pissa": Method(PiSSALinear, ("time", "ln"), high_lr=1e-4),
           "lora": Method(LoRALinear, ("time", "ln")),
           "bone": Method(BoneLinear, ("time", "ln")),
           "state": Method(Adapter, (), state=True, low_lr=1e-3),
           "none": Method(Adapter, (EVERYTHING,), whole=True)}


def parts_of(cfg: Config) -> list[str]:
    """--train_parts, in which auto stands for what the method usually trains."""
    usual = ADAPTER[cfg.peft].parts
    return [p for part in cfg.train_parts for p in (usual if part == "auto" else (part,))]


def adapted(model: RWKV) -> dict[str, Linear]:
    """The matrices that get adapters and are quantised: every linear map of the blocks, most of a model's weights.

    Not emb, of which a step reads a few rows, not head, whose errors go straight into the logits, and not the built-in
    low-rank factors, which are small and decide how memory decays.
    """
    return {name: m for name, m in model.blocks.named_modules(prefix="blocks") if isinstance(m, Linear)}


def to_freeze(model: RWKV, cfg: Config) -> dict[str, Linear]:
    """The adapted matrices that are frozen: all of them, or none where everything is trained."""
    return {} if EVERYTHING in parts_of(cfg) else adapted(model)


def left_in_file(model: RWKV, cfg: Config) -> set[str]:
    """The modules whose weights stay in the file at first and are fetched when they are needed."""
    return {*to_freeze(model, cfg)} | ({"emb"} if cfg.emb_on_cpu else set())


def is_trained(name: str, cfg: Config) -> bool:
    """Whether a parameter is trained: those of --train_parts are, and the method's own."""
    return ADAPTER[cfg.peft].is_own(name) or any(part in name for part in parts_of(cfg))


def freeze(model: RWKV, cfg: Config) -> None:
    for name, p in model.named_parameters():
        p.requires_grad_(is_trained(name, cfg))


def with_time_state(arch: Arch, tensors: dict[str, Tensor], cfg: Config) -> tuple[Arch, dict[str, Tensor]]:
    """The model to be adapted and its tensors: the base's, and for state tuning zeros where it has no time_state."""
    if not ADAPTER[cfg.peft].state:
        return arch, tensors
    zeros = torch.zeros(arch.n_head, arch.head_size, arch.head_size)
    states = {f"blocks.{i}.att.time_state": zeros for i in range(arch.pre_ffn, arch.n_layer)}
    return replace(arch, time_state=True), states | tensors


def check_rank(name: str, shape: torch.Size, cfg: Config) -> None:
    fitting = ADAPTER[cfg.peft].layer.ranks(shape, cfg)
    if cfg.rank not in fitting:
        choice = f"from 1 to {fitting[-1]}" if isinstance(fitting, range) else f"of {', '.join(map(str, fitting))}"
        raise Fatal(f"--rank {cfg.rank}: {name} is {shape[0]} x {shape[1]}; use a rank {choice}")


def entry(tensors: dict[str, Tensor], name: str, shape: tuple[int, ...], path: str) -> Tensor:
    """One tensor of an adapter file, of this shape; else an error says what is wrong with it."""
    if name not in tensors:
        raise Fatal(f"{path}: missing {name}; is it for this model and this --peft?")
    if tensors[name].shape != shape:
        raise Fatal(f"{path}: {name} is {list(tensors[name].shape)}, expected {list(shape)}; is --rank the file's?")
    return tensors[name]


class Start(NamedTuple):
    """For a matrix (out,in): what is taken out of it, and where training starts, both by the parameters' names."""

    taken: dict[str, Tensor]
    trained: dict[str, Tensor]

    def named(self, name: str) -> dict[str, Tensor]:
        """As init_pissa.pth has them: init_lora_A and B; start_lora_A and B where training starts elsewhere."""
        elsewhere = not all(torch.equal(t, self.trained[x]) for x, t in self.taken.items())
        sets = {"init": self.taken} | ({"start": self.trained} if elsewhere else {})
        return {f"{name}.{when}_{x}": t.cpu() for when, tensors in sets.items() for x, t in tensors.items()}


def new_start(W: Tensor, dtype: torch.dtype, cfg: Config, draw: torch.Generator) -> Start:
    """A new start, rounded to the compute dtype. Training starts at what is taken out of W (out,in), unless PiSSA's
    start is fitted to a quantised residual (QPiSSA with T = qpissa_iters > 1, arXiv 2404.02948): with q(W) what
    quantising makes of W, and SVD_r(W) its first r singular triplets,

        B_1 A_1 = SVD_r(W),   B_t A_t = SVD_r(W - q(W - B_{t-1} A_{t-1}))

    Pair T-1 is taken out of W, which settles the codes; training starts at pair T, which corrects part of their error.
    """
    layer = ADAPTER[cfg.peft].layer

    def start(W: Tensor) -> dict[str, Tensor]:
        return {x: t.to(dtype).to(W) for x, t in layer.start(W, cfg, draw).items()}

    before = now = start(W)
    for _ in range(cfg.qpissa_iters - 1):
        before, now = now, start(W - QUANT[cfg.quant].through(layer.residual(W, now), dtype))
    return Start({x: before[x] for x in layer.taken}, now)


def saved_start(W: Tensor, name: str, cfg: Config, init: dict[str, Tensor]) -> Start:
    """The start of an earlier run, from its init_pissa.pth."""
    taken = start = {x: init[f"{name}.init_{x}"].to(W) for x in ADAPTER[cfg.peft].layer.taken}
    if any(f"{name}.start_{x}" in init for x in taken):
        start = {x: entry(init, f"{name}.start_{x}", t.shape, cfg.adapter_init).to(W) for x, t in taken.items()}
    return Start(taken, start)


def in_memory(model: RWKV, name: str) -> Tensor:
    """A matrix (out,in), fetched to the device in at least fp32."""
    weight = model.get_submodule(name).weight
    W = weight.to(model.head.weight.device)                           # as it is in the file: 16 bits are sent, not 32
    # (A copy, if it is still the file's memory: part of it will be kept.)
    return W.to(torch.promote_types(W.dtype, torch.float32), copy=W is weight)


def seeded(name: str, cfg: Config) -> torch.Generator:
    digest = hashlib.sha256(f"{cfg.random_seed} {name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))  # (it takes seeds below 2^63)


@torch.no_grad()
def starts(
    model: RWKV, names: list[str], cfg: Config, init: dict[str, Tensor], ranks: Ranks
) -> Iterator[tuple[str, Start]]:
    """The starts of the matrices, one by one. New ones are shared out: each rank decomposes one matrix in `ranks.size`
    and sends the result to the others. A matrix's random numbers depend on its name and the seed alone."""
    device, dtype, layer = model.head.weight.device, model.head.weight.dtype, ADAPTER[cfg.peft].layer
    for name in names:
        check_rank(name, model.get_submodule(name).weight.shape, cfg)
    if init:
        yield from ((name, saved_start(in_memory(model, name), name, cfg, init)) for name in names)
        return

    def room(name: str) -> Start:
        W = model.get_submodule(name).weight
        empty = {x: torch.empty(shape, dtype=torch.promote_types(W.dtype, torch.float32), device=device)
                 for x, shape in layer.shapes(W.shape, cfg).items()}
        return Start({x: empty[x].clone() for x in layer.taken}, empty)

    for at in range(0, len(names), ranks.size):
        group, mine = names[at: at + ranks.size], None
        if ranks.rank < len(group):
            name = group[ranks.rank]
            mine = new_start(in_memory(model, name), dtype, cfg, seeded(name, cfg))
        for owner, name in enumerate(group):
            start = mine if owner == ranks.rank else room(name)
            yield name, Start(*({x: ranks.copy_from(owner, t.contiguous()) for x, t in part.items()} for part in start))


def start_errors(name: str, W: Tensor, adapter: Adapter, start: Start, quant: str) -> Tensor:
    """(3) float64, squared Frobenius norms: of the start's difference from W, of what it would be if W itself were held
    like the frozen part, and of W."""
    frozen = adapter.frozen

    def lost(held: Tensor) -> Tensor:
        return in_slabs(W.shape[1], W.dtype, torch.sub, W, held)

    left = adapter.residual(lost(frozen.weight), start.trained).norm()
    plain = lost(QUANT[quant].through(W, frozen.dtype)).norm()
    if not (left + plain).isfinite():
        raise Fatal(f"--quant {quant}: {name} reaches {W.abs().max():.1e}, too much for it in {frozen.dtype};"
                    " use nf4 and --precision bf16")
    return torch.stack([left, plain, W.norm()]).double().square()


@torch.no_grad()
def add_adapter(model: RWKV, name: str, start: Start, cfg: Config, load: dict[str, Tensor]) -> Tensor | None:
    """Brings one matrix to the device, replaces it with its residual, held as cfg.quant says, and an adapter, and frees
    it. Returns `start_errors` of a quantised one.

    The start is rounded to the compute dtype *before* it is taken out of W, so that the parts still sum to W. Only the
    residual is quantised.
    """
    device, dtype, layer = model.head.weight.device, model.head.weight.dtype, ADAPTER[cfg.peft].layer
    W = in_memory(model, name)
    frozen = FrozenLinear(layer.residual(W, start.taken), dtype, cfg.quant)
    first = {x: load[f"{name}.{x}"] for x in layer.names} if load else start.trained
    adapter = layer(cfg, frozen, **{x: t.to(device, dtype, copy=True) for x, t in first.items()})
    model.set_submodule(name, adapter)
    model.blocks[int(name.split(".")[1])].draws = adapter.dropout > 0
    return start_errors(name, W, adapter, start, cfg.quant) if QUANT[cfg.quant].lossy else None


def add_adapters(
    model: RWKV, cfg: Config, init: dict[str, Tensor], load: dict[str, Tensor], ranks: Ranks = ONE_RANK
) -> dict[str, Tensor]:
    """Freezes the model, puts adapters on its matrices, one after another, and returns what init_pissa.pth holds.

    `init` and `load` are an earlier run's init_pissa.pth and rwkv-<N>.pth, or empty for a new start.
    """
    freeze(model, cfg)
    taken, unsplit, squares = {}, [], {}
    names = list(to_freeze(model, cfg))
    for name, start in progress(starts(model, names, cfg, init, ranks), f"{cfg.peft}: start", len(names)):
        errors = add_adapter(model, name, start, cfg, load)
        if errors is not None:
            layer_type = name.split(".", 2)[2]                                            # att.key, ffn.value, ...
            squares[layer_type] = squares.get(layer_type, 0) + errors.cpu()
        taken |= start.named(name)
        if not all(t.any() for t in start.taken.values()):
            unsplit.append(name)
    if unsplit:
        say(f"{len(unsplit)} matrices have no rank-{cfg.rank} part and start as LoRA does: {some(unsplit)}")
    shares = {layer_type: (s / s[2].clamp_min(1e-30)).sqrt().tolist() for layer_type, s in squares.items()}
    if shares:
        say(f"{cfg.peft}, quant {cfg.quant}: error of the start, |W - W'| / |W| by type, in brackets if W itself were"
            " quantised: " + ", ".join(f"{t} {e:.2g} ({plain:.2g})" for t, (e, plain, _) in shares.items()))
    return taken


# ======================================================================================================================
# 6. Data. A corpus is one long stream of tokens and the places where its documents begin; a training row is a span of
#    that stream. Readers make the stream, samplers choose spans, masks say which tokens of a span are learnt.
#
#        tokens   5 6 7 8 0 | 5 6 0 | 9 7 0        3 documents (0 ends each), starts = 0 5 8 11
#        ctx_len 3, pad     5 6 7 8 | 8 0 | 5 6 0 | 9 7 0     a row of n tokens predicts n-1; windows share one token
#        ctx_len 3, get     e.g. 7 8 0 5 | 6 0 9 7            any 4 consecutive tokens
#        mask qa            all of them: a document in which a mask finds nothing is learnt whole
# ======================================================================================================================


class ByteTokenizer:
    """Token = byte; 0, which no text contains, ends a document."""

    tokens_are = "bytes"

    def __init__(self, vocab_size: int = 256):
        self.vocab_size = vocab_size

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def token_bytes(self, token: int) -> bytes:
        return bytes([token]) if token < 256 else b""

    def decode(self, tokens: Iterable[int]) -> str:
        return b"".join(map(self.token_bytes, tokens)).decode(errors="replace")


class WorldTokenizer(ByteTokenizer):
    """RWKV's World vocabulary: the longest token that fits, from left to right, over bytes. `lengths` maps a token's
    first 3 bytes to the lengths worth trying, longest first."""

    tokens_are = "tokens of the World vocabulary"

    def __init__(self, path: str | Path, vocab_size: int = 65536):
        self.vocab_size, self.ids, self.bytes, self.lengths = vocab_size, {}, {0: b"\0"}, {}
        refuse_device(path, "--vocab_file")
        try:
            lines = Path(path).read_text("utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as e:
            raise Fatal(f"--vocab_file {path}: cannot be read ({first_line(e)})") from None
        for number, line in enumerate(lines, 1):
            try:                                   # a line is: id, a Python literal (str or bytes), its length in bytes
                token, rest = line.split(" ", 1)
                literal, length = rest.rsplit(" ", 1)
                value = ast.literal_eval(literal)
                value = value.encode() if isinstance(value, str) else value
                if len(value) != int(length) or not 0 < int(token) < 2**31:
                    raise ValueError
                self.ids[value], self.bytes[int(token)] = int(token), value
            except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
                raise Fatal(f"--vocab_file {path}: line {number} is not a World token: {line[:60]!r}") from None
        for value in self.ids:
            self.lengths.setdefault(value[:3], {1, 2}).add(len(value))
        self.lengths = {start: sorted(lengths, reverse=True) for start, lengths in self.lengths.items()}
        if missing := [b for b in range(256) if bytes([b]) not in self.ids]:
            raise Fatal(f"--vocab_file {path}: missing {len(missing)} of the 256 single bytes; is it the whole file?")

    def encode(self, text: str) -> list[int]:
        data, at, out = text.encode(), 0, []
        while at < len(data):
            for length in self.lengths.get(data[at: at + 3], (2, 1)):
                if (piece := data[at: at + length]) in self.ids:      # (every single byte is a token)
                    break
            out.append(self.ids[piece])
            at += len(piece)
        return out

    def token_bytes(self, token: int) -> bytes:
        return self.bytes.get(token, b"")


def world_vocabulary() -> Path:
    """The vocabulary file of the `rwkv` package, found without importing it."""
    spec = importlib.util.find_spec("rwkv")
    if spec is None or not spec.submodule_search_locations:
        raise Fatal("--tokenizer world: the World vocabulary is in the package `rwkv`, which is not installed:"
                    " `pip install rwkv`, or name the file with --vocab_file")
    return Path(spec.submodule_search_locations[0]) / "rwkv_vocab_v20230424.txt"


TOKENIZER: dict[str, Callable[[Config, int], ByteTokenizer]] = {
    "byte": lambda cfg, vocab_size: ByteTokenizer(vocab_size),
    "world": lambda cfg, vocab_size: WorldTokenizer(cfg.vocab_file or world_vocabulary(), vocab_size),
}


def load_tokenizer(cfg: Config, vocab_size: int) -> ByteTokenizer:
    """What --tokenizer names, or else the one that vocabularies of this size are made for."""
    usual = "world" if vocab_size == 65536 else "byte" if vocab_size <= 512 else ""
    if not (name := cfg.tokenizer or usual):
        raise Fatal(f"--tokenizer is missing: a vocabulary of {vocab_size} tokens may be anyone's, and text cut up by"
                    f" another tokenizer is noise to the model; give {' or '.join(TOKENIZER)}, or text that is tokens"
                    f" already (--data_type {', '.join(OF_TOKENS)})")
    return pick(TOKENIZER, "--tokenizer", name)(cfg, vocab_size)


@dataclass
class Corpus:
    """tokens (n), of any integer dtype, maybe a memory map; starts (documents + 1): document i begins at starts[i]."""

    tokens: np.ndarray
    starts: np.ndarray

    def part(self, first: int, last: int) -> Corpus:
        """Documents first:last as a corpus of their own."""
        a, b = self.starts[first], self.starts[last]
        return Corpus(self.tokens[a:b], self.starts[first: last + 1] - a)

    @cached_property
    def fingerprint(self) -> str:
        """Identifies it by its contents, whatever file they came from: all tokens, or every k-th of many millions."""
        digest = hashlib.sha256()
        for x in (self.tokens, self.starts):
            digest.update(b"%d" % len(x) + x[:: 1 + len(x) // 2**22].astype("<i8").tobytes())
        return digest.hexdigest()[:16]


def from_texts(texts: Iterable[tuple[str, str]], tokenizer: ByteTokenizer, path: str) -> Corpus:
    """Each text, given with the place it is from, becomes a document: its tokens and the 0 that ends it."""
    documents = []
    for where, text in progress(texts, "tokenising"):
        if not is_text(text):
            raise Fatal(f"{where} has an incomplete character: {text[:50]!r}")
        if "\0" in text:
            raise Fatal(f"{where} has the character 0, which ends a document: {text[:50]!r}")
        documents.append(np.array([*tokenizer.encode(text), 0], np.uint32))
    if not documents:
        raise Fatal(f"{path}: holds no text")
    return Corpus(np.concatenate(documents), np.cumsum([0, *map(len, documents)]))


SUFFIXES = {"utf-8": (".txt", ".md"), "jsonl": (".jsonl", ".json"), "wds_img": (".tar",)}  # of what may be many files
LOGS = ("train_log.txt", "loss_data.jsonl")                           # of a run whose --proj_dir is there: no data


def in_folder(path: str, kind: str) -> list[str]:
    """A folder's files of a type, in the order of their names."""
    found = [file for file in Path(path).iterdir() if file.suffix.lower() in SUFFIXES[kind] and file.name not in LOGS]
    return sorted(str(file) for file in found if file.name[0] != "." and not file.is_dir())


def nothing_in(path: str, *kinds: str) -> NoReturn:
    suffixes = [suffix for kind in kinds for suffix in SUFFIXES[kind]]
    raise Fatal(f"{path}: no {' or '.join(suffixes)} there; files in folders inside it take a pattern:"
                f" '{Path(path) / '**' / '*'}{suffixes[0]}'")


def files_of(path: str, kind: str) -> Iterator[str]:
    """The files that a name stands for: one, a folder's, or those of a pattern: x-{000..012}.tar, x-*.tar."""
    if Path(path).is_dir():
        yield from in_folder(path, kind) or nothing_in(path, kind)
    elif Path(path).exists():
        yield path
    elif span := re.search(r"\{(\d+)\.\.(\d+)\}", path):
        for i in range(int(span[1]), int(span[2]) + 1):
            yield from files_of(f"{path[:span.start()]}{i:0{len(span[1])}}{path[span.end():]}", kind)
    else:
        yield from sorted(file for file in glob.glob(path, recursive=True) if Path(file).name not in LOGS) or [path]


def read_text(path: str, encoding: str = "utf-8") -> str:
    """A text file. (Some editors begin one with a byte-order mark, which is dropped.)"""
    refuse_device(path, "data")
    try:
        text = Path(path).read_text(encoding)
    except UnicodeDecodeError as e:
        raise Fatal(f"{path}: not {encoding.upper()} text (byte {e.start}: {e.reason}); if it is in another encoding,"
                    " `iconv -f ENCODING -t UTF-8` converts it") from None
    if "\0" in text:
        raise Fatal(f"{path}: holds the character 0, which no text does; if it is UTF-16, save it as UTF-8")
    if text.startswith("\ufffe"):                                     # the mark with its two bytes swapped
        raise Fatal(f"{path}: UTF-16 in big-endian order; --data_type utf-16le is little-endian")
    return text.removeprefix("\ufeff")


def read_rows(path: str) -> Iterator[tuple[str, Any]]:
    """Every line of JSON-lines files, or every item of JSON lists: where it is, and its value."""
    return itertools.chain.from_iterable(map(rows_in, files_of(path, "jsonl")))


def rows_in(path: str) -> Iterator[tuple[str, Any]]:
    """The same of one file."""
    text = read_text(path)
    if text.lstrip().startswith("["):
        try:
            items = json.loads(text)
        except (ValueError, RecursionError) as e:
            if not str(e).startswith("Extra data"):                   # (then there may be a list on each line)
                raise Fatal(f"{path}: begins like a JSON list but is not one: {first_line(e)}; fix it there, or write"
                            " one item per line") from None
        else:
            yield from ((f"{path}: item {number}", item) for number, item in enumerate(items, 1))
            return
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}: line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as e:
            raise Fatal(f"{where} is not valid JSON ({first_line(e)}): {line[:60]}") from None
        yield where, row


JSON_TYPE = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}


def found(x: Any) -> str:
    """What a row is, and the types of its fields that are not strings."""
    def kind(y: Any) -> str:
        return JSON_TYPE.get(type(y), "a number")

    if not isinstance(x, dict):
        return f"it is {kind(x)}"
    return f"its fields are {', '.join(name if isinstance(y, str) else f'{name} ({kind(y)})' for name, y in x.items())}"


def field_of(row: Any, name: str, kind: type, where: str) -> Any:
    """What a row has in a field, which must be a string or a list, as `kind` says."""
    if not isinstance(row, dict) or not isinstance(row.get(name), kind):
        raise Fatal(f"{where} has no {name!r} that is {JSON_TYPE[kind]}; {found(row)}; --data_type sft reads those that"
                    " --sft_fields names: question and answer, or one that is a list of messages")
    return row[name]


BLANK_LINES = r"(?<!\s)\s*\n\s*\n"                                   # with the end of the line before


def turn(text: str) -> str:
    """What a speaker says, without blank lines: a blank line ends a turn, and many programs stop there."""
    return re.sub(BLANK_LINES, "\n", text.replace("\r\n", "\n").strip())


def conversation(turns: Iterable[tuple[str, str]]) -> str:
    """Who says what, in the form that conversations have in the World models' training data."""
    return "\n\n".join(f"{who}: {turn(text)}" for who, text in turns)


def chat(question: str, answer: str) -> str:
    return conversation([("User", question), ("Assistant", answer)])


SPEAKER = {"system": "System", "user": "User", "human": "User", "assistant": "Assistant", "gpt": "Assistant"}
TURNS_BEGIN = tuple(f"{who}:".encode() for who in dict.fromkeys(SPEAKER.values()))        # System: User: Assistant:


def message(m: Any, where: str) -> tuple[str, str]:
    """Who says what in a message, {"role": "user", "content": "Hi"} or {"from": "human", "value": "Hi"}."""
    for role, content in (("role", "content"), ("from", "value")):
        who, text = (m.get(role), m.get(content)) if isinstance(m, dict) else (None, None)
        if isinstance(who, str) and isinstance(text, str):
            return pick(SPEAKER, f"{where} is by", who.lower()), text
    raise Fatal(f'{where} is not like {{"role": "user", "content": "Hi"}} or {{"from": "human", "value": "Hi"}};'
                f" {found(m)}")


def turns_of(row: Any, fields: Sequence[str], where: str) -> list[tuple[str, str]]:
    """Who says what in a row: one field is a list of messages; of several, the last is the answer, and those before it
    are lines of the question."""
    *asked, last = fields
    if not asked:
        said = [message(m, f"{where}: message {i}") for i, m in enumerate(field_of(row, last, list, where), 1)]
        return [(who, text) for who, text in said if text.strip()]
    question = [field_of(row, name, str, where).strip() for name in asked]
    return [("User", "\n".join(filter(None, question))), ("Assistant", field_of(row, last, str, where))]


def read_jsonl(path: str, tokenizer: ByteTokenizer, cfg: Config) -> Corpus:
    return from_texts(((where, field_of(row, "text", str, where)) for where, row in read_rows(path)), tokenizer, path)


def read_sft(path: str, tokenizer: ByteTokenizer, cfg: Config) -> Corpus:
    if not cfg.sft_fields:
        raise Fatal("--sft_fields is empty; name a question and an answer, or one field that holds a conversation")
    every = [(where, turns_of(row, cfg.sft_fields, where)) for where, row in read_rows(path)]
    rows = [(where, turns) for where, turns in every if any(who == "Assistant" and text.strip() for who, text in turns)]
    if len(rows) < len(every):
        say(f"{path}: of {len(every):,} rows {len(every) - len(rows):,} have no answer; they are left out")
    if changed := sum(any(re.search(BLANK_LINES, text.strip()) for _, text in turns) for _, turns in rows):
        say(f"{path}: of {len(rows):,} rows {changed:,} have blank lines in a question or an answer; these are"
            " removed, since a blank line ends a turn")
    return from_texts(((where, conversation(turns)) for where, turns in rows), tokenizer, path)


def read_plain(path: str, tokenizer: ByteTokenizer, cfg: Config, encoding: str = "utf-8") -> Corpus:
    texts = ((file, read_text(file, encoding)) for file in files_of(path, "utf-8"))
    return from_texts(((file, text) for file, text in texts if text), tokenizer, path)


# ---------------------------------------------------------------- generated tasks: nothing to download, exact answers

NAMES, PLACES = "Ann Bob Eve Kim Lee Max".split(), "attic barn cellar garden hall kitchen".split()
THINGS, COLOURS = "ball book coat cup hat lamp".split(), "black blue green red white".split()
DUMMY = {"base": 0, "shift": 1}                                       # the same skills, asked for in two wordings


def task(family: str, draw: random.Random) -> tuple[str, str]:
    """One question and its answer: a sum, a spelling, or something about a sentence."""
    a, b = draw.randrange(10), draw.randrange(10)
    word = "".join(draw.choice("bdfklmnprst" if i % 2 == 0 else "aeiou") for i in range(4))
    name, place, thing, colour = map(draw.choice, (NAMES, PLACES, THINGS, COLOURS))
    asked, named, fact = draw.choice([
        ("Who has it?", "person", name), ("Where is it?", "place", place), ("What is it?", "thing", thing),
        ("Which colour?", "colour", colour)])
    wordings = draw.choice([
        ((f"{a}+{b}?", f"{a + b}"), (f"Add {a} to {b}.", f"{a + b}.")),
        ((f"Spell {word}.", " ".join(word)), (f"Letters of {word}?", "-".join(word) + ".")),
        *[((f"{name} has a {colour} {thing} in the {place}. {asked}", fact),
           (f"In the {place} a {colour} {thing} belongs to {name}. Name the {named}.", f"{fact}."))] * 3,
    ])
    return wordings[DUMMY[family]]


def dummy_tasks(family: str, count: int, seed: int) -> list[tuple[str, str]]:
    """`count` tasks, no two alike: so a held-out part was never seen."""
    draw, seen = random.Random(f"{family} {seed}"), {}
    while len(seen) < count:
        seen.setdefault(*task(family, draw))
    return [*seen.items()]


def read_dummy(path: str, tokenizer: ByteTokenizer, cfg: Config) -> Corpus:
    family = path or "base"
    pick(DUMMY, "--data_file", family)
    tasks = dummy_tasks(family, 4096, cfg.random_seed)
    return from_texts(((family, chat(*task)) for task in tasks), tokenizer, path)


IDX_MAGIC, IDX_DTYPE = b"MMIDIDX\0\0", {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}


def read_binidx(path: str, tokenizer: ByteTokenizer, cfg: Config) -> Corpus:
    """Megatron's indexed dataset.  .idx: magic, u64 version 1, u8 dtype code, u64 N, u64 D, N i32 lengths in tokens,
    N i64 byte offsets, D i64 document bounds.  .bin: the tokens."""
    prefix = path.removesuffix(".idx").removesuffix(".bin")
    idx, bin = Path(prefix + ".idx"), Path(prefix + ".bin")
    for file in (idx, bin):
        if not file.is_file():
            raise Fatal(f"{flag_of(cfg, path)} {path}: no such file {file}; binidx is a pair, .bin and .idx (a file of"
                        " raw 16-bit tokens is --data_type uint16)")
    data = idx.read_bytes()
    if data[:9] != IDX_MAGIC or len(data) < 34:
        raise Fatal(f"{idx}: not the index of a binidx corpus (it begins with {data[:9]!r}); --make_binidx writes one")
    version, code, N, D = struct.unpack_from("<QBQQ", data, 9)
    if version != 1 or code not in IDX_DTYPE:
        raise Fatal(f"{idx}: version {version}, token type {code}; supported are version 1, types {list(IDX_DTYPE)}")
    if len(data) != 34 + 12 * N + 8 * D:
        raise Fatal(f"{idx}: {len(data)} bytes, but {N} items and {D} bounds take {34 + 12 * N + 8 * D}: damaged")
    itemsize = np.dtype(IDX_DTYPE[code]).itemsize
    sizes, offsets = np.frombuffer(data, "<i4", N, 34), np.frombuffer(data, "<i8", N, 34 + 4 * N)
    starts = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
    if starts[-1] == 0 or (sizes < 0).any() or not np.array_equal(offsets, starts[:-1] * itemsize):
        raise Fatal(f"{idx}: {'empty' if starts[-1] == 0 else 'lengths and offsets contradict each other: damaged'}")
    if bin.stat().st_size != starts[-1] * itemsize:
        raise Fatal(f"{bin}: {bin.stat().st_size} bytes, but {idx.name} describes {starts[-1]} tokens of {itemsize};"
                    " the two do not belong together, or the file is truncated")
    tokens = np.memmap(bin, IDX_DTYPE[code], "r")
    endless = int((tokens[starts[1:][sizes > 0] - 1] != 0).sum())
    if endless > N / 2:
        say(f"{bin}: {endless:,} of its {N:,} documents do not end with token 0, by which a model learns to end;"
            " json2binidx writes it with --append-eod")
    return Corpus(tokens, starts)


# ---------------------------------------------------------------------------------- streams of tokens, without an index


def pieces(tokens: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """A long stream piece by piece: where each begins, and its tokens."""
    return ((at, tokens[at: at + (1 << 24)]) for at in range(0, len(tokens), 1 << 24))


def from_stream(tokens: np.ndarray) -> Corpus:
    """Every token 0 ends a document; what follows the last is one more, without its 0."""
    ends = [at + 1 + np.flatnonzero(piece == 0) for at, piece in pieces(tokens)]
    return Corpus(tokens, np.unique(np.concatenate([[0], *ends, [len(tokens)]])))


def read_numpy(path: str, tokenizer: ByteTokenizer, cfg: Config) -> Corpus:
    """A one-dimensional .npy of integers, memory-mapped. Nothing pickled is loaded."""
    try:
        tokens = np.lib.format.open_memmap(path, mode="r")
    except OSError:
        raise
    except Exception as e:             # a damaged header raises ValueError, EOFError, TokenError and others
        raise Fatal(f"{path}: not a .npy of tokens, or damaged ({first_line(e)})") from None
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu" or not len(tokens):
        raise Fatal(f"{path}: an array {list(tokens.shape)} of {tokens.dtype}; expected integers in one dimension")
    return from_stream(tokens)


def read_uint16(path: str, tokenizer: ByteTokenizer, cfg: Config) -> Corpus:
    """Nothing but tokens of two bytes, the low one first."""
    if (size := Path(path).stat().st_size) % 2 or not size:
        raise Fatal(f"{path}: {size} bytes; expected tokens of two bytes each")
    return from_stream(np.memmap(path, "<u2", "r"))


# ------------------------------------------------------------------------------------------ images: pixels are tokens

IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif")


def images(shard: str) -> Iterator[tuple[str, bytes]]:
    """Name and contents of every image in a tar. Nothing is written to disk."""
    refuse_device(shard, "data")
    try:
        with tarfile.open(shard) as tar:
            for member in tar:
                if member.isfile() and Path(member.name).suffix.lower() in IMAGES:
                    yield member.name, tar.extractfile(member).read()
    except Exception as e:             # tarfile and the decompressors below it raise many kinds of error
        raise Fatal(f"{shard}: cannot be read as a tar ({first_line(e)})") from None


def pixels(image: bytes, side: int) -> np.ndarray:
    """An image as tokens (side * side), row after row: cut to a square, scaled by averaging, in grey levels from 1 to
    255. (Level 0 becomes 1, since token 0 ends a document.)"""
    from PIL import Image, ImageOps

    with Image.open(io.BytesIO(image)) as opened:
        if opened.mode.startswith(("I", "F")):
            raise ValueError("more than 8 bits a pixel; save it with 8")
        grey = ImageOps.fit(opened.convert("L"), (side, side), Image.Resampling.BOX)
    return np.maximum(np.asarray(grey).reshape(-1), 1)


def read_wds_img(path: str, tokenizer: ByteTokenizer, cfg: Config) -> Corpus:
    """WebDataset's tar shards: every image is a document, and the captions beside them are not read."""
    if importlib.util.find_spec("PIL") is None:
        raise Fatal("--data_type wds_img: images are read by Pillow, which is not installed: `pip install Pillow`")
    documents = []
    for shard in progress(files_of(path, "wds_img"), "reading images"):
        for name, image in images(shard):
            try:
                documents += [pixels(image, cfg.img_side), np.zeros(1, np.uint8)]
            except Exception as e:     # on nonsense Pillow raises OSError, SyntaxError, struct.error and others
                raise Fatal(f"{shard}: {name} is not an image, or damaged ({first_line(e)})") from None
    if not documents:
        raise Fatal(f"{path}: holds no image ({', '.join(IMAGES)})")
    return Corpus(np.concatenate(documents), np.arange(len(documents) // 2 + 1) * (cfg.img_side**2 + 1))


CORPUS: dict[str, Callable[[str, ByteTokenizer, Config], Corpus]] = {
    "binidx": read_binidx, "jsonl": read_jsonl, "sft": read_sft, "utf-8": read_plain,
    "utf-16le": partial(read_plain, encoding="utf-16le"), "numpy": read_numpy, "uint16": read_uint16,
    "wds_img": read_wds_img, "dummy": read_dummy,
}
OF_TOKENS = ("binidx", "numpy", "uint16")                             # somebody else's tokenizer made these
BY_SUFFIX = {suffix: kind for kind, suffixes in SUFFIXES.items() for suffix in suffixes}
BY_SUFFIX |= {".bin": "binidx", ".idx": "binidx", ".npy": "numpy"}
TABLES = {".csv": "read_csv", ".tsv": "read_table", ".parquet": "read_parquet", ".xlsx": "read_excel"}  # of pandas


def flag_of(cfg: Config, path: str) -> str:
    """The option that names a corpus."""
    return next((f"--{name}" for name in ("val_file", "make_binidx") if path and getattr(cfg, name) == path),
                "--data_file")


def data_type_of(cfg: Config, path: str) -> str:
    """--data_type, or what the file's name says. (A .bin alone may be half of a binidx: it is not taken for uint16.)"""
    if cfg.data_type or not path:
        return cfg.data_type or "dummy"
    suffix = Path(path).suffix.lower()
    if suffix in BY_SUFFIX:
        return BY_SUFFIX[suffix]
    if Path(path + ".idx").exists():
        return "binidx"
    held = [kind for kind in ("wds_img", "jsonl", "utf-8") if Path(path).is_dir() and in_folder(path, kind)]
    if len(held) == 1 or "wds_img" in held:                           # (others beside tars describe them)
        return held[0]
    flag = flag_of(cfg, path)
    if read := TABLES.get(suffix):
        raise Fatal(f"{flag} {path}: a table, which pandas turns into JSON lines: pandas.{read}({path!r})"
                    ".to_json('data.jsonl', orient='records', lines=True); --data_type sft reads these, and"
                    " --sft_fields names the columns")
    if Path(path).is_dir() and not held:
        nothing_in(path, *SUFFIXES)
    why = f"it holds {' and '.join(held)}" if held else "its name does not tell what it is"
    raise Fatal(f"{flag} {path}: {why}; set --data_type ({', '.join(CORPUS)})")


def needs_tokenizer(cfg: Config) -> bool:
    """Not if the data are tokens that are all learnt: then nothing is text, and any tokenizer will do."""
    kinds = {data_type_of(cfg, path) for path in (cfg.data_file, cfg.val_file or cfg.data_file)}
    masked = cfg.loss_mask and MASK.get(cfg.loss_mask) is not learn_all
    return bool(masked or cfg.sample_prompt or cfg.tokenizer or cfg.vocab_file or kinds - set(OF_TOKENS))


def read_any(cfg: Config, path: str, tokenizer: ByteTokenizer) -> Corpus:
    refuse_device(path, flag_of(cfg, path))
    return pick(CORPUS, "--data_type", data_type_of(cfg, path))(path, tokenizer, cfg)


def read_corpus(cfg: Config, path: str, tokenizer: ByteTokenizer) -> Corpus:
    """The corpus of a file, with every token checked against the vocabulary."""
    corpus = read_any(cfg, path, tokenizer)
    for at, piece in pieces(corpus.tokens):
        bad = np.flatnonzero((piece < 0) | (piece >= tokenizer.vocab_size))
        if len(bad):
            raise Fatal(f"{flag_of(cfg, path)} {path}: token {piece[bad[0]]} at position {at + bad[0]} is outside the"
                        f" vocabulary of {tokenizer.vocab_size}; was it made with another tokenizer?")
    return corpus


def vocabulary_of_data(cfg: Config) -> int:
    """The size of a new model's vocabulary if the data are tokens and nothing names their tokenizer: the first power of
    two above the largest, at least 256. Otherwise --vocab_size, maybe 0."""
    if cfg.vocab_size or cfg.tokenizer or data_type_of(cfg, cfg.data_file) not in OF_TOKENS:
        return cfg.vocab_size
    corpora = [read_any(cfg, path, ByteTokenizer()) for path in (cfg.data_file, cfg.val_file) if path]
    largest = max(int(piece.max()) for corpus in corpora for _, piece in pieces(corpus.tokens))
    vocab_size = min(max(256, 1 << largest.bit_length()), 1 << 20)    # (anything beyond is an error, not a token)
    say(f"vocabulary: {vocab_size}, since the largest token of the data is {largest}; --vocab_size or --tokenizer"
        " overrides this")
    return vocab_size


def split(corpus: Corpus, share: float) -> tuple[Corpus, Corpus]:
    """The corpus without its last documents, and these: `share` of the tokens. One long document is cut in two."""
    at = int(len(corpus.tokens) * (1 - share))
    if len(corpus.starts) == 2:
        corpus = Corpus(corpus.tokens, np.array([0, at, len(corpus.tokens)]))
    last = len(corpus.starts) - 1
    first = int(np.clip(np.searchsorted(corpus.starts, at), 1, last - 1))
    return corpus.part(0, first), corpus.part(first, last)


Rows = tuple[int, Callable[[int], tuple[int, int]]]                   # rows of a pass; the number of a row -> its span


def documents(corpus: Corpus, cfg: Config, learnable: Callable[[int, int], bool]) -> Rows:
    """Every document once per pass, long ones cut into several rows; only rows that teach nothing are left out."""
    def rows() -> Iterator[tuple[int, int]]:
        pairs = itertools.pairwise(map(int, corpus.starts))
        for start, stop in progress(pairs, "what is learnt", len(corpus.starts) - 1):
            for at in range(start, stop - 1, cfg.ctx_len):            # (the last token of a document predicts nothing)
                row = at, min(at + cfg.ctx_len + 1, stop)
                if learnable(*row):
                    yield row

    spans = np.fromiter(itertools.chain.from_iterable(rows()), np.int64).reshape(-1, 2)   # (rows,2)
    if not len(spans):
        left = f" of those that --val_split {cfg.val_split:g} leaves or takes" if cfg.val_split else ""
        raise Fatal(f"{flag_of(cfg, cfg.data_file)} {cfg.data_file}: no document{left} has two tokens, so there is"
                    " nothing to predict")

    @lru_cache(maxsize=2)
    def order(nth: int) -> np.ndarray:
        """Of the nth pass."""
        return np.random.default_rng([cfg.random_seed, nth]).permutation(len(spans))

    def span(row: int) -> tuple[int, int]:
        nth, i = divmod(row, len(spans))
        start, stop = spans[order(nth)[i] if cfg.data_shuffle else i].tolist()
        return start, stop

    return len(spans), span


def windows(corpus: Corpus, cfg: Config, learnable: Callable[[int, int], bool]) -> Rows:
    """Windows of ctx_len + 1 tokens at random places in the stream, across documents."""
    last = len(corpus.tokens) - cfg.ctx_len - 1
    if last < 0:
        raise Fatal(f"--data_file {cfg.data_file}: {len(corpus.tokens)} tokens are fewer than --ctx_len {cfg.ctx_len}"
                    " plus one; shorten it, or use --dataload pad")

    def span(row: int) -> tuple[int, int]:
        start = int(np.random.default_rng([cfg.random_seed, row]).integers(last + 1))
        return start, start + cfg.ctx_len + 1

    return max(1, len(corpus.tokens) // cfg.ctx_len), span


# (`only` is `pad` in batches of one row: see Loader.bsz.)
SAMPLER: dict[str, Callable[..., Rows]] = {"pad": documents, "only": documents, "get": windows}


def learn_all(text: bytes, cfg: Config) -> list[tuple[int, int]]:
    return [(0, len(text))]


def learn_assistant(text: bytes, cfg: Config) -> list[tuple[int, int]]:
    """What an assistant writes, and what ends it: from after `Assistant:` through a 0, or else the role that begins the
    next turn. A turn begins after a blank line or a 0; in a document where no `Assistant:` follows a blank line,
    any line may begin one."""
    blank = rb"\n[ \t\r]*\n"
    after = rb"(?:(?:\A|\0)\s*|" + blank + rb")" if re.search(blank + rb"Assistant:", text) else rb"(?:^|\0)"
    spans = between(re.compile(after + b"(" + b"|".join(TURNS_BEGIN) + b")", re.M), b"Assistant:", text, through=True)
    zeros = (text.find(b"\0", start, end) for start, end in spans)
    return [(start, zero + 1 or end) for (start, end), zero in zip(spans, zeros, strict=True)]


def learn_between(text: bytes, cfg: Config) -> list[tuple[int, int]]:
    """From after each `mask1` string of --mask_id up to the next `mask0` string."""
    on, off = mask_strings(cfg)
    either = b"|".join(map(re.escape, sorted((on, off), key=len, reverse=True)))  # (one may begin with the other)
    return between(re.compile(b"(" + either + b")"), on, text)


def between(mark: re.Pattern, on: bytes, text: bytes, through: bool = False) -> list[tuple[int, int]]:
    """From after each mark that is `on` to where the next one begins, or `through` that, or the text ends. (A mark: the
    pattern's group.)"""
    marks = [*mark.finditer(text)]
    ends = [*(m.end(1) if through else m.start(1) for m in marks), len(text)][1:]
    return [(m.end(1), end) for m, end in zip(marks, ends, strict=True) if m[1] == on]


def mask_strings(cfg: Config) -> tuple[bytes, bytes]:
    ids = read_json("mask_id", cfg.mask_id)
    if ids.keys() != {"mask0", "mask1"} or not all(is_text(s) and s for s in ids.values()):
        raise Fatal('--loss_mask se needs --mask_id \'{"mask0": "stop learning here", "mask1": "learn after this"}\';'
                    f" given: {cfg.mask_id or 'nothing'}")
    return ids["mask1"].encode(), ids["mask0"].encode()


MASK: dict[str, Callable[[bytes, Config], list[tuple[int, int]]]] = {  # a document's bytes -> the spans that are learnt
    "pad": learn_all, "none": learn_all, "qa": learn_assistant, "se": learn_between,
}
IGNORED = -100                                                        # marks a target to be ignored, as in torch


def eighths(n: int, whole: int) -> int:
    """n, rounded up to eighths of `whole`."""
    eighth = -(-whole // 8)
    return min(-(-n // eighth) * eighth, whole)


class Batch(NamedTuple):
    """One micro-batch. `learnt` lists the positions, out of B T, whose next token is learnt."""

    inputs: Tensor                                                    # (B,T)
    learnt: Tensor                                                    # (M)
    targets: Tensor                                                   # (M) the tokens that follow those positions

    def to(self, device: str) -> Batch:
        """Non-blocking: a blocking copy would wait for all the work that a GPU still has."""
        return Batch(*(x.to(device, non_blocking=True) for x in self))

    def filled(self, ctx_len: int) -> Batch:
        """The same batch to a model, padded to one of a few shapes: rows with zeros, `learnt` with positions that are
        ignored, both up to the next eighth of the most there can be."""
        (B, T), M = self.inputs.shape, len(self.learnt)
        longer = eighths(T, ctx_len)
        learnt = self.learnt // T * longer + self.learnt % T
        fill = (0, eighths(M, B * longer) - M)
        return Batch(F.pad(self.inputs, (0, longer - T)), F.pad(learnt, fill), F.pad(self.targets, fill, value=IGNORED))

    def chunks(self, size: int) -> Iterator[Batch]:
        """The batch cut after every `size` tokens of its rows; the last piece may be shorter."""
        T = self.inputs.shape[1]
        if size >= T:
            yield self
            return
        row, at = self.learnt // T, self.learnt % T                   # (M) both
        for start in range(0, T, size):
            inputs, inside = self.inputs[:, start: start + size], (start <= at) & (at < start + size)
            learnt = row * inputs.shape[1] + at - start
            yield Batch(inputs, learnt[inside], self.targets[inside])


class Loader:
    """Batches of a corpus. The n-th row is a function of n and the seed: a position is all that resuming needs.

    A step's rows are sorted by length before they are cut into its micro-batches, `together` of them: so less of each
    is padding, and the step adds up to the same. (0: the rows of a pass.)
    """

    def __init__(self, corpus: Corpus, tokenizer: ByteTokenizer, cfg: Config, together: int = 1):
        self.corpus, self.tokenizer, self.cfg = corpus, tokenizer, cfg
        one_text = len(corpus.starts) == 2 and len(corpus.tokens) > cfg.ctx_len + 1
        answers = data_type_of(cfg, cfg.data_file) in ("sft", "dummy")
        self.sampler = cfg.dataload or ("get" if one_text else "pad")
        self.mask = pick(MASK, "--loss_mask", cfg.loss_mask or ("qa" if answers else "pad"))
        self.learnt_whole: set[int] = set()                           # documents in which the mask finds nothing
        self.barren = 0                                               # rows that are left out, as they teach nothing
        self.learnt_of = lru_cache(maxsize=256)(self.learnt_of)
        self.batch = lru_cache(maxsize=2 * cfg.accumulate_grad_batches)(self.batch)       # of a step and the next
        self.pass_rows, self.span = pick(SAMPLER, "--dataload", self.sampler)(corpus, cfg, self.learnable)
        self.bsz = 1 if self.sampler == "only" else cfg.micro_bsz
        self.together = together or len(self.one_pass)
        self.longest_first = lru_cache(maxsize=2)(self.longest_first)

    @property
    def one_pass(self) -> range:
        """The micro-batches that have every row once."""
        return range(-(-self.pass_rows // self.bsz))

    def learnt_of(self, document: int) -> np.ndarray:
        """Which tokens of a document are learnt: those with a byte in a span of the mask; all, if there are none."""
        tokens = self.corpus.part(document, document + 1).tokens.tolist()
        said = [*map(self.tokenizer.token_bytes, tokens)]
        length = np.array([*map(len, said)])
        ends, learnt = np.cumsum(length), np.zeros(len(tokens), bool)
        begins = ends - length
        for start, stop in self.mask(b"".join(said), self.cfg):
            learnt |= (begins < stop) & (ends > start)
        if not learnt[1:].any():
            if len(tokens) > 1:
                self.learnt_whole.add(document)
            learnt[:] = True
        return learnt

    def learnt(self, start: int, stop: int) -> np.ndarray:
        """Which tokens of a span are learnt. Documents are looked at whole, wherever the span cuts them."""
        if self.mask is learn_all:
            return np.ones(stop - start, bool)
        starts = self.corpus.starts
        first, last = np.searchsorted(starts, start, "right") - 1, np.searchsorted(starts, stop, "left")
        learnt = np.concatenate([self.learnt_of(d) for d in range(first, last)])
        return learnt[start - starts[first]: stop - starts[first]]

    def learnable(self, start: int, stop: int) -> bool:
        teaches = self.mask is learn_all or bool(self.learnt(start, stop)[1:].any())
        self.barren += not teaches
        return teaches

    def longest_first(self, step: int, last: int) -> list[tuple[int, int]]:
        """The spans of a step's rows (those below `last`)."""
        size = self.together * self.bsz
        rows = range(step * size, min((step + 1) * size, last))
        return sorted(map(self.span, rows), key=lambda span: span[0] - span[1])

    def batch(self, number: int, last: int = sys.maxsize) -> Batch:
        """The micro-batch of this number, of rows below `last`, padded on the right."""
        step, i = divmod(number, self.together)
        spans = self.longest_first(step, last)[i * self.bsz: (i + 1) * self.bsz]
        T = max(stop - start for start, stop in spans) - 1
        inputs, targets, learnt = np.zeros((3, len(spans), T), np.int64)
        for i, (start, stop) in enumerate(spans):
            tokens, n = self.corpus.tokens[start:stop].astype(np.int64), stop - start - 1
            inputs[i, :n], targets[i, :n], learnt[i, :n] = tokens[:-1], tokens[1:], self.learnt(start, stop)[1:]
        at = np.flatnonzero(learnt)
        return Batch(*map(torch.from_numpy, (inputs, at, targets.reshape(-1)[at])))

    def padding(self) -> float:
        """The share of padding in what is computed, estimated from the steps of the first 1,000 rows."""
        steps = range(-(-min(self.pass_rows, 1000) // (self.together * self.bsz)))
        spans = [span for step in steps for span in self.longest_first(step, sys.maxsize)]
        lengths = np.array([stop - start - 1 for start, stop in spans]).reshape(-1, self.bsz)  # (micro-batches,bsz)
        return 1 - lengths.sum() / (lengths.max(1).sum() * self.bsz)

    def summary(self) -> str:
        """What the corpus holds and how much of it is learnt (a share estimated from at most 1,000 rows)."""
        spans = [self.span(n) for n in range(0, self.pass_rows, -(-self.pass_rows // 1000))]
        learnt = sum(int(self.learnt(*span)[1:].sum()) for span in spans)
        share = learnt / sum(stop - start - 1 for start, stop in spans)
        length = np.diff(self.corpus.starts)
        short, long = int((length < 2).sum()), int((length > self.cfg.ctx_len + 1).sum())
        said = [f"{len(length):,} documents, {length.sum():,} tokens, {self.pass_rows:,} rows a pass ({self.sampler}),"
                f" {share:.1%} of the targets learnt"]
        if short and self.sampler != "get":                           # (get reads across documents)
            said.append(f"{short:,} documents of fewer than two tokens skipped")
        if long and self.sampler != "get":
            said.append(f"{long:,} documents of up to {length.max():,} tokens cut after every {self.cfg.ctx_len:,}")
        if (padding := self.padding()) > 0.2:
            said.append(f"{padding:.0%} of what is computed is padding (less with a smaller --micro_bsz and more"
                        " --accumulate_grad_batches)")
        if self.barren:
            said.append(f"{self.barren:,} rows with nothing to learn left out")
        if self.learnt_whole:
            first = min(self.learnt_whole)
            text = self.tokenizer.decode(self.corpus.part(first, first + 1).tokens[:24].tolist())
            more = " or more" if self.sampler == "get" else ""
            said.append(f"{len(self.learnt_whole):,}{more} documents have no match for --loss_mask and are learnt whole"
                        f" (the first begins {text!r})")
        return "; ".join(said)


# ======================================================================================================================
# 7. Loss: cross-entropy through the head, without ever holding all logits.
# ======================================================================================================================

LOGITS_HELD = 2**24                                                   # numbers: 256 positions of 65536 tokens
L2_WRAP = 1e-4                                                        # pulls the largest logit of a position towards 0


class HeadLoss(torch.autograd.Function):
    """sum of cross-entropies of (x W^T, targets) / n; with L2Wrap, which adds L2_WRAP m / n to the gradient of each
    position's largest logit m and leaves the value alone.

    x (M,C) in the compute dtype, W (V,C), targets (M) of which some may be IGNORED, n the learnt tokens of the whole
    optimiser step; votes (M,S) are added to the logits of the tokens spoken (M,S). A few positions at a time, the
    logits become the loss and its gradient in one go; backward only scales that gradient.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, W: Tensor, targets: Tensor, n: int | Tensor, votes: Tensor | None = None,
        spoken: Tensor | None = None,
    ) -> Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        dx = torch.zeros_like(x) if ctx.needs_input_grad[0] else None
        dW = torch.zeros_like(W, dtype=dtype) if ctx.needs_input_grad[1] else None
        dvotes = None if votes is None else torch.empty_like(votes)
        loss = torch.zeros((), dtype=dtype, device=x.device)
        rows = max(1, LOGITS_HELD // len(W))
        for part in (slice(i, i + rows) for i in range(0, len(x), rows)):
            logits = dlogits = None                                   # (else those before would be there beside these)
            logits, target = (x[part] @ W.T).to(dtype), targets[part, None]               # (rows,V), (rows,1)
            if votes is not None:
                logits.scatter_add_(1, spoken[part], votes[part].to(dtype))
            # A position that is IGNORED (it only fills up a graph's shape) has valid = 0: it adds 0 to the loss, and
            # its softmax is exp / (Z / 0) = 0.
            valid, target = (target != IGNORED).to(dtype), target.clamp_min(0)            # (rows,1) both
            right, (m, top) = logits.gather(1, target), logits.max(-1, keepdim=True)      # (rows,1)
            # In place, all of it: torch's logsumexp makes another matrix as large as the logits.
            Z = logits.sub_(m).exp_().sum(-1, keepdim=True)                               # (rows,1)
            loss += ((m + Z.log() - right) * valid).sum()
            if not any(ctx.needs_input_grad):
                continue
            dlogits = logits.div_(Z / valid)                                              # softmax
            dlogits.scatter_add_(1, target, -valid).scatter_add_(1, top, L2_WRAP * m * valid)
            dlogits = dlogits.to(x.dtype)
            if votes is not None:
                dvotes[part] = dlogits.gather(1, spoken[part])
            if dx is not None:
                dx[part] = dlogits @ W
            if dW is not None:
                dW += (dlogits.T @ x[part]).to(dtype)
        ctx.save_for_backward(dx, dW, dvotes)
        ctx.n = n
        return loss / n

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        # Divided by n here, together with the incoming gradient: in fp16 dlogits / n alone would underflow.
        dx, dW, dvotes = (None if d is None else (d.to(g.dtype) * (g / ctx.n)).to(d.dtype) for d in ctx.saved_tensors)
        return dx, dW, None, None, dvotes, None


def chunk_loss(
    model: RWKV, chunk: Batch, n: int | Tensor, states: list[BlockState] | None
) -> tuple[Tensor, list[BlockState]]:
    """A chunk's share of the loss of an optimiser step with n learnt tokens, and the states after it."""
    tokens, chunk = chunk.inputs, chunk.to(model.head.weight.device)
    # (--emb_on_cpu looks up the host's tokens: fetching them back would wait for all of a GPU's earlier work.)
    x, states = model(tokens if model.emb.weight.is_cpu else chunk.inputs, states)        # (B,T,C)
    copying = ()
    if model.arch.head_qk:
        copying = model.votes(x).flatten(0, 1)[chunk.learnt], chunk.inputs[chunk.learnt // x.shape[1]]    # (M,T) both
    # (HeadLoss would make the gradient of a W that is trained, even while gradients are off.)
    W = model.head.weight if torch.is_grad_enabled() else model.head.weight.detach()
    return HeadLoss.apply(x.flatten(0, 1)[chunk.learnt], W, chunk.targets, n, *copying), states


def truncated(model: RWKV, chunks: list[Batch], n: int | Tensor) -> Iterator[Tensor]:
    """A loss for each chunk; the caller differentiates it before asking for the next, and it is freed. A chunk treats
    the states it begins with as constants. A chunk in which nothing is learnt only passes on its states."""
    states = None
    for chunk in chunks:
        with torch.set_grad_enabled(torch.is_grad_enabled() and len(chunk.learnt) > 0):
            loss, states = chunk_loss(model, chunk, n, states)
        # (Nobody reads the last ones, which would take memory during backward.)
        states = [state.detach() for state in states] if chunk is not chunks[-1] else None
        if len(chunk.learnt):
            yield loss


def full(model: RWKV, chunks: list[Batch], n: int | Tensor) -> Iterator[Tensor]:
    """One loss, whose gradient goes back through all states. Of each chunk only the states it began with are kept;
    backward recomputes the rest, one chunk at a time, at the cost of one more forward pass."""
    total, states = 0.0, None
    for chunk in chunks:
        # (The weight tells on which device random numbers are drawn: all else that `checkpoint` sees is on the host.)
        loss, states = checkpoint(lambda weight, *rest: chunk_loss(*rest), model.head.weight, model, chunk, n, states,
                                  use_reentrant=False)
        total = total + loss
    del loss, states                                                  # (likewise)
    yield total


CHUNK_GRAD: dict[str, Callable[..., Iterator[Tensor]]] = {"truncated": truncated, "full": full}
# -> tokens of a row that go through the model at a time. (The tutorial has more names for `normal`.)
TRAIN_TYPE: dict[str, Callable[[Config], int]] = {
    **dict.fromkeys(("normal", "none", "state"), lambda cfg: cfg.ctx_len),
    "infctx": lambda cfg: cfg.chunk_ctx or min(512, cfg.ctx_len),
}


def batch_losses(model: RWKV, batch: Batch, n: int | Tensor, cfg: Config) -> Iterator[Tensor]:
    """A micro-batch's share of the loss of an optimiser step with n learnt tokens, as one or more summands: the caller
    calls backward on each before asking for the next. The sum does not depend on the chunks."""
    chunks = [*batch.chunks(TRAIN_TYPE[cfg.train_type](cfg))]
    return CHUNK_GRAD[cfg.chunk_grad if len(chunks) > 1 else "truncated"](model, chunks, n)


def add_gradient(model: RWKV, batch: Batch, n: int | Tensor, loss_scale: float | Tensor, cfg: Config) -> Tensor:
    """Forward and backward of a micro-batch; its gradients, times loss_scale, are added to the optimiser's. Returns its
    share of the loss, in fp64."""
    loss = torch.zeros((), dtype=torch.float64, device=model.head.weight.device)
    for share in batch_losses(model, batch, n, cfg):
        (share * loss_scale).backward()
        loss += share.detach()
    return loss


def backward_passes(cfg: Config) -> int:
    """The most backward passes that an optimiser step makes; their gradients are added."""
    chunks = -(-cfg.ctx_len // TRAIN_TYPE[cfg.train_type](cfg)) if cfg.chunk_grad == "truncated" else 1
    return cfg.accumulate_grad_batches * chunks


# ======================================================================================================================
# 8. Optimiser: AdamW over one flat buffer, of which each process may hold a slice (ZeRO); and the learning rate.
# ======================================================================================================================


def allocated(storage: torch.UntypedStorage) -> int:
    """Bytes that CUDA's caching allocator gives to a tensor: whole units of 512."""
    return -(-storage.nbytes() // 512) * 512


def overlap(a: slice, b: slice) -> slice:
    """What two slices share; of length 0 if nothing."""
    start = max(a.start, b.start)
    return slice(start, max(start, min(a.stop, b.stop)))


def shifted(a: slice, by: int) -> slice:
    """The slice, counted from `by`."""
    return slice(a.start - by, a.stop - by)


class Bucket:
    """A part of one rank's slice of the gradient, on its way to that rank."""

    def __init__(self, owner: int, part: slice, missing: int, like: Tensor):
        self.owner, self.part = owner, part                           # `part` of the whole gradient
        self.missing = missing                                        # numbers that have not had their gradient yet
        self.like = like

    @cached_property
    def sum(self) -> Tensor:
        """What this rank has to add; allocated at the first gradient."""
        return self.like.new_zeros(self.part.stop - self.part.start)


class Buckets:
    """Stage 2 sends gradients while backward makes them, a bucket at a time. Backward begins with the last parameters,
    so the last bucket fills first: every rank sends its buckets from the last to the first.
    """

    SIZE = 2**24                                                      # numbers
    IN_FLIGHT = 2                                                     # sent and not yet arrived, at most

    def __init__(self, own: Tensor, ranks: Ranks, numbers: int, eager: bool):
        """own (S): where the sums for this rank are added. numbers: of all parameters. eager: send a bucket as soon as
        every number in it has had a gradient, which is right if each gets one per micro-batch."""
        self.own, self.ranks, self.numbers, self.eager = own, ranks, numbers, eager
        self.flying: list[tuple[dist.Work, Bucket]] = []
        self.begin()

    def begin(self) -> None:
        size, self.waiting = len(self.own), []
        for rank in range(self.ranks.size):
            for start in range(rank * size, (rank + 1) * size, self.SIZE):
                part = slice(start, min(start + self.SIZE, (rank + 1) * size))
                missing = max(0, min(part.stop, self.numbers) - start)                    # (padding gets no gradient)
                self.waiting.append(Bucket(rank, part, missing, self.own))
        self.starts = [bucket.part.start for bucket in self.waiting]  # (those of buckets already sent stay)

    def take(self, where: slice, g: Tensor) -> None:
        # Of all buckets, which are in order, those that `where` touches. (A large model has hundreds.)
        first = bisect.bisect_right(self.starts, where.start) - 1
        for bucket in self.waiting[first: bisect.bisect_left(self.starts, where.stop)]:
            both = overlap(where, bucket.part)
            bucket.sum[shifted(both, bucket.part.start)].add_(g[shifted(both, where.start)])
            bucket.missing -= both.stop - both.start
        while self.eager and self.waiting and not self.waiting[-1].missing:
            self.send()

    def send(self) -> None:
        """All ranks send the last bucket, whatever each has in it; only its owner keeps the sum."""
        bucket = self.waiting.pop()
        self.flying.append((self.ranks.call(partial(dist.reduce, async_op=True), bucket.sum, bucket.owner), bucket))
        if len(self.flying) > self.IN_FLIGHT:
            self.land()

    def land(self) -> None:
        work, bucket = self.flying.pop(0)
        self.ranks.call(work.wait)
        if bucket.owner == self.ranks.rank:
            self.own[shifted(bucket.part, bucket.owner * len(self.own))] += bucket.sum

    def flush(self) -> None:
        """Sends the rest, and waits for all."""
        while self.waiting:
            self.send()
        while self.flying:
            self.land()
        self.begin()


LEARN_FASTER = ("att.w0", "att.time_decay")                           # twice as fast, as in RWKV-LM
DECAYED = (".weight", *{f".{name}" for method in ADAPTER.values() for name in method.layer.names})


def scale_and_decay(cfg: Config, item: tuple[str, nn.Parameter]) -> tuple[float, float]:
    """A parameter's learning rate, as a multiple, and its weight decay."""
    name, p = item
    matrix = name.endswith(DECAYED) and sum(n > 1 for n in p.shape) > 1
    return 2.0 if cfg.layerwise_lr and name.endswith(LEARN_FASTER) else 1.0, cfg.weight_decay if matrix else 0.0


class Numbers:
    """S numbers of the optimiser, in fp32: moments."""

    per = 1                                                           # S is a multiple of this
    plain = True                                                      # `held` are the numbers themselves

    def __init__(self, own: Tensor):
        """All 0. own (S): the slice of `working` that they belong to."""
        self.held = torch.zeros_like(own, dtype=torch.promote_types(own.dtype, torch.float32))  # (S)

    def read(self, part: slice) -> Tensor:
        """The numbers of a part (n), in fp32, to be changed in place and then given to `write`."""
        return self.held[part]

    def write(self, part: slice, x: Tensor) -> None:
        pass                                                          # (they are the numbers themselves)

    def put(self, part: slice, values: Tensor) -> None:
        """Puts `values`, maybe fewer than a part has, where that begins."""
        x = self.read(part)
        x[: len(values)] = values
        self.write(part, x)

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.held,)


class CodedNumbers(Numbers):
    """Moments in 8.125 bits: codes (S) uint8, absmax (S/256) fp32. As in 8-bit Adam (arXiv 2110.02861), except that 0,
    1 and -1 are levels: what gets no gradient stays put, and what is read and written back unchanged keeps its code.

        absmax = max |x| of 256 in a row,  code = the level nearest to x / absmax;   x ~ level * absmax
    """

    per, plain = 256, False

    def __init__(self, own: Tensor):
        self.codes = own.new_zeros(len(own), dtype=torch.uint8)
        self.absmax = own.new_zeros(len(own) // self.per, dtype=torch.float32)
        self.levels = self.all_levels().to(own.device)

    def all_levels(self) -> Tensor:
        """256, ascending: the `dynamic_levels`, with -1 in place of the smallest negative one."""
        levels = dynamic_levels(torch.device("cpu"))
        return torch.cat([-torch.ones(1), levels[:126], levels[127:]])

    def read(self, part: slice) -> Tensor:
        levels = self.levels[self.codes[part].int()]                                      # (n)
        return (levels.view(-1, self.per) * self.absmax[self.blocks(part), None]).view(-1)

    def write(self, part: slice, x: Tensor) -> None:
        x = x.view(-1, self.per)                                                          # (n/256,256)
        absmax = x.abs().amax(1)                                                          # (n/256)
        self.codes[part] = nearest_level(x, absmax, self.levels).to(torch.uint8).view(-1)
        self.absmax[self.blocks(part)] = absmax

    def blocks(self, part: slice) -> slice:
        return slice(part.start // self.per, part.stop // self.per)

    def tensors(self) -> tuple[Tensor, ...]:
        return self.codes, self.absmax


class CodedSquares(CodedNumbers):
    """The same for non-negative numbers. 0 is not a level: a small number must not become 0, since it is divided by."""

    def all_levels(self) -> Tensor:
        """255, ascending."""
        return torch.cat([magnitudes(2), torch.ones(1)])


class Wide(Numbers):
    """Master weights in fp32, from which the parameters are rounded; wide parameters are their own master weights."""

    def __init__(self, own: Tensor):
        self.own, self.held = own, own.to(torch.promote_types(own.dtype, torch.float32))

    def write(self, part: slice, x: Tensor) -> None:
        if self.held is not self.own:
            self.own[part] = x


class LowBits(Numbers):
    """Master weights for bf16, whose 16 bits are the high ones of an fp32 number: the low 16, so no bit is lost.

        high = (bits + 2^15) >> 16,  low = bits - (high << 16)        bits: the fp32 number's, as an integer

    (High is the nearest bf16; of two, the larger in magnitude.)
    """

    plain = False

    def __init__(self, own: Tensor):
        self.high, self.held = own.view(torch.int16), torch.zeros_like(own, dtype=torch.int16)  # (S) both

    def read(self, part: slice) -> Tensor:
        return (self.high[part].int().bitwise_left_shift_(16) + self.held[part]).view(torch.float32)

    def write(self, part: slice, x: Tensor) -> None:
        bits = x.view(torch.int32)
        high = (bits + 2**15).bitwise_right_shift_(16)
        self.high[part] = high
        self.held[part] = bits - high.bitwise_left_shift_(16)


MOMENTS = {"fp32": (Numbers, Numbers), "8bit": (CodedNumbers, CodedSquares)}
STAGE = {"": 1, "auto": 1, "ddp": 0, "zero1": 1, "zero2": 2, "deepspeed_stage_1": 1, "deepspeed_stage_2": 2,
         "ddp_find_unused_parameters_false": 0}


class ZeroAdamW:
    """AdamW (arXiv 1711.05101) on everything that is trained, laid end to end in one buffer and shared out over ranks
    as ZeRO does (arXiv 1910.02054).

    The parameters become views of `working`, a buffer in the compute dtype, and their gradients of `grad`, to which
    autograd adds. (Where `grad` is wider than they are, or sent during backward, a hook adds each gradient as soon as
    it is made, and frees it.) `master`, `m` and `v` are fp32: in bf16 a step of 2e-5 would be rounded away. For a
    parameter in bf16, each of R ranks holds and sends (x 1 - 1/R) this many bytes a step:

        stage   gradients, fp32                   master, m, v   then                    bytes held        sent
        0       all-reduced                       all            -                       2 + 4 + 10        8
        1       reduce-scattered after backward   a slice        working is gathered     2 + 4 + 14 / R    4 + 2
        2       reduced in backward, by buckets   a slice        working is gathered     2 + 14 / R        4 + 2

        2 working, 4 gradient, 10 = 2 master (LowBits) + 4 m + 4 v; 14 = these 10 and the slice's sum of the gradient

    Besides these, stage 2 holds some Buckets in flight, and the whole gradient in fp32 if a row is learnt in truncated
    chunks: it is sent after the last. One rank alone sends nothing, and its gradient, unless several are added, is no
    wider than it came: 2 + 2 + 10. 8-bit moments take 2 instead of 8. A group is one slice: same learning rate, same
    decay.
    """

    # How many numbers are processed at a time: on a CPU what stays in its cache, on a GPU what is worth a launch.
    PART = {"cpu": 2**18, "cuda": 2**22, "meta": 2**22}

    def __init__(
        self, named: Iterable[tuple[str, nn.Parameter]], cfg: Config, exact: dict[str, Tensor] | None = None,
        ranks: Ranks = ONE_RANK, stage: int = 1,
    ):
        """Takes over the parameters; `exact` holds fp32 values of those that an earlier run saved."""
        self.beta1, self.beta2, self.eps, self.t = cfg.beta1, cfg.beta2, cfg.adam_eps, 0
        self.ranks, self.stage = ranks, stage if ranks.size > 1 else 0
        moments, slices = MOMENTS[cfg.moments], ranks.size if self.stage else 1
        self.lay_out(list(named), partial(scale_and_decay, cfg), slices, moments[0].per)
        values = [p.detach().reshape(-1) for _, p in self.named]
        self.working = torch.cat([*values, values[0].new_zeros(slices * self.slice - self.numbers)])
        own = self.working[self.own]
        master = LowBits if own.dtype == torch.bfloat16 else Wide
        self.master, self.m, self.v = (kind(own) for kind in (master, *moments))
        self.part = self.PART[own.device.type]
        # In fp32 where gradients are added up: over ranks, or over several backward passes.
        several = ranks.size > 1 or backward_passes(cfg) > 1
        wide = torch.promote_types(own.dtype, torch.float32) if several else own.dtype
        self.grad = torch.zeros_like(own if self.stage == 2 else self.working, dtype=wide)
        once = backward_passes(cfg) == cfg.accumulate_grad_batches    # each micro-batch has one backward pass
        self.buckets = Buckets(self.grad, ranks, self.numbers, once) if self.stage == 2 else None
        self.summed: Tensor | None = None                             # (S) of the gradient, once it is summed
        for name, p in self.named:
            p.data = self.working[self.where[name]].view(p.shape)
            if self.buckets or wide != own.dtype:
                p.register_post_accumulate_grad_hook(partial(self.take, self.where[name]))
            else:
                p.grad = self.grad[self.where[name]].view(p.shape)    # to which autograd adds, in place
            if exact and name in exact:
                mine = overlap(self.where[name], self.own)
                values = exact[name].reshape(-1)[shifted(mine, self.where[name].start)]
                self.master.put(shifted(mine, self.own.start), values)

    def lay_out(self, named: list[tuple[str, nn.Parameter]], kind: Callable, slices: int, per: int) -> None:
        """Where each parameter is, which slice is this rank's, a multiple of `per`, and which groups are in that."""
        # Those of a kind are adjacent, so that a group is one slice. Those that learn faster come first: they are few
        # and in all layers, and Buckets begins at the end.
        self.named = sorted(named, key=lambda item: (-kind(item)[0], kind(item)[1]))
        if not self.named:
            raise Fatal("nothing is trained; name something in --train_parts, where auto stands for the usual")
        ends = list(itertools.accumulate(p.numel() for _, p in self.named))
        self.where = {name: slice(end - p.numel(), end) for (name, p), end in zip(self.named, ends, strict=True)}
        self.numbers = ends[-1]
        self.slice = -(-self.numbers // (slices * per)) * per         # S, of which the last may end in padding
        begin = self.ranks.rank * self.slice if self.stage else 0
        self.own = slice(begin, begin + self.slice)
        self.groups: list[tuple[slice, float, float]] = []            # of this rank's slice
        for (scale, decay), items in itertools.groupby(self.named, key=kind):
            names = [name for name, _ in items]
            group = overlap(slice(self.where[names[0]].start, self.where[names[-1]].stop), self.own)
            self.groups.append((shifted(group, begin), scale, decay))

    def take(self, where: slice, p: nn.Parameter) -> None:
        """The hook: a parameter's gradient, as soon as there is one."""
        if self.buckets:
            self.buckets.take(where, p.grad.reshape(-1))
        else:
            self.grad[where].add_(p.grad.reshape(-1))
        p.grad = None

    def parts(self, size: int = 0) -> Iterator[slice]:
        """The parts of this rank's slice, to be processed one by one."""
        n = size or self.part
        return (slice(at, min(at + n, self.slice)) for at in range(0, self.slice, n))

    def sum_micro_batch(self) -> None:
        """After the backward of every micro-batch: stage 2 sends what it has not yet sent."""
        if self.buckets:
            self.buckets.flush()

    def reduce(self) -> float:
        """After the last one: sums the gradient of the step over the ranks. Returns its norm, over all slices."""
        if self.stage == 0:
            self.summed = self.ranks.sum(self.grad)
        else:
            self.summed = self.grad if self.buckets else self.ranks.sum_slices(self.grad)
        norms = [torch.linalg.vector_norm(self.summed[part], dtype=torch.float64) for part in self.parts()]
        total = torch.stack(norms).square().sum()
        return (self.ranks.sum(total) if self.stage else total).sqrt().item()

    @torch.no_grad()
    def step(self, lr: float, grad_scale: float) -> None:
        """One step with the reduced gradient times grad_scale (clipping, undoing a loss scale); clears the gradient."""
        self.t += 1
        correction1, correction2 = 1 - self.beta1**self.t, 1 - self.beta2**self.t
        for part in self.parts():
            p, m, v = (numbers.read(part) for numbers in (self.master, self.m, self.v))
            g = self.summed[part].to(p.dtype) * grad_scale
            m.lerp_(g, 1 - self.beta1)
            v.mul_(self.beta2).addcmul_(g, g, value=1 - self.beta2)
            root = (v.sqrt() / math.sqrt(correction2)).add_(self.eps)
            for group, scale, decay in self.groups:
                at = shifted(overlap(group, part), part.start)
                p[at].mul_(1 - lr * scale * decay)
                p[at].addcdiv_(m[at], root[at], value=-lr * scale / correction1)
            for numbers, x in ((self.master, p), (self.m, m), (self.v, v)):
                numbers.write(part, x)
        self.publish()
        self.clear()

    def clear(self) -> None:
        """Forgets the gradient."""
        self.grad.zero_()
        self.summed = None

    def publish(self) -> None:
        """Sends this rank's slice of the parameters, as rounded from `master`, to the others."""
        if self.stage:
            self.ranks.gather_slices(self.working, self.working[self.own])

    def nbytes(self) -> int:
        """Bytes of all its buffers on this rank, including the trained parameters."""
        return sum(map(allocated, {t.untyped_storage() for t in self.buffers()}))

    def buffers(self) -> list[Tensor]:
        return [self.working, *self.master.tensors(), *self.m.tensors(), *self.v.tensors(), self.grad]

    def layout(self) -> str:
        """Tells two selections of parameters apart."""
        names = hashlib.sha256(repr(sorted((name, where.start) for name, where in self.where.items())).encode())
        return f"{len(self.named)} tensors of {self.numbers} numbers ({names.hexdigest()[:8]})"

    def whole(self, numbers: Numbers) -> Tensor | None:
        """For rank 0: these numbers of all ranks, without padding, in host memory, or where they are if all are there.
        (All ranks call it.)"""
        if numbers.plain and not self.stage:
            return numbers.held[: self.numbers]
        # All ranks together give at most a part at a time; each, a multiple of what shares a scale.
        whole, per = None, numbers.per
        for part in self.parts(max(1, self.part // self.ranks.size // per) * per):
            own = numbers.read(part)
            x = self.ranks.collect(own[None]) if self.stage else own[None].cpu()          # (slices,n)
            if self.ranks.rank == 0:
                whole = x.new_empty(len(x), self.slice) if whole is None else whole
                whole[:, part] = x
        return None if whole is None else whole.view(-1)[: self.numbers]

    def masters(self) -> dict[str, Tensor]:
        """For rank 0: name -> fp32 master weight, in the parameter's shape. (All ranks call it.)"""
        master = self.whole(self.master)
        return {} if self.ranks.rank > 0 else {name: master[self.where[name]].view(p.shape) for name, p in self.named}

    def state(self) -> dict[str, Tensor | None]:
        """For rank 0: what `load` takes, on any number of ranks and at any stage. (All ranks call it.)"""
        return {x: self.whole(getattr(self, x)) for x in ("master", "m", "v")} | {"t": torch.tensor(self.t)}

    @torch.no_grad()
    def load(self, state: dict[str, Tensor]) -> None:
        for name in ("master", "m", "v"):
            saved = state[name][self.own]
            for part in self.parts():
                getattr(self, name).put(part, saved[part])
        self.t = int(state["t"])
        self.publish()


# The share of the run that is left, the share left after warm-up -> how far above lr_final, as a share.
SCHEDULE: dict[str, Callable[[float, float, Config], float]] = {
    **dict.fromkeys(("cos_decay", "cos"), lambda left, warm, cfg: 0.5 * (1 - math.cos(math.pi * left / warm))),
    "wsd": lambda left, warm, cfg: min(1.0, left / min(cfg.decay_frac, warm)),
}


def lr_at(step: int, steps: int, cfg: Config) -> float:
    """The learning rate of a step, counted from 0: warm-up, then the schedule to the last of `steps`."""
    if step < cfg.warmup_steps:
        return cfg.lr_init * (step + 1) / cfg.warmup_steps
    whole, warm = max(1, steps - 1), max(1, steps - 1 - cfg.warmup_steps)
    left = max(0, warm + cfg.warmup_steps - step)
    share = SCHEDULE[cfg.lr_schedule](left / whole, warm / whole, cfg)
    return cfg.lr_final + (cfg.lr_init - cfg.lr_final) * share


# ======================================================================================================================
# 9. Files: read without running anything that is in them; written whole or not at all; described, so that nothing is
#    merged or resumed where it does not belong.
# ======================================================================================================================

NOT_A_PTH = {  # how a file begins -> what it is
    rb"\Z": "an empty file", rb"<": "a web page: the download failed", rb"\{": "JSON",
    rb"versi": "a git-lfs pointer, not the file itself: run `git lfs pull`",
    rb"\x80": "from torch before 1.6, or a plain pickle: load it in a program you trust and torch.save it again",
    rb"(?s:.{8})\{": "safetensors, made for other programs; use the .pth beside it",
}


def read_pth(path: str | Path, what: str, checks: bool = True) -> dict[str, Tensor]:
    """The flat dict of tensors in a .pth, memory-mapped; anything else is refused, and no code in it is run.

    checks: also the zip's checksums, unless another process does.
    """
    path = Path(path)
    refuse_device(path, what)
    if not path.is_file():
        found = "this is a folder; expected a .pth" if path.is_dir() else "no such file"
        raise Fatal(f"{what} {path}: {found}{what_is_beside(path)}")
    try:
        with open(path, "rb") as file:
            head = file.read(9)
    except OSError as e:
        raise Fatal(f"{what} {path}: cannot be read ({e.strerror})") from None
    for start, kind in NOT_A_PTH.items():
        if re.match(start, head):
            raise Fatal(f"{what} {path}: this is {kind}")
    pickles = pickles_of(path, what, checks)
    try:
        check_names(pickles)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")                           # of kinds of tensors that are refused below
            tensors = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError:
        raise Fatal(f"{what} {path}: holds objects other than tensors, maybe code; none of it was run") from None
    except Exception as e:             # damaged pickles raise IndexError, TypeError, AttributeError and others
        raise Fatal(f"{what} {path}: cannot be read: {first_line(e)}") from None
    if odd := oddity(tensors):
        raise Fatal(f"{what} {path}: expected a flat dict of tensors, not {odd}")
    wrapper = wrapper_of(tensors)
    return {name.removeprefix(wrapper).removeprefix("_forward_module.").removeprefix("_orig_mod."): t.detach()
            for name, t in tensors.items()}


def what_is_beside(path: Path) -> str:
    where, folder = ("in it", path) if path.is_dir() else ("beside it", path.parent)
    found = some(p.name for p in folder.glob("*.pth"))
    return f"; {where}: {found}" * bool(found)


def wrapper_of(names: dict[str, Any]) -> str:
    """What all names of a model's file begin with: RWKV-PEFT saves merged ones as model.base_model.model.emb.weight."""
    wrapper = next((name.removesuffix("emb.weight") for name in names if name.endswith(".emb.weight")), "")
    return wrapper if all(name.startswith(wrapper) for name in names) else ""


def pickles_of(path: Path, what: str, checks: bool) -> list[bytes]:
    """The pickles of a .pth, a zip that is whole and not compressed."""
    try:
        with zipfile.ZipFile(path) as archive:
            items = archive.infolist()
            packed = any(i.compress_type for i in items) or sum(i.file_size for i in items) > path.stat().st_size
            damaged = archive.testzip() if checks and not packed else None
            pickles = [] if packed else [archive.read(i) for i in items if i.filename.endswith("data.pkl")]
    except Exception as e:             # on nonsense zipfile raises BadZipFile, zlib.error, EOFError and others
        raise Fatal(f"{what} {path}: truncated, damaged or not a .pth ({first_line(e)}); fetch it again") from None
    if damaged:
        raise Fatal(f"{what} {path}: damaged: the checksum of {damaged} is wrong; fetch or save it again")
    if packed:                                                        # what is mapped must be in the file as it is
        raise Fatal(f"{what} {path}: its parts are compressed, or it is damaged; torch.save does not compress")
    return pickles


def check_names(pickles: list[bytes]) -> None:
    """Raises UnpicklingError if a pickle names what no tensor needs. (torch.load would call bytearray(10**11).)"""
    for op, name, _ in itertools.chain.from_iterable(map(pickletools.genops, pickles)):
        if op.name == "GLOBAL" and not name.startswith(("torch", "collections OrderedDict")):
            raise pickle.UnpicklingError


HELD_IN_FILES = {  # dtypes -> what a pickle calls the numbers of such a tensor
    torch.float64: torch.DoubleStorage, torch.float32: torch.FloatStorage, torch.float16: torch.HalfStorage,
    torch.bfloat16: torch.BFloat16Storage, torch.int64: torch.LongStorage, torch.int32: torch.IntStorage,
    torch.int16: torch.ShortStorage, torch.int8: torch.CharStorage, torch.uint8: torch.ByteStorage,
    torch.bool: torch.BoolStorage,
}


def oddity(held: Any) -> str:
    """What `held` is, if not a flat dict of ordinary tensors, all of which are in the file; "" if it is one."""
    if not isinstance(held, dict):
        return f"a {type(held).__name__}"
    for name, t in held.items():
        if not isinstance(t, Tensor):
            return f"a dict with {name!r}: {type(t).__name__}"
        if not (isinstance(name, str) and t.layout == torch.strided and t.device.type == "cpu" and not t.is_nested
                and t.dtype in HELD_IN_FILES and t.nbytes <= t.untyped_storage().nbytes()):
            return f"a dict with {name!r}: an unusual tensor ({t.dtype}, {t.layout})"
    return "" if held else "an empty dict"


# A .pth is a zip. What it says about itself is one more part of that, not a tensor: some programs take all tensors.
DESCRIPTION = "archive/pissa_rwkv.json"


def is_finite(x: Tensor) -> bool:
    """Whether all numbers are finite; in pieces, so that only one is in memory at a time."""
    return all(piece.isfinite().all() for piece in x.reshape(-1).split(2**20))


def read_described(path: str | Path, what: str, checks: bool = True) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a .pth of ours or RWKV-PEFT's, by the bare names in use now, and its description ({} for theirs).

    checks: also that all numbers are finite, unless another process does.
    """
    held = read_pth(path, what, checks)
    tensors = {re.sub(r"\.bone$", ".disha", name.removeprefix("model.")): t for name, t in held.items()}
    try:
        with zipfile.ZipFile(path) as archive:                        # (others that save it again lose the description)
            about = archive.read(DESCRIPTION) if DESCRIPTION in archive.namelist() else b"{}"
    except Exception as e:             # (as above, if the checksums were not looked at)
        raise Fatal(f"{what} {path}: damaged ({first_line(e)}); fetch or save it again") from None
    if (old := tensors.pop(Path(DESCRIPTION).name, None)) is not None:                    # in old files, a tensor
        about = old.to(torch.uint8).numpy().tobytes()
    if bad := [name for name, t in tensors.items() if checks and not is_finite(t)]:
        raise Fatal(f"{what} {path}: {some(bad)} holds NaN or infinity; the file is unusable")
    described = read_description(about, f"{what} {path}")
    if described.get("tensors", len(tensors)) != len(tensors):
        raise Fatal(f"{what} {path}: holds {len(tensors)} tensors but was saved with {described['tensors']}; the file"
                    " is unusable")
    return tensors, described


def a_number(*types: type, least: float = 0) -> Callable[[Any], bool]:
    """A check that something is a number of these types, from `least` on."""
    return lambda x: isinstance(x, types) and least <= x < 1e30


DESCRIBED: dict[str, Callable[[Any], bool]] = {  # what is computed with, not just compared -> whether it can be
    **dict.fromkeys(("step", "epoch_good", "scaled_at", "rows", "tensors"), a_number(int)),
    **dict.fromkeys(("epoch_steps", "rank"), a_number(int, least=1)),
    **dict.fromkeys(("epoch_loss", "scale"), a_number(int, float)), "loss_scale": a_number(int, float, least=1e-30),
    **dict.fromkeys(("peft", "mode", "quant"), is_text), "dtype": "float32 bfloat16 float16".split().__contains__,
    "config": lambda x: isinstance(x, dict),
}


def read_description(about: bytes, file: str) -> dict[str, Any]:
    try:
        described = json.loads(about)
        odd = [f"{item} {x!r}" for item, x in dict.items(described) if item in DESCRIBED and not DESCRIBED[item](x)]
    except (ValueError, TypeError, RecursionError):
        odd = ["no JSON object"]
    if odd:
        raise Fatal(f"{file}: its description, {Path(DESCRIPTION).name}, holds {odd[0]}; the file is unusable")
    return described


def compare(path: str | Path, about: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Every item that both descriptions have must be the same."""
    for item, value in wanted.items():
        if item in about and about[item] != value:
            whose = {"base": "for another base model: ", "init": "from another run: "}.get(item, "")
            raise Fatal(f"{path}: {whose}made with {item} {about[item]}, but here it is {value}")


def aged(path: Path, age: int) -> Path:
    """resume.pth, which is the newest, resume.1.pth, ..."""
    return path.with_suffix(f".{age}{path.suffix}") if age else path


def write_whole(path: Path, write: Callable[[IO[bytes]], Any], keep: int = 1) -> None:
    """`write(file)` into a neighbour of `path`, flush to disk, rename: readers see the old file or the new one.

    keep: how many versions stay, including the new one; older ones are renamed, as `aged` says, and for a moment there
    is no `path`.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(part, "w+b") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        for age in reversed(range(keep - 1)):
            if aged(path, age).exists():
                os.replace(aged(path, age), aged(path, age + 1))
        os.replace(part, path)
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)
    except OSError as error:
        free = shutil.disk_usage(path.parent).free // 2**20 if path.parent.is_dir() else 0
        known = {errno.ENOSPC: f"the disk is full ({free} MB free)", errno.EDQUOT: "the disk quota is used up",
                 errno.EFBIG: "the file exceeds the size limit set here"}
        why = known.get(error.errno, first_line(error))
        raise Fatal(f"cannot write {path}: {why}; an earlier {path.name} is left as it was") from None
    finally:
        part.unlink(missing_ok=True)


class Stored(tuple):
    """What a .pth says about the numbers of a tensor, which are its part data/n."""


class TensorPickler(pickle.Pickler):
    """Says about tensors on the meta device what torch.save says about others: the n-th has its numbers in data/n."""

    def __init__(self, file: IO[bytes]):
        super().__init__(file, protocol=2)
        self.number = itertools.count()

    def reducer_override(self, x: Any) -> Any:
        if not isinstance(x, Tensor):
            return NotImplemented
        stored = Stored(("storage", HELD_IN_FILES[x.dtype], str(next(self.number)), "cpu", x.numel()))
        return torch._utils._rebuild_tensor_v2, (stored, 0, tuple(x.shape), x.stride(), False, OrderedDict())

    def persistent_id(self, x: Any) -> Any:
        return tuple(x) if isinstance(x, Stored) else None


LARGE = 2**30                                                         # bytes: a larger part gets an 8-byte size (zip64)


def write_part(archive: zipfile.ZipFile, name: str, data: Any) -> None:
    """One part of a .pth. It begins at a multiple of 64 bytes: a tensor is mapped as it is in the file."""
    part, large = zipfile.ZipInfo(f"archive/{name}"), memoryview(data).nbytes > LARGE     # (without a timestamp)
    header = 30 + len(part.filename) + 4 + 20 * large                 # and then padding
    padding = -(archive.fp.tell() + header) % 64
    part.extra = struct.pack("<2sH", b"FB", padding) + bytes(padding)
    with archive.open(part, "w", force_zip64=large) as file:
        file.write(data)


def release_memory() -> None:
    """Returns freed memory to the system. (glibc before 2.38 keeps more and more, as large blocks come and go.)"""
    with contextlib.suppress(AttributeError, OSError):                # (other C libraries)
        ctypes.CDLL(None).malloc_trim(0)


Named = dict[str, Tensor] | Iterable[tuple[str, Tensor]]


def save(path: Path, tensors: Named, about: dict[str, Any] | None = None, keep: int = 1) -> None:
    """Named tensors as a .pth; with `about`, described by it. It holds what torch.save would write, but is written a
    tensor at a time: of those that are made on demand, no two are in memory at once."""

    def write(file: IO[bytes]) -> None:
        forms, pickled = {}, io.BytesIO()
        with zipfile.ZipFile(file, "w") as archive:
            for name, t in tensors.items() if isinstance(tensors, dict) else tensors:
                t = t.detach().cpu().contiguous()
                write_part(archive, f"data/{len(forms)}", t.reshape(-1).view(torch.uint8).numpy())
                forms[name] = t.to("meta")
                del t                                                 # before the next is made
                release_memory()
            TensorPickler(pickled).dump(forms)
            write_part(archive, "data.pkl", pickled.getvalue())
            write_part(archive, "byteorder", sys.byteorder.encode())
            write_part(archive, "version", b"3\n")
            if about is not None:
                write_part(archive, Path(DESCRIPTION).name, json.dumps(about | {"tensors": len(forms)}).encode())

    write_whole(path, write, keep)


def write_binidx(prefix: str, corpus: Corpus) -> None:
    """Writes `prefix`.bin and .idx with 16-bit tokens (code 8)."""
    sizes = np.diff(corpus.starts)
    header = IDX_MAGIC + struct.pack("<QBQQ", 1, 8, len(sizes), len(sizes) + 1)
    index = [sizes.astype("<i4"), (corpus.starts[:-1] * 2).astype("<i8"), np.arange(len(sizes) + 1, dtype="<i8")]
    write_whole(Path(prefix + ".bin"), lambda file: file.write(corpus.tokens.astype("<u2").tobytes()))
    write_whole(Path(prefix + ".idx"), lambda file: file.write(header + b"".join(part.tobytes() for part in index)))


def is_matrix(name: str, W: Tensor) -> bool:
    """Whether a model file's tensor is one of the matrices that `adapted` finds in the model."""
    return name.startswith("blocks.") and name.endswith(".weight") and W.dim() == 2


def merge(
    base: dict[str, Tensor], init: dict[str, Tensor], trained: dict[str, Tensor], method: Method, scale: float = 1.0,
    held: Callable[[Tensor], Tensor] = lambda W: W, path: str = "",
) -> Iterator[tuple[str, Tensor]]:
    """The full model: W' = held(residual of W) + delta in fp32, rounded once to W's dtype; for PiSSA, with q what
    quantising does, q(W - B0 A0) + B A. What else was trained takes the place of the base's.

    `init` holds what was taken out of the matrices, `trained`, read from `path`, adapters and whole parameters; `held`
    turns a residual into what training multiplied by. Names, order, shapes and dtypes are the base's, by which other
    programs recognise a model; a trained time_state is added to them. Everything is first checked to fit; then tensors
    are made one after the other, on demand.
    """
    layer, tensors = method.layer, dict(with_states(base, trained, path)) if method.state else base
    of_matrix = adapters_of(tensors, init, trained, layer, path)

    def made(name: str, W: Tensor) -> Tensor:
        if name not in of_matrix:
            return trained.get(name, W)
        own, taken = ({x: t.float() for x, t in part.items()} for part in of_matrix[name])
        new = held(layer.residual(W.float(), taken)).float()
        return new + layer.delta(new, scale, **own) if own else new

    def as_in_base(name: str, W: Tensor) -> Tensor:
        new = made(name, W).reshape(W.shape).to(W.dtype)
        if name not in UNUSED and not new.isfinite().all():
            raise Fatal(f"{path}: {name} would hold NaN or infinity, in {W.dtype}")
        return new

    return ((name, as_in_base(name, W)) for name, W in progress(tensors.items(), "merging"))


def adapters_of(
    tensors: dict[str, Tensor], init: dict[str, Tensor], trained: dict[str, Tensor], layer: type[Adapter], path: str
) -> dict[str, tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """For every matrix its adapter and what was taken out of it, {} if it has none. All that is in a checkpoint must
    have its place in the model."""
    found, left = {}, dict(trained)
    for name, W in tensors.items():
        module = name.removesuffix(".weight")
        if name in left:
            if (t := left.pop(name)).numel() != W.numel():
                raise Fatal(f"{path}: its {name} is {list(t.shape)}, the base's {list(W.shape)}")
        elif is_matrix(name, W):
            own = {x: left.pop(f"{module}.{x}") for x in layer.names if f"{module}.{x}" in left}
            if own:
                check_fit(module, W.shape, own, layer, path)
            taken = {x: entry(init, f"{module}.init_{x}", own[x].shape, "--lora_init") for x in layer.taken if x in own}
            found[name] = own, taken
    if layer.names and not any(name.endswith(layer.names) for name in trained):
        raise Fatal(f"{path}: it holds no adapters, whose names end in {' or '.join(layer.names)}")
    if left:
        raise Fatal(f"{path}: it holds {some(left)}, which the base lacks")
    blocks, its = ({name.split(".")[1] for name, (own, _) in found.items() if own or every} for every in (True, False))
    if layer.names and its != blocks:                                 # (7.2B is as wide as 13.3B)
        raise Fatal(f"{path}: it holds adapters for {len(its)} of the base's {len(blocks)} blocks; is it for another"
                    " model?")
    return found


def with_states(base: dict[str, Tensor], trained: dict[str, Tensor], path: str) -> Iterator[tuple[str, Tensor]]:
    """The base's tensors; where a block has no time_state (H,N,N), the checkpoint's, before receptance (H N,C)."""
    for name, W in base.items():
        state = name.replace("att.receptance.weight", "att.time_state")
        if state not in base:
            if state not in trained:
                raise Fatal(f"{path}: missing {state}")
            S = trained[state]
            if S.dim() != 3 or S.shape[1] != S.shape[2] or S.shape[0] * S.shape[1] != len(W):
                raise Fatal(f"{path}: its {state} is {list(S.shape)}; the base's attention is {len(W)} wide")
            yield state, S.to(W.dtype)
        yield name, W


def check_fit(module: str, shape: torch.Size, own: dict[str, Tensor], layer: type[Adapter], path: str) -> None:
    """A checkpoint's adapter for a matrix (out,in) must be complete, and of its size."""
    if missing := [f"{module}.{x}" for x in layer.names if x not in own]:
        raise Fatal(f"{path}: missing {some(missing)}")
    if not layer.fits(shape, **own):
        found = ", ".join(f"{x} {list(t.shape)}" for x, t in own.items())
        raise Fatal(f"{path}: its {found} does not fit {module}, which is {list(shape)} in the base")


def scale_of_delta(said: float | None, alpha: float | None, trained: dict[str, Tensor], path: str) -> float:
    """What an update is scaled by: as its file says, or else as LoRA's alpha implies."""
    if alpha is None:
        if said is None:
            raise Fatal(f"{path} does not say how LoRA was scaled; give --lora_alpha")
        return said
    check_within("--lora_alpha", alpha, "(0,1e9]")
    rank = next((t.shape[0] for name, t in trained.items() if name.endswith(".lora_A") and t.dim() == 2), 1)
    given = alpha / max(1, rank)
    if said not in (None, given):
        raise Fatal(f"--lora_alpha {alpha:g}: {path} was scaled by {said:g}; leave the flag out")
    return given


def merge_files(
    kind: str, base: str, init: str, checkpoint: str, alpha: float | None = None, quant: str = "",
    formats: dict[str, Quant] = QUANT,
) -> Iterator[tuple[str, Tensor]]:
    """`merge` of files, for methods whose files are not whole models. Refuses a base that was not trained on.

    alpha is LoRA's, and quant, one of formats, what the base was held as: both only if the checkpoint does not say.
    """
    tensors, method = read_pth(base, "--base_model"), ADAPTER[kind]
    trained, about = read_described(checkpoint, "--lora_checkpoint")
    taken, about_init = read_described(init, "--lora_init") if method.layer.taken else ({}, {})
    wanted = {"peft": kind, "base": fingerprint(tensors)}
    compare(checkpoint, about, wanted)
    compare(init, about_init, wanted | ({"init": about["init"]} if "init" in about else {}))
    if not about:
        say(f"{checkpoint} has no description (like those of RWKV-PEFT and pissa2lora): that it is for {base} cannot be"
            " checked")
    about = {item: about_init[item] for item in ("quant", "dtype") if item in about_init} | about
    scale = scale_of_delta(about.get("scale", method.layer.unsaid_scale), alpha, trained, checkpoint)
    row = pick(formats, "--quant", quant or about.get("quant", "none"))
    if quant not in ("", about.get("quant", quant)):
        raise Fatal(f"--quant {quant}: {checkpoint} was trained with --quant {about['quant']}; leave the flag out")
    # (RWKV-PEFT, which describes nothing, computes in bf16.)
    held = row.merged_as(getattr(torch, about.get("dtype", "bfloat16")))
    merged = merge(tensors, taken, trained, method, scale, held, f"--lora_checkpoint {checkpoint}")
    if method.state:
        say("the official `rwkv` package takes time_state from a model of RWKV-5 or 6 and ignores RWKV-7's: there"
            f" pass a state, a list: for each layer zeros (C), the time_state of {checkpoint}, zeros (C)")
    return merged


# ======================================================================================================================
# 10. Training: all of the above, in order. After it, what else a run needs.
# ======================================================================================================================

PRECISION = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
BAD_STEPS = 3                                                         # this many without a finite loss end the run
SCALE_GROWS = 2000                                                    # fp16: after this many good steps, as in torch


@dataclass
class Plan:
    """What is settled about a run before any weight is loaded."""

    cfg: Config
    ranks: Ranks
    device: str
    dtype: torch.dtype                                                # of computing
    arch: Arch
    tokenizer: ByteTokenizer
    loader: Loader
    held_out: Loader | None
    epoch_steps: int
    about: dict[str, Any]                                             # what every file written says about itself

    @property
    def batches(self) -> int:
        """Micro-batches of an optimiser step, those of all ranks."""
        return self.cfg.accumulate_grad_batches * self.ranks.size

    @property
    def rows(self) -> int:
        """Rows of an optimiser step."""
        return self.batches * self.loader.bsz

    @property
    def first_step(self) -> int:
        """Of a run that is not resumed."""
        return self.cfg.epoch_begin * self.epoch_steps

    @property
    def steps(self) -> int:
        """The number of the step at which the run ends."""
        return self.first_step + self.cfg.epoch_count * self.epoch_steps

    @property
    def folder(self) -> Path:
        return Path(self.cfg.proj_dir)

    def describe(self) -> dict[str, Any]:
        """`about`, and what the adapters are computed with."""
        dtype = str(self.dtype).removeprefix("torch.")                # which W_res is rounded to
        return self.about | ADAPTER[self.cfg.peft].layer.describe(self.cfg) | {"dtype": dtype}


@dataclass
class Run(Plan):
    """What a training run works with and where it stands."""

    model: RWKV
    optimiser: ZeroAdamW
    step: int = 0                                                     # the next optimiser step
    epoch_loss: float = 0.0                                           # sum over this epoch's steps with a finite loss
    epoch_good: int = 0                                               # and their number
    loss_scale: float = 1.0                                           # fp16: gradients would underflow without it
    scaled_at: int = 0                                                # the last step after which it was changed
    bad_steps: int = 0
    after_epoch: bool = False                                         # resumed where an epoch had just ended
    logged: int = 0                                                   # if resumed: what `step` was in resume.pth
    add_gradient: Callable[[RWKV, Batch, int, float, Config], Tensor] = add_gradient
    wandb: Any = None                                                 # --wandb: its run


def prepare(cfg: Config) -> tuple[Plan, dict[str, Tensor]]:
    """Reads and checks what a new run needs, cheap things first; joins the other processes, and opens proj_dir. Also
    returns the base's tensors, still in their file; none for a new model."""
    cfg = from_whole_model(with_init(cfg))
    check(cfg)
    ranks, device, dtype = setup(cfg)
    tensors = ranks.first(lambda: read_pth(cfg.load_model, "--load_model", ranks.rank == 0)) if cfg.load_model else {}
    arch = detect(tensors, cfg.load_model) if tensors else new_arch(replace(cfg, vocab_size=vocabulary_of_data(cfg)))
    check_arch(cfg, arch)
    hint_rate(cfg, arch.n_embd)
    if arch.head_qk and cfg.train_type == "infctx":
        raise Fatal("--train_type infctx: this model has head_qk, which looks back at a whole row; leave the flag out")
    cfg = cfg if cfg.dry_run else open_folder(cfg, ranks)
    tokenizer = load_tokenizer(cfg, arch.vocab_size) if needs_tokenizer(cfg) else ByteTokenizer(arch.vocab_size)
    check_tokens(tokenizer.encode(cfg.sample_prompt), arch, f"--sample_prompt {cfg.sample_prompt}")
    loader, held_out = load_data(cfg, tokenizer, cfg.accumulate_grad_batches * ranks.size)
    epoch_steps = cfg.epoch_steps or -(-loader.pass_rows // (loader.bsz * loader.together))
    base = fingerprint(tensors) if tensors else "new"
    if not cfg.dry_run:
        held_out_data = held_out and held_out.corpus.fingerprint
        check_alike(cfg, ranks, base=base, data=loader.corpus.fingerprint, held_out=held_out_data,
                    epoch_steps=epoch_steps, dtype=str(dtype))
    arch, tensors = with_time_state(arch, tensors, cfg)
    if tensors and (cfg.dry_run or cfg.grad_cp == "auto"):            # which count bytes from the shapes alone
        check_tensors(without_values(arch), tensors, cfg.load_model)
    if cfg.grad_cp == "auto":
        cfg = replace(cfg, grad_cp=what_fits(cfg, arch, loader.bsz, device, dtype, ranks.size))
    about = {"format": 1, "version": arch.version, "peft": cfg.peft, "quant": cfg.quant, "base": base}
    return Plan(cfg, ranks, device, dtype, arch, tokenizer, loader, held_out, epoch_steps, about), tensors


def build(cfg: Config) -> Run:
    """A run at its first step, or where it stopped."""
    plan, tensors = prepare(cfg)
    cfg, ranks, device = plan.cfg, plan.ranks, plan.device
    earlier = read_earlier(plan)
    wandb = load_wandb(cfg) if cfg.wandb and ranks.rank == 0 else None  # (early: it may lack a key, or a network)
    model = load_model(cfg, plan.arch, tensors, device, plan.dtype)
    torch.manual_seed(cfg.random_seed + ranks.rank)                   # every rank drops out different numbers
    plan.about = adapt(model, plan, earlier)
    trained = ((name, p) for name, p in model.named_parameters() if p.requires_grad)
    optimiser = ZeroAdamW(trained, cfg, earlier.load, ranks, STAGE[cfg.strategy])
    model.run_block = compiled(model.run_block, device) if cfg.compile else model.run_block
    loss_scale = 2.0**16 if plan.dtype == torch.float16 else 1.0      # (torch's initial one)
    run = Run(**vars(plan), model=model, optimiser=optimiser, step=plan.first_step, loss_scale=loss_scale,
              scaled_at=plan.first_step, wandb=wandb)
    if cfg.cuda_graph:
        run.add_gradient = graphs(model, cfg, device, ranks)
    if earlier.state:
        restore(run, earlier)
    return run


class Earlier(NamedTuple):
    """What a run starts or continues from: the files of earlier runs. {}: there is none."""

    cfg: Config                                                       # names the files of the adapters
    init: dict[str, Tensor]                                           # init_pissa.pth
    load: dict[str, Tensor]                                           # rwkv-<N>.pth
    path: Path                                                        # resume.pth, or an older one
    state: dict[str, Tensor]                                          # what is in it
    described: dict[str, Any]                                         # and what it says about itself


def read_earlier(plan: Plan) -> Earlier:
    """Reads these files, and refuses what does not fit: all before any weight is loaded."""
    cfg, ranks = plan.cfg, plan.ranks
    path, state, described = newest_of_all(cfg, ranks) if cfg.resume else (plan.folder, {}, {})
    cfg = begun_from(cfg, bool(state))
    init, load = read_adapters(cfg, plan.about)
    ranks.agree("adapters", {"adapter_load": fingerprint(load), "adapter_init": fingerprint(init)},
                "give every rank the same files")
    check_adapters(without_values(plan.arch), cfg, init, load)
    return Earlier(cfg, init, load, path, state, described)


def with_init(cfg: Config) -> Config:
    """PiSSA's adapters have their init_pissa.pth beside them, unless --adapter_init says otherwise."""
    beside = Path(cfg.adapter_load).with_name("init_pissa.pth") if cfg.adapter_load else None
    layer = pick(ADAPTER, "--peft", cfg.peft).layer
    wanted = layer.taken and not cfg.adapter_init and beside and beside.exists()
    return replace(cfg, adapter_init=str(beside)) if wanted else cfg


def from_whole_model(cfg: Config) -> Config:
    """A method whose files are whole models continues from one by using it as the base."""
    if not ADAPTER[cfg.peft].whole or not (cfg.adapter_load or cfg.epoch_begin > 0):
        return cfg
    file = cfg.adapter_load or epoch_before(cfg)
    if cfg.load_model and cfg.adapter_load:
        say(f"--load_model {cfg.load_model} has no effect: --adapter_load {file} is a whole model")
    return replace(cfg, load_model=file, adapter_load="")


def epoch_before(cfg: Config) -> str:
    """The file that --epoch_begin goes on from."""
    file = Path(cfg.proj_dir) / f"rwkv-{cfg.epoch_begin - 1}.pth"
    if not file.is_file():
        raise Fatal(f"--epoch_begin {cfg.epoch_begin} goes on from {file}: no such file{what_is_beside(file)}; leave"
                    " the flag out to begin with --load_model as it is")
    return str(file)


def load_data(cfg: Config, tokenizer: ByteTokenizer, batches: int) -> tuple[Loader, Loader | None]:
    """The corpus, in steps of so many micro-batches, and what is held out, if anything is."""
    corpus = read_corpus(cfg, cfg.data_file, tokenizer)
    corpus, held_out = split(corpus, cfg.val_split) if cfg.val_split else (corpus, None)
    if cfg.val_file:
        held_out = read_corpus(cfg, cfg.val_file, tokenizer)
    loader = Loader(corpus, tokenizer, cfg, batches)
    if held_out:
        in_order = replace(cfg, data_file=cfg.val_file or cfg.data_file, dataload="pad", data_shuffle=False)
        held_out = Loader(held_out, tokenizer, in_order, together=0)
    text = f" ({tokenizer.tokens_are})" if needs_tokenizer(cfg) else ""
    say(f"data{text}: {loader.summary()}" + (f"\nheld out: {held_out.summary()}" if held_out else ""))
    return loader, held_out


# Options that may differ from rank to rank: what a machine can do, and paths, whose contents are compared.
OF_A_MACHINE = """load_model data_file val_file vocab_file proj_dir adapter_load adapter_init pissa_config lora_config
    bone_config wandb accelerator devices dist_timeout op grad_cp compile emb_on_cpu vram_gb""".split()


def check_alike(cfg: Config, ranks: Ranks, **own: Any) -> None:
    """All ranks need the same files and options: nothing would show later that a node has an old copy of a file."""
    options = {name: value for name, value in asdict(cfg).items() if name not in OF_A_MACHINE}
    ranks.agree("alike", options | own | {"program": __version__}, "give every rank the same files and options")


def without_values(arch: Arch, wkv: Callable | None = None, grad_cp: str = "0") -> RWKV:
    """A model with names and shapes only."""
    with torch.device("meta"):
        return RWKV(arch, wkv, grad_cp)


def load_model(cfg: Config, arch: Arch, tensors: dict[str, Tensor], device: str, dtype: torch.dtype) -> RWKV:
    """The base; without tensors a new model."""
    model = without_values(arch, load_wkv(arch.version, arch.head_size, cfg.op, device), cfg.grad_cp)
    if tensors:
        return fill(model, tensors, cfg.load_model, device, dtype, left_in_file(model, cfg))
    return model.to_empty(device="cpu").initialise().to(device, dtype)


def compiled(run_block: RunBlock, device: str) -> RunBlock:
    """`run_block` under torch.compile, if that works here. The operations between two products become one kernel, and
    what backward recomputes is fused into it. The first step compiles, and so does the first with rows of another
    length.
    """
    try:
        torch.compile(torch.neg)(torch.ones(1, device=device))
    except Exception as e:             # each of the compiler's many parts raises its own
        say(f"--compile 1: torch.compile does not work here ({first_line(e)}); continuing without, which is slower")
        return run_block
    # It warns that what keep_products does is wrong for a block with in-place operations; ours has none.
    logging.getLogger("torch._higher_order_ops.wrap").setLevel(logging.ERROR)
    # A graph for each of: the first layer or another; a length, or any; states with a gradient or without.
    torch._dynamo.config.recompile_limit = 32
    say("torch.compile: the first step takes a minute")
    return torch.compile(run_block)


@torch.no_grad()
def first_loss(model: RWKV, loader: Loader) -> float:
    batch = loader.batch(0)
    return sum(loss.item() for loss in batch_losses(model.eval(), batch, max(1, len(batch.learnt)), loader.cfg))


def adapt(model: RWKV, plan: Plan, earlier: Earlier) -> dict[str, Any]:
    """Freezes what is not trained, puts new adapters or an earlier run's on it, and writes init_pissa.pth. Returns what
    describes the run's files.

    Prints the loss of one batch with and without them: a new start computes what the base does, but for quantisation.
    """
    cfg, ranks, about = earlier.cfg, plan.ranks, plan.describe()
    compares = not earlier.load and not earlier.state and to_freeze(model, cfg)
    before = first_loss(model, plan.loader) if compares else 0.0
    take_parts(model, earlier.load)
    taken = add_adapters(model, cfg, earlier.init, earlier.load, ranks)
    if compares:
        say(f"loss of the first batch: base {before:.6f}, with adapters {first_loss(model, plan.loader):.6f}")
    if taken:
        about["init"], own = fingerprint(taken), plan.folder / "init_pissa.pth"
        there = read_described(own, "pissa_init")[1] if ranks.rank == 0 and own.exists() else {}
        if ranks.rank == 0 and there.get("init") != about["init"]:
            if there and cfg.epoch_begin:
                raise Fatal(f"{own} is from the epochs before --epoch_begin {cfg.epoch_begin}, and these adapters have"
                            " another one; choose another --proj_dir")
            save(own, taken, about)
    return about


def begun_from(cfg: Config, resumed: bool) -> Config:
    """The options, with the init_pissa.pth and the rwkv-<N>.pth that the run starts from. (A resumed one has resume.pth
    instead of the latter.)"""
    folder, method = Path(cfg.proj_dir), ADAPTER[cfg.peft]
    if not resumed and (cfg.adapter_load or not cfg.epoch_begin):
        return cfg
    init = str(folder / "init_pissa.pth") if method.layer.taken else ""
    load = "" if resumed or method.whole else epoch_before(cfg)
    return replace(cfg, adapter_init=init, adapter_load=load)


def read_adapters(cfg: Config, about: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What --adapter_init and --adapter_load name, if anything; both must be for this base and this --peft."""
    init, about_init = read_described(cfg.adapter_init, "--adapter_init (pissa_init)") if cfg.adapter_init else ({}, {})
    load, about_load = read_described(cfg.adapter_load, "--adapter_load") if cfg.adapter_load else ({}, {})
    compare(cfg.adapter_init, about_init, about)
    compare(cfg.adapter_load, about_load, about)
    if "init" in about_load:
        compare(cfg.adapter_init, about_init, {"init": about_load["init"]})
    if about_load.get("rank") == cfg.rank:                            # (another is refused later, with both shapes)
        described = ADAPTER[cfg.peft].layer.describe(cfg)
        compare(cfg.adapter_load, about_load, {x: described[x] for x in ("scale", "mode") if x in described})
    return init, load


def check_adapters(model: RWKV, cfg: Config, init: dict[str, Tensor], load: dict[str, Tensor]) -> None:
    """Adapter files must hold the numbers of every adapter, in their shapes, and nothing that is not trained."""
    method, parameters = ADAPTER[cfg.peft], dict(model.named_parameters())
    for name, t in load.items():
        fits = t.numel() == parameters[name].numel() if name in parameters else method.is_own(name)
        if not fits:
            raise Fatal(f"{cfg.adapter_load}: {name} does not fit this model; is it for this --peft?")
    missing = [name for name in parameters if load and method.is_own(name) and name not in load]
    if missing:
        raise Fatal(f"{cfg.adapter_load}: missing {some(missing)}; is it for this --peft?")
    for name, matrix in to_freeze(model, cfg).items() if init or load else ():
        check_rank(name, matrix.weight.shape, cfg)
        for x, shape in method.layer.shapes(matrix.weight.shape, cfg).items():
            if init and x in method.layer.taken:
                entry(init, f"{name}.init_{x}", shape, cfg.adapter_init)
            if load:
                entry(load, f"{name}.{x}", shape, cfg.adapter_load)
    lost = [name for name in load if not is_trained(name, cfg)]
    if lost and not cfg.chat:                                         # (which saves nothing)
        raise Fatal(f"{cfg.adapter_load}: holds {some(lost)}, which --train_parts {' '.join(cfg.train_parts)} does not"
                    " train and so would not save; name them too, or merge first and adapt the merged model")


def take_parts(model: RWKV, load: dict[str, Tensor]) -> None:
    """Copies from a file the parameters that the model already has, including time_state; adapters come later."""
    for name, p in model.named_parameters():
        if name in load:
            p.data.copy_(load[name].view(p.shape))


def train_step(run: Run, lr: float) -> dict[str, Any]:
    """One optimiser step. A loss or gradient that is not finite changes nothing; three such steps end the run.

    The micro-batches of a step are dealt out to the ranks in turn, and n counts what all of them learn: gradients are
    summed, and never divided by the number of ranks.
    """
    cfg, optimiser, ranks = run.cfg, run.optimiser, run.ranks
    own = range(run.step * run.batches, (run.step + 1) * run.batches)[ranks.rank:: ranks.size]
    batches = [run.loader.batch(i) for i in own]
    learnt, tokens = ranks.totals(sum(len(b.learnt) for b in batches), sum(b.inputs.numel() for b in batches))
    n, loss = max(1, int(learnt)), 0.0
    for batch in batches:
        loss += run.add_gradient(run.model, batch, n, run.loss_scale, cfg)
        optimiser.sum_micro_batch()
    for i in own:                                                     # those of the next step, while a GPU still works
        run.loader.batch(i + run.batches)
    loss, = ranks.totals(float(loss))
    norm = optimiser.reduce() / run.loss_scale
    if math.isfinite(loss) and math.isfinite(norm):
        clip = min(1.0, cfg.grad_clip / (norm + 1e-6)) if cfg.grad_clip else 1.0
        optimiser.step(lr, clip / run.loss_scale)
        run.bad_steps = 0
        if run.dtype == torch.float16 and run.step - run.scaled_at >= SCALE_GROWS:
            run.loss_scale, run.scaled_at = 2 * run.loss_scale, run.step
    else:
        optimiser.clear()
        skip(run, loss)
    return {"loss": loss, "lr": lr, "grad_norm": norm, "tokens": int(tokens), "learnt": n}


def skip(run: Run, loss: float) -> None:
    """Says which rows gave no finite gradient. In fp16 the cause is usually the loss scale, so that is halved first."""
    if run.loss_scale > 1 and math.isfinite(loss):
        run.loss_scale, run.scaled_at = run.loss_scale / 2, run.step
        say(f"step {run.step}: a gradient overflowed in fp16; skipped, and the loss scale is now {run.loss_scale:g}")
        return
    run.bad_steps += 1
    say(f"step {run.step}: the {'gradient' if math.isfinite(loss) else 'loss'} is not finite; the step is skipped and"
        f" nothing changed (it read rows {run.step * run.rows} to {(run.step + 1) * run.rows - 1})")
    if run.bad_steps == BAD_STEPS:
        raise Fatal(f"{BAD_STEPS} steps in a row, up to step {run.step}, had no finite loss and gradient; what was"
                    " saved before is good; lower --lr_init, or check those rows")


def train(run: Run) -> int:
    """The loop: set the learning rate, make a step, log it; at the end of an epoch save, validate and sample. Returns
    the signal that stopped it early, or 0."""
    cfg = run.cfg
    before = evaluate(run.model, run.held_out, run.ranks) if run.held_out else math.nan
    if run.held_out:
        say(f"held-out loss before: {before:.4f}")
    run.model.train()
    file, pace = (sys.stderr, 0.1) if sys.stderr.isatty() else (Lines(), 30.0)            # seconds between two looks
    with (Logger(run) as log, Stop() as stop, tqdm(total=run.steps, initial=run.step, unit="step", file=file,
                                                   mininterval=pace, disable=run.ranks.rank > 0) as bar):
        if run.held_out and log.lacks_validation:
            log.step(step=run.step - 1, epoch=run.step // run.epoch_steps - 1, val_loss=before)
        while run.step < run.steps and not any(run.ranks.totals(stop.asked)):
            began, lr = time.perf_counter(), lr_at(run.step, run.steps, cfg)
            row = train_step(run, lr)
            seconds = time.perf_counter() - began
            epoch = run.step // run.epoch_steps
            log.step(**row, step=run.step, epoch=epoch, kt_s=row["tokens"] / seconds / 1000, t_cost=1 / seconds)
            bar.set_postfix(loss=f"{row['loss']:.4f}", lr=f"{lr:.1e}", tok_s=f"{row['tokens'] / seconds:,.0f}",
                            refresh=False)
            bar.update()
            run.step += 1
            if math.isfinite(row["loss"]):
                run.epoch_loss, run.epoch_good = run.epoch_loss + row["loss"], run.epoch_good + 1
            due = cfg.save_steps and run.step % cfg.save_steps == 0
            if run.step % run.epoch_steps == 0:
                end_epoch(run, log, epoch, lr, due)
            elif due:
                save_resume(run)
        if run.step < run.steps:
            save_resume(run)
            say(f"stopped before step {run.step}; --resume continues from here")
            return stop.asked or signal.SIGTERM                       # (of another rank)
    say(f"done: {run.folder}")
    return 0


def end_epoch(run: Run, log: Logger, epoch: int, lr: float, due: bool) -> None:
    """Logs an epoch's mean loss, saves what it made, validates, prints a sample. due: save resume.pth whatever
    --epoch_save says."""
    cfg = run.cfg
    if run.step == run.steps and not run.optimiser.t:
        raise Fatal("no step had a finite loss and gradient; nothing was learnt")
    loss = run.epoch_loss / run.epoch_good if run.epoch_good else math.nan
    run.epoch_loss, run.epoch_good = 0.0, 0
    log.epoch(epoch, loss, lr)
    if due or saved_after(run, epoch):
        save_resume(run)
    finish_epoch(run, epoch)
    line = f"epoch {epoch}: loss {loss:.4f}"
    if run.held_out:
        held_out = evaluate(run.model, run.held_out, run.ranks)
        log.step(step=run.step - 1, epoch=epoch, val_loss=held_out)
        line += f", held out {held_out:.4f}"
    say(line)
    if cfg.sample_prompt and run.ranks.rank == 0:
        say(cfg.sample_prompt + generate(run.model, run.tokenizer, cfg.sample_prompt, cfg.sample_len, cfg.sample_top_p,
                                         cfg.random_seed, cfg.sample_temperature))


@torch.no_grad()
def evaluate(model: RWKV, loader: Loader, ranks: Ranks = ONE_RANK) -> float:
    """Mean loss over every learnt token of a corpus."""
    model.eval()
    total = learnt = 0
    for i in progress(loader.one_pass[ranks.rank:: ranks.size], "validation"):
        batch = loader.batch(i, last=loader.pass_rows)
        total += sum(loss.double() for loss in batch_losses(model, batch, 1, loader.cfg))  # (read at the end, once)
        learnt += len(batch.learnt)
    model.train()
    total, learnt = ranks.totals(float(total), learnt)
    return total / max(1, learnt)


def saved_after(run: Run, epoch: int) -> bool:
    return run.step == run.steps or (epoch - run.cfg.epoch_begin) % run.cfg.epoch_save == 0


def finish_epoch(run: Run, epoch: int, anew: bool = True) -> None:
    """Writes an epoch's files: rwkv-<epoch>.pth (adapters and trained parts in fp32, or the whole model) and the merged
    model. resume.pth was written before and gives them all again, so a kill between the two loses nothing. An existing
    file is replaced, since a run that went back to resume.1.pth repeats an epoch; without `anew` it stays."""
    cfg, method = run.cfg, ADAPTER[run.cfg.peft]
    path, merged = run.folder / f"rwkv-{epoch}.pth", run.folder / f"rwkv-{epoch}-merged.pth"
    masters = run.optimiser.masters() if saved_after(run, epoch) else {}
    if not masters:                                                   # (only rank 0 has them)
        return
    if anew or not path.exists():
        if method.whole:
            save(path, whole_model(run, masters))                     # others read it, so no description
        else:
            save(path, masters, run.about)
    if cfg.auto_merge and not method.whole and run.step == run.steps and (anew or not merged.exists()):
        save(merged, merge_files(cfg.peft, cfg.load_model, str(run.folder / "init_pissa.pth"), str(path)))
        say(f"merged: {merged}")


def whole_model(run: Run, masters: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The base with what was trained, as a model file."""
    cfg = run.cfg
    base = read_pth(cfg.load_model, "--load_model") if cfg.load_model else run.model.state_dict()
    held = QUANT[cfg.quant].merged_as(run.dtype)
    return merge(base, {}, masters, ADAPTER[cfg.peft], 1.0, held, "the trained model")


# --------------------------------------------------------------------------------------- continuing where a run stopped

OPENED_BY = ".opened_by"                                              # in proj_dir: who opened it last, an agent a line

# What a killed run leaves behind: the file that it was writing, the one that tried whether it can.
LEFTOVER = re.compile(r"\.(probe|\.opened_by|(rwkv|resume|init_pissa|loss_data)\S*\.(pth|jsonl))\.\d+\.part")


def open_folder(cfg: Config, ranks: Ranks) -> Config:
    """Rank 0 opens proj_dir. All ranks resume if one was told to, or if torchrun has restarted the job that opened the
    folder. A job that was refused, because the folder holds another run, is refused again when it is restarted."""
    folder = Path(cfg.proj_dir)
    # torchrun's agent survives when it restarts its ranks. One of several nodes may have been replaced meanwhile, and
    # each agent counts its own restarts: one that has only rejoined has counted none.
    own = f"{os.environ.get('TORCHELASTIC_RUN_ID', 'none')} {platform.node()} {os.getppid()}"
    agents = ranks.each("agent", own)
    anew = any(ranks.totals(of_torchrun("TORCHELASTIC_RESTART_COUNT", 0)))
    wanted = cfg.resume or (ranks.rank == 0 and anew and not opened_by(folder).isdisjoint(agents))
    cfg = replace(cfg, resume=any(ranks.totals(wanted)))
    if ranks.rank == 0:
        make_ready(cfg)
        write_whole(folder / OPENED_BY, lambda file: file.write("".join(f"{x}\n" for x in agents).encode()))
    return cfg


def opened_by(folder: Path) -> set[str]:
    """torchrun's agents of the run that opened the folder last."""
    file = folder / OPENED_BY
    return {*file.read_text("utf-8", errors="replace").splitlines()} if file.is_file() else set()


def make_ready(cfg: Config) -> None:
    """Makes proj_dir, if need be, and removes what a killed run left. A run that is in it is never overwritten."""
    folder = Path(cfg.proj_dir)
    probe = folder / f".probe.{os.getpid()}.part"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as e:
        raise Fatal(f"--proj_dir {folder}: cannot be written to ({e.strerror})") from None
    epochs = map(re.compile(r"rwkv-(\d{1,9})(-merged)?\.pth").fullmatch, os.listdir(folder))
    held = [m[0] for m in epochs if m and int(m[1]) >= cfg.epoch_begin]
    saved = sorted(p.name for p in folder.glob("resume*.pth"))
    if cfg.resume and held and not saved:
        raise Fatal(f"--resume: {folder} holds {some(held)} but no resume.pth;"
                    " --epoch_begin continues from rwkv-<N-1>.pth")
    if not cfg.epoch_begin:
        held += saved + [name for name in ("init_pissa.pth", "loss_data.jsonl") if (folder / name).exists()]
    if held and not cfg.resume:
        raise Fatal(f"--proj_dir {folder} already holds a run ({some(held)}): --resume continues it; or choose another")
    for name in filter(LEFTOVER.fullmatch, os.listdir(folder)):
        (folder / name).unlink(missing_ok=True)


COUNTERS = ("step", "epoch_loss", "epoch_good", "loss_scale", "scaled_at")  # of a Run, in every resume.pth


def save_resume(run: Run) -> None:
    """Saves all that a run needs to continue as if it had never stopped. Keeps the previous file as resume.1.pth, and
    so on.

    It continues to the bit with the same device, threads and number of ranks, and without --compile: the optimiser's
    and the random state are in this file, the data follow from `step`, what is frozen from the base and init_pissa.pth.
    """
    state = run.optimiser.state() | {"rng": run.ranks.collect(torch.get_rng_state()[None])}
    if run.device == "cuda":
        state["rng_cuda"] = run.ranks.collect(torch.cuda.get_rng_state()[None])
    if run.ranks.rank == 0:
        stands = {item: getattr(run, item) for item in (*COUNTERS, "epoch_steps", "rows")}
        about = run.about | stands | {"config": config_of(run), "trained": run.optimiser.layout()}
        save(run.folder / "resume.pth", state, about, run.cfg.keep)


def config_of(run: Run) -> dict[str, Any]:
    """What a resumed run should share, as JSON gives it back: the options, and what the corpus holds."""
    options = {k: v for k, v in asdict(run.cfg).items() if k not in ("resume", "proj_dir", "wandb")}
    return json.loads(json.dumps(options)) | {"corpus": run.loader.corpus.fingerprint}


def newest(cfg: Config) -> tuple[Path, dict[str, Tensor], dict[str, Any]]:
    """The newest intact file in proj_dir to resume from, and what it holds; nothing, if there is none."""
    path = Path(cfg.proj_dir) / "resume.pth"
    there = [p for age in range(cfg.keep + 1) if (p := aged(path, age)).exists()]
    for p in there:
        try:
            state, described = read_described(p, "--resume")
            if not {*COUNTERS, "epoch_steps", "rows", "config"} <= described.keys():
                raise Fatal(f"{p}: not what this program writes for --resume")
            begun = described["config"].get("epoch_begin", 0)
            if begun != cfg.epoch_begin and described["step"] <= cfg.epoch_begin * described["epoch_steps"]:
                break                                                 # from the run before this one, as are the older
            return p, state, described
        except Fatal as e:
            if p == there[-1]:
                raise
            say(f"{e}; using the one before it")
    begins = f"from rwkv-{cfg.epoch_begin - 1}.pth" if cfg.epoch_begin else "from the beginning"
    say(f"--resume: this run has not written {path} yet; it starts {begins}")
    return path, {}, {}


def newest_of_all(cfg: Config, ranks: Ranks) -> tuple[Path, dict[str, Tensor], dict[str, Any]]:
    """The newest on rank 0, which has checked every number in it; the others read only as much as they need."""
    path, state, described = newest(cfg) if ranks.rank == 0 else (Path(cfg.proj_dir), {}, {})
    name = ranks.each("newest", path.name if state else "")[0]
    if ranks.rank > 0 and name and (path / name).exists():
        path = path / name
        state, described = read_described(path, "--resume", checks=False)
    ranks.agree("resume", {"the step in resume.pth": described.get("step")},
                f"--proj_dir {cfg.proj_dir} must be on a disk that all can see")
    return path, state, described


def restore(run: Run, earlier: Earlier) -> None:
    """Puts a run back to where resume.pth was written."""
    path, state, described = earlier.path, earlier.state, earlier.described
    compare(path, described, run.about | {"trained": run.optimiser.layout()})
    shapes = dict.fromkeys(("master", "m", "v"), (run.optimiser.numbers,)) | {"t": ()}
    whole = shapes.items() <= {name: t.shape for name, t in state.items()}.items() and 0 <= state["t"] < 2**31
    rng, now = state.get("rng", torch.empty(0)), torch.get_rng_state()                    # of every rank, of this one
    if not whole or rng.dtype != now.dtype or rng.shape[1:] != now.shape:
        raise Fatal(f"{path}: not what this program writes for --resume")
    changed = [f"{k} {was} -> {v}" for k, v in config_of(run).items() if (was := described["config"].get(k, v)) != v]
    if changed:
        say(f"resuming with changes: {', '.join(changed)}")
    run.optimiser.load(state)
    for item in COUNTERS:
        setattr(run, item, described[item])
    run.logged, old_steps, old_rows = run.step, described["epoch_steps"], described["rows"]
    if old_steps != run.epoch_steps:                                  # the same part of an epoch, and so of the data
        run.step = run.scaled_at = run.step * run.epoch_steps // old_steps
        say(f"an epoch had {old_steps} steps and has {run.epoch_steps} now: step {described['step']} is now {run.step}")
    if old_rows != run.rows:
        say(f"a step had {old_rows} rows and has {run.rows} now: the data continue at row {run.step * run.rows}")
    if len(rng) == run.ranks.size:
        torch.set_rng_state(rng[run.ranks.rank].clone())              # (a view would crash torch)
        if "rng_cuda" in state and run.device == "cuda":
            torch.cuda.set_rng_state(state["rng_cuda"][run.ranks.rank].clone())
    say(f"resumed at step {run.step} of {run.steps}")
    run.after_epoch = run.step > run.first_step and described["step"] % old_steps == 0
    if run.after_epoch:
        finish_epoch(run, run.step // run.epoch_steps - 1, anew=False)                    # killed before that, maybe


class Stop:
    """SIGTERM or Ctrl-C asks the run to end after its step; after that, Ctrl-C ends the program at once. (SIGTERM never
    does: if all processes of a job get it, torchrun's agent sends it to its ranks once more.)"""

    def __enter__(self) -> Stop:
        self.asked = 0                                                # the signal
        self.old = {s: signal.signal(s, self.handle) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def handle(self, number: int, frame: Any) -> None:
        if self.asked and number == signal.SIGINT:
            os._exit(128 + number)
        self.asked = number

    def __exit__(self, *error: Any) -> None:
        for number, handler in self.old.items():
            signal.signal(number, handler)


# ------------------------------------------------------------------------------------------------------- what is logged


class Lines:
    """For a bar whose output is a file: it writes a new line each time, not over the last one."""

    def write(self, text: str) -> None:
        if text := text.strip():
            print(text, file=sys.stderr)

    def flush(self) -> None:
        sys.stderr.flush()


class Logger:
    """train_log.txt (a line per epoch), loss_data.jsonl (a line per step), both in RWKV-PEFT's form; maybe wandb."""

    def __init__(self, run: Run):
        self.run, self.wandb = run, run.wandb
        self.log, self.losses = run.folder / "train_log.txt", run.folder / "loss_data.jsonl"
        self.lacks_validation = False                                 # of the last epoch: a kill came before it
        if run.ranks.rank > 0:
            return
        self.append(self.log, f"NEW RUN {datetime.now():%Y-%m-%d-%H-%M-%S}\n{asdict(run.cfg)}")
        kept = []
        if self.losses.exists():                                      # without lines of steps that will be repeated
            kept = self.losses.read_text("utf-8", errors="replace").splitlines()
            steps, done = [*map(step_of, kept)], (run.logged or run.step) - 1
            if done in steps:                                         # (earlier ones may have been counted otherwise)
                kept = kept[: len(steps) - steps[::-1].index(done)]
            else:
                kept = [x for x, step in zip(kept, steps, strict=True) if step < done]
            write_whole(self.losses, lambda file: file.write("".join(x + "\n" for x in kept).encode()))
        validated = f'"epoch": {run.step // run.epoch_steps - 1}, "val_loss"'
        self.lacks_validation = run.after_epoch and not any(validated in x for x in kept)

    def __enter__(self) -> Logger:
        return self

    def __exit__(self, kind: type | None, *error: Any) -> None:
        if self.wandb:
            self.wandb.finish(exit_code=int(kind is not None))

    def step(self, **row: Any) -> None:
        row = {k: v if math.isfinite(v) else None for k, v in row.items()}                # JSON has no NaN
        self.append(self.losses, json.dumps(row))
        if self.wandb:
            self.wandb.log(row, step=row["step"])

    def epoch(self, epoch: int, loss: float, lr: float) -> None:
        perplexity, of_run = math.exp(min(loss, 700)), epoch - self.run.cfg.epoch_begin
        self.append(self.log, f"{epoch} {loss:.6f} {perplexity:.4f} {lr:.8f} {datetime.now()} {of_run}")

    def append(self, path: Path, line: str) -> None:
        if self.run.ranks.rank > 0:
            return
        try:
            with open(path, "a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as e:
            raise Fatal(f"cannot write {path}: {e.strerror}; --resume continues from the last save") from None


def step_of(line: str) -> float:
    """The step of a line of loss_data.jsonl; infinity where a crash left part of a line, or worse."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, LookupError, TypeError, RecursionError):
        return math.inf


def load_wandb(cfg: Config) -> Any:
    """A run of Weights & Biases, whose files are all in proj_dir."""
    import wandb

    folder = Path(cfg.proj_dir).absolute()
    os.environ["WANDB_CACHE_DIR"] = str(folder / "wandb" / "cache")   # its logs would go to the home folder
    try:
        return wandb.init(project=cfg.wandb, name=folder.name, config=asdict(cfg), dir=str(folder))
    except Exception as e:             # wandb's own, and those of its dependencies
        raise Fatal(f"--wandb {cfg.wandb}: {first_line(e)} (WANDB_MODE=offline logs into {cfg.proj_dir}, from where"
                    " `wandb sync` sends it later)") from None


def end_wandb() -> None:
    """Ends its run as failed, if one was begun and no Logger has ended it."""
    if (wandb := sys.modules.get("wandb")) and wandb.run:
        wandb.finish(exit_code=1)


# ------------------------------------------------------------------------------------- the processes, and their devices


def of_torchrun(name: str, usual: int) -> int:
    """A number that torchrun puts into the environment."""
    text = os.environ.get(name, str(usual))
    if not re.fullmatch(r"[0-9]{1,9}", text):
        raise Fatal(f"{name}={text} in the environment: expected a number; torchrun sets it, nothing else has to")
    return int(text)


DRIVERS = ("/proc/driver/nvidia/version", "/dev/dxg")                 # of Linux, and of Linux under Windows


def has_bf16() -> bool:
    """Whether the GPU multiplies in bf16. If there is none, and only bytes are counted, that is assumed."""
    return not torch.cuda.is_available() or torch.cuda.is_bf16_supported(including_emulation=False)


def setup(cfg: Config) -> tuple[Ranks, str, torch.dtype]:
    """Joins the other processes. Returns these, the device and the compute dtype."""
    world, here = of_torchrun("WORLD_SIZE", 1), of_torchrun("LOCAL_WORLD_SIZE", 1)
    if cfg.devices not in (0, here) and not cfg.dry_run:
        raise Fatal(f"--devices {cfg.devices}: torchrun started {here}; give it --nproc_per_node={cfg.devices}")
    gpu = torch.cuda.is_available()
    accelerator = pick({"gpu": "cuda", "cpu": "cpu"}, "--accelerator", cfg.accelerator or ("gpu" if gpu else "cpu"))
    if accelerator == "cuda" and not gpu and not cfg.dry_run:
        raise Fatal("--accelerator gpu: torch finds none here; use cpu, or install a CUDA build of torch")
    # Segments that grow leave less memory reserved but unused. CUDA reads this when it is initialised, which is later.
    # (Under Windows, drivers before R615 fail at the first of them.)
    under_windows = "microsoft" in platform.release().lower()
    allocator = os.environ.keys() & {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"}
    if accelerator == "cuda" and not allocator and not under_windows:
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    if not (gpu or cfg.accelerator or "CUDA_VISIBLE_DEVICES" in os.environ) and any(map(os.path.exists, DRIVERS)):
        why = f"may be too old for CUDA {torch.version.cuda} (13 needs 580)" if torch.version.cuda else "is not used"
        say(f"on the CPU: torch {torch.__version__} finds no GPU, and the NVIDIA driver installed here {why}")
    if cfg.dry_run:
        ranks = Unheard(0, max(world, cfg.devices))
    else:
        ranks = join(cfg, accelerator) if world > 1 else ONE_RANK
    precision = cfg.precision or ("fp32" if accelerator == "cpu" else "bf16" if has_bf16() else "fp16")
    dtype = pick(PRECISION, "--precision", precision)
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    torch.manual_seed(cfg.random_seed)
    return ranks, accelerator, dtype


def join(cfg: Config, accelerator: str) -> Ranks:
    """Becomes one of the processes that torchrun started, on its own GPU if there are any."""
    here, patience = of_torchrun("LOCAL_RANK", 0), timedelta(seconds=cfg.dist_timeout)
    if accelerator == "cuda":
        if here >= torch.cuda.device_count():
            raise Fatal(f"--accelerator gpu: process {here + 1} of this machine finds {torch.cuda.device_count()} GPUs;"
                        " start one process per GPU")
        torch.cuda.set_device(here)
    try:
        store, rank, size = next(rendezvous("env://", timeout=patience))
        store.set_timeout(patience)
        ranks = Ranks(rank, size, agreed(store, rank, size, cfg.dist_timeout))
    except (RuntimeError, ValueError) as e:
        first = "" if is_first() else "rank 0 did not answer: "         # (the others wait for rank 0 alone)
        raise Fatal(f"the processes did not find each other: {first}{first_line(e)}") from None
    # torch imports this at some point. If there is a group by then, its functions have it as a default and never let go
    # of it, and a thread of gloo that outlives Python aborts.
    importlib.import_module("torch.distributed.nn")
    backend = "cpu:gloo,cuda:nccl" if accelerator == "cuda" else "gloo"
    try:
        dist.init_process_group(backend, store=ranks.store, rank=rank, world_size=size, timeout=patience)
    except RuntimeError as e:
        networks = "GLOO_SOCKET_IFNAME" + " and NCCL_SOCKET_IFNAME" * (accelerator == "cuda")
        raise Fatal(f"the processes did not find each other's address: {of_gloo(e)}; if none has ended, set {networks}"
                    " on every machine to its network interface, like eth0 (Debian's /etc/hosts gives a machine's name"
                    " the address 127.0.1.1, which no other can reach)") from None
    JOINED.append(ranks)
    return ranks


def agreed(store: dist.Store, rank: int, size: int, patience: float) -> dist.Store:
    """The part of a store that belongs to these processes alone. torchrun's store survives when it restarts them, with
    all that was in it: each writes a fresh word, and rank 0 answers with its own, with which all keys then begin."""
    word, deadline = os.urandom(8).hex(), time.monotonic() + patience
    if rank > 0:
        store.set(f"rank {rank}", word)
        word = store.get(word).decode()
        store.set(f"{word} has {rank}", "")
    missing = set(range(1, size)) if rank == 0 else set()
    while missing:
        for other in [r for r in missing if store.check([f"rank {r}"])]:
            store.set(store.get(f"rank {other}").decode(), word)
        missing = {r for r in missing if not store.check([f"{word} has {r}"])}
        if time.monotonic() > deadline:
            raise RuntimeError(f"rank {some(map(str, missing))} did not join within {patience:g} s")
        time.sleep(0.01)
    return dist.PrefixStore(word, store)


def launch(cfg: Config, argv: list[str]) -> None:
    """--devices N with plain python: this process becomes torchrun, which starts N."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={cfg.devices}"]
    sys.stdout.flush()
    os.execv(sys.executable, [*torchrun, __file__, *argv])


# ---------------------------------------------------------------------------- options that are wrong, or have no effect


def check(cfg: Config) -> None:
    """Refuses options that are wrong by themselves, before any file is touched."""
    tables = {"peft": ADAPTER, "quant": QUANT, "bone_mode": dict.fromkeys(BONE_MODES), "lr_schedule": SCHEDULE,
              "strategy": STAGE, "moments": MOMENTS, "train_type": TRAIN_TYPE, "chunk_grad": CHUNK_GRAD,
              "grad_cp": GRAD_CP | {"auto": None}}
    for option, table in tables.items():
        pick(table, f"--{option}", getattr(cfg, option))
    for part in cfg.train_parts:
        pick(dict.fromkeys(("auto", "emb", "head", "time", "ln")), "--train_parts", part)
    for f in fields(cfg):
        if isinstance(value := getattr(cfg, f.name), (int, float)):
            check_within(f"--{f.name}", value, f.metadata["within"])
    check_together(cfg)
    if not cfg.chat:
        hint(cfg)


def check_together(cfg: Config) -> None:
    """Refuses options that contradict each other, or need another."""
    layer, lossy, everything = ADAPTER[cfg.peft].layer, QUANT[cfg.quant].lossy, EVERYTHING in parts_of(cfg)
    if not cfg.data_file and cfg.data_type != "dummy" and not cfg.chat:
        raise Fatal("--data_file is missing: a .jsonl, .txt, .npy, .tar, a folder or a binidx prefix; or --data_type"
                    " dummy")
    if not cfg.load_model and not everything:
        what = f"trains --train_parts {' '.join(cfg.train_parts)} of" if ADAPTER[cfg.peft].whole else "adapts"
        raise Fatal(f"--load_model is missing: --peft {cfg.peft} {what} a base model; only --peft none pretrains a new"
                    " one")
    if layer.taken and bool(cfg.adapter_load) > bool(cfg.adapter_init):
        raise Fatal(f"--adapter_load {cfg.adapter_load} (pissa_load) needs --adapter_init (pissa_init) too: the"
                    " init_pissa.pth of the same run")
    if cfg.adapter_init and not layer.taken:
        raise Fatal(f"--adapter_init {cfg.adapter_init} (pissa_init): --peft {cfg.peft} takes nothing out of a matrix;"
                    " leave it out")
    if cfg.epoch_begin and cfg.adapter_init and not cfg.adapter_load:
        raise Fatal(f"--adapter_init {cfg.adapter_init}: --epoch_begin {cfg.epoch_begin} uses the init_pissa.pth in"
                    " --proj_dir; leave it out")
    if cfg.val_file and cfg.val_split:
        raise Fatal(f"--val_split {cfg.val_split}: --val_file {cfg.val_file} is held out already; give one of them")
    if lossy and everything:
        raise Fatal(f"--quant {cfg.quant}: --peft {cfg.peft} trains every matrix, and only frozen ones are quantised;"
                    " --train_parts says what else to train")
    if cfg.qpissa_iters > 1 and not (layer.taken and lossy):
        raise Fatal(f"--qpissa_iters {cfg.qpissa_iters} fits PiSSA's start to a quantised base, but this is --peft"
                    f" {cfg.peft} with --quant {cfg.quant}")
    if cfg.emb_on_cpu and any(part in "emb.weight" for part in parts_of(cfg)):
        raise Fatal("--emb_on_cpu leaves the embedding in its file, but --peft none or --train_parts emb trains it")
    if cfg.train_type == "infctx" and cfg.chunk_ctx > cfg.ctx_len:
        raise Fatal(f"--chunk_ctx {cfg.chunk_ctx}: a chunk is part of a row; expected at most --ctx_len {cfg.ctx_len}")
    if cfg.train_type == "infctx" and ADAPTER[cfg.peft].state and cfg.chunk_grad == "truncated":
        raise Fatal("--chunk_grad truncated: with --peft state only the first chunk would be learnt from; use full")
    if cfg.train_type == "infctx" and cfg.chunk_grad == "full" and cfg.grad_cp == "products":
        raise Fatal("--grad_cp products: --chunk_grad full recomputes every chunk, and would keep the products of all;"
                    " use 0 or 1, which take less")
    if cfg.compile and cfg.op == "torch":
        raise Fatal("--compile 1: --op torch is a loop over tokens, which a compiler would unroll; use chunk or cpu")
    if cfg.train_type == "state" and cfg.peft != "state":
        raise Fatal(f"--train_type state: that is --peft state here, but this is --peft {cfg.peft}")
    if cfg.wandb and importlib.util.find_spec("wandb") is None:
        raise Fatal(f"--wandb {cfg.wandb}: the package is not installed: `pip install wandb`")
    if cfg.loss_mask == "se":
        mask_strings(cfg)


BELONGS_TO: dict[str, dict[str, Any]] = {  # option -> others, one of which must have this value
    "lora_alpha": {"peft": "lora"}, "lora_dropout": {"peft": "lora"}, "bone_mode": {"peft": "bone"},
    "svd_niter": {"peft": "pissa"}, "mask_id": {"loss_mask": "se"}, "decay_frac": {"lr_schedule": "wsd"},
    "chunk_ctx": {"train_type": "infctx"}, "chunk_grad": {"train_type": "infctx"},
    "vram_gb": {"dry_run": True, "grad_cp": "auto"},
}


def hint(cfg: Config) -> None:
    """Names options that have no effect as given."""
    for option, others in BELONGS_TO.items():
        if getattr(cfg, option) != getattr(Config, option) and all(getattr(cfg, o) != v for o, v in others.items()):
            say(f"--{option} has no effect without {' or '.join(f'--{o} {v}' for o, v in others.items())}")
    if cfg.auto_merge and ADAPTER[cfg.peft].whole:
        say(f"--auto_merge has no effect with --peft {cfg.peft}, whose files are whole models")


def hint_rate(cfg: Config, width: int) -> None:
    """Says if a learning rate is unusual for the method. (Narrow models, like the demonstration's, tolerate more.)"""
    method = ADAPTER[cfg.peft]
    if cfg.lr_init < method.low_lr:
        say(f"--lr_init {cfg.lr_init:g} is low for --peft {cfg.peft}; 0.01 to 1 is usual")
    if cfg.lr_init > method.high_lr and width >= 512:
        say(f"--lr_init {cfg.lr_init:g} is high for --peft {cfg.peft}, which moves the main directions of a matrix;"
            f" {method.high_lr:g} is usual")


# ----------------------------------------------------------------------------------- a step as one launch: --cuda_graph


class Graphs:
    """`add_gradient` by CUDA graphs: the thousands of kernels that a micro-batch launches are recorded once, and from
    then on launched as one.

    A graph repeats the same kernels at the same addresses. So a micro-batch is padded to one of a few shapes, each with
    its own graph, and copied to where the recorded one was; n and the loss scale are there too. The first of a shape
    runs as usual, for the libraries to set themselves up, and the second is recorded. All graphs share the same memory:
    no two run at once, and what a micro-batch leaves is in the optimiser's buffers.
    Reducing, clipping and the update stay outside: they differ from step to step, and are 90 of 7000 launches (1.5B).
    """

    most = 16                                                         # graphs; further shapes run as usual

    def __init__(self) -> None:
        self.places: dict[Any, list[Tensor]] = {}                     # shape -> inputs, learnt, targets, n, loss scale
        self.graphs: dict[Any, tuple[Callable[[], None], Tensor]] = {}                    # -> replay, the loss it makes

    @cached_property
    def stream(self) -> torch.cuda.Stream:
        return torch.cuda.Stream()

    @cached_property
    def memory(self) -> Any:
        return torch.cuda.graph_pool_handle()

    def __call__(self, model: RWKV, batch: Batch, n: int, loss_scale: float, cfg: Config) -> Tensor:
        if not self.most:
            return add_gradient(model, batch, n, loss_scale, cfg)
        batch, device = batch.filled(cfg.ctx_len), model.head.weight.device
        new = [*batch, torch.tensor(float(n)), torch.tensor(loss_scale)]
        shape = tuple(x.shape for x in new)
        first = shape not in self.places
        place = self.places.setdefault(shape, [torch.empty_like(x, device=device) for x in new])
        for x, there in zip(new, place, strict=True):
            there.copy_(x, non_blocking=True)                         # (or it would wait for the one before)
        work = partial(add_gradient, model, Batch(*place[:3]), *place[3:], cfg)
        if not first and shape not in self.graphs and len(self.graphs) < self.most:
            self.record(shape, work, model)
        if shape not in self.graphs:
            return self.aside(work)
        replay, loss = self.graphs[shape]
        replay()
        return loss

    def record(self, shape: Any, work: Callable[[], Tensor], model: RWKV) -> None:
        """Records the work, which does not run it. If that fails, says so once; from then on work runs as usual."""
        gradients = [(p, p.grad) for p in model.parameters()]
        try:
            self.graphs[shape] = self.captured(work)
        except RuntimeError as e:
            why = first_line(e.__context__ or e)                      # (ending a broken capture fails as well)
            say(f"--cuda_graph 1: what a step does could not be recorded ({why}); continuing without")
            self.most = 0
            self.graphs.clear()
            for p, gradient in gradients:                             # (without those of a backward that never ran)
                p.grad = gradient

    def captured(self, work: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        graph = torch.cuda.CUDAGraph()
        # "thread_local", since NCCL's own thread makes CUDA calls that a capture forbids.
        with torch.cuda.stream(self.stream), torch.cuda.graph(graph, self.memory, self.stream, "thread_local"):
            loss = work()
        return graph.replay, loss

    def aside(self, work: Callable[[], Tensor]) -> Tensor:
        """Runs the work on the stream that is recorded, so that autograd accumulates gradients at the same places."""
        now = torch.cuda.current_stream()
        self.stream.wait_stream(now)
        with torch.cuda.stream(self.stream):
            loss = work()
        now.wait_stream(self.stream)
        return loss


def no_graph(model: RWKV, cfg: Config, device: str, ranks: Ranks) -> str:
    """Why a step cannot be a graph, or nothing."""
    why = {"draws dropout anew each time": any(block.draws for block in model.blocks),
           "reads its embedding from a file (--emb_on_cpu)": cfg.emb_on_cpu,
           "passes on states from chunk to chunk (--train_type infctx)": cfg.train_type == "infctx",
           "sends gradients while it makes them (--strategy zero2)": ranks.size > 1 and STAGE[cfg.strategy] == 2,
           f"runs on a {device}": device != "cuda"}
    return next((reason for reason, so in why.items() if so), "")


def graphs(model: RWKV, cfg: Config, device: str, ranks: Ranks) -> Callable[..., Tensor]:
    """--cuda_graph 1: Graphs, or, where a step cannot be one, `add_gradient` itself and a line that says why."""
    if why := no_graph(model, cfg, device, ranks):
        say(f"--cuda_graph 1 has no effect: this run {why}")
        return add_gradient
    return Graphs()


# -------------------------------------------------------------------------------------------------- what a model writes


class Past(NamedTuple):
    """What is kept of a text that a model has read."""

    states: list[BlockState] | None = None
    seen: tuple[Tensor, Tensor] | None = None                         # head_qk looks back at x (1,T,C), tokens (1,T)
    unread: str = ""                                                  # what follows in the text


def check_tokens(tokens: list[int], arch: Arch, what: str = "that text") -> None:
    if (largest := max(tokens, default=0)) >= arch.vocab_size:
        raise Fatal(f"token {largest} of {what} is outside the model's vocabulary of {arch.vocab_size}; is"
                    " --tokenizer the model's?")


@torch.no_grad()
def tokens_of(
    model: RWKV, tokens: list[int], past: Past, draw: torch.Generator, top_p: float, temperature: float
) -> Iterator[tuple[int, Past]]:
    """Yields what the model writes after `past` and `tokens`, token by token without end, each with the past that it
    was drawn from. Reads only what is new. top_p 0 is greedy."""
    check_tokens(tokens, model.arch)
    device = model.head.weight.device
    while True:
        read = torch.tensor([tokens], device=device)
        x, states = model(read, past.states)
        if model.arch.head_qk and past.seen:
            x, read = (torch.cat(both, 1) for both in zip(past.seen, (x, read), strict=True))
        p = model.next_logits(x, read)[0].float().softmax(-1).cpu()                       # (V)
        if p.isnan().any():
            raise Fatal("the model computes NaN, not probabilities; fp16 ends at 65504: use --precision bf16 or fp32")
        p, order = p.sort(descending=True)
        p[1:][p.cumsum(0)[:-1] >= top_p] = 0                                              # the likeliest, up to top_p
        new = order[torch.multinomial((p / p[0]) ** (1 / temperature), 1, generator=draw)].item()
        past = Past(states, (x, read) if model.arch.head_qk else None)
        yield new, past
        tokens = [new]


def generate(
    model: RWKV, tokenizer: ByteTokenizer, prompt: str, length: int, top_p: float = 0.0, seed: int = 0,
    temperature: float = 1.0,
) -> str:
    """What the model writes after `prompt`, up to `length` tokens or the end of the document."""
    was_training, draw = model.training, torch.Generator().manual_seed(seed)
    model.eval()
    written = tokens_of(model, tokenizer.encode(prompt) or [0], Past(), draw, top_p, temperature)
    text = tokenizer.decode(itertools.takewhile(bool, (new for new, _ in itertools.islice(written, length))))
    model.train(was_training)
    return text


# ---------------------------------------------------------------------------------- talking to what was trained: --chat

TOLD = {"peft": "peft", "quant": "quant", "rank": "rank", "bone_mode": "mode"}  # option -> what a file calls it
NOT_IN_CHAT = ("data_file", "val_file", "make_binidx", "dry_run", "resume", "auto_merge")
# Someone else speaks: on any line, since some models write turns without blank lines. (learn_assistant is stricter.)
TURN = re.compile(b"\n(?:" + b"|".join(TURNS_BEGIN) + b")")


def chat_config(cfg: Config, given: set[str]) -> Config:
    """The options of --chat, with what the adapter file says; one of `given` that says otherwise is an error."""
    pick(ADAPTER, "--peft", cfg.peft)
    if odd := [name for name in NOT_IN_CHAT if getattr(cfg, name) != getattr(Config, name)]:
        raise Fatal(f"--{odd[0]} is not for --chat, which only talks; leave one of them out")
    if cfg.devices > 1 or of_torchrun("WORLD_SIZE", 1) > 1:
        raise Fatal("--chat is for one process: start it with python, without --devices")
    # Nothing is trained, so every matrix is frozen and may be quantised; no gradient, so nothing is kept for one.
    cfg = replace(from_whole_model(cfg), train_parts=(), grad_cp="0", train_type="normal")
    if not cfg.load_model:
        raise Fatal("--load_model is missing: the model that --chat talks to")
    if not cfg.adapter_load:
        if "peft" in given and not ADAPTER[cfg.peft].whole or cfg.adapter_init:
            raise Fatal("--adapter_load is missing: the rwkv-<N>.pth of the adapters that --chat is to put on the base")
        return replace(cfg, peft="none")
    _, about = read_described(cfg.adapter_load, "--adapter_load")
    if not about and (init := with_init(cfg).adapter_init):           # (saved again elsewhere, it loses what it says)
        about = {k: v for k, v in read_described(init, "--adapter_init")[1].items() if k == "quant"}
    told = {option: about[item] for option, item in TOLD.items() if item in about}
    layer = pick(ADAPTER, f"{cfg.adapter_load}: peft", told.get("peft", cfg.peft)).layer
    if layer.unsaid_scale is None and {"rank", "scale"} <= about.keys():
        alpha = about["scale"] * about["rank"]
        short = float(f"{alpha:.12g}")                                # (32 / 7 * 7 is not 32)
        told["lora_alpha"] = short if short / about["rank"] == about["scale"] else alpha
    for option, value in told.items():
        flag = getattr(cfg, option)
        if flag != value and (option in given or flag != getattr(Config, option)):
            raise Fatal(f"--{option} {flag}: {cfg.adapter_load} was made with {option} {value}; leave the flag out")
    return with_init(replace(cfg, **told))


def load_chat(cfg: Config) -> tuple[RWKV, ByteTokenizer]:
    """The model to talk to, held as --quant says, with its adapters; and its tokenizer."""
    check(cfg)
    ranks, device, dtype = setup(cfg)
    tensors = read_pth(cfg.load_model, "--load_model")
    arch = detect(tensors, cfg.load_model)
    check_arch(cfg, arch)
    tokenizer = load_tokenizer(cfg, arch.vocab_size)
    about = {"version": arch.version, "base": fingerprint(tensors)}
    init, load = read_adapters(cfg, about)
    arch, tensors = with_time_state(arch, tensors, cfg)
    check_adapters(without_values(arch), cfg, init, load)
    model = load_model(cfg, arch, tensors, device, dtype)
    take_parts(model, load)
    add_adapters(model, cfg, init, load, ranks)
    return model.eval(), tokenizer


def certain_length(text: bytes) -> int:
    """How many bytes of an unfinished answer are certainly its own: whole characters, without trailing white space, and
    without a line that is or may become another's turn."""
    head, newline, line = text.rpartition(b"\n")
    may_be_turn = newline and any(role.startswith(line) for role in TURNS_BEGIN)
    own = (text[: m.start()] if (m := TURN.search(text)) else head if may_be_turn else text).rstrip()
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    decoder.decode(own)
    return len(own[: len(own) - len(decoder.getstate()[0])].rstrip())


def answer(
    model: RWKV, tokenizer: ByteTokenizer, question: str, past: Past, draw: torch.Generator, cfg: Config,
    write: Callable[[str], Any],
) -> Past:
    """Writes the answer as it comes, until the document ends, another turn begins, or Ctrl-C is pressed.

    Drops what the model wrote beyond that: the past it returns is that of a training document up to here.
    """
    turn, text, end, kept = tokenizer.encode(past.unread + chat(question, "").rstrip()), b"", 0, None
    with contextlib.suppress(KeyboardInterrupt):
        tokens = tokens_of(model, turn, past, draw, cfg.sample_top_p, cfg.sample_temperature)
        for new, before in itertools.islice(tokens, cfg.sample_len):
            if end == len(text):                                      # all that was read is the answer's own
                kept = before, end
            text += tokenizer.token_bytes(new) if new else b""
            shown, end = end, certain_length(text) if new else len(text.rstrip())
            write(text[shown:end].decode(errors="replace"))
            if not new or TURN.search(text):
                break
    if not kept:                                                      # stopped before it had read the question
        return past
    return kept[0]._replace(unread=text[kept[1]: end].decode(errors="replace") + "\n\n")


def talk(cfg: Config, given: set[str]) -> None:
    """--chat: every line of the standard input is a question. Nothing is written to any file."""
    with contextlib.redirect_stdout(sys.stderr):                      # (the standard output is for answers)
        model, tokenizer = load_chat(chat_config(cfg, given))
    watched = sys.stdin.isatty()
    past, draw, write = Past(), torch.Generator().manual_seed(cfg.random_seed), partial(print, end="", flush=True)
    if watched:
        say("/reset forgets what was said, /exit or Ctrl-D ends, Ctrl-C stops an answer")
    while True:
        try:
            question = input("User: " if watched else "").strip()
            question.encode()                                         # (some locales let non-text bytes pass)
        except UnicodeError as e:
            raise Fatal(f"--chat: the question is not valid {e.encoding} (at {e.start}: {e.reason})") from None
        except (EOFError, KeyboardInterrupt):
            question = "/exit"
        if question == "/exit":
            return write("\n" if watched else "")
        if question == "/reset":
            past = Past()
        elif re.fullmatch(r"/\w*", question):
            print(f"{question}: unknown; choose from /reset and /exit", file=sys.stderr)
        elif question:
            try:
                write("Assistant:")
                past = answer(model, tokenizer, question, past, draw, cfg, write)
            except KeyboardInterrupt:                                 # before or after it was answered
                pass
            except Fatal as e:                                        # the model has no token for it
                write(f" ({e})")
            write("\n\n" if watched else "\n")


# ----------------------------------------------------------- counting bytes without a device: --dry_run, --grad_cp auto


class Peak(TorchDispatchMode):
    """Counts the bytes of the tensors that are alive while code runs on the meta device, that is, without values.

    Each takes whole units of 512 bytes, as in CUDA's caching allocator; those of `elsewhere` take nothing. `.item()`
    gives 1. On a device other than meta it counts what is really there.
    """

    def __init__(self, device: str = "meta", elsewhere: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.device = device
        self.live = self.most = 0
        self.known = weakref.WeakSet(t.untyped_storage() for t in elsewhere)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return 1.0
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            there = isinstance(tensor, Tensor) and tensor.device.type == self.device
            if there and (s := tensor.untyped_storage()) not in self.known:
                self.known.add(s)
                weakref.finalize(s, self.count, -allocated(s))
                self.count(allocated(s))
        return out

    def count(self, nbytes: int) -> None:
        self.live += nbytes
        self.most = max(self.most, self.live)


class FullRows:
    """In place of a Loader: the largest batches there can be, of `bsz` rows in which every token is learnt."""

    def __init__(self, bsz: int, ctx_len: int, device: str):
        self.bsz, self.ctx_len, self.device = bsz, ctx_len, device

    def batch(self, number: int) -> Batch:
        zeros = torch.zeros(self.bsz, self.ctx_len, dtype=torch.long, device=self.device)
        return Batch(zeros, torch.arange(zeros.numel(), device=self.device), zeros.view(-1))


class Memory(NamedTuple):
    """What a run takes of a device, in bytes: its parts at the peak of a step, and the peak while it is loaded."""

    weights: int                                                      # frozen
    optimiser: int                                                    # what is trained, with gradient and moments
    activations: int                                                  # and whatever else a step makes and frees
    loading: int
    other: int                                                        # not tensors: OTHER

    @property
    def total(self) -> int:
        return max(self.weights + self.optimiser + self.activations, self.loading) + self.other


CONTEXT = 500_000_000                                                 # bytes of CUDA's context, per process
# Device memory that is not in tensors: bytes, a share of the tensors' peak, and both in words.
OTHER = {"cuda": (CONTEXT + 2**25, 0.03, "0.53 for CUDA's context and cuBLAS, 3 % for fragmentation"),
         "cpu": (0, 0.0, "torch itself is not counted")}


class Rehearsal:
    """A run without values and without a device: the code of loading, adapting and training, whose bytes are counted.

    For CUDA the operator is `cuda`, whose fake implementation says what it allocates, unless --op or the head size
    calls for another. What torch's kernels allocate for themselves is not seen.
    """

    def __init__(self, cfg: Config, arch: Arch, device: str, dtype: torch.dtype, ranks: Ranks = ONE_RANK):
        self.op, wkv = find_wkv(arch.version, arch.head_size, cfg.op, device, ready=False)
        model = without_values(arch, wkv, cfg.grad_cp)
        tensors = {name: torch.empty_like(p, dtype=dtype) for name, p in model.named_parameters()}
        own = ADAPTER[cfg.peft].is_own
        self.device, self.base_parameters = device, sum(t.numel() for name, t in tensors.items() if not own(name))
        with Peak(elsewhere=tensors.values()) as self.peak:
            fill(model, tensors, "", "meta", dtype, left_in_file(model, cfg))
            freeze(model, cfg)
            # The first block and the last, during which most bytes are held, are adapted; those between are copies: the
            # same bytes in a quarter of the time (7.2B).
            done = {}
            for name in to_freeze(model, cfg):
                _, layer, rest = name.split(".", 2)
                if rest in done and int(layer) < arch.n_layer - 1:
                    model.set_submodule(name, copy.deepcopy(done[rest]))
                else:
                    for _, start in starts(model, [name], cfg, {}, ONE_RANK):
                        add_adapter(model, name, start, cfg, {})
                    done[rest], start = model.get_submodule(name), None
            trained = ((name, p) for name, p in model.named_parameters() if p.requires_grad)
            optimiser = ZeroAdamW(trained, cfg, None, ranks, STAGE[cfg.strategy])
            optimiser.part = ZeroAdamW.PART[device]                   # (its tensors are on meta)
            loader = FullRows(cfg.micro_bsz, cfg.ctx_len, "cpu")      # (their place is counted when they are used)
            self.run = Run(cfg, ranks, "meta", dtype, arch, None, loader, None, 1, {}, model, optimiser)
        self.loading, self.held = self.peak.most, self.peak.live

    def memory(self, bsz: int) -> Memory:
        """What one optimiser step takes with micro-batches of `bsz` rows."""
        self.run.loader.bsz, self.peak.most = bsz, self.peak.live
        with self.peak:
            train_step(self.run, 0.0)
        optimiser, activations = self.run.optimiser.nbytes(), self.peak.most - self.held
        if self.run.cfg.cuda_graph and not no_graph(self.run.model, self.run.cfg, self.device, self.run.ranks):
            activations *= 2                  # the first of a shape runs eagerly, beside the graphs' memory, their own
        fixed, share, _ = OTHER[self.device]
        other = fixed + int(share * max(self.peak.most, self.loading))
        return Memory(self.held - optimiser, optimiser, activations, self.loading, other)

    def fastest(self, bsz: int, room: int) -> str:
        """The first way of GRAD_CP with which a step takes at most `room` bytes; the last, if none does."""
        for way, run_block in GRAD_CP.items():
            self.run.model.run_block = run_block
            if self.memory(bsz).total <= room:
                return way
        return way

    def largest_bsz(self, room: int) -> int:
        """The largest micro-batch that takes at most `room` bytes; 0: not even one row does."""
        fits, too_many, bsz, before = 0, math.inf, 1, (0, self.held)
        while fits + 1 < too_many:                                    # the secant method: bytes grow nearly linearly
            taken = self.memory(bsz).total
            fits, too_many = (bsz, too_many) if taken <= room else (fits, bsz)
            a_row = max(1, (taken - before[1]) / (bsz - before[0]))   # (while loading takes most, a row adds nothing)
            guess = bsz + int((room - taken) // a_row)
            before, bsz = (bsz, taken), min(max(guess, fits + 1), too_many - 1, 8 * bsz)
        return fits


def room_of(cfg: Config, device: str) -> int:
    """Bytes of device memory that a run can have; 0: unknown."""
    if cfg.vram_gb or device != "cuda":
        return int(cfg.vram_gb * 1e9)
    # (Asking creates a context, which then is not free, and which OTHER counts as part of what a run takes.)
    return torch.cuda.mem_get_info()[0] + CONTEXT if torch.cuda.is_available() else 0


def what_fits(cfg: Config, arch: Arch, bsz: int, device: str, dtype: torch.dtype, ranks: int) -> str:
    """--grad_cp auto: the fastest that the device has room for."""
    room = room_of(cfg, device)
    if not room:
        raise Fatal(f"--grad_cp auto: how much memory it may use is not known for a {device}; set --vram_gb")
    rehearsal = Rehearsal(replace(cfg, grad_cp="1"), arch, device, dtype, Unheard(0, ranks))
    chosen = rehearsal.fastest(bsz, room)
    say(f"--grad_cp auto: {chosen}, {rehearsal.memory(bsz).total / 1e9:.2f} of {room / 1e9:.2f} GB")
    return chosen


def dry_run(plan: Plan) -> None:
    """Says what a run would train, for how long and in how many bytes, from shapes alone: no weight is loaded. Refuses
    adapters and a resume.pth that the run would refuse."""
    cfg, ranks, device, GB = plan.cfg, plan.ranks, plan.device, 1e9
    earlier = read_earlier(plan)
    described = earlier.described
    rehearsal = Rehearsal(cfg, plan.arch, device, plan.dtype, ranks)
    compare(earlier.path, described, plan.describe() | {"trained": rehearsal.run.optimiser.layout()})
    first = described["step"] * plan.epoch_steps // described["epoch_steps"] if described else plan.first_step
    learning = {name: p.numel() for name, p in rehearsal.run.optimiser.named}
    adapters = sum(n for name, n in learning.items() if ADAPTER[cfg.peft].is_own(name))
    learnt, parts = sum(learning.values()), " ".join(parts_of(cfg)) or "the model"
    steps = max(0, plan.steps - first)
    m, where = rehearsal.memory(plan.loader.bsz), f"each of {ranks.size} devices" if ranks.size > 1 else f"the {device}"
    say(f"would train {learnt:,} of {rehearsal.base_parameters + adapters:,} parameters: {adapters:,} in adapters,"
        f" {learnt - adapters:,} in {parts}\n"
        f"would make {steps:,} steps of {plan.rows} rows: at most {steps * plan.rows * cfg.ctx_len:,} tokens\n"
        f"would hold {m.total / GB:.2f} GB on {where}: {m.weights / GB:.2f} weights, {m.optimiser / GB:.2f}"
        f" adapters and optimiser, {m.activations / GB:.2f} activations and gradients at their peak, {m.other / GB:.2f}"
        f" other ({OTHER[device][-1]}); {(m.loading + m.other) / GB:.2f} while it is loaded"
        + counted_with(cfg, device, rehearsal.op))
    if room := room_of(cfg, device):
        say(f"of {room / GB:.1f} GB: the largest --micro_bsz that fits is {rehearsal.largest_bsz(room)}")


def counted_with(cfg: Config, device: str, op: str) -> str:
    """Names the operator counted for a GPU, if it is not the one that was asked for."""
    if device != "cuda" or op == cfg.op:
        return ""
    why = f"{cfg.op}'s own bytes are not known" if cfg.op else "chunk takes more: give --op" if op == "cuda" else ""
    return f", with --op {op}" + f" ({why})" * bool(why)


# ------------------------------------------------------------------------ text into tokens, once for all: --make_binidx


def make_binidx(cfg: Config) -> None:
    """--make_binidx X.jsonl, X.json or a folder X of such files writes X.bin and X.idx beside it."""
    if not Path(cfg.make_binidx).exists():
        raise Fatal(f"--make_binidx {cfg.make_binidx}: no such file or folder (a pattern would not say"
                    " what to call the result)")
    prefix = str(Path(cfg.make_binidx)).removesuffix(".jsonl").removesuffix(".json")
    for file in (prefix + ".bin", prefix + ".idx"):
        if Path(file).exists():
            raise Fatal(f"--make_binidx {cfg.make_binidx}: {file} exists already; move it away first")
    if (kind := data_type_of(cfg, cfg.make_binidx)) not in ("jsonl", "sft"):
        raise Fatal(f"--make_binidx {cfg.make_binidx}: it converts jsonl and sft, and this is {kind}")
    tokenizer = load_tokenizer(cfg, cfg.vocab_size or (256 if cfg.tokenizer == "byte" else 65536))
    corpus = read_corpus(cfg, cfg.make_binidx, tokenizer)
    if corpus.tokens.max() > 65535:
        raise Fatal(f"--make_binidx {cfg.make_binidx}: token {corpus.tokens.max()} takes more than 16 bits; train on it"
                    " as it is")
    write_binidx(prefix, corpus)
    say(f"{prefix}.bin, {prefix}.idx: {len(corpus.starts) - 1:,} documents, {len(corpus.tokens):,} tokens;"
        f" train with --data_file {prefix}.bin")


# ----------------------------------------------------------------------- the demonstration: the whole job, in miniature


@torch.no_grad()
def graded(run: Run) -> tuple[float, float]:
    """On what is held out: the loss, and the share of rows in which greedy decoding gives every one of the learnt
    tokens."""
    model, loader, right = run.model.eval(), run.held_out, 0
    for i in loader.one_pass:
        batch = loader.batch(i, last=loader.pass_rows).to(run.device)
        x, _ = model(batch.inputs)                                                        # (B,T,C)
        missed = (x.flatten(0, 1)[batch.learnt] @ model.head.weight.T).argmax(-1) != batch.targets
        rows_missed = (batch.learnt[missed] // batch.inputs.shape[1]).unique()
        right += len(batch.inputs) - len(rows_missed)
    return evaluate(model, loader), right / loader.pass_rows


OF_THE_DEMO = ("proj_dir", "accelerator", "precision", "op", "random_seed")  # the options it leaves to the user


def demo(cfg: Config) -> int:
    """Pretrains a base on one family of questions, adapts it to another with PiSSA and with LoRA, merges, reopens.
    Returns what `train` does."""
    folder = Path(cfg.proj_dir)
    if of_torchrun("WORLD_SIZE", 1) > 1:
        raise Fatal("the demonstration is for one process; with --load_model and --data_file there may be several")
    if folder.exists() and any(folder.iterdir()):
        raise Fatal(f"--proj_dir {folder} is not empty; name another folder for the demonstration")
    common = replace(cfg, data_type="dummy", tokenizer="byte", vocab_size=128, ctx_len=96, micro_bsz=32, val_split=0.1,
                     grad_cp="0", rank=8)
    say("\n1. A base model of half a million parameters learns to answer questions about sums, spelling and sentences.")
    base = replace(common, peft="none", n_layer=2, n_embd=128, data_file="base", epoch_steps=300, warmup_steps=20,
                   lr_init=3e-3, lr_final=1.5e-4, proj_dir=str(folder / "base"))
    run = build(base)
    if stopped := train(run):
        return stopped
    say(f"   exact answers to held-out questions: {graded(run)[1]:.1%}")
    file, runs, rows = str(folder / "base" / "rwkv-0.pth"), {}, {}
    for number, peft, more in ((2, "pissa", dict(auto_merge=True)), (3, "lora", dict(lora_alpha=8.0))):
        say(f"\n{number}. {peft} of rank 8 adapts it to the same questions in other words.")
        run = runs[peft] = build(replace(
            common, peft=peft, load_model=file, data_file="shift", epoch_steps=60, warmup_steps=5, lr_init=3e-3,
            lr_final=3e-4, proj_dir=str(folder / peft), **more))
        rows = rows or {"base": graded(run)}                          # (LoRA starts there too)
        if stopped := train(run):
            return stopped
        rows[f"after 60 steps of {peft}"] = graded(run)
    say("\n   held out                  loss    exact answers")
    for name, (loss, exact) in rows.items():
        say(f"   {name:<24}{loss:6.3f}   {exact:6.1%}")
    merged = str(folder / "pissa" / "rwkv-0-merged.pth")
    say(f"\n4. {merged} is an ordinary model file. Reopened:")
    demo_merged(runs["pissa"], merged)
    say("\nNext, your own model and data:\n"
        "   torchrun pissa_rwkv.py --load_model MODEL.pth --data_file DATA.jsonl --proj_dir out/mine --auto_merge\n"
        "Or ask questions like these yourself (it knows single ones: type /reset between two):\n"
        f"   python pissa_rwkv.py --chat --load_model {merged}")
    return 0


def demo_merged(run: Run, merged: str) -> None:
    """Compares the merged file with the run it comes from, and prints some of its answers."""
    tensors = read_pth(merged, "--load_model")
    model = without_values(run.arch, run.model.blocks[0].att.wkv)
    fill(model, tensors, merged, run.device, run.dtype).eval()
    batch = run.held_out.batch(0).to(run.device)
    with torch.no_grad():
        logits, again = (m(batch.inputs)[0] @ m.head.weight.T for m in (run.model.eval(), model))
    difference = ((logits - again).abs().max() / logits.std()).item()
    say(f"   largest difference of a logit: {difference:.1e} of their standard deviation")
    for question, answer in dummy_tasks("shift", 4096, run.cfg.random_seed)[-4:]:
        said = generate(model, run.tokenizer, chat(question, ""), 24).strip()
        say(f"   {question}  ->  {said}" + ("" if said == answer else f"  (right: {answer})"))


# ----------------------------------------------------------------------------------------------------- the command line


def open_streams() -> None:
    """Standard streams that the caller has closed lead nowhere."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))


LESS_MEMORY = ("a smaller --micro_bsz or --ctx_len, --grad_cp 1, or adapters with --quant nf4 take less; --dry_run"
               " estimates it")


def in_one_line(e: Exception, less: str = LESS_MEMORY) -> str:
    """The line for an error that the user can fix; "" for any other. less: what helps when memory is full."""
    if isinstance(e, (Fatal, wkv7_cuda.Misfit)):
        return "--op: " * isinstance(e, wkv7_cuda.Misfit) + " ".join(str(e).split())
    if wkv7_cuda.is_out_of_memory(e):
        return f"out of GPU memory ({first_line(e)}); {less}"
    if isinstance(e, MemoryError) or "can't allocate memory" in str(e):
        return f"out of memory ({first_line(e)}); {less}"
    if "CUDA driver error: operation not supported" in str(e):
        return f"{first_line(e)}; if growing segments cause it, PYTORCH_ALLOC_CONF=expandable_segments:False helps"
    if isinstance(e, BrokenPipeError):
        return "nothing reads the standard output any more"
    return ": ".join(str(x) for x in (e.filename, e.strerror or e) if x) if isinstance(e, OSError) else ""


def main(argv: list[str] | None = None) -> int:
    """The command line. Returns the exit status: 0; 2 after one line about what the user can fix; 128 plus a signal's
    number if that stopped it, so that whatever waits for the end of a job, or restarts it, knows."""
    argv = sys.argv[1:] if argv is None else argv
    open_streams()
    try:
        rank, world = of_torchrun("RANK", 0), of_torchrun("WORLD_SIZE", 1)
        if rank >= world:
            raise Fatal(f"RANK={rank} and WORLD_SIZE={world} in the environment: torchrun sets both, ranks from 0 on")
        cfg = parse(argv)
        if cfg.chat:
            talk(cfg, options_given(argv, cfg.peft))
            return 0
        if cfg.make_binidx or cfg.dry_run:                            # what one process does alone
            if is_first():
                make_binidx(cfg) if cfg.make_binidx else dry_run(prepare(cfg)[0])
            return 0
        if cfg.devices > 1 and "WORLD_SIZE" not in os.environ:
            launch(cfg, argv)
        without_options = replace(cfg, **{name: getattr(Config, name) for name in OF_THE_DEMO}) == Config()
        stopped = demo(cfg) if without_options else train(build(cfg))
        if stopped and without_options:
            say("(not the demonstration itself: that begins anew, in another --proj_dir)")
        if stopped:
            # All wait for rank 0, which saves: once a rank has ended with a status, torchrun kills the others.
            JOINED[-1].totals(0)
        if dist.is_initialized():
            dist.destroy_process_group()
        return 128 + stopped if stopped else 0
    except KeyboardInterrupt:
        end_wandb()
        print("pissa_rwkv: stopped", file=sys.stderr)
        return 130
    except Exception as e:
        JOINED[-1].tell_failure()
        end_wandb()
        if not (error := in_one_line(e)):
            raise
    if not is_first():                                                # where all found the same, one line is enough:
        time.sleep(2)                                                 # torchrun ends the others when the first has
    print(f"pissa_rwkv: error: {error}", file=sys.stderr, flush=True)
    if dist.is_initialized():                                         # its threads may wait for a rank that is lost,
        os._exit(2)                                                   # and abort when they see Python end
    return 2


if __name__ == "__main__":
    sys.exit(main())
