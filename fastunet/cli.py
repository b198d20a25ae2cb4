"""The command line: ``python -m fastunet COMMAND``, also installed as ``fastunet``.

A mistake in the arguments or in the user's files is one sentence on stderr and exit status 2; Ctrl-C is status 130, and
141 that nobody reads any more what is printed.
"""

from __future__ import annotations

import argparse
import codecs
import importlib
import io
import os
import sys
from collections.abc import Sequence
from contextlib import suppress

from fastunet import __version__
from fastunet.errors import UserError

# Each command is the module fastunet.<name> with add_arguments(parser) and run(args) -> exit status.
COMMANDS = {
    "demo": "train a small U-Net on your pictures, or on generated ones, and draw what it learnt",
    "train": "train a network on two folders, of pictures and of their masks",
    "predict": "write masks of pictures of any size, by a checkpoint",
    "evaluate": "score a checkpoint on pictures whose masks are known",
    "export": "write a checkpoint as an ONNX or torch.export program, for any batch and size",
    "info": "print versions, devices, and which backend each operation takes on them",
    "verify": "compare each operation and the whole network with float64 truth on this machine",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 2 is a mistake in the input, 130 an interruption."""
    _open_what_is_closed()
    _let_everything_be_printed()
    try:
        status = _status(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
        return status
    except OSError as error:
        if error.filename is not None:  # a folder that may not be searched, a name that is too long
            told = f"{error.filename} cannot be reached ({error.strerror}): check its name and permissions"
        elif not _is_unprintable():
            raise
        elif isinstance(error, BrokenPipeError):  # as head leaves it, which has read enough
            return 141
        else:
            told = f"what is printed cannot be written ({error.strerror}): send it elsewhere"
        with suppress(OSError):
            print(f"fastunet: error: {told}", file=sys.stderr, flush=True)
        return 2


def _status(arguments: list[str]) -> int:
    try:
        args = _parser(arguments).parse_args(arguments)
        return int(args.run(args))
    except KeyboardInterrupt:
        print("\nfastunet: interrupted", file=sys.stderr)
        return 130
    except UserError as error:
        print(f"fastunet: error: {error}", file=sys.stderr)
        return 2


def _open_what_is_closed() -> None:
    """Give a process that was started without stdin, stdout or stderr empty ones, or files would take their places."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w" if number else "r"))  # noqa: SIM115 - open while the process runs


def _is_unprintable() -> bool:
    """Whether stdout or stderr takes nothing any more; what it has kept is dropped, or Python would complain last."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
            os.write(stream.fileno(), b"\n")  # it has not kept anything where it is not buffered
        except io.UnsupportedOperation:  # no file
            continue
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)
            return True
    return False


def _let_everything_be_printed() -> None:
    """Where a terminal or a file takes fewer characters than Unicode has, × becomes x, and what has no likeness ?."""
    for stream in (sys.stdout, sys.stderr):
        if (reconfigure := getattr(stream, "reconfigure", None)) is not None:
            reconfigure(errors="fastunet")


def _alike(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(_ALIKE.get(character, "?") for character in error.object[error.start : error.end]), error.end


_ALIKE = {"×": "x", "·": "-", "–": "-", "—": "-", "…": "...", "≥": ">=", "≤": "<=", "²": "2"}
codecs.register_error("fastunet", _alike)


def _parser(arguments: Sequence[str]) -> argparse.ArgumentParser:
    """The parser of all commands; only the module of the one that is asked for is imported, so that help is fast."""
    parser = argparse.ArgumentParser(prog="fastunet", description="The U-Net people already use, made fast.")
    parser.add_argument("--version", action="version", version=f"fastunet {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    asked = next((argument for argument in arguments if not argument.startswith("-")), None)
    for name, summary in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
        if name == asked:
            module = importlib.import_module(f"fastunet.{name}")
            module.add_arguments(command)
            command.set_defaults(run=module.run)
    return parser
