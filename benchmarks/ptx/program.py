"""PTX text as a program: parameters, registers, instructions, and the basic blocks that branches and barriers cut.

Only what Triton emits is understood: one ``.entry``, no calls, no ``.local`` or ``.const`` memory, one ``.shared``
array. Chapters 4 (syntax), 5 (state spaces and types) and 9.3 (predicates) of the PTX ISA.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

# Bytes of a type; a predicate is a bool.
SIZES = {"pred": 0, "bf16": 2, "tf32": 4, "f16x2": 4, "bf16x2": 4, "u16x2": 4, "s16x2": 4, "b128": 16}
SIZES |= {f"{kind}{bits}": bits // 8 for kind in "busf" for bits in (8, 16, 32, 64)}

PARAMETERS = 0x70000000  # where the parameters seem to lie: addresses, of which only a descriptor's is used
PARAMETER = 256  # bytes between them

_COMMENT = re.compile(r"//.*")
_LABEL = re.compile(r"([$\w]+):(?!:)")
_STATEMENT = re.compile(r"(?:@(!?)(%?\w+)\s+)?([a-z][\w.:]*)\s*(.*)", re.DOTALL)
_REGISTERS = re.compile(r"(%?\w+)<(\d+)>")
_NUMBERED = re.compile(r"(%[a-z]+)\d+$")
_NAME = re.compile(r"(?<![\w%@.])[A-Za-z_]\w*(?!@)")
_FILE = re.compile(r'^\s*\.file\s+(\d+)\s+"([^"]+)"')
_LOCATION = re.compile(r"(?:\.loc|inlined_at)\s+(\d+)\s+(\d+)")
_PARAMETER = re.compile(r"\.param\s+(.*?)\s*(\w+_param_\d+)(?:\[(\d+)\])?")


class UnknownError(NotImplementedError):
    """Something that is not understood; the message names it."""


@dataclass(slots=True)
class Statement:
    """An instruction statement (4.3): ``@[!]predicate opcode operands`` on a line of the text."""

    opcode: str
    operands: list[str]
    predicate: str | None
    negated: bool
    line: int
    words: list[str] = field(init=False)  # the opcode at its dots

    def __post_init__(self) -> None:
        self.words = self.opcode.split(".")

    def __str__(self) -> str:
        return f"{self.opcode} {', '.join(self.operands)}"


class Program:
    """One kernel."""

    def __init__(self, text: str) -> None:
        self.lines = text.split("\n")
        entry = re.search(r"\.visible \.entry (\w+)\((.*?)\n\)", text, re.DOTALL)
        threads = re.search(r"\.(?:reqntid|maxntid) (\d+)", text)
        if entry is None or threads is None:
            raise UnknownError("a kernel that is not one .visible .entry with .reqntid")
        self.name, self.threads = entry[1], int(threads[1])
        self.parameters: dict[str, int] = {}  # bytes, by name
        for kind, name, length in _PARAMETER.findall(entry[2]):
            basic = re.search(r"\.([bsuf]\d+)\b", re.sub(r"\.align \d+", "", kind))
            if basic is None:
                raise UnknownError(f"a parameter of a type that is not understood: {kind} {name}")
            self.parameters[name] = SIZES[basic[1]] * int(length or 1)
        self.symbols = {name: PARAMETERS + PARAMETER * i for i, name in enumerate(self.parameters)}
        self.symbols["global_smem"] = 0
        self.sizes: list[int] = []  # of each register, in bytes
        self._registers: dict[str, int] = {}
        self._prefixes: dict[str, int] = {}
        self.code: list[Statement] = []
        self.labels: dict[str, int] = {}
        self.sources: dict[int, str] = {}  # file and line that an instruction came from, by its line
        start = text.index("{", threads.end())
        stop = text.index("// -- End function", start)
        self._parse(text[start:stop], text.count("\n", 0, start))
        self._cut()
        self.granules = {space: self._granule(space) for space in ("global", "shared")}

    def _parse(self, body: str, before: int) -> None:
        files = {number: path.rpartition("/")[2] for line in self.lines for number, path in _FILE.findall(line)}
        scopes: list[dict[str, str]] = [{}]
        source, pending = "", ""
        for number, line in enumerate(body[1:].split("\n"), before + 1):
            line = _COMMENT.sub("", line).strip()
            if line.startswith(".loc"):
                source = " in ".join(f"{files.get(file, '?')}:{number}" for file, number in _LOCATION.findall(line))
                continue
            pending = f"{pending} {line}".strip()
            while pending:
                label = _LABEL.match(pending)
                if pending[0] in "{}":
                    scopes.append({}) if pending[0] == "{" else scopes.pop()
                    pending = pending[1:].lstrip()
                elif label:
                    name = label[1]
                    if len(scopes) > 1 and name[0] != "$":  # of inline assembly
                        scopes[-1][name] = name = f"{name}@{len(self.code)}"
                    self.labels[name] = len(self.code)
                    pending = pending[label.end() :].lstrip()
                elif ";" in pending:
                    statement, _, pending = pending.partition(";")
                    pending = pending.lstrip()
                    self._statement(statement.strip(), scopes, number, source)
                else:
                    break

    def _statement(self, statement: str, scopes: list[dict[str, str]], line: int, source: str) -> None:
        if statement.startswith(".reg"):
            _, kind, names = statement.split(None, 2)
            if kind[1:] not in SIZES:
                raise UnknownError(f"registers of a type that is not understood: {statement}")
            for name in map(str.strip, names.split(",")):
                many = _REGISTERS.match(name)
                if many:
                    self._prefixes[many[1]] = SIZES[kind[1:]]
                else:
                    scopes[-1][name] = unique = f"{name}@{len(self.sizes)}"
                    self._registers[unique] = len(self.sizes)
                    self.sizes.append(SIZES[kind[1:]])
            return
        parts = _STATEMENT.match(statement)
        if parts is None:  # a directive
            return
        negated, predicate, opcode, rest = parts.groups()
        if any(scopes):
            known = {name: unique for scope in scopes for name, unique in scope.items()}
            rest = _NAME.sub(lambda found: known.get(found[0], found[0]), rest)
            predicate = predicate and known.get(predicate, predicate)
        self.code.append(Statement(opcode, split(rest), predicate, bool(negated), line))
        self.sources[line] = source

    def register(self, name: str) -> int | None:
        """The number of a register; None if ``name`` is none."""
        found = self._registers.get(name)
        if found is None:
            numbered = _NUMBERED.match(name)
            if numbered and numbered[1] in self._prefixes:
                found = self._registers[name] = len(self.sizes)
                self.sizes.append(self._prefixes[numbered[1]])
        return found

    def _cut(self) -> None:
        """Blocks begin at labels that something branches to and where a warpgroup meets for its products; they end at
        branches, exits and barriers."""
        targets = {self.labels.get(i.operands[0], 0) for i in self.code if i.words[0] == "bra"}
        ends = {n + 1 for n, i in enumerate(self.code) if ends_block(i)}
        meetings = {n for n, i in enumerate(self.code) if i.opcode.startswith("wgmma.fence")}
        self.starts = sorted({0} | targets | ends | meetings | {len(self.code)})
        self.block_at = {start: number for number, start in enumerate(self.starts)}
        # Blocks with instructions of a whole warpgroup.
        self.meetings = {n for n in range(self.blocks) if any(i.words[0] == "wgmma" for i in self.block(n))}

    @property
    def blocks(self) -> int:
        return len(self.starts) - 1

    def block(self, number: int) -> list[Statement]:
        """The instructions of a block."""
        return self.code[self.starts[number] : self.starts[number + 1]]

    def _granule(self, space: str) -> int:
        """Bytes of the least access to a state space, at most 4: what its shadow memory is kept by."""
        kinds = [i.words[-1] for i in self.code if i.words[0] in ("ld", "st", "atom", "red") and space in i.words]
        sizes = [SIZES.get(kind, 1) for kind in kinds]  # another type is named when its instruction is read
        copies = [int(i.operands[2], 0) for i in self.code if i.opcode.startswith(("cp.async.ca", "cp.async.cg"))]
        return min([4, *sizes, *copies])


def ends_block(statement: Statement) -> bool:
    """Whether a block ends behind it."""
    return statement.words[0] in ("bra", "ret", "exit", "trap", "barrier") or statement.opcode.startswith("bar.sync")


def split(operands: str) -> list[str]:
    """Operands at the commas outside brackets."""
    found, depth, start = [], 0, 0
    for i, letter in enumerate(operands):
        if letter in "{[(":
            depth += 1
        elif letter in "}])":
            depth -= 1
        elif letter == "," and not depth:
            found.append(operands[start:i].strip())
            start = i + 1
    last = operands[start:].strip()
    return [*found, last] if last else found
