"""What CRaFT costs: step time and peak memory over plain fine-tuning, at about 1 M and at 50 M parameters.

python benchmarks/craft_step.py [--steps=50] [--threads=2] [--only=tiny]
prints the ratios against their targets and writes reports/benchmarks/craft_step.json (not with --only).
"""
import gc
import platform
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from vla_nb.core.config import parse_flags
from vla_nb.core.files import write_json
from vla_nb.core.stats import Stats, compute_stats
from vla_nb.core.types import Feature
from vla_nb.craft.anchors import build_cache
from vla_nb.craft.constraint import CraftConfig
from vla_nb.craft.hook import CraftHook
from vla_nb.policies.pi0_fast import Pi0FastConfig, Pi0FastPolicy
from vla_nb.training.loop import LoopConfig, TrainRun
from vla_nb.training.memory import peak_tensor_bytes
from vla_nb.training.optim import OptimConfig

CAMERAS = ("observation.images.corner", "observation.images.top")
SIZES = {"tiny": (dict(), 48),  # name -> (changes to the tiny policy, batch size)
         "50M": (dict(width=512, depth=12, mlp_dim=2048, num_heads=8, num_kv_heads=8, head_dim=64), 4)}
TARGETS = {"equal": 2.1, "half": 1.6, "memory": 1.05, "select_action": 1.05}
WARM_UP = 3  # steps that are not timed; the loop measures its own peak in the second


def make_policy(sizes):
    "A randomly initialised policy with its tokenizer and codec."
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    chunks = np.cumsum(rng.normal(size=(300, 8, 4)) * 0.1, 1).astype(np.float32)
    stats = Stats({"observation.state": compute_stats(rng.normal(size=(300, 4)).astype(np.float32)),
                   "action": compute_stats(chunks.reshape(-1, 4))})
    features = {**{c: Feature("VISUAL", (3, 64, 64)) for c in CAMERAS}, "observation.state": Feature("STATE", (4,)),
                "action": Feature("ACTION", (4,))}
    texts = ["press the button", "open the door", "Is the door open or closed?", "open", "closed"]
    return Pi0FastPolicy.from_data(Pi0FastConfig.tiny(features, **sizes), texts, chunks, stats)


def raw_batch(n, seed, questions):
    "Random pictures and smooth random action chunks; the last `questions` rows are questions."
    g = torch.Generator().manual_seed(seed)
    asked = [i >= n - questions for i in range(n)]
    return {**{c: torch.randint(0, 256, (n, 3, 64, 64), generator=g, dtype=torch.uint8) for c in CAMERAS},
            "observation.state": torch.randn(n, 4, generator=g),
            "action": (torch.randn(n, 8, 4, generator=g) * 0.1).cumsum(1),
            "task": ["Is the door open or closed?" if q else "press the button" for q in asked],
            "answer": ["open" if q else None for q in asked]}


def anchors(policy, out, n=192):
    "Half tasks, half questions, with targets as long as real ones (an untrained teacher would babble)."
    def batches(start):
        for a in range(start, n, 48):
            batch = policy.preprocessor(raw_batch(48, a, 24))
            batch |= {"given.tokens": batch["suffix.tokens"], "given.mask": batch["suffix.loss_mask"]}
            yield batch, [{"kind": "frame", "index": a + i} for i in range(48)]
    return build_cache(out, batches, policy, "token", shard_size=48)


def make_run(sizes, batch, out, cache=None, anchor_batch=0):
    "A training run, ready for its first step; CRaFT when a cache is given."
    policy = make_policy(sizes)
    hooks = []
    if cache is not None:
        hooks = [CraftHook(CraftConfig(enabled=True, retention_mode="token_kl", anchor_batch_size=anchor_batch,
                                       anchor_cache_dir=str(cache.path), layer_cosine_freq=0))]
    batches = [policy.preprocessor(raw_batch(batch, 1000 + i, batch // 2)) for i in range(4)]
    def stream(start):
        while True: yield from batches
    loop = LoopConfig(steps=10 ** 6, batch_size=batch, log_freq=10 ** 6, save_freq=0)
    run = TrainRun(policy, OptimConfig(lr=1e-5, warmup_steps=0), loop, stream, out, hooks)
    run.prepare()
    run.batch_stream = stream(0)
    return run


def step_seconds(run):
    "One optimizer step."
    begun = time.perf_counter()
    run.one_step(run.batch_stream)
    run.step += 1
    return time.perf_counter() - begun


def interleaved(functions, n):
    "Seconds of n calls of each function, taking turns, so that other load hits all of them alike."
    seconds = {name: [] for name in functions}
    for _ in range(n):
        for name, f in functions.items(): seconds[name].append(f())
    return seconds


def spread(values):
    "Median and range."
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "n": len(values)}


def peak_over_gradient(runs):
    "Extra peak of each CRaFT run over the plain one, in bytes and in gradients."
    peaks = {}
    for run in runs.values(): run.optimizer.zero_grad(set_to_none=True)
    for name, run in runs.items():
        batches = run.fetch(run.batch_stream)
        gc.collect()
        peaks[name] = peak_tensor_bytes(lambda: run.optimizer_step(batches))[1]
        run.optimizer.zero_grad(set_to_none=True)
    gradient = sum(p.numel() * p.element_size() for _, p in runs["sft"].params)
    extra = {name: peaks[name] - peaks["sft"] for name in runs if name != "sft"}
    return {"gradient_bytes": gradient, "peak_bytes": peaks, "extra_bytes": extra,
            "extra_over_gradient": {name: b / gradient for name, b in extra.items()}}


def decoding(policy, n):
    "select_action against predict_action_chunk on one observation."
    policy.eval()
    batch = policy.preprocessor(raw_batch(1, 5, 0))
    def timed(f):
        begun = time.perf_counter()
        with torch.no_grad(): f(batch)
        return time.perf_counter() - begun
    def select(b):
        policy.reset()
        return policy.select_action(b)
    interleaved({"a": lambda: timed(select), "b": lambda: timed(policy.predict_action_chunk)}, 3)
    found = interleaved({"select": lambda: timed(select), "bare": lambda: timed(policy.predict_action_chunk)}, n)
    ratio = statistics.median(found["select"]) / statistics.median(found["bare"])
    return {**{k: spread(v) for k, v in found.items()}, "ratio": ratio}


def measure(name, steps, folder):
    "All figures of one size."
    sizes, batch = SIZES[name]
    cache = anchors(make_policy(sizes), folder / "anchors")
    runs = {"sft": make_run(sizes, batch, folder / "sft"),
            "equal": make_run(sizes, batch, folder / "equal", cache, batch),
            "half": make_run(sizes, batch, folder / "half", cache, batch // 2)}
    timed = {n: (lambda r=r: step_seconds(r)) for n, r in runs.items()}
    interleaved(timed, WARM_UP)
    seconds = interleaved(timed, steps)
    base = statistics.median(seconds["sft"])
    return {"parameters": sum(p.numel() for _, p in runs["sft"].params), "batch": batch,
            "step_s": {n: spread(s) for n, s in seconds.items()},
            "ratio": {n: statistics.median(seconds[n]) / base for n in ("equal", "half")},
            "paired_ratio": {n: spread([c / s for c, s in zip(seconds[n], seconds["sft"])]) for n in ("equal", "half")},
            "memory": peak_over_gradient(runs), "select_action": decoding(runs["equal"].policy, steps)}


def verdicts(found):
    "Each figure beside its target."
    extra = found["memory"]["extra_over_gradient"]
    rows = {"equal batches: CRaFT / SFT step": (found["ratio"]["equal"], TARGETS["equal"]),
            "half the anchors: CRaFT / SFT step": (found["ratio"]["half"], TARGETS["half"]),
            "extra peak / gradient, equal batches": (extra["equal"], TARGETS["memory"]),
            "select_action / bare decode": (found["select_action"]["ratio"], TARGETS["select_action"])}
    return {k: {"value": v, "target": t, "met": v <= t} for k, (v, t) in rows.items()}


def main(argv=None):
    import sys
    flags = parse_flags(sys.argv[1:] if argv is None else argv)
    steps, threads = int(flags.get("steps", 50)), int(flags.get("threads", 2))
    torch.set_num_threads(threads)
    report = {"steps": steps, "threads": threads, "torch": torch.__version__, "machine": platform.machine(),
              "sizes": {}}
    for name in [flags["only"]] if "only" in flags else SIZES:
        with tempfile.TemporaryDirectory() as d: found = measure(name, steps, Path(d))
        report["sizes"][name] = found | {"verdicts": verdicts(found)}
        print(f"{name}: {found['parameters'] / 1e6:.2f} M parameters, batch {found['batch']}")
        for what, v in report["sizes"][name]["verdicts"].items():
            print(f"  {what:40} {v['value']:6.3f}  target {v['target']}  {'ok' if v['met'] else 'MISSED'}")
        gc.collect()
        if "only" not in flags: write_json(Path(__file__).parents[1] / "reports/benchmarks/craft_step.json", report)


if __name__ == "__main__": main()
