"""A recorder that is killed, or loses power, at any moment: saved episodes stay, the dataset opens, recording goes on."""
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from vla_nb.core.types import UserError
from vla_nb.datasets.lerobot import LeRobotDataset
from vla_nb.datasets.verify import verify_dataset
from vla_nb.datasets.writer import DatasetWriter

CAMERA = "observation.images.top"
FEATURES = {CAMERA: {"dtype": "video", "shape": (32, 32, 3)}, "action": {"dtype": "float32", "shape": (1,)}}
ENV = os.environ | {"OMP_NUM_THREADS": "1"}


def length(e): return 2 + e % 3


def add(writer, e):
    "Record and save episode e; its frames tell its number."
    for i in range(length(e)):
        picture = np.full((32, 32, 3), 40 + 7 * e % 150 + 10 * i, np.uint8)
        writer.add_frame({CAMERA: picture, "action": np.float32(e), "task": f"task {e % 4}"})
    writer.save_episode()


def opened(root):
    "A writer of a folder that may or may not hold something yet."
    try: return DatasetWriter(root, 10, FEATURES)
    except UserError: return DatasetWriter.resume(root)


def check(root, promised):
    "Complete what a crash left; everything that was promised is there, and right."
    writer = opened(root)
    torn = writer.torn
    assert writer.total_episodes >= promised, f"{writer.total_episodes} episodes of {promised}; set aside: {torn}"
    if not writer.total_episodes: return writer.close()
    writer.finalize()
    ds = LeRobotDataset(root, return_uint8=True)
    assert [e["length"] for e in ds.meta.episodes] == [length(e) for e in range(ds.num_episodes)]
    first = 0
    for e in range(ds.num_episodes):
        a, b = ds[first], ds[first + length(e) - 1]
        assert a["action"] == b["action"] == e and a["task"] == f"task {e % 4}"
        for i, item in ((0, a), (length(e) - 1, b)):
            assert abs(float(item[CAMERA].float().mean()) - (40 + 7 * e % 150 + 10 * i)) < 4
        first += length(e)
    return torn


# --- kill -9 ----------------------------------------------------------------------------------------------------------

def record_for_ever(root, promises):
    "Record, pack after every third episode, resume; tell the number of each saved episode."
    writer = opened(root)
    while True:
        for _ in range(3):
            add(writer, writer.total_episodes)
            os.write(promises, b"%d\n" % writer.total_episodes)
        writer.finalize()
        writer = DatasetWriter.resume(root)


def in_child(function, *args):
    "Process id of a copy of this process that runs a function."
    pid = os.fork()
    if pid: return pid
    status = 1
    try:
        function(*args)
        status = 0
    except BaseException as e: print(f"{type(e).__name__}: {e}", file=sys.stderr, flush=True)
    finally: os._exit(status)


def kill_often(folder, seed, kills, datasets):
    "Kill a recorder again and again; prints {kill: what was promised, how long it lived}."
    rng, promised, report = random.Random(int(seed)), {}, []
    for kill in range(int(kills)):
        root = Path(folder) / f"set{kill % int(datasets)}"
        source, sink = os.pipe()
        life = rng.choice((0.02, 0.1, 0.4)) * rng.random()
        pid = in_child(record_for_ever, root, sink)
        os.close(sink)
        time.sleep(life)
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        assert os.WIFSIGNALED(status), f"kill {kill}: the recorder ended by itself"
        with os.fdopen(source) as f: promised[root] = int((f.read().split() or [promised.get(root, 0)])[-1])
        _, status = os.waitpid(in_child(check, root, promised[root]), 0)
        assert status == 0, f"kill {kill} after {life:.3f} s: {root}"
        report.append({"life": round(life, 3), "promised": promised[root], "torn": len(list(root.glob(".torn/*")))})
    print(json.dumps(report))


def test_fifty_kills(tmp_path):
    "50 seeded moments, 5 datasets: nothing that was saved is lost, each dataset opens after each kill and is continued."
    run = subprocess.run([sys.executable, __file__, "kill_often", str(tmp_path), "0", "50", "5"], capture_output=True, text=True, env=ENV)
    assert run.returncode == 0, run.stderr[-3000:]
    report = json.loads(run.stdout)
    assert len(report) == 50 and sum(r["torn"] for r in report[-5:]) > 0
    for root in sorted(tmp_path.glob("set*")):
        assert all(r.ok for r in verify_dataset(root, deep=True)), [r.detail for r in verify_dataset(root) if not r.ok]


def test_a_torn_episode_is_set_aside_and_named(tmp_path):
    "Half-written frames after a crash, and a saved episode that a disk damaged: later episodes move up, nothing else is lost."
    writer = DatasetWriter(tmp_path / "a", 10, FEATURES)
    for e in range(3): add(writer, e)
    writer.add_frame({CAMERA: np.zeros((32, 32, 3), np.uint8), "action": 9.0, "task": "never saved"})
    writer._stack.close()
    part = tmp_path / "a/.journal/episode-000001/data.parquet"
    part.write_bytes(part.read_bytes()[:-30])
    (tmp_path / f"a/.journal/.episode-000003/{CAMERA}.mp4").write_bytes(b"half")
    again = DatasetWriter.resume(tmp_path / "a")
    assert [t.split(":")[0] for t in again.torn] == [".torn/episode-000003-0", ".torn/episode-000001-1"]
    assert "it was not saved" in again.torn[0] and "truncated or damaged" in again.torn[1]
    assert (tmp_path / "a/.torn/episode-000001-1/episode.json").is_file() and again.total_episodes == 2
    again.finalize()
    ds = LeRobotDataset(tmp_path / "a")
    assert [ds[i]["action"].item() for i in (0, 2)] == [0, 2] and ds.meta.tasks == ["task 0", "task 2"]
    assert all(r.ok for r in verify_dataset(tmp_path / "a", deep=True))


# --- power loss -------------------------------------------------------------------------------------------------------

class Disk:
    """What would be there after a power loss: a file holds what its last fsync saw, a folder the names of its last fsync.

    Each folder may also have reached the disk as it is now, file by file: `image` chooses per folder.
    """
    def __init__(self, top): self.top, self.files, self.folders, self.held, self.moments = top, {}, {}, [], []

    def saw_fsync(self, fd):
        path, node = Path(os.readlink(f"/proc/self/fd/{fd}")), os.fstat(fd).st_ino
        if self.top not in (path, *path.parents): return
        self.held.append(os.dup(fd))   # the inode number is not given to another file
        if path.is_dir(): self.folders[node] = self.names(path)
        else: self.files[node] = path.read_bytes()

    @staticmethod
    def names(path): return {p.name: (p.stat().st_ino, p.is_dir(), p) for p in path.iterdir()}

    def image(self, out, rng=None, folder=None):
        "Write one state that the disk may be left in; without a generator, the oldest."
        folder = folder or (self.top.stat().st_ino, True, self.top)
        now = rng is not None and rng.random() < 0.5 and folder[2].is_dir() and folder[2].stat().st_ino == folder[0]
        out.mkdir()
        for name, (node, is_dir, path) in (self.names(folder[2]) if now else self.folders.get(folder[0], {})).items():
            if is_dir: self.image(out / name, rng, (node, is_dir, path))
            else: (out / name).write_bytes(self.files.get(node, b""))


@pytest.fixture
def disk(tmp_path, monkeypatch):
    "A folder whose every fsync and rename is seen; `disk.moments` gets an image after each, oldest and mixed in turn."
    (tmp_path / "live").mkdir()
    disk, rng, fsync, replace = Disk(tmp_path / "live"), random.Random(0), os.fsync, os.replace
    disk.promised = 0
    def moment():
        out = tmp_path / f"image{len(disk.moments)}"
        disk.image(out, rng if len(disk.moments) % 2 else None)
        disk.moments.append((out, disk.promised))
    def seen_fsync(fd):
        fsync(fd)
        disk.saw_fsync(fd)
        moment()
    def seen_replace(a, b):
        replace(a, b)
        moment()
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", seen_fsync)
        patched.setattr(os, "replace", seen_replace)
        yield disk
    for fd in disk.held: os.close(fd)


def test_power_loss_at_every_moment(disk, monkeypatch):
    "Every state that the disk may be left in, after every fsync and every rename, holds all that was promised before it."
    root = disk.top / "set"
    writer = DatasetWriter(root, 10, FEATURES)
    for e in range(3):
        add(writer, e)
        disk.promised = e + 1
        if e == 1:
            writer.finalize()
            writer = DatasetWriter.resume(root)
    writer.finalize()
    moments = list(disk.moments)
    monkeypatch.undo()
    assert len(moments) > 60
    for image, promised in moments:
        try: assert (image / "set").is_dir() or not promised; check(image / "set", promised)
        except (UserError, AssertionError) as e: raise AssertionError(f"{image.name}, {promised} promised: {e}") from e
        shutil.rmtree(image)


CALL = re.compile(r'^(?:\d+ +)?(\w+)\((.*)\) += (\d+)')


def parse_trace(text, top):
    "(kind, path, path) of the system calls that change names or contents below a folder, and of the promises."
    for line in text.splitlines():
        m = CALL.match(line)
        if not m: continue
        call, args, _ = m.groups()
        if call == "write" and '"promise' in args: yield "promise", None, None
        if call == "write" and '"packed' in args: yield "packed", None, None
        paths = [p for p in re.findall(r'"((?:[^"\\]|\\.)*)"|<([^>]*)>', args)]
        named = [a for a, _ in paths if a.startswith(str(top))]
        opened_as = [b for _, b in paths if b.startswith(str(top))]
        if call in ("write", "pwrite64", "ftruncate") and opened_as: yield "write", opened_as[0], None
        elif call in ("fsync", "fdatasync") and opened_as: yield "fsync", opened_as[0], None
        elif call.startswith("mkdir") and named or call == "openat" and "O_CREAT" in args and named: yield "new", named[0], None
        elif call.startswith("rename") and len(named) == 2: yield "rename", named[0], named[1]
        elif call.startswith(("unlink", "rmdir")): yield "unlink", (named or opened_as or [""])[0], None


def lost(events, top):
    "Walk a trace: at each promise, names and contents of saved episodes that a power loss could still take."
    dirty, pending, found, packed = set(), set(), [], False
    def kept(p, part): return re.search(part, p) and not Path(p).name.startswith(".") or p in (str(top / "set"), str(top / "set/.journal"))
    for kind, a, b in events:
        if kind == "write": dirty.add(a)
        elif kind == "new": pending.add(a)
        elif kind == "fsync":
            dirty.discard(a)
            pending = {p for p in pending if str(Path(p).parent) != a}
        elif kind == "rename":
            dirty = {b + p.removeprefix(a) if p == a or p.startswith(a + "/") else p for p in dirty if not p.startswith(b + "/")}
            pending = {b + p.removeprefix(a) if p == a or p.startswith(a + "/") else p for p in pending} | {b}
        elif kind == "promise":
            found += [("promise", p) for p in dirty | pending if kept(p, r"/\.journal/episode-\d+(/|$)")]
        elif kind == "unlink":
            if "/.journal/episode-" in a and not packed:   # packing is over: the journal is being removed
                packed = True
                found += [("packing", p) for p in dirty | pending if kept(p, r"/set/(data|videos|meta)(/|$)") and ".torn" not in p]
            dirty, pending = {p for p in dirty if p != a}, {p for p in pending if p != a}
    return found


TRACED = """
import os, sys
sys.path.insert(0, {tests!r})
from pathlib import Path
import test_crash as t
w = t.DatasetWriter(Path(sys.argv[1]) / "set", 10, t.FEATURES)
for e in range(2):
    t.add(w, e)
    os.write(1, b"promise\\n")
w.finalize()
"""


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
def test_fsync_order_in_a_system_call_trace(tmp_path):
    "What the recorder asks of the system: contents before names, names before the promise, the dataset before the journal goes."
    (tmp_path / "live").mkdir()
    calls = "openat,write,pwrite64,ftruncate,fsync,fdatasync,rename,renameat,renameat2,mkdir,mkdirat,unlink,unlinkat,rmdir"
    words = ["strace", "-f", "-y", "-qq", "-s", "512", "-e", f"trace={calls}", "-o", tmp_path / "trace", sys.executable, "-c",
             TRACED.format(tests=str(Path(__file__).parent)), tmp_path / "live"]
    run = subprocess.run(words, capture_output=True, text=True, env=ENV)
    if "ptrace" in run.stderr and "not permitted" in run.stderr: pytest.skip("tracing is not permitted here")
    assert run.returncode == 0, run.stderr[-2000:]
    events = list(parse_trace((tmp_path / "trace").read_text(errors="replace"), tmp_path / "live"))
    assert sum(k == "promise" for k, _, _ in events) == 2 and sum(k == "fsync" for k, _, _ in events) > 30
    assert lost(events, tmp_path / "live") == []
    without = [e for e in events if e[:2] != ("fsync", str(tmp_path / "live/set/.journal"))]
    assert ("promise", str(tmp_path / "live/set/.journal/episode-000000")) in lost(without, tmp_path / "live")


if __name__ == "__main__": globals()[sys.argv[1]](*sys.argv[2:])
