"""What vLLM may take of a CPU's memory, and how a start that fails ends."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from rl_lvr.errors import UserError
from rl_lvr.rollout.vllm import memory
from rl_lvr.rollout.vllm.memory import GIB, Demand, fit, free_memory
from rl_lvr.rollout.vllm.starting import one_sentence


@pytest.fixture(autouse=True)
def logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "logs"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    return folder


# ---- memory


def test_the_cache_takes_half_of_what_the_weights_leave_and_no_more_than_is_of_use():
    demand = Demand(weights=4 * GIB, least=GIB, most=100 * GIB, longest=4096)
    assert fit(demand, 25 * GIB) == 10 * GIB
    assert fit(demand, 6 * GIB) == GIB, "one request of full length, though it is all that is left"
    assert fit(Demand(4 * GIB, GIB, 3 * GIB, 4096), 25 * GIB) == 3 * GIB
    with pytest.raises(UserError) as told:
        fit(demand, 6 * GIB - 1)
    assert "about 5.0 GiB for this model's weights and 1.0 GiB of cache for one request of 4096" in str(told.value)
    assert "Lower max_model_len, choose a smaller dtype" in str(told.value)


def group(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(f"{text}\n")


def test_limits_of_control_groups_count_and_their_caches_do_not(tmp_path: Path):
    listing = tmp_path / "listing"
    root = tmp_path / "root"
    listing.write_text("0::/outer/inner\n")
    group(root / "outer", memory__max="1000", memory__current="700", memory__stat="anon 5\ninactive_file 100")
    group(root / "outer" / "inner", memory__max="max", memory__current="600")
    assert list(memory._control_groups(listing, root)) == [(1000, 600)]
    listing.write_text("9:name=systemd:/x\n4:cpu,memory:/job\n")
    old = {"memory__limit_in_bytes": "500", "memory__usage_in_bytes": "80", "memory__stat": "total_inactive_file 30"}
    group(root / "memory" / "job", **old)
    group(root / "memory", memory__limit_in_bytes=str(2**63 - 4096), memory__usage_in_bytes="90")
    assert list(memory._control_groups(listing, root)) == [(500, 50), (2**63 - 4096, 90)]
    listing.unlink()
    assert list(memory._control_groups(listing, root)) == []


def test_free_memory_is_what_the_tightest_limit_leaves(monkeypatch: pytest.MonkeyPatch):
    assert 0 < free_memory() <= psutil.virtual_memory().total
    monkeypatch.setattr(memory, "_control_groups", lambda *places: iter([(1000, 400), (500, 450)]))
    assert free_memory() == 50
    monkeypatch.setattr(memory, "_control_groups", lambda *places: iter([(1000, 1400)]))
    assert free_memory() == 0


# ---- a start that fails


def log_of(told: pytest.ExceptionInfo[UserError]) -> str:
    found = re.search(r" Its log is (/\S+\.log)\.$", str(told.value))
    assert found, told.value
    return Path(found[1]).read_text()


def test_an_error_in_this_process_is_one_sentence_and_its_traceback_is_in_the_log():
    words = r"^vLLM could not start: too little memory\. Its log is"
    with pytest.raises(UserError, match=words) as told, one_sentence(processes=False):
        raise ValueError("too little memory")
    assert "Traceback" in log_of(told)
    with (
        pytest.raises(UserError, match=r"could not start: OSError: the disk is gone\. "),
        one_sentence(processes=False),
    ):
        raise OSError("the disk is gone.")
    with pytest.raises(UserError, match=r"^ours$"), one_sentence(processes=False):
        raise UserError("ours")


WORKER = """
import sys, time
print("loading", flush=True)
if "fails" in sys.argv:
    print("(Worker pid=1) ERROR 01-01 [worker.py:1] WorkerProc failed to start.", file=sys.stderr, flush=True)
    raise ValueError("weights of the wrong shape")
print("ERROR but not a bad one", file=sys.stderr, flush=True)
sys.stdin.read()
print("working", flush=True)
"""


def start(*words: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", WORKER, *words], stdin=subprocess.PIPE, text=True)


def core() -> None:
    start("fails").wait(60)
    raise RuntimeError("Engine core initialization failed. See root cause above. Failed core proc(s): {}")


def test_an_error_in_another_process_is_told_without_its_traceback(capfd: pytest.CaptureFixture):
    words = r"could not start: weights of the wrong shape\. Its log"
    with pytest.raises(UserError, match=words) as told, one_sentence(processes=True):
        core()
    assert capfd.readouterr().err == "loading\n"
    said = log_of(told)
    assert said.count("Traceback") == 2
    assert "WorkerProc failed to start" in said


def test_a_process_that_lives_on_is_heard(capfd: pytest.CaptureFixture, logs: Path):
    with one_sentence(processes=True):
        process = start()
        said = ""
        while "loading" not in said:
            said += capfd.readouterr().err
    print("this one's own", flush=True)
    process.communicate("", timeout=60)
    while "working" not in said:
        said += capfd.readouterr().err
    assert said.split("\n")[:3] == ["loading", "ERROR but not a bad one", "working"]
    assert list(logs.iterdir()) == []
