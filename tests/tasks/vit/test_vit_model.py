"""The transformer is torchvision's, with queries, keys and values apart."""

import pytest
import torch
import yaml
from torchvision.models import VisionTransformer as TorchVision

from caspr_cli.tasks.vit.model import VisionTransformer


def converted(state):
    """torchvision's weights under our names."""
    names = {
        "conv_proj": "patches",
        "class_token": "class_token",
        "encoder.pos_embedding": "position",
        "encoder.ln": "norm",
        "heads.head": "head",
    }
    inner = {
        "ln_1": "attention_norm",
        "self_attention.out_proj": "attention.output",
        "ln_2": "mlp_norm",
        "mlp.0": "up",
        "mlp.3": "down",
    }
    result = {}
    for name, value in state.items():
        _, _, rest = name.partition("encoder.layers.encoder_layer_")
        if not rest:
            old = next(old for old in names if name.startswith(old))
            result[names[old] + name.removeprefix(old)] = value
            continue
        number, _, rest = rest.partition(".")
        if rest.startswith("self_attention.in_proj_"):
            kind = rest.removeprefix("self_attention.in_proj_")
            for part, third in zip(("query", "key", "value"), value.chunk(3), strict=True):
                result[f"blocks.{number}.attention.{part}.{kind}"] = third
        else:
            old = next(old for old in inner if rest.startswith(old))
            result[f"blocks.{number}.{inner[old]}{rest.removeprefix(old)}"] = value
    return result


@torch.no_grad()
def test_outputs_are_torchvisions():
    torch.manual_seed(0)
    theirs = TorchVision(24, 8, num_layers=3, num_heads=4, hidden_dim=16, mlp_dim=64, num_classes=7).double().eval()
    for p in theirs.parameters():
        p.add_(torch.randn_like(p) * 0.1)  # nothing is left at zero
    ours = VisionTransformer(24, 8, 7, layers=3, width=16, heads=4).double().eval()
    ours.load_state_dict(converted(theirs.state_dict()))
    x = torch.randn(4, 3, 24, 24, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-10, atol=1e-10)


def test_paper_scale_is_vit_s_16(pytestconfig):
    task = yaml.safe_load((pytestconfig.rootpath / "conf/scale/vit/paper.yaml").read_text())["task"]
    with torch.device("meta"):
        theirs = TorchVision(224, 16, num_layers=12, num_heads=6, hidden_dim=384, mlp_dim=1536)
        ours = VisionTransformer(
            task["size"], task["patch"], 1000, task["layers"], task["width"], task["heads"], task.get("dropout", 0.0)
        )
    counts = [sum(p.numel() for p in net.parameters()) for net in (ours, theirs)]
    assert counts[0] == counts[1] == 22_050_664
    assert len(ours.blocks[0].up.weight) == 1536


def test_initial_scales():
    torch.manual_seed(0)
    model = VisionTransformer(32, 8, 10, layers=1, width=128, heads=4)
    assert not model.head.weight.any()
    assert not model.class_token.any()
    assert model.position.std().item() == pytest.approx(0.02, rel=0.1)
    assert model.patches.weight.std().item() == pytest.approx((1 / 192) ** 0.5, rel=0.05)
    block = model.blocks[0]
    for weight in (block.attention.query.weight, block.up.weight):
        assert weight.abs().max().item() == pytest.approx((6 / sum(weight.shape)) ** 0.5, rel=0.01)
