"Every layer with every BatchNorm, in both directions, from both sources."
import pytest, torch
from torch import nn

from helpers import fold, norms, randomise

bn = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
conv = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
conv_t = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


def image(n, c=4): return torch.randn(2, c, *[6]*n, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize('example', [False, True])
@pytest.mark.parametrize('n', [1, 2, 3])
@pytest.mark.parametrize('kw', [dict(), dict(bias=False), dict(groups=2), dict(groups=2, bias=False, stride=2, dilation=2), dict(padding=1), dict(padding=1, padding_mode='reflect'), dict(groups=4)])
@pytest.mark.parametrize('norm', [dict(), dict(affine=False), dict(eps=.1)])
def test_batchnorm_after_a_convolution(n, kw, norm, example):
    new, report = fold(randomise(nn.Sequential(conv[n](4, 8, 2, **kw), bn[n](8, **norm))), image(n), example=example)
    assert not norms(new) and new[0].bias is not None


@pytest.mark.parametrize('example', [False, True])
@pytest.mark.parametrize('n', [1, 2, 3])
@pytest.mark.parametrize('kw', [dict(), dict(bias=False), dict(groups=2), dict(groups=4, bias=False), dict(stride=2, padding=1, output_padding=1, groups=2)])
def test_batchnorm_after_a_transposed_convolution(n, kw, example):
    new, _ = fold(randomise(nn.Sequential(conv_t[n](4, 8, 3, **kw), bn[n](8))), image(n), example=example)
    assert not norms(new)


@pytest.mark.parametrize('example', [False, True])
@pytest.mark.parametrize('n', [1, 2, 3])
@pytest.mark.parametrize('kw,folds', [(dict(), True), (dict(groups=2, bias=False, stride=2), True), (dict(padding='valid'), True), (dict(padding=1), False), (dict(padding='same'), False),
                                      (dict(padding=1, padding_mode='reflect'), True), (dict(padding=1, padding_mode='circular'), True), (dict(padding=1, padding_mode='replicate'), True)])
def test_batchnorm_before_a_convolution(n, kw, folds, example):
    new, report = fold(randomise(nn.Sequential(bn[n](4), conv[n](4, 8, 3, **kw))), image(n), example=example or n == 1)
    assert bool(norms(new)) != folds
    if not folds: assert 'pads with zeros' in report['0'].why


@pytest.mark.parametrize('kw,folds', [(dict(kernel_size=1), True), (dict(kernel_size=1, groups=2), True), (dict(kernel_size=2, stride=2), False), (dict(kernel_size=1, padding=1), False), (dict(kernel_size=1, stride=2), False)])
def test_batchnorm_before_a_transposed_convolution(kw, folds):
    new, report = fold(randomise(nn.Sequential(nn.BatchNorm2d(4), nn.ConvTranspose2d(4, 8, **kw))), image(2))
    assert bool(norms(new)) != folds


@pytest.mark.parametrize('bias', [True, False])
def test_linear(bias):
    x = torch.randn(5, 4, dtype=torch.float64)
    after, before = nn.Sequential(nn.Linear(4, 4, bias=bias), nn.BatchNorm1d(4)), nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 3, bias=bias))
    for m in map(randomise, (after, before)):
        assert not norms(fold(m, x)[0])
        new, report = fold(m, x, example=False)
        assert norms(new) and '[N, C] or [N, C, L]' in report.plan.rows[0].why
        assert norms(fold(m, torch.randn(5, 4, 4, dtype=torch.float64))[0]) # BatchNorm1d normalises axis 1, Linear writes the last
    flat = randomise(nn.Sequential(nn.Flatten(), after, before))
    assert not norms(fold(flat, x, example=False)[0])


@pytest.mark.parametrize('norm', [nn.SyncBatchNorm, nn.BatchNorm2d])
def test_sync_batchnorm(norm):
    assert not norms(fold(randomise(nn.Sequential(nn.Conv2d(4, 8, 3), norm(8), nn.ReLU(), nn.Conv2d(8, 2, 1))), image(2), example=False)[0])


def test_lazy_once_initialised():
    m = nn.Sequential(nn.LazyConv2d(8, 3), nn.LazyBatchNorm2d())
    m(image(2).float())
    assert not norms(fold(randomise(m), image(2))[0])


@pytest.mark.parametrize('kw', [dict(track_running_stats=False), dict(affine=False, track_running_stats=False)])
@pytest.mark.parametrize('example', [False, True])
def test_without_running_statistics(kw, example):
    _, report = fold(randomise(nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8, **kw))), image(2), example=example)
    assert 'no running statistics' in report['1'].why
