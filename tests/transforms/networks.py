"""A network as people write it."""

from torch import nn
from torch.nn import functional as F


class BasicBlock(nn.Module):
    """He et al. 2016, *Deep Residual Learning*, arXiv 1512.03385, figure 2."""

    def __init__(self, inside, outside, stride=1):
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outside)
        self.conv2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outside)
        self.shortcut = nn.Sequential()
        if stride != 1 or inside != outside:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inside, outside, 1, stride, bias=False), nn.BatchNorm2d(outside)
            )

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        return F.relu(out)


class ResNet18(nn.Module):
    """ResNet-18 for images of 32 pixels, as in most repositories that train on CIFAR."""

    def __init__(self, width=64, classes=10):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        inside, stages = width, []
        for stage in range(4):
            outside = width * 2**stage
            blocks = [BasicBlock(inside, outside, 1 + (stage > 0)), BasicBlock(outside, outside)]
            stages.append(nn.Sequential(*blocks))
            inside = outside
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.linear = nn.Linear(inside, classes)

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.layer4(self.layer3(self.layer2(self.layer1(out))))
        return self.linear(F.adaptive_avg_pool2d(out, 1).flatten(1))
