import gzip
import json

import datasets
import pytest

from gmpo.cli.datasets import count_shared_prompts, load_rows

ROWS = [{"question": f"{i} + 1?", "answer": str(i + 1)} for i in range(4)]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def file(tmp_path):
    def write(name, rows=ROWS):
        path = tmp_path / name
        table = datasets.Dataset.from_list(rows)
        writers = {
            ".jsonl": lambda: path.write_text("".join(json.dumps(row) + "\n" for row in rows)),
            ".json": lambda: path.write_text(json.dumps(rows)),
            ".parquet": lambda: table.to_parquet(path),
            ".csv": lambda: table.to_csv(path),
        }
        writers[path.suffix]()
        return str(path)

    return write


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.parquet", "rows.csv"])
def test_a_file_of_each_kind_gives_its_rows(file, name):
    rows = load_rows(file(name), prompt_column="question")
    assert rows["prompt"] == [row["question"] for row in ROWS]
    assert [str(answer) for answer in rows["answer"]] == [row["answer"] for row in ROWS]


def test_a_file_has_whatever_split_is_asked_for_and_can_be_sliced(file):
    path = file("rows.jsonl")
    assert len(load_rows(path, split="test", prompt_column="question")) == 4
    assert load_rows(path, split="train[1:3]", prompt_column="question")["answer"] == ["2", "3"]


def test_text_becomes_a_users_message_behind_the_system_prompt(file):
    rows = load_rows(
        file("rows.jsonl"), prompt_column="question", as_messages=True, system_prompt="Be brief."
    )
    assert rows[0]["prompt"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "0 + 1?"},
    ]
    assert load_rows(file("rows.jsonl"), prompt_column="question", as_messages=True)[0][
        "prompt"
    ] == [{"role": "user", "content": "0 + 1?"}]


def test_text_that_stays_text_has_the_system_prompt_before_it(file):
    rows = load_rows(file("rows.jsonl"), prompt_column="question", system_prompt="Be brief.")
    assert rows[0]["prompt"] == "Be brief.\n\n0 + 1?"


def test_messages_stay_and_a_system_message_of_their_own_too(file):
    user, system = {"role": "user", "content": "Hi"}, {"role": "system", "content": "Own"}
    path = file("rows.jsonl", [{"prompt": [user]}, {"prompt": [system, user]}])
    rows = load_rows(path, system_prompt="Given", as_messages=True)
    assert rows["prompt"] == [[{"role": "system", "content": "Given"}, user], [system, user]]


def test_the_prompt_column_takes_the_place_of_one_called_prompt(file):
    path = file("rows.jsonl", [{"prompt": "old", "question": "new"}])
    rows = load_rows(path, prompt_column="question")
    assert rows.column_names == ["prompt"]
    assert rows["prompt"] == ["new"]


def test_a_missing_column_is_refused_with_the_likely_one(file):
    with pytest.raises(
        ValueError,
        match=r"no column 'prompt'; its columns are: question, answer.*--prompt_column question",
    ):
        load_rows(file("rows.jsonl"))


def test_a_missing_file_and_an_unreadable_one_are_named(file, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere.jsonl"):
        load_rows("nowhere.jsonl")
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"prompt": ')
    latin = tmp_path / "latin.jsonl"
    latin.write_bytes('{"prompt": "café"}\n'.encode("latin-1"))
    with pytest.raises(ValueError, match=r"broken.jsonl can't be read as json"):
        load_rows(str(broken))
    with pytest.raises(ValueError, match=r"latin.jsonl' is not text in UTF-8"):
        load_rows(str(latin))


def test_a_name_that_is_nowhere_is_told_from_a_file_and_a_task(monkeypatch):
    def offline(*arguments, **keywords):
        raise ConnectionError("no route to the hub")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(
        ValueError, match=r"no dataset 'org/rows'.*no route.*\.jsonl.*reasoning_gym:NAME"
    ):
        load_rows("org/rows")


def test_a_task_gives_rows_with_what_its_verifier_needs():
    pytest.importorskip("reasoning_gym")
    rows = load_rows(
        "reasoning_gym:chain_sum", kwargs={"size": 3, "max_terms": 2}, as_messages=True
    )
    assert rows.column_names == ["prompt", "answer", "task", "task_settings", "task_index"]
    assert rows[0]["prompt"][0]["role"] == "user"


def test_prompts_in_both_sets_are_counted(file):
    first = load_rows(file("a.jsonl", [{"prompt": p} for p in "abcc"]), as_messages=True)
    second = load_rows(file("b.jsonl", [{"prompt": p} for p in "bcd"]), as_messages=True)
    assert count_shared_prompts(second, first) == 2


def test_several_files_of_one_kind_are_one_dataset(file):
    paths = [file("a.jsonl", ROWS[:1]), file("b.jsonl", ROWS[1:])]
    assert load_rows(paths, prompt_column="question")["answer"] == ["1", "2", "3", "4"]
    with pytest.raises(ValueError, match="not of one kind"):
        load_rows([paths[0], file("c.csv")], prompt_column="question")


def test_a_compressed_file_gives_its_rows(tmp_path):
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(b"".join(json.dumps(row).encode() + b"\n" for row in ROWS)))
    assert load_rows(str(path), prompt_column="question")["answer"] == ["1", "2", "3", "4"]


def test_a_folder_of_save_to_disk_gives_its_rows_and_slices(tmp_path):
    table = datasets.Dataset.from_list(ROWS)
    table.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=table, test=table.select([0])).save_to_disk(tmp_path / "two")

    def answers(folder, split):
        rows = load_rows(str(tmp_path / folder), split=split, prompt_column="question")
        return list(rows["answer"])

    assert answers("one", "train") == ["1", "2", "3", "4"]
    assert answers("two", "test") == ["1"]
    assert answers("two", "train[1:3]") == ["2", "3"]
    assert answers("two", "train[:50%]") == ["1", "2"]
    assert answers("two", "train[-1:]") == ["4"]
    with pytest.raises(ValueError, match=r"no split 'dev'; its splits are: train, test"):
        answers("two", "dev")


@pytest.mark.parametrize("prompt", [None, 5])
@pytest.mark.parametrize("options", [{}, {"as_messages": True}, {"system_prompt": "Be brief."}])
def test_a_prompt_that_is_neither_text_nor_messages_is_named(file, prompt, options):
    rows = [{"prompt": prompt if i == 2 else (None if prompt is None else i)} for i in range(3)]
    if prompt is None:
        rows[0]["prompt"] = rows[1]["prompt"] = "a"
    number = 2 if prompt is None else 0
    with pytest.raises(ValueError, match=rf"Row {number} of .* has the prompt (None|0)"):
        load_rows(file("rows.jsonl", rows), **options)
