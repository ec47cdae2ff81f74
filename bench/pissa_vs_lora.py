"""PiSSA beside LoRA on real text: a byte-level base that has read English prose learns Python code.

    python bench/pissa_vs_lora.py          # about 15 minutes on two CPU cores -> bench/results/pissa_vs_lora.json

Both texts come with Python: the prose of pydoc_data.topics, the code of the standard library. Rank, steps, seed and
data are the same for both methods; the learning rate is swept, because which of the two wins depends on it. A row:
method, learning rate, held-out loss of the base and after, the loss of every step. (Another Python release has other
texts, and so other figures.)
"""

import argparse
import json
import sysconfig
from pathlib import Path

import record

import pissa_rwkv as P

RATES = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2)


def texts(folder: Path) -> tuple[Path, Path]:
    """prose.txt and code.txt, written into `folder`."""
    from pydoc_data.topics import topics

    library = Path(sysconfig.get_path("stdlib"))
    prose, code = folder / "prose.txt", folder / "code.txt"
    folder.mkdir(parents=True, exist_ok=True)
    prose.write_text("\n".join(topics[name] for name in sorted(topics)), "utf-8")
    sources = "\n".join(p.read_text("utf-8", "replace") for p in sorted(library.glob("*.py")))
    code.write_text(sources[:2_000_000], "utf-8")
    return prose, code


def run(cfg: P.Config) -> tuple[float, float, list[float]]:
    """Held-out loss before and after training, and the loss of every step."""
    job = P.build(cfg)
    before = P.evaluate(job.model, job.held_out)
    P.train(job)
    lines = [json.loads(line) for line in (job.folder / "loss_data.jsonl").read_text().splitlines()]
    return before, P.evaluate(job.model, job.held_out), [x["loss"] for x in lines if "loss" in x]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, default=Path("out/pissa_vs_lora"), help="must not hold earlier runs")
    parser.add_argument("--base_steps", type=int, default=1200)
    parser.add_argument("--steps", type=int, default=60)
    args = parser.parse_args()
    prose, code = texts(args.folder)
    common = P.Config(data_type="utf-8", tokenizer="byte", vocab_size=256, ctx_len=256, micro_bsz=16, grad_cp="0",
                      val_split=0.03, warmup_steps=5)
    base = P.replace(common, peft="none", n_layer=3, n_embd=128, data_file=str(prose), epoch_steps=args.base_steps,
                     lr_init=4e-3, lr_final=2e-4, proj_dir=str(args.folder / "base"))
    _, after, _ = run(base)
    rows = [{"method": "base on prose", "lr": base.lr_init, "steps": args.base_steps, "after": after}]
    for lr in RATES:
        for method in ("pissa", "lora"):
            cfg = P.replace(common, peft=method, rank=8, lora_alpha=8.0, lr_init=lr, lr_final=lr / 10,
                            load_model=str(args.folder / "base" / "rwkv-0.pth"), data_file=str(code),
                            epoch_steps=args.steps, proj_dir=str(args.folder / f"{method}-{lr:g}"))
            before, after, losses = run(cfg)
            rows.append({"method": method, "lr": lr, "rank": 8, "steps": args.steps, "before": before, "after": after,
                         "losses": [round(x, 4) for x in losses]})
            print(f"{method:<6} lr {lr:<8g} held out {before:.4f} -> {after:.4f}")
    print(record.write("pissa_vs_lora", rows))


if __name__ == "__main__":
    main()
