"""`--accelerate_config NAME|PATH`: a verb starts itself again through `accelerate launch`, in several processes.

Two stages: `start` replaces this process, which has not imported torch, by one that runs `main` here; that one launches
the processes and ends with the exit code of the first that failed.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from rl_lvr.errors import UserError
from rl_lvr.flags import take

FLAG = "accelerate_config"
PASSED_ON = ("num_processes", "num_machines", "machine_rank", "main_process_ip", "main_process_port")
"""Flags of `accelerate launch` that may stand beside it. They win over those of the file."""
CONFIGS = Path(__file__).resolve().parents[1] / "deepspeed_configs"
HELP = (
    "--accelerate_config NAME starts it in one process per GPU: ddp, zero2, zero3, zero3_offload (the files of "
    f"deepspeed_configs) or a file of your own; beside it may stand --{', --'.join(PASSED_ON)}."
)
ALL_GPUS = "--one-process-per-gpu"
"""Between `launch_words` and `main` alone: only the latter has torch to count them."""


def launch_words(verb: str, words: Sequence[str]) -> list[str] | None:
    """The words for `main` that start `rl-lvr VERB` again without `FLAG`; None if it is not among `words`."""
    ours, rest = take(words, (FLAG, *PASSED_ON))
    wanted = ours.pop(FLAG, None)
    if wanted is None:
        if ours:
            raise UserError(f"--{next(iter(ours))} goes with --{FLAG}: name ddp, zero2, zero3 or a file.")
        return None
    file, named = config_file(wanted)
    _refuse_repeats(file)
    count = [ALL_GPUS] if named and "num_processes" not in ours else []
    options = [part for name, value in ours.items() for part in (f"--{name}", value)]
    return [*count, "--config_file", str(file), *options, "-m", "rl_lvr.cli", verb, *rest]


def config_file(wanted: str) -> tuple[Path, bool]:
    """The file that is meant, and whether it is one of `CONFIGS`, meant by its name."""
    if wanted.endswith((".yaml", ".yml", ".json")) or "/" in wanted:
        if not Path(wanted).is_file():
            raise UserError(f"no accelerate config at {wanted}.")
        return Path(wanted), False
    file = CONFIGS / f"{wanted}.yaml"
    if not file.is_file():
        known = ", ".join(sorted(path.stem for path in CONFIGS.glob("*.yaml"))) or f"none, as {CONFIGS} is missing"
        raise UserError(f"no accelerate config {wanted!r}; there are {known}. A file of your own is named by its path.")
    return file, True


def _refuse_repeats(file: Path) -> None:
    """accelerate takes the last of repeated keys, in its file and in the DeepSpeed file that this names."""
    import yaml

    from rl_lvr.settings_files import read_yaml, refuse_repeats_in_json

    where = f"accelerate config {file}"
    try:
        text = file.read_text(encoding="utf-8")
        if file.suffix == ".json":
            refuse_repeats_in_json(text, where)
            return
        values = read_yaml(text, where)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"accelerate config {file} is not valid YAML: {' '.join(str(error).split())}") from error
    plugin = values.get("deepspeed_config") if isinstance(values, dict) else None
    named = plugin.get("deepspeed_config_file") if isinstance(plugin, dict) else None
    if isinstance(named, str) and Path(named).is_file():
        refuse_repeats_in_json(Path(named).read_text(encoding="utf-8"), f"DeepSpeed config {named}")


def start(words: Sequence[str]) -> NoReturn:
    """Become `main`. The process stays the same one, so signals and the exit code need no passing on."""
    os.execv(sys.executable, [sys.executable, "-m", __name__, *words])


def main(words: list[str]) -> int:
    """`accelerate launch`, with the exit code of the process that failed first instead of a traceback and 1."""
    import torch
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    arguments = launch_command_parser().parse_args([word for word in words if word != ALL_GPUS])
    if ALL_GPUS in words:
        arguments.num_processes = torch.cuda.device_count() * (arguments.num_machines or 1)
        if not arguments.num_processes:
            print("rl-lvr: there is no GPU here: say how many processes with --num_processes.", file=sys.stderr)
            return 2
    try:
        launch_command(arguments)
    except ChildFailedError as failed:
        _, first = failed.get_first_failure()
        return first.exitcode if first.exitcode >= 0 else 128 - first.exitcode
    except subprocess.CalledProcessError as failed:
        return failed.returncode if failed.returncode >= 0 else 128 - failed.returncode
    except SignalException as told:
        return 128 + told.sigval
    except ValueError as error:  # accelerate's own checks, each a sentence for the user
        print(f"rl-lvr: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


@contextmanager
def group_ended() -> Iterator[None]:
    """End the process group that was begun inside, on every way out; one that was there before is left alone.

    The threads of a group that outlives the interpreter can abort the process (exit code -6) after its work is done.
    A process that leaves by an exception does not wait for the others, which may never come: their next collective
    operation fails, and the launcher ends them.
    """
    earlier = _group()
    try:
        yield
    except BaseException:
        _end_group(earlier, failed=True)
        raise
    _end_group(earlier, failed=False)


def _group() -> Any:
    """The process group, without importing torch."""
    distributed: Any = sys.modules.get("torch.distributed")
    begun = distributed is not None and distributed.is_available() and distributed.is_initialized()
    return distributed.group.WORLD if begun else None


def _end_group(earlier: Any, *, failed: bool) -> None:
    group = _group()
    if group is None or group is earlier:
        return
    from torch.distributed import destroy_process_group, distributed_c10d, get_backend

    if failed and "nccl" in str(get_backend()):
        distributed_c10d._abort_process_group()  # destroying would wait for the other processes
    else:
        destroy_process_group()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
