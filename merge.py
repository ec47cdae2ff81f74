"""Merges adapters into their base model: a full .pth that every program of the RWKV world opens.

    python merge.py --type pissa --base_model M.pth --lora_init out/init_pissa.pth --lora_checkpoint out/rwkv-0.pth \\
                    --output merged.pth
    python merge.py --type lora  --base_model M.pth --lora_checkpoint out/rwkv-0.pth --lora_alpha 32 --output merged.pth

An output named .st is written for web-rwkv, Ai00 and RWKV Runner (extra `export`). Adapters trained on a quantised base
are merged into what was trained on: ours say what that was, for RWKV-PEFT's --quant does. The formula is
`pissa_rwkv.merge`; here are its command line, that format, and RWKV-PEFT's old int8.
"""

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor

import pissa_rwkv as P
from pissa_rwkv import Fatal, Parser, merge_files, pick, save, write_whole

LOW_RANK = tuple(f".{m}{i}" for m in "wavg" for i in "12")  # stored (in,out); web-rwkv wants these as (out,in)


def save_st(path: Path, tensors: dict[str, Tensor]) -> None:
    """Safetensors as web-rwkv reads them: everything fp16, the low-rank factors of RWKV-7 transposed."""
    try:
        from safetensors.torch import save_file
    except ImportError:
        raise Fatal(f"--output {path}: .st needs the package safetensors: `pip install safetensors`") from None
    ready = {}
    for name, t in tensors.items():
        t = t.to(torch.float16)
        if not t.isfinite().all():
            raise Fatal(f"--output {path}: {name} has numbers beyond fp16's 65504; write a .pth")
        ready[name.lower()] = (t.transpose(-2, -1) if name.endswith(LOW_RANK) else t).contiguous()
    write_whole(path, lambda file: save_file(ready, file.name, metadata={"format": "pt"}))


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


def parser() -> argparse.ArgumentParser:
    p = Parser("merge.py", description=__doc__, allow_abbrev=False,
               formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--type", required=True, choices=[name for name, m in P.ADAPTER.items() if not m.whole],
                   help="what was trained")
    p.add_argument("--base_model", required=True, help="the model that was adapted")
    p.add_argument("--lora_init", "--pissa_init", default="", help="PiSSA: init_pissa.pth of the run")
    p.add_argument("--lora_checkpoint", *(f"--{x}_checkpoint" for x in ("pissa", "bone", "peft", "state")),
                   required=True, help="rwkv-<N>.pth of the run")
    p.add_argument("--output", required=True, help="where the full model goes")
    p.add_argument("--quant", default="", help=f"what the base was held as: {', '.join(QUANT)}; ours know that")
    p.add_argument("--lora_alpha", type=float, help="LoRA: alpha; a checkpoint of pissa_rwkv knows its own")
    return p


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0, or 2 after one line about what the user can mend."""
    try:
        args = parser().parse_args(argv)
        if P.ADAPTER[args.type].layer.taken and not args.lora_init:
            raise Fatal("--lora_init is missing: PiSSA took a part out of the base, and init_pissa.pth says which")
        if Path(args.output).exists():
            raise Fatal(f"--output {args.output} exists already; name another file")
        if not Path(args.output).resolve().parent.is_dir():
            raise Fatal(f"--output {args.output}: there is no folder {Path(args.output).parent}")
        merge_files(args.type, args.base_model, args.lora_init, args.lora_checkpoint, args.output, args.lora_alpha,
                    pick(FORMAT, "--output ends in", Path(args.output).suffix), args.quant, QUANT)
        print(f"merged: {args.output}")
        return 0
    except Fatal as e:
        print(f"merge.py: error: {' '.join(str(e).split())}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
