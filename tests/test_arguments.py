"""Arguments of the trainers that can't work, told before weights are loaded."""

import pandas
import pytest
import torch
from datasets import Dataset, IterableDataset
from transformers import ProcessorMixin

from gmpo.config import GMPOConfig
from gmpo.trainer import GMPOTrainer
from tests.tiny import WORDS, tiny_model, tiny_tokenizer

ROWS = [{"prompt": "a b"}] * 8
MESSAGES = [{"prompt": [{"role": "user", "content": "a"}]}] * 8


@pytest.fixture
def build(tmp_path, monkeypatch):
    """Build a trainer of a model by path; loading its weights fails the test unless `loads`."""
    tiny_model().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")

    def make(*, loads=False, eval_dataset=None, processing_class=None, **options):
        def load(*arguments, **keywords):
            raise AssertionError("weights are loaded")

        with monkeypatch.context() as patch:
            if not loads:
                patch.setattr("gmpo.trainer.load_policy", load)
            rows = options.pop("train_dataset", ROWS)
            config = GMPOConfig(
                str(tmp_path / "out"),
                **{
                    "num_generations": 4,
                    "max_completion_length": 4,
                    "max_steps": 1,
                    "use_cpu": True,
                    "disable_tqdm": True,
                    "save_strategy": "no",
                    **options,
                },
            )
            return GMPOTrainer(
                str(tmp_path / "model"),
                lambda completions, **columns: [0.0, 1.0] * (len(completions) // 2),
                config,
                rows,
                eval_dataset=eval_dataset,
                processing_class=processing_class,
            )

    return make


class TorchStream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(ROWS)


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ("rows.jsonl", "train_dataset is a str, which is not a dataset.*load_dataset"),
        (pandas.DataFrame(ROWS), "is a DataFrame, .*from_pandas"),
        (iter(ROWS), "is a list_iterator, .*read only once.*from_generator"),
        ((row for row in ROWS), "is a generator, .*read only once"),
        ({"prompt": ["a"] * 8}, "is a dict, .*from_dict"),
        (5, "is a int, which is not a dataset"),
        (["a", "b"], "is a list, .*must be rows"),
    ],
    ids=["text", "frame", "iterator", "generator", "columns", "number", "texts"],
)
def test_what_is_no_dataset_is_told_with_how_to_make_one(build, dataset, message):
    with pytest.raises(TypeError, match=message):
        build(train_dataset=dataset)


def test_several_evaluation_sets_are_a_dict(build):
    rows = Dataset.from_list(ROWS)
    with pytest.raises(TypeError, match=r"eval_dataset is a list, .*dict {name: dataset}"):
        build(eval_dataset=[rows, rows])


def test_a_stream_that_cannot_be_shuffled_is_told(build):
    with pytest.raises(ValueError, match=r"TorchStream has no shuffle.*shuffle_dataset=False"):
        build(train_dataset=TorchStream())
    build(train_dataset=TorchStream(), shuffle_dataset=False, loads=True).train()


@pytest.mark.parametrize("column", ["image", "images"])
@pytest.mark.parametrize("rows", [ROWS, MESSAGES], ids=["text", "messages"])
@pytest.mark.parametrize("kind", [list, Dataset.from_list])
def test_image_columns_are_refused(build, column, rows, kind):
    dataset = kind([{**row, column: [b"png"]} for row in rows])
    with pytest.raises(
        ValueError, match=f"train_dataset.*column '{column}'.*does not train on ima"
    ):
        build(train_dataset=dataset)
    with pytest.raises(ValueError, match=f"eval_dataset.*column '{column}'"):
        build(eval_dataset=dataset)


def test_images_of_a_stream_are_refused_as_they_come(build):
    rows = [{**row, "image": b"png"} for row in ROWS]
    stream = IterableDataset.from_generator(lambda: iter(rows))
    with pytest.raises(ValueError, match="Row 0 has a column 'image'"):
        build(train_dataset=stream, shuffle_dataset=False, loads=True).train()


class Processor(ProcessorMixin):
    """What a multimodal model comes with, less its image processor."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.chat_template = None

    def save_pretrained(self, folder, **keywords):
        self.saved = folder


def test_a_processor_lends_its_tokenizer_and_is_saved(build):
    processor = Processor(tiny_tokenizer())
    trainer = build(processing_class=processor, loads=True)
    trainer.train()
    trainer.save_model()
    assert trainer.encoder.tokenizer is processor.tokenizer
    assert processor.saved == trainer.args.output_dir


def test_a_processing_class_without_a_tokenizer_is_told(build):
    with pytest.raises(TypeError, match=r"object.* is not a tokenizer and holds none"):
        build(processing_class=object())


def test_a_pad_token_that_the_model_does_not_know_is_told(build):
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<new>"})
    with pytest.raises(ValueError, match=f"pad token has the number {len(WORDS)}.*resize_token"):
        build(processing_class=tokenizer)


@pytest.mark.parametrize("rows", [ROWS, MESSAGES], ids=["text", "messages"])
def test_a_token_that_the_model_does_not_know_is_told_with_its_row(build, rows):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<new>"])
    build(processing_class=tokenizer, train_dataset=rows, loads=True)  # no row has it

    odd = "a <new>" if rows is ROWS else [{"role": "user", "content": "<new>"}]
    with pytest.raises(ValueError, match="row 8 has the token '<new>' with the number 16"):
        build(processing_class=tokenizer, train_dataset=[*rows, {"prompt": odd}])
