"The Hub, played by a local server: names, revisions, tokens, mirrors, interruptions, pushing; manifests that fetch; streaming."
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from vla_nb.core import hub
from vla_nb.core.files import read_json
from vla_nb.core.types import UserError
from vla_nb.datasets.fake import fake_dataset
from vla_nb.datasets.lerobot import DatasetMetadata, LeRobotDataset
from vla_nb.datasets.streaming import StreamingLeRobotDataset

from fakehub import FakeHub, LFS

NAME = "somebody/toy"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "A dataset of 3 episodes in 3 data files and 3 videos."
    from vla_nb.datasets.writer import DatasetWriter
    from vla_nb.datasets.fake import fake_episodes, fake_features
    root = tmp_path_factory.mktemp("data") / "toy"
    features = fake_features(("top",), (32, 32), 4, "video")
    with DatasetWriter(root, 10, features, robot_type="fake", data_mb=0, video_mb=0) as out:
        for episode in fake_episodes(3, 8, ("top",), (32, 32), 4, 0):
            for frame in episode: out.add_frame(frame)
            out.save_episode()
    return root


@pytest.fixture()
def server(tmp_path, monkeypatch):
    "The Hub, as the only one there is; an empty cache and workspace."
    from huggingface_hub import constants
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    for name in ("HF_TOKEN", "VLA_NB_HUB_ENDPOINT", "HF_LEROBOT_HOME"): monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setenv("VLA_NB_DATA_ROOT", str(tmp_path / "data"))
    with FakeHub() as h:
        monkeypatch.setenv("HF_ENDPOINT", h.url)
        yield h


def same(a, b):
    for x, y in zip(a, b, strict=True):
        for k in x: assert torch.equal(x[k], y[k]) if torch.is_tensor(x[k]) else x[k] == y[k]


def test_dataset_by_name_fetches_what_its_episodes_need(server, folder, tmp_path):
    sha = server.add("dataset", NAME, folder, tags=["v3.0"])
    meta = DatasetMetadata(NAME)
    assert meta.total_episodes == 3 and meta.hub.commit == sha and all(n.startswith("meta/") for n in server.downloads())
    ds = LeRobotDataset(NAME, episodes=[1])
    same([ds[i] for i in range(len(ds))], [LeRobotDataset(folder, episodes=[1])[i] for i in range(8)])
    assert sorted(n for n in server.downloads() if not n.startswith("meta/")) == [
        "data/chunk-000/file-001.parquet", "videos/observation.images.top/chunk-000/file-001.mp4"]
    server.log.clear()
    same(list(LeRobotDataset(ds.meta.root)[5:9]), list(LeRobotDataset(folder)[5:9]))   # by its folder: the rest is fetched
    assert len(server.downloads()) == 4 and ds.meta.fingerprint() == DatasetMetadata(NAME).fingerprint()


def test_revision_is_pinned(server, folder, tmp_path):
    old = server.add("dataset", NAME, folder, tags=["v3.0"])
    ds = LeRobotDataset(NAME, episodes=[0])
    changed = fake_dataset(tmp_path / "changed", episodes=1, frames=5)
    new = server.add("dataset", NAME, changed, tags=["v3.0"])   # the tag moves on
    assert len(LeRobotDataset(ds.meta.root)) == 24 and len(LeRobotDataset(NAME)) == 5
    assert len(LeRobotDataset(NAME, revision=old)) == 24 and DatasetMetadata(NAME, revision="main").hub.commit == new
    mine = tmp_path / "mine"
    assert len(LeRobotDataset(NAME, root=mine, revision=old, episodes=[2])) == 8
    assert (mine / "videos/observation.images.top/chunk-000/file-002.mp4").is_file()
    assert len(LeRobotDataset(NAME, root=mine, revision=old)) == len(LeRobotDataset(mine)) == 24
    with pytest.raises(UserError, match="was filled from dataset 'somebody/toy' at"): LeRobotDataset(NAME, root=mine)


def test_wrong_revision_lists_what_exists(server, folder):
    server.add("dataset", NAME, folder, tags=["v2.1"])
    with pytest.raises(UserError, match="no revision 'v3.0' .* it has branches main and tags v2.1"): LeRobotDataset(NAME)


def test_not_there_private_gated_refused_unreachable(server, folder, monkeypatch):
    server.add("dataset", NAME, folder, tags=["v3.0"])
    with pytest.raises(UserError, match="is no folder here, and: dataset 'somebody/gone' does not exist"): LeRobotDataset("somebody/gone")
    server.repos["dataset", NAME].gated = True
    with pytest.raises(UserError, match="is gated: ask for access"): LeRobotDataset(NAME)
    server.repos["dataset", NAME].gated = False
    server.token = "secret"
    with pytest.raises(UserError, match="does not exist .* or is private"): LeRobotDataset(NAME)
    monkeypatch.setenv("HF_TOKEN", "wrong")
    with pytest.raises(UserError, match="does not accept the token"): LeRobotDataset(NAME)
    monkeypatch.setenv("HF_TOKEN", "secret")
    assert len(LeRobotDataset(NAME)) == 24
    server.refuse = 503
    with pytest.raises(UserError, match="answered 503"): hub.open_repo("somebody/other")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"cannot be reached .*ConnectError"): hub.open_repo("somebody/other")


def test_without_a_network_the_cache_serves(server, folder, monkeypatch, capsys):
    server.add("dataset", NAME, folder, tags=["v3.0"])
    LeRobotDataset(NAME, episodes=[0])
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert len(LeRobotDataset(NAME, episodes=[0])) == 8
    assert "Going on with commit" in capsys.readouterr().err
    with pytest.raises(UserError, match="cannot be reached"): LeRobotDataset(NAME, episodes=[1])


def test_endpoint_order(server, folder, monkeypatch):
    server.add("dataset", NAME, folder, tags=["v3.0"])
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("VLA_NB_HUB_ENDPOINT", server.url + "/")   # ours comes before that of all tools
    assert DatasetMetadata(NAME).total_frames == 24


def big_repo(server, tmp_path, size=3_000_000):
    "A model of one large file."
    source = tmp_path / "big"
    source.mkdir()
    (source / "model.safetensors").write_bytes(np.random.default_rng(0).bytes(size))
    server.add("model", "somebody/big", source)
    return hub.open_repo("somebody/big", "model"), source


@pytest.mark.parametrize("cached", [True, False])
def test_lost_connection_goes_on(server, tmp_path, monkeypatch, cached):
    monkeypatch.setattr(hub, "RESUMABLE", 1)
    monkeypatch.setattr(hub.time, "sleep", lambda s: None)
    repo, source = big_repo(server, tmp_path)
    if not cached: repo = hub.open_repo("somebody/big", "model", folder=tmp_path / "here")
    server.cut["model.safetensors"] = (3, 700_000)
    repo.fetch(["model.safetensors"])
    assert (repo.folder / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()
    assert server.sent["model.safetensors"] == 3_000_000   # no byte twice
    assert [r for m, p, r in server.log if r] == ["bytes=700000-", "bytes=1400000-", "bytes=2100000-"]


def test_killed_download_goes_on(server, tmp_path, monkeypatch):
    "A process is killed in the middle; the next one asks for the rest only."
    repo, source = big_repo(server, tmp_path)
    server.cut["model.safetensors"] = (1, 2_000_000)
    code = ("import os, vla_nb.core.hub as h; h.RESUMABLE = 1; h.time.sleep = lambda s: os.kill(os.getpid(), 9)\n"
            "h.open_repo('somebody/big', 'model').fetch(['model.safetensors'])")
    env = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "cache"), "HF_HUB_DISABLE_XET": "1"}
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert run.returncode == -9, run.stderr
    assert not (repo.folder / "model.safetensors").exists()
    monkeypatch.setattr(hub, "RESUMABLE", 1)
    repo.fetch(["model.safetensors"])
    assert (repo.folder / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()
    assert server.sent["model.safetensors"] == 3_000_000


def test_a_server_without_ranges_and_one_that_lies(server, tmp_path, monkeypatch):
    monkeypatch.setattr(hub.time, "sleep", lambda s: None)
    repo, source = big_repo(server, tmp_path, 50_000)
    repo = hub.open_repo("somebody/big", "model", folder=tmp_path / "here")
    server.ranges, server.cut["model.safetensors"] = False, (1, 20_000)
    repo.fetch(["model.safetensors"])
    assert server.sent["model.safetensors"] == 70_000
    (tmp_path / "here/model.safetensors").unlink()
    files = server.files("model", "somebody/big")
    file = repo.about(["model.safetensors"])[0]
    files["model.safetensors"] = bytes(50_000)   # other content than was announced
    url = f"{server.url}/somebody/big/resolve/main/model.safetensors"
    with pytest.raises(UserError, match="otherwise than the Hub announced"): hub.download(url, tmp_path / "x", file)
    assert not (tmp_path / "x").exists() and not list(tmp_path.glob(".x*"))
    server.cut["model.safetensors"] = (99, 0)
    with pytest.raises(Exception): hub.download(url, tmp_path / "x", file)
    with pytest.raises(UserError, match="lacks other.bin"): repo.fetch(["other.bin"])


def test_policy_by_name_and_push(server, tmp_path, monkeypatch, capsys):
    from vla_nb.policies.fake import FakePolicy, fake_batch
    from vla_nb.policies.store import load_policy, main
    server.token = "secret"
    torch.manual_seed(0)
    policy = FakePolicy()
    with pytest.raises(UserError, match="or is private|accept the token"): policy.push_to_hub("me/policy")
    monkeypatch.setenv("HF_TOKEN", "secret")
    commit = policy.push_to_hub("me/policy", private=True)
    assert server.repos["model", "me/policy"].private
    card = server.files("model", "me/policy")["README.md"].decode()
    assert card.startswith("---\nlicense: apache-2.0\npipeline_tag: robotics\n") and 'load_policy("me/policy")' in card
    assert f"{sum(p.numel() for p in policy.state_dict().values()):,} parameters" in card
    again, batch = load_policy("me/policy", "cpu", revision=commit), policy.prepare(fake_batch())
    assert torch.equal(again.predict_action_chunk(batch), policy.eval().predict_action_chunk(batch))
    assert torch.equal(FakePolicy.from_pretrained("me/policy").state.weight, policy.state.weight)
    policy.save_pretrained(tmp_path / "run/pretrained_model")
    (tmp_path / "run/pretrained_model/README.md").write_text("---\nlicense: mit\n---\nMine.\n")
    assert main([str(tmp_path / "run"), "me/policy"]) == 0 and "pushed to me/policy" in capsys.readouterr().out
    assert server.files("model", "me/policy")["README.md"].endswith(b"Mine.\n")
    with pytest.raises(UserError, match="is no folder here, and: model 'me/none' does not exist"): load_policy("me/none")


# ---------------------------------------------------------------- manifests

@pytest.fixture()
def workspace(tmp_path, monkeypatch):
    "A workspace with a function that writes the manifest of a toy set."
    (tmp_path / "settings.ini").write_text("[vla_nb]\n")
    (tmp_path / "data_manifests").mkdir()
    monkeypatch.setenv("VLA_NB_ROOT", str(tmp_path))
    monkeypatch.delenv("VLA_NB_DATA_ROOT", raising=False)

    def write(source, expect="total_frames = 24\ntotal_episodes = 3\naction_dim = 4", more=""):
        (tmp_path / "data_manifests/toy.toml").write_text(
            f'name = "toy"\ntitle = "A toy"\nformat = "lerobot_v3.0"\nfolder = "toy"\nhow_to_get = "ask somebody"\n{more}\n'
            f"[source]\n{source}\n[expect]\n{expect}\n")
    write.root = tmp_path
    return write


def pull(*argv):
    from vla_nb.apps.pull import main
    return main(list(argv))


@pytest.mark.parametrize("kind", ["hub", "hf", "mirror"])
def test_pull_from_the_hub(server, folder, workspace, monkeypatch, capsys, kind):
    sha = server.add("dataset", NAME, folder, tags=["v3.0"])
    mirror = f'\nendpoint = "{server.url}"' if kind == "mirror" else ""
    if kind == "mirror": monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    workspace(f'kind = "{kind}"\nrepo = "{NAME}"\nrevision = "v3.0"{mirror}')
    monkeypatch.setattr(hub, "TRIES", 1)
    server.cut["videos/observation.images.top/chunk-000/file-002.mp4"] = (1, 0)
    with pytest.raises(UserError, match="cannot be reached .* what has arrived is kept"): pull("toy")
    part = workspace.root / "data/.toy.part"
    arrived = {str(p.relative_to(part)) for p in part.rglob("*") if p.is_file() and not p.name.startswith(".")}
    assert not (workspace.root / "data/toy").exists()
    server.log.clear()
    assert pull("toy") == 0 and not part.exists()
    assert not arrived & set(server.downloads()) and len(LeRobotDataset(workspace.root / "data/toy")) == 24
    server.log.clear()
    assert pull("toy") == 0 and not server.log and "files verified, 3 facts as expected" in capsys.readouterr().out
    assert DatasetMetadata(workspace.root / "data/toy").hub.commit == sha
    victim = workspace.root / "data/toy/meta/stats.json"
    victim.write_text(victim.read_text() + " ")
    with pytest.raises(UserError, match="was changed since it was fetched: 1 files, first meta/stats.json"): pull("toy")
    assert pull("toy", "--force") == 0 and pull("toy") == 0


def test_pull_refuses_what_is_otherwise(server, folder, workspace):
    server.add("dataset", NAME, folder, tags=["v3.0"])
    workspace(f'kind = "hub"\nrepo = "{NAME}"', "total_frames = 25")
    with pytest.raises(UserError, match="was not put in place: .* total_frames is 24: expected 25"): pull("toy")
    assert not (workspace.root / "data/toy").exists()
    workspace(f'kind = "hub"\nrepo = "{NAME}"', 'sha256 = {"meta/info.json" = "00ff"}')
    with pytest.raises(UserError, match="meta/info.json has another SHA-256 than 00ff"): pull("toy")
    workspace('kind = "ftp"')
    with pytest.raises(UserError, match="source.kind is 'ftp': use one of"): pull("toy")


PROGRAM = """#!{python}
import shutil, sys
assert sys.argv[1:-2] == {words}, sys.argv
print("fake transfer")
if sys.argv[-2] == {source!r} and {fail}: sys.exit(3)
shutil.copytree({folder!r}, sys.argv[-1], dirs_exist_ok=True)
"""


def program(place, name, words, source, folder, fail=False):
    "A tiny program that plays a transfer tool."
    place.mkdir(exist_ok=True)
    text = PROGRAM.format(python=sys.executable, words=words, source=source, folder=str(folder), fail=fail)
    (place / name).write_text(text)
    (place / name).chmod(0o755)


@pytest.mark.parametrize("kind,name,words", [("gs", "gsutil", ["-m", "rsync", "-r"]), ("rclone", "rclone", ["copy"]),
                                             ("gs", "gcloud", ["storage", "rsync", "--recursive"])])
def test_pull_by_a_program(folder, workspace, monkeypatch, capfd, kind, name, words):
    source = {"gs": "gs://bucket/toy", "rclone": "drive:sets/toy"}[kind]
    workspace(f'kind = "{kind}"\n{"url" if kind == "gs" else "remote"} = "{source}"')
    tools = workspace.root / "tools"
    monkeypatch.setenv("PATH", str(tools))
    with pytest.raises(UserError, match=f"is not installed, and would run `.*{source}.*`: "): pull("toy")
    assert pull() == 0 and "is not installed" in capfd.readouterr().out
    program(tools, name, words, source, folder, fail=True)
    with pytest.raises(UserError, match=f"`{name} .*` ended with status 3"): pull("toy")
    program(tools, name, words, source, folder)
    assert pull("toy") == 0 and pull("toy") == 0
    assert len(LeRobotDataset(workspace.root / "data/toy")) == 24


def test_pull_from_a_folder(folder, workspace, capsys):
    "Copied or linked; a folder around the dataset; the original is not touched."
    workspace('kind = "manual"')
    with pytest.raises(UserError, match="cannot be fetched by this command alone: .*--source=FOLDER"): pull("toy")
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    assert pull("toy", f"--source={folder}", "--link") == 0 and (workspace.root / "data/toy").is_symlink()
    assert pull("toy") == 0 and "put there by hand, 3 facts as expected" in capsys.readouterr().out
    assert pull("toy", f"--source={folder}", "--force") == 0 and not (workspace.root / "data/toy").is_symlink()
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*")} == before
    shutil.rmtree(workspace.root / "data")
    text = (workspace.root / "data_manifests/toy.toml").read_text().replace('folder = "toy"', 'folder = "all/v3/toy"')
    (workspace.root / "data_manifests/toy.toml").write_text(text.replace('"manual"', '"local"\npath = ""\ninto = "all"'))
    outer = workspace.root / "outer"
    shutil.copytree(folder, outer / "v3/toy")
    (outer / "note.txt").write_text("kept")
    assert pull("toy", f"--source={outer}") == 0 and (workspace.root / "data/all/note.txt").is_file()
    assert len(LeRobotDataset(workspace.root / "data/all/v3/toy")) == 24
    with pytest.raises(UserError, match="is no folder here, and not gs://"): pull("toy", "--source=/none/at/all", "--force")


def test_preflight_lists_every_path(folder, workspace, capsys):
    workspace('kind = "manual"\nindices = "toy_indices.json"')
    shutil.copytree(folder, workspace.root / "data/toy")
    assert pull() == 0
    out = capsys.readouterr().out
    assert "missing" in out and "toy_indices.json" in out and "ask somebody" in out and f"not there: {workspace.root}/data/toy\n" not in out
    (workspace.root / "data/toy_indices.json").write_text("{}")
    assert pull() == 0 and "present" in capsys.readouterr().out
    next((workspace.root / "data/toy/data").rglob("*.parquet")).unlink()
    assert pull() == 0
    out = capsys.readouterr().out
    assert "wrong" in out and "total_frames is 16: expected 24" in out


# ---------------------------------------------------------------- pushing a dataset

def test_push_dataset(server, folder, tmp_path, monkeypatch, capsys):
    from vla_nb.datasets.push import main
    server.token = "secret"
    with pytest.raises(UserError): main([str(folder), "me/toy"])
    monkeypatch.setenv("HF_TOKEN", "secret")
    assert main([str(folder), "me/toy", "--private"]) == 0 and "tag v3.0" in capsys.readouterr().out
    files = server.files("dataset", "me/toy", "v3.0")
    assert {n for n in files if n != "README.md"} == {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()} - {"README.md"}
    assert server.objects and all(files[n] == (folder / n).read_bytes() for n in files if n.endswith(LFS))
    card = files["README.md"].decode()
    assert all(t in card for t in ("license: apache-2.0", "- LeRobot", "| frames | 24 |", "`observation.images.top` | video | 32×32×3",
                                   "data_files: data/*/*.parquet", 'LeRobotDataset("me/toy")', "push the red square"))
    same([LeRobotDataset("me/toy")[5]], [LeRobotDataset(folder)[5]])
    smaller = fake_dataset(tmp_path / "smaller", episodes=1, frames=4)
    (smaller / "README.md").write_text("---\nlicense: mit\n---\nMy own words.\n")
    assert main([str(smaller), "me/toy"]) == 0
    now = server.files("dataset", "me/toy", "v3.0")   # the tag moved, the old files are gone
    assert now["README.md"].endswith(b"My own words.\n") and not any("file-001" in n for n in now)
    assert len(LeRobotDataset("me/toy")) == 4
    with pytest.raises(UserError, match="refuses this|does not exist|accept"):
        monkeypatch.setenv("HF_TOKEN", "wrong")
        main([str(smaller), "me/toy"])


def test_damaged_dataset_is_not_pushed(server, folder, tmp_path):
    from vla_nb.datasets.push import push_dataset
    shutil.copytree(folder, tmp_path / "bad")
    next((tmp_path / "bad/videos").rglob("*.mp4")).unlink()
    with pytest.raises(UserError, match="is not pushed, its check 'features' fails"): push_dataset(tmp_path / "bad", "me/bad")
    assert not server.repos


# ---------------------------------------------------------------- streaming



@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch): monkeypatch.setenv("VLA_NB_CACHE_ROOT", str(tmp_path / "frames"))


WINDOW = {"action": [0.0, 0.1, 0.2], "observation.images.top": [-0.1, 0.0]}


@pytest.fixture(scope="module")
def memory(folder):
    import fsspec
    fsspec.filesystem("memory").put(str(folder), "/sets/toy", recursive=True)
    return "memory://sets/toy"


@pytest.mark.parametrize("kind", ["folder", "memory", "hub", "images"])
def test_stream_gives_the_dataset_s_samples(server, folder, memory, tmp_path, kind):
    "Frames of a set of several files, windows and padding, from anywhere."
    place = {"folder": folder, "memory": memory, "hub": NAME, "images": "memory://sets/images"}[kind]
    if kind == "hub": server.add("dataset", NAME, folder, tags=["v3.0"])
    if kind == "images":
        import fsspec
        folder = fake_dataset(tmp_path / "images", dtype="image", episodes=3, frames=6)
        fsspec.filesystem("memory").put(str(folder), "/sets/images", recursive=True)
    whole = LeRobotDataset(folder, delta_timestamps=WINDOW)
    ds = StreamingLeRobotDataset(place, delta_timestamps=WINDOW, buffer_size=10)
    found = list(ds)
    assert sorted(int(s["index"]) for s in found) == list(range(len(whole))) != [int(s["index"]) for s in found]
    same(found, [whole[int(s["index"])] for s in found])
    if kind == "hub": assert not list(ds.meta.root.glob("data/*/*")) + list(ds.meta.root.glob("videos/*/*/*"))
    assert [int(s["index"]) for s in StreamingLeRobotDataset(place, episodes=[1], shuffle=False)] == list(
        LeRobotDataset(folder, episodes=[1]).columns["index"])


def numbers(batches): return [b["index"].tolist() for b in batches]


@pytest.mark.parametrize("workers,context", [(0, None), (2, "fork"), (3, "spawn")])
def test_stream_resumes_exactly(memory, folder, workers, context):
    "From any position, with any number of workers; each sample once an epoch; another order in the next."
    def loader(ds):
        from torch.utils.data import DataLoader
        return DataLoader(ds, batch_size=4, num_workers=workers, multiprocessing_context=context)
    place = str(folder) if context == "spawn" else memory   # a spawned process has a memory of its own
    make = lambda: StreamingLeRobotDataset(place, buffer_size=12, seed=3)
    whole = numbers(loader(make()))
    assert sorted(i for b in whole for i in b) == list(range(24))
    for used in ((1, 3, 6) if context != "spawn" else (4,)):
        again = make()
        again.load_state_dict(make().state_dict(used, batch_size=4, workers=workers))
        assert numbers(loader(again)) == whole[used:]
    if context: return
    ds = make()
    ds.set_epoch(1)
    assert numbers(loader(ds)) != whole and ds.state_dict(2, 4)["epoch"] == 1


def test_stream_shares_among_ranks_and_workers(memory):
    seen = []
    for rank in range(2):
        ds = StreamingLeRobotDataset(memory, rank=rank, world_size=2, episodes=[0, 1, 2])
        plans = [ds.plan(rank * 2 + w, 4) for w in range(2)]
        seen += [e for p in plans for e in p]
        assert sum(ds.samples(2)) == sum(8 for p in plans for e in p)
    assert sorted(seen) == [0, 1, 2]
    with pytest.raises(UserError, match="rank 2 does not exist"): StreamingLeRobotDataset(memory, rank=2, world_size=2)


def test_stream_in_bounded_memory(memory, tmp_path, monkeypatch):
    "Few episodes are open at a time, and what was made for them is removed."
    import tempfile
    import fsspec
    root = fake_dataset(tmp_path / "long", episodes=60, frames=4, size=(16, 16))
    fsspec.filesystem("memory").put(str(root), "/sets/long", recursive=True)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()
    most = 0
    for _ in StreamingLeRobotDataset("memory://sets/long", buffer_size=12):
        most = max(most, len(list((tmp_path / "scratch").rglob("*.mp4"))))
    assert most <= 12 + 4 and not list((tmp_path / "scratch").iterdir())


def test_stream_says_what_is_wrong(memory, folder, tmp_path):
    import fsspec
    fs = fsspec.filesystem("memory")
    with pytest.raises(UserError, match="holds no LeRobot dataset"): StreamingLeRobotDataset("memory://sets/none")
    with pytest.raises(UserError, match="cannot be opened"): StreamingLeRobotDataset("nosuch://x/y")
    with pytest.raises(UserError, match="no feature 'nothing'"): StreamingLeRobotDataset(memory, delta_timestamps={"nothing": [0]})
    with pytest.raises(UserError, match="episodes"): StreamingLeRobotDataset(memory, episodes=[7])
    with pytest.raises(UserError, match="to 2 workers|another|belongs to 2"):
        ds = StreamingLeRobotDataset(memory)
        ds.load_state_dict(ds.state_dict(1, 4, workers=2))
        next(iter(ds))
    fs.put(str(folder), "/sets/bad", recursive=True)
    name = "/sets/bad/videos/observation.images.top/chunk-000/file-001.mp4"
    good = fs.cat(name)
    fs.pipe(name, good[:200])
    with pytest.raises(UserError, match="file-001.mp4 of memory://sets/bad"): list(StreamingLeRobotDataset("memory://sets/bad"))
    fs.rm(name)
    with pytest.raises(UserError, match="lacks videos/observation.images.top/chunk-000/file-001.mp4"): list(StreamingLeRobotDataset("memory://sets/bad"))
    fs.pipe(name, good)
    name = "/sets/bad/data/chunk-000/file-000.parquet"
    fs.pipe(name, fs.cat(name)[:200])
    with pytest.raises(UserError, match="cannot read data/chunk-000/file-000.parquet"): list(StreamingLeRobotDataset("memory://sets/bad"))
