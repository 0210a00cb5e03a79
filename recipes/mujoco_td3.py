"""Trains the TD3 baseline on a MuJoCo task, by default HalfCheetah-v5.

python recipes/mujoco_td3.py --env Hopper-v5 --total_frames 200000 --seed 1
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    print("loading PyTorch, TorchRL and Lightning (takes a few seconds)", file=sys.stderr, flush=True)

from tensordict.nn import TensorDictModule, TensorDictSequential
from torchrl.objectives import TD3Loss

from qsm_rl import GaussianExploration, QValueMLP
from qsm_rl import training as rl


@rl.exit_on_error
def main(arguments: list[str] | None = None) -> int:
    config = rl.parse_configuration(rl.TD3Configuration, arguments, description=__doc__)
    if config.seeds > 1:
        return rl.run_seeds(config, Path(__file__))
    run = rl.TrainingRun.begin(config, recipe=__file__)
    config, device, action_spec = run.config, run.device, run.action_spec

    # Policy: one action for each observation, inside the bounds.
    actor = rl.TanhActor(run.observation_dim, action_spec, config.actor_hidden_dims).to(device)

    # Critics.
    critics = [
        TensorDictModule(
            QValueMLP(run.observation_dim, run.action_dim, config.critic_hidden_dims),
            in_keys=["observation", "action"],
            out_keys=["state_action_value"],
        )
        for _ in range(2)
    ]

    # Loss and update. The noise on the target action scales with the range of each actuator.
    half_range = (actor.box.high - actor.box.low) / 2
    loss = TD3Loss(
        actor,
        critics,
        action_spec=action_spec.to(device),
        policy_noise=config.target_action_noise_std * half_range,
        noise_clip=config.target_action_noise_clip * half_range,
        loss_function="l2",
        delay_actor=True,
        delay_qvalue=True,
        deactivate_vmap=True,  # a plain loop over the critics is faster on a CPU, and compiles
    ).to(device)
    loss.make_value_estimator(gamma=config.gamma)
    update = rl.TD3Update(
        loss,
        actor_learning_rate=config.actor_learning_rate,
        critic_learning_rate=config.critic_learning_rate,
        tau=config.tau,
        policy_delay=config.policy_delay,
        gradient_clipping=config.gradient_clipping,
        precision=config.precision,
        compile=config.compile,
    )

    # Acting: the policy's action with noise added.
    exploration = GaussianExploration(action_spec, std=config.exploration_noise_std).to(device)
    return run.train(update, TensorDictSequential(actor, exploration))


if __name__ == "__main__":
    main(sys.argv[1:])
