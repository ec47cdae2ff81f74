"""Merges adapters into their base model: a full .pth that every program of the RWKV world opens.

    python merge.py --type pissa --base_model M.pth --lora_init out/init_pissa.pth --lora_checkpoint out/rwkv-0.pth \\
                    --output merged.pth
    python merge.py --type lora  --base_model M.pth --lora_checkpoint out/rwkv-0.pth --lora_alpha 32 --output merged.pth
    python merge.py --type pissa2lora --base_model M.pth --lora_init out/init_pissa.pth \\
                    --lora_checkpoint out/rwkv-0.pth --output lora.pth

An output named .st is written for web-rwkv, Ai00 and RWKV Runner. --type pissa2lora writes not a model but what PiSSA
changed, as a LoRA of twice the rank, for programs that do not know PiSSA. Adapters trained on a quantised base are
merged into what was trained on: our files say what that was; for RWKV-PEFT's, --quant does. The formula is
`pissa_rwkv.merge`; here are its command line, those two formats, and RWKV-PEFT's old int8.
"""

import argparse
import itertools
import json
import struct
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

import pissa_rwkv as P
from pissa_rwkv import Fatal, Parser, merge_files, pick, save, write_whole

# Where web-rwkv differs from a .pth: names, all in lower case, and the last two dims of these, swapped: it reads every
# matrix as (out,in), and the low-rank factors are stored (in,out), a state as (value,key).
RENAMED = {"time_faaaa": "time_first", "time_maa": "time_mix"}
SWAPPED = ("w1", "w2", "a1", "a2", "v1", "v2", "g1", "g2",                                # x070
           "time_maa_w1", "time_maa_w2", "time_decay_w1", "time_decay_w2", "time_state")  # x060; state tuning


def for_web_rwkv(name: str, t: Tensor) -> tuple[str, Tensor]:
    """A tensor of a .pth by its name in a .st, in fp16 and that layout."""
    if name.rpartition(".")[2] in SWAPPED:
        t = t.transpose(-2, -1)
    for old, new in RENAMED.items():
        name = name.replace(f".{old}", f".{new}")
    return name.lower(), t.to(torch.float16).contiguous()


HEADER = 2**20                                                        # bytes: four times what the 13.3B model fills


def save_st(path: Path, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Safetensors as web-rwkv reads them: everything fp16, `RENAMED` and `SWAPPED` applied. Like a .pth it is written a
    tensor at a time. The header, which names them, comes first: room is left for it, and filled up with spaces.

        8 bytes: the length of the header;  the header, in JSON;  the numbers of all tensors, end to end
    """
    def write(file: IO[bytes]) -> None:
        header, end = {"__metadata__": {"format": "pt"}}, 0
        file.seek(HEADER)
        for name, t in itertools.starmap(for_web_rwkv, tensors):
            if name in header:
                raise Fatal(f"--output {path}: two tensors would be called {name}; write a .pth")
            if not t.isfinite().all() and name not in P.UNUSED:
                raise Fatal(f"--output {path}: {name} has numbers beyond fp16's 65504; write a .pth")
            file.write(t.reshape(-1).view(torch.uint8).numpy())
            header[name] = {"dtype": "F16", "shape": [*t.shape], "data_offsets": [end, end + t.nbytes]}
            end += t.nbytes
            P.release_memory()
        text = json.dumps(header).encode()
        if len(text) > HEADER - 8:
            raise Fatal(f"--output {path}: its header has no room for {len(header) - 1} tensors; write a .pth")
        file.seek(0)
        file.write(struct.pack("<Q", HEADER - 8) + text.ljust(HEADER - 8))

    write_whole(path, write)


FORMAT = {".pth": save, ".st": save_st}  # how a file is named -> what writes it


def hold_legacy_int8(W: Tensor, dtype: torch.dtype) -> P.Parts:
    """What RWKV-PEFT called int8, a code that bitsandbytes has since removed: the nearest of the 256 dynamic levels to
    w / absmax, with one absmax for the whole matrix. codes (1,n) uint8, absmax (1) fp32."""
    absmax = W.abs().amax().float()[None]
    codes = P.nearest_level(W.view(1, -1), absmax, P.dynamic_levels(W.device))
    return {"codes": codes.to(torch.uint8), "absmax": absmax}


def read_legacy_int8(parts: P.Parts, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    return (P.dynamic_levels(parts["codes"].device)[parts["codes"].int()] * parts["absmax"]).to(dtype).view(shape)


# what adapters may have been trained on, here or with RWKV-PEFT
QUANT = P.QUANT | {"legacy_int8": P.Quant(hold_legacy_int8, read_legacy_int8)}


def quant_of(args: argparse.Namespace) -> str:
    """--quant in our words: RWKV-PEFT, whose files describe nothing, called another code int8."""
    files = ((args.lora_checkpoint, "--lora_checkpoint"), (args.lora_init, "--lora_init"))
    if args.quant != "int8" or any(P.read_described(file, flag)[1] for file, flag in files if file):
        return args.quant
    P.say(f"--quant int8: {args.lora_checkpoint} is RWKV-PEFT's, whose int8 is called legacy_int8 here; using that")
    return "legacy_int8"


def merge_to_model(args: argparse.Namespace) -> None:
    """The full model, in the format that --output's suffix names."""
    write = pick(FORMAT, "--output ends in", Path(args.output).suffix)
    write(Path(args.output), merge_files(TYPE[args.type][0], args.base_model, args.lora_init, args.lora_checkpoint,
                                         args.lora_alpha, quant_of(args), QUANT))
    P.say(f"merged: {args.output}")


def as_lora(init: dict[str, Tensor], trained: dict[str, Tensor], modules: list[str]) -> dict[str, Tensor]:
    """What PiSSA changed, as a LoRA of twice its rank and scale 1; exact where W_res was not quantised:

        W' - W = B A - B0 A0 = B' A',   A' = [A; A0] (2r,in),   B' = [B, -B0] (out,2r)

    In fp32, since A and A0 may differ by less than bf16 can tell; trained parts go along. The names are RWKV-PEFT's.
    """
    lora = dict(trained)
    for module in modules:
        A, B = (trained[f"{module}.lora_{x}"].float() for x in "AB")
        A0, B0 = (init[f"{module}.init_lora_{x}"].float() for x in "AB")
        lora |= {f"{module}.lora_A": torch.cat([A, A0]), f"{module}.lora_B": torch.cat([B, -B0], 1)}
    return lora


def apart(found: Tensor, wanted: Tensor) -> float:
    """The largest difference, as a share of the largest number wanted."""
    return ((found.float() - wanted.float()).abs().max() / wanted.float().abs().max().clamp_min(1e-30)).item()


def write_lora(args: argparse.Namespace) -> None:
    """`as_lora` from files to a file, without a description, as RWKV-PEFT's are. Says how near the model that it gives
    is to that of `merge_files`, which also checks that the files hold adapters and belong together.

    A quantised base is refused: there W' - W holds what quantising changed as well, and that is of full rank.
    """
    pick({".pth": save}, "--type pissa2lora: --output ends in", Path(args.output).suffix)
    init, about_init = P.read_described(args.lora_init, "--lora_init")
    trained, about = P.read_described(args.lora_checkpoint, "--lora_checkpoint")
    quant = (about_init | about).get("quant", args.quant or "none")
    if pick(QUANT, "--quant", quant).lossy:
        raise Fatal(f"--type pissa2lora: {args.lora_checkpoint} was trained on a base held as {quant}, and what that"
                    " changed is not a LoRA; --type pissa merges it")
    merged = merge_files("pissa", args.base_model, args.lora_init, args.lora_checkpoint, args.lora_alpha, args.quant,
                         QUANT)
    modules = [name.removesuffix(".lora_A") for name in trained if name.endswith(".lora_A")]
    lora = as_lora(init, trained, modules)
    again = P.merge(P.read_pth(args.base_model, "--base_model"), {}, lora, P.ADAPTER["lora"])
    rank, off, adapted = len(lora[f"{modules[0]}.lora_A"]), 0.0, {f"{module}.weight" for module in modules}
    for (name, wanted), (_, found) in zip(merged, again, strict=True):
        if name in adapted:
            off, dtype = max(off, apart(found, wanted)), wanted.dtype
    save(Path(args.output), lora)
    P.say(f"LoRA of rank {rank}, to be used with alpha {rank}: {args.output}\nMerged it is the model of --type pissa,"
          f" but for {off:.0e} of a matrix's largest number, by rounding to {dtype}")


# --type -> what was trained, what makes the file
TYPE = {name: (name, merge_to_model) for name, method in P.ADAPTER.items() if not method.whole}
TYPE |= {"disha": TYPE["bone"], "miss": TYPE["bone"], "pissa2lora": ("pissa", write_lora)}


def parser() -> argparse.ArgumentParser:
    p = Parser("merge.py", description=__doc__, allow_abbrev=False,
               formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--type", required=True, choices=list(TYPE),
                   help="what was trained; pissa2lora: PiSSA, to be written as a LoRA")
    p.add_argument("--base_model", required=True, help="the model that was adapted")
    p.add_argument("--lora_init", "--pissa_init", default="", help="PiSSA: init_pissa.pth of the run")
    p.add_argument("--lora_checkpoint", *(f"--{x}_checkpoint" for x in ("pissa", "bone", "peft", "state")),
                   required=True, help="rwkv-<N>.pth of the run")
    p.add_argument("--output", required=True, help="where the full model, or the LoRA, goes")
    p.add_argument("--quant", default="", help=f"what the base was held as: {', '.join(QUANT)}; our files know that")
    p.add_argument("--lora_alpha", type=float, help="LoRA: alpha; a checkpoint of pissa_rwkv knows its own")
    p.add_argument("--device", help=argparse.SUPPRESS)                # RWKV-PEFT's: where to compute, which is the CPU
    return p


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0; 2 after one line about what the user can fix; 130 after Ctrl-C."""
    try:
        args = parser().parse_args(argv)
        method, make = TYPE[args.type]
        if P.ADAPTER[method].layer.taken and not args.lora_init:
            raise Fatal("--lora_init is missing: PiSSA took a part out of the base, and init_pissa.pth says which")
        if Path(args.output).exists():
            raise Fatal(f"--output {args.output} exists already; name another file")
        if not Path(args.output).resolve().parent.is_dir():
            raise Fatal(f"--output {args.output}: no such folder {Path(args.output).parent}")
        make(args)
        return 0
    except KeyboardInterrupt:
        print("merge.py: stopped; nothing was written", file=sys.stderr)
        return 130
    except Exception as e:
        if not (error := P.in_one_line(e, "merging takes as much as a few matrices")):
            raise
    print(f"merge.py: error: {error}", file=sys.stderr)               # (now that the bar is gone with what failed)
    return 2


if __name__ == "__main__":
    sys.exit(main())
