"""A recipe for two processes that train together; each leaves what it has learned in a file of the run's folder."""

from __future__ import annotations

import os
import signal
import sys

import torch
from tensordict.nn import TensorDictModule, TensorDictSequential

from qsm_rl import DiffusionActor, GaussianExploration, NoiseSchedule, QScoreMatchingLoss, QValueCrossQ, ScoreMLP
from qsm_rl import training as rl
from qsm_rl.training.ranks import rank


class Watched(rl.QSMUpdate):
    """Remembers the first batch; a process of rank 1 dies at the tenth update where the environment says so."""

    first_batch = None

    def forward(self, batch):
        if self.first_batch is None:
            self.first_batch = batch["observation"].clone()
        if rank() == 1 and self.num_updates == 10 and "RANK_1_DIES" in os.environ:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(batch)


@rl.exit_on_error
def main(arguments: list[str] | None = None) -> int:
    config = rl.parse_configuration(rl.TrainingConfiguration, arguments)
    run = rl.TrainingRun.begin(config, recipe=__file__)
    torch.manual_seed(run.config.seed + rank())  # other weights on each rank: rank 0's are to win
    actor = DiffusionActor(ScoreMLP(4, 1, (16,)), action_spec=run.action_spec, noise_schedule=NoiseSchedule.vp(3))
    critics = [
        TensorDictModule(QValueCrossQ(4, 1, (16,)), in_keys=["observation", "action"], out_keys=["state_action_value"])
        for _ in range(2)
    ]
    loss = QScoreMatchingLoss(actor, critics, delay_qvalue=False)  # running statistics have to agree, too
    loss.make_value_estimator(gamma=0.99)
    update = Watched(loss, actor_learning_rate=1e-3, critic_learning_rate=1e-3, tau=0.05)
    code = run.train(update, TensorDictSequential(actor, GaussianExploration(run.action_spec, std=0.1)))
    state = {"updates": update.num_updates, "first_batch": update.first_batch, **update.state_dict()}
    torch.save(state, run.folder.path / f"rank-{rank()}.pt")
    return code


if __name__ == "__main__":
    main(sys.argv[1:])
