"""What the command line does before it computes: it answers without importing torch."""

import subprocess
import sys
from pathlib import Path

import pytest

_CHECK = """
import sys
from krrst_fast.cli.main import main
try:
    code = main(sys.argv[1:])
except SystemExit as stop:
    code = stop.code or 0
print("torch" in sys.modules, file=sys.stderr)
sys.exit(code)
"""


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        ("--version", 0, "krrst "),
        ("--help", 0, "COMMAND"),
        ("distill --help", 0, "--num_images"),
        ("distill --wrong 1", 2, "no flag --wrong"),
        ("distill --store X --target Y --out Z --num_images 0", 2, "at least 1"),
        ("distill --store nowhere --target Y --out Z --num_images 3", 2, "nowhere"),
        ("target --store nowhere --out Z", 2, "nowhere"),
        ("evaluate nowhere --store X", 2, "nowhere"),
        ("prepare nowhere OUT", 2, "nowhere"),
        ("report nowhere", 2, "nowhere"),
        ("info nowhere", 2, "nowhere"),
        ("distil", 2, "distill"),
        ("distill --model resnet10", 2, "did you mean --pool.model.kind"),
        ("distill --momentum 0", 2, "did you mean --pool.momentum?"),
        ("target --model resnet10 --num_im 3", 2, "did you mean --model.kind?"),
        ("distill --num_im 3", 2, "did you mean --num_images?"),
        ("evaluate R --store S --methods distiled", 2, "'distiled'; did you mean distilled?"),
        ("evaluate R --store S --methods none,distilled", 2, "RUN: R: there is no such file"),
        ("evaluate R --store S --methods none,none", 2, "methods must be given once each"),
        ("distill --sinks tensorbord", 2, "'tensorbord'; did you mean tensorboard?"),
        ("baseline", 2, "METHOD must be given"),
        ("baseline --help", 0, "mkdt"),
        ("baseline dmm --store S", 2, "did you mean dm?"),
        ("baseline dsa --help", 0, "--images_per_class"),
        ("baseline dm --out Z --images_per_class 1 --lr -1", 2, "--store"),
        ("baseline dm --store S --out Z --images_per_class 1 --lr -1", 2, "lr must be positive"),
        ("baseline dm --store nowhere --out Z --images_per_class 1", 2, "--store: nowhere: there"),
        ("baseline mkdt --store used --target T --out Z --num_images 1", 2, "--target: T: there"),
        ("baseline dm --store images --out used --images_per_class 1", 2, "is not empty"),
        ("prepare images used", 2, "used: the output folder exists and is not empty"),
        ("prepare images images --overwrite true", 2, "holds no index.json"),
        ("target --store images --out used", 2, "used: the output folder exists and is not"),
        ("distill --store images --target images --out used --num_images 3", 2, "is not empty"),
        ("distill --store images --target images --out used --num_images 3 --resume", 2, "no run"),
    ],
)
def test_answers_and_refusals_do_without_torch(words: str, code: int, says: str, tmp_path: Path):
    for name in ("images", "used"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    done = subprocess.run(
        [sys.executable, "-c", _CHECK, *words.split()],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"PYTHONPATH": str(Path(__file__).resolve().parent.parent)},
    )
    *errors, imported = done.stderr.splitlines()
    assert (done.returncode, imported) == (code, "False"), done.stderr
    assert says in done.stdout + "\n".join(errors)


_NAMES = """
import sys
from importlib import import_module
from pathlib import Path
for name in ("baselines", "data", "distill", "evaluate", "models", "targets"):
    package = import_module(f"krrst_fast.{name}")
    submodules = {path.stem for path in Path(package.__file__).parent.glob("*.py")}
    lazy = set(package.__all__) - set(vars(package))
    assert not lazy & submodules, (name, lazy & submodules)
    assert set(package.__all__) <= set(dir(package)), name
    assert all(getattr(package, one) is not None for one in package.__all__), name
"""


def test_no_lazy_name_of_a_package_is_that_of_a_submodule() -> None:
    """Importing the submodule would take the place of what is imported when it is first used."""
    done = subprocess.run([sys.executable, "-c", _NAMES], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("closed", ["1>&-", "2>&-", "1>&- 2>&-"])
def test_streams_that_a_shell_has_closed(tmp_path: Path, closed: str) -> None:
    command = f'"{sys.executable}" -m krrst_fast prepare digits out --size 8 --limit 5 {closed}'
    done = subprocess.run(
        ["sh", "-c", command],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"PYTHONPATH": str(Path(__file__).resolve().parent.parent)},
    )
    assert done.returncode == 0 and (tmp_path / "out" / "index.json").exists(), done.stderr
    assert "Traceback" not in done.stderr
