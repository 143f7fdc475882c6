import logging

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from gmpo.reward.reward_model import (
    ModelReward,
    RewardModelSettings,
    batches_by_length,
    max_input_length,
)
from gmpo.reward.sources import build_sources
from tests.reward.cases import assistant, call, rollout, user

SPECIAL = {"<unk>": 0, "<s>": 1, "</s>": 2, "<pad>": 3, "user": 4, "assistant": 5}
WORDS = SPECIAL | {word: 6 + i for i, word in enumerate("abcdefghij")}
TEMPLATE = "<s> {% for m in messages %}{{ m.role }} {{ m.content }} </s> {% endfor %}{{ suffix }}"


def make_tokenizer(*, pad=None, template=None, max_length=None):
    words = Tokenizer(models.WordLevel(WORDS, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    options = {} if max_length is None else {"model_max_length": max_length}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token=pad,
        **options,
    )
    tokenizer.chat_template = template
    return tokenizer


def make_model(cls=LlamaForSequenceClassification, *, num_labels=1, max_length=64, seed=0):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=max_length,
        attention_dropout=0.5,
        num_labels=num_labels,
        pad_token_id=None,
    )
    return cls(config)


def source_of(model=None, tokenizer=None, **options):
    (source,) = build_sources(
        model or make_model(),
        tokenizer or make_tokenizer(pad="<pad>"),
        model_settings=RewardModelSettings(**options),
    )
    assert isinstance(source, ModelReward)
    return source


def logit(model, text):
    """Of one row alone, without padding: the classifier's own score at its last token."""
    ids = torch.tensor([[WORDS.get(word, 0) for word in text.split()]])
    with torch.no_grad():
        hidden = model.eval().model(ids).last_hidden_state[0, -1]
        return float(model.score(hidden)[0])


TEXTS = [("a b", " c"), ("a", " b c d e f"), ("d", " e"), ("h i", " j a b"), ("a", "")]


@pytest.mark.parametrize("tokens_per_batch", [1, 8, 1000])
def test_each_row_gets_the_logit_of_its_own_text(tokens_per_batch):
    model = make_model()
    model.train()  # dropout of a reward model never acts
    source = source_of(model, tokens_per_batch=tokens_per_batch)
    scores = source.score(call([rollout(prompt, completion) for prompt, completion in TEXTS]))
    expected = [logit(model, f"<s> {prompt}{completion}") for prompt, completion in TEXTS]
    assert scores == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert len(set(scores)) == len(scores)


def test_padding_is_hidden_from_a_model_that_looks_both_ways():
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16,
        num_labels=1,
    )
    model = BertForSequenceClassification(config).eval()
    scores = source_of(model).score(call([rollout("a b", " c d e f"), rollout("a", " b")]))
    with torch.no_grad():
        alone = model(torch.tensor([[WORDS["<s>"], WORDS["a"], WORDS["b"]]])).logits.item()
    assert scores[1] == pytest.approx(alone, rel=1e-4)


def test_a_tokenizer_without_padding_pads_with_its_end_token_and_stays_as_it_is():
    model, tokenizer = make_model(), make_tokenizer()
    source = source_of(model, tokenizer)
    scores = source.score(call([rollout("a", " b c d"), rollout("a", " b")]))
    assert scores == pytest.approx([logit(model, "<s> a b c d"), logit(model, "<s> a b")], rel=1e-4)
    assert model.config.pad_token_id == SPECIAL["</s>"]
    assert tokenizer.pad_token is None


def test_conversations_go_through_the_template_once():
    model = make_model()
    source = source_of(
        model,
        make_tokenizer(pad="<pad>", template=TEMPLATE),
        chat_template_kwargs={"suffix": "assistant j"},
    )
    chats = [
        rollout([user("a b")], [assistant("c")]),
        rollout([user("a"), assistant("b"), user("c")], [assistant("d e")]),
    ]
    expected = [
        logit(
            model, "<s> user a b </s> assistant c </s> assistant j"
        ),  # one <s>: not a second one from the tokenizer
        logit(model, "<s> user a </s> assistant b </s> user c </s> assistant d e </s> assistant j"),
    ]
    assert source.score(call(chats)) == pytest.approx(expected, rel=1e-4)


def test_plain_text_that_brings_its_start_token_gets_no_second_one():
    model = make_model()
    (score,) = source_of(model).score(call([rollout("<s> a b", " c")]))
    assert score == pytest.approx(logit(model, "<s> a b c"), rel=1e-4)


def test_no_graph_is_built():
    model, graphs = make_model(), []
    model.register_forward_hook(
        lambda module, given, output: graphs.append(output.logits.requires_grad)
    )
    source_of(model).score(call([rollout("a", " b")]))
    assert graphs == [False]


@pytest.mark.parametrize(("model_length", "tokenizer_length"), [(4, None), (64, 4)])
def test_text_that_is_too_long_is_cut_and_never_silently(caplog, model_length, tokenizer_length):
    model = make_model(max_length=model_length)
    source = source_of(model, make_tokenizer(pad="<pad>", max_length=tokenizer_length))
    metrics = []
    asked = call(
        [rollout("a b", " c"), rollout("a b", " c d e"), rollout("a b", " c d")],
        log_metric=lambda name, value: metrics.append((name, value)),
    )
    with caplog.at_level(logging.WARNING):
        scores = source.score(asked)
        source.score(asked)
    full, cut = logit(model, "<s> a b c"), logit(model, "<s> a b c")
    assert scores == pytest.approx([full, cut, cut], rel=1e-4)
    assert metrics[:3] == [(f"rewards/{source.name}/truncated", share) for share in (0.0, 1.0, 1.0)]
    (record,) = [record for record in caplog.records if record.name == "gmpo.reward.reward_model"]
    assert "reads 4 tokens at most" in record.getMessage() and "has 6" in record.getMessage()


@pytest.mark.parametrize(
    ("model_length", "tokenizer_length", "expected"), [(64, None, 64), (64, 8, 8), (8, 64, 8)]
)
def test_the_shorter_limit_of_model_and_tokenizer_holds(model_length, tokenizer_length, expected):
    assert (
        max_input_length(
            make_model(max_length=model_length), make_tokenizer(max_length=tokenizer_length)
        )
        == expected
    )


@pytest.mark.parametrize(
    ("lengths", "budget", "expected"),
    [
        ([3, 9, 5, 1], 10, [[1], [2, 0], [3]]),  # 9 | 5 + 5 | 1
        ([3, 9, 5, 1], 3, [[1], [2], [0], [3]]),
        ([2, 2, 2], 100, [[0, 1, 2]]),
        ([], 10, []),
    ],
)
def test_batches_hold_rows_of_like_length_within_the_budget(lengths, budget, expected):
    assert list(batches_by_length(lengths, budget)) == expected


# -- loading -----------------------------------------------------------------------------------------------------------


def save(folder, model, *, pad="<pad>"):
    model.save_pretrained(folder)
    make_tokenizer(pad=pad).save_pretrained(folder)
    return str(folder)


def test_a_model_given_by_path_is_loaded_in_float32_with_its_own_tokenizer(tmp_path):
    model = make_model().to(torch.bfloat16)
    path = save(tmp_path / "judge", model)
    (source,) = build_sources([path])
    assert source.name == "judge"
    assert source.model.dtype is torch.float32
    assert source.score(call([rollout("a", " b")])) == pytest.approx(
        [logit(model.float(), "<s> a b")], rel=1e-4
    )


def test_a_path_may_start_at_the_home_folder_or_be_a_path_object(tmp_path, monkeypatch):
    save(tmp_path / "judge", make_model())
    monkeypatch.setenv("HOME", str(tmp_path))
    assert [source.name for source in build_sources(["~/judge", tmp_path / "judge"])] == [
        "judge",
        "judge_2",
    ]


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_model_init_kwargs_reach_the_model(tmp_path, key):
    path = save(tmp_path / "judge", make_model())
    given = {key: "bfloat16", "attn_implementation": "eager"}
    (source,) = build_sources(path, model_settings=RewardModelSettings(init_kwargs=given))
    assert source.model.dtype is torch.bfloat16
    assert source.model.config._attn_implementation == "eager"
    assert given == {key: "bfloat16", "attn_implementation": "eager"}


def test_a_model_that_came_from_a_path_finds_its_tokenizer_there(tmp_path):
    path = save(tmp_path / "judge", make_model())
    model = LlamaForSequenceClassification.from_pretrained(path, num_labels=1)
    (source,) = build_sources(model)
    assert source.name == "judge"
    assert source.tokenizer.get_vocab() == WORDS


def test_a_given_tokenizer_replaces_the_model_s_own(tmp_path):
    tokenizer = make_tokenizer(pad="<pad>")
    (source,) = build_sources([save(tmp_path / "judge", make_model())], [tokenizer])
    assert source.tokenizer is tokenizer


def test_models_and_functions_stand_side_by_side_and_the_list_stays(tmp_path):
    path = save(tmp_path / "judge", make_model())

    def flat(completions):
        return [0.0] * len(completions)

    rewards = [flat, path, path]
    sources = build_sources(rewards, [None, None, make_tokenizer(pad="<pad>")])
    assert [source.name for source in sources] == ["flat", "judge", "judge_2"]
    assert rewards == [flat, path, path]


def refused(rewards, tokenizers=None):
    with pytest.raises(ValueError) as caught:
        build_sources(rewards, tokenizers)
    return str(caught.value)


def test_a_checkpoint_whose_head_would_be_random_is_refused(tmp_path):
    message = refused(save(tmp_path / "language_model", make_model(LlamaForCausalLM)))
    assert "not a reward model" in message and "score.weight" in message


def test_a_checkpoint_with_several_labels_is_refused(tmp_path):
    message = refused(save(tmp_path / "classes", make_model(num_labels=3)))
    assert "not a reward model" in message and "score.weight" in message


def test_a_model_with_several_labels_is_refused():
    assert "3 labels" in refused(make_model(num_labels=3), make_tokenizer(pad="<pad>"))


def test_a_module_that_is_no_classifier_is_refused():
    assert "Linear" in refused(torch.nn.Linear(1, 1))


def test_a_model_from_nowhere_needs_a_tokenizer():
    assert "reward_processing_classes" in refused(make_model())


def test_what_is_no_tokenizer_is_refused():
    assert "'a tokenizer' (str)" in refused(make_model(), "a tokenizer")


def test_conversations_without_a_template_are_refused():
    with pytest.raises(ValueError, match="no chat template"):
        source_of().score(call([rollout([user("a")], [assistant("b")])]))


def test_a_tokenizer_without_pad_and_end_tokens_is_refused():
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    assert "no pad and no eos" in refused(make_model(), tokenizer)


def test_a_prefilled_answer_is_read_as_one_turn():
    model = make_model()
    source = source_of(model, make_tokenizer(pad="<pad>", template=TEMPLATE))
    begun = rollout([user("a b"), assistant("c ")], [assistant("d")])
    begun.prompt.opened = "c "
    whole = logit(model, "<s> user a b </s> assistant c d </s>")
    assert source.score(call([begun])) == [pytest.approx(whole, abs=1e-5)]


def test_a_tag_that_the_prompt_opened_is_read_too():
    model = make_model()
    source = source_of(model, make_tokenizer(pad="<pad>", template=TEMPLATE))
    begun = rollout([user("a")], [assistant("d e")])
    begun.prompt.opened = "j "
    whole = logit(model, "<s> user a </s> assistant j d e </s>")
    assert source.score(call([begun])) == [pytest.approx(whole, abs=1e-5)]


def test_a_tokenizer_larger_than_the_embedding_is_refused():
    tokenizer = make_tokenizer(pad="<pad>")
    tokenizer.add_tokens(["k", "l"])
    with pytest.raises(
        ValueError, match=rf"has {len(WORDS) + 2} tokens.*embeddings for {len(WORDS)}"
    ):
        source_of(make_model(), tokenizer)
