"""A dataset of 100 000 episodes and 50 million frames: opening it, drawing from it, and its statistics.

    python benchmarks/data_scale.py [--episodes=100000] [--frames=500] [--keep=FOLDER]

Writes synthetic tables (14-joint state and action, no video; about 2 GB), opens them in fresh processes, and measures seconds and
peak memory above `import torch`; the first batches of random samples with 50 actions, while data files are decoded into the column
cache, and once they are; what importing the reader costs; a sampler over 10^9 samples and a mixture of two such sources; exact
statistics of 1 M x 14 numbers, against a recomputation from parts. Writes reports/benchmarks/data_scale.json.
"""
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vla_nb.core.config import parse_flags
from vla_nb.core.files import write_json
from vla_nb.core.settings import settings
from vla_nb.core.stats import QUANTILES, aggregate_feature, compute_stats
from vla_nb.core.types import ACTION, OBS_STATE
from vla_nb.datasets.build import DATA_PATH, FILE, VIDEO_PATH
from vla_nb.datasets.layout import DEFAULTS, data_schema, write_tasks
from vla_nb.datasets.loader import EpochSampler, Mixture

FPS, DIMS, PER_FILE, PER_META, TASKS = 30, 14, 1000, 10_000, 50   # episodes of a data file, of a file of meta/episodes
GOALS = {"open_s": 3.0, "open_mb_above_torch": 500.0, "import_s_above_torch": 0.3, "sampler_start_ms": 10.0, "stats_1m_x_14_s": 5.0}
OPEN = """
import json, sys, time
import numpy as np, torch
def peak(): return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) / 1024
before = peak()
from vla_nb.datasets.lerobot import LeRobotDataset
t = time.perf_counter()
ds = LeRobotDataset(sys.argv[1], delta_timestamps={"action": [i / 30 for i in range(50)]})
found = {"open_s": time.perf_counter() - t, "open_mb_above_torch": peak() - before, "frames": len(ds)}
rng, seconds = np.random.default_rng(int(sys.argv[2])), []
for _ in range(40):
    rows = rng.integers(0, len(ds), 32)
    t = time.perf_counter()
    items = ds.__getitems__(rows)
    seconds.append(time.perf_counter() - t)
    assert [i["index"].item() for i in items] == rows.tolist()
found |= {"first_batch_s": seconds[0], "later_samples_per_s": 32 * 20 / sum(seconds[20:])}
print(json.dumps(found))
"""


def table_of(first, count, frames, features):
    "Rows of some episodes: smooth joint paths of 256 levels."
    n = count * frames
    row, paths = np.arange(n), (np.sin(np.arange(frames)[:, None] * np.linspace(0.01, 0.1, DIMS)) * 128).round() / 128
    values = pa.FixedSizeListArray.from_arrays(pa.array(np.tile(paths.astype(np.float32), (count, 1)).ravel()), DIMS)
    episode = first + row // frames
    columns = {OBS_STATE: values, ACTION: values, "timestamp": (row % frames / FPS).astype(np.float32), "frame_index": row % frames,
               "episode_index": episode, "index": first * frames + row, "task_index": episode % TASKS}
    return pa.table([pa.array(columns[f.name]).cast(f.type) for f in data_schema(features)], schema=data_schema(features))


def episode_table(first, count, frames, number, features):
    "Rows of meta/episodes, with statistics as a recorder writes them."
    e = first + np.arange(count)
    columns = {"episode_index": e, "tasks": pa.array([[f"task {i % TASKS}"] for i in e.tolist()]), "length": np.full(count, frames),
               "data/chunk_index": 0 * e, "data/file_index": e // PER_FILE, "dataset_from_index": e * frames,
               "dataset_to_index": (e + 1) * frames, "meta/episodes/chunk_index": 0 * e, "meta/episodes/file_index": 0 * e + number}
    for k, f in features.items():
        d = int(np.prod(f["shape"]))
        numbers = pa.array(np.random.default_rng(number).normal(size=count * d))
        for s in ("mean", "std", "min", "max", *QUANTILES): columns[f"stats/{k}/{s}"] = pa.FixedSizeListArray.from_arrays(numbers, d)
        columns[f"stats/{k}/count"] = pa.FixedSizeListArray.from_arrays(pa.array(np.full(count, frames)), 1)
    return pa.table(columns)


def make(root, episodes, frames):
    "Write the tables."
    vector = {"dtype": "float32", "shape": (DIMS,), "names": None}
    features = {OBS_STATE: vector, ACTION: vector} | DEFAULTS
    def write(table, path, **options):
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, path, compression="snappy", **options)
    for n, a in enumerate(range(0, episodes, PER_FILE)):
        table = table_of(a, min(PER_FILE, episodes - a), frames, features)
        write(table, root / DATA_PATH.format(chunk_index=0, file_index=n), row_group_size=frames * 100)
    for n, a in enumerate(range(0, episodes, PER_META)):
        table = episode_table(a, min(PER_META, episodes - a), frames, n, features)
        write(table, root / f"meta/episodes/{FILE.format(chunk_index=0, file_index=n)}.parquet")
    write_tasks(root / "meta/tasks.parquet", [f"task {i}" for i in range(TASKS)])
    info = {"codebase_version": "v3.0", "robot_type": None, "total_episodes": episodes, "total_frames": episodes * frames,
            "total_tasks": TASKS, "chunks_size": 1000, "data_files_size_in_mb": 100, "video_files_size_in_mb": 200, "fps": FPS,
            "splits": {"train": f"0:{episodes}"}, "data_path": DATA_PATH, "video_path": VIDEO_PATH,
            "features": {k: f | {"shape": list(f["shape"])} for k, f in features.items()}}
    write_json(root / "meta/info.json", info)


def python(code, *words, **environ) -> str:
    "Last line that a fresh process prints."
    env = os.environ | {"OMP_NUM_THREADS": "1"} | environ
    done = subprocess.run([sys.executable, "-c", code, *map(str, words)], capture_output=True, text=True, env=env, check=True)
    return done.stdout.strip().splitlines()[-1]


def import_seconds(repeat=5) -> dict:
    "Seconds of importing torch, and then the reader, in fresh processes."
    code = ("import time; a = time.perf_counter(); import torch; b = time.perf_counter(); import vla_nb.datasets.lerobot; "
            "print(b - a, time.perf_counter() - b)")
    runs = [[float(s) for s in python(code).split()] for _ in range(repeat + 1)][1:]
    return dict(zip(("torch", "vla_nb.datasets.lerobot"), (statistics.median(r) for r in zip(*runs))))


class Numbers:
    "A source as long as wanted, without any data."
    def __init__(self, n): self.n = n
    def __len__(self): return self.n
    def __getitem__(self, i): return {"index": i}


def measured(f) -> tuple:
    "(milliseconds, peak kB of Python's memory) of a call."
    begun = time.perf_counter()
    f()
    ms = 1000 * (time.perf_counter() - begun)
    tracemalloc.start()
    f()
    peak = tracemalloc.get_traced_memory()[1] / 1024
    tracemalloc.stop()
    return ms, peak


def draw() -> dict:
    "Samplers over 10^9 samples."
    start, start_kb = measured(lambda: EpochSampler(10 ** 9, seed=1).at(0))
    sampler = EpochSampler(10 ** 9, seed=1)
    thousand, _ = measured(lambda: [sampler.at(t) for t in range(1000)])
    mix, mix_kb = measured(lambda: Mixture([(Numbers(10 ** 9), 3), (Numbers(10 ** 9), 1)], 32).indices(100))
    return {"sampler_start_ms": start, "sampler_kb": start_kb, "sampler_us_per_sample": thousand, "mixture_start_ms": mix,
            "mixture_kb": mix_kb}


def exact_statistics() -> dict:
    "Seconds for 1 M x 14 numbers, and how far moments combined from 100 parts are from them."
    x = np.random.default_rng(0).normal(size=(1_000_000, 14)).astype(np.float32)
    begun = time.perf_counter()
    whole = compute_stats(x)
    seconds = time.perf_counter() - begun
    parts = aggregate_feature([compute_stats(p) for p in np.array_split(x, 100)])
    off = max(float(np.abs(parts[k] - whole[k]).max()) for k in ("mean", "std", "min", "max"))
    return {"stats_1m_x_14_s": seconds, "moments_from_100_parts_off_by": off}


def main(argv) -> int:
    "Make, open, draw, write."
    flags = {"episodes": 100_000, "frames": 500} | parse_flags(argv)
    episodes, frames = int(flags["episodes"]), int(flags["frames"])
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(flags.get("keep", scratch)) / "huge"
        if not (root / "meta/info.json").is_file(): make(root, episodes, frames)
        size = sum(p.stat().st_size for p in root.rglob("*.parquet"))
        with tempfile.TemporaryDirectory(dir=root.parent) as cache:
            first, later = (json.loads(python(OPEN, root, i, VLA_NB_CACHE_ROOT=cache)) for i in (0, 1))
    imports = import_seconds()
    report = dict(command="python benchmarks/data_scale.py", machine=platform.machine(), cores=os.cpu_count(), episodes=episodes,
                  frames=episodes * frames, table_bytes=size, first_opening=first, second_opening=later, import_s=imports,
                  import_s_above_torch=imports["vla_nb.datasets.lerobot"], **draw(), **exact_statistics())
    report["open_s"], report["open_mb_above_torch"] = (max(first[k], later[k]) for k in ("open_s", "open_mb_above_torch"))
    report["verdicts"] = [{"what": k, "value": report[k], "target": goal, "at": "most", "met": report[k] <= goal} for k, goal in GOALS.items()]
    more = {"first batch, decodes its data files, s": first["first_batch_s"], "later batches, samples/s": later["later_samples_per_s"],
            "sampler, µs per sample": report["sampler_us_per_sample"], "two such sources mixed: start, ms": report["mixture_start_ms"],
            "two such sources mixed: memory, kB": report["mixture_kb"], "tables on disk, bytes": size}
    report["table"] = {"head": [f"{episodes} episodes, {episodes * frames} frames", ""], "rows": [[k, v] for k, v in more.items()]}
    print(json.dumps(report, indent=1))
    write_json(Path(settings().reports) / "benchmarks" / "data_scale.json", report)
    return 0 if all(v["met"] for v in report["verdicts"]) else 1


if __name__ == "__main__": sys.exit(main(sys.argv[1:]))
