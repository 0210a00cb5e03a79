from __future__ import annotations

import csv

import pytest
import torch

from recipes import modes


def normal(*places: float, std: float = 0.1, weights: list[float] | None = None) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    which = torch.multinomial(torch.tensor(weights or [1.0] * len(places)), 2000, replacement=True, generator=generator)
    return torch.tensor(places)[which] + std * torch.randn(2000, generator=generator)


@pytest.mark.parametrize(
    ("action", "count"),
    [
        (normal(0.3), 1),
        (normal(-0.4, 0.4), 2),
        (normal(-0.6, 0.0, 0.6), 3),
        (normal(-0.4, 0.4, weights=[0.9, 0.1]), 2),
        (normal(-0.4, 0.4, weights=[0.99, 0.01]), 1),
        (normal(-0.1, 0.1), 1),  # two standard deviations apart is no valley
        (normal(0.0, std=0.4), 1),
        (torch.rand(2000, generator=torch.Generator().manual_seed(0)) * 2 - 1, 1),
        (torch.ones(2000), 1),  # all at a bound
        (torch.tensor([-1.0, 1.0]).repeat(1000), 2),
    ],
)
def test_modes_are_peaks_with_valleys_between(action, count):
    assert modes.count_modes(action) == count


def test_the_known_policy_has_half_of_its_actions_at_each_peak():
    critic = modes.TwoPeaks()
    state = torch.full((2000, 1), 0.5)
    action = normal(-0.35, 0.65, std=modes.STD)  # 0.3 * 0.5 - 0.5 and 0.3 * 0.5 + 0.5
    torch.testing.assert_close(
        modes.shares_of_peaks(action, critic.peaks(state[0])), torch.tensor([0.5, 0.5]), atol=0.03, rtol=0
    )
    # Q is the logarithm of their density up to a constant: E[-(a - peak)^2 / (2 std^2)] = -1 / 2
    assert critic(state, action.unsqueeze(-1)).mean().item() == pytest.approx(-0.5, abs=0.05)


def test_a_short_run_leaves_table_and_figure(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        modes.main(["--policies", "Diffusion-QL", "SAC", "--updates", "2", "--seeds", "2", "--output", str(tmp_path)])
    assert ended.value.code == 0
    with (tmp_path / "table.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["seed"], row["policy"], float(row["state"])) for row in rows] == [
        (seed, name, state) for seed in "01" for name in ("Diffusion-QL", "SAC") for state in (-0.5, 0.0, 0.5)
    ]
    assert len({row["mean_q"] for row in rows}) > 6  # the seeds differ
    assert (tmp_path / "actions.png").read_bytes().startswith(b"\x89PNG")


def test_table_says_the_least_and_the_most_over_states_and_seeds():
    keys = ("policy", "seed", "state", "modes", "left", "right", "elsewhere", "mean_q")
    rows = [
        dict(zip(keys, values, strict=True))
        for values in (
            ("A", 0, 0.5, 2, 0.5, 0.4, 0.1, -0.5),
            ("A", 1, 0.5, 2, 0.3, 0.6, 0.1, -0.75),
            ("B", 0, 0.5, 1, 0, 1, 0, 0),
        )
    ]
    assert modes.markdown_table(rows).splitlines()[2:] == [
        "| A | 2 | 0.3 to 0.4 | 0.1 | -0.75 to -0.5 |",
        "| B | 1 | 0 | 0 | 0 |",
    ]


@pytest.mark.parametrize("flag", ["--updates", "--learning_rate", "--seeds"])
def test_numbers_that_train_nothing_are_named(tmp_path, capsys, flag):
    with pytest.raises(SystemExit) as ended:
        modes.main([flag, "0", "--output", str(tmp_path / "out")])
    assert ended.value.code == 2 and f"{flag} must be above 0, got 0" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_exact_target_keeps_both_peaks(tmp_path, capsys):
    with pytest.raises(SystemExit):
        modes.main(["--policies", "QSM, posterior", "--updates", "2500", "--output", str(tmp_path)])
    with (tmp_path / "table.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            assert row["modes"] == "2"
            assert float(row["left"]) > 0.3 and float(row["right"]) > 0.3
