"Simulation: exact seeds, upright pictures, the record path, questions, closed loop, and a pull that is made once."
import collections, os, signal, subprocess, sys, time
from pathlib import Path
from types import SimpleNamespace
import numpy as np
import pytest
from vla_nb.apps import pull as pulling
from vla_nb.control.demonstrate import Recipe, demonstrate, recording_features, splits
from vla_nb.core.files import read_json, read_jsonl
from vla_nb.core.manifest import load_manifest
from vla_nb.core.types import UserError
from vla_nb.envs.metaworld import FPS, TASKS, MetaWorld
from vla_nb.envs.workers import Workers
from vla_nb.evaluation import questions as asking
from vla_nb.evaluation.rollout import FIRST_SEED, rollout, save_clips

ROOT = Path(__file__).resolve().parents[1]
SMALL = Recipe(("button-press-topdown-v3", "drawer-open-v3"), train=1, heldout=1)


def walk(env, seed, steps=25):
    env.reset(seed)
    rng = np.random.default_rng(seed)
    return np.array([env.state() for _ in range(steps) if env.step(rng.uniform(-1, 1, 4)) in (True, False)])


@pytest.mark.parametrize("task", TASKS)
def test_an_episode_is_a_function_of_its_seed(task):
    with MetaWorld(task) as used, MetaWorld(task) as fresh:
        walk(used, 9, 60)
        path = walk(used, 5)
        assert np.array_equal(walk(fresh, 5), path)
        a, b = used.observe(), fresh.observe()
        assert all(np.array_equal(a[k], b[k]) for k in a)
        assert not np.array_equal(walk(fresh, 6), path)


def red_pixels(picture):
    p = picture.astype(int)
    return np.nonzero((p[..., 0] > 90) & (p[..., 1] < 50) & (p[..., 2] < 60))


def test_pictures_are_upright_and_left_is_left():
    with MetaWorld("lever-pull-v3") as env:
        env.reset(0)
        seen = env.observe()
        wood = lambda p: (p[..., 0].astype(int) - p[..., 2] > 15).mean()
        for camera in env.cameras: assert wood(seen[camera][48:]) > 0.5, "the table is below"
        assert wood(seen["corner"][:24]) < 0.1 and wood(seen["top"][:8]) < 0.2, "wall and room are above"
        columns, rows = [], []
        for x, z in ((-0.2, 0.2), (0.2, 0.2), (0.0, 0.12), (0.0, 0.38)):
            env.move_hand([x, 0.55, z])
            seen = env.observe()
            columns.append(np.mean(red_pixels(seen["top"][:60])[1]))
            red, green, blue = np.moveaxis(seen["corner"], -1, 0)
            rows.append(np.nonzero((blue > 180) & (green > 180) & (red < 90))[0].mean())  # the cyan finger
        assert columns[1] > columns[0] + 15, "+x is to the right of the top view"
        assert rows[3] < rows[2] - 10, "a raised hand is higher in the corner view"


class Memo:
    "A writer that keeps everything."
    def __init__(self): self.episodes, self.frames = [], []
    def add_frame(self, frame): self.frames.append(frame)
    def save_episode(self): self.episodes.append(self.frames); self.frames = []


def test_demonstrations_do_not_depend_on_the_number_of_processes():
    runs = []
    for n in (0, 2):
        memo = Memo()
        runs.append((demonstrate(memo, SMALL, workers=n), memo.episodes))
    (log_a, a), (log_b, b) = runs
    assert log_a == log_b and [e["task"] for e in log_a] == [*SMALL.tasks, *SMALL.tasks]
    for x, y in zip(a, b):
        for f, g in zip(x, y, strict=True):
            assert f["task"] == g["task"] and all(np.array_equal(f[k], g[k]) for k in f if k != "task")


def test_record_path_writes_a_dataset(tmp_path):
    from vla_nb.datasets.lerobot import LeRobotDataset
    from vla_nb.datasets.writer import DatasetWriter
    with DatasetWriter(tmp_path / "d", FPS, recording_features(SMALL), robot_type="metaworld_sawyer") as writer:
        log = demonstrate(writer, SMALL, workers=1)
        writer.finalize(splits(SMALL))
    ds = LeRobotDataset(tmp_path / "d")
    assert len(ds) == sum(e["frames"] for e in log) and ds.meta.total_episodes == 4 and ds.meta.fps == FPS
    item = ds[3]
    assert item["task"] == "press the button" and item["observation.images.corner"].shape == (3, 96, 96)
    assert item["observation.state"].shape == (4,) and abs(item["action"]).max() <= 1
    assert read_json(tmp_path / "d/meta/info.json")["splits"] == {"train": "0:2", "test": "2:4"}
    with MetaWorld(log[0]["task"]) as env:  # the first frame is what the camera shows at the episode's seed
        env.reset(log[0]["seed"])
        picture = env.observe()["corner"].astype(float) / 255
        assert abs(ds[0]["observation.images.corner"].numpy().transpose(1, 2, 0) - picture).mean() < 0.02


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    folder = tmp_path_factory.mktemp("questions") / "set"
    asking.build(folder, asking.QuestionRecipe(train=12, dev=4, report=4), workers=2)
    return folder


def test_questions_are_balanced_and_splits_disjoint(asked):
    rows = {split: read_jsonl(asked / f"{split}.jsonl") for split in asking.SPLITS}
    everything = [r for part in rows.values() for r in part]
    assert len({r["id"] for r in everything}) == len(everything) and {r["scene"] for r in everything} == set(TASKS)
    seeds = {split: {r["seed"] for r in part} for split, part in rows.items()}
    for a, b in (("train", "dev"), ("train", "report"), ("dev", "report")): assert not seeds[a] & seeds[b]
    owner = collections.defaultdict(set)
    for r in everything: owner[r["scene"], r["seed"]].add(r["split"])
    assert all(len(s) == 1 for s in owner.values()), "a layout's frames stay in one split"
    for r in everything:
        assert 0 <= r["answer_index"] < len(r["choices"]) == len(set(r["choices"]))
        assert all((asked / p).is_file() for p in r["image_path"])
    # What is scored (development and report) is balanced by construction. Training frames are asked every category that
    # has an answer, so there only the places of the answers are balanced; no answer may dominate.
    for asked_of, slack, most in ((rows["dev"] + rows["report"], 8, 1.5), (rows["train"], 8, 2.0)):
        for category in ("object", "instruction", "fixture", *asking.HAND):
            mine = [r for r in asked_of if r["category"] == category]
            places = collections.Counter(r["answer_index"] for r in mine)
            assert len(places) == len(mine[0]["choices"])
            assert max(places.values()) - min(places.values()) <= slack, (category, places)
            answers = collections.Counter(r["choices"][r["answer_index"]] for r in mine)
            if category in ("object", "instruction"): continue
            assert max(answers.values()) <= most * min(answers.values()), (category, answers)


def test_questions_agree_with_the_simulator(asked):
    jobs = [job for job in asking.layouts(asking.QuestionRecipe(train=12, dev=4, report=4)) if job[1] == "report"]
    for job in jobs[::4]:
        rows, files = asking.ask_layout(job)
        for name, data in files.items(): assert (asked / name).read_bytes() == data, "another process, the same bytes"
        on_disk = {r["id"]: r for r in read_jsonl(asked / "report.jsonl")}
        assert all(on_disk[r["id"]] == r for r in rows)


class Script:
    "Stands in for a policy: the expert's actions from each seed, found again by the position of the hand."
    config = SimpleNamespace(n_action_steps=8)

    def __init__(self, task, seeds):
        self.paths = []
        with MetaWorld(task) as env:
            for seed in seeds:
                env.reset(seed)
                self.paths.append([])
                for _ in range(150):
                    self.paths[-1].append((env.state(), env.expert_action()))
                    env.step(self.paths[-1][-1][1])

    def reset(self): self.t = 0

    def plan(self, batch):
        import torch
        t, self.t = self.t, self.t + 8
        assert batch["observation.images.corner"].shape[1:] == (3, 96, 96) and batch["observation.images.top"].max() <= 1
        states = batch["observation.state"].numpy()
        best = [min(self.paths, key=lambda p: abs(p[t][0] - s).sum()) for s in states]
        if t == 0: best = self.paths  # all hands start alike, in the order of the seeds
        return torch.tensor(np.array([[a for _, a in p[t : t + 8]] for p in best]))


def test_rollout_is_the_same_on_any_number_of_processes(tmp_path):
    seeds = [FIRST_SEED + 3 + i for i in range(5)]
    task = "button-press-topdown-v3"
    script = Script(task, seeds)
    with Workers(2) as pool:
        a = rollout(script, [task], 5, seed=3, workers=pool, record=[(task, 1)])
        b = rollout(script, [task], 5, seed=3, workers=pool)
    c = rollout(script, [task], 5, seed=3, workers=0)
    found = a["task"][task]
    assert found == b["task"][task] == c["task"][task]
    assert found["k"] >= 4 and found["seeds"] == seeds and found["wilson"][0] < found["k"] / 5 <= found["wilson"][1]
    clip = a["clips"][task, 1]
    assert clip["corner"].shape[1:] == (160, 160, 3) and clip["corner"].dtype == np.uint8
    for name in save_clips(a["clips"], tmp_path): assert (tmp_path / name).stat().st_size > 1000


def test_a_policy_that_does_nothing_fails():
    import torch
    still = SimpleNamespace(config=SimpleNamespace(n_action_steps=8), reset=lambda: None,
                            plan=lambda batch: torch.zeros(len(batch["task"]), 8, 4))
    found = rollout(still, ["door-open-v3"], 2, workers=0, max_steps=16)["task"]["door-open-v3"]
    assert found["k"] == 0 and found["steps"] == [16, 16] and found["wilson"][0] == 0


def test_children_go_when_the_parent_is_killed():
    code = ("import os, time; from vla_nb.envs.workers import Workers; p = Workers(1); p.call(0, os.getpid); "
            "print(p.result(0), flush=True); time.sleep(60)")
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    child = int(parent.stdout.readline())
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    for _ in range(100):
        if not Path(f"/proc/{child}").exists() or "Z" in Path(f"/proc/{child}/stat").read_text().split()[2]: return
        time.sleep(0.1)
    pytest.fail("the child outlived its parent")


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    (tmp_path / "data_manifests").mkdir()
    (tmp_path / "settings.ini").write_text("[vla_nb]\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("VLA_NB_ROOT", raising=False)
    monkeypatch.delenv("VLA_NB_DATA_ROOT", raising=False)
    text = (ROOT / "data_manifests/metaworld_demo.toml").read_text()
    head = text.split("\n[expect]")[0]
    expect = "\n[expect]\ntotal_episodes = 2\ntolerance = 0.05\nframes_tolerance = 0.02\n"
    for old, new in (("train = 30", "train = 1"), ("heldout = 6", "heldout = 1"),
                     ('more = {"window-open-v3" = 30}', "more = {}"),
                     ('also = ["metaworld_questions"]', "also = []"),
                     (', "drawer-open-v3", "window-open-v3", "door-open-v3"]', "]")):
        assert old in head
        head = head.replace(old, new)
    (tmp_path / "data_manifests/metaworld_demo.toml").write_text(head + expect)
    return tmp_path


def test_pull_twice(workspace, capsys):
    pulling.main(["metaworld_demo", "--update_manifest"])
    manifest = load_manifest("metaworld_demo")
    assert manifest.expect["total_episodes"] == 2
    assert manifest.source["sha256"] == pulling.source_hash(manifest.source["modules"])
    root = workspace / "data/metaworld_demo"
    receipt = read_json(root / "meta/pull.json")
    before = {p: p.stat().st_mtime_ns for p in root.rglob("*")}
    pulling.main(["metaworld_demo"])
    assert "nothing to do" in capsys.readouterr().out and {p: p.stat().st_mtime_ns for p in root.rglob("*")} == before
    pulling.main(["metaworld_demo", "--force", "--workers=1"])
    again = read_json(root / "meta/pull.json")["files"]
    assert all(again[name] == receipt["files"][name] for name in again if not name.startswith("videos")), "same bytes"
    assert not list((workspace / "data").glob(".*.tmp"))
    victim = root / "meta/info.json"
    victim.write_text(victim.read_text() + " ")
    with pytest.raises(UserError, match="was changed since it was made: 1 of .* first meta/info.json"):
        pulling.main(["metaworld_demo"])


def test_pull_refuses_what_it_cannot_stand_for(workspace):
    path = workspace / "data_manifests/metaworld_demo.toml"
    good = path.read_text()
    path.write_text(good.replace('sha256 = "', 'sha256 = "00'))
    with pytest.raises(UserError, match="changed since its manifest was pinned"): pulling.main(["metaworld_demo"])
    digest = pulling.source_hash(load_manifest("metaworld_demo").source["modules"])
    pinned = pulling.pin(good, digest, {"total_episodes": 3}, {"tolerance": 0.05, "frames_tolerance": 0.02})
    path.write_text(pinned)
    with pytest.raises(UserError, match="otherwise than its manifest expects: total_episodes is 2"):
        pulling.main(["metaworld_demo"])
    assert [p.name for p in (workspace / "data").iterdir() if p.is_dir()] == [], "nothing half-written"
    (workspace / "data/metaworld_demo").mkdir()
    with pytest.raises(UserError, match="was not made by"): pulling.main(["metaworld_demo"])


def test_manifests_pin_the_present_code():
    for name in ("metaworld_demo", "metaworld_questions"):
        source = load_manifest(ROOT / f"data_manifests/{name}.toml").source
        found = pulling.source_hash(source["modules"])
        assert source["sha256"] == found, f"run: vla-nb data pull {name} --update_manifest"


def test_other_manifests_say_how_to_get_them(workspace, capsys):
    text = (ROOT / "data_manifests/koch_700.toml").read_text()
    (workspace / "data_manifests/koch_700.toml").write_text(text)
    with pytest.raises(UserError, match="cannot be fetched by this command"): pulling.main(["koch_700"])
    pulling.main([])
    out = capsys.readouterr().out
    assert "koch_700" in out and "missing" in out and "vla-nb data pull metaworld_demo" in out


def test_a_machine_without_gl_is_told_what_to_install():
    code = "from vla_nb.envs import base\nbase.gl_works = lambda b: 'no ' + b\nbase.choose_gl()"
    env = {k: v for k, v in os.environ.items() if k not in ("MUJOCO_GL", "PYOPENGL_PLATFORM")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=ROOT)
    assert done.returncode and "apt-get install" in done.stderr.splitlines()[-1]
    for name in ("egl", "osmesa"):
        code = ("from vla_nb.envs.metaworld import MetaWorld; e = MetaWorld('door-open-v3'); e.reset(0); "
                "print(e.observe()['top'].mean())")
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT,
                              env={**env, "MUJOCO_GL": name})
        if done.returncode: pytest.skip(f"{name} is not installed: {done.stderr.splitlines()[-1]}")
        assert 40 < float(done.stdout) < 160 and "rror" not in done.stderr, "no noise at exit"
