"""A campaign of faults: runs are killed, stopped, starved of disk and workers and fed NaN; every one has to go on.

python tests/faults/campaign.py --kills 200 --stops 20 --nans 20 --full_disks 20 --worker_kills 10

Each fault is a row of OUTPUT/faults.csv, kept as it comes: the same command goes on with what was stopped.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import os
import random
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))
    print("loading PyTorch, TorchRL and Lightning (takes a few seconds)", file=sys.stderr, flush=True)

import torch
from safetensors.torch import load_file
from tensordict import TensorDict
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer

from qsm_rl import training as rl
from qsm_rl.training.data import collection
from qsm_rl.training.runs import training_run
from qsm_rl.training.runs.callbacks import CheckpointWriter, StopSignals
from qsm_rl.training.runs.resuming import run_identity
from recipes import mujoco_qsm
from tests.training.small_trainer import Spoiled, build, env_id

HANG = 10.0  # seconds without a word from a process, or until it has ended
STARTUP = 120.0  # seconds for a run's first workers: what starts them imports everything first
CAPACITY, ROWS = 2_000, 300  # of the replay buffer, and written between two checkpoints
FINAL, PERIOD = 400, 40  # frames of a run that is stopped or spoiled, and between its checkpoints
IN_A_RUN, APART = 5, 320  # workers killed in one run at most, and frames of the run for each
COLUMNS = ("kind", "number", "recovered", "in_a_write", "unreadable", "reached", "resumed_at", "recovery", "note")
RUN = [
    *("--env", env_id("Spoiled"), "--total_frames", str(FINAL), "--checkpoint_every", str(PERIOD), "--seed", "3"),
    *("--log_every", "100", "--eval_every", "100000", "--eval_episodes", "1", "--batch_size", "8", "--num_steps", "2"),
    *("--actor_hidden_dims", "[8]", "--critic_hidden_dims", "[8]", "--replay_size", "300", "--device", "cpu"),
    *("--compile", "false", "--precision", "float32", "--warmup_frames", "20"),
]
WITH_WORKERS = [
    *RUN,
    *("--env", f"tests.training.small_trainer:{env_id('Counted')}", "--num_workers", "2", "--num_envs", "2"),
    *("--worker_backend", "process", "--frames_per_batch", "16", "--updates_per_frame", "0.5"),
    *("--checkpoint_every", "160"),
]


# --- processes --------------------------------------------------------------------------------------------------------


class Child:
    """A forked process that runs ``work(report)``; it starts warm, with everything imported."""

    def __init__(self, work: Callable[[Callable[..., None]], int | None], log: Path) -> None:
        self.begin = time.perf_counter()
        reader, writer = os.pipe()
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            self._run(work, writer, log)
        os.close(writer)
        self._reader = os.fdopen(reader, "rb", buffering=0)
        self._text = b""

    @staticmethod
    def _run(work: Callable[[Callable[..., None]], int | None], writer: int, log: Path) -> NoReturn:
        code = 70
        try:
            with log.open("a") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            code = work(lambda **said: os.write(writer, (json.dumps(said) + "\n").encode())) or 0
        except SystemExit as error:
            code = int(error.code or 0)
        except BaseException as error:  # whatever it is, it is a result of the campaign
            os.write(writer, (json.dumps({"error": f"{type(error).__name__}: {error}"[:300]}) + "\n").encode())
        finally:
            os._exit(code)

    def read(self, seconds: float) -> list[dict[str, Any]]:
        """What it says within some seconds, at once when something comes; an empty list once it has ended."""
        if not select.select([self._reader], [], [], max(0.0, seconds))[0]:
            raise TimeoutError
        self._text += os.read(self._reader.fileno(), 1 << 16)
        *lines, self._text = self._text.split(b"\n")
        return [json.loads(line) for line in lines]

    def until(self, key: str) -> dict[str, Any]:
        """The first report with a key, or the error that came in its place."""
        while True:
            said = self.read(HANG)
            for report in said:
                if key in report or "error" in report:
                    return report
            if not said and not self._text:
                return {"error": "it ended without a word"}

    def drain(self) -> list[dict[str, Any]]:
        """All that it still has to say, to its end."""
        said: list[dict[str, Any]] = []
        while new := self.read(HANG):
            said += new
        return said

    def kill(self, number: int = signal.SIGKILL) -> int:
        """Sends a signal and waits for the end; the exit code."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)
        return self.wait()

    def wait(self) -> int:
        end = time.perf_counter() + HANG
        while time.perf_counter() < end:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.005)
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        raise TimeoutError


# --- a run that does nothing but save ---------------------------------------------------------------------------------


def rows(first: int, count: int) -> TensorDict:
    """Transitions whose reward is their number."""
    number = torch.arange(first, first + count, dtype=torch.float32).reshape(1, count, 1)
    two, flag = number.expand(1, count, 2).clone(), torch.zeros(1, count, 1, dtype=torch.bool)
    following = {"observation": two, "reward": number, "done": flag, "terminated": flag.clone()}
    return TensorDict({"observation": two, "action": two, "next": following}, [1, count])


class Saver:
    """Resumes a run, checks what it finds, and saves until it is killed: with the code that training saves with."""

    def __init__(self) -> None:
        self.frames, self.module = build("Slide", total=1 << 40, checkpoint_every=ROWS)
        self.identity = run_identity(rl.QSMConfiguration(env=env_id("Slide")), self.frames.collector.env)

    def begin(self, path: Path) -> None:
        rl.RunFolder.open(rl.QSMConfiguration(env=env_id("Slide"), run_dir=path), "campaign").close()

    def run(self, path: Path, report: Callable[..., None]) -> int:
        frames, module = self.frames, self.module
        module.writer.replay = replay = TensorDictReplayBuffer(storage=LazyTensorStorage(CAPACITY), batch_size=8)
        folder = rl.RunFolder.open(rl.QSMConfiguration(env=env_id("Slide"), resume=path), "campaign")
        checkpoints, archive = rl.CheckpointFolder(folder.checkpoints), rl.ReplayArchive(folder.checkpoints / "replay")
        unreadable = len(checkpoints.frames()) - len(checkpoints.readable())
        if checkpoints.frames():
            rl.restore_checkpoint(checkpoints.newest(), module, frames, archive)
        writer = CheckpointWriter(frames, folder, archive, self.identity, StopSignals())
        marker = next(module.update.parameters())
        first = max(0, module.env_frames - CAPACITY)
        sound = replay.write_count == module.env_frames and (
            module.env_frames == 0
            or (
                bool((marker == module.env_frames).all())
                and self.stored(replay) == set(range(first, replay.write_count))
            )
        )
        report(resumed_at=module.env_frames, sound=sound, unreadable=unreadable)
        while True:
            module.writer.write(rows(module.env_frames, ROWS))
            module.env_frames += ROWS
            marker.data.fill_(module.env_frames)
            writer.run(None, module)  # type: ignore[arg-type]  # it does not look at the trainer
            report(saved=module.env_frames)

    @staticmethod
    def stored(replay: TensorDictReplayBuffer) -> set[int]:
        return {int(reward) for reward in replay[:]["next", "reward"].flatten()}


def in_a_write(path: Path) -> bool:
    return any(path.rglob("*.incomplete"))


def saved_until(child: Child, seconds: float) -> int | None:
    """The last frame that a saver says it has saved within some seconds."""
    last, end = None, time.perf_counter() + seconds
    with contextlib.suppress(TimeoutError):
        while said := child.read(end - time.perf_counter()):
            last = next((report["saved"] for report in reversed(said) if "saved" in report), last)
    return last


def resumed(saver: Saver, path: Path, reached: int, row: dict[str, Any], log: Path) -> Child:
    """Starts a saver in a folder where one has met its end, and notes whether it finds all it should."""
    child = Child(lambda report: saver.run(path, report), log)
    try:
        report = child.until("resumed_at")
    except TimeoutError:
        report = {"error": f"no word for {HANG:.0f} s"}
    row["recovery"] = round(time.perf_counter() - child.begin, 3)
    row["unreadable"] = report.get("unreadable", 1)
    row["reached"], row["resumed_at"] = reached, report.get("resumed_at", -1)
    row["recovered"] = int(report.get("sound", False) and report["resumed_at"] >= reached)
    row["note"] = report.get("error", "" if row["recovered"] else "rows or weights are not those that were saved")
    return child


def kill_while_saving(path: Path, log: Path, generator: random.Random, saver: Saver) -> dict[str, Any]:
    """SIGKILL at a random moment of a process that saves without a pause."""
    if not path.exists():
        saver.begin(path)
    child = Child(lambda report: saver.run(path, report), log)
    reached = child.until("resumed_at").get("resumed_at", 0)
    reached = saved_until(child, generator.uniform(0.0, 1.0)) or reached
    child.kill()
    reached = max([reached, *(report.get("saved", 0) for report in child.drain())])
    row: dict[str, Any] = {"in_a_write": int(in_a_write(path))}
    resumed(saver, path, reached, row, log).kill()
    return row


def fill_the_disk(path: Path, log: Path, generator: random.Random, saver: Saver) -> dict[str, Any]:
    """A file system that is full at a random moment: a small tmpfs, which takes the right to mount one."""
    disk = path.with_name("disk")
    disk.mkdir(exist_ok=True)
    if not os.path.ismount(disk):
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(disk)], check=True)
    run, filler = disk / "run", disk / "filler"
    if not run.exists():
        saver.begin(run)
    child = Child(lambda report: saver.run(run, report), log)
    reached = child.until("saved").get("saved", 0)
    # Room for a part of a checkpoint only, topped up while the saver still finds some.
    room = generator.randrange(max(file.stat().st_size for file in run.glob("checkpoints/*.pt")))
    said: list[dict[str, Any]] = []
    with filler.open("ab", buffering=0) as file:
        while True:
            with contextlib.suppress(OSError):  # the saver may be faster
                file.write(bytes(max(0, shutil.disk_usage(disk).free - room)))
            if not (new := child.read(HANG)):
                break
            said += new
    child.wait()
    reached = max([reached, *(report.get("saved", 0) for report in said)])
    error = next((report["error"] for report in said if "error" in report), "it never noticed")
    filler.unlink(missing_ok=True)
    row: dict[str, Any] = {"in_a_write": 1}
    resumed(saver, run, reached, row, log).kill()
    if "could not be written" not in error:
        row.update(recovered=0, note=error)
    return row


# --- runs that train --------------------------------------------------------------------------------------------------


def train(path: Path, report: Callable[..., None], settings: Sequence[str] = RUN) -> int:
    """The recipe, begun or resumed; says when it is about to train."""
    restore = training_run.restore_checkpoint
    begin = training_run.Trainer.fit

    def restored(state: dict[str, Any], *others: Any) -> None:
        restore(state, *others)
        report(resumed_at=state["frames"])

    def fit(trainer: Any, module: Any, frames: Any) -> None:
        Spoiled.frames = 0  # the check of the environment has stepped it
        report(training=True)
        step = module.training_step

        def reported(batch: Any, batch_idx: int) -> None:
            step(batch, batch_idx)
            report(frame=module.env_frames)

        module.training_step = reported
        begin(trainer, module, frames)

    training_run.restore_checkpoint, training_run.Trainer.fit = restored, fit
    mujoco_qsm.main(["--resume", str(path)] if path.exists() else [*settings, "--run_dir", str(path)])
    return 0


def equal(one: Any, other: Any) -> bool:
    """Whether two checkpoints are the same to the bit, replay rows included by their checksums."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(one, other)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(equal, one, other))
    return bool(one == other)


def finish(path: Path, reference: Path, row: dict[str, Any], reached: int, log: Path) -> None:
    """Resumes a run to its end, which must be that of the undisturbed run to the bit."""
    child = Child(lambda report: train(path, report), log)
    try:
        report = child.until("training") if reached < PERIOD else child.until("resumed_at")
        row["recovery"] = round(time.perf_counter() - child.begin, 3)
        row["reached"], row["resumed_at"], row["unreadable"] = reached, report.get("resumed_at", 0), 0
        child.drain()
        code = child.wait()
    except TimeoutError:
        row.update(recovered=0, note=f"no word for {HANG:.0f} s")
        return
    newest = f"checkpoints/frames-{FINAL:012d}.pt"
    same = (path / newest).exists() and equal(
        # The clock apart.
        *({**torch.load(run / newest, weights_only=True), "elapsed_seconds": 0.0} for run in (path, reference))
    )
    # Killed at the frame of a checkpoint, before it is there, a run loses all of a period.
    lost = reached - row["resumed_at"] > PERIOD
    row["recovered"] = int(code == 0 and same and not lost)
    row["note"] = "" if row["recovered"] else report.get("error", f"exit code {code}, equal: {same}")


def disturbed(path: Path, log: Path, frame: int, number: int | None) -> tuple[int, int]:
    """Trains to a frame and sends a signal, or waits for the end; the last frame reached and the exit code."""
    child = Child(lambda report: train(path, report), log)
    reached = 0
    while said := child.read(HANG):
        reached = max([reached, *(report.get("frame", 0) for report in said)])
        if number is not None and reached >= frame:
            code = child.kill(number)
            return max([reached, *(report.get("frame", 0) for report in child.drain())]), code
    return reached, child.wait()


def stop_while_training(path: Path, log: Path, generator: random.Random, reference: Path) -> dict[str, Any]:
    """SIGTERM at a random frame: the process ends by itself with 143."""
    reached, code = disturbed(path, log, generator.randrange(1, FINAL - 20), signal.SIGTERM)
    row: dict[str, Any] = {"in_a_write": int(in_a_write(path))}
    finish(path, reference, row, reached, log)
    if code != 143:
        row.update(recovered=0, note=f"exit code {code} after SIGTERM")
    shutil.rmtree(path)
    return row


def kill_while_training(path: Path, log: Path, generator: random.Random, reference: Path) -> dict[str, Any]:
    """SIGKILL at a random frame."""
    reached, _ = disturbed(path, log, generator.randrange(1, FINAL - 20), signal.SIGKILL)
    row: dict[str, Any] = {"in_a_write": int(in_a_write(path))}
    finish(path, reference, row, reached, log)
    shutil.rmtree(path)
    return row


def feed_nan(path: Path, log: Path, generator: random.Random, reference: Path) -> dict[str, Any]:
    """A reward that is NaN once, at a random frame: the process ends by itself with 1 and a dump."""
    os.environ["SPOIL_AT"] = str(generator.randrange(1, FINAL))
    reached, code = disturbed(path, log, FINAL, None)
    os.environ["SPOIL_AT"] = "0"
    row: dict[str, Any] = {"in_a_write": 0}
    dumps = list(path.glob("faults/*/batch.safetensors"))
    finish(path, reference, row, reached, log)
    if code != 1 or not dumps:
        row.update(recovered=0, note=f"exit code {code}, {len(dumps)} dumps")
    shutil.rmtree(path)
    return row


# --- runs that collect in worker processes ----------------------------------------------------------------------------


class Watched(rl.WorkerCollector):
    """Says which processes collect, when there is a batch, and how many steps of the environments a fault has cost."""

    report: Callable[..., None]
    steps: Path  # a byte for each step
    ordered_at: int | None = None  # steps before the batch under way

    def _start(self) -> None:
        super()._start()
        Watched.report(workers=[process.pid for process in self._workers.procs])

    def _attempt(self, order: Any) -> Any:
        self.ordered_at = Watched.steps.stat().st_size
        batch = super()._attempt(order)
        self.ordered_at = None
        Watched.report(batch=self.replacements)
        return batch

    def _fail(self, error: Exception, failures: int) -> None:
        super()._fail(error, failures)  # no worker is alive behind it
        Watched.report(lost=0 if self.ordered_at is None else Watched.steps.stat().st_size - self.ordered_at)


def train_with_workers(path: Path, frames: int, report: Callable[..., None]) -> int:
    """The recipe with two workers, in a process group of its own; the replay buffer keeps every frame."""
    os.setpgrp()
    Watched.report, Watched.steps = report, path.with_name("steps")
    Watched.steps.write_bytes(b"")
    os.environ["STEPS"] = str(Watched.steps)
    collection.WorkerCollector = Watched  # type: ignore[misc]
    return train(path, report, [*WITH_WORKERS, "--total_frames", str(frames), "--replay_size", str(frames)])


def true_transitions(path: Path) -> int:
    """Rows of the newest checkpoint's replay buffer that are transitions of the simulator."""
    state = rl.CheckpointFolder(path / "checkpoints").newest()
    names = [f"rows-{first:012d}-{last:012d}.safetensors" for first, last, _ in state["replay"]["segments"]]
    files = [load_file(path / "checkpoints" / "replay" / name) for name in names]
    before, push, after = (
        torch.cat([file[key] for file in files]).double() for key in ("observation", "action", "next.observation")
    )
    speed = 0.9 * before[:, 1] + 0.1 * push[:, 0]
    place = before[:, 0] + 0.2 * speed + 0.02 * push[:, 1]
    return int(torch.isclose(after, torch.stack([place, speed], -1), rtol=0, atol=1e-5).all(-1).sum())


def is_alive(group: int) -> bool:
    """Whether a process group has a process."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def kill_workers(path: Path, log: Path, generator: random.Random, count: int) -> list[dict[str, Any]]:
    """SIGKILL of worker processes at random moments of a run, which trains to its end; a row for each."""
    count = min(count, IN_A_RUN)
    frames = (count + 1) * APART
    child = Child(lambda report: train_with_workers(path, frames, report), log)
    rows: list[dict[str, Any]] = []
    workers: list[int] = []
    at, frame, killed, wrong = generator.randrange(1, APART), 0, 0.0, ""
    try:
        while said := child.read(HANG if workers else STARTUP):
            for report in said:
                workers, frame = report.get("workers", workers), report.get("frame", frame)
                wrong = report.get("error", wrong)
                if rows and "lost" in report:
                    rows[-1].update(reached=frame + report["lost"], resumed_at=frame)
                if rows and "recovery" not in rows[-1] and report.get("batch") == len(rows):
                    rows[-1]["recovery"] = round(time.perf_counter() - killed, 3)
            if frame >= at and len(rows) < count and (not rows or "recovery" in rows[-1]):
                time.sleep(generator.uniform(0.0, 0.2))
                os.kill(generator.choice(workers), signal.SIGKILL)
                killed = time.perf_counter()
                rows.append({"in_a_write": int(in_a_write(path))})
                at = len(rows) * APART + generator.randrange(1, APART)
        code, end = child.wait(), time.perf_counter() + HANG
        while is_alive(child.pid) and time.perf_counter() < end:
            time.sleep(0.05)
        if is_alive(child.pid):
            wrong = wrong or f"a process was left behind for {HANG:.0f} s"
        elif code != 0:
            wrong = wrong or f"exit code {code}"
        elif (true := true_transitions(path)) != frames:
            wrong = f"{true} of {frames} rows are transitions of the simulator"
    except TimeoutError:
        wrong = f"no word for {HANG:.0f} s"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
    checkpoints = rl.CheckpointFolder(path / "checkpoints")
    unreadable = len(checkpoints.frames()) - len(checkpoints.readable())
    for row in rows:
        row["unreadable"] = unreadable
        row["recovered"] = int(not wrong and {"recovery", "reached"} <= row.keys())
        row["note"] = wrong or ("" if row["recovered"] else "it was not replaced")
    shutil.rmtree(path)
    return rows or [{"recovered": 0, "note": wrong or "the run ended before a worker was killed"}]


# --- the campaign -----------------------------------------------------------------------------------------------------

KINDS: dict[str, tuple[Callable[..., dict[str, Any] | list[dict[str, Any]]], str]] = {
    "kills": (kill_while_saving, "SIGKILL while saving"),
    "full_disks": (fill_the_disk, "full disk while saving"),
    "stops": (stop_while_training, "SIGTERM while training"),
    "training_kills": (kill_while_training, "SIGKILL while training"),
    "nans": (feed_nan, "NaN from the environment"),
    "worker_kills": (kill_workers, "SIGKILL of a worker while training"),
}


def campaign(counts: dict[str, int], output: Path, seed: int = 0) -> list[dict[str, str]]:
    """Runs what is not in OUTPUT/faults.csv yet; all its rows."""
    output.mkdir(parents=True, exist_ok=True)
    table, log = output / "faults.csv", output / "log.txt"
    if not table.exists():
        table.write_text(",".join(COLUMNS) + "\n")
    known = list(csv.DictReader(table.open(newline="")))
    work = output / "work"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    saver, reference = Saver(), work / "reference"
    if any(counts.get(kind, 0) for kind in ("stops", "training_kills", "nans")):
        os.environ["SPOIL_AT"] = "0"
        child = Child(lambda report: train(reference, report), log)
        said = child.drain()
        if child.wait() != 0:
            raise SystemExit(f"the undisturbed run has failed, see {log}; its last words: {said[-1:]}")
    try:
        for kind, (make, name) in KINDS.items():
            number = sum(row["kind"] == kind for row in known)
            while number < (count := counts.get(kind, 0)):
                generator = random.Random(f"{seed} {kind} {number}")
                given = {"kills": saver, "full_disks": saver, "worker_kills": count - number}.get(kind, reference)
                try:
                    made = make(work / kind, log, generator, given)
                except TimeoutError:
                    made = {"recovered": 0, "note": f"no word for {HANG:.0f} s"}
                for row in made if isinstance(made, list) else [made]:
                    row = {"kind": kind, "number": number, **row}
                    known.append({column: str(row.get(column, "")) for column in COLUMNS})
                    with table.open("a", newline="") as file:
                        csv.DictWriter(file, COLUMNS, lineterminator="\n").writerow(known[-1])
                    number += 1
                    print(f"{name} {number}/{count}: {row}", file=sys.stderr, flush=True)
    finally:
        if os.path.ismount(work / "disk"):
            subprocess.run(["umount", str(work / "disk")], check=False)
    shutil.rmtree(work)
    return known


def summary(known: list[dict[str, str]]) -> str:
    """The table of a campaign, as Markdown."""
    lines = [
        "| fault | faults | in the middle of a file | went on | unreadable checkpoints | transitions lost, at most "
        "| longest recovery, s |",
        "|---|---|---|---|---|---|---|",
    ]
    for kind, (_, name) in KINDS.items():
        of_kind = [row for row in known if row["kind"] == kind]
        if of_kind:
            lost = max(int(row["reached"] or 0) - int(row["resumed_at"] or 0) for row in of_kind)
            numbers = [
                sum(int(row[column] or 0) for row in of_kind) for column in ("in_a_write", "recovered", "unreadable")
            ]
            longest = max(float(row["recovery"] or "inf") for row in of_kind)
            cells = [name, len(of_kind), *numbers, max(0, lost), f"{longest:.2f}"]
            lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for kind, (_, name) in KINDS.items():
        parser.add_argument(f"--{kind}", type=int, default=0, help=f"number of faults: {name}")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random moments")
    parser.add_argument("--output", type=Path, default=Path("faults"), help="folder of the table and the log")
    options = parser.parse_args()
    known = campaign({kind: getattr(options, kind) for kind in KINDS}, options.output, options.seed)
    print(summary(known))
    return int(any(row["recovered"] != "1" for row in known))


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
