"""The memory plan against the counted peak of a real step, for three configurations, each in a process of its own.

    python benchmarks/memory_plan.py            writes reports/benchmarks/memory_plan.json
"""
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from vla_nb.core.files import read_json, write_json
from vla_nb.datasets.fake import fake_dataset

ROOT = Path(__file__).resolve().parents[1]
PI0_FAST = ["--policy.type=pi0_fast", "--policy.preset=tiny"]
CONFIGS = {
    "ACT, ResNet-18 at 96 pixels, batch 8": ["--policy.type=act", "--policy.pretrained_backbone_weights=none", "--batch_size=8",
                                             "--policy.dim_model=256", "--policy.chunk_size=20", "--policy.n_action_steps=20"],
    "pi0_fast tiny, batch 32": [*PI0_FAST, "--batch_size=32"],
    "pi0_fast tiny, batch 8 x 4, average, bf16": [*PI0_FAST, "--batch_size=8", "--gradient_accumulation_steps=4", "--ema.enable=true",
                                                  "--mixed_precision=bf16"],
}


def measure(folder, name, words):
    "Plan and peak of one configuration."
    out = folder / f"run{len(list(folder.iterdir()))}"
    command = [sys.executable, "-m", "vla_nb", "train", f"--output_dir={out}", f"--dataset.root={folder / 'demos'}", "--steps=2",
               "--seed=0", "--device=cpu", "--threads=1", *words]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "VLA_NB_CACHE_ROOT": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, cwd=folder, env=env, stdout=subprocess.DEVNULL)
    planned, counted = read_json(out / "plan.json")["peak"], read_json(out / "summary.json")["peak_bytes"]
    print(f"{name}: planned {planned / 2**20:.1f} MiB, counted {counted / 2**20:.1f} MiB, ratio {planned / counted:.3f}", flush=True)
    return [name, planned / 2**20, counted / 2**20, planned / counted]


def main():
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        fake_dataset(folder / "demos", episodes=3, frames=24, cameras=("laptop", "phone"), size=(96, 96))
        found = [measure(folder, name, words) for name, words in CONFIGS.items()]
    verdicts = [{"what": f"{name}: |planned / counted - 1|", "value": abs(ratio - 1), "target": 0.15, "at": "most",
                 "met": abs(ratio - 1) <= 0.15} for name, _, _, ratio in found]
    write_json(ROOT / "reports/benchmarks/memory_plan.json", {
        "command": "python benchmarks/memory_plan.py", "device": "cpu", "verdicts": verdicts,
        "about": "The most bytes of tensors alive at once in a training step: planned before the first step, and counted in the second.",
        "table": {"head": ["configuration", "planned, MiB", "counted, MiB", "ratio"], "rows": found}})


if __name__ == "__main__": main()
