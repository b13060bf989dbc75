"""`vla-nb train` as people type it: the guides' command lines, fine-tuning on other cameras, trackers, evaluation, averages."""
import json
import shutil

import pytest
import torch

from vla_nb.apps.cli import main
from vla_nb.core.files import read_json, read_jsonl
from vla_nb.datasets.fake import fake_dataset
from vla_nb.policies.store import load_policy

NOISE = {"update_s", "data_s", "memory", "anchor_s"}
CAMERA = "observation.images."
LITTLE_ACT = ("--policy.pretrained_backbone_weights=none --policy.dim_model=16 --policy.n_heads=2 --policy.dim_feedforward=16 "
              "--policy.n_encoder_layers=1 --policy.n_vae_encoder_layers=1 --policy.latent_dim=4 --policy.chunk_size=4 "
              "--policy.n_action_steps=4").split()


@pytest.fixture(scope="module")
def box(tmp_path_factory):
    "Two datasets with other cameras and other numbers, and a policy trained on the first."
    box = tmp_path_factory.mktemp("user")
    patch = pytest.MonkeyPatch()
    for name, value in (("CACHE_ROOT", box / "cache"), ("OUTPUTS", box / "outputs"), ("THREADS", "1"), ("DEVICE", "cpu")):
        patch.setenv(f"VLA_NB_{name}", str(value))
    patch.delenv("WANDB_API_KEY", raising=False)
    fake_dataset(box / "koch", episodes=4, frames=10, cameras=("laptop", "phone"), size=(32, 32))
    fake_dataset(box / "other", episodes=3, frames=8, cameras=("top", "side"), size=(32, 32), seed=5)
    assert main(["train", f"--output_dir={box / 'base'}", f"--dataset.root={box / 'koch'}", "--policy.type=fake",
                 "--steps=2", "--batch_size=4", "--lr=0.01", "--seed=1"]) == 0
    yield box
    patch.undo()


def train(box, name, *words):
    "Exit status of a run in the box."
    return main(["train", f"--output_dir={box / name}", "--batch_size=4", "--seed=1", *map(str, words)])


def rows(out): return [{k: v for k, v in row.items() if k not in NOISE} for row in read_jsonl(out / "metrics.jsonl")]


def said(capsys):
    "The one line of an error."
    text = capsys.readouterr().err.strip()
    assert len(text.splitlines()) == 1, text
    return text


# ---------------------------------------------------------------- the lines of the guides; only paths and sizes are ours

GUIDES = {
    "act from scratch": "--policy.type=act --dataset.repo_id=lerobot/aloha_sim_insertion_human --dataset.root={koch} "
                        "--output_dir={out} --job_name=act_insertion --policy.device=cpu --wandb.enable=false "
                        "--policy.push_to_hub=false --batch_size=8 --steps=2 --save_freq=2000 --log_freq=100",
    "baseline of the retention guide": "--policy.type=fake --dataset.repo_id=lerobot/aloha_sim_insertion_human "
        "--dataset.root={koch} --output_dir={out} --training.steps=2 --training.batch_size=8 --policy.optimizer_lr=1e-4 "
        "--grad_clip_norm=10 --save_freq=2000 --log_freq=100 --gradient_accumulation_steps=2 --policy.use_amp=true",
    "fine-tuning": "--policy.path={base} --dataset.repo_id=koch/pick --dataset.root={koch} --batch_size=8 --steps=2 "
                   "--output_dir={out} --job_name=smolvla_koch --policy.device=cpu --policy.optimizer_lr=5e-5 "
                   "--dataset.image_transforms.enable=true --num_workers=0 --eval_freq=0 --wandb.enable=false",
    "from scratch with every number": "--policy.type=fake --dataset.repo_id=koch/pick --dataset.root={koch} --output_dir={out} "
        "--batch_size=16 --steps=2 --policy.optimizer_lr=1e-4 --policy.optimizer_betas=[0.9,0.95] --policy.optimizer_eps=1e-8 "
        "--policy.optimizer_weight_decay=1e-10 --policy.optimizer_grad_clip_norm=10 --policy.scheduler_warmup_steps=1000 "
        "--policy.scheduler_decay_steps=30000 --policy.scheduler_decay_lr=2.5e-6 --seed=1000 --use_policy_training_preset=true",
    "smoke test, dashes": "--policy.path {base} --dataset.root {koch} --dataset.episodes [0,1,2] --batch-size 2 --steps 2 "
                          "--output-dir {out} --job-name smoke --policy.use-amp false --log-freq 1 --save-checkpoint true",
}


@pytest.mark.parametrize("name", GUIDES)
def test_the_guides_command_lines(box, name):
    out = box / name.replace(" ", "_")
    words = GUIDES[name].format(koch=box / "koch", base=box / "base", out=out).split()
    assert main(["train", *words, *(LITTLE_ACT if "act" in name else ())]) == 0
    made = read_json(out / "params.json")["config"]
    assert len(read_jsonl(out / "metrics.jsonl")) == made["steps"] == 2
    load_policy(out).plan({**{k: torch.zeros(1, 3, 32, 32) for k in (CAMERA + "laptop", CAMERA + "phone")},
                           "observation.state": torch.zeros(1, 4), "task": ["push"]})
    o = made["optimizer"]
    if name == "from scratch with every number":
        assert (o["lr"], o["betas"], o["weight_decay"], o["grad_clip_norm"]) == (1e-4, [0.9, 0.95], 1e-10, 10)
        assert (o["warmup_steps"], o["decay_steps"], o["decay_lr"]) == (1000, 30000, 2.5e-6)
    if name == "baseline of the retention guide":
        assert (made["gradient_accumulation_steps"], made["mixed_precision"], o["grad_clip_norm"]) == (2, "bf16", 10)
    if name == "smoke test, dashes": assert made["dataset"]["episodes"] == "0,1,2" and made["mixed_precision"] == "no"
    if name == "act from scratch":   # LeRobot's preset of ACT holds where nothing is said
        assert (o["lr"], o["weight_decay"], o["schedule"]) == (1e-5, 1e-4, "constant")
        assert rows(out)[0]["lr"] == rows(out)[1]["lr"] == 1e-5


def test_a_typed_rate_wins_and_is_saved(box):
    assert train(box, "act_rate", "--policy.type=act", f"--dataset.root={box / 'koch'}", "--steps=1", "--policy.optimizer_lr=3e-4",
                 *LITTLE_ACT) == 0
    assert rows(box / "act_rate")[0]["lr"] == 3e-4
    assert load_policy(box / "act_rate").config.optimizer_lr == 3e-4


def test_pictures_are_standardised_with_imagenet(box):
    "As LeRobot does for ACT; the dataset's own numbers on request."
    for name, flag, same in (("in1", (), True), ("in0", ("--dataset.use_imagenet_stats=false",), False)):
        assert train(box, name, "--policy.type=act", f"--dataset.root={box / 'koch'}", "--steps=1", *LITTLE_ACT, *flag) == 0
        mean = load_policy(box / name).preprocessor["normalizer_processor"].stats[CAMERA + "phone"]["mean"].flatten()
        assert torch.allclose(mean, torch.tensor([0.485, 0.456, 0.406])) == same


def test_yaml_file_and_lerobots_way_to_resume(box):
    (box / "run.yaml").write_text(f"steps: 2\nbatch_size: 4\npolicy:\n  type: fake\n  optimizer_lr: 5e-3\n"
                                  f"dataset:\n  root: {box / 'koch'}\n  image_transforms:\n    enable: true\n")
    assert main(["train", f"--config_path={box / 'run.yaml'}", "--job_name=yaml", "--save_freq=1"]) == 0
    out = box / "outputs/yaml"
    assert rows(out)[1]["lr"] > 0 and read_json(out / "params.json")["config"]["optimizer"]["lr"] == 5e-3
    saved = out / "checkpoints/last/pretrained_model"
    assert main(["train", f"--config_path={saved / 'train_config.json'}", "--resume=true", "--steps=3"]) == 0
    assert len(rows(out)) == 3


def test_an_old_checkpoint_is_not_resumed_by_its_file(box, capsys):
    assert train(box, "three", "--policy.type=fake", f"--dataset.root={box / 'koch'}", "--steps=2", "--save_freq=1") == 0
    first = box / "three/checkpoints/000001/pretrained_model/train_config.json"
    assert main(["train", f"--config_path={first}", "--resume=true"]) == 2
    assert "is not the last checkpoint" in said(capsys)


# ---------------------------------------------------------------- image transforms

def pictures(box, *words, batch=0):
    "What the policy would see of a training batch."
    from vla_nb.training.config import read_config
    from vla_nb.training.setup import make_policy, open_dataset
    from vla_nb.training.sources import mix
    config, _ = read_config([f"--output_dir={box / 'never'}", f"--dataset.root={box / 'koch'}", "--policy.type=fake", *words])
    _, _, demos, _ = make_policy(config, open_dataset(config.dataset))
    return mix(demos, [], 6, 1)[batch][CAMERA + "laptop"]


def test_image_transforms_are_drawn_per_sample_and_again_alike(box):
    plain, turned = pictures(box), pictures(box, "--dataset.image_transforms.enable=true")
    assert turned.dtype == plain.dtype == torch.uint8
    assert all(not torch.equal(a, b) for a, b in zip(plain, turned))
    assert torch.equal(turned, pictures(box, "--dataset.image_transforms.enable=true"))
    ratio = [(t.float().mean() / p.float().mean()).item() for p, t in zip(plain, turned)]
    assert len({round(r, 3) for r in ratio}) > 1, "every sample was changed alike"
    only = ["--dataset.image_transforms.enable=true", *(f"--dataset.image_transforms.tfs.{k}.weight=0" for k in
            ("contrast", "saturation", "hue", "sharpness", "affine")),
            "--dataset.image_transforms.tfs.brightness.kwargs={\"brightness\": [0.5, 0.5]}"]
    assert torch.equal(pictures(box, *only), (plain.float() / 255 * 0.5 * 255).round().byte())


def test_image_transforms_do_not_depend_on_workers(box):
    words = ["--policy.type=fake", f"--dataset.root={box / 'koch'}", "--dataset.image_transforms.enable=true", "--steps=3"]
    for name, workers in (("w0", 0), ("w1", 1)): assert train(box, name, *words, f"--num_workers={workers}") == 0
    assert rows(box / "w0") == rows(box / "w1")


# ---------------------------------------------------------------- fine-tune and resume

def mean_of(path): return load_policy(path).preprocessor["normalizer_processor"].stats["action"]["mean"]


def test_fine_tuning_takes_the_new_statistics_and_resuming_keeps_them(box):
    new = [f"--dataset.root={box / 'koch'}", "--policy.type=pi0_fast", "--policy.preset=tiny", "--policy.image_size=32",
           "--steps=1"]
    assert train(box, "fast", *new) == 0
    pairs = {CAMERA + "top": CAMERA + "laptop", CAMERA + "side": CAMERA + "phone"}
    tuned = [f"--policy.path={box / 'fast'}", f"--dataset.root={box / 'other'}", f"--rename_map={json.dumps(pairs)}"]
    assert train(box, "tuned", *tuned, "--steps=1") == 0
    assert train(box, "kept", *tuned, "--steps=1", "--dataset.stats=checkpoint") == 0
    assert torch.equal(mean_of(box / "kept"), mean_of(box / "fast"))
    assert not torch.allclose(mean_of(box / "tuned"), mean_of(box / "fast"))
    mean = read_json(box / "other/meta/stats.json")["action"]["mean"]
    assert torch.allclose(mean_of(box / "tuned"), torch.tensor(mean))
    stats = box / "other/meta/stats.json"   # the dataset's numbers change: a resume does not look at them
    shutil.copy(stats, box / "stats.json")
    try:
        d = read_json(stats); d["action"]["mean"] = [9.0 for _ in d["action"]["mean"]]
        before = load_policy(box / "tuned")
        from vla_nb.training.config import read_config
        from vla_nb.training.setup import make_policy, open_dataset
        config, last = read_config(["--resume=true", f"--output_dir={box / 'tuned'}", "--steps=2"])
        stats.write_text(json.dumps(d))
        policy, *_ = make_policy(config, open_dataset(config.dataset), last)
        assert torch.equal(policy.preprocessor["normalizer_processor"].stats["action"]["mean"], mean_of(box / "tuned"))
        assert before.config == policy.config
    finally: shutil.copy(box / "stats.json", stats)


def test_other_cameras_are_explained_then_renamed(box, capsys):
    tuned = [f"--policy.path={box / 'base'}", f"--dataset.root={box / 'other'}", "--steps=2"]
    capsys.readouterr()
    assert train(box, "renamed", *tuned) == 2
    line = said(capsys)
    assert "the policy reads the cameras laptop, phone" in line and "has top, side" in line and not (box / "renamed").exists()
    flag = line[line.index("--rename_map='"):].rstrip(".")   # the flag as proposed
    assert train(box, "renamed", *tuned, flag.replace("'", "")) == 0
    policy, world = load_policy(box / "renamed"), {"observation.state": torch.zeros(4).numpy(), "task": "push"}
    shot = torch.zeros(32, 32, 3, dtype=torch.uint8).numpy()
    policy.act({**world, CAMERA + "top": shot, CAMERA + "side": shot})      # the robot keeps its own names
    assert train(box, "no", *tuned, '--rename_map={"observation.images.front": "observation.images.laptop"}') == 2
    assert "has no 'observation.images.front'" in said(capsys)


# ---------------------------------------------------------------- what cannot be had

@pytest.mark.parametrize("words, message", [
    (["--dataset.streaming=true"], "cannot be had: frames are decoded once"),
    (["--wandb.project=p"], "add --wandb.enable=true"),
    (["--wandb.enable=true", "--tracker=tensorboard"], "choose one"),
    (["--policy.push_to_hub=true"], "needs --policy.repo_id=OWNER/NAME"),
    (["--policy.repo_id=me/x"], "add --policy.push_to_hub=true"),
    (["--env.type=metaworld"], "does nothing without --eval_freq"),
    (["--eval_freq=1", "--env.type=pusht", "--env.task=x"], "metaworld is there"),
    (["--eval_freq=1"], "needs --dataset.eval_episodes"),
    (["--dataset.revision=v2"], "belongs to a --dataset.repo_id"),
    (["--rename_map={\"a\": \"b\"}"], "belongs to a saved policy"),
    (["--scheduler.type=vqbet"], "choose one of cosine, constant, diffuser"),
    (["--dataset.image_transforms.tfs.brightness.kwargs={\"degrees\": [0, 1]}", "--dataset.image_transforms.enable=true"], "ColorJitter takes"),
    (["--dataset.image_transforms.enabled=true"], "did you mean 'enable'"),
    (["--config_path=x.ini"], "use a .toml, .yaml, .yml, .json file"),
])
def test_what_cannot_be_had_is_one_sentence(box, words, message, capsys):
    capsys.readouterr()
    base = [f"--dataset.root={box / 'koch'}", "--policy.type=fake", "--steps=1"]
    assert train(box, "bad", *base, *words) == 2
    assert message in said(capsys) and not (box / "bad").exists()


# ---------------------------------------------------------------- trackers and the Hub

def test_missing_tracker_names_the_extra(box, capsys, monkeypatch):
    from accelerate import utils
    monkeypatch.setattr(utils, "is_wandb_available", lambda: False)
    capsys.readouterr()
    assert train(box, "bad", f"--dataset.root={box / 'koch'}", "--policy.type=fake", "--steps=1", "--wandb.enable=true") == 2
    assert "pip install 'vla_nb[wandb]'" in said(capsys) and not (box / "bad").exists()


def test_tensorboard_gets_the_numbers(box):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    assert train(box, "board", f"--dataset.root={box / 'koch'}", "--policy.type=fake", "--steps=3", "--tracker=tensorboard",
                 "--eval_freq=3", "--dataset.eval_episodes=3:4", "--dataset.episodes=0:3") == 0
    events = EventAccumulator(str(box / "board/board")).Reload()
    assert [e.step for e in events.Scalars("train/loss")] == [1, 2, 3] and events.Scalars("eval/heldout_loss")
    assert events.Scalars("train/loss")[0].value == pytest.approx(rows(box / "board")[0]["loss"])


def test_wandb_offline(box, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    assert train(box, "wandb", f"--dataset.root={box / 'koch'}", "--policy.type=fake", "--steps=2", "--wandb.enable=true",
                 "--wandb.mode=offline", "--wandb.project=koch", "--job_name=first try") == 0
    assert list((box / "wandb/wandb").glob("offline-run-*"))


def test_the_policy_is_pushed_at_the_end(box, monkeypatch):
    "After the last checkpoint, with what was said about the repository; how a push works is tested with the Hub."
    from vla_nb.training import command
    pushed = []
    def push_policy(path, *words):
        pushed.append((load_policy(path).name, *words))
        return "0123456789abcdef"
    monkeypatch.setattr(command, "push_policy", push_policy)
    assert train(box, "pushed", f"--dataset.root={box / 'koch'}", "--policy.type=fake", "--steps=1",
                 "--policy.push_to_hub=true", "--policy.repo_id=me/koch", "--policy.private=true") == 0
    assert pushed == [("fake", "me/koch", True, "apache-2.0")]
    assert "pushed to me/koch, commit 0123456789" in (box / "pushed/log.txt").read_text()


# ---------------------------------------------------------------- evaluation while training

class Pool:
    "Stands for the processes of the simulator."
    made, open = 0, 0

    def __init__(self, n): Pool.made, Pool.open = Pool.made + 1, Pool.open + 1
    def close(self): Pool.open -= 1


def simulated(monkeypatch, fail=None):
    "Replace the simulator; success rises with every call."
    from vla_nb.apps import train as module
    calls = []
    def rollout(policy, tasks, n, seed, pool, max_steps):
        calls.append(policy.training)
        if fail == len(calls): raise RuntimeError("the simulator broke")
        return {"task": {t: {"k": len(calls), "n": n} for t in tasks}, "seconds": 0.1}
    Pool.made = Pool.open = 0
    monkeypatch.setattr(module, "Workers", Pool)
    monkeypatch.setattr(module, "rollout", rollout)
    return calls


SIM = ["--policy.type=fake", "--steps=4", "--eval_freq=2", "--env.type=metaworld", "--env.task=drawer-open-v3,door-open-v3",
       "--eval.n_episodes=4", "--eval.batch_size=1"]


def test_simulator_evaluation(box, monkeypatch):
    "Twice with the same processes, in evaluation mode, without a trace in the training; closed at the end."
    assert train(box, "quiet", "--policy.type=fake", "--steps=4", f"--dataset.root={box / 'koch'}") == 0
    calls = simulated(monkeypatch)
    assert train(box, "sim", *SIM, f"--dataset.root={box / 'koch'}") == 0
    assert calls == [False, False] and (Pool.made, Pool.open) == (1, 0)
    assert [(r["step"], r["success"]) for r in read_jsonl(box / "sim/eval.jsonl")] == [(2, 0.25), (4, 0.5)]
    assert rows(box / "sim") == rows(box / "quiet")


def test_simulator_is_closed_when_it_breaks(box, monkeypatch, capsys):
    simulated(monkeypatch, fail=2)
    assert train(box, "broken", *SIM, f"--dataset.root={box / 'koch'}") == 1
    assert "the simulator broke" in capsys.readouterr().err and (Pool.made, Pool.open) == (1, 0)


# ---------------------------------------------------------------- windows of observations

def test_policies_that_read_the_past(box):
    "Two observations, actions that begin before the present frame, and no sample at an episode's end."
    from vla_nb.datasets.lerobot import DatasetMetadata
    from vla_nb.training.sources import Demonstrations, Shape
    meta, cameras = DatasetMetadata(box / "koch"), [CAMERA + "laptop"]
    plain = Demonstrations(meta, [0, 1], Shape(cameras, (32, 32), 4, True))
    past = Demonstrations(meta, [0, 1], Shape(cameras, (32, 32), 4, True, first_action=-1, past=(-1, 0), drop_last=3))
    assert len(past) == 2 * (10 - 3)
    a, b = past[8], plain[11]                       # sample 8 begins with frame 1 of episode 1
    assert torch.equal(a["observation.state"], torch.stack([plain[10]["observation.state"], b["observation.state"]]))
    assert torch.equal(a[cameras[0]][1], b[cameras[0]]) and torch.equal(a["action"][1:], b["action"][:3])
    chunks = past.chunks()
    assert all(torch.equal(torch.from_numpy(chunks[i]), past[i]["action"]) for i in range(len(past)))


# ---------------------------------------------------------------- status

def test_status_shows_the_log(box, capsys):
    capsys.readouterr()
    assert main(["status", str(box / "base")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "done | step 2/2" in lines[0] and lines[-1].startswith("    ") and len(lines) >= 3
    assert main(["status", str(box / "base"), "--lines=1"]) == 0
    assert len([l for l in capsys.readouterr().out.splitlines() if l.startswith("    ")]) == 1
