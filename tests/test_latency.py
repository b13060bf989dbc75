"""Latency: what is counted and what is not, the verdict, the command, variants, and what is refused."""
import json
import time

import pytest
import torch

from vla_nb.apps import cli
from vla_nb.core.types import UserError
from vla_nb.evaluation.latency import LatencyOptions, Parts, measure, one_chunk, shown
from vla_nb.policies.fake import FakeConfig, FakePolicy


class Sleeper(FakePolicy):
    "Looks for 30 ms, plans for 60 ms, three times as long at first; counts its plans."
    plans = 0

    def prepare(self, batch):
        time.sleep(0.03)
        return super().prepare(batch)

    def predict_action_chunk(self, batch):
        self.plans += 1
        time.sleep(0.06 if self.plans > 2 else 0.18)
        return super().predict_action_chunk(batch)


def sleeper(): return Sleeper(FakeConfig(chunk_size=3, n_action_steps=3)).eval()


def test_parts_add_up_and_warm_up_is_not_counted():
    "Look and plan apart; every action of a chunk executed; the slow first plans are in neither percentile."
    policy = sleeper()
    out = measure(policy, LatencyOptions(repeats=3, warmup=1, fps=15))
    assert policy.plans == 5 and out["ms"]["first"]["n"] == 3 and out["ms"]["queued"]["n"] == 6
    assert out["cold_ms"] >= 210 and out["ms"]["plan"]["max"] < 150
    assert out["ms"]["preprocess"]["p50"] >= 30 and out["ms"]["plan"]["p50"] >= 60
    assert out["ms"]["first"]["p50"] >= out["ms"]["preprocess"]["p50"] + out["ms"]["plan"]["p50"] - 5
    assert out["action_ms"] == pytest.approx((out["ms"]["first"]["mean"] + 2 * out["ms"]["queued"]["mean"]) / 3)
    assert out["verdict"] == "only when planning ahead"


def test_watching_ends():
    "The policy is as before, also after an error."
    policy = sleeper()
    with pytest.raises(KeyError), Parts(policy): raise KeyError
    assert not set(Parts.names) & set(vars(policy))
    assert "plan" in one_chunk(policy, shown(policy, 1)[0])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("latency") / "policy"
    FakePolicy(FakeConfig()).save_pretrained(path)
    return path


def test_command(folder, tmp_path, capsys):
    "The policy as first word or by flag; the file holds sizes and what was measured."
    file = tmp_path / "latency.json"
    assert cli.main(["eval", "latency", str(folder), "--repeats=2", "--warmup=0", "--fps=1", "--device=cpu", f"--output={file}"]) == 0
    assert "fast enough at 1 Hz: yes" in capsys.readouterr().out
    out, policy = json.loads(file.read_text()), FakePolicy(FakeConfig())
    assert out["parameters"] == sum(p.numel() for p in policy.parameters()) and out["weight_bytes"] == 4 * out["parameters"]
    assert out["disk_bytes"] > out["weight_bytes"] and out["peak_bytes"] > 10**7 and out["verdict"] == "yes"
    assert cli.main(["eval", "latency", f"--policy.path={folder}", "--repeats=1", "--device=cpu"]) == 0


@pytest.mark.parametrize("argv,says", [
    ([], "Which policy?"), (["{p}", "--fps=-1"], "--fps=-1: give the robot's rate"), (["{p}", "--repeats=0"], "at least 1"),
    (["{p}", "--compile=true", "--device=cpu"], "token by token"), (["{p}", "--dtype=int8", "--device=cpu"], "use one of float32"),
    (["{p}", "--dtype=bfloat16", "--device=cpu"], "does not run in this form (bfloat16)"), (["nowhere"], "Policy folder not found")])
def test_refused(folder, argv, says, capsys):
    assert cli.main(["eval", "latency", *(a.format(p=folder) for a in argv)]) == 2
    assert says in capsys.readouterr().err


def test_batch_of_rows():
    out = measure(FakePolicy(FakeConfig()).eval(), LatencyOptions(repeats=2, warmup=0, batch_size=3))
    assert out["batch"]["rows"] == 3 and out["batch"]["ms_per_row"] == pytest.approx(out["batch"]["ms"]["p50"] / 3)


def test_wrong_dataset_is_named(tmp_path):
    from vla_nb.datasets.fake import fake_dataset
    root = fake_dataset(tmp_path / "d", episodes=1, cameras=("side",))
    with pytest.raises(UserError, match="has no 'observation.images.top', which fake reads"): shown(FakePolicy(FakeConfig()), 1, str(root))
