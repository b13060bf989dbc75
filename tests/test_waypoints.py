"Waypoints: extraction proven optimal, the counts of the published sets, the samples of the original; action chunks."
import json
import random
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from vla_nb.apps import cli
from vla_nb.core.types import UserError
from vla_nb.datasets.chunk_stats import chunk_stats
from vla_nb.datasets.fake import fake_dataset
from vla_nb.datasets.lerobot import DatasetMetadata, LeRobotDataset
from vla_nb.datasets.rlds import RLDSDataset
from vla_nb.datasets.rlds_command import schema_problems
from vla_nb.datasets.rlds_write import RLDSWriter, image_feature, rlds_features, tensor_feature, text_feature
from vla_nb.datasets.waypoint_rlds import RLDSEpisodes
from vla_nb.datasets.waypoint_samples import (
    PairDataset, WindowDataset, pair_index, pair_sample, window_index, window_sample)
from vla_nb.datasets.waypoints import (
    EpisodeWaypoints, Waypoints, check_source, extract, gripper_events, read_waypoints, write_waypoints)

GOLDEN = Path(__file__).parent / "goldens/waypoint_samples"


# ---------------------------------------------------------------- extraction

def segment_error(x, s, e, measure):
    "Worst distance of the steps between two waypoints, step by step."
    worst, line = 0.0, x[e] - x[s]
    for i in range(s + 1, e):
        if measure == "time": t = (i - s) / (e - s)
        else: t = min(max(float((x[i] - x[s]) @ line) / float(line @ line), 0), 1) if line.any() else 0
        worst = max(worst, float(np.sqrt(((x[s] + t * line - x[i]) ** 2).sum())))
    return worst


def every_solution(x, threshold, max_gap, events, measure):
    "All sets of waypoints that are allowed, with their worst errors."
    n = len(x)
    errors = {(s, e): segment_error(x, s, e, measure) for s in range(n) for e in range(s + 1, min(s + max_gap, n - 1) + 1)}
    for k in range(n - 1):
        for inner in combinations(range(1, n - 1), k):
            points = (0, *inner, n - 1)
            parts = [errors.get(p, np.inf) for p in zip(points, points[1:])]
            if set(events) <= set(points) and max(parts) <= threshold: yield points, parts


@pytest.mark.parametrize("measure", ["time", "path"])
@pytest.mark.parametrize("seed", range(25))
def test_fewest_waypoints_against_brute_force(seed, measure):
    "No set of waypoints is smaller, and among the smallest none has a smaller sum of squared errors."
    rng = np.random.default_rng(seed)
    n, max_gap = int(rng.integers(2, 10)), int(rng.integers(1, 9))
    x = rng.normal(size=(n, int(rng.integers(1, 4)))).cumsum(0) if seed % 5 else rng.integers(0, 3, (n, 1)).astype(float)
    threshold, events = float(rng.uniform(0.05, 2)), sorted(rng.choice(n, int(rng.integers(0, 3)) % n, replace=False).tolist())
    found = extract(x, threshold, max_gap, events, measure=measure).tolist()
    solutions = dict(every_solution(x, threshold, max_gap, events, measure))
    assert tuple(found) in solutions
    fewest = [p for p in solutions if len(p) == min(map(len, solutions))]
    assert len(found) == len(fewest[0])
    squares = {p: sum(e ** 2 for e in solutions[p]) for p in fewest}
    assert squares[tuple(found)] <= min(squares.values()) + 1e-9
    greedy = tuple(extract(x, threshold, max_gap, events, "greedy", measure).tolist())
    assert greedy in solutions and len(greedy) >= len(found)


def test_brute_force_would_notice():
    "The greedy answer is not always the best, so the comparison above can fail."
    rng, worse = np.random.default_rng(0), 0
    for _ in range(200):
        x = rng.normal(size=(12, 1)).cumsum(0)
        worse += len(extract(x, 1, method="greedy")) > len(extract(x, 1))
    assert worse > 5


def test_long_trajectory_is_reconstructed():
    rng = np.random.default_rng(1)
    x = rng.normal(0, 0.01, (700, 3)).cumsum(0).cumsum(0) / 10
    kept = extract(x, 0.005, max_gap=1000)
    line = np.stack([np.interp(np.arange(700), kept, x[kept, d]) for d in range(3)], 1)
    assert np.linalg.norm(line - x, axis=1).max() <= 0.005 and len(kept) < 120
    assert len(extract(x, 0.005, max_gap=8)) > len(kept) and np.diff(extract(x, 0.005, max_gap=8)).max() <= 8


def test_one_step_and_events():
    assert extract([[1., 2.]], 0.1).tolist() == [0] and extract([[1.], [2.]], 0.1).tolist() == [0, 1]
    still = np.zeros((9, 2))
    assert extract(still, 0.1, events=gripper_events([0, 0, 0, 1, 1, 1, 0, 0, 0])).tolist() == [0, 3, 6, 8]
    for bad in ([9], [-1]):
        with pytest.raises(UserError, match="outside the 9 steps"): extract(still, 0.1, events=bad)
    with pytest.raises(UserError, match="step 4 holds NaN"): extract(np.where(np.arange(9)[:, None] == 4, np.nan, still), 1)


# ---------------------------------------------------------------- counts

def zigzag(gaps, rng):
    "A hand that turns sharply at known steps: [T, 3] in metres."
    turns = rng.uniform(0.02, 0.05, (len(gaps), 3)) * (-1.0) ** np.arange(len(gaps))[:, None]
    speed = np.repeat(turns, gaps, 0)
    return np.concatenate([np.zeros((1, 3)), speed.cumsum(0)])


@pytest.fixture(scope="module")
def libero_object():
    "A set with the counts of libero_object: 454 episodes, 66 984 steps, 8 863 waypoints at known places."
    rng = np.random.default_rng(7)
    pairs = np.full(454, 18) + (np.arange(454) < 8409 - 454 * 18)
    gaps = np.full(8409, 7) + rng.multinomial(66_530 - 7 * 8409, np.full(8409, 1 / 8409))
    assert gaps.max() <= 32
    parts = np.split(gaps, pairs.cumsum()[:-1])
    return parts, [zigzag(p, rng) for p in parts]


def test_counts_of_libero_object(libero_object, tmp_path):
    "Extraction finds the known turns, and the samples number as in the published set."
    parts, states = libero_object
    found = Waypoints([EpisodeWaypoints(i, len(x), extract(x, 0.006)) for i, x in enumerate(states)], {"err_threshold": 0.006})
    for e, gaps in zip(found.episodes, parts): assert e.durations.tolist() == gaps.tolist()
    assert found.totals == {"total_episodes": 454, "total_src_steps": 66_984, "total_wp_steps": 8_863}
    pairs = pair_index(found)
    assert (len(pairs.start), pairs.skipped, int((pairs.end - pairs.start).sum())) == (8_409, 0, 66_530)
    assert len(window_index(found).first) == 8_409 and round((pairs.end - pairs.start).mean(), 1) == 7.9
    write_waypoints(tmp_path / "w.json", found)
    again = read_waypoints(tmp_path / "w.json")
    assert again.totals == found.totals and "13.2%" in again._repr_markdown_()
    assert sum(len(range(0, n - 1, 4)) for n in (len(e.waypoint_indices) for e in again.episodes)) == len(window_index(again, 4).first)


def test_long_gaps_make_windows_but_no_pairs():
    "As in the union of the four LIBERO suites: two gaps of more than 32 steps, two windows more than pairs."
    episodes = [EpisodeWaypoints(0, 100, [0, 40, 50, 99]), EpisodeWaypoints(1, 33, [0, 32]), EpisodeWaypoints(2, 1, [0])]
    both = Waypoints(episodes, {})
    assert pair_index(both).start.tolist() == [40, 0] and pair_index(both).skipped == 2
    assert len(window_index(both).first) == len(pair_index(both).start) + 2 == 4


# ---------------------------------------------------------------- samples of the original

@pytest.fixture(scope="module")
def golden():
    "Recorded samples, and the same episodes in normalised units."
    told, arrays = json.loads((GOLDEN / "samples.json").read_text()), load_file(GOLDEN / "samples.safetensors")
    def q99(x, stats): return np.clip(2 * (x - stats["q01"]) / (np.subtract(stats["q99"], stats["q01"]) + 1e-8) - 1, -1, 1)
    episodes = []
    for i in range(2):
        raw = arrays[f"episode{i}.action"].astype(float)
        action = q99(raw, told["statistics"]["action"])
        action[:, 6] = 1 - raw[:, 6].clip(0, 1)
        episodes.append({"action": action, "state": q99(arrays[f"episode{i}.state"].astype(float), told["statistics"]["proprio"]),
                         "task": told["instructions"][i], "base_0_rgb": arrays[f"episode{i}.image"],
                         "left_wrist_0_rgb": arrays[f"episode{i}.wrist_image"]})
    rows = [EpisodeWaypoints(**w) for w in told["waypoint_indices"]]
    return told, arrays, episodes, Waypoints(rows, {})


def test_pairs_equal_those_of_the_original(golden):
    "Every array of every sample, in order."
    told, arrays, episodes, waypoints = golden
    cameras = ("base_0_rgb", "left_wrist_0_rgb")
    ours = PairDataset(episodes, waypoints, cameras, told["max_duration"], told["horizon_steps"], 12)
    assert len(ours) == told["ae_total_pairs"] and [[s["task"], s["duration"]] for s in ours] == told["ae_samples"]
    for key in ("actions", "start_proprio", "end_proprio", "duration", "action_pad_mask", "action_dim_mask", "proprio_dim_mask"):
        made, want = np.stack([s[key] for s in ours]), arrays[f"ae.{key}"]
        if key in ("actions", "action_dim_mask"): made = made[..., :told["model_action_dim"]]
        assert made.dtype == want.dtype
        np.testing.assert_allclose(made, want, atol=2e-6, err_msg=key)
    for c in cameras: np.testing.assert_array_equal(np.stack([s[c] for s in ours]), arrays[f"ae.image.{c}"])


@pytest.mark.parametrize("stride", [1, 2])
def test_windows_equal_those_of_the_original(golden, stride):
    "The tokens of every window say our targets, and their loss mask is ours."
    told, arrays, episodes, waypoints = golden
    ours = WindowDataset(episodes, waypoints, count=told["vlm"]["num_waypoints"], stride=stride)
    tokens, learnt = arrays[f"vlm_stride{stride}.tokens"], arrays[f"vlm_stride{stride}.loss_mask"]
    assert len(ours) == len(tokens) == told["vlm"][f"vlm stride {stride} windows"]
    edges = np.linspace(-1, 1, 257)[1:-1]
    for i, sample in enumerate(ours):
        at = np.flatnonzero(tokens[i] == 256733)[:, None]
        bins, durations = 257023 - tokens[i][at + np.arange(1, 9)], 256767 - tokens[i][at[:, 0] + 10]
        real = sample["proprio_mask"]
        np.testing.assert_array_equal(np.digitize(sample["proprio_targets"], edges)[real], bins[real])
        np.testing.assert_array_equal(durations, sample["duration_targets"])
        np.testing.assert_array_equal(learnt[i][at + np.arange(1, 9)], np.repeat(real[:, None], 8, 1))
        np.testing.assert_array_equal(learnt[i][at[:, 0] + 10], sample["duration_mask"])
        assert learnt[i].sum() == 8 * real.sum() + sample["duration_mask"].sum()


def test_duration_is_counted_once():
    "The label of target j starts at waypoint i+j, not at the start of the episode (an error of early versions)."
    steps, proprio = np.array([0, 3, 4, 9, 12]), np.arange(5.0)[:, None]
    sample = window_sample(proprio, steps, 1, 3)
    assert sample["duration_targets"].tolist() == [1, 5, 3] and sample["proprio_targets"][:, 0].tolist() == [2, 3, 4]
    pair = pair_sample(np.arange(13.0)[:, None], np.arange(13.0)[:, None], 4, 9, horizon=6, width=1)
    assert pair["actions"][:, 0].tolist() == [4, 5, 6, 7, 8, 0] and pair["action_pad_mask"].tolist() == [False] * 5 + [True]


# ---------------------------------------------------------------- the file

GOOD = {"config": {"total_episodes": 2, "err_threshold": 0.006, "wp_dir": "x"},
        "episodes": [{"src_ep_idx": 0, "original_steps": 9, "waypoint_indices": [0, 4, 8]},
                     {"src_ep_idx": 1, "original_steps": 5, "waypoint_indices": [0, 4]}]}


def test_file_of_the_original_is_read(tmp_path):
    (tmp_path / "w.json").write_text(json.dumps(GOOD, indent=2))
    found = read_waypoints(tmp_path / "w.json")
    assert [e.waypoint_indices.tolist() for e in found.episodes] == [[0, 4, 8], [0, 4]] and found.config["wp_dir"] == "x"
    write_waypoints(tmp_path / "again.json", found)
    again = json.loads((tmp_path / "again.json").read_text())
    assert again["episodes"] == GOOD["episodes"] and again["config"].items() >= GOOD["config"].items()


@pytest.mark.parametrize("row,says", [
    ({"waypoint_indices": [0, 5, 4, 8]}, "episode 0: waypoint 4 comes after 5"), ({"waypoint_indices": [1, 8]}, "run from 1 to 8"),
    ({"waypoint_indices": [0, 9]}, "steps from 0 to 8"), ({"waypoint_indices": [0, 2.5, 8]}, "whole numbers"),
    ({"waypoint_indices": []}, "whole numbers"), ({"waypoint_indices": None}, "whole numbers"), ({"src_ep_idx": 1}, "episode 1 is there twice"),
    ({"original_steps": "many"}, "is no list of waypoints"),
])
def test_bad_file(tmp_path, row, says):
    "The file, the episode and what is wrong with it."
    (tmp_path / "w.json").write_text(json.dumps(GOOD | {"episodes": [GOOD["episodes"][0] | row, GOOD["episodes"][1]]}))
    with pytest.raises(UserError, match=says) as caught: read_waypoints(tmp_path / "w.json")
    assert str(tmp_path / "w.json") in str(caught.value)


def test_mutated_files_give_sentences(tmp_path):
    "Two thousand damaged files: read, or refused with one sentence."
    random.seed(3)
    text, refused = json.dumps(GOOD), 0
    for _ in range(2000):
        cut = list(text)
        for _ in range(random.randint(1, 4)):
            i = random.randrange(len(cut))
            cut[i:i + random.randint(0, 3)] = random.choice(['"', "}", "[", ",", "-", "1e9", "null", "", "true", "{"])
        (tmp_path / "w.json").write_text("".join(cut))
        try: read_waypoints(tmp_path / "w.json")
        except UserError: refused += 1
    assert refused > 1000


def test_waypoints_of_another_order_are_refused():
    waypoints = Waypoints([EpisodeWaypoints(0, 9, [0, 8]), EpisodeWaypoints(1, 5, [0, 4])], {})
    check_source(waypoints, [9, 5])
    with pytest.raises(UserError, match="the same lengths exist in another order"): check_source(waypoints, [5, 9])
    with pytest.raises(UserError, match=r"has 6 steps in the dataset, .* made from 5; extract"): check_source(waypoints, [9, 6])


# ---------------------------------------------------------------- command

def test_extract_by_command(tmp_path, capsys):
    "From a dataset to the file, in two processes, and again to the same file."
    data = fake_dataset(tmp_path / "data", episodes=3, frames=50, dims=4)
    words = ["waypoints", "extract", str(data), "--threshold=0.05", "--dims=0,1", "--gripper_dims=3"]
    assert cli.main([*words, f"--output={tmp_path / 'w.json'}"]) == 0 and "3 episodes, 150 steps" in capsys.readouterr().out
    found = read_waypoints(tmp_path / "w.json")
    check_source(found, [e["length"] for e in DatasetMetadata(data).episodes])
    assert found.config["dims"] == [0, 1] and found.totals["total_wp_steps"] < 150
    assert cli.main([*words, f"--output={tmp_path / 'v.json'}", "--workers=0"]) == 0
    assert (tmp_path / "v.json").read_text() == (tmp_path / "w.json").read_text()
    assert cli.main([*words, f"--output={tmp_path / 'u.json'}", "--state=joints"]) == 2
    assert "has no column 'joints'; it has observation.state, action" in capsys.readouterr().err
    assert not (tmp_path / "u.json").exists()


def test_page_by_command(tmp_path, capsys):
    "A page without scripts or outside addresses; files that do not belong together are refused."
    data, file, page = fake_dataset(tmp_path / "data", episodes=3, frames=50), tmp_path / "w.json", tmp_path / "page.html"
    assert cli.main(["waypoints", "extract", str(data), f"--output={file}", "--gripper=", "--threshold=0.05", "--workers=0"]) == 0
    words = ["waypoints", "page", str(data), f"--waypoints={file}", f"--output={page}"]
    assert cli.main([*words, "--episodes=0,2"]) == 0
    text = page.read_text()
    assert text.count("<svg") == 3 and "episode 2" in text and "<script" not in text and "src=" not in text
    assert not [part for part in text.split("http")[1:] if not part.startswith("://www.w3.org/")]
    short = fake_dataset(tmp_path / "short", episodes=3, frames=40)
    assert cli.main(["waypoints", "page", str(short), *words[3:]]) == 2
    assert "episode 0 has 40 steps" in capsys.readouterr().err


# ---------------------------------------------------------------- RLDS

@pytest.fixture(scope="module")
def rlds(tmp_path_factory):
    "Forty episodes in two shards, so that tfds's order is not the files'; every turn is a known waypoint."
    rng, root = np.random.default_rng(5), tmp_path_factory.mktemp("rlds") / "made/1.0.0"
    observation = {"image": image_feature((16, 24, 3)), "state": tensor_feature("float32", (8,))}
    features = rlds_features({"observation": observation, "action": tensor_feature("float32", (7,)),
                              "language_instruction": text_feature(), "is_last": tensor_feature("bool")},
                             episode_metadata={"file_path": text_feature()})
    gaps = [rng.integers(1, 12, rng.integers(2, 6)) for _ in range(40)]
    with RLDSWriter(root, features, "made", shards=2) as writer:
        for e, g in enumerate(gaps):
            x = np.pad(zigzag(g, rng), ((0, 0), (0, 5))).astype(np.float32)
            writer.add_episode({"episode_metadata": {"file_path": f"{e}.hdf5"}, "steps": [
                {"observation": {"image": np.full((16, 24, 3), 2 * i, np.uint8), "state": row}, "action": np.full(7, -1, np.float32),
                 "language_instruction": f"task {e}", "is_last": i == len(x) - 1} for i, row in enumerate(x)]})
    return root, gaps


@pytest.mark.parametrize("size", [0, 8])
def test_waypoint_rlds_by_command(rlds, tmp_path, size, capsys):
    "extract, filter: the smaller folder holds the known turns of the right episodes, with durations and source steps."
    (root, gaps), file, few = rlds, tmp_path / "w.json", tmp_path / "few/1.0.0"
    assert cli.main(["waypoints", "extract", str(root), f"--output={file}", "--threshold=0.006", "--workers=0"]) == 0
    assert cli.main(["waypoints", "filter", str(root), f"--waypoints={file}", f"--output={few}", f"--size={size}", "--shards=3"]) == 0
    whole, small, waypoints = RLDSDataset(root), RLDSDataset(few), read_waypoints(file)
    order = whole.tfds_order()
    assert (order != np.arange(40)).any() and len(small) == 40 and len(small.steps) == sum(len(g) + 1 for g in gaps)
    assert f"{len(small.steps) - 40} pairs" in capsys.readouterr().out and len(small.split.files) == 3
    assert schema_problems(few) == []
    for k, known in enumerate(waypoints.episodes):
        e, kept = int(order[k]), known.waypoint_indices
        assert known.src_ep_idx == k and known.durations.tolist() == gaps[e].tolist()
        ours, theirs = small.episode(k, raw=not size), whole.episode(e, raw=not size)
        assert ours["episode_metadata"]["file_path"] == theirs["episode_metadata"]["file_path"] == f"{e}.hdf5"
        steps = ours["steps"]
        assert steps.read("original_step_index").tolist() == kept.tolist()
        assert steps.read("waypoint_duration").tolist() == [*gaps[e].tolist(), 0]
        assert steps.read("is_waypoint_end").tolist() == steps.read("is_last").tolist() == [False] * len(gaps[e]) + [True]
        np.testing.assert_array_equal(steps.read("observation/state"), theirs["steps"].read("observation/state", kept))
        pictures = steps.read("observation/image")
        if size: assert pictures.shape[1:] == (8, 8, 3) and np.abs(pictures.mean((1, 2, 3)) - 2 * kept).max() < 2
        else: assert pictures == theirs["steps"].read("observation/image", kept)
    assert cli.main(["waypoints", "filter", str(few), f"--waypoints={file}", f"--output={tmp_path / 'again'}"]) == 2
    assert not (tmp_path / "again").exists()


def test_samples_from_rlds(rlds, tmp_path):
    "Pairs come from the episode that the number means, with the picture of their first step."
    root, gaps = rlds
    data = RLDSDataset(root)
    order, rows = data.tfds_order(), []
    for k, e in enumerate(order): rows.append(EpisodeWaypoints(k, int(gaps[e].sum()) + 1, np.concatenate([[0], gaps[e].cumsum()])))
    episodes, waypoints = RLDSEpisodes(data, normalise=lambda key, x: x / 2 if key == "state" else x), Waypoints(rows, {})
    check_source(waypoints, episodes.lengths)
    samples = PairDataset(episodes, waypoints, ("image",), width=8)
    assert len(samples) == sum(map(len, gaps))
    for i in (0, 50, len(samples) - 1):
        k, s, e = (int(c[i]) for c in samples.pairs[:3])
        state = data[int(order[k])]["steps"].read("observation/state")
        np.testing.assert_allclose(samples[i]["end_proprio"], state[e] / 2, rtol=1e-6)
        assert samples[i]["task"] == f"task {order[k]}" and abs(samples[i]["image"].mean() - 2 * s) < 2
    with pytest.raises(UserError, match="steps"): check_source(waypoints, data.episodes["steps"].tolist())


# ---------------------------------------------------------------- chunks

@pytest.mark.parametrize("relative", [None, (), (0, 2)])
def test_chunk_statistics_against_brute_force(tmp_path, relative):
    "Equal to statistics over every chunk that a loader gives, padding left out."
    root, horizon = fake_dataset(tmp_path / "d", episodes=4, frames=12, dims=3, dtype="image"), 9
    ds = LeRobotDataset(root, delta_timestamps={"action": [i / 10 for i in range(horizon)]})
    steps = [[] for _ in range(horizon)]
    for row in ds:
        base = row["observation.state"].numpy().astype(float)
        if relative is None: base = base * 0
        elif relative: base[[d for d in range(3) if d not in relative]] = 0
        for k in range(horizon):
            if not row["action_is_pad"][k]: steps[k].append(row["action"][k].numpy().astype(float) - base)
    columns = LeRobotDataset(root).columns
    state = None if relative is None else columns["observation.state"]
    found = chunk_stats(columns["action"], columns["frame_index"], horizon, state, relative or ())
    for k, rows in enumerate(steps):
        x = np.stack(rows)
        assert found["count"][k] == len(x) == 4 * (12 - k)
        for name, want in {"mean": x.mean(0), "std": x.std(0), "min": x.min(0), "max": x.max(0), "q01": np.quantile(x, 0.01, 0),
                           "q99": np.quantile(x, 0.99, 0)}.items():
            np.testing.assert_allclose(found[name][k], want, atol=1e-12)
