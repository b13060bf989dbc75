"""RLDS without TensorFlow: the reader against what tfds reads, damage, fuzzing, several processes."""
import hashlib
import json
import multiprocessing
import os
import pickle
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from vla_nb.core.types import UserError
from vla_nb.datasets.rlds import RLDSDataset, interleaved
from vla_nb.datasets.rlds_index import Record, build_index, index_folder, index_record
from vla_nb.datasets.rlds_schema import leaves, read_folder
from vla_nb.datasets.tfrecord import frame_record, read_example, read_records, read_values

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests/goldens/rlds"


@pytest.fixture()
def tiny(tmp_path):
    "A copy of the folder that tfds wrote."
    return Path(shutil.copytree(GOLDEN / "tiny/1.0.0", tmp_path / "tiny/1.0.0"))


def digest(x):
    "As in goldens/rlds/make.py; a text stands for its bytes."
    if isinstance(x, str): x = x.encode()
    if isinstance(x, bytes): return hashlib.sha256(b"bytes" + x).hexdigest()[:12]
    if isinstance(x, list): return [digest(v) for v in x]
    a = np.asarray(x)
    return hashlib.sha256(f"{a.dtype} {a.shape}".encode() + np.ascontiguousarray(a).tobytes()).hexdigest()[:12]


def digests(x): return {k: digests(v) for k, v in x.items()} if isinstance(x, dict) else digest(x)


# ---------------------------------------------------------------- against tfds

def test_every_step_equals_tfds(tiny):
    "Episodes, in the order of tfds, and every value of every step: same type, shape and bits."
    ds, golden = RLDSDataset(tiny), json.loads((GOLDEN / "steps.json").read_text())
    order = ds.tfds_order()
    assert len(ds) == len(golden) == len(order) == 7 and len(ds.split.files) == 3
    for number, want in zip(order, golden):
        episode = ds[int(number)]
        steps = [digests(s) for s in episode.pop("steps")]
        assert {"steps": steps, **digests(episode)} == want


def test_order_of_many_shards_equals_tfds():
    "20 uneven shards: a cycle of 16, blocks of 16, a shard that ends makes room for the next."
    golden = json.loads((GOLDEN / "order.json").read_text())
    assert golden["order"] != sorted(golden["order"])
    assert interleaved(golden["lengths"]).tolist() == golden["order"]


def test_random_access_equals_reading_in_order(tiny):
    "A step is the same alone, in a batch, and within its episode."
    ds = RLDSDataset(tiny)
    whole = [pickle.dumps(s) for e in range(len(ds)) for s in ds[e]["steps"]]
    rows = np.random.default_rng(0).permutation(len(ds.steps)).tolist()
    assert [pickle.dumps(s) for s in ds.steps.__getitems__(rows)] == [whole[i] for i in rows]
    assert all(pickle.dumps(ds.steps[i]) == whole[i] for i in rows)
    assert np.array_equal(ds.steps.read("action"), [pickle.loads(s)["action"] for s in whole])


def test_reader_imports_numpy_only(tiny):
    "Neither torch nor TensorFlow nor its schemas, also after reading."
    code = ("import sys; from vla_nb.datasets.rlds import RLDSDataset; ds = RLDSDataset(sys.argv[1]); ds.steps[0]; ds.statistics()\n"
            "print([m for m in ('torch', 'tensorflow', 'tensorflow_datasets', 'google.protobuf', 'pyarrow', 'scipy') if m in sys.modules])")
    run = subprocess.run([sys.executable, "-c", code, str(tiny)], capture_output=True, text=True, cwd=ROOT)
    assert run.stdout.strip() == "[]", run.stdout + run.stderr


# ---------------------------------------------------------------- the index

def test_index_is_made_once_and_again_when_the_data_change(tiny):
    "A touched shard makes the index stale; two processes at once make one."
    place = build_index(tiny)
    assert place == tiny / ".rlds_index/train" and not list(place.parent.glob("*.tmp"))
    made = (place / "steps.npy").stat().st_mtime_ns
    assert build_index(tiny) == place and (place / "steps.npy").stat().st_mtime_ns == made
    shard = sorted(tiny.glob("*.tfrecord*"))[0]
    os.utime(shard, ns=(1, 1))
    build_index(tiny)
    assert (place / "steps.npy").stat().st_mtime_ns != made


def test_index_goes_to_the_cache_when_the_folder_is_read_only(tiny, tmp_path, monkeypatch):
    "Nothing is written beside data that cannot be written to."
    monkeypatch.setenv("VLA_NB_CACHE_ROOT", str(tmp_path / "cache"))
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    assert index_folder(tiny, "train", "").is_relative_to(tmp_path / "cache")
    assert len(RLDSDataset(tiny).steps) and not (tiny / ".rlds_index").exists()


def test_index_with_workers_is_the_same(tiny, tmp_path):
    "Shards indexed in two processes give the same files."
    other = shutil.copytree(tiny, tmp_path / "other")
    a, b = build_index(tiny), build_index(other, workers=2)
    for name in ("steps.npy", "episodes.npy"): assert (a / name).read_bytes() == (b / name).read_bytes()


def read_there(ds, rows): return [pickle.dumps(ds.steps[i]) for i in rows]


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_used_in_the_parent_then_in_workers(tiny, method):
    "Open files survive a fork, a spawned process opens its own; both read the same."
    ds = RLDSDataset(tiny)
    here = read_there(ds, range(len(ds.steps)))
    with multiprocessing.get_context(method).Pool(2) as pool:
        parts = pool.starmap(read_there, [(ds, range(0, 10)), (ds, range(10, len(ds.steps)))])
    assert parts[0] + parts[1] == here


def test_ranks_and_workers_of_a_data_loader_share_the_steps(tiny):
    "Two ranks with two workers each see every step exactly once an epoch."
    import torch
    from vla_nb.datasets.loader import EpochSampler
    steps, seen = RLDSDataset(tiny).steps, []
    for rank in range(2):
        sampler = EpochSampler(len(steps), seed=3, rank=rank, world_size=2)
        mine = [sampler.at(t) for t in range(rank, len(steps), 2)]
        loader = torch.utils.data.DataLoader(steps, batch_size=3, sampler=mine, num_workers=2, collate_fn=list)
        seen += [int(s["more"]["count"]) for batch in loader for s in batch]
    assert sorted(seen) == sorted(steps.read("more/count").tolist())


# ---------------------------------------------------------------- damage

def test_damage_is_named(tiny):
    "A flipped byte, a short file, a missing shard, a wrong count: file, record and remedy."
    shard = sorted(tiny.glob("*.tfrecord*"))[1]
    good = shard.read_bytes()
    def says(text):
        with pytest.raises(UserError, match=text): RLDSDataset(tiny)
    shard.write_bytes(good[:1000] + bytes([good[1000] ^ 4]) + good[1001:])
    says(f"{shard.name}, record 0 at byte 0: the checksum of the content is wrong")
    shard.write_bytes(good[:-5])
    says(f"{shard.name}, record [0-9]+ at byte [0-9]+: the file ends in the middle")
    shard.write_bytes(b"")
    says(f"{shard.name} holds 0 episodes, dataset_info.json says")
    shard.unlink()
    says(f"1 of 3 shards are missing .{shard.name}")
    with pytest.raises(UserError, match="is not an RLDS folder.*1.0.0"): RLDSDataset(tiny.parent)


def test_a_file_that_shrinks_later_is_noticed(tiny):
    "Reading beyond the end of a file that was indexed whole."
    ds = RLDSDataset(tiny)
    for shard in ds.split.files: os.truncate(shard, 100)
    with pytest.raises(UserError, match="ends before byte"): ds.steps[5]


def test_features_that_do_not_fit_the_records(tiny):
    "A wrong shape, another kind of list and a missing feature are named."
    path = tiny / "features.json"
    good = path.read_text()
    for old, new, text in (('"8"', '"5"', "observation/state.* no multiple of shape"), ('"action"', '"motion"', "'steps/motion' is missing"),
                           ('"float32"', '"int64"', "another kind of list")):
        assert old in good
        path.write_text(good.replace(old, new))
        with pytest.raises(UserError, match=text): RLDSDataset(tiny)


# ---------------------------------------------------------------- fuzzing

def mutate(data, rng):
    "Some damage: flipped, replaced, removed, repeated or cut bytes."
    out = bytearray(data)
    for _ in range(int(rng.integers(1, 5))):
        if not out: break
        at, kind = int(rng.integers(len(out))), rng.integers(5)
        if kind == 0: out[at] ^= 1 << int(rng.integers(8))
        elif kind == 1: out[at] = int(rng.choice([0, 1, 127, 128, 255]))
        elif kind == 2: del out[at:at + int(rng.integers(1, 9))]
        elif kind == 3: out[at:at] = out[at:at + int(rng.integers(1, 9))]
        else: del out[at:]
    return bytes(out)


def small_example():
    "A record of few bytes with all three lists, varied integers and a sequence."
    from vla_nb.datasets.tfrecord import write_example
    return write_example({
        "steps/a": np.arange(6, dtype=np.float32), "steps/n": np.array([5, -1, 2**40]), "steps/t": [b"x", b"", b"yz"],
        "steps/s/ragged_row_lengths_0": np.array([2, 0, 1]), "steps/s/ragged_flat_values": [b"p", b"q", b"r"],
        "steps/big": np.arange(900), "m": [b"name"]})


def node(kind, dtype="float32", *dims): return {kind: {"shape": {"dimensions": [str(d) for d in dims]}, "dtype": dtype}}


TREE = {"featuresDict": {"features": {"m": {"text": {}}, "steps": {"sequence": {"feature": {"featuresDict": {"features": {
    "a": node("tensor", "float32", 2), "n": node("tensor", "int64"), "t": {"text": {}}, "s": {"sequence": {"feature": {"text": {}}}},
    "big": node("tensor", "int64", 300)}}}}}}}}


def test_fuzzed_examples():
    "Thousands of damaged messages: read, or refused with a sentence; never another error, a hang or much memory."
    rng, good, found, done = np.random.default_rng(0), small_example(), tuple(leaves(TREE)), 0
    assert len(index_record(Record(good, 0), found)[0]) == 3
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    for _ in range(6000):
        data = mutate(good, rng)
        try:
            index_record(Record(data, 0), found)
            for place in read_example(data).values(): read_values(data, *place)
            done += 1
        except UserError: pass
    assert 0 < done < 6000, "the damage is never or always noticed"
    assert time.perf_counter() - start < 60
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000   # kB


def test_fuzzed_files(tmp_path):
    "Damaged TFRecord files: every byte is under a checksum, so all damage is noticed, or only whole records are gone."
    rng, one = np.random.default_rng(1), frame_record(small_example())
    good, path = one + frame_record(b"abc" * 30) + frame_record(b""), tmp_path / "x.tfrecord"
    whole = {small_example(), b"abc" * 30, b""}
    for _ in range(3000):
        path.write_bytes(mutate(good, rng))
        try: records = [d for _, d in read_records(path)]
        except UserError: continue
        assert set(records) <= whole


def test_fuzzed_descriptions(tiny):
    "Damaged JSON beside good shards."
    rng = np.random.default_rng(2)
    for name in ("features.json", "dataset_info.json"):
        good = (tiny / name).read_bytes()
        for _ in range(1500):
            (tiny / name).write_bytes(mutate(good, rng))
            try: read_folder(tiny).split("train")
            except UserError: pass
        (tiny / name).write_text("[" * 100_000)
        with pytest.raises(UserError): read_folder(tiny)
        (tiny / name).write_bytes(good)


# ---------------------------------------------------------------- writing

def test_copy_is_the_same_in_every_value(tiny, tmp_path):
    "Everything that tfds stored, read by us, written by us, read by us again."
    from vla_nb.datasets.rlds_write import RLDSWriter
    ds = RLDSDataset(tiny)
    features = json.loads((tiny / "features.json").read_text())
    with RLDSWriter(tmp_path / "copy/1.0.0", features, "tiny", shards=2) as writer:
        for e in range(len(ds)): writer.add_episode(ds.episode(e, raw=True))
    copy = RLDSDataset(tmp_path / "copy/1.0.0")
    assert copy.split.lengths == (4, 3) and len(copy.steps) == len(ds.steps)
    for e in range(len(ds)):
        a, b = ds[e], copy[e]
        assert [digests(s) for s in a.pop("steps")] == [digests(s) for s in b.pop("steps")] and digests(a) == digests(b)


def test_records_equal_those_of_tfds(tiny, tmp_path):
    "The same lists under the same names as in the records that tfds wrote."
    from vla_nb.datasets.rlds_write import encode_episode
    ds = RLDSDataset(tiny)
    stored = [data for path in ds.split.files for _, data in read_records(path)]
    for e, data in enumerate(stored):
        mine, _ = encode_episode(ds.episode(e, raw=True), list(ds.folder.leaves))
        a, b = ({k: read_values(d, *p) for k, p in read_example(d).items()} for d in (data, mine))
        assert a.keys() == b.keys()
        for k in a: assert a[k][0] == b[k][0] or not len(a[k][1]), k
        for k in a: assert np.array_equal(a[k][1], b[k][1]), k


def test_tfds_reads_what_we_write(tiny, tmp_path):
    "With the extra `tfds`: tfds's own reading of a copy equals its reading of the original."
    pytest.importorskip("tensorflow", reason="needs the extra tfds")
    from vla_nb.datasets.rlds_write import RLDSWriter
    ds = RLDSDataset(tiny)
    with RLDSWriter(tmp_path / "tiny/1.0.0", json.loads((tiny / "features.json").read_text()), "tiny", shards=3) as writer:
        for e in range(len(ds)): writer.add_episode(ds.episode(e, raw=True))
    run = subprocess.run([sys.executable, GOLDEN / "make.py", tmp_path / "tiny/1.0.0"], capture_output=True, text=True)
    read, golden = json.loads(run.stdout.splitlines()[-1]), json.loads((GOLDEN / "steps.json").read_text())
    assert sorted(map(json.dumps, read)) == sorted(map(json.dumps, golden))


WRITE = """
import sys, numpy as np
from vla_nb.datasets.rlds_write import RLDSWriter, rlds_features, tensor_feature
with RLDSWriter(sys.argv[1], rlds_features({"x": tensor_feature("float32", (1000,))}), "x", shards=2) as w:
    while True:
        w.add_episode({"steps": [{"x": np.zeros(1000, np.float32)}] * 20})
        print(len(w.sizes), flush=True)
"""


def test_killed_writer_leaves_no_folder(tmp_path):
    "kill -9 in the middle: there is no data set that looks whole."
    process = subprocess.Popen([sys.executable, "-c", WRITE, tmp_path / "x/1.0.0"], stdout=subprocess.PIPE, cwd=ROOT)
    for _ in range(20): process.stdout.readline()
    process.kill()
    process.wait()
    assert not (tmp_path / "x/1.0.0").exists()


# ---------------------------------------------------------------- commands

def test_commands(tiny, tmp_path, capsys):
    "index, stats and verify, from the command line."
    from vla_nb.apps.cli import main
    from vla_nb.datasets.statistics_file import read_statistics
    assert main(["rlds", "index", str(tiny)]) == 0 and "7 episodes, 20 steps" in capsys.readouterr().out
    file = tmp_path / "dataset_statistics.json"
    assert main(["rlds", "stats", str(tiny), f"--output={file}"]) == 0
    stats = read_statistics(file, 7, 8)
    assert (stats.transitions, stats.trajectories) == (20, 7)
    assert np.array_equal(stats.action["q99"], np.percentile(RLDSDataset(tiny).steps.read("action").astype(float), 99, axis=0))
    assert main(["rlds", "verify", str(tiny), "--deep"]) == 0 and "all checks passed" in capsys.readouterr().out
    os.truncate(sorted(tiny.glob("*.tfrecord*"))[2], 400)
    assert main(["rlds", "verify", str(tiny)]) == 1 and "the file ends in the middle" in capsys.readouterr().out


def test_statistics_of_another_robot_are_refused(tiny, tmp_path):
    "The message names the file, both dimensions, whose they are, and the command."
    from vla_nb.datasets.statistics_file import dataset_statistics, read_statistics, write_statistics
    rng = np.random.default_rng(0)
    for n, owner in ((15, "CALVIN"), (14, "R1 Lite"), (9, "another robot")):
        write_statistics(tmp_path / "s.json", dataset_statistics(rng.normal(size=(50, n)), rng.normal(size=(50, 8)), 2))
        with pytest.raises(UserError) as error: read_statistics(tmp_path / "s.json", 7, 8, source="data/libero/1.0.0")
        text = str(error.value)
        for part in (str(tmp_path / "s.json"), f"action has {n} dimensions, 7 are expected", owner, "vla-nb rlds stats data/libero/1.0.0"):
            assert part in text


def test_manifests_of_the_user_are_checked(tmp_path, monkeypatch):
    "Files shaped like LIBERO with other counts: every difference to the manifest is named."
    from vla_nb.datasets.rlds_command import verify_rlds
    from vla_nb.datasets.rlds_write import RLDSWriter, image_feature, rlds_features, tensor_feature, text_feature
    features = rlds_features({"observation": {**{k: image_feature((256, 256, 3)) for k in ("image", "wrist_image")},
                                              "state": tensor_feature("float32", (8,))},
                              "action": tensor_feature("float32", (7,)), "language_instruction": text_feature()})
    picture = np.zeros((256, 256, 3), np.uint8)
    step = {"observation": {"image": picture, "wrist_image": picture, "state": np.zeros(8, np.float32)}, "action": np.zeros(7, np.float32),
            "language_instruction": "x"}
    root = tmp_path / "libero_object_no_noops/libero_object_no_noops/1.0.0"
    with RLDSWriter(root, features, "libero_object_no_noops", shards=32) as writer:
        for _ in range(40): writer.add_episode({"steps": [step] * 2})
    monkeypatch.setenv("VLA_NB_DATA_ROOT", str(tmp_path))
    found, problems = verify_rlds(root)    # the manifest is found by the folder
    assert found["files"] == 34 and found["action_dim"] == 7 and found["state_dim"] == 8 and found["image_size"] == [256, 256]
    assert problems == ["num_trajectories is 40: expected 454. (manifest libero_object_rlds)",
                        "num_transitions is 80: expected 66984. (manifest libero_object_rlds)"]


# ---------------------------------------------------------------- to LeRobot v3.0

def test_convert_by_command(tmp_path, capsys):
    "Every row and picture arrives; without a frame rate the command refuses; the same call goes on after an interruption."
    from vla_nb.apps.cli import main
    from vla_nb.datasets.lerobot import LeRobotDataset
    from vla_nb.datasets.hdf5 import convert_source
    from vla_nb.datasets.rlds_convert import RLDSOptions, RLDSSource
    from vla_nb.datasets.rlds_write import RLDSWriter, image_feature, rlds_features, tensor_feature, text_feature
    from vla_nb.datasets.writer import DatasetWriter
    features = rlds_features({"observation": {"image": image_feature((48, 64, 3)), "wrist_image": image_feature((32, 32, 3), "png"),
                                              "state": tensor_feature("float32", (8,))},
                              "action": tensor_feature("float32", (7,)), "language_instruction": text_feature(), "is_last": tensor_feature("bool")})
    rng = np.random.default_rng(0)
    def step(e, i):
        pictures = {k: rng.integers(0, 256, s, dtype=np.uint8) for k, s in (("image", (48, 64, 3)), ("wrist_image", (32, 32, 3)))}
        return {"observation": pictures | {"state": rng.normal(size=8).astype(np.float32)}, "action": rng.normal(size=7).astype(np.float32),
                "language_instruction": f"task {e % 2}", "is_last": i == 4}
    root = tmp_path / "rlds/1.0.0"
    with RLDSWriter(root, features, "x", shards=2) as writer:
        for e in range(4): writer.add_episode({"steps": [step(e, i) for i in range(5)]})
    words = ["data", "convert", str(root), f"--output={tmp_path / 'v3'}", "--pictures=image", "--columns=is_last"]
    assert main(words) == 2 and "--fps=20" in capsys.readouterr().err
    saved, calls = DatasetWriter.save_episode, []
    def stop(self):
        if len(calls) == 2: raise KeyboardInterrupt
        calls.append(saved(self))
    DatasetWriter.save_episode = stop
    try:
        with pytest.raises(KeyboardInterrupt):
            convert_source(RLDSSource(root, RLDSOptions(str(tmp_path / "v3"), 20, pictures="image", columns=("is_last",))))
    finally: DatasetWriter.save_episode = saved
    assert not (tmp_path / "v3").exists()
    assert main([*words, "--fps=20"]) == 0 and "2 of 4" in capsys.readouterr().out
    made, source = LeRobotDataset(tmp_path / "v3"), RLDSDataset(root).steps
    assert len(made) == len(source) == 20 and made.meta.tasks == ["task 0", "task 1"]
    for i in range(20):
        a, b = made[i], source[i]
        assert np.array_equal(a["observation.state"], b["observation"]["state"]) and np.array_equal(a["action"], b["action"])
        assert bool(a["is_last"]) == b["is_last"] and a["task"] == b["language_instruction"]
        for k in ("image", "wrist_image"):
            assert np.array_equal((a[f"observation.images.{k}"].permute(1, 2, 0) * 255).round().byte(), b["observation"][k])
