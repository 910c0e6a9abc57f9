"""A LoRA adapter into the weights of its model, by peft: what is computed then is an ordinary decoder."""

from __future__ import annotations

import warnings
from importlib.util import find_spec
from typing import Any

from transformers import PreTrainedModel

from specontext.checkpoints.adapters import CONFIG, Adapter
from specontext.checkpoints.files import check_file, read_json
from specontext.checkpoints.wording import first_few
from specontext.errors import ModelError
from specontext.locations import one_sentence

OWN = ("lora_", "modules_to_save")  # in the names of an adapter's tensors


def check_can_merge(adapter: Adapter) -> None:
    """Raises ModelError unless peft is installed, which is to be said before anything large is read."""
    if find_spec("peft") is None:
        raise ModelError(
            f"{adapter.folder} is a LoRA adapter of {adapter.base}: install peft, which merges it when it is loaded "
            '(pip install "specontext[lora]"), or name a checkpoint into which it was merged'
        )
    check_file(adapter.weights, ModelError)


def merged(model: PreTrainedModel, adapter: Adapter) -> PreTrainedModel:
    """The model with an adapter's changes in its weights.

    Raises:
        ModelError: an adapter of another model, or a broken one; the message names tensors.
    """
    from peft import PeftConfig, get_peft_model, set_peft_model_state_dict
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import load_peft_weights

    with warnings.catch_warnings(), one_sentence(f"cannot merge the LoRA adapter {adapter.folder} into {adapter.base}"):
        warnings.simplefilter("ignore", FutureWarning)  # what peft asks of transformers is their affair
        warnings.filterwarnings("ignore", "Unexpected keyword arguments")  # which are refused here
        config = PeftConfig.from_pretrained(str(adapter.folder))
        further = read_json(adapter.folder / CONFIG, ModelError)
        if ignored := [name for name, value in further.items() if value and not hasattr(config, name)]:
            raise ModelError(
                f"the LoRA adapter {adapter.folder} asks for {first_few(ignored)}, which this version of peft does not know: "
                "install a newer one"
            )
        if getattr(config, "layer_replication", None):
            raise ModelError(
                f"the LoRA adapter {adapter.folder} repeats layers of {adapter.base} (layer_replication), which makes another "
                "model of it: name a checkpoint into which it was merged"
            )
        config.inference_mode = True
        config.base_model_name_or_path = model.name_or_path  # else peft warns of another name for it
        wrapped: Any = get_peft_model(model, config, autocast_adapter_dtype=False)
        report: Any = set_peft_model_state_dict(wrapped, load_peft_weights(str(adapter.folder), device="cpu"))
        missing = sorted(name for name in report.missing_keys if any(part in name for part in OWN))
        if extra := sorted(report.unexpected_keys):
            raise ModelError(f"the LoRA adapter {adapter.folder} does not fit {adapter.base}, which lacks {first_few(extra)}")
        if missing:
            raise ModelError(f"the LoRA adapter {adapter.folder} is incomplete and lacks {first_few(missing)}: download it again")
        tables = (model.get_input_embeddings(), model.get_output_embeddings())
        changed = any(isinstance(table, BaseTunerLayer) for table in tables)
        if changed and None not in tables and tables[0].weight is tables[1].weight:
            raise ModelError(
                f"the LoRA adapter {adapter.folder} changes an embedding of {adapter.base}, the input and output "
                "embeddings of which are one: it cannot be merged without changing both"
            )
        whole: PreTrainedModel = wrapped.merge_and_unload(safe_merge=True)
    return whole
