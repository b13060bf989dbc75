"The image transforms, the dataset page and the player: right against the peer, self-contained, bounded, readable."
import json
import re
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors import safe_open

from vla_nb.apps.transforms_page import main as imgtransforms
from vla_nb.apps.viz import browse, main as viz
from vla_nb.core.types import UserError
from vla_nb.datasets.edit_command import main as edit
from vla_nb.datasets.fake import fake_dataset
from vla_nb.datasets.lerobot import LeRobotDataset
from vla_nb.datasets.waypoint_command import main_extract as extract
from vla_nb.datasets.waypoints import read_waypoints
from vla_nb.datasets.overview import unusual
from vla_nb.processors.augment import FACTORS, ImageTransforms, ImageTransformsConfig, affine

GOLDEN = Path(__file__).parent / "goldens/image_transforms"


def golden():
    "The picture, LeRobot's results by name, and its default configuration."
    v, u = torch.meshgrid(torch.linspace(0, 1, 20), torch.linspace(0, 1, 24), indexing="ij")
    image = torch.stack([u, v, 0.3 + 0.4 * u * v])
    image[:, 5:12, 8:15] = torch.tensor([0.9, 0.2, 0.1])[:, None, None]
    with safe_open(GOLDEN / "changed.safetensors", "pt") as f:
        return image, {k: f.get_tensor(k) for k in f.keys()}, json.loads(f.metadata()["default"])


def test_image_transforms_equal_lerobots():
    "Every transform at both ends of its range, and the same defaults."
    image, wanted, default = golden()
    assert len(wanted) == 13
    for name, other in wanted.items():
        kind, *values = name.split("_")
        if kind == "affine": ours = affine(image, float(values[0]), (int(values[1]), int(values[2])))
        else: ours = FACTORS[kind](image, float(values[0]))
        torch.testing.assert_close(ours, other, rtol=0, atol=2e-6, msg=lambda m: f"{name}: {m}")
        assert (ours - image).abs().mean() > 1e-4, name
    assert json.loads(json.dumps(asdict(ImageTransformsConfig()))) == default


def test_image_transforms_in_a_dataset(tmp_path):
    "Each camera of each sample is changed, within range, and columns stay; LeRobot's own JSON is a configuration."
    root, default = fake_dataset(tmp_path / "d", cameras=("top", "wrist")), golden()[2]
    change = ImageTransforms(ImageTransformsConfig(**default | {"enable": True}), torch.Generator().manual_seed(0))
    plain, changed = LeRobotDataset(root), LeRobotDataset(root, image_transforms=change)
    a, b = plain[3], changed[3]
    for k in plain.meta.camera_keys:
        assert b[k].shape == a[k].shape and 0 <= b[k].min() and b[k].max() <= 1 and (a[k] != b[k]).any()
    assert (a["action"] == b["action"]).all() and (changed[3][k] != b[k]).any()


# the page

@pytest.fixture(scope="module")
def squares(tmp_path_factory):
    "Ten episodes, three tasks, one of them with signs that HTML reads."
    root = fake_dataset(tmp_path_factory.mktemp("viz") / "squares", episodes=10, frames=40, cameras=("top", "wrist"), size=(48, 64))
    edit(["tasks", str(root), "--replace=push the red square=push <b>red</b> & \"go\""])
    return root


def test_page_asks_nobody(tmp_path, squares):
    "One file, no address of another host, everything a section promises, task texts as text, a bounded size."
    out = tmp_path / "page.html"
    assert viz([str(squares), f"--out={out}", "--megabytes=0.15"]) == 0
    html = out.read_text()
    assert not re.findall(r"""(?:https?:)?//[\w.-]+\.\w|@import|<link(?! rel="icon" href="data:)|src=(?!"data:)""", html)
    assert all(f'id="{k}"' in html for k in ("player", "tasks", "lengths", "numbers", "unusual", "files"))
    assert "<b>red</b>" not in html and "push &lt;b&gt;red&lt;/b&gt; &amp;" in html
    pictures = sum(map(len, re.findall(r"data:image/jpeg;base64,[^)\"]+", html)))
    assert 50_000 < pictures < 155_000 and len(html) < pictures + 150_000
    assert html.count('class="stage"') == 8 and html.count('class="card spread"') == 8


def test_page_shows_the_episodes_asked_for(tmp_path, squares):
    assert viz([str(squares), f"--out={tmp_path / 'p.html'}", "--episodes=2,7:9"]) == 0
    assert re.findall(r"<b>Episode (\d+)", (tmp_path / "p.html").read_text()) == ["2", "7", "8"]
    for words, says in ((["--episodes=99"], "does not exist"), (["--megabytes=0.001"], "raise --megabytes")):
        with pytest.raises(UserError, match=says): viz([str(squares), f"--out={tmp_path / 'q.html'}", *words])
    assert not (tmp_path / "q.html").exists()


def test_page_shows_waypoints(tmp_path, squares):
    "A dot per waypoint and entry on the vector that was compared, none elsewhere; waypoints of other data are refused."
    file = tmp_path / "w.json"
    assert extract([str(squares), f"--output={file}", "--state=observation.state", "--threshold=0.05"]) == 0
    viz([str(squares), "--out", str(tmp_path / "p.html"), "--episodes=3", "--waypoints", str(file)])
    found, ds = read_waypoints(file), LeRobotDataset(squares)
    dots = (tmp_path / "p.html").read_text().split('id="tasks"')[0].count('r="2.8"')
    assert dots == len(found.episodes[3].waypoint_indices) * ds.meta.features["observation.state"]["shape"][0] > 0
    other = fake_dataset(tmp_path / "other", episodes=10, frames=12)
    with pytest.raises(UserError, match="were made from 40"): viz([str(other), f"--waypoints={file}", f"--out={tmp_path / 'q.html'}"])


def test_player_runs_in_a_browser(tmp_path, squares):
    "The script starts, shows the first episode, its clock and its values; no error on the console."
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if not chromium: pytest.skip("chromium is not installed: apt-get install chromium")
    viz([str(squares), f"--out={tmp_path / 'p.html'}", "--episodes=0,1"])
    run = subprocess.run([chromium, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
                          "--disable-component-update", "--disable-sync", f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr",
                          "--dump-dom", f"file://{tmp_path / 'p.html'}"], capture_output=True, text=True, timeout=60)
    dom = run.stdout
    assert "0.00 s · frame 0 of 40" in dom and "Uncaught" not in run.stderr
    assert re.findall(r'<div class="stage"( hidden="")?>', dom) == ["", ' hidden=""']
    first = LeRobotDataset(squares)[0]["observation.state"][0].item()
    assert f"<output>{float(f'{first:.3g}'):g}</output>" in dom


def test_widgets_show_what_was_chosen(squares):
    "Episode and frame lead to that picture; the slider ends where the episode ends."
    ds = LeRobotDataset(squares, return_uint8=True)
    box = browse(ds)
    seen = {box.pictures["observation.images.top"].value}
    for e, i in ((4, 0), (4, 39), (9, 12)):
        box.episode.value, box.frame.value = e, i
        seen.add(box.pictures["observation.images.top"].value)
    assert len(seen) == 4 and box.frame.max == 39


def test_unusual_episodes_are_named(tmp_path):
    "A glitch, a joint that stands still, NaN, a short episode and a dark camera, each where it is; nothing else."
    root = fake_dataset(tmp_path / "d", episodes=24, frames=40, cameras=("top",))
    path = next(root.glob("data/*/*"))
    table = pq.read_table(path)
    values = np.array(table["observation.state"].to_pylist(), np.float32).reshape(24, 40, 4)
    values[6, 11, 2] += 8
    values[9, :, 0] = values[9, 0, 0]
    values[13, 5, 3] = np.inf
    column = pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), 4)
    pq.write_table(table.set_column(table.column_names.index("observation.state"), "observation.state", column), path)
    episodes = next(root.glob("meta/episodes/*/*"))
    rows = pq.read_table(episodes)
    std = rows["stats/observation.images.top/std"].to_pylist()
    std[20] = [[[0.001]], [[0.002]], [[0.0]]]
    name = "stats/observation.images.top/std"
    pq.write_table(rows.set_column(rows.column_names.index(name), name, pa.array(std, rows[name].type)), episodes)
    found = [(n.episode, n.kind, n.frame) for n in unusual(LeRobotDataset(root))]
    assert found == [(6, "jump", 11), (9, "still", None), (13, "NaN", 5), (20, "dark", None)]
    assert viz([str(root), f"--out={tmp_path / 'p.html'}"]) == 0 and "1 value not finite" in (tmp_path / "p.html").read_text()


def test_rerun_names_its_extra(tmp_path, squares, monkeypatch):
    monkeypatch.setitem(sys.modules, "rerun", None)
    with pytest.raises(UserError, match=r"vla_nb\[rerun\]"): viz([str(squares), f"--rerun={tmp_path / 'x.rrd'}"])
    assert not list(tmp_path.iterdir())


def test_page_of_the_image_transforms(tmp_path, squares):
    "Every transform and its range is on the page; the same seed draws the same page; wrong files are one sentence."
    pages = []
    for name in ("a", "b"):
        imgtransforms([str(squares), f"--out={tmp_path / name}.html"])
        pages.append((tmp_path / f"{name}.html").read_text().replace(f"{name}.html", ""))
    assert pages[0] == pages[1] and "http" not in pages[0]
    assert all(f"<h3>{k}</h3>" in pages[0] for k in ImageTransformsConfig().tfs) and "saturation 0.5 … 1.5" in pages[0]
    (tmp_path / "own.toml").write_text("[tfs.fog]\ntype = 'Fog'\n")
    with pytest.raises(UserError, match="has type 'Fog'"): imgtransforms([str(squares), f"--config={tmp_path / 'own.toml'}"])
