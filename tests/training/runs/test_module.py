from __future__ import annotations

import pytest
import torch

from qsm_rl.training import read_fault
from qsm_rl.training.runs.module import NonFiniteDataError
from qsm_rl.training.updates.update import NonFiniteLossError, gradient_step
from tests.training.small_trainer import WIDE, build, run


@pytest.mark.parametrize(
    ("updates_per_frame", "num_envs", "expected"),
    [
        (1.0, 1, {19: 0, 20: 1, 21: 2, 30: 11}),  # as the authors': one update with the last warm-up frame
        (0.5, 1, {20: 0, 21: 1, 22: 1, 23: 2}),
        (2.0, 1, {20: 2, 21: 4}),
        (1.0, 4, {16: 0, 20: 1, 24: 5}),
    ],
)
def test_updates_follow_the_frames(updates_per_frame, num_envs, expected):
    frames, module = build("Slide", total=32, num_envs=num_envs)
    module.updates_per_frame = updates_per_frame
    done = {}
    for index, batch in enumerate(frames):
        module.training_step(batch, index)
        done[module.env_frames] = module.grad_steps
    assert {frame: done[frame] for frame in expected} == expected


def test_replay_holds_actions_in_environment_units():
    frames, module = build("WideSlide", bound=WIDE, total=40)
    run(frames, module)
    actions = module.writer.replay[:]["action"].abs()
    assert 1 < actions.max() <= WIDE


@pytest.mark.parametrize(("env", "entry"), [("NanReward", "next reward"), ("InfObservation", "next observation")])
def test_non_finite_frames_are_refused_before_replay(env, entry):
    frames, module = build(env)
    with pytest.raises(NonFiniteDataError, match=rf"{entry} of {env} is (nan|inf).*12"):
        run(frames, module)
    stored = module.writer.replay[:]
    assert len(stored) == 12
    assert all(value.isfinite().all() for value in stored.flatten_keys().values())


def test_a_non_finite_action_is_refused_by_name():
    frames, module = build("Slide")
    batch = next(iter(frames))
    batch["action"][..., 1] = float("nan")
    with pytest.raises(NonFiniteDataError, match="action of Slide is nan"):
        module.training_step(batch, 0)
    assert len(module.writer.replay) == 0


def test_a_non_finite_loss_stops_before_the_weights_are_touched():
    frames, module = build("Slide")
    run(frames, module)
    before = {name: value.clone() for name, value in module.update.state_dict().items()}
    batch = module.writer.replay.sample()
    batch["next", "reward"][3] = float("inf")
    with pytest.raises(NonFiniteLossError, match="loss_qvalue is inf"):
        module.update(batch)
    for name, value in module.update.state_dict().items():
        assert torch.equal(value, before[name]), name
    module.writer.replay.sample = lambda count: batch
    with pytest.raises(NonFiniteLossError, match="at frame 61, update 41"):
        module.training_step(next(iter(build("Slide")[0])), 0)


@pytest.mark.filterwarnings("ignore:Got conflicting batch_sizes")
def test_batches_are_drawn_together_and_used_one_by_one():
    frames, module = build("Slide")
    run(frames, module)
    draws = list(module._draw(20))
    assert [len(batches) for batches in draws] == [16, 4]
    drawn = [batch for batches in draws for batch in batches]
    assert [batch.batch_size for batch in drawn] == [(16,)] * 20
    assert len({tuple(batch["index"].tolist()) for batch in drawn}) == 20
    assert torch.cat([batch["index"] for batch in drawn]).unique().numel() > 50  # of 60 rows


def test_a_gradient_that_is_not_finite_stops_before_the_weights_are_touched():
    weight = torch.nn.Parameter(torch.tensor([1.0, 0.0]))
    optimizer = torch.optim.Adam([weight])
    loss = weight.sqrt().sum()  # 1, with the gradient (0.5, inf)
    with pytest.raises(NonFiniteLossError, match="the gradient of loss_x is inf"):
        gradient_step("loss_x", loss, optimizer, [weight])
    assert weight.tolist() == [1, 0] and not optimizer.state


def test_clipping_is_by_the_norm_over_all_parameters():
    weights = [torch.nn.Parameter(torch.zeros(1)), torch.nn.Parameter(torch.zeros(2))]
    optimizer = torch.optim.SGD(weights, lr=1.0)
    loss = 2 * weights[0].sum() + (weights[1] * torch.tensor([4.0, 4.0])).sum()  # a gradient of norm 6
    gradient_step("loss_x", loss, optimizer, weights, gradient_clipping=3.0)
    assert [weight.tolist() for weight in weights] == [pytest.approx([-1.0]), pytest.approx([-2.0, -2.0])]


def test_a_dump_reproduces_collected_frames(tmp_path):
    frames, module = build("NanReward")
    module.faults = tmp_path
    with pytest.raises(NonFiniteDataError, match=r"next reward of NanReward is nan.*\nA dump to reproduce it: .*frame"):
        run(frames, module)
    (folder,) = tmp_path.iterdir()
    fault = read_fault(folder)
    assert fault.about["frame"] == 12 and "next reward" in fault.about["message"]
    assert fault.batch.shape == (1, 1) and fault.batch["next", "reward"].isnan().all()
    assert not fault.weights and fault.random_state is None


def test_a_dump_reproduces_an_update_to_the_bit(tmp_path):
    frames, module = build("Slide")
    run(frames, module)
    module.faults, replay = tmp_path, module.writer.replay
    batch = replay.sample()
    batch["next", "observation"][0] = 3e38  # finite, and beyond float32 inside the networks
    replay.sample = lambda count: batch
    with pytest.raises(NonFiniteLossError) as error:
        module.training_step(next(iter(build("Slide")[0])), 0)
    (folder,) = tmp_path.iterdir()
    fault = read_fault(folder)
    _, again = build("Slide")
    again.update.load_state_dict(fault.weights)
    torch.set_rng_state(fault.random_state)
    with pytest.raises(NonFiniteLossError) as repeated:
        again.update(fault.batch)
    assert str(error.value).startswith(str(repeated.value)) and fault.about["message"] == str(repeated.value)


def test_a_dump_of_the_actors_loss_has_the_critics_behind_their_step(tmp_path):
    frames, module = build("Slide")
    run(frames, module)
    module.faults, replay, update = tmp_path, module.writer.replay, module.update
    batch, infos = replay.sample(), []
    replay.sample = lambda count: batch
    before = {name: value.clone() for name, value in update.state_dict().items()}
    actor_loss = update._actor_loss

    def infinite(batch):
        loss, info = actor_loss(batch)
        infos.append(info)
        return loss * float("inf"), info

    update._actor_loss = infinite
    with pytest.raises(NonFiniteLossError, match="loss_actor is inf"):
        module.training_step(next(iter(build("Slide")[0])), 0)
    (folder,) = tmp_path.iterdir()
    fault = read_fault(folder)
    moved = {name for name, value in fault.weights.items() if not torch.equal(value, before[name])}
    assert moved and all("qvalue_network" in name for name in moved)

    # As the page on faults says it.
    again = build("Slide")[1].update
    again.load_state_dict(fault.weights)
    torch.set_rng_state(fault.random_state)
    again.loss.qvalue_loss(fault.batch)
    _, info = again.loss.actor_loss(fault.batch)
    for name, value in info.items():
        assert torch.equal(value, infos[0][name]), name


def test_metrics_average_losses_and_count_only_whole_episodes():
    frames, module = build("Slide", total=60)
    returns, losses = [], []
    for index, batch in enumerate(frames):
        module.training_step(batch, index)
        ended = batch["next", "episode_end"]
        returns += batch["next", "episode_reward"][ended].tolist()
        if module.grad_steps:
            losses.append(float(module.window._sums["loss/actor"]))
    row = module.metrics()
    if returns:
        assert row["train/return_mean"] == pytest.approx(sum(returns) / len(returns))
    assert row["loss/actor"] == pytest.approx(losses[-1] / module.grad_steps)
    assert 0 <= row["train/action_saturation"] <= 1
    assert "loss/actor" not in module.metrics()
