"""Compiles every kernel for a GPU that need not be there: `python ops_compile_worker.py 90` prints JSON lines.

A process of its own, because kernels must not be interpreted here. With `control` after the number, one kernel with a
quarter of its warps.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from rl_lvr.ops.attention_mass import triton_examples
from rl_lvr.ops.backends import KernelExample
from rl_lvr.ops.vocab_stats import triton_rows


def compiled(example: KernelExample, capability: int) -> Any:
    names = list(example.signature)
    # Pointers of torch's allocator and strides of whole heads are multiples of 16: Triton is told so at every launch.
    aligned = [i for i, name in enumerate(names) if example.signature[name].startswith("*") or "_stride_" in name]
    hints = {(i,): [["tt.divisibility", 16]] for i in aligned if names[i] not in example.constexprs}
    source = ASTSource(example.kernel, dict(example.signature), dict(example.constexprs), hints)
    options = {"num_warps": example.num_warps, "num_stages": example.num_stages}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def report(example: KernelExample, capability: int) -> dict[str, Any]:
    """Registers and bytes of spilled registers per thread, bytes of shared memory per program."""
    binary = compiled(example, capability)
    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    assembler = max(folder.glob("ptxas*"))  # ptxas-blackwell, where there is one, knows all that ptxas knows
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(binary.asm["ptx"])
        file.flush()
        target = re.search(r"\.target (\w+)", binary.asm["ptx"]).group(1)
        words = [assembler, "-v", "--gpu-name", target, file.name, "-o", "/dev/null"]
        text = subprocess.run(words, capture_output=True, text=True, check=True).stderr
    spilled = int(re.search(r"(\d+) bytes spill stores", text).group(1))
    registers = int(re.search(r"Used (\d+) registers", text).group(1))
    found = {"registers": registers, "spilled": spilled, "shared": binary.metadata.shared}
    return {"kernel": example.name, "target": f"sm_{capability}", **found}


if __name__ == "__main__":
    chosen = (*triton_examples.EXAMPLES, *triton_rows.EXAMPLES)
    if "control" in sys.argv:
        (kernel,) = (each for each in chosen if each.name == "attention_path_b")
        chosen = (replace(kernel, num_warps=kernel.num_warps // 4),)
    for each in chosen:
        print(json.dumps(report(each, int(sys.argv[1]))), flush=True)
