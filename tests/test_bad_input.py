"""What users get wrong. Each mistake gives one line that names the file or flag and a status of 2; no traceback, and no
file that was there is changed. A row of a table is: what is wrong, the options that do it, what the line must say.
"""

import errno
import hashlib
import io
import os
import pickle
import re
import resource
import shlex
import shutil
import struct
import subprocess
import sys
import tarfile
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import random_tensors
from PIL import Image

import merge
import pissa_rwkv as P
import wkv7_cuda.cuda

# Options of a small good run; those of a row come behind them and win.
GOOD = "--load_model m.pth --data_file d.jsonl --op torch --rank 4 --ctx_len 8 --micro_bsz 2 --epoch_steps 1"
NEW = GOOD.replace("--load_model m.pth", "--peft none --n_layer 1 --n_embd 64")
LOAD = "--adapter_load run/rwkv-0.pth"
MERGE = ("--type pissa --base_model m.pth --lora_init run/init_pissa.pth --lora_checkpoint run/rwkv-0.pth"
         " --output merged.pth")
PLAIN = "--lora_init plain/init_pissa.pth --lora_checkpoint plain/rwkv-0.pth"


class Code:
    """A pickle of this writes a file when it is loaded carelessly."""

    def __reduce__(self):
        return os.system, ("touch the-code-was-run",)


def index(sizes, code=8, itemsize=2, version=1, magic=b"MMIDIDX\0\0"):
    offsets = [itemsize * sum(sizes[:i]) for i in range(len(sizes))]
    return magic + struct.pack(f"<QBQQ{len(sizes)}i{len(sizes)}q{len(sizes) + 1}q", version, code, len(sizes),
                               len(sizes) + 1, *sizes, *offsets, *range(len(sizes) + 1))


def write_models(good):
    """Model files with one thing wrong, made from the good one."""
    def model(name, **changes):
        tensors = {k.replace(".", "_"): (k, t) for k, t in good.items()}
        for key, change in changes.items():
            tensors[key] = (tensors[key][0], change(tensors[key][1])) if key in tensors else (key, change(None))
        torch.save({k: t for k, t in tensors.values() if t is not None}, f"{name}.pth")

    key = "blocks_1_att_key_weight"
    model("missing", blocks_1_att_x_r=lambda t: None)
    model("unknown", extra=lambda t: torch.zeros(2))
    model("gap", **{k.replace(".", "_"): lambda t: None for k in good if k.startswith("blocks.0.ffn")},
          **{k.replace(".", "_"): lambda t: None for k in good if k.startswith("blocks.1")},
          **{"blocks.2.ln1.weight": lambda t: torch.ones(64)})
    model("no-emb", emb_weight=lambda t: None)
    model("shape", blocks_0_att_value_weight=lambda t: t[:32])
    model("narrow", blocks_0_att_key_weight=lambda t: t[:32])
    model("flat-r_k", blocks_1_att_r_k=lambda t: t.flatten())
    model("heads-of-64", blocks_1_att_r_k=lambda t: torch.ones(2, 64))
    model("flat-v1", blocks_1_att_v1=lambda t: t.flatten())
    model("integers", **{key: lambda t: t.int()})
    model("sparse", **{key: lambda t: t.to_sparse()})
    model("beyond-fp16", emb_weight=lambda t: 1e6 * t)
    model("nan", **{key: lambda t: t * torch.nan})
    model("number", extra=lambda t: 3)
    torch.save({**good, 5: torch.zeros(1)}, "int-key.pth")
    torch.save({"state_dict": good}, "wrapped.pth")
    torch.save(list(good.values()), "list.pth")
    torch.save({}, "empty-dict.pth")
    torch.save({**good, "x": Code()}, "code.pth")
    torch.save(good, "old.pth", _use_new_zipfile_serialization=False)
    torch.save({k.replace("x_r", "time_maa_x").replace("x_w", "time_maa_w1").replace("x_k", "gate.weight"): t
                for k, t in good.items()}, "x060.pth")
    torch.save({"weight": torch.zeros(2)}, "other.pth")
    torch.save(random_tensors(n_embd=128), "wide.pth")
    torch.save(random_tensors(seed=9), "another.pth")
    torch.save(random_tensors(head_size=32), "heads-of-32.pth")
    model("float8", **{key: lambda t: t.to(torch.float8_e4m3fn)})
    model("meta", **{key: lambda t: t.to("meta")})
    model("repeated", emb_weight=lambda t: torch.zeros(1, 1).expand(2**30, 64))
    write_zips()
    os.mkfifo("pipe.jsonl")
    Path("code.pkl").write_bytes(pickle.dumps(Code()))
    Path("empty.pth").touch()
    Path("text.pth").write_text("hello\n")
    Path("page.pth").write_text("<!DOCTYPE html><html>404</html>")
    Path("st.pth").write_bytes(struct.pack("<Q", 2) + b"{}")
    Path("utf-16.txt").write_bytes("a text".encode("utf-16le"))
    Path("json.pth").write_text('{"error": "not found"}')
    Path("lfs.pth").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    data = Path("m.pth").read_bytes()
    for name, size in {"4": 4, "100": 100, "half": len(data) // 2, "last": len(data) - 1}.items():
        Path(f"cut-{name}.pth").write_bytes(data[:size])
    at = data.index(good["head.weight"].numpy().tobytes())
    Path("flipped.pth").write_bytes(data[: at + 999] + bytes([data[at + 999] ^ 4]) + data[at + 1000:])
    method = data.rindex(b"PK\1\2") + 10  # in the zip's directory: "stored" becomes "deflated"
    Path("flipped-method.pth").write_bytes(data[:method] + bytes([data[method] ^ 8]) + data[method + 1:])


def write_zips():
    """The good model, zipped in another way or with another pickle in it; the checksums are right."""
    for name, method, pickled in (("compressed", zipfile.ZIP_DEFLATED, None),
                                  ("hungry", zipfile.ZIP_STORED, b"\x80\x02c__builtin__\nbytearray\n\x8a\x05" + bytes(4)
                                   + b"\x10\x85R."),
                                  ("brackets", zipfile.ZIP_STORED, b"\x80\x02" + b"(" * 100_000 + b".")):
        with zipfile.ZipFile("m.pth") as old, zipfile.ZipFile(f"{name}.pth", "w", method) as new:
            for item in old.namelist():
                new.writestr(item, pickled if pickled and item.endswith("data.pkl") else old.read(item))


def write_corpora():
    def pair(name, idx, bin):
        for suffix, data in ((".idx", idx), (".bin", bin)):
            if data is not None:
                Path(name + suffix).write_bytes(data)

    six = struct.pack("<6H", 1, 2, 0, 3, 4, 0)
    pair("no-idx", None, six)
    pair("no-bin", index([3, 3]), None)
    pair("other-idx", index([3, 4]), six)
    pair("odd", index([3, 3]), six + b"\0")
    pair("magic", index([3, 3], magic=b"MMIDIDX\0\1"), six)
    pair("version", index([3, 3], version=2), six)
    pair("floats", index([3, 3], code=6), six)
    pair("short-idx", index([3, 3])[:-5], six)
    pair("stub-idx", index([3, 3])[:20], six)
    pair("negative", index([7, -1]), six)
    pair("no-items", index([]), b"")
    pair("no-tokens", index([0]), b"")
    pair("ones", index([1, 1, 1]), struct.pack("<3H", 0, 0, 0))
    pair("outside", index([3, 3]), struct.pack("<6H", 1, 2, 0, 3, 300, 0))
    pair("below", index([3], code=4, itemsize=4), struct.pack("<3i", 1, -2, 0))
    for name, data in {
        "no-json": b'{"text": "good"}\n{"text": oops}\n', "no-text": b'{"text": "good"}\n{"content": "x"}\n',
        "number": b'{"text": 5}\n', "array": b'["text"]\n', "latin1": '{"text": "caf\u00e9"}\n'.encode("latin-1"),
        "surrogate": b'{"text": "good"}\n{"text": "\\ud800"}\n', "deep": b"[" * 100_000, "nothing": b"",
        "blank": b"\n \n", "one-token": b'{"text": ""}\n{"text": ""}\n', "short": b'{"text": "abc"}\n',
        "half-sft": b'{"question": "Q"}\n',
        "zero": b'{"text": "a"}\n{"text": "b\\u0000c"}\n',
        "by-tool": b'{"m": [{"role": "user", "content": "Q"}, {"role": "tool", "content": "A"}]}\n',
        "in-parts": b'{"m": [{"role": "user", "content": [{"type": "text"}]}]}\n', "not-said": b'{"m": ["Hi"]}\n',
        "null": b'{"text": null}\n', "one": b'{"text": "hello"}\n',
    }.items():  # fmt: skip
        Path(f"{name}.jsonl").write_bytes(data)
    Path("items.json").write_text('[{"text": "a"}, 5]')
    Path("lists.jsonl").write_text('[{"role": "user"}]\n[{"role": "user"}]\n')
    Path("typo.json").write_text('[{"text": "a"},\n {"text": "b"\n]')
    Path("half.json").write_text('[{"text": "a \\ud800"}]')
    Path("latin1.txt").write_bytes("caf\u00e9".encode("latin-1"))
    Path("empty.txt").touch()
    Path("be16.txt").write_bytes("text".encode("utf-16-be").join([b"\xfe\xff", b""]))
    Path("odd16.txt").write_bytes("text".encode("utf-16-le") + b"x")
    Path("half-pair.txt").write_bytes(b"a\0" + struct.pack("<H", 0xD83D) + b"b\0")
    write_arrays()
    write_shards()
    Path("vocab.txt").write_text("1 'a' 1\n2 'b' 5\n")
    Path("vocab-part.txt").write_text("1 'a' 1\n2 'b' 1\n")
    Path("vocab-code.txt").write_text("1 __import__('os').system('touch the-code-was-run') 1\n")
    bytes_ = "".join(f"{b + 1} {bytes([b])!r} 1\n" for b in range(256))
    Path("vocab-minus.txt").write_text(f"{bytes_}-5 'ab' 2\n")
    Path("there.bin").touch()
    Path("there.jsonl").write_text('{"text": "a"}\n')


def write_arrays():
    good = np.array([1, 2, 0, 3, 4, 0], np.uint16)
    for name, array in {"good": good, "floats": good * 1.0, "nans": good * np.nan, "table": good.reshape(2, 3),
                        "number": good[0], "none": good[:0], "above": good + 254, "negative": good.astype("i4") - 2,
                        "huge": good.astype("i8") << 40, "texts": good.astype(str)}.items():
        np.save(f"{name}.npy", array)
    np.save("ids.npy", np.array([5, 70_000, 3]))
    np.save("pickled.npy", np.array([Code()], object), allow_pickle=True)
    np.savez("zipped.npz", good)
    Path("code.npy").write_bytes(pickle.dumps(Code()))
    Path("zipped.npz").rename("zipped.npy")
    data = Path("good.npy").read_bytes()
    Path("cut.npy").write_bytes(data[:-3])
    Path("cut-header.npy").write_bytes(data[:40])
    Path("header.npy").write_bytes(data[:10] + b"(" * (len(data) - 22) + data[-12:])
    Path("text.npy").write_text("1 2 3")
    Path("empty.npy").touch()
    Path("odd.u16").write_bytes(data[-11:])
    Path("raw.bin").write_bytes(data[-12:])
    Path("above.u16").write_bytes(struct.pack("<2H", 7, 300))
    Path("empty.u16").touch()


def write_shards():
    def tar(name, **files):
        with tarfile.open(name, "w") as archive:
            for member, data in files.items():
                info = tarfile.TarInfo(member.replace("_", "."))
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))

    def image(mode, value):
        Image.new(mode, (2, 2), value).save(file := io.BytesIO(), "PNG")
        return file.getvalue()

    Path("no-shards").mkdir()
    tar("img-0.tar", a_png=image("L", 7))
    tar("deep.tar", a_png=image("I;16", 700))
    tar("text-img.tar", a_png=image("L", 7), b_jpg=b"no image")
    tar("cut-img.tar", a_png=image("L", 7)[:-30])
    tar("no-img.tar", a_txt=b"only a caption")
    tar("no-members.tar")
    data = Path("img-0.tar").read_bytes()
    Path("cut.tar").write_bytes(data[:520])
    Path("text.tar").write_text("hello")
    Path("empty.tar").touch()


def describe_anew(file, tensors, about, **items):
    P.save(file, tensors, about | items)


def write_runs():
    """run: a finished one; and copies of it in which one file is not right."""
    assert P.main(shlex.split(f"{GOOD} --proj_dir run --epoch_steps 2 --save_steps 1")) == 0
    assert P.main(shlex.split(f"{GOOD} --proj_dir run-seed --random_seed 5")) == 0
    assert P.main(shlex.split(f"{GOOD} --proj_dir run-lora --peft lora")) == 0
    resume = Path("run/resume.pth").read_bytes()
    tensors, about = P.read_described("run/resume.pth", "")
    for name, write in {
        "cut": lambda f: f.write_bytes(resume[: len(resume) // 2]),
        "flipped": lambda f: f.write_bytes(resume.replace(b"PK\3\4", b"PK\3\5", 3)),
        "model": lambda f: shutil.copy("m.pth", f),
        "step": lambda f: describe_anew(f, tensors, about, step="1"),
        "text": lambda f: describe_anew(f, tensors, about, dtype="float4"),
        "nan": lambda f: P.save(f, {**tensors, "v": tensors["v"] * torch.nan}, about),
        "short": lambda f: P.save(f, {**tensors, "v": tensors["v"][:5]}, about),
        "rng": lambda f: P.save(f, {**tensors, "rng": tensors["rng"][:, :99]}, about),
        "t": lambda f: P.save(f, {**tensors, "t": torch.tensor(-1)}, about),
        "no-m": lambda f: P.save(f, {k: t for k, t in tensors.items() if k != "m"}, about),
        "init": lambda f: shutil.copy("run-seed/init_pissa.pth", f.with_name("init_pissa.pth")),
        "no-init": lambda f: f.with_name("init_pissa.pth").unlink(),
    }.items():
        shutil.copytree("run", f"run-{name}", ignore=shutil.ignore_patterns("resume.1.pth"))  # nothing to fall back on
        write(Path(f"run-{name}/resume.pth"))
    tensors, about = P.read_described("run/rwkv-0.pth", "")
    describe_anew(Path("run-method.pth"), tensors, about, peft="dora")
    describe_anew(Path("run-rank.pth"), tensors, about, rank=0)
    P.save(Path("run-lacking.pth"), tensors, about)
    with zipfile.ZipFile("run-lacking.pth") as whole, zipfile.ZipFile("lacking.pth", "w") as lacking:
        torch.save({k: t for k, t in tensors.items() if k != "blocks.0.ln0.weight"}, part := io.BytesIO())
        for name in (old := zipfile.ZipFile(part)).namelist():
            lacking.writestr(name, old.read(name))
        lacking.writestr(P.DESCRIPTION, whole.read(P.DESCRIPTION))
    # As RWKV-PEFT writes them: without a description.
    Path("plain").mkdir()
    for name in ("init_pissa.pth", "rwkv-0.pth"):
        torch.save(P.read_pth(f"run/{name}", ""), f"plain/{name}")
    lora = P.read_pth("run-lora/rwkv-0.pth", "")
    torch.save(lora, "plain/lora.pth")
    torch.save({k: t + 1e20 for k, t in lora.items()}, "plain/large.pth")
    Path("merged").mkdir()
    shutil.copy("m.pth", "merged/rwkv-0-merged.pth")
    Path("logged").mkdir()
    shutil.copy("run/loss_data.jsonl", "logged")
    only_A = {k: t for k, t in P.read_pth("plain/rwkv-0.pth", "").items() if not k.endswith("lora_B")}
    torch.save(only_A, "plain/only-A.pth")
    torch.save({"blocks.0.att.time_state": torch.zeros(1, 64, 64)}, "half-state.pth")
    torch.save({f"blocks.{i}.att.time_state": torch.zeros(1, 128, 128) for i in range(2)}, "wide-state.pth")
    torch.save({"blocks.0.att.key.bone": torch.zeros(4, 64)}, "bone.pth")
    torch.save({"blocks.0.att.key.bone": torch.zeros(4, 128)}, "wide-bone.pth")
    torch.save({"blocks.0.att.key.bone": torch.zeros(64)}, "flat-bone.pth")
    torch.save({f"blocks.0.att.key.lora_{x}": torch.zeros(s) for x, s in {"A": (0, 64), "B": (64, 0)}.items()}, "0.pth")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """The folder in which the commands are typed: a good model, a good corpus, and everything bad."""
    folder, before = tmp_path_factory.mktemp("bad input"), Path.cwd()
    os.chdir(folder)
    good = random_tensors()
    torch.save(good, "m.pth")
    Path("d.jsonl").write_text('{"text": "some text that is long enough"}\n' * 4)
    Path("a-file").write_text("x")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        write_models(good)
    write_corpora()
    write_runs()
    yield folder
    os.chdir(before)


def contents(folder):
    return {p: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*") if p.is_file()}


def check_line(place, capfd, call, words, program="pissa_rwkv"):
    """Calls, and looks at what the user sees and at what is left."""
    before = contents(place)
    capfd.readouterr()
    status = call()
    out, err = capfd.readouterr()
    assert status == 2, out
    err = re.sub(r"[^\r\n]*\d+%\|[^\r\n]*|\r", "", err).lstrip()            # without progress bars
    assert re.fullmatch(rf"{program}: error: [^\n]+\n", err), err
    assert all(word in err for word in words.split("|")), err
    assert "Traceback" not in out
    after = contents(place)
    assert {path: after.get(path) for path in before} == before, "a file was changed or removed"
    assert not [p for p in after if p.name.endswith(".part") or p.name == "the-code-was-run"]


MODEL = [  # (what is wrong, options, words in the line)
    ("no such model", "--load_model nope.pth", "--load_model nope.pth|no such file|another.pth"),
    ("no model at all", "--load_model ''", "--load_model"),
    ("folder as model", "--load_model run", "--load_model run|folder|; in it: init_pissa.pth"),
    ("empty file", "--load_model empty.pth", "empty.pth|empty"),
    ("text", "--load_model text.pth", "text.pth|not a .pth"),
    ("web page", "--load_model page.pth", "page.pth|web page"),
    ("JSON", "--load_model json.pth", "json.pth|JSON"),
    ("git-lfs pointer", "--load_model lfs.pth", "lfs.pth|git lfs pull"),
    ("cut to 4 bytes", "--load_model cut-4.pth", "cut-4.pth|truncated"),
    ("cut to 100 bytes", "--load_model cut-100.pth", "cut-100.pth|truncated"),
    ("cut in half", "--load_model cut-half.pth", "cut-half.pth|truncated"),
    ("one byte missing", "--load_model cut-last.pth", "cut-last.pth|truncated"),
    ("a bit flipped", "--load_model flipped.pth", "flipped.pth|checksum"),
    ("a bit flipped in the zip's directory", "--load_model flipped-method.pth", "flipped-method.pth"),
    ("code in a zip", "--load_model code.pth", "code.pth|none of it was run"),
    ("compressed, so that it cannot be mapped", "--load_model compressed.pth", "compressed.pth|compressed"),
    ("a pickle that asks for 64 GB", "--load_model hungry.pth", "hungry.pth|none of it was run"),
    ("a pickle of 100,000 brackets", "--load_model brackets.pth", "brackets.pth|cannot be read"),
    ("numbers of 8 bits", "--load_model float8.pth", "float8.pth|blocks.1.att.key.weight|float8_e4m3fn"),
    ("beyond the precision", "--load_model beyond-fp16.pth --precision fp16", "beyond-fp16.pth|emb.weight|float16"),
    ("a tensor without numbers", "--load_model meta.pth", "meta.pth|blocks.1.att.key.weight"),
    ("one number a billion times", "--load_model repeated.pth", "repeated.pth|emb.weight"),
    ("code in a plain pickle", "--load_model code.pkl", "code.pkl|plain pickle"),
    ("format of torch before 1.6", "--load_model old.pth", "old.pth|torch before 1.6"),
    ("wrapped in a dict", "--load_model wrapped.pth", "wrapped.pth|state_dict"),
    ("a list", "--load_model list.pth", "list.pth|list"),
    ("an empty dict", "--load_model empty-dict.pth", "empty-dict.pth|empty dict"),
    ("a number among the tensors", "--load_model number.pth", "number.pth|'extra': int"),
    ("a key that is no name", "--load_model int-key.pth", "int-key.pth|5"),
    ("another program's model", "--load_model other.pth", "other.pth|not an RWKV model"),
    ("an adapter file", "--load_model run/rwkv-0.pth", "run/rwkv-0.pth|a run's adapters, for --adapter_load"),
    ("an init file", "--load_model run/init_pissa.pth", "run/init_pissa.pth|--adapter_init"),
    ("a file to resume from", "--load_model run/resume.pth", "run/resume.pth|--resume"),
    ("safetensors", "--load_model st.pth", "st.pth|safetensors|.pth beside it"),
    ("a text in UTF-16 without a mark", "--data_file utf-16.txt", "utf-16.txt|the character 0|UTF-16"),
    ("RWKV-6", "--load_model x060.pth", "x060.pth|x060|x070"),
    ("a key missing", "--load_model missing.pth", "missing.pth|missing blocks.1.att.x_r"),
    ("a key missing, to a dry run", "--load_model missing.pth --dry_run", "missing.pth|missing blocks.1.att.x_r"),
    ("a key too many", "--load_model unknown.pth", "unknown.pth|unexpected extra"),
    ("no embedding", "--load_model no-emb.pth", "no-emb.pth|emb.weight"),
    ("a layer missing", "--load_model gap.pth", "gap.pth|[0, 2]"),
    ("wrong shape", "--load_model shape.pth", "shape.pth|blocks.0.att.value.weight|[32, 64]|[64, 64]"),
    ("layer 0 too narrow", "--load_model narrow.pth", "narrow.pth"),
    ("more heads than fit", "--load_model heads-of-64.pth", "heads-of-64.pth|64 wide|2 heads of 64"),
    ("r_k with one dimension", "--load_model flat-r_k.pth", "flat-r_k.pth|r_k"),
    ("v1 with one dimension", "--load_model flat-v1.pth", "flat-v1.pth|v1"),
    ("integers", "--load_model integers.pth", "integers.pth|int32"),
    ("a sparse tensor", "--load_model sparse.pth", "sparse.pth|blocks.1.att.key.weight"),
    ("NaN in a matrix", "--load_model nan.pth", "blocks.1.att.key"),
    ("wrong n_layer", "--n_layer 12", "--n_layer 12|m.pth|n_layer 2"),
    ("wrong n_embd", "--n_embd 768", "--n_embd 768|n_embd 64"),
    ("wrong vocab_size", "--vocab_size 65536", "--vocab_size 65536|vocab_size 256"),
    ("wrong version", "--my_testing x060", "--version x060|x070"),
    ("rank 0", "--rank 0", "--rank 0|1 to 64"),
    ("rank larger than the matrix", "--rank 65", "--rank 65|64 x 64|1 to 64"),
    ("rank larger, dry run", "--rank 65 --dry_run", "--rank 65|1 to 64"),
]
OPTIONS = [
    ("unknown flag", "--rnak 8", "--rnak|did you mean --rank"),
    ("unknown flag with =", "--lr-init=1", "--lr-init|did you mean --lr_init"),
    ("a flag without a name", "--=1", "unknown option --=1; --help"),
    ("stray word", "m.pth", "m.pth"),
    ("not a whole number", "--rank many", "--rank|many"),
    ("not a number", "--lr_init fast", "--lr_init|fast"),
    ("not a switch", "--data_shuffle 2", "--data_shuffle|2"),
    ("value missing", "--rank", "--rank"),
    ("bad JSON", """--pissa_config '{"pissa_r": 8'""", "--pissa_config|JSON"),
    ("bad JSON on two lines", """--pissa_config '{"pissa_r": 8,\n"x'""", "--pissa_config|JSON"),
    ("JSON that is no object", "--pissa_config '[8]'", "--pissa_config|[8]"),
    ("unknown key in JSON", """--pissa_config '{"pissa_rank": 8}'""", "--pissa_config|pissa_rank|did you mean pissa_r"),
    ("wrong type in JSON", """--pissa_config '{"pissa_r": "big"}'""", "--pissa_config|pissa_r|big"),
    ("bad lora_config", """--peft lora --lora_config '{"r": 8}'""", "--lora_config|'r'|lora_r"),
    ("unknown peft", "--peft dora", "--peft dora|'pissa'"),
    ("unknown mode of bone", "--peft bone --bone_mode row", "--bone_mode row|'bat'"),
    ("bad bone_config", """--peft bone --bone_config '{"bone_rank": 8}'""", "--bone_config|bone_rank|bone_r"),
    ("unknown mode in disha_config", """--peft disha --disha_config '{"mode": "row"}'""", "--bone_mode row|'bone'"),
    ("a rank that bat has no blocks of", "--peft bone --bone_mode bat --rank 5", "--rank 5|64 x 64|1, 2, 4, 8, 16"),
    ("a rank of bone beyond the width", "--peft bone --rank 65", "--rank 65|64 x 64|from 1 to 64"),
    ("state without a base", "--load_model '' --peft state", "--load_model|--peft state"),
    ("some parts without a base", "--load_model '' --peft none --train_parts ln", "--load_model|--peft none"),
    ("nothing at all", "--peft none --train_parts", "nothing is trained"),
    ("unknown quant", "--quant nf5", "--quant nf5|'none'|did you mean nf4"),
    ("quant without anything frozen", "--quant nf4 --peft none", "--quant nf4|--peft none|frozen"),
    ("no SVD at all", "--quant nf4 --qpissa_iters 0", "--qpissa_iters 0|from 1 to 5"),
    ("nine SVDs", "--qpissa_iters 9", "--qpissa_iters 9|from 1 to 5"),
    ("a start fitted to no quantisation", "--qpissa_iters 2", "--qpissa_iters 2|--quant none"),
    ("a start of LoRA fitted", "--qpissa_iters 2 --quant nf4 --peft lora", "--qpissa_iters 2|--peft lora"),
    ("unknown op", "--op metal", "--op metal|'chunk'"),
    ("op cpu for narrow heads", "--load_model heads-of-32.pth --op cpu", "--op cpu|of 64 channels|have 32|use chunk"),
    ("op cuda without a GPU", "--op cuda", "--op cuda|GPU"),
    ("unknown strategy", "--strategy fsdp", "--strategy fsdp|'ddp'"),
    ("unknown precision", "--precision fp8", "--precision fp8|'bf16'"),
    ("unknown accelerator", "--accelerator tpu", "--accelerator tpu|'cpu'"),
    ("no GPU", "--accelerator gpu", "--accelerator gpu|cpu"),
    ("a negative number of devices", "--devices -1", "--devices -1"),
    ("a head that copies backwards", "--head_qk -1", "--head_qk -1"),
    ("parts that are numbers", "--train_parts '[1]'", "--train_parts 1"),
    ("an endless rank", """--pissa_config '{"pissa_r": 1e999}'""", "pissa_r"),
    ("an init for LoRA", "--peft lora --adapter_init m.pth", "pissa_init|lora"),
    ("two kinds of validation", "--val_file d.jsonl --val_split 0.1", "--val_split|--val_file"),
    ("state tuning in cut chunks", "--peft state --train_type infctx --chunk_ctx 4", "--chunk_grad truncated|full"),
    ("unknown schedule", "--lr_schedule step", "--lr_schedule step|'wsd'"),
    ("unknown sampler", "--dataload random", "--dataload random|'get'"),
    ("unknown mask", "--loss_mask q", "--loss_mask q|'qa'"),
    ("unknown train part", "--train_parts lnx", "--train_parts lnx|'ln'"),
    ("an open list", "--train_parts '[\"ln\"'", "--train_parts|no closing bracket"),
    ("unknown tokenizer", "--tokenizer bpe", "--tokenizer bpe|'world'"),
    ("unknown data type", "--data_type csv", "--data_type csv|'binidx'"),
    ("se without mask_id", "--loss_mask se", "--mask_id"),
    ("se with half a mask_id", """--loss_mask se --mask_id '{"mask1": "a"}'""", "--mask_id|mask0"),
    ("no steps", "--epoch_count 0", "--epoch_count 0|1"),
    ("no rows", "--micro_bsz 0", "--micro_bsz 0|1"),
    ("negative ctx_len", "--ctx_len -3", "--ctx_len -3|1"),
    ("unknown train_type", "--train_type chunks", "--train_type chunks|'infctx'"),
    ("train_type state without states", "--train_type state --peft lora", "--train_type state|--peft state|lora"),
    ("products of all chunks", "--train_type infctx --chunk_grad full --grad_cp products", "--grad_cp products|0 or 1"),
    ("compiling a loop", "--compile 1 --op torch", "--compile 1|--op torch|chunk"),
    ("unknown grad_cp", "--grad_cp 2", "--grad_cp 2|'products'|'auto'"),
    ("adam_eps 0", "--adam_eps 0", "--adam_eps 0.0|a number above 0 to 1e9"),
    ("infinite rate", "--lr_init inf", "--lr_init inf|from 0 to 1e9"),
    ("unknown chunk_grad", "--train_type infctx --chunk_grad half", "--chunk_grad half|'full'"),
    ("chunks longer than rows", "--train_type infctx --chunk_ctx 9", "--chunk_ctx 9|--ctx_len 8"),
    ("negative chunks", "--train_type infctx --chunk_ctx -1", "--chunk_ctx -1"),
    ("negative save_steps", "--save_steps -1", "--save_steps -1"),
    ("negative lr", "--lr_init -1", "--lr_init -1|from 0 to 1e9"),
    ("lr that is no number", "--lr_init nan", "--lr_init nan"),
    ("infinite lr", "--lr_final inf", "--lr_final inf"),
    ("clipping at no number", "--grad_clip nan", "--grad_clip nan"),
    ("beta1 of 1", "--beta1 1", "--beta1 1"),
    ("beta2 of 1", "--beta2 1", "--beta2 1"),
    ("adam_eps of 0", "--adam_eps 0", "--adam_eps 0"),
    ("decay_frac of 0", "--lr_schedule wsd --decay_frac 0", "--decay_frac 0"),
    ("dropout of 2", "--peft lora --lora_dropout 2", "--lora_dropout 2"),
    ("negative svd_niter", "--svd_niter -1", "--svd_niter -1"),
    ("negative epoch of a whole model", "--peft none --epoch_begin -1", "--epoch_begin -1: expected a number from 0"),
    ("negative seed", "--random_seed -1", "--random_seed -1"),
    ("val_split of 1", "--val_split 1", "--val_split 1"),
    ("negative val_split", "--val_split -0.1", "--val_split -0.1"),
    ("pissa_load without pissa_init", "--adapter_load run-rank.pth", "pissa_load|pissa_init|--adapter_init"),
    ("a rank of 400 digits", f"--pissa_config '{{\"pissa_r\": 1{400 * '0'}}}'", "--pissa_config|pissa_r is 1000"),
    ("a rank of 5000 digits", f"--pissa_config '{{\"pissa_r\": 1{5000 * '0'}}}'", "--pissa_config|4300"),
    ("a rank that is true", "--pissa_config '{\"pissa_r\": true}'", "--pissa_config|pissa_r is True"),
    ("two ranks", "--pissa_config '{\"pissa_r\": 4, \"pissa_r\": 8}'", "--pissa_config|'pissa_r' appears twice"),
    ("two ranks by two options", """--pissa_config '{"pissa_r": 4}' --peft_config '{"r": 8}'""",
     "--peft_config: r is 8, but 4 is given for --rank"),
    ("two ranks by two keys", """--peft bone --bone_config '{"bone_r": 4, "r": 8}'""",
     "--bone_config: r is 8, but 4 is given for --rank"),
    ("brackets in JSON", f"--pissa_config {99999 * '['}", "--pissa_config|recursion"),
    ("half a character as a mark", """--loss_mask se --mask_id '{"mask0": "\\ud800", "mask1": "b"}'""", "--mask_id"),
    ("bytes that are no text", "--sample_prompt \udcff", "--sample_prompt|not valid UTF-8"),
    ("a billion billion rows", "--micro_bsz 1000000000000000000", "--micro_bsz 1000000000000000000|from 1 to 1e6"),
    ("a rate beyond all", "--lr_init 1e300", "--lr_init 1e+300|from 0 to 1e9"),
    ("files beyond number", "--keep 1000000000", "--keep 1000000000|from 1 to 999"),
]
OTHER_DEVICE = "--op cuda", "--op: wkv7 cuda|is on cpu, not cuda|--op chunk"
NEW_MODEL = [
    ("version that is not there", "--version x051", "--version x051|x070|x060|x052"),
    ("heads that do not fit", "--n_embd 100", "--n_embd 100|--head_size 64"),
    ("attention of another width", "--dim_att 128", "--dim_att 128"),
    ("negative layers", "--n_layer -1", "--n_layer -1"),
    ("negative width", "--n_embd -64", "--n_embd -64"),
    ("negative heads", "--head_size -64", "--head_size -64"),
    ("only channel mixing", "--version x060 --pre_ffn 1", "--pre_ffn 1|no memory|--n_layer 2"),
    ("heads of one channel", "--head_size 1", "--head_size 1|at least 2"),
    ("negative dim_ffn", "--dim_ffn -4", "--dim_ffn -4"),
    ("vocabulary below the data", "--vocab_size 10", "vocabulary of 10"),
    ("vocabulary of huge tokens", "--data_file huge.npy", "huge.npy|vocabulary of 1048576"),
    ("vocabulary of negative tokens", "--data_file negative.npy", "negative.npy|-1|position 0"),
]
DATA = [
    ("no such file", "--data_file nope.jsonl", "nope.jsonl|No such file"),
    ("no such validation file", "--val_file nope.jsonl", "nope.jsonl|No such file"),
    ("a folder without text", "--data_file no-shards --data_type utf-8", "no .txt or .md|'no-shards/**/*.txt'"),
    ("an empty folder", "--data_file no-shards", "no-shards|no .txt or .md or .jsonl or .json or .tar there"),
    ("a pattern without quotes", "--data_file one.jsonl null.jsonl", "'null.jsonl' belongs to no option|in quotes"),
    ("a table held out", "--val_file x.parquet", "--val_file x.parquet|pandas.read_parquet('x.parquet')"),
    ("a table", "--data_file x.parquet", "pandas.read_parquet('x.parquet')|--data_type sft|--sft_fields"),
    ("a name that says nothing", "--data_file nope", "--data_file nope|--data_type"),
    ("data_type without data_file", "--data_file '' --data_type jsonl", "--data_file"),
    ("no data_file", "--data_file ''", "--data_file"),
    (".idx missing", "--data_file no-idx --data_type binidx", "no-idx.idx"),
    (".bin missing", "--data_file no-bin", "no-bin.bin"),
    ("a .bin alone, maybe raw tokens", "--data_file raw.bin", "raw.idx|--data_type uint16"),
    ("npy of floats", "--data_file floats.npy", "floats.npy|[6]|float64|integers"),
    ("npy of NaN", "--data_file nans.npy", "nans.npy|float64"),
    ("npy of strings", "--data_file texts.npy", "texts.npy|<U5"),
    ("npy of two dimensions", "--data_file table.npy", "table.npy|[2, 3]|one dimension"),
    ("npy of one number", "--data_file number.npy", "number.npy|[]"),
    ("npy of nothing", "--data_file none.npy", "none.npy|[0]"),
    ("npy beyond the vocabulary", "--data_file above.npy", "above.npy|256|position 1"),
    ("npy of negative tokens", "--data_file negative.npy", "negative.npy|-1|position 0"),
    ("npy with code in it", "--data_file pickled.npy", "pickled.npy|not a .npy of tokens"),
    ("a pickle", "--data_file code.npy", "code.npy|not a .npy of tokens"),
    ("a .npz", "--data_file zipped.npy", "zipped.npy|not a .npy of tokens"),
    ("npy cut", "--data_file cut.npy", "cut.npy|damaged"),
    ("npy cut in its header", "--data_file cut-header.npy", "cut-header.npy|damaged"),
    ("npy with a header that does not end", "--data_file header.npy", "header.npy|damaged"),
    ("text as npy", "--data_file text.npy", "text.npy|not a .npy of tokens"),
    ("empty npy", "--data_file empty.npy", "empty.npy|not a .npy of tokens"),
    ("no such npy", "--data_file nope.npy", "nope.npy|No such file"),
    ("uint16 of odd size", "--data_file odd.u16 --data_type uint16", "odd.u16|11 bytes|two bytes"),
    ("uint16 of nothing", "--data_file empty.u16 --data_type uint16", "empty.u16|0 bytes"),
    ("uint16 beyond the vocabulary", "--data_file above.u16 --data_type uint16", "above.u16|token 300|position 1|256"),
    ("no such uint16", "--data_file nope.u16 --data_type uint16", "nope.u16|No such file"),
    ("UTF-16, high byte first", "--data_file be16.txt --data_type utf-16le", "be16.txt|big-endian"),
    ("UTF-16 of odd size", "--data_file odd16.txt --data_type utf-16le", "odd16.txt|UTF-16LE|byte 8"),
    ("UTF-16 with half a pair", "--data_file half-pair.txt --data_type utf-16le", "half-pair.txt|UTF-16LE|byte 2"),
    ("UTF-16 of nothing", "--data_file empty.txt --data_type utf-16le", "empty.txt|no text"),
    ("no tar", "--data_file text.tar", "text.tar|cannot be read as a tar"),
    ("an empty file as tar", "--data_file empty.tar", "empty.tar|cannot be read as a tar"),
    ("tar cut", "--data_file cut.tar", "cut.tar|cannot be read as a tar"),
    ("no such tar", "--data_file nope.tar", "nope.tar|No such file"),
    ("one shard missing", "--data_file img-{0..1}.tar", "img-1.tar|No such file"),
    ("shards counted down", "--data_file img-{1..0}.tar", "img-{1..0}.tar|no image"),
    ("no shard of that name", "--data_file nope-*.tar", "nope-*.tar|No such file"),
    ("a folder without shards", "--data_file no-shards --data_type wds_img", "no-shards|no .tar"),
    ("tar of nothing", "--data_file no-members.tar", "no-members.tar|no image"),
    ("tar without images", "--data_file no-img.tar", "no-img.tar|no image"),
    ("text as image", "--data_file text-img.tar", "text-img.tar|b.jpg is not an image"),
    ("image cut", "--data_file cut-img.tar", "cut-img.tar|a.png is not an image, or damaged"),
    ("image of 16 bits", "--data_file deep.tar", "deep.tar|a.png|8 bits"),
    ("images without pixels", "--data_file img-0.tar --img_side 0", "--img_side 0|1"),
    (".idx of another corpus", "--data_file other-idx", "other-idx.bin|12 bytes|7 tokens"),
    ("odd size", "--data_file odd", "odd.bin|13 bytes"),
    ("bad magic", "--data_file magic", "magic.idx"),
    ("version 2", "--data_file version", "version.idx|version 2"),
    ("float tokens", "--data_file floats", "floats.idx|type 6"),
    (".idx cut", "--data_file short-idx", "short-idx.idx"),
    (".idx cut in its header", "--data_file stub-idx", "stub-idx.idx"),
    ("negative length", "--data_file negative", "negative.idx"),
    ("no items", "--data_file no-items", "no-items.idx|empty"),
    ("items without tokens", "--data_file no-tokens", "no-tokens"),
    ("documents of one token", "--data_file ones", "ones|two tokens"),
    ("token outside the vocabulary", "--data_file outside", "outside|300|position 4|256"),
    ("negative token", "--data_file below", "below|-2|position 1"),
    ("a World corpus for a byte model", "--tokenizer world", "d.jsonl|vocabulary of 256"),
    ("a line that is no JSON", "--data_file no-json.jsonl", "no-json.jsonl|line 2|{\"text\": oops}"),
    ("a field missing", "--data_file no-text.jsonl", "no-text.jsonl|line 2|'text'|content"),
    ("a number for a text", "--data_file number.jsonl", "number.jsonl|line 1|'text'"),
    ("an array", "--data_file array.jsonl", "array.jsonl|item 1|it is a string"),
    ("not UTF-8", "--data_file latin1.jsonl", "latin1.jsonl|UTF-8|13"),
    ("text that is not UTF-8", "--data_file latin1.txt", "latin1.txt|UTF-8"),
    ("half a surrogate pair", "--data_file surrogate.jsonl", "surrogate.jsonl"),
    ("100,000 brackets", "--data_file deep.jsonl", "deep.jsonl|JSON list"),
    ("an empty file", "--data_file nothing.jsonl", "nothing.jsonl|no text"),
    ("blank lines only", "--data_file blank.jsonl", "blank.jsonl|no text"),
    ("an empty text", "--data_file empty.txt", "empty.txt|no text"),
    ("empty texts only", "--data_file one-token.jsonl", "one-token.jsonl|two tokens"),
    ("shorter than ctx_len", "--data_file short.jsonl --dataload get", "short.jsonl|4 tokens|--ctx_len 8"),
    ("sft without answers", "--data_file half-sft.jsonl --data_type sft", "half-sft.jsonl|line 1|'answer'"),
    ("sft with one field", "--data_file half-sft.jsonl --data_type sft --sft_fields question", "--sft_fields"),
    ("a text with a 0", "--data_file zero.jsonl", "zero.jsonl: line 2|character 0"),
    ("lists, a line each", "--data_file lists.jsonl --data_type sft", "lists.jsonl: line 1|it is a list|--sft_fields"),
    ("a list with a typo", "--data_file typo.json", "typo.json|JSON list|line 3 column 1"),
    ("an item that is no row", "--data_file items.json", "items.json|item 2|it is a number"),
    ("half a character in a list", "--data_file half.json", "half.json: item 1|incomplete character"),
    ("sft with no field", "--data_file half-sft.jsonl --data_type sft --sft_fields", "--sft_fields"),
    ("a conversation for a text", "--data_file by-tool.jsonl", "by-tool.jsonl|line 1|'text'|m (a list)|--sft_fields"),
    ("a message of a tool", "--data_file by-tool.jsonl --data_type sft --sft_fields m", "line 1|message 2|tool|'gpt'"),
    ("a message in parts", "--data_file in-parts.jsonl --data_type sft --sft_fields m", "message 1|content (a list)"),
    ("strings as messages", "--data_file not-said.jsonl --data_type sft --sft_fields m", "message 1|it is a string"),
    ("unknown dummy", "--data_file sums --data_type dummy", "--data_file sums|'base'"),
    ("no such vocabulary", "--tokenizer world --vocab_file nope.txt", "--vocab_file nope.txt"),
    ("a broken vocabulary", "--tokenizer world --vocab_file vocab.txt", "vocab.txt|line 2"),
    ("half a vocabulary", "--tokenizer world --vocab_file vocab-part.txt", "vocab-part.txt|254"),
    ("code in the vocabulary", "--tokenizer world --vocab_file vocab-code.txt", "vocab-code.txt|line 1"),
    ("a pipe", "--data_file pipe.jsonl", "--data_file pipe.jsonl|not a regular file"),
    ("a pipe as vocabulary", "--tokenizer world --vocab_file pipe.jsonl", "--vocab_file pipe.jsonl|not a regular file"),
    ("a vocabulary with -5", "--tokenizer world --vocab_file vocab-minus.txt", "vocab-minus.txt|line 257"),
    ("no text in the field", "--data_file null.jsonl", "null.jsonl|line 1|text (null)"),
    ("all of it held out", "--data_file one.jsonl --val_split 0.99", "one.jsonl|--val_split 0.99"),
    ("other tokens held out", "--val_file outside", "--val_file outside: token 300"),
    ("single tokens held out", "--val_file ones", "--val_file ones: no document|two tokens"),
    ("half a binidx held out", "--val_file raw.bin", "--val_file raw.bin: no such file raw.idx"),
    ("a pipe held out", "--val_file pipe.jsonl", "--val_file pipe.jsonl: not a regular file"),
    ("make_binidx of an array", "--make_binidx ids.npy", "--make_binidx ids.npy|numpy"),
    ("make_binidx of nothing", "--make_binidx nope.jsonl", "--make_binidx nope.jsonl|no such file"),
    ("make_binidx of a pattern", "--make_binidx '*.jsonl'", "--make_binidx *.jsonl|no such file or folder"),
    ("make_binidx onto a file", "--make_binidx there.jsonl", "there.bin|exists"),
]
RESULTS = [
    ("proj_dir below a file", "--proj_dir a-file/out", "--proj_dir a-file/out"),
    ("proj_dir is a file", "--proj_dir a-file", "--proj_dir a-file"),
    ("proj_dir holds a merged model", "--proj_dir merged", "--proj_dir merged|rwkv-0-merged.pth"),
    ("proj_dir holds a log", "--proj_dir logged", "--proj_dir logged|loss_data.jsonl"),
    ("resume.pth with half a random state", "--proj_dir run-rng --resume", "run-rng/resume.pth|not what this program"),
    ("resume.pth before its first step", "--proj_dir run-t --resume", "run-t/resume.pth|not what this program"),
    ("proj_dir holds a run", "--proj_dir run", "--proj_dir run|resume.pth|--resume"),
    ("resume on another base", "--proj_dir run --resume --load_model another.pth", "run/init_pissa.pth|base"),
    ("resume on a wider base", "--proj_dir run --resume --load_model wide.pth", "run/init_pissa.pth|base"),
    ("resume with another rank", "--proj_dir run --resume --rank 5", "run/init_pissa.pth|[4, 64]|[5, 64]|--rank"),
    ("resume with another method", "--proj_dir run --resume --peft lora", "run/resume.pth|peft pissa|lora"),
    ("resume with other trained parts", "--proj_dir run --resume --train_parts emb", "run/resume.pth"),
    ("resume with another init file", "--proj_dir run-init --resume", "run-init/resume.pth|init"),
    ("resume without the init file", "--proj_dir run-no-init --resume", "run-no-init/init_pissa.pth|no such file"),
    ("resume.pth cut", "--proj_dir run-cut --resume", "run-cut/resume.pth|truncated"),
    ("resume.pth damaged", "--proj_dir run-flipped --resume", "run-flipped/resume.pth"),
    ("resume.pth is a model", "--proj_dir run-model --resume", "run-model/resume.pth"),
    ("resume.pth with a step that is no number", "--proj_dir run-step --resume", "run-step/resume.pth|step '1'"),
    ("resume.pth with a dtype that is none", "--proj_dir run-text --resume", "run-text/resume.pth|dtype 'float4'"),
    ("resume.pth with NaN", "--proj_dir run-nan --resume", "run-nan/resume.pth|v holds NaN"),
    ("resume.pth with half a moment", "--proj_dir run-short --resume", "run-short/resume.pth|not what this program"),
    ("resume.pth lacks a moment", "--proj_dir run-no-m --resume", "run-no-m/resume.pth|m"),
    ("resume with another weight decay", "--proj_dir run --resume --weight_decay 0.1", "run/resume.pth|with trained"),
    ("resume with another seed", "--proj_dir run --resume --random_seed 7", "run/|seed 0|seed"),
    ("epoch 2 after nothing", "--epoch_begin 2", "--epoch_begin 2 goes on from out/|.pth: no such file; leave"),
    ("epoch 3 after epoch 0", "--proj_dir run --epoch_begin 3", "run/rwkv-2.pth|no such file; beside it|rwkv-0.pth"),
    ("epoch 1 of another init", "--epoch_begin 1 --adapter_init run/init_pissa.pth", "_init run/|leave it out"),
    ("epoch 1 of another run", f"--proj_dir run --epoch_begin 1 {LOAD.replace('run/', 'run-seed/')}",
     "run/init_pissa.pth|epochs before --epoch_begin 1|another --proj_dir"),
    ("results without resume.pth", "--proj_dir merged --resume", "merged|no resume.pth|--epoch_begin"),
    ("epoch 0 again", "--proj_dir run --epoch_begin 0", "--proj_dir run"),
    ("adapters of another base", f"--load_model another.pth {LOAD} --adapter_init run/init_pissa.pth", "run/|base"),
    ("dry run with these", f"--dry_run --load_model another.pth {LOAD} --adapter_init run/init_pissa.pth", "run/|base"),
    ("dry run with another --peft", f"--dry_run --peft lora {LOAD}", "run/rwkv-0.pth|peft pissa|lora"),
    ("dry run of another rank", f"--dry_run {LOAD} --adapter_init run/init_pissa.pth --rank 8", "run/|[8, 64]|--rank"),
    ("dry run of fewer parts", f"--dry_run {LOAD} --adapter_init run/init_pissa.pth --train_parts time", "holds |ln_x"),
    ("adapters of another init", f"{LOAD} --adapter_init run-seed/init_pissa.pth", "run-seed/init_pissa.pth|init"),
    ("resume with another quant", "--proj_dir run --resume --quant nf4", "run/init_pissa.pth|quant none|nf4"),
    ("resume with another precision", "--proj_dir run --resume --precision bf16", "run/resume.pth|dtype|bfloat16"),
    ("adapters of another quant", f"{LOAD} --adapter_init run/init_pissa.pth --quant int8", "run/|quant none|int8"),
    ("adapters without a norm", "--adapter_load lacking.pth --adapter_init run/init_pissa.pth", "lacking.pth|tensors"),
    ("adapters of another rank", f"{LOAD} --adapter_init run/init_pissa.pth --rank 8", "run/|--rank"),
    ("LoRA of another scale", "--peft lora --adapter_load run-lora/rwkv-0.pth --lora_alpha 8", "scale 8.0|it is 2.0"),
    ("bone of PiSSA", f"--peft bone {LOAD}", "run/rwkv-0.pth|peft pissa|bone"),
    ("a state of PiSSA", f"--peft state {LOAD}", "run/rwkv-0.pth|peft pissa|state"),
    ("half a state", "--peft state --adapter_load half-state.pth", "half-state.pth|blocks.1.att.time_state"),
    ("a state of another width", "--peft state --adapter_load wide-state.pth", "wide-state.pth|att.time_state"),
    ("bone without its matrices", "--peft bone --adapter_load half-state.pth", "half-state.pth|does not fit"),
    ("a model as adapters", "--peft bone --adapter_load m.pth", "m.pth|missing blocks.0.att.receptance.disha"),
    ("adapters as a model", "--peft none --adapter_load run/rwkv-0.pth", "run/rwkv-0.pth|a run's adapters"),
    ("none after nothing", "--peft none --epoch_begin 1", "rwkv-0.pth|no such file"),
    ("adapters of LoRA", "--adapter_load run-lora/rwkv-0.pth --adapter_init run/init_pissa.pth", "run-lora/|peft lora"),
]
CHATS = [
    ("nothing to talk to", "--load_model ''", "--load_model"),
    ("a corpus", "--data_file d.jsonl", "--data_file|--chat"),
    ("dry run", "--dry_run", "--dry_run|--chat"),
    ("going on", "--resume", "--resume|--chat"),
    ("several processes", "--devices 2", "--devices|one process"),
    ("a temperature of 0", "--sample_temperature 0", "--sample_temperature 0|above 0"),
    ("another version", "--version x060", "--version x060|x070"),
    ("no adapters of a method", "--peft pissa", "--adapter_load"),
    ("only what was taken out", "--adapter_init run/init_pissa.pth", "--adapter_load"),
    ("an unknown method", "--peft dora", "--peft dora|'pissa'"),
    ("no such adapters", "--adapter_load nope.pth", "nope.pth|no such file"),
    ("adapters of another base", f"--load_model another.pth {LOAD}", "run/init_pissa.pth|base"),
    ("PiSSA without its init", "--adapter_load run-no-init/rwkv-0.pth", "run-no-init/rwkv-0.pth|init_pissa.pth"),
    ("another init", f"{LOAD} --adapter_init run-seed/init_pissa.pth", "run-seed/init_pissa.pth|init"),
    ("an init for LoRA", "--adapter_load run-lora/rwkv-0.pth --adapter_init run/init_pissa.pth", "pissa_init|lora"),
    ("another rank", f"{LOAD} --rank 32", "--rank 32|run/rwkv-0.pth|rank 4"),
    ("another rank in JSON", """--pissa_config '{"pissa_load": "run/rwkv-0.pth", "pissa_r": 5}'""", "--rank 5|rank 4"),
    ("another method", f"{LOAD} --peft lora", "--peft lora|run/rwkv-0.pth|pissa"),
    ("another method, the usual one", "--adapter_load run-lora/rwkv-0.pth --peft pissa", "--peft pissa|peft lora"),
    ("another quant", f"{LOAD} --quant nf4", "--quant nf4|run/rwkv-0.pth|quant none"),
    ("another alpha", "--adapter_load run-lora/rwkv-0.pth --lora_alpha 8", "--lora_alpha 8|32.0"),
    ("undescribed adapters of unsaid rank", "--adapter_load plain/rwkv-0.pth", "plain/|[4, 64]|--rank"),
    ("described by a method that is none", "--adapter_load run-method.pth", "run-method.pth|dora|'pissa'"),
    ("described by a rank of 0", "--adapter_load run-rank.pth", "run-rank.pth|rank 0"),
    ("a model as adapters", "--adapter_load m.pth", "m.pth|pissa_init"),
]
MERGES = [
    ("nothing", "", "--type"),
    ("an alpha that is no number", "--type lora --lora_checkpoint plain/lora.pth --lora_alpha nan", "--lora_alpha nan"),
    ("an alpha below 0", "--type lora --lora_checkpoint plain/lora.pth --lora_alpha -8", "--lora_alpha -8"),
    ("an alpha beyond fp32", "--type lora --lora_checkpoint plain/large.pth --lora_alpha 1e9", "infinity"),
    ("a model as adapters", "--type lora --lora_checkpoint m.pth --lora_alpha 8", "m.pth|no adapters"),
    ("a name too long for a file", f"--output {300 * 'a'}.pth", "aaa|too long"),
    ("unknown type", "--type dora", "--type|dora"),
    ("unknown flag", "--base m.pth", "--base"),
    ("no init", "--lora_init ''", "--lora_init"),
    ("no such base", "--base_model nope.pth", "--base_model nope.pth"),
    ("no such init", "--lora_init nope.pth", "--lora_init nope.pth"),
    ("no such checkpoint", "--lora_checkpoint run/rwkv-7.pth", "run/rwkv-7.pth|rwkv-0.pth"),
    ("another base", "--base_model another.pth", "run/rwkv-0.pth|base"),
    ("another init", "--lora_init run-seed/init_pissa.pth", "run-seed/init_pissa.pth|init"),
    ("LoRA as PiSSA", "--lora_checkpoint run-lora/rwkv-0.pth", "run-lora/rwkv-0.pth|peft lora"),
    ("PiSSA as LoRA", "--type lora", "run/rwkv-0.pth|peft pissa"),
    ("init as checkpoint", "--lora_checkpoint plain/init_pissa.pth", "init_lora_A"),
    ("checkpoint as init", "--lora_init plain/rwkv-0.pth", "init_lora_A"),
    ("undescribed files, a wider base", f"{PLAIN} --base_model wide.pth", "plain/rwkv-0.pth|the base's [128]"),
    ("undescribed files, half of them", f"{PLAIN} --lora_checkpoint plain/only-A.pth", "lora_B"),
    ("undescribed LoRA without alpha", "--type lora --lora_checkpoint plain/rwkv-0.pth", "--lora_alpha"),
    ("PiSSA as bone", "--type bone", "run/rwkv-0.pth|peft pissa|bone"),
    ("PiSSA as state", "--type state", "run/rwkv-0.pth|peft pissa|state"),
    ("a model is not merged", "--type none", "--type|none"),
    ("half a state", "--type state --state_checkpoint half-state.pth", "missing blocks.1.att.time_state"),
    ("a state of another width", "--type state --state_checkpoint wide-state.pth", "time_state|[1, 128, 128]|64 wide"),
    ("bone of another width", "--type bone --lora_checkpoint wide-bone.pth", "[64, 64]|disha [4, 128]"),
    ("bone of one dimension", "--type bone --lora_checkpoint flat-bone.pth", "[64, 64]|disha [64]"),
    ("LoRA of rank 0", "--type lora --lora_checkpoint 0.pth --lora_alpha 8", "[64, 64]|lora_A [0, 64]"),
    ("an alpha for bone", "--type bone --lora_checkpoint bone.pth --lora_alpha 8", "--lora_alpha 8"),
    ("unknown quant", "--quant nf5", "--quant nf5|'legacy_int8'|did you mean nf4"),
    ("another quant than the run's", "--quant nf4", "--quant nf4|run/rwkv-0.pth|--quant none"),
    ("output exists", "--output a-file", "--output a-file|exists"),
    ("no folder for the output", "--output nope/merged.pth", "--output nope/merged.pth|folder"),
]


def rows(*tables):
    return [pytest.param(*row[1:], id=row[0]) for table in tables for row in table]


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)


def run(place, capfd, options, words, good=GOOD):
    # (a proj_dir of its own for every row, so that none meets the leavings of another)
    argv = shlex.split(f"{good} --proj_dir out/{hashlib.md5(options.encode(errors='replace')).hexdigest()} {options}")
    check_line(place, capfd, lambda: P.main(argv), words)


@pytest.mark.parametrize(("options", "words"), rows(MODEL, OPTIONS, DATA, RESULTS))
def test_bad_input(place, capfd, options, words):
    run(place, capfd, options, words)


def test_a_file_that_may_not_be_read(place, capfd, monkeypatch):
    """(Who runs the tests may be root, to whom nothing is forbidden.)"""
    def forbidden(path, *rest, **options):
        if path == Path("m.pth"):
            raise PermissionError(13, "Permission denied")
        return open(path, *rest, **options)

    monkeypatch.setattr(P, "open", forbidden, raising=False)
    run(place, capfd, "", "--load_model m.pth|cannot be read (Permission denied)")


@pytest.mark.parametrize("variables, words", [
    ({"RANK": "first"}, "RANK=first|expected a number"), ({"RANK": "1", "WORLD_SIZE": "1"}, "RANK=1 and WORLD_SIZE=1")])
def test_an_environment_that_torchrun_never_makes(place, capfd, monkeypatch, variables, words):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(P, "is_first", lambda: True)                  # (others wait, and say nothing)
    run(place, capfd, "", words)


def test_the_demonstration_on_two_ranks(place, capfd, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    check_line(place, capfd, lambda: P.main(["--proj_dir", "out/demo"]), "demonstration is for one process")


def test_an_operator_of_another_device(place, capfd, monkeypatch):
    """A GPU is there, and the run is on the CPU."""
    monkeypatch.setattr(wkv7_cuda.cuda, "load", lambda: wkv7_cuda.cuda.operator())
    wkv7_cuda._load.cache_clear()
    run(place, capfd, *OTHER_DEVICE)
    wkv7_cuda._load.cache_clear()


@pytest.mark.parametrize(("options", "words"), rows(NEW_MODEL))
def test_bad_new_model(place, capfd, options, words):
    run(place, capfd, options, words, NEW)


@pytest.mark.parametrize(("options", "words"), rows(CHATS))
def test_bad_chat(place, capfd, options, words):
    check_line(place, capfd, lambda: P.main(shlex.split(f"--chat --load_model m.pth --op torch {options}")), words)


@pytest.mark.parametrize(("options", "words"), rows(MERGES))
def test_bad_merge(place, capfd, options, words):
    argv = shlex.split(f"{MERGE} {options}") if options else []
    check_line(place, capfd, lambda: merge.main(argv), words, "merge.py")
    assert not Path("merged.pth").exists()


def test_the_good_commands_are_good(place):
    assert P.main(shlex.split(f"{GOOD} --proj_dir out/good")) == 0
    assert P.main(shlex.split(f"{NEW} --proj_dir out/new")) == 0
    assert merge.main(shlex.split(MERGE.replace("merged.pth", "out/merged.pth"))) == 0


# ------------------------------------------------------------------------------------------ a disk that is full


@pytest.fixture
def file_limit():
    """limit(n): this process can make no file longer than n bytes, as on a full disk."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda n: resource.setrlimit(resource.RLIMIT_FSIZE, (n, old[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, old)


def without_limit(call):
    """Calls, then lifts the limit: the test has files to write, too."""
    def wrapped():
        status = call()
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
        return status
    return wrapped


def test_disk_full_while_saving(place, capfd, file_limit):
    """In a run that goes on: its checkpoints stay whole, no unfinished file is left."""
    shutil.copytree("run", "run-full")
    before = sorted(p.name for p in Path("run-full").glob("*.pth"))
    for log in ("train_log.txt", "loss_data.jsonl"):  # (they grow: they are not among what must stay as it is)
        Path(f"run-full/{log}").unlink()
    file_limit(20_000)
    argv = shlex.split(f"{GOOD} --epoch_steps 2 --epoch_count 2 --proj_dir run-full --resume")
    check_line(place, capfd, without_limit(lambda: P.main(argv)), "cannot write run-full/|size limit")
    assert sorted(p.name for p in Path("run-full").glob("*.pth")) == before


def test_disk_full_from_the_start(place, capfd, file_limit):
    file_limit(20_000)
    argv = shlex.split(f"{GOOD} --proj_dir run-never")
    check_line(place, capfd, without_limit(lambda: P.main(argv)), "cannot write run-never/init_pissa.pth|size limit")
    assert [p.name for p in Path("run-never").iterdir()] == [P.OPENED_BY]


@pytest.mark.parametrize("file", ["merged.pth", "merged.st"])
def test_disk_full_while_merging(place, capfd, file_limit, file):
    file_limit(10_000)
    argv = shlex.split(MERGE.replace("merged.pth", file))
    check_line(place, capfd, without_limit(lambda: merge.main(argv)), f"{file}|size limit", "merge.py")
    assert not [*Path().glob("*merged.*")]


def test_disk_full_while_logging(place, capfd, file_limit):
    Path("long-log").mkdir(exist_ok=True)
    Path("long-log/train_log.txt").write_bytes(b"\n" * 2**20)
    file_limit(2**20)
    argv = shlex.split(f"{GOOD} --proj_dir long-log")
    check_line(place, capfd, without_limit(lambda: P.main(argv)), f"train_log.txt|{os.strerror(errno.EFBIG)}")


# --------------------------------------------------------------------------------------- as a user's shell sees it


def test_in_a_process_of_its_own(place):
    program = Path(P.__file__)
    for options, words in (("--load_model wrapped.pth", "state_dict"), ("--rnak 8", "did you mean --rank")):
        command = [sys.executable, program, *shlex.split(f"{GOOD} {options}")]
        found = subprocess.run(command, capture_output=True, text=True)
        assert found.returncode == 2 and re.fullmatch(r"pissa_rwkv: error: [^\n]+\n", found.stderr), found.stderr
        assert words in found.stderr and "Traceback" not in found.stdout
