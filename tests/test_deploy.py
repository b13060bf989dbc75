"""The deployment checklist: a good policy passes, and every kind of defect fails its own item with its evidence."""
import json

import numpy as np
import pytest
import torch

from vla_nb.apps import cli
from vla_nb.core.stats import Stats
from vla_nb.core.types import UserError, features_from_dataset
from vla_nb.datasets.fake import fake_dataset
from vla_nb.datasets.lerobot import DatasetMetadata
from vla_nb.evaluation import deploy
from vla_nb.policies.act import ActConfig, ActPolicy
from vla_nb.policies.pi0_fast import split_features


@pytest.fixture(scope="module")
def root(tmp_path_factory): return fake_dataset(tmp_path_factory.mktemp("deploy") / "demo", episodes=2, frames=12)


def make(root, stats=None):
    "A small ACT whose plan is the mean of the demonstrations: its head is silent."
    meta = DatasetMetadata(root)
    sizes = dict(dim_model=16, n_heads=2, dim_feedforward=32, n_encoder_layers=1, chunk_size=3, n_action_steps=3)
    config = ActConfig(**split_features(features_from_dataset(meta.features)), **sizes, pretrained_backbone_weights=None)
    torch.manual_seed(0)
    policy = ActPolicy.from_data(config, stats=stats or meta.stats).eval()
    for p in policy.model.action_head.parameters(): torch.nn.init.zeros_(p)
    return policy


def failed(policy, root, **options):
    found = deploy.checklist(policy, deploy.DeployOptions(dataset=str(root), observations=3, **{"fps": 0.5, **options}))
    return {f["what"]: f["evidence"] for f in found if f["ok"] is False}


def test_good_policy_passes(root, tmp_path, capsys):
    make(root).save_pretrained(tmp_path / "policy")
    (tmp_path / "limits.json").write_text(json.dumps({n: [-9, 9] for n in deploy.names_of(DatasetMetadata(root), 4)}))
    argv = ["deploy", "check", str(tmp_path / "policy"), f"--dataset={root}", "--fps=0.5", "--observations=3", "--device=cpu",
            f"--limits={tmp_path}/limits.json", f"--log={tmp_path}/log.jsonl", f"--output={tmp_path}/deploy.json"]
    assert cli.main(argv) == 0
    assert "11 passed, 0 failed, 0 not checked" in capsys.readouterr().out
    items = json.loads((tmp_path / "deploy.json").read_text())["items"]
    assert all(f["ok"] and f["evidence"] for f in items) and len(items) == 11
    steps = [json.loads(text) for text in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [s["planned"] for s in steps] == [True, False, False] and len(steps[0]["action"]) == 4


def test_without_data_items_stay_open(root, tmp_path, capsys):
    make(root).save_pretrained(tmp_path / "policy")
    assert cli.main(["deploy", "check", str(tmp_path / "policy"), "--fps=0.5", "--observations=2", "--device=cpu"]) == 0
    assert "– preprocessing equals training's: give --dataset" in capsys.readouterr().out


def test_defects_fail_their_item(root, tmp_path):
    "Each defect, made on purpose, is found by its own item, and the command ends with status 1."
    loud, nan, deaf, moody = (make(root) for _ in range(4))
    torch.nn.init.constant_(loud.model.action_head.bias, 50.0)
    assert "actions lie in the demonstrated range" in failed(loud, root)
    torch.nn.init.constant_(nan.model.action_head.bias, torch.nan)
    assert failed(nan, root)["actions are finite"].startswith("36 of 36 numbers")
    deaf.check_observation = lambda o: {**moody.check_observation(o), "observation.state": np.zeros(4, np.float32)}
    assert "preprocessing equals training's" in failed(deaf, root)
    calls = []
    moody.predict_action_chunk = lambda batch: calls.append(1) or torch.full((1, 3, 4), 0.01 * len(calls))
    assert "a reset forgets the episode" in failed(moody, root)
    loud.save_pretrained(tmp_path / "loud")
    assert cli.main(["deploy", "check", str(tmp_path / "loud"), f"--dataset={root}", "--observations=2", "--device=cpu"]) == 1


def test_wrong_statistics_slow_and_jumps(root):
    meta = DatasetMetadata(root)
    moved = Stats({k: {n: np.asarray(v) + (n != "std") for n, v in s.items()} for k, s in meta.stats.features.items()})
    assert "standard deviations (action" in failed(make(root, moved), root)["normalisation belongs to the data"]
    assert "first action" in failed(make(root), root, fps=1e6)["fast enough at 1e+06 Hz"]
    shaky = make(root)
    shaky.predict_action_chunk = lambda batch: torch.tensor([[[0.0] * 4, [3.0] * 4, [0.0] * 4]])
    assert "in a step, demonstrated" in failed(shaky, root)["no jumps within a chunk"]


def test_broken_observations(root):
    "A policy that acts on NaN is found out; ours refuses NaN and a state of another width."
    policy, seen = make(root), deploy.shown(make(root), 1, str(root))[0]
    for bad in ("NaN in the state", "a state of another arm"):
        with pytest.raises(UserError, match="expected 4 numbers, none of them NaN"): policy.act(deploy.broken(policy, seen)[bad])
    good = policy.check_observation(seen)
    policy.check_observation = lambda o: {**good, "observation.state": np.asarray(o.get("observation.state", 0), np.float32).reshape(-1)}
    assert deploy.check_exceptions(policy, seen)["ok"] is False


def test_other_robot(root, tmp_path):
    "Nothing is tried with data of other shapes: the misfit is named."
    other = fake_dataset(tmp_path / "other", episodes=1, dims=6)
    assert list(failed(make(root), other)) == ["cameras, state and action fit"]
