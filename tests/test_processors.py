"Processor steps across modules: saved files, golden pictures, determinism in another process, speed."
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from vla_nb.core.types import Feature, UserError
from vla_nb.processors.actions import FastCodec, state_bins
from vla_nb.processors.normalize import NormalizerStep
from vla_nb.processors.pipeline import DeviceStep, Pipeline, RenameStep, Step, ToBatchStep
from vla_nb.processors.text import Pi0FastPrompt, Pi0FastTokenizerStep, WordTokenizer
from vla_nb.processors.vision import resize_with_pad

GOLDEN = Path(__file__).parent / "goldens"


def smooth_chunks(n=400, horizon=8, dims=4, seed=0):
    "Random walks, smooth enough for FAST."
    return np.clip(np.cumsum(np.random.default_rng(seed).normal(size=(n, horizon, dims)) * 0.15, axis=1), -1, 1)


@pytest.fixture(scope="module")
def codec():
    return FastCodec.fit(smooth_chunks(), scale=6, vocab_size=256)


@pytest.fixture
def preprocessor(codec):
    tok = WordTokenizer.fit(["Task: open the drawer;\n", "Is it open?\nAnswer: yes no", "Action: |"])
    features = {"observation.state": Feature("STATE", (3,)), "action": Feature("ACTION", (4,))}
    stats = {k: {"q01": -np.ones(d) * 2, "q99": np.ones(d) * 2, "mean": np.zeros(d), "std": np.ones(d)}
             for k, d in (("observation.state", 3), ("action", 4))}
    return Pipeline("policy_preprocessor", [
        RenameStep({"observation.images.laptop": "observation.images.corner"}), ToBatchStep(),
        NormalizerStep(features, {"STATE": "QUANTILES", "ACTION": "QUANTILES"}, stats),
        Pi0FastTokenizerStep(tok, codec, Pi0FastPrompt(vocab_size=len(tok) + 256)), DeviceStep("cpu")])


def example():
    return {"observation.state": torch.randn(2, 3), "observation.images.laptop": torch.rand(2, 3, 8, 8),
            "action": torch.from_numpy(smooth_chunks(2, seed=5)).float() * 2,
            "task": ["open the drawer", "Is it open?"], "answer": [None, "yes"]}


def test_saved_layout_is_lerobots(preprocessor, tmp_path):
    preprocessor.save(tmp_path)
    saved = json.loads((tmp_path / "policy_preprocessor.json").read_text())
    assert saved["name"] == "policy_preprocessor"
    assert [s["registry_name"] for s in saved["steps"]][2] == "normalizer_processor"
    assert saved["steps"][2]["state_file"] == "policy_preprocessor_step_2_normalizer_processor.safetensors"
    state = load_file(tmp_path / saved["steps"][2]["state_file"])
    assert set(state) >= {"action.q01", "action.q99", "observation.state.mean"}
    assert saved["steps"][3]["artifacts"] == {"tokenizer": "tokenizer", "codec": "codec"}
    assert not [p for p in tmp_path.rglob("*") if p.name.startswith(".")]


def test_round_trip_is_exact(preprocessor, tmp_path):
    preprocessor.save(tmp_path)
    batch = example()
    a, b = preprocessor(batch), Pipeline.load(tmp_path, "policy_preprocessor")(batch)
    assert a.keys() == b.keys()
    for k in a:
        assert torch.equal(a[k], b[k]) if torch.is_tensor(a[k]) else a[k] == b[k]


def test_overrides_are_strict_and_win(preprocessor, tmp_path):
    preprocessor.save(tmp_path)
    stats = {k: {"q01": np.zeros(d), "q99": np.ones(d)} for k, d in (("observation.state", 3), ("action", 4))}
    batch = example()
    for key in ("normalizer_processor", "NormalizerStep"):
        tuned = Pipeline.load(tmp_path, "policy_preprocessor", {key: {"stats": stats}})
        torch.testing.assert_close(tuned(batch)["observation.state"], 2 * batch["observation.state"] - 1)
    with pytest.raises(UserError, match="'normaliser' matches no step"):
        Pipeline.load(tmp_path, "policy_preprocessor", {"normaliser": {}})
    (tmp_path / "policy_preprocessor_step_2_normalizer_processor.safetensors").unlink()
    with pytest.raises(UserError, match="is missing"):
        Pipeline.load(tmp_path, "policy_preprocessor")


def test_broken_state_file_is_one_sentence(preprocessor, tmp_path):
    preprocessor.save(tmp_path)
    file = tmp_path / "policy_preprocessor_step_2_normalizer_processor.safetensors"
    file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(UserError, match="not a readable safetensors file"):
        Pipeline.load(tmp_path, "policy_preprocessor")


def test_a_file_cannot_choose_what_is_imported(tmp_path):
    (tmp_path / "policy_preprocessor.json").write_text(json.dumps(
        {"name": "policy_preprocessor", "steps": [{"class": "os.system", "config": {}}]}))
    with pytest.raises(UserError, match="unknown here"):
        Pipeline.load(tmp_path, "policy_preprocessor")


def test_own_step_by_class(tmp_path):
    class Twice(Step):
        def __call__(self, batch): return {**batch, "action": batch["action"] * 2}
    pipe = Pipeline("policy_postprocessor", [Twice()])
    pipe.save(tmp_path)
    name = json.loads((tmp_path / "policy_postprocessor.json").read_text())["steps"][0]["class"]
    loaded = Pipeline.load(tmp_path, "policy_postprocessor", classes={name: Twice})
    assert torch.equal(loaded(torch.ones(1, 2)), torch.full((1, 2), 2.0))


def test_steps_do_not_change_their_input(preprocessor):
    batch = example()
    before = {k: v.clone() if torch.is_tensor(v) else list(v) for k, v in batch.items()}
    preprocessor(batch)
    assert batch.keys() == before.keys()
    assert all(torch.equal(batch[k], v) if torch.is_tensor(v) else batch[k] == v for k, v in before.items())


def test_unbatched_observation_and_inverse(preprocessor):
    out = preprocessor({"observation.state": np.zeros(3, dtype=np.float32), "task": "open the drawer"})
    assert out["observation.state"].shape == (1, 3) and out["observation.language.tokens"].shape[0] == 1
    action = torch.randn(2, 8, 4)
    scaled = preprocessor[2]({"action": action})["action"]
    post = Pipeline("policy_postprocessor", [preprocessor[2].inverse()])
    torch.testing.assert_close(post(scaled), action)


def test_codec_is_the_same_in_another_process(codec, tmp_path):
    code = ("import sys; sys.path.insert(0, sys.argv[2]); from test_processors import *; "
            "FastCodec.fit(smooth_chunks(), scale=6, vocab_size=256).save(sys.argv[1])")
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "b"), str(Path(__file__).parent)], check=True)
    codec.save(tmp_path / "a")
    for name in ("tokenizer.json", "codec.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_codec_survives_any_ids(codec):
    rng = np.random.default_rng(0)
    ids = [rng.integers(-5, 300, size=rng.integers(0, 40)).tolist() for _ in range(200)]
    chunks, counts = codec.decode_with_count(ids)
    assert chunks.shape == (200, 8, 4) and torch.isfinite(chunks).all() and len(counts) == 200


def test_malformed_tail_keeps_the_prefix(codec):
    chunk = smooth_chunks(1, seed=9)
    ids = codec.encode(chunk)[0]
    whole = codec.decode([ids])[0]
    for cut in range(len(ids)):
        part, (count,) = codec.decode_with_count([ids[:cut]])
        coef = torch.from_numpy(codec._dct).float() @ part[0] * 6
        want = torch.from_numpy(codec._dct).float() @ whole * 6
        assert count == codec.coefficients(ids[:cut])
        torch.testing.assert_close(coef.flatten()[:count], want.flatten()[:count], atol=1e-4, rtol=0)
        assert coef.flatten()[count:].abs().max() < 1e-4


def test_codec_speed(codec):
    chunks = smooth_chunks(4000, seed=1)
    start = time.perf_counter()
    ids = codec.encode(chunks)
    codec.decode(ids)
    assert time.perf_counter() - start < 8    # measured: under 1 s on one core


def test_letterbox_equals_openpi():
    golden = load_file(GOLDEN / "openpi_letterbox.safetensors")
    names = [k[len("resize.in."):] for k in golden if k.startswith("resize.in.")]
    assert len(names) == 3
    for name in names:
        x, want = golden[f"resize.in.{name}"], golden[f"resize.out.{name}"]
        levels = x.dtype == torch.uint8     # openpi's uint8 kernel is fixed-point: one level apart in a few pixels
        got = resize_with_pad(x, 56, fill=0 if levels else -1.0)
        torch.testing.assert_close(got.float(), want.float(), atol=1 if levels else 1e-6, rtol=0)
        assert not levels or (got != want).float().mean() < 0.1


def test_state_bins_equal_openpi():
    state = [0.9083022059240091, 0.5358641812711986, -0.7480585064235958, 0.6539761718614896, 0.698144146862391,
             -0.3004343266708531, 0.022818469430919253, 0.20499981699328562]
    assert state_bins(torch.tensor(state)).tolist() == [244, 196, 32, 211, 217, 89, 130, 154]


def test_sentence_piece_tokenizer_has_the_same_surface(tmp_path, codec):
    from tokenizers import Tokenizer, models, pre_tokenizers, decoders, trainers
    from transformers import PreTrainedTokenizerFast

    from vla_nb.processors.text import joint_suffix, load_tokenizer
    inner = Tokenizer(models.BPE(unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    inner.decoder = decoders.Metaspace(prepend_scheme="never")
    texts = ["Task: open the drawer;\n", "Is it open?\nAnswer: yes", "Answer: no", "Action: |"]
    specials = ["<pad>", "<eos>", "<bos>", "<unk>"]
    inner.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=120, special_tokens=specials, show_progress=False))
    PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>",
                            unk_token="<unk>").save_pretrained(tmp_path)
    tok = load_tokenizer(tmp_path)
    assert (tok.pad_id, tok.eos_id, tok.bos_id, tok.unk_id) == (0, 1, 2, 3)
    assert tok.decode(tok.encode("open the drawer")).strip() == "open the drawer"
    assert tok.decode(joint_suffix(tok.encode, "Is it open?\nAnswer:", " yes")).strip() == "yes"
    step = Pi0FastTokenizerStep(tok, codec, Pi0FastPrompt(vocab_size=len(tok) + 256))
    out = step({"task": ["open the drawer"], "action": torch.from_numpy(smooth_chunks(1)).float()})
    fast = [step.token_to_fast(int(i)) for i in out["suffix.tokens"][0] if step.token_to_fast(int(i)) < 256]
    assert codec.coefficients(fast) == 32


def test_marks_without_an_embedding_are_no_words(tmp_path):
    "PaliGemma's tokenizer has an id for `<image>` behind the last row of the embedding table."
    from vla_nb.processors.text import HFTokenizer
    from vla_nb.processors.tokenize import open_tokenizer, write_word_tokenizer
    write_word_tokenizer(["open the drawer"], tmp_path)
    inner = open_tokenizer(tmp_path)
    words = len(inner)
    inner.add_special_tokens({"additional_special_tokens": ["<mark>"]})
    assert len(inner) == words + 1 and inner.convert_tokens_to_ids("<mark>") == words and len(HFTokenizer(inner)) == words


def test_tokenizer_fit_by_command(tmp_path, capsys):
    "Words and codec of a data set, with what they cost: the error that is printed is the one of the files that were written."
    from vla_nb.apps.cli import main
    from vla_nb.datasets.fake import fake_dataset
    from vla_nb.datasets.lerobot import LeRobotDataset
    from vla_nb.processors.text import load_tokenizer
    root, out = fake_dataset(tmp_path / "d", episodes=3, frames=12), tmp_path / "out"
    (tmp_path / "q.jsonl").write_text(json.dumps({"question": "Where is the mug?", "choices": ["left", "right"]}) + "\n")
    words = ["tokenizer", "fit", f"--dataset={root}", f"--out={out}", "--chunk_size=4", "--scale=10", f"--questions={tmp_path / 'q.jsonl'}"]
    assert main(words[:3]) != 0 and "--out=<folder>" in capsys.readouterr().err
    assert main(words) == 0
    found, said = json.loads((out / "fit.json").read_text()), capsys.readouterr().out
    codec, tokenizer, ds = FastCodec.load(out / "codec"), load_tokenizer(out / "tokenizer"), LeRobotDataset(root)
    assert tokenizer.unk_id not in tokenizer.encode(f"Task: {ds.meta.tasks[0]}, Where is the mug? left right")
    assert found["chunks"] == found["complete"] == len(ds) == 36 and codec.size == found["coefficients"] == 4 * ds.columns["action"].shape[1]
    low, high = (np.asarray(ds.meta.stats["action"][k]) for k in ("min", "max"))
    rows = np.minimum(np.arange(12)[:, None] + np.arange(4), 11)
    chunks = np.concatenate([np.asarray(ds.columns["action"])[a:a + 12][rows] for a in (0, 12, 24)])
    back = (codec.decode(codec.encode(2 * (chunks - low) / (high - low) - 1)).numpy() + 1) / 2 * (high - low) + low
    assert np.allclose(found["rms_error"], np.sqrt(((back - chunks) ** 2).mean((0, 1))), rtol=1e-3) and "tokens per chunk of 4 steps" in said
