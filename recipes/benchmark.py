"""Measures the kit's speed against a hand-written loop and JAX.

One update is a TD target at a sample of the whole chain, a step of the critics, dQ/da at the noised action, a step of
the actor, and a Polyak step. Contenders take turns in one process and are compared by the median over turns, so that
other load on the machine affects all of them alike; still, run it on an idle machine. Writes OUTPUT.json, OUTPUT.md and
OUTPUT.png.

python recipes/benchmark.py --parts update acting --jax_python ~/jax/bin/python
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    print("loading PyTorch, TorchRL and Lightning (takes a few seconds)", file=sys.stderr, flush=True)

import gymnasium
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, ScalarFormatter
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule
from torchrl.collectors import Collector
from torchrl.data import Bounded, LazyTensorStorage, TensorDictReplayBuffer

from qsm_rl import DiffusionActor, NoiseSchedule, PosteriorQScore, QScoreMatchingLoss, QValueMLP, ScoreMLP
from qsm_rl import training as rl

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))  # a script run by its path finds only its own folder
from recipes.peers.hand_written import ACTION, OBSERVATION, HandWritten  # noqa: E402

SIZE = {"steps": 5, "batch": 256, "hidden": 512, "critics": 2, "particles": 0}
GROWTH = {
    "steps": (1, 2, 5, 10, 20, 50),
    "batch": (64, 256, 1024, 4096),
    "hidden": (128, 256, 512, 1024),
    "critics": (1, 2, 4, 8),
    "particles": (8, 32, 128),
}
STACKED = "qsm_rl, CUDA graph, 8 agents stacked, updates of all"
PARTS = ("update", "acting", "frames", "growth", "start")
Row = dict[str, Any]


def make_actor(size: dict[str, int]) -> DiffusionActor:
    return DiffusionActor(
        ScoreMLP(OBSERVATION, ACTION, (size["hidden"],) * 2),
        action_spec=Bounded(-1.0, 1.0, (ACTION,)),
        noise_schedule=NoiseSchedule.vp(size["steps"]),
    )


def make_update(size: dict[str, int], device: torch.device, **options: Any) -> rl.QSMUpdate:
    """The kit's update, built as in recipes/mujoco_qsm.py."""
    critics = [
        TensorDictModule(
            QValueMLP(OBSERVATION, ACTION, (size["hidden"],) * 2), ["observation", "action"], ["state_action_value"]
        )
        for _ in range(size["critics"])
    ]
    target = PosteriorQScore(1.0, size["particles"]) if size["particles"] else None
    loss = QScoreMatchingLoss(make_actor(size), critics, score_target=target, deactivate_vmap=device.type == "cpu").to(
        device
    )
    loss.make_value_estimator(gamma=0.99)
    return rl.QSMUpdate(loss, actor_learning_rate=3e-4, critic_learning_rate=3e-4, tau=0.005, **options)


def make_batch(size: int, device: torch.device) -> TensorDict:
    following = {"observation": torch.randn(size, OBSERVATION), "reward": torch.randn(size, 1)}
    following |= {name: torch.zeros(size, 1, dtype=torch.bool) for name in ("done", "terminated")}
    entries = {"observation": torch.randn(size, OBSERVATION), "action": torch.rand(size, ACTION) * 2 - 1}
    return TensorDict({**entries, "next": following}, [size]).to(device)


def draw_together(replay: TensorDictReplayBuffer) -> Iterator[TensorDictBase]:
    """Batches drawn as in a run, sixteen at a time."""
    while True:
        yield from replay.sample(16 * SIZE["batch"]).split(SIZE["batch"])


def take_turns(contenders: dict[str, Callable[[], object]], seconds: float, device: torch.device) -> dict[str, float]:
    """Calls per second of each contender: the median over turns of a few calls each."""
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    calls = {}
    for name, call in contenders.items():  # warms up, and sizes a turn to last about a third of a second
        for _ in range(5):  # the fourth call records a CUDA graph
            call()
        synchronize()
        begin = time.perf_counter()
        call()
        synchronize()
        calls[name] = max(1, round(0.3 / (time.perf_counter() - begin)))
    end = time.perf_counter() + seconds * len(contenders)
    while time.perf_counter() < end or len(next(iter(rates.values()))) < 3:
        for name, call in contenders.items():
            begin = time.perf_counter()
            for _ in range(calls[name]):
                call()
            synchronize()
            rates[name].append(calls[name] / (time.perf_counter() - begin))
    return {name: statistics.median(values) for name, values in rates.items()}


def measure_update(seconds: float, device: torch.device, jax_python: str | None) -> list[Row]:
    batch = make_batch(SIZE["batch"], device)
    replay = TensorDictReplayBuffer(storage=LazyTensorStorage(100_000, device=device))
    replay.extend(make_batch(100_000, device))
    eager = make_update(SIZE, device)
    best = rl.choose_arithmetic(rl.QSMConfiguration(), device)
    rl.set_products(best.precision, device)
    on_gpu, agents = device.type == "cuda", 1
    fastest = make_update(SIZE, device, precision=best.precision, compile=best.compile, cuda_graph=on_gpu)
    plain = "tf32" if on_gpu and best.precision != "float32" else "float32"  # the result of set_products
    floor, name = HandWritten(SIZE, device), f"qsm_rl, {best.precision}{', compiled' if best.compile else ''}"
    contenders = {
        f"hand-written PyTorch, {plain}": lambda: floor.update(batch),
        f"qsm_rl, {plain}": lambda: eager(batch.copy()),
        f"qsm_rl, {plain}, with replay sampling": lambda: eager(replay.sample(SIZE["batch"])),
        name: lambda: fastest(batch.copy()),
    }
    if on_gpu:
        graphed, agents = make_update(SIZE, device, cuda_graph=True), 8
        stacked = rl.StackedUpdate([make_update(SIZE, device) for _ in range(agents)], range(agents), cuda_graph=True)
        batches = torch.stack([make_batch(SIZE["batch"], device) for _ in range(agents)], 1)
        drawn = draw_together(replay)
        contenders |= {
            "qsm_rl, CUDA graph": lambda: graphed(batch.copy()),
            f"{name}, with replay sampling": lambda: fastest(replay.sample(SIZE["batch"])),
            f"{name}, with replay sampling as recipes do": lambda: fastest(next(drawn)),
            STACKED: lambda: stacked(batches),
        }
    peer = "JAX, one jitted function"
    before = measure_jax(jax_python, seconds)
    rates = take_turns(contenders, seconds, device)
    if before is not None:
        rates[peer] = statistics.mean([before, measure_jax(jax_python, seconds) or before])
    floor_rate = rates[f"hand-written PyTorch, {plain}"]
    if STACKED in rates:
        rates[STACKED] *= agents
    rows = [
        {"part": "update", "what": name, "per_second": rate, "ratio": rate / floor_rate} for name, rate in rates.items()
    ]
    if peer not in rates:
        print(
            "JAX is not compared; to include it, pass a Python with jax and optax: --jax_python PATH", file=sys.stderr
        )
    return rows


def child(script: Path, *arguments: object, python: str | None = None) -> Row:
    """The JSON that a script prints when run in a separate process."""
    command = [python or sys.executable, str(script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise rl.UserError(f"{script.name} failed: {(done.stderr.strip() or 'no output').splitlines()[-1]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def measure_jax(python: str | None, seconds: float) -> float | None:
    if python is None and importlib.util.find_spec("jax") is None:
        return None
    flags = [part for name in ("hidden", "steps", "batch") for part in (f"--{name}", SIZE[name])]
    done = child(HERE / "peers" / "jax_qsm.py", "--seconds", seconds, *flags, python=python)
    return float(done["updates_per_second"])


def measure_acting(seconds: float, device: torch.device) -> list[Row]:
    actor, floor = make_actor(SIZE).to(device), HandWritten(SIZE, device)
    rows = []
    for count in (1, 64):
        tensordict = make_batch(count, device).select("observation")
        with torch.no_grad():
            rates = take_turns(
                {
                    "hand-written chain": lambda td=tensordict: floor.sample(td["observation"]),
                    "actor(td)": lambda td=tensordict: actor(td),
                },
                seconds,
                device,
            )
        bare = rates["hand-written chain"]
        rows += [
            {"part": "acting", "what": f"{name}, {count} observations", "per_second": rate, "ratio": rate / bare}
            for name, rate in rates.items()
        ]
    return rows


def measure_collection(seconds: float, device: torch.device, env: str = "HalfCheetah-v5", count: int = 8) -> list[Row]:
    """Measures collection alone, against Gymnasium's own vectorised stepping with the same network."""
    environment = rl.make_environment(env, num_envs=count, seed=0)
    spec = environment.action_spec_unbatched
    observation_dim = environment.observation_spec["observation"].shape[-1]
    network = ScoreMLP(observation_dim, spec.shape[-1], (SIZE["hidden"],) * 2)
    actor = DiffusionActor(network, action_spec=spec, noise_schedule=NoiseSchedule.vp(SIZE["steps"]))
    collector = Collector(
        environment,
        actor,
        frames_per_batch=count,
        total_frames=-1,
        track_traj_ids=False,
        auto_register_policy_transforms=False,
    )
    batches = iter(collector)
    plain = gymnasium.make_vec(env, count, vectorization_mode="sync")
    state = {"observation": plain.reset(seed=0)[0]}

    @torch.no_grad()
    def step() -> None:
        action = actor.sample(torch.as_tensor(state["observation"], dtype=torch.float32))
        state["observation"] = plain.step(action.numpy())[0]

    rates = take_turns({"gymnasium, vectorised": step, "collector": lambda: next(batches)}, seconds, device)
    collector.shutdown()
    plain.close()
    bare = rates["gymnasium, vectorised"]
    return [
        {"part": "frames", "what": f"{name}, {count} x {env}", "per_second": rate * count, "ratio": rate / bare}
        for name, rate in rates.items()
    ]


def measure_recipe(seconds: float, device: torch.device) -> list[Row]:
    """Measures frames of the whole recipe at one update per frame against the same updates alone, taking turns."""
    script, turns = HERE / "peers" / "recipe_frames.py", max(3, round(seconds))
    rows = []
    for hidden, steps in ((SIZE["hidden"], SIZE["steps"]), (256, 10)):
        for batch in (1, 10):
            sizes = ("--hidden", hidden, "--steps", steps, "--frames_per_batch", batch)
            rows += child(script, *sizes, "--turns", turns, "--device", device)["rows"]
    return rows


def measure_growth(seconds: float) -> list[Row]:
    """Measures each point in a separate process, which also reports its peak memory, libraries included."""
    rows = []
    for axis, values in GROWTH.items():
        for value in values:
            point = json.dumps({**SIZE, axis: value})
            measured = child(Path(__file__), "--point", point, "--seconds", seconds)
            row = {"part": "growth", "what": f"{axis} {value}", "axis": axis, "value": value, **measured}
            rows.append(row)
        first = rows[-len(values)]
        for row in rows[-len(values) :]:
            row["ratio"] = row["per_second"] / first["per_second"]
    return rows


def measure_point(size: dict[str, int], seconds: float) -> Row:
    device = torch.device("cpu")
    update, batch = make_update(size, device), make_batch(size["batch"], device)
    rate = take_turns({"": lambda: update(batch.copy())}, seconds, device)[""]
    unit = 2**20 if sys.platform == "darwin" else 2**10  # macOS counts bytes, Linux kibibytes
    return {"per_second": rate, "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit}


def measure_start() -> list[Row]:
    rows = []
    for module in ("torchrl.objectives, torchrl.collectors, torchrl.envs", "qsm_rl"):
        times = []
        for _ in range(3):
            begin = time.perf_counter()
            subprocess.run([sys.executable, "-c", f"import {module}"], check=True, capture_output=True)
            times.append(time.perf_counter() - begin)
        rows.append({"part": "start", "what": f"import {module}", "seconds": statistics.median(times)})
    first_frame = child(HERE / "peers" / "first_frame.py")
    rows.append({"part": "start", "what": "from the recipe's command to its first frame, not compiled", **first_frame})
    for row in rows:
        row["ratio"] = row["seconds"] / rows[0]["seconds"]
    return rows


def write_report(rows: Sequence[Row], about: Row, output: Path) -> None:
    rl.make_folder(output.parent)
    output.with_suffix(".json").write_text(json.dumps({**about, "rows": list(rows)}, indent=1) + "\n", encoding="utf-8")
    lines = ["| part | what | per second | ratio | |", "|---|---|---|---|---|"]
    for row in rows:
        amount = f"{row['per_second']:.4g}" if "per_second" in row else f"{row['seconds']:.1f} s each"
        note = f"{row['peak_mib']:.0f} MiB" if "peak_mib" in row else ""
        note += f"{row['processor_ratio']:.2f} by processor time" if "processor_ratio" in row else ""
        lines.append(f"| {row['part']} | {row['what']} | {amount} | {row['ratio']:.2f} | {note} |")
    text = "\n".join(lines) + "\n"
    output.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)
    growth = [row for row in rows if row["part"] == "growth"]
    if not growth:
        return
    figure = Figure(figsize=(9, 5.4), dpi=110, layout="constrained")
    panels = figure.subplots(2, 3, sharey=True).flatten()
    for axes in panels[len(GROWTH) :]:
        axes.remove()
    for axes, axis in zip(panels, GROWTH, strict=False):
        points = [(row["value"], 1000 / row["per_second"]) for row in growth if row["axis"] == axis]
        axes.plot(*zip(*points, strict=True), marker="o", markersize=3)
        axes.set(xscale="log", yscale="log", xlabel=axis, ylabel="ms for an update" if axes in panels[::3] else "")
        axes.set_xticks(GROWTH[axis], labels=[str(value) for value in GROWTH[axis]])
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(ScalarFormatter())
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(output.with_suffix(".png"))


@rl.exit_on_error
def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to measure; default all")
    parser.add_argument(
        "--seconds", type=float, default=5.0, help="seconds to measure each contender or point; default %(default)s"
    )
    parser.add_argument(
        "--device",
        default="auto",
        help="auto, cpu or cuda; growth and start are always measured on the CPU; default %(default)s",
    )
    parser.add_argument("--jax_python", help="path of a Python with jax and optax, for the comparison with JAX")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("runs/benchmark"),
        help="files to write, without extension; default %(default)s",
    )
    parser.add_argument("--point", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    device = rl.choose_device(options.device)
    threads = rl.limit_threads(device)
    torch.manual_seed(0)
    if options.point:
        print(json.dumps(measure_point(json.loads(options.point), options.seconds)))
        return 0
    measure: dict[str, Callable[[], list[Row]]] = {
        "update": lambda: measure_update(options.seconds, device, options.jax_python),
        "acting": lambda: measure_acting(options.seconds, device),
        "frames": lambda: measure_collection(options.seconds, device) + measure_recipe(options.seconds, device),
        "growth": lambda: measure_growth(options.seconds),
        "start": measure_start,
    }
    rows = []
    for part in options.parts:
        print(f"measuring {part}", file=sys.stderr, flush=True)
        rows += measure[part]()
    about = {"torch": torch.__version__, "machine": platform.machine(), "cores": os.cpu_count(), "threads": threads}
    write_report(rows, {**about, "device": str(device), "size": SIZE, "command": " ".join(sys.argv)}, options.output)
    return 0


if __name__ == "__main__":
    main(sys.argv[1:])
