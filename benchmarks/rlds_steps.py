"""Steps of an RLDS data set: ours at random, and the two ways of tfds to read them in order; same files, one pinned core each.

    python benchmarks/rlds_steps.py --tfds=PYTHON [--episodes=48] [--steps=100] [--size=224] [--repeat=3]

PYTHON is an interpreter with tensorflow-cpu 2.21 and tensorflow-datasets 4.9 (an environment of its own). Every reading runs in a
fresh process on one core, in turns; rates exclude imports and the first step. Reports also the time from the start of the process to
the first batch of 32 steps, and the largest resident memory. Writes reports/benchmarks/rlds_steps.json.
"""
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import simplejpeg

from vla_nb.core.config import parse_flags
from vla_nb.core.files import write_json
from vla_nb.core.settings import settings
from vla_nb.core.types import UserError
from vla_nb.datasets.rlds import RLDSDataset
from vla_nb.datasets.rlds_index import build_index
from vla_nb.datasets.rlds_write import RLDSWriter, image_feature, rlds_features, tensor_feature, text_feature

HEAD = """
import os, sys, time
os.sched_setaffinity(0, {int(sys.argv[2])})
def report(first, start, steps):
    import json, resource
    print(json.dumps([first, steps / (time.perf_counter() - start), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024]))
"""
OURS = HEAD + """
from vla_nb.datasets.rlds import RLDSDataset
import numpy as np
steps = RLDSDataset(sys.argv[1]).steps
rows = np.random.default_rng(0).permutation(len(steps)).tolist()
steps.__getitems__(rows[:32])
first, start = time.time(), time.perf_counter()
for a in range(0, len(rows), 32): steps.__getitems__(rows[a:a + 32])
report(first, start, len(rows))
"""
PEER = HEAD + """
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
import tensorflow_datasets as tfds
data = tfds.builder_from_directory(sys.argv[1]).as_dataset(split="train")
if sys.argv[3] == "flat": steps = data.flat_map(lambda e: e["steps"]).as_numpy_iterator()
else: steps = (s for e in data for s in tfds.as_numpy(e["steps"]))
for _ in range(32): next(steps)
first, start = time.time(), time.perf_counter()
report(first, start, sum(1 for _ in steps))
"""
GOALS = {"over_flat_map": 2.0, "over_nested": 4.0, "first_batch_s": 0.5, "rss_mb": 250}


def make(root: Path, episodes: int, n: int, size: int):
    "A data set shaped like LIBERO: two cameras, a state, an action, an instruction, flags."
    cameras = {k: image_feature((size, size, 3)) for k in ("image", "wrist_image")}
    flags = {k: tensor_feature("bool") for k in ("is_first", "is_last", "is_terminal")}
    numbers = {k: tensor_feature("float32") for k in ("reward", "discount")}
    vectors = {"state": tensor_feature("float32", (8,)), "joint_state": tensor_feature("float32", (7,))}
    step = {"observation": cameras | vectors, "action": tensor_feature("float32", (7,)), "language_instruction": text_feature()}
    features = rlds_features(step | flags | numbers, episode_metadata={"file_path": text_feature()})
    rng, (y, x) = np.random.default_rng(0), np.mgrid[0:size, 0:size] / size

    def picture():
        waves = [np.sin(rng.uniform(3, 40) * x + rng.uniform(3, 40) * y + k) for k in range(9)]
        base = np.stack([waves[k] + waves[k + 3] + waves[k + 6] for k in range(3)], -1)
        pixels = np.clip(128 + 35 * base + rng.normal(0, 4, base.shape), 0, 255).astype(np.uint8)
        return simplejpeg.encode_jpeg(pixels, quality=95, colorsubsampling="420")

    pictures = [picture() for _ in range(100)]
    def one(): return pictures[rng.integers(len(pictures))]
    with RLDSWriter(root, features, "speed", shards=min(8, episodes)) as writer:
        for e in range(episodes):
            steps = [{"observation": {"image": one(), "wrist_image": one(), "state": rng.normal(size=8).astype(np.float32),
                                      "joint_state": rng.normal(size=7).astype(np.float32)},
                      "action": rng.normal(size=7).astype(np.float32), "language_instruction": "pick up the cup and place it",
                      "is_first": i == 0, "is_last": i == n - 1, "is_terminal": i == n - 1, "reward": np.float32(i == n - 1),
                      "discount": np.float32(1)} for i in range(n)]
            writer.add_episode({"steps": steps, "episode_metadata": {"file_path": f"{e}.hdf5"}})


def measure(python, code, *words) -> dict:
    "One reading in a process of its own."
    start = time.time()
    done = subprocess.run([python, "-c", code, *map(str, words)], capture_output=True, text=True)
    if done.returncode: raise UserError(f"{python} failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    first, rate, rss = json.loads(done.stdout.strip().splitlines()[-1])
    return {"steps_per_s": round(rate, 1), "first_batch_s": round(first - start, 3), "rss_mb": round(rss, 1)}


def jpeg_limit(root: Path) -> float:
    "Steps per second if decoding the pictures were all there is to do."
    steps = RLDSDataset(root).episode(0, raw=True)["steps"]
    pictures = [s["observation"][k] for s in steps for k in ("image", "wrist_image")]
    start = time.perf_counter()
    for p in pictures: simplejpeg.decode_jpeg(p, fastdct=True, fastupsample=False)
    return len(steps) / (time.perf_counter() - start)


def main(argv) -> int:
    "Make, read in turns, compare, write."
    flags = {"episodes": 48, "steps": 100, "size": 224, "repeat": 3, "core": 0} | parse_flags(argv)
    if "tfds" not in flags: raise UserError("give an interpreter that has TensorFlow and tfds: --tfds=PYTHON")
    episodes, n, size, repeat, core = (int(flags[k]) for k in ("episodes", "steps", "size", "repeat", "core"))
    with tempfile.TemporaryDirectory() as box:
        root = Path(box) / "speed/1.0.0"
        make(root, episodes, n, size)
        start = time.perf_counter()
        build_index(root)
        index_s, mb = time.perf_counter() - start, sum(p.stat().st_size for p in root.glob("*.tfrecord*")) / 2**20
        runs = {"ours": [], "flat_map": [], "nested": []}
        for _ in range(repeat):
            runs["ours"].append(measure(sys.executable, OURS, root, core))
            runs["flat_map"].append(measure(flags["tfds"], PEER, root, core, "flat"))
            runs["nested"].append(measure(flags["tfds"], PEER, root, core, "nested"))
        limit = jpeg_limit(root)
    middle = {k: {m: statistics.median(r[m] for r in v) for m in v[0]} for k, v in runs.items()}
    ours = middle["ours"]
    result = dict(episodes=episodes, steps_each=n, size=size, cameras=2, data_mb=round(mb, 1), machine=platform.machine(),
                  median=middle, runs=runs, index_s=round(index_s, 2), jpeg_decoding_alone_steps_per_s=round(limit, 1),
                  part_of_limit=round(ours["steps_per_s"] / limit, 2),
                  over_flat_map=round(ours["steps_per_s"] / middle["flat_map"]["steps_per_s"], 2),
                  over_nested=round(ours["steps_per_s"] / middle["nested"]["steps_per_s"], 2), goals=GOALS)
    write_json(Path(settings().reports) / "benchmarks" / "rlds_steps.json", result)
    print(json.dumps({k: v for k, v in result.items() if k != "runs"}, indent=1))
    met = (result["over_flat_map"] >= 2, result["over_nested"] >= 4, ours["first_batch_s"] < 0.5, ours["rss_mb"] < 250)
    return 0 if all(met) else 1


if __name__ == "__main__": sys.exit(main(sys.argv[1:]))
