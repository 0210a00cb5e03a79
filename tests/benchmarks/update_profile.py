"""Where the time of the fastest update goes: `python tests/benchmarks/update_profile.py`, on a GPU `--device cuda`.

Profiles updates of the size of `recipes/benchmark.py` with the arithmetic that the recipes choose, and prints the share
of each kind of work: of the processor's time, or of the GPU's in the kernels that a CUDA graph launches.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
import torch._inductor.config
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from qsm_rl import training as rl
from recipes.benchmark import SIZE, make_batch, make_update

# The first that matches a kernel's or an operation's name, in lower case.
KINDS = {
    "matrix products": r"mm\b|matmul|gemm|cutlass|wgmma|linear|nvjet|xmma",
    "fused elementwise kernels": r"triton|cpp_fused",
    "Adam and zeroing gradients": r"adam|zero_grad",
    "compiler's guards": r"dynamo|pregraph",
    "wrappers around the compiled graphs": r"compiled|aot|autograd",
    "copies": r"copy|memcpy|memset",
}


def kind_of(name: str) -> str:
    """The kind of work that a kernel or an operation does."""
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, name.lower())), "everything else")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda; default %(default)s")
    parser.add_argument("--updates", type=int, default=50, help="updates to profile; default %(default)s")
    parser.add_argument("--names", type=int, default=12, help="names to list with their shares; default %(default)s")
    options = parser.parse_args()
    device = rl.choose_device(options.device)
    rl.limit_threads(device)
    torch.manual_seed(0)
    best = rl.choose_arithmetic(rl.QSMConfiguration(), device)
    rl.set_products(best.precision, device)
    on_gpu = device.type == "cuda"
    torch._inductor.config.cpp.enable_kernel_profile = True  # the compiler's kernels by name on the CPU, too
    update = make_update(SIZE, device, precision=best.precision, compile=best.compile, cuda_graph=on_gpu)
    batch = make_batch(SIZE["batch"], device)
    synchronize = torch.cuda.synchronize if on_gpu else lambda: None
    for _ in range(10):  # compiles, and records the graph
        update(batch.copy())
    synchronize()
    begin = time.perf_counter()
    for _ in range(options.updates):
        update(batch.copy())
    synchronize()
    microseconds = 1e6 * (time.perf_counter() - begin) / options.updates
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as profiler:
        for _ in range(options.updates):
            update(batch.copy())
        synchronize()
    wanted = DeviceType.CUDA if on_gpu else DeviceType.CPU
    times: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    for event in profiler.key_averages():
        taken = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        if event.device_type == wanted and taken > 0:
            times[event.key] += taken / options.updates
            calls[event.key] += event.count / options.updates
    total = sum(times.values())
    arithmetic = f"{best.precision}{', compiled' if best.compile else ''} on {device}"
    print(
        f"{arithmetic}: {microseconds:.0f} us an update; profiled {total:.0f} us in {sum(calls.values()):.0f} calls\n"
    )
    print("| kind | share | us | calls |\n|---|---|---|---|")
    kinds: Counter[str] = Counter()
    for name, taken in times.items():
        kinds[kind_of(name)] += taken
    for kind, taken in kinds.most_common():
        count = sum(calls[name] for name in times if kind_of(name) == kind)
        print(f"| {kind} | {taken / total:.0%} | {taken:.0f} | {count:.0f} |")
    print("\n| name | kind | share | calls |\n|---|---|---|---|")
    for name, taken in times.most_common(options.names):
        print(f"| {name[:70]} | {kind_of(name)} | {taken / total:.1%} | {calls[name]:.0f} |")


if __name__ == "__main__":
    main()
