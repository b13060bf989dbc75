"""Random access to a dataset: ours and LeRobot's reader, same files, same samples, same threads.

    python benchmarks/data_loader.py --lerobot=PYTHON [--repeat=3] [--sizes=96x96,480x640] [--vcodec=h264] [--keep=FOLDER]

PYTHON is an interpreter with LeRobot 0.4 (an environment of its own). A sample is one frame of two cameras and the next 50 actions;
batches of 32 come from an ordinary DataLoader, in this process (pinned to one core) or from two workers, one thread each. Readers
take turns, each in a fresh process; opening and the first two batches are not timed. `ours, uint8` is what training reads: pictures
are bytes until the device has them; `ours, float here` makes float32 of them in the process that receives the batch, in one buffer;
`ours` returns float32 from the data set, as LeRobot does, so that four times the bytes travel between processes; `ours, cache` reads
bytes from a frame cache of 224x224 pixels. Beside them stand the limits: libav alone, random (seek, decode) and in sequence, with and
without conversion to RGB, and JPEG. Writes reports/benchmarks/data_loader.json; --keep leaves the recorded data for the next run.
"""
import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import av
import numpy as np

from vla_nb.core.config import parse_flags
from vla_nb.core.files import write_json
from vla_nb.core.settings import settings
from vla_nb.core.types import ACTION, OBS_STATE, UserError
from vla_nb.datasets.writer import DatasetWriter

CAMERAS, FPS, CHUNK, BATCH, CACHED = ("observation.images.laptop", "observation.images.phone"), 30, 50, 32, (224, 224)
SHAPES = {(96, 96): (40, 250, 60), (480, 640): (20, 150, 16)}  # size -> episodes, frames of each, batches that are timed
READ = """
import json, os, sys, time
import numpy as np, torch
job = json.loads(sys.argv[1])
torch.set_num_threads(1)
if not job["workers"]: os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
chunk, more = {"action": [i / job["fps"] for i in range(job["chunk"])]}, {}
if job["who"] == "lerobot":
    import importlib.util
    from lerobot.datasets.lerobot_dataset import LeRobotDataset
    backend = "torchcodec" if importlib.util.find_spec("torchcodec") else "pyav"
    ds = LeRobotDataset("benchmark/loader", root=job["root"], delta_timestamps=chunk, video_backend=backend)
else:
    from vla_nb.datasets.cache import FrameCache
    from vla_nb.datasets.lerobot import LeRobotDataset
    from vla_nb.datasets.loader import collate
    cache = FrameCache.open(job["cache"]) if job["who"] == "ours, cache" else None
    ds = LeRobotDataset(job["root"], delta_timestamps=chunk, frame_cache=cache, return_uint8=job["who"] != "ours")
    backend, more = "frame cache" if cache else "PyAV", {"collate_fn": collate}
order = np.random.default_rng(job["seed"]).permutation(len(ds))[:job["batch"] * (job["batches"] + 2)].tolist()
batches = iter(torch.utils.data.DataLoader(ds, job["batch"], sampler=order, num_workers=job["workers"], **more))
for _ in range(2): next(batches)
begun, n, space = time.perf_counter(), 0, {}
for b in batches:
    if job["who"] == "ours, float here":
        for k in [k for k, v in b.items() if torch.is_tensor(v) and v.dtype == torch.uint8]:
            b[k] = space.setdefault((k, len(b[k])), torch.empty(b[k].shape)).copy_(b[k]).div_(255)
    n += len(b["action"])
print(json.dumps({"rate": n / (time.perf_counter() - begun), "backend": backend}))
"""


def canvas(seed):
    "A big picture with coarse and fine structure, and noise frames like a camera's."
    rng = np.random.default_rng(seed)
    coarse = np.kron(rng.integers(40, 200, (24, 32, 3)), np.ones((40, 40, 1)))
    fine = np.kron(rng.integers(-25, 25, (240, 320, 3)), np.ones((4, 4, 1)))
    return (coarse + fine).clip(0, 255).astype(np.uint8), rng.integers(0, 6, (8, 480, 640, 3), dtype=np.uint8)


def record(root, size, episodes, frames, vcodec):
    "A dataset of two cameras that pan over a textured scene."
    cameras = {k: {"dtype": "video", "shape": (*size, 3)} for k in CAMERAS}
    vector = {"dtype": "float32", "shape": (6,), "names": [f"joint_{i}" for i in range(6)]}
    (scene, noise), rng, (h, w) = canvas(0), np.random.default_rng(1), size
    with DatasetWriter(root, FPS, cameras | {OBS_STATE: vector, ACTION: vector}, vcodec=vcodec) as out:
        for e in range(episodes):
            start, state = rng.integers(0, 200, 2), np.cumsum(rng.normal(size=(frames, 6)) * 0.02, 0).astype(np.float32)
            for i in range(frames):
                y, x = start + (np.array([i, 1.5 * i]) % 100).astype(int)
                view = {k: scene[y + 20 * c:, x + 30 * c:][:h, :w] + noise[(i + c) % 8, :h, :w] for c, k in enumerate(CAMERAS)}
                out.add_frame(view | {OBS_STATE: state[i], ACTION: state[i], "task": "look around"})
            out.save_episode()
    return Path(root)


def rate(python, job) -> dict:
    "Samples per second of one reader, in a process of its own."
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": job["box"]}
    done = subprocess.run([python, "-c", READ, json.dumps(job)], capture_output=True, text=True, env=env)
    if done.returncode: raise UserError(f"{python} failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def libav_rates(path, seconds=1.5) -> dict:
    "Frames per second of libav alone on one file: one core, random (seek to the key frame, decode) and in sequence."
    found, cores = {}, os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    with av.open(str(path)) as file:
        stream = file.streams.video[0]
        stream.codec_context.thread_count = 1
        ticks = [p.pts for p in file.demux(stream) if p.pts is not None]
        def walk():
            while True:
                file.seek(0, stream=stream)
                yield from file.decode(stream)
        def jump():
            while True:
                t = random.choice(ticks)
                file.seek(t, stream=stream)
                yield next(f for f in file.decode(stream) if f.pts >= t)
        for name, frames in (("sequential", walk), ("random", jump)):
            for suffix, rgb in (("", False), ("_rgb", True)):
                random.seed(0)
                begun, n = time.perf_counter(), 0
                for frame in frames():
                    if rgb: frame.to_ndarray(format="rgb24")
                    n += 1
                    if time.perf_counter() - begun > seconds: break
                found[name + suffix] = n / (time.perf_counter() - begun)
    os.sched_setaffinity(0, cores)
    return found


def jpeg_rate(size, seconds=2.0) -> float:
    "Pictures per second of simplejpeg, one thread."
    import simplejpeg
    data = simplejpeg.encode_jpeg(np.ascontiguousarray(canvas(0)[0][:size[0], :size[1]]), quality=90)
    begun, n = time.perf_counter(), 0
    while time.perf_counter() - begun < seconds:
        simplejpeg.decode_jpeg(data)
        n += 1
    return n / (time.perf_counter() - begun)


def measure(box, size, lerobot, repeat, vcodec) -> dict:
    "All rates at one picture size."
    from vla_nb.datasets.cache import FrameCache
    (episodes, frames, batches), name = SHAPES[size], f"{size[0]}x{size[1]}"
    root = box / name
    if not root.is_dir(): record(root, size, episodes, frames, vcodec)
    readers = [(w, n) for n in (0, 2) for w in ("lerobot", "ours", "ours, uint8", "ours, float here", "ours, cache")]
    if size[0] < CACHED[0]: readers = [r for r in readers if r[0] != "ours, cache"]
    else:
        shutil.rmtree(box / f"{name}-cache", ignore_errors=True)
        begun = time.perf_counter()
        FrameCache.build(root, box / f"{name}-cache", CACHED)
        built = time.perf_counter() - begun
    rates, backend, alone = {f"{w}, {n} workers": [] for w, n in readers}, {}, []
    for i in range(repeat):
        alone.append(libav_rates(sorted(root.glob("videos/*/*/*.mp4"))[0]))
        for who, n in readers:
            many = 20 if who == "ours, cache" else 1
            job = dict(who=who, workers=n, root=str(root), cache=str(box / f"{name}-cache"), fps=FPS, chunk=CHUNK, batch=BATCH,
                       batches=min(batches * many, episodes * frames // BATCH - 2), seed=i, box=str(box / "arrow"))
            found = rate(lerobot if who == "lerobot" else sys.executable, job)
            rates[f"{who}, {n} workers"].append(found["rate"])
            backend[who] = found["backend"]
            print(f"{name} {who}, {n} workers: {found['rate']:.0f} samples/s")
    limits = {k: statistics.median(a[k] for a in alone) for k in alone[0]}
    result = {"rates": rates, "median": {k: statistics.median(v) for k, v in rates.items()}, "backend": backend, "libav": limits,
              "jpeg": jpeg_rate(size), "frames": episodes * frames}
    if size[0] >= CACHED[0]:
        result |= {"jpeg_cached_size": jpeg_rate(CACHED), "cache_build_pictures_per_s": 2 * episodes * frames / built}
    return result


def verdicts(sizes) -> list:
    "Each goal with the figure reached."
    rows = []
    for name, r in sizes.items():
        m, goal = r["median"], 5.0 if name == "96x96" else 2.0
        for n in (0, 2):
            for who in ("ours, uint8", "ours, float here"):
                rows.append((f"{name}, {n} workers: {who} / LeRobot", m[f"{who}, {n} workers"] / m[f"lerobot, {n} workers"], goal))
        for kind in ("random", "random_rgb"):
            share = len(CAMERAS) * m["ours, uint8, 0 workers"] / r["libav"][kind]
            rows.append((f"{name}: pictures/s of ours, uint8 / libav {kind.replace('_', ', ')}", share, 0.5))
        if "ours, cache, 2 workers" in m:
            rows.append((f"{name}: cache {CACHED[0]}x{CACHED[1]} / LeRobot, 2 workers",
                         m["ours, cache, 2 workers"] / m["lerobot, 2 workers"], 10.0))
    return [{"what": w, "value": v, "target": target, "at": "least", "met": v >= target} for w, v, target in rows]


def rate_table(sizes) -> dict:
    "Samples and pictures per second at every size."
    keys = list(dict.fromkeys(k for r in sizes.values() for k in r["median"]))
    rows = [[f"{k}, samples/s", *(r["median"].get(k, "–") for r in sizes.values())] for k in keys]
    rows += [[f"libav {k.replace('_', ', ')}, pictures/s", *(r["libav"][k] for r in sizes.values())] for k in
             ("sequential", "sequential_rgb", "random", "random_rgb")]
    rows += [["JPEG, pictures/s", *(r["jpeg"] for r in sizes.values())],
             [f"JPEG at {CACHED[0]}x{CACHED[1]}, pictures/s", *(r.get("jpeg_cached_size", "–") for r in sizes.values())],
             ["building the frame cache, pictures/s", *(r.get("cache_build_pictures_per_s", "–") for r in sizes.values())]]
    return {"head": ["reader", *sizes], "rows": rows}


def main(argv) -> int:
    "Record, read, compare, write."
    flags = {"repeat": 3, "sizes": "96x96,480x640", "vcodec": "h264"} | parse_flags(argv)
    if "lerobot" not in flags: raise UserError("give an interpreter that has LeRobot 0.4: --lerobot=PYTHON")
    sizes = [tuple(map(int, s.split("x"))) for s in flags["sizes"].split(",")]
    with tempfile.TemporaryDirectory() as scratch:
        box = Path(flags.get("keep", scratch))
        found = {f"{h}x{w}": measure(box, (h, w), flags["lerobot"], int(flags["repeat"]), flags["vcodec"]) for h, w in sizes}
    report = dict(command=f"python benchmarks/data_loader.py --lerobot=PYTHON --repeat={flags['repeat']}", cores=os.cpu_count(),
                  machine=platform.machine(), batch=BATCH, action_chunk=CHUNK, cameras=len(CAMERAS), vcodec=flags["vcodec"],
                  threads=1, sizes=found, verdicts=verdicts(found), table=rate_table(found),
                  about=f"LeRobot decodes with {next(iter(found.values()))['backend']['lerobot']}; one thread per process.")
    for v in report["verdicts"]: print(f"{v['what']:60} {v['value']:7.2f}  goal {v['target']}  {'ok' if v['met'] else 'MISSED'}")
    write_json(Path(settings().reports) / "benchmarks" / "data_loader.json", report)
    return 0 if all(v["met"] for v in report["verdicts"]) else 1


if __name__ == "__main__": sys.exit(main(sys.argv[1:]))
