"""What `transformers.AutoModel.from_pretrained(folder, trust_remote_code=True)` needs without `import rq_hf`."""

import os
from pathlib import Path

FILE = "code_rq.py"


class LoaderFileMixin:
    """For a [`~transformers.PreTrainedConfig`] whose class is in `rq_hf`."""

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs) -> None:
        """See [`~transformers.PreTrainedConfig.save_pretrained`]. Also writes the one line with which
        `AutoModel.from_pretrained(folder, trust_remote_code=True)` works without `import rq_hf`; everyone else needs
        neither the file nor the argument."""
        name = type(self).__name__
        # The import registers the model as well; an entry of its own would make diffusers ask everyone for the
        # argument.
        self.auto_map = {"AutoConfig": f"{Path(FILE).stem}.{name}"}
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        Path(save_directory, FILE).write_text(f"from rq_hf import {name}  # noqa: F401\n", encoding="utf-8")
        super().save_pretrained(save_directory, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Does nothing: [`save_pretrained`] writes what `AutoConfig` needs, in place of the source files."""
