"""Write reports/PARITY.md: each capability with its notebook, its test and that test's last result (outputs/tests/junit.xml)."""
import sys
import tomllib
import xml.etree.ElementTree as ET
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TABLE, RESULTS, PAGE = ROOT / "vla_nb/tables/parity.toml", ROOT / "outputs/tests/junit.xml", ROOT / "reports/PARITY.md"


def read_results(path):
    "Test id (file::name, without parameters) -> outcomes of its cases in the last run."
    found = {}
    if not path.is_file(): return found
    for case in ET.parse(path).iter("testcase"):
        bad = case.find("failure") is not None or case.find("error") is not None
        outcome = "failed" if bad else "skipped" if case.find("skipped") is not None else "passed"
        file, name = case.get("classname", "").replace(".", "/") + ".py", case.get("name", "").split("[")[0]
        found.setdefault(f"{file}::{name}", []).append(outcome)
    return found


def verdict(tests, results):
    "yes when every named test passed; anything less says what is missing."
    if not tests: return "no"
    outcomes = [o for test in tests for o in results.get(test, ["not run"])]
    for bad in ("failed", "not run", "skipped"):
        if bad in outcomes: return f"no ({bad})"
    return "yes"


def page(rows, results, when):
    "The Markdown page."
    lines = ["# Parity", "", "What LeRobot, openpi and the user's requirements ask for, what answers it here, and whether its test passed in the",
             f"last `make test` ({when}). A row without a passing test reads “no”. Written by `make parity` from `vla_nb/tables/parity.toml`.", ""]
    verdicts = [verdict(row.get("tests", []), results) for row in rows]
    lines += [f"{sum(v == 'yes' for v in verdicts)} of {len(rows)} rows: yes.", ""]
    lines += ["| asked by | capability | notebook | test | last result |", "|---|---|---|---|---|"]
    for row, says in zip(rows, verdicts):
        notebook = f"[{row['notebook']}](../nbs/{row['notebook']}.ipynb)" if row.get("notebook") else "–"
        tests = "<br>".join(f"`{t}`" for t in row.get("tests", [])) or "–"
        lines.append(f"| {row['asked_by']} | {row['capability']} | {notebook} | {tests} | {says} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    rows, results = tomllib.loads(TABLE.read_text(encoding="utf-8"))["row"], read_results(RESULTS)
    if not results: sys.exit(f"No test results at {RESULTS.relative_to(ROOT)}: run `make test` first.")
    when = ET.parse(RESULTS).getroot().find("testsuite").get("timestamp", "")[:10]
    PAGE.write_text(page(rows, results, when), encoding="utf-8")
    print(f"{PAGE.relative_to(ROOT)}: {sum(verdict(r.get('tests', []), results) == 'yes' for r in rows)} of {len(rows)} rows with a passing test")
