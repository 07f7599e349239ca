"""What the documents promise about the repository."""

from __future__ import annotations

import ast
import re
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_every_dependency_has_its_reason() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    blocks = re.findall(r"^(?:requires|dependencies|test) = \[(.*?)\]$", project, re.DOTALL | re.MULTILINE)
    assert len(blocks) == 3, "build, run and test requirements"
    names = {re.split(r"[<>=;\[ ]", text)[0] for block in blocks for text in re.findall(r'"(.*?)"', block)}
    assert {"torch", "setuptools", "pytest"} <= names
    table = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("## Dependencies")[1].split("\n## ")[0]
    missing = {name for name in names if not re.search(rf"\b{re.escape(name)}\b", table)}
    assert not missing, f"say in CONTRIBUTING.md what these are for: {missing}"


@pytest.mark.parametrize("name", ["test", "run"])
def test_the_readme_has_the_commands_that_ci_runs(name: str) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(re.findall(rf"^<!-- ci: {name} -->\n```bash\n(?:[^`].*\n)+```$", readme, re.MULTILINE)) == 1


def test_the_version_is_said_once() -> None:
    import opsd

    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f'version = "{opsd.__version__}"' in project or 'dynamic = ["version"]' in project


def test_what_is_not_python_is_package_data() -> None:
    setup = (ROOT / "setup.py").read_text(encoding="utf-8")
    found = re.search(r"package_data=({.*?}),$", setup, re.MULTILINE)
    assert found is not None
    shipped = {path for pattern in ast.literal_eval(found[1])["opsd"] for path in (ROOT / "opsd").glob(pattern)}
    files = {path for path in (ROOT / "opsd").rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    assert {path for path in files if path.suffix != ".py"} == {path for path in shipped if path.suffix != ".py"}


@pytest.mark.parametrize("package", ["kernels/opsd_kernels", "opsd"])
def test_the_readme_lists_every_file(package: str) -> None:
    listed = (ROOT / "README.md").read_text(encoding="utf-8").split("\n## Files\n")[1].split("```")[1]
    names = re.findall(r"[\w*/]+(?:\.py|/)(?!\w)", listed)
    found = [path for path in (ROOT / package).iterdir() if path.name not in ("__init__.py", "__pycache__")]
    wanted = {
        path.name if path.is_file() else f"{path.name}/" for path in found if path.is_dir() or path.suffix == ".py"
    }
    missing = {name for name in wanted if not any(fnmatch(name, listed_name) for listed_name in names)}
    assert not missing, f"say in the README what these are: {sorted(missing)}"
