"""Several processes, on one machine or on many: who they are, and the mean of their gradients."""
import os
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

from support.machine import first_line


def process_numbers() -> tuple[int, int, int]:
    """rank, local rank, processes, as torchrun sets them. SystemExit with one line for nonsense."""
    numbers = []
    for name, default in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1")):
        text = os.environ.get(name, default)
        if not text.isdecimal():
            raise SystemExit(f"{name}={text} in the environment is no number: unset it, or start "
                             "the run by torchrun")
        numbers.append(int(text))
    rank, _, world = numbers
    if rank >= world:
        raise SystemExit(f"RANK={rank} and WORLD_SIZE={world} in the environment do not fit: unset "
                         "them, or start the run by torchrun")
    return rank, numbers[1], world


def restarted() -> bool:
    """Has torchrun replaced what was killed?"""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


# How long processes wait for one another.
JOIN = timedelta(minutes=10)


def join_processes(device: torch.device, rank: int, world: int):
    """This process's device and, of several, the others. SystemExit where one does not come."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world == 1 or dist.is_initialized():
        return
    if not {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        raise SystemExit(f"WORLD_SIZE={world} in the environment, but no MASTER_ADDR and "
                         "MASTER_PORT: unset it, or start the run by torchrun")
    # Optimizers import it. If they do after init_process_group, something in it keeps the group:
    # its threads outlive destroy_process_group and now and then abort a process that ends well.
    from torch import _dynamo  # noqa: F401
    backend = "nccl" if device.type == "cuda" else "gloo"
    store = {}
    try:
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            # Behind a restart torchrun's store still has the addresses of those before.
            shared = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]),
                                   world, is_master=False, timeout=JOIN)
            attempt = os.environ["TORCHELASTIC_RESTART_COUNT"]
            store = dict(store=dist.PrefixStore(f"attempt {attempt}", shared), rank=rank,
                         world_size=world)
        dist.init_process_group(backend, timeout=JOIN, **store)
    except RuntimeError as e:
        raise SystemExit(f"process {rank + 1} of {world}: the others did not come within "
                         f"{JOIN.seconds} s ({first_line(e)})") from None


def leave_processes(world: int):
    if world > 1:
        dist.destroy_process_group()


def sum_over_processes(total: Tensor, device: torch.device, world: int) -> float:
    """Of a number of each, which is on the CPU."""
    if world > 1:
        total = total.to(device)
        dist.all_reduce(total)
    return total.item()


@contextmanager
def others_there():
    """SystemExit with one line where another process ended in the middle of it."""
    try:
        yield
    except RuntimeError as e:
        raise SystemExit(f"another process is gone ({first_line(e)}): go on from the last "
                         "checkpoint by --resume auto") from None


# Bytes sent at once: DistributedDataParallel's. Less would wait for the network's latency more
# often, more would leave more to send when backward ends.
BUCKET = 25 * 2**20


class Buckets:
    """Gradients -> their means over processes, which have weighed theirs by tokens.

    Most travel while backward still computes others. A bucket is sent when its last gradient of a
    step is whole, and in one order: from the parameters behind, where backward begins. So all
    processes send the same, also where one runs out of memory and does its step again: what it has
    sent was whole, counts, and is not sent again. Source: arXiv 2006.15704.
    """
    def __init__(self, model: nn.Module):
        self.buckets = [[]]
        self.bucket_of = {}                          # {parameter: number}, as they are sent
        for p in reversed([*model.parameters()]):
            if self.buckets[-1] and sum(q.nbytes for q in self.buckets[-1]) + p.nbytes > BUCKET:
                self.buckets.append([])
            self.bucket_of[p] = len(self.buckets) - 1
            self.buckets[-1].append(p)
            p.register_post_accumulate_grad_hook(self.arrived)
        self.missing = [0] * len(self.buckets)
        self.armed = False
        self.sent = []                               # (flat copy, its sizes, what to wait for)

    def arm(self, last: bool):
        """Before each backward: gradients are whole in the last one of a step."""
        self.armed = last
        self.missing = [len(bucket) for bucket in self.buckets]

    def arrived(self, p: nn.Parameter):
        if not self.armed:
            return
        self.missing[self.bucket_of[p]] -= 1
        while len(self.sent) < len(self.buckets) and not self.missing[len(self.sent)]:
            self.send_next()

    def send_next(self):
        """What nothing reads has no gradient, in no process: its place is zero."""
        bucket = self.buckets[len(self.sent)]
        self.send([torch.zeros_like(p) if p.grad is None else p.grad for p in bucket])

    def send(self, tensors: list[Tensor]):
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        with others_there():
            work = dist.all_reduce(flat, async_op=True)
        self.sent.append((flat, [tensor.numel() for tensor in tensors], work))

    def means(self):
        """Of all that was sent, tensor by tensor."""
        for flat, sizes, work in self.sent:
            with others_there():
                work.wait()
            yield from flat.div_(dist.get_world_size()).split(sizes)

    def average(self, others: list[Tensor]):
        """Behind backward: every p.grad, and every tensor of `others`, is a mean from here on."""
        while len(self.sent) < len(self.buckets):
            self.send_next()
        self.send(others)
        means = self.means()
        for p, mean in zip(self.bucket_of, means):
            if p.grad is not None:
                p.grad = mean.view_as(p)
        for tensor, mean in zip(others, means):
            tensor.copy_(mean.view_as(tensor))
        self.sent = []


def compiler():
    """torch.compile's backend: with several processes a graph for each bucket.

    The backward of one graph has no gradients until it has ended: nothing would be sent before.
    """
    if not dist.is_initialized():
        return "inductor"
    from torch._dynamo.backends.distributed import DDPOptimizer
    from torch._dynamo.backends.registry import lookup_backend
    inductor = lookup_backend("inductor")
    split = DDPOptimizer(BUCKET, inductor, BUCKET).compile_fn

    def by_bucket(graph, inputs):
        try:
            return split(graph, inputs)
        except NotImplementedError:
            # Some releases of torch split no graph with an autograd.Function or FlexAttention.
            return inductor(graph, inputs)

    return by_bucket
