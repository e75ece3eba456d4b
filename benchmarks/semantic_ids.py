"""
Semantic IDs of real vectors: the error of their codes beside faiss and vector-quantize-pytorch, and what a common
prefix means.

    pip install 'rq_hf[benchmarks]'
    python benchmarks/semantic_ids.py wordnet --output_dir runs/semantic-ids
    python benchmarks/semantic_ids.py cifar10 --data_files 'cifar10/train-*.parquet' --output_dir runs/semantic-ids
    python benchmarks/semantic_ids.py speed
    python benchmarks/semantic_ids.py million

`wordnet`: the 82,115 noun synsets of WordNet 3.0 (Debian's package wordnet-base). Vectors are TF-IDF of their
glosses, reduced to 128 dimensions by truncated SVD and scaled to unit norm, with the defaults of scikit-learn.
`cifar10`: images with classes; vectors are the 224 pooled features of the classifier of the package. Both are kept in
the output folder, and so are the results of every method and seed, which are not computed again. Encoders are trained
on them by examples/train_semantic_ids.py, and compared with `--encoders`, in the order of the seeds.

Every vector becomes three codes of 256, 24 bits, by each of METHODS, which see all vectors once and encode the same.
`faiss` is its ResidualQuantizer as it is trained by default: k-means of 10 iterations in each of 10 growing numbers of
dimensions, on the residuals of all beams. `faiss, k-means` is trained like rq_hf, by 25 iterations of k-means in all
dimensions, and searches when it encodes. Its k-means uses all vectors, instead of 256 per codeword. Its
ProductQuantizer needs dimensions divisible by three, so that vectors get zeros at the end. ResidualVQ does k-means of
25 iterations on its first batch, of all vectors.

*Error* is Σ‖x − x̂‖² / Σ‖x − mean‖². *Collisions* is the share of items whose three codes are those of an item with
another vector. What a prefix means is in the comments of `prefix_figures`, `purity` and `common_ancestors`. The
tables have means and sample deviations over the --seeds.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import cache, cached_property, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from datasets import load_dataset
from measure import least_seconds, peak_mebibytes

from rq_hf import RQEmbeddingModel, SemanticIds
from rq_hf.files import atomic_file
from rq_hf.metrics import load_feature_network
from rq_hf.semantic_ids.report import (
    duplicate_rates,
    group_vectors,
    relative_error,
    squared_deviations,
    usage_and_perplexity,
)

K, D = 256, 3
DIMENSIONS = 128  # of the vectors of WordNet
NEIGHBOURS = 10  # of the recall
QUERIES = 5000
PAIRS = 200_000  # per length of a prefix
ANCESTOR_DEPTHS = (4, 6, 8)


class Quantized(NamedTuple):
    """Codes `(N, D)` and the vectors `(N, C)` that they stand for."""

    codes: torch.Tensor
    decoded: torch.Tensor


def fitted(vectors: torch.Tensor, seed: int) -> RQEmbeddingModel:
    torch.manual_seed(seed)
    return RQEmbeddingModel(vectors.shape[1], hidden_dims=(), codebook_size=K, depth=D).fit(vectors)


def rq_hf(vectors: torch.Tensor, seed: int, **options) -> Quantized:
    model = fitted(vectors, seed)
    codes = model.encode(vectors, **options)
    return Quantized(codes, model.decode(codes))


def rq_hf_encoder(vectors: torch.Tensor, seed: int, folders: dict[int, Path]) -> Quantized:
    """By the model that examples/train_semantic_ids.py has trained with each seed."""
    model = RQEmbeddingModel.from_pretrained(folders[seed] / "semantic_ids")
    codes = model.encode(vectors)
    return Quantized(codes, model.decode(codes))


def rq_hf_next_nearest(vectors: torch.Tensor, seed: int) -> Quantized:
    model = fitted(vectors, seed)
    ids, _ = SemanticIds.encode(model, list(range(len(vectors))), vectors).resolve("next_nearest", vectors)
    return Quantized(ids.codes, model.decode(ids.codes))


def faiss_residual(vectors: torch.Tensor, seed: int, beam_size: int) -> Quantized:
    """By the training of faiss, which searches as well."""
    import faiss

    quantizer = faiss.ResidualQuantizer(vectors.shape[1], D, K.bit_length() - 1)
    quantizer.max_beam_size = beam_size
    train_faiss(quantizer, vectors, seed)
    return faiss_codes(quantizer, vectors)


def faiss_k_means(vectors: torch.Tensor, seed: int, beam_size: int) -> Quantized:
    """By k-means level after level, as in rq_hf."""
    import faiss

    quantizer = faiss.ResidualQuantizer(vectors.shape[1], D, K.bit_length() - 1)
    quantizer.train_type, quantizer.cp.niter, quantizer.max_beam_size = quantizer.Train_default, 25, 1
    train_faiss(quantizer, vectors, seed)
    quantizer.max_beam_size = beam_size
    return faiss_codes(quantizer, vectors)


def faiss_product(vectors: torch.Tensor, seed: int) -> Quantized:
    import faiss

    padded = torch.nn.functional.pad(vectors, (0, -vectors.shape[1] % D))
    quantizer = faiss.ProductQuantizer(padded.shape[1], D, K.bit_length() - 1)
    train_faiss(quantizer, padded, seed)
    codes, decoded = faiss_codes(quantizer, padded)
    return Quantized(codes, decoded[:, : vectors.shape[1]])


def train_faiss(quantizer, vectors: torch.Tensor, seed: int) -> None:
    quantizer.cp.seed = seed
    quantizer.cp.max_points_per_centroid = len(vectors)
    quantizer.train(vectors.numpy())


def faiss_codes(quantizer, vectors: torch.Tensor) -> Quantized:
    codes = quantizer.compute_codes(vectors.numpy())  # one byte per code
    return Quantized(torch.from_numpy(codes[:, :D]).long(), torch.from_numpy(quantizer.decode(codes)))


@torch.no_grad()
def residual_vq(vectors: torch.Tensor, seed: int) -> Quantized:
    from vector_quantize_pytorch import ResidualVQ

    torch.manual_seed(seed)
    quantizer = ResidualVQ(dim=vectors.shape[1], num_quantizers=D, codebook_size=K, kmeans_init=True, kmeans_iters=25)
    quantizer(vectors[None])
    decoded, codes, _ = quantizer.eval()(vectors[None])
    return Quantized(codes[0], decoded[0])


METHODS: dict[str, Callable[[torch.Tensor, int], Quantized]] = {
    "rq_hf": rq_hf,
    "rq_hf, 5 beams": partial(rq_hf, beam_size=5),
    "rq_hf, balanced": partial(rq_hf, balanced=True),
    "rq_hf, next nearest": rq_hf_next_nearest,
    "faiss": partial(faiss_residual, beam_size=1),
    "faiss, 5 beams": partial(faiss_residual, beam_size=5),
    "faiss, k-means": partial(faiss_k_means, beam_size=1),
    "faiss, k-means, 5 beams": partial(faiss_k_means, beam_size=5),
    "faiss ProductQuantizer": faiss_product,
    "ResidualVQ": residual_vq,
}


class Prefixes:
    """
    The items whose first `length` codes are equal.

    Attributes:
        group: `(N,)` a number for each item, which those of one prefix share.
        count: `(groups,)` how many items each has.
    """

    def __init__(self, codes: torch.Tensor, length: int):
        _, group, self.count = np.unique(codes[:, :length].numpy(), axis=0, return_inverse=True, return_counts=True)
        self.group = group.reshape(-1)

    def sample_pairs(self, generator: np.random.Generator) -> np.ndarray:
        """`(PAIRS, 2)` items, all pairs with a common prefix being equally likely. Empty without any."""
        weights = self.count * (self.count - 1.0)
        if not weights.any():
            return np.empty((0, 2), np.int64)
        group = generator.choice(len(self.count), PAIRS, p=weights / weights.sum())
        first = generator.integers(self.count[group])
        second = (first + generator.integers(1, self.count[group])) % self.count[group]
        starts = self.count.cumsum() - self.count
        order = self.group.argsort(kind="stable")
        return order[starts[group, None] + np.stack([first, second], axis=1)]


class Items:
    """Vectors `(N, C)` of items and the figures that can be computed of all items."""

    def __init__(self, vectors: torch.Tensor):
        self.vectors = vectors
        self.groups = group_vectors(vectors)
        self.queries = torch.linspace(0, len(vectors) - 1, min(QUERIES, len(vectors))).long()

    @cached_property
    def neighbours(self) -> torch.Tensor:
        """`(QUERIES, NEIGHBOURS)`: the items nearest to each query, exactly; items with its very vector are none."""
        vectors, groups = self.vectors.double(), torch.from_numpy(self.groups)
        norms, found = vectors.square().sum(dim=1), []
        for rows in self.queries.split(500):
            distances = norms - 2 * vectors[rows] @ vectors.T
            distances[groups[rows, None] == groups] = torch.inf
            found.append(distances.topk(NEIGHBOURS, largest=False).indices)
        return torch.cat(found)

    def pairs(self, prefixes: Prefixes, seed: int) -> np.ndarray:
        """Sampled pairs with a common prefix and different vectors."""
        pairs = prefixes.sample_pairs(np.random.default_rng(seed))
        return pairs[self.groups[pairs[:, 0]] != self.groups[pairs[:, 1]]]

    def recall(self, prefixes: Prefixes) -> float:
        """The share of the `NEIGHBOURS` nearest items of a query that have its prefix."""
        group = torch.from_numpy(prefixes.group)
        return float((group[self.neighbours] == group[self.queries, None]).float().mean())

    def prefix_figures(self, prefixes: Prefixes, seed: int) -> dict[str, float]:
        """The number of prefixes; of a query, how many other items have its prefix, and the recall."""
        others = prefixes.count[prefixes.group[self.queries]] - 1
        return {"prefixes": len(prefixes.count), "others": float(others.mean()), "recall": self.recall(prefixes)}


class Images(Items):
    """CIFAR-10."""

    def __init__(self, vectors: torch.Tensor, classes: np.ndarray):
        super().__init__(vectors)
        self.classes = classes

    def prefix_figures(self, prefixes: Prefixes, seed: int) -> dict[str, float]:
        """Also class purity; that of the same groups with the classes shuffled, because small groups are pure by
        chance; and the share of the pairs with a common prefix that have a common class."""
        shuffled = np.random.default_rng(seed).permutation(self.classes)
        pairs = self.classes[self.pairs(prefixes, seed)]
        return super().prefix_figures(prefixes, seed) | {
            "purity": purity(prefixes, self.classes),
            "purity, shuffled": purity(prefixes, shuffled),
            "same class": float((pairs[:, 0] == pairs[:, 1]).mean()),
        }


def purity(prefixes: Prefixes, classes: np.ndarray) -> float:
    """The share of items that are of the most frequent class of their prefix."""
    counts = np.zeros((len(prefixes.count), classes.max() + 1), np.int64)
    np.add.at(counts, (prefixes.group, classes), 1)
    return float(counts.max(axis=1).sum() / len(classes))


class Synsets(Items):
    """
    WordNet.

    Args:
        hypernyms: of each synset, the numbers of the synsets directly above it.
    """

    def __init__(self, vectors: torch.Tensor, hypernyms: list[list[int]]):
        super().__init__(vectors)

        @cache
        def depth(synset: int) -> int:
            """The length of the longest path up to the root, `entity`."""
            return max((1 + depth(above) for above in hypernyms[synset]), default=0)

        @cache
        def ancestors(synset: int) -> frozenset[int]:
            """All synsets above it, and itself."""
            return frozenset([synset]).union(*map(ancestors, hypernyms[synset]))

        self.depth, self.ancestors = depth, ancestors

    def common_ancestors(self, pairs: np.ndarray) -> dict[str, float]:
        """The shares of pairs whose lowest common hypernym is at least so deep, and its mean depth."""
        depths = np.array([max(map(self.depth, self.ancestors(a) & self.ancestors(b))) for a, b in pairs.tolist()])
        shares = {f"depth ≥ {depth}": float((depths >= depth).mean()) for depth in ANCESTOR_DEPTHS}
        return shares | {"mean depth": float(depths.mean())}

    def prefix_figures(self, prefixes: Prefixes, seed: int) -> dict[str, float]:
        """Also the common ancestors of pairs with a common prefix."""
        ancestors = self.common_ancestors(self.pairs(prefixes, seed))
        return super().prefix_figures(prefixes, seed) | ancestors


def read_wordnet(folder: Path) -> tuple[list[str], list[list[int]]]:
    """
    The glosses of the noun synsets in `data.noun`, and the numbers of the synsets directly above each.

    A line is "offset file type w_cnt word lex_id ... p_cnt symbol offset type source/target ... | gloss", with w_cnt
    hexadecimal (manual page wndb(5)). `@` is a hypernym, `@i` that of an instance.
    """
    offsets, glosses, above = [], [], []
    for line in (folder / "data.noun").read_text(encoding="utf-8").splitlines():
        if line.startswith("  "):  # the licence
            continue
        fields, gloss = line.split(" | ", 1)
        offset, _, _, num_words, *fields = fields.split()
        num_pointers, *fields = fields[2 * int(num_words, 16) :]
        pointers = np.array(fields[: 4 * int(num_pointers)]).reshape(-1, 4)
        offsets.append(offset)
        glosses.append(gloss.strip())
        above.append([pointer[1] for pointer in pointers if pointer[0] in ("@", "@i")])
    rows = {offset: row for row, offset in enumerate(offsets)}
    return glosses, [[rows[offset] for offset in synset] for synset in above]


def gloss_vectors(glosses: list[str]) -> np.ndarray:
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import Normalizer

    steps = make_pipeline(TfidfVectorizer(), TruncatedSVD(DIMENSIONS, random_state=0), Normalizer())
    return steps.fit_transform(glosses).astype(np.float32)


def feature_vectors(dataset) -> np.ndarray:
    network = load_feature_network("cifar10-small")
    batches = (np.stack([image.convert("RGB") for image in batch["img"]]) for batch in dataset.iter(500))
    pixels = (torch.from_numpy(batch).permute(0, 3, 1, 2).contiguous() for batch in batches)
    return torch.cat([network(batch).features for batch in pixels]).numpy()


def kept(path: Path, compute: Callable[[], np.ndarray]) -> torch.Tensor:
    """The column "vector" of a parquet file, which is computed unless it exists."""
    if not path.exists():
        vectors = compute()
        column = pa.FixedSizeListArray.from_arrays(vectors.ravel(), vectors.shape[1])
        with atomic_file(path) as file:
            pq.write_table(pa.table({"vector": column}), file)
    column = pq.read_table(path)["vector"].combine_chunks()
    return torch.from_numpy(column.flatten().to_numpy().reshape(len(column), -1).copy())


def load_items(args: argparse.Namespace) -> Items:
    folder = args.output_dir / args.data
    folder.mkdir(parents=True, exist_ok=True)
    if args.data == "wordnet":
        glosses, hypernyms = read_wordnet(args.wordnet)
        return Synsets(kept(folder / "vectors.parquet", lambda: gloss_vectors(glosses)), hypernyms)
    dataset = load_dataset("parquet", data_files=args.data_files, split="train")
    return Images(kept(folder / "vectors.parquet", lambda: feature_vectors(dataset)), np.array(dataset["label"]))


def figures(items: Items, quantized: Quantized, seed: int) -> dict:
    """Of one method and seed."""
    codes, errors = quantized.codes, (items.vectors.double() - quantized.decoded).square().sum(dim=1)
    prefixes = [Prefixes(codes, length) for length in range(1, D + 1)]
    return {
        "error": relative_error(errors, squared_deviations(items.vectors)),
        "collisions": duplicate_rates(items.groups, prefixes[-1].group)[1],
        "largest group": int(prefixes[-1].count.max()),
        "usage": [usage_and_perplexity(level, K)[0] for level in codes.T.numpy()],
        "perplexity": [usage_and_perplexity(level, K)[1] for level in codes.T.numpy()],
        "prefix": [items.prefix_figures(of_length, seed) for of_length in prefixes],
    }


def cell(values: list[float]) -> str:
    """Mean and sample deviation, with four significant digits; a dash where there is nothing to count."""
    if np.isnan(values).any():
        return "–"
    deviation = f" ± {statistics.stdev(values):.1g}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.4g}{deviation}"


def print_tables(results: dict[str, list[dict]]) -> None:
    print("\n| method | error | collisions | largest group | least usage | perplexity |\n|---|---|---|---|---|---|")
    for name, runs in results.items():
        columns = [cell([run[figure] for run in runs]) for figure in ("error", "collisions", "largest group")]
        usage = min(min(run["usage"]) for run in runs)
        perplexity = " / ".join(
            f"{statistics.mean(values):.0f}" for values in zip(*(run["perplexity"] for run in runs))
        )
        print(f"| {name} | {' | '.join(columns)} | {usage:.1%} | {perplexity} |")
    columns = list(next(iter(results.values()))[0]["prefix"][0])
    print(f"\n| method | codes | {' | '.join(columns)} |\n|---|---{'|---' * len(columns)}|")
    for name, runs in results.items():
        for length in range(D):
            values = (cell([run["prefix"][length][column] for run in runs]) for column in columns)
            print(f"| {name} | {length + 1} | {' | '.join(values)} |")


def compare(args: argparse.Namespace) -> None:
    items = load_items(args)
    duplicates = (np.bincount(items.groups)[items.groups] > 1).mean()
    print(f"{tuple(items.vectors.shape)} vectors; {duplicates:.2%} are those of another item")
    methods = {name: METHODS[name] for name in args.methods}
    if args.encoders:
        methods["rq_hf, encoder"] = partial(rq_hf_encoder, folders=dict(zip(args.seeds, args.encoders)))
    results = {name: [] for name in methods}
    for seed in args.seeds:
        for name, method in methods.items():
            path = args.output_dir / args.data / f"{name}, seed {seed}.json".replace(" ", "-").replace(",", "")
            if not path.exists():
                print(name, "seed", seed, flush=True)
                found = figures(items, method(items.vectors, seed), seed)
                with atomic_file(path) as file:
                    file.write_text(json.dumps(found, indent=2))
            results[name].append(json.loads(path.read_text()))
    print_tables(results)
    everything = Prefixes(torch.zeros(len(items.vectors), 1, dtype=torch.long), 1)
    print("\nany two items:", {name: f"{value:.4g}" for name, value in items.prefix_figures(everything, 0).items()})
    if isinstance(items, Synsets):
        nearest = np.stack([items.queries.numpy(), items.neighbours[:, 0].numpy()], axis=1)
        print("nearest neighbours:", {k: f"{v:.4g}" for k, v in items.common_ancestors(nearest).items()})


def low_rank(rows: int, dimensions: int) -> torch.Tensor:
    """Random vectors of rank 64 with a little noise, in float32. No time here depends on the values."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(64, dimensions, generator=generator)
    vectors = torch.empty(rows, dimensions)
    for chunk in vectors.split(2**16):
        torch.randn(chunk.shape, generator=generator, out=chunk).mul_(0.5)
        chunk.addmm_(torch.randn(len(chunk), 64, generator=generator), directions)
    return vectors


def speed(args: argparse.Namespace) -> None:
    """Least time of interleaved repeats to fit or train, and to encode; k-means of faiss takes all vectors."""
    import faiss

    torch.set_num_threads(args.threads)
    faiss.omp_set_num_threads(args.threads)
    vectors = low_rank(args.rows, DIMENSIONS)
    model = fitted(vectors, 0)
    seconds = least_seconds(
        {
            "rq_hf, fit": lambda: fitted(vectors, 0),
            "rq_hf, encode": lambda: model.encode(vectors),
            "rq_hf, encode with 5 beams": lambda: model.encode(vectors, beam_size=5),
            "faiss, train and encode": lambda: faiss_residual(vectors, 0, 1),
            "faiss, 5 beams, train and encode": lambda: faiss_residual(vectors, 0, 5),
        },
        args.repeats,
    )
    print(f"{tuple(vectors.shape)} vectors, {torch.get_num_threads()} threads")
    for name, value in seconds.items():
        print(f"{name}: {value:.2f} s")


def fit_step(rows: int, threads: int) -> Callable:
    torch.set_num_threads(threads)
    vectors = low_rank(rows, 768)
    return partial(print_rate, lambda: fitted(vectors, 0), rows)


def encode_step(rows: int, threads: int, beam_size: int) -> Callable:
    torch.set_num_threads(threads)
    vectors = low_rank(rows, 768)
    model = fitted(vectors[: 100 * K], 0)
    return partial(print_rate, lambda: model.encode(vectors, beam_size=beam_size), rows)


def print_rate(step: Callable, rows: int) -> None:
    started = time.perf_counter()
    step()
    seconds = time.perf_counter() - started
    print(f"{seconds:.1f} s, {rows / seconds:,.0f} vectors/s", flush=True)


def million(args: argparse.Namespace) -> None:
    """Vectors per second, and peak memory beyond the vectors, of 768 dimensions, each in a process of its own."""
    for name, make_step, *options in (("fit", fit_step), ("encode", encode_step, 1), ("5 beams", encode_step, 5)):
        print(f"{name}: ", end="", flush=True)
        memory = peak_mebibytes(make_step, args.rows, args.threads, *options)
        print(f"  {memory / 1024:.2f} GiB", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="data", required=True, metavar="wordnet | cifar10 | speed | million")
    for name in ("wordnet", "cifar10"):
        command = commands.add_parser(name)
        command.set_defaults(run=compare)
        command.add_argument("--output_dir", type=Path, required=True)
        command.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
        command.add_argument(
            "--encoders", type=Path, nargs="+", help="folders of examples/train_semantic_ids.py, one per seed"
        )
        command.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD")
        if name == "wordnet":
            command.add_argument("--wordnet", type=Path, default="/usr/share/wordnet", help="folder of data.noun")
        else:
            command.add_argument("--data_files", required=True, help="parquet files with the columns img and label")
    for name, run, rows in (("speed", speed, 60_000), ("million", million, 1_000_000)):
        command = commands.add_parser(name, help=run.__doc__)
        command.set_defaults(run=run)
        command.add_argument("--rows", type=int, default=rows)
        command.add_argument("--threads", type=int, default=2)
        if name == "speed":
            command.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    if getattr(args, "encoders", None) and len(args.encoders) != len(args.seeds):
        parser.error(f"--encoders must be {len(args.seeds)} folders, one per seed, got {len(args.encoders)}")
    args.run(args)


if __name__ == "__main__":
    main()
