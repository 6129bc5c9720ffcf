"""What is handed out: source archive and wheel hold what they need; the wheel alone works, also without a compiler."""

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DATA = {"py.typed", "papers.toml", "page.css", "page.js", "runtime/engine.cpp"}


def run(command, **more):
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=600, **more)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    """The files ``python -m build`` makes of a copy of the sources."""
    folder = tmp_path_factory.mktemp("package")
    names = run(["git", "-C", ROOT, "ls-files", "-z", "--cached", "--others", "--exclude-standard"]).split("\0")
    for name in filter(None, names):
        if name.startswith(("mgic/", "pyproject.toml", "README.md", "LICENSE", "setup")) and (ROOT / name).exists():
            copy = folder / "source" / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes((ROOT / name).read_bytes())
    run([sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "dist", folder / "source"])
    (wheel,), (source,) = (folder / "dist").glob("*.whl"), (folder / "dist").glob("*.tar.gz")
    return wheel, source


def test_the_archives_hold_every_file_of_the_package(archives):
    wheel, source = archives
    expected = {str(path.relative_to(ROOT)) for path in (ROOT / "mgic").rglob("*.py")} | {
        f"mgic/{name}" for name in DATA
    }
    found = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("mgic/")}
    assert found == expected
    with tarfile.open(source) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert expected | {"pyproject.toml", "README.md", "LICENSE"} <= names


@pytest.fixture(scope="module")
def installed(archives, tmp_path_factory):
    """A folder that holds the wheel's files and nothing else; its dependencies are those of this environment."""
    folder = tmp_path_factory.mktemp("installed")
    run([sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", folder, archives[0]])
    return folder


@pytest.mark.parametrize("compiler", [True, False], ids=["with a compiler", "without"])
def test_the_wheel_alone_runs_the_demo_and_the_engine_or_says_why_not(installed, tmp_path, compiler):
    environment = {**os.environ, "PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"}
    if not compiler:
        environment = {name: value for name, value in environment.items() if name not in ("CXX", "CC")}
        environment["MGIC_CACHE"] = str(tmp_path / "cache")  # where no engine lies that was compiled before
        environment["PATH"] = str(Path(sys.executable).parent)
        words = [sys.executable, "-m", "mgic", "demo", "--epochs", "1", "--seeds", "[0]", "--out", "runs"]
        said = run(words, cwd=tmp_path, env=environment)
        assert "mgic_resnet20" in said
        assert (tmp_path / "runs" / "curves.png").exists()
    code = (
        "import mgic, pathlib, sys, torch\n"
        "assert pathlib.Path(mgic.__file__).is_relative_to(sys.argv[1]), mgic.__file__\n"
        "net, x = mgic.create_model('mgic_resnet20', width=0.5), torch.randn(1, 3, 8, 8)\n"
        "print(mgic.accelerate(net, x, paths=['eager', 'engine']).report)"
    )
    report = run([sys.executable, "-c", code, installed], cwd=tmp_path, env=environment)
    assert ("compiler" in report) is not compiler, report
