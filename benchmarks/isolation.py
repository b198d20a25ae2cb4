"""Work on a GPU in a process of its own, which may crash, hang or poison its context: whoever waits for it goes on."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Generator, Iterator
from multiprocessing.connection import Connection
from typing import Any

import torch

GRACE = 20  # seconds a process that is done may take to end
POISONED = 3  # exit status of a process whose CUDA context an error made useless

Message = tuple[str, Any]


class LostError(Exception):
    """The process ended or fell silent; the text says how."""


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
