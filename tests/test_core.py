"""core under faults and across processes: what a notebook cannot show."""
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass

import pytest

from vla_nb.core.config import apply_flags, from_dict, parse_flags, to_dict
from vla_nb.core.files import append_jsonl, atomic_dir, atomic_write, file_lock, read_jsonl
from vla_nb.core.settings import settings
from vla_nb.core.types import UserError


def python(code, *argv, **kw): return subprocess.Popen([sys.executable, "-c", code, *map(str, argv)], stdout=subprocess.PIPE,
                                                       stderr=subprocess.PIPE, text=True, **kw)


FILL_DISK = """
import resource, signal, sys
from vla_nb.core.files import atomic_dir, atomic_write
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
kind, path = sys.argv[1:]
try:
    if kind == 'file':
        with atomic_write(path) as f: f.write(b'x' * 5000)
    else:
        with atomic_dir(path) as d: (d / 'weights').write_bytes(b'x' * 5000)
except OSError as e: print(e.strerror)
"""


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_disk_full_leaves_the_old_version(tmp_path, kind):
    "When the disk fills, the old file or folder stays whole and nothing else lies around."
    target = tmp_path / "ckpt"
    if kind == "file": target.write_text("old")
    else:
        target.mkdir()
        (target / "weights").write_text("old")
    out, err = python(FILL_DISK, kind, target).communicate(timeout=60)
    assert "too large" in out, out + err
    assert (target if kind == "file" else target / "weights").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["ckpt"]


def test_killed_writer_leaves_the_old_version(tmp_path):
    "kill -9 in the middle of a write leaves the old file under its name."
    target = tmp_path / "a.txt"
    target.write_text("old")
    code = ("import sys, time\nfrom vla_nb.core.files import atomic_write\n"
            "with atomic_write(sys.argv[1], 'w') as f:\n    f.write('new'); f.flush(); print('in', flush=True); time.sleep(60)")
    child = python(code, target)
    assert child.stdout.readline().strip() == "in"
    child.send_signal(signal.SIGKILL)
    child.wait(timeout=30)
    assert target.read_text() == "old"


def test_lock_dies_with_its_holder(tmp_path):
    "A second process is refused while the first holds the lock, and let in after the first was killed."
    code = ("import sys, time\nfrom vla_nb.core.files import file_lock\n"
            "with file_lock(sys.argv[1]):\n    print('in', flush=True); time.sleep(60)")
    child = python(code, tmp_path / "lock")
    assert child.stdout.readline().strip() == "in"
    with pytest.raises(UserError, match="another process"), file_lock(tmp_path / "lock", wait=False): pass
    child.send_signal(signal.SIGKILL)
    child.wait(timeout=30)
    with file_lock(tmp_path / "lock", wait=False): pass


def test_reader_sees_old_or_new_never_half(tmp_path):
    "While one process replaces a file again and again, another always reads a whole one."
    target = tmp_path / "a.txt"
    target.write_text("a" * 50_000)
    code = ("import sys\nfrom vla_nb.core.files import atomic_write\n"
            "for i in range(40):\n    with atomic_write(sys.argv[1], 'w') as f: f.write('ab'[i % 2] * 50_000)")
    child = python(code, target)
    while child.poll() is None:
        text = target.read_text()
        assert len(text) == 50_000 and len(set(text)) == 1
        time.sleep(0.002)
    assert child.returncode == 0, child.stderr.read()


def test_modes_and_links_of_a_replaced_file(tmp_path):
    "A replaced file keeps its permissions; a new one can be read by others."
    old, new = tmp_path / "old", tmp_path / "new"
    old.write_text("x")
    os.chmod(old, 0o600)
    for path in (old, new):
        with atomic_write(path, "w") as f: f.write("y")
    assert (old.stat().st_mode & 0o777, new.stat().st_mode & 0o777) == (0o600, 0o644)


def test_folder_with_a_link(tmp_path):
    "A folder that holds a symbolic link, also a dangling one, is written like any other."
    with atomic_dir(tmp_path / "run") as d: (d / "last").symlink_to("000010")
    assert os.readlink(tmp_path / "run/last") == "000010"


def test_torn_last_line_is_left_out(tmp_path):
    "A line torn by a killed writer is dropped by the reader and by the next append."
    path = tmp_path / "m.jsonl"
    append_jsonl(path, {"a": 1})
    with open(path, "a") as f: f.write('{"a": 2')
    assert read_jsonl(path) == [{"a": 1}]
    append_jsonl(path, {"a": 3})
    assert read_jsonl(path) == [{"a": 1}, {"a": 3}]


def test_settings_from_environment(tmp_path, monkeypatch):
    "VLA_NB_* wins over the file; an unknown value is refused with its variable's name."
    (tmp_path / "settings.ini").write_text("[vla_nb]\nworkers = 3\n")
    monkeypatch.setenv("VLA_NB_ROOT", str(tmp_path))
    assert settings().workers == 3 and settings().outputs == tmp_path / "outputs"
    monkeypatch.setenv("VLA_NB_WORKERS", "1")
    assert settings().workers == 1
    monkeypatch.setenv("VLA_NB_PRECISION", "fp8")
    with pytest.raises(UserError, match="VLA_NB_PRECISION"): settings()


@dataclass(frozen=True)
class Policy: type: str = "act"; layers: tuple[int, ...] = (1, 2); dropout: float | None = None

@dataclass(frozen=True)
class Train: policy: Policy = Policy(); steps: int = 10; use_amp: bool = False; name: str = ""


@pytest.mark.parametrize("line,want", [
    ("--policy.type=pi0_fast --steps=3", Train(Policy("pi0_fast"), 3)),
    ("--policy.type pi0_fast --steps 3", Train(Policy("pi0_fast"), 3)),
    ("--use-amp --steps=3", Train(steps=3, use_amp=True)),
    ("--use_amp=false --name=true", Train(name="true")),
    ("--policy.layers=[3,4] --policy.dropout=0.5", Train(Policy(layers=(3, 4), dropout=0.5))),
    ("--policy.layers=5, --policy.dropout=None", Train(Policy(layers=(5,)))),
    ("--steps=1 --steps=2", Train(steps=2)),
])
def test_flags(line, want): assert apply_flags(Train(), parse_flags(line.split())) == want


@pytest.mark.parametrize("line,says", [
    ("--polcy.type=a", "did you mean 'policy'"), ("--steps=1.5", "--steps is '1.5': expected a whole number"),
    ("--steps", "--steps is 'true'"), ("--policy=act", "--policy is 'act'"), ("--steps.x=1", "--steps is"),
    ("-x 3", "Unexpected word '-x'"), ("--policy.layers=a,b", r"--policy.layers\[0\] is 'a'"),
])
def test_wrong_flags(line, says):
    with pytest.raises(UserError, match=says): apply_flags(Train(), parse_flags(line.split()))


def test_round_trip(): assert from_dict(Train, to_dict(Train(Policy("x", (), 0.1)))) == Train(Policy("x", (), 0.1))
