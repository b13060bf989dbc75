"""Conversion of a LeRobot v2.1 dataset to v3.0: ours and LeRobot's own converter, same files, same cores.

    python benchmarks/data_convert.py --lerobot=PYTHON [--episodes=200] [--frames=150] [--size=96] [--repeat=3]

PYTHON is an interpreter with LeRobot 0.4 (an environment of its own). Both run alternately, each in a fresh process that times its
own conversion, imports excluded. Measures picture statistics, which LeRobot does not touch, in a separate row. Writes
reports/benchmarks/data_convert.json and checks with `data diff` that nothing was lost.
"""
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from vla_nb.core.config import parse_flags
from vla_nb.core.files import write_json
from vla_nb.core.settings import settings
from vla_nb.core.stats import sample_indices
from vla_nb.core.types import UserError
from vla_nb.datasets.diff import diff
from vla_nb.datasets.fake import fake_v2

OURS = """
import sys, time
from vla_nb.datasets.convert import ConvertOptions, convert
t = time.perf_counter()
convert(sys.argv[1], ConvertOptions(output=sys.argv[2], image_stats=sys.argv[3]))
print(time.perf_counter() - t)
"""
PEER = """
import sys, time
from pathlib import Path
from lerobot.datasets.v30.convert_dataset_v21_to_v30 import convert_dataset
root = Path(sys.argv[1])
t = time.perf_counter()
convert_dataset(root.name, root=root.parent, push_to_hub=False, force_conversion=True)
print(time.perf_counter() - t)
"""


def timed(python, code, *words) -> float:
    "Seconds that a conversion took in a process of its own."
    done = subprocess.run([python, "-c", code, *map(str, words)], capture_output=True, text=True)
    if done.returncode: raise UserError(f"{python} failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    return float(done.stdout.strip().splitlines()[-1])


def main(argv) -> int:
    "Make, convert, compare, write."
    flags = {"episodes": 200, "frames": 150, "size": 96, "repeat": 3} | parse_flags(argv)
    if "lerobot" not in flags: raise UserError("give an interpreter that has LeRobot 0.4: --lerobot=PYTHON")
    n, frames, size, repeat = (int(flags[k]) for k in ("episodes", "frames", "size", "repeat"))
    with tempfile.TemporaryDirectory() as box:
        box = Path(box)
        source = fake_v2(box / "source", episodes=n, frames=frames, cameras=("laptop", "phone"), size=(size, size), dims=6, fps=30)
        ours, peer, stats = [], [], []
        for i in range(repeat):
            shutil.copytree(source, box / f"peer{i}")
            peer.append(timed(flags["lerobot"], PEER, box / f"peer{i}"))
            ours.append(timed(sys.executable, OURS, source, box / f"ours{i}", "auto"))
            stats.append(timed(sys.executable, OURS, source, box / f"stats{i}", "compute"))
        found = diff(source, box / "ours0"), diff(box / "peer0", box / "ours0")
    ratio = statistics.median(peer) / statistics.median(ours)
    result = dict(episodes=n, frames_each=frames, size=size, cameras=2, cores=os.cpu_count(), machine=platform.machine(),
                  lerobot_s=peer, ours_s=ours, ours_with_picture_statistics_s=stats, ratio=ratio, target=2.0,
                  differences_to_source=found[0]["differences"], differences_to_lerobot=found[1]["differences"],
                  command=f"python benchmarks/data_convert.py --lerobot=PYTHON --episodes={n} --frames={frames} --size={size}")
    measured = statistics.median(stats)
    result["verdicts"] = [{"what": "LeRobot's seconds / ours, without picture statistics", "value": ratio, "target": 2.0, "at": "least",
                           "met": ratio >= 2}]
    result["table"] = {"head": ["converter", "seconds (median)"], "rows": [
        ["LeRobot 0.4", statistics.median(peer)], ["ours", statistics.median(ours)], ["ours, with exact picture statistics", measured],
        ["pictures/s of that extra step", 2 * n * len(sample_indices(frames)) / (measured - statistics.median(ours))]]}
    write_json(Path(settings().reports) / "benchmarks" / "data_convert.json", result)
    print(json.dumps({k: v for k, v in result.items() if not k.startswith("differences")}, indent=1))
    print(f"differences to the source: {len(found[0]['differences'])}, to LeRobot's result: {found[1]['differences'][:5]}")
    return 0 if ratio >= 2 and not found[0]["differences"] else 1


if __name__ == "__main__": sys.exit(main(sys.argv[1:]))
