"""Write a very small pi0, pi0.5 and pi0-FAST with orbax, in the tree that openpi's JAX models have.

    python -m venv ENV && ENV/bin/pip install orbax-checkpoint==0.12.8 jax==0.10.2 && ENV/bin/python make.py

Every array is drawn from a generator seeded with its own path, so that the test draws the same numbers and looks for them in the
converted policy. Names and axes: Physical-Intelligence/openpi@15a9616a00943ada6c20a0f158e3adb39df2ccac, src/openpi/models/.
"""
import shutil
import sys
import zlib
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
LAYERS, HEADS, HEAD, VLAYERS, VHEADS, VHEAD, VMLP, VOCAB, ACTION = 2, 2, 4, 2, 3, 2, 5, 11, 3
FAST_VOCAB = 700
VWIDTH, WIDTHS, MLPS = VHEADS * VHEAD, (8, 6), (10, 7)


def shapes(adaptive):
    "Path of every array → shape."
    out = {"action_in_proj/kernel": (ACTION, WIDTHS[1]), "action_out_proj/kernel": (WIDTHS[1], ACTION)}
    if adaptive: out |= {f"time_mlp_{k}/kernel": (WIDTHS[1], WIDTHS[1]) for k in ("in", "out")}
    else: out |= {"state_proj/kernel": (ACTION, WIDTHS[1]), "action_time_mlp_in/kernel": (2 * WIDTHS[1], WIDTHS[1]),
                  "action_time_mlp_out/kernel": (WIDTHS[1], WIDTHS[1])}
    out |= {k.replace("kernel", "bias"): v[-1:] for k, v in out.items()}
    img, block = "PaliGemma/img/", "PaliGemma/img/Transformer/encoderblock/"
    out |= {img + "embedding/kernel": (2, 2, 3, VWIDTH), img + "embedding/bias": (VWIDTH,), img + "pos_embedding": (1, 4, VWIDTH),
            img + "head/kernel": (VWIDTH, WIDTHS[0]), img + "head/bias": (WIDTHS[0],)}
    out |= {img + f"Transformer/encoder_norm/{k}": (VWIDTH,) for k in ("scale", "bias")}
    out |= {block + f"LayerNorm_{i}/{k}": (VLAYERS, VWIDTH) for i in (0, 1) for k in ("scale", "bias")}
    for i, (a, b) in enumerate(((VWIDTH, VMLP), (VMLP, VWIDTH))):
        out |= {block + f"MlpBlock_0/Dense_{i}/kernel": (VLAYERS, a, b), block + f"MlpBlock_0/Dense_{i}/bias": (VLAYERS, b)}
    att = block + "MultiHeadDotProductAttention_0/"
    for k in ("query", "key", "value"):
        out |= {f"{att}{k}/kernel": (VLAYERS, VWIDTH, VHEADS, VHEAD), f"{att}{k}/bias": (VLAYERS, VHEADS, VHEAD)}
    out |= {f"{att}out/kernel": (VLAYERS, VHEADS, VHEAD, VWIDTH), f"{att}out/bias": (VLAYERS, VWIDTH)}
    out["PaliGemma/llm/embedder/input_embedding"] = (VOCAB, WIDTHS[0])
    for tail, width, mlp in zip(("", "_1"), WIDTHS, MLPS):
        a = "PaliGemma/llm/layers/"
        out |= {f"{a}attn/q_einsum{tail}/w": (LAYERS, HEADS, width, HEAD), f"{a}attn/kv_einsum{tail}/w": (LAYERS, 2, 1, width, HEAD),
                f"{a}attn/attn_vec_einsum{tail}/w": (LAYERS, HEADS, HEAD, width), f"{a}mlp{tail}/gating_einsum": (LAYERS, 2, width, mlp),
                f"{a}mlp{tail}/linear": (LAYERS, mlp, width)}
        for norm, lead in ((f"{a}pre_attention_norm{tail}", (LAYERS,)), (f"{a}pre_ffw_norm{tail}", (LAYERS,)),
                           (f"PaliGemma/llm/final_norm{tail}", ())):
            if adaptive and tail: out |= {f"{norm}/Dense_0/kernel": (*lead, width, 3 * width), f"{norm}/Dense_0/bias": (*lead, 3 * width)}
            else: out[f"{norm}/scale"] = (*lead, width)
    return out


def fast_shapes():
    "The same of a pi0-FAST: PaliGemma alone, with ids for actions behind the words."
    out = {k: v for k, v in shapes(False).items() if k.startswith("PaliGemma/img/") or k.startswith("PaliGemma/llm/") and "_1/" not in f"{k}/"}
    return out | {"PaliGemma/llm/embedder/input_embedding": (FAST_VOCAB, WIDTHS[0])}


def value(path, shape): return np.random.default_rng(zlib.crc32(path.encode())).normal(0, 0.3, shape).astype(np.float32)


def tree(shapes):
    "Nested as openpi saves it during training: every leaf below `value`."
    out = {}
    for path, shape in shapes.items():
        node = out
        for part in path.split("/"): node = node.setdefault(part, {})
        node["value"] = value(path, shape)
    return {"params": out}


if __name__ == "__main__":
    import orbax.checkpoint as ocp
    for name, wanted in (("pi0", shapes(False)), ("pi05", shapes(True)), ("pi0_fast", fast_shapes())):
        folder = (HERE if len(sys.argv) < 2 else Path(sys.argv[1])) / name / "params"
        shutil.rmtree(folder, ignore_errors=True)
        ocp.PyTreeCheckpointer().save(folder.resolve(), tree(wanted))
        (folder / "commit_success.txt").unlink()        # names a folder of this machine
