import fcntl
import json
import os
import resource
import shutil
import signal
import sys
from contextlib import contextmanager

import torch
from safetensors import SafetensorError

from support import processes
from support.checkpoint import checkpoints
from support.files import DataError, one_line, sync, write_text


@contextmanager
def stop_signals():
    """SIGTERM and Ctrl-C are noted in the list that this gives, and otherwise wait for the step to end."""
    asked = []
    before = {s: signal.signal(s, lambda number, _: asked.append(number)) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def memory_gib(device):
    """The most memory taken so far: the GPU's, or this process's resident memory."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


# ---- Checkpoints ----------------------------------------------------------------------------------------------------

def save_checkpoint(out, stage, step, save, optimizer, net, run, seen, skipped):
    """Writes --out/stageN-STEP aside, syncs it and renames it; only then goes the previous one of this stage.

    Raises DataError if the disk is full; the previous one then stays."""
    final = out / f"stage{stage}-{step:06d}"
    aside = out / f".stage{stage}.partial"  # one name, so that what a killed run leaves is taken away by the next
    shutil.rmtree(aside, ignore_errors=True)
    state = {"step": step, "seen": seen, "skipped": skipped, "run": json.dumps(run),
             "optimizer": optimizer.state_dict(), "torch_rng": torch.get_rng_state()}
    if stage == 0:
        state["net"] = net.state_dict()  # the weight file itself is in half precision
    try:
        save(aside)
        torch.save(state, aside / "training.pt")
        for path in (*aside.iterdir(), aside):
            sync(path)
    except (OSError, RuntimeError, SafetensorError) as error:  # of ours, torch's and safetensors' writers
        shutil.rmtree(aside, ignore_errors=True)
        raise DataError(f"{final} cannot be written ({one_line(error)[:160]}): the checkpoint before it is whole; "
                        "make room and go on with --resume") from error
    previous = [p for p in checkpoints(out, stage) if p != final]
    if final.exists():
        shutil.rmtree(final)
    aside.rename(final)
    sync(out)
    for path in previous:
        shutil.rmtree(path)


@contextmanager
def unbroken(checkpoint):
    """Raises DataError for whatever a training.pt that is not what save_checkpoint wrote makes fail inside."""
    try:
        yield
    except Exception as error:  # it fails in many ways; weights_only lets none of them run
        raise DataError(f"{checkpoint / 'training.pt'} is broken ({type(error).__name__}); remove {checkpoint} to "
                        "start anew") from error


def load_training_state(checkpoint, optimizer, net, run):
    """-> step, sentences seen and images skipped so far. Raises DataError if the run was started differently."""
    with unbroken(checkpoint):
        state = torch.load(checkpoint / "training.pt", map_location="cpu", weights_only=True)
        before, counts = json.loads(state["run"]), [int(state[k]) for k in ("step", "seen", "skipped")]
    changed = [f"{k} was {before.get(k)}, now {run.get(k)}" for k in run if before.get(k) != run.get(k)]
    if changed:
        raise DataError(f"--resume: {checkpoint} was trained otherwise: {'; '.join(changed)}")
    with unbroken(checkpoint):
        own = {"param_groups": optimizer.state_dict()["param_groups"]}  # settings come from the flags, not from a file
        optimizer.load_state_dict(state["optimizer"] | own)
        for p, moments in optimizer.state.items():  # load_state_dict takes any, and step() would fail
            if {k: v.shape for k, v in moments.items()} != {"step": (), "exp_avg": p.shape, "exp_avg_sq": p.shape}:
                raise ValueError
        torch.set_rng_state(state["torch_rng"])
        if "net" in state:
            net.load_state_dict(state["net"])
    return counts


def open_log(out, stage, step):
    """--out/log.jsonl to write on, without what a killed run wrote of the stage after `step`, its last checkpoint."""
    if not processes.MAIN:
        return open(os.devnull, "a")
    path, kept = out / "log.jsonl", []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else ():
        try:
            entry = json.loads(line)
            if entry["stage"] != stage or entry["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, TypeError, KeyError, RecursionError):
            continue  # cut short, or not ours
    write_text(path, "".join(kept))
    return open(path, "a")


@contextmanager
def alone(out):
    """Keeps a second run out of --out. The kernel drops the lock when the process ends, however it ends, and the
    processes that read images do not inherit it. Raises DataError if another run has it."""
    with open(out / ".lock", "a") as lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DataError(f"--out {out}: another run is writing there: wait for it, or give another --out") from error
        yield
