"""What makes a run resumable and the same on any number of processes: resume, log, save, stop."""

import json
import math
import os
import shutil
import signal
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from tqdm import tqdm

from support import processes
from support.checkpoint import checkpoints, find_checkpoint
from support.files import DataError, one_line, sync, write_text
from support.pictures import draw_curve

try:
    import fcntl
    import resource
except ImportError:  # Windows: no lock on --out, no memory in the log
    fcntl = resource = None


class Run:
    """A stage's way from its first step, or its newest checkpoint in --out, to its last.

        with Run(...) as run:
            run.resume(net, optimizer)
            while run.goes_on(): ...; run.end_step(tally, lr)
        run.sound()

    A kill at any moment costs no bit of the result. SIGTERM and Ctrl-C wait for the step to end,
    which then is saved; a second one ends the process at once.
    """

    def __init__(self, args, stage, steps, settings, save):
        """settings: what must agree when the run is resumed. save(directory): writes weights."""
        self.out, self.device, self.accumulate = args.out, args.device, args.accumulate
        self.stage, self.steps, self.save = stage, steps, save
        self.save_every = settings["save_every"]
        # A step is the same however its batch is split into parts.
        self.settings = {**settings, "stage": stage, "steps": steps, "seed": args.seed,
                         "dataset": args.dataset, "accumulate": args.accumulate * processes.WORLD}
        self.step = self.seen = self.skipped = self.bad = self.stopped = 0
        self.asked, self.patience = [], math.inf  # signals that have come; when one more ends all

    def resume(self, net, optimizer):
        """Takes up the stage's newest checkpoint in --out, if there is one."""
        self.net, self.optimizer = net, optimizer
        if newest := find_checkpoint(self.out, self.stage):
            self.step, self.seen, self.skipped = load_training_state(newest, optimizer, net,
                                                                     self.settings)
            if self.step == self.steps:
                print(f"{newest} is finished: nothing left to train in stage {self.stage}")
        self.log = open_log(self.out, self.stage, self.step)
        self.bar = tqdm(total=self.steps, initial=self.step, desc=f"stage {self.stage}",
                        disable=not processes.MAIN)
        self.clock, self.since = time.time(), self.seen

    def __enter__(self):
        self.handlers = {s: signal.signal(s, self.note) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def note(self, number, frame):
        """Notes a signal. Before a second has passed, another may be torchrun's, which passes on
        what its processes have had already."""
        if time.monotonic() > self.patience:
            raise SystemExit(128 + number)
        self.asked.append(number)
        self.patience = min(self.patience, time.monotonic() + 1)

    def __exit__(self, *error):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        if hasattr(self, "log"):
            self.log.close()
            self.bar.close()

    def goes_on(self):
        return self.step < self.steps and not self.stopped

    def end_step(self, tally, lr):
        """Logs the step and saves it when it is time."""
        self.step += 1
        self.seen, self.skipped = self.seen + tally.count, self.skipped + tally.lost
        self.bad = 0 if tally.finite else self.bad + 1
        self.stopped = tally.stopped
        last = self.step == self.steps
        if tally.count and (self.step % 10 == 0 or last or not tally.finite):
            self.write_line(tally, lr)
        self.bar.update()
        if self.bad == 5:
            raise SystemExit(f"stage {self.stage} stopped at step {self.step}: the loss was not "
                             "finite 5 times in a row; the last good checkpoint is in "
                             f"{self.out}")
        if processes.MAIN and (self.step % self.save_every == 0 or last or self.stopped):
            save_checkpoint(self)

    def write_line(self, tally, lr):
        now, loss = time.time(), tally.total / tally.count
        line = {"stage": self.stage, "step": self.step, "loss": loss, "lr": lr,
                "samples_per_s": (self.seen - self.since) / (now - self.clock),
                "memory_gib": memory_gib(self.device)}
        self.clock, self.since = now, self.seen
        if not tally.finite:
            line |= {"skipped_step": True, "sent_ids": tally.sent_ids}
        print(json.dumps(line), file=self.log, flush=True)
        self.bar.set_postfix(loss=f"{loss:.3f}", lr=f"{lr:.1e}")

    def sound(self):
        """-> whether no more than 1 % of the samples had to be skipped. Draws the curve.

        Raises SystemExit if a signal stopped the run, DataError if no sample could be read.
        """
        processes.gather(None)  # what follows reads the checkpoint
        if self.stopped:
            if processes.MAIN:
                print(f"stopped at step {self.step} of {self.steps}; continue with --resume",
                      file=sys.stderr)
            raise SystemExit(128 + self.stopped)
        if self.step and not self.seen:
            raise DataError(f"none of {self.settings['dataset']}'s samples could be read: see "
                            "`python data.py check`")
        sound = self.skipped <= 0.01 * (self.seen + self.skipped)
        if processes.MAIN:
            draw_curve(self.out)
            if self.skipped:
                print(f"{self.skipped} samples were skipped: image or mask missing or broken",
                      file=sys.stderr)
            if not sound:
                print(f"more than 1 % of {self.seen + self.skipped} samples were skipped: see "
                      "`python data.py check`", file=sys.stderr)
        return sound


class Tally:
    """What a step adds up, over its parts and over all processes.

    Each process takes its parts of every batch, and gradients are summed. So a step is that of one
    process with as many parts. Batch norm sees a part at a time (SyncBatchNorm needs CUDA, and no
    empty part); its running statistics become the processes' mean.
    """

    def __init__(self, net):
        self.net = net
        self.trained = [p for p in net.parameters() if p.requires_grad]
        self.buffers = [b.clone() for b in net.buffers()]
        self.total, self.count, self.lost, self.sent_ids = 0.0, 0, 0, []

    def add(self, loss, part):
        """loss: the sum over the part's sentences, None where all its images are broken."""
        self.lost += part["lost"]
        if loss is not None:
            self.total += loss.item()
            self.count += len(part["texts"])
            self.sent_ids += part.get("sent_ids", [])

    def share(self, asked):
        """Sums over the processes, gradients to their mean over the step's sentences. asked: the
        signals that have come here."""
        own = self.count
        shares = processes.gather((self.total, self.count, self.lost, self.sent_ids,
                                   max(asked, default=0)))
        self.total, self.count, self.lost = (sum(share[i] for share in shares) for i in range(3))
        self.sent_ids = [i for share in shares for i in share[3]]
        self.stopped = max(share[4] for share in shares)
        if processes.WORLD > 1 and self.count:
            self.add_up(own)
        gradients = [p.grad for p in self.trained if p.grad is not None]
        for g in gradients:
            g /= self.count
        self.finite = math.isfinite(self.total + torch.nn.utils.get_total_norm(gradients))

    def add_up(self, own):
        """Sums gradients, averages running statistics. own: this process's sentences."""
        for p in self.trained:  # None where all of a process's images are broken
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        running = [b for name, b in self.net.named_buffers() if "running_" in name]
        for b in running:
            b *= own / self.count
        processes.add_up([*(p.grad for p in self.trained), *running])

    def undo(self):
        """As if the step had not been: batch norm has seen what is not finite."""
        for b, before in zip(self.net.buffers(), self.buffers):
            b.copy_(before)


def next_part(stream, device):
    """The next part of a batch, on the device."""
    return {k: v.to(device) if torch.is_tensor(v) else v for k, v in next(stream).items()}


def memory_gib(device):
    """The most memory taken so far: the GPU's, or this process's resident memory."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if resource is None:
        return None
    unit = 2**30 if sys.platform == "darwin" else 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


# ---- Checkpoints -------------------------------------------------------------------------------

def save_checkpoint(run):
    """Writes --out/stageN-STEP aside, syncs and renames it. Only then the one before goes.

    Raises DataError if the disk is full; the one before then stays.
    """
    final = run.out / f"stage{run.stage}-{run.step:06d}"
    aside = run.out / f".stage{run.stage}.partial"  # one name: the next run clears a killed one's
    shutil.rmtree(aside, ignore_errors=True)
    state = {"step": run.step, "seen": run.seen, "skipped": run.skipped,
             "run": json.dumps(run.settings), "optimizer": run.optimizer.state_dict(),
             "torch_rng": torch.get_rng_state()}
    if run.stage == 0:
        state["net"] = run.net.state_dict()  # the weight file itself is in half precision
    try:
        run.save(aside)
        torch.save(state, aside / "training.pt")
        for path in (*aside.iterdir(), aside):
            sync(path)
    except (OSError, RuntimeError, SafetensorError) as error:  # ours, torch's, safetensors'
        shutil.rmtree(aside, ignore_errors=True)
        raise DataError(f"{final} cannot be written ({one_line(error)[:160]}): the checkpoint "
                        "before it is whole; make room and continue with --resume") from error
    previous = [p for p in checkpoints(run.out, run.stage) if p != final]
    if final.exists():
        shutil.rmtree(final)
    aside.rename(final)
    sync(run.out)
    for path in previous:
        shutil.rmtree(path)


@contextmanager
def unbroken(checkpoint):
    """Raises DataError for whatever a training.pt makes fail inside that save_checkpoint did not
    write."""
    try:
        yield
    except Exception as error:  # it fails in many ways; weights_only lets none of them run
        raise DataError(f"{checkpoint / 'training.pt'} cannot be used ({type(error).__name__}): "
                        "if it is broken, give another --out to start anew") from error


def read_training_state(checkpoint):
    """-> a checkpoint's training.pt as save_checkpoint wrote it; nothing in it runs."""
    return torch.load(Path(checkpoint) / "training.pt", map_location="cpu", weights_only=True)


def load_training_state(checkpoint, optimizer, net, settings):
    """-> step, sentences seen and samples skipped so far. Raises DataError if the run was started
    with other settings."""
    with unbroken(checkpoint):
        state = read_training_state(checkpoint)
        before = json.loads(state["run"])
        counts = [int(state[k]) for k in ("step", "seen", "skipped")]
    changed = [f"{k} was {before.get(k)}, now {v}" for k, v in settings.items()
               if before.get(k) != v]
    if changed:
        raise DataError(f"--resume: {checkpoint} was trained otherwise: {'; '.join(changed)}")
    with unbroken(checkpoint):
        # Settings come from the flags, not from a file.
        own = {"param_groups": optimizer.state_dict()["param_groups"]}
        optimizer.load_state_dict(state["optimizer"] | own)
        for p, moments in optimizer.state.items():  # any shape loads, and step() would fail
            shapes = {k: v.shape for k, v in moments.items()}
            if shapes != {"step": (), "exp_avg": p.shape, "exp_avg_sq": p.shape}:
                raise ValueError
        torch.set_rng_state(state["torch_rng"])
        if "net" in state:
            net.load_state_dict(state["net"])
    return counts


# ---- Files in --out ----------------------------------------------------------------------------

def open_log(out, stage, step):
    """--out/log.jsonl to write on, without what a killed run wrote of the stage after `step`."""
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


def check_stage_1(out):
    """Raises DataError unless --out holds a finished stage 1."""
    first = find_checkpoint(out, 1)
    if first is None:
        raise DataError(f"stage 2 needs stage 1, and --out {out} has no stage1-*: run --stage 1 "
                        "first")
    if (first / "training.pt").exists():
        with unbroken(first):
            state = read_training_state(first)
            step, steps = int(state["step"]), int(json.loads(state["run"])["steps"])
        if step < steps:
            raise DataError(f"stage 1 in --out {out} stopped at step {step} of {steps}: finish it "
                            "with --stage 1 --resume")


@contextmanager
def alone(out):
    """Keeps a second run out of --out. The kernel drops the lock when the process ends, however it
    ends; the processes that read images do not inherit it. Where the file system has no locks, a
    line on stderr says so.

    Raises DataError if another run has the lock.
    """
    with open(out / ".lock", "a") as lock:
        try:
            if fcntl is None:
                raise OSError("this system has no fcntl")
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DataError(f"--out {out}: another run is writing there: wait for it, or give "
                            "another --out") from error
        except OSError as error:
            print(f"warning: --out {out} cannot be locked ({error}): start no second run there",
                  file=sys.stderr)
        yield
