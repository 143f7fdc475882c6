"""Files and frames that a reader passes in one update, counted with `sys.setprofile`.

    python -m benchmarks.hops

A tiny model trains for two optimizer steps of one collection.  Frames are those of gmpo on the stack when `gmpo()` is
called; files are those of gmpo in which any function runs during one `training_step`.
"""

import sys
import tempfile
import warnings
from pathlib import Path
from types import FrameType
from typing import Any

from transformers.trainer_callback import PrinterCallback

import gmpo
from benchmarks.same_numbers import PROMPTS, share_of_a
from gmpo import GMPOConfig, GMPOTrainer
from tests.tiny import tiny_model, tiny_tokenizer

ROOT = str(Path(gmpo.__file__).parent)


class Watch:
    """Counts while `training_step` runs."""

    def __init__(self) -> None:
        self.files: set[str] = set()
        self.functions: set[tuple[str, str]] = set()
        self.stack: list[str] = []

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        """Note a call of gmpo's own code."""
        file = frame.f_code.co_filename
        if event != "call" or not file.startswith(ROOT):
            return
        self.files.add(file)
        self.functions.add((file, frame.f_code.co_name))
        if frame.f_code.co_name == "gmpo" and not self.stack:
            self.stack = own_frames(frame)


def own_frames(frame: FrameType | None) -> list[str]:
    """Return gmpo's frames from `training_step` to `frame`, as file:function."""
    names: list[str] = []
    while frame is not None and (not names or not names[-1].endswith(":training_step")):
        code = frame.f_code
        if code.co_filename.startswith(ROOT):
            names.append(f"{Path(code.co_filename).relative_to(ROOT)}:{code.co_name}")
        frame = frame.f_back
    return names[::-1]


class Watched(GMPOTrainer):
    """Watches its training steps."""

    watch = Watch()

    def training_step(self, *arguments: Any, **keywords: Any) -> Any:
        """Run the step under the watch."""
        sys.setprofile(self.watch)
        try:
            return super().training_step(*arguments, **keywords)
        finally:
            sys.setprofile(None)


def main() -> None:
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        config = GMPOConfig(
            folder,
            per_device_train_batch_size=8,
            num_generations=4,
            steps_per_generation=2,
            max_completion_length=8,
            max_steps=2,
            save_strategy="no",
            gradient_checkpointing=False,
            disable_tqdm=True,
            report_to=[],
            use_cpu=True,
        )
        trainer = Watched(
            tiny_model(), share_of_a, config, PROMPTS, processing_class=tiny_tokenizer()
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()

    watch = Watched.watch
    print("\n".join(watch.stack))
    print(f"{len(watch.stack)} frames from training_step to gmpo()")
    print(f"{len(watch.files)} files, {len(watch.functions)} functions in one training step")


if __name__ == "__main__":
    main()
