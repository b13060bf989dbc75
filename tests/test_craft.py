"""CRaFT: published numbers, properties, damaged caches, two processes, resume."""
import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parent))
from craft_ranks import (ROWS, LoopConfig, OptimConfig, TrainRun, make_cache, rows_of, task_batches,  # noqa: E402
                         teacher, train)

from vla_nb.core.files import read_jsonl
from vla_nb.core.types import UserError
from vla_nb.craft.anchors import (AnchorCache, anchor_indices, build_cache, check_cache,
                                  measure_retention, resolve_layer)
from vla_nb.craft.baselines import interpolate
from vla_nb.craft.constraint import Controller, CraftConfig, craft_config, dual_step, epsilon_at, pilot_epsilon
from vla_nb.craft.hook import CraftHook, diagnose
from vla_nb.craft.losses import hidden_loss, pool, teacher_targets, token_ce, token_kl
from vla_nb.craft.public_anchors import import_lineage_a
from vla_nb.craft.projection import (Dots, adam_metrics, coefficient, correct_update_, gradient_dots, is_conflict,
                                     layer_cosines, merge_, merge_factors)
from vla_nb.policies.fake import FakePolicy, fake_batch
from vla_nb.training.sources import replay_samples
from vla_nb.training.state import last_checkpoint

T = torch.tensor
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
SCRIPT = Path(__file__).with_name("craft_ranks.py")


@pytest.fixture(scope="module")
def token(tmp_path_factory): return make_cache(tmp_path_factory.mktemp("anchors") / "token", "token")


@pytest.fixture(scope="module")
def hidden(tmp_path_factory):
    return make_cache(tmp_path_factory.mktemp("anchors") / "hidden", "hidden", layer=-1, pooling="every_token")


# goldens of the specification

def test_epsilon_goldens():
    assert epsilon_at(500, 1.0, 0.1, 1000) == pytest.approx(0.55)
    assert [round(epsilon_at(i, 1.0, 0.5, 3), 3) for i in range(3)] == [1.0, 0.833, 0.667]
    for schedule in ("linear", "cosine", "constant"):
        assert epsilon_at(10 ** 6, 1.0, 0.1, 1000, schedule) == pytest.approx(0.1)
    assert 0.1 < epsilon_at(10 ** 6, 1.0, 0.1, 1000, "exponential") < 0.107


def test_lambda_goldens():
    assert dual_step(1.0, 1.5, 1.0, 0.1) == pytest.approx(1.05)
    assert dual_step(1.0, 0.8, 1.0, 0.01) == pytest.approx(0.998)


def test_dot_golden(): assert gradient_dots([T([1., 2.]), T([3.])], [T([1., -1.]), T([.5])]).dot == 0.5


def test_conflict_golden():
    dots = gradient_dots([T([1., 0.])], [T([-1., 0.])])
    assert is_conflict(dots)
    merged = merge_([T([1., 0.])], [T([-1., 0.])], merge_factors("weighted", 0.0, coefficient(dots)))
    assert merged[0].tolist() == pytest.approx([0.0, 0.0], abs=1e-6)


@pytest.mark.parametrize("mode, plain", [("weighted", [2, 1]), ("equal", [.75, .75]), ("task_priority", [1.5, 1.5])])
def test_merge_goldens(mode, plain):
    assert merge_([T([1., 2.])], [T([.5, -.5])], merge_factors(mode, 2.0, 0.0))[0].tolist() == plain


def test_projected_merge_golden():
    dots = gradient_dots([T([1., 2.])], [T([.5, -.5])])
    assert dots.cos == pytest.approx(-0.316, abs=1e-3)
    merged = merge_([T([1., 2.])], [T([.5, -.5])], merge_factors("weighted", 2.0, coefficient(dots)))
    assert merged[0].tolist() == pytest.approx([2.5, 0.5])


def test_lambda_falls_to_zero_by_step_102():
    control = Controller(CraftConfig(), 10_000)
    while control.lam > 0: control.update(0.02, len(control.history))
    assert len(control.history) == pytest.approx(102, abs=3)


# properties

@pytest.mark.parametrize("seed", range(5))
def test_projection_is_orthogonal_and_one_copy_is_exact(seed):
    torch.manual_seed(seed)
    gr = [torch.randn(40, 7), torch.randn(9)]
    gt = [torch.randn(40, 7) - gr[0], torch.randn(9) - gr[1]]
    c = coefficient(gradient_dots(gt, gr))
    assert c < 0
    free = [t - c * r for t, r in zip(gt, gr)]
    assert abs(gradient_dots(free, gr).cos) < 1e-5
    expected = [f + 0.7 * r for f, r in zip(free, gr)]
    got = merge_([t.clone() for t in gt], [r.clone() for r in gr], merge_factors("weighted", 0.7, c))
    for a, b in zip(got, expected):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_conflict_does_not_depend_on_scale():
    torch.manual_seed(0)
    a, b = torch.randn(500), torch.randn(500)
    for s in (1e-6, 1.0, 1e6):
        for sign in (-1, 1):
            assert is_conflict(gradient_dots([s * (b * 0.2 * sign + a)], [b / s])) == (sign < 0)


def test_lambda_bounds():
    lam, gen = 1.0, torch.Generator().manual_seed(0)
    for value in (torch.rand(500, generator=gen) * 20 - 10).tolist():
        lam = dual_step(lam, value, 0.1, 3.0, 10.0)
        assert 0 <= lam <= 10


def test_missing_gradients():
    got = merge_([None, T([1.]), None], [T([2.]), None, None], merge_factors("weighted", 3.0, -1.0))
    # a missing g_t counts as zero, a missing g_r changes nothing
    assert [g if g is None else g.item() for g in got] == [8.0, 1.0, None]
    assert merge_([T([1.])], [None], merge_factors("equal", 3.0, 0.0))[0].item() == 1.0
    assert gradient_dots([None, T([2.])], [T([5.]), T([1.])]) == Dots(2.0, 4.0, 26.0)


def test_adam_breaks_the_guarantee_and_its_metric_keeps_it():
    gen, raised = torch.Generator().manual_seed(0), [0, 0]
    scale = torch.randn(500, generator=gen).exp()
    p = torch.nn.Parameter(torch.zeros(500))
    adam = torch.optim.AdamW([p], lr=1e-3)
    p.grad = scale.clone()
    adam.step()
    for _ in range(300):
        gt, gr = (torch.randn(500, generator=gen) * scale for _ in range(2))
        for i, metric in enumerate((None, adam_metrics(adam, [p]))):
            dots = gradient_dots([gt], [gr], metric)
            step = -(gt - dots.dot / dots.retain_sq * gr) / (scale + 1e-8)
            raised[i] += float(step @ gr) > 1e-4 * float(step.norm() * gr.norm())
    assert 0.35 < raised[0] / 300 < 0.65 and raised[1] == 0


def test_update_space_covers_momentum_and_decay():
    torch.manual_seed(0)
    p, gr = torch.nn.Parameter(torch.randn(30)), torch.randn(30)
    adam = torch.optim.AdamW([p], lr=0.1, weight_decay=0.3)
    for _ in range(5):
        before = p.detach().clone()
        p.grad = -gr + 0.3 * torch.randn(30)   # wants to go up in L_ret
        adam.step()
        assert correct_update_([p], [before], [gr]) > 0
        assert float(gr @ (p.detach() - before)) == pytest.approx(0, abs=1e-4)


def test_losses_are_zero_at_the_teacher_and_sum_exactly():
    torch.manual_seed(0)
    logits, ids = torch.randn(6, 5, 9), torch.randint(0, 9, (6, 5))
    mask = torch.rand(6, 5) < 0.6
    mask[:, 0] = True
    ce = torch.where(mask, torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids, reduction="none"), 0.0).sum(1)
    assert float(token_ce(logits, ids, mask, ce)[0]) == pytest.approx(0, abs=1e-5)
    kept, other = teacher_targets(logits)["teacher.logprobs"], torch.randn(6, 5, 9)
    assert float(token_kl(logits, mask, kept)[0]) == pytest.approx(0, abs=1e-4)
    whole = token_kl(other, mask, kept)
    parts = [token_kl(other[i], mask[i], kept[i]) for i in (slice(0, 2), slice(2, 6))]
    assert float(sum(p[0] for p in parts)) == pytest.approx(float(whole[0]), rel=1e-5)
    assert int(sum(p[1] for p in parts)) == int(whole[1])


def test_anchor_order_covers_everything_and_splits_over_processes():
    for n, size in ((10, 4), (7, 7), (5, 8)):
        stream = sum((anchor_indices(n, size, k, 1) for k in range(n)), [])
        for epoch in range(size): assert sorted(stream[epoch * n:(epoch + 1) * n]) == list(range(n))
    assert anchor_indices(10, 2, 5, 1, 0, 2) + anchor_indices(10, 2, 5, 1, 1, 2) == anchor_indices(10, 4, 5, 1)


# settings

@pytest.mark.parametrize("bad", [
    dict(enabled=True), dict(retention_freq=0), dict(initial_lambda=-1.0), dict(lambda_max=0.0),
    dict(epsilon_start=0.1, epsilon_end=0.2), dict(retention_mode="token"), dict(pooling="max"),
    dict(projection_mode="sum"), dict(loss="l1"), dict(epsilon_schedule="step"),
    dict(enabled=True, anchor_cache_dir="x", epsilon="auto")])
def test_bad_settings(bad):
    with pytest.raises(ValueError): CraftConfig(**bad)


def test_flags_reach_the_settings_and_unknown_ones_raise():
    cfg = craft_config({"preset": "guide", "enabled": "true", "anchor-cache-dir": "c", "lambda_lr": "0.001",
                        "hidden_layer": "-2"})
    assert (cfg.enabled, cfg.lambda_lr, cfg.epsilon_start, cfg.epsilon_end) == (True, 0.001, 1.0, 0.1)
    assert (cfg.anchor_batch_size, cfg.conflict_threshold, cfg.pooling) == (8, -0.1, "mean_image_tokens")
    with pytest.raises(UserError, match="epsilon_anneal_steps"): craft_config({"epsilon_anneal_steps": "100"})


def test_epsilon_from_a_pilot(tmp_path):
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval/retention.json").write_text('{"token_kl": 0.4, "hidden": 0.0}')
    cfg = CraftConfig(enabled=True, anchor_cache_dir="x", retention_mode="token_kl", epsilon="auto",
                      pilot=str(tmp_path))
    control = Controller(cfg, 100)
    assert [control.epsilon(s) for s in (0, 99)] == pytest.approx([0.08, 0.08])
    for mode, word in (("hidden", "no drift"), ("token_ce", "no value")):
        with pytest.raises(ValueError, match=word): pilot_epsilon(tmp_path, mode)


# caches that are missing, damaged or made for something else

def test_missing_directory_and_close_ones(token):
    with pytest.raises(FileNotFoundError, match="AnchorCache directory not found") as e:
        AnchorCache(token.path.parent / "tokens")
    assert str(token.path) in str(e.value) and "vla-nb anchors build" in str(e.value)


@pytest.mark.parametrize("how, message", [
    (lambda d: (d / "manifest.json").unlink(), "metadata not found"),
    (lambda d: (d / "shard-00001.safetensors").unlink(), "shard 1 not found"),
    (lambda d: cut(d / "shard-00000.safetensors"), "shard 0 is damaged"),
    (lambda d: (d / "manifest.json").write_text((d / "manifest.json").read_text()[:200]), "not valid JSON"),
    (lambda d: change(d, num_anchors=7), "manifest 7"),
    (lambda d: change(d, schema_version=1), "schema 1"),
    (lambda d: spoil(d), "non-finite")])
def test_damaged_cache(token, tmp_path, how, message):
    shutil.copytree(token.path, tmp_path / "bad")
    how(tmp_path / "bad")
    with pytest.raises(UserError, match=message): AnchorCache(tmp_path / "bad").verify()


def cut(file): file.write_bytes(file.read_bytes()[:-99])


def change(folder, **entries):
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | entries))


def spoil(folder):
    "A shard with NaN and a correct checksum."
    from vla_nb.core.files import sha256_file
    file = folder / "shard-00000.safetensors"
    data = {k: v.clone() for k, v in load_file(file).items()}
    data["teacher.ce"][0] = float("nan")
    save_file(data, file)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["shards"][0] |= {"sha256": sha256_file(file), "bytes": file.stat().st_size}
    change(folder, shards=manifest["shards"])


def test_full_disk_leaves_nothing_half_written(tmp_path):
    code = ("import resource, sys, torch; from pathlib import Path; from craft_ranks import make_cache; "
            "resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000)); make_cache(Path(sys.argv[1]), 'token')")
    out = tmp_path / "full"
    done = subprocess.run([sys.executable, "-c", code, str(out)], env=ENV, cwd=SCRIPT.parent, capture_output=True,
                          text=True, timeout=120)
    assert done.returncode and "could not be written" in done.stderr and not out.exists()
    assert not list((tmp_path / ".full.partial").glob("*shard*"))
    assert len(make_cache(out, "token")) == 24   # the same build continues


def test_mismatches(token, hidden):
    policy = teacher()
    ok = CraftConfig(retention_mode="hidden", hidden_layer=-1, pooling="every_token")
    check_cache(hidden, policy, ok)
    for cache, message, settings in (
            (token, "needs a hidden feature cache, but .* without target_features", {}),
            (hidden, "token cache.*labels.*--mode=token", dict(retention_mode="token_ce")),
            (hidden, "pooling differs", dict(pooling="last_token")),
            (hidden, "hidden_layer differs", dict(hidden_layer=0))):
        with pytest.raises(ValueError, match=message): check_cache(cache, policy, CraftConfig(**settings))
    with pytest.raises(ValueError, match="3 hidden states"): resolve_layer(9, policy.num_hidden_states)
    policy.preprocessor.steps.pop(0)
    with pytest.raises(ValueError, match="preprocessor"): check_cache(hidden, policy, ok)


def test_a_run_never_degrades_into_a_baseline(tmp_path, token):
    with pytest.raises(FileNotFoundError): train(tmp_path / "a", tmp_path / "none", retention_mode="token_kl")
    with pytest.raises(ValueError): train(tmp_path / "b", token.path, retention_mode="hidden")
    with pytest.raises(ValueError): CraftHook(CraftConfig())


def test_other_weights_fail_the_self_check(tmp_path, token):
    torch.manual_seed(9)
    FakePolicy().save_pretrained(tmp_path / "other")
    manifest = AnchorCache(token.path).manifest
    from vla_nb.craft.hook import self_check
    drift = measure_retention(FakePolicy.from_pretrained(tmp_path / "other"), token)["token_kl"]
    with pytest.raises(ValueError, match="self-check failed"):
        self_check(drift, manifest, CraftConfig(retention_mode="token_kl"))


# what broke the published code

def test_builder_needs_only_the_adapter(tmp_path):
    class Adapter(torch.nn.Module):
        "Nothing but the retention adapter."
        name, has_lm = "fake", True
        def __init__(self):
            super().__init__()
            self.inner, self.weight = [teacher().eval()], torch.nn.Parameter(torch.zeros(1))
        num_hidden_states = property(lambda self: self.inner[0].num_hidden_states)
        hidden_dim = property(lambda self: self.inner[0].hidden_dim)
        def features(self, batch, layer): return self.inner[0].features(batch, layer)
        def teacher_tokens(self, batch): return self.inner[0].teacher_tokens(batch)
        def token_logits(self, batch): return self.inner[0].token_logits(batch)
    for mode in ("token", "hidden"):
        batch = teacher().preprocessor({k: v for k, v in fake_batch(4).items() if k != "action"})
        rows = [{"kind": "frame", "index": i} for i in range(4)]
        assert len(build_cache(tmp_path / mode, lambda start: [(batch, rows)], Adapter(), mode)) == 4


def test_anchor_batches_are_tensors_the_policy_can_read_and_learn_from(token, hidden):
    policy = teacher()
    for cache in (token, hidden):
        batch = cache.batch(range(0, 24, 5))
        assert all(torch.is_tensor(v) for v in batch.values())
    policy.token_logits(token.batch(range(4)))[0].sum().backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in policy.parameters())
    h, _ = teacher().features(hidden.batch(range(4)), hidden.manifest["layer"]["index"])
    assert h.requires_grad   # student features carry gradients


def test_targets_are_the_teachers_answers_not_the_labels(token):
    batch, policy = token.batch(range(12)), teacher().eval()
    ids, mask = policy.teacher_tokens({k: v for k, v in batch.items() if k.startswith(("observation.", "is_"))})
    width = min(ids.shape[1], batch["suffix.tokens"].shape[1])
    assert torch.equal(batch["suffix.loss_mask"][:, :width], mask[:, :width])
    assert torch.equal(batch["suffix.tokens"][:, :width][mask[:, :width]], ids[:, :width][mask[:, :width]])


def test_text_only_masks_are_refused():
    h, text = torch.randn(2, 6, 3), torch.ones(2, 4).bool()
    with pytest.raises(ValueError, match="image and text"):
        pool(h, {"image": text, "valid": text, "last": T([3, 3])}, "mean_masked")


def test_public_caches_import_with_either_count_name(tmp_path):
    policy, ids = teacher(), torch.randint(4, 40, (2, 5))
    base = {"pixel_values": torch.zeros(2, 3, 32, 32), "input_ids": ids, "attention_mask": torch.ones(2, 5).long()}
    labels = torch.cat([torch.full((2, 3), -100), ids[:, 3:]], 1)
    for i, (name, extra) in enumerate([("num_samples", {"labels": labels}),
                                       ("num_anchors", {"target_features": torch.randn(2, 16).half()})]):
        source = tmp_path / f"public{i}"
        source.mkdir()
        torch.save(base | extra, source / "shard_0.pt")
        (source / "metadata.json").write_text(json.dumps({name: 2, "hidden_layer": -2, "pooling": "mean_masked"}))
        assert len(import_lineage_a(source, tmp_path / f"ours{i}", policy)) == 2
    torch.save(base | {"teacher_hidden": torch.zeros(2, 2, 2, 16)}, tmp_path / "public0/shard_0.pt")
    with pytest.raises(ValueError, match="teacher_hidden"):
        import_lineage_a(tmp_path / "public0", tmp_path / "x", policy)


def test_pickled_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self): return os.mkdir, (str(tmp_path / "ran"),)
    (tmp_path / "public").mkdir()
    torch.save({"input_ids": Evil()}, tmp_path / "public/shard_0.pt")
    (tmp_path / "public/metadata.json").write_text('{"num_samples": 1}')
    with pytest.raises(ValueError, match="not a plain tensor file"):
        import_lineage_a(tmp_path / "public", tmp_path / "x", teacher())
    assert not (tmp_path / "ran").exists()


# the loop

def weights(out): return load_file(last_checkpoint(out) / "pretrained_model/model.safetensors")


def history(out): return list(csv.reader(open(out / "lambda_history.csv")))


def test_cadence_counts_retention_steps(tmp_path, token):
    run = train(tmp_path / "run", token.path, retention_mode="token_kl", steps=7, retention_freq=3)
    rows = read_jsonl(tmp_path / "run/metrics.jsonl")
    assert [i for i, r in enumerate(rows) if "L_ret" in r] == [0, 3, 6]
    assert [r[0] for r in history(tmp_path / "run")] == ["step", "0", "3", "6"]
    assert json.loads((tmp_path / "run/summary.json").read_text())["hooks"]["craft"]["retention_steps"] == 3
    assert diagnose(rows, run.hooks[0].config) is not None


@pytest.mark.parametrize("mode", ["token_ce", "token_kl", "hidden"])
def test_resume_gives_the_same_lambda_trace_and_weights(tmp_path, token, hidden, mode):
    cache = (hidden if mode == "hidden" else token).path
    options = dict(retention_mode=mode, steps=8, save_freq=4, optimizer="adamw", lr=0.01)
    train(tmp_path / "straight", cache, **options)
    shutil.copytree(tmp_path / "straight", tmp_path / "resumed", symlinks=True)
    train(tmp_path / "resumed", cache, resume=tmp_path / "resumed/checkpoints/000004", **options)
    assert history(tmp_path / "straight") == history(tmp_path / "resumed") and len(history(tmp_path / "straight")) == 9
    a, b = (weights(tmp_path / n) for n in ("straight", "resumed"))
    assert all(torch.equal(a[k], b[k]) for k in a)
    with pytest.raises(ValueError, match="lambda_lr"):
        train(tmp_path / "resumed", cache, resume=tmp_path / "resumed/checkpoints/000004", lambda_lr=7.0, **options)


@pytest.mark.parametrize("mode", ["token_kl", "hidden"])
def test_two_processes_equal_one(tmp_path, token, hidden, mode):
    cache = (hidden if mode == "hidden" else token).path
    words = [str(SCRIPT), "OUT", str(cache), f"retention_mode={mode}", "anchors=2"]
    for ranks in (1, 2):
        launch = [] if ranks == 1 else ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        words[1] = str(tmp_path / str(ranks))
        done = subprocess.run([sys.executable, *launch, *words], env=ENV, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stdout + done.stderr
        assert json.loads(done.stdout.splitlines()[-1]) == {"world_size": ranks, "left": 0}
    one, two = (read_jsonl(tmp_path / str(r) / "metrics.jsonl") for r in (1, 2))
    for a, b in zip(one, two):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5) and b["lambda"] == pytest.approx(a["lambda"], rel=1e-5)
    for i, (a, b) in enumerate(zip(one[1:], two[1:])):   # at step 0 the retention gradient is rounding noise
        assert b["L_ret"] == pytest.approx(a["L_ret"], rel=1e-4, abs=1e-6)   # a small difference of large logarithms
        for key in ("dot", "cos", "norm_task", "norm_retain"):   # later steps add what float32 weights have drifted
            assert b[key] == pytest.approx(a[key], rel=1e-4 if i else 1e-5), (i, key)
    a, b = (weights(tmp_path / n) for n in "12")
    for k in a: torch.testing.assert_close(a[k], b[k], rtol=0, atol=1e-6)


@pytest.mark.parametrize("overflow", [False, True])
def test_scaled_gradients(tmp_path, token, overflow):
    "With a gradient scaler (fp16) the step is the same; an overflow of the retention gradient alone lowers the scale."
    def run_with(scale):
        loop = LoopConfig(steps=3, batch_size=ROWS, log_freq=100, save_freq=0, seed=3)
        hook = CraftHook(craft_config(dict(enabled=True, anchor_cache_dir=str(token.path), retention_mode="token_kl",
                                           anchor_batch_size=8, epsilon_start=0.01, epsilon_end=0.001)))
        policy = teacher()
        run = TrainRun(policy, OptimConfig(type="sgd", lr=0.05, warmup_steps=0), loop, task_batches(policy, 0, 1),
                       tmp_path / str(scale), [hook])
        if scale: run.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        if overflow and scale:
            once, real = [True], hook._retention_backward
            def too_large(run):
                value = real(run)
                if once: once.pop(); run.params[0][1].grad.fill_(float("inf"))
                return value
            hook._retention_backward = too_large
        assert run.train() == "done"
        return run
    plain, scaled = run_with(0), run_with(1024.0)
    assert scaled.skipped == overflow and scaled.grad_scale == (512 if overflow else 1024)
    if not overflow:
        for (_, a), (_, b) in zip(plain.params, scaled.params): torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-7)


# baselines

def test_interpolation_ends():
    a, b = teacher().state_dict(), FakePolicy().state_dict()
    assert all(torch.equal(interpolate(a, b, 0.0)[k], a[k]) and torch.equal(interpolate(a, b, 1.0)[k], b[k]) for k in a)


def test_replay_samples_come_from_the_manifest(token):
    assert replay_samples(token.path) == (list(range(24)), [])


def test_layer_map():
    policy = teacher()
    raw = fake_batch(4)
    policy(policy.preprocessor(rows_of(raw, [0, 1])))[0].backward()
    names, grads = zip(*((n, p.grad) for n, p in policy.named_parameters()))
    assert all(v == pytest.approx(1.0, abs=1e-6) for v in layer_cosines(names, grads, grads).values())
