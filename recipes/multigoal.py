"""Several goals of unequal worth: who keeps all of them?

python recipes/multigoal.py

A point starts in the middle of a plane, among four goals worth 1, 0.9, 0.8 and 0.7 (the QSM paper's continuous
gridworld, with unequal goals). Q-score matching with several score targets and TorchRL's SAC, whose policy is a single
Gaussian, are trained online in this environment, with the same network sizes, replay buffer and number of updates. They
are compared with the soft-optimal policy, computed by value iteration on a grid; it equals exp(Q / temperature) if the
backup includes the entropy bonus. Writes a figure of the trajectories, and a table of the share of each goal and the
spread of the first action.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

if __name__ == "__main__":
    print("loading PyTorch and TorchRL (takes a few seconds)", file=sys.stderr, flush=True)

import gymnasium
import numpy as np
import torch
from gymnasium.spaces import Box
from matplotlib.figure import Figure
from matplotlib.patches import Circle
from tensordict import TensorDictBase
from tensordict.nn import NormalParamExtractor, TensorDictModule
from torch import Tensor, nn
from torchrl.collectors import Collector
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
from torchrl.envs import EnvBase, ExplorationType, set_exploration_type
from torchrl.modules import ProbabilisticActor, TanhNormal
from torchrl.objectives import SACLoss, SoftUpdate
from tqdm import tqdm

from qsm_rl import (
    BoltzmannQScore,
    DDPMSampler,
    DiffusionActor,
    EntropyBonus,
    NoiseSchedule,
    NormalizedQScore,
    PosteriorQScore,
    QScoreMatchingLoss,
    QValueMLP,
    ScaledQScore,
    ScoreMLP,
    ScoreTarget,
)
from qsm_rl import training as rl
from qsm_rl.atomic_files import write_csv_atomically

GOALS = np.array([[0.8, 0.0], [0.0, 0.8], [-0.8, 0.0], [0.0, -0.8]])
REWARDS = np.array([1.0, 0.9, 0.8, 0.7])
RADIUS = 0.2
SPEED = 0.25
GAMMA = 0.6  # a far-sighted agent may turn round at any time, so its first direction hardly matters
HIDDEN = (64, 64)
EPISODES = 200
TEMPERATURE = 0.1  # in units of Q, whose best value in the middle is gamma^2 = 0.36
TARGETS: dict[str, Callable[[], ScoreTarget]] = {
    "posterior": lambda: PosteriorQScore(TEMPERATURE, 32),
    "posterior, no bonus": lambda: PosteriorQScore(TEMPERATURE, 32),
    "boltzmann": lambda: BoltzmannQScore(TEMPERATURE),
    "normalized": lambda: NormalizedQScore(0.1),
    "scaled": lambda: ScaledQScore(50.0),
}
WITH_BONUS = ("posterior", "boltzmann")


class MultiGoal(gymnasium.Env):
    """A point in [-1, 1]^2 that starts near the middle; the episode ends at the first goal that it comes near to."""

    observation_space = Box(-1, 1, (2,), np.float32)
    action_space = Box(-1, 1, (2,), np.float32)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.place = self.np_random.normal(0, 0.05, 2)
        return self.place.astype(np.float32), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        push = np.asarray(action, np.float64)
        push = push / max(1.0, np.linalg.norm(push))  # the same speed in every direction
        self.place = np.clip(self.place + SPEED * push, -1, 1)
        goal = nearest_goal(self.place)
        reward = 0.0 if goal is None else float(REWARDS[goal])
        return self.place.astype(np.float32), reward, goal is not None, False, {}


def nearest_goal(place: np.ndarray) -> int | None:
    """The goal within reach, if there is one."""
    distances = np.linalg.norm(GOALS - place, axis=1)
    return int(distances.argmin()) if distances.min() < RADIUS else None


gymnasium.register("qsm_rl/MultiGoal-v0", MultiGoal, max_episode_steps=50)


def make_critics() -> list[TensorDictModule]:
    return [
        TensorDictModule(QValueMLP(2, 2, HIDDEN), ["observation", "action"], ["state_action_value"]) for _ in range(2)
    ]


def make_qsm(environment: EnvBase, target: str) -> tuple[nn.Module, Callable[[TensorDictBase], object]]:
    """A diffusion policy and its update."""
    actor = DiffusionActor(
        ScoreMLP(2, 2, HIDDEN),
        action_spec=environment.action_spec_unbatched,
        noise_schedule=NoiseSchedule.cosine(10),
        sampler=DDPMSampler(clip="clean"),
    )
    # The mean of the critics: their minimum would penalise goals that are seen less often, which are then seen even
    # less.
    loss = QScoreMatchingLoss(
        actor,
        make_critics(),
        score_target=TARGETS[target](),
        score_critics="target",
        target_aggregation="mean",
        entropy_bonus=EntropyBonus(TEMPERATURE, 8) if target in WITH_BONUS else None,
    )
    loss.make_value_estimator(gamma=GAMMA)
    return actor, rl.QSMUpdate(loss, actor_learning_rate=1e-3, critic_learning_rate=1e-3, tau=0.02)


def make_sac(environment: EnvBase) -> tuple[nn.Module, Callable[[TensorDictBase], object]]:
    """TorchRL's SAC with its own temperature tuning."""
    spec = environment.action_spec_unbatched
    network = nn.Sequential(
        *(nn.Linear(2, HIDDEN[0]), nn.ReLU(), nn.Linear(*HIDDEN), nn.ReLU()),
        *(nn.Linear(HIDDEN[1], 4), NormalParamExtractor()),
    )
    actor = ProbabilisticActor(
        TensorDictModule(network, ["observation"], ["loc", "scale"]),
        spec=spec,
        in_keys=["loc", "scale"],
        distribution_class=TanhNormal,
        return_log_prob=False,
    )
    loss = SACLoss(actor, make_critics(), target_entropy=-2.0, action_spec=spec, loss_function="l2")
    loss.make_value_estimator(gamma=GAMMA)
    optimizer = torch.optim.Adam(loss.parameters(), lr=1e-3)
    targets = SoftUpdate(loss, tau=0.02)

    def update(batch: TensorDictBase) -> None:
        losses = loss(batch)
        optimizer.zero_grad()
        sum(losses[name] for name in ("loss_actor", "loss_qvalue", "loss_alpha")).backward()
        optimizer.step()
        targets.step()

    return actor, update


def train(name: str, frames: int, seed: int) -> tuple[nn.Module, np.ndarray]:
    """Trains online, with one update per two frames after the random ones; returns the policy and its episodes."""
    torch.manual_seed(seed)
    environment = rl.make_environment("qsm_rl/MultiGoal-v0", num_envs=10, seed=seed)
    policy, update = make_sac(environment) if name == "sac" else make_qsm(environment, name)
    replay = TensorDictReplayBuffer(storage=LazyTensorStorage(frames), batch_size=256)
    collector = Collector(
        environment,
        policy,
        frames_per_batch=20,
        total_frames=frames,
        init_random_frames=min(2_000, frames // 3),
        track_traj_ids=False,
        auto_register_policy_transforms=False,
        exploration_type=ExplorationType.RANDOM,
    )
    bar = tqdm(total=frames, desc=name, unit=" frames")
    for batch in collector:
        replay.extend(batch.reshape(-1))
        if len(replay) > min(2_000, frames // 3):
            for _ in range(batch.numel() // 2):
                update(replay.sample())
        bar.update(batch.numel())
    bar.close()
    return policy, roll_out(policy, seed)


@torch.no_grad()
def roll_out(policy: nn.Module, seed: int) -> np.ndarray:
    """Positions in ``EPISODES`` episodes, ``(episodes, steps, 2)``; NaN after the end."""
    environment = rl.make_environment("qsm_rl/MultiGoal-v0", num_envs=EPISODES, seed=seed + 1_000)
    with set_exploration_type(ExplorationType.RANDOM):
        rollout = environment.rollout(50, policy, break_when_any_done=False, auto_reset=True)
    places = torch.cat([rollout["observation"][:, :1], rollout["next", "observation"]], 1).double().numpy()
    for episode, done in zip(places, rollout["next", "done"].squeeze(-1), strict=True):
        if done.any():
            episode[int(done.int().argmax()) + 2 :] = np.nan
    environment.close()
    return places


@torch.no_grad()
def measure(policy: nn.Module, places: np.ndarray) -> dict[str, float]:
    """Share of each goal, mean return, and spread of the action in the middle (0.58 for uniform actions)."""
    ends = [episode[~np.isnan(episode[:, 0])][-1] for episode in places]
    goals = [nearest_goal(end) for end in ends]
    with set_exploration_type(ExplorationType.RANDOM):
        action = policy(observation=torch.zeros(1_000, 2))
    action = action if isinstance(action, Tensor) else action[-1]
    return shares_row([-1 if goal is None else goal for goal in goals], action.std(0).mean().item())


def shares_row(goals: list[int], spread: float) -> dict[str, float]:
    """A row of the table, computed from the goal of each episode (-1 for none)."""
    shares = [goals.count(goal) / len(goals) for goal in range(len(GOALS))]
    entropy = -sum(share * math.log(share) for share in shares if share > 0)
    return {
        **{f"goal worth {reward}": share for reward, share in zip(REWARDS, shares, strict=True)},
        "none": goals.count(-1) / len(goals),
        "mean reward": float(np.dot(shares, REWARDS)),
        "goals kept": math.exp(entropy),
        "spread of the first action": spread,
    }


def soft_optimal(temperature: float, seed: int, size: int = 41, pushes: int = 13) -> dict[str, float]:
    """The row of the soft-optimal policy: value iteration on a grid of positions and actions, then episodes.

    Args:
        temperature: lambda of ``V(s) = lambda log(integral of exp(Q(s, a) / lambda) over the box)``.
        seed: seed of the episodes.
        size: grid positions along each side, with bilinear interpolation between them.
        pushes: actions along each side of the box.
    """
    line = np.linspace(-1, 1, size)
    places = np.stack(np.meshgrid(line, line, indexing="ij"), -1).reshape(-1, 2)
    middles = -1 + (2 * np.arange(pushes) + 1) / pushes
    actions = np.stack(np.meshgrid(middles, middles, indexing="ij"), -1).reshape(-1, 2)
    steps = SPEED * actions / np.maximum(1, np.linalg.norm(actions, axis=1, keepdims=True))

    def outcomes(places: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """For each position and action: next position, goal reached (-1 for none), four grid cells and their
        weights."""
        following = np.clip(places[:, None] + steps, -1, 1)
        distances = np.linalg.norm(following[:, :, None] - GOALS, axis=-1)
        goals = np.where(distances.min(-1) < RADIUS, distances.argmin(-1), -1)
        at = (following + 1) / 2 * (size - 1)
        low = np.clip(np.floor(at).astype(int), 0, size - 2)
        (x, y), corner = np.moveaxis(at - low, -1, 0), low[..., 0] * size + low[..., 1]
        weights = np.stack([(1 - x) * (1 - y), (1 - x) * y, x * (1 - y), x * y], -1)
        return following, goals, corner[..., None] + np.array([0, 1, size, size + 1]), weights

    def q_values(value: np.ndarray, goals: np.ndarray, cells: np.ndarray, weights: np.ndarray) -> np.ndarray:
        return np.where(goals >= 0, REWARDS[goals], GAMMA * (value[cells] * weights).sum(-1))

    value = np.zeros(size * size)
    _, *where = outcomes(places)
    for _ in range(30):  # gamma^30 is 2e-7
        q = q_values(value, *where) / temperature
        most = q.max(1, keepdims=True)
        value = temperature * (most[:, 0] + np.log(np.exp(q - most).sum(1) * (2 / pushes) ** 2))
    random = np.random.default_rng(seed)
    at, reached, first = random.normal(0, 0.05, (1_000, 2)), np.full(1_000, -1), None
    for _ in range(50):
        live = np.flatnonzero(reached < 0)
        following, goals, *rest = outcomes(at[live])
        q = q_values(value, goals, *rest)
        cumulative = np.exp((q - q.max(1, keepdims=True)) / temperature).cumsum(1)
        chosen = (cumulative < random.random((len(live), 1)) * cumulative[:, -1:]).sum(1)
        first = actions[chosen] if first is None else first
        at[live], reached[live] = following[np.arange(len(live)), chosen], goals[np.arange(len(live)), chosen]
    return shares_row(reached.tolist(), float(first.std(0).mean()))


def markdown_table(measured: dict[str, list[dict[str, float]]]) -> str:
    """One line per policy: the mean over seeds, followed by minimum and maximum if there are several."""
    columns = list(next(iter(measured.values()))[0])
    lines = [f"| policy | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
    for name, runs in measured.items():
        cells = []
        for column in columns:
            values = [run[column] for run in runs]
            text = f"{sum(values) / len(values):.2f}"
            cells.append(text if len(values) == 1 else f"{text} ({min(values):.2f} to {max(values):.2f})")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def draw(episodes: dict[str, np.ndarray], picture: Path) -> None:
    figure = Figure(figsize=(3.2 * len(episodes), 3.5), dpi=120, layout="constrained")
    for axes, (name, places) in zip(figure.subplots(1, len(episodes), squeeze=False)[0], episodes.items(), strict=True):
        for episode in places[:100]:
            axes.plot(episode[:, 0], episode[:, 1], color="C0", alpha=0.25, linewidth=0.8)
        for goal, reward in zip(GOALS, REWARDS, strict=True):
            axes.add_patch(Circle(tuple(goal), RADIUS, facecolor="C1", alpha=0.5, edgecolor="none"))
            axes.annotate(f"{reward:g}", goal, ha="center", va="center", fontsize=9)
        axes.set(title=name, xlim=(-1.1, 1.1), ylim=(-1.1, 1.1), aspect="equal", xticks=[], yticks=[])
    figure.savefig(picture)


@rl.exit_on_error
def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [*TARGETS, "sac"]
    parser.add_argument("--policies", nargs="+", choices=names, default=names, help="policies to train; default all")
    parser.add_argument("--frames", type=int, default=6_000, help="frames per policy; default %(default)s")
    parser.add_argument("--seeds", type=int, default=1, help="number of seeds (0, 1, ...) for each policy; default 1")
    parser.add_argument(
        "--output", type=Path, default=Path("multigoal"), help="folder for the tables and figure; default %(default)s"
    )
    options = parser.parse_args(arguments)
    if options.frames < 100:
        raise rl.UserError(f"--frames must be at least 100, got {options.frames}.")
    if options.seeds < 1:
        raise rl.UserError(f"--seeds must be at least 1, got {options.seeds}.")
    logging.getLogger("torchrl").setLevel(logging.WARNING)  # its messages would break the progress bar
    rl.limit_threads(torch.device("cpu"))
    rl.make_folder(options.output)
    shown: dict[str, np.ndarray] = {}
    measured: dict[str, list[dict[str, float]]] = {}
    rows: list[dict[str, str]] = []

    def report(name: str, seed: int, values: dict[str, float]) -> None:
        measured.setdefault(name, []).append(values)
        rows.append({"policy": name, "seed": str(seed), **{key: f"{value:.2f}" for key, value in values.items()}})
        print("  ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
        write_csv_atomically(options.output / "table.csv", list(rows[0]), rows)

    report(f"soft-optimal at {TEMPERATURE:g}", 0, soft_optimal(TEMPERATURE, 0))
    for seed, name in itertools.product(range(options.seeds), options.policies):
        policy, episodes = train(name, options.frames, seed)
        shown.setdefault(name, episodes)  # the figure shows the first seed
        report(name, seed, measure(policy, episodes))
    (options.output / "table.md").write_text(markdown_table(measured), encoding="utf-8")
    draw(shown, options.output / "trajectories.png")
    print(f"wrote table.csv, table.md and trajectories.png to {options.output}")
    return 0


if __name__ == "__main__":
    main(sys.argv[1:])
