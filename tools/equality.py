"""Write reports/equality.md and .json: how far each policy and importer is from its original, measured by running the comparisons of the tests.

    make equality        (or: python tools/equality.py [--check])

The tests compare tensors through a function `close` of their module, or through torch.testing.assert_close; while they run here, the largest
difference of every comparison is noted. `--check` only says whether every row of the written file passed.
"""
import json
import sys
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
OUT, LIMIT = ROOT / "reports/equality", 1e-5
ROWS = [  # kind, what, the original, tests that compare the two
    ("policy", "act", "LeRobot 0.4.4", ["test_act.py::test_equal_to_lerobot", "test_act.py::test_inputs_are_normalised_as_in_lerobot"]),
    ("policy", "diffusion", "LeRobot 0.4.4", ["test_diffusion.py::test_equal_to_lerobot"]),
    ("policy", "smolvla", "LeRobot 0.4.4", ["test_smolvla.py::test_equal_to_lerobot"]),
    ("policy", "pi0, pi05", "openpi (tensors of its own code)", ["test_pi0.py::test_loss_and_velocities", "test_pi0.py::test_plan"]),
    ("policy", "pi0_fast", "transformers' PaliGemma", ["test_pi0_fast.py::test_loss_equals_transformers_paligemma",
                                                       "test_pi0_fast.py::test_chunk_equals_transformers_paligemma"]),
    ("network", "SmolVLM", "transformers' SmolVLM", ["test_smolvla.py::test_vlm_equals_transformers"]),
    ("network", "DINOv2", "transformers' Dinov2Model", ["test_act.py::test_dinov2_equals_transformers"]),
    ("network", "Gemma", "transformers' GemmaModel", ["test_policies.py::test_trunk_equals_transformers_gemma"]),
    ("network", "SigLIP", "transformers' SiglipVisionModel", ["test_policies.py::test_tower_equals_transformers_siglip"]),
    ("importer", "LeRobot 0.4", "LeRobot 0.4.4", ["test_checkpoints.py::test_import_of_lerobot_04"]),
    ("importer", "LeRobot 0.6", "LeRobot 0.4.4, its folder in the layout of 0.6", ["test_checkpoints.py::test_import_of_lerobot_06_and_compiled_names"]),
    ("importer", "LeRobot 0.3", "LeRobot 0.4.4", ["test_checkpoints.py::test_import_of_lerobot_03"]),
    ("importer", "openpi, PyTorch", "openpi (tensors of its own code)", ["test_openpi.py::test_torch_import_plans_like_openpi"]),
    ("importer", "openpi, JAX", "a pass over the JAX arrays themselves", ["test_openpi.py::test_jax_import_equals_an_independent_forward",
                                                                             "test_openpi.py::test_jax_import_of_pi0_fast_equals_an_independent_forward"]),
]


class Recorder:
    "A pytest plugin that notes the difference of every comparison."
    def __init__(self): self.largest, self.counts, self.outcomes, self.now, self.inside = {}, {}, {}, None, False

    def watch(self, compare):
        "The same comparison, noting the difference first; one inside another counts once."
        def watched(a, b, *args, **kwargs):
            if not self.inside:
                x, y = (torch.as_tensor(t).detach().double() for t in (a, b))
                self.largest[self.now] = max(self.largest.get(self.now, 0.0), ((x - y).abs() / y.abs().clamp(min=1)).max().item())
                self.counts[self.now] = self.counts.get(self.now, 0) + 1
            outer, self.inside = self.inside, True
            try: return compare(a, b, *args, **kwargs)
            finally: self.inside = outer
        return watched

    @contextmanager
    def watching(self, module):
        "Both ways of comparing, for the duration of a test."
        places = [(p, n) for p, n in ((module, "close"), (torch.testing, "assert_close")) if hasattr(p, n)]
        before = [getattr(p, n) for p, n in places]
        for (p, n), f in zip(places, before): setattr(p, n, self.watch(f))
        try: yield
        finally:
            for (p, n), f in zip(places, before): setattr(p, n, f)

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_call(self, item):
        self.now = item.nodeid.split("[")[0].split("/")[-1]
        with self.watching(item.module): yield

    def pytest_runtest_logreport(self, report):
        name = report.nodeid.split("[")[0].split("/")[-1]
        if report.when == "call" or report.outcome != "passed": self.outcomes.setdefault(name, set()).add(report.outcome)


def measure(rows):
    "Run the tests of all rows in one go; every row with its figures."
    recorder = Recorder()
    tests = [f"{ROOT}/tests/{t}" for *_, names in rows for t in names]
    pytest.main(["-q", "--no-header", "-p", "no:cacheprovider", *tests], plugins=[recorder])
    found = []
    for kind, what, original, names in rows:
        passed = all(recorder.outcomes.get(n) == {"passed"} for n in names)
        numbers = [recorder.largest[n] for n in names if n in recorder.largest]
        found.append({"kind": kind, "what": what, "original": original, "tests": [f"tests/{n}" for n in names], "passed": passed,
                      "comparisons": sum(recorder.counts.get(n, 0) for n in names), "largest": max(numbers, default=None)})
    return found


def holds(row): return row["passed"] and row["largest"] is not None and row["largest"] <= LIMIT


def page(rows, versions, exports):
    "The Markdown page."
    lines = ["# Equality", "", "The largest difference between ours and the original, with the same weights, inputs and noise, in float32 on a CPU: losses, action",
             "chunks, hidden states, normalised inputs; above 1 as a share of the original's value. Written by `make equality`, which runs the comparisons",
             "of the tests and notes every difference.", "",
             f"{sum(map(holds, rows))} of {len(rows)} rows are within {LIMIT:.0e}.", "", "| | ours | original | comparisons | largest difference | test |", "|---|---|---|---|---|---|"]
    for r in rows:
        number = "not measured" if r["largest"] is None else f"{r['largest']:.1e}"
        tests = " ".join(f"`{t.removeprefix('tests/')}`" for t in r["tests"])
        lines.append(f"| {r['kind']} | {r['what']} | {r['original']} | {r['comparisons']} | {number}{'' if holds(r) else ' **no**'} | {tests} |")
    lines += ["", f"LeRobot {exports['lerobot']} ran what `vla-nb checkpoint export` wrote (`tools/check_with_lerobot.py`):", "",
              "| exported policy | normalised chunk | physical actions |", "|---|---|---|"]
    lines += [f"| {k} | {v['chunk']:.1e} | {v['actions']:.1e} |" for k, v in exports["largest_difference"].items()]
    return "\n".join([*lines, "", "Versions: " + ", ".join(f"{k} {v}" for k, v in versions.items()) + ".", ""])


if __name__ == "__main__":
    if "--check" in sys.argv: rows = json.loads(OUT.with_suffix(".json").read_text())["rows"]
    else:
        rows, versions = measure(ROWS), {n: version(n) for n in ("torch", "transformers")}
        exports = json.loads((ROOT / "reports/lerobot_runs_our_exports.json").read_text())
        OUT.with_suffix(".json").write_text(json.dumps({"limit": LIMIT, "versions": versions, "rows": rows}, indent=1) + "\n")
        OUT.with_suffix(".md").write_text(page(rows, versions, exports))
    for r in rows: print(f"{r['kind']:9s}{r['what']:18s}{'yes' if holds(r) else 'NO '} {r['largest']}")
    sys.exit(0 if all(map(holds, rows)) else 1)
