"""Choose the learning rate of fine-tuning: plain SFT from a study's θ0, judged by held-out new-task loss alone.

    python benchmarks/sft_sweep.py --seed=0 --rates=2e-4,5e-4,1e-3,2e-3

Rule: the gentlest rate whose held-out new-task loss is within 5 % of the best. Development accuracy stands beside it for
information; it does not enter the choice. Writes reports/benchmarks/sft_sweep.json. Needs θ0 (`make demo`).
"""
import dataclasses, shutil, sys
from pathlib import Path

from vla_nb.apps.study import Study, StudyConfig, run_command
from vla_nb.core.config import parse_flags
from vla_nb.core.files import read_json, write_json
from vla_nb.core.settings import settings
from vla_nb.evaluation.mcq import evaluate_mcq
from vla_nb.evaluation.offline import heldout_losses
from vla_nb.policies.store import load_policy

WITHIN = 1.05


def measure(study: Study, rate: float) -> dict:
    "Train SFT at one rate (once) and measure it."
    out = study.root / "sweep" / f"sft_{rate:g}"
    c = dataclasses.replace(study.c, lr=rate)
    command = Study(c, study.root, None).by_name["sft"].command
    command = [f"--output_dir={out}" if w.startswith("--output_dir=") else w for w in command]
    if not (out / "summary.json").exists():
        shutil.rmtree(out, ignore_errors=True)
        run_command(command, study.root / "sweep" / f"sft_{rate:g}.log")
    policy = load_policy(out)
    held = heldout_losses(policy, study.data / c.dataset, old=c.old_tasks, new=(c.new_task,), actions=False)
    asked = evaluate_mcq(policy, study.data / c.questions / "dev.jsonl", end_token=True)
    return dict(rate=rate, steps=c.steps, heldout_new_loss=held["new"], heldout_old_loss=held["old"],
                dev_accuracy=asked["accuracy"])


def main(argv: list[str]) -> int:
    "Sweep, choose, write."
    flags = parse_flags(argv)
    rates = [float(r) for r in str(flags.get("rates", "2e-4,5e-4,1e-3,2e-3")).split(",")]
    c = StudyConfig(seed=int(flags.get("seed", 0)))
    study = Study(c, Path(settings().outputs) / "demo" / f"seed{c.seed}", None)
    if not study.record("theta0"): study.run("theta0")
    (study.root / "sweep").mkdir(exist_ok=True)
    rows = [measure(study, r) for r in rates]
    best = min(r["heldout_new_loss"] for r in rows)
    chosen = min(r["rate"] for r in rows if r["heldout_new_loss"] <= WITHIN * best)
    write_json(Path(settings().reports) / "benchmarks" / "sft_sweep.json", dict(
        rows=rows, rule=f"the gentlest rate within a factor {WITHIN} of the lowest held-out new-task loss", chosen=chosen,
        used=c.lr, seed=c.seed, revision=read_json(study.root / "theta0" / "params.json")["revision"]))
    for r in rows: print("  ".join(f"{k} {v:.4g}" for k, v in r.items()), "<- chosen" if r["rate"] == chosen else "")
    return 0


if __name__ == "__main__": sys.exit(main(sys.argv[1:]))
