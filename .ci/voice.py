#!/usr/bin/env python3
"""Checks the voice and the measures of the sources: CONTRIBUTING.md has the rules.

Prints each place that breaks a rule and exits with status 1 if there is one.

* Fewer than 1% of comment blocks open with a relative clause ("What ...", "Whether ...").
* Some words are not used at all: see WORDS.
* Lines of Rust, CUDA and Python are at most 120 columns wide.
* Functions have at most 60 lines and files at most 500, tests aside.
"""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

TOP = Path(__file__).resolve().parent.parent
CODE = ("src", "cli", "candle", "python", "kernels", "benches", "tests", "fuzz", "build.rs")
OPENERS = re.compile(r"\W*(what|whether|where|how|of|those|who|whoever|whatever|whose)\b", re.I)
OPENED_PERCENT = 1.0
WORDS = re.compile(
    r"\b(told|tells|whoever|anew|(?:is|are) no (?!longer\b|more\b|fewer\b|less\b|other\b)\w+"
    r"|lies (?:in|at|on|there|beside|within|before|after))\b",
    re.I,
)
WORDS_IN = ("src/", "cli/", "python/", "candle/", "benches/")
WIDTH, FUNCTION_LINES, FILE_LINES = 120, 60, 500

Comment = tuple[int, str]


def tracked() -> list[str]:
    """Returns the files of code under version control, or all of them in a tree that is not a repository."""
    listed = subprocess.run(["git", "-C", TOP, "ls-files"], text=True, capture_output=True, check=False)
    suffixes = (".rs", ".cu", ".cuh", ".py", ".pyi")
    if listed.returncode == 0:
        files = listed.stdout.split("\n")
    else:
        files = [path.relative_to(TOP).as_posix() for path in TOP.rglob("*") if "target" not in path.parts]
    names = [name for name in files if name.endswith(suffixes)]
    return [name for name in names if name.startswith(CODE) and (TOP / name).is_file()]


def is_test(name: str) -> bool:
    """Returns true for a file of tests."""
    return bool(re.search(r"(^|/)tests?([/.]|$)|(^|/)test_|selftest", name))


def blocks(text: str, marker: str) -> Iterator[Comment]:
    """Yields the first line and the words of each run of line comments."""
    block: list[str] = []
    start = 0
    for number, line in enumerate([*text.split("\n"), ""], 1):
        found = re.match(rf"\s*{marker}\s?(.*)$", line)
        if found:
            start = start if block else number
            block.append(found.group(1))
        elif block:
            yield start, " ".join(block)
            block = []


def docstrings(text: str) -> Iterator[Comment]:
    """Yields the line and the text of each docstring of a Python file."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            doc = ast.get_docstring(node)
            if doc:
                yield getattr(node, "lineno", 1), doc.replace("\n", " ")


def comments(name: str, text: str) -> list[Comment]:
    """Returns the comment blocks of a file, without code samples and safety comments."""
    if name.endswith((".py", ".pyi")):
        found = [*blocks(text, "#(?!!)"), *docstrings(text)]
    else:
        found = list(blocks(text, "//[/!]?"))
    return [(line, block) for line, block in found if not re.match(r"\s*(```|SAFETY|#\s|\W*$)", block)]


def functions_of_rust(text: str) -> Iterator[tuple[int, str, int]]:
    """Yields line, name and length of each function; it ends at the brace in the column where it begins."""
    lines = text.split("\n")
    for start, line in enumerate(lines):
        found = re.match(r"(\s*)(?:pub(?:\([^)]*\))? )?(?:const |async |unsafe |extern \"C\" )*fn (\w+)", line)
        if found:
            for end in range(start, len(lines)):
                one_line = end == start and re.search(r"[};]$", line)
                if one_line or lines[end].startswith((found.group(1) + "}", found.group(1) + ");")):
                    yield start + 1, found.group(2), end - start + 1
                    break


def functions_of_python(text: str) -> Iterator[tuple[int, str, int]]:
    """Yields line, name and length of each function, its docstring aside."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0]
            is_doc = ast.get_docstring(node) is not None
            doc = (first.end_lineno or 0) - first.lineno + 1 if is_doc else 0
            yield node.lineno, node.name, (node.end_lineno or node.lineno) - node.lineno + 1 - doc


def long_functions(name: str, text: str) -> Iterator[str]:
    """Yields the functions of a file that are too long."""
    functions = functions_of_python(text) if name.endswith(".py") else functions_of_rust(text)
    if name.endswith((".py", ".rs")):
        for line, function, length in functions:
            if length > FUNCTION_LINES:
                yield f"{name}:{line}: `{function}` has {length} lines, {FUNCTION_LINES} are allowed"


def code_of(name: str, text: str) -> str:
    """Returns a file without its inline tests."""
    return text.split("#[cfg(test)]\nmod tests {")[0] if name.endswith(".rs") else text


def check_file(name: str, text: str) -> Iterator[str]:
    """Yields the places of a file that break a rule by themselves."""
    for number, line in enumerate(text.split("\n"), 1):
        if len(line) > WIDTH:
            yield f"{name}:{number}: {len(line)} columns, {WIDTH} are allowed"
        found = WORDS.search(line) if name.startswith(WORDS_IN) else None
        if found:
            yield f"{name}:{number}: `{found.group(0)}`"
    if not is_test(name):
        code = code_of(name, text)
        yield from long_functions(name, code)
        if code.count("\n") > FILE_LINES:
            yield f"{name}: {code.count(chr(10))} lines, {FILE_LINES} are allowed"


def main() -> int:
    """Checks every file and returns the exit status."""
    found: list[str] = []
    opened: list[str] = []
    count = 0
    for name in tracked():
        text = (TOP / name).read_text(encoding="utf-8")
        found += check_file(name, text)
        for line, block in comments(name, text):
            count += 1
            if OPENERS.match(block):
                opened.append(f"{name}:{line}: opens with a relative clause: {block[:80]}")
    percent = 100 * len(opened) / max(count, 1)
    if percent >= OPENED_PERCENT:
        found += opened
    print("\n".join([*found, f"{count} comment blocks, {percent:.2f}% open with a relative clause"]))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
