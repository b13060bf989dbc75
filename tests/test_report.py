"""The report page: self-contained at every stage, exact schema, clear errors, and silent on the network."""
import json
import os
import re
import shutil
import subprocess

import pytest
from fake_study import METHODS, NEW, OLD, make_study

from vla_nb.apps.report import main, render, render_headline
from vla_nb.apps.report_media import CLIP_LIMIT, clip_uris
from vla_nb.core.types import UserError
from vla_nb.apps import comparison
from vla_nb.evaluation import compare

ROW = {"name", "mcq_accuracy", "mcq_n", "mcq_ci95", "mcq_p_vs_sft", "mcq_accuracy_absent", "success", "new_task",
       "heldout_task_loss",
       "heldout_old_loss", "retention_loss_heldout", "train_seconds", "peak_bytes", "storage_bytes"}
OUTSIDE = re.compile(r"""(?:src|href|srcset|action|poster|xlink:href)\s*=\s*["']?(?!data:|\#)[^"'\s>] |
                         url\(\s*["']?(?!data:|\#) | @import""", re.I | re.X)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return make_study(tmp_path_factory.mktemp("study"), questions=60, steps=60)


@pytest.fixture(scope="module")
def rendered(study):
    return render(study, study/"page"/"index.html")


def outside(html):
    "References that would leave the page; text in <code> and prose is no reference."
    return [html[max(0, m.start()-40):m.end()+60] for m in OUTSIDE.finditer(re.sub(r"data:[^\"']*", "data:", html))]


def test_nothing_outside(rendered):
    html = rendered.read_text()
    assert outside(html) == []
    assert "<script" not in html and "<link rel=\"stylesheet\"" not in html
    assert outside('<img src="http://a.b/c.png">') and outside("a{background:url(x.png)}") and not outside('<a '
        'href="#plot">')


def test_every_section_is_there(rendered):
    html = rendered.read_text()
    for key in ("clips", "plot", "results", "questions", "data", "training", "diagnosis", "checks", "run", "limits"):
        assert f'<section id="{key}">' in html
    assert html.count("<video") == 3 and html.count('class="card question"') > 6
    assert 'name="viewport"' in html and "prefers-color-scheme:dark" in html


def test_summary_schema(study, rendered):
    summary = json.loads((rendered.parent/"summary.json").read_text())
    assert set(summary) == {"methods", "seed", "revision", "seconds", "chance"}
    assert [m["name"] for m in summary["methods"]] == list(METHODS)
    for m in summary["methods"]:
        assert set(m) == ROW and set(m["success"]) == {*OLD, NEW} and m["new_task"] == NEW
        assert all(isinstance(k, int) and isinstance(n, int) and 0 <= k <= n for k, n in m["success"].values())
        assert m["mcq_ci95"][0] <= m["mcq_accuracy"] <= m["mcq_ci95"][1] and m["storage_bytes"] > 0
        assert (m["mcq_p_vs_sft"] is None) == (m["name"] == "sft")
    assert summary == compare.summarise(study)


@pytest.mark.parametrize("done", [(), ("theta0",), ("theta0", "sft"), ("theta0", "sft", "craft_kl")])
def test_every_stage_renders(tmp_path, done):
    study = make_study(tmp_path, done=done, questions=24, steps=20, dataset=bool(done), clips=False)
    html = render(study, tmp_path/"index.html").read_text()
    assert outside(html) == [] and "pending" in html and "This study is still running" in html
    assert [m["name"] for m in json.loads((tmp_path/"summary.json").read_text())["methods"]] == list(done)
    if "craft_kl" not in done: assert "CRaFT prevents" not in html


@pytest.mark.parametrize("file", ["mcq", "rollout", "offline", "retention"])
def test_missing_file_is_an_error(tmp_path, file):
    study = make_study(tmp_path, done=("theta0", "sft"), questions=12, steps=5, dataset=False)
    info = json.loads((study/"study.json").read_text())
    (study/"study.json").write_text(json.dumps({**info, "methods": ["theta0", "sft"]}))
    (study/"sft"/"eval"/f"{file}.json").unlink()
    with pytest.raises(UserError, match=rf"sft/eval/{file}.json is missing; make it with: vla-nb "
                       rf".*eval_sft"): compare.summarise(study)
    with pytest.raises(UserError, match=f"{file}.json is missing"): comparison.main([str(study)])
    with pytest.raises(UserError, match=f"{file}.json is missing"): render_headline([study, study], tmp_path/"headline")
    assert not (tmp_path/"headline").exists()


def test_clip_limit(study, tmp_path):
    assert sum(map(len, clip_uris(study/"clips").values())) <= CLIP_LIMIT == 300_000
    shutil.copytree(study/"clips", tmp_path/"clips")
    with open(tmp_path/"clips"/"sft.mp4", "ab") as f: f.write(bytes(CLIP_LIMIT))
    with pytest.raises(UserError, match="the limit is 300000"): clip_uris(tmp_path/"clips")


def test_headline(tmp_path):
    studies = [make_study(tmp_path, seed=k, questions=24, steps=10, clips=k == 0) for k in (0, 1, 2)]
    html = render_headline(studies, tmp_path/"headline").read_text()
    assert outside(html) == [] and "mean of 3 seeds (0, 1, 2)" in html
    summary, seeds = (json.loads((tmp_path/"headline"/f).read_text()) for f in ("summary.json", "seeds.json"))
    assert summary["seed"] == [0, 1, 2] == [s["seed"] for s in seeds]
    for i, m in enumerate(summary["methods"]):
        assert m["mcq_accuracy"] == pytest.approx(sum(s["methods"][i]["mcq_accuracy"] for s in seeds)/3)
        assert m["success"][NEW] == [sum(s["methods"][i]["success"][NEW][j] for s in seeds) for j in (0, 1)]


def test_command(study, tmp_path, capsys):
    assert main([f"--study={study.parent}", f"--output={tmp_path}/again"]) == 0
    assert (tmp_path/"again"/"index.html").exists() and "index.html" in capsys.readouterr().out


def chromium(*words, profile):
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
             "--disable-background-networking",
             "--disable-component-update", "--disable-sync", f"--user-data-dir={profile}"]
    name = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if name is None: pytest.skip("chromium is not installed: apt-get install chromium")
    return subprocess.run([name, *flags, *words], capture_output=True, text=True, timeout=120, env={**os.environ,
        "HOME": str(profile)})


def requests(log):
    "Addresses that a page asked for, from chromium's network log; the browser's own requests have no origin."
    data = json.loads(log.read_text())
    kinds = {v: k for k, v in data["constants"]["logEventTypes"].items()}
    started = [e.get("params", {}) for e in data["events"] if kinds[e["type"]] == "URL_REQUEST_START_JOB"]
    return {p["url"] for p in started if "url" in p and p.get("initiator") != "not an origin"}


def test_browser_asks_nobody(rendered, tmp_path):
    log = tmp_path/"net.json"
    done = chromium(f"--log-net-log={log}", "--virtual-time-budget=3000", "--dump-dom", f"file://{rendered}",
                    profile=tmp_path/"profile")
    assert "</html>" in done.stdout, done.stderr[-500:]
    asked = {u for u in requests(log) if not u.startswith(("file:", "data:", "chrome"))}
    assert not asked, asked


def test_browser_log_sees_requests(tmp_path):
    page, log = tmp_path/"page.html", tmp_path/"net.json"
    page.write_text('<img src="http://127.0.0.1:9/x.png">')
    chromium(f"--log-net-log={log}", "--virtual-time-budget=3000", "--dump-dom", f"file://{page}",
             profile=tmp_path/"profile")
    assert "http://127.0.0.1:9/x.png" in requests(log)
