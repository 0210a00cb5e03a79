"""Which policy does each score target train? A bandit with a known answer.

python recipes/bandit_boltzmann.py

The critic is given, not learned: Q = log p for a mixture p of four Gaussians with unequal weights in the box [-1, 1]^2.
At temperature 1 the policy exp(Q) is therefore that mixture. Each score target trains an actor on this critic, and its
samples are compared with exact samples. Writes a table and two figures into the output folder, in a few minutes on two
cores.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Literal

import torch
from matplotlib.figure import Figure
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torchrl.data import Bounded

from qsm_rl import (
    BoltzmannQScore,
    DDPMSampler,
    DiffusionActor,
    NoiseSchedule,
    NormalizedQScore,
    PosteriorGradientQScore,
    PosteriorQScore,
    QScoreMatchingLoss,
    ScaledQScore,
    ScoreMLP,
    ScoreTarget,
)
from qsm_rl.atomic_files import write_csv_atomically
from qsm_rl.samplers import Clip
from qsm_rl.training import accelerated

Precision = Literal["float32", "bfloat16"]

WEIGHTS = torch.tensor([0.4, 0.3, 0.2, 0.1])
STD = 0.12
SAMPLES = 2_000
PARTICLES = 128
TARGETS: dict[str, Callable[[int], ScoreTarget]] = {
    "posterior": lambda particles: PosteriorQScore(1.0, particles),
    "posterior gradient": lambda particles: PosteriorGradientQScore(1.0, particles),
    "boltzmann": lambda _: BoltzmannQScore(1.0),
    "normalized, 0.1": lambda _: NormalizedQScore(0.1),
    "scaled, 1": lambda _: ScaledQScore(1.0),
    "scaled, 0.04": lambda _: ScaledQScore(0.04),
}


class MixtureCritic(nn.Module):
    """Q = log p of a Gaussian mixture: the modes lie in the first two dimensions; the others are Gaussian around 0."""

    def __init__(self, action_dim: int) -> None:
        super().__init__()
        corners = torch.tensor([[0.5, 0.5], [-0.5, 0.5], [-0.5, -0.5], [0.5, -0.5]])
        self.register_buffer("centers", nn.functional.pad(corners, (0, action_dim - 2)))
        self.register_buffer("log_weights", WEIGHTS.log())

    def forward(self, observation: Tensor, action: Tensor) -> Tensor:
        squared = (action.unsqueeze(-2) - self.centers).square().sum(-1)
        return torch.logsumexp(self.log_weights - squared / (2 * STD**2), -1, keepdim=True)

    def draw(self, count: int) -> Tensor:
        """Exact samples of exp(Q)."""
        modes = torch.multinomial(WEIGHTS, count, replacement=True)
        return self.centers[modes] + STD * torch.randn(count, self.centers.shape[-1])

    def mode_weights(self, action: Tensor) -> Tensor:
        """Share of the actions nearest to each mode."""
        nearest = torch.cdist(action, self.centers).argmin(-1)
        return torch.bincount(nearest, minlength=len(WEIGHTS)) / len(action)


def energy_distance(a: Tensor, b: Tensor) -> float:
    """Unbiased squared energy distance of two samples, 0 for equal distributions (Szekely and Rizzo 2013, equation
    2.1)."""
    within = sum(torch.cdist(x, x).sum() / (len(x) * (len(x) - 1)) for x in (a, b))
    return (2 * torch.cdist(a, b).mean() - within).item()


def make_actor(action_dim: int, schedule: NoiseSchedule, clip: Clip = "clean") -> DiffusionActor:
    """An untrained actor with actions in the box."""
    return DiffusionActor(
        ScoreMLP(1, action_dim, (256, 256)),
        action_spec=Bounded(-1.0, 1.0, (action_dim,)),
        noise_schedule=schedule,
        sampler=DDPMSampler(clip=clip),
    )


def train(
    critic: MixtureCritic,
    target: ScoreTarget,
    actor: DiffusionActor,
    updates: int,
    *,
    precision: Precision = "float32",
    compile: bool = False,
) -> None:
    """Trains an actor on the given critic with one score target."""
    action_dim = critic.centers.shape[-1]
    q_network = TensorDictModule(critic, ["observation", "action"], ["state_action_value"])
    loss = QScoreMatchingLoss(actor, [q_network], score_target=target, delay_qvalue=False)
    actor_loss = accelerated(loss.actor_loss, precision, compile)
    optimizer = torch.optim.Adam(actor.parameters(), lr=3e-3, fused=True)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)
    for _ in range(updates):
        # Actions from the whole box, as a random warm-up would store them.
        batch = TensorDict({"observation": torch.zeros(512, 1), "action": torch.rand(512, action_dim) * 2 - 1}, [512])
        optimizer.zero_grad()
        actor_loss(batch)[0].backward()
        optimizer.step()
        decay.step()


@torch.no_grad()
def measure(critic: MixtureCritic, action: Tensor, truth: Tensor) -> dict[str, str]:
    """Compares samples with exact ones; a row of the tables."""
    return {
        "energy_distance": f"{energy_distance(action, truth):.4f}",
        "mode_weights": " ".join(f"{w:.2f}" for w in critic.mode_weights(action).tolist()),
        "mean_q": f"{critic(torch.zeros(len(action), 1), action).mean().item():.3f}",
    }


def draw_figure(critic: MixtureCritic, samples: dict[str, Tensor], picture: Path) -> None:
    """Draws the true density next to the samples of each target."""
    columns = min(3, len(samples) + 1)
    rows = -(-(len(samples) + 1) // columns)
    figure = Figure(figsize=(3.1 * columns, 3.3 * rows), dpi=110, layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    grid = torch.linspace(-1, 1, 201)
    points = torch.cartesian_prod(grid, grid)
    density = critic(points, nn.functional.pad(points, (0, critic.centers.shape[-1] - 2))).exp().reshape(201, 201).T
    panels[0].imshow(density, extent=(-1, 1, -1, 1), origin="lower", cmap="Blues")
    panels[0].set_title("exp(Q), the truth", fontsize=10)
    for axes, (name, action) in zip(panels[1:], samples.items(), strict=False):
        axes.scatter(action[:, 0], action[:, 1], s=2, alpha=0.5, linewidths=0)
        axes.set_title(name, fontsize=10)
    for axes in panels[len(samples) + 1 :]:
        axes.remove()
    for axes in panels[: len(samples) + 1]:
        axes.set(xlim=(-1, 1), ylim=(-1, 1), aspect="equal", xticks=[-1, 0, 1], yticks=[-1, 0, 1])
    figure.savefig(picture)


def draw_score_field(critic: MixtureCritic, before: DiffusionActor, after: DiffusionActor, picture: Path) -> None:
    """Draws dQ/da next to the learned score, -predicted noise / sigma_t, before and after training, as in the paper."""
    grid = torch.linspace(-0.95, 0.95, 20)
    points = torch.cartesian_prod(grid, grid)
    actions = nn.functional.pad(points, (0, critic.centers.shape[-1] - 2))
    observation = torch.zeros(len(points), 1)
    field = torch.func.grad(lambda a: critic(observation, a).sum())(actions)
    last = after.noise_schedule.num_steps - 1
    panels = {"dQ/da, the critic's": field}
    for title, actor, t in (
        ("score at t = 0, untrained", before, 0),
        ("score at t = 0, trained", after, 0),
        (f"score at t = {last // 2}, trained", after, last // 2),
    ):
        with torch.no_grad():
            noise = actor.predict_noise(actions, observation, torch.full((len(points),), t))
        panels[title] = -noise / actor.noise_schedule.sigmas[t]
    figure = Figure(figsize=(3.2 * len(panels), 3.4), dpi=110, layout="constrained")
    for axes, (title, arrows) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        size = arrows[:, :2].norm(dim=-1, keepdim=True)
        direction = (arrows[:, :2] / size.clamp_min(1e-9)).numpy()
        axes.quiver(*points.T.numpy(), *direction.T, size.squeeze(-1).numpy(), cmap="viridis", pivot="mid", scale=24)
        axes.plot(*critic.centers[:, :2].T.numpy(), "x", color="C3")
        axes.set(xlim=(-1, 1), ylim=(-1, 1), aspect="equal", xticks=[-1, 0, 1], yticks=[-1, 0, 1])
        axes.set_title(title, fontsize=10)
    figure.savefig(picture)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--targets",
        nargs="+",
        default=list(TARGETS),
        choices=list(TARGETS),
        help="score targets to train; default all",
    )
    parser.add_argument(
        "--schedule", default="cosine", choices=["vp", "cosine"], help="noise schedule; default %(default)s"
    )
    parser.add_argument("--num_steps", type=int, default=20, help="denoising steps T; default %(default)s")
    parser.add_argument(
        "--clip",
        default="clean",
        choices=["sample", "clean", "none"],
        help="what the sampler clips at each step; default %(default)s",
    )
    parser.add_argument(
        "--action_dim",
        type=int,
        default=2,
        help="action dimensions, at least 2; the modes lie in the first two; default %(default)s",
    )
    parser.add_argument(
        "--particles", type=int, default=PARTICLES, help="particles of the posterior targets; default %(default)s"
    )
    parser.add_argument("--updates", type=int, default=4_000, help="updates per target; default %(default)s")
    parser.add_argument(
        "--precision",
        default="float32",
        choices=["float32", "bfloat16"],
        help="arithmetic of the matrix products; default %(default)s",
    )
    parser.add_argument("--compile", action="store_true", help="compile the loss, as the recipes do on a CPU")
    parser.add_argument("--seed", type=int, default=0, help="seed of all random numbers; default %(default)s")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("bandit_boltzmann"),
        help="folder for the table and figures; default %(default)s",
    )
    arguments = parser.parse_args()
    if arguments.action_dim < 2 or min(arguments.num_steps, arguments.updates, arguments.particles) < 1:
        parser.error("--action_dim must be at least 2, --num_steps, --updates and --particles at least 1")
    arguments.output.mkdir(parents=True, exist_ok=True)

    critic = MixtureCritic(arguments.action_dim)
    schedule = getattr(NoiseSchedule, arguments.schedule)(arguments.num_steps)
    clip = None if arguments.clip == "none" else arguments.clip
    torch.manual_seed(arguments.seed)
    truth = critic.draw(SAMPLES)
    samples, rows = {}, []

    def report(name: str, action: Tensor) -> None:
        rows.append({"target": name, **measure(critic, action, truth)})
        print("  ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)

    report("true draws", critic.draw(SAMPLES))
    fields = {}
    for name in arguments.targets:
        torch.manual_seed(arguments.seed)
        actor = make_actor(arguments.action_dim, schedule, clip)
        untrained = deepcopy(actor)
        target = TARGETS[name](arguments.particles)
        train(critic, target, actor, arguments.updates, precision=arguments.precision, compile=arguments.compile)
        with torch.no_grad():
            samples[name] = actor.sample(torch.zeros(SAMPLES, 1))
        report(name, samples[name])
        fields[name] = untrained, actor
    write_csv_atomically(arguments.output / "table.csv", list(rows[0]), rows)
    draw_figure(critic, samples, arguments.output / "samples.png")
    draw_score_field(critic, *fields[arguments.targets[0]], arguments.output / "score_field.png")
    print(f"wrote table.csv, samples.png and score_field.png ({arguments.targets[0]}) to {arguments.output}")


if __name__ == "__main__":
    main()
