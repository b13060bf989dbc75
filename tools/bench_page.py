"""Make reports/benchmarks/data.md from the JSON files of the data benchmarks: bench_page.py [--check].

A file names its `command`, its `verdicts` (what, value, target, at: "least" or "most", met) and a `table` (head, rows); without a table
all its numbers are shown. No number is typed here.
"""
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FILES = {"data_loader": "Random access", "rlds_steps": "RLDS", "data_convert": "Conversion", "data_scale": "Scale"}


def number(x) -> str:
    "Three significant digits; thousands with a space."
    if not isinstance(x, (int, float)): return str(x)
    return f"{x:,.0f}".replace(",", " ") if abs(x) >= 100 else f"{x:.3g}"


def table(head, rows) -> str:
    "A Markdown table."
    return "\n".join("| " + " | ".join(map(number, cells)) + " |" for cells in [head, ["---"] * len(head), *rows])


def numbers(report, path=()):
    "All numbers of nested dictionaries, with their places."
    for k, v in report.items():
        if isinstance(v, dict): yield from numbers(v, (*path, k))
        elif isinstance(v, (int, float)): yield [", ".join((*path, k)), v]


def section(name, report) -> str:
    "What one benchmark found."
    sign = {"least": "≥", "most": "≤"}
    rows = [[v["what"], v["value"], f"{sign[v.get('at', 'least')]} {number(v['target'])}", "yes" if v["met"] else "**no**"]
            for v in report.get("verdicts", [])]
    parts = [f"## {FILES[name]}", f"`{report.get('command', f'python benchmarks/{name}.py')}`", report.get("about", "")]
    parts += [table(["goal", "reached", "wanted", "met"], rows)] if rows else []
    shown = report.get("table") or {"head": ["figure", "value"], "rows": list(numbers(report))}
    parts.append(table(shown["head"], shown["rows"]))
    return "\n\n".join(p for p in parts if p)


def page(folder) -> str:
    "The page, from the files that exist."
    reports = {n: json.loads((folder / f"{n}.json").read_text(encoding="utf-8")) for n in FILES if (folder / f"{n}.json").is_file()}
    head = ("# Data benchmarks\n\nOurs and the peer in one run, on the same files, with the same threads; `make bench-data` measures again "
            "and makes this page. Each table is read from the JSON file beside it.")
    return "\n\n".join([head, *(section(n, r) for n, r in reports.items())]) + "\n"


if __name__ == "__main__":
    folder = ROOT / "reports/benchmarks"
    if sys.argv[1:] == ["--check"]:
        if page(folder) != (folder / "data.md").read_text(encoding="utf-8"): sys.exit("data.md is not current: run tools/bench_page.py.")
    else: (folder / "data.md").write_text(page(folder), encoding="utf-8")
