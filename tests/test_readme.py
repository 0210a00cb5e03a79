"""The README's program runs, trains, and is as short as promised."""

from __future__ import annotations

import re
from pathlib import Path

import torch

README = Path(__file__).parent.parent / "README.md"


def test_the_composition_trains_actor_and_critics():
    (program,) = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.S)
    assert len(program.strip().splitlines()) <= 40
    setup, loop = program.split("for frames in collector:")
    torch.manual_seed(0)
    scope: dict = {}
    exec(compile(setup, "README.md", "exec"), scope)
    actor_before = [p.clone() for p in scope["actor"].parameters()]
    critics_before = [[p.clone() for p in critic.parameters()] for critic in scope["critics"]]
    exec(compile("for frames in collector:" + loop, "README.md", "exec"), scope)

    assert len(scope["replay"]) == 400
    assert all(not torch.equal(a, b) for a, b in zip(actor_before, scope["actor"].parameters(), strict=True))
    for before, critic in zip(critics_before, scope["trained_critics"], strict=True):
        assert all(not torch.equal(a, b) for a, b in zip(before, critic.parameters(), strict=True))
    # The returned critics compute what the loss computes.
    batch = scope["replay"].sample()
    expected = scope["loss"].qvalue_loss(batch.clone())[1]["q_value"]
    for critic, q_value in zip(scope["trained_critics"], expected, strict=True):
        torch.testing.assert_close(critic(batch.clone())["state_action_value"].squeeze(-1), q_value)
