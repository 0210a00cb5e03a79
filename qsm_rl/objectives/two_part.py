"""A loss of two halves, the critics' and the actor's, as one TorchRL loss."""

from __future__ import annotations

from tensordict import TensorDict, TensorDictBase
from tensordict.nn import dispatch
from torch import Tensor
from torchrl.objectives import LossModule

__all__ = ["TwoPartLoss"]

Info = dict[str, Tensor]


class TwoPartLoss(LossModule):
    """Base of the losses with ``qvalue_loss`` and ``actor_loss``; ``forward`` returns both together."""

    _out_keys: list[str] | None

    @property
    def out_keys(self) -> list[str]:
        """Entries that the loss returns: all, or those of ``select_out_keys``."""
        return self.out_keys_source if self._out_keys is None else self._out_keys

    @out_keys.setter
    def out_keys(self, values: list[str]) -> None:
        self._out_keys = None if values == self.out_keys_source else values

    @property
    def out_keys_source(self) -> list[str]:
        """All entries, whatever was selected; computed at each call, since a score target may be exchanged."""
        return ["loss_actor", "loss_qvalue", *self.diagnostic_keys]

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Both losses on the current weights.

        Args:
            tensordict: a batch with the entries of ``in_keys``, batch size ``(*B)``.

        Returns:
            The entries of ``out_keys``; the losses have shape ``()``, or ``(*B,)`` under ``reduction="none"``.
        """
        loss_qvalue, qvalue_info = self.qvalue_loss(tensordict)
        loss_actor, actor_info = self.actor_loss(tensordict)
        out = {"loss_actor": loss_actor, "loss_qvalue": loss_qvalue}
        out.update(self.diagnostics(qvalue_info, actor_info))
        result = TensorDict(out, [])
        networks = ("actor_network", "qvalue_network")
        params = (f"{target}{network}_params" for target in ("", "target_") for network in networks)
        self._clear_weakrefs(tensordict, result, *params)
        return result

    def qvalue_loss(self, tensordict: TensorDictBase) -> tuple[Tensor, Info]:
        """The critics' half: the loss and its detached info."""
        raise NotImplementedError

    def actor_loss(self, tensordict: TensorDictBase) -> tuple[Tensor, Info]:
        """The actor's half: the loss and its detached info."""
        raise NotImplementedError

    @property
    def diagnostic_keys(self) -> list[str]:
        """Names of what ``diagnostics`` returns, in its order."""
        raise NotImplementedError

    def diagnostics(self, qvalue_info: Info, actor_info: Info) -> Info:
        """Scalars for a log from the info dictionaries of the two losses.

        Args:
            qvalue_info: what ``qvalue_loss`` returned.
            actor_info: what ``actor_loss`` returned.

        Returns:
            Detached scalars under the names of ``out_keys``.
        """
        raise NotImplementedError
