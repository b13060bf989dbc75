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


@pytest.mark.parametrize("options", [dict(ranks=2), dict(accumulation=4), dict(ranks=2, accumulation=2)])
def test_parts_equal_the_big_batch(tmp_path, options):
    "Ranks and micro-batches with unequal padding: loss, gradients, dot and weights of one process with the whole batch."
    run = dict(steps=5, hook=True, optimizer="sgd")
    ok(toy(tmp_path / "one", **run))
    assert ok(toy(tmp_path / "parts", **options, **run))["world_size"] == options.get("ranks", 1)
    for a, b in zip(metrics(tmp_path / "one"), metrics(tmp_path / "parts")):
        assert a["valid"] == b["valid"]
        for key in ("loss", "grad_norm", "dot"): assert b[key] == pytest.approx(a[key], rel=1e-5), key
    for step in range(5):
        one, other = (load_file(tmp_path / name / f"grad-{step}-0.safetensors") for name in ("one", "parts"))
        for key in one: torch.testing.assert_close(other[key], one[key], rtol=1e-5, atol=1e-7)
    left, right = weights(tmp_path / "one"), weights(tmp_path / "parts")
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
    "From the first checkpoint on no file may exceed 4 kB: the second save fails, the first stays, and the run goes on later."
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
