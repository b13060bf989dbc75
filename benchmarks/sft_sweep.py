"""Choose the learning rate of fine-tuning: plain SFT, judged by held-out new-task loss alone.

    python benchmarks/sft_sweep.py --seeds=8,9 --rates=5e-4,1e-3,2e-3,4e-3

Rule: among the rates below θ0's own peak rate, the gentlest whose held-out new-task loss exceeds the lowest by no more than one
standard error of the difference, paired over seeds (a θ0 and a fine-tuning run each) and held-out episodes. Faster rates are
measured and shown, but not eligible. Development accuracy stands beside it for information; it does not enter the choice. The
default seeds are not the headline's. Writes reports/benchmarks/sft_sweep.json.
"""
import dataclasses, shutil, sys
from pathlib import Path

import numpy as np

from vla_nb.apps.study import Study, StudyConfig, run_command
from vla_nb.core.config import parse_flags
from vla_nb.core.files import read_json, write_json
from vla_nb.core.settings import settings
from vla_nb.datasets.lerobot import DatasetMetadata, select_episodes
from vla_nb.envs.metaworld import TASKS
from vla_nb.evaluation.mcq import evaluate_mcq
from vla_nb.evaluation.offline import heldout_losses
from vla_nb.policies.store import load_policy


def measure(study: Study, rate: float) -> dict:
    "Train SFT at one rate (once) and measure it."
    out = study.root / "sweep" / f"sft_{rate:g}"
    c = dataclasses.replace(study.c, lr=rate)
    command = Study(c, study.root, None).by_name["sft"].command
    command = [f"--output_dir={out}" if w.startswith("--output_dir=") else w for w in command]
    if not (out / "summary.json").exists():
        shutil.rmtree(out, ignore_errors=True)
        run_command(command, out.with_suffix(".log"))
    policy, data = load_policy(out), study.data / c.dataset
    mine = select_episodes(DatasetMetadata(data), "test", TASKS[c.new_task])
    each = [heldout_losses(policy, data, episodes=str(e), new=(c.new_task,), actions=False)["new"] for e in mine]
    held = heldout_losses(policy, data, old=c.old_tasks, new=(c.new_task,), actions=False)
    asked = evaluate_mcq(policy, study.data / c.questions / "dev.jsonl", end_token=True)
    return dict(seed=c.seed, heldout_new_loss=held["new"], heldout_old_loss=held["old"], dev_accuracy=asked["accuracy"],
                episode_losses=each)


def choose(rows: list[dict], below: float) -> dict:
    "Apply the rule; adds to each row its difference to the best and that difference's standard error."
    losses = lambda r: np.concatenate([run["episode_losses"] for run in r["runs"]])
    best = min((r for r in rows if r["rate"] < below), key=lambda r: r["heldout_new_loss"])
    for r in rows:
        d = losses(r) - losses(best)
        r.update(excess=float(d.mean()), standard_error=float(d.std(ddof=1) / len(d) ** 0.5))
    return min((r for r in rows if r["rate"] < below and r["excess"] <= r["standard_error"]), key=lambda r: r["rate"])


def main(argv: list[str]) -> int:
    "Sweep, choose, write."
    flags = parse_flags(argv)
    rates = [float(r) for r in str(flags.get("rates", "5e-4,1e-3,2e-3,4e-3")).split(",")]
    seeds = [int(k) for k in str(flags.get("seeds", "8,9")).split(",")]
    runs = {r: [] for r in rates}
    for seed in seeds:
        c = StudyConfig(seed=seed)
        study = Study(c, Path(settings().outputs) / "headline" / f"seed{seed}", None)
        if not study.record("theta0"): study.run("theta0")
        (study.root / "sweep").mkdir(exist_ok=True)
        for r in rates: runs[r].append(measure(study, r))
    mean = lambda r, key: float(np.mean([run[key] for run in runs[r]]))
    rows = [dict(rate=r, steps=c.steps, random_shift=c.random_shift, runs=runs[r],
                 **{k: mean(r, k) for k in ("heldout_new_loss", "heldout_old_loss", "dev_accuracy")}) for r in rates]
    best = choose(rows, c.base_lr)
    write_json(Path(settings().reports) / "benchmarks" / "sft_sweep.json", dict(
        rows=rows, chosen=best["rate"], seeds=seeds, revision=read_json(study.root / "theta0" / "params.json")["revision"],
        rule=f"below θ0's peak rate {c.base_lr:g}: gentlest rate whose held-out new-task loss is within one standard error "
             "of the lowest, paired over seeds and held-out episodes"))
    for r in rows:
        print("  ".join(f"{k} {v:.4g}" for k, v in r.items() if k != "runs"), "<- chosen" if r is best else "")
    return 0


if __name__ == "__main__": sys.exit(main(sys.argv[1:]))
