"""Render README.md from nbs/index.ipynb: readme.py [--check]. Numbers come from reports/headline/summary.json."""
import json
import sys
from pathlib import Path

from vla_nb.core.plot import method_label

ROOT = Path(__file__).resolve().parents[1]


def share(k, n):
    "A success rate with its count."
    return f"{k / n:.0%} ({k}/{n})".replace("%", " %") if n else "–"


def result_row(row):
    "The cells of one method."
    new = row["success"].get(row["new_task"], [0, 0])
    old = [sum(kn[i] for task, kn in row["success"].items() if task != row["new_task"]) for i in (0, 1)]
    low, high = row["mcq_ci95"] or (float("nan"),) * 2
    mcq = "–" if row["mcq_accuracy"] is None else f"{100 * row['mcq_accuracy']:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"
    number = lambda x, form: "–" if x is None else format(x, form)
    return [method_label(row["name"]), share(*new), share(*old), mcq, number(row["heldout_task_loss"], ".3f"),
            number(row["heldout_old_loss"], ".3f"), number(row["train_seconds"], ".0f") + " s"]


def result_table(path):
    "The headline result as a Markdown table, with where it comes from."
    if not Path(path).is_file(): return "No headline result has been recorded yet: `make headline` writes it (three seeds)."
    summary = json.loads(Path(path).read_text(encoding="utf-8"))
    head = ["method", "new task, success", "old tasks, success", "questions right [95 %]", "new-task loss", "old-task loss", "training"]
    rows = [head, ["---"] * len(head), *map(result_row, summary["methods"])]
    table = "\n".join("| " + " | ".join(cells) + " |" for cells in rows)
    asked = next((r["mcq_n"] for r in summary["methods"] if r["mcq_n"]), 0)
    return (f"{table}\n\nSuccess in the simulator, {asked} questions per method (guessing: {100 * summary['chance']:.0f} %), losses on "
            f"held-out episodes. Read from `reports/headline/summary.json`, revision `{summary['revision']}`; `make headline` makes it "
            "again. The page with intervals, clips and limits is `reports/headline/index.html`.")


def render():
    "Execute nbs/index.ipynb and return it as Markdown."
    import nbformat
    from nbconvert import MarkdownExporter
    from nbconvert.preprocessors import ExecutePreprocessor, TagRemovePreprocessor
    nb = nbformat.read(ROOT / "nbs/index.ipynb", as_version=4)
    ExecutePreprocessor(timeout=120, kernel_name="python3").preprocess(nb, {"metadata": {"path": str(ROOT / "nbs")}})
    TagRemovePreprocessor(remove_input_tags={"remove-input"}).preprocess(nb, {})
    text, _ = MarkdownExporter().from_notebook_node(nb)
    lines = [line.rstrip() for line in text.strip().splitlines()]
    kept = [line for i, line in enumerate(lines) if line or (i and lines[i - 1])]
    return "\n".join(["<!-- Rendered from nbs/index.ipynb by `make readme`; edit there. -->", "", *kept]) + "\n"


if __name__ == "__main__":
    text = render()
    if sys.argv[1:] == ["--check"]:
        if text != (ROOT / "README.md").read_text(encoding="utf-8"): sys.exit("README.md is not current: run `make readme`.")
    else:
        (ROOT / "README.md").write_text(text, encoding="utf-8")
        print("README.md written")
