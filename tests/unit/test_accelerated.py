"""`--accelerate_config`: which words the launcher gets, what is refused, and which exit code comes back."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from rl_lvr.accelerated import ALL_GPUS, CONFIGS, launch_words
from rl_lvr.errors import UserError

NAMES = ("ddp", "zero2", "zero3", "zero3_offload")


def test_the_flag_is_taken_out_and_all_others_stay() -> None:
    given = ["--config", "my.yaml", "--accelerate-config=zero3", "--num_processes", "2", "--rewards", "a", "b"]
    assert launch_words("grpo", given) == [
        *("--config_file", str(CONFIGS / "zero3.yaml"), "--num_processes", "2"),
        *("-m", "rl_lvr.cli", "grpo", "--config", "my.yaml", "--rewards", "a", "b"),
    ]
    assert launch_words("grpo", ["--config", "my.yaml"]) is None


def test_a_file_of_ones_own_says_how_many_processes(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text((CONFIGS / "ddp.yaml").read_text())
    words = launch_words("sft", ["--accelerate_config", str(file)])
    assert words == ["--config_file", str(file), "-m", "rl_lvr.cli", "sft"]
    assert ALL_GPUS in launch_words("sft", ["--accelerate_config", "ddp"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--accelerate_config", "zero4"], "no accelerate config 'zero4'; there are ddp, zero2, zero3, zero3_offload"),
        (["--accelerate_config", "no/such.yaml"], "no accelerate config at no/such.yaml"),
        (["--accelerate_config"], "--accelerate_config needs a value"),
        (["--num_processes", "2"], "--num_processes goes with --accelerate_config"),
        (["--accelerate_config=ddp", "--accelerate-config", "zero2"], "--accelerate_config is given twice"),
    ],
)
def test_mistakes_are_refused(words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        launch_words("grpo", words)


@pytest.mark.parametrize("name", NAMES)
def test_accelerate_reads_the_configs(name: str) -> None:
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    arguments = launch_command_parser().parse_args(["--config_file", str(CONFIGS / f"{name}.yaml"), "-m", "x"])
    arguments, config, _ = _validate_launch_command(arguments)
    assert arguments.num_processes == config.num_processes == 8
    assert arguments.use_deepspeed is (name != "ddp")
    assert arguments.multi_gpu is (name == "ddp")
    if name != "ddp":
        # What is said here would win over the recipe.
        assert not {"gradient_accumulation_steps", "gradient_clipping"} & config.deepspeed_config.keys()
        assert arguments.zero_stage == (2 if name == "zero2" else 3)
    if name.startswith("zero3"):
        assert config.deepspeed_config["zero3_save_16bit_model"] is True
    assert "mixed_precision" not in yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())


def test_the_configs_are_all_tested() -> None:
    assert sorted(path.stem for path in CONFIGS.iterdir()) == sorted(NAMES)


def test_the_process_that_relaunches_has_not_imported_torch() -> None:
    code = (
        "import os, sys\n"
        "os.execv = lambda file, words: (print('torch' in sys.modules, *words[1:3]), sys.exit(5))\n"
        "from rl_lvr.cli import main\n"
        "main(['grpo', '--accelerate_config', 'zero3', '--config', 'my.yaml'])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.split()) == (5, ["False", "-m", "rl_lvr.accelerated"]), done.stderr


@pytest.mark.parametrize(
    ("ending", "code"), [("sys.exit(0)", 0), ("sys.exit(7)", 7), ("os.kill(os.getpid(), 15)", 143)]
)
def test_the_exit_code_is_that_of_the_processes(tmp_path: Path, ending: str, code: int) -> None:
    script = tmp_path / "script.py"
    said = "' '.join(['rank', os.environ['RANK'], *sys.argv[1:]]) + os.linesep"
    script.write_text(f"import os, sys\nos.write(1, ({said}).encode())\n{ending}\n")  # at once: they share a pipe
    words = ["--config_file", str(CONFIGS / "ddp.yaml"), "--num_processes", "2", str(script), "--x", "1"]
    done = subprocess.run([sys.executable, "-m", "rl_lvr.accelerated", *words], capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    if code == 0:
        assert sorted(done.stdout.splitlines()) == ["rank 0 --x 1", "rank 1 --x 1"]
