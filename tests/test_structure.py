"""The module reads from top to bottom, importing it does nothing, and every option is explained and read."""

import ast
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pissa_rwkv
from pissa_rwkv import Config, parse, parser

FILE = Path(pissa_rwkv.__file__)
SOURCE = FILE.read_text("utf-8")
RULE = "# " + "=" * 118 + "\n"
SECTIONS = [(int(m[1]), m[2], SOURCE[:m.start()].count("\n")) for m in
            re.finditer(re.escape(RULE) + r"# (\d+)\. ([^:.]+)", SOURCE)]  # number, title, line


def section_of(node: ast.AST) -> int:
    """The number of the section a node stands in; 0 above the first."""
    return max((number for number, _, line in SECTIONS if line < node.lineno), default=0)


def defined() -> dict[str, int]:
    """Every name of module level -> the first section that gives it."""
    where = {}
    for statement in ast.parse(SOURCE).body:
        names = [statement.name] if hasattr(statement, "name") else [
            n.id for n in ast.walk(statement) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)]
        for name in names:
            where.setdefault(name, section_of(statement))
    return where


def test_the_ten_sections_stand_in_order():
    assert [number for number, _, _ in SECTIONS] == [*range(1, 11)]


def test_a_section_uses_only_names_of_its_own_and_of_earlier_ones():
    where, ahead = defined(), []
    for statement in ast.parse(SOURCE).body:
        nodes = [*ast.walk(statement)]
        local = {n.arg for n in nodes if isinstance(n, ast.arg)}
        local |= {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        for n in nodes:
            if isinstance(n, ast.Name) and n.id not in local and where.get(n.id, 0) > section_of(statement):
                ahead.append(f"line {n.lineno}, section {section_of(statement)}: {n.id} of section {where[n.id]}")
    assert not ahead, "\n".join(ahead)


def test_the_map_in_the_docstring_is_the_files():
    rows = re.findall(r"^ +(\d+) ([a-z ]+?)  +\S.*?  +(\w+(?:, \w+)*)$", ast.get_docstring(ast.parse(SOURCE)), re.M)
    assert [int(number) for number, _, _ in rows] == [*range(1, 11)]
    where = defined()
    for (number, title, names), (_, heading, _) in zip(rows, SECTIONS, strict=True):
        assert set(title.split()) <= set(heading.lower().replace(",", "").split())
        for name in names.split(", "):
            assert where[name] == int(number), f"{name} stands in section {where[name]}"


IMPORTING = """
import os, sys
import numpy, torch, tqdm, torch.utils.checkpoint            # what these do is theirs

ours, seen = os.getcwd() + os.sep, []

class Watched(type(os.environ)):
    def __getitem__(self, key):
        frame = sys._getframe(1)
        while frame.f_globals["__name__"] in ("os", "_collections_abc", "collections.abc"):
            frame = frame.f_back
        if frame.f_code.co_filename.startswith(ours):
            seen.append("read " + key)
        return super().__getitem__(key)

def watch(event, args):
    if event in ("subprocess.Popen", "os.system", "os.fork", "os.posix_spawn", "os.mkdir", "socket.connect"):
        seen.append(event)
    if event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+"):
        seen.append("write " + str(args[0]))

os.environ.__class__ = Watched
sys.addaudithook(watch)
sys.path.insert(0, ".")
import MODULES
print(*seen, *["cuda"] * torch.cuda.is_initialized(), sep=", ")
"""


def what_importing_does(modules: str, folder: Path) -> str:
    done = subprocess.run([sys.executable, "-B", "-c", IMPORTING.replace("MODULES", modules)], cwd=folder,
                          capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.removesuffix("\n")


def test_importing_prints_nothing_compiles_nothing_and_reads_no_environment_variable(tmp_path):
    names = "op build cpu cuda triton fla chunk wkv6_cpu wkv6_fla wkv6_chunk".split()
    kernels = ", ".join(f"wkv7_cuda.{name}" for name in names)
    assert what_importing_does(f"pissa_rwkv, merge, {kernels}", FILE.parent) == ""
    (tmp_path / "probe.py").write_text(  # and that would have been seen
        "import os, subprocess\nos.environ['HOME'], os.getenv('PATH'), subprocess.run(['true']), open('x', 'w')")
    assert what_importing_does("probe", tmp_path) == "read HOME, read PATH, subprocess.Popen, write x"


def test_every_option_has_a_help_and_no_two_share_a_name():
    assert all(len(f.metadata["help"]) > 8 for f in fields(Config))
    names = [n for f in fields(Config) for n in (f.name, f.metadata["also"]) if n]
    assert len(names) == len(set(names))
    for f in fields(Config):
        assert f"--{f.name}" in parser().format_help()


def test_every_option_is_read_somewhere():
    read = {n.attr for n in ast.walk(ast.parse(SOURCE)) if isinstance(n, ast.Attribute)}
    read |= {n.value for n in ast.walk(ast.parse(SOURCE)) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
    assert not [f.name for f in fields(Config) if f.name not in read]


def test_without_options_the_configuration_is_the_default():
    assert parse([]) == Config()
