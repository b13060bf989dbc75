"HDF5 files of robomimic and LIBERO become LeRobot v3.0: in order, without loss, whenever it is interrupted."
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest

from vla_nb.apps import cli
from vla_nb.core.types import UserError
from vla_nb.datasets.fake import HDF5_NAMES, fake_hdf5
from vla_nb.datasets.hdf5 import HDF5Options, HDF5Source, convert_source
from vla_nb.datasets.lerobot import LeRobotDataset
from vla_nb.datasets.verify import verify_dataset

ENV = {**os.environ, "OMP_NUM_THREADS": "1"}


def convert(path, options): return convert_source(HDF5Source(path, options))


def to(path, **options): return HDF5Options(output=str(path), **options)


def tree(root): return {str(p.relative_to(root)): p.read_bytes() for p in sorted(Path(root).rglob("*")) if p.is_file()}


@pytest.mark.parametrize("layout", ["libero", "robomimic"])
def test_every_step_arrives(tmp_path, layout):
    "Both layouts, twelve demonstrations: order by number, pictures and numbers bit for bit."
    source = fake_hdf5(tmp_path / "a.hdf5", 12, layout=layout)
    task = "pick up the cup" if layout == "libero" else "lift the cube"
    options = to(tmp_path / "new", pictures="image", task="" if layout == "libero" else task, columns=("obs/joint_states", "dones"))
    ds, names = LeRobotDataset(convert(source, options), return_uint8=True), HDF5_NAMES[layout]
    assert (ds.meta.fps, ds.meta.tasks, ds.meta.robot_type, ds.meta.total_episodes) == (20, [task], "Panda", 12)
    with h5py.File(source) as file:
        for n, e in enumerate(ds.meta.episodes):
            demo, rows = file[f"data/demo_{n}"], slice(e["dataset_from_index"], e["dataset_to_index"])
            np.testing.assert_array_equal(ds.columns["action"][rows], demo["actions"][()].astype(np.float32))
            state = np.concatenate([demo[f"obs/{name}"][()] for name in names[2:]], 1)
            np.testing.assert_array_equal(ds.columns["observation.state"][rows], state.astype(np.float32))
            np.testing.assert_array_equal(ds.columns["observation.joint_states"][rows], demo["obs/joint_states"][()].astype(np.float32))
            np.testing.assert_array_equal(ds.columns["dones"][rows], demo["dones"][()])
            for camera in names[:2]:
                ours = ds.images(f"observation.images.{camera}", np.arange(rows.start, rows.stop)).permute(0, 2, 3, 1).numpy()
                np.testing.assert_array_equal(ours, demo[f"obs/{camera}"][()])
    assert [c.name for c in verify_dataset(ds.meta.root, deep=True) if not c.ok] == []
    assert ds.features["observation.state"]["names"][0] == f"{names[2]}_0"


def test_folder_of_files_by_command(tmp_path, capsys):
    "One file per task, as LIBERO comes; videos, pictures turned, decodable."
    for name, text in (("b", "open the door"), ("a", "close the door")):
        path = fake_hdf5(tmp_path / f"in/{name}.hdf5", 2)
        with h5py.File(path, "a") as file: file["data"].attrs["problem_info"] = f'{{"language_instruction": ["{text}"]}}'
    words = ["data", "convert", str(tmp_path / "in"), f"--output={tmp_path / 'new'}", "--rotate", "--cameras=agentview_rgb"]
    assert cli.main([*words, "--dry_run"]) == 0 and not (tmp_path / "new").exists()
    assert "4 demonstrations, 22 steps at 20 per second, 2 tasks" in capsys.readouterr().out
    assert cli.main(words) == 0
    ds = LeRobotDataset(tmp_path / "new", return_uint8=True)
    assert ds.meta.tasks == ["close the door", "open the door"] and ds.meta.camera_keys == ["observation.images.agentview_rgb"]
    with h5py.File(tmp_path / "in/a.hdf5") as file: want = file["data/demo_0/obs/agentview_rgb"][0][::-1, ::-1].astype(int)
    assert np.abs(ds[0]["observation.images.agentview_rgb"].permute(1, 2, 0).numpy() - want).mean() < 6
    assert all(c.ok for c in verify_dataset(tmp_path / "new", deep=True))


def test_killed_and_resumed(tmp_path):
    "Killed at a random moment; the second call ends with the same bytes as an undisturbed one."
    source = fake_hdf5(tmp_path / "in.hdf5", 60, frames=lambda i: 12)
    words = [sys.executable, "-m", "vla_nb", "data", "convert", str(source)]
    began = time.time()
    subprocess.run([*words, f"--output={tmp_path / 'whole'}"], env=ENV, check=True, capture_output=True)
    takes, work = time.time() - began, tmp_path / ".killed.converting"
    child = subprocess.Popen([*words, f"--output={tmp_path / 'killed'}"], env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not list(work.glob(".journal/episode-*")): time.sleep(0.01)
    time.sleep(random.uniform(0, 0.5) * takes)
    child.send_signal(signal.SIGKILL)
    child.wait()
    if not (tmp_path / "killed").exists():
        again = subprocess.run([*words, f"--output={tmp_path / 'killed'}"], env=ENV, capture_output=True, text=True)
        assert again.returncode == 0 and "demonstrations are done already" in again.stdout, again.stderr
    whole, killed = tree(tmp_path / "whole"), tree(tmp_path / "killed")
    assert whole.keys() == killed.keys()
    assert [k for k in whole if whole[k] != killed[k]] == []
    assert not work.exists()


def test_interrupted_by_an_error(tmp_path):
    "A demonstration with NaN stops the conversion with its place; mended, it goes on; other options begin anew."
    source = fake_hdf5(tmp_path / "in.hdf5", 4)
    with h5py.File(source, "a") as file: file["data/demo_2/actions"][3, 1] = np.nan
    with pytest.raises(UserError, match=r"in.hdf5, demo_2: frame 3, 'action': holds NaN"): convert(source, to(tmp_path / "new"))
    work = tmp_path / ".new.converting"
    assert not (tmp_path / "new").exists() and len(list(work.glob(".journal/episode-*"))) == 2
    with h5py.File(source, "a") as file: file["data/demo_2/actions"][3, 1] = 0
    ds = LeRobotDataset(convert(source, to(tmp_path / "new", task="other")))
    assert ds.meta.tasks == ["other"] and ds.meta.total_episodes == 4


def edited(tmp_path, change, layout="libero"):
    source = fake_hdf5(tmp_path / "in.hdf5", 3, layout=layout)
    with h5py.File(source, "a") as file: change(file)
    return source


def rename(file, old, new): file.move(old, new)


@pytest.mark.parametrize("options,change,says", [
    (dict(cameras=("front",)), None, "demo_0 has no 'obs/front'; it has actions"),
    (dict(state=("ee_pos", "wrist_force")), None, "has no 'obs/wrist_force'; it has .*obs/ee_pos"),
    (dict(columns=("obs/force",)), None, "has no 'obs/force'"), (dict(action="action"), None, "has no 'action'; it has actions"),
    (dict(cameras=("joint_states",)), None, "obs/joint_states is float64 .*, pictures are uint8"),
    (dict(pictures="gif"), None, "--pictures is video or image"),
    ({}, lambda f: rename(f, "data/demo_1/obs/ee_pos", "data/demo_1/obs/hand"), "demo_1: which observations make the state"),
    ({}, lambda f: rename(f, "data/demo_1/obs/agentview_rgb", "data/demo_1/obs/top"), "demo_1: observation.images.* is not as in .*demo_0"),
    ({}, lambda f: rename(f, "data/demo_1", "data/first"), "data/first has no number"),
    ({}, lambda f: rename(f, "data", "demos"), "has no group data/demo_0 …; at its top are demos"),
    ({}, lambda f: f["data"].attrs.__delitem__("problem_info"), r"holds no instruction \(attributes: env_args\); give it with --task"),
    ({}, lambda f: f["data"].attrs.__setitem__("env_args", "{}"), "--fps=20"),
    ({}, lambda f: f["data"].attrs.__setitem__("env_args", "{"), "--fps=20"),
    (dict(columns=("n",)), lambda f: [f.__setitem__(f"data/demo_{i}/n", 3) for i in range(3)], "n is a single value"),
])
def test_bad_source(tmp_path, options, change, says):
    "One sentence, and nothing written."
    source = edited(tmp_path, change or (lambda f: None))
    with pytest.raises(UserError, match=says): convert(source, to(tmp_path / "new", **options))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.hdf5"]


def test_shortened_files(tmp_path):
    "A file cut anywhere is refused with a sentence."
    whole = fake_hdf5(tmp_path / "in.hdf5", 2).read_bytes()
    for n in (0, 7, 500, len(whole) // 2, len(whole) - 1):
        (tmp_path / "cut.hdf5").write_bytes(whole[:n])
        with pytest.raises(UserError, match="cut.hdf5"): convert(tmp_path / "cut.hdf5", to(tmp_path / "new"))


def test_without_h5py(tmp_path, monkeypatch):
    "The message names the extra; importing the module does not need it."
    source = fake_hdf5(tmp_path / "in.hdf5")
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(UserError, match=r"vla_nb\[hdf5\]"): HDF5Source(source)
    code = "import sys, vla_nb.datasets.hdf5, vla_nb.datasets.formats, vla_nb.datasets.waypoints; print('h5py' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENV).stdout == "False\n"


def test_rate_and_instruction_can_be_given(tmp_path):
    "Options come before attributes; a demonstration's own instruction before the file's."
    def own(file): file["data/demo_1"].attrs["language_instruction"] = "only this one"
    source = edited(tmp_path, own)
    assert [e[3] for e in HDF5Source(source).episodes] == ["pick up the cup", "only this one", "pick up the cup"]
    given = HDF5Source(source, HDF5Options(fps=5, task="given"))
    assert given.fps == 5 and {e[3] for e in given.episodes} == {"given"}
