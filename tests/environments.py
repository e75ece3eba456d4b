"""Run the tests with the oldest and with the newest releases of the dependencies.

    python tests/environments.py floors|newest [pytest arguments]

setup.cfg promises that every release from a floor (`name>=X`) on works, but .venv has only those of constraints.txt.
`floors` installs exactly X wherever there is a floor, and `newest` the newest release within the bounds of setup.cfg.
Each has its own environment, .venv-floors or .venv-newest, which is rebuilt when setup.cfg changes; delete the folder
to pick up releases that came out since.
"""

import configparser
import os
import re
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "rq_hf"
EXTRA = "test"


def read_requirements(config: configparser.ConfigParser) -> dict[str, str]:
    """Requirements of the package and its tests: name -> specifier such as `>=5.2,<6`, empty for any release."""
    requirements, texts = {}, config["options"]["install_requires"].splitlines() + [f"{PACKAGE}[{EXTRA}]"]
    while texts:
        text = texts.pop().replace(" ", "")
        if not text:
            continue
        parts = re.fullmatch(r"([\w.-]+)(?:\[([\w,-]+)\])?((?:[<>=!~]=?[\w.*]+,?)*)", text)
        if parts is None:
            raise ValueError(
                f"setup.cfg must name requirements as name, name>=1.2 or name[extra]>=1.2,<2, got {text!r}"
            )
        name, extras, specifier = parts.groups()
        if name != PACKAGE:
            requirements[name] = specifier
            continue
        for extra in extras.split(","):
            if extra not in config["options.extras_require"]:
                raise ValueError(f"{text} must name extras of {list(config['options.extras_require'])}, got {extra!r}")
            texts += config["options.extras_require"][extra].splitlines()
    return requirements


def floors_of(requirements: dict[str, str]) -> list[str]:
    """`name==X` for every `name>=X`."""
    floors = {name: re.search(r">=([^,]+)", specifier) for name, specifier in requirements.items()}
    return sorted(f"{name}=={floor[1]}" for name, floor in floors.items() if floor)


def prepare(kind: str) -> Path:
    """Creates the environment unless it exists for the present setup.cfg, and returns its interpreter."""
    folder = ROOT / f".venv-{kind}"
    python, ready = folder / "bin" / "python", folder / ".ready"
    setup = (ROOT / "setup.cfg").read_text()
    config = configparser.ConfigParser(interpolation=None)
    config.read_string(setup)
    requirements = read_requirements(config)
    if not ready.exists() or ready.read_text() != setup:
        print(f"Setting up {folder.name}: once, a few minutes", flush=True)
        venv.create(folder, clear=True, with_pip=True)
        constraints = folder / "constraints.txt"
        constraints.write_text("\n".join(floors_of(requirements) if kind == "floors" else []) + "\n")
        install = [python, "-m", "pip", "-qq", "--disable-pip-version-check", "install", "-c", constraints]
        subprocess.run([*install, "torch" + requirements["torch"]], check=True)
        subprocess.run([*install, "-e", f"{ROOT}[{EXTRA}]"], check=True)
        ready.write_text(setup)  # last: an environment without it is unfinished
    print_versions(python, requirements)
    return python


def print_versions(python: Path, requirements: dict[str, str]) -> None:
    code = "import sys, importlib.metadata as m; print('python', sys.version.split()[0])\n"
    code += "for name in sys.argv[1:]: print(name, m.version(name))"
    subprocess.run([python, "-c", code, *sorted(requirements, key=str.lower)], check=True)


def main(arguments: list[str]) -> int:
    if not arguments or arguments[0] not in ("floors", "newest"):
        raise ValueError(f"the first argument must be 'floors' or 'newest', got {arguments[:1] or 'none'}")
    python = prepare(arguments[0])
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    return subprocess.run([python, "-m", "pytest", *arguments[1:]], cwd=ROOT, env=env).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
