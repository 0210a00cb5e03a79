"""Which proposal should the posterior target draw its particles from? Estimates against quadrature in one dimension.

    python recipes/posterior_proposals.py --output docs/results/posterior_proposals

Uses three critics, for which quadrature over the box gives the exact target, and three noise levels. Reports bias, root
mean square error and effective sample size of the target with a given number of particles from each proposal, and
compares the exact target with its gradient form. Writes proposals.csv, table.md and faces.png, within seconds.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

from qsm_rl import NoiseSchedule, PosteriorQScore, functional
from qsm_rl import training as rl
from qsm_rl.atomic_files import write_csv_atomically

CRITICS: dict[str, Callable[[Tensor], Tensor]] = {
    "quadratic": lambda a: -20 * (a - 0.3) ** 2,
    "linear": lambda a: 4 * a,
    "bimodal": lambda a: torch.log(torch.exp(-((a - 0.6) ** 2) / 0.02) + 0.5 * torch.exp(-((a + 0.5) ** 2) / 0.02)),
}
TIMESTEPS = (0, 4, 7)
GRID = torch.linspace(-1, 1, 4_001, dtype=torch.float64)
CELLS = torch.ones(len(GRID), dtype=torch.float64)
CELLS[[0, -1]] = 0.5  # the trapezoidal rule
REPEATS = 200


def posterior_mean(q: Callable[[Tensor], Tensor], noisy: Tensor, cumprod: float, values: Tensor) -> Tensor:
    """E[values(a_0) | a_t] by quadrature for noised actions ``(N,)``, with ``values`` given on ``GRID``."""
    log_weights = q(GRID) - (noisy.double().unsqueeze(-1) - cumprod**0.5 * GRID) ** 2 / (2 * (1 - cumprod))
    weights = torch.softmax(log_weights, -1) * CELLS
    return (weights * values).sum(-1) / weights.sum(-1)


def exact_target(q: Callable[[Tensor], Tensor], noisy: Tensor, cumprod: float) -> Tensor:
    """The exact posterior target ``(N,)`` at temperature 1."""
    return (noisy.double() - cumprod**0.5 * posterior_mean(q, noisy, cumprod, GRID)) / (1 - cumprod) ** 0.5


def gradient_form(q: Callable[[Tensor], Tensor], noisy: Tensor, cumprod: float) -> Tensor:
    """The target of PosteriorGradientQScore ``(N,)`` in the limit of many particles."""
    slope = torch.func.grad(lambda a: q(a).sum())(GRID)
    return -(((1 - cumprod) / cumprod) ** 0.5) * posterior_mean(q, noisy, cumprod, slope)


def boltzmann_draws(q: Callable[[Tensor], Tensor], temperature: float, shape: tuple[int, ...]) -> Tensor:
    """Samples of exp(Q / temperature) on the box, up to the width of a grid cell."""
    weights = torch.softmax(q(GRID) / temperature, 0) * CELLS
    nodes = GRID[torch.multinomial(weights, math.prod(shape), replacement=True)]
    jitter = (torch.rand(len(nodes), dtype=torch.float64) - 0.5) * (GRID[1] - GRID[0])
    return (nodes + jitter).clamp(-1, 1).float().reshape(shape)


def estimates(
    proposal: str, q: Callable[[Tensor], Tensor], noisy: Tensor, t: Tensor, schedule: NoiseSchedule, particles: int
) -> tuple[Tensor, Tensor]:
    """Targets and effective sample sizes ``(N,)`` with one proposal."""
    if proposal in FRACTIONS:
        target = PosteriorQScore(1.0, particles, uniform_fraction=FRACTIONS[proposal])
        noise, info = target(lambda a: q(a.squeeze(-1)), noisy.unsqueeze(-1), t, schedule)
        return noise.squeeze(-1), info["effective_sample_size"]
    # A diffusion policy gives samples without a density. They have to be treated as samples of exp(Q), weighted only by
    # the likelihood of the noised action.
    drawn = boltzmann_draws(q, POLICIES[proposal], (particles, len(noisy))).unsqueeze(-1)
    cumprod = schedule.alphas_cumprod[t]
    log_weights = -((noisy - cumprod.sqrt() * drawn.squeeze(-1)) ** 2) / (2 * (1 - cumprod))
    noise, size = functional.posterior_noise(noisy.unsqueeze(-1), cumprod, drawn, log_weights)
    return noise.squeeze(-1), size


FRACTIONS = {"uniform": 1.0, "truncated Gaussian": 0.0, "mixture, half each": 0.5}
POLICIES = {"policy, converged": 1.0, "policy, at 4 times the temperature": 4.0}


def compare(particles: int, seed: int) -> list[dict[str, str]]:
    """Rows of bias, error and effective sample size, over noised actions from the whole box."""
    torch.manual_seed(seed)
    schedule = NoiseSchedule.cosine(10)
    rows = []
    for critic, q in CRITICS.items():
        for step in TIMESTEPS:
            t = torch.full((100,), step)
            noisy = schedule.add_noise(torch.linspace(-0.99, 0.99, 100).unsqueeze(-1), t)[0].squeeze(-1)
            exact = exact_target(q, noisy, schedule.alphas_cumprod[step].item())
            many, many_t = noisy.repeat(REPEATS), t.repeat(REPEATS)
            for proposal in (*FRACTIONS, *POLICIES):
                noise, size = estimates(proposal, q, many, many_t, schedule, particles)
                errors = noise.double().reshape(REPEATS, 100) - exact
                rows.append(
                    {
                        "critic": critic,
                        "t": str(step),
                        "proposal": proposal,
                        "bias": f"{errors.mean(0).square().mean().sqrt():.3f}",
                        "error": f"{errors.square().mean().sqrt():.3f}",
                        "effective_sample_size": f"{size.mean():.1f}",
                    }
                )
    return rows


def faces() -> list[dict[str, str]]:
    """The exact target next to its gradient form, in the middle and at the faces of the box."""
    rows = []
    for critic, q in CRITICS.items():
        for cumprod in (0.5, 0.1, 0.0064):
            noisy = torch.tensor([-1.0, 0.0, 1.0]) * cumprod**0.5
            pair = zip(exact_target(q, noisy, cumprod), gradient_form(q, noisy, cumprod), strict=True)
            cells = [f"{exact:.2f} / {gradient:.2f}" for exact, gradient in pair]
            places = ("clean -1", "clean 0", "clean 1")
            rows.append({"critic": critic, "alphas_cumprod": f"{cumprod:g}", **dict(zip(places, cells, strict=True))})
    return rows


def draw(picture: Path) -> None:
    """Draws both forms over the noised action: where the policy presses against a face, the gradient form is wrong."""
    figure = Figure(figsize=(9.6, 3.2), dpi=110, layout="constrained")
    for axes, (critic, q) in zip(figure.subplots(1, len(CRITICS)), CRITICS.items(), strict=True):
        for color, cumprod in (("C0", 0.5), ("C1", 0.1)):
            noisy = torch.linspace(-2, 2, 200)
            axes.plot(noisy, exact_target(q, noisy, cumprod), color, label=f"exact, {cumprod:g}")
            axes.plot(
                noisy, gradient_form(q, noisy, cumprod), color, linestyle="--", label=f"gradient form, {cumprod:g}"
            )
        axes.set(title=critic, xlabel="noised action", ylim=(-15, 5))
    axes.legend(fontsize=7)
    figure.savefig(picture)


def markdown(rows: list[dict[str, str]]) -> str:
    lines = [" | ".join(rows[0]), " | ".join("---" for _ in rows[0]), *(" | ".join(row.values()) for row in rows)]
    return "".join(f"| {line.replace('_', ' ')} |\n" for line in lines)


@rl.exit_on_error
def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--particles", type=int, default=64, help="particles per estimate; default %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="seed of all random numbers; default %(default)s")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("posterior_proposals"),
        help="folder for the tables and figure; default %(default)s",
    )
    options = parser.parse_args(arguments)
    if options.particles < 2:
        raise rl.UserError(f"--particles must be at least 2, got {options.particles}.")
    rl.make_folder(options.output)
    rows = compare(options.particles, options.seed)
    write_csv_atomically(options.output / "proposals.csv", list(rows[0]), rows)
    text = (
        f"Particles from different proposals, against quadrature:\n\n{markdown(rows)}\n"
        "Exact target / gradient form where the noised action is the noiseless image of a clean one:\n\n"
        f"{markdown(faces())}"
    )
    (options.output / "table.md").write_text(text, encoding="utf-8")
    draw(options.output / "faces.png")
    print(f"wrote proposals.csv, table.md and faces.png to {options.output}")
    return 0


if __name__ == "__main__":
    main(sys.argv[1:])
