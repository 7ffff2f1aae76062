"""Memory traffic of a compiled d12 block, forward and backward, as torch.compile itself counts it.

    python records/2026-11-28_step/measure.py > after.txt

Inductor's own byte count of its kernels, by its backend for CPUs, without GEMMs and attention's
kernel: they are not its own. 1 C-byte is C bytes: a pass over (tokens, C) in bf16 is 2 C-bytes a
token. A batch of 16, the race's, minus one of 8, so that what a micro-batch costs once drops out;
and of 2 minus 1, where a batch of 1 is planned otherwise: its permutations move nothing. bf16
autocast, with RMSNorm in fp32 as CUDA's autocast has it, AFNO by GEMMs. Nothing is computed:
kernels are planned only.
"""
import sys
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.graph import GraphLowering
from torch._inductor.scheduler import ExternKernelSchedulerNode, NopKernelSchedulerNode
from torch._inductor.utils import get_fused_kernel_name
from train_gpt2 import Block, Config

C, T = 768, 1024


def plan_only(seen: Counter):
    """From here on torch.compile counts the bytes of each kernel into `seen` and builds none."""
    codegen = GraphLowering.codegen

    def counted(graph):
        result = codegen(graph)
        phase = "backward" if graph.is_backward else "forward"
        for node in graph.scheduler.nodes:
            if isinstance(node, (ExternKernelSchedulerNode, NopKernelSchedulerNode)):
                continue
            name = get_fused_kernel_name(node.get_nodes(), "original_aten")
            seen[phase, name] += node.get_read_write_buffers_sizes()
        return result

    GraphLowering.codegen = counted
    AsyncCompile.cpp_pybinding = lambda *args, **kwargs: lambda *tensors: None


def traffic(seen: Counter, mixer: str, stream: torch.dtype, B: int) -> Counter:
    """{kernel: bytes} of a forward and a backward of one block that adds v1 to its values."""
    seen.clear()
    torch._dynamo.reset()
    cfg = Config(mixer=mixer, model="d12", vocab_size=128, sequence_length=T,
                 afno_backend="toeplitz" if mixer == "afno" else "auto")
    block = torch.compile(Block(cfg, 1), dynamic=False, fullgraph=True)
    x = torch.zeros(B, T, C, dtype=stream, requires_grad=True)
    v1 = torch.zeros(B, T, C, dtype=torch.bfloat16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = block(x, v1)
    y.backward(torch.zeros_like(y))
    return Counter(seen)


def main():
    seen = Counter()
    plan_only(seen)
    torch._functorch.config.backward_pass_autocast = "off"
    torch._functorch.config.donated_buffer = False
    torch._inductor.config.force_disable_caches = True
    rms_norm = F.rms_norm
    F.rms_norm = lambda x, *args, **kwargs: rms_norm(x.float(), *args, **kwargs)
    print(f"C-bytes a token, C {C}, T {T}, torch {torch.__version__}")
    for mixer in ("attn", "afno"):
        for stream in (torch.float32, torch.bfloat16):
            batches = {B: traffic(seen, mixer, stream, B) for B in (16, 8, 2, 1)}
            total = {B: sum(table.values()) / (T * C) for B, table in batches.items()}
            table = batches[16]
            table.subtract(batches[8])
            marginal = (total[16] - total[8]) / 8
            once = (total[16] - 16 * marginal) * T * C
            print(f"\n{mixer}, residual stream in {stream}: {marginal:.1f}, and {once / 1e6:.0f} MB "
                  f"once a micro-batch (of 2 minus 1: {total[2] - total[1]:.1f})")
            for (phase, name), size in table.most_common():
                if size >= 8 * 0.05 * T * C:
                    name = name.removeprefix("fused_")[:80]
                    print(f"{size / (8 * T * C):8.1f}  {phase:9} {name}")


if __name__ == "__main__":
    main()
