"""Form of averages on disk: like a model's folder, in shards, or under other names."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable

from . import _native

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def output_form(
    like: str | os.PathLike[str] | None = None,
    shard_size: int | str | None = None,
    rename: str | Iterable[str] = (),
    leave_out: Iterable[str] = (),
    follow_links: bool = False,
) -> _native.OutputForm:
    """Reads the form of averages; see `PostHocEMA.write`."""
    size = None if shard_size is None else _bytes(shard_size)
    rules = [rename] if isinstance(rename, str) else list(rename)
    return _native.OutputForm(like, size, rules, patterns("leave_out", leave_out), follow_links)


def part_text(part: tuple[int, int] | None) -> str | None:
    """Returns a part as the program writes it: "K/N"."""
    if part is None:
        return None
    number, count = part
    return f"{number}/{count}"


def patterns(option: str, given: Iterable[str]) -> list[str]:
    """Returns the names or globs of an option.

    Raises:
        TypeError: If it is a single text.
    """
    if isinstance(given, str):
        raise TypeError(f"{option} is a list of names or globs, such as [{given!r}]")
    return list(given)


def _bytes(size: int | str) -> int:
    """Returns a size in bytes: a number, or a text such as "5GB"."""
    found = re.fullmatch(r"([0-9.]+) *([A-Za-z]*)", str(size).strip())
    if found is None or found[2].upper() not in _UNITS or found[1].count(".") > 1 or found[1] == ".":
        raise ValueError(f"shard_size = {size!r}: give a number of bytes, or a text such as '5GB'")
    return int(float(found[1]) * _UNITS[found[2].upper()])
