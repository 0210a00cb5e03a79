"""Which policy does each score target train? A bandit with a known answer: `python recipes/bandit_boltzmann.py`.

The critic is given, not learned: Q = log p for a mixture p of four Gaussians of unequal weights in the box [-1, 1]^2,
so at temperature 1 the policy exp(Q) is that mixture. The actor is trained on it by each score target and compared with
true draws. Writes a table and a figure into the output folder, in a few minutes on two cores.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
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
    PosteriorQScore,
    QScoreMatchingLoss,
    ScaledQScore,
    ScoreMLP,
)

WEIGHTS = torch.tensor([0.4, 0.3, 0.2, 0.1])
STD = 0.12
SAMPLES = 2_000
TARGETS = {
    "posterior": lambda: PosteriorQScore(1.0, 128),
    "boltzmann": lambda: BoltzmannQScore(1.0),
    "normalized, 0.1": lambda: NormalizedQScore(0.1),
    "scaled, 1": lambda: ScaledQScore(1.0),
    "scaled, 0.04": lambda: ScaledQScore(0.04),
}


class MixtureCritic(nn.Module):
    """Q = log p of a Gaussian mixture: the first two dimensions hold the modes, the others a Gaussian around 0."""

    def __init__(self, action_dim: int) -> None:
        super().__init__()
        corners = torch.tensor([[0.5, 0.5], [-0.5, 0.5], [-0.5, -0.5], [0.5, -0.5]])
        self.register_buffer("centers", nn.functional.pad(corners, (0, action_dim - 2)))
        self.register_buffer("log_weights", WEIGHTS.log())

    def forward(self, observation: Tensor, action: Tensor) -> Tensor:
        squared = (action.unsqueeze(-2) - self.centers).square().sum(-1)
        return torch.logsumexp(self.log_weights - squared / (2 * STD**2), -1, keepdim=True)

    def draw(self, count: int) -> Tensor:
        """True draws of exp(Q)."""
        modes = torch.multinomial(WEIGHTS, count, replacement=True)
        return self.centers[modes] + STD * torch.randn(count, self.centers.shape[-1])

    def mode_weights(self, action: Tensor) -> Tensor:
        """Share of the actions nearest to each mode."""
        nearest = torch.cdist(action, self.centers).argmin(-1)
        return torch.bincount(nearest, minlength=len(WEIGHTS)) / len(action)


def energy_distance(a: Tensor, b: Tensor) -> float:
    """Squared energy distance of two samples, 0 for equal laws (Szekely and Rizzo 2013, equation 2.1), unbiased."""
    within = sum(torch.cdist(x, x).sum() / (len(x) * (len(x) - 1)) for x in (a, b))
    return (2 * torch.cdist(a, b).mean() - within).item()


def train(
    critic: MixtureCritic, target: str, schedule: NoiseSchedule, clip: str | None, updates: int
) -> DiffusionActor:
    """Trains an actor on the given critic by one score target."""
    action_dim = critic.centers.shape[-1]
    actor = DiffusionActor(
        ScoreMLP(1, action_dim, (256, 256)),
        action_spec=Bounded(-1.0, 1.0, (action_dim,)),
        noise_schedule=schedule,
        sampler=DDPMSampler(clip=clip),
    )
    q_network = TensorDictModule(critic, ["observation", "action"], ["state_action_value"])
    loss = QScoreMatchingLoss(actor, [q_network], score_target=TARGETS[target](), delay_qvalue=False)
    optimizer = torch.optim.Adam(actor.parameters(), lr=3e-3, fused=True)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)
    for _ in range(updates):
        # Actions all over the box, as random warm-up would store them.
        batch = TensorDict({"observation": torch.zeros(512, 1), "action": torch.rand(512, action_dim) * 2 - 1}, [512])
        optimizer.zero_grad()
        loss.actor_loss(batch)[0].backward()
        optimizer.step()
        decay.step()
    return actor


def draw_figure(critic: MixtureCritic, samples: dict[str, Tensor], picture: Path) -> None:
    """The true density beside the samples of each target."""
    columns = min(3, len(samples) + 1)
    rows = -(-(len(samples) + 1) // columns)
    figure = Figure(figsize=(3.1 * columns, 3.3 * rows), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument(
        "--targets", nargs="+", default=list(TARGETS), choices=list(TARGETS), help="score targets to train"
    )
    parser.add_argument("--schedule", default="cosine", choices=["vp", "cosine"], help="noise schedule")
    parser.add_argument("--num_steps", type=int, default=20, help="denoising steps T")
    parser.add_argument("--clip", default="clean", choices=["sample", "clean", "none"], help="what the sampler clips")
    parser.add_argument(
        "--action_dim", type=int, default=2, help="action dimensions, at least 2; the modes lie in two of them"
    )
    parser.add_argument("--updates", type=int, default=4_000, help="updates for each target")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything random")
    parser.add_argument("--output", type=Path, default=Path("bandit_boltzmann"), help="folder of table and figure")
    arguments = parser.parse_args()
    if arguments.action_dim < 2 or arguments.num_steps < 1 or arguments.updates < 1:
        parser.error("--action_dim must be at least 2, --num_steps and --updates at least 1")
    arguments.output.mkdir(parents=True, exist_ok=True)

    critic = MixtureCritic(arguments.action_dim)
    schedule = getattr(NoiseSchedule, arguments.schedule)(arguments.num_steps)
    observation = torch.zeros(SAMPLES, 1)
    torch.manual_seed(arguments.seed)
    truth = critic.draw(SAMPLES)
    samples, rows = {}, []

    def report(name: str, action: Tensor) -> None:
        weights = [round(w, 3) for w in critic.mode_weights(action).tolist()]
        rows.append(
            {
                "target": name,
                "energy_distance": round(energy_distance(action, truth), 4),
                "mode_weights": " ".join(f"{w:.2f}" for w in weights),
                "mean_q": round(critic(observation, action).mean().item(), 3),
            }
        )
        print("  ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)

    report("true draws", critic.draw(SAMPLES))
    for name in arguments.targets:
        torch.manual_seed(arguments.seed)
        clip = None if arguments.clip == "none" else arguments.clip
        actor = train(critic, name, schedule, clip, arguments.updates)
        with torch.no_grad():
            samples[name] = actor.sample(observation)
        report(name, samples[name])
    with (arguments.output / "table.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    draw_figure(critic, samples, arguments.output / "samples.png")
    print(f"wrote {arguments.output / 'table.csv'} and {arguments.output / 'samples.png'}")


if __name__ == "__main__":
    main()
