#!/usr/bin/env python3
"""Compiles the kernels for every architecture and checks that the machine code keeps what README.md promises.

Needs nvcc (NVCC, or PATH) and cuobjdump (CUOBJDUMP, beside nvcc, or PATH). Exits with 1 if a promise is broken.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

# The build and the tests take every file beside the kernels for one of theirs.
sys.dont_write_bytecode = True
import in_flight

HERE = Path(__file__).resolve().parent
SOURCES = ["update", "look", "blend", "gather", "replay"]
ARCHITECTURES = [75, 80, 90, 100, 120]
# Flags of build.rs.
FLAGS = ["-std=c++17", "-O3", "-fmad=false", "-ftz=false"]
# KB in flight that a multiprocessor of each architecture needs to fill its memory's bandwidth (README.md).
NEEDED = {75: 8, 80: 16, 90: 32, 100: 32, 120: 16}
SLOW_F64 = (75, 120)  # architectures with one f64 unit for 32 or 64 of f32

# Instructions that no kernel may contain, and what each would mean.
FORBIDDEN = {
    "LDL": "local memory is read",
    "STL": "local memory is written",
    "LDS": "shared memory is read",
    "STS": "shared memory is written",
    "ATOMS": "shared memory is used",
    "BAR": "threads wait for each other",
    "SHFL": "threads exchange values",
    "MUFU": "a function is approximated",
    "DMUL": "an f64 product is rounded by itself",
    "RET": "a function is called",
}


def numbered(prefix, last):
    return [f"{prefix}_{i}" for i in range(1, last + 1)]


KERNELS = {
    "update": [
        *(numbered("update_plain", 8) + numbered("update_compensated", 8)),
        *(numbered("graph_plain", 4) + numbered("graph_compensated", 4)),
    ],
    "look": ["look", "look_in_graph", "join_looks"],
    "blend": numbered("blend", 8),
    "gather": ["gather"],
    "replay": ["prepare_replay", "end_replay"],
}
ALL = [kernel for names in KERNELS.values() for kernel in names]
# Kernels whose bytes in flight are in README.md: those that stream f32 and 16-bit values.
COUNTED = KERNELS["update"] + KERNELS["blend"]


def number_of(kernel):
    """Returns the number of profiles or targets, or 0."""
    last = kernel.rsplit("_", 1)[-1]
    return int(last) if last.isdigit() else 0


def blocks(kernel):
    """Returns the blocks per multiprocessor in the launch bounds."""
    number = number_of(kernel)
    if kernel.startswith("graph"):
        return 3
    if kernel.startswith("update"):
        return 4 if "plain" in kernel or number < 5 else 3 if number < 7 else 2
    if kernel.startswith("blend"):
        return 3 if number <= 4 else 2
    return 1


def most_registers(kernel):
    """Returns the registers a thread may use: they are allocated 8 at a time, and 255 are addressable."""
    return min(255, in_flight.REGISTERS // (in_flight.THREADS * blocks(kernel)) // 8 * 8)


def needed(kernel, arch):
    """Returns the KB that must be in flight. If sums in f64 take longer than the loads, fewer are enough."""
    if kernel in KERNELS["blend"] and arch in SLOW_F64:
        return 0
    return NEEDED[arch] // (2 if kernel in KERNELS["blend"][4:] else 1)


def expected(kernel):
    """Returns the main loops as (how often, least number of each instruction).

    A main loop is a piece of code without a jump, and with no access to global memory below 64 bits (README.md).
    """
    number = number_of(kernel)
    if kernel.startswith(("update", "graph")):
        return expected_update(number, "compensated" in kernel)
    if kernel.startswith("blend"):
        return expected_blend(number)
    one = {
        # f32, f16, bf16; of f64 only the halves with the exponents are loaded
        **dict.fromkeys(["look", "look_in_graph"], [(3, {"LDG.128": 4})]),
        **dict.fromkeys(["join_looks", *KERNELS["replay"]], []),
        "gather": [(1, {"LDG.128": 1, "STG.128": 1})],
    }
    return one[kernel]


def expected_update(profiles, compensated):
    # Unroll in update.cu.
    unroll = 4 if profiles == 1 and not compensated else 2 if profiles + compensated <= 3 else 1
    averages, terms = unroll * profiles, unroll * profiles if compensated else 0
    written = {"STG.128": averages, "STG.64": terms}
    return [
        (1, {"LDG.128": unroll + averages, "LDG.64": terms, **written}),  # f32 parameters
        (2, {"LDG.128": averages, "LDG.64": unroll + terms, **written}),  # f16, bf16
    ]


def expected_blend(targets):
    # Batch in blend.cu: 128 bytes of sources, and 8 sources at most.
    f32 = {"LDG.128": 8, "DFMA": 32 * targets}
    halves = {"LDG.128": 8, "DFMA": 64 * targets} if targets <= 2 else {"LDG.64": 8, "DFMA": 32 * targets}
    return [(1, f32), (2, halves)]


def find_tools():
    nvcc = os.environ.get("NVCC") or shutil.which("nvcc")
    if not nvcc or not Path(nvcc).is_file():
        sys.exit("nvcc was not found: set NVCC, or put it on PATH")
    beside = Path(nvcc).resolve().parent / "cuobjdump"
    cuobjdump = os.environ.get("CUOBJDUMP") or (str(beside) if beside.is_file() else shutil.which("cuobjdump"))
    if not cuobjdump:
        packages = "nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm"
        sys.exit(f"cuobjdump was not found: set CUOBJDUMP, or install it beside nvcc (pip install {packages})")
    return nvcc, cuobjdump


def run(command):
    # cuobjdump calls nvdisasm, which is in the same folder.
    path = f"{Path(command[0]).resolve().parent}{os.pathsep}{os.environ.get('PATH', '')}"
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PATH": path})
    if done.returncode != 0:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def compile_one(tools, folder, source, arch):
    """Returns the compiler's report and the machine code of one source for one architecture."""
    nvcc, cuobjdump = tools
    cubin = Path(folder) / f"{source}.{arch}.cubin"
    compiler = ["-ccbin", os.environ["NVCC_CCBIN"]] if "NVCC_CCBIN" in os.environ else []
    target = ["-cubin", f"-arch=sm_{arch}", "-Xptxas", "-v", "-o", str(cubin)]
    report = run([nvcc, *FLAGS, *compiler, *target, str(HERE / f"{source}.cu")])
    return report, run([cuobjdump, "-sass", str(cubin)])


def resources(report):
    """Returns the registers, stack and spills of each kernel from the compiler's report."""
    pattern = re.compile(
        r"Function properties for (\w+)\s+(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads\s+"
        r"ptxas info\s*: Used (\d+) registers"
    )
    found = {}
    for name, stack, stores, loads, registers in pattern.findall(report):
        found[name] = {"registers": int(registers), "stack": int(stack), "spills": int(stores) + int(loads)}
    return found


LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][A-Z0-9]*[A-Za-z0-9_.]*)(.*);")
JUMPS = ("BRA", "BRX", "JMP", "CALL", "EXIT", "RET", "BSYNC", "BREAK")


def instructions(sass):
    """Returns the instructions of each kernel: address, name with modifiers, operands."""
    found, code = {}, None
    for line in sass.splitlines():
        if "Function :" in line:
            code = found.setdefault(line.split(":")[1].strip(), [])
        elif code is not None and (match := LINE.match(line)):
            code.append((int(match.group(1), 16), match.group(3), match.group(4)))
    return found


def pieces(code):
    """Splits code where something jumps: each piece is a list of names and operands."""
    targets = set()
    for _, opcode, operands in code:
        if opcode.split(".")[0] in JUMPS:
            targets |= {int(text, 16) for text in re.findall(r"0x([0-9a-f]+)", operands)}
    found, piece = [], []
    for address, opcode, operands in code:
        if address in targets:
            found.append(piece)
            piece = []
        piece.append((opcode, operands))
        if opcode.split(".")[0] in JUMPS:
            found.append(piece)
            piece = []
    return [*found, piece]


def count(counter, name, width=None):
    """Counts the instructions of a name, with any modifiers, and with `width` bits if that is given."""
    total = 0
    for opcode, n in counter.items():
        parts = opcode.split(".")
        if parts[0] == name and (width is None or str(width) in parts):
            total += n
    return total


def pairs(counter, name):
    """Counts f32 operations, of which newer architectures do two at a time."""
    return count(counter, name) + 2 * count(counter, name + "2")


def accesses(counter):
    return {f"{name}.{width}": count(counter, name, width) for name in ("LDG", "STG") for width in (128, 64)}


def loops(code, least):
    """Returns the pieces of code with these instructions and no narrow access."""
    found = []
    for piece in pieces(code):
        counter = Counter(opcode for opcode, _ in piece)
        wide = {**accesses(counter), "DFMA": count(counter, "DFMA")}
        narrow = count(counter, "LDG") + count(counter, "STG") - sum(accesses(counter).values())
        if narrow == 0 and all(wide[name] >= n for name, n in least.items()):
            found.append(piece)
    return found


def main_loops(kernel, arch, registers, code):
    """Checks that the main loops are there. Returns what is wrong, and the KB in flight in each."""
    problems, flights = [], []
    for times, least in expected(kernel):
        found = loops(code, least)
        flights.append(in_flight.per_multiprocessor(found, times, registers, arch))
        if len(found) < times:
            asked = ", ".join(f"{n} x {name}" for name, n in least.items() if n)
            problems.append(f"{len(found)} loops in vectors with {asked}, the source has {times}")
        elif kernel in COUNTED and flights[-1] < needed(kernel, arch):
            problems.append(f"{flights[-1]} KB are in flight per multiprocessor, {needed(kernel, arch)} are needed")
    return problems, flights


def row(kernel, arch, used, code):
    counter = Counter(opcode for _, opcode, _ in code)
    wide = accesses(counter)
    problems = []
    if used["spills"] or used["stack"]:
        problems.append(f"{used['spills']} bytes are spilled, {used['stack']} bytes of stack are used")
    if used["registers"] > most_registers(kernel):
        problems.append(f"{used['registers']} registers, the launch bounds allow {most_registers(kernel)}")
    problems += [f"{count(counter, name)} x {name}: {why}" for name, why in FORBIDDEN.items() if count(counter, name)]
    flushed = [opcode for opcode in counter if "FTZ" in opcode.split(".")]
    problems += [f"{opcode}: subnormals are flushed" for opcode in flushed]
    generic = [opcode for opcode in counter if opcode.split(".")[0] in ("LD", "ST")]
    problems += [f"{opcode}: an access of generic type" for opcode in generic]
    missing, flights = main_loops(kernel, arch, used["registers"], code)
    problems += missing + arithmetic(kernel, counter)
    flights = {"blocks": in_flight.blocks(used["registers"], arch), "KB": flights}
    return {"kernel": kernel, "arch": f"sm_{arch}", **used, **flights, **wide, "problems": problems}


def arithmetic(kernel, counter):
    """Checks that the sums and products are those of the source, neither contracted nor split."""
    fused, sums, products = (pairs(counter, name) for name in ("FFMA", "FADD", "FMUL"))
    # Products by themselves are with powers of two: one for each low-order term that is decoded.
    ratio = (0, 0, 0)
    if kernel.startswith(("update", "graph")):
        ratio = (2, 5, 1) if "compensated" in kernel else (1, 1, 0)
    times = max(fused, sums, products) // max(ratio) if any(ratio) else 0
    if (fused, sums, products) != tuple(times * n for n in ratio) or any(ratio) and times == 0:
        found = f"{fused} fused products, {sums} sums and {products} products of f32"
        return [f"{found}; the source has {ratio[0]}, {ratio[1]} and {ratio[2]} for each average"]
    if kernel.startswith("blend") and (count(counter, "DADD") or not count(counter, "DFMA")):
        return [f"{count(counter, 'DADD')} f64 sums, the source has only fused products"]
    return []


def check(tools, jobs):
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(jobs) as pool:
        work = [(source, arch) for source in SOURCES for arch in ARCHITECTURES]
        done = list(pool.map(lambda item: compile_one(tools, folder, *item), work))
    rows = []
    for (source, arch), (report, sass) in zip(work, done):
        used, code = resources(report), instructions(sass)
        if sorted(used) != sorted(KERNELS[source]) or sorted(code) != sorted(KERNELS[source]):
            sys.exit(f"{source}.cu, sm_{arch}: the kernels are {sorted(code)}: add new ones to KERNELS in this script")
        rows += [row(kernel, arch, used[kernel], code[kernel]) for kernel in KERNELS[source]]
    order = {kernel: i for i, kernel in enumerate(ALL)}
    return sorted(rows, key=lambda r: order[r["kernel"]])


COLUMNS = ["kernel", "arch", "registers", "allowed", "blocks", "KB", "spills", "LDG.128", "LDG.64", "STG.128", "STG.64"]


def table(rows):
    cells = [COLUMNS] + [[str({**r, "allowed": most_registers(r["kernel"])}[c]) for c in COLUMNS] for r in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(COLUMNS))]
    pad = lambda i, text: text.ljust(widths[i]) if i < 2 else text.rjust(widths[i])
    return "\n".join("  ".join(pad(i, text) for i, text in enumerate(line)).rstrip() for line in cells)


def markdown(kernels, heads, cell, rows):
    """Returns a table of README.md: a line for each kernel, a column for each architecture."""
    lines = [[*heads, *(f"sm_{arch}" for arch in ARCHITECTURES)]]
    lines.append(["---", *["---:"] * (len(heads) - 1 + len(ARCHITECTURES))])
    for kernel in kernels:
        allowed = [str(most_registers(kernel))] * (len(heads) - 1)
        lines.append([f"`{kernel}`", *allowed, *(cell(r) for r in rows if r["kernel"] == kernel)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def readme_tables(rows):
    """Returns the tables of README.md: registers, and blocks with the KB in flight of f32 and of 16 bits."""
    flight = lambda r: f"{r['blocks']}: {r['KB'][0]} / {r['KB'][1]}"
    return [
        markdown(ALL, ["kernel", "allowed"], lambda r: str(r["registers"]), rows),
        markdown(COUNTED, ["kernel"], flight, rows),
    ]


def compare_with_readme(rows, version):
    """Returns what README.md says differently. Another version of nvcc has other figures."""
    text = (HERE / "README.md").read_text()
    if f"nvcc {version} " not in text:
        print(f"README.md has no figures of nvcc {version}: they were not compared", file=sys.stderr)
        return []
    different = sum(table not in text for table in readme_tables(rows))
    return [f"README.md: {different} tables differ from the machine code; --markdown prints them"] if different else []


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--markdown", action="store_true", help="print the tables of README.md")
    parser.add_argument("--jobs", type=int, default=2, help="compilers that run at the same time")
    options = parser.parse_args()
    tools = find_tools()
    version = re.search(r"release ([\d.]+)", run([tools[0], "--version"]))
    version = version.group(1) if version else "of unknown version"
    rows = check(tools, options.jobs)
    if options.json:
        print(json.dumps({"nvcc": version, "kernels": rows}))
    else:
        print("\n\n".join(readme_tables(rows)) if options.markdown else table(rows))
    problems = [f"{r['kernel']}, {r['arch']}: {problem}" for r in rows for problem in r["problems"]]
    problems += compare_with_readme(rows, version)
    if problems:
        sys.exit("\n".join(problems))


if __name__ == "__main__":
    main()
