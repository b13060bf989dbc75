"""Goldens of SmolVLA, made by LeRobot 0.4.4 with a tiny random VLM: the policy folder that LeRobot writes, a raw batch, and what LeRobot makes of it.

Run in an environment with lerobot==0.4.4 and transformers==4.57.6:  python make.py  (in this folder)
"""
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from lerobot.configs.types import FeatureType, NormalizationMode, PolicyFeature
from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
from lerobot.policies.smolvla.processor_smolvla import make_smolvla_pre_post_processors

SPECIALS = ["<pad>", "<eos>", "<bos>", "<unk>", "<image>", "<fake_token_around_image>", "<global-img>"]
WORDS = ["\n", ".", "open", "the", "drawer", "push", "big", "red", "button"]
TASKS = ["open the drawer.", "push the big red button"]
IDENTITY, MEAN_STD, MIN_MAX = NormalizationMode.IDENTITY, NormalizationMode.MEAN_STD, NormalizationMode.MIN_MAX


def vlm_folder():
    "config.json, tokenizer and processor of a VLM that LeRobot can build with random weights."
    folder = Path("vlm")
    shutil.rmtree(folder, ignore_errors=True); folder.mkdir()
    text = dict(model_type="llama", vocab_size=20, hidden_size=16, intermediate_size=24, num_hidden_layers=5, num_attention_heads=2,
                num_key_value_heads=1, head_dim=8, rms_norm_eps=1e-5, hidden_act="silu", attention_bias=False, mlp_bias=False,
                rope_theta=100000.0, max_position_embeddings=512, pad_token_id=0, bos_token_id=2, eos_token_id=1, attention_dropout=0.0)
    vision = dict(model_type="smolvlm_vision", hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
                  num_channels=3, image_size=32, patch_size=8, hidden_act="gelu_pytorch_tanh", layer_norm_eps=1e-6, attention_dropout=0.0)
    values = dict(model_type="smolvlm", architectures=["SmolVLMForConditionalGeneration"], text_config=text, vision_config=vision,
                  scale_factor=2, image_token_id=4, pad_token_id=0, tie_word_embeddings=False)
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(SPECIALS + WORDS)}, unk_token="<unk>"))
    tokenizer.add_special_tokens(SPECIALS)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n|\d+|[^\W\d_]+|[^\w\s]|_"), "removed", invert=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = dict(tokenizer_class="PreTrainedTokenizerFast", pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", unk_token="<unk>",
                 extra_special_tokens={"image_token": "<image>", "fake_image_token": "<fake_token_around_image>",
                                       "global_image_token": "<global-img>"})
    for name, v in {"config": values, "tokenizer_config": names, "processor_config": dict(processor_class="SmolVLMProcessor"),
                    "preprocessor_config": dict(image_processor_type="SmolVLMImageProcessor", processor_class="SmolVLMProcessor"),
                    "video_preprocessor_config": dict(video_processor_type="SmolVLMVideoProcessor", processor_class="SmolVLMProcessor")
                    }.items(): (folder / f"{name}.json").write_text(json.dumps(v, indent=1))


def config(**values):
    "Every field of the configuration."
    image = lambda h, w: PolicyFeature(type=FeatureType.VISUAL, shape=(3, h, w))
    return SmolVLAConfig(**{**dict(
        n_obs_steps=1, chunk_size=6, n_action_steps=5, device="cpu", use_amp=False, push_to_hub=False,
        input_features={"observation.images.top": image(24, 40), "observation.images.wrist": image(40, 30),
                        "observation.state": PolicyFeature(type=FeatureType.STATE, shape=(5,))},
        output_features={"action": PolicyFeature(type=FeatureType.ACTION, shape=(4,))},
        normalization_mapping={"VISUAL": IDENTITY, "STATE": MEAN_STD, "ACTION": MEAN_STD},
        max_state_dim=8, max_action_dim=6, resize_imgs_with_padding=(32, 32), empty_cameras=0, adapt_to_pi_aloha=False,
        use_delta_joint_actions_aloha=False, tokenizer_max_length=10, num_steps=4, use_cache=True, freeze_vision_encoder=True,
        train_expert_only=True, train_state_proj=True, optimizer_lr=1e-4, optimizer_betas=(0.9, 0.95), optimizer_eps=1e-8,
        optimizer_weight_decay=1e-10, optimizer_grad_clip_norm=10, scheduler_warmup_steps=1000, scheduler_decay_steps=30000,
        scheduler_decay_lr=2.5e-6, vlm_model_name="vlm", load_vlm_weights=False, add_image_special_tokens=False,
        attention_mode="cross_attn", prefix_length=-1, pad_language_to="longest", num_expert_layers=-1, num_vlm_layers=4,
        self_attn_every_n_layers=2, expert_width_multiplier=0.75, min_period=4e-3, max_period=4.0, rtc_config=None,
        compile_model=False, compile_mode="max-autotune"), **values})


VARIANTS = {
    "base": {},
    "options": dict(attention_mode="self_attn", add_image_special_tokens=True, prefix_length=40, pad_language_to="max_length",
                    empty_cameras=1, num_vlm_layers=2, num_steps=3,
                    normalization_mapping={"VISUAL": IDENTITY, "STATE": MIN_MAX, "ACTION": MIN_MAX}),
    "cross": dict(self_attn_every_n_layers=0, num_expert_layers=1, num_vlm_layers=2, num_steps=3),
}


def stats():
    g = torch.Generator().manual_seed(1)
    def one(n):
        x = torch.randn(50, n, generator=g) * 3 + 1
        return dict(mean=x.mean(0), std=x.std(0), min=x.amin(0), max=x.amax(0))
    return {"observation.state": one(5), "action": one(4)}


def raw_batch():
    g = torch.Generator().manual_seed(2)
    sizes = {"observation.images.top": (24, 40), "observation.images.wrist": (40, 30)}
    pictures = {k: torch.randint(256, (2, 3, *s), generator=g, dtype=torch.uint8) for k, s in sizes.items()}
    return {**pictures, "observation.state": torch.randn(2, 5, generator=g), "action": torch.randn(2, 6, 4, generator=g)}


def make(name, values):
    torch.manual_seed(0)
    c = config(**values)
    policy = SmolVLAPolicy(c).eval()
    with torch.no_grad():
        for p in policy.parameters(): p.add_(torch.randn_like(p) * (0.2 if p.ndim < 2 else 0.1))   # norms and biases too
    before, after = make_smolvla_pre_post_processors(c, stats())
    folder = Path(name)
    shutil.rmtree(folder, ignore_errors=True)
    for part in (policy, before, after): part.save_pretrained(folder)

    batch = raw_batch()
    floats = {k: v / 255 if v.dtype == torch.uint8 else v for k, v in batch.items()}
    seen = before({**floats, "task": TASKS})
    g = torch.Generator().manual_seed(3)
    noise, time = torch.randn(2, 6, c.max_action_dim, generator=g), torch.tensor([0.25, 0.9])
    with torch.no_grad():
        loss, _ = policy.forward(dict(seen), noise=noise, time=time)
        chunk = policy.predict_action_chunk(dict(seen), noise=noise)
    inputs = {f"inputs.{k}": seen[k] for k in ("observation.state", "action", "observation.language.tokens",
                                              "observation.language.attention_mask")}
    picture = policy.prepare_images(seen)[0]
    out = {**{f"raw.{k}": v for k, v in batch.items()}, **inputs, "inputs.picture": picture[0], "noise": noise, "time": time,
           "loss": loss, "chunk": chunk, "actions": after(chunk)}
    save_file({k: v.contiguous() for k, v in out.items()}, folder / "expected.safetensors", {"tasks": json.dumps(TASKS)})
    print(name, loss.item(), sum(p.numel() for p in policy.parameters()), f"{sum(f.stat().st_size for f in folder.iterdir()) / 1e3:.0f} kB")


if __name__ == "__main__":
    vlm_folder()
    for name, values in VARIANTS.items(): make(name, values)
