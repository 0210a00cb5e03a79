"""What a saved actor keeps; broken and malicious files are in tests/faults."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from torchrl.data import Bounded

from qsm_rl import DDIMSampler, DiffusionActor, NoiseSchedule, ScoreMLP
from qsm_rl.networks import SinusoidalTimeEmbedding
from qsm_rl.observation_norm import NormalizedObservations


def new_actor(network: nn.Module, **options) -> DiffusionActor:
    spec = Bounded(torch.tensor([-3.0, 0.0]), torch.tensor([1.0, 0.5]))
    return DiffusionActor(network, action_spec=spec, noise_schedule=NoiseSchedule.cosine(4), **options)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"time_embedding": "sinusoidal", "time_features": 6, "time_dim": 5},
        {"layer_norm": True, "time_features": 4, "time_dim": 7},
    ],
)
def test_every_setting_of_network_and_actor_comes_back(tmp_path, settings):
    options = {
        "sampler": DDIMSampler(2),
        "in_keys": ["position", ("robot", "speed")],
        "out_keys": [("agent", "action")],
    }
    actor = new_actor(ScoreMLP(3, 2, (8, 4), **settings), **options)
    actor.save_pretrained(tmp_path, {"env": "Mine-v0", "format": 9})  # what is told beside them never hides settings
    again = DiffusionActor.from_pretrained(str(tmp_path))
    assert (again.in_keys, again.out_keys, again.sampler) == (actor.in_keys, actor.out_keys, actor.sampler)
    noise = torch.randn(16, 2), torch.randn(2, 16, 2)
    assert torch.equal(again.sample(torch.ones(16, 3), *noise), actor.sample(torch.ones(16, 3), *noise))
    assert torch.equal(again.box.low, actor.box.low) and torch.equal(again.box.high, actor.box.high)
    assert json.loads((tmp_path / "config.json").read_text())["env"] == "Mine-v0"


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8])
def test_a_saved_actor_normalises_integers_as_the_same_numbers(tmp_path, dtype):
    network = NormalizedObservations(ScoreMLP(3, 2, (8,)), torch.full((3,), 100.0), torch.full((3,), 400.0))
    new_actor(network).save_pretrained(tmp_path)
    actor = DiffusionActor.from_pretrained(tmp_path)
    observation, noise = torch.tensor([[80, 95, 103], [110, 100, 124]]), (torch.randn(2, 2), torch.randn(4, 2, 2))
    expected = actor.sample(observation.float(), *noise)
    torch.testing.assert_close(actor.sample(observation.to(dtype), *noise), expected)


def test_an_actor_in_bfloat16_is_saved_too(tmp_path):
    actor = new_actor(ScoreMLP(3, 2, (8,))).to(torch.bfloat16)
    actor.save_pretrained(tmp_path)
    again = DiffusionActor.from_pretrained(tmp_path)
    for name, value in actor.state_dict().items():
        assert torch.equal(again.state_dict()[name], value.float()), name


def test_a_network_whose_layers_were_changed_is_refused_before_anything_is_written(tmp_path):
    """It would come back as another one."""
    network = ScoreMLP(4, 2, (8,))
    network.mlp[1] = nn.ReLU()
    timed = ScoreMLP(4, 2, (8,), time_embedding="sinusoidal")
    timed.time_mlp[0] = SinusoidalTimeEmbedding(64, max_period=10.0)
    for changed in (network, timed):
        actor = DiffusionActor(changed, action_spec=Bounded(-1.0, 1.0, (2,)), noise_schedule=NoiseSchedule.vp(5))
        with pytest.raises(ValueError, match="layers were changed after it was built"):
            actor.save_pretrained(tmp_path / "actor")
    lazy = DiffusionActor(ScoreMLP(None, 2), action_spec=Bounded(-1.0, 1.0, (2,)), noise_schedule=NoiseSchedule.vp(5))
    with pytest.raises(ValueError, match="call the actor once on a batch first"):
        lazy.save_pretrained(tmp_path / "actor")
    assert not (tmp_path / "actor").exists()


def test_a_network_that_numbers_cannot_build_is_refused_before_anything_is_written(tmp_path):
    class Mine(ScoreMLP):
        pass

    with pytest.raises(ValueError, match="score network is a Mine"):
        new_actor(Mine(3, 2)).save_pretrained(tmp_path / "actor")
    assert not (tmp_path / "actor").exists()
