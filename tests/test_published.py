"The published examples."
import pytest, torch, torchvision

from fasterai.misc.bn_folding import BN_Folder, count_parameters
from helpers import assert_untouched, fold, norms, randomise, snapshot

x = torch.randn(2, 3, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

published = """BasicBlock(
  (conv1): Conv2d(64, 128, kernel_size=(3, 3), stride=(2, 2), padding=(1, 1))
  (bn1): Identity()
  (relu): ReLU(inplace=True)
  (conv2): Conv2d(128, 128, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1))
  (bn2): Identity()
  (downsample): Sequential(
    (0): Conv2d(64, 128, kernel_size=(1, 1), stride=(2, 2))
    (1): Identity()
  )
)"""


@pytest.mark.parametrize('example', [False, True])
def test_resnet18(example):
    model = randomise(torchvision.models.resnet18(num_classes=2))
    new, report = fold(model, x, example=example)
    assert (count_parameters(model), count_parameters(new)) == (11_177_538, 11_172_738) == (report.before, report.after)
    assert str(new.layer2[0]) == published
    assert new.training is False and all(p.requires_grad for p in new.parameters())


@pytest.mark.parametrize('name', ['vgg16_bn', 'resnet50', 'resnet101'])
@pytest.mark.parametrize('example', [False, True])
def test_every_batchnorm_gone(name, example):
    new, report = fold(randomise(getattr(torchvision.models, name)(num_classes=10)), x, example=example)
    assert not norms(new) and report.kept == 0


@pytest.fixture(scope='module')
def dls():
    from fastai.data.core import Datasets
    from fastai.data.transforms import ItemGetter
    xs = torch.randn(24, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    items = [(a, torch.tensor(i % 2)) for i, a in enumerate(xs)]
    dls = Datasets(items, [[ItemGetter(0)], [ItemGetter(1)]], splits=[range(16), range(16, 24)]).dataloaders(bs=8, device='cpu')
    dls.c = 2
    return dls


def learner(dls, name):
    "An untrained Learner in eval mode, with random statistics"
    from fastai.vision.all import CrossEntropyLossFlat, Learner, vision_learner, xresnet18
    if name == 'xresnet18': learn = Learner(dls, xresnet18(n_out=2), loss_func=CrossEntropyLossFlat())
    else: learn = vision_learner(dls, getattr(torchvision.models, name), pretrained=False, normalize=False, n_out=2, loss_func=CrossEntropyLossFlat())
    randomise(learn.model).float()
    return learn


@pytest.mark.parametrize('name', ['resnet18', 'xresnet18'])
def test_learners_heads_included(dls, name):
    learn, bn = learner(dls, name), BN_Folder()
    before = snapshot(learn.model)
    for source in (learn, learn.model): # with a batch of its validation set, and from its code alone
        new = bn.fold(source)
        assert not norms(new) and bn.report.kept == 0
        assert bn.report.check.relative < 1e-4 if source is learn else bn.report.check is None
        assert_untouched(learn.model, before)
    fold(randomise(learn.model), x, example=False)
