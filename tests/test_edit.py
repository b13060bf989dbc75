"New columns, pictures anew and statistics anew: what was asked for changes, nothing else does, and it can be undone."
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import save_file

from vla_nb.core.types import UserError
from vla_nb.datasets.diff import DiffOptions, diff, open_episodes
from vla_nb.datasets.edit import assemble, delete, merge
from vla_nb.datasets.edit_command import main as edit
from vla_nb.datasets.fake import fake_dataset
from vla_nb.datasets.features import add_column
from vla_nb.datasets.lerobot import DatasetMetadata, LeRobotDataset
from vla_nb.datasets.statistics import StatsOptions, main as stats, recompute
from vla_nb.datasets.verify import verify_dataset
from vla_nb.datasets.mp4 import read_mp4
from vla_nb.datasets.video import video_info

ENV = {**os.environ, "OMP_NUM_THREADS": "1"}
CLI = [sys.executable, "-m", "vla_nb", "data"]
TOP = "observation.images.top"


def tree(root): return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def whole(root): return [c.detail for c in verify_dataset(root, deep=True) if not c.ok]


@pytest.fixture
def film(tmp_path): return fake_dataset(tmp_path / "film", episodes=4, frames=9, cameras=("top", "wrist"), size=(48, 64))


@pytest.mark.parametrize("kind", ["npy", "safetensors", "parquet"])
def test_a_column_from_a_file(tmp_path, film, kind):
    "Every row of the file arrives, in its type, with exact statistics; everything else is as it was."
    values = np.random.default_rng(0).normal(size=(36, 3))
    path = tmp_path / f"force.{kind}"
    if kind == "npy": np.save(path, values)
    elif kind == "safetensors": save_file({"force": values}, path)
    else: pq.write_table(pa.table({"force": list(values)}), path)
    assert edit(["add", str(film), "--name=force", f"--values={path}", "--names=x,y,z", f"--output={tmp_path / 'new'}"]) == 0
    new = open_episodes(tmp_path / "new")
    assert new.features["force"] == {"dtype": "float64", "shape": (3,), "names": ["x", "y", "z"]}
    np.testing.assert_array_equal(np.concatenate([new.columns(e)["force"] for e in range(4)]), values)
    np.testing.assert_array_equal(new.stats["force"]["q01"], np.quantile(values, 0.01, axis=0))
    assert not whole(tmp_path / "new")
    found = diff(film, tmp_path / "new", DiffOptions(frames="all"))["differences"]
    assert len(found) == 1 and found[0].startswith("features:")


def test_added_columns_survive_other_edits(tmp_path, film):
    "A 2-D column, a flag and a text: deleted from, merged, dropped again."
    meta = DatasetMetadata(film)
    map_ = np.arange(36 * 6, dtype=np.int32).reshape(36, 2, 3)
    a = assemble(add_column(meta, "map", map_), tmp_path / "a")
    b = assemble(add_column(DatasetMetadata(a), "good", np.arange(36) % 2 == 0), tmp_path / "b")
    c = assemble(add_column(DatasetMetadata(b), "note", [f"row {i}" for i in range(36)]), tmp_path / "c")
    few = DatasetMetadata(assemble(delete(DatasetMetadata(c), "1"), tmp_path / "few"))
    both = LeRobotDataset(assemble(merge([few, DatasetMetadata(c)]), tmp_path / "both"))
    assert both[9]["note"] == "row 18" and bool(both[9]["good"]) and both[9]["map"].tolist() == map_[18].tolist()
    assert not whole(tmp_path / "both")
    edit(["drop", str(tmp_path / "c"), "--features=map,good,note"])
    assert diff(film, tmp_path / "c", DiffOptions(frames="all"))["differences"] == []


def test_video_to_images_is_exact_and_back_again(tmp_path, film):
    "PNG hold the pictures that the video shows; video made of them is near, with measured statistics."
    edit(["to-images", str(film), f"--output={tmp_path / 'png'}"])
    a, b = LeRobotDataset(film, return_uint8=True), LeRobotDataset(tmp_path / "png", return_uint8=True)
    assert b.meta.video_keys == [] and b.meta.info["video_path"] is None and not (tmp_path / "png/videos").exists()
    for k in a.meta.camera_keys: assert (a.images(k, np.arange(36)) == b.images(k, np.arange(36))).all()
    assert not whole(tmp_path / "png")
    edit(["to-video", str(tmp_path / "png"), f"--cameras={TOP}", "--crf=10", "--g=5"])
    c = LeRobotDataset(tmp_path / "png", return_uint8=True)
    assert c.meta.video_keys == [TOP] and c.meta.image_keys == ["observation.images.wrist"]
    off = (c.images(TOP, np.arange(36)).int() - a.images(TOP, np.arange(36)).int()).abs().float().mean()
    assert 0 < off < 3 and not whole(tmp_path / "png")
    keys = np.flatnonzero(read_mp4(c.meta.video_file(c.meta.episodes[0], TOP)).keys)
    assert {0, 9, 18, 27} <= set(keys.tolist()) and 2 < np.diff(keys).max() <= 5   # an episode begins with a key frame
    assert stats([str(tmp_path / "png"), "--check", "--images=compute", "--workers=0"]) == 0
    edit(["undo", str(tmp_path / "png")])
    assert LeRobotDataset(tmp_path / "png").meta.video_keys == []


def test_reencode_codec_size_and_quality(tmp_path, film):
    edit(["reencode", str(film), "--vcodec=av1", "--crf=50", "--g=4", "--size=24x32", f"--output={tmp_path / 'small'}"])
    meta = DatasetMetadata(tmp_path / "small")
    about = meta.features[TOP]
    assert about["shape"] == (24, 32, 3) and about["info"]["video.codec"] == "av1"
    assert (about["info"]["video.crf"], about["info"]["video.g"], about["info"]["video.width"]) == (50, 4, 32)
    assert video_info(meta.video_file(meta.episodes[3], TOP))["video.codec"] == "av1"
    assert not whole(tmp_path / "small") and sorted(p.name for p in tmp_path.iterdir()) == ["film", "small"]
    rows = [d for d in diff(film, tmp_path / "small", DiffOptions(frames="none"))["differences"] if d.startswith("episode")]
    assert rows == []


def test_killed_while_encoding_goes_on_where_it_stopped(tmp_path):
    "kill -9 in the middle: the dataset is untouched, the second attempt keeps finished episodes, the result is the same."
    root = fake_dataset(tmp_path / "long", episodes=10, frames=16, cameras=("top",), size=(64, 64))
    before = tree(root)
    words = [*CLI, "edit", "reencode", str(root), "--crf=25", "--workers=1"]
    assert subprocess.run([*words, f"--output={tmp_path / 'whole'}"], env=ENV, capture_output=True).returncode == 0
    work = tmp_path / ".cut.pictures"
    child = subprocess.Popen([*words, f"--output={tmp_path / 'cut'}"], env=ENV, stdout=subprocess.DEVNULL,
                             stderr=subprocess.DEVNULL, start_new_session=True)
    while child.poll() is None and len(list(work.glob("*-0*.json"))) < 3: time.sleep(0.005)
    os.killpg(child.pid, signal.SIGKILL) if child.poll() is None else None
    child.wait()
    if not (tmp_path / "cut").exists():
        again = subprocess.run([*words, f"--output={tmp_path / 'cut'}"], env=ENV, capture_output=True, text=True)
        assert again.returncode == 0 and "of 10 episodes are done already" in again.stdout, again.stderr
    assert tree(root) == before and not work.exists()
    assert diff(tmp_path / "whole", tmp_path / "cut", DiffOptions(frames="all"))["differences"] == []


@pytest.mark.parametrize("words,says", [
    (["add", "FILM", "--name=x"], "--values=FILE or --constant=VALUE"),
    (["add", "FILM", "--constant=1"], "give the new column a name"),
    (["add", "FILM", "--name=action", "--constant=1"], "has a column 'action' already"),
    (["add", "FILM", "--name=x", "--values=none.npy"], "none.npy does not exist"),
    (["add", "FILM", "--name=x", "--constant=nan"], "holds NaN or infinity"),
    (["reencode", "FILM", "--vcodec=mpeg2"], "'mpeg2' is unknown"),
    (["reencode", "FILM", "--size=49x64"], "video needs even sides"),
    (["reencode", "FILM", "--crf=99"], "outside the range"),
    (["reencode", "FILM", "--cameras=left"], "takes cameras stored as video"),
    (["to-video", "FILM"], "has no camera that this would change"),
])
def test_bad_requests_change_nothing(tmp_path, film, words, says):
    before = tree(film)
    with pytest.raises(UserError) as e: edit([w.replace("FILM", str(film)) for w in words])
    assert says in str(e.value) and tree(film) == before and [p.name for p in tmp_path.iterdir()] == ["film"]


def test_statistics_are_found_wrong_and_put_right(tmp_path, film):
    "Wrong totals, a wrong episode and missing quantiles are each named; recomputing mends them, undo brings them back."
    assert stats([str(film), "--check"]) == 0
    path = film / "meta/stats.json"
    said = json.loads(path.read_text())
    said["action"]["q99"][1] += 0.5
    del said["observation.state"]["q01"]
    path.write_text(json.dumps(said))
    episodes = next(film.glob("meta/episodes/*/*"))
    table = pq.read_table(episodes)
    off = pa.array([[v + 1 for v in row] for row in table["stats/action/mean"].to_pylist()])
    pq.write_table(table.set_column(table.column_names.index("stats/action/mean"), "stats/action/mean", off), episodes)
    before = tree(film)
    wrong = recompute(film, StatsOptions(check=True))
    assert wrong["action"] == ["q99 of stats.json differs", "mean of episode 0 differs, and 3 more"]
    assert wrong["observation.state"] == ["q01 of stats.json differs"] and wrong["timestamp"] == [] and tree(film) == before
    assert stats([str(film), "--check"]) == 1 and stats([str(film)]) == 0 and stats([str(film), "--check"]) == 0
    assert not whole(film)
    edit(["undo", str(film)])
    assert tree(film) == before


def test_statistics_by_command(tmp_path, film):
    "NaN in a row is named with file, episode and row; nothing is written."
    path = next(film.glob("data/*/*"))
    table = pq.read_table(path)
    rows = np.array(table["action"].to_pylist(), np.float32); rows[20, 2] = np.nan
    column = pa.FixedSizeListArray.from_arrays(pa.array(rows.ravel()), 4)
    pq.write_table(table.set_column(table.column_names.index("action"), "action", column), path)
    done = subprocess.run([*CLI, "stats", str(film)], env=ENV, capture_output=True, text=True)
    assert done.returncode == 2 and "episode 2" in done.stderr and "row 2 holds NaN" in done.stderr, done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["film"]
