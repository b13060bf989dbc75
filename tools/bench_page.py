"""Make the pages reports/benchmarks/{data,policies}.md from the JSON files of the benchmarks: bench_page.py [--check].

A file names its `command`, its `verdicts` (what, value, target, at: "least" or "most", met) and a `table` (head, rows); without a table
all its numbers are shown. No number is typed here.
"""
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = {"data": ("Data benchmarks", {"data_loader": "Random access", "rlds_steps": "RLDS", "data_convert": "Conversion",
                                      "data_scale": "Scale"}),
         "policies": ("Policy benchmarks", {"policies": "Training step and chunk", "memory_plan": "Memory plan"})}


def number(x) -> str:
    "Three significant digits; thousands with a space; words as they are."
    if not isinstance(x, (int, float)): return str(x).replace("|", "\\|")
    return f"{x:,.0f}".replace(",", " ") if abs(x) >= 100 else f"{x:.3g}"


def table(head, rows) -> str:
    "A Markdown table."
    return "\n".join("| " + " | ".join(map(number, cells)) + " |" for cells in [head, ["---"] * len(head), *rows])


def numbers(report, path=()):
    "All numbers of nested dictionaries, with their places."
    for k, v in report.items():
        if isinstance(v, dict): yield from numbers(v, (*path, k))
        elif isinstance(v, (int, float)): yield [", ".join((*path, k)), v]


def section(name, title, report) -> str:
    "What one benchmark found."
    sign = {"least": "≥", "most": "≤"}
    rows = [[v["what"], v["value"], f"{sign[v.get('at', 'least')]} {number(v['target'])}", "yes" if v["met"] else "**no**"]
            for v in report.get("verdicts", [])]
    parts = [f"## {title}", f"`{report.get('command', f'python benchmarks/{name}.py')}`", report.get("about", "")]
    parts += [table(["goal", "reached", "wanted", "met"], rows)] if rows else []
    shown = report.get("table") or {"head": ["figure", "value"], "rows": list(numbers(report))}
    parts.append(table(shown["head"], shown["rows"]))
    return "\n\n".join(p for p in parts if p)


def page(name, folder) -> str:
    "A page, from the files that exist."
    title, files = PAGES[name]
    reports = {n: json.loads((folder / f"{n}.json").read_text(encoding="utf-8")) for n in files if (folder / f"{n}.json").is_file()}
    head = (f"# {title}\n\nOurs and the peer in one run, on the same files or batches, with the same threads; `make bench-{name}` measures "
            "again and makes this page. Each table is read from the JSON file beside it.")
    return "\n\n".join([head, *(section(n, files[n], r) for n, r in reports.items())]) + "\n"


if __name__ == "__main__":
    folder = ROOT / "reports/benchmarks"
    for name in PAGES:
        text, path = page(name, folder), folder / f"{name}.md"
        if sys.argv[1:] != ["--check"]: path.write_text(text, encoding="utf-8")
        elif text != path.read_text(encoding="utf-8"): sys.exit(f"{path.name} is not current: run tools/bench_page.py.")
