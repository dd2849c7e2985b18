"""Merge, save, export and describe a trained model, and then evaluate it."""

from __future__ import annotations

import copy
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import compat
from ..checkpoints.exporters.export import export
from ..checkpoints.folders import WEIGHTS, replaced_content
from ..checkpoints.load import is_adapter, load_adapted, load_model
from ..errors import TerminationSignal, sigterm_raises
from ..patching.api import find_patch
from . import card
from .guard import TERMINATED_EXIT_CODE, EvaluationError, PostTrainingError
from .measure import longest
from .models import FLASH, original_weights
from .quantise import merge_saved

if TYPE_CHECKING:
    from .run import Run

STALE = (*WEIGHTS, "adapter_*", "README.md", "curve.png")
"""Files of an earlier run's model that a new model does not always replace."""
UNLIMITED = 10**18
"""Transformers gives a tokenizer without a limit a larger `model_max_length` than this."""
CHECKED = 512
"""Tokens on which the losses of the saved and the trained model are compared."""


def save(run: Run) -> tuple[Any, Any]:
    """Write `<output>/model`.

    Returns:
        The model as it was saved, and the trained model. They differ if only the main process has the whole model:
        then the other processes still have to take part in every forward pass.
    """
    recipe, launch = run.recipe, run.launch
    weights = None
    trained = model = run.model
    if run.trainer is not None:
        run.trainer.refuse_broken_weights()
        if recipe.average < 1:
            average(run.trainer.unwrapped(), original_weights(recipe), recipe.average)
        weights = run.trainer.full_state_dict()
        trained = model = run.trainer.unwrapped().eval()
    merges = recipe.lora is not None and recipe.lora.merge
    # Sharded weights and 4-bit weights cannot take a merge in place.
    reload = merges and (launch.sharded or recipe.model.quantization is not None)
    if merges and not reload:
        trained = model = _in_saved_dtype(model.merge_and_unload(), getattr(torch, recipe.model.dtype))
    if launch.is_main:
        if reload:
            model, weights = _merge_into_reloaded(run, model, weights), None
        if weights is not None:  # gathered, tied weights are no longer the same tensor
            tied = getattr(model, "all_tied_weights_keys", {})
            weights = {name: tensor for name, tensor in weights.items() if name not in tied}
        with replaced_content(run.output / "model", stale=STALE) as content:
            model.save_pretrained(content, state_dict=weights)
            _tokenizer(run, model).save_pretrained(content)
    launch.wait()
    return model, trained


@torch.no_grad()
def average(model: Any, before: Mapping[str, Tensor], share: float) -> None:
    """Mix the weights of a model with those from before its training, in place: before + share (trained - before).

    The weights of a scheme that were not there before stay as trained.

    Source: Wortsman et al. 2021, arXiv 2109.01903, section 3.
    """
    for name, weight in model.named_parameters():
        if name in before and weight.is_floating_point():
            old = before[name].to(weight.device, torch.float32)
            weight.copy_(old + share * (weight.float() - old))


def _in_saved_dtype(model: Any, dtype: torch.dtype) -> Any:
    """Convert weights that LoRA trained in float32 to the dtype in which the saved model loads."""
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and "position_schemes." not in name:
            parameter.data = parameter.data.to(dtype)
    return model


def _tokenizer(run: Run, model: Any) -> Any:
    """Return the tokenizer with the window of the trained model as its `model_max_length`."""
    tokenizer = copy.copy(run.tokenizer)
    if tokenizer.model_max_length < UNLIMITED:
        patch = find_patch(model)
        window = None if patch is None else patch.scheme.effective_window
        trained = longest(run.recipe.phases) if run.recipe.phases else 0
        tokenizer.model_max_length = max(tokenizer.model_max_length, window or 0, trained)
    return tokenizer


def finish(run: Run, trained: Any) -> None:
    """Export the saved model, write its card, load and measure it, and write the card again with the scores.

    Raises:
        PostTrainingError: one of these steps failed or was interrupted. The saved model stays.
    """
    launch, step = run.launch, run.progress.step
    folder, measure = run.output / "model", run.measure
    exported: list[Any] = []
    with sigterm_raises():
        for target in run.recipe.export:
            _on_main(run, f"its export for {target}", lambda to=target: exported.append(_export(run, to)))
        _on_main(run, "its model card", lambda: card.write(run))
        if run.recipe.progress and launch.is_main:
            run.log.console.print("Wrote " + ", ".join(str(path) for path in (folder, *exported)))
        stopped = bool(run.signal.received)  # while the model was being saved
        if measure.pending(step) and stopped:
            received = KeyboardInterrupt() if run.signal.received == signal.SIGINT else TerminationSignal()
            raise _post_training_error(run, "its last evaluation", received)
        reloaded: list[Any] = [trained]
        if not launch.sharded and not stopped:  # sharded, a whole model may not fit on one device
            measure.everywhere = False
            _on_main(run, "the check of its files", lambda: reloaded.append(_reload(run, trained)))
        if measure.pending(step):
            try:
                measure.at_the_end(reloaded[-1], run.log, step)
            except (EvaluationError, TerminationSignal, KeyboardInterrupt) as error:
                raise _post_training_error(run, "its last evaluation", error) from error
            _on_main(run, "its model card", lambda: card.write(run))
    launch.wait()
    launch.leave()


def _reload(run: Run, trained: Any) -> Any:
    """Load the saved model, and log the difference between its loss and the trained model's on one batch."""
    device = run.launch.device
    if run.trainer is not None:
        run.trainer.release_optimizer()
    ids = _some_tokens(run).to(device)
    expected = _loss(run, trained.to(device).eval(), ids)
    if device.type != "cpu":  # there may be room for one model only
        trained.to("cpu")
    reloaded = load_saved(run.output / "model", _attention(trained)).to(device).eval()
    difference = _loss(run, reloaded, ids) - expected
    run.log.write("reloaded", {"step": run.progress.step, "loss": expected, "difference": difference})
    if difference:
        why = "it was rounded to its dtype when it was saved"
        if run.recipe.model.quantization is not None:
            why = "it was trained on 4-bit weights, and is saved with whole ones"
        run.log.console.print(
            f"Note: the saved model's loss on one batch differs by {difference:+.2e} nats from the trained model's: "
            f"{why}. Its scores are measured on the saved model."
        )
    return reloaded


def load_saved(folder: Path, attention: str | None = None) -> Any:
    """Load the model of a run as a user would, with an attention implementation if it is not the default one."""
    extra: dict[str, Any] = {} if attention is None else {"attn_implementation": attention}
    return (load_adapted if is_adapter(folder) else load_model)(folder, **extra)


def _attention(model: Any) -> str | None:
    """Return the attention implementation of a model, None for the default one."""
    name = str(compat.attention_implementation(model.config.get_text_config())).removeprefix("pe_")
    return name if name in ("eager", "flex_attention", FLASH) else None


def _some_tokens(run: Run) -> torch.Tensor:
    """Return one row of at most `CHECKED` training tokens; any ids if there is no training text."""
    if run.recipe.phases:
        rows = run.tokens(min(CHECKED, run.recipe.phases[0].length))
        return torch.tensor(max(rows, key=len))[None]
    return torch.arange(CHECKED)[None] % run.model.config.get_text_config().vocab_size


def _loss(run: Run, model: Any, ids: torch.Tensor) -> float:
    dtype = run.measure.mixed
    with torch.no_grad(), torch.autocast(ids.device.type, dtype=dtype, enabled=dtype is not None):
        return float(model(input_ids=ids, labels=ids, use_cache=False).loss)


def _on_main(run: Run, step: str, action: Callable[[], Any]) -> None:
    """Run `action` on the main process. If it fails, every process raises `PostTrainingError`."""
    problem: BaseException | None = None
    if run.launch.is_main:
        try:
            action()
        except (TerminationSignal, KeyboardInterrupt) as error:
            raise _post_training_error(run, step, error) from error
        except Exception as error:  # the other processes wait for this one and must raise too
            problem = error
    if run.launch.failed_anywhere(problem is not None):
        raise _post_training_error(run, step, problem) from problem


def _post_training_error(run: Run, step: str, error: BaseException | None) -> PostTrainingError:
    """Return the error that names the saved model, the failed step and the command that completes it."""
    folder = run.output / "model"
    codes = {TerminationSignal: TERMINATED_EXIT_CODE, KeyboardInterrupt: 128 + signal.SIGINT}
    code = codes.get(type(error), 1) if error is not None else 1
    why = {TERMINATED_EXIT_CODE: "SIGTERM received", 128 + signal.SIGINT: "it was interrupted"}.get(code)
    if why is None:
        message = "another process failed" if error is None else " ".join(str(error).split()).rstrip(".")
        named = error is None or isinstance(error, EvaluationError)
        why = message if named else f"{type(error).__name__}: {message}"
    message = f"The model is trained and saved in {folder}, but {step} did not finish: {why}."
    pending = run.measure.pending(run.progress.step)
    remedy = f"Evaluate it with: {run.measure.command(folder)}" if pending else run.how_to_resume()
    return PostTrainingError(f"{message} {remedy}", code)


def _merge_into_reloaded(run: Run, model: Any, weights: dict[str, Any] | None) -> Any:
    """Load the base model again without quantisation and merge the trained adapters into it."""
    adapter = run.output / "adapter"
    model.save_pretrained(adapter, state_dict=weights)
    return merge_saved(adapter, getattr(torch, run.recipe.model.dtype))


def _export(run: Run, target: str) -> Any:
    """Export the model from the saved files."""
    saved = load_model(run.output / "model")
    folder = run.output / "export" / target
    return export(saved, folder, target, tokenizer=run.tokenizer, overwrite=run.recipe.overwrite)
