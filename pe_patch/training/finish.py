"""Merge, save, export and describe a trained model, and then evaluate it."""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from ..checkpoints.exporters.export import export
from ..checkpoints.folders import WEIGHTS, replaced_content
from ..checkpoints.load import load_patched
from . import card
from .guard import TERMINATED_EXIT_CODE, EvaluationError, PostTrainingError, TerminationSignal, sigterm_raises
from .quantise import merge_saved

if TYPE_CHECKING:
    from .trainer import Trainer

STALE = (*WEIGHTS, "adapter_*", "README.md", "curve.png")
"""Files of an earlier run's model that a new model does not always replace."""


def save(trainer: Trainer) -> tuple[Any, Any]:
    """Write `<output>/model`.

    Returns:
        The model as it was saved, and the model to measure. They differ if only the main process has the whole model:
        then the other processes still have to take part in every forward pass.
    """
    recipe, engine, accelerator = trainer.recipe, trainer.engine, trainer.accelerator
    weights = engine.full_state_dict()
    trained = model = engine.unwrapped().eval()
    merges = recipe.lora is not None and recipe.lora.merge
    # Sharded weights and 4-bit weights cannot take a merge in place.
    reload = merges and (engine.sharded or recipe.model.quantization is not None)
    if merges and not reload:
        trained = model = model.merge_and_unload()
    if accelerator.is_main_process:
        if reload:
            model, weights = _merge_into_reloaded(trainer, model, weights), None
        if weights is not None:  # gathered, tied weights are no longer the same tensor
            tied = getattr(model, "all_tied_weights_keys", {})
            weights = {name: tensor for name, tensor in weights.items() if name not in tied}
        with replaced_content(trainer.output / "model", stale=STALE) as content:
            model.save_pretrained(content, state_dict=weights)
            trainer.tokenizer.save_pretrained(content)
    accelerator.wait_for_everyone()
    return model, trained


def finish(trainer: Trainer, trained: Any) -> None:
    """Export the saved model, write its card, measure it, and write the card again with the scores.

    Raises:
        PostTrainingError: one of these steps failed or was interrupted. The saved model stays.
    """
    accelerator, step = trainer.accelerator, trainer.progress.step
    folder, measure = trainer.output / "model", trainer.measure
    exported: list[Any] = []
    with sigterm_raises():
        for target in trainer.recipe.export:
            _on_main(trainer, f"its export for {target}", lambda to=target: exported.append(_export(trainer, to)))
        _on_main(trainer, "its model card", lambda: card.write(trainer))
        if trainer.recipe.progress and accelerator.is_main_process:
            trainer.log.console.print("Wrote " + ", ".join(str(path) for path in (folder, *exported)))
        if measure.pending(step):
            if trainer.signal.received:  # SIGTERM came while the model was being saved
                raise _post_training_error(trainer, "its last evaluation", TerminationSignal())
            try:
                measure.at_the_end(trained, trainer.log, step)
            except (EvaluationError, TerminationSignal, KeyboardInterrupt) as error:
                raise _post_training_error(trainer, "its last evaluation", error) from error
            _on_main(trainer, "its model card", lambda: card.write(trainer))
    accelerator.wait_for_everyone()
    accelerator.end_training()  # takes the process group down, so nothing may come after it


def _on_main(trainer: Trainer, step: str, action: Callable[[], Any]) -> None:
    """Run `action` on the main process. If it fails, every process raises `PostTrainingError`."""
    problem: BaseException | None = None
    if trainer.accelerator.is_main_process:
        try:
            action()
        except (TerminationSignal, KeyboardInterrupt) as error:
            raise _post_training_error(trainer, step, error) from error
        except Exception as error:  # the other processes wait for this one and must raise too
            problem = error
    if trainer.engine.failed_anywhere(problem is not None):
        raise _post_training_error(trainer, step, problem) from problem


def _post_training_error(trainer: Trainer, step: str, error: BaseException | None) -> PostTrainingError:
    """Return the error that names the saved model, the failed step and the command that completes it."""
    folder = trainer.output / "model"
    codes = {TerminationSignal: TERMINATED_EXIT_CODE, KeyboardInterrupt: 128 + signal.SIGINT}
    code = codes.get(type(error), 1) if error is not None else 1
    why = {TERMINATED_EXIT_CODE: "SIGTERM received", 128 + signal.SIGINT: "it was interrupted"}.get(code)
    if why is None:
        message = "another process failed" if error is None else " ".join(str(error).split()).rstrip(".")
        named = error is None or isinstance(error, EvaluationError)
        why = message if named else f"{type(error).__name__}: {message}"
    message = f"The model is trained and saved in {folder}, but {step} did not finish: {why}."
    if trainer.measure.pending(trainer.progress.step):
        message += f" {_how_to_measure(trainer)}"
    return PostTrainingError(message, code)


def _how_to_measure(trainer: Trainer) -> str:
    folder, recipe = trainer.output / "model", trainer.recipe
    if recipe.lora is not None and not recipe.lora.merge:
        return f"Evaluate the adapter in Python: pe_patch.evaluate(pe_patch.load_patched({str(folder)!r}), tokenizer)."
    return f"Evaluate it with: {trainer.measure.command(folder)}"


def _merge_into_reloaded(trainer: Trainer, model: Any, weights: dict[str, Any] | None) -> Any:
    """Load the base model again without quantisation and merge the trained adapters into it."""
    adapter = trainer.output / "adapter"
    model.save_pretrained(adapter, state_dict=weights)
    return merge_saved(adapter, getattr(torch, trainer.recipe.model.dtype))


def _export(trainer: Trainer, target: str) -> Any:
    """Export the model from the saved files."""
    saved = load_patched(trainer.output / "model")
    folder = trainer.output / "export" / target
    return export(saved, folder, target, tokenizer=trainer.tokenizer, overwrite=trainer.recipe.overwrite)
