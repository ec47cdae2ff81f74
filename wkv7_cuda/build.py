"""One source file -> one shared library with C functions, compiled when first asked for and opened with ctypes.

The sources include no torch header, which is why this takes seconds (a GPU's half a minute) and is tied to no version
of torch or Python.

    library = load("wkv7_cpu", Path("wkv7_cpu.cpp"), "c++", ["-O3", "-shared", "-fPIC"])

Where: `$TORCH_EXTENSIONS_DIR/pissa_rwkv`, else `~/.cache/pissa_rwkv`; below it one folder per key, the sha256 of
sources, flags, compiler version and processor features (a home folder may be shared by unlike machines, and
`-march=native` code of one of them dies on another). In it: `NAME.so`, its checksum `NAME.so.sha256`, and `lock`.

How several processes share it:
 * whoever holds the `flock` on `lock` builds, the others wait for it and then find the library (torchrun: one build);
 * the operating system drops a flock when its process dies, however it dies, so no lock is ever stale;
 * the compiler writes into a fresh `build-*` folder, and only a whole library is renamed to `NAME.so`. A compiler
   that outlives its killed parent thus writes where nobody looks; the next builder removes that folder;
 * a file that does not match its checksum is never opened (a truncated one would kill the process by SIGBUS, which
   Python cannot catch) but built again.
"""

import ctypes
import fcntl
import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from pathlib import Path

# g++, clang `x.cpp:3:5: error: ...`; nvcc `x.cu(3): error: ...`, `nvcc fatal   : ...`; ld `undefined reference to ...`
FIRST_ERROR = re.compile(r"\b(error|fatal)\s*:|cannot find -l|undefined (reference|symbol)|: not found", re.IGNORECASE)
REMEDY = "or use an operator that needs no compiler: --op chunk (RWKV-7 on a GPU: --op triton)"

MENDS = (  # what that line says, what helps
    ("unsupported (GNU|clang) version", "set NVCC_CCBIN to an older g++"),
    ("host compiler properties|cc1plus", "install g++"),
    ("gpu.architecture", "use a newer CUDA toolkit for a newer GPU, one up to 12.9 for a GPU before sm_75"),
    ("", "repair or update the compiler"),
)


class BuildError(RuntimeError):
    """A library could not be built or opened. The text is one line: what failed, why, what to do."""

    @property
    def why(self) -> str:
        """The same without REMEDY, for whoever has taken another operator already."""
        return str(self).removesuffix(REMEDY).rstrip(", ")


def load(
    name: str, source: Path, compiler: str, flags: Sequence[str], headers: Sequence[Path] = ()
) -> ctypes.CDLL:
    """Open the library made from `source`, compiling it first if the cache does not have it.

    name: stem of the library's file. compiler: a command or a path, run as `compiler FLAGS -I... source -o library`.
    flags: all it needs to make a shared library, thus also -shared and -fPIC. headers: files that `source` includes;
    they count for the key, and their folders are searched.
    An unusable cache folder costs a line on stderr and a build in a temporary folder. All else raises BuildError.
    """
    path = shutil.which(compiler)
    if path is None:
        raise BuildError(f"{source.name} needs the compiler {compiler!r}, which is not on PATH: install it, {REMEDY}")
    command = [path, *flags, *dict.fromkeys(f"-I{header.parent}" for header in headers), str(source)]
    try:
        key = _key([source, *headers], [path, *flags])
    except OSError as error:
        raise BuildError(f"{name} cannot be built, a source is missing ({error}): reinstall, {REMEDY}") from None
    try:
        return _cached(cache_root() / f"{name}-{key}", name, command)
    except OSError as error:
        unusable = f"its cache is unusable ({error}): set TORCH_EXTENSIONS_DIR to a folder that can be written"
        print(f"{name} is built in a temporary folder, {unusable}", file=sys.stderr)
    try:
        with tempfile.TemporaryDirectory(prefix="pissa_rwkv-") as folder:  # once open, a library needs its file no more
            return _cached(Path(folder), name, command)
    except OSError as error:
        raise BuildError(f"{name} cannot be built, {unusable}; nor can a temporary one ({error})") from None


def cache_root() -> Path:
    """Folder of all keys; the environment is read here, at the time of the call. OSError: there is no home."""
    extensions = os.environ.get("TORCH_EXTENSIONS_DIR")
    try:
        return Path(extensions, "pissa_rwkv") if extensions else Path.home() / ".cache" / "pissa_rwkv"
    except RuntimeError as error:
        raise OSError(str(error)) from None


def find_ninja() -> str:
    """Path of ninja: on PATH, beside the interpreter (a virtual environment not activated), or in its package."""
    beside = os.pathsep.join([str(Path(sys.executable).parent), sysconfig.get_path("scripts")])
    ninja = shutil.which("ninja") or shutil.which("ninja", path=beside)
    if ninja is None:
        try:
            from ninja import BIN_DIR
        except ImportError:
            raise BuildError(f"compiling needs ninja, which was not found: pip install ninja, {REMEDY}") from None
        ninja = str(Path(BIN_DIR, "ninja"))
    return ninja


def _key(sources: Sequence[Path], command: Sequence[str]) -> str:
    """sha256 over all that the library depends on, 16 hex digits."""
    digest = hashlib.sha256()
    for part in [*(source.read_bytes() for source in sources), _version(command[0]), _cpu(), *map(str.encode, command)]:
        digest.update(len(part).to_bytes(8, "big") + part)
    return digest.hexdigest()[:16]


def _version(compiler: str) -> bytes:
    try:
        return subprocess.run([compiler, "--version"], capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise BuildError(f"the compiler {compiler} does not run ({error}): reinstall it, {REMEDY}") from None


def _cpu() -> bytes:
    """Machine and instruction sets: Linux lists the latter per core as `flags` (x86) or `Features` (Arm)."""
    try:
        features = re.search(rb"^(flags|Features)\s*:(.*)$", Path("/proc/cpuinfo").read_bytes(), re.MULTILINE)
    except OSError:  # macOS
        features = None
    return platform.machine().encode() + (features[2] if features else platform.processor().encode())


def _cached(folder: Path, name: str, command: Sequence[str]) -> ctypes.CDLL:
    """The library in `folder`, built under the lock if it is missing or damaged. OSError: folder is unusable."""
    library = folder / f"{name}.so"
    loaded = _open(library)  # without the lock: a read-only cache that has the library is good enough
    if loaded is not None:
        return loaded
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        loaded = _open(library)  # another process may have built it while this one waited
        if loaded is None:
            _compile(library, command)
            loaded = _open(library)
    if loaded is None:
        raise OSError(f"{library} was built but cannot be opened: is its disk full or mounted noexec?")
    return loaded


def _open(library: Path) -> ctypes.CDLL | None:
    """The opened library; None if it is missing, differs from its checksum, or the loader refuses it."""
    try:
        whole = _checksum(library) == library.with_suffix(".so.sha256").read_bytes()
        return ctypes.CDLL(str(library)) if whole else None
    except OSError:
        return None


def _checksum(library: Path) -> bytes:
    return hashlib.sha256(library.read_bytes()).hexdigest().encode()


def _compile(library: Path, command: Sequence[str]) -> None:
    """Run ninja in a fresh folder beside `library`, then move the result into place. The caller holds the lock."""
    ninja, source = find_ninja(), Path(command[-1]).name
    print(f"compiling {source}: once, for less than a minute", file=sys.stderr, flush=True)
    for leftover in library.parent.glob("build-*"):  # of a process that was killed
        shutil.rmtree(leftover, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix="build-", dir=library.parent) as build:
        shell = shlex.join([*command, "-o", library.name]).replace("$", "$$")
        escaped = re.sub(r"([$ :])", r"$\1", command[-1])
        Path(build, "build.ninja").write_text(
            f"rule compile\n  command = {shell}\n\nbuild {library.name}: compile {escaped}\n"
        )
        run = subprocess.run(
            [ninja], cwd=build, env={**os.environ, "LC_ALL": "C"},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
        )  # fmt: skip
        if run.returncode:
            lines = [line.strip() for line in run.stdout.splitlines() if line.strip()]
            first = next((line for line in lines if FIRST_ERROR.search(line)), lines[-1] if lines else "no output")
            first = first.rstrip(".")
            mend = next(mend for said, mend in MENDS if re.search(said, first))
            raise BuildError(f"compiling {source} with {Path(command[0]).name} failed: {first}; {mend}, {REMEDY}")
        built = Path(build, library.name)
        library.with_suffix(".so.sha256").write_bytes(_checksum(built))
        os.replace(built, library)
