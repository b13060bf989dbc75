"""pi0-FAST against transformers' PaliGemma with the same weights: loss of a suffix and the greedy chunk, pictures and padding in the batch."""
import numpy as np
import pytest
import torch

from vla_nb.core.stats import Stats, compute_stats
from vla_nb.core.types import UserError
from vla_nb.policies.base import LANG_MASK, LANG_TOKENS, SUFFIX_LOSS, SUFFIX_MASK, SUFFIX_TOKENS
from vla_nb.policies.pi0_fast import Pi0FastConfig, Pi0FastPolicy

TEXTS = ["Open the drawer", "push the big red button"]
SIZES = dict(chunk_size=4, n_action_steps=4, vocab_size=0, fast_vocab_size=128, fast_scale=4.0, width=32, depth=3, mlp_dim=48, num_heads=4,
             num_kv_heads=1, head_dim=8, vision_width=24, vision_depth=2, vision_heads=4, vision_mlp_dim=32, image_size=28)


def close(a, b): torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


@pytest.fixture(scope="module")
def policy():
    "The published structure, shrunken, with random norms too."
    rng = np.random.default_rng(0)
    chunks, states = np.cumsum(rng.normal(0, 0.2, (60, 4, 4)), 1).clip(-1, 1).astype(np.float32), rng.normal(0, 1, (60, 4)).astype(np.float32)
    stats = Stats({"action": compute_stats(chunks.reshape(-1, 4)), "observation.state": compute_stats(states)})
    torch.manual_seed(0)
    policy = Pi0FastPolicy.from_data(Pi0FastConfig.published(**SIZES), TEXTS, chunks, stats).eval()
    with torch.no_grad():
        for p in policy.parameters():
            if p.ndim < 2: p.add_(torch.randn_like(p) * 0.2)
    return policy


@pytest.fixture(scope="module")
def batch(policy):
    g = torch.Generator().manual_seed(1)
    rng = np.random.default_rng(2)
    raw = {**{k: torch.rand(2, 3, 40, 30, generator=g) for k in policy.cameras}, "observation.state": torch.randn(2, 4, generator=g),
           "action": torch.from_numpy(np.cumsum(rng.normal(0, 0.2, (2, 4, 4)), 1).astype(np.float32)), "task": TEXTS}
    return {k: v for k, v in policy.preprocessor(raw).items() if torch.is_tensor(v)}


@pytest.fixture(scope="module")
def paligemma(policy):
    "transformers' model with our weights; one more id stands for picture tokens."
    from transformers import PaliGemmaConfig, PaliGemmaForConditionalGeneration
    c, n = policy.config, policy.config.vocab_size
    text = dict(model_type="gemma", vocab_size=n + 1, hidden_size=c.width, intermediate_size=c.mlp_dim, num_hidden_layers=c.depth,
                num_attention_heads=c.num_heads, num_key_value_heads=c.num_kv_heads, head_dim=c.head_dim, rms_norm_eps=1e-6,
                hidden_activation="gelu_pytorch_tanh", pad_token_id=0)
    vision = dict(model_type="siglip_vision_model", hidden_size=c.vision_width, intermediate_size=c.vision_mlp_dim, vision_use_head=False,
                  num_hidden_layers=c.vision_depth, num_attention_heads=c.vision_heads, image_size=c.image_size, patch_size=c.vision_patch,
                  layer_norm_eps=1e-6, projection_dim=c.width)
    model = PaliGemmaForConditionalGeneration(PaliGemmaConfig(text_config=text, vision_config=vision, image_token_id=n, projection_dim=c.width))
    own = {f"model.{k}".replace("vision_tower.vision_model.", "vision_tower."): v for k, v in policy.model.state_dict().items()}
    table = "model.language_model.embed_tokens.weight"
    own[table] = torch.cat([own[table], torch.zeros(1, c.width)])
    found = model.load_state_dict(own, strict=False)
    assert not found.unexpected_keys and set(found.missing_keys) <= {"lm_head.weight"}
    model.tie_weights()
    return model.eval()


def inputs(policy, batch):
    "Both rows as transformers wants them: one sequence, padding left out row by row."
    seen = (28 // 14) ** 2 * len(policy.cameras)
    for r in range(2):
        words, suffix = batch[LANG_TOKENS][r][batch[LANG_MASK][r]], batch[SUFFIX_TOKENS][r][batch[SUFFIX_MASK][r]]
        before = torch.cat([torch.full((seen,), policy.config.vocab_size), words])
        yield before, suffix, policy.pictures({k: v[r:r + 1] for k, v in batch.items()})[0]


def test_loss_equals_transformers_paligemma(policy, batch, paligemma):
    "Scores of every suffix token, and their mean cross-entropy."
    logits, targets, mask = policy.token_logits(batch)
    losses = []
    for r, (before, suffix, pictures) in enumerate(inputs(policy, batch)):
        ids, n = torch.cat([before, suffix])[None], len(before)
        kinds = (torch.arange(ids.shape[1]) >= n).long()[None]
        with torch.no_grad():
            out = paligemma(input_ids=ids, pixel_values=pictures, token_type_ids=kinds, attention_mask=torch.ones_like(ids),
                            labels=torch.where(kinds == 1, ids, -100)).logits[0, n - 1:-1]
        close(logits[r][mask[r]], out[:, :-1])
        losses.append(torch.nn.functional.cross_entropy(out[:, :-1], suffix, reduction="none"))
    assert batch[SUFFIX_LOSS].sum() == mask.sum()
    close(policy(batch)[0], torch.cat(losses).mean())


def test_chunk_equals_transformers_paligemma(policy, batch, paligemma):
    "The constrained greedy chunk, token by token from transformers' scores without a cache."
    text, wanted = policy.text, []
    for before, _, pictures in inputs(policy, batch):
        out, left = list(text.action_head), policy.codec.size
        while left:
            ids = torch.cat([before, torch.tensor(out)])[None]
            kinds = (torch.arange(ids.shape[1]) >= len(before)).long()[None]
            with torch.no_grad():
                scores = paligemma(input_ids=ids, pixel_values=pictures, token_type_ids=kinds, attention_mask=torch.ones_like(ids)).logits[0, -1]
            fits = [i for i, n in enumerate(policy.codec.lengths) if 0 < n <= left]
            best = max(fits, key=lambda i: scores[text.fast_to_token(i)].item())
            out.append(text.fast_to_token(best))
            left -= int(policy.codec.lengths[best])
        wanted.append([text.token_to_fast(i) for i in out[len(text.action_head):]])
    close(policy.predict_action_chunk(batch), policy.codec.decode(wanted))
