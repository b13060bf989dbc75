"""ACT and its backbone: equal to LeRobot 0.4.4 on goldens, its keys, its saved folder, its ensemble, and what is refused."""
import json
import math
import shutil
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from vla_nb.apps.cli import main
from vla_nb.core.stats import Stats
from vla_nb.core.types import Feature, UserError
from vla_nb.datasets.fake import fake_dataset
from vla_nb.datasets.lerobot import DatasetMetadata
from vla_nb.networks.dinov2 import Dinov2, load_dinov2, renamed
from vla_nb.networks.resnet import FrozenBatchNorm, ResNet, conv_norm, load_backbone, weights_file
from vla_nb.policies.act import ActConfig, ActPolicy
from vla_nb.policies.queue import TemporalEnsemble
from vla_nb.policies.store import load_policy
from vla_nb.processors.pipeline import Pipeline

GOLDENS = Path(__file__).parent / "goldens"
sys.path.insert(0, str(GOLDENS))
from seeded import seeded  # noqa: E402

GOLD = load_file(GOLDENS / "act/act.safetensors")
FOLDER = GOLDENS / "act/folder"
SHAPES = {"observation.images.top": (3, 64, 48), "observation.images.wrist": (3, 64, 48), "observation.state": (5,), "action": (4,)}
BASE = dict(n_obs_steps=1, chunk_size=6, n_action_steps=6, vision_backbone="resnet18", pretrained_backbone_weights=None,
            replace_final_stride_with_dilation=False, pre_norm=False, dim_model=32, n_heads=4, dim_feedforward=48,
            feedforward_activation="relu", n_encoder_layers=2, n_decoder_layers=1, use_vae=True, latent_dim=8, n_vae_encoder_layers=2,
            temporal_ensemble_coeff=None, dropout=0.0, kl_weight=10.0, optimizer_lr=1e-5, optimizer_weight_decay=1e-4,
            optimizer_lr_backbone=1e-5, loss_reduction="all")
CASES = {"plain": {}, "pre_norm": dict(pre_norm=True, feedforward_activation="gelu", n_decoder_layers=2, kl_weight=3.0),
         "no_vae": dict(use_vae=False), "no_state": {},
         "dilated": dict(vision_backbone="resnet50", replace_final_stride_with_dilation=True)}
NOISE = torch.randn(2, 8, generator=torch.Generator().manual_seed(5))


def stats():
    g = torch.Generator().manual_seed(3)
    found = {k: {"mean": torch.randn(s, generator=g), "std": 0.5 + torch.rand(s, generator=g)} for k, s in SHAPES.items() if len(s) == 1}
    picture = {"mean": np.reshape([0.485, 0.456, 0.406], (3, 1, 1)), "std": np.reshape([0.229, 0.224, 0.225], (3, 1, 1))}
    return Stats(found | {k: picture for k, s in SHAPES.items() if len(s) == 3})


def raw_batch():
    g = torch.Generator().manual_seed(4)
    batch = {k: torch.rand(2, *s, generator=g) if len(s) == 3 else torch.randn(2, *s, generator=g) for k, s in SHAPES.items()}
    batch["action"] = torch.randn(2, 6, 4, generator=g)
    return {**batch, "action_is_pad": torch.arange(6) >= torch.tensor([[6], [4]]), "task": ["lift", "lift"]}


def build(case, **changes):
    "Our policy of a golden case, with the weights of the recipe."
    drop = {"no_state": "observation.state", "dilated": "observation.images.wrist"}.get(case)
    kinds = {k: Feature("VISUAL" if "images" in k else "STATE", s) for k, s in SHAPES.items() if k not in (drop, "action")}
    config = ActConfig(kinds, {"action": Feature("ACTION", (4,))}, **{**BASE, **CASES[case], **changes})
    policy = ActPolicy.from_data(config, stats=stats())
    policy.load_state_dict(seeded(policy.state_dict()))
    return policy.eval()


def close(a, b):
    "1e-5, of the value where it is above 1: the numbers of float32 near a loss of 50 lie 4e-6 apart."
    off = ((a - b).abs() / b.abs().clamp(min=1)).max()
    assert off <= 1e-5, off


@pytest.mark.parametrize("case", CASES)
def test_equal_to_lerobot(case):
    "Names and shapes of all tensors, loss, gradient, chunk and physical actions."
    policy = build(case)
    with safe_open(GOLDENS / "act/act.safetensors", "pt") as f: keys = json.loads(f.metadata()["keys"])[case]
    state = policy.state_dict()
    assert keys.pop("backbone") == sum(k.startswith("model.backbone") for k in state)
    assert {k: list(v.shape) for k, v in state.items() if not k.startswith("model.backbone.layer")} == keys
    batch = policy.preprocessor(raw_batch())
    close(policy.predict_action_chunk(batch), GOLD[f"{case}/chunk"])
    close(policy.plan(raw_batch()), GOLD[f"{case}/physical"])
    total, count, logs = policy.train().loss_terms(batch, NOISE)
    close(logs["l1_loss"], GOLD[f"{case}/l1"])
    close(total / count, GOLD[f"{case}/loss"])
    (total / count).backward()
    close(policy.model.action_head.weight.grad, GOLD[f"{case}/grad_head"])
    if case == "plain": close(policy.model.backbone.conv1.weight.grad, GOLD["plain/grad_conv1"])


def test_inputs_are_normalised_as_in_lerobot():
    policy, raw = build("plain"), raw_batch()
    batch = policy.preprocessor(raw)
    for k in ("observation.state", "action"): close(batch[k], GOLD[f"normal/{k}"])
    top = "observation.images.top"
    close(batch[top][:, :, ::16, ::16], GOLD["normal/picture"])
    levels = (raw[top] * 255).round().to(torch.uint8)
    close(policy.preprocessor({**raw, top: levels})[top], policy.preprocessor({**raw, top: levels.float() / 255})[top])


def test_ensemble_of_lerobot():
    plans = torch.randn(15, 2, 6, 4, generator=torch.Generator().manual_seed(6))
    for c in (0.01, -0.2):
        ensemble, found = TemporalEnsemble(c, 6), []
        for plan in plans:
            ensemble.push(plan)
            found.append(ensemble.pop())
        close(torch.stack(found), GOLD[f"ensemble/{c}"])


def test_policy_with_an_ensemble_plans_at_every_step():
    policy = build("plain", n_action_steps=1, temporal_ensemble_coeff=0.01)
    seen = [{k: v[i] if torch.is_tensor(v) else v[i] for k, v in raw_batch().items()} for i in (0, 1, 0)]
    plans, found = [policy.plan({k: v[None] if torch.is_tensor(v) else [v] for k, v in s.items()})[0].numpy() for s in seen], []
    for s in seen:
        assert policy.needs_observation
        found.append(policy.act(s))
    w = [math.exp(-0.01 * i) for i in range(3)]
    np.testing.assert_allclose(found[2], sum(w[i] * plans[i][2 - i] for i in range(3)) / sum(w), atol=1e-5)
    policy.reset()
    np.testing.assert_allclose(policy.act(seen[1]), plans[1][0], atol=1e-5)


def test_pipelines_are_saved_as_lerobot_saves_them(tmp_path):
    "Steps, their configurations and their statistics; the configuration has LeRobot's fields with its values."
    policy = build("plain")
    policy.save_pretrained(tmp_path / "p")
    for name in ("policy_preprocessor", "policy_postprocessor"):
        ours, theirs = (json.loads((f / f"{name}.json").read_text()) for f in (tmp_path / "p", FOLDER))
        assert [s["registry_name"] for s in ours["steps"]] == [s["registry_name"] for s in theirs["steps"]]
        for a, b in zip(ours["steps"], theirs["steps"]):
            assert b["config"].items() <= a["config"].items() and a.get("state_file") == b.get("state_file")
        again = Pipeline.load(FOLDER, name)
        mine = policy.preprocessor if name.startswith("policy_pre") else policy.postprocessor
        for key, value in raw_batch().items():
            if key in SHAPES: assert torch.equal(again({key: value})[key], mine({key: value})[key])
    ours, theirs = (json.loads((f / "config.json").read_text()) for f in (tmp_path / "p", FOLDER))
    known = {f.name for f in fields(ActConfig)} - {"loss_reduction", "freeze_backbone", "resize_shape"}
    assert known < theirs.keys() and {k: ours[k] for k in known} == {k: theirs[k] for k in known}
    found = load_policy(tmp_path / "p", "cpu")
    assert torch.equal(found.plan(raw_batch()), policy.plan(raw_batch()))


def test_padding_and_reductions():
    "Padded actions change nothing, neither the error nor the latent; `all` counts them as zero errors."
    policy, raw = build("plain", loss_reduction="valid").train(), raw_batch()
    other = {**raw, "action": torch.where(raw["action_is_pad"][..., None], 50.0, raw["action"])}
    terms = [policy.loss_terms(policy.preprocessor(r), NOISE) for r in (raw, other)]
    torch.testing.assert_close(terms[0][0], terms[1][0])
    assert terms[0][1] == 10 * 4
    total, count, logs = build("plain").train().loss_terms(policy.preprocessor(raw), NOISE)
    torch.testing.assert_close(logs["l1_loss"], terms[0][2]["l1_loss"] * 10 / 12)
    total, _, logs = policy.eval().loss_terms(policy.preprocessor(raw))
    assert "kld_loss" not in logs and total > 0


def test_features_have_no_dropout_and_end_in_the_memory():
    policy = build("plain", dropout=0.5).train()
    batch = policy.preprocessor(raw_batch())
    h, masks = policy.features(batch, -1)
    again, _ = policy.features(batch, -1)
    assert torch.equal(h, again) and policy.training and all(m.training for m in policy.modules())
    assert h.shape == (2, 2 + 2 * 4, 32) and masks["image"].sum() == 2 * 8 and masks["last"].tolist() == [9, 9]
    h.sum().backward()
    assert policy.model.backbone.conv1.weight.grad.abs().sum() > 0


def test_every_parameter_has_its_group_and_rate():
    policy = build("plain", optimizer_lr_backbone=3e-6)
    rest, back = policy.optim_groups(1e-4, 0.1)
    assert (rest["lr"], back["lr"], back["weight_decay"]) == (1e-4, 3e-6, 0.1)
    assert sum(map(len, (rest["params"], back["params"]))) == len(list(policy.parameters()))
    assert {id(p) for p in back["params"]} == {id(p) for p in policy.model.backbone.parameters()}


@pytest.mark.parametrize("change, words", [
    (dict(vision_backbone="vgg16"), "use one of resnet18"), (dict(temporal_ensemble_coeff=0.01), "set it to 1"),
    (dict(n_obs_steps=2), "n_obs_steps is 2"), (dict(loss_reduction="mean"), "valid, all"), (dict(dim_model=30), "multiple of n_heads"),
    (dict(pretrained_backbone_weights="ResNet19"), "ResNet18_Weights"), (dict(feedforward_activation="glu"), "relu, gelu"),
    (dict(n_action_steps=7), "chunk_size = 6")])
def test_wrong_configurations(change, words):
    with pytest.raises(UserError, match=words): build("plain", **change)


def test_no_picture_no_dilation_no_action():
    with pytest.raises(UserError, match="at least one picture"):
        ActConfig({"observation.state": Feature("STATE", (5,))}, {"action": Feature("ACTION", (4,))})
    with pytest.raises(UserError, match="needs resnet50"): build("plain", replace_final_stride_with_dilation=True)
    policy, raw = build("plain"), raw_batch()
    with pytest.raises(UserError, match="lacks 'action'"): policy.loss_terms({k: v for k, v in raw.items() if k != "action"})
    with pytest.raises(UserError, match="observation.images.wrist"):
        policy.predict_action_chunk({k: v for k, v in raw.items() if "wrist" not in k})


def test_missing_weights_are_an_error_that_names_the_ways_out(tmp_path, monkeypatch):
    "No network: the message says where the file goes and how to insist on random weights; a damaged file is named."
    monkeypatch.setenv("VLA_NB_CACHE_ROOT", str(tmp_path))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    name = "ResNet18_Weights.IMAGENET1K_V1"
    with pytest.raises(UserError, match="put the file at .*resnet18-f37072fd.pth.*pretrained_backbone_weights=none"):
        weights_file(name, f"file://{tmp_path}/nowhere/")
    assert not list(tmp_path.rglob("*.pth"))
    path = tmp_path / "hub/checkpoints/resnet18-f37072fd.pth"
    path.parent.mkdir(parents=True)
    torch.save(ResNet().state_dict(), path)
    with pytest.raises(UserError, match="is damaged"): weights_file(name)


def test_published_weights_are_tensors_only(tmp_path):
    "A file that would run code when it is read is refused; a classifier and counters are left out."
    class Evil:
        def __reduce__(self): return (open, (str(tmp_path / "ran"), "w"))
    torch.save({"conv1.weight": Evil()}, tmp_path / "evil.pth")
    net = ResNet()
    with pytest.raises(UserError, match="cannot be read as weights"): load_backbone(net, tmp_path / "evil.pth")
    assert not (tmp_path / "ran").exists()
    (tmp_path / "torn.pth").write_bytes(b"PK\x03\x04 torn")
    with pytest.raises(UserError, match="cannot be read as weights"): load_backbone(net, tmp_path / "torn.pth")
    good = seeded(ResNet().state_dict())
    torch.save({**good, "fc.bias": torch.zeros(3), "bn1.num_batches_tracked": torch.tensor(1)}, tmp_path / "good.pth")
    load_backbone(net, tmp_path / "good.pth")
    assert all(torch.equal(v, good[k]) for k, v in net.state_dict().items())


def test_frozen_norm_is_batch_norm_in_evaluation():
    reference = torch.nn.BatchNorm2d(8).eval()
    state = seeded({f"n.{k}": v for k, v in reference.state_dict().items()})
    reference.load_state_dict({k.removeprefix("n."): v for k, v in state.items()})
    frozen = FrozenBatchNorm(8)
    frozen.load_state_dict({k: v for k, v in reference.state_dict().items() if "num" not in k})
    x, conv = torch.randn(2, 3, 9, 9), torch.nn.Conv2d(3, 8, 3, bias=False)
    torch.testing.assert_close(conv_norm(conv, frozen, x), reference(conv(x)), rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- DINOv2

@pytest.mark.parametrize("sides", [(56, 56), (84, 42)])
def test_dinov2_equals_transformers(sides):
    "On the grid of the known positions and on another; names of transformers become ours one by one."
    from transformers import Dinov2Config, Dinov2Model
    theirs = Dinov2Model(Dinov2Config(hidden_size=24, num_hidden_layers=3, num_attention_heads=3, image_size=56, patch_size=14)).eval()
    theirs.load_state_dict(seeded(theirs.state_dict()))
    ours, state = Dinov2(24, 3, 3, grid=4), {renamed(k): v for k, v in theirs.state_dict().items() if "mask_token" not in k}
    ours.load_state_dict(state)
    x = torch.randn(2, 3, *sides, generator=torch.Generator().manual_seed(1))
    with torch.no_grad(): wanted = theirs(x).last_hidden_state[:, 1:].mT.unflatten(2, (sides[0] // 14, sides[1] // 14))
    close(ours(x), wanted)
    assert wanted.std() > 0.1


def test_dinov2_files_as_they_are_published(tmp_path, monkeypatch):
    "The names that lie on the Hub; a file that is not there names the ways out."
    from safetensors.torch import save_file
    net, part = Dinov2(24, 2, 3, grid=4), "encoder.layer.{}.attention."
    long = {"patch.": "embeddings.patch_embeddings.projection.", "cls_token": "embeddings.cls_token", "positions": "embeddings.position_embeddings",
            "norm.": "layernorm."}
    names = {k: next((v + k.removeprefix(s) for s, v in long.items() if k.startswith(s)), k.replace("layers.", "encoder.layer.")) for k in net.state_dict()}
    for k, old in names.items():
        for a, b in (("q_proj", "attention.query"), ("k_proj", "attention.key"), ("v_proj", "attention.value"), ("out_proj", "output.dense"),
                     (".fc", ".mlp.fc"), (".scale1", ".layer_scale1.lambda1"), (".scale2", ".layer_scale2.lambda1")): names[k] = names[k].replace(a, b)
    assert names["layers.1.attention.q_proj.bias"] == part.format(1) + "attention.query.bias" and len(set(names.values())) == len(names)
    values = seeded(net.state_dict())
    save_file({names[k]: v for k, v in values.items()} | {"embeddings.mask_token": torch.zeros(1, 24)}, tmp_path / "model.safetensors")
    load_dinov2(net, str(tmp_path))
    assert all(torch.equal(v, values[k]) for k, v in net.state_dict().items())
    with pytest.raises(UserError, match="does not fit"): load_dinov2(Dinov2(24, 2, 3, grid=5), str(tmp_path))
    with pytest.raises(UserError, match="cannot be read.*weights=none"): load_dinov2(net, str(tmp_path.parent))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("VLA_NB_CACHE_ROOT", str(tmp_path / "cache"))
    with pytest.raises(UserError, match="facebook/dinov2-small.*weights=none"): load_dinov2(net, "facebook/dinov2-small")


def test_frozen_dinov2_in_act(tmp_path):
    "Frozen features are not trained; the policy saves and loads; LeRobot's weights for a ResNet are refused."
    policy = build("plain", vision_backbone="dinov2_vits14", freeze_backbone=True, loss_reduction="valid")
    batch = policy.preprocessor(raw_batch())
    policy.train()(batch)[0].backward()
    assert all(p.grad is None for p in policy.model.backbone.parameters()) and policy.model.action_head.weight.grad.abs().sum() > 0
    assert sum(p.numel() for p in policy.model.backbone.parameters()) == 22_056_192
    policy.eval().save_pretrained(tmp_path / "p")
    found = load_policy(tmp_path / "p", "cpu")
    assert torch.equal(found.predict_action_chunk(batch), policy.predict_action_chunk(batch)) and not found.model.backbone.patch.weight.requires_grad
    with pytest.raises(UserError, match="use facebook/dinov2-small"):
        build("plain", vision_backbone="dinov2_vits14", pretrained_backbone_weights="ResNet18_Weights.IMAGENET1K_V1")


# ---------------------------------------------------------------- training from the command line

LITTLE = ("--policy.type=act --policy.pretrained_backbone_weights=none --policy.dim_model=16 --policy.n_heads=2 --policy.dim_feedforward=16 "
          "--policy.n_encoder_layers=1 --policy.n_vae_encoder_layers=1 --policy.latent_dim=4 --policy.chunk_size=4 "
          "--policy.n_action_steps=4 --policy.optimizer_lr_backbone=2e-5").split()


def test_train_resume_and_offline_errors(tmp_path, monkeypatch):
    "A run that was stopped and resumed ends bit for bit as one that was not, latent noise and dropout included; LeRobot's settings hold."
    for name, value in (("CACHE_ROOT", tmp_path / "cache"), ("THREADS", "1"), ("DEVICE", "cpu")): monkeypatch.setenv(f"VLA_NB_{name}", str(value))
    fake_dataset(tmp_path / "data", episodes=3, frames=12, cameras=("top",), size=(32, 32))
    words = ["train", f"--dataset.root={tmp_path / 'data'}", "--batch_size=4", "--save_freq=2", "--log_freq=1", "--steps=4", *LITTLE]
    for run in ("whole", "parts"): assert main([*words, f"--output_dir={tmp_path / run}"]) == 0
    shutil.rmtree(tmp_path / "parts/checkpoints/000004")                   # as if it had been killed after step 2
    (tmp_path / "parts/checkpoints/last").unlink()
    assert main([*words, f"--output_dir={tmp_path / 'parts'}", "--resume=true"]) == 0
    a, b = (load_file(tmp_path / f"{run}/checkpoints/000004/pretrained_model/model.safetensors") for run in ("whole", "parts"))
    assert all(torch.equal(a[k], b[k]) for k in a) and a.keys() == b.keys()
    last = tmp_path / "whole/checkpoints/000004"
    settings = json.loads((last / "pretrained_model/train_config.json").read_text())["optimizer"]
    wanted = dict(type="adamw", lr=1e-5, betas=[0.9, 0.999], eps=1e-8, weight_decay=1e-4, grad_clip_norm=10.0, schedule="constant", warmup_steps=0)
    assert {k: settings[k] for k in wanted} == wanted
    groups = json.loads((last / "training_state/optimizer_param_groups.json").read_text())
    assert [(g["lr"], g["weight_decay"]) for g in groups] == [(1e-5, 1e-4), (2e-5, 1e-4)]
    stats = load_file(last / "pretrained_model/policy_preprocessor_step_3_normalizer_processor.safetensors")
    np.testing.assert_allclose(stats["observation.images.top.mean"].flatten(), [0.485, 0.456, 0.406], rtol=1e-6)
    assert main(["eval", "offline", f"--policy.path={tmp_path / 'whole'}", f"--dataset.root={tmp_path / 'data'}", "--episodes=2:3",
                 "--stride=4", f"--output={tmp_path / 'offline.json'}"]) == 0
    found = json.loads((tmp_path / "offline.json").read_text())["all"]
    assert found["n"] == 3 and found["mse"] > 0 and len(found["mae"]) == 4
    words = ["eval", "offline", f"--policy.path={tmp_path / 'whole'}", f"--dataset.root={tmp_path / 'data'}", "--episodes=0:3"]
    tasks = {t: DatasetMetadata(tmp_path / "data").episodes.column("tasks").count([t]) for t in DatasetMetadata(tmp_path / "data").tasks}
    assert len(tasks) > 1 and main([*words, f"--dataset.tasks={list(tasks)[0]}", f"--output={tmp_path / 'one.json'}"]) == 0
    found = json.loads((tmp_path / "one.json").read_text())
    assert list(found["per_task"]) == [list(tasks)[0]] and len(found["episodes"]) == list(tasks.values())[0] < 3
    assert main([*words, "--dataset.tasks=sing"]) == 2
