"""Recorded rows as text: tables, the README's performance section, and the roofline picture.

``python -m benchmarks.report`` writes README's section between its two markers, and ``benchmarks/results/<gpu>.svg``,
from the rows in ``benchmarks/results`` and nothing else. ``--check`` only says whether the section is up to date.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure import ROOT, rewrite

README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results"
START = "<!-- performance: written by python -m benchmarks.report -->"
END = "<!-- /performance -->"

Row = dict[str, Any]

HOW = """To measure, on a machine with the GPU, from a checkout:

```console
python -m benchmarks.suite             # 8 minutes (--budget): rows to benchmarks/results/<gpu>.jsonl, and a table
python -m benchmarks.suite --row ID    # one row again, the old beside the new
python -m benchmarks.report            # rewrite this section from the rows
```

The suite compiles ahead, checks every operation small against float64, twice, and times what matters most first. No
operation or loss is timed before its own results and gradients agree with the truth; a network is, and its row says
what did not. What is wrong, crashes or hangs stops nothing else; it is printed last, with a command that repeats it,
and the rows of networks name the operations that were wrong. On a machine without a GPU, `--dry-run` checks everything
small and prints the plan."""

NOTHING = "Nothing has been measured on a GPU yet, so this page states no speed."


def read(folder: Path) -> list[Row]:
    """All rows recorded in ``folder``, oldest first within a GPU."""
    return [json.loads(line) for path in sorted(folder.glob("*.jsonl")) for line in path.read_text().splitlines()]


def latest(rows: Iterable[Row]) -> list[Row]:
    """Of each GPU, case and provider the last row, in the order in which the cases first came."""
    last = {(row["gpu"], row["case"], row["provider"]): row for row in rows}
    order = {case: i for i, case in enumerate(dict.fromkeys(case for _, case, _ in last))}
    return sorted(last.values(), key=lambda row: (row["gpu"], order[row["case"]]))


# ---- text --------------------------------------------------------------------------------------------------------


def machine_text(found: Row) -> str:
    """The machine in a few lines."""
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items() if version)
    changed = " with changes" if found["dirty"] else ""
    code = f"commit {found['commit'] or 'unknown'}{changed}, sources {found['sources']}"
    names = ("driver", "sm_mhz", "sm_max_mhz", "memory_mhz")
    clocks = ", ".join(f"{name} {found[name]}" for name in names if found[name])
    return "\n".join(text for text in (found["gpu"], clocks, versions, code) if text)


def line(row: Row) -> str:
    """One row as one line."""
    units = ("ms", "", "GB/s", "TFLOP/s", "GB")
    cells = [f"{cell} {unit}".strip() for cell, unit in zip(_cells(row)[1:], units, strict=False) if cell]
    if row.get("gbs") and row["roofs"] and not row["flops"]:
        cells.append(f"{row['gbs'] / row['roofs']['copy_gbs']:.0%} of a copy's rate")
    if row.get("wrong"):
        cells.append(f"WRONG {row['wrong']}")
    if row.get("red"):
        cells.append(f"with {len(row['red'])} wrong operations")
    return f"{row['id']}  {row['case']}  {row['provider']}: {', '.join(cells)}"


def table(rows: Sequence[Row], every: bool = False) -> str:
    """Rows as a table, one case after the other; the last row of each case and provider, or ``every`` one."""
    head = ("provider", "ms", "p20–p80", "GB/s", "TFLOP/s", "peak GB", "error", "× eager", "id")
    lines: list[tuple[str, ...]] = [head]
    titles: dict[int, str] = {}
    chosen = list(rows) if every else latest(rows)
    for row in chosen:
        if row["case"] not in titles.values():
            titles[len(lines)] = row["case"]
        lines.append((*_cells(row), _speedup(row, rows), row["id"]))
    widths = [max(len(cells[i]) for cells in lines) for i in range(len(head))]
    text = []
    for i, cells in enumerate(lines):
        if i in titles:
            text.append(titles[i])
        text.append("  " + "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip())
    return "\n".join(text)


def _cells(row: Row) -> tuple[str, ...]:
    """Provider, median, spread, GB/s, TFLOP/s, peak memory, error."""
    if row["failure"] is not None:
        return (row["provider"], "failed:", row["failure"][:60], "", "", "", "")
    ms = row["ms"]
    errors = [f"{error:.0e}" for error in row["error"].values()]
    peak = row["peak_bytes"]
    return (
        row["provider"],
        f"{ms['p50']:.3f}",
        f"{ms['p20']:.3f}–{ms['p80']:.3f}",
        f"{row['gbs']:.0f}" if row["gbs"] else "",
        f"{row['tflops']:.3g}" if row["tflops"] else "",
        f"{peak / 1e9:.2f}" if peak is not None else "",
        " ".join(errors),
    )


def _speedup(row: Row, rows: Sequence[Row]) -> str:
    """How many times faster than PyTorch as it is ("eager", or for a loss the seed's formula), timed beside it."""
    base = next((r for r in rows if r["group"] == row["group"] and r["provider"] in ("eager", "seed002")), None)
    if base is None or base["ms"] is None or row["ms"] is None:
        return ""
    return f"{base['ms']['p50'] / row['ms']['p50']:.2f}"


# ---- README ------------------------------------------------------------------------------------------------------


def section(rows: Sequence[Row], pictures: Sequence[str] = ()) -> str:
    """README's performance section, without its markers."""
    rows = [row for row in rows if row["gpu"] != "cpu"]
    if not rows:
        return f"{NOTHING}\n\n{HOW}"
    parts = []
    for gpu in dict.fromkeys(row["gpu"] for row in rows):
        mine = [row for row in rows if row["gpu"] == gpu]
        parts.append(_gpu_section(gpu, mine))
        parts += [f"![roofline of the {gpu}]({name})" for name in pictures if name.endswith(f"{slug(gpu)}.svg")]
    return "\n\n".join([*parts, HOW])


def slug(gpu: str) -> str:
    """A GPU's name as a file's."""
    return "-".join(gpu.lower().split())


def _gpu_section(gpu: str, rows: Sequence[Row]) -> str:
    """The networks and losses, each as it was measured last; operations are in the file of rows.

    A case that was timed twice in one run, beside compilers and beside everybody else, is there twice.
    """
    tells = [row for row in rows if row["kind"] != "op" and _tells(row)]
    last = {row["case"]: row["time"] for row in tells}
    chosen = [row for row in tells if row["time"] == last[row["case"]]]
    marks = {f"{(row['commit'] or row['sources'])[:10]}{' with changes' if row['dirty'] else ''}" for row in chosen}
    first, codes = rows[-1], sorted(marks)
    path = f"benchmarks/results/{slug(gpu)}.jsonl"
    versions = ", ".join(f"{name} {first['versions'][name]}" for name in ("torch", "triton", "cuda"))
    text = [
        f"Measured on one {gpu} (driver {first['driver']}; {versions}; code at {', '.join(codes)}): milliseconds by "
        "CUDA events with a cold L2 cache, providers in turn, each step begun on an idle GPU; the median, and the 20th "
        f"and 80th percentile. Ids are those of [{path}]({path}).",
        "| case | provider | ms | p20–p80 | × eager | peak GB | id |\n|---|---|---|---|---|---|---|",
    ]
    for row in chosen:
        _, ms, spread, _, _, peak, _ = _cells(row)
        cells = (row["case"], row["provider"], ms, spread, _speedup(row, rows), peak, f"`{row['id']}`")
        text[1] += "\n| " + " | ".join(cells) + " |"
    wrong = [f"`{row['id']}`: {row['wrong']}" for row in chosen if row.get("wrong")]
    if wrong:
        text.append(f"Timed although their check objected: {'; '.join(wrong)}.")
    return "\n\n".join(text)


def _tells(row: Row) -> bool:
    """Whether a row tells what a step takes. Of the first networks' it does not: the host could issue a step while the
    GPU was at another provider's, and only a graph's takes no time to issue."""
    return bool(row["kind"] != "net" or row.get("idle", False) or row["provider"].endswith("-graph"))


def with_section(readme: str, text: str) -> str:
    """``readme`` with what stands between the markers replaced.

    Raises:
        ValueError: a marker is missing.
    """
    before, start, rest = readme.partition(START)
    _, end, after = rest.partition(END)
    if not start or not end:
        raise ValueError(f"expected the lines '{START}' and '{END}' in README.md; put them where the section belongs")
    return f"{before}{START}\n{text}\n{END}{after}"


# ---- the picture -------------------------------------------------------------------------------------------------


def roofline(rows: Sequence[Row], path: Path) -> bool:
    """Draw the operations of one GPU under its measured roofs; False where there is nothing to draw, or no matplotlib.

    A row is a point: the FLOP per byte that its operation needs at least, and the TFLOP/s that it reached. Operations
    without matrix products are left out.
    """
    points = [
        row for row in rows if row["kind"] == "op" and row["ms"] and row["flops"] and row["bytes"] and row["roofs"]
    ]
    points = [row for row in points if row["spec"]["dtype"] == "bfloat16"]
    if not points:
        return False
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("svg")
    from matplotlib import pyplot

    found = points[-1]["roofs"]
    bandwidth, rate = found["copy_gbs"] / 1e3, found["bf16_tflops"]
    intensities = [row["flops"] / row["bytes"] for row in points]
    edge = [min(intensities) / 2, rate / bandwidth, max(max(intensities), rate / bandwidth) * 2]
    with matplotlib.rc_context({"svg.hashsalt": "fastunet"}):
        figure, axes = pyplot.subplots(figsize=(7, 4.5))
        axes.loglog(edge, [edge[0] * bandwidth, rate, rate], color="black", label="measured copy and bf16 matrix rate")
        for provider in dict.fromkeys(row["provider"] for row in points):
            mine = [row for row in points if row["provider"] == provider]
            needed = [row["flops"] / row["bytes"] for row in mine]
            axes.scatter(needed, [row["tflops"] for row in mine], s=14, label=provider)
        axes.set(xlabel="FLOP per byte", ylabel="TFLOP/s", title=f"{points[-1]['gpu']}: bf16 operations of the U-Net")
        axes.legend(fontsize="small")
        figure.savefig(path, metadata={"Date": None}, bbox_inches="tight")
        pyplot.close(figure)
    return True


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; status 1 if README is not up to date")
    options = parser.parse_args(arguments)
    rows = read(RESULTS)
    if not options.check:
        for gpu in {row["gpu"] for row in rows} - {"cpu"}:
            roofline([row for row in latest(rows) if row["gpu"] == gpu], RESULTS / f"{slug(gpu)}.svg")
    pictures = [path.relative_to(ROOT).as_posix() for path in sorted(RESULTS.glob("*.svg"))]
    old = README.read_text()
    new = with_section(old, section(rows, pictures))
    if options.check:
        print("README is up to date" if old == new else "README is not up to date: run python -m benchmarks.report")
        return 0 if old == new else 1
    rewrite(README, new)
    print(f"README.md: {len(latest(rows))} rows")
    return 0


if __name__ == "__main__":
    sys.exit(main())
