"""What may stand beside the task in a training step: averages, adapters, penalties, retention of any policy; and the memory plan."""
import gc
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file

from test_train_user import CAMERA, LITTLE_ACT, box, rows, said, train  # noqa: F401
from vla_nb.apps.cli import main
from vla_nb.core.files import read_json, read_jsonl
from vla_nb.datasets.fake import fake_dataset
from vla_nb.policies.store import load_policy
from vla_nb.training.memory import peak_tensor_bytes


def weights(folder): return load_file(folder / "model.safetensors")


def resumed(box, name, words, steps=4):
    "Cut a finished run back to its middle checkpoint and go on."
    whole, half = box / name, box / f"{name}_half"
    assert train(box, name, *words, f"--steps={steps}", f"--save_freq={steps // 2}") == 0
    shutil.copytree(whole, half, symlinks=True)
    shutil.rmtree(half / f"checkpoints/{steps:06d}")
    (half / "checkpoints/last").unlink()
    os.symlink(f"{steps // 2:06d}", half / "checkpoints/last")
    assert train(box, f"{name}_half", *words, f"--steps={steps}", "--resume=true") == 0
    assert rows(whole) == rows(half)
    return whole, half


@pytest.mark.parametrize("kind", ["pi0", "pi05", "pi0_fast"])
def test_resumed_training_is_bit_equal(box, kind):
    size = "--policy.image_size=32" if kind == "pi0_fast" else "--policy.image_resolution=[32,32]"
    words = [f"--policy.type={kind}", "--policy.preset=tiny", size, f"--dataset.root={box / 'koch'}", "--policy.scheduler_warmup_steps=1"]
    a, b = (weights(x / "checkpoints/last/pretrained_model") for x in resumed(box, kind, words))
    assert a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


# ---------------------------------------------------------------- averaged weights

def test_ema_is_saved_and_resumed_bit_for_bit(box):
    words = ["--policy.type=fake", f"--dataset.root={box / 'koch'}", "--lr=0.01", "--ema.enable=true", "--ema.decay=0.9"]
    whole, half = resumed(box, "ema", words)
    a, b = (weights(x / "checkpoints/last/pretrained_model_ema") for x in (whole, half))
    now = weights(whole / "checkpoints/last/pretrained_model")
    assert all(torch.equal(a[k], b[k]) for k in a) and any(not torch.equal(a[k], now[k]) for k in a)
    assert load_policy(whole / "checkpoints/last/pretrained_model_ema").name == "fake"


def test_ema_does_not_change_the_training_and_is_what_is_evaluated(box):
    words = ["--policy.type=fake", f"--dataset.root={box / 'koch'}", "--lr=0.01", "--steps=4", "--dataset.episodes=0:3",
             "--eval_freq=4", "--dataset.eval_episodes=3:4"]
    assert train(box, "plain", *words) == 0 and train(box, "averaged", *words, "--ema.enable=true", "--ema.power=0") == 0
    assert rows(box / "plain") == rows(box / "averaged")
    loss = [read_jsonl(box / n / "eval.jsonl")[-1]["heldout_loss"] for n in ("plain", "averaged")]
    assert loss[1] > loss[0], "0.9999 from the first update on: the average is still the untrained policy"


# ---------------------------------------------------------------- adapters

def raw(n=2): return {**{k: torch.rand(n, 3, 32, 32, generator=torch.Generator().manual_seed(0)) for k in (CAMERA + "laptop", CAMERA + "phone")},
                      "observation.state": torch.ones(n, 4), "task": ["push"] * n}


def features(path):
    policy = path if isinstance(path, torch.nn.Module) else load_policy(path)
    with torch.no_grad(): return policy.features(policy.prepare(raw()))[0]


def test_lora_trains_only_adapters_and_merges(box):
    peft = pytest.importorskip("peft")
    words = [f"--policy.path={box / 'base'}", f"--dataset.root={box / 'koch'}", "--lr=0.02", "--peft.method_type=LORA", "--peft.r=4"]
    whole, half = resumed(box, "lora", words)
    made = whole / "checkpoints/last/pretrained_model"
    assert not (made / "model.safetensors").exists() and read_json(made / "adapter_config.json")["r"] == 4
    state, again = (load_file(x / "checkpoints/last/pretrained_model/adapter_model.safetensors") for x in (whole, half))
    assert all(torch.equal(state[k], again[k]) for k in state)
    assert all(k.startswith("base_model.model.") and k.endswith((".lora_A.weight", ".lora_B.weight")) for k in state)
    tuned, base = load_policy(whole), load_policy(box / "base")
    trained = sum(v.numel() for v in state.values())
    assert read_json(whole / "summary.json")["trained_parameters"] == trained < sum(p.numel() for p in base.parameters()) / 2
    assert not torch.allclose(features(tuned), features(base), atol=1e-4)
    wrapped = peft.PeftModel.from_pretrained(Bare(load_policy(box / "base")), made)   # as LeRobot reads it
    assert torch.allclose(features(wrapped.base_model.model.policy()), features(tuned), atol=1e-6)
    assert main(["checkpoint", "merge", str(whole), f"--output={box / 'merged'}"]) == 0
    assert torch.allclose(features(box / "merged"), features(tuned), atol=1e-5)
    assert weights(box / "merged").keys() == base.state_dict().keys()


class Bare(torch.nn.Module):
    "The policy's modules under their own names, in a module whose configuration peft can read."
    def __init__(self, policy):
        super().__init__()
        for name, child in policy.named_children(): self.add_module(name, child)
        self.whole = [policy]

    def policy(self): return self.whole[0]


@pytest.mark.parametrize("words, message", [
    (["--policy.type=fake", "--peft.method_type=LORA"], "belongs to a saved policy"),
    (["--policy.type=fake", "--lora.r=4"], "is given but it is off"),
    (["--policy.path={base}", "--peft.method_type=IA3"], "LORA is there"),
    (["--policy.path={base}", "--peft.method_type=LORA", "--peft.target_modules=w_qkv"], "fits no linear layer"),
    (["--policy.type=fake", "--ema.decay=0.9"], "add --ema.enable=true"),
    (["--policy.type=fake", "--ema.enable=true", "--ema.decay=1"], "less than 1"),
    (["--policy.type=fake", "--penalty.strength=1"], "add --penalty.kind="),
    (["--policy.type=fake", "--penalty.kind=lwf"], "choose l2sp or ewc"),
])
def test_wrong_methods_are_one_sentence(box, words, message, capsys):
    if "target_modules" in words[-1]: pytest.importorskip("peft")
    capsys.readouterr()
    assert train(box, "bad", f"--dataset.root={box / 'koch'}", "--steps=1", *(w.format(base=box / "base") for w in words)) == 2
    assert message in said(capsys) and not (box / "bad").exists()


# ---------------------------------------------------------------- penalties

def moved(box, name, fisher=None):
    "How far a run went from where it started, each weight counted by its Fisher information."
    a, b = (load_policy(box / n).state_dict() for n in ("base", name))
    f = fisher or {k: torch.ones(()) for k in a if a[k].is_floating_point()}
    return sum(float((f[k] * (a[k] - b[k]).square()).sum()) for k in f) ** 0.5


def test_penalties_hold_the_weights_back_and_resume(box):
    words = [f"--policy.path={box / 'base'}", f"--dataset.root={box / 'koch'}", "--optimizer.type=sgd", "--lr=0.05", "--grad_clip_norm=0"]
    assert train(box, "free", *words, "--steps=4") == 0
    resumed(box, "l2sp", [*words, "--penalty.kind=l2sp", "--penalty.strength=5"])
    assert moved(box, "l2sp") < 0.8 * moved(box, "free")
    assert main(["anchors", "build", f"--policy.path={box / 'base'}", f"--dataset.root={box / 'koch'}", "--n=8", "--mode=token",
                 f"--output={box / 'anchors'}"]) == 0
    resumed(box, "ewc", [*words, "--penalty.kind=ewc", "--penalty.strength=0.1", f"--penalty.anchor_cache_dir={box / 'anchors'}",
                         "--penalty.anchors=4"])
    fisher = {k.removeprefix("fisher/"): v for k, v in load_file(box / "ewc/penalty.safetensors").items() if k.startswith("fisher/")}
    mean = sum(v.double().sum() for v in fisher.values()) / sum(v.numel() for v in fisher.values())
    assert mean.item() == pytest.approx(1) and min(v.min() for v in fisher.values()) >= 0
    assert moved(box, "ewc", fisher) < 0.8 * moved(box, "free", fisher), "the weights that matter moved as much"
    assert rows(box / "l2sp")[0]["penalty"] == 0 < rows(box / "l2sp")[1]["penalty"]


def test_weights_between_two_policies(box, capsys):
    "`checkpoint interpolate`: a policy that loads, its weights half way; a wrong share and a missing folder are one sentence."
    other = f"--policy.path={box / 'base'}"
    if not (box / "tuned").exists(): assert train(box, "tuned", other, f"--dataset.root={box / 'koch'}", "--steps=1", "--lr=0.01") == 0
    words = ["checkpoint", "interpolate", str(box / "base"), str(box / "tuned")]
    assert main([*words, "--alpha=0.25", f"--output={box / 'between'}"]) == 0
    a, b, c = (load_policy(box / n).state_dict() for n in ("base", "tuned", "between"))
    assert any(not torch.equal(a[k], b[k]) for k in a)
    for k in a: torch.testing.assert_close(c[k], 0.75 * a[k] + 0.25 * b[k] if a[k].is_floating_point() else b[k])
    capsys.readouterr()
    assert main([*words, "--alpha=1.5", f"--output={box / 'no'}"]) == 2 and "between 0 and 1" in said(capsys)
    assert main(words) == 2 and "--output is missing" in said(capsys) and not (box / "no").exists()


# ---------------------------------------------------------------- retention without a language head

@pytest.mark.parametrize("mode", ["hidden", "output"])
def test_retention_of_act(box, mode, capsys):
    "The self-check at step 0 passes (the student is the teacher), drift is constrained, and token anchors are refused."
    if not (box / "act0").exists():
        assert train(box, "act0", "--policy.type=act", f"--dataset.root={box / 'koch'}", "--steps=1", "--num_workers=0", *LITTLE_ACT) == 0
    act, cache = box / "act0", box / f"act_{mode}"
    build = ["anchors", "build", f"--policy.path={act}", f"--dataset.root={box / 'koch'}", "--n=12", "--batch_size=4"]
    assert main([*build, f"--mode={mode}", "--layer=-1", f"--output={cache}"]) == 0
    manifest = read_json(cache / "manifest.json")
    assert manifest["mode"] == mode and manifest["feature_dim"] == (16 if mode == "hidden" else 4 * 4)
    craft = ["--craft.enabled=true", f"--craft.retention_mode={mode}", f"--craft.anchor_cache_dir={cache}", "--craft.anchor_batch_size=4",
             "--craft.epsilon_start=1e-6", "--craft.epsilon_end=1e-6", "--craft.lambda_lr=1", "--craft.initial_lambda=1"]
    words = [f"--policy.path={act}", f"--dataset.root={box / 'koch'}", "--lr=1e-3", "--steps=6", "--dataset.stats=checkpoint"]
    assert train(box, f"act_craft_{mode}", *words, *craft) == 0
    found = rows(box / f"act_craft_{mode}")
    assert abs(found[0]["L_ret"]) < 1e-3 and found[-1]["L_ret"] > 0 and found[-1]["mode"] == mode
    if mode == "output":
        capsys.readouterr()
        assert main([*build, "--mode=token", f"--output={box / 'no'}"]) == 2 and "has no language head" in said(capsys)
        assert main(["anchors", "build", f"--policy.path={box / 'base'}", f"--dataset.root={box / 'koch'}", "--n=4", "--mode=output",
                     f"--output={box / 'no'}"]) == 2
        assert "has no other output" in said(capsys)


FLOWS = {"smolvla": "--policy.preset=tiny --policy.allow_random_backbone=true", "pi0": "--policy.preset=tiny",
         "diffusion": "--policy.down_dims=[16,32] --policy.pretrained_backbone_weights=none --policy.horizon=8 --policy.n_action_steps=4 "
                      "--policy.drop_n_last_frames=4 --policy.diffusion_step_embed_dim=16 --policy.num_train_timesteps=10 --policy.use_group_norm=true"}


@pytest.mark.parametrize("kind", FLOWS)
def test_policies_that_draw_noise(box, kind):
    "They train by command, and what they say about the same noisy actions is retained: nothing has drifted at step 0."
    made, data = box / f"{kind}0", [f"--dataset.root={box / 'big'}", "--steps=2", "--memory_plan=false"]
    if not (box / "big").exists(): fake_dataset(box / "big", episodes=2, frames=12, cameras=("laptop", "phone"), size=(64, 64))
    assert train(box, made.name, f"--policy.type={kind}", *data, *FLOWS[kind].split()) == 0
    assert main(["anchors", "build", f"--policy.path={made}", f"--dataset.root={box / 'big'}", "--n=6", "--mode=output",
                 f"--output={box / kind}_out"]) == 0
    assert train(box, f"{kind}_craft", f"--policy.path={made}", *data, "--lr=1e-3", "--policy.scheduler_warmup_steps=0", "--craft.enabled=true",
                 "--craft.retention_mode=output", f"--craft.anchor_cache_dir={box / kind}_out", "--craft.anchor_batch_size=4",
                 "--dataset.stats=checkpoint") == 0
    found = [row["L_ret"] for row in rows(box / f"{kind}_craft")]
    assert abs(found[0]) < 1e-3 < 1e3 * found[1]


# ---------------------------------------------------------------- memory

PLANS = {"fake": (["--policy.type=fake"], 32, 1), "pi0_fast": (["--policy.type=pi0_fast", "--policy.preset=tiny", "--policy.image_size=32"], 12, 1),
         "accumulated": (["--policy.type=pi0_fast", "--policy.preset=tiny", "--policy.image_size=32", "--ema.enable=true"], 4, 3)}


@pytest.mark.parametrize("name", PLANS)
def test_plan_meets_the_counted_peak(box, name):
    words, size, parts = PLANS[name]
    out = box / f"plan_{name}"
    gc.collect()
    others = peak_tensor_bytes(lambda: None)[1]   # what earlier tests keep alive
    assert main(["train", f"--output_dir={out}", f"--dataset.root={box / 'koch'}", "--steps=2", f"--batch_size={size}",
                 f"--gradient_accumulation_steps={parts}", *words]) == 0
    planned, counted = read_json(out / "plan.json")["peak"], read_json(out / "summary.json")["peak_bytes"] - others
    assert planned == pytest.approx(counted, rel=0.15)
    assert "memory: needs about" in (out / "log.txt").read_text()


def test_a_run_that_cannot_fit_is_refused_with_flags_that_do(box, monkeypatch, capsys):
    from vla_nb.training import command
    words = ["--policy.type=pi0_fast", "--policy.preset=tiny", "--policy.image_size=32", f"--dataset.root={box / 'koch'}", "--steps=1"]
    monkeypatch.setattr(command, "free_bytes", lambda device: 22 << 20)
    capsys.readouterr()
    assert main(["train", f"--output_dir={box / 'too_big'}", "--batch_size=64", *words]) == 2
    line = said(capsys)
    assert "needs about" in line and "and fits. --memory_plan=false tries anyway" in line and not (box / "too_big").exists()
    flags = [w for w in line.split() if w.startswith(("--batch_size", "--gradient", "--mixed"))]
    assert main(["train", f"--output_dir={box / 'too_big'}", *words, *flags]) == 0
    monkeypatch.setattr(command, "free_bytes", lambda device: 1000)
    assert main(["train", f"--output_dir={box / 'huge'}", "--batch_size=2", *words]) == 2
    assert "there remain --peft.method_type=LORA" in said(capsys)


def test_running_out_of_memory_is_answered_with_the_plan(box, monkeypatch, capsys):
    from vla_nb.training.loop import TrainRun
    def full(self, stream): raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    monkeypatch.setattr(TrainRun, "one_step", full)
    capsys.readouterr()
    assert train(box, "oom", "--policy.type=fake", f"--dataset.root={box / 'koch'}", "--steps=1") == 2
    line = said(capsys)
    assert "Step 1 ran out of memory; it needs about" in line and "--batch_size=" in line and not (box / "oom").exists()


def test_the_plan_leaves_no_trace_in_the_training(box):
    words = ["--policy.type=fake", f"--dataset.root={box / 'koch'}", "--steps=3"]
    for name, on in (("with", "true"), ("without", "false")): assert train(box, name, *words, f"--memory_plan={on}") == 0
    assert rows(box / "with") == rows(box / "without")


def test_shapes_without_memory_do_not_count():
    "An ONNX export leaves tensors behind that only have shapes, some of them symbols."
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv
    def peak(): return peak_tensor_bytes(lambda: torch.zeros(1000))[1]
    before = peak()
    with FakeTensorMode(shape_env=ShapeEnv()) as mode: ghost = mode.from_tensor(torch.zeros(64, 64)).expand(1000, 64, 64).clone()
    assert ghost.numel() == 1000 * 64 * 64 and peak() == before
