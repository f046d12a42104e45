"""The model card: what the model is, what it was made of, how good it is, and what not to do with it."""

import re
from collections.abc import Mapping
from pathlib import PurePath
from textwrap import indent
from typing import Any

from ..common.errors import printable
from ..config.sections import ONE_SHOT
from ..report.words import command, data_set, evaluated, measure, model, skew
from ..runs.result import accuracy_table

_ON_THE_HUB = re.compile(r"[\w.-]+/[\w.-]+")
_FROM_SCRATCH, _FROM_TIMM = "none", "timm"

_CARD = """\
---
{front}
---

# {title}

{what}

## Use

{use}
`fedmitr predict RUN IMAGES...` also turns photographs upright and puts transparent images on white, as for training.

## Accuracy

{measure} in percent. {evaluated}

{table}

## How it was made

{made}

Settings that are not the defaults; of paths only the last part is shown:

    {command}

## Licence

Not chosen: set `license` above before you publish the model. The program is Apache 2.0; for the weights count the terms
of the images and of the weights at the start.

## Limits

- Every image gets one of the {classes} classes, also one that shows something else. The numbers are of one seed, and of
  images like those that it was trained on.
- {leaks}
- Publish `model.safetensors`, `config.json` and this file, and not the run folder, which has the clients' uploads.
"""

_WITH_TIMM = """\
```python
import timm
import torch
from PIL import Image

vit = timm.create_model("local-dir:.", pretrained=True).eval()  # or "hf-hub:OWNER/NAME"
prepare = timm.data.create_transform(**timm.data.resolve_model_data_config(vit), is_training=False)
image = prepare(Image.open("image.png").convert("{mode}"))
with torch.no_grad():
    chances = vit(image[None]).softmax(-1)[0]
print(vit.pretrained_cfg["label_names"][chances.argmax()], chances.max().item())
```
"""
_WITH_THIS_PACKAGE = """\
This is no model of timm alone: `fedmitr_flwr.vit.taps.load_model(Path("."))` gives it, for images that are normalised
as the `pretrained_cfg` of `config.json` says.
"""
_PLAIN = """\
Uploads leak: images can be inverted from the clients' plain weights, and what the model has learnt from them can still
  show what they were trained on. No differential privacy was used."""
_PRIVATE = """\
Clients trained with differential privacy for each single image (epsilon {epsilon:g}); what many images of a client
  share can still be inverted from its upload and shows in the model."""


def card(result: Mapping[str, Any], name: str, *, central: bool = False, plain: bool = True) -> str:
    """README.md of the model `name`, from the contents of result.json; `plain`: timm alone loads it.

    No client, path or machine is named in it.
    """
    config = result["config"]
    epsilon = config.get("privacy.epsilon")
    return _CARD.format(
        front=_front(result, name, central=central, plain=plain),
        title=printable(f"{'central' if central else result['method']} on {data_set(config)}"),
        what=_what(result, central=central),
        use=_WITH_TIMM.format(mode="L" if config["model.in-chans"] == 1 else "RGB") if plain else _WITH_THIS_PACKAGE,
        measure=measure(config),
        evaluated=evaluated(result.get("evaluated_on")),
        table=indent(f"{accuracy_table(result)}\n\n{_by_class(result)}".rstrip(), "    "),
        made="\n".join(f"- {name}: {value}" for name, value in _made(result).items()),
        command=command(config) + ("\n    fedmitr central RUN" if central else ""),
        classes=config["model.num-classes"],
        leaks=_PRIVATE.format(epsilon=epsilon) if epsilon else _PLAIN,
    )


def _by_class(result: Mapping[str, Any]) -> str:
    """Recall in percent, a class in a line."""
    known = {printable(name): recall for name, recall in result["accuracy"]["per_class"].items() if recall is not None}
    width = max(map(len, known), default=0)
    return "\n".join(f"{name:{width}} {recall:6.2f}" for name, recall in known.items())


def _front(result: Mapping[str, Any], name: str, *, central: bool, plain: bool) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    config, student = result["config"], result["accuracy"]["student"]
    kinds = ["vision-transformer", *([] if central else ["federated-learning", "one-shot-federated-learning"])]
    data = str(config["data.path"]) if config["data.source"] == "hub" else ""
    on_hub = data if _ON_THE_HUB.fullmatch(data) else None
    measured = EvalResult(
        task_type="image-classification",
        dataset_type=on_hub or data_set(config),
        dataset_name=data_set(config),
        dataset_split=result.get("evaluated_on", {}).get("split"),
        metric_type="accuracy",
        metric_value=None if student is None else round(student / 100, 4),
    )
    return ModelCardData(
        library_name="timm" if plain else "fedmitr-flwr",
        pipeline_tag="image-classification",
        tags=["image-classification", "timm", "fedmitr", *kinds],
        license="unknown",
        base_model=_published(config["model.name"]) if config["model.weights"] == _FROM_TIMM else None,
        datasets=[on_hub] if on_hub else None,
        metrics=["accuracy"],
        model_name=name,
        eval_results=None if student is None else [measured],
    ).to_yaml()


def _published(name: str) -> str | None:
    """Where on the Hub timm's weights of this name are."""
    import timm

    found = timm.get_pretrained_cfg(name)
    return found.hf_hub_id if found else None


def _what(result: Mapping[str, Any], *, central: bool) -> str:
    config, classes = result["config"], result["config"]["model.num-classes"]
    begin = f"A vision transformer ({model(config)}) for {classes} classes"
    if central:
        return f"{begin}, trained on the images of all {result['clients']} clients in one place, to compare with."
    if config["flower.strategy"] != ONE_SHOT:
        rounds = f"{config['flower.rounds']} rounds of {result['method']}"
        return f"{begin}, from {rounds} among {result['clients']} clients, whose images stayed with them."
    once = f"{result['clients']} clients each trained on images of their own and uploaded their model once"
    return f"{begin}, by one-shot federated learning: {once}, and `{result['method']}` made one model of them."


def _made(result: Mapping[str, Any]) -> dict[str, str]:
    config, counts = result["config"], result.get("counts")
    known = sum(map(sum, counts)) if counts and None not in counts else 0
    start = {_FROM_SCRATCH: "drawn from the seed", _FROM_TIMM: "timm's published ones"}
    weights = config["model.weights"]
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items() if version)
    return {
        "Data": printable(data_set(config)) + (f", {known} images to train on" if known else ""),
        "Partition": f"{skew(config)}, {result['clients']} clients",
        "Seed": str(result["seed"]),
        "Weights at the start": start.get(weights) or f"`{printable(PurePath(weights).name)}`",
        "Code": f"fedmitr-flwr, fingerprint {result['fingerprint']}; {versions}",
    }
