"""Entry of `make setup`: finds a Python that is new enough, then hands over to environment.py.

Kept to the syntax of Python 3.6: an old python3 has to say what is missing, not to die of a SyntaxError.
"""

import os
import shutil
import subprocess
import sys

OLDEST = (3, 11)
NEWEST = (3, 14)  # vLLM 0.31 asks for less than 3.15


def suits(version):
    return OLDEST <= tuple(version[:2]) <= NEWEST


def other_python():
    """A suitable python3.x beside the one that was started: asked, as a name on PATH may lead nowhere."""
    for minor in range(OLDEST[1], NEWEST[1] + 1):
        path = shutil.which("python3.%d" % minor)
        if path is None:
            continue
        answer = subprocess.run(
            [path, "-c", "import ensurepip, venv"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        if answer.returncode == 0:
            return path
    return None


def main():
    here = os.path.dirname(os.path.abspath(__file__))
    work = [os.path.join(here, "environment.py"), *sys.argv[1:]]
    if not suits(sys.version_info):
        python = other_python()
        if python is None:
            sys.exit(
                "make setup: Python 3.11 to 3.14 is needed, and %s is %d.%d: install python3.11 "
                "(with its venv module) and run `make PYTHON=python3.11 setup`."
                % ((sys.executable, *tuple(sys.version_info[:2])))
            )
        os.execv(python, [python, *work])
    if sys.prefix != sys.base_prefix:
        # Started from inside a virtual environment, perhaps from the one that is about to be rebuilt.
        base = getattr(sys, "_base_executable", None)
        if base and os.path.exists(base):
            os.execv(base, [base, *work])
    sys.path.insert(0, here)
    import environment

    sys.exit(environment.main(sys.argv[1:]))


if __name__ == "__main__":
    main()
