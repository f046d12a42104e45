"""The small vision transformer that every client trains."""

from fedmitr_flwr.vit.build import build_vit
from flwr.app import ArrayRecord, UserConfig
from timm.models.vision_transformer import VisionTransformer

from .utils import settings


def create(
    run_config: UserConfig, arrays: ArrayRecord | None = None
) -> VisionTransformer:
    """Build it with these weights, else with those of the seed."""
    config = settings(run_config)
    vit = build_vit(config.model, config.seed)
    if arrays is not None:
        vit.load_state_dict(arrays.to_torch_state_dict())
    return vit
