"""Policies on one page: its numbers are those of the files, and the record sheet saves what is read back."""
import html
import json
import re
import shutil
import subprocess

import pytest

from vla_nb.apps import cli
from vla_nb.core.files import write_json
from vla_nb.evaluation.trials import read_trials

DRIVE = """<script>
form.task.value='lift the cube';form.robot.value='SO-101';form.fps.value='30';form.date.value='2026-11-20';
const set=(r,v)=>[...rows.rows[r].querySelectorAll('select,input')].forEach((x,i)=>x.value=v[i]);
set(0,['1','8.5','']);set(2,['0','','dropped "it"']);
URL.createObjectURL=b=>{b.text().then(t=>document.title=t);return '#saved'};
form.policy.value='b';form.requestSubmit();</script></body>"""


def run_folder(folder, ms, mae, k):
    part = dict(mean=ms, p50=ms, p90=ms, p99=3 * ms, max=3 * ms, n=5)
    write_json(folder / "eval/latency.json", dict(ms=dict(plan=part, first=part), parameters=2_500_000, disk_bytes=10_000_000, fps=30,
               peak_bytes=300_000_000, action_ms=ms / 4, verdict="only when planning ahead", dtype="float32", device="cpu", threads=1))
    write_json(folder / "eval/offline.json", dict(action_names=["pan", "grip"], per_task=dict(door=dict(loss=1.0, loss_sum=1.0, count=1)),
               all=dict(mse=mae * mae, mse_std=0.5, n=10, mae=[mae, 3 * mae])))
    write_json(folder / "eval/rollout.json", dict(task=dict(door=dict(k=k, n=20))))
    return str(folder)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    return [run_folder(root / "a", 12.5, 0.2, 18), run_folder(root / "b", 80.0, 0.1, 7)]


def test_sheet_saves_what_is_read_back(runs, tmp_path):
    "Filled in and saved in a browser, read by the command, counted on the next page."
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if not chromium: pytest.skip("chromium is not installed: apt-get install chromium")
    page, file = tmp_path / "page.html", tmp_path / "trials.json"
    assert cli.main(["compare", *runs, f"--page={page}"]) == 0
    page.write_text(page.read_text().replace("</body>", DRIVE))
    dom = subprocess.run([chromium, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", f"--user-data-dir={tmp_path / 'p'}",
                          "--virtual-time-budget=3000", "--dump-dom", f"file://{page}"], capture_output=True, text=True, timeout=60).stdout
    file.write_text(html.unescape(re.search(r"<title>(.*?)</title>", dom, re.S)[1]))
    saved = read_trials(file)
    assert saved["trials"] == [{"success": True, "seconds": 8.5, "note": ""}, {"success": False, "seconds": None, "note": 'dropped "it"'}]
    assert (saved["policy"], saved["task"], saved["fps"]) == ("b", "lift the cube", 30) and "Saved 2 trials" in dom
    assert cli.main(["compare", *runs, f"--page={page}", f"--records={file},{file}"]) == 0
    assert "2/4" in page.read_text() and "8.5 s each" in page.read_text()


def test_numbers_of_the_page(runs, tmp_path, capsys):
    page = tmp_path / "page.html"
    assert cli.main(["compare", *runs, f"--page={page}", f"--output={tmp_path}/c.json"]) == 0
    text, table = page.read_text(), capsys.readouterr().out
    for shown in ("12.5", "240.0", "2.50 M", "10.0 MB", "300.0 MB", "18/20", "7/20", "<b>0.1</b>", "<b>0.3</b>", "0.04 ± 0.5"): assert shown in text
    assert "plan ms" in table and "18/20" in table and not re.search(r'(src|href)="http', text)
    rows = json.loads((tmp_path / "c.json").read_text())["runs"]
    assert rows[1]["joints"]["mae"] == {"pan": 0.1, "grip": pytest.approx(0.3)} and rows[0]["speed"]["first_ms"] == 37.5


def test_refused(runs, tmp_path, capsys):
    "A record about another policy, a file that is none, a run without the others' results."
    write_json(tmp_path / "r.json", dict(kind="robot trials", policy="c", task="t", trials=[dict(success=True)]))
    write_json(tmp_path / "x.json", {"trials": []})
    other = run_folder(tmp_path / "c", 1.0, 1.0, 1)
    (tmp_path / "c/eval/latency.json").unlink()
    for argv, says in (([*runs, f"--records={tmp_path}/r.json"], "is about 'c'; the runs are a, b"), ([*runs, f"--records={tmp_path}/x.json"],
                       "no record of robot trials"), ([runs[0], other], "make it with: vla-nb eval latency")):
        assert cli.main(["compare", *argv]) == 2 and says in capsys.readouterr().err


@pytest.mark.parametrize("name", ["act", "act_dinov2", "diffusion", "smolvla"])
def test_flags_of_the_rivals_are_understood(name, tmp_path):
    "E07's flags give a configuration of the policy with the dataset's features; both profiles name the same rivals."
    from vla_nb.apps.rivals import RIVALS
    from vla_nb.core.config import parse_flags
    from vla_nb.datasets.fake import fake_dataset
    from vla_nb.datasets.lerobot import DatasetMetadata
    from vla_nb.policies.store import policy_class
    from vla_nb.training.setup import policy_config
    assert list(RIVALS["tiny"]) == list(RIVALS["full"])
    flags = parse_flags(list(RIVALS["tiny"][name]))["policy"]
    meta = DatasetMetadata(fake_dataset(tmp_path / "d", episodes=1, cameras=("corner", "top"), size=(96, 96)))
    config = policy_config({k: v for k, v in flags.items() if k != "type"}, policy_class(flags["type"]), meta)
    assert config.n_action_steps == 8 and len([f for f in config.input_features.values() if f.type == "VISUAL"]) == 2


@pytest.mark.parametrize("profile", ["tiny", "full"])
def test_commands_of_the_methods_are_understood(profile):
    "E08: every training's flags make a configuration; every file that a command reads is made by an earlier one."
    from vla_nb.apps.methods import GRIDS, grid_steps
    from vla_nb.core.config import parse_flags
    from vla_nb.training.config import read_config
    steps, made = grid_steps(profile, "outputs/x/run"), set()
    policies, seeds = len(GRIDS[profile].policies), len(GRIDS[profile].seeds)
    bases = seeds if GRIDS[profile].own_base else 1
    assert len({s.makes for s in steps}) == len(steps) == 1 + policies * (seeds * 21 + bases * 3)
    for s in steps:
        if s.argv[0] == "train":
            config, _ = read_config([w for w in s.argv[1:] if not w.startswith("--policy.path")])
            assert config.optimizer.schedule == "cosine" and config.optimizer.decay_steps == config.steps
        flags = parse_flags([w for w in s.argv if w.startswith("--")])
        for path in (flags.get("policy", {}).get("path"), flags.get("replay", {}).get("anchors"), flags.get("craft", {}).get("anchor_cache_dir"),
                     flags.get("craft", {}).get("pilot"), *str(flags.get("anchors", "")).split(",")):
            assert not path or any(m == path or m.startswith(path + "/") for m in made), (s.line, path)
        made.add(s.makes)
