"""Damages files in many ways, gives them to the program, and looks at what it does.

    python bench/fuzz.py                # 2,000 runs and 1,000 checkpoints, some minutes -> bench/results/fuzz.json

Damage is any of `ANY` (bits flipped, bytes cut off, lost, doubled, swapped, numbers made huge) or what a format invites
to (`Subject.own`): counts, headers, names, hostile pickles. A run must either end with status 2 and one line, or go
through; and then, where the file has checksums, with the results of the undamaged file. Files of tokens and text have
none: there a reader of a few lines, written from the format's description, has to find the same documents. Nothing may
be written outside proj_dir, nothing be executed, nothing hang, and no memory be taken beyond twice the file and 64 MB.
"""

import argparse
import collections
import contextlib
import functools
import hashlib
import io
import itertools
import json
import os
import pickle
import random
import re
import shutil
import signal
import struct
import sys
import tarfile
import tempfile
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import record
import torch
from PIL import Image
from tqdm import tqdm

import pissa_rwkv as P

COMMON = "--load_model m.pth --data_file d.jsonl --op torch --rank 4 --ctx_len 8 --micro_bsz 2 --grad_cp 0 --img_side 4"
RUN = f"{COMMON} --proj_dir out --epoch_steps 1"
RESUME = f"{RUN} --resume --epoch_steps 2 --epoch_count 2 --save_steps 1"
PATIENCE, SPARE = 60, 64 << 20                                        # seconds of a run, bytes beyond twice the file
Damage = Callable[[random.Random, bytes], bytes]
HUGE = (0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1)


# ------------------------------------------------------------------------------------------ damage to any file


def flip(draw: random.Random, data: bytes) -> bytes:
    """One bit."""
    at = place(draw, data)
    return data[:at] + bytes([data[at] ^ 1 << draw.randrange(8)]) + data[at + 1:]


def place(draw: random.Random, data: bytes) -> int:
    """A place in the file; every other time near one of its ends, where headers and tables stand."""
    near = draw.randrange(min(len(data), 600))
    return draw.choice([draw.randrange(len(data)), near, len(data) - 1 - near])


def span(draw: random.Random, data: bytes) -> tuple[int, int]:
    a = place(draw, data)
    return a, min(len(data), a + draw.choice([1, 2, 8, 100, 5000]))


def flips(draw: random.Random, data: bytes) -> bytes:
    return functools.reduce(lambda d, _: flip(draw, d), range(16), data)


def cut(draw: random.Random, data: bytes) -> bytes:
    return data[:place(draw, data)]


def grown(draw: random.Random, data: bytes) -> bytes:
    return data + draw.randbytes(draw.choice([1, 7, 1000]))


def zeroed(draw: random.Random, data: bytes) -> bytes:
    a, b = span(draw, data)
    return data[:a] + bytes(b - a) + data[b:]


def lost(draw: random.Random, data: bytes) -> bytes:
    a, b = span(draw, data)
    return data[:a] + data[b:]


def doubled(draw: random.Random, data: bytes) -> bytes:
    a, b = span(draw, data)
    return data[:b] + data[a:b] + data[b:]


def swapped(draw: random.Random, data: bytes) -> bytes:
    a, b = sorted([place(draw, data), place(draw, data)])
    n = min(8, b - a, len(data) - b)
    return data[:a] + data[b: b + n] + data[a + n: b] + data[a: a + n] + data[b + n:]


def huge(draw: random.Random, data: bytes) -> bytes:
    """Eight bytes become a number larger than any count in a file."""
    at = place(draw, data)
    return data[:at] + struct.pack("<Q", draw.choice(HUGE)) + data[at + 8:]


ANY: tuple[Damage, ...] = (flip, flips, cut, grown, zeroed, lost, doubled, swapped, huge)


# ------------------------------------------------------------------------------------------ damage to a .pth


class Call:
    """A pickle of this calls when it is loaded carelessly."""

    def __init__(self, function: Callable, *args: object):
        self.function, self.args = function, args

    def __reduce__(self) -> tuple:
        return self.function, self.args


@contextlib.contextmanager
def unwarned() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def within(folder: Path) -> Iterator[None]:
    """contextlib.chdir, which Python 3.10 has not."""
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def saved(tensors: object, data: bytes) -> bytes:
    """A .pth of these, with the description of another."""
    with unwarned():
        torch.save(tensors, file := io.BytesIO())
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(file, "a") as new:
        if P.DESCRIPTION in old.namelist():
            new.writestr(P.DESCRIPTION, old.read(P.DESCRIPTION))
    return file.getvalue()


def with_tensor(change: Callable[[torch.Tensor], object]) -> Damage:
    """The file with one tensor changed, and good checksums."""
    def damage(draw: random.Random, data: bytes) -> bytes:
        tensors = torch.load(io.BytesIO(data), weights_only=True)
        name = draw.choice([n for n, t in tensors.items() if t.is_floating_point()])
        with unwarned():
            return saved({**tensors, name: change(tensors[name])}, data)
    return damage


def spoilt(value: float) -> Damage:
    def change(t: torch.Tensor) -> torch.Tensor:
        t = t.clone()
        t.view(-1)[len(t.view(-1)) // 2] = value
        return t
    return with_tensor(change)


def with_names(change: Callable[[dict, str], dict]) -> Damage:
    def damage(draw: random.Random, data: bytes) -> bytes:
        tensors = torch.load(io.BytesIO(data), weights_only=True)
        return saved(change(tensors, draw.choice([*tensors])), data)
    return damage


def with_pickle(make: Callable[[bytes], bytes]) -> Damage:
    """The zip with another pickle in it, and good checksums."""
    return zipped(lambda name, part: [(name, make(part) if name.endswith("data.pkl") else part)])


def zipped(change: Callable[[str, bytes], list[tuple[str, bytes]]], method: int = zipfile.ZIP_STORED) -> Damage:
    def damage(draw: random.Random, data: bytes) -> bytes:
        file = io.BytesIO()
        with (zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(file, "w", method) as new,
              unwarned()):
            for name, part in itertools.chain.from_iterable(change(n, old.read(n)) for n in old.namelist()):
                new.writestr(name, part)
        return file.getvalue()
    return damage


def hostile(function: Callable, *args: object) -> Damage:
    return with_pickle(lambda _: pickle.dumps({"emb.weight": Call(function, *args)}, 2))


def described(**items: object) -> Damage:
    """The file with something else in its description."""
    def damage(draw: random.Random, data: bytes) -> bytes:
        name, value = draw.choice([*items.items()])

        def other(part: bytes) -> bytes:
            return json.dumps(json.loads(part) | {name: value} if name != "all" else value).encode()

        return zipped(lambda n, part: [(n, other(part) if n == P.DESCRIPTION else part)])(draw, data)
    return damage


def longer_storage(part: bytes) -> bytes:
    """A pickle whose storages claim 10^12 numbers: their lengths are the four-byte integers behind b'cpu'."""
    return re.sub(rb"(cpuq.)(J....|M..|K.)", lambda m: m[1] + b"\x8a\x06" + struct.pack("<Q", 10**12)[:6], part,
                  flags=re.S)


OF_PTH: tuple[Damage, ...] = (
    with_names(lambda t, name: {n + "_" * (n == name): x for n, x in t.items()}),
    with_names(lambda t, name: {n: x for n, x in t.items() if n != name}),
    with_names(lambda t, name: {**t, 5: torch.ones(1)}), with_names(lambda t, name: {"state_dict": t}),
    spoilt(float("nan")), spoilt(float("inf")),
    with_tensor(lambda t: t[None, ..., :1]), with_tensor(lambda t: t.to(torch.float8_e4m3fn)),
    with_tensor(lambda t: t.to("meta")), with_tensor(lambda t: t.to_sparse()), with_tensor(lambda t: t + 1j),
    with_tensor(lambda t: torch.zeros(1).expand(10**9)), with_tensor(lambda t: t.reshape(-1)[:0]),
    with_tensor(lambda t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8)),
    with_tensor(lambda t: torch.nested.nested_tensor([t.reshape(-1), t.reshape(-1)[:1]])), with_tensor(lambda t: None),
    hostile(os.system, "touch the-code-was-run"), hostile(exec, "open('the-code-was-run', 'w')"),
    hostile(open, "the-code-was-run", "w"), hostile(bytearray, 10**11), hostile(torch.hub.load, "the", "code"),
    with_pickle(lambda _: b"\x80\x02" + b"(" * 300_000 + b"."), with_pickle(lambda part: part[: len(part) // 2]),
    with_pickle(lambda _: pickle.dumps("no dict", 2)), with_pickle(lambda _: b""), with_pickle(longer_storage),
    zipped(lambda name, part: [(name, part), ("../the-code-was-run", b"x")]),
    zipped(lambda name, part: [(name, part), (name, part[::-1])]),
    zipped(lambda name, part: [(name, part)], zipfile.ZIP_DEFLATED),
    zipped(lambda name, part: [(name, part), (f"{name}.more", bytes(3 << 28))][: 1 + name.endswith("version")],
           zipfile.ZIP_DEFLATED),
)
FIRST_HOSTILE = 16                                                    # in this list
OF_DESCRIBED = OF_PTH + (
    described(all=[1]), described(all="x"), described(step=-1, loss_scale="1", epoch_loss=float("nan"), config=[]),
    described(scale=float("inf"), dtype="float4", quant=7, rows=1.5), described(base=0, peft=None, version="x"),
)


# ------------------------------------------------------------------------------------------ damage to corpora


def at(offset: int, form: str, *values: int) -> Damage:
    """A field of a header set to something else."""
    def damage(draw: random.Random, data: bytes) -> bytes:
        field = struct.pack(form, draw.choice(values))
        return data[:offset] + field + data[offset + len(field):]
    return damage


OF_IDX: tuple[Damage, ...] = (
    at(17, "<B", 0, 1, 2, 3, 4, 5, 6, 7, 9, 255), at(9, "<Q", 0, 2, 2**63), at(18, "<Q", *HUGE), at(26, "<Q", *HUGE),
    at(34, "<i", -1, 0, 2**31 - 1, -(2**31)), at(34 + 4 * 6, "<q", -1, 1, 2**62), lambda draw, data: data[:34],
    lambda draw, data: data[:18] + struct.pack("<QQ", 2**61, 2**61) + data[34:],
)
LINES = [b'{"text": NaN}', b'{"text": 1e999}', b'{"text": ' + b"9" * 5000 + b"}", b'{"text": null}', b'["text"]', b"5",
         b'{"text": "a", "text": "b"}', b'{"Text": "a"}', b"[" * 100_000, b'{"a":' * 50_000, b'{"text": "\\ud800"}',
         b'{"text": "\\u0000"}', b'{"text": "\xff"}', b'{"text": "a"}{"text": "b"}', b'{"text": "a\tb"}', b"\x00" * 50,
         b'{"text": ' + b'["' * 9999, "{\"text\": \"\u2028\x85\"}".encode(), b'\xef\xbb\xbf{"text": "a"}', b"'text'"]


def line(draw: random.Random, data: bytes) -> bytes:
    """One line becomes another kind of line."""
    lines = data.split(b"\n")
    lines[draw.randrange(len(lines))] = draw.choice(LINES)
    return b"\n".join(lines)


HEADERS = ["{'descr': '<u2', 'fortran_order': False, 'shape': (10000000000000,), }",
           "{'descr': '<u2', 'fortran_order': False, 'shape': (-5,), }",
           "{'descr': '|O', 'fortran_order': False, 'shape': (24,), }",
           "{'descr': '<u2', 'fortran_order': True, 'shape': (3, 8), }", "{'descr': '<u2', 'shape': (24,), }",
           "{'descr': [('a', '<u2')], 'fortran_order': False, 'shape': (24,), }",
           "{'descr': '<u2', 'fortran_order': False, 'shape': (2.5,), }",
           "{'descr': '<u0', 'fortran_order': False, 'shape': (24,), }",
           "{'descr': '|V2', 'fortran_order': False, 'shape': (24,), }",
           "{'descr': '<m8', 'fortran_order': 0, 'shape': ()}",
           "{'descr': __import__('os').system('touch the-code-was-run'), 'fortran_order': False, 'shape': (24,), }",
           "(" * 3000, "[" * 200 + "]" * 200, "{'descr': '<u2', 'fortran_order': False, 'shape': (1 << 70,), }",
           "{'descr': '<u2', 'fortran_order': False, 'shape': (99999999999999999999999,), }"]


def npy_header(draw: random.Random, data: bytes) -> bytes:
    header = draw.choice(HEADERS).encode().ljust(118)[:60_000]
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header + data[-48:]


def member(name: str, **fields: object) -> Damage:
    """A tar with one member more."""
    def damage(draw: random.Random, data: bytes) -> bytes:
        info = tarfile.TarInfo(name)
        for key, value in fields.items():
            setattr(info, key, value)
        return info.tobuf(draw.choice([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])) + data
    return damage


def image_header(draw: random.Random, data: bytes) -> bytes:
    """A PNG that claims to be wider, with the checksum of that."""
    start = data.index(b"IHDR")
    field = b"IHDR" + struct.pack(">II", draw.choice([0, 5, 10**5, 2**31 - 1]), draw.choice([0, 5, 10**5])) + data[
        start + 12: start + 17]
    return data[:start] + field + struct.pack(">I", zipfile.crc32(field)) + data[start + 21:]


OF_TAR: tuple[Damage, ...] = (
    member("../../the-code-was-run.png"), member("a.png", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
    member("a.png", type=tarfile.LNKTYPE, linkname="nothing"), member("a.png", size=2**40), image_header,
    member("a.png", type=tarfile.CHRTYPE), member("a.png", type=b"S", size=2**30),
    member("a.png", type=b"L", size=2**33),
    member("x", pax_headers={"size": "99999999999999"}, type=b"x", size=512), image_header,
)


# ------------------------------------------------------------------------------------------ independent readers

Documents = list[list[int]]


def idx_documents(folder: Path) -> Documents:
    index, data = (folder / "d.idx").read_bytes(), (folder / "d.bin").read_bytes()
    magic, version, code, items, bounds = struct.unpack("<9sQBQQ", index[:34])
    kind = {1: "B", 2: "b", 3: "h", 4: "i", 5: "q", 8: "H"}[code]
    sizes = struct.unpack(f"<{items}i", index[34: 34 + 4 * items])
    size, found, begin = struct.calcsize(kind), [], 0
    for n in sizes:
        found.append([*struct.unpack(f"<{n}{kind}", data[begin: begin + n * size])])
        begin += n * size
    if (magic, version) != (b"MMIDIDX\0\0", 1) or begin != len(data):
        raise ValueError
    return found


def jsonl_documents(folder: Path) -> Documents:
    lines = (folder / "d.jsonl").read_bytes().decode().removeprefix("\ufeff").split("\n")
    return [[*json.loads(text)["text"].encode(), 0] for text in lines if text.strip()]


def cut_at_zero(tokens: list[int]) -> Documents:
    ends = [i + 1 for i, t in enumerate(tokens) if t == 0]
    return [tokens[a:b] for a, b in itertools.pairwise(dict.fromkeys([0, *ends, len(tokens)]))]


def npy_documents(folder: Path) -> Documents:
    return cut_at_zero(np.load(folder / "d.npy", allow_pickle=False).tolist())


def tar_documents(folder: Path) -> Documents:
    found = []
    with tarfile.open(folder / "d.tar") as archive:
        for info in archive:
            if info.isreg() and info.name.lower().endswith(P.IMAGES):
                with Image.open(archive.extractfile(info)) as image:
                    if image.size != (4, 4):
                        raise ValueError("the reader would scale it")
                    found.append([*(max(1, x) for x in image.convert("L").tobytes()), 0])
    return found


class Subject(NamedTuple):
    """A file to be damaged, and the run that reads it."""

    file: str
    options: str
    own: tuple[Damage, ...]                                           # what its format invites to
    documents: Callable[[Path], Documents] | None = None
    before: Callable[[], object] = lambda: None


def only_newest() -> None:
    Path("out/resume.1.pth").unlink()


ADAPTERS = f"{RUN} --adapter_load run/rwkv-0.pth --adapter_init run/init_pissa.pth"
NEWER = f"{RUN} --proj_dir out/new"
SUBJECTS = {
    "base": Subject("m.pth", NEWER, OF_PTH),
    "adapters": Subject("run/rwkv-0.pth", f"{ADAPTERS} --proj_dir out/new", OF_DESCRIBED),
    "init": Subject("out/init_pissa.pth", RESUME, OF_DESCRIBED),
    "resume": Subject("out/resume.pth", RESUME, OF_DESCRIBED),
    "resume, one kept": Subject("out/resume.pth", RESUME, OF_DESCRIBED, before=only_newest),
    "losses": Subject("out/loss_data.jsonl", RESUME, (line,)),
    "idx": Subject("d.idx", f"{NEWER} --data_file d", OF_IDX, idx_documents),
    "bin": Subject("d.bin", f"{NEWER} --data_file d", (), idx_documents),
    "jsonl": Subject("d.jsonl", NEWER, (line,), jsonl_documents),
    "npy": Subject("d.npy", f"{NEWER} --data_file d.npy", (npy_header,), npy_documents),
    "tar": Subject("d.tar", f"{NEWER} --data_file d.tar", OF_TAR, tar_documents),
}


# ------------------------------------------------------------------------------------------ the runs, watched


class Hang(BaseException):
    pass


PATHS = {"open": 1, "os.remove": 1, "os.rename": 2, "os.link": 2, "os.symlink": 2, "os.mkdir": 1, "os.rmdir": 1,
         "os.truncate": 1, "os.chmod": 1, "shutil.rmtree": 1, "shutil.move": 2}
COMMANDS = ("os.system", "os.exec", "os.fork", "os.posix_spawn", "subprocess.Popen", "socket.connect")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
watched: dict[str, object] = {"folder": None, "seen": []}


def audit(event: str, args: tuple) -> None:
    """Notes every command, and every change outside the folder. (Python tells hooks of them, whoever asks for them.)"""
    if watched["folder"] is None or event not in PATHS and event not in COMMANDS:
        return
    if event == "open" and not args[2] & WRITING:
        return
    paths = [os.path.realpath(os.fsdecode(p)) for p in args[:PATHS.get(event, 0)] if isinstance(p, (str, bytes, Path))]
    if event in COMMANDS or any(not f"{p}/".startswith(f"{watched['folder']}/") for p in paths):
        watched["seen"].append(f"{event} {args[:2]}")


@contextlib.contextmanager
def watching(folder: Path) -> Iterator[list[str]]:
    """The list of what happens outside the folder. Raises Hang after PATIENCE seconds."""
    if "hooked" not in watched:                                       # (a hook cannot be taken away again)
        sys.addaudithook(audit)
        watched["hooked"] = True

    def stop(*signal_and_frame: object) -> None:
        raise Hang

    old, compiled = signal.signal(signal.SIGALRM, stop), sys.dont_write_bytecode
    watched.update(folder=os.path.realpath(folder), seen=[])
    sys.dont_write_bytecode = True
    signal.setitimer(signal.ITIMER_REAL, PATIENCE)
    try:
        yield watched["seen"]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
        sys.dont_write_bytecode = compiled
        watched["folder"] = None


def memory(name: str) -> int:
    """VmRSS, or VmHWM, its peak, in bytes."""
    return int(re.search(rf"^{name}:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.M)[1]) << 10


class Outcome(NamedTuple):
    status: int | None                                                # None: an exception that nobody caught
    error: str
    elsewhere: list[str]
    taken: int                                                        # bytes of memory
    files: dict[str, str]                                             # .pth of proj_dir -> digest


def attempt(argv: list[str]) -> Outcome:
    """One run in this process and the current folder."""
    Path("/proc/self/clear_refs").write_text("5")                     # the peak begins anew
    before, err, status = memory("VmRSS"), io.StringIO(), None
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(err), watching(Path("out")) as elsewhere:
        try:
            status = P.main(argv)
        except Hang:
            err.write("it hangs")
        except Exception as e:
            err.write(f"{type(e).__name__}: {e}")
    taken = memory("VmHWM") - before
    error = re.sub(r"[^\r\n]*\d+%\|[^\r\n]*|\r", "", err.getvalue()).strip()              # without progress bars
    files = {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(Path("out").rglob("*.pth"))}
    return Outcome(status, error, elsewhere, taken, files)


def good_files(folder: Path) -> None:
    """A model, a corpus in every format, and a finished run, for whoever stands in the folder."""
    texts = [f"line {i} of a text" for i in range(6)]
    Path("d.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    new = "--peft none --n_layer 1 --n_embd 64 --vocab_size 256 --lr_init 1e-2 --proj_dir base --load_model"
    assert P.main([*f"{RUN} {new}".split(), ""]) == 0
    Path("base/rwkv-0.pth").rename("m.pth")
    shutil.rmtree("base")
    assert P.main(f"{RUN} --proj_dir run --epoch_steps 2 --epoch_count 1 --save_steps 1".split()) == 0
    sizes = [len(text) + 1 for text in texts]
    ends = [*itertools.accumulate(sizes)]
    Path("d.bin").write_bytes(b"".join(struct.pack(f"<{len(t) + 1}H", *t.encode(), 0) for t in texts))
    Path("d.idx").write_bytes(b"MMIDIDX\0\0" + struct.pack(
        "<QBQQ6i6q7q", 1, 8, 6, 7, *sizes, 0, *(2 * end for end in ends[:-1]), *range(7)))
    np.save("d.npy", np.array([*b"some tokens\0and some more"], np.uint16))
    with tarfile.open("d.tar", "w") as archive:
        for i in range(2):
            Image.new("L", (4, 4), 90 + i).save(file := io.BytesIO(), "PNG")
            info = tarfile.TarInfo(f"{i}.png")
            info.size = len(file.getvalue())
            archive.addfile(info, io.BytesIO(file.getvalue()))


def way_of(name: str, number: int) -> Damage:
    """In turn one of the subject's own ways and one of any file's; subjects of one format begin at different ones."""
    ways = number % 2 == 0 and SUBJECTS[name].own or ANY
    return ways[(number // 2 + 9 * [*SUBJECTS].index(name)) % len(ways)]


class Fuzz:
    """Damages the files of a folder, one at a time, and judges."""

    def __init__(self, folder: Path):
        self.good, self.count, self.taken = folder / "good", collections.Counter(), 0
        self.good.mkdir()
        self.here = folder / "here"
        with quiet(), within(self.good):
            good_files(self.good)
        self.wanted: dict[str, Outcome] = {}

    def case(self, name: str, number: int) -> str:
        """Runs case `number` of a subject; what is wrong with what happened, or nothing."""
        subject, draw = SUBJECTS[name], random.Random(f"{name} {number}")
        if name not in self.wanted:
            self.wanted[name] = outcome = self.run(subject, None)
            assert outcome.status == 0 and not outcome.elsewhere, (name, outcome)
        way = way_of(name, number)
        data = (self.good / subject.file.replace("out/", "run/")).read_bytes()
        damaged = way(draw, data)
        try:
            outcome = self.run(subject, damaged)
            wrong = self.judge(subject, name, outcome, 2 * len(damaged) + SPARE)
        finally:
            shutil.rmtree(self.here, ignore_errors=True)
        return f"{name} {number} ({way.__qualname__.partition('.')[0]}): {wrong}" if wrong else ""

    def run(self, subject: Subject, damaged: bytes | None) -> Outcome:
        shutil.rmtree(self.here, ignore_errors=True)
        shutil.copytree(self.good, self.here)
        with within(self.here):
            if subject.options.startswith(RESUME):
                shutil.copytree("run", "out")
            else:
                Path("out").mkdir()
            subject.before()
            if damaged is not None:
                Path(subject.file).write_bytes(damaged)
            return attempt(subject.options.split())

    def judge(self, subject: Subject, name: str, outcome: Outcome, memory: int) -> str:
        self.count["cases"] += 1
        self.taken = max(self.taken, outcome.taken - memory + SPARE)
        if outcome.elsewhere or [*self.here.rglob("the-code-was-run*")]:
            return f"outside proj_dir: {outcome.elsewhere or 'the code was run'}"
        if outcome.taken > memory:
            return f"{outcome.taken >> 20} MB of memory"
        if outcome.status == 2:
            self.count["refused"] += 1
            good_line = re.fullmatch(r"pissa_rwkv: error: [^\n]+", outcome.error)
            return "" if good_line else f"no line of its own: {outcome.error[:300]}"
        if outcome.status != 0:
            return outcome.error[:300]
        if subject.documents:
            try:
                expected = subject.documents(self.here)
            except Exception as e:
                return f"it was read, but not by an independent reader ({type(e).__name__} {e})"
            with within(self.here):
                cfg = P.parse(subject.options.split())
                corpus = P.read_corpus(cfg, cfg.data_file, P.ByteTokenizer())
            found = [corpus.tokens[a:b].tolist() for a, b in itertools.pairwise(corpus.starts)]
            if found != expected:
                return f"other documents than an independent reader's: {found} {expected}"
            if expected != subject.documents(self.good):
                self.count["another_good_file"] += 1
                return ""
        files, wanted = ({**found.files, subject.file: ""} for found in (outcome, self.wanted[name]))
        if files != wanted:                                           # (but for the damaged file itself)
            return "other results than the undamaged file's"
        self.count["same_results"] += 1
        return ""


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


# ------------------------------------------------------------------------------------------ a bit at a time


def checkpoints(folder: Path, number: int) -> dict[str, int]:
    """Flips one bit of, or cuts, the three kinds of file that a run leaves, and reads them: refused, loaded with the
    same values, loaded with others."""
    count = dict.fromkeys(("flips", "cuts", "refused", "same_values", "other_values"), 0)
    path = folder / "damaged.pth"
    for n in range(number):
        draw = random.Random(f"checkpoint {n}")
        good = folder / ("resume.pth", "rwkv-0.pth", "init_pissa.pth")[n % 3]
        data = good.read_bytes()
        path.write_bytes((cut if n % 4 == 3 else flip)(draw, data))
        count["cuts" if n % 4 == 3 else "flips"] += 1
        try:
            found, about = P.read_described(path, "damaged")
        except P.Fatal:
            count["refused"] += 1
            continue
        wanted, about_good = P.read_described(good, "good")
        same = about == about_good and found.keys() == wanted.keys() and all(
            found[k].dtype == t.dtype and torch.equal(found[k], t) for k, t in wanted.items())
        count["same_values" if same else "other_values"] += 1
    path.unlink(missing_ok=True)
    return count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--checkpoints", type=int, default=1000)
    args = parser.parse_args()
    torch.set_num_threads(1)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        fuzz, wrong = Fuzz(Path(folder)), []
        for n in tqdm(range(args.cases), disable=None):
            wrong += [text] if (text := fuzz.case([*SUBJECTS][n % len(SUBJECTS)], n // len(SUBJECTS))) else []
        count = checkpoints(fuzz.good / "run", args.checkpoints)
    print("\n".join(wrong))
    rows = [{"what": "runs", **fuzz.count, "wrong": len(wrong), "spare_mb": SPARE >> 20,
             "used_of_spare_mb": fuzz.taken >> 20},
            {"what": "checkpoints", **count}]
    print(*rows, sep="\n")
    seconds = round(time.perf_counter() - began)
    print(f"-> {record.write('fuzz', [{**row, 'seconds': seconds} for row in rows])}")


if __name__ == "__main__":
    main()
