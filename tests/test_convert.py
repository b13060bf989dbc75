"Conversion of v2 datasets and editing: nothing lost, nothing changed, whenever it is interrupted."
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vla_nb.core.types import UserError
from vla_nb.datasets.convert import ConvertOptions, V2Dataset, convert, survey
from vla_nb.datasets.diff import DiffOptions, diff, open_episodes
from vla_nb.datasets.edit import assemble, delete, merge, split
from vla_nb.datasets.edit_command import main as edit
from vla_nb.datasets.fake import fake_dataset, fake_v2
from vla_nb.datasets.lerobot import DatasetMetadata, LeRobotDataset
from vla_nb.datasets.verify import verify_dataset
from vla_nb.datasets.video import VideoReader

ENV = {**os.environ, "OMP_NUM_THREADS": "1"}
CLI = [sys.executable, "-m", "vla_nb", "data"]


def tree(root): return {str(p.relative_to(root)): p.read_bytes() for p in sorted(Path(root).rglob("*")) if p.is_file()}


def to(path, **options): return ConvertOptions(output=str(path), workers=0, **options)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return fake_v2(tmp_path_factory.mktemp("v2") / "small", episodes=5, frames=lambda e: 4 + e, cameras=("top", "wrist"))


def test_seven_hundred_episodes_killed_and_resumed(tmp_path):
    "As many episodes as a season of recordings, two cameras; killed at a random moment, resumed, equal in every bit."
    old = fake_v2(tmp_path / "old", episodes=700, frames=lambda e: 6 + e % 5, cameras=("top", "wrist"), dims=6, fps=30)
    before = {p: p.stat().st_mtime_ns for p in old.rglob("*") if p.is_file()}
    words = [*CLI, "convert", str(old), "--data_mb=1", "--video_mb=1"]
    began = time.time()
    done = subprocess.run([*words, f"--output={tmp_path / 'whole'}"], env=ENV, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    takes = time.time() - began
    child = subprocess.Popen([*words, f"--output={tmp_path / 'killed'}"], env=ENV, stdout=subprocess.DEVNULL,
                             stderr=subprocess.DEVNULL, start_new_session=True)
    time.sleep(random.uniform(0.3, 0.95) * takes)
    if child.poll() is None: os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    if not (tmp_path / "killed").exists():   # it takes its name when it is whole
        again = subprocess.run([*words, f"--output={tmp_path / 'killed'}"], env=ENV, capture_output=True, text=True)
        assert again.returncode == 0, again.stderr
    whole, killed = tree(tmp_path / "whole"), tree(tmp_path / "killed")
    assert whole.keys() == killed.keys() and not [k for k in whole if whole[k] != killed[k]]
    assert {p: p.stat().st_mtime_ns for p in old.rglob("*") if p.is_file()} == before
    assert all(c.ok for c in verify_dataset(tmp_path / "whole", deep=True))
    found = diff(old, tmp_path / "whole", DiffOptions(frames="all"))
    rows = sum(6 + e % 5 for e in range(700))
    assert found == {"differences": [], "episodes": 700, "frames": rows, "pictures": 2 * rows}
    assert len(list((tmp_path / "whole").glob("videos/*/*/*.mp4"))) > 2   # more than one file a camera: rollover


def test_processes_change_nothing(tmp_path, monkeypatch):
    "A large source is looked at and converted by several processes, and what is wrong with it is still one sentence."
    monkeypatch.setattr("vla_nb.datasets.convert.FEW", 2)
    old = fake_v2(tmp_path / "old", episodes=7, frames=lambda e: 4 + e % 3, cameras=("top", "wrist"))
    one, two = (convert(old, ConvertOptions(output=str(tmp_path / f"{n}/new"), workers=n)) for n in (0, 2))
    assert tree(one) == tree(two)
    old.joinpath("data/chunk-000/episode_000005.parquet").unlink()
    with pytest.raises(UserError, match="nothing was written: .*episode_000005.parquet is missing"):
        convert(old, ConvertOptions(output=str(tmp_path / "x"), workers=2))


@pytest.mark.parametrize("kept", [True, False])
def test_statistics(tmp_path, small, kept):
    "Vectors are exact with quantiles; pictures are kept from the source, or measured."
    new = LeRobotDataset(convert(small, to(tmp_path / "new", image_stats="auto" if kept else "compute")))
    action = np.concatenate([new.columns["action"]])
    for name, q in (("q01", 0.01), ("q50", 0.5), ("q99", 0.99)):
        np.testing.assert_allclose(new.meta.stats["action"][name], np.quantile(action.astype(float), q, axis=0), atol=1e-12)
    camera = new.meta.stats["observation.images.top"]
    assert camera["mean"].shape == (3, 1, 1) and ("q50" in camera) is not kept
    assert [c.name for c in verify_dataset(new.meta.root) if not c.ok] == []


def test_version_2_0_has_no_statistics_per_episode(tmp_path):
    old = fake_v2(tmp_path / "old", episodes=2, version="v2.0")
    new = LeRobotDataset(convert(old, to(tmp_path / "new")))
    assert "q99" in new.meta.stats["observation.images.top"] and not diff(old, new.meta.root)["differences"]


def change(root, **info):
    "A copy of a dataset with other words in info.json."
    text = json.loads((root / "meta/info.json").read_text())
    (root / "meta/info.json").write_text(json.dumps(text | info))
    return root


def columns(root, e, **new):
    "Replace columns of an episode's file."
    path = root / f"data/chunk-000/episode_{e:06d}.parquet"
    table = pq.read_table(path)
    for k, v in new.items(): table = table.set_column(table.column_names.index(k), k, v)
    pq.write_table(table, path)


def test_what_v2_left_open(tmp_path, small):
    "Cameras without names or channels first, odd chunk folders, numbers in lists of one, clock time."
    old = tmp_path / "old"; shutil.copytree(small, old)
    info = json.loads((old / "meta/info.json").read_text())
    info["features"]["observation.images.top"] |= {"shape": [3, 32, 32], "names": ["channels", "height", "width"]}
    info["features"]["observation.images.wrist"]["names"] = None
    change(old, features=info["features"], fps=10.0)
    (old / "data/chunk-001").mkdir(); (old / "videos/chunk-005/observation.images.top").mkdir(parents=True)
    columns(old, 3, timestamp=pa.array(1.7e9 + np.arange(7) / 10, pa.float64()), index=pa.array([[i] for i in range(7)]))
    os.rename(old / "data/chunk-000/episode_000003.parquet", old / "data/chunk-001/episode_000003.parquet")
    name = "observation.images.top/episode_000001.mp4"
    os.rename(old / "videos/chunk-000" / name, old / "videos/chunk-005" / name)
    new = LeRobotDataset(convert(old, to(tmp_path / "new")))
    assert new.features["observation.images.top"]["shape"] == (32, 32, 3)
    assert new.features["observation.images.wrist"]["names"] == ["height", "width", "channels"]
    assert new.meta.fps == 10 and isinstance(new.meta.fps, int)
    np.testing.assert_allclose(new.columns["timestamp"][15:22], np.arange(7) / 10, atol=1e-6)
    found = diff(small, new.meta.root, DiffOptions(frames="all"))
    assert not [d for d in found["differences"] if "names" not in d and not d.startswith("statistics of timestamp")]


def test_pictures_in_rows(tmp_path, small):
    "dtype image: bytes in the row, or the name of a file beside the dataset."
    import io
    from PIL import Image
    old = tmp_path / "old"; shutil.copytree(small, old)
    info = json.loads((old / "meta/info.json").read_text())
    info["features"]["observation.images.wrist"]["dtype"] = "image"
    change(old, features=info["features"])
    shutil.rmtree(old / "videos/chunk-000/observation.images.wrist")
    rng = np.random.default_rng(0)
    for e in range(5):
        rows = []
        for i in range(4 + e):
            buffer = io.BytesIO(); Image.fromarray(rng.integers(0, 255, (32, 32, 3), np.uint8)).save(buffer, "PNG")
            path = f"images/wrist/episode_{e:06d}/frame_{i:06d}.png"
            (old / path).parent.mkdir(parents=True, exist_ok=True); (old / path).write_bytes(buffer.getvalue())
            rows.append({"bytes": buffer.getvalue() if e % 2 else None, "path": path})
        p = old / f"data/chunk-000/episode_{e:06d}.parquet"
        pq.write_table(pq.read_table(p).append_column("observation.images.wrist", pa.array(rows)), p)
    new = convert(old, to(tmp_path / "new"))
    assert not diff(old, new, DiffOptions(frames="all"))["differences"]
    assert all(c.ok for c in verify_dataset(new, deep=True))


def broken(tmp_path, small, how):
    old = tmp_path / "old"; shutil.copytree(small, old)
    how(old)
    return old


@pytest.mark.parametrize("how,says", [
    (lambda r: (r / "videos/chunk-000/observation.images.top/episode_000001.mp4").unlink(), "episode_000001.mp4 does not exist"),
    (lambda r: (r / "data/chunk-000/episode_000004.parquet").unlink(), "episode_000004.parquet is missing"),
    (lambda r: (r / "data/chunk-000/episode_000002.parquet").write_bytes(b"PAR1xx"), "episode_000002.parquet cannot be read"),
    (lambda r: shutil.copy(r / "videos/chunk-000/observation.images.top/episode_000000.mp4",
                           r / "videos/chunk-000/observation.images.top/episode_000003.mp4"), "4 pictures for 7 rows"),
    (lambda r: shutil.copy(r / "data/chunk-000/episode_000000.parquet", r / "data/chunk-000/episode_000003.parquet"),
     "4 rows, the metadata says 7"),
    (lambda r: columns(r, 1, action=pa.array([[1.0, float("nan"), 0, 0]] * 5)), "column 'action': statistics: row 0 holds NaN"),
    (lambda r: columns(r, 1, action=pa.array([[1.0, 2.0]] * 5)), "do not have shape (4,)"),
    (lambda r: change(r, codebase_version="v3.0"), "has dataset format v3.0"),
    (lambda r: (r / "meta/episodes.jsonl").write_text('{"episode_index": 1, "tasks": [], "length": 5}\n'), "episode_index 0 is missing"),
])
def test_bad_sources_are_one_sentence(tmp_path, small, how, says):
    old = broken(tmp_path, small, how)
    with pytest.raises(UserError, match="(?s).") as e: convert(old, to(tmp_path / "new"))
    assert says in str(e.value) and not (tmp_path / "new").exists()


def test_all_problems_are_reported_before_anything_is_written(tmp_path, small):
    def how(r):
        for e in (0, 2): (r / f"data/chunk-000/episode_{e:06d}.parquet").unlink()
    old = broken(tmp_path, small, how)
    run = subprocess.run([*CLI, "convert", str(old), f"--output={tmp_path / 'new'}"], env=ENV, capture_output=True, text=True)
    assert run.returncode == 2 and "nothing was written" in run.stderr and run.stderr.count("is missing") == 2
    assert "Traceback" not in run.stderr and not (tmp_path / "new").exists()


def test_a_longer_video_is_cut(tmp_path, small):
    def how(r):
        shutil.copy(r / "videos/chunk-000/observation.images.top/episode_000004.mp4",
                    r / "videos/chunk-000/observation.images.top/episode_000002.mp4")
    old = broken(tmp_path, small, how)
    new = convert(old, to(tmp_path / "new"))
    assert not diff(old, new, DiffOptions(frames="all"))["differences"] and all(c.ok for c in verify_dataset(new, deep=True))
    assert not survey(V2Dataset(old), 2)["problems"] and V2Dataset(old).episodes[2]["length"] == 6


def test_dry_run_writes_nothing(tmp_path, small):
    run = subprocess.run([*CLI, "convert", str(small), f"--output={tmp_path / 'new'}", "--dry_run"], env=ENV,
                         capture_output=True, text=True)
    assert run.returncode == 0 and "1 data files, 2 video files" in run.stdout
    assert [p.name for p in tmp_path.iterdir() if not p.name.endswith(".lock")] == []


def test_diff_by_command(tmp_path, small):
    new = convert(small, to(tmp_path / "new"))
    same = subprocess.run([*CLI, "diff", str(small), str(new), "--frames=all"], env=ENV, capture_output=True, text=True)
    assert same.returncode == 0 and "60 pictures compared: no difference" in same.stdout
    path = next(new.glob("data/*/*.parquet"))
    table = pq.read_table(path)
    moved = np.array(table["observation.state"].to_pylist(), np.float32); moved[9, 1] = np.nextafter(moved[9, 1], 2)
    column = pa.FixedSizeListArray.from_arrays(pa.array(moved.ravel()), 4)
    pq.write_table(table.set_column(table.column_names.index("observation.state"), "observation.state", column), path)
    other = subprocess.run([*CLI, "diff", str(small), str(new)], env=ENV, capture_output=True, text=True)
    assert other.returncode == 1 and "episode 2, observation.state: 1 rows differ, first 0" in other.stdout


# editing

@pytest.fixture
def six(tmp_path): return fake_dataset(tmp_path / "six", episodes=6, frames=7, cameras=("top", "wrist"))


def same_episodes(a, b, pairs):
    "Episodes of two datasets hold the same numbers and pictures."
    x, y = open_episodes(a), open_episodes(b)
    for i, j in pairs:
        u, v = x.columns(i), y.columns(j)
        for k in v.keys() - {"index", "episode_index", "task_index"}: np.testing.assert_array_equal(u[k], v[k])
        for k in y.cameras: np.testing.assert_array_equal(x.pictures(i, k, range(7)), y.pictures(j, k, range(7)))
        assert x.texts[i] == y.texts[j]
    assert all(c.ok for c in verify_dataset(b, deep=True))


def test_edits_keep_every_frame(tmp_path, six):
    "Deleted, split and merged again: what is left is what was there, also over several files."
    meta = DatasetMetadata(six)
    few = assemble(delete(meta, "0,3"), tmp_path / "few")
    same_episodes(six, few, [(1, 0), (2, 1), (4, 2), (5, 3)])
    halves = {k: assemble(p, tmp_path / k) for k, p in split(meta, "a=0.5,b=0.5").items()}
    both = assemble(merge([DatasetMetadata(halves["b"]), DatasetMetadata(halves["a"])]), tmp_path / "both", data_mb=0, video_mb=0)
    same_episodes(six, both, [(3, 0), (4, 1), (5, 2), (0, 3), (1, 4), (2, 5)])
    assert len(list(both.glob("videos/*/*/*.mp4"))) == 12 and len(list(both.glob("data/*/*"))) == 6


def test_a_range_without_a_key_frame_is_encoded_again(tmp_path, six):
    "A file that another program packed into one long group of pictures: copied where possible, else encoded."
    meta = DatasetMetadata(six)
    path = meta.video_file(meta.episodes[0], "observation.images.top")
    pictures = VideoReader(path).frames(range(42))
    with av.open(str(tmp_path / "long.mp4"), "w") as file:
        stream = file.add_stream("libx264", rate=10, options={"x264-params": "keyint=100:scenecut=0:bframes=0", "crf": "10"})
        stream.height, stream.width, stream.pix_fmt = 32, 32, "yuv420p"
        for p in pictures: file.mux(stream.encode(av.VideoFrame.from_ndarray(p, format="rgb24")))
        file.mux(stream.encode(None))
    shutil.copy(tmp_path / "long.mp4", path)
    new = assemble(delete(DatasetMetadata(six), "1"), tmp_path / "new")
    a, b = open_episodes(six), open_episodes(new)
    np.testing.assert_array_equal(a.pictures(0, a.cameras[0], range(7)), b.pictures(0, a.cameras[0], range(7)))
    off = np.abs(a.pictures(3, a.cameras[0], range(7)).astype(int) - b.pictures(2, a.cameras[0], range(7)))
    assert 0 < off.mean() < 3 and all(c.ok for c in verify_dataset(new, deep=True))


def test_statistics_after_a_merge_are_those_of_the_whole(tmp_path, six):
    meta = DatasetMetadata(six)
    parts = [DatasetMetadata(assemble(p, tmp_path / k)) for k, p in split(meta, "a=0:1;b=1:6").items()]
    whole = DatasetMetadata(assemble(merge(parts), tmp_path / "whole"))
    for k in ("action", "observation.state"):
        for s in meta.stats[k]: np.testing.assert_allclose(whole.stats[k][s], meta.stats[k][s], atol=1e-12)


@pytest.mark.parametrize("words,says", [
    (["delete", "SIX", "--episodes=9"], "Episode 9 of '9' does not exist"),
    (["delete", "SIX", "--episodes=0:6"], "no episode is left"),
    (["drop", "SIX", "--features=timestamp"], "cannot be dropped"),
    (["split", "SIX", "--parts=a=0.9,b=0.9", "--output=x"], "at most 1 in all"),
    (["merge", "SIX", "--output=x"], "needs two datasets or more"),
    (["tasks", "SIX", "--replace=fly=jump"], "Task 'fly' is not in"),
    (["undo", "SIX"], "there is no edit to undo"),
])
def test_bad_edits_change_nothing(tmp_path, six, words, says):
    before = tree(six)
    with pytest.raises(UserError) as e: edit([w.replace("SIX", str(six)) for w in words])
    assert says in str(e.value) and tree(six) == before and [p.name for p in tmp_path.iterdir()] == ["six"]


def test_in_place_and_undo_by_command(tmp_path, six):
    before = tree(six)
    done = subprocess.run([*CLI, "edit", "delete", str(six), "--episodes=0:4"], env=ENV, capture_output=True, text=True)
    assert done.returncode == 0 and DatasetMetadata(six).total_episodes == 2, done.stderr
    assert subprocess.run([*CLI, "edit", "undo", str(six)], env=ENV, capture_output=True).returncode == 0
    assert tree(six) == before and [p.name for p in tmp_path.iterdir()] == ["six"]
