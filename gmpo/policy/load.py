"""From a name, a path or a model to the policy: a causal language model that can be trained."""

import importlib.util
import json
import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.hub import cached_file

from gmpo.model_name import WHERE, base_model_name, without_place
from gmpo.policy.head.lm_head import cast_head_to_float32
from gmpo.policy.head.onednn import use_onednn
from gmpo.policy.settings import PolicySettings
from gmpo.unwrap import is_adapted

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers.utils.quantization_config import QuantizationConfigMixin


def load_policy(
    model: str | os.PathLike | nn.Module,
    settings: PolicySettings,
    *,
    quantization_config: "QuantizationConfigMixin | dict[str, Any] | None" = None,
    peft_config: "PeftConfig | None" = None,
    device: torch.device | None = None,
) -> nn.Module:
    """Return the policy, ready to be trained: a `PreTrainedModel`, or a `PeftModel` around one.

    Args:
        model: A hub name, a directory (of a model or of an adapter), or a model, which is used as
            it is.
        settings: `model_init_kwargs`, `trust_remote_code`, `disable_dropout`,
            `cast_lm_head_to_fp32`.
        quantization_config: Loads a model given by name with these quantized weights.
        peft_config: Puts a new adapter on the model.
        device: Where it will be trained; None for a CPU.

    Raises:
        TypeError: If `model` or `peft_config` is of another kind.
        ValueError: If options contradict each other, a path does not exist, or nothing in the model
            can be trained.
    """
    if isinstance(model, str | os.PathLike):
        policy = _load_by_name(os.fspath(model), settings, quantization_config)
    else:
        policy = _check_model(model, settings, quantization_config)
    if peft_config is not None:
        policy = _add_adapter(policy, peft_config)

    if settings.disable_dropout:
        disable_dropout(policy)
    elif (rate := dropout_of(policy)) > 0:
        warnings.warn(
            f"The policy drops activations (rates up to {rate:g}). Completions and old log-probs "
            "are computed without dropout and the loss with it, so ratios, KL and clipping measure "
            "its noise. Set disable_dropout=True, or set the rates to 0 (lora_dropout=0.0).",
            stacklevel=3,
        )
    if settings.cast_lm_head_to_fp32:
        cast_head_to_float32(policy)
    if device is None or device.type == "cpu":
        use_onednn(policy)
    _check_trainable(policy)
    return policy


def load_tokenizer(
    name: str, *, trust_remote_code: bool = False, revision: str | None = None
) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a model, padding on the left.

    A tokenizer without a padding token gets its end-of-sequence token for it.
    """
    check_path(name)
    where: dict[str, Any] = {"revision": revision or "main"}
    try:
        base = base_model_name(name, where)
        if base is not None and not _has_tokenizer(name, where):
            name, where = base, {}
        tokenizer = AutoTokenizer.from_pretrained(
            name, trust_remote_code=trust_remote_code, padding_side="left", **where
        )
    except (OSError, ValueError) as error:
        # transformers does not always say which model it looked for.
        error.add_note(
            f"Raised when the tokenizer of {name!r} was loaded. A model is a folder that "
            "save_pretrained wrote, with its tokenizer, or a name on the hub."
        )
        raise

    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _has_tokenizer(name: str, where: dict[str, Any]) -> bool:
    """Return whether an adapter's folder or repository holds a tokenizer."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        return (folder / "tokenizer_config.json").exists()
    missing_ok = {"_raise_exceptions_for_missing_entries": False}
    return cached_file(name, "tokenizer_config.json", **where, **missing_ok) is not None


def check_path(name: str) -> None:
    """Raise a ValueError if `name` can only be a path, and nothing is there."""
    looks_local = name.startswith((".", "~", os.sep)) or name.count("/") > 1 or "\\" in name
    if looks_local and not Path(name).expanduser().exists():
        raise ValueError(
            f"model={name!r} looks like a path, but nothing is there "
            f"(working directory: {os.getcwd()}). Give an existing directory, or the name of a "
            "model on the hub."
        )


def init_keywords(settings: PolicySettings) -> dict[str, Any]:
    """Return the keywords for from_pretrained: `model_init_kwargs`, in float32 by default."""
    keywords = settings.model_init_kwargs or {}
    keywords = json.loads(keywords) if isinstance(keywords, str) else dict(keywords)
    dtype = keywords.pop("torch_dtype", None)
    keywords["dtype"] = _checked_dtype(keywords.get("dtype", dtype))
    keywords.setdefault("trust_remote_code", settings.trust_remote_code)
    return keywords


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout of `model` to 0: the modules, and the rates that attention layers keep."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name in _rates_of(module):
            setattr(module, name, 0.0)


def dropout_of(model: nn.Module) -> float:
    """Return the largest rate at which something in `model` is dropped in training; 0 for none."""
    rates = [0.0]
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            rates.append(module.p)
        rates += [getattr(module, name) for name in _rates_of(module)]
    return max(rates)


def _rates_of(module: nn.Module) -> list[str]:
    """Return the names under which a layer keeps rates of dropout as numbers."""
    names = ("attention_dropout", "dropout", "hidden_dropout", "resid_pdrop", "attn_pdrop")
    return [name for name in names if isinstance(vars(module).get(name), float)]


def _checked_dtype(dtype: object) -> torch.dtype | str:
    if dtype is None:
        return torch.float32
    named = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype == "auto":
        return "auto"
    if isinstance(named, torch.dtype):
        return named
    raise ValueError(
        f"model_init_kwargs['dtype']={dtype!r} is not a dtype. "
        "Use 'auto', or one like 'float32' or 'bfloat16'."
    )


def _load_by_name(name: str, settings: PolicySettings, quantization_config: object) -> nn.Module:
    check_path(name)
    keywords = init_keywords(settings)
    if quantization_config is not None:
        if "quantization_config" in keywords:
            raise ValueError(
                "quantization_config is given twice: as an argument and in model_init_kwargs. "
                "Give it once."
            )
        keywords["quantization_config"] = quantization_config
    if keywords.get("quantization_config") is not None:
        _check_quantization()
        keywords.setdefault("device_map", {"": torch.cuda.current_device()})
    base_name = base_model_name(name, keywords)
    if base_name is not None:
        return _load_adapter(name, base_name, keywords)
    return AutoModelForCausalLM.from_pretrained(name, **keywords)


def _load_adapter(name: str, base_name: str, keywords: dict[str, Any]) -> nn.Module:
    """Return the base model that an adapter names, with that adapter, trainable."""
    _check_peft(f"model={name!r} is an adapter, which")
    from peft import PeftModel

    base = AutoModelForCausalLM.from_pretrained(base_name, **without_place(keywords))
    where = {key: keywords[key] for key in WHERE if key in keywords}
    folder = Path(name).expanduser()
    source = str(folder) if folder.is_dir() else name
    return PeftModel.from_pretrained(base, source, is_trainable=True, **where)


def _check_peft(needs: str) -> None:
    if importlib.util.find_spec("peft") is None:
        raise ValueError(
            f"{needs} needs peft, which is not installed. Run `pip install gmpo[peft]`."
        )


def _check_quantization() -> None:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError(
            "quantization_config needs bitsandbytes, which is not installed. "
            "Run `pip install gmpo[quantization]`, or load the model without quantization."
        )
    if not torch.cuda.is_available():
        raise ValueError(
            "quantization_config needs a CUDA device, and this machine has none. "
            "Load the model without quantization."
        )


def _check_model(model: object, settings: PolicySettings, quantization_config: object) -> nn.Module:
    if not (isinstance(model, PreTrainedModel) or is_adapted(model)):
        raise TypeError(
            f"model is a {type(model).__name__}. "
            "Give a name, a path, a PreTrainedModel or a PeftModel."
        )
    if settings.model_init_kwargs:
        raise ValueError(
            f"model_init_kwargs={settings.model_init_kwargs!r} is for a model given by name, and "
            f"model is a {type(model).__name__}. Pass these keywords where you load it, and leave "
            "model_init_kwargs out."
        )
    if quantization_config is not None:
        raise ValueError(
            f"quantization_config is for a model given by name, and model is a "
            f"{type(model).__name__}. Pass it where you load the model."
        )
    return model


def _add_adapter(policy: nn.Module, peft_config: object) -> nn.Module:
    _check_peft("peft_config")
    from peft import PeftConfig, get_peft_model

    if not isinstance(peft_config, PeftConfig):
        raise TypeError(
            f"peft_config is a {type(peft_config).__name__}. "
            "Give a PeftConfig, such as LoraConfig(...)."
        )
    if is_adapted(policy):
        raise ValueError(
            "peft_config asks for a new adapter, and model has one already. Give the model without "
            "its adapter (or merged with it: model.merge_and_unload()), or leave peft_config out "
            "to train the adapter it has."
        )
    assert isinstance(policy, PreTrainedModel)
    return get_peft_model(policy, peft_config)


def _check_trainable(policy: nn.Module) -> None:
    if any(parameter.requires_grad for parameter in policy.parameters()):
        return
    if is_adapted(policy):
        remedy = "Load the adapter with PeftModel.from_pretrained(..., is_trainable=True)."
    else:
        remedy = "Set requires_grad on what is to be trained, or pass a peft_config."
    raise ValueError(
        f"No parameter of the model ({type(policy).__name__}) can be trained. {remedy}"
    )
