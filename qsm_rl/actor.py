"""The diffusion policy as a TensorDictModule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, overload

import torch
from safetensors import SafetensorError
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModule
from tensordict.utils import NestedKey
from torch import Tensor, nn
from torchrl.data import Bounded, Composite, TensorSpec

from qsm_rl.action_box import ActionBox
from qsm_rl.diffusion_policy import DiffusionPolicy
from qsm_rl.noise_schedule import NoiseSchedule
from qsm_rl.observation_norm import NormalizedObservations
from qsm_rl.pretrained import (
    build_network,
    build_sampler,
    network_settings,
    read_files,
    sampler_settings,
    write_files,
)
from qsm_rl.samplers import DDPMSampler, ReverseChain, Sampler

__all__ = ["DiffusionActor"]

# Names in the files of a trained actor.
NETWORK, BOX, SCHEDULE = "module.score_network.network.", "module.box.", "module.noise_schedule."
NORM = "observation_norm."


class DiffusionActor(TensorDictModule):
    """A diffusion policy: turns Gaussian noise into an action by the reverse chain of a learned noise prediction.

    Under ``ExplorationType.RANDOM`` (the default of TorchRL's collectors) or no exploration type, calling the actor
    samples the policy. Under any other type it starts from zero noise and follows the mean of each reverse step. The
    result is repeatable, but it is neither the mean nor the mode of the policy, which usually has several modes;
    evaluate with RANDOM, as the QSM authors do. Actions are always inside the spec. Diffusion runs in box units,
    ``[-1, 1]^A``; the actions in the tensordict are in environment units.

    Args:
        score_network: any module called as ``score_network(noisy_action (*B, A), observation (*B, O), t (*B,))`` that
            returns the predicted noise ``(*B, A)``, for example [`ScoreMLP`][qsm_rl.ScoreMLP]. If it has a method
            ``reverse_chain`` like that class's, sampling uses it.
        action_spec: a ``Bounded`` spec with the action as its last dimension.
        noise_schedule: the forward process; its number of steps is the length of the chain for
            [`DDPMSampler`][qsm_rl.DDPMSampler].
        sampler: the reverse process; default ``DDPMSampler()``, the authors'.
        in_keys: observation entries, each ``(*B, size)``, joined along the last dimension in this order.
        out_keys: the one entry that the action is written to.

    Attributes:
        noise_schedule: the given schedule.
        sampler: the given sampler.
        box: [`ActionBox`][qsm_rl.ActionBox], the map between environment and box units.

    Raises:
        ValueError: if the action spec is unbounded or discrete, the sampler does not fit the schedule, or there is not
            exactly one out_key.

    Examples:
        >>> from qsm_rl import DiffusionActor, NoiseSchedule, ScoreMLP
        >>> from tensordict import TensorDict
        >>> spec = Bounded(-3.0, 3.0, shape=(2,))
        >>> actor = DiffusionActor(ScoreMLP(4, 2), action_spec=spec, noise_schedule=NoiseSchedule.vp(5))
        >>> action = actor(TensorDict({"observation": torch.randn(8, 4)}, [8]))["action"]
        >>> action.shape, bool(spec.is_in(action))
        (torch.Size([8, 2]), True)
    """

    def __init__(
        self,
        score_network: nn.Module,
        *,
        action_spec: TensorSpec,
        noise_schedule: NoiseSchedule,
        sampler: Sampler | None = None,
        in_keys: Sequence[NestedKey] = ("observation",),
        out_keys: Sequence[NestedKey] = ("action",),
    ) -> None:
        in_keys, out_keys = _list_of_keys("in_keys", in_keys), _list_of_keys("out_keys", out_keys)
        if len(out_keys) != 1:
            raise ValueError(f"out_keys must name exactly one entry, the action, got {out_keys!r}.")
        sampler = DDPMSampler() if sampler is None else sampler
        for name, given, needed, example in (
            ("noise_schedule", noise_schedule, "betas", "NoiseSchedule.cosine(10)"),
            ("sampler", sampler, "steps", "DDPMSampler()"),
        ):
            if isinstance(given, type) or not hasattr(given, needed):
                raise TypeError(f"{name} must be an object such as {example}, got {given!r}.")
        box = ActionBox.from_spec(action_spec)
        action_dim = getattr(score_network, "action_dim", box.action_dim)
        if action_dim != box.action_dim:
            raise ValueError(
                f"the score network expects actions of size {action_dim}, but the action_spec has size "
                f"{box.action_dim}."
            )
        policy = DiffusionPolicy(score_network, box, noise_schedule, sampler)
        super().__init__(policy, in_keys=in_keys, out_keys=out_keys)

    @property
    def noise_schedule(self) -> NoiseSchedule:
        """The noise schedule of the forward process."""
        return self.module.noise_schedule

    @property
    def sampler(self) -> Sampler:
        """The sampler of the reverse process."""
        return self.module.sampler

    @property
    def box(self) -> ActionBox:
        """The map between environment units and box units."""
        return self.module.box

    @property
    def score_network(self) -> nn.Module:
        """The network that predicts the noise, as given."""
        return self.module.score_network.network

    @property
    def spec(self) -> Composite:
        """Spec of the written action."""
        box = self.box
        return Composite({self.out_keys[0]: Bounded(box.low.clone(), box.high.clone(), dtype=torch.float32)})

    def observation(self, tensordict: TensorDictBase) -> Tensor:
        """Joins the in_keys of a tensordict in their order.

        Args:
            tensordict: holds every in_key, each ``(*B, size)``.

        Returns:
            The observation, shape ``(*B, O)``.

        Raises:
            KeyError: if an in_key is missing.
            ValueError: if the shape of an entry is not the batch size followed by one feature dimension.
        """
        observations = [tensordict.get(key) for key in self.in_keys]
        if any(observation is None for observation in observations):
            missing = [key for key in self.in_keys if tensordict.get(key, None) is None]
            raise KeyError(
                f"the batch lacks the actor's in_keys {missing}; it has {sorted(map(str, tensordict.keys()))}."
            )
        for key, observation in zip(self.in_keys, observations, strict=True):
            if observation.shape[:-1] != tensordict.batch_size:
                raise ValueError(
                    f"the observation {key!r} has shape {tuple(observation.shape)}, expected "
                    f"{(*tensordict.batch_size, 'size')}; for images, pass the features of an encoder."
                )
        return torch.cat(observations, -1) if len(observations) > 1 else observations[0]

    def predict_noise(self, noisy_action: Tensor, observation: Tensor, t: Tensor) -> Tensor:
        """The network's prediction of the noise in a noised action.

        Args:
            noisy_action: noised actions in box units, shape ``(*B, A)``.
            observation: joined observation, shape ``(*B, O)``.
            t: timesteps, shape ``(*B,)``.

        Returns:
            Predicted noise, shape ``(*B, A)``.
        """
        return self.module.predict_noise(noisy_action, observation, t)

    @overload
    def sample(
        self,
        observation: Tensor,
        initial_noise: Tensor | None = None,
        step_noise: Tensor | Sequence[Tensor | None] | None = None,
        *,
        min_std: float = 0.0,
        return_chain: Literal[False] = False,
    ) -> Tensor: ...

    @overload
    def sample(
        self,
        observation: Tensor,
        initial_noise: Tensor | None = None,
        step_noise: Tensor | Sequence[Tensor | None] | None = None,
        *,
        min_std: float = 0.0,
        return_chain: Literal[True],
    ) -> tuple[Tensor, ReverseChain]: ...

    def sample(
        self,
        observation: Tensor,
        initial_noise: Tensor | None = None,
        step_noise: Tensor | Sequence[Tensor | None] | None = None,
        *,
        min_std: float = 0.0,
        return_chain: bool = False,
    ) -> Tensor | tuple[Tensor, ReverseChain]:
        """Samples the policy by running the whole reverse chain, whatever the exploration type.

        Args:
            observation: joined observation, shape ``(*B, O)``.
            initial_noise: start of the chain, shape ``(*B, A)``; drawn from N(0, I) when not given.
            step_noise: fresh noise of each reverse step in order of use, shape ``(steps, *B, A)``; drawn when not
                given. In a sequence, None takes that step's mean. A step whose standard deviation is 0, such as the
                last one, ignores its noise.
            min_std: floor on the standard deviation of every step's fresh noise, at least 0. Above 0, every step has a
                density, including the last one, and the policy is a little wider than the sampler's own.
            return_chain: whether to return the chain as well, from which
                [`chain_log_prob`][qsm_rl.DiffusionActor.chain_log_prob] computes likelihoods.

        Returns:
            Actions in box units, shape ``(*B, A)``, inside the box, and with ``return_chain`` the
            [`ReverseChain`][qsm_rl.ReverseChain]. Gradients flow through the chain unless disabled; where a value is
            clipped, only gradients that lead back into the box pass ([`clamp_inward`][qsm_rl.functional.clamp_inward]).

        Examples:
            >>> from qsm_rl import ScoreMLP
            >>> spec = Bounded(-1.0, 1.0, shape=(2,))
            >>> actor = DiffusionActor(ScoreMLP(4, 2), action_spec=spec, noise_schedule=NoiseSchedule.vp(5))
            >>> action, chain = actor.sample(torch.randn(8, 4), min_std=0.1, return_chain=True)
            >>> chain.states.shape, chain.samples.shape, len(chain.stds)
            (torch.Size([6, 8, 2]), torch.Size([5, 8, 2]), 5)
            >>> torch.equal(chain.states[-1], action)
            True
        """
        if not min_std >= 0:
            raise ValueError(f"min_std must be at least 0, got {min_std!r}.")
        action, chain = self.module.run_chain(observation, initial_noise, step_noise, min_std, return_chain)
        return action if chain is None else (action, chain)

    def chain_log_prob(self, observation: Tensor, chain: ReverseChain) -> Tensor:
        """Log-likelihood of every step of a sampled chain under the actor's current weights.

        The value is ``log N(samples[i]; mean_i(states[i]), stds[i]^2 I)``, taken at the draws before clipping, since
        clipped ones have no density. The sum over the steps is the log-likelihood of the chain given its start; its
        gradient is the score of the policy (Black et al. 2023, arXiv 2305.13301, section 4; Ren et al. 2024, arXiv
        2409.00588, section 4).

        Args:
            observation: joined observation, shape ``(*B, O)``.
            chain: what [`sample`][qsm_rl.DiffusionActor.sample] returned for this observation, called on this actor or
                an earlier version of it; with a ``min_std`` above 0 if the sampler has steps without noise.

        Returns:
            Shape ``(steps, *B)``, with a gradient to the actor. For the score alone, pass a detached chain.

        Raises:
            ValueError: if a step of the chain has no noise.

        Examples:
            >>> from qsm_rl import ScoreMLP
            >>> spec = Bounded(-1.0, 1.0, shape=(2,))
            >>> actor = DiffusionActor(ScoreMLP(4, 2), action_spec=spec, noise_schedule=NoiseSchedule.vp(5))
            >>> observation = torch.randn(8, 4)
            >>> with torch.no_grad():
            ...     action, chain = actor.sample(observation, min_std=0.1, return_chain=True)
            >>> actor.chain_log_prob(observation, chain).shape
            torch.Size([5, 8])
        """
        return self.module.chain_log_prob(observation, chain)

    def save_pretrained(self, folder: Path | str, about: Mapping[str, Any] | None = None) -> None:
        """Writes the actor to two files that can be read without running code, model.safetensors and config.json.

        Args:
            folder: created if missing; files of an earlier call are replaced, each in one step.
            about: plain values stored in config.json alongside the settings, such as the environment's name.

        Raises:
            ValueError: if the score network is not a [`ScoreMLP`][qsm_rl.ScoreMLP], the only kind that can be rebuilt
                from its settings; nothing is written then.
            OSError: if the disk is full or not writable; earlier files are left unchanged.
        """
        network, statistics = self.score_network, {}
        if isinstance(network, NormalizedObservations):
            statistics = {"mean": network.mean, "variance": network.variance}
            network = network.network
        parts = {
            NETWORK: {name: tensor.float() for name, tensor in network.state_dict().items()},  # from bfloat16, too
            BOX: self.box.state_dict(),
            SCHEDULE: self.noise_schedule.state_dict(),
            NORM: statistics,
        }
        config = {
            **network_settings(network),
            "sampler": sampler_settings(self.sampler),
            "in_keys": self.in_keys,
            "out_keys": self.out_keys,
            "normalize_observation": bool(statistics),
        }
        tensors = {prefix + name: tensor for prefix, part in parts.items() for name, tensor in part.items()}
        write_files(Path(folder), tensors, {**(about or {}), **config})

    @classmethod
    def from_pretrained(cls, folder: Path | str) -> DiffusionActor:
        """Loads to the CPU the actor that ``save_pretrained`` wrote, or a training run in its folder ``actor``.

        It acts as the saved actor did: with the same noise, the actions are equal. Reading runs no code, so an actor
        from somebody else is safe to open.

        Args:
            folder: holds model.safetensors and config.json.

        Raises:
            ValueError: if a file is missing, malformed or from another version, if the two files do not fit each other,
                or if a weight is not finite.

        Examples:
            >>> from tempfile import TemporaryDirectory
            >>> from qsm_rl import ScoreMLP
            >>> spec = Bounded(-3.0, 3.0, shape=(2,))
            >>> actor = DiffusionActor(ScoreMLP(4, 2, (8,)), action_spec=spec, noise_schedule=NoiseSchedule.vp(5))
            >>> with TemporaryDirectory() as folder:
            ...     actor.save_pretrained(folder)
            ...     again = DiffusionActor.from_pretrained(folder)
            >>> observation, noise = torch.randn(8, 4), (torch.randn(8, 2), torch.randn(5, 8, 2))
            >>> torch.equal(again.sample(observation, *noise), actor.sample(observation, *noise))
            True
        """
        try:
            config, tensors = read_files(Path(folder))
            parts = {prefix: _part(tensors, prefix) for prefix in (NETWORK, BOX, SCHEDULE, NORM)}
            score_mlp = build_network(config, parts[NETWORK])
            network: nn.Module = score_mlp
            low, high = parts[BOX]["low"], parts[BOX]["high"]
            if not low.shape == high.shape == (score_mlp.action_dim,):
                raise ValueError(f"the action bounds have shape {tuple(low.shape)}, expected {(score_mlp.action_dim,)}")
            if config["normalize_observation"]:
                mean, variance = parts[NORM]["mean"], parts[NORM]["variance"]
                if not mean.shape == variance.shape == (config["observation_dim"],) or bool((variance < 0).any()):
                    raise ValueError("the observation statistics do not fit the observation")
                network = NormalizedObservations(score_mlp, mean, variance)
            actor = cls(
                network,
                action_spec=Bounded(low, high),
                noise_schedule=NoiseSchedule(parts[SCHEDULE]["betas"]),
                sampler=build_sampler(config["sampler"]),
                in_keys=[_key(key) for key in config.get("in_keys", ["observation"])],
                out_keys=[_key(key) for key in config.get("out_keys", ["action"])],
            )
            actor.noise_schedule.load_state_dict(parts[SCHEDULE])
        except (OSError, LookupError, ValueError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else " ".join(str(error).split())
            missing = f"{error} is missing" if isinstance(error, KeyError) else reason[:300]
            raise ValueError(f"{folder} contains no readable actor: {missing}") from error
        return actor


def _list_of_keys(name: str, keys: Any) -> list[NestedKey]:
    if isinstance(keys, str):
        return [keys]
    if isinstance(keys, Mapping):
        raise TypeError(
            f"{name} must be a list of entries, got {keys!r}; the network receives them concatenated in this order."
        )
    return list(keys)


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _key(key: Any) -> NestedKey:
    """A key read from JSON, which stores a nested key as a list."""
    return tuple(key) if isinstance(key, list) else key
