"""The wheel holds what its users need."""

import email
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder)]
    subprocess.run([*command, str(ROOT)], check=True, capture_output=True)
    (path,) = folder.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        yield archive


def metadata(wheel):
    (name,) = [name for name in wheel.namelist() if name.endswith("METADATA")]
    return email.message_from_bytes(wheel.read(name))


def test_the_wheel_holds_every_module_and_says_that_it_is_typed(wheel):
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "gmpo").rglob("*.py")}
    packed = {name for name in wheel.namelist() if name.startswith("gmpo/")}
    assert packed == modules | {"gmpo/py.typed"}


def test_links_of_the_description_are_absolute(wheel):
    links = re.findall(r"\]\(([^)]+)\)", metadata(wheel).get_payload())
    assert len(links) > 5
    assert [link for link in links if not link.startswith(("https://", "#"))] == []


def test_the_metadata_names_authors_addresses_and_the_python(wheel):
    fields = metadata(wheel)
    assert fields["Author"] and fields["Requires-Python"] == ">=3.11"
    assert {line.partition(",")[0] for line in fields.get_all("Project-URL")} == {
        "Repository",
        "Documentation",
        "Changelog",
        "Issues",
    }
    assert "Typing :: Typed" in fields.get_all("Classifier")
