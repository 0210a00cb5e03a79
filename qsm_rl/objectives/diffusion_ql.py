"""Diffusion-QL as a TorchRL loss."""

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

__all__ = ["DiffusionQLLoss"]


class DiffusionQLLoss(DiffusionActorCriticLoss):
    r"""Diffusion-QL: maximises Q at samples of the policy, through the whole reverse chain, with behaviour cloning.

    Wang, Hunt, Zhou, "Diffusion Policies as an Expressive Policy Class for Offline Reinforcement Learning", ICLR 2023
    (arXiv 2208.06193), equation 3: ``bc_weight mean((predicted noise - noise)^2) - eta mean(Q_k(s, a))`` with ``a`` a
    sample of the policy at the replayed observation, reparameterised by the chain's noise. ``Q_k`` is one of the
    critics, redrawn for each batch and divided by the mean size of another one, as in the authors' code. The default
    weights are for offline training; ``bc_weight=0`` is the online variant with which the QSM paper compares.

    An update keeps the activations of all T steps and backpropagates through them, so its cost and memory grow with T.
    Those of Q-score matching's actor update do not.

    Args:
        actor_network: the policy. The authors use ``NoiseSchedule.vp(5)`` with ``DDPMSampler(clip="clean")``. Use
            ``"clean"``, too: with any other clip, an untrained chain almost always ends at the faces of the box, where
            only gradients that lead back into it are left ([`clamp_inward`][qsm_rl.functional.clamp_inward]).
        qvalue_network: critics, as in [`QScoreMatchingLoss`][qsm_rl.QScoreMatchingLoss].

    Keyword Args:
        eta: weight of Q, at least 0; a buffer, so that it can be scheduled. Larger is greedier; the authors use 0.005
            to 3.5, depending on the task. Without behaviour cloning it only scales the loss, to which Adam is
            insensitive.
        bc_weight: weight of behaviour cloning, at least 0. Above 0 it is a buffer; at 0 nothing is computed. The
            authors use 1.
        normalize_q: whether Q is divided by the mean size of another critic (its own, if there is only one). Where Q
            comes near 0 at good actions, that size vanishes just there. Pass False in that case; ``eta`` is then the
            noise error that one unit of Q is worth.
        target_action_noise_std: as in [`QScoreMatchingLoss`][qsm_rl.QScoreMatchingLoss]; the authors use none.
        delay_actor: whether the next action comes from a slowly updated copy of the actor, as in the authors' code.

    The other arguments are those of [`QScoreMatchingLoss`][qsm_rl.QScoreMatchingLoss]; ``loss_function`` is that of the
    critics.

    Output entries: ``loss_actor``, ``loss_qvalue`` (summed over critics) and detached scalars: the critics' as in that
    loss, ``policy_q_value`` (mean of Q at the policy's samples) and, with behaviour cloning, ``bc_error``. The priority
    entry ``"td_error"`` ``(*B,)`` is written to the input.

    Raises:
        TypeError: if the actor is not a [`DiffusionActor`][qsm_rl.DiffusionActor], naming what it lacks.
        ValueError: for a negative weight, and as [`QScoreMatchingLoss`][qsm_rl.QScoreMatchingLoss] does.
        KeyError: for a batch without one of the ``in_keys``.

    Examples:
        >>> from tensordict import TensorDict
        >>> from torchrl.data import Bounded
        >>> from torchrl.objectives import SoftUpdate
        >>> from qsm_rl import DDPMSampler, DiffusionActor, DiffusionQLLoss, NoiseSchedule, QValueMLP, ScoreMLP
        >>> actor = DiffusionActor(
        ...     ScoreMLP(4, 2),
        ...     action_spec=Bounded(-1.0, 1.0, (2,)),
        ...     noise_schedule=NoiseSchedule.vp(5),
        ...     sampler=DDPMSampler(clip="clean"),
        ... )
        >>> critic = TensorDictModule(QValueMLP(4, 2), ["observation", "action"], ["state_action_value"])
        >>> loss = DiffusionQLLoss(actor, critic, bc_weight=0.0)
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
        eta: float = 1.0,
        bc_weight: float = 1.0,
        normalize_q: bool = True,
        loss_function: Literal["l2", "l1", "smooth_l1"] = "l2",
        target_aggregation: Literal["min", "mean"] | float = "min",
        target_action_noise_std: float = 0.0,
        entropy_bonus: EntropyBonus | None = None,
        delay_actor: bool = True,
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
        for name, value in (("eta", eta), ("bc_weight", bc_weight)):
            if not value >= 0:
                raise ValueError(f"{name} must be at least 0, got {value!r}.")
        self.register_buffer("eta", torch.tensor(float(eta)))
        self.register_buffer("bc_weight", torch.tensor(float(bc_weight)) if bc_weight > 0 else None)
        self.normalize_q = normalize_q

    @property
    def diagnostic_keys(self) -> list[str]:
        """Names of what [`diagnostics`][qsm_rl.DiffusionQLLoss.diagnostics] returns, in its order."""
        return [*super().diagnostic_keys, "policy_q_value", *(["bc_error"] if self.bc_weight is not None else [])]

    def actor_loss(
        self,
        tensordict: TensorDictBase,
        initial_noise: Tensor | None = None,
        step_noise: Tensor | None = None,
        critic: int | None = None,
        t: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Behaviour cloning minus Q at the policy's samples; no gradient reaches the critics.

        Args:
            tensordict: the batch.
            initial_noise: start of the reverse chain, ``(*B, A)``; drawn when not given.
            step_noise: the chain's fresh noise in order of use, ``(steps, *B, A)``; drawn when not given.
            critic: index of the critic that is maximised; drawn when not given.
            t: timesteps for behaviour cloning, integers ``(*B,)``; drawn uniformly when not given.
            noise: noise of its forward process, ``(*B, A)``; drawn when not given.

        Returns:
            The loss, and detached ``policy_action`` ``(*B, A)``, the policy's samples in box units, ``policy_q_value``
            ``(*B,)``, the critic's values there, and ``bc_error`` ``(*B,)`` with behaviour cloning. For a batch with a
            mask, these hold only the ``L`` live samples, ``(L,)``.
        """
        batch, replayed, mask, weights = self.live_batch(tensordict)
        live = ... if mask is None else mask
        actor = self.actor_network
        observation = actor.observation(batch)

        sample = actor.sample(observation, initial_noise, step_noise)
        action = actor.box.from_box(sample).to(replayed.dtype)  # the chain runs in float32 or more
        # Not ``data``, which vmap over agents refuses.
        q_values = self._q_values(batch, action, self.qvalue_network_params.apply(torch.Tensor.detach))
        if critic is None:  # on the device, so that nothing waits for it
            index = torch.randint(self.num_qvalue_nets, (1,), device=q_values.device)
        else:
            index = torch.tensor([critic], device=q_values.device)
        q_value = policy_q_value = q_values.index_select(0, index).squeeze(0)
        if self.normalize_q:
            other = q_values.index_select(0, (index + 1) % self.num_qvalue_nets).squeeze(0)
            q_value = F.normalized_q_value(q_value, other[live])
        losses = -self.eta * q_value
        info = {"policy_action": sample.detach()[live], "policy_q_value": policy_q_value.detach()[live]}

        if self.bc_weight is not None:
            clean = actor.box.to_box(replayed)
            if t is None:
                t = torch.randint(actor.noise_schedule.num_steps, clean.shape[:-1], device=clean.device)
            noisy_action, noise = actor.noise_schedule.add_noise(clean, t, noise)
            predicted_noise = actor.predict_noise(noisy_action, observation, t)
            bc_errors = (predicted_noise - noise).square().mean(-1)
            losses = losses + self.bc_weight * bc_errors
            info["bc_error"] = bc_errors.detach()[live]
        return self._reduce_loss(losses, tensordict, weights=weights), info

    def diagnostics(self, qvalue_info: dict[str, Tensor], actor_info: dict[str, Tensor]) -> dict[str, Tensor]:
        """See [`diagnostics`][qsm_rl.QScoreMatchingLoss.diagnostics]."""
        out = super().diagnostics(qvalue_info, actor_info)
        out.update({name: actor_info[name].mean() for name in ("policy_q_value", "bc_error") if name in actor_info})
        return out
