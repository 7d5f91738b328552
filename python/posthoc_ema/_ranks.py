"""Calls that all processes of a data-parallel training make together.

Rank 0 computes, and all get the result; or all get the error that one of them met. Short messages go through the store
of the default process group, so that a rank which waits knows for whom. Tensors are broadcast.
"""

from __future__ import annotations

import builtins
import json
import time
import warnings
from collections.abc import Callable, Iterable
from contextlib import suppress
from types import TracebackType
from typing import Any, TypeVar

from ._launch import distributed, launched

T = TypeVar("T")

Decide = Callable[[list[Any]], list[Any]]
"""Function of rank 0, from the values of all ranks to the answer for each."""

_PREFIX = "posthoc_ema/"
"""Start of all keys in the store."""

PATIENCE = 30.0
"""Seconds of waiting after which a warning names the ranks that are missing."""

_ALL_RANKS = (
    "all ranks must make this call; under `rank_zero_only` a block that only rank 0 runs uses `ema.local` instead"
)

_ASK_RANK_0 = (
    "this process does not track (rank_zero_only), and has no process group to receive the average by: call this on "
    "rank 0, or call torch.distributed.init_process_group before it"
)

# Builtin errors of these classes keep their class on the other ranks, so that all handle them alike.
_KINDS = (ValueError, TypeError, OSError, MemoryError, RuntimeError)


class RankGroup:
    """Processes of a training, as they were when a run was opened under `rank_zero_only`."""

    def __init__(self) -> None:
        self.rank, self._size, self._source = launched()

    @property
    def is_zero(self) -> bool:
        """True on the process that tracks."""
        return self.rank == 0

    def call(self, name: str, arguments: Callable[[], str] = str) -> Call | None:
        """Begins a call of all ranks; None if this process is the only one.

        Args:
            name: Name of the method.
            arguments: Returns the arguments, which must be equal on all ranks. An error of it is one of the first part.

        Raises:
            RuntimeError: If there are several processes, and the process group is missing.
        """
        group = distributed()
        if group is not None:
            call = Call(name, arguments, _exchanges(group))
            if (group.get_rank() == 0) != self.is_zero:
                call.problem = RuntimeError(
                    f"this process began the run as rank {self.rank} (by {self._source or 'default'}), and is rank "
                    f"{group.get_rank()} of the process group: call init_process_group before from_model"
                )
            return call if group.get_world_size() > 1 else None
        if self._size > 1:
            alone = " On rank 0, `ema.local` computes without the others." if self.is_zero else ""
            raise RuntimeError(
                f"`{name}` is a call of all {self._size} processes under `rank_zero_only`, and the process group is "
                f"missing: call torch.distributed.init_process_group before it.{alone}"
            )
        if not self.is_zero:
            raise RuntimeError(_ASK_RANK_0)
        return None


def on_all_ranks(name: str, act: Callable[[], object]) -> None:
    """Calls a function on each rank of the process group, or in the only process. An error of one is raised on all.

    Args:
        name: Name of the method, for messages.
        act: Function to call.
    """
    group = distributed()
    call = None if group is None or group.get_world_size() == 1 else RankGroup().call(name)
    if call is None:
        act()
        return
    with call:
        call.do(act, is_last=True)


class Call:
    """One call of all ranks, in parts.

    After each part all ranks know if it failed on one, and all raise then. As a context manager it also reports what
    this rank raises between two parts.

    Args:
        name: Name of the method.
        arguments: Returns the arguments.
        exchanges: Exchange of messages with the other ranks.
    """

    def __init__(self, name: str, arguments: Callable[[], str], exchanges: _Exchanges):
        self.problem: Exception | None = None
        """Error to raise in the first part."""
        try:
            self.text = f"{name}({arguments()})"
        except Exception as error:
            self.text = name
            self.problem = error
        self._exchanges = exchanges
        self._decide: Decide | None = None
        self._part = 0
        self._is_open = False

    @property
    def rank(self) -> int:
        """Rank of this process in the default process group."""
        return self._exchanges.rank

    def part(self, act: Callable[[], tuple[T, Any]], *, is_last: bool = False) -> tuple[T, Any]:
        """Does this rank's share of a part.

        Args:
            act: Function of this rank. It returns a result, and an answer for JSON that goes from rank 0 to all.
            is_last: True if no further part follows.

        Returns:
            This rank's result, and rank 0's answer.

        Raises:
            BaseException: Whatever `act` raised on this rank.
            Exception: If it raised on another rank, or the ranks make different calls.
        """
        self._is_open = False
        self._part += 1
        try:
            if self.problem is not None:
                raise self.problem
            result, answer = act()
            is_answer = self.rank == 0 or self._decide is not None
            message = {"call": self.text, "part": self._part, "answer": answer if is_answer else None}
        except BaseException as error:
            self._exchange({"error": _described(error)})
            raise
        verdict = self._exchange(message)
        if "error" in verdict:
            raise _raised(verdict["error"])
        self._is_open = not is_last
        return result, verdict["answer"]

    def do(self, act: Callable[[], object], *, is_last: bool = False) -> None:
        """Does a part whose results nobody needs; see `part`."""
        self.part(lambda: (act(), None), is_last=is_last)

    def gather(self, act: Callable[[], Any], decide: Decide) -> Any:
        """Does a part in which rank 0 answers each rank by what all have said.

        Args:
            act: Function of this rank, which returns a value for JSON.
            decide: Function of rank 0, from the values of all ranks to their answers.

        Returns:
            The answer to this rank.

        Raises:
            BaseException: As `part`. An error of `decide` is a ValueError on all ranks.
        """
        self._decide = decide
        try:
            return self.part(lambda: (None, act()))[1]
        finally:
            self._decide = None

    def abandon(self, error: BaseException) -> None:
        """Reports a failure to communicate, after which this rank waits for no other."""
        self._is_open = False
        self._exchanges.abandon(error)

    def _exchange(self, message: dict[str, Any]) -> dict[str, Any]:
        return self._exchanges.exchange(message, self.text, self._decide)

    def __enter__(self) -> Call:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if error is not None and self._is_open:
            self._is_open = False
            self._exchange({"error": _described(error)})


class Notices:
    """Notices that rank 0 leaves for the others, for each run that it opens, without waiting for them."""

    def __init__(self, group: Any):
        self._exchanges = _exchanges(group)
        self._key = ""

    @property
    def is_zero(self) -> bool:
        """True on the rank that leaves the notices."""
        return self._exchanges.rank == 0

    def leave(self, answer: Any) -> None:
        """Leaves the next notice: a value for JSON, or an error that the others raise."""
        is_error = isinstance(answer, BaseException)
        message = {"error": {**_described(answer), "rank": 0}} if is_error else {"answer": answer}
        self._key = self._exchanges.next_notice()
        self._exchanges.store.set(self._key, json.dumps(message))

    def read(self, text: str) -> Any:
        """Waits for the next notice, and returns its value.

        Args:
            text: Call that is being made, for messages.

        Raises:
            Exception: If the notice is an error of rank 0, or does not come until the time-out of the process group.
        """
        self._key = self._exchanges.next_notice()
        message = self._exchanges.wait_for(self._key, text)
        if "error" in message:
            raise _raised(message["error"])
        return message["answer"]

    def leave_further(self, number: int, answer: Any) -> None:
        """Leaves a numbered value for JSON that follows the last notice."""
        self._exchanges.store.set(f"{self._key}/{number}", json.dumps(answer))

    def read_further(self, number: int, text: str) -> Any:
        """Waits for a numbered value that follows the last notice, and returns it."""
        return self._exchanges.wait_for(f"{self._key}/{number}", text)


def open_alone(group: Any) -> None:
    """Leaves word that this rank has opened a run of its own, for ranks that wait for it to open one together."""
    if group.distributed_c10d._get_default_store() is not None:
        with suppress(RuntimeError):
            _exchanges(group).note_alone()


class _Exchanges:
    """Numbered exchanges of messages between all ranks: each sends one, and rank 0 answers all alike.

    Args:
        store: Store of the default process group.
        rank: Rank of this process.
        size: Number of processes.
    """

    def __init__(self, store: Any, rank: int, size: int):
        self.store = store
        self.rank = rank
        self._size = size
        self._number = 0
        self._notices = 0
        # True once this rank has had its say in the present exchange.
        self._is_sent = False

    def exchange(self, message: dict[str, Any], text: str, decide: Decide | None = None) -> dict[str, Any]:
        """Sends a message and returns the answer, which has the key "error" if one rank failed.

        Args:
            message: Message of this rank, for JSON.
            text: Call that is being made, for messages.
            decide: Function of rank 0 that returns the answer to each rank; by default all get that of rank 0.

        Raises:
            RuntimeError: If a rank is missing until the time-out of the process group, or the store fails.
        """
        try:
            verdict = self._collect(message, text, decide) if self.rank == 0 else self._ask(message, text)
        except BaseException as error:
            # The others may go on to the next exchange, and must not wait for this rank there.
            self.abandon(error)
            raise
        self._number += 1
        self._is_sent = False
        return verdict

    def abandon(self, error: BaseException) -> None:
        """Reports an error of this rank in the present exchange, or in the next if it is too late, and goes on."""
        self._number += self._is_sent
        self._is_sent = False
        message = {"error": {**_described(error), "rank": self.rank}}
        try:
            self._set(None if self.rank == 0 else self.rank, message)
        except RuntimeError as failure:
            warnings.warn(f"the other ranks could not be informed of an error: {failure}", RuntimeWarning, stacklevel=2)
        self._number += 1

    def _ask(self, message: dict[str, Any], text: str) -> dict[str, Any]:
        """Sends the message of this rank, and waits for the answer."""
        self._is_sent = True
        self._set(self.rank, message)
        answer: dict[str, Any] = self.wait_for(self._key(), text)
        if answer.get("is_own"):
            # Written before the common answer, and read by this rank alone.
            key = f"{self._key()}/to/{self.rank}"
            answer = self._get(key)
            self.store.delete_key(key)
        return answer

    def next_notice(self) -> str:
        """Returns the key of the next notice."""
        self._notices += 1
        return f"{_PREFIX}notice/{self._notices}"

    def wait_for(self, key: str, text: str) -> Any:
        """Waits for a message of rank 0."""
        # Rank 0 reports the ranks that are missing, and is given the time for it.
        limit = self.store.timeout.total_seconds() + 10
        awaited = "rank 0, which computes, waits for another rank, or is elsewhere"
        self._wait([key], lambda: awaited + self._alone(range(self._size)), text, limit)
        return self._get(key)

    def _collect(self, message: dict[str, Any], text: str, decide: Decide | None) -> dict[str, Any]:
        """Waits for the messages of all ranks, as rank 0, and sends the answer."""
        keys = [self._key(rank) for rank in range(1, self._size)]
        self._wait(keys, lambda: self._missing(keys), text, self.store.timeout.total_seconds())
        verdict = _verdict([message, *map(self._get, keys)], decide)
        self._is_sent = True
        if decide is None or "error" in verdict:
            self._set(None, verdict)
        else:
            answers = [{"answer": answer} for answer in verdict["answer"]]
            for rank in range(1, self._size):
                self.store.set(f"{self._key()}/to/{rank}", json.dumps(answers[rank]))
            self._set(None, {"is_own": True})
            verdict = answers[0]
        # All ranks have read the answer before, or they would not have sent another message.
        for key in [*keys, f"{_PREFIX}{self._number - 1}"]:
            self.store.delete_key(key)
        return verdict

    def _wait(self, keys: list[str], awaited: Callable[[], str], text: str, limit: float) -> None:
        """Waits until all keys are there. The store's own wait can be neither interrupted nor made quiet."""
        begun = time.monotonic()
        pause, is_warned = 0.0002, False
        try:
            while keys and not self.store.check(keys):
                waited = time.monotonic() - begun
                if waited > limit:
                    raise TimeoutError(f"{text}: waited {waited:.0f} s for {awaited()}: {_ALL_RANKS}")
                if waited > PATIENCE and not is_warned:
                    is_warned = True
                    warnings.warn(f"{text} waits for {awaited()}: {_ALL_RANKS}", RuntimeWarning, stacklevel=2)
                time.sleep(pause)
                pause = min(pause * 1.3, 0.05)
        except RuntimeError as error:
            raise RuntimeError(f"{text}: the process group's store failed, as if a rank had ended: {error}") from error

    def _missing(self, keys: list[str]) -> str:
        ranks = [rank for rank, key in enumerate(keys, 1) if not self.store.check([key])]
        return _named(ranks) + self._alone(ranks)

    def note_alone(self) -> None:
        """Notes that this rank has opened a run of its own before the present exchange."""
        self.store.set(f"{self._key(self.rank)}/alone", "")

    def _alone(self, ranks: Iterable[int]) -> str:
        """Returns an addition to a message, of the ranks that have opened runs of their own meanwhile."""
        alone = [rank for rank in ranks if self.store.check([f"{self._key(rank)}/alone"])]
        if not alone:
            return ""
        return (
            f" ({_named(alone)} opened a run alone meanwhile: no tensor of the model there is sharded; shard one on "
            f"each rank, for example by `fully_shard`, so that all track together)"
        )

    def _set(self, rank: int | None, message: dict[str, Any]) -> None:
        self.store.set(self._key(rank), json.dumps(message))

    def _get(self, key: str) -> Any:
        return json.loads(self.store.get(key))

    def _key(self, rank: int | None = None) -> str:
        """Returns the key of a rank's message in the present exchange, or of the answer."""
        return f"{_PREFIX}{self._number}" + ("" if rank is None else f"/{rank}")


def _named(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {shown}"


_current: _Exchanges | None = None
"""Exchanges through the store of the present process group, which all runs of a process share."""


def _exchanges(group: Any) -> _Exchanges:
    """Returns the exchanges of the default process group; a new group begins again with number 0."""
    global _current
    store = group.distributed_c10d._get_default_store()
    if store is None:
        raise RuntimeError(
            f"the process group ({group.get_backend()}) has no store, through which the ranks agree: initialise "
            f"torch.distributed with gloo or nccl"
        )
    if _current is None or _current.store is not store:
        _current = _Exchanges(store, int(group.get_rank()), int(group.get_world_size()))
    return _current


def _verdict(messages: list[dict[str, Any]], decide: Decide | None) -> dict[str, Any]:
    """Returns the answer to the messages of all ranks: the first error, or the result of rank 0, or the decision."""
    for rank, message in enumerate(messages):
        if "error" in message:
            return {"error": {**message["error"], "rank": rank}}
    first = messages[0]
    for rank, message in enumerate(messages):
        if message["call"] != first["call"] or message["part"] != first["part"]:
            problem = f"rank {rank} calls {message['call']}, and rank 0 {first['call']}"
            text = f"{problem}: all ranks must make the same calls in the same order, with equal arguments"
            return {"error": {"text": text, "rank": None}}
    if decide is None:
        return {"answer": first["answer"]}
    try:
        return {"answer": decide([message["answer"] for message in messages])}
    except Exception as error:
        return {"error": {"text": str(error), "rank": None}}


def _described(error: BaseException) -> dict[str, Any]:
    return {"kind": type(error).__name__, "text": str(error)}


def _raised(error: dict[str, Any]) -> Exception:
    """Returns an error of another rank, or of all, as one of this rank."""
    if error["rank"] is None:
        return ValueError(error["text"])
    kind = getattr(builtins, error["kind"], None)
    text = error["text"] or error["kind"]
    if isinstance(kind, type) and issubclass(kind, _KINDS) and not issubclass(kind, UnicodeError):
        return kind(f"rank {error['rank']}: {text}")
    return RuntimeError(f"rank {error['rank']}: {error['kind']}: {error['text']}".removesuffix(": "))
