"""SmolVLA: equal to LeRobot 0.4.4 on goldens and to transformers' SmolVLM, what is trained, and what is refused."""
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from vla_nb.apps.cli import main as vla_nb
from vla_nb.core.config import load_json
from vla_nb.core.stats import Stats, compute_stats
from vla_nb.core.types import Feature, UserError
from vla_nb.networks.blocks import block_mask
from vla_nb.networks.smolvlm import SmolVLM, SmolVLMWithExpert, VLMSizes
from vla_nb.policies.smolvla import SmolVLAConfig, SmolVLAPolicy, load_vlm
from vla_nb.policies.store import load_policy
from vla_nb.processors.tokenize import TokenizerStep, open_tokenizer, write_tokenizer

GOLDENS = Path(__file__).parent / "goldens/smolvla"
VARIANTS = ("base", "options", "cross")
SIZES = VLMSizes.of(load_json(GOLDENS / "vlm/config.json"))


def golden(name):
    "What LeRobot made of its raw batch, and the batch."
    found = load_file(GOLDENS / name / "expected.safetensors")
    with safe_open(GOLDENS / name / "expected.safetensors", "pt") as f: tasks = json.loads(f.metadata()["tasks"])
    return found, {**{k[4:]: v for k, v in found.items() if k.startswith("raw.")}, "task": tasks}


def from_lerobot(name, **changes):
    "Our policy of a folder that LeRobot wrote, with the two choices that make it act as LeRobot 0.4 does."
    here = os.getcwd()
    os.chdir(GOLDENS)                       # the folders name their VLM "vlm"
    try: policy = load_policy(name, "cpu")
    finally: os.chdir(here)
    config = replace(policy.config, **{"patch_positions": "shifted", "loss_reduction": "all", **changes})
    other = SmolVLAPolicy(config, policy.preprocessor, policy.postprocessor).eval()
    other.load_state_dict(policy.state_dict())
    return other


def close(a, b): assert (a - b).abs().max() <= 1e-5, (a - b).abs().max()


@pytest.mark.parametrize("name", VARIANTS)
def test_equal_to_lerobot(name):
    "Inputs, loss, chunk and physical actions, with the same noise and times."
    policy, (found, raw) = from_lerobot(name), golden(name)
    batch = policy.preprocessor(raw)
    for k in ("observation.state", "action", "observation.language.tokens", "observation.language.attention_mask"):
        close(batch[k].float(), found[f"inputs.{k}"].float())
    close(policy.picture(batch["observation.images.top"]), found["inputs.picture"])
    total, count, _ = policy.loss_terms(batch, found["noise"], found["time"])
    close(total / count, found["loss"])
    chunk = policy.predict_action_chunk(batch, found["noise"])
    close(chunk, found["chunk"])
    close(policy.postprocessor(chunk), found["actions"])


@pytest.mark.parametrize("name", VARIANTS)
def test_patch_positions_matter(name):
    "transformers 4.57.6 shifts the positions of patches; without the shift the chunk is another one."
    found, raw = golden(name)
    policy = from_lerobot(name, patch_positions="exact")
    chunk = policy.predict_action_chunk(policy.preprocessor(raw), found["noise"])
    assert 1e-3 < (chunk - found["chunk"]).abs().max() < 1


def test_vlm_equals_transformers():
    "Picture tokens and every hidden state of the language model, against transformers 5 with the same weights."
    from transformers import SmolVLMConfig, SmolVLMForConditionalGeneration
    values = load_json(GOLDENS / "vlm/config.json")
    values["text_config"]["rope_parameters"] = {"rope_type": "default", "rope_theta": 10_000.0}
    torch.manual_seed(0)
    theirs = SmolVLMForConditionalGeneration(SmolVLMConfig(**values)).eval()
    ours = SmolVLMWithExpert(SIZES, num_vlm_layers=0).eval()
    ours.vlm.load_state_dict(theirs.state_dict())
    images, x = torch.rand(2, 3, 32, 32) * 2 - 1, torch.randn(2, 7, 16)
    valid, mask = torch.ones(2, 7, dtype=torch.bool), torch.ones(2, 7)
    with torch.no_grad():
        seen = theirs.model.connector(theirs.model.vision_model(images).last_hidden_state)
        torch.testing.assert_close(ours.embed_pictures(images), seen * 4, atol=1e-5, rtol=1e-5)
        wanted = theirs.model.text_model(inputs_embeds=x, attention_mask=mask, output_hidden_states=True).hidden_states
        for layer, h in enumerate(wanted):
            found = ours.read(x, block_mask(torch.ones(2, 7), valid), valid, layer)
            torch.testing.assert_close(found, h, atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------- a policy of our own

FEATURES = {"observation.images.top": Feature("VISUAL", (3, 20, 32)), "observation.images.wrist": Feature("VISUAL", (3, 32, 32)),
            "observation.state": Feature("STATE", (5,)), "action": Feature("ACTION", (4,))}
TEXTS = ["open the drawer", "push it"]
SMALL = VLMSizes(vocab_size=0, width=32, depth=3, mlp_dim=48, heads=2, kv_heads=1, head_dim=16, vision_width=32, vision_depth=1,
                 vision_heads=2, vision_mlp_dim=48, image_size=32, patch=8, scale=2)


def stats():
    rng = np.random.default_rng(0)
    return Stats({k: compute_stats(rng.normal(1, 2, (60, n)).astype(np.float32)) for k, n in (("observation.state", 5), ("action", 4))})


def build(**changes):
    small = dict(chunk_size=4, n_action_steps=4, resize_imgs_with_padding=(32, 32), num_vlm_layers=3, vlm=SMALL, max_state_dim=8,
                 max_action_dim=8)
    torch.manual_seed(0)
    return SmolVLAPolicy.from_data(SmolVLAConfig.tiny(FEATURES, **{**small, **changes}), TEXTS, None, stats()).eval()


def raw_batch(n=3):
    g = torch.Generator().manual_seed(1)
    return {"observation.images.top": torch.randint(256, (n, 3, 20, 32), generator=g, dtype=torch.uint8),
            "observation.images.wrist": torch.rand(n, 3, 32, 32, generator=g), "observation.state": torch.randn(n, 5, generator=g),
            "action": torch.randn(n, 4, 4, generator=g), "action_is_pad": torch.arange(4).expand(n, 4) > 2, "task": (TEXTS * n)[:n]}


def test_published_keys_on_the_meta_device():
    "Names and shapes of lerobot/smolvla_base."
    with torch.device("meta"): net = SmolVLMWithExpert()
    shapes = {k: tuple(v.shape) for k, v in net.state_dict().items()}
    wanted = {"vlm.model.vision_model.embeddings.position_embedding.weight": (1024, 768), "vlm.lm_head.weight": (49280, 960),
              "vlm.model.text_model.layers.15.mlp.gate_proj.weight": (2560, 960), "lm_expert.norm.weight": (720,),
              "lm_expert.layers.15.self_attn.v_proj.weight": (320, 320), "lm_expert.layers.14.self_attn.q_proj.weight": (960, 720),
              "lm_expert.layers.0.mlp.down_proj.weight": (720, 2048)}
    assert wanted.items() <= shapes.items() and "vlm.model.text_model.layers.16.mlp.gate_proj.weight" not in shapes


def test_what_is_trained():
    "The freeze modes; whatever asks for a gradient gets one."
    for changes, vision, words, state in (({}, True, True, True), (dict(freeze_vision_encoder=True), False, True, True),
                                          (dict(train_expert_only=True), False, False, True),
                                          (dict(train_expert_only=True, train_state_proj=False), False, False, False)):
        policy = build(**changes).train()
        policy(policy.preprocessor(raw_batch()))[0].backward()
        asked = {n for n, p in policy.named_parameters() if p.requires_grad}
        got = {n for n, p in policy.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
        assert asked == got, asked ^ got
        assert [any(part in n for n in got) for part in ("vision_model", "text_model.layers.0", "state_proj")] == [vision, words, state]


def test_training_draws_and_evaluation_does_not():
    "Noise and times are new in every training step and fixed in evaluation; the stream of the run is not disturbed."
    policy, batch = build(), None
    batch = policy.preprocessor(raw_batch())
    a, b = policy(batch)[0], policy(batch)[0]
    assert torch.equal(a, b)
    policy.train()
    assert not torch.equal(policy(batch)[0], policy(batch)[0])
    torch.manual_seed(3)
    wanted = torch.randn(2)
    torch.manual_seed(3)
    policy.eval().predict_action_chunk(batch)
    assert torch.equal(torch.randn(2), wanted)


def test_pretrained_vlm_is_loaded(tmp_path):
    "Weights, sizes and tokenizer come from the folder; a missing tensor and another shape are named; a tied head is copied."
    vlm = tmp_path / "vlm"
    torch.manual_seed(5)
    full = SmolVLM(SIZES, SIZES.depth, "exact")
    state = {k: torch.randn_like(v) for k, v in full.state_dict().items()}
    write_tokenizer(open_tokenizer(GOLDENS / "vlm"), vlm)
    (vlm / "config.json").write_text((GOLDENS / "vlm/config.json").read_text())
    save_file({k: v for k, v in state.items() if k != "lm_head.weight"}, vlm / "model.safetensors")
    policy = build(load_vlm_weights=True, allow_random_backbone=False, vlm_model_name=str(vlm), num_vlm_layers=2)
    mine = policy.model.vlm_with_expert.vlm.state_dict()
    assert policy.config.vlm == SIZES and len(policy.model.vlm_with_expert.text_model.layers) == 2
    assert all(torch.equal(v, state[k]) for k, v in mine.items() if k != "lm_head.weight")
    assert torch.equal(mine["lm_head.weight"], state["model.text_model.embed_tokens.weight"])
    with pytest.raises(UserError, match="another shape"): load_vlm(SmolVLM(replace(SIZES, mlp_dim=32), 2, "exact"), vlm)
    (vlm / "model.safetensors").unlink()
    with pytest.raises(UserError, match="lacks .* tensors of the VLM"): load_vlm(full, vlm)


def test_random_backbone_is_refused():
    with pytest.raises(UserError, match="lerobot/smolvla_base.*load_vlm_weights.*--allow-random-backbone"): build(allow_random_backbone=False)


def test_saved_and_loaded(tmp_path):
    policy = build()
    policy.save_pretrained(tmp_path / "p")
    again = load_policy(tmp_path / "p", "cpu")
    assert again.config == policy.config
    assert torch.equal(again.plan(raw_batch()), policy.plan(raw_batch()))
    assert again.preprocessor[TokenizerStep.registry_name].truncation is False


@pytest.mark.parametrize("change, words", [
    (dict(resize_imgs_with_padding=(32, 16)), "a square"), (dict(resize_imgs_with_padding=(40, 40)), "multiple of 16 pixels"),
    (dict(max_action_dim=3), "has 4 dimensions"), (dict(attention_mode="full"), "cross_attn, self_attn"),
    (dict(num_expert_layers=2), "does not go with 3"), (dict(add_image_special_tokens=True, vlm=replace(SMALL, vocab_size=5)), "ids"),
    (dict(n_obs_steps=2), "n_obs_steps is 2")])
def test_wrong_configurations(change, words):
    with pytest.raises(UserError, match=words): build(**change)


def test_instructions_that_are_too_long():
    policy, raw = build(tokenizer_max_length=3), raw_batch()
    with pytest.raises(UserError, match="more than max_length=3.*raise tokenizer_max_length"): policy.preprocessor(raw)
    step = TokenizerStep(policy.tokenizer, max_length=3)
    with pytest.warns(UserWarning, match="its end is cut off"): found = step({"task": ["open the drawer now"]})
    assert found["observation.language.tokens"].shape == (1, 3)


def test_rows_without_a_camera():
    "A masked camera changes nothing for its row whatever it shows; other rows are not touched."
    policy, raw = build(), raw_batch()
    mask = torch.tensor([True, False, True])
    key = "observation.images.wrist"
    batch = policy.preprocessor({**raw, f"{key}_padding_mask": mask})
    other = {**batch, key: batch[key].flip(-1) * mask.logical_not()[:, None, None, None] + batch[key] * mask[:, None, None, None]}
    a, b, c = (policy.predict_action_chunk(x) for x in (batch, other, {k: v for k, v in batch.items() if "padding" not in k}))
    torch.testing.assert_close(a, b)
    assert torch.allclose(a[[0, 2]], c[[0, 2]], atol=1e-5) and not torch.allclose(a[1], c[1], atol=1e-3)


def test_a_camera_may_be_missing_and_another_renamed(tmp_path):
    "One of two cameras, under the robot's own name; without `empty_cameras` the other one is asked for."
    policy = build(empty_cameras=1)
    policy.preprocessor[0].__init__({"observation.images.laptop": "observation.images.top"})
    seen = {"observation.images.laptop": np.full((20, 32, 3), 90, np.uint8), "observation.state": np.zeros(5), "task": "push it"}
    assert policy.act(seen).shape == (4,) and policy.act(seen).shape == (4,)
    strict = build()
    with pytest.raises(UserError, match="empty_cameras=0.*observation.images.wrist"):
        strict.act({**seen, "observation.images.top": seen["observation.images.laptop"]})


# ---------------------------------------------------------------- from the command line

@pytest.fixture(scope="module")
def box(tmp_path_factory):
    "A dataset of two cameras, and a checkpoint as LeRobot wrote it."
    from vla_nb.datasets.fake import fake_dataset
    box, patch = tmp_path_factory.mktemp("train"), pytest.MonkeyPatch()
    for name, value in (("CACHE_ROOT", box / "cache"), ("OUTPUTS", box / "outputs"), ("THREADS", "1"), ("DEVICE", "cpu")):
        patch.setenv(f"VLA_NB_{name}", str(value))
    fake_dataset(box / "koch", episodes=3, frames=8, cameras=("laptop", "phone"), size=(32, 32))
    for part in ("base", "vlm"): shutil.copytree(GOLDENS / part, box / part)
    patch.chdir(box)
    yield box
    patch.undo()


def train(out, *words): return vla_nb(["train", f"--output_dir={out}", "--dataset.root=koch", "--batch_size=4", "--seed=1", *words])


RENAME = '--rename_map={"observation.images.laptop": "observation.images.top", "observation.images.phone": "observation.images.wrist"}'


def test_fine_tuning_a_checkpoint_of_lerobot(box, capsys):
    "The guide's line on a folder that LeRobot wrote: other cameras and other widths; only the expert and the projections move."
    line = ["--policy.path=base", "--policy.device=cpu", "--policy.optimizer_lr=5e-5", "--policy.scheduler_warmup_steps=1",
            "--steps=2", "--save_freq=2"]
    assert train("other", *line) != 0 and "--rename_map=" in capsys.readouterr().err
    assert train("tuned", *line, RENAME) == 0
    before, after = load_policy("base", "cpu").state_dict(), load_policy("tuned", "cpu")
    moved = {k for k, v in after.state_dict().items() if not torch.equal(v, before[k])}
    assert moved and not any(".vlm." in k for k in moved) and after.config.optimizer_lr == 5e-5
    seen = {f"observation.images.{c}": np.zeros((32, 32, 3), np.uint8) for c in ("laptop", "phone")}
    width = after.config.input_features["observation.state"].shape[0]
    assert np.isfinite(after.act({**seen, "observation.state": np.zeros(width), "task": "push"})).all()


def test_from_scratch_only_for_those_who_insist(box, capsys):
    assert train("new", "--policy.type=smolvla", "--steps=2") != 0
    assert "--policy.path=lerobot/smolvla_base" in capsys.readouterr().err
    assert train("new2", "--policy.type=smolvla", "--policy.load_vlm_weights=true", "--policy.vlm_model_name=gone", "--steps=2") != 0
    assert "neither a folder nor" in capsys.readouterr().err


def test_resumed_training_is_bit_equal(box):
    "Four steps in one go, and two and two."
    tiny = ["--policy.type=smolvla", "--policy.preset=tiny", "--save_freq=2", "--allow-random-backbone",
            "--policy.scheduler_warmup_steps=1", "--policy.scheduler_decay_steps=2"]      # a longer schedule is fitted to the steps
    assert train("whole", *tiny, "--steps=4") == 0
    assert train("parts", *tiny, "--steps=2") == 0
    assert train("parts", "--resume=true", "--steps=4") == 0
    a, b = (load_policy(n, "cpu").state_dict() for n in ("whole", "parts"))
    assert all(torch.equal(v, b[k]) for k, v in a.items())
