"""The conventions of the house: layers, cell budget, openings, exported code in step, a current README, no leftovers."""
import ast
import configparser
import json
import re
import shutil
import subprocess
import sys
import time
import tomllib
from dataclasses import fields
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NBS, LIB = ROOT / "nbs", ROOT / "vla_nb"
LIBRARY = sorted(NBS.glob("[a-z]*/[0-9][0-9][0-9]_*.ipynb"))
EVERY = sorted(p for p in NBS.rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
BIN = Path(sys.executable).parent

# What a package may import, beside earlier modules of its own.
L1 = {"datasets", "processors", "robots", "envs", "networks"}
MODEL = {"core", "processors", "networks", "policies"}
ALLOWED = {
    "core": set(),
    **{name: {"core"} for name in L1},
    "policies": {"core", "processors", "networks"},
    "craft": MODEL,
    "checkpoints": MODEL,
    "training": MODEL | {"datasets", "craft", "checkpoints"},
    "evaluation": MODEL | {"datasets", "craft", "checkpoints", "envs"},
    "inference": MODEL | {"datasets", "craft", "checkpoints"},
    "control": {"core", "robots", "envs", "datasets", "processors", "policies", "inference"},
    "apps": {"core", "policies", "craft", "checkpoints", "training", "evaluation", "inference", "control"} | L1,
}
# Export cells longer than 30 lines (never more than 60) that read better whole: (notebook, first name defined).
LONG_CELLS = {  # one class that is clearer whole than cut up; the cap stays 60 lines
    ("apps/960_study", "StudyConfig"), ("datasets/110_lerobot", "LeRobotDataset"), ("datasets/120_writer", "DatasetWriter"),
    ("datasets/160_questions", "QuestionDataset"), ("policies/455_diffusion", "DiffusionConfig"),
    ("policies/440_pi0", "Pi0Config"), ("policies/460_smolvla", "SmolVLAConfig"), ("processors/210_normalize", "_StatsStep"),
    ("training/620_loop", "TrainRun"), ("training/625_sources", "Demonstrations")}


def name_of(path): return f"{path.parent.name}/{path.stem}"


def cells_of(path): return json.loads(path.read_text(encoding="utf-8"))["cells"]


def source_of(cell): return "".join(cell["source"])


def directives(cell): return [line[2:].split() for line in source_of(cell).splitlines() if line.startswith("#|")]


def exported(cell): return cell["cell_type"] == "code" and ["export"] in directives(cell)


def body_lines(cell):
    "Lines that say something: no directives, no blank lines."
    return [line for line in source_of(cell).splitlines() if line.strip() and not line.startswith("#|")]


# ---------------------------------------------------------------- layers

def imports_of(path, package):
    "Dotted names of the package's own modules that a file imports anywhere, with the line: also relative, also in functions."
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            base = ".".join(parts[:len(parts) - node.level + 1]) if node.level else ""
            stem = ".".join(p for p in (base, node.module or "") if p)
            names = [stem] + [f"{stem}.{alias.name}" for alias in node.names]
        else: continue
        for name in names: yield name, node.lineno


def numbers():
    "Module -> number of its notebook."
    return {f"{p.parent.name}.{p.stem[4:]}": int(p.stem[:3]) for p in LIBRARY}


def violations(path, order):
    "Imports of one file that its layer forbids."
    package = path.parent.name
    me = f"{package}.{path.stem}"
    for name, line in imports_of(path, f"vla_nb.{package}"):
        parts = name.split(".")
        if parts[0] != "vla_nb" or len(parts) < 2: continue
        other = parts[1]
        if other not in ALLOWED: continue
        if other != package and other not in ALLOWED[package]:
            yield f"{me}:{line} imports {name}: {package} may not import {other}"
        if other == package and len(parts) > 2:
            target = f"{package}.{parts[2]}"
            if target in order and order[target] >= order.get(me, 0):
                yield f"{me}:{line} imports {name}, which comes later in the reading order"


def test_layers():
    "A module imports lower layers, or earlier modules of its package; an import inside a function counts too."
    order = numbers()
    unknown = {p.name for p in LIB.iterdir() if p.is_dir() and p.name not in ALLOWED | {"tables": 0, "__pycache__": 0}}
    assert not unknown, f"packages without a layer: {unknown}"
    found = [v for p in sorted(LIB.glob("*/*.py")) if p.stem != "__init__" for v in set(violations(p, order))]
    assert not found, "\n".join(sorted(found))


def test_layers_are_seen_through_every_kind_of_import(tmp_path):
    "The walker itself: relative, absolute and lazy imports of a higher layer are all caught."
    folder = tmp_path / "core"
    folder.mkdir()
    for text in ("from ..training import loop", "import vla_nb.training.loop", "from vla_nb.training.loop import x",
                 "def f():\n    from ..training.loop import x", "from .. import training", "from vla_nb import training"):
        (folder / "files.py").write_text(text)
        assert list(violations(folder / "files.py", numbers())), text
    (folder / "files.py").write_text("from .manifest import load_manifest")
    assert any("reading order" in v for v in violations(folder / "files.py", numbers()))


@pytest.mark.parametrize("package,forbidden", [("core", {"torch", "transformers", "mujoco"}), ("robots", {"torch"})])
def test_packages_without_torch(package, forbidden):
    "core and robots never import torch, not even lazily."
    found = [f"{p.name}:{line} {name}" for p in (LIB / package).glob("*.py")
             for name, line in imports_of(p, f"vla_nb.{package}") if name.split(".")[0] in forbidden]
    assert not found


# ---------------------------------------------------------------- notebooks

@pytest.mark.parametrize("path", LIBRARY, ids=name_of)
def test_opening(path):
    "Title and responsibility; default_exp; an import-only export cell; demo imports."
    cells = cells_of(path)
    title = source_of(cells[0]).splitlines()
    assert cells[0]["cell_type"] == "markdown" and re.match(r"# \S", title[0]) and re.match(r"> \S", title[1])
    assert ["default_exp", f"{path.parent.name}.{path.stem[4:]}"] in directives(cells[1]) and not body_lines(cells[1])
    assert exported(cells[2])
    kinds = {type(node) for node in ast.parse(source_of(cells[2])).body}
    assert kinds <= {ast.Import, ast.ImportFrom}, "the first export cell holds more than imports"
    assert cells[3]["cell_type"] == "code" and not exported(cells[3])


@pytest.mark.parametrize("path", LIBRARY, ids=name_of)
def test_cell_budget(path):
    "Export cells of at most 30 lines, demo cells of at most 12, lines of at most 120 characters, modules of at most 500 lines."
    found = []
    for n, cell in enumerate(cells_of(path)):
        if cell["cell_type"] != "code": continue
        lines, out = body_lines(cell), exported(cell)
        first = next((w for line in lines for w in re.findall(r"^(?:def|class) (\w+)|^(\w+) =", line)), ("", ""))
        limit = 60 if (name_of(path), "".join(first)) in LONG_CELLS else 30
        if out and len(lines) > limit: found.append(f"cell {n} ({''.join(first)}): {len(lines)} exported lines")
        if not out and len(lines) > 12: found.append(f"cell {n}: {len(lines)} lines in a demo cell")
        found += [f"cell {n}: a line of {len(line)} characters" for line in lines if out and len(line) > 120]
        if any(re.match(r"\s*from \S+ import \*", line) for line in lines): found.append(f"cell {n}: import *")
    module = LIB / path.parent.name / f"{path.stem[4:]}.py"
    size = len(module.read_text(encoding="utf-8").splitlines())
    if size > 500: found.append(f"{module.name} has {size} lines")
    assert not found, "\n".join(found)


@pytest.mark.parametrize("path", EVERY, ids=name_of)
def test_notebook_file(path):
    "A kernel of this environment, only `tags` as cell metadata, small outputs, no percent copy."
    nb = json.loads(path.read_text(encoding="utf-8"))
    assert nb["metadata"]["kernelspec"]["name"] == "python3"
    assert "jupytext" not in nb["metadata"] and not path.with_suffix(".py").exists()
    assert {key for cell in nb["cells"] for key in cell["metadata"]} <= {"tags"}
    assert sum(len(json.dumps(c.get("outputs", []))) for c in nb["cells"]) <= 100_000
    if path.parent.name == "experiments":
        assert any("parameters" in c["metadata"].get("tags", []) for c in nb["cells"]), "no cell tagged `parameters`"
        assert not any(exported(c) or ["default_exp"] in [d[:1] for d in directives(c)] for c in nb["cells"])


def test_leaf_folders_are_left_out_of_the_library_tests():
    "Every folder of notebooks that are not library has its own .notest."
    for folder in {p.parent for p in EVERY} - {p.parent for p in LIBRARY} - {NBS}:
        assert (folder / ".notest").is_file(), folder


def test_clean_keeps_tags(tmp_path):
    "nbdev-clean keeps papermill's `parameters` tag and the kernel."
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / "nbs").mkdir()
    cell = dict(cell_type="code", id="a", metadata={"tags": ["parameters"], "x": 1}, source="n = 1", outputs=[], execution_count=3)
    kernel = {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}
    path = tmp_path / "nbs/run.ipynb"
    path.write_text(json.dumps(dict(cells=[cell], metadata=kernel, nbformat=4, nbformat_minor=5)))
    subprocess.run([BIN / "nbdev-clean"], cwd=tmp_path, check=True, capture_output=True)
    after = json.loads(path.read_text())
    assert after["cells"][0]["metadata"] == {"tags": ["parameters"]} and after["cells"][0]["execution_count"] is None
    assert after["metadata"]["kernelspec"]["name"] == "python3"


def test_exported_code_in_step(tmp_path):
    "Exporting every notebook afresh gives the committed package, no more and no less."
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    shutil.copytree(NBS, tmp_path / "nbs", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    (tmp_path / "vla_nb").mkdir()
    for plain in ("__init__.py", "__main__.py"): shutil.copy(LIB / plain, tmp_path / "vla_nb")  # two lines each
    subprocess.run([BIN / "nbdev-export"], cwd=tmp_path, check=True, capture_output=True)
    fresh = {p.relative_to(tmp_path): p.read_text() for p in (tmp_path / "vla_nb").rglob("*.py")}
    here = {p.relative_to(ROOT): p.read_text() for p in LIB.rglob("*.py")}
    wrong = sorted(str(p) for p in fresh.keys() | here.keys() if fresh.get(p) != here.get(p))
    assert not wrong, f"run `make notebooks`; out of step: {wrong}"


def test_readme_current():
    "README.md is what `make readme` writes."
    run = subprocess.run([sys.executable, ROOT / "tools/readme.py", "--check"], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


# ---------------------------------------------------------------- start-up

def python(code): return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)


def test_core_starts_without_torch():
    "The package, its core and its command line load neither torch nor matplotlib."
    modules = [f"vla_nb.core.{p.stem}" for p in (LIB / "core").glob("*.py") if p.stem != "__init__"]
    run = python(f"import sys, vla_nb, vla_nb.apps.cli, {', '.join(modules)}\n"
                 "print([m for m in ('torch', 'matplotlib', 'transformers', 'mujoco') if m in sys.modules])")
    assert run.stdout.strip() == "[]", run.stdout + run.stderr


def test_dataset_reader_starts_without_transformers():
    "Reading data does not wait for transformers or for the simulator."
    run = python("import sys, vla_nb.datasets.lerobot\nprint([m for m in ('transformers', 'mujoco') if m in sys.modules])")
    assert run.stdout.strip() == "[]", run.stdout + run.stderr


def fastest(argv, n=5):
    "Shortest of n wall times, seconds."
    times = []
    for _ in range(n):
        start = time.perf_counter()
        subprocess.run(argv, check=True, capture_output=True, cwd=ROOT)
        times.append(time.perf_counter() - start)
    return min(times)


def test_start_up_times():
    "`import vla_nb` within 0.3 s, `vla-nb --help` within 0.7 s."
    bare = fastest([sys.executable, "-c", "pass"])
    assert fastest([sys.executable, "-c", "import vla_nb"]) - bare < 0.3
    assert fastest([BIN / "vla-nb", "--help"]) < 0.7


# ---------------------------------------------------------------- packaging

def project(): return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_constraints_cover_the_dependencies():
    "Every dependency is pinned, and the pin fits what pyproject.toml asks for."
    from packaging.requirements import Requirement
    from vla_nb.apps.doctor import read_constraints
    pins = read_constraints(ROOT / "constraints.txt")
    assert not [line for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" not in line]
    for text in project()["dependencies"]:
        need = Requirement(text)
        name = need.name.lower().replace("_", "-")
        assert name in pins, f"{name} is not in constraints.txt"
        assert need.specifier.contains(pins[name]), f"{name}=={pins[name]} does not fit {text}"
    for extra, needs in project()["optional-dependencies"].items():
        assert all("==" in need for need in needs), f"extra {extra} has no exact versions"


def test_named_packages_are_dependencies():
    "The packages that the project is built on are declared."
    names = {re.split(r"[<>=!\[ ]", text)[0] for text in project()["dependencies"]}
    assert names >= {"jupyterlab", "nbdev", "torch", "accelerate", "transformers", "safetensors", "pyarrow", "tensorflow-datasets",
                     "matplotlib", "papermill", "ipywidgets", "pytest"}


def test_wheel_holds_tables_and_licence(tmp_path):
    "A wheel carries every module, the TOML tables and the licence."
    import zipfile
    for name in ("pyproject.toml", "README.md", "LICENSE"): shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(LIB, tmp_path / "vla_nb", ignore=shutil.ignore_patterns("__pycache__"))
    subprocess.run([sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir",
                    tmp_path / "out", tmp_path], check=True, capture_output=True)
    names = zipfile.ZipFile(next((tmp_path / "out").glob("*.whl"))).namelist()
    want = {str(p.relative_to(ROOT)) for p in (*LIB.rglob("*.py"), *LIB.rglob("*.toml")) if "__pycache__" not in p.parts}
    assert any(n.endswith(".toml") for n in want)
    assert want <= set(names), want - set(names)
    assert any(n.endswith("LICENSE") for n in names)


def test_settings_file_names_every_setting():
    "settings.ini, the Settings class and their defaults agree."
    from vla_nb.core.settings import Settings, read_settings
    parser = configparser.ConfigParser()
    parser.read(ROOT / "settings.ini")
    assert set(parser["vla_nb"]) == {f.name for f in fields(Settings)} - {"root"}
    assert read_settings(ROOT, {}) == read_settings(ROOT, {f"VLA_NB_{k.upper()}": v for k, v in parser["vla_nb"].items()
                                                           if not isinstance(getattr(Settings, k), Path)})


def test_manifests_load():
    "Every manifest of data_manifests/ is well formed and says how to get its data."
    from vla_nb.core.manifest import load_manifest
    paths = sorted((ROOT / "data_manifests").glob("*.toml"))
    assert {p.stem for p in paths} >= {"metaworld_demo", "aloha_sim_insertion_human", "koch_700", "libero_object_rlds"}
    for path in paths:
        manifest = load_manifest(path)
        assert manifest.name == path.stem and manifest.expect and manifest.how_to_get, path.name


def test_ignored_and_committed_reports():
    "Results that are to be committed are not ignored; everything else below reports/ is."
    def ignored(name): return subprocess.run(["git", "check-ignore", "-q", name], cwd=ROOT).returncode == 0
    if not (ROOT / ".git").exists(): pytest.skip("not a git checkout")
    assert not any(map(ignored, ("reports/LOG.md", "reports/PARITY.md", "reports/headline/index.html",
                                 "reports/headline/summary.json", "reports/headline/seeds.json", "reports/benchmarks/craft_step.json",
                                 "reports/datasets/metaworld_demo.html", "reports/E07_policies/tiny.html", "reports/E07_policies/tiny.json",
                                 "reports/E08_methods/tiny.html", "reports/E08_methods/tiny.json")))
    assert all(map(ignored, ("reports/demo/index.html", "reports/E01/run.html", "reports/E08_methods/mine.html", "reports/headline/seed0.html", "reports/datasets/x.html", "outputs/x", "data/x")))


def test_second_install_does_nothing():
    "`make install` is done when its stamp is newer than what it depends on."
    if not (ROOT / ".venv/.installed").exists(): pytest.skip("this environment was not made by make")
    fresh = (ROOT / ".venv/.installed").stat().st_mtime
    if fresh < max((ROOT / n).stat().st_mtime for n in ("pyproject.toml", "constraints.txt")): pytest.skip("make install is due")
    run = subprocess.run(["make", "-q", "install"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


def test_no_paths_of_somebody_s_machine():
    "No file of the repository names a folder of one particular machine."
    pattern = re.compile(r"(?<![\w.~)}\]-])/(?:home|root|Users|work|tmp|mnt|scratch)/[A-Za-z0-9_.-]+")
    folders = ("nbs", "vla_nb", "tests", "tools", "data_manifests", "benchmarks", ".ci", ".github", "reports/benchmarks")
    files = [p for f in folders for p in (ROOT / f).rglob("*")] + [ROOT / "reports/LOG.md", *ROOT.glob("*")]
    kinds = {".py", ".ipynb", ".toml", ".md", ".ini", ".sh", ".txt", ".json", ".html", ""}
    found = []
    for path in files:
        skip = path == Path(__file__) or {".ipynb_checkpoints", "__pycache__", "golden"} & set(path.parts)
        if skip or path.name == ".git" or not path.is_file() or path.suffix not in kinds: continue
        text = path.read_text(encoding="utf-8", errors="ignore")
        found += [f"{path.relative_to(ROOT)}: {m[0]}" for m in pattern.finditer(text)]
    assert not found, "\n".join(found[:20])


# ---------------------------------------------------------------- tools

def tool(name):
    "A script of tools/ as a module."
    import importlib.util
    spec = importlib.util.spec_from_file_location(f"tool_{name}", ROOT / f"tools/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_result_table_of_the_readme(tmp_path):
    "The README's table is made from the file's numbers; a missing file is said to be missing."
    row = dict(name="sft", mcq_accuracy=0.5, mcq_n=400, mcq_ci95=[0.45, 0.55], success={"old-a": [1, 20], "old-b": [3, 20], "new": [18, 20]},
               new_task="new", heldout_task_loss=1.2345, heldout_old_loss=2.5, train_seconds=61.2)
    path = tmp_path / "summary.json"
    path.write_text(json.dumps(dict(methods=[row, {**row, "name": "theta0", "mcq_accuracy": None, "mcq_ci95": None, "train_seconds": None}],
                                    chance=0.31, revision="abc")))
    text = tool("readme").result_table(path)
    assert "| SFT | 90 % (18/20) | 10 % (4/40) | 50.0 % [45.0, 55.0] | 1.234 | 2.500 | 61 s |" in text
    assert "guessing: 31 %" in text and "`abc`" in text and "| – |" in text
    assert "make headline" in tool("readme").result_table(tmp_path / "none.json")


JUNIT = """<testsuites><testsuite timestamp="2026-01-02T03:04:05">
<testcase classname="tests.test_a" name="test_x[1]"/><testcase classname="tests.test_a" name="test_x[2]"><failure message="m"/></testcase>
<testcase classname="tests.test_a" name="test_y"/><testcase classname="tests.test_a" name="test_z"><skipped message="no Chromium here"/></testcase>
</testsuite></testsuites>"""


def test_parity_is_honest(tmp_path):
    "A row is `yes` only when all cases of all its tests passed in the last run."
    path, parity = tmp_path / "junit.xml", tool("parity")
    path.write_text(JUNIT)
    results = parity.read_results(path)
    says = lambda *tests: parity.verdict([f"tests/test_a.py::{t}" for t in tests], results)
    assert [says("test_y"), says("test_x"), says("test_y", "test_z"), says("test_y", "test_gone"), says()] == \
        ["yes", "no (failed)", "no (skipped)", "no (not run)", "no"]
    assert "| U1 | walk | – | – | no |" in parity.page([dict(asked_by="U1", capability="walk")], results, "2026-01-02")
    assert tool("no_skips").skipped_for(path, ["chromium"]) == ["tests.test_a::test_z: no Chromium here"]


def test_parity_names_tests_and_notebooks_that_exist():
    "Every notebook and test of tables/parity.toml is there."
    for row in tomllib.loads((LIB / "tables/parity.toml").read_text())["row"]:
        if row.get("notebook"): assert (NBS / f"{row['notebook']}.ipynb").is_file(), row
        for test in row.get("tests", []):
            file, name = test.split("::")
            assert re.search(rf"^def {name}\(", (ROOT / file).read_text(), re.M), test
