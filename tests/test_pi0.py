"""pi0 and pi0.5 give the numbers of openpi's own code: weights, loss, gradients, plans."""
import gc
import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from vla_nb.core.types import ACTION, OBS_STATE, Feature
from vla_nb.networks.flow import euler_times, time_embedding
from vla_nb.policies.base import LANG_MASK, LANG_TOKENS
from vla_nb.policies.pi0 import STACK_FIELDS, FlowNetwork, Pi0Config, Pi0Policy, Pi05Config, Pi05Policy
from vla_nb.processors.pipeline import Pipeline
from vla_nb.processors.state_prompt import CleanTaskStep, StatePromptStep
from vla_nb.processors.tokenize import Pi0NewLineStep
from vla_nb.training.memory import peak_tensor_bytes

GOLDEN = Path(__file__).parent / "goldens/openpi_flow"
KINDS = {"pi0": (Pi0Policy, Pi0Config), "pi05": (Pi05Policy, Pi05Config)}
EMBED = "paligemma_with_expert.paligemma.model.language_model.embed_tokens.weight"
ATOL = 1e-5


@cache
def golden(name):
    "(sizes, {group: {name: tensor}}) of the numbers openpi computed."
    out = {}
    for key, value in load_file(GOLDEN / f"{name}.safetensors").items():
        group, _, rest = key.partition("/")
        out.setdefault(group, {})[rest] = value
    return json.loads((GOLDEN / f"{name}.json").read_text()), out


def config_of(name, **changes):
    "Every field that matters, written out."
    sizes, data = golden(name)
    stack = lambda part: ",".join(str(sizes[part][{"heads": "num_heads", "kv_heads": "num_kv_heads"}.get(f, f)]) for f in STACK_FIELDS)
    v, width = sizes["vision"], sizes["action_dim"]
    cameras = {f"observation.images.{c}": Feature("VISUAL", (3, v["image"], v["image"])) for c in sizes["cameras"]}
    return KINDS[name][1](
        input_features={**cameras, OBS_STATE: Feature("STATE", (width,))}, output_features={ACTION: Feature("ACTION", (width,))},
        chunk_size=sizes["action_horizon"], n_action_steps=sizes["action_horizon"], paligemma_variant=stack("text"),
        action_expert_variant=stack("expert"), vocab_size=sizes["vocab_size"], max_state_dim=width, max_action_dim=width,
        vision_variant=f"{v['hidden']},{v['layers']},{v['heads']},{v['mlp']},{v['patch']}", dtype="float32",
        image_resolution=(v["image"], v["image"]), image_resize="pad", num_inference_steps=sizes["num_steps"], min_period=0.004,
        max_period=4.0, loss_reduction="all", **changes)


def policy_of(name, **changes):
    "Our policy with openpi's weights; what no number depends on stays as it was drawn."
    sizes, data = golden(name)
    torch.manual_seed(0)
    policy = KINDS[name][0](config_of(name, **changes), Pipeline("policy_preprocessor"), Pipeline("policy_postprocessor")).eval()
    own = {k.removeprefix("model."): v for k, v in policy.state_dict().items()}
    assert data["weight"].keys() == own.keys() - sizes["absent"].keys() - {EMBED}
    state = {**own, **data["weight"]}
    state[EMBED][data["embedding"]["ids"]] = data["embedding"]["rows"]
    policy.load_state_dict({f"model.{k}": v for k, v in state.items()})
    return policy


def batch_of(name, **more):
    "The inputs in our keys; a camera that is masked in every row does not come at all."
    sizes, data = golden(name)
    x, batch = data["input"], {}
    for camera in sizes["cameras"]:
        if f"image.{camera}" not in x: continue
        batch[f"observation.images.{camera}"] = (x[f"image.{camera}"] + 1) / 2
        batch[f"observation.images.{camera}_padding_mask"] = x[f"image_mask.{camera}"]
    return {**batch, OBS_STATE: x["state"], ACTION: x["actions"], LANG_TOKENS: x["tokens"], LANG_MASK: x["token_mask"], **more}


def close(a, b, atol=ATOL): torch.testing.assert_close(a, b, atol=atol, rtol=0)


@pytest.mark.parametrize("name", KINDS)
def test_loss_and_velocities(name):
    "x_t → velocity → loss, element by element."
    policy, (_, data) = policy_of(name), golden(name)
    out, x = data["output"], data["input"]
    with torch.no_grad(): v, u = policy.velocities(batch_of(name), x["noise"], x["time"])
    close(v, out["train.v_t"])
    assert ((u - v).pow(2) - out["train.loss"]).abs().max() < ATOL * max(1, 2 * (u - v).abs().max())   # d(e²) = 2e·de
    close((u - v).pow(2).mean(), out["train.loss_mean"])


@pytest.mark.parametrize("name", KINDS)
def test_parts(name):
    "Time embedding, condition, suffix tokens, and the keys that the prefix leaves."
    policy, (_, data) = policy_of(name), golden(name)
    out, x, model = data["output"], data["input"], policy.model
    e = time_embedding(x["time"], model.width)
    close(e, out["suffix.time_emb"], 1e-6)
    x_t = x["time"][:, None, None] * x["noise"] + (1 - x["time"][:, None, None]) * x["actions"]
    with torch.no_grad():
        close(model.suffix(x_t, e, x["state"]), out["suffix.embs"])
        if name == "pi05": close(model.condition(e), out["suffix.adarms_cond"])
        scene = model.read(*policy.seen(batch_of(name)), horizon=policy.config.chunk_size)
        h = model.paligemma_with_expert.act(model.suffix(x_t, e, x["state"]), scene,
                                            model.paligemma_with_expert.expert.modulations(model.condition(e)))
    close(h[:, -policy.config.chunk_size:], out["train.suffix_out"], 2e-5)
    kept, every = torch.stack([k for k, _ in scene.kept]), out["prefix.cache_k"]
    ours = policy.model.embed(*policy.seen(batch_of(name))).valid
    theirs = torch.cat([x["image_mask.base_0_rgb"][:, None].expand(-1, 16), x["image_mask.left_wrist_0_rgb"][:, None].expand(-1, 16),
                        torch.zeros(2, 16, dtype=torch.bool), x["token_mask"]], 1)          # the third camera is never there
    for row in range(2): close(kept[:, row, :, ours[row]], every[:, row, :, theirs[row]], 2e-5)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("steps,key", [(10, "sample.actions"), (4, "sample4.actions")])
def test_plan(name, steps, key):
    "From the same noise to the same actions; the times are accumulated in float32."
    policy, (_, data) = policy_of(name, ), golden(name)
    policy.config = replace(policy.config, num_inference_steps=steps)
    close(policy.predict_action_chunk(batch_of(name), data["input"]["noise"]), data["output"][key])
    close(torch.tensor(euler_times(10)), data["output"]["sample.time"], 0)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("checkpointing", (False, True))
def test_gradients(name, checkpointing):
    "Gradients of the mean loss: their norms for every parameter, whole tensors for some; the unread get none."
    policy, (sizes, data) = policy_of(name, gradient_checkpointing=checkpointing), golden(name)
    v, u = policy.velocities(batch_of(name), data["input"]["noise"], data["input"]["time"])
    (u - v).pow(2).mean().backward()
    grads = {k.removeprefix("model."): p.grad for k, p in policy.named_parameters()}
    without = {k for k, g in grads.items() if g is None}
    assert without == {k for k in sizes["absent"] if "lm_head" not in k}
    for key, wanted in sizes["grad_norms"].items():
        key = EMBED if key == "paligemma_with_expert.paligemma.lm_head.weight" else key
        if key not in grads or grads[key] is None: assert wanted == 0 or "lm_head" in key, key
        elif not key.endswith("k_proj.bias"):       # those are rounding only
            assert grads[key].norm().item() == pytest.approx(wanted, rel=1e-4, abs=1e-5), key
    for key, wanted in data["output"].items():
        if key.startswith("grad."): close(grads[key[5:]], wanted, ATOL * max(1, wanted.abs().max().item()))


@pytest.mark.parametrize("name", KINDS)
def test_a_wrong_condition_is_noticed(name):
    "The comparison can fail: another state, another order of the words, a camera too many."
    policy, (_, data) = policy_of(name), golden(name)
    noise, wanted = data["input"]["noise"], data["output"]["sample.actions"]
    ids = batch_of(name)[LANG_TOKENS]
    changed = [{LANG_TOKENS: ids.roll(1, 1)}, {f"observation.images.left_wrist_0_rgb_padding_mask": torch.tensor([True, True])}]
    if name == "pi0": changed.append({OBS_STATE: data["input"]["state"] + 0.1})
    for change in changed:
        got = policy.predict_action_chunk(batch_of(name, **change), noise)
        assert (got - wanted).abs().max() > 1e-3, change.keys()


@pytest.mark.parametrize("name", KINDS)
def test_checkpointing_saves_memory(name):
    "Peak of a forward and backward pass over 24 samples with three layers, weights included: below 70 %."
    data = golden(name)[1]["input"]
    def peak(checkpointing):
        gc.collect()
        _, others = peak_tensor_bytes(lambda: None)      # what earlier tests keep alive
        policy = policy_of(name, gradient_checkpointing=checkpointing)
        for p in policy.parameters(): p.grad = torch.zeros_like(p)
        many = lambda x: x.repeat(12, *[1] * (x.ndim - 1))
        batch, noise, time = {k: many(v) for k, v in batch_of(name).items()}, many(data["noise"]), many(data["time"])
        def step():
            v, u = policy.velocities(batch, noise, time)
            (u - v).pow(2).mean().backward()
        _, most = peak_tensor_bytes(step, torch.device("cpu"))
        return most - others
    assert peak(True) < 0.7 * peak(False)


def test_prompts():
    "The texts of pi0 and pi0.5 are openpi's, state bins and values out of range included."
    for case in json.loads((GOLDEN / "prompts.json").read_text()):
        batch = {"task": [case["text"]]}
        if case["state"] is None: text = Pi0NewLineStep()(CleanTaskStep()(batch))["task"][0]
        else: text = StatePromptStep(0)({**batch, OBS_STATE: torch.tensor([case["state"]], dtype=torch.float64)})["task"][0]
        assert text == "".join(case["encoded_pieces"]), case["text"]
