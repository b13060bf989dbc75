"""openpi's checkpoints: PyTorch and JAX files become policies that give the same numbers; what does not belong is refused."""
import json
import runpy
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parent))
from test_pi0 import ATOL, EMBED, batch_of, close, golden  # noqa: E402
from vla_nb.apps.cli import main
from vla_nb.checkpoints.command import verify_checkpoint
from vla_nb.checkpoints.lerobot import read_lerobot
from vla_nb.checkpoints.openpi import import_openpi, open_checkpoint, torch_targets
from vla_nb.core.types import OBS_STATE, UserError
from vla_nb.networks.flow import time_embedding
from vla_nb.policies.base import LANG_MASK, LANG_TOKENS
from vla_nb.policies.pi0 import Pi0Config, Pi0Policy, Pi05Config, Pi05Policy, make_network
from vla_nb.policies.store import load_policy
from vla_nb.processors.text import WordTokenizer
from vla_nb.processors.tokenize import write_word_tokenizer

JAX = Path(__file__).parent / "goldens/openpi_jax"
RECIPE = runpy.run_path(str(JAX / "make.py"))


def assets(folder, state, action):
    "Statistics and a tokenizer beside a checkpoint; returns the tokenizer's folder."
    row = lambda n: {"mean": [0.1] * n, "std": [2.0] * n, "q01": [-1.0] * n, "q99": [3.0] * n}
    (folder / "assets/robot").mkdir(parents=True)
    (folder / "assets/robot/norm_stats.json").write_text(json.dumps({"norm_stats": {"state": row(state), "actions": row(action)}}))
    write_word_tokenizer(["open the drawer"], folder / "tokenizer")
    return folder / "tokenizer"


# ---------------------------------------------------------------- PyTorch

def torch_file(name, folder, prefix="", both=False):
    "openpi's golden weights as openpi writes them: the embedding below the head's name, heads nobody uses included."
    sizes, data = golden(name)
    torch.manual_seed(1)
    state = {**data["weight"], **{k: torch.randn(shape) for k, shape in sizes["absent"].items()}}
    head = state["paligemma_with_expert.paligemma.lm_head.weight"]
    head[data["embedding"]["ids"]] = data["embedding"]["rows"]
    if both: state[EMBED] = head.clone()
    folder.mkdir(exist_ok=True)
    save_file({prefix + k: v.contiguous() for k, v in state.items()}, folder / "model.safetensors")
    return assets(folder, sizes["action_dim"], sizes["action_dim"])


@pytest.mark.parametrize("name,prefix,both", [("pi0", "", False), ("pi05", "", False), ("pi0", "model.", True)])
def test_torch_import_plans_like_openpi(name, prefix, both, tmp_path):
    "Imported through files, the policy gives openpi's plan; every tensor is accounted for."
    sizes, data = golden(name)
    tokenizer = torch_file(name, tmp_path / "source", prefix, both)
    table = import_openpi(tmp_path / "source", tmp_path / "ours", tokenizer, cameras=sizes["cameras"], vision_heads=4,
                          chunk_size=sizes["action_horizon"], n_action_steps=sizes["action_horizon"])
    assert table.counts() == {"loaded": len(data["weight"]) + len(sizes["absent"]) - 1, "tied": int(both), "new": 0, "ignored": 1}
    policy = load_policy(tmp_path / "ours")
    assert policy.name == name and policy.config.image_resolution == (56, 56)
    close(policy.predict_action_chunk(batch_of(name), data["input"]["noise"]), data["output"]["sample.actions"])
    back = policy.postprocessor(torch.zeros(1, sizes["action_dim"]))
    wanted = 0.1 if name == "pi0" else 1.0          # the mean; the middle of the quantiles
    close(back, torch.full_like(back, wanted), 1e-5)


def test_published_number_of_keys():
    "A published pi0.5 has 812 keys: ours, the expert's unused head, and the tied table under one name."
    with torch.device("meta"): keys = make_network(Pi05Config.published(), True).state_dict()
    assert len(keys) + 1 == 812
    assert all(torch_targets(k, v) == {k: v} for k, v in keys.items())


def test_half_precision_keeps_norms(tmp_path):
    "A bfloat16 file gives a bfloat16 policy whose norms and heads stay in float32."
    tokenizer = torch_file("pi05", tmp_path / "source")
    path = tmp_path / "source/model.safetensors"
    state = load_file(path)
    save_file({k: v.bfloat16() if "q_proj" in k else v for k, v in state.items()}, path)
    import_openpi(tmp_path / "source", tmp_path / "ours", tokenizer, vision_heads=4, chunk_size=6, n_action_steps=6)
    types = {k: v.dtype for k, v in load_file(tmp_path / "ours/model.safetensors").items()}
    kept = [k for k, t in types.items() if t == torch.float32]
    assert types["model.paligemma_with_expert.gemma_expert.model.layers.0.mlp.up_proj.weight"] == torch.bfloat16
    assert all(any(p in k for p in ("norm", "embedding", "action_", "time_mlp")) for k in kept)
    norm = "paligemma_with_expert.gemma_expert.model.layers.1.input_layernorm.dense.weight"
    assert torch.equal(load_file(tmp_path / "ours/model.safetensors")[f"model.{norm}"], state[norm])
    noise = golden("pi05")[1]["input"]["noise"]
    moved = load_policy(tmp_path / "ours").predict_action_chunk(batch_of("pi05"), noise) - golden("pi05")[1]["output"]["sample.actions"]
    assert moved.abs().max() < 0.15


def test_a_false_tie_is_refused(tmp_path):
    "Two names of one tensor must hold one tensor."
    tokenizer = torch_file("pi0", tmp_path / "source", both=True)
    state = load_file(tmp_path / "source/model.safetensors")
    state[EMBED][3] += 1
    save_file(state, tmp_path / "source/model.safetensors")
    with pytest.raises(UserError, match="should be the same tensor"):
        import_openpi(tmp_path / "source", tmp_path / "ours", tokenizer, vision_heads=4)
    assert not (tmp_path / "ours").exists()


# ---------------------------------------------------------------- JAX

def softmax(x): return np.exp(x - x.max(-1, keepdims=True)) / np.exp(x - x.max(-1, keepdims=True)).sum(-1, keepdims=True)


def gelu(x): return x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x ** 3)))


def silu(x): return x / (1 + np.exp(-x))


def layer_norm(x, scale, bias): return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6) * scale + bias


def turn(x, positions):
    "Rotary positions of x [T, heads, d]."
    d = x.shape[-1]
    angle = positions[:, None, None] / 10_000 ** (2 * np.arange(d // 2) / d)
    a, b = x[..., :d // 2], x[..., d // 2:]
    return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], -1)


def look(p, picture):
    "The vision tower on one picture [3, 4, 4], written with the JAX arrays as they are."
    block = lambda name, i: p[f"img/Transformer/encoderblock/{name}"][i]
    patches = picture.transpose(1, 2, 0).reshape(2, 2, 2, 2, 3).transpose(0, 2, 1, 3, 4)
    x = np.einsum("yxhwc,hwco->yxo", patches, p["img/embedding/kernel"]).reshape(4, -1) + p["img/embedding/bias"] + p["img/pos_embedding"][0]
    for i in range(2):
        y, a = layer_norm(x, block("LayerNorm_0/scale", i), block("LayerNorm_0/bias", i)), "MultiHeadDotProductAttention_0/"
        q, k, v = (np.einsum("td,dhk->htk", y, block(f"{a}{n}/kernel", i)) + block(f"{a}{n}/bias", i)[:, None] for n in ("query", "key", "value"))
        seen = softmax(q @ k.transpose(0, 2, 1) / np.sqrt(q.shape[-1])) @ v
        x = x + np.einsum("htk,hkd->td", seen, block(f"{a}out/kernel", i)) + block(f"{a}out/bias", i)
        y = layer_norm(x, block("LayerNorm_1/scale", i), block("LayerNorm_1/bias", i))
        y = gelu(y @ block("MlpBlock_0/Dense_0/kernel", i) + block("MlpBlock_0/Dense_0/bias", i))
        x = x + y @ block("MlpBlock_0/Dense_1/kernel", i) + block("MlpBlock_0/Dense_1/bias", i)
    x = layer_norm(x, p["img/Transformer/encoder_norm/scale"], p["img/Transformer/encoder_norm/bias"])
    return x @ p["img/head/kernel"] + p["img/head/bias"]


def forward(arrays, pictures, ids, x_t, t, state, adaptive):
    "One joint pass of both streams over one sample, straight from the JAX arrays in float64."
    p = {k.removeprefix("PaliGemma/"): v.astype(np.float64) for k, v in arrays.items()}
    dense = lambda name, x: x @ p[f"{name}/kernel"] + p[f"{name}/bias"]
    e = time_embedding(torch.tensor([t]), 6)[0].double().numpy()
    actions, cond = dense("action_in_proj", x_t), None
    if adaptive: cond, suffix, bits = silu(dense("time_mlp_out", silu(dense("time_mlp_in", e)))), actions, [1] + [0] * (len(x_t) - 1)
    else:
        mixed = np.concatenate([actions, np.broadcast_to(e, actions.shape)], -1)
        actions = dense("action_time_mlp_out", silu(dense("action_time_mlp_in", mixed)))
        suffix, bits = np.concatenate([dense("state_proj", state)[None], actions]), [1, 1] + [0] * (len(x_t) - 1)
    words = p["llm/embedder/input_embedding"][ids] * np.sqrt(8)
    xs = [np.concatenate([*(look(p, x) for x in pictures), words]), suffix]
    block = np.cumsum([0] * len(xs[0]) + bits)
    hidden, positions = np.where(block[None] <= block[:, None], 0, -np.inf), np.arange(len(block))

    def norm(x, name, tail, i=None):
        get = lambda leaf: p[f"{name}{tail}/{leaf}"] if i is None else p[f"{name}{tail}/{leaf}"][i]
        y = x / np.sqrt((x ** 2).mean(-1, keepdims=True) + 1e-6)
        if not (adaptive and tail): return y * (1 + get("scale")), 1
        scale, shift, gate = np.split(cond @ get("Dense_0/kernel") + get("Dense_0/bias"), 3)
        return y * (1 + scale) + shift, gate

    for i in range(2):
        layer = lambda name: p[f"llm/layers/{name}"][i]
        ys, gates = zip(*(norm(x, "llm/layers/pre_attention_norm", tail, i) for x, tail in zip(xs, ("", "_1"))))
        q = np.concatenate([np.einsum("td,hdk->thk", y, layer(f"attn/q_einsum{t}/w")) for y, t in zip(ys, ("", "_1"))])
        k, v = (np.concatenate([np.einsum("td,hdk->thk", y, layer(f"attn/kv_einsum{t}/w")[n]) for y, t in zip(ys, ("", "_1"))]) for n in (0, 1))
        logits = np.einsum("qhk,sk->hqs", turn(q, positions), turn(k, positions)[:, 0]) / 2          # head_dim 4
        seen = np.einsum("hqs,sk->qhk", softmax(logits + hidden), v[:, 0])
        for n, (part, tail) in enumerate(zip(np.split(seen, [len(xs[0])]), ("", "_1"))):
            xs[n] = xs[n] + np.einsum("thk,hkd->td", part, layer(f"attn/attn_vec_einsum{tail}/w")) * gates[n]
            y, gate = norm(xs[n], "llm/layers/pre_ffw_norm", tail, i)
            g, u = (y @ w for w in layer(f"mlp{tail}/gating_einsum"))
            xs[n] = xs[n] + (gelu(g) * u) @ layer(f"mlp{tail}/linear") * gate
    out, _ = norm(xs[1], "llm/final_norm", "_1")
    return dense("action_out_proj", out[-len(x_t):])


@pytest.mark.parametrize("name,adaptive", [("pi0", False), ("pi05", True)])
def test_jax_import_equals_an_independent_forward(name, adaptive, tmp_path):
    "A checkpoint that orbax wrote: converted, and compared with a pass over the JAX arrays themselves."
    pytest.importorskip("tensorstore")
    shutil.copytree(JAX / name, tmp_path / "source")
    tokenizer = assets(tmp_path / "source", 3, 3)
    table = import_openpi(tmp_path / "source", tmp_path / "ours", tokenizer, vision_heads=3, chunk_size=5, n_action_steps=5)
    policy = load_policy(tmp_path / "ours")
    arrays = {k: RECIPE["value"](k, s) for k, s in RECIPE["shapes"](adaptive).items()}
    assert policy.name == name and policy.config.paligemma_variant == "8,2,10,2,1,4" and policy.config.vision_variant == "6,2,3,5,2"
    assert {r.source for r in table.rows} == arrays.keys() and table.counts()["loaded"] == len(policy.state_dict())
    rng = np.random.default_rng(0)
    pictures, ids, x_t, state = rng.uniform(0, 1, (3, 3, 4, 4)), np.array([2, 7, 5]), rng.normal(size=(5, 3)), rng.normal(size=3)
    batch = {c: torch.tensor(x[None], dtype=torch.float32) for c, x in zip(policy.cameras, pictures)}
    batch |= {LANG_TOKENS: torch.tensor(ids[None]), LANG_MASK: torch.ones(1, 3, dtype=torch.bool), OBS_STATE: torch.tensor(state[None]).float(),
              "action": torch.zeros(1, 5, 3)}
    with torch.no_grad():       # at time t and with actions 0 the network sees x_t = t · noise
        v, _ = policy.velocities(batch, torch.tensor(x_t[None] / 0.3).float(), torch.tensor([0.3]))
    wanted = forward(arrays, pictures * 2 - 1, ids, x_t, 0.3, state, adaptive)
    close(v[0].double(), torch.tensor(wanted), ATOL)
    assert np.abs(wanted - forward(arrays, pictures * 2 - 1, ids[::-1], x_t, 0.3, state, adaptive)).max() > 1e-3   # it can differ


def log_likelihoods(arrays, pictures, ids, known):
    "log p of every id of a text behind its first `known` ones, which see each other, straight from the JAX arrays in float64."
    p = {k.removeprefix("PaliGemma/"): v.astype(np.float64) for k, v in arrays.items()}
    x = np.concatenate([*(look(p, x) for x in pictures), p["llm/embedder/input_embedding"][ids] * np.sqrt(8)])
    block = np.cumsum([0] * (len(x) - len(ids) + known) + [1] * (len(ids) - known))
    hidden, positions = np.where(block[None] <= block[:, None], 0, -np.inf), np.arange(len(block))
    norm = lambda x, scale: x / np.sqrt((x ** 2).mean(-1, keepdims=True) + 1e-6) * (1 + scale)
    for i in range(2):
        layer = lambda name: p[f"llm/layers/{name}"][i]
        y = norm(x, layer("pre_attention_norm/scale"))
        q, (k, v) = np.einsum("td,hdk->thk", y, layer("attn/q_einsum/w")), np.einsum("td,nhdk->nthk", y, layer("attn/kv_einsum/w"))
        logits = np.einsum("qhk,sk->hqs", turn(q, positions), turn(k, positions)[:, 0]) / 2          # head_dim 4
        seen = np.einsum("hqs,sk->qhk", softmax(logits + hidden), v[:, 0])
        x = x + np.einsum("thk,hkd->td", seen, layer("attn/attn_vec_einsum/w"))
        y = norm(x, layer("pre_ffw_norm/scale"))
        g, u = (y @ w for w in layer("mlp/gating_einsum"))
        x = x + (gelu(g) * u) @ layer("mlp/linear")
    scores = norm(x, p["llm/final_norm/scale"])[len(x) - len(ids) + known - 1:-1] @ p["llm/embedder/input_embedding"].T
    return np.log(softmax(scores))[np.arange(len(ids) - known), ids[known:]]


@pytest.fixture(scope="module")
def fast(tmp_path_factory):
    "A pi0-FAST of openpi, with a tokenizer and an action codec in the form in which they are published."
    pytest.importorskip("tensorstore")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    folder = tmp_path_factory.mktemp("fast")
    shutil.copytree(JAX / "pi0_fast", folder / "source")
    assets(folder / "source", 3, 3)
    words = WordTokenizer.fit(["Task: open the drawer, State: - ;\n Action: |", *map(str, range(256))])
    words.save(folder / "words")
    codec, rng = Tokenizer(models.BPE()), np.random.default_rng(0)
    codec.pre_tokenizer, codec.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    texts = ["".join(map(chr, row)) for row in np.rint(rng.normal(354, 8, (200, 12))).astype(int)]
    codec.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=290, show_progress=False, special_tokens=[],
                                                         initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    (folder / "fast").mkdir()
    codec.save(str(folder / "fast/tokenizer.json"))
    numbers = {"action_dim": None, "time_horizon": None, "min_token": -354, "scale": 10, "vocab_size": 290}
    (folder / "fast/processor_config.json").write_text(json.dumps({"processor_class": "UniversalActionProcessor", **numbers}))
    return folder


def test_jax_import_of_pi0_fast_equals_an_independent_forward(fast, tmp_path):
    "Every array of a pi0-FAST is accounted for; the likelihood of a chunk is the one that the JAX arrays give."
    table = import_openpi(fast / "source", tmp_path / "ours", fast / "words", vision_heads=3, chunk_size=4, n_action_steps=4, fast=fast / "fast")
    policy = load_policy(tmp_path / "ours")
    arrays = {k: RECIPE["value"](k, s) for k, s in RECIPE["fast_shapes"]().items()}
    assert policy.name == "pi0_fast" and policy.config.fast_vocab_size == 290 and policy.codec.min_token == -354
    assert {r.source for r in table.rows} == arrays.keys() and table.counts()["loaded"] == len(policy.state_dict())
    rng = np.random.default_rng(0)
    pictures, state = rng.uniform(0, 1, (3, 3, 4, 4)), rng.uniform(-1, 3, 3)
    batch = {c: torch.tensor(x[None]).float() for c, x in zip(policy.cameras, pictures)}
    batch |= {OBS_STATE: torch.tensor(state[None]).float(), "task": ["Open the_drawer"], "action": torch.tensor(rng.uniform(-1, 3, (1, 4, 3))).float()}
    ready = policy.prepare(batch)
    prefix, suffix = (ready[k][0].tolist() for k in (LANG_TOKENS, "suffix.tokens"))
    bins = np.digitize((state + 1) / 2 - 1, np.linspace(-1, 1, 257)[:-1]) - 1                      # quantiles −1 and 3
    assert policy.tokenizer.decode(prefix) == f"Task: open the drawer, State: {' '.join(map(str, bins))};\n"
    assert [i for i in suffix if i >= 282] == [571 - i for i in policy.codec.encode((batch["action"] + 1) / 2 - 1)[0]]
    wanted = log_likelihoods(arrays, pictures * 2 - 1, np.array(prefix + suffix), len(prefix))
    with torch.no_grad(): loss, _ = policy(ready)
    close(loss.double(), torch.tensor(-wanted.mean()), ATOL)
    assert np.abs(wanted - log_likelihoods(arrays, pictures[::-1] * 2 - 1, np.array(prefix + suffix), len(prefix))).max() > 1e-3


def test_pi0_fast_sees_absent_cameras_as_black(fast, tmp_path, capsys):
    "By command, with two cameras of three; without a codec the command asks for one."
    words = ["checkpoint", "import", str(fast / "source"), str(tmp_path / "ours"), f"--tokenizer={fast / 'words'}", "--vision_heads=3",
             "--cameras=front,wrist", "--policy.chunk_size=4", "--policy.n_action_steps=2"]
    assert main(words) != 0 and "--fast=physical-intelligence/fast" in capsys.readouterr().err and not (tmp_path / "ours").exists()
    assert main([*words, f"--fast={fast / 'fast'}"]) == 0
    policy, rng = load_policy(tmp_path / "ours"), np.random.default_rng(1)
    assert [c.rsplit(".")[-1] for c in policy.cameras] == ["front", "wrist", "wrist_0_rgb"] and policy.config.empty_cameras == 1
    seen = {f"observation.images.{c}": rng.integers(0, 255, (6, 8, 3), np.uint8) for c in ("front", "wrist")}
    seen |= {OBS_STATE: np.zeros(3, np.float32), "task": "open the drawer"}
    first = policy.act(seen)
    policy.reset()
    assert np.array_equal(first, policy.act({**seen, "observation.images.wrist_0_rgb": np.zeros((6, 8, 3), np.uint8)}))
    policy.reset()
    del seen["observation.images.front"]
    with pytest.raises(UserError, match="front"): policy.act(seen)
    assert main(["checkpoint", "verify", str(tmp_path / "ours")]) == 0


def test_jax_tensors_are_not_lost(tmp_path):
    "An array more is named; half-precision arrays and a folder of params alone are read too."
    tensorstore = pytest.importorskip("tensorstore")
    shutil.copytree(JAX / "pi0", tmp_path / "source")
    tokenizer = assets(tmp_path / "source", 3, 3)
    x = np.arange(6, dtype=np.float32).reshape(2, 3).astype(tensorstore.bfloat16.numpy_dtype)
    kvstore = {"driver": "ocdbt", "base": f"file://{tmp_path}/source/params/", "path": "params.value_head.w.value/"}
    spec = {"driver": "zarr", "kvstore": kvstore}
    tensorstore.open(spec, create=True, dtype=tensorstore.bfloat16, shape=x.shape).result().write(x).result()
    read = open_checkpoint(tmp_path / "source/params").read("value_head/w")
    assert read.dtype == torch.bfloat16 and read.float().flatten().tolist() == [0, 1, 2, 3, 4, 5]
    with pytest.raises(UserError, match="no policy of this kind has: 'value_head/w'"):
        import_openpi(tmp_path / "source", tmp_path / "ours", tokenizer, vision_heads=3)
    assert not (tmp_path / "ours").exists()


def test_import_by_command(tmp_path, capsys):
    "The command tells openpi's folders from others, takes options and fields, and asks for the tokenizer."
    torch_file("pi0", tmp_path / "source")
    words = ["checkpoint", "import", str(tmp_path / "source"), str(tmp_path / "ours")]
    assert main(words) != 0
    assert "--tokenizer=" in capsys.readouterr().err and not (tmp_path / "ours").exists()
    words += [f"--tokenizer={tmp_path / 'source/tokenizer'}", "--vision_heads=4", "--cameras=front,wrist", "--action_dim=7",
              "--policy.chunk_size=6", "--policy.n_action_steps=3"]
    assert main(words) == 0
    assert "106 loaded, 0 tied, 0 new, 1 ignored" in capsys.readouterr().out
    policy = load_policy(tmp_path / "ours")
    assert policy.cameras == ["observation.images.front", "observation.images.wrist"]
    assert (policy.action_dim, policy.config.n_action_steps) == (7, 3)
    assert main(["checkpoint", "verify", str(tmp_path / "ours")]) == 0


@pytest.mark.parametrize("name", ("pi0", "pi05"))
@pytest.mark.parametrize("level", ("vision_model.", ""))
def test_lerobot_folder_plans_like_openpi(name, level, tmp_path):
    "The same weights in a folder of LeRobot: one more prefix, the tied head, settings of the run, an empty camera."
    sizes, data = golden(name)
    tokenizer = torch_file(name, tmp_path / "source")
    import_openpi(tmp_path / "source", tmp_path / "folder", tokenizer, cameras=sizes["cameras"], vision_heads=4,
                  chunk_size=sizes["action_horizon"], n_action_steps=sizes["action_horizon"])
    state = load_file(tmp_path / "source/model.safetensors")
    save_file({f"model.{k}".replace("vision_model.", level): v for k, v in state.items()}, tmp_path / "folder/model.safetensors")
    config = json.loads((tmp_path / "folder/config.json").read_text())
    run = dict(n_obs_steps=1, device="cuda", use_amp=False, push_to_hub=True, repo_id=None, rtc_config=None, empty_cameras=1)
    config["input_features"]["observation.images.empty_camera_0"] = {"type": "VISUAL", "shape": [3, 56, 56]}
    (tmp_path / "folder/config.json").write_text(json.dumps({**config, **run}))
    policy, table, left = read_lerobot(tmp_path / "folder")
    assert set(left) == run.keys() and table.counts()["ignored"] == 1 and len(policy.cameras) == 3
    for policy in policy, load_policy(tmp_path / "folder"):
        close(policy.predict_action_chunk(batch_of(name), data["input"]["noise"]), data["output"]["sample.actions"])


@pytest.mark.parametrize("kind,config", [(Pi0Policy, Pi0Config), (Pi05Policy, Pi05Config)])
def test_small_policies_are_verified(kind, config, tmp_path):
    "A folder of our own small policy, with a convolutional stem instead of a tower, passes the same door."
    spread = {"mean": [0.0] * 4, "std": [1.0] * 4, "min": [-1.0] * 4, "max": [1.0] * 4, "q01": [-1.0] * 4, "q99": [1.0] * 4}
    stats = {OBS_STATE: spread, "action": spread}
    kind.from_data(config.tiny(), ["open the drawer"], None, stats).save_pretrained(tmp_path / "p")
    found = verify_checkpoint(tmp_path / "p")
    assert all(f.ok for f in found) and len(found) == 4, found
