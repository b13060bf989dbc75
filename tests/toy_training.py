"""A tiny policy trained by the real loop: `python toy_training.py OUT key=value ...`, also under torchrun."""
import json
import os
import resource
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from vla_nb.core.hooks import TrainingHook
from vla_nb.core.types import UserError
from vla_nb.training.loop import LoopConfig, TrainRun
from vla_nb.training.optim import OptimConfig
from vla_nb.training.state import last_checkpoint


class Toy(nn.Module):
    "Masked regression with an optional dropout and a head that only some batches use."
    def __init__(self, dropout=0.0):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Dropout(dropout))
        self.head, self.rare = nn.Linear(16, 3), nn.Linear(16, 3)

    def optim_groups(self, lr, weight_decay): return [{"params": list(self.parameters()), "weight_decay": weight_decay}]

    def outputs(self, x, rare): return (self.rare if rare else self.head)(self.body(x))

    def loss_terms(self, batch):
        rare = bool(batch["step"][0] % 3 == 2)                       # the same head on every rank
        error = (self.outputs(batch["x"], rare) - batch["y"]) ** 2 * batch["valid"][..., None]
        return error.sum(), batch["valid"].sum() * 3, {"rare": float(rare)}

    def save_pretrained(self, path):
        Path(path).mkdir(parents=True, exist_ok=True)
        save_file(self.state_dict(), Path(path) / "model.safetensors")


class Retain(TrainingHook):
    "A second loss through the wrapper, a controlled weight, and every gradient written to a file."
    name = "retain"

    def __init__(self): self.weight, self.trace = 1.0, []

    def on_gradients(self, run):
        names = [n for n, p in run.params if p.grad is not None]
        task = [p.grad for _, p in run.params if p.grad is not None]
        save_file(dict(zip(names, task)), run.out_dir / f"grad-{run.step}-{run.rank}.safetensors")
        run.optimizer.zero_grad(set_to_none=True)
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(run.step))[run.rank::run.world_size]
        out = run.call("outputs", x, False)
        run.backward((out ** 2).mean())
        retain = {n: p.grad for n, p in run.params if p.grad is not None}
        dot = sum(float((g.double() * retain[n].double()).sum()) for n, g in zip(names, task) if n in retain)
        for n, p in run.params:
            g = dict(zip(names, task)).get(n)
            if g is not None: p.grad = g if p.grad is None else p.grad.mul_(0.01 * self.weight).add_(g)
        return {"dot": dot}

    def on_update(self, run):
        self.weight *= 0.97
        self.trace.append(self.weight)
        return {"lambda": self.weight}

    def state_dict(self): return {"weight": self.weight, "trace": self.trace}
    def load_state_dict(self, d): self.weight, self.trace = d["weight"], list(d["trace"])


def micro_batches(start, size, parts=1, part=0, pause=0.0):
    "Micro-batch k, or one rank's part of it; the second half of each is mostly padding."
    k = start
    while True:
        g = torch.Generator().manual_seed(k)
        x, valid = torch.randn(size, 5, 4, generator=g), torch.ones(size, 5)
        valid[size // 2:, 1:] = 0
        batch = {"x": x, "y": torch.randn(size, 5, 3, generator=g), "valid": valid, "step": torch.full((size,), k)}
        n = size // parts
        time.sleep(pause)
        yield {key: v[part * n:(part + 1) * n] for key, v in batch.items()}
        k += 1


def limit_after_checkpoint(out, size):
    "From the first checkpoint on, no file may become larger than `size` bytes."
    if last_checkpoint(out): resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def main(out, **o):
    torch.set_num_threads(1)
    torch.manual_seed(7)
    ranks, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    accumulation = o.get("accumulation", 1)
    policy, size = Toy(o.get("dropout", 0.0)), o.get("size", 16)
    resume = last_checkpoint(out) if o.get("resume") else None
    if resume: policy.load_state_dict(load_file(resume / "pretrained_model/model.safetensors"))
    loop = LoopConfig(steps=o.get("steps", 5), batch_size=size // ranks // accumulation, log_freq=5, seed=3,
                      gradient_accumulation_steps=accumulation, save_freq=o.get("save_freq", 0),
                      mixed_precision=o.get("precision", "no"))

    def batches(start):
        per = accumulation * ranks                                   # a big batch is cut into micro-batches, then ranks
        whole = micro_batches(start // accumulation, size, pause=o.get("pause", 0.0))
        for big in whole:
            if o.get("limit"): limit_after_checkpoint(out, o["limit"])
            for m in range(accumulation):
                n = size // per
                i = rank * accumulation + m
                yield {key: v[i * n:(i + 1) * n] for key, v in big.items()}

    run = TrainRun(policy, OptimConfig(type=o.get("optimizer", "sgd"), lr=0.05, warmup_steps=2, weight_decay=0.0),
                   loop, batches, out, [Retain()] if o.get("hook") else [], config={"toy": True})
    if resume: run.load(resume)
    ended = run.train()
    if run.main: print(json.dumps({"ended": ended, "world_size": run.world_size}))
    run.close()
    return 0 if ended == "done" else 1


if __name__ == "__main__":
    read = lambda text: json.loads(text) if text[0] in "0123456789.tf" else text
    try: sys.exit(main(Path(sys.argv[1]), **{k: read(v) for k, v in (a.split("=") for a in sys.argv[2:])}))
    except UserError as e: sys.exit(f"error: {e}")
