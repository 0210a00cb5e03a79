from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch.utils._python_dispatch import TorchDispatchMode

from qsm_rl import BoltzmannQScore, NormalizedQScore, PosteriorQScore
from qsm_rl.training import read_fault
from qsm_rl.training.updates import actor_critic_update
from qsm_rl.training.updates.cuda_graphs import CudaGraph, CudaGraphPolicy
from qsm_rl.training.updates.update import NonFiniteLossError
from tests.training.small_trainer import build
from tests.training.updates.test_stacked_update import make_batch

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


class Transfers(TorchDispatchMode):
    """Notes what would wait for a GPU, or send numbers to it, inside an update."""

    def __init__(self):
        super().__init__()
        self.found = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (
            torch.ops.aten._local_scalar_dense.default,
            torch.ops.aten.lift_fresh.default,
            torch.ops.aten.nonzero.default,
            torch.ops.aten.masked_select.default,
        ):
            self.found.add(str(func))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def without_graphs(monkeypatch):
    """An update for a CUDA graph, run as it is: what the graph would hold, on any device."""
    monkeypatch.setattr(actor_critic_update, "CudaGraph", lambda step: step)


@pytest.mark.parametrize("score_target", [None, BoltzmannQScore(1.0), NormalizedQScore(), PosteriorQScore(1.0, 8)])
@pytest.mark.parametrize("options", [{}, {"gradient_clipping": 0.5}])
def test_an_update_for_a_graph_reads_nothing_back(without_graphs, score_target, options):
    update = build("Slide", score_target=score_target, cuda_graph=True, **options)[1].update
    batch = make_batch()
    update(batch.copy())
    with Transfers() as transfers:
        update._steps[True](batch.copy())
    assert transfers.found == set()
    with Transfers() as transfers:  # and the check sees such things
        build("Slide")[1].update(batch.copy())
    assert "aten._local_scalar_dense.default" in transfers.found


def test_an_update_for_a_graph_is_the_same_update(without_graphs):
    options = {"gradient_clipping": 0.5, "policy_delay": 2, "actor_learning_rate_decay": 5}
    plain, graphed = (build("Slide", cuda_graph=graph, **options)[1].update for graph in (False, True))
    batch = make_batch()
    for step in range(4):
        losses = []
        for update in (plain, graphed):
            torch.manual_seed(step)
            losses.append(update(batch.copy()))
        assert losses[0].keys() == losses[1].keys()
        for name, value in losses[0].items():
            torch.testing.assert_close(losses[1][name], value)
    graphed.check()
    for (name, one), other in zip(plain.state_dict().items(), graphed.state_dict().values(), strict=True):
        torch.testing.assert_close(one, other, msg=name)
    rates = [update.optimizers["actor"].param_groups[0]["lr"] for update in (plain, graphed)]
    assert rates[0] == pytest.approx(float(rates[1])) and rates[0] < 1e-3


def test_what_is_not_finite_shows_in_the_check_and_the_weights_stay(without_graphs):
    update = build("Slide", cuda_graph=True)[1].update
    good, bad = make_batch(), make_batch()
    bad["next", "reward"][3] = float("nan")
    update(good.copy())
    update.check()
    parameters = [*update.actor_parameters, *update.critic_parameters]
    before = [parameter.detach().clone() for parameter in parameters]
    for batch in (bad, good, good):
        update(batch.copy())
    with pytest.raises(NonFiniteLossError, match="loss_qvalue is nan") as raised:
        update.check()
    assert raised.value.updates_since == 2
    for parameter, value in zip(parameters, before, strict=True):
        assert torch.equal(parameter, value)


def test_the_module_names_the_update_and_dumps_the_batch_of_a_late_check(without_graphs, tmp_path):
    frames, module = build("Slide", cuda_graph=True)
    for index, batch in enumerate(frames):
        module.training_step(batch, index)
    module.faults, done = tmp_path, module.grad_steps
    batches = [module.writer.replay.sample() for _ in range(4)]
    batches[1]["next", "reward"][:] = float("inf")
    with pytest.raises(NonFiniteLossError, match=rf"(?s)update {done + 1}; .*A dump"):
        module._update(batches)
    (folder,) = tmp_path.iterdir()

    assert torch.isinf(read_fault(folder).batch["next", "reward"]).all()


def test_a_state_goes_from_a_graph_to_none_and_back(without_graphs):
    batch = make_batch()
    for first, second in ((True, False), (False, True)):
        one, other = (build("Slide", cuda_graph=graph)[1].update for graph in (first, second))
        one(batch.copy())
        state = deepcopy(one.checkpoint_state())
        assert isinstance(state["optimizers"]["actor"]["param_groups"][0]["lr"], float)
        other.restore_state(state)
        for update in (one, other):
            torch.manual_seed(0)
            update(batch.copy())
        for (name, a), b in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
            torch.testing.assert_close(a, b, msg=name)
        group = other.optimizers["actor"].param_groups[0]
        assert group["capturable"] == second and isinstance(group["lr"], torch.Tensor) == second


def test_a_graph_takes_batches_like_the_recorded_one_only():
    class Recorded:
        def replay(self):
            seen.append(graph._inputs["x"].clone())

    seen = []
    graph = CudaGraph(lambda batch: batch["x"])
    graph._graph, graph._inputs = Recorded(), {"x": torch.zeros(4), ("next", "y"): torch.zeros(4, 2)}
    following = TensorDict({"y": torch.ones(4, 2)}, [4])
    graph(TensorDict({"x": torch.ones(4), "next": following, "more": torch.ones(4)}, [4]))
    with pytest.raises(ValueError, match=r"'x' has shape \(1,\).*recorded with \(4,\)"):
        graph(TensorDict({"x": torch.zeros(1), "next": following[:1]}, [1]))
    with pytest.raises(ValueError, match=r"\('next', 'y'\) is missing"):
        graph(TensorDict({"x": torch.zeros(4)}, [4]))
    assert torch.equal(torch.stack(seen), torch.ones(1, 4))


@needs_cuda
def test_a_graph_gives_what_its_function_gives():
    offset = torch.zeros((), device="cuda")

    def function(batch):
        return {"sum": batch["x"].sum() + offset, "draw": torch.randn(3, device="cuda")}

    graph = CudaGraph(function)
    draws = []
    for step in range(8):
        offset.fill_(step)
        out = graph(TensorDict({"x": torch.full((4,), float(step), device="cuda")}, [4], device="cuda"))
        assert out["sum"].item() == 5 * step
        draws.append(out["draw"].clone())
    assert torch.stack(draws).unique().numel() == 24


@needs_cuda
def test_graphed_updates_equal_the_others_to_the_bit():
    batch = make_batch().to("cuda")
    states = []
    for graph in (False, True):
        update = build("Slide", device="cuda", cuda_graph=graph)[1].update
        torch.manual_seed(0)
        for _ in range(10):
            update(batch.copy())
        update.check()
        states.append(update.state_dict())
    for (name, one), other in zip(states[0].items(), states[1].values(), strict=True):
        assert torch.equal(one, other), name


@needs_cuda
def test_a_graphed_policy_follows_the_weights():
    layer = torch.nn.Linear(2, 1).cuda()
    policy = CudaGraphPolicy(TensorDictModule(layer, ["observation"], ["action"]), torch.device("cuda"))
    for step in range(6):
        with torch.no_grad():
            layer.weight.fill_(step)
        out = policy(TensorDict({"observation": torch.ones(3, 2)}, [3]))
        assert out["action"].device.type == "cpu"
        torch.testing.assert_close(out["action"], torch.full((3, 1), 2.0 * step) + layer.bias.item())
