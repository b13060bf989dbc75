"""Golden RLDS data, written and read by tfds itself; run in an environment of its own:

    pip install tensorflow-cpu==2.21.0 tensorflow-datasets==4.9.10 simplejpeg==1.9.0
    python tests/goldens/rlds/make.py          # writes tiny/, steps.json and order.json beside this file
    python tests/goldens/rlds/make.py FOLDER   # prints what tfds reads from FOLDER, as in steps.json

tiny/       a data set of 7 episodes in 3 shards: nested features, JPEG and PNG pictures, texts, tensors of every encoding
steps.json  for every episode, in the order in which tfds reads, a digest of every value of every step
order.json  the order in which tfds reads the records of 20 uneven shards
"""
import hashlib
import io
import json
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import simplejpeg
import tensorflow as tf
import tensorflow_datasets as tfds
from PIL import Image

HERE = Path(__file__).resolve().parent
F = tfds.features


def picture(rng, h, w, c=3, top=255):
    "A smooth picture with some noise."
    y, x = np.mgrid[0:h, 0:w]
    waves = np.stack([np.sin(x / rng.uniform(2, 9) + k) + np.cos(y / rng.uniform(2, 9)) for k in range(c)], -1)
    return np.clip((waves + 2) / 4 * top + rng.normal(0, top / 40, (h, w, c)), 0, top)


def file_of(rng, i):
    "Encoded pictures of several kinds and sizes."
    pixels = picture(rng, 17 + i % 5, 23 + 2 * (i % 3)).astype(np.uint8)
    if i % 6 == 4:
        out = io.BytesIO()
        Image.fromarray(pixels).quantize(16).save(out, "png")
        return out.getvalue()
    if i % 6 == 5:
        out = io.BytesIO()
        Image.fromarray(pixels).save(out, "jpeg", progressive=True, quality=70)
        return out.getvalue()
    if i % 6 == 3: return simplejpeg.encode_jpeg(pixels[..., :1].copy(), colorspace="GRAY")
    return simplejpeg.encode_jpeg(pixels, quality=60 + 13 * (i % 3), colorsubsampling=("444", "422", "420")[i % 3])


def step(rng, i, n, e):
    "One step."
    return {
        "observation": {
            "image": picture(rng, 24, 40).astype(np.uint8), "wrist_image": picture(rng, 15, 13).astype(np.uint8),
            "file": file_of(rng, i + 2 * e), "gray": picture(rng, 9, 11, 1).astype(np.uint8),
            "depth": picture(rng, 8, 10, 1, 65535).astype(np.uint16), "colour16": picture(rng, 6, 7, 3, 65535).astype(np.uint16),
            "metres": rng.normal(size=(5, 6, 1)).astype(np.float32), "alpha": picture(rng, 6, 7, 4).astype(np.uint8),
            "state": rng.normal(size=8).astype(np.float32)},
        "action": rng.normal(size=7).astype(np.float32), "language_instruction": "push the block — näher",
        "reward": np.float32(i == n - 1), "discount": np.float32(1), "is_first": i == 0, "is_last": i == n - 1,
        "is_terminal": i == n - 1,
        "more": {
            "count": int(rng.integers(-2**62, 2**62)), "small": rng.integers(-100, 100, 3).astype(np.int8),
            "bits": rng.integers(0, 2, (2, 3)).astype(bool), "large": np.uint64(2**64 - 1 - i), "double": rng.normal(size=2),
            "half": rng.normal(size=2).astype(np.float16), "field": rng.normal(size=(20, 15)).astype(np.float32),
            "map": rng.integers(0, 70000, (12, 25)).astype(np.int32), "raw": rng.normal(size=(3, 2)), "name": f"{i}".encode(),
            "zipped": rng.integers(0, 9, (4, 5)).astype(np.int32), "free": rng.normal(size=(1 + i % 3, 2 + i % 2)).astype(np.float32),
            "words": ["a"] * (i % 3) + ["b" * i], "boxes": rng.normal(size=(i % 4, 4)).astype(np.float32),
            "views": [picture(rng, 6, 8).astype(np.uint8) for _ in range(1 + i % 2)], "label": ["left", "right"][i % 2]},
    }


FEATURES = F.FeaturesDict({
    "steps": F.Dataset({
        "observation": {
            "image": F.Image(shape=(24, 40, 3), encoding_format="jpeg"), "wrist_image": F.Image(shape=(15, 13, 3)),
            "file": F.Image(), "gray": F.Image(shape=(9, 11, 1), encoding_format="jpeg"),
            "depth": F.Image(shape=(8, 10, 1), dtype=np.uint16, encoding_format="png"),
            "colour16": F.Image(shape=(6, 7, 3), dtype=np.uint16, encoding_format="png"),
            "metres": F.Image(shape=(5, 6, 1), dtype=np.float32), "alpha": F.Image(shape=(6, 7, 4)),
            "state": F.Tensor(shape=(8,), dtype=np.float32, doc="position, rotation, fingers")},
        "action": F.Tensor(shape=(7,), dtype=np.float32), "language_instruction": F.Text(),
        **{k: F.Scalar(dtype=np.float32) for k in ("reward", "discount")},
        **{k: F.Scalar(dtype=np.bool_) for k in ("is_first", "is_last", "is_terminal")},
        "more": {
            "count": F.Scalar(dtype=np.int64), "small": F.Tensor(shape=(3,), dtype=np.int8),
            "bits": F.Tensor(shape=(2, 3), dtype=np.bool_), "large": F.Scalar(dtype=np.uint64),
            "double": F.Tensor(shape=(2,), dtype=np.float64), "half": F.Tensor(shape=(2,), dtype=np.float16),
            "field": F.Tensor(shape=(20, 15), dtype=np.float32), "map": F.Tensor(shape=(12, 25), dtype=np.int32),
            "raw": F.Tensor(shape=(3, 2), dtype=np.float64, encoding="bytes"), "name": F.Tensor(shape=(), dtype=np.object_),
            "zipped": F.Tensor(shape=(4, 5), dtype=np.int32, encoding="zlib"),
            "free": F.Tensor(shape=(None, None), dtype=np.float32, encoding="bytes"),
            "words": F.Sequence(F.Text()), "boxes": F.Sequence(F.Tensor(shape=(4,), dtype=np.float32)),
            "views": F.Sequence(F.Image(shape=(6, 8, 3), encoding_format="jpeg")),
            "label": F.ClassLabel(names=["left", "right"])}}),
    "episode_metadata": {"file_path": F.Text(), "number": F.Scalar(dtype=np.int32), "marks": F.Sequence(np.int64),
                         "still": F.Image(shape=(6, 8, 3), encoding_format="jpeg"), "tags": F.Sequence(F.Text())}})


class Tiny(tfds.core.GeneratorBasedBuilder):
    "The data set."
    VERSION = tfds.core.Version("1.0.0")

    def _info(self): return tfds.core.DatasetInfo(builder=self, features=FEATURES)
    def _split_generators(self, _): return {"train": self._generate_examples()}

    def _generate_examples(self):
        for e in range(7):
            rng = np.random.default_rng(e)
            n = 2 + e % 3
            yield e, {"steps": [step(rng, i, n, e) for i in range(n)],
                      "episode_metadata": {"file_path": f"demo_{e}.hdf5", "number": e - 3, "marks": list(range(e)),
                                           "still": picture(rng, 6, 8).astype(np.uint8), "tags": ["x"] * (e % 2)}}


class Order(tfds.core.GeneratorBasedBuilder):
    "Numbers only, in many shards."
    VERSION = tfds.core.Version("1.0.0")

    def _info(self): return tfds.core.DatasetInfo(builder=self, features=F.FeaturesDict({"n": np.int64}))
    def _split_generators(self, _): return {"train": ((i, {"n": i}) for i in range(505))}
    def _generate_examples(self): pass


def digest(x):
    "Short hash of type, shape and bits of a value."
    if isinstance(x, bytes): return hashlib.sha256(b"bytes" + x).hexdigest()[:12]
    a = np.asarray(x)
    if a.dtype == object: return [digest(v) for v in a]
    return hashlib.sha256(f"{a.dtype} {a.shape}".encode() + np.ascontiguousarray(a).tobytes()).hexdigest()[:12]


def digests(x):
    "The same for a tree."
    if isinstance(x, dict): return {k: digests(v) for k, v in x.items()}
    return digest(x.to_tensor().numpy() if isinstance(x, tf.RaggedTensor) else x)


def episodes(root):
    "What tfds reads."
    out = []
    for episode in tfds.builder_from_directory(str(root)).as_dataset(split="train"):
        steps = [digests(s) for s in tfds.as_numpy(episode.pop("steps"))]
        out.append({"steps": steps, **digests(tfds.as_numpy(episode))})
    return out


def build(cls, box, shards):
    "Let tfds write a data set; its folder."
    builder = cls(data_dir=str(box))
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(num_shards=shards))
    return Path(builder.data_dir)


def main():
    if len(sys.argv) > 1:
        print(json.dumps(episodes(Path(sys.argv[1]))))
        return
    with tempfile.TemporaryDirectory() as box:
        tiny, order = build(Tiny, box, 3), build(Order, box, 20)
        shutil.rmtree(HERE / "tiny", ignore_errors=True)
        shutil.copytree(tiny, HERE / "tiny/1.0.0")
        (HERE / "steps.json").write_text(json.dumps(episodes(tiny)))
        files = sorted(order.glob("*.tfrecord*"))
        # uneven shards: some longer than a block, one exactly a block, one empty of its second half
        lengths, stored = [], []
        for i, path in enumerate(files):
            records = list(tf.data.TFRecordDataset(str(path)).as_numpy_iterator())[:[40, 16, 3, 17, 32, 25, 1, 24][i % 8]]
            with tf.io.TFRecordWriter(str(path)) as out:
                for r in records: out.write(r)
            lengths.append(len(records))
            stored += [tf.train.Example.FromString(r).features.feature["n"].int64_list.value[0] for r in records]
        info = json.loads((order / "dataset_info.json").read_text())
        info["splits"][0]["shardLengths"] = [str(n) for n in lengths]
        (order / "dataset_info.json").write_text(json.dumps(info))
        read = [int(x["n"]) for x in tfds.as_numpy(tfds.builder_from_directory(str(order)).as_dataset(split="train"))]
        place = {n: i for i, n in enumerate(stored)}
        (HERE / "order.json").write_text(json.dumps({"lengths": lengths, "order": [place[n] for n in read]}))


if __name__ == "__main__": main()
