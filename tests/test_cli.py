"""ddpm_dist.cli, as commands see it: exit codes, one line of error, no traceback."""

import argparse
import ast
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from ddpm_dist import cli
from ddpm_dist.commands import scripts
from ddpm_dist.recipe import parse_config

ROOT = Path(__file__).resolve().parents[1]
CONFIG = """
run: {url: "file:///nowhere/run"}
data: {url: "file:///nowhere/data", image_size: 8, channels: 1}
model: {channels: 32, channel_mult: [1, 2], attention_resolutions: [4]}
train: {steps: 10, global_batch: 8}
"""


def command(body: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs `main` with this body through cli.run, in a process."""
    code = "import sys\nfrom ddpm_dist import interrupt, cli, errors\ndef main(argv):\n" + textwrap.indent(body, "    ")
    return subprocess.run(
        [sys.executable, "-c", f"{code}\ncli.run(main)", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=ROOT,
        env={**os.environ, **environment},
    )


def test_success() -> None:
    done = command("print('fine')")
    assert (done.returncode, done.stdout) == (0, "fine\n")


def test_a_users_mistake_is_one_message() -> None:
    done = command("raise errors.ConfigError('train.lr: -1: must be positive')")
    assert (done.returncode, done.stderr) == (1, "error: train.lr: -1: must be positive\n")


def test_the_traceback_is_there_for_who_asks() -> None:
    done = command("raise errors.ConfigError('no')", DDPM_DIST_TRACEBACK="1")
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert done.stderr.endswith("error: no\n")


def test_our_own_bug_keeps_its_traceback() -> None:
    done = command("assert 1 == 2, 'ours'")
    assert done.returncode == 1
    assert "AssertionError: ours" in done.stderr


def test_an_interrupt_says_how_to_go_on() -> None:
    done = command("raise KeyboardInterrupt")
    assert (done.returncode, done.stderr) == (130, "interrupted; the same command continues\n")


def test_print_config_shows_what_would_run(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(CONFIG)
    body = "cfg = cli.config_from(cli.config_parser('x').parse_args(argv)); print('went on')"
    done = command(body, "--config", str(tmp_path / "a.yaml"), "--print-config", "train.steps=33", "zero.stage=2")
    assert done.returncode == 0
    shown = parse_config(done.stdout)
    assert (shown.train.steps, shown.zero.stage, shown.train.optimizer) == (33, 2, "adam")


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("launch/train.py", ["--config", "nowhere.yaml"], "error: --config nowhere.yaml: No such file or directory"),
        ("launch/train.py", ["train.bogus=1", "train.steps=many"], "train.bogus: unknown key"),
        ("launch/train.py", ["--config", "."], "a folder; name a file"),
        ("launch/train.py", ["run.url=s3://KEY:HIDDEN@b/x"], "run.url: 's3://b/x': keys and options don't belong"),
        ("launch/train.py", ["run.url=s3://b/x?key=HIDDEN"], "run.url: 's3://b/x': keys and options don't belong"),
        ("launch/train.py", ["cluster.workers=1:4"], "cluster.workers: '1:4': Input should be a valid integer, or In"),
        ("launch/train.py", ["evaluation.every=1", "evaluation.metrics=[lite0]"], "metrics: 'lite0' is unknown"),
        ("launch/train.py", ["evaluation.every=1", "evaluation.metrics=[fid]"], "or evaluation.networks.inception=URL"),
        ("launch/train_deepspeed.py", ["cluster.workers=3"], "must divide train.global_batch: 8"),
    ],
)
def test_mistakes_in_launch_scripts(script: str, arguments: list[str], message: str, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(CONFIG)
    if "--config" not in arguments:
        arguments = ["--config", str(tmp_path / "a.yaml"), *arguments]
    done = subprocess.run(
        [sys.executable, ROOT / script, *arguments], capture_output=True, text=True, timeout=120, cwd=tmp_path
    )
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert "HIDDEN" not in done.stderr


@pytest.mark.parametrize("script", ["train", "sample"])
def test_two_recipes_are_not_one(script: str) -> None:
    words = [sys.executable, ROOT / "launch" / f"{script}.py", "--config", "a.yaml", "--config", "b.yaml"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "error: --config stands twice: a.yaml and b.yaml" in done.stderr


@pytest.mark.parametrize("swallowed", ["pass", "raise SystemExit(9)"])
def test_an_interrupt_while_packages_load_ends_the_command(swallowed: str, tmp_path: Path) -> None:
    """Also inside an import that catches everything."""
    (tmp_path / "greedy.py").write_text(
        f"import os, signal\ntry:\n    os.kill(os.getpid(), signal.SIGINT)\nexcept BaseException:\n    {swallowed}\n"
    )
    code = "from ddpm_dist import interrupt\ninterrupt.leave_quietly()\nimport greedy\nprint('goes on')"
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{tmp_path}"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=environment)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted; the same command continues\n")


def test_an_interrupt_at_work_can_be_caught() -> None:
    body = "import os, signal\ntry: os.kill(os.getpid(), signal.SIGINT)\nexcept KeyboardInterrupt: print('saved')"
    done = command(body)
    assert (done.returncode, done.stdout) == (0, "saved\n")


PROGRAMS = sorted([*(ROOT / "launch").glob("*.py"), *(ROOT / "tools").glob("*.py")])


@pytest.mark.parametrize("script", PROGRAMS, ids=[path.stem for path in PROGRAMS])
def test_programs_are_thin(script: Path) -> None:
    """What loads before `scripts` has asked for a quiet Ctrl-C is the standard library and a few of our own lines."""
    assert script.read_text().split('"""')[2] == (
        f'\n\nfrom ddpm_dist.commands import scripts\n\nif __name__ == "__main__":\n    scripts.{script.stem}()\n'
    )


def test_programs_load_nothing_before_they_begin() -> None:
    """-S leaves out what an editable install loads of its own at the start of each Python."""
    code = "import sys\nfrom ddpm_dist.commands import scripts\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT)
    others = {name for name in done.stdout.split() if name.partition(".")[0] not in sys.stdlib_module_names}
    ours = {"ddpm_dist", "ddpm_dist.commands", "ddpm_dist.commands.scripts", "ddpm_dist.interrupt"}
    assert others - {"__main__"} == ours, done.stderr


def test_every_program_is_installed_and_says_what_it_is() -> None:
    """setup.py's console scripts are the functions of `scripts`, under the names that a person finds in all texts."""
    programs = installed_programs()
    assert {name.removeprefix("ddpm-"): getattr(scripts, call) for name, call in programs.items()} == scripts.PROGRAMS
    one_word = {*scripts.SHARDS.values(), *scripts.INSPECT.values()} | set(scripts.PROGRAMS.values())
    assert {path.stem for path in PROGRAMS} <= {call.__name__ for call in one_word}


def test_texts_name_programs_and_recipes_that_there_are() -> None:
    """Right from a checkout and from a wheel: no path of a script or recipe, and no program that nobody installs."""
    words, wrong = {"ddpm-shards": scripts.SHARDS, "ddpm-inspect": scripts.INSPECT}, []
    for path in [*(ROOT / "ddpm_dist").rglob("*.py"), *(ROOT / "configs").glob("*.yaml")]:
        text = path.read_text()
        wrong += [f"{path}: {found}" for found in re.findall(r"\b(?:tools|launch)/\w+\.py|configs/[\w-]+\.yaml", text)]
        for name, word in re.findall(r"(?<![\w/-])(ddpm-[a-z]+(?:-[a-z]+)*)(?![\w-])(?: (\w+))?", text):
            if name not in installed_programs() or (word and name in words and word not in words[name]):
                wrong.append(f"{path}: {name} {word}")
    assert not wrong


def installed_programs() -> dict[str, str]:
    """{program: function of `scripts`}, as setup.py has it."""
    tree = ast.parse((ROOT / "setup.py").read_text())
    assigned = {node.targets[0].id: node.value for node in tree.body if isinstance(node, ast.Assign)}
    return dict(ast.literal_eval(assigned["PROGRAMS"]))


@pytest.mark.parametrize(
    ("start", "words", "command", "program"),
    [
        (scripts.shards, ["make", "digits"], "make_shards", "ddpm-shards make"),
        (scripts.inspect, ["batch", "digits"], "inspect_batch", "ddpm-inspect batch"),
        (scripts.by_name, ["train-deepspeed", "digits"], "train_deepspeed", "ddpm-train-deepspeed"),
        (scripts.by_name, ["shards", "index", "digits"], "index_shards", "ddpm-shards index"),
    ],
)
def test_the_first_word_names_the_command(
    start: Callable[[], None], words: list[str], command: str, program: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []
    monkeypatch.setattr(scripts, "_run", ran.append)
    monkeypatch.setattr(sys, "argv", ["/bin/x", *words])
    start()
    assert (ran, sys.argv) == ([command], [program, "digits"])


@pytest.mark.parametrize(
    ("words", "code"), [(["shards"], 2), (["shards", "mak"], 2), ([], 2), (["sampel"], 2), (["--help"], 0)]
)
def test_an_unknown_word_says_which_there_are(words: list[str], code: int, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "ddpm_dist.commands", *words],
        capture_output=True, text=True, timeout=120, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == code
    said, other = (done.stderr, done.stdout) if code else (done.stdout, done.stderr)
    assert other == ""
    names = "ddpm-shards make|index|verify" if words[:1] == ["shards"] else "ddpm_dist.commands train|train-deepspeed|"
    assert names in said
    assert said.startswith("usage: ")


def test_what_imports_a_command_keeps_its_ctrl_c() -> None:
    code = (
        "import signal, ddpm_dist.commands.inspect_batch; "
        "print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.stdout == "True\n", done.stderr


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        (cli.url, "data/x", "write s3://BUCKET/FOLDER"),
        (cli.url, "", "not an absolute URL"),
        (cli.url, "S3://b/x", "not an absolute URL"),
        (cli.url, "s3://b/x?secret=1", "use the environment"),
        (cli.url, "file:x", "not an absolute URL"),
        (cli.positive, "0", "from 1 on"),
        (cli.positive, "-3", "from 1 on"),
        (cli.count, "-1", "from 0 on"),
        (cli.percent, "500", "from 1 to 100"),
        (cli.percent, "0", "from 1 to 100"),
        (cli.seed, "-1", "from 0 to"),
        (cli.seed, str(2**63), "from 0 to"),
    ],
)
def test_words_of_commands(kind: Callable[[str], object], text: str, message: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=message):
        kind(text)
