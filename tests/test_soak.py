"""A long run takes no more memory, open files or processes at its end than near its beginning.

`pytest -m slow tests/test_soak.py` trains 20,000 steps of stage 1 on a miniature of the miniature,
or as many as
RISCLIP_SOAK says, and measures after every 2,000.
"""

import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train
from support import runs

STEPS = int(os.environ.get("RISCLIP_SOAK", 20_000))
FIRST = min(2000, STEPS // 3)  # by then it has all that it needs


def takes(step):
    """What this process takes now, and those that it started: resident bytes, open files, how many
    they are."""
    children = multiprocessing.active_children()
    pages = sum(
        int(open(f"/proc/{pid}/statm").read().split()[1])
        for pid in (os.getpid(), *(p.pid for p in children))
    )
    return {
        "step": step,
        "resident": pages * os.sysconf("SC_PAGE_SIZE"),
        "files": len(os.listdir("/proc/self/fd")),
        "processes": 1 + len(children),
    }


def soaks(file, flags):
    """What this file does as a script: it trains, and writes a line of what it takes after each
    checkpoint."""
    torch.set_num_threads(1)
    train.SETTINGS["tiny", 1]["save_every"] = FIRST
    train.report, save = (lambda *_: True), runs.save_checkpoint

    def saves(run):
        save(run)
        with open(file, "a") as lines:
            print(json.dumps(takes(run.step)), file=lines)

    runs.save_checkpoint = saves
    args = train.parse_args(flags)
    args.changes = {"adapter_layers": 1, "cfe_layers": 1, "ske_layers": 1}
    train.main(args)


@pytest.mark.slow
def test_a_long_run_grows_in_nothing(world, tmp_path):
    file = tmp_path / "takes.jsonl"
    flags = [
        "--data-root",
        world,
        "--out",
        tmp_path / "o",
        "--stage",
        1,
        "--steps",
        STEPS,
        "--batch-size",
        1,
        "--per-image",
        1,
        "--image-size",
        16,
        "--workers",
        1,
    ]
    command = [sys.executable, __file__, file, *flags]
    subprocess.run(
        [str(c) for c in command],
        check=True,
        env=os.environ | {"PYTHONPATH": Path(train.__file__).parent},
    )
    taken = [json.loads(line) for line in file.read_text().splitlines()]
    print(*taken, sep="\n")
    first, last = taken[0], taken[-1]
    assert (first["step"], last["step"]) == (FIRST, STEPS)
    assert last["resident"] < 1.05 * first["resident"]
    assert last["files"] <= first["files"] and last["processes"] <= first["processes"]


if __name__ == "__main__":
    soaks(sys.argv[1], sys.argv[2:])
