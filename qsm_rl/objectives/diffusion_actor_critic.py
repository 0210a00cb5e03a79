"""What the losses of diffusion actor-critics share: the networks, the batch, and the critics' temporal differences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Self

import torch
from tensordict import TensorDictBase, TensorDictParams
from tensordict.nn import TensorDictModule
from tensordict.utils import NestedKey, unravel_key
from torch import Tensor
from torchrl.objectives import ValueEstimators
from torchrl.objectives.utils import dispatch_value_estimator

from qsm_rl import functional as F
from qsm_rl.actor import DiffusionActor
from qsm_rl.entropy import EntropyBonus
from qsm_rl.functional.q_scores import check_aggregation
from qsm_rl.objectives.ensembles import (
    batch_normalizers,
    critic_head,
    critic_list,
    ensemble_outputs,
    joint_outputs,
    redrawn_weights,
    stack_critics,
    unstack_critics,
)
from qsm_rl.objectives.inputs import (
    check_actor,
    check_choice,
    check_columns,
    check_critic_outputs,
    critic_input,
    entry,
    live_entries,
    live_mask,
    replayed_action,
)
from qsm_rl.objectives.shared_actor import SharedActorLoss
from qsm_rl.objectives.two_part import TwoPartLoss
from qsm_rl.value_heads import ScalarHead, TwoHotHead

__all__ = ["DiffusionActorCriticLoss"]


class DiffusionActorCriticLoss(TwoPartLoss, SharedActorLoss):
    """Base of the losses that train critics by temporal differences at samples of a diffusion actor.

    A subclass adds its ``actor_loss`` and extends ``diagnostic_keys`` and ``diagnostics`` by what that reports. The
    arguments are documented in [`QScoreMatchingLoss`][qsm_rl.QScoreMatchingLoss].
    """

    @dataclass
    class _AcceptedKeys:
        """Entries that ``set_keys`` can rename.

        Attributes:
            action: the replayed action, in environment units.
            value: where value estimators look for the next state's value.
            state_action_value: the critics' output.
            priority: the written priority.
            reward: reward, under ``"next"``.
            done: end of the trajectory, under ``"next"``.
            terminated: end without bootstrapping, under ``"next"``.
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

    qvalue_network: TensorDictModule
    qvalue_network_params: TensorDictParams
    target_qvalue_network_params: TensorDictParams

    def __init__(
        self,
        actor_network: DiffusionActor,
        qvalue_network: TensorDictModule | Sequence[TensorDictModule],
        *,
        num_qvalue_nets: int | None,
        loss_function: Literal["l2", "l1", "smooth_l1"],
        target_aggregation: Literal["min", "mean"] | float,
        target_action_noise_std: float,
        entropy_bonus: EntropyBonus | None,
        delay_actor: bool,
        delay_qvalue: bool,
        reduction: Literal["mean", "sum", "none"],
        deactivate_vmap: bool,
        use_prioritized_weights: bool | Literal["auto"],
    ) -> None:
        self._in_keys: list[NestedKey] | None = None
        self._out_keys: list[str] | None = None
        super().__init__()
        check_choice("loss_function", loss_function, ("l2", "l1", "smooth_l1"))
        check_choice("reduction", reduction, ("mean", "sum", "none"))
        check_choice("use_prioritized_weights", use_prioritized_weights, (True, False, "auto"))
        check_aggregation("target_aggregation", target_aggregation)
        if entropy_bonus is not None and not isinstance(entropy_bonus, EntropyBonus):
            raise TypeError(f"entropy_bonus must be an EntropyBonus or None, got {entropy_bonus!r}.")
        if not target_action_noise_std >= 0:
            raise ValueError(f"target_action_noise_std must be at least 0, got {target_action_noise_std!r}.")
        check_actor(actor_network)
        critics = critic_list(qvalue_network, num_qvalue_nets)
        critic_head(critics)

        self.convert_to_functional(actor_network, "actor_network", create_target_params=delay_actor)
        self._share_with_actor()
        stack_critics(self, critics, delay_qvalue)
        self._batch_normalizers = (batch_normalizers(self.qvalue_network, delay_qvalue),)  # not a module of the loss
        self.num_qvalue_nets = len(critics)
        # The head of the very module into which the critics' weights are put.
        self.value_head = ScalarHead(loss_function) if (head := critic_head([self.qvalue_network])) is None else head
        self.loss_function = loss_function
        self.target_aggregation = target_aggregation
        self.target_action_noise_std = target_action_noise_std
        self.entropy_bonus = entropy_bonus
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

    def _forward_value_estimator_keys(self, **kwargs: NestedKey) -> None:
        if self._value_estimator is not None:
            self._value_estimator.set_keys(**self._value_estimator_keys())
        self._in_keys = None

    def _value_estimator_keys(self) -> dict[str, NestedKey]:
        return {name: getattr(self.tensor_keys, name) for name in ("value", "reward", "done", "terminated")}

    def make_value_estimator(self, value_type: ValueEstimators | None = None, **hyperparams: float) -> Self:
        """Chooses the value estimator; call it before ``load_state_dict``.

        Args:
            value_type: TD0 (default), TD1 or TDLambda, or a TorchRL estimator object; TD1 and TDLambda need batches
                with a time dimension ``(*B, T)``.
            **hyperparams: ``gamma`` in [0, 1], the discount (default 0.99), and ``lmbda`` for TDLambda.

        Raises:
            NotImplementedError: for another value estimator.
            ValueError: if ``gamma`` or ``lmbda`` lies outside [0, 1], or is 0 for TD1 or TDLambda, which would be TD0.
        """
        for name in ("gamma", "lmbda"):
            if not 0 <= hyperparams.get(name, 0) <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {hyperparams[name]!r}.")
        value_type, hyperparams = self._prepare_value_estimator_kwargs(value_type, **hyperparams)
        if value_type is None:  # an estimator given as an object, which TorchRL uses unchanged
            self.value_estimator.set_keys(**self._value_estimator_keys())
        else:
            if value_type is not ValueEstimators.TD0 and 0 in map(hyperparams.get, ("gamma", "lmbda")):
                raise ValueError(f"{value_type.name} with a gamma or lmbda of 0 is TD0; use ValueEstimators.TD0.")
            if value_type is ValueEstimators.TD1:  # the same; TorchRL's TD1 mixes episodes up under torch.compile
                value_type, hyperparams = ValueEstimators.TDLambda, dict(**hyperparams, lmbda=1.0)
            dispatch_value_estimator(
                self,
                value_type,
                supported=self.SUPPORTED_VALUE_ESTIMATORS,
                tensor_keys=self._value_estimator_keys(),
                value_network=None,
                **hyperparams,
            )
        return self

    # --- the critics' loss ---

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
            target_action_noise: noise in box units, ``(*B, A)``, added unscaled to the next action before clipping;
                drawn with ``target_action_noise_std`` when not given.

        Returns:
            The loss, and detached ``target_value`` ``(*B,)``, ``q_value`` ``(num_critics, *B)``, ``td_error`` ``(*B,)``
            (the largest over critics), ``critic_losses`` ``(num_critics,)``, ``next_action`` (the chain's sample before
            the noise, box units, ``(*B, A)``), and, where they apply, ``entropy_bonus`` ``(*B,)`` and
            ``target_clipped`` ``(*B,)`` (whether the target lies beyond the value support). For a batch with a mask,
            these hold only the ``L`` live samples, ``(L,)``.
        """
        batch, action, mask, weights = self.live_batch(tensordict)
        next_action, next_info = self._next_action(batch, initial_noise, step_noise, target_action_noise)
        outputs, next_outputs = self._both_outputs(batch, action, next_action, mask)
        target_value = self._target_value(batch, next_outputs, next_info)
        q_value = self.value_head.value(outputs)
        target = target_value.expand_as(q_value)
        losses = self.value_head.td_loss(outputs, target)
        td_error = (q_value - target).detach().abs().amax(0)
        tensordict.set(self.tensor_keys.priority, td_error if mask is None else td_error.masked_fill(~mask, 0))
        if self.value_head.bounded:
            next_info["target_clipped"] = self.value_head.clipped(target_value)
        live = ... if mask is None else mask
        info = {
            "target_value": target_value[live],
            "q_value": q_value.detach()[:, live],
            "td_error": td_error[live],
            "critic_losses": losses.detach()[:, live].reshape(self.num_qvalue_nets, -1).mean(1),
            **{name: value[live] for name, value in next_info.items()},
        }
        return self._reduce_loss(losses.sum(0), batch, weights=weights), info

    @property
    def diagnostic_keys(self) -> list[str]:
        """Names of what ``diagnostics`` returns, in its order."""
        bonus = [] if self.entropy_bonus is None else ["entropy_bonus"]
        clipped = ["target_clipped"] if self.value_head.bounded else []
        return ["q_value", "target_value", "td_error", *bonus, *clipped]

    def diagnostics(self, qvalue_info: dict[str, Tensor], actor_info: dict[str, Tensor]) -> dict[str, Tensor]:
        """See ``TwoPartLoss.diagnostics``; what every loss reports about its critics, all means."""
        names = ("q_value", "target_value", "td_error", "entropy_bonus", "target_clipped")
        found = {name: qvalue_info[name] for name in names if name in qvalue_info}
        return {name: (x.float() if x.dtype == torch.bool else x).mean() for name, x in found.items()}

    def trained_critics(self, *, live: bool = False) -> list[TensorDictModule]:
        """The critics with their trained weights.

        The loss stacks the critics' weights into parameters of its own, so the modules passed to it stay untrained.

        Args:
            live: False gives independent copies that can be trained. True gives modules that share the loss's weights
                and require no gradient, for example for [`BestOfN`][qsm_rl.BestOfN]. They follow as the loss trains or
                loads a state_dict, but not when it moves to another device or dtype.

        Returns:
            One module for each critic, in the given order.
        """
        return unstack_critics(self.qvalue_network, self.qvalue_network_params, live)

    def choose_value_support(self, tensordict: TensorDictBase) -> None:
        """Chooses the support of a two-hot head created without one; any other head is left unchanged.

        Its ends lie on both sides of 0, at ten times the largest discounted return to which the rewards seen could add
        up, since a trained policy earns more than the random actions of a warm-up. Call it before the first update.

        Args:
            tensordict: transitions, such as a warm-up's, with rewards and, for n-step returns, ``steps_to_next_obs``.
        """
        if isinstance(self.value_head, TwoHotHead):
            rewards = entry(tensordict, ("next", self.tensor_keys.reward))
            steps = tensordict.get("steps_to_next_obs", torch.ones_like(rewards)).reshape(rewards.shape)
            mask = live_mask(tensordict, self._loss_mask_keys())
            live = ... if mask is None else mask
            self.value_head.choose_support(rewards[live], self.value_estimator.gamma ** steps[live])

    def reset_parameters_recursive(self) -> None:
        """Redraws all weights by the layers' own initialisers; target networks start equal to the networks again."""
        super().reset_parameters_recursive()
        self.qvalue_network_params.data.update_(redrawn_weights(self.trained_critics()))
        for name in ("actor_network", "qvalue_network"):
            if (target := self._modules.get(f"target_{name}_params")) is not None:
                target.data.update_(self._modules[f"{name}_params"].data)

    # --- parts ---

    @torch.no_grad()
    def _next_action(
        self,
        batch: TensorDictBase,
        initial_noise: Tensor | None,
        step_noise: Tensor | None,
        target_action_noise: Tensor | None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The next action ``(*B, A)`` in environment units, and what is reported, such as the sample before noise."""
        actor = self.actor_network
        observation = actor.observation(entry(batch, "next"))
        with self._target_actor():
            sample = actor.sample(observation, initial_noise, step_noise)
            if target_action_noise is None:
                target_action_noise = self.target_action_noise_std * torch.randn_like(sample)
        info = {"next_action": sample}
        if self.entropy_bonus is not None:
            info["entropy_bonus"] = self._entropy_bonus(self.entropy_bonus, observation)
        next_action = actor.box.from_box((sample + target_action_noise).clamp(-1, 1))
        return next_action.to(batch.get(self.tensor_keys.action).dtype), info  # the chain runs in float32 or more

    @torch.no_grad()
    def _target_value(self, batch: TensorDictBase, next_outputs: Tensor, next_info: dict[str, Tensor]) -> Tensor:
        """TD target ``(*B,)`` from the critics' outputs ``(num_critics, *B, num_outputs)`` at the next action."""
        keys = self.tensor_keys
        q_values = self.value_head.value(next_outputs)
        next_value = F.aggregate_q_values(q_values, self.target_aggregation).unsqueeze(-1)
        flags = [("next", key) for key in (keys.done, keys.terminated)]
        check_columns(batch, [("next", keys.reward)], flags, next_value.shape)
        # A terminated step has no future: whatever its next observation holds, NaN included, is ignored.
        terminated = batch.get(("next", keys.terminated))
        next_value = torch.where(terminated, torch.zeros_like(next_value), next_value)
        if self.entropy_bonus is not None:
            next_info["entropy_bonus"] = next_info["entropy_bonus"].masked_fill(terminated.squeeze(-1), 0)
            next_value = next_value + next_info["entropy_bonus"].unsqueeze(-1)
        target_value = self.value_estimator.value_estimate(batch.copy(), next_value=next_value).squeeze(-1)
        return target_value.to(q_values.dtype)  # the discount is in float32 or more

    def _entropy_bonus(self, bonus: EntropyBonus, observation: Tensor) -> Tensor:
        """The bonus ``(*B,)`` of the actor at observations ``(*B, O)``, from separate samples."""
        many = observation.expand(bonus.num_samples, *observation.shape)
        with self._target_actor():
            return bonus(self.actor_network.sample(many))

    def _q_values(self, tensordict: TensorDictBase, action: Tensor, params: TensorDictBase) -> Tensor:
        """Q-values of every critic, ``(num_critics, *B)``, for actions in environment units."""
        return self.value_head.value(self._critic_outputs(tensordict, action, params))

    def _critic_outputs(self, tensordict: TensorDictBase, action: Tensor, params: TensorDictBase) -> Tensor:
        """What the value head reads from every critic: ``(num_critics, *B, num_outputs)``."""
        inputs, key = self._critic_input(tensordict, action), self.tensor_keys.state_action_value
        outputs = ensemble_outputs(self.qvalue_network, inputs, params, key, self._vmap)
        check_critic_outputs(outputs, tensordict.batch_size, self.value_head.num_outputs)
        return outputs

    def _both_outputs(
        self, batch: TensorDictBase, action: Tensor, next_action: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The critics' outputs for the TD loss, and those of the target critics for the TD target, without gradient."""
        following, params = batch.get("next"), self.qvalue_network_params
        (layers,) = self._batch_normalizers
        if not (layers and self.training):  # in evaluation the running statistics are used unchanged
            with torch.no_grad():
                target = self.target_qvalue_network_params if self.delay_qvalue else params
                next_outputs = self._critic_outputs(following, next_action, target)
            return self._critic_outputs(batch, action, params), next_outputs
        now, then = self._critic_input(batch, action), self._critic_input(following, next_action)
        # What follows a terminated step is ignored, and must not enter the statistics.
        end = entry(batch, ("next", self.tensor_keys.terminated)).squeeze(-1)
        then = torch.where(end, now, then).detach()  # replayed features alone train an encoder before the loss
        key = self.tensor_keys.state_action_value
        outputs = joint_outputs(self.qvalue_network, layers, (now, then), params, key, mask, self._vmap)
        check_critic_outputs(outputs, (2, *batch.batch_size), self.value_head.num_outputs)
        return outputs[:, 0], outputs[:, 1].detach()

    @property
    def _vmap(self) -> str | None:
        return None if self.deactivate_vmap else self.vmap_randomness

    def _make_vmap(self) -> None:
        """Called by ``set_vmap_randomness``; nothing to do, since the randomness is looked up at each call."""

    def _critic_input(self, tensordict: TensorDictBase, action: Tensor) -> TensorDictBase:
        return critic_input(tensordict, self.qvalue_network.in_keys, self.tensor_keys.action, action)

    def live_batch(self, tensordict: TensorDictBase) -> tuple[TensorDictBase, Tensor, Tensor | None, Tensor | None]:
        """The batch with what its masks hide zeroed, its action, the mask and the priority weights (None if absent)."""
        mask = live_mask(tensordict, self._loss_mask_keys())
        batch = live_entries(tensordict, mask, ("next", self.tensor_keys.done))
        action = replayed_action(batch, self.tensor_keys.action, self.actor_network.box.action_dim)
        key, weights = self.tensor_keys.priority_weight, None
        if self.use_prioritized_weights is True:
            weights = entry(batch, key)
        elif self.use_prioritized_weights == "auto":
            weights = batch.get(key, None)
        return batch, action, mask, None if weights is None else weights.reshape(batch.batch_size)
