"""Steps of an RLDS data set: ours at random, and the two ways of tfds to read them in order; same files, one pinned core each.

    python benchmarks/rlds_steps.py --tfds=PYTHON [--episodes=32] [--steps=100] [--size=224] [--repeat=3]

PYTHON is an interpreter with tensorflow-cpu 2.21 and tensorflow-datasets 4.9 (an environment of its own). Every reading runs in a
fresh process on one core, in turns; rates exclude imports and the first steps. Ratios are of the best rate of each, the least
disturbed one; the same of processor time, without the waiting of nested iterators for their threads, stands beside them. Reports also
the time from the start of the process to the first batch of 32 steps, the largest resident memory, and how many steps a second
decoding the pictures alone would allow: both sides decode with libjpeg-turbo, so no reader can be faster. Two cases: two cameras with
pictures of the size in bytes of LIBERO's, and one camera with a smooth rendering, where reading weighs more. Writes
reports/benchmarks/rlds_steps.json.
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
def report(first, start, cpu, steps):
    import json, resource
    wall, cpu = time.perf_counter() - start, time.process_time() - cpu
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps(dict(first=first, steps_per_s=steps / wall, steps_per_cpu_s=steps / cpu, rss_mb=rss)))
"""
OURS = HEAD + """
from vla_nb.datasets.rlds import RLDSDataset
import numpy as np
steps = RLDSDataset(sys.argv[1]).steps
rows = np.random.default_rng(0).permutation(len(steps)).tolist()
steps.__getitems__(rows[:32])
first, start, cpu = time.time(), time.perf_counter(), time.process_time()
for a in range(0, len(rows), 32): steps.__getitems__(rows[a:a + 32])
report(first, start, cpu, len(rows))
"""
PEER = HEAD + """
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
import tensorflow_datasets as tfds
data = tfds.builder_from_directory(sys.argv[1]).as_dataset(split="train")
if sys.argv[3] == "flat": steps = data.flat_map(lambda e: e["steps"]).as_numpy_iterator()
else: steps = (s for e in data for s in tfds.as_numpy(e["steps"]))
for _ in range(32): next(steps)
first, start, cpu = time.time(), time.perf_counter(), time.process_time()
n = sum(1 for _ in steps)
report(first, start, cpu, n)
"""
GOALS = {"over_flat_map": 2.0, "over_nested": 4.0, "of_limit": 0.85, "first_batch_s": 0.5, "rss_mb": 250}


CASES = {"one smooth camera": (("image",), 0.0), "two cameras": (("image", "wrist_image"), 1.0)}   # cameras, texture and noise


def make(root: Path, episodes: int, n: int, size: int, cameras: tuple, texture: float):
    "A data set shaped like LIBERO: pictures, two states, an action, an instruction, flags."
    images = {k: image_feature((size, size, 3)) for k in cameras}
    flags = {k: tensor_feature("bool") for k in ("is_first", "is_last", "is_terminal")}
    numbers = {k: tensor_feature("float32") for k in ("reward", "discount")}
    vectors = {"state": tensor_feature("float32", (8,)), "joint_state": tensor_feature("float32", (7,))}
    step = {"observation": images | vectors, "action": tensor_feature("float32", (7,)), "language_instruction": text_feature()}
    features = rlds_features(step | flags | numbers, episode_metadata={"file_path": text_feature()})
    rng, (y, x) = np.random.default_rng(0), np.mgrid[0:size, 0:size] / size

    def picture():
        high = 8 + 32 * texture
        waves = [np.sin(rng.uniform(3, high) * x + rng.uniform(3, high) * y + k) for k in range(9)]
        base = np.stack([waves[k] + waves[k + 3] + waves[k + 6] for k in range(3)], -1)
        pixels = np.clip(128 + 35 * base + texture * rng.normal(0, 1, base.shape), 0, 255).astype(np.uint8)
        return simplejpeg.encode_jpeg(pixels, quality=95, colorsubsampling="420")

    pictures = [picture() for _ in range(100)]
    def one(): return pictures[rng.integers(len(pictures))]
    with RLDSWriter(root, features, "speed", shards=min(8, episodes)) as writer:
        for e in range(episodes):
            steps = [{"observation": {**{k: one() for k in cameras}, "state": rng.normal(size=8).astype(np.float32),
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
    found = json.loads(done.stdout.strip().splitlines()[-1])
    found["first_batch_s"] = found.pop("first") - start
    return {k: round(v, 3 if k == "first_batch_s" else 1) for k, v in found.items()}


LIMIT = HEAD + """
from vla_nb.datasets.rlds import RLDSDataset
import simplejpeg
steps = list(RLDSDataset(sys.argv[1]).episode(0, raw=True)["steps"])
pictures = [v for s in steps for k, v in s["observation"].items() if "image" in k] * 10
for p in pictures[:100]: simplejpeg.decode_jpeg(p, fastdct=True, fastupsample=False)
first, start, cpu = time.time(), time.perf_counter(), time.process_time()
for p in pictures: simplejpeg.decode_jpeg(p, fastdct=True, fastupsample=False)
report(first, start, cpu, len(steps) * 10)
"""


def run(case: str, tfds: str, episodes: int, n: int, size: int, repeat: int, core: int) -> dict:
    "Everything about one case."
    cameras, texture = CASES[case]
    with tempfile.TemporaryDirectory() as box:
        root = Path(box) / "speed/1.0.0"
        make(root, episodes, n, size, cameras, texture)
        start = time.perf_counter()
        build_index(root)
        index_s, size_b = time.perf_counter() - start, sum(p.stat().st_size for p in root.glob("*.tfrecord*"))
        runs = {"ours": [], "flat_map": [], "nested": [], "decoding_alone": []}
        for _ in range(repeat):
            runs["ours"].append(measure(sys.executable, OURS, root, core))
            runs["flat_map"].append(measure(tfds, PEER, root, core, "flat"))
            runs["nested"].append(measure(tfds, PEER, root, core, "nested"))
            runs["decoding_alone"].append(measure(sys.executable, LIMIT, root, core))
    middle = {k: {m: statistics.median(r[m] for r in v) for m in v[0]} for k, v in runs.items()}
    def over(peer, unit, who="ours"): return round(max(r[unit] for r in runs[who]) / max(r[unit] for r in runs[peer]), 2)
    ratios = {f"over_{peer}{end}": over(peer, f"steps_per{end}_s") for peer in ("flat_map", "nested") for end in ("", "_cpu")}
    ratios |= {f"limit_over_{peer}": over(peer, "steps_per_s", "decoding_alone") for peer in ("flat_map", "nested")}
    return dict(kB_per_picture=round(size_b / (episodes * n * len(cameras)) / 1e3, 1), median=middle, runs=runs,
                index_MB_per_s=round(size_b / 1e6 / index_s, 1), part_of_limit=over("decoding_alone", "steps_per_cpu_s"), **ratios)


def verdicts(cases) -> list:
    "Each goal with the figure reached. Where decoding alone is slower than a ratio asks, the share of it is the goal instead."
    rows = []
    for name, case in cases.items():
        for peer in ("flat_map", "nested"):
            goal, limit = GOALS[f"over_{peer}"], case[f"limit_over_{peer}"]
            if limit >= goal / GOALS["of_limit"]: rows.append((f"{name}: ours / {peer}, steps/s", case[f"over_{peer}"], goal, "least"))
            else: rows.append((f"{name}: ours / {peer} {case[f'over_{peer}']}; decoding alone {limit}; share of that",
                               round(case[f"over_{peer}"] / limit, 3), GOALS["of_limit"], "least"))
        rows += [(f"{name}: ours, {what}", case["median"]["ours"][what], GOALS[what], "most") for what in ("first_batch_s", "rss_mb")]
    return [{"what": w, "value": v, "target": goal, "at": at, "met": v >= goal if at == "least" else v <= goal} for w, v, goal, at in rows]


def rate_table(cases) -> dict:
    "Steps per second of every reader, of wall and of processor time, and what decoding alone allows."
    rows = []
    for who in ("ours", "flat_map", "nested", "decoding_alone"):
        for unit, says in (("steps_per_s", "steps/s"), ("steps_per_cpu_s", "steps/s of processor time"), ("rss_mb", "MB"),
                           ("first_batch_s", "s to the first batch")):
            if who == "decoding_alone" and not unit.startswith("steps"): continue
            rows.append([f"{who.replace('_', ' ')}, {says}", *(c["median"][who][unit] for c in cases.values())])
    rows += [[f"decoding alone / {peer}: no reader can do better", *(c[f"limit_over_{peer}"] for c in cases.values())]
             for peer in ("flat_map", "nested")]
    rows += [["kB per picture", *(c["kB_per_picture"] for c in cases.values())],
             ["making the index, MB/s", *(c["index_MB_per_s"] for c in cases.values())]]
    return {"head": ["", *cases], "rows": rows}


def main(argv) -> int:
    "Make, read in turns, compare, write."
    flags = {"episodes": 32, "steps": 100, "size": 224, "repeat": 3, "core": 0} | parse_flags(argv)
    if "tfds" not in flags: raise UserError("give an interpreter that has TensorFlow and tfds: --tfds=PYTHON")
    episodes, n, size, repeat, core = (int(flags[k]) for k in ("episodes", "steps", "size", "repeat", "core"))
    cases = {c: run(c, flags["tfds"], episodes, n, size, repeat, core) for c in CASES}
    report = dict(command=f"python benchmarks/rlds_steps.py --tfds=PYTHON --episodes={episodes} --steps={n} --size={size} --repeat={repeat}",
                  about="Both sides decode with the same library to the same bits: decoding alone bounds every ratio.",
                  machine=platform.machine(), cases=cases, verdicts=verdicts(cases), table=rate_table(cases))
    for v in report["verdicts"]: print(f"{v['what']:55} {v['value']:8.2f}  goal {v['target']}  {'ok' if v['met'] else 'MISSED'}")
    write_json(Path(settings().reports) / "benchmarks" / "rlds_steps.json", report)
    return 0 if all(v["met"] for v in report["verdicts"]) else 1


if __name__ == "__main__": sys.exit(main(sys.argv[1:]))
