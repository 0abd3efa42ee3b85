"""The compiler half: it identifies itself and refuses to compile."""

from __future__ import annotations

from typing import Any, NoReturn

from triton.backends import compiler as _base

WANTS_INTERPRETER = (
    "there is no Triton compiler for CPU: set TRITON_INTERPRET=1 before triton is imported, "
    "so that kernels are interpreted"
)


class InterpreterBackend(_base.BaseBackend):
    """Never asked to compile as long as the interpreter is on."""

    @staticmethod
    def supports_target(target: Any) -> bool:
        return target.backend == "cpu"

    def hash(self) -> str:
        return "rl-lvr-cpu-interpreter"

    def parse_options(self, options: dict[str, Any]) -> NoReturn:
        raise RuntimeError(WANTS_INTERPRETER)

    def add_stages(self, stages: dict[str, Any], options: object, *more: Any) -> NoReturn:
        raise RuntimeError(WANTS_INTERPRETER)

    def load_dialects(self, context: Any) -> NoReturn:
        raise RuntimeError(WANTS_INTERPRETER)

    def get_module_map(self) -> dict[str, Any]:
        return {}
