"""gmpo's part inside vLLM's own processes: how published weights come into a loaded model.

vLLM loads `register` in each of its processes, through the entry point `vllm.general_plugins`, and creates `Backend`
for `weight_transfer_config={"backend": "gmpo"}`.  Weights come by reference (an engine in the trainer's process), in
safetensors files (a server without NCCL), or over vLLM's own NCCL backend.

vLLM reloads a model layer by layer: a layer's parameters become placeholders, and when all of its weights have come
they are made anew, repacked for the kernels and copied to where the old ones lay.  On a CPU that leaves one thing
behind: a head that is tied to the embedding gets no weights of its own, so its packed copy stays what it was.
`Backend` makes such copies anew, and refuses to finish while anything is missing.
"""

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

CPU_BLOCK = 32  # tokens; a group reads its prompt once as far as it fills blocks, and vLLM's own on CPUs hold 128
NAME = "gmpo"
LOADER = "gmpo.rollout.vllm.inside.worker"
EXTENSION = f"{LOADER}.WorkerExtension"


def register() -> None:
    """Make the backend known to vLLM in this process.  May be called again."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    if NAME not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(NAME, LOADER, "Backend")


class WorkerExtension:
    """What vLLM's workers can do besides, over its route /collective_rpc."""

    vllm_config: Any  # the worker's

    def gmpo_describe(self) -> dict[str, Any]:
        """What a trainer must know of the engine."""
        config = self.vllm_config
        return {
            "backend": getattr(config.weight_transfer_config, "backend", "none"),
            "logprobs_mode": config.model_config.logprobs_mode,
            "longest": config.model_config.max_model_len,
            "dtype": str(config.model_config.dtype).removeprefix("torch."),
            "device": config.device_config.device_type,
            "workers": config.parallel_config.world_size_across_dp,
            "takes_adapters": config.lora_config is not None,
        }


class Backend:
    """Loads published weights into the model of one vLLM worker; has the methods of vLLM's `WeightTransferEngine`.

    It does not inherit from that class, so that this file can be read, and tested, without vLLM.

    Args:
        config: vLLM's WeightTransferConfig.
        vllm_config: All of vLLM's options.
        device: Of the model.
        model: Of this worker.
    """

    supports_draft_weight_update = False
    defers_processing = False

    def __init__(
        self, config: Any, vllm_config: Any, device: torch.device, model: nn.Module
    ) -> None:
        self.config = config
        self.vllm_config = vllm_config
        self.device = device
        self.model = model
        self.needed = parameter_names(
            model
        )  # now, since an update takes tied parameters apart while it lasts
        self.loaded: set[str] | None = (
            None  # names of parameters since the update began; None: none is going on
        )
        self.nccl: Any = None
        self.own_scale: float | None = None  # of the model's logits; None: never changed
        # warns of each module without weights of its own; `finish_weight_update` tells those that lack some
        logging.getLogger("vllm.model_executor.model_loader.reload.layerwise").setLevel(
            logging.ERROR
        )

    # -- what vLLM's worker calls, in order ---------------------------------------------------------------------------

    def parse_init_info(self, init_info: dict[str, Any]) -> dict[str, Any]:
        return init_info

    def init_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Begin a run, or change how the engine computes.

        Args:
            init_info: Any of "model": what `description` says of the trainer's model; "nccl": vLLM's NCCL init info, if
                the weights come that way; "logits_scale": a factor for all logits.

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

        for module in self.model.modules():
            info = get_layerwise_info(module)
            if (
                info.can_load()
            ):  # left over from an update that broke off: what it has buffered must not count
                info.load_numel = 0
                info.loaded_weights.clear()
        initialize_layerwise_reload(self.model)
        forget_packed(self.model)
        self.loaded = set()

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Load some weights.

        Args:
            update_info: {"weights": [(name, tensor), ...]}, {"path": a safetensors file}, vLLM's NCCL update info, or
                {"abort": reason} to break the update off.

        Raises:
            RuntimeError: For "abort"; vLLM's worker then accepts a new update.
        """
        if "abort" in update_info:
            raise RuntimeError(f"The weight update was broken off: {update_info['abort']}")
        if "names" in update_info:
            self.nccl.receive_weights(self.nccl.parse_update_info(update_info))
            torch.accelerator.synchronize()
        else:
            self.load_weights(
                update_info["weights"] if "weights" in update_info else read(update_info["path"])
            )

    def finish_weight_update(self) -> None:
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        loaded = {plain_name(name) for name in self.loaded or ()}
        missing = [names for names in self.needed if not names & loaded]
        if missing:
            raise RuntimeError(
                f"The weight update lacks {len(missing)} parameters of the engine's model, {min(missing[0])!r} for one."
            )
        finalize_layerwise_reload(self.model, self.vllm_config.model_config)
        remake_packed(self.model)
        self.loaded = None

    def set_weight_update_target(self, model: nn.Module, model_config: Any) -> None:
        raise RuntimeError("gmpo's backend does not update draft models.")

    def reset_weight_update_target(self) -> None:
        """Nothing to do: the target is always the model."""

    def drain_pending(self) -> None:
        """Nothing to do: weights are in the model when `update_weights` returns."""

    def shutdown(self) -> None:
        if self.nccl is not None:
            self.nccl.shutdown()

    # -- how -----------------------------------------------------------------------------------------------------------

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Give `weights` to vLLM's model, which renames, fuses and shards them, and note which parameters they fill."""
        assert self.loaded is not None
        names: set[str] = set(self.model.load_weights(weights) or ())  # pyright: ignore[reportCallIssue]
        self.loaded |= names
        return names

    def _scale_logits(self, factor: float) -> None:
        processors = [m for m in self.model.modules() if type(m).__name__ == "LogitsProcessor"]
        if len(processors) != 1:
            raise ValueError(
                f"vLLM's {type(self.model).__name__} has {len(processors)} logits processors, not one to scale logits "
                "with. Set temperature=1.0."
            )
        if self.own_scale is None:
            self.own_scale = float(processors[0].scale)  # type: ignore[arg-type]
        processors[0].scale = self.own_scale * factor  # type: ignore[assignment]

    def _join_nccl(self, init_info: dict[str, Any]) -> None:
        if (
            "nccl_unique_id_b64" not in init_info
        ):  # else vLLM meets the trainer at a store, and unpickles from it
            raise ValueError("An NCCL group is joined by nccl_unique_id_b64 only.")
        from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine

        # What it receives it gives to `load_weights` of its "model": ours, which takes notes.
        self.nccl = NCCLWeightTransferEngine(self.config, self.vllm_config, self.device, self)  # type: ignore[arg-type]
        self.nccl.init_transfer_engine(self.nccl.parse_init_info(init_info))


def read(path: str) -> list[tuple[str, Tensor]]:
    """The tensors of a safetensors file, in its order.

    Raises:
        ValueError: Not a safetensors file, or none that this process can see.
    """
    from safetensors import safe_open

    if not path.endswith(".safetensors"):
        raise ValueError(f"Weights come in safetensors files only, got {path!r}.")
    if not Path(path).exists():
        raise ValueError(
            f"The server can't see the trainer's file {path!r}. Set vllm_weight_folder to a folder that both see."
        )
    with safe_open(path, framework="pt") as file:
        return [(name, file.get_tensor(name)) for name in file.keys()]  # noqa: SIM118


def check_same_model(theirs: dict[str, Any], ours: Any) -> None:
    """Raise a ValueError if a trainer's model is described as another than that of vLLM's config `ours`."""
    text = ours.get_text_config() if hasattr(ours, "get_text_config") else ours
    for name, value in theirs.items():
        here = getattr(text, name, None)
        if here != value:
            raise ValueError(
                f"The trainer's model has {name}={value!r}, this engine's model has {here!r}. "
                "Serve the model that is trained."
            )


def parameter_names(model: nn.Module) -> list[set[str]]:
    """The names of each parameter of a model (several, if it is tied), without adapters."""
    names: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if "lora_" not in name:
            names.setdefault(id(parameter), set()).add(plain_name(name))
    return list(names.values())


def plain_name(name: str) -> str:
    """A parameter's name without what vLLM's wrappers for adapters add to it."""
    return name.replace(".base_layer.", ".")


# -- copies that CPU kernels keep of a weight ------------------------------------------------------------------------


def stale(*args: Any, **kwargs: Any) -> Tensor:
    """Stands in for a packed weight from the moment an update begins until it is made anew."""
    raise RuntimeError("This layer's weights are being updated.")


def packed_modules(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if "cpu_linear" in vars(module)]


def forget_packed(model: nn.Module) -> None:
    for module in packed_modules(model):
        module.cpu_linear = stale  # type: ignore[assignment]


def remake_packed(model: nn.Module) -> None:
    """Pack again what got no weights of its own because it shares another module's."""
    for module in packed_modules(model):
        if module.cpu_linear is stale:
            module.quant_method.process_weights_after_loading(module)  # type: ignore[union-attr, operator]
    left = [type(module).__name__ for module in packed_modules(model) if module.cpu_linear is stale]
    if left:
        raise RuntimeError(f"The weights of {', '.join(left)} were not made anew.")
