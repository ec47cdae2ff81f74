"""Compiling on request: what goes wrong at users' machines. The compiler here is a script that counts its runs."""

import ctypes
import importlib.machinery
import importlib.util
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

import wkv7_cuda
from wkv7_cuda import build, cpu, nvcc
from wkv7_cuda.build import BuildError

FLAGS = ["-shared", "-fPIC", "-O0"]
# In a process of its own, without importing torch: build.py stands alone.
LOAD = f"""
import sys, pathlib
sys.path.insert(0, {str(Path(build.__file__).parent)!r})
import build
folder = pathlib.Path(sys.argv[1])
print(build.load("answer", folder / "answer.cpp", str(folder / "compiler"), {FLAGS!r}).answer())
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder, its name with a space, for answer.cpp, `compiler` and the cache; a file `slow` delays compiling."""
    folder = tmp_path / "a place"
    folder.mkdir()
    (folder / "answer.cpp").write_text('extern "C" int answer() { return 42; }\n')
    compiler = folder / "compiler"
    compiler.write_text(f"""#!/bin/sh
if [ "$1" != --version ]; then
    echo run >> '{folder}/runs'
    [ -e '{folder}/slow' ] && sleep 2
fi
exec c++ "$@"
""")
    compiler.chmod(compiler.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(folder / "cache"))
    return folder


def start(place):
    return subprocess.Popen([sys.executable, "-c", LOAD, str(place)], stdout=subprocess.PIPE, text=True)


def answer(place, flags=FLAGS, headers=()):
    return build.load("answer", place / "answer.cpp", str(place / "compiler"), flags, headers).answer()


def runs(place):
    return len((place / "runs").read_text().split())


def library(place):
    (path,) = (place / "cache").glob("pissa_rwkv/*/answer.so")
    return path


def one_line(caught):
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_built_once_and_then_cached(place):
    assert [answer(place), answer(place)] == [42, 42]
    assert runs(place) == 1
    assert not list(library(place).parent.glob("build-*"))


def test_key_covers_source_flags_and_headers(place):
    header = place / "number.h"
    header.write_text("#define NUMBER 1\n")
    (place / "answer.cpp").write_text('#include <number.h>\nextern "C" int answer() { return NUMBER + ONE; }\n')
    assert answer(place, [*FLAGS, "-DONE=1"], [header]) == 2
    header.write_text("#define NUMBER 5\n")
    assert answer(place, [*FLAGS, "-DONE=1"], [header]) == 6
    assert answer(place, [*FLAGS, "-DONE=2"], [header]) == 7
    assert runs(place) == 3


def test_key_covers_the_processor_and_the_compilers_version(place, monkeypatch):
    assert answer(place) == 42
    with monkeypatch.context() as patch:
        patch.setattr(build, "_cpu", lambda: b"another")
        assert answer(place) == 42 and runs(place) == 2
    compiler = place / "compiler"
    compiler.write_text(compiler.read_text().replace("exec c++", "[ $1 = --version ] && echo newer\nexec c++"))
    assert answer(place) == 42 and runs(place) == 3


def test_a_processor_is_its_instruction_sets(monkeypatch):
    found = set()
    for text in ("flags\t\t: fpu sse2\n", "flags\t\t: fpu sse2 avx512f\n", "Features\t: fp asimd\n"):
        monkeypatch.setattr(Path, "read_bytes", lambda _, text=text: f"model name\t: x\n{text}".encode())
        found.add(build._cpu())
    assert len(found) == 3


def test_names_that_ninja_would_expand(place):
    (odd := place / "a $HOME: b").mkdir()
    (odd / "answer.cpp").write_text('extern "C" int answer() { return 7; }\n')
    assert build.load("answer", odd / "answer.cpp", str(place / "compiler"), FLAGS).answer() == 7


def test_several_processes_build_once(place):
    (place / "slow").touch()
    processes = [start(place) for _ in range(3)]
    assert [process.communicate(timeout=60)[0] for process in processes] == ["42\n"] * 3
    assert runs(place) == 1


def test_killed_build_harms_no_later_one(place):
    """SIGKILL while the compiler runs, which survives its parent: no stale lock, no half-written library."""
    (place / "slow").touch()
    victim = start(place)
    deadline = time.monotonic() + 30
    while not (place / "runs").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    victim.send_signal(signal.SIGKILL)
    victim.communicate()
    (place / "slow").unlink()
    began = time.monotonic()
    assert answer(place) == 42
    assert time.monotonic() - began < 30 and runs(place) == 2
    content = library(place).read_bytes()
    time.sleep(2.5)  # the orphan wakes up, compiles and ends
    assert library(place).read_bytes() == content
    assert not list(library(place).parent.glob("build-*"))


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: os.truncate(path, 0),
        lambda path: os.truncate(path, path.stat().st_size // 2),  # to open this one would end in SIGBUS
        lambda path: path.write_bytes(path.read_bytes()[:-100] + b"x" * 100),
        lambda path: path.unlink(),
        lambda path: path.with_suffix(".so.sha256").unlink(),
    ],
    ids=["empty", "truncated", "altered", "missing", "no checksum"],
)
def test_damaged_library_is_built_again(place, damage):
    assert start(place).communicate(timeout=60)[0] == "42\n"
    damage(library(place))
    for _ in range(2):
        assert start(place).communicate(timeout=60)[0] == "42\n"
    assert runs(place) == 2


def test_library_that_does_not_load_is_built_again(place):
    """Whole by its checksum, refused by the loader: for example, made under another C library."""
    assert start(place).communicate(timeout=60)[0] == "42\n"
    path = library(place)
    path.write_bytes(b"no library")
    path.with_suffix(".so.sha256").write_bytes(build._checksum(path))
    assert answer(place) == 42
    assert runs(place) == 2


def test_a_cache_that_has_the_library_need_not_be_writable(place, capfd):
    assert answer(place) == 42
    lock = library(place).with_name("lock")
    lock.unlink(), lock.mkdir()  # (which cannot be opened to write, not even by root)
    capfd.readouterr()
    assert answer(place) == 42 and runs(place) == 1
    assert capfd.readouterr().err == ""


def test_unusable_cache(place, monkeypatch, capfd):
    (place / "file").touch()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(place / "file"))
    assert answer(place) == 42
    said = capfd.readouterr().err
    assert "TORCH_EXTENSIONS_DIR" in said and said.endswith("\ncompiling answer.cpp: once, for less than a minute\n")


def test_a_folder_from_which_nothing_can_be_opened(place, monkeypatch, capfd):
    """As where it is mounted noexec: what is built there goes unused, and a temporary folder is taken."""
    opened = build._open
    monkeypatch.setattr(build, "_open", lambda path: None if place in path.parents else opened(path))
    assert answer(place) == 42
    assert "noexec" in (said := capfd.readouterr().err) and "TORCH_EXTENSIONS_DIR" in said


def test_no_folder_at_all(place, monkeypatch):
    def full(**_):
        raise OSError("no space left")

    (place / "file").touch()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(place / "file"))
    monkeypatch.setattr(tempfile, "TemporaryDirectory", full)
    with pytest.raises(BuildError, match="its cache is unusable .*; nor can a temporary one .no space left") as caught:
        answer(place)
    one_line(caught)


def test_no_compiler(place):
    with pytest.raises(BuildError, match="'no-such-nvcc', .* not on PATH: install it, or .* --op chunk") as caught:
        build.load("answer", place / "answer.cpp", "no-such-nvcc", FLAGS)
    one_line(caught)


def test_broken_compiler(place):
    (place / "compiler").write_text("#!/bin/sh\nexit 1\n")
    with pytest.raises(BuildError, match="does not run") as caught:
        answer(place)
    one_line(caught)


def test_compile_error_is_the_first_one_in_one_line(place):
    (place / "answer.cpp").write_text("int answer() {\n  return nothing;\n}\nint f() { return more; }\n")
    with pytest.raises(BuildError, match=r"answer.cpp:2:\d+: error: .*nothing.*--op chunk") as caught:
        answer(place)
    assert "more" not in one_line(caught)
    assert not list(place.glob("cache/pissa_rwkv/*/build-*"))


@pytest.mark.parametrize("said, wanted", [
    ("host_config.h:1: error: #error -- unsupported GNU version! gcc versions later than 13 are not supported!",
     "unsupported GNU version.*set NVCC_CCBIN to an older g[+][+], or .*--op chunk"),
    ("gcc: No such file or directory\nnvcc fatal   : Failed to preprocess host compiler properties.",
     "host compiler properties; install g[+][+], or .*--op chunk"),
    ("sh: 1: cicc: not found\nninja: build stopped: subcommand failed.", "cicc: not found; repair or update"),
    ("nvcc fatal   : Unsupported gpu architecture 'sm_70'", "architecture 'sm_70'; use .* up to 12.9 .*--op chunk"),
    ("nvcc fatal   : Value 'sm_120' is not defined for option 'gpu-architecture'", "; use a newer CUDA .*--op chunk"),
    ("ld: cannot find -lcudart_static: No such file\ncollect2: error: ld returned 1 exit status",
     "failed: ld: cannot find -lcudart_static.*repair or update the compiler"),
])  # fmt: skip
def test_the_line_that_says_why_and_what_helps(place, said, wanted):
    (place / "said").write_text(said)
    (place / "compiler").write_text(f"#!/bin/sh\n[ \"$1\" = --version ] || {{ cat '{place}/said'; exit 1; }}\n")
    with pytest.raises(BuildError, match=wanted) as caught:
        answer(place)
    one_line(caught)
    assert "--op" not in caught.value.why and caught.value.why.endswith(("compiler", "g++", "sm_75"))


def test_compilers_are_asked_to_speak_english(place, monkeypatch):
    """Else the line that says why would not be found."""
    monkeypatch.setenv("LC_ALL", "de_DE.UTF-8")
    (place / "compiler").write_text('#!/bin/sh\n[ $1 = --version ] || { echo "error: in $LC_ALL"; exit 1; }\n')
    with pytest.raises(BuildError, match="failed: error: in C;"):
        answer(place)


def test_missing_source(place):
    (place / "answer.cpp").unlink()
    with pytest.raises(BuildError, match="answer.cpp") as caught:
        answer(place)
    one_line(caught)


def test_ninja_beside_the_interpreter(tmp_path, monkeypatch):
    """pip puts ninja beside python; PATH has it only if the environment was activated."""
    ninja = tmp_path / "ninja"
    shutil.copy(build.find_ninja(), ninja)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    assert build.find_ninja() == str(ninja)


def test_no_ninja(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    monkeypatch.setitem(sys.modules, "ninja", None)  # makes its import fail
    with pytest.raises(BuildError, match="pip install ninja") as caught:
        build.find_ninja()
    one_line(caught)


def test_the_compiler_that_the_environment_names(place, monkeypatch):
    asked = []
    monkeypatch.setattr(build, "load", lambda *arguments: asked.append(arguments))
    monkeypatch.delenv("CXX", raising=False)
    cpu.open_library()
    monkeypatch.setenv("CXX", "ccache 'my g++'")
    cpu.open_library()
    assert [(compiler, flags[:2], headers) for _, _, compiler, flags, headers in asked] == [
        ("c++", ["-march=native", "-std=c++17"], [cpu.HEADER]), ("ccache", ["my g++", "-march=native"], [cpu.HEADER])]
    monkeypatch.setenv("CXX", " ")
    cpu.open_library()
    assert asked[-1][2] == "c++"
    monkeypatch.setenv("CXX", "g++ '")
    with pytest.raises(BuildError, match="CXX=g[+][+] ': .*set it to a compiler") as caught:
        cpu.open_library()
    one_line(caught)


def test_where_nvcc_is_looked_for(tmp_path, monkeypatch):
    """In the toolkit that the environment names, in pip's, on PATH, where it is installed; and with what each needs."""
    pip = tmp_path / "nvidia" / "cu13"
    for place in ("home", "nvidia/cu13", "path", "toolkit"):
        (tmp_path / place / "bin").mkdir(parents=True)
        (tmp_path / place / "bin" / "nvcc").touch(0o755)
    for name in ("CUDA_HOME", "CUDA_PATH", "CXX", "CUDAHOSTCXX", "NVCC_CCBIN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(nvcc, "TOOLKIT", tmp_path / "toolkit")
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(importlib.util, "find_spec", {}.get)
    assert nvcc.find_nvcc() == tmp_path / "toolkit" / "bin" / "nvcc"
    monkeypatch.setenv("PATH", str(tmp_path / "path" / "bin"))
    assert nvcc.find_nvcc() == tmp_path / "path" / "bin" / "nvcc"
    package = importlib.machinery.ModuleSpec("nvidia", None, is_package=True)
    package.submodule_search_locations.append(str(tmp_path / "nvidia"))
    monkeypatch.setattr(importlib.util, "find_spec", {"nvidia": package}.get)
    assert nvcc.find_nvcc() == tmp_path / "path" / "bin" / "nvcc"      # pip's alone cannot compile
    (pip / "include" / "cccl" / "nv").mkdir(parents=True)
    (pip / "include" / "cccl" / "nv" / "target").touch()
    assert nvcc.find_nvcc() == pip / "bin" / "nvcc"
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "nowhere"))
    monkeypatch.setenv("CUDA_PATH", str(tmp_path / "home"))
    found = nvcc.find_nvcc()
    assert found == tmp_path / "home" / "bin" / "nvcc" and nvcc.of_this_machine(found) == []
    (tmp_path / "home" / "lib").mkdir()
    (tmp_path / "home" / "lib" / "libcudart_static.a").touch()
    (tmp_path / "path" / "bin" / "g++-12").touch(0o755)
    runtime = [f"-L{tmp_path / 'home' / 'lib'}"]
    monkeypatch.setenv("CXX", "ccache g++-12")
    assert nvcc.of_this_machine(found) == runtime
    monkeypatch.setenv("CXX", "g++-12")
    assert nvcc.of_this_machine(found) == ["-ccbin", "g++-12", *runtime]
    monkeypatch.setenv("NVCC_CCBIN", "/a/g++-13")
    assert nvcc.of_this_machine(found) == ["-ccbin", "/a/g++-13", *runtime]


def test_processor_refused_by_the_compiler(place, monkeypatch):
    """A compiler that does not know -march=native gets the same command without it."""
    (place / "compiler").write_text("""#!/bin/sh
case "$*" in *-march=native*) echo "error: bad value 'native'"; exit 1; esac
exec c++ "$@"
""")
    load, compiler = build.load, str(place / "compiler")
    monkeypatch.setattr(build, "load", lambda name, source, _, *rest: load(name, source, compiler, *rest))
    assert isinstance(cpu.open_library(), ctypes.CDLL)


def test_import_and_chunk_need_no_compiler_and_no_environment():
    """Nothing is run, printed or read by the import, nor by load("chunk")."""
    root = Path(wkv7_cuda.__file__).parent.parent
    code = (
        "import subprocess, sysconfig, torch, os; subprocess.run = subprocess.Popen = None; environment = os.environ; "
        "os.environ = None; import wkv7_cuda, wkv7_cuda.build, wkv7_cuda.cpu, wkv7_cuda.chunk; "
        "os.environ = environment; wkv7_cuda.load('chunk')"  # for torch and Python's library read it
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
