"""PTX, the code that nvcc makes of a kernel, as C++ that tests/cuda_on_cpu runs: the kernel itself and not its source.

What g++ makes of a .cu for the CPU says nothing of the functions that wrap PTX on a GPU, whose twins it calls, nor of
what nvcc did to the rest. This takes nvcc's own text, inline assembler and all, an instruction a statement, with the
meaning that the PTX ISA (9.0) gives it; what is not known here is an error. An instruction that touches memory is a
call into ptx.h, which checks alignment, bounds and order, and can write accesses down: `cost` counts what they take.
"""

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np

TYPE = {"pred": "bool", "f32": "float"} | {
    f"{kind}{bits}": f"{'' if kind == 's' else 'u'}int{bits}_t" for kind in "bus" for bits in (8, 16, 32, 64)
}
REGISTERS = {"pred": "bool", "b16": "uint16_t", "b32": "uint32_t", "f32": "float", "b64": "uint64_t"}
SPECIAL = {"%tid.x": "threadIdx.x", "%ctaid.x": "blockIdx.x", "%ntid.x": "blockDim.x", "%nctaid.x": "gridDim.x"}

# name -> what it makes of its operands x, y, z, w, which are of type T. (With -fwrapv, as integers here wrap.)
VALUE = {
    "mov": "x", "cvta": "x", "add": "x + y", "sub": "x - y", "mul": "x * y", "mad": "x * y + z", "div": "x / y",
    "rem": "x % y", "neg": "-x", "not": "x ^ T(-1)", "and": "x & y", "or": "x | y", "xor": "x ^ y",
    "min": "ptx::lesser(x, y)", "max": "ptx::greater(x, y)", "abs": "std::fabs(x)", "rcp": "1 / x",
    "fma": "std::fma(x, y, z)", "fma.rm": "fma_down(x, y, z)", "ex2": "std::exp2(x)", "div.approx": "quotient(x, y)",
    "shl": "y < 8 * sizeof(T) ? x << y : 0", "shr": "shifted_right(x, y)",
    "selp": "z ? x : y", "bfi": "inserted(x, y, z, w)", "prmt": "permuted(x, y, z)",
}  # fmt: skip
OTHER_TYPES = {"shl": {1: "u32"}, "shr": {1: "u32"}, "selp": {2: "pred"}}  # of operands, where they are not T
COMPARISON = {"eq": "x == y", "ne": "(x < y || x > y)", "lt": "x < y", "le": "x <= y", "gt": "x > y", "ge": "x >= y",
              "ltu": "!(x >= y)", "leu": "!(x > y)", "gtu": "!(x <= y)", "geu": "!(x < y)"}  # fmt: skip
CONVERSION = {"bf16.f32": "__float2bfloat16(x).bits", "f16.f32": "__float2half(x).bits",
              "f32.f16": "__half2float({x})", "bf16x2.f32": "pack(y, x)"}  # fmt: skip


def of_ptx(ptx: str, source: Path, without: str = "no kernel") -> str:
    """C++ that includes the source, for its functions of the host, and runs `ptx` where they launch a kernel; but for
    those in whose name `without` is, of which g++ makes what it always did."""
    entries = [*re.finditer(r"^(?:\.visible )?\.entry (\w+)\((.*?)^\{\n(.*?)^\}", ptx, re.S | re.M)]
    files = dict(re.findall(r'^\s*\.file\s+(\d+) "([^"]+)"', ptx, re.M))
    names = subprocess.run(["c++filt"], input="\n".join(m[1] for m in entries), text=True, capture_output=True,
                           check=True).stdout.replace("(anonymous namespace)::", "").splitlines()  # fmt: skip
    code = [f'#include "{source}"', '#include "ptx.h"', "namespace {", "using namespace ptx;"]
    for i, (entry, name) in enumerate(zip(entries, names, strict=True)):
        first = ptx.count("\n", 0, entry.start(3)) + 1
        kernel = name[: matching(name)].removeprefix("void ")
        if without in kernel:
            continue
        code += [f"// {kernel}", f"void kernel_{i}(const char* const* param) {{", f"Self self({i});"]
        code += [statement for line in function(entry[3], first, files) for statement in line]
        code += ["}", f"const Translated translated_{i}({kernel}, kernel_{i});"]
    return "\n".join([*code, "}", ""])


def matching(name: str) -> int:
    """Where a function's parameters begin: behind its template arguments."""
    depth = 0
    for i, c in enumerate(name):
        depth += {"<": 1, ">": -1}.get(c, 0)
        if c == "(" and depth == 0:
            return i
    return len(name)


def function(body: str, first: int, files: dict[str, str]) -> Iterator[list[str]]:
    """The statements of every line; `first` is the number of the first."""
    source = "?"
    for number, line in enumerate(body.splitlines(), first):
        line = re.sub(r"//.*", "", line).strip()
        if m := re.match(r"\.loc\s+(\d+) (\d+)(?:.*inlined_at (\d+) (\d+))?", line):
            places = [f"{Path(files[file]).name}:{at}" for file, at in (m.groups()[:2], m.groups()[2:]) if file]
            source = ", called at ".join(places)
        elif m := re.match(r"\.reg \.(\w+)\s+%(\w+)<(\d+)>;", line):
            yield [f"{REGISTERS[m[1]]} {m[2]}[{m[3]}];"]
        elif m := re.match(r"\$(\w+):", line):
            yield [f"{m[1]}:;"]
        elif line and line not in ("{", "}") and not line.startswith("."):
            text = line.strip("{}").strip() if re.fullmatch(r"\{.*;\s*\}", line) else line
            try:
                yield [statement(text.rstrip(";"), f'{{"{source}", {number}}}')]
            except (KeyError, ValueError) as e:
                raise ValueError(f"PTX line {number}: {line}") from e


def statement(text: str, where: str) -> str:
    condition, op, rest = re.fullmatch(r"(?:@(!?%p\d+)\s+)?([a-z][\w.:]*)\s*(.*)", text).groups()
    code = instruction(op, operands(rest), where)
    return f"if ({value(condition)}) {{ {code} }}" if condition else code


def operands(text: str) -> list[str]:
    """Split at the commas that are not in braces."""
    return [part.strip() for part in re.findall(r"(?:\{[^}]*\}|[^,{])+", text)]


def value(operand: str) -> str:
    """An operand as C++: a register, a number, a name."""
    if operand in SPECIAL:
        return SPECIAL[operand]
    if m := re.fullmatch(r"(!?)%([a-z]+)(\d+)", operand):
        return f"{m[1]}{m[2]}[{m[3]}]"
    if m := re.fullmatch(r"0f([0-9A-F]{8})", operand):
        return f"as<float>(0x{m[1]}u)"
    if re.fullmatch(r"-?\d+", operand):
        return f"{operand}ll"
    if m := re.fullmatch(r"\w+_param_(\d+)", operand):
        return f"reinterpret_cast<uint64_t>(param[{m[1]}])"
    if operand == "smem":
        return "SMEM"
    raise ValueError(operand)


def address(operand: str) -> str:
    """[register], [register+number] or [name+number]."""
    base, sign, offset = re.fullmatch(r"\[([%\w]+)(?:([+-])(-?\d+))?\]", operand).groups()
    return value(base) + (f" {sign} {offset}" if sign else "")


def several(operand: str) -> list[str]:
    """{a, b, c, d}, or one alone."""
    return [value(x.strip()) for x in operand.strip("{}").split(",")]


def computed(
    target: str, kind: str, expression: str, inputs: list[str], kinds: list[str], flush: bool = False
) -> str:
    """target = expression, whose type is `kind`, of inputs that are called x, y, z, w. flush: subnormals are zeros."""
    zeroed = "flushed" if flush else ""
    named = "".join(f"const auto {name} = {zeroed if k == 'f32' else ''}(as<{TYPE[k]}>({value(x)})); "
                    for name, x, k in zip("xyzw", inputs, kinds, strict=False))  # fmt: skip
    result = f"{zeroed if kind == 'f32' else ''}(static_cast<T>({expression}))"
    return f"{{ using T [[maybe_unused]] = {TYPE[kind]}; {named}put({target}, {result}); }}"


def instruction(op: str, args: list[str], where: str) -> str:
    name, *more = op.split(".")
    kind = more[-1] if more else ""
    if name == "bra":
        return f"goto {args[0].removeprefix('$')};"
    if name == "ret":
        return "return;"
    if op == "bar.sync":
        return f"self.barrier({where});" if args == ["0"] else fail(args)
    if op == "bar.warp.sync":
        return f"self.warp_barrier({where});" if args == ["-1"] else fail(args)
    if name in ("ld", "st"):
        return memory(name, more, args, where)
    if name == "ldmatrix":
        transposed = str("trans" in more).lower()
        return f"self.ldmatrix({transposed}, {address(args[1])}, {where}, {', '.join(several(args[0]))});"
    if op == "movmatrix.sync.aligned.m8n8.trans.b16":
        return f"movmatrix({value(args[0])}, {value(args[1])}, {where});"
    if name == "mma":
        (c, a, b, before) = map(several, args)
        return f"mma({{&{', &'.join(c)}}}, {{{', '.join(a)}}}, {{{', '.join(b)}}}, {{{', '.join(before)}}}, {where});"
    if op == "cp.async.cg.shared.global":
        to, source, size, there = address(args[0]), address(args[1]), args[2], value(args[3])
        return f"self.cp_async({to}, {source}, {size}, {there}, {where});"
    if op == "cp.async.commit_group":
        return "cp_async_commit();"
    if op == "cp.async.wait_group":
        return f"self.cp_async_wait({args[0]});"
    if name == "prefetch":
        return f"self.prefetch({address(args[0])});"
    if name == "shfl":
        target, predicate = args[0].split("|")
        lane = {"bfly": "shuffle_xor", "idx": "shuffle"}[more[1]]
        return (f"{lane}({value(target)}, {', '.join(value(x) for x in args[1:])}, {where}); "
                f"{value(predicate)} = true;")  # fmt: skip
    if name == "setp":
        comparison, *flush = more[:-1]
        if flush not in ([], ["ftz"]) or len(args) != 3:
            fail(op)
        return computed(value(args[0]), "pred", COMPARISON[comparison], args[1:], [kind] * 2, flush == ["ftz"])
    if name == "cvt":
        return conversion(more, args)
    if name == "mov" and "{" in "".join(args):
        return halves(args) if kind == "b32" else fail(op)
    if name == "mul" and more[0] == "wide":
        wide = f"{kind[0]}{2 * int(kind[1:])}"
        return computed(value(args[0]), wide, "T(x) * T(y)", args[1:], [kind] * 2)
    kinds = [OTHER_TYPES.get(name, {}).get(i, kind) for i in range(4)]
    known = {"fma": {"rm"}, "div": {"approx"}}.get(name, set())
    named = ".".join([name, *(m for m in more if m in known)])
    silent = {"mul": {"lo"}, "mad": {"lo"}, "cvta": {"to", "global"}, "ex2": {"approx"}}.get(name, set())
    if set(more[:-1]) - {"rn", "ftz"} - known - silent or (name, kind) == ("bfi", "b64"):
        raise ValueError(op)
    return computed(value(args[0]), kind, VALUE[named], args[1:], kinds, "ftz" in more)


TRACED = np.dtype([(name, "i4") for name in ("kernel", "block", "thread", "line")] + [("address", "i8")]
                  + [(name, "i4") for name in ("space", "size")])  # fmt: skip
GLOBAL, SHARED = 1, 2


def cost(trace: np.ndarray, space: int) -> dict[int, tuple[int, int]]:
    """Of every kernel in a trace (ptx.h), by its number: what its accesses cost, and the least that so many could.

    A warp's access to shared memory takes a *wavefront* for each 128 bytes, if no two lanes want different words of one
    of the 32 banks, and as many more as do; to global memory, a *sector* of 32 bytes for each that it touches.
    """
    warp, lane = trace["thread"] // 32, trace["thread"] % 32
    who = np.stack([trace[name] for name in ("kernel", "block", "thread", "line", "space")], 1)
    by_thread = np.lexsort(who.T[::-1])                                # stable: in the order of what a thread does
    first = np.r_[True, (np.diff(who[by_thread], axis=0) != 0).any(1)]
    nth = np.empty(len(trace), int)                                    # how often the thread was at this line before
    nth[by_thread] = np.arange(len(trace)) - np.maximum.accumulate(np.where(first, np.arange(len(trace)), 0))
    access = np.stack([trace["kernel"], trace["block"], warp, trace["line"], trace["space"], nth], 1)
    names, access = np.unique(access, axis=0, return_inverse=True)     # what a warp does at once
    here, access = trace["space"] == space, access.ravel()
    size, at, kernel = trace["size"], trace["address"], names[:, 0]
    if space == SHARED:
        phase = lane // np.select([size == 16, size == 8], [8, 16], 32)
        words = [np.stack([access, phase, at // 4 + w], 1)[here & (4 * w < size)] for w in range(4)]
        words = np.unique(np.concatenate(words), axis=0)
        banks, wanted = np.unique(np.c_[words[:, :2], words[:, 2] % 32], axis=0, return_counts=True)
        phases, of = np.unique(banks[:, :2], axis=0, return_inverse=True)
        np.maximum.at(taken := np.zeros(len(phases), int), of.ravel(), wanted)
        spent, least = np.bincount(phases[:, 0], taken, len(names)), np.bincount(phases[:, 0], minlength=len(names))
    else:
        sectors = np.unique(np.stack([access, at // 32], 1)[here], axis=0)
        spent = np.bincount(sectors[:, 0], minlength=len(names))
        least = np.ceil(np.bincount(access[here], size[here], len(names)) / 32)
    return {k: (int(spent[kernel == k].sum()), int(least[kernel == k].sum())) for k in np.unique(kernel[spent > 0])}


def fail(what: object) -> str:
    raise ValueError(what)


def memory(name: str, more: list[str], args: list[str], where: str) -> str:
    place, kind = args if name == "ld" else args[::-1], more[-1]
    registers, at = several(place[0]), address(place[1])
    space = next(s for s in ("global", "shared", "param") if s in more)
    if set(more[:-1]) - {space, "nc", "wb", "v2", "v4"}:
        raise ValueError(more)
    call = {"ld": "load", "st": "store"}[name]
    return f"self.{call}<{TYPE[kind]}, {len(registers)}>({space.upper()}, {at}, {where}, {', '.join(registers)});"


def conversion(more: list[str], args: list[str]) -> str:
    to, of = more[-2:]
    if f"{to}.{of}" in CONVERSION and not set(more[:-2]) - {"rn"}:
        target = {"bf16": "b16", "f16": "b16", "bf16x2": "b32"}.get(to, to)
        kind = {"f16": "b16"}.get(of, of)
        return computed(value(args[0]), target, CONVERSION[f"{to}.{of}"], args[1:], [kind] * 2)
    saturated = "std::isnan(x) ? 0 : std::clamp(x, 0.0f, 1.0f)" if "sat" in more[:-2] else "x"
    if set(more[:-2]) - {"sat", "rn", "ftz"} or f"{to}.{of}" in CONVERSION or "sat" in more and to != "f32":
        raise ValueError(more)
    return computed(value(args[0]), to, saturated, args[1:], [of], "ftz" in more)


def halves(args: list[str]) -> str:
    """mov between 32 bits and two times 16, the low ones first."""
    if args[0].startswith("{"):
        low, high = several(args[0])
        return f"{{ const auto x = as<uint32_t>({value(args[1])}); {low} = x & 0xffff; {high} = x >> 16; }}"
    low, high = several(args[1])
    return f"put({value(args[0])}, as<uint16_t>({low}) | uint32_t{{as<uint16_t>({high})}} << 16);"
