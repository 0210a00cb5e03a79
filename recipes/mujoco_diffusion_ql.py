"""Trains a diffusion policy by Diffusion-QL, through the chain, on a MuJoCo task, by default HalfCheetah-v5.

python recipes/mujoco_diffusion_ql.py --env Hopper-v5 --total_frames 200000 --seed 1
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    print("loading PyTorch, TorchRL and Lightning (takes a few seconds)", file=sys.stderr, flush=True)

from tensordict.nn import TensorDictSequential

from qsm_rl import (
    DDIMSampler,
    DDPMSampler,
    DiffusionActor,
    DiffusionQLLoss,
    GaussianExploration,
    NoiseSchedule,
    ScoreMLP,
)
from qsm_rl import training as rl


@rl.exit_on_error
def main(arguments: list[str] | None = None) -> int:
    config = rl.parse_configuration(rl.DiffusionQLConfiguration, arguments, description=__doc__)
    if config.seeds > 1:
        return rl.run_seeds(config, Path(__file__))
    run = rl.TrainingRun.begin(config, recipe=__file__)
    config, device = run.config, run.device

    # Policy: a network that predicts the noise in an action, a noise schedule, and a sampler that removes the noise.
    clip = None if config.clip == "none" else config.clip
    if config.sampler == "ddpm":
        sampler = DDPMSampler(clip=clip, temperature=config.sampler_temperature)
    else:
        sampler = DDIMSampler(clip=clip)
    actor = DiffusionActor(
        ScoreMLP(run.observation_dim, run.action_dim, config.actor_hidden_dims),
        action_spec=run.action_spec,
        noise_schedule=getattr(NoiseSchedule, config.schedule)(config.num_steps),
        sampler=sampler,
    ).to(device)

    # Critics, loss and update.
    critics = rl.make_critics(config, run.observation_dim, run.action_dim)
    loss = DiffusionQLLoss(
        actor,
        critics,
        eta=config.eta,
        bc_weight=config.bc_weight,
        delay_actor=config.delay_actor,
        target_aggregation=config.target_aggregation,
        target_action_noise_std=config.target_action_noise_std,
        delay_qvalue=config.critic != "crossq",
    ).to(device)
    loss.make_value_estimator(gamma=config.gamma)
    update = rl.DiffusionUpdate(
        loss,
        actor_learning_rate=config.actor_learning_rate,
        critic_learning_rate=config.critic_learning_rate,
        tau=config.tau,
        critic_adam_beta1=config.critic_adam_beta1,
        policy_delay=config.policy_delay,
        gradient_clipping=config.gradient_clipping,
        actor_ema=config.actor_ema,
        precision=config.precision,
        compile=config.compile,
    )

    # Acting: a sample of the policy, with noise added.
    exploration = GaussianExploration(run.action_spec, std=config.exploration_noise_std).to(device)
    return run.train(update, TensorDictSequential(actor, exploration))


if __name__ == "__main__":
    main(sys.argv[1:])
