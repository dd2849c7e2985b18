"""From a trained model to what is kept of it: merged, saved, exported, described, and only then measured."""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from ..checkpoints.exporters import export
from ..checkpoints.folders import WEIGHTS, replaced_content
from ..checkpoints.load import load_patched
from . import card
from .guard import LEFT, EvaluationError, Terminated, Unfinished, sigterm_raises
from .quantise import merge_saved

if TYPE_CHECKING:
    from .trainer import Trainer

STALE = (*WEIGHTS, "adapter_*", "README.md", "curve.png")
"""Files of an earlier run's model that a new one does not always replace."""


def save(trainer: Trainer) -> tuple[Any, Any]:
    """Write `<output>/model`; returns the model as it was saved, and the model to measure.

    They differ where the main process alone has the whole model: the other processes take part in every forward.
    """
    recipe, engine, accelerator = trainer.recipe, trainer.engine, trainer.accelerator
    weights = engine.full_state_dict()
    trained = model = engine.unwrapped().eval()
    merges = recipe.lora is not None and recipe.lora.merge
    # Processes that hold parts, and weights of 4 bits, have nothing whole that a merge could be added to.
    anew = merges and (engine.sharded or recipe.model.quantization is not None)
    if merges and not anew:
        trained = model = model.merge_and_unload()
    if accelerator.is_main_process:
        if anew:
            model, weights = _merged_anew(trainer, model, weights), None
        if weights is not None:  # gathered, tied weights are no longer the same tensor
            tied = getattr(model, "all_tied_weights_keys", {})
            weights = {name: tensor for name, tensor in weights.items() if name not in tied}
        with replaced_content(trainer.output / "model", stale=STALE) as content:
            model.save_pretrained(content, state_dict=weights)
            trainer.tokenizer.save_pretrained(content)
    accelerator.wait_for_everyone()
    return model, trained


def finish(trainer: Trainer, trained: Any) -> None:
    """Export what was saved, write its card, measure it, and write the card again with what was measured.

    Raises:
        Unfinished: one of these failed or was interrupted. The saved model stays.
    """
    accelerator, step = trainer.accelerator, trainer.progress.step
    folder, measure = trainer.output / "model", trainer.measure
    exported: list[Any] = []
    with sigterm_raises():
        for target in trainer.recipe.export:
            _on_main(trainer, f"its export for {target}", lambda to=target: exported.append(_export(trainer, to)))
        _on_main(trainer, "its model card", lambda: card.write(trainer))
        if trainer.recipe.progress and accelerator.is_main_process:
            trainer.log.console.print("Written: " + ", ".join(str(path) for path in (folder, *exported)))
        if measure.pending(step):
            if trainer.signal.came:  # before the model was saved, which was not to be interrupted
                raise _unfinished(trainer, "its last evaluation", Terminated())
            try:
                measure.at_the_end(trained, trainer.log, step)
            except (EvaluationError, Terminated, KeyboardInterrupt) as error:
                raise _unfinished(trainer, "its last evaluation", error) from error
            _on_main(trainer, "its model card", lambda: card.write(trainer))
    accelerator.wait_for_everyone()
    accelerator.end_training()  # takes the process group down, so nothing may come after it


def _on_main(trainer: Trainer, what: str, action: Callable[[], Any]) -> None:
    """Do something on the main process; if it fails, every process raises `Unfinished`."""
    problem: BaseException | None = None
    if trainer.accelerator.is_main_process:
        try:
            action()
        except (Terminated, KeyboardInterrupt) as error:
            raise _unfinished(trainer, what, error) from error
        except Exception as error:  # the other processes wait for this one, and must learn of it
            problem = error
    if trainer.engine.failed_anywhere(problem is not None):
        raise _unfinished(trainer, what, problem) from problem


def _unfinished(trainer: Trainer, what: str, error: BaseException | None) -> Unfinished:
    """Return the error that names the saved model, what is missing, and how to have it."""
    folder = trainer.output / "model"
    codes = {Terminated: LEFT, KeyboardInterrupt: 128 + signal.SIGINT}
    code = codes.get(type(error), 1) if error is not None else 1
    why = {LEFT: "SIGTERM came", 128 + signal.SIGINT: "it was interrupted"}.get(code)
    if why is None:
        said = "another process failed" if error is None else " ".join(str(error).split()).rstrip(".")
        named = error is None or isinstance(error, EvaluationError)
        why = said if named else f"{type(error).__name__}: {said}"
    message = f"The model is trained and saved in {folder}, but {what} did not finish: {why}."
    if trainer.measure.pending(trainer.progress.step):
        message += f" {_how_to_measure(trainer)}"
    return Unfinished(message, code)


def _how_to_measure(trainer: Trainer) -> str:
    folder, recipe = trainer.output / "model", trainer.recipe
    if recipe.lora is not None and not recipe.lora.merge:
        return f"Evaluate the adapter in Python: pe_patch.evaluate(pe_patch.load_patched({str(folder)!r}), tokenizer)."
    note = "" if recipe.data.source == "stdlib" else " (which reads all of the text, also what was trained on)"
    return f"Evaluate it with: {trainer.measure.command(folder)}{note}"


def _merged_anew(trainer: Trainer, model: Any, weights: dict[str, Any] | None) -> Any:
    """The base model loaded again, unquantised, with the trained adapters merged into it."""
    adapter = trainer.output / "adapter"
    model.save_pretrained(adapter, state_dict=weights)
    return merge_saved(adapter, getattr(torch, trainer.recipe.model.dtype))


def _export(trainer: Trainer, target: str) -> Any:
    """Export what was saved, as it was saved."""
    saved = load_patched(trainer.output / "model")
    folder = trainer.output / "export" / target
    return export(saved, folder, target, tokenizer=trainer.tokenizer, overwrite=trainer.recipe.overwrite)
