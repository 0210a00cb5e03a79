"""Trains a diffusion policy by Q-score matching on a MuJoCo task, by default HalfCheetah-v5.

python recipes/mujoco_qsm.py --env Hopper-v5 --total_frames 200000 --seed 1
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    print("loading PyTorch, TorchRL and Lightning (takes a few seconds)", file=sys.stderr, flush=True)

import torch
from tensordict.nn import TensorDictSequential
from torchrl.data import Bounded

from qsm_rl import (
    BestOfN,
    BoltzmannQScore,
    DDIMSampler,
    DDPMSampler,
    DiffusionActor,
    EntropyBonus,
    GaussianExploration,
    NoiseSchedule,
    NormalizedQScore,
    PosteriorQScore,
    QScoreMatchingLoss,
    ScaledQScore,
    ScoreMLP,
    SpreadTuner,
    TwoHotHead,
)
from qsm_rl import training as rl


@rl.exit_on_error
def main(arguments: list[str] | None = None) -> int:
    config = rl.parse_configuration(rl.QSMConfiguration, arguments, description=__doc__)
    stacked = rl.stacks_seeds(config)
    if config.seeds > 1 and not stacked:
        return rl.run_seeds(config, Path(__file__))
    run = rl.TrainingRun.begin(config, recipe=__file__)
    parts = (run.config, run.observation_dim, run.action_spec, run.device)
    if stacked:
        return run.train(*rl.stack_seeds(run.config, lambda: build(*parts)))
    return run.train(*build(*parts))


def build(
    config: rl.QSMConfiguration, observation_dim: int, action_spec: Bounded, device: torch.device
) -> tuple[rl.QSMUpdate, TensorDictSequential]:
    """Builds the update, and the policy that collects."""
    action_dim = action_spec.shape[-1]

    # Policy: a network that predicts the noise in an action, a noise schedule, and a sampler that removes the noise.
    clip = None if config.clip == "none" else config.clip
    if config.sampler == "ddpm":
        sampler = DDPMSampler(clip=clip, temperature=config.sampler_temperature)
    else:
        sampler = DDIMSampler(clip=clip)
    actor = DiffusionActor(
        ScoreMLP(observation_dim, action_dim, config.actor_hidden_dims),
        action_spec=action_spec,
        noise_schedule=getattr(NoiseSchedule, config.schedule)(config.num_steps),
        sampler=sampler,
    ).to(device)

    # Critics, and the score target that turns them into a regression target for the policy.
    head = None
    if config.critic_bins is not None:
        head = TwoHotHead(*(config.critic_support or (None, None)), config.critic_bins, config.critic_symlog)
    critics = rl.make_critics(config, observation_dim, action_dim, head)
    score_target = {
        "scaled": lambda: ScaledQScore(config.score_scale),
        "boltzmann": lambda: BoltzmannQScore(config.score_temperature),
        "normalized": lambda: NormalizedQScore(config.score_temperature, sigma=config.score_sigma),
        "posterior": lambda: PosteriorQScore(config.score_temperature, config.score_particles, normalize=True),
    }[config.score_target]()

    # Loss and update.
    entropy_bonus = None
    if config.entropy_temperature is not None:
        entropy_bonus = EntropyBonus(config.entropy_temperature, config.entropy_samples)
    loss = QScoreMatchingLoss(
        actor,
        critics,
        score_target=score_target,
        score_critics=config.score_critics,
        score_aggregation=config.score_aggregation,
        bc_weight=config.bc_weight,
        target_aggregation=config.target_aggregation,
        target_action_noise_std=config.target_action_noise_std,
        entropy_bonus=entropy_bonus,
        delay_qvalue=config.critic != "crossq",
        deactivate_vmap=device.type == "cpu",  # on a GPU all critics share kernels
    ).to(device)
    loss.make_value_estimator(gamma=config.gamma)
    update = rl.QSMUpdate(
        loss,
        actor_learning_rate=config.actor_learning_rate,
        critic_learning_rate=config.critic_learning_rate,
        tau=config.tau,
        critic_adam_beta1=config.critic_adam_beta1,
        policy_delay=config.policy_delay,
        actor_learning_rate_decay=config.actor_learning_rate_decay,
        gradient_clipping=config.gradient_clipping,
        actor_ema=config.actor_ema,
        spread_tuner=SpreadTuner(score_target, config.score_spread, rate=0.03) if config.score_spread else None,
        eval_best_of=config.eval_best_of,
        precision=config.precision,
        compile=config.compile,
        cuda_graph=device.type == "cuda" and config.devices == 1,
    )

    # Acting: a sample of the policy, or the best of several according to the current critics, with noise added.
    acting = update.actor if config.actor_ema_acts else actor
    if config.best_of > 1:
        acting = BestOfN(acting, loss.trained_critics(live=True), num_samples=config.best_of)
    exploration = GaussianExploration(action_spec, std=config.exploration_noise_std).to(device)

    return update, TensorDictSequential(acting, exploration)


if __name__ == "__main__":
    main(sys.argv[1:])
