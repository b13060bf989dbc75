"""A small, consistent study folder made by code: what the report is drawn from, without training anything."""
import json
from math import exp, sin
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

OLD, NEW = ("button-press-topdown-v3", "drawer-open-v3", "window-open-v3"), "door-open-v3"
TEXT = {OLD[0]: "Press the button from the top.", OLD[1]: "Open the drawer.", OLD[2]: "Push the window open.",
        NEW: "Open the door."}
ABSENT = ("where",)
KINDS = {"object": (["button", "drawer", "window", "door"], "Which object is in the picture?"),
         "instruction": (["press the button", "open the drawer", "open the window"], "Which instruction fits the "
                         "scene?"),
         "fixture": (["open", "closed"], "Is the drawer open or closed?"), "side": (["left", "right"],
             "On which side is the hand?"),
         "height": (["high", "low"], "Is the hand high or low?"),
         "where": (["top left", "top right", "bottom left", "bottom right"], "Where is the object?")}
# method: question skill on known / absent categories, old and new success, new and old loss, KL, seconds, λ
METHODS = {
    "theta0": (0.88, 0.8, 0.75, 0.0, 5.2, 2.09, 0.0, 190, None),
    "sft": (0.55, 0.5, 0.1, 0.92, 2.02, 3.22, 1.4, 44, None),
    "craft_kl": (0.85, 0.78, 0.74, 0.85, 2.03, 2.26, 0.06, 71, 0.57),
    "craft_token": (0.8, 0.7, 0.6, 0.8, 2.11, 2.94, 0.35, 66, 0.2),
    "craft_hidden": (0.8, 0.72, 0.35, 0.78, 2.08, 2.57, 0.4, 62, 4.0),
    "replay_10": (0.79, 0.66, 0.42, 0.88, 2.03, 2.4, 0.3, 43, None),
    "replay_30": (0.82, 0.72, 0.72, 0.87, 2.07, 2.24, 0.2, 43, None),
    "wise_0.25": (0.87, 0.78, 0.7, 0.05, 3.9, 2.12, 0.05, 45, None),
    "wise_0.5": (0.84, 0.75, 0.5, 0.3, 2.75, 2.27, 0.2, 45, None),
    "wise_0.75": (0.72, 0.62, 0.2, 0.6, 2.3, 2.6, 0.6, 45, None),
}
TITLES = {"theta0": "θ0", "sft": "SFT"}


def dump(path, obj):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(obj))


def picture(rng, size=64, shift=0):
    "A toy scene: table, a coloured object, a hand."
    im = Image.new("RGB", (size, size), (206, 199, 190)); d = ImageDraw.Draw(im)
    d.rectangle([0, size*.55, size, size], fill=(150, 120, 92))
    x, y = rng.uniform(.2, .7)*size, rng.uniform(.35, .7)*size
    d.rectangle([x, y, x+size*.2, y+size*.16], fill=tuple(int(v) for v in rng.integers(40, 220, 3)))
    hx = (rng.uniform(.1, .8)*size+shift) % size
    d.line([hx, 0, hx, size*.35], fill=(60, 60, 70), width=max(2, size//20))
    d.ellipse([hx-4, size*.33, hx+4, size*.33+8], fill=(200, 60, 50))
    return im


def write_questions(folder, split, n, rng):
    rows, names = [], list(KINDS)
    (folder/"images").mkdir(parents=True, exist_ok=True)
    for i in range(n):
        frames = [f"images/{split}_{i//2:04d}_{camera}.png" for camera in ("corner", "top")]
        if i % 2 == 0:
            for f in frames: picture(rng).save(folder/f)
        kind = names[i % len(names)]
        choices, text = KINDS[kind]
        rows.append(dict(id=f"{split}-{i:04d}", category=kind, image_path=frames, question=text, choices=choices,
                         answer_index=int(rng.integers(len(choices)))))
    (folder/f"{split}.jsonl").write_text("".join(json.dumps(r)+"\n" for r in rows))
    return rows


def mcq_result(rows, skill, skill_absent, rng, easy):
    results = []
    for r, e in zip(rows, easy):
        right = e < (skill_absent if r["category"] in ABSENT else skill)+rng.normal(0, .05)
        scores = -rng.uniform(1.5, 4, len(r["choices"]))
        top = r["answer_index"] if right else (r["answer_index"]+1) % len(r["choices"])
        scores[top] = -rng.uniform(.05, 1.2)
        results.append(dict(id=r["id"], frame=r["image_path"][0], category=r["category"], predicted_index=int(top),
                            log_likelihoods=[float(s) for s in scores], correct=bool(right),
                            margin=float(np.sort(scores)[-1]-np.sort(scores)[-2]), answer_index=r["answer_index"]))
    hits = np.array([r["correct"] for r in results]); means = [rng.choice(hits, len(hits)).mean() for _ in range(200)]
    return dict(accuracy=float(hits.mean()), avg_margin=1.0, correct_count=int(hits.sum()), total_count=len(hits),
                n_failed=0,
                accuracy_mean=float(hits.mean()), avg_margin_gold=.5, ci95=[float(q) for q in np.quantile(means,
                    [.025, .975])],
                chance=float(np.mean([1/len(r["choices"]) for r in rows])), results=results)


def metrics(steps, start, end, kl, lam, rng):
    for i in range(steps):
        p = i/steps
        row = dict(step=i+1, loss=end+(start-end)*exp(-6*p)+.05*rng.normal(), lr=5e-4*(1-p), grad_norm=1+
                   .1*rng.random(), update_s=.2, data_s=.01)
        if lam is not None:
            c = float(np.clip(rng.normal(.02, .06), -1, 1))
            row |= {"L_ret": max(0., kl*(1-exp(-8*p))*1.1+.01*rng.normal()), "epsilon": kl, "lambda": lam*(1+
                .4*sin(6*p))*(1-exp(-9*p))+.05,
                    "cos": c, "dot": c*.3, "conflict": c < -.1, "mode": "token_kl"}
            row |= dict(lambda_before=row["lambda"], lambda_eff=row["lambda"]+max(0, -c), violation=row["L_ret"] > kl,
                        norm_task=1., norm_retain=.3)
        yield row


def clip(path, rng, frames=36):
    import av
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as f:
        s = f.add_stream("libx264", rate=20, options={"crf": "30", "preset": "veryfast"})
        s.width, s.height, s.pix_fmt = 96, 96, "yuv420p"
        state = rng.integers(1 << 30)
        for i in range(frames):
            image = picture(np.random.default_rng(state), 96, shift=i)
            for p in s.encode(av.VideoFrame.from_image(image)): f.mux(p)
        for p in s.encode(): f.mux(p)


def write_dataset(root, rng):
    from vla_nb.datasets.writer import DatasetWriter
    cameras = {f"observation.images.{c}": dict(dtype="video", shape=(96, 96, 3), names=["height", "width",
        "channels"]) for c in ("corner", "top")}
    vector = lambda names: dict(dtype="float32", shape=(4,), names=names)
    features = {**cameras, "observation.state": vector(["x", "y", "z", "gripper"]), "action": vector(["dx", "dy",
        "dz", "grip"])}
    with DatasetWriter(root, fps=80, features=features, robot_type="fake") as w:
        for t in (*OLD, NEW):
            for _ in range(2):
                seed, n = int(rng.integers(1 << 30)), 24
                for i in range(n):
                    a = np.array([sin(i/4), sin(i/6+1), exp(-i/9), float(i > n/2)], np.float32)
                    images = {c: np.asarray(picture(np.random.default_rng(seed), 96, shift=i)) for c in cameras}
                    w.add_frame({**images, "observation.state": .1*a, "action": a, "task": TEXT[t]})
                w.save_episode()
        w.finalize()


def stage_rows(done):
    rows = [dict(name="data", title="demonstrations and questions", what="record scripted experts in the simulator",
                 expected_s=180)]
    for m in METHODS:
        rows += [dict(name=m, title=TITLES.get(m, m), what=f"train {m}", expected_s=60),
                 dict(name=f"eval_{m}", title=f"evaluate {m}", what="questions, losses, rollouts", expected_s=30)]
    rows.append(dict(name="clips", title="clips", what="film one old-task start state", expected_s=10))
    for r in rows:
        m = r["name"].removeprefix("eval_")
        finished = m in done or r["name"] == "data" or (r["name"] == "clips" and len(done) == len(METHODS))
        r |= dict(seconds=r["expected_s"]*.9 if finished else None, command=f"vla-nb experiment run demo --seed=0 "
                  f"--only={r['name']}")
    return rows


def write_method(run, name, rows, rng, easy, n, steps):
    skill, absent, old, new, new_loss, old_loss, kl, seconds, lam = METHODS[name]
    task = lambda k: dict(successes=[1]*k+[0]*(n-k), k=k, n=n, wilson=[0., 1.], seeds=list(range(n)))
    success = {t: task(int(rng.binomial(n, old))) for t in OLD} | {NEW: task(int(rng.binomial(n, new)))}
    per_task = {t: dict(loss_sum=1000*x, count=1000, loss=x) for t, x in ((t, (new_loss if t == NEW else old_loss)+
        .02*rng.normal()) for t in (*OLD, NEW))}
    dump(run/"eval/mcq.json", mcq_result(rows, skill, absent, rng, easy)); dump(run/"eval/rollout.json",
        dict(task=success, seconds=9.))
    dump(run/"eval/offline.json", dict(per_task=per_task, old=old_loss, new=new_loss))
    dump(run/"eval/retention.json", dict(token_ce=kl/2, token_kl=kl, hidden=kl/3))
    summary = dict(steps=steps, train_seconds=seconds+rng.random(), peak_bytes=int(3e8*(1.3 if lam else 1)),
                   final_loss=new_loss, hooks={})
    dump(run/"summary.json", summary)
    (run/"checkpoints/000300/pretrained_model").mkdir(parents=True, exist_ok=True)
    (run/"checkpoints/000300/pretrained_model/model.safetensors").write_bytes(b"\0"*4_200)
    (run/"checkpoints/last").symlink_to("000300")
    if name.startswith("wise"): return
    mode = {"craft_kl": "token_kl", "craft_token": "token_ce", "craft_hidden": "hidden"}.get(name)
    craft = dict(enabled=bool(lam))
    if lam: craft |= dict(anchor_cache_dir=str(run.parent/"anchors_token"), retention_mode=mode, initial_lambda=1.,
                          lambda_max=10.)
    dump(run/"params.json", dict(seed=0, config=dict(steps=steps, craft=craft)))
    (run/"metrics.jsonl").write_text("".join(json.dumps(r)+"\n" for r in metrics(steps, 6. if name != "sft" else 5.2,
        new_loss, kl, lam, rng)))


def make_study(root,                   # folder to fill
               seed=0,                 # seeds every made-up number
               done=tuple(METHODS),    # names of the methods that are measured already
               questions=120,          # report questions, two to a frame
               episodes=20,            # rollouts per task
               steps=300,              # training steps
               dataset=True,           # record a tiny LeRobot dataset too
               clips=True):            # and three clips
    "Write a whole study below `root`; returns its folder."
    root, rng = Path(root), np.random.default_rng(seed)
    study, data = root/"outputs"/"demo"/f"seed{seed}", root/"data"
    q = data/"metaworld_questions"
    rows = {s: write_questions(q, s, n, np.random.default_rng(i)) for i, (s, n) in enumerate(dict(train=12, dev=12,
        report=questions).items())}
    easy = np.random.default_rng(7).random(questions)
    for name in done: write_method(study/name, name, rows["report"], rng, easy, episodes, steps)
    anchor_samples = [dict(kind="frame", index=i) for i in range(12)]+[dict(kind="question", id=r["id"])
        for r in rows["train"] if r["category"] not in ABSENT]
    for a in ("anchors_token", "anchors_hidden", "anchors_heldout"):
        dump(study/a/"manifest.json", dict(schema_version=2, mode="token", samples=anchor_samples))
    if dataset and not (data/"metaworld_demo").exists(): write_dataset(data/"metaworld_demo", np.random.default_rng(3))
    if clips and len(done) == len(METHODS):
        for m in ("theta0", "sft", "craft"): clip(study/"clips"/f"{m}.mp4", np.random.default_rng(5))
        dump(study/"clips/clips.json", dict(task=OLD[1], seed=seed, episode=3, success=dict(theta0=True, sft=False,
            craft=True), craft="craft_kl"))
    stages = stage_rows(done)
    dump(study/"study.json", dict(name="demo", profile="tiny", seed=seed, methods=list(METHODS), old_tasks=list(OLD),
                                  new_task=NEW,
        questions={s: str(q/f"{s}.jsonl") for s in ("train", "dev", "report")}, dataset=str(data/"metaworld_demo"),
        absent_categories=list(ABSENT), stages=stages, revision="0123abc", versions=dict(python="3.11", torch="2.13.0"),
        settings=dict(steps=steps, batch_size=48, lr=5e-4, base_steps=1400, anchors=1200, anchor_batch_size=24,
                      episodes=episodes),
        machine=dict(cpu="a test", cores=2), threads=2, seconds=round(sum(s["seconds"] or 0 for s in stages), 1)))
    return study
