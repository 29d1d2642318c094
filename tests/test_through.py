"Folding through a ReLU: what must fold beside what must not, with an example and without."
from math import inf

import pytest, torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import densenet121

from fasterai.fold.clamp import ChannelClamp
from fasterai.fold.verify import difference, run
from fasterai.misc.bn_folding import BN_Folder
from helpers import Net, assert_untouched, net, norms, randomise, snapshot

x = torch.randn(3, 4, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
examples = pytest.mark.parametrize('example', [False, True], ids=['symbolic', 'example'])
def conv(i=4, o=4, k=1, **kw): return nn.Conv2d(i, o, k, **kw)
def bn(c=4): return nn.BatchNorm2d(c)
def seeded(make): torch.manual_seed(0); return make()
def through(model, example=True, **kw):
    folder = BN_Folder(through_relu=True)
    return folder.fold(model, *([x] if example else []), **kw), folder.report


class Acting(nn.BatchNorm2d):
    "A BatchNorm that activates, as timm's does"
    def __init__(self, c, act): super().__init__(c); self.drop, self.act = nn.Identity(), act
    def forward(self, x): return self.act(self.drop(F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0., self.eps)))
class Leaking(nn.ReLU):
    def forward(self, x): return F.leaky_relu(x)
def hooked(m): m.register_forward_hook(lambda m, x, y: None); return m


folds = dict(
    convolution=lambda: net(lambda m, x: m.conv(m.act(m.bn(x))), bn=bn(), act=nn.ReLU(), conv=conv()),
    no_padding=lambda: net(lambda m, x: m.conv(m.act(m.bn(x))), bn=bn(), act=nn.ReLU(), conv=conv(k=3)),
    in_place=lambda: net(lambda m, x: m.conv(m.act(m.bn(x))), bn=bn(), act=nn.ReLU(inplace=True), conv=conv()),
    relu6=lambda: net(lambda m, x: m.conv(m.act(m.bn(x))), bn=bn(), act=nn.ReLU6(), conv=conv()),
    hardtanh=lambda: net(lambda m, x: m.conv(m.act(m.bn(x))), bn=bn(), act=nn.Hardtanh(-.3, .7), conv=conv()),
    two_readers=lambda: net(lambda m, x: m.a(y := m.act(m.bn(x))) + m.b(y), bn=bn(), act=nn.ReLU(), a=conv(), b=conv(groups=2)),
    pooled=lambda: net(lambda m, x: m.fc(F.adaptive_avg_pool2d(m.act(m.bn(x)), 1).flatten(1)), bn=bn(), act=nn.ReLU(), fc=nn.Linear(4, 5)),
    its_own_activation=lambda: net(lambda m, x: m.conv(m.bn(m.c(x).sigmoid())), c=conv(), bn=Acting(4, nn.ReLU()), conv=conv()),
    called_twice=lambda: net(lambda m, x: m.conv(m.act(m.bn(m.conv(m.act(m.bn(x)))))), bn=bn(), act=nn.ReLU(), conv=conv()),
    after_another=lambda: net(lambda m, x: m.c2(m.act2(m.b(m.c1(m.act1(m.a(x)))))), a=bn(), act1=nn.ReLU(), c1=conv(), b=bn(), act2=nn.ReLU(), c2=conv()),
    two_batchnorms=lambda: net(lambda m, x: m.conv(m.act(m.b(m.a(x)))), a=bn(), b=bn(), act=nn.ReLU(), conv=conv()),
    concatenated=lambda: net(lambda m, x: m.conv(torch.cat([m.act(m.bn(x)), x], 1)), bn=bn(), act=nn.ReLU(), conv=conv(8)),
)

keeps = dict( # with a word of the reason
    padded=(lambda: net(lambda m, x: m.conv(m.act(m.bn(x))), bn=bn(), act=nn.ReLU(), conv=conv(k=3, padding=1)), 'pads with zeros'),
    a_function=(lambda: net(lambda m, x: m.conv(F.relu(m.bn(x))), bn=bn(), conv=conv()), 'is no ReLU module'),
    another_activation=(lambda: net(lambda m, x: m.conv(m.act(m.bn(x))), bn=bn(), act=nn.GELU(), conv=conv()), 'is no ReLU module'),
    a_subclass=(lambda: net(lambda m, x: m.conv(m.act(m.bn(x))), bn=bn(), act=Leaking(), conv=conv()), 'is no ReLU module'),
    batchnorm_read_twice=(lambda: net(lambda m, x: m.conv(m.act(y := m.bn(x)) + y), bn=bn(), act=nn.ReLU(), conv=conv()), 'is also read by `add`'),
    activation_read_twice=(lambda: net(lambda m, x: (m.conv(y := m.act(m.bn(x))), y), bn=bn(), act=nn.ReLU(), conv=conv()), 'the caller of the model'),
    activation_called_elsewhere=(lambda: net(lambda m, x: m.conv(m.act(m.bn(x))) + m.act(x), bn=bn(), act=nn.ReLU(), conv=conv()), '`act` is also called elsewhere'),
    activation_hooked=(lambda: net(lambda m, x: m.conv(m.act(m.bn(x))), bn=bn(), act=hooked(nn.ReLU()), conv=conv()), 'the hook'),
    two_activations=(lambda: net(lambda m, x: m.conv(m.b(m.a(m.bn(x)))), bn=bn(), a=nn.ReLU(), b=nn.ReLU6(), conv=conv()), '`b` stands between'),
    max_pooled=(lambda: net(lambda m, x: m.conv(F.max_pool2d(m.act(m.bn(x)), 2)), bn=bn(), act=nn.ReLU(), conv=conv()), '`max_pool2d'),
    activation_is_an_attribute=(lambda: net(lambda m, x: m.conv(m.act(m.bn(x))), bn=bn(), act=nn.ReLU(), conv=conv()).apply(lambda m: setattr(m, 'forward', F.leaky_relu) if isinstance(m, nn.ReLU) else None), ''),
)


def both_signs(model):
    "γ of both signs, and zero, and next to zero"
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d) and len(m.weight) > 3:
            with torch.no_grad(): m.weight[:4] = torch.tensor([1., -1, 0, 1e-320])
    return model


@examples
@pytest.mark.parametrize('make', folds.values(), ids=folds)
def test_folds(make, example):
    for change in (lambda m: m, both_signs):
        model = change(make())
        before, want = snapshot(model), run(model, (x,), {})
        new, report = through(model, example)
        assert_untouched(model, before)
        assert report.kept == 0 and not norms(new) and any(r.through for r in report) and any(isinstance(m, ChannelClamp) for m in new.modules())
        assert not any(isinstance(m, (nn.ReLU, nn.Hardtanh)) for n, m in new.named_modules() if n in {r.through for r in report})
        assert difference(want, run(new, (x,), {})).relative < 1e-13
        again, report = through(new, example) # nothing is left
        assert len(report) == 0 and difference(want, run(again, (x,), {})).relative < 1e-13


@examples
@pytest.mark.parametrize('make, why', keeps.values(), ids=keeps)
def test_keeps(make, why, example):
    model = make()
    new, report = through(model, example)
    assert report.kept == 1 and why in report['bn'].why and difference(run(model, (x,), {}), run(new, (x,), {})).relative < 1e-13


@examples
def test_into_a_batchnorm(example):
    "One that stays, for the convolution behind it pads, takes in what comes through the ReLU"
    model = both_signs(seeded(lambda: net(lambda m, x: m.conv(m.b(m.act(m.a(x)))), a=bn(), act=nn.ReLU(), b=bn(), conv=conv(k=3, padding=1))))
    with torch.no_grad(): model.a.weight[3] = 1e-9
    new, report = through(model, example)
    assert report['a'].into == 'b' and not report['b'].folded and difference(run(model, (x,), {}), run(new, (x,), {})).relative < 1e-13


def test_only_where_it_is_asked_for():
    model = folds['convolution']()
    folder = BN_Folder()
    assert folder.plan(model).kept == 1 and folder.plan(model, x).kept == 1
    assert BN_Folder(through_relu=True).plan(model).folded == 1 and 'through `act`: conv2d' in str(BN_Folder(through_relu=True).plan(model))


@examples
def test_in_place_and_back(example, monkeypatch):
    model = folds['two_readers']()
    want, before = run(model, (x,), {}), snapshot(model)
    def interrupted(*args, **kwargs): raise KeyboardInterrupt
    with monkeypatch.context() as mp:
        mp.setattr('fasterai.misc.bn_folding.same_outline', interrupted)
        with pytest.raises(KeyboardInterrupt): through(model, example, inplace=True)
    assert_untouched(model, before)
    new, report = through(model, example, inplace=True)
    assert new is model and report.kept == 0 and difference(want, run(new, (x,), {})).relative < 1e-13

def test_state_loads_whatever_the_signs():
    "A skeleton folded from other weights takes the state of the folded network"
    trained, fresh = (randomise(net(lambda m, x: m.conv(m.act(m.bn(x))), bn=bn(), act=nn.ReLU(), conv=conv()), seed) for seed in (1, 2))
    with torch.no_grad(): fresh.bn.weight.abs_()
    new, skeleton = through(trained)[0], through(fresh)[0]
    assert skeleton.bn.has_upper is False and new.bn.has_upper
    assert not skeleton.load_state_dict(new.state_dict()).missing_keys
    assert torch.equal(skeleton(x), new(x))
    meta = through(folds['convolution']().to('meta'), example=False)[0]
    meta.load_state_dict(new.state_dict(), assign=True)
    assert torch.equal(meta(x), new(x))


@pytest.mark.parametrize('dtype, limit', [(torch.float32, 1e-5), (torch.bfloat16, 3e-2), (torch.float16, 4e-3)])
def test_precision(dtype, limit):
    model, half = seeded(folds['convolution']), seeded(folds['convolution']).to(dtype)
    want = run(model, (x,), {})
    new = BN_Folder(through_relu=True).fold(half, x.to(dtype))
    assert new.bn.lower.dtype == dtype and difference(want, run(new, (x.to(dtype),), {})).relative < limit
    assert difference(want, run(through(model)[0].to(dtype), (x.to(dtype),), {})).relative < limit


def test_a_bound_that_the_dtype_has_not():
    "A channel that is nearly off is constant in half precision, and says so where it can't be"
    def nearly_off():
        model = folds['convolution']()
        with torch.no_grad(): model.bn.weight.fill_(1e-7); model.bn.bias.fill_(-.1)
        return model
    half = nearly_off().half()
    new = BN_Folder(through_relu=True).fold(half, x.half())
    assert difference(run(half, (x.half(),), {}), run(new, (x.half(),), {})).relative < 1e-3
    with pytest.raises(ValueError, match='float16 has not'): through(nearly_off())[0].half()


def test_channels_last_and_compiled():
    model = folds['convolution']().to(memory_format=torch.channels_last)
    y = x.to(memory_format=torch.channels_last)
    new = BN_Folder(through_relu=True).fold(model, y)
    assert new.bn(y).is_contiguous(memory_format=torch.channels_last) and difference(run(model, (y,), {}), run(new, (y,), {})).relative < 1e-13
    program = torch.export.export(new, (y,))
    assert difference(run(new, (y,), {}), program.module()(y)).relative < 1e-13


@examples
def test_densenet(example):
    "torchvision's has one BatchNorm left, behind which stands a function; as written by hand with a module it has none"
    torch.manual_seed(0)
    model, image = randomise(densenet121()), torch.randn(2, 3, 64, 64, dtype=torch.float64)
    folder = BN_Folder(through_relu=True)
    new = folder.fold(model, *([image] if example else []))
    assert [r.name for r in folder.report if not r.folded] == ['features.norm5'] and difference(run(model, (image,), {}), run(new, (image,), {})).relative < 1e-12


# What an attack found

def test_a_batchnorm_of_several_ranks():
    model = net(lambda m, x: m.fc(m.act(m.bn(x)).movedim(1, -1)), bn=nn.BatchNorm1d(4), act=nn.ReLU(), fc=nn.Linear(4, 3))
    new = BN_Folder(through_relu=True).fold(model, torch.randn(2, 4, 5, dtype=torch.float64))
    for size in ((2, 4, 5), (4, 4), (1, 4), (3, 4)):
        y = torch.randn(size, dtype=torch.float64)
        assert difference(run(model, (y,), {}), run(new, (y,), {})).relative < 1e-13


class Block(nn.Module):
    def __init__(self, act): super().__init__(); self.bn, self.act, self.fc = nn.BatchNorm1d(4), act, nn.Linear(4, 4)
    def forward(self, x): return self.fc(self.act(self.bn(x)))

@pytest.mark.parametrize('forward', [lambda m, x: m.act(m.block(x)) if int(x.mean() > 0) else m.block(x), lambda m, x: [m.block(y) if i == 0 else m.act(y) for i, y in enumerate(x.chunk(len(x)))][-1]])
def test_an_activation_that_is_called_where_nobody_can_follow(forward):
    act = nn.ReLU()
    model = net(forward, block=Block(act), act=act)
    data = torch.randn(1, 4, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64), -torch.rand(2, 4, dtype=torch.float64)
    for example in data:
        new = BN_Folder(through_relu=True).fold(model, example)
        for y in data: assert difference(run(model, (y,), {}), run(new, (y,), {})).relative < 1e-13


@examples
@pytest.mark.parametrize('dtype, gamma, beta', [(torch.float64, 1e-307, -.3), (torch.float32, 1e-38, -.3), (torch.bfloat16, 1e-38, -.3), (torch.float16, 2e-6, -.1), (torch.float16, 1e-5, -.6)])
def test_a_scale_that_the_weights_can_not_hold(dtype, gamma, beta, example):
    "The bound would be there, and the weight that makes up for it would be zero"
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm2d(64), nn.ReLU(), nn.Conv2d(64, 4, 1)).eval().to(dtype)
    with torch.no_grad(): model[0].weight.fill_(gamma); model[0].bias.fill_(beta); model[0].weight[0] = 1
    y = torch.randn(2, 64, 3, 3).to(dtype)
    folder = BN_Folder(through_relu=True)
    new = folder.fold(model, *([y] if example else []))
    assert difference(run(model.double(), (y.double(),), {}), run(new, (y,), {})).relative < 1e-2 and 'would not fit its dtype' in folder.report['0'].why


def test_a_bound_beyond_half_precision():
    "An ordinary dead channel, in float32"
    model = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1)).eval()
    with torch.no_grad(): model[0].weight[0] = 1e-6; model[0].bias[0] = -.1
    y = torch.randn(2, 4, 3, 3)
    for example in ((), (y,)):
        folder = BN_Folder(through_relu=True)
        new = folder.fold(model, *example)
        assert folder.report.kept == 0 and difference(run(model, (y,), {}), run(new, (y,), {})).relative < 1e-5


def dense(inplace=True): return seeded(lambda: net(lambda m, x: m.c2(m.act(m.bn(torch.cat([m.c1(x), x], 1)))), c1=conv(), bn=bn(8), act=nn.ReLU(inplace=inplace), c2=conv(8)))

@pytest.mark.parametrize('grad', [True, False])
def test_in_place_and_what_comes_after(grad):
    "Traced, scripted, exported, mapped, differentiated, whether gradients are on or off"
    model = dense()
    with torch.set_grad_enabled(grad):
        new = through(model)[0]
        assert new.bn.inplace and not through(dense(False))[0].bn.inplace
        torch.jit.script(new.bn)(torch.cat([x, x], 1))
        want = model(x)
        for made in (torch.jit.trace(new, x), torch.export.export(new, (x,)).module()):
            for again in (True, False):
                with torch.set_grad_enabled(again): assert difference(want, made(x)).relative < 1e-13
        assert difference(want, torch.vmap(new)(x[:, None]).flatten(0, 1)).relative < 1e-13
    for m in (model, new): m(x).pow(2).sum().backward()
    assert difference(model.c1.weight.grad, new.c1.weight.grad).relative < 1e-12


def test_no_gradient_where_it_is_off():
    def forward(m, x):
        h = torch.cat([m.c1(x), x], 1)
        with torch.no_grad(): h = m.act(m.bn(h))
        return m.c2(h)
    model = net(forward, c1=conv(), bn=bn(8), act=nn.ReLU(inplace=True), c2=conv(8))
    for example in (False, True):
        new = through(model, example)[0]
        new(x).sum().backward()
        assert new.c1.weight.grad is None


def test_inference_mode():
    model = dense()
    new = through(model)[0]
    with torch.inference_mode(): assert difference(model(x), new(x)).relative < 1e-13
    with torch.inference_mode(): given = torch.cat([model.c1(x), x], 1)
    with torch.no_grad(): assert new.bn(given) is not given # what was made in inference mode can't be written outside of it
    assert difference(torch.compile(model, backend='eager')(x), torch.compile(new, backend='eager')(x)).relative < 1e-13
