"""Counts the modes that a policy keeps: Q-score matching, Diffusion-QL and SAC on a critic with two equal peaks.

The critic is given: at each of several states, Q = log p for two equal Gaussians. The policy exp(Q) is therefore known:
half of the actions at each peak. A mode is a peak of the actions' kernel density that stands out from its neighbouring
valleys. Writes OUTPUT/table.csv, OUTPUT/table.md and OUTPUT/actions.png.

python recipes/modes.py --seeds 3 --output docs/results/modes
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torch.optim import Adam
from torch.optim.lr_scheduler import CosineAnnealingLR
from torchrl.data import Bounded
from torchrl.objectives import SACLoss

from qsm_rl import (
    BoltzmannQScore,
    DDPMSampler,
    DiffusionActor,
    DiffusionQLLoss,
    NoiseSchedule,
    PosteriorQScore,
    QScoreMatchingLoss,
    ScoreMLP,
)
from qsm_rl import training as rl
from qsm_rl.atomic_files import write_csv_atomically

STD = 0.15
SPEC = Bounded(-1.0, 1.0, (1,))
STATES = torch.tensor([[-0.5], [0.0], [0.5]])
SAMPLES = 2_000


class TwoPeaks(nn.Module):
    """Q(s, a) = log p(a), with p two equal Gaussians at ``0.3 s - 0.5`` and ``0.3 s + 0.5``."""

    def peaks(self, observation: Tensor) -> Tensor:
        """Positions of the peaks, ``(*B, 2)``."""
        return 0.3 * observation + torch.tensor([-0.5, 0.5])

    def forward(self, observation: Tensor, action: Tensor) -> Tensor:
        """Q up to a constant, ``(*B, 1)``."""
        return torch.logsumexp(-((action - self.peaks(observation)) ** 2) / (2 * STD**2), -1, keepdim=True)


def make_batch(size: int) -> TensorDict:
    """States from the range shown and actions from the whole box, as a random warm-up would store them."""
    following = {"observation": torch.zeros(size, 1), "reward": torch.zeros(size, 1)}
    following |= {name: torch.ones(size, 1, dtype=torch.bool) for name in ("done", "terminated")}
    entries = {"observation": torch.rand(size, 1) - 0.5, "action": torch.rand(size, 1) * 2 - 1}
    return TensorDict({**entries, "next": following}, [size])


def fit(parameters: Sequence[Tensor], actor_loss: Callable[[TensorDict], Tensor], updates: int, rate: float) -> None:
    optimizer = Adam(parameters, lr=rate, fused=True)
    decay = CosineAnnealingLR(optimizer, updates)
    for _ in range(updates):
        optimizer.zero_grad()
        actor_loss(make_batch(512)).backward()
        optimizer.step()
        decay.step()


def train_diffusion(
    make_loss: Callable[..., nn.Module], critic: TensorDictModule, updates: int, rate: float
) -> Callable:
    actor = DiffusionActor(
        ScoreMLP(1, 1, (256, 256)),
        action_spec=SPEC,
        noise_schedule=NoiseSchedule.cosine(10),
        sampler=DDPMSampler(clip="clean"),
    )
    loss = make_loss(actor, [critic])
    fit(list(actor.parameters()), lambda batch: loss.actor_loss(batch)[0], updates, rate)
    return lambda observation: actor.sample(observation)


def train_sac(critic: TensorDictModule, updates: int, rate: float) -> Callable:
    """Trains a squashed Gaussian with TorchRL's SAC actor loss at temperature 1, whose optimal policy is exp(Q)."""
    actor = rl.TanhGaussianActor(1, SPEC, (256, 256))
    loss = SACLoss(actor, [critic], num_qvalue_nets=1, alpha_init=1.0, fixed_alpha=True, delay_qvalue=False)
    fit(list(actor.parameters()), lambda batch: loss.actor_loss(batch)[0].mean(), updates, rate)
    return lambda observation: actor(TensorDict({"observation": observation}, observation.shape[:-1]))["action"]


POLICIES: dict[str, Callable[[TensorDictModule, int, float], Callable]] = {
    "QSM, posterior": lambda critic, updates, rate: train_diffusion(
        lambda *networks: QScoreMatchingLoss(*networks, score_target=PosteriorQScore(1.0, 64), delay_qvalue=False),
        critic,
        updates,
        rate,
    ),
    "QSM, boltzmann": lambda critic, updates, rate: train_diffusion(
        lambda *networks: QScoreMatchingLoss(*networks, score_target=BoltzmannQScore(1.0), delay_qvalue=False),
        critic,
        updates,
        rate,
    ),
    "Diffusion-QL": lambda critic, updates, rate: train_diffusion(
        # Q is 0 at its peaks, so dividing by its mean size would blow up there.
        lambda *networks: DiffusionQLLoss(
            *networks, bc_weight=0.0, normalize_q=False, delay_actor=False, delay_qvalue=False
        ),
        critic,
        updates,
        rate,
    ),
    "SAC": train_sac,
}


def shares_of_peaks(action: Tensor, peaks: Tensor) -> Tensor:
    """Share of the actions ``(N,)`` within three standard deviations of each peak, ``(2,)``."""
    return ((action.unsqueeze(-1) - peaks).abs() < 3 * STD).float().mean(0)


def count_modes(action: Tensor, bandwidth: float = 0.05) -> int:
    """Modes of the actions ``(N,)``: peaks of their Gaussian kernel density with valleys between them.

    A peak counts if it is at least a twentieth as high as the highest, and the valley to the next one is at most half
    as high as either.
    """
    grid = torch.linspace(-1.2, 1.2, 481)
    density = torch.exp(-0.5 * ((grid.unsqueeze(-1) - action) / bandwidth) ** 2).mean(-1)
    density = density / density.max()
    modes, rising, extreme = 0, False, 0.0
    for height in density.tolist():
        if rising:
            extreme = max(extreme, height)
            if height < extreme / 2:
                rising, extreme = False, height
        else:
            extreme = min(extreme, height)
            if height > max(2 * extreme, 0.05):
                rising, extreme = True, height
                modes += 1
    return modes


def measure(critic: TwoPeaks, state: Tensor, action: Tensor) -> dict[str, float]:
    """The table's entries for the actions ``(N,)`` at one state."""
    left, right = shares_of_peaks(action, critic.peaks(state)).tolist()
    q_value = critic(state.expand(len(action), 1), action.unsqueeze(-1)).mean().item()
    return {
        "modes": count_modes(action),
        "left": round(left, 2),
        "right": round(right, 2),
        "elsewhere": round(1 - left - right, 2),
        "mean_q": round(q_value, 2),
    }


def markdown_table(rows: Sequence[dict[str, Any]]) -> str:
    """One line per policy: minimum and maximum over states and seeds."""
    lines = ["| policy | modes | share of the smaller peak | elsewhere | mean Q |", "|---|---|---|---|---|"]
    for name in dict.fromkeys(row["policy"] for row in rows):
        own = [row for row in rows if row["policy"] == name]
        smaller = [min(row["left"], row["right"]) for row in own]
        columns = (
            [row["modes"] for row in own],
            smaller,
            [row["elsewhere"] for row in own],
            [row["mean_q"] for row in own],
        )
        cells = [
            f"{min(values):g}" if min(values) == max(values) else f"{min(values):g} to {max(values):g}"
            for values in columns
        ]
        lines.append(f"| {' | '.join([name, *cells])} |")
    return "\n".join([*lines, ""])


def draw_figure(actions: dict[str, Tensor], critic: TwoPeaks, picture: Path) -> None:
    """Draws one row per policy and one column per state."""
    figure = Figure(figsize=(2.6 * len(STATES), 1.5 * len(actions)), dpi=110, layout="constrained")
    panels = figure.subplots(len(actions), len(STATES), squeeze=False, sharex=True)
    grid = torch.linspace(-1, 1, 401).unsqueeze(-1)
    for index, (name, action) in enumerate(actions.items()):
        row = panels[index]
        for axes, state, own in zip(row, STATES, action.unbind(1), strict=True):
            density = critic(state.expand(401, 1), grid).exp().squeeze(-1)
            axes.hist(own.numpy(), bins=80, range=(-1, 1), density=True, color="tab:blue", alpha=0.7)
            axes.plot(grid.squeeze(-1), density / density.mean() / 2, color="black", linewidth=0.8)
            axes.set(yticks=[], ylim=(0, 6))
            axes.spines[["top", "right", "left"]].set_visible(False)
            if index == 0:
                axes.set_title(f"state {state.item():g}", fontsize=9)
            if index == len(actions) - 1:
                axes.set_xlabel("action")
        row[0].set_ylabel(name, fontsize=9)
    figure.savefig(picture)


@rl.exit_on_error
def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--policies", nargs="+", choices=POLICIES, default=list(POLICIES), help="policies to train; default all"
    )
    parser.add_argument("--updates", type=int, default=2_500, help="updates per policy; default %(default)s")
    parser.add_argument(
        "--learning_rate",
        type=float,
        default=3e-3,
        help="Adam's initial learning rate, which decays to zero; default %(default)s",
    )
    parser.add_argument("--seeds", type=int, default=1, help="number of seeds (0, 1, ...) for each policy; default 1")
    parser.add_argument(
        "--output", type=Path, default=Path("runs/modes"), help="folder for the tables and figure; default %(default)s"
    )
    options = parser.parse_args(arguments)
    for name in ("updates", "learning_rate", "seeds"):
        if not getattr(options, name) > 0:
            raise rl.UserError(f"--{name} must be above 0, got {getattr(options, name)}.")
    rl.make_folder(options.output)
    critic, rows, actions = TwoPeaks(), [], {}
    q_network = TensorDictModule(critic, ["observation", "action"], ["state_action_value"])
    for seed, name in itertools.product(range(options.seeds), options.policies):
        torch.manual_seed(seed)
        sample = POLICIES[name](q_network, options.updates, options.learning_rate)
        with torch.no_grad():
            action = sample(STATES.expand(SAMPLES, *STATES.shape)).squeeze(-1)
        actions.setdefault(name, action)  # the figure shows the first seed
        for state, own in zip(STATES, action.unbind(1), strict=True):
            rows.append({"policy": name, "seed": seed, "state": state.item(), **measure(critic, state, own)})
            print("  ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
    write_csv_atomically(options.output / "table.csv", list(rows[0]), rows)
    (options.output / "table.md").write_text(markdown_table(rows), encoding="utf-8")
    draw_figure(actions, critic, options.output / "actions.png")
    print(f"wrote table.csv, table.md and actions.png to {options.output}")
    return 0


if __name__ == "__main__":
    main(sys.argv[1:])
