"""gmpo's part inside vLLM's own processes: how published weights come into a loaded model.

vLLM loads `register` in each of its processes, through the entry point `vllm.general_plugins`, and
creates `Backend` for `weight_transfer_config={"backend": "gmpo"}`.  Weights come by reference (an
engine in the trainer's process), in safetensors files (a server without NCCL), or over vLLM's own
NCCL backend.

vLLM reloads a model layer by layer: a layer's parameters become placeholders, and when all of its
weights have come they are made again, repacked for the kernels and copied to where the old ones
lay.  On a CPU that leaves one thing behind: a head that is tied to the embedding gets no weights,
so its packed copy stays as it was.  `Backend` makes such copies again, and refuses to finish while
anything is missing.
"""

import logging
import os
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from gmpo.rollout.vllm.inside.names import BACKEND, WORKER

VllmConfig = Any  # vLLM's classes: this file can be read, and tested, without vLLM
VllmNcclEngine = Any
HfConfig = Any


def register() -> None:
    """Make the backend known to vLLM in this process.  May be called again."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND, WORKER, "Backend")


class WorkerExtension:
    """Methods that vLLM's workers get from gmpo, called over the route /collective_rpc."""

    vllm_config: VllmConfig  # the worker's

    def gmpo_describe(self) -> dict[str, Any]:
        """Return what a trainer must know of the engine."""
        config = self.vllm_config
        return {
            "backend": getattr(config.weight_transfer_config, "backend", "none"),
            "logprobs_mode": config.model_config.logprobs_mode,
            "longest": config.model_config.max_model_len,
            "dtype": str(config.model_config.dtype).removeprefix("torch."),
            "device": config.device_config.device_type,
            "workers": config.parallel_config.world_size_across_dp,
            "takes_adapters": config.lora_config is not None,
            "max_num_seqs": config.scheduler_config.max_num_seqs,
            "token_sets": config.model_config.return_sampling_mask,
        }


class Backend:
    """Loads published weights into the model of one vLLM worker.

    It has the methods of vLLM's `WeightTransferEngine` and does not inherit from it, so that this
    file can be read, and tested, without vLLM.

    Args:
        config: vLLM's WeightTransferConfig.
        vllm_config: All of vLLM's options.
        device: Of the model.
        model: Of this worker.
    """

    supports_draft_weight_update = False
    defers_processing = False

    def __init__(
        self, config: VllmConfig, vllm_config: VllmConfig, device: torch.device, model: nn.Module
    ) -> None:
        self.config = config
        self.vllm_config = vllm_config
        self.device = device
        self.model = model
        # Known now, since an update takes tied parameters apart while it lasts.
        self.needed = parameter_names(model)
        # Names of parameters since the update began; None between updates.
        self.loaded: set[str] | None = None
        self.nccl: VllmNcclEngine = None
        self.own_scale: float | None = None  # the model's own factor for logits, once changed

        # vLLM warns of each module that got no weights; `finish_weight_update` tells those
        # that lack some.
        reload_logger = logging.getLogger("vllm.model_executor.model_loader.reload.layerwise")
        reload_logger.setLevel(logging.ERROR)

    # -- called by vLLM's worker, in order ---------------------------------------------------------

    def parse_init_info(self, init_info: dict[str, Any]) -> dict[str, Any]:
        return init_info

    def init_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Begin a run, or change how the engine computes.

        Args:
            init_info: Any of "model": the `description` of the trainer's model; "nccl": vLLM's NCCL
                init info, if the weights come that way; "logits_scale": a factor for all logits.

        Raises:
            ValueError: The trainer's model is another than this, or an NCCL group has no id.
        """
        check_same_model(init_info.get("model", {}), self.vllm_config.model_config.hf_config)
        if "nccl" in init_info:
            self._join_nccl(init_info["nccl"])
        if "logits_scale" in init_info:
            self._scale_logits(init_info["logits_scale"])

    def start_weight_update(self) -> None:
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload
        from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

        # Forget what an update that broke off has buffered.
        for module in self.model.modules():
            info = get_layerwise_info(module)
            if info.can_load():
                info.load_numel = 0
                info.loaded_weights.clear()

        initialize_layerwise_reload(self.model)
        forget_packed(self.model)
        self.loaded = set()

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Load some weights.

        Args:
            update_info: {"weights": [(name, tensor), ...]}, {"path": a safetensors file}, vLLM's
                NCCL update info, or {"abort": reason} to break the update off.

        Raises:
            RuntimeError: For "abort"; vLLM's worker then accepts a new update.
        """
        if "abort" in update_info:
            raise RuntimeError(f"The weight update was broken off: {update_info['abort']}")

        if "names" in update_info:
            self.nccl.receive_weights(self.nccl.parse_update_info(update_info))
            torch.accelerator.synchronize()
        elif "weights" in update_info:
            self.load_weights(update_info["weights"])
        else:
            self.load_weights(read(update_info["path"]))

    def finish_weight_update(self) -> None:
        """Put the loaded weights in use.

        Raises:
            RuntimeError: Some have not come.
        """
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        loaded = {plain_name(name) for name in self.loaded or ()}
        missing = [names for names in self.needed if not names & loaded]
        if missing:
            raise RuntimeError(
                f"The weight update lacks {len(missing)} parameters of the engine's model, "
                f"{min(missing[0])!r} for one."
            )

        finalize_layerwise_reload(self.model, self.vllm_config.model_config)
        remake_packed(self.model)
        self.loaded = None

    def set_weight_update_target(self, model: nn.Module, model_config: VllmConfig) -> None:
        raise RuntimeError("gmpo's backend does not update draft models.")

    def reset_weight_update_target(self) -> None:
        """Do nothing: the target is always the model."""

    def drain_pending(self) -> None:
        """Do nothing: weights are in the model when `update_weights` returns."""

    def shutdown(self) -> None:
        if self.nccl is not None:
            self.nccl.shutdown()

    # -- how ---------------------------------------------------------------------------------------

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Give `weights` to vLLM's model, and note which parameters they fill.

        The model renames, fuses and shards them.
        """
        assert self.loaded is not None
        load = self.model.load_weights
        names: set[str] = set(load(weights) or ())  # pyright: ignore[reportCallIssue] (vLLM's model)
        self.loaded |= names
        return names

    def _scale_logits(self, factor: float) -> None:
        """Multiply all logits by `factor`, in the place where the model scales them itself."""
        processors: list[Any] = [
            module for module in self.model.modules() if type(module).__name__ == "LogitsProcessor"
        ]
        if len(processors) != 1:
            raise ValueError(
                f"vLLM's {type(self.model).__name__} has {len(processors)} logits processors, not "
                "one to scale logits with. Set temperature=1.0."
            )

        (processor,) = processors
        if self.own_scale is None:
            self.own_scale = float(processor.scale)
        processor.scale = self.own_scale * factor

    def _join_nccl(self, init_info: dict[str, Any]) -> None:
        # Without an id vLLM would meet the trainer at a store, and unpickle from it.
        if "nccl_unique_id_b64" not in init_info:
            raise ValueError("An NCCL group is joined by nccl_unique_id_b64 only.")
        from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine

        # It gives what it receives to `load_weights` of its "model": ours, which takes notes.
        model: Any = self
        self.nccl = NCCLWeightTransferEngine(self.config, self.vllm_config, self.device, model)
        self.nccl.init_transfer_engine(self.nccl.parse_init_info(init_info))


def read(path: str) -> list[tuple[str, Tensor]]:
    """Return the tensors of a safetensors file, in its order.

    Raises:
        ValueError: Not a safetensors file, or this process can't see it.
    """
    from safetensors import safe_open

    if not path.endswith(".safetensors"):
        raise ValueError(f"Weights come in safetensors files only, got {path!r}.")
    if not os.access(path, os.R_OK):
        raise ValueError(
            f"The server can't see the trainer's file {path!r}. Set vllm_weight_folder to a folder "
            "that both can read."
        )
    with safe_open(path, framework="pt") as file:
        names = file.keys()
        return [(name, file.get_tensor(name)) for name in names]


def check_same_model(theirs: dict[str, Any], ours: HfConfig) -> None:
    """Raise a ValueError if a trainer's model is described otherwise than vLLM's config `ours`."""
    text = ours.get_text_config() if hasattr(ours, "get_text_config") else ours
    for name, value in theirs.items():
        here = getattr(text, name, None)
        if here != value:
            raise ValueError(
                f"The trainer's model has {name}={value!r}, this engine's model has {here!r}. "
                "Serve the model that is trained."
            )


def parameter_names(model: nn.Module) -> list[set[str]]:
    """Return the names of each parameter, several if it is tied, without those of adapters."""
    names: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if "lora_" not in name:
            names.setdefault(id(parameter), set()).add(plain_name(name))
    return list(names.values())


def plain_name(name: str) -> str:
    """Return a parameter's name without what vLLM's wrappers for adapters add to it."""
    return name.replace(".base_layer.", ".")


# -- copies that CPU kernels keep of a weight ------------------------------------------------------


def stale(*args: object, **kwargs: object) -> Tensor:
    """Stand in for a packed weight from the begin of an update until it is packed again."""
    raise RuntimeError("This layer's weights are being updated.")


def packed_modules(model: nn.Module) -> list[nn.Module]:
    """Return the modules that hold a packed copy of their weight."""
    return [module for module in model.modules() if "cpu_linear" in vars(module)]


def forget_packed(model: nn.Module) -> None:
    """Make every use of a packed copy fail until it is packed again."""
    for module in packed_modules(model):
        vars(module)["cpu_linear"] = stale


def remake_packed(model: nn.Module) -> None:
    """Pack again what got no weights because it shares another module's."""
    for module in packed_modules(model):
        if vars(module)["cpu_linear"] is stale:
            method: Any = module.quant_method
            method.process_weights_after_loading(module)

    left = [module for module in packed_modules(model) if vars(module)["cpu_linear"] is stale]
    if left:
        names = ", ".join(type(module).__name__ for module in left)
        raise RuntimeError(f"The weights of {names} were not packed again.")
