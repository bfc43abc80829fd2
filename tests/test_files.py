"""Files are whole or not there, through errors, kills and full disks."""

import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from krrst_fast.errors import CheckpointError, ConfigError, DataError
from krrst_fast.runs import files, tensors
from krrst_fast.runs.seal import KEY

STATE = {"weight": torch.arange(6.0), "step": 7, "names": ["a", "b"], "none": None}


def _run(code: str, *args: object) -> subprocess.CompletedProcess[str]:
    prelude = (
        "import os, signal, sys; from pathlib import Path\n"
        "from krrst_fast.runs import files, tensors\n"
    )
    return subprocess.run(
        [sys.executable, "-c", prelude + code, *map(str, args)],
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_state_round_trip(tmp_path: Path) -> None:
    tensors.save_state(tmp_path / "c.pt", STATE)
    back = tensors.load_state(tmp_path / "c.pt")
    assert torch.equal(back.pop("weight"), STATE["weight"])
    assert back == {"step": 7, "names": ["a", "b"], "none": None}
    assert [p.name for p in tmp_path.iterdir()] == ["c.pt"]


def test_error_inside_the_block_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    files.write_text(path, "old")
    with pytest.raises(ZeroDivisionError), files.atomic_path(path) as temporary:
        temporary.write_text("new")
        raise ZeroDivisionError
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_kill_between_write_and_rename_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    files.write_text(path, "old")
    code = (
        "with files.atomic_path(Path(sys.argv[1])) as temporary:\n"
        "    temporary.write_text('new')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    for _ in range(2):
        assert _run(code, path).returncode == -signal.SIGKILL
        assert path.read_text() == "old"
        assert len(list(tmp_path.iterdir())) == 2, "one leftover, however many kills"
    files.write_text(path, "newer")
    assert path.read_text() == "newer"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_leftover_of_a_living_process_is_left_alone(tmp_path: Path) -> None:
    other = tmp_path / f".a.txt.{os.getppid()}.tmp"
    other.write_text("being written")
    files.write_text(tmp_path / "a.txt", "mine")
    assert other.read_text() == "being written"


@pytest.mark.parametrize("process", ["own", "gone"])
def test_a_path_with_a_longer_name_keeps_what_is_its_own(tmp_path: Path, process: str) -> None:
    number = os.getpid() if process == "own" else _gone()
    theirs = [f".a.b.{number}.old", f".a.b.{number}.tmp", f".a.b.{number}-3.tmp", ".a.7x.tmp"]
    for name in theirs:
        (tmp_path / name).mkdir()
        (tmp_path / name / "only").write_text(name)
    (tmp_path / f".a.{number}-1.tmp").mkdir()
    with files.atomic_folder(tmp_path / "a") as temporary:
        (temporary / "new").write_text("")
    files.write_text(tmp_path / "a.bc", "")
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*theirs, "a", "a.bc"])
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["new"]
    assert all((tmp_path / name / "only").read_text() == name for name in theirs)
    with files.atomic_folder(tmp_path / "a.b", overwrite=True) as temporary:
        assert (tmp_path / "a.b/only").read_text() == theirs[0], "recovered by its own path"
    assert sorted(p.name for p in tmp_path.iterdir()) == [".a.7x.tmp", "a", "a.b", "a.bc"]


def test_two_writers_of_one_process_do_not_meet(tmp_path: Path) -> None:
    path = tmp_path / "a"
    with files.atomic_path(path) as first:
        first.write_text("first")
        with files.atomic_path(path) as second:
            second.write_text("second")
        assert path.read_text() == "second"
        files.write_text(path, "third")
        assert first.read_text() == "first"
    assert path.read_text() == "first"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def _gone() -> int:
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def test_kill_inside_atomic_folder_keeps_the_old_folder(tmp_path: Path) -> None:
    out = tmp_path / "store"
    with files.atomic_folder(out) as temporary:
        (temporary / "index.json").write_text("old")
    code = (
        "with files.atomic_folder(Path(sys.argv[1]), overwrite=True) as temporary:\n"
        "    (temporary / 'index.json').write_text('new')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert _run(code, out).returncode == -signal.SIGKILL
    assert (out / "index.json").read_text() == "old"


def test_kill_between_the_two_renames_gives_the_old_folder_back(tmp_path: Path) -> None:
    aside = tmp_path / f".store.{_gone()}.old"
    aside.mkdir()
    (aside / "index.json").write_text("old")
    with pytest.raises(ConfigError, match="exists and is not empty"):
        files.atomic_folder(tmp_path / "store").__enter__()
    assert (tmp_path / "store/index.json").read_text() == "old"


def test_a_failure_between_the_two_renames_puts_the_old_folder_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, rename = tmp_path / "store", os.rename
    with files.atomic_folder(out) as temporary:
        (temporary / "index.json").write_text("old")

    def fails(source: Path, target: Path) -> None:
        if Path(source).suffix == ".tmp":
            raise OSError(5, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fails)
    with pytest.raises(OSError, match="Input/output"), files.atomic_folder(out, overwrite=True):
        pass
    assert (out / "index.json").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["store"]


def test_atomic_folder_replaces_only_with_overwrite_and_only_its_own(tmp_path: Path) -> None:
    out = tmp_path / "store"
    with files.atomic_folder(out) as temporary:
        (temporary / "index.json").write_text("1")
    with files.atomic_folder(out, overwrite=True, marker="index.json") as temporary:
        (temporary / "other").write_text("2")
    assert [p.name for p in out.iterdir()] == ["other"]
    with pytest.raises(ConfigError, match="is not empty; --overwrite replaces it"):
        files.atomic_folder(out, marker="other").__enter__()
    with pytest.raises(ConfigError, match="holds no index.json"):
        files.atomic_folder(out, overwrite=True, marker="index.json").__enter__()
    assert (out / "other").read_text() == "2"
    assert [p.name for p in tmp_path.iterdir()] == ["store"]


def test_the_current_folder_is_refused_like_any_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "precious").write_text("")
    monkeypatch.chdir(tmp_path)
    for path in (Path("."), Path("sub/..")):
        with pytest.raises(ConfigError, match="holds no index.json"):
            files.atomic_folder(path, overwrite=True, marker="index.json").__enter__()


def test_new_folder(tmp_path: Path) -> None:
    assert files.new_folder(tmp_path / "a/b").is_dir()
    assert files.new_folder(tmp_path / "a/b").is_dir(), "an empty folder is as good as a new one"
    with pytest.raises(ConfigError, match="exists and is not empty"):
        files.new_folder(tmp_path / "a")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="a file of that name"):
        files.new_folder(tmp_path / "file", overwrite=True)


@pytest.mark.parametrize("kind", ["save_state", "save_tensors", "write_json"])
def test_full_disk_is_an_oserror_and_keeps_the_old_file(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "c.pt"
    small, big = {"x": torch.zeros(2)}, {"x": torch.zeros(100_000)}
    code = (
        "import resource, torch\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))\n"
        "big = {'x': torch.zeros(100_000)}\n"
        "try:\n"
        "    if sys.argv[2] == 'save_state': tensors.save_state(Path(sys.argv[1]), big)\n"
        "    if sys.argv[2] == 'save_tensors': tensors.save_tensors(Path(sys.argv[1]), big, {})\n"
        "    if sys.argv[2] == 'write_json': files.write_json(Path(sys.argv[1]), [0] * 100_000)\n"
        "except OSError as error:\n"
        "    print('OSError', error.errno)\n"
    )
    assert big["x"].nbytes > 50_000 > small["x"].nbytes
    tensors.save_state(path, small)
    before = path.read_bytes()
    done = _run(code, path, kind)
    assert done.stdout.startswith("OSError 27"), done.stdout + done.stderr
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["c.pt"]
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 50_000


def test_tensors_round_trip(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors")
    path = tmp_path / "t.safetensors"
    tensors.save_tensors(path, {"x": torch.eye(3).T[:, :2]}, {"format_version": "1"})
    with safetensors.safe_open(path, "pt") as file:
        assert torch.equal(file.get_tensor("x"), torch.eye(3)[:, :2])
        metadata = file.metadata()
        assert metadata.pop(KEY).startswith("krrst sha256 ")
        assert metadata == {"format_version": "1"}


def test_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    path = tmp_path / "c.pt"
    with pytest.raises(CheckpointError, match="c.pt: there is no such checkpoint"):
        tensors.load_state(path)
    tensors.save_state(path, STATE)
    whole = path.read_bytes()
    middle = bytearray(whole)
    middle[20:200] = b"\xff" * 180
    for damaged in (b"", b"hello", whole[:100], whole[:-1], bytes(middle), bytes(500)):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="c.pt: not a readable checkpoint"):
            tensors.load_state(path)
    torch.save(torch.zeros(2), path)
    with pytest.raises(CheckpointError, match="holds a Tensor"):
        tensors.load_state(path)


def test_checkpoint_runs_no_code(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.system, (f"touch {tmp_path / 'owned'}",)

    torch.save({"x": Evil()}, tmp_path / "c.pt")
    with pytest.raises(CheckpointError, match="not a readable checkpoint"):
        tensors.load_state(tmp_path / "c.pt")
    assert not (tmp_path / "owned").exists()


def test_json(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    files.write_json(path, {"a": [1, 2.5, None]})
    assert files.read_json(path) == {"a": [1, 2.5, None]}
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.write_json(path, {"a": float("nan")})
    assert files.read_json(path) == {"a": [1, 2.5, None]}
    for bad in (b'{"a": ', b"\xff\xfe"):
        path.write_bytes(bad)
        with pytest.raises(DataError, match="a.json: not a JSON file"):
            files.read_json(path)
    with pytest.raises(DataError, match="there is no such file"):
        files.read_json(tmp_path / "b.json")


def test_a_log_cut_anywhere_keeps_its_whole_rows_and_says_what_is_left_out(
    tmp_path: Path,
) -> None:
    path = tmp_path / "metrics.jsonl"
    assert files.read_jsonl(path) == []
    rows = [{"step": 1}, {"step": 2, "name": "\u2028é"}]
    for row in rows:
        files.append_jsonl(path, row)
    good = path.read_bytes()
    first = good.index(b"\n") + 1
    added = {"step": 3}
    for cut in range(len(good)):
        path.write_bytes(good[:cut])
        whole = (cut >= first - 1) + (cut >= len(good) - 1)
        if cut in (0, first - 1, first, len(good) - 1):
            assert files.read_jsonl(path) == rows[:whole]
        else:
            lost = f"the last line, {cut - first * whole} bytes, was cut short.*; {whole} rows"
            with pytest.warns(UserWarning, match=lost):
                assert files.read_jsonl(path) == rows[:whole]
        files.append_jsonl(path, added)
        assert files.read_jsonl(path) == [*rows[:whole], added]


def test_a_damaged_end_of_the_last_line_is_not_a_cut(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    files.append_jsonl(path, {"step": 1})
    good = path.read_bytes()
    for bit in range(8):
        path.write_bytes(good[:-1] + bytes([good[-1] ^ 1 << bit]))
        for use in (files.read_jsonl, lambda path: files.append_jsonl(path, {"step": 2})):
            with pytest.raises(DataError, match=r"metrics.jsonl: the end of the last line is '"):
                use(path)
    path.write_bytes(good[:-2].replace(b"1", b"2", 1) + good[-2:-1])
    with pytest.raises(DataError, match=r"metrics.jsonl: line 1: the checksum is wrong"):
        files.read_jsonl(path)


def test_damaged_log_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(DataError, match=r"metrics.jsonl: line 2 is not a JSON object"):
        files.read_jsonl(path)


def test_an_interrupt_while_saving_is_an_interrupt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "state.pt"
    tensors.save_state(path, {"x": torch.ones(1000)})
    before, written = path.read_bytes(), []

    def write(self: object, data: bytes) -> int:
        written.append(data)
        if len(written) == 3:
            raise KeyboardInterrupt
        return len(data)

    monkeypatch.setattr(tensors.Sink, "write", write)
    with pytest.raises(KeyboardInterrupt):
        tensors.save_state(path, {"x": torch.zeros(1000)})
    assert len(written) >= 3 and path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
