"""A Triton backend named `cpu` that compiles nothing: kernels run under TRITON_INTERPRET=1.

Triton imports `compiler` and `driver` from here, takes the only concrete subclass of its base class in each,
and fails loudly on a second one: keep the base classes' own names out of both modules.
"""

from rl_lvr_cpu_runtime import refuse_gpu

refuse_gpu()
