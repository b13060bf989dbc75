"""The training loop where it hurts: kills, signals, full disks, two processes, micro-batches."""
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from vla_nb.core.files import read_jsonl
from vla_nb.training.state import checkpoint_steps, last_checkpoint

TOY = Path(__file__).with_name("toy_training.py")
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
NOISE = {"update_s", "data_s", "memory"}


def words(out, **options): return [str(TOY), str(out), *(f"{k}={json.dumps(v).strip(chr(34))}" for k, v in options.items())]


def toy(out, ranks=1, **options):
    "Run the toy to its end in a process, or in several under torchrun."
    launch = [sys.executable] if ranks == 1 else [sys.executable, "-m", "torch.distributed.run", "--standalone",
                                                  "--nproc_per_node", str(ranks)]
    return subprocess.run(launch + words(out, **options), env=ENV, capture_output=True, text=True, timeout=240)


def ok(result):
    assert result.returncode == 0, result.stdout + result.stderr
    return json.loads([line for line in result.stdout.splitlines() if line.startswith("{")][-1])


def metrics(out): return [{k: v for k, v in row.items() if k not in NOISE} for row in read_jsonl(out / "metrics.jsonl")]


def weights(out): return load_file(last_checkpoint(out) / "pretrained_model/model.safetensors")


def assert_same(a, b):
    "Two runs ended in the same place by the same way, bit for bit."
    assert metrics(a) == metrics(b)
    left, right = weights(a), weights(b)
    assert left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)
    hooks = [json.loads((last_checkpoint(out) / "training_state/hooks.json").read_text()) for out in (a, b)]
    assert hooks[0] == hooks[1]


RUN = dict(steps=40, save_freq=7, dropout=0.3, hook=True, optimizer="adamw")


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    "A run that nothing disturbed."
    out = tmp_path_factory.mktemp("runs") / "straight"
    ok(toy(out, **RUN))
    return out


def interrupt(out, after, number, **options):
    "Start the toy and send it a signal as soon as it has made `after` steps."
    process = subprocess.Popen([sys.executable, *words(out, pause=0.02, **options)], env=ENV, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, text=True)
    end = time.time() + 60
    while time.time() < end and process.poll() is None:
        lines = (out / "metrics.jsonl").read_bytes().count(b"\n") if (out / "metrics.jsonl").exists() else 0
        if lines >= after: break
        time.sleep(0.003)
    process.send_signal(number)
    text, _ = process.communicate(timeout=60)
    return process.returncode, text


def test_same_seed_same_metrics(straight, tmp_path):
    ok(toy(tmp_path / "again", **RUN))
    assert_same(straight, tmp_path / "again")


def test_kill_at_a_random_step_then_resume(straight, tmp_path):
    after = random.Random().randrange(8, 38)
    code, _ = interrupt(tmp_path / "run", after, signal.SIGKILL, **RUN)
    assert code == -signal.SIGKILL, f"the run ended before step {after}"
    ok(toy(tmp_path / "run", resume=True, **RUN))
    assert_same(straight, tmp_path / "run")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_saves_the_step(straight, tmp_path, number):
    code, text = interrupt(tmp_path / "run", 9, number, **RUN)
    rows = metrics(tmp_path / "run")
    assert code == 1 and f"stopped by {number.name} after step {len(rows)}" in text, text
    assert checkpoint_steps(tmp_path / "run")[-1] == len(rows) < 40
    ok(toy(tmp_path / "run", resume=True, **RUN))
    assert_same(straight, tmp_path / "run")


@pytest.mark.parametrize("options", [dict(accumulation=2), dict(precision="bf16")])
def test_half_and_half_is_the_whole(tmp_path, options):
    run = {**RUN, **options, "save_freq": 20}
    ok(toy(tmp_path / "whole", **run))
    interrupt(tmp_path / "half", 22, signal.SIGKILL, **run)
    ok(toy(tmp_path / "half", resume=True, **run))
    assert_same(tmp_path / "whole", tmp_path / "half")


SGD = dict(steps=5, hook=True, optimizer="sgd")


@pytest.fixture(scope="module")
def whole_batch(tmp_path_factory):
    "Five SGD steps of one process with the whole batch."
    out = tmp_path_factory.mktemp("runs") / "one"
    ok(toy(out, **SGD))
    return out


@pytest.mark.parametrize("options", [dict(ranks=2), dict(accumulation=4), dict(ranks=2, accumulation=2)])
def test_parts_equal_the_big_batch(whole_batch, tmp_path, options):
    "Ranks and micro-batches with unequal padding: loss, gradients, dot and weights of one process with the whole batch."
    assert ok(toy(tmp_path / "parts", **options, **SGD))["world_size"] == options.get("ranks", 1)
    assert len(metrics(whole_batch)) == len(metrics(tmp_path / "parts")) == 5
    for a, b in zip(metrics(whole_batch), metrics(tmp_path / "parts")):
        assert a["valid"] == b["valid"]
        for key in ("loss", "grad_norm", "dot"): assert b[key] == pytest.approx(a[key], rel=1e-5), key
    for step in range(5):
        one, other = (load_file(out / f"grad-{step}-0.safetensors") for out in (whole_batch, tmp_path / "parts"))
        for key in one: torch.testing.assert_close(other[key], one[key], rtol=1e-5, atol=1e-7)
    left, right = weights(whole_batch), weights(tmp_path / "parts")
    for key in left: torch.testing.assert_close(right[key], left[key], rtol=0, atol=1e-6)


def test_two_processes_resume(tmp_path):
    "Every rank has its own random numbers, and takes them back."
    run = dict(steps=12, save_freq=4, dropout=0.3, hook=True, optimizer="adamw")
    ok(toy(tmp_path / "whole", ranks=2, **run))
    ok(toy(tmp_path / "half", ranks=2, **{**run}))
    folder = tmp_path / "half/checkpoints"
    (folder / "last").unlink()
    os.symlink("000004", folder / "last")
    ok(toy(tmp_path / "half", ranks=2, resume=True, **run))
    assert_same(tmp_path / "whole", tmp_path / "half")
    refused = toy(tmp_path / "half", resume=True, **run)
    assert refused.returncode and "dp_world_size=2, now it is 1" in refused.stderr


def test_full_disk_costs_one_checkpoint_only(straight, tmp_path):
    "From the first checkpoint on no file may exceed 4 kB: the second save fails, the first stays, the run can go on."
    out = tmp_path / "run"
    result = toy(out, limit=4000, **RUN)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr and len(result.stderr.strip().splitlines()) == 1, result.stderr
    assert "Step 14 could not be saved" in result.stderr and "checkpoint 000007 is intact" in result.stderr
    assert "--resume=true" in result.stderr
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == ["000007", "last"]
    assert os.readlink(out / "checkpoints/last") == "000007"
    ok(toy(out, resume=True, **RUN))
    assert_same(straight, out)


# the command line, with a real dataset, questions, anchors and CRaFT

@pytest.fixture(scope="module")
def world(tmp_path_factory):
    "A dataset, questions, a starting policy and its anchors, all tiny."
    from PIL import Image
    from vla_nb.datasets.fake import fake_dataset
    box = tmp_path_factory.mktemp("world")
    fake_dataset(box / "demos", episodes=4, frames=20, cameras=("top",), size=(32, 32))
    for i in range(4): Image.new("RGB", (32, 32), (60 * i, 0, 0)).save(box / f"{i}.png")
    rows = [{"id": f"q{i}", "category": f"c{i % 2}", "question": "Is it red ?", "choices": ["yes", "no"],
             "answer_index": i % 2, "image_path": f"{i % 4}.png"} for i in range(12)]
    (box / "q.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    first = cli(box, "train", "theta0", steps=4, **{"policy.type": "fake", "questions.jsonl": box / "q.jsonl"})
    assert first.returncode == 0, first.stderr
    built = vla_nb(box, "anchors", "build", f"--policy.path={box / 'theta0'}", "--n=16", f"--dataset.root={box / 'demos'}",
                   f"--questions.jsonl={box / 'q.jsonl'}", f"--output={box / 'anchors'}")
    assert built.returncode == 0, built.stderr
    return box


def environment(box): return {**ENV, "VLA_NB_CACHE_ROOT": str(box / "cache"), "VLA_NB_THREADS": "1"}


def vla_nb(box, *argv, ranks=1, **how):
    program = str(Path(sys.executable).with_name("vla-nb"))
    launch = [sys.executable] if ranks == 1 else [sys.executable, "-m", "torch.distributed.run", "--standalone",
                                                  "--nproc_per_node", str(ranks)]
    return subprocess.run([*launch, program, *map(str, argv)], env=environment(box), capture_output=True, text=True,
                          timeout=240, cwd=box, **how)


def flags(box, name, **options):
    base = {"output_dir": box / name, "dataset.root": box / "demos", "batch_size": 8, "log_freq": 5, "seed": 1,
            "optimizer.lr": 0.01}
    return [f"--{k}={v}" for k, v in {**base, **options}.items()]


def cli(box, command, name, ranks=1, **options): return vla_nb(box, command, *flags(box, name, **options), ranks=ranks)


def tuned(box, **options):
    "Flags of a CRaFT run from theta0."
    return {"policy.path": box / "theta0", "dataset.stats": "checkpoint", "craft.enabled": "true",
            "craft.retention_mode": "token_kl", "craft.anchor_cache_dir": box / "anchors", "craft.anchor_batch_size": 4,
            "craft.epsilon_start": 0.01, "craft.epsilon_end": 0.001, "steps": 24, "save_freq": 5, **options}


def test_craft_run_killed_and_resumed(world):
    "Weights, λ history and metrics of a run killed at a random step equal those of an undisturbed one."
    assert cli(world, "train", "whole", **tuned(world)).returncode == 0
    after, out = random.Random().randrange(6, 22), world / "killed"
    process = subprocess.Popen([sys.executable, str(Path(sys.executable).with_name("vla-nb")), "train",
                                *flags(world, "killed", **tuned(world))], env=environment(world), cwd=world,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None:
        if (out / "metrics.jsonl").exists() and (out / "metrics.jsonl").read_bytes().count(b"\n") >= after: break
        time.sleep(0.001)
    process.kill()
    process.wait()
    resumed = cli(world, "train", "killed", **tuned(world, resume="true"))
    assert resumed.returncode == 0, resumed.stderr
    noise = NOISE | {"anchor_s"}
    rows = [[{k: v for k, v in row.items() if k not in noise} for row in read_jsonl(world / name / "metrics.jsonl")]
            for name in ("whole", "killed")]
    assert rows[0] == rows[1] and rows[0][-1]["lambda"] > 0
    a, b = weights(world / "whole"), weights(out)
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert (out / "lambda_history.csv").read_text() == (world / "whole/lambda_history.csv").read_text()


def test_two_processes_by_command(world):
    "torchrun joins both processes; the run is resumable and refuses another number of processes."
    result = cli(world, "train", "pair", ranks=2, **tuned(world, steps=4))
    assert result.returncode == 0, result.stderr
    assert json.loads((world / "pair/summary.json").read_text())["world_size"] == 2
    alone = cli(world, "train", "pair", **tuned(world, steps=6, resume="true"))
    assert alone.returncode and "dp_world_size=2" in alone.stderr


def test_replay_takes_the_anchors_samples(world):
    options = {"policy.path": world / "theta0", "dataset.stats": "checkpoint", "replay.anchors": world / "anchors",
               "replay.questions": world / "q.jsonl", "replay.fraction": 0.25, "steps": 3}
    result = cli(world, "train", "replay", **options)
    assert result.returncode == 0, result.stderr
    saved = json.loads((world / "replay/checkpoints/last/training_state/sampler.json").read_text())
    assert saved["sources"] == [80, 16]
    assert all("loss_question" in row for row in read_jsonl(world / "replay/metrics.jsonl"))


@pytest.mark.parametrize("words, message", [
    ({"stepz": 3}, "did you mean 'steps'"),
    ({"policy.widht": 3}, "did you mean 'width'"),
    ({"craft.epsilon_anneal_steps": 3}, "epsilon_anneal_steps"),
    ({"craft.lambda_lr": 0.1}, "CRaFT is off"),
    ({"dataset.episodes": "9:"}, "leave no episode"),
    ({"dataset.tasks": "fly"}, "Task 'fly' is not in"),
    ({"questions.jsonl": "gone.jsonl"}, "gone.jsonl does not exist"),
    ({"mixed_precision": "fp16", "device": "cpu"}, "fp16 needs a GPU"),
    ({"dataset.streaming": "true"}, "frames are decoded once"),
    ({"craft.enabled": "true", "craft.anchor_cache_dir": "nowhere"}, "AnchorCache directory not found: nowhere"),
])
def test_bad_words_are_one_sentence(world, words, message, monkeypatch, capsys):
    "A wrong flag: non-zero, one line, and no folder."
    from vla_nb.apps.cli import main
    monkeypatch.setenv("VLA_NB_CACHE_ROOT", str(world / "cache"))
    monkeypatch.chdir(world)
    status = main(["train", *flags(world, "bad", **{"policy.type": "fake", "steps": 2, **words})])
    said = capsys.readouterr().err
    assert status and message in said and len(said.strip().splitlines()) == 1 and not (world / "bad").exists()


def test_a_run_is_not_overwritten(world):
    before = sorted(p.name for p in (world / "theta0").iterdir())
    result = cli(world, "train", "theta0", steps=4, **{"policy.type": "fake"})
    assert result.returncode and "holds a run already" in result.stderr
    assert sorted(p.name for p in (world / "theta0").iterdir()) == before


def test_full_disk_by_command(world):
    "The weights do not fit: one sentence, no checkpoint, nothing half-written."
    def limit(): import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    words = flags(world, "full", **{"policy.type": "fake", "steps": 2, "dataset.frame_cache": "false"})
    result = vla_nb(world, "train", *words, preexec_fn=limit)
    assert result.returncode == 2 and "no checkpoint was written so far" in result.stderr, result.stderr
    assert len(result.stderr.strip().splitlines()) == 1 and not list((world / "full/checkpoints").iterdir())
