from __future__ import annotations

from qsm_rl import NormalizedQScore, PosteriorQScore, QScoreMatchingLoss
from tests.loss_contract import make_actor, make_critics, make_transitions


def test_out_keys_follow_another_score_target():
    loss, data = QScoreMatchingLoss(make_actor(), make_critics(), delay_qvalue=False), make_transitions((4,))
    assert loss.out_keys == list(loss(data).keys())
    loss.score_target = PosteriorQScore(1.0, num_particles=4)
    assert loss.out_keys == list(loss(data).keys()) and loss.out_keys[-1] == "effective_sample_size"
    loss.select_out_keys("loss_actor", "effective_sample_size")
    assert loss.out_keys == list(loss(data).keys()) == ["loss_actor", "effective_sample_size"]
    assert loss.out_keys_source[:2] == ["loss_actor", "loss_qvalue"]
    loss.reset_out_keys().score_target = NormalizedQScore(0.1)
    assert loss.out_keys == list(loss(data).keys()) and loss.out_keys[-1] == "q_score_norm"
