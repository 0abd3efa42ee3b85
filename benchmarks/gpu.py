"""`make bench-gpu`: both fused operations on this GPU against what is used today, at the shapes of Qwen2.5-VL-7B.

Correctness first: if one kernel disagrees with float64, nothing is timed. Then results.csv gets a row per measurement
and gpu.png is drawn anew. `--device cpu --small` walks the same path on tiny shapes; its times mean nothing.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from itertools import chain
from pathlib import Path

import gpu_attention
import gpu_vocab
import torch

HERE = Path(__file__).resolve().parent
SECONDS, LEAST, MOST = 0.3, 3, 50  # of one measurement; fewest and most repetitions
FLUSH_BYTES = 256 << 20  # more than any L2 cache


@dataclass(frozen=True)
class Row:
    """One line of results.csv. y50, y20, y80: quantiles; milliseconds for time, MiB beyond the inputs for memory."""

    kernel: str
    provider: str
    mode: str
    metric: str
    x: int
    y50: float
    y20: float
    y80: float
    config: str
    gpu: str
    timestamp: str
    versions: str


def times(run: Callable[[], object], device: torch.device) -> list[float]:
    """Milliseconds of each repetition, the cache flushed before each."""
    run()
    flush = torch.empty(FLUSH_BYTES if device.type == "cuda" else 1, dtype=torch.uint8, device=device)
    found: list[float] = []
    begin = time.perf_counter()
    while len(found) < LEAST or (len(found) < MOST and time.perf_counter() - begin < SECONDS):
        flush.zero_()
        found.append(_once(run, device))
    return found


def _once(run: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        begin = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - begin)
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop)


def peak_mib(run: Callable[[], object], device: torch.device) -> float:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20


def quantiles(values: list[float]) -> tuple[float, float, float]:
    at = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    low, middle, high = torch.tensor(values, dtype=torch.float64).quantile(at).tolist()
    return middle, low, high


def measure(device: torch.device, small: bool, about: tuple[str, str, str]) -> Iterator[Row]:
    parts = {"attention_mass": gpu_attention, "vocab_stats": gpu_vocab}
    for kernel, part in parts.items():
        for cell in part.measurements(device, small=small):
            common = kernel, cell.provider, cell.mode
            try:
                memory = [peak_mib(cell.run, device)] if device.type == "cuda" else []
                found = times(cell.run, device)
            except torch.cuda.OutOfMemoryError:
                # A finding: this provider cannot run here at all.
                lost = json.dumps({**cell.config, "out_of_memory": True})
                yield Row(*common, "time", cell.rows, *[float("nan")] * 3, lost, *about)
                torch.cuda.empty_cache()
                continue
            config = json.dumps(cell.config)
            yield Row(*common, "time", cell.rows, *quantiles(found), config, *about)
            for mib in memory:
                yield Row(*common, "memory", cell.rows, mib, mib, mib, config, *about)


def write(rows: list[Row], path: Path) -> None:
    """Adds to the table at `path`."""
    new = not path.exists()
    with path.open("a", newline="") as file:
        table = csv.DictWriter(file, [field.name for field in fields(Row)])
        if new:
            table.writeheader()
        table.writerows(asdict(row) for row in rows)


# --- targets ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    name: str
    value: float
    bound: float
    at_most: bool

    @property
    def met(self) -> bool:
        return self.value <= self.bound if self.at_most else self.value >= self.bound

    def __str__(self) -> str:
        sign = "<=" if self.at_most else ">="
        return f"{'met   ' if self.met else 'missed'}  {self.name}: {self.value:.4g} ({sign} {self.bound:g})"


def targets(rows: list[Row]) -> list[Target]:
    """Those of the project, per sequence and layer where batches differ; vocab_stats with its default workspace."""
    usual = [row for row in rows if json.loads(row.config).get("workspace_mib", 64) == 64]
    found = {(row.kernel, row.provider, row.mode, row.metric, row.x): row for row in usual}

    def value(provider: str, mode: str, x: int, metric: str = "time", kernel: str = "attention_mass") -> float:
        """NaN where it was not measured: then no comparison is met."""
        row = found.get((kernel, provider, mode, metric, x))
        return float("nan") if row is None else row.y50 / json.loads(row.config).get("batch", 1)

    out = []
    for x in sorted({row.x for row in rows if row.kernel == "attention_mass"}):
        a, b, text = (value(p, "span", x) for p in ("path_a", "path_b", "text_rows"))
        out += [
            Target(f"T={x}: path A, % of the scoring layer", 100 * a / value("scoring_layer", "forward", x), 0.5, True),
            Target(f"T={x}: text-row softmax over path A", text / a, 200, False),
            Target(f"T={x}: text-row softmax over path B", text / b, 10, False),
            Target(f"T={x}: eager over path A", value("eager", "span", x) / a, 1000, False),
        ]
    sizes = sorted({row.x for row in rows if row.kernel == "vocab_stats"})
    for x in sizes:
        ours, trl = (value(p, "forward", x, kernel="vocab_stats") for p in ("ours", "trl"))
        out.append(Target(f"N={x}: vocab_stats over TRL's time", ours / trl, 1.0, True))
    for x in sizes[-1:]:
        ours, naive = (value(p, "forward", x, "memory", "vocab_stats") for p in ("ours", "naive"))
        out.append(Target(f"N={x}: naive over vocab_stats, memory", naive / ours, 150, False))
    return out


# --- picture ---------------------------------------------------------------------------------------------


def draw(rows: list[Row], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    wanted = [
        ("attention_mass", "span", "time", "one layer, per sequence, ms", "tokens T"),
        ("vocab_stats", "forward", "time", "entropy and log-prob, ms", "rows N"),
        ("vocab_stats", "forward", "memory", "peak memory, MiB", "rows N"),
    ]
    figure, axes = plt.subplots(1, 3, figsize=(13, 4))
    for axis, (kernel, mode, metric, title, label) in zip(axes, wanted, strict=True):
        chosen = [row for row in rows if (row.kernel, row.mode, row.metric) == (kernel, mode, metric)]
        for provider in dict.fromkeys(row.provider for row in chosen):
            best: dict[int, float] = {}
            for row in chosen:
                if row.provider == provider:
                    y = row.y50 / json.loads(row.config).get("batch", 1)
                    best[row.x] = min(y, best.get(row.x, y))
            axis.plot(list(best), list(best.values()), marker="o", label=provider)
        axis.set(xscale="log", yscale="log", title=title, xlabel=label)
        if chosen:
            axis.legend()
    figure.suptitle(rows[0].gpu)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def about(device: torch.device) -> tuple[str, str, str]:
    """Hardware, time, versions."""
    import triton

    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "none: CPU"
    versions = {"torch": torch.__version__, "triton": triton.__version__, "cuda": torch.version.cuda}
    stamp = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return gpu, stamp, json.dumps(versions)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny shapes: does the benchmark itself work?")
    parser.add_argument("--out", type=Path, help="folder of results.csv and gpu.png: benchmarks/, or none with --small")
    chosen = parser.parse_args(arguments)
    if chosen.device == "cuda" and not torch.cuda.is_available():
        sentence = "bench-gpu: no CUDA GPU here: run it on a machine that has one, or try --device cpu --small."
        print(sentence, file=sys.stderr)
        return 2
    if chosen.device == "cpu" and not chosen.small:
        parser.error("--device cpu takes tiny shapes only: add --small.")
    device = torch.device(chosen.device)
    begin = time.perf_counter()
    faults = list(chain(*(part.gate(device, small=chosen.small) for part in (gpu_attention, gpu_vocab))))
    if faults:
        print("bench-gpu: wrong results, so nothing is timed:", *faults, sep="\n  ", file=sys.stderr)
        return 1
    print(f"correct ({time.perf_counter() - begin:.0f} s)")
    rows = []
    for row in measure(device, chosen.small, about(device)):
        name = f"{row.kernel:15}{row.provider:14}{row.mode:20}{row.x:7}"
        print(f"{name}  {row.metric:7}{row.y50:12.4f}  {row.config}", flush=True)
        rows.append(row)
    if not chosen.small:
        print(*targets(rows), sep="\n")
    out: Path | None = chosen.out or (None if chosen.small else HERE)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        write(rows, out / "results.csv")
        draw(rows, out / "gpu.png")
        print(f"wrote {out / 'results.csv'} and {out / 'gpu.png'}")
    print(f"{time.perf_counter() - begin:.0f} s in all")
    return 0


if __name__ == "__main__":
    sys.exit(main())
