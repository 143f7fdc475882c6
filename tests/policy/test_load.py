"""Names, paths and models become a policy, or an error that says what to do."""

import json
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from gmpo.policy import load as loading
from gmpo.policy.head import onednn
from gmpo.policy.head.lm_head import Float32Head, find_head
from gmpo.policy.head.onednn import OneDnnLinear
from gmpo.policy.load import load_policy, load_tokenizer
from gmpo.policy.settings import PolicySettings
from tests.policy.cases import make_model
from tests.tiny import tiny_tokenizer

LORA = {"target_modules": ["q_proj"]}


@pytest.fixture
def folder(tmp_path):
    make_model("llama", torch.bfloat16).save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def test_a_path_gives_a_float32_model(folder):
    policy = load_policy(folder, PolicySettings())
    assert type(policy).__name__ == "LlamaForCausalLM"
    assert {parameter.dtype for parameter in policy.parameters()} == {torch.float32}


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16, "auto"])
@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_model_init_kwargs_choose_the_dtype(folder, key, dtype):
    assert (
        load_policy(folder, PolicySettings(model_init_kwargs={key: dtype})).dtype == torch.bfloat16
    )


def test_model_init_kwargs_reach_the_loader(folder):
    policy = load_policy(
        folder, PolicySettings(model_init_kwargs='{"attn_implementation": "eager"}')
    )
    assert policy.config._attn_implementation == "eager"


def test_a_dtype_that_does_not_exist_is_an_error(folder):
    with pytest.raises(
        ValueError, match=r"model_init_kwargs\['dtype'\]='float33' is not a dtype. Use 'auto', or"
    ):
        load_policy(folder, PolicySettings(model_init_kwargs={"dtype": "float33"}))


@pytest.mark.parametrize("name", ["./nothing", "/no/model/here", "a/b/c", "~/nothing"])
def test_a_path_without_anything_is_an_error_before_anything_is_loaded(name, monkeypatch):
    monkeypatch.setattr(loading, "AutoModelForCausalLM", None)
    monkeypatch.setattr(loading, "AutoTokenizer", None)
    for load in (lambda: load_policy(name, PolicySettings()), lambda: load_tokenizer(name)):
        with pytest.raises(
            ValueError, match=f"model='{name}' looks like a path, but nothing is there"
        ):
            load()


def test_remote_code_runs_only_when_it_is_trusted(folder, monkeypatch):
    seen = []
    monkeypatch.setattr(
        loading.AutoModelForCausalLM,
        "from_pretrained",
        lambda name, **keywords: seen.append(keywords) or make_model("llama"),
    )
    load_policy(folder, PolicySettings())
    load_policy(folder, PolicySettings(trust_remote_code=True))
    assert [keywords["trust_remote_code"] for keywords in seen] == [False, True]


def test_a_model_is_used_as_it_is():
    model = make_model("llama", torch.bfloat16)
    assert load_policy(model, PolicySettings()) is model
    assert model.dtype == torch.bfloat16


def test_keywords_for_loading_do_not_fit_a_model():
    with pytest.raises(
        ValueError, match=r"model_init_kwargs=.*bfloat16.* is for a model given by name"
    ):
        load_policy(make_model("llama"), PolicySettings(model_init_kwargs={"dtype": "bfloat16"}))
    with pytest.raises(ValueError, match="quantization_config is for a model given by name"):
        load_policy(make_model("llama"), PolicySettings(), quantization_config=object())


@pytest.mark.parametrize("model", [None, 3, nn.Linear(2, 2)])
def test_other_things_are_a_type_error(model):
    with pytest.raises(
        TypeError, match=rf"model is a {type(model).__name__}\. Give a name, a path"
    ):
        load_policy(model, PolicySettings())


@pytest.mark.parametrize(
    "rates", [{"resid_pdrop": 0.3}, {"embd_pdrop": 0.3}, {"attn_pdrop": 0.3}], ids=str
)
def test_dropout_that_would_make_false_ratios_is_told(rates):
    none = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    with pytest.warns(UserWarning, match=r"rates up to 0.3.*Set disable_dropout=True"):
        load_policy(make_model("gpt2", **{**none, **rates}), PolicySettings())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_policy(make_model("gpt2", **none), PolicySettings())
        load_policy(make_model("gpt2", **rates), PolicySettings(disable_dropout=True))


def test_dropout_of_an_adapter_is_told():
    with pytest.warns(UserWarning, match=r"rates up to 0.2.*lora_dropout=0.0"):
        load_policy(
            make_model("llama"), PolicySettings(), peft_config=LoraConfig(lora_dropout=0.2, **LORA)
        )


@pytest.mark.parametrize(
    ("device", "expected"), [("cpu", OneDnnLinear), ("cuda", nn.Linear), (None, OneDnnLinear)]
)
def test_layers_compute_through_onednn_only_in_training_on_a_cpu(device, expected, monkeypatch):
    monkeypatch.setattr(onednn, "is_faster", lambda: True)
    where = None if device is None else torch.device(device)
    policy = load_policy(make_model("llama"), PolicySettings(), device=where)
    assert type(policy.model.layers[0].self_attn.q_proj) is expected


def test_dropout_is_disabled_everywhere():
    model = make_model("gpt2", resid_pdrop=0.3, embd_pdrop=0.2, attn_pdrop=0.1)
    ids = torch.arange(12)[None]
    assert not torch.equal(model(ids).logits, model(ids).logits)
    load_policy(model, PolicySettings(disable_dropout=True))
    assert torch.equal(model(ids).logits, model(ids).logits)
    llama = make_model("llama", attention_dropout=0.5)
    load_policy(llama, PolicySettings(disable_dropout=True))
    assert llama.training and torch.equal(llama(ids).logits, llama(ids).logits)


def test_a_new_adapter_is_put_on():
    policy = load_policy(make_model("llama"), PolicySettings(), peft_config=LoraConfig(**LORA))
    assert isinstance(policy, PeftModel)
    assert all(
        "lora_" in name for name, parameter in policy.named_parameters() if parameter.requires_grad
    )


def test_an_adapter_on_an_adapter_is_an_error():
    policy = get_peft_model(make_model("llama"), LoraConfig(**LORA))
    with pytest.raises(ValueError, match=r"model has one already.*merge_and_unload"):
        load_policy(policy, PolicySettings(), peft_config=LoraConfig(**LORA))
    with pytest.raises(TypeError, match=r"peft_config is a dict\. Give a PeftConfig"):
        load_policy(make_model("llama"), PolicySettings(), peft_config={"r": 8})


def test_the_folder_of_an_adapter_gives_base_and_adapter_trainable(folder, tmp_path):
    adapted = get_peft_model(
        load_policy(folder, PolicySettings()), LoraConfig(init_lora_weights=False, **LORA)
    )
    adapted.save_pretrained(tmp_path / "adapter")
    policy = load_policy(str(tmp_path / "adapter"), PolicySettings())
    assert isinstance(policy, PeftModel)
    assert any(parameter.requires_grad for parameter in policy.parameters())
    ids = torch.arange(12)[None]
    torch.testing.assert_close(policy(ids).logits, adapted(ids).logits)


def test_an_adapter_on_the_hub_gives_base_and_adapter(folder, tmp_path, monkeypatch):
    """A hub name is one that the hub's cache holds; nothing is asked for over the network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    repository = tmp_path / "cache" / "models--me--adapter"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc")
    base = load_policy(folder, PolicySettings())
    adapted = get_peft_model(base, LoraConfig(init_lora_weights=False, **LORA))
    adapted.save_pretrained(repository / "snapshots" / "abc")

    settings = PolicySettings(model_init_kwargs={"cache_dir": str(tmp_path / "cache")})
    policy = load_policy("me/adapter", settings)
    assert isinstance(policy, PeftModel)
    ids = torch.arange(12)[None]
    torch.testing.assert_close(policy(ids).logits, adapted(ids).logits)


def test_an_adapter_without_a_base_is_an_error_with_its_remedy(folder, tmp_path):
    adapted = get_peft_model(load_policy(folder, PolicySettings()), LoraConfig(**LORA))
    adapted.save_pretrained(tmp_path)
    described = json.loads((tmp_path / "adapter_config.json").read_text())
    described["base_model_name_or_path"] = None
    (tmp_path / "adapter_config.json").write_text(json.dumps(described))
    with pytest.raises(ValueError, match=r"does not say what its base model is.*PeftModel"):
        load_policy(str(tmp_path), PolicySettings())


def test_an_adapter_whose_base_is_gone_is_an_error_that_names_both(folder, tmp_path):
    adapted = get_peft_model(load_policy(folder, PolicySettings()), LoraConfig(**LORA))
    adapted.save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    described = json.loads(file.read_text())
    described["base_model_name_or_path"] = str(tmp_path / "gone")
    file.write_text(json.dumps(described))
    with pytest.raises(ValueError, match=r"adapter.* is an adapter of .*gone', and nothing is"):
        load_policy(str(tmp_path / "adapter"), PolicySettings())


def test_an_adapter_without_a_tokenizer_has_that_of_its_base(folder, tmp_path):
    tiny_tokenizer().save_pretrained(folder)
    adapted = get_peft_model(load_policy(folder, PolicySettings()), LoraConfig(**LORA))
    adapted.save_pretrained(tmp_path / "adapter")
    assert load_tokenizer(str(tmp_path / "adapter")).get_vocab() == tiny_tokenizer().get_vocab()


def test_nothing_to_train_is_an_error_with_its_remedy(folder, tmp_path):
    with pytest.raises(ValueError, match=r"No parameter of the model .* Set requires_grad"):
        load_policy(make_model("llama").requires_grad_(False), PolicySettings())
    get_peft_model(load_policy(folder, PolicySettings()), LoraConfig(**LORA)).save_pretrained(
        tmp_path / "adapter"
    )
    frozen = PeftModel.from_pretrained(
        load_policy(folder, PolicySettings()), str(tmp_path / "adapter")
    )
    with pytest.raises(ValueError, match=r"is_trainable=True"):
        load_policy(frozen, PolicySettings())


@pytest.mark.parametrize("installed", [True, False])
def test_quantization_without_its_library_or_device_is_an_error(folder, monkeypatch, installed):
    monkeypatch.setattr(
        loading.importlib.util, "find_spec", lambda name: object() if installed else None
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    expected = "needs a CUDA device" if installed else r"pip install gmpo\[quantization\]"
    with pytest.raises(ValueError, match=expected):
        load_policy(folder, PolicySettings(), quantization_config=object())
    with pytest.raises(ValueError, match="given twice"):
        settings = PolicySettings(model_init_kwargs={"quantization_config": object()})
        load_policy(folder, settings, quantization_config=object())


@pytest.mark.parametrize("name", ["llama", "llama-tied", "llama-bias"])
def test_the_head_computes_in_float32(name):
    model = make_model(name, torch.bfloat16)
    policy = load_policy(model, PolicySettings(cast_lm_head_to_fp32=True))
    head = find_head(policy)
    tied = name == "llama-tied"
    assert isinstance(head, Float32Head)
    assert head.weight.dtype == (torch.bfloat16 if tied else torch.float32)
    assert (head.weight is policy.get_input_embeddings().weight) == tied
    assert policy(torch.arange(5)[None]).logits.dtype == torch.float32
    assert policy.generate(torch.arange(5)[None], max_new_tokens=2, do_sample=False).shape == (1, 7)


def test_the_head_of_a_reference_computes_in_float32_with_its_own_weights():
    from gmpo.policy.reference import make_reference

    policy = load_policy(
        make_model("llama", torch.bfloat16), PolicySettings(cast_lm_head_to_fp32=True)
    )
    reference = make_reference(policy, 0.1)
    ids = torch.arange(5)[None]
    before = reference.model(ids).logits
    with torch.no_grad():
        policy.lm_head.weight += 1.0
    torch.testing.assert_close(reference.model(ids).logits, before, rtol=0, atol=0)
    assert before.dtype == torch.float32


def test_the_tokenizer_pads_on_the_left_with_something(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token, tokenizer.padding_side = None, "right"
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    assert loaded.padding_side == "left"
    assert loaded.pad_token == loaded.eos_token == "<eos>"


def test_a_folder_that_holds_no_model_is_named_in_the_error(tmp_path):
    with pytest.raises((OSError, ValueError)) as caught:
        load_tokenizer(str(tmp_path))
    assert f"the tokenizer of {str(tmp_path)!r} was loaded" in caught.value.__notes__[0]
