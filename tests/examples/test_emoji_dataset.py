import importlib.util
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from datasets import load_dataset
from PIL import features

SCRIPT = Path(__file__).parents[2] / "examples" / "emoji" / "make_dataset.py"


def load_script():
    spec = importlib.util.spec_from_file_location("make_dataset", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


make_dataset = load_script()

needs_raqm = pytest.mark.skipif(
    not features.check("raqm"), reason="Pillow has no raqm layout (Debian package libfribidi0)"
)
needs_noto = pytest.mark.skipif(
    not Path(make_dataset.NOTO).is_file(),
    reason=f"no {make_dataset.NOTO}: install the Debian package fonts-noto-color-emoji",
)


@pytest.fixture(scope="module")
def captions():
    return list(make_dataset.emoji_by_caption())


def run_script(output_dir, hash_seed):
    return subprocess.run(
        [sys.executable, SCRIPT, "--output_dir", output_dir],
        env={**os.environ, "PYTHONHASHSEED": hash_seed},
        capture_output=True,
        text=True,
        check=True,
    ).stdout


@pytest.fixture(scope="module")
def rendered(tmp_path_factory):
    folder = tmp_path_factory.mktemp("emoji")
    return folder, run_script(folder, "0")


def check_split(train, held_out):
    assert 150 <= len(held_out) <= 200
    assert not set(train) & set(held_out)

    words = Counter(word for caption in train for word in set(caption.split()))
    assert min(words[word] for caption in held_out for word in caption.split()) >= 3

    held_out_bases = Counter(map(make_dataset.without_tone, held_out))
    train_bases = Counter(make_dataset.without_tone(c) for c in train if c != make_dataset.without_tone(c))
    assert not set(held_out_bases) & set(held_out)
    assert all(train_bases[base] >= 3 for base in held_out_bases)
    assert max(held_out_bases.values()) <= 3
    assert len(held_out_bases) >= 140


def test_captions_are_plain_english_names(captions):
    assert "woman astronaut medium skin tone" in captions
    assert "medium skin tone" not in captions
    assert not any("_" in caption or caption.startswith(":") or caption.endswith(":") for caption in captions)


def test_split_holds_out_combinations_of_known_words(captions):
    train, held_out = make_dataset.split_captions(captions)
    check_split(train, held_out)
    assert sorted(train + held_out) == sorted(captions)


def test_split_holds_out_all_skin_tones_evenly(captions):
    held_out = make_dataset.split_captions(captions)[1]
    tones = Counter(tone for caption in held_out for tone in make_dataset.SKIN_TONE.findall(caption))
    assert len(tones) == 5
    assert min(tones.values()) >= 0.7 * max(tones.values())


def test_split_ignores_the_order_of_captions(captions):
    assert make_dataset.split_captions(captions) == make_dataset.split_captions(reversed(captions))


def test_split_leaves_emoji_with_few_variants_in_training():
    captions = ["ear", "ear dark skin tone", "ear light skin tone", "ear medium skin tone"]
    assert make_dataset.split_captions(captions) == (captions, [])


@needs_raqm
def test_missing_font_names_the_package_and_the_option(tmp_path):
    with pytest.raises(FileNotFoundError, match="fonts-noto-color-emoji.*--font"):
        make_dataset.load_font(tmp_path / "none.ttf", 109)


def test_pillow_without_raqm_is_an_error(monkeypatch):
    monkeypatch.setattr(make_dataset.features, "check", lambda feature: False)
    with pytest.raises(ValueError, match="raqm"):
        make_dataset.load_font(make_dataset.NOTO, 109)


@needs_raqm
def test_a_file_that_is_no_font_is_an_error():
    with pytest.raises(ValueError, match="--font takes"):
        make_dataset.load_font(SCRIPT, 109)


@needs_raqm
@needs_noto
def test_a_size_without_a_strike_is_an_error():
    with pytest.raises(ValueError, match="at size 64.*--font_size"):
        make_dataset.load_font(make_dataset.NOTO, 64)


@pytest.mark.slow
@needs_raqm
@needs_noto
def test_rendered_data_set(rendered, tmp_path):
    folder, printed = rendered
    assert sorted(path.name for path in folder.iterdir()) == ["held_out.parquet", "train.parquet"]
    files = {split: str(folder / f"{split}.parquet") for split in ("train", "held_out")}
    data = load_dataset("parquet", data_files=files, cache_dir=str(tmp_path))
    train, held_out = list(data["train"]["text"]), list(data["held_out"]["text"])

    check_split(train, held_out)
    captions = train + held_out
    assert len(captions) == len(set(captions)) > 3600
    assert f"images: {len(captions)} " in printed
    assert all(f"left out, {reason}: " in printed for reason in ("missing", "not joined", "tone unseen"))

    for row in data["held_out"]:
        assert row["image"].size == (64, 64)
        assert row["image"].mode == "RGB"
        assert row["image"].getpixel((0, 63)) == (255, 255, 255)
    apple = data["train"][train.index("red apple")]["image"]
    red, green, blue = apple.getpixel((32, 40))
    assert red > 150 > max(green, blue)


@pytest.mark.slow
@needs_raqm
@needs_noto
def test_the_same_bytes_from_run_to_run(rendered, tmp_path):
    run_script(tmp_path, "1")
    for name in ("train.parquet", "held_out.parquet"):
        assert (tmp_path / name).read_bytes() == (rendered[0] / name).read_bytes()


@needs_raqm
@needs_noto
def test_sequences_that_do_not_join_are_counted(monkeypatch):
    sequences = {
        "ear": "\N{EAR}",
        "two ears": "\N{EAR}\N{EAR}",
        "nothing": make_dataset.NO_GLYPH,
        "ear dark skin tone": "\N{EAR}",
    }
    monkeypatch.setattr(make_dataset, "emoji_by_caption", lambda: sequences)
    font = make_dataset.load_font(make_dataset.NOTO, 109)
    images, left_out = make_dataset.render_all(font, 16)
    assert list(images) == ["ear"]
    assert left_out == {"missing": 1, "not joined": 1, "tone unseen": 1}
