"""The main loop of a kernel, found in its machine code, and what one turn of it costs.

The loops are the natural loops of the control flow graph: a jump back to an instruction that every path to the jump has
passed. The main loop is the innermost one that contains tensor instructions, with what is inside it (loops that wait,
slow paths that lie elsewhere) counted once; of several, the one with the most issue slots per tensor clock, such as the
one that masks at the border. The fewest, such as those of the one for tiles inside the picture, are kept beside.

Issue slots per tensor clock = issued / needed, for one turn of the loop by one block:

- issued: each instruction of the loop is issued once by every warp, and the multiprocessor's four schedulers issue one
  each a clock: instructions · warps / 4. Branches not taken and instructions switched off by a predicate count, so this
  is an upper bound.
- needed: the fused multiply-adds of the loop's tensor instructions over those that the multiprocessor's tensor cores do
  a clock at their peak (:class:`Tensor`). An HMMA does m·n·k for a warp, an HGMMA for four warps together, a UTCHMMA
  for the block. Operands of 32 bits (TF32) take twice the time of 16 bits, 8 bits half.

Below 1 the tensor cores can be kept busy, by other blocks if not by this one; above 1 they wait for instructions.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Instruction:
    """One instruction: its address, name and jump. Operands matter only to jumps."""

    address: int
    opcode: str
    target: int | None = None  # where it may go on
    falls: bool = True  # whether it may go on with the next instruction


@dataclass(frozen=True)
class Loop:
    """What one turn of the main loop issues per warp."""

    instructions: int
    tensor: int
    issue_slots: float | None  # per tensor clock; None where the model has no rate
    waits: int  # for a warpgroup's tensor instructions (WARPGROUP.DEPBAR)
    shared_stores: int  # registers to shared memory
    shared_loads: int  # shared memory to registers, but not as a tensor instruction's operand (LDSM)
    async_copies: int  # global to shared memory without registers (LDGSTS)
    bulk_copies: int  # by the tensor memory accelerator (UTMALDG, UTMASTG)
    least_slots: float | None = None  # issue slots of the cheapest such loop, if that is another one

    @property
    def others(self) -> float:
        """Instructions that are not tensor instructions, for each that is."""
        return (self.instructions - self.tensor) / self.tensor


_TENSOR = re.compile(r"(?:H|I|Q|HG|QG|IG|UTCH|UTCQ|UTCI|O)MMA\b|v_(?:mfma|smfmac|wmma)")
_SASS = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;\n]*)", re.MULTILINE)
_HMMA = {"16816": 16 * 8 * 16, "1688": 16 * 8 * 8, "1684": 16 * 8 * 4, "16832": 16 * 8 * 32}


def is_tensor(opcode: str) -> bool:
    """Whether this is an instruction of the tensor (matrix) cores."""
    return _TENSOR.match(opcode) is not None


def parse_sass(text: str) -> list[Instruction]:
    """The instructions that ``cuobjdump --dump-sass`` prints for one kernel."""
    found = []
    for address, guard, opcode, operands in _SASS.findall(text):
        base, target = opcode.partition(".")[0], None
        conditional = bool(guard) and "PT" not in guard.replace("!", "")
        falls = conditional or base not in ("BRA", "EXIT", "RET", "JMP")
        if base in ("BRA", "CALL", "JMP"):
            *conditions, last = operands.split(",")
            goal = re.search(r"0x([0-9a-f]+)", last)
            target = int(goal[1], 16) if goal else None
            falls = falls or bool(conditions)  # BRA.U UP0, 0x210
        found.append(Instruction(int(address, 16), opcode, target, falls))
    return found


def parse_amd(text: str) -> list[Instruction]:
    """The instructions of an AMD kernel in LLVM's assembly."""
    labels: dict[str, int] = {}
    lines: list[tuple[str, str]] = []
    for line in text.partition(".Lfunc_end0:")[0].splitlines():
        if label := re.match(r"(\.L\w+):", line):
            labels[label[1]] = len(lines)
        elif code := re.match(r"\s+([a-z]\w+)\s*(\S*)", line):
            lines.append((code[1], code[2]))
    return [
        Instruction(i, name, labels[operand] if "branch" in name else None, name not in ("s_branch", "s_endpgm"))
        for i, (name, operand) in enumerate(lines)
    ]


def main_loop(code: list[Instruction], warps: int, bits: float, block_shape: int) -> Loop | None:
    """The main loop of a kernel of ``warps`` warps a block; None if no loop has a tensor instruction.

    ``bits`` is what the chip's tensor cores multiply a clock and multiprocessor: multiply-adds times operand bits, 0 if
    not known. ``block_shape`` is m·n·k of a UTCHMMA, whose shape is not in its name.
    """
    loops = [[code[i] for i in sorted(body)] for body in _innermost(code)]
    found = [_cost(body, warps, bits, block_shape) for body in loops]
    worst = max(found, key=lambda loop: (loop.issue_slots or 0, loop.others), default=None)
    least = min((loop.issue_slots or 0 for loop in found), default=0)
    return replace(worst, least_slots=least) if worst and least < (worst.issue_slots or 0) else worst


def _cost(body: list[Instruction], warps: int, bits: float, block_shape: int) -> Loop:
    tensor = [x.opcode for x in body if is_tensor(x.opcode)]
    work = sum(multiply_bits(opcode, warps, block_shape) for opcode in tensor)
    base = [x.opcode.partition(".")[0] for x in body]
    return Loop(
        instructions=len(body),
        tensor=len(tensor),
        issue_slots=round(len(body) * warps / 4 * bits / work, 3) if bits and work else None,
        waits=sum(x.opcode.startswith("WARPGROUP.DEPBAR") for x in body),
        shared_stores=sum(name == "STS" or name.startswith("ds_write") for name in base),
        shared_loads=sum(name == "LDS" or name.startswith("ds_read") for name in base),
        async_copies=base.count("LDGSTS"),
        bulk_copies=base.count("UTMALDG") + base.count("UTMASTG"),
    )


def multiply_bits(opcode: str, warps: int, block_shape: int) -> int:
    """Multiply-adds that a tensor instruction means for a block of ``warps`` warps, times its operands' bits."""
    name, *parts = opcode.split(".")
    bits = 32 if "TF32" in parts else 8 if name.startswith(("Q", "UTCQ", "I", "UTCI")) else 16
    if name.startswith("UTC"):
        return block_shape * bits
    for part in parts:
        if part in _HMMA:
            return _HMMA[part] * warps * bits
        if shape := re.fullmatch(r"(\d+)x(\d+)x(\d+)", part):
            m, n, k = map(int, shape.groups())
            return m * n * k * warps // 4 * bits
    return 0


# ---- natural loops -----------------------------------------------------------------------------------------------


def _innermost(code: list[Instruction]) -> Iterator[set[int]]:
    """The loops, as positions in ``code``, that have tensor instructions and within them no other loop that has."""
    loops = [body for body in natural_loops(code) if any(is_tensor(code[i].opcode) for i in body)]
    return (body for body in loops if not any(other < body for other in loops))


def natural_loops(code: list[Instruction]) -> list[set[int]]:
    """The natural loops of ``code``, as positions in it; loops with one head are one loop."""
    at: dict[int | None, int] = {instruction.address: i for i, instruction in enumerate(code)}
    after = [
        [at[j] for j in (x.target,) if j in at] + [i + 1 for _ in range(x.falls and i + 1 < len(code))]
        for i, x in enumerate(code)
    ]
    before: list[list[int]] = [[] for _ in code]
    for i, targets in enumerate(after):
        for j in targets:
            before[j].append(i)
    parent = _dominators(after, before)
    loops: dict[int, set[int]] = {}
    for i in parent:
        for head in after[i]:
            if _dominates(head, i, parent):
                body = loops.setdefault(head, {head})
                waiting = [i]
                while waiting:
                    if (j := waiting.pop()) not in body:
                        body.add(j)
                        waiting += [k for k in before[j] if k in parent]
    return list(loops.values())


def _dominators(after: list[list[int]], before: list[list[int]]) -> dict[int, int]:
    """The immediate dominator of each position that position 0 reaches (Cooper, Harvey and Kennedy 2001)."""
    order = {i: number for number, i in enumerate(_reverse_postorder(after))}
    parent = {0: 0}
    changed = True
    while changed:
        changed = False
        for i in order:
            if i:
                known = [j for j in before[i] if j in parent]
                common = known[0]
                for j in known[1:]:
                    while common != j:
                        if order[common] > order[j]:
                            common = parent[common]
                        else:
                            j = parent[j]
                changed |= parent.get(i) != common
                parent[i] = common
    return parent


def _reverse_postorder(after: list[list[int]]) -> Iterable[int]:
    done: list[int] = []
    seen = {0}
    path = [(0, iter(after[0]))]
    while path:
        i, targets = path[-1]
        for j in targets:
            if j not in seen:
                seen.add(j)
                path.append((j, iter(after[j])))
                break
        else:
            done.append(i)
            path.pop()
    return reversed(done)


def _dominates(head: int, i: int, parent: dict[int, int]) -> bool:
    while i != head and i:
        i = parent[i]
    return i == head
