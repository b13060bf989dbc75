"""Make the golden files of tests/test_roundtrip.py: LeRobot 0.4.4 and vla_nb read each other's less ordinary datasets.

    python make.py write      with vla_nb installed: records written/
    python make.py record     with lerobot 0.4.4 installed: records recorded/ (several files) and recorded_hevc/
    python make.py kill       with lerobot 0.4.4 installed: records killed/, whose recorder gets SIGKILL before it can finish
    python make.py read       with lerobot 0.4.4 installed: writes <dataset>.safetensors, what LeRobot reads from each; of
                              written/ only the videos stay, which depend on the encoder's version

Every dataset has several files (the second recording resumes the first), episodes with several tasks, flags, whole numbers,
a matrix, a text, a camera as video and one as pictures in rows. The peer environment: ../lerobot_dataset/make.py.
"""
import json
import shutil
import sys
from pathlib import Path
import numpy as np

HERE, FPS, LENGTHS = Path(__file__).parent, 10, (5, 4, 6)
CAMERA, EYE = "observation.images.top", "observation.images.eye"
PICTURE = ["height", "width", "channels"]
VIDEO = {CAMERA: {"dtype": "video", "shape": (32, 32, 3), "names": PICTURE}}
STATE = {"observation.state": {"dtype": "float32", "shape": (3,), "names": ["a", "b", "c"]}}
FEATURES = VIDEO | STATE | {
    EYE: {"dtype": "image", "shape": (4, 6, 3), "names": PICTURE},
    "pose": {"dtype": "float32", "shape": (2, 3), "names": None}, "exact": {"dtype": "float64", "shape": (2,), "names": None},
    "count": {"dtype": "int64", "shape": (1,), "names": None}, "code": {"dtype": "int32", "shape": (2,), "names": None},
    "next.done": {"dtype": "bool", "shape": (1,), "names": None}, "touch": {"dtype": "bool", "shape": (3,), "names": None},
    "note": {"dtype": "string", "shape": (1,), "names": None}}
OFFSETS = {"pose": [-0.1, 0.0, 0.1], "touch": [0.0, 0.2], CAMERA: [-0.2, 0.0], EYE: [0.0, 0.1]}


def frames(episode, features):
    "The frames of an episode; its task changes half way."
    rng, n = np.random.default_rng(episode), LENGTHS[episode]
    for i in range(n):
        frame = {CAMERA: np.full((32, 32, 3), 30 + 40 * episode + 12 * i, np.uint8),
                 EYE: rng.integers(0, 256, (4, 6, 3), dtype=np.uint8), "observation.state": rng.normal(size=3).astype(np.float32),
                 "pose": rng.normal(size=(2, 3)).astype(np.float32), "exact": rng.normal(size=2),
                 "count": np.array([episode * 1000 + i]), "code": np.array([-i, 2**30 + i], np.int32),
                 "next.done": np.array([i == n - 1]), "touch": rng.random(3) < 0.5, "note": f"é{episode}.{i}"}
        task = ("reach", f"grasp {episode % 2}", "lift")[min(2 * i // n + episode % 2, 2)]
        yield {k: frame[k] for k in features} | {"task": task}


def record_part(dataset, episodes, features):
    "Record some episodes with either library's recorder."
    for e in episodes:
        for frame in frames(e, features): dataset.add_frame(frame)
        dataset.save_episode()
    dataset.finalize()


def write(root=HERE / "written"):
    "Record with vla_nb, in two sittings."
    from vla_nb.datasets.writer import DatasetWriter
    record_part(DatasetWriter(root, FPS, FEATURES, robot_type="golden"), (0, 1), FEATURES)
    record_part(DatasetWriter.resume(root), (2,), FEATURES)


def record():
    "Record with LeRobot, in two sittings."
    from lerobot.datasets.lerobot_dataset import LeRobotDataset
    for name, codec, features in (("recorded", "h264", FEATURES), ("recorded_hevc", "hevc", VIDEO | STATE)):
        root = HERE / name
        shutil.rmtree(root, ignore_errors=True)
        record_part(LeRobotDataset.create(f"golden/{name}", FPS, features, root, "golden", vcodec=codec), (0, 1), features)
        record_part(LeRobotDataset(f"golden/{name}", root=root, vcodec=codec), (2,), features)
        for folder in ("images", "tmp"): shutil.rmtree(root / folder, ignore_errors=True)


def kill():
    "Record with LeRobot in a process that is killed after its last saved episode: parquet files stay without a footer."
    import multiprocessing
    shutil.rmtree(HERE / "killed", ignore_errors=True)
    process = multiprocessing.Process(target=record_and_die)
    process.start()
    process.join()
    shutil.rmtree(HERE / "killed/images", ignore_errors=True)


def record_and_die():
    "The process that is killed."
    import os
    import signal
    from lerobot.datasets.lerobot_dataset import LeRobotDataset
    dataset = LeRobotDataset.create("golden/killed", FPS, VIDEO | STATE, HERE / "killed", "golden", vcodec="h264")
    for e in range(3):
        for frame in frames(e, VIDEO | STATE): dataset.add_frame(frame)
        dataset.save_episode()
    os.kill(os.getpid(), signal.SIGKILL)


def collect(dataset_class, root, **options):
    "Every frame as a reader returns it, windows at some, and an episode by itself; texts as JSON."
    keys = json.loads((Path(root) / "meta/info.json").read_text())["features"]
    offsets, out, texts = {k: v for k, v in OFFSETS.items() if k in keys}, {}, {}
    for tag, more, pick in (("plain", {}, range(15)), ("window", {"delta_timestamps": offsets}, (0, 4, 5, 8, 14)),
                            ("second", {"delta_timestamps": offsets, "episodes": [1]}, (0, 3))):
        ds = dataset_class("golden/x", root=root, **more, **options)
        for i in pick:
            for key, value in ds[i].items():
                if isinstance(value, str): texts[f"{tag}.{i}.{key}"] = value; continue
                if key in (CAMERA, EYE): value = (value * 255).round().byte()[..., ::4, ::4]
                out[f"{tag}.{i}.{key}"] = value.contiguous()
    return out, {"texts": json.dumps(texts, sort_keys=True)}


def read():
    "Read every dataset with LeRobot and keep what it returns."
    from lerobot.datasets.lerobot_dataset import LeRobotDataset
    from safetensors.torch import save_file
    for name in ("written", "recorded", "recorded_hevc"):
        tensors, notes = collect(LeRobotDataset, HERE / name, video_backend="torchcodec")
        save_file(tensors, HERE / f"{name}.safetensors", notes)
        print(name, len(tensors), "tensors")
    for part in ("data", "meta"): shutil.rmtree(HERE / "written" / part)
    (HERE / "written/README.md").unlink()


if __name__ == "__main__": {"write": write, "record": record, "kill": kill, "read": read}[sys.argv[1]]()
