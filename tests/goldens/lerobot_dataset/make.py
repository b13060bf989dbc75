"""Make the golden files of tests/test_datasets.py: LeRobot 0.4.4 and vla_nb read each other's recordings.

    python make.py write      with vla_nb installed: records written/ (removed by `read`: the test records it again)
    python make.py record     with lerobot 0.4.4 installed: records recorded_h264/ and recorded_av1/
    python make.py read       with lerobot 0.4.4 installed: writes <dataset>.safetensors, what LeRobot reads from each,
                              and written.mp4, the only file of written/ that depends on the encoder's version

The peer environment (CPU): torch==2.13.0; then, without dependencies, lerobot==0.4.4 torchvision==0.28.0
torchcodec==0.13.0; then "datasets>=4,<5" "huggingface-hub>=0.34.2,<0.36" "av>=15,<16" "packaging<26"
draccus==0.10.0 jsonlines einops
"accelerate>=1.10" "diffusers<0.36" "gymnasium<2" "opencv-python-headless<4.13" "transformers<5" safetensors and FFmpeg.
Pictures are kept as the 8-bit values that LeRobot divides by 255, every fourth row and column.
"""
import shutil
import sys
from pathlib import Path
import numpy as np

HERE, FPS, LENGTHS, TASKS = Path(__file__).parent, 10, (7, 5, 6), ("open the drawer", "close it", "open the drawer")
CAMERA, EYE = "observation.images.top", "observation.images.eye"
VIDEO = f"videos/{CAMERA}/chunk-000/file-000.mp4"
SAMPLES = (0, 6, 7, 17)  # frames whose tensors are kept: both ends of episodes among them
OFFSETS = {"action": [-0.1, 0.0, 0.1, 0.2], CAMERA: [-0.1, 0.0], "observation.state": [0.0]}
FEATURES = {
    CAMERA: {"dtype": "video", "shape": (64, 64, 3), "names": ["height", "width", "channels"]},
    EYE: {"dtype": "image", "shape": (6, 8, 3), "names": ["height", "width", "channels"]},
    "observation.state": {"dtype": "float32", "shape": (3,), "names": ["a", "b", "c"]},
    "action": {"dtype": "float32", "shape": (2,), "names": ["a", "b"]},
    "pose": {"dtype": "float32", "shape": (2, 2), "names": None},
    "next.done": {"dtype": "bool", "shape": (1,), "names": None},
}


def frames(episode):
    "The frames of an episode, without the task."
    rng = np.random.default_rng(episode)
    v, u = np.mgrid[:64, :64]
    for i in range(LENGTHS[episode]):
        top = np.stack([(3 * u + 9 * i) % 256, (2 * v + 40 * episode) % 256, (u + v + 5 * i) % 256], -1)
        yield {CAMERA: top.astype(np.uint8), EYE: rng.integers(0, 256, (6, 8, 3), dtype=np.uint8),
               "observation.state": rng.normal(size=3).astype(np.float32),
               "action": rng.normal(size=2).astype(np.float32),
               "pose": rng.normal(size=(2, 2)).astype(np.float32), "next.done": np.array([i == LENGTHS[episode] - 1])}


def fill(dataset, features=FEATURES):
    "Record all episodes with either library's recorder."
    for episode in range(len(LENGTHS)):
        for frame in frames(episode): dataset.add_frame({k: frame[k] for k in features} | {"task": TASKS[episode]})
        dataset.save_episode()
    dataset.finalize()


def write(root=HERE / "written"):
    "Record with vla_nb."
    from vla_nb.datasets.writer import DatasetWriter
    fill(DatasetWriter(root, FPS, FEATURES, robot_type="golden"))


def record():
    "Record with LeRobot, in the two codecs it has."
    from lerobot.datasets.lerobot_dataset import LeRobotDataset
    few = {k: FEATURES[k] for k in (CAMERA, "observation.state", "action")}
    for name, codec, features in (("recorded_h264", "h264", FEATURES), ("recorded_av1", "libsvtav1", few)):
        shutil.rmtree(HERE / name, ignore_errors=True)
        fill(LeRobotDataset.create(f"golden/{name}", FPS, features, HERE / name, "golden", vcodec=codec), features)
        for folder in ("images", "tmp"): shutil.rmtree(HERE / name / folder, ignore_errors=True)


def collect(dataset_class, root, **options):
    "Tensors that a reader returns: whole columns, sampled frames, windows, and a filtered episode."
    plain, out = dataset_class("golden/x", root=root, **options), {}
    windows = dataset_class("golden/x", root=root, delta_timestamps=OFFSETS, **options)
    second = dataset_class("golden/x", root=root, episodes=[1], delta_timestamps=OFFSETS, **options)
    for tag, ds, indices in (("plain", plain, SAMPLES), ("window", windows, SAMPLES), ("second", second, (0, 4))):
        for i in indices:
            for key, value in ds[i].items():
                if key == "task": continue
                if key in (CAMERA, EYE): value = (value * 255).round().byte()[..., ::4, ::4]
                out[f"{tag}.{i}.{key}"] = value.contiguous()
    return out, {"tasks": "|".join(plain[i]["task"] for i in range(len(plain))), "frames": str(len(plain))}


def read():
    "Read every dataset with LeRobot and keep what it returns."
    from lerobot.datasets.lerobot_dataset import LeRobotDataset
    from safetensors.torch import save_file
    for name in ("written", "recorded_h264", "recorded_av1"):
        tensors, notes = collect(LeRobotDataset, HERE / name, video_backend="torchcodec")
        save_file(tensors, HERE / f"{name}.safetensors", notes)
        print(name, len(tensors), "tensors")
    shutil.copy(HERE / "written" / VIDEO, HERE / "written.mp4")
    shutil.rmtree(HERE / "written")


if __name__ == "__main__": {"write": write, "record": record, "read": read}[sys.argv[1]]()
