"""The `krrst` command: the whole chain on a few digits, and one clear line for each mistake."""

import json
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from krrst_fast.cli.main import main

pytest.importorskip("docstring_parser")

TARGET = shlex.split(
    "--model.kind convnet --model.widths [8,8] --num_outputs 6 --steps 4 --batch_size 32 "
    "--projector [16] --warmup_steps 1"
)
DISTILL = shlex.split(
    "--num_images 5 --steps 6 --batch_size 16 --pool.size 2 --pool.online_steps 4 "
    "--pool.model.widths [8,8] --log_every 2 --checkpoint_every 3"
)
EVALUATE = shlex.split(
    "--seeds 2 --methods [none,random_target,distilled] --model.widths [8,8] --pretrain.steps 4 "
    "--probe.solver ridge --probe.labels 2 --finetune.steps 0"
)


@dataclass(frozen=True)
class Answer:
    """What a command line gave."""

    code: int
    out: str
    err: str


Krrst = Callable[..., Answer]


@pytest.fixture
def krrst(capsys: pytest.CaptureFixture[str]) -> Krrst:
    """Runs a command line in this process."""

    def run(*argv: object) -> Answer:
        capsys.readouterr()
        code = main([str(arg) for arg in argv])
        out, err = capsys.readouterr()
        return Answer(code, out, err)

    return run


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The five commands on 90 digits; its folder."""
    root = tmp_path_factory.mktemp("chain")
    store, target, run = root / "store", root / "target", root / "run"
    for line in (
        ["prepare", "digits", store, "--run", "digits", "--size", 8, "--limit", 90],
        ["target", "--run", "digits", "--store", store, "--out", target, *TARGET],
        *[
            [
                "distill",
                "--run=digits",
                "--store",
                store,
                "--target",
                target,
                "--out",
                out,
                *DISTILL,
            ]
            for out in (run, root / "again")
        ],
        ["evaluate", run, "--run", "digits", "--store", store, *EVALUATE],
        ["report", run],
    ):
        assert main([str(word) for word in line]) == 0, line
    return root


def _fails(answer: Answer, *words: str) -> None:
    assert answer.code == 2, answer
    assert answer.err.startswith("krrst: error: ") and answer.err.count("\n") == 1, answer.err
    for word in words:
        assert word in answer.err, answer.err


def test_chain_leaves_what_it_says(chain: Path) -> None:
    run = chain / "run"
    assert (run / "report.html").read_text().count("<img") > 0
    (result,) = (run / "evaluation").glob("*.json")
    rows = json.loads(result.read_text())["rows"]
    assert len(rows) == 2 * 3
    assert all(0 <= row["scores"]["probe-2"] <= 100 for row in rows)
    config = json.loads((run / "config.json").read_text())
    assert config["pool"]["model"]["widths"] == [8, 8]
    assert config["num_images"] == 5
    # What the preset says and no flag overrode.
    assert config["lr"] == 1e-2 and config["views"]["flip"] is False


def test_same_command_gives_the_same_bytes(chain: Path) -> None:
    one, two = (chain / name / "distilled.safetensors" for name in ("run", "again"))
    assert one.read_bytes() == two.read_bytes()


def test_messages_name_the_result_and_the_next_command(krrst: Krrst, tmp_path: Path) -> None:
    out = tmp_path / "store"
    answer = krrst("prepare", "digits", out, "--size", 8, "--limit", 20, "--run", "digits")
    assert answer.code == 0 and answer.err == ""
    assert answer.out.splitlines() == [
        f"wrote {out}: 20 train, 20 test images of 8x8, 10 classes",
        "left out: nothing",
        f"next: krrst target --run digits --store {out} --out TARGET",
    ]


def test_info(krrst: Krrst, chain: Path) -> None:
    told = krrst("info")
    assert told.code == 0 and re.search(r"^torch +2\.", told.out, re.MULTILINE)
    assert re.search(r"^extension +(loaded|not loaded: .+)", told.out, re.MULTILINE)
    for path, words in (
        ("store", ["image store", "90 train, 90 test", "3x8x8", "checksums  verified"]),
        ("target", ["target network", "outputs     6"]),
        ("target/target.safetensors", ["target network"]),
        ("run", ["distillation run", "the result, after 6 steps", "5x3x8x8", "5x6"]),
        ("run/distilled.safetensors", ["distilled set", "5x3x8x8"]),
    ):
        told = krrst("info", chain / path)
        assert told.code == 0 and told.err == "", told
        for word in words:
            assert word in told.out, told.out
    _fails(krrst("info", chain), "neither a store")
    _fails(krrst("info", chain / "nothing"), "there is no such file or folder")


def test_info_finds_a_flipped_byte_in_a_store(krrst: Krrst, chain: Path, tmp_path: Path) -> None:
    for name in ("images.u8", "labels.i64"):
        copy = Path(shutil.copytree(chain / "store", tmp_path / name))
        content = bytearray((copy / name).read_bytes())
        content[len(content) // 2] ^= 0xFF
        (copy / name).write_bytes(content)
        _fails(krrst("info", copy), f"{name}: the checksum is wrong, the file is damaged")


def test_help_lists_settings_with_the_values_of_the_run(krrst: Krrst) -> None:
    assert krrst("--help").out.count("\n") > 8
    for command in ("prepare", "target", "distill", "evaluate", "report", "info"):
        with pytest.raises(SystemExit) as stopped:
            main([command, "--help"])
        assert stopped.value.code == 0


def test_help_needs_no_torch() -> None:
    code = (
        "import sys; from krrst_fast.cli.main import main\n"
        "assert main(['--help']) == 0 and 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


DISTILL_PATHS = ["--store", "{store}", "--target", "{target}", "--out", "{new}"]
MISTAKES = {
    "no command": (["distil"], ["there is no command 'distil'; did you mean distill?"]),
    "unknown run": (["distill", "--run", "digit"], ["no run 'digit'", "cifar100", "digits"]),
    "unknown flag": (
        ["distill", "--pool.sise", "6"],
        ["there is no flag --pool.sise; did you mean --pool.size?"],
    ),
    "flag without value": (["distill", "--steps"], ["--steps needs a value"]),
    "stray word": (["distill", "digits"], ["unexpected arguments: digits"]),
    "missing settings": (
        ["distill", "--run", "digits", "--store", "{store}"],
        ["--target and --out must be given"],
    ),
    "missing positional": (["evaluate", "--store", "{store}"], ["RUN must be given"]),
    "missing report": (["report"], ["the following arguments are required: run"]),
    "wrong number": (
        ["distill", "--steps", "many"],
        ["--steps must be a whole number, got 'many'"],
    ),
    "wrong fraction": (["distill", "--steps", "1.5"], ["--steps must be a whole number, got 1.5"]),
    "wrong choice": (
        ["distill", "--pool.reset", "no"],
        ["--pool.reset must be one of paper, released, got 'no'"],
    ),
    "wrong list": (["distill", "--pool.model.widths", "x"], ["must be a list such as [1, 2]"]),
    "wrong range": (
        ["distill", *DISTILL_PATHS, *DISTILL, "--lr", "-1"],
        ["lr must be at least 0, got -1.0"],
    ),
    "not finite": (
        ["distill", *DISTILL_PATHS, *DISTILL, "--lr", ".inf"],
        ["lr must be a finite number, got inf"],
    ),
    "no YAML file": (["distill", "--config", "{tmp}/no.yaml"], ["no.yaml: No such file"]),
    "YAML is a folder": (["distill", "--config", "{tmp}"], ["Is a directory"]),
    "no source": (["prepare", "{tmp}/none", "{new}"], ["none"]),
    "empty source": (["prepare", "{empty}", "{new}"], ["empty"]),
    "output exists": (
        ["prepare", "digits", "{store}", "--size", "8"],
        ["store: the output folder exists and is not empty"],
    ),
    "output below a file": (["prepare", "digits", "/dev/null/x/y"], ["/dev/null"]),
    "no store": (["target", "--store", "{empty}", "--out", "{new}", *TARGET], ["empty"]),
    "store is a file": (
        ["target", "--store", "{target}/target.safetensors", "--out", "{new}", *TARGET],
        ["target.safetensors"],
    ),
    "target is a store": (
        ["distill", "--store", "{store}", "--target", "{store}", "--out", "{new}", *DISTILL],
        ["is an image store, not a target"],
    ),
    "too few images": (
        ["distill", *DISTILL_PATHS, *DISTILL, "--num_images", "91"],
        ["num_images is 91", "has 90"],
    ),
    "device": (
        ["distill", *DISTILL_PATHS, *DISTILL, "--device", "gpu"],
        ["must be auto, cpu, cuda"],
    ),
    "run in use": (
        ["distill", "--store", "{store}", "--target", "{target}", "--out", "{run}", *DISTILL],
        ["run: the output folder exists"],
    ),
    "resume with other settings": (
        [
            *["distill", "--store", "{store}", "--target", "{target}", "--out", "{run}"],
            *[*DISTILL, "--resume", "--lr", "0.5"],
        ],
        ["lr"],
    ),
    "no run": (["evaluate", "{empty}", "--store", "{store}", *EVALUATE], ["empty"]),
    "no report": (["report", "{empty}"], ["empty"]),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_get_one_line(name: str, krrst: Krrst, chain: Path, tmp_path: Path) -> None:
    line, words = MISTAKES[name]
    (tmp_path / "empty").mkdir()
    places = {place: chain / place for place in ("store", "target", "run")}
    places |= {"tmp": tmp_path, "empty": tmp_path / "empty", "new": tmp_path / "new"}
    before = {path: path.stat().st_mtime_ns for path in chain.rglob("*")}
    _fails(krrst(*(word.format(**places) for word in line)), *words)
    assert {path: path.stat().st_mtime_ns for path in chain.rglob("*")} == before, "lost something"
    assert not list(tmp_path.glob(".*")), "left something half done"


def test_unlabelled_store_is_refused_by_a_probe(krrst: Krrst, chain: Path, tmp_path: Path) -> None:
    from PIL import Image

    (tmp_path / "bare").mkdir()
    for i in range(12):
        Image.new("RGB", (8, 8), (20 * i, 0, 0)).save(tmp_path / f"bare/{i}.png")
    store = tmp_path / "unlabelled"
    assert krrst("prepare", tmp_path / "bare", store, "--size", 8).code == 0
    answer = krrst("evaluate", chain / "run", "--store", store, *EVALUATE, "--name", "bare")
    _fails(answer, "unlabelled", "label")


def test_broken_image_is_named(krrst: Krrst, tmp_path: Path) -> None:
    from PIL import Image

    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(4):
        Image.new("RGB", (9, 7), (60 * i, 9, 0)).save(folder / f"{i}.jpg")
    (folder / "2.jpg").write_bytes((folder / "2.jpg").read_bytes()[:200])
    _fails(krrst("prepare", folder, tmp_path / "a", "--size", 8), "2.jpg")
    answer = krrst("prepare", folder, tmp_path / "b", "--size", 8, "--on_error", "skip")
    assert answer.code == 0 and "2.jpg" in answer.err and "3 train" in answer.out, answer
    assert "2.jpg" in krrst("info", tmp_path / "b").out


def test_missing_extra_is_named(krrst: Krrst, monkeypatch: pytest.MonkeyPatch) -> None:
    for module, extra in (("docstring_parser", "cli"), ("yaml", "cli")):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, module, None)
            answer = krrst("distill", "--print-config")
        _fails(answer, f"needs {module}: pip install 'krrst-fast[{extra}]'")
    for name in ("docstring_parser", "yaml", "safetensors", "tqdm", "PIL", "sklearn", "matplotlib"):
        monkeypatch.setitem(sys.modules, name, None)
    assert krrst("info").code == 0


def _start(*argv: object) -> "subprocess.Popen[str]":
    words = [sys.executable, "-m", "krrst_fast", *map(str, argv)]
    return subprocess.Popen(
        words,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell starts what runs in its background with this signal ignored, and so are we.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def _wait_for(path: Path, process: "subprocess.Popen[str]") -> None:
    deadline = time.monotonic() + 60
    while not (path.exists() and path.stat().st_size):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, f"{path} did not come"
        time.sleep(0.02)


def test_interrupt_and_resume(krrst: Krrst, chain: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    paths = ["--store", chain / "store", "--target", chain / "target", "--out", out]
    long = [*DISTILL, "--steps", 1_000_000, "--checkpoint_every", 1]
    process = _start("distill", *paths, *long)
    _wait_for(out / "metrics.jsonl", process)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    told = r".* views in .*\nkrrst: error: interrupted by SIGINT after step (\d+) of 1000000, "
    told = re.fullmatch(told + "which is saved; the same command with --resume goes on\n", err)
    assert told, err
    assert f"step {told[1]} of 1000000" in krrst("info", out).out
    _fails(krrst("distill", *paths, *long), "the output folder exists")
    _fails(krrst("distill", *paths, *long), "--resume goes on with the run in it")
    process = _start("distill", *paths, *long, "--resume")
    rows = (out / "metrics.jsonl").read_text().count("\n")
    deadline = time.monotonic() + 60
    while (out / "metrics.jsonl").read_text().count("\n") <= rows + 1:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.02)
    process.kill()
    process.communicate()


def test_full_disk_gets_one_line(tmp_path: Path) -> None:
    def small_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    done = subprocess.run(
        [sys.executable, "-m", "krrst_fast", "prepare", "digits", str(tmp_path / "store")],
        capture_output=True,
        text=True,
        timeout=60,
        preexec_fn=small_files,
    )
    _fails(Answer(done.returncode, done.stdout, done.stderr), "File too large")
    assert list(tmp_path.iterdir()) == [], "nothing half done is left"


def test_reader_that_goes_away() -> None:
    with _start("info") as process:
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(timeout=60) in (0, 141)
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "krrst_fast", "--help"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
        )
    _fails(Answer(done.returncode, "", done.stderr), "No space left on device")


def test_permission_denied(krrst: Krrst, tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write anywhere")
    tmp_path.chmod(0o500)
    try:
        _fails(krrst("prepare", "digits", tmp_path / "store"), "Permission denied")
    finally:
        tmp_path.chmod(0o700)


def test_bugs_keep_their_traceback(krrst: Krrst, monkeypatch: pytest.MonkeyPatch) -> None:
    import krrst_fast.cli.info

    def broken() -> dict[str, str]:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(krrst_fast.cli.info, "about_this_machine", broken)
    with pytest.raises(ZeroDivisionError, match="a bug"):
        main(["info"])


def test_installed_script() -> None:
    script = shutil.which("krrst", path=str(Path(sys.executable).parent))
    assert script is not None
    done = subprocess.run([script, "--version"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.fullmatch(r"krrst \d+\.\d+\.\d+\n", done.stdout)
