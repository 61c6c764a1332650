"""Any architecture of timm by its name there."""

from __future__ import annotations

import ast
from typing import Any

from torch import nn

from harness.models.layers import images, to_groupnorm
from harness.registry import did_you_mean, model


@model("timm")
def timm_model(
    name: str,
    input_shape: tuple[int, ...],
    classes: int,
    norm_layer: str | None = None,
    act_layer: str | None = None,
    img_size: int | None = None,
    patch_size: int | None = None,
    drop_rate: float | None = None,
    drop_path_rate: float | None = None,
    groupnorm: bool = False,
    groups: int = 16,
    pretrained: bool = False,
    more: str | None = None,
) -> nn.Module:
    """An architecture of timm by its name there, as in "timm:resnet18?norm_layer=groupnorm".

    Vision transformers need ``img_size``: "timm:vit_tiny_patch16_224?img_size=32&patch_size=4".
    ``groupnorm=true`` converts every BatchNorm (to ``groups`` groups), whatever the architecture calls it.
    ``pretrained`` downloads public weights. ``more`` passes other arguments on: "more=depth:4,embed_dim:64".
    """
    import timm

    channels, _, _ = images(f"timm:{name}", input_shape, at_least=1)
    if not timm.is_model(name):
        near = did_you_mean(name, timm.list_models())
        hint = f' Did you mean "{near}"?' if near else ' List them with timm.list_models("*resnet*").'
        raise ValueError(f'timm has no model "{name}".{hint}')
    options = {
        key: value
        for key, value in {
            "norm_layer": norm_layer,
            "act_layer": act_layer,
            "img_size": img_size,
            "patch_size": patch_size,
            "drop_rate": drop_rate,
            "drop_path_rate": drop_path_rate,
            **_more(name, more),
        }.items()
        if value is not None
    }
    try:
        net = timm.create_model(name, pretrained=pretrained, num_classes=classes, in_chans=channels, **options)
    except TypeError as error:
        raise ValueError(f'timm\'s "{name}" does not take one of the options {", ".join(options)}: {error}') from error
    if groupnorm:
        net = to_groupnorm(net, groups)
    # Engines keep a layer's output for the backward pass; an activation must not overwrite it.
    for module in net.modules():
        if getattr(module, "inplace", False) is True:
            module.inplace = False
    return net


def _more(name: str, text: str | None) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for part in text.split(",") if text else ():
        key, colon, value = part.partition(":")
        if not key.isidentifier() or not colon:
            raise ValueError(f'timm:{name}?more={text}: write key:value, joined by commas, as in "more=depth:4"')
        try:
            found[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            found[key] = value
    return found
