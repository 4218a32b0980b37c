"""make_shards and its input: identified by content, from any directory; photos upright; nothing half kept."""

import io
import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from ddpm_dist.commands import make_shards
from ddpm_dist.data import SOURCES
from ddpm_dist.data.build import make_shard
from ddpm_dist.data.decode import decode, encode_png
from ddpm_dist.data.index import load_index
from ddpm_dist.data.stream import iterate
from ddpm_dist.data.upright import orientation, turn
from ddpm_dist.errors import ConfigError, DataError
from tests.data.small_sets import random_images

IMAGES = random_images(24)
ROOT = Path(__file__).resolve().parents[2]


def make(*arguments: object) -> None:
    make_shards.main([str(argument) for argument in arguments])


def tree(root: Path) -> dict[str, bytes]:
    return {str(file.relative_to(root)): file.read_bytes() for file in root.rglob("*") if file.is_file()}


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """24 images in two class folders; the 17th is damaged."""
    for i, image in enumerate(IMAGES):
        (tmp_path / "in" / "ab"[i // 12]).mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / "ab"[i // 12] / f"{i:02d}.png").write_bytes(encode_png(image))
    return tmp_path / "in"


def half_made(files: Path, out: Path, *options: object) -> Path:
    """A set with some of its shards: the damaged image is in one of the last, and the input is mended afterwards."""
    (files / "b" / "17.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"17\.png"):
        make("folder", files, f"file://{out}", "--shard-samples", 4, "--no-shuffle", *options)
    assert len(list(out.glob("*.tar"))) == 4
    (files / "b" / "17.png").write_bytes(encode_png(IMAGES[17]))
    return out


def test_another_spelling_and_another_directory_are_the_same_input(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make("folder", files, f"file://{tmp_path}/whole", "--shard-samples", 4, "--no-shuffle")
    out = half_made(files, tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    make("folder", "in/", f"file://{out}", "--shard-samples", 4, "--no-shuffle")
    assert tree(out) == tree(tmp_path / "whole")
    before = tree(out)
    monkeypatch.chdir(files)
    for spelling in (".", "../in", f"file://{files}", f"{files}/"):  # complete: it is the same, and says so
        make("folder", spelling, f"file://{out}", "--shard-samples", 4, "--no-shuffle")
    files.rename(tmp_path / "moved")
    make("folder", tmp_path / "moved", f"file://{out}", "--shard-samples", 4, "--no-shuffle")
    assert tree(out) == before


def test_a_relative_input_means_the_directory_of_the_command(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another folder of the same name, with as many images, isn't it."""
    out = half_made(files, tmp_path / "out")
    other = tmp_path / "elsewhere" / "in"
    for file in files.rglob("*.png"):
        (other / file.parent.name).mkdir(parents=True, exist_ok=True)
        (other / file.parent.name / f"other-{file.name}").write_bytes(file.read_bytes())
    monkeypatch.chdir(tmp_path / "elsewhere")
    before = tree(out)
    with pytest.raises(ConfigError, match=r"holds another data set \(input: 4 of 4 finished shards, number 0 first"):
        make("folder", "in", f"file://{out}", "--shard-samples", 4, "--no-shuffle")
    assert tree(out) == before


@pytest.mark.parametrize("change", ["renamed", "moved to another class", "larger", "labels", "class renamed"])
def test_a_changed_input_is_not_mixed_in(files: Path, tmp_path: Path, change: str) -> None:
    (tmp_path / "l.csv").write_text("".join(f"{'ab'[i // 12]}/{i:02d}.png,{i % 3}\n" for i in range(24)))
    options = ["--labels", tmp_path / "l.csv"] if change == "labels" else []
    out = half_made(files, tmp_path / "out", *options)
    if change == "renamed":
        (files / "a" / "03.png").rename(files / "a" / "03b.png")
    elif change == "moved to another class":
        (files / "a" / "03.png").rename(files / "b" / "03.png")
    elif change == "larger":
        (files / "a" / "03.png").write_bytes((files / "a" / "03.png").read_bytes() + b" ")
    elif change == "class renamed":
        (files / "b").rename(files / "c")
    else:
        (tmp_path / "l.csv").write_text("".join(f"{'ab'[i // 12]}/{i:02d}.png,{i % 2}\n" for i in range(24)))
    with pytest.raises(ConfigError, match="4 finished shards, number 0 first, were made of files or labels"):
        make("folder", files, f"file://{out}", "--shard-samples", 4, "--no-shuffle", *options)


def test_another_size_of_the_images_is_another_set(files: Path, tmp_path: Path) -> None:
    out = half_made(files, tmp_path / "out")
    with pytest.raises(ConfigError, match=r"size: None there, 4 now"):
        make("folder", files, f"file://{out}", "--shard-samples", 4, "--no-shuffle", "--size", 4)


def test_an_input_that_changes_while_shards_are_made_is_noticed(files: Path) -> None:
    from ddpm_dist.data import SourceOptions
    from ddpm_dist.data.build import make_plan
    from ddpm_dist.data.sources import open_source

    options = SourceOptions((str(files),))
    plan = make_plan(
        "folder", options, format="png", quality=95, channels=None, shuffle_seed=0, skip_bad=False,
        samples_per_shard=6, bytes_per_shard=1,
    )  # fmt: skip
    (files / "a" / "03.png").rename(files / "a" / "3.png")
    with pytest.raises(DataError, match=r"its files or labels for shard-000000\.tar aren't those that were planned"):
        make_shard(plan, open_source("folder", options), f"file://{files.parent}/out", 0)
    assert not (files.parent / "out").exists()


def test_a_set_that_version_0_1_0_began_is_finished(files: Path, tmp_path: Path) -> None:
    """Its plan knows neither marks nor the newer options, and its inputs as they were written."""
    make("folder", files, f"file://{tmp_path}/whole", "--shard-samples", 4, "--no-shuffle")
    out = half_made(files, tmp_path / "out")
    plan = json.loads((out / "plan.json").read_bytes())
    del plan["marks"]
    plan["options"] = {"inputs": [str(files) + "/"], "split": "train", "labels": None, "size": None}
    (out / "plan.json").write_text(json.dumps(plan, indent=1) + "\n")
    with pytest.raises(ConfigError, match=r"labels: None there, none now"):
        make("folder", files, f"file://{out}", "--shard-samples", 4, "--no-shuffle", "--labels", "none")
    make("folder", files, f"file://{out}", "--shard-samples", 4, "--no-shuffle")
    assert tree(out) == tree(tmp_path / "whole")


def photo(orientation: int, form: str = "JPEG") -> tuple[bytes, np.ndarray]:
    """A picture with EXIF's orientation, and how it is to be seen, by Pillow."""
    exif = Image.Exif()
    exif[0x112] = orientation
    out = io.BytesIO()
    pixels = np.kron(np.arange(12, dtype=np.uint8).reshape(3, 4) * 20, np.ones((8, 8), np.uint8))
    picture = Image.fromarray(np.stack([pixels, pixels[::-1], pixels], axis=2))
    picture.save(out, form, exif=exif, **({"lossless": True} if form == "WEBP" else {}))
    with Image.open(io.BytesIO(out.getvalue())) as image:
        return out.getvalue(), np.asarray(ImageOps.exif_transpose(image).convert("RGB"))


@pytest.mark.parametrize("number", range(1, 9))
def test_all_orientations_are_turned_as_pillow_does(number: int) -> None:
    data, expected = photo(number, "PNG")
    assert orientation(data) == number
    assert np.array_equal(turn(decode(data), number), expected)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "AVIF", "TIFF"])
@pytest.mark.parametrize("options", [[], ["--size", "16"], ["--format", "jpeg"]])
def test_photos_stand_upright_in_a_set(
    tmp_path: Path, form: str, options: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    data, expected = photo(6, form)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / f"a.{form.lower()}").write_bytes(data)
    with caplog.at_level("INFO"):
        make("folder", tmp_path / "in", f"file://{tmp_path}/out", *options)
    (sample,) = iterate(f"file://{tmp_path}/out")
    pixels = sample.image.transpose(1, 2, 0).astype(int)
    if "--size" in options:
        assert pixels[:2].mean() < 255 * 0.9
        assert abs(pixels - expected[8:24:1, 4:20].astype(int)).mean() < 60
    else:
        assert pixels.shape == expected.shape == (32, 24, 3)
        assert abs(pixels - expected).mean() < 8
    if form != "TIFF":  # Pillow turns those by itself
        assert f"1 photo by their EXIF orientation (a.{form.lower()}, …): turned upright" in caplog.text


def test_keep_counts_the_photos_that_lie(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "in").mkdir()
    for i in range(3):
        (tmp_path / "in" / f"{i}.jpg").write_bytes(photo(6 if i < 2 else 1)[0])
    with caplog.at_level("INFO"):
        make("folder", tmp_path / "in", f"file://{tmp_path}/out", "--format", "keep")
    assert "2 photos by their EXIF orientation (" in caplog.text
    assert "kept as they lie, and trained on so" in caplog.text
    assert {len(sample.image[0]) for sample in iterate(f"file://{tmp_path}/out")} == {24}


def test_keep_does_not_keep_half_a_jpeg(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    out = io.BytesIO()
    Image.fromarray(random_images(1, 64)[0]).save(out, "JPEG")
    (tmp_path / "in" / "t.jpg").write_bytes(out.getvalue()[:700])
    (tmp_path / "in" / "u.jpg").write_bytes(out.getvalue())
    with pytest.raises(DataError, match=r"t\.jpg: corrupt"):
        make("folder", tmp_path / "in", f"file://{tmp_path}/a", "--format", "keep", "--shard-samples", 1)
    make("folder", tmp_path / "in", f"file://{tmp_path}/b", "--format", "keep", "--shard-samples", 2, "--skip-bad")
    assert load_index(f"file://{tmp_path}/b").num_samples == 1


def test_a_zip_with_a_bad_member_can_be_finished_without_it(tmp_path: Path) -> None:
    import zipfile

    with zipfile.ZipFile(tmp_path / "in.zip", "w") as archive:
        for i in range(4):
            archive.writestr(f"{i}.png", encode_png(IMAGES[i]))
    data = bytearray((tmp_path / "in.zip").read_bytes())
    data[data.find(b"IDAT") + 9] ^= 1
    (tmp_path / "in.zip").write_bytes(data)
    with pytest.raises(DataError, match=r"corrupt: .*Bad CRC-32 for file '0.png'.*--skip-bad"):
        make("zip", tmp_path / "in.zip", f"file://{tmp_path}/a", "--shard-samples", 2)
    make("zip", tmp_path / "in.zip", f"file://{tmp_path}/b", "--shard-samples", 2, "--skip-bad")
    assert load_index(f"file://{tmp_path}/b").num_samples == 3


def test_what_was_decided_is_said_once(files: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (files / "notes.txt").write_text("x")
    with caplog.at_level("INFO"):
        make("folder", files, f"file://{tmp_path}/out", "--workers", 2, "--shard-samples", 12)
    assert caplog.text.count("2 classes: a, b (the folders at *)") == 1
    assert caplog.text.count("left out: 1 .txt (notes.txt)") == 1


def test_the_commands_of_the_documentation_are_understood() -> None:
    """Each row of the table in docs/data.md names a kind and options that there are."""
    table = (ROOT / "docs" / "data.md").read_text().partition("## Everything else")[2].partition("**Labels**")[0]
    rows = [line.split("|")[2] for line in table.splitlines() if line.startswith("|")]
    commands = [command for row in rows for command in re.findall("`([^`]+)`", row)]
    kinds = set()
    for command in commands:
        words = shlex.split(command)
        if words[0] in SOURCES:
            args = make_shards.parse([word if word != "URL_OF_IT" else "s3://b/a" for word in words])
            assert args.url == "URL"
            kinds.add(args.kind)
        elif words[0].startswith("--") and words[0] != "--help":
            make_shards.parse(["folder", "in", "URL", *words])
    assert kinds == set(SOURCES) - {"fashion-mnist", "emoji"}
