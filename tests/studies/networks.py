"""Networks that a user might bring, good and bad; named as module:callable."""

import torch
from torch import nn
from torch.nn import functional as F


class Functional(nn.Module):
    """No batch norm, functional nonlinearities, an in-place one, a skip."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 4, 3, padding=1)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1)
        self.fc1 = nn.Linear(64, 16)
        self.fc2 = nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.conv1(x), inplace=True)
        x = torch.sigmoid(F.max_pool2d(x + self.conv2(x), 2))
        return self.fc2(self.fc1(x.flatten(1)).clamp(min=0))


def functional() -> nn.Module:
    return Functional()


def normalized() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(144, 16),
        nn.BatchNorm1d(16),
        nn.ReLU(),
        nn.Linear(16, 10),
    )


class OnlyInEvaluation(nn.Module):
    """One layer runs in evaluation alone, another's output is detached."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(64, 16)
        self.calibration = nn.Linear(16, 16)
        self.monitor = nn.Linear(16, 16)
        self.out = nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.hidden(x.flatten(1)).relu()
        x = x + self.monitor(x).relu().detach()
        return self.out(x if self.training else self.calibration(x).relu())


def only_in_evaluation() -> nn.Module:
    return OnlyInEvaluation()


class Activated(nn.BatchNorm2d):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input).relu()


def activated() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3), Activated(4), nn.Flatten(), nn.Linear(144, 10))


def takes_norm(norm: str) -> nn.Module:
    middle = {"none": nn.Identity, "batch": lambda: nn.BatchNorm1d(16)}[norm]()
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), middle, nn.ReLU(), nn.Linear(16, 10))


class Reuses(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 64)
        self.out = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.flatten(1)
        return self.out(self.layer(self.layer(x).relu()).relu())


def reuses() -> nn.Module:
    return Reuses()


def raises() -> nn.Module:
    raise RuntimeError("no network today")


def not_a_module() -> object:
    return 3


def wrong_output() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 7))


def wrong_input() -> nn.Module:
    return nn.Linear(100, 10)


def data() -> tuple[object, object]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 6, generator=generator)
    y = (x[:, 0] > 0).long()
    return (x[:40], y[:40]), [(x[i].numpy(), int(y[i])) for i in range(40, 50)]


def regression() -> tuple[object, object]:
    x = torch.linspace(-1, 1, 30).reshape(-1, 1)
    return (x[:20], x[:20, 0] ** 2), (x[20:], x[20:, 0] ** 2)


def only_train() -> object:
    return torch.zeros(3, 2), torch.zeros(3)


def mismatched() -> tuple[object, object]:
    return (torch.zeros(3, 2), torch.zeros(4)), (torch.zeros(3, 2), torch.zeros(3))


def not_finite() -> tuple[object, object]:
    x = torch.full((4, 2), float("nan"))
    return (x, torch.zeros(4)), (x, torch.zeros(4))


constant = 3


def trained() -> nn.Module:
    """Statistics as after a few steps, far from where they end."""
    torch.manual_seed(0)
    model = normalized()
    for _ in range(3):
        model(torch.rand(32, 1, 8, 8))
    return model


def branching() -> nn.Module:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.conv(x)
            return self.bn(y) if y.sum() > 0 else y

    return Branching()
