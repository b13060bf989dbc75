"Experiments from the command line: a dry run prints the commands and starts none; every command is one that exists."
import shlex
from html import unescape

import pytest

from vla_nb.apps.cli import main
from vla_nb.apps.experiment import experiments
from vla_nb.training.config import read_config


@pytest.fixture(autouse=True)
def apart(tmp_path, monkeypatch):
    "Runs and pages go to a folder of their own."
    for part in ("OUTPUTS", "REPORTS"): monkeypatch.setenv(f"VLA_NB_{part}", str(tmp_path / part.lower()))


@pytest.mark.parametrize("name", ["E01", "E03", "E05", "E06", "E08"])
def test_dry_run(name, tmp_path, capsys):
    assert main(["experiment", "run", name, "--dry-run", "-p", "run=dry"]) == 0
    full = next(n for n in experiments() if n.startswith(name))
    html = (tmp_path / f"reports/{full}/dry.html").read_text()
    assert capsys.readouterr().out.strip().endswith(f"{full}/dry.html")
    assert [str(p.relative_to(tmp_path)) for p in sorted(tmp_path.rglob("*")) if p.is_file()] == [f"outputs/{full}/dry/run.ipynb", f"reports/{full}/dry.html"]
    lines = [shlex.split(unescape(row)) for row in html.splitlines() if row.strip().startswith(("vla-nb ", "<pre>vla-nb "))]
    assert lines and all(words[0].endswith("vla-nb") for words in lines)
    for words in lines:
        if words[1] == "train": assert read_config([w for w in words[2:] if not w.startswith("--policy.path")])[0].steps > 0


def test_wrong_parameters(tmp_path, capsys):
    "What is not an experiment, or not its parameter, is named with what there is."
    assert main(["experiment", "run", "E99"]) != 0 and "E01_baseline" in capsys.readouterr().err
    assert main(["experiment", "run", "E01", "-p", "lr=3"]) != 0 and "it has profile, run, seed" in capsys.readouterr().err
    assert main(["experiment", "run", "E01", "-p", "profile=huge"]) != 0 and "failed in cell" in capsys.readouterr().err
    assert (tmp_path / "reports/E01_baseline/huge.html").is_file()
