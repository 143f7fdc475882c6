"""README and docs are true: snippets run, names exist, quoted errors are in the code."""

import ast
import dataclasses
import importlib
import importlib.util
import json
import re
import shlex
from pathlib import Path

import datasets
import pytest
import yaml

import gmpo
from gmpo.cli.parse import ScriptOptions, known_options, parse_flags, read_yaml
from gmpo.config import GMPOConfig, GRPOConfig
from gmpo.trainer import GMPOTrainer, GRPOTrainer
from tests.tiny import tiny_model, tiny_tokenizer

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(
    r"^(?:<!-- not run: (?P<why>.+) -->\n)?```(?P<language>\w+)\n(?P<code>.*?)^```",
    re.MULTILINE | re.DOTALL,
)
HUB_MODELS = re.compile(r"\"Qwen/[\w.-]+\"")


def name_of(page):
    return str(page.relative_to(ROOT))


def blocks(page, language):
    """Return (line, code, reason not to run it or None) of each code block of a language."""
    text = page.read_text("utf-8")
    return [
        (text[: match.start("code")].count("\n") + 1, match["code"], match["why"])
        for match in BLOCK.finditer(text)
        if match["language"] == language
    ]


# -- the page of options ---------------------------------------------------------------------------


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


# -- snippets --------------------------------------------------------------------------------------


@pytest.fixture
def small(tmp_path, monkeypatch):
    """Put a tiny model, a few rows and two steps into the place of what snippets ask for."""
    folder = tmp_path / "tiny"
    tiny_model(max_position_embeddings=512).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    rows = [{"question": f"{n} + 1", "answer": f"#### {n + 1}", "prompt": "a"} for n in range(64)]
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_list(rows))
    monkeypatch.chdir(tmp_path)

    def two_small_steps(self):
        self.max_steps, self.use_cpu = 2, True
        self.max_completion_length = min(self.max_completion_length, 4)
        self.per_device_train_batch_size = min(self.per_device_train_batch_size, 16)
        original(self)

    original = GRPOConfig.__post_init__
    monkeypatch.setattr(GRPOConfig, "__post_init__", two_small_steps)
    return folder


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=name_of)
@pytest.mark.filterwarnings("ignore:Each collection makes a single optimizer step")
def test_python_snippets_of_a_page_run(page, small):
    """The snippets of a page run one after another, after the quick start's names."""
    rows = [{"prompt": [{"role": "user", "content": "a b"}], "answer": "1"} for _ in range(64)]
    names = {
        "GMPOConfig": GMPOConfig,
        "GMPOTrainer": GMPOTrainer,
        "GRPOConfig": GRPOConfig,
        "GRPOTrainer": GRPOTrainer,
        "dataset": datasets.Dataset.from_list(rows),
    }
    for line, code, why in blocks(page, "python"):
        compiled = compile(HUB_MODELS.sub(repr(str(small)), code), f"{page.name}:{line}", "exec")
        if why is None:
            exec(compiled, names)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_options_in_snippets_exist(page):
    """Of snippets that can't run here too."""
    for line, code, _ in blocks(page, "python"):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in CONFIGS:
                known = {field.name for field in dataclasses.fields(CONFIGS[node.func.id])}
                assert {keyword.arg for keyword in node.keywords} <= known, f"{page.name}:{line}"


CONFIGS = {"GMPOConfig": GMPOConfig, "GRPOConfig": GRPOConfig}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_flags_and_yaml_keys_in_snippets_exist(page, tmp_path):
    for _, code, _ in [*blocks(page, "bash"), *blocks(page, "sh")]:
        for command in code.replace("\\\n", " ").splitlines():
            words = shlex.split(command, comments=True)
            if words[:2] == ["gmpo", "train"] and "..." not in words:
                parse_flags(words[2:], GMPOConfig)  # raises for a flag that does not exist
    for line, code, _ in blocks(page, "yaml"):
        path = tmp_path / "snippet.yaml"
        path.write_text(code)
        assert read_yaml(str(path)).keys() <= known_options(GMPOConfig), f"{page.name}:{line}"


# -- names -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_files_and_functions_that_a_page_names_exist(page):
    text = page.read_text("utf-8")
    for path in re.findall(r"`((?:gmpo|tests|examples|benchmarks|docs)/[\w./-]+)`", text):
        imagined = path.endswith("mine.py") or "turns/" in path
        assert imagined or (ROOT / path).exists(), path
    for dotted in re.findall(r"`(gmpo\.[a-z_.]+\.[\w.]+)`", text):
        module, _, name = dotted.rpartition(".")
        outer, _, holder = module.rpartition(".")
        try:
            value = importlib.import_module(module)
        except ModuleNotFoundError:  # a method
            value = getattr(importlib.import_module(outer), holder)
        assert hasattr(value, name), dotted


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_tables_that_a_page_names_are_in_their_file(page):
    text = re.sub(r"\s+", " ", page.read_text("utf-8"))
    for name, path in re.findall(r"`([A-Z_]{4,})` (?:in|\()\s?`([\w/]+\.py)`", text):
        assert re.search(rf"^{name}\b", (ROOT / path).read_text("utf-8"), re.MULTILINE), name


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_to_files_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)#\s]+)", page.read_text("utf-8")):
        ours = re.match(r"https://github\.com/gmpo-rl/gmpo/(?:blob|tree)/main/(.+)", link)
        if ours is not None:
            assert (ROOT / ours[1]).exists(), link
        elif not link.startswith("http"):
            assert (page.parent / link).exists(), link


def test_every_detail_of_an_objective_names_its_function():
    page = (ROOT / "docs" / "objectives.md").read_text("utf-8")
    details = dict(
        re.findall(r"^\*\*(\d+)\. (.+?)(?=^\*\*\d|^## |\Z)", page, re.MULTILINE | re.DOTALL)
    )
    assert len(details) == 26
    in_gmpo = {str(number) for number in range(2, 8)}  # the sentence before the first says so
    assert {n for n, text in details.items() if "`gmpo." not in text} <= in_gmpo


def test_every_page_is_in_the_menu_of_the_site():
    class Loader(yaml.SafeLoader):
        pass

    menu = yaml.load((ROOT / "mkdocs.yml").read_text("utf-8"), Loader)["nav"]
    listed = set(re.findall(r"[\w-]+\.md", json.dumps(menu)))
    assert listed == {page.name for page in PAGES} - {"README.md"}


# -- errors ----------------------------------------------------------------------------------------


def literal(node):
    """Return the text of a string in the source, with … for what is filled in, or None."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return re.sub(r"%[dsgr]", "…", node.value)
    if isinstance(node, ast.JoinedStr):
        parts = [literal(part) if isinstance(part, ast.Constant) else "…" for part in node.values]
        return "".join(str(part) for part in parts)
    return None


def test_error_texts_of_the_troubleshooting_page_are_in_the_code():
    texts = [
        literal(node) or ""
        for path in Path(gmpo.__file__).parent.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
    ]
    page = (ROOT / "docs" / "troubleshooting.md").read_text("utf-8")
    messages = re.findall(
        r"^\| `{1,2}(.+?)`{1,2} \| ", page.partition("## When the config")[2], re.MULTILINE
    )
    messages = [message for message in messages if not message.startswith("time/")]
    assert len(messages) > 30
    assert [m for m in messages if not any(m in text for text in texts)] == []


# -- metrics ---------------------------------------------------------------------------------------


def named_metrics():
    page = (ROOT / "docs" / "metrics.md").read_text("utf-8").partition("## Of the Trainer")[2]
    cells = re.findall(r"^\| (`.+?`) \|", page, re.MULTILINE)
    return {name for cell in cells for name in re.findall(r"`([^`]+)`", cell)}


@pytest.fixture(scope="module")
def logged(tmp_path_factory):
    """Names of everything that a run logs whose options log as much as possible."""
    folder = tmp_path_factory.mktemp("metrics")
    config = GMPOConfig(
        str(folder),
        per_device_train_batch_size=8,
        per_device_eval_batch_size=8,
        num_generations=4,
        steps_per_generation=2,
        max_completion_length=6,
        max_steps=4,
        learning_rate=1e-2,
        beta=0.1,
        use_transformers_continuous_batching=True,  # reports log-probs
        zero_signal_groups="resample",
        eval_strategy="steps",
        eval_steps=2,
        logging_steps=1,
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    rows = [{"prompt": " ".join("abcdefgh"[: 1 + n % 6])} for n in range(32)]
    trainer = GMPOTrainer(
        tiny_model(),
        lambda completions, **_: [text.count("a") for text in completions],
        config,
        datasets.Dataset.from_list(rows),
        datasets.Dataset.from_list(rows[:4]),
        processing_class=tiny_tokenizer(),
    )
    trainer.train()
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    names = {name for line in lines for name in json.loads(line)}
    trainer_only = {"loss", "runtime", "samples_per_second", "steps_per_second"}
    return {
        name if name.removeprefix("eval_") in trainer_only else name.removeprefix("eval_")
        for name in names
    }


def test_every_logged_name_is_on_the_page_of_metrics(logged):
    names = {re.sub(r"^rewards/[^/]+/", "rewards/{name}/", name) for name in logged}
    assert names - named_metrics() == set()


def test_every_name_on_the_page_of_metrics_is_logged(logged):
    names = {re.sub(r"^rewards/[^/]+/", "rewards/{name}/", name) for name in logged}
    only_elsewhere = {
        "total_flos",  # in trainer_state.json
        "signal/rows",  # not with a reference
        "entropy/selected",  # with top_entropy_quantile
        "policy_loss",  # with an entropy bonus
        "entropy_coef",
        "aux_loss",  # of mixtures of experts
        "nonfinite_steps",  # with nonfinite_steps="skip"
        "sampling/importance_sampling_ratio/truncated",  # of the truncating modes
        "rewards/{name}/truncated",  # of reward models
        "rewards/{name}/lost",  # of rewards in processes
    }
    assert named_metrics() - names == only_elsewhere


# -- script options --------------------------------------------------------------------------------


def test_every_option_of_the_command_line_is_on_its_page():
    page = (ROOT / "docs" / "command-line.md").read_text("utf-8")
    missing = [f.name for f in dataclasses.fields(ScriptOptions) if f"`{f.name}`" not in page]
    assert missing == []
