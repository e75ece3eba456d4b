"""What `transformers.AutoModel.from_pretrained(folder, trust_remote_code=True)` needs without `import rq_hf`."""

import os
from pathlib import Path

FILE = "code_rq.py"


def write_loader(config_class: type, folder: str | os.PathLike) -> dict[str, str]:
    """Writes the one line that imports a configuration, and returns the `auto_map` of its `config.json`. The import
    registers the model as well; an entry of its own would make diffusers ask everyone for the argument."""
    name = config_class.__name__
    Path(folder).mkdir(parents=True, exist_ok=True)
    Path(folder, FILE).write_text(f"from rq_hf import {name}  # noqa: F401\n", encoding="utf-8")
    return {"AutoConfig": f"{Path(FILE).stem}.{name}"}
