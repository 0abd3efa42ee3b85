"""Exit codes of a program of two processes that has done its work, on a machine that is busy with other things.

    nice python benchmarks/exits.py --launches 200 | python benchmarks/record.py exits
    nice python benchmarks/exits.py --launches 200 --leave | python benchmarks/record.py exits-control

Each launch goes through `rl_lvr.accelerated`, as `rl-lvr sft --accelerate_config` does. Its processes take three steps
of DDP over gloo and leave, one sooner than the other. `--leave` is the control: they leave their group alone. 134 is
an abort (SIGABRT); the last line is JSON.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import multiprocessing
import sys
import time

from rl_lvr.accelerated import CONFIGS, group_ended, main

WIDTH = 256


def be(*, leave: bool) -> None:
    """The life of one process."""
    import torch
    from torch import distributed, nn

    torch.set_num_threads(1)
    with contextlib.nullcontext() if leave else group_ended():
        distributed.init_process_group("gloo")
        rank = distributed.get_rank()
        model = nn.parallel.DistributedDataParallel(nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(8))))
        for _ in range(3):
            model(torch.randn(4, WIDTH)).square().mean().backward()
        work = distributed.all_reduce(torch.ones(1), async_op=True)
        work.wait()
        time.sleep(0.05 * rank)


def burn(stop: multiprocessing.synchronize.Event) -> None:
    while not stop.is_set():
        sum(range(10_000))


def measure(launches: int, burners: int, *, leave: bool) -> dict[str, object]:
    """Count the exit codes of so many launches."""
    context = multiprocessing.get_context("spawn")
    stop = context.Event()
    load = [context.Process(target=burn, args=(stop,), daemon=True) for _ in range(burners)]
    for process in load:
        process.start()
    words = ["--config_file", str(CONFIGS / "ddp.yaml"), "--num_processes", "2", "--main_process_port", "0"]
    words += [__file__, "--be", *(["--leave"] if leave else [])]
    codes: collections.Counter[int] = collections.Counter()
    began = time.monotonic()
    try:
        for number in range(1, launches + 1):
            codes[main(words)] += 1
            if number % 20 == 0 or number == launches:
                print(f"{number} launches, exit codes {dict(codes)}", flush=True)
    finally:
        stop.set()
        for process in load:
            process.join()
    return {
        "launches": launches,
        "processes": 2,
        "group": "left alone" if leave else "ended",
        "exit_codes": {str(code): count for code, count in sorted(codes.items())},
        "aborts": codes[134],
        "burners": burners,
        "seconds": round(time.monotonic() - began),
        "torch": _torch_version(),
    }


def _torch_version() -> str:
    from importlib.metadata import version

    return version("torch")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--launches", type=int, default=200)
    parser.add_argument("--burners", type=int, default=2, help="processes that only use the CPU meanwhile")
    parser.add_argument("--leave", action="store_true", help="the control: the group is not ended")
    parser.add_argument("--be", action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.be:
        be(leave=chosen.leave)
        sys.exit(0)
    print(json.dumps(measure(chosen.launches, chosen.burners, leave=chosen.leave)))
