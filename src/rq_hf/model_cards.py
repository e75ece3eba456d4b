"""Model cards, and uploads of saved folders to the Hub with their cards."""

import functools
import os
import platform
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import (
    ModelCardData,
    auth_check,
    create_branch,
    create_repo,
    file_exists,
    get_token,
    upload_folder,
)
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import logging

CARD = """---
{metadata}
---

# {title}

{introduction}```python
{usage}
```
{details}"""
CARD_FILE = "README.md"
CODE_FILE = "rq_hf_code.py"
LIBRARIES = ("rq_hf", "torch", "diffusers", "transformers", "huggingface_hub", "numpy")
RQ_CITATION = """@inproceedings{lee2022autoregressive,
  title = {Autoregressive Image Generation using Residual Quantization},
  author = {Lee, Doyup and Kim, Chiheon and Kim, Saehoon and Cho, Minsu and Han, Wook-Shin},
  booktitle = {Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition (CVPR)},
  year = {2022},
  url = {https://arxiv.org/abs/2203.01941}
}"""
MAR_CITATION = """@inproceedings{li2024autoregressive,
  title = {Autoregressive Image Generation without Vector Quantization},
  author = {Li, Tianhong and Tian, Yonglong and Li, He and Deng, Mingyang and He, Kaiming},
  booktitle = {Advances in Neural Information Processing Systems (NeurIPS)},
  year = {2024},
  url = {https://arxiv.org/abs/2406.11838}
}"""
LOGIN = "run `hf auth login`, or set HF_TOKEN, with a token that may write to it"
WITHOUT_THE_PACKAGE = """## Without rq_hf

The code of rq_hf {version} comes with these files. This runs it where rq_hf is not installed, but torch, diffusers and
transformers are; then the code above works. As with `trust_remote_code`, it is downloaded code: look at it first.

```python
import sys
from huggingface_hub import snapshot_download

sys.path.append(snapshot_download({repo}))
from rq_hf_code import rq_hf
```"""

logger = logging.get_logger(__name__)


def pipeline_usage(call: str, model: str, pipeline: str = "RQPipeline") -> str:
    """Python code that loads the pipeline `model`, a folder or a Hub id, by its class, and runs `call`."""
    needed = "import torch\n" if "torch." in call else ""
    return f"""{needed}import rq_hf  # diffusers and transformers then find its classes, too

pipe = rq_hf.{pipeline}.from_pretrained({quoted(model)})
{call}"""


def quoted(text: str) -> str:
    """A Python string in double quotes, where that needs no escapes."""
    return repr(text) if '"' in text or "\\" in text or not text.isprintable() else f'"{text}"'


def find_versions() -> dict[str, str]:
    """Releases of Python, this package and the libraries it builds on, by name."""
    return {"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}}


def model_card(
    title: str,
    usage: str,
    *,
    about: str = "",
    introduction: str = "",
    details: str = "",
    citation: str = "",
    **metadata,
) -> str:
    """
    The text of a `README.md`, which ends with the versions in use.

    Args:
        usage: Python code that loads and uses the model.
        about: what it is, in a sentence or two.
        introduction: further Markdown above the code.
        details: Markdown below the code.
        citation: BibTeX of the method.
        metadata: fields of [`~huggingface_hub.ModelCardData`], such as `pipeline_tag`, `tags` and `license`.
    """
    versions = ", ".join(f"{name} {number}" for name, number in find_versions().items())
    sections = [details, f"## Versions\n\n{versions}"]
    if citation:
        sections.append(f"## Citation\n\n```bibtex\n{citation}\n```")
    return CARD.format(
        metadata=ModelCardData(library_name="rq_hf", **metadata).to_yaml(),
        title=title,
        introduction="".join(f"{text}\n\n" for text in (about, introduction) if text),
        usage=usage,
        details="".join(f"\n{section}\n" for section in sections if section),
    )


class HubMixin:
    """Publishing of what has `save_pretrained`, with a card of its own."""

    def card(self, model: str, **sections) -> str:
        """
        The model card.

        Args:
            model: folder or Hub id that its code loads.
            sections: further arguments of [`model_card`].
        """
        raise NotImplementedError

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool = False,
        revision: str | None = None,
        subfolder: str | None = None,
        **kwargs,
    ) -> str:
        """
        Publishes this in one commit, with a model card unless the repository has one.

        Args:
            repo_id: `user/name`, or a name of one's own; made if it does not exist.
            revision: branch to upload to, made if it does not exist (default: the main one).
            subfolder: where in the repository.
            kwargs: those of `save_pretrained`; `with_code=True` adds the code of this package, for people without it.

        Returns the address of the commit. Raises `ValueError` and `ConnectionError` like [`upload_with_card`].
        """
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder, **kwargs)
            return upload_with_card(
                folder,
                repo_id,
                self.card,
                subfolder=subfolder,
                private=private,
                token=token,
                revision=revision,
                commit_message=commit_message,
                create_pr=create_pr,
            )


def with_card(save_pretrained: Callable) -> Callable:
    """
    The `save_pretrained` of a [`HubMixin`], with its signature, which diffusers looks at. With `push_to_hub`, the
    repository `repo_id` (default: the name of the folder) gets a model card unless it has one: that of the folder, or
    a new one. `token`, `private`, `create_pr`, `commit_message` and `revision` are those of [`HubMixin.push_to_hub`].
    """

    @functools.wraps(save_pretrained)
    def wrapper(self, save_directory, *args, push_to_hub=False, **kwargs):
        if not push_to_hub:
            return save_pretrained(self, save_directory, *args, **kwargs)
        names = ("token", "private", "create_pr", "commit_message", "revision")
        hub = {name: kwargs.pop(name) for name in names if name in kwargs}
        repo_id = kwargs.pop("repo_id", Path(save_directory).name)
        saved = save_pretrained(self, save_directory, *args, **kwargs)
        upload_with_card(save_directory, repo_id, self.card, **hub)
        return saved

    return wrapper


def open_repository(
    repo_id: str, *, private: bool | None = None, token: str | None = None, create_pr: bool = False
) -> str:
    """
    Creates a repository on the Hub, unless there is one, and makes sure that the token may write to it or, with
    `create_pr`, read it.

    Returns its name with that of its owner. Raises `ValueError` that says what to do otherwise.
    """
    if token is None and get_token() is None:
        reason = f"there is no token: {LOGIN}"
    else:
        try:
            repo_id = create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
            auth_check(repo_id, token=token, write=not create_pr)
            return repo_id
        except OfflineModeIsEnabled:
            reason = "HF_HUB_OFFLINE is set: unset it"
        except HFValidationError as error:
            reason = f"{first_line(error)}: take a name such as user/model"
        except HfHubHTTPError as error:
            reason = f"{first_line(error)}: {LOGIN}"
            if error.response.status_code == 403:
                reason += ", or take a name of your own if it belongs to somebody else"
        except Exception as error:
            reason = f"the Hub cannot be reached, {type(error).__name__}: {first_line(error)}"
    raise ValueError(f"cannot write to {repo_id} ({reason})")


def upload_with_card(
    folder: str | os.PathLike,
    repo_id: str,
    card: Callable[..., str],
    *,
    subfolder: str | None = None,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
) -> str:
    """
    Uploads a folder to the Hub in one commit, with its `README.md` or else `card(repo_id, **sections)`, unless the
    repository has a card: that is kept. `sections`, arguments of [`model_card`], are what only the folder knows. See
    [`HubMixin.push_to_hub`] for the other arguments.

    Returns the address of the commit. Raises `ValueError` where the token may not write, see [`open_repository`], and
    `ConnectionError` where the upload fails; the repository is as it was before then.
    """
    repo_id = open_repository(repo_id, private=private, token=token, create_pr=create_pr)
    path = Path(folder, CARD_FILE)
    sections = {}
    if Path(folder, CODE_FILE).exists():
        sections["details"] = WITHOUT_THE_PACKAGE.format(version=version("rq_hf"), repo=quoted(repo_id))
    new_card = None if path.exists() or subfolder else card(repo_id, **sections)
    try:
        if revision is not None:
            create_branch(repo_id, branch=revision, token=token, exist_ok=True)
        has_card = file_exists(repo_id, CARD_FILE, revision=revision, token=token)
        if has_card and path.exists():
            logger.warning(f"{repo_id} keeps its model card; {path} is not uploaded")
        elif new_card is not None and not has_card:
            path.write_text(new_card, encoding="utf-8")
        return upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            path_in_repo=subfolder,
            token=token,
            revision=revision,
            create_pr=create_pr,
            commit_message=commit_message,
            ignore_patterns=CARD_FILE if has_card else None,
        )
    except Exception as error:  # also those of the HTTP library
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise ConnectionError(f"the upload failed ({reason}): {repo_id} is as it was before; try again") from error


def first_line(error: Exception) -> str:
    """What an error says, or its kind where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
