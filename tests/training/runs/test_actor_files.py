from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.data import Bounded

from qsm_rl import DDIMSampler, DDPMSampler, DiffusionActor, NoiseSchedule, ScoreMLP
from qsm_rl.training import TanhActor, TanhGaussianActor, UserError, load_actor, make_environment, publish_actor


@pytest.mark.parametrize("sampler", [DDPMSampler(clip="clean", temperature=0.5), DDIMSampler(3, eta=0.5)])
@pytest.mark.parametrize("normalize", [False, True])
def test_published_actor_comes_back_with_the_same_actions(tmp_path, sampler, normalize):
    environment = make_environment("InvertedPendulum-v5", num_envs=2, seed=0, normalize_observation=normalize)
    environment.rollout(20)
    actor = DiffusionActor(
        ScoreMLP(4, 1, (8, 4)),
        action_spec=Bounded(-3.0, 3.0, (1,)),
        noise_schedule=NoiseSchedule.cosine(5),
        sampler=sampler,
    )
    with torch.no_grad():
        actor.score_network.mlp[-1].weight.mul_(0.1)  # actions between the bounds, too
    publish_actor(tmp_path, actor, environment=environment, env="InvertedPendulum-v5")
    loaded = load_actor(tmp_path)
    raw = torch.randn(16, 4)
    norm = environment.transform if normalize else None
    seen = norm.normalize(raw) if normalize else raw
    torch.manual_seed(1)
    expected = actor(TensorDict({"observation": seen}, [16]))["action"]
    torch.manual_seed(1)
    assert torch.equal(loaded(TensorDict({"observation": raw}, [16]))["action"], expected)
    assert (expected.abs() < 3).any()
    noise = torch.randn(16, 1), torch.randn(len(sampler.steps(actor.noise_schedule)), 16, 1)
    again = DiffusionActor.from_pretrained(tmp_path)
    assert torch.equal(again.sample(raw, *noise), actor.sample(seen, *noise))
    t = torch.randint(5, (16,))
    assert torch.equal(again.predict_noise(noise[0], raw, t), actor.predict_noise(noise[0], seen, t))
    again.save_pretrained(tmp_path / "copy")  # what was loaded can be saved, its statistics included
    assert torch.equal(load_actor(tmp_path / "copy").sample(raw, *noise), actor.sample(seen, *noise))
    assert json.loads((tmp_path / "config.json").read_text())["env"] == "InvertedPendulum-v5"


class OwnNetwork(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 1)

    def forward(self, noisy_action, observation, t):
        return self.layer(torch.cat([noisy_action, observation, t.unsqueeze(-1)], -1))


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("kind", ["diffusion", "another"])
def test_of_an_actor_of_ones_own_the_weights_are_published(tmp_path, kind, normalize):
    environment = make_environment("InvertedPendulum-v5", num_envs=2, seed=0, normalize_observation=normalize)
    environment.rollout(20)

    def build():
        if kind == "another":
            return TensorDictModule(nn.Linear(4, 1), ["observation"], ["action"])
        spec = environment.action_spec_unbatched
        return DiffusionActor(OwnNetwork(), action_spec=spec, noise_schedule=NoiseSchedule.cosine(5))

    actor, again = build(), build()
    reason = "the score network is a OwnNetwork" if kind == "diffusion" else "only its own code can build a TensorDict"
    with pytest.warns(UserWarning, match=f"contains only the weights: {reason}"):
        publish_actor(tmp_path, actor, environment=environment, env="InvertedPendulum-v5")
    weights = load_file(tmp_path / "model.safetensors")
    if normalize:
        norm = environment.transform
        assert torch.equal(weights.pop("observation_norm.mean"), norm.mean)
        assert torch.equal(weights.pop("observation_norm.variance"), norm.variance)
    again.load_state_dict(weights)
    for name, value in actor.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    with pytest.raises(UserError, match=r"contains only the weights of a .* build it, and call load_state_dict"):
        load_actor(tmp_path)


@pytest.mark.parametrize("kind", [TanhActor, TanhGaussianActor])
def test_an_actor_of_a_baseline_is_named_where_a_diffusion_policy_is_read(tmp_path, kind):
    kind(4, Bounded(-3.0, 3.0, (1,)), (8,)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"it is a {kind.__name__}, not a diffusion policy.*load_actor"):
        DiffusionActor.from_pretrained(tmp_path)
    assert isinstance(load_actor(tmp_path), kind)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda folder: (folder / "config.json").unlink(),
        lambda folder: (folder / "config.json").write_text("{}"),
        lambda folder: (folder / "config.json").write_text("nonsense"),
        lambda folder: (folder / "model.safetensors").write_bytes(b"\xff" * 100),
        lambda folder: (folder / "config.json").write_text(
            (folder / "config.json").read_text().replace('"observation_dim": 4', '"observation_dim": 5')
        ),
    ],
)
def test_a_broken_actor_folder_is_named(tmp_path, spoil):
    environment = make_environment("InvertedPendulum-v5", seed=0)
    spec = environment.action_spec_unbatched
    actor = DiffusionActor(ScoreMLP(4, 1, (8,)), action_spec=spec, noise_schedule=NoiseSchedule.cosine(5))
    publish_actor(tmp_path, actor, environment=environment, env="InvertedPendulum-v5")
    load_actor(tmp_path)
    spoil(tmp_path)
    with pytest.raises(UserError, match="no readable actor"):
        load_actor(tmp_path)
