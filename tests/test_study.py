"Stages of the study: what is done is not done again, what depends on a change is, and a failure keeps what was finished."
import dataclasses
from pathlib import Path

import pytest

from vla_nb.apps import study as module
from vla_nb.apps.study import Study, StudyConfig
from vla_nb.core.files import read_json, write_json
from vla_nb.core.types import UserError


@pytest.fixture
def ran(monkeypatch):
    "Run nothing; note the stages in order. `ran.fail` names a stage that fails."
    class Ran(list): fail = None
    found = Ran()
    def note(name):
        if name == found.fail: raise UserError(f"{name} failed")
        found.append(name)
    def command(args, log): note(log.stem)
    monkeypatch.setattr(module, "run_command", command)
    for call in ("evaluate", "pilot", "wise", "clips"):
        monkeypatch.setattr(Study, call, lambda self, *a, call=call: note("_".join(map(str, (call, *a)))))
    return found


def study(folder, **changes): return Study(dataclasses.replace(StudyConfig(), **changes), folder, None)


def test_finished_stages_are_kept(ran, tmp_path):
    first = study(tmp_path)
    first.run()
    assert len(ran) == len(first.stages) and all(first.record(s.name) for s in first.stages)
    ran.clear()
    study(tmp_path).run()
    assert ran == []


def test_a_change_reruns_what_depends_on_it(ran, tmp_path):
    study(tmp_path).run()
    ran.clear()
    study(tmp_path, lr=1e-4).run()
    assert "sft" in ran and "craft_kl" in ran and "clips" in ran
    assert "theta0" not in ran and "anchors_token" not in ran and "data" not in ran


def test_a_failure_keeps_what_was_finished(ran, tmp_path):
    ran.fail = "craft_kl"
    with pytest.raises(UserError, match="craft_kl failed"): study(tmp_path).run()
    before = list(ran)
    assert before[-1] == "pilot" and not read_json(tmp_path / "stages/craft_kl.json")["done"]
    ran.fail = None
    ran.clear()
    study(tmp_path).run()
    assert ran[0] == "craft_kl" and not set(ran) & set(before)


def test_an_interrupted_training_resumes(ran, tmp_path, monkeypatch):
    commands = []
    monkeypatch.setattr(module, "run_command", lambda args, log: commands.append(args))
    s = study(tmp_path)
    sft = s.by_name["sft"]
    write_json(tmp_path / "stages/sft.json", dict(key=s.key("sft"), done=False, seconds=7.0))
    (tmp_path / "sft/checkpoints/last").mkdir(parents=True)
    s.run_stage(sft)
    assert commands == [sft.command + ["--resume=true"]]
    assert s.record("sft")["seconds"] >= 7


def test_only_runs_a_stage_and_what_it_needs(ran, tmp_path):
    study(tmp_path).run("anchors_hidden")
    assert ran == ["data", "questions", "theta0", "anchors_hidden"]
    ran.clear()
    study(tmp_path).run("anchors_hidden")
    assert ran == ["anchors_hidden"]          # asked for by name: made again


def test_commands_are_accepted_by_their_parsers(tmp_path):
    "Every flag of every stage exists."
    from vla_nb.apps.anchors import BuildOptions
    from vla_nb.core.config import apply_flags, parse_flags
    from vla_nb.craft.constraint import craft_config
    from vla_nb.training.config import read_config
    for s in study(tmp_path).stages:
        if s.command and s.command[0] == "train":
            config, last = read_config(s.command[1:])
            assert last is None and config.steps > 0
            craft_config(config.craft)
        if s.command and s.command[:2] == ["anchors", "build"]: apply_flags(BuildOptions(), parse_flags(s.command[2:]))


def test_the_fine_tuning_rate_is_the_one_the_sweep_chose():
    "The rate of the study is the one in the file that benchmarks/sft_sweep.py wrote, on seeds nobody reports."
    sweep = read_json(Path(__file__).parents[1] / "reports/benchmarks/sft_sweep.json")
    c = StudyConfig()
    assert sweep["chosen"] == c.lr and not {0, 1, 2} & set(sweep["seeds"])
    assert all((row["steps"], row["random_shift"]) == (c.steps, c.random_shift) for row in sweep["rows"])
