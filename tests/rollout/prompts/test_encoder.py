import pytest
from datasets import Dataset, IterableDataset
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import GenerationConfig, MambaConfig, PreTrainedTokenizerFast

from gmpo.rollout.prompts.dataset import check_dataset
from gmpo.rollout.prompts.encoder import PromptEncoder
from gmpo.rollout.prompts.model_facts import context_length, ending_tokens, padding_token
from gmpo.rollout.settings import RolloutSettings
from gmpo.types import DatasetRow
from tests.tiny import WORDS, tiny_model, tiny_tokenizer


def encoder(tokenizer=None, **settings) -> PromptEncoder:
    context = settings.pop("context", None)
    settings = RolloutSettings(**{"max_completion_length": 4, **settings})
    return PromptEncoder(
        tokenizer or tiny_tokenizer(), settings, eos=(1,), pad=0, context_length=context
    )


def ids(text: str) -> list[int]:
    return [WORDS.index(word) for word in text.split()]


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def bos_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer that puts <s> before every text and </s> after it, as some do."""
    words = ["<s>", "</s>", "<unk>", "a", "b"]
    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


# -- tokens ----------------------------------------------------------------------------------------


def test_a_text_is_its_tokens():
    (prompt,) = encoder().encode([{"prompt": "a b c"}])
    assert prompt.ids == ids("a b c")
    assert prompt.source == "a b c"


def test_messages_go_through_the_template_and_ask_for_an_answer():
    messages = [user("a b")]
    (prompt,) = encoder().encode([{"prompt": messages}])
    assert prompt.ids == ids("<user> a b <assistant>")
    assert prompt.source == messages


def test_a_last_message_of_the_assistant_is_continued():
    (prompt,) = encoder().encode([{"prompt": [user("a"), {"role": "assistant", "content": "b c"}]}])
    assert prompt.ids == ids("<user> a <assistant> b c")


@pytest.mark.parametrize("text", ["a b", "<s> a b"])
def test_a_text_gets_one_bos_and_no_eos_of_the_tokenizer(text):
    (prompt,) = encoder(bos_tokenizer()).encode([{"prompt": text}])
    assert prompt.ids == [0, 3, 4]


def test_an_eos_that_the_text_itself_ends_in_stays():
    (prompt,) = encoder().encode([{"prompt": "a <eos>"}])
    assert prompt.ids == ids("a <eos>")


def test_template_keywords_of_the_config_and_of_the_row():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ word }} {{ messages[0]['content'] }}"
    rows = [{"prompt": [user("a")]}, {"prompt": [user("a")], "chat_template_kwargs": {"word": "k"}}]
    first, second = encoder(tokenizer, chat_template_kwargs={"word": "b"}).encode(rows)
    assert first.ids == ids("b a")
    assert second.ids == ids("k a")


def test_equal_rows_share_one_prompt_and_its_encoding():
    tokenizer = tiny_tokenizer()
    calls = []
    tokenize = tokenizer.__class__.__call__
    counting = type(
        "Counting",
        (tokenizer.__class__,),
        {"__call__": lambda s, t: calls.append(t) or tokenize(s, t)},
    )
    tokenizer.__class__ = counting
    a, b, again = encoder(tokenizer).encode([{"prompt": "a"}, {"prompt": "b"}, {"prompt": "a"}])
    assert a is again and a is not b
    assert calls == ["a", "b"]


def test_nulls_that_arrow_adds_reach_no_template():
    """Arrow gives all messages of a column the same keys; templates ask whether a key is there."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if 'name' in m %}{{ m.name }} {% endif %}"
        "{% if m.thought is defined %}{{ m.thought + ' ' }}{% endif %}{{ m.content }} {% endfor %}"
    )
    messages = [{**user("a"), "name": "k"}, {**user("b"), "thought": "c"}]
    stored = Dataset.from_list([{"prompt": messages}])
    assert stored[0]["prompt"][1]["name"] is None
    (prompt,) = encoder(tokenizer).encode([stored[0]])
    assert prompt.ids == ids("k a c b")
    assert prompt.source == messages  # what rewards get


def test_null_keywords_of_a_row_leave_those_of_the_config():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ word }} {{ messages[0]['content'] }}"
    rows = [{"prompt": [user("a")], "chat_template_kwargs": given} for given in ({"word": "k"}, {})]
    stored = Dataset.from_list(rows)
    assert stored[1]["chat_template_kwargs"] == {"word": None}
    first, second = encoder(tokenizer, chat_template_kwargs={"word": "b"}).encode(list(stored))
    assert (first.ids, second.ids) == (ids("k a"), ids("b a"))


def test_blocks_of_text_are_joined_for_templates_of_text():
    blocks = [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}]
    (prompt,) = encoder().encode([{"prompt": [{"role": "user", "content": blocks}]}])
    assert prompt.ids == ids("<user> a b <assistant>")


def test_blocks_of_text_stay_for_templates_that_read_blocks():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% for block in m['content'] %}{% if block['type'] == 'text' %}"
        "{{ block['text'] }} k {% endif %}{% endfor %}{% endfor %}"
    )
    blocks = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    (prompt,) = encoder(tokenizer).encode([{"prompt": [{"role": "user", "content": blocks}]}])
    assert prompt.ids == ids("a k b k")


def test_a_call_of_tools_may_have_no_content():
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}
    (prompt,) = encoder().encode([{"prompt": [user("a"), call, user("b")]}])
    assert prompt.ids == ids("<user> a <assistant> <user> b <assistant>")


# -- text that the prompt leaves open --------------------------------------------------------------

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{{ opening }}{% endif %}"
)


@pytest.mark.parametrize(
    ("opening", "opened"),
    [
        ("", ""),
        ("<think>\n", "<think>\n"),
        ("<think>\n\n</think>\n\n", "<think>\n\n</think>\n\n"),
        ("<start_of_answer>", ""),
    ],
    ids=["nothing", "a thought", "no thought", "a special token"],
)
def test_what_a_template_opens_is_known(opening, opened):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHATML
    tokenizer.add_special_tokens({"extra_special_tokens": ["<start_of_answer>"]})
    keywords = {"opening": opening}
    (prompt,) = encoder(tokenizer, chat_template_kwargs=keywords).encode(
        [{"prompt": [user("<b>")]}]
    )
    assert prompt.opened == opened


def test_an_answer_that_the_prompt_begins_is_open():
    begun = {"role": "assistant", "content": "b c"}
    (prompt,) = encoder().encode([{"prompt": [user("a"), begun]}])
    assert prompt.opened == "b c"


@pytest.mark.parametrize(
    ("text", "opened"),
    [("a b", ""), ("a <think>", "<think>"), ("a <b> c", ""), ("a <eos>", "")],
)
def test_a_text_opens_the_tag_that_it_ends_in(text, opened):
    (prompt,) = encoder().encode([{"prompt": text}])
    assert prompt.opened == opened


# -- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [{"question": "a", "answer": "b"}],
            r"Row 0 has no `prompt`; its columns are \['answer', 'question'\]",
        ),
        ([{"prompt": "a"}, {"prompt": ""}], "row 1 is empty"),
        ([{"prompt": []}], "row 0 is empty"),
        ([{"prompt": "   "}], "row 0 has no tokens"),
        ([{"prompt": None}], "row 0 is None. It must be a text, or a list of messages"),
        ([{"prompt": ["a", "b"]}], r"row 0 is \['a', 'b'\]"),
        (
            [{"prompt": "a"}, {"prompt": [user("a")]}],
            "row 1 is messages, but the rows before it hold a text",
        ),
        (
            [{"prompt": [user("a")]}, {"prompt": "a"}],
            "row 1 is a text, but the rows before it hold messages",
        ),
        ([{"prompt": [{"role": "user", "content": [{"type": "image"}]}]}], "row 0 holds an image"),
        (
            [{"prompt": [{"role": "user", "content": None}]}],
            "row 0 has .*'user' whose content is None",
        ),
        ([{"prompt": [{"role": "user"}]}], "row 0 has .*'user' whose content is None"),
    ],
)
def test_rows_that_are_no_prompts_are_refused(rows, message):
    with pytest.raises(ValueError, match=message):
        encoder().encode(rows)


def test_messages_need_a_chat_template():
    with pytest.raises(ValueError, match=r"no chat template.*tokenizer\.chat_template"):
        encoder(tiny_tokenizer(chat_template=False)).encode([{"prompt": [user("a")]}])


def test_a_prompt_must_leave_room_for_its_completion():
    # 10 tokens of context less 4 of completion leave 6.
    fits = encoder(context=10)
    assert len(fits.encode([{"prompt": "a b c d e f"}])[0].ids) == 6
    with pytest.raises(
        ValueError, match=r"row 1 has 7 tokens.*context of 10.*max_completion_length=4 leaves 6"
    ):
        fits.encode([{"prompt": "a"}, {"prompt": "a b c d e f g"}])


def test_a_template_that_fails_names_the_row_in_the_dataset():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ messages[0]['content'] + messages[1]['content'] }}"
    rows = [DatasetRow({"prompt": [user("a")]}, 7)]
    with pytest.raises(ValueError, match=r"template refuses the prompt of row 7.*Undefined"):
        encoder(tokenizer).encode(rows)


def test_an_overlong_prompt_can_lose_its_beginning():
    cut = encoder(context=7, overlong_prompts="truncate_left")  # leaves 3
    (prompt,) = cut.encode([{"prompt": "a b c d e"}])
    assert prompt.ids == ids("c d e")
    begun = encoder(bos_tokenizer(), context=7, overlong_prompts="truncate_left")
    assert begun.encode([{"prompt": "a b a b b"}])[0].ids == [0, 4, 4]


def test_a_context_that_completions_fill_is_refused():
    with pytest.raises(ValueError, match=r"max_completion_length=4 leaves no room.*of 4 tokens"):
        encoder(context=4)
    with pytest.raises(ValueError, match="max_completion_length=9 leaves no room"):
        encoder(context=8, generation_kwargs={"max_new_tokens": 9})


def test_the_form_is_decided_once_for_the_dataset():
    one = encoder()
    one.encode([{"prompt": "a"}])
    with pytest.raises(ValueError, match="row 0 is messages"):
        one.encode([{"prompt": [user("a")]}])


# -- checking before the weights are loaded --------------------------------------------------------


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (
            Dataset.from_dict({"question": ["a"]}),
            r"eval_dataset: Row 0 has no `prompt`; its columns are \['question'\]",
        ),
        (
            Dataset.from_dict({"prompt": ["a", "b", ""]}),
            "eval_dataset: The prompt of row 2 is empty",
        ),
        (Dataset.from_dict({"prompt": ["a", None]}), "row 1 is None"),
        ([{"prompt": "a"}, {"prompt": [user("a")]}], "row 1 is messages"),
        (IterableDataset.from_generator(lambda: iter([{"question": "a"}]), features=None), None),
        (
            Dataset.from_dict({"question": ["a"]}).to_iterable_dataset(),
            r"its columns are \['question'\]",
        ),
    ],
    ids=["no column", "empty", "none", "mixed", "unknown columns", "stream without the column"],
)
def test_a_dataset_is_checked_row_by_row_as_far_as_it_can_be(dataset, message):
    if message is None:
        check_dataset(dataset, encoder().form, name="eval_dataset")
        return
    with pytest.raises(ValueError, match=message):
        check_dataset(dataset, encoder().form, name="eval_dataset")


def test_a_good_dataset_passes_and_none_is_no_dataset():
    check_dataset(Dataset.from_list([{"prompt": [user("a")]}] * 3), encoder().form)
    check_dataset(Dataset.from_dict({"prompt": ["a", "b"]}), encoder().form)
    check_dataset(None, encoder().form)


def test_a_dataset_with_a_transform_is_not_read_through():
    seen = []
    dataset = Dataset.from_dict({"prompt": ["a"] * 50}).with_transform(
        lambda batch: seen.append(batch) or batch
    )
    check_dataset(dataset, encoder().form)
    assert not seen


# -- special tokens and the way back ---------------------------------------------------------------


def test_completions_come_back_in_the_form_of_their_prompt_without_special_tokens():
    one = encoder()
    (text,) = one.encode([{"prompt": "a"}])
    assert one.decode(text, ids("b c <eos>")) == "b c"
    assert one.decode(text, []) == ""
    (messages,) = encoder().encode([{"prompt": [user("a")]}])
    assert one.decode(messages, ids("b <eos>")) == [{"role": "assistant", "content": "b"}]


def test_every_token_that_ends_a_completion_counts():
    tokenizer = tiny_tokenizer()
    assert ending_tokens(tokenizer) == (1,)
    assert ending_tokens(tokenizer, GenerationConfig(eos_token_id=[3, 1])) == (1, 3)
    tokenizer.eos_token = None
    assert ending_tokens(tokenizer, GenerationConfig(eos_token_id=3)) == (3,)
    with pytest.raises(ValueError, match=r"end-of-sequence.*tokenizer\.eos_token"):
        ending_tokens(tokenizer, GenerationConfig())


def test_padding_falls_back_to_eos():
    tokenizer = tiny_tokenizer()
    assert padding_token(tokenizer) == 0
    tokenizer.pad_token = None
    assert padding_token(tokenizer) == 1
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match=r"pad token.*tokenizer\.pad_token"):
        padding_token(tokenizer)


def test_the_encoder_of_a_model_by_path_reads_no_weights(tmp_path):
    model = tiny_model(max_position_embeddings=77)
    model.generation_config = GenerationConfig(eos_token_id=[1, 4])
    model.config.save_pretrained(tmp_path)
    model.generation_config.save_pretrained(tmp_path)
    settings = RolloutSettings(max_completion_length=4)
    for given in (model, str(tmp_path)):
        built = PromptEncoder.build(tiny_tokenizer(), given, settings)
        assert (built.eos, built.pad, built.context_length) == ((1, 4), 0, 77)


def test_ends_in_config_json_alone_count_however_the_model_is_given(tmp_path):
    model = tiny_model(eos_token_id=[1, 6])
    model.config.save_pretrained(tmp_path)  # no generation_config.json
    settings = RolloutSettings(max_completion_length=4)
    for given in (model, str(tmp_path)):
        assert PromptEncoder.build(tiny_tokenizer(), given, settings).eos == (1, 6)


@pytest.mark.parametrize(
    ("rope", "length"),
    [
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}, 512),
        ({"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32}, 128),
        ({"rope_type": "dynamic", "factor": 2.0}, 256),
        ({"rope_type": "linear", "factor": 4.0}, 128),
        ({"rope_type": "default"}, 128),
    ],
    ids=["yarn", "yarn that is counted already", "dynamic", "linear", "default"],
)
def test_a_stretched_context_is_known(rope, length):
    config = tiny_model().config
    config.rope_parameters = {"rope_theta": 10000.0, **rope}
    assert context_length(config) == length


def test_a_config_that_says_nothing_limits_nothing():
    assert context_length(tiny_model().config) == 128
    assert context_length(MambaConfig()) is None
