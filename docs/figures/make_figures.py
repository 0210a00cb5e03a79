"""Draws the pictures of the explanation pages: `python docs/figures/make_figures.py`, under a minute on one core.

Nothing is trained. One action in [-1, 1] and a given critic are enough: for such a critic the number that a perfectly
fitted denoiser would predict is the score target itself, so each target is put into a DiffusionActor as its network.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn
from torchrl.data import Bounded

from qsm_rl import (
    BoltzmannQScore,
    DDPMSampler,
    DiffusionActor,
    NoiseSchedule,
    PosteriorQScore,
    ScaledQScore,
    ScoreTarget,
)
from qsm_rl import functional as F

FOLDER = Path(__file__).parent
CENTERS = torch.tensor([-0.5, 0.6])
WEIGHTS = torch.tensor([0.7, 0.3])
STD = 0.1
SAMPLES = 6_000
NUM_STEPS = 100  # so that the pictures show the targets and not the coarseness of the chain
PARTICLES = 128
BLUE, ORANGE, GREEN, GREY = "#3b6fb6", "#d9822b", "#3f8f5b", "#777777"


def q_value(action: Tensor) -> Tensor:
    """Q = log p of a mixture of two Gaussians, so the policy exp(Q) is that mixture; ``(..., 1)`` to ``(...)``."""
    squared = (action - CENTERS).square()
    return torch.logsumexp(WEIGHTS.log() - squared / (2 * STD**2), -1)


def density(action: Tensor, alpha_cumprod: float = 1.0) -> Tensor:
    """Density of the actions of exp(Q), noised to the given alphas_cumprod; ``(N,)`` to ``(N,)``."""
    mean, std = alpha_cumprod**0.5 * CENTERS, (alpha_cumprod * STD**2 + 1 - alpha_cumprod) ** 0.5
    parts = torch.exp(-(action.unsqueeze(-1) - mean).square() / (2 * std**2)) / (std * (2 * torch.pi) ** 0.5)
    return (WEIGHTS * parts).sum(-1)


class PerfectDenoiser(nn.Module):
    """Predicts the score target itself, as a network without any error would."""

    def __init__(self, target: ScoreTarget, schedule: NoiseSchedule) -> None:
        super().__init__()
        self.target, self.schedule = target, schedule

    def forward(self, noisy_action: Tensor, observation: Tensor, t: Tensor) -> Tensor:
        return self.target(q_value, noisy_action, t.long(), self.schedule)[0]


def actor_of(target: ScoreTarget, schedule: NoiseSchedule) -> DiffusionActor:
    """The policy that a target stands for."""
    return DiffusionActor(
        PerfectDenoiser(target, schedule),
        action_spec=Bounded(-1.0, 1.0, (1,)),
        noise_schedule=schedule,
        sampler=DDPMSampler(clip="clean"),
    )


def samples_of(target: ScoreTarget, schedule: NoiseSchedule | None = None) -> Tensor:
    """Actions of the policy that a target stands for, ``(SAMPLES,)``."""
    torch.manual_seed(0)
    actor = actor_of(target, NoiseSchedule.cosine(NUM_STEPS) if schedule is None else schedule)
    with torch.no_grad():
        return actor.sample(torch.zeros(SAMPLES, 1)).squeeze(-1)


def new_figure(width: float, height: float, columns: int, rows: int = 1) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width, height), dpi=130, layout="constrained", facecolor="white")
    panels = list(figure.subplots(rows, columns, squeeze=False).flatten())
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=10)
        axes.xaxis.label.set_fontsize(11)
        axes.yaxis.label.set_fontsize(11)
    return figure, panels


def draw_forward(path: Path) -> None:
    """The densities of noised actions, from least to most noise."""
    schedule = NoiseSchedule.cosine(20)
    grid = torch.linspace(-3, 3, 601)
    torch.manual_seed(0)
    clean = CENTERS[torch.multinomial(WEIGHTS, SAMPLES, replacement=True)] + STD * torch.randn(SAMPLES)
    figure, panels = new_figure(9, 2.7, 4)
    for axes, t in zip(panels, (0, 4, 9, 19), strict=True):
        noisy, _ = schedule.add_noise(clean.unsqueeze(-1), torch.full((SAMPLES,), t))
        axes.hist(noisy.squeeze(-1).numpy(), bins=100, range=(-3, 3), density=True, color=BLUE, alpha=0.4)
        axes.plot(grid, density(grid, schedule.alphas_cumprod[t].item()), color=BLUE)
        axes.set(xlim=(-3, 3), yticks=[], xlabel="noised action")
        axes.set_title(f"t = {t}, sigma = {schedule.sigmas[t]:.2f}", fontsize=12)
    figure.savefig(path)


def draw_reverse(path: Path) -> None:
    """Paths of the reverse chain from noise to actions, beside the density that they should end in."""
    actor = actor_of(PosteriorQScore(1.0, PARTICLES), NoiseSchedule.cosine(NUM_STEPS))
    torch.manual_seed(2)
    noisy = torch.randn(30, 1)
    visited = [noisy]
    observation = torch.zeros(30, 1)
    with torch.no_grad():
        for step in actor.sampler.steps(actor.noise_schedule):
            predicted = actor.predict_noise(noisy, observation, torch.full((30,), step.t))
            noisy = actor.sampler.step(noisy, predicted, step, torch.randn_like(noisy))
            visited.append(noisy)
    paths = torch.stack(visited).squeeze(-1)
    figure, (axes, side) = new_figure(7.5, 3, 2)
    axes.plot(paths.numpy(), color=BLUE, alpha=0.5, linewidth=0.7)
    axes.set(xlabel="reverse steps done", ylabel="action", ylim=(-2.6, 2.6))
    axes.set_title("30 actions on their way out of the noise", fontsize=12)
    grid = torch.linspace(-1, 1, 401)
    samples = samples_of(PosteriorQScore(1.0, PARTICLES))
    side.hist(samples.numpy(), bins=80, range=(-1, 1), density=True, color=BLUE, alpha=0.4)
    side.plot(grid, density(grid), color="black", linewidth=1.2)
    side.set(xlabel="action", yticks=[])
    side.set_title("6,000 samples and the policy exp(Q)", fontsize=12)
    figure.savefig(path, dpi=90)


def draw_targets(path: Path) -> None:
    """What three targets ask the denoiser to predict, at three noise levels."""
    schedule = NoiseSchedule.cosine(NUM_STEPS)
    figure, panels = new_figure(9, 3.2, 3)
    torch.manual_seed(0)
    for axes, t in zip(panels, (1, 16, 69), strict=True):
        noisy = torch.linspace(-1.5, 1.5, 301).unsqueeze(-1)
        step = torch.full((301,), t)
        for target, name, color, width in (
            (ScaledQScore(0.2), "-0.2 dQ/da", ORANGE, 1.2),
            (BoltzmannQScore(1.0), "-sigma dQ/da", GREEN, 1.2),
            (PosteriorQScore(1.0, 4_000), "exact", "black", 1.8),
        ):
            axes.plot(noisy, target(q_value, noisy, step, schedule)[0], color=color, linewidth=width, label=name)
        axes.axhline(0, color=GREY, linewidth=0.5)
        axes.set(xlabel="noised action", ylim=(-12, 12))
        axes.set_title(f"sigma = {schedule.sigmas[t]:.2f}", fontsize=12)
    panels[0].set_ylabel("noise to predict")
    lines, names = panels[0].get_legend_handles_labels()
    figure.legend(lines, names, loc="outside lower center", ncols=3, frameon=False, fontsize=11)
    figure.savefig(path)


def draw_policies(path: Path) -> None:
    """The policies that four targets stand for."""
    figure, panels = new_figure(9, 2.8, 4)
    grid = torch.linspace(-1, 1, 401)
    for axes, (name, target) in zip(
        panels,
        {
            "exact, temperature 1": PosteriorQScore(1.0, PARTICLES),
            "-sigma dQ/da": BoltzmannQScore(1.0),
            "-0.2 dQ/da": ScaledQScore(0.2),
            "-5 dQ/da": ScaledQScore(5.0),
        }.items(),
        strict=True,
    ):
        axes.hist(samples_of(target).numpy(), bins=80, range=(-1, 1), density=True, color=BLUE, alpha=0.45)
        axes.plot(grid, density(grid), color="black", linewidth=1.2)
        axes.set(xlabel="action", yticks=[], ylim=(0, 6))
        axes.set_title(name, fontsize=12)
    figure.savefig(path)


def draw_ascent(path: Path) -> None:
    """Where gradient ascent on Q ends, beside samples of the policy exp(Q)."""
    torch.manual_seed(0)
    action = 2 * torch.rand(SAMPLES, 1) - 1
    for _ in range(300):
        action = (action + 1e-3 * F.action_gradient(q_value, action)).clamp(-1, 1)
    grid = torch.linspace(-1, 1, 401)
    figure, panels = new_figure(9, 2.7, 3)
    panels[0].plot(grid, q_value(grid.unsqueeze(-1)), color="black")
    panels[0].set_title("Q of an action", fontsize=12)
    others: list[tuple[str, Callable[[], Tensor]]] = [
        ("300 steps up dQ/da from anywhere", lambda: action.squeeze(-1)),
        ("a diffusion policy for exp(Q)", lambda: samples_of(PosteriorQScore(1.0, PARTICLES))),
    ]
    for axes, (name, draw) in zip(panels[1:], others, strict=True):
        axes.hist(draw().numpy(), bins=80, range=(-1, 1), weights=[1 / SAMPLES] * SAMPLES, color=BLUE, alpha=0.6)
        axes.set_title(name, fontsize=12)
        axes.set_ylabel("share of the actions", fontsize=10)
    for axes in panels:
        axes.set(xlabel="action", xlim=(-1, 1))
    figure.savefig(path)


def draw_schedules(path: Path) -> None:
    """The noise levels that the schedules visit."""
    figure, panels = new_figure(8, 2.8, 2)
    for axes, num_steps in zip(panels, (5, 20), strict=True):
        for name, color in (("vp", ORANGE), ("cosine", BLUE)):
            schedule = getattr(NoiseSchedule, name)(num_steps)
            axes.plot(schedule.sigmas, marker="o", markersize=4, color=color, label=name)
        axes.set(xlabel="timestep t", ylim=(0, 1.05))
        axes.set_title(f"T = {num_steps}", fontsize=12)
    panels[0].set_ylabel("sigma")
    panels[0].legend(frameon=False, fontsize=10)
    figure.savefig(path)


def draw_steps(path: Path) -> None:
    """What the number of steps does to the samples of the exact target."""
    figure, panels = new_figure(9, 2.7, 4)
    grid = torch.linspace(-1, 1, 401)
    for axes, num_steps in zip(panels, (5, 10, 20, 50), strict=True):
        for name, color in (("vp", ORANGE), ("cosine", BLUE)):
            samples = samples_of(PosteriorQScore(1.0, PARTICLES), getattr(NoiseSchedule, name)(num_steps))
            axes.hist(samples.numpy(), bins=60, range=(-1, 1), density=True, color=color, histtype="step", label=name)
        axes.plot(grid, density(grid), color="black", linewidth=1.2)
        axes.set(xlabel="action", yticks=[], ylim=(0, 7))
        axes.set_title(f"T = {num_steps}", fontsize=12)
    panels[0].legend(frameon=False, fontsize=10)
    figure.savefig(path)


def main() -> None:
    draw_forward(FOLDER / "forward.png")
    draw_reverse(FOLDER / "reverse.png")
    draw_targets(FOLDER / "targets.png")
    draw_policies(FOLDER / "policies.png")
    draw_ascent(FOLDER / "ascent.png")
    draw_schedules(FOLDER / "schedules.png")
    draw_steps(FOLDER / "steps.png")
    for picture in sorted(FOLDER.glob("*.png")):
        print(f"wrote {picture} ({picture.stat().st_size // 1000} kB)")


if __name__ == "__main__":
    main()
