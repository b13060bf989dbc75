"""Does LeRobot 0.4.4 act as we do? Runs it on policy folders that `vla-nb checkpoint export` wrote.

    python tools/check_with_lerobot.py --prepare FOLDER           in this project's environment: exports tiny policies, notes what they do
    python tools/check_with_lerobot.py FOLDER [--json=FILE]       in an environment with lerobot==0.4.4: loads each, compares
"""
import json
import sys
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file


def prepare(root):
    "Export tiny random policies of every kind that LeRobot can build here, each with a raw batch and what our policy makes of it."
    import numpy as np
    from vla_nb.checkpoints.lerobot import export_lerobot
    from vla_nb.core.stats import Stats, compute_stats
    from vla_nb.core.types import Feature
    from vla_nb.policies.act import ActConfig, ActPolicy
    from vla_nb.policies.diffusion import DiffusionConfig, DiffusionPolicy
    from vla_nb.policies.smolvla import SmolVLAConfig, SmolVLAPolicy
    rng = np.random.default_rng(0)
    cameras = ("observation.images.top", "observation.images.wrist")
    features = {**{k: Feature("VISUAL", (3, 48, 64)) for k in cameras}, "observation.state": Feature("STATE", (5,)), "action": Feature("ACTION", (4,))}
    values = {k: compute_stats(rng.normal(1, 2, (50, n)).astype(np.float32)) for k, n in (("observation.state", 5), ("action", 4))}
    stats = Stats(values | {k: {"mean": np.full((3, 1, 1), 0.4), "std": np.full((3, 1, 1), 0.3)} for k in cameras})
    inputs, outputs = {k: f for k, f in features.items() if k != "action"}, {"action": features["action"]}
    tasks = ["open the drawer", "push it"]
    torch.manual_seed(0)
    act = dict(chunk_size=6, n_action_steps=6, dim_model=32, n_heads=4, dim_feedforward=48, latent_dim=8, pretrained_backbone_weights=None,
               loss_reduction="all")
    made = {"smolvla": SmolVLAPolicy.from_data(SmolVLAConfig.tiny(features, patch_positions="shifted", loss_reduction="all"), tasks, None, stats),
            "act": ActPolicy.from_data(ActConfig(inputs, outputs, **act), stats=stats)}
    small = dict(n_obs_steps=2, horizon=8, n_action_steps=4, crop_ratio=1.0, crop_shape=None, pretrained_backbone_weights=None,
                 use_group_norm=True, use_separate_rgb_encoder_per_camera=False, down_dims=(16, 32), n_groups=4,
                 diffusion_step_embed_dim=12, spatial_softmax_num_keypoints=6, noise_scheduler_type="DDIM", num_train_timesteps=20,
                 num_inference_steps=5, loss_reduction="all")
    made["diffusion"] = DiffusionPolicy.from_data(DiffusionConfig(inputs, outputs, **small), stats=stats)
    for name, policy in made.items():
        policy.eval().save_pretrained(root / "ours" / name)
        notes = export_lerobot(root / "ours" / name, root / name)
        g = torch.Generator().manual_seed(1)
        n = getattr(policy.config, "n_obs_steps", 1)
        time = () if n == 1 else (n,)
        raw = {**{k: torch.rand(2, *time, 3, 48, 64, generator=g) for k in cameras}, "observation.state": torch.randn(2, *time, 5, generator=g)}
        noise = {}
        if name == "smolvla": noise = {"noise": torch.randn(2, policy.config.chunk_size, policy.config.max_action_dim, generator=g)}
        if name == "diffusion": noise = {"noise": torch.randn(2, policy.config.horizon, 4, generator=g)}
        batch = policy.preprocessor({**raw, "task": tasks})
        given = {k: v.expand(5, -1, -1, -1) if name == "diffusion" else v for k, v in noise.items()}    # DDIM: the first draw alone counts
        with torch.no_grad(): chunk = policy.predict_action_chunk(batch, **given)
        save_file({**{f"raw.{k}": v for k, v in raw.items()}, **noise, "chunk": chunk.contiguous(), "actions": policy.postprocessor(chunk).contiguous()},
                  root / f"{name}.safetensors", {"tasks": json.dumps(tasks)})
        print(name, "exported;", *notes)


def check(root):
    "Load every exported folder with LeRobot and compare chunks and physical actions."
    from lerobot.policies.factory import get_policy_class, make_pre_post_processors
    found = {}
    for file in sorted(root.glob("*.safetensors")):
        folder, golden = root / file.stem, load_file(file)
        with safe_open(file, "pt") as f: tasks = json.loads(f.metadata()["tasks"])
        kind = json.loads((folder / "config.json").read_text())["type"]
        policy = get_policy_class(kind).from_pretrained(folder, strict=True).eval()
        before, after = make_pre_post_processors(policy.config, pretrained_path=str(folder))
        batch = before({**{k[4:]: v for k, v in golden.items() if k.startswith("raw.")}, "task": tasks})
        noise = {k: golden[k] for k in ("noise",) if k in golden}
        with torch.no_grad():
            if kind == "diffusion":                                    # its own method wants a queue of observations
                batch["observation.images"] = torch.stack([batch[k] for k in policy.config.image_features], -4)
                chunk = policy.diffusion.generate_actions(batch, **noise)
            else: chunk = policy.predict_action_chunk(batch, **noise)
        found[file.stem] = {"chunk": (chunk - golden["chunk"]).abs().max().item(),
                            "actions": (after(chunk) - golden["actions"]).abs().max().item()}
        print(f"{file.stem}: largest difference of a chunk {found[file.stem]['chunk']:.1e}, of actions {found[file.stem]['actions']:.1e}")
    return found


if __name__ == "__main__":
    words = [w for w in sys.argv[1:] if not w.startswith("--")]
    if "--prepare" in sys.argv: prepare(Path(words[0]).absolute())
    else:
        found = check(Path(words[0]).absolute())
        out = next((w.removeprefix("--json=") for w in sys.argv if w.startswith("--json=")), None)
        if out:
            import lerobot
            Path(out).write_text(json.dumps({"lerobot": lerobot.__version__, "largest_difference": found}, indent=1) + "\n")
        sys.exit(max(v["chunk"] for v in found.values()) > 1e-5)
