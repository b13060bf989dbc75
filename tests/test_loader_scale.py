"""Loading: what is computed instead of stored, mapped instead of read, and built in pieces that survive a kill."""
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from itertools import islice

import numpy as np
import pytest
import torch

from vla_nb.core.files import read_json, read_jsonl
from vla_nb.core.stats import aggregate_feature, compute_stats
from vla_nb.core.types import UserError
from vla_nb.datasets import cache as cache_module
from vla_nb.datasets import lerobot as lerobot_module
from vla_nb.datasets import loader
from vla_nb.datasets.cache import FrameCache
from vla_nb.datasets.fake import fake_dataset
from vla_nb.datasets.lerobot import DatasetMetadata, LeRobotDataset
from vla_nb.datasets.loader import EpochSampler, Mixture, Trimmed, collate, joined, permuted
from vla_nb.datasets.tables import MappedColumns
from vla_nb.datasets.writer import DatasetWriter

CAMERA, CHUNK = "observation.images.top", {"action": [i / 10 for i in range(5)]}


def same(a, b):
    "Two samples or batches are equal."
    assert a.keys() == b.keys()
    for k in a: assert torch.equal(a[k], b[k]) if isinstance(a[k], torch.Tensor) else a[k] == b[k], k


@pytest.fixture(scope="module")
def tiny(tmp_path_factory): return fake_dataset(tmp_path_factory.mktemp("data") / "tiny", episodes=4, frames=12)


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    "A dataset in several data files, with a column of texts and one of matrices."
    features = {"action": {"dtype": "float32", "shape": (9000,)}, "pose": {"dtype": "float32", "shape": (2, 2)},
                "done": {"dtype": "bool", "shape": (1,)}, "note": {"dtype": "string", "shape": (1,)}}
    rng, root = np.random.default_rng(0), tmp_path_factory.mktemp("data") / "parts"
    with DatasetWriter(root, 10, features, data_mb=1) as out:
        for e in range(6):
            for i in range(11 + e):
                out.add_frame({"action": rng.normal(size=9000).astype(np.float32), "pose": rng.normal(size=(2, 2)).astype(np.float32),
                               "done": i == 10 + e, "note": f"{e}/{i}", "task": "a" if e % 2 else "b"})
            out.save_episode()
    assert len(DatasetMetadata(root).data_files()) > 2
    return root


# --- order ------------------------------------------------------------------------------------------------------------

def test_the_order_that_results_were_trained_in():
    "Up to 2^20 samples the order is numpy's permutation, drawn from (seed, group + 1, epoch)."
    for n, groups in ((7, None), (1000, None), (60, ["a", "b", "b"] * 20)):
        names = groups or ["a"] * n
        members = [[i for i in range(n) if names[i] == g] for g in dict.fromkeys(names)]
        def order(group, epoch, length): return np.random.default_rng(np.random.SeedSequence([5, group + 1, epoch])).permutation(length)
        want = []
        for t in range(2 * n):
            cycle, i = divmod(t, len(members))
            g = order(-1, cycle, len(members))[i]
            epoch, k = divmod(cycle, len(members[g]))
            want.append(members[g][order(g, epoch, len(members[g]))[k]])
        assert list(islice(EpochSampler(n, seed=5, groups=groups), 2 * n)) == want
        if groups: assert list(islice(EpochSampler(n, seed=5, groups=np.array(groups)), 2 * n)) == want


def test_computed_epochs_visit_every_sample_once(monkeypatch):
    monkeypatch.setattr(loader, "STORED", 100)
    for n in (101, 128, 129, 1000):
        stream = list(islice(EpochSampler(n, seed=3), 3 * n))
        epochs = [stream[i * n:(i + 1) * n] for i in range(3)]
        assert all(sorted(e) == list(range(n)) for e in epochs) and epochs[0] != epochs[1] != epochs[2]
        assert stream != list(islice(EpochSampler(n, seed=4), 3 * n))
        assert list(islice(EpochSampler(n, seed=3, start=n + 7), 20)) == stream[n + 7:n + 27]
        ranks = [list(islice(EpochSampler(n, seed=3, rank=r, world_size=3), n // 3)) for r in range(3)]
        assert [i for row in zip(*ranks) for i in row] == stream[:n // 3 * 3]


def test_computed_order_looks_random():
    "Chi-square over 100 bins of every residue of the position, and no trace of the position left in its entry."
    n, keys = 3 * 10 ** 8 + 17, EpochSampler(2 * 10 ** 6, seed=9)
    keys.at(0)
    keys = keys._orders[0][1]
    drawn = np.array([permuted(i, n, keys) for i in range(40_000)])
    counts = np.bincount(drawn * 100 // n, minlength=100)
    assert ((counts - 400) ** 2 / 400).sum() < 160      # 99 degrees of freedom: mean 99, standard deviation 14
    assert abs(np.corrcoef(np.arange(40_000), drawn)[0, 1]) < 0.03 and abs(np.corrcoef(drawn[1:], drawn[:-1])[0, 1]) < 0.03
    assert len(np.unique(drawn)) == 40_000


def test_a_billion_samples_cost_no_memory():
    import tracemalloc
    class Numbers:
        def __init__(self, name): self.name = name
        def __len__(self): return 10 ** 9
        def __getitem__(self, i): return {"i": i, "task": self.name}
    tracemalloc.start()
    mix = Mixture([(Numbers("a"), 3), (Numbers("b"), 1)], 16, seed=2)
    batches = [mix[k] for k in (0, 1, 10 ** 6)]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64 << 20 and all(b["task"].count("a") == 12 for b in batches)
    assert torch.unique(torch.cat([b["i"] for b in batches])).numel() == 48
    later = Mixture([(Numbers("a"), 3), (Numbers("b"), 1)], 16, seed=2)
    same(later[10 ** 6], batches[2])


def test_dropped_ends(tiny, parts):
    ds = LeRobotDataset(tiny, delta_timestamps=CHUNK, return_uint8=True)
    kept = Trimmed(ds, drop_n_last_frames=4)
    assert len(kept) == 32 and not any(s["action_is_pad"].any() for s in kept.__getitems__(range(32)))
    assert [s["index"].item() for s in kept.__getitems__([0, 7, 8, 31])] == [0, 7, 12, 43]
    filtered = Trimmed(LeRobotDataset(tiny, episodes=[3, 1], return_uint8=True), drop_n_first_frames=10)
    assert [filtered[i]["index"].item() for i in range(4)] == [46, 47, 22, 23]
    uneven = Trimmed(LeRobotDataset(parts), drop_n_last_frames=14)    # episodes of 11 to 16 frames
    assert [uneven[i]["note"] for i in range(3)] == ["4/0", "5/0", "5/1"] and len(uneven) == 3
    with pytest.raises(UserError, match="the longest episode has 12"): Trimmed(ds, drop_n_last_frames=12)
    with pytest.raises(IndexError): kept[32]


# --- batches ----------------------------------------------------------------------------------------------------------

def test_a_batch_is_not_copied_but_equal(tiny):
    ds = LeRobotDataset(tiny, delta_timestamps=CHUNK | {CAMERA: [-0.1, 0]}, return_uint8=True)
    items = ds.__getitems__([40, 3, 3, 11, 0])
    batch = collate(items)
    assert batch["action"].untyped_storage().data_ptr() == items[0]["action"].untyped_storage().data_ptr()
    want = torch.utils.data.default_collate(items)
    same({k: v for k, v in batch.items() if k != "task"}, {k: v for k, v in want.items() if k != "task"})
    mixed = collate([items[1], items[0]])
    assert torch.equal(mixed["action"], torch.stack([items[1]["action"], items[0]["action"]]))


@pytest.mark.parametrize("base", [torch.arange(24).reshape(4, 2, 3), torch.arange(24).reshape(4, 3, 2).permute(0, 2, 1),
                                  torch.arange(24.).reshape(2, 3, 4).permute(2, 0, 1), torch.zeros(1, 2).expand(4, 2), torch.arange(4)])
def test_joined_equals_stack(base):
    for rows in (range(4), [0, 1, 2], [3, 2, 1, 0], [0, 0, 1, 1], [0, 2]):
        values = [base[i] for i in rows]
        assert torch.equal(joined(values), torch.stack(values))
    assert torch.equal(joined(list(base.clone().unbind())), base)


# --- columns ----------------------------------------------------------------------------------------------------------

@pytest.fixture
def mapped(monkeypatch, tmp_path):
    "Every dataset is too big for memory."
    monkeypatch.setattr(lerobot_module, "IN_MEMORY", 0)
    monkeypatch.setenv("VLA_NB_CACHE_ROOT", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize("episodes", [None, [5, 0, 3]])
def test_mapped_columns_equal_columns_in_memory(parts, monkeypatch, tmp_path, episodes):
    window = {"action": [-0.1, 0, 0.3], "note": [0, 0.1]}
    plain = LeRobotDataset(parts, episodes=episodes, delta_timestamps=window)
    assert isinstance(plain.columns, dict)
    monkeypatch.setattr(lerobot_module, "IN_MEMORY", 0)
    monkeypatch.setenv("VLA_NB_CACHE_ROOT", str(tmp_path / "cache"))
    big = LeRobotDataset(parts, episodes=episodes, delta_timestamps=window)
    assert isinstance(big.columns, MappedColumns) and not (tmp_path / "cache").exists()
    rows = np.random.default_rng(0).permutation(len(plain)).tolist()
    for a, b in zip(big.__getitems__(rows), plain.__getitems__(rows), strict=True): same(a, b)
    assert list(big.columns) == list(plain.columns)
    for k in plain.columns:
        if k == "note": assert big.columns[k] == plain.columns[k].to_pylist()
        else: assert np.array_equal(big.columns[k], plain.columns[k]) and big.columns[k].dtype == plain.columns[k].dtype, k


def test_only_files_that_are_wanted_are_decoded(parts, mapped):
    ds = LeRobotDataset(parts)
    ds[0]
    (folder,) = mapped.glob("columns-*[0-9a-f]")
    assert np.fromfile(folder / "decoded", np.uint8).tolist() == [1] + [0] * (len(ds.meta.data_files()) - 1)
    again = LeRobotDataset(parts)
    again[len(ds) - 1]
    assert np.fromfile(folder / "decoded", np.uint8).tolist().count(1) == 2     # a later opening uses the same folder


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_mapped_columns_in_workers(parts, mapped, method):
    ds = LeRobotDataset(parts, delta_timestamps={"action": [0, 0.1]})
    ds[0]
    loader_ = torch.utils.data.DataLoader(ds, 8, num_workers=2, multiprocessing_context=method, collate_fn=collate)
    notes = [n for batch in loader_ for n in batch["note"]]
    assert notes == [f"{e}/{i}" for e in range(6) for i in range(11 + e)]


def test_damaged_data_file_is_named_when_it_is_wanted(parts, mapped, tmp_path):
    root = shutil.copytree(parts, tmp_path / "copy")
    path, (row, _) = list(DatasetMetadata(root).data_files().items())[1]
    path.write_bytes(path.read_bytes()[:-100])
    ds = LeRobotDataset(root)
    ds[0]
    with pytest.raises(UserError, match=f"{path.name}.*truncated or damaged"): ds[row]
    with pytest.raises(UserError, match="truncated or damaged"): ds.columns["index"]


def test_a_large_table_of_episodes_opens_quickly(tmp_path):
    "20 000 episodes: metadata stay a table (as dicts they took seconds), and lookups by number work."
    import importlib.util
    from pathlib import Path
    spec = importlib.util.spec_from_file_location("data_scale", Path(__file__).parents[1] / "benchmarks/data_scale.py")
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    bench.make(tmp_path / "many", 20_000, 5)
    meta = DatasetMetadata(tmp_path / "many")
    assert meta.episodes[19_999]["dataset_to_index"] == 100_000 and meta.episodes[-1]["tasks"] == ["task 49"]
    ds = LeRobotDataset(tmp_path / "many", delta_timestamps={"action": [i / 30 for i in range(8)]})
    assert [s["episode_index"].item() for s in ds.__getitems__([99_999, 0, 50_000])] == [19_999, 0, 10_000]
    assert ds[4]["action_is_pad"].tolist() == [False] + [True] * 7
    assert len(LeRobotDataset(tmp_path / "many", episodes=[19_999, 5])) == 10


# --- frame cache ------------------------------------------------------------------------------------------------------

BUILD = """
import sys
from vla_nb.datasets import cache
cache.PART = 3
cache.FrameCache.build(sys.argv[1], sys.argv[2], (16, 16), workers=2)
"""


def test_a_killed_build_goes_on(tiny, tmp_path, monkeypatch):
    want = FrameCache.build(tiny, tmp_path / "whole", (16, 16)).frames(CAMERA, range(48))
    noted = tmp_path / ".cache.building/parts.jsonl"
    p = subprocess.Popen([sys.executable, "-c", BUILD, str(tiny), str(tmp_path / "cache")], env=os.environ | {"PYTHONPATH": os.getcwd()})
    while not (noted.is_file() and len(noted.read_bytes().splitlines()) > 2): time.sleep(0.005); assert p.poll() is None
    p.send_signal(signal.SIGKILL)
    p.wait()
    assert not (tmp_path / "cache").exists()
    time.sleep(0.3)   # the workers notice that their parent is gone
    before, made, fill = read_jsonl(noted), [], cache_module.fill_part
    assert 3 <= len(before) < 16
    with open(noted, "ab") as f: f.write(b'{"camera": "obs')     # a line that the killed process was writing
    monkeypatch.setattr(cache_module, "PART", 3)
    monkeypatch.setattr(cache_module, "fill_part", lambda task: made.append(task[3]) or fill(task))
    cache = FrameCache.build(tiny, tmp_path / "cache", (16, 16), workers=0)
    assert len(made) == 16 - len(before) and not [p for p in made if p["first"] in {b["first"] for b in before}]
    assert np.array_equal(cache.frames(CAMERA, range(48)), want)
    cache.verify()
    assert sorted(p.name for p in tmp_path.glob("*cache*")) == [".cache.lock", "cache"]
    assert sorted(p.name for p in (tmp_path / "cache").iterdir()) == ["frames.json", f"{CAMERA}.npy"]


def test_a_noted_part_that_is_not_on_the_disk_is_decoded_again(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(cache_module, "PART", 10)
    fill = cache_module.fill_part
    def stop(task):
        if task[3]["first"] == 30: raise KeyboardInterrupt
        return fill(task)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(cache_module, "fill_part", stop)
        FrameCache.build(tiny, tmp_path / "cache", (16, 16))
    pixels = np.load(tmp_path / f".cache.building/{CAMERA}.npy", mmap_mode="r+")
    pixels[12] = 0
    pixels.flush()
    FrameCache.build(tiny, tmp_path / "cache", (16, 16)).verify()
    whole = FrameCache.build(tiny, tmp_path / "whole", (16, 16)).frames(CAMERA, range(48))
    assert np.array_equal(FrameCache.open(tmp_path / "cache").frames(CAMERA, range(48)), whole)


def test_another_size_or_source_is_built_anew(tmp_path):
    root = fake_dataset(tmp_path / "a", episodes=2, frames=6)
    small = FrameCache.build(root, tmp_path / "cache", (8, 8))
    assert FrameCache.build(root, tmp_path / "cache", (16, 16)).size == (16, 16)
    w = DatasetWriter.resume(root)
    item = LeRobotDataset(root, return_uint8=True)[0]
    w.add_frame({k: item[k].numpy() for k in ("observation.state", "action")} | {CAMERA: np.full((32, 32, 3), 99, np.uint8), "task": "t"})
    w.save_episode()
    w.finalize()
    with pytest.raises(UserError, match="another state of the dataset"):
        LeRobotDataset(root, frame_cache=FrameCache.open(tmp_path / "cache"))
    again = FrameCache.build(root, tmp_path / "cache", (16, 16))
    assert len(again) == 13 and len(small) == 12 and abs(int(again.frames(CAMERA, [12])[0, 0, 0, 0]) - 99) < 3
    old = read_json(tmp_path / "cache/frames.json") | {"version": 1}
    (tmp_path / "cache/frames.json").write_text(json.dumps(old))
    with pytest.raises(UserError, match="made by another version"): FrameCache.open(tmp_path / "cache")


# --- statistics -------------------------------------------------------------------------------------------------------

def test_aggregation_equals_recomputation():
    x = np.random.default_rng(0).normal(3, 2, (5000, 3)).astype(np.float32)
    x[:, 1] += 1e4
    whole, parts_ = compute_stats(x), aggregate_feature([compute_stats(p) for p in np.split(x, [7, 100, 3000])])
    for k in ("mean", "std", "min", "max", "count"): np.testing.assert_allclose(parts_[k], whole[k], rtol=1e-9, err_msg=k)
    for q in ("q01", "q99"): np.testing.assert_allclose(whole[q], np.quantile(x.astype(np.float64), float(q[1:]) / 100, axis=0), rtol=1e-12)
