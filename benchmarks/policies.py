"""Policies on the CPU: a training step and a planned chunk, ours and LeRobot's, same configuration, same batch, same threads.

    python benchmarks/policies.py --lerobot=PYTHON [--repeat=3] [--only=act,diffusion,smolvla] [--threads=1]

PYTHON is an interpreter with LeRobot 0.4 (an environment of its own). Both sides take turns, each in a fresh process: random weights,
one pre-processed batch; a training step is loss, gradients, clipping and the optimizer that each side makes for this policy, a chunk is
planned for one observation. The first steps are not timed; the median of the rest counts, and of several processes the best one, the
least disturbed. `multiply-adds` of a training step are counted by torch's own flop counter on our model, against what a large matrix
product reaches here in the same process. Writes reports/benchmarks/policies.json.
"""
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

from vla_nb.core.config import parse_flags
from vla_nb.core.files import write_json
from vla_nb.core.settings import settings
from vla_nb.core.types import UserError

ROOT = Path(__file__).resolve().parents[1]
GOALS = {"tiny": 0.9, "medium": 1.0}   # ours / LeRobot, seconds
ACT = dict(vision_backbone="resnet18", pretrained_backbone_weights=None, n_encoder_layers=2, n_decoder_layers=1, n_vae_encoder_layers=2,
           latent_dim=16, dropout=0.1)
DIFFUSION = dict(n_obs_steps=2, vision_backbone="resnet18", pretrained_backbone_weights=None, use_group_norm=True, num_train_timesteps=100,
                 noise_scheduler_type="DDIM", num_inference_steps=10, use_separate_rgb_encoder_per_camera=False)
SMOLVLA = dict(n_action_steps=10, max_state_dim=16, max_action_dim=16, num_steps=10, load_vlm_weights=False, num_expert_layers=-1,
               self_attn_every_n_layers=2, expert_width_multiplier=0.75, attention_mode="cross_attn", train_expert_only=False,
               freeze_vision_encoder=False)
CASES = {  # policy, size -> configuration, side of a picture, batch, sizes of the VLM
    ("act", "tiny"): (ACT | dict(chunk_size=20, n_action_steps=20, dim_model=64, n_heads=4, dim_feedforward=128), 96, 8, None),
    ("act", "medium"): (ACT | dict(chunk_size=50, n_action_steps=50, dim_model=256, n_heads=8, dim_feedforward=1024, n_encoder_layers=4),
                        224, 4, None),
    ("diffusion", "tiny"): (DIFFUSION | dict(horizon=16, n_action_steps=8, down_dims=[32, 64, 128], crop_shape=None), 96, 8, None),
    ("diffusion", "medium"): (DIFFUSION | dict(horizon=16, n_action_steps=8, down_dims=[128, 256, 512], crop_shape=None), 128, 4, None),
    ("smolvla", "tiny"): (SMOLVLA | dict(chunk_size=10, resize_imgs_with_padding=[32, 32], num_vlm_layers=4), 96, 8,
                          dict(text=dict(hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4,
                                         num_key_value_heads=2, head_dim=16),
                               vision=dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4))),
    ("smolvla", "medium"): (SMOLVLA | dict(chunk_size=50, resize_imgs_with_padding=[128, 128], num_vlm_layers=8), 128, 2,
                            dict(text=dict(hidden_size=320, intermediate_size=854, num_hidden_layers=8, num_attention_heads=5,
                                           num_key_value_heads=1, head_dim=64),
                                 vision=dict(hidden_size=256, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=4,
                                             image_size=128, patch_size=16)))}
RUN = """
import json, statistics, sys, time
import torch
job = json.loads(sys.argv[1])
torch.set_num_threads(job["threads"]); torch.manual_seed(0)
values, kind, side = dict(job["config"]), job["policy"], job["side"]
shapes = {"observation.images.top": (3, side, side), "observation.images.wrist": (3, side, side), "observation.state": (6,), "action": (6,)}
if job["who"] == "lerobot":
    from lerobot.configs.types import FeatureType, PolicyFeature
    from lerobot.policies.factory import get_policy_class, make_policy_config
    made = {k: PolicyFeature({1: FeatureType.STATE, 3: FeatureType.VISUAL}[len(s)] if k != "action" else FeatureType.ACTION, s)
            for k, s in shapes.items()}
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    config = make_policy_config(kind, input_features={k: f for k, f in made.items() if k != "action"}, device="cpu", push_to_hub=False,
                                output_features={"action": made["action"]}, **values)
    policy = get_policy_class(kind)(config)
    optimizer = config.get_optimizer_preset().build(policy.get_optim_params())
else:
    from vla_nb.core.allocator import keep_freed_memory
    from vla_nb.core.config import from_dict
    from vla_nb.core.stats import Stats
    from vla_nb.core.types import Feature
    from vla_nb.policies.store import policy_class
    from vla_nb.training.optim import OptimConfig, make_optimizer
    made = {k: Feature({1: "STATE", 3: "VISUAL"}[len(s)] if k != "action" else "ACTION", s) for k, s in shapes.items()}
    cls, values = policy_class(kind), values | {"loss_reduction": "all"} | ({"allow_random_backbone": True} if kind == "smolvla" else {})
    if kind == "smolvla":
        from vla_nb.networks.smolvlm import VLMSizes
        values["vlm"] = VLMSizes.of(json.load(open(values["vlm_model_name"] + "/config.json")))
    config = from_dict(cls.config_class, values | {"input_features": {k: f for k, f in made.items() if k != "action"},
                                                   "output_features": {"action": made["action"]}})
    stats = Stats({k: {n: torch.full(s if len(s) == 1 else (3, 1, 1), v).numpy() for n, v in (("mean", 0.), ("std", 1.), ("min", -1.), ("max", 1.))}
                   for k, s in shapes.items()})
    policy = cls.from_data(config, stats=stats, **({"texts": ["open the drawer"], "action_chunks": None} if kind == "smolvla" else {}))
    optimizer = make_optimizer(policy, OptimConfig(getattr(config, "optimizer_preset", {}).get("type", "adamw")))
    keep_freed_memory()   # as TrainRun does
n, steps, length = job["batch"], config.horizon if kind == "diffusion" else config.chunk_size, getattr(config, "n_obs_steps", 1)
g = torch.Generator().manual_seed(1)
def seen(rows):
    time = (length,) if length > 1 else ()
    out = {k: torch.rand(rows, *time, *s, generator=g) for k, s in shapes.items() if k != "action"}
    if kind == "smolvla":
        out["observation.language.tokens"] = torch.randint(4, 16, (rows, 12), generator=g)
        out["observation.language.attention_mask"] = torch.ones(rows, 12, dtype=torch.bool)
    return out
batch = seen(n) | {"action": torch.randn(n, steps, 6, generator=g).clamp(-1, 1), "action_is_pad": torch.zeros(n, steps, dtype=torch.bool)}
def step():
    loss, _ = policy(dict(batch))
    loss.backward()
    torch.nn.utils.clip_grad_norm_(policy.parameters(), 10.0)
    optimizer.step(); optimizer.zero_grad()
one = seen(1)
def plan():
    with torch.no_grad():
        if job["who"] == "lerobot" and kind == "diffusion":
            pictures = torch.stack([one[k] for k in config.image_features], -4)
            return policy.diffusion.generate_actions(one | {"observation.images": pictures})
        return policy.predict_action_chunk(dict(one))
def seconds(f, count):
    for _ in range(2): f()
    found = []
    for _ in range(count):
        begun = time.perf_counter(); f(); found.append(time.perf_counter() - begun)
    return statistics.median(found)
policy.train(); found = {"train": seconds(step, job["count"])}
policy.eval(); found["plan"] = seconds(plan, job["count"])
found["parameters"] = sum(p.numel() for p in policy.parameters())
if job["who"] == "ours":
    from torch.utils.flop_counter import FlopCounterMode
    policy.train()
    with FlopCounterMode(display=False) as counter: step()
    a = torch.rand(1536, 1536)
    found |= {"flops": counter.get_total_flops(), "matmul_flops_per_s": 2 * 1536 ** 3 / seconds(lambda: a @ a, 5)}
print(json.dumps(found))
"""
VLM = """
import json, os, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1]); os.chdir(sys.argv[2])
import make
make.vlm_folder()
path = Path("vlm/config.json"); c = json.loads(path.read_text()); sizes = json.loads(sys.argv[3])
c["text_config"] |= sizes["text"]; c["vision_config"] |= sizes["vision"]
path.write_text(json.dumps(c))
"""


def run(python, code, *words) -> str:
    "The last line that a process prints."
    env = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run([python, "-c", code, *words], capture_output=True, text=True, env=env)
    if done.returncode: raise UserError(f"{python} failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    return (done.stdout.strip().splitlines() or [""])[-1]


def measure(policy, size, lerobot, repeat, threads) -> dict:
    "Seconds of both sides of one case."
    config, side, batch, vlm = CASES[policy, size]
    job, found = dict(policy=policy, side=side, batch=batch, threads=threads, count=20 if size == "tiny" else 8), {"ours": [], "lerobot": []}
    with tempfile.TemporaryDirectory() as box:
        if vlm:
            run(lerobot, VLM, str(ROOT / "tests/goldens/smolvla"), box, json.dumps(vlm))
            config = config | {"vlm_model_name": f"{box}/vlm"}
        for _ in range(repeat):
            for who, python in (("lerobot", lerobot), ("ours", sys.executable)):
                found[who].append(json.loads(run(python, RUN, json.dumps(job | {"who": who, "config": config}))))
    best = {who: {k: min(r[k] for r in runs) for k in ("train", "plan")} for who, runs in found.items()}
    speed = max(r["flops"] / r["train"] / r["matmul_flops_per_s"] for r in found["ours"])
    return dict(best=best, runs=found, parameters={w: r[0]["parameters"] for w, r in found.items()}, part_of_matmul_rate=speed,
                train=best["ours"]["train"] / best["lerobot"]["train"], plan=best["ours"]["plan"] / best["lerobot"]["plan"])


def main(argv) -> int:
    "Run in turns, compare, write."
    flags = {"repeat": 3, "only": "act,diffusion,smolvla", "threads": 1} | parse_flags(argv)
    if "lerobot" not in flags: raise UserError("give an interpreter that has LeRobot 0.4: --lerobot=PYTHON")
    cases = {}
    for policy, size in (c for c in CASES if c[0] in flags["only"].split(",")):
        cases[f"{policy}, {size}"] = case = measure(policy, size, flags["lerobot"], int(flags["repeat"]), int(flags["threads"]))
        print(f"{policy}, {size}: train {case['train']:.2f}, plan {case['plan']:.2f} of LeRobot's seconds", flush=True)
    verdicts = [{"what": f"{name}: ours / LeRobot, {what}", "value": c[k], "target": GOALS[name.split(', ')[1]], "at": "most",
                 "met": c[k] <= GOALS[name.split(', ')[1]]} for name, c in cases.items() for k, what in (("train", "training step"), ("plan", "chunk"))]
    rows = [[name, c["parameters"]["ours"] / 1e6, *(1e3 * c["best"][w][k] for k in ("train", "plan") for w in ("lerobot", "ours")),
             c["part_of_matmul_rate"]] for name, c in cases.items()]
    head = ["policy", "M parameters", "LeRobot: step, ms", "ours: step, ms", "LeRobot: chunk, ms", "ours: chunk, ms",
            "our step / rate of a large matrix product"]
    report = dict(command=f"python benchmarks/policies.py --lerobot=PYTHON --repeat={flags['repeat']} --threads={flags['threads']}",
                  machine=platform.machine(), cores=os.cpu_count(), cases=cases, verdicts=verdicts, table={"head": head, "rows": rows})
    for v in verdicts: print(f"{v['what']:45} {v['value']:6.2f}  goal {v['target']}  {'ok' if v['met'] else 'MISSED'}")
    write_json(Path(settings().reports) / "benchmarks" / "policies.json", report)
    return 0 if all(v["met"] for v in verdicts) else 1


if __name__ == "__main__": sys.exit(main(sys.argv[1:]))
