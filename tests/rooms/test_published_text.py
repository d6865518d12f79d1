"""What we publish is about the product, in one version, in files that a clone can carry."""

from __future__ import annotations

import re
import sys
from importlib.metadata import version
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

MAX_FILE_BYTES = 20 * 2**20
MAX_CHECKOUT_BYTES = 64 * 2**20
BINARY = {".safetensors", ".onnx", ".onnx_data", ".png", ".jpg", ".ttf", ".npz"}

# One letter of each stands in brackets, so that this file does not match itself.
NOT_OURS = (
    r"\b[i]ssue #?\d",  # a task's number says nothing to a reader
    r"(?<!\w)/wor[k]/|\.\./share[d]\b|/tmp/pla[n]|/opt/(pyp[i]|wheel[s])",  # folders of one machine
    r"\b(desig[n]|styl[e]|toolchai[n])(\.md| §)",  # papers that are not in the checkout
    r"pyp[i]\.org|pythonhoste[d]|registry\.np[m]|index-ur[l]",  # where packages come from
    r"claud[e]|anthropi[c]|chatgp[t]|co-authore[d]",
)
KNOWS_ITS_SURROUNDINGS = Path(".ci/run")  # the one file that may look for test data beside the checkout


def test_no_file_speaks_of_what_is_not_in_the_checkout(root: Path, product_files: list[Path]) -> None:
    pattern = re.compile("|".join(NOT_OURS), re.IGNORECASE)
    found = [
        f"{path.relative_to(root)}:{number}: {line.strip()[:120]}"
        for path in product_files
        if path.suffix not in BINARY and path != root / KNOWS_ITS_SURROUNDINGS
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if pattern.search(line)
    ]
    assert found == []


def test_every_file_is_small_enough_for_a_clone(root: Path, product_files: list[Path]) -> None:
    sizes = {str(path.relative_to(root)): path.stat().st_size for path in product_files}
    assert {name: size for name, size in sizes.items() if size > MAX_FILE_BYTES} == {}
    assert sum(sizes.values()) < MAX_CHECKOUT_BYTES


def test_changelog_opens_with_the_version_of_the_package(root: Path) -> None:
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    newest = re.search(r"^## \[(.+?)\]", (root / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest is not None
    assert newest[1] == project["version"] == version("edgevlm")


def test_every_constraint_is_one_exact_version_without_a_build_tag(root: Path) -> None:
    lines = (root / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert [pin for pin in pins if not re.fullmatch(r"[\w.-]+==[\w.]+(; python_version (<|>=) \"3\.11\")?", pin)] == []


def test_every_dependency_has_a_constraint(root: Path) -> None:
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    wanted = {_name(each) for each in [*project["dependencies"], *(one for extra in extras for one in extra)]}
    tested = {_name(line) for line in (root / "constraints.txt").read_text().splitlines() if "==" in line}
    assert wanted - tested == set()


def _name(requirement: str) -> str:
    found = re.match(r"[\w.-]+", requirement)
    assert found is not None, requirement
    return found[0].lower().replace("_", "-")
