"""Make diffusion.safetensors and LeRobot's own folder for tests/test_diffusion.py: what diffusion policy of LeRobot 0.4.4 computes.

    python make.py       with lerobot 0.4.4 and diffusers 0.35.2 installed, as tests/goldens/lerobot_dataset/make.py describes

Weights are made from their names (../seeded.py), so none are stored. Every field of every configuration is written out.
"""
import json
import sys
from pathlib import Path

import torch
from diffusers import DDIMScheduler, DDPMScheduler
from lerobot.configs.types import FeatureType, NormalizationMode, PolicyFeature
from lerobot.policies.diffusion.configuration_diffusion import DiffusionConfig
from lerobot.policies.diffusion.modeling_diffusion import DiffusionPolicy
from lerobot.policies.diffusion.processor_diffusion import make_diffusion_pre_post_processors
from safetensors.torch import save_file

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from seeded import seeded

BASE = dict(n_obs_steps=2, horizon=8, n_action_steps=4, normalization_mapping={"VISUAL": "MEAN_STD", "STATE": "MIN_MAX", "ACTION": "MIN_MAX"},
            drop_n_last_frames=3, vision_backbone="resnet18", resize_shape=None, crop_ratio=1.0, crop_shape=(35, 50), crop_is_random=False,
            pretrained_backbone_weights=None, use_group_norm=True, spatial_softmax_num_keypoints=6,
            use_separate_rgb_encoder_per_camera=False, down_dims=(16, 32, 48), kernel_size=5, n_groups=4, diffusion_step_embed_dim=12,
            use_film_scale_modulation=True, noise_scheduler_type="DDPM", num_train_timesteps=20, beta_schedule="squaredcos_cap_v2",
            beta_start=0.0001, beta_end=0.02, prediction_type="epsilon", clip_sample=True, clip_sample_range=1.0, num_inference_steps=None,
            compile_model=False, compile_mode="reduce-overhead", do_mask_loss_for_padding=False, optimizer_lr=1e-4,
            optimizer_betas=(0.95, 0.999), optimizer_eps=1e-8, optimizer_weight_decay=1e-6, scheduler_name="cosine", scheduler_warmup_steps=500)
CASES = {"shared": {},
         "separate": dict(use_separate_rgb_encoder_per_camera=True, use_group_norm=False, resize_shape=(32, 44), crop_ratio=0.9, crop_shape=None,
                          noise_scheduler_type="DDIM", num_inference_steps=7, prediction_type="sample", use_film_scale_modulation=False,
                          do_mask_loss_for_padding=True, beta_schedule="linear", clip_sample_range=0.8),
         "whole": dict(crop_shape=None, down_dims=(16, 16), kernel_size=3, clip_sample=False, num_inference_steps=6, n_obs_steps=3, beta_schedule="scaled_linear",
                       vision_backbone="resnet34")}
SHAPES = {"observation.images.top": (3, 40, 56), "observation.images.wrist": (3, 40, 56), "observation.state": (5,), "action": (4,)}


def stats():
    "Statistics of every feature; pictures have ImageNet's."
    g = torch.Generator().manual_seed(3)
    found = {k: {"min": -2 - torch.rand(s, generator=g), "max": 2 + torch.rand(s, generator=g)} for k, s in SHAPES.items() if len(s) == 1}
    picture = {"mean": torch.tensor([0.485, 0.456, 0.406]).reshape(3, 1, 1), "std": torch.tensor([0.229, 0.224, 0.225]).reshape(3, 1, 1)}
    return found | {k: dict(picture) for k, s in SHAPES.items() if len(s) == 3}


def raw_batch(n):
    "Two samples of n moments and eight actions; the second ends after five actions."
    g = torch.Generator().manual_seed(4)
    batch = {k: torch.rand(2, n, *s, generator=g) if len(s) == 3 else torch.randn(2, n, *s, generator=g) for k, s in SHAPES.items()}
    batch["action"] = torch.randn(2, 8, 4, generator=g)
    batch["action_is_pad"] = torch.arange(8) >= torch.tensor([[8], [5]])
    return batch


def build(case):
    "LeRobot's policy and pipelines of a case."
    made = {k: PolicyFeature(FeatureType("VISUAL" if len(s) == 3 else "ACTION" if k == "action" else "STATE"), s) for k, s in SHAPES.items()}
    modes = {k: NormalizationMode(v) for k, v in BASE["normalization_mapping"].items()}
    config = DiffusionConfig(**{**BASE, **CASES[case], "normalization_mapping": modes}, device="cpu", push_to_hub=False,
                             input_features={k: f for k, f in made.items() if k != "action"}, output_features={"action": made["action"]})
    policy = DiffusionPolicy(config)
    policy.load_state_dict(seeded(policy.state_dict()))
    return policy, *make_diffusion_pre_post_processors(config, stats())


def schedules():
    "A few steps of diffusers' samplers."
    g, out = torch.Generator().manual_seed(7), {}
    x, guess = torch.randn(2, 5, 3, generator=g), torch.randn(2, 5, 3, generator=g)
    out["schedule/x"], out["schedule/guess"] = x, guess
    for kind in ("linear", "scaled_linear", "squaredcos_cap_v2"):
        for name, cls in (("DDPM", DDPMScheduler), ("DDIM", DDIMScheduler)):
            for predicts in ("epsilon", "sample"):
                s = cls(num_train_timesteps=50, beta_schedule=kind, prediction_type=predicts, clip_sample=True, clip_sample_range=0.9)
                s.set_timesteps(12)
                torch.manual_seed(11)
                out[f"schedule/{name}/{kind}/{predicts}"] = torch.stack([s.step(guess, t, x).prev_sample for t in s.timesteps])
        out[f"schedule/noisy/{kind}"] = s.add_noise(x, guess, torch.tensor([3, 44]))
    return out


if __name__ == "__main__":
    out, keys = schedules(), {}
    for case in CASES:
        policy, before, after = build(case)
        batch, n = before(raw_batch(policy.config.n_obs_steps)), policy.config.n_obs_steps
        if case == "shared": out |= {f"normal/{k}": batch[k] for k in ("observation.state", "action")}
        policy.eval().reset()
        for i in range(n):                               # one observation after the other, as in an episode
            now = {k: v[:, i] for k, v in batch.items() if k.startswith("observation")}
            policy.select_action(dict(now))
        images = torch.stack([now[k] for k in policy.config.image_features], dim=-4)
        torch.manual_seed(30)
        chunk = policy.predict_action_chunk({**now, "observation.images": images})
        torch.manual_seed(31)
        loss, _ = policy.train()(batch)
        loss.backward()
        grad = dict(policy.named_parameters())["diffusion.unet.final_conv.1.weight"].grad
        out |= {f"{case}/loss": loss.detach(), f"{case}/chunk": chunk, f"{case}/physical": after(chunk), f"{case}/grad": grad}
        keys[case] = {k: list(v.shape) for k, v in policy.state_dict().items() if "backbone" not in k}
        keys[case]["backbone"] = sorted(k for k in policy.state_dict() if "backbone" in k)[:: 20]
    policy, before, after = build("shared")                  # an episode of nine steps
    torch.manual_seed(40)
    seen, policy = raw_batch(9), policy.eval()
    policy.reset()
    out["episode"] = torch.stack([after(policy.select_action(before({k: v[0, i] for k, v in seen.items() if k.startswith("observation")})))
                                  for i in range(9)])
    (HERE / "folder").mkdir(exist_ok=True)
    policy.config._save_pretrained(HERE / "folder")
    for pipeline in (before, after): pipeline.save_pretrained(HERE / "folder")
    save_file({k: v.contiguous() for k, v in out.items()}, HERE / "diffusion.safetensors", {"keys": json.dumps(keys)})
