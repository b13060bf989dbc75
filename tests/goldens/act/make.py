"""Make act.safetensors and LeRobot's own folders for tests/test_act.py: what ACT of LeRobot 0.4.4 computes.

    python make.py       with lerobot 0.4.4 installed, as tests/goldens/lerobot_dataset/make.py describes

Weights are made from their names (../seeded.py), so none are stored. Every field of every configuration is written out.
"""
import json
import sys
from pathlib import Path

import torch
from lerobot.configs.types import FeatureType, NormalizationMode, PolicyFeature
from lerobot.policies.act.configuration_act import ACTConfig
from lerobot.policies.act.modeling_act import ACTPolicy, ACTTemporalEnsembler
from lerobot.policies.act.processor_act import make_act_pre_post_processors
from safetensors.torch import save_file

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from seeded import seeded

BASE = dict(n_obs_steps=1, chunk_size=6, n_action_steps=6, normalization_mapping=dict.fromkeys(("VISUAL", "STATE", "ACTION"), "MEAN_STD"),
            vision_backbone="resnet18", pretrained_backbone_weights=None, replace_final_stride_with_dilation=False, pre_norm=False,
            dim_model=32, n_heads=4, dim_feedforward=48, feedforward_activation="relu", n_encoder_layers=2, n_decoder_layers=1,
            use_vae=True, latent_dim=8, n_vae_encoder_layers=2, temporal_ensemble_coeff=None, dropout=0.0, kl_weight=10.0,
            optimizer_lr=1e-5, optimizer_weight_decay=1e-4, optimizer_lr_backbone=1e-5)
CASES = {"plain": {}, "pre_norm": dict(pre_norm=True, feedforward_activation="gelu", n_decoder_layers=2, kl_weight=3.0),
         "no_vae": dict(use_vae=False), "no_state": {},
         "dilated": dict(vision_backbone="resnet50", replace_final_stride_with_dilation=True)}
SHAPES = {"observation.images.top": (3, 64, 48), "observation.images.wrist": (3, 64, 48), "observation.state": (5,), "action": (4,)}


def features(case):
    "Inputs and outputs of a case: key -> (kind, shape)."
    kinds = {k: ("VISUAL" if "images" in k else "ACTION" if k == "action" else "STATE", s) for k, s in SHAPES.items()}
    if case == "no_state": del kinds["observation.state"]
    if case == "dilated": del kinds["observation.images.wrist"]
    return kinds


def stats():
    "Statistics of every feature; pictures have ImageNet's."
    g = torch.Generator().manual_seed(3)
    found = {k: {"mean": torch.randn(s, generator=g), "std": 0.5 + torch.rand(s, generator=g)} for k, s in SHAPES.items() if len(s) == 1}
    picture = {"mean": torch.tensor([0.485, 0.456, 0.406]).reshape(3, 1, 1), "std": torch.tensor([0.229, 0.224, 0.225]).reshape(3, 1, 1)}
    return found | {k: dict(picture) for k, s in SHAPES.items() if len(s) == 3}


def raw_batch():
    "Two samples; the second ends after four of six actions."
    g = torch.Generator().manual_seed(4)
    batch = {k: torch.rand(2, *s, generator=g) if len(s) == 3 else torch.randn(2, *s, generator=g) for k, s in SHAPES.items()}
    batch["action"] = torch.randn(2, 6, 4, generator=g)
    batch["action_is_pad"] = torch.arange(6) >= torch.tensor([[6], [4]])
    return batch


def build(case):
    "LeRobot's policy and pipelines of a case."
    made = {k: PolicyFeature(FeatureType(t), s) for k, (t, s) in features(case).items()}
    config = ACTConfig(**{**BASE, **CASES[case], "normalization_mapping": {k: NormalizationMode(v) for k, v in BASE["normalization_mapping"].items()}},
                       input_features={k: f for k, f in made.items() if k != "action"}, output_features={"action": made["action"]},
                       device="cpu", push_to_hub=False)
    policy = ACTPolicy(config)
    policy.load_state_dict(seeded(policy.state_dict()))
    return policy, *make_act_pre_post_processors(config, stats())


if __name__ == "__main__":
    out, keys, noise = {}, {}, torch.randn(2, 8, generator=torch.Generator().manual_seed(5))
    for case in CASES:
        policy, before, after = build(case)
        batch = before(raw_batch())
        if case == "plain": out |= {f"normal/{k}": v for k, v in batch.items() if k in SHAPES and len(SHAPES[k]) == 1}
        if case == "plain": out["normal/picture"] = batch["observation.images.top"][:, :, ::16, ::16]
        torch.randn_like = lambda x: noise                       # the one random number of the loss
        loss, logs = policy.train()(batch)
        loss.backward()
        head, first = (dict(policy.named_parameters())[f"model.{n}.weight"].grad for n in ("action_head", "backbone.conv1"))
        if case == "plain": out["plain/grad_conv1"] = first
        chunk = policy.eval().predict_action_chunk(batch)
        out |= {f"{case}/loss": loss.detach(), f"{case}/l1": torch.tensor(logs["l1_loss"]), f"{case}/chunk": chunk,
                f"{case}/physical": after(chunk), f"{case}/grad_head": head}
        keys[case] = {k: list(v.shape) for k, v in policy.state_dict().items() if not k.startswith("model.backbone.layer")}
        keys[case]["backbone"] = len([k for k in policy.state_dict() if k.startswith("model.backbone")])
    for c in (0.01, -0.2):
        ensembler, plans = ACTTemporalEnsembler(c, 6), torch.randn(15, 2, 6, 4, generator=torch.Generator().manual_seed(6))
        out[f"ensemble/{c}"] = torch.stack([ensembler.update(p) for p in plans])
    policy, before, after = build("plain")
    (HERE / "folder").mkdir(exist_ok=True)
    policy.config._save_pretrained(HERE / "folder")
    for pipeline in (before, after): pipeline.save_pretrained(HERE / "folder")
    save_file({k: v.contiguous() for k, v in out.items()}, HERE / "act.safetensors", {"keys": json.dumps(keys)})
