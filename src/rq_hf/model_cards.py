"""Model cards: valid Hub metadata, a title, lines that load and use the model, and what else there is to say."""

import os
from collections.abc import Callable
from pathlib import Path

from huggingface_hub import ModelCardData, create_repo, file_exists, get_token, upload_folder
from huggingface_hub.utils import logging

RQVAE_USAGE = """from rq_hf import RQVAEModel

vae = RQVAEModel.from_pretrained(...)
codes = vae.get_codes(pixels)  # (B, 3, height, width) in [-1, 1] -> (B, H, W, D)
pixels = vae.decode_codes(codes).sample"""
CARD = """---
{metadata}
---

# {title}

{introduction}```python
{usage}
```
{details}"""
CARD_FILE = "README.md"

logger = logging.get_logger(__name__)


def pipeline_usage(call: str, model: str = "...", pipeline: str = "RQPipeline") -> str:
    """Python code that loads the pipeline `model`, a Python expression, by its class, and runs `call`."""
    return f"""import rq_hf  # diffusers and transformers then find its classes, too

pipe = rq_hf.{pipeline}.from_pretrained({model})
{call}"""


def model_card(title: str, usage: str, *, introduction: str = "", details: str = "", **metadata) -> str:
    """
    The text of a `README.md`.

    Args:
        usage: Python code that loads and uses the model.
        introduction: Markdown above the code.
        details: Markdown below the code.
        metadata: fields of [`~huggingface_hub.ModelCardData`], such as `pipeline_tag`, `tags` and `license`.
    """
    return CARD.format(
        metadata=ModelCardData(library_name="rq_hf", **metadata).to_yaml(),
        title=title,
        introduction=f"{introduction}\n\n" if introduction else "",
        usage=usage,
        details=f"\n{details}\n" if details else "",
    )


def upload_with_card(
    folder: str | os.PathLike,
    repo_id: str,
    card: Callable[[str], str],
    *,
    subfolder: str | None = None,
    private: bool | None = None,
    token: str | None = None,
    **kwargs,
) -> str:
    """
    Uploads a folder to the Hub, with its `README.md` or else `card(repo_id)`, unless the repository has a card: that
    is kept.

    Args:
        repo_id: `user/name`, or a name of one's own; made if it does not exist.
        kwargs: those of [`~huggingface_hub.upload_folder`].

    Returns the address of the commit. Raises `ValueError` without a token.
    """
    if token is None and get_token() is None:
        raise ValueError("publishing needs a token of the Hub: run `hf auth login`, set HF_TOKEN, or pass token=")
    repo_id = create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
    has_card = file_exists(repo_id, CARD_FILE, token=token)
    path = Path(folder, CARD_FILE)
    if has_card and path.exists():
        logger.warning(f"{repo_id} keeps its model card; {path} is not uploaded")
    elif not (has_card or path.exists() or subfolder):
        path.write_text(card(repo_id), encoding="utf-8")
    return upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        path_in_repo=subfolder,
        token=token,
        ignore_patterns=CARD_FILE if has_card else None,
        **kwargs,
    )
