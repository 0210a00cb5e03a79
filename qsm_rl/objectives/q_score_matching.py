"""Q-score matching as a TorchRL loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModule
from torch import Tensor
from torchrl.objectives import distance_loss

from qsm_rl import functional as F
from qsm_rl.actor import DiffusionActor
from qsm_rl.entropy import EntropyBonus
from qsm_rl.objectives.diffusion_actor_critic import DiffusionActorCriticLoss
from qsm_rl.objectives.inputs import check_choice
from qsm_rl.score_targets import ScaledQScore, ScoreTarget

__all__ = ["QScoreMatchingLoss"]


class QScoreMatchingLoss(DiffusionActorCriticLoss):
    r"""Q-score matching: fits the critics by temporal differences and the denoiser to their action gradient.

    Psenka, Escontrela, Abbeel, Ma, "Learning a Diffusion Model Policy from Rewards via Q-Score Matching", ICML 2024
    (arXiv 2312.11752), algorithm 1. The critics regress onto ``r + gamma min_k Q_k(s', a')``, with the minimum over the
    target critics and ``a'`` a real sample of the actor (even though TorchRL runs losses under deterministic
    exploration). The actor's predicted noise at a noised replay action regresses onto a score target made from the
    critics, by default the authors' ``-50 dQ/da``. Nothing is differentiated through the sampling chain.

    The authors update the critics first, and then the actor with the updated critics: ``qvalue_loss``, step,
    ``SoftUpdate`` step, ``actor_loss``, step. ``forward`` computes both losses on the current weights.

    Args:
        actor_network: the policy.
        qvalue_network: critics that read their observation keys and the action in environment units and write
            ``"state_action_value"`` ``(*B, 1)``. A list gives each critic with its own weights. A single module is the
            first critic; the others are copies whose weights the layers' own initialisers redraw.

    Keyword Args:
        num_qvalue_nets: number of critics made from a single module, at least 1, default 2; for a list, its length.
        score_target: how dQ/da becomes the target of the predicted noise; default ``ScaledQScore(50.0)``, the authors'.
        score_critics: critics that the score target sees, ``"online"`` (the authors') or ``"target"`` (smoother).
            Without ``delay_qvalue``, both are the same.
        score_aggregation: aggregation over the critics in the score target, ``"mean"`` (the authors') or ``"min"``
            (pessimistic).
        bc_weight: weight alpha of behaviour cloning alongside the score target, at least 0. Adds
            ``alpha mean((predicted noise - noise)^2)`` on the same noised replay actions (Ho et al. 2020, arXiv
            2006.11239, equation 14; together with a critic, Wang et al. 2023, arXiv 2208.06193, equation 3). With
            squared errors, the prediction then regresses onto ``(score target + alpha noise) / (1 + alpha)``, which
            keeps the policy near the data, for offline data and fine-tuning. Usual range 0.1 to 10 for targets about as
            large as the noise. Above 0 it becomes a buffer, so that it can be scheduled; at 0 (the authors') nothing is
            computed.
        loss_function: ``"l2"`` (the authors'), ``"l1"`` or ``"smooth_l1"``, for both losses; critics with a head, such
            as [`TwoHotHead`][qsm_rl.TwoHotHead], bring their own loss.
        target_aggregation: aggregation over the target critics in the TD target: ``"min"`` (the authors'), ``"mean"``,
            or a number rho for ``mean - rho std`` (see [`aggregate_q_values`][qsm_rl.functional.aggregate_q_values]).
            The minimum grows more pessimistic with the number of critics; usual range of rho 0 to 1, where larger is
            more pessimistic.
        target_action_noise_std: standard deviation, in box units, of the Gaussian noise added to the next action in the
            TD target before it is clipped, at least 0. More noise smooths the critic over actions. The authors use 0.1.
        entropy_bonus: bonus that the next state's value earns for the policy's entropy there, see
            [`EntropyBonus`][qsm_rl.EntropyBonus]; None (the authors') for no bonus.
        delay_actor: whether the next action comes from a slowly updated copy of the actor; the authors use none.
        delay_qvalue: whether the TD target comes from slowly updated copies of the critics (needs an updater such as
            ``SoftUpdate``). Pass False for critics that normalise over the batch, such as
            [`QValueCrossQ`][qsm_rl.QValueCrossQ]: replayed and next state-action pairs then share one forward pass and
            its statistics, and the running statistics are used everywhere else.
        reduction: ``"mean"``, ``"sum"`` or ``"none"`` over the batch.
        deactivate_vmap: whether the critics run one after another in a loop, which also compiles, rather than under
            vmap.
        use_prioritized_weights: whether a ``"priority_weight"`` entry weights the samples; ``"auto"`` if the batch has
            one.

    Output entries: ``loss_actor``, ``loss_qvalue`` (summed over critics) and detached scalars: ``q_value`` and
    ``target_value`` (means), ``td_error`` (mean over samples of the largest over critics), ``predicted_noise_norm`` and
    ``score_target_norm`` (mean Euclidean norms); where they apply, ``entropy_bonus``, ``bc_error`` (means) and
    ``target_clipped`` (share of TD targets beyond the value support); and for each diagnostic of the score target its
    mean Euclidean norm (``q_score_norm``) or mean. The priority entry ``"td_error"`` ``(*B,)`` is written to the input.
    Steps hidden by a mask are ignored. If the mask is not TorchRL's ``("collector", "mask")``, set
    ``loss.loss_mask_key``, for example to the ``"mask"`` that ``split_trajectories`` adds to data from elsewhere.

    Raises:
        TypeError: if the actor is not a [`DiffusionActor`][qsm_rl.DiffusionActor], naming what it lacks.
        ValueError: for an unknown option, a negative noise, critics that share weights or do not fit
            ``num_qvalue_nets``, lazy networks that have not been run once, or batches whose shapes do not fit the
            networks.
        KeyError: for a batch without one of the ``in_keys``.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from tensordict.nn import TensorDictModule
        >>> from torchrl.data import Bounded
        >>> from torchrl.objectives import SoftUpdate
        >>> from qsm_rl import DiffusionActor, NoiseSchedule, QScoreMatchingLoss, QValueMLP, ScoreMLP
        >>> actor = DiffusionActor(
        ...     ScoreMLP(4, 2), action_spec=Bounded(-1.0, 1.0, (2,)), noise_schedule=NoiseSchedule.vp(5)
        ... )
        >>> critics = [
        ...     TensorDictModule(QValueMLP(4, 2), in_keys=["observation", "action"], out_keys=["state_action_value"])
        ...     for _ in range(2)
        ... ]
        >>> loss = QScoreMatchingLoss(actor, critics)
        >>> _ = loss.make_value_estimator(gamma=0.99)
        >>> updater = SoftUpdate(loss, tau=0.005)
        >>> batch = TensorDict(
        ...     {
        ...         "observation": torch.randn(8, 4),
        ...         "action": torch.rand(8, 2) * 2 - 1,
        ...         "next": {
        ...             "observation": torch.randn(8, 4),
        ...             "reward": torch.randn(8, 1),
        ...             "done": torch.zeros(8, 1, dtype=torch.bool),
        ...             "terminated": torch.zeros(8, 1, dtype=torch.bool),
        ...         },
        ...     },
        ...     [8],
        ... )
        >>> out = loss(batch)
        >>> out["loss_actor"].shape, out["loss_qvalue"].shape
        (torch.Size([]), torch.Size([]))
    """

    def __init__(
        self,
        actor_network: DiffusionActor,
        qvalue_network: TensorDictModule | Sequence[TensorDictModule],
        *,
        num_qvalue_nets: int | None = None,
        score_target: ScoreTarget | None = None,
        score_critics: Literal["online", "target"] = "online",
        score_aggregation: Literal["mean", "min"] = "mean",
        bc_weight: float = 0.0,
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
        check_choice("score_critics", score_critics, ("online", "target"))
        check_choice("score_aggregation", score_aggregation, ("mean", "min"))
        if not bc_weight >= 0:
            raise ValueError(f"bc_weight must be at least 0, got {bc_weight!r}.")
        self.register_buffer("bc_weight", torch.tensor(float(bc_weight)) if bc_weight > 0 else None)
        self.score_target = ScaledQScore() if score_target is None else score_target
        if isinstance(score_target, type) or not hasattr(self.score_target, "info_keys"):
            raise TypeError(f"score_target is {score_target!r}, expected an instance of qsm_rl.ScoreTarget.")
        self.score_critics = score_critics
        self.score_aggregation = score_aggregation

    @property
    def diagnostic_keys(self) -> list[str]:
        """Names of what [`diagnostics`][qsm_rl.QScoreMatchingLoss.diagnostics] returns, in its order."""
        return [
            *super().diagnostic_keys,
            "predicted_noise_norm",
            "score_target_norm",
            *(["bc_error"] if self.bc_weight is not None else []),
            *(_diagnostic_name(name) for name in self.score_target.info_keys),
        ]

    def actor_loss(
        self, tensordict: TensorDictBase, t: Tensor | None = None, noise: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The denoiser's regression onto the score target; no gradient reaches the critics.

        Args:
            tensordict: the batch.
            t: timesteps of the noised actions, integers ``(*B,)``; drawn uniformly when not given.
            noise: noise of the forward process, ``(*B, A)``; drawn when not given.

        Returns:
            The loss, and detached ``noisy_action``, ``score_target``, ``predicted_noise``, each ``(*B, A)`` in box
            units, the score target's own diagnostics (``q_score``, dQ/da in box units, for gradient targets), and with
            ``bc_weight`` ``bc_error`` ``(*B,)``. For a batch with a mask, these hold only the ``L`` live samples,
            ``(L, A)``.
        """
        batch, action, mask, weights = self.live_batch(tensordict)
        delayed = self.score_critics == "target" and self.delay_qvalue
        critic_params = self.target_qvalue_network_params if delayed else self.qvalue_network_params
        # Detached outside the closure: gradients are taken with respect to the action alone, and torch.compile can
        # trace it. Not by ``data``, which vmap over agents refuses, nor by the tensordict's own ``detach``, which
        # remembers where the weights once were.
        critic_params = critic_params.apply(torch.Tensor.detach)
        actor = self.actor_network
        box, schedule = actor.box, actor.noise_schedule
        clean = box.to_box(action)
        if t is None:
            t = torch.randint(schedule.num_steps, clean.shape[:-1], device=clean.device)
        noisy_action, noise = schedule.add_noise(clean, t, noise)
        if mask is not None:  # a score target may depend on the whole batch: it sees the live samples only
            batch, noisy_action, noise, t = batch[mask], noisy_action[mask], noise[mask], t[mask]

        def q_value(box_action: Tensor) -> Tensor:
            particles = batch.unsqueeze(0).expand(box_action.shape[0], *batch.batch_size)
            q_values = self._q_values(particles, box.from_box(box_action).to(action.dtype), critic_params)
            return F.aggregate_q_values(q_values, self.score_aggregation)

        target, info = self.score_target(q_value, noisy_action, t, schedule)
        target = target.detach()
        predicted_noise = actor.predict_noise(noisy_action, actor.observation(batch), t)
        losses = distance_loss(predicted_noise, target.to(predicted_noise.dtype), self.loss_function).mean(-1)
        if self.bc_weight is not None:
            bc_errors = (predicted_noise - noise.to(predicted_noise.dtype)).square().mean(-1)
            losses = losses + self.bc_weight * bc_errors
            info = {**info, "bc_error": bc_errors}
        if mask is not None:
            losses = torch.zeros_like(mask, dtype=losses.dtype).masked_scatter(mask, losses)
        info = {
            **info,
            "noisy_action": noisy_action,
            "score_target": target,
            "predicted_noise": predicted_noise,
        }
        info = {name: value.detach() for name, value in info.items()}
        return self._reduce_loss(losses, tensordict, weights=weights), info

    def diagnostics(self, qvalue_info: dict[str, Tensor], actor_info: dict[str, Tensor]) -> dict[str, Tensor]:
        """Scalars for a log from the info dictionaries of the two losses.

        Args:
            qvalue_info: what [`qvalue_loss`][qsm_rl.QScoreMatchingLoss.qvalue_loss] returned.
            actor_info: what [`actor_loss`][qsm_rl.QScoreMatchingLoss.actor_loss] returned.

        Returns:
            Detached scalars under the names of ``out_keys``.
        """
        out = super().diagnostics(qvalue_info, actor_info)
        out["predicted_noise_norm"] = _mean_norm(actor_info["predicted_noise"])
        out["score_target_norm"] = _mean_norm(actor_info["score_target"])
        if self.bc_weight is not None:
            out["bc_error"] = actor_info["bc_error"].mean()
        for name in self.score_target.info_keys:
            value = actor_info[name]
            out[_diagnostic_name(name)] = _mean_norm(value) if name.endswith("_score") else value.mean()
        return out


def _mean_norm(values: Tensor) -> Tensor:
    return torch.linalg.vector_norm(values, dim=-1).mean()


def _diagnostic_name(info_key: str) -> str:
    return f"{info_key}_norm" if info_key.endswith("_score") else info_key
