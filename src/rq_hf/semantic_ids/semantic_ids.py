"""Semantic IDs: items and their codes, beside the model that the codes are of.

After Rajput et al., "Recommender Systems with Generative Retrieval", NeurIPS 2023 (TIGER), section 3.1, and Zheng et
al., "Adapting Large Language Models by Integrating Collaborative Semantics for Recommendation", ICDE 2024 (LC-Rec).

Shapes: `N` items, `D` levels of the model, `L` codes of an ID: D, or D + 1 with a suffix. Level d has `K_d` codes.
"""

import math
import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from huggingface_hub import snapshot_download
from transformers import PreTrainedTokenizerBase

from ..argument_checks import (
    LARGEST_SIZE,
    as_plain,
    check_choice,
    check_floating,
    check_instance,
    check_int64,
    check_integer,
    check_items,
    check_range,
    check_source,
    is_integer,
)
from ..model_cards import HubMixin, model_card, quoted, with_card
from ..models import RQEmbeddingModel
from ..models.rq_embedding.modeling_rq_embedding import check_vectors
from .free_ids import FreeIds
from .prefix_tree import PrefixTree
from .report import (
    CHUNK,
    SemanticIdReport,
    duplicate_rates,
    group_vectors,
    relative_error,
    squared_deviations,
    usage_and_perplexity,
)
from .table_files import DESCRIPTION_FILE, TABLE_FILE, model_fingerprint, read_description, read_table, write_table
from .tokens import constraint, level_templates, level_tokens, token_ids_of

METHODS = ("suffix", "next_nearest", "keep")
CITATION = """@inproceedings{rajput2023recommender,
  title = {Recommender Systems with Generative Retrieval},
  author = {Rajput, Shashank and Mehta, Nikhil and Singh, Anima and Keshavan, Raghunandan H. and Vu, Trung and Heldt,
    Lukasz and Hong, Lichan and Tay, Yi and Tran, Vinh Q. and Samost, Jonah and Kula, Maciej and Chi, Ed H. and
    Sathiamoorthy, Maheswaran},
  booktitle = {Advances in Neural Information Processing Systems (NeurIPS)},
  year = {2023},
  url = {https://arxiv.org/abs/2305.05065}
}"""


class SemanticIds(HubMixin):
    r"""
    The IDs of items: which codes each item has, and which items have given codes.

    Args:
        model ([`RQEmbeddingModel`]): whose codes they are.
        items (list of `str` or of `int`): names of N items, all different.
        codes (`torch.Tensor` of shape `(N, L)`, int64): their IDs; L is D, or D + 1 with a suffix.

    Attributes: these three, with `codes` on the CPU, and `sizes`, the tuple (K_1, ..., K_L); that of a suffix is the
    number of suffixes.

    Raises:
        `ValueError`: items twice; codes of another shape or out of range.
        `TypeError`: items that are neither all strings nor all integers; codes that are not int64.

    Example:

    ```python
    >>> import torch
    >>> from rq_hf import RQEmbeddingModel, SemanticIds
    >>> vectors = torch.randn(1000, 16)
    >>> model = RQEmbeddingModel(16, hidden_dims=(), codebook_size=32, depth=3).fit(vectors)
    >>> ids, damage = SemanticIds.encode(model, list(range(1000)), vectors).resolve("suffix")
    >>> print(ids.report(vectors))
    >>> ids.save_pretrained("ids")
    ```
    """

    def __init__(self, model: RQEmbeddingModel, items: Sequence[str] | Sequence[int], codes: torch.Tensor):
        check_instance("model", model, RQEmbeddingModel)
        self.model = model
        self.items = checked_items(items)
        depth = model.config.depth
        check_int64("codes", codes, len(self.items), "L")
        if codes.shape[1] not in (depth, depth + 1):
            raise ValueError(f"codes must have {depth} levels, or {depth + 1} with a suffix, got {codes.shape[1]}")
        self.sizes = tuple(model.codebook_sizes)
        if codes.shape[1] > depth:
            check_range("suffixes", codes[:, depth], len(self.items))
            self.sizes += (int(codes[:, depth].max()) + 1,)
        for d, size in enumerate(self.sizes):
            check_range(f"codes of level {d + 1}", codes[:, d], size)
        self.codes = codes.detach().cpu().clone(memory_format=torch.contiguous_format)
        self._tree = PrefixTree(self.codes.numpy(), self.sizes)

    @classmethod
    def encode(
        cls,
        model: RQEmbeddingModel,
        items: Sequence[str] | Sequence[int],
        vectors: torch.Tensor,
        beam_size: int = 1,
        balanced: bool = False,
    ) -> "SemanticIds":
        """
        The IDs of items by their vectors `(N, input_dim)`; see [`RQEmbeddingModel.encode`] for the other arguments,
        and [`resolve`] for items that get the same ID.
        """
        check_instance("model", model, RQEmbeddingModel)
        items = checked_items(items)
        check_floating("vectors", vectors, len(items), model.config.input_dim)
        return cls(model, items, model.encode(vectors.to(model.device), beam_size=beam_size, balanced=balanced))

    def __len__(self) -> int:
        return len(self.items)

    def __repr__(self) -> str:
        return f"SemanticIds({len(self):,} items, codes of {'×'.join(map(str, self.sizes))})"

    @cached_property
    def _rows(self) -> dict[str | int, int]:
        return {item: row for row, item in enumerate(self.items)}

    def codes_of(self, item: str | int) -> tuple[int, ...]:
        """The ID of an item. Raises `ValueError` for anything else."""
        item = as_plain(item)
        if not isinstance(item, str | int) or item not in self._rows:
            raise ValueError(f"there is no item {item!r:.80}")
        return tuple(self.codes[self._rows[item]].tolist())

    def items_of(self, codes: Sequence[int]) -> list[str] | list[int]:
        """The items with an ID, or with IDs that begin with these codes, in the order of their IDs. Raises
        `ValueError` where there are none, `TypeError` for codes that are not integers."""
        return [self.items[row] for row in self._tree.rows(self._checked_prefix(codes))]

    def allowed_next(self, prefix: Sequence[int]) -> list[int]:
        """
        The codes that can follow the first codes of an ID, ascending: none after a whole ID, all first codes after
        `[]`. Takes microseconds, however many items there are.

        Raises `ValueError` where no ID begins with these codes, `TypeError` for codes that are not integers.
        """
        return self._tree.next_codes(self._checked_prefix(prefix)).tolist()

    def _checked_prefix(self, codes: Sequence[int]) -> tuple[int, ...]:
        codes = as_plain(codes)
        check_items("codes", codes)
        if not all(map(is_integer, codes)):
            raise TypeError(f"codes must be integers, got {codes!r:.80}")
        if self._tree.find(codes) is None:
            raise ValueError(f"no ID begins with the codes {codes!s:.80}")
        return tuple(codes)

    def tokens(self, template: str | Sequence[str] = "<a_{}>") -> list[str]:
        """
        The tokens of all codes of all levels, K_1 + ... + K_L, for `tokenizer.add_tokens`.

        Args:
            template: of a token. The code stands for `{}`, and the letter a becomes b, c, ... at the further levels:
                `<a_12><b_7><c_0>`, as in LC-Rec. Or a list of one template per level.

        Raises `ValueError` for templates by which two codes have the same token.
        """
        return [token for level in level_tokens(template, self.sizes) for token in level]

    def text(self, item: str | int, template: str | Sequence[str] = "<a_{}>") -> str:
        """The ID of an item as text, such as `<a_12><b_7><c_0>`; see [`tokens`]."""
        templates = level_templates(template, len(self.sizes))
        return "".join(level.replace("{}", str(code)) for level, code in zip(templates, self.codes_of(item)))

    def parse(self, text: str, template: str | Sequence[str] = "<a_{}>") -> tuple[int, ...]:
        """
        The codes of an ID that is written as in [`text`]. Spaces around its tokens are ignored, since tokenizers put
        some there. It need not be the ID of an item, see [`items_of`]. Raises `ValueError` for any other text.
        """
        check_instance("text", text, str)
        templates = level_templates(template, len(self.sizes))
        patterns = [re.escape(level).replace(re.escape("{}"), "(0|[1-9][0-9]*)") for level in templates]
        match = re.fullmatch(r"\s*".join(patterns), text.strip())
        codes = tuple(map(int, match.groups())) if match else ()
        if not match or any(code >= size for code, size in zip(codes, self.sizes)):
            raise ValueError(f"text must be an ID such as {self.text(self.items[0], template)}, got {text!r:.200}")
        return codes

    def prefix_allowed_tokens_fn(
        self, tokenizer: PreTrainedTokenizerBase, start: int, template: str | Sequence[str] = "<a_{}>"
    ) -> Callable[[int, torch.Tensor], list[int]]:
        """
        Makes `generate` of transformers give IDs of items and nothing else: `model.generate(...,
        prefix_allowed_tokens_fn=ids.prefix_allowed_tokens_fn(tokenizer, start), max_new_tokens=len(ids.sizes) + 1)`,
        where the last token is the end of the sequence. With more beams than items, beam search gives items more than
        once, and beam sampling (`do_sample=True`) can fail as its beams run out of IDs.

        Args:
            tokenizer: has the [`tokens`], by `tokenizer.add_tokens(ids.tokens())`.
            start: number of tokens before the ID. 1 for an encoder and decoder, whose decoder starts with one token;
                the length of the prompt, padding included, for a decoder alone.

        Raises `ValueError` for a tokenizer that lacks an end of the sequence or has not each code as one token. So
        does the function for tokens that no ID begins with, such as those of a prompt after `start`.
        """
        check_instance("tokenizer", tokenizer, PreTrainedTokenizerBase)
        check_integer("start", start, 0, LARGEST_SIZE)
        if tokenizer.eos_token_id is None:
            raise ValueError("the tokenizer needs an end of the sequence, got one whose eos_token is None")
        token_ids = [token_ids_of(tokenizer, level) for level in level_tokens(template, self.sizes)]
        return constraint(self._tree, token_ids, tokenizer.eos_token_id, start)

    def report(self, vectors: torch.Tensor | None = None) -> SemanticIdReport:
        """
        Figures about the IDs, in a dictionary that prints as a table:

        * `items`; `unique`, the number of different IDs; `largest_group`, the most items with one ID; `sizes`;
        * `usage` and `perplexity`: of each level, the share of its codes that occur, in [0, 1], and exp of their
          entropy, in [1, K_d];
        * `distinct_prefixes` and `collision_rate`: of the first 1, ..., L codes, how many there are, and the share of
          items that have them in common with another item;
        * with vectors, `duplicate_rate`: the share of items with the very vector of another one;
          `collision_rate_of_different_vectors`: the share of items with the ID of one that has another vector;
          `relative_error`: of the reconstructions x̂ from the first 1, ..., D codes, Σ‖x − x̂‖² / Σ‖x − mean‖²,
          `None` if all vectors are equal.

        Args:
            vectors (`torch.Tensor` of shape `(N, input_dim)`, *optional*): those of the items.

        Raises `ValueError` or `TypeError` for vectors of another shape or type, and NaN or infinite ones.
        """
        levels = self._tree.levels
        usage, perplexity = zip(*map(usage_and_perplexity, self.codes.t().numpy(), self.sizes))
        report = SemanticIdReport(
            items=len(self),
            unique=len(levels[-1].keys),
            largest_group=int(levels[-1].counts.max()),
            sizes=list(self.sizes),
            usage=list(usage),
            perplexity=list(perplexity),
            distinct_prefixes=[len(level.keys) for level in levels],
            collision_rate=[level.collision_rate for level in levels],
        )
        if vectors is not None:
            self._check_vectors(vectors)
            rates = duplicate_rates(group_vectors(vectors), self._tree.ranks())
            report["duplicate_rate"], report["collision_rate_of_different_vectors"] = rates
            deviations, depths = squared_deviations(vectors), range(1, self.model.config.depth + 1)
            errors = [self._squared_errors(vectors, depth) for depth in depths]
            report["relative_error"] = [relative_error(error, deviations) for error in errors]
        return report

    def resolve(self, method: str, vectors: torch.Tensor | None = None) -> tuple["SemanticIds", dict]:
        """
        What to do about items with the same ID.

        Args:
            method: `"suffix"` appends a level that numbers the items of each ID from 0, in their order (TIGER, section
                3.1); all items get it, also those with an ID of their own.
                `"next_nearest"` leaves an ID to its first item and gives the others, in their order, IDs that no item
                has: with the nearest last code that is free; if none is, with the nearest last two codes, and so on.
                Two and more codes are searched one after the other from the nearest on, so that their sum is near but
                need not be the nearest.
                `"keep"` changes nothing.
            vectors (`torch.Tensor` of shape `(N, input_dim)`): those of the items, which `"next_nearest"` needs.

        Returns the new IDs, and the damage, a dictionary: `method`; `collision_rate` [before, after]; `items_changed`,
        the number of items whose D codes are others; `suffix_size`, the number of suffixes, 0 without; with vectors
        `relative_error` [before, after] as in [`report`], and `relative_error_of_changed`, that of the changed items
        alone (`None` without any).

        Raises `ValueError` for IDs that have a suffix, except to keep them; without vectors that are needed; and if
        there are fewer IDs than items.
        """
        check_choice("method", method, METHODS)
        depth = self.model.config.depth
        if vectors is not None:
            self._check_vectors(vectors)
        if method != "keep" and len(self.sizes) > depth:
            raise ValueError("these IDs have a suffix already")
        if method == "suffix":
            suffixes = torch.from_numpy(self._tree.numbers())
            resolved = SemanticIds(self.model, self.items, torch.cat([self.codes, suffixes[:, None]], dim=1))
        elif method == "next_nearest":
            if vectors is None:
                raise ValueError("next_nearest needs the vectors of the items, got None")
            resolved = SemanticIds(self.model, self.items, self._spread_codes(vectors))
        else:
            resolved = self

        changed = (resolved.codes[:, :depth] != self.codes[:, :depth]).any(dim=1)
        damage = {
            "method": method,
            "collision_rate": [ids._tree.levels[-1].collision_rate for ids in (self, resolved)],
            "items_changed": int(changed.sum()),
            "suffix_size": sum(resolved.sizes[depth:]),
        }
        if vectors is not None:
            deviations = squared_deviations(vectors)
            errors = [ids._squared_errors(vectors, depth) for ids in (self, resolved)]
            damage["relative_error"] = [relative_error(error, deviations) for error in errors]
            damage["relative_error_of_changed"] = [
                relative_error(error[changed], deviations[changed]) for error in errors
            ]
        return resolved, damage

    @torch.no_grad()
    def _spread_codes(self, vectors: torch.Tensor) -> torch.Tensor:
        """The codes `(N, D)` of `resolve("next_nearest")`."""
        if math.prod(self.sizes) < len(self):
            raise ValueError(f"{len(self):,} items need more than {math.prod(self.sizes):,} IDs: resolve by a suffix")
        codes, rows = self.codes.clone(), torch.from_numpy(self._tree.numbers()).nonzero()[:, 0]
        codebooks = [self.model.quantizer.codebook_at(d).double().cpu().numpy() for d in range(len(self.sizes))]
        free_ids = FreeIds(self._tree, codebooks)
        for chunk in rows.split(CHUNK) if len(rows) else ():
            latents = self.model.to_latents(vectors[chunk].to(self.model.device, torch.float64))  # as for the codes
            for row, latent in zip(chunk, latents.cpu().numpy()):
                codes[row] = torch.tensor(free_ids.take_nearest(tuple(codes[row].tolist()), latent))
        return codes

    def _squared_errors(self, vectors: torch.Tensor, depth: int) -> torch.Tensor:
        """‖x − x̂‖² `(N,)` of vectors that are reconstructed from the first `depth` codes of their items, in
        float64."""
        chunks = zip(vectors.split(CHUNK), self.codes[:, :depth].split(CHUNK))
        decoded = ((part.cpu(), self.model.decode(codes.to(self.model.device)).cpu()) for part, codes in chunks)
        return torch.cat([(part.double() - sample).square().sum(dim=1) for part, sample in decoded])

    def _check_vectors(self, vectors: torch.Tensor) -> None:
        check_vectors(vectors, self.model.config.input_dim, len(self))

    @with_card
    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs) -> None:
        """
        Writes the files of the model; `semantic_ids.parquet`, with the columns `item`, `code_0`, `code_1`, ... and,
        where there is one, `suffix`; and `semantic_ids.json`, with the sizes of the levels and checksums, by which
        files of other IDs are noticed. Files that were there are replaced when all new ones are complete.

        `kwargs` are those of [`RQEmbeddingModel.save_pretrained`]; for `push_to_hub`, see [`with_card`].
        """
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix="unfinished-", dir=folder) as unfinished:
            self.model.save_pretrained(unfinished, **kwargs)
            write_table(Path(unfinished), self.items, self.codes, self.sizes, self.model)
            for name in os.listdir(unfinished):
                os.replace(Path(unfinished, name), folder / name)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike,
        *,
        subfolder: str | None = None,
        revision: str | None = None,
        token: str | None = None,
        cache_dir: str | os.PathLike | None = None,
        local_files_only: bool = False,
        **kwargs,
    ) -> "SemanticIds":
        """
        The IDs and their model from a folder or from the Hub.

        Args:
            name_or_path: a folder of [`save_pretrained`], or `user/name` on the Hub.
            subfolder: where in the folder or repository.
            revision, token, cache_dir, local_files_only: see [`~huggingface_hub.snapshot_download`].
            kwargs: further arguments of [`RQEmbeddingModel.from_pretrained`], such as `variant`.

        Raises:
            `FileNotFoundError`: there is no such folder, or it holds no semantic IDs.
            `ValueError`: damaged files, files of another format, a table of impossible items or codes, and weights
                that are not those of the codes.
        """
        check_source("semantic IDs", name_or_path)
        folder = Path(name_or_path)
        if not folder.is_dir():
            names = (DESCRIPTION_FILE, TABLE_FILE, "config.json", "diffusion_pytorch_model*")
            folder = Path(
                snapshot_download(
                    os.fspath(name_or_path),
                    allow_patterns=[f"{subfolder}/{name}" if subfolder else name for name in names],
                    revision=revision,
                    token=token,
                    cache_dir=cache_dir,
                    local_files_only=local_files_only,
                )
            )
        folder = folder / (subfolder or "")
        description = read_description(folder)
        model = RQEmbeddingModel.from_pretrained(folder, **kwargs)
        if model_fingerprint(model) != description["model_sha256"]:
            raise ValueError(
                f"the weights in {folder} are not those that its IDs are of, or are in another precision: encode the "
                "items again"
            )
        items, codes = read_table(folder, model.config.depth, description["table_sha256"])
        try:
            ids = cls(model, items, codes)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{folder / TABLE_FILE} holds no possible IDs: {error}") from error
        if (len(ids), list(ids.sizes)) != (description["items"], description["sizes"]):
            raise ValueError(
                f"{folder / TABLE_FILE} has {len(ids)} items and levels of {list(ids.sizes)}, but {DESCRIPTION_FILE} "
                f"says {description['items']!s:.80} and {description['sizes']!s:.80}"
            )
        return ids

    def card(self, model: str, **sections) -> str:
        """See [`HubMixin.card`]; with the [`report`]."""
        config, levels = self.model.config, len(self.sizes)
        usage = f"""from rq_hf import SemanticIds

ids = SemanticIds.from_pretrained({quoted(model)})
item = ids.items[0]
codes = ids.codes_of(item)  # {levels} of them
text = ids.text(item)  # {self.text(self.items[0])}
items = ids.items_of(codes)
second_codes = ids.allowed_next(codes[:1])
vectors = ids.model.decode(ids.codes[:, :{config.depth}])  # ({len(self)}, {config.input_dim})"""
        report = f"## Report\n\n{self.report()}\n\n`{TABLE_FILE}` has the IDs alone, with one column per level."
        own = {
            "about": "Semantic IDs of items: the codes of their embedding vectors, coarse to fine, and the model that "
            "encodes further vectors.",
            "tags": ["semantic-ids", "residual-quantization", "generative-retrieval"],
            "citation": CITATION,
        }
        sections["details"] = "\n\n".join(filter(None, (report, sections.get("details"))))
        return model_card(f"Semantic IDs of {len(self):,} items", usage, **own | sections)


def checked_items(items: Sequence[str] | Sequence[int]) -> list[str] | list[int]:
    """The items as a list. Raises `TypeError` unless all are strings or all integers, `ValueError` unless they
    differ."""
    items = as_plain(items)
    check_items("items", items)
    kinds = {type(item) for item in items}
    if kinds not in ({str}, {int}):
        found = " and ".join(sorted(kind.__name__ for kind in kinds)) or "none"
        raise TypeError(f"items must be all strings or all integers, got {found}")
    if kinds == {int}:
        for item in (min(items), max(items)):
            check_integer("items", item, -(2**63), 2**63 - 1)
    if len(set(items)) < len(items):
        item, count = Counter(items).most_common(1)[0]
        raise ValueError(f"items must differ, got {item!r:.80} {count} times")
    return list(items)
