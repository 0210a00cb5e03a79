"""Trains a diffusion policy by Q-score matching on a data set of transitions, and optionally continues online.

python recipes/offline_qsm.py --env HalfCheetah-v5 --dataset minari:mujoco/halfcheetah/medium-v0
python recipes/offline_qsm.py --env Hopper-v5 --dataset runs/hopper --offline_updates 50000 --online_frames 20000
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

if __name__ == "__main__":
    print("loading PyTorch, TorchRL and Lightning (takes a few seconds)", file=sys.stderr, flush=True)

from tensordict.nn import TensorDictSequential

from qsm_rl import (
    DDIMSampler,
    DDPMSampler,
    DiffusionActor,
    GaussianExploration,
    NoiseSchedule,
    NormalizedQScore,
    QScoreMatchingLoss,
    ScoreMLP,
)
from qsm_rl import training as rl


@rl.exit_on_error
def main(arguments: list[str] | None = None) -> int:
    config = rl.parse_configuration(rl.OfflineQSMConfiguration, arguments, description=__doc__)
    if config.seeds > 1:
        return rl.run_seeds(config, Path(__file__))

    # The data set is read before a folder is made, since it has to fit the environment.
    with rl.user_errors(ValueError, ImportError):
        environment = rl.make_environment(config.env, action_repeat=config.action_repeat)
    dataset = rl.read_dataset(config.dataset, environment, env=config.env, action_repeat=config.action_repeat)
    environment.close()
    if config.resume is None:  # collected frames are added to the data set, not stored in its place
        config = replace(config, replay_size=max(config.replay_size, len(dataset) + config.online_frames))
    run = rl.TrainingRun.begin(config, recipe=__file__)
    config, device = run.config, run.device
    print(
        f"data set: {len(dataset):,} transitions of {config.dataset}; {config.offline_updates:,} updates on them first"
    )

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

    # Critics, loss and update: the score target pulls towards high Q, behaviour cloning towards the data.
    critics = rl.make_critics(config, run.observation_dim, run.action_dim)
    loss = QScoreMatchingLoss(
        actor,
        critics,
        score_target=NormalizedQScore(config.score_temperature),
        bc_weight=config.bc_weight,
        target_aggregation=config.target_aggregation,
        target_action_noise_std=config.target_action_noise_std,
        delay_qvalue=config.critic != "crossq",
    ).to(device)
    loss.make_value_estimator(gamma=config.gamma)
    update = rl.QSMUpdate(
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

    # Acting, after the offline updates: a sample of the policy with noise added.
    exploration = GaussianExploration(run.action_spec, std=config.exploration_noise_std).to(device)
    acting = TensorDictSequential(actor, exploration)
    return run.train(update, acting, dataset=dataset, offline_frames=config.offline_updates)


if __name__ == "__main__":
    main(sys.argv[1:])
