"""Checkpoints of LeRobot: imported with every tensor and field accounted for, exported, fetched from a Hub, verified, refused."""
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from fakehub import FakeHub
from vla_nb.apps.cli import main as vla_nb
from vla_nb.checkpoints.command import verify_checkpoint
from vla_nb.checkpoints.lerobot import export_lerobot, import_lerobot, read_lerobot
from vla_nb.core.config import load_json
from vla_nb.core.stats import Stats, compute_stats
from vla_nb.core.types import Feature, UserError
from vla_nb.policies.act import ActConfig, ActPolicy
from vla_nb.policies.diffusion import DiffusionConfig, DiffusionPolicy
from vla_nb.policies.smolvla import SmolVLAConfig, SmolVLAPolicy
from vla_nb.policies.store import load_policy

GOLDENS = Path(__file__).parent / "goldens/smolvla"
AS_LEROBOT = {"patch_positions": "shifted", "loss_reduction": "all"}
CAMERAS = ("observation.images.top", "observation.images.wrist")


@pytest.fixture()
def golden(tmp_path, monkeypatch):
    "A folder that LeRobot wrote, to be changed at will; it names its VLM `vlm`."
    shutil.copytree(GOLDENS / "base", tmp_path / "base")
    shutil.copytree(GOLDENS / "vlm", tmp_path / "vlm")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "base"


def raw(found): return {**{k[4:]: v for k, v in found.items() if k.startswith("raw.")}, "task": ["open the drawer.", "push the big red button"]}


def close(a, b): assert (a - b).abs().max() <= 1e-5, (a - b).abs().max()


def acts_as_lerobot(policy):
    "The chunk and the physical actions are LeRobot's."
    found = load_file(GOLDENS / "base/expected.safetensors")
    chunk = policy.predict_action_chunk(policy.preprocessor(raw(found)), found["noise"])
    close(chunk, found["chunk"])
    close(policy.postprocessor(chunk), found["actions"])


def change_weights(folder, change):
    state = load_file(folder / "model.safetensors")
    save_file(change(state), folder / "model.safetensors")


def change_config(folder, **values):
    (folder / "config.json").write_text(json.dumps({**load_json(folder / "config.json"), **values}))


# ---------------------------------------------------------------- import

def test_import_of_lerobot_04(golden, tmp_path):
    "All tensors loaded, fields of the run left out, actions as LeRobot's; the written folder needs nothing of the source."
    table, left = import_lerobot(golden, tmp_path / "ours", AS_LEROBOT)
    state = load_file(golden / "model.safetensors")
    assert table.counts() == {"loaded": len(state), "tied": 0, "new": 0, "ignored": 0}
    assert left["device"] == "of the run" and left["rtc_config"] == "off" and "optimizer_lr" not in left
    shutil.rmtree(golden); shutil.rmtree(tmp_path / "vlm")
    policy = load_policy(tmp_path / "ours", "cpu")
    acts_as_lerobot(policy)
    assert policy.config.optimizer_lr == 1e-4


def test_import_of_lerobot_06_and_compiled_names(golden, tmp_path):
    "Fields of 0.6, the tokenizer in a folder of the checkpoint, `._orig_mod`, an output head that is tied, a computed buffer."
    change_config(golden, pretrained_revision=None, use_peft=False)
    shutil.copytree(tmp_path / "vlm", golden / "tokenizer")
    saved = load_json(golden / "policy_preprocessor.json")
    step = next(s for s in saved["steps"] if s["registry_name"] == "tokenizer_processor")
    step["config"]["tokenizer_name"], step["artifacts"] = "tokenizer", {"tokenizer": "tokenizer"}
    (golden / "policy_preprocessor.json").write_text(json.dumps(saved))
    head, layer = "model.vlm_with_expert.vlm.lm_head.weight", "model.vlm_with_expert.lm_expert.norm.weight"

    def change(state):
        state.pop(head)
        state["model.vlm_with_expert.lm_expert._orig_mod.norm.weight"] = state.pop(layer)
        return {**state, "model.vlm_with_expert.lm_expert.rotary_emb.inv_freq": torch.ones(4)}
    change_weights(golden, change)
    policy, table, _ = read_lerobot(golden, AS_LEROBOT)
    assert table.counts()["tied"] == table.counts()["ignored"] == 1
    embedding = policy.state_dict()["model.vlm_with_expert.vlm.model.text_model.embed_tokens.weight"]
    assert torch.equal(policy.state_dict()[head], embedding)
    acts_as_lerobot(policy)


def old_folder(folder):
    "The same policy as LeRobot 0.3 wrote it: statistics among the weights, no pipelines."
    stats = load_file(folder / "policy_preprocessor_step_5_normalizer_processor.safetensors")
    def change(state):
        for name, x in stats.items():
            key, _, stat = name.rpartition(".")
            for part in ("normalize_inputs", *(("normalize_targets", "unnormalize_outputs") if key == "action" else ())):
                state[f"{part}.buffer_{key.replace('.', '_')}.{stat}"] = x.clone()
        return state
    change_weights(folder, change)
    for file in folder.glob("policy_*"): file.unlink()


def test_import_of_lerobot_03(golden, tmp_path):
    "Statistics among the weights become those of new pipelines; load_policy says which command to use."
    old_folder(golden)
    with pytest.raises(UserError, match="vla-nb checkpoint import"): load_policy(golden, "cpu")
    table, _ = import_lerobot(golden, tmp_path / "ours", AS_LEROBOT)
    assert table.counts()["ignored"] == 16
    acts_as_lerobot(load_policy(tmp_path / "ours", "cpu"))


def test_statistics_that_were_never_filled(golden, tmp_path):
    old_folder(golden)
    change_weights(golden, lambda s: {k: torch.full_like(v, torch.inf) if "buffer_action" in k else v for k, v in s.items()})
    with pytest.raises(UserError, match="never filled with statistics"): import_lerobot(golden, tmp_path / "no")
    change_weights(golden, lambda s: {k: v for k, v in s.items() if "buffer" not in k})
    with pytest.raises(UserError, match="neither policy_preprocessor.json nor statistics"): import_lerobot(golden, tmp_path / "no")


@pytest.mark.parametrize("change, words", [
    (dict(rtc_config={"enabled": True}), "rtc_config=.*not available here"), (dict(adapt_to_pi_aloha=True), "adapt_to_pi_aloha"),
    (dict(use_peft=True), "use_peft"), (dict(num_vlm_layer=3), "num_vlm_layer.*did you mean 'num_vlm_layers'"),
    (dict(num_vlm_layers=2), "no policy of this kind has"), (dict(type="tdmpc"), "tdmpc"), (dict(max_state_dim=9), "wants"),
    (dict(vlm_model_name="gone"), "neither a folder nor")])
def test_configurations_that_do_not_fit(golden, tmp_path, change, words):
    "A field, an option, a type, a size that do not fit: one sentence, nothing written."
    change_config(golden, **change)
    with pytest.raises(UserError, match=words): import_lerobot(golden, tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_weights_that_do_not_fit(golden, tmp_path):
    bias = "model.action_out_proj.bias"
    change_weights(golden, lambda s: {**s, "model.value_head.weight": torch.ones(2)})
    with pytest.raises(UserError, match="no policy of this kind has: 'model.value_head.weight'"): import_lerobot(golden, tmp_path / "no")
    change_weights(golden, lambda s: {k: v for k, v in s.items() if k not in (bias, "model.value_head.weight")})
    with pytest.raises(UserError, match="lacks 1 tensors of the policy.*action_out_proj.bias"): import_lerobot(golden, tmp_path / "no")
    change_weights(golden, lambda s: {**s, bias: torch.full((6,), torch.nan)})
    with pytest.raises(UserError, match="NaN or infinity"): import_lerobot(golden, tmp_path / "no")
    (golden / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="LoRA adapter"): import_lerobot(golden, tmp_path / "no")
    assert not (tmp_path / "no").exists()


# ---------------------------------------------------------------- export

def stats():
    rng = np.random.default_rng(0)
    found = {k: compute_stats(rng.normal(1, 2, (50, n)).astype(np.float32)) for k, n in (("observation.state", 5), ("action", 4))}
    return Stats(found | {k: {"mean": np.full((3, 1, 1), 0.4), "std": np.full((3, 1, 1), 0.3)} for k in CAMERAS})


def build(kind):
    "A tiny random policy."
    inputs = {**{k: Feature("VISUAL", (3, 48, 64)) for k in CAMERAS}, "observation.state": Feature("STATE", (5,))}
    outputs = {"action": Feature("ACTION", (4,))}
    torch.manual_seed(0)
    if kind == "act":
        small = dict(chunk_size=6, n_action_steps=6, dim_model=32, n_heads=4, dim_feedforward=48, latent_dim=8)
        return ActPolicy.from_data(ActConfig(inputs, outputs, pretrained_backbone_weights=None, **small), stats=stats()).eval()
    if kind == "diffusion":
        small = dict(n_obs_steps=2, horizon=8, n_action_steps=4, use_group_norm=True, use_separate_rgb_encoder_per_camera=False,
                     down_dims=(16, 32), n_groups=4, num_train_timesteps=5)
        return DiffusionPolicy.from_data(DiffusionConfig(inputs, outputs, pretrained_backbone_weights=None, **small), stats=stats()).eval()
    return SmolVLAPolicy.from_data(SmolVLAConfig.tiny({**inputs, **outputs}), ["open it"], None, stats()).eval()


def batch_of(policy):
    g = torch.Generator().manual_seed(1)
    n = getattr(policy.config, "n_obs_steps", 1)
    time = () if n == 1 else (n,)
    return {**{k: torch.rand(2, *time, 3, 48, 64, generator=g) for k in CAMERAS}, "observation.state": torch.randn(2, *time, 5, generator=g),
            "task": ["open it", "open it now"]}


@pytest.mark.parametrize("kind", ["act", "diffusion", "smolvla"])
def test_export_and_back(kind, tmp_path):
    "LeRobot's fields only, its steps, no files it would not read; imported again the policy plans the same."
    policy = build(kind)
    policy.save_pretrained(tmp_path / "ours")
    export_lerobot(tmp_path / "ours", tmp_path / "theirs")
    config = load_json(tmp_path / "theirs/config.json")
    assert not config.keys() & {"loss_reduction", "vlm", "patch_positions", "allow_random_backbone", "use_peft"} and config["type"] == kind
    if kind == "smolvla": assert config.keys() <= load_json(GOLDENS / "base/config.json").keys()
    saved = load_json(tmp_path / "theirs/policy_preprocessor.json")
    assert all("artifacts" not in s and s["config"].get("normalize_observation_keys", 1) for s in saved["steps"])
    again, table, _ = read_lerobot(tmp_path / "theirs")
    assert torch.equal(again.plan(batch_of(policy)), policy.plan(batch_of(policy)))
    assert all(f.ok for f in verify_checkpoint(tmp_path / "theirs"))


def test_export_says_what_lerobot_does_differently(tmp_path):
    policy = build("smolvla")
    policy.save_pretrained(tmp_path / "p")
    notes = export_lerobot(tmp_path / "p", tmp_path / "x")
    assert any("'shifted' positions" in n for n in notes) and any("loss over 'all'" in n for n in notes)
    assert [n.split()[0:3] for n in export_lerobot(tmp_path / "p", tmp_path / "x", "0.6")] == [["LeRobot", "will", "look"]]
    assert load_json(tmp_path / "x/config.json")["use_peft"] is False
    from vla_nb.policies.fake import FakePolicy
    FakePolicy().save_pretrained(tmp_path / "fake")
    with pytest.raises(UserError, match="cannot read our fake policies"): export_lerobot(tmp_path / "fake", tmp_path / "y")


def test_backbones_that_lerobot_lacks(tmp_path):
    "A policy whose backbone is ours alone is refused, not written for LeRobot to fail on."
    known = build("act").config
    for backbone in ("conv", "dinov2_tiny14"):
        policy = ActPolicy.from_data(replace(known, vision_backbone=backbone, pretrained_backbone_weights=None), stats=stats())
        policy.save_pretrained(tmp_path / backbone)
        with pytest.raises(UserError, match="is not in LeRobot"): export_lerobot(tmp_path / backbone, tmp_path / "x")
        assert not (tmp_path / "x").exists()


def test_exports_acted_identically_in_lerobot():
    "What tools/check_with_lerobot.py wrote when LeRobot 0.4.4 ran our exports."
    found = load_json(Path(__file__).parents[1] / "reports/lerobot_runs_our_exports.json")
    assert found["lerobot"] == "0.4.4" and found["largest_difference"].keys() >= {"act", "diffusion", "smolvla"}
    assert all(x <= 1e-5 for v in found["largest_difference"].values() for x in v.values())


def test_equality_table():
    "The committed table of `make equality`: every policy that is not a fake, every importer, within 1e-5."
    from vla_nb.policies.base import POLICIES
    found = load_json(Path(__file__).parents[1] / "reports/equality.json")
    assert all(r["passed"] and r["comparisons"] and r["largest"] <= 1e-5 for r in found["rows"]), found["rows"]
    named = {w for r in found["rows"] if r["kind"] == "policy" for w in r["what"].split(", ")}
    assert named >= POLICIES.keys() - {"fake"}
    assert {r["what"] for r in found["rows"] if r["kind"] == "importer"} >= {"LeRobot 0.4", "LeRobot 0.6", "openpi, PyTorch", "openpi, JAX"}


# ---------------------------------------------------------------- Hub, command line, verify

def test_from_the_hub(golden, tmp_path, monkeypatch):
    "A checkpoint of LeRobot, and the tokenizer and VLM it names, from the Hub: imported, and loaded directly."
    from huggingface_hub import constants
    from vla_nb.core.hub import push_files
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.delenv("VLA_NB_HUB_ENDPOINT", raising=False)
    monkeypatch.setenv("HF_TOKEN", "secret")
    with FakeHub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        change_config(golden, vlm_model_name="me/vlm")
        saved = (golden / "policy_preprocessor.json").read_text().replace('"vlm"', '"me/vlm"')
        (golden / "policy_preprocessor.json").write_text(saved)
        for name in ("base", "vlm"):
            push_files(f"me/{name}", "model", {p.name: p for p in (tmp_path / name).iterdir()}, "x", False)
        shutil.rmtree(golden); shutil.rmtree(tmp_path / "vlm")
        assert vla_nb(["checkpoint", "import", "me/base", str(tmp_path / "ours"), "--policy.patch_positions=shifted"]) == 0
        acts_as_lerobot(load_policy(tmp_path / "ours", "cpu"))
        assert load_policy("me/base", "cpu").config.vlm.width == 16


def test_command_line(golden, tmp_path, capsys):
    assert vla_nb(["checkpoint", "import", str(golden), str(tmp_path / "ours"), "--policy.loss_reduction=all"]) == 0
    assert "tensors: 133 loaded" in capsys.readouterr().out.replace(f"{len(load_file(golden / 'model.safetensors'))} loaded", "133 loaded")
    assert vla_nb(["checkpoint", "export", str(tmp_path / "ours"), str(tmp_path / "x"), "--to=0.6"]) == 0
    assert vla_nb(["checkpoint", "verify", str(tmp_path / "x")]) == 0
    assert "acting: a black picture" in capsys.readouterr().out
    assert vla_nb(["checkpoint", "verify", str(tmp_path / "x"), "--fast"]) != 0
    assert vla_nb(["checkpoint", "import", str(golden)]) != 0


def test_verify_names_what_is_wrong(tmp_path):
    policy = build("act")
    policy.save_pretrained(tmp_path / "p")
    assert all(f.ok for f in verify_checkpoint(tmp_path / "p"))
    def says(change):
        shutil.rmtree(tmp_path / "q", ignore_errors=True)
        shutil.copytree(tmp_path / "p", tmp_path / "q")
        change(tmp_path / "q")
        return " ".join(f.text for f in verify_checkpoint(tmp_path / "q") if not f.ok)
    assert "policy_preprocessor_step_3" in says(lambda q: next(q.glob("policy_pre*step_3*")).unlink())
    assert "NaN" in says(lambda q: change_weights(q, lambda s: {k: v * torch.nan if k == "model.action_head.bias" else v for k, v in s.items()}))
    assert "truncated or damaged" in says(lambda q: os.truncate(q / "model.safetensors", 1000))
    assert "wants" in says(lambda q: change_config(q, dim_feedforward=64))
    state = "policy_postprocessor_step_0_unnormalizer_processor.safetensors"
    assert "action lacks mean" in says(lambda q: save_file({"action.std": torch.ones(4)}, q / state))
    assert "dimensions" in says(lambda q: save_file({"action.mean": torch.ones(7)}, q / state))


def test_pi0_under_the_names_of_lerobot(tmp_path):
    "The tower without its level `vision_model.`, the table under the name of the tied head, a head nobody uses, an empty camera."
    from vla_nb.policies.pi0 import Pi0Config, Pi0Policy
    from vla_nb.processors.tokenize import write_word_tokenizer
    write_word_tokenizer(["open it now"], tmp_path / "tokenizer")
    features = {CAMERAS[0]: Feature("VISUAL", (3, 48, 64)), "observation.state": Feature("STATE", (5,)), "action": Feature("ACTION", (4,))}
    config = Pi0Config.published(features, chunk_size=4, n_action_steps=4, vocab_size=40, paligemma_variant="32,2,64,4,1,8",
                                 action_expert_variant="16,2,32,4,1,8", vision_variant="24,2,4,32,14", image_resolution=(28, 28),
                                 tokenizer_name=str(tmp_path / "tokenizer"))
    torch.manual_seed(0)
    policy = Pi0Policy(config, *Pi0Policy.pipelines(config, stats())).eval()
    policy.save_pretrained(tmp_path / "p")

    def change(state):
        trunk = "model.paligemma_with_expert."
        state[f"{trunk}paligemma.lm_head.weight"] = state.pop(f"{trunk}paligemma.model.language_model.embed_tokens.weight")
        state[f"{trunk}gemma_expert.lm_head.weight"] = torch.zeros(40, 16)
        return {k.replace("vision_tower.vision_model.", "vision_tower.").removeprefix("model."): v for k, v in state.items()}
    change_weights(tmp_path / "p", change)
    read = {**load_json(tmp_path / "p/config.json")["input_features"], "observation.images.empty_camera_0": {"type": "VISUAL", "shape": [3, 28, 28]}}
    change_config(tmp_path / "p", empty_cameras=1, rtc_config=None, push_to_hub=True, use_peft=False, input_features=read)
    again, table, left = read_lerobot(tmp_path / "p")
    assert table.counts()["ignored"] == 1 and {"empty_cameras", "rtc_config"} <= left.keys() and again.cameras == [CAMERAS[0]]
    batch = {k: v for k, v in batch_of(build("act")).items() if k != CAMERAS[1]}
    assert torch.equal(again.plan(batch), policy.plan(batch))
    with pytest.raises(UserError, match="vision_variant=.*LeRobot cannot run"):
        policy.save_pretrained(tmp_path / "q"); export_lerobot(tmp_path / "q", tmp_path / "x")


def test_pi0_fast_of_lerobot_is_refused_by_name(golden, tmp_path):
    "LeRobot's pi0_fast writes other prompts and suffixes than ours; it is not read as if it were ours."
    change_config(golden, type="pi0_fast", paligemma_variant="gemma_2b")
    with pytest.raises(UserError, match="a pi0_fast policy of LeRobot.*not imported"): import_lerobot(golden, tmp_path / "no")
