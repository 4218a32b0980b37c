"""ddpm_dist.recipe: YAML and overrides in, a checked configuration or one clear message out."""

from pathlib import Path

import pytest
import yaml
from hypothesis import given, strategies as st

from ddpm_dist.errors import ConfigError
from ddpm_dist.recipe import apply_override, differences, dump_config, load_config, parse_config, parse_yaml, recipes

BASE = """
run: {url: "s3://bucket/run"}
data: {url: "s3://bucket/data", image_size: 32}
train: {steps: 10, global_batch: 96, lr: 1e-4}
"""


def test_a_missing_file_is_named() -> None:
    with pytest.raises(
        ConfigError,
        match=r"--config nowhere.yaml: No such file or directory; name a file, or one of the recipes celeb.*, lsun256$",
    ):
        load_config("nowhere.yaml")


def test_a_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(BASE)
    assert load_config(tmp_path / "a.yaml", ["train.steps=20"]).train.steps == 20


def test_recipes_are_found_by_name_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shipped = {path.stem: path for path in (Path(__file__).resolve().parents[1] / "configs").glob("*.yaml")}
    assert recipes() == shipped
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits").mkdir()  # a folder is no file, as that of a data set
    urls = ["run.url=file:///r", "data.url=file:///d"]
    for name, path in shipped.items():
        assert load_config(name, urls) == load_config(path, urls)


def test_a_name_that_is_also_a_file_here_is_asked_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits").write_text(BASE)
    with pytest.raises(
        ConfigError, match=r"--config digits: .* a file here; write \./digits, or .*/configs/digits.yaml"
    ):
        load_config("digits")
    assert load_config("./digits").data.image_size == 32


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "not YAML"),
        ("- 1", "expected sections"),
        ("", "expected sections"),
        (BASE + "trian: {}", r"trian: unknown key; did you mean train\?"),
        (BASE.replace("steps", "step"), r"train.step: unknown key; did you mean train.steps\?"),
        (BASE.replace("size: 32", "size: 32, xyz: 1"), r"data.xyz: unknown key; known here: url, index, image_size"),
        (BASE.replace("steps: 10, ", ""), r"train.steps: missing, .* no default; give it .* as train.steps=VALUE"),
        ("run: {}\n" + BASE.replace("run:", "#"), r"run.url: missing"),
        (BASE.replace("steps: 10", "steps: ten"), r"train.steps: 'ten': .*integer"),
        (BASE.replace("steps: 10", "steps: 10.5"), r"train.steps: 10.5: .*integer"),
        (BASE.replace("steps: 10", "steps: '10'"), r"train.steps: '10': .*integer"),
        (BASE.replace("image_size: 32", "image_size: 32, flip: 1"), r"data.flip: 1: .*boolean"),
        (BASE.replace("lr: 1e-4", "lr: .nan"), r"train.lr"),
    ],
)  # fmt: skip
def test_one_clear_message(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        parse_config(text, source="a.yaml")
    assert "a.yaml" in str(caught.value)
    assert "pydantic" not in str(caught.value).lower()


def test_all_mistakes_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(BASE.replace("steps: 10", "steps: ten, bogus: 1"))
    assert "train.steps" in str(caught.value)
    assert "train.bogus" in str(caught.value)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.lr=3e-4", 3e-4),
        ("train.lr=1", 1.0),
        ("train.betas=[0.9, 0.99]", (0.9, 0.99)),
        ("ema.halflife_Mimg=null", None),
        ("run.url=s3://b/x=y", "s3://b/x=y"),
        ("data.flip=true", True),
    ],
)
def test_an_override_is_yaml(override: str, expected: object) -> None:
    cfg = parse_config(BASE, [override])
    section, key = override.partition("=")[0].split(".")
    assert getattr(getattr(cfg, section), key) == expected


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.steps", "looks like section.key=value"),
        ("=3", "looks like section.key=value"),
        ("train.steps.x=3", "steps is a value, not a section"),
        ("train.steps=[", "not YAML"),
    ],
)
def test_a_wrong_override_is_shown(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config(BASE, [override])


def test_the_resolved_file_gives_the_same_configuration() -> None:
    cfg = parse_config(BASE, ["cluster.workers=[2, 4]", "data.exclude_shards=[a, b]", "ema.power=[0.05, 0.1]"])
    assert parse_config(dump_config(cfg)) == cfg


@pytest.mark.parametrize("name", ["1e4", "10", "010", "1:30", "2026-01-01", "-.5", ".inf", "true", "null", "1e-4x"])
def test_a_name_that_looks_like_a_number_stays_one(name: str) -> None:
    text = dump_config(parse_config(BASE, [f"data.exclude_shards=['{name}']"]))
    assert parse_config(text).data.exclude_shards == (name,)
    assert yaml.safe_load(text)["data"]["exclude_shards"] == [name], "for readers of YAML 1.1, too"


def test_a_mixture_of_data_sets() -> None:
    cfg = parse_config(BASE, ["data.url={s3://b/one: 0.25, s3://b/two: 0.75}"])
    assert cfg.data.url == {"s3://b/one": 0.25, "s3://b/two": 0.75}
    assert parse_config(dump_config(cfg)) == cfg


def test_differences_are_sorted_by_what_they_mean() -> None:
    found = differences(
        parse_config(BASE), parse_config(BASE, ["train.lr=1e-3", "train.steps=99", "cluster.workers=2", "run.seed=1"])
    )
    assert found["identity"] == ["run.seed: 0 -> 1", "train.lr: 0.0001 -> 0.001"]
    assert found["schedule"] == ["train.steps: 10 -> 99"]
    assert found["free"] == ["cluster.workers: 1 -> 2"]


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_numbers_survive_yaml(number: float) -> None:
    assert parse_yaml(f"a: {number!r}", "here") == {"a": number}


@given(st.lists(st.sampled_from(["a", "b", "c"]), min_size=1, max_size=4), st.integers())
def test_an_override_sets_what_it_names(path: list[str], value: int) -> None:
    values: dict[str, object] = {}
    apply_override(values, f"{'.'.join(path)}={value}")
    found: object = values
    for key in path:
        assert isinstance(found, dict)
        found = found[key]
    assert found == value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data: &a\n  url: *a\n", r"its aliases \(\*name\) stand for more than 100000 values"),
        ("&a [*a]", "its aliases"),
        ("a: 1" + "0" * 5000, "not YAML: Exceeds the limit"),
        ("[" * 5000, "not YAML"),
        ("".join(f"k{i}: &k{i} [{f'*k{i - 1},' * 9 if i else '1'}]\n" for i in range(12)), "its aliases"),
    ],
)
def test_yaml_without_end_is_one_message(text: str, message: str) -> None:
    """Nested aliases: a few lines stand for 9^11 values."""
    with pytest.raises(ConfigError, match=message):
        parse_config(text)


def test_aliases_of_a_usual_size_are_read() -> None:
    assert parse_yaml("a: &a {x: 1}\nb: {<<: *a, y: 2}\n", "t") == {"a": {"x": 1}, "b": {"x": 1, "y": 2}}
