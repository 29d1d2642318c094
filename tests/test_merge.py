"Modules that merge themselves: believed only where they are right."
import copy

import pytest, timm, torch
import torch.nn.functional as F
from torch import nn

from fasterai.fold.merge import method
from fasterai.fold.verify import difference, run
from fasterai.misc.bn_folding import BN_Folder, FoldError
from helpers import assert_untouched, net, norms, randomise, snapshot

x = torch.randn(2, 4, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Rep(nn.Module):
    "A convolution, its BatchNorm and its input, added; what it makes of that is in the default dtype"
    def __init__(self, c=4): super().__init__(); self.conv, self.bn = nn.Conv2d(c, c, 3, padding=1, bias=False), nn.BatchNorm2d(c)
    def forward(self, x): return self.one(x) if hasattr(self, 'one') else self.bn(self.conv(x)) + x
    def kernel(self):
        s = self.bn.weight/(self.bn.running_var + self.bn.eps).sqrt()
        one = torch.eye(len(s), dtype=s.dtype)[..., None, None]
        return self.conv.weight*s[:, None, None, None] + F.pad(one, (1, 1, 1, 1)), self.bn.bias - self.bn.running_mean*s
    def merged(self):
        w, b = self.kernel()
        one = nn.Conv2d(*w.shape[:2], 3, padding=1)
        one.weight.data.copy_(w); one.bias.data.copy_(b)
        return one

class Deploys(Rep):
    def switch_to_deploy(self): self.one = self.merged(); del self.conv, self.bn
class Fuses(Rep):
    "Gives another module, and leaves itself"
    def fuse(self): return self.merged()
class Keeps(Rep):
    "Puts an Identity where the BatchNorm was"
    def reparameterize(self, strict=True): self.one = self.merged(); self.conv = self.bn = nn.Identity()
class Wrong(Rep):
    def fuse(self): m = self.merged(); m.bias.data.zero_(); return m
class Float32(Rep):
    "Says so, and loses what float64 has more"
    def fuse(self): m = self.merged(); m.weight.data = m.weight.data.float(); return m
class OtherShape(Rep):
    def fuse(self): return nn.Flatten()
class Raises(Rep):
    def fuse(self): self.bn = None; raise NotImplementedError('not yet')
class Argues(Rep):
    def fuse(self, how): raise AssertionError('is not called')
class Outer(nn.Module):
    "Merges itself wrongly, but what is in it is right"
    def __init__(self): super().__init__(); self.a, self.b = Fuses(), Deploys()
    def forward(self, x): return self.b(self.a(x).relu())
    def fuse(self): return self.a.fuse()
class InOrder(nn.Module):
    "Merges what is in it, and then what is left can merge again"
    def __init__(self): super().__init__(); self.a, self.c, self.bn = Fuses(), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
    def forward(self, x): return self.bn(self.c(self.a(x)))
    def reparameterize(self): pass


def merged(model, *xs, **kw):
    folder, before, want = BN_Folder(reparameterize=True), snapshot(model), run(model, xs, {})
    new = folder.fold(model, *xs, **kw)
    assert_untouched(model, before)
    assert difference(want, run(new, xs, {})).relative < 1e-12
    return new, folder.report


@pytest.mark.parametrize('kind', [Deploys, Fuses, Keeps], ids=lambda k: k.__name__)
def test_merges(kind):
    torch.manual_seed(0)
    for model in (randomise(nn.Sequential(kind(), nn.ReLU(), kind())), randomise(kind())):
        new, report = merged(model, x)
        assert not norms(new) and report.kept == 0 and all(r.merged and 'merged by its own' in r.how and r.into for r in report) and not report.notes
        assert [r.name for r in report] == norms(model) and next(new.parameters()).dtype == torch.float64
        assert report.after < report.before and 0 < report.check.relative < 1e-12
        assert report.plan.places == [n for n in dict.fromkeys(r.merged[0] for r in report) if n] # where the two agree


@pytest.mark.parametrize('kind, why', [(Wrong, 'what it gives differs by'), (Float32, 'what it gives differs by'), (OtherShape, 'ValueError'), (Raises, 'NotImplementedError: not yet')], ids=lambda k: getattr(k, '__name__', ''))
def test_is_not_believed(kind, why):
    torch.manual_seed(0)
    new, report = merged(randomise(nn.Sequential(kind(), Fuses())), x)
    assert type(new[0]) is kind and type(new[1]) is nn.Conv2d
    assert len(report.notes) == 1 and '`0` stays as it is' in report.notes[0] and why in report.notes[0] and report.notes[0] in str(report) and '`0`' in report._repr_html_()
    assert [bool(r.merged) for r in report] == [True, False] and report['0.bn'].folded # into its convolution


def test_is_not_asked():
    "A method that wants an argument, PyTorch's own modules, a block with a hook, one that is not called"
    assert not method(Argues()) and not method(nn.Conv2d(1, 1, 1)) and method(Fuses()) == 'fuse'
    torch.manual_seed(0)
    model = randomise(nn.ModuleList([Argues(), Fuses(), Fuses()]))
    model.__class__ = type('Net', (nn.ModuleList,), {'forward': lambda m, x: m[1](m[0](x))})
    model[1].conv.register_forward_hook(lambda m, x, y: None)
    new, report = merged(model, x)
    assert [type(m) for m in new] == [Argues, Fuses, Fuses] and not any(r.merged for r in report)
    assert 'it has hooks' in report.notes[0] and 'not called on the example' in report.notes[1]


def test_what_is_inside_is_asked_too():
    torch.manual_seed(0)
    new, report = merged(randomise(nn.Sequential(Outer())), x)
    assert type(new[0]) is Outer and type(new[0].a) is nn.Conv2d and len(report.notes) == 1 and all(r.merged for r in report)
    new, report = merged(randomise(nn.Sequential(InOrder())), x)
    assert not norms(new) and [bool(r.merged) for r in report] == [True, False] and report['0.bn'].into == '0.c'


def test_called_twice_and_held_twice():
    torch.manual_seed(0)
    block = Fuses()
    model = net(lambda m, x: m.again(m.block(x)) + m.bag[0](x), block=block, again=block)
    model.bag = [block]
    new, report = merged(model, x)
    assert new.block is new.again is new.bag[0] and type(new.block) is nn.Conv2d


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
def test_dtype_and_mode(dtype):
    torch.manual_seed(0)
    model = randomise(nn.Sequential(Deploys(), Fuses())).to(dtype).requires_grad_(False)
    folder = BN_Folder(reparameterize=True)
    new = folder.fold(model, x.to(dtype))
    assert all(r.merged for r in folder.report) and {p.dtype for p in new.parameters()} == {dtype} and not any(p.requires_grad for p in new.parameters()) and not any(m.training for m in new.modules())


def test_without_an_example_nobody_is_asked():
    "and that is said; the layers that are added become one by dataflow alone"
    model, folder = randomise(nn.Sequential(Fuses())), BN_Folder(reparameterize=True)
    new = folder.fold(model)
    note = '`0` is not asked to merge itself by its `fuse`: that is held against the original on an example'
    assert folder.report.notes == folder.plan(model).notes == (note,) and note in str(folder.report)
    assert type(new[0]) is Fuses and not any(r.merged for r in folder.report) and difference(run(model, (x,), {}), run(new, (x,), {})).relative < 1e-12


def test_plan_and_in_place(monkeypatch):
    torch.manual_seed(0)
    model = randomise(nn.Sequential(Deploys(), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), Raises()))
    before, folder, want = snapshot(model), BN_Folder(reparameterize=True), run(model, (x,), {})
    plan = folder.plan(model, x)
    assert_untouched(model, before)
    assert [bool(r.merged) for r in plan] == [True, False, False] and plan.notes
    def stop(*args, **kwargs): raise KeyboardInterrupt
    for at in ('plan_folds', 'new_weights', 'fold_inplace', '_difference', 'run'):
        with monkeypatch.context() as mp:
            mp.setattr('fasterai.misc.bn_folding.' + at, stop)
            with pytest.raises(KeyboardInterrupt): folder.fold(model, x, inplace=True)
        assert_untouched(model, before)
    assert folder.fold(model, x, inplace=True) is model and not norms(model) and difference(want, run(model, (x,), {})).relative < 1e-12


def test_a_model_that_looks_inside():
    "A block that gives the same, but whose parts the model reads besides"
    model = net(lambda m, x: m.block(x)*m.block.bn.eps, block=Fuses())
    before = snapshot(model)
    with pytest.raises(FoldError, match='does not run any more'): BN_Folder(reparameterize=True).fold(model, x)
    assert_untouched(model, before)


def test_baked_too():
    torch.manual_seed(0)
    model = nn.Sequential(Fuses(), nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 1)), nn.BatchNorm2d(4))
    randomise(model)
    folder = BN_Folder(bake=True, reparameterize=True)
    new = folder.fold(model, x)
    assert not norms(new) and folder.report.kept == 0 and difference(run(model, (x,), {}), run(new, (x,), {})).relative < 1e-12


@pytest.mark.parametrize('name', ['repghostnet_050', 'fastvit_t8', 'levit_128s'])
def test_networks(name):
    "timm's own blocks: every BatchNorm goes"
    torch.manual_seed(0)
    model = randomise(timm.create_model(name))
    size = model.default_cfg['input_size'] if name.startswith('levit') else (3, 64, 64)
    new, report = merged(model, torch.randn(1, *size, dtype=torch.float64))
    assert not norms(new) and report.kept == 0 and any(r.merged for r in report) and not report.notes


# What an attack found

class Remembers(Rep):
    "Keeps what it saw first"
    def __init__(self): super().__init__(); self.seen = None
    def forward(self, x):
        if self.seen is None: self.seen = x.abs().mean().detach()
        return super().forward(x)/self.seen
    def fuse(self): self.one = self.merged(); del self.conv, self.bn
class Number(Rep):
    def forward(self, x): return super().forward(x).sum().item()
    def fuse(self): self.bn = nn.Identity()
class Swaps(Rep):
    "Takes another of its methods for its `forward`"
    def fuse(self): self.one = self.merged(); del self.conv, self.bn; self.drop = nn.Dropout(.5); self.forward = self.fast
    def fast(self, x): return self.drop(self.one(x)) if self.training else self.one(x)
class Recursive(Rep):
    def forward(self, x, again=True): return self(x, False).relu() if again else super().forward(x)
    def fuse(self): self.one = self.merged(); del self.conv, self.bn
class Endless(Rep):
    def fuse(self): return nn.Sequential(Swallow(self.merged()), nn.Identity())
class Swallow(nn.Module):
    def __init__(self, one): super().__init__(); self.one = one
    def forward(self, x): return self.one(x)
    def fuse(self): return nn.Sequential(Swallow(self.one), nn.Identity())
class Property(Rep):
    @property
    def fuse(self): raise RuntimeError('not now')


def test_nothing_is_left_of_the_run_on_the_example():
    torch.manual_seed(0)
    model = randomise(nn.Sequential(Remembers()))
    folder = BN_Folder(reparameterize=True)
    new = folder.fold(model, x)
    assert folder.report['0.bn'].merged and model[0].seen is None and new[0].seen is None
    assert difference(run(model, (5*x,), {}), run(new, (5*x,), {})).relative < 1e-12


def test_what_gives_no_tensor_is_not_believed():
    folder = BN_Folder(reparameterize=True)
    model = randomise(nn.Sequential(Number()))
    assert folder.fold(model, x)(x) == pytest.approx(model(x), 1e-12) and 'no tensor to compare' in folder.report.notes[0]


def test_an_example_that_shows_nothing_is_not_believed():
    torch.manual_seed(0)
    model, folder = randomise(nn.Sequential(Remembers())), BN_Folder(reparameterize=True)
    folder.fold(model, x*float('nan'))
    assert 'no finite number to compare' in folder.report.notes[0]


def test_a_forward_that_is_swapped_belongs_to_the_new_one():
    torch.manual_seed(0)
    new = merged(randomise(nn.Sequential(Swaps())), x)[0]
    again = copy.deepcopy(new.train()).eval()
    assert again[0].forward.__self__ is again[0] and torch.equal(again(x), new.eval()(x))


@pytest.mark.parametrize('kind', [Recursive, Endless, Property], ids=lambda k: k.__name__)
def test_odd_ones(kind):
    torch.manual_seed(0)
    new, report = merged(randomise(nn.Sequential(kind())), x)
    assert report.kept == 0 and bool(report['0.bn'].merged) == (kind is not Property)
