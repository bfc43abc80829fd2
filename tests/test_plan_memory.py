"""The planner's memory: what is counted is what is allocated, and what fits is computed."""

import json
import os
import random
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from krrst_fast import krr_mse, operators, plan
from krrst_fast.ops.solver import Solver
from krrst_fast.planner import FORMS, limits
from krrst_fast.planner.limits import free_memory, free_on_cpu
from krrst_fast.planner.sizes import suits_whole

ROOT = Path(__file__).resolve().parent.parent
MB = 10**6

needs_extension = pytest.mark.skipif(not operators.HAS_EXTENSION, reason=operators.EXTENSION)
needs_linux = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="asks Linux")


@pytest.fixture(scope="module")
def counter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library that counts the heap."""
    compiler = shutil.which("cc")
    if compiler is None or os.confstr("CS_GNU_LIBC_VERSION") is None:
        pytest.skip("counting the heap needs a C compiler and glibc")
    library = tmp_path_factory.mktemp("counter") / "malloc_peak.so"
    source = str(ROOT / "tests" / "malloc_peak.c")
    subprocess.run([compiler, "-O2", "-shared", "-fPIC", source, "-o", str(library)], check=True)
    return library


def calls(what: str, *rows: list[Any], **environment: str) -> list[Any]:
    """What `tests.memory_calls` found."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "tests.memory_calls", what],
        input=json.dumps(rows),
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def grid(count: int, seed: int, most: int, flops: float) -> list[list[Any]]:
    """Calls of random sizes from 10 to 4000, whose inputs and peak stay below `most` bytes."""
    draw, rows = random.Random(seed), []
    while len(rows) < count:
        m, b, d, p = (round(10 ** draw.uniform(1, 3.6)) for _ in range(4))
        itemsize, bias, form = draw.choice([4, 8]), draw.choice([0.0, 1.0]), draw.choice(FORMS)
        planned = plan(m=m, b=b, d=d, p=p, itemsize=itemsize)
        total, work = planned.inputs + planned.bytes[form], planned.flops[form]
        if (form != "primal" or m > d) and total < most and work < flops:
            rows.append([m, b, d, p, itemsize, bias, form])
    return rows


def misses(rows: list[list[Any]], measured: list[int]) -> list[str]:
    """Calls whose peak is not within 10 % of the plan, or within 0.1 MB."""
    found = []
    for (m, b, d, p, itemsize, bias, form), size in zip(rows, measured):
        counted = plan(m=m, b=b, d=d, p=p, itemsize=itemsize).bytes[form]
        if abs(size - counted) > max(0.1 * counted, 0.1 * MB * (counted < MB)):
            found.append(f"{(m, b, d, p, itemsize, bias, form)}: {size / counted:.3f}")
    return found


def by_avx512() -> bool:
    return torch.ops.krrst_fast.isa() == "avx512"


@needs_extension
def test_the_peak_is_what_is_allocated(counter: Path) -> None:
    rows = grid(60, seed=0, most=100 * MB, flops=1e9)
    rows += [[512, 60, 100, 9, 4, 1.0, "k"], [513, 60, 100, 9, 4, 0.0, "w"]]
    rows += [[900, 60, 511, 40, 4, 1.0, "primal"], [900, 60, 512, 40, 4, 0.0, "primal"]]
    rows += [[300, 200, 900, 300, 2, 1.0, "k"], [700, 20, 90, 30, 2, 0.0, "w"]]
    if not by_avx512():  # the operators for small problems copy other factors
        rows = [x for x in rows if not suits_whole(x[6], 1, x[0], x[2], x[1], x[3])]
    assert len(rows) > 10 and misses(rows, calls("allocated", *rows, LD_PRELOAD=str(counter))) == []


@needs_extension
@pytest.mark.slow
def test_the_peak_is_what_is_allocated_for_many_shapes(counter: Path) -> None:
    if not by_avx512():
        pytest.skip("the planner counts for AVX-512")
    rows = grid(400, seed=1, most=150 * MB, flops=4e9)
    rows += grid(40, seed=2, most=600 * MB, flops=4e10)
    assert misses(rows, calls("allocated", *rows, LD_PRELOAD=str(counter))) == []


@needs_extension
@needs_linux
@pytest.mark.slow
def test_the_process_takes_what_is_counted() -> None:
    rows = [[3000, 500, 2000, 100, 8, 1.0, form] for form in FORMS]
    rows += [[200, 4000, 4000, 1000, 4, 0.0, form] for form in ("k", "w")]
    # glibc gives freed blocks of this size back at once, so that the peak is one of live memory.
    kept = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    assert misses(rows, calls("resident", *rows, **kept)) == []


# B rows of F_r need more than the rest: a smaller memory still has room for some.
SHAPE: dict[str, int] = {"m": 400, "b": 4000, "d": 1000, "p": 300}


@needs_extension
@needs_linux
def test_what_fits_is_computed_and_what_does_not_is_refused() -> None:
    planned = plan(**SHAPE)
    needs = planned.inputs + planned.peak
    call = [*SHAPE.values(), 4, 1.0, planned.form]
    kept = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    shares = (1.1, 0.9, 0.7)
    ample, scarce, half = calls(
        "limited", *([*call, int(share * needs)] for share in shares), **kept
    )
    assert ample["fits"] is True and ample["chunk"] is None and ample["at once"] == "computed"
    for found, share in ((scarce, 0.9), (half, 0.7)):
        assert share * needs - 2 * MB < found["memory"] <= share * needs
        assert found["fits"] is False and 1 < found["chunk"] < SHAPE["b"]
        assert found["chunks"] == -(-SHAPE["b"] // found["chunk"])
        assert "memory" in found["at once"] or "alloc" in found["at once"]
    assert half["chunk"] < scarce["chunk"]


def test_the_limit_is_the_edge() -> None:
    planned = plan(**SHAPE)
    assert (planned.memory, planned.fits, planned.chunk) == (None, None, None)
    assert planned.peak == planned.bytes[planned.form]
    assert planned.inputs == 4 * (400 + 4000) * (1000 + 300)
    needs = planned.inputs + planned.peak
    fits = plan(**SHAPE, memory=needs)
    assert (fits.form, fits.memory, fits.fits, fits.chunk) == (planned.form, needs, True, None)
    assert fits.reason.startswith(planned.reason) and "MB of inputs and" in fits.reason
    less = plan(**SHAPE, memory=int(0.9 * needs))
    assert less.fits is False and 0 < less.chunk < SHAPE["b"]
    assert f"at most {less.chunk} of B = 4000 rows" in less.reason
    none = plan(**SHAPE, memory=10**6)
    assert (none.form, none.fits, none.chunk) == (planned.form, False, 0)
    assert "nor does one row of F_r at a time" in none.reason


def test_another_form_is_taken_where_it_fits() -> None:
    sizes = {"m": 3000, "b": 3000, "d": 4000, "p": 1600}
    planned = plan(**sizes)
    other = min(planned.bytes, key=lambda form: planned.bytes[form] if form != "primal" else 1e99)
    assert other != planned.form
    found = plan(**sizes, memory=planned.inputs + planned.bytes[other])
    assert found.form == other and found.fits and found.peak == planned.bytes[other]
    assert f'"{planned.form}" does not fit and "{other}" is taken' in found.reason


@pytest.mark.parametrize("itemsize", [4, 8])
def test_a_chunk_is_the_largest(itemsize: int) -> None:
    """One row more, as a whole problem beside the sum of the gradients, would not fit."""
    draw, found = random.Random(0), 0
    for _ in range(100):
        m, b, d, p = (draw.randint(600, 1000) for _ in range(4))
        whole = plan(m=m, b=b, d=d, p=p, itemsize=itemsize)
        memory = int((whole.inputs + whole.peak) * draw.uniform(0.6, 0.99))
        planned = plan(m=m, b=b, d=d, p=p, itemsize=itemsize, memory=memory)
        summed = m * (d + p) * itemsize
        if planned.fits or not 0 < planned.chunk < b - 1:
            continue
        found += 1
        needs = []
        for rows in (planned.chunk, planned.chunk + 1):
            part = plan(m=m, b=rows, d=d, p=p, itemsize=itemsize)
            needs.append(part.inputs + part.bytes[planned.form] + summed)
        assert needs[0] <= memory < needs[1]
    assert found > 20


def test_chunks_sum_to_the_whole() -> None:
    draw = torch.Generator().manual_seed(0)
    shapes = ((30, 20), (30, 4), (50, 20), (50, 4))
    f_syn, y_syn, *real = (torch.randn(s, generator=draw, dtype=torch.float64) for s in shapes)
    leaves = [f_syn.requires_grad_(), y_syn.requires_grad_()]
    exact = krr_mse(*leaves, *real, ridge=1e-2)
    expected = torch.autograd.grad(exact, leaves)
    planned = plan(m=30, b=50, d=20, p=4, itemsize=8, memory=35_000)
    assert planned.chunk is not None and 1 < planned.chunk < 50
    total = torch.zeros((), dtype=torch.float64)
    for f, y in zip(*(x.split(planned.chunk) for x in real)):
        loss = krr_mse(*leaves, f, y, ridge=1e-2, solver=Solver(form=planned.form))
        loss = loss * (len(f) / 50)
        loss.backward()
        total += loss.detach()
    torch.testing.assert_close(total, exact)
    for x, gradient in zip(leaves, expected):
        torch.testing.assert_close(x.grad, gradient)


@pytest.mark.parametrize("memory", [1.5, True, [], b"auto"])
def test_memory_of_another_type(memory: Any) -> None:
    with pytest.raises(TypeError, match="plan: memory must be a whole number, 'auto' or None, got"):
        plan(m=1, b=1, d=1, p=1, memory=memory)


@pytest.mark.parametrize("memory,says", [("8GB", "'8GB'"), (-1, "negative, got -1")])
def test_memory_of_another_value(memory: Any, says: str) -> None:
    with pytest.raises(ValueError, match=f"plan: memory must .*{says}"):
        plan(m=1, b=1, d=1, p=1, memory=memory)


@pytest.mark.parametrize("device", ["cpu:0", "cuda:", "cuda:x", "mps", 0])
def test_another_device(device: Any) -> None:
    with pytest.raises(ValueError, match="plan: device must be 'cpu', 'cuda' or 'cuda:i', got"):
        plan(m=1, b=1, d=1, p=1, device=device)


def test_degenerate_sizes_fit() -> None:
    for sizes in ((0, 0, 0, 0), (0, 5, 3, 2), (5, 0, 3, 2), (5, 3, 0, 2), (5, 3, 2, 0)):
        m, b, d, p = sizes
        planned = plan(m=m, b=b, d=d, p=p, memory=10**6)
        assert planned.fits and planned.peak >= 0
        assert plan(m=m, b=b, d=d, p=p, memory=0).chunk == (None if planned.inputs == 0 else 0)


def test_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def left(device: str) -> tuple[int, int]:
        asked.append(device)
        return 70 * MB, 90 * MB

    monkeypatch.setattr(torch.cuda, "mem_get_info", left)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 12 * MB)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 5 * MB)
    planned = plan(**SHAPE, memory="auto", device="cuda:1")
    assert planned.memory == 77 * MB and asked == ["cuda:1"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu() -> None:
    with pytest.raises(ValueError, match="plan: device must be a GPU that torch sees, got 'cuda'"):
        plan(**SHAPE, memory="auto", device="cuda")


Tree = Callable[..., Path]


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tree:
    """Make a root with the given files, by path, and no limit of the process."""
    unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    monkeypatch.setattr(resource, "getrlimit", lambda which: unlimited)

    def made(**files: Any) -> Path:
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(str(text), encoding="utf-8")
        return tmp_path

    return made


V2 = {
    "proc/self/cgroup": "0::/user/job\n",
    "proc/self/mountinfo": "31 23 0:28 / /sys/fs/cgroup rw shared:9 - cgroup2 cgroup2 rw\n",
}
V1 = {
    "proc/self/cgroup": "5:cpu:/\n4:memory,pids:/box/job\n0::/\n",
    "proc/self/mountinfo": (
        "32 31 0:29 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n"
        "35 31 0:32 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
        "41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n"
    ),
}
JOB2, JOB1 = "sys/fs/cgroup/user/job/memory.", "sys/fs/cgroup/memory/box/job/memory."
UP2, UP1 = "sys/fs/cgroup/user/memory.", "sys/fs/cgroup/memory/box/memory."


def v2(at: str, limit: Any, used: int, cache: int = 0, **more: Any) -> dict[str, Any]:
    stat = f"anon 5\ninactive_file {cache}\nactive_file 7\n"
    files = {f"{at}max": f"{limit}\n", f"{at}current": used, f"{at}stat": stat}
    return files | {f"{at}{name}": text for name, text in more.items()}


def v1(at: str, limit: Any, used: int, cache: int = 0) -> dict[str, Any]:
    stat = f"inactive_file 1\ntotal_inactive_file {cache}\n"
    return {f"{at}limit_in_bytes": limit, f"{at}usage_in_bytes": used, f"{at}stat": stat}


@pytest.mark.parametrize(
    "files,left",
    [
        (v2(JOB2, 1000, 300), 700),
        (v2(JOB2, 1000, 300, cache=100), 800),
        (v2(JOB2, "max", 300), None),
        (v2(JOB2, 1000, 300, high=900), 600),
        (v2(JOB2, "max", 300, high="max"), None),
        (v2(JOB2, 1000, 300) | v2(UP2, 2000, 1900), 100),  # what the neighbours use counts
        (v2(JOB2, "max", 300) | v2(UP2, 2000, 1900, cache=50), 150),
        (v2(UP2, 2000, 1900), 100),
        (v2(JOB2, 1000, 1100), 0),
        (v2(JOB2, "a lot", 300) | v2(UP2, 2000, 0), 2000),
        ({f"{JOB2}max/is a folder": 1, **v2(UP2, 500, 100)}, 400),
        ({f"{JOB2}max": 500}, None),  # nobody tells what is used
        ({f"{JOB2}max": 500, f"{JOB2}current": 20}, 480),
    ],
)
def test_cgroups_of_version_2(tree: Tree, files: dict[str, Any], left: int | None) -> None:
    assert free_on_cpu(tree(**V2, **files)) == left


@pytest.mark.parametrize(
    "files,left",
    [
        (v1(JOB1, 1000, 300), 700),
        (v1(JOB1, 1000, 300, cache=100), 800),
        (v1(JOB1, 9223372036854771712, 300), None),
        (v1(JOB1, 9223372036854771712, 300) | v1(UP1, 500, 300), 200),
        (v1(JOB1, 1000, 300) | v1("sys/fs/cgroup/memory/memory.", 800, 400), 400),
    ],
)
def test_cgroups_of_version_1(tree: Tree, files: dict[str, Any], left: int | None) -> None:
    assert free_on_cpu(tree(**V1, **files)) == left


@pytest.mark.parametrize(
    "path,part",
    [
        ("/docker/abc", "/docker/abc"),  # the path as the host sees it
        ("/", "/docker/abc"),
        ("/../sibling", "/"),  # outside of the namespace
        ("/docker/other", "/docker/abc"),
    ],
)
def test_cgroups_in_a_container(tree: Tree, path: str, part: str) -> None:
    mount = f"31 23 0:28 {part} /sys/fs/my\\040cgroup rw - cgroup2 cgroup2 rw\n"
    files = {"proc/self/cgroup": f"0::{path}\n", "proc/self/mountinfo": mount}
    assert free_on_cpu(tree(**files, **v2("sys/fs/my cgroup/memory.", 900, 100))) == 800


def test_the_machine_has_the_least(tree: Tree) -> None:
    meminfo = "MemTotal:       9 kB\nMemFree:        1 kB\nMemAvailable:   3 kB\n"
    root = tree(**V2, **v2(JOB2, 8000, 0), **{"proc/meminfo": meminfo})
    assert free_on_cpu(root) == 3 * 1024


@pytest.mark.parametrize(
    "which,left", [("RLIMIT_AS", 10_000 - 4096), ("RLIMIT_DATA", 10_000 - 1024)]
)
def test_limits_of_the_process(
    tree: Tree, monkeypatch: pytest.MonkeyPatch, which: str, left: int
) -> None:
    root = tree(**{"proc/self/status": "VmSize:\t  4 kB\nVmData:\t  1 kB\n"})
    of = {getattr(resource, which): 10_000}
    monkeypatch.setattr(resource, "getrlimit", lambda x: (of.get(x, resource.RLIM_INFINITY), 0))
    assert free_on_cpu(root) == left


def test_nothing_is_known(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    assert free_on_cpu(tree()) is None
    monkeypatch.setattr("krrst_fast.planner.free_memory", lambda device: None)
    planned = plan(**SHAPE, memory="auto")
    assert (planned.memory, planned.fits, planned.chunk) == (None, None, None)


@needs_linux
def test_this_machine() -> None:
    left = free_memory("cpu")
    assert left is not None and 0 < left <= limits._fields(Path("/proc/meminfo"))["MemTotal"] * 1024
    # Other processes take and give back meanwhile.
    assert plan(**SHAPE, memory="auto").memory == pytest.approx(left, rel=0.5)
