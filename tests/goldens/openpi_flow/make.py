"""Select from numbers that openpi's own code computed what the tests of pi0 and pi0.5 compare with.

    python make.py SOURCE

SOURCE holds the folder `openpi_preprocess` with prompts.json, and the folders `openpi_pi0` and `openpi_pi05`, each with model, inputs and outputs (safetensors), config.json and
grad_norms.json. They were made by `PI0Pytorch` of Physical-Intelligence/openpi@15a9616a00943ada6c20a0f158e3adb39df2ccac with
transformers 4.53.2 (its files replaced by openpi's, as its instructions demand) and torch 2.13.0 on one CPU thread in float32: geometry
shrunken (see config.json), every parameter overwritten with seeded normal noise, augmentation and compilation off.

Left out, to stay small: weights that no number depends on (the tests fill them with zeros or noise), embeddings of ids that do not
occur, pictures that are masked in every row, large gradients (their norms are kept).
"""
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

HERE = Path(__file__).parent
OUTPUTS = ("prefix.cache_k", "suffix.embs", "suffix.time_emb", "suffix.adarms_cond", "train.suffix_out", "train.v_t", "train.loss",
           "train.loss_mean", "sample.actions", "sample4.actions", "sample.time")
EMBED = "paligemma_with_expert.paligemma.lm_head.weight"


def select(source, name):
    "One file with weights, inputs and outputs."
    model, inputs, outputs = (load_file(source / name / f"{n}.safetensors") for n in ("model", "inputs", "outputs"))
    config = json.loads((source / name / "config.json").read_text())
    dead = set(config["dead_for_loss_by_gradient"]) | {"paligemma_with_expert.gemma_expert.lm_head.weight"}
    out = {f"weight/{k}": v for k, v in model.items() if k not in dead and k != EMBED}
    ids = inputs["tokens"].unique()
    out["embedding/ids"], out["embedding/rows"] = ids, model[EMBED][ids]
    for k, v in inputs.items():
        camera = k.removeprefix("image.")
        if k.startswith("image.") and not inputs[f"image_mask.{camera}"].any(): continue
        out[f"input/{k}"] = v
    out |= {f"output/{k}": outputs[k] for k in OUTPUTS if k in outputs}
    out |= {f"output/{k}": v for k, v in outputs.items() if k.startswith("grad.") and v.numel() < 5000}
    norms = json.loads((source / name / "grad_norms.json").read_text())["norms"]
    config = {k: v for k, v in config.items() if k in ("source", "transformers", "torch", "text", "expert", "vision", "vocab_size",
              "action_dim", "action_horizon", "cameras", "num_steps")}
    config["absent"] = {k: list(v.shape) for k, v in model.items() if k in dead or k == EMBED}
    config["grad_norms"] = norms
    save_file({k: v.contiguous() for k, v in out.items()}, HERE / f"{name[7:]}.safetensors")
    (HERE / f"{name[7:]}.json").write_text(json.dumps(config, indent=1) + "\n")


def prompts(source):
    "The texts that openpi hands to its tokenizer."
    cases = json.loads((source / "openpi_preprocess/prompts.json").read_text())["cases"]
    rows = [{k: c[k] for k in ("text", "state", "encoded_pieces")} for c in cases]
    (HERE / "prompts.json").write_text("[" + ",\n ".join(json.dumps(r) for r in rows) + "]\n")


if __name__ == "__main__":
    prompts(Path(sys.argv[1]))
    for folder in ("openpi_pi0", "openpi_pi05"): select(Path(sys.argv[1]), folder)
