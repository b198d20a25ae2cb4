"""Work in processes of its own, which may crash, hang or poison their GPU's context: whoever waits for it goes on."""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any

import torch

GRACE = 20  # seconds a process that is done may take to end
POISONED = 3  # exit status of a process whose CUDA context an error made useless

Message = tuple[str, Any]


class LostError(Exception):
    """The process ended or fell silent; the text says how."""


def describe(error: BaseException) -> str:
    """An error in a line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"


# ---- one process -------------------------------------------------------------------------------------------------


def messages(
    work: Callable[[Any], Iterator[Message]], order: Any, patience: Callable[[], tuple[float, str]]
) -> Generator[Message]:
    """What ``work(order)`` yields, (what, value) each, in a process of its own, which begins now and is ended when the
    caller closes the stream.

    ``patience()`` says for how many seconds it may be silent from now on, and how that is called.

    Raises:
        LostError: the process ended before ``work`` did, or was silent for longer.
    """
    stream = _messages(work, order, patience)
    next(stream)
    return stream


def outliving(
    work: Callable[[Any], Iterator[Message]], order: Any, patience: Callable[[], tuple[float, str]],
    rest: Callable[[LostError], Generator[Message, None, Any]],
) -> Generator[Message]:  # fmt: skip
    """:func:`messages` of ``work(order)``; when its process is lost, of another that does the rest, and so on.

    ``rest(error)`` yields what there is to tell of the loss and returns the next process's order; None: there is none.
    """
    while order is not None:
        try:
            with contextlib.closing(messages(work, order, patience)) as stream:
                yield from stream
            return
        except LostError as error:
            order = yield from rest(error)


def _messages(
    work: Callable[[Any], Iterator[Message]], order: Any, patience: Callable[[], tuple[float, str]]
) -> Generator[Message]:
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send_all, args=(work, order, sender), daemon=False)
    process.start()
    sender.close()
    try:
        yield "begun", None  # from here on, closing the stream ends the process
        while True:
            seconds, called = patience()
            if not receiver.poll(max(1.0, seconds)):
                raise LostError(f"did not answer {called}")
            message = receiver.recv()
            if message is None:
                process.join(GRACE)
                return
            yield message
    except EOFError:
        process.join(GRACE)
        raise LostError(f"the process ended with status {process.exitcode}") from None
    finally:
        _end(process)
        receiver.close()


def _send_all(work: Callable[[Any], Iterator[Message]], order: Any, sender: Connection) -> None:
    os.setsid()  # a group of its own: see _end
    for message in work(order):
        sender.send(message)
    sender.send(None)


def _end(process: multiprocessing.process.BaseProcess) -> None:
    """End ``process`` and the compilers that it has begun, which lead a group of their own."""
    assert process.pid
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.join()


def give_up_if_poisoned(device: torch.device) -> None:
    """After an error that leaves CUDA unusable, end this process: another one goes on."""
    if device.type == "cuda":
        try:
            torch.cuda.synchronize()
            torch.empty(1, device=device).item()
        except Exception:
            sys.stdout.flush()
            os._exit(POISONED)


# ---- all cores ---------------------------------------------------------------------------------------------------


def on_all_cores(
    tasks: Sequence[Callable[[], Any]], deadline: float = math.inf, jobs: int | None = None
) -> Iterator[tuple[int, Any, str | None]]:
    """Run ``tasks`` in forked processes, as many as there are cores, or ``jobs``: of each that is done its number, what
    it returned, and how it failed if it did.

    A process that dies costs its task alone; those still at work at the deadline are killed. Tasks need not be pickled.
    """
    forked = multiprocessing.get_context("fork")
    left = iter(range(len(tasks)))
    workers: dict[Any, tuple[Any, int]] = {}  # by the end of the pipe that is here: the process, and what it does

    def begin(connection: Any = None, process: Any = None) -> None:
        """Give a worker, or a new one, the next task; without any, it ends."""
        number = next(left, None)
        if number is None and connection is None:
            return
        if connection is None:
            connection, other = forked.Pipe()
            process = forked.Process(target=_serve, args=(tasks, other), daemon=True)
            process.start()
            other.close()
        connection.send(number)
        if number is None:
            process.join()
        else:
            workers[connection] = process, number

    try:
        for _ in range(jobs or os.cpu_count() or 1):
            begin()
        while workers and (seconds := deadline - time.time()) > 0:
            ready: list[Any] = multiprocessing.connection.wait(list(workers), min(seconds, 3600))
            for connection in ready:
                process, number = workers.pop(connection)
                try:
                    found, failure = connection.recv()
                    begin(connection, process)
                except (EOFError, ConnectionError):
                    process.join()
                    found, failure = None, f"the process ended with status {process.exitcode}"
                    begin()
                yield number, found, failure
    finally:
        for process, _ in workers.values():
            process.kill()


def _serve(tasks: Sequence[Callable[[], Any]], connection: Any) -> None:
    for number in iter(connection.recv, None):
        try:
            connection.send((tasks[number](), None))
        except Exception as error:
            connection.send((None, describe(error)))
