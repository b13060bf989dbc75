"CRaFT in the real loop: `python craft_ranks.py OUT CACHE key=value ...`, also under torchrun."
import json
import os
import sys
from pathlib import Path

import torch

from vla_nb.craft.anchors import build_cache
from vla_nb.craft.constraint import craft_config
from vla_nb.craft.hook import CraftHook
from vla_nb.policies.fake import FakePolicy, fake_batch
from vla_nb.training.loop import LoopConfig, TrainRun
from vla_nb.training.optim import OptimConfig

ROWS, LONG = 8, "please answer the following long question about this small scene now ?"


def teacher():
    torch.manual_seed(0)
    return FakePolicy()


def rows_of(raw, keep): return {k: v[keep] if torch.is_tensor(v) else [v[i] for i in keep] for k, v in raw.items()}


def make_cache(out, mode, **how):
    "Anchors in two shards; the prompts of the second are much longer."
    policy = teacher()

    def batches(start):
        for a in range(start, 24, 12):
            raw = fake_batch(12, seed=a)
            if a: raw["task"] = [LONG if q is not None else t for t, q in zip(raw["task"], raw["answer"])]
            del raw["action"]
            yield policy.preprocessor(raw), [{"kind": "frame", "index": a + i} for i in range(12)]
    return build_cache(out, batches, policy, mode, shard_size=12, **how)


def task_batches(policy, rank, ranks):
    "This rank's rows of every batch: the first half asks for actions, the second holds questions, so padding differs."
    def stream(start):
        k = start
        while True:
            raw = fake_batch(ROWS, seed=1000 + k)
            raw["action"] = -raw["action"]
            n = ROWS // ranks
            yield policy.preprocessor(rows_of(raw, list(range(rank * n, (rank + 1) * n))))
            k += 1
    return stream


def train(out, cache, resume=None, steps=6, save_freq=0, optimizer="sgd", lr=0.05, anchors=8, **craft):
    "Train the fake policy with CRaFT."
    ranks, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    policy = FakePolicy.from_pretrained(resume / "pretrained_model") if resume else teacher()
    config = craft_config({"enabled": True, "anchor_cache_dir": str(cache), "anchor_batch_size": anchors // ranks,
                           "epsilon_start": 0.01, "epsilon_end": 0.001, "lambda_lr": 5.0, **craft})
    loop = LoopConfig(steps=steps, batch_size=ROWS // ranks, log_freq=100, save_freq=save_freq, seed=3)
    run = TrainRun(policy, OptimConfig(type=optimizer, lr=lr, warmup_steps=0, weight_decay=0.0), loop,
                   task_batches(policy, rank, ranks), out, [CraftHook(config)])
    if resume: run.load(resume)
    assert run.train() == "done"
    return run


def group_threads():
    "Threads of a process group that still run in this process."
    names = [task.joinpath("comm").read_text() for task in Path("/proc/self/task").iterdir()]
    return sum("gloo" in name for name in names)


def main():
    torch.set_num_threads(1)
    options = {k: json.loads(v) if v[0] in "-0123456789tf[" and v != "token_kl" and v != "token_ce" else v
               for k, v in (w.split("=", 1) for w in sys.argv[3:])}
    run = train(Path(sys.argv[1]), Path(sys.argv[2]), **options)
    run.close()
    if run.main: print(json.dumps({"world_size": run.world_size, "left": group_threads()}))


if __name__ == "__main__": main()
