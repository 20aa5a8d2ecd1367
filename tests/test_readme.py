"""What the README shows works as it stands there."""

import re
from pathlib import Path

import timm
import torch
import torch.nn.functional as F

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_the_loop_of_ones_own_learns_from_the_teacher() -> None:
    (code,) = (block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "kd.DOT" in block)
    torch.manual_seed(0)
    settings = {"num_classes": 4, "layers": (1, 1, 1, 1), "channels": (8, 16, 16, 32)}
    small, large = (timm.create_model("resnet18", **settings).train() for _ in range(2))
    images, labels = torch.rand(6, 3, 32, 32), torch.tensor([0, 1, 2, 3, 0, 1])
    before = {name: value.clone() for name, value in large.state_dict().items()}
    names: dict[str, object] = {"small": small, "large": large, "images": images, "F": F}
    exec(code, names | {"loader": [(images, labels, torch.arange(6))] * 12}, names)
    student, teacher, methods = names["student"], names["teacher"], names["methods"]
    import kd

    assert isinstance(teacher, kd.Frozen)
    assert isinstance(student, kd.Tapped)
    assert isinstance(methods, kd.WeightedSum)
    assert all(torch.equal(value, before[name]) for name, value in teacher.network.network.state_dict().items())  # type: ignore[union-attr]
    batch = kd.Batch(images, labels, torch.arange(6))
    fresh = kd.Tapped(timm.create_model("resnet18", **settings), outputs=student.outputs, embedding="fc")
    dkd = kd.distillers["dkd"](beta=2.0)
    with torch.no_grad():
        learned = F.cross_entropy(student(images).logits, labels)
        assert learned < F.cross_entropy(fresh(images).logits, labels)
        assert dkd(student(images), teacher(images), batch).isfinite()
