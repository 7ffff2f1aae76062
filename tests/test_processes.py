"""Several processes: what they send and when, and that they train like one."""
from contextlib import nullcontext

import pytest
import torch

import train_gpt2
from support import processes
from support.processes import Buckets, compiler
from tests.runs import TINY, checkpoint_loss, knobs_of, same_run, train, train_in_processes
from train_gpt2 import GPT, OPTIMS, Config, backward


class Wire:
    """Stands in for torch.distributed: another process has three times the gradients of this one.
    """
    def __init__(self):
        self.sent = []

    def all_reduce(self, flat, async_op):
        self.sent.append(flat.clone())
        flat.mul_(4)
        return self

    def wait(self):
        pass

    def get_world_size(self):
        return 2


@pytest.fixture
def wire(monkeypatch):
    monkeypatch.setattr(processes, "BUCKET", 8192)
    monkeypatch.setattr(processes, "dist", wire := Wire())
    return wire


def new_model():
    torch.manual_seed(0)
    return GPT(Config(**TINY | dict(zero_init=False), vocab_size=24))


def one_step(model, buckets=None):
    """Gradients of two micro-batches."""
    idx = torch.randint(24, (2, 4, 17), generator=torch.Generator().manual_seed(0))
    micro_batches = [(rows[:, :-1], rows[:, 1:], weight) for rows, weight in zip(idx, (0.3, 0.7))]
    backward(model, model, micro_batches, 1, nullcontext, lambda line: None, buckets)
    if buckets:
        buckets.average([torch.zeros(())])


def check_means(model):
    one_step(alone := new_model())
    for (name, p), q in zip(model.named_parameters(), alone.parameters()):
        assert torch.allclose(p.grad, 2 * q.grad, rtol=1e-4, atol=1e-7), name


def test_gradients_are_sent_while_backward_runs(wire):
    model = new_model()
    buckets = Buckets(model)
    seen = []
    late = model.blocks[0].mlp.fc.weight
    late.register_post_accumulate_grad_hook(lambda p: seen.append(len(wire.sent)))
    one_step(model, buckets)
    check_means(model)
    n = len(buckets.buckets)
    # Nothing of the first micro-batch; of the last one most is away before the first block's turn.
    assert seen[0] == 0 and n // 2 < seen[1] < n and len(wire.sent) == n + 1


def test_other_numbers_are_averaged_too(wire):
    buckets = Buckets(nn := torch.nn.Linear(2, 1))
    others = [torch.tensor(1.0), torch.tensor([2.0, 3.0])]
    buckets.average(others)
    assert others[0] == 2 and others[1].tolist() == [4, 6]
    # What nothing reads has no gradient afterwards, either.
    assert nn.weight.grad is None and [len(flat) for flat in wire.sent] == [3, 3]


@pytest.mark.parametrize("where", ["head", "blocks.1.mlp.fc", "blocks.0.mixer.q", "wte"])
def test_out_of_memory_the_same_is_sent_in_the_same_order(wire, where):
    """Where backward of the last micro-batch has come so far; each is sent once."""
    one_step(model := new_model(), Buckets(model))
    undisturbed = wire.sent
    wire.sent = []
    model = new_model()
    calls = []

    def too_much(p):
        calls.append(p)
        if len(calls) == 2:
            raise MemoryError

    buckets = Buckets(model)
    model.get_submodule(where).weight.register_post_accumulate_grad_hook(too_much)
    one_step(model, buckets)
    assert len(calls) == 6                                   # two passes, then four pieces
    check_means(model)
    assert len(wire.sent) == len(undisturbed)
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-7) for a, b in zip(wire.sent, undisturbed))


def test_with_several_processes_a_bucket_has_a_compiled_graph(wire, monkeypatch):
    """Of one graph all gradients come at once, at the end. Nothing is generated here."""
    wire.is_initialized = lambda: False
    assert compiler() == "inductor"
    graphs = []

    def counted(graph, inputs):
        graphs.append(graph)
        return graph

    wire.is_initialized = lambda: True
    monkeypatch.setattr("torch._dynamo.backends.registry.lookup_backend",
                        lambda backend: counted if backend == "inductor" else backend)
    model = torch.nn.Sequential(*[torch.nn.Linear(64, 64, bias=False) for _ in range(4)])
    torch.compile(model, backend=compiler())(torch.ones(1, 64)).sum().backward()
    assert len(graphs) == len(Buckets(model).buckets) == 4


def any_pass_sends():
    arm = Buckets.arm
    Buckets.arm = lambda buckets, last: arm(buckets, True)


def a_bucket_stays():
    send = Buckets.send

    def sometimes(buckets, tensors):
        send(buckets, tensors)
        if len(buckets.sent) == 2:
            buckets.sent[1][2].wait()
            flat = torch.cat([tensor.flatten() for tensor in tensors])
            buckets.sent[1] = (flat, *buckets.sent[1][1:])

    Buckets.send = sometimes


FAULTS = [any_pass_sends, a_bucket_stays]


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_seen(wire, monkeypatch, fault):
    monkeypatch.setattr(Buckets, "arm", Buckets.arm)
    monkeypatch.setattr(Buckets, "send", Buckets.send)
    fault()
    one_step(model := new_model(), Buckets(model))
    with pytest.raises(AssertionError):
        check_means(model)


@pytest.mark.parametrize("method", ["all_reduce", "wait"])
def test_a_process_that_is_gone_is_one_line(wire, monkeypatch, method):
    """In a hook of backward's, too."""
    def closed(*args, **kwargs):
        raise RuntimeError("Connection closed by peer\nand more")

    monkeypatch.setattr(Wire, method, closed)
    with pytest.raises(SystemExit, match="^another process is gone .Connection closed by peer.: "):
        one_step(model := new_model(), Buckets(model))


def test_one_process_has_no_hooks(shards, tmp_path, monkeypatch):
    monkeypatch.setattr(train_gpt2, "Buckets", None)
    train(tmp_path, **shards, num_iterations=1)


# ---------------- whole runs. Two and four micro-batches a step of two and four processes

STEP = dict(batch_size=2, grad_accumulation_steps=4, grad_clip=1.0)


@pytest.mark.parametrize("row, optim", [*zip(("attn", "afno", "attn", "afno"), OPTIMS)])
def test_two_processes_train_like_one(shards, tmp_path, row, optim):
    knobs = knobs_of(row, **shards, **STEP, optim=optim)
    loss, one = train(tmp_path / "one", **knobs)
    two = train_in_processes(2, tmp_path / "two", **knobs)
    same_run(one, two, 1e-4)
    assert checkpoint_loss(two) == pytest.approx(loss, abs=1e-5)
    assert len(list((tmp_path / "two").iterdir())) == 1     # one log, of rank 0


# Documents of many lengths, which processes weigh; clipped gates.
LINES = dict(mixer="attn", optim="muon", data="data/tinyshakespeare", batches="padded",
             document_token=10, residual="gpas")


@pytest.mark.parametrize("nodes", [1, 2])
def test_four_processes_train_like_one(tmp_path, nodes):
    """Four of one machine, or two of each of two, by torchrun's own rendezvous."""
    knobs = STEP | LINES
    _, one = train(tmp_path / "one", **knobs)
    four = train_in_processes(4 // nodes, tmp_path / "four", nodes, **knobs)
    same_run(one, four, 1e-4)
    assert len(list((tmp_path / "four").iterdir())) == 1


@pytest.mark.parametrize("fault", FAULTS)
def test_a_run_with_a_fault_is_another(shards, tmp_path, fault):
    knobs = shards | STEP | dict(num_iterations=2)
    _, one = train(tmp_path / "one", **knobs)
    two = train_in_processes(2, tmp_path / "two", fault=fault, **knobs)
    with pytest.raises(AssertionError):
        same_run(one, two, 1e-4)
