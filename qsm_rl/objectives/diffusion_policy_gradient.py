"""The likelihood-ratio policy gradient of a diffusion policy as a TorchRL loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModule
from torch import Tensor

from qsm_rl import functional as F
from qsm_rl.actor import DiffusionActor
from qsm_rl.entropy import EntropyBonus
from qsm_rl.objectives.diffusion_actor_critic import DiffusionActorCriticLoss

__all__ = ["DiffusionPolicyGradientLoss"]


class DiffusionPolicyGradientLoss(DiffusionActorCriticLoss):
    r"""Likelihood-ratio policy gradient through the Gaussian steps of the reverse chain, with a critic.

    For each replayed observation the current policy draws M chains, and the loss is ``-mean_m A_m sum_i log p_i``.
    ``A_m`` is Q at the chain's action minus the mean over the other chains' actions, and ``log p_i`` is the
    log-likelihood of the chain's i-th step. The gradient of this loss is an unbiased estimate of the gradient of
    ``-E[Q(s, a)]`` over the policy's actions; its value means nothing. Only the critics' values are used, not their
    gradient dQ/da.

    This is the score-function estimator of Black et al. 2023 (DDPO, arXiv 2305.13301, section 4) with a critic in place
    of the reward and the baseline of Kool et al. 2019. The observations come from the replay buffer, as in off-policy
    actor-critics (Degris et al. 2012, arXiv 1205.4839, equation 4). Chains are always fresh, so there are no importance
    weights. It is not DPPO (Ren et al. 2024, arXiv 2409.00588), which shares the chain's likelihood and the floor on
    its noise but is on-policy, with clipped ratios and advantages over time.

    Neither a step without noise nor a clipped state has a density. So here every step's standard deviation is at least
    ``min_std``, and likelihoods are those of the draws before clipping. The policy that is improved is thus a little
    wider than the one that acts. With the usual schedules the floor only matters in the last steps, where its noise is
    like that which [`GaussianExploration`][qsm_rl.GaussianExploration] and ``target_action_noise_std`` of the same size
    add to an action.

    Args:
        actor_network: the policy. Give its sampler the clip ``"clean"``. Where the action itself is clipped, all chains
            that end at a face have the same Q and nothing is learned, and with any other clip an untrained chain almost
            always ends there.
        qvalue_network: critics, as in [`QScoreMatchingLoss`][qsm_rl.QScoreMatchingLoss]; the advantage uses their
            mean.

    Keyword Args:
        num_samples: number M of chains for each observation, at least 2. More give a less noisy gradient and cost time
            in proportion; usual range 4 to 16.
        min_std: floor on every step's standard deviation, in box units, above 0. A lower floor is closer to the acting
            policy but makes the gradient noisier, in inverse proportion; DPPO's is 0.1, usual range 0.05 to 0.2.

    The other arguments are those of [`QScoreMatchingLoss`][qsm_rl.QScoreMatchingLoss]; ``loss_function`` is that of the
    critics.

    Output entries: ``loss_actor``, ``loss_qvalue`` (summed over critics) and detached scalars: the critics' as in that
    loss, ``policy_q_value`` (mean of Q at the policy's samples) and ``advantage_size`` (mean of abs(A)). The priority
    entry ``"td_error"`` ``(*B,)`` is written to the input.

    Raises:
        TypeError: if the actor is not a [`DiffusionActor`][qsm_rl.DiffusionActor], naming what it lacks.
        ValueError: for fewer than two samples, a floor of 0, and as [`QScoreMatchingLoss`][qsm_rl.QScoreMatchingLoss]
            does.
        KeyError: for a batch without one of the ``in_keys``.

    Examples:
        >>> from tensordict import TensorDict
        >>> from torchrl.data import Bounded
        >>> from torchrl.objectives import SoftUpdate
        >>> from qsm_rl import DiffusionActor, DiffusionPolicyGradientLoss, NoiseSchedule, QValueMLP, ScoreMLP
        >>> actor = DiffusionActor(
        ...     ScoreMLP(4, 2), action_spec=Bounded(-1.0, 1.0, (2,)), noise_schedule=NoiseSchedule.vp(5)
        ... )
        >>> critic = TensorDictModule(QValueMLP(4, 2), ["observation", "action"], ["state_action_value"])
        >>> loss = DiffusionPolicyGradientLoss(actor, critic)
        >>> updater = SoftUpdate(loss, tau=0.005)
        >>> following = {"observation": torch.randn(8, 4), "reward": torch.randn(8, 1)}
        >>> following |= {name: torch.zeros(8, 1, dtype=torch.bool) for name in ("done", "terminated")}
        >>> batch = TensorDict({"observation": torch.randn(8, 4), "action": torch.zeros(8, 2), "next": following}, [8])
        >>> loss(batch)["loss_actor"].shape
        torch.Size([])
    """

    def __init__(
        self,
        actor_network: DiffusionActor,
        qvalue_network: TensorDictModule | Sequence[TensorDictModule],
        *,
        num_qvalue_nets: int | None = None,
        num_samples: int = 4,
        min_std: float = 0.1,
        loss_function: Literal["l2", "l1", "smooth_l1"] = "l2",
        target_aggregation: Literal["min", "mean"] | float = "min",
        target_action_noise_std: float = 0.1,
        entropy_bonus: EntropyBonus | None = None,
        delay_actor: bool = False,
        delay_qvalue: bool = True,
        reduction: Literal["mean", "sum", "none"] = "mean",
        deactivate_vmap: bool = True,
        use_prioritized_weights: bool | Literal["auto"] = "auto",
    ) -> None:
        super().__init__(
            actor_network,
            qvalue_network,
            num_qvalue_nets=num_qvalue_nets,
            loss_function=loss_function,
            target_aggregation=target_aggregation,
            target_action_noise_std=target_action_noise_std,
            entropy_bonus=entropy_bonus,
            delay_actor=delay_actor,
            delay_qvalue=delay_qvalue,
            reduction=reduction,
            deactivate_vmap=deactivate_vmap,
            use_prioritized_weights=use_prioritized_weights,
        )
        if num_samples < 2:
            raise ValueError(
                f"num_samples must be at least 2, one to learn from and one to compare with, got {num_samples!r}."
            )
        if not min_std > 0:
            raise ValueError(f"min_std must be above 0 (otherwise the last step has no likelihood), got {min_std!r}.")
        self.num_samples = num_samples
        self.min_std = min_std

    @property
    def diagnostic_keys(self) -> list[str]:
        """Names of what [`diagnostics`][qsm_rl.DiffusionPolicyGradientLoss.diagnostics] returns, in its order."""
        return [*super().diagnostic_keys, "policy_q_value", "advantage_size"]

    def actor_loss(
        self, tensordict: TensorDictBase, initial_noise: Tensor | None = None, step_noise: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Minus the advantages times the chains' log-likelihoods; no gradient reaches the critics.

        Args:
            tensordict: the batch.
            initial_noise: starts of the M chains, ``(M, *B, A)``; drawn when not given.
            step_noise: their fresh noise in order of use, ``(steps, M, *B, A)``; drawn when not given.

        Returns:
            The loss, and detached ``policy_action`` ``(M, *B, A)``, the policy's samples in box units,
            ``policy_q_value`` ``(M, *B)``, the critics' mean there, ``advantage`` ``(M, *B)`` and ``log_prob``
            ``(steps, M, *B)``. For a batch with a mask, these hold only the ``L`` live samples.
        """
        batch, replayed, mask, weights = self.live_batch(tensordict)
        live = ... if mask is None else mask
        actor = self.actor_network
        observation = actor.observation(batch)
        observation = observation.expand(self.num_samples, *observation.shape)

        with torch.no_grad():
            sample, chain = actor.sample(
                observation, initial_noise, step_noise, min_std=self.min_std, return_chain=True
            )
            action = actor.box.from_box(sample).to(replayed.dtype)  # the chain runs in float32 or more
            particles = batch.unsqueeze(0).expand(self.num_samples, *batch.batch_size)
            q_values = self._q_values(particles, action, self.qvalue_network_params).mean(0)
            advantage = F.leave_one_out_advantage(q_values)
        log_prob = actor.chain_log_prob(observation, chain)
        losses = -(advantage * log_prob.sum(0)).mean(0)
        info = {
            "policy_action": sample[:, live],
            "policy_q_value": q_values[:, live],
            "advantage": advantage[:, live],
            "log_prob": log_prob.detach()[:, :, live],
        }
        return self._reduce_loss(losses, tensordict, weights=weights), info

    def diagnostics(self, qvalue_info: dict[str, Tensor], actor_info: dict[str, Tensor]) -> dict[str, Tensor]:
        """See [`diagnostics`][qsm_rl.QScoreMatchingLoss.diagnostics]."""
        out = super().diagnostics(qvalue_info, actor_info)
        out["policy_q_value"] = actor_info["policy_q_value"].mean()
        out["advantage_size"] = actor_info["advantage"].abs().mean()
        return out
