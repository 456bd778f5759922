"""A run killed at any moment goes on to the very weights of one that was not.

The default run kills three times; `pytest -m slow tests/test_kill.py` 50 times, or as RISCLIP_KILLS says.
"""

import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

import data
import train
from risclip import find_checkpoint

STEPS = 6
CONTEXT = multiprocessing.get_context("forkserver")  # a process that has imported torch, and run nothing, forks them
CONTEXT.set_forkserver_preload(["train"])


def trains(flags, errors, largest_file=None):
    """What a child process does: train.py with these flags, a checkpoint every second step, and no evaluation. What it
    prints on stderr goes to a file."""
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    if largest_file:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    torch.set_num_threads(1)
    for settings in train.SETTINGS.values():
        settings["save_every"] = 2
    train.report = lambda *_: None
    sys.exit(data.run(train.main, train.parse_args(flags)))


def stderr(out):
    return out.with_name(f"{out.name}.stderr")


def start(world, out, stage, *more, **limits):
    flags = ["--data-root", world, "--out", out, "--stage", stage, "--steps", STEPS, "--batch-size", 2,
             "--image-size", 32, *more]
    process = CONTEXT.Process(target=trains, args=([str(f) for f in flags], stderr(out)), kwargs=limits)
    process.start()
    return process


def ends(process):
    process.join(120)
    assert process.exitcode is not None, "it hangs"
    return process.exitcode


def weights(out, stage):
    return load_file(find_checkpoint(out, stage) / "model.safetensors")


@pytest.fixture(scope="module")
def unbroken(world, tmp_path_factory):
    """--out of both stages, and by stage the seconds that its run took."""
    out, seconds = tmp_path_factory.mktemp("unbroken"), {}
    first = CONTEXT.Process(target=str)  # starts the server, whose imports are no part of a run's seconds
    first.start()
    assert ends(first) == 0
    for stage in (1, 2):
        begun = time.monotonic()
        assert ends(start(world, out, stage)) == 0
        seconds[stage] = time.monotonic() - begun
    return out, seconds


def kill(world, unbroken, out, stage, number, after):
    """Kills a run of the stage after that many seconds, resumes it, and compares weights and log with the unbroken
    one's. -> the killed run's exit code."""
    out.mkdir()
    if stage == 2:
        (out / f"stage1-{STEPS:06d}").symlink_to(unbroken / f"stage1-{STEPS:06d}", target_is_directory=True)
    process = start(world, out, stage)
    time.sleep(after)
    if process.is_alive():
        os.kill(process.pid, number)
    code = ends(process)
    assert code in (0, -number, 128 + number)  # 0: it had ended before
    if code == 128 + number and (out / "log.jsonl").exists():  # it had begun to train, and so saved first
        assert find_checkpoint(out, stage)
    assert ends(start(world, out, stage, "--resume")) == 0
    expected, resumed = weights(unbroken, stage), weights(out, stage)
    assert expected.keys() == resumed.keys() and all(torch.equal(expected[k], resumed[k]) for k in expected)
    assert not list(out.glob(".*partial"))
    return code


def kill_often(world, unbroken, tmp_path, times):
    (out, seconds), rng = unbroken, random.Random(0)
    codes = []
    for i in range(times):
        stage, number = 1 + i % 2, (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)[i % 3]
        codes.append(kill(world, out, tmp_path / str(i), stage, number, rng.uniform(0, seconds[stage])))
        shutil.rmtree(tmp_path / str(i))
    print(f"{times} runs killed and resumed; exit codes {sorted(codes)}")
    assert any(codes), "no run was killed before its end"


def test_a_killed_run_resumes_bit_for_bit(world, unbroken, tmp_path):
    kill_often(world, unbroken, tmp_path, 3)


@pytest.mark.slow
def test_many_killed_runs_resume_bit_for_bit(world, unbroken, tmp_path):
    kill_often(world, unbroken, tmp_path, int(os.environ.get("RISCLIP_KILLS", 50)))


def test_a_full_disk_leaves_the_checkpoint_before_and_says_so_in_one_line(world, unbroken, tmp_path):
    """The resumed run may write no file as large as training.pt, which holds two moments of every parameter."""
    process = start(world, tmp_path, 1)
    while process.is_alive() and not find_checkpoint(tmp_path, 1):
        time.sleep(0.05)
    process.kill()
    ends(process)
    before = find_checkpoint(tmp_path, 1)
    limit = (before / "training.pt").stat().st_size - 1
    assert limit > (before / "model.safetensors").stat().st_size  # which is written first
    assert ends(start(world, tmp_path, 1, "--resume", largest_file=limit)) == 2
    error = [line for line in stderr(tmp_path).read_text().splitlines() if line.startswith("error: ")]
    assert len(error) == 1 and "cannot be written" in error[0] and "make room and go on with --resume" in error[0]
    assert find_checkpoint(tmp_path, 1) == before and not list(tmp_path.glob(".*partial"))
    assert ends(start(world, tmp_path, 1, "--resume")) == 0
    expected, resumed = weights(unbroken[0], 1), weights(tmp_path, 1)
    assert all(torch.equal(expected[k], resumed[k]) for k in expected)


def test_a_second_run_is_kept_out_until_the_first_one_is_dead(world, unbroken, tmp_path):
    process = start(world, tmp_path, 1, "--workers", 1)
    while process.is_alive() and not (tmp_path / "log.jsonl").exists():
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGSTOP)
    assert ends(start(world, tmp_path, 1, "--resume")) == 2
    assert f"error: --out {tmp_path}: another run is writing there" in stderr(tmp_path).read_text()
    process.kill()
    ends(process)
    assert ends(start(world, tmp_path, 1, "--resume")) == 0
