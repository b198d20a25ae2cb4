"""A process that opens damaged files, with little memory, and that may neither start another nor write.

    python tests/fuzzing.py (pictures | checkpoints | bombs) SEED COUNT SECONDS FOLDER

opens at least COUNT of them, and goes on for SECONDS; prints one JSON object: how many were opened, how many of those
were refused, and what should not have happened.
"""

from __future__ import annotations

import contextlib
import io
import json
import random
import resource
import struct
import sys
import time
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import fastunet
from fastunet.checkpoint import CheckpointError
from fastunet.data import DataError, open_folders

ROOM = 1 << 30  # bytes of memory beyond what the process has when it begins
FORBIDDEN = ("subprocess.Popen", "os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "socket.connect")
FOUND: list[str] = []  # what should not have happened
LIBRARY = Path(fastunet.__file__).parent


# ---- what must not happen ----------------------------------------------------------------------------------------


def watch(folder: Path) -> None:
    """From here on note every process that is started, and every file that is opened for writing outside ``folder``."""

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event.startswith(FORBIDDEN):
            FOUND.append(f"{event}{arguments}")
        if event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+"):
            name = str(arguments[0])
            if not name.startswith(str(folder)) and "__pycache__" not in name:
                FOUND.append(f"{name} was opened to be written")

    sys.addaudithook(hook)


def limit() -> None:
    """Let the process have :data:`ROOM` more memory, and no more."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, used + ROOM))


# ---- damage ------------------------------------------------------------------------------------------------------

EXTREMES = [0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF]


def damaged(rng: random.Random, content: bytes) -> bytes:
    """``content`` with bytes changed, lost, doubled, or a field of its header at an extreme."""
    changed = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(max(len(changed), 1))
        kind = rng.randrange(6)
        if kind == 0:
            changed[at : at + 1] = bytes([rng.randrange(256)])
        elif kind == 1:
            del changed[at : at + rng.choice([1, 4, 64, 4096])]
        elif kind == 2:
            changed[at:at] = changed[at : at + rng.choice([1, 4, 64])]
        elif kind == 3:
            del changed[at:]
        else:
            at = rng.randrange(min(len(changed), 96) or 1) if kind == 4 else at
            order = rng.choice("<>")
            changed[at : at + 4] = struct.pack(f"{order}I", rng.choice(EXTREMES))
    return checked(bytes(changed))


def checked(content: bytes) -> bytes:
    """A PNG whose checksums are right again: a reader has to look at what they hold."""
    if not content.startswith(b"\x89PNG\r\n\x1a\n"):
        return content
    parts, at = [content[:8]], 8
    while at + 12 <= len(content):
        (size,) = struct.unpack(">I", content[at : at + 4])
        body = content[at + 4 : at + 8 + size]
        parts += [content[at : at + 4], body, struct.pack(">I", zlib.crc32(body))]
        at += 12 + size
    return b"".join(parts)


# ---- pictures ----------------------------------------------------------------------------------------------------


def pictures() -> list[tuple[str, bytes]]:
    """One of each kind: (suffix, content)."""
    rng = np.random.default_rng(0)
    grey = (rng.integers(0, 2, (20, 24)) * 255).astype(np.uint8)
    colour = rng.integers(0, 256, (20, 24, 3), np.uint8)
    kinds: list[tuple[str, Image.Image, dict[str, Any]]] = [
        ("png", Image.fromarray(grey), {}),
        ("png", Image.fromarray(grey > 0), {}),
        ("png", Image.fromarray(grey.astype(np.uint16) * 200), {}),
        ("png", Image.fromarray(colour), {}),
        ("png", Image.fromarray(colour).quantize(8), {}),
        ("png", Image.fromarray(grey), {"save_all": True, "append_images": [Image.fromarray(grey ^ 1)]}),
        ("jpg", Image.fromarray(colour), {}),
        ("bmp", Image.fromarray(colour), {}),
        ("tif", Image.fromarray(grey), {"compression": "tiff_lzw"}),
        ("tif", Image.fromarray(grey.astype(np.float32)), {}),
        ("gif", Image.fromarray(colour).quantize(8), {}),
        ("webp", Image.fromarray(colour), {"lossless": True}),
        ("ppm", Image.fromarray(colour), {}),
        ("tif", Image.fromarray(grey), {"save_all": True, "append_images": [Image.fromarray(grey[::2, ::2])]}),
        ("webp", Image.fromarray(colour), {"quality": 50}),
        (
            "png",
            Image.fromarray(colour).convert("RGBA"),
            {"exif": b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06" + bytes(6)},
        ),
    ]
    written = []
    for suffix, picture, options in kinds:
        file = io.BytesIO()
        picture.save(file, {"jpg": "JPEG", "tif": "TIFF"}.get(suffix, suffix.upper()), **options)
        written.append((suffix, file.getvalue()))
    written += [
        ("png", png(24, 20, 16, 2, zlib.compress(b"".join(b"\0" + rng.bytes(6 * 24) for _ in range(20))))),
        ("ppm", b"P3 24 20 # text\n4095\n" + b" 77 4095 0" * 480),
        ("pgm", b"P5 24 20 4095\n" + bytes(2 * 480)),
        ("tif", bands()),
    ]
    return written


def bands() -> bytes:
    """A TIFF of eight bands, which Pillow does not know."""
    tags = [(256, 24), (257, 20), (258, 8), (262, 1), (273, 122), (277, 8), (278, 20), (279, 8 * 480), (339, 1)]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return struct.pack("<2sHIH", b"II", 42, 8, len(tags)) + entries + bytes(4) + bytes(range(240)) * 16


def opening(folder: Path) -> Callable[[str, str, bytes], None]:
    """What opens a picture as ``images`` or ``masks``, beside a good partner."""
    kinds = ("images", "masks")
    for kind in kinds:
        (folder / kind).mkdir()
    good = next(content for suffix, content in pictures() if suffix == "png")

    def opened(kind: str, suffix: str, content: bytes) -> None:
        for each in kinds:
            for old in (folder / each).iterdir():
                old.unlink()
            name = f"a.{suffix}" if each == kind else "a.png"
            (folder / each / name).write_bytes(content if each == kind else good)
        open_folders(folder / "images", folder / "masks")[0]

    return opened


def fuzz_pictures(rng: random.Random, folder: Path) -> Iterator[bool]:
    opened, kinds = opening(folder), pictures()
    while True:
        suffix, content = rng.choice(kinds)
        if rng.random() < 0.1:  # a name that says something else
            suffix = rng.choice(kinds)[0]
        try:
            opened(rng.choice(["images", "masks"]), suffix, damaged(rng, content))
        except DataError as error:
            if len(str(error).splitlines()) != 1:
                FOUND.append(str(error))
            yield True
        else:
            yield False


# ---- bombs -------------------------------------------------------------------------------------------------------


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png(width: int, height: int, depth: int, colour: int, rows: bytes, *more: bytes) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(more) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def bombs() -> dict[str, tuple[str, bytes, str]]:
    """Small files that want gigabytes, or a program: (suffix, content, what the refusal says)."""
    large, damaged = "pixels by its header", "damaged, or not a picture"
    packed, huge = zlib.compress(bytes(17 * 16)), zlib.compress(bytes(1 << 27), 9)
    tiff, counted = (
        struct.pack("<2sHIH", b"II", 42, 8, 4)
        + b"".join(struct.pack("<HHII", tag, 4, count, side) for tag, side in sides)
        for count, sides in (
            (1, [(256, 1 << 30), (257, 1 << 30), (258, 8), (273, 8)]),
            (0xFFFFFFFF, [(256, 8), (257, 8), (258, 8), (273, 8)]),
        )
    )
    header = struct.pack("<IIIIiiHHIIIIII", 54, 0, 54, 40, 16, 0x7FFFFFFF, 1, 8, *[0] * 6)
    gif = b"GIF89a" + struct.pack("<HHBBB", 65535, 65535, 0x80, 0, 0) + bytes(6)
    gif += b"," + struct.pack("<HHHHBB", 0, 0, 65535, 65535, 0, 2) + b"\x02\x4c\x01\0;"
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 24 20\n%%EndComments\n(%pipe%touch ran) (w) file\n"
    return {
        "3.6 gigapixels of a bit": ("png", png(60_000, 60_000, 1, 0, packed), large),
        "80 megapixels in colour": ("png", png(8192, 9800, 8, 2, packed), large),
        "a row of two gigapixels": ("png", png(0x7FFFFFFF, 1, 8, 0, packed), large),
        "a text of 128 MB": ("png", png(16, 16, 8, 0, packed, chunk(b"zTXt", b"a\0\0" + huge)), damaged),
        "a profile of 128 MB": ("png", png(16, 16, 8, 0, packed, chunk(b"iCCP", b"a\0\0" + huge)), ""),
        "a TIFF of an exapixel": ("tif", tiff, large),
        "a TIFF of four billion strips": ("tif", counted, damaged),
        "a BMP of 2³¹ rows": ("bmp", b"BM" + header, large),
        "a GIF of 65535²": ("gif", gif, large),
        "a PGM of 10¹² pixels": ("pgm", b"P5 1000000 1000000 255\n", large),
        "PostScript": ("png", script, damaged),
        "a WMF": ("bmp", b"\xd7\xcd\xc6\x9a" + bytes(64), damaged),
    }


def fuzz_bombs(rng: random.Random, folder: Path) -> Iterator[bool]:
    """Each once."""
    opened = opening(folder)
    for name, (suffix, content, refusal) in bombs().items():
        for kind in ("images", "masks"):
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            try:
                opened(kind, suffix, content)
            except DataError as error:
                if refusal not in str(error):
                    FOUND.append(f"{name}: {error}")
            else:
                FOUND.append(f"{name} was opened as one of the {kind}")
            grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
            if grown > 150_000:  # kB
                FOUND.append(f"{name} took {grown} kB")
            yield True


# ---- checkpoints -------------------------------------------------------------------------------------------------


def fuzz_checkpoints(rng: random.Random, folder: Path) -> Iterator[bool]:
    model = fastunet.UNet(1, 2, base_c=1)
    kinds = []
    for zipped in (True, False):
        for state in (model.state_dict(), {**model.state_dict(), "mask_values": [0, 255]}):
            file = io.BytesIO()
            torch.save(state, file, _use_new_zipfile_serialization=zipped)
            kinds.append(file.getvalue())
    with contextlib.suppress(ImportError):
        from safetensors.torch import save

        kinds.append(save(model.state_dict()))
    path = folder / "checkpoint.pth"
    while True:
        path.write_bytes(damaged(rng, rng.choice(kinds)))
        try:
            loaded = fastunet.load_checkpoint(path)
        except CheckpointError as error:
            if len(str(error).splitlines()) != 1:
                FOUND.append(str(error))
            yield True
            continue
        try:
            model.load_state_dict(loaded.state_dict())
        except (TypeError, RuntimeError) as error:
            if not (str(error).startswith("expected ") and len(str(error).splitlines()) == 1):
                FOUND.append(f"{type(error).__name__}: {error}")
            yield True
        else:
            yield False


def main(what: str, seed: str, count: str, seconds: str, folder: str) -> None:
    begun, refused, number = time.monotonic(), 0, 0
    attempts = {"pictures": fuzz_pictures, "bombs": fuzz_bombs, "checkpoints": fuzz_checkpoints}[what]
    warnings.simplefilter("ignore")
    Image.init()
    watch(Path(folder))
    limit()
    for number, was_refused in enumerate(attempts(random.Random(int(seed)), Path(folder)), 1):
        refused += was_refused
        if FOUND or (number >= int(count) and time.monotonic() - begun >= float(seconds)):
            break
    print(json.dumps({"opened": number, "refused": refused, "found": FOUND}))


if __name__ == "__main__":
    main(*sys.argv[1:])
