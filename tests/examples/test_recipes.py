"""The recipes run as written, with a tiny model and a few rows in the place of those of the hub."""

import json
from pathlib import Path

import datasets
import pytest
import torch

from examples import gsm8k, minimal_loop
from gmpo.cli.main import main as gmpo
from gmpo.cli.parse import parse
from tests.tiny import tiny_model, tiny_tokenizer

EXAMPLES = Path(gsm8k.__file__).parent

SMALL = {
    "max_steps": 4,
    "num_generations": 4,
    "per_device_train_batch_size": 4,
    "max_completion_length": 4,
    "eval_steps": 4,
    "per_device_eval_batch_size": 4,
}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Put rows of GSM8K's form and a tiny model into the place of the hub's."""
    tiny_model(max_position_embeddings=512).save_pretrained(tmp_path / "tiny")
    tiny_tokenizer().save_pretrained(tmp_path / "tiny")
    asked = []

    def load_dataset(path, *arguments, **keywords):
        asked.append((path, keywords.get("split")))
        rows = [
            {"question": f"What is {n} + 1?", "answer": f"Add them.\n#### {n + 1}"}
            for n in range(16)
        ]
        return datasets.Dataset.from_list(rows)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(gsm8k, "load_dataset", load_dataset)
    monkeypatch.chdir(tmp_path)
    return asked


def last_figures(folder):
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {name: value for record in records for name, value in record.items()}


def test_the_gsm8k_script_trains_and_evaluates(hub, tmp_path):
    gsm8k.main(["--model", "tiny", "--output", "out"], **SMALL, use_cpu=True)
    figures = last_figures(tmp_path / "out")
    assert {"rewards/number_match/mean", "eval_reward"} <= figures.keys()
    assert hub == [("openai/gsm8k", "train"), ("openai/gsm8k", "test[:200]")]
    assert (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.parametrize("recipe", ["gsm8k.yaml", "lora.yaml"])
def test_a_recipe_trains_from_the_command_line(recipe, hub, tmp_path):
    path = str(EXAMPLES / recipe)
    sizes = [word for name, value in SMALL.items() for word in (f"--{name}", str(value))]
    words = ["train", "--config", path, "--model", "tiny", "--output_dir", "out", "--use_cpu"]
    assert gmpo([*words, *sizes]) == 0
    assert "rewards/number_match/mean" in last_figures(tmp_path / "out")
    adapter = (tmp_path / "out" / "adapter_model.safetensors").exists()
    assert adapter == (recipe == "lora.yaml")


def test_script_and_file_ask_for_the_same_gsm8k_run():
    script, from_file = parse(["--config", str(EXAMPLES / "gsm8k.yaml")])
    from_python = gsm8k.config("runs/gsm8k")
    assert script.system_prompt == gsm8k.SYSTEM_PROMPT
    assert from_file.to_dict() == from_python.to_dict()


# -- the minimal loop ------------------------------------------------------------------------------


def test_the_minimal_loop_learns_to_repeat_the_letter():
    rewards = minimal_loop.main()
    assert sum(rewards[:5]) / 5 < 0.2
    assert sum(rewards[-10:]) / 10 > 0.6


def test_the_minimal_loop_takes_the_gradient_of_the_paper():
    """One completion of two tokens, A = 1, log-ratios 0.6 and -0.2: rho = exp((0.4 - 0.2) / 2)."""
    torch.manual_seed(0)
    model = minimal_loop.new_model()
    tokens = torch.tensor([[2, 3, 4]])
    logps = minimal_loop.completion_logps(model, tokens)
    batch = minimal_loop.Collection(
        tokens=tokens,
        mask=torch.ones(1, 2, dtype=torch.bool),
        advantages=torch.ones(1, 1),
        old_logps=logps.detach() - torch.tensor([[0.6, -0.2]]),
        mean_reward=0.0,
    )
    loss, capped = minimal_loop.loss_of(model, batch)
    loss.backward()
    found = model.lm_head.weight.grad.clone()
    rho = torch.tensor(0.1).exp()
    torch.testing.assert_close(loss, -rho)
    assert capped == 0.5

    model.zero_grad()
    (-rho / 2 * minimal_loop.completion_logps(model, tokens)[0, 1]).backward()
    torch.testing.assert_close(found, model.lm_head.weight.grad)


# -- the notebook ----------------------------------------------------------------------------------


def cells_of_the_notebook():
    notebook = json.loads((EXAMPLES / "first_run.ipynb").read_text("utf-8"))
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def test_the_notebook_learns_when_its_cells_run_in_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for number, cell in enumerate(cells_of_the_notebook()):
        code = "".join(cell["source"]).replace("max_steps=240", "max_steps=80")
        code = code.replace("from IPython.display import Image", "Image = lambda *_, **__: None")
        exec(compile(code, f"cell {number}", "exec"), names)
    rewards = [record["reward"] for record in names["records"]]
    assert rewards[0] < 0.2 < rewards[-1]


def test_the_notebook_is_kept_with_its_outputs():
    cells = cells_of_the_notebook()
    counts = [cell["execution_count"] for cell in cells]
    assert counts == list(range(1, len(cells) + 1))
    kinds = [output["output_type"] for cell in cells for output in cell["outputs"]]
    assert "error" not in kinds and kinds.count("execute_result") >= 5
