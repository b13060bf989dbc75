"""Mutated metadata, tables and video headers: a sentence or a right answer, never another error, a crash, a hang, a flood."""
import json
import os
import random
import resource
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from vla_nb.core.stats import Stats
from vla_nb.core.types import UserError
from vla_nb.datasets.fake import fake_dataset
from vla_nb.datasets.lerobot import DatasetMetadata, LeRobotDataset, read_info
from vla_nb.datasets.mp4 import read_mp4
from vla_nb.datasets.video import VideoReader

CAMERA, EPISODES = "observation.images.top", "meta/episodes/chunk-000/file-000.parquet"
DATA, VIDEO = "data/chunk-000/file-000.parquet", f"videos/{CAMERA}/chunk-000/file-000.mp4"
ODD = [None, True, 0, -1, 2**31, 2**63, 10**400, 1e308, -0.5, float("nan"), "", "x" * 5000, "v2.1", "{", "{0}", "\0", "../../x",
       "{file_index:99999999d}", "{chunk_index.__class__}{file_index}", [], [[]], {}, [1] * 70, {"a": {"b": [None]}}, [[1], [1, 2]]]
SECONDS, MEGABYTES = 5, 600  # of processor time of one case, and beyond what the process has before the first


def nodes(tree, path=()):
    "Paths of all values of a JSON tree."
    yield path
    if isinstance(tree, (dict, list)):
        for k, v in (tree.items() if isinstance(tree, dict) else enumerate(tree)): yield from nodes(v, (*path, k))


def mutate_tree(tree, rng):
    "A copy with one value replaced, removed, or under another name."
    tree = json.loads(json.dumps(tree))
    path = rng.choice(list(nodes(tree))[1:])
    parent = tree
    for k in path[:-1]: parent = parent[k]
    kind = rng.random()
    if kind < 0.2: del parent[path[-1]]
    elif kind < 0.3 and isinstance(parent, dict): parent[str(rng.choice(ODD))[:50]] = parent.pop(path[-1])
    else: parent[path[-1]] = rng.choice(ODD)
    return json.dumps(tree).encode()


def mutate_bytes(data, rng, head=None):
    "A copy with some bytes changed, cut, repeated or dropped; `head` bounds where."
    data, n = bytearray(data), min(len(data), head or len(data))
    for _ in range(rng.choice((1, 1, 2, 8))):
        at, kind = rng.randrange(n), rng.random()
        if kind < 0.5: data[at] = rng.randrange(256)
        elif kind < 0.6: data[at:at + 4] = rng.choice((b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\0\0\0\0", b"\x80\0\0\0"))
        elif kind < 0.7: del data[at:at + rng.choice((1, 4, 64))]
        elif kind < 0.8: data[at:at] = data[at:at + rng.choice((1, 8, 200))]
        elif kind < 0.9: data[at] ^= 1 << rng.randrange(8)
        elif len(data) > 9: del data[rng.randrange(len(data) // 2, len(data)):]
        n = max(min(n, len(data)), 1)
    return bytes(data)


def swap_tail(data, rng):
    "Mutate the last two kilobytes, where a parquet file keeps its description."
    cut = max(len(data) - 2000, 0) if rng.random() < 0.7 else 0
    return data[:cut] + mutate_bytes(data[cut:], rng)


def read_all(root):
    "Open a dataset and read a sample of each episode."
    ds = LeRobotDataset(root)
    for i in (0, len(ds) - 1): ds[i]


def read_video(root): VideoReader(root / VIDEO).frames([0, 5])
def read_index(root): read_mp4(root / VIDEO)


TARGETS = {  # name -> (file, how it is mutated, what reads it, cases)
    "info": ("meta/info.json", "tree", read_all, 1000), "info text": ("meta/info.json", "bytes", read_info, 4000),
    "stats": ("meta/stats.json", "tree", DatasetMetadata, 1000),
    "stats text": ("meta/stats.json", "bytes", lambda r: Stats.from_json(r / "meta/stats.json"), 2000),
    "tasks": ("meta/tasks.parquet", "tail", DatasetMetadata, 1000), "episodes": (EPISODES, "tail", DatasetMetadata, 1500),
    "rows": (DATA, "tail", read_all, 1000), "video": (VIDEO, "head", read_video, 1200),
    "index": (VIDEO, "head", read_index, 3000)}


def attack(root, name, seed, cases):
    "Run the cases of one target in this process; returns how they ended."
    file, how, read, _ = TARGETS[name]
    path, rng, ends = root / file, random.Random(seed), Counter()
    data = path.read_bytes()
    tree = json.loads(data) if how == "tree" else None
    for case in range(cases):
        bad = mutate_tree(tree, rng) if how == "tree" else swap_tail(data, rng) if how == "tail" else mutate_bytes(data, rng)
        path.write_bytes(bad)
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        try:
            read(root)
            ends["read"] += 1
        except UserError as e:
            ends["refused"] += 1
            if len(str(e)) > 600 or "\n" in str(e): raise AssertionError(f"{name} {case}: not a sentence: {e}") from e
        except Exception as e:
            (root.parent / f"{name}-{case}.bad").write_bytes(bad)
            raise AssertionError(f"{name}, case {case}: {type(e).__name__} {e}") from e
        signal.setitimer(signal.ITIMER_PROF, 0)
    path.write_bytes(data)
    return ends


def attack_in_limits(folder, name, seed):
    "Run the cases of one target with a time limit for each and a limit on memory; writes how they ended."
    root = fake_dataset(Path(folder) / name.replace(" ", "_"), episodes=2, frames=6)
    read_all(root)
    def late(*_): raise TimeoutError(f"{SECONDS} s")
    signal.signal(signal.SIGPROF, late)
    pages = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (pages + MEGABYTES * 2**20,) * 2)
    try: result = attack(root, name, seed, TARGETS[name][3])
    except AssertionError as e: result = str(e)
    (Path(folder) / f"{name}.json").write_text(json.dumps(result))


def main(folder, seed):
    "Attack each target in a process of its own; says how the processes ended."
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)   # decoders complain at length
    status = {}
    for name in TARGETS:
        pid = os.fork()
        if not pid:
            attack_in_limits(folder, name, int(seed))
            os._exit(0)
        status[name] = os.waitpid(pid, 0)[1]
    print(json.dumps(status))


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    "Of each target: how its process ended, and how its cases did."
    folder = tmp_path_factory.mktemp("fuzz")
    run = subprocess.run([sys.executable, __file__, str(folder), os.environ.get("FUZZ_SEED", "0")], capture_output=True, text=True,
                         timeout=600, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert run.returncode == 0, run.stdout
    return {n: (s, json.loads((folder / f"{n}.json").read_text()) if s == 0 else None) for n, s in json.loads(run.stdout).items()}


@pytest.mark.parametrize("name", TARGETS)
def test_only_sentences(name, results):
    "Each mutated file is read or refused with one sentence, within its limits; and enough are refused for this to mean something."
    status, ends = results[name]
    assert status == 0, f"the process ended with status {status}: killed by signal {status & 127}"
    assert isinstance(ends, dict), ends
    assert sum(ends.values()) == TARGETS[name][3] and ends["refused"] > TARGETS[name][3] // 20, ends


def test_there_are_ten_thousand_cases(): assert sum(t[3] for t in TARGETS.values()) >= 10_000


if __name__ == "__main__": main(*sys.argv[1:])
