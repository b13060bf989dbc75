"""Make changed.safetensors for tests/test_viz.py: what LeRobot's image transforms (torchvision 0.28.0) do to a picture.

    python make.py       with lerobot 0.4.4 installed, as tests/goldens/lerobot_dataset/make.py describes

Factors lie at both ends of LeRobot's ranges; `default` is its default configuration as JSON.
"""
import json
from dataclasses import asdict
from pathlib import Path

import torch
from lerobot.datasets.transforms import ImageTransformsConfig
from safetensors.torch import save_file
from torchvision.transforms.v2 import functional as F

FACTORS = {"brightness": (0.8, 1.2), "contrast": (0.8, 1.2), "saturation": (0.5, 1.5), "hue": (-0.05, 0.05),
           "sharpness": (0.5, 1.5)}
MOVES = ((-5.0, (1, 0)), (4.0, (-1, 1)), (0.0, (0, -1)))


def picture():
    "Ramps and a square, float [3, 20, 24] in [0, 1]."
    v, u = torch.meshgrid(torch.linspace(0, 1, 20), torch.linspace(0, 1, 24), indexing="ij")
    image = torch.stack([u, v, 0.3 + 0.4 * u * v])
    image[:, 5:12, 8:15] = torch.tensor([0.9, 0.2, 0.1])[:, None, None]
    return image


if __name__ == "__main__":
    image = picture()
    out = {f"{k}_{f}": getattr(F, f"adjust_{k}")(image, f) for k, fs in FACTORS.items() for f in fs}
    out |= {f"affine_{d}_{x}_{y}": F.affine(image, d, [x, y], 1.0, [0.0, 0.0]) for d, (x, y) in MOVES}
    note = {"default": json.dumps(asdict(ImageTransformsConfig()))}
    save_file({k: v.contiguous() for k, v in out.items()}, Path(__file__).parent / "changed.safetensors", note)
