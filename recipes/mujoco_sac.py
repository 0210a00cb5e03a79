"""Trains the soft actor-critic baseline on a MuJoCo task, by default HalfCheetah-v5.

python recipes/mujoco_sac.py --env Hopper-v5 --total_frames 200000 --seed 1
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    print("loading PyTorch, TorchRL and Lightning (takes a few seconds)", file=sys.stderr, flush=True)

from tensordict.nn import TensorDictModule
from torchrl.objectives import SACLoss

from qsm_rl import QValueMLP
from qsm_rl import training as rl


@rl.exit_on_error
def main(arguments: list[str] | None = None) -> int:
    config = rl.parse_configuration(rl.SACConfiguration, arguments, description=__doc__)
    if config.seeds > 1:
        return rl.run_seeds(config, Path(__file__))
    run = rl.TrainingRun.begin(config, recipe=__file__)
    config, device = run.config, run.device

    # Policy: a Gaussian whose mean and spread depend on the observation, squashed into the action bounds.
    actor = rl.TanhGaussianActor(run.observation_dim, run.action_spec, config.actor_hidden_dims).to(device)

    # Critics.
    critics = [
        TensorDictModule(
            QValueMLP(run.observation_dim, run.action_dim, config.critic_hidden_dims),
            in_keys=["observation", "action"],
            out_keys=["state_action_value"],
        )
        for _ in range(config.num_critics)
    ]

    # Loss and update. A temperature weights the policy's entropy; it is tuned so that the entropy reaches its target.
    fixed = config.entropy_temperature
    loss = SACLoss(
        actor,
        critics,
        num_qvalue_nets=config.num_critics,
        alpha_init=1.0 if fixed is None else fixed,
        fixed_alpha=fixed is not None,
        target_entropy=-float(run.action_dim) if config.target_entropy is None else config.target_entropy,
        loss_function="l2",
        delay_qvalue=True,
        deactivate_vmap=True,  # a plain loop over the critics is faster on a CPU, and compiles
    ).to(device)
    loss.make_value_estimator(gamma=config.gamma)
    update = rl.SACUpdate(
        loss,
        actor_learning_rate=config.actor_learning_rate,
        critic_learning_rate=config.critic_learning_rate,
        tau=config.tau,
        gradient_clipping=config.gradient_clipping,
        precision=config.precision,
        compile=config.compile,
    )

    # Acting: a sample of the policy.
    return run.train(update, actor)


if __name__ == "__main__":
    main(sys.argv[1:])
