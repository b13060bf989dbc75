"""Datasets against LeRobot's own readings, and what notebooks cannot show: crashes, worker processes, damaged files."""
import shutil
import signal
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from vla_nb.core.files import read_json
from vla_nb.core.stats import Stats, compute_stats
from vla_nb.core.types import UserError
from vla_nb.datasets.cache import FrameCache, shrink
from vla_nb.datasets.fake import fake_dataset
from vla_nb.datasets.lerobot import LeRobotDataset
from vla_nb.datasets.loader import EpochSampler, Mixture, collate
from vla_nb.datasets.verify import main as verify_main
from vla_nb.datasets.verify import verify_dataset
from vla_nb.datasets.video import VideoReader
from vla_nb.datasets.writer import DatasetWriter
from vla_nb.processors.vision import resize_area

GOLDENS = Path(__file__).parent / "goldens/lerobot_dataset"
CAMERA = "observation.images.top"


@pytest.fixture(scope="module")
def make():
    "The recipe of the golden files."
    import importlib.util
    spec = importlib.util.spec_from_file_location("make_goldens", GOLDENS / "make.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def tiny(tmp_path): return fake_dataset(tmp_path / "tiny", episodes=4, frames=12, cameras=("top", "wrist"))


def same(a, b):
    "Equality of two samples or batches."
    assert a.keys() == b.keys()
    for k in a: assert torch.equal(a[k], b[k]) if isinstance(a[k], torch.Tensor) else a[k] == b[k], k


def assert_golden(make, root, name):
    "Our reading equals the tensors that LeRobot returned."
    want, (got, notes) = load_file(GOLDENS / f"{name}.safetensors"), make.collect(LeRobotDataset, root)
    assert want.keys() == got.keys()
    for key, value in want.items():
        assert got[key].dtype == value.dtype and torch.equal(got[key], value), key
    with safe_open(GOLDENS / f"{name}.safetensors", "pt") as f: assert f.metadata() == notes


@pytest.mark.parametrize("name", ["recorded_h264", "recorded_av1"])
def test_reads_lerobots_recording(make, name):
    assert_golden(make, GOLDENS / name, name)
    failed = [r.detail for r in verify_dataset(GOLDENS / name, deep=True) if not r.ok]
    assert all("std" in d for d in failed), failed


def test_lerobot_reads_our_recording(make, tmp_path):
    make.write(tmp_path / "written")
    video = tmp_path / "written" / make.VIDEO
    ours = VideoReader(video).frames(range(18)).astype(int)
    shutil.copy(GOLDENS / "written.mp4", video)  # the same pictures through the encoder version that LeRobot saw
    assert np.abs(ours - VideoReader(video).frames(range(18))).mean() < 1
    assert_golden(make, tmp_path / "written", "written")
    assert all(r.ok for r in verify_dataset(tmp_path / "written", deep=True))


def test_files_look_like_lerobots(make, tmp_path):
    import pyarrow.parquet as pq
    make.write(tmp_path / "written")
    theirs, ours = GOLDENS / "recorded_h264", tmp_path / "written"
    a, b = read_json(theirs / "meta/info.json"), read_json(ours / "meta/info.json")
    assert a.keys() == b.keys() and a["features"].keys() == b["features"].keys()
    assert all(a[k] == b[k] for k in a if k != "features" and not k.endswith("size_in_mb"))
    data, episodes = "data/chunk-000/file-000.parquet", "meta/episodes/chunk-000/file-000.parquet"
    assert pq.read_schema(theirs / data).equals(pq.read_schema(ours / data))
    assert pq.read_metadata(ours / data).num_row_groups == 3
    assert set(pq.read_schema(theirs / episodes).names) == set(pq.read_schema(ours / episodes).names)
    names = [n for n in pq.read_schema(ours / episodes).names if not n.startswith("stats/")]
    tables = [pq.read_table(r / episodes, columns=names).to_pylist() for r in (ours, theirs)]
    for mine, other in zip(*tables, strict=True):
        for k in names: assert mine[k] == (pytest.approx(other[k]) if k.endswith("timestamp") else other[k]), k


def test_statistics_agree_with_lerobots(make, tmp_path):
    "Moments agree; LeRobot 0.4.4 squares uint8 pictures (overflow) and estimates quantiles, so those are not compared."
    make.write(tmp_path / "written")
    a, b = (Stats.from_json(r / "meta/stats.json") for r in (GOLDENS / "recorded_h264", tmp_path / "written"))
    for key in b:
        for s in ("mean", "min", "max") + (() if "images" in key else ("std",)):
            np.testing.assert_allclose(b[key][s], a[key][s], rtol=1e-4, atol=1e-5, err_msg=f"{key} {s}")


def test_append_to_lerobots_recording(make, tmp_path):
    root = shutil.copytree(GOLDENS / "recorded_h264", tmp_path / "a")
    before = LeRobotDataset(root)[17]
    with DatasetWriter.resume(root) as w:
        for frame in make.frames(1): w.add_frame(frame | {"task": "something new"})
        w.save_episode()
    ds = LeRobotDataset(root)
    assert (len(ds), ds.meta.tasks[-1], ds[22]["task"]) == (23, "something new", "something new")
    same(ds[17], before)


# --- durability -------------------------------------------------------------------------------------------------------

RECORDER = """
import sys, numpy as np
from vla_nb.datasets.writer import DatasetWriter
f = {"observation.images.top": {"dtype": "video", "shape": (32, 32, 3)}, "action": {"dtype": "float32", "shape": (1,)}}
w = DatasetWriter(sys.argv[1], 10, f)
for e in range(10**6):
    for i in range(5):
        picture = np.full((32, 32, 3), (20 * i + e) % 256, np.uint8)
        w.add_frame({"observation.images.top": picture, "action": np.float32(e), "task": "t"})
    w.save_episode()
    print(e + 1, flush=True)
"""


def test_saved_episodes_survive_kill_9(tmp_path):
    root = tmp_path / "rec"
    p = subprocess.Popen([sys.executable, "-c", RECORDER, str(root)], stdout=subprocess.PIPE, text=True)
    while int(p.stdout.readline()) < 4: pass
    time.sleep(0.013)  # into the middle of some later episode
    p.send_signal(signal.SIGKILL)
    saved = int(([4] + p.stdout.read().split())[-1])
    p.wait()
    with pytest.raises(UserError, match="DatasetWriter.resume"): LeRobotDataset(root)
    DatasetWriter.resume(root).finalize()
    ds = LeRobotDataset(root)
    assert ds.num_episodes >= saved and len(ds) == 5 * ds.num_episodes
    assert all(r.ok for r in verify_dataset(root, deep=True))
    assert ds[5 * saved - 1]["action"].item() == saved - 1


MOMENTS = ["_pack_data", "_pack_videos", "write_episodes", "write_tasks", "write_total_stats", "write_info"]


@pytest.mark.parametrize("moment", MOMENTS)
def test_crash_while_packing_loses_nothing(tmp_path, monkeypatch, moment):
    from vla_nb.datasets import writer as module
    root = fake_dataset(tmp_path / "a", episodes=2, frames=6)
    before = LeRobotDataset(root)[11]
    w = DatasetWriter.resume(root)
    for i in range(6): w.add_frame({k: before[k].numpy() for k in ("observation.state", "action")}
                                   | {CAMERA: np.full((32, 32, 3), 9 * i, np.uint8), "task": "later"})
    w.save_episode()
    class Crash(BaseException): pass
    owner = module if moment.startswith("write") else DatasetWriter
    original = getattr(owner, moment)
    def crash(*args):
        if moment.startswith("_pack"): original(*args)
        raise Crash
    with monkeypatch.context() as patched:
        patched.setattr(owner, moment, crash)
        with pytest.raises(Crash): w.finalize()
    w._stack.close()
    again = DatasetWriter.resume(root)
    assert again.total_episodes == 3
    again.finalize()
    same(LeRobotDataset(root)[11], before)
    assert all(r.ok for r in verify_dataset(root, deep=True)) and LeRobotDataset(root)[17]["task"] == "later"


def test_disk_full_is_one_sentence_and_keeps_episodes(tmp_path):
    code = ("import resource, signal\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))\n"
            "from vla_nb.core.types import UserError\nfrom vla_nb.datasets.writer import DatasetWriter\n"
            "w = DatasetWriter(%r, 10, {'note': {'dtype': 'string', 'shape': (1,)}})\n"
            "w.add_frame({'note': 'a', 'task': 't'}); w.save_episode()\n"
            "import random; random.seed(0)\n"
            "for i in range(9): w.add_frame({'note': '%%x' %% random.getrandbits(80_000), 'task': 't'})\n"
            "try: w.save_episode()\nexcept UserError as e: print('SENTENCE', e)\n" % str(tmp_path / "full"))
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "SENTENCE episode 1 could not be saved" in out.stdout, out.stdout + out.stderr
    DatasetWriter.resume(tmp_path / "full").finalize()
    assert len(LeRobotDataset(tmp_path / "full")) == 1


def test_an_exception_keeps_saved_episodes(tmp_path):
    with pytest.raises(ZeroDivisionError):
        with DatasetWriter(tmp_path / "a", 10, {"action": {"dtype": "float32", "shape": (1,)}}) as w:
            w.add_frame({"action": 1.0, "task": "t"})
            w.save_episode()
            w.add_frame({"action": 2.0, "task": "t"})
            1 / 0
    assert len(LeRobotDataset(tmp_path / "a")) == 1


def test_files_roll_over(tmp_path):
    rng, shape = np.random.default_rng(0), (128, 128, 3)
    features = {CAMERA: {"dtype": "video", "shape": shape}, "blob": {"dtype": "float32", "shape": (9000,)}}
    noise = rng.integers(0, 256, (8, *shape), dtype=np.uint8)
    with DatasetWriter(tmp_path / "a", 10, features, data_mb=1, video_mb=1, crf=1) as w:
        for e in range(5):
            for i in range(20):
                w.add_frame({CAMERA: noise[(e + i) % 8], "blob": rng.normal(size=9000).astype(np.float32), "task": "t"})
            w.save_episode()
    assert len(list((tmp_path / "a/data").rglob("*.parquet"))) > 2
    assert len(list((tmp_path / "a/videos").rglob("*.mp4"))) > 1
    assert all(r.ok for r in verify_dataset(tmp_path / "a", deep=True))
    ds = LeRobotDataset(tmp_path / "a", episodes=[3], return_uint8=True)
    far = np.abs(ds[7][CAMERA].permute(1, 2, 0).numpy().astype(int) - noise).mean((1, 2, 3))
    assert far.argmin() == (3 + 7) % 8 and np.sort(far)[1] > 1.5 * far.min()  # blurred, but this one
    np.testing.assert_allclose(ds.meta.stats["index"]["q50"], [49.5])


# --- readers in other processes ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_worker_processes_after_reading_in_the_parent(tiny, method):
    ds = LeRobotDataset(tiny, delta_timestamps={"action": [0, 0.1], CAMERA: [-0.1, 0]}, return_uint8=True)
    want = [collate(ds.__getitems__(range(a, a + 8))) for a in range(0, 48, 8)]
    loader = torch.utils.data.DataLoader(ds, 8, num_workers=2, multiprocessing_context=method, collate_fn=collate)
    for a, b in zip(loader, want, strict=True): same(a, b)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_mixture_is_the_same_with_workers(tiny, tmp_path, method):
    cache = FrameCache.build(tiny, tmp_path / "cache", (16, 16))
    ds = LeRobotDataset(tiny, frame_cache=cache, return_uint8=True)
    mix = Mixture([(ds, 2), (LeRobotDataset(tiny, frame_cache=cache, return_uint8=True, episodes=[1]), 1)], 9, seed=4)
    want = list(mix.stream(5, 11))
    for a, b in zip(mix.stream(5, 11, workers=2, context=method), want, strict=True): same(a, b)


def test_threads_do_not_share_decoders(tiny):
    from concurrent.futures import ThreadPoolExecutor
    ds = LeRobotDataset(tiny, return_uint8=True)
    want = [ds[i] for i in range(48)]
    with ThreadPoolExecutor(4) as pool:
        for a, b in zip(pool.map(ds.__getitem__, [*range(48)] * 3), want * 3): same(a, b)


def test_random_image_transforms_follow_the_seed(tiny):
    def jitter(x): return x + torch.rand(())
    ds = LeRobotDataset(tiny, image_transforms=jitter)
    torch.manual_seed(1)
    a = Mixture([(ds, 1)], 4)[3]
    state = torch.get_rng_state()
    b = Mixture([(ds, 1)], 4)[3]
    same(a, b)
    assert torch.equal(torch.get_rng_state(), state)


# --- samplers ---------------------------------------------------------------------------------------------------------

def test_sampler_resumes_over_another_number_of_processes():
    one = list(islice(EpochSampler(11, seed=7), 66))
    half = EpochSampler(11, seed=7)
    half.advance(33 - 1)
    for rank in range(2):
        later = EpochSampler(11, seed=7, rank=rank, world_size=2)
        later.load_state_dict(half.state_dict())
        assert list(islice(later, 10)) == one[32 + rank:52:2]


def test_mixture_counts_and_coverage():
    class Rows:
        def __init__(self, n, name): self.n, self.name = n, name
        def __len__(self): return self.n
        def __getitem__(self, i): return {"i": i, "task": self.name}
    mix = Mixture([(Rows(10, "a"), 0.9), (Rows(7, "b"), 0.1)], 24, seed=1)
    seen = {"a": [], "b": []}
    for g in range(70):
        batch = mix[g]
        assert len(batch["task"]) == 24 and batch["task"].count("b") in (2, 3)
        for i, t in zip(batch["i"].tolist(), batch["task"]): seen[t].append(i)
    assert len(seen["b"]) == 168 and np.ptp(np.bincount(seen["b"])) <= 1 and np.ptp(np.bincount(seen["a"])) <= 1
    ranks = [Mixture([(Rows(10, "a"), 0.9), (Rows(7, "b"), 0.1)], 24, seed=1, rank=r, world_size=2) for r in range(2)]
    for k in (20, 3):
        for r in range(2): same(ranks[r][k], mix[2 * k + r])


def test_cache_and_policy_resize_agree(tiny, tmp_path):
    ds = LeRobotDataset(tiny, return_uint8=True)
    for size in ((16, 16), (20, 13)):
        cached = ds.with_frame_cache(FrameCache.build(ds, tmp_path / f"{size}", size))
        for i in (0, 13, 47): assert torch.equal(cached[i][CAMERA], resize_area(ds[i][CAMERA], size))
    assert np.array_equal(shrink(ds[5][CAMERA][None], (32, 32))[0], ds[5][CAMERA].numpy())


# --- damage -----------------------------------------------------------------------------------------------------------

DAMAGE = [("data/chunk-000/file-000.parquet", "truncated or damaged"), ("meta/tasks.parquet", "truncated or damaged"),
          ("meta/episodes/chunk-000/file-000.parquet", "truncated or damaged"), ("meta/info.json", "not valid JSON"),
          (f"videos/{CAMERA}/chunk-000/file-000.mp4", "the file is damaged")]


@pytest.mark.parametrize("file,message", DAMAGE)
def test_truncated_files_are_named(tiny, file, message):
    path = tiny / file
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])
    with pytest.raises(UserError, match=message) as e: LeRobotDataset(tiny)[47]
    assert file in str(e.value) and "\n" not in str(e.value)
    assert verify_main([str(tiny)]) == 1


@pytest.mark.parametrize("file", [f for f, _ in DAMAGE if f.startswith(("data", "videos")) or "tasks" in f])
def test_missing_files_are_named(tiny, file):
    (tiny / file).unlink()
    with pytest.raises(UserError) as e: LeRobotDataset(tiny)[0]
    assert file in str(e.value) and "\n" not in str(e.value)


def test_no_cut_gives_a_wrong_picture(tiny, tmp_path):
    "Every frame of a truncated video is the right picture or an error, never one that the decoder patched up."
    data = (tiny / f"videos/{CAMERA}/chunk-000/file-000.mp4").read_bytes()
    (tmp_path / "a.mp4").write_bytes(data)
    whole, errors, right = VideoReader(tmp_path / "a.mp4").frames(range(48)), 0, 0
    for at in np.linspace(len(data) // 3, len(data) - 1, 30).astype(int):
        (tmp_path / "b.mp4").write_bytes(data[:at])
        reader = VideoReader(tmp_path / "b.mp4")
        for i in range(0, 48, 5):
            try: picture = reader.frames([i])[0]
            except UserError: errors += 1
            else:
                right += 1
                assert np.array_equal(picture, whole[i])
    assert errors > 30 and right > 30


def test_verify_finds_wrong_rows(tiny):
    import pyarrow as pa
    import pyarrow.parquet as pq
    path = tiny / "data/chunk-000/file-000.parquet"
    table = pq.read_table(path)
    index = table["index"].to_numpy().copy()
    index[20] += 1
    pq.write_table(table.set_column(table.column_names.index("index"), "index", pa.array(index)), path)
    bad = [r for r in verify_dataset(tiny) if not r.ok]
    assert "row 20 of all, episode 1, frame 8): index is 21, its position says 20" in bad[0].detail


def test_verify_finds_a_lost_video_frame(tiny):
    from vla_nb.datasets.video import encode_video
    video = tiny / f"videos/{CAMERA}/chunk-000/file-000.mp4"
    pictures = VideoReader(video).frames(range(47))
    encode_video(video, pictures, 10)
    assert [r.name for r in verify_dataset(tiny) if not r.ok] == ["sample load"]


def test_import_is_light():
    code = "import sys, vla_nb.datasets.lerobot; print('transformers' in sys.modules, 'datasets' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
    assert out.split() == ["False", "False"]


def test_exact_quantiles():
    x = np.random.default_rng(0).normal(size=(1000, 3))
    assert np.array_equal(compute_stats(x)["q99"], np.quantile(x, 0.99, axis=0))


def test_encoding_is_repeatable(tmp_path):
    "The same pictures give the same file, wherever the memory lies."
    from vla_nb.datasets.video import encode_video
    rng = np.random.default_rng(0)
    base = np.kron(rng.integers(0, 256, (8, 12, 3)), np.ones((8, 8, 1))).astype(np.uint8)
    pictures, files = [np.roll(base, 2 * i, 1) for i in range(20)], set()
    for _ in range(80):  # without x264's `cpu-independent` now and then one differs
        held = [np.empty(rng.integers(1000, 200_000), np.uint8) for _ in range(rng.integers(1, 40))][::2]
        encode_video(tmp_path / "a.mp4", pictures, 10)
        files.add((tmp_path / "a.mp4").read_bytes())
        del held
    assert len(files) == 1
