"""Networks and policies: masks, caches, decoding, scoring, padding, saving, and what a broken policy folder says."""
import itertools
import json
import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import safetensors.torch
import torch
from torch.nn import functional as F

from vla_nb.core.stats import Stats, compute_stats
from vla_nb.core.types import Feature, UserError
from vla_nb.networks.blocks import attend, attention_bias, block_mask, rope_tables
from vla_nb.networks.paligemma import Gemma, GemmaLayer, PaliGemma, joint_layer, positions_of
from vla_nb.networks.vision import ConvStem, SiglipTower
from vla_nb.policies.base import (LANG_MASK, LANG_TOKENS, QUESTION, SUFFIX_LOSS, SUFFIX_MASK, SUFFIX_TOKENS, Policy,
                                  check_policy, first_row, train_on_one_batch, widen)
from vla_nb.policies.fake import FakeConfig, FakePolicy, fake_batch
from vla_nb.policies.pi0_fast import Pi0FastConfig, Pi0FastPolicy, make_network
from vla_nb.policies.store import load_policy, make_policy

TEXTS = ["Open the drawer", "push the big red button", "Which side is the hand on?", "Is the drawer open?", "left", "right", "yes, it is"]
SMALL = dict(width=32, depth=3, mlp_dim=48, num_heads=4, num_kv_heads=2, head_dim=8, image_size=32)
SHRUNKEN = dict(chunk_size=8, n_action_steps=8, vocab_size=0, fast_vocab_size=256, fast_scale=6.0, width=32, depth=2, mlp_dim=64,
                num_heads=4, head_dim=8, vision_width=24, vision_depth=2, vision_heads=4, vision_mlp_dim=32, image_size=28)


def motions(n=200, seed=0):
    "Smooth chunks [n, 8, 4], states [n, 4] and their statistics."
    rng = np.random.default_rng(seed)
    chunks = np.cumsum(rng.normal(0, 0.15, (n, 8, 4)), 1).clip(-1, 1).astype(np.float32)
    states = rng.normal(0, 1, (n, 4)).astype(np.float32)
    return chunks, states, Stats({"action": compute_stats(chunks.reshape(-1, 4)), "observation.state": compute_stats(states)})


def build(config, seed=0):
    "A fresh policy on the motions."
    chunks, _, stats = motions()
    torch.manual_seed(seed)
    return Pi0FastPolicy.from_data(config, TEXTS, chunks, stats).eval()


def raw_batch(policy, n=4, seed=0):
    "Half instructions, half questions, of different lengths."
    g = torch.Generator().manual_seed(seed)
    chunks, states, _ = motions()
    ask = [i >= n // 2 for i in range(n)]
    return {**{k: torch.randint(256, (n, 3, 40, 40), dtype=torch.uint8, generator=g) for k in policy.cameras},
            "observation.state": torch.from_numpy(states[:n]), "action": torch.from_numpy(chunks[:n]),
            "task": [TEXTS[2 + i % 2] if q else TEXTS[i % 2] for i, q in enumerate(ask)],
            "answer": [(TEXTS[4], TEXTS[6])[i % 2] if q else None for i, q in enumerate(ask)]}


def tensors(batch): return {k: v for k, v in batch.items() if torch.is_tensor(v)}


@pytest.fixture(scope="module")
def policy():
    "A policy trained a little, so that it writes tokens of different lengths."
    policy = build(Pi0FastConfig.tiny(**SMALL))
    batch = tensors(policy.preprocessor(raw_batch(policy, 32)))
    optimizer = torch.optim.AdamW(policy.train().optim_groups(5e-3, 0.0))
    for _ in range(60):
        optimizer.zero_grad(); policy(batch)[0].backward(); optimizer.step()
    optimizer.zero_grad()
    return policy.eval()


@pytest.fixture(scope="module")
def batch(policy): return tensors(policy.preprocessor(raw_batch(policy)))


def row_of(batch, r, ids):
    "One row without any padding, with a given suffix."
    keep = int(batch[LANG_MASK][r].sum())
    every = torch.ones(1, len(ids), dtype=torch.bool)
    one = {k: v[r:r + 1] for k, v in batch.items()}
    return {**one, LANG_TOKENS: one[LANG_TOKENS][:, :keep], LANG_MASK: one[LANG_MASK][:, :keep],
            SUFFIX_TOKENS: torch.tensor([ids]), SUFFIX_MASK: every, SUFFIX_LOSS: every}


# ---------------------------------------------------------------- networks

def test_mask_against_the_rule_spelled_out():
    "Every pattern of bits and validity of five tokens: i sees j iff block(j) <= block(i) and both are valid, or i is j."
    for bits, valid in itertools.product(itertools.product((0, 1), repeat=5), repeat=2):
        found = block_mask(torch.tensor([bits]), torch.tensor([valid], dtype=torch.bool))[0]
        for i, j in itertools.product(range(5), repeat=2):
            seen = sum(bits[:j + 1]) <= sum(bits[:i + 1]) and valid[i] and valid[j]
            assert found[i, j] == bool(seen or i == j), (bits, valid, i, j)


def test_prefix_is_bidirectional_and_suffix_causal():
    "Which outputs move when one input token moves, by brute force through a whole trunk."
    torch.manual_seed(0)
    model = PaliGemma(ConvStem(16, 16, 1, (8, 8, 8)), vocab_size=30, width=16, depth=2, mlp_dim=32, heads=2, kv_heads=1, head_dim=8)
    images, words, suffix = torch.rand(1, 1, 3, 16, 16), torch.randint(4, 30, (1, 4)), torch.randint(4, 30, (1, 4))
    valid, every = torch.tensor([[True, True, True, False]]), torch.ones(1, 4, dtype=torch.bool)

    def outputs(words, suffix):
        p = model.prefix(images, None, words, valid)
        return model.hidden(p)[0, :4], model.suffix_hidden(p, suffix, every)[0]

    with torch.no_grad():
        base_prefix, base = outputs(words, suffix)
        for j in range(4):
            changed = words.clone(); changed[0, j] = (changed[0, j] + 1) % 30
            prefix, out = outputs(changed, suffix)
            assert torch.equal(prefix, base_prefix) == (j == 3)                  # every valid word moves every prefix token; padding none
            assert torch.equal(out, base) == (j == 3)
            changed = suffix.clone(); changed[0, j] = (changed[0, j] + 1) % 30
            prefix, out = outputs(words, changed)
            assert torch.equal(prefix, base_prefix)                              # the prefix never sees the suffix
            for s in range(4): assert torch.allclose(out[s], base[s], atol=1e-6) == (s <= j)


def test_attention_against_formula_and_full_padding():
    "Grouped attention equals softmax(qk)v; rows that see nothing else are finite."
    torch.manual_seed(0)
    for kv in (1, 2, 4):
        q, k, v = torch.randn(2, 4, 6, 8), torch.randn(2, kv, 6, 8), torch.randn(2, kv, 6, 8)
        bias = attention_bias(block_mask(torch.zeros(2, 6), torch.tensor([[True] * 6, [False] * 6])), q.dtype)
        kk, vv = (t.repeat_interleave(4 // kv, 1) for t in (k, v))
        wanted = ((q @ kk.mT / math.sqrt(8) + bias).softmax(-1) @ vv).transpose(1, 2).flatten(2)
        out = attend(q, k, v, bias)
        torch.testing.assert_close(out, wanted)
        assert out.isfinite().all()


def test_two_streams_with_their_own_widths():
    "A second stream of another width joins the attention; the first stream does not see it, gradients flow into both."
    torch.manual_seed(0)
    a, b = GemmaLayer(32, 64, 4, 1, 8), GemmaLayer(16, 24, 4, 1, 8)
    x, y = torch.randn(1, 5, 32), torch.randn(1, 3, 16)
    bits = torch.tensor([[0] * 5 + [1, 0, 0]])
    rope = rope_tables(torch.arange(8)[None], 8)
    bias = attention_bias(block_mask(bits, torch.ones(1, 8, dtype=torch.bool)), x.dtype)
    first, second = joint_layer([a, b], [x, y], rope, bias)
    alone, = joint_layer([a], [x], tuple(t[:, :, :5] for t in rope), None)
    torch.testing.assert_close(first, alone)
    second.sum().backward()
    assert a.self_attn.k_proj.weight.grad.abs().sum() > 0 and b.mlp.down_proj.weight.grad.abs().sum() > 0


def test_trunk_equals_transformers_gemma():
    "Same weights under the same names: every hidden state equals transformers' Gemma, with padding in the batch."
    from transformers import GemmaConfig, GemmaModel
    torch.manual_seed(0)
    ours = Gemma(vocab_size=50, width=32, depth=3, mlp_dim=64, heads=4, kv_heads=2, head_dim=8).eval()
    with torch.no_grad():
        for name, p in ours.named_parameters():
            if "norm" in name: p.normal_(std=0.2)
    theirs = GemmaModel(GemmaConfig(vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
                                    num_key_value_heads=2, head_dim=8, hidden_activation="gelu_pytorch_tanh")).eval()
    theirs.load_state_dict(ours.state_dict())
    ids, valid = torch.randint(50, (2, 7)), torch.arange(7) < torch.tensor([[7], [4]])
    with torch.no_grad():
        wanted = theirs(ids, attention_mask=valid.long(), output_hidden_states=True).hidden_states
        bias = attention_bias(block_mask(torch.ones(2, 7), valid), torch.float32)
        for layer in range(4):
            found = ours.run(ours.embed(ids), positions_of(valid), bias, layer=layer)
            torch.testing.assert_close(found[valid], wanted[layer][valid], atol=1e-5, rtol=1e-5)


def test_tower_equals_transformers_siglip():
    "Same weights, same names below `vision_model`: the tokens equal transformers' SigLIP."
    from transformers import SiglipVisionConfig, SiglipVisionModel
    torch.manual_seed(0)
    theirs = SiglipVisionModel(SiglipVisionConfig(hidden_size=24, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                                                  image_size=28, patch_size=14, vision_use_head=False)).eval()
    ours = SiglipTower(24, 2, 4, 48, image_size=28, patch=14).eval()
    ours.vision_model.load_state_dict({k.removeprefix("vision_model."): v for k, v in theirs.state_dict().items()})
    images = torch.rand(3, 3, 28, 28) * 2 - 1
    with torch.no_grad(): torch.testing.assert_close(ours(images[:, None]), theirs(images).last_hidden_state, atol=1e-5, rtol=1e-5)


def test_published_geometry_on_the_meta_device():
    "2 923.3 M parameters, published names and shapes."
    with torch.device("meta"): network = make_network(Pi0FastConfig.published())
    shapes = {k: tuple(v.shape) for k, v in network.state_dict().items()}
    assert round(sum(math.prod(s) for s in shapes.values()) / 1e6, 1) == 2923.3
    assert shapes["vision_tower.vision_model.embeddings.patch_embedding.weight"] == (1152, 3, 14, 14)
    assert shapes["vision_tower.vision_model.encoder.layers.26.self_attn.out_proj.weight"] == (1152, 1152)
    assert shapes["multi_modal_projector.linear.weight"] == (2048, 1152)
    assert shapes["language_model.embed_tokens.weight"] == (257152, 2048)
    assert shapes["language_model.layers.17.self_attn.k_proj.weight"] == (256, 2048)
    assert shapes["language_model.layers.0.mlp.gate_proj.weight"] == (16384, 2048)


# ---------------------------------------------------------------- pi0_fast

def test_conformance_of_all_sizes(policy, batch):
    "The conformance check of every policy, on the tiny structure, the published structure and the fake."
    check_policy(policy, batch)
    shrunken = build(Pi0FastConfig.published(**SHRUNKEN))
    check_policy(shrunken, tensors(shrunken.preprocessor(raw_batch(shrunken))), fall=0.9)
    fake = FakePolicy()
    check_policy(fake, tensors(fake.preprocessor(fake_batch(4))))


def test_tiny_size():
    "About a million parameters, with the vocabulary of these few words."
    policy = build(Pi0FastConfig.tiny())
    assert 0.95e6 < sum(p.numel() for p in policy.parameters()) < 1.15e6
    assert policy.config.vocab_size == len(policy.tokenizer) + 256


def test_loss_by_hand(policy, batch):
    "Sum over suffix tokens of −log p; `Action:`, `|` and the end token count; the loss is their mean."
    total, count, logs = policy.loss_terms(batch)
    logits, targets, mask = policy.token_logits(batch)
    by_hand = sum(-logits[b, s].log_softmax(-1)[targets[b, s]] for b, s in mask.nonzero().tolist())
    torch.testing.assert_close(total, by_hand)
    assert count == mask.sum() and set(logs) == {"loss_action", "loss_question"}
    row = targets[0][mask[0]].tolist()
    assert row[:len(policy.text.action_head)] == policy.tokenizer.encode("Action: ") and row[-1] == policy.tokenizer.eos_id


def test_masked_targets_carry_no_loss(policy, batch):
    "Switching loss_mask off changes the count and the sum by exactly those tokens."
    off = {**batch, SUFFIX_LOSS: batch[SUFFIX_LOSS].clone()}
    off[SUFFIX_LOSS][1] = False
    total, count, _ = policy.loss_terms(batch)
    less, fewer, _ = policy.loss_terms(off)
    only, n, _ = policy.loss_terms({**batch, SUFFIX_LOSS: batch[SUFFIX_LOSS] & ~off[SUFFIX_LOSS]})
    torch.testing.assert_close(total, less + only)
    assert count == fewer + n


def greedy_by_hand(policy, batch, r):
    "The constrained greedy suffix of one action row by full forward passes, one per token."
    text, out = policy.text, list(policy.text.action_head)
    left = policy.codec.size
    while left:
        logits = policy.token_logits(row_of(batch, r, out + [0]))[0][0, -1]
        fits = [i for i, n in enumerate(policy.codec.lengths) if 0 < n <= left]
        best = max(fits, key=lambda i: logits[text.fast_to_token(i)].item())
        out.append(text.fast_to_token(best))
        left -= int(policy.codec.lengths[best])
    return [*out, *text.action_tail, policy.tokenizer.eos_id]


def test_cached_batched_decoding_equals_full_passes(policy, batch):
    "Every row of a mixed batch: KV-cached, batched, rows leaving at different times = one full forward per token."
    mixed = {k: v.clone() for k, v in batch.items()}
    with torch.no_grad():
        ids, mask = policy.teacher_tokens(mixed)
        for r in range(2): assert ids[r][mask[r]].tolist() == greedy_by_hand(policy, batch, r)
        for r in range(2, 4):
            out = []
            while len(out) < policy.max_answer_tokens and (not out or out[-1] != policy.tokenizer.eos_id):
                out.append(policy.token_logits(row_of(batch, r, out + [0]))[0][0, -1].argmax().item())
            assert ids[r][mask[r]].tolist() == out


def test_rows_leave_at_different_times(policy):
    "Decoding eight different rows together and alone gives the same, and their lengths differ."
    batch = tensors(policy.preprocessor({k: v for k, v in raw_batch(policy, 8).items() if k != "answer"}))
    together = policy.write_fast(batch)
    assert len({len(row) for row in together}) > 1
    for r in range(8): assert policy.write_fast({k: v[r:r + 1] for k, v in batch.items()})[0] == together[r]


def test_chunks_are_always_full(policy, batch):
    "The constraint leaves no malformed chunk."
    for seed in range(5):
        b = tensors(policy.preprocessor(raw_batch(policy, 4, seed)))
        b[QUESTION][:] = False
        for row in policy.write_fast(b): assert policy.codec.coefficients([policy.text.token_to_fast(i) for i in row]) == 32


def test_a_cut_chunk_keeps_its_beginning(policy, batch):
    "A malformed tail: what was decoded stays, missing coefficients are zero, no end token is invented."
    short = Pi0FastPolicy(replace(policy.config, max_action_tokens=9), policy.preprocessor, policy.postprocessor).eval()
    short.load_state_dict(policy.state_dict())
    part = first_row(batch)
    whole, cut = policy.write_fast(part)[0], short.write_fast(part)[0]
    assert cut == whole[:len(cut)] and len(cut) < len(whole)
    wanted, (count,) = policy.codec.decode_with_count([[policy.text.token_to_fast(i) for i in cut]])
    assert 0 < count < 32
    torch.testing.assert_close(short.predict_action_chunk(part), wanted)
    assert short.write_actions(part)[0][-1] == cut[-1]


def test_choices_equal_the_joint_pass(policy, batch):
    "Shared prefix cache, choices side by side, different numbers and lengths = one full forward per choice."
    asked = {k: v[2:] for k, v in batch.items()}
    choices = [[[7, 8, 9, 1], [10, 1], [11, 12, 1]], [[5, 1], [6, 7, 8, 9, 10, 1]]]
    scores = policy.score_choices(asked, choices)
    for r, row in enumerate(choices):
        assert len(scores[r]) == len(row)
        for ids, found in zip(row, scores[r]):
            with torch.no_grad(): logits, targets, _ = policy.token_logits(row_of(asked, r, ids))
            wanted = logits.log_softmax(-1)[0].gather(1, targets[0][:, None])[:, 0]
            assert found.dtype == np.float32
            np.testing.assert_allclose(found, wanted.numpy(), atol=2e-5)
    single = policy.score_choices(asked, [[[7], [8]], [[9], [10]]])
    np.testing.assert_allclose(single[0][0], scores[0][0][:1], atol=2e-5)


def test_scores_sum_to_one_over_everything(policy, batch):
    "All one-token choices together have probability one."
    asked = {k: v[2:3] for k, v in batch.items()}
    scores = policy.score_choices(asked, [[[i] for i in range(policy.config.vocab_size)]])
    assert np.exp(np.concatenate(scores[0]).astype(np.float64)).sum() == pytest.approx(1, abs=1e-5)


def test_padding_and_neighbours_change_nothing(policy, batch):
    "Loss, logits, features and decoded ids of a row: alone, in the batch, and with seven more columns of padding."
    wide = widen(batch, 7)
    n = batch[LANG_TOKENS].shape[1]
    with torch.no_grad():
        assert torch.equal(policy.teacher_tokens(batch)[0], policy.teacher_tokens(wide)[0])
        torch.testing.assert_close(policy.token_logits(batch)[0], policy.token_logits(wide)[0][:, :-7], atol=2e-5, rtol=1e-4)
        for layer in range(policy.num_hidden_states):
            h, masks = policy.features(batch, layer)
            h2, masks2 = policy.features(wide, layer)
            assert torch.equal(masks["last"], masks2["last"]) and torch.equal(masks["valid"], masks2["valid"][:, :-7])
            torch.testing.assert_close(h[masks["valid"]], h2[masks2["valid"]], atol=2e-5, rtol=1e-4)
            alone, m = policy.features(first_row(batch), layer)
            torch.testing.assert_close(alone[m["valid"]], h[:1][masks["valid"][:1]], atol=2e-5, rtol=1e-4)
    assert h.shape[1] == 2 * 4 + 1 + n and masks["image"].sum() == 4 * 8


def test_hidden_states_are_numbered_as_in_transformers(policy, batch):
    "0 are the embeddings, −1 is after the final norm, −2 the raw output of the last block but one; gradients flow."
    with torch.no_grad():
        prefix = policy.embed(batch)
        assert torch.equal(policy.features(batch, 0)[0], prefix.x)
        lm = policy.model.language_model
        assert torch.equal(policy.features(batch, -2)[0], policy.features(batch, len(lm.layers) - 1)[0])
        rms = (policy.features(batch, -1)[0] / (1 + lm.norm.weight)).pow(2).mean(-1).sqrt()
        torch.testing.assert_close(rms, torch.ones_like(rms), atol=1e-2, rtol=0)
    assert (policy.num_hidden_states, policy.hidden_dim) == (4, 32)
    h, masks = policy.features(batch, -2)
    h[masks["image"]].sum().backward()
    assert policy.model.vision_tower.convs[0].weight.grad.abs().sum() > 0
    policy.zero_grad()
    with pytest.raises(UserError, match="hidden state 4 does not exist"): policy.features(batch, 4)


def test_state_token(policy, batch):
    "The state moves instructions and not questions."
    other = {**batch, "observation.state": batch["observation.state"] + 1}
    with torch.no_grad(): same = (policy.token_logits(batch)[0] == policy.token_logits(other)[0]).flatten(1).all(1)
    assert same.tolist() == [False, False, True, True]


def test_random_shift_in_training_mode_only(policy, batch):
    "Training losses differ from call to call and repeat with the seed; evaluation, logits and features never move."
    shifting = build(Pi0FastConfig.tiny(**SMALL, random_shift=4))
    shifting.load_state_dict(policy.state_dict())
    shifting.train()
    with torch.no_grad():
        torch.manual_seed(0); first = [shifting(batch)[0].item() for _ in range(2)]
        torch.manual_seed(0); again = [shifting(batch)[0].item() for _ in range(2)]
        assert first == again and first[0] != first[1]
        assert torch.equal(shifting.token_logits(batch)[0], policy.token_logits(batch)[0])
        assert torch.equal(shifting.features(batch, -1)[0], policy.features(batch, -1)[0])
        assert shifting.eval()(batch)[0].item() == policy(batch)[0].item()


def test_pictures_of_any_kind(policy):
    "uint8 and float, native and network size give the same picture; a missing camera is named."
    raw = raw_batch(policy)
    x = policy.pictures(raw)
    assert x.shape == (4, 2, 3, 32, 32) and x.min() >= -1 and x.max() <= 1
    floats = {k: raw[k].float() / 255 for k in policy.cameras}
    assert (policy.pictures(floats) - x).abs().max() < 0.005
    with pytest.raises(UserError, match="lacks 'observation.images.top'"): policy.pictures({policy.cameras[0]: raw[policy.cameras[0]]})


def test_autocast(policy, batch):
    "bfloat16 autocast changes the loss by little and keeps logits and features float32."
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = policy(batch)
        logits, features = policy.token_logits(batch)[0], policy.features(batch, -2)[0]
    assert loss.item() == pytest.approx(policy(batch)[0].item(), rel=0.02)
    assert logits.dtype == features.dtype == torch.float32


def test_bfloat16_weights():
    "A policy cast to bfloat16 decodes and scores."
    policy = build(Pi0FastConfig.tiny(**SMALL)).to(torch.bfloat16)
    batch = tensors(policy.preprocessor(raw_batch(policy)))
    assert policy.predict_action_chunk(batch).dtype == torch.float32
    assert np.isfinite(policy.score_choices({k: v[2:] for k, v in batch.items()}, [[[7, 1]], [[8, 1]]])[0][0]).all()


def test_act_from_raw_to_physical(policy):
    "Physical units come out, the plan is executed step by step, pictures are wanted once per plan."
    chunks, states, stats = motions()
    seen = {**{k: np.zeros((40, 40, 3), np.uint8) for k in policy.cameras}, "observation.state": states[0], "task": "Open the drawer"}
    policy.reset()
    assert policy.needs_observation
    actions = [policy.act(seen)] + [policy.act({}) for _ in range(7)]
    assert policy.needs_observation
    batched = {**{k: torch.zeros(1, 3, 40, 40, dtype=torch.uint8) for k in policy.cameras},
               "observation.state": torch.from_numpy(states[:1]), "task": ["Open the drawer"]}
    np.testing.assert_allclose(np.stack(actions), policy.plan(batched)[0].numpy(), atol=1e-6)
    low, high = stats["action"]["min"], stats["action"]["max"]
    normal = policy.predict_action_chunk(policy.prepare(batched))[0].numpy()
    np.testing.assert_allclose(np.stack(actions), (normal + 1) / 2 * (high - low) + low, atol=1e-5)
    policy.act(seen); policy.reset()
    assert policy.needs_observation


def test_a_policy_learns_to_act_and_to_answer():
    "After fitting one batch, greedy decoding gives back its actions and answers."
    policy = build(Pi0FastConfig.tiny(**SMALL, random_shift=0))
    raw = raw_batch(policy)
    batch = tensors(policy.preprocessor(raw))
    optimizer = torch.optim.AdamW(policy.train().optim_groups(5e-3, 0.0))
    for _ in range(150):
        optimizer.zero_grad(); policy(batch)[0].backward(); optimizer.step()
    policy.eval()
    assert policy(batch)[0] < 0.05
    ids, mask = policy.teacher_tokens(batch)
    for r in range(4): assert ids[r][mask[r]].tolist() == batch[SUFFIX_TOKENS][r][batch[SUFFIX_MASK][r]].tolist()
    physical = policy.plan({k: v[:2] for k, v in raw.items() if k not in ("action", "answer")})
    assert (physical - raw["action"][:2]).abs().mean() < 0.1                     # the codec's rounding
    choices = [policy.encode_text(" left") + [1], policy.encode_text(" yes, it is") + [1]]
    scores = policy.score_choices({k: v[2:] for k, v in batch.items()}, [choices, choices])
    assert [int(np.argmax([c.sum() for c in row])) for row in scores] == [0, 1]


def test_optim_groups_hold_every_parameter_once(policy):
    "Norms, biases, embeddings and positions without weight decay."
    decayed, bare = policy.optim_groups(1e-3, 0.1)
    assert {id(p) for g in (decayed, bare) for p in g["params"]} == {id(p) for p in policy.parameters()}
    assert len(decayed["params"]) + len(bare["params"]) == len(list(policy.parameters()))
    assert (decayed["weight_decay"], bare["weight_decay"]) == (0.1, 0.0)
    assert any(p is policy.model.language_model.embed_tokens.weight for p in bare["params"])


def test_configuration_errors(policy):
    "Unknown keys, unknown choices and a codec of another chunk length are refused."
    data = dict(texts=TEXTS, action_chunks=motions()[0], stats=motions()[2])
    features = dict(input_features=policy.config.input_features, output_features=policy.config.output_features)
    with pytest.raises(UserError, match="did you mean 'depth'"): make_policy("pi0_fast", {**features, "depht": 2}, **data)
    with pytest.raises(UserError, match="Unknown key 'pi0fast'"): make_policy("pi0fast", {}, **data)
    with pytest.raises(UserError, match="vision is 'resnet'"): Pi0FastConfig.tiny(vision="resnet")
    with pytest.raises(UserError, match="at least one picture"): Pi0FastConfig.tiny({"observation.state": Feature("STATE", (4,)), "action": Feature("ACTION", (4,))})
    with pytest.raises(UserError, match="fitted on chunks of 8 × 4"):
        Pi0FastPolicy(replace(policy.config, chunk_size=10), policy.preprocessor, policy.postprocessor)
    with pytest.raises(UserError, match="has no targets"): policy.loss_terms({LANG_TOKENS: torch.zeros(1, 1)})


# ---------------------------------------------------------------- store

@pytest.fixture(scope="module")
def saved(policy, tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "policy"
    policy.save_pretrained(path)
    return path


def copy_of(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "policy")


def test_saved_policy_is_bit_equal(policy, batch, saved):
    "Weights, configuration, tokenizer, codec and pipelines come back; a run folder means its last checkpoint."
    other = load_policy(saved)
    assert type(other) is Pi0FastPolicy and other.config == policy.config and not other.training
    for k, v in policy.state_dict().items(): assert torch.equal(v, other.state_dict()[k]), k
    again = tensors(other.preprocessor(raw_batch(other)))
    for k, v in batch.items(): assert torch.equal(v, again[k]), k
    assert torch.equal(policy.predict_action_chunk(batch), other.predict_action_chunk(batch))
    assert torch.equal(policy.postprocessor(torch.ones(1, 8, 4)), other.postprocessor(torch.ones(1, 8, 4)))
    assert not list(saved.parent.glob(".*"))


def test_run_folder(saved, tmp_path):
    "A run folder is its last checkpoint."
    step = tmp_path / "run/checkpoints/000003"
    shutil.copytree(saved, step / "pretrained_model")
    (step.parent / "last").symlink_to("000003")
    assert load_policy(tmp_path / "run").name == load_policy(step).name == "pi0_fast"


def spoil_weights(path, change):
    "Rewrite the weights after a change."
    state = safetensors.torch.load_file(path / "model.safetensors")
    change(state)
    safetensors.torch.save_file(state, path / "model.safetensors")


def spoil_config(path, **values):
    "Rewrite config.json with other values."
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **values}))


NAME = "language_model.norm.weight"


@pytest.mark.parametrize("spoil,message", [
    (lambda p: shutil.rmtree(p), "Policy folder not found"),
    (lambda p: (p / "config.json").unlink(), "config.json is missing"),
    (lambda p: (p / "model.safetensors").unlink(), "model.safetensors is missing"),
    (lambda p: (p / "policy_preprocessor.json").unlink(), "policy_preprocessor.json is missing"),
    (lambda p: (p / "codec/codec.json").unlink(), "codec.json"),
    (lambda p: (p / "tokenizer/words.json").unlink(), "no tokenizer"),
    (lambda p: (p / "config.json").write_text("{"), "not valid JSON"),
    (lambda p: (p / "model.safetensors").write_bytes((p / "model.safetensors").read_bytes()[:-9]), "truncated or damaged"),
    (lambda p: (p / "model.safetensors").write_bytes(b""), "truncated or damaged"),
    (lambda p: spoil_config(p, type="tdmpc"), "Unknown key 'tdmpc' in the policy types"),
    (lambda p: spoil_config(p, type="fake"), "Unknown key"),
    (lambda p: spoil_config(p, widht=3), "did you mean 'width'"),
    (lambda p: spoil_config(p, width="wide"), "width is 'wide'"),
    (lambda p: spoil_config(p, mlp_dim=64), "the configuration wants"),
    (lambda p: spoil_weights(p, lambda s: s.pop(f"model.{NAME}")), f"lacks 1 tensors, the first is 'model.{NAME}'"),
    (lambda p: spoil_weights(p, lambda s: s.update(extra=torch.zeros(1))), "has unexpected 1 tensors, the first is 'extra'"),
    (lambda p: spoil_weights(p, lambda s: s[f"model.{NAME}"].fill_(float("nan"))), "contains NaN or infinity"),
], ids=lambda v: v if isinstance(v, str) else "")
def test_broken_folders_are_named(saved, tmp_path, spoil, message):
    "Every way a folder can be broken is one sentence."
    path = copy_of(saved, tmp_path)
    spoil(path)
    with pytest.raises(UserError) as e: load_policy(path)
    assert message in str(e.value) and "\n" not in str(e.value)


def test_another_policy_type(saved):
    "A class refuses the checkpoint of another policy and says which it is."
    with pytest.raises(UserError, match="holds a 'pi0_fast' policy, not 'fake'"): FakePolicy.from_pretrained(saved)


def test_failed_save_leaves_the_old_folder(policy, saved, tmp_path, monkeypatch):
    "An error in the middle of a save leaves the old checkpoint readable and nothing half-written."
    path = copy_of(saved, tmp_path)
    before = {p.relative_to(path): p.read_bytes() for p in path.rglob("*") if p.is_file()}
    def fail(self, folder): raise OSError(28, "No space left on device")
    monkeypatch.setattr(type(policy.postprocessor), "save", fail)
    with pytest.raises(OSError): policy.save_pretrained(path)
    assert {p.relative_to(path): p.read_bytes() for p in path.rglob("*") if p.is_file()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["policy"]


# ---------------------------------------------------------------- fake

def test_fake_policy_is_small_and_complete():
    "Below 20 000 parameters, any number of cameras, the whole retention adapter."
    config = FakeConfig(input_features={**{f"observation.images.{c}": Feature("VISUAL", (3, 48, 48)) for c in "ab"},
                                        "observation.state": Feature("STATE", (6,))},
                        output_features={"action": Feature("ACTION", (3,))}, chunk_size=4, n_action_steps=2)
    policy = FakePolicy(config).eval()
    assert sum(p.numel() for p in policy.parameters()) < 20_000 and isinstance(policy, Policy) and policy.has_lm
    batch = tensors(policy.preprocessor(fake_batch(5, config=config)))
    ids, mask = policy.teacher_tokens(batch)
    logits, targets, keep = policy.token_logits({**batch, SUFFIX_TOKENS: ids, SUFFIX_MASK: mask, SUFFIX_LOSS: mask})
    assert logits.shape[:2] == targets.shape == keep.shape
    assert policy.predict_action_chunk(batch).shape == (5, 4, 3)
    before, after = train_on_one_batch(policy, batch)
    assert after < before
    assert F.cross_entropy(logits[keep], targets[keep]).isfinite()
