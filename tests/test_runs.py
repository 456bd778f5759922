"""A run and the processes that read images for it: it ends when they fail, however they start, and
goes on where a file system lacks what it would rather have."""

import errno
import fcntl
import json
import multiprocessing
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import train
from data import RefCOCO
from support import files, processes, runs
from support.checkpoint import find_checkpoint

REPOSITORY = Path(train.__file__).parent


def flags(world, out, *more):
    return [str(f) for f in ("--data-root", world, "--out", out, "--batch-size", 8, "--stage", 1,
                             *more)]


@pytest.fixture
def running(world, tmp_path):
    """train.py with one process that reads images, in its first steps -> it, the other's id."""
    more = flags(world, tmp_path, "--steps", 10**6, "--workers", 1)
    process = subprocess.Popen([sys.executable, "train.py", *more], cwd=REPOSITORY, text=True,
                               stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while process.poll() is None and not children.read_text():
        time.sleep(0.1)
    time.sleep(2)
    yield process, int(children.read_text())
    process.kill()


# ---- Processes that read images ----------------------------------------------------------------

def test_a_reader_that_dies_ends_the_run_within_seconds_in_one_line(running):
    process, reader = running
    os.kill(reader, signal.SIGKILL)
    _, error = process.communicate(timeout=30)
    last = error.strip().splitlines()[-1]
    assert process.returncode == 2 and "Traceback" not in error
    assert last.startswith("error: ") and "/dev/shm" in last and "--workers 0" in last


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_second_signal_ends_a_run_that_waits_for_a_reader(running, number, code):
    process, reader = running
    os.kill(reader, signal.SIGSTOP)
    time.sleep(5)  # until it has used what was read before
    process.send_signal(number)
    time.sleep(1.5)
    assert process.poll() is None
    process.send_signal(number)
    process.communicate(timeout=30)
    assert process.returncode == code
    with pytest.raises(ProcessLookupError):
        os.kill(reader, 0)


def test_an_echo_of_a_signal_waits_for_the_step_as_the_signal_does(world, tmp_path, monkeypatch):
    """torchrun passes on to its processes what they have had from the terminal already."""
    loss_of = train.locator_loss

    def interrupted(*inputs):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        return loss_of(*inputs)

    monkeypatch.setattr(train, "locator_loss", interrupted)
    with pytest.raises(SystemExit) as stop:
        train.main(train.parse_args(flags(world, tmp_path, "--steps", 3)))
    assert stop.value.code == 130 and find_checkpoint(tmp_path, 1).name == "stage1-000001"


def test_want_of_shared_memory_is_one_line(world, tmp_path):
    """No file of more than 3 MB may be made, and so no batch of 45 images in /dev/shm."""
    code = ("import resource, sys, train; from support import files;"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (3 * 10**6, 3 * 10**6));"
            "sys.exit(files.run(train.main, train.parse_args(sys.argv[1:])))")
    more = flags(world, tmp_path, "--steps", 1, "--workers", 1, "--batch-size", 45,
                 "--per-image", 1)
    done = subprocess.run([sys.executable, "-c", code, *more], cwd=REPOSITORY, timeout=120,
                          capture_output=True, text=True)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "/dev/shm" in last and "--workers 0" in last


@pytest.fixture
def start_method():
    before = multiprocessing.get_start_method()
    multiprocessing.set_forkserver_preload(["train"])
    yield lambda method: multiprocessing.set_start_method(method, force=True)
    multiprocessing.set_start_method(before, force=True)


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_readers_may_start_in_any_way(world, tmp_path, start_method, method):
    """As on Python 3.14, macOS and Windows: what they are handed is pickled. They read for stage 1
    and for its evaluation."""
    start_method(method)
    args = train.parse_args(flags(world, tmp_path, "--steps", 1, "--workers", 1))
    assert train.main(args) == 0
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["trained map, upsampled"]["sentences"] == len(RefCOCO(world, "shapes", "test"))


# ---- Processes that train ----------------------------------------------------------------------

@pytest.mark.parametrize("before, after", [((2, 1), (1, 2)), ((1, 4), (2, 2)), ((4, 1), (2, 2))])
def test_what_must_agree_is_the_number_of_parts_not_who_takes_them(world, tmp_path, monkeypatch,
                                                                   before, after):
    """processes, and --accumulate of each."""
    def settings(world_size, accumulate):
        monkeypatch.setattr(processes, "WORLD", world_size)
        args = train.parse_args(flags(world, tmp_path, "--accumulate", accumulate))
        run = runs.Run(args, 1, 3, train.stage_settings(args, 1), None)
        return run.settings

    assert settings(*before) == settings(*after)
    assert settings(*before) != settings(1, 1)


# ---- File systems ------------------------------------------------------------------------------

def raises(number):
    def call(*_):
        raise OSError(number, os.strerror(number))
    return call


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK, errno.EINVAL])
def test_a_file_system_without_locks_is_warned_about(tmp_path, monkeypatch, capsys, number):
    monkeypatch.setattr(fcntl, "lockf", raises(number))
    with runs.alone(tmp_path):
        line = capsys.readouterr().err
    assert line.startswith("warning: ") and "cannot be locked" in line and line.count("\n") == 1


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF])
def test_a_folder_that_cannot_be_synced_is_no_error_and_a_file_is(tmp_path, monkeypatch, number):
    monkeypatch.setattr(os, "fsync", raises(number))
    files.sync(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(OSError):
        files.sync(tmp_path / "file")


def test_a_run_needs_no_locks_and_no_sync_of_folders(world, tmp_path, monkeypatch, capsys):
    fsync, synced = os.fsync, []

    def of_files_alone(handle):
        synced.append(stat.S_ISDIR(os.fstat(handle).st_mode))
        raises(errno.EINVAL)() if synced[-1] else fsync(handle)

    monkeypatch.setattr(os, "fsync", of_files_alone)
    monkeypatch.setattr(fcntl, "lockf", raises(errno.ENOSYS))
    assert train.main(train.parse_args(flags(world, tmp_path, "--steps", 1))) == 0
    assert capsys.readouterr().err.count("cannot be locked") == 1
    assert set(synced) == {False, True} and find_checkpoint(tmp_path, 1).name == "stage1-000001"


def test_a_checkpoint_is_read_without_mapping_it(world, tmp_path):
    """Some network disks cannot map a file."""
    train.main(train.parse_args(flags(world, tmp_path, "--steps", 1)))
    checkpoint = find_checkpoint(tmp_path, 1)
    model = train.RISCLIP.from_pretrained(checkpoint)
    state = runs.read_training_state(checkpoint)
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()
    assert torch.is_tensor(next(model.parameters())) and state["step"] == 1


def test_what_may_be_whole_is_never_told_to_be_removed(tmp_path):
    with pytest.raises(files.DataError, match="another --out") as refused:
        with runs.unbroken(tmp_path):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
    assert not {"remove", "delete", "rm"} & set(str(refused.value).split())
