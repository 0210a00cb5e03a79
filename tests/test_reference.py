"""Ten consecutive updates of the authors' implementation, recomputed through the public API from the recorded draws."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor
from torchrl.data import Bounded
from torchrl.objectives import SoftUpdate

from qsm_rl import DiffusionActor, NoiseSchedule, QScoreMatchingLoss, QValueMLP, ScaledQScore, ScoreMLP

REFERENCE = Path(__file__).parent / "data" / "qsm_reference.npz"
SCORE_LAYERS = {
    "MLP_0/Dense_0": "time_mlp.1",
    "MLP_0/Dense_1": "time_mlp.3",
    "MLP_1/Dense_0": "mlp.0",
    "MLP_1/Dense_1": "mlp.2",
    "MLP_1/Dense_2": "mlp.4",
}
CRITIC_LAYERS = {"MLP_0/Dense_0": "mlp.0", "MLP_0/Dense_1": "mlp.2", "Dense_0": "mlp.4"}


@pytest.fixture(scope="module")
def reference() -> dict[str, np.ndarray]:
    with np.load(REFERENCE) as file:
        return dict(file)


def tensor(array: np.ndarray) -> Tensor:
    return torch.tensor(array)


def state_dict(reference: dict[str, np.ndarray], prefix: str, layers: dict[str, str]) -> dict[str, Tensor]:
    """The recorded weights under our names; JAX kernels are (in, out)."""
    out = {}
    for theirs, ours in layers.items():
        out[f"{ours}.weight"] = tensor(reference[f"{prefix}/{theirs}/kernel"].T)
        out[f"{ours}.bias"] = tensor(reference[f"{prefix}/{theirs}/bias"])
    if "time_mlp.1" in layers.values():
        out["time_mlp.0.frequencies"] = tensor(reference[f"{prefix}/FourierFeatures_0/kernel"])
    return out


@pytest.mark.parametrize(("name", "tolerance"), [("vp", 1e-6), ("linear", 1e-6), ("cosine", 5e-6)])
@pytest.mark.parametrize("num_steps", [1, 2, 5, 10, 20, 50, 100])
@pytest.mark.filterwarnings("ignore:sqrt")
def test_named_schedules_equal_the_authors(reference, name, tolerance, num_steps):
    schedule = getattr(NoiseSchedule, name)(num_steps)
    torch.testing.assert_close(
        schedule.betas, tensor(reference[f"schedules/{name}/{num_steps}"]), atol=tolerance, rtol=0
    )


def test_ten_updates_equal_the_authors(reference):
    meta = json.loads(str(reference["meta"]))
    obs_dim, act_dim, hidden = meta["obs_dim"], meta["act_dim"], tuple(meta["hidden"])
    score_network = ScoreMLP(obs_dim, act_dim, hidden, time_features=meta["time_dim"])
    score_network.load_state_dict(state_dict(reference, "init/score", SCORE_LAYERS))
    critics = []
    for k in (1, 2):
        critic = QValueMLP(obs_dim, act_dim, hidden)
        critic.load_state_dict(state_dict(reference, f"init/critic_{k}", CRITIC_LAYERS))
        critics.append(TensorDictModule(critic, in_keys=["observation", "action"], out_keys=["state_action_value"]))
    schedule = NoiseSchedule.vp(meta["T"])
    torch.testing.assert_close(schedule.betas, tensor(reference["schedule/betas"]), atol=1e-6, rtol=0)
    torch.testing.assert_close(schedule.alphas_cumprod, tensor(reference["schedule/alphas_cumprod"]), atol=1e-6, rtol=0)
    actor = DiffusionActor(score_network, action_spec=Bounded(-1.0, 1.0, (act_dim,)), noise_schedule=schedule)
    loss = QScoreMatchingLoss(actor, critics, score_target=ScaledQScore(float(meta["M_q"])))
    loss.make_value_estimator(gamma=meta["discount"])
    updater = SoftUpdate(loss, tau=meta["tau"])
    critic_parameters = [p for p in loss.qvalue_network_params.parameters() if p.requires_grad]
    critic_optimizer = torch.optim.Adam(critic_parameters, meta["lr"])
    actor_optimizer = torch.optim.Adam(actor.parameters(), meta["lr"])
    decay = torch.optim.lr_scheduler.LambdaLR(actor_optimizer, lambda i: 0.5 * (1 + math.cos(math.pi * i / 2e6)))

    def close(actual: Tensor, key: str, atol: float, rtol: float = 0.0) -> None:
        expected = tensor(reference[key])
        torch.testing.assert_close(actual.detach(), expected, atol=atol, rtol=rtol, msg=lambda m: f"{key}: {m}")

    for i in range(10):
        batch_arrays = {k.split("/")[-1]: tensor(v) for k, v in reference.items() if k.startswith(f"step{i}/batch/")}
        draws = {k.split("/")[-1]: tensor(v) for k, v in reference.items() if k.startswith(f"step{i}/draws/")}
        batch = TensorDict(
            {
                "observation": batch_arrays["observations"],
                "action": batch_arrays["actions"],
                "next": {
                    "observation": batch_arrays["next_observations"],
                    "reward": batch_arrays["rewards"].unsqueeze(-1),
                    "terminated": batch_arrays["masks"].unsqueeze(-1) == 0,
                    "done": batch_arrays["masks"].unsqueeze(-1) == 0,
                },
            },
            [meta["batch"]],
        )
        loss_qvalue, info = loss.qvalue_loss(batch, draws["x_T"], draws["z"], draws["target_action_noise"])
        close(info["next_action"], f"step{i}/out/next_action_sample", 2e-4)
        close(info["target_value"], f"step{i}/out/target_q", 1e-5)
        for k in (1, 2):
            close(info["critic_losses"][k - 1], f"step{i}/out/critic_loss_{k}", 1e-5)
        critic_optimizer.zero_grad()
        loss_qvalue.backward()
        critic_optimizer.step()
        updater.step()

        loss_actor, info = loss.actor_loss(batch, t=draws["t"].reshape(-1).long(), noise=draws["noise"])
        close(info["noisy_action"], f"step{i}/out/noisy_action", 1e-6)
        close(info["q_score"], f"step{i}/out/q_score", 1e-6)
        close(info["predicted_noise"], f"step{i}/out/eps_pred", 2e-5)
        close(loss_actor, f"step{i}/out/actor_loss", 0.0, rtol=1e-5)
        actor_optimizer.zero_grad()
        loss_actor.backward()
        actor_optimizer.step()
        decay.step()

    final_score = state_dict(reference, "final/score", SCORE_LAYERS)
    assert score_network.state_dict().keys() == final_score.keys()
    for name, weight in score_network.state_dict().items():
        torch.testing.assert_close(weight, final_score[name], atol=1e-6, rtol=0)
    for k, critic in enumerate(loss.trained_critics(), 1):
        for name, weight in critic.module.state_dict().items():
            expected = state_dict(reference, f"final/critic_{k}", CRITIC_LAYERS)[name]
            torch.testing.assert_close(weight, expected, atol=1e-6, rtol=0)
    targets = {name: value for name, value in loss.target_qvalue_network_params["module"].items(True, True)}
    # The recording holds the first critic's target.
    for name, expected in state_dict(reference, "final/target_critic_1", CRITIC_LAYERS).items():
        torch.testing.assert_close(targets[tuple(name.split("."))][0], expected, atol=1e-6, rtol=0)
