"""What a report says about the model itself."""

from gptcore.model import LoadedModel


def model_facts(loaded: LoadedModel) -> dict[str, float | int | str]:
    """Size, shape, vocabulary and precision of a loaded model: all of it follows from its folder and the hardware."""
    model = loaded.model
    return {
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "layers": model.config.layers,
        "width": model.config.width,
        "heads": model.config.heads,
        "context": model.config.context,
        "vocabulary": loaded.tokenizer.vocabulary,
        "tokenizer": loaded.tokenizer.digest[:12],
        "precision": str(model.compute_dtype).removeprefix("torch."),
    }
