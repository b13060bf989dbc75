"Question scoring on a real (tiny) trunk against brute force, the command line, and the statistics behind it."
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from vla_nb.core.types import UserError
from vla_nb.datasets.questions import load_questions
from vla_nb.evaluation.mcq import (choice_ids, compare_results, evaluate_mcq, main, question_batch,
                                   question_images, score_questions)
from vla_nb.evaluation.stats import cluster_bootstrap, mcnemar, wilson
from vla_nb.policies.fake import FakePolicy


@pytest.fixture(scope="module")
def policy():
    torch.manual_seed(0)
    policy = FakePolicy().eval()
    with torch.no_grad():
        for p in policy.parameters(): p.add_(0.1 * torch.randn_like(p))   # far from a symmetric start
    return policy


@pytest.fixture
def file(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    rows = []
    for i in range(24):
        name = f"images/{i // 3}.png"
        pixels = rng.integers(0, 255, (40 + i // 12 * 8, 32, 3), dtype=np.uint8)      # two picture sizes
        if i % 3 == 0: Image.fromarray(pixels).save(tmp_path / name)
        rows.append({"id": f"q{i}", "category": "abc"[i % 3], "image_path": name, "question": "Where is the drawer ?",
                     "choices": ["left", "on the right", "nowhere in sight at all"][:2 + i % 2],
                     "answer_index": int(rng.integers(2))})
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return tmp_path / "questions.jsonl"


def brute_force(policy, q, shift=0):
    "One choice at a time through the training pass: no batch, no cache. `shift=1` reads each token's own position."
    out = []
    for ids in choice_ids(policy, q):
        batch = question_batch(policy, [q], [question_images(policy, q)])
        full = torch.tensor([ids + ids[:1] * shift])       # one more token behind, so that a logit exists
        batch |= {"suffix.tokens": full, "suffix.attention_mask": torch.ones_like(full, dtype=torch.bool),
                  "suffix.loss_mask": torch.ones_like(full, dtype=torch.bool)}
        with torch.no_grad(): logits = policy.token_logits(batch)[0][0]
        logp = logits[shift:shift + len(ids)].log_softmax(-1)
        out.append(logp[torch.arange(len(ids)), torch.tensor(ids)].sum().item())
    return out


def test_scores_equal_brute_force(policy, file):
    questions = load_questions(file)
    for batch_size in (1, 5, 32):
        scores = score_questions(policy, questions, batch_size)
        for q, s in zip(questions, scores):
            np.testing.assert_allclose([x.sum() for x in s], brute_force(policy, q), atol=1e-4)


def test_the_published_off_by_one_gives_other_numbers(policy, file):
    q = load_questions(file)[1]
    assert np.abs(np.subtract(brute_force(policy, q), brute_force(policy, q, shift=1))).max() > 0.05


def test_probabilities_of_all_one_word_answers_sum_to_one(policy, file):
    q = load_questions(file)[0]
    batch = question_batch(policy, [q], [question_images(policy, q)])
    vocabulary = policy.token_logits(batch | {"suffix.tokens": torch.zeros(1, 1, dtype=torch.int64),
                                              "suffix.attention_mask": torch.ones(1, 1, dtype=torch.bool),
                                              "suffix.loss_mask": torch.ones(1, 1, dtype=torch.bool)})[0].shape[-1]
    scores = policy.score_choices(batch, [[[i] for i in range(vocabulary)]])[0]
    assert sum(float(np.exp(s[0])) for s in scores) == pytest.approx(1, abs=1e-4)


def test_an_answer_cannot_change_the_context(policy, file):
    "The score of a choice is the same whatever else is asked beside it."
    q = load_questions(file)[1]
    batch = question_batch(policy, [q], [question_images(policy, q)])
    ids = choice_ids(policy, q)
    together = policy.score_choices(batch, [ids])[0]
    for choice, want in zip(ids, together):
        np.testing.assert_allclose(policy.score_choices(batch, [[choice]])[0][0], want, atol=1e-5)


def test_result_schema_and_pmi(policy, file):
    out = evaluate_mcq(policy, file, pmi=True)
    assert {"accuracy", "avg_margin", "correct_count", "total_count", "n_failed", "accuracy_mean", "avg_margin_gold",
            "ci95", "chance", "results", "accuracy_byte", "accuracy_pmi", "per_category"} <= set(out)
    row = out["results"][0]
    assert {"id", "predicted_index", "log_likelihoods", "correct", "margin", "answer_index"} <= set(row)
    assert out["total_count"] == 24 and out["n_frames"] == 8
    assert out["chance"] == pytest.approx((1 / 2 + 1 / 3) / 2)
    assert all(r["margin"] >= 0 for r in out["results"])
    assert all((r["margin_gold"] > 0) == r["correct"] for r in out["results"])
    assert sum(c["n"] for c in out["per_category"].values()) == 24
    json.dumps(out)


def test_command_one_and_two_policies(policy, file, tmp_path, capsys):
    policy.save_pretrained(tmp_path / "a")
    other = FakePolicy()
    other.save_pretrained(tmp_path / "b")
    assert main([f"--checkpoint_path={tmp_path / 'a'}", f"--data_jsonl={file}",
                 f"--output_json={tmp_path / 'one.json'}", "--max-samples", "9", "--batch_size=4", "--device=cpu"]) == 0
    assert json.loads((tmp_path / "one.json").read_text())["total_count"] == 9
    assert main([f"--policy.path={tmp_path / 'a'}", f"--policy.path_b={tmp_path / 'b'}", f"--data_jsonl={file}",
                 f"--output_json={tmp_path / 'two.json'}", "--device=cpu"]) == 0
    two = json.loads((tmp_path / "two.json").read_text())
    assert set(two) == {"checkpoint_a", "checkpoint_b", "diff", "paired"}
    assert two["diff"] == pytest.approx(two["checkpoint_b"]["accuracy"] - two["checkpoint_a"]["accuracy"])
    assert two["paired"] == compare_results(two["checkpoint_a"], two["checkpoint_b"])
    assert "McNemar" in capsys.readouterr().out


def test_missing_picture_stops_before_a_model_is_loaded(file, tmp_path):
    lines = file.read_text().splitlines()
    lines[4] = json.dumps({**json.loads(lines[4]), "image_path": "images/gone.png"})
    file.write_text("\n".join(lines) + "\n")
    with pytest.raises(UserError, match=r"line 5: picture .*gone\.png does not exist"):
        main(["--policy.path=nowhere", f"--data_jsonl={file}", f"--output_json={tmp_path / 'out.json'}"])
    assert not (tmp_path / "out.json").exists()


def test_failures_stay_in_the_denominator(policy, file):
    (file.parent / "images" / "2.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match="cannot be read"):
        evaluate_mcq(policy, file)
    out = evaluate_mcq(policy, file, allow_failures=True)
    assert out["n_failed"] == 3 and out["total_count"] == 24
    assert out["correct_count"] == sum(r["correct"] for r in out["results"])


def test_paths_resolve_against_file_then_working_directory(file, tmp_path, monkeypatch):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    moved = elsewhere / "q.jsonl"
    moved.write_text(file.read_text())
    with pytest.raises(UserError, match="does not exist"): load_questions(moved)
    monkeypatch.chdir(tmp_path)
    assert load_questions(moved)[0].images[0].is_file()


def test_statistics_against_scipy():
    from scipy.stats import binomtest
    for k, n in ((3, 10), (0, 4), (50, 50)):
        ci = binomtest(k, n).proportion_ci(method="wilson")
        assert wilson(k, n) == pytest.approx((ci.low, ci.high), abs=1e-9)
    for b, c in ((3, 9), (0, 7), (12, 12)):
        assert mcnemar(b, c) == pytest.approx(binomtest(min(b, c), b + c).pvalue, abs=1e-9)


def test_bootstrap_covers():
    "The 95 % interval of a clustered mean holds the truth about 95 times of 100; the unclustered one far less often."
    rng, hits = np.random.default_rng(0), np.zeros(2)
    for _ in range(200):
        x = np.repeat(rng.random(60) < 0.7, 6)
        for j, clusters in enumerate((np.repeat(np.arange(60), 6), None)):
            low, high = cluster_bootstrap(x, clusters, draws=500)
            hits[j] += low <= 0.7 <= high
    assert hits[0] / 200 > 0.9 and hits[1] / 200 < 0.75


def test_command_line_exit_status(tmp_path):
    "Through the interpreter: a missing file is a sentence and a failure."
    code = ("import sys\nfrom vla_nb.core.types import UserError\nfrom vla_nb.evaluation.mcq import main\n"
            "try: sys.exit(main(sys.argv[1:]))\nexcept UserError as e: sys.exit(str(e))")
    done = subprocess.run([sys.executable, "-c", code, "--policy.path=x", "--data_jsonl=none.jsonl"],
                          capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.strip().count("\n") == 0 and "none.jsonl" in done.stderr
