"""Diffusion policy: equal to LeRobot 0.4.4 and to diffusers on goldens, its memory of observations, its saved folder, and what is refused."""
import json
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
from vla_nb.evaluation.offline import action_errors, windows
from vla_nb.networks.ddpm import make_schedule
from vla_nb.networks.resnet import ResNet, load_backbone
from vla_nb.policies.diffusion import DiffusionConfig, DiffusionPolicy, RgbEncoder, crop
from vla_nb.policies.store import load_policy
from vla_nb.processors.pipeline import Pipeline

GOLDENS = Path(__file__).parent / "goldens"
sys.path.insert(0, str(GOLDENS))
from seeded import seeded  # noqa: E402

GOLD = load_file(GOLDENS / "diffusion/diffusion.safetensors")
FOLDER = GOLDENS / "diffusion/folder"
SHAPES = {"observation.images.top": (3, 40, 56), "observation.images.wrist": (3, 40, 56), "observation.state": (5,), "action": (4,)}
BASE = dict(n_obs_steps=2, horizon=8, n_action_steps=4, normalization_mapping={"VISUAL": "MEAN_STD", "STATE": "MIN_MAX", "ACTION": "MIN_MAX"},
            drop_n_last_frames=3, vision_backbone="resnet18", resize_shape=None, crop_ratio=1.0, crop_shape=(35, 50), crop_is_random=False,
            pretrained_backbone_weights=None, use_group_norm=True, spatial_softmax_num_keypoints=6,
            use_separate_rgb_encoder_per_camera=False, down_dims=(16, 32, 48), kernel_size=5, n_groups=4, diffusion_step_embed_dim=12,
            use_film_scale_modulation=True, noise_scheduler_type="DDPM", num_train_timesteps=20, beta_schedule="squaredcos_cap_v2",
            beta_start=0.0001, beta_end=0.02, prediction_type="epsilon", clip_sample=True, clip_sample_range=1.0, num_inference_steps=None,
            compile_model=False, compile_mode="reduce-overhead", do_mask_loss_for_padding=False, optimizer_lr=1e-4,
            optimizer_betas=(0.95, 0.999), optimizer_eps=1e-8, optimizer_weight_decay=1e-6, scheduler_name="cosine",
            scheduler_warmup_steps=500, loss_reduction="all")
CASES = {"shared": {},
         "separate": dict(use_separate_rgb_encoder_per_camera=True, use_group_norm=False, resize_shape=(32, 44), crop_ratio=0.9, crop_shape=None,
                          noise_scheduler_type="DDIM", num_inference_steps=7, prediction_type="sample", use_film_scale_modulation=False,
                          do_mask_loss_for_padding=True, beta_schedule="linear", clip_sample_range=0.8),
         "whole": dict(crop_shape=None, down_dims=(16, 16), kernel_size=3, clip_sample=False, num_inference_steps=6, n_obs_steps=3, beta_schedule="scaled_linear",
                       vision_backbone="resnet34")}


def stats():
    g = torch.Generator().manual_seed(3)
    found = {k: {"min": -2 - torch.rand(s, generator=g), "max": 2 + torch.rand(s, generator=g)} for k, s in SHAPES.items() if len(s) == 1}
    picture = {"mean": np.reshape([0.485, 0.456, 0.406], (3, 1, 1)), "std": np.reshape([0.229, 0.224, 0.225], (3, 1, 1))}
    return Stats(found | {k: picture for k, s in SHAPES.items() if len(s) == 3})


def raw_batch(n=2):
    g = torch.Generator().manual_seed(4)
    batch = {k: torch.rand(2, n, *s, generator=g) if len(s) == 3 else torch.randn(2, n, *s, generator=g) for k, s in SHAPES.items()}
    batch["action"] = torch.randn(2, 8, 4, generator=g)
    return {**batch, "action_is_pad": torch.arange(8) >= torch.tensor([[8], [5]]), "task": ["lift", "lift"]}


def build(case, **changes):
    "Our policy of a golden case, with the weights of the recipe."
    kinds = {k: Feature("VISUAL" if len(s) == 3 else "STATE", s) for k, s in SHAPES.items() if k != "action"}
    config = DiffusionConfig(kinds, {"action": Feature("ACTION", (4,))}, **{**BASE, **CASES[case], **changes})
    policy = DiffusionPolicy.from_data(config, stats=stats())
    policy.load_state_dict(seeded(policy.state_dict()))
    return policy.eval()


def close(a, b, limit=1e-5): assert (a - b).abs().max() <= limit, (a - b).abs().max()


def drawn(steps, rows): return torch.stack([torch.randn(rows, 8, 4) for _ in range(steps)])


# ---------------------------------------------------------------- equal to the originals

@pytest.mark.parametrize("sampler", ("DDPM", "DDIM"))
@pytest.mark.parametrize("kind", ("linear", "scaled_linear", "squaredcos_cap_v2"))
def test_schedules_equal_diffusers(sampler, kind):
    "Every step visited, both things a network may guess, and the noise of training."
    x, guess = GOLD["schedule/x"], GOLD["schedule/guess"]
    for predicts in ("epsilon", "sample"):
        schedule = make_schedule(sampler, 50, kind, predicts=predicts, limit=0.9)
        torch.manual_seed(11)
        found = [schedule.step(guess, t, to, x, torch.randn(x.shape) if to >= 0 and sampler == "DDPM" else None) for t, to in schedule.visits(12)]
        close(torch.stack(found), GOLD[f"schedule/{sampler}/{kind}/{predicts}"], 1e-6)
    close(schedule.add_noise(x, guess, torch.tensor([3, 44])), GOLD[f"schedule/noisy/{kind}"], 1e-6)


@pytest.mark.parametrize("case", CASES)
def test_equal_to_lerobot(case):
    "Names and shapes of all tensors, loss, gradient, chunk and physical actions, with the same noise."
    policy = build(case)
    with safe_open(GOLDENS / "diffusion/diffusion.safetensors", "pt") as f: keys = json.loads(f.metadata()["keys"])[case]
    state, n = policy.state_dict(), policy.config.n_obs_steps
    assert sorted(k for k in state if "backbone" in k)[::20] == keys.pop("backbone")
    assert {k: list(v.shape) for k, v in state.items() if "backbone" not in k} == keys
    batch = policy.preprocessor(raw_batch(n))
    torch.manual_seed(30)
    chunk = policy.predict_action_chunk(batch, drawn(len(policy.diffusion.visits), 2))
    close(chunk, GOLD[f"{case}/chunk"])
    close(policy.postprocessor(GOLD[f"{case}/chunk"]), GOLD[f"{case}/physical"])
    torch.manual_seed(31)
    total, count, _ = policy.train().loss_terms(batch)
    close(total / count, GOLD[f"{case}/loss"])
    (total / count).backward()
    close(policy.diffusion.unet.final_conv[1].weight.grad, GOLD[f"{case}/grad"])


def test_inputs_are_normalised_as_in_lerobot():
    policy = build("shared")
    batch = policy.preprocessor(raw_batch())
    for k in ("observation.state", "action"): close(batch[k], GOLD[f"normal/{k}"])


def test_an_episode_as_in_lerobot(monkeypatch):
    "Nine steps, a plan of four actions at the first, fifth and ninth; pictures are looked at only where a plan needs them."
    policy, seen = build("shared"), raw_batch(9)
    plan = policy.predict_action_chunk
    monkeypatch.setattr(policy, "predict_action_chunk", lambda batch: plan(batch, drawn(20, 1)))
    torch.manual_seed(40)
    actions, looked = [], []
    for i in range(9):
        looked.append(policy.needs_observation)
        now = {k: v[0, i] for k, v in seen.items() if k.startswith("observation")}
        actions.append(policy.act({**now, "task": "lift"} if looked[-1] else {}))
    close(torch.from_numpy(np.stack(actions)), GOLD["episode"][:, 0])
    assert looked == [True, False, False, True, True, False, False, True, True]


def test_pipelines_are_saved_as_lerobot_saves_them(tmp_path):
    policy = build("shared")
    policy.save_pretrained(tmp_path / "p")
    for name in ("policy_preprocessor", "policy_postprocessor"):
        ours, theirs = (json.loads((f / f"{name}.json").read_text()) for f in (tmp_path / "p", FOLDER))
        assert [s["registry_name"] for s in ours["steps"]] == [s["registry_name"] for s in theirs["steps"]]
        for a, b in zip(ours["steps"], theirs["steps"]): assert b["config"].items() <= a["config"].items()
        again, mine = Pipeline.load(FOLDER, name), policy.preprocessor if name.startswith("policy_pre") else policy.postprocessor
        for key in ("observation.state", "action"): assert torch.equal(again(raw_batch())[key], mine(raw_batch())[key])
    ours, theirs = (json.loads((f / "config.json").read_text()) for f in (tmp_path / "p", FOLDER))
    known = {f.name for f in fields(DiffusionConfig)} - {"loss_reduction"}
    assert known < theirs.keys() and {k: ours[k] for k in known} == {k: theirs[k] for k in known}
    assert torch.equal(load_policy(tmp_path / "p", "cpu").plan(raw_batch()), policy.plan(raw_batch()))


# ---------------------------------------------------------------- behaviour

def test_a_new_episode_forgets_the_past():
    policy, seen = build("shared"), raw_batch(3)
    now = [{k: v[0, i] for k, v in seen.items() if k.startswith("observation")} | {"task": "lift"} for i in range(3)]
    first = policy.act(now[0])
    policy.reset()
    assert not np.allclose(policy.act(now[1]), first)
    policy.reset()
    np.testing.assert_array_equal(policy.act(now[0]), first)


def test_one_observation_stands_for_those_before():
    policy, raw = build("shared"), raw_batch()
    batch = policy.preprocessor(raw)
    alone = {k: v[:, 1] if k.startswith("observation") else v for k, v in batch.items()}
    twice = {k: v[:, 1:].expand(-1, 2, *v.shape[2:]) if k.startswith("observation") else v for k, v in batch.items()}
    close(policy.predict_action_chunk(alone), policy.predict_action_chunk(twice), 1e-6)
    assert not torch.allclose(policy.predict_action_chunk(alone), policy.predict_action_chunk(batch))


def test_evaluation_is_repeatable_and_disturbs_nobody():
    "Loss and chunk draw nothing from the stream of random numbers in evaluation mode; in training the loss does."
    policy = build("shared")
    batch, before = policy.preprocessor(raw_batch()), torch.get_rng_state()
    losses = [policy.loss_terms(batch)[0] for _ in range(2)]
    policy.predict_action_chunk(batch)
    assert losses[0] == losses[1] and torch.equal(before, torch.get_rng_state())
    policy.train()
    assert policy.loss_terms(batch)[0] != policy.loss_terms(batch)[0]


def test_masked_loss():
    "Padded actions count unless they are masked; `all` keeps them in the number."
    raw = raw_batch()
    for changes, count in ((dict(loss_reduction="valid"), 64), (dict(do_mask_loss_for_padding=True, loss_reduction="valid"), 52),
                           (dict(do_mask_loss_for_padding=True), 64)):
        policy = build("shared", **changes)
        total, n, _ = policy.loss_terms(policy.preprocessor(raw))
        assert n == count and total > 0


def test_random_crops_differ_between_pictures_and_stay_inside():
    pictures = torch.arange(40 * 56.).reshape(1, 1, 40, 56).expand(64, 3, 40, 56)
    torch.manual_seed(0)
    found = crop(pictures, (35, 50), True)
    corners = found[:, 0, 0, 0]
    assert found.shape == (64, 3, 35, 50) and len(corners.unique()) > 20
    assert {int(c) // 56 for c in corners} == set(range(6)) and {int(c) % 56 for c in corners} == set(range(7))
    assert torch.equal(found[:, 0, 7, 9] - corners, torch.full((64,), 7 * 56 + 9.0))
    policy = build("shared", crop_is_random=True)
    batch, (noise, t) = policy.preprocessor(raw_batch()), (torch.randn(2, 8, 4), torch.tensor([3, 9]))
    assert policy.loss_terms(batch, noise, t)[0] == policy.loss_terms(batch, noise, t)[0]
    policy.train()
    assert policy.loss_terms(batch, noise, t)[0] != policy.loss_terms(batch, noise, t)[0]


def test_pretrained_weights_reach_every_encoder(tmp_path, monkeypatch):
    "Counters that old files lack keep their start."
    net = ResNet("resnet18", torch.nn.BatchNorm2d)
    state = {k: v for k, v in seeded(net.state_dict()).items() if "num_batches" not in k}
    torch.save({**state, "fc.weight": torch.zeros(2, 2)}, tmp_path / "w.pth")
    load_backbone(net, tmp_path / "w.pth")
    monkeypatch.setattr("vla_nb.policies.diffusion.weights_file", lambda name: tmp_path / "w.pth")
    name = "ResNet18_Weights.IMAGENET1K_V1"
    kinds = {k: Feature("VISUAL" if len(s) == 3 else "STATE", s) for k, s in SHAPES.items() if k != "action"}
    config = DiffusionConfig(kinds, {"action": Feature("ACTION", (4,))}, **{**BASE, **CASES["separate"], "pretrained_backbone_weights": name})
    policy = DiffusionPolicy.from_data(config, stats=stats())
    encoders = [m for m in policy.modules() if isinstance(m, RgbEncoder)]
    assert len(encoders) == 2 and all(torch.equal(e.backbone[0].weight, state["conv1.weight"]) for e in encoders)
    assert all(torch.equal(e.backbone[7][1].bn2.running_var, state["layer4.1.bn2.running_var"]) for e in encoders)


def test_features_are_the_same_in_training():
    policy = build("shared", crop_is_random=True).train()
    batch = policy.preprocessor(raw_batch())
    h, masks = policy.features(batch, -1)
    assert torch.equal(h, policy.features(batch, -1)[0]) and policy.training
    assert h.shape == (2, 4, 12) == (*masks["valid"].shape, policy.hidden_dim) and policy.num_hidden_states == 2
    h.sum().backward()
    assert policy.diffusion.rgb_encoder.backbone[0].weight.grad.abs().sum() > 0


@pytest.mark.parametrize("change, words", [
    (dict(horizon=12), "multiple of 8"), (dict(n_action_steps=8), "at most"), (dict(crop_shape=(41, 50)), "larger than the pictures"),
    (dict(noise_scheduler_type="PNDM"), "DDPM or DDIM"), (dict(prediction_type="v"), "epsilon or sample"),
    (dict(beta_schedule="cubic"), "squaredcos_cap_v2"), (dict(num_inference_steps=21), "num_train_timesteps = 20"),
    (dict(pretrained_backbone_weights="ResNet18_Weights.IMAGENET1K_V1"), "would ruin"), (dict(vision_backbone="vgg"), "resnet18"),
    (dict(resize_shape=(30, 30), crop_ratio=1.2), "crop_ratio"), (dict(loss_reduction="sum"), "valid, all")])
def test_wrong_configurations(change, words):
    with pytest.raises(UserError, match=words): build("shared", **change)


def test_wrong_batches():
    policy, raw = build("shared"), raw_batch()
    with pytest.raises(UserError, match="horizon = 8"): policy.loss_terms({**raw, "action": raw["action"][:, :4]})
    with pytest.raises(UserError, match="lacks 'action'"): policy.loss_terms({k: v for k, v in raw.items() if k != "action"})
    with pytest.raises(UserError, match="3 moments"): policy.predict_action_chunk(raw_batch(3))
    with pytest.raises(UserError, match="observation.images.wrist"): policy.plan({k: v for k, v in raw.items() if "wrist" not in k})


# ---------------------------------------------------------------- training from the command line

LITTLE = ("--policy.type=diffusion --policy.pretrained_backbone_weights=none --policy.use_group_norm=true --policy.horizon=8 "
          "--policy.n_action_steps=4 --policy.down_dims=16,32 --policy.n_groups=4 --policy.diffusion_step_embed_dim=8 "
          "--policy.num_train_timesteps=10 --policy.spatial_softmax_num_keypoints=4 --policy.crop_shape=28,28 "
          "--policy.use_separate_rgb_encoder_per_camera=false --policy.drop_n_last_frames=2").split()


def test_train_resume_and_offline_errors(tmp_path, monkeypatch):
    "Samples look back and ahead; a run that was stopped and resumed ends bit for bit as one that was not; `eval offline` reads it."
    for name, value in (("CACHE_ROOT", tmp_path / "cache"), ("THREADS", "1"), ("DEVICE", "cpu")): monkeypatch.setenv(f"VLA_NB_{name}", str(value))
    fake_dataset(tmp_path / "data", episodes=3, frames=12, cameras=("top",), size=(32, 32))
    words = ["train", f"--dataset.root={tmp_path / 'data'}", "--batch_size=4", "--save_freq=2", "--log_freq=1", *LITTLE]
    assert main([*words, f"--output_dir={tmp_path / 'whole'}", "--steps=4"]) == 0
    assert main([*words, f"--output_dir={tmp_path / 'parts'}", "--steps=4"]) == 0
    shutil.rmtree(tmp_path / "parts/checkpoints/000004")                   # as if it had been killed after step 2
    (tmp_path / "parts/checkpoints/last").unlink()
    assert main([*words, f"--output_dir={tmp_path / 'parts'}", "--steps=4", "--resume=true"]) == 0
    a, b = (load_file(tmp_path / f"{run}/checkpoints/000004/pretrained_model/model.safetensors") for run in ("whole", "parts"))
    assert all(torch.equal(a[k], b[k]) for k in a) and a.keys() == b.keys()
    settings = json.loads((tmp_path / "whole/checkpoints/000004/pretrained_model/train_config.json").read_text())["optimizer"]
    wanted = dict(type="adam", lr=1e-4, betas=[0.95, 0.999], eps=1e-8, weight_decay=1e-6, grad_clip_norm=10.0, schedule="diffuser", warmup_steps=500)
    assert {k: settings[k] for k in wanted} == wanted
    assert main(["eval", "offline", f"--policy.path={tmp_path / 'whole'}", f"--dataset.root={tmp_path / 'data'}", "--episodes=2:3",
                 "--stride=4", f"--output={tmp_path / 'offline.json'}"]) == 0
    found = json.loads((tmp_path / "offline.json").read_text())["all"]
    assert found["n"] == 3 and found["mse"] > 0 and len(found["mae"]) == 4


def test_offline_compares_the_executed_actions(tmp_path):
    "The plan's first action is compared with the recorded action of the same frame, not with the one before it."
    policy = build("shared")
    policy.predict_action_chunk = lambda batch: batch["action"][:, 1:5]
    raw = raw_batch()
    error, valid = action_errors(policy, raw, policy.preprocessor(raw), now=1)
    assert np.abs(error).max() < 1e-5 and valid.tolist() == [[True] * 4, [True] * 4]
    assert windows(policy.config, 10)["action"] == [-0.1, 0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
    assert windows(policy.config, 10)["observation.state"] == [-0.1, 0]
