"""A run killed at any moment goes on to the very weights of one that was not.

The default run kills three times; `pytest -m slow tests/test_kill.py` 50 times, and a run of two
processes twice, or as
RISCLIP_KILLS says.
"""

import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import train
from support import files
from support.checkpoint import find_checkpoint

REPOSITORY = Path(train.__file__).parent
STEPS = 6
# a process that has imported torch, and run nothing, forks them
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["train"])


def trains(flags, errors=None, largest_file=None):
    """What a child process does: train.py with these flags, a checkpoint every second step, and no
    evaluation. What it
    prints on stderr goes to a file, if one is given."""
    if errors:
        os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    if largest_file:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    # its own readers, as train.py's: a server's would outlive it
    multiprocessing.set_start_method("fork", force=True)
    torch.set_num_threads(1)
    for settings in train.SETTINGS.values():
        settings["save_every"] = 2
    train.report = lambda *_: True
    sys.exit(files.run(train.main, train.parse_args(flags)))


def stderr(out):
    return out.with_name(f"{out.name}.stderr")


def flags(world, out, stage, *more):
    return [
        str(f)
        for f in (
            "--data-root",
            world,
            "--out",
            out,
            "--stage",
            stage,
            "--steps",
            STEPS,
            "--batch-size",
            2,
            "--image-size",
            32,
            *more,
        )
    ]


def start(world, out, stage, *more, **limits):
    process = CONTEXT.Process(
        target=trains, args=(flags(world, out, stage, *more), stderr(out)), kwargs=limits
    )
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
    # starts the server, whose imports are no part of a run's seconds
    first = CONTEXT.Process(target=str)
    first.start()
    assert ends(first) == 0
    for stage in (1, 2):
        begun = time.monotonic()
        assert ends(start(world, out, stage)) == 0
        seconds[stage] = time.monotonic() - begun
    return out, seconds


def prepare(out, unbroken, stage):
    """Makes an --out, for stage 2 with the unbroken stage 1."""
    out.mkdir()
    if stage == 2:
        (out / f"stage1-{STEPS:06d}").symlink_to(
            unbroken / f"stage1-{STEPS:06d}", target_is_directory=True
        )


def kill(world, unbroken, out, stage, number, after):
    """Kills a run of the stage after that many seconds, resumes it, and compares weights and log
    with the unbroken
    one's. -> the killed run's exit code."""
    prepare(out, unbroken, stage)
    process = start(world, out, stage)
    time.sleep(after)
    if process.is_alive():
        os.kill(process.pid, number)
    code = ends(process)
    # Ctrl-C is then an exception, of which multiprocessing makes a 1
    early = not (out / "log.jsonl").exists()
    # 0: it had ended before
    assert code in (0, -number, 128 + number, 1 if early and number == signal.SIGINT else 0)
    # it had begun to train, and so saved first
    if code == 128 + number and (out / "log.jsonl").exists():
        assert find_checkpoint(out, stage)
    assert ends(start(world, out, stage, "--resume")) == 0
    same(unbroken, out, stage)
    return code


def same(unbroken, out, stage):
    expected, resumed = weights(unbroken, stage), weights(out, stage)
    assert expected.keys() == resumed.keys() and all(
        torch.equal(expected[k], resumed[k]) for k in expected
    )
    assert not list(out.glob(".*partial"))


def kill_often(world, unbroken, tmp_path, times):
    (out, seconds), rng = unbroken, random.Random(0)
    codes = []
    for i in range(times):
        stage, number = 1 + i % 2, (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)[i % 3]
        codes.append(
            kill(world, out, tmp_path / str(i), stage, number, rng.uniform(0, seconds[stage]))
        )
        shutil.rmtree(tmp_path / str(i))
    print(f"{times} runs killed and resumed; exit codes {sorted(codes)}")
    assert any(codes), "no run was killed before its end"


def test_a_killed_run_resumes_bit_for_bit(world, unbroken, tmp_path):
    kill_often(world, unbroken, tmp_path, 3)


@pytest.mark.slow
def test_many_killed_runs_resume_bit_for_bit(world, unbroken, tmp_path):
    kill_often(world, unbroken, tmp_path, int(os.environ.get("RISCLIP_KILLS", 50)))


def test_a_full_disk_leaves_the_checkpoint_before_and_says_so_in_one_line(
    world, unbroken, tmp_path
):
    """The resumed run may write no file as large as training.pt, which holds two moments of every
    parameter."""
    process = start(world, tmp_path, 1)
    while process.is_alive() and not find_checkpoint(tmp_path, 1):
        time.sleep(0.05)
    process.kill()
    ends(process)
    before = find_checkpoint(tmp_path, 1)
    limit = (before / "training.pt").stat().st_size - 1
    assert limit > (before / "model.safetensors").stat().st_size  # which is written first
    assert ends(start(world, tmp_path, 1, "--resume", largest_file=limit)) == 2
    error = [
        line for line in stderr(tmp_path).read_text().splitlines() if line.startswith("error: ")
    ]
    assert (
        len(error) == 1
        and "cannot be written" in error[0]
        and "make room and continue with --resume" in error[0]
    )
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


# ---- Two processes -----------------------------------------------------------------------------


def torchrun(out, *command):
    """Starts a script with its flags as two processes of one thread -> the torchrun."""
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        *command,
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    with open(stderr(out), "w") as errors:
        return subprocess.Popen(
            launch, cwd=REPOSITORY, env=environment, stdout=subprocess.DEVNULL, stderr=errors
        )


def until(there, process):
    """Waits for there() to be true, or for the process to end."""
    while not there() and process.poll() is None:
        time.sleep(0.02)


def two(world, out, stage, *more):
    """Starts a run of this file as a script, and waits until it trains or ends."""
    process = torchrun(out, __file__, str(out), *flags(world, out, stage, *more))
    until((out / "log.jsonl").exists, process)
    return process


def saved(out, stage):
    """The step of the newest checkpoint."""
    newest = find_checkpoint(out, stage)
    return int(newest.name.split("-")[1]) if newest else 0


WAYS = {
    "both and torchrun": signal.SIGKILL,
    "one": signal.SIGKILL,
    "both": signal.SIGTERM,
    "torchrun": signal.SIGTERM,
}


def kill_two(world, unbroken, out, stage, way, rng):
    """As kill does, of two processes that train under torchrun. -> its exit code, and the step that
    was left."""
    prepare(out, unbroken[1], stage)
    process, begun = two(world, out, stage), rng.choice((0, 2))
    until(lambda: saved(out, stage) >= begun, process)
    time.sleep(rng.uniform(0, 0.3))  # two steps of stage 2
    workers = [int(out.with_name(f"{out.name}.{rank}").read_text()) for rank in (0, 1)]
    pids = {"both": workers, "one": [rng.choice(workers)], "torchrun": []}.get(way, workers)
    for pid in [process.pid] * ("torchrun" in way) + pids:
        try:
            os.kill(pid, WAYS[way])
        except ProcessLookupError:
            pass  # it had ended before
    code, left = process.wait(300), saved(out, stage)
    resumed = two(world, out, stage, "--resume")
    assert resumed.wait(300) == 0, stderr(out).read_text()
    same(unbroken[stage], out, stage)
    return code, left


@pytest.mark.slow
def test_killed_runs_of_two_processes_resume_bit_for_bit(world, tmp_path):
    unbroken, killed, rng = (
        {stage: tmp_path / f"unbroken{stage}" for stage in (1, 2)},
        [],
        random.Random(0),
    )
    for stage, out in unbroken.items():
        prepare(out, unbroken[1], stage)
        assert two(world, out, stage).wait(300) == 0, stderr(out).read_text()
    for i in range(int(os.environ.get("RISCLIP_KILLS", 2))):
        stage, way = 1 + i % 2, rng.choice(list(WAYS))
        code, left = kill_two(world, unbroken, tmp_path / str(i), stage, way, rng)
        killed.append(left)
        print(
            f"stage {stage}, {WAYS[way].name} to {way}: exit code {code}, left at step {left}",
            flush=True,
        )
    assert min(killed) < STEPS, "no run was killed before its end"


@pytest.mark.slow
def test_sigterm_to_torchrun_saves_first(world, tmp_path):
    process = torchrun(
        tmp_path,
        "train.py",
        "--data-root",
        str(world),
        "--out",
        str(tmp_path),
        "--stage",
        "1",
        "--steps",
        "100000",
    )
    log = tmp_path / "log.jsonl"
    until(lambda: log.exists() and log.read_text(), process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(300) != 0 and "continue with --resume" in stderr(tmp_path).read_text()
    assert int(find_checkpoint(tmp_path, 1).name.split("-")[1]) >= 10 and not list(
        tmp_path.glob(".*partial")
    )


if __name__ == "__main__":  # what torchrun starts
    Path(f"{sys.argv[1]}.{os.environ['RANK']}").write_text(str(os.getpid()))
    trains(sys.argv[2:])
