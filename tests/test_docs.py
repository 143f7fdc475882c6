"""The page of options says what the options say."""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def make():
    spec = importlib.util.spec_from_file_location(
        "make_configuration", ROOT / "docs" / "make_configuration.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_of_options_is_the_one_that_the_options_make(make):
    assert make.PAGE.read_text("utf-8") == make.page(), "run: python docs/make_configuration.py"


def test_every_option_of_the_public_interface_has_a_meaning(make):
    newer_than_the_documented_interface = {
        "dataloader_multiprocessing_context",
        "dataloader_in_order",
        "activation_checkpointing",
        "activation_checkpointing_kwargs",
    }
    assert make.undocumented() <= newer_than_the_documented_interface
