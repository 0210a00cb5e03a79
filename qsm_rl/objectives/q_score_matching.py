"""Q-score matching as a TorchRL loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Literal

import torch
from tensordict import TensorDict, TensorDictBase, TensorDictParams
from tensordict.nn import TensorDictModule, dispatch
from tensordict.utils import NestedKey, unravel_key
from torch import Tensor, nn
from torchrl.objectives import LossModule, ValueEstimators, distance_loss
from torchrl.objectives.utils import dispatch_value_estimator

from qsm_rl.actor import DiffusionActor
from qsm_rl.noise_schedule import Float32Buffers
from qsm_rl.score_targets import ScaledQScore, ScoreTarget

__all__ = ["QScoreMatchingLoss"]


class QScoreMatchingLoss(LossModule):
    r"""Q-score matching: fits the critics by temporal differences and the denoiser to their action gradient.

    Psenka, Escontrela, Abbeel, Ma, "Learning a Diffusion Model Policy from Rewards via Q-Score Matching", ICML 2024
    (arXiv 2312.11752), algorithm 1. The critics regress onto ``r + gamma min_k Q_k(s', a')`` with the target critics at
    ``a'``, a real sample of the actor (also though TorchRL runs losses under deterministic exploration). The actor's
    predicted noise at a noised replay action regresses onto a score target made from the critics, by default the
    authors' ``-50 dQ/da``. Nothing is differentiated through the sampling chain.

    The authors step the critics first and then the actor with the updated critics: ``qvalue_loss``, step,
    ``SoftUpdate`` step, ``actor_loss``, step. ``forward`` computes both losses on the weights as they are.

    Args:
        actor_network: the policy.
        qvalue_network: critics that read their observation keys and the action in environment units and write
            ``"state_action_value"`` ``(*B, 1)``. A list gives each critic with its own weights. A single module is the
            first critic; the others are copies with weights drawn anew by the layers' own initialisers.

    Keyword Args:
        num_qvalue_nets: number of critics made of a single module, at least 1; for a list its length. Default 2. More
            critics make the target more pessimistic.
        score_target: how dQ/da becomes the target of the predicted noise; default ``ScaledQScore(50.0)``, the authors'.
        score_critics: critics that the score target sees, ``"online"`` (the authors') or ``"target"`` (smoother).
        score_aggregation: over the critics in the score target, ``"mean"`` (the authors') or ``"min"`` (pessimistic).
        loss_function: ``"l2"`` (the authors'), ``"l1"`` or ``"smooth_l1"``, for both losses.
        target_action_noise_std: standard deviation, in box units, of the Gaussian noise added to the next action in the
            TD target before it is clipped, at least 0. More smooths the critic over actions. The authors take 0.1.
        delay_actor: whether the next action comes from a slowly following copy of the actor; the authors have none.
        delay_qvalue: whether the TD target comes from slowly following copies of the critics (needs an updater such as
            :class:`~torchrl.objectives.SoftUpdate`).
        reduction: ``"mean"``, ``"sum"`` or ``"none"`` over the batch.
        deactivate_vmap: whether the critics run one after another in a loop, which also compiles, rather than under
            vmap.
        use_prioritized_weights: whether a ``"priority_weight"`` entry weights the samples; ``"auto"`` if there is one.

    Output entries: ``loss_actor``, ``loss_qvalue`` (summed over critics) and detached scalars: ``q_value`` and
    ``target_value`` (means), ``td_error`` (mean over samples of the largest over critics), ``predicted_noise_norm`` and
    ``score_target_norm`` (mean Euclidean norms), and for each diagnostic of the score target its mean Euclidean norm
    (``q_score_norm``) or mean. The priority entry ``"td_error"`` ``(*B,)`` is written to the input.

    Raises:
        TypeError: if the actor is not a :class:`~qsm_rl.DiffusionActor`, naming what it lacks.
        ValueError: for an unknown option, a negative noise, critics that share weights or do not fit
            ``num_qvalue_nets``, lazy networks that were not run once, or batches whose shapes do not fit the networks.
        KeyError: for a batch without one of the :attr:`in_keys`.

    Example:
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

    @dataclass
    class _AcceptedKeys:
        """Entries that ``set_keys`` can rename.

        Attributes:
            action: the replayed action, environment units.
            value: where value estimators look for the next state's value.
            state_action_value: the critics' output.
            priority: the written priority.
            reward: reward, under ``"next"``.
            done: end of the trajectory, under ``"next"``.
            terminated: end without bootstrap, under ``"next"``.
            priority_weight: importance weights of a prioritised sampler.
        """

        action: NestedKey = "action"
        value: NestedKey = "state_value"
        state_action_value: NestedKey = "state_action_value"
        priority: NestedKey = "td_error"
        reward: NestedKey = "reward"
        done: NestedKey = "done"
        terminated: NestedKey = "terminated"
        priority_weight: NestedKey = "priority_weight"

    default_keys = _AcceptedKeys
    tensor_keys: _AcceptedKeys
    default_value_estimator = ValueEstimators.TD0
    SUPPORTED_VALUE_ESTIMATORS = (ValueEstimators.TD0, ValueEstimators.TD1, ValueEstimators.TDLambda)

    actor_network: DiffusionActor
    qvalue_network: TensorDictModule
    actor_network_params: TensorDictParams
    qvalue_network_params: TensorDictParams
    target_actor_network_params: TensorDictParams
    target_qvalue_network_params: TensorDictParams

    def __init__(
        self,
        actor_network: DiffusionActor,
        qvalue_network: TensorDictModule | Sequence[TensorDictModule],
        *,
        num_qvalue_nets: int | None = None,
        score_target: ScoreTarget | None = None,
        score_critics: Literal["online", "target"] = "online",
        score_aggregation: Literal["mean", "min"] = "mean",
        loss_function: Literal["l2", "l1", "smooth_l1"] = "l2",
        target_action_noise_std: float = 0.1,
        delay_actor: bool = False,
        delay_qvalue: bool = True,
        reduction: Literal["mean", "sum", "none"] = "mean",
        deactivate_vmap: bool = True,
        use_prioritized_weights: bool | Literal["auto"] = "auto",
    ) -> None:
        self._in_keys: list[NestedKey] | None = None
        self._out_keys: list[str] | None = None
        super().__init__()
        _check_choice("score_critics", score_critics, ("online", "target"))
        _check_choice("score_aggregation", score_aggregation, ("mean", "min"))
        _check_choice("loss_function", loss_function, ("l2", "l1", "smooth_l1"))
        _check_choice("reduction", reduction, ("mean", "sum", "none"))
        if not target_action_noise_std >= 0:
            raise ValueError(f"target_action_noise_std must be at least 0, got {target_action_noise_std!r}.")
        _check_actor(actor_network)
        critics = _critic_list(qvalue_network, num_qvalue_nets)

        self.convert_to_functional(actor_network, "actor_network", create_target_params=delay_actor)
        self._share_with_actor()
        self.convert_to_functional(
            critics, "qvalue_network", expand_dim=len(critics), create_target_params=delay_qvalue
        )
        self.num_qvalue_nets = len(critics)
        self.score_target = ScaledQScore() if score_target is None else score_target
        self.score_critics = score_critics
        self.score_aggregation = score_aggregation
        self.loss_function = loss_function
        self.target_action_noise_std = target_action_noise_std
        self.delay_actor = delay_actor
        self.delay_qvalue = delay_qvalue
        self.reduction = reduction
        self.deactivate_vmap = deactivate_vmap
        self.use_prioritized_weights = use_prioritized_weights
        self.set_keys(action=actor_network.out_keys[0])
        # Now, so that the loss's state_dict has the same entries before and after the first forward.
        self.make_value_estimator()

    # --- keys and value estimator, as every TorchRL loss has them ---

    @property
    def in_keys(self) -> list[NestedKey]:
        """Entries that the loss reads, in the order of a keyword call."""
        if self._in_keys is None:
            keys = self.tensor_keys
            read = [
                *self.actor_network.in_keys,
                *self.qvalue_network.in_keys,
                keys.action,
                *(("next", key) for key in self.actor_network.in_keys),
                *(("next", key) for key in self.qvalue_network.in_keys if key != keys.action),
                ("next", keys.reward),
                ("next", keys.done),
                ("next", keys.terminated),
            ]
            self._in_keys = list(dict.fromkeys(unravel_key(key) for key in read))
        return self._in_keys

    @in_keys.setter
    def in_keys(self, values: list[NestedKey]) -> None:
        self._in_keys = values

    @property
    def out_keys(self) -> list[str]:
        """Entries that the loss returns."""
        if self._out_keys is None:
            self._out_keys = [
                "loss_actor",
                "loss_qvalue",
                "q_value",
                "target_value",
                "td_error",
                "predicted_noise_norm",
                "score_target_norm",
                *(_diagnostic_name(name) for name in self.score_target.info_keys),
            ]
        return self._out_keys

    @out_keys.setter
    def out_keys(self, values: list[str]) -> None:
        self._out_keys = values

    def _forward_value_estimator_keys(self, **kwargs: NestedKey) -> None:
        if self._value_estimator is not None:
            self._value_estimator.set_keys(**self._value_estimator_keys())
        self._in_keys = None

    def _value_estimator_keys(self) -> dict[str, NestedKey]:
        keys = self.tensor_keys
        return {"value": keys.value, "reward": keys.reward, "done": keys.done, "terminated": keys.terminated}

    def make_value_estimator(
        self, value_type: ValueEstimators | None = None, **hyperparams: float
    ) -> QScoreMatchingLoss:
        """Chooses the value estimator; call it before ``load_state_dict``.

        Args:
            value_type: TD0 (default), TD1 or TDLambda; the last two need batches with a time dimension ``(*B, T)``.
            **hyperparams: ``gamma`` in [0, 1], the discount (default 0.99), and ``lmbda`` for TDLambda.

        Raises:
            NotImplementedError: for another value estimator.
            ValueError: if ``gamma`` or ``lmbda`` lies outside [0, 1].
        """
        for name in ("gamma", "lmbda"):
            if not 0 <= hyperparams.get(name, 0) <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {hyperparams[name]!r}.")
        value_type, hyperparams = self._prepare_value_estimator_kwargs(value_type, **hyperparams)
        if value_type is not None:
            dispatch_value_estimator(
                self,
                value_type,
                supported=self.SUPPORTED_VALUE_ESTIMATORS,
                tensor_keys=self._value_estimator_keys(),
                value_network=None,
                **hyperparams,
            )
        return self

    # --- the losses ---

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Both losses on the weights as they are.

        Args:
            tensordict: a batch with the entries of :attr:`in_keys`, batch size ``(*B)``.

        Returns:
            The entries of :attr:`out_keys`; the losses have shape ``()``, or ``(*B,)`` under ``reduction="none"``.
        """
        loss_qvalue, qvalue_info = self.qvalue_loss(tensordict)
        loss_actor, actor_info = self.actor_loss(tensordict)
        out = {"loss_actor": loss_actor, "loss_qvalue": loss_qvalue}
        out.update(self.diagnostics(qvalue_info, actor_info))
        result = TensorDict(out, [])
        self._clear_weakrefs(
            tensordict,
            result,
            "actor_network_params",
            "qvalue_network_params",
            "target_actor_network_params",
            "target_qvalue_network_params",
        )
        return result

    def diagnostics(self, qvalue_info: dict[str, Tensor], actor_info: dict[str, Tensor]) -> dict[str, Tensor]:
        """Scalars for a log from the info dictionaries of the two losses.

        Args:
            qvalue_info: what :meth:`qvalue_loss` returned.
            actor_info: what :meth:`actor_loss` returned.

        Returns:
            Detached scalars under the names of :attr:`out_keys`.
        """
        out = {
            "q_value": qvalue_info["q_value"].mean(),
            "target_value": qvalue_info["target_value"].mean(),
            "td_error": qvalue_info["td_error"].mean(),
            "predicted_noise_norm": _mean_norm(actor_info["predicted_noise"]),
            "score_target_norm": _mean_norm(actor_info["score_target"]),
        }
        for name in self.score_target.info_keys:
            value = actor_info[name]
            out[_diagnostic_name(name)] = _mean_norm(value) if name.endswith("_score") else value.mean()
        return out

    def qvalue_loss(
        self,
        tensordict: TensorDictBase,
        initial_noise: Tensor | None = None,
        step_noise: Tensor | None = None,
        target_action_noise: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The critics' temporal-difference loss, summed over critics; writes the priority entry.

        Args:
            tensordict: the batch.
            initial_noise: start of the reverse chain for the next action, ``(*B, A)``; drawn when not given.
            step_noise: the chain's fresh noise in order of use, ``(steps, *B, A)``; drawn when not given.
            target_action_noise: noise added to the next action as it is, box units, ``(*B, A)``, before it is clipped;
                drawn with ``target_action_noise_std`` when not given.

        Returns:
            The loss, and detached ``target_value`` ``(*B,)``, ``q_value`` ``(num_critics, *B)``, ``td_error`` ``(*B,)``
            (the largest over critics), ``critic_losses`` ``(num_critics,)``, ``next_action`` (the chain's sample before
            the noise, box units, ``(*B, A)``); of a batch with a mask only the ``L`` live samples, ``(L,)``.
        """
        mask = self._mask(tensordict)
        batch = self._live_entries(tensordict, mask)
        weights = self._weights(batch)
        action = self._action(batch)
        target_value, next_action = self._target_value(batch, initial_noise, step_noise, target_action_noise)
        q_value = self._q_values(batch, action, self.qvalue_network_params)
        target = target_value.expand_as(q_value)
        losses = distance_loss(q_value, target, self.loss_function)
        td_error = (q_value - target).detach().abs().amax(0)
        tensordict.set(self.tensor_keys.priority, td_error)
        live = ... if mask is None else mask
        info = {
            "target_value": target_value[live],
            "q_value": q_value.detach()[:, live],
            "td_error": td_error[live],
            "critic_losses": losses.detach()[:, live].reshape(self.num_qvalue_nets, -1).mean(1),
            "next_action": next_action[live],
        }
        return self._reduce_loss(losses.sum(0), batch, weights=weights), info

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
            units, and the score target's own diagnostics (``q_score``, dQ/da in box units, for gradient targets); of a
            batch with a mask only the ``L`` live samples, ``(L, A)``.
        """
        mask = self._mask(tensordict)
        batch = self._live_entries(tensordict, mask)
        weights = self._weights(batch)
        action = self._action(batch)
        critic_params = (
            self.target_qvalue_network_params if self.score_critics == "target" else self.qvalue_network_params
        )
        # Fetched outside the closure: gradients are taken of the action alone, and torch.compile can follow.
        critic_params = critic_params.data
        with self.actor_network_params.to_module(self.actor_network, preserve_module_state=False):
            actor = self.actor_network
            box, schedule = actor.box, actor.noise_schedule
            clean = box.to_box(action)
            if t is None:
                t = torch.randint(schedule.num_steps, clean.shape[:-1], device=clean.device)
            noisy_action, _ = schedule.add_noise(clean, t, noise)
            if mask is not None:  # a score target may depend on the whole batch: it sees the live samples only
                batch, noisy_action, t = batch[mask], noisy_action[mask], t[mask]

            def q_value(box_action: Tensor) -> Tensor:
                particles = batch.unsqueeze(0).expand(box_action.shape[0], *batch.batch_size)
                q_values = self._q_values(particles, box.from_box(box_action).to(action.dtype), critic_params)
                return q_values.mean(0) if self.score_aggregation == "mean" else q_values.amin(0)

            target, info = self.score_target(q_value, noisy_action, t, schedule)
            target = target.detach()
            predicted_noise = actor.predict_noise(noisy_action, actor.observation(batch), t)
        losses = distance_loss(predicted_noise, target.to(predicted_noise.dtype), self.loss_function).mean(-1)
        if mask is not None:
            losses = torch.zeros_like(mask, dtype=losses.dtype).masked_scatter(mask, losses)
        info = {
            **info,
            "noisy_action": noisy_action,
            "score_target": target,
            "predicted_noise": predicted_noise.detach(),
        }
        return self._reduce_loss(losses, tensordict, weights=weights), info

    def trained_critics(self) -> list[TensorDictModule]:
        """The critics with their trained weights, as independent copies.

        The loss stacks the critics' weights into parameters of its own, so the modules given to it stay as they were.

        Returns:
            One module for each critic, in the given order.
        """
        critics = []
        for params in self.qvalue_network_params.data.clone().unbind(0):
            critic = deepcopy(self.qvalue_network)
            params.to_module(critic, preserve_module_state=True)
            critics.append(critic.requires_grad_())
        return critics

    def reset_parameters_recursive(self) -> None:
        """Draws all weights anew by the layers' own initialisers; targets start equal to the networks again."""
        super().reset_parameters_recursive()
        for name in ("actor_network", "qvalue_network"):
            target = self._modules.get(f"target_{name}_params")
            if target is not None:
                target.data.update_(self._modules[f"{name}_params"].data)

    # --- one actor, inside and outside the loss ---

    def _share_with_actor(self) -> None:
        """Makes the actor's parameters and buffers those of ``actor_network_params``, so that they move together."""
        self.actor_network_params.to_module(self.actor_network, preserve_module_state=False)

    def __deepcopy__(self, memo: dict[int, Any]) -> QScoreMatchingLoss:
        copy = self.__new__(type(self))
        memo[id(self)] = copy
        copy.__dict__.update(deepcopy(self.__dict__, memo))
        copy._share_with_actor()  # a TensorDictParams copies itself without regard to the memo
        return copy

    def _apply(self, fn: Callable[[Tensor], Tensor]) -> QScoreMatchingLoss:
        constants = [
            (buffer, buffer.data)
            for module in self.actor_network.modules()
            if isinstance(module, Float32Buffers)
            for buffer in module.buffers(recurse=False)
        ]
        super()._apply(fn)
        for buffer, data in constants:
            buffer.data = data.to(buffer.device)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        schedule_prefix = f"{prefix}actor_network_params.module.noise_schedule."
        errors: list[str] = []
        self.actor_network.noise_schedule._load_from_state_dict(state_dict, schedule_prefix, {}, False, [], [], errors)
        if errors:
            raise RuntimeError(errors[0])
        super()._load_from_state_dict(state_dict, prefix, *args)

    # --- parts ---

    def _target_value(
        self,
        batch: TensorDictBase,
        initial_noise: Tensor | None,
        step_noise: Tensor | None,
        target_action_noise: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """TD target ``(*B,)`` and the sampled next action ``(*B, A)``, box units, before noise."""
        keys = self.tensor_keys
        with torch.no_grad():
            following = batch.get("next")
            with self.target_actor_network_params.to_module(self.actor_network, preserve_module_state=False):
                actor = self.actor_network
                sample = actor.sample(actor.observation(following), initial_noise, step_noise)
                if target_action_noise is None:
                    target_action_noise = self.target_action_noise_std * torch.randn_like(sample)
            next_action = actor.box.from_box((sample + target_action_noise).clamp(-1, 1))
            next_action = next_action.to(batch.get(keys.action).dtype)  # the chain runs in float32 or more
            next_value = self._q_values(following, next_action, self.target_qvalue_network_params).amin(0).unsqueeze(-1)
            reward = _entry(batch, ("next", keys.reward))
            if reward.shape != next_value.shape:
                raise ValueError(
                    f"the batch's ('next', {keys.reward!r}) has shape {tuple(reward.shape)}, expected "
                    f"{tuple(next_value.shape)}: the batch size and a last dimension of 1, as the critics return."
                )
            # A terminated step has no future: whatever its next observation holds, NaN included, counts for nothing.
            terminated = _entry(batch, ("next", keys.terminated))
            next_value = torch.where(terminated, torch.zeros_like(next_value), next_value)
            target_value = self.value_estimator.value_estimate(batch.copy(), next_value=next_value)
        return target_value.squeeze(-1), sample

    def _q_values(self, tensordict: TensorDictBase, action: Tensor, params: TensorDictBase) -> Tensor:
        """Q-values of every critic, ``(num_critics, *B)``, for actions in environment units."""
        keys = self.tensor_keys
        entries = [key for key in self.qvalue_network.in_keys if unravel_key(key) != unravel_key(keys.action)]
        critic_input = tensordict.select(*entries, strict=False).set(keys.action, action)

        def critic(critic_input: TensorDictBase, critic_params: TensorDictBase) -> Tensor:
            with critic_params.to_module(self.qvalue_network, preserve_module_state=False):
                return self.qvalue_network(critic_input).get(keys.state_action_value)

        if self.deactivate_vmap:
            q_values = torch.stack([critic(critic_input.copy(), one) for one in params.unbind(0)])
        else:
            q_values = torch.vmap(critic, (None, 0), randomness=self.vmap_randomness)(critic_input, params)
        expected = (self.num_qvalue_nets, *tensordict.batch_size, 1)
        if q_values.shape != expected:
            raise ValueError(
                f"a critic returned shape {tuple(q_values.shape[1:])} for batch size {tuple(tensordict.batch_size)}, "
                f"expected {tuple(expected[1:])}: one Q-value for each sample, as QValueMLP returns."
            )
        return q_values.squeeze(-1)

    def _action(self, batch: TensorDictBase) -> Tensor:
        """The replayed action, shape checked."""
        action = _entry(batch, self.tensor_keys.action)
        expected = (*batch.batch_size, self.actor_network.box.action_dim)
        if action.shape != expected:
            raise ValueError(
                f"the batch's {self.tensor_keys.action!r} has shape {tuple(action.shape)}, expected {tuple(expected)}: "
                "the batch size and the size of the actor's action_spec."
            )
        return action

    def _weights(self, batch: TensorDictBase) -> Tensor | None:
        weights = self._maybe_get_priority_weight(batch)
        return None if weights is None else weights.reshape(batch.batch_size)

    def _mask(self, tensordict: TensorDictBase) -> Tensor | None:
        """Which samples are live, ``(*B,)``; None if the batch has no mask."""
        mask = None
        for key in self._loss_mask_keys():
            found = tensordict.get(key, None)
            if found is not None:
                found = found.reshape(tensordict.batch_size)
                mask = found if mask is None else mask & found
        return mask

    def _live_entries(self, tensordict: TensorDictBase, mask: Tensor | None) -> TensorDictBase:
        """The batch with masked positions zeroed: what stands there, NaN included, reaches no loss and no gradient."""
        if mask is None:
            return tensordict
        batch = tensordict.apply(
            lambda x: (
                torch.where(mask.reshape(mask.shape + (1,) * (x.ndim - mask.ndim)), x, torch.zeros_like(x))
                if x.is_floating_point()
                else x
            )
        )
        # A trajectory ends before a masked position, so that multi-step estimators bootstrap there.
        done_key = ("next", self.tensor_keys.done)
        done = batch.get(done_key)
        end = ~mask
        if mask.ndim > 0:
            end = end | torch.cat([end[..., 1:], torch.zeros_like(end[..., :1])], -1)
        batch.set(done_key, done | end.unsqueeze(-1))
        return batch


def _entry(batch: TensorDictBase, key: NestedKey) -> Tensor:
    value = batch.get(key, None)
    if value is None:
        raise KeyError(
            f"the batch lacks {_dotted(key)}; it has {', '.join(sorted(map(_dotted, batch.keys(True, True))))}. "
            "Tell the loss your names by set_keys."
        )
    return value


def _dotted(key: NestedKey) -> str:
    key = unravel_key(key)
    return key if isinstance(key, str) else ".".join(key)


def _mean_norm(values: Tensor) -> Tensor:
    return torch.linalg.vector_norm(values, dim=-1).mean()


def _diagnostic_name(info_key: str) -> str:
    return f"{info_key}_norm" if info_key.endswith("_score") else info_key


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {choices}, got {value!r}.")


def _check_actor(actor_network: object) -> None:
    needed = ("in_keys", "out_keys", "observation", "sample", "predict_noise", "noise_schedule", "box")
    missing = [name for name in needed if not hasattr(actor_network, name)]
    if missing:
        raise TypeError(
            f"actor_network is a {type(actor_network).__module__}.{type(actor_network).__name__} "
            f"without {', '.join(missing)}; pass a qsm_rl.DiffusionActor (its score_network may be your own module)."
        )
    _check_initialized("the actor", actor_network)


def _critic_list(
    qvalue_network: TensorDictModule | Sequence[TensorDictModule], num_qvalue_nets: int | None
) -> list[TensorDictModule]:
    if isinstance(qvalue_network, (list, tuple, nn.ModuleList)):
        critics = list(qvalue_network)
        if num_qvalue_nets not in (None, len(critics)):
            raise ValueError(
                f"num_qvalue_nets is {num_qvalue_nets}, but {len(critics)} critics were given; leave it out."
            )
    else:
        count = 2 if num_qvalue_nets is None else num_qvalue_nets
        if count < 1:
            raise ValueError(f"num_qvalue_nets must be at least 1, got {count!r}.")
        critics = [qvalue_network, *(deepcopy(qvalue_network) for _ in range(count - 1))]
        for critic in critics[1:]:
            critic.reset_parameters_recursive()
    if not critics:
        raise ValueError("qvalue_network is an empty list; give at least one critic.")
    for critic in critics:
        _check_initialized("a critic", critic)
    parameters = [parameter for critic in critics for parameter in critic.parameters()]
    if len(set(parameters)) < len(parameters):
        raise ValueError(
            "the critics share parameters, which could not be trained once they are stacked; give each its own, or one "
            "critic and num_qvalue_nets."
        )
    return critics


def _check_initialized(name: str, network: nn.Module) -> None:
    if any(nn.parameter.is_lazy(parameter) for parameter in network.parameters()):
        raise ValueError(f"{name} has uninitialised lazy parameters; call it once on a batch before building the loss.")
