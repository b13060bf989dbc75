"""Less ordinary datasets against LeRobot's own readings; codecs, depth, subtasks, and what repair and verify do with damage."""
import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from vla_nb.core.files import read_json, write_json
from vla_nb.core.types import UserError
from vla_nb.datasets.build import data_writer
from vla_nb.datasets.depth import depth_codes, depth_of_codes
from vla_nb.datasets.edit import Plan, assemble, delete, undo
from vla_nb.datasets.fake import fake_dataset
from vla_nb.datasets.layout import write_tasks
from vla_nb.datasets.lerobot import LeRobotDataset, episode_rows
from vla_nb.datasets.repair import main as repair_main
from vla_nb.datasets.repair import repair
from vla_nb.datasets.verify import verify_dataset
from vla_nb.datasets.video import VideoReader
from vla_nb.datasets.writer import DatasetWriter

GOLDENS = Path(__file__).parent / "goldens/lerobot_roundtrip"
CAMERA, DATA, EPISODES = "observation.images.top", "data/chunk-000/file-000.parquet", "meta/episodes/chunk-000/file-000.parquet"
VIDEO = f"videos/{CAMERA}/chunk-000/file-000.mp4"


@pytest.fixture(scope="module")
def make():
    "The recipe of the golden files."
    spec = importlib.util.spec_from_file_location("make_roundtrip", GOLDENS / "make.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def assert_golden(make, root, name):
    "Our reading equals what LeRobot returned, value by value."
    want, (got, notes) = load_file(GOLDENS / f"{name}.safetensors"), make.collect(LeRobotDataset, root)
    assert want.keys() == got.keys()
    for key, value in want.items(): assert got[key].dtype == value.dtype and torch.equal(got[key], value), key
    with safe_open(GOLDENS / f"{name}.safetensors", "pt") as f: assert f.metadata() == notes


@pytest.mark.parametrize("name", ["recorded", "recorded_hevc"])
def test_reads_lerobots_datasets(make, name):
    "Several files, several tasks per episode, flags, whole numbers, a matrix, a text; HEVC."
    assert_golden(make, GOLDENS / name, name)
    assert len(list((GOLDENS / name).glob("data/*/*.parquet"))) == len(list((GOLDENS / name).rglob("*.mp4"))) == 2
    failed = [r.detail for r in verify_dataset(GOLDENS / name, deep=True) if not r.ok]
    assert all("std" in d for d in failed), failed


def test_lerobot_reads_our_dataset(make, tmp_path):
    "LeRobot's stored reading of our recording equals ours of the same recording made again."
    make.write(tmp_path / "written")
    for path in (GOLDENS / "written").rglob("*.mp4"):   # the pictures as the encoder wrote them that LeRobot saw
        shutil.copy(path, tmp_path / "written" / path.relative_to(GOLDENS / "written"))
    assert_golden(make, tmp_path / "written", "written")
    assert len(LeRobotDataset(tmp_path / "written").meta.episodes[1]["tasks"]) == 2
    assert len(list((tmp_path / "written").glob("data/*/*.parquet"))) == 2
    assert all(r.ok for r in verify_dataset(tmp_path / "written", deep=True))


# --- what LeRobot 0.4 does not write ----------------------------------------------------------------------------------

def encode(path, pictures, codec, pixels, options):
    "A video of grey or RGB pictures, with any encoder."
    with av.open(str(path), "w", format="mp4") as file:
        stream = file.add_stream(codec, rate=10, options=options)
        stream.height, stream.width, stream.pix_fmt = *pictures.shape[1:3], pixels
        for picture in pictures:
            if pixels.startswith("gray"):
                frame = av.VideoFrame(picture.shape[1], picture.shape[0], pixels)
                lines = np.zeros((picture.shape[0], frame.planes[0].line_size // 2), np.uint16)
                lines[:, :picture.shape[1]] = picture
                frame.planes[0].update(lines.tobytes())
            else: frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))


@pytest.mark.parametrize("options", [{"g": "2"}, {"g": "8", "bf": "3"}, {"x265-params": "keyint=6:bframes=3:open-gop=1"}])
def test_hevc_frames_by_number(tmp_path, options):
    "Any order of asking gives the frames of one walk through the file, also with B-frames and open groups."
    params = "log-level=none" + ":" * ("x265-params" in options) + options.get("x265-params", "")
    pictures = np.stack([np.full((64, 64, 3), 12 * i + 5, np.uint8) for i in range(20)])
    encode(tmp_path / "a.mp4", pictures, "libx265", "yuv420p", options | {"x265-params": params})
    reader = VideoReader(tmp_path / "a.mp4")
    whole = reader.frames(range(20))
    assert np.abs(whole.mean((1, 2, 3)) - pictures.mean((1, 2, 3))).max() < 4
    for i in (13, 2, 19, 6, 5, 7, 0, 12): assert np.array_equal(VideoReader(tmp_path / "a.mp4").frames([i])[0], whole[i])
    assert np.array_equal(reader.frames([13, 2, 19]), whole[[13, 2, 19]])


def test_depth_videos_and_pictures_are_millimetres(tmp_path):
    "A lossless 12-bit video and TIFF pictures in rows, as LeRobot 0.6 writes them."
    import io
    from PIL import Image
    root, rng = fake_dataset(tmp_path / "a", episodes=2, frames=5), np.random.default_rng(0)
    info = {"is_depth_map": True, "video.depth_min": 0.1, "video.depth_max": 5.0, "video.shift": 1.0, "video.use_log": True}
    video = {"dtype": "video", "shape": [16, 24, 1], "names": ["height", "width", "channels"], "info": info}
    stored = {"dtype": "image", "shape": [4, 6, 1], "names": ["height", "width", "channels"], "info": {"is_depth_map": True}}
    mm, near = rng.integers(150, 4000, (10, 16, 24)), rng.integers(1, 9000, (10, 4, 6)).astype(np.uint16)
    path = root / "videos/observation.images.top_depth/chunk-000/file-000.mp4"
    path.parent.mkdir(parents=True)
    encode(path, depth_codes(mm, video), "libx265", "gray12le", {"x265-params": "lossless=1:log-level=none"})
    content = read_json(root / "meta/info.json")
    content["features"] |= {"observation.images.top_depth": video, "observation.images.hand_depth": stored}
    write_json(root / "meta/info.json", content)
    rows = pq.read_table(root / EPISODES)
    for n in ("chunk_index", "file_index", "from_timestamp", "to_timestamp"):
        rows = rows.append_column(f"videos/observation.images.top_depth/{n}", rows[f"videos/{CAMERA}/{n}"])
    pq.write_table(rows, root / EPISODES)
    def tiff(a):
        out = io.BytesIO()
        Image.fromarray(a).save(out, "TIFF")
        return {"bytes": out.getvalue(), "path": "x.tiff"}
    table = pq.read_table(root / DATA)
    pq.write_table(table.append_column("observation.images.hand_depth", pa.array([tiff(a) for a in near])), root / DATA)
    ds = LeRobotDataset(root, delta_timestamps={"observation.images.hand_depth": [-0.1, 0.0]})
    for i in (0, 4, 7):
        depth = ds[i]["observation.images.top_depth"]
        assert depth.dtype == torch.float32 and depth.shape == (1, 16, 24)
        assert np.array_equal(depth.numpy()[0], depth_of_codes(depth_codes(mm[i], video), video)) and np.abs(depth.numpy()[0] - mm[i]).max() < 1.1
        assert np.array_equal(ds[i]["observation.images.hand_depth"][1, 0].numpy(), near[i])
    with pytest.raises(UserError, match="depth is not encoded again"): assemble(delete(ds.meta, "0"), tmp_path / "b")


def test_subtasks_and_language_columns(tmp_path):
    "`subtask_index` with meta/subtasks.parquet gives `subtask`; language columns are lists of messages."
    root = fake_dataset(tmp_path / "a", episodes=2, frames=3)
    content = read_json(root / "meta/info.json")
    content["features"] |= {"subtask_index": {"dtype": "int64", "shape": [1], "names": None},
                            "language_events": {"dtype": "language", "shape": [1], "names": None}}
    write_json(root / "meta/info.json", content)
    write_tasks(root / "meta/subtasks.parquet", ["reach", "push"], "subtask")
    said = [[{"role": "user", "content": "now", "style": "interjection", "camera": None}]] + [[]] * 5
    table = pq.read_table(root / DATA).append_column("subtask_index", pa.array([0, 0, 1, 1, 0, 1]))
    pq.write_table(table.append_column("language_events", pa.array(said)), root / DATA)
    ds = LeRobotDataset(root)
    assert [ds[i]["subtask"] for i in range(6)] == ["reach", "reach", "push", "push", "reach", "push"]
    assert ds[0]["language_events"] == said[0] and ds[1]["language_events"] == []
    with pytest.raises(UserError, match="are read, not written"): assemble(delete(ds.meta, "0"), tmp_path / "b")
    rest = LeRobotDataset(assemble(Plan([(ds.meta, 1)], drop=("language_events",)), tmp_path / "c"))
    assert [rest[i]["subtask"] for i in range(3)] == ["push", "reach", "push"]


# --- verify names file and row ----------------------------------------------------------------------------------------

@pytest.fixture
def tiny(tmp_path): return fake_dataset(tmp_path / "tiny", episodes=4, frames=12)


def change(root, key, row, value):
    "Put another value into one row of the data file."
    table = pq.read_table(root / DATA)
    values = table[key].to_pylist()
    values[row] = value
    table = table.set_column(table.column_names.index(key), table.schema.field(key), pa.array(values, table.schema.field(key).type))
    features = {k: f | {"shape": tuple(f["shape"])} for k, f in read_json(root / "meta/info.json")["features"].items()}
    with data_writer(root / DATA, features) as out: out.write_table(table)


def failures(root, deep=False): return {r.name: r.detail for r in verify_dataset(root, deep) if not r.ok}


@pytest.mark.parametrize("key,row,value,message", [
    ("action", 20, [0.0, float("nan"), 0.0, 0.0], "action holds NaN"), ("index", 20, 21, "index is 21, its position says 20"),
    ("frame_index", 20, 3, "frame_index is 3, its position says 8"), ("task_index", 20, 7, "task_index is 7, there are 3 tasks"),
    ("timestamp", 20, 0.75, "its timestamp is not frame_index / fps")])
def test_verify_names_the_row(tiny, key, row, value, message):
    change(tiny, key, row, value)
    assert failures(tiny)["dataset load"] == f"{DATA}, row 20 (row 20 of all, episode 1, frame 8): {message}" \
        + (" or infinity" if key == "action" else "")


def test_verify_names_a_wrong_checksum(tiny):
    "One flipped bit in a page of numbers, which decompresses and reads as another number."
    chunk = pq.ParquetFile(tiny / DATA).metadata.row_group(2)
    column = next(chunk.column(i) for i in range(chunk.num_columns) if chunk.column(i).path_in_schema.startswith("action"))
    data = bytearray((tiny / DATA).read_bytes())
    data[column.dictionary_page_offset + column.total_compressed_size - 1] ^= 1
    (tiny / DATA).write_bytes(data)
    assert failures(tiny)["dataset load"].startswith(f"{DATA}, rows 24 to 35, column action: a checksum is wrong")


def test_verify_names_a_short_video(tiny):
    from vla_nb.datasets.video import encode_video
    encode_video(tiny / VIDEO, VideoReader(tiny / VIDEO).frames(range(46)), 10)
    assert failures(tiny)["sample load"] == (f"{VIDEO} holds 46 frames, its episodes claim 48; without a picture is {DATA}, row 46 "
                                             "(row 46 of all, episode 3, frame 10)")


def test_verify_names_torn_files_versions_and_columns(tiny):
    (tiny / DATA).write_bytes((tiny / DATA).read_bytes()[:-100])
    assert DATA in failures(tiny)["features"] and "data repair" in failures(tiny)["features"]
    info = read_json(tiny / "meta/info.json")
    write_json(tiny / "meta/info.json", info | {"codebase_version": "v2.1"})
    assert "has dataset format v2.1" in failures(tiny)["version"]
    write_json(tiny / "meta/info.json", info | {"fps": 0})
    assert failures(tiny)["version"] == f"{tiny}/meta/info.json: fps must be a whole number above 0, not '0'"


def test_verify_names_a_column_too_many(tiny):
    table = pq.read_table(tiny / DATA)
    pq.write_table(table.append_column("extra", table["index"]).drop_columns("action"), tiny / DATA)
    assert failures(tiny)["features"] == (f"{DATA}: lacks the column 'action' and has the column 'extra'; "
                                          "info.json and the file must name the same")


# --- repair -----------------------------------------------------------------------------------------------------------

def cut(path, by): path.write_bytes(path.read_bytes()[:-by])


def assert_equal_episodes(new, old, numbers):
    "Episode by episode, frame by frame."
    a, b, at = LeRobotDataset(new), LeRobotDataset(old), 0
    assert a.num_episodes == len(numbers)
    for e in numbers:
        row = b.meta.episodes[e]
        for i in range(row["length"]):
            x, y = a[at + i], b[row["dataset_from_index"] + i]
            for k in y:
                if k not in ("index", "episode_index", "task_index"):
                    assert torch.equal(x[k], y[k]) if isinstance(y[k], torch.Tensor) else x[k] == y[k], k
        at += row["length"]
    assert not failures(new, deep=True)


def test_repair_after_lerobots_recorder_died(make, tmp_path):
    "What a killed LeRobot leaves: rows and the table of episodes without footer; nothing is lost."
    root = shutil.copytree(GOLDENS / "recorded", tmp_path / "a")
    last = "chunk-000/file-001.parquet"
    cut(root / f"data/{last}", 2500)
    cut(root / f"meta/episodes/{last}", 900)
    notes = repair(root)
    assert any("rows were recovered without its footer" in n for n in notes)
    assert_equal_episodes(root, GOLDENS / "recorded", [0, 1, 2])
    assert (tmp_path / "a_old/meta/info.json").is_file()


def test_repair_of_what_a_killed_lerobot_left(make, tmp_path):
    "Really killed: no footer of the rows, no table of episodes; every saved frame comes back with its task and its picture."
    root = shutil.copytree(GOLDENS / "killed", tmp_path / "a")
    with pytest.raises(UserError): LeRobotDataset(root)
    notes = repair(root)
    assert any("15 rows were recovered without its footer" in n for n in notes), notes
    ds, at = LeRobotDataset(root, return_uint8=True), 0
    for e, n in enumerate(make.LENGTHS):
        for i, frame in enumerate(make.frames(e, make.VIDEO | make.STATE)):
            item = ds[at + i]
            assert np.array_equal(item["observation.state"], frame["observation.state"]) and item["task"] == frame["task"]
            assert item["episode_index"] == e and item["frame_index"] == i
            assert abs(float(item[CAMERA].float().mean()) - frame[CAMERA].mean()) < 8
        at += n
    assert len(ds) == at and not failures(root, deep=True)


@pytest.mark.parametrize("dtype", ["video", "image"])
def test_repair_without_any_metadata(tmp_path, dtype):
    "Only rows and pictures are left: rate, shapes and episodes come back; texts of tasks do not."
    whole = fake_dataset(tmp_path / "whole", episodes=3, frames=6, dtype=dtype)
    root = shutil.copytree(whole, tmp_path / "a")
    shutil.rmtree(root / "meta")
    notes = repair(root)
    ds = LeRobotDataset(root)
    assert (ds.fps, ds.num_episodes, len(ds), ds.meta.features[CAMERA]["shape"]) == (10, 3, 18, (32, 32, 3))
    assert ds.meta.tasks[1] == "task 1 (its text is lost)" and any("info.json is missing" in n for n in notes)
    assert torch.equal(ds[17][CAMERA], LeRobotDataset(whole)[17][CAMERA]) and not failures(root, deep=True)


def test_repair_sets_aside_what_is_lost(tmp_path, capsys):
    "A video without its index, a damaged data file: their episodes are named, the others move up, the original waits."
    whole = tmp_path / "whole"
    for part in range(3):   # each sitting makes files of its own
        w = DatasetWriter.resume(whole) if part else DatasetWriter(whole, 10, {
            CAMERA: {"dtype": "video", "shape": (32, 32, 3)}, "action": {"dtype": "float32", "shape": (2,)}})
        for e in range(2):
            for i in range(4): w.add_frame({CAMERA: np.full((32, 32, 3), 60 * part + 20 * e + i, np.uint8),
                                            "action": np.array([part, e], np.float32), "task": f"t{e}"})
            w.save_episode()
        w.finalize()
    root = shutil.copytree(whole, tmp_path / "a")
    cut(root / f"videos/{CAMERA}/chunk-000/file-000.mp4", 1500)
    (root / "data/chunk-000/file-002.parquet").write_bytes(b"PAR1 and nothing")
    assert repair_main([str(root)]) == 0
    said = capsys.readouterr().out
    for e in (0, 1): assert f"episode {e} is lost: videos/{CAMERA}/chunk-000/file-000.mp4" in said
    for e in (4, 5): assert f"episode {e} is lost: none of its rows can be read" in said
    assert_equal_episodes(root, whole, [2, 3])
    undo(root)
    assert (root / "data/chunk-000/file-002.parquet").read_bytes() == b"PAR1 and nothing"


def test_repair_completes_an_interrupted_recording(tmp_path):
    w = DatasetWriter(tmp_path / "a", 10, {"action": {"dtype": "float32", "shape": (1,)}})
    for e in range(2):
        w.add_frame({"action": float(e), "task": "t"})
        w.save_episode()
    w._stack.close()
    assert repair(tmp_path / "a") == ["an interrupted recording was completed: 2 episodes",
                                      "every check holds: nothing is to be repaired"]


def test_repair_command_and_its_errors(tiny, tmp_path):
    run = lambda *words: subprocess.run([sys.executable, "-m", "vla_nb", "data", "repair", *words], capture_output=True, text=True)
    cut(tiny / "meta/info.json", 40)
    done = run(str(tiny), f"--output={tmp_path / 'new'}")
    assert done.returncode == 0 and "is not valid JSON" in done.stdout and LeRobotDataset(tmp_path / "new").num_episodes == 4
    assert (tiny / "meta/info.json").read_text().count("}") and not (tmp_path / "tiny_old").exists()
    for path in (tiny / DATA, tiny / EPISODES): path.write_bytes(b"")
    none = run(str(tiny))
    assert none.returncode == 2 and "nothing is left" in none.stderr and len(none.stderr.splitlines()) == 1
    assert run(str(tmp_path / "gone")).returncode == 2
