"""ONNX: the graphs give the numbers of the policy on scenes they were not made with; nothing is written when they do not."""
import json

import numpy as np
import pytest
import torch

from vla_nb.apps import cli
from vla_nb.core.stats import Stats
from vla_nb.core.types import Feature, UserError
from vla_nb.policies.act import ActConfig, ActPolicy
from vla_nb.policies.fake import FakeConfig, FakePolicy
from vla_nb.policies.pi0 import Pi05Config, Pi05Policy
from vla_nb.policies.probe import random_observation

pytest.importorskip("onnxruntime", reason="needs onnxruntime: pip install 'vla_nb[onnx]'")
from vla_nb.inference import onnx  # noqa: E402

FEATURES = {"observation.images.top": Feature("VISUAL", (3, 32, 32)), "observation.state": Feature("STATE", (4,)),
            "action": Feature("ACTION", (2,))}
WIDTHS = {"observation.images.top": (3, 1, 1), "observation.state": (4,), "action": (2,)}
STATS = Stats({k: {"mean": np.full(w, 0.4), "std": np.full(w, 0.3), "min": np.full(w, -1.0), "max": np.full(w, 2.0)} for k, w in WIDTHS.items()})


@pytest.fixture(scope="module")
def act():
    torch.manual_seed(0)
    read = {k: v for k, v in FEATURES.items() if k != "action"}
    config = ActConfig(read, {"action": FEATURES["action"]}, chunk_size=4, n_action_steps=4, dim_model=32, n_heads=4, dim_feedforward=64,
                       n_encoder_layers=1, pretrained_backbone_weights=None)
    return ActPolicy.from_data(config, stats=STATS).eval()


def test_whole_plan(act, tmp_path, capsys):
    "The command: graph and description; the graph meets the policy on a new scene through a session of its own."
    act.save_pretrained(tmp_path / "policy")
    assert cli.main(["export", "onnx", str(tmp_path / "policy"), f"--output={tmp_path}/out", "--repeats=2"]) == 0
    assert "plan: largest difference" in capsys.readouterr().out
    told = json.loads((tmp_path / "out/onnx.json").read_text())["graphs"]["plan"]
    assert told["max_difference"] < 1e-5 and told["inputs"]["observation_state"] == ["float32", [1, 4]]
    given, _, chunk = onnx.inputs_of(act, random_observation(act, 77))
    assert np.abs(onnx.whole_plan(tmp_path / "out")(given) - chunk.numpy()).max() < 1e-5
    other, _, _ = onnx.inputs_of(act, random_observation(act, 78))
    assert np.abs(onnx.whole_plan(tmp_path / "out")(other) - chunk.numpy()).max() > 1e-3


def test_split(tmp_path):
    "pi0.5 in one graph and in two: words, noise and time are inputs, and all three ways give the same chunk."
    torch.manual_seed(0)
    small = dict(paligemma_variant="32,2,64,2,1,16", action_expert_variant="32,2,48,2,1,16", num_inference_steps=2, tokenizer_max_length=30, max_state_dim=6)
    policy = Pi05Policy.from_data(Pi05Config.tiny(FEATURES, **small), ["do the task"], None, STATS).eval()
    for p in policy.parameters(): torch.nn.init.normal_(p, std=0.1) if p.ndim > 1 and not p.any() else None   # modulations start at zero
    graphs = onnx.export_policy(policy, tmp_path / "out", onnx.OnnxOptions(repeats=1))["graphs"]
    assert graphs["plan"]["max_difference"] < 1e-5 and graphs["split"]["max_difference"] < 1e-5
    assert graphs["split"]["steps"] == 2 and sorted(p.name for p in (tmp_path / "out").iterdir()) == \
        ["onnx.json", "plan.onnx", "prefix.onnx", "step.onnx"]
    given, _, chunk = onnx.inputs_of(policy, random_observation(policy, 5, task="task do"))
    assert given["observation_language_tokens"].shape == (1, 30)
    moved = {**given, "noise": given["noise"] + 1}
    assert np.abs(onnx.split_plan(tmp_path / "out", 2, 2)(moved) - chunk.numpy()).max() > 0.1


def test_different_numbers_are_refused(act, tmp_path, monkeypatch):
    "A graph that differs leaves nothing behind."
    monkeypatch.setattr(onnx, "export_whole", lambda *_: {"keys": ["observation.images.top", "observation.state"]})
    monkeypatch.setattr(onnx, "whole_plan", lambda folder: lambda given: np.zeros((1, 4, 2), np.float32))
    with pytest.raises(UserError, match="nothing was written"): onnx.export_policy(act, tmp_path / "out", onnx.OnnxOptions(repeats=1))
    assert not list(tmp_path.iterdir())


def test_token_by_token_is_refused(tmp_path):
    with pytest.raises(UserError, match="token by token"): onnx.export_policy(FakePolicy(FakeConfig()), tmp_path / "out", onnx.OnnxOptions())


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    with pytest.raises(UserError, match=r"vla_nb\[onnx\]"): onnx.need_onnx()
