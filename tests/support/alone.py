"""Runs code where the libraries are installed, but `rq_hf` is not."""

import os
import subprocess
import sys
from pathlib import Path

CHECK = "import importlib.util\nassert importlib.util.find_spec('rq_hf') is None\n"


def run_alone(folder, code, *arguments):
    """
    What `code` prints in a fresh process, which begins in `folder` and keeps its temporary files there. It finds the
    libraries of this process by their folders, without the .pth files by which a checkout of `rq_hf` is installed, and
    without the code that this process has loaded from folders.
    """
    unwanted = ("", os.environ["HF_MODULES_CACHE"])
    libraries = [path for path in sys.path if path not in unwanted and not Path(path, "rq_hf").exists()]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(libraries), "TMPDIR": str(folder)}
    environment["HF_MODULES_CACHE"] = str(folder / "modules")
    child = subprocess.run(
        [sys.executable, "-S", "-c", CHECK + code, *map(str, arguments)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert child.returncode == 0, child.stderr
    return child.stdout.splitlines()
